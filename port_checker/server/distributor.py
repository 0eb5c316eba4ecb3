"""How connections get to worker processes: their parent accepts each, for whoever has most room.

Workers that shared the listening sockets would all be woken for each connection, and whoever came
first would have it, however full it was.
"""

import errno
import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

from port_checker.metrics import Metrics, Row, connections_received, share_taken

# Seconds before the next try when the system lacks resources, or no worker takes a connection.
_PAUSE_WITHOUT_RESOURCES = 1.0
_PAUSE_WITHOUT_WORKERS = 0.001

# Connections on their way to a worker, which are lost if it dies: others wait in the kernel. A busy
# one receives all of them every few milliseconds.
_MOST_UNRECEIVED = 32

logger = logging.getLogger(__name__)


class Channel:
    """A parent's way of sending connections to one worker.

    Args:
        row: What the worker counts.

    Attributes:
        end: The worker's end.
        sent: Connections that were sent.
    """

    def __init__(self, row: Row) -> None:
        self._row = row
        self._socket, self.end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        self.sent = 0
        self._sent_at = 0.0

    def rank(self) -> tuple[float, float]:
        """Return a key for sorting: the lowest gets the next connection."""
        return share_taken(self._row, self._unreceived()), self._sent_at

    def send(self, connection: socket.socket) -> bool:
        """Send a connection; return whether it was sent."""
        if self._unreceived() >= _MOST_UNRECEIVED:  # it is busy, or stuck
            return False
        try:
            socket.send_fds(self._socket, [b"\0"], [connection.fileno()])
        except OSError:  # it has died, say
            return False
        self.sent += 1
        self._sent_at = time.monotonic()
        return True

    def _unreceived(self) -> int:
        return self.sent - connections_received(self._row)

    def close(self) -> None:
        """Send no more: the worker receives what was sent before, and then leaves."""
        self._socket.close()


class ReceivedConnections(socket.socket):
    """The worker's end of a channel, which accepts connections as a listening socket does.

    Args:
        descriptor: Of the end.
        metrics: What this process counts.
    """

    def __init__(self, descriptor: int, metrics: Metrics) -> None:
        super().__init__(fileno=descriptor)
        self._metrics = metrics

    def accept(self) -> tuple[socket.socket, Any]:
        """Return the next connection, and the address of its other end.

        Raises:
            BlockingIOError: There is none.
            EOFError: There will be none.
            OSError: The connection is lost.
        """
        os.close(os.dup(self.fileno()))  # without a descriptor, the next one stays in the channel
        data, descriptors, _, _ = socket.recv_fds(self, 1, 1)
        if not data:
            raise EOFError
        self._metrics.receive_connection()
        if not descriptors:  # the kernel has closed it
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        connection = socket.socket(fileno=descriptors[0])
        try:
            return connection, connection.getpeername()
        except OSError:
            connection.close()
            raise


class Distributor:
    """Accepts connections in a thread, and sends each to the worker that has most room.

    Before the first worker is ready, connections wait in the kernel.

    Args:
        listeners: The sockets to accept from.
    """

    def __init__(self, listeners: Sequence[socket.socket]) -> None:
        self._listeners = listeners
        for listener in listeners:
            listener.setblocking(False)
        self._channels: list[Channel] = []
        self._lock = threading.Lock()  # nothing is sent on a channel that is being closed
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._stop = os.eventfd(0)
        self._is_stopping = False

    def open(self, channel: Channel) -> None:
        """Send connections to a worker from now on."""
        with self._lock:
            self._channels.append(channel)
        if not self._thread.ident:
            self._thread.start()

    def close(self, channel: Channel) -> None:
        """Send no more to a worker."""
        with self._lock:
            if channel in self._channels:
                self._channels.remove(channel)
            channel.close()

    def stop(self) -> None:
        """Accept no more connections."""
        if self._is_stopping:
            return
        self._is_stopping = True
        os.eventfd_write(self._stop, 1)
        if self._thread.ident:
            self._thread.join()
        os.close(self._stop)

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            sources: list[socket.socket | int] = [*self._listeners, self._stop]
            for source in sources:
                selector.register(source, selectors.EVENT_READ)
            while not self._is_stopping:
                for key, _ in selector.select():
                    if isinstance(key.fileobj, socket.socket):
                        self._accept(key.fileobj)

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except (BlockingIOError, ConnectionError):
            return  # another process has it, or its client has left
        except OSError as error:
            logger.error("Cannot accept connections: %s", error.strerror)
            time.sleep(_PAUSE_WITHOUT_RESOURCES)
            return
        with connection:
            while not (self._send(connection) or self._is_stopping):
                time.sleep(_PAUSE_WITHOUT_WORKERS)

    def _send(self, connection: socket.socket) -> bool:
        with self._lock:
            return any(each.send(connection) for each in sorted(self._channels, key=Channel.rank))
