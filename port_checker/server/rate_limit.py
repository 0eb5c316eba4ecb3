"""How often a caller may ask, and how many ports may be asked of a target."""

import contextlib
import math
from collections.abc import AsyncIterator
from ipaddress import IPv6Address, IPv6Network

from throttled.asyncio import (
    BaseRateLimiter,
    MemoryStore,
    RateLimiterRegistry,
    RateLimiterType,
    per_duration,
)

from port_checker.addresses import Address
from port_checker.server.settings import IN_PROCESS, Rate
from port_checker.server.shared_limit import PATIENCE, Redis, SharedLimit

# Keys that each of the two stores holds, the least recently used making way. A key takes about
# 300 bytes (measured), so this bounds both stores together to about 60 MiB.
MAX_KEYS = 100_000


_Limit = BaseRateLimiter | SharedLimit


class RateLimited(Exception):
    """A limit was reached.

    Attributes:
        retry_after: Whole seconds, at least 1, after which the same request would be let through.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = max(1, math.ceil(retry_after))


class RateLimiter:
    """The limits per caller and per target, by the generic cell rate algorithm (GCRA).

    A limit of N in a period lets N through at once and then one each N-th of the period. Both are
    kept in this process, in constant time and bounded memory however many callers there are; while
    ``shared`` is entered, they are kept where ``store`` says.

    Args:
        per_caller: Requests that one caller may make; None for no limit.
        per_target: Ports that may be asked of one target; None for no limit.
        store: ``memory://``, or the URL of the Redis that other processes share.
        patience: Seconds that a payment waits for Redis before it is made in this process.
    """

    def __init__(
        self,
        per_caller: Rate | None,
        per_target: Rate | None,
        store: str = IN_PROCESS,
        patience: float = PATIENCE,
    ) -> None:
        self._store = store
        self._patience = patience
        self._own_callers = _gcra(per_caller) if per_caller else None
        self._own_targets = _gcra(per_target) if per_target else None
        self._callers: _Limit | None = self._own_callers
        self._targets: _Limit | None = self._own_targets

    @contextlib.asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Hold the limits together with other processes in the block, if the store is Redis."""
        if self._store == IN_PROCESS:
            yield
            return
        async with Redis(self._store, self._patience) as redis:
            if self._own_callers:
                self._callers = redis.share("callers", self._own_callers)
            if self._own_targets:
                self._targets = redis.share("targets", self._own_targets)
            try:
                yield
            finally:
                self._callers, self._targets = self._own_callers, self._own_targets

    async def pay_caller(self, caller: Address | None) -> None:
        """Count one request of ``caller``; those without an address share one limit.

        Raises:
            RateLimited: It has none left.
        """
        if self._callers:
            result = await self._callers.limit(_caller_key(caller))
            if result.limited:
                raise RateLimited("You ask too often.", result.state.retry_after)

    async def pay_target(self, target: Address, ports: int) -> None:
        """Count ``ports`` asked of ``target``, whoever asks.

        Raises:
            RateLimited: It has fewer left.
        """
        if self._targets:
            result = await self._targets.limit(str(target), ports)
            if result.limited:
                raise RateLimited(
                    f"Too many ports of {target} were asked for.", result.state.retry_after
                )


def _gcra(rate: Rate) -> BaseRateLimiter:
    limiter = RateLimiterRegistry.get(RateLimiterType.GCRA.value)
    return limiter(
        per_duration(rate.period, rate.count), MemoryStore(options={"MAX_SIZE": MAX_KEYS})
    )


def _caller_key(caller: Address | None) -> str:
    """An IPv6 user is given a /64 (RFC 6177), so all of its addresses are one caller."""
    if isinstance(caller, IPv6Address):
        return str(IPv6Network((caller, 64), strict=False))
    return str(caller)
