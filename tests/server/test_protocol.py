"""Connections that misbehave, and those that do not."""

import asyncio
import json
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any

import pytest
from fastapi import FastAPI, Response
from uvicorn.server import ServerState

from port_checker.server.protocol import DEADLINE, ConnectionLimits
from tests.support.http import HEALTH, connected, read_answer
from tests.support.manual import Client, ManualLoop
from tests.support.service import serve
from tests.support.waiting import wait_until

EARLY = b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
POST = EARLY.replace(b"early", b"echo")
SLOW = HEALTH.replace(b"health", b"slow")
LARGE = HEALTH.replace(b"health", b"large")


class Service:
    """A server of an application that shows what it was asked, in time that the test advances."""

    def __init__(self, max_connections: int = 1000) -> None:
        self.loop = ManualLoop()
        self.limits = ConnectionLimits(max_connections)
        self.state = ServerState()
        self.slow_may_end = asyncio.Event()
        self.left = 0

    def connect(self, address: str = "127.0.0.1") -> Client:
        return Client(self.loop, self.limits, self.app, state=self.state, address=address)

    def close(self) -> None:
        """Check that nothing has failed unseen."""
        self.loop.settle()
        self.loop.close()
        assert self.loop.failures == []

    async def app(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        """Answer with what was asked; /early before the body is there, /slow when it may end."""
        body = b""
        while scope["path"] != "/early":
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        if scope["path"] == "/slow":
            await self.slow_may_end.wait()
        answer = json.dumps([scope["method"], scope["path"], len(scope["headers"]), body.decode()])
        if scope["path"] == "/large":
            answer = "x" * 200_000
        headers = [(b"content-length", b"%d" % len(answer))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer.encode()})


@pytest.fixture
def service() -> Iterator[Service]:
    with closing(Service()) as service:
        yield service


# Deadlines


@pytest.mark.parametrize(
    ("sent", "trickle"),
    [
        (b"", b""),
        (b"GET /health HTT", b""),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX: ", b"y"),
        (b"", b"\r\n"),
        (POST + b"{", b""),
        (POST, b" "),
        (POST.replace(b"Content-Length: 1000", b"Transfer-Encoding: chunked"), b"1\r\n\n\r\n"),
        (EARLY, b" "),
    ],
)
def test_a_request_has_ten_seconds_to_arrive(service: Service, sent: bytes, trickle: bytes) -> None:
    client = service.connect()
    client.send(sent)
    for second in range(1, 10):
        service.loop.advance_to(second)
        client.send(trickle)
    service.loop.advance_to(9.9)
    assert not client.is_closed
    service.loop.advance_to(10.0)
    assert client.is_closed


def test_a_later_request_has_them_from_its_first_byte(service: Service) -> None:
    client = service.connect()
    for start in 0, 12, 24:
        service.loop.advance_to(start)
        client.send(HEALTH[:-1])
        service.loop.advance_to(start + 9.9)
        client.send(HEALTH[-1:])
    assert client.statuses == [200, 200, 200]
    service.loop.advance_to(35)
    client.send(HEALTH[:-1])
    service.loop.advance_to(44.9)
    assert not client.is_closed
    service.loop.advance_to(45)
    assert client.is_closed


def test_an_answer_may_take_any_time(service: Service) -> None:
    client = service.connect()
    # A line end behind the request, as old browsers sent, and a part of the next request.
    client.send(SLOW + b"\r\n" + HEALTH[:9])
    service.loop.advance_to(1000)
    service.slow_may_end.set()
    service.loop.settle()
    client.send(HEALTH[9:])
    assert client.statuses == [200, 200]
    assert not client.is_closed


def test_the_rest_of_a_request_that_was_answered_early_keeps_its_deadline(service: Service) -> None:
    slow, quick = service.connect(), service.connect()
    for client in slow, quick:
        client.send(EARLY)
        assert client.statuses == [200]
    service.loop.advance_to(9)
    slow.send(b" " * 999)
    quick.send(b" " * 1000)
    service.loop.advance_to(10)
    assert slow.is_closed
    assert not quick.is_closed


def test_a_client_that_stops_reading_is_cut_off_after_ten_seconds(service: Service) -> None:
    stalled, late = service.connect(), service.connect()
    for client in stalled, late:
        client.reads = False
        client.send(LARGE)
    service.loop.advance_to(9.9)
    late.read()
    assert not stalled.is_closed
    service.loop.advance_to(10)
    assert stalled.is_aborted
    assert not late.is_closed
    late.send(HEALTH)
    assert late.statuses == [200, 200]


def test_deadlines_on_a_socket() -> None:
    app = FastAPI()
    app.add_api_route("/large", lambda: Response(b"x" * 20_000_000))
    with (
        serve(app, room=ConnectionLimits(100, deadline=0.2)) as client,
        connected(client) as idle,
        connected(client) as slow,
        connected(client) as deaf,
    ):
        slow.sendall(HEALTH[:9])
        deaf.sendall(LARGE)
        assert idle.recv(1) == b""
        assert slow.recv(1) == b""

        def is_cut_off() -> bool:
            try:
                deaf.send(b"\r")
            except ConnectionError:
                return True
            return False

        wait_until(is_cut_off, "the server to give up on a client that does not read")


# Answers


def test_keep_alive_and_pipelining(service: Service) -> None:
    client = service.connect()
    for _ in range(3):
        client.send(HEALTH)
    client.send(HEALTH * 3 + HEALTH[:9])
    client.send(HEALTH[9:])
    assert client.statuses == [200] * 7


def test_an_answer_is_one_packet() -> None:
    with serve() as client, connected(client) as sock:
        for answered in range(1, 6):
            sock.sendall(HEALTH)
            assert read_answer(sock)[1] == b'{"status":"ok"}'
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
            (with_data,) = struct.unpack_from("=I", info, 152)  # struct tcp_info: tcpi_data_segs_in
            assert with_data == answered


def test_a_client_that_half_closes_right_after_its_request_is_answered() -> None:
    with serve() as client:
        for _ in range(10):
            with connected(client) as sock:
                sock.sendall(HEALTH)
                sock.shutdown(socket.SHUT_WR)
                assert read_answer(sock)[1] == b'{"status":"ok"}'
                assert sock.recv(1) == b""


@pytest.mark.parametrize("turns", range(6))
def test_a_client_may_leave_at_any_moment(service: Service, turns: int) -> None:
    client = service.connect()
    client.send(HEALTH, turns=turns)
    client.leave()


def refusal(client: Client) -> tuple[int, str]:
    """The status and the code of the only answer, after which the connection is closed."""
    assert client.is_closed
    (status,) = client.statuses
    head, _, body = client.received.partition(b"\r\n\r\n")
    assert b"\r\ncontent-type: application/json\r\n" in head
    return status, json.loads(body)["detail"]["code"]


def test_what_is_not_http_is_refused_in_the_format_of_all_errors(service: Service) -> None:
    client = service.connect()
    client.send(b"\x16\x03\x01 is how TLS begins\r\n\r\n")
    assert refusal(client) == (400, "INVALID_REQUEST")


@pytest.mark.parametrize("start", [b"GET /", HEALTH[:-2] + b"X: "])
def test_a_head_is_limited(service: Service, start: bytes) -> None:
    client = service.connect()
    client.send(start)
    client.send(b"x" * 40_000)
    client.send(b"x" * 30_000)
    assert refusal(client) == (413, "REQUEST_TOO_LARGE")


@pytest.mark.parametrize(
    ("segments", "statuses"),
    [
        ([HEALTH[:-2] + b"X: ", b"x" * 65_000, b"\r\n\r\n"], [200]),
        ([EARLY[:-4] + b"00\r\n\r\n", b" " * 100_000, HEALTH], [200, 200]),
        ([POST, b" " * 999, b" " + HEALTH[:-2], b"X: " + b"x" * 65_000, b"\r\n\r\n"], [200, 200]),
    ],
)
def test_only_the_head_counts(
    service: Service, segments: Sequence[bytes], statuses: Sequence[int]
) -> None:
    client = service.connect()
    for segment in segments:
        client.send(segment)
    assert client.statuses == statuses


# Limits


def test_when_there_is_no_room_the_connection_that_waited_longest_is_closed() -> None:
    with closing(Service(max_connections=5)) as service:
        crowd = [service.connect() for _ in range(5)]
        crowd[0].send(HEALTH)  # it waits for its next request only since now
        for old in crowd[1:3]:
            new = service.connect()
            new.send(HEALTH)
            assert new.statuses == [200]
            assert old.is_closed
        crowd[0].send(HEALTH)
        assert crowd[0].statuses == [200, 200]
        assert not any(client.is_closed for client in crowd[3:])


def test_when_all_are_being_answered_the_new_connection_is_refused() -> None:
    with closing(Service(max_connections=1)) as service:
        busy = service.connect()
        busy.send(SLOW)
        new = service.connect()
        assert refusal(new) == (503, "OVERLOADED")
        assert b"\r\nretry-after: 10\r\n" in new.received
        service.slow_may_end.set()
        service.loop.settle()
        assert busy.statuses == [200]


def test_bad_connections_leave_room_for_honest_ones() -> None:
    limits = ConnectionLimits(50)
    with serve(room=limits) as client, ExitStack() as stack:
        parts = HEALTH[:20], b"\r", EARLY[:-2], EARLY + b"{"
        for part in parts * 50:
            stack.enter_context(connected(client)).sendall(part)
        with connected(client) as honest:
            honest.sendall(HEALTH)
            assert read_answer(honest)[1] == b'{"status":"ok"}'


def test_the_deadline_is_what_is_documented() -> None:
    assert DEADLINE == ConnectionLimits(1).deadline == 10
