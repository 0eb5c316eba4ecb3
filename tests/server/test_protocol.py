"""Connections that misbehave, and those that do not."""

import asyncio
import json
import re
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import pytest
import uvloop
from uvicorn.server import ServerState

from port_checker.server.app import create_app
from port_checker.server.protocol import BoundedProtocol, ConnectionLimits
from port_checker.server.run import server_config
from port_checker.server.settings import Settings
from tests.support.http import HEALTH, check_of, connected, read_answer
from tests.support.loopback import open_port, silent_port
from tests.support.service import serve

QUICK = 0.5  # seconds of a deadline that tests wait for


def seconds_until_closed(sock: socket.socket, trickle: bytes = b"") -> float:
    """How long the other side leaves the connection open, sending a byte now and then."""
    started = time.monotonic()
    sock.settimeout(QUICK / 5)
    while time.monotonic() - started < 20 * QUICK:
        try:
            if not sock.recv(1000):
                break
        except TimeoutError:
            if trickle:
                try:
                    sock.sendall(trickle[:1])
                except ConnectionError:
                    break
                trickle = trickle[1:]
        except ConnectionError:
            break
    return time.monotonic() - started


@pytest.mark.parametrize(
    ("sent", "trickle"),
    [
        (b"", b""),
        (b"GET /health HTT", b""),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX: ", b"y" * 1000),
        (b"", b"\r\n" * 1000),
        (b"POST /check-ports HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{", b""),
        (b"POST /check-ports HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n", b" " * 1000),
        (b"POST /check-ports HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n"),
        (b"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n", b" " * 1000),
        (HEALTH + b"G", b"ET /health HTTP/1.1\r\n" + b"x" * 1000),
    ],
)
def test_a_request_that_does_not_arrive_in_time_is_closed(sent: bytes, trickle: bytes) -> None:
    with serve(room=ConnectionLimits(100, QUICK)) as client, connected(client) as sock:
        sock.sendall(sent)
        assert QUICK * 0.8 < seconds_until_closed(sock, trickle) < QUICK * 8
        assert client.get("/health").status_code == 200


def test_a_check_that_lasts_longer_is_not_touched() -> None:
    with (
        silent_port() as silent,
        serve(room=ConnectionLimits(100, QUICK), retries=1, timeout=3 * QUICK) as client,
        connected(client) as sock,
    ):
        # A line end behind the body, as old browsers sent, and the beginning of a further request.
        sock.sendall(check_of(silent) + b"\r\n" + HEALTH[:9])
        assert b'"success":false' in read_answer(sock)[1]
        sock.sendall(HEALTH[9:])
        assert read_answer(sock)[1] == b'{"status":"ok"}'


def test_keep_alive_and_pipelining_work() -> None:
    with serve(room=ConnectionLimits(100, QUICK)) as client, connected(client) as sock:
        for _ in range(5):
            sock.sendall(HEALTH)
            assert read_answer(sock)[1] == b'{"status":"ok"}'
        sock.sendall(HEALTH * 5)
        for _ in range(5):
            assert read_answer(sock)[1] == b'{"status":"ok"}'


def test_an_answer_is_one_packet() -> None:
    with serve() as client, connected(client) as sock:
        for answered in range(1, 6):
            sock.sendall(HEALTH)
            assert read_answer(sock)[1] == b'{"status":"ok"}'
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
            (with_data,) = struct.unpack_from("=I", info, 152)  # struct tcp_info: tcpi_data_segs_in
            assert with_data == answered


def test_a_caller_that_says_at_once_that_it_sends_no_more_is_answered() -> None:
    with serve() as client:
        for _ in range(10):
            with connected(client) as sock:
                sock.sendall(HEALTH)
                sock.shutdown(socket.SHUT_WR)
                assert read_answer(sock)[1] == b'{"status":"ok"}'
                assert sock.recv(1) == b""


def test_a_request_that_was_answered_early_has_its_deadline_until_it_is_complete() -> None:
    with serve(room=ConnectionLimits(100, QUICK)) as client, connected(client) as sock:
        started = time.monotonic()
        sock.sendall(b"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n1")
        assert b"NOT_FOUND" in read_answer(sock)[1]
        time.sleep(QUICK * 0.6)
        sock.sendall(b"2")
        seconds_until_closed(sock)
        assert QUICK * 1.4 < time.monotonic() - started < QUICK * 8


def test_each_request_on_a_connection_has_a_deadline_of_its_own() -> None:
    with serve(room=ConnectionLimits(100, QUICK)) as client, connected(client) as sock:
        started = time.monotonic()
        while time.monotonic() - started < 3 * QUICK:
            for part in (HEALTH[:10], HEALTH[10:]):
                sock.sendall(part)
                time.sleep(QUICK / 3)
            assert read_answer(sock)[1] == b'{"status":"ok"}'


def test_a_caller_that_does_not_take_its_answers_is_cut_off() -> None:
    with serve(room=ConnectionLimits(100, QUICK)) as client, connected(client) as sock:
        request = b"GET /static-offline-docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n"
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        sock.settimeout(0.05)
        deadline = time.monotonic() + 20 * QUICK
        cut_off = False
        while not cut_off:
            assert time.monotonic() < deadline
            try:
                sock.sendall(request)
            except TimeoutError:
                continue
            except ConnectionError:
                cut_off = True
        assert client.get("/health").status_code == 200


def test_the_deadline_of_a_first_request_is_from_its_first_byte() -> None:
    with serve(room=ConnectionLimits(100, QUICK)) as client, connected(client) as sock:
        time.sleep(QUICK * 0.6)  # it may be late
        sock.sendall(b"G")
        assert QUICK * 0.8 < seconds_until_closed(sock) < QUICK * 8


class Near(asyncio.Transport):
    """This end of a connection whose other end says what the test has it say."""

    def __init__(self, protocol: BoundedProtocol) -> None:
        super().__init__()
        self.sent = b""
        self._is_closing = False
        self._protocol = protocol
        protocol.connection_made(self)

    async def hear(self, *pieces: bytes, turns: int = 50) -> None:
        """Have each piece arrive, and the event loop go round so many times after it."""
        for piece in pieces:
            self._protocol.data_received(piece)
            for _ in range(turns):
                await asyncio.sleep(0)

    def write(self, data: Any) -> None:
        if self._is_closing:
            raise RuntimeError  # as uvloop's do
        self.sent += data

    def close(self) -> None:
        if not self._is_closing:
            self._is_closing = True
            self._protocol.connection_lost(None)

    def is_closing(self) -> bool:
        return self._is_closing

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)}.get(name, default)

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


@asynccontextmanager
async def near() -> AsyncIterator[Near]:
    """A connection to an application, over no network, so that pieces arrive as they are cut."""
    room = ConnectionLimits(100)
    config = server_config(Settings(), lambda: create_app(Settings()), room)
    config.load()
    protocol = BoundedProtocol(room, config=config, server_state=ServerState(), app_state={})
    transport = Near(protocol)
    yield transport
    transport.close()


POST = b"POST /check-ports HTTP/1.1\r\nHost: x\r\nContent-Length: 65536\r\n\r\n"


@pytest.mark.parametrize(
    ("pieces", "statuses"),
    [
        ([HEALTH[:-2] + b"X: ", b"x" * 40_000, b"x" * 40_000], [413]),
        ([HEALTH[:-2] + b"X: ", b"x" * 40_000 + b"\r\n\r\n"], [200]),
        ([HEALTH * 3000 + HEALTH[:9], HEALTH[9:]], [200] * 3001),
        (
            [POST.replace(b"/check-ports", b"/nothing"), b" " * 65_536, HEALTH[:-2], b"x" * 65_536],
            [404, 413],
        ),
        ([POST + b"{", b" " * 65_535 + HEALTH[:9], HEALTH[9:]], [422, 200]),
    ],
)
def test_a_head_is_bounded_and_what_comes_before_it_is_not_counted(
    pieces: list[bytes], statuses: list[int]
) -> None:
    async def run() -> None:
        async with near() as transport:
            await transport.hear(*pieces, turns=10 * len(statuses) + 50)
            told = re.findall(rb"HTTP/1.1 (\d+)", transport.sent)
            assert [int(status) for status in told] == statuses

    uvloop.run(run())


@pytest.mark.parametrize("turns", range(6))
def test_a_connection_is_lost_while_it_is_answered(turns: int) -> None:
    async def run() -> None:
        failures: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(
            lambda _, failure: failures.append(failure)
        )
        async with near() as transport:
            await transport.hear(HEALTH, turns=turns)
            transport.close()
            for _ in range(50):
                await asyncio.sleep(0)
        assert failures == []

    uvloop.run(run())


@pytest.mark.parametrize("part", [b"GET /", b"GET /health HTTP/1.1\r\nX: "])
def test_a_head_without_end_is_refused(part: bytes) -> None:
    with serve() as client, connected(client) as sock:
        sock.sendall(part + b"x" * 65536)
        head, body = read_answer(sock)
        assert head.startswith(b"HTTP/1.1 413 ")
        assert json.loads(body)["detail"]["code"] == "REQUEST_TOO_LARGE"
        assert sock.recv(1) == b""


def test_what_is_not_http_gets_the_one_shape() -> None:
    with serve() as client, connected(client) as sock:
        sock.sendall(b"\x16\x03\x01 is how TLS begins\r\n\r\n")
        head, body = read_answer(sock)
        assert head.startswith(b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n")
        assert json.loads(body)["detail"]["code"] == "INVALID_REQUEST"
        assert sock.recv(1) == b""


def test_the_one_that_owes_longest_makes_way() -> None:
    room = ConnectionLimits(5)
    with serve(room=room) as client, ExitStack() as stack:
        crowd = [stack.enter_context(connected(client)) for _ in range(5)]
        while len(room.awaiting_request) < 5:
            time.sleep(0.01)
        crowd[0].sendall(HEALTH)  # answered, and idle since: the one that owes for the shortest
        assert read_answer(crowd[0])[1] == b'{"status":"ok"}'
        for old in crowd[1:3]:
            newcomer = stack.enter_context(connected(client))
            newcomer.sendall(HEALTH)
            assert read_answer(newcomer)[1] == b'{"status":"ok"}'
            assert old.recv(1) == b""
        crowd[0].sendall(HEALTH)
        assert read_answer(crowd[0])[1] == b'{"status":"ok"}'


def test_when_all_are_being_answered_the_newcomer_is_told() -> None:
    with (
        open_port() as opened,
        silent_port() as silent,
        serve(room=ConnectionLimits(1), retries=1, timeout=1) as client,
        connected(client) as busy,
    ):
        body = json.dumps({"provider_ip": "127.0.0.1", "ports": [opened, silent]}).encode()
        busy.sendall(
            b"POST /check-ports HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
        )
        busy.sendall(body)
        told = b""
        deadline = time.monotonic() + 0.8
        while not told and time.monotonic() < deadline:
            with connected(client) as newcomer:
                head, told = read_answer(newcomer)
        assert json.loads(told)["detail"]["code"] == "OVERLOADED"
        assert b"\r\nretry-after: 10\r\n" in head
        assert b'"success":true' in read_answer(busy)[1]


def test_many_bad_connections_leave_room_for_honest_ones() -> None:
    """Half a head, a byte now and then, half a body: and an honest caller all the while."""
    room = ConnectionLimits(400, QUICK)
    with serve(room=room) as client, ExitStack() as stack:
        bad = [stack.enter_context(connected(client)) for _ in range(300)]
        for number, sock in enumerate(bad):
            sock.sendall(
                [HEALTH[:20], b"\r", b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n{"][number % 3]
            )
        closed = threading.Event()

        def wait_for_all() -> None:
            for sock in bad:
                while sock.recv(1000):
                    pass
            closed.set()

        threading.Thread(target=wait_for_all).start()
        deadline = time.monotonic() + 10 * QUICK
        while not closed.is_set():
            assert time.monotonic() < deadline
            with connected(client) as honest:
                honest.sendall(HEALTH)
                assert read_answer(honest)[1] == b'{"status":"ok"}'
        assert len(room.awaiting_request) <= 2
