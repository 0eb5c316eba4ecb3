"""The service at its limits. What it does there is measured by benchmarks/capacity.py."""

import os
import resource
import signal
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx

from port_checker.api.app import create_app
from port_checker.checker import Checker
from port_checker.settings import Settings
from tests.support.http import HEALTH, check_of
from tests.support.loopback import connecting, full_backlog, open_port, ports
from tests.support.service import Program, ask, program, serve
from tests.support.waiting import wait_until

NO_LIMITS: dict[str, Any] = {
    "PORT_CHECKER_RATE_LIMIT": "off",
    "PORT_CHECK_OWN_RATE_LIMIT": "off",
    "PORT_CHECK_OTHERS_RATE_LIMIT": "off",
    "PORT_CHECK_TARGET_RATE_LIMIT": "off",
}


def descriptors(running: Program) -> int:
    return len(os.listdir(f"/proc/{running.process.pid}/fd"))


def outcome(client: httpx.Client, opened: Sequence[int]) -> str:
    """Check open ports: "right", or an error code."""
    try:
        answer = ask(client, *opened)
    except httpx.TransportError as error:
        return type(error).__name__
    if answer.status_code == 200:
        assert all(verdict["accessible"] for verdict in answer.json()["results"].values())
        return "right"
    assert answer.status_code == 503, answer.text
    code: str = answer.json()["detail"]["code"]
    return code


def test_what_would_pass_the_limit_is_refused_and_what_is_in_flight_is_not_lost() -> None:
    checker = Checker(retries=1, retry_delay=1, timeout=30, max_in_flight=20)
    with (
        full_backlog() as (silent, make_room),
        open_port() as opened,
        serve(create_app(Settings(), checker=checker)) as client,
        ThreadPoolExecutor(20) as pool,
    ):
        checks = [pool.submit(outcome, client, [silent]) for _ in range(20)]
        wait_until(lambda: checker.in_flight == 20, "the service to be full")
        refusal = ask(client, opened)
        assert refusal.status_code == 503
        assert int(refusal.headers["Retry-After"]) >= 1

        def all_done() -> bool:
            make_room()
            return all(check.done() for check in checks)

        wait_until(all_done, "the checks")
        assert [check.result() for check in checks] == ["right"] * 20
        assert outcome(client, [opened]) == "right"


def test_bad_connections_by_the_thousand_do_not_stop_honest_ones() -> None:
    parts = [HEALTH[:20], check_of(80)[:-1], b""]
    with (
        ports(5, open_port) as opened,
        program(**NO_LIMITS) as running,
        running.client() as kept,
        ExitStack() as stack,
    ):
        assert outcome(kept, opened) == "right"
        before = descriptors(running)
        for number in range(2_400):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", running.port), 60))
            sock.sendall(parts[number % len(parts)])
            if number % 50 == 0:
                with running.client() as client:
                    assert outcome(client, opened) == "right"
                assert kept.get("/health").status_code == 200
        stack.close()
        wait_until(lambda: descriptors(running) <= before, "descriptors to come back")
        running.stop()
    assert "Traceback" not in "".join(running.lines)


def test_more_connections_than_descriptors_make_way_for_each_other() -> None:
    limit = 128
    with (
        ports(5, open_port) as opened,
        program(descriptors=limit, **NO_LIMITS) as running,
        ExitStack() as stack,
    ):
        with running.client() as client:
            assert outcome(client, opened) == "right"
        before = descriptors(running)
        # They are all there when the service comes to accept the first of them.
        running.process.send_signal(signal.SIGSTOP)
        for number in range(4 * limit):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", running.port), 60))
            sock.sendall(check_of(*opened) if number % 8 == 0 else b"GET")
        running.process.send_signal(signal.SIGCONT)

        def asked_again() -> str:
            with running.client() as client:
                return outcome(client, opened)

        wait_until(lambda: asked_again() == "right", "room for an honest check")
        stack.close()
        wait_until(lambda: descriptors(running) <= before, "descriptors to come back")
        assert asked_again() == "right"
        running.stop()
    assert "Traceback" not in "".join(running.lines)


def test_running_out_of_descriptors() -> None:
    """Descriptors that were there at the start are taken away, and given back."""
    with (
        ports(60, open_port) as opened,
        program(descriptors=1000, **NO_LIMITS) as running,
        running.client() as kept,
        ExitStack() as stack,
    ):
        assert outcome(kept, opened) == "right"
        before = descriptors(running)
        for left in 30, 1, 0:
            # A new descriptor must be below the limit, and the service's leave no gaps.
            resource.prlimit(running.process.pid, resource.RLIMIT_NOFILE, (before + left, 1000))
            assert outcome(kept, opened) == "CHECK_FAILED"
            assert kept.get("/health").status_code == 200
        # Nor can it accept new connections now, which must not keep it from answering.
        for _ in range(20):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", running.port), 60))
            sock.sendall(HEALTH)
            assert kept.get("/health").status_code == 200
        resource.prlimit(running.process.pid, resource.RLIMIT_NOFILE, (1000, 1000))
        with running.client() as client:
            assert outcome(client, opened) == outcome(kept, opened) == "right"
        stack.close()
        wait_until(lambda: descriptors(running) <= before, "descriptors to come back")
        running.stop()
    log = "".join(running.lines)
    assert "Traceback" not in log
    assert "Too many open files" in log


def test_a_process_that_is_stopped_and_continued_blames_nobody() -> None:
    """At one attempt, for longer than that may last: the kernel goes on meanwhile."""
    settings: dict[str, Any] = {"PORT_CHECK_RETRIES": "1", "PORT_CHECK_TIMEOUT": "6"}
    with (
        full_backlog() as (late, make_room),
        full_backlog() as (silent, _),
        program(**NO_LIMITS, **settings) as running,
        running.client() as one,
        running.client() as other,
        ThreadPoolExecutor(2) as pool,
    ):
        assert ask(one, running.port).json()["success"] is True
        before = connecting([late, silent])
        pending = [pool.submit(ask, one, late), pool.submit(ask, other, silent)]
        wait_until(lambda: connecting([late, silent]) == before + 2, "the attempts")
        running.process.send_signal(signal.SIGSTOP)
        make_room()
        wait_until(lambda: not connecting([late]), "the SYN that is sent again")
        time.sleep(6.5)  # past the timeout
        running.process.send_signal(signal.SIGCONT)
        opened, failed = (answer.result() for answer in pending)
        assert opened.json()["results"][str(late)] == {"accessible": True, "error": None}
        assert failed.status_code == 503
        assert failed.json()["detail"]["code"] == "CHECK_FAILED"
        assert "held up" in failed.json()["detail"]["message"]
