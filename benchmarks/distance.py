"""A distance: two network namespaces, and between them a line that takes 2.5 ms each way.

Loopback hides what a check costs over a distance: there, a connection is made when ``connect()``
returns. Not every kernel has netem, so the line is a process that holds packets for that time.
"""

import ctypes
import fcntl
import os
import select
import signal
import struct
import subprocess
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from benchmarks import BenchmarkFailed

DELAY = 0.0025  # seconds each way

# Addresses that nobody has (RFC 5737).
NEAR, FAR = "192.0.2.1", "192.0.2.2"

_CLONE_NEWNET = 0x40000000  # linux/sched.h
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h


@contextmanager
def distance() -> Iterator[Sequence[str]]:
    """Take this process to the far end of a line; what it starts is there, too.

    Yields:
        The beginning of a command that is to run at the near end.

    Raises:
        BenchmarkFailed: It may not, or cannot: that takes root, iproute2 and /dev/net/tun.
    """
    before = os.open("/proc/self/ns/net", os.O_RDONLY)
    libc = ctypes.CDLL(None, use_errno=True)  # Python has os.setns from 3.12 on
    line = None
    try:
        near, near_end = _namespace(libc, NEAR, FAR)
        far, far_end = _namespace(libc, FAR, NEAR)
        line = os.fork()
        if not line:
            _forward(near_end, far_end)
        for descriptor in near_end, far_end, far:
            os.close(descriptor)
        yield "nsenter", f"--net=/proc/{os.getpid()}/fd/{near}"
        os.close(near)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BenchmarkFailed(f"there is no distance: {error}") from error
    finally:
        if line:
            os.kill(line, signal.SIGKILL)
            os.waitpid(line, 0)
        libc.setns(before, _CLONE_NEWNET)
        os.close(before)


def _namespace(libc: ctypes.CDLL, own: str, other: str) -> tuple[int, int]:
    """Enter a new namespace; return its descriptor, and that of its end of the line."""
    if libc.unshare(_CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    end = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH22x", b"line", _IFF_TUN | _IFF_NO_PI))
    for command in (
        "ip link set lo up",
        f"ip address add {own} peer {other} dev line",
        "ip link set line up txqueuelen 10000",
    ):
        subprocess.run(command.split(), check=True, capture_output=True)
    return os.open("/proc/self/ns/net", os.O_RDONLY), end


def _forward(*ends: int) -> None:
    """Pass packets on from each end to the other one, later; never returns."""
    packets: deque[tuple[float, int, bytes]] = deque()
    poll = select.poll()
    for end in ends:
        os.set_blocking(end, False)
        poll.register(end, select.POLLIN)
    while True:
        wait = max(0.0, packets[0][0] - time.monotonic()) * 1000 if packets else None
        # Rounded down, since poll() takes whole milliseconds: rounded up, it would be late.
        for end, _ in poll.poll(None if wait is None else int(wait)):
            packets.append((time.monotonic() + DELAY, end, os.read(end, 65536)))
        while packets and packets[0][0] <= time.monotonic():
            _, source, packet = packets.popleft()
            os.write(ends[1] if source == ends[0] else ends[0], packet)
