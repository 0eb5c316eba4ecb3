"""``python -m benchmarks``: measure costs and growth in one run, and print the figures."""

import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks import BenchmarkFailed, alone, wrk
from benchmarks.distance import DELAY, FAR, NEAR, distance
from benchmarks.processes import (
    OURS_COMMAND,
    PUBLISHED,
    UVICORN_COMMAND,
    go_command,
    open_ports,
    published_command,
    run,
    service,
)
from benchmarks.wrk import Cost
from port_checker import __version__

ROUNDS = 7
PORTS = 100

OURS = "this service"
GO = "Go, a goroutine a port"


def main() -> int:
    """Measure and print. The figures are for people to judge; none of them is a failure.

    Returns:
        The exit status: 0; 1 if something could not be measured; 2 if wrk is not installed.
    """
    if not shutil.which("wrk"):
        sys.stderr.write("benchmarks: wrk is not installed: apt-get install wrk\n")
        return 2
    return run("benchmarks", _measure)


def _measure(stack: ExitStack, directory: Path) -> bool:
    started = time.monotonic()
    commands = {OURS: OURS_COMMAND, f"published {PUBLISHED}": published_command()}
    if go := go_command():
        commands[GO] = go
    print(
        f"golem-port-checker {__version__}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.release()}, {os.cpu_count()} cores.\n"
        f"Figures are medians of {ROUNDS} rounds in turn, after one to warm up (lowest to highest "
        f"in brackets); wrk,\n1 thread, {wrk.CONNECTIONS} connections, {wrk.SECONDS} s a round. "
        "The last column is\n"
        "how much this service does with the CPU that another needs for one request."
    )
    if not go:
        print(
            "Without the server in Go: there is no Go toolchain here (apt-get install golang-go)."
        )
    ports = stack.enter_context(open_ports(PORTS))
    with ExitStack() as services:
        running = {
            name: services.enter_context(service("service", command, directory))
            for name, command in {**commands, "bare uvicorn": UVICORN_COMMAND}.items()
        }
        for load in wrk.loads(ports):
            measures: dict[str, Callable[[], Cost]] = {
                name: partial(wrk.measure, each, load, directory)
                for name, each in running.items()
                if load.path == "/health" or name != "bare uvicorn"
            }
            if load.bodies:
                batch = PORTS if len(load.bodies) == 1 else 1
                measures["bare loop in Python"] = partial(alone.bare_loop, ports, batch)
            _table(f"{load.name}, loopback", _in_turn(measures))
    _print_growth(*alone.usage_before_and_after(ports))
    try:
        with distance() as near:
            _measure_far(near, commands, directory)
    except BenchmarkFailed as error:
        print(f"\nNot measured at a distance: {error}")
    print(f"\nThe whole run took {time.monotonic() - started:.0f} s.")
    return True


def _measure_far(
    near: Sequence[str], commands: Mapping[str, Sequence[str]], directory: Path
) -> None:
    """Measure the same at a distance; this process is at the far end, with wrk and the ports."""
    with ExitStack() as stack:
        ports = stack.enter_context(open_ports(PORTS, FAR))
        running = {
            name: stack.enter_context(service("service", (*near, *command), directory, NEAR))
            for name, command in commands.items()
        }
        for load in wrk.loads(ports, FAR):
            measures = {
                name: partial(wrk.measure, each, load, directory) for name, each in running.items()
            }
            _table(f"{load.name}, round trip {2000 * DELAY:g} ms", _in_turn(measures))


def _in_turn(measures: Mapping[str, Callable[[], Cost]]) -> dict[str, list[Cost]]:
    """Measure one after the other, round by round, so that lasting noise affects all."""
    for measure in measures.values():
        measure()  # to warm up
    costs: dict[str, list[Cost]] = {name: [] for name in measures}
    for _ in range(ROUNDS):
        for name, measure in measures.items():
            costs[name].append(measure())
    return costs


def _table(title: str, costs: Mapping[str, Sequence[Cost]]) -> None:
    print(f"\n{title}")
    print(f"  {'':24}{'CPU us a request':>26}{'requests a second':>28}{'ours to it':>12}")
    ours = median(cost.cpu for cost in costs[OURS])
    for name, each in costs.items():
        cpu = _summary([cost.cpu * 1e6 for cost in each])
        per_second = _summary([cost.per_second for cost in each])
        ratio = median(cost.cpu for cost in each) / ours
        print(f"  {name:24}{cpu:>26}{per_second:>28}{ratio:>12.2f}")


def _summary(figures: Sequence[float]) -> str:
    return f"{median(figures):,.0f} ({min(figures):,.0f} to {max(figures):,.0f})"


def _print_growth(before: alone.Usage, after: alone.Usage) -> None:
    print(
        f"\nGrowth over {alone.CHECKS:,} checks of {alone.OPEN_EACH} open and "
        f"{alone.REFUSED_EACH} refused ports, {alone.AT_ONCE} at once, after {alone.WARM_UP:,} "
        "to warm up"
    )
    print(f"  {'':28}{'before':>10}{'after':>10}{'growth':>10}")
    for name, was, is_ in (
        ("descriptors", before.descriptors, after.descriptors),
        ("asyncio tasks", before.tasks, after.tasks),
        ("resident memory, KiB", before.resident // 1024, after.resident // 1024),
    ):
        print(f"  {name:28}{was:>10,}{is_:>10,}{is_ - was:>+10,}")


if __name__ == "__main__":
    sys.exit(main())
