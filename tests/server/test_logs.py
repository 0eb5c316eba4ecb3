"""Log lines as they reach stderr: a pipe, and a terminal."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

from port_checker.server.logs import QUEUE_SIZE, JournalFormatter
from tests.support.namespace import ROOT, needs_root

ALL_LEVELS = ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
LINE = re.compile(
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d ([A-Z]+) ([a-z_.]+): 3 of 100 ports"
)


def logged(
    *, terminal: bool = False, journal: bool = False, debug: bool = False, **environment: str
) -> list[str]:
    """The lines that a process writes to its stderr: a terminal, or a pipe.

    systemd makes a process's stderr a socket of the journal, and names it so that the process
    knows; here it is the pipe that is named so.
    """
    reader, writer = os.openpty() if terminal else os.pipe()
    if journal:
        named = os.fstat(writer)
        environment["JOURNAL_STREAM"] = f"{named.st_dev}:{named.st_ino}"
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("NO_COLOR", "FORCE_COLOR", "TERM")
    }
    with subprocess.Popen(
        [sys.executable, "-m", "tests.programs.log_at_each_level", "debug" if debug else ""],
        cwd=ROOT,
        env={**inherited, "TERM": "xterm", **environment},
        stdout=subprocess.PIPE,
        stderr=writer,
    ) as process:
        os.close(writer)
        text = b""
        while chunk := _read(reader):
            text += chunk
        os.close(reader)
        assert process.communicate()[0] == b""
    assert process.returncode == 0, text
    return text.decode().splitlines()


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65_536)
    except OSError:  # how a terminal ends that nobody has open any more
        return b""


def levels(lines: list[str]) -> dict[str, list[str]]:
    """The levels of each logger's lines, all of which have the one format."""
    found: dict[str, list[str]] = {}
    for line in lines:
        match = LINE.fullmatch(line)
        assert match, line
        found.setdefault(match[2], []).append(match[1])
    return found


def test_levels_of_our_lines_and_of_others() -> None:
    from_info, from_warning, from_error = ALL_LEVELS[1:], ALL_LEVELS[2:], ALL_LEVELS[3:]
    assert levels(logged()) == {
        "port_checker.api.routes": from_info,
        "uvicorn.error": from_error,
        "uvicorn.access": from_error,
        "asyncio": from_warning,
    }
    assert levels(logged(debug=True)) == {
        "port_checker.api.routes": ALL_LEVELS,
        "uvicorn.error": ALL_LEVELS,
        "uvicorn.access": ALL_LEVELS,
        "asyncio": from_warning,
    }


def test_each_level_has_its_colour_on_a_terminal() -> None:
    colours: dict[str, set[str]] = {}
    for line in logged(terminal=True, debug=True):
        assert LINE.fullmatch(COLOUR.sub("", line)), line
        # The level alone is coloured.
        match = re.fullmatch(
            r"[-+:T\d]+ (\x1b\[[0-9;]+m)([A-Z]+)\x1b\[0m [^\x1b]+(\x1b\[0m)?", line
        )
        assert match, line
        colours.setdefault(match[2], set()).add(match[1])
    assert list(colours) == ALL_LEVELS
    assert all(len(found) == 1 for found in colours.values())
    assert len(set.union(*(colours[level] for level in ("INFO", "WARNING", "ERROR")))) == 3


def test_lines_for_the_journal_have_a_priority_and_no_time() -> None:
    ours = [line for line in logged(journal=True, debug=True) if "port_checker" in line]
    assert ours[:5] == [
        "<7>DEBUG port_checker.api.routes: 3 of 100 ports",
        "<6>INFO port_checker.api.routes: 3 of 100 ports",
        "<4>WARNING port_checker.api.routes: 3 of 100 ports",
        "<3>ERROR port_checker.api.routes: 3 of 100 ports",
        "<2>CRITICAL port_checker.api.routes: 3 of 100 ports",
    ]


def test_a_traceback_is_one_entry_in_the_journal() -> None:
    try:
        raise RuntimeError("a\nbug")
    except RuntimeError:
        record = logging.makeLogRecord(
            {"msg": "Failed", "levelno": logging.ERROR, "exc_info": sys.exc_info()}
        )
    line = JournalFormatter("%(message)s").format(record)
    assert re.fullmatch(
        r'<3>Failed \| Traceback \(most recent call last\): \| File ".+", line \d+, in .+ \| '
        r"raise RuntimeError\(.+\) \| RuntimeError: a \| bug",
        line,
    )


def test_another_process_journal_is_not_ours() -> None:
    assert levels(logged(JOURNAL_STREAM="8:1234")) == levels(logged())


def test_no_colours_where_they_are_not_wanted() -> None:
    assert levels(logged(terminal=True, NO_COLOR="1")) == levels(logged())


# Logs as many lines as it is told, says so, and logs one more when it is told to go on.
def flood(lines: int) -> subprocess.Popen[str]:
    """Log to a pipe that nobody reads yet, until all is logged."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.programs.log_many_lines", str(lines)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "logged\n"
    return process


def test_a_stalled_reader_loses_lines_which_are_counted() -> None:
    total = 5 * QUEUE_SIZE
    with flood(total) as process:
        log = process.communicate("\n")[1]
    numbers = [int(number) for number in re.findall(r": line (\d+)$", log, re.MULTILINE)]
    told = re.findall(r"WARNING port_checker\.server\.logs: (\d+) log lines were dropped", log)
    assert told
    assert len(numbers) + sum(map(int, told)) == total
    assert numbers[:QUEUE_SIZE] == list(range(QUEUE_SIZE))  # what fitted, in order


def test_lines_are_written_before_the_process_ends() -> None:
    with flood(1000) as process:
        log = process.communicate("\n")[1]
    assert log.endswith("line 999\n")


def test_a_stalled_reader_does_not_hold_up_the_end() -> None:
    with flood(QUEUE_SIZE) as process:
        assert process.stdin
        process.stdin.close()
        assert process.wait(timeout=60) == 0


# Logs to a full disk, and again when there is room.
FULL_DISK = """
import logging, os, sys, time
from port_checker.server.logs import dropped_lines, set_up_logging

filler = sys.argv[1]
with open(filler, "wb", buffering=0) as file:
    try:
        while file.write(bytes(4096)):
            pass
    except OSError:
        pass
    file.truncate(os.path.getsize(filler) - 8192)  # two pages, for some lines
set_up_logging(debug=False)
logger = logging.getLogger("port_checker")
for number in range(500):
    logger.info("line %d", number)
while not dropped_lines():
    time.sleep(0.01)
os.unlink(filler)
for number in range(500, 1000):
    logger.info("line %d", number)
"""


@needs_root
def test_a_full_disk_loses_lines_which_are_counted_and_tears_none(tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o size=64k none {tmp_path}; cd {ROOT}"
    run = f'{sys.executable} -c "$0" {tmp_path}/filler 2>{tmp_path}/log; cat {tmp_path}/log'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-euc", f"{mount}; {run}", FULL_DISK],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    kinds = [
        re.sub(
            r"^\S+ (INFO port_checker: line|WARNING \S+:) ([0-9]+)( log lines .*)?$", r"\2\3", line
        )
        for line in done.stdout.splitlines()
    ]
    written = [int(kind) for kind in kinds if kind.isdecimal()]
    lost = [int(kind.split()[0]) for kind in kinds if " log lines were dropped: they" in kind]
    assert len(written) + sum(lost) == 1000
    assert 0 < sum(lost) < 500
    # What was torn stands in a line of its own, and there is not more than one.
    assert len(kinds) - len(written) - len(lost) <= 1


def test_times_have_their_offset() -> None:
    (first, *_) = logged(TZ="XYZ-05:30")
    assert first.split()[0].endswith("+05:30")
