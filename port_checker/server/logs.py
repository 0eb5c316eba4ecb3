"""One line for each event, on stderr: for a terminal, for systemd's journal, or plain."""

import contextlib
import functools
import logging
import logging.config
import os
import queue
import select
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from itertools import accumulate, islice
from typing import Any

from colorlog import ColoredFormatter

from port_checker.server.systemd import stderr_is_the_journal

logger = logging.getLogger(__name__)

# Lines that may wait to be written: what a busy service logs in some seconds.
QUEUE_SIZE = 10_000

# Seconds for which the writer collects lines before it writes them, so that a busy service does not
# wake it for each line.
_COLLECT = 0.02

# Seconds that the process waits at its end for lines to be written.
FLUSH_PATIENCE = 2.0

_COLOURED = "%(asctime)s %(log_color)s%(levelname)s%(reset)s %(name)s: %(message)s"
_JOURNAL = "%(levelname)s %(name)s: %(message)s"  # the journal notes the time itself

# The journal's priorities: syslog(3).
_PRIORITIES = {
    logging.CRITICAL: 2,
    logging.ERROR: 3,
    logging.WARNING: 4,
    logging.INFO: 6,
    logging.DEBUG: 7,
}


def set_up_logging(*, debug: bool) -> None:
    """Log to stderr from now on.

    Args:
        debug: Whether to log a line for each port and each HTTP request as well.
    """
    # Our lines do not name thread, process or line of code. Finding these out takes over a third of
    # a line's time (measured; Logging HOWTO, "Optimization").
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"line": _formatter()},
            "handlers": {
                "stderr": {
                    "class": "port_checker.server.logs.BackgroundHandler",
                    "formatter": "line",
                }
            },
            "root": {"handlers": ["stderr"], "level": "WARNING"},
            "loggers": {
                "port_checker": {"level": "DEBUG" if debug else "INFO"},
                # At INFO uvicorn logs its steps of starting and stopping, which our own lines
                # cover. At WARNING it logs each malformed request, so any client could fill the
                # log.
                "uvicorn": {"level": "DEBUG" if debug else "ERROR"},
            },
        }
    )


def _formatter() -> dict[str, Any]:
    if stderr_is_the_journal():
        return {"class": "port_checker.server.logs.JournalFormatter", "format": _JOURNAL}
    on_terminal = sys.stderr is not None and sys.stderr.isatty()  # None if it was closed
    if on_terminal and not os.environ.get("NO_COLOR"):  # https://no-color.org
        return {"()": "port_checker.server.logs.ColouredFormatter", "fmt": _COLOURED}
    return {"class": "port_checker.server.logs.PlainFormatter"}


@functools.lru_cache(maxsize=4)  # many lines are of the same second
def _local_time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).astimezone().isoformat()


class PlainFormatter(logging.Formatter):
    """Begins each line with the time and its offset from UTC, as in RFC 3339."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's
        """Return the line; a format string would take twice as long (measured)."""
        time = _local_time(int(record.created))
        return f"{time} {record.levelname} {record.name}: {record.message}"


class ColouredFormatter(ColoredFormatter):
    """The same, with the level in colour."""

    def formatTime(self, record: logging.LogRecord, _: str | None = None) -> str:  # noqa: N802  # logging's
        """Return the local time of a record."""
        return _local_time(int(record.created))


class JournalFormatter(logging.Formatter):
    """Begins each line with its priority (sd-daemon(3)).

    A traceback becomes one line, since the journal makes an entry of each line.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        priority = _PRIORITIES.get(record.levelno, _PRIORITIES[logging.INFO])
        lines = (line.strip() for line in super().format(record).splitlines())
        return f"<{priority}>{' | '.join(filter(None, lines))}"


class BackgroundHandler(logging.Handler):
    """Formats and writes records to stderr in a thread, so that a stalled reader stalls nobody.

    Records that do not fit the queue are dropped, and so are lines that cannot be written whole
    (the disk is full, say). Once lines can be written again, one says how many were lost. Closing
    the handler writes what is queued, for ``FLUSH_PATIENCE`` at most.

    The standard library's QueueHandler formats in the caller's thread, and its QueueListener wakes
    up for each record and waits without limit at the end.
    """

    def __init__(self) -> None:
        self._overflow = 0  # records that did not fit the queue; counted by those who log
        self._unwritten = 0  # lines that could not be written; counted by the writer
        self._reported = 0  # how many of both have been reported
        self._is_torn = False  # whether the last line was written in part
        self._queue: queue.SimpleQueue[logging.LogRecord | None] = queue.SimpleQueue()
        # Not sys.stderr: a thread that is stuck in its write() holds its lock, which is fatal when
        # the interpreter ends.
        self._descriptor = sys.stderr.fileno() if sys.stderr else None
        self._writer = threading.Thread(target=self._write_lines, name="log", daemon=True)
        self._writer.start()  # before logging knows of a handler to close, in case it fails
        super().__init__()

    @property
    def dropped(self) -> int:
        """How many lines have been dropped so far."""
        return self._overflow + self._unwritten

    def handle(self, record: logging.LogRecord) -> bool:
        """Queue a record without the lock that other handlers need, or drop it."""
        if passes := self.filter(record):
            self.emit(record)
        return bool(passes)

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a record, or drop it."""
        if self._queue.qsize() < QUEUE_SIZE:
            self._queue.put(record)
        else:
            self._overflow += 1

    def close(self) -> None:
        """Write what is queued, and end the thread."""
        self._queue.put(None)
        self._writer.join(FLUSH_PATIENCE)
        super().close()

    def _write_lines(self) -> None:
        is_open = True
        while is_open:
            records = [self._queue.get()]
            time.sleep(_COLLECT)
            records += [self._queue.get() for _ in range(self._queue.qsize())]
            is_open = None not in records
            lines = [self._line(record) for record in records if record]
            self._unwritten += self._write(lines)
            dropped = self.dropped
            if dropped > self._reported:
                report = self._line(_dropped_record(dropped - self._reported))
                if self._write([report]) == 0:
                    self._reported = dropped

    def _line(self, record: logging.LogRecord) -> bytes:
        try:
            return f"{self.format(record)}\n".encode(errors="backslashreplace")
        except Exception:  # as every handler does with a record whose arguments do not fit
            self.handleError(record)
            return b""

    def _write(self, lines: Iterable[bytes]) -> int:
        """Write lines, several in one call, but no more than a pipe takes atomically.

        Worker processes share the pipe, and would write into each other's lines.

        Returns:
            How many lines could not be written whole.
        """
        failed = size = 0
        batch: list[bytes] = []
        for line in lines:
            if batch and size + len(line) > select.PIPE_BUF:
                failed += self._write_batch(batch)
                batch, size = [], 0
            batch.append(line)
            size += len(line)
        return failed + self._write_batch(batch)

    def _write_batch(self, lines: Sequence[bytes]) -> int:
        # The next line does not continue one that was written in part.
        data = b"\n" * self._is_torn + b"".join(lines)
        unwritten = self._write_bytes(data)
        written = data[: len(data) - unwritten]
        if written:
            self._is_torn = not written.endswith(b"\n")
        remaining = accumulate(map(len, reversed(lines)), initial=0)
        return sum(size < unwritten for size in islice(remaining, len(lines)))

    def _write_bytes(self, data: bytes) -> int:
        """Write to stderr; return how many bytes could not be written."""
        if self._descriptor is None:
            return 0  # stderr was closed: nobody wants to read it
        with contextlib.suppress(OSError):  # the disk is full, or the reader is gone
            while data:
                try:
                    data = data[os.write(self._descriptor, data) :]
                except BlockingIOError:  # whoever shares stderr made it non-blocking
                    select.select([], [self._descriptor], [])
        return len(data)


def log_uncaught(_: object, error: BaseException | None, __: object = None) -> None:
    """Log the exception that ends the process, as ``sys.excepthook``.

    The interpreter would write it to stderr, and the journal would make an informational entry of
    each line.
    """
    logger.critical("Ended by a bug", exc_info=error)


def dropped_lines() -> int:
    """Return how many lines this process has dropped."""
    handlers = logging.getLogger().handlers
    return sum(each.dropped for each in handlers if isinstance(each, BackgroundHandler))


def _dropped_record(count: int) -> logging.LogRecord:
    message = "%d log lines were dropped: they could not be written, or not fast enough"
    return logging.LogRecord(__name__, logging.WARNING, __file__, 0, message, (count,), None)
