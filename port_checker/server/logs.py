"""One line for each event, on stderr: in colour on a terminal, plain elsewhere."""

import os
import sys
from typing import Any

_TIME = "%Y-%m-%d %H:%M:%S"
_PLAIN = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_COLOURED = "%(asctime)s %(log_color)s%(levelname)s%(reset)s %(name)s: %(message)s"


def logging_config(*, debug: bool) -> dict[str, Any]:
    """Return the configuration of all logging, for ``logging.config.dictConfig``.

    Args:
        debug: Whether to log a line for each port and each HTTP request as well.
    """
    on_terminal = sys.stderr is not None and sys.stderr.isatty()  # None if it was closed
    colours = on_terminal and not os.environ.get("NO_COLOR")  # https://no-color.org
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {
            "line": {"()": "colorlog.ColoredFormatter", "fmt": _COLOURED, "datefmt": _TIME}
            if colours
            else {"format": _PLAIN, "datefmt": _TIME}
        },
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
        "root": {"handlers": ["stderr"], "level": "WARNING"},
        "loggers": {
            "port_checker": {"level": "DEBUG" if debug else "INFO"},
            # At INFO uvicorn logs its steps of starting and stopping, which our own lines cover.
            # At WARNING it logs each malformed request, so any client could fill the log.
            "uvicorn": {"level": "DEBUG" if debug else "ERROR"},
        },
    }
