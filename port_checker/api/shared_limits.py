"""Rate limits that many processes share in Redis, behind a circuit breaker.

Payments that come while Redis is busy with others travel together, so that a crowd waits for one
round trip rather than queueing for connections.
"""

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Sequence
from typing import Final, Self

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from port_checker.api.gcra import PAY_IN_REDIS, Charge

# Seconds that a payment waits for Redis. A request pays at most twice and may wait for at most 0.1
# seconds in all; each turn of the event loop may end a millisecond late.
ANSWER_TIMEOUT: Final = 0.04

# A timeout counts in this many turns of the event loop: time in which this process was too busy to
# read an answer is not Redis' fault.
_TURNS: Final = 5

_CONNECT_TIMEOUT: Final = 0.5  # seconds, before anybody pays
_PROBE_INTERVAL: Final = 0.5  # seconds between attempts to reach Redis again

# Payments that travel together, so that one call does not occupy Redis for long.
_MOST_TOGETHER: Final = 100

# Takes from a limit like a payment, so that a Redis which answers but refuses to write counts as
# unavailable.
_PROBE: Final = Charge("port-checker:probe", interval=0.001, capacity=1000, cost=1)

logger = logging.getLogger(__name__)

_Answer = asyncio.Future[list[float] | None]


class SharedStore:
    """Limits in Redis, and whether Redis is available.

    Redis is unavailable once it cannot be reached, answers with an error, or does not answer in
    time. Nobody asks it then, until a probe has reached it again. An asynchronous context manager,
    for one event loop; leaving it closes the connection.

    Args:
        url: ``redis://`` or, with TLS, ``rediss://``.
        answer_timeout: Seconds that a payment waits.
        warning_interval: Seconds between warnings: a Redis that comes and goes is logged no more
            often.

    Attributes:
        is_available: Whether Redis is asked now.
    """

    def __init__(
        self, url: str, answer_timeout: float = ANSWER_TIMEOUT, warning_interval: float = 60
    ) -> None:
        self._answer_timeout = answer_timeout
        self._warning_interval = warning_interval
        # The timeout bounds the closing alone; all else is bounded as a whole.
        self._redis = Redis.from_url(url, socket_connect_timeout=1, retry=Retry(NoBackoff(), 0))
        self._script = self._redis.register_script(PAY_IN_REDIS)
        self.is_available = False
        self._waiting: list[tuple[Sequence[Charge], _Answer]] = []
        self._sending: asyncio.Task[None] | None = None
        self._probing: asyncio.Task[None] | None = None
        self._next_warning = -math.inf

    async def __aenter__(self) -> Self:
        try:
            await self._connect()
            self.is_available = True
        except Exception:  # tried again, and logged
            self._become_unavailable()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.is_available = False
        running = [task for task in (self._sending, self._probing) if task]
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)
        await self._disconnect()

    async def pay(self, charges: Sequence[Charge]) -> list[float] | None:
        """Make a payment, if none of its limits refuses.

        Args:
            charges: One for each limit; no two have the same key.

        Returns:
            For each charge, the seconds after which its limit would let it through: 0 unless it
            refuses. None if Redis is unavailable, or the answer did not come in time; Redis may
            count such a payment all the same.
        """
        if not self.is_available:
            return None
        answer: _Answer = asyncio.get_running_loop().create_future()
        self._waiting.append((charges, answer))
        if not self._sending or self._sending.done():
            self._sending = asyncio.create_task(self._send())
        try:
            # Those who wait behind others do not blame Redis: it may not have been asked yet.
            async with _timeout(self._answer_timeout):
                return await answer
        except TimeoutError:
            return None

    async def _send(self) -> None:
        """Ask Redis for all payments that wait, many at a time."""
        while self._waiting:
            together = [one for one in self._waiting[:_MOST_TOGETHER] if not one[1].done()]
            del self._waiting[:_MOST_TOGETHER]
            if not together:  # they have not waited
                continue
            results: Sequence[list[float] | None]
            try:
                async with _timeout(self._answer_timeout):
                    results = await self._ask([charges for charges, _ in together])
            except Exception:  # whatever goes wrong with Redis, checks go on
                self._become_unavailable()
                together += self._waiting  # nobody waits in vain
                self._waiting.clear()
                results = [None] * len(together)
            for (_, answer), result in zip(together, results, strict=True):
                if not answer.done():
                    answer.set_result(result)

    async def _ask(self, payments: Sequence[Sequence[Charge]]) -> list[list[float]]:
        keys = [charge.key for charges in payments for charge in charges]
        arguments: list[float] = []
        for charges in payments:
            arguments.append(len(charges))
            for charge in charges:
                arguments += charge.interval, charge.capacity, charge.cost
        waits = iter(await self._script(keys, arguments))
        return [[float(next(waits)) for _ in charges] for charges in payments]

    def _become_unavailable(self) -> None:
        self.is_available = False
        self._probing = asyncio.create_task(self._probe())

    async def _probe(self) -> None:
        """Try until Redis answers, at once and then twice a second.

        Logs that it is unavailable unless it answers at once, and that it is available again.
        """
        now = asyncio.get_running_loop().time
        has_warned = False
        # The other end may be gone without a word.
        await self._disconnect()
        while not self.is_available:
            try:
                await self._connect()
                self.is_available = True
            except Exception as error:
                if not has_warned and now() >= self._next_warning:
                    logger.warning(
                        "Redis is unavailable (%s): each process keeps its own limits meanwhile",
                        _reason(error),
                    )
                    has_warned = True
                    self._next_warning = now() + self._warning_interval
                await asyncio.sleep(_PROBE_INTERVAL)
        if has_warned:
            logger.info("Redis is available again: limits are shared")

    async def _connect(self) -> None:
        """Connect and load the script, which a payment need not wait for; then ask like one."""
        async with _timeout(_CONNECT_TIMEOUT):
            await self._ask([[_PROBE]])
        async with _timeout(self._answer_timeout):
            await self._ask([[_PROBE]])

    async def _disconnect(self) -> None:
        with contextlib.suppress(Exception):  # closed or not, it is not used again
            await self._redis.connection_pool.disconnect()


@contextlib.asynccontextmanager
async def _timeout(seconds: float) -> AsyncIterator[None]:
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
    if isinstance(error, TimeoutError):
        return "no answer in time"
    cause: BaseException | None = error
    while cause:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return type(error).__name__
