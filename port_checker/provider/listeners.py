"""Temporary listeners that record incoming connections."""

import asyncio
import contextlib
import errno
import os
import re
import select
import socket
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Self

from port_checker.addresses import MAX_PORT, Address, parse_host
from port_checker.linux import TcpSocket, TcpState, ephemeral_ports, read_text, tcp_sockets
from port_checker.provider.report import LocalBinding

# Listeners opened before the event loop goes round: one takes some 20 µs.
_OPENED_PER_TURN = 50
# Seconds between looks at half-open connections. Where a firewall of this machine keeps an answer
# back, the kernel gives the connection up when it would repeat that, after a second (RFC 6298).
_HALF_OPEN_INTERVAL = 0.5
# Accepted connections that are kept open for the other end to close.
MAX_HELD = 64
# Other checks on this machine find this abstract socket in /proc/net/unix. The lowest and highest
# port follow.
_MARK = "port-checker-listeners-ipv{version}-"
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # struct linger


class Listeners:
    """Temporary listeners on all addresses of this machine, of one family.

    A context manager that needs a running event loop and always closes them. Whatever it has
    accepted is reset in the end, so that nothing stays in TIME_WAIT and every port can be bound at
    once by a program without SO_REUSEADDR.

    Attributes:
        local: Whether a listener could be opened, by port.
        clock: How many connections have arrived.
        holders: Of the ports "in use", the sockets that have them.
        other_family: Those of them that programs have over the other family alone.
        checked: Those that another check of the same family has.
        errors: Why a listener could not be opened, by port; the system's number.
    """

    def __init__(self, ports: Iterable[int], ip_version: int) -> None:
        self.local: dict[int, LocalBinding] = {}
        self.clock = 0
        self._arrivals: defaultdict[int, dict[Address, int]] = defaultdict(dict)
        self.holders: defaultdict[int, list[TcpSocket]] = defaultdict(list)
        self.other_family: set[int] = set()
        self.checked: set[int] = set()
        self.errors: dict[int, int] = {}
        self._ports = list(ports)
        self._ipv6 = ip_version == 6
        # By descriptor. The event loop watches them through one of its own: it would take as long
        # for each as the kernel does.
        self._listeners: dict[int, tuple[int, socket.socket]] = {}
        self._held: dict[int, socket.socket] = {}
        self._epoll = select.epoll()
        self._mark = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._arrival = asyncio.Event()
        self._half_open: defaultdict[int, set[Address]] = defaultdict(set)
        self._next_look: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        mark = _MARK.format(version=6 if self._ipv6 else 4)
        low, high = min(self._ports, default=0), max(self._ports, default=0)
        others = self._checks(self._ipv6)
        self._mark.bind(f"\0{mark}{low}-{high}-{os.getpid()}-{id(self)}")
        listening = self._other_listeners()
        asyncio.get_running_loop().add_reader(self._epoll.fileno(), self._on_events)
        try:
            for number, port in enumerate(self._ports):
                if number % _OPENED_PER_TURN == 0:
                    await asyncio.sleep(0)
                self._open(port, listening.get(port, []))
        except BaseException:
            await self.__aexit__()
            raise
        self._look_up_holders()
        self.checked = {
            port
            for port, local in self.local.items()
            if local == "in use" and any(low <= port <= high for low, high in others)
        }
        self._next_look = asyncio.get_running_loop().call_later(_HALF_OPEN_INTERVAL, self._look)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._next_look:
            self._next_look.cancel()
        asyncio.get_running_loop().remove_reader(self._epoll.fileno())
        listeners = [listener for _, listener in self._listeners.values()]
        for sock in (*listeners, *self._held.values()):
            sock.close()
        self._epoll.close()
        self._mark.close()

    def seen(self, since: int = 0) -> dict[int, set[Address]]:
        """Return who connected, by port, since the clock showed ``since``."""
        if not since:
            return {port: set(peers) for port, peers in self._arrivals.items()}
        return {
            port: recent
            for port, peers in self._arrivals.items()
            if (recent := {peer for peer, last in peers.items() if last > since})
        }

    def half_open(self) -> dict[int, set[Address]]:
        """Return from whom connections have arrived that were not established, by port."""
        self._find_half_open()
        return {port: set(peers) for port, peers in self._half_open.items()}

    async def wait_until_seen(
        self,
        ports: Iterable[int],
        timeout: float,
        *,
        enough: int = MAX_PORT,
        since: int = 0,
        ignored: Callable[[Address], bool] = lambda _: False,
    ) -> None:
        """Wait until connections to all of ``ports`` were seen, or ``timeout`` seconds.

        Or, to whatever ports, to as many of them as are ``enough``. Connections before ``since``
        and from ``ignored`` peers do not count.
        """
        missing, arrived = set(ports), set[int]()

        def is_done() -> bool:
            for port, peers in self._arrivals.items():
                if port not in arrived and any(
                    last > since and not ignored(peer) for peer, last in peers.items()
                ):
                    arrived.add(port)
            return missing <= arrived or len(arrived) >= enough

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while not is_done():
                    self._arrival.clear()
                    await self._arrival.wait()

    def _look(self) -> None:
        self._find_half_open()
        self._next_look = asyncio.get_running_loop().call_later(_HALF_OPEN_INTERVAL, self._look)

    def _find_half_open(self) -> None:
        """Look for ports that receive packets, and whose answers get lost.

        The kernel answers the other end's SYN and waits some seconds for the end of the handshake.
        """
        for sock in tcp_sockets(frozenset(self._ports), TcpState.SYN_RECV):
            self._half_open[sock.port].add(sock.peer)

    def _other_listeners(self) -> dict[int, list[TcpSocket]]:
        """Find programs that listen over the other family alone: binding would not notice them.

        Unless a check of the other family is running: the listeners are its own.
        """
        found: defaultdict[int, list[TcpSocket]] = defaultdict(list)
        checks = self._checks(not self._ipv6)
        for sock in tcp_sockets(frozenset(self._ports), TcpState.LISTEN):
            if sock.ipv6 != self._ipv6 and not sock.address.is_loopback:
                found[sock.port].append(sock)
        # A check may have begun or ended meanwhile: it is marked for as long as it listens.
        for low, high in checks + self._checks(not self._ipv6):
            for port in [port for port in found if low <= port <= high]:
                del found[port]
        return found

    def _checks(self, ipv6: bool) -> list[tuple[int, int]]:
        """Return the lowest and highest port of each check of a family that is running."""
        mark = f"@{_MARK.format(version=6 if ipv6 else 4)}([0-9]+)-([0-9]+)-"
        found = re.findall(mark, read_text("/proc/thread-self/net/unix"))
        return [(int(low), int(high)) for low, high in found]

    def _open(self, port: int, others: list[TcpSocket]) -> None:
        try:
            listener = self._listen(port)
        except OSError as error:
            self.local[port] = _BINDINGS.get(error.errno or 0, "failed")
            self.errors[port] = error.errno or 0
            return
        if others:
            listener.close()
            self.local[port] = "in use"
            self.other_family.add(port)
            return
        self.local[port] = "bound"
        self._listeners[listener.fileno()] = port, listener
        self._epoll.register(listener.fileno(), select.EPOLLIN)

    def _listen(self, port: int) -> socket.socket:
        family = socket.AF_INET6 if self._ipv6 else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            # Connections of another program may still be in TIME_WAIT.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if self._ipv6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(("::" if self._ipv6 else "0.0.0.0", port))  # noqa: S104  # as documented
            listener.listen()
        except OSError:
            listener.close()
            raise
        return listener

    def _look_up_holders(self) -> None:
        """Tell programs that listen from outgoing connections that have a port."""
        in_use = {port for port, local in self.local.items() if local == "in use"}
        if not in_use:
            return
        for sock in tcp_sockets(in_use):
            self.holders[sock.port].append(sock)
        for port, sockets in self.holders.items():
            if all(sock.state is not TcpState.LISTEN for sock in sockets) and any(
                map(_is_outgoing, sockets)
            ):
                self.local[port] = "outgoing connection"

    def _on_events(self) -> None:
        # All that have come, before an answer is read that tells of them.
        ready = [descriptor for descriptor, _ in self._epoll.poll(0)]
        # Before others are accepted, which get the same descriptors.
        for descriptor in self._held.keys() & ready:
            self._held.pop(descriptor).close()
        for descriptor in self._listeners.keys() & ready:
            self._accept(*self._listeners[descriptor])

    def _accept(self, port: int, listener: socket.socket) -> None:
        try:
            connection, peer = listener.accept()
        except OSError as error:
            if error.errno in _NO_DESCRIPTOR:
                self._close_longest_held()
            return
        self.clock += 1
        self._arrivals[port][parse_host(peer[0])] = self.clock
        self._arrival.set()
        # The other end closes first, as a rule. A reset at once might look to it like a failure.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self._held[connection.fileno()] = connection
        self._epoll.register(connection.fileno(), select.EPOLLIN)
        if len(self._held) > MAX_HELD:
            self._close_longest_held()

    def _close_longest_held(self) -> None:
        if self._held:
            self._held.pop(next(iter(self._held))).close()


def _is_outgoing(sock: TcpSocket) -> bool:
    """Whether this machine began a connection, as far as that shows.

    The end that accepted it has a port that was not taken from the ephemeral ones, or listens.
    """
    port = sock.peer_port
    return port not in ephemeral_ports() or bool(tcp_sockets({port}, TcpState.LISTEN))


_BINDINGS: dict[int, LocalBinding] = {
    errno.EADDRINUSE: "in use",
    errno.EACCES: "not permitted",
    errno.EPERM: "not permitted",
}
_NO_DESCRIPTOR = {errno.EMFILE, errno.ENFILE}
