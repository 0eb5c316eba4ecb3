"""Replay what golem-vm-provider asks, through the set-ups that docs/golem-provider.md shows.

recorded/ has the requests of its versions, byte for byte. A provider at PROVIDER sends them.
"""

import json
import os
import re
import socket
import ssl
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
import trustme

from port_checker.settings import load_settings
from tests.support.loopback import is_listened_on, open_listener
from tests.support.namespace import ROOT, loopback_alone, needs_root
from tests.support.proxies import needs_proxies, nginx_of
from tests.support.service import serve
from tests.support.tls import answering, endpoint, https

PROVIDER = "203.0.113.7"
DISCOVERY = "203.0.113.1"
CHECKER = "203.0.113.2"

PAGE = (ROOT / "docs" / "golem-provider.md").read_text()
VM_PORTS = range(50800, 50900)


def blocks(language: str) -> list[str]:
    """The page's code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


TO_DISCOVERY, TO_CHECKER = blocks("nginx")
PROFILE_OF_8_SECONDS, PROFILE_OF_5_SECONDS = (
    dict(line.split("=") for line in block.splitlines())
    for block in blocks("bash")
    if "PORT_CHECK_RETRIES" in block
)


@dataclass(frozen=True)
class Recording:
    """What a version of the software asks.

    Attributes:
        seconds: How long it waits for an answer.
        at_a_time: How many requests it makes at a time.
        headers: Its header fields.
        requests: The path and body of each.
    """

    seconds: float
    at_a_time: int
    headers: dict[str, str]
    requests: list[tuple[str, str]]

    @classmethod
    def named(cls, name: str) -> Self:
        recorded = json.loads((Path(__file__).parent / "recorded" / f"{name}.json").read_text())
        return cls(
            recorded["seconds"],
            recorded["at_a_time"],
            recorded["headers"],
            [(request["path"], request["body"]) for request in recorded["requests"]],
        )

    def asking(self, port: int, other: int) -> Self:
        """The same with another port in the place of one."""
        requests = [(path, body.replace(str(port), str(other))) for path, body in self.requests]
        assert requests != self.requests
        return replace(self, requests=requests)

    def replay(self, url: str) -> list[httpx.Response]:
        """Send all requests from the provider's address; return the answers in their order."""
        with (
            httpx.Client(
                transport=httpx.HTTPTransport(
                    local_address=PROVIDER,
                    verify=ssl.create_default_context(cafile=os.environ["SSL_CERT_FILE"]),
                ),
                headers=self.headers,
                timeout=self.seconds,
            ) as client,
            ThreadPoolExecutor(self.at_a_time) as pool,
        ):

            def send(request: tuple[str, str]) -> httpx.Response:
                path, body = request
                return client.post(f"{url.rstrip('/')}{path}", content=body)

            return list(pool.map(send, self.requests))


NEWEST = Recording.named("newest")
PORT_BY_PORT = Recording.named("port-by-port")
ON_PYPI = Recording.named("0.1.63")


@dataclass(frozen=True)
class Outcome:
    """What the software makes of answers: which ports are accessible, and the TLS verdicts."""

    accessible: dict[int, bool]
    valid: list[Any]

    @classmethod
    def of(cls, answers: list[httpx.Response]) -> Self:
        documents = [answer.raise_for_status().json() for answer in answers]
        results = [document["results"] for document in documents if "results" in document]
        return cls(
            {int(port): bool(of[port].get("accessible")) for of in results for port in of},
            [document["valid"] for document in documents if "valid" in document],
        )


ALL_WELL = Outcome(dict.fromkeys([80, 443, *VM_PORTS], True), [True])


@pytest.fixture
def provider(authority: trustme.CA) -> Iterator[ExitStack]:
    """A machine that listens on all its ports; what is entered in the stack is in its network."""
    addresses = [f"ip address add {ip} dev lo" for ip in (PROVIDER, DISCOVERY, CHECKER)]
    with loopback_alone(*addresses), ExitStack() as stack:
        for port in (80, *VM_PORTS):
            stack.enter_context(open_listener(PROVIDER, port))
        stack.enter_context(https(authority.issue_cert(PROVIDER), PROVIDER, 443))
        yield stack


def certified(authority: trustme.CA, name: str, directory: Path) -> dict[str, str]:
    """What stands in a recipe for the certificate's files, and the files."""
    certificate = authority.issue_cert(name)
    chain, key = directory / f"{name}.pem", directory / f"{name}.key"
    certificate.cert_chain_pems[0].write_to_path(str(chain))
    certificate.private_key_pem.write_to_path(str(key))
    return {"/etc/ssl/discovery.pem": str(chain), "/etc/ssl/discovery.key": str(key)}


def with_replaced(text: str, replacements: dict[str, str]) -> str:
    for old, new in replacements.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


def url_of(service: httpx.Client) -> str:
    return str(service.base_url)


def listens(host: str, port: int) -> Callable[[], bool]:
    return lambda: is_listened_on(port, host)


@contextmanager
def tls_front(name: str, host: str, authority: trustme.CA, directory: Path) -> Iterator[None]:
    """The recipe for the origin of a discovery service, on port 443 of an address."""
    replacements = {"listen 443": f"listen {host}:443", **certified(authority, name, directory)}
    with nginx_of(directory, with_replaced(TO_DISCOVERY, replacements), listens(host, 443)):
        yield


pytestmark = [needs_root, needs_proxies]


def test_newest_asks_the_origin_of_its_discovery_service(
    provider: ExitStack, authority: trustme.CA, tmp_path: Path
) -> None:
    provider.enter_context(serve(on_port=9000))
    provider.enter_context(tls_front(DISCOVERY, DISCOVERY, authority, tmp_path))
    assert Outcome.of(NEWEST.replay(f"https://{DISCOVERY}")) == ALL_WELL


def test_discovery_keeps_its_websocket(
    provider: ExitStack, authority: trustme.CA, tmp_path: Path
) -> None:
    switch = (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
    )
    received: list[bytes] = []

    def discovery(connection: socket.socket) -> None:
        received.append(connection.recv(1000, socket.MSG_PEEK))
        answering(switch + b"hello")(connection)

    provider.enter_context(endpoint(discovery, port=9001))
    provider.enter_context(tls_front(DISCOVERY, DISCOVERY, authority, tmp_path))
    context = ssl.create_default_context(cafile=os.environ["SSL_CERT_FILE"])
    with (
        socket.create_connection((DISCOVERY, 443), timeout=60) as plain,
        context.wrap_socket(plain, server_hostname=DISCOVERY) as connection,
    ):
        connection.sendall(
            b"GET /api/v1/discovery/providers HTTP/1.1\r\nHost: x\r\n"
            b"Upgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
        )
        answer = b""
        while not answer.endswith(b"hello"):
            data = connection.recv(1000)
            assert data, answer
            answer += data
    assert answer.startswith(b"HTTP/1.1 101 ")
    assert b"\r\nUpgrade: websocket\r\n" in received[0]


def test_newest_learns_which_port_is_closed(provider: ExitStack) -> None:
    service = provider.enter_context(serve())
    accessible = Outcome.of(NEWEST.asking(50899, 50900).replay(url_of(service))).accessible
    assert [port for port in accessible if not accessible[port]] == [50900]


def test_port_by_port_fits_the_default_limits(provider: ExitStack) -> None:
    service = provider.enter_context(serve())
    assert Outcome.of(PORT_BY_PORT.replay(url_of(service))) == ALL_WELL


def test_0_1_63_asks_another_server_through_its_own_machine(
    provider: ExitStack, authority: trustme.CA, tmp_path: Path
) -> None:
    provider.enter_context(serve(on_port=9100))
    elsewhere = TO_DISCOVERY.replace("127.0.0.1:9000", "127.0.0.1:9100")
    files = certified(authority, "checker.example", tmp_path)
    front = with_replaced(elsewhere, {"listen 443": f"listen {CHECKER}:443", **files})
    provider.enter_context(nginx_of(tmp_path, front, listens(CHECKER, 443)))
    # No name leads anywhere here, and each connection has a choice of addresses to come from.
    network = f"upstream checker.example {{ server {CHECKER}:443; }} proxy_bind {PROVIDER};"
    authorities = {"/etc/ssl/certs/ca-certificates.crt": os.environ["SSL_CERT_FILE"]}
    forward = network + with_replaced(TO_CHECKER, authorities)
    provider.enter_context(nginx_of(tmp_path, forward, listens("127.0.0.1", 9000)))

    with httpx.Client(timeout=ON_PYPI.seconds, headers=ON_PYPI.headers) as client:
        ((path, body),) = ON_PYPI.requests
        answer = client.post(f"http://localhost:9000{path}", content=body)
    assert Outcome.of([answer]) == Outcome(dict.fromkeys(VM_PORTS, True), [])


@pytest.mark.parametrize(
    ("profile", "patience"),
    [
        (PROFILE_OF_8_SECONDS, NEWEST.seconds),
        (PROFILE_OF_8_SECONDS, PORT_BY_PORT.seconds),
        (PROFILE_OF_5_SECONDS, 5),
        ({}, ON_PYPI.seconds),
    ],
)
def test_every_version_waits_longer_than_a_check_takes(
    profile: dict[str, str], patience: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in profile.items():
        monkeypatch.setenv(name, value)
    assert load_settings().longest_check + 1 < patience  # for the way, and for several places


def test_newest_knows_a_staging_certificate_by_the_words(provider: ExitStack) -> None:
    service = provider.enter_context(serve())
    certificate = trustme.CA().issue_cert(PROVIDER)
    provider.enter_context(https(certificate, PROVIDER, 8443))
    _, answer, _ = NEWEST.asking(443, 8443).replay(url_of(service))
    verdict = answer.raise_for_status().json()
    assert not verdict["valid"]
    assert "unable to get local issuer certificate" in verdict["error"].lower()


def test_newest_shows_the_detail_of_an_error(provider: ExitStack) -> None:
    service = provider.enter_context(serve(caller_rate_limit="2/hour"))
    *_, answer = NEWEST.replay(url_of(service))
    assert answer.status_code == 429
    assert str(answer.json()["detail"]).startswith("{'code': 'RATE_LIMITED', 'message': '")
