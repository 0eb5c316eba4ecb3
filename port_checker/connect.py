"""One round: a connection attempt to each port at once, and a verdict for each.

This module is the one place that translates the operating system's errors. Its callers see no
``OSError``: an attempt ends in a ``Verdict`` on the target's port, or the whole round ends in
``CheckFailed`` because the trouble was the checker's own.
"""

import asyncio
import errno
import os
import select
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum

from port_checker.addresses import Address, parse_host
from port_checker.errors import ErrorCode, ServiceError
from port_checker.linux import (
    Route,
    RouteType,
    answers_itself,
    could_not_retransmit,
    refuses_itself,
    report_icmp_errors,
    round_trip_time,
    route_to,
    take_icmp_error,
)

# Seconds until the kernel forgets a connection that we closed, if the target does not acknowledge
# that or does not close its own end. By default it takes a minute and more (tcp(7),
# tcp_orphan_retries and tcp_fin_timeout), and strangers can make many. Long enough for four
# retransmissions on a way that loses packets.
_CLOSED_AFTER = 3

# Connections opened, or given up, in one turn of the event loop. One costs about 30 µs to open and
# close (measured), so everything else waits for about 2 ms at the most, however many there are.
_OPENED_PER_TURN = 64

# Of these, what one round gets while others wait; those who want no more than that go first.
_OPENED_PER_ROUND = 16


# The loop is late by some milliseconds now and then. What is later than this is a hold-up; and
# seconds of these, and the part of a timeout, from which on silence proves nothing.
_HOLD_UP = 0.1
_MOST_HELD_UP = 0.5
_MOST_HELD_UP_PART = 0.25

# Seconds in which something on this machine answers, however busy it is. Only of what has answered
# within that time, it is worth to ask whether it is this machine: a look at all connections.
_NEARBY = 0.02

# Pauses between such looks, in lengths of these.
_PAUSE = 3

HELD_UP = "it was held up while it waited for answers"

# Whoever accepts a connection to each address: a service mesh's sidecar, a transparent proxy.
_ANSWERS_ITSELF = (
    "something on this machine, a redirect of a proxy or a service mesh, answers in its place"
)


_REFUSES_ITSELF = (
    "this machine itself refuses in its place: a rule of its firewall resets what it sends, or "
    "leads it to a closed port here"
)


class VerdictKind(StrEnum):
    """How attempts to reach a port ended; the values are the words of the metrics."""

    OPEN = "accessible"
    REFUSED = "refused"
    TIMED_OUT = "timed_out"
    UNREACHABLE = "unreachable"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether one port can be reached.

    Attributes:
        kind: How the attempt ended.
        error: Why it failed, in the system's words (`Connection refused`); None if it did not.
    """

    kind: VerdictKind
    error: str | None = None

    @property
    def accessible(self) -> bool:
        """Whether a TCP connection to the port was established."""
        return self.kind is VerdictKind.OPEN


class CheckFailed(ServiceError):
    """The checker itself could not do its work, so nothing is known about the target.

    Attributes:
        ports: The ports to which this machine cannot connect, if it is about these alone.
    """

    code = ErrorCode.CHECK_FAILED

    def __init__(self, reason: str, ports: Sequence[int] = ()) -> None:
        super().__init__(reason)
        self.ports = list(ports)

    @property
    def message(self) -> str:
        """What went wrong and what to do, for people."""
        if self.ports:
            return (
                f"This service cannot connect to some of these ports ({self}). That says nothing "
                "about them, nor about the others. Leave them out, or try again later."
            )
        return (
            f"This service failed to check ({self}). That says nothing about your ports. "
            "Try again later."
        )


class _Forbidden(Exception):
    """This machine cannot connect to a port alone; the message says what is in the way."""


OPEN = Verdict(VerdictKind.OPEN)
REFUSED = Verdict(VerdictKind.REFUSED, "Connection refused")
TIMED_OUT = Verdict(VerdictKind.TIMED_OUT, "Connection timed out")
HOST_UNREACHABLE = Verdict(VerdictKind.UNREACHABLE, "No route to host")
NETWORK_UNREACHABLE = Verdict(VerdictKind.UNREACHABLE, "Network is unreachable")

# The verdict for each error of a socket (SO_ERROR). The texts are glibc's, written out because
# clients look for them and other C libraries use other words.
_VERDICTS = {
    # TCP gives these two only after the peer had answered our SYN with its own (Linux tcp_reset():
    # a reset of an attempt still under way is ECONNREFUSED). The port did accept the connection.
    errno.ECONNRESET: OPEN,
    errno.EPIPE: OPEN,
    errno.ECONNREFUSED: REFUSED,
    # From ICMP, sent by a router on the way or by the target.
    errno.EHOSTUNREACH: HOST_UNREACHABLE,
    errno.ENETUNREACH: NETWORK_UNREACHABLE,
}

# Errors of a socket that are this machine's own trouble, whatever the port. EACCES is not one of
# them: it comes from a packet, ICMPv6's "administratively prohibited" (Linux
# icmpv6_err_convert()), which a firewall on the provider's side has sent.
OWN_TROUBLE = {
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ENOBUFS,
    errno.EADDRNOTAVAIL,
    errno.ENETDOWN,
}

# Errors of connect() that say that this machine may not connect to this port: a firewall, a
# security module or a control group forbids it.
_FORBIDDEN = {errno.EACCES, errno.EPERM}

# Why a SYN could not be sent again. The kernel says nothing of the reason: TCP_INFO shows the same
# when a network device's queue is full as when a firewall's rule drops it.
_DROPPED = "this machine's own firewall or a full queue drops what it sends"

# IP version, and ICMP type and code, of the error that a host does not answer on its link.
_HOST_UNREACHABLE = {(4, 3, 1), (6, 1, 3)}


@contextmanager
def own_failures(trouble: str) -> Iterator[None]:
    """Turn an error of the operating system into the checker's own failure.

    Args:
        trouble: What could not be done; the system's words are appended.

    Raises:
        CheckFailed: The block raised ``OSError``, or lacked memory or a thread.
    """
    try:
        yield
    except OSError as error:
        raise CheckFailed(f"{trouble}: {error.strerror or error}") from error
    except MemoryError as error:
        raise CheckFailed(f"{trouble}: out of memory") from error
    except RuntimeError as error:
        if str(error) != "can't start new thread":
            raise
        raise CheckFailed(f"{trouble}: {error}") from error


class HoldUps:
    """Measures for how long an event loop was held up while somebody waits in it.

    A callback that takes long, or a pause of the process or of the whole machine: from within, all
    look alike.

    Attributes:
        waiting: How many wait.
    """

    def __init__(self) -> None:
        self.waiting = 0
        self._seconds = 0.0
        self._due: float | None = None  # when the loop is to call next

    @contextmanager
    def measured(self) -> Iterator[Callable[[], float]]:
        """Measure while the block runs; yields what returns the seconds of hold-ups in it."""
        loop = asyncio.get_running_loop()
        self.waiting += 1
        if self._due is None:
            self._call_again(loop)
        before = self._total(loop)
        try:
            yield lambda: self._total(loop) - before
        finally:
            self.waiting -= 1

    def _total(self, loop: asyncio.AbstractEventLoop) -> float:
        late = loop.time() - self._due if self._due else 0.0
        return self._seconds + (late if late > _HOLD_UP else 0.0)

    def _call_again(self, loop: asyncio.AbstractEventLoop) -> None:
        self._due = loop.time() + _HOLD_UP
        loop.call_at(self._due, self._on_call, loop)

    def _on_call(self, loop: asyncio.AbstractEventLoop) -> None:
        self._seconds = self._total(loop)
        self._due = None
        if self.waiting:
            self._call_again(loop)


class OpenConnectionPacer:
    """Spreads the opening of connections, and the end of attempts, over the turns of an event loop.

    All rounds share it, so that many which begin together do not hold up everything else. Those
    that want little go first, and the others take turns.

    Attributes:
        hold_ups: Of the loop, while rounds wait for answers.
        self_answers: For all rounds.
    """

    def __init__(self) -> None:
        self.hold_ups = HoldUps()
        self.self_answers = SelfAnswers()
        self._left = _OPENED_PER_TURN
        self._small: deque[tuple[asyncio.Future[int], int]] = deque()
        self._large: deque[tuple[asyncio.Future[int], int]] = deque()

    @property
    def share(self) -> int:
        """How many answers one round may take in one turn, so that all take few enough."""
        return max(1, _OPENED_PER_TURN // self.hold_ups.waiting)

    async def take(self, wanted: int) -> int:
        """Wait until it is the caller's turn; return how many it may do now, at least one."""
        loop = asyncio.get_running_loop()
        if not self._left:
            waiter: asyncio.Future[int] = loop.create_future()
            waiting = self._small if wanted <= _OPENED_PER_ROUND else self._large
            waiting.append((waiter, min(wanted, _OPENED_PER_ROUND)))
            return await waiter
        if self._left == _OPENED_PER_TURN:
            loop.call_soon(self._begin_turn, loop)
        return self._grant(wanted)

    def _grant(self, wanted: int) -> int:
        granted = min(wanted, self._left)
        self._left -= granted
        return granted

    def _begin_turn(self, loop: asyncio.AbstractEventLoop) -> None:
        self._left = _OPENED_PER_TURN
        while (self._small or self._large) and self._left:
            # Half of the turn is for those who want much, however many others there are.
            is_small = self._small and (not self._large or self._left > _OPENED_PER_TURN // 2)
            waiter, wanted = (self._small if is_small else self._large).popleft()
            if not waiter.done():  # it is if the round was cancelled
                waiter.set_result(self._grant(wanted))
        if self._left < _OPENED_PER_TURN:
            loop.call_soon(self._begin_turn, loop)


class SelfAnswers:
    """Finds out whether something on this machine answers in the place of targets.

    The kernel looks through all connections of this machine for that, and how many these are,
    strangers decide (10 ms beside 10,000: measured). So it does that in a thread, in one look for
    all who ask meanwhile, and with pauses that are longer than the looks.

    Args:
        look: Takes a source and targets; returns to which of these connections end here.
    """

    def __init__(
        self, look: Callable[[Address, Iterable[Address]], set[Address]] = answers_itself
    ) -> None:
        self._look_at = look
        self._asked: dict[Address, dict[Address, asyncio.Future[bool]]] = {}
        self._task: asyncio.Task[None] | None = None

    def ask(self, source: Address, target: Address) -> asyncio.Future[bool]:
        """Return whether connections from ``source`` to ``target`` end here, once that is known."""
        loop = asyncio.get_running_loop()
        targets = self._asked.setdefault(source, {})
        if target not in targets:
            targets[target] = loop.create_future()
        if not self._task:
            self._task = loop.create_task(self._look(loop))
        return targets[target]

    async def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        while self._asked:
            source, targets = self._asked.popitem()
            started = loop.time()
            here: set[Address] = set()
            try:
                here = await loop.run_in_executor(None, self._look_at, source, targets.keys())
            except OSError:
                pass  # not every kernel tells
            except (MemoryError, RuntimeError) as error:  # no thread can be started
                for answer in targets.values():
                    answer.set_exception(error)
                continue
            for target, answer in targets.items():
                answer.set_result(target in here)
            await asyncio.sleep(_PAUSE * (loop.time() - started))
        self._task = None


# Takes a port and what was found out about it.
OnVerdict = Callable[[int, Verdict], object]


async def attempt(
    target: Address,
    ports: Sequence[int],
    timeout: float,
    pacer: OpenConnectionPacer,
    on_verdict: OnVerdict | None = None,
) -> dict[int, Verdict]:
    """Try each of ``ports`` once, all at the same time.

    An established connection is closed at once; no byte is sent on it. However this ends,
    cancellation included, it leaves no socket open.

    Args:
        target: The address to connect to.
        ports: TCP ports, each at most once.
        timeout: Seconds that an attempt may last.
        pacer: Shared by all rounds of the event loop.
        on_verdict: Called with each verdict as soon as there is one; it must not raise.

    Returns:
        A verdict for each port, in no particular order; none for ports that were silent while this
        process was held up, which proves nothing.

    Raises:
        CheckFailed: The checker ran out of descriptors, memory, buffers or local ports; its own
            network is down; or it cannot connect to some of the ports, and names them all.
    """
    with own_failures("could not connect"):
        round_ = _Round(target, pacer, on_verdict)
        try:
            await round_.run(ports, timeout)
        finally:
            round_.close()
    return round_.verdicts


async def connect(
    target: Address, port: int, timeout: float, pacer: OpenConnectionPacer
) -> socket.socket | Verdict:
    """Try one port as ``attempt`` does, and hand over the connection instead of closing it.

    Returns:
        The connected socket, non-blocking, for the caller to ``close_for_good``; or why there is
        none.

    Raises:
        CheckFailed: As for ``attempt``.
    """
    with own_failures("could not connect"):
        round_ = _Round(target, pacer, keep_connected=True)
        try:
            await round_.run([port], timeout)
            if not (connected := round_.connected.pop(port, None)):
                if verdict := round_.verdicts.get(port):
                    return verdict
                raise CheckFailed(HELD_UP)
            connection = socket.socket(fileno=connected.detach())
            connection.setblocking(False)
            return connection
        finally:
            round_.close()


def close_for_good(connection: socket.SocketType) -> None:
    """Close a connection so that the kernel forgets it soon, too."""
    # The one is for a target that does not acknowledge our end of the connection (FIN-WAIT-1), the
    # other for one that does not close its own (FIN-WAIT-2). Without them it just takes longer.
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _CLOSED_AFTER * 1000)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_LINGER2, _CLOSED_AFTER)
    except OSError:  # ENOPROTOOPT, say, of another kind of socket (Multipath TCP)
        pass
    connection.close()


class _Round:
    """The sockets of one round, in an epoll of their own that the event loop watches.

    An epoll descriptor can itself be polled, so the loop watches one descriptor for each round
    instead of one for each port: a round of 100 costs little more than a bare epoll loop would,
    and closing the round cannot forget a callback. A closed socket leaves its epoll by itself.
    """

    def __init__(
        self,
        target: Address,
        pacer: OpenConnectionPacer,
        on_verdict: OnVerdict | None = None,
        *,
        keep_connected: bool = False,
    ) -> None:
        self._pacer = pacer
        self.verdicts: dict[int, Verdict] = {}
        self.forbidden: dict[int, str] = {}  # why this machine cannot connect, by port
        self.connected: dict[int, socket.SocketType] = {}  # by port; empty unless they are kept
        self._on_verdict = on_verdict
        self._keep_connected = keep_connected
        self._target = target
        self._is_here: bool | None = None  # whether the target is this machine, once it is known
        # Connected; to whom is not known, or asked for now.
        self._nearby: list[tuple[socket.SocketType, int]] = []
        self._asked_about: list[tuple[socket.SocketType, int]] = []
        self._ended: asyncio.Future[None] | None = None  # awaited: all attempts
        self._error: Exception | None = None  # why it cannot go on
        self._failed_at_once: dict[int, int] = {}  # the error, by port
        self._held_up = False  # while it waited
        self._known_route: Route | None = None
        self._is_network_fine = False
        self._host = str(target)
        self._family = socket.AF_INET if target.version == 4 else socket.AF_INET6
        self._waiting: dict[int, tuple[socket.SocketType, int]] = {}  # by descriptor
        self._epoll = select.epoll()

    async def run(self, ports: Sequence[int], timeout: float) -> None:
        """Try each of ``ports`` once; then there are verdicts, or it raises ``CheckFailed``."""
        opened = 0
        while opened < len(ports):
            few = await self._pacer.take(len(ports) - opened)
            self.open(ports[opened : opened + few])
            self.collect(few)
            opened += few
        await self.wait(timeout)
        while self.unanswered:
            granted = await self._pacer.take(self.unanswered)
            # A loop that is held up comes to its timers before it looks at what has arrived.
            granted -= self.collect(granted)
            self.give_up(min(granted, self.unanswered))
        if self._asked_about:
            await self._until_ended()
        if self.forbidden:
            reason = next(iter(self.forbidden.values()))
            raise CheckFailed(
                f"could not connect: {reason}", [port for port in ports if port in self.forbidden]
            )

    def open(self, ports: Sequence[int]) -> None:
        """Begin an attempt to each of ``ports``."""
        for port in ports:
            # Not socket.socket, which extends that type by files and a context manager, in Python:
            # making and closing it takes 7 % of a round (measured).
            sock = socket.SocketType(self._family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            descriptor = sock.fileno()
            self._waiting[descriptor] = sock, port
            if self._family == socket.AF_INET6:
                with suppress(OSError):  # as in close_for_good()
                    report_icmp_errors(sock)
            error = sock.connect_ex((self._host, port))
            if error in _FORBIDDEN:
                self.forbidden[port] = os.strerror(error)
                del self._waiting[descriptor]
                sock.close()
                continue
            if error != errno.EINPROGRESS:
                raise OSError(error, os.strerror(error))
            self._epoll.register(descriptor, select.EPOLLOUT)
            if error := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self._failed_at_once[port] = error

    def collect(self, most: int) -> int:
        """Collect the verdicts known so far: a loopback target's are when connect() returns.

        Args:
            most: How many answers to look at; the others are there the next time.

        Returns:
            How many attempts have ended by that.
        """
        answers = self._epoll.poll(0, most)
        before = self.unanswered
        for descriptor, events in answers:
            sock, port = self._waiting[descriptor]
            try:
                verdict = self._verdict(sock, port, events)
            except _Forbidden as reason:
                self.forbidden[port] = str(reason)
                sock.close()
            else:
                if verdict is OPEN:
                    if self._is_here or not self._may_be_here(sock):
                        self._accept(sock, port)
                    else:
                        self._nearby.append((sock, port))
                        self._epoll.unregister(descriptor)
                elif verdict:
                    self._add(port, verdict)
                    sock.close()
                else:
                    continue
            del self._waiting[descriptor]
        if self._nearby and not self._asked_about:
            self._ask_who_answers()
        return before - self.unanswered

    def _add(self, port: int, verdict: Verdict) -> None:
        self.verdicts[port] = verdict
        if self._on_verdict:
            self._on_verdict(port, verdict)

    def _accept(self, sock: socket.SocketType, port: int) -> None:
        self._add(port, OPEN)
        if self._keep_connected:
            self.connected[port] = sock
        else:
            close_for_good(sock)

    def _may_be_here(self, sock: socket.SocketType) -> bool:
        """Whether this machine may have answered, though the target is another one."""
        if self._target.is_loopback or round_trip_time(sock) > _NEARBY:
            return False
        route = self._route()
        return not route or route.type is not RouteType.LOCAL

    def _ask_who_answers(self) -> None:
        """Have those accepted that something else than this machine answers."""
        self._asked_about, self._nearby = self._nearby, []
        source = parse_host(self._asked_about[0][0].getsockname()[0])
        answer = self._pacer.self_answers.ask(source, self._target)
        answer.add_done_callback(self._accept_what_is_elsewhere)

    def _is_refused_here(self, port: int) -> bool:
        """Whether this machine refuses connections to a port, though the target is another one."""
        if self._target.is_loopback:
            return False
        if (route := self._route()) and route.type is RouteType.LOCAL:
            return False
        with suppress(OSError):  # not every kernel tells
            return refuses_itself(self._target, port)
        return False

    def _accept_what_is_elsewhere(self, answer: asyncio.Future[bool]) -> None:
        try:
            is_answered_here = answer.result()
            while self._asked_about:
                sock, port = self._asked_about.pop()
                if is_answered_here:
                    self.forbidden[port] = _ANSWERS_ITSELF
                    sock.close()
                else:
                    self._accept(sock, port)
            if self._nearby:
                self._ask_who_answers()
        except Exception as error:
            self._end(error)
        self._end_if_done()

    async def wait(self, timeout: float) -> None:
        """Wait until each attempt has ended, at most ``timeout`` seconds."""
        if not (self._waiting or self._asked_about):
            return
        loop = asyncio.get_running_loop()

        def on_events() -> None:
            try:
                self.collect(self._pacer.share)
            except OSError as error:
                self._end(error)
            self._end_if_done()

        loop.add_reader(self._epoll.fileno(), on_events)
        with self._pacer.hold_ups.measured() as held_up:
            try:
                await self._until_ended(timeout)
            finally:
                loop.remove_reader(self._epoll.fileno())
            self._held_up = held_up() > max(_MOST_HELD_UP, timeout * _MOST_HELD_UP_PART)

    async def _until_ended(self, timeout: float | None = None) -> None:
        loop = asyncio.get_running_loop()
        self._ended = loop.create_future()
        timer = None if timeout is None else loop.call_later(timeout, self._end)
        try:
            if not self._error:
                await self._ended
        finally:
            if timer:
                timer.cancel()
        if self._error:
            raise self._error

    def _end_if_done(self) -> None:
        if not (self._waiting or self._asked_about):
            self._end()

    def _end(self, error: Exception | None = None) -> None:
        """Wait for nothing more."""
        self._error = self._error or error
        if self._ended and not self._ended.done():
            self._ended.set_result(None)

    @property
    def unanswered(self) -> int:
        """How many attempts have not ended."""
        return len(self._waiting)

    def give_up(self, count: int) -> None:
        """End ``count`` attempts that have timed out."""
        for _ in range(count):
            _, (sock, port) = self._waiting.popitem()
            try:
                verdict = self._verdict_at_timeout(sock)
                if verdict is not TIMED_OUT or not self._held_up:
                    self._add(port, verdict)
            except _Forbidden as reason:
                self.forbidden[port] = str(reason)
            finally:
                sock.close()

    def close(self) -> None:
        """Give back every descriptor."""
        self._epoll.close()
        for sock, _ in self._waiting.values():
            sock.close()
        self._waiting.clear()
        for waiting in self._nearby, self._asked_about:
            for sock, _ in waiting:
                sock.close()
            waiting.clear()
        for sock in self.connected.values():
            close_for_good(sock)

    def _verdict(self, sock: socket.SocketType, port: int, events: int) -> Verdict | None:
        """The verdict of an attempt that an event has ended; None if it goes on."""
        if events == select.EPOLLOUT:
            return REFUSED if self._is_echo(sock, port) else OPEN
        if error := self._failed_at_once.pop(port, 0):
            verdict = self._verdict_of(sock, error)
            if verdict is REFUSED and self._is_refused_here(port):
                raise _Forbidden(_REFUSES_ITSELF)
            return verdict
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        # The kernel queues an ICMP error, which is an event, before it sets SO_ERROR: in between
        # there is no verdict yet (seen on Linux 6.18). The event will come again.
        return self._verdict_of(sock, error) if error else None

    def _verdict_at_timeout(self, sock: socket.SocketType) -> Verdict:
        # The kernel puts an ICMP error aside while the socket is in use; SO_ERROR returns it.
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        return self._verdict_of(sock, error or errno.ETIMEDOUT)

    def _verdict_of(self, sock: socket.SocketType, error: int) -> Verdict:
        if error in OWN_TROUBLE:
            raise OSError(error, os.strerror(error))
        if error == errno.EPERM:
            raise _Forbidden(os.strerror(error))
        if error == errno.ETIMEDOUT:  # or the kernel gave up before we did (tcp_syn_retries)
            if could_not_retransmit(sock):
                self._require_network()  # or it is the gateway that is gone
                raise _Forbidden(_DROPPED)
            if not self.verdicts:  # what has answered shows that the network is fine
                self._require_network()
            return TIMED_OUT
        self._require_other_sender(sock, error)
        return _VERDICTS.get(error) or Verdict(VerdictKind.OTHER, os.strerror(error))

    def _require_other_sender(self, sock: socket.SocketType, error: int) -> None:
        """Require that another machine sent the ICMP error that ended an attempt.

        If this machine itself did, that is the checker's fault, with two exceptions: a host on a
        link of ours that does not answer, which this machine reports; and a target that is this
        machine.
        """
        icmp = take_icmp_error(sock)
        if icmp is None:
            # The kernel's own error, while it looked for a way; or it kept no record of another's.
            if error in (errno.EHOSTUNREACH, errno.ENETUNREACH):
                self._require_network()
            return
        own = parse_host(sock.getsockname()[0])
        if own == self._target or icmp.sender != own:
            return
        if (own.version, icmp.type, icmp.code) not in _HOST_UNREACHABLE:
            raise _Forbidden("this machine's own firewall rejects what it sends")
        self._require_network()
        if (route := self._route()) and route.next_hop:
            raise CheckFailed("the gateway of this machine's route does not answer")

    def _require_network(self) -> None:
        """Require that packets to the target leave this machine, as far as its next hop.

        Raises:
            CheckFailed: They do not.
        """
        if self._is_network_fine:
            return
        self._known_route = None  # it may have changed
        route = self._route()
        trouble = route.trouble() if route else f"this machine has no route to {self._target}"
        if trouble:
            raise CheckFailed(trouble)
        self._is_network_fine = True

    def _route(self) -> Route | None:
        self._known_route = self._known_route or route_to(self._target)
        return self._known_route

    def _is_echo(self, sock: socket.SocketType, port: int) -> bool:
        """Whether the socket is connected to itself (a simultaneous open, RFC 9293 section 3.5).

        The kernel may choose the port being checked as the local one, if it is ephemeral and the
        target is this machine. If it is not, there is no need to ask for each port.
        """
        if self._is_here is False:
            return False
        host, local_port = sock.getsockname()[:2]
        if self._is_here is None:
            self._is_here = parse_host(host) == self._target
        return self._is_here and bool(local_port == port)
