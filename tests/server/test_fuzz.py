"""Whatever comes in: what must hold of any address, body, header and byte on a connection.

``FUZZ_EXAMPLES`` sets how many examples each test tries (``make fuzz``).
"""

import json
import logging
import os
import re
import select
import socket
import time
from contextlib import ExitStack, nullcontext
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from itertools import pairwise
from typing import Any, Literal, get_args

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from port_checker.addresses import Address, Network, lies_in, parse_address, parse_networks
from port_checker.schemas import CheckRequest, InvalidRequest
from port_checker.server.caller import find_caller
from port_checker.server.errors import STATUS
from port_checker.server.protocol import ConnectionLimits
from port_checker.server.settings import Settings
from port_checker.server.targets import TargetNotAllowed, require_allowed, special_purpose
from tests.support.http import check_of
from tests.support.loopback import open_port
from tests.support.service import serve

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "150"))


def fuzzed(examples: int = EXAMPLES) -> settings:
    """How a test is run: where all must pass, with the same examples every time."""
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,  # a failing example is printed, and then belongs into the code
        derandomize=os.environ.get("CI") == "true" and "FUZZ_EXAMPLES" not in os.environ,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


# Who may be checked.

# What ipaddress lets through, or does on some versions of Python: anycast services, protocols'
# own ranges, wrappers of IPv4, and a documentation range of 2024.
FURTHER_SPECIAL = parse_networks(
    "192.0.0.0/24,192.31.196.0/24,192.52.193.0/24,192.88.99.0/24,192.175.48.0/24,"
    "2001::/23,2002::/16,2620:4f:8000::/48,3fff::/20"
)


def is_public_unicast(address: Address) -> bool:
    """The oracle, on the standard library's tables instead of the service's."""
    return not (
        address.is_private
        or address.is_loopback
        or address.is_multicast
        or address.is_link_local
        or address.is_reserved
        or address.is_unspecified
        or not address.is_global
        or (isinstance(address, IPv6Address) and address not in ip_network("2000::/3"))
        or lies_in(address, FURTHER_SPECIAL)
    )


def at_the_edge_of(network: Network) -> list[Address]:
    """The first and last address of a network, and those beside it."""
    first, last = int(network.network_address), int(network.broadcast_address)
    make = type(network.network_address)
    return [
        make(n) for n in (first - 1, first, last, last + 1) if 0 <= n < 1 << make(0).max_prefixlen
    ]


EDGES = [
    address
    for network in parse_networks(
        "0.0.0.0/8,10.0.0.0/8,100.64.0.0/10,127.0.0.0/8,169.254.0.0/16,172.16.0.0/12,192.0.0.0/24,"
        "192.0.2.0/24,192.31.196.0/24,192.52.193.0/24,192.88.99.0/24,192.168.0.0/16,"
        "192.175.48.0/24,198.18.0.0/15,198.51.100.0/24,203.0.113.0/24,224.0.0.0/4,240.0.0.0/4,"
        "::/128,::1/128,::/96,64:ff9b::/96,64:ff9b:1::/48,100::/64,100:0:0:1::/64,2000::/3,"
        "2001::/32,2001::/23,2001:db8::/32,2002::/16,2620:4f:8000::/48,3fff::/20,5f00::/16,"
        "fc00::/7,fe80::/10,fec0::/10,ff00::/8"
    )
    for address in at_the_edge_of(network)
]
ipv4: st.SearchStrategy[IPv4Address] = st.ip_addresses(v=4)  # type: ignore[assignment]  # hypothesis says of either family
addresses = st.one_of(ipv4, st.ip_addresses(v=6), st.sampled_from(EDGES))


Targets = Literal["public", "caller"]
TARGETS: tuple[Targets, ...] = get_args(Targets)


@pytest.mark.parametrize("address", EDGES, ids=str)
def test_the_edges_of_special_ranges_agree_with_the_standard_library(address: Address) -> None:
    assert (special_purpose(address) is None) == is_public_unicast(address)


@fuzzed()
@given(addresses)
def test_special_purpose_agrees_with_the_standard_library(address: Address) -> None:
    assert (special_purpose(address) is None) == is_public_unicast(address)


@fuzzed()
@given(
    caller=st.none() | addresses,
    target=addresses,
    targets=st.sampled_from(TARGETS),
    allowed=st.sampled_from(["", "10.0.0.0/8,fd00::/8", "0.0.0.0/0", "::/0", "::1"]).map(
        parse_networks
    ),
    own=st.booleans(),
)
@example(IPv4Address("127.0.0.1"), IPv4Address("127.0.0.1"), "caller", (), True)
@example(IPv4Address("8.8.8.8"), IPv4Address("8.8.4.4"), "public", (), True)
@example(None, IPv4Address("127.0.0.1"), "public", (), False)
def test_a_stranger_is_allowed_nothing_but_public_unicast(
    caller: Address | None,
    target: Address,
    targets: Targets,
    allowed: tuple[Network, ...],
    own: bool,
) -> None:
    values = Settings(targets=targets, allowed_networks=allowed)
    expected = (
        target == caller
        or lies_in(target, allowed)
        or (targets == "public" and is_public_unicast(target) and not own)
    )
    refusal = nullcontext() if expected else pytest.raises(TargetNotAllowed)
    with refusal:
        require_allowed(caller, target, values, lambda _: own)


def written_out(address: IPv4Address) -> list[str]:
    """Ways to write the IPv4-mapped form of an address."""
    high, low = divmod(int(address), 1 << 16)
    return [f"::ffff:{address}", f"::FFFF:{high:x}:{low:x}", f"0:0:0:0:0:ffff:{high:04x}:{low:04x}"]


@fuzzed()
@given(ipv4)
def test_a_mapped_address_is_the_ipv4_address(address: IPv4Address) -> None:
    for text in written_out(address):
        body = json.dumps({"provider_ip": text, "ports": [1]}).encode()
        assert parse_address(text) == CheckRequest.parse(body, 1).provider_ip == address
        assert find_caller(text, [], []) == address
        assert find_caller("::1", [text], [ip_network("::1")]) == address


# What is asked.

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
near_ports = st.one_of(
    st.integers(1, 65535),
    st.sampled_from(
        [0, -1, 1, 65535, 65536, 70000, 2**31, 2**63, 2**64, -(2**70), 10**4000, 10**5000]
    ),
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


def asking_for(port: object) -> dict[str, object]:
    """A document that is valid if the port is."""
    return {"provider_ip": "1.1.1.1", "ports": [port]}


def dumped(value: object, *, ascii_only: bool) -> bytes:
    """A document as some client would write it; ``json`` itself refuses the largest integers."""
    huge = "a number of 5000 digits"
    text = json.dumps(_without_huge(value, huge), ensure_ascii=ascii_only)
    return text.replace(f'"{huge}"', "1" + "0" * 5000).encode(errors="surrogatepass")


def _without_huge(value: object, instead: str) -> object:
    match value:
        case int() if abs(value) >= 10**4300:
            return instead
        case list():
            return [_without_huge(entry, instead) for entry in value]
        case dict():
            return {key: _without_huge(entry, instead) for key, entry in value.items()}
    return value


def must_be_a_request_or_an_error(body: bytes, most: int) -> CheckRequest | None:
    try:
        asked = CheckRequest.parse(body, most)
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
@example(b"")
@example(b"\xef\xbb\xbf{}")
@example(b"[" * 65536)
@example(b'{"a":' * 10000)
@example(b"9" * 65536)
@example(b'{"provider_ip": "1.1.1.1", "ports": [' + b"9" * 60000 + b"]}")
@example(b'{"provider_ip": "1.1.1.1", "ports": [1e999]}')
@example(b'{"provider_ip": ' + b"9" * 60000 + b', "ports": [1]}')
@example(b'{"provider_ip": "\\ud800", "ports": [1]}')
@example(b'{"provider_ip": "1.1.1.1", "ports": ["\\ud83d"]}')
@example(b'{"provider_ip": ' + b"[" * 150 + b"]" * 150 + b', "ports": [1]}')
def test_any_body_is_a_request_or_an_error(body: bytes) -> None:
    must_be_a_request_or_an_error(body, 1000)


@fuzzed()
@given(
    json_values | near_valid | near_ports.map(asking_for),
    st.booleans(),
    st.sampled_from([1, 10, 1000]),
)
@example({"provider_ip": 10**5000, "ports": [1]}, True, 10)
@example({"provider_ip": "1.1.1.1", "ports": [10**5000]}, True, 10)
@example({"provider_ip": "1.1.1.1", "ports": [True]}, True, 10)
@example({"provider_ip": "1.1.1.1", "ports": [2, 1.0, "3"]}, True, 10)
@example({"provider_ip": "1.1.1.1", "ports": [3, 1, 3, 2, 1]}, True, 10)
@example({"provider_ip": {"{shown}": "{asked}"}, "ports": [1]}, True, 10)
@example({"provider_ip": "{shown}", "ports": ["{most}"]}, True, 10)
def test_any_document_is_a_request_or_an_error(value: object, ascii_only: bool, most: int) -> None:
    asked = must_be_a_request_or_an_error(dumped(value, ascii_only=ascii_only), most)
    if asked:
        assert isinstance(value, dict)
        assert asked.provider_ip == parse_address(value["provider_ip"])
        first_seen: list[int] = []
        for port in value["ports"]:
            if port not in first_seen:
                first_seen.append(port)
        assert asked.ports == first_seen


@fuzzed()
@given(addresses, st.lists(st.integers(1, 65535), min_size=1), json_values)
def test_what_is_valid_is_a_request(address: Address, ports: list[int], other: object) -> None:
    document = {"provider_ip": str(address), "ports": ports, "other": other}
    assume("Infinity" not in json.dumps(other) and "NaN" not in json.dumps(other))
    asked = must_be_a_request_or_an_error(dumped(document, ascii_only=True), len(ports))
    if asked is None:  # a lone surrogate in the other field: that is no JSON in UTF-8
        assert re.search(r"\\ud[89a-f]", json.dumps(other))


# Who asks.

PROXIES = parse_networks("127.0.0.1,::1,10.0.0.0/8")
hops = st.one_of(
    addresses.map(str),
    st.sampled_from(["127.0.0.1", "10.1.2.3", "::1", "::ffff:10.0.0.1", "[::1]:80", "10.0.0.1:80"]),
    addresses.map(lambda a: f"[{a}]:443" if a.version == 6 else f"{a}:443"),
    st.sampled_from(
        ["", " ", "unknown", "_hidden", "[", "[]", "[::1", ":", "1.2.3.4:x", "for=::1"]
    ),
    st.text(max_size=30),
)
fields = st.lists(st.lists(hops).map(",".join) | st.text(), max_size=4)
peers = st.one_of(st.none(), addresses.map(str), st.sampled_from(["127.0.0.1", "::1"]), st.text())


def address_of(hop: str) -> Address | None:
    """The address of one hop, with or without a port; None when it is nonsense."""
    text = hop.strip()
    if text.startswith("["):  # without its other bracket, too: it is a trusted proxy that says it
        text = text[1:].split("]")[0]
    elif re.fullmatch(r"[^:]*:\d+", text):
        text = text.split(":")[0]
    try:
        address = ip_address(text)
    except ValueError:
        return None
    if isinstance(address, IPv6Address):
        return None if address.scope_id else address.ipv4_mapped or address
    return address


@fuzzed(2 * EXAMPLES)
@given(peer=peers, forwarded_for=fields, is_proxy=st.booleans())
@example("127.0.0.1", ["127.0.0.1", "8.8.8.8, 10.0.0.1"], False)
@example("127.0.0.1", ["8.8.8.8, [::1"], False)
def test_nothing_left_of_a_hop_that_is_not_trusted_is_the_caller(
    peer: str | None, forwarded_for: list[str], is_proxy: bool
) -> None:
    caller = find_caller(peer, forwarded_for, PROXIES, is_proxy=is_proxy)
    itself = address_of((peer or "").partition("%")[0])
    if caller is None:
        return
    assert itself
    if caller == itself:
        assert not lies_in(itself, PROXIES) or not (forwarded_for or is_proxy)
        return
    assert lies_in(itself, PROXIES)
    listed = [address_of(hop) for field in forwarded_for for hop in field.split(",")]
    while (last := listed.pop()) and lies_in(last, PROXIES):
        pass
    assert caller == last


# What comes on a connection.

LIMITS_OFF: dict[str, Any] = {"caller_rate_limit": "off", "target_rate_limit": "off"}


def body_of(sent: bytes, chunks: int) -> bytes:
    """A request for a check whose body comes in chunks."""
    size = -(-len(sent) // chunks)
    parts = [sent[start : start + size] for start in range(0, len(sent), size)]
    body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
    head = b"POST /check-ports HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + body + b"0\r\n\r\n"


def get(path: bytes, *header: bytes, method: bytes = b"GET") -> bytes:
    return b"\r\n".join([b"%b %b HTTP/1.1" % (method, path), b"Host: x", *header, b"", b""])


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
        get(b"/health", b"Content-Length: 3") + b"abc",
        get(b"/check-ports"),
        get(b"/health", method=b"DELETE"),
        get(b"/openapi.json", method=b"HEAD"),
    ]


CLOSE = get(b"/health", b"Connection: close")


def answers_to(port: int, parts: list[bytes]) -> bytes:
    """Everything that is answered to a stream sent in parts, without the dates."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
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


DEADLINE = 0.3


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
    b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13",
    b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings",
    b" folded",
    b"X\0: y",
    b": nameless",
    b"Host: \xff\xfe",
    b"X-Forwarded-For: \xff, \xe9",
    b"Connection: close, keep-alive",
]


def test_garbage_is_refused_or_closed_and_outlives_no_deadline(
    caplog: pytest.LogCaptureFixture,
) -> None:
    room = ConnectionLimits(100, DEADLINE)
    with open_port() as opened, serve(room=room, **LIMITS_OFF) as client:
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
                | st.sampled_from([b"*", b"//", b"http://[", b"/%", b"/\xff"]),
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
                # One that was answered properly may be kept for the next request.
                assert is_closed or statuses, payload
                if 400 in statuses:
                    assert is_closed, payload

        try_it()
        assert client.get("/health").status_code == 200
    assert_clean(caplog)


def conversations(server: int, payloads: list[bytes]) -> list[tuple[bytes, bytes, bool]]:
    """What is answered to each payload until the deadline, and whether it was closed then."""
    with ExitStack() as stack:
        socks = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server), timeout=20))
            for _ in payloads
        ]
        for sock, payload in zip(socks, payloads, strict=True):
            try:
                sock.sendall(payload)
            except ConnectionError:
                continue  # refused at an earlier byte
        answers = dict.fromkeys(socks, b"")
        pending = set(socks)
        # Twice the deadline: in the middle of a request's head another may have been answered.
        until = time.monotonic() + 2 * DEADLINE + 1
        while pending and (left := until - time.monotonic()) > 0:
            if all(complete(answers[sock]) for sock in pending):
                left = 0.05  # nothing more has to come
            readable = select.select(list(pending), [], [], left)[0]
            if not readable and left == 0.05:
                break
            for sock in readable:
                try:
                    received = sock.recv(65536)
                except ConnectionError:
                    received = b""
                answers[sock] += received
                if not received:
                    pending.remove(sock)
        return [
            (payload, answers[sock], sock not in pending)
            for sock, payload in zip(socks, payloads, strict=True)
        ]


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


def complete(answers: bytes) -> bool:
    """Whether at least one answer is there that does not announce the end."""
    return b"\r\n\r\n" in answers and b"connection: close" not in answers.lower()


def assert_clean(caplog: pytest.LogCaptureFixture) -> None:
    for record in caplog.records:
        assert record.levelno < logging.ERROR, record.getMessage()
        assert not record.exc_info, record.getMessage()
