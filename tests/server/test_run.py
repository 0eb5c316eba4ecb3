"""The program and the server around the application, as processes."""

import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from port_checker.server.run import fit_descriptor_limit, listen
from port_checker.server.settings import Settings
from tests.support.loopback import free_port, open_listener, open_port, silent_port
from tests.support.namespace import ROOT
from tests.support.service import ask, program


@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "-m", "port_checker"],
        [sys.executable, str(ROOT / "run.py")],
        [str(Path(sys.executable).with_name("port-checker"))],
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


def test_one_line_at_the_start_and_one_for_each_check() -> None:
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
    for effective in ("1 process(es)", "10000 ports in flight", "30/minute requests per caller"):
        assert effective in start
    assert "2000/minute ports per target" in start
    told = " INFO port_checker.server.api: 127.0.0.1 checked 127.0.0.1: 1 ports, 1 accessible, 0."
    assert told in check
    assert stop.endswith(" INFO port_checker.server.run: Stopped\n")


def test_debugging_tells_of_each_port_and_request() -> None:
    with program(PORT_CHECKER_DEBUG="true") as running, open_port() as opened:
        with running.client() as client:
            ask(client, opened)
        running.stop()
    log = "".join(running.lines)
    assert f" DEBUG port_checker.server.api: 127.0.0.1 port {opened}: open\n" in log
    assert '"POST /check-ports HTTP/1.1" 200' in log


def test_checks_in_flight_are_finished_before_it_stops() -> None:
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
        assert running.stop() == 0
        check.join()
    assert answers[0].json()["message"] == "Successfully verified 1 out of 2 ports"
    assert "Traceback" not in "".join(running.lines)


def test_an_interrupt_stops_it_quietly() -> None:
    with program() as running:
        assert running.stop(signal.SIGINT) == 0
    assert "Traceback" not in "".join(running.lines)


def test_a_busy_port_is_one_line() -> None:
    with open_port() as busy, program(ready=False, PORT_CHECKER_PORT=str(busy)) as running:
        assert running.wait() == 1
    assert running.lines == [
        f"port-checker: cannot listen on 127.0.0.1 port {busy}: Address already in use\n"
    ]


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("PORT_CHECK_TIMEOUT", "nan", "seconds, from 0.1 to 30"),
        ("PORT_CHECKER_PORT", "70000", "a port to listen on, from 1 to 65535"),
        (
            "PORT_CHECKER_HOST",
            "",
            "an IP address to listen on, such as 0.0.0.0 or ::, or localhost",
        ),
    ],
)
@pytest.mark.parametrize("module", ["port_checker", "uvicorn"])
def test_a_wrong_setting_is_one_line(module: str, name: str, value: str, allowed: str) -> None:
    words = [
        sys.executable,
        "-m",
        module,
        *(["port_checker.main:app"] if module == "uvicorn" else []),
    ]
    done = subprocess.run(
        words, env={**os.environ, name: value}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == f"port-checker: {name}={value!r} is wrong: it must be {allowed}\n"


def test_a_misspelt_setting_is_a_warning() -> None:
    with program(PORT_CHECK_TIMOUT="3", PORT_CHECKER_COLOUR="red") as running:
        running.stop()
    log = "".join(running.lines)
    assert "WARNING port_checker.server.run: PORT_CHECK_TIMOUT is not a setting; " in log
    assert "did you mean PORT_CHECK_TIMEOUT?" in log
    assert "PORT_CHECKER_COLOUR is not a setting" in log


def test_slow_settings_are_a_warning() -> None:
    with program(PORT_CHECK_RETRIES="4", PORT_CHECK_TIMEOUT="8") as running:
        running.stop()
    assert "Checks can take 35 s, and providers' software gives up after 30 s" in running.lines[1]


def test_workers_share_the_port_and_end_together() -> None:
    with program(PORT_CHECKER_WORKERS="2") as running, open_port() as opened:
        for _ in range(8):
            with running.client() as client:
                assert ask(client, opened).json()["success"] is True
        children = worker_processes(running.process.pid)
        assert len(children) >= 2
        assert running.stop() == 0
    deadline = time.monotonic() + 10  # multiprocessing's own helper ends a moment later
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert sum("checked" in line for line in running.lines) == 8


def worker_processes(parent: int) -> list[int]:
    told = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    return [int(child) for child in told.split()]


def test_both_families_on_the_ipv6_wildcard() -> None:
    with program(PORT_CHECKER_HOST="::") as running, open_port() as opened:
        for host in ("127.0.0.1", "[::1]"):
            with running.client(host) as client:
                assert client.get("/health").status_code == 200
        with running.client() as client:  # arrives as ::ffff:127.0.0.1
            assert ask(client, opened).json()["success"] is True
        running.stop()
    assert any("127.0.0.1 checked 127.0.0.1: 1 ports" in line for line in running.lines)


def test_an_ipv6_address_alone_is_not_both_families() -> None:
    with listen("::1", 0) as listener:
        assert listener.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 1


def test_localhost_is_listened_on() -> None:
    with listen("localhost", 0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


def test_the_descriptor_limit_is_raised_and_bounds_the_ports_in_flight() -> None:
    with program(descriptors=1024) as running:
        limits = Path(f"/proc/{running.process.pid}/limits").read_text()
        running.stop()
    (files,) = (line.split() for line in limits.splitlines() if line.startswith("Max open files"))
    assert files[3:5] == ["1024", "1024"]
    assert (
        "PORT_CHECK_MAX_IN_FLIGHT=10000 lowered to 512: this process may open 1024"
        in (running.lines[0])
    )
    assert "512 ports in flight" in running.lines[1]


@pytest.mark.parametrize(
    ("limit", "asked", "fitting"),
    [(20_000, 10_000, 10_000), (19_999, 10_000, 9999), (256, 300, 128), (1, 1, 1)],
)
def test_ports_in_flight_fit_the_descriptor_limit(limit: int, asked: int, fitting: int) -> None:
    settings = Settings(max_in_flight=asked)
    assert fit_descriptor_limit(settings, limit).max_in_flight == fitting


def test_no_limit_of_descriptors_fits_all() -> None:
    settings = Settings(max_in_flight=1_000_000)
    assert fit_descriptor_limit(settings, resource.RLIM_INFINITY) == settings
