"""A check ends with its caller."""

import asyncio
import gc
import json
import socket
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

import pytest
from starlette.types import ASGIApp

from port_checker.api.app import create_app
from port_checker.api.limits import RateLimiter
from port_checker.checker import Checker
from port_checker.connect import Verdict
from port_checker.errors import ErrorCode
from port_checker.metrics import CheckOutcome, Metrics, Totals
from port_checker.server.connections import ConnectionLimits
from port_checker.settings import Settings
from tests.support.http import HEALTH, check_of, connected
from tests.support.loopback import refused_port
from tests.support.manual import Client, ManualLoop, config_of
from tests.support.service import ask, serve
from tests.support.waiting import wait_until


class EndlessChecker(Checker):
    """A checker whose checks last until they are cancelled, which takes them some turns."""

    def __init__(self) -> None:
        super().__init__(retries=1, retry_delay=0, timeout=1, max_in_flight=100)
        self.running = self.cancelled = 0

    async def check(self, *asked: object) -> dict[int, Verdict]:
        self.running += 1
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            for _ in range(4):
                await asyncio.sleep(0)
            raise
        finally:
            self.running -= 1
        raise AssertionError(asked)


@pytest.fixture
def loop() -> Iterator[ManualLoop]:
    with closing(ManualLoop()) as loop:
        yield loop
        loop.settle()
        assert loop.failures == []


@pytest.mark.parametrize("behind", [b"", HEALTH[:9], HEALTH, HEALTH * 200])
def test_a_check_is_cancelled_when_its_caller_disconnects(
    loop: ManualLoop, behind: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    checker = EndlessChecker()
    metrics, totals = Metrics(), Totals()
    totals.add(metrics.row)
    config = config_of(create_app(Settings(), metrics, checker=checker))
    client = Client(loop, ConnectionLimits(9), config)
    client.send(check_of(80) + behind)
    loop.advance_to(10)
    assert checker.running == 1
    client.leave()
    assert (checker.running, checker.cancelled) == (0, 1)
    counted = totals.snapshot()
    assert counted["checks", CheckOutcome.CANCELLED] == 1
    assert not any(counted["errors", code] for code in ErrorCode)  # one outcome, one name
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("size", [20_000, 300_000, 5_000_000])
def test_a_caller_that_leaves_is_noticed_whatever_it_has_sent_behind_its_request(
    size: int, resets: bool
) -> None:
    checker = EndlessChecker()
    with serve(create_app(Settings(), checker=checker)) as client:
        with connected(client) as sock:
            sock.sendall(check_of(80))
            wait_until(lambda: checker.running, "the check")
            sock.setblocking(False)
            with suppress(BlockingIOError):  # what neither end has room for stays unsent
                sent = sock.send(HEALTH * (size // len(HEALTH)))
                assert sent > 16 * 1024
            if resets:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        wait_until(lambda: checker.cancelled, "the end of the check")


def send_check(
    loop: ManualLoop, app: ASGIApp
) -> tuple[asyncio.Task[None], asyncio.Queue[dict[str, Any]]]:
    """Have an application make a check; return its task, and the queue of what it receives."""
    messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    body = json.dumps({"provider_ip": "127.0.0.1", "ports": [80]}).encode()
    messages.put_nowait({"type": "http.request", "body": body})

    async def send(message: object) -> None:
        raise AssertionError(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/check-ports",
        "headers": [],
        "query_string": b"",
        "client": ("127.0.0.1", 1),
    }

    async def answer() -> None:
        await app(scope, messages.get, send)

    return loop.create_task(answer()), messages


@pytest.mark.parametrize("caller_leaves", [False, True])
def test_the_cancellation_of_the_request_itself_is_not_swallowed(
    loop: ManualLoop, caller_leaves: bool
) -> None:
    checker = EndlessChecker()
    task, messages = send_check(loop, create_app(Settings(), checker=checker))
    loop.advance_to(1)
    if caller_leaves:
        messages.put_nowait({"type": "http.disconnect"})
        while not checker.cancelled:
            loop.settle(turns=1)
        assert not task.done()
    task.cancel()
    loop.settle()
    assert checker.running == 0
    assert task.cancelled()


def test_a_request_that_is_cancelled_while_it_pays_gives_its_room_back(loop: ManualLoop) -> None:
    class EndlessLimiter(RateLimiter):
        async def pay_ports(self, *_: object) -> None:
            await asyncio.Event().wait()

    checker = EndlessChecker()
    app = create_app(Settings(), limiter=EndlessLimiter(), checker=checker)
    task, _ = send_check(loop, app)
    loop.settle()
    assert checker.in_flight == 1
    task.cancel()
    loop.settle()
    assert checker.in_flight == 0


@contextmanager
def without_collector() -> Iterator[None]:
    """Have what is in a cycle stay; the collector seldom looks at what is as old as a check."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def no_check_is_kept() -> bool:
    return not {"_WhileConnected", "Ballot"} & {type(each).__name__ for each in gc.get_objects()}


@pytest.mark.parametrize("places", [0, 1])
def test_what_a_check_has_taken_is_freed_when_it_ends(places: int) -> None:
    with (
        refused_port() as refused,
        serve(
            retries=2, retry_delay=0.1, perspectives=places * f"http://127.0.0.1:{refused}"
        ) as client,
        without_collector(),
    ):
        assert ask(client, refused).status_code == (503 if places else 200)
        wait_until(no_check_is_kept, "its end", seconds=60)


@pytest.mark.parametrize("accepted", ["*/*", "application/x-ndjson"])
def test_what_a_check_has_taken_is_freed_when_its_caller_leaves(accepted: str) -> None:
    checker = EndlessChecker()
    request = check_of(80).replace(b"\r\n", f"\r\nAccept: {accepted}\r\n".encode(), 1)
    with serve(create_app(Settings(), checker=checker)) as client, without_collector():
        with connected(client) as sock:
            sock.sendall(request)
            wait_until(lambda: checker.running, "the check")
        wait_until(no_check_is_kept, "its end", seconds=60)
