"""The same check again and again, which reports only what changes."""

import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime

from port_checker.provider.report import PortPair, Report, port_ranges

# The share of a pause by which it may be shorter or longer, so that many watchers do not ask at
# the same moment.
_JITTER = 0.1
# Seconds that a command may take.
_COMMAND_TIMEOUT = 60


def watch(
    check: Callable[[], Sequence[Report]],
    every: float,
    on_change: Callable[[Sequence[str], Sequence[Report]], None],
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Check for ever; an exception of ``sleep`` or ``check`` ends it.

    Args:
        check: Makes a check.
        every: Seconds from the end of one to the beginning of the next.
        on_change: Called with what has changed, in sentences, and the new reports; the first time,
            with how things stand.
        sleep: What to wait with.
    """
    before: Sequence[Report | None] | None = None
    while True:
        after = check()
        pairs = zip(before or [None] * len(after), after, strict=True)
        if lines := [line for last, report in pairs for line in _changes(last, report)]:
            on_change(lines, after)
        before = after
        sleep(every * random.uniform(1 - _JITTER, 1 + _JITTER))  # noqa: S311  # no secret


def _changes(before: Report | None, after: Report) -> Iterator[str]:
    """Yield what is different from the report before, if there is one."""
    last = before if before and before.is_checked else None
    if not after.is_checked:
        if last or not before:
            reasons = "; ".join(f"{s.url}: {s.error}" for s in after.servers if s.error)
            yield f"no server could check over IPv{after.family}: {reasons}"
        return
    if not last or last.ip != after.ip:
        total = f"{after.reachable} of {after.total} ports"
        yield f"{total} of {after.ip} are reachable over IPv{after.family}"
    old = {port.port: port.reachable for port in last.ports} if last else {}
    causes: dict[tuple[bool, str], list[PortPair]] = {}
    for port in after.ports:
        if old.get(port.port, True) != port.reachable:
            cause = f"{port.error}. {port.advice}" if port.error else port.advice or ""
            causes.setdefault((port.reachable, cause), []).append(port.pair)
    for (reachable, cause), pairs in causes.items():
        state = "reachable again" if reachable else f"not reachable: {cause}"
        yield f"{port_ranges(pairs)}: {state}"
    valid = {endpoint.port: endpoint.valid for endpoint in last.tls} if last else {}
    for endpoint in after.tls:
        if valid.get(endpoint.port, True) != endpoint.valid:
            state = "valid again" if endpoint.valid else f"{endpoint.error}. {endpoint.advice}"
            yield f"certificate at {endpoint.port}: {state}"


def log(lines: Sequence[str]) -> None:
    """Write each change to stdout, with the time."""
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    for line in lines:
        sys.stdout.write(f"{now} {line}\n")
    sys.stdout.flush()


def run_command(command: Sequence[str], document: str) -> str | None:
    """Run a command with the reports on its stdin; return what went wrong with it, if anything."""
    try:
        done = subprocess.run(  # noqa: S603  # the owner's own command
            command, input=document.encode(), timeout=_COMMAND_TIMEOUT, check=False
        )
        fault = f"ended with status {done.returncode}" if done.returncode else None
    except subprocess.TimeoutExpired:
        fault = f"did not end within {_COMMAND_TIMEOUT} s"
    except OSError as error:
        fault = f"cannot be run: {error.strerror}"
    return fault and f"{command[0]} {fault}"
