"""The whole flow: listen, ask, look again, judge. Each phase returns what the next one needs."""

import asyncio
import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address, IPv6Address

from port_checker.addresses import Address, parse_address
from port_checker.connect import Verdict, VerdictKind
from port_checker.linux import (
    accepts_from,
    descriptors_left,
    has_xdp_program,
    shows_sockets,
    tcp_sockets,
    way_to,
)
from port_checker.provider.certificates import judge_tls
from port_checker.provider.evidence import Attempt, Capture
from port_checker.provider.http_client import SILENCE, HttpClient, LocalPorts, ServerUrl
from port_checker.provider.listeners import MAX_HELD, Listeners
from port_checker.provider.notes import notes
from port_checker.provider.origin import Contact, Nearness, Witness, by_peer, is_own, learn_peers
from port_checker.provider.place import router_of
from port_checker.provider.remote import (
    MAX_PORTS_PER_REQUEST,
    Answers,
    Introduction,
    Server,
    ServerError,
    Waits,
)
from port_checker.provider.report import (
    Observation,
    Place,
    PortPair,
    PortReport,
    Report,
    Router,
    ServerReport,
    TlsAnswer,
    TlsReport,
    judge,
    port_pairs,
    reached_at,
)
from port_checker.provider.second_look import (
    BANNED_GROUP_SIZE,
    ask_in_groups,
    looks_banned,
    looks_limited,
    trace_forwards,
)

# Descriptors kept for connections to servers, connections that listeners see, and the rest.
_OTHER_DESCRIPTORS = 48 + MAX_HELD
# So many ports must have been tried from one unknown address before it may be a server that could
# connect to none.
_MIN_TRIED = 3


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
    http = _client(local_ports, None if address else family, waits)
    contacts = [
        Contact(Server(url, http, on_progress, waits), address, given=address is not None)
        for url in urls
    ]
    reports: list[PortReport] = []
    retried, banned = 0, dict[str, int]()
    parts = list(_in_parts(pairs, descriptors_left() - _OTHER_DESCRIPTORS))
    with ExitStack() as stack:
        capture = Capture.open()
        if capture:
            stack.enter_context(capture)
        for part in parts:
            async with Listeners([pair.inner for pair in part], family) as listeners:
                if not reports:
                    contacts = await _introduce(contacts, family, on_progress)
                witness = Witness(listeners, capture)
                check = _Check(part, witness, witness.now(), family, waits, on_progress)
                contacts, answers = await check.ask(contacts)
                half_open = listeners.half_open() if check.unreached(answers) else {}
                contacts = await check.identify(contacts, answers)
                answers, passed, banned_now = await check.ask_in_groups(contacts, answers)
                banned |= banned_now
                counted = _counted(contacts)
                seen = check.seen(counted)  # before tracing, when crossed forwards show anew
                arrivals = await check.trace(
                    counted,
                    answers,
                    seen,
                    suspicious=len(parts) == 1,
                    limited=passed > 0 or bool(banned_now),
                )
                reports += check.judge(
                    contacts, answers, seen, half_open, arrivals, banned=bool(banned_now)
                )
                retried += passed
            on_checked(len(reports), len(pairs))
    if not reports:
        contacts = await _introduce(contacts, family, on_progress)
    endpoint_reports = [await _check_tls(contacts, pair) for pair in endpoints]
    server_reports = [_server_report(contact) for contact in contacts]
    return Report(
        ip=_address_of(server_reports, reports),
        servers=server_reports,
        ports=reports,
        notes=list(notes(contacts, reports, retried, banned)),
        family=family,
        tls=endpoint_reports,
    )


async def _introduce(
    contacts: Sequence[Contact], family: int, on_progress: Callable[[str], None]
) -> list[Contact]:
    """Have each server tell this machine's address, unless it was given."""
    if all(contact.given for contact in contacts):
        return list(contacts)
    on_progress("asking for this machine's address")
    introductions = await asyncio.gather(
        *(contact.server.introduce() for contact in contacts), return_exceptions=True
    )
    known = next(
        (
            found.address
            for found in introductions
            if isinstance(found, Introduction) and found.address
        ),
        None,
    )
    return [
        _introduced(contact, found, known, family)
        for contact, found in zip(contacts, introductions, strict=True)
    ]


def _introduced(
    contact: Contact, found: Introduction | BaseException, known: Address | None, family: int
) -> Contact:
    if isinstance(found, ServerError):
        return dataclasses.replace(contact, error=str(found))
    if isinstance(found, BaseException):
        raise found
    address = found.address or known
    contact = dataclasses.replace(contact, local=found.local, remote=found.remote)
    if address is None:
        error = "does not tell callers their address; give it with --ip"
        return dataclasses.replace(contact, error=error)
    if address.version != family:
        error = f"sees this machine at {address}, not at an IPv{family} address"
        return dataclasses.replace(contact, error=error)
    return dataclasses.replace(contact, address=address)


async def _check_tls(contacts: Sequence[Contact], pair: PortPair) -> TlsReport:
    """Have each server check the certificate at one port."""
    answers: dict[str, TlsAnswer] = {}
    reasons = [f"{contact.url} {contact.error}" for contact in contacts if contact.error]
    able = [(c, c.address) for c in contacts if c.address and not c.error]
    results = await asyncio.gather(
        *(contact.server.check_tls(address, pair.outer) for contact, address in able),
        return_exceptions=True,
    )
    for (contact, _), result in zip(able, results, strict=True):
        if isinstance(result, TlsAnswer):
            answers[contact.url] = result
        elif isinstance(result, ServerError):
            reasons.append(f"{contact.url} {result}")
        else:
            raise result
    is_listened_on = bool(tcp_sockets({pair.inner}, listening=True))
    ip = next((contact.address for contact in contacts if contact.address), None)
    return judge_tls(
        pair,
        answers,
        reason="; ".join(reasons) or "no server was asked",
        is_listened_on=is_listened_on,
        own_address=bool(ip and is_own(ip)),
        ip=str(ip),
    )


def _address_of(servers: Sequence[ServerReport], ports: Sequence[PortReport]) -> str | None:
    """Return the address that the results are true of: all reachable ports were reached at it.

    None if no server knows an address, or if different ports were reached at different ones.
    """
    reachable = {port.port for port in ports if port.reachable}
    at_each = reached_at(servers, ports)
    return next((ip for ip, reached in at_each.items() if reached == reachable), None)


def _server_report(contact: Contact) -> ServerReport:
    ip = str(contact.address) if contact.address else None
    return ServerReport(contact.url, contact.asked, contact.error, ip)


@dataclass(frozen=True)
class _Check:
    """The phases for some of the ports, while listeners stand on them.

    Attributes:
        pairs: The ports.
        witness: What sees who comes to them.
        start: The moment before anything was asked about them.
        family: 4 or 6.
        waits: How long to wait.
        on_progress: Called with a few words on what is happening.
    """

    pairs: Sequence[PortPair]
    witness: Witness
    start: tuple[int, int]
    family: int
    waits: Waits
    on_progress: Callable[[str], None]

    async def ask(self, contacts: Sequence[Contact]) -> tuple[list[Contact], Mapping[str, Answers]]:
        """Ask each server; return what is known of them now, and their answers by URL."""
        pairs = [
            p for p in self.pairs if self.witness.listeners.local[p.inner] in ("bound", "in use")
        ]
        # In random order: a limit on new connections, or a ban, lets in what comes first, so that
        # what it drops is scattered, unlike a range that a firewall closes.
        ports = [pair.outer for pair in random.sample(pairs, len(pairs))]
        answers = await asyncio.gather(
            *(contact.ask(ports, partial(self._is_connecting, contact)) for contact in contacts)
        )
        contacts = [
            contact.after(answer) for contact, answer in zip(contacts, answers, strict=True)
        ]
        by_url = {contact.url: answer for contact, answer in zip(contacts, answers, strict=True)}
        await self._wait_until_seen(contacts, by_url)
        return contacts, by_url

    def _is_connecting(self, contact: Contact) -> bool:
        return bool(self.seen([contact], self.witness.seen(self.start)))

    async def identify(
        self, contacts: Sequence[Contact], answers: Mapping[str, Answers]
    ) -> list[Contact]:
        """Find the addresses from which servers connect, where they are not known yet."""
        return [await self._identify(contact, answers[contact.url]) for contact in contacts]

    async def _identify(self, contact: Contact, answers: Answers) -> Contact:
        local = self.witness.listeners.local
        watched = ("bound", "in use") if self.witness.capture else ("bound",)
        pairs = [pair for pair in self.pairs if local[pair.inner] in watched]
        reached = [pair for pair in pairs if _reaches(answers, pair)]
        seen = self.witness.seen(self.start)
        tried = self.seen([contact], seen)
        asked = reached or [pair for pair in pairs if pair.outer in answers.verdicts]
        unclear = {pair.inner for pair in asked} - tried
        strangers = by_peer({port: seen[port] for port in unclear & seen.keys()})
        if not reached:  # what connected to none may still have tried all
            enough = max(_MIN_TRIED, len(asked) / 2)
            strangers = {p: ports for p, ports in strangers.items() if len(ports) >= enough}
        if all(map(is_own, strangers)) or (tried and not reached):
            return contact
        self.on_progress(f"looking from where {contact.url} connects")
        learnt = await learn_peers(contact, asked, strangers, self.witness, self.waits)
        others = contact.strangers | (strangers.keys() - learnt)
        return dataclasses.replace(contact, peers=contact.peers | learnt, strangers=others)

    async def ask_in_groups(
        self, contacts: Sequence[Contact], answers: Mapping[str, Answers]
    ) -> tuple[Mapping[str, Answers], int, dict[str, int]]:
        """Ask again in small groups where a limit on new connections shows, or a ban.

        Returns:
            The answers with the new ones; how many ports got through only then; and, for each
            server that seems to be banned as a scanner, how many of its connections got through.
        """
        passed, banned = 0, {}
        answers = dict(answers)
        reached_here = self.seen(contacts)
        for contact in contacts:
            verdicts = answers[contact.url].verdicts
            if contact.error == SILENCE and not verdicts:  # even its answer got lost
                came = self.seen([contact], self.witness.seen(self.start)) & self._inner()
                if came and contact.nearness is Nearness.OUTSIDE:
                    banned[contact.url] = len(came & reached_here)
                continue
            lost = [pair.outer for pair in self.pairs if self._is_lost(answers, pair)]
            lost = [port for port in lost if port in verdicts]
            reached = {port for port, verdict in verdicts.items() if verdict.accessible}
            timed_out = [p for p in lost if verdicts[p].kind is VerdictKind.TIMED_OUT]
            is_banned = looks_banned([*verdicts], reached, lost)
            if looks_limited(self.pairs, reached, timed_out):
                later = await ask_in_groups(contact, timed_out, self.waits)
            elif is_banned:
                self.on_progress(f"asking {contact.url} again, about a few ports at a time")
                later = await ask_in_groups(contact, lost, self.waits, size=BANNED_GROUP_SIZE)
            else:
                continue
            through = sum(verdict.accessible for verdict in later.values())
            # Ports that were reached are reached again, unless the server is banned.
            sample = await contact.ask([*reached][:2]) if is_banned and not through else None
            if sample and not any(v.accessible for v in sample.verdicts.values()):
                await self.waits.sleep(self.waits.ban)
                again = await ask_in_groups(contact, lost, self.waits, size=BANNED_GROUP_SIZE)
                through = sum(verdict.accessible for verdict in again.values())
                later |= again
                banned[contact.url] = len(reached)
            passed += through
            answers[contact.url] |= Answers(later)
        if passed:
            await self._wait_until_seen(contacts, answers)
        return answers, passed, banned

    def _inner(self) -> set[int]:
        return {pair.inner for pair in self.pairs}

    def unreached(self, answers: Mapping[str, Answers]) -> set[int]:
        """Return the inner ports that not all servers reach."""
        return {p.inner for p in self.pairs if not all(_reaches(a, p) for a in answers.values())}

    def _is_lost(self, answers: Mapping[str, Answers], pair: PortPair) -> bool:
        """Whether no server reaches a port at which this machine listens."""
        # Also where a packet that was sent again arrived, too late for the server.
        return self._is_bound(pair) and not _is_accessible(answers, pair)

    async def trace(
        self,
        contacts: Sequence[Contact],
        answers: Mapping[str, Answers],
        seen: set[int],
        *,
        suspicious: bool,
        limited: bool,
    ) -> dict[int, int] | None:
        """Find out where forwards lead, if there is a reason to ask.

        Where answers and connections differ, and, if ``suspicious``, where a router may exchange
        ports without that. Not where connections are limited.

        Returns:
            For each outer port whose connections arrive, the inner one; None if nobody was asked.
        """
        bound = {pair for pair in self.pairs if self._is_bound(pair)}
        arrived = {pair for pair in bound if pair.inner in seen}
        accessible = {pair for pair in self.pairs if _is_accessible(answers, pair)}
        behind_router = not any(c.address and is_own(c.address) for c in contacts)
        exchanged = suspicious and behind_router and len(accessible) > 1
        if limited or not arrived or not accessible:
            return None
        if bound & accessible == arrived and not exchanged:
            return None
        self.on_progress("looking at which port each connection arrives")
        for contact in contacts:
            pairs = [pair for pair in self.pairs if _reaches(answers[contact.url], pair)]
            if pairs:
                own_seen = self.seen([contact])
                listeners = self.witness.listeners
                return await trace_forwards(contact, pairs, own_seen, listeners, self.waits)
        return None

    def judge(
        self,
        contacts: Sequence[Contact],
        answers: Mapping[str, Answers],
        seen: set[int],
        half_open: Mapping[int, set[Address]],
        arrivals: Mapping[int, int] | None,
        *,
        banned: bool,
    ) -> list[PortReport]:
        """Judge each port by all that is known."""
        counted = _counted(contacts)
        capture = self.witness.capture
        attempts = {}
        if capture:
            attempts = capture.attempts(partial(_is_servers, counted), self.start[1])
        captured = bool(capture and capture.is_complete() and not has_xdp_program())
        half_open_here = self.seen(counted, half_open)
        errors = {c.url: c.error for c in contacts if c.error}
        is_server_here = any(c.nearness is Nearness.HERE for c in contacts)
        elsewhere = {} if is_server_here else self._elsewhere(answers, attempts)
        listeners = self.witness.listeners
        came = self.witness.seen(self.start)
        places = {contact.url: self._place(contact) for contact in counted}
        nowhere = Place(family=self.family)
        shows_holders = shows_sockets()
        reports = []
        for pair in self.pairs:
            verdicts = _verdicts(answers, pair)
            is_accessible = _is_accessible(answers, pair)
            arrives_at = elsewhere.get(pair.outer)
            arrived = pair.inner in seen
            if arrivals is not None:
                at = arrivals.get(pair.outer)
                arrives_at = at if at not in (pair.inner, None) else arrives_at
                # What others' forwards brought here says nothing about this port.
                arrived = at == pair.inner or (
                    arrived and not is_accessible and pair.inner not in arrivals.values()
                )
            attempt = attempts.get(pair.inner)
            observed = Observation(
                ports=pair,
                local=listeners.local[pair.inner],
                seen=arrived,
                half_open=pair.inner in half_open_here,
                attempt=attempt,
                captured=captured and not self._unknown(contacts, came.get(pair.inner, set())),
                wrong_way=self._wrong_way(contacts, attempt),
                answers=verdicts,
                counted={contact.url for contact in counted},
                arrives_at=arrives_at,
                banned=banned,
                unused=pair.outer in elsewhere and attempts[elsewhere[pair.outer]].refused,
                holders=listeners.holders.get(pair.inner, ()) if shows_holders else None,
                checked=pair.inner in listeners.checked,
                bind_error=listeners.errors.get(pair.inner, 0),
                other_family=pair.inner in listeners.other_family,
                excluded=any(pair.outer in answer.excluded for answer in answers.values()),
                reason=_join(errors | _failures(answers, pair)) or "no server was asked",
                places={
                    url: dict(answer.places[pair.outer])
                    for url, answer in answers.items()
                    if answer.places.get(pair.outer)
                },
            )
            url = next((c.url for c in counted if c.url in verdicts), None)
            reports.append(judge(observed, places[url] if url else nowhere))
        return reports

    def _unknown(self, contacts: Sequence[Contact], peers: set[Address]) -> set[Address]:
        """Return those peers that may be a server or not."""
        return {
            peer
            for peer in peers
            if not (any(c.has_peer(peer) or peer in c.strangers for c in contacts) or is_own(peer))
        }

    def _elsewhere(
        self, answers: Mapping[str, Answers], attempts: Mapping[int, Attempt]
    ) -> dict[int, int]:
        """Tell which ports lead to others of this machine that are not checked.

        Only where it is clear: as many arrive as are missing, or all at one.
        """
        missing = [
            pair.outer
            for pair in sorted(self.pairs)
            if _verdicts(answers, pair) and pair.inner not in attempts
        ]
        others = sorted(attempts.keys() - {pair.inner for pair in self.pairs})
        if len(others) == 1:
            others *= len(missing)
        return dict(zip(missing, others, strict=True)) if len(missing) == len(others) else {}

    def _wrong_way(self, contacts: Sequence[Contact], attempt: Attempt | None) -> str | None:
        """Return where answers would leave if the kernel drops a connection for it."""
        if not attempt or attempt.answered or attempt.refused or attempt.interface == "lo":
            return None
        peer = next(peer for c in contacts for peer in (*c.peers, c.remote) if peer)
        if peer.version != self.family or accepts_from(peer, attempt.address, attempt.interface):
            return None
        way = way_to(peer)
        return way.interface if way else "none"

    def _place(self, contact: Contact | None) -> Place:
        """Return what is known of the way from a server to this machine."""
        address = contact.address if contact else None
        if not contact or not address:
            return Place(family=self.family)
        own = is_own(address)
        remote = contact.remote
        way = way_to(remote if remote and remote.version == self.family else address)
        local = contact.local if contact.local and contact.local.version == self.family else None
        local = local or (way.source if way else None)
        return Place(
            own_address=own,
            caller_hidden=not (own or contact.given or address.is_global),
            family=self.family,
            address=address if own else local,
            router=router_of(way.interface, local) if way and not own else Router.ROUTER,
            interface=way.interface if way else "",
        )

    def _is_bound(self, pair: PortPair) -> bool:
        return self.witness.listeners.local[pair.inner] == "bound"

    def seen(
        self, contacts: Sequence[Contact], seen: Mapping[int, set[Address]] | None = None
    ) -> set[int]:
        """Return the inner ports to which servers came; by default, all the way to a listener."""
        if seen is None:
            seen = self.witness.listeners.seen()
        strangers = {peer for peer in by_peer(seen) if not _is_servers(contacts, peer)}
        return {port for port, peers in seen.items() if peers - strangers}

    async def _wait_until_seen(
        self, contacts: Sequence[Contact], answers: Mapping[str, Answers]
    ) -> None:
        """Wait for the connections that servers report, from them or from who may be them."""
        ports = [p.inner for p in self.pairs if self._is_bound(p) and _is_accessible(answers, p)]
        await self.witness.listeners.wait_until_seen(
            ports,
            self.waits.late_connections,
            ignored=lambda peer: not _is_servers(contacts, peer) and is_own(peer),
        )


def _counted(contacts: Sequence[Contact]) -> list[Contact]:
    """Return those servers whose verdicts count: those outside, if one of them checks anything."""
    outside = [c for c in contacts if c.nearness is Nearness.OUTSIDE and c.asked]
    return outside or list(contacts)


def _is_servers(contacts: Sequence[Contact], peer: Address) -> bool:
    return any(contact.has_peer(peer) for contact in contacts)


def _failures(answers: Mapping[str, Answers], pair: PortPair) -> dict[str, str]:
    """Return those servers' own errors that stand in place of a verdict on a port."""
    return {
        url: f"could not connect itself ({answer.failures[pair.outer]})"
        for url, answer in answers.items()
        if pair.outer in answer.failures
    }


def _join(errors: Mapping[str, str]) -> str:
    return "; ".join(f"{url}: {error}" for url, error in errors.items())


def _reaches(answers: Answers, pair: PortPair) -> bool:
    return pair.outer in answers.verdicts and answers.verdicts[pair.outer].accessible


def _verdicts(answers: Mapping[str, Answers], pair: PortPair) -> dict[str, Verdict]:
    """Return each server's verdict on a port."""
    return {
        url: answer.verdicts[pair.outer]
        for url, answer in answers.items()
        if pair.outer in answer.verdicts
    }


def _is_accessible(answers: Mapping[str, Answers], pair: PortPair) -> bool:
    return any(_reaches(answer, pair) for answer in answers.values())


async def _choose_family(urls: Sequence[ServerUrl], ports: LocalPorts, waits: Waits) -> int:
    """Choose IPv4 where a server can be reached over it, else IPv6."""
    http = _client(ports, 4, waits)
    families = await asyncio.gather(*(http.families(url) for url in urls))
    if not any(6 in some for some in families):
        return 4
    reached = await asyncio.gather(
        *(http.reaches(url) for url, some in zip(urls, families, strict=True) if 4 in some)
    )
    return 4 if any(reached) else 6


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


def _in_parts(pairs: Sequence[PortPair], size: int) -> Iterator[Sequence[PortPair]]:
    size = max(1, min(size, MAX_PORTS_PER_REQUEST))
    for start in range(0, len(pairs), size):
        yield pairs[start : start + size]
