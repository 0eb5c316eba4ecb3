"""Worker processes: started, watched and replaced by their parent.

A worker is this program again, with a hidden command. It gets its connections from its parent, and
tells it that it is ready and alive as it would tell systemd (sd_notify(3)).

uvicorn's own supervisor asks a thread of the worker whether it is alive, which answers even while
the event loop is stuck; and its workers outlive it.
"""

import contextlib
import faulthandler
import logging
import mmap
import os
import pickle
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, NamedTuple

from port_checker.linux import end_with_parent
from port_checker.metrics import ROW_SIZE, Row, Totals
from port_checker.server.distributor import Channel, Distributor
from port_checker.settings import Settings

# Seconds between two looks at the workers, and between two heartbeats of a worker.
BEAT = 1.0

# Seconds that a worker has to start: far more than its imports take on a tenth of a core.
_START_PATIENCE = 300.0

# Seconds without a heartbeat after which a worker counts as stuck.
_PATIENCE = 30.0

# Seconds that a stuck worker has to write its traceback before it is killed.
_TRACEBACK_PATIENCE = 5.0

# The longest pause, in seconds, before a worker that could not start is started again.
_MAX_PAUSE = 30.0

# Failed starts in a row after which the program gives up, if no worker is serving.
_START_ATTEMPTS = 3

# Processes at a time: 64 workers, and earlier ones that are still leaving.
_MAX_PROCESSES = 256

# Notices read at a time, and bytes of each: anybody may send some.
_MAX_NOTICES, _MAX_NOTICE = 1000, 4096

# The process, user and group of a datagram's sender: struct ucred, unix(7).
_CREDENTIALS = struct.Struct("=iII")

logger = logging.getLogger(__name__)


class Assignment(NamedTuple):
    """What a worker finds on its stdin.

    Attributes:
        settings: The operator's settings.
        parent: The process id of its parent.
        channel: The descriptor of its end of the channel on which connections come.
        listeners_stay: Whether the listening sockets stay open when this service stops.
        memory: The descriptor of the memory that it shares with its parent.
        slot: Which row of that memory is its own.
    """

    settings: Settings
    parent: int
    channel: int
    listeners_stay: bool
    memory: int
    slot: int


def receive_assignment() -> Assignment:
    """Return what this worker is to do. From here on it ends with its parent, or at its request.

    SIGTERM is the parent's word for it, also where the program was started with it ignored.
    """
    if signal.getsignal(signal.SIGTERM) == signal.SIG_IGN:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assignment: Assignment = pickle.load(sys.stdin.buffer)  # noqa: S301  # from our parent
    end_with_parent(assignment.parent)
    return assignment


def own_command(*words: str) -> list[str]:
    """Return the command that starts this program again, with other words.

    It starts as it was started: as a script or a module, and with the interpreter's options.
    """
    start = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv[1:])]
    return [sys.executable, *start, *words]


class Supervisor:
    """Keeps worker processes running until it is told to stop.

    Args:
        command: Starts a worker.
        settings: The operator's settings.
        listeners: The sockets that connections come from.
        totals: Adds up what the workers count.
        listeners_stay: Whether the sockets stay open for the next process when this service stops.
        stop_patience: Seconds that workers have for finishing what they do.
        on_beat: Called at each look at the workers, from when all of them have come up.
        on_stop: Called before the workers are stopped.
        patience: Seconds without a heartbeat after which a worker is replaced.

    Raises:
        OSError: Processes cannot share memory here.
    """

    def __init__(
        self,
        command: Sequence[str],
        settings: Settings,
        listeners: Sequence[socket.socket],
        totals: Totals,
        *,
        listeners_stay: bool,
        stop_patience: float,
        on_beat: Callable[[], None] = lambda: None,
        on_stop: Callable[[], None] = lambda: None,
        patience: float = _PATIENCE,
    ) -> None:
        self._command = command
        self._settings = settings
        self._distributor = Distributor(listeners)
        self._totals = totals
        self._listeners_stay = listeners_stay
        self._stop_patience = stop_patience
        self._on_beat = on_beat
        self._on_stop = on_stop
        self._patience = patience
        self._memory = _anonymous_file()
        # Not only a size: writing to memory that is not there would be fatal.
        os.posix_fallocate(self._memory.fileno(), 0, _MAX_PROCESSES * ROW_SIZE * _NUMBER)
        self._notices = _Notices()
        self._workers: list[_Worker] = []
        self._failed_starts = 0  # in a row
        self._pause = 0.0  # seconds until workers are started again
        self._is_stopping = False
        self._before: Settings | None = None  # while workers are being replaced by others
        self._looked_at = time.monotonic()

    @property
    def is_complete(self) -> bool:
        """Whether all workers have come up, and those before them have been told to leave."""
        serving = self._serving()
        return len(serving) == self._settings.workers and all(
            worker.is_ready and worker.settings is self._settings for worker in serving
        )

    @property
    def has_given_up(self) -> bool:
        """Whether no worker serves, and none can be started."""
        return self._failed_starts >= _START_ATTEMPTS and not any(
            worker.is_ready for worker in self._workers
        )

    def renew(self, settings: Settings, stop_patience: float) -> None:
        """Replace all workers, one after the other, by others with these settings."""
        self._before, self._settings = self._settings, settings
        self._stop_patience = max(self._stop_patience, stop_patience)
        self._failed_starts, self._pause = 0, 0.0

    def abandon_renewal(self) -> bool:
        """Go back to the settings before if no worker starts; return whether that was so."""
        if not self._before or self._failed_starts < _START_ATTEMPTS:
            return False
        self._settings, self._before = self._before, None
        return True

    def stop(self, *_: object) -> None:
        """Have ``run`` stop the workers and return; it may be a signal's handler."""
        self._is_stopping = True

    def run(self) -> bool:
        """Start the workers, watch them, stop them.

        Returns:
            Whether they served; False if none could start.
        """
        has_been_complete = False
        with self._memory, self._notices, _waiting_for(self._notices) as wait:
            while not self._is_stopping and not self.has_given_up:
                self.look()
                has_been_complete = has_been_complete or self.is_complete
                if has_been_complete:
                    self._on_beat()
                wait(BEAT)
            has_served = not self.has_given_up
            self._on_stop()
            self.stop_workers()
        return has_served

    def look(self) -> None:
        """Look after the workers: start those that are missing, and end those that are stuck."""
        self._receive_notices()
        # What stops this process as well (SIGSTOP, a frozen container) is no worker's fault: one
        # look counts for little, however long ago the last one was.
        now = time.monotonic()
        elapsed = min(now - self._looked_at, 2 * BEAT)
        self._looked_at = now
        self._pause -= elapsed
        self._workers = [worker for worker in self._workers if self._look(worker, elapsed)]
        self._replace_outdated()
        self._start_missing()

    def _replace_outdated(self) -> None:
        """Have those leave in whose place others are ready, and none before the first is."""
        serving = self._serving()
        outdated = [worker for worker in serving if worker.settings is not self._settings]
        if not outdated:
            self._before = None
        ready = sum(worker.is_ready for worker in serving if worker not in outdated)
        excess = max(0, len(outdated) + ready - self._settings.workers) if ready else 0
        for worker in outdated[:excess]:
            self._send_no_more(worker)

    def _send_no_more(self, worker: "_Worker") -> None:
        """Have a worker leave once it has answered what it has."""
        worker.is_leaving = True
        self._distributor.close(worker.channel)

    def _serving(self) -> "list[_Worker]":
        return [worker for worker in self._workers if not worker.is_leaving]

    def _start_missing(self) -> None:
        while self._lacks_worker() and self._pause <= 0:
            try:
                worker = self._start()
            except OSError as error:  # out of processes, descriptors or memory
                logger.error("No worker can be started: %s", error.strerror)
                self._count_failed_start()
            else:
                self._workers.append(worker)
                self._totals.add(worker.row, worker.process.pid, worker.settings.perspective_names)
                logger.debug("Worker %d started", worker.process.pid)

    def _lacks_worker(self) -> bool:
        serving = self._serving()
        current = [worker for worker in serving if worker.settings is self._settings]
        is_renewing = len(current) < len(serving)
        if is_renewing and not all(worker.is_ready for worker in current):
            return False  # one after the other
        return len(current) < self._settings.workers and len(self._workers) < _MAX_PROCESSES

    def _start(self) -> "_Worker":
        memory = self._memory.fileno()
        slot = min({*range(_MAX_PROCESSES)} - {worker.slot for worker in self._workers})
        row = shared_row(memory, slot)
        for figure in range(ROW_SIZE):
            row[figure] = 0.0
        channel = Channel(row)
        end = channel.end.fileno()
        assignment = Assignment(
            self._settings, os.getpid(), end, self._listeners_stay, memory, slot
        )
        with channel.end, _anonymous_file() as stdin:  # an unread pipe takes no more than 64 KiB
            pickle.dump(assignment, stdin)
            stdin.seek(0)
            process = subprocess.Popen(  # noqa: S603  # our own command
                self._command,
                stdin=stdin,
                pass_fds=(memory, end),
                env={**os.environ, "NOTIFY_SOCKET": self._notices.address},
                process_group=0,  # Ctrl-C in a terminal is for the parent, which stops its workers
            )
        return _Worker(process, self._settings, slot, row, channel)

    def _count_failed_start(self) -> None:
        self._failed_starts += 1
        self._pause = min(2.0**self._failed_starts, _MAX_PAUSE)

    def _receive_notices(self) -> None:
        workers = {worker.process.pid: worker for worker in self._workers}
        for sender, assignments in self._notices.receive():
            if worker := workers.get(sender):
                worker.silence = 0.0
                if "READY=1" in assignments and not worker.is_ready:
                    worker.is_ready = True
                    self._distributor.open(worker.channel)
                    self._failed_starts = 0
                if "STOPPING=1" in assignments and not worker.is_leaving:
                    logger.warning("Worker %d was told to stop; replacing it", sender)
                    self._send_no_more(worker)

    def _look(self, worker: "_Worker", elapsed: float) -> bool:
        """Look after a worker; return whether it lives."""
        process = worker.process
        if process.poll() is not None:
            self._receive_notices()  # the last one may say that it was told to stop
            self._distributor.close(worker.channel)
            self._totals.end(worker.row, is_death=not worker.is_leaving)
            if worker.is_leaving:
                logger.debug("Worker %d has left", process.pid)
            elif worker.is_ready:
                logger.error("Worker %d %s; replacing it", process.pid, worker.ending())
            else:
                self._count_failed_start()
                logger.error("Worker %d %s while starting", process.pid, worker.ending())
            return False
        worker.silence += elapsed
        if worker.is_leaving:
            worker.leaving_for += elapsed
            if worker.leaving_for > self._stop_patience:
                process.kill()
        patience = self._patience if worker.is_ready else _START_PATIENCE
        if worker.silence > patience + _TRACEBACK_PATIENCE:
            process.kill()
        elif worker.silence > patience and not worker.is_aborted:
            logger.error("Worker %d does not respond; ending it", process.pid)
            worker.is_aborted = True
            process.send_signal(signal.SIGABRT)
        return True

    def stop_workers(self) -> None:
        """Stop the workers, and wait for them."""
        if self._listeners_stay:
            self._distributor.stop()
        for worker in self._workers:
            worker.process.terminate()
        deadline = time.monotonic() + self._stop_patience
        for worker in self._workers:
            try:
                worker.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                logger.error("Worker %d does not stop; killing it", worker.process.pid)
                worker.process.kill()
                worker.process.wait()
            else:
                if worker.is_ready and worker.process.returncode:
                    logger.error("Worker %d %s while stopping", worker.process.pid, worker.ending())
            self._distributor.close(worker.channel)
        self._distributor.stop()


@dataclass(eq=False, slots=True)
class _Worker:
    """One process.

    Attributes:
        process: It.
        settings: Those that it was started with.
        slot: Where its row is in the shared memory.
        row: What it counts.
        channel: How it gets its connections.
        silence: Seconds since its start, or its last heartbeat.
        is_ready: Whether it serves.
        is_leaving: Whether it was told to stop, since another one has taken its place.
        leaving_for: Seconds since then.
        is_aborted: Whether it was sent the signal to write its traceback and end.
    """

    process: "subprocess.Popen[bytes]"
    settings: Settings
    slot: int
    row: Row
    channel: Channel
    silence: float = 0.0
    is_ready: bool = False
    is_leaving: bool = False
    leaving_for: float = 0.0
    is_aborted: bool = False

    def ending(self) -> str:
        """Say how it ended."""
        code = self.process.returncode
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"


def write_traceback_when_aborted() -> None:
    """Have SIGABRT write this process's traceback, even if the event loop is stuck.

    It is what systemd's watchdog sends, and what a supervisor sends to a stuck worker.
    """
    if sys.stderr:  # None if it was closed
        faulthandler.enable()


# Memory that processes share

_NUMBER = 8  # bytes of a float, which is read and written as a whole


def shared_row(descriptor: int, slot: int) -> Row:
    """Return the numbers of one worker in the memory that all share."""
    numbers = memoryview(mmap.mmap(descriptor, 0)).cast("d")
    return numbers[slot * ROW_SIZE : (slot + 1) * ROW_SIZE]


def _anonymous_file() -> IO[bytes]:
    """Return a new file without a name: in memory, or else in the folder of temporary files.

    Raises:
        OSError: There is neither.
    """
    with contextlib.suppress(OSError):  # forbidden by a system call filter, say
        return os.fdopen(os.memfd_create("worker"), "w+b")
    return tempfile.TemporaryFile()


# Notices, as service managers receive them


class _Notices:
    """The socket on which workers say how they are.

    Attributes:
        address: As ``NOTIFY_SOCKET`` has it.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind("")  # to a name that the kernel chooses, in no folder
        self.address = "@" + self._socket.getsockname()[1:].decode()

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def fileno(self) -> int:
        """Return its descriptor."""
        return self._socket.fileno()

    def receive(self) -> Iterator[tuple[int, list[str]]]:
        """Take what has arrived: the sender's process id, which the kernel tells, and the lines."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(_MAX_NOTICES):
                data, ancillary, _, _ = self._socket.recvmsg(
                    _MAX_NOTICE, socket.CMSG_SPACE(_CREDENTIALS.size)
                )
                for _, _, credentials in ancillary:
                    yield _CREDENTIALS.unpack(credentials)[0], data.decode(errors="replace").split()


@contextlib.contextmanager
def _waiting_for(notices: _Notices) -> Iterator[Callable[[float], None]]:
    """Yield a function that waits for a notice or a signal, for so many seconds at most."""
    reader, writer = socket.socketpair()
    with reader, writer, selectors.DefaultSelector() as selector:
        for end in reader, writer:
            end.setblocking(False)
        for source in reader, notices:
            selector.register(source, selectors.EVENT_READ)

        def wait(seconds: float) -> None:
            selector.select(seconds)
            with contextlib.suppress(BlockingIOError):
                reader.recv(4096)

        # However many signals arrive, none waits for room.
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            yield wait
        finally:
            signal.set_wakeup_fd(before)
