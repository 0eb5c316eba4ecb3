"""Log at each level to one of our loggers, uvicorn's two and another library's."""

import logging
import sys

from port_checker.server.logs import set_up_logging

if __name__ == "__main__":
    names = ("port_checker.api.routes", "uvicorn.error", "uvicorn.access", "asyncio")
    loggers = [logging.getLogger(name) for name in names]
    set_up_logging(debug=sys.argv[1] == "debug")
    for logger in loggers:
        for level in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"):
            logger.log(getattr(logging, level), "%d of %s", 3, "100 ports")
