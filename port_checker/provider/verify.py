"""The whole flow: listen, ask, look again, judge. Each phase returns what the next one needs."""

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from ipaddress import IPv4Address, IPv6Address

from port_checker import advice as advice_for
from port_checker.addresses import Address, parse_address
from port_checker.linux import descriptors_left
from port_checker.provider.certificates import check_tls
from port_checker.provider.evidence import Capture
from port_checker.provider.http_client import HttpClient, LocalPorts, ServerUrl
from port_checker.provider.listeners import MAX_HELD, Listeners
from port_checker.provider.notes import Findings, notes
from port_checker.provider.origin import Contact, Witness, is_own
from port_checker.provider.phases import Phases, counted_servers
from port_checker.provider.place import Share, share_of
from port_checker.provider.remote import (
    MAX_PORTS_PER_REQUEST,
    Server,
    ServerError,
    Waits,
)
from port_checker.provider.report import (
    PortReport,
    Report,
    ServerReport,
    port_pairs,
    reached_at,
)

# Descriptors kept for connections to servers, connections that listeners see, and the rest.
_OTHER_DESCRIPTORS = 48 + MAX_HELD


async def verify(
    ports: Sequence[int | tuple[int, int]],
    *,
    servers: Sequence[str],
    tls: Sequence[int | tuple[int, int]] = (),
    ip: str | Address | None = None,
    family: int | None = None,
    on_progress: Callable[[str], None] = lambda _: None,
    on_checked: Callable[[int, int], None] = lambda _done, _total: None,
    waits: Waits = Waits(),  # noqa: B008  # frozen
) -> Report:
    """Verify that the world can reach this machine on its ports.

    Opens a temporary listener on each port, unless another program uses it, and asks all servers
    at once to connect. The listeners are always closed, even if this is cancelled. A server's
    failure is part of the report.

    Args:
        ports: TCP ports, 1 to 65535. A pair is a port as the world sees it and the port of this
            machine that it is forwarded to.
        servers: URLs of port checkers.
        tls: Ports, or pairs, at which programs of this machine serve TLS (HTTPS, say). Their
            certificates are checked after the other ports; no listeners are opened on them.
        ip: This machine's public address; by default, each server is asked about the address that
            it sees.
        family: 4 or 6, the IP version to check; by default that of ``ip``, else 4 where a server
            can be reached over it, else 6.
        on_progress: Called with a few words on what is happening.
        on_checked: Called with the number of ports that have been checked, and of all ports.
        waits: How long to wait.

    Returns:
        The report.

    Raises:
        TypeError: An argument is of another type.
        ValueError: ``ip`` is not an IP address or not of ``family``, a port is out of range or
            leads to two others, or a URL is not valid.
    """
    pairs = port_pairs(ports)
    endpoints = [pair for port in tls for pair in port_pairs([port])]
    urls = _server_urls(servers)
    address = _address(ip)
    if family not in (None, 4, 6):
        raise ValueError(f"family must be 4 or 6, not {family!r}")
    if address and family not in (None, address.version):
        raise ValueError(f"{address} is not an IPv{family} address")
    local_ports = LocalPorts({pair.inner for pair in pairs})
    if address:
        family = address.version
    elif not family:
        family = await _choose_family(urls, local_ports, waits)
    http = _client(local_ports, None if address else family, waits)
    contacts = [
        Contact(Server(url, http, on_progress, waits), address, given=address is not None)
        for url in urls
    ]
    reports: list[PortReport] = []
    reached_in_groups, banned, loops = 0, dict[str, int](), None
    room = descriptors_left() - _OTHER_DESCRIPTORS
    size = max(1, min(room, MAX_PORTS_PER_REQUEST))
    parts = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    with ExitStack() as stack:
        capture = Capture.open()
        if capture:
            stack.enter_context(capture)
        for part in parts:
            async with Listeners([pair.inner for pair in part], family) as listeners:
                if not reports:
                    contacts = await _introduce(contacts, family, on_progress)
                witness = Witness(listeners, capture)
                check = Phases(part, witness, witness.now(), family, waits, on_progress)
                contacts, answers = await check.ask(contacts)
                half_open = listeners.half_open()
                contacts = [await check.identify(c, answers[c.url]) for c in contacts]
                answers, newly_reached, new_bans = await check.ask_in_groups(contacts, answers)
                banned |= new_bans
                counted = counted_servers(contacts)
                seen = check.seen(counted)
                arrivals = await check.trace(
                    counted,
                    answers,
                    seen,
                    suspicious=len(parts) == 1,
                    limited=newly_reached > 0 or bool(new_bans),
                )
                elsewhere = await check.elsewhere(counted, answers) if not new_bans else {}
                new_reports = check.judge(
                    contacts, answers, seen, half_open, arrivals, elsewhere, banned=bool(new_bans)
                )
                if loops is None:
                    loops = await check.loops_back(counted, new_reports, local_ports)
                reports += new_reports
                reached_in_groups += newly_reached
            on_checked(len(reports), len(pairs))
    if not reports:
        contacts = await _introduce(contacts, family, on_progress)
    moved = await _moved(contacts, reports)
    share, reports = _shared_by_ports(contacts, reports)
    endpoint_reports = [await check_tls(contacts, pair) for pair in endpoints]
    server_reports = [
        ServerReport(c.url, c.asked, c.error, str(c.address) if c.address else None)
        for c in contacts
    ]
    return Report(
        ip=_address_of(server_reports, reports),
        servers=server_reports,
        ports=reports,
        notes=list(
            notes(contacts, reports, Findings(reached_in_groups, banned, moved, share, loops))
        ),
        family=family,
        tls=endpoint_reports,
    )


async def _introduce(
    contacts: Sequence[Contact], family: int, on_progress: Callable[[str], None]
) -> list[Contact]:
    """Ask each server for this machine's address, unless it was given."""
    if all(contact.given for contact in contacts):
        return list(contacts)
    on_progress("asking for this machine's address")
    contacts = await asyncio.gather(*(contact.after_introduction() for contact in contacts))
    known = next((contact.address for contact in contacts if contact.address), None)
    return [_with_address(contact, contact.address or known, family) for contact in contacts]


def _with_address(contact: Contact, address: Address | None, family: int) -> Contact:
    error = contact.error
    if not error and address is None:
        error = "does not tell callers their address; give it with --ip"
    elif not error and address and address.version != family:
        error = f"sees this machine at {address}, not at an IPv{family} address"
    return dataclasses.replace(contact, address=None if error else address, error=error)


async def _moved(
    contacts: Sequence[Contact], ports: Sequence[PortReport]
) -> tuple[Address, Address] | None:
    """Return this machine's old and new address, if nothing got through and it has changed."""
    if any(port.reachable for port in ports):
        return None
    for contact in contacts:
        address = contact.address
        if address and contact.asked and not contact.given:
            with contextlib.suppress(ServerError):
                now = (await contact.server.introduce()).address
                if now and now != address and now.version == address.version:
                    return address, now
    return None


def _shared_by_ports(
    contacts: Sequence[Contact], ports: list[PortReport]
) -> tuple[Share | None, list[PortReport]]:
    """Recognize an address whose ports are shared out, and mark the ports of other customers."""
    addresses = {contact.address for contact in contacts if contact.address}
    address = addresses.pop() if len(addresses) == 1 else None
    if not address or address.version == 6 or is_own(address):
        return None, ports
    lost = {port.port for port in ports if port.advice in advice_for.NOTHING_GOT_THROUGH}
    share = share_of({port.port for port in ports if port.reachable}, lost)
    if not share or not share.certain:
        return share, ports
    others = advice_for.NOT_IN_SHARE
    return share, [
        dataclasses.replace(port, advice=others) if port.port in lost else port for port in ports
    ]


def _address_of(servers: Sequence[ServerReport], ports: Sequence[PortReport]) -> str | None:
    """Return the address at which all reachable ports were reached.

    None if no server knows an address, or if different ports were reached at different addresses.
    """
    reachable = {port.port for port in ports if port.reachable}
    at_each = reached_at(servers, ports)
    return next((ip for ip, reached in at_each.items() if reached == reachable), None)


async def _choose_family(urls: Sequence[ServerUrl], ports: LocalPorts, waits: Waits) -> int:
    """Choose IPv4 where a server can be reached over it, else IPv6."""
    http = _client(ports, 4, waits)
    families = dict(zip(urls, await asyncio.gather(*map(http.families, urls)), strict=True))
    if not any(6 in versions for versions in families.values()):
        return 4
    over_ipv4 = [url for url, versions in families.items() if 4 in versions]
    return 4 if any(await asyncio.gather(*map(http.reaches, over_ipv4))) else 6


def _client(ports: LocalPorts, family: int | None, waits: Waits) -> HttpClient:
    return HttpClient(ports, family, waits.connect, waits.answer, waits.look_up)


def _server_urls(servers: Sequence[str]) -> list[ServerUrl]:
    if isinstance(servers, str | bytes) or not all(isinstance(url, str) for url in servers):
        raise TypeError("servers must be a list of URLs")
    return list({str(url): url for url in map(ServerUrl.parse, servers)}.values())


def _address(ip: str | Address | None) -> Address | None:
    if ip is None:
        return None
    if not isinstance(ip, str | IPv4Address | IPv6Address):
        raise TypeError(f"ip must be an IP address, not {ip!r}")
    return parse_address(str(ip))
