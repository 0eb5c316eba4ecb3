"""What is an address, what is a network, and that a mapped address is its IPv4 address."""

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import pytest

from port_checker.addresses import (
    Address,
    Network,
    have_one_subscriber,
    lies_in,
    parse_address,
    parse_networks,
    site,
    subscriber,
)

LONGEST = "2001:0db8:0000:0000:0000:0000:198.151.100.255"


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("0.0.0.1", IPv4Address(1)),
        ("127.255.255.254", IPv4Address("127.255.255.254")),
        ("198.51.100.7", IPv4Address("198.51.100.7")),
        ("255.255.255.255", IPv4Address(2**32 - 1)),
        ("::", IPv6Address(0)),
        ("::1", IPv6Address(1)),
        ("2001:DB8::7", IPv6Address("2001:db8::7")),
        (LONGEST, IPv6Address("2001:db8::c697:64ff")),
        ("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", IPv6Address(2**128 - 1)),
        ("::198.51.100.7", IPv6Address("::c633:6407")),  # compatible, which is not mapped
    ],
)
def test_literals_of_both_families(text: str, address: Address) -> None:
    parsed = parse_address(text)
    assert parsed == address
    assert hash(parsed) == hash(address)
    assert parsed.is_loopback == address.is_loopback


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("::ffff:198.51.100.7", "198.51.100.7"),
        ("::FFFF:c633:6407", "198.51.100.7"),
        ("0000:0000:0000:0000:0000:ffff:198.51.100.7", "198.51.100.7"),
        ("::ffff:0:0", "0.0.0.0"),  # noqa: S104  # the first of them, too
    ],
)
def test_a_mapped_address_is_the_ipv4_address(text: str, address: str) -> None:
    assert parse_address(text) == IPv4Address(address)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "provider.example",
        "localhost",
        "2130706433",
        "127.1",
        "127.0.0.1.1",
        "127.0.0.256",
        "0x7f000001",
        "0x7f.0.0.1",
        "0177.0.0.1",
        "1.2.3.04",
        " 127.0.0.1",
        "127.0.0.1 ",
        "127.0.0.1\n",
        "127.0.0.1\0",
        "127.0.0.1:80",
        "127.0.0.1/32",
        "::1/128",
        "[::1]",
        "[::1]:80",
        "::1::",
        "1:2:3:4:5:6:7",
        "1:2:3:4:5:6:7:8:9",
        "12345::",
        "::ffff:01.2.3.4",
        "fe80::1%eth0",
        "::ffff:127.0.0.1%lo",
        "\u0661.2.3.4",  # an Arabic-Indic one
        "\uff11.2.3.4",  # a full-width one
        "\U0001f600",
        "0" + LONGEST,
        "1" * 300,
    ],
)
def test_anything_else_is_no_address(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # parse_address() says no more
        parse_address(text)


@pytest.mark.parametrize(
    ("text", "networks"),
    [
        ("", ()),
        (" , ,", ()),
        ("10.0.0.0/8", (IPv4Network("10.0.0.0/8"),)),
        ("192.0.2.7", (IPv4Network("192.0.2.7/32"),)),
        ("::1", (IPv6Network("::1/128"),)),
        (" 10.0.0.0/8 ,fd00::/8, ", (IPv4Network("10.0.0.0/8"), IPv6Network("fd00::/8"))),
        ("0.0.0.0/0,::/0", (IPv4Network("0.0.0.0/0"), IPv6Network("::/0"))),
        ("::ffff:10.0.0.0/104", (IPv4Network("10.0.0.0/8"),)),
        ("::ffff:10.1.2.3", (IPv4Network("10.1.2.3/32"),)),
        ("::ffff:0:0/96", (IPv4Network("0.0.0.0/0"),)),
        ("::fffe:0:0/95", (IPv6Network("::fffe:0:0/95"),)),  # wider than the mapped ones
    ],
)
def test_networks(text: str, networks: tuple[Network, ...]) -> None:
    assert parse_networks(text) == networks


@pytest.mark.parametrize(
    "text",
    [
        "10.0.0.1/8",
        "10.0.0.0/33",
        "::1/64",
        "::/129",
        "::ffff:0:0/95",
        "10/8",
        "localhost",
        "10.0.0.0/8;::1",
        "10.0.0.0/8,*",
    ],
)
def test_no_networks(text: str) -> None:
    with pytest.raises(ValueError, match=r"does not appear to be|has host bits set"):
        parse_networks(text)


@pytest.mark.parametrize(
    ("address", "inside"),
    [
        ("9.255.255.255", False),
        ("10.0.0.0", True),
        ("10.255.255.255", True),
        ("11.0.0.0", False),
        ("::ffff:10.0.0.1", True),
        ("fd00::", True),
        ("fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", True),
        ("fe00::", False),
        ("::a00:1", False),  # the same number as 10.0.0.1
    ],
)
def test_lying_in_networks(address: str, inside: bool) -> None:
    assert lies_in(parse_address(address), parse_networks("10.0.0.0/8,fd00::/8")) is inside
    assert not lies_in(parse_address(address), ())


@pytest.mark.parametrize(
    ("text", "of_subscriber", "of_site"),
    [
        ("203.0.113.7", "203.0.113.7", None),
        ("::ffff:203.0.113.7", "203.0.113.7", None),
        ("2001:db8::7", "2001:db8::/64", "2001:db8::/48"),
        ("2001:db8:1:2:ffff:ffff:ffff:ffff", "2001:db8:1:2::/64", "2001:db8:1::/48"),
        ("ffff:ffff:ffff:ffff::", "ffff:ffff:ffff:ffff::/64", "ffff:ffff:ffff::/48"),
    ],
)
def test_what_one_subscriber_and_one_site_have(
    text: str, of_subscriber: str, of_site: str | None
) -> None:
    address = parse_address(text)
    assert (subscriber(address), site(address)) == (of_subscriber, of_site)


@pytest.mark.parametrize(
    ("one", "other", "is_one"),
    [
        ("203.0.113.7", "203.0.113.7", True),
        ("203.0.113.7", "203.0.113.8", False),
        ("2001:db8:1:2::", "2001:db8:1:2:ffff:ffff:ffff:ffff", True),
        ("2001:db8:1:2::", "2001:db8:1:3::", False),
        ("::203.0.113.7", "203.0.113.7", False),
        ("203.0.113.7", None, False),
        (None, None, False),
    ],
)
def test_whose_addresses_are_one_subscribers(
    one: str | None, other: str | None, is_one: bool
) -> None:
    addresses = [parse_address(text) if text else None for text in (one, other)]
    assert have_one_subscriber(*addresses) is is_one
