"""Log so many lines, say when that is done, and wait for a line on stdin."""

import logging
import sys

from port_checker.server.logs import set_up_logging

if __name__ == "__main__":
    set_up_logging(debug=False)
    logger = logging.getLogger("port_checker")
    for number in range(int(sys.argv[1])):
        logger.info("line %d", number)
    print("logged", flush=True)  # noqa: T201  # for the test
    sys.stdin.readline()
