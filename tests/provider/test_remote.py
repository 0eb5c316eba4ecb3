"""One port checker: what it may send, what is waited for, and how its failures are told."""

import json
import socket
import ssl
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from port_checker import advice
from port_checker.provider import Report
from port_checker.schemas import CheckRequest, ErrorCode, InvalidRequest
from tests.support.loopback import free_port, free_ports, refused_port
from tests.support.namespace import in_namespace, needs_root
from tests.support.scripted import (
    NOT_FOUND,
    REFUSED,
    TELLS_IP,
    Answer,
    ScriptedServer,
    accessible,
    check,
    connected,
    raw_server,
    refusal,
    running,
    scripted,
)


def error_of(url: str, ip: str | None = "127.0.0.1") -> str:
    """How the failure of a server that checks nothing is told."""
    report = check([free_port()], url, ip=ip)
    (server,) = report.servers
    assert (server.url, server.asked) == (url, False)
    assert server.error
    assert server.error.isprintable()
    (port,) = report.ports
    assert (port.reachable, port.error, port.answers) == (False, None, {})
    assert port.advice == advice.NOT_ASKED
    return server.error


# What it takes


def taking(most: int, check: Callable[[list[int]], Answer]) -> Callable[[list[int]], Answer]:
    """Take so many ports at once, and refuse more in the words of the service."""

    def check_or_refuse(ports: list[int]) -> Answer:
        body = json.dumps({"provider_ip": "127.0.0.1", "ports": ports}).encode()
        try:
            CheckRequest.parse(body, most)
        except InvalidRequest as error:
            return refusal(error.code, str(error))
        return check(ports)

    return check_or_refuse


def test_ports_are_asked_for_in_numbers_that_the_server_takes() -> None:
    ports = free_ports(350)
    with scripted(taking(100, connected)) as server:
        report = check(ports, server.url)
    assert report.reachable == 350
    assert report.servers[0].error is None
    # 350 and 175 are too many, once each; 88 are not.
    assert [len(asked) for asked in server.asked] == [350, 175, 88, 88, 88, 86]
    assert [port for asked in server.asked[2:] for port in asked] == ports


def test_a_server_that_takes_no_port_at_all() -> None:
    too_many = "1 ports are too many for one request."
    with scripted(lambda _: refusal(ErrorCode.TOO_MANY_PORTS, too_many)) as server:
        assert error_of(server.url) == f"{too_many} (TOO_MANY_PORTS)"
    assert len(server.asked) == 1


def test_a_failure_half_way_keeps_what_was_told() -> None:
    ports = free_ports(4)

    def check_the_first(asked: list[int]) -> Answer:
        return connected(asked) if ports[0] in asked else refusal(ErrorCode.CHECK_FAILED, "Sorry.")

    with scripted(taking(2, check_the_first)) as server:
        report = check(ports, server.url)
    assert [port.reachable for port in report.ports] == [True, True, False, False]
    assert (report.servers[0].asked, report.servers[0].error) == (True, "Sorry. (CHECK_FAILED)")
    assert {port.advice for port in report.ports[2:]} == {advice.NOT_ASKED}


# What is waited for


def busy_at_first(code: ErrorCode, **headers: str) -> Callable[[list[int]], Answer]:
    answers = iter([refusal(code, **headers)])
    return lambda ports: next(answers, None) or connected(ports)


@pytest.mark.parametrize("code", [ErrorCode.RATE_LIMITED, ErrorCode.OVERLOADED])
@pytest.mark.parametrize(
    ("retry_after", "waited"), [("7", 7), ("0", 1), ("-1", 1)], ids=["7 s", "0 s", "-1 s"]
)
def test_retry_after_is_honoured(code: ErrorCode, retry_after: str, waited: int) -> None:
    slept: list[float] = []
    with scripted(busy_at_first(code, Retry_After=retry_after)) as server:
        report = check(free_ports(1), server.url, slept=slept)
    assert report.servers[0].error is None
    assert report.reachable == 1
    assert slept == [waited]
    assert len(server.asked) == 2


def test_an_overloaded_server_is_asked_for_fewer() -> None:
    ports = free_ports(4)

    def check_few(asked: list[int]) -> Answer:
        if len(asked) > 2:
            return refusal(ErrorCode.OVERLOADED, "At most 2 at once.", Retry_After="1")
        return connected(asked)

    with scripted(check_few) as server:
        assert check(ports, server.url).reachable == 4
    assert server.asked == [ports, ports[:2], ports[2:]]


@pytest.mark.parametrize(
    "seconds", ["100000", "121", "soon", "", "Wed, 21 Oct 2065 07:28:00 GMT", "9" * 5000]
)
def test_a_wait_without_end_or_sense_is_not_waited(seconds: str) -> None:
    with scripted(lambda _: refusal(ErrorCode.OVERLOADED, Retry_After=seconds)) as server:
        assert error_of(server.url) == "No. (OVERLOADED)"
    assert len(server.asked) == 1


def test_patience_is_for_all_waits_together() -> None:
    slept: list[float] = []
    with scripted(lambda _: refusal(ErrorCode.RATE_LIMITED, Retry_After="50")) as server:
        check(free_ports(1), server.url, slept=slept)
    assert slept == [50, 50]


# Servers that check nothing


@pytest.mark.parametrize(
    "code", [ErrorCode.CHECK_FAILED, ErrorCode.TARGET_NOT_ALLOWED, ErrorCode.INTERNAL_ERROR]
)
def test_a_server_that_says_why_it_does_not_check(code: ErrorCode) -> None:
    with scripted(lambda _: refusal(code, "It cannot be.")) as server:
        assert error_of(server.url) == f"It cannot be. ({code})"


def test_a_server_that_is_down() -> None:
    with refused_port() as port:
        assert error_of(f"http://127.0.0.1:{port}") == f"it cannot be reached: {REFUSED}"


def test_a_server_that_resets_the_connection() -> None:
    def reset(connection: socket.socket) -> None:
        connection.recv(1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()

    with raw_server(reset) as url:
        assert error_of(url) == "it cannot be reached: Connection reset by peer"


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"220 mail.example ESMTP\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
    ],
)
def test_a_server_that_does_not_talk_http(said: bytes) -> None:
    def say(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(said)

    with raw_server(say) as url:
        assert error_of(url).startswith("the exchange with it failed: ")


def test_a_certificate_that_nobody_vouches_for(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1"
    where = ["-subj", "/CN=127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*make.split(), *where], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = ScriptedServer(connected, lambda: TELLS_IP)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    with running(server):
        error = error_of(server.url.replace("http:", "https:"))
    assert error == "TLS failed: self-signed certificate"
    assert server.asked == []


def test_a_server_without_tls() -> None:
    with scripted() as server:
        assert error_of(server.url.replace("http:", "https:")).startswith("TLS failed: ")


NO_SUCH_NAME_SCRIPT = """
from tests.support.scripted import check
(server,) = check([20000], "http://checker.invalid", ip="127.0.0.1").servers
print(server.asked, server.error)
"""


@needs_root
def test_a_server_whose_name_is_unknown() -> None:
    (line,) = in_namespace(NO_SUCH_NAME_SCRIPT).splitlines()
    assert line.startswith("False its host name cannot be resolved: ")


NONSENSE = {
    "html": Answer(b"<html><title>Welcome to nginx!</title></html>"),
    "empty": Answer(b""),
    "no content": Answer(b"", 204),
    "moved": Answer(b"", 302, {"Location": "http://127.0.0.1:1/"}),
    "not found": NOT_FOUND,
    "an unknown error": Answer({"detail": {"code": "TEAPOT", "message": "Short."}}, 418),
    "another shape": Answer({"ports": [7466]}),
    "a list": Answer([]),
    "null": Answer(None),
    "not utf-8": Answer(b'{"results": "\xff"}'),
    "nested": Answer(b"[" * 100_000),
    "verdicts that are none": Answer({"success": True, "results": {"1": 2}, "message": ""}),
}


@pytest.mark.parametrize("what", NONSENSE)
def test_an_answer_that_is_not_a_port_checkers(what: str) -> None:
    answer = NONSENSE[what]
    with scripted(lambda _: answer) as server:
        error = error_of(server.url)
    assert error == f"unexpected answer (HTTP status {answer.status}): is this a port checker?"
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "alter",
    [
        lambda ports: [port + 1 for port in ports],
        lambda ports: ports[1:],
        lambda ports: [*ports, 1],
        lambda _: [],
    ],
)
def test_an_answer_for_other_ports_counts_for_none(alter: Callable[[list[int]], list[int]]) -> None:
    with scripted(lambda asked: accessible(alter(asked))) as server:
        error = error_of(server.url)
    assert error == "it reported on other ports than it was asked about"


@pytest.mark.parametrize("path", ["/ip", "/check-ports"])
def test_an_answer_without_end(path: str) -> None:
    endless = Answer(b" " * (16 * 1024 * 1024))
    with scripted(lambda _: endless, endless) as server:
        error = error_of(server.url, None if path == "/ip" else "127.0.0.1")
    assert error == "its answer is too long: is this a port checker?"


def test_a_message_is_shown_without_what_a_terminal_would_obey() -> None:
    message = "\x1b[2J\x1b]0;title\x07\x9b31m\r\nGo \u202eaway " + "!" * 10_000
    with scripted(lambda _: refusal(ErrorCode.CHECK_FAILED, message)) as server:
        error = error_of(server.url)  # which is printable
    assert "Go ?away" in error
    assert len(error) < 400


# This machine's address


UNKNOWING = {"not routed": NOT_FOUND, "not known": Answer({"ip": None})}


@pytest.mark.parametrize("what", UNKNOWING)
def test_a_server_that_does_not_tell_the_address(what: str) -> None:
    def check_with(ip: str | None, *others: str) -> Report:
        return check(free_ports(1), server.url, *others, ip=ip)

    with scripted(ip=UNKNOWING[what]) as server, scripted() as another:
        assert error_of(server.url, ip=None).endswith("; give it with --ip")
        assert server.asked == []
        assert check_with("127.0.0.1").reachable == 1
        report = check_with(None, another.url)  # which does
        assert [(said.asked, said.error) for said in report.servers] == [(True, None)] * 2
        assert (report.reachable, report.ip) == (1, "127.0.0.1")


@pytest.mark.parametrize("ip", ["localhost", "127.0.0.1:80", "fe80::1%lo", "\x1b[2J"])
def test_an_address_that_is_none(ip: str) -> None:
    with scripted(ip=Answer({"ip": ip})) as server:
        assert error_of(server.url, ip=None) == "it sent an invalid IP address"
    assert server.asked == []


@pytest.mark.parametrize("answer", [Answer(b"<html>"), Answer({}), Answer({"ip": 7}), Answer([])])
def test_no_address_at_all(answer: Answer) -> None:
    with scripted(ip=answer) as server:
        assert error_of(server.url, ip=None).startswith("unexpected answer (HTTP status 200)")
    assert server.asked == []


def test_an_error_instead_of_the_address() -> None:
    with scripted(ip=refusal(ErrorCode.INTERNAL_ERROR, "A bug.")) as server:
        assert error_of(server.url, ip=None) == "A bug. (INTERNAL_ERROR)"
