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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Self

from port_checker.addresses import MAX_PORT, Address, parse_host
from port_checker.linux import (
    TcpSocket,
    TcpState,
    ephemeral_ports,
    read_text,
    shows_sockets,
    tcp_sockets,
)
from port_checker.provider.report import Binding, BindingState

# Listeners opened in one turn of the event loop; each takes some 20 µs.
_OPENED_PER_TURN = 50
# Seconds between looks at half-open connections. If a firewall of this machine drops an answer, the
# kernel gives the connection up when it would repeat the answer, after a second (RFC 6298).
_HALF_OPEN_INTERVAL = 0.5
# Accepted connections that are kept open for the other end to close.
MAX_HELD = 64
# The name of an abstract socket by which other checks on this machine see this one, in
# /proc/net/unix. The lowest and highest port follow.
_MARK = "port-checker-listeners-ipv{version}-"
_BOUND = Binding("bound")  # one for all: each takes a microsecond to make
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # struct linger


class Listeners:
    """Temporary listeners on all addresses of this machine, over one IP version.

    A context manager that needs a running event loop and always closes the listeners. The
    connections that they accepted are reset in the end, so that none stays in TIME_WAIT and every
    port can be bound at once by a program without SO_REUSEADDR.

    Attributes:
        bindings: Whether a listener could be opened, by port.
        clock: How many connections have arrived.
    """

    def __init__(self, ports: Iterable[int], ip_version: int) -> None:
        self.bindings: dict[int, Binding] = {}
        self.clock = 0
        self._arrivals: defaultdict[int, dict[Address, int]] = defaultdict(dict)
        self._ports = list(ports)
        self._ipv6 = ip_version == 6
        # By descriptor. The event loop watches the one descriptor of an epoll of their own: to add
        # each to the loop would double the time that it takes to open them.
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
        checks = self._checks(self._ipv6)
        self._mark.bind(f"\0{mark}{low}-{high}-{os.getpid()}-{id(self)}")
        of_other_family = self._ports_of_other_family()
        asyncio.get_running_loop().add_reader(self._epoll.fileno(), self._on_events)
        try:
            for number, port in enumerate(self._ports):
                if number % _OPENED_PER_TURN == 0:
                    await asyncio.sleep(0)
                self.bindings[port] = self._open(port, other_family=port in of_other_family)
        except BaseException:
            await self.__aexit__()
            raise
        self._look_up_holders(checks)
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
        """Return who has connected since the clock showed ``since``, by port."""
        return {
            port: recent
            for port, peers in self._arrivals.items()
            if (recent := {peer for peer, last in peers.items() if last > since})
        }

    def half_open(self) -> dict[int, set[Address]]:
        """Return from whom connections have arrived that were not completed, by port."""
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
        """Wait, for ``timeout`` seconds at most, until connections to ``ports`` were seen.

        It also ends once connections to ``enough`` ports were seen, whichever they are. Connections
        before ``since`` and from ``ignored`` peers do not count.
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
        """Look for ports that receive packets while their answers get lost.

        The kernel answers the peer's SYN, and waits some seconds for the handshake to be completed.
        """
        for sock in tcp_sockets(frozenset(self._ports), TcpState.SYN_RECV):
            self._half_open[sock.port].add(sock.peer)

    def _ports_of_other_family(self) -> set[int]:
        """Return ports on which programs listen over the other IP version alone.

        Binding would not notice them. Those of a running check over that version do not count.
        """
        checks = self._checks(not self._ipv6)
        found = {
            sock.port
            for sock in tcp_sockets(frozenset(self._ports), TcpState.LISTEN)
            if sock.ipv6 != self._ipv6 and not sock.address.is_loopback
        }
        # A check may have begun or ended meanwhile: it is marked for as long as it listens.
        checks += self._checks(not self._ipv6)
        return {port for port in found if not any(port in ports for ports in checks)}

    def _checks(self, ipv6: bool) -> list[range]:
        """Return the ports of each running check over an IP version, from lowest to highest."""
        mark = f"@{_MARK.format(version=6 if ipv6 else 4)}([0-9]+)-([0-9]+)-"
        found = re.findall(mark, read_text("/proc/thread-self/net/unix"))
        return [range(int(low), int(high) + 1) for low, high in found]

    def _open(self, port: int, *, other_family: bool) -> Binding:
        try:
            listener = self._listen(port)
        except OSError as error:
            number = error.errno or 0
            return Binding(_STATES.get(number, "failed"), number)
        if other_family:
            listener.close()
            return Binding("in use", other_family=True)
        self._listeners[listener.fileno()] = port, listener
        self._epoll.register(listener.fileno(), select.EPOLLIN)
        return _BOUND

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

    def _look_up_holders(self, checks: Sequence[range]) -> None:
        """Find out what has the ports that are in use: one of the other ``checks``, say."""
        in_use = {port for port, binding in self.bindings.items() if binding.state == "in use"}
        if not in_use:
            return
        holders: defaultdict[int, list[TcpSocket]] = defaultdict(list)
        for sock in tcp_sockets(in_use):
            holders[sock.port].append(sock)
        peer_ports = {sock.peer_port for sockets in holders.values() for sock in sockets}
        listening = {sock.port for sock in tcp_sockets(in_use | peer_ports, TcpState.LISTEN)}
        ephemeral, are_known = ephemeral_ports(), shows_sockets()
        for port in in_use:
            # As far as that shows, this machine began a connection if the port of the other end is
            # not ephemeral, or if a program listens on it.
            is_outgoing = port not in listening and any(
                sock.peer_port not in ephemeral or sock.peer_port in listening
                for sock in holders[port]
            )
            self.bindings[port] = replace(
                self.bindings[port],
                state="outgoing connection" if is_outgoing else "in use",
                holders=holders[port] if are_known else None,
                checked=any(port in ports for ports in checks),
            )

    def _on_events(self) -> None:
        # All connections that have come, before the loop reads an answer that reports them.
        ready = [descriptor for descriptor, _ in self._epoll.poll(0)]
        # First, since connections that are accepted then may get the same descriptors.
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
        # The peer closes first, as a rule. A reset at once might look like a failure to it.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self._held[connection.fileno()] = connection
        self._epoll.register(connection.fileno(), select.EPOLLIN)
        if len(self._held) > MAX_HELD:
            self._close_longest_held()

    def _close_longest_held(self) -> None:
        if self._held:
            self._held.pop(next(iter(self._held))).close()


_STATES: dict[int, BindingState] = {
    errno.EADDRINUSE: "in use",
    errno.EACCES: "not permitted",
    errno.EPERM: "not permitted",
}
_NO_DESCRIPTOR = {errno.EMFILE, errno.ENFILE}
