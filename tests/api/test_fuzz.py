"""Generated input: what must hold for any address, body, header and byte on a connection.

``FUZZ_EXAMPLES`` sets how many examples each test tries (``make fuzz``).
"""

import asyncio
import json
import logging
import os
import re
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import pairwise
from typing import Any, Literal, get_args

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from starlette.requests import HTTPConnection

from port_checker.addresses import Address, Network, lies_in, parse_address, parse_networks
from port_checker.api.caller import CallerResolver
from port_checker.api.errors import STATUS
from port_checker.api.targets import TargetNotAllowed, TargetRules, special_purpose
from port_checker.schemas import CheckPortsRequest, InvalidRequest, PortsToCheck
from port_checker.server.connections import ConnectionLimits
from port_checker.settings import Settings
from tests.support.http import check_of
from tests.support.loopback import open_port
from tests.support.service import serve

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))


def fuzzed(examples: int = EXAMPLES) -> settings:
    """How often a test is run; in CI with the same examples every time."""
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,  # a failing example is printed, and belongs into the code
        derandomize=os.environ.get("CI") == "true" and "FUZZ_EXAMPLES" not in os.environ,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


PROXIES = parse_networks("127.0.0.1,::1,10.0.0.0/8")


def caller_of(peer: str | None, headers: Sequence[tuple[bytes, bytes]] = ()) -> Address | None:
    client = (peer, 4711) if peer else None
    connection = HTTPConnection({"type": "http", "client": client, "headers": headers})
    return CallerResolver(PROXIES, is_own=lambda _: False).resolve(connection)


# Which addresses may be checked.

SPECIAL = parse_networks(
    "0.0.0.0/8,10.0.0.0/8,100.64.0.0/10,127.0.0.0/8,169.254.0.0/16,192.168.0.0/16,224.0.0.0/4,"
    "::/96,64:ff9b::/96,2001::/32,2001:db8::/32,2002::/16,fc00::/7,fe80::/10,ff00::/8"
)
ipv4: st.SearchStrategy[IPv4Address] = st.ip_addresses(v=4)  # type: ignore[assignment]  # hypothesis says of either family
addresses = st.one_of(
    ipv4,
    st.ip_addresses(v=6),
    st.sampled_from(SPECIAL).flatmap(lambda network: st.ip_addresses(network=network)),
)


Targets = Literal["public", "caller"]
TARGETS: tuple[Targets, ...] = get_args(Targets)


networks = st.sampled_from(["", "10.0.0.0/8,fd00::/8", "0.0.0.0/0", "::/0", "::1"]).map(
    parse_networks
)


@fuzzed()
@given(
    caller=st.none() | addresses,
    target=addresses,
    targets=st.sampled_from(TARGETS),
    allowed=networks,
    denied=networks,
    own=st.booleans(),
    gateway=st.booleans(),
)
@example(IPv4Address("127.0.0.1"), IPv4Address("127.0.0.1"), "caller", (), (), True, False)
@example(IPv4Address("10.0.0.1"), IPv4Address("10.0.0.1"), "public", (), (), False, True)
@example(IPv4Address("8.8.8.8"), IPv4Address("8.8.8.8"), "public", (), (), False, True)
@example(IPv4Address("8.8.8.8"), IPv4Address("8.8.4.4"), "public", (), (), True, False)
@example(None, IPv4Address("127.0.0.1"), "public", (), (), False, False)
def test_who_may_check_what(
    caller: Address | None,
    target: Address,
    targets: Targets,
    allowed: tuple[Network, ...],
    denied: tuple[Network, ...],
    own: bool,
    gateway: bool,
) -> None:
    """The rules in the order in which docs/operating.md lists them."""
    values = Settings(targets=targets, allowed_networks=allowed, denied_networks=denied)
    is_public = special_purpose(target) is None
    is_callers_own = target == caller and (
        is_public or target.is_loopback or not (target.is_link_local or gateway)
    )
    expected = not lies_in(target, denied) and (
        is_callers_own
        or lies_in(target, allowed)
        or (targets == "public" and is_public and not own and target != caller)
    )
    rules = TargetRules(values, is_own=lambda _: own, is_gateway=lambda _: gateway)
    with nullcontext() if expected else pytest.raises(TargetNotAllowed):
        asyncio.run(rules.require_allowed(caller, target))


def written_out(address: IPv4Address) -> list[str]:
    """Ways to write the IPv4-mapped form of an address."""
    high, low = divmod(int(address), 1 << 16)
    return [f"::ffff:{address}", f"::FFFF:{high:x}:{low:x}", f"0:0:0:0:0:ffff:{high:04x}:{low:04x}"]


@fuzzed()
@given(ipv4)
def test_a_mapped_address_is_the_ipv4_address(address: IPv4Address) -> None:
    for text in written_out(address):
        body = json.dumps({"provider_ip": text, "ports": [1]}).encode()
        assert parse_address(text) == CheckPortsRequest.parse(body, 1).provider_ip == address
        assert caller_of(text) == address
        if not special_purpose(address):
            assert caller_of("::1", [(b"x-forwarded-for", text.encode())]) == address


# Request bodies.

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
near_ports = st.one_of(
    st.integers(1, 65535),
    st.sampled_from([0, -1, 1, 65535, 65536, 2**31, 2**63, 2**64, -(2**70), 10**4000]),
    st.integers(),
    st.booleans(),
    st.floats(),
    st.text(max_size=60),
    json_values,
)
near_valid = st.fixed_dictionaries(
    {},
    optional={
        "provider_ip": st.one_of(
            addresses.map(str),
            ipv4.flatmap(lambda address: st.sampled_from(written_out(address))),
            st.text(),
            st.sampled_from(
                ["fe80::1%eth0", "010.0.0.1", "1.1.1.1:80", "[::1]", "localhost", "\uff11.1.1.1"]
            ),
            json_values,
        ),
        "ports": st.lists(near_ports, max_size=12) | st.lists(st.integers(1, 65535)) | json_values,
        "other": json_values,
    },
)


def request_or_none(body: bytes, most: int = 1000) -> PortsToCheck | None:
    """Parse a body: it must be a valid request or one error with a message fit to show."""
    try:
        asked = CheckPortsRequest.parse(body, most)
    except InvalidRequest as error:
        refusal = error
    else:
        assert isinstance(asked.provider_ip, IPv4Address | IPv6Address)
        assert 1 <= len(asked.ports) <= most
        assert all(type(port) is int and 1 <= port <= 65535 for port in asked.ports)
        return asked
    assert STATUS[refusal.code] == 422
    assert 0 < len(str(refusal)) < 300
    str(refusal).encode()
    return None


@fuzzed()
@given(st.binary(max_size=500) | st.text().map(lambda text: text.encode(errors="surrogatepass")))
def test_any_body_is_a_request_or_an_error(body: bytes) -> None:
    request_or_none(body)


@fuzzed()
@given(
    json_values
    | near_valid
    | near_ports.map(lambda port: {"provider_ip": "1.1.1.1", "ports": [port]}),
    st.booleans(),
    st.sampled_from([1, 10, 1000]),
)
@example({"provider_ip": "1.1.1.1", "ports": [True]}, True, 10)
@example({"provider_ip": "1.1.1.1", "ports": [2, 2.0, 1.0]}, True, 10)
@example({"provider_ip": "1.1.1.1", "ports": [3, 1, 3, 2, 1]}, True, 10)
@example({"provider_ip": {"{shown}": "{asked}"}, "ports": [1]}, True, 10)
@example({"provider_ip": "{shown}", "ports": ["{most}"]}, True, 10)
def test_any_document_is_a_request_or_an_error(value: object, ascii_only: bool, most: int) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    asked = request_or_none(text.encode(errors="surrogatepass"), most)
    if asked:
        assert isinstance(value, dict)
        assert asked.provider_ip == parse_address(value["provider_ip"])
        assert asked.ports == list(dict.fromkeys(value["ports"]))


@fuzzed()
@given(addresses, st.lists(st.integers(1, 65535), min_size=1), json_values)
def test_whatever_is_valid_is_a_request(address: Address, ports: list[int], other: object) -> None:
    text = json.dumps({"provider_ip": str(address), "ports": ports, "other": other})
    # Not JSON in UTF-8: what Python writes for these floats, and lone surrogates.
    assume(not re.search(r"Infinity|NaN|\\ud[89a-f]", text))
    assert request_or_none(text.encode(), len(ports))


# Callers.

hops = st.one_of(
    addresses.map(str),
    st.sampled_from(["127.0.0.1", "10.1.2.3", "::1", "::ffff:10.0.0.1", "[::1]:80", "10.0.0.1:80"]),
    addresses.map(lambda a: f"[{a}]:443" if a.version == 6 else f"{a}:443"),
    st.sampled_from(
        [
            "",
            " ",
            "unknown",
            "_hidden",
            "[",
            "[]",
            "[::1",
            "[::1]x",
            "\xa08.8.8.8",
            "8.8.8.8:_x",
            ":",
        ]
    ),
    st.text(max_size=30),
)
fields = st.lists(st.lists(hops).map(",".join) | st.text(), max_size=4)
peers = st.one_of(st.none(), addresses.map(str), st.sampled_from(["127.0.0.1", "::1"]), st.text())


def address_of(hop: str) -> Address | None:
    """The address of one hop, with or without a port; None when it is nonsense."""
    port = r"(:[0-9]{1,5}|:_[A-Za-z0-9._-]+)?"
    bracketed = re.fullmatch(rf"\[([0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*)\]{port}", hop)
    with_port = re.fullmatch(rf"([0-9.]*){port}", hop)
    try:
        address = ip_address(bracketed[1] if bracketed else with_port[1] if with_port else hop)
    except ValueError:
        return None
    if isinstance(address, IPv6Address):
        return None if address.scope_id else address.ipv4_mapped or address
    return address


@fuzzed(2 * EXAMPLES)
@given(peer=peers, forwarded_for=fields, has_trace=st.booleans())
@example("127.0.0.1", ["127.0.0.1", "8.8.8.8, 10.0.0.1"], False)
@example("127.0.0.1", ["8.8.8.8, [::1"], False)
def test_nothing_left_of_a_hop_that_is_not_trusted_is_the_caller(
    peer: str | None, forwarded_for: list[str], has_trace: bool
) -> None:
    headers = [(b"x-forwarded-for", field.encode("latin-1", "replace")) for field in forwarded_for]
    headers += [(b"via", b"1.1 proxy")] * has_trace
    caller = caller_of(peer, headers)
    itself = address_of((peer or "").partition("%")[0])
    if caller is None:
        return
    assert itself
    if caller == itself:
        assert not lies_in(itself, PROXIES) or not (forwarded_for or has_trace)
        return
    assert lies_in(itself, PROXIES)
    elements = [hop.strip(" \t") for field in forwarded_for for hop in field.split(",")]
    listed = [address_of(hop) for hop in elements if hop]
    while (last := listed.pop()) and lies_in(last, PROXIES):
        pass
    assert caller == last


# Bytes on a connection.

LIMITS_OFF: dict[str, Any] = {"caller_rate_limit": "off", "target_rate_limit": "off"}


def body_of(sent: bytes, chunks: int) -> bytes:
    """A request for a check whose body comes in chunks."""
    size = -(-len(sent) // chunks)
    parts = [sent[start : start + size] for start in range(0, len(sent), size)]
    body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
    head = b"POST /check-ports HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + body + b"0\r\n\r\n"


def get(path: bytes, *header: bytes, method: bytes = b"GET") -> bytes:
    return b"\r\n".join([b"%b %b HTTP/1.1" % (method, path), b"Host: localhost", *header, b"", b""])


def requests_of(port: int) -> list[bytes]:
    """Requests of every kind whose answers come at once and are always the same."""
    check = check_of(port)
    return [
        check,
        body_of(check.partition(b"\r\n\r\n")[2], 3),
        body_of(b"[]", 1),
        check_of(0),
        get(b"/health"),
        get(b"/ip", b"X-Forwarded-For: 203.0.113.7, 127.0.0.1"),
        get(b"/nothing?a=%00&b"),
        get(b"/health", b"Expect: 100-continue", b"X-Long: " + b"a" * 10_000),
        get(b"http://localhost/health"),
        get(b"*", method=b"OPTIONS"),
        get(b"/check-ports"),
        get(b"/health", method=b"DELETE"),
        get(b"/openapi.json", method=b"HEAD"),
    ]


CLOSE = get(b"/health", b"Connection: close")


def answers_to(port: int, parts: list[bytes]) -> bytes:
    """Everything that is answered to a stream sent in parts, without the dates."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for part in parts:
            sock.sendall(part)
            # Lets the server read a part before the next comes. What is asserted holds, and the
            # test passes, however the parts arrive.
            time.sleep(0.0005)
        answers = b""
        while received := sock.recv(65536):
            answers += received
    return re.sub(rb"(?m)^date: .*\r\n", b"", answers)


def split(stream: bytes, cuts: list[int]) -> list[bytes]:
    """The stream, cut at these places."""
    edges = sorted({0, *(cut % len(stream) for cut in cuts), len(stream)})
    return [stream[start:end] for start, end in pairwise(edges)]


def test_however_a_stream_of_requests_is_cut_the_answers_are_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with open_port() as opened, serve(**LIMITS_OFF) as client:
        server = client.base_url.port or 0
        known = requests_of(opened)
        alone = [answers_to(server, [request, CLOSE]) for request in known]
        last = answers_to(server, [CLOSE])
        assert all(answer.endswith(last) for answer in alone)

        @fuzzed(EXAMPLES // 2)
        @given(
            st.lists(st.integers(0, len(known) - 1), min_size=1, max_size=6),
            st.lists(st.integers(0, 10_000), max_size=40),
        )
        def try_it(numbers: list[int], cuts: list[int]) -> None:
            stream = b"".join(known[number] for number in numbers) + CLOSE
            expected = b"".join(alone[number].removesuffix(last) for number in numbers) + last
            assert answers_to(server, split(stream, cuts)) == expected

        try_it()
        # One cut, at each place there is; and each byte alone.
        stream = known[0] + known[1] + CLOSE
        expected = alone[0].removesuffix(last) + alone[1]
        for cut in range(1, len(stream)):
            assert answers_to(server, split(stream, [cut])) == expected
        assert answers_to(server, split(stream, list(range(len(stream))))) == expected
    assert_clean(caplog)


def mangled(valid: bytes) -> st.SearchStrategy[bytes]:
    """A valid request with something wrong at some place."""
    places = st.integers(0, len(valid))
    return st.builds(
        lambda start, end, between: valid[: min(start, end)] + between + valid[max(start, end) :],
        places,
        places,
        st.binary(max_size=8)
        | st.sampled_from([b"\r", b"\n", b"\r\n", b"\0", b":", b" ", b"\xff"]),
    )


HEADER_LINES = [
    b"Content-Length: -1",
    b"Content-Length: 1e3",
    b"Content-Length: 5\r\nContent-Length: 6",
    b"Content-Length: 99999999999999999999999",
    b"Content-Length: 5\r\nTransfer-Encoding: chunked",
    b"Transfer-Encoding: gzip",
    b"Transfer-Encoding: chunked, chunked",
    b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
    b"Transfer-Encoding: chunked\r\n\r\n-1\r\n",
    b"Expect: 100-continue",
    b"Content-Length: 3\r\n\r\nabc",
    b"Host: a b",
    b"Transfer-Encoding: gzip, chunked",
    b"Transfer-Encoding: chunked\r\n\r\n" + b"1;a=b\r\n{\r\n" * 500,
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"X: y\r\n" * 1000,
    b"Accept-Encoding: " + b"a," * 4000,
    b"\r\n".join([b"X: y"] * 120),
    b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13",
    b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings",
    b" folded",
    b"X\0: y",
    b": nameless",
    b"Host: \xff\xfe",
    b"X-Forwarded-For: \xff, \xe9",
    b"Connection: close, keep-alive",
]


def test_garbage_is_answered_with_an_error_or_closed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    limits = ConnectionLimits(100, deadline=0.3, trusted_proxies=parse_networks("127.0.0.1"))
    with open_port() as opened, serve(limits=limits, **LIMITS_OFF) as client:
        server = client.base_url.port or 0
        known = requests_of(opened)
        garbage = st.one_of(
            st.binary(max_size=300),
            st.sampled_from(known).flatmap(mangled),
            st.builds(
                lambda method, lines: get(b"/check-ports", *lines, method=method),
                st.sampled_from([b"POST", b"GET", b"CONNECT", b"PRI", b"get", b"OPTIONS"]),
                st.lists(st.sampled_from(HEADER_LINES), min_size=1, max_size=2),
            ),
            st.builds(
                lambda target, version: b"GET %b %b\r\nHost: x\r\n\r\n" % (target, version),
                st.binary(max_size=20)
                | st.sampled_from(
                    [
                        b"*",
                        b"//",
                        b"http://[",
                        b"/%",
                        b"/\xff",
                        b"http://x",
                        b"http://x?",
                        b"HTTP://a@x/",
                        b"x:80",
                        b"/" + b"%c3%a9" * 400,
                    ]
                ),
                st.sampled_from(
                    [b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/0.9", b"HTTP/9", b""]
                ),
            ),
        )

        @fuzzed(max(1, EXAMPLES // 15))
        @given(st.lists(garbage, min_size=10, max_size=60))
        @example([get(b"/check-ports", line, method=b"POST") for line in HEADER_LINES])
        def try_it(payloads: list[bytes]) -> None:
            for payload, answers, is_closed in conversations(server, payloads):
                statuses = statuses_of(answers)
                assert set(statuses) <= {100, 200, 400, 403, 404, 405, 413, 422, 503}, payload
                assert is_closed or 400 not in statuses, payload

        try_it()
        assert client.get("/health").status_code == 200
    assert_clean(caplog)


def conversations(server: int, payloads: list[bytes]) -> list[tuple[bytes, bytes, bool]]:
    """Send each payload; return it, what is answered, and whether the connection was closed.

    A connection is read until the server closes it, or has answered and announced no closing.
    """
    with ExitStack() as stack:
        socks = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server), timeout=60))
            for _ in payloads
        ]
        for sock, payload in zip(socks, payloads, strict=True):
            with suppress(ConnectionError):  # refused at an earlier byte
                sock.sendall(payload)
        return [
            (payload, *conversation(sock)) for sock, payload in zip(socks, payloads, strict=True)
        ]


def conversation(sock: socket.socket) -> tuple[bytes, bool]:
    answers = b""
    while not (b"\r\n\r\n" in answers and b"connection: close" not in answers.lower()):
        try:
            received = sock.recv(65536)
        except ConnectionError:
            received = b""
        if not received:
            return answers, True
        answers += received
    return answers, False


def statuses_of(answers: bytes) -> list[int]:
    """The statuses of a sequence of answers; nothing else may stand in it."""
    statuses = []
    while answers:
        head, _, rest = answers.partition(b"\r\n\r\n")
        start = re.match(rb"HTTP/1\.1 (\d{3}) ", head)
        assert start, answers
        statuses.append(int(start[1]))
        length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
        # To HEAD there is no body; it is asked for the schema alone.
        has_body = length and not rest.startswith(b"HTTP/1.1 ") and rest
        answers = rest[int(length[1]) :] if length and has_body else rest
    return statuses


def assert_clean(caplog: pytest.LogCaptureFixture) -> None:
    for record in caplog.records:
        assert record.levelno < logging.ERROR, record.getMessage()
        assert not record.exc_info, record.getMessage()
