"""Which addresses may be checked: the special ranges, the rules one by one, the kernel's routes."""

import asyncio
import resource
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv6Address, ip_network
from typing import Any

import pytest

from port_checker.addresses import Address, Network, lies_in, parse_address, parse_networks
from port_checker.api.targets import (
    KnownRoutes,
    TargetNotAllowed,
    TargetRules,
    is_own_address,
    special_purpose,
    verify_local_binding,
)
from port_checker.connect import CheckFailed
from port_checker.linux import is_next_hop
from port_checker.schemas import ERROR_EXAMPLES, ErrorCode
from port_checker.settings import Settings
from tests.support.namespace import loopback_alone, needs_root
from tests.support.waiting import wait_until

CALLER = parse_address("198.41.0.4")
STRANGER = parse_address("198.41.0.5")

# What ipaddress takes for global, in some or all versions of Python: anycast services, ranges of
# protocols, wrappers of IPv4, and a documentation range of 2024.
FURTHER_SPECIAL = parse_networks(
    "192.0.0.0/24,192.31.196.0/24,192.52.193.0/24,192.88.99.0/24,192.175.48.0/24,"
    "2001::/23,2002::/16,2620:4f:8000::/48,3fff::/20"
)


# Public addresses inside of Azure, Google Cloud and IBM Cloud.
CLOUDS = parse_networks(
    "168.63.129.16,199.36.153.4/30,199.36.153.8/30,161.26.0.0/16,166.8.0.0/14,"
    "2600:2d00:2:1000::/64,2600:2d00:2:2000::/64"
)


def is_public_unicast(address: Address) -> bool:
    """The oracle: the standard library's tables instead of the service's."""
    return not (
        address.is_private
        or address.is_multicast
        or address.is_reserved
        or not address.is_global
        or (isinstance(address, IPv6Address) and address not in ip_network("2000::/3"))
        or lies_in(address, FURTHER_SPECIAL)
        or lies_in(address, CLOUDS)
    )


def edges_of(network: Network) -> list[Address]:
    """The first and last address of a network, and those next to it."""
    first, last = int(network.network_address), int(network.broadcast_address)
    make = type(network.network_address)
    return [
        make(n) for n in (first - 1, first, last, last + 1) if 0 <= n < 1 << make(0).max_prefixlen
    ]


# The rows of the IANA special-purpose registries, and multicast.
# https://www.iana.org/assignments/iana-ipv4-special-registry
# https://www.iana.org/assignments/iana-ipv6-special-registry
SPECIAL = parse_networks(
    "0.0.0.0/8,10.0.0.0/8,100.64.0.0/10,127.0.0.0/8,169.254.0.0/16,172.16.0.0/12,192.0.0.0/24,"
    "192.0.2.0/24,192.31.196.0/24,192.52.193.0/24,192.88.99.0/24,192.168.0.0/16,192.175.48.0/24,"
    "198.18.0.0/15,198.51.100.0/24,203.0.113.0/24,224.0.0.0/4,240.0.0.0/4,"
    "::/128,::1/128,::/96,64:ff9b::/96,64:ff9b:1::/48,100::/64,100:0:0:1::/64,2000::/3,2001::/32,"
    "2001:2::/48,2001::/23,2001:db8::/32,2002::/16,2620:4f:8000::/48,3fff::/20,5f00::/16,fc00::/7,"
    "fe80::/10,fec0::/10,ff00::/8"
)


def test_special_ranges_agree_with_the_standard_library() -> None:
    """At their edges, and at an address in each /12 of IPv4 and each /16 of IPv6."""
    probes: list[Address] = [edge for network in SPECIAL + CLOUDS for edge in edges_of(network)]
    probes += [IPv4Address((block << 20) + 1) for block in range(1 << 12)]
    probes += [IPv6Address((block << 112) + (1 << 90)) for block in range(1 << 16)]
    assert [it for it in probes if (special_purpose(it) is None) != is_public_unicast(it)] == []
    assert special_purpose(IPv6Address("::ffff:8.8.8.8")) == "a reserved address"  # not unwrapped


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("10.1.2.3", "a private address"),
        ("100.64.0.1", "a shared address (CGNAT)"),
        ("127.0.0.1", "a loopback address"),
        ("169.254.169.254", "a link-local address"),
        ("203.0.113.7", "a documentation address"),
        ("::1", "a loopback address"),
        ("::7f00:1", "an IPv4-compatible address"),
        ("64:ff9b::a00:1", "an IPv4 address behind NAT64"),
        ("2001::1", "an IPv4 address behind Teredo"),
        ("2001:2::1", "a benchmarking address"),
        ("2001:20::1", "reserved for protocols"),
        ("2002:a00:1::1", "an IPv4 address behind 6to4"),
        ("fd00::7", "a private address"),
        ("4000::1", "a reserved address"),
    ],
)
def test_a_special_address_is_refused_and_named(address: str, kind: str) -> None:
    for caller in str(CALLER), None:
        refusal = refused(address, caller=caller)
        assert refusal.startswith(f"{address} is {kind}. You may check your own address")


def require(rules: TargetRules, caller: Address | None, target: Address) -> None:
    """Require that a target is allowed, in a loop of its own."""
    asyncio.run(rules.require_allowed(caller, target))


def refused(
    target: str,
    *,
    caller: str | None = str(CALLER),
    own: str = "",
    gateway: str = "",
    **settings: Any,
) -> str:
    """Why a machine with the address ``own`` and this gateway does not check; empty if it does."""
    rules = TargetRules(
        Settings(**settings),
        is_own=lambda address: str(address) == own,
        is_gateway=lambda address: str(address) == gateway,
    )
    try:
        require(rules, parse_address(caller) if caller else None, parse_address(target))
    except TargetNotAllowed as refusal:
        return str(refusal)
    return ""


@pytest.mark.parametrize("address", ["198.41.0.4", "127.0.0.1", "192.168.1.100", "::1", "fd00::7"])
def test_callers_may_check_their_own_address(address: str) -> None:
    for settings in {}, {"targets": "caller"}:
        assert not refused(address, caller=address, **settings)
        assert not refused(address, caller=address, own=address, **settings)
        assert refused(address, caller=None, own=address, **settings)


@pytest.mark.parametrize("address", ["169.254.7.7", "fe80::7"])
def test_link_local_addresses_are_nobodys_own(address: str) -> None:
    for settings in {}, {"targets": "caller"}:
        assert refused(address, caller=address, **settings) == (
            f"{address} is a link-local address, which only means something on its own link. "
            "Connect to this service from another address."
        )


@pytest.mark.parametrize("address", ["172.17.0.1", "100.64.0.1", "fd00::1"])
def test_a_gateways_address_is_not_the_callers(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Everybody behind a NAT in front of the service has it."""
    for settings in {}, {"targets": "caller"}:
        assert refused(address, caller=address, gateway=address, **settings) == (
            f"{address} is the address of a gateway. This service cannot see your own address "
            "behind it."
        )
    assert not refused(address, caller=address, gateway=address, allowed_networks=address)
    caplog.clear()
    rules = TargetRules(Settings(), is_gateway=lambda _: True)
    for _ in range(3):
        with pytest.raises(TargetNotAllowed):
            require(rules, parse_address(address), parse_address(address))
    (warning,) = caplog.messages
    assert warning.startswith(f"Requests come from {address}, a gateway of this machine: a NAT ")
    assert "PORT_CHECKER_TRUSTED_PROXIES" in warning


@pytest.mark.parametrize("address", ["10.0.2.100", "127.0.0.6", "fd00::7"])
def test_an_own_address_from_which_others_requests_come_is_not_the_callers(address: str) -> None:
    rules = TargetRules(
        Settings(),
        is_own=lambda _: True,
        is_gateway=lambda _: False,
        is_relay=lambda it: str(it) == address,
    )
    with pytest.raises(TargetNotAllowed, match="from which others' requests come as well"):
        require(rules, parse_address(address), parse_address(address))
    require(rules, parse_address("127.0.0.1"), parse_address("127.0.0.1"))


@pytest.mark.parametrize("address", ["198.41.0.4", "127.0.0.1", "::1", "2001:4860:4860::8888"])
def test_public_and_loopback_addresses_are_no_hidden_gateways(address: str) -> None:
    assert not refused(address, caller=address, gateway=address)


@pytest.mark.parametrize("address", ["198.51.100.7", "8.8.8.8", "127.0.0.1", "2001:4860::7"])
def test_denied_networks_are_not_checked_whoever_asks(address: str) -> None:
    denied = f"{address},192.0.2.0/24"
    for caller in address, str(CALLER), None:
        assert refused(
            address, caller=caller, denied_networks=denied, allowed_networks=address
        ) == (f"{address} is in a network that this service does not check.")
    assert not refused(str(STRANGER), denied_networks=denied)


def test_others_are_checked_unless_the_operator_forbids_it() -> None:
    for target in "8.8.8.8", "2001:4860:4860::8888":
        for caller in str(CALLER), None:
            assert not refused(target, caller=caller)
            assert refused(target, caller=caller, targets="caller")
            assert refused(target, caller=caller, own=target)


def test_allowed_networks_may_be_checked_by_anybody() -> None:
    networks = "127.0.0.0/8,10.0.0.0/8,fd00::/8,8.8.8.8"
    for target in ("127.0.0.1", "10.1.2.3", "::ffff:10.1.2.3", "fd00::7", "8.8.8.8"):
        for caller in str(CALLER), None:
            assert not refused(target, caller=caller, own=target, allowed_networks=networks)
            assert not refused(target, caller=caller, allowed_networks=networks, targets="caller")
    assert refused("8.8.4.4", allowed_networks=networks, targets="caller")
    for target in ("126.0.0.1", "192.168.0.1", "fc00::7", "::1", "::10.1.2.3"):
        assert refused(target, allowed_networks=networks, own="126.0.0.1")


def test_the_kernel_is_asked_only_where_its_routes_matter() -> None:
    asked: list[tuple[str, Address]] = []

    def question(kind: str) -> Callable[[Address], bool]:
        def ask(address: Address) -> bool:
            asked.append((kind, address))
            return False

        return ask

    rules = TargetRules(
        Settings(allowed_networks=parse_networks("10.0.0.0/8")),
        is_own=question("own"),
        is_gateway=question("gateway"),
    )
    for caller, target in [(CALLER, CALLER), (CALLER, parse_address("10.1.2.3"))]:
        require(rules, caller, target)
    with pytest.raises(TargetNotAllowed):
        require(rules, CALLER, parse_address("127.0.0.1"))
    assert asked == []
    private = parse_address("192.168.0.1")
    require(rules, CALLER, STRANGER)
    require(rules, private, private)
    assert asked == [("own", STRANGER), ("gateway", private)]


@pytest.mark.parametrize(
    ("caller", "target", "settings", "message"),
    [
        (
            str(CALLER),
            str(STRANGER),
            {"own": str(STRANGER)},
            f"{STRANGER} is this service's own address. You may check your own address, {CALLER}.",
        ),
        (
            str(CALLER),
            str(STRANGER),
            {"targets": "caller"},
            "This service does not check other addresses than the caller's. "
            f"You may check your own address, {CALLER}.",
        ),
        (
            None,
            "10.0.0.1",
            {},
            "10.0.0.1 is a private address. You may check your own address, "
            "but this service cannot see which that is.",
        ),
        ("127.0.0.1", "192.168.1.100", {}, ERROR_EXAMPLES[ErrorCode.TARGET_NOT_ALLOWED]),
    ],
)
def test_refusals_say_why_and_what_is_allowed(
    caller: str | None, target: str, settings: dict[str, Any], message: str
) -> None:
    assert refused(target, caller=caller, **settings) == message


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2", "127.255.255.255", "::1"])
def test_loopback_is_this_machines_own(address: str) -> None:
    assert is_own_address(parse_address(address))
    if address != "127.255.255.255":  # broadcast
        verify_local_binding(parse_address(address))


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


def own(*texts: str) -> list[str]:
    """Those that are this machine's."""
    return [text for text in texts if is_own_address(parse_address(text))]


def binding(text: str) -> str | None:
    """Why no local address reaches a target; None if one does."""
    try:
        verify_local_binding(parse_address(text))
    except CheckFailed as failure:
        return str(failure)
    return None


@needs_root
def test_without_a_route_there_is_no_local_binding() -> None:
    with loopback_alone():
        told = [binding(text) for text in ("192.0.2.1", "2001:db8::1", "::1")]
    assert told == [
        "this machine has no route to 192.0.2.1",
        "this machine has no route to 2001:db8::1",
        None,
    ]


@needs_root
def test_a_route_of_another_protocol_says_nothing_of_tcp() -> None:
    targets = ("192.0.2.1", "2001:db8:1::1", "198.51.100.9", "2001:db8:2::1")
    with loopback_alone(
        "ip link add one type veth peer name other",
        "ip address add 203.0.113.5/24 dev one",
        "ip address add 2001:db8::5/64 dev one nodad",
        "ip link set one up",
        "ip link set other up",
        "ip route add default via 203.0.113.1",
        "ip -6 route add default via 2001:db8::1",
        "ip rule add to 192.0.2.0/24 ipproto udp prohibit",
        "ip -6 rule add to 2001:db8:1::/48 ipproto udp prohibit",
        "ip rule add to 198.51.100.0/24 ipproto tcp blackhole",
        "ip -6 rule add to 2001:db8:2::/48 ipproto tcp unreachable",
    ):
        told = list(map(binding, targets))
    no_route = "this machine has no route to "
    assert told == [
        *(None, None),
        *(no_route + target for target in ("198.51.100.9", "2001:db8:2::1")),
    ]


@needs_root
def test_a_source_address_that_does_not_reach_the_target_is_no_binding() -> None:
    beyond = ("192.0.2.1", "2001:db8:1::1")
    here = ("169.254.9.9", "fe80::9", "127.0.0.1", "::1", "169.254.7.7")
    with loopback_alone(
        "ip link add one type veth peer name other",
        "ip link set one addrgenmode none",  # the kernel's own comes a moment later
        "ip address add 169.254.7.7/16 dev one",
        "ip address add fe80::5/64 dev one nodad",
        "ip link set one up",
        "ip link set other up",
        "ip route add default dev one",
        "ip -6 route add default via fe80::1 dev one",
    ):
        ipv4, ipv6, *rest = map(binding, (*beyond, *here))
    only = "this machine has only the address "
    assert ipv4 == f"{only}169.254.7.7 for 192.0.2.1, which does not reach it"
    assert ipv6 == f"{only}fe80::5 for 2001:db8:1::1, which does not reach it"
    assert rest == [None] * 5


@needs_root
def test_a_machine_without_an_address_has_no_binding() -> None:
    with loopback_alone(
        "ip address flush dev lo",
        "ip link add one type veth peer name other",
        "ip link set one up",
        "ip route add default dev one",
    ):
        told = binding("192.0.2.1")
    assert told == "this machine has no address from which it could reach 192.0.2.1"


@needs_root
def test_the_addresses_of_an_interface_are_ours() -> None:
    """The secondary ones, too, and no others of its networks."""
    near = [f"{network}{host}" for network in ("198.51.100.", "2001:db8::") for host in (5, 6, 7)]
    ours = ["198.51.100.5", "198.51.100.6", "2001:db8::5", "2001:db8::6", "198.51.100.255"]
    with loopback_alone(
        "ip link add one type veth peer name other",
        "ip address add 198.51.100.5/24 dev one",
        "ip address add 198.51.100.6/24 dev one",
        "ip address add 2001:db8::5/64 dev one nodad",
        "ip address add 2001:db8::6/64 dev one nodad",
        "ip link set one up",
        "ip link set other up",
    ):
        addresses = *near, "198.51.100.255", "192.0.2.1", "2001:db8:1::1"
        # The kernel adds the routes to IPv6 addresses later.
        wait_until(lambda: own(*addresses) == ours, "the routes")
        assert list(map(binding, near)) == [None] * 6
        assert binding("192.0.2.1") == "this machine has no route to 192.0.2.1"


@needs_root
def test_the_addresses_of_a_local_route_are_ours() -> None:
    """Those of routes that prohibit, or lead nowhere, are not."""
    addresses = [
        *("192.0.2.5", "192.0.3.5", "198.51.100.1", "198.51.100.129", "203.0.113.1"),
        *("2001:db8:1::5", "2001:db8:2::5", "2001:db8:3::5", "2001:db8:4::5", "2001:db8:5::5"),
    ]
    with loopback_alone(
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
    ):
        assert own(*addresses) == ["192.0.2.5", "2001:db8:1::5"]


def test_the_event_loop_goes_on_while_the_routes_are_looked_through() -> None:
    private = parse_address("192.168.0.1")
    looked, went_on = threading.Event(), threading.Event()

    def is_gateway(_: Address) -> bool:
        looked.set()
        return not went_on.wait(60)

    async def run() -> None:
        rules = TargetRules(Settings(), is_gateway=is_gateway)
        check = asyncio.create_task(rules.require_allowed(private, private))
        while not looked.is_set():
            await asyncio.sleep(0.001)
        went_on.set()
        await check

    asyncio.run(run())


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (OSError(24, "Too many open files"), "Too many open files"),
        (MemoryError(), "out of memory"),
        (RuntimeError("can't start new thread"), "can't start new thread"),
    ],
)
def test_routes_that_cannot_be_looked_through_are_the_checkers_failure(
    trouble: Exception, words: str
) -> None:
    def fail(_: Address) -> bool:
        raise trouble

    private = parse_address("192.168.0.1")
    with pytest.raises(CheckFailed, match=words):
        require(TargetRules(Settings(), is_gateway=fail), private, private)


@needs_root
def test_the_next_hops_of_routes_are_gateways() -> None:
    """Of both IP versions, in every table, of several at once, of IPv4 through IPv6."""
    gateways = [
        *("198.51.100.1", "198.51.100.2", "198.51.100.3", "198.51.100.4", "198.51.100.5"),
        *("2001:db8::1", "2001:db8::2", "2001:db8::3", "2001:db8::4", "2001:db8::5"),
    ]
    others = ["198.51.100.6", "198.51.100.7", "127.0.0.1", "2001:db8::6", "2001:db8::7", "10.1.0.0"]
    with loopback_alone(
        "ip link add one type veth peer name other",
        "ip address add 198.51.100.6/24 dev one",
        "ip address add 2001:db8::6/64 dev one nodad",
        "ip link set one up",
        "ip link set other up",
        "ip route add default via 198.51.100.1",
        "ip route add 10.1.0.0/16 nexthop via 198.51.100.2 nexthop via 198.51.100.3",
        "ip route add 10.2.0.0/16 via 198.51.100.4 table 77",
        "ip route add 10.3.0.0/16 nexthop via inet6 2001:db8::4 dev one nexthop via 198.51.100.5",
        "ip route add 10.4.0.0/16 via inet6 2001:db8::5 dev one",
        "ip -6 route add default via 2001:db8::1",
        "ip -6 route add fd01::/16 nexthop via 2001:db8::2 nexthop via 2001:db8::3",
    ):
        told = [text for text in gateways + others if is_next_hop(parse_address(text))]
    assert told == gateways


@needs_root
def test_what_is_known_of_routes_follows_the_kernels_changes() -> None:
    """It is asked again only where something has changed, or after a while."""
    asked: list[Address] = []

    def is_own(address: Address) -> bool:
        asked.append(address)
        return is_own_address(address)

    seconds = [0.0]
    address = parse_address("203.0.113.7")
    with loopback_alone():
        known = KnownRoutes(clock=lambda: seconds[0])
        assert [known.ask(is_own, address) for _ in range(3)] == [False] * 3
        assert len(asked) == 1
        for change, expected in ("add", True), ("del", False):
            subprocess.run(["ip", "address", change, f"{address}/32", "dev", "lo"], check=True)
            assert [known.ask(is_own, address) for _ in range(3)] == [expected] * 3
        assert len(asked) == 3
        seconds[0] = 60
        assert not known.ask(is_own, address)
        assert len(asked) == 4
