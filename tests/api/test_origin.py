"""Which requests come from another site's page: what browsers and programs send."""

import asyncio
import json
import socket
import time
from pathlib import Path

import pytest
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import Message

from port_checker.addresses import parse_networks
from port_checker.api.caller import CallerResolver
from port_checker.api.origin import AllowedHosts, CrossOrigin, local_names, require_same_origin
from port_checker.schemas import ERROR_EXAMPLES, ErrorCode
from tests.support.loopback import open_port
from tests.support.service import serve

PROXY = "192.0.2.1"
VISITOR = "203.0.113.7"
SITE = {"host": "checker.example"}


def refusal(peer: str | None, headers: dict[str, str]) -> str:
    """Why a request is refused; empty if it is not."""
    connection = HTTPConnection(
        {
            "type": "http",
            "client": (peer, 4711) if peer else None,
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }
    )
    caller = CallerResolver(parse_networks(f"127.0.0.1,::1,{PROXY}")).resolve(connection)
    try:
        require_same_origin(connection, caller, lambda: {"box", "box.lan"})
    except CrossOrigin as refusal:
        return str(refusal)
    return ""


def is_refused(peer: str | None, headers: dict[str, str]) -> bool:
    return bool(refusal(peer, headers))


@pytest.mark.parametrize(
    ("headers", "refused"),
    [
        # Programs send neither field.
        ({}, False),
        (SITE, False),
        ({"host": "203.0.113.1:9000", "user-agent": "golem"}, False),
        # Browsers tell by Sec-Fetch-Site, whatever else they send.
        (SITE | {"sec-fetch-site": "cross-site"}, True),
        (SITE | {"sec-fetch-site": "same-site"}, True),
        (SITE | {"sec-fetch-site": "cross-site", "origin": "http://checker.example"}, True),
        (SITE | {"sec-fetch-site": "same-origin", "origin": "http://other.example"}, False),
        (SITE | {"sec-fetch-site": "none", "origin": "null"}, False),
        # And over plain HTTP by Origin.
        (SITE | {"origin": "http://checker.example"}, False),
        (SITE | {"origin": "https://CHECKER.example:8443"}, False),
        ({"host": "Checker.Example.:9000", "origin": "http://checker.example"}, False),
        ({"host": "[2001:db8::1]:9000", "origin": "http://[2001:db8::1]:9000"}, False),
        ({"host": "203.0.113.1", "origin": "http://203.0.113.1:80"}, False),
        (SITE | {"origin": "null"}, True),
        (SITE | {"origin": ""}, True),
        (SITE | {"origin": "checker.example"}, True),
        (SITE | {"origin": "http://other.example"}, True),
        (SITE | {"origin": "http://checker.example.other.example"}, True),
        (SITE | {"origin": "http://sub.checker.example"}, True),
        ({"host": "[2001:db8::1]:9000", "origin": "http://[2001:db8::2]:9000"}, True),
        ({"host": "203.0.113.1", "origin": "http://other.example"}, True),
        ({"origin": "http://other.example"}, True),
    ],
)
def test_what_callers_send(headers: dict[str, str], refused: bool) -> None:
    assert is_refused(VISITOR, headers) is refused
    forwarded = headers | {"x-forwarded-for": VISITOR}
    if headers.get("host") == "checker.example":  # the same through a proxy that passes Host on
        assert is_refused(PROXY, forwarded) is refused
        assert is_refused("127.0.0.1", forwarded) is refused


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1:9000", "localhost", "[::1]:9000", "10.1.2.3", None),
        *("port_checker", "backend:9000"),  # an upstream block, a service of a container network
    ],
)
def test_a_proxy_that_does_not_pass_host_on(host: str | None) -> None:
    """The default of nginx: Host is then the service's address, or what nginx calls it."""
    forwarded = {"x-forwarded-for": VISITOR, "origin": "https://checker.example"}
    if host:
        forwarded["host"] = host
    assert not is_refused(PROXY, forwarded)
    assert is_refused(VISITOR, forwarded)  # which is not a proxy
    assert is_refused(PROXY, forwarded | {"origin": "null"})
    assert is_refused(PROXY, forwarded | {"sec-fetch-site": "cross-site"})
    assert is_refused(PROXY, forwarded | {"host": "other.example"})


@pytest.mark.parametrize("host", ["127.0.0.1:9000", "port_checker", "checker.internal", None])
@pytest.mark.parametrize(
    ("forwarded_host", "refused"),
    [
        ("checker.example", False),
        ("Checker.Example:443, inner.example", False),
        ("other.example", True),
        ("inner.example, checker.example", True),
        ("203.0.113.1", True),
    ],
)
def test_what_a_proxy_says_of_the_browsers_host_counts_before_host(
    host: str | None, forwarded_host: str, refused: bool
) -> None:
    headers = {"x-forwarded-host": forwarded_host, "origin": "http://checker.example"}
    if host:
        headers["host"] = host
    assert is_refused(PROXY, headers | {"x-forwarded-for": VISITOR}) is refused
    # A visitor's own field says nothing.
    assert is_refused(VISITOR, headers)
    assert not is_refused(VISITOR, headers | {"host": "checker.example"})


def test_a_refusal_says_what_would_help() -> None:
    origin = {"origin": "https://checker.example", "host": "checker.internal"}
    forwarded = refusal(PROXY, origin | {"x-forwarded-for": VISITOR})
    assert "have the proxy in front of it pass Host on" in forwarded
    assert "X-Forwarded-For" not in forwarded
    assert "set X-Forwarded-For" in refusal(VISITOR, origin)
    assert "proxy" not in refusal(VISITOR, SITE | {"sec-fetch-site": "cross-site"})


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
def test_a_host_name_that_is_rebound_to_loopback(peer: str) -> None:
    for host in (
        *("localhost", "LOCALHOST:9000", "localhost.", "app.localhost", "127.0.0.1:9000", "[::1]"),
        *("203.0.113.1", "box", "Box.lan:9000", ""),
    ):
        assert not is_refused(peer, {"host": host})
    assert not is_refused(peer, {})  # HTTP/1.0
    for host in "rebound.example", "localhost.example", "notlocalhost", "box.example", "127.1":
        for fields in {}, {"sec-fetch-site": "same-origin"}, {"origin": f"http://{host}"}:
            assert is_refused(peer, {"host": host, **fields})
    assert not is_refused(VISITOR, {"host": "rebound.example"})


def test_a_proxy_on_loopback_is_known_by_what_it_forwards() -> None:
    host = {"host": "checker.example"}
    assert not is_refused("127.0.0.1", host | {"x-forwarded-for": VISITOR})
    assert not is_refused("127.0.0.1", host | {"via": "1.1 proxy"})
    assert not is_refused(PROXY, host | {"x-forwarded-for": "127.8.8.8"})
    # A page may send X-Forwarded-For itself: it does not count from a peer that is not trusted.
    assert is_refused("127.0.0.2", host | {"x-forwarded-for": VISITOR})
    assert not is_refused(None, host | {"origin": "http://checker.example"})


def test_the_names_of_this_machine(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_bytes(
        b"127.0.0.1 localhost # rebound.example\n127.0.1.1\tBox.lan  box\n\n# 127.0.0.1 other\n"
        b"::1 ip6-localhost\n192.0.2.7 server.example\nnonsense\n\xff\xfe\n"
    )
    own = socket.gethostname().lower()
    assert local_names(hosts) == {own, "localhost", "box.lan", "box", "ip6-localhost"}
    assert local_names(tmp_path / "missing") == {own}


def test_only_checks_are_refused_and_before_anybody_pays() -> None:
    headers = {"sec-fetch-site": "cross-site"}
    with open_port() as opened, serve(caller_rate_limit="1/hour", retries=1) as client:
        body = {"provider_ip": "127.0.0.1", "ports": [opened]}
        for content in json.dumps(body), "{":
            answer = client.post("/check-ports", headers=headers, content=content)
            assert answer.status_code == 403
            assert answer.json() == {
                "detail": {
                    "code": "CROSS_ORIGIN",
                    "message": ERROR_EXAMPLES[ErrorCode.CROSS_ORIGIN],
                }
            }
        rebound = client.post("/check-ports", headers={"host": "rebound.example"}, json=body)
        assert rebound.json()["detail"]["code"] == "CROSS_ORIGIN"
        assert "X-Forwarded-For" in rebound.json()["detail"]["message"]
        assert client.post("/check-ports", json=body).status_code == 200
        for path in "/health", "/ip", "/docs":
            for method in "GET", "HEAD":
                assert client.request(method, path, headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *[(host, 200) for host in ("checker.example", "CHECKER.example.:9000", "a.b.lan", "x.lan")],
        *[(host, 200) for host in ("127.0.0.1", "203.0.113.1:80", "[2001:db8::1]:9000")],
        *[(host, 200) for host in ("localhost", "app.localhost:9000", "")],
        *[(host, 403) for host in ("rebound.example", "lan", "a.checker.example", "xlan", "127.1")],
        ("checker.example.other.example", 403),
    ],
)
def test_the_names_that_host_may_have(host: str, status: int) -> None:
    with serve(allowed_hosts="checker.example,*.LAN") as client:
        for method, path in [
            *[("GET", path) for path in ("/ip", "/health", "/", "/docs", "/openapi.json", "/x")],
            *[("HEAD", "/ip"), ("POST", "/check-ports"), ("OPTIONS", "/")],
        ]:
            headers = {"host": host, "x-forwarded-for": VISITOR}
            answer = client.request(method, path, headers=headers)
            if status == 403:
                assert answer.status_code == 403
                if method != "HEAD":
                    assert answer.json()["detail"]["code"] == "CROSS_ORIGIN"
                    assert "PORT_CHECKER_ALLOWED_HOSTS" in answer.json()["detail"]["message"]
            else:
                assert answer.status_code != 403, path


def test_a_host_of_many_labels_takes_no_time_to_refuse() -> None:
    async def refuse(*_: object) -> Response:
        return Response(status_code=403)

    async def send(message: Message) -> None:
        sent.append(message)

    sent: list[Message] = []
    app = AllowedHosts(Response(), ["*.lan"], refuse)
    scope = {"type": "http", "headers": [(b"host", b"a." * 200_000)]}
    started = time.process_time()
    asyncio.run(app(scope, None, send))  # type: ignore[arg-type]  # nothing is received
    assert time.process_time() - started < 60, "it takes a time that grows with the square"
    assert sent[0]["status"] == 403


def test_this_machines_name_may_be_in_host() -> None:
    with serve(allowed_hosts="checker.example") as client:
        own = socket.gethostname()
        assert client.get("/ip", headers={"host": own}).status_code == 200
    with serve() as client:  # where none are listed, each may be
        assert client.get("/ip", headers={"host": "any.example"}).status_code == 200
