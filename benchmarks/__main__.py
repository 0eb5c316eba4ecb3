"""``python -m benchmarks [ROUNDS]``: what a request costs here and in other programs."""

import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks import HOST, BenchmarkFailed, wrk
from benchmarks.distance import DELAY, FAR, NEAR, distance
from benchmarks.processes import (
    OURS_COMMAND,
    PUBLISHED,
    PYTHON_LOOP,
    UVICORN_COMMAND,
    Cost,
    Service,
    c_loop_command,
    cost_of_loop,
    go_command,
    open_ports,
    published_command,
    run,
    service,
)
from port_checker import __version__

ROUNDS = 7
PORTS = 100

OURS = "this service"
UVICORN = "bare uvicorn"

# The commands that start programs, by the programs' names in the tables.
Commands = Mapping[str, Sequence[str]]


def main() -> int:
    """Measure and print. The figures are for people to judge; none of them is a failure.

    Returns:
        The exit status: 0; 1 if something could not be measured; 2 for a bad argument, or if wrk is
        not installed.
    """
    rounds = sys.argv[1] if len(sys.argv) > 1 else str(ROUNDS)
    if not (rounds.isdecimal() and 0 < int(rounds) <= 100):
        sys.stderr.write("benchmarks: ROUNDS must be a number from 1 to 100\n")
        return 2
    if not shutil.which("wrk"):
        sys.stderr.write("benchmarks: wrk is not installed: apt-get install wrk\n")
        return 2
    return run("benchmarks", lambda _, directory: _Comparison(int(rounds), directory).run())


class _Comparison:
    """Measures programs in turn, and notes what could not be measured.

    Args:
        rounds: How often each is measured.
        directory: Where they may write.
    """

    def __init__(self, rounds: int, directory: Path) -> None:
        self._rounds = rounds
        self._directory = directory
        self._ratios: dict[str, dict[tuple[str, str], float]] = {}  # to ours, by program
        self._is_complete = True

    def run(self) -> bool:
        """Measure everything; return whether nothing failed."""
        started = time.monotonic()
        print(
            f"golem-port-checker {__version__}, Python {platform.python_version()}, "
            f"{platform.system()} {platform.release()}, {os.cpu_count()} cores.\n"
            f"Medians of {self._rounds} rounds in turn, after one to warm up (lowest to highest in "
            f"brackets);\nwrk, 1 thread, {wrk.CONNECTIONS} connections (at a distance "
            f"{wrk.CONNECTIONS_AT_A_DISTANCE} for small requests), {wrk.SECONDS} s a round."
        )
        services = self._commands(
            {
                OURS: lambda: OURS_COMMAND,
                f"published {PUBLISHED}": published_command,
                "Go, a goroutine a port": go_command,
            }
        )
        loops = self._commands(
            {"bare loop in Python": lambda: PYTHON_LOOP, "bare loop in C": c_loop_command}
        )
        self._measure("loopback", HOST, {**services, UVICORN: UVICORN_COMMAND}, HOST, loops)
        with self._failures("anything at a distance"), distance() as near:
            there = {name: (*near, *command) for name, command in services.items()}
            self._measure(f"round trip {2000 * DELAY:g} ms", NEAR, there, FAR, {})
        self._print_ratios()
        print(f"\nThe whole run took {time.monotonic() - started:.0f} s.")
        return self._is_complete

    def _commands(self, makers: Mapping[str, Callable[[], Sequence[str]]]) -> Commands:
        commands: dict[str, Sequence[str]] = {}
        for name, make in makers.items():
            with self._failures(name):
                commands[name] = make()
        return commands

    def _measure(
        self, place: str, host: str, commands: Commands, target: str, loops: Commands
    ) -> None:
        """Start services on a host, and measure each under each load, on ports of a target."""
        with ExitStack() as stack:
            ports = stack.enter_context(open_ports(PORTS, target))
            running: dict[str, Service] = {}
            for name, command in commands.items():
                with self._failures(name):
                    log = f"{len(running)} {place}"
                    running[name] = stack.enter_context(
                        service(log, command, self._directory, host)
                    )
            for load in wrk.loads(ports, target):
                measures: dict[str, Callable[[], Cost]] = {
                    name: partial(wrk.measure, each, load, self._directory)
                    for name, each in running.items()
                    if load.path == "/health" or name != UVICORN
                }
                if load.bodies:
                    batch = PORTS if len(load.bodies) == 1 else 1
                    for name, command in loops.items():
                        measures[name] = partial(cost_of_loop, command, target, batch, ports)
                self._print(load.name, place, self._in_turn(measures))

    def _in_turn(self, measures: dict[str, Callable[[], Cost]]) -> Mapping[str, list[Cost]]:
        """Measure one after the other, round by round, so that lasting noise affects all."""
        costs: dict[str, list[Cost]] = {name: [] for name in measures}
        for _ in range(1 + self._rounds):
            for name, measure in list(measures.items()):
                try:
                    costs[name].append(measure())
                except BenchmarkFailed as error:
                    self._note_failure(name, error)
                    del measures[name], costs[name]
        return {name: each[1:] for name, each in costs.items()}

    def _print(self, load: str, place: str, costs: Mapping[str, Sequence[Cost]]) -> None:
        title = f"{load}, {place}"
        print(f"\n{title:36}{'CPU us a request':>16}{'requests a second':>28}")
        for name, each in costs.items():
            cpu = _summary([cost.cpu * 1e6 for cost in each])
            per_second = _summary([cost.per_second for cost in each])
            print(f"  {name:24}{cpu:>26}{per_second:>28}", flush=True)
            if OURS in costs:
                ratios = self._ratios.setdefault(name, {})
                ratios[load, place] = median(cost.cpu for cost in each) / median(
                    cost.cpu for cost in costs[OURS]
                )

    def _print_ratios(self) -> None:
        columns = [*self._ratios.get(OURS, ())]
        print("\nHow many times the CPU of this service each needs for one request")
        for part in 1, 0:
            print(" " * 26 + "".join(f"{column[part]:>18}" for column in columns))
        for name, ratios in self._ratios.items():
            cells = (f"{ratios[each]:.2f}" if each in ratios else "" for each in columns)
            print(f"  {name:24}" + "".join(f"{cell:>18}" for cell in cells))

    @contextmanager
    def _failures(self, what: str) -> Iterator[None]:
        """Go on without what fails here."""
        try:
            yield
        except BenchmarkFailed as error:
            self._note_failure(what, error)

    def _note_failure(self, what: str, error: BenchmarkFailed) -> None:
        self._is_complete = False
        print(f"Without {what}: {' '.join(str(error).split())[:300]}", flush=True)


def _summary(figures: Sequence[float]) -> str:
    return f"{median(figures):,.0f} ({min(figures):,.0f} to {max(figures):,.0f})"


if __name__ == "__main__":
    sys.exit(main())
