"""Accepting connections: many in one turn of the event loop.

uvloop's own servers accept one in each turn, so a new connection waits a whole turn for each one
before it (measured: 10 s behind a crowd of 3,400).
"""

import asyncio
import errno
import functools
import logging
import math
import socket
import struct
from collections.abc import Callable

from port_checker.addresses import Address, parse_host
from port_checker.server.connections import MIN_COST, ConnectionLimits, Place

# Connections accepted in one turn, so that nobody else waits while a crowd is accepted.
_BATCH = 128

# SO_LINGER: on, for 0 s. close() then resets a connection and leaves nothing of it. Otherwise the
# end that closes first stays in the kernel's tables for a minute, and in its firewall's for two.
_AT_ONCE = struct.pack("ii", 1, 0)

# Seconds until the next try when this machine has run out of descriptors or memory, and between two
# lines in the log about that.
_RETRY_DELAY = 0.1
_LOG_INTERVAL = 60.0

_EXHAUSTION = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

logger = logging.getLogger(__name__)


class Listener:
    """Accepts the connections to one listening socket.

    Args:
        listening: The socket, or what accepts as one does; whoever made it closes it.
        limits: Who may have how many connections. Those beyond an address's share are closed before
            anything is made for them.
        make_connection: Makes the protocol of a connection that was admitted.
        loop: The event loop.
        on_end: Called when there will be no more connections.
    """

    def __init__(
        self,
        listening: socket.socket,
        limits: ConnectionLimits,
        make_connection: Callable[[Place], asyncio.BaseProtocol],
        loop: asyncio.AbstractEventLoop,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._listening = listening
        self._limits = limits
        self._make_connection = make_connection
        self._loop = loop
        self._on_end = on_end
        self._tasks: set[asyncio.Task[None]] = set()
        self._retry: asyncio.TimerHandle | None = None
        self._logged_at = -math.inf
        listening.setblocking(False)
        loop.add_reader(listening, self._accept)

    def close(self) -> None:
        """Accept no more connections."""
        if self._retry:
            self._retry.cancel()
        self._loop.remove_reader(self._listening)

    async def wait_closed(self) -> None:
        """Wait for the connections being made: uvloop would hang if the loop ended meanwhile."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _accept(self) -> None:
        for _ in range(_BATCH):
            try:
                connection, address = self._listening.accept()
            except BlockingIOError:
                return
            except EOFError:
                self.close()
                self._on_end()
                return
            except OSError as error:
                if error.errno in _EXHAUSTION:
                    self._pause(error)
                    return
                continue  # that connection has failed already; see accept(2)
            # A peer on a Unix socket has no address.
            peer = parse_host(address[0]) if isinstance(address, tuple) else None
            self._take(connection, peer)

    def _take(self, connection: socket.socket, peer: Address | None) -> None:
        def close() -> bool:
            connection.close()
            return True

        place = self._limits.admit(peer, self._loop.time(), close)
        if place is None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
            connection.close()
        else:
            self._start(connection, place)

    def _start(self, connection: socket.socket, place: Place) -> None:
        """Make the connection's protocol, now or in a later turn."""
        if connection.fileno() < 0:  # it has made way
            return
        resume = functools.partial(self._start, connection, place)
        if place.work.may_start(MIN_COST, self._loop, resume):
            task = self._loop.create_task(self._connect(connection, place))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _connect(self, connection: socket.socket, place: Place) -> None:
        make = functools.partial(self._make_connection, place)
        if connection.fileno() < 0:  # it has made way
            return
        try:
            await self._loop.connect_accepted_socket(make, connection)
        except OSError:  # it is lost already
            connection.close()
            place.leave()

    def _pause(self, error: OSError) -> None:
        if self._loop.time() - self._logged_at >= _LOG_INTERVAL:
            self._logged_at = self._loop.time()
            logger.error("Cannot accept connections: %s", error.strerror)
        self._loop.remove_reader(self._listening)
        self._retry = self._loop.call_later(
            _RETRY_DELAY, self._loop.add_reader, self._listening, self._accept
        )
