"""Asking again, about fewer ports at a time: are forwards crossed, or connections limited?

A listener that saw a connection proves that something was forwarded to it, but not which port. So
the server is asked about half of the ports at a time, divided differently each time: the halves
that a listener sees are, in binary, the number of the port whose connections arrive at it.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from math import comb

from port_checker.connect import Verdict
from port_checker.provider.listeners import Listeners
from port_checker.provider.origin import Contact, wait_until_seen_again
from port_checker.provider.remote import Answers, Waits
from port_checker.provider.report import PortPair

# Ports in a group that is asked about by itself when new connections are limited on the way.
# OpenWrt lets in 50 at once, and 25 more each second.
GROUP_SIZE = 40
# The same, when the server seems to be banned.
BANNED_GROUP_SIZE = 3
# How often forwards that are still unclear are traced.
_ROUNDS = 3
# Ports that got through, and ports that did not, which it takes to see a pattern.
_MIN_PATTERN = 10
# The probability that the order of what got through is chance, below which a ban is suspected.
_CHANCE = 1 / 400
# Runs of lost ports that show a limit: a single one is a range that a firewall closes. The ports
# that a limit drops are scattered, since they are asked about in random order.
_MIN_RUNS = 2


async def trace_forwards(
    contact: Contact,
    pairs: Sequence[PortPair],
    seen: Collection[int],
    listeners: Listeners,
    waits: Waits,
) -> dict[int, int]:
    """Find out at which port of this machine connections to each port arrive.

    Packets get lost, and strangers connect: what does not fit is traced again.

    Args:
        contact: The server to ask.
        pairs: The ports that it could connect to.
        seen: The inner ports at which it was seen.
        listeners: All listeners, not only those of these ports.
        waits: How long to wait for connections.

    Returns:
        For each outer port whose connections arrive here, the inner one.
    """
    arrivals: dict[int, int] = {}
    remaining = list(pairs)
    for _ in range(_ROUNDS):
        found = await _trace_once(contact, remaining, seen, listeners, waits)
        if found is None:
            break
        arrivals |= found
        remaining = [pair for pair in remaining if pair.outer not in arrivals]
        if not remaining or not found:
            break
    # Ports about which nothing else was found out stand as they were first seen.
    unclaimed = set(seen) - set(arrivals.values())
    return arrivals | {pair.outer: pair.inner for pair in remaining if pair.inner in unclaimed}


async def _trace_once(
    contact: Contact,
    pairs: Sequence[PortPair],
    seen: Collection[int],
    listeners: Listeners,
    waits: Waits,
) -> dict[int, int] | None:
    """Trace once; None if the server does not answer for all ports."""
    connected: Counter[int] = Counter()  # by outer port, the halves in which the server could
    arrived: Counter[int] = Counter()  # by inner port, the halves in which it was seen
    for bit in range(len(pairs).bit_length()):
        half = [pair for number, pair in enumerate(pairs, 1) if number >> bit & 1]
        start = listeners.clock
        answers = await contact.ask([pair.outer for pair in half])
        if answers.error or answers.excluded:
            return None
        reached = [pair for pair in half if answers.verdicts[pair.outer].accessible]
        await wait_until_seen_again(
            listeners,
            [pair.inner for pair in reached],
            seen,
            waits,
            enough=len(reached),
            since=start,
            ignored=lambda peer: not contact.has_peer(peer),
        )
        for pair in reached:
            connected[pair.outer] += 1 << bit
        for inner, peers in listeners.seen(start).items():
            if any(map(contact.has_peer, peers)):
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
    # A port that gets its own connections may get those of other ports, too.
    claimed = set(arrivals.values())
    return {
        pair.outer: pair.inner
        for pair in pairs
        if pair.inner not in claimed
        and (halves := connected[pair.outer])
        and halves & arrived[pair.inner] == halves
    } | arrivals


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


def looks_banned(order: Sequence[int], reached: Collection[int], lost: Collection[int]) -> bool:
    """Whether the first ports got through, in the random order of asking, and then no more did.

    Args:
        order: The outer ports, in the order in which they were asked about.
        reached: Those that got through.
        lost: Those that did not.
    """
    first = [port for port in order if port in reached or port in lost][: len(reached)]
    overtaken = sum(port in lost for port in first)  # since all connections begin at once
    orders_as_good = (comb(len(reached), n) * comb(len(lost), n) for n in range(overtaken + 1))
    return sum(orders_as_good) < _CHANCE * comb(len(reached) + len(lost), len(reached))


async def ask_in_groups(
    contact: Contact, ports: Sequence[int], waits: Waits, *, size: int = GROUP_SIZE
) -> Answers:
    """Ask again about ports that got lost, in small groups.

    A first group of random ports shows whether that helps.

    Returns:
        Answers that have nothing but the new verdicts.
    """
    remaining = random.sample(list(ports), len(ports))
    verdicts: dict[int, Verdict] = {}
    for _ in range(int(waits.patience / waits.between_groups)):
        group, remaining = remaining[:size], remaining[size:]
        await waits.sleep(waits.between_groups)
        answers = await contact.ask(group)
        verdicts |= answers.verdicts
        lost = [port for port in answers.verdicts if port not in answers.reached]
        remaining += lost
        if answers.error or not remaining or len(lost) > len(group) / 2:
            break
    return Answers(verdicts)
