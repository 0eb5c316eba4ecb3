"""Connections of several workers: which one gets the next."""

import asyncio
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from port_checker.metrics import Metrics
from port_checker.server.connections import ConnectionLimits
from port_checker.server.distributor import Channel, Distributor, ReceivedConnections
from port_checker.server.listener import Listener
from tests.support.waiting import wait_until


class Worker:
    """What a worker's parent sees of it."""

    def __init__(self, connections: int = 0, ports: int = 0) -> None:
        self.metrics = Metrics()
        for name, number in {
            "connections": connections,
            "connections_limit": 100,
            "ports_in_flight": ports,
            "ports_in_flight_limit": 1000,
        }.items():
            self.metrics.watch(name, lambda number=number: number)  # type: ignore[misc]  # its default is an int
        self.metrics.sample()
        self.channel = Channel(self.metrics.row)
        self.connections = ReceivedConnections(self.channel.end.detach(), self.metrics)
        self.connections.setblocking(False)

    def receive(self) -> int:
        """Take what has come; return how many connections that were."""
        number = 0
        while True:
            try:
                self.connections.accept()[0].close()
            except (BlockingIOError, EOFError):
                return number
            number += 1


class _Aborting(asyncio.Protocol):
    """Ends its connection, and enters itself in a list when that is done."""

    def __init__(self, lost: "list[_Aborting]") -> None:
        self._lost = lost

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.abort()

    def connection_lost(self, _: Exception | None) -> None:
        self._lost.append(self)


@contextmanager
def distributed(clients: int, *workers: Worker) -> Iterator[Distributor]:
    """Have so many clients connect, and wait until each connection has been sent to a worker."""
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as server, ExitStack() as stack:
        distributor = Distributor([server])
        stack.callback(distributor.stop)
        for worker in workers:
            stack.enter_context(worker.connections)
            stack.callback(distributor.close, worker.channel)
            distributor.open(worker.channel)
        for _ in range(clients):
            stack.enter_context(socket.create_connection(server.getsockname()))
        wait_until(lambda: sum(worker.channel.sent for worker in workers) == clients, "all of them")
        yield distributor


def test_connections_go_to_the_worker_that_has_most_room() -> None:
    fuller, *others = Worker(connections=6), Worker(), Worker()
    with distributed(12, fuller, *others):
        assert [worker.receive() for worker in (fuller, *others)] == [0, 6, 6]


def test_ports_in_flight_take_room_as_connections_do() -> None:
    workers = Worker(ports=40), Worker(connections=2)  # a twenty-fifth, and a fiftieth
    with distributed(4, *workers):
        assert [worker.receive() for worker in workers] == [1, 3]


def test_a_worker_that_receives_nothing_gets_no_more_however_full_others_are() -> None:
    stuck, fuller = Worker(), Worker(connections=50)
    with distributed(35, stuck, fuller):
        assert [worker.receive() for worker in (stuck, fuller)] == [32, 3]


def test_what_a_worker_has_received_and_closed_takes_no_room() -> None:
    workers = Worker(), Worker()
    with distributed(4, *workers):
        assert workers[1].receive() == 2
        assert workers[1].channel.rank() < workers[0].channel.rank()


def test_a_dead_worker_gets_none() -> None:
    dead, serving = Worker(), Worker(connections=50)
    dead.connections.close()
    with distributed(10, dead, serving):
        assert serving.receive() == 10


def test_connections_wait_for_a_worker_that_receives_them() -> None:
    worker = Worker()
    connection, other = socket.socketpair()
    with worker.connections, connection, other:
        assert [worker.channel.send(connection) for _ in range(33)] == [True] * 32 + [False]
        assert worker.receive() == 32
        assert worker.channel.send(connection)
        worker.channel.close()


def test_a_worker_receives_what_was_sent_and_then_hears_that_there_is_no_more() -> None:
    async def serve(connections: socket.socket) -> int:
        loop, end = asyncio.get_running_loop(), asyncio.Event()
        lost: list[_Aborting] = []
        limits = ConnectionLimits(1000)
        listener = Listener(connections, limits, lambda _: _Aborting(lost), loop, end.set)
        await end.wait()
        await listener.wait_closed()
        while len(lost) < limits.size:
            await asyncio.sleep(0.01)
        return len(lost)

    worker = Worker()
    with distributed(20, worker) as distributor:
        distributor.close(worker.channel)
        assert asyncio.run(serve(worker.connections)) == 20


def test_a_connection_waits_for_a_worker_that_has_no_descriptor_for_it() -> None:
    worker = Worker()
    connection, other = socket.socketpair()
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with worker.connections, connection, other:
        assert worker.channel.send(connection)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                worker.connections.accept()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        worker.channel.close()
        assert worker.receive() == 1


def test_a_connection_that_a_worker_has_no_descriptor_for_is_an_error_of_the_system() -> None:
    ours, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, ReceivedConnections(end.detach(), Metrics()) as connections:
        ours.send(b"\0")  # what is left of it then: recvmsg(2), MSG_CTRUNC
        with pytest.raises(OSError, match="Too many open files"):
            connections.accept()
