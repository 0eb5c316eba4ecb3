"""Limits in Redis: held together by many processes, and by each of them while Redis is lost."""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
import uvloop
from redis.backoff import NoBackoff
from redis.retry import Retry

from port_checker.addresses import parse_address
from port_checker.server.app import create_app
from port_checker.server.rate_limit import RateLimited, RateLimiter
from port_checker.server.settings import Rate, Settings
from tests.support.loopback import free_port, open_port, refused_port
from tests.support.service import Program, ask, program, serve
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(
    os.environ.get("CI") != "true" and not shutil.which("redis-server"),
    reason="redis-server is not installed",
)

LOST = "WARNING port_checker.server.shared_limit: Redis is lost"
BACK = "INFO port_checker.server.shared_limit: Redis is back"
CALLER = parse_address("203.0.113.7")
CALLERS_KEY = "port-checker:callers:v1:gcra:203.0.113.7"
PASSWORD = "s3cret"  # noqa: S105  # of the Redis that the tests start

# Seconds that a check and a busy machine take, beside what a request may wait for Redis.
NOISE = 0.4

# Seconds that a payment waits in tests of what is counted where: a busy machine's Redis, which may
# take longer than the default patience, must not seem lost.
PATIENT = 0.2


class RedisServer:
    """A Redis on a port of its own, which keeps nothing on disk.

    The user of ``url`` may do what the service needs, and nothing else.
    """

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.url = f"redis://checker:{PASSWORD}@{self.address}/0"
        self._directory = directory
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        user = f"checker on >{PASSWORD} ~port-checker:* +evalsha +script|load +time +get +set"
        process = subprocess.Popen(
            [
                *["redis-server", "--port", str(self.port), "--bind", "127.0.0.1"],
                *["--save", "", "--appendonly", "no", "--user", *user.split()],
            ],
            cwd=self._directory,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

        def answers() -> bool:
            assert process.poll() is None
            with contextlib.suppress(redis.ConnectionError):
                return bool(self.command("PING"))
            return False

        wait_until(answers)
        return process

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def start_again(self) -> None:
        self.process = self._start()

    def _client(self) -> redis.Redis:
        return redis.Redis(port=self.port, retry=Retry(NoBackoff(), 0))

    def command(self, *words: str) -> Any:
        with self._client() as client:
            return client.execute_command(*words)

    def connections(self) -> int:
        """How many the service has."""
        with self._client() as client:
            return sum(other["user"] == "checker" for other in client.client_list())

    def key_names(self) -> set[str]:
        return {key.decode() for key in self.command("KEYS", "*")}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    started = RedisServer(tmp_path)
    try:
        yield started
    finally:
        started.kill()


class Wire:
    """What lies between the service and Redis.

    Attributes:
        delay: Seconds by which each answer is late.
        answer: If there is one, it is said to whatever is asked, which does not get through.
        connections: How many there have been.
    """

    def __init__(self, server: RedisServer) -> None:
        self._server = server
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        self.url = server.url.replace(server.address, f"127.0.0.1:{port}")
        self.delay = 0.0
        self.answer: bytes | None = None
        self.connections = 0
        self._sockets: list[socket.socket] = []
        self._cut: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def cut(self) -> None:
        """Let nothing more through on the connections that there are, which do not end by that."""
        self._cut = list(self._sockets)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                far = socket.create_connection(("127.0.0.1", self._server.port))
                self._sockets += [near, far]
                self.connections += 1
                for run in (
                    lambda n=near, f=far: self._ask(n, f),
                    lambda n=near, f=far: self._tell(n, f),
                ):
                    self._threads.append(threading.Thread(target=run))
                    self._threads[-1].start()

    def _ask(self, near: socket.socket, far: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := near.recv(65536):
                if self.answer is not None:
                    near.sendall(self.answer)
                elif near not in self._cut:
                    far.sendall(data)
            far.shutdown(socket.SHUT_RDWR)

    def _tell(self, near: socket.socket, far: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := far.recv(65536):
                time.sleep(self.delay)
                near.sendall(data)
            near.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for sock in (self._listener, *self._sockets):
            sock.close()


@pytest.fixture
def wire(server: RedisServer) -> Iterator[Wire]:
    laid = Wire(server)
    try:
        yield laid
    finally:
        laid.close()


class Log:
    """What the service logs in this process."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG)
        self._caplog = caplog

    def count(self, what: str) -> int:
        return sum(
            f"{record.levelname} {record.name}: {record.getMessage()}".startswith(what)
            for record in self._caplog.records
        )

    async def wait_for(self, what: str, times: int = 1, seconds: float = 20) -> None:
        async with asyncio.timeout(seconds):
            while self.count(what) < times:
                await asyncio.sleep(0.01)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[Log]:
    yield Log(caplog)
    assert PASSWORD not in caplog.text


def hourly(callers: int, store: str) -> RateLimiter:
    hour = timedelta(hours=1)
    return RateLimiter(Rate(callers, hour), Rate(callers, hour), store, PATIENT)


async def let_through(limiter: RateLimiter, most: int = 100) -> int:
    """How many requests of one caller go through before one is refused, or ``most``."""
    for count in range(most):
        began = time.monotonic()
        try:
            await limiter.pay_caller(CALLER)
        except RateLimited:
            return count
        finally:
            assert time.monotonic() - began < PATIENT + NOISE
    return most


@contextlib.contextmanager
def service(store: str, **variables: str) -> Iterator[Program]:
    """A program whose limits are counted and not reached, unless the variables say so.

    In the end, nothing of it is left behind.
    """
    environment = {
        "PORT_CHECKER_RATE_LIMIT_STORE": store,
        "PORT_CHECKER_RATE_LIMIT": "999999999/hour",
        "PORT_CHECK_TARGET_RATE_LIMIT": "999999999/hour",
        "PORT_CHECKER_DEBUG": "true",
        "PYTHONWARNINGS": "always::ResourceWarning",
        **variables,
    }
    with program(ready=True, descriptors=None, **environment) as running:
        try:
            yield running
        finally:
            status = running.stop()  # with its workers
    assert status == 0
    for trouble in (
        PASSWORD,
        "Traceback",
        "unclosed Conn",
        "unclosed tr",
        "never awaited",
        "destroyed",
    ):
        assert not count(running, trouble)


def count(running: Program, what: str) -> int:
    return sum(what in line for line in running.lines)


def test_servers_and_workers_hold_one_limit(server: RedisServer) -> None:
    variables = {
        "PORT_CHECKER_WORKERS": "2",
        "PORT_CHECKER_RATE_LIMIT": "60/hour",
        "PORT_CHECK_MAX_PORTS": "1",
        "PORT_CHECK_TARGET_RATE_LIMIT": "40/hour",
    }
    with (
        open_port() as opened,
        service(server.url, **variables) as one,
        service(server.url, **variables) as other,
    ):
        wait_until(lambda: server.connections() >= 4)  # each process has one

        def outcome(client: httpx.Client) -> str:
            answer = ask(client, opened).json()
            return str(answer["detail"]["message"] if "detail" in answer else answer["success"])

        with one.client() as client, other.client() as others, ThreadPoolExecutor(8) as pool:
            for each in (client, others):
                each.headers["Connection"] = "close"  # always another one, so all workers get some
            outcomes = Counter(
                text.partition(". ")[0] for text in pool.map(outcome, [client, others] * 60)
            )
        assert not count(one, LOST) + count(other, LOST)
        assert outcomes == {
            "True": 40,
            "Too many ports of 127.0.0.1 were asked for": 20,
            "You ask too often": 60,
        }
        assert server.key_names() >= {
            "port-checker:callers:v1:gcra:127.0.0.1",
            "port-checker:targets:v1:gcra:127.0.0.1",
        }
        for key in server.key_names():
            assert key.startswith("port-checker:")
            assert server.command("TTL", key) != -1  # it expires by itself
    assert server.connections() == 0


class Asker:
    """Asks for checks, one after the other, and measures how long each takes."""

    def __init__(self, running: Program, opened: int) -> None:
        self.statuses: Counter[int] = Counter()
        self.seconds: list[float] = []
        self._running = running
        self._opened = opened
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        with self._running.client() as client:
            while not self._enough.is_set():
                began = time.monotonic()
                self.statuses[ask(client, self._opened).status_code] += 1
                self.seconds.append(time.monotonic() - began)

    def __enter__(self) -> "Asker":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        self._thread.join()

    def wait_for_answers(self) -> None:
        enough = len(self.seconds) + 20
        wait_until(lambda: len(self.seconds) >= enough)


@pytest.mark.parametrize("loss", ["killed", "paused"])
def test_redis_is_lost_under_load_and_comes_back(server: RedisServer, loss: str) -> None:
    with service(server.url) as running, open_port() as opened:
        with contextlib.ExitStack() as stack:
            askers = [stack.enter_context(Asker(running, opened)) for _ in range(4)]
            askers[0].wait_for_answers()
            assert len(server.key_names()) >= 2
            if loss == "killed":
                server.kill()
            else:
                server.process.send_signal(signal.SIGSTOP)
            wait_until(lambda: count(running, LOST))
            askers[0].wait_for_answers()
            if loss == "killed":
                server.start_again()
            else:
                server.process.send_signal(signal.SIGCONT)
                server.command("FLUSHALL")
            wait_until(lambda: count(running, BACK))
            askers[0].wait_for_answers()
            assert len(server.key_names()) >= 2
        seconds = [second for asker in askers for second in asker.seconds]
        assert sum((asker.statuses for asker in askers), Counter()).keys() == {200}
        assert max(seconds) < 0.1 + NOISE
        assert statistics.median(seconds) < 0.08  # else each would have waited for Redis
    assert count(running, LOST) == count(running, BACK) == 1


def test_redis_is_not_there_at_the_start(log: Log) -> None:
    async def run() -> None:
        with refused_port() as port:
            limiter = hourly(5, f"redis://:{PASSWORD}@127.0.0.1:{port}")
            async with limiter.shared():
                await log.wait_for(f"{LOST} (Connection refused): ")
                assert await let_through(limiter) == 5
        assert len(asyncio.all_tasks()) == 1

    uvloop.run(run())
    assert log.count(LOST) == 1


@pytest.mark.parametrize(
    ("trouble", "cure", "told"),
    [
        (["CONFIG", "SET", "maxmemory", "1"], ["CONFIG", "SET", "maxmemory", "0"], "OutOfMemory"),
        (["REPLICAOF", "127.0.0.1", "1"], ["REPLICAOF", "NO", "ONE"], "ReadOnly"),
        (["ACL", "SETUSER", "checker", "off"], ["ACL", "SETUSER", "checker", "on"], "Authenti"),
        (
            ["ACL", "SETUSER", "checker", "-evalsha"],
            ["ACL", "SETUSER", "checker", "+evalsha"],
            "NoPermission",
        ),
        (["CLIENT", "PAUSE", "60000", "WRITE"], ["CLIENT", "UNPAUSE"], "no answer in time"),
    ],
)
def test_redis_refuses_and_is_mended(
    server: RedisServer, log: Log, trouble: list[str], cure: list[str], told: str
) -> None:
    async def run() -> None:
        limiter = hourly(5, server.url)
        server.command(*trouble)
        async with limiter.shared():
            await log.wait_for(f"{LOST} ({told}")
            assert await let_through(limiter) == 5  # in this process
            server.command(*cure)
            await log.wait_for(BACK, seconds=5)
            assert await let_through(limiter) == 5  # in Redis
            assert CALLERS_KEY in server.key_names()
        assert len(asyncio.all_tasks()) == 1

    uvloop.run(run())
    assert log.count(LOST) == log.count(BACK) == 1
    assert server.connections() == 0


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"-LOADING Redis is loading the dataset in memory\r\n", "BusyLoadingError"),
        (
            b"-ERR unknown command 'AUTH', with args beginning with: 'checker' 's3cret'\r\n",
            "ResponseError",
        ),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", ""),
        (b"$2\r\n\xff\xff\r\n", ""),
        (b"$1000\r\nOK", "no answer in time"),
        (b"", "no answer in time"),
    ],
)
def test_something_else_answers(wire: Wire, log: Log, answer: bytes, told: str) -> None:
    async def run() -> None:
        limiter = hourly(5, wire.url)
        wire.answer = answer
        async with limiter.shared():
            await log.wait_for(f"{LOST} ({told}")
            assert await let_through(limiter) == 5
            wire.answer = None
            await log.wait_for(BACK, seconds=5)
            assert await let_through(limiter) == 5

    uvloop.run(run())
    assert log.count(LOST) == log.count(BACK) == 1


def test_a_slow_redis_is_a_lost_one(wire: Wire, log: Log) -> None:
    async def run() -> None:
        limiter = hourly(5, wire.url)
        async with limiter.shared():
            assert await let_through(limiter, 2) == 2
            wire.delay = 0.3
            assert await let_through(limiter) == 5
            # A payment would not wait for so long in vain; but that is too little to return for.
            wire.delay = PATIENT * 0.7
            before = wire.connections
            async with asyncio.timeout(20):
                while wire.connections <= before + 2 * 8:  # in the third attempt to return
                    await asyncio.sleep(0.01)
            assert log.count(LOST) == 1
            assert log.count(BACK) == 0
            wire.delay = 0
            await log.wait_for(BACK, seconds=5)
            # Of what was asked in vain, the first arrived all the same, late.
            assert await let_through(limiter) == 2

    uvloop.run(run())
    assert log.count(f"{LOST} (no answer in time): ") == log.count(LOST) == 1


def test_many_ask_when_redis_falls_silent(wire: Wire, log: Log) -> None:
    async def run() -> None:
        limiter = hourly(1_000_000, wire.url)
        async with limiter.shared():
            assert wire.connections == 8  # before anybody waits for them
            await asyncio.gather(*(limiter.pay_caller(CALLER) for _ in range(100)))
            assert wire.connections == 8  # however many ask
            wire.answer = b""
            began = time.monotonic()
            await asyncio.gather(*(limiter.pay_caller(CALLER) for _ in range(1000)))
            assert time.monotonic() - began < PATIENT + NOISE

    uvloop.run(run())
    assert log.count(LOST) == 1


def test_more_ask_than_redis_can_answer_in_time(wire: Wire, log: Log) -> None:
    async def run() -> None:
        limiter = hourly(1_000_000, wire.url)
        async with limiter.shared():
            wire.delay = PATIENT * 0.4
            began = time.monotonic()
            await asyncio.gather(*(limiter.pay_caller(CALLER) for _ in range(500)))
            assert time.monotonic() - began < PATIENT + NOISE

    uvloop.run(run())
    assert log.count(LOST) == 0  # it answers as well as ever


def test_connections_whose_other_end_is_gone_are_not_used_again(wire: Wire, log: Log) -> None:
    async def run() -> None:
        limiter = hourly(50, wire.url)
        async with limiter.shared():
            wire.cut()
            await limiter.pay_caller(CALLER)  # on one of them
            await log.wait_for(BACK, seconds=5)
            assert wire.connections >= 16
            paying = (limiter.pay_caller(CALLER) for _ in range(100))
            refused = await asyncio.gather(*paying, return_exceptions=True)
            assert refused.count(None) == 50  # as Redis counts; in this process, all would be left

    uvloop.run(run())
    assert log.count(LOST) == log.count(BACK) == 1


def test_a_process_that_is_busy_does_not_blame_redis(server: RedisServer, log: Log) -> None:
    async def run() -> None:
        limiter = hourly(1_000_000, server.url)
        async with limiter.shared():
            paying = asyncio.gather(*(limiter.pay_caller(CALLER) for _ in range(5)))
            while not paying.done():
                time.sleep(0.05)  # each turn of the event loop takes that long
                await asyncio.sleep(0)

    uvloop.run(run())
    assert log.count(LOST) == 0


def test_flapping_is_not_told_each_time(wire: Wire, server: RedisServer, log: Log) -> None:
    async def run() -> None:
        limiter = hourly(1_000_000, wire.url)

        async def pay_until_counted_in_redis(counted: bool) -> None:
            async with asyncio.timeout(20):
                while True:
                    before = server.command("GET", CALLERS_KEY)
                    await limiter.pay_caller(CALLER)
                    if (server.command("GET", CALLERS_KEY) != before) is counted:
                        break
                    await asyncio.sleep(0.01)

        async with limiter.shared():
            for _ in range(2):
                wire.cut()
                await pay_until_counted_in_redis(False)
                await pay_until_counted_in_redis(True)
            assert log.count(LOST) == log.count(BACK) == 1
            wire.answer = b"-LOADING\r\n"
            await limiter.pay_caller(CALLER)
            await log.wait_for(LOST, 2)  # since it lasts
            wire.answer = None
            await log.wait_for(BACK, 2, seconds=5)

    uvloop.run(run())
    assert log.count(LOST) == log.count(BACK) == 2


def test_an_application_that_is_started_again(server: RedisServer, log: Log) -> None:
    """In another event loop, in which the connections of the first are of no use."""
    app = create_app(
        Settings(rate_limit_store=server.url, caller_rate_limit=Rate(30, timedelta(hours=1)))
    )
    with open_port() as opened:
        for expected in ({200: 20}, {200: 10, 429: 10}):
            with serve(app) as client, ThreadPoolExecutor(20) as pool:
                answers = list(pool.map(lambda _: ask(client, opened).status_code, range(20)))
            assert Counter(answers) == expected
            assert server.connections() == 0
    assert log.count(LOST) == 0


WITHOUT_REDIS = """
import sys
sys.modules["redis"] = None  # as if it were not installed
import port_checker.main
port_checker.main.app
"""


@pytest.mark.parametrize("store", ["redis://localhost", "memory://"])
def test_the_extra_is_not_installed(store: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_REDIS],
        env={**os.environ, "PORT_CHECKER_RATE_LIMIT_STORE": store},
        capture_output=True,
        text=True,
        check=False,
    )
    if store == "memory://":
        assert (done.returncode, done.stderr) == (0, "")
    else:
        assert done.returncode == 2
        assert done.stderr == (
            "port-checker: PORT_CHECKER_RATE_LIMIT_STORE in Redis needs a package that is not "
            "installed: pip install 'golem-port-checker[redis]'\n"
        )
