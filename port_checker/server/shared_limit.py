"""Limits that many processes hold together in Redis, and each by itself while Redis is lost."""

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Self, cast

from throttled.asyncio import (
    BaseRateLimiter,
    Quota,
    RateLimiterRegistry,
    RateLimiterType,
    RateLimitResult,
    RedisStore,
    per_sec,
)

if TYPE_CHECKING:
    import redis.asyncio

# Seconds that a payment waits for Redis. A request pays its caller's limit and its target's and
# shall wait for 0.1 at the most, all told; each turn may end a millisecond late.
PATIENCE = 0.04

# Patience is counted in this many turns of the event loop: time in which this process was too
# busy to listen is not Redis' fault.
_TURNS = 5

# Payments at once; each takes a connection. The others wait for their turn.
_MOST_AT_ONCE = 8

# Seconds in which all connections are made, before anybody pays.
_CONNECTED_IN = 0.5

# Seconds between attempts to return to a lost Redis.
_RETURN_INTERVAL = 0.5

# Redis flaps when it is lost within the first number of seconds since it came back, and the second
# since that was last told. Such a loss is told only if it lasts for the third.
_STEADY = 10.0
_QUIET = 60.0
_LASTING = 3.0

logger = logging.getLogger(__name__)


class SharedLimit:
    """A limit in Redis, which another one stands in for while Redis is lost."""

    def __init__(self, redis: "Redis", shared: BaseRateLimiter, substitute: BaseRateLimiter):
        self._redis = redis
        self._shared = shared
        self._substitute = substitute

    async def limit(self, key: str, cost: int = 1) -> RateLimitResult:
        """Take ``cost`` from what ``key`` has left, if that is enough."""
        result = await self._redis.limit(self._shared, key, cost)
        return result or await self._substitute.limit(key, cost)


class Redis:
    """A Redis server that may be lost, and is returned to when it answers again.

    It is lost when it cannot be reached, answers with an error, or answered nobody for as long as
    a request waited. An asynchronous context manager, for one event loop; leaving it closes all
    connections.

    Args:
        url: ``redis://`` or, with TLS, ``rediss://``.
        patience: Seconds that a payment waits. Redis is back when it answers in half of that, so
            that one which is about as slow as this is not lost and found without end.
    """

    def __init__(self, url: str, patience: float = PATIENCE) -> None:
        self._patience = patience
        # Of the timeouts, this one bounds the closing; all else is bounded as a whole.
        self._store = _Store(url, options={"SOCKET_CONNECT_TIMEOUT": 1})
        self._turn = asyncio.Semaphore(_MOST_AT_ONCE)
        # A limit, too, so that a Redis which answers and refuses to write is not taken for well.
        self._probe = self._limiter("probe", per_sec(1000))
        self._answered = -math.inf
        self._lost = False
        self._returning: asyncio.Task[None] | None = None
        self._came_back = self._told = -math.inf

    def share(self, name: str, limiter: BaseRateLimiter) -> SharedLimit:
        """Return the limit of that name in Redis; ``limiter`` says how much, and stands in."""
        return SharedLimit(self, self._limiter(name, limiter.quota), limiter)

    def _limiter(self, name: str, quota: Quota) -> BaseRateLimiter:
        gcra = RateLimiterRegistry.get(RateLimiterType.GCRA.value)
        return gcra(quota, self._store, key_prefix=f"port-checker:{name}")

    async def __aenter__(self) -> Self:
        try:
            await self._connect()
        except Exception as error:  # it is told at once if Redis is not there
            self._lose(error)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._lost = True
        if self._returning:
            self._returning.cancel()
            await asyncio.wait([self._returning])
        await self._store.disconnect()

    async def limit(self, limiter: BaseRateLimiter, key: str, cost: int) -> RateLimitResult | None:
        """Ask ``limiter``; None if there is no answer in time, or at once if Redis is lost."""
        now = asyncio.get_running_loop().time
        asked = now()
        try:
            async with _patience(self._patience), self._turn:
                if self._lost:
                    return None
                result = await limiter.limit(key, cost)
                self._answered = now()
                return result
        except TimeoutError as error:
            if self._answered <= asked:
                self._lose(error)
        except Exception as error:  # whatever goes wrong with Redis, checks go on
            self._lose(error)
        return None

    async def _connect(self) -> None:
        """Make all connections, so that no payment waits for that."""
        async with _patience(_CONNECTED_IN), asyncio.TaskGroup() as group:
            for _ in range(_MOST_AT_ONCE):
                group.create_task(self._probe.limit(""))

    def _lose(self, error: Exception) -> None:
        if not self._lost:
            self._lost = True
            self._returning = asyncio.create_task(self._return(_reason(error)))

    async def _return(self, reason: str) -> None:
        """Wait until Redis answers; tell that it is lost, and that it is back."""
        now = asyncio.get_running_loop().time
        flaps = now() < min(self._came_back + _STEADY, self._told + _QUIET)
        tell_at = now() + (_LASTING if flaps else 0)
        tell = True
        # Nobody shall go on waiting on connections whose other end may be gone, nor use them again.
        await self._store.disconnect()
        while True:
            if tell and now() >= tell_at:
                logger.warning(
                    "Redis is lost (%s): limits are kept in each process until it is back", reason
                )
                tell = False
                self._told = now()
            await asyncio.sleep(_RETURN_INTERVAL)
            with contextlib.suppress(Exception):
                await self._connect()
                async with _patience(self._patience / 2):
                    await self._probe.limit("")
                break
        self._lost = False
        self._came_back = now()
        if not tell:
            logger.info("Redis is back: limits are shared again")


class _Store(RedisStore):
    """throttled's store, with an end."""

    async def disconnect(self) -> None:
        """Close all connections; the next command makes a new one."""
        client = cast("redis.asyncio.Redis", self._backend.get_client())
        with contextlib.suppress(Exception):  # closed or not, they are not used again
            await client.connection_pool.disconnect()


@contextlib.asynccontextmanager
async def _patience(seconds: float) -> AsyncIterator[None]:
    """Raise TimeoutError once the block has taken that long, and ``_TURNS`` of the event loop."""
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle
    async with asyncio.timeout(None) as timeout:

        def turn(turns_left: int) -> None:
            nonlocal timer
            if turns_left:
                timer = loop.call_later(seconds / _TURNS, turn, turns_left - 1)
            else:
                timeout.reschedule(loop.time())

        timer = loop.call_later(seconds / _TURNS, turn, _TURNS - 1)
        try:
            yield
        finally:
            timer.cancel()


def _reason(error: Exception) -> str:
    """Say what went wrong in the system's words, or name the kind of error.

    Never in Redis' own: an error of its can quote what it was sent, and that may be the password.
    """
    if isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, TimeoutError):
        return "no answer in time"
    kind = type(error.__cause__ or error).__name__
    cause: BaseException | None = error
    while cause:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return kind
