"""The checker alone, without HTTP: its throughput, and whether it leaks."""

import asyncio
import os
import resource
import select
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

import uvloop

from benchmarks import HOST
from benchmarks.wrk import Cost
from port_checker.checker import Checker
from port_checker.connect import Verdict
from tests.support.loopback import ports, refused_port

SECONDS = 1.0

# The checks that look for leaks.
WARM_UP = 1_000
CHECKS = 10_000
OPEN_EACH = 3
REFUSED_EACH = 2
AT_ONCE = 10

_TARGET = IPv4Address(HOST)
_TIMEOUT = 5.0


@dataclass(frozen=True, slots=True)
class Usage:
    """The resources of a process.

    Attributes:
        descriptors: Open files and sockets.
        tasks: asyncio's, of the running loop.
        resident: Memory, in bytes.
    """

    descriptors: int
    tasks: int
    resident: int

    @classmethod
    def now(cls) -> "Usage":
        """Return what this process uses now, uncollected garbage included."""
        return cls(
            descriptors=len(os.listdir("/proc/self/fd")),
            tasks=len(asyncio.all_tasks()),
            resident=int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize(),
        )


def bare_loop(ports: Sequence[int], batch: int) -> Cost:
    """Return what a bare epoll loop in Python takes to connect to so many ports at once.

    For each port it does only what any checker must: socket, connect, wait, read the result, close.

    Args:
        ports: Open ports.
        batch: How many of them are connected to at once; the others have their turn.
    """
    started, used = time.perf_counter(), time.process_time()
    batches = 0
    with select.epoll() as epoll:
        while (elapsed := time.perf_counter() - started) < SECONDS:
            first = batches * batch % len(ports)
            waiting: dict[int, socket.socket] = {}
            for port in ports[first : first + batch]:
                sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
                sock.connect_ex((HOST, port))
                epoll.register(sock.fileno(), select.EPOLLOUT)
                waiting[sock.fileno()] = sock
            while waiting:
                events = epoll.poll(_TIMEOUT)
                assert events
                for descriptor, _ in events:
                    sock = waiting.pop(descriptor)
                    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
                    sock.close()
            batches += 1
    return Cost(batches / elapsed, (time.process_time() - used) / batches)


def usage_before_and_after(open_ports: Sequence[int]) -> tuple[Usage, Usage]:
    """Return what this process uses before and after ``CHECKS`` checks.

    ``WARM_UP`` checks come first, so that caches and pools are filled.

    Args:
        open_ports: At least ``OPEN_EACH`` of them.
    """

    async def before_and_after(ports: Sequence[int]) -> tuple[Usage, Usage]:
        checker = _checker(retries=1)
        await _check(checker, ports, WARM_UP)
        before = Usage.now()
        await _check(checker, ports, CHECKS)
        return before, Usage.now()

    with ports(REFUSED_EACH, refused_port) as refused:
        return uvloop.run(before_and_after([*open_ports[:OPEN_EACH], *refused]))


async def _check_once(checker: Checker, ports: Sequence[int]) -> dict[int, Verdict]:
    with checker.reserve(len(ports)) as room:
        return await checker.check(_TARGET, ports, room)


async def _check(checker: Checker, ports: Sequence[int], checks: int) -> None:
    for _ in range(0, checks, AT_ONCE):
        async with asyncio.TaskGroup() as group:
            under_check = [group.create_task(_check_once(checker, ports)) for _ in range(AT_ONCE)]
        for task in under_check:
            accessible = [verdict.accessible for verdict in task.result().values()]
            assert accessible == [True] * OPEN_EACH + [False] * REFUSED_EACH


def _checker(*, retries: int) -> Checker:
    return Checker(retries=retries, retry_delay=1.0, timeout=_TIMEOUT, max_in_flight=10_000)
