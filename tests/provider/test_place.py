"""Where this machine is, told from files and interfaces."""

from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path

import pytest

from port_checker.linux import RouteType, accepts_from, interface_kind, route_type, way_to
from port_checker.provider.place import Share, router_of, share_of
from port_checker.provider.report import Router
from tests.support.namespace import loopback_alone, needs_root

DMI = "sys/class/dmi/id"


@pytest.mark.parametrize(
    ("interface", "files", "expected"),
    [
        ("eth0", {}, Router.ROUTER),
        ("eth0", {".dockerenv": ""}, Router.ROUTER),  # a build machine, or the host's network
        ("wg0", {}, Router.VPN),
        ("tailscale0", {}, Router.VPN),
        ("tun0", {".dockerenv": ""}, Router.VPN),
        ("eth0", {f"{DMI}/sys_vendor": "Amazon EC2\n"}, Router.CLOUD),
        ("eth0", {f"{DMI}/product_name": "Google Compute Engine\n"}, Router.CLOUD),
        ("eth0", {f"{DMI}/sys_vendor": "Microsoft Corporation\n"}, Router.ROUTER),  # Hyper-V
        ("eth0", {f"{DMI}/sys_vendor": "LENOVO\n"}, Router.ROUTER),
    ],
)
def test_what_stands_before_this_machine(
    tmp_path: Path, interface: str, files: Mapping[str, str], expected: Router
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert router_of(interface, ip_address("192.168.1.2"), tmp_path) is expected


@needs_root
def test_a_container_has_a_mark_and_a_containers_network(tmp_path: Path) -> None:
    marks = {"bare": "mark", "marked": "run/.containerenv", "grouped": "proc/1/cgroup"}
    for machine, mark in marks.items():
        (tmp_path / machine / mark).parent.mkdir(parents=True)
        (tmp_path / machine / mark).write_text("0::/docker/0123\n")
    # A veth with a container's address, one without, and pasta's or slirp4netns' tap.
    networks = ("veth7", "172.17.0.2"), ("veth7", "192.168.1.2"), ("tap7", "10.1.1.1")
    veth, tap = "ip link add veth7 type veth peer veth8", "ip tuntap add tap7 mode tap"
    with loopback_alone(veth, tap):
        assert (interface_kind("veth7"), interface_kind("lo")) == ("veth", "")
        routers = [
            [router_of(name, ip_address(local), tmp_path / machine) for name, local in networks]
            for machine in marks
        ]
    marked = [Router.CONTAINER, Router.ROUTER, Router.CONTAINER]
    assert routers == [[Router.ROUTER] * 3, marked, marked]


@needs_root
def test_rules_for_tcp_alone_decide_where_connections_go() -> None:
    peer, own, led_here = map(ip_address, ("203.0.113.7", "198.51.100.2", "192.0.2.1"))
    with loopback_alone(
        "ip link add uplink type veth peer router",
        "ip link add vpn type veth peer exit",
        "for link in uplink router vpn exit; do ip link set $link up; done",
        f"ip address add {own}/24 dev uplink",
        "ip route add 203.0.113.0/24 dev uplink",
        "ip route add 203.0.113.0/24 dev vpn table 77",
        f"ip route add local {led_here} dev lo table 77",
        "ip rule add ipproto tcp table 77",
        "echo 1 > /proc/sys/net/ipv4/conf/all/rp_filter",
    ):
        ways = [way.interface for way in (way_to(peer), way_to(peer, own)) if way]
        accepted = [name for name in ("uplink", "vpn") if accepts_from(peer, own, name)]
        kind = route_type(led_here)
    assert (ways, accepted, kind) == (["vpn", "vpn"], ["vpn"], RouteType.LOCAL)


@pytest.mark.parametrize(
    ("interface", "local", "expected"),
    [
        ("eth0", "100.64.0.9", Router.SHARED),
        ("dslite", "192.0.0.2", Router.SHARED),
        ("eth0", "192.0.0.8", Router.ROUTER),
        ("eth0", "100.128.0.1", Router.ROUTER),
        ("tailscale0", "100.64.0.9", Router.VPN),
    ],
)
def test_addresses_that_internet_providers_share_out(
    tmp_path: Path, interface: str, local: str, expected: Router
) -> None:
    assert router_of(interface, ip_address(local), tmp_path) is expected


def blocks(*starts: int, size: int) -> set[int]:
    return {start + n for start in starts for n in range(size)}


EVERY_64 = [50832 + 64 * n for n in range(4)]


@pytest.mark.parametrize(
    ("asked", "reached", "expected"),
    [
        (range(50816, 51072), blocks(*EVERY_64, size=16), Share(16, certain=True)),
        (range(50840, 51072), blocks(*EVERY_64, size=16) & {*range(50840, 51072)}, Share(16, True)),
        (range(50840, 50900), {*range(50840, 50848)}, None),
        (range(50816, 51072), blocks(*EVERY_64[:3], size=16), None),  # one is missing
        (range(50816, 51072), blocks(*EVERY_64, size=16) - {50840}, None),
        (range(1024, 65536), blocks(*range(1040, 65536, 1024), size=16), Share(16, certain=True)),
        (range(50800, 50900), blocks(50832, size=16), Share(16, certain=False)),
        (range(50800, 50900), blocks(50800, size=16), None),  # somebody forwarded the first few
        (range(50800, 50900), blocks(50833, size=16), None),
        (range(50800, 50900), set(range(50800, 50850)), None),
        (range(50800, 50900), {50810}, None),
        (range(50800, 50900), set(), None),
        (range(50816, 50832), blocks(50816, size=16), None),  # all
    ],
)
def test_which_ports_of_a_shared_address_are_ours(
    asked: range, reached: set[int], expected: Share | None
) -> None:
    assert share_of(reached, set(asked) - reached) == expected
