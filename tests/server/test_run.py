"""The program and the server around the application, as processes."""

import logging
import os
import re
import resource
import socket
import subprocess
import sys
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from port_checker.checker import Checker, NoRoom, max_request_for_others
from port_checker.linux import ConnectionTracking
from port_checker.server import health
from port_checker.server.run import (
    connection_tracking_advice,
    fit_descriptor_limit,
    listen,
    max_connections,
    warn_of_small_shares,
)
from port_checker.settings import Rate, Settings
from tests.support.http import client_of
from tests.support.loopback import free_port, open_port
from tests.support.namespace import ROOT, loopback_alone, needs_root
from tests.support.service import ask, check_under_way, program, serve
from tests.support.waiting import wait_until

UVICORN = [sys.executable, "-m", "uvicorn", "port_checker.main:app"]


def test_a_bare_uvicorn_serves_it() -> None:
    port = free_port()
    with (
        program(*UVICORN, "--port", str(port), PORT_CHECKER_PORT=str(port)) as running,
        running.client() as client,
        open_port() as opened,
    ):
        assert ask(client, opened).json()["success"] is True


# What every machine's connection tracking can hold, so that there is no advice about it.
TRACKABLE: dict[str, Any] = {
    "PORT_CHECK_MAX_IN_FLIGHT": "2000",
    "PORT_CHECK_OWN_RATE_LIMIT": "1000/minute",
}


def test_one_line_at_the_start_one_for_each_check_one_at_the_end() -> None:
    with program(**TRACKABLE) as running, open_port() as opened:
        with running.client() as client:
            ask(client, opened)
            client.get("/health")
            client.get("/nothing?%0d%0aforged=line")
        assert running.stop() == 0
    start, check, stop = running.lines
    url = f"http://127.0.0.1:{running.port}"
    listening = f"Listening on 127.0.0.1:{running.port}, page at {url}/, docs at {url}/docs;"
    assert f" INFO port_checker.server.run: {listening}" in start
    for effective in ("processes: 1, ports in flight in each: 2000;", "300/minute requests per"):
        assert effective in start
    told = " INFO port_checker.api.records: check caller=127.0.0.1 target=127.0.0.1 ports=1 "
    assert told in check
    assert stop.endswith(" INFO port_checker.server.run: Stopped\n")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_what_ends_a_process_is_logged_and_not_printed(workers: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['uvloop'] = None\n")
    with program(ready=False, PYTHONPATH=str(tmp_path), PORT_CHECKER_WORKERS=workers) as running:
        wait_until(lambda: any(line.startswith("Traceback") for line in running.lines))
    before = [
        line for line, traceback in pairwise(running.lines) if traceback.startswith("Traceback")
    ]
    assert before
    assert all(" CRITICAL port_checker.server.logs: Ended by a bug" in line for line in before)


def test_debugging_logs_each_port_and_request(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with serve(debug=True) as client, open_port() as opened:
        ask(client, opened)
    assert f"127.0.0.1 port {opened}: open" in caplog.messages
    assert any('"POST /check-ports HTTP/1.1" 200' in message for message in caplog.messages)


def test_before_it_stops_it_finishes_checks_in_flight_and_refuses_new_requests() -> None:
    with (
        program(PORT_CHECK_RETRIES="1", PORT_CHECK_TIMEOUT="20") as running,
        check_under_way(running) as check,
    ):
        running.process.terminate()

        def refusal() -> httpx.Response | None:
            with running.client() as newcomer:
                answer = newcomer.get("/health")
            return answer if answer.status_code == 503 else None

        wait_until(refusal, "the refusal of a new request")
        refused = refusal()
        assert refused
        assert refused.json()["detail"]["code"] == "OVERLOADED"
        assert int(refused.headers["Retry-After"]) >= 1
        assert check.finish().json()["message"] == "Successfully verified 2 out of 2 ports"
        assert running.wait() == 0
    assert "Traceback" not in "".join(running.lines)


def test_what_is_listened_on_already_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    path.touch()
    with open_port() as busy:
        for host, where in (
            ("127.0.0.1", f"127.0.0.1 port {busy}"),
            (f"unix:{path}", f"unix:{path}"),
        ):
            settings = {"PORT_CHECKER_HOST": host, "PORT_CHECKER_PORT": str(busy)}
            with program(ready=False, descriptors=None, **settings) as running:
                assert running.wait() == 1
            assert running.lines == [
                f"port-checker: cannot listen on {where}: Address already in use\n"
            ]


# Somebody whom the machine does not know, who has no home; with the right to read this checkout.
NOBODY = "setpriv --reuid=61234 --regid=61234 --clear-groups"
NOBODY += " --inh-caps=+dac_read_search --ambient-caps=+dac_read_search"


@needs_root
def test_an_unknown_user_on_a_root_that_is_read_only() -> None:
    serve = f"exec {NOBODY} {sys.executable} -I -W error -m port_checker"
    words = ["unshare", "--mount", "sh", "-euc", f"mount -o remount,bind,ro /; {serve}"]
    with (
        program(*words, PORT_CHECKER_WORKERS="2", HOME="/nowhere") as running,
        running.client() as client,
        open_port() as opened,
    ):
        assert ask(client, opened).json()["success"] is True
        assert running.stop() == 0
    assert "Warning:" not in "".join(running.lines)


@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, str(ROOT / "run.py")],
        [str(Path(sys.executable).with_name("port-checker")), "serve"],
        UVICORN,
    ],
)
def test_every_way_to_start_it_says_what_is_wrong_with_a_setting(command: list[str]) -> None:
    """The other one, python -m port_checker, is how all tests start it."""
    done = subprocess.run(
        command,
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
        PORT_CHECK_MAX_PORTS="500",
        SSL_CERT_FILE="/nonexistent",
        SSL_CERT_DIR="/nonexistent",
        **TRACKABLE,
    ) as running:
        running.stop()
    warnings = [
        line.partition(" WARNING port_checker.server.run: ")[2].strip()
        for line in running.lines
        if "WARNING" in line
    ]
    assert warnings == [
        "PORT_CHECK_TIMOUT is not a setting; did you mean PORT_CHECK_TIMEOUT?",
        "/check-tls answers CHECK_FAILED: no certificate authority is trusted on this machine: "
        "is the package ca-certificates missing, or SSL_CERT_FILE wrong?",
        "Providers' software will give up: a check takes up to 35 s (golem-vm-provider up to "
        "0.1.63 waits 30 s, golem-vm-provider after 0.1.63 waits 8 s); lower PORT_CHECK_RETRIES, "
        "PORT_CHECK_TIMEOUT or PORT_CHECK_RETRY_DELAY",
    ]


MINUTE = timedelta(minutes=1)
NO_LIMITS = Settings(caller_rate_limit=None, own_rate_limit=None, max_in_flight=2849)


@pytest.mark.parametrize(
    ("settings", "advised"),
    [
        # Silent: 17 s for 3 attempts; an entry stays 120 s and the 5 s of its attempt: 22.1 at a
        # time. Open: 60 s of a caller's rates, 21,000 ports, and twice that in the 120 s before.
        (Settings(), ("silent ports take up to 230000, and open ports 63000 ", "_max=293000 or ")),
        (Settings(workers=4), ("silent ports take up to 920000, and open ports 252000 ",)),
        (Settings(max_in_flight=110), None),
        (Settings(max_in_flight=111), ("nf_conntrack_max=65553 ",)),
        (Settings(own_rate_limit=Rate(1000, MINUTE), max_in_flight=2588), None),
        (Settings(own_rate_limit=Rate(1000, MINUTE), max_in_flight=2589), ("_max=65547 ",)),
        (Settings(own_rate_limit=None, max_in_flight=1), ("open ports 900000 ",)),  # by requests
        (NO_LIMITS, None),
    ],
)
def test_what_connection_tracking_must_hold(
    settings: Settings, advised: tuple[str, ...] | None
) -> None:
    advice = connection_tracking_advice(settings, ConnectionTracking(65536, 120, 120))
    assert (advice is None) is (advised is None)
    for words in advised or ():
        assert words in (advice or "")


def test_a_machine_without_connection_tracking_needs_no_advice() -> None:
    assert connection_tracking_advice(Settings(), None) is None


def test_the_ipv6_wildcard_serves_both_families() -> None:
    with serve(host="::") as ipv6, open_port() as opened:
        assert ipv6.get("/health").status_code == 200
        with client_of(f"http://127.0.0.1:{ipv6.base_url.port}") as ipv4:
            # Arrives as ::ffff:127.0.0.1.
            assert ask(ipv4, opened).json()["success"] is True


def test_one_ipv6_address_does_not() -> None:
    with listen("::1", 0) as listener:
        assert listener.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 1


def test_localhost_is_an_address_to_listen_on() -> None:
    with listen("localhost", 0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


@needs_root
def test_an_address_of_one_link_to_listen_on() -> None:
    with (
        loopback_alone("ip -6 address add fe80::7/64 dev lo nodad"),
        listen("fe80::7%lo", 0) as listener,
    ):
        assert listener.getsockname()[0] == "fe80::7"


def test_a_unix_socket_for_a_proxy_of_another_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "socket"
    host = f"unix:{path}"
    monkeypatch.setenv("PORT_CHECKER_HOST", host)
    with program(ready=False, PORT_CHECKER_WORKERS="2", PORT_CHECKER_HOST=host) as running:
        wait_until(lambda: health.run(host) == 0, "the program to answer")
        assert health.run() == 0
        capsys.readouterr()
        assert path.stat().st_mode & 0o777 == 0o666
        assert running.stop() == 0
    assert f" Listening on unix:{path}; processes: 2," in running.lines[0]
    assert not path.exists()
    assert health.run() == 1
    assert capsys.readouterr().err.startswith(f"port-checker: {host} does not answer: ")


def test_a_unix_socket_that_was_left_behind_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    with listen(f"unix:{path}", 0), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_a_path_that_is_taken_is_left_alone(tmp_path: Path) -> None:
    used, file = tmp_path / "socket", tmp_path / "file"
    file.touch()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(used))
        listener.listen()
        for path in used, file:
            with pytest.raises(OSError, match="Address already in use"):
                listen(f"unix:{path}", 0)
            assert path.exists()


def test_the_descriptor_limit_is_raised_and_bounds_the_ports_in_flight() -> None:
    with program(descriptors=1024) as running:
        limits = Path(f"/proc/{running.process.pid}/limits").read_text()
        status = Path(f"/proc/{running.process.pid}/status").read_text()
        running.stop()
    # To make room for them as they come would hold up the event loop.
    (room,) = re.findall(r"^FDSize:\s+(\d+)", status, re.MULTILINE)
    assert int(room) >= 512
    (files,) = (line.split() for line in limits.splitlines() if line.startswith("Max open files"))
    assert files[3:5] == ["1024", "1024"]
    lowered, of_caller, of_others, start, _ = running.lines
    assert (
        "PORT_CHECK_MAX_IN_FLIGHT=10000 lowered to 512: this process may open only 1024" in lowered
    )
    assert "PORT_CHECK_MAX_PORTS=1000" in of_caller
    assert "one caller may have at most 102 in flight" in of_caller
    assert "others' addresses together may have at most 256 in flight" in of_others
    assert "ports in flight in each: 512" in start


def test_it_makes_do_with_ipv4_and_the_limit_that_it_has_where_the_kernel_gives_no_more() -> None:
    refused = ["socket of IPv6", "setrlimit", "prlimit64"]
    with program(PORT_CHECKER_HOST="::", descriptors=1024, refused_calls=refused) as running:
        assert running.stop() == 0
    assert "this process may open only 512 files" in running.lines[0]
    (start,) = (line for line in running.lines if "Listening" in line)
    assert f" Listening on 0.0.0.0:{running.port}, page at http://localhost:" in start


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
    settings = fit_descriptor_limit(Settings(max_in_flight=asked), limit)
    assert settings.max_in_flight == fitting
    assert settings.max_in_flight_per_caller == max(1, 2000 * fitting // asked)


@pytest.mark.parametrize(
    ("max_ports", "shares"),
    [(1000, []), (2500, []), (2501, ["caller", "others"]), (5000, ["others"])],
)
def test_shares_below_a_full_request_are_warned_of(
    max_ports: int, shares: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_small_shares(Settings(max_in_flight=5000, max_ports=max_ports))
    assert ["others" if "others" in message else "caller" for message in caplog.messages] == shares


def test_a_stalled_reader_of_the_log_holds_up_nobody() -> None:
    # stderr becomes a pipe that takes some forty lines, and that nobody reads.
    stall = "r, w = os.pipe(); fcntl.fcntl(w, fcntl.F_SETPIPE_SZ, 4096); os.dup2(w, 2)"
    start = "runpy.run_module('port_checker', run_name='__main__')"
    command = [sys.executable, "-c", f"import fcntl, os, runpy; {stall}; {start}"]
    with program(*command, PORT_CHECKER_RATE_LIMIT="off") as running, open_port() as opened:
        with running.client() as client:
            for _ in range(100):
                assert ask(client, opened).json()["success"] is True
        assert running.stop() == 0


PLACES = ("https://ams.checker.example", "https://sgp.checker.example")


def test_a_request_that_does_not_fit_once_the_places_are_counted_is_told_at_the_start(
    caplog: pytest.LogCaptureFixture,
) -> None:
    warn_of_small_shares(Settings(perspectives=PLACES))
    (line,) = caplog.messages
    assert line == (
        "A request for more than 333 ports of an address that is not the caller's own will be "
        "refused, since each counts once for each of 3 places. For PORT_CHECK_MAX_PORTS=1000, set "
        "at least PORT_CHECK_OTHERS_RATE_LIMIT=3000/minute, "
        "PORT_CHECK_TARGET_RATE_LIMIT=3000/minute, PORT_CHECK_MAX_IN_FLIGHT_PER_CALLER=3000, "
        "PORT_CHECK_MAX_IN_FLIGHT=12000."
    )
    words = line.partition("at least ")[2].rstrip(".").split(", ")
    named = {str(field.validation_alias): name for name, field in Settings.model_fields.items()}
    values: dict[str, Any] = {
        named[name]: value for name, _, value in (word.partition("=") for word in words)
    }
    caplog.clear()
    warn_of_small_shares(Settings(perspectives=PLACES, **values))
    values |= {"others_rate_limit": None, "target_rate_limit": None}
    warn_of_small_shares(Settings(perspectives=PLACES, **values))
    warn_of_small_shares(Settings(perspectives=PLACES, targets="caller"))
    warn_of_small_shares(Settings(perspectives=PLACES, max_ports=333))
    assert caplog.messages == []


def test_connections_to_other_places_have_descriptors_too() -> None:
    alone, together = Settings(max_in_flight=1), Settings(max_in_flight=1, perspectives=PLACES)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1000, before[1]))
    try:
        # One for the caller, and one for each of two places.
        assert max_connections(together) == max_connections(alone) // 3
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize(("in_flight", "share"), [(10_000, 2000), (10_000, 10_000), (700, 300)])
def test_the_largest_request_about_others_finds_room_and_one_port_more_never_does(
    in_flight: int, share: int
) -> None:
    checker = Checker(
        retries=1, retry_delay=0, timeout=1, max_in_flight=in_flight, max_per_caller=share
    )
    for places in 1, 3, 17:
        most = max_request_for_others(in_flight, share, places)
        with checker.reserve(most, is_own=False, places=places):
            pass
        with pytest.raises(NoRoom):
            checker.reserve(most + 1, is_own=False, places=places)


def test_what_the_system_refuses_at_the_start_is_one_line() -> None:
    with program(refused_calls=["epoll_create1"], ready=False) as running:
        assert running.wait() == 1
    assert "port-checker: cannot start: Operation not permitted\n" in running.lines
    assert not [line for line in running.lines if "Traceback" in line]


def test_it_does_not_start_without_the_descriptors_that_it_needs() -> None:
    with program(descriptors=24, ready=False) as running:
        assert running.wait() == 1
    (line,) = running.lines
    assert line.startswith("port-checker: cannot start: this process may open only 24 files, and ")
