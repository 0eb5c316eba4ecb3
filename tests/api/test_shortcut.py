"""What the shortcut past FastAPI's layers answers is what these would have answered."""

import asyncio
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, HTTPException, Request, Response

from port_checker.api.app import create_app, create_served_app
from port_checker.api.records import RequestTimer
from port_checker.api.shortcut import PlainRoute, Shortcut
from port_checker.errors import ErrorCode
from port_checker.metrics import REQUESTS, Metrics, Totals
from port_checker.settings import Settings
from tests.support.http import HEALTH, check_of, check_tls_of, connected, read_answer
from tests.support.loopback import refused_port
from tests.support.service import serve
from tests.support.waiting import wait_until


class Served:
    """An application that is being served, and what it counts."""

    def __init__(self, client: httpx.Client, totals: Totals) -> None:
        self._client = client
        self._totals = totals

    def answer(self, request: bytes) -> bytes:
        with connected(self._client) as sock:
            sock.sendall(request)
            head, body = read_answer(sock, has_body=not request.startswith(b"HEAD"))
        assert head.startswith(b"HTTP/1.1 ")
        return re.sub(rb"date: [^\r]*", b"", head) + body

    def counts(self) -> dict[str, float]:
        """How many requests there were of each route, and how many errors of each code."""
        snapshot = self._totals.snapshot()
        counts = {code.value: snapshot["errors", code] for code in ErrorCode}
        for figure in REQUESTS.values:
            route, _, bucket = figure.partition(" ")
            if bucket != "sum":
                counts[route] = counts.get(route, 0) + snapshot[REQUESTS.name, figure]
        return counts


@pytest.fixture(scope="module")
def both() -> Iterator[tuple[Served, Served]]:
    """The application alone, and with the shortcut."""
    with ExitStack() as stack:
        served = []
        for make_app in create_app, create_served_app:
            totals, metrics = Totals(), Metrics()
            totals.add(metrics.row)
            app = make_app(Settings(retries=1, max_ports=2), metrics)
            served.append(Served(stack.enter_context(serve(app)), totals))
        alone, short = served
        yield alone, short


def post(path: str, body: bytes, fields: bytes = b"") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n".encode()
    return head + fields + b"\r\n" + body


def get(target: str, method: str = "GET") -> bytes:
    return f"{method} {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


@pytest.mark.parametrize(
    "request_",
    [
        HEALTH,
        *(get(target) for target in ("/health?a=b", "//health", "/health/", "/h%65alth", "/ip")),
        *(
            get(target)
            for target in ("http://localhost/health", "/none", "/check-ports", "/port/0")
        ),
        *(get("/health", method) for method in ("HEAD", "PUT", "OPTIONS")),
        post("/check-ports", b"no JSON"),
        post("/check-ports", b"{}", b"Accept: application/x-ndjson\r\n"),
        post("/check-ports", b'{"provider_ip": "127.0.0.1", "ports": [1, 2, 3]}'),
        post("/check-ports", b'{"provider_ip": "10.0.0.1", "ports": [1]}'),
        post("/check-ports", b" " * 70_000),
        post("/check-ports", b"{}", b"Origin: http://elsewhere.example\r\n"),
        post("/check-tls", b"{}"),
    ],
    ids=lambda request: request[:60].decode(),
)
def test_answers_and_counts_are_those_of_the_application_alone(
    both: tuple[Served, Served], request_: bytes
) -> None:
    alone, short = both
    before = alone.counts()
    assert short.answer(request_) == alone.answer(request_)
    wait_until(lambda: alone.counts() != before, "the figures of the request")
    wait_until(lambda: short.counts() == alone.counts(), "the same figures", seconds=60)


def test_checks_are_answered_alike(both: tuple[Served, Served]) -> None:
    alone, short = both
    with refused_port() as port:
        for request in check_of(port), check_tls_of(port):
            answer = alone.answer(request)
            assert short.answer(request) == answer
            assert b"Connection refused" in answer


def test_allowed_hosts_are_asked_for_whatever_the_route() -> None:
    settings = Settings(allowed_hosts=("checker.example",))
    with serve(create_served_app(settings, Metrics())) as client:
        assert client.get("/health", headers={"Host": "elsewhere.example"}).status_code == 403
        assert client.get("/health", headers={"Host": "checker.example"}).status_code == 200


class TimesOf(Metrics):
    """Keeps how long requests took."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def time_request(self, _: str, seconds: float) -> None:
        self.seconds.append(seconds)


def test_a_request_that_is_cancelled_is_timed() -> None:
    async def wait(_: Request) -> Response:
        await asyncio.Event().wait()
        raise AssertionError

    metrics = TimesOf()
    app = FastAPI()
    app.router.add_api_route("/", wait, route_class_override=PlainRoute)

    async def cancel() -> None:
        scope = {"type": "http", "method": "GET", "path": "/"}
        request = asyncio.create_task(Shortcut(app, metrics)(scope, nothing, nothing))
        await asyncio.sleep(0)
        request.cancel()
        await asyncio.wait([request])
        assert request.cancelled()

    asyncio.run(cancel())
    assert len(metrics.seconds) == 1


async def nothing(*_: object) -> Any:
    raise AssertionError


def test_the_time_of_an_error_begins_with_its_request() -> None:
    async def fail_after_10_ms(_: Request) -> Response:
        end = time.perf_counter() + 0.01
        while time.perf_counter() < end:
            pass
        raise HTTPException(418)

    metrics = TimesOf()
    app = FastAPI()
    app.router.add_api_route("/", fail_after_10_ms, route_class_override=PlainRoute)
    app.add_middleware(RequestTimer, metrics=metrics)
    with serve(Shortcut(app, metrics)) as client:
        assert client.get("/").status_code == 418
    (seconds,) = metrics.seconds
    assert seconds >= 0.01
