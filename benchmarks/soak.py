"""``python -m benchmarks.soak [MINUTES]``: keep the service busy, and see what grows.

The load is a share of what the service can do. Every answer is checked. Each minute prints a line,
and the end prints the growth since the first minute. A wrong verdict, or a status other than 200,
is a failure; the figures are for people to judge.
"""

import asyncio
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

import uvloop

from benchmarks import HOST, BenchmarkFailed
from benchmarks.capacity import Answer, read_answer
from benchmarks.processes import OURS_COMMAND, Service, open_ports, run, service
from tests.support.http import HEALTH, check_of
from tests.support.loopback import refused_port

MINUTES = 2.0
MAX_MINUTES = 600.0
SHARE = 0.7  # of its capacity, which is measured first

PORTS = 100  # open ports; each request checks the next PORTS_EACH of them
PORTS_EACH = 20
REFUSED_EVERY = 20  # requests, one of which has a refused port, which takes two seconds

_CAPACITY_SECONDS = 5.0
_CAPACITY_CONNECTIONS = 8
_MAX_UNDER_WAY = 256  # requests; their ports are half of what the service accepts in flight
_HEALTH_EVERY = 0.02  # seconds
_PATIENCE = 30.0  # seconds for an answer

_CATCH_UP = 0.1  # seconds of delay that later requests may make up for

# Seconds for which an idle connection is kept; the service keeps it longer.
_IDLE = 2.0


@dataclass(frozen=True, slots=True)
class Check:
    """A request, and the results that it must have."""

    request: bytes
    results: dict[str, object]


@dataclass(slots=True)
class Minute:
    """The outcomes of the requests that finished in one minute."""

    requests: int = 0
    wrong: int = 0
    statuses: Counter[int] = field(default_factory=Counter)  # other than 200
    failed: int = 0  # connections that were lost without an answer
    health: list[float] = field(default_factory=list)  # seconds


class Load:
    """Sends requests to a service, and checks the answers.

    Args:
        port: Where the service listens on loopback.
        checks: The requests, in turn.
    """

    def __init__(self, port: int, checks: Sequence[Check]) -> None:
        self.minute = Minute()
        self._port = port
        self._checks = cycle(checks)
        self._idle: list[tuple[float, asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._under_way: set[asyncio.Task[None]] = set()

    async def capacity(self, seconds: float) -> float:
        """Return how many requests a second are answered on several connections at once."""
        started = time.perf_counter()

        async def ask_over_and_over() -> None:
            while time.perf_counter() - started < seconds:
                await self.check()

        async with asyncio.TaskGroup() as group:
            for _ in range(_CAPACITY_CONNECTIONS):
                group.create_task(ask_over_and_over())
        return self.minute.requests / (time.perf_counter() - started)

    async def run(self, rate: float, seconds: float) -> None:
        """Send requests at a fixed rate, then wait for all answers.

        On a busy machine the rate drops; requests that could not be sent in time are left out.
        """
        loop = asyncio.get_running_loop()
        started = due = loop.time()
        while due < started + seconds:
            await asyncio.sleep(due - loop.time())
            if len(self._under_way) >= _MAX_UNDER_WAY:
                await asyncio.wait(self._under_way, return_when=asyncio.FIRST_COMPLETED)
            task = asyncio.create_task(self.check())
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)
            due = max(due + 1 / rate, loop.time() - _CATCH_UP)
        await asyncio.gather(*self._under_way)

    async def check(self) -> None:
        """Send the next check, and count its outcome."""
        check = next(self._checks)
        try:
            answer = await self._ask(check.request)
        except (OSError, EOFError):
            self.minute.failed += 1
            return
        self.minute.requests += 1
        if answer.status != 200:
            self.minute.statuses[answer.status] += 1
        elif answer.body["results"] != check.results:
            self.minute.wrong += 1

    async def watch_health(self) -> None:
        """Ask for /health until cancelled, and record how long each answer takes."""
        while True:
            answer = await self._ask(HEALTH)
            self.minute.health.append(answer.seconds)
            if answer.status != 200:
                self.minute.statuses[answer.status] += 1
            await asyncio.sleep(_HEALTH_EVERY)

    def close(self) -> None:
        """Close the idle connections."""
        for _, _, writer in self._idle:
            writer.close()

    async def _ask(self, request: bytes) -> Answer:
        started = time.perf_counter()
        async with asyncio.timeout(_PATIENCE):
            reader, writer = await self._connection()
            try:
                writer.write(request)
                answer = await read_answer(reader, started)
            except BaseException:
                writer.close()
                raise
        self._idle.append((time.perf_counter(), reader, writer))
        return answer

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Return the connection used last, or a new one; close those that have been idle long."""
        oldest = time.perf_counter() - _IDLE
        while self._idle and self._idle[0][0] < oldest:
            self._idle.pop(0)[2].close()
        if self._idle:
            _, reader, writer = self._idle.pop()
            return reader, writer
        return await asyncio.open_connection(HOST, self._port)


def checks_of(ports: Sequence[int], refused: int) -> list[Check]:
    """Return requests for open ports in turn; one in ``REFUSED_EVERY`` has a refused port.

    Args:
        ports: ``PORTS`` of them, open.
        refused: A port that refuses connections.
    """
    checks = []
    for number in range(REFUSED_EVERY):
        start = number * PORTS_EACH % len(ports)
        asked = list(ports[start : start + PORTS_EACH])
        if number == 0:
            asked[0] = refused
        results: dict[str, object] = {
            str(port): {
                "accessible": port != refused,
                "error": "Connection refused" if port == refused else None,
            }
            for port in asked
        }
        checks.append(Check(check_of(*asked), results))
    return checks


def main() -> int:
    """Measure and print.

    Returns:
        The exit status: 0; 1 for a wrong verdict, an answer other than 200 or none, or if something
        could not be measured; 2 for a bad argument.
    """
    try:
        minutes = float(sys.argv[1]) if len(sys.argv) > 1 else MINUTES
    except ValueError:
        minutes = 0
    if not 0 < minutes <= MAX_MINUTES:
        sys.stderr.write(f"soak: MINUTES must be a number above 0, up to {MAX_MINUTES:g}\n")
        return 2

    def measure(stack: ExitStack, directory: Path) -> bool:
        ports = stack.enter_context(open_ports(PORTS))
        refused = stack.enter_context(refused_port())
        running = stack.enter_context(service("this", OURS_COMMAND, directory))
        is_clean = uvloop.run(_soak(running, checks_of(ports, refused), minutes))
        return is_clean & _has_clean_log((directory / "this.log").read_text(errors="replace"))

    return run("soak", measure)


async def _soak(running: Service, checks: Sequence[Check], minutes: float) -> bool:
    load = Load(running.port, checks[1:])
    capacity = await load.capacity(_CAPACITY_SECONDS)
    is_clean = _is_clean(load.minute)
    load.close()
    load = Load(running.port, checks)
    rate = SHARE * capacity
    print(
        f"Capacity: {capacity:,.0f} requests a second for {PORTS_EACH} open ports each. Load: "
        f"{rate:,.0f} a second for {minutes:g} min, one in {REFUSED_EVERY} with a refused port.\n"
    )
    print(
        f"{'minute':>7}{'requests':>10}{'wrong':>7}{'not 200':>9}{'unanswered':>12}"
        f"{'resident, KiB':>15}{'descriptors':>13}{'/health p99, ms':>17}"
    )
    before = _usage(running)
    first: tuple[int, int] | None = None
    watching = asyncio.create_task(load.watch_health())
    run = asyncio.create_task(load.run(rate, minutes * 60))
    started = time.perf_counter()
    while not run.done():
        await asyncio.wait([run, watching], timeout=60, return_when=asyncio.FIRST_COMPLETED)
        if watching.done():
            run.cancel()
            raise BenchmarkFailed("/health did not answer") from watching.exception()
        minute, load.minute = load.minute, Minute()
        held = _usage(running)
        first = first or held
        is_clean &= _is_clean(minute)
        _print_minute((time.perf_counter() - started) / 60, minute, held)
    watching.cancel()
    run.result()
    load.close()
    after = _usage(running)
    print(f"\n  {'':24}{'before':>10}{'1st minute':>12}{'end':>10}{'growth':>10}")
    names = "resident memory, KiB", "descriptors"
    for name, was, at_first, is_ in zip(names, before, first or before, after, strict=True):
        print(f"  {name:24}{was:>10,}{at_first:>12,}{is_:>10,}{is_ - at_first:>+10,}")
    return is_clean


def _is_clean(minute: Minute) -> bool:
    return not (minute.wrong or minute.statuses or minute.failed)


def _print_minute(minute: float, count: Minute, held: tuple[int, int]) -> None:
    health = sorted(count.health)
    p99 = f"{health[int(0.99 * len(health))] * 1000:.1f}" if health else "none"
    statuses = ", ".join(f"{number} x {status}" for status, number in count.statuses.items())
    print(
        f"{minute:>7.1f}{count.requests:>10,}{count.wrong:>7,}{statuses or '0':>9}"
        f"{count.failed:>12,}{held[0]:>15,}{held[1]:>13,}{p99:>17}",
        flush=True,
    )


def _usage(running: Service) -> tuple[int, int]:
    """Return what the service uses: KiB of resident memory, and descriptors."""
    try:
        return running.resident(), running.descriptors()
    except OSError as error:
        raise BenchmarkFailed("the service has exited") from error


def _has_clean_log(log: str) -> bool:
    bad = [line for line in log.splitlines() if " ERROR " in line or "Traceback" in line]
    for line in bad[:10]:
        print(line)
    return not bad


if __name__ == "__main__":
    sys.exit(main())
