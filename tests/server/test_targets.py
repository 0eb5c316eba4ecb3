"""Who may be checked: the registries as tables, the rules one by one, the kernel's answers."""

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any

import pytest

from port_checker.addresses import Address, lies_in, parse_address, parse_networks
from port_checker.connect import CheckFailed
from port_checker.schemas import ERROR_EXAMPLES, ErrorCode
from port_checker.server.settings import Settings
from port_checker.server.targets import (
    TargetNotAllowed,
    is_own_address,
    require_allowed,
    verify_local_binding,
)
from tests.support.namespace import in_namespace, needs_root

CALLER = parse_address("198.41.0.4")
STRANGER = parse_address("198.41.0.5")

# Every row of the IANA registries, whether it says "globally reachable" or not, and multicast; and
# what the service calls them. https://www.iana.org/assignments/iana-ipv4-special-registry
NOT_PUBLIC_IPV4 = {
    "0.0.0.0/8": "an address of this network",
    "0.0.0.0/32": "an address of this network",
    "10.0.0.0/8": "a private address",
    "100.64.0.0/10": "a shared address of a provider's NAT",
    "127.0.0.0/8": "a loopback address",
    "169.254.0.0/16": "a link-local address",
    "172.16.0.0/12": "a private address",
    "192.0.0.0/24": "reserved for protocols",
    "192.0.0.0/29": "reserved for protocols",
    "192.0.0.8/32": "reserved for protocols",  # dummy
    "192.0.0.9/32": "reserved for protocols",  # PCP anycast
    "192.0.0.10/32": "reserved for protocols",  # TURN anycast
    "192.0.0.170/32": "reserved for protocols",  # NAT64 discovery
    "192.0.0.171/32": "reserved for protocols",
    "192.0.2.0/24": "a documentation address",
    "192.31.196.0/24": "an AS112 anycast address",
    "192.52.193.0/24": "an AMT anycast address",
    "192.88.99.0/24": "a 6to4 relay's anycast address",
    "192.88.99.2/32": "a 6to4 relay's anycast address",  # 6a44
    "192.168.0.0/16": "a private address",
    "192.175.48.0/24": "an AS112 anycast address",
    "198.18.0.0/15": "a benchmarking address",
    "198.51.100.0/24": "a documentation address",
    "203.0.113.0/24": "a documentation address",
    "224.0.0.0/4": "a multicast address",
    "233.252.0.0/24": "a multicast address",  # for documentation
    "240.0.0.0/4": "a reserved address",
    "255.255.255.255/32": "a reserved address",
}
# https://www.iana.org/assignments/iana-ipv6-special-registry
NOT_PUBLIC_IPV6 = {
    "::1/128": "a loopback address",
    "::/128": "the unspecified address",
    # The IPv4-compatible ::/96, but for those two.
    "::2/127": "an IPv4-compatible address",
    "::8000:0/97": "an IPv4-compatible address",
    "::ffff:0:0/96": "a reserved address",  # when nobody has made it the IPv4 address that it is
    "64:ff9b::/96": "an IPv4 address behind NAT64",
    "64:ff9b:1::/48": "an IPv4 address behind NAT64",
    "100::/64": "a discard-only address",
    "100:0:0:1::/64": "a dummy address",
    # 2001::/23 by its rows and its second half.
    "2001::/32": "an IPv4 address behind Teredo",
    "2001:1::1/128": "reserved for protocols",  # PCP anycast
    "2001:1::2/128": "reserved for protocols",  # TURN anycast
    "2001:1::3/128": "reserved for protocols",  # DNS-SD SRP anycast
    "2001:2::/48": "a benchmarking address",
    "2001:3::/32": "reserved for protocols",  # AMT
    "2001:4:112::/48": "reserved for protocols",  # AS112
    "2001:10::/28": "reserved for protocols",  # ORCHID
    "2001:20::/28": "reserved for protocols",  # ORCHIDv2
    "2001:30::/28": "reserved for protocols",  # DRIP
    "2001:100::/24": "reserved for protocols",
    "2001:db8::/32": "a documentation address",
    "2002::/16": "an IPv4 address behind 6to4",
    "2620:4f:8000::/48": "an AS112 anycast address",
    "3fff::/20": "a documentation address",
    "5f00::/16": "a segment routing identifier",
    "fc00::/7": "a private address",
    "fe80::/10": "a link-local address",
    "ff00::/8": "a multicast address",
    # All else outside of 2000::/3.
    "1::1/128": "a reserved address",
    "200::/7": "a reserved address",  # once mapped NSAP addresses
    "400::/6": "a reserved address",
    "800::/5": "a reserved address",
    "1000::/4": "a reserved address",
    "4000::/3": "a reserved address",
    "6000::/3": "a reserved address",
    "8000::/2": "a reserved address",
    "c000::/3": "a reserved address",
    "e000::/4": "a reserved address",
    "f000::/5": "a reserved address",
    "f800::/6": "a reserved address",
    "fe00::/9": "a reserved address",
    "fec0::/10": "a reserved address",  # once site-local
}
NOT_PUBLIC = NOT_PUBLIC_IPV4 | NOT_PUBLIC_IPV6
# The addresses next to those ranges, one below and one above, where they are public.
NEIGHBOURS = """
    1.0.0.0
    9.255.255.255 11.0.0.0
    100.63.255.255 100.128.0.0
    126.255.255.255 128.0.0.0
    169.253.255.255 169.255.0.0
    172.15.255.255 172.32.0.0
    191.255.255.255 192.0.1.0
    192.0.1.255 192.0.3.0
    192.31.195.255 192.31.197.0
    192.52.192.255 192.52.194.0
    192.88.98.255 192.88.100.0
    192.167.255.255 192.169.0.0
    192.175.47.255 192.175.49.0
    198.17.255.255 198.20.0.0
    198.51.99.255 198.51.101.0
    203.0.112.255 203.0.114.0
    223.255.255.255
    2000::
    2000:ffff:ffff:ffff:ffff:ffff:ffff:ffff 2001:200::
    2001:db7:ffff:ffff:ffff:ffff:ffff:ffff 2001:db9::
    2001:ffff:ffff:ffff:ffff:ffff:ffff:ffff 2003::
    2620:4f:7fff:ffff:ffff:ffff:ffff:ffff 2620:4f:8001::
    3ffe:ffff:ffff:ffff:ffff:ffff:ffff:ffff 3fff:1000::
    3fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff
"""
# Ones that providers and everybody else have.
ORDINARY = """
    1.1.1.1 8.8.8.8 46.4.0.1 88.198.0.1 141.95.0.1 192.0.66.2 192.1.0.1 198.41.0.4 203.0.0.1
    2001:200:0:1::1 2001:470::1 2001:4860:4860::8888 2400:cb00::1 2606:4700:4700::1111 2620:fe::fe
    2a01:4f8::1 2a02:c207::1 2c0f:f248::1
"""


def allowed(
    target: Address | str,
    *,
    caller: Address | None = CALLER,
    own: tuple[str, ...] = (),
    **settings: Any,
) -> bool:
    """Whether ``caller`` may have ``target`` checked on a machine that has ``own``."""
    address = parse_address(target) if isinstance(target, str) else target
    mine = {parse_address(text) for text in own}
    try:
        require_allowed(caller, address, Settings(**settings), lambda it: it in mine)
    except TargetNotAllowed as refusal:
        message = str(refusal)
        assert "Ask for the address that you ask from" in message
        assert caller is None or f", {caller}." in message
        return False
    return True


@pytest.mark.parametrize(("network", "name"), NOT_PUBLIC.items())
def test_what_is_not_public_is_refused_and_told_why(network: str, name: str) -> None:
    """The first, the last and one amid; made here, so that none is taken for a mapped one."""
    first = ip_network(network).network_address
    last = ip_network(network).broadcast_address
    for number in (int(first), (int(first) + int(last)) // 2, int(last)):
        address = type(first)(number)
        assert not allowed(address, caller=None)
        with pytest.raises(TargetNotAllowed) as refusal:
            require_allowed(CALLER, address, Settings(), lambda _: False)
        told = f"{address} is {name}. Ask for the address that you ask from, {CALLER}."
        assert str(refusal.value) == told


@pytest.mark.parametrize("address", [*NEIGHBOURS.split(), *ORDINARY.split()])
def test_public_addresses(address: str) -> None:
    assert allowed(address)
    assert allowed(address, caller=None)


def test_what_is_in_no_range_is_public() -> None:
    """Next to each range, and in each /12 of IPv4 and each /16 of the public IPv6."""
    ranges = [ip_network(text) for text in (*NOT_PUBLIC, "::/96", "2001::/23")]
    probes = [IPv4Address((block << 20) + 1) for block in range(1 << 12)]
    probes6 = [IPv6Address((block << 112) + (1 << 90)) for block in range(0x2000, 0x4000)]
    neighbours = [
        type(edge)(number)
        for network in ranges
        for edge, step in ((network.network_address, -1), (network.broadcast_address, 1))
        if 0 <= (number := int(edge) + step) < 1 << edge.max_prefixlen
    ]
    public_ipv6 = ip_network("2000::/3")
    settings = Settings()
    public: set[Address] = set()
    for address in (*probes, *probes6, *neighbours):
        refused = lies_in(address, ranges) or (address.version == 6 and address not in public_ipv6)
        try:
            require_allowed(None, address, settings, lambda _: False)
        except TargetNotAllowed:
            assert refused
        else:
            assert not refused
            public.add(address)
    assert public.intersection(neighbours) == {ip_address(text) for text in NEIGHBOURS.split()}


@pytest.mark.parametrize(
    "address",
    [
        "198.41.0.4",
        "127.0.0.1",
        "192.168.1.100",
        "100.64.0.1",
        "169.254.1.1",
        "::1",
        "fe80::1",
        "fd00::7",
        "2001:4860:4860::8888",
    ],
)
@pytest.mark.parametrize("targets", ["public", "caller"])
def test_a_callers_own_address_always(address: str, targets: str) -> None:
    caller = parse_address(address)
    assert allowed(caller, caller=caller, targets=targets)
    assert allowed(caller, caller=caller, own=(address,), targets=targets)


@pytest.mark.parametrize("address", ["127.0.0.1", "192.168.1.100", "::1", "fe80::1", "::"])
def test_an_unknown_caller_has_no_address_of_its_own(address: str) -> None:
    assert not allowed(address, caller=None)


def test_only_the_callers_own_where_the_operator_says_so() -> None:
    assert not allowed("8.8.8.8", targets="caller")
    assert not allowed("8.8.8.8", targets="caller", caller=None)
    assert not allowed("127.0.0.1", targets="caller")
    assert not allowed("2001:4860:4860::8888", targets="caller")


def test_allowed_networks_open_what_they_name() -> None:
    networks = "127.0.0.0/8,10.0.0.0/8,fd00::/8,8.8.8.8"
    for target in ("127.0.0.1", "10.1.2.3", "::ffff:10.1.2.3", "fd00::7", "8.8.8.8"):
        for caller in (CALLER, None):
            assert allowed(target, caller=caller, allowed_networks=networks)
            assert allowed(target, caller=caller, allowed_networks=networks, own=(target,))
            assert allowed(target, caller=caller, allowed_networks=networks, targets="caller")
    for target in ("128.0.0.1", "11.0.0.1", "8.8.4.4"):
        assert allowed(target, allowed_networks=networks)
        assert not allowed(target, allowed_networks=networks, targets="caller")
    for target in ("126.0.0.1", "192.168.0.1", "fc00::7", "::1", "::10.1.2.3"):
        assert not allowed(target, allowed_networks=networks, own=("126.0.0.1",))


@pytest.mark.parametrize("own", ["198.41.0.5", "2001:4860:4860::8888"])
def test_the_checkers_own_address_is_refused_to_others(own: str) -> None:
    assert not allowed(own, own=(own,))
    assert not allowed(own, own=(own,), caller=None)
    assert allowed(own)


def test_only_public_targets_cost_the_kernel_a_question() -> None:
    asked: list[Address] = []

    def is_own(address: Address) -> bool:
        asked.append(address)
        return False

    settings = Settings(allowed_networks=parse_networks("10.0.0.0/8"))
    require_allowed(CALLER, CALLER, settings, is_own)
    require_allowed(CALLER, parse_address("10.1.2.3"), settings, is_own)
    with pytest.raises(TargetNotAllowed):
        require_allowed(CALLER, parse_address("127.0.0.1"), settings, is_own)
    assert asked == []
    require_allowed(CALLER, STRANGER, settings, is_own)
    assert asked == [STRANGER]


def test_mapped_addresses_are_ipv4_addresses() -> None:
    assert allowed("::ffff:8.8.8.8")
    assert not allowed("::ffff:10.1.2.3")
    assert not allowed("::ffff:127.0.0.1")
    assert not allowed("::ffff:198.41.0.5", own=("198.41.0.5",))
    assert allowed("::ffff:10.1.2.3", caller=parse_address("10.1.2.3"))
    assert allowed("10.1.2.3", caller=parse_address("::ffff:10.1.2.3"))


def test_the_other_refusals() -> None:
    with pytest.raises(TargetNotAllowed) as refusal:
        require_allowed(CALLER, STRANGER, Settings(), lambda _: True)
    assert str(refusal.value).startswith(f"{STRANGER} is this service's own address. Ask for ")
    with pytest.raises(TargetNotAllowed) as refusal:
        require_allowed(CALLER, STRANGER, Settings(targets="caller"), lambda _: False)
    assert str(refusal.value).startswith("Only a caller's own address is checked here. Ask for ")
    with pytest.raises(TargetNotAllowed) as refusal:
        require_allowed(None, parse_address("::1"), Settings(), lambda _: False)
    assert str(refusal.value).endswith(" Ask for the address that you ask from.")


def test_the_documented_refusal() -> None:
    target, caller = parse_address("192.168.1.100"), parse_address("127.0.0.1")
    with pytest.raises(TargetNotAllowed) as refusal:
        require_allowed(caller, target, Settings(), lambda _: False)
    assert str(refusal.value) == ERROR_EXAMPLES[ErrorCode.TARGET_NOT_ALLOWED]


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2", "::1"])
def test_loopback_is_ours_and_can_be_bound(address: str) -> None:
    assert is_own_address(parse_address(address))
    verify_local_binding(parse_address(address))


def test_a_broadcast_address_is_ours() -> None:
    assert is_own_address(parse_address("127.255.255.255"))


@contextmanager
def no_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("ask", [is_own_address, verify_local_binding])
def test_running_out_of_descriptors_is_the_checkers_failure(
    ask: Callable[[Address], object],
) -> None:
    with pytest.raises(CheckFailed, match="Too many open files"), no_descriptors():
        ask(parse_address("127.0.0.1"))


PRELUDE = """
import json
from port_checker.addresses import parse_address
from port_checker.connect import CheckFailed
from port_checker.server.targets import is_own_address, verify_local_binding

def own(*texts):
    return [text for text in texts if is_own_address(parse_address(text))]

def binding(text):
    try:
        verify_local_binding(parse_address(text))
    except CheckFailed as failure:
        return str(failure)
"""


@needs_root
def test_without_a_route_there_is_no_local_binding() -> None:
    script = 'print(json.dumps([binding(text) for text in ("192.0.2.1", "2001:db8::1", "::1")]))'
    assert json.loads(in_namespace(PRELUDE + script)) == [
        "no route to 192.0.2.1: Network is unreachable",
        "no route to 2001:db8::1: Network is unreachable",
        None,
    ]


@needs_root
def test_the_addresses_of_an_interface_are_ours() -> None:
    """The secondary ones, too, and no others of its networks."""
    script = """
near = "198.51.100.5 198.51.100.6 198.51.100.7 2001:db8::5 2001:db8::6 2001:db8::7".split()
told = [own(*near, "198.51.100.255", "192.0.2.1", "2001:db8:1::1")]
print(json.dumps([*told, [binding(text) for text in near], binding("192.0.2.1")]))
"""
    ours = ["198.51.100.5", "198.51.100.6", "2001:db8::5", "2001:db8::6", "198.51.100.255"]
    told = in_namespace(
        PRELUDE + script,
        "ip link add one type veth peer name other",
        "ip address add 198.51.100.5/24 dev one",
        "ip address add 198.51.100.6/24 dev one",
        "ip address add 2001:db8::5/64 dev one nodad",
        "ip address add 2001:db8::6/64 dev one nodad",
        "ip link set one up",
        "ip link set other up",
    )
    unreachable = "no route to 192.0.2.1: Network is unreachable"
    assert json.loads(told) == [ours, [None] * 6, unreachable]


@needs_root
def test_the_addresses_of_a_local_route_are_ours() -> None:
    """Those of routes that prohibit, or lead nowhere, are not."""
    script = """
print(json.dumps(own(
    "192.0.2.5", "192.0.3.5", "198.51.100.1", "198.51.100.129", "203.0.113.1",
    "2001:db8:1::5", "2001:db8:2::5", "2001:db8:3::5", "2001:db8:4::5", "2001:db8:5::5",
)))
"""
    told = in_namespace(
        PRELUDE + script,
        "ip address add 2001:db8::1/128 dev lo",
        "ip route add local 192.0.2.0/24 dev lo",
        "ip route add local 2001:db8:1::/64 dev lo",
        "ip route add default dev lo",
        "ip -6 route add default dev lo",
        "ip route add prohibit 198.51.100.0/25",
        "ip route add blackhole 198.51.100.128/25",
        "ip route add unreachable 203.0.113.0/24",
        "ip route add prohibit 2001:db8:3::/64",
        "ip route add blackhole 2001:db8:4::/64",
        "ip route add unreachable 2001:db8:5::/64",
    )
    assert json.loads(told) == ["192.0.2.5", "2001:db8:1::5"]
