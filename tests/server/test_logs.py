"""Log lines as they reach stderr: a pipe, and a terminal."""

import logging
import os
import re
import subprocess
import sys
import time

import pytest

from port_checker.server.logs import ColouredFormatter, PlainFormatter, logging_config
from tests.support.namespace import ROOT

# Logs at each level to each of some loggers, the root's children being ours, uvicorn's and others'.
SCRIPT = """
import logging.config, sys
from port_checker.server.logs import logging_config

logging.config.dictConfig(logging_config(debug=sys.argv[1] == "debug"))
for name in ("port_checker.server.api", "uvicorn.error", "uvicorn.access", "asyncio"):
    for level in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"):
        logging.getLogger(name).log(getattr(logging, level), "%d of %s", 3, "100 ports")
"""
OUR_LINES = ["INFO", "WARNING", "ERROR", "CRITICAL"]
OTHERS_LINES = ["WARNING", "ERROR", "CRITICAL"]
ALL_LINES = ["DEBUG", *OUR_LINES]
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ([A-Z]+) ([a-z_.]+): 3 of 100 ports")


def logged(*, terminal: bool = False, debug: bool = False, **environment: str) -> list[str]:
    """The lines that a process writes to its stderr: a terminal, or a pipe."""
    reader, writer = os.openpty() if terminal else os.pipe()
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("NO_COLOR", "FORCE_COLOR", "TERM")
    }
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "debug" if debug else ""],
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
    """The levels of the lines of each logger; each line has the one format."""
    found: dict[str, list[str]] = {}
    for line in lines:
        match = LINE.fullmatch(line)
        assert match, line
        found.setdefault(match[2], []).append(match[1])
    return found


def test_plain_lines_where_there_is_no_terminal() -> None:
    assert levels(logged()) == {
        "port_checker.server.api": OUR_LINES,
        # Not its warnings, of which strangers make as many as they like.
        "uvicorn.error": ["ERROR", "CRITICAL"],
        "uvicorn.access": ["ERROR", "CRITICAL"],
        "asyncio": OTHERS_LINES,
    }


def test_debugging_tells_more_of_us_and_of_uvicorn() -> None:
    assert levels(logged(debug=True)) == {
        "port_checker.server.api": ALL_LINES,
        "uvicorn.error": ALL_LINES,
        "uvicorn.access": ALL_LINES,
        "asyncio": OTHERS_LINES,
    }


def test_colours_on_a_terminal() -> None:
    lines = logged(terminal=True, debug=True)
    assert levels([COLOUR.sub("", line) for line in lines])["port_checker.server.api"] == ALL_LINES
    colours: dict[str, str] = {}
    for line in lines:
        match = re.search(r"\d (\x1b\[[0-9;]+m)([A-Z]+)(\x1b\[0m) ", line)
        assert match, line  # the level alone is coloured
        assert COLOUR.sub("", line[match.end() :]) == line[match.end() :].removesuffix("\x1b[0m")
        assert colours.setdefault(match[2], match[1]) == match[1]
    assert set(colours) == set(ALL_LINES)
    assert len({colours["INFO"], colours["WARNING"], colours["ERROR"]}) == 3


def test_no_colours_where_they_are_not_wanted() -> None:
    assert levels(logged(terminal=True, NO_COLOR="1")) == levels(logged())


@pytest.mark.parametrize("kind", [PlainFormatter, ColouredFormatter])
def test_the_time_goes_on(kind: type[logging.Formatter]) -> None:
    formatter = kind("%(asctime)s", "%H:%M:%S")
    began = 1_700_000_000
    for moment in (began, began + 0.999, began + 1, began + 1.5, began + 3600, began):
        record = logging.makeLogRecord({"created": moment, "levelname": "INFO"})
        told = COLOUR.sub("", formatter.format(record))
        assert told == time.strftime("%H:%M:%S", time.localtime(moment))


def test_two_formatters_do_not_share_a_clock() -> None:
    record = logging.makeLogRecord({"created": 1_700_000_000})
    assert PlainFormatter("%(asctime)s", "%S").format(record) == "20"
    assert PlainFormatter("%(asctime)s", "%Ss").format(record) == "20s"


def test_a_traceback_is_logged() -> None:
    try:
        raise RuntimeError("a bug")
    except RuntimeError:
        record = logging.makeLogRecord({"msg": "Failed", "exc_info": sys.exc_info()})
    first, *_, last = PlainFormatter("%(asctime)s %(message)s").format(record).splitlines()
    assert first.endswith(" Failed")
    assert last == "RuntimeError: a bug"


def test_loggers_made_before_are_kept() -> None:
    assert logging_config(debug=False)["disable_existing_loggers"] is False
