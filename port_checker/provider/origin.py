"""Which connections are a server's: only those of the server that was asked are evidence.

A server connects, as a rule, from the address at which it is asked. Where it does not (because of a
proxy or a NAT), the address from which it connects is learnt: the server is asked about random
halves of the ports, and whoever connects to the ports of one half exactly while that half is asked
about, every time, and never in between, is the server. Monitors, scanners and neighbours do not
know the halves.
"""

import contextlib
import random
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import cached_property
from ipaddress import IPv6Network

from port_checker.addresses import Address, have_one_subscriber, lies_in
from port_checker.linux import RouteType, own_addresses, route_type
from port_checker.provider.evidence import Capture
from port_checker.provider.listeners import Listeners
from port_checker.provider.remote import Answers, Server, ServerError, Waits
from port_checker.provider.report import PortPair

# Rounds of halves. A stranger who connects to one port at random moments would have to hit the
# right half in each, and never the other one.
_ROUNDS = 3
# One in so many ports may get stray connections from the same address at the same time.
_STRAY_SHARE = 4
# Peers that are looked at more closely: those that came to the most ports.
_MAX_CANDIDATES = 32
# Sites get at least a /56, as a rule (RFC 6177).
_SITE_PREFIX = 56


class Nearness(Enum):
    """Where a server is, and whether it can say something about the world."""

    OUTSIDE = auto()
    HERE = auto()  # on this machine
    SAME_NETWORK = auto()  # or behind the same router
    PRIVATE = auto()  # it sees this machine at a private address
    BEHIND_NAT = auto()  # which hides from it who asks


@dataclass(frozen=True)
class Contact:
    """A server, the address that it is asked about, and the addresses from which it connects.

    Attributes:
        server: The server.
        address: This machine's address as the server sees it, or as it was given.
        given: Whether the address was given.
        error: Why it does not check; None if it does.
        asked: Whether it has checked something.
        local: The address of this machine from which it was asked.
        remote: The address of the server at which it was asked.
        peers: The addresses from which it connects, as far as they are known.
        strangers: Addresses that looked like the server's and were found to be others'.
    """

    server: Server
    address: Address | None = None
    given: bool = False
    error: str | None = None
    asked: bool = False
    local: Address | None = None
    remote: Address | None = None
    peers: frozenset[Address] = frozenset()
    strangers: frozenset[Address] = frozenset()

    @cached_property
    def url(self) -> str:
        """The server's URL, without a password."""
        return str(self.server.url)

    @cached_property
    def nearness(self) -> Nearness:
        """Where the server is."""
        address, remote = self.address, self.remote
        if not address:
            return Nearness.OUTSIDE
        if remote and is_own(remote):
            return Nearness.HERE
        if not address.is_global:
            known = self.given or is_own(address)
            return Nearness.PRIVATE if known else Nearness.BEHIND_NAT
        near = remote and (not remote.is_global or remote == address or _are_neighbours(remote))
        return Nearness.SAME_NETWORK if near else Nearness.OUTSIDE

    def has_peer(self, peer: Address) -> bool:
        """Whether a connection from ``peer`` is the server's.

        One from this machine is the server's only if the server runs here. If it is elsewhere, any
        address of its /64 is the server's.
        """
        if self.nearness is Nearness.HERE:
            return peer == self.remote or is_own(peer)
        if self.nearness is Nearness.OUTSIDE and have_one_subscriber(peer, self.remote):
            return True
        return peer == self.remote or peer in self.peers

    async def after_introduction(self) -> "Contact":
        """Return what is known of it after it was asked for this machine's address."""
        try:
            return self.after(await self.server.introduce())
        except ServerError as error:
            return replace(self, error=str(error))

    def after(self, answers: Answers) -> "Contact":
        """Return what is known of it after an exchange."""
        return replace(
            self,
            error=self.error or answers.error,
            address=answers.address or self.address,
            asked=self.asked or bool(answers.verdicts or answers.excluded),
            local=answers.local or self.local,
            remote=answers.remote or self.remote,
        )

    async def ask(
        self, ports: Sequence[int], is_connecting: Callable[[], bool] = lambda: False
    ) -> Answers:
        """Ask about ports of the address, unless that has failed before."""
        if self.address is None or self.error:
            return Answers(error=self.error)
        return await self.server.ask(self.address, ports, is_connecting, may_move=not self.given)


def is_own(address: Address) -> bool:
    """Whether an address is one of this machine's."""
    with contextlib.suppress(OSError):
        return address.is_loopback or route_type(address) is RouteType.LOCAL
    return False


def _are_neighbours(remote: Address) -> bool:
    """Whether an address is in a network of this machine, or in its site."""
    networks = [own.network for own in own_addresses()]
    networks += [
        IPv6Network((int(network[0]), _SITE_PREFIX), strict=False)
        for network in networks
        if network.version == 6 and network.is_global
    ]
    return lies_in(remote, networks)


@dataclass(frozen=True)
class Witness:
    """What sees connections come: the listeners, and the interfaces if they can be watched."""

    listeners: Listeners
    capture: Capture | None

    def now(self) -> tuple[int, int]:
        """Return a moment for ``seen``."""
        return self.listeners.clock, self.capture.clock if self.capture else 0

    def seen(self, since: tuple[int, int]) -> dict[int, set[Address]]:
        """Return who has come since a moment, by port of this machine."""
        seen = self.listeners.seen(since[0])
        for port, peers in (self.capture.seen(since[1]) if self.capture else {}).items():
            seen[port] = seen.get(port, set()) | peers
        return seen


def by_peer(seen: Mapping[int, Collection[Address]]) -> dict[Address, set[int]]:
    """Return the ports to which each peer came, from the peers that came to each port."""
    ports: defaultdict[Address, set[int]] = defaultdict(set)
    for port, peers in seen.items():
        for peer in peers:
            ports[peer].add(port)
    return dict(ports)


async def learn_peers(
    contact: Contact,
    pairs: Sequence[PortPair],
    candidates: Mapping[Address, Collection[int]],
    witness: Witness,
    waits: Waits,
) -> frozenset[Address]:
    """Find out from which addresses a server connects.

    Args:
        contact: The server.
        pairs: The ports to ask about.
        candidates: Who came while it was asked about them, and to which ports.
        witness: What sees who comes.
        waits: How long to wait.

    Returns:
        The candidates that are the server; none if that stays unclear.
    """
    by_ports = sorted(candidates, key=lambda peer: -len(candidates[peer]))
    remaining = {peer for peer in by_ports[:_MAX_CANDIDATES] if not is_own(peer)}
    await waits.sleep(waits.quiet)  # what is still to come of earlier requests is no stranger's
    for _ in range(_ROUNDS):
        shuffled = random.sample(list(pairs), len(pairs))
        half = (len(shuffled) + 1) // 2
        arrived: defaultdict[Address, set[int]] = defaultdict(set)
        for group in ([], shuffled[:half], shuffled[half:]):
            start = witness.now()
            seen_before = set[int]().union(*(candidates[peer] for peer in remaining))
            reached = await _ask_half(contact, group, seen_before, witness, waits, start)
            if not remaining or reached is None:
                return frozenset()
            inner = {pair.inner for pair in group}
            ports = by_peer(witness.seen(start))
            for peer in list(remaining):
                visited = ports.get(peer, set())
                # If forwards are crossed, only the number fits. Behind a NAT that hides who
                # connects, some connections of strangers come with the server's.
                is_whole = inner <= visited and _STRAY_SHARE * len(visited - inner) <= len(pairs)
                if not (visited <= inner or is_whole or 1 < len(visited) <= reached):
                    remaining.discard(peer)
                arrived[peer] |= visited
        remaining = {peer for peer in remaining if arrived[peer]}
    return frozenset(remaining)


async def _ask_half(
    contact: Contact,
    group: Sequence[PortPair],
    seen_before: Collection[int],
    witness: Witness,
    waits: Waits,
    start: tuple[int, int],
) -> int | None:
    """Ask about some ports, or wait for a while; return how many it reached, None on failure."""
    if not group:
        await waits.sleep(waits.quiet * random.uniform(0.5, 1.5))  # noqa: S311  # no secret
        return 0
    answers = await contact.ask([pair.outer for pair in group])
    verdicts = answers.verdicts
    if len(verdicts) != len(group):
        return None
    reached = [pair for pair in group if verdicts[pair.outer].accessible]
    bindings = witness.listeners.bindings
    await wait_until_seen_again(
        witness.listeners,
        [pair.inner for pair in reached if bindings[pair.inner].state == "bound"],
        seen_before,
        waits,
        enough=len(reached),
        since=start[0],
        ignored=is_own,
    )
    return len(reached)


async def wait_until_seen_again(
    listeners: Listeners,
    ports: Collection[int],
    seen_before: Collection[int],
    waits: Waits,
    *,
    enough: int,
    since: int,
    ignored: Callable[[Address], bool],
) -> None:
    """Wait for connections to ports that a server has reached once more.

    Not long for those that did not come before. Those that did may be late each time: a proxy's.
    """
    late = waits.late_connections
    for expected, timeout in ((ports, late / 3), ({*ports}.intersection(seen_before), late)):
        await listeners.wait_until_seen(
            expected, timeout, enough=enough, since=since, ignored=ignored
        )
