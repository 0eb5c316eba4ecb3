"""What systemd and the service exchange: notifications, passed sockets, the journal.

A notification (sd_notify(3)) that cannot be sent does no harm.
"""

import contextlib
import errno
import os
import socket
import sys
import time
from collections.abc import Callable

_BEATS_OF_STATUS = 10

# The most connections that can wait at a socket: its backlog, Backlog= in the socket unit.
_MAX_WAITING = 4096

# Seconds that all of these together have to send their requests.
_REFUSAL_PATIENCE = 1.0

_REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 60\r\n"
    b"Connection: close\r\n\r\n"
    b'{"detail":{"code":"OVERLOADED","message":"The service cannot start; try again later."}}'
)

_FIRST_PASSED = 3  # SD_LISTEN_FDS_START
_FAMILIES = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)


def notify(*assignments: str) -> None:
    """Send assignments such as ``READY=1`` to the service manager that started us, if one did."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address.startswith("@"):  # an abstract socket
        address = "\0" + address[1:]
    if address:
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender,
        ):
            sender.sendto("\n".join(assignments).encode(), address)


class Heartbeat:
    """Tells a service manager (systemd, or the parent of workers) how the service is.

    Args:
        status: Makes a line about what the service does, if anybody reads it.
    """

    def __init__(self, status: Callable[[], str] | None = None) -> None:
        self._status = status
        self._beats = 0

    def beat(self) -> None:
        """Say that the service is ready and alive; and, now and then, what it does."""
        # Each one says that it is ready, in case one gets lost: systemd ignores repetitions.
        assignments = ["READY=1", "WATCHDOG=1"]
        if self._status and self._beats % _BEATS_OF_STATUS == 0:
            assignments.append(f"STATUS={self._status()}")
        self._beats += 1
        notify(*assignments)

    def stop(self) -> None:
        """Say that the service is stopping."""
        notify("STOPPING=1", "STATUS=Finishing the checks in flight")


def passed_sockets() -> list[socket.socket]:
    """Return the listening sockets that systemd passes to us, if any (sd_listen_fds(3)).

    Raises:
        OSError: It passes something else.
    """
    count = os.environ.get("LISTEN_FDS", "")
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or not count.isdecimal():
        return []
    return [_listener(_FIRST_PASSED + number) for number in range(int(count))]


def _listener(descriptor: int) -> socket.socket:
    with contextlib.suppress(OSError):  # it is closed, or no socket
        passed = socket.socket(fileno=descriptor)
        is_stream = passed.family in _FAMILIES and passed.type == socket.SOCK_STREAM
        if is_stream and passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return passed
    raise OSError(
        errno.EINVAL,
        f"descriptor {descriptor}, which systemd passes, is no socket that listens for TCP or Unix "
        "streams. In the socket unit, use ListenStream=, and not Accept=yes.",
    )


def refuse_waiting() -> None:
    """Tell clients that wait at the passed sockets that the service cannot start.

    Otherwise systemd would start it for them again and again.
    """
    try:
        listeners = passed_sockets()
    except OSError:  # they are not what anybody could wait at
        return
    clients: list[socket.socket] = []
    for listener in listeners:
        listener.setblocking(False)
        with listener, contextlib.suppress(OSError):
            while len(clients) < _MAX_WAITING:
                clients.append(listener.accept()[0])
    for client in clients:
        client.settimeout(0)
        with contextlib.suppress(OSError):
            client.sendall(_REFUSAL)
            client.shutdown(socket.SHUT_WR)
    # If we closed before they have sent their requests, the answer would be lost.
    deadline = time.monotonic() + _REFUSAL_PATIENCE
    for client in clients:
        with client, contextlib.suppress(OSError):
            client.settimeout(max(0.01, deadline - time.monotonic()))
            client.recv(65_536)


def stderr_is_the_journal() -> bool:
    """Whether systemd's journal reads stderr (JOURNAL_STREAM, systemd.exec(5))."""
    if sys.stderr is None:  # it was closed
        return False
    stderr = os.fstat(sys.stderr.fileno())
    return os.environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}"
