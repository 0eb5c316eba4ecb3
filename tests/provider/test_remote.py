"""One port checker: what it may send, what is waited for, and how its failures are told."""

import asyncio
import contextlib
import json
import re
import socket
import ssl
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
import trustme

from port_checker import advice
from port_checker.linux import ephemeral_ports
from port_checker.provider import Report, verify
from port_checker.provider.http_client import LocalPorts, ServerUrl
from port_checker.schemas import CheckPortsRequest, ErrorCode, InvalidRequest
from tests.support.loopback import free_port, free_ports, refused_port
from tests.support.namespace import loopback_alone, needs_root
from tests.support.scripted import (
    NOT_FOUND,
    REFUSED,
    TELLS_IP,
    Answer,
    ScriptedServer,
    accessible,
    check,
    connect,
    connected,
    raw_server,
    refusal,
    running,
    scripted,
    short_waits,
    verdicts,
)
from tests.support.service import serve
from tests.support.tls import https, trust


def error_of(url: str, ip: str | None = "127.0.0.1") -> str:
    """How the failure of a server that checks nothing is told."""
    report = check([free_port()], url, ip=ip)
    (server,) = report.servers
    assert not server.asked
    assert server.error
    assert server.error.isprintable()
    (port,) = report.ports
    assert (port.reachable, port.error, port.answers) == (False, None, {})
    expected = advice.NOT_CHECKED.format(reason=f"{server.url}: {server.error}")
    assert port.advice == advice.sentence(expected)
    return server.error


# What it takes


def taking(most: int, check: Callable[[list[int]], Answer]) -> Callable[[list[int]], Answer]:
    """Take so many ports at once, and refuse more in the words of the service."""

    def check_or_refuse(ports: list[int]) -> Answer:
        body = json.dumps({"provider_ip": "127.0.0.1", "ports": ports}).encode()
        try:
            CheckPortsRequest.parse(body, most)
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
    assert sorted(port for asked in server.asked[2:] for port in asked) == ports


def test_a_server_that_takes_no_port_at_all() -> None:
    too_many = "1 ports are too many for one request."
    with scripted(lambda _: refusal(ErrorCode.TOO_MANY_PORTS, too_many)) as server:
        assert error_of(server.url) == f"{too_many} (TOO_MANY_PORTS)"
    assert len(server.asked) == 1


def test_a_failure_half_way_keeps_what_was_told() -> None:
    ports = free_ports(4)

    def check_the_first(asked: list[int]) -> Answer:
        is_first = len(server.asked) == 2  # after all of them, which are too many
        return connected(asked) if is_first else refusal(ErrorCode.TARGET_NOT_ALLOWED, "Sorry.")

    with scripted(taking(2, check_the_first)) as server:
        report = check(ports, server.url)
    reached = [port.port for port in report.ports if port.reachable]
    assert reached == server.asked[1]
    server_report = report.servers[0]
    assert (server_report.asked, server_report.error) == (True, "Sorry. (TARGET_NOT_ALLOWED)")
    assert all("Sorry." in (p.advice or "") for p in report.ports if p.port not in reached)


def test_a_port_that_the_server_may_not_connect_to_costs_no_other_its_verdict() -> None:
    ports = free_ports(3)

    def check_most(asked: list[int]) -> Answer:
        if ports[1] not in asked:
            return connected(asked)
        failed = refusal(ErrorCode.CHECK_FAILED, "Its firewall.").document
        assert isinstance(failed, dict)
        return Answer({"detail": {**failed["detail"], "ports": [ports[1], 1]}}, 503)

    slept: list[float] = []
    with scripted(check_most) as server:
        report = check(ports, server.url, slept=slept)
    assert server.asked == [ports, [ports[0], ports[2]]]
    assert [port.advice for port in report.ports] == [None, advice.SERVER_CANNOT, None]
    assert report.servers[0].error is None
    assert slept == []


@pytest.mark.parametrize("status", [400, 418, 500])
def test_an_error_code_of_a_newer_server_is_shown_with_its_message(status: int) -> None:
    with scripted(lambda _: Answer({"detail": {"code": "NEW", "message": "A."}}, status)) as server:
        assert error_of(server.url) == "A. (NEW)"


OWN_ERRORS = [
    "[Errno 24] Too many open files",
    "[Errno 101] Network is unreachable",
    "[Errno 99] Cannot assign requested address",
]


@pytest.mark.parametrize("error", OWN_ERRORS)
def test_an_older_servers_own_error_is_no_verdict(error: str) -> None:
    ports = free_ports(2)

    def check_one(asked: list[int]) -> Answer:
        connect([ports[0]])
        return verdicts({port: error if port == ports[1] else None for port in asked})

    with scripted(check_one) as server:
        good, bad = check(ports, server.url).ports
    assert good.reachable
    assert (bad.reachable, bad.error, bad.answers) == (False, None, {})
    assert bad.advice == advice.NOT_CHECKED.format(
        reason=f"{server.url}: could not connect itself ({error})"
    )


def test_an_older_servers_verdict_is_read_by_its_number() -> None:
    error = "[Errno 111] Connect call failed ('127.0.0.1', 1)"
    with scripted(lambda asked: verdicts(dict.fromkeys(asked, error))) as server:
        (port,) = check(free_ports(1), server.url).ports
    assert port.error == REFUSED


@pytest.mark.parametrize("status", [408, 425, 499, 520, 530, 598])
def test_what_proxies_say_while_a_server_is_away_passes(status: int) -> None:
    slept: list[float] = []
    with scripted(passing(Answer(b"", status), 1)) as server:
        assert check(free_ports(1), server.url, slept=slept).reachable == 1
    assert slept == [1]


@pytest.mark.parametrize(
    "answer",
    [Answer(b"", 302, {"Location": "http://login.example/portal?x"}), Answer(b"<html>", 511)],
)
def test_a_login_page_is_no_new_address_of_the_server(answer: Answer) -> None:
    with scripted(ip=answer) as server:
        assert "a login page of this network" in error_of(server.url, ip=None)


def test_a_server_that_sees_another_address_this_time_is_asked_about_that() -> None:
    """Uplinks that are balanced by connection."""
    refusal_of = "You may check your own address, 127.0.0.2."
    answers = iter([refusal(ErrorCode.TARGET_NOT_ALLOWED, refusal_of)])
    with scripted(lambda asked: next(answers, None) or connected(asked)) as server:
        report = check(free_ports(1), server.url)
    assert (report.reachable, report.ip) == (1, "127.0.0.2")
    assert server.addresses == ["127.0.0.1", "127.0.0.2"]


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
    assert [len(asked) for asked in server.asked] == [4, 2, 2]
    assert sorted(server.asked[1] + server.asked[2]) == ports


@pytest.mark.parametrize("seconds", ["100000", "121", "Wed, 21 Oct 2065 07:28:00 GMT"])
def test_a_wait_without_end_is_not_waited(seconds: str) -> None:
    with scripted(lambda _: refusal(ErrorCode.OVERLOADED, Retry_After=seconds)) as server:
        assert error_of(server.url) == "No. (OVERLOADED)"
    assert len(server.asked) == 1


# A date whose offset from UTC is no number that a date can have.
TOO_FAR_EAST = f"Mon, 23 Nov 2026 14:40:07 +{'9' * 400}"


def passing(answer: Answer, times: int) -> Callable[[list[int]], Answer]:
    answers = iter([answer] * times)
    return lambda ports: next(answers, None) or connected(ports)


@pytest.mark.parametrize(
    ("status", "retry_after"),
    [
        *((status, None) for status in (429, 502, 503, 504)),
        *((503, nonsense) for nonsense in ("soon", "", "9" * 5000, "-1e9", TOO_FAR_EAST)),
    ],
)
def test_what_passes_is_waited_out_with_growing_pauses(
    status: int, retry_after: str | None
) -> None:
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    slept: list[float] = []
    with scripted(passing(Answer(b"<html>", status, headers), 3)) as server:
        report = check(free_ports(1), server.url, slept=slept)
    assert (report.reachable, slept) == (1, [1, 2, 4])


def test_a_date_to_retry_after_is_waited_for() -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    slept: list[float] = []
    with scripted(passing(Answer(b"", 503, {"Retry-After": date}), 1)) as server:
        check(free_ports(1), server.url, slept=slept)
    assert len(slept) == 1
    assert 0 < slept[0] <= 60


def test_connection_errors_pass() -> None:
    """A server that closes at once, then resets, is then reached."""
    tries: list[str] = []
    with scripted() as server:
        behaviours = iter([close, reset])

        def relay(connection: socket.socket) -> None:
            if behave := next(behaviours, None):
                tries.append(behave.__name__)
                return behave(connection)
            return forward(connection, server)

        with raw_server(relay) as url:
            report = check(free_ports(1), url, ip="127.0.0.1")
    assert tries == ["close", "reset"]
    assert (report.reachable, report.servers[0].error) == (1, None)


def close(connection: socket.socket) -> None:
    connection.recv(65536)


def reset(connection: socket.socket) -> None:
    connection.recv(1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def forward(connection: socket.socket, server: ScriptedServer) -> None:
    """Be a proxy for one request."""
    with socket.create_connection(("127.0.0.1", server.server_address[1]), 30) as onwards:
        request = b""
        while b"}" not in request:
            request += connection.recv(65536)
        onwards.sendall(request)
        while data := onwards.recv(65536):
            connection.sendall(data)


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


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"], ids=["one address", "both families"])
def test_a_server_that_is_down(host: str) -> None:
    with refused_port() as port:
        assert error_of(f"http://{host}:{port}") == f"cannot be reached: {REFUSED}"


def test_a_server_that_resets_the_connection() -> None:
    with raw_server(reset) as url:
        assert error_of(url) == "cannot be reached: Connection reset by peer"


CUT_SHORT = "closes the connection without a full answer"
SAID = {
    b"": CUT_SHORT,
    b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}": CUT_SHORT,
    b"220 mail.example ESMTP\r\n": "does not speak HTTP",
    b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}": (
        "encodes its answer, though it was asked not to"
    ),
    b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 100_000: "does not speak HTTP",
}


@pytest.mark.parametrize("said", SAID, ids=lambda said: said[:60])
def test_a_server_that_does_not_talk_http(said: bytes) -> None:
    def say(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(said)

    with raw_server(say) as url:
        assert error_of(url).startswith(SAID[said])


@pytest.mark.parametrize("body", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"])
def test_a_server_that_never_answers(body: bytes) -> None:
    done = threading.Event()

    def stall(connection: socket.socket) -> None:
        connection.sendall(body)
        done.wait(60)

    with raw_server(stall) as url:
        try:
            report = check([free_port()], url, ip="127.0.0.1", answer=0.1)
        finally:
            done.set()
    assert report.servers[0].error == "does not answer in time"


def test_attempts_without_an_answer_use_up_patience() -> None:
    attempts: list[bytes] = []
    done = threading.Event()

    def stall(connection: socket.socket) -> None:
        attempts.append(connection.recv(1))
        done.wait(60)

    with raw_server(stall) as url:
        try:
            waits: dict[str, Any] = {"answer": 0.1, "pauses": (0.001,) * 20, "patience": 0.5}
            check([free_port()], url, ip="127.0.0.1", **waits)
        finally:
            done.set()
    assert len(attempts) <= 5


@contextlib.contextmanager
def tls_server(directory: Path) -> Iterator[tuple[str, Path]]:
    """A server with a certificate of its own; yield its URL and the certificate."""
    key, certificate = directory / "key.pem", directory / "certificate.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1"
    name = ["-subj", "/CN=checker", "-addext", "subjectAltName=IP:127.0.0.1"]
    where = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*make.split(), *name, *where], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = ScriptedServer(connected, lambda: TELLS_IP)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    with running(server):
        yield server.url.replace("http:", "https:"), certificate


def test_a_certificate_that_nobody_vouches_for(tmp_path: Path) -> None:
    with tls_server(tmp_path) as (url, _):
        assert error_of(url) == "TLS failed: self-signed certificate"


def test_a_clock_may_be_to_blame_for_a_certificate_that_is_not_valid_now(
    authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trust(authority, monkeypatch, tmp_path)
    expired = authority.issue_cert("127.0.0.1", not_after=datetime(2020, 1, 1, tzinfo=UTC))
    with https(expired) as port:
        error = error_of(f"https://127.0.0.1:{port}")
    expected = r"TLS failed: certificate has expired by this machine's clock \([-0-9]{10} .* UTC\)"
    assert re.fullmatch(expected, error)


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
def test_an_authority_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    with tls_server(tmp_path) as (url, certificate):
        words = ["openssl", "x509", "-hash", "-noout", "-in", str(certificate)]
        name = subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
        (tmp_path / f"{name}.0").symlink_to(certificate)
        monkeypatch.setenv(variable, str(certificate if "FILE" in variable else tmp_path))
        report = check([free_port()], url)
    assert (report.reachable, report.servers[0].error) == (1, None)


def test_authorities_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenSSL would pass over them without a word."""
    (tmp_path / "empty").touch()
    for file, why in ("none", "No such file or directory"), ("empty", "no certificate in it"):
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / file))
        said = f"TLS failed: SSL_CERT_FILE={tmp_path / file} cannot be used: {why}"
        assert error_of("https://127.0.0.1:1") == said


def test_a_server_without_tls() -> None:
    with scripted() as server:
        assert error_of(server.url.replace("http:", "https:")).startswith("TLS failed: ")


@needs_root
def test_a_server_whose_name_is_unknown() -> None:
    with loopback_alone():  # DNS is not there
        assert error_of("http://checker.invalid").startswith("host name cannot be resolved: ")


NONSENSE = {
    "html": Answer(b"<html><title>Welcome to nginx!</title></html>"),
    "empty": Answer(b""),
    "no content": Answer(b"", 204),
    "not found": NOT_FOUND,
    "another shape": Answer({"ports": [7466]}),
    "a list": Answer([]),
    "null": Answer(None),
    "not utf-8": Answer(b'{"results": "\xff"}'),
    "nested": Answer(b"[" * 60_000),
    "verdicts that are none": Answer({"success": True, "results": {"1": 2}, "message": ""}),
}


@pytest.mark.parametrize("what", NONSENSE)
def test_an_answer_that_is_not_a_port_checkers(what: str) -> None:
    answer = NONSENSE[what]
    with scripted(lambda _: answer) as server:
        error = error_of(server.url)
    assert error.startswith(f"unexpected answer, HTTP status {answer.status} (")
    assert error.endswith("is this a port checker?")
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
    assert error == "reported on other ports than it was asked about"


@pytest.mark.parametrize("path", ["/ip", "/check-ports"])
def test_an_answer_without_end(path: str) -> None:
    endless = Answer(b" " * (16 * 1024 * 1024))
    with scripted(lambda _: endless, endless) as server:
        error = error_of(server.url, None if path == "/ip" else "127.0.0.1")
    assert error == "answer is too long: is this a port checker?"


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
        assert error_of(server.url, ip=None) == "sent an invalid IP address"
    assert server.asked == []


@pytest.mark.parametrize("answer", [Answer(b"<html>"), Answer({}), Answer({"ip": 7}), Answer([])])
def test_no_address_at_all(answer: Answer) -> None:
    with scripted(ip=answer) as server:
        assert error_of(server.url, ip=None).startswith("unexpected answer, HTTP status 200")
    assert server.asked == []


def test_an_error_instead_of_the_address() -> None:
    with scripted(ip=refusal(ErrorCode.INTERNAL_ERROR, "A bug.")) as server:
        assert error_of(server.url, ip=None) == "A bug. (INTERNAL_ERROR)"


# URLs


@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("https://checker.example/check-ports", "https://checker.example"),
        ("/elsewhere/check-ports", "http://127.0.0.1:{port}/elsewhere"),
        ("http://user:secret@[2001:db8::7]:9000/~a/", "http://[2001:db8::7]:9000/~a/"),
    ],
)
def test_a_redirect_names_its_target(location: str, target: str) -> None:
    with scripted(lambda _: Answer(b"", 301, {"Location": location})) as server:
        error = error_of(server.url)
        port = server.server_address[1]
    assert error == f"redirects to {target.format(port=port)}: give that URL"


@pytest.mark.parametrize(
    "taken_apart",
    [*";&|<>()$`\\\"' *?#!{}^=%,+\x9b", "\u00e9", "$(id)", "&&id", ";id;/..%2f"],
)
def test_a_redirects_target_that_a_shell_would_take_apart_is_not_offered(taken_apart: str) -> None:
    location = f"http://checker.example/{taken_apart}/check-ports"
    with scripted(lambda _: Answer(b"", 301, {"Location": location})) as server:
        assert error_of(server.url) == (
            "redirects to another URL: ask those who run it for it, and give that"
        )


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (301, "redirects to another URL: "),
        (302, "cannot be reached: a login page of this network "),
    ],
)
def test_a_redirect_to_what_is_no_url(status: int, error: str) -> None:
    with scripted(lambda _: Answer(b"", status, {"Location": "http://[/"})) as server:
        assert error_of(server.url).startswith(error)


def test_the_url_of_a_page_of_the_server() -> None:
    with scripted() as server:
        url = f"{server.url}/docs"
        assert error_of(url, ip=None) == f"has nothing at {url}/ip: try {server.url}"


def test_a_server_that_wants_a_password_gets_it_by_the_url() -> None:
    with scripted(ip=Answer(b"", 401)) as server:
        url = server.url.replace("//", "//{}@")
        expected = f"asks for a user name and password: give them in the URL ({url})"
        assert error_of(server.url, ip=None) == expected.format("NAME:PASSWORD")
        refused = "refuses the user name and password of the URL"
        assert error_of(url.format("me:secret"), ip=None) == refused


def test_a_password_is_sent_and_never_shown() -> None:
    asked: list[bytes] = []
    heard: list[str] = []
    with scripted() as server:

        def remember(connection: socket.socket) -> None:
            asked.append(connection.recv(65536, socket.MSG_PEEK))
            forward(connection, server)

        with raw_server(remember) as url:
            secret = url.replace("//", "//me:s%65cret@")
            report = asyncio.run(
                verify(free_ports(1), servers=[secret], ip="127.0.0.1", on_progress=heard.append)
            )
    assert b"Authorization: Basic bWU6c2VjcmV0\r\n" in asked[0]
    assert report.reachable == 1
    assert report.servers[0].url == url
    assert "cret" not in repr((report, heard))


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http://[::1",
        "http://[::g]",
        "http://127.0.0.1:abc",
        "http://h:99999",
        "http://h:0",
        "http://127.0.0.1:1/\n",
        "http://a,http://b",
        "http://a http://b",
        "http://me:secret@",
        "http://h/?secret",
        "127.0.0.1:1",
        "ftp://me:secret@h",
        "me:secret@h",
        "",
    ],
)
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(ValueError, match=r"URL|must start with") as raised:
        ServerUrl.parse(url)
    assert "secret@" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://h", "http://h"),
        ("HTTPS://Checker.Example:443/a/", "https://checker.example/a"),
        ("http://[2001:db8::7]:9000/", "http://[2001:db8::7]:9000"),
        ("http://bücher.example", "http://xn--bcher-kva.example"),
    ],
)
def test_urls_in_one_form(text: str, shown: str) -> None:
    assert str(ServerUrl.parse(text)) == shown


# This program's own connections


def test_its_own_ports_are_none_of_those_under_check() -> None:
    with socket.socket() as sock:
        sock.bind(("", 0))
        free = sock.getsockname()[1]
    checked = set(ephemeral_ports()) - {free}
    with socket.socket() as sock, socket.socket() as other:
        LocalPorts(checked).bind(sock)
        assert sock.getsockname()[1] == free
        with pytest.raises(OSError, match="Cannot assign"):
            LocalPorts(checked).bind(other)  # it is taken
    with socket.socket() as sock:
        LocalPorts(range(1024, 65536)).bind(sock)  # there is no other
        assert sock.getsockname()[1] >= 1024


# Answers that come line by line


def test_progress_is_told_as_results_come() -> None:
    ports = free_ports(100)
    texts: list[str] = []
    with serve() as client:
        url = str(client.base_url)
        waits = short_waits()
        report = asyncio.run(verify(ports, servers=[url], on_progress=texts.append, waits=waits))
    assert report.reachable == 100
    assert f"{url} is checking 100 ports (at most 35 s): 100 done" in texts


LINE = b'{"port":1,"accessible":true,"error":null}\n'


@pytest.mark.parametrize(
    "body",
    [
        LINE,
        LINE + LINE[:20],
        b"",
        LINE + b'{"detail":{"code":"CHECK_FAILED","message":"No files."}}\n',
    ],
)
def test_lines_without_a_good_last_one_count_for_nothing(body: bytes) -> None:
    (port,) = free_ports(1)
    broken = Answer(
        body.replace(b":1,", b":%d," % port), headers={"Content-Type": "application/x-ndjson"}
    )
    answers = iter([broken])
    with scripted(lambda ports: next(answers, None) or connected(ports)) as server:
        report = check([port], server.url)
    assert report.reachable == 1
    assert server.asked == [[port], [port]]


# What a server says of other places


def test_what_each_place_says_is_in_the_report_whatever_else_there_is() -> None:
    port, other = free_ports(2)
    names = [f"place{number}.example" for number in range(15)]

    def results(ports: list[int], error: str | None = None) -> dict[str, object]:
        return {str(port): {"accessible": error is None, "error": error} for port in ports}

    def check_everywhere(ports: list[int]) -> Answer:
        connect(ports)
        document = accessible(ports).document
        assert isinstance(document, dict)
        failed = {"name": "new.example", "error": {"code": "ONE_OF_TOMORROW", "message": "x"}}
        places = [
            {"name": "here", "results": results(ports)},
            {"name": "sgp\x1b[2J.example", "results": results(ports[:1], "timed\x1b out")},
            failed,
            *({"name": name, "results": results(ports)} for name in names),
        ]
        return Answer(document | {"perspectives": places})

    with scripted(check_everywhere) as server:
        report = check([port, other], server.url)
    assert report.reachable == 2
    said = dict.fromkeys((server.url.removeprefix("http://"), *names[:14]))
    found = [
        {name: verdict.error for name, verdict in each.places[server.url].items()}
        for each in report.ports
    ]
    assert sorted(found, key=len) == [said, said | {"sgp?[2J.example": "timed? out"}]


def test_a_server_without_other_places_says_nothing_of_them() -> None:
    port = free_port()
    with serve(retries=1) as client:
        report = check([port], str(client.base_url))
    assert report.ports[0].places == {}
