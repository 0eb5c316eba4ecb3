"""One round: a connection attempt to each port at once, and a verdict for each.

This module is the one place that translates the operating system's errors. Its callers see no
``OSError``: an attempt ends in a ``Verdict`` on the target's port, or the whole round ends in
``CheckFailed`` because the trouble was the checker's own.
"""

import asyncio
import errno
import math
import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum

from port_checker.addresses import Address, parse_host, text_of
from port_checker.errors import ErrorCode, ServiceError
from port_checker.linux import (
    ConnectionsHere,
    Route,
    RouteType,
    answers_itself,
    could_not_retransmit,
    is_connecting,
    is_tracked,
    refuses_itself,
    report_icmp_errors,
    round_trip_time,
    route_to,
    route_type,
    take_icmp_error,
)

# Seconds until the kernel forgets a connection that we closed, if the target does not acknowledge
# that or does not close its own end. By default it takes a minute or more (tcp(7),
# tcp_orphan_retries and tcp_fin_timeout), and strangers can cause many. Three seconds are enough
# for four retransmissions on a path that loses packets.
_CLOSED_AFTER = 3

# The most connections opened, or ended, in one turn of the event loop: as many as a provider has
# ports by default. One costs about 30 µs to open and close (measured), so everything else waits for
# about 3 ms at most, however many there are.
PER_TURN = 100

# A round of no more ports than this goes before larger ones.
_SMALL = 16

_TCP = socket.SOCK_STREAM | socket.SOCK_NONBLOCK
_ONE_EVENT = select.EPOLLOUT | select.EPOLLONESHOT


# Seconds. An event loop that is later than the first is held up; some milliseconds are usual. After
# hold-ups of more than the second in all, or than that part of the timeout, silence proves nothing.
_HOLD_UP = 0.1
_MOST_HELD_UP = 0.5
_MOST_HELD_UP_PART = 0.25

# Seconds for which a network that was fine is assumed to be fine: attempts that began together end
# within that time.
_STAYS_FINE = 0.5

# Seconds within which this machine answers itself, however busy it is. Only what has answered
# sooner can be this machine.
_NEARBY = 0.02

# Seconds within which it usually does.
_HERE = 0.001

# The pause after a look through all connections, in multiples of the CPU time that it took.
_PAUSE = 3

HELD_UP = "it was held up while it waited for answers"

# For whatever accepts connections to any address: a service mesh's sidecar, a transparent proxy.
_ANSWERS_ITSELF = (
    "something on this machine, a redirect of a proxy or a service mesh, answers in its place"
)


_REFUSES_ITSELF = (
    "this machine itself refuses in its place: a rule of its firewall resets what it sends, or "
    "leads it to a closed port here"
)


class VerdictKind(StrEnum):
    """How an attempt to reach a port ended; the values are the words of the metrics."""

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

_REJECTS_ITSELF = "this machine's own firewall or tunnel rejects what it sends"

# Errors of a socket that come from the peer's resets.
_FROM_RESETS = {errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE}

# IP version, and ICMP type and code, of the error that a host does not answer on its link.
_HOST_UNREACHABLE = {(4, 3, 1), (6, 1, 3)}


class own_failures:  # noqa: N801  # a context manager, as contextlib's are
    """Turns an error of the operating system into the checker's own failure.

    A generator would take three times as long (measured), several times in each request.

    Args:
        trouble: What could not be done; the system's words are appended.

    Raises:
        CheckFailed: The block raised ``OSError``, or lacked memory or a thread.
    """

    def __init__(self, trouble: str) -> None:
        self._trouble = trouble

    def __enter__(self) -> None: ...

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        match error:
            case None:
                pass
            case OSError():
                raise CheckFailed(f"{self._trouble}: {error.strerror or error}") from error
            case MemoryError():
                raise CheckFailed(f"{self._trouble}: out of memory") from error
            case RuntimeError() if str(error) == "can't start new thread":
                raise CheckFailed(f"{self._trouble}: {error}") from error


_connecting = own_failures("could not connect")


class HoldUps:
    """Measures how long an event loop was held up while something waits in it.

    A slow callback, a pause of the process and one of the whole machine look alike from within.
    """

    def __init__(self) -> None:
        self._waiting = 0
        self._seconds = 0.0
        self._due = math.inf  # when the loop is to call next

    def begin(self) -> float:
        """Measure from now on; pass what this returns to ``end``."""
        loop = asyncio.get_running_loop()
        self._waiting += 1
        if self._due == math.inf:
            self._look(loop)
        return self._total(loop)

    def end(self, begun: float) -> float:
        """Return the seconds of hold-ups since then."""
        self._waiting -= 1
        return self._total(asyncio.get_running_loop()) - begun

    def _total(self, loop: asyncio.AbstractEventLoop) -> float:
        late = loop.time() - self._due
        return self._seconds + (late if late > _HOLD_UP else 0.0)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._seconds = self._total(loop)
        self._due = math.inf
        if self._waiting:
            self._due = loop.time() + _HOLD_UP
            loop.call_at(self._due, self._look, loop)


class OpenConnectionPacer:
    """Spreads the opening of connections, and the end of attempts, over the turns of an event loop.

    All rounds share it, so that many that begin together do not hold up everything else. Small ones
    go first, and the others take turns. For one event loop at a time.

    Attributes:
        hold_ups: Of the loop, while rounds wait for answers.
        self_answers: Finds out for all rounds whether this machine answers itself.
        connections_here: Finds out which connections end here, at the target's own address.
        sockets: The sockets of all rounds.
    """

    def __init__(self) -> None:
        self.connections_here = ConnectionsHere()
        self.sockets = SharedEpoll()
        self.enter_loop()
        self._left = PER_TURN
        self._small: _Waiting = deque()
        self._large: dict[object, _Waiting] = {}  # by whose they are: the next one's first

    def enter_loop(self) -> None:
        """Drop what belongs to the former event loop, if there was one: its timer and its task."""
        self.hold_ups = HoldUps()
        self.self_answers = SelfAnswers()

    async def take(self, wanted: int, whose: object = None) -> None:
        """Wait until it is the caller's turn.

        Args:
            wanted: How many connections it would open or end: up to ``PER_TURN``.
            whose: Who takes turns with others. Calls with the same value wait for each other.
        """
        loop = asyncio.get_running_loop()
        if self._left <= 0 or self._small or self._large:
            waiter: asyncio.Future[None] = loop.create_future()
            is_small = wanted <= _SMALL
            waiting = self._small if is_small else self._large.setdefault(whose, deque())
            waiting.append((waiter, wanted))
            await waiter
        else:
            if self._left == PER_TURN:
                loop.call_soon(self._begin_turn, loop)
            # All of them in this turn, however few are left: its timeout begins when it has opened
            # all.
            self._left -= wanted

    def _begin_turn(self, loop: asyncio.AbstractEventLoop) -> None:
        self._left = PER_TURN
        while (self._small or self._large) and self._left > 0:
            # Half of the turn is for those who want much, however many others there are.
            if self._small and (not self._large or self._left > PER_TURN // 2):
                waiter, wanted = self._small.popleft()
            else:
                whose = next(iter(self._large))
                waiting = self._large.pop(whose)
                waiter, wanted = waiting.popleft()
                if waiting:
                    self._large[whose] = waiting
            if not waiter.done():  # it is if the round was cancelled
                waiter.set_result(None)
                self._left -= wanted
        if self._left < PER_TURN:
            loop.call_soon(self._begin_turn, loop)


# Futures of those that wait, and how many connections each wants.
_Waiting = deque[tuple[asyncio.Future[None], int]]


class SelfAnswers:
    """Finds out whether something on this machine answers in the place of targets.

    The kernel has to look through all connections of this machine for that, and strangers decide
    how many these are (10 ms beside 10,000: measured). So a thread does it, in one look for all who
    ask meanwhile, and with pauses.

    Args:
        look: Tells whether connections from a source address end here.
    """

    def __init__(self, look: Callable[[Address], bool] = answers_itself) -> None:
        self._look_at = look
        self._asked: dict[Address, asyncio.Future[bool]] = {}
        self._task: asyncio.Task[None] | None = None

    def ask(self, source: Address) -> asyncio.Future[bool]:
        """Return a future of whether connections from ``source`` to others end here."""
        loop = asyncio.get_running_loop()
        if source not in self._asked:
            self._asked[source] = loop.create_future()
        if not self._task:
            self._task = loop.create_task(self._look(loop))
        return self._asked[source]

    async def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        while self._asked:
            source = next(iter(self._asked))
            answer = self._asked.pop(source)
            try:
                is_here, work = await loop.run_in_executor(None, self._time, source)
            except (MemoryError, RuntimeError) as error:  # no thread can be started
                answer.set_exception(error)
                continue
            answer.set_result(is_here)
            await asyncio.sleep(_PAUSE * work)
        self._task = None

    def _time(self, source: Address) -> tuple[bool, float]:
        """Return the result of a look, and how many seconds of CPU it took."""
        is_here = False
        started = time.thread_time()
        with suppress(OSError):  # not every kernel tells
            is_here = self._look_at(source)
        return is_here, time.thread_time() - started


class SharedEpoll:
    """The sockets of all rounds, in one epoll that the event loop watches.

    An epoll descriptor can itself be polled, so the loop watches one descriptor rather than one for
    each socket. One for each round would be added to the loop and taken out again, which takes ten
    system calls with uvloop, and half of the time that a check of one port takes at a distance
    (measured).
    """

    def __init__(self) -> None:
        self._epoll: select.epoll
        self._loop: asyncio.AbstractEventLoop | None = None
        self._rounds: dict[int, _Round] = {}  # by descriptor

    def begin(self) -> bool:
        """Have the running event loop watch it; return whether it is another one than before.

        Raises:
            OSError: There is no descriptor left, say.
        """
        loop = asyncio.get_running_loop()
        if loop is self._loop:
            return False
        if not self._loop:
            self._epoll = select.epoll()
        loop.add_reader(self._epoll.fileno(), self.collect)
        self._loop = loop
        return True

    def add(self, descriptors: Iterable[int], round_: "_Round") -> None:
        """Watch sockets of a round until each has had one event.

        After that, a socket that we have closed causes no more events, even if a process that was
        forked meanwhile keeps it open.
        """
        for descriptor in descriptors:
            self._epoll.register(descriptor, _ONE_EVENT)
            self._rounds[descriptor] = round_

    def remove(self, descriptors: Iterable[int]) -> None:
        """Forget sockets that are about to be closed, whether they have had their event or not."""
        for descriptor in descriptors:
            if self._rounds.pop(descriptor, None):
                self._epoll.unregister(descriptor)

    def collect(self) -> None:
        """Hand their events to the rounds."""
        of_rounds: dict[_Round, list[tuple[int, int]]] = {}
        for event in self._epoll.poll(0, PER_TURN):
            of_rounds.setdefault(self._rounds.pop(event[0]), []).append(event)
        for round_, events in of_rounds.items():
            for descriptor in round_.take(events):
                self._rounds[descriptor] = round_
                self._epoll.modify(descriptor, _ONE_EVENT)


# Called with a port and the verdict on it.
OnVerdict = Callable[[int, Verdict], object]


async def attempt(
    way: "WayToTarget",
    ports: Sequence[int],
    timeout: float,
    pacer: OpenConnectionPacer,
    on_verdict: OnVerdict | None = None,
) -> dict[int, Verdict]:
    """Try each of ``ports`` once, all at the same time.

    An established connection is closed at once; no byte is sent on it. However this ends,
    cancellation included, it leaves no socket open.

    Args:
        way: The way to the target; the rounds of one check share what is known of it.
        ports: TCP ports, each at most once, up to ``PER_TURN``.
        timeout: Seconds that an attempt may last.
        pacer: Shared by all rounds of the event loop.
        on_verdict: Called with each verdict as soon as there is one; it must not raise.

    Returns:
        A verdict for each port, in no particular order. Ports that were silent while this process
        was held up have none: that proves nothing.

    Raises:
        CheckFailed: The checker ran out of descriptors, memory, buffers or local ports; its own
            network is down; or it cannot connect to some of the ports, and names them all.
    """
    with _connecting:
        round_ = _Round(way, pacer, on_verdict)
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
    with _connecting:
        round_ = _Round(WayToTarget(target), pacer, keep_connected=True)
        try:
            await round_.run([port], timeout)
            if not (connected := round_.connected.pop(port, None)):
                if verdict := round_.verdicts.get(port):
                    return verdict
                raise CheckFailed(HELD_UP)
            connection = socket.socket(fileno=connected.detach())
            connection.setblocking(False)
            if target.version == 6:
                with suppress(OSError):  # as in close_for_good()
                    report_icmp_errors(connection, False)
            return connection
        finally:
            round_.close()


def close_for_good(connection: socket.SocketType) -> None:
    """Close a connection so that the kernel soon forgets it, too."""
    # The first is for a target that does not acknowledge our FIN (FIN-WAIT-1), the second for one
    # that does not send its own (FIN-WAIT-2). Without them it just takes longer.
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _CLOSED_AFTER * 1000)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_LINGER2, _CLOSED_AFTER)
    except OSError:  # ENOPROTOOPT, say, of another kind of socket (Multipath TCP)
        pass
    connection.close()


class WayToTarget:
    """What is known of the way to a target while it is being checked.

    Args:
        target: Its address.

    Attributes:
        target: As given.
        host: Its text, for sockets.
        is_loopback: Whether it is a loopback address.
        is_here: Whether the target is this machine; None until that is known.
    """

    def __init__(self, target: Address) -> None:
        self.target = target
        self.host = text_of(target)
        self.is_loopback = target.is_loopback
        self.is_here: bool | None = None
        self._route: Route | None = None
        self._fine_until = 0.0

    def route(self) -> Route | None:
        """Return the kernel's route to the target."""
        self._route = self._route or route_to(self.target)
        return self._route

    def require_network(self, sock: socket.SocketType, port: int | None = None) -> None:
        """Require that packets to the target leave this machine, and answers can arrive.

        It sees no further than the next hop. Called when nothing has arrived.

        Args:
            sock: The socket that waits for answers.
            port: The port that it waits for, which rules may look at.

        Raises:
            CheckFailed: They do not, or cannot.
            OSError: The kernel cannot tell now.
        """
        now = time.monotonic()
        if now < self._fine_until:
            return
        source = parse_host(sock.getsockname()[0])
        # It may have changed. IPv4 looks for it once the socket has an address (Linux
        # ip_route_connect()), IPv6 before that.
        route = route_to(self.target, source if source.version == 4 else None, port)
        self._route = route
        is_usual = route and source == route.source
        if not (is_usual or source == self.target or route_type(source) is RouteType.LOCAL):
            raise CheckFailed(f"this machine no longer has the address {source}")
        if not route:
            raise CheckFailed(f"this machine has no route to {self.target}")
        if trouble := route.source_trouble(self.target) or route.trouble():
            raise CheckFailed(trouble)
        self._fine_until = now + _STAYS_FINE


class _Round:
    """The sockets of one round."""

    def __init__(
        self,
        way: WayToTarget,
        pacer: OpenConnectionPacer,
        on_verdict: OnVerdict | None = None,
        *,
        keep_connected: bool = False,
    ) -> None:
        self.verdicts: dict[int, Verdict] = {}
        self.forbidden: dict[int, str] = {}  # why this machine cannot connect, by port
        self.connected: dict[int, socket.SocketType] = {}  # by port; empty unless they are kept
        self._way = way
        self._pacer = pacer
        self._sockets = pacer.sockets
        self._on_verdict = on_verdict
        self._keep_connected = keep_connected
        # Connected, perhaps to this machine; and those for which that is being found out.
        self._nearby: dict[int, socket.SocketType] = {}  # by port
        self._asked_about: dict[int, socket.SocketType] = {}
        self._answered_at_once: set[int] = set()  # ports
        self._failed_at_once: dict[int, int] = {}  # errors within connect(), by port
        self._held_up = False  # for too long, while it waited
        self._waiting: dict[int, tuple[socket.SocketType, int]] = {}  # with ports, by descriptor
        self._ended: asyncio.Future[None] | None = None  # while it waits
        self._error: Exception | None = None  # the one that ends it

    async def run(self, ports: Sequence[int], timeout: float) -> None:
        """Try each of ``ports`` once; then there are verdicts, or it raises ``CheckFailed``."""
        if self._sockets.begin():
            self._pacer.enter_loop()
        await self._pacer.take(len(ports), self._way)
        descriptors = self.open(ports)
        if self._way.is_loopback:  # their events are there by now
            self._take(_events(descriptors))
        if self._waiting:
            self._sockets.add(descriptors, self)
            await self.wait(timeout)
        if self._waiting:
            await self._pacer.take(len(self._waiting), self._way)
            self.give_up()
            self._raise_error()
        if self._asked_about:
            await self._until_ended()
        if self.forbidden:
            reason = next(iter(self.forbidden.values()))
            raise CheckFailed(
                f"could not connect: {reason}", [port for port in ports if port in self.forbidden]
            )

    def open(self, ports: Sequence[int]) -> Iterable[int]:
        """Begin an attempt to each of ``ports``; return the descriptors of those that go on."""
        host, is_ipv6 = self._way.host, self._way.target.version == 6
        is_elsewhere = not self._way.is_loopback
        family = socket.AF_INET6 if is_ipv6 else socket.AF_INET
        for port in ports:
            # Not socket.socket, which extends that type by files and a context manager, in Python:
            # making and closing it takes 7 % of a round (measured).
            sock = socket.SocketType(family, _TCP)
            descriptor = sock.fileno()
            self._waiting[descriptor] = sock, port
            if is_ipv6:
                with suppress(OSError):  # as in close_for_good()
                    report_icmp_errors(sock)
            error = sock.connect_ex((host, port))
            if error == errno.EINPROGRESS:
                # What fails at once, this machine may refuse itself.
                if is_elsewhere and (error := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)):
                    self._failed_at_once[port] = error
            elif error in _FORBIDDEN:
                del self._waiting[descriptor]
                self._forbid(sock, port, os.strerror(error))
            else:
                raise OSError(error, os.strerror(error))
        return self._waiting.keys()

    def take(self, events: Iterable[tuple[int, int]]) -> list[int]:
        """End the attempts that events have decided; return the descriptors of undecided ones."""
        undecided: list[int] = []
        try:
            undecided = self._take(events)
        except Exception as error:
            self._error = self._error or error
        self._end_if_done()
        return undecided

    def _take(self, events: Iterable[tuple[int, int]]) -> list[int]:
        undecided = []
        for descriptor, event in events:
            sock, port = self._waiting[descriptor]
            try:
                verdict = self._verdict(sock, port, event)
                if verdict is None:
                    undecided.append(descriptor)
                    continue
                if verdict is not OPEN:
                    self._add(port, verdict)
                    sock.close()
                elif self._is_near(sock, port):
                    self._nearby[port] = sock
                else:
                    self._accept(sock, port)
            except _Forbidden as reason:
                self._forbid(sock, port, str(reason))
            del self._waiting[descriptor]
        if self._nearby and not self._asked_about:
            self._ask_who_answers()
        return undecided

    def _raise_error(self) -> None:
        if self._error:
            try:
                raise self._error
            finally:
                self._error = None  # its traceback refers to this round

    def _add(self, port: int, verdict: Verdict) -> None:
        self.verdicts[port] = verdict
        if self._on_verdict:
            self._on_verdict(port, verdict)

    def _forbid(self, sock: socket.SocketType, port: int, reason: str) -> None:
        self.forbidden[port] = reason
        sock.close()

    def _accept(self, sock: socket.SocketType, port: int) -> None:
        self._add(port, OPEN)
        if self._keep_connected:
            self.connected[port] = sock
        else:
            close_for_good(sock)

    def _is_near(self, sock: socket.SocketType, port: int) -> bool:
        """Whether this machine may have answered, though the target is another one."""
        if self._way.is_here or self._way.is_loopback:
            return False
        seconds = round_trip_time(sock)
        if seconds <= _HERE:
            self._answered_at_once.add(port)
        return seconds <= _NEARBY

    def _ask_who_answers(self) -> None:
        """Accept connections that end elsewhere: now, or once it is known where they end."""
        self._asked_about, self._nearby = self._nearby, {}
        posing: set[int] = set()
        with suppress(OSError):  # not every kernel tells
            posing = self._pacer.connections_here.ports(self._way.target, self._asked_about)
        suspects = posing.union(
            port
            for port, sock in self._asked_about.items()
            if port in self._answered_at_once or is_tracked(sock)
        )
        if suspects and (route := self._way.route()) and route.type is RouteType.LOCAL:
            suspects, posing = set(), set()
        for port in [*self._asked_about]:
            if port in posing:
                self._forbid(self._asked_about.pop(port), port, _ANSWERS_ITSELF)
            elif port not in suspects:
                self._accept(self._asked_about.pop(port), port)
        if self._asked_about:
            sock = next(iter(self._asked_about.values()))
            source = parse_host(sock.getsockname()[0])
            answer = self._pacer.self_answers.ask(source)
            answer.add_done_callback(self._accept_what_is_elsewhere)

    def _is_refused_here(self, port: int) -> bool:
        """Whether this machine refuses connections to a port, though the target is another one."""
        if (route := self._way.route()) and route.type is RouteType.LOCAL:
            return False
        with suppress(OSError):  # not every kernel tells
            return refuses_itself(self._way.target, port)
        return False

    def _accept_what_is_elsewhere(self, answer: asyncio.Future[bool]) -> None:
        try:
            is_answered_here = answer.result()
            while self._asked_about:
                port, sock = self._asked_about.popitem()
                if is_answered_here:
                    self._forbid(sock, port, _ANSWERS_ITSELF)
                else:
                    self._accept(sock, port)
            if self._nearby:
                self._ask_who_answers()
        except Exception as error:
            self._error = self._error or error
        self._end_if_done()

    async def wait(self, timeout: float) -> None:
        """Wait until each attempt has ended, at most ``timeout`` seconds."""
        hold_ups = self._pacer.hold_ups
        begun = hold_ups.begin()
        try:
            await self._until_ended(timeout)
        finally:
            held_up = hold_ups.end(begun)
        self._held_up = held_up > max(_MOST_HELD_UP, timeout * _MOST_HELD_UP_PART)

    async def _until_ended(self, timeout: float | None = None) -> None:
        loop = asyncio.get_running_loop()
        self._ended = loop.create_future()
        timer = None if timeout is None else loop.call_later(timeout, _settle, self._ended)
        try:
            await self._ended
        finally:
            if timer:
                timer.cancel()
            self._ended = None
        self._raise_error()

    def _end_if_done(self) -> None:
        if self._ended and (self._error or not (self._waiting or self._asked_about)):
            _settle(self._ended)

    def give_up(self) -> None:
        """End the attempts that have timed out."""
        # A loop that was held up runs its timers before it looks at what has arrived.
        self._sockets.remove(self._waiting)
        self._take(_events(self._waiting))
        for descriptor in [*self._waiting]:
            sock, port = self._waiting.pop(descriptor)
            try:
                # The kernel sets an ICMP error aside while a socket is in use; SO_ERROR returns it.
                error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                verdict = self._verdict_of(sock, port, error or errno.ETIMEDOUT)
                if verdict is not TIMED_OUT or not self._held_up:
                    self._add(port, verdict)
            except _Forbidden as reason:
                self.forbidden[port] = str(reason)
            finally:
                sock.close()

    def close(self) -> None:
        """Give back every descriptor."""
        if not (self._waiting or self._nearby or self._asked_about or self.connected):
            return
        self._sockets.remove(self._waiting)
        for sock, _ in self._waiting.values():
            sock.close()
        self._waiting.clear()
        for waiting in self._nearby, self._asked_about:
            for sock in waiting.values():
                sock.close()
            waiting.clear()
        for sock in self.connected.values():
            close_for_good(sock)

    def _verdict(self, sock: socket.SocketType, port: int, events: int) -> Verdict | None:
        """Return the verdict after an event; None if the attempt goes on."""
        if events == select.EPOLLOUT:
            if not self._way.is_loopback:
                self._require_peer(sock, port)
            return REFUSED if self._is_echo(sock, port) else OPEN
        if error := self._failed_at_once.pop(port, 0):
            verdict = self._verdict_of(sock, port, error)
            if verdict is REFUSED and self._is_refused_here(port):
                raise _Forbidden(_REFUSES_ITSELF)
            return verdict
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        # The kernel queues an ICMP error, which is an event, before it sets SO_ERROR: in between
        # there is no verdict yet (seen on Linux 6.18). The event will come again.
        return self._verdict_of(sock, port, error) if error else None

    def _verdict_of(self, sock: socket.SocketType, port: int, error: int) -> Verdict:
        if error in OWN_TROUBLE:
            raise OSError(error, os.strerror(error))
        if error == errno.EPERM:
            raise _Forbidden(os.strerror(error))
        if error == errno.ETIMEDOUT:  # or the kernel gave up before we did (tcp_syn_retries)
            self._way.require_network(sock, port)
            if could_not_retransmit(sock):
                raise _Forbidden(_DROPPED)
            return TIMED_OUT
        self._require_other_sender(sock, port, error)
        return _VERDICTS.get(error) or Verdict(VerdictKind.OTHER, os.strerror(error))

    def _require_other_sender(self, sock: socket.SocketType, port: int, error: int) -> None:
        """Require that another machine sent the ICMP error that ended an attempt.

        If this machine itself did, that is the checker's fault, with two exceptions: a host on a
        link of ours that does not answer, which this machine reports; and a target that is this
        machine.
        """
        way = self._way
        icmp = take_icmp_error(sock)
        if icmp is None:
            # A reset; the kernel's own error while it looked for a route; or an ICMP error that it
            # has not recorded (Linux before 5.8), which ends the attempt.
            if error in _FROM_RESETS:
                return
            way.require_network(sock, port)
            if is_connecting(sock):
                raise CheckFailed(f"this machine had no route to {way.target} for a while")
            return
        # Not always from the socket's own address: IPv4 prefers the first one of a network.
        if icmp.sender == way.target or route_type(icmp.sender) is not RouteType.LOCAL:
            return
        if (icmp.sender.version, icmp.type, icmp.code) not in _HOST_UNREACHABLE:
            raise _Forbidden(_REJECTS_ITSELF)
        way.require_network(sock, port)
        route = way.route()
        if route and route.next_hop:
            raise CheckFailed("the gateway of this machine's route does not answer")
        if route and not route.asks_in_vain(way.target):
            raise _Forbidden(_REJECTS_ITSELF)

    def _require_peer(self, sock: socket.SocketType, port: int) -> None:
        """Require that a connection leads to the target.

        A program in the kernel may lead it elsewhere within connect(): eBPF's
        BPF_CGROUP_INET4_CONNECT, as some service meshes use it.

        Raises:
            _Forbidden: It leads elsewhere.
        """
        way = self._way
        try:
            host, peer_port = sock.getpeername()[:2]
        except OSError:  # it has been reset already
            return
        if peer_port != port or (host != way.host and parse_host(host) != way.target):
            raise _Forbidden(_ANSWERS_ITSELF)

    def _is_echo(self, sock: socket.SocketType, port: int) -> bool:
        """Whether the socket is connected to itself (a simultaneous open, RFC 9293 section 3.5).

        If the target is this machine, the kernel may choose the very port being checked, if it is
        an ephemeral one, as the local port. Otherwise there is no need to look at each port.
        """
        way = self._way
        if way.is_here is False:
            return False
        own: tuple[str, int] = sock.getsockname()
        if way.is_here is None:
            way.is_here = own[0] == way.host or parse_host(own[0]) == way.target
        return way.is_here and own[1] == port


def _events(descriptors: Iterable[int]) -> list[tuple[int, int]]:
    """Return the events that sockets have now."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLOUT)
    return poll.poll(0)


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
