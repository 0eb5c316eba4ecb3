"""One TLS attempt: a connection, a handshake on it, and what the certificate is good for.

An attempt ends in a ``TlsVerdict`` on the target, or in ``CheckFailed`` because the trouble was the
checker's own. OpenSSL handles what a peer sends in a separate process (``handshake_process``). This
module has the sockets, the clock, and the start and end of that process.
"""

import asyncio
import errno
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import NamedTuple, Self, TypeVar

from port_checker.addresses import Address
from port_checker.connect import (
    OWN_TROUBLE,
    CheckFailed,
    OpenConnectionPacer,
    Verdict,
    VerdictKind,
    WayToTarget,
    close_for_good,
    connect,
    own_failures,
)
from port_checker.handshake import TlsVerdict, TlsVerdictKind, handshake_failed
from port_checker.handshake_process import FEW, LARGEST_MESSAGE, TOO_BUSY, decode, encode
from port_checker.linux import return_free_memory

__all__ = ["TlsClient", "TlsVerdict", "TlsVerdictKind"]

# Bytes received at once: a TLS record is at most 16 KiB and 256 bytes (RFC 8446 section 5.2).
_LARGEST_RECORD = 16 * 1024 + 256

# OpenSSL takes a chain of at most 100 KiB (SSL_CTX_set_max_cert_list), and all else in a handshake
# is small. But it ignores requests to renegotiate during a handshake, however many come.
_MOST_RECEIVED = 128 * 1024

# Bytes for one step once messages are encrypted. More bytes mean fewer steps, but they may be a
# chain that is too long.
_MOST_IN_STEP = 48 * 1024

# Records in a handshake. Servers send ten or so, and 200 where a chain of 100 KiB has to go into
# records of 512 bytes (RFC 6066 section 4). Each record may cost a turn of the event loop.
_MOST_RECORDS = 500

# Bytes of records in one message to the handshake process; the rest is for the message's head.
_LARGEST_PIECE = LARGEST_MESSAGE - 1024

# Bytes of the longest handshake message that OpenSSL accepts: a chain of certificates.
_LARGEST_CHAIN = 100 * 1024

# Bytes buffered for all peers together. Beyond that, the oldest attempt with buffered bytes is
# given up: an honest peer sends everything at once.
_MOST_HELD = 16 * 1024 * 1024

# The type of records with handshake messages, and the most bytes in one (RFC 8446 section 5.1).
_HANDSHAKE = 22
_LARGEST_CONTENT = 16 * 1024

# Seconds to wait for more records after a step without output; twice that after the second, and so
# on. A peer that sends its records one by one does not decide how many steps we take.
_PAUSE = 0.01

# Seconds that an attempt may take beyond its timeout because this machine is slow.
_GRACE = 0.5

# The share of the timeout that our slowness may cost a peer before its silence proves nothing.
_LOSS = 0.25

# Seconds to wait for the process to start; it takes 0.1 s of CPU (measured).
_START_PATIENCE = 5.0

# Seconds. The process takes 15 MB, and its end frees what handshakes have used (measured).
_IDLE = 60.0

_PROGRAM = """
import sys
sys.path.append(sys.argv[1])
from port_checker.handshake_process import main
main(int(sys.argv[2]))
"""

_T = TypeVar("_T")

logger = logging.getLogger(__name__)


class TlsClient:
    """Makes TLS handshakes, for one event loop at a time.

    It trusts the authorities of OpenSSL's default store, or those that ``SSL_CERT_FILE`` and
    ``SSL_CERT_DIR`` name. The handshake process reads them when it starts: at the first handshake,
    and again after it was killed or has ended for want of work.

    Args:
        idle: Seconds without a handshake after which that process ends.
        most_held: Bytes buffered for all peers together.
    """

    def __init__(self, idle: float = _IDLE, most_held: int = _MOST_HELD) -> None:
        self._idle = idle
        self._process: _HandshakeProcess | None = None
        self._buffers = _Buffers(most_held)
        self._under_way = 0
        self._most_under_way = 0  # since there were none
        self._end_when_idle: asyncio.TimerHandle | None = None

    async def attempt(
        self,
        target: Address,
        port: int,
        expected: Sequence[Address | str],
        timeout: float,
        pacer: OpenConnectionPacer,
        caller: str = "",
    ) -> TlsVerdict:
        """Connect to a port, and shake hands.

        Nothing is sent after the handshake. However this ends, cancellation included, it leaves no
        socket open. If the handshake process is killed, the attempt is made again, once.

        Args:
            target: The address to connect to.
            port: The TCP port.
            expected: What the certificate must be good for: addresses, which must be among its
                alternative names of that type, and at most one DNS name, which the server is told
                (SNI), too. The subject's common name never counts (RFC 9525).
            timeout: Seconds that the attempt may last, connection and handshake together.
            pacer: Shared by all who open connections in the event loop.
            caller: Who asks. Callers take turns when many handshakes are slow.

        Raises:
            CheckFailed: The checker's own trouble: as for a port, or no authority is trusted on
                this machine, or it is too busy.
        """
        clock = _Clock(timeout)
        try:
            with self._counted():
                try:
                    return await self._try(target, port, expected, clock, pacer, caller)
                except _ProcessEnded:
                    clock.begin_again()
                return await self._try(target, port, expected, clock, pacer, caller)
        except _ProcessEnded:
            raise CheckFailed("the process that makes TLS handshakes was killed twice") from None
        except MemoryError:
            raise CheckFailed("out of memory") from None

    async def _try(
        self,
        target: Address,
        port: int,
        expected: Sequence[Address | str],
        clock: "_Clock",
        pacer: OpenConnectionPacer,
        caller: str,
    ) -> TlsVerdict:
        connection = await connect(target, port, clock.remaining, pacer)
        if isinstance(connection, Verdict):
            if connection.kind is VerdictKind.TIMED_OUT:
                clock.require_fairness()
            return TlsVerdict(TlsVerdictKind.NO_CONNECTION, connection.error, try_again=True)
        try:
            process = await self._start(clock)
            with (
                process.handshake(expected, caller) as handshake,
                closing(_Incoming(connection, target, clock, pacer, self._buffers)) as incoming,
            ):
                return await _shake_hands(handshake, connection, clock, incoming)
        except _Failed as failure:
            return failure.verdict
        finally:
            close_for_good(connection)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Keep the process alive during the block."""
        self._under_way += 1
        self._most_under_way = max(self._most_under_way, self._under_way)
        if self._end_when_idle:
            self._end_when_idle.cancel()
        try:
            yield
        finally:
            self._under_way -= 1
            if not self._under_way:
                if self._most_under_way > FEW:
                    return_free_memory()
                self._most_under_way = 0
                loop = asyncio.get_running_loop()
                self._end_when_idle = loop.call_later(self._idle, self._end)

    def _end(self) -> None:
        if self._process:
            self._process.end()
        self._process = None

    async def _start(self, clock: "_Clock") -> "_HandshakeProcess":
        """Return the process, when it is ready."""
        if not (self._process and self._process.is_usable):
            with own_failures("cannot start the process that makes TLS handshakes"):
                self._process = _HandshakeProcess()
        process = self._process
        with clock.stopped():
            try:
                async with asyncio.timeout(_START_PATIENCE):
                    await process.ready.wait()
            except TimeoutError:
                raise CheckFailed(TOO_BUSY) from None
        if process.trouble:
            process.end()
            raise CheckFailed(process.trouble)
        return process


class _ProcessEnded(Exception):
    """The handshake process has ended during a handshake."""


class _Failed(Exception):
    """The attempt has ended before there was a verified certificate."""

    def __init__(self, verdict: TlsVerdict) -> None:
        super().__init__(verdict.error)
        self.verdict = verdict


class _Clock:
    """Tells the peer's share of an attempt's time from this machine's; times are the loop's."""

    def __init__(self, timeout: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._timeout = timeout
        self._started = self._loop.time()
        self._ours = 0.0

    @property
    def deadline(self) -> float:
        """When the peer's time is up."""
        return self._started + self._timeout + min(self._ours, _GRACE)

    @property
    def end(self) -> float:
        """When the attempt ends, whoever is slow."""
        return self._started + self._timeout + 2 * _GRACE

    @property
    def remaining(self) -> float:
        """Seconds that the peer has left."""
        return max(0.0, self.deadline - self._loop.time())

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop the clock during the block."""
        stopped = self._loop.time()
        yield
        self._started += self._loop.time() - stopped

    async def ours(self, work: Awaitable[_T]) -> _T:
        """Await work of this machine's, which does not count as the peer's time.

        Raises:
            CheckFailed: The attempt has reached its end.
        """
        started = self._loop.time()
        try:
            async with asyncio.timeout_at(self.end):
                return await work
        except TimeoutError:
            raise CheckFailed(TOO_BUSY) from None
        finally:
            self._ours += self._loop.time() - started

    def begin_again(self) -> None:
        """Count all time until now as this machine's: its result is lost."""
        self._ours = self._loop.time() - self._started

    def require_fairness(self) -> None:
        """Verify that the peer used up the time; called once it is up.

        Raises:
            CheckFailed: This machine took too much of it, or noticed its end too late.
        """
        late = max(0.0, self._loop.time() - self.deadline)
        if self._ours - min(self._ours, _GRACE) + late > self._timeout * _LOSS:
            raise CheckFailed(TOO_BUSY)


async def _shake_hands(
    handshake: "_Handshake",
    connection: socket.socket,
    clock: _Clock,
    incoming: "_Incoming",
) -> TlsVerdict:
    loop = asyncio.get_running_loop()
    fruitless = 0  # steps in a row that led to nothing
    step = await clock.ours(handshake.begin())
    while True:
        try:
            async with asyncio.timeout_at(clock.end):
                await loop.sock_sendall(connection, step.output)
        except TimeoutError:
            raise await incoming.timed_out() from None
        except OSError as error:
            raise _connection_failure(error) from error
        if step.verdict:
            return step.verdict
        fruitless = 0 if step.output else fruitless + 1
        records = await incoming.records(_PAUSE * fruitless)
        step = await clock.ours(handshake.go_on(records))


class _Incoming:
    """What a peer sends during a handshake, cut into whole messages where these can be seen."""

    def __init__(
        self,
        connection: socket.socket,
        target: Address,
        clock: _Clock,
        pacer: OpenConnectionPacer,
        buffers: "_Buffers",
    ) -> None:
        self._connection = connection
        self._target = target
        self._clock = clock
        self._pacer = pacer
        self._buffer = bytearray()
        self._messages = _Messages()
        self._buffers = buffers
        self._received = 0
        self._readable: asyncio.Future[None] | None = None  # while it is awaited
        self._ending: _Failed | CheckFailed | None = None  # why nothing more will arrive

    async def records(self, pause: float) -> bytes:
        """Wait for the records of one step, and for at least ``pause`` seconds; return them.

        Raises:
            CheckFailed: This machine was too slow to receive them, or has trouble of its own.
            _Failed: The peer ended the connection, or did not send enough in time.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout_at(self._clock.deadline):
                await asyncio.sleep(pause)
                while not (self._whole() or self._ending):
                    # The kernel buffers the message and wakes us when it is whole: a peer that
                    # sends byte by byte, or half of a message, costs us nothing.
                    missing = self._messages.missing(self._buffer)
                    if missing > _LARGEST_RECORD:  # which does not fit the usual buffer well
                        self._connection.setsockopt(
                            socket.SOL_SOCKET, socket.SO_RCVBUF, 2 * missing
                        )
                    self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, missing)
                    await self._until_readable()
                    self._receive(_LARGEST_RECORD)
        # More may have arrived, even after a timeout. And after a lot more will follow: one step
        # with all of it saves several.
        while self._receive(_MOST_IN_STEP - len(self._buffer)) > _LARGEST_RECORD:
            await asyncio.sleep(_PAUSE)
        size = self._whole()
        if not size:
            raise self._ending or await self.timed_out()
        records = bytes(self._buffer[:size])
        del self._buffer[:size]
        self._messages.forget(size)
        self._buffers.hold(self, len(self._buffer))
        return records

    def _whole(self) -> int:
        """Return how many of the buffered bytes make a step."""
        size = self._messages.whole(self._buffer)
        if self._messages.count > _MOST_RECORDS:
            self._end(_Failed(handshake_failed(f"more than {_MOST_RECORDS} records received")))
            return 0
        return size

    async def _until_readable(self) -> None:
        loop = asyncio.get_running_loop()
        self._readable = loop.create_future()
        loop.add_reader(self._connection, self._end_waiting)
        try:
            await self._readable
        finally:
            loop.remove_reader(self._connection)

    def _end_waiting(self) -> None:
        if self._readable and not self._readable.done():
            self._readable.set_result(None)

    def give_up(self) -> None:
        """End, to make room for others."""
        self._end(CheckFailed(TOO_BUSY))
        self._end_waiting()

    def close(self) -> None:
        """Drop what is buffered."""
        self._buffer.clear()
        self._buffers.hold(self, 0)

    def _end(self, ending: "_Failed | CheckFailed") -> None:
        """Note why nothing more is read, and drop what has arrived."""
        self._ending = ending
        self._messages = _Messages()
        self.close()

    def _receive(self, most: int) -> int:
        """Receive what has arrived, ``most`` bytes and a record at most; return how much it was."""
        before = self._received
        while not self._ending and self._received - before < most:
            try:
                self._add(self._connection.recv(_LARGEST_RECORD))
            except BlockingIOError:
                break
            except OSError as error:
                self._ending = _connection_failure(error)
        return self._received - before

    async def timed_out(self) -> "_Failed":
        """Return the failure of a peer that took too long.

        Raises:
            CheckFailed: This machine took too long, or has lost its network.
        """
        self._clock.require_fairness()
        await self._pacer.take(1)  # many may time out together
        with own_failures("could not receive"):
            WayToTarget(self._target).require_network(self._connection)
        return _Failed(handshake_failed("timed out", try_again=True))

    def _add(self, data: bytes) -> None:
        self._buffer += data
        self._received += len(data)
        if not data:
            self._ending = _Failed(handshake_failed("connection closed by peer", try_again=True))
        elif self._received > _MOST_RECEIVED:
            self._end(_Failed(handshake_failed(f"more than {_MOST_RECEIVED} bytes received")))
        else:
            self._buffers.hold(self, len(self._buffer))


class _Buffers:
    """How many bytes are buffered for all peers together."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._sizes: dict[_Incoming, int] = {}
        self._total = 0

    def hold(self, incoming: _Incoming, size: int) -> None:
        """Note how much one buffers; if all together buffer too much, end the oldest."""
        self._total += size - self._sizes.get(incoming, 0)
        if size:
            self._sizes[incoming] = size
        else:
            self._sizes.pop(incoming, None)
        while self._total > self._most:
            next(iter(self._sizes)).give_up()


class _Messages:
    """Finds where records end, and where messages end as long as they are not encrypted.

    OpenSSL can do nothing with a part of a message (RFC 8446 section 4, RFC 5246 section 7.4).

    Attributes:
        count: Whole records so far. Beyond ``_MOST_RECORDS`` it stops looking.
    """

    def __init__(self) -> None:
        self.count = 0
        self._looked_at = 0  # bytes of whole records
        self._whole = 0  # of these, those that end with a message
        self._can_be_told = True
        self._head = b""  # of a message that is not whole
        self._left = 0  # bytes of such a message

    def whole(self, data: bytearray) -> int:
        """Return how many bytes of ``data`` make a step: whole records that end with a message.

        All of them if it is not TLS.
        """
        while len(data) >= self._looked_at + 5 and self.count <= _MOST_RECORDS:
            end = _end_of_record(data, self._looked_at)
            if not end:
                return len(data)
            if end > len(data):
                break
            self._look_at(data[self._looked_at], data[self._looked_at + 5 : end])
            self._looked_at = end
            self.count += 1
            if not (self._head or self._left):
                self._whole = end
        return self._whole

    def missing(self, data: bytearray) -> int:
        """Return how many more bytes are needed, at the least, before that can change."""
        begun = len(data) - self._looked_at  # of the next record
        of_record = (_end_of_record(data, self._looked_at) - len(data)) if begun >= 5 else 5 - begun
        records = -(-self._left // _LARGEST_CONTENT)  # rounded up
        return max(of_record, self._left + 5 * records - begun)

    def forget(self, size: int) -> None:
        """Forget the first ``size`` bytes, which have been taken."""
        self._looked_at -= size
        self._whole -= size

    def _look_at(self, kind: int, content: bytearray) -> None:
        self._can_be_told &= kind == _HANDSHAKE  # what follows another kind may be encrypted
        position = 0
        while self._can_be_told and position < len(content):
            if self._left:
                size = min(self._left, len(content) - position)
                self._left -= size
            else:
                size = min(4 - len(self._head), len(content) - position)
                self._head += content[position : position + size]
                if len(self._head) == 4:
                    self._left = int.from_bytes(self._head[1:])
                    self._head = b""
                    self._can_be_told = self._left <= _LARGEST_CHAIN  # or OpenSSL refuses it
            position += size
        if not self._can_be_told:
            self._head, self._left = b"", 0


def _end_of_record(data: bytearray, start: int) -> int:
    """Return where the record at ``start`` ends (RFC 8446 section 5.1); 0 if it is none."""
    kind, version, length = struct.unpack_from("!BBxH", data, start)
    is_record = 20 <= kind <= 24 and version == 3 and length <= _LARGEST_RECORD
    return start + 5 + length if is_record else 0


def _connection_failure(error: OSError) -> _Failed | CheckFailed:
    if error.errno in OWN_TROUBLE or error.errno == errno.EPERM:  # this machine's own firewall
        return CheckFailed(f"could not send or receive: {error.strerror}")
    if isinstance(error, BrokenPipeError):  # the same, noticed when sending
        return _Failed(handshake_failed("Connection reset by peer", try_again=True))
    return _Failed(handshake_failed(error.strerror or str(error), try_again=True))


class _Step(NamedTuple):
    """The result of one step of a handshake."""

    output: bytes  # to be sent to the peer
    verdict: TlsVerdict | None  # None if the handshake goes on


class _HandshakeProcess:
    """Our side of ``handshake_process``: starts it, talks to it, ends it.

    Attributes:
        ready: Set when it has read the trusted certificates, or has failed to.
        trouble: Why it cannot make handshakes; None if it can.
        has_ended: Whether it has ended, whatever the reason.

    Raises:
        OSError: It cannot be started.
    """

    def __init__(self) -> None:
        self.ready = asyncio.Event()
        self.trouble: str | None = None
        self.has_ended = False
        self._loop = asyncio.get_running_loop()
        self._numbers = count(1)
        self._answers: dict[int, asyncio.Future[_Step]] = {}  # that are awaited, by handshake
        self._outbox: deque[bytes] = deque()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                process = subprocess.Popen(  # noqa: S603  # nothing in it is a stranger's
                    [
                        *(sys.executable, "-I", "-c", _PROGRAM),
                        *(str(Path(__file__).parent.parent), str(theirs.fileno())),
                    ],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    # It handles what strangers send, and our settings hold secrets.
                    env={key: os.environ[key] for key in os.environ if "PORT_CHECK" not in key},
                    process_group=0,  # Ctrl-C in a terminal is not for it
                )
            except OSError:
                self._socket.close()
                raise
        self._socket.setblocking(False)
        self._loop.add_reader(self._socket, self._receive)
        # Called at the end of the program, too, which does not wait for handshakes.
        self._kill = weakref.finalize(self, _kill, process, self._socket)

    @property
    def is_usable(self) -> bool:
        """Whether it has not ended, and the event loop that runs is the one that it talks to."""
        return not self.has_ended and self._loop is asyncio.get_running_loop()

    def handshake(self, expected: Sequence[Address | str], caller: str) -> "_Handshake":
        """Return a new handshake, to be begun."""
        return _Handshake(self, next(self._numbers), expected, caller)

    async def ask(self, number: int, message: bytes) -> _Step:
        """Send a message about a handshake, and return the answer."""
        if self.has_ended:
            raise _ProcessEnded
        answer: asyncio.Future[_Step] = self._loop.create_future()
        self._answers[number] = answer
        self.send(message)
        try:
            return await answer
        finally:
            del self._answers[number]

    def send(self, message: bytes) -> None:
        """Send a message after those before it, as soon as there is room."""
        if not self.has_ended:
            self._outbox.append(message)
            self._flush()

    def _flush(self) -> None:
        try:
            while self._outbox:
                self._socket.send(self._outbox[0])
                self._outbox.popleft()
        except BlockingIOError:
            self._loop.add_writer(self._socket, self._flush)
        except OSError:
            self._lose()
        else:
            self._loop.remove_writer(self._socket)

    def _receive(self) -> None:
        try:
            message = self._socket.recv(LARGEST_MESSAGE)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if not message:
            self._lose()
            return
        head, output = decode(message)
        if head["number"] == 0:
            self.trouble = head.get("trouble")
            self.ready.set()
            return
        answer = self._answers.get(head["number"])
        if not answer or answer.done():
            return
        if trouble := head["trouble"]:
            answer.set_exception(CheckFailed(trouble))
            return
        verdict = head["verdict"]
        if verdict:
            not_after = verdict["not_after"]
            verdict["not_after"] = not_after and datetime.fromisoformat(not_after)
            verdict["kind"] = TlsVerdictKind(verdict["kind"])
        answer.set_result(_Step(output, verdict and TlsVerdict(**verdict)))

    def _lose(self) -> None:
        if not self.ready.is_set():
            self.trouble = "the process that makes TLS handshakes could not start"
            self.ready.set()
        elif not self.trouble:
            logger.warning("The process that makes TLS handshakes was killed")
        self.end()

    def end(self) -> None:
        """End the process, whatever it does."""
        if self.has_ended:
            return
        self.has_ended = True
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(_ProcessEnded())
        self._kill()


def _kill(process: subprocess.Popen[bytes], channel: socket.socket) -> None:
    channel.close()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # with its forks
    process.wait()


class _Handshake:
    """One handshake in that process; a context manager, which drops it there at the end."""

    def __init__(
        self,
        process: _HandshakeProcess,
        number: int,
        expected: Sequence[Address | str],
        caller: str,
    ) -> None:
        self._process = process
        self._number = number
        self._expected = expected
        self._caller = caller

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send(encode({"number": self._number, "do": "end"}))

    async def begin(self) -> _Step:
        """Return what to send to the peer first."""
        name = next((name for name in self._expected if isinstance(name, str)), None)
        addresses = [str(address) for address in self._expected if not isinstance(address, str)]
        head = {"do": "begin", "caller": self._caller, "name": name, "addresses": addresses}
        return await self._process.ask(self._number, encode({"number": self._number, **head}))

    async def go_on(self, records: bytes) -> _Step:
        """Take a step with what the peer has sent."""
        while len(records) > _LARGEST_PIECE:
            piece, records = records[:_LARGEST_PIECE], records[_LARGEST_PIECE:]
            self._process.send(encode({"number": self._number, "do": "keep"}, piece))
        message = encode({"number": self._number, "do": "step"}, records)
        return await self._process.ask(self._number, message)
