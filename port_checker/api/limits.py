"""How often callers may ask, and how many ports they may have checked."""

import contextlib
import functools
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
        self._requests = _quotas_of(
            "requests", requests, "{who} too often.", Limit.CALLER_REQUESTS, Limit.NETWORK_REQUESTS
        )
        self._own = _quotas_of(
            "own",
            own,
            "{who} for too many ports of your own address.",
            Limit.CALLER_OWN_PORTS,
            Limit.NETWORK_OWN_PORTS,
        )
        self._others = _quotas_of(
            "others",
            others,
            "{who} for too many ports of others' addresses.",
            Limit.CALLER_OTHERS_PORTS,
            Limit.NETWORK_OTHERS_PORTS,
        )
        self._targets = _quotas_of(
            "targets", targets, "Too many ports of {key} were asked for.", Limit.TARGET_PORTS
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
        all_limits = self._requests, self._own, self._others, self._targets
        probe = [quota for quotas_of in all_limits for quota in quotas_of(None)]
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
        return self._pay(self._requests(caller), 1)

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
            return self._pay(self._own(caller), ports, places)
        return self._pay(self._others(caller) + self._targets(target), ports, places)

    async def _pay(self, quotas: "Sequence[_Quota]", cost: int, times: int = 1) -> None:
        """Take the cost so many times from each of the quotas."""
        if not quotas:
            return
        waits = await self._shared.pay(quotas, cost * times) if self._shared else None
        if waits is None:
            waits = self._memory.pay(quotas, cost * times, self._clock())
        if longest := max(waits):
            quota = next(each for each, wait in zip(quotas, waits, strict=True) if wait)
            refusal = quota.refusal
            most = quota.capacity // times
            if cost > most:  # no pause would help; the settings see to it where there is one place
                refusal += f" Ask for at most {most} per request."
            raise RateLimited(refusal, longest, quota.limit)


@dataclass(frozen=True, slots=True)
class _Quota(Quota):
    """What one limit lets through of one address or network.

    Attributes:
        limit: Its name in the log and in the metrics.
        refusal: What to say when it is reached.
    """

    limit: Limit
    refusal: str


def _quotas_of(
    kind: str, rate: Rate | None, refusal: str, *limits: Limit
) -> Callable[[Address | None], tuple[_Quota, ...]]:
    """Return what finds the quotas of an address.

    Args:
        kind: What is counted, in the keys.
        rate: Of one subscriber; None for no limit.
        refusal: What to say, with ``{who}`` for who asks, or ``{key}`` for the subscriber.
        limits: The name of the subscriber's limit; then that of its site's, if there is one.
    """

    # Made anew for each payment, quotas took 3 % of a check of one port (measured).
    @functools.lru_cache(maxsize=1024)
    def quotas_of(address: Address | None) -> tuple[_Quota, ...]:
        if not rate:
            return ()
        key, network = subscriber(address) if address else "unknown", site(address)
        payers = (key, 1, "You ask"), (network, _SITE_RATES, f"Your network {network} asks")
        return tuple(
            _Quota(
                f"{_PREFIX}{kind}:{key}",
                rate.period.total_seconds() / (rate.count * factor),
                rate.count * factor,
                limit,
                refusal.format(who=who, key=key),
            )
            for limit, (key, factor, who) in zip(limits, payers, strict=False)
            if key
        )

    return quotas_of
