"""What Prometheus reads, against what was sent."""

import itertools
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from resource import RLIMIT_NOFILE, prlimit

import httpx
import pytest

from port_checker.api.app import create_app, create_served_app
from port_checker.connect import VerdictKind
from port_checker.metrics import (
    DURATION,
    REQUESTS,
    ROUTES,
    Metrics,
    Snapshot,
    StatusLine,
    Totals,
)
from port_checker.server.connections import ConnectionLimits
from port_checker.server.prometheus import expose
from port_checker.server.run import listen
from port_checker.settings import Endpoint, Settings
from port_checker.tls import TlsVerdictKind
from tests.support.http import check_of, client_of, connected
from tests.support.loopback import (
    free_ports,
    open_port,
    ports,
    refused_port,
    silent_port,
)
from tests.support.service import Program, ask, program, serve
from tests.support.waiting import wait_until


class Scraper:
    """Reads the metrics of a program."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._client = client_of(f"http://127.0.0.1:{port}")

    def text(self) -> str:
        return self._client.get("/metrics").raise_for_status().text

    def __getitem__(self, name: str) -> float:
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.text(), re.MULTILINE)
        assert found, name
        return float(found[1])


def exposed(totals: Totals) -> int:
    """Serve these figures; return the port."""
    listener = listen("127.0.0.1", 0)
    expose(totals, listener)
    port: int = listener.getsockname()[1]
    return port


@contextmanager
def measured(**environment: str) -> Iterator[tuple[Program, Scraper]]:
    public, port = free_ports(2)  # two calls may return the same port
    environment["PORT_CHECKER_PORT"] = str(public)
    environment["PORT_CHECKER_METRICS"] = f"127.0.0.1:{port}"
    environment["PORT_CHECK_RETRIES"] = "1"
    with program(ready=True, descriptors=None, **environment) as running:
        yield running, Scraper(port)


def test_metrics_are_what_was_sent() -> None:
    with (
        measured(PORT_CHECKER_WORKERS="2") as (running, scraper),
        open_port() as opened,
        refused_port() as refused,
    ):
        for _ in range(12):
            with running.client() as client:  # a new connection each: all workers get some
                assert ask(client, opened, refused).status_code == 200
                assert client.get("/nothing").status_code == 404
                assert ask(client, 0).status_code == 422

        def counted() -> None:
            assert scraper['port_checker_checks_total{outcome="completed"}'] == 12
            assert scraper['port_checker_checks_total{outcome="failed"}'] == 0
            assert scraper["port_checker_check_duration_seconds_count"] == 12
            assert scraper['port_checker_check_duration_seconds_bucket{le="20.0"}'] == 12
            assert 0 < scraper["port_checker_check_duration_seconds_sum"] < 240
            assert scraper['port_checker_ports_total{verdict="accessible"}'] == 12
            assert scraper['port_checker_ports_total{verdict="refused"}'] == 12
            assert scraper['port_checker_errors_total{code="NOT_FOUND"}'] == 12
            assert scraper['port_checker_errors_total{code="INVALID_PORT"}'] == 12

        counted()
        assert scraper["port_checker_workers"] == 2
        # A worker's gauges count from when it has read them for the first time.
        wait_until(lambda: scraper["port_checker_ports_in_flight_limit"] == 20_000)
        assert scraper["port_checker_connections_limit"] >= 2
        assert scraper["port_checker_rate_limit_store_up"] == 1
        limit, _ = prlimit(running.process.pid, RLIMIT_NOFILE)
        spent = scraper["process_cpu_seconds_total"]
        victim, other = running.workers()  # both have counted
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: scraper["port_checker_worker_deaths_total"] == 1, "the death")
        counted()
        assert scraper["process_cpu_seconds_total"] >= spent
        wait_until(lambda: scraper["port_checker_workers"] == 2, "a new worker")
        assert other in running.workers()
        assert scraper["process_max_fds"] == 3 * limit
        assert running.stop() == 0
    (death,) = (line for line in running.lines if "Worker" in line)
    assert f"ERROR port_checker.server.workers: Worker {victim} was killed by SIGKILL" in death


def test_a_scrape_is_answered_while_the_event_loop_is_stuck(tmp_path: Path) -> None:
    stuck, go = tmp_path / "stuck", tmp_path / "go"
    (tmp_path / "sitecustomize.py").write_text(
        "import pathlib, signal, time\n"
        "def stick(*_):\n"
        f"    pathlib.Path({str(stuck)!r}).touch()\n"
        f"    while not pathlib.Path({str(go)!r}).exists(): time.sleep(0.05)\n"
        "signal.signal(signal.SIGUSR1, stick)\n"
    )
    with (
        measured(PYTHONPATH=str(tmp_path)) as (running, scraper),
        running.client() as client,
        ThreadPoolExecutor() as pool,
    ):
        running.process.send_signal(signal.SIGUSR1)
        wait_until(stuck.exists, "the event loop to be stuck")
        health = pool.submit(client.get, "/health")
        assert scraper["port_checker_workers"] == 1
        assert not health.done()
        go.touch()
        assert health.result().status_code == 200


def test_a_scraper_that_resets_its_connection_leaves_no_line(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    scraper = Scraper(exposed(Totals()))
    for sent in (b"", b"GET /metrics HTTP/1.1\r\n"):
        with socket.create_connection(("127.0.0.1", scraper.port)) as sock:
            sock.sendall(sent)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert scraper["port_checker_workers"] == 0
    answering = "process_request_thread"
    wait_until(lambda: not any(answering in thread.name for thread in threading.enumerate()))
    assert (caplog.text, capfd.readouterr()) == ("", ("", ""))


def test_a_caller_that_leaves_is_counted_and_its_ports_are_in_flight() -> None:
    with measured(PORT_CHECK_TIMEOUT="30") as (running, scraper), ports(3, silent_port) as silent:
        with running.client() as client, connected(client) as caller:
            caller.sendall(check_of(*silent))
            wait_until(lambda: scraper["port_checker_ports_in_flight"] == 3, "the check to begin")
            wait_until(lambda: scraper["port_checker_connections"] == 1, "no other connection")
        name = 'port_checker_checks_total{outcome="cancelled"}'
        wait_until(lambda: scraper[name] == 1, "the caller's departure to be seen")
        assert scraper["port_checker_workers"] == 1
        assert scraper["port_checker_rate_limit_store_up"] == 1
        assert scraper["process_max_fds"] == prlimit(running.process.pid, RLIMIT_NOFILE)[0]
        wait_until(lambda: scraper["port_checker_ports_in_flight"] == 0, "the next sample")


class BrokenTotals(Totals):
    """They have a bug."""

    def snapshot(self) -> Snapshot:
        raise ZeroDivisionError


def test_a_bug_is_logged_and_nothing_else_is_written(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    port = exposed(BrokenTotals())
    assert httpx.get(f"http://127.0.0.1:{port}/metrics").status_code == 500
    assert "ZeroDivisionError" in caplog.text
    assert capfd.readouterr() == ("", "")


def test_there_are_none_without_the_setting_nor_ever_on_the_public_port() -> None:
    for endpoint in None, Endpoint("127.0.0.1", 9464):
        with serve(metrics=endpoint) as client:
            assert client.get("/metrics").status_code == 404


def test_a_port_for_metrics_that_is_in_use_is_one_line() -> None:
    with (
        open_port() as busy,
        program(ready=False, PORT_CHECKER_METRICS=f"127.0.0.1:{busy}") as running,
    ):
        assert running.wait() == 1
    line = f"port-checker: cannot serve metrics on 127.0.0.1:{busy}: Address already in use\n"
    assert line in running.lines


@pytest.mark.skipif(
    os.environ.get("CI") != "true" and not shutil.which("promtool"),
    reason="promtool of prometheus judges the metrics",
)
def test_promtool_finds_no_fault_with_them() -> None:
    totals, metrics = Totals(), Metrics()
    totals.add(metrics.row, perspectives=["ams.checker.example"])
    metrics.sample()
    done = subprocess.run(
        ["promtool", "check", "metrics"],
        input=Scraper(exposed(totals)).text(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_a_process_has_counted_stays_when_it_ends() -> None:
    totals, one, other = Totals(), Metrics(), Metrics()
    for metrics, connections, lag, up in ((one, 5, 0.25, 1), (other, 2, 0.5, 0)):
        totals.add(metrics.row)
        metrics.count("errors", "INVALID_IP", 3)
        metrics.watch("connections", itertools.repeat(connections).__next__)
        metrics.watch("event_loop_lag_seconds", itertools.repeat(lag).__next__)
        metrics.watch("rate_limit_store_up", itertools.repeat(up).__next__)
        metrics.sample()

    def figures() -> list[float]:
        snapshot = totals.snapshot()
        return [
            len(snapshot.workers),
            snapshot.deaths,
            snapshot["errors", "INVALID_IP"],
            snapshot["connections", ""],
            snapshot["event_loop_lag_seconds", ""],
            snapshot["rate_limit_store_up", ""],
        ]

    assert figures() == [2, 0, 6, 7, 0.5, 0]
    totals.end(other.row)
    assert figures() == [1, 1, 6, 5, 0.25, 1]


def test_a_process_that_has_just_begun_has_no_gauges_yet() -> None:
    totals, begun, beginning = Totals(), Metrics(), Metrics()
    begun.watch("rate_limit_store_up", lambda: 1)
    begun.count("errors", "INVALID_IP")
    totals.add(beginning.row)
    totals.add(begun.row)
    port = exposed(totals)
    scraper = Scraper(port)
    assert "\nport_checker_rate_limit_store_up " not in scraper.text()
    assert scraper['port_checker_errors_total{code="INVALID_IP"}'] == 1
    begun.sample()
    assert scraper["port_checker_rate_limit_store_up"] == 1


def test_the_status_line_is_about_the_last_interval() -> None:
    totals, metrics = Totals(), Metrics()
    totals.add(metrics.row)
    clock = iter([0.0, 10.0, 20.0])
    status = StatusLine(totals, clock=lambda: next(clock))
    metrics.count("checks", "completed", 3)
    metrics.count("checks", "failed")
    rest = "0 ports in flight, 0 connections"
    assert status.text() == f"4 checks in the last 10 s; {rest}"
    assert status.text() == f"0 checks in the last 10 s; {rest}"


def test_what_is_refused_before_the_application_sees_it_is_counted() -> None:
    totals, metrics = Totals(), Metrics()
    totals.add(metrics.row)
    limits = ConnectionLimits(1000, deadline=0.1, metrics=metrics)
    with serve(limits=limits) as client:
        with connected(client) as sock:
            sock.sendall(b"not HTTP\r\n\r\n")
            assert sock.recv(100).startswith(b"HTTP/1.1 400 ")
        with connected(client) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\n")  # and no more
            assert sock.recv(100) == b""
    snapshot = totals.snapshot()
    assert snapshot["errors", "INVALID_REQUEST"] == 1
    assert snapshot["receive_deadlines", ""] == 1


@pytest.mark.parametrize(
    ("seconds", "bucket"),
    [(0, "0.005"), (0.005, "0.005"), (0.0051, "0.01"), (20, "20.0"), (20.1, "+Inf")],
)
def test_a_duration_is_in_the_lowest_bucket_that_holds_it(seconds: float, bucket: str) -> None:
    totals, metrics = Totals(), Metrics()
    totals.add(metrics.row)
    metrics.time_check(seconds)
    snapshot = totals.snapshot()
    assert snapshot[DURATION.name, bucket] == 1
    assert snapshot[DURATION.name, "sum"] == seconds


@pytest.mark.parametrize(
    ("method", "path", "route"),
    [
        ("GET", "/health", "/health"),
        ("HEAD", "/ip", "/ip"),
        ("GET", "/port/7466", "/port/{port}"),
        ("GET", "/port/none", "/port/{port}"),
        ("POST", "/check-ports", "/check-ports"),
        ("GET", "/check-ports", "/check-ports"),
        ("POST", "/check-tls", "/check-tls"),
        ("GET", "/docs", "other"),
        ("GET", "/nothing", "other"),
    ],
)
def test_a_request_is_timed_by_its_route(method: str, path: str, route: str) -> None:
    totals, metrics = Totals(), Metrics()
    totals.add(metrics.row)
    with serve(create_served_app(Settings(retries=1), metrics)) as client:
        client.request(method, path)
    port = exposed(totals)
    scraper = Scraper(port)
    name = "port_checker_request_duration_seconds"
    counts = {each: scraper[f'{name}_count{{route="{each}"}}'] for each in ROUTES}
    assert counts == {**dict.fromkeys(ROUTES, 0), route: 1}
    assert 0 < scraper[f'{name}_sum{{route="{route}"}}'] < 60


def test_every_operation_has_a_histogram_of_its_own() -> None:
    paths = create_app(Settings()).openapi()["paths"]
    assert {*paths, "other"} == set(ROUTES)


@pytest.mark.parametrize(("seconds", "bucket"), [(0, "0.001"), (0.0011, "0.0025"), (21, "+Inf")])
def test_a_request_is_in_the_lowest_bucket_that_holds_it(seconds: float, bucket: str) -> None:
    totals, metrics = Totals(), Metrics()
    totals.add(metrics.row)
    for route in ROUTES:
        metrics.time_request(route, seconds)
    snapshot = totals.snapshot()
    for route in ROUTES:
        assert snapshot[REQUESTS.name, f"{route} {bucket}"] == 1
        assert snapshot[REQUESTS.name, f"{route} sum"] == seconds


def test_each_kind_of_verdict_is_counted() -> None:
    totals, metrics = Totals(), Metrics()
    totals.add(metrics.row)
    metrics.count_ports([*VerdictKind, VerdictKind.UNREACHABLE])
    snapshot = totals.snapshot()
    verdicts = {"accessible": 1, "refused": 1, "timed_out": 1, "unreachable": 2, "other": 1}
    assert {verdict: snapshot["ports", verdict] for verdict in verdicts} == verdicts


def test_kinds_of_tls_verdicts_that_only_advice_tells_apart_are_counted_as_one() -> None:
    totals, metrics = Totals(), Metrics()
    totals.add(metrics.row)
    for kind in TlsVerdictKind:
        metrics.count("tls_checks", kind.outcome)
    snapshot = totals.snapshot()
    results = {"untrusted": 3, "handshake_failed": 3}
    results |= dict.fromkeys(["valid", "expired", "mismatch", "no_connection"], 1)
    assert {result: snapshot["tls_checks", result] for result in results} == results


def test_a_redis_that_cannot_be_reached_is_seen() -> None:
    totals, metrics = Totals(), Metrics()
    totals.add(metrics.row)
    with refused_port() as port:
        settings = Settings(rate_limit_store=f"redis://127.0.0.1:{port}")
        with serve(create_served_app(settings, metrics)) as client:
            client.get("/health")  # it has looked for Redis before it answers
            metrics.sample()
    assert Scraper(exposed(totals))["port_checker_rate_limit_store_up"] == 0


def test_idle_clients_keep_no_scraper_out_and_few_threads() -> None:
    before = threading.active_count()
    port = exposed(Totals())
    with ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), 60))
        assert httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=60).status_code == 200
        assert threading.active_count() <= before + 1 + 8
