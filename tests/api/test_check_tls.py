"""POST /check-tls, over real sockets, and as the network's next provider software uses it."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme

from port_checker.api.app import create_app
from port_checker.api.errors import STATUS
from port_checker.checker import TLS_CHECKS_PER_CALLER, Checker
from port_checker.metrics import Metrics, Totals
from port_checker.schemas import TLS_ERROR_EXAMPLES, CheckTlsResponse, ErrorCode
from port_checker.settings import Settings
from tests.support.hostile_tls import showing_in_tls_1_3, slow_certificate
from tests.support.http import check_tls_of, connected, read_answer
from tests.support.loopback import open_port, ports, refused_port, silent_port
from tests.support.namespace import loopback_alone, needs_root
from tests.support.service import ask, program, serve
from tests.support.tls import endpoint, https, wait_for_close
from tests.support.waiting import wait_until

NOW = datetime.now(UTC)
DAY = timedelta(days=1)


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with serve(retries=1) as client:
        yield client


def check_tls(
    client: httpx.Client, port: int, host: str = "127.0.0.1", **fields: object
) -> httpx.Response:
    return client.post("/check-tls", json={"host": host, "port": port, **fields})


def error_code(answer: httpx.Response) -> str:
    code = answer.json()["detail"]["code"]
    assert answer.status_code == STATUS[ErrorCode(code)]
    return str(code)


def test_answers_to_the_byte(client: httpx.Client, authority: trustme.CA) -> None:
    until = datetime(2099, 12, 1, 8, 30, tzinfo=UTC)
    certificate = authority.issue_cert("127.0.0.1", "provider.example", not_after=until)
    with https(certificate) as port:
        good = check_tls(client, port)
        named = check_tls(client, port, "provider.example", expected_ip="127.0.0.1")
        other = check_tls(client, port, expected_ip="203.0.113.7")
    assert good.status_code == 200
    assert good.headers["content-type"] == "application/json"
    assert good.text == (
        f'{{"valid":true,"error":null,"peer":"127.0.0.1:{port}",'
        '"not_after":"2099-12-01T08:30:00+00:00"}'
    )
    assert named.text == good.text.replace("127.0.0.1", "provider.example")
    assert other.text == good.text.replace("true", "false").replace(
        '"error":null', '"error":"certificate does not match expected IP"'
    )
    with refused_port() as port:
        refused = check_tls(client, port)
    assert refused.text == (
        f'{{"valid":false,"error":"Connection refused","peer":"127.0.0.1:{port}","not_after":null}}'
    )


def test_the_documentation(client: httpx.Client) -> None:
    operation = client.get("/openapi.json").json()["paths"]["/check-tls"]["post"]
    documented = {
        code: shown["value"]["detail"]["message"]
        for status, answer in operation["responses"].items()
        if status != "200"
        for code, shown in answer["content"]["application/json"]["examples"].items()
    }
    assert documented == TLS_ERROR_EXAMPLES
    example = operation["responses"]["200"]["content"]["application/json"]["example"]
    assert example == CheckTlsResponse.model_validate(example).model_dump(exclude_unset=True)
    assert list(example) == ["valid", "error", "peer", "not_after"]


# The same rules, limits and room as a check of one port


@needs_root
def test_who_may_be_checked() -> None:
    """In a namespace: if one of them were not refused, nobody would be reached."""

    def ask(host: str, expected_ip: str | None = None, **headers: str) -> Any:
        asked = {"host": host, "port": 443, "expected_ip": expected_ip}
        return service.post("/check-tls", json=asked, headers=headers).json()["detail"]

    with loopback_alone(), serve(retries=1) as service:
        refused = []
        for ip in ("::1", "10.0.0.1", "::ffff:10.0.0.1", "169.254.169.254", "192.168.1.100"):
            refused += [ask(ip), ask("localhost", ip)]
        for forwarded in ("unknown", "198.51.100.9"):
            refused.append(ask("127.0.0.1", **{"x-forwarded-for": forwarded}))
        unrouted = ask("2600::7")
    assert [detail["code"] for detail in refused] == ["TARGET_NOT_ALLOWED"] * 12
    message = TLS_ERROR_EXAMPLES[ErrorCode.CHECK_FAILED]
    assert unrouted == {"code": "CHECK_FAILED", "message": message}


def test_another_sites_page_cannot_ask(client: httpx.Client) -> None:
    answer = client.post("/check-tls", content=b"{", headers={"sec-fetch-site": "cross-site"})
    assert error_code(answer) == "CROSS_ORIGIN"


def test_both_kinds_of_check_share_the_callers_limit() -> None:
    with (
        open_port() as opened,
        refused_port() as refused,
        serve(caller_rate_limit="3/hour", retries=1) as client,
    ):
        assert check_tls(client, refused).status_code == 200
        assert ask(client, opened).status_code == 200
        assert check_tls(client, refused).status_code == 200
        assert error_code(check_tls(client, refused)) == "RATE_LIMITED"
        assert error_code(ask(client, opened)) == "RATE_LIMITED"


def test_a_tls_check_is_one_port_of_its_target() -> None:
    others: dict[str, Any] = {"headers": {"x-forwarded-for": "198.51.100.9"}}
    with (
        refused_port() as refused,
        serve(
            target_rate_limit="2/hour", max_ports=2, allowed_networks="127.0.0.1", retries=1
        ) as client,
    ):
        body = {"host": "127.0.0.1", "port": refused}
        for _ in range(2):
            assert client.post("/check-tls", json=body, **others).status_code == 200
        assert error_code(client.post("/check-tls", json=body, **others)) == "RATE_LIMITED"


def test_a_stalled_handshake_takes_room_until_the_caller_disconnects() -> None:
    checker = Checker(retries=3, retry_delay=30, timeout=30, max_in_flight=1)
    with (
        endpoint(wait_for_close) as port,
        serve(create_app(Settings(), checker=checker)) as client,
        socket.create_connection(("127.0.0.1", client.base_url.port or 0)) as caller,
    ):
        caller.sendall(check_tls_of(port))
        wait_until(lambda: checker.in_flight == 1)
        assert error_code(check_tls(client, port)) == "OVERLOADED"
        caller.close()
        wait_until(lambda: not checker.in_flight)


def test_a_machine_that_trusts_nobody_says_so(
    authority: trustme.CA, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/nonexistent")
    with serve(retries=1) as client, https(authority.issue_cert("127.0.0.1")) as port:
        answer = check_tls(client, port)
    assert error_code(answer) == "CHECK_FAILED"
    assert "no certificate authority is trusted" in answer.json()["detail"]["message"]


def children(process: int) -> list[int]:
    return [
        int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()
    ]


def test_it_stops_without_waiting_for_certificates_that_take_minutes_to_read() -> None:
    certificates = [slow_certificate(serial) for serial in range(1, 261)]
    hostile = showing_in_tls_1_3(certificates)
    shown = threading.Event()

    def show(connection: socket.socket) -> None:
        connection.recv(1, socket.MSG_PEEK)
        shown.set()
        hostile(connection)

    with (
        endpoint(show) as port,
        program(PORT_CHECK_RETRIES="1") as running,
        socket.create_connection(("127.0.0.1", running.port)) as caller,
    ):
        caller.sendall(check_tls_of(port))
        assert shown.wait(60)
        (helper,) = children(running.process.pid)
        assert running.stop() == 0
        _, body = read_answer(caller)
        error = "TLS handshake failed: its certificates take too long to read"
        assert json.loads(body)["error"] == error
        wait_until(lambda: not Path(f"/proc/{helper}").exists(), "the end of its process")


def test_many_handshakes_of_one_caller_are_its_own_trouble(authority: trustme.CA) -> None:
    checker = Checker(retries=1, retry_delay=1, timeout=30, max_in_flight=1000, max_per_caller=100)
    app = create_app(Settings(allowed_networks=(IPv4Network("127.0.0.1"),)), checker=checker)
    elsewhere = httpx.HTTPTransport(local_address="127.0.0.2")
    with (
        endpoint(wait_for_close) as stalling,
        https(authority.issue_cert("127.0.0.1")) as good,
        serve(app) as client,
        httpx.Client(base_url=client.base_url, transport=elsewhere, timeout=60) as other,
        ExitStack() as stalled,
    ):
        for _ in range(TLS_CHECKS_PER_CALLER):
            stalled.enter_context(connected(client)).sendall(check_tls_of(stalling))
        wait_until(lambda: checker.in_flight == TLS_CHECKS_PER_CALLER)
        assert error_code(check_tls(client, good)) == "RATE_LIMITED"
        assert check_tls(other, good).json()["valid"] is True


def test_what_was_checked_is_on_record_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    totals, metrics = Totals(), Metrics()
    totals.add(metrics.row)
    app = create_app(Settings(retries=1), metrics=metrics)
    with refused_port() as port, serve(app) as client:
        check_tls(client, port)
    assert totals.snapshot()["tls_checks", "no_connection"] == 1
    line = next(line for line in caplog.messages if line.startswith("check "))
    assert line.startswith("check caller=127.0.0.1 target=127.0.0.1 ports=1 outcome=completed ")
    assert line.endswith(' tls="Connection refused"')


# What the network's next provider software asks before it joins, with 8 s of patience each time


def join(client: httpx.Client, http: int, https: int, vms: list[int]) -> tuple[object, ...]:
    """Do the three checks, as it does; return the two ports, the certificate, and the range."""

    def post(path: str, body: object) -> Any:
        answer = client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def accessible(asked: list[int]) -> list[bool]:
        results = post("/check-ports", {"provider_ip": "127.0.0.1", "ports": asked})["results"]
        return [results[str(port)]["accessible"] for port in asked]

    web = accessible([http, https])
    asked = {"host": "127.0.0.1", "port": https, "expected_ip": "127.0.0.1"}
    certificate = post("/check-tls", asked)
    return web, certificate["valid"], certificate["error"], all(accessible(vms))


def good(authority: trustme.CA) -> AbstractContextManager[int]:
    return https(authority.issue_cert("127.0.0.1"))


def silent(_: trustme.CA) -> AbstractContextManager[int]:
    return silent_port()


def expired(authority: trustme.CA) -> AbstractContextManager[int]:
    return https(authority.issue_cert("127.0.0.1", not_before=NOW - 9 * DAY, not_after=NOW - DAY))


def staging(_: trustme.CA) -> AbstractContextManager[int]:
    """The authority for trials of Let's Encrypt, say: the software looks for these words."""
    return https(trustme.CA().create_child_ca().issue_cert("127.0.0.1"))


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (good, ([True, True], True, None, True)),
        (silent, ([True, False], False, "Connection timed out", True)),
        (expired, ([True, True], False, "certificate expired", True)),
        (
            staging,
            (
                [True, True],
                False,
                "certificate verify failed: unable to get local issuer certificate",
                True,
            ),
        ),
    ],
)
def test_the_networks_next_provider_software(
    authority: trustme.CA,
    kind: Callable[[trustme.CA], AbstractContextManager[int]],
    told: tuple[object, ...],
) -> None:
    with ExitStack() as stack:
        web = stack.enter_context(open_port())
        secure = stack.enter_context(kind(authority))
        vms = stack.enter_context(ports(100, open_port))
        # The documented settings for its patience, but one attempt for who says nothing.
        attempts = 1 if kind is silent else 2
        client = stack.enter_context(serve(retries=attempts, timeout=3, retry_delay=0.5))
        assert join(client, web, secure, vms) == told
