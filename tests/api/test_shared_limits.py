"""Limits in Redis: shared by many processes, and kept by each of them while there is no Redis."""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
import trustme
import uvloop
from redis.backoff import NoBackoff
from redis.retry import Retry

from port_checker.addresses import parse_address
from port_checker.api.limits import RateLimited, RateLimiter
from port_checker.api.shared_limits import ANSWER_TIMEOUT, SharedStore
from port_checker.settings import Rate
from tests.support.loopback import free_port, open_port, refused_port
from tests.support.namespace import loopback_alone, needs_root
from tests.support.processes import end_with_parent
from tests.support.service import Program, ask, program
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(
    os.environ.get("CI") != "true" and not shutil.which("redis-server"),
    reason="redis-server is not installed",
)

UNAVAILABLE = "WARNING port_checker.api.shared_limits: Redis is unavailable"
AVAILABLE = "INFO port_checker.api.shared_limits: Redis is available again"
HOUR = timedelta(hours=1)
CALLER = parse_address("203.0.113.7")
CALLERS_KEY = "port-checker:{limits}:requests:203.0.113.7"
SERVICE_KEY = "port-checker:{limits}:requests:127.0.0.1"
PASSWORD = "s3cret"  # noqa: S105  # of the Redis that the tests start

# The least that the service needs of Redis, as docs/operating.md has it; and of a cluster.
RIGHTS = "~port-checker:* +evalsha +script|load +time +get +set"
CLUSTER_RIGHTS = f"{RIGHTS} +cluster|slots +cluster|shards +command"

# Seconds that a payment waits where Redis answers: on a busy machine that takes a while.
PATIENT = 10
# And where it does not.
IMPATIENT = 0.3


class RedisServer:
    """A Redis on a port of its own, which keeps nothing on disk.

    The user of ``url`` may do what the service needs, and nothing else.

    Args:
        directory: Where it runs.
        options: More of its options.
        host: Its address.
        port: Its port; else one that is free.
    """

    def __init__(
        self, directory: Path, *options: str, host: str = "127.0.0.1", port: int | None = None
    ) -> None:
        self._directory = directory
        self._options = options
        self._host = host
        self.port = port or free_port()
        while not self.start():  # somebody else has got the port meanwhile
            self.port = free_port()
        self.url = self.url_by(self.port)

    def url_by(self, port: int) -> str:
        return f"redis://checker:{PASSWORD}@127.0.0.1:{port}/0"

    def start(self) -> bool:
        """Start it, and wait until it answers; whether it does."""
        user = f"checker on >{PASSWORD} {RIGHTS}"
        self.process = subprocess.Popen(
            [
                *["redis-server", "--port", str(self.port), "--bind", self._host],
                *["--save", "", "--appendonly", "no", "--user", *user.split(), *self._options],
            ],
            cwd=self._directory,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=end_with_parent,
        )

        def answers_or_ended() -> bool:
            with contextlib.suppress(redis.ConnectionError):
                return self.process.poll() is not None or bool(self.command("PING"))
            return False

        wait_until(answers_or_ended)
        return self.process.poll() is None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def _client(self) -> redis.Redis:
        return redis.Redis(self._host, self.port, retry=Retry(NoBackoff(), 0))

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


class Relay:
    """Stands between the service and Redis, in the event loop of the test.

    Attributes:
        delay: Seconds by which each answer is late.
        answer: If there is one, it is said to whatever is asked, which does not get through.
        asked: How many times something arrived.
    """

    def __init__(self, server: RedisServer) -> None:
        self.server = server
        self.delay = 0.0
        self.answer: bytes | None = None
        self.asked = 0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        """Yields the URL of Redis by way of it."""
        async with await asyncio.start_server(self._relay, "127.0.0.1", 0) as listening:
            yield self.server.url_by(listening.sockets[0].getsockname()[1])

    async def _relay(self, asker: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        answerer, on = await asyncio.open_connection("127.0.0.1", self.server.port)
        answering = asyncio.create_task(self._pass_answers(answerer, back))
        while data := await asker.read(65536):
            self.asked += 1
            if self.answer is None:
                on.write(data)
            else:
                back.write(self.answer)
        answering.cancel()
        on.close()
        back.close()

    async def _pass_answers(
        self, answerer: asyncio.StreamReader, back: asyncio.StreamWriter
    ) -> None:
        while data := await answerer.read(65536):
            await asyncio.sleep(self.delay)
            back.write(data)


@pytest.fixture
def relay(server: RedisServer) -> Relay:
    return Relay(server)


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

    async def wait_for(self, what: str, times: int = 1) -> None:
        async with asyncio.timeout(60):
            while self.count(what) < times:
                await asyncio.sleep(0.01)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[Log]:
    yield Log(caplog)
    assert PASSWORD not in caplog.text


def hourly(count: int, store: str, answer_timeout: float = PATIENT) -> RateLimiter:
    rate = Rate(count, HOUR)
    return RateLimiter(rate, rate, rate, store, answer_timeout=answer_timeout)


async def let_through(*limiters: RateLimiter, tries: int = 20) -> int:
    """How many requests of one caller go through, all of them made at once."""
    payments = [limiter.pay_request(CALLER) for limiter in limiters for _ in range(tries)]
    results = await asyncio.gather(*payments, return_exceptions=True)
    for result in results:
        assert result is None or isinstance(result, RateLimited)
    return results.count(None)


def test_processes_share_one_limit(server: RedisServer) -> None:
    async def run() -> None:
        one, other = hourly(30, server.url), hourly(30, server.url)
        async with one.shared(), other.shared():
            assert await let_through(one, other, tries=40) == 30
        for key in server.key_names():
            assert key.startswith("port-checker:")
            assert server.command("TTL", key) != -1  # it expires by itself

    uvloop.run(run())
    assert server.connections() == 0


def test_payments_that_travel_together_are_made_one_by_one(server: RedisServer) -> None:
    """And each to all of its limits or to none, as in memory."""
    asked = [  # caller, target, ports; what refuses it, and the seconds until it would not
        ("198.51.100.1", "203.0.113.7", 100, None),
        ("198.51.100.1", "203.0.113.7", 10, ("You ask for too many ports", 360)),
        ("198.51.100.2", "203.0.113.7", 50, None),
        ("2001:db8::1", "203.0.113.7", 10, ("Too many ports of 203.0.113.7", 240)),
        ("2001:db8::1", "203.0.113.8", 100, None),
        ("198.51.100.1", "198.51.100.1", 100, None),
        ("2001:db8::2", "203.0.113.7", 50, ("You ask for too many ports", 1800)),
    ]

    async def run() -> None:
        limiter = RateLimiter(None, Rate(100, HOUR), Rate(150, HOUR), server.url, answer_timeout=10)
        async with limiter.shared():
            results = await asyncio.gather(
                *(
                    limiter.pay_ports(parse_address(caller), parse_address(target), ports)
                    for caller, target, ports, _ in asked
                ),
                return_exceptions=True,
            )
        for result, (*_, refused) in zip(results, asked, strict=True):
            if refused:
                assert isinstance(result, RateLimited)
                assert str(result).startswith(refused[0])
                assert refused[1] - 9 <= result.retry_after <= refused[1]
            else:
                assert result is None
        assert "port-checker:{limits}:others:2001:db8::/48" in server.key_names()

    uvloop.run(run())


@contextlib.contextmanager
def service(store: str, **variables: str) -> Iterator[Program]:
    """A program whose limits are counted and not reached; in the end nothing of it is left."""
    environment = {
        "PORT_CHECKER_RATE_LIMIT_STORE": store,
        "PORT_CHECKER_RATE_LIMIT": "999999999/hour",
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
    troubles = ("Traceback", "unclosed Conn", "unclosed tr", "never awaited", "destroyed")
    for trouble in (PASSWORD, *troubles):
        assert not count(running, trouble)


def count(running: Program, what: str) -> int:
    return sum(what in line for line in running.lines)


def test_each_worker_connects(server: RedisServer) -> None:
    with service(server.url, PORT_CHECKER_WORKERS="2"):
        wait_until(lambda: server.connections() == 2)
    assert server.connections() == 0


@pytest.mark.parametrize("outage", ["killed", "paused"])
def test_an_outage_under_load_costs_no_check(server: RedisServer, outage: str) -> None:
    with (
        service(server.url) as running,
        open_port() as opened,
        running.client() as client,
        ThreadPoolExecutor(4) as pool,
    ):
        statuses: Counter[int] = Counter()

        def ask_until(condition: Any) -> None:
            def answered() -> bool:
                answers = pool.map(lambda _: ask(client, opened).status_code, range(8))
                statuses.update(answers)
                return bool(condition())

            wait_until(answered)

        ask_until(lambda: SERVICE_KEY in server.key_names())
        if outage == "killed":
            server.kill()
        else:
            server.process.send_signal(signal.SIGSTOP)
        ask_until(lambda: count(running, UNAVAILABLE))
        if outage == "killed":
            assert server.start()
        else:
            server.process.send_signal(signal.SIGCONT)
            server.command("FLUSHALL")
        ask_until(lambda: count(running, AVAILABLE))
        ask_until(lambda: SERVICE_KEY in server.key_names())
        assert statuses.keys() == {200}
    assert count(running, UNAVAILABLE) == count(running, AVAILABLE) == 1


def test_redis_is_not_there_at_the_start(log: Log) -> None:
    async def run() -> None:
        with refused_port() as port:
            limiter = hourly(5, f"redis://:{PASSWORD}@127.0.0.1:{port}")
            async with limiter.shared():
                await log.wait_for(f"{UNAVAILABLE} (Connection refused): ")
                assert await let_through(limiter) == 5
        assert len(asyncio.all_tasks()) == 1

    uvloop.run(run())
    assert log.count(UNAVAILABLE) == 1


@pytest.mark.parametrize(
    ("trouble", "cure", "reason"),
    [
        ("CONFIG SET maxmemory 1", "CONFIG SET maxmemory 0", "OOM"),
        ("REPLICAOF 127.0.0.1 1", "REPLICAOF NO ONE", "READONLY"),
        ("ACL SETUSER checker off", "ACL SETUSER checker on", "WRONGPASS or NOAUTH"),
        ("ACL SETUSER checker -evalsha", "ACL SETUSER checker +evalsha", "NOPERM"),
        ("CLIENT PAUSE 60000 WRITE", "CLIENT UNPAUSE", "no answer in time"),
        # What something else may say that is there instead.
        (b"-LOADING Redis is loading the dataset in memory\r\n", None, "LOADING"),
        (
            b"-ERR unknown command 'AUTH', with args: 's3cret'\r\n",
            None,
            "ERR unknown command)",
        ),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", None, "what it answers is not understood"),
        (b"$2\r\n\xff\xff\r\n", None, ""),
        (b"-ERR max number of clients reached\r\n", None, "max number of clients reached"),
        (b"$1000\r\nOK", None, "no answer in time"),
        (b"", None, "no answer in time"),
    ],
)
def test_redis_fails_and_recovers(
    server: RedisServer, relay: Relay, log: Log, trouble: str | bytes, cure: str | None, reason: str
) -> None:
    async def run() -> None:
        async with relay.running() as url:
            limiter = hourly(5, url, IMPATIENT)
            async with limiter.shared():
                if isinstance(trouble, bytes):
                    relay.answer = trouble
                else:
                    server.command(*trouble.split())
                    server.command("CLIENT", "KILL", "USER", "checker")
                assert await let_through(limiter) == 5  # in this process
                await log.wait_for(f"{UNAVAILABLE} ({reason}")
                relay.answer = None
                if cure:
                    server.command(*cure.split())
                await log.wait_for(AVAILABLE)
        limiter = hourly(5, server.url)
        async with limiter.shared():
            server.command("FLUSHALL")
            assert await let_through(limiter) == 5
            assert CALLERS_KEY in server.key_names()

    uvloop.run(run())
    assert log.count(UNAVAILABLE) == log.count(AVAILABLE) == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"+OK",
        b"$-1",
        b":1",
        b"*0",
        b"*1\r\n$3\r\ninf",
        b"*1\r\n$3\r\nnan",
        b"*1\r\n$2\r\n-1",
        b"*1\r\n" * 5000,
    ],
)
def test_what_is_no_answer_to_a_payment_refuses_nobody(log: Log, answer: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while asked := await reader.read(65536):
            is_payment = b"EVALSHA" in asked
            writer.write(answer + b"\r\n" if is_payment else b"+OK\r\n" * asked.count(b"SETINFO"))
        writer.close()

    async def run() -> None:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
            port = listening.sockets[0].getsockname()[1]
            limiter = hourly(5, f"redis://127.0.0.1:{port}")
            async with limiter.shared():
                await log.wait_for(f"{UNAVAILABLE} (what it answers is not understood): ")
                assert await let_through(limiter) == 5

    uvloop.run(run())


def test_rights_to_some_keys_alone_are_not_enough(relay: Relay, log: Log) -> None:
    """Payments need several keys: one that is forbidden makes Redis unavailable, and says why."""

    async def run() -> None:
        async with relay.running() as url:
            limiter = RateLimiter(
                Rate(5, HOUR), Rate(5, HOUR), Rate(5, HOUR), url, answer_timeout=PATIENT
            )
            async with limiter.shared():
                await limiter.pay_request(CALLER)
                assert limiter.store_is_available
                relay.server.command(
                    "ACL", "SETUSER", "checker", "resetkeys", "~port-checker:*:requests:*"
                )
                await limiter.pay_ports(CALLER, parse_address("203.0.113.8"), 1)
                await log.wait_for(f"{UNAVAILABLE} (NOPERM)")
                assert not limiter.store_is_available
                relay.server.command("ACL", "SETUSER", "checker", "~port-checker:*")
                await log.wait_for(AVAILABLE)

    uvloop.run(run())
    assert log.count(UNAVAILABLE) == log.count(AVAILABLE) == 1


def test_rights_that_payments_lack_are_missed_from_the_start(server: RedisServer, log: Log) -> None:
    server.command("ACL", "SETUSER", "checker", "resetkeys", "~port-checker:*:requests:*")

    async def run() -> None:
        limiter = RateLimiter(None, Rate(5, HOUR), None, server.url, answer_timeout=PATIENT)
        async with limiter.shared():
            await log.wait_for(f"{UNAVAILABLE} (NOPERM)")
            assert not limiter.store_is_available

    uvloop.run(run())


def test_a_clock_that_goes_back_bars_nobody(server: RedisServer) -> None:
    """It does where a replica takes over whose clock is an hour behind."""

    async def run() -> None:
        limiter = RateLimiter(Rate(3600, HOUR), store=server.url, answer_timeout=PATIENT)
        async with limiter.shared():
            await limiter.pay_request(CALLER)
            arrival = float(server.command("GET", CALLERS_KEY))
            server.command("SET", CALLERS_KEY, str(arrival + 2 * 3600))
            with pytest.raises(RateLimited) as refused:
                await limiter.pay_request(CALLER)
            assert refused.value.retry_after == 1  # as if it had used its whole limit up

    uvloop.run(run())


def test_processes_share_one_limit_in_a_cluster(tmp_path: Path, log: Log) -> None:
    nodes = []
    try:
        for number in range(3):
            folder = tmp_path / str(number)
            folder.mkdir()
            options = ["--cluster-enabled", "yes", "--cluster-port", str(free_port())]
            node = RedisServer(folder, *options)
            nodes.append(node)
            node.command("ACL", "SETUSER", "checker", *CLUSTER_RIGHTS.split())
            first, last = (16384 * (number + part) // 3 for part in (0, 1))
            node.command("CLUSTER", "ADDSLOTSRANGE", str(first), str(last - 1))
            node.command("CLUSTER", "SET-CONFIG-EPOCH", str(number + 1))
        for node in nodes[1:]:
            port = node.command("CONFIG", "GET", "cluster-port")[1].decode()
            nodes[0].command("CLUSTER", "MEET", "127.0.0.1", str(node.port), port)
        wait_until(
            lambda: all(b"cluster_state:ok" in node.command("CLUSTER", "INFO") for node in nodes)
        )
        urls = [f"redis+cluster://checker:{PASSWORD}@127.0.0.1:{node.port}" for node in nodes]

        async def run() -> None:
            limiters = [hourly(30, url) for url in urls[:2]]
            async with limiters[0].shared(), limiters[1].shared():
                assert await let_through(*limiters, tries=40) == 30
                target = parse_address("203.0.113.8")
                payments = [
                    limiter.pay_ports(parse_address(f"198.51.100.{number}"), target, 1)
                    for limiter in limiters
                    for number in range(1, 41)
                ]
                results = await asyncio.gather(*payments, return_exceptions=True)
                assert results.count(None) == 30
                assert all(limiter.store_is_available for limiter in limiters)

        uvloop.run(run())
        assert log.count(UNAVAILABLE) == 0
        assert not any(node.connections() for node in nodes)
    finally:
        for node in nodes:
            node.kill()


def test_a_node_of_a_cluster_by_the_url_of_a_single_redis(tmp_path: Path, log: Log) -> None:
    options = ["--cluster-enabled", "yes", "--cluster-port", str(free_port())]
    node = RedisServer(tmp_path, *options)
    try:

        async def run() -> None:
            async with hourly(5, node.url).shared():
                await log.wait_for(f"{UNAVAILABLE} (CLUSTERDOWN")

        uvloop.run(run())
    finally:
        node.kill()


def test_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "redis.sock"
    server = RedisServer(tmp_path, "--unixsocket", str(path))
    try:

        async def run() -> None:
            limiter = hourly(5, f"unix://checker:{PASSWORD}@{path}?db=0")
            async with limiter.shared():
                assert await let_through(limiter) == 5
                assert limiter.store_is_available

        uvloop.run(run())
        assert CALLERS_KEY in server.key_names()
    finally:
        server.kill()


@pytest.mark.parametrize("names_the_authority", [True, False])
def test_tls_by_an_authority_that_the_url_names(
    tmp_path: Path, log: Log, names_the_authority: bool
) -> None:
    """Certificates of that authority are trusted there alone."""
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")  # not for the address that it leads to
    for name, pem in (
        ("ca", authority.cert_pem),
        ("key", certificate.private_key_pem),
        ("cert", certificate.cert_chain_pems[0]),
    ):
        pem.write_to_path(str(tmp_path / f"{name}.pem"))
    port = free_port()
    server = RedisServer(
        tmp_path,
        *["--tls-port", str(port), "--tls-auth-clients", "no", "--tls-ca-cert-file", "ca.pem"],
        *["--tls-key-file", "key.pem", "--tls-cert-file", "cert.pem"],
    )
    try:
        url = f"rediss://checker:{PASSWORD}@localhost:{port}/0"
        if names_the_authority:
            url += f"?ssl_ca_certs={tmp_path}/ca.pem"

        async def run() -> None:
            limiter = hourly(5, url)
            async with limiter.shared():
                if names_the_authority:
                    assert await let_through(limiter) == 5
                else:
                    await log.wait_for(UNAVAILABLE)
                assert limiter.store_is_available == names_the_authority

        uvloop.run(run())
    finally:
        server.kill()


@needs_root
def test_a_resolver_that_is_silent_holds_up_nothing(tmp_path: Path) -> None:
    """Not even the end: the service stops in its ordinary time, and says once what is wrong."""
    resolv = tmp_path / "resolv.conf"
    resolv.write_text("nameserver 127.0.0.1\noptions timeout:30 attempts:5\n")
    script = f'mount --bind {resolv} /etc/resolv.conf && exec "$@"'
    with loopback_alone(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as resolver:
        resolver.bind(("127.0.0.1", 53))
        command = ["unshare", "--mount", "sh", "-c", script, "sh", sys.executable]
        with program(
            *command, "-m", "port_checker", PORT_CHECKER_RATE_LIMIT_STORE="redis://redis.example"
        ) as running:
            with running.client() as client:
                assert ask(client, running.port).status_code == 200
            reason = "(the look-up of redis.example is not answered)"
            wait_until(lambda: count(running, f"{UNAVAILABLE} {reason}"))
            assert running.stop() == 0
        assert count(running, UNAVAILABLE) == 1
        assert not [line for line in running.lines if " ERROR " in line or "Traceback" in line]
        resolver.setblocking(False)
        questions = set()
        with contextlib.suppress(BlockingIOError):
            while True:
                questions.add(resolver.recv(512)[2:])
        assert len(questions) <= 2  # A and AAAA, of one look-up


@needs_root
def test_a_name_that_moves_to_the_replica_that_takes_over(tmp_path: Path) -> None:
    """As Sentinel has it, with a script that makes the name of the master lead to the new one."""
    hosts, script = tmp_path / "hosts", tmp_path / "move"
    hosts.write_text("127.0.0.1 redis.example\n")
    # It is told the addresses of the old master and of the new one.
    script.write_text(f'#!/bin/sh\necho "$6 redis.example" > {hosts}\n')
    script.chmod(0o700)
    with loopback_alone(), contextlib.ExitStack() as stack:
        master = RedisServer(tmp_path)
        stack.callback(master.kill)
        options = ["--replicaof", "127.0.0.1", str(master.port)]
        options += ["--replica-announce-ip", "127.0.0.2"]
        replica = RedisServer(tmp_path, *options, host="127.0.0.2", port=master.port)
        stack.callback(replica.kill)
        configuration = tmp_path / "sentinel.conf"
        configuration.write_text(
            f"port {free_port()}\nbind 127.0.0.1\n"
            f"sentinel monitor limits 127.0.0.1 {master.port} 1\n"
            "sentinel down-after-milliseconds limits 1000\n"
            f"sentinel client-reconfig-script limits {script}\n"
        )
        wait_until(lambda: "slave0" in master.command("INFO", "replication"), "the replica")
        sentinel = subprocess.Popen(
            ["redis-server", str(configuration), "--sentinel"],
            stdout=subprocess.DEVNULL,
            preexec_fn=end_with_parent,
        )
        stack.callback(sentinel.wait)
        stack.callback(sentinel.kill)
        bind = f'mount --bind {hosts} /etc/hosts && exec "$@"'
        command = ["unshare", "--mount", "sh", "-c", bind, "sh", sys.executable, "-m"]
        settings: dict[str, Any] = {
            "PORT_CHECKER_RATE_LIMIT_STORE": f"redis://checker:{PASSWORD}@redis.example:{master.port}",
            "PORT_CHECKER_RATE_LIMIT": "100000/minute",  # more than are asked for until then
        }
        with (
            program(*command, "port_checker", **settings) as running,
            running.client() as client,
        ):
            wait_until(lambda: master.connections() == 1)
            assert SERVICE_KEY not in replica.key_names()
            master.kill()

            def pays_there() -> bool:
                assert ask(client, running.port).status_code == 200
                with contextlib.suppress(redis.ConnectionError):  # Sentinel ends the connections
                    return SERVICE_KEY in replica.key_names()
                return False

            wait_until(pays_there, "limits to be shared again")
            assert running.stop() == 0


def test_nobody_waits_for_a_redis_that_is_unavailable(relay: Relay, log: Log) -> None:
    async def run() -> None:
        async with relay.running() as url:
            limiter = hourly(5, url, IMPATIENT)
            async with limiter.shared():
                relay.answer = b""
                assert await let_through(limiter, tries=1000) == 5  # which wait together
                await log.wait_for(f"{UNAVAILABLE} (no answer in time)")
                asked = relay.asked
                assert await let_through(limiter) == 0
                assert relay.asked == asked

    uvloop.run(run())
    assert log.count(UNAVAILABLE) == 1
    # A request pays twice, and waits for 0.1 s at the most; a turn may end late.
    assert 2 * ANSWER_TIMEOUT <= 0.08


def test_a_crowd_that_waits_for_each_other_does_not_blame_redis(relay: Relay, log: Log) -> None:
    async def run() -> None:
        async with relay.running() as url:
            limiter = hourly(1_000_000, url, 1)
            async with limiter.shared():
                relay.delay = 0.3  # for each call; the last of the crowd would wait for 6 s
                assert await let_through(limiter, tries=2000) == 2000
                assert await let_through(limiter, tries=1) == 1

    uvloop.run(run())
    assert log.count(UNAVAILABLE) == 0


def test_a_process_that_is_busy_does_not_blame_redis(server: RedisServer, log: Log) -> None:
    async def run() -> None:
        limiter = hourly(1_000_000, server.url, ANSWER_TIMEOUT)
        async with limiter.shared():
            for _ in range(5):
                paying = asyncio.gather(*(limiter.pay_request(CALLER) for _ in range(5)))
                while not paying.done():
                    time.sleep(1.2 * ANSWER_TIMEOUT)  # each turn of the event loop takes that long
                    await asyncio.sleep(0)

    uvloop.run(run())
    assert log.count(UNAVAILABLE) == 0


def test_a_connection_that_breaks_is_replaced_without_ado(server: RedisServer, log: Log) -> None:
    async def run() -> None:
        async with SharedStore(server.url, [], PATIENT) as store:
            for _ in range(3):
                server.command("CLIENT", "KILL", "USER", "checker")
                async with asyncio.timeout(60):
                    while await store.pay([], 0) is None:
                        await asyncio.sleep(0.01)

    uvloop.run(run())
    assert log.count(UNAVAILABLE) == 0


def test_a_redis_that_comes_and_goes_is_logged_once_in_a_while(relay: Relay, log: Log) -> None:
    async def fail(store: SharedStore) -> None:
        relay.answer = b"-LOADING\r\n"
        asked = relay.asked
        assert await store.pay([], 0) is None
        async with asyncio.timeout(60):
            while relay.asked < asked + 3:  # the payment, a probe in vain, and the next one
                await asyncio.sleep(0.01)

    async def recover(store: SharedStore) -> None:
        relay.answer = None
        async with asyncio.timeout(60):
            while await store.pay([], 0) is None:
                await asyncio.sleep(0.01)

    async def run() -> None:
        async with relay.running() as url:
            async with SharedStore(url, [], PATIENT, warning_interval=1000) as store:
                for _ in range(2):
                    await fail(store)
                    await recover(store)
                assert log.count(UNAVAILABLE) == log.count(AVAILABLE) == 1
            async with SharedStore(url, [], PATIENT, warning_interval=2) as store:
                await fail(store)
                await recover(store)
                await fail(store)
                await log.wait_for(UNAVAILABLE, 3)  # since it lasts
                probes = relay.asked + 6
                while relay.asked < probes:
                    await asyncio.sleep(0.01)
                assert log.count(UNAVAILABLE) == 3  # and once is enough
                await recover(store)
                await log.wait_for(AVAILABLE, 3)

    uvloop.run(run())


WITHOUT_REDIS = """
import os, sys
sys.modules["redis"] = None  # as if it were not installed
from port_checker import main
print(main.app)
del main.app
os.environ["PORT_CHECKER_RATE_LIMIT_STORE"] = "redis://localhost"
main.app
"""


def test_without_the_extra_only_a_store_in_redis_is_an_error() -> None:
    words = [sys.executable, "-c", WITHOUT_REDIS]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.count("FastAPI")) == (2, 1)
    assert done.stderr == (
        "port-checker: PORT_CHECKER_RATE_LIMIT_STORE: Redis needs a package that is not "
        "installed: pip install 'golem-port-checker[redis]'\n"
    )
