"""One line for each event, on stderr: in colours on a terminal, plain elsewhere."""

import logging
import os
import sys
from typing import Any

import colorlog

_TIME = "%Y-%m-%d %H:%M:%S"
_PLAIN = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_COLOURED = "%(asctime)s %(log_color)s%(levelname)s%(reset)s %(name)s: %(message)s"


class _Clock(logging.Formatter):
    """Formats the time once a second rather than for each line.

    glibc looks at /etc/localtime whenever it is asked for the local time, and here it is asked
    twice a line.
    """

    _second = -1
    _time = ""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        second = int(record.created)
        if second != self._second:
            self._second, self._time = second, super().formatTime(record, datefmt)
        return self._time


class PlainFormatter(_Clock):
    """For files, pipes and the journal."""


class ColouredFormatter(_Clock, colorlog.ColoredFormatter):
    """For terminals."""


def logging_config(*, debug: bool) -> dict[str, Any]:
    """Return what ``logging.config.dictConfig`` makes our logging of, uvicorn's own included.

    Args:
        debug: Whether to log a line for each port and each HTTP request, too.
    """
    on_terminal = sys.stderr is not None and sys.stderr.isatty()  # None when it was closed
    colours = on_terminal and not os.environ.get("NO_COLOR")  # https://no-color.org
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {
            "line": {"()": ColouredFormatter, "fmt": _COLOURED, "datefmt": _TIME}
            if colours
            else {"()": PlainFormatter, "fmt": _PLAIN, "datefmt": _TIME}
        },
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
        "root": {"handlers": ["stderr"], "level": "WARNING"},
        "loggers": {
            "port_checker": {"level": "DEBUG" if debug else "INFO"},
            # At INFO it tells the steps of starting and stopping, which our own lines tell; its
            # warnings are of strangers' malformed requests, and as many as they like.
            "uvicorn": {"level": "DEBUG" if debug else "ERROR"},
        },
    }
