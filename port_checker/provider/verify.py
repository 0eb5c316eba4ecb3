"""The whole flow: listen, ask, judge, look again."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address

from port_checker import advice
from port_checker.addresses import Address, parse_address
from port_checker.connect import Verdict, VerdictKind
from port_checker.linux import (
    RouteType,
    TcpState,
    descriptors_left,
    ephemeral_ports,
    half_open_ports,
    packets_not_delivered,
    reserved_ports,
    route_type,
    tcp_sockets,
)
from port_checker.provider.certificates import judge_tls
from port_checker.provider.http_client import HttpClient, LocalPorts, ServerUrl
from port_checker.provider.listeners import MAX_HELD, Listeners
from port_checker.provider.remote import MAX_PORTS_PER_REQUEST, Server, ServerError, Waits
from port_checker.provider.report import (
    Observation,
    Place,
    PortPair,
    PortReport,
    Report,
    TlsAnswer,
    TlsReport,
    judge,
    port_pairs,
    port_ranges,
)
from port_checker.provider.second_look import ask_in_groups, looks_limited, trace_forwards

# Descriptors kept for connections to servers, connections that listeners see, and the rest.
_OTHER_DESCRIPTORS = 48 + MAX_HELD
# Packets that may arrive meanwhile and have nothing to do with the check.
_OTHER_PACKETS = 10
_SHARED = IPv4Network("100.64.0.0/10")  # RFC 6598


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
    at once to connect. The listeners are always closed, also when this is cancelled. A server's
    failure is part of the report.

    Args:
        ports: TCP ports, 1 to 65535. A pair is a port as the world sees it and the port of this
            machine that it is forwarded to.
        servers: URLs of port checkers.
        tls: Ports, or pairs, at which programs of this machine serve TLS (HTTPS, say). After the
            other ports, their certificates are checked; no listeners are opened on these.
        ip: This machine's public address; by default, each server is asked about the address that
            it sees.
        family: 4 or 6, the IP version to check; by default that of ``ip``, else 4 where a server
            can be reached over it, else 6.
        on_progress: Called with a few words on what is happening.
        on_checked: Called with how many ports have been checked, and how many there are.
        waits: How long to wait.

    Returns:
        The report.

    Raises:
        TypeError: An argument is of another type.
        ValueError: ``ip`` is not an IP address or not of ``family``, a port is out of range or
            named for two others, or a URL is not one.
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
    http = HttpClient(local_ports, None if address else family, waits.connect, waits.answer)
    check = _Check(
        servers=[Server(url, http, on_progress, waits) for url in urls],
        given=address,
        family=family,
        waits=waits,
        on_progress=on_progress,
    )
    reports: list[PortReport] = []
    parts = list(_in_parts(pairs, descriptors_left() - _OTHER_DESCRIPTORS))
    for part in parts:
        reports += await check.verify_part(part, only_part=len(parts) == 1)
        on_checked(len(reports), len(pairs))
    return check.report(reports, [await check.verify_tls(pair) for pair in endpoints])


@dataclass
class _Check:
    """One run of ``verify``, and what it has found out about all ports."""

    servers: Sequence[Server]
    given: Address | None
    family: int
    waits: Waits
    on_progress: Callable[[str], None]
    let_in_later: int = 0

    async def verify_part(self, pairs: Sequence[PortPair], *, only_part: bool) -> list[PortReport]:
        """Verify as many ports as this process can listen on at once."""
        async with Listeners([pair.inner for pair in pairs], self.family) as listeners:
            await self._find_address()
            asked = [pair for pair in pairs if listeners.local[pair.inner] in ("bound", "in use")]
            discarded = packets_not_delivered(self.family)
            await self._ask(asked, listeners)
            half_open = half_open_ports({pair.inner for pair in asked})
            failed = [
                pair
                for pair in asked
                if not self._is_accessible(pair)
                and not {pair.inner} & (listeners.seen.keys() | half_open)
            ]
            place = self._place(len(failed), discarded)
            let_in_later = await self._ask_in_groups(asked, listeners)
            self.let_in_later += let_in_later
            seen = set(listeners.seen)  # before tracing, which forgets them
            arrivals = None
            suspicious = only_part and not place.own_address
            if not let_in_later and self._wants_tracing(asked, listeners, suspicious):
                arrivals = await self._trace(asked, listeners)
            return [
                judge(self._observe(pair, listeners, seen, half_open, arrivals), place)
                for pair in pairs
            ]

    async def verify_tls(self, pair: PortPair) -> TlsReport:
        """Have each server check the certificate at one port."""
        await self._find_address()
        said = await asyncio.gather(
            *(server.check_tls(pair.outer) for server in self.servers), return_exceptions=True
        )
        answers: dict[str, TlsAnswer] = {}
        reasons = []
        for server, answer in zip(self.servers, said, strict=True):
            if isinstance(answer, TlsAnswer):
                answers[str(server.url)] = answer
            elif isinstance(answer, ServerError):
                reasons.append(f"{server.url} {answer}")
            else:
                raise answer
        is_listened_on = any(sock.state is TcpState.LISTEN for sock in tcp_sockets({pair.inner}))
        address = self._address
        return judge_tls(
            pair,
            answers,
            reason="; ".join(reasons) or "no server was asked",
            is_listened_on=is_listened_on,
            own_address=bool(address and _is_own(address)),
            ip=str(address),
        )

    async def _find_address(self) -> None:
        if self.given:
            for server in self.servers:
                server.address = self.given
            return
        unknown = [s for s in self.servers if not s.address and not s.error]
        if unknown:
            self.on_progress("asking for this machine's address")
            await asyncio.gather(*(server.fetch_address() for server in unknown))
        known = next((server.address for server in self.servers if server.address), None)
        for server in self.servers:
            if known and not server.address and server.does_not_know_address:
                server.address, server.error = known, None
            elif server.address and server.address.version != self.family:
                seen, server.address = server.address, None
                server.error = f"sees this machine at {seen}, not at an IPv{self.family} address"

    async def _ask(self, pairs: Sequence[PortPair], listeners: Listeners) -> None:
        # Every second one first: a limit on new connections lets in what comes first, so that what
        # it drops is scattered, unlike a range that a firewall closes.
        ports = [pair.outer for pair in (*pairs[::2], *pairs[1::2])]
        await asyncio.gather(*(server.ask(ports) for server in self.servers if server.address))
        await self._wait_until_seen(pairs, listeners)

    async def _wait_until_seen(self, pairs: Sequence[PortPair], listeners: Listeners) -> None:
        expected = [
            pair.inner
            for pair in pairs
            if listeners.local[pair.inner] == "bound" and self._is_accessible(pair)
        ]
        await listeners.wait_until_seen(expected, self.waits.late_connections)

    def _answers(self, pair: PortPair) -> dict[str, Verdict]:
        return {
            str(server.url): server.verdicts[pair.outer]
            for server in self.servers
            if pair.outer in server.verdicts
        }

    def _is_accessible(self, pair: PortPair) -> bool:
        return any(verdict.accessible for verdict in self._answers(pair).values())

    async def _ask_in_groups(self, pairs: Sequence[PortPair], listeners: Listeners) -> int:
        """Ask again in small groups where a limit on new connections shows."""
        reached = {pair.outer for pair in pairs if self._is_accessible(pair)}
        lost = [
            pair.outer
            for pair in pairs
            if listeners.local[pair.inner] == "bound"
            # Also where a packet that was sent again arrived, too late for the server.
            and {said.kind for said in self._answers(pair).values()} == {VerdictKind.TIMED_OUT}
        ]
        if not looks_limited(pairs, reached, set(lost)):
            return 0
        server = next(s for s in self.servers if s.verdicts.keys() & set(lost))
        through = await ask_in_groups(server, lost, self.waits)
        if through:
            await self._wait_until_seen(pairs, listeners)
        return through

    def _wants_tracing(
        self, pairs: Sequence[PortPair], listeners: Listeners, suspicious: bool
    ) -> bool:
        """Whether the forwards must be traced.

        Where what was said and what was seen differ, and where a router may exchange ports without
        that.
        """
        bound = [pair for pair in pairs if listeners.local[pair.inner] == "bound"]
        seen = [pair for pair in bound if pair.inner in listeners.seen]
        accessible = [pair for pair in pairs if self._is_accessible(pair)]
        if not seen or not accessible:
            return False
        differ = {pair for pair in bound if pair in accessible} != set(seen)
        return differ or (suspicious and len(accessible) > 1)

    async def _trace(
        self, pairs: Sequence[PortPair], listeners: Listeners
    ) -> dict[int, int] | None:
        self.on_progress("looking at which port each connection arrives")
        for server in self.servers:
            open_ports = [
                pair
                for pair in pairs
                if pair.outer in server.verdicts and server.verdicts[pair.outer].accessible
            ]
            if open_ports:
                return await trace_forwards(server, open_ports, listeners, self.waits)
        return None

    def _observe(
        self,
        pair: PortPair,
        listeners: Listeners,
        seen: set[int],
        half_open: set[int],
        arrivals: dict[int, int] | None,
    ) -> Observation:
        arrives_at = None
        arrived = pair.inner in seen
        if arrivals is not None:
            at = arrivals.get(pair.outer)
            arrives_at = at if at != pair.inner else None
            # What others' forwards brought here says nothing about this port.
            arrived = at == pair.inner or (
                arrived and not self._is_accessible(pair) and pair.inner not in arrivals.values()
            )
        return Observation(
            ports=pair,
            local=listeners.local[pair.inner],
            seen=arrived or pair.inner in half_open,
            answers=self._answers(pair),
            arrives_at=arrives_at,
            holders=listeners.holders.get(pair.inner, ()),
            other_family=pair.inner in listeners.other_family,
            excluded=any(pair.outer in server.excluded for server in self.servers),
            reason="; ".join(
                f"{server.url}: {server.error}" for server in self.servers if server.error
            )
            or "no server was asked",
        )

    @property
    def _address(self) -> Address | None:
        return next((server.address for server in self.servers if server.address), self.given)

    @property
    def _local(self) -> Address | None:
        """The address of this machine from which a server was asked."""
        return next((server.local for server in self.servers if server.local), None)

    def _place(self, failed: int, discarded_before: int | None) -> Place:
        address = self._address
        own = bool(address and _is_own(address))
        discarded = packets_not_delivered(self.family)
        arrived = None
        if failed and discarded is not None and discarded_before is not None:
            arrived = _arrived(failed, discarded - discarded_before)
        return Place(
            own_address=own,
            caller_hidden=bool(address and not self.given and not own and not address.is_global),
            arrived=arrived,
            family=self.family,
            address=address if own else self._local,
        )

    def report(self, ports: list[PortReport], tls: list[TlsReport]) -> Report:
        """Put together what was found."""
        address = self._address
        return Report(
            ip=str(address) if address else None,
            servers=[server.report() for server in self.servers],
            ports=ports,
            notes=list(self._notes(ports)),
            family=self.family,
            tls=tls,
        )

    def _notes(self, ports: Sequence[PortReport]) -> Iterator[str]:
        for server in self.servers:
            if server.address:
                yield from self._notes_on(server, server.address)
        addresses = {str(s.url): str(s.address) for s in self.servers if s.address}
        if len(set(addresses.values())) > 1:
            written = ", ".join(f"{ip} ({url})" for url, ip in addresses.items())
            yield advice.ADDRESSES_DIFFER.format(addresses=written)
        yield from self._notes_on_address(ports)
        if self.let_in_later:
            yield advice.CONNECTION_LIMIT.format(retried=self.let_in_later)
        wrong = [PortPair(port.port, port.arrives_at) for port in ports if port.arrives_at]
        if wrong:
            yield advice.FORWARDS_CROSSED.format(
                outer=port_ranges(PortPair(pair.outer, pair.outer) for pair in wrong),
                inner=port_ranges(PortPair(pair.inner, pair.inner) for pair in wrong),
                pairs=port_ranges(wrong),
            )
        taken = {port.inner for port in ports if port.local == "outgoing connection"}
        if taken & set(ephemeral_ports()):
            ours = port_ranges(PortPair(port.inner, port.inner) for port in ports)
            reserved = reserved_ports()
            both = ",".join(filter(None, [reserved, ours.replace(" ", "")]))
            yield advice.RESERVE_PORTS.format(ports=both)

    def _notes_on(self, server: Server, address: Address) -> Iterator[str]:
        if server.remote and _is_own(server.remote):
            yield advice.SERVER_HERE.format(url=server.url)
        elif not address.is_global:
            if _is_own(address) or self.given:
                yield advice.SERVER_NEARBY.format(url=server.url, ip=address)
            else:
                yield advice.NAT_BEFORE_SERVER.format(url=server.url, ip=address)

    def _notes_on_address(self, ports: Sequence[PortReport]) -> Iterator[str]:
        """Name a shared address where nothing at all got through."""
        address = self._address
        answers = [verdict for port in ports for verdict in port.answers.values()]
        if not address or not answers or any(verdict.accessible for verdict in answers):
            return
        if address.version == 6 or not address.is_global or _is_own(address):
            return
        local = self._local
        if isinstance(local, IPv4Address) and local in _SHARED:
            yield advice.SHARED_ADDRESS_HERE.format(local=local)
        elif not any(port.advice == advice.OWN_FIREWALL for port in ports):
            yield advice.SHARED_ADDRESS.format(ip=address)


def _arrived(failed: int, discarded: int) -> bool | None:
    """Tell from packets that the kernel discarded whether failed connections arrived here.

    Each would have brought at least one packet; some other packets may have come meanwhile.
    """
    if discarded >= max(2 * failed, failed + _OTHER_PACKETS):
        return True
    if discarded < max(1, failed / 4):
        return False
    return None


def _is_own(address: Address) -> bool:
    with contextlib.suppress(OSError):
        return route_type(address) is RouteType.LOCAL
    return False


async def _choose_family(urls: Sequence[ServerUrl], ports: LocalPorts, waits: Waits) -> int:
    """Choose IPv4 where a server can be reached over it, else IPv6."""
    http = HttpClient(ports, 4, waits.connect, waits.answer)
    families = await asyncio.gather(*(http.families(url) for url in urls))
    if not any(6 in some for some in families):
        return 4
    reached = await asyncio.gather(
        *(http.reaches(url) for url, some in zip(urls, families, strict=True) if 4 in some)
    )
    return 4 if any(reached) else 6


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


def _in_parts(pairs: Sequence[PortPair], size: int) -> Iterator[Sequence[PortPair]]:
    size = max(1, min(size, MAX_PORTS_PER_REQUEST))
    for start in range(0, len(pairs), size):
        yield pairs[start : start + size]
