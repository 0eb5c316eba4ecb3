"""The provider's side as a library: real listeners, the real service, and servers with scripts."""

import asyncio
import contextlib
import gc
import json
import os
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from port_checker.linux import half_open_ports
from port_checker.provider import Report, verify
from port_checker.provider.listeners import Listeners
from port_checker.schemas import CheckRequest, ErrorCode, InvalidRequest
from tests.support.loopback import family_of, free_ports, open_listener, refused_port
from tests.support.namespace import ROOT, in_namespace, needs_root, needs_setpriv
from tests.support.scripted import (
    NOT_FOUND,
    TELLS_IP,
    Answer,
    ScriptedServer,
    accessible,
    connect,
    connected,
    raw_server,
    refusal,
    refused,
    running,
    scripted,
    verdicts,
)
from tests.support.service import serve
from tests.support.waiting import wait_until

REFUSED, TIMED_OUT = "Connection refused", "Connection timed out"
NO_ROUTE, UNREACHABLE = "No route to host", "Network is unreachable"
NOT_PERMITTED = "Permission denied"

# How each piece of advice begins.
TO_FORWARD = "The address answers, but nothing listens there"
TO_OPEN = "A firewall or router drops what arrives"
TO_ASK_THE_ROUTER = "A router on the way says that it cannot or may not deliver"
ANSWERED_ELSEWHERE = "Something else answered in this machine's place"
WAY_BACK = "Connections arrive here, but the answers do not get back"
IN_USE = "A program on this machine has it, and is not reached"
NOT_ALLOWED_HERE = "You may not listen on it"
NOT_LISTENED = "This machine could not listen on it"
NOT_ASKED = "No server told anything about it"


def is_listened_on(port: int, host: str = "127.0.0.1") -> bool:
    with socket.socket(family_of(host)) as client:
        return client.connect_ex((host, port)) == 0


def check(ports: Sequence[int], *servers: str, ip: str | None = None) -> Report:
    return asyncio.run(verify(ports, servers=servers, ip=ip))


def error_of(url: str, ip: str | None = "127.0.0.1") -> str:
    """What is said of a server that cannot be asked."""
    (port,) = free_ports(1)
    report = check([port], url, ip=ip)
    (server,) = report.servers
    assert server.url == url
    assert not server.asked
    assert server.error
    assert server.error.isprintable()
    (said,) = report.ports
    assert (said.reachable, said.error, said.answers) == (False, None, {})
    assert said.advice
    assert said.advice.startswith(NOT_ASKED)
    return server.error


# Ports that are reached


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_ports_are_reachable_and_confirmed(host: str) -> None:
    ports = free_ports(3)
    heard: list[str] = []
    with serve(host=host, retries=1) as client:
        url = str(client.base_url)
        report = asyncio.run(verify(ports, servers=[url], on_progress=heard.append))
    assert report.ip == host
    assert [(server.url, server.asked, server.error) for server in report.servers] == [
        (url, True, None)
    ]
    assert [port.port for port in report.ports] == ports
    for port in report.ports:
        assert (port.local, port.reachable, port.confirmed) == ("bound", True, True)
        assert (port.error, port.advice) == (None, None)
        assert [verdict.accessible for verdict in port.answers.values()] == [True]
        assert list(port.answers) == [url]
    assert (report.reachable, report.total) == (3, 3)
    assert heard[-1] == f"{url} is checking 3 ports"
    assert not any(is_listened_on(port, host) for port in ports)


def test_the_address_that_is_given_is_the_one_that_is_checked() -> None:
    with scripted() as server:
        report = check(free_ports(1), server.url, ip="::ffff:127.0.0.3")
    assert server.addresses == [report.ip] == ["127.0.0.3"]


def test_a_program_keeps_its_port() -> None:
    (port,) = free_ports(1)
    with serve(retries=1) as client, open_listener(port=port) as program:
        started = time.monotonic()
        report = check([port], str(client.base_url))
        assert time.monotonic() - started < 3  # there is no listener to wait for
        program.settimeout(5)
        program.accept()[0].close()  # the service came here
        with socket.create_connection(("127.0.0.1", port), 5):
            program.accept()[0].close()
    (said,) = report.ports
    assert (said.local, said.reachable, said.confirmed) == ("in use", True, None)
    assert (said.error, said.advice) == (None, None)


def test_a_program_that_is_not_reached() -> None:
    with serve(retries=1) as client, refused_port() as port:
        report = check([port], str(client.base_url))
    (said,) = report.ports
    assert (said.local, said.reachable, said.confirmed) == ("in use", False, None)
    assert said.error == REFUSED
    assert said.advice
    assert said.advice.startswith(IN_USE)


NOT_PERMITTED_SCRIPT = """
import subprocess, sys
program = '''
import asyncio
from port_checker.provider import verify
from tests.support.service import serve
with serve(retries=1) as client:
    report = asyncio.run(verify([80, 20000], servers=[str(client.base_url)]))
for port in report.ports:
    print(port.port, port.local, port.reachable, port.confirmed, bool(port.answers), port.advice)
'''
without = ["setpriv", "--bounding-set=-net_bind_service"]
sys.exit(subprocess.run([*without, sys.executable, "-c", program]).returncode)
"""


@needs_root
@needs_setpriv
def test_a_port_that_one_may_not_listen_on() -> None:
    forbidden, allowed = in_namespace(NOT_PERMITTED_SCRIPT).splitlines()
    assert allowed == "20000 bound True True True None"
    # There was no listener that could have seen anything.
    assert forbidden.startswith(f"80 not permitted False None False {NOT_ALLOWED_HERE}")


# What the servers say, and what the listeners saw


def test_what_a_server_says_without_connecting_is_not_confirmed() -> None:
    one, other = free_ports(2)
    with (
        scripted(accessible) as believer,
        scripted(lambda _: verdicts({one: None, other: REFUSED})) as doubter,
    ):
        report = check([one, other], believer.url, doubter.url)
    assert report.reachable == 0
    for port in report.ports:
        assert (port.local, port.reachable, port.confirmed, port.error) == (
            "bound",
            False,
            False,
            None,
        )
        assert port.advice
        assert port.advice.startswith(ANSWERED_ELSEWHERE)
    assert report.ports[1].answers[doubter.url].error == REFUSED


def test_a_connection_that_comes_after_the_answer_confirms() -> None:
    ports = free_ports(2)
    later = threading.Timer(0.5, connect, [ports])

    def check_early(asked: list[int]) -> Answer:
        later.start()
        return accessible(asked)

    with scripted(check_early) as server:
        started = time.monotonic()
        report = check(ports, server.url)
        assert 0.5 <= time.monotonic() - started < 2.5  # it waits, and no longer than it must
    later.join()
    assert [port.confirmed for port in report.ports] == [True, True]
    assert report.reachable == 2


@pytest.mark.parametrize("error", [TIMED_OUT, REFUSED])
def test_connections_that_arrive_and_do_not_succeed_point_at_the_way_back(error: str) -> None:
    def connect_in_vain(ports: list[int]) -> Answer:
        connect(ports)
        return verdicts(dict.fromkeys(ports, error))

    with scripted(connect_in_vain) as server:
        (said,) = check(free_ports(1), server.url).ports
    assert (said.reachable, said.confirmed, said.error) == (False, False, error)
    assert said.advice
    assert said.advice.startswith(WAY_BACK)


HALF_OPEN_SCRIPT = """
import asyncio
from port_checker.provider import verify
from tests.support.service import serve
with serve(retries=1, timeout=0.3) as client:
    report = asyncio.run(verify([20000, 20001], servers=[str(client.base_url)]))
for port in report.ports:
    print(port.port, port.local, port.reachable, port.confirmed, port.error, "-", port.advice)
"""


@needs_root
def test_lost_answers_of_the_kernel_point_at_the_way_back() -> None:
    lose = "tcp sport 20000 tcp flags '&' '(syn|ack)' == '(syn|ack)' drop"
    lost, reached = in_namespace(
        HALF_OPEN_SCRIPT,
        "nft add table inet lost",
        "nft add chain inet lost output '{ type filter hook output priority 0; }'",
        f"nft add rule inet lost output {lose}",
    ).splitlines()
    assert lost.startswith(f"20000 bound False False {TIMED_OUT} - {WAY_BACK}")
    assert reached == "20001 bound True True None - None"


def test_each_error_has_its_own_advice() -> None:
    expected = {
        REFUSED: TO_FORWARD,
        TIMED_OUT: TO_OPEN,
        NO_ROUTE: TO_ASK_THE_ROUTER,
        UNREACHABLE: TO_ASK_THE_ROUTER,
        NOT_PERMITTED: TO_ASK_THE_ROUTER,
    }
    ports = free_ports(len(expected))
    with scripted(lambda _: verdicts(dict(zip(ports, expected, strict=True)))) as server:
        report = check(ports, server.url)
    for port, (error, advice) in zip(report.ports, expected.items(), strict=True):
        assert (port.reachable, port.confirmed, port.error) == (False, False, error)
        assert port.advice
        assert port.advice.startswith(advice)


# Several servers


def test_servers_are_asked_side_by_side() -> None:
    asked_for_address, asked = threading.Barrier(2), threading.Barrier(2)

    def ip() -> Answer:
        asked_for_address.wait(10)
        return TELLS_IP

    def check_together(ports: list[int]) -> Answer:
        asked.wait(10)
        return connected(ports)

    with scripted(check_together, ip) as one, scripted(check_together, ip) as other:
        report = check(free_ports(2), one.url, other.url)
    assert [server.error for server in report.servers] == [None, None]
    assert report.reachable == 2


@pytest.mark.parametrize("first", ["reached", "refused"])
def test_one_server_that_reaches_a_port_is_enough(first: str) -> None:
    with scripted(connected) as lucky, scripted(refused) as unlucky:
        urls = [lucky.url, unlucky.url]
        if first == "refused":
            urls.reverse()
        (said,) = check(free_ports(1), *urls).ports
    assert (said.reachable, said.confirmed, said.error, said.advice) == (True, True, None, None)
    assert list(said.answers) == urls
    assert said.answers[lucky.url].accessible
    assert said.answers[unlucky.url].error == REFUSED


def test_a_server_that_fails_does_not_spoil_another() -> None:
    with scripted(lambda _: Answer(b"", 500)) as broken, scripted() as server:
        report = check(free_ports(2), broken.url, server.url)
    assert report.reachable == 2
    assert [said.asked for said in report.servers] == [False, True]
    assert report.servers[0].error == "its answer is no port checker's (HTTP status 500)"
    assert report.servers[1].error is None


def test_what_is_named_twice_counts_once() -> None:
    one, other = free_ports(2)
    with scripted() as server:
        report = check([other, one, other], server.url, server.url)
    assert server.asked == [[other, one]]
    assert [port.port for port in report.ports] == [other, one]
    assert len(report.servers) == 1
    assert (report.reachable, report.total) == (2, 2)


def test_without_a_server_nothing_is_known() -> None:
    report = check(free_ports(1))
    assert (report.ip, report.servers, report.reachable) == (None, [], 0)
    assert report.ports[0].local == "bound"
    assert report.ports[0].advice
    assert report.ports[0].advice.startswith(NOT_ASKED)


# Limits of the servers


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
    assert [port.port for port in report.ports] == ports
    assert report.servers[0].error is None
    taken = [asked for asked in server.asked if len(asked) <= 100]
    assert [port for asked in taken for port in asked] == ports
    sizes = [len(asked) for asked in server.asked]
    for number, size in enumerate(sizes):
        if size > 100:
            assert max(sizes[number + 1 :]) < size  # what was too many is not asked again
    assert sizes[-4:] == [len(asked) for asked in taken]  # nor anything once it is known


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
    assert report.servers[0].asked
    assert report.servers[0].error == "Sorry. (CHECK_FAILED)"
    for port in report.ports[2:]:
        assert port.advice
        assert port.advice.startswith(NOT_ASKED)


def test_retry_after_is_honoured() -> None:
    def busy_at_first(code: ErrorCode) -> Callable[[list[int]], Answer]:
        answers = iter([refusal(code, Retry_After="1")])

        def check_later(ports: list[int]) -> Answer:
            times.append(time.monotonic())
            return next(answers, None) or connected(ports)

        return check_later

    times: list[float] = []
    heard: list[str] = []
    ports = free_ports(1)
    with (
        scripted(busy_at_first(ErrorCode.RATE_LIMITED)) as limited,
        scripted(busy_at_first(ErrorCode.OVERLOADED)) as overloaded,
    ):
        urls = [limited.url, overloaded.url]
        report = asyncio.run(verify(ports, servers=urls, on_progress=heard.append))
    assert [server.error for server in report.servers] == [None, None]
    assert report.reachable == 1
    assert limited.asked == overloaded.asked == [ports, ports]
    first, second, third, fourth = times
    assert third - second >= 0.99
    assert fourth - first < 3  # they waited at the same time
    assert {f"{url} asks to wait 1 s" for url in urls} <= set(heard)


def test_an_overloaded_server_is_asked_for_fewer() -> None:
    ports = free_ports(4)

    def check_few(asked: list[int]) -> Answer:
        if len(asked) > 2:
            return refusal(ErrorCode.OVERLOADED, "At most 2 at once.", Retry_After="1")
        return connected(asked)

    with scripted(check_few) as server:
        assert check(ports, server.url).reachable == 4
    assert server.asked == [ports, ports[:2], ports[2:]]


@pytest.mark.parametrize("code", [ErrorCode.RATE_LIMITED, ErrorCode.OVERLOADED])
@pytest.mark.parametrize(
    "seconds", ["100000", "121", "soon", "", "Wed, 21 Oct 2065 07:28:00 GMT", "9" * 5000]
)
def test_a_wait_without_end_or_sense_is_not_waited(code: ErrorCode, seconds: str) -> None:
    with scripted(lambda _: refusal(code, "Come later.", Retry_After=seconds)) as server:
        started = time.monotonic()
        assert error_of(server.url) == f"Come later. ({code})"
        assert time.monotonic() - started < 5
    assert len(server.asked) == 1


@pytest.mark.parametrize("seconds", ["0", "-1"])
def test_a_server_that_asks_to_wait_for_nothing_is_not_hammered(seconds: str) -> None:
    async def check_for_a_second(url: str) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                await verify(free_ports(1), servers=[url], ip="127.0.0.1")

    with scripted(lambda _: refusal(ErrorCode.RATE_LIMITED, Retry_After=seconds)) as server:
        asyncio.run(check_for_a_second(server.url))
    assert len(server.asked) <= 5


# Servers that cannot be asked


@pytest.mark.parametrize(
    "code", [ErrorCode.CHECK_FAILED, ErrorCode.TARGET_NOT_ALLOWED, ErrorCode.INTERNAL_ERROR]
)
def test_a_server_that_says_why_it_does_not_check(code: ErrorCode) -> None:
    with scripted(lambda _: refusal(code, "It cannot be.")) as server:
        assert error_of(server.url) == f"It cannot be. ({code})"
    assert len(server.asked) == 1


@pytest.mark.parametrize("ip", [None, "127.0.0.1"])
def test_a_server_that_is_down(ip: str | None) -> None:
    with refused_port() as port:
        assert error_of(f"http://127.0.0.1:{port}", ip) == f"it cannot be reached: {REFUSED}"


@pytest.mark.parametrize("ip", [None, "127.0.0.1"])
def test_a_server_that_resets_the_connection(ip: str | None) -> None:
    def reset(connection: socket.socket) -> None:
        connection.recv(1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()

    with raw_server(reset) as url:
        assert error_of(url, ip) == "it cannot be reached: Connection reset by peer"


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
        assert error_of(url).startswith("it cannot be talked to: ")


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
    assert error == "TLS fails: self-signed certificate"
    assert server.asked == []


def test_a_server_without_tls() -> None:
    with scripted() as server:
        assert error_of(server.url.replace("http:", "https:")).startswith("TLS fails: ")


NO_SUCH_NAME_SCRIPT = """
import asyncio
from port_checker.provider import verify
for ip in (None, "127.0.0.1"):
    url = "http://checker.invalid"
    (server,) = asyncio.run(verify([20000], servers=[url], ip=ip)).servers
    print(server.asked, server.error)
"""


@needs_root
def test_a_server_whose_name_is_unknown() -> None:
    for line in in_namespace(NO_SUCH_NAME_SCRIPT).splitlines():
        assert line.startswith("False its name cannot be resolved: ")


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http://[::1",
        "http://127.0.0.1:abc",
        "http://127.0.0.1:70000",
        "http://127.0.0.1:1/\n",
        "127.0.0.1:1",
    ],
)
def test_a_url_that_is_none(url: str) -> None:
    assert error_of(url)


NONSENSE = {
    "html": Answer(b"<html><title>Welcome to nginx!</title></html>"),
    "empty": Answer(b""),
    "no content": Answer(b"", 204),
    "moved": Answer(b"", 302, {"Location": "http://127.0.0.1:1/"}),
    "moved for good": Answer(b"", 301, {"Location": "/check-ports"}),
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
def test_an_answer_that_is_no_port_checkers(what: str) -> None:
    answer = NONSENSE[what]
    with scripted(lambda _: answer) as server:
        error = error_of(server.url)
    assert error == f"its answer is no port checker's (HTTP status {answer.status})"
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
def test_an_answer_for_other_ports_counts_for_none(
    alter: Callable[[list[int]], list[int]],
) -> None:
    ports = free_ports(2)
    with scripted(lambda asked: accessible(alter(asked))) as server:
        report = check(ports, server.url)
    assert report.servers[0].error == "it answered for other ports than it was asked about"
    assert report.reachable == 0
    assert not any(port.answers for port in report.ports)


@pytest.mark.parametrize("path", ["/ip", "/check-ports"])
def test_an_answer_without_end(path: str) -> None:
    endless = Answer(b" " * (16 * 1024 * 1024))
    with scripted(lambda _: endless, endless) as server:
        error = error_of(server.url, None if path == "/ip" else "127.0.0.1")
    assert error == "its answer has no end: is it a port checker?"


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
    with scripted(ip=UNKNOWING[what]) as server:
        error = error_of(server.url, ip=None)
    assert error.endswith(": give it with --ip")
    assert server.asked == []


@pytest.mark.parametrize("what", UNKNOWING)
def test_it_is_asked_when_the_address_is_given(what: str) -> None:
    with scripted(ip=UNKNOWING[what]) as server:
        report = check(free_ports(1), server.url, ip="127.0.0.1")
    assert report.reachable == 1
    assert report.servers[0].error is None


@pytest.mark.parametrize("what", UNKNOWING)
def test_it_is_asked_when_another_server_tells_the_address(what: str) -> None:
    with scripted(ip=UNKNOWING[what]) as server, scripted() as another:
        report = check(free_ports(1), server.url, another.url)
    assert [(said.asked, said.error) for said in report.servers] == [(True, None)] * 2
    assert server.addresses == another.addresses == [report.ip] == ["127.0.0.1"]


@pytest.mark.parametrize("ip", ["localhost", "127.0.0.1:80", "fe80::1%lo", "\x1b[2J"])
def test_an_address_that_is_none(ip: str) -> None:
    with scripted(ip=Answer({"ip": ip})) as server:
        assert error_of(server.url, ip=None) == "it tells an address that is none"
    assert server.asked == []


@pytest.mark.parametrize("answer", [Answer(b"<html>"), Answer({}), Answer({"ip": 7}), Answer([])])
def test_no_address_at_all(answer: Answer) -> None:
    with scripted(ip=answer) as server:
        error = error_of(server.url, ip=None)
    assert error == "its answer is no port checker's (HTTP status 200)"


def test_an_error_instead_of_the_address() -> None:
    with scripted(ip=refusal(ErrorCode.INTERNAL_ERROR, "A bug.")) as server:
        assert error_of(server.url, ip=None) == "A bug. (INTERNAL_ERROR)"


def test_a_server_that_failed_to_tell_the_address_is_not_asked_again() -> None:
    with scripted(ip=Answer(b"<html>")) as stranger, scripted() as server:
        report = check(free_ports(1), stranger.url, server.url)
    assert report.reachable == 1
    assert [said.asked for said in report.servers] == [False, True]
    assert stranger.asked == []


# What the caller does wrong, and what is left behind


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_a_port_that_is_none(port: int) -> None:
    with scripted() as server, pytest.raises(ValueError, match=f"{port} is not a port"):
        check([*free_ports(1), port], server.url)
    assert server.asked == []


@pytest.mark.parametrize("ip", ["localhost", "127.0.0.1:80", "127.0.0.01", "fe80::1%lo"])
def test_an_ip_that_is_none(ip: str) -> None:
    with scripted() as server, pytest.raises(ValueError, match="address"):
        check(free_ports(1), server.url, ip=ip)
    assert server.asked == []


def test_cancelling_closes_the_listeners_at_once() -> None:
    ports = free_ports(20)
    asked, done = threading.Event(), threading.Event()

    def never(_: list[int]) -> Answer:
        asked.set()
        done.wait(30)
        return Answer(b"")

    async def cancel_in_the_middle(url: str) -> None:
        task = asyncio.create_task(verify(ports, servers=[url]))
        await asyncio.to_thread(asked.wait, 30)
        assert all(map(is_listened_on, ports))
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert task.cancelled()
        assert not any(map(is_listened_on, ports))
        assert asyncio.all_tasks() == {asyncio.current_task()}

    with scripted(never) as server:
        try:
            asyncio.run(cancel_in_the_middle(server.url))
        finally:
            done.set()


def test_nothing_is_left_behind() -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    async def check_all(urls: list[str]) -> None:
        before = descriptors()
        report = await verify(free_ports(50), servers=urls)
        assert report.reachable == 50
        # The servers' ends are in this process, too, and close a moment later.
        await asyncio.to_thread(wait_until, lambda: descriptors() <= before)
        async with asyncio.timeout(10):  # an answer that was not read to its end closes in turn
            while asyncio.all_tasks() != {asyncio.current_task()}:
                await asyncio.sleep(0)

    endless = Answer(b" " * (8 * 1024 * 1024))
    with (
        scripted() as server,
        scripted(lambda _: endless) as babbler,
        scripted(lambda _: Answer(b"<html>")) as stranger,
        refused_port() as down,
    ):
        urls = [server.url, babbler.url, stranger.url, f"http://127.0.0.1:{down}"]
        urls.append(server.url.replace("http:", "https:"))
        gc.collect()  # what earlier tests left
        asyncio.run(check_all(urls))


# Listeners


@pytest.mark.parametrize(
    ("ip_version", "hosts"), [(4, ["127.0.0.1", "127.9.9.9"]), (6, ["::1"])], ids=["IPv4", "IPv6"]
)
def test_listeners_are_on_all_addresses_and_see_who_connects(
    ip_version: int, hosts: list[str]
) -> None:
    quiet, *ports = free_ports(1 + len(hosts))

    async def listen() -> None:
        with Listeners([quiet, *ports], ip_version) as listeners:
            assert set(listeners.local.values()) == {"bound"}
            assert listeners.seen == set()
            for host, port in zip(hosts, ports, strict=True):
                await asyncio.to_thread(is_listened_on, port, host)
            await listeners.wait_until_seen(ports, 10)
            assert listeners.seen == set(ports)
        assert not any(is_listened_on(port, hosts[0]) for port in (quiet, *ports))

    asyncio.run(listen())


def test_listeners_of_one_family_leave_the_other_alone() -> None:
    (port,) = free_ports(1)

    async def listen() -> None:
        for ip_version, other in (4, "::1"), (6, "127.0.0.1"):
            with Listeners([port], ip_version) as listeners, open_listener(other, port):
                assert listeners.local == {port: "bound"}

    asyncio.run(listen())


def test_waiting_to_see_ends_when_the_time_is_up() -> None:
    one, other = free_ports(2)

    async def listen() -> None:
        with Listeners([one, other], 4) as listeners:
            await asyncio.to_thread(is_listened_on, one)
            started = time.monotonic()
            await listeners.wait_until_seen([one, other], 0.2)
            assert 0.19 <= time.monotonic() - started < 5
            assert listeners.seen == {one}
            await listeners.wait_until_seen([], 60)
            await listeners.wait_until_seen([one], 60)

    asyncio.run(asyncio.wait_for(listen(), 30))


def test_listeners_close_whatever_happens() -> None:
    ports = free_ports(3)

    async def fail() -> None:
        with Listeners(ports, 4):
            assert all(map(is_listened_on, ports))
            raise LookupError

    with pytest.raises(LookupError):
        asyncio.run(fail())
    assert not any(map(is_listened_on, ports))


def test_ports_are_free_again_at_once() -> None:
    (port,) = free_ports(1)

    async def listen() -> None:
        with Listeners([port], 4) as listeners:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            # The listener closes first, so that the connection stays in TIME_WAIT at this port.
            assert await reader.read() == b""
            writer.close()
            await writer.wait_closed()
            assert listeners.seen == {port}
        with Listeners([port], 4) as listeners:
            assert listeners.local == {port: "bound"}

    asyncio.run(listen())


OUT_OF_FILES_SCRIPT = """
import asyncio, resource, sys
from port_checker.provider import verify
from port_checker.provider.listeners import Listeners
ports = [int(word) for word in sys.argv[2:]]

async def listen():
    used = len(__import__("os").listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 5, used + 5))
    with Listeners(ports, 4) as listeners:
        return listeners.local
print(*asyncio.run(listen()).values(), sep=",")
"""


def test_out_of_files_is_said_of_the_ports_that_it_concerns() -> None:
    words = [sys.executable, "-c", OUT_OF_FILES_SCRIPT, "ports", *map(str, free_ports(20))]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    local = done.stdout.strip().split(",")
    assert len(local) == 20
    assert set(local) == {"bound", "failed"}


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_handshake_that_does_not_end_is_half_open(host: str) -> None:
    def port_is_half_open() -> bool:
        return port in half_open_ports()

    with open_listener(host) as listener:
        port = listener.getsockname()[1]
        # The kernel ignores the end of a handshake until there are data, or the time is up.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 30)
        assert not port_is_half_open()
        with socket.create_connection((host, port), 5) as client:
            assert port_is_half_open()
            client.sendall(b"data")
            listener.accept()[0].close()
            assert not port_is_half_open()
