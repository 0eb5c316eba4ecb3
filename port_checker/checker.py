"""One check: rounds of attempts with a delay between them; and how much each may have in flight."""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from typing import Final, Self

from port_checker.addresses import Address
from port_checker.connect import (
    HELD_UP,
    OPEN,
    PER_TURN,
    TIMED_OUT,
    CheckFailed,
    OnVerdict,
    OpenConnectionPacer,
    Verdict,
    WayToTarget,
    attempt,
)
from port_checker.errors import ErrorCode, Limit, ServiceError
from port_checker.tls import TlsClient, TlsVerdict

# How many shares of one caller the callers of one network may have in flight together.
_SHARES_OF_NETWORK: Final = 2

# A check of at most so many of the caller's own ports finds room until there is none at all.
_SMALL_CHECK: Final = 10

# Holders of ports in flight: all checks, and those of addresses that are not their callers'.
_EVERYBODY: Final = "everybody"
_STRANGERS: Final = "strangers"

# TLS checks of one caller at once. Each may take half a second of CPU, so all of them end within
# the five seconds that an attempt has by default.
TLS_CHECKS_PER_CALLER: Final = 10


class NoRoom(ServiceError):
    """A check would put more ports in flight than it may.

    Attributes:
        asked: How many ports the refused check asked for.
        most: How many it could have had at the very most.
        limit: The limit that it would exceed.
        retry_after: Whole seconds after which there may be room.
    """

    retry_after: int

    def __init__(
        self,
        limit: Limit,
        asked: int,
        most: int,
        whose: str,
        retry_after: int,
        room: str = "",
    ) -> None:
        if asked > most:
            text = f"This service checks at most {most} ports {whose}".rstrip() + " at once."
        else:
            text = f"Too many checks {whose}".rstrip() + f" are running{room}."
        super().__init__(text)
        self.limit = limit
        self.asked = asked
        self.most = most
        self.retry_after = retry_after

    @property
    def message(self) -> str:
        """What went wrong and what to do, for people."""
        if self.asked > self.most:
            return f"{self} Send fewer per request."
        return super().message


class CallerOverLimit(NoRoom):
    """The caller, or its network, would have more than its share in flight."""

    code = ErrorCode.RATE_LIMITED


class Overloaded(NoRoom):
    """All callers together would have more ports in flight than there may be."""

    code = ErrorCode.OVERLOADED


def max_for_others(max_in_flight: int) -> int:
    """Return how many ports of addresses that are not the caller's own may be in flight at once.

    The other half is for callers that check themselves, whatever strangers do.
    """
    return max_in_flight // 2


def max_for_caller(max_in_flight: int, share: int) -> int:
    """Return how many ports of one caller may be in flight at once, when nobody else has any.

    Nobody may take more than half of the room, unless one caller's share is all of it.
    """
    return share if share >= max_in_flight else min(share, max_in_flight // 2)


def max_request_for_others(max_in_flight: int, share: int, places: int) -> int:
    """Return how many ports of somebody else's address one request may ask for, at the very most.

    Args:
        max_in_flight: Ports that may be in flight at once.
        share: Those of one caller.
        places: From how many places they are checked.
    """
    room = max_for_others(max_in_flight)
    if share < max_in_flight:  # at most half of what is free: see Checker.reserve
        room //= 2
    return min(share, room) // places


class Reservation:
    """Ports in flight for one check; a context manager that gives them back.

    ``in_flight`` has the check already: its ports, for each holder, and its TLS handshake, if any.
    """

    def __init__(
        self,
        in_flight: dict[Hashable, int],
        holders: Iterable[Hashable],
        ports: int,
        handshake_holders: Iterable[Hashable],
    ) -> None:
        self._in_flight = in_flight
        self._holders = holders
        self._ports = ports
        self._handshake_holders = handshake_holders

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._ports:
            self.release(self._ports)
        if self._handshake_holders:
            self._give_back(self._handshake_holders, 1)

    def release(self, ports: int) -> None:
        """Give back ``ports``, which are no longer in flight."""
        self._ports -= ports
        self._give_back(self._holders, ports)

    def _give_back(self, holders: Iterable[Hashable], amount: int) -> None:
        for holder in holders:
            if remaining := self._in_flight.pop(holder) - amount:
                self._in_flight[holder] = remaining


class Checker:
    """Checks ports, many targets at a time.

    For one event loop. A check takes at most ``retries * timeout + (retries - 1) * retry_delay``
    seconds and some milliseconds: one that there is no room for is refused rather than queued.

    Args:
        retries: Attempts for each port, the first included.
        retry_delay: Seconds between the end of one round of attempts and the next.
        timeout: Seconds that one attempt may last.
        max_in_flight: Ports that may be under check at once.
        max_per_caller: Ports of these that one caller may have; there are no shares if it is None
            or all of them.
        sleep: Waits for a number of seconds; called between rounds.
    """

    def __init__(
        self,
        *,
        retries: int,
        retry_delay: float,
        timeout: float,
        max_in_flight: int,
        max_per_caller: int | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._retries = retries
        self._retry_delay = retry_delay
        self._timeout = timeout
        self._max_per_caller = sys.maxsize if max_per_caller is None else max_per_caller
        self._has_shares = self._max_per_caller < max_in_flight
        # Nothing is certain to end sooner than one round of attempts.
        self._retry_after = max(1, round(timeout))
        half = max_for_others(max_in_flight)
        self._rooms = [
            (Limit.IN_FLIGHT, _EVERYBODY, max_in_flight, ""),
            (Limit.OTHERS_IN_FLIGHT, _STRANGERS, half, "of others' addresses"),
        ]
        self._sleep = sleep
        self._pacer = OpenConnectionPacer()
        self._tls = TlsClient()
        self._in_flight: dict[Hashable, int] = {}  # ports by holder; see reserve()

    @property
    def in_flight(self) -> int:
        """Ports under check now."""
        return self._in_flight.get(_EVERYBODY, 0)

    def reserve(
        self,
        ports: int,
        *,
        caller: Hashable = None,
        network: Hashable = None,
        is_own: bool = True,
        is_tls: bool = False,
        places: int = 1,
    ) -> Reservation:
        """Make room for a check, or refuse it at once.

        Args:
            ports: How many ports it asks for.
            caller: Who asks; those who are None count as one.
            network: The network that the caller has many addresses of; None if it has not.
            is_own: Whether the target is the caller itself. All checks of others' addresses
                together have at most half of the ports in flight.
            is_tls: Whether there will be a TLS handshake, of which a caller has a share of its own.
            places: From how many places the ports are checked; each takes room for all of them.

        Shares shrink as room runs out: what a caller has and asks for may be at most half of what
        is free and its own. Up to 10 own ports find room until there is none.

        Returns:
            A context manager that gives the room back, to be entered before a check begins.

        Raises:
            CallerOverLimit: The caller or its network would have more than its share.
            Overloaded: All checks together would have too many, or this one would take too much of
                the room that is left.
        """
        in_flight, retry_after = self._in_flight, self._retry_after
        groups: list[tuple[Limit, tuple[str, Hashable], int, str]] = [
            (Limit.CALLER_IN_FLIGHT, ("caller", caller), self._max_per_caller, "of one caller")
        ]
        if network is not None:
            share = _SHARES_OF_NETWORK * self._max_per_caller
            groups.append((Limit.NETWORK_IN_FLIGHT, ("network", network), share, f"of {network}"))
        rooms = self._rooms[:1] if is_own else self._rooms
        shrinks = self._has_shares and not (is_own and ports <= _SMALL_CHECK)
        room = ports * places
        totals: dict[Hashable, int] = {}  # of each holder, with this check
        for limit, kind, size, whose_room in rooms:
            taken = in_flight.get(kind, 0)
            free = size - taken
            for group_limit, group, share, whose in groups:
                holder = (kind, group)
                held = in_flight.get(holder, 0)
                if (total := held + room) > share:
                    raise CallerOverLimit(group_limit, ports, share // places, whose, retry_after)
                # At most half of what is free and its own, so that nobody can take the last of it.
                if shrinks and total > (most := (free + held) // 2):
                    fitting = (most - held) // places
                    now = f": there is room for {fitting} now" if fitting > 0 else ""
                    largest = size // 2 // places
                    if ports > largest:
                        raise Overloaded(limit, ports, largest, whose, retry_after)
                    raise Overloaded(limit, ports, largest, whose_room, retry_after, now)
                totals[holder] = total
            if room > free:
                raise Overloaded(limit, ports, size // places, whose_room, retry_after)
            totals[kind] = taken + room
        handshakes: dict[Hashable, int] = {}  # likewise
        if is_tls and self._has_shares:
            for _, group, _, whose in groups:
                is_network = group[0] == "network"
                share = TLS_CHECKS_PER_CALLER * (_SHARES_OF_NETWORK if is_network else 1)
                holder = ("tls", group)
                if (held := in_flight.get(holder, 0)) == share:
                    whose = f"of TLS endpoints {whose}"
                    limit = Limit.NETWORK_TLS_CHECKS if is_network else Limit.CALLER_TLS_CHECKS
                    raise CallerOverLimit(limit, 1, share, whose, retry_after)
                handshakes[holder] = held + 1
        in_flight |= totals
        in_flight |= handshakes
        return Reservation(in_flight, totals, room, handshakes)

    async def check(
        self,
        target: Address,
        ports: Sequence[int],
        room: Reservation,
        on_final: OnVerdict | None = None,
    ) -> dict[int, Verdict]:
        """Find out which of ``ports`` accept connections.

        All are tried at once; those that fail are tried again, all at once, after the delay. A port
        that succeeds is not tried again, and no longer counts as in flight after that round. A
        cancelled check leaves nothing behind.

        Args:
            target: The address that the ports are on.
            ports: TCP ports, each at most once.
            room: The room for them. Ports that succeed give theirs back before the check ends.
            on_final: Called once for each port, as soon as its verdict can no longer change (the
                whole check may still fail); it must not raise.

        Returns:
            A verdict for each port, in the order of ``ports``. If all attempts of a port failed,
            it is that of the last one which was answered, if any was.

        Raises:
            CheckFailed: The checker itself is in trouble, so nothing is known about any port.
        """
        way = WayToTarget(target)
        forbidden: dict[int, str] = {}  # why this machine cannot connect, by port
        if len(ports) <= PER_TURN:
            verdicts = await self._check_batch(way, ports, room, on_final, forbidden)
        else:
            verdicts = {}
            batches = [ports[first : first + PER_TURN] for first in range(0, len(ports), PER_TURN)]
            # Each batch has its own rounds: a round's timeout begins when all of its attempts have,
            # and to begin thousands may take a second.
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [
                        group.create_task(self._check_batch(way, batch, room, on_final, forbidden))
                        for batch in batches
                    ]
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None
            for task in tasks:
                verdicts |= task.result()
        if forbidden:
            reason = next(iter(forbidden.values()))
            raise CheckFailed(reason, [port for port in ports if port in forbidden])
        if len(verdicts) < len(ports):  # all attempts of some port proved nothing
            raise CheckFailed(HELD_UP)
        return {port: verdicts[port] for port in ports}

    async def _check_batch(
        self,
        way: WayToTarget,
        ports: Sequence[int],
        room: Reservation,
        on_final: OnVerdict | None,
        forbidden: dict[int, str],
    ) -> dict[int, Verdict]:
        """Check at most ``PER_TURN`` of the ports of a check, and return what is known of them.

        It ends early once there are ``forbidden`` ports, and adds those that it finds.
        """
        verdicts: dict[int, Verdict] = {}
        failed = ports

        def on_verdict(port: int, verdict: Verdict) -> None:
            if on_final and (verdict.accessible or round_ == self._retries - 1):
                on_final(port, verdicts.get(port, verdict) if verdict is TIMED_OUT else verdict)

        for round_ in range(self._retries):
            if round_:
                await self._sleep(self._retry_delay)
            if forbidden:
                return verdicts
            try:
                latest = await attempt(
                    way, failed, self._timeout, self._pacer, on_verdict if on_final else None
                )
            except CheckFailed as error:
                if not error.ports:
                    raise
                forbidden |= dict.fromkeys(error.ports, str(error))
                return verdicts
            for port, verdict in latest.items():
                # Routers answer some attempts and are silent at others, as they limit ICMP.
                if verdict is not TIMED_OUT or port not in verdicts:
                    verdicts[port] = verdict
            still_failed = [port for port in failed if verdicts.get(port) is not OPEN]
            room.release(len(failed) - len(still_failed))
            if not still_failed:
                return verdicts
            failed = still_failed
        if on_final:
            for port in failed:
                if port not in latest and port in verdicts:  # the last attempt proved nothing
                    on_final(port, verdicts[port])
        return verdicts

    async def check_tls(
        self,
        target: Address,
        port: int,
        expected: Sequence[Address | str],
        caller: Hashable = None,
    ) -> TlsVerdict:
        """Find out whether a TLS endpoint has a certificate that is good for what is expected.

        It takes the time of a check of one port, for which there must be room. A connection that
        fails, in the handshake too, is tried again; what a certificate says is final.

        Args:
            target: The address that the port is on.
            port: A TCP port.
            expected: Addresses and at most one DNS name, as for ``TlsClient.attempt``.
            caller: Who asks, as for ``reserve``.

        Returns:
            The verdict; if all attempts failed, that of the last one which was answered, if any.

        Raises:
            CheckFailed: The checker itself is in trouble, so nothing is known about the endpoint.
        """
        verdict: TlsVerdict | None = None
        for round_ in range(self._retries):
            if round_:
                await self._sleep(self._retry_delay)
            latest = await self._tls.attempt(
                target, port, expected, self._timeout, self._pacer, str(caller)
            )
            if not verdict or latest.error != TIMED_OUT.error:
                verdict = latest
            if not verdict.try_again:
                break
        assert verdict, "at least one attempt was made"  # noqa: S101  # for type checkers
        return verdict
