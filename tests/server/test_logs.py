"""Log lines as they reach stderr: a pipe, and a terminal."""

import os
import re
import subprocess
import sys

from tests.support.namespace import ROOT

# Logs at each level to one of our loggers, uvicorn's two and another library's.
SCRIPT = """
import logging.config, sys
from port_checker.server.logs import logging_config

names = ("port_checker.server.api", "uvicorn.error", "uvicorn.access", "asyncio")
loggers = [logging.getLogger(name) for name in names]
logging.config.dictConfig(logging_config(debug=sys.argv[1] == "debug"))
for logger in loggers:
    for level in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"):
        logger.log(getattr(logging, level), "%d of %s", 3, "100 ports")
"""
ALL_LEVELS = ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
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
        "port_checker.server.api": from_info,
        "uvicorn.error": from_error,
        "uvicorn.access": from_error,
        "asyncio": from_warning,
    }
    assert levels(logged(debug=True)) == {
        "port_checker.server.api": ALL_LEVELS,
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
            r"[-\d]+ [:\d]+ (\x1b\[[0-9;]+m)([A-Z]+)\x1b\[0m [^\x1b]+(\x1b\[0m)?", line
        )
        assert match, line
        colours.setdefault(match[2], set()).add(match[1])
    assert list(colours) == ALL_LEVELS
    assert all(len(found) == 1 for found in colours.values())
    assert len(set.union(*(colours[level] for level in ("INFO", "WARNING", "ERROR")))) == 3


def test_no_colours_where_they_are_not_wanted() -> None:
    assert levels(logged(terminal=True, NO_COLOR="1")) == levels(logged())
