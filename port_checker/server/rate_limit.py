"""How often a caller may ask, and how many ports may be asked of a target."""

import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from ipaddress import IPv6Address, IPv6Network
from typing import TYPE_CHECKING, Final

from throttled.asyncio import MemoryStoreBackend

from port_checker.addresses import Address
from port_checker.server.gcra import Charge, pay_in_memory
from port_checker.server.settings import IN_PROCESS, Rate

if TYPE_CHECKING:
    from port_checker.server.shared_limit import SharedStore

# Keys that the process remembers, the least recently used making way. A key takes about 300 bytes
# (measured), so this bounds all of them to about 60 MiB.
MAX_KEYS: Final = 200_000


class RateLimited(Exception):
    """A limit was reached.

    Attributes:
        retry_after: Whole seconds, at least 1, after which the same request would be let through.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = max(1, math.ceil(retry_after))


class RateLimiter:
    """The limits per caller and per target.

    They are kept in this process, in constant time and bounded memory however many callers there
    are; while ``shared`` is entered, they are kept where ``store`` says.

    Args:
        per_caller: Requests that one caller may make; None for no limit.
        per_target: Ports that may be asked of one target; None for no limit.
        store: ``memory://``, or the URL of the Redis that other processes share.
        answer_timeout: Seconds that a payment waits for Redis before it is made in this process;
            None for the default.
        max_keys: How many keys the process remembers.
        clock: Tells the seconds by which limits are given back in this process.
    """

    def __init__(
        self,
        per_caller: Rate | None,
        per_target: Rate | None,
        store: str = IN_PROCESS,
        *,
        answer_timeout: float | None = None,
        max_keys: int = MAX_KEYS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._per_caller = per_caller and _Limit("callers", per_caller)
        self._per_target = per_target and _Limit("targets", per_target)
        self._url = store
        self._answer_timeout = answer_timeout
        self._clock = clock
        self._memory = MemoryStoreBackend(options={"MAX_SIZE": max_keys})
        self._shared: SharedStore | None = None

    @contextlib.asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Share the limits with other processes in the block, if the store is Redis."""
        if self._url == IN_PROCESS:
            yield
            return
        # It imports redis, which is an extra.
        from port_checker.server.shared_limit import ANSWER_TIMEOUT, SharedStore

        async with SharedStore(self._url, self._answer_timeout or ANSWER_TIMEOUT) as self._shared:
            try:
                yield
            finally:
                self._shared = None

    async def pay_caller(self, caller: Address | None) -> None:
        """Count one request of ``caller``; those without an address share one limit.

        Raises:
            RateLimited: It has none left.
        """
        if self._per_caller:
            (wait,) = await self._pay([self._per_caller.charge(_caller_key(caller), 1)])
            if wait:
                raise RateLimited("You ask too often.", wait)

    async def pay_target(self, target: Address, ports: int) -> None:
        """Count ``ports`` asked of ``target``, whoever asks.

        Raises:
            RateLimited: It has fewer left.
        """
        if self._per_target:
            (wait,) = await self._pay([self._per_target.charge(str(target), ports)])
            if wait:
                raise RateLimited(f"Too many ports of {target} were asked for.", wait)

    async def _pay(self, charges: Sequence[Charge]) -> list[float]:
        waits = await self._shared.pay(charges) if self._shared else None
        if waits is None:
            waits = pay_in_memory(self._memory, charges, self._clock())
        return waits


class _Limit:
    """One limit for each key of its kind."""

    def __init__(self, name: str, rate: Rate) -> None:
        self._prefix = f"port-checker:{name}:"
        self._interval = rate.period.total_seconds() / rate.count
        self._capacity = rate.count

    def charge(self, key: str, cost: int) -> Charge:
        return Charge(self._prefix + key, self._interval, self._capacity, cost)


def _caller_key(caller: Address | None) -> str:
    """An IPv6 user is given a /64 (RFC 6177), so all of its addresses are one caller."""
    if isinstance(caller, IPv6Address):
        return str(IPv6Network((caller, 64), strict=False))
    return str(caller)
