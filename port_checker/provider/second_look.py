"""Asking again, about fewer ports at a time: are forwards crossed, or connections limited?

A listener that saw a connection proves that something was forwarded to it, but not what. So the
server is asked about half of the ports at a time, each half another one: which halves a listener
sees is, in binary, the number of the port whose connections arrive at it.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence

from port_checker.addresses import Address
from port_checker.connect import VerdictKind
from port_checker.provider.listeners import Listeners
from port_checker.provider.remote import Server, ServerError, Waits
from port_checker.provider.report import PortPair

# Ports in a group that is asked for by itself when new connections are limited on the way. What
# OpenWrt lets in at once is 50, and 25 more each second.
_GROUP_SIZE = 40
# How often forwards are traced that are still unclear.
_ROUNDS = 3
# So many ports that got through, and so many that did not, make a pattern.
_MIN_PATTERN = 10
# So many stretches of lost ports: a single one is a range that a firewall closes. Those that a
# limit drops are scattered, since every second port is asked about first.
_MIN_RUNS = 2
# A checker's address is one that connects to at least this share of the ports that it reports.
_CHECKERS_SHARE = 0.25


async def trace_forwards(
    server: Server, pairs: Sequence[PortPair], listeners: Listeners, waits: Waits
) -> dict[int, int]:
    """Find out at which port of this machine connections to each port arrive.

    Packets get lost, and strangers connect: what does not fit is looked at once more.

    Args:
        server: Whom to ask.
        pairs: The ports that it could connect to.
        listeners: Theirs, and all others.
        waits: How long to wait for connections.

    Returns:
        For each outer port whose connections arrive here, the inner one.
    """
    seen = set(listeners.seen)
    checkers = _checkers(listeners.seen, len(pairs))
    arrivals: dict[int, int] = {}
    left = list(pairs)
    for _ in range(_ROUNDS):
        try:
            found = await _trace_once(server, left, listeners, checkers, waits)
        except ServerError:
            break
        arrivals |= found
        left = [pair for pair in left if pair.outer not in arrivals]
        if not left or not found:
            break
    # Those that nothing else was found out about stand as they were first seen.
    unclaimed = seen - set(arrivals.values())
    return arrivals | {pair.outer: pair.inner for pair in left if pair.inner in unclaimed}


async def _trace_once(
    server: Server,
    pairs: Sequence[PortPair],
    listeners: Listeners,
    checkers: set[Address],
    waits: Waits,
) -> dict[int, int]:
    connected: Counter[int] = Counter()  # by outer port, the halves in which the server could
    arrived: Counter[int] = Counter()  # by inner port, the halves in which it was seen
    for bit in range(len(pairs).bit_length()):
        half = [pair for number, pair in enumerate(pairs, 1) if number >> bit & 1]
        listeners.forget()
        verdicts = await server.look_again([pair.outer for pair in half])
        reached = [pair for pair in half if verdicts[pair.outer].accessible]
        await listeners.wait_until_seen(
            [pair.inner for pair in reached], waits.late_connections / 3, enough=len(reached)
        )
        for pair in reached:
            connected[pair.outer] += 1 << bit
        for inner, peers in listeners.seen.items():
            if not checkers or peers & checkers:
                arrived[inner] += 1 << bit
    by_halves = defaultdict(list)
    for outer, halves in connected.items():
        by_halves[halves].append(outer)
    arrivals = {
        pair.outer: pair.inner
        for pair in pairs
        if connected[pair.outer] and connected[pair.outer] == arrived[pair.inner]
    }
    for inner, halves in arrived.items():
        outers = by_halves[halves]
        if len(outers) == 1 and outers[0] not in arrivals:
            arrivals[outers[0]] = inner
    # A port that gets its own connections may get others' besides.
    claimed = set(arrivals.values())
    return {
        pair.outer: pair.inner
        for pair in pairs
        if pair.inner not in claimed
        and (halves := connected[pair.outer])
        and halves & arrived[pair.inner] == halves
    } | arrivals


def _checkers(seen: Mapping[int, Collection[Address]], ports: int) -> set[Address]:
    """Tell servers from strangers who happen to connect meanwhile."""
    counts = Counter(peer for peers in seen.values() for peer in peers)
    return {peer for peer, count in counts.items() if count >= ports * _CHECKERS_SHARE}


def looks_limited(
    pairs: Sequence[PortPair], reached: Collection[int], lost: Collection[int]
) -> bool:
    """Whether many ports got through, and many others, scattered among them, timed out.

    Args:
        pairs: All ports, in the order of the report.
        reached: The outer ports that got through.
        lost: The outer ports that timed out.
    """
    if min(len(reached), len(lost)) < _MIN_PATTERN:
        return False
    row = [pair.outer in lost for pair in pairs if pair.outer in reached or pair.outer in lost]
    runs = sum(here and not before for before, here in zip([False, *row], row, strict=False))
    return runs >= _MIN_RUNS


async def ask_in_groups(server: Server, ports: Sequence[int], waits: Waits) -> int:
    """Ask about ports that timed out once more, in small groups; the server keeps its verdicts.

    A first group, taken from all over, shows whether that helps.

    Returns:
        How many got through.
    """
    left = random.sample(list(ports), len(ports))
    through = 0
    for _ in range(int(waits.patience / waits.between_groups)):
        group, left = left[:_GROUP_SIZE], left[_GROUP_SIZE:]
        await waits.sleep(waits.between_groups)
        try:
            verdicts = await server.look_again(group)
        except ServerError:
            break
        server.verdicts |= verdicts
        through += sum(verdict.accessible for verdict in verdicts.values())
        lost = [port for port, verdict in verdicts.items() if verdict.kind is VerdictKind.TIMED_OUT]
        left += lost
        if not left or len(lost) > len(group) / 2:
            break
    return through
