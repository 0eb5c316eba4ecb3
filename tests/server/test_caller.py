"""Who is asking, through no proxy, one, and several."""

import pytest
from starlette.requests import HTTPConnection

from port_checker.addresses import parse_address, parse_networks
from port_checker.server.caller import Callers, find_caller

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
        ("fe80::7%2", "fe80::7"),
        ("127.0.0.1", "127.0.0.1"),  # a proxy asking for itself
        ("::1", "::1"),
        ("10.1.2.3", "10.1.2.3"),
    ],
)
def test_the_peer_is_the_caller(peer: str, caller: str) -> None:
    assert found(peer) == caller


@pytest.mark.parametrize("peer", [None, "", "testclient", "/run/port-checker.sock", "@", "%eth0"])
def test_a_peer_without_an_address_is_unknown(peer: str | None) -> None:
    assert found(peer) is None
    assert found(peer, "203.0.113.7") is None


@pytest.mark.parametrize("peer", ["203.0.113.9", "128.0.0.1", "fe80::1%lo", "2001:db8::1", "::2"])
@pytest.mark.parametrize("forwarded_for", ["203.0.113.7", "127.0.0.1", "", "nonsense"])
def test_a_peer_that_is_not_trusted_forwards_nothing(peer: str, forwarded_for: str) -> None:
    assert found(peer, forwarded_for) == found(peer)


@pytest.mark.parametrize("peer", ["127.0.0.1", "::1", "::ffff:127.0.0.1", "10.1.2.3", "fd00::7%2"])
@pytest.mark.parametrize(
    ("forwarded_for", "caller"),
    [
        (["203.0.113.7"], "203.0.113.7"),
        (["  203.0.113.7\t"], "203.0.113.7"),
        (["2001:db8::7"], "2001:db8::7"),
        (["::ffff:203.0.113.7"], "203.0.113.7"),
        # Trusted hops are skipped, from the right, in one field or several.
        (["203.0.113.7, 10.0.0.1"], "203.0.113.7"),
        (["203.0.113.7,10.0.0.1,fd00::1,::ffff:10.0.0.2"], "203.0.113.7"),
        (["203.0.113.7", "10.0.0.1"], "203.0.113.7"),
        (["203.0.113.7, 10.0.0.1", "10.0.0.2"], "203.0.113.7"),
        # What stands before the first other one is a claim, whatever it looks like.
        (["198.51.100.1, 203.0.113.7"], "203.0.113.7"),
        (["198.51.100.1", "203.0.113.7"], "203.0.113.7"),
        (["127.0.0.1, 203.0.113.7"], "203.0.113.7"),
        (["198.51.100.1, 203.0.113.7, 10.0.0.1"], "203.0.113.7"),
        (["203.0.113.8, 10.0.0.1, 203.0.113.7, 10.0.0.2"], "203.0.113.7"),
        (["nonsense, 203.0.113.7"], "203.0.113.7"),
        ([", , 203.0.113.7"], "203.0.113.7"),
        (["", "203.0.113.7"], "203.0.113.7"),
        # Some proxies add the port.
        (["203.0.113.7:4711"], "203.0.113.7"),
        (["[2001:db8::7]:4711"], "2001:db8::7"),
        (["[2001:db8::7]"], "2001:db8::7"),
        (["203.0.113.7:4711, 10.0.0.1:80, [fd00::1]:80"], "203.0.113.7"),
        (["::7"], "::7"),
        (["2001:db8::4711"], "2001:db8::4711"),
        # The address before them does not count in place of one that nobody can read.
        (["nonsense"], None),
        (["203.0.113.7, nonsense"], None),
        (["203.0.113.7, nonsense, 10.0.0.1"], None),
        (["203.0.113.7", ""], None),
        (["203.0.113.7,"], None),
        (["203.0.113.7,,10.0.0.1"], None),
        (["203.0.113.7, unknown"], None),
        (["unix:"], None),
        (["fe80::7%eth0"], None),
        (["203.0.113.7 10.0.0.1"], None),
        (["203.0.113.7:port"], None),
        (["203.0.113.7:"], None),
        (["for=203.0.113.7"], None),
        (["203.0.113.007"], None),
        (["[]"], None),
        ([":80"], None),
        (["\u00e9\u0000"], None),
        (["9" * 300], None),
        ([""], None),
        (["", ""], None),
        ([" , "], None),
        # Nobody but proxies.
        (["127.0.0.1"], None),
        (["10.0.0.1, 127.0.0.1"], None),
        (["10.0.0.1", "fd00::1", "::ffff:10.0.0.9"], None),
    ],
)
def test_a_trusted_proxy_forwards_the_caller(
    peer: str, forwarded_for: list[str], caller: str | None
) -> None:
    assert found(peer, *forwarded_for) == caller


@pytest.mark.parametrize(
    ("peer", "caller"),
    [("127.0.0.1", None), ("::ffff:10.1.2.3", None), ("203.0.113.7", "203.0.113.7"), (None, None)],
)
def test_a_trusted_proxy_is_not_the_caller(peer: str | None, caller: str | None) -> None:
    found = find_caller(peer, [], PROXIES, is_proxy=True)
    assert found == (parse_address(caller) if caller else None)


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
        ([], "127.0.0.1"),
        ([("x-forwarded-for", "203.0.113.7")], "203.0.113.7"),
        ([("x-forwarded-for", "203.0.113.7"), ("x-forwarded-for", "10.0.0.1")], "203.0.113.7"),
        ([("x-forwarded-for", "203.0.113.8"), ("x-forwarded-for", "203.0.113.7")], "203.0.113.7"),
        ([("x-forwarded-for", "")], None),
        ([("via", "1.1 proxy")], None),
        ([("forwarded", "for=203.0.113.7")], None),
        ([("x-real-ip", "203.0.113.7")], None),
        ([("x-forwarded-for", "203.0.113.7"), ("via", "1.1 proxy")], "203.0.113.7"),
        ([("x-forwarded-for", "203.0.113.7"), ("forwarded", "for=127.0.0.1")], "203.0.113.7"),
        ([("user-agent", "golem")], "127.0.0.1"),
    ],
)
def test_the_fields_of_a_request(headers: list[tuple[str, str]], caller: str | None) -> None:
    found = Callers(PROXIES).find(request("127.0.0.1", *headers))
    assert found == (parse_address(caller) if caller else None)
    stranger = parse_address("203.0.113.9")
    assert Callers(PROXIES).find(request("203.0.113.9", *headers)) == stranger
    assert Callers(PROXIES).find(request(None, *headers)) is None


def test_a_silent_proxy_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    callers = Callers(PROXIES)
    callers.find(request("203.0.113.9", ("via", "1.1 proxy")))
    callers.find(request("127.0.0.1"))
    callers.find(request("127.0.0.1", ("x-forwarded-for", "unknown"), ("via", "1.1 proxy")))
    assert not caplog.messages
    callers.find(request("127.0.0.1", ("via", "1.1 proxy")))
    callers.find(request("10.1.2.3", ("via", "1.1 proxy")))
    (warning,) = caplog.messages
    assert warning == (
        "A proxy at 127.0.0.1, which is in PORT_CHECKER_TRUSTED_PROXIES, forwards no address: "
        "callers behind it are unknown. Let it set X-Forwarded-For."
    )


def test_where_nobody_is_trusted_the_peer_is_the_caller() -> None:
    proxy = parse_address("127.0.0.1")
    assert find_caller("127.0.0.1", ["203.0.113.7"], ()) == proxy


def test_where_everybody_is_trusted_nobody_is_known() -> None:
    everybody = parse_networks("0.0.0.0/0,::/0")
    assert find_caller("203.0.113.9", ["203.0.113.7, 203.0.113.8"], everybody) is None
    assert find_caller("203.0.113.9", [], everybody) == parse_address("203.0.113.9")
