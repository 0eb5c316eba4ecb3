"""How often callers may ask, and how many ports they may have checked."""

import contextlib
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from port_checker.addresses import Address, have_one_subscriber, site, subscriber
from port_checker.api.gcra import MemoryStore, Quota
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
        self._requests, self._site_requests = _of_caller_and_site(
            "requests", requests, "too often.", Limit.CALLER_REQUESTS, Limit.NETWORK_REQUESTS
        )
        self._own, self._site_own = _of_caller_and_site(
            "own",
            own,
            "for too many ports of your own address.",
            Limit.CALLER_OWN_PORTS,
            Limit.NETWORK_OWN_PORTS,
        )
        self._others, self._site_others = _of_caller_and_site(
            "others",
            others,
            "for too many ports of others' addresses.",
            Limit.CALLER_OTHERS_PORTS,
            Limit.NETWORK_OTHERS_PORTS,
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
        limits = self._requests, self._own, self._others, self._targets
        probe = [(f"{limit.prefix}probe", limit) for limit in limits if limit]
        if self._url == IN_PROCESS or not probe:
            yield
            return
        # It imports redis, which is an extra.
        from port_checker.api.shared_limits import ANSWER_TIMEOUT, SharedStore

        timeout = self._answer_timeout or ANSWER_TIMEOUT
        async with SharedStore(self._url, probe, timeout) as self._shared:
            try:
                yield
            finally:
                self._shared = None

    def pay_request(self, caller: Address | None) -> Awaitable[None]:
        """Count one request of ``caller``.

        Raises:
            RateLimited: It has none left, or its /48 has none.
        """
        return self._pay(_charges(self._requests, self._site_requests, caller), 1)

    def pay_ports(
        self, caller: Address | None, target: Address, ports: int, places: int = 1
    ) -> Awaitable[None]:
        """Count ``ports`` that ``caller`` asks of ``target``, once for each of so many places.

        Ports of the caller's own address have a limit of their own, so strangers cannot use up what
        an owner may ask for.

        Raises:
            RateLimited: The caller, its /48 or the target has fewer left; nothing was counted.
        """
        if have_one_subscriber(caller, target):
            charges = _charges(self._own, self._site_own, caller)
        else:
            charges = _charges(self._others, self._site_others, caller)
            if self._targets:
                charges.append((self._targets.prefix + subscriber(target), self._targets))
        return self._pay(charges, ports, places)

    async def _pay(
        self, charges: "Sequence[tuple[str, _Limit]]", cost: int, times: int = 1
    ) -> None:
        """Take the cost so many times from each of the limits."""
        if not charges:
            return
        waits = await self._shared.pay(charges, cost * times) if self._shared else None
        if waits is None:
            waits = self._memory.pay(charges, cost * times, self._clock())
        if longest := max(waits):
            key, limit = next(each for each, wait in zip(charges, waits, strict=True) if wait)
            refusal = limit.refusal.format(key.removeprefix(limit.prefix))
            most = limit.capacity // times
            if cost > most:  # no pause would help; the settings see to it where there is one place
                refusal += f" Ask for at most {most} per request."
            raise RateLimited(refusal, longest, limit.name)


@dataclass(frozen=True, slots=True)
class _Limit(Quota):
    """What one limit lets through of each key that begins with ``prefix``.

    Attributes:
        name: In the log and in the metrics.
        refusal: What to say when it is reached, with ``{}`` for the rest of the key.
    """

    prefix: str
    name: Limit
    refusal: str


def _limit(
    kind: str, rate: Rate | None, name: Limit, refusal: str, factor: int = 1
) -> _Limit | None:
    if not rate:
        return None
    capacity = rate.count * factor
    interval = rate.period.total_seconds() / capacity
    return _Limit(interval, capacity, f"{_PREFIX}{kind}:", name, refusal)


def _of_caller_and_site(
    kind: str, rate: Rate | None, what: str, name: Limit, site_name: Limit
) -> tuple[_Limit | None, _Limit | None]:
    return (
        _limit(kind, rate, name, f"You ask {what}"),
        _limit(kind, rate, site_name, f"Your network {{}} asks {what}", _SITE_RATES),
    )


def _charges(
    limit: _Limit | None, site_limit: _Limit | None, caller: Address | None
) -> list[tuple[str, _Limit]]:
    """Return what a caller, and its site if it has one, pay to."""
    if not (limit and site_limit):
        return []
    charges = [(limit.prefix + (subscriber(caller) if caller else "unknown"), limit)]
    if network := site(caller):
        charges.append((site_limit.prefix + network, site_limit))
    return charges
