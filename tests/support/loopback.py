"""Ports of this machine in each state that a check can meet."""

import functools
import os
import secrets
import socket
import sys
from collections.abc import Callable, Container, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress

from tests.support.waiting import wait_until


def family_of(host: str) -> socket.AddressFamily:
    """The address family of an IP literal."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


# Where free_ports() looks: below the ephemeral ports, so that the kernel gives them to nobody.
_FIRST = 10_000
_SLICE = 2_500
_SLICES = 9


@functools.cache
def _claimed_slice(_namespace: int) -> int:
    """Claim a slice until this process ends, as a free port is free until its test binds it.

    The claim is the name of a socket, which the processes of all test runs on this machine see and
    which ends with its owner. Like a port, it belongs to a network namespace: this thread's.

    Returns:
        The slice's first port.
    """
    for number in range(_SLICES):
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            claim.bind(f"\0golem-port-checker tests, ports {number}")
        except OSError:
            claim.close()
        else:
            claim.detach()  # it stays open, and no object of it complains at the end
            return _FIRST + _SLICE * number
    return _FIRST + _SLICE * secrets.randbelow(_SLICES)  # share one; mostly that goes well


def free_ports(count: int) -> list[int]:
    """Ports in a row that nobody has: of more than some hundreds, one is often in TIME_WAIT."""
    first = _claimed_slice(os.stat("/proc/thread-self/ns/net").st_ino)
    while True:
        start = first + secrets.randbelow(_SLICE - count + 1)
        with suppress(OSError), ExitStack() as stack:
            for port in range(start, start + count):
                for host in ("", "::1"):
                    # Without SO_REUSEADDR: no connection of an earlier test is in TIME_WAIT there.
                    stack.enter_context(socket.socket(family_of(host))).bind((host, port))
            return list(range(start, start + count))


def free_port() -> int:
    """One such port."""
    return free_ports(1)[0]


def is_listened_on(port: int, host: str = "127.0.0.1") -> bool:
    with socket.socket(family_of(host)) as client:
        return client.connect_ex((host, port)) == 0


def connecting(ports: Container[int]) -> int:
    """How many connections to ports of 127.0.0.1 are under way that nobody has answered."""
    return sum(state == "02" and int(peer[-4:], 16) in ports for peer, state in _connections())


def is_closing() -> bool:
    """Whether there is a connection that waits for its other end to close (FIN-WAIT-1, -2)."""
    return any(state in ("04", "05") for _, state in _connections())


def unread_by_peer(connection: socket.socket) -> int:
    """How many bytes wait at the other end of a connection of 127.0.0.1 to be read."""
    ends = f":{connection.getpeername()[1]:04X}", f":{connection.getsockname()[1]:04X}"
    with open("/proc/thread-self/net/tcp") as table:
        for _, local, remote, _, queues, *_ in map(str.split, table):
            if (local[8:], remote[8:]) == ends:
                return int(queues[9:], 16)
    return 0


def _connections() -> list[list[str]]:
    """The other end and the state of each, as the kernel writes them."""
    with open("/proc/thread-self/net/tcp") as table:
        next(table)
        return [line.split(None, 4)[2:4] for line in table]


@contextmanager
def open_listener(host: str = "127.0.0.1", port: int = 0) -> Iterator[socket.socket]:
    """A listener; the kernel completes the handshakes of its backlog."""
    with socket.create_server((host, port), family=family_of(host), backlog=4096) as listener:
        yield listener


@contextmanager
def open_port(host: str = "127.0.0.1") -> Iterator[int]:
    """A port that accepts connections."""
    with open_listener(host) as listener:
        yield listener.getsockname()[1]


@contextmanager
def refused_port(host: str = "127.0.0.1") -> Iterator[int]:
    """A port on which nobody listens, and nobody else can: it is bound."""
    with socket.socket(family_of(host), socket.SOCK_STREAM) as sock:
        sock.bind((host, 0))
        yield sock.getsockname()[1]


@contextmanager
def full_backlog(
    host: str = "127.0.0.1", port: int = 0
) -> Iterator[tuple[int, Callable[[], None]]]:
    """A port whose listener's backlog is full, so that the kernel drops each SYN.

    Yields:
        The port, and a function that makes room in the backlog: the next SYN is answered then.
    """
    with ExitStack() as stack:
        listener = stack.enter_context(
            socket.create_server((host, port), family=family_of(host), backlog=1)
        )
        # One more than the backlog. On a busy machine they come to it after connect() has returned.
        clients = [stack.enter_context(socket.socket(family_of(host))) for _ in range(2)]
        for client in clients:
            client.connect(listener.getsockname())
        wait_until(lambda: _waiting(listener) == len(clients), "the backlog to be full")

        def make_room() -> None:
            for client in clients:
                client.close()
            while _waiting(listener):
                listener.accept()[0].close()

        yield listener.getsockname()[1], make_room


@contextmanager
def silent_port(host: str = "127.0.0.1") -> Iterator[int]:
    """A port at which attempts time out."""
    with full_backlog(host) as (port, _):
        yield port


@contextmanager
def ports(count: int, kind: Callable[[], AbstractContextManager[int]]) -> Iterator[list[int]]:
    """``count`` ports of one kind: ``open_port``, ``refused_port`` or ``silent_port``."""
    with ExitStack() as stack:
        yield [stack.enter_context(kind()) for _ in range(count)]


def _waiting(listener: socket.socket) -> int:
    """How many connections wait to be accepted: tcpi_unacked of linux/tcp.h."""
    info = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 28)
    return int.from_bytes(info[24:], sys.byteorder)
