"""The service behind a real nginx or HAProxy: configured well, chained, and configured badly.

They connect to the service from 127.0.0.1, which is trusted by default. Their clients come from
127.0.0.2, which is not trusted, and stands for the outside.
"""

import json
import re
import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from port_checker.api.app import create_app
from port_checker.metrics import CheckOutcome, Metrics, Totals
from port_checker.settings import Settings
from tests.support.checkers import HeldChecker
from tests.support.http import HEALTH, Headers, client_of, read_answer
from tests.support.loopback import open_port
from tests.support.namespace import ROOT, loopback_alone, needs_root
from tests.support.proxies import (
    CADDY_AUTHORITY,
    CADDY_NAME,
    as_shipped,
    haproxy,
    needs_proxies,
    nginx,
)
from tests.support.service import passing, program, serve
from tests.support.waiting import wait_until

pytestmark = needs_proxies

OUTSIDE = "127.0.0.2"
OUTER_NGINX = "127.0.0.3"

FORWARDS = "proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;"  # as in the docs


@contextmanager
def outsider(port: int, address: str = OUTSIDE, headers: Headers = ()) -> Iterator[httpx.Client]:
    """A client that connects to a port from a given address."""
    with client_of(f"http://127.0.0.1:{port}", address, headers) as client:
        yield client


def ip(client: httpx.Client) -> str | None:
    """The caller's address, as the service sees it."""
    caller: str | None = client.get("/ip").raise_for_status().json()["ip"]
    return caller


def check(client: httpx.Client, target: str, port: int) -> str:
    """The message of a check's answer, or its error code."""
    answer = client.post("/check-ports", json={"provider_ip": target, "ports": [port]}).json()
    told: str = answer["detail"]["code"] if "detail" in answer else answer["message"]
    return told


ACCESSIBLE = "Successfully verified 1 out of 1 ports"

FORGED: list[Headers] = [
    {"X-Forwarded-For": "127.0.0.1"},
    {"X-Forwarded-For": "127.0.0.1, 127.0.0.1"},
    {"X-Forwarded-For": "203.0.113.7, 127.0.0.1"},
    {"X-Forwarded-For": "::1"},
    {"X-Forwarded-For": "nonsense"},
    {"X-Forwarded-For": ""},
    {"X-Forwarded-For": ","},
    [("X-Forwarded-For", "127.0.0.1"), ("X-Forwarded-For", "127.0.0.1")],
    [("X-Forwarded-For", "127.0.0.1"), ("x-forwarded-for", "10.0.0.1,")],
    {"X_Forwarded_For": "127.0.0.1"},
    {"X-Real-IP": "127.0.0.1", "Forwarded": "for=127.0.0.1", "Via": "1.1 x"},
]


def test_the_caller_is_the_client_of_nginx_whatever_that_claims(tmp_path: Path) -> None:
    with (
        serve(caller_rate_limit="off") as service,
        nginx(tmp_path, service.base_url.port or 0, FORWARDS) as proxied,
        open_port(OUTSIDE) as opened,
    ):
        for port in proxied, service.base_url.port or 0:
            for headers in FORGED:
                with outsider(port, headers=headers) as client:
                    assert ip(client) == OUTSIDE, headers
                    # A proxy's fields from an address of this machine show that it relays others.
                    own = ACCESSIBLE if port == proxied else "TARGET_NOT_ALLOWED"
                    assert check(client, OUTSIDE, opened) == own, headers
                    assert check(client, "127.0.0.1", opened) == "TARGET_NOT_ALLOWED", headers


@pytest.mark.parametrize("by", ["the service", "systemd"])
def test_an_nginx_on_a_unix_socket_is_trusted(by: str, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    command = passing("socket.AF_UNIX", repr(str(path))) if by == "systemd" else []
    host = "192.0.2.7" if by == "systemd" else f"unix:{path}"  # the first cannot be bound
    with (
        program(
            *command, ready=False, PORT_CHECKER_TRUSTED_PROXIES="", PORT_CHECKER_HOST=host
        ) as running,
        open_port(OUTSIDE) as opened,
    ):
        wait_until(path.exists, "its socket")
        with nginx(tmp_path, path, FORWARDS) as port:
            for headers in FORGED:
                with outsider(port, headers=headers) as client:
                    assert ip(client) == OUTSIDE, headers
                    assert check(client, OUTSIDE, opened) == ACCESSIBLE, headers
                    assert check(client, "127.0.0.1", opened) == "TARGET_NOT_ALLOWED", headers
        assert running.stop() == 0
    assert f"Listening on unix:{path};" in running.lines[0]


def test_a_limit_is_each_clients_own(tmp_path: Path) -> None:
    with (
        serve(caller_rate_limit="1/hour") as service,
        nginx(tmp_path, service.base_url.port or 0, FORWARDS) as port,
        open_port(OUTSIDE) as opened,
    ):
        with outsider(port) as client:
            assert check(client, OUTSIDE, opened) == ACCESSIBLE
            assert check(client, OUTSIDE, opened) == "RATE_LIMITED"
        with outsider(port, "127.0.0.4") as client:
            assert check(client, OUTSIDE, opened) == "TARGET_NOT_ALLOWED"


def test_two_nginxes_in_a_row(tmp_path: Path) -> None:
    for trusted, caller in (
        (f"127.0.0.1,{OUTER_NGINX}", OUTSIDE),
        ("127.0.0.1", OUTER_NGINX),  # what an untrusted proxy forwards does not count
    ):
        with (
            serve(trusted_proxies=trusted) as service,
            nginx(tmp_path, service.base_url.port or 0, FORWARDS) as inner,
            nginx(tmp_path, inner, FORWARDS, f"proxy_bind {OUTER_NGINX};") as outer,
        ):
            for headers in {}, {"X-Forwarded-For": f"127.0.0.1, {OUTER_NGINX}"}:
                with outsider(outer, headers=headers) as client:
                    assert ip(client) == caller, headers


@pytest.mark.parametrize(
    ("directive", "caller"),
    [
        # It shows itself, but not its client: the caller is unknown.
        ("proxy_set_header X-Real-IP $remote_addr;", None),
        ('proxy_set_header Via "1.1 nginx";', None),
        ('proxy_set_header Forwarded "for=$remote_addr";', None),
        # Nothing shows that it is a proxy: it is taken for the caller, as the docs warn.
        ("", "127.0.0.1"),
    ],
)
def test_an_nginx_that_forwards_no_address(
    tmp_path: Path, directive: str, caller: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        serve() as service,
        nginx(tmp_path, service.base_url.port or 0, directive) as port,
        outsider(port) as client,
    ):
        for _ in range(3):
            assert ip(client) == caller
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == (0 if caller else 1)


def test_an_nginx_that_is_not_trusted_is_the_caller(tmp_path: Path) -> None:
    with (
        serve(trusted_proxies="") as service,
        nginx(tmp_path, service.base_url.port or 0, FORWARDS) as port,
        outsider(port, headers={"X-Forwarded-For": "203.0.113.7"}) as client,
    ):
        assert ip(client) == "127.0.0.1"


UPGRADES = (
    "proxy_http_version 1.1; proxy_request_buffering off;"
    "proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection $http_connection;"
)


def test_what_nginx_upgrades_smuggles_no_request(tmp_path: Path) -> None:
    smuggled = b"GET /ip HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: 203.0.113.7\r\n\r\n"
    head = (
        b"POST /check-ports HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n"
        b"Content-Length: %d\r\n\r\n" % len(smuggled)
    )
    with (
        serve(caller_rate_limit="off") as service,
        nginx(tmp_path, service.base_url.port or 0, FORWARDS, UPGRADES) as port,
        outsider(port) as visitor,
    ):
        for segments in [head + smuggled], [head, smuggled], [head, smuggled[:9], smuggled[9:]]:
            with socket.create_connection(
                ("127.0.0.1", port), 60, source_address=(OUTSIDE, 0)
            ) as sock:
                for segment in segments:
                    sock.sendall(segment)
                    assert ip(visitor) == OUTSIDE  # and nginx has passed the segment on
                assert read_answer(sock)[0].startswith(b"HTTP/1.1 422 ")
                sock.sendall(HEALTH)
                assert read_answer(sock)[1] == b'{"status":"ok"}'


def test_a_trailer_that_haproxy_forwards_names_nobody(tmp_path: Path) -> None:
    elsewhere = "127.0.0.9"
    with (
        serve() as service,
        haproxy(tmp_path, service.base_url.port or 0) as port,
        open_port(elsewhere) as opened,
        socket.create_connection(("127.0.0.1", port), 60, source_address=(OUTSIDE, 0)) as sock,
    ):
        body = json.dumps({"provider_ip": elsewhere, "ports": [opened]}).encode()
        sock.sendall(
            b"POST /check-ports HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
            b"Trailer: X-Forwarded-For\r\n\r\n"
            b"%x\r\n%b\r\n0\r\nX-Forwarded-For: %b\r\n\r\n" % (len(body), body, elsewhere.encode())
        )
        assert b"TARGET_NOT_ALLOWED" in read_answer(sock)[1]


NAMED = (
    "proxy_set_header Host {};"  # what nginx sends of itself, for an upstream block of that name
)
PAGE = {"Origin": "http://checker.example", "Host": "checker.example"}


@pytest.mark.parametrize(
    ("directives", "outcome"),
    [
        ((FORWARDS, NAMED.format("port_checker")), ACCESSIBLE),
        ((FORWARDS, NAMED.format("$http_host")), ACCESSIBLE),
        ((FORWARDS, NAMED.format("checker.internal")), "CROSS_ORIGIN"),
        (
            (
                FORWARDS,
                NAMED.format("checker.internal"),
                "proxy_set_header X-Forwarded-Host $http_host;",
            ),
            ACCESSIBLE,
        ),
    ],
)
def test_the_own_page_behind_an_nginx_that_calls_the_service_by_another_name(
    tmp_path: Path, directives: tuple[str, ...], outcome: str
) -> None:
    with (
        serve(retries=1) as service,
        nginx(tmp_path, service.base_url.port or 0, *directives) as port,
        open_port(OUTSIDE) as opened,
    ):
        with outsider(port, headers=PAGE) as visitor:
            assert check(visitor, OUTSIDE, opened) == outcome
        with outsider(port, headers=PAGE | {"Origin": "http://other.example"}) as other:
            named = "port_checker" in directives[1]  # which tells nothing of the browser's Host
            assert check(other, OUTSIDE, opened) == (ACCESSIBLE if named else "CROSS_ORIGIN")


def test_a_relay_on_this_machine_hides_its_callers_from_the_first_that_shows(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As the port handler of rootless podman is one: from an address of this machine's own."""
    with serve(trusted_proxies="", retries=1) as service, open_port(OUTSIDE) as opened:
        port = service.base_url.port or 0
        with outsider(port) as local:
            assert check(local, OUTSIDE, opened) == ACCESSIBLE
            with outsider(port, headers={"Host": "203.0.113.1:9000"}) as stranger:
                for _ in range(3):
                    assert check(stranger, OUTSIDE, opened) == "TARGET_NOT_ALLOWED"
            assert check(local, OUTSIDE, opened) == "TARGET_NOT_ALLOWED"
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1


@needs_root
@pytest.mark.parametrize("name", ["nginx.conf", "haproxy.cfg"])
def test_what_operators_copy_works_as_it_stands(name: str, tmp_path: Path) -> None:
    with (
        loopback_alone(),  # with the ports of the files, which nobody else has there
        serve(on_port=9000),
        as_shipped(ROOT / "contrib" / name, tmp_path),
        open_port(OUTSIDE) as opened,
    ):
        for headers in FORGED:
            with outsider(80, headers=headers) as client:
                assert ip(client) == OUTSIDE, headers
                assert check(client, OUTSIDE, opened) == ACCESSIBLE
        with client_of("http://[::1]:80") as client:
            client.get("/health").raise_for_status()


def with_a_second_server(name: str, directory: Path) -> Path:
    """What operators copy, with the second server that it mentions on port 9001."""
    text = (ROOT / "contrib" / name).read_text()
    second = re.compile(r"# (server .*)192\.0\.2\.11:9000")
    assert second.search(text)
    file = directory / "two" / name
    file.parent.mkdir()
    file.write_text(second.sub(r"\g<1>127.0.0.1:9001", text))
    return file


@needs_root
def test_a_callers_503_takes_no_server_of_nginx_from_others(tmp_path: Path) -> None:
    with (
        loopback_alone(),
        serve(on_port=9000),
        serve(on_port=9001),
        as_shipped(with_a_second_server("nginx.conf", tmp_path), tmp_path),
        outsider(80) as client,
    ):
        for _ in range(2):
            assert check(client, "2001:4860::1", 80) == "CHECK_FAILED"  # there is no route to it
            client.get("/health").raise_for_status()


@needs_root
@pytest.mark.parametrize("name", ["nginx.conf", "haproxy.cfg"])
def test_a_server_that_is_away_costs_nobody_an_answer(name: str, tmp_path: Path) -> None:
    with (
        loopback_alone(),
        serve(on_port=9000),
        as_shipped(with_a_second_server(name, tmp_path), tmp_path),
        outsider(80) as client,
    ):
        for _ in range(4):
            client.get("/health").raise_for_status()


@needs_root
@pytest.mark.parametrize("name", ["nginx.conf", "haproxy.cfg", "Caddyfile"])
def test_ports_come_as_they_become_known_and_a_caller_that_leaves_ends_its_check(
    name: str, tmp_path: Path
) -> None:
    metrics, totals = Metrics(), Totals()
    totals.add(metrics.row)
    checker = HeldChecker()
    body = json.dumps({"provider_ip": OUTSIDE, "ports": [1, 2]})
    request = (
        f"POST /check-ports HTTP/1.1\r\nHost: {CADDY_NAME}\r\n"
        f"Accept: application/x-ndjson\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    )
    port = 443 if name == "Caddyfile" else 80
    patient = tmp_path / "patient" / name  # so that no other reason ends the check
    patient.parent.mkdir()
    patient.write_text((ROOT / "contrib" / name).read_text().replace("60s", "600s"))
    with (
        loopback_alone(),
        serve(create_app(Settings(), metrics, checker=checker), on_port=9000),
        as_shipped(patient, tmp_path),
        ExitStack() as stack,
    ):
        stack.callback(checker.may_go_on.set)
        sock = socket.create_connection(("127.0.0.1", port), 60, source_address=(OUTSIDE, 0))
        if port == 443:
            trusted = ssl.create_default_context(cafile=tmp_path / CADDY_AUTHORITY)
            sock = trusted.wrap_socket(sock, server_hostname=CADDY_NAME)
        with sock:
            sock.sendall(request.encode())
            answer = b""
            while b'"accessible":true' not in answer:
                received = sock.recv(4096)
                assert received, answer
                answer += received
        wait_until(
            lambda: totals.snapshot()["checks", CheckOutcome.CANCELLED] == 1, "the check to end"
        )


# The name that Caddy has a certificate for.
SNI = {"sni_hostname": CADDY_NAME}


@contextmanager
def outsider_of(name: str, directory: Path) -> Iterator[httpx.Client]:
    """A client of a proxy that runs with a file that operators copy."""
    if name != "Caddyfile":
        with outsider(80) as client:
            yield client
        return
    trusted = ssl.create_default_context(cafile=directory / CADDY_AUTHORITY)
    transport = httpx.HTTPTransport(local_address=OUTSIDE, verify=trusted)
    host = {"Host": CADDY_NAME}
    with httpx.Client(
        base_url="https://127.0.0.1", headers=host, transport=transport, timeout=60
    ) as client:
        yield client


@needs_root
def test_the_caddyfile_works_as_it_stands(tmp_path: Path) -> None:
    with (
        loopback_alone(),
        serve(on_port=9000),
        as_shipped(ROOT / "contrib" / "Caddyfile", tmp_path),
        outsider_of("Caddyfile", tmp_path) as client,
    ):
        for headers in FORGED:
            answer = client.get("/ip", headers=httpx.Headers(headers), extensions=SNI)
            assert answer.json() == {"ip": OUTSIDE}, headers
        assert client.get("/", extensions=SNI).status_code == 200


@needs_root
@pytest.mark.parametrize("name", ["nginx.conf", "haproxy.cfg", "Caddyfile"])
def test_a_server_whose_place_is_behind_a_proxy_names_its_callers(
    name: str, tmp_path: Path
) -> None:
    file = tmp_path / "place" / name
    file.parent.mkdir()
    text = (ROOT / "contrib" / name).read_text()
    file.write_text(text.replace("# trusted_proxies 192.0.2.10", f"trusted_proxies {OUTSIDE}"))
    caller = "192.0.2.1"
    with (
        loopback_alone(),
        serve(on_port=9000, trusted_proxies=f"127.0.0.1,{OUTSIDE}"),
        as_shipped(file, tmp_path),
        outsider_of(name, tmp_path) as server,
    ):
        answer = server.get("/ip", headers={"X-Forwarded-For": caller}, extensions=SNI)
        assert answer.json() == {"ip": caller}
