"""The program and the server around the application, as processes."""

import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from port_checker.server.run import fit_descriptor_limit, listen
from port_checker.server.settings import Settings
from tests.support.loopback import free_port, open_listener, open_port, silent_port
from tests.support.namespace import ROOT
from tests.support.service import ask, program
from tests.support.waiting import wait_until


@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "-m", "port_checker"],
        [sys.executable, str(ROOT / "run.py")],
        [str(Path(sys.executable).with_name("port-checker")), "serve"],
        [sys.executable, "-m", "uvicorn", "port_checker.main:app", "--port", "{port}"],
    ],
)
def test_every_way_to_start_it(command: list[str]) -> None:
    port = free_port()
    words = [word.format(port=port) for word in command]
    with (
        program(*words, PORT_CHECKER_PORT=str(port)) as running,
        running.client() as client,
        open_port() as opened,
    ):
        assert ask(client, opened).json()["success"] is True


def test_one_line_at_the_start_one_for_each_check_one_at_the_end() -> None:
    with program() as running, open_port() as opened:
        with running.client() as client:
            ask(client, opened)
            client.get("/health")
            client.get("/nothing?%0d%0aforged=line")
        assert running.stop() == 0
    start, check, stop = running.lines
    url = f"http://127.0.0.1:{running.port}/docs"
    assert (
        f" INFO port_checker.server.run: Listening on 127.0.0.1:{running.port}, docs at {url};"
        in start
    )
    for effective in ("processes: 1, ports in flight in each: 10000", "30/minute requests per"):
        assert effective in start
    told = " INFO port_checker.server.api: 127.0.0.1 checked 127.0.0.1: 1 ports, 1 accessible, 0."
    assert told in check
    assert stop.endswith(" INFO port_checker.server.run: Stopped\n")


def test_debugging_logs_each_port_and_request() -> None:
    with program(PORT_CHECKER_DEBUG="true") as running, open_port() as opened:
        with running.client() as client:
            ask(client, opened)
        running.stop()
    log = "".join(running.lines)
    assert f" DEBUG port_checker.server.api: 127.0.0.1 port {opened}: open\n" in log
    assert '"POST /check-ports HTTP/1.1" 200' in log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_checks_in_flight_are_finished_before_it_stops(number: signal.Signals) -> None:
    with (
        program(PORT_CHECK_RETRIES="2", PORT_CHECK_TIMEOUT="1") as running,
        open_listener() as opened,
        silent_port() as silent,
        running.client() as client,
    ):
        asked = [opened.getsockname()[1], silent]
        answers: list[httpx.Response] = []
        check = threading.Thread(target=lambda: answers.append(ask(client, *asked)))
        check.start()
        opened.accept()[0].close()  # the check is under way
        assert running.stop(number) == 0
        check.join()
    assert answers[0].json()["message"] == "Successfully verified 1 out of 2 ports"
    assert "Traceback" not in "".join(running.lines)


def test_a_busy_port_is_one_line() -> None:
    with open_port() as busy, program(ready=False, PORT_CHECKER_PORT=str(busy)) as running:
        assert running.wait() == 1
    assert running.lines == [
        f"port-checker: cannot listen on 127.0.0.1 port {busy}: Address already in use\n"
    ]


@pytest.mark.parametrize(
    "command", [["-m", "port_checker"], ["-m", "uvicorn", "port_checker.main:app"]]
)
def test_a_wrong_setting_is_one_line(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PORT_CHECK_TIMEOUT": "nan"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "port-checker: PORT_CHECK_TIMEOUT='nan' is wrong: it must be seconds, from 0.1 to 30\n"
    )


def test_what_an_operator_should_look_at_is_a_warning() -> None:
    with program(
        PORT_CHECK_TIMOUT="3",
        PORT_CHECK_RETRIES="4",
        PORT_CHECK_TIMEOUT="8",
    ) as running:
        running.stop()
    warnings = [
        line.partition(" WARNING port_checker.server.run: ")[2].strip()
        for line in running.lines
        if "WARNING" in line
    ]
    assert warnings == [
        "PORT_CHECK_TIMOUT is not a setting; did you mean PORT_CHECK_TIMEOUT?",
        "A check can take 35 s, but providers' software gives up after 30 s: lower "
        "PORT_CHECK_RETRIES, PORT_CHECK_TIMEOUT or PORT_CHECK_RETRY_DELAY",
    ]


def test_workers_share_the_port_and_end_together() -> None:
    with program(PORT_CHECKER_WORKERS="2") as running, open_port() as opened:
        for _ in range(8):
            with running.client() as client:
                assert ask(client, opened).json()["success"] is True
        pid = running.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        assert len(children) >= 2
        assert running.stop() == 0
    # multiprocessing's own helper ends a moment after the program.
    wait_until(lambda: not any(Path("/proc", child).exists() for child in children), "their end")
    assert sum("checked" in line for line in running.lines) == 8


def test_the_ipv6_wildcard_serves_both_families() -> None:
    with program(PORT_CHECKER_HOST="::") as running, open_port() as opened:
        with running.client("[::1]") as client:
            assert client.get("/health").status_code == 200
        with running.client() as client:  # arrives as ::ffff:127.0.0.1
            assert ask(client, opened).json()["success"] is True
        running.stop()
    assert any("127.0.0.1 checked 127.0.0.1: 1 ports" in line for line in running.lines)


def test_one_ipv6_address_does_not() -> None:
    with listen("::1", 0) as listener:
        assert listener.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 1


def test_localhost_is_an_address_to_listen_on() -> None:
    with listen("localhost", 0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


def test_the_descriptor_limit_is_raised_and_bounds_the_ports_in_flight() -> None:
    with program(descriptors=1024) as running:
        limits = Path(f"/proc/{running.process.pid}/limits").read_text()
        running.stop()
    (files,) = (line.split() for line in limits.splitlines() if line.startswith("Max open files"))
    assert files[3:5] == ["1024", "1024"]
    lowered, start, _ = running.lines
    assert (
        "PORT_CHECK_MAX_IN_FLIGHT=10000 lowered to 512: this process may open only 1024" in lowered
    )
    assert "ports in flight in each: 512" in start


@pytest.mark.parametrize(
    ("limit", "asked", "fitting"),
    [
        (20_000, 10_000, 10_000),
        (19_999, 10_000, 9999),
        (1, 1, 1),
        (resource.RLIM_INFINITY, 1_000_000, 1_000_000),
    ],
)
def test_ports_in_flight_fit_the_descriptor_limit(limit: int, asked: int, fitting: int) -> None:
    settings = Settings(max_in_flight=asked)
    assert fit_descriptor_limit(settings, limit).max_in_flight == fitting
