"""Rate limits that many processes share in Redis, behind a circuit breaker.

Payments that arrive while Redis works on others go there together, so a crowd waits for one round
trip instead of queueing for connections.
"""

import asyncio
import contextlib
import logging
import math
import random
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Final, Self, cast
from urllib.parse import urlsplit

from redis.asyncio import Connection, ConnectionPool, Redis, RedisCluster, SSLConnection
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.commands.core import AsyncScript
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ClusterCrossSlotError,
    ClusterDownError,
    InvalidResponse,
    MasterDownError,
    MovedError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError

from port_checker.api.gcra import PAY_IN_REDIS, Charge
from port_checker.resolver import Resolver
from port_checker.settings import REDIS_CLUSTER

# Seconds that a payment waits for Redis. A request pays at most twice and may wait for at most 0.1
# seconds in all; each turn of the event loop may end a millisecond late.
ANSWER_TIMEOUT: Final = 0.04

# A timeout counts in this many turns of the event loop: time in which this process was too busy to
# read an answer is not Redis' fault.
_TURNS: Final = 5

_CONNECT_TIMEOUT: Final = 0.5  # seconds, before anybody pays
_PROBE_INTERVAL: Final = 0.5  # seconds between attempts to reach Redis again

# Seconds of these for one node of a cluster. One that answers later is too slow for payments.
_CLUSTER_CONNECT_TIMEOUT: Final = 0.1

# The most payments in one call, so that none occupies Redis for long.
_MOST_TOGETHER: Final = 100

# The code of an error, by its exception: redis-py cuts it off the message.
_CODES: Final[Mapping[type[RedisError], str]] = {
    AuthenticationError: "WRONGPASS or NOAUTH: user or password is wrong",
    BusyLoadingError: "LOADING",
    ClusterCrossSlotError: "CROSSSLOT",
    ClusterDownError: "CLUSTERDOWN",
    MasterDownError: "MASTERDOWN",
    MovedError: "MOVED: it is a cluster, whose URL begins with redis+cluster://",
    NoPermissionError: "NOPERM",
    OutOfMemoryError: "OOM",
    ReadOnlyError: "READONLY",
}

# What redis-py itself says of a connection; it quotes nothing that was sent.
_CONNECTION_ERRORS: Final = ("max number of clients reached", "Connection closed by server")

# What an answer raises that is not Redis', or does not fit a payment.
_NOT_UNDERSTOOD: Final = (InvalidResponse, TypeError, ValueError, RecursionError)

# A payment is tried once: after a failure, Redis is probed.
_ONCE: Final = Retry(NoBackoff(), 0)

logger = logging.getLogger(__name__)

_Payment = tuple[Sequence[Charge], int]  # and what it takes of each
_Answer = asyncio.Future[list[float] | None]


class SharedStore:
    """Limits in Redis, and whether Redis is available.

    Redis is unavailable once it cannot be reached, answers with an error, or does not answer in
    time. From then on only probes ask it, until one succeeds. An asynchronous context manager, for
    one event loop; leaving it closes the connections.

    Args:
        url: ``redis://``, with TLS ``rediss://``, of a cluster ``redis+cluster://``, or of a Unix
            socket ``unix://``.
        probe: The charges of a probe's payment, to all limits; its cost is 0. After a payment has
            failed, probes repeat that one, at cost 0.
        answer_timeout: Seconds that a payment waits.
        warning_interval: The least seconds between two warnings about a Redis that comes and goes.

    Attributes:
        is_available: Whether Redis is asked now.
    """

    def __init__(
        self,
        url: str,
        probe: Sequence[Charge],
        answer_timeout: float = ANSWER_TIMEOUT,
        warning_interval: float = 60,
    ) -> None:
        self._probe_payments: Sequence[_Payment] = [(probe, 0)]
        self._answer_timeout = answer_timeout
        self._warning_interval = warning_interval
        self._client = _ClusterClient(url) if url.startswith(REDIS_CLUSTER) else _Client(url)
        self.is_available = False
        self._waiting: list[tuple[_Payment, _Answer]] = []
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

    async def pay(self, charges: Sequence[Charge], cost: int) -> list[float] | None:
        """Make a payment, if none of its limits refuses.

        Args:
            charges: One for each limit; no two have the same key.
            cost: How many the payment takes of each.

        Returns:
            For each charge, the seconds after which its limit would let the payment through: 0
            unless it refuses. None if Redis is unavailable or did not answer in time; Redis may
            still count such a payment.
        """
        if not self.is_available:
            return None
        answer: _Answer = asyncio.get_running_loop().create_future()
        self._waiting.append(((charges, cost), answer))
        if not self._sending or self._sending.done():
            self._sending = asyncio.create_task(self._send())
        try:
            # That is no proof against Redis: behind others, it may not have been asked yet.
            async with _timeout(self._answer_timeout):
                return await answer
        except TimeoutError:
            return None

    async def _send(self) -> None:
        """Send Redis all payments that wait, many at a time."""
        while self._waiting:
            together = [one for one in self._waiting[:_MOST_TOGETHER] if not one[1].done()]
            del self._waiting[:_MOST_TOGETHER]
            if not together:  # their callers have given up
                continue
            results: Sequence[list[float] | None]
            try:
                async with _timeout(self._answer_timeout):
                    results = await self._ask([payment for payment, _ in together])
            except Exception:  # whatever goes wrong with Redis, checks go on
                self._probe_payments = [(charges, 0) for (charges, _), _ in together]
                self._become_unavailable()
                together += self._waiting  # they would wait in vain
                self._waiting.clear()
                results = [None] * len(together)
            for (_, answer), result in zip(together, results, strict=True):
                if not answer.done():
                    answer.set_result(result)

    async def _ask(self, payments: Sequence[_Payment]) -> list[list[float]]:
        keys = [key for charges, _ in payments for key, _ in charges]
        arguments: list[float] = []
        for charges, cost in payments:
            arguments += len(charges), cost
            for _, quota in charges:
                arguments += quota.interval, quota.capacity
        answer = await self._client.run(keys, arguments)
        if not isinstance(answer, list) or len(answer) != len(keys):
            raise ValueError("not an answer to payments")
        waits = [float(wait) for wait in answer]
        if not all(0 <= wait < math.inf for wait in waits):
            raise ValueError("not a time to wait")
        remaining = iter(waits)
        return [[next(remaining) for _ in charges] for charges, _ in payments]

    def _become_unavailable(self) -> None:
        self.is_available = False
        self._probing = asyncio.create_task(self._probe())

    async def _probe(self) -> None:
        """Try until Redis answers, at once and then twice a second.

        Unless it answers at once, that it is unavailable is logged, and later that it is back.
        """
        now = asyncio.get_running_loop().time
        has_warned = False
        # The other end may be gone without having closed the connection.
        await self._disconnect()
        while not self.is_available:
            try:
                await self._connect()
                self.is_available = True
            except Exception as error:
                if not has_warned and now() >= self._next_warning:
                    logger.warning(
                        "Redis is unavailable (%s): each process keeps its own limits meanwhile",
                        self._client.reason(error),
                    )
                    has_warned = True
                    self._next_warning = now() + self._warning_interval
                await asyncio.sleep(_PROBE_INTERVAL)
        if has_warned:
            logger.info("Redis is available again: limits are shared")

    async def _connect(self) -> None:
        """Connect and load the script; then probe as fast as a payment must be."""
        async with _timeout(_CONNECT_TIMEOUT):
            await self._ask(self._probe_payments)
        async with _timeout(self._answer_timeout):
            await self._ask(self._probe_payments)

    async def _disconnect(self) -> None:
        with contextlib.suppress(Exception):  # closed or not, it is not used again
            await self._client.disconnect()


class _Client:
    """A client of one Redis, which runs our script.

    Args:
        url: As for ``SharedStore``.
    """

    def __init__(self, url: str) -> None:
        self._resolver = Resolver()
        self._host = urlsplit(url).hostname or ""
        # This timeout is for closing alone: connecting is bounded as a whole.
        self._pool = ConnectionPool.from_url(url, socket_connect_timeout=1, retry=_ONCE)
        if self._host:  # else it is a Unix socket
            is_tls = self._pool.connection_class is SSLConnection
            self._pool.connection_class = _TlsConnection if is_tls else _Connection
            self._pool.connection_kwargs["resolver"] = self._resolver
        self._script = AsyncScript(Redis(connection_pool=self._pool), PAY_IN_REDIS)

    async def run(self, keys: Sequence[str], arguments: Sequence[float]) -> Any:
        """Run the script, and return its answer."""
        return await self._script(keys, arguments)

    async def disconnect(self) -> None:
        """Close the connections."""
        await self._pool.disconnect()

    def reason(self, error: Exception) -> str:
        """Say what went wrong, in the system's words or by Redis' code.

        Never in Redis' own words, which can quote what was sent, even the password.
        """
        if self._resolver.is_looking_up(self._host):
            return f"the look-up of {self._host} is not answered"
        cause: BaseException | None = error
        while cause:
            if isinstance(cause, TimeoutError):
                return "no answer in time"
            if isinstance(cause, OSError) and cause.strerror:
                return cause.strerror
            for kind, code in _CODES.items():
                if isinstance(cause, kind):
                    return code
            if isinstance(cause, ResponseError):
                return _code(str(cause))
            if isinstance(cause, RedisConnectionError):
                known = [text for text in _CONNECTION_ERRORS if text in str(cause)]
                if known:
                    return known[0]
            if isinstance(cause, _NOT_UNDERSTOOD):
                return "what it answers is not understood"
            cause = cause.__cause__ or cause.__context__
        return type(error).__name__


class _ClusterClient(_Client):
    """A client of a Redis cluster, whose nodes it learns from the one that the URL names.

    Whichever node is gone, even silently, it finds the others: it asks them in random order.
    """

    def __init__(self, url: str) -> None:
        url = url.replace(REDIS_CLUSTER, "redis://")
        super().__init__(url)
        self._options = parse_url(url)
        self._cluster: RedisCluster | None = None
        self._known: set[tuple[str, int]] = set()  # the nodes when the cluster was last seen

    async def run(self, keys: Sequence[str], arguments: Sequence[float]) -> Any:
        """Run the script on the node that has the keys."""
        if not self._cluster:
            nodes = [ClusterNode(host, port) for host, port in await self._candidates()]
            random.shuffle(nodes)
            self._cluster = RedisCluster(
                startup_nodes=nodes,
                username=self._options.get("username"),
                password=self._options.get("password"),
                socket_connect_timeout=_CLUSTER_CONNECT_TIMEOUT,
                retry=_ONCE,
            )
            # For the nodes that it learns of: they may have names, which it would look up itself.
            options: dict[str, Any] = self._cluster.get_connection_kwargs()
            options.update(connection_class=_Connection, resolver=self._resolver)
            # A script needs no more of a client than a cluster has.
            self._script = AsyncScript(cast(Redis, self._cluster), PAY_IN_REDIS)
        return await super().run(keys, arguments)

    async def _candidates(self) -> set[tuple[str, int]]:
        """Return the addresses and ports of the known nodes, that of the URL included.

        Raises:
            OSError: None is known, and the URL's host has no address.
        """
        nodes = set(self._known)
        try:
            async with asyncio.timeout(_CLUSTER_CONNECT_TIMEOUT if nodes else None):
                addresses = await self._resolver.resolve(self._host)
        except OSError:  # TimeoutError is one
            if not nodes:
                raise
        else:
            nodes.update((address, self._options.get("port", 6379)) for address in addresses)
        return nodes

    async def disconnect(self) -> None:
        """Close the connections, and remember the nodes, to ask one of them for the others."""
        if cluster := self._cluster:
            self._cluster = None
            known = {(node.host, int(node.port)) for node in cluster.get_nodes()}
            self._known = known or self._known
            await cluster.aclose()


class _Connection(Connection):
    """A connection to the first address of a host that accepts one.

    redis-py would have the event loop look the host up.
    """

    def __init__(self, *, resolver: Resolver, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._resolver = resolver
        self._address = self.host

    async def connect(self) -> None:
        """Connect, if it is not connected.

        Raises:
            RedisError: No address accepts a connection.
            OSError: The host has no address.
        """
        if self.is_connected:
            return
        failure: Exception | None = None
        for address in await self._resolver.resolve(self.host):
            self._address = address
            try:
                await super().connect()  # type: ignore[no-untyped-call]  # it has no annotation
            except RedisConnectionError as error:
                failure = failure or error
            else:
                return
        if failure:
            raise failure

    def _connection_arguments(self) -> Mapping[str, Any]:
        return {**super()._connection_arguments(), "host": self._address}


class _TlsConnection(_Connection, SSLConnection):
    """A connection with TLS: the certificate must be good for the host."""

    def _connection_arguments(self) -> Mapping[str, Any]:
        return {**super()._connection_arguments(), "server_hostname": self.host}


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


def _code(message: str) -> str:
    """Return the code with which a message of Redis begins, and no more of it."""
    if message.startswith("unknown command"):
        return "ERR unknown command"
    match = re.match("[A-Z]{2,}", message)
    return match[0] if match else "ERR"
