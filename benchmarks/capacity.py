"""``python -m benchmarks.capacity``: the service at its limits.

First 10,000 ports in flight at once, then 2,400 connections that misbehave beside honest checks. It
prints its figures for people to judge. Wrong answers are a failure.
"""

import asyncio
import json
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import uvloop

from benchmarks import HOST, BenchmarkFailed
from benchmarks.processes import OURS_COMMAND, Service, open_ports, run, service
from tests.support.http import HEALTH, check_of
from tests.support.loopback import ports, silent_port

CHECKS = 100
PORTS_EACH = 100

BAD_CONNECTIONS = 2_400
HONEST_CHECKS = 300
HONEST_PER_SECOND = 20

# 429 for the caller's share, which is set to the whole; 503 for the whole.
_REFUSED = (429, 503)

_PATIENCE = 60.0  # seconds for each of the two loads
_HEALTH_EVERY = 0.01  # seconds

_HALF_A_HEAD = b"POST /check-ports HTTP/1.1\r\nHost: localhost\r\nX: y"
_HALF_A_BODY = b"POST /check-ports HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{"


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, and how many seconds it took."""

    status: int
    body: dict[str, object]
    seconds: float


async def ask(port: int, request: bytes) -> Answer:
    """Ask on a new connection."""
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        writer.write(request)
        return await _read_answer(reader, started)
    finally:
        writer.close()


async def _read_answer(reader: asyncio.StreamReader, started: float) -> Answer:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
    body = json.loads(await reader.readexactly(length))
    return Answer(int(head.split()[1]), body, time.perf_counter() - started)


async def probe_health(port: int, seconds: list[float]) -> None:
    """Ask for /health until cancelled, in turn on a new connection and on one that is kept."""
    reader, writer = await asyncio.open_connection(HOST, port)
    while True:
        started = time.perf_counter()
        writer.write(HEALTH)
        for answer in await _read_answer(reader, started), await ask(port, HEALTH):
            assert answer.status == 200
            seconds.append(answer.seconds)
        await asyncio.sleep(_HEALTH_EVERY)


async def fill(port: int, opened: int, silent: Sequence[int]) -> bool:
    """Have 10,000 ports in flight, ask for one more while they last, and print the figures.

    Args:
        port: The service's.
        opened: An open port.
        silent: ``PORTS_EACH`` ports that time out.

    Returns:
        Whether every answer was right.
    """
    request, further = check_of(*silent), check_of(opened)
    checks = [asyncio.create_task(ask(port, request)) for _ in range(CHECKS)]
    while (await ask(port, further)).status not in _REFUSED:
        if any(check.done() for check in checks):
            raise BenchmarkFailed("a check ended before one more was refused")
        await asyncio.sleep(0.02)
    refusals = [await ask(port, further) for _ in range(50)]
    expected = {str(one): {"accessible": False, "error": "Connection timed out"} for one in silent}
    answers = await asyncio.gather(*checks)
    right = sum(answer.status == 200 and answer.body["results"] == expected for answer in answers)
    print_figure("right answers", f"{right} of {CHECKS}")
    print_figure("slowest", f"{max(answer.seconds for answer in answers):.2f} s")
    print_figure("refusals meanwhile", percentiles([answer.seconds for answer in refusals]))
    afterwards = await ask(port, further)
    return (
        right == CHECKS
        and all(answer.status in _REFUSED for answer in refusals)
        and afterwards.body.get("success") is True
    )


async def crowd(port: int, opened: Sequence[int]) -> bool:
    """Have connections misbehave, ask for honest checks beside them, and print the figures.

    Args:
        port: The service's.
        opened: Open ports, which each honest check asks for.

    Returns:
        Whether every honest answer was right.
    """
    loop = asyncio.get_running_loop()
    kinds = [(_HALF_A_HEAD, b"")] * 10 + [(_HALF_A_HEAD, b"y" * 30), (_HALF_A_BODY, b"")]
    bad: list[asyncio.Task[float]] = []
    honest: list[asyncio.Task[Answer]] = []
    started = loop.time()

    async def be_honest() -> None:
        for number in range(HONEST_CHECKS):
            await asyncio.sleep(started + number / HONEST_PER_SECOND - loop.time())
            honest.append(asyncio.create_task(ask(port, check_of(*opened))))

    async def be_bad() -> None:
        for _ in range(BAD_CONNECTIONS // len(kinds)):
            bad.extend(asyncio.create_task(_misbehave(port, *kind)) for kind in kinds)
            await asyncio.sleep(0.002)

    await asyncio.gather(be_honest(), be_bad())
    answers = await asyncio.gather(*honest)
    lasted = await asyncio.gather(*bad)
    expected = {str(one): {"accessible": True, "error": None} for one in opened}
    right = sum(answer.status == 200 and answer.body["results"] == expected for answer in answers)
    print_figure("right answers", f"{right} of {HONEST_CHECKS}")
    print_figure("honest checks", percentiles([answer.seconds for answer in answers]))
    print_figure("bad ones closed", f"after {min(lasted):.1f} to {max(lasted):.1f} s")
    return right == HONEST_CHECKS


async def _misbehave(port: int, sent: bytes, trickle: bytes = b"") -> float:
    """Send a part of a request; return after how many seconds the connection was closed."""
    reader, writer = await asyncio.open_connection(HOST, port)
    started = time.perf_counter()
    closed = asyncio.create_task(_until_closed(reader))
    try:
        writer.write(sent)
        for byte in trickle:
            if (await asyncio.wait([closed], timeout=1))[0]:
                break
            writer.write(bytes([byte]))
        await closed
        return time.perf_counter() - started
    finally:
        writer.close()


async def _until_closed(reader: asyncio.StreamReader) -> None:
    try:
        while await reader.read(1000):
            pass
    except ConnectionError:
        pass


async def _put_under_load(running: Service, opened: Sequence[int], silent: Sequence[int]) -> bool:
    all_right = True
    for title, load in (
        (
            f"{CHECKS} checks of {len(silent)} silent ports",
            partial(fill, running.port, opened[0], silent),
        ),
        (
            f"{BAD_CONNECTIONS:,} connections that send part of a request; "
            f"{HONEST_PER_SECOND} checks a second of {len(opened)} open ports",
            partial(crowd, running.port, opened),
        ),
    ):
        print(title)
        health: list[float] = []
        probe = asyncio.create_task(probe_health(running.port, health))
        async with asyncio.timeout(_PATIENCE):
            all_right &= await load()
        if probe.done():
            raise BenchmarkFailed("/health did not answer") from probe.exception()
        probe.cancel()
        print_figure("/health", percentiles(health))
        print_figure("peak resident memory", f"{running.peak_resident() // 1024} MiB\n")
    return all_right


def print_figure(name: str, value: str) -> None:
    """Print a line of the report."""
    print(f"  {name:22}{value}", flush=True)


def percentiles(seconds: Sequence[float]) -> str:
    """The median, the 99th percentile and the highest of some times, in words."""
    ordered = sorted(seconds)
    p50, p99 = (ordered[int(share * len(ordered))] * 1000 for share in (0.5, 0.99))
    return f"p50 {p50:.1f} ms, p99 {p99:.1f} ms, max {ordered[-1] * 1000:.1f} ms"


def measure(stack: ExitStack, directory: Path) -> bool:
    """Measure and print; see ``processes.run``."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    opened = stack.enter_context(open_ports(5))
    silent = stack.enter_context(ports(PORTS_EACH, silent_port))
    running = stack.enter_context(service("this", OURS_COMMAND, directory))
    return uvloop.run(_put_under_load(running, opened, silent))


if __name__ == "__main__":
    sys.exit(run("capacity", measure))
