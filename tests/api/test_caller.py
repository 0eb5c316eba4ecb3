"""Who the caller is: behind no proxy, one, and several."""

import pytest
from starlette.requests import HTTPConnection

from port_checker.addresses import parse_address, parse_networks
from port_checker.api.caller import CallerResolver, find_caller

PROXIES = parse_networks("127.0.0.1,::1,10.0.0.0/8,fd00::/8")


def found(peer: str | None, *forwarded_for: str) -> str | None:
    caller = find_caller(peer, forwarded_for, PROXIES)
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
        ([", , 203.0.113.7"], "203.0.113.7"),
        # Some proxies add the port.
        (["203.0.113.7:4711, 10.0.0.1:80, [fd00::1]:80"], "203.0.113.7"),
        (["[2001:db8::7]:4711"], "2001:db8::7"),
        (["[2001:db8::7]"], "2001:db8::7"),
        (["2001:db8::4711"], "2001:db8::4711"),
        # The hop before one that cannot be read does not take its place.
        *(
            ([f"203.0.113.7,{hop},10.0.0.1"], None)
            for hop in (
                *("nonsense", "", " ", "unknown", "unix:", "fe80::7%eth0", "203.0.113.7 10.0.0.1"),
                *("203.0.113.7:port", "203.0.113.7:", "for=203.0.113.7", "203.0.113.007", "[]"),
                *(":80", "\u00e9\u0000", "9" * 300),
            )
        ),
        ([""], None),
        (["203.0.113.7", ""], None),
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


def test_trusting_nobody_or_everybody() -> None:
    proxy = parse_address("127.0.0.1")
    assert find_caller("127.0.0.1", ["203.0.113.7"], ()) == proxy
    everybody = parse_networks("0.0.0.0/0,::/0")
    assert find_caller("203.0.113.9", ["203.0.113.7, 203.0.113.8"], everybody) is None


def request(peer: str | None, *headers: tuple[str, str]) -> HTTPConnection:
    return HTTPConnection(
        {
            "type": "http",
            "client": (peer, 4711) if peer else None,
            "headers": [(name.encode(), value.encode()) for name, value in headers],
        }
    )


@pytest.mark.parametrize(
    ("headers", "caller"),
    [
        ([("user-agent", "golem")], "127.0.0.1"),
        ([("x-forwarded-for", "203.0.113.8"), ("x-forwarded-for", "203.0.113.7")], "203.0.113.7"),
        # A proxy that shows itself and forwards no address is not the caller.
        ([("via", "1.1 proxy")], None),
        ([("forwarded", "for=203.0.113.7")], None),
        ([("x-real-ip", "203.0.113.7")], None),
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
