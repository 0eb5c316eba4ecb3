"""The process that makes TLS handshakes, where they can be killed.

A peer decides how much work its certificates are. OpenSSL decodes each one's key before it verifies
anything. For a key on a curve of the peer's own, it takes a square root modulo a prime that the
peer chose: 100 KiB of such certificates take minutes (measured), and only the end of the process
stops that. So ``tls`` starts a process that runs ``main``:

- It keeps the handshakes that wait for their peers, and parses nothing that those send.
- When a peer has sent something, a fork takes the step on its own copy of the handshake, so its end
  harms no other. The kernel ends it when the handshake has used up its CPU time.
- A fork that takes long is slow. Slow forks run one after the other.

A message, in either direction, is a line of JSON, followed by the bytes received or to be sent.
"""

import gc
import json
import os
import selectors
import signal
import socket
import ssl
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from typing import Any, Final, NoReturn

from port_checker.handshake import Handshake, Trouble, handshake_failed, make_context
from port_checker.linux import return_free_memory

# Seconds of CPU for one handshake. Usually it takes 2 ms.
BUDGET: Final = 0.5

# Bytes. The kernel needs only single pages of memory for that much (unix_dgram_sendmsg()).
LARGEST_MESSAGE: Final = 80 * 1024

TOO_BUSY: Final = "too busy for a TLS handshake"

# Forks that run at once, and seconds of CPU after which one is slow.
_AT_ONCE: Final = 8
_SLICE: Final = 0.02

# How nice forks are to others, the service first, and how nice slow ones are (nice(2)). Not more:
# beside programs that keep all processors busy, slow ones would not end in time.
_NICE: Final = 5
_SLOW_NICE: Final = 10

# The most slow forks, and the most that wait for their peer; one takes about 1 MB (measured). When
# too many wait, the one that has waited the longest ends: an honest peer answers at once.
_MOST_SLOW: Final = 64
_MOST_WAITING: Final = 64

# The most handshakes that it keeps, each of which takes 41 KB (measured), and the most bytes from
# their peers. Here, too, the oldest is given up.
_MOST_KEPT: Final = 1024
_MOST_HELD: Final = 16 * 1024 * 1024

# Seconds without work after which the process ends by itself. The service ends it sooner, unless
# its event loop is gone.
_IDLE: Final = 90.0

# After more handshakes at once than these, free memory goes back to the kernel when all have ended.
# That takes 5 ms; one handshake takes up to 144 KiB (measured).
FEW: Final = 20


def encode(head: Mapping[str, object], data: bytes = b"") -> bytes:
    """Return a message."""
    return json.dumps(head, default=datetime.isoformat).encode() + b"\n" + data


def decode(message: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the head and the data of a message."""
    head, _, data = message.partition(b"\n")
    return json.loads(head), data


class _Kept:
    """A handshake that this process keeps.

    Attributes:
        number: Its name to the service.
        caller: Who asked for it.
        handshake: Its state after the first message; forks continue from there.
        received: What its peer has sent.
        cpu: Seconds of CPU that forks have used for it.
        fork: The fork that continues it, if there is one.
    """

    def __init__(self, number: int, caller: str, handshake: Handshake) -> None:
        self.number = number
        self.caller = caller
        self.handshake = handshake
        self.received = b""
        self.cpu = 0.0
        self.fork: _Fork | None = None


class _Fork:
    """A fork of this process, which takes steps of one handshake."""

    def __init__(self, pid: int, channel: socket.socket, kept: _Kept) -> None:
        self.pid = pid
        self.channel = channel
        self.kept = kept
        self.begin_slice()

    def begin_slice(self) -> None:
        self._cpu_before = self._cpu()

    def is_slow(self) -> bool:
        return self._cpu() - self._cpu_before > _SLICE

    def _cpu(self) -> float:
        with suppress(OSError):  # it has ended
            return time.clock_gettime(~self.pid << 3 | 2)  # clock_getcpuclockid(3)
        return 0.0

    def stop(self) -> None:
        """Stop it until its turn comes, and make it nicer from then on."""
        self.send_signal(signal.SIGSTOP)
        with suppress(PermissionError):  # a sandbox's
            os.setpriority(os.PRIO_PROCESS, self.pid, _SLOW_NICE)

    def send_signal(self, number: signal.Signals) -> None:
        # Nobody has waited for this child yet, so the number is still its own.
        os.kill(self.pid, number)


class _Process:
    """Makes handshakes for the other end of ``control``, until that is closed.

    Args:
        control: A socket that preserves message boundaries.
        most_kept: The most handshakes at once.
        most_held: The most bytes from their peers.
    """

    def __init__(
        self, control: socket.socket, most_kept: int = _MOST_KEPT, most_held: int = _MOST_HELD
    ) -> None:
        self._control = control
        self._most_handshakes, self._most_held = most_kept, most_held
        self._context = make_context()
        self._kept: dict[int, _Kept] = {}
        self._most_kept = 0  # since memory was last given back
        self._held = 0  # bytes of their peers
        self._queue: list[_Kept] = []  # those that need a fork
        self._running: list[_Fork] = []
        self._slow: list[_Fork] = []  # stopped
        self._slow_turn: _Fork | None = None  # the one slow fork that runs
        self._waiting: dict[_Fork, None] = {}  # for their peers, in this order
        self._next_slice = 0.0
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ)

    def run(self) -> None:
        self._control.send(encode({"number": 0}))
        # The garbage collector writes to the objects that it looks at: each fork would copy all
        # of their memory.
        gc.freeze()
        while True:
            works = self._running or self._slow or self._slow_turn
            events = self._selector.select(_SLICE if works else _IDLE)
            if not (events or works or self._kept):
                return
            for key, _ in events:
                if key.data:
                    self._hear(key.data)
                elif not self._read_message():
                    return
            self._start_forks()
            if time.monotonic() >= self._next_slice:
                self._next_slice = time.monotonic() + _SLICE
                self._begin_slice()

    def _read_message(self) -> bool:
        message = self._control.recv(LARGEST_MESSAGE)
        if not message:
            return False
        head, data = decode(message)
        number = head["number"]
        match head["do"]:
            case "begin":
                self._begin(number, head["caller"], head["name"], head["addresses"])
            case "keep" | "step" as word:
                self._receive(number, data, is_all=word == "step")
            case "end":
                self._end(number)
        return True

    def _begin(self, number: int, caller: str, name: str | None, addresses: Sequence[str]) -> None:
        try:
            handshake = Handshake(self._context, name, addresses)
            _, hello = handshake.step(b"")
        except (Trouble, MemoryError, ssl.SSLError) as error:
            self._reply(number, trouble=str(error) or "out of memory")
        else:
            self._most_kept = max(self._most_kept, len(self._kept) + 1)
            self._kept[number] = _Kept(number, caller, handshake)
            self._reply(number, hello)
            if len(self._kept) > self._most_handshakes:
                self._give_up(next(iter(self._kept)))

    def _receive(self, number: int, data: bytes, *, is_all: bool) -> None:
        """Keep what a peer has sent, and take a step once all of it is here."""
        kept = self._kept.get(number)
        if not kept:
            if is_all:
                self._reply(number, trouble=TOO_BUSY)  # it had to make way
        elif kept.fork:
            if kept.fork in self._waiting:
                del self._waiting[kept.fork]
                kept.fork.begin_slice()
                self._running.append(kept.fork)
            with suppress(ConnectionError):  # it has ended, of which we shall hear
                kept.fork.channel.send(bytes([is_all]) + data)
        else:
            kept.received += data
            self._held += len(data)
            if is_all:
                self._queue.append(kept)
            while self._held > self._most_held:
                self._give_up(next(number for number, kept in self._kept.items() if kept.received))

    def _give_up(self, number: int) -> None:
        self._end(number)
        self._reply(number, trouble=TOO_BUSY)

    def _end(self, number: int) -> None:
        kept = self._kept.pop(number, None)
        if kept:
            self._held -= len(kept.received)
        if not self._kept and self._most_kept > FEW:
            self._most_kept = 0
            return_free_memory()
        if kept and kept.fork:
            kept.fork.send_signal(signal.SIGKILL)
        elif kept and kept in self._queue:
            self._queue.remove(kept)

    def _reply(
        self,
        number: int,
        output: bytes = b"",
        *,
        verdict: Mapping[str, object] | None = None,
        trouble: str | None = None,
    ) -> None:
        head = {"number": number, "verdict": verdict, "trouble": trouble}
        self._control.send(encode(head, output))

    def _fork(self, kept: _Kept) -> None:
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                try:
                    pid = os.fork()
                except OSError:
                    ours.close()
                    raise
                if not pid:
                    self._be_fork(kept, theirs)
        except OSError as error:
            self._reply(kept.number, trouble=f"cannot start a process: {error.strerror}")
            return
        kept.fork = _Fork(pid, ours, kept)
        self._running.append(kept.fork)
        self._selector.register(ours, selectors.EVENT_READ, kept.fork)

    def _be_fork(self, kept: _Kept, channel: socket.socket) -> NoReturn:
        """Take steps until the handshake ends, or until ending this fork loses nothing."""
        status = 1
        try:
            with suppress(PermissionError):  # a sandbox's
                os.nice(_NICE)
            signal.setitimer(signal.ITIMER_PROF, max(BUDGET - kept.cpu, 0.001))
            gc.disable()
            for key in list(self._selector.get_map().values()):
                key.fileobj.close()  # type: ignore[union-attr]  # they are sockets
            received, is_needed = kept.received, False
            while received:
                verdict, output = kept.handshake.step(received)
                # Another fork can repeat this from all that was received, unless that was much
                # work, or the peer will know something that only this fork knows.
                is_needed |= bool(output) or time.process_time() > _SLICE / 2
                stays = is_needed and not verdict
                report: dict[str, object] = {
                    "verdict": verdict and asdict(verdict),
                    "cpu": time.process_time(),
                    "stays": stays,
                }
                channel.send(encode(report, output))
                received = _receive_all(channel) if stays else b""
            status = 0
        except (Trouble, MemoryError) as error:
            report = {"trouble": str(error) or "out of memory", "cpu": 0.0, "stays": False}
            channel.send(encode(report))
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(status)

    def _hear(self, fork: _Fork) -> None:
        """Read a fork's report, or see that it has ended."""
        kept = fork.kept
        is_its_own = kept.fork is fork and kept.number in self._kept
        message = b""
        with suppress(ConnectionError):  # it was killed before it had read all that we sent
            message = fork.channel.recv(LARGEST_MESSAGE)
        if not message:
            self._selector.unregister(fork.channel)
            fork.channel.close()
            self._forget(fork)
            _, status = os.waitpid(fork.pid, 0)
            if is_its_own:
                del self._kept[kept.number]
                self._reply_for_ended(kept.number, status)
            return
        report, output = decode(message)
        kept.cpu += report["cpu"]
        if report["stays"]:
            self._forget(fork)
            self._waiting[fork] = None
            if len(self._waiting) > _MOST_WAITING:
                self._end(next(iter(self._waiting)).kept.number)
        else:
            kept.fork = None
        if is_its_own:
            self._reply(
                kept.number, output, verdict=report.get("verdict"), trouble=report.get("trouble")
            )

    def _reply_for_ended(self, number: int, status: int) -> None:
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF:
            verdict = handshake_failed("its certificates take too long to read")
            self._reply(number, verdict=asdict(verdict))
        else:
            ending = os.waitstatus_to_exitcode(status)
            self._reply(number, trouble=f"a process for TLS has ended with {ending}")

    def _forget(self, fork: _Fork) -> None:
        """Take a fork off the list that it is on."""
        self._waiting.pop(fork, None)
        if fork is self._slow_turn:
            self._slow_turn = None
        elif fork in self._running:
            self._running.remove(fork)
        elif fork in self._slow:
            self._slow.remove(fork)

    def _start_forks(self) -> None:
        while self._queue:
            forks = Counter(fork.kept.caller for fork in self._running)
            kept = min(self._queue, key=lambda kept: forks[kept.caller])
            # Half of them are for callers who have none yet, so that these wait for nobody.
            if len(self._running) >= (_AT_ONCE // 2 if forks[kept.caller] else _AT_ONCE):
                break
            self._queue.remove(kept)
            self._fork(kept)

    def _begin_slice(self) -> None:
        """Stop the forks that are slow, and let one of them run."""
        for fork in [fork for fork in self._running if fork.is_slow()]:
            fork.stop()
            self._running.remove(fork)
            self._slow.append(fork)
            if len(self._slow) > _MOST_SLOW:
                self._give_up(fork.kept.number)
        if not self._slow_turn and self._slow:
            forks = Counter(fork.kept.caller for fork in self._slow)
            self._slow_turn = min(self._slow, key=lambda fork: forks[fork.kept.caller])
            self._slow.remove(self._slow_turn)
            self._slow_turn.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End all handshakes and their forks."""
        for kept in list(self._kept.values()):
            self._end(kept.number)


def _receive_all(channel: socket.socket) -> bytes:
    """Return what a fork gets for its next step; empty if there is none."""
    received, is_all = b"", False
    while not is_all:
        message = channel.recv(LARGEST_MESSAGE)
        if not message:
            return b""
        is_all = bool(message[0])
        received += message[1:]
    return received


def main(descriptor: int) -> None:
    """Make handshakes for the process that has the other end of the socket ``descriptor``."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    with socket.socket(fileno=descriptor) as control, suppress(BrokenPipeError):
        try:
            process = _Process(control)
        except (Trouble, MemoryError) as trouble:
            control.send(encode({"number": 0, "trouble": str(trouble) or "out of memory"}))
            return
        try:
            process.run()
        finally:
            process.close()
