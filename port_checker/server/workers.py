"""Worker processes: started, watched and replaced by their parent.

uvicorn's own supervisor kills workers that take more than 5 seconds to import and start, which on a
small share of a processor is all of them; its health check is answered by a thread, also when the
event loop is stuck; it replaces workers without a line in the log; and its workers outlive it.
"""

import faulthandler
import logging
import mmap
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.reduction import DupFd
from typing import Any, Self

from port_checker.linux import end_with_parent
from port_checker.metrics import ROW_SIZE, Row, Totals
from port_checker.server.logs import log_uncaught

# Seconds between two looks at the workers, and between two signs of life of a worker.
BEAT = 1.0

# Seconds within which a worker must come up: far more than its imports take on a tenth of a core.
_START_PATIENCE = 300.0

# Seconds without a sign of life after which a worker is taken for stuck.
_PATIENCE = 30.0

# Seconds that a stuck worker has for writing its traceback before it is killed.
_TRACEBACK_PATIENCE = 5.0

# The longest pause, in seconds, before a worker that could not start is started once more.
_MAX_PAUSE = 30.0

# Failed starts in a row after which the program gives up, if no worker is serving.
_START_ATTEMPTS = 3

# What a worker does, in its own process, until it is told to stop: SIGTERM. It calls the function
# that it is given when it is ready, and about every BEAT seconds from then on; and it counts in the
# row that it is given.
Work = Callable[[Callable[[], None], Row], None]

# Forked workers would share the parent's threads' locks, and its event loop's state.
_SPAWN = multiprocessing.get_context("spawn")

logger = logging.getLogger(__name__)


class Supervisor:
    """Keeps worker processes running until SIGTERM or SIGINT.

    Args:
        count: How many.
        work: What each does; it must be picklable.
        totals: Adds up what the workers count.
        stop_patience: Seconds that workers have for finishing what they do.
        on_beat: Called at each look at the workers, from when all of them have come up.
        on_stop: Called before the workers are stopped.
        patience: Seconds without a sign of life after which a worker is replaced.
    """

    def __init__(
        self,
        count: int,
        work: Work,
        totals: Totals,
        *,
        stop_patience: float,
        on_beat: Callable[[], None] = lambda: None,
        on_stop: Callable[[], None] = lambda: None,
        patience: float = _PATIENCE,
    ) -> None:
        self._count = count
        self._work = work
        self._totals = totals
        self._stop_patience = stop_patience
        self._on_beat = on_beat
        self._on_stop = on_stop
        self._patience = patience
        self._workers: list[_Worker] = []
        self._failed_starts = 0  # in a row
        self._pause = 0.0  # seconds until workers are started again

    def run(self) -> bool:
        """Start the workers, watch them, stop them.

        Returns:
            Whether they did serve; False if none could be started.
        """
        stop, wake = socket.socketpair()
        with stop, wake:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: wake.send(b"."))
            before = time.monotonic()
            is_complete = False
            while not self._has_given_up():
                self._start_missing()
                sentinels = [worker.process.sentinel for worker in self._workers]
                if stop in wait([stop, *sentinels], BEAT):
                    break
                # What stops this process as well (SIGSTOP, a frozen container) is no worker's
                # fault: one look counts for little, however long ago the last one was.
                elapsed = min(time.monotonic() - before, 2 * BEAT)
                before = time.monotonic()
                self._pause -= elapsed
                self._workers = [worker for worker in self._workers if self._look(worker, elapsed)]
                ready = sum(worker.is_ready for worker in self._workers)
                is_complete = is_complete or ready == self._count
                if is_complete:
                    self._on_beat()
            has_served = not self._has_given_up()
            self._on_stop()
            self._stop()
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)  # the end is near, and nobody reads ``stop``
        return has_served

    def _has_given_up(self) -> bool:
        return self._failed_starts >= _START_ATTEMPTS and not any(
            worker.is_ready for worker in self._workers
        )

    def _start_missing(self) -> None:
        while len(self._workers) < self._count and self._pause <= 0:
            worker = _Worker(self._work)
            self._workers.append(worker)
            self._totals.add(worker.row, worker.process.pid)
            logger.debug("Worker %d started", worker.process.pid)

    def _look(self, worker: "_Worker", elapsed: float) -> bool:
        """Look after a worker; return whether it lives."""
        has_been_ready = worker.is_ready
        worker.look(elapsed)
        if worker.is_ready and not has_been_ready:
            self._failed_starts = 0
        if not worker.process.is_alive():
            self._totals.end(worker.row)
            if worker.is_ready:
                logger.error("Worker %d %s; replacing it", worker.process.pid, worker.ending())
            else:
                self._failed_starts += 1
                self._pause = min(2.0**self._failed_starts, _MAX_PAUSE)
                logger.error("Worker %d %s while starting", worker.process.pid, worker.ending())
            return False
        patience = self._patience if worker.is_ready else _START_PATIENCE
        if worker.silence > patience + _TRACEBACK_PATIENCE:
            worker.process.kill()
        elif worker.silence > patience and not worker.is_aborted:
            logger.error("Worker %d does not respond; ending it", worker.process.pid)
            worker.abort()
        return True

    def _stop(self) -> None:
        for worker in self._workers:
            worker.process.terminate()
        deadline = time.monotonic() + self._stop_patience
        for worker in self._workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            if worker.process.is_alive():
                logger.error("Worker %d does not stop; killing it", worker.process.pid)
                worker.process.kill()


class _Worker:
    """One process.

    Attributes:
        process: It.
        row: What it counts.
        silence: Seconds since its start, or its last sign of life.
        is_aborted: Whether it was told to write its traceback and end.
    """

    def __init__(self, work: Work) -> None:
        shared = _SharedNumbers.create(1 + ROW_SIZE)
        self._beats, self.row = shared.numbers[:1], shared.numbers[1:]
        self._beats_seen = 0.0
        self.process = _SPAWN.Process(target=_run, args=(work, shared, os.getpid()), daemon=True)
        # Ctrl-C in a terminal is for all processes of the program, and the parent passes it on.
        # Workers inherit what is blocked; one that is just starting would end with a traceback.
        resource_tracker.ensure_running()  # or the first start() would, which unblocks it (3.11)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        shared.close_descriptor()
        self.silence = 0.0
        self.is_aborted = False

    @property
    def is_ready(self) -> bool:
        """Whether it has come up."""
        return self._beats_seen > 0

    def look(self, elapsed: float) -> None:
        """See whether it gave a sign of life in the last ``elapsed`` seconds."""
        beats = self._beats[0]
        self.silence = 0.0 if beats != self._beats_seen else self.silence + elapsed
        self._beats_seen = beats

    def abort(self) -> None:
        """Have it write its traceback and end."""
        self.is_aborted = True
        if self.process.pid:
            os.kill(self.process.pid, signal.SIGABRT)

    def ending(self) -> str:
        """Say how it ended."""
        code = self.process.exitcode or 0
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"


def write_traceback_when_aborted() -> None:
    """Have SIGABRT write this process's traceback, even if the event loop is stuck.

    It is what systemd's watchdog sends, and what a supervisor sends to a stuck worker.
    """
    if sys.stderr:  # None if it was closed
        faulthandler.enable()


class _SharedNumbers:
    """Memory that is passed to a worker: a memfd, since a sandbox may have no folder to write to.

    Attributes:
        numbers: Its content: floats, which are read and written as a whole.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.numbers = memoryview(mmap.mmap(descriptor, 0)).cast("d")

    @classmethod
    def create(cls, count: int) -> Self:
        """Make room for so many numbers, all of which are 0."""
        descriptor = os.memfd_create("worker")
        os.ftruncate(descriptor, 8 * count)
        return cls(descriptor)

    def close_descriptor(self) -> None:
        """Close the descriptor; the numbers stay."""
        os.close(self._descriptor)

    def __reduce__(self) -> tuple[Callable[[Any], "_SharedNumbers"], tuple[Any]]:
        """Have the worker inherit the descriptor."""
        return _attach, (DupFd(self._descriptor),)


def _attach(inherited: Any) -> _SharedNumbers:
    return _SharedNumbers(inherited.detach())


def _run(work: Work, shared: _SharedNumbers, parent: int) -> None:
    end_with_parent(parent)
    write_traceback_when_aborted()

    def beat() -> None:
        shared.numbers[0] += 1

    try:
        work(beat, shared.numbers[1:])
    except Exception as error:  # multiprocessing would write its traceback to stderr
        log_uncaught(type(error), error)
        sys.exit(1)
