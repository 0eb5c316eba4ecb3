"""``python -m benchmarks``: measure throughput and growth in one run, and print the figures."""

import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks import alone, wrk
from benchmarks.processes import (
    OURS_COMMAND,
    PUBLISHED,
    open_ports,
    published_command,
    run,
    service,
)
from port_checker import __version__

ROUNDS = 5
PORTS = 100
CHECKER_REQUIRED = 0.6  # of a bare loop's throughput


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
    published = published_command()
    ports = stack.enter_context(open_ports(PORTS))
    ours = stack.enter_context(service("this", OURS_COMMAND, directory))
    published_service = stack.enter_context(service("published", published, directory))

    print(
        f"golem-port-checker {__version__}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.release()}, {os.cpu_count()} cores.\n"
        f"Figures are medians of {ROUNDS} alternating rounds after a warm-up round "
        "(lowest to highest in brackets).\nThe ratio is that of the medians."
    )
    _head(
        "Requests a second",
        f"wrk, 1 thread, {wrk.CONNECTIONS} connections, {wrk.SECONDS} s a round",
        "this service",
        f"published {PUBLISHED}",
    )
    for load in wrk.loads(ports):
        _row(
            load.name,
            *_alternate(
                partial(wrk.requests_per_second, ours.port, load, directory),
                partial(wrk.requests_per_second, published_service.port, load, directory),
            ),
            load.required,
        )

    _head(
        "Ports a second without HTTP",
        f"{PORTS} open ports at once, {alone.SECONDS:g} s a round",
        "the checker",
        "bare epoll loop",
    )
    _row(
        f"{PORTS} open ports",
        *_alternate(
            partial(alone.checker_ports_per_second, ports),
            partial(alone.bare_ports_per_second, ports),
        ),
        CHECKER_REQUIRED,
    )

    _print_growth(*alone.usage_before_and_after(ports))
    print(f"\nThe whole run took {time.monotonic() - started:.0f} s.")
    return True


def _alternate(
    ours: Callable[[], float], other: Callable[[], float]
) -> tuple[list[float], list[float]]:
    """Measure one and the other in turn, so that lasting noise affects both."""
    ours(), other()  # to warm up
    rounds = [(ours(), other()) for _ in range(ROUNDS)]
    return [mine for mine, _ in rounds], [theirs for _, theirs in rounds]


def _head(what: str, how: str, ours: str, other: str) -> None:
    print(f"\n{what} ({how})")
    print(f"  {'':16}{ours:>28}{other:>28}{'ratio':>8}  required")


def _row(name: str, ours: list[float], other: list[float], required: float | None) -> None:
    ratio = median(ours) / median(other)
    verdict = ""
    if required:
        verdict = f"{required:g}{', below' if ratio < required else ''}"
    print(f"  {name:16}{_summary(ours):>28}{_summary(other):>28}{ratio:>8.2f}  {verdict}".rstrip())


def _summary(figures: list[float]) -> str:
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
