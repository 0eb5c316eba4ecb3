"""POST /check-ports with Accept: application/x-ndjson: a line for each port when it is final."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import pytest

from port_checker.addresses import Address
from port_checker.api.app import create_app
from port_checker.checker import Reservation
from port_checker.connect import CheckFailed, OnVerdict, Verdict, VerdictKind
from port_checker.server.connections import ConnectionLimits
from port_checker.settings import Settings
from tests.support.checkers import HeldChecker
from tests.support.http import connected
from tests.support.loopback import (
    free_ports,
    full_backlog,
    open_port,
    ports,
    refused_port,
    silent_port,
)
from tests.support.service import serve
from tests.support.waiting import wait_until

NDJSON = {"Accept": "application/x-ndjson"}
UNLIMITED: Mapping[str, Any] = {"caller_rate_limit": None, "own_rate_limit": None}


def body_of(checked: list[int]) -> dict[str, object]:
    return {"provider_ip": "127.0.0.1", "ports": checked}


@contextlib.contextmanager
def progress(client: httpx.Client, checked: list[int]) -> Iterator[httpx.Response]:
    with client.stream("POST", "/check-ports", json=body_of(checked), headers=NDJSON) as answer:
        yield answer


def test_a_line_for_each_port_and_then_the_usual_answer() -> None:
    with (
        serve(retries=2, retry_delay=0, timeout=1) as client,
        open_port() as opened,
        refused_port() as refused,
        silent_port() as silent,
    ):
        checked = [silent, refused, opened]
        with progress(client, checked) as answer:
            lines = [*answer.iter_lines()]
        usual = client.post("/check-ports", json=body_of(checked))
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "application/x-ndjson"
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["X-Accel-Buffering"] == "no"
    assert lines == [
        f'{{"port":{opened},"accessible":true,"error":null}}',
        f'{{"port":{refused},"accessible":false,"error":"Connection refused"}}',
        f'{{"port":{silent},"accessible":false,"error":"Connection timed out"}}',
        usual.text,
    ]


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("application/x-ndjson, application/json", "application/x-ndjson"),
        ("application/json;q=0.5, Application/X-NDJSON;q=0.9", "application/x-ndjson"),
        ("application/json, application/x-ndjson;q=0.9", "application/json"),
        ("application/x-ndjson;q=0", "application/json"),
        ("*/*", "application/json"),
    ],
)
def test_lines_are_for_those_who_like_nothing_better(accept: str, media_type: str) -> None:
    with serve(retries=1) as client, refused_port() as port:
        answer = client.post("/check-ports", json=body_of([port]), headers={"Accept": accept})
    assert answer.headers["Content-Type"] == media_type


def test_each_of_many_ports_has_one_line_though_most_are_tried_again() -> None:
    with (
        serve(**UNLIMITED, retries=2, retry_delay=0, timeout=1, max_ports=500) as client,
        ports(100, open_port) as opened,
        ports(20, silent_port) as silent,
    ):
        checked = [*silent, *free_ports(380), *opened]
        with progress(client, checked) as answer:
            *lines, last = [json.loads(line) for line in answer.iter_lines()]
        usual = client.post("/check-ports", json=body_of(checked))
    told = {str(it.pop("port")): it for it in lines}
    assert len(lines) == len(told)
    assert told == last["results"]
    assert list(last["results"]) == [str(port) for port in checked]
    assert last == usual.json()
    assert last["message"] == "Successfully verified 100 out of 500 ports"


def test_a_port_that_answers_a_later_attempt_has_one_line_which_is_good() -> None:
    with (
        serve(retries=10, retry_delay=0, timeout=0.9) as client,
        open_port() as opened,
        full_backlog() as (late, make_room),
        progress(client, [late, opened]) as answer,
    ):
        lines = answer.iter_lines()
        first = json.loads(next(lines))
        make_room()
        second, last = [json.loads(line) for line in lines]
    assert first == {"port": opened, "accessible": True, "error": None}
    assert second == {"port": late, "accessible": True, "error": None}
    assert last["message"] == "Successfully verified 2 out of 2 ports"


def test_refusals_have_their_status() -> None:
    with serve(caller_rate_limit="2/minute", max_ports=1) as client:
        answers = [
            client.post("/check-ports", json=body_of(checked), headers=NDJSON)
            for checked in ([1, 2], [0], [80])
        ]
    assert [(it.status_code, it.json()["detail"]["code"]) for it in answers] == [
        (422, "TOO_MANY_PORTS"),
        (422, "INVALID_PORT"),
        (429, "RATE_LIMITED"),
    ]
    assert {it.headers["Content-Type"] for it in answers} == {"application/json"}


def test_a_line_is_sent_before_the_check_ends() -> None:
    checker = HeldChecker()
    with (
        serve(create_app(Settings(), checker=checker)) as client,
        open_port() as port,
        progress(client, [port]) as answer,
    ):
        lines = answer.iter_lines()
        assert json.loads(next(lines)) == {"port": port, "accessible": True, "error": None}
        checker.may_go_on.set()
        assert json.loads(next(lines))["success"] is True


def test_a_check_that_fails_in_the_middle_ends_with_the_error() -> None:
    checker = HeldChecker(CheckFailed("no descriptors"))
    with serve(create_app(Settings(), checker=checker)) as client:
        with progress(client, [80, 81]) as answer:
            lines = answer.iter_lines()
            next(lines)
            checker.may_go_on.set()
            (last,) = lines
        usual = client.post("/check-ports", json=body_of([80, 81]))
    assert last == usual.text
    assert usual.json()["detail"]["code"] == "CHECK_FAILED"


def test_a_check_that_fails_before_a_line_is_sent_has_the_usual_status() -> None:
    checker = HeldChecker(CheckFailed("no descriptors"))
    checker.may_go_on.set()
    with serve(create_app(Settings(), checker=checker)) as client:
        answer = client.post("/check-ports", json=body_of([80]), headers=NDJSON)
    assert (answer.status_code, answer.json()["detail"]["code"]) == (503, "CHECK_FAILED")


def test_a_bug_in_the_middle_is_told_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    checker = HeldChecker(ZeroDivisionError())
    with serve(create_app(Settings(), checker=checker)) as client:
        with progress(client, [80]) as answer:
            lines = answer.iter_lines()
            next(lines)
            checker.may_go_on.set()
            (last,) = lines
        usual = client.post("/check-ports", json=body_of([80]))
    assert last == usual.text
    assert usual.status_code == 500
    assert caplog.text.count("Traceback") == 2


def test_the_check_of_a_caller_that_leaves_is_cancelled(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    checker = HeldChecker()
    with serve(create_app(Settings(), checker=checker)) as client:
        with progress(client, [80]) as answer:
            lines = answer.iter_lines()  # once it is gone, the answer is closed
            next(lines)
            assert checker.in_flight == 1
        wait_until(lambda: not checker.in_flight, "the check to end")
    told = [it.getMessage() for it in caplog.records if it.name.startswith("port_checker")]
    assert any("outcome=cancelled" in line for line in told)
    assert "Traceback" not in caplog.text


class TalkativeChecker(HeldChecker):
    """A checker whose verdicts are longer than what the system keeps for a client."""

    async def check(
        self,
        target: Address,
        ports: Any,
        room: Reservation,
        on_final: OnVerdict | None = None,
    ) -> dict[int, Verdict]:
        """Tell of all ports."""
        assert on_final
        for port in ports:
            on_final(port, Verdict(VerdictKind.OTHER, "x" * 100_000))
        return await super().check(target, ports, room)


def test_a_caller_that_does_not_read_is_disconnected_and_its_check_cancelled() -> None:
    checker = TalkativeChecker()
    app = create_app(Settings(max_ports=200), checker=checker)
    with (
        serve(app, limits=ConnectionLimits(10, deadline=0.2)) as client,
        connected(client) as caller,
    ):
        body = json.dumps(body_of([*range(1, 101)])).encode()
        head = (
            "POST /check-ports HTTP/1.1\r\nHost: localhost\r\nAccept: application/x-ndjson\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        caller.sendall(head.encode() + body)
        wait_until(lambda: checker.in_flight, "the check to begin")
        wait_until(lambda: not checker.in_flight, "the check to end")
