"""Machines that have no router of their owner's: what they are told fits the place.

All of them see this machine's own /.dockerenv, if it has one: a mark alone says nothing.
"""

from pathlib import Path

import pytest

from port_checker import advice
from port_checker.provider import Report
from tests.lab import network
from tests.lab.checks import advised, check, monitor, run, url_of, word
from tests.lab.network import Lab

pytestmark = pytest.mark.xdist_group("lab 2")

CGNAT = advice.SHARED_ADDRESS.format(ip=network.ROUTER[4])
# Commands that come first, in a mount namespace of the program's own.
PODMAN = "mount -t tmpfs tmpfs /run && touch /run/.containerenv"
CLOUD = (
    "mount -t tmpfs tmpfs /sys/class && mkdir -p /sys/class/dmi/id && "
    "echo Amazon EC2 > /sys/class/dmi/id/sys_vendor"
)


def check_in(lab: Lab, machine: str, ports: range, setup: str) -> Report:
    """Run the program on a machine of which files tell something."""
    behind = ["unshare", "--mount", "sh", "-c", f'{setup} && exec "$@"', "sh"]
    words = [word(ports), "--server", url_of(network.CHECKER, 4)]
    return run(lab, machine, *words, behind=behind)


def publish(lab: Lab, ports: range, to: str, match: str = "iif internet") -> None:
    rule = f"{match} tcp dport {word(ports)} dnat ip to {to}"
    lab._rule("router", "prerouting", rule)


def test_a_container_whose_host_refuses(lab: Lab) -> None:
    """Without ``-p``; and with it."""
    lab.attach("container", "router", "eth0", "172.17.0.2/16", "172.17.0.1")
    ports = lab.take(3)
    report = check_in(lab, "container", ports, PODMAN)
    assert (report.reachable, advised(report), report.notes) == (0, {advice.IN_CONTAINER}, [])
    # A build machine has such a network now and then, too, but no mark that counts.
    unmarked = check(lab, "container", ports, url_of(network.CHECKER))
    assert advised(unmarked) == {expected_without_a_mark()}
    publish(lab, ports, "172.17.0.2")
    assert check_in(lab, "container", ports, PODMAN).reachable == 3


def expected_without_a_mark() -> str:
    """This machine may be a container itself, with a mark of its own."""
    marked = any(Path(mark).exists() for mark in ("/.dockerenv", "/run/.containerenv"))
    return advice.IN_CONTAINER if marked else advice.NOT_FORWARDED


def test_a_marked_machine_with_an_ordinary_network_is_no_container(lab: Lab) -> None:
    ports = lab.take(3)
    report = check_in(lab, "provider", ports, PODMAN)
    assert (advised(report), report.notes) == ({advice.NOT_FORWARDED}, [CGNAT])


@pytest.mark.parametrize("interface", ["wg0", "tun0"])
def test_a_vpns_exit(lab: Lab, interface: str) -> None:
    """It refuses, as most do; it drops; and it forwards, as few do."""
    number = {"wg0": 2, "tun0": 3}[interface]
    address, gateway = f"10.{number}.0.2", f"10.{number}.0.1"
    lab.attach(f"vpn{number}", "router", interface, f"{address}/24", gateway)
    refused, dropped, forwarded = (lab.take(3) for _ in range(3))
    lab._rule("internet", "forward", f"tcp dport {word(dropped)} drop")
    publish(lab, forwarded, address)
    expected = advice.BEHIND_VPN.format(interface=interface)
    for ports in refused, dropped:
        report = check(lab, f"vpn{number}", ports, url_of(network.CHECKER))
        assert (advised(report), report.notes) == ({expected}, [])
    assert advised(check(lab, f"vpn{number}", forwarded, url_of(network.CHECKER))) == {None}


def test_a_cloud_with_one_to_one_nat(lab: Lab) -> None:
    """All is passed on to the machine but what the security group drops."""
    local, public = "10.0.5.6", "60.0.2.5"
    lab.attach("cloud", "router", "ens5", f"{local}/20", "10.0.0.1")
    lab.run("router", "ip", "address", "add", f"{public}/24", "dev", "internet")
    table = f"""
        table inet cloud {{
            chain in {{
                type nat hook prerouting priority dstnat - 1
                ip daddr {public} dnat ip to {local}
            }}
            chain out {{
                type nat hook postrouting priority srcnat - 1
                oifname internet ip saddr {local} snat ip to {public}
            }}
        }}
    """
    lab.run("router", "nft", "-f", "-", stdin=table)
    grouped, opened, own, taken = (lab.take(3) for _ in range(4))
    lab.filter("router", "forward", grouped, "drop")
    lab.run("cloud", "nft", "-f", "-", stdin=network.FILTERS)
    lab.filter("cloud", "input", own, "drop")
    accept = f"iif internet ip daddr {public} tcp dport {word(taken)} redirect to :{taken[0]}"
    lab.listen("router", taken[:1])
    lab.run("router", "nft", "insert", "rule", "inet", "cloud", "in", *accept.split())
    for ports, said in (
        (grouped, advice.IN_CLOUD),
        (own, advice.OWN_FIREWALL),
        (taken, advice.ANSWERED_IN_FRONT),
    ):
        report = check_in(lab, "cloud", ports, CLOUD)
        assert (advised(report), "CGNAT" in str(report.notes)) == ({said}, False)
    report = check_in(lab, "cloud", opened, CLOUD)
    assert (report.reachable, report.ip) == (3, public)


@pytest.mark.parametrize(
    ("interface", "address", "gateway"),
    [
        ("dslite", "192.0.0.2/29", "192.0.0.1"),  # as with 464XLAT
        ("wwan0", "100.66.7.8/10", "100.64.0.1"),
    ],
)
def test_an_address_of_the_internet_providers_nat(
    lab: Lab, interface: str, address: str, gateway: str
) -> None:
    lab.attach(interface, "router", interface, address, gateway)
    report = check(lab, interface, lab.take(3), url_of(network.CHECKER))
    assert advised(report) == {advice.BEHIND_PROVIDERS_NAT}
    assert report.notes == [advice.SHARED_ADDRESS_HERE.format(local=address.partition("/")[0])]


@pytest.mark.parametrize("certain", [True, False])
def test_an_address_that_is_shared_by_ports(lab: Lab, certain: bool) -> None:
    """All ports are forwarded, but others' never get to the router (RFC 7597)."""
    start = lab.take(512)[0]
    first = (start + 255) // 256 * 256
    ports = range(first, first + (256 if certain else 64))
    lab.forward(ports)
    customer = f"tcp dport {word(ports)} tcp dport & 48 != 16 drop"
    lab._rule("internet", "forward", customer)
    report = check(lab, "provider", ports, url_of(network.CHECKER))
    mine = [port for port in ports if port & 48 == 16]
    assert [port.port for port in report.ports if port.reachable] == mine
    blocks = ", ".join(f"{port}-{port + 15}" for port in mine[::16])
    note = advice.PORTS_SHARED if certain else advice.PORTS_PERHAPS_SHARED
    assert note.format(ports=blocks, size=16, ip=network.ROUTER[4]) in report.notes
    others = advice.NOT_IN_SHARE if certain else advice.NOTHING_ARRIVED
    assert advised(report) == {None, others}


@pytest.mark.parametrize("loops", [True, False])
def test_whether_the_router_loops_its_public_address_back(lab: Lab, loops: bool) -> None:
    """That is a note and no verdict."""
    ports = lab.take(3)
    to = network.PROVIDER_BEHIND_NAT
    publish(lab, ports, to, f"ip daddr {network.ROUTER[4]}" if loops else "iif internet")
    if loops:
        hide = f"oifname provider ip saddr 192.168.1.0/24 tcp dport {word(ports)} masquerade"
        lab._rule("router", "postrouting", hide)
    report = check(lab, "provider", ports, url_of(network.CHECKER))
    note = advice.LOOPED_BACK if loops else advice.NOT_LOOPED_BACK
    assert (report.reachable, report.notes) == (3, [note.format(ip=network.ROUTER[4])])


def test_what_the_router_answers_itself_is_not_looped_back(lab: Lab) -> None:
    """Its own pages, say, which it shows to its own network alone."""
    ports = lab.take(2)
    publish(lab, ports, network.PROVIDER_BEHIND_NAT)
    lab.listen("router", ports)
    with monitor(lab, "provider", "127.0.0.1", ports):
        report = check(lab, "provider", ports, url_of(network.CHECKER))
    expected = [advice.NOT_LOOPED_BACK.format(ip=network.ROUTER[4])]
    assert (report.reachable, report.notes) == (2, expected)
