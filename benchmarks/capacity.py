"""``python -m benchmarks.capacity``: the service with 10,000 ports in flight.

It prints its figures for people to judge. Wrong answers are a failure.
"""

import asyncio
import json
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import uvloop

from benchmarks import HOST, BenchmarkFailed
from benchmarks.processes import OURS_COMMAND, Service, open_ports, run, service
from tests.support.http import HEALTH, check_of
from tests.support.loopback import ports, silent_port

CHECKS = 100
PORTS_EACH = 100

# 429 for the caller's share, which is set to the whole; 503 for the whole.
_REFUSED = (429, 503)

_PATIENCE = 60.0  # seconds
_HEALTH_EVERY = 0.01  # seconds


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
        return await read_answer(reader, started)
    finally:
        writer.close()


async def read_answer(reader: asyncio.StreamReader, started: float) -> Answer:
    """Read the answer to a request that was sent at ``started``, by ``time.perf_counter``."""
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
        for answer in await read_answer(reader, started), await ask(port, HEALTH):
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


async def _fill(running: Service, opened: int, silent: Sequence[int]) -> bool:
    print(f"{CHECKS} checks of {len(silent)} silent ports")
    health: list[float] = []
    probe = asyncio.create_task(probe_health(running.port, health))
    async with asyncio.timeout(_PATIENCE):
        is_right = await fill(running.port, opened, silent)
    if probe.done():
        raise BenchmarkFailed("/health did not answer") from probe.exception()
    probe.cancel()
    print_figure("/health", percentiles(health))
    print_figure("peak resident memory", f"{running.peak_resident() // 1024} MiB")
    return is_right


def print_figure(name: str, value: str) -> None:
    """Print a line of the report."""
    print(f"  {name:22}{value}", flush=True)


def percentiles(seconds: Sequence[float]) -> str:
    """Return the median, the 99th percentile and the highest of some times, in words."""
    ordered = sorted(seconds)
    p50, p99 = (ordered[int(share * len(ordered))] * 1000 for share in (0.5, 0.99))
    return f"p50 {p50:.1f} ms, p99 {p99:.1f} ms, max {ordered[-1] * 1000:.1f} ms"


def measure(stack: ExitStack, directory: Path) -> bool:
    """Measure and print; see ``processes.run``."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    (opened,) = stack.enter_context(open_ports(1))
    silent = stack.enter_context(ports(PORTS_EACH, silent_port))
    running = stack.enter_context(service("this", OURS_COMMAND, directory))
    return uvloop.run(_fill(running, opened, silent))


if __name__ == "__main__":
    sys.exit(run("capacity", measure))
