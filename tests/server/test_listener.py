"""Accepting connections."""

import asyncio
import errno
import gc
import logging
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

import pytest

from port_checker.addresses import parse_networks
from port_checker.server.connections import ConnectionLimits
from port_checker.server.listener import Listener
from port_checker.server.protocol import BoundedProtocol
from tests.support.http import HEALTH, connected, read_answer
from tests.support.service import serve
from tests.support.waiting import wait_until

TRUSTED = parse_networks("127.0.0.1")


class Accepting:
    """A listener whose connections do nothing."""

    def __init__(self, listening: socket.socket, limits: ConnectionLimits) -> None:
        self.made: list[asyncio.Transport] = []
        loop = asyncio.get_running_loop()
        self.listener = Listener(listening, limits, lambda _: _Kept(self.made), loop)

    async def close(self) -> None:
        self.listener.close()
        await self.listener.wait_closed()
        for transport in self.made:
            transport.abort()
        await asyncio.sleep(0.01)


class _Kept(asyncio.Protocol):
    def __init__(self, made: list[asyncio.Transport]) -> None:
        self._made = made

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._made.append(transport)


@contextmanager
def listening(crowd: int) -> Iterator[tuple[socket.socket, list[socket.socket]]]:
    """A listening socket, and clients that have connected to it."""
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as server, ExitStack() as stack:
        address = server.getsockname()
        clients = [stack.enter_context(socket.create_connection(address)) for _ in range(crowd)]
        yield server, clients


def test_many_connections_are_accepted_in_one_turn() -> None:
    async def accept(server: socket.socket) -> int:
        accepting = Accepting(server, ConnectionLimits(1000, trusted_proxies=TRUSTED))
        turns = 0
        while len(accepting.made) < 100:
            turns += 1
            await asyncio.sleep(0)
        await accepting.close()
        return turns

    with listening(100) as (server, _):
        assert asyncio.run(accept(server)) < 20


def test_those_over_their_share_are_closed_before_anything_is_made_for_them() -> None:
    async def accept(server: socket.socket, last: socket.socket) -> int:
        accepting = Accepting(server, ConnectionLimits(50))
        last.setblocking(False)
        with pytest.raises(ConnectionResetError):
            await asyncio.get_running_loop().sock_recv(last, 1)
        await accepting.close()
        return len(accepting.made)

    with listening(40) as (server, clients):
        assert asyncio.run(accept(server, clients[-1])) == 5


class Exhausted(socket.socket):
    """A listening socket of a process that has no descriptors left, at first."""

    failures = 3

    def accept(self) -> tuple[socket.socket, object]:
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


def test_without_descriptors_it_says_so_once_and_tries_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def accept(server: socket.socket) -> None:
        accepting = Accepting(server, ConnectionLimits(50))
        while not accepting.made:
            await asyncio.sleep(0.01)
        await accepting.close()

    with listening(1) as (server, _), closing(Exhausted(fileno=server.detach())) as exhausted:
        asyncio.run(accept(exhausted))
    assert caplog.record_tuples == [
        (
            "port_checker.server.listener",
            logging.ERROR,
            "Cannot accept connections: Too many open files",
        )
    ]


@pytest.mark.parametrize("request_", [HEALTH, b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n"])
def test_nothing_of_a_closed_connection_stays_in_memory(request_: bytes) -> None:
    def living() -> int:
        return sum(isinstance(each, BoundedProtocol) for each in gc.get_objects())

    with serve() as client:
        before = living()
        gc.disable()
        try:
            for _ in range(10):
                with connected(client) as sock:
                    sock.sendall(request_)
                    read_answer(sock)
            wait_until(lambda: living() <= before, "the last one to be closed")
        finally:
            gc.enable()
