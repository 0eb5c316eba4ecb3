"""One line for each event, on stderr: in colours on a terminal, plain elsewhere."""

import os
import sys
from typing import Any

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_COLOURED = "%(asctime)s %(log_color)s%(levelname)s%(reset)s %(name)s: %(message)s"


def logging_config(*, debug: bool) -> dict[str, Any]:
    """Return what ``logging.config.dictConfig`` makes our logging of, uvicorn's own included.

    Args:
        debug: Whether to log a line for each port and each HTTP request, too.
    """
    colours = sys.stderr.isatty() and not os.environ.get("NO_COLOR")  # https://no-color.org
    formatter = (
        {"()": "colorlog.ColoredFormatter", "format": _COLOURED} if colours else {"format": _FORMAT}
    )
    level = "DEBUG" if debug else "INFO"
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": formatter},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
        "root": {"handlers": ["stderr"], "level": "WARNING"},
        "loggers": {
            "port_checker": {"level": level},
            # Its INFO is the steps of starting and stopping, which our own lines tell in one.
            "uvicorn": {"level": "DEBUG" if debug else "WARNING"},
        },
    }
