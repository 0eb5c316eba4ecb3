"""The phases of a check of some ports, while listeners are open on them.

Ask; find out which connections are the servers'; ask again about what is unclear; judge.
"""

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from ipaddress import IPv4Address

from port_checker.addresses import Address
from port_checker.connect import VerdictKind
from port_checker.linux import accepts_from, interface_kind, way_to
from port_checker.provider.evidence import Attempt
from port_checker.provider.http_client import SILENCE, LocalPorts
from port_checker.provider.origin import Contact, Nearness, Witness, by_peer, is_own, learn_peers
from port_checker.provider.place import loops_back, place_of
from port_checker.provider.remote import Answers, Waits
from port_checker.provider.report import (
    BindingState,
    Observation,
    Place,
    PortPair,
    PortReport,
    WrongWay,
    judge,
)
from port_checker.provider.second_look import (
    BANNED_GROUP_SIZE,
    ask_in_groups,
    looks_banned,
    looks_limited,
    trace_forwards,
)

# Kinds of interfaces that lead to containers of this machine.
_CONTAINER_KINDS = ("bridge", "veth")
# Ports that an unknown address must have tried, at least, to be taken for a server that could
# connect to none.
_MIN_TRIED = 3


@dataclass(frozen=True)
class Phases:
    """The phases of a check of some ports, while listeners are open on them.

    Attributes:
        pairs: The ports.
        witness: What sees who connects to them.
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
        """Ask each server; return what is now known of them, and their answers by URL."""
        pairs = self._pairs_that_are("bound", "in use")
        # In random order: a limit on new connections, or a ban, lets in the first connections. So
        # the ports that it drops are scattered, unlike a range that a firewall closes.
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

    async def identify(self, contact: Contact, answers: Answers) -> Contact:
        """Find the addresses from which a server connects, where they are not known yet."""
        pairs = self._pairs_that_are("bound")
        if self.witness.capture:  # which sees who connects to other programs
            pairs += self._pairs_that_are("in use")
        reached = [pair for pair in pairs if pair.outer in answers.reached]
        seen = self.witness.seen(self.start)
        seen_from_it = self.seen([contact], seen)
        to_ask = reached or [pair for pair in pairs if pair.outer in answers.verdicts]
        unclear = {pair.inner for pair in to_ask} - seen_from_it
        candidates = by_peer({port: seen[port] for port in unclear & seen.keys()})
        if not reached:  # a server that reached none may still have tried all
            enough = max(_MIN_TRIED, len(to_ask) / 2)
            candidates = {p: ports for p, ports in candidates.items() if len(ports) >= enough}
        if all(map(is_own, candidates)) or (seen_from_it and not reached):
            return contact
        self.on_progress(f"looking from where {contact.url} connects")
        peers = await learn_peers(contact, to_ask, candidates, self.witness, self.waits)
        strangers = contact.strangers | (candidates.keys() - peers)
        return replace(contact, peers=contact.peers | peers, strangers=strangers)

    async def ask_in_groups(
        self, contacts: Sequence[Contact], answers: Mapping[str, Answers]
    ) -> tuple[Mapping[str, Answers], int, dict[str, int]]:
        """Ask again in small groups where connections seem to be limited, or a server banned.

        Returns:
            The answers with the new ones; how many ports were reached only then; and, for each
            server that seems to be banned as a scanner, how many of its connections got through.
        """
        newly_reached, banned = 0, {}
        answers = dict(answers)
        seen_here = self.seen(contacts)
        for contact in contacts:
            verdicts = answers[contact.url].verdicts
            if contact.error == SILENCE and not verdicts:  # even its answer got lost
                tried = self.seen([contact], self.witness.seen(self.start)) & self._inner_ports
                if tried and contact.nearness is Nearness.OUTSIDE:
                    banned[contact.url] = len(tried & seen_here)
                continue
            reached, reached_by_any = answers[contact.url].reached, _reached(answers)
            # Includes ports at which a packet that was sent again arrived too late for the server.
            lost = [pair.outer for pair in self._pairs_that_are("bound")]
            lost = [port for port in lost if port in verdicts and port not in reached_by_any]
            timed_out = [p for p in lost if verdicts[p].kind is VerdictKind.TIMED_OUT]
            is_banned = looks_banned([*verdicts], reached, lost)
            if looks_limited(self.pairs, reached, timed_out):
                new = await ask_in_groups(contact, timed_out, self.waits)
            elif is_banned:
                self.on_progress(f"asking {contact.url} again, about a few ports at a time")
                new = await ask_in_groups(contact, lost, self.waits, size=BANNED_GROUP_SIZE)
            else:
                continue
            # Ports that were reached are reached again, unless the server is banned.
            sample = await contact.ask([*reached][:2]) if is_banned and not new.reached else None
            if sample and not sample.reached:
                await self.waits.sleep(self.waits.ban)
                new |= await ask_in_groups(contact, lost, self.waits, size=BANNED_GROUP_SIZE)
                banned[contact.url] = len(reached)
            newly_reached += len(new.reached)
            answers[contact.url] |= new
        if newly_reached:
            await self._wait_until_seen(contacts, answers)
        return answers, newly_reached, banned

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

        One is that answers and connections differ. Another, if ``suspicious``, is a router that may
        exchange ports without that showing. Where connections are ``limited``, nobody is asked.

        Returns:
            For each outer port whose connections arrive, the inner one; None if nobody was asked.
        """
        bound = set(self._pairs_that_are("bound"))
        arrived = {pair for pair in bound if pair.inner in seen}
        reached = _reached(answers)
        accessible = {pair for pair in self.pairs if pair.outer in reached}
        contact = next((c for c in contacts if answers[c.url].reached), None)
        if limited or not arrived or not contact:
            return None
        behind_router = not any(c.address and is_own(c.address) for c in contacts)
        may_be_exchanged = suspicious and behind_router and len(accessible) > 1
        if bound & accessible == arrived and not may_be_exchanged:
            return None
        self.on_progress("looking at which port each connection arrives")
        return await trace_forwards(
            contact,
            [pair for pair in self.pairs if pair.outer in answers[contact.url].reached],
            self.seen([contact]),
            self.witness.listeners,
            self.waits,
        )

    def judge(
        self,
        contacts: Sequence[Contact],
        answers: Mapping[str, Answers],
        seen: set[int],
        half_open: Mapping[int, set[Address]],
        arrivals: Mapping[int, int] | None,
        elsewhere: Mapping[int, int],
        *,
        banned: bool,
    ) -> list[PortReport]:
        """Judge each port by everything that is known."""
        counted = counted_servers(contacts)
        capture = self.witness.capture
        attempts = self._attempts(counted)
        places = {contact.url: place_of(contact, self.family) for contact in counted}
        has_xdp = any(place.xdp for place in places.values())
        captured = bool(capture and capture.is_complete() and not has_xdp)
        half_open_here = self.seen(counted, half_open)
        urls = {contact.url for contact in counted}
        errors = {c.url: c.error for c in contacts if c.error}
        visitors = self.witness.seen(self.start)
        unknown = {
            peer
            for peer in set[Address]().union(*visitors.values())
            if not (_is_servers(contacts, peer) or is_own(peer))
            and not any(peer in contact.strangers for contact in contacts)
        }
        reached, excluded = _reached(answers), {p for a in answers.values() for p in a.excluded}
        nowhere = Place(family=self.family)
        reports = []
        for pair in self.pairs:
            verdicts = {
                url: answer.verdicts[pair.outer]
                for url, answer in answers.items()
                if pair.outer in answer.verdicts
            }
            arrives_at = elsewhere.get(pair.outer)
            arrived = pair.inner in seen
            if arrivals is not None:
                traced_to = arrivals.get(pair.outer)
                arrives_at = traced_to if traced_to not in (pair.inner, None) else arrives_at
                # What another port's forward brought here says nothing about this port.
                arrived = traced_to == pair.inner or (
                    arrived and pair.outer not in reached and pair.inner not in arrivals.values()
                )
            attempt = attempts.get(pair.inner)
            observed = Observation(
                ports=pair,
                binding=self.witness.listeners.bindings[pair.inner],
                seen=arrived,
                half_open=pair.inner in half_open_here,
                attempt=attempt,
                captured=captured and unknown.isdisjoint(visitors.get(pair.inner, ())),
                wrong_way=self._wrong_way(contacts, attempt),
                in_container=_leads_to_container(attempt),
                answers=verdicts,
                counted=urls,
                arrives_at=arrives_at,
                banned=banned,
                unused=pair.outer in elsewhere and attempts[elsewhere[pair.outer]].refused,
                excluded=pair.outer in excluded,
                reason="" if verdicts else _reason(errors, answers, pair.outer),
                places={
                    url: dict(answer.places[pair.outer])
                    for url, answer in answers.items()
                    if answer.places.get(pair.outer)
                },
            )
            url = next((c.url for c in counted if c.url in verdicts), None)
            reports.append(judge(observed, places[url] if url else nowhere))
        return reports

    def _attempts(
        self, contacts: Sequence[Contact], since: int | None = None
    ) -> dict[int, Attempt]:
        """Return the servers' attempts at the interfaces, since the start or a later moment."""
        capture = self.witness.capture
        since = self.start[1] if since is None else since
        return capture.attempts(partial(_is_servers, contacts), since) if capture else {}

    async def elsewhere(
        self, contacts: Sequence[Contact], answers: Mapping[str, Answers]
    ) -> dict[int, int]:
        """Find the ports whose connections arrive at ports of this machine that are not checked.

        Only where that is clear: connections are missing at as many ports as they arrive at
        unchecked ones, or all arrive at a single one; and the first arrives there again when it is
        asked about alone, since the servers may be checking this machine for somebody else.
        """
        capture = self.witness.capture
        if not capture or any(c.nearness is Nearness.HERE for c in contacts):
            return {}
        attempts = self._attempts(contacts)
        asker = {port: c for c in contacts for port in answers[c.url].verdicts}
        missing = [
            pair.outer
            for pair in sorted(self.pairs)
            if pair.outer in asker and pair.inner not in attempts
        ]
        others = sorted(attempts.keys() - self._inner_ports)
        if len(others) == 1:
            others *= len(missing)
        if not missing or len(missing) != len(others):
            return {}
        start = capture.clock
        await asker[missing[0]].ask([missing[0]])
        arrived_at = self._attempts(contacts, start).keys() - self._inner_ports
        return dict(zip(missing, others, strict=True)) if arrived_at == {others[0]} else {}

    async def loops_back(
        self, contacts: Sequence[Contact], reports: Sequence[PortReport], local_ports: LocalPorts
    ) -> tuple[Address, bool] | None:
        """Find out whether the router loops this machine's address back; None if that is unknown.

        It makes a connection of its own, so it comes after judging those of the servers.
        """
        port = next((port for port in reports if port.confirmed), None)
        if not port:
            return None
        reached = (c for c in contacts if c.url in port.answers and port.answers[c.url].accessible)
        address = next((c.address for c in reached if c.nearness is Nearness.OUTSIDE), None)
        if not isinstance(address, IPv4Address) or is_own(address):
            return None
        self.on_progress(f"looking whether {address} is looped back to this machine")
        pair = PortPair(port.port, port.inner)
        return address, await loops_back(address, pair, self.witness.listeners, local_ports)

    def _wrong_way(self, contacts: Sequence[Contact], attempt: Attempt | None) -> WrongWay | None:
        """Return by where answers leave, if not where connections arrive."""
        if not attempt or attempt.refused or attempt.interface == "lo":
            return None
        peer = next(peer for c in contacts for peer in (*c.peers, c.remote) if peer)
        if peer.version != self.family:
            return None
        leaves_by = attempt.answered_at
        if not leaves_by:
            way = way_to(peer, attempt.address)
            leaves_by = way.interface if way else "none"
        if leaves_by in (attempt.interface, "lo"):
            return None
        is_dropped = not accepts_from(peer, attempt.address, attempt.interface)
        return WrongWay(leaves_by, is_dropped and not attempt.answered_at)

    @cached_property
    def _inner_ports(self) -> set[int]:
        return {pair.inner for pair in self.pairs}

    def _pairs_that_are(self, *states: BindingState) -> list[PortPair]:
        bindings = self.witness.listeners.bindings
        return [pair for pair in self.pairs if bindings[pair.inner].state in states]

    def seen(
        self, contacts: Sequence[Contact], seen: Mapping[int, set[Address]] | None = None
    ) -> set[int]:
        """Return the inner ports to which servers came, by ``seen`` or by what listeners saw."""
        if seen is None:
            seen = self.witness.listeners.seen()
        peers = set[Address]().union(*seen.values())
        servers = {peer for peer in peers if _is_servers(contacts, peer)}
        return {port for port, peers in seen.items() if peers & servers}

    async def _wait_until_seen(
        self, contacts: Sequence[Contact], answers: Mapping[str, Answers]
    ) -> None:
        """Wait for the connections that servers report, from any peer that may be one of them."""
        reached = _reached(answers)
        ports = [p.inner for p in self._pairs_that_are("bound") if p.outer in reached]
        await self.witness.listeners.wait_until_seen(
            ports,
            self.waits.late_connections,
            ignored=lambda peer: not _is_servers(contacts, peer) and is_own(peer),
        )


def _leads_to_container(attempt: Attempt | None) -> bool:
    """Whether connections are passed on over a link within this machine, not to its network."""
    way = way_to(attempt.passed_to) if attempt and attempt.passed_to else None
    if not attempt or not way or way.interface == attempt.interface:
        return False
    return interface_kind(way.interface) in _CONTAINER_KINDS


def counted_servers(contacts: Sequence[Contact]) -> list[Contact]:
    """Return the servers whose verdicts count: those outside, if one of them checks anything."""
    outside = [c for c in contacts if c.nearness is Nearness.OUTSIDE and c.asked]
    return outside or list(contacts)


def _is_servers(contacts: Sequence[Contact], peer: Address) -> bool:
    return any(contact.has_peer(peer) for contact in contacts)


def _reason(errors: dict[str, str], answers: Mapping[str, Answers], port: int) -> str:
    """Say why servers have no verdict on a port."""
    failures = {
        url: f"could not connect itself ({answer.failures[port]})"
        for url, answer in answers.items()
        if port in answer.failures
    }
    reasons = errors | failures
    return "; ".join(f"{url}: {why}" for url, why in reasons.items()) or "no server was asked"


def _reached(answers: Mapping[str, Answers]) -> set[int]:
    """Return the outer ports that at least one server reaches."""
    return set[int]().union(*(answer.reached for answer in answers.values()))
