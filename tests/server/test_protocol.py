"""Connections that misbehave, and those that do not."""

import asyncio
import json
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import cached_property
from typing import Any

import pytest
from fastapi import FastAPI, Response
from uvicorn import Config
from uvicorn.server import ServerState

from port_checker.addresses import Address, parse_address, parse_host, parse_networks
from port_checker.metrics import Totals
from port_checker.schemas import ErrorCode
from port_checker.server.connections import DEADLINE, MIN_COST, ConnectionLimits
from port_checker.server.protocol import MAX_FRAMING
from tests.support.http import HEALTH, connected, read_answer
from tests.support.manual import Client, ManualLoop, config_of
from tests.support.service import serve
from tests.support.waiting import wait_until

EARLY = b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
POST = EARLY.replace(b"early", b"echo")
CHUNKED = POST.replace(b"Content-Length: 1000", b"Transfer-Encoding: chunked")
UPGRADE = POST.replace(b"Host: x", b"Host: x\r\nUpgrade: h2c\r\nConnection: Upgrade")
SLOW = HEALTH.replace(b"health", b"slow")
LARGE = HEALTH.replace(b"health", b"large")


class Service:
    """A server of an application that shows what it was asked, in time that the test advances."""

    def __init__(self, max_connections: int = 1000) -> None:
        self.loop = ManualLoop()
        self.refused: list[tuple[Address | None, ErrorCode]] = []
        self.limits = ConnectionLimits(
            max_connections,
            trusted_proxies=parse_networks("127.0.0.1"),
            log_refusal=lambda caller, code, _: self.refused.append((caller, code)),
        )
        self.state = ServerState()
        self.slow_may_end = asyncio.Event()
        self.clients: list[Client] = []
        self.started = 0

    @cached_property
    def config(self) -> Config:
        """Made by the first client: until the test begins, pytest still adds handlers of logs."""
        return config_of(self.app)

    def connect(self, address: str | None = "127.0.0.1") -> Client:
        client = Client(self.loop, self.limits, self.config, state=self.state, address=address)
        self.clients.append(client)
        return client

    def closed(self, reason: str) -> float:
        """How many connections were closed, as the metrics count it."""
        totals = Totals()
        totals.add(self.limits.metrics.row)
        return totals.snapshot()["connections_closed", reason]

    def assert_closed_at(self, client: Client, seconds: float) -> None:
        """Check that the server closes a connection then, and not sooner."""
        self.loop.advance_to(seconds - 0.1)
        assert not client.is_closed
        self.loop.advance_to(seconds)
        assert client.is_closed

    def close(self) -> None:
        """Disconnect all clients, and check that nothing has failed unseen."""
        self.slow_may_end.set()
        for client in self.clients:
            client.abort()
        self.loop.settle()
        self.loop.close()
        assert self.loop.failures == []

    async def app(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        """Answer with what was asked; /early before the body is there, /slow when it may end."""
        self.started += 1
        body = b""
        while scope["path"] != "/early":
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        if scope["path"] == "/slow":
            await self.slow_may_end.wait()
        if scope["path"] == "/host":
            body = dict(scope["headers"])[b"host"]
        names = sorted(name.decode() for name, _ in scope["headers"])
        answer = json.dumps([scope["method"], scope["path"], names, body.decode()])
        if scope["path"] == "/host":
            answer = body.decode()
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
        (CHUNKED, b"1\r\n\n\r\n"),
        (EARLY, b" "),
        (HEALTH + b"G", b""),
        (CHUNKED + b"0\r\n", b"X: y\r\n"),
        (UPGRADE, b" "),
    ],
)
def test_a_request_has_ten_seconds_to_arrive(service: Service, sent: bytes, trickle: bytes) -> None:
    client = service.connect()
    client.keeps_open = True
    client.send(sent)
    for second in range(1, 10):
        service.loop.advance_to(second)
        client.send(trickle)
    service.assert_closed_at(client, 10)


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
    service.assert_closed_at(client, 45)


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
        serve(app, limits=ConnectionLimits(100, deadline=0.2)) as client,
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


def test_between_requests_a_connection_is_kept_for_620_seconds(service: Service) -> None:
    client = service.connect()
    client.send(HEALTH)
    service.loop.advance_to(619.9)
    client.send(HEALTH)
    assert client.statuses == [200, 200]
    service.assert_closed_at(client, 619.9 + 620)


def test_a_client_that_reads_slowly_is_not_cut_off(service: Service) -> None:
    client = service.connect()
    client.reads = False
    client.send(LARGE)
    for second in 9, 18, 27:
        service.loop.advance_to(second)
        client.read_some(1000)
    service.loop.advance_to(36)
    assert not client.is_closed
    service.loop.advance_to(38)
    assert client.is_aborted


# What belongs to a request


def seen(client: Client) -> list[Any]:
    """What the application was asked, as its answers tell."""
    bodies = client.received.split(b"\r\n\r\n")[1:]
    return [json.JSONDecoder().raw_decode(body.decode())[0] for body in bodies]


REST = b"\r\n\r\nsmuggled\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
FRAMINGS = {
    "none": (b"", b"", b""),
    "length": (b"Content-Length: %d\r\n" % len(REST), REST, REST),
    "chunked": (
        b"Transfer-Encoding: chunked\r\n",
        b"%x;a=b\r\n%b\r\n4\r\n\r\n\r\n\r\n0\r\nX-Forwarded-For: y\r\nUpgrade: z\r\n\r\n"
        % (len(REST), REST),
        REST + b"\r\n\r\n",
    ),
}


@pytest.mark.parametrize(
    ("framing", "method", "fields"),
    [
        ("none", b"POST", b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\n"),
        ("length", b"POST", b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\n"),
        ("chunked", b"POST", b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\n"),
        ("none", b"GET", b"Connection: upgrade\r\nUpgrade: websocket\r\n"),
        ("length", b"OPTIONS", b"Upgrade: TLS/1.0\r\nConnection: Upgrade\r\n"),
        ("none", b"CONNECT", b""),
        ("chunked", b"CONNECT", b""),
        ("chunked", b"POST", b""),
    ],
)
def test_an_upgrade_is_ignored_and_a_trailer_dropped_in_every_segmentation(
    service: Service, framing: str, method: bytes, fields: bytes
) -> None:
    field, sent, body = FRAMINGS[framing]
    request = b"%b /echo HTTP/1.1\r\nHost: x\r\n%b%b\r\n%b" % (method, fields, field, sent)
    data = request * 2 + HEALTH
    names = sorted(
        line.partition(b":")[0].decode().lower()
        for line in (b"Host: x\r\n" + fields + field).splitlines()
    )
    echoed = [method.decode(), "/echo", names, body.decode()]
    expected = [echoed, echoed, ["GET", "/health", ["host"], ""]]
    cuts = [[data[:at], data[at:]] for at in range(len(data))]
    for size in 1, 2, 3, 4, 5, 50:
        for first in range(min(size, 5)):
            rest = range(first, len(data), size)
            cuts.append([data[:first], *(data[at : at + size] for at in rest)])
    for segments in cuts:
        client = service.connect()
        for segment in segments:
            client.send(segment, turns=2)
        service.loop.settle()
        assert seen(client) == expected, segments
        client.leave()


@pytest.mark.parametrize(
    ("frame", "repeated"),
    [(b"0\r\nX: y", b"y"), (b"0\r\n", b"X: y\r\n"), (b"1;a=b", b"c"), (b"", b"1\r\nx\r\n")],
)
def test_chunk_framing_and_trailers_are_limited(
    service: Service, frame: bytes, repeated: bytes
) -> None:
    client = service.connect()
    client.send(CHUNKED + frame)
    sent = 0
    while not client.is_closed:
        assert sent <= 2 * MAX_FRAMING
        client.send(repeated * 100)
        sent += len(repeated) * 100
    assert refusal(client) == (413, "REQUEST_TOO_LARGE")


def test_a_body_of_64_kib_in_chunks_of_128_bytes_is_fine(service: Service) -> None:
    client = service.connect()
    client.send(CHUNKED)
    client.send((b"80\r\n" + b"x" * 128 + b"\r\n") * 512)
    client.send(b"0\r\n\r\n")
    assert len(seen(client)[0][3]) == 65536


# Answers


def test_pipelined_requests_are_answered_in_turn(service: Service) -> None:
    client = service.connect()
    paths = [f"/{number}" for number in range(3000)]
    client.send(b"".join(HEALTH.replace(b"/health", path.encode()) for path in paths))
    service.loop.settle()
    assert [path for _, path, _, _ in seen(client)] == paths


def test_what_follows_an_error_is_refused_for_its_own_reason() -> None:
    with serve() as client, connected(client) as sock:
        sock.sendall(HEALTH.replace(b"health", b"nothing") + HEALTH.replace(b"health", b"x" * 2048))
        assert read_answer(sock)[0].startswith(b"HTTP/1.1 404 ")
        assert read_answer(sock)[0].startswith(b"HTTP/1.1 413 ")


def test_while_one_request_is_answered_no_more_than_a_few_are_read(service: Service) -> None:
    client = service.connect()
    client.send(SLOW)
    for _ in range(20):
        client.send(HEALTH * 100)
    assert client.unsent == 20 * 100 * len(HEALTH) - 5 * 100 * len(HEALTH)
    assert service.started == 1
    service.slow_may_end.set()
    service.loop.settle()
    assert client.statuses == [200] * 2001


def test_an_answer_is_one_packet() -> None:
    with serve() as client, connected(client) as sock:
        for answered in range(1, 6):
            sock.sendall(HEALTH)
            assert read_answer(sock)[1] == b'{"status":"ok"}'
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
            (with_data,) = struct.unpack_from("=I", info, 152)  # struct tcp_info: tcpi_data_segs_in
            assert with_data == answered


def test_a_large_answer_is_not_copied_for_each_client(service: Service) -> None:
    sent: list[object] = []
    shared = b"x" * 1_000_000

    class Recorder(Client):
        def writelines(self, parts: Iterable[object]) -> None:
            sent.extend(parts)

    async def app(_: object, __: object, send: Any) -> None:
        headers = [(b"content-length", b"%d" % len(shared))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": shared})

    client = Recorder(service.loop, service.limits, config_of(app))
    client.send(HEALTH)
    client.leave()
    assert len(sent) == 2
    assert sent[1] is shared


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


NOT_HTTP = [
    b"\x16\x03\x01 is how TLS begins\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(30),
    b"GET / HTTP/2.0\r\nHost: x\r\n\r\n",
    b"GET /\r\n\r\n",
    b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\nUpgrade: y\r\nConnection: Upgrade\r\n\r\nGET / ",
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.0\r\nHost: x\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1\nHost: x\n\n",
    HEALTH[:-2] + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    HEALTH[:-2] + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\n",
    HEALTH[:-2] + b"Content-Length: +1\r\n\r\n",
    HEALTH[:-2] + b"Content-Length: 1" + b"0" * 5000 + b"\r\n\r\n",
    HEALTH[:-2] + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    HEALTH[:-2] + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"GET / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    HEALTH[:-2] + b"X: a\r\n folded\r\n\r\n",
    HEALTH[:-2] + b"X : a\r\n\r\n",
    HEALTH[:-2] + b"X: \0\r\n\r\n",
    HEALTH[:-2] + b"X: a\rb\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
    b"get / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"FOO / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1 \r\nHost: x\r\n\r\n",
]


@pytest.mark.parametrize("sent", NOT_HTTP)
def test_what_is_not_http_gets_one_error_in_every_segmentation(
    service: Service, sent: bytes
) -> None:
    for at in range(0, len(sent), 1 + len(sent) // 500):  # not between each two of 5,000 zeros
        client = service.connect()
        client.send(sent[:at], turns=2)
        client.send(sent[at:], turns=10)
        assert refusal(client) == (400, "INVALID_REQUEST"), at


@pytest.mark.parametrize(
    "sent",
    [
        [b"\r\nHEAD / HTTP/1.1\r\nHost: a b\r\n\r\n"],
        [b"HEAD / HTTP/1.1\r\nHost: x\r\nX: ", b"x" * 20_000],
        [CHUNKED.replace(b"POST", b"HEAD"), b"no size\r\n"],
        [UPGRADE.replace(b"POST", b"HEAD") + b"x", b"y"],
    ],
)
def test_a_refused_head_request_gets_an_answer_without_a_body(
    service: Service, sent: list[bytes]
) -> None:
    client = service.connect()
    for part in sent:
        client.send(part)
    service.loop.settle()
    for connection in service.state.connections:
        connection.shutdown()
    (status,) = client.statuses
    assert status in (400, 413, 503)
    assert client.received.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    "sent", [b"\x16\x03\x01\x02\0\x01", b"SSH-2.0-x\r\n", b"GET /\r\n", HEALTH[:-2] + b"X: y\n"]
)
def test_what_cannot_become_http_is_refused_at_once(service: Service, sent: bytes) -> None:
    client = service.connect()
    client.send(sent)
    assert refusal(client) == (400, "INVALID_REQUEST")


def test_http_1_0_needs_no_host(service: Service) -> None:
    client = service.connect()
    client.send(b"GET /health HTTP/1.0\r\n\r\n")
    assert client.statuses == [200]
    assert client.is_closed


@pytest.mark.parametrize("request_", [EARLY, CHUNKED.replace(b"echo", b"early")])
@pytest.mark.parametrize("rest", [b" " * 1000 + HEALTH, b"3e8\r\n" + b" " * 1000, b"no chunk"])
def test_after_an_early_answer_nothing_more_is_parsed(
    service: Service, request_: bytes, rest: bytes
) -> None:
    client = service.connect()
    client.keeps_open = True
    client.send(request_)
    assert client.statuses == [200]
    assert b"connection: close" in client.received
    assert client.has_eof
    assert not client.is_closed  # which would reset the connection, and could lose the answer
    client.send(rest)
    assert client.statuses == [200]
    client.send(b" " * 2**20)
    assert client.is_closed
    assert service.started == 1


def test_after_an_early_answer_a_client_has_the_rest_of_the_ten_seconds(service: Service) -> None:
    client = service.connect()
    client.keeps_open = True
    service.loop.advance_to(4)
    client.send(EARLY)
    service.assert_closed_at(client, 10)


def test_a_complete_request_keeps_its_connection_however_it_arrives(service: Service) -> None:
    client = service.connect()
    for part in EARLY.replace(b"early", b"slow"), b" " * 999, b" ":
        client.send(part)
    service.slow_may_end.set()
    service.loop.settle()
    client.send(HEALTH)
    assert client.statuses == [200, 200]


@pytest.mark.parametrize("start", [b"GET /", HEALTH[:-2] + b"X: "])
@pytest.mark.parametrize("ending", [b"", b"\r\n\r\n"])
def test_a_head_is_limited(service: Service, start: bytes, ending: bytes) -> None:
    client = service.connect()
    client.send(start)
    client.send(b"x" * 10_000)
    client.send(b"x" * 10_000 + ending)
    assert refusal(client) == (413, "REQUEST_TOO_LARGE")


def test_a_target_is_limited(service: Service) -> None:
    for length, status in (2048, 200), (2049, 413):
        client = service.connect()
        client.send(HEALTH.replace(b"/health", b"/" + b"x" * (length - 1)))
        assert client.statuses == [status]


@pytest.mark.parametrize(
    ("segments", "statuses"),
    [
        ([HEALTH[:-2] + b"X: ", b"x" * 16_300, b"\r\n\r\n"], [200]),
        ([POST, b" " * 999, b" " + HEALTH[:-2], b"X: " + b"x" * 16_300, b"\r\n\r\n"], [200, 200]),
    ],
)
def test_only_the_head_counts(
    service: Service, segments: Sequence[bytes], statuses: Sequence[int]
) -> None:
    client = service.connect()
    for segment in segments:
        client.send(segment)
    assert client.statuses == statuses


def test_the_fields_of_a_head_are_limited(service: Service) -> None:
    for number, statuses in (99, [200]), (100, [413]):  # besides Host
        client = service.connect()
        client.send(HEALTH[:-2] + b"X:\r\n" * number + b"\r\n")
        assert client.statuses == statuses


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET http://x/health HTTP/1.1\r\nHost: x\r\n\r\n", 200),
        (b"GET http://x HTTP/1.1\r\nHost: x\r\n\r\n", 200),
        (b"GET HTTPS://[::1]:80?a HTTP/1.1\r\nHost: x\r\n\r\n", 200),
        (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", 200),
        (b"OPTIONS http://x HTTP/1.1\r\nHost: x\r\n\r\n", 200),
        (b"GET //x HTTP/1.1\r\nHost:\r\n\r\n", 200),
        (b"GET * HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET x:80 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET http:// HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET http://a@x/ HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET ftp://x/ HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"CONNECT http://x HTTP/1.1\r\nHost: x\r\n\r\n", 200),
    ],
)
def test_every_form_of_a_target_has_a_clean_answer(
    service: Service, request_: bytes, status: int
) -> None:
    client = service.connect()
    client.send(request_)
    assert client.statuses == [status]
    assert b"callback" not in client.received


def test_the_host_of_an_absolute_target_stands_for_the_field(service: Service) -> None:
    client = service.connect()
    client.send(b"GET http://a.example:80/host?b HTTP/1.1\r\nHost: c\r\n\r\n")
    assert client.received.endswith(b"a.example:80")


def test_only_http_1_1_has_interim_answers(service: Service) -> None:
    for version, statuses in (b"1.1", [100, 200]), (b"1.0", [200]):
        client = service.connect()
        head = POST.replace(b"1.1", version).replace(b"Host: x", b"Host: x\r\nExpect: 100-continue")
        client.send(head)
        client.send(b" " * 1000)
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
    assert service.refused == [(parse_address("127.0.0.1"), ErrorCode.OVERLOADED)]


def test_a_client_that_does_not_read_makes_way() -> None:
    with closing(Service(max_connections=2)) as service:
        deaf, busy = service.connect(), service.connect()
        deaf.reads = False
        deaf.send(LARGE)
        busy.send(SLOW)
        new = service.connect()
        new.send(HEALTH)
        assert new.statuses == [200]
        assert deaf.is_aborted
        assert not busy.is_closed


def test_an_address_has_a_tenth_of_the_room() -> None:
    same = [
        ("203.0.113.7", "203.0.113.7"),
        ("2001:db8::7", "2001:db8::8"),
        ("::ffff:203.0.113.8", "203.0.113.8"),
        ("fe80::7%eth0", "fe80::7%eth1"),
    ]
    with closing(Service(max_connections=50)) as service:
        for address, other in same:
            crowd = [service.connect(address) for _ in range(5)]
            assert not service.connect(other).is_admitted
            assert not any(client.is_closed for client in crowd)
            crowd[0].leave()
            assert service.connect(other).is_admitted
        for proxy in "127.0.0.1", None:  # None is on a Unix socket
            trusted = [service.connect(proxy) for _ in range(10)]
            assert not any(client.is_closed for client in trusted)
        assert service.closed("over_share") == len(same)
    assert service.refused == [(parse_host(other), ErrorCode.OVERLOADED) for _, other in same]


def test_an_address_has_256_connections_and_a_48_has_two_shares() -> None:
    with closing(Service(max_connections=10_000)) as service:
        admitted = [service.connect("203.0.113.7").is_admitted for _ in range(300)]
        assert sum(admitted) == 256
        admitted = [service.connect(f"2001:db8:0:{i:x}::1").is_admitted for i in range(600)]
        assert sum(admitted) == 512
        assert service.connect("2001:db8:1::1").is_admitted


def test_in_a_full_share_an_idle_connection_makes_way() -> None:
    with closing(Service(max_connections=20)) as service:
        idle, kept = (service.connect("203.0.113.7") for _ in range(2))
        for client in idle, kept:
            client.send(HEALTH)
        assert not service.connect("203.0.113.7").is_admitted
        service.loop.advance_to(11)
        kept.send(HEALTH)
        assert service.connect("203.0.113.7").is_admitted
        assert idle.is_closed
        assert not kept.is_closed
        assert not service.connect("203.0.113.7").is_admitted
    assert service.closed("made_way") == 1
    assert len(service.refused) == 2  # an idle connection was not refused anything


def test_what_one_address_may_have_read_in_memory_is_bounded() -> None:
    body = POST.replace(b"1000", b"65000") + b" " * 60_000
    with closing(Service(max_connections=10_000)) as service:
        crowd = [service.connect("203.0.113.7") for _ in range(40)]
        other = service.connect("203.0.113.8")
        for client in other, *crowd:
            client.send(body)
        assert [client.is_closed for client in crowd] == [True] * 6 + [False] * 34
        assert not other.is_closed
        for client in crowd:
            client.leave()
        crowd = [service.connect("203.0.113.7") for _ in range(34)]
        for client in crowd:
            client.send(body)
        assert not any(client.is_closed for client in crowd)


# The event loop's turns


def test_in_one_turn_one_address_has_a_few_requests_read(service: Service) -> None:
    crowd = [service.connect("203.0.113.7") for _ in range(100)]
    pipelining = service.connect("203.0.113.8")
    for client in crowd:
        client.send(SLOW, turns=0)
    pipelining.send(HEALTH * 100, turns=0)
    for _ in range(20):
        before = service.started
        service.connect("203.0.113.9").send(HEALTH, turns=1)
        assert service.started - before <= 2 * (8 + 8 + 1)
    service.slow_may_end.set()
    service.loop.settle()
    assert [client.statuses for client in crowd] == [[200]] * 100
    assert pipelining.statuses == [200] * 100
    assert [client.statuses for client in service.clients[101:]] == [[200]] * 20


def test_in_one_turn_all_addresses_together_have_a_few_requests_read(service: Service) -> None:
    crowd = [service.connect(f"203.0.113.{number}") for number in range(100)]
    for client in crowd:
        client.send(HEALTH * 9, turns=0)
    while service.started < 500:
        before = service.started
        service.loop.settle(turns=1)
        assert service.started - before <= 3 * 24


def test_a_newcomer_waits_for_nobodys_pile(service: Service) -> None:
    crowd = [service.connect(f"203.0.113.{number % 50}") for number in range(800)]
    for client in crowd:
        client.send(HEALTH, turns=0)
    service.loop.settle(turns=1)
    newcomers = [service.connect(f"198.51.100.{number}") for number in range(20)]
    for newcomer in newcomers:
        newcomer.send(HEALTH, turns=0)
    service.loop.settle(turns=6)
    assert [newcomer.statuses for newcomer in newcomers] == [[200]] * 20
    assert service.started < 400
    service.loop.settle()
    assert service.started == 820


def test_newcomers_leave_time_for_those_who_take_turns(service: Service) -> None:
    patient = [service.connect("203.0.113.7") for _ in range(20)]
    for client in patient:
        client.send(HEALTH, turns=0)
    for turn in range(5):
        for number in range(100):
            service.connect(f"198.51.{turn}.{number}").send(HEALTH, turns=0)
        service.loop.settle(turns=1)
    assert [client.statuses for client in patient] == [[200]] * 20


def test_a_bug_in_one_request_does_not_stop_the_turns_of_others() -> None:
    loop, limits = ManualLoop(), ConnectionLimits(100)
    done: list[int] = []
    works = [
        place.work
        for number in (1, 2)
        if (place := limits.admit(parse_address(f"203.0.113.{number}"), 0.0, lambda: False))
    ]

    def fail() -> None:
        raise ZeroDivisionError

    for work in works:
        while work.may_start(MIN_COST, loop, fail if work is works[0] else lambda: done.append(1)):
            pass
    loop.settle()
    loop.close()
    assert [str(failure["exception"]) for failure in loop.failures] == [""]
    assert done == [1]


def test_a_client_may_leave_while_it_waits_for_its_turn(service: Service) -> None:
    crowd = [service.connect("203.0.113.7") for _ in range(50)]
    for client in crowd:
        client.send(HEALTH, turns=0)
    for client in crowd:
        client.abort()
    service.loop.settle()
    assert service.started == 8


def test_while_the_service_stops_new_requests_are_refused(service: Service) -> None:
    new, half_a_head, half_a_body, answered, busy = (service.connect() for _ in range(5))
    half_a_head.send(HEALTH[:9])
    half_a_body.send(POST)
    answered.send(HEALTH)
    busy.send(SLOW + HEALTH)
    for client in service.clients:
        client.protocol.drain()
    assert refusal(half_a_body) == (503, "OVERLOADED")
    half_a_head.send(HEALTH[9:])
    new.send(HEALTH)
    for client in half_a_head, new:
        assert refusal(client) == (503, "OVERLOADED")
        assert b"\r\nretry-after: 10\r\n" in client.received
    answered.send(HEALTH)
    assert answered.statuses == [200, 503]
    service.slow_may_end.set()
    service.loop.settle()
    assert busy.statuses == [200]
    assert busy.is_closed


def test_when_the_service_has_finished_connections_are_closed(service: Service) -> None:
    new, half_a_head, answered = (service.connect() for _ in range(3))
    half_a_head.send(HEALTH[:9])
    answered.send(HEALTH)
    for client in service.clients:
        client.protocol.shutdown()
    service.loop.settle()
    assert refusal(half_a_head) == (503, "OVERLOADED")
    assert new.is_closed
    assert answered.is_closed


def test_when_the_service_has_finished_it_waits_for_no_connection_that_it_has_accepted(
    service: Service,
) -> None:
    with serve(limits=service.limits):
        assert not service.limits.has_stopped
    late = service.connect()
    assert refusal(late) == (503, "OVERLOADED")
    assert late.is_closed


@pytest.mark.parametrize(
    "sent",
    [
        b"POST /check-ports HTTP/1.1\r\nHost: x\r\nContent-Length: 70000\r\n\r\n" + b"x" * 70_000,
        HEALTH[:-2] + b"Connection: close\r\n\r\n" + b"x" * 70_000,
    ],
)
def test_a_client_that_has_its_last_answer_may_leave_however_much_it_has_sent(sent: bytes) -> None:
    limits = ConnectionLimits(10, deadline=3600)
    with serve(limits=limits) as client:
        with connected(client) as sock:
            sock.sendall(sent)
            read_answer(sock)
        wait_until(lambda: limits.size == 0, "the end of the connection")


def test_bad_connections_leave_room_for_honest_ones() -> None:
    limits = ConnectionLimits(50, trusted_proxies=parse_networks("127.0.0.1"))
    with serve(limits=limits) as client, ExitStack() as stack:
        parts = HEALTH[:20], b"\r", EARLY[:-2], EARLY + b"{"
        for part in parts * 50:
            stack.enter_context(connected(client)).sendall(part)
        with connected(client) as honest:
            honest.sendall(HEALTH)
            assert read_answer(honest)[1] == b'{"status":"ok"}'


def test_the_deadline_is_what_is_documented() -> None:
    assert DEADLINE == ConnectionLimits(1).deadline == 10
