"""Readiness, status and the watchdog (sd_notify(3)), and whether the journal reads our log.

Nothing of it can fail the service.
"""

import contextlib
import os
import socket
import sys


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


def stderr_is_the_journal() -> bool:
    """Whether systemd's journal reads stderr (JOURNAL_STREAM, systemd.exec(5))."""
    if sys.stderr is None:  # it was closed
        return False
    stderr = os.fstat(sys.stderr.fileno())
    return os.environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}"
