"""Who the caller is: behind no proxy, one, and several."""

import time

import pytest
from starlette.requests import HTTPConnection

from port_checker.addresses import Address, parse_address, parse_networks
from port_checker.api.caller import CallerResolver
from port_checker.connect import CheckFailed

PROXIES = parse_networks("127.0.0.1,::1,10.0.0.0/8,fd00::/8")


OWN = (
    "172.17.0.1",
    "10.0.0.5",
    "fd00::5",
    "198.41.0.4",
    "198.41.0.5",
)  # the addresses of this machine


def is_own(address: Address) -> bool:
    return str(address) in OWN


def request(peer: str | None, *headers: tuple[str, str]) -> HTTPConnection:
    return HTTPConnection(
        {
            "type": "http",
            "client": (peer, 4711) if peer else None,
            "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers],
        }
    )


def found(peer: str | None, *forwarded_for: str, trusted: str = "") -> str | None:
    proxies = parse_networks(trusted) if trusted else PROXIES
    headers = [("x-forwarded-for", field) for field in forwarded_for]
    caller = CallerResolver(proxies, is_own=is_own).resolve(request(peer, *headers))
    return str(caller) if caller else None


@pytest.mark.parametrize(
    ("peer", "caller"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("2001:DB8::7", "2001:db8::7"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("fe80::7%eth0", "fe80::7"),
        ("127.0.0.1", "127.0.0.1"),  # a proxy that asks for itself
        (None, None),
        ("", None),
        ("/run/port-checker.sock", None),
        ("%eth0", None),
    ],
)
def test_without_forwarding_the_peer_is_the_caller(peer: str | None, caller: str | None) -> None:
    assert found(peer) == caller


@pytest.mark.parametrize("peer", ["203.0.113.9", "128.0.0.1", "fe80::1%lo", "::2", "@", None])
@pytest.mark.parametrize("forwarded_for", ["203.0.113.7", "127.0.0.1", "", "nonsense"])
def test_what_an_untrusted_peer_forwards_does_not_count(
    peer: str | None, forwarded_for: str
) -> None:
    assert found(peer, forwarded_for) == found(peer)


@pytest.mark.parametrize("peer", ["127.0.0.1", "::1", "::ffff:127.0.0.1", "fd00::7%2"])
@pytest.mark.parametrize(
    ("forwarded_for", "caller"),
    [
        (["  203.0.113.7\t"], "203.0.113.7"),
        (["2001:db8::7"], "2001:db8::7"),
        (["::ffff:203.0.113.7"], "203.0.113.7"),
        # Trusted hops are skipped, from the right, in one header or several.
        (["203.0.113.7,10.0.0.1,fd00::1,::ffff:10.0.0.2"], "203.0.113.7"),
        (["203.0.113.7", "10.0.0.1"], "203.0.113.7"),
        (["203.0.113.7, 10.0.0.1", "10.0.0.2"], "203.0.113.7"),
        # What is left of the first other hop is the caller's claim.
        (["198.51.100.1", "203.0.113.7"], "203.0.113.7"),
        (["127.0.0.1, 203.0.113.7"], "203.0.113.7"),
        (["203.0.113.8, 10.0.0.1, 203.0.113.7, 10.0.0.2"], "203.0.113.7"),
        (["nonsense, 203.0.113.7"], "203.0.113.7"),
        # Empty elements count as nothing.
        ([", , 203.0.113.7"], "203.0.113.7"),
        (["203.0.113.7,"], "203.0.113.7"),
        (["203.0.113.7", "", "10.0.0.1, \t,"], "203.0.113.7"),
        # Some proxies add the port.
        (["203.0.113.7:4711, 10.0.0.1:80, [fd00::1]:80"], "203.0.113.7"),
        (["[2001:db8::7]:4711"], "2001:db8::7"),
        (["[2001:db8::7]"], "2001:db8::7"),
        (["[2001:db8::7]:_hidden, 10.0.0.1:_proxy"], "2001:db8::7"),
        (["2001:db8::4711"], "2001:db8::4711"),
        # The hop before one that cannot be read does not take its place.
        *(
            ([f"203.0.113.7,{hop},10.0.0.1"], None)
            for hop in (
                *(
                    "nonsense",
                    "unknown",
                    "unix:",
                    "_hidden",
                    "fe80::7%eth0",
                    "203.0.113.7 10.0.0.1",
                ),
                *("[2001:db8::7]x", "[2001:db8::7]:", "[2001:db8::7", "[203.0.113.7]", "[]:80"),
                *(
                    "\u00a0203.0.113.7",
                    "203.0.113.7\u00a0",
                    "203.0.113.7\x0b",
                    "203.0.113.7:123456",
                ),
                *("203.0.113.7:port", "203.0.113.7:", "for=203.0.113.7", "203.0.113.007", "[]"),
                *(":80", "\u00e9\u0000", "9" * 300),
            )
        ),
        ([""], None),
        ([" ,", "\t"], None),
        # Only proxies.
        (["10.0.0.1", "fd00::1", "::ffff:10.0.0.9"], None),
    ],
)
def test_what_a_trusted_proxy_forwards(
    peer: str, forwarded_for: list[str], caller: str | None
) -> None:
    assert found(peer, *forwarded_for) == caller


def test_a_chain_of_20_hops_is_read_and_no_longer_one() -> None:
    assert found("127.0.0.1", "203.0.113.7" + ",::1" * 19) == "203.0.113.7"
    assert found("127.0.0.1", "203.0.113.7" + ",::1" * 20) is None
    assert found("127.0.0.1", *["203.0.113.7", *["::1"] * 20]) is None


def test_a_long_hop_takes_no_time_to_refuse() -> None:
    started = time.process_time()
    assert found("127.0.0.1", "[" + ":" * 200_000) is None
    assert time.process_time() - started < 60, "it takes a time that grows with the square"


def test_trusting_nobody_or_everybody() -> None:
    assert found("127.0.0.1", "203.0.113.7", trusted="192.0.2.1") == "127.0.0.1"
    everybody = "0.0.0.0/0,::/0"
    assert found("203.0.113.9", "203.0.113.7, 203.0.113.8", trusted=everybody) is None


@pytest.mark.parametrize(
    ("peer", "forwarded_for", "caller"),
    [
        # The proxy is on another machine: what it forwards is not this machine's, or it lies.
        ("198.51.100.1", "127.0.0.2", None),
        ("198.51.100.1", "127.255.255.255", None),
        ("198.51.100.1", "172.17.0.1", None),  # our docker0
        ("198.51.100.1", "10.0.0.5:4711", None),
        ("198.51.100.1", "[fd00::5]:4711", None),
        ("fd00::9", "127.0.0.2", None),
        ("198.51.100.1", "10.0.0.6", "10.0.0.6"),
        ("198.51.100.1", "fd00::6", "fd00::6"),
        ("198.51.100.1", "198.41.0.5", "198.41.0.5"),  # ours, as the internet has it
        # It is on this machine, as its client may be.
        ("127.0.0.1", "127.0.0.2", "127.0.0.2"),
        ("127.0.0.1", "172.17.0.1", "172.17.0.1"),
        ("198.41.0.4", "10.0.0.5", "10.0.0.5"),
        # That client forwarded it from elsewhere.
        ("127.0.0.1", "127.0.0.2, 198.51.100.1", None),
        ("127.0.0.1", "10.0.0.5, 198.41.0.4", "10.0.0.5"),
        # Nobody's, whoever forwards it.
        *(
            (peer, nobody, None)
            for peer in ("127.0.0.1", "198.51.100.1")
            for nobody in (
                *("0.0.0.0", "0.1.2.3", "224.0.0.1", "240.0.0.1", "255.255.255.255"),  # noqa: S104
                *("::", "ff02::1", "4000::1", "::127.0.0.1", "100::1", "::ffff:0.0.0.0"),
            )
        ),
    ],
)
def test_an_address_that_no_caller_beyond_a_proxy_can_have(
    peer: str, forwarded_for: str, caller: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    trusted = parse_networks("127.0.0.1,198.51.100.1,198.41.0.4,fd00::9")
    callers = CallerResolver(trusted, is_own=is_own)
    for _ in range(3):
        resolved = callers.resolve(request(peer, ("x-forwarded-for", forwarded_for)))
        assert resolved == (parse_address(caller) if caller else None)
    assert len(caplog.messages) == (caller is None)
    if caller is None:
        assert "cannot be the address of a caller beyond it" in caplog.messages[0]


def test_when_the_kernel_cannot_tell_a_forwarded_private_address_is_nobodys(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def cannot_tell(_: Address) -> bool:
        raise CheckFailed("too many open files")

    callers = CallerResolver(PROXIES, is_own=cannot_tell)
    for peer, caller in (("10.0.0.1", None), ("127.0.0.1", "192.168.1.7")):
        resolved = callers.resolve(request(peer, ("x-forwarded-for", "192.168.1.7")))
        assert resolved == (parse_address(caller) if caller else None)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("headers", "caller"),
    [
        ([("user-agent", "golem")], "127.0.0.1"),
        ([("x-forwarded-for", "203.0.113.8"), ("x-forwarded-for", "203.0.113.7")], "203.0.113.7"),
        # A proxy that shows itself and forwards no address is not the caller.
        ([("via", "1.1 proxy")], None),
        ([("forwarded", "for=203.0.113.7")], None),
        ([("x-real-ip", "203.0.113.7")], None),
        *(
            ([(name, "x")], None)
            for name in (
                *("x-forwarded-proto", "x-forwarded-host", "x-forwarded-port", "x-client-ip"),
                *("x-envoy-external-address", "x-envoy-expected-rq-timeout-ms", "cf-connecting-ip"),
                *("true-client-ip", "fly-client-ip", "fastly-client-ip", "x-amzn-trace-id"),
            )
        ),
        ([("x-request-id", "7"), ("traceparent", "00-7-7-00"), ("x-custom", "1")], "127.0.0.1"),
        ([("x-forwarded-for", "203.0.113.7"), ("forwarded", "for=127.0.0.1")], "203.0.113.7"),
    ],
)
def test_the_headers_of_a_request(headers: list[tuple[str, str]], caller: str | None) -> None:
    callers = CallerResolver(PROXIES)
    resolved = callers.resolve(request("127.0.0.1", *headers))
    assert resolved == (parse_address(caller) if caller else None)
    stranger = parse_address("203.0.113.9")
    assert callers.resolve(request("203.0.113.9", *headers)) == stranger
    assert callers.resolve(request(None, *headers)) is None


def test_one_warning_about_a_proxy_that_forwards_no_address(
    caplog: pytest.LogCaptureFixture,
) -> None:
    callers = CallerResolver(PROXIES)
    callers.resolve(request("203.0.113.9", ("via", "1.1 proxy")))
    callers.resolve(request("127.0.0.1"))
    callers.resolve(request("127.0.0.1", ("x-forwarded-for", "unknown"), ("via", "1.1 proxy")))
    assert not caplog.messages
    callers.resolve(request("127.0.0.1", ("via", "1.1 proxy")))
    callers.resolve(request("10.1.2.3", ("via", "1.1 proxy")))
    assert caplog.messages == [
        "The proxy at 127.0.0.1, listed in PORT_CHECKER_TRUSTED_PROXIES, does not forward its "
        "callers' addresses. Configure it to set X-Forwarded-For."
    ]


def test_one_warning_about_a_proxy_that_forwards_what_is_no_address(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for last, logged in ("x y", "x y"), ("x" * 10_000 + "\x9by", "x" * 98 + r"\x9by"):
        caplog.clear()
        callers = CallerResolver(PROXIES)
        for _ in range(3):
            forwarded = request("127.0.0.1", ("x-forwarded-for", f"203.0.113.7, {last}"))
            assert not callers.resolve(forwarded)
        assert caplog.messages == [
            "The proxy at 127.0.0.1, listed in PORT_CHECKER_TRUSTED_PROXIES, forwards what is no "
            f"address: X-Forwarded-For ends in '{logged}'. Its callers are unknown. "
            "Configure it to append the address of its client, alone."
        ]


@pytest.mark.parametrize("nameless", ["unknown", "unix:", "_hidden", ""])
def test_clients_without_an_address_are_nothing_to_warn_of_unless_all_are(
    nameless: str, caplog: pytest.LogCaptureFixture
) -> None:
    for forwarded_before, warnings in (["203.0.113.7"], 0), ([], 1):
        caplog.clear()
        callers = CallerResolver(PROXIES)
        for last in [*forwarded_before, *[nameless] * 30]:
            callers.resolve(request("127.0.0.1", ("x-forwarded-for", last)))
        assert len(caplog.messages) == warnings
    assert "never forwards an address" in caplog.messages[0]


@pytest.mark.parametrize("peer", ["10.0.2.100", "127.0.0.6", "fd00::5", "::ffff:10.0.2.100"])
@pytest.mark.parametrize(
    "strangers",
    [
        [("host", "checker.example")],
        [("host", "203.0.113.1:9000")],
        [("host", "[2001:db8::1]")],
        [("host", "127.0.0.1"), ("x-forwarded-for", "198.51.100.7")],
        [("host", "127.0.0.1"), ("via", "1.1 proxy")],
        [("x-envoy-external-address", "198.51.100.7")],
    ],
)
def test_an_own_address_from_which_others_requests_come_is_nobodys_own(
    peer: str, strangers: list[tuple[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    own = parse_address(peer)
    callers = CallerResolver((), is_own=lambda address: address == own)
    local = [
        "localhost:9000",
        "127.0.0.1",
        "[::1]:9000",
        str(own) if own.version == 4 else f"[{own}]",
    ]
    for host in local:
        assert callers.resolve(request(peer, ("host", host))) == own
    assert callers.resolve(request(peer)) == own  # HTTP/1.0
    assert not callers.is_relay(own)
    for _ in range(3):
        assert callers.resolve(request(peer, *strangers)) == own
        assert callers.is_relay(own)
    (warning,) = caplog.messages
    assert warning.startswith(f"Requests of others come from {own}, an address of this machine's ")


def test_other_addresses_and_trusted_proxies_are_no_relays(
    caplog: pytest.LogCaptureFixture,
) -> None:
    callers = CallerResolver(PROXIES, is_own=is_own)
    for peer in "203.0.113.9", "192.168.1.7", "198.41.0.4", "127.0.0.1":
        callers.resolve(request(peer, ("host", "checker.example")))
        assert not callers.is_relay(parse_address(peer))
    assert not caplog.messages


@pytest.mark.parametrize(
    ("server", "forwarded_for", "caller"),
    [
        (["/run/port-checker.sock", None], "203.0.113.7", "203.0.113.7"),
        (["/run/port-checker.sock", None], "127.0.0.2", "127.0.0.2"),  # on this machine, as it is
        (["/run/port-checker.sock", None], "unknown", None),
        # The peer of a TCP connection that has been reset, and of who knows what.
        (["127.0.0.1", 9000], "203.0.113.7", None),
        (None, "203.0.113.7", None),
    ],
)
def test_a_peer_without_an_address_is_trusted_on_a_unix_socket_alone(
    server: list[str | int | None] | None, forwarded_for: str, caller: str | None
) -> None:
    connection = request(None, ("x-forwarded-for", forwarded_for))
    connection.scope["server"] = server
    resolved = CallerResolver((), is_own=is_own).resolve(connection)
    assert resolved == (parse_address(caller) if caller else None)


def test_a_proxy_on_a_unix_socket_that_forwards_no_address_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    connection = request(None)
    connection.scope["server"] = ["/run/port-checker.sock", None]
    callers = CallerResolver((), is_own=is_own)
    for _ in range(2):
        assert callers.resolve(connection) is None
    (message,) = caplog.messages
    assert message.startswith("The proxy at a Unix socket does not forward its callers' addresses.")
