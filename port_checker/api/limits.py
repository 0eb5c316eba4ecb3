"""How often callers may ask, and how many ports they may have checked."""

import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from port_checker.addresses import Address, have_one_subscriber, site, subscriber
from port_checker.api.gcra import Charge, MemoryStore
from port_checker.errors import ErrorCode, Limit, ServiceError
from port_checker.settings import IN_PROCESS, Rate

if TYPE_CHECKING:
    from port_checker.api.shared_limits import SharedStore

# Keys that the process remembers; the least recently used make way. A key takes about 200 bytes
# (measured), so this bounds all of them to about 30 MiB.
MAX_KEYS: Final = 150_000

# How all keys begin. A Redis cluster keeps keys with the same word in braces on one node, which a
# payment to several limits needs.
_PREFIX: Final = "port-checker:{limits}:"

_SITE_RATES: Final = 10  # times the rates of one caller, for an IPv6 /48


class RateLimited(ServiceError):
    """A limit was reached.

    Attributes:
        limit: Which one.
        retry_after: Whole seconds, at least 1, after which the same request would be let through.
    """

    code = ErrorCode.RATE_LIMITED
    retry_after: int

    def __init__(self, text: str, retry_after: float, limit: Limit) -> None:
        super().__init__(text)
        self.limit = limit
        self.retry_after = max(1, math.ceil(retry_after))


class RateLimiter:
    """How much callers may ask for, and how much may be asked of a target.

    A caller is an IPv4 address or an IPv6 /64; besides, an IPv6 /48 has ten times the rates of a
    caller. Callers whose address is not known share one limit. The limits are kept in this process,
    in constant time and bounded memory however many callers there are; within ``shared``, they are
    kept where ``store`` says.

    Args:
        requests: Requests of one caller; None for no limit.
        others: Ports that one caller may ask for on addresses that are not its own.
        targets: Ports that may be asked of one target by others than itself; an IPv6 target is
            its /64.
        store: ``memory://``, or the URL of the Redis that other processes share.
        own: Ports that one caller may ask for on its own address.
        answer_timeout: Seconds that a payment waits for Redis before it is made in this process;
            None for the default.
        max_keys: How many keys the process remembers.
        clock: Returns the time in seconds, for limits in this process.
    """

    def __init__(
        self,
        requests: Rate | None = None,
        others: Rate | None = None,
        targets: Rate | None = None,
        store: str = IN_PROCESS,
        *,
        own: Rate | None = None,
        answer_timeout: float | None = None,
        max_keys: int = MAX_KEYS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._requests = _limit("requests", requests, Limit.CALLER_REQUESTS, "You ask too often.")
        self._site_requests = _limit(
            "requests",
            requests,
            Limit.NETWORK_REQUESTS,
            "Your network {} asks too often.",
            _SITE_RATES,
        )
        self._own, self._site_own = _of_caller_and_network(
            "own", own, Limit.CALLER_OWN_PORTS, Limit.NETWORK_OWN_PORTS, "your own address"
        )
        self._others, self._site_others = _of_caller_and_network(
            "others",
            others,
            Limit.CALLER_OTHERS_PORTS,
            Limit.NETWORK_OTHERS_PORTS,
            "others' addresses",
        )
        self._targets = _limit(
            "targets", targets, Limit.TARGET_PORTS, "Too many ports of {} were asked for."
        )
        self._url = store
        self._answer_timeout = answer_timeout
        self._clock = clock
        self._memory = MemoryStore(max_keys)
        self._shared: SharedStore | None = None

    @property
    def store_is_available(self) -> bool:
        """Whether limits can be kept where ``store`` says."""
        return self._shared is None or self._shared.is_available

    @contextlib.asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Share the limits with other processes in the block, if the store is Redis."""
        limits = [
            limit for limit in (self._requests, self._own, self._others, self._targets) if limit
        ]
        if self._url == IN_PROCESS or not limits:
            yield
            return
        # It imports redis, which is an extra.
        from port_checker.api.shared_limits import ANSWER_TIMEOUT, SharedStore

        async with SharedStore(
            self._url,
            probe=[limit.charge("probe", 0) for limit in limits],
            answer_timeout=self._answer_timeout or ANSWER_TIMEOUT,
        ) as self._shared:
            try:
                yield
            finally:
                self._shared = None

    async def pay_request(self, caller: Address | None) -> None:
        """Count one request of ``caller``.

        Raises:
            RateLimited: It has none left, or its /48 has none.
        """
        await self._pay(_due(self._requests, self._site_requests, caller), 1)

    async def pay_ports(
        self, caller: Address | None, target: Address, ports: int, places: int = 1
    ) -> None:
        """Count ``ports`` that ``caller`` asks of ``target``, once for each of so many places.

        Ports of the caller's own address have a limit of their own, so strangers cannot use up what
        an owner may ask for.

        Raises:
            RateLimited: The caller, its /48 or the target has fewer left; nothing was counted.
        """
        if have_one_subscriber(caller, target):
            due = _due(self._own, self._site_own, caller)
        else:
            due = _due(self._others, self._site_others, caller)
            if self._targets:
                due.append((self._targets, subscriber(target)))
        await self._pay(due, ports, places)

    async def _pay(self, due: Sequence[tuple["_Limit", str]], cost: int, times: int = 1) -> None:
        """Take the cost from each of the limits, for its key."""
        if not due:
            return
        charges = [limit.charge(key, cost * times) for limit, key in due]
        waits = await self._shared.pay(charges) if self._shared else None
        if waits is None:
            waits = self._memory.pay(charges, self._clock())
        if longest := max(waits):
            limit, key = next(each for each, wait in zip(due, waits, strict=True) if wait)
            refusal = limit.refusal.format(key)
            most = limit.capacity // times
            if cost > most:  # no pause would help; the settings see to it where there is one place
                refusal += f" Ask for at most {most} per request."
            raise RateLimited(refusal, longest, limit.name)


class _Limit(NamedTuple):
    """One limit for each key that begins with ``prefix``; see ``Charge``.

    Attributes:
        name: In the log and in the metrics.
        refusal: What to say when it is reached, with ``{}`` for the key.
    """

    prefix: str
    interval: float
    capacity: int
    name: Limit
    refusal: str

    def charge(self, key: str, cost: int) -> Charge:
        """Return what a payment takes of it."""
        return Charge(self.prefix + key, self.interval, self.capacity, cost)


def _limit(
    kind: str, rate: Rate | None, name: Limit, refusal: str, factor: int = 1
) -> _Limit | None:
    if not rate:
        return None
    capacity = rate.count * factor
    interval = rate.period.total_seconds() / capacity
    return _Limit(f"{_PREFIX}{kind}:", interval, capacity, name, refusal)


def _of_caller_and_network(
    kind: str, rate: Rate | None, name: Limit, network_name: Limit, whose: str
) -> tuple[_Limit | None, _Limit | None]:
    refusal = f"for too many ports of {whose}."
    return (
        _limit(kind, rate, name, f"You ask {refusal}"),
        _limit(kind, rate, network_name, f"Your network {{}} asks {refusal}", _SITE_RATES),
    )


def _due(
    limit: _Limit | None, network_limit: _Limit | None, caller: Address | None
) -> list[tuple[_Limit, str]]:
    """Return which limits a caller pays to, and its key in each."""
    due = [(limit, subscriber(caller) if caller else "unknown")] if limit else []
    if network_limit and (network := site(caller)):
        due.append((network_limit, network))
    return due
