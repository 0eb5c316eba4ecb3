"""Further situations that no report named: the verdict is right, and so is the advice."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from port_checker import advice
from port_checker.provider import Waits
from tests.lab import network
from tests.lab.checks import (
    BOTH,
    LOST,
    OWN,
    PATIENT,
    advised,
    check,
    monitor,
    notes,
    results,
    service,
    start_check,
    traffic,
    translate,
    url_of,
    word,
)
from tests.lab.network import Lab
from tests.lab.xdp import dropping

pytestmark = pytest.mark.xdist_group("lab 4")


def only(chain: str, lab: Lab, name: str, rule: str) -> None:
    lab.run(name, "nft", "add", "rule", "inet", "lab", chain, *rule.split())


@contextmanager
def setting(lab: Lab, name: str, value: str, *paths: str) -> Iterator[None]:
    """Change settings of the kernel for a while."""

    def write(path: str, value: str) -> str:
        file = Path("/proc/sys", path)
        before = file.read_text()
        file.write_text(value)
        return before

    before = [(path, lab.submit(name, write, path, value).result()) for path in paths]
    try:
        yield
    finally:
        for path, old in before:
            lab.submit(name, write, path, old).result()


# The forward


def test_a_forward_of_udp_alone(lab: Lab) -> None:
    ports = lab.take(3)
    rule = f"iif internet udp dport {word(ports)} dnat ip to {OWN[4]}"
    lab._rule("router", "prerouting", rule)
    report = check(lab, "provider", ports, url_of(network.CHECKER))
    assert (report.reachable, advised(report)) == (0, {advice.NOT_FORWARDED})
    assert "(TCP)" in advice.NOT_FORWARDED


def test_a_forward_to_an_address_that_this_machine_had(lab: Lab) -> None:
    ports = lab.take(3)
    rule = f"iif internet tcp dport {word(ports)} dnat ip to 192.168.1.77"
    lab._rule("router", "prerouting", rule)
    report = check(lab, "provider", ports, url_of(network.CHECKER))
    assert (report.reachable, advised(report)) == (0, {advice.NOTHING_ARRIVED})
    assert "present address" in advice.NOTHING_ARRIVED


def test_a_forward_for_some_callers_alone(lab: Lab) -> None:
    ports = lab.take(3)
    source = f"iif internet ip saddr {network.THIRD[4]}"
    lab._rule("router", "prerouting", f"{source} tcp dport {word(ports)} dnat ip to {OWN[4]}")
    report = check(lab, "provider", ports, url_of(network.CHECKER))
    assert (report.reachable, advised(report)) == (0, {advice.NOT_FORWARDED})


def test_a_forward_that_ends_too_early(lab: Lab) -> None:
    ports = lab.take(20)
    lab.forward(ports[:-1])
    report = check(lab, "provider", ports, url_of(network.CHECKER))
    assert results(report) == {
        **dict.fromkeys(ports[:-1], (True, None)),
        ports[-1]: (False, advice.NOT_FORWARDED),
    }


def test_a_forward_to_another_address_of_this_machine(lab: Lab) -> None:
    """A program listens at one of them alone."""
    ports = lab.take(2)
    other = "192.168.1.3"
    lab.run("provider", "ip", "address", "add", f"{other}/24", "dev", "router")
    rule = f"iif internet tcp dport {word(ports)} dnat ip to {other}"
    lab._rule("router", "prerouting", rule)
    listening = lab.listen_at("provider", OWN[4], ports[:1])
    try:
        report = check(lab, "provider", ports, url_of(network.CHECKER))
    finally:
        listening()
        lab.run("provider", "ip", "address", "delete", f"{other}/24", "dev", "router")
    assert results(report) == {
        ports[0]: (False, advice.IN_USE_LOCALLY.format(addresses=OWN[4])),
        ports[1]: (True, None),
    }


def test_well_known_ports_that_the_internet_provider_blocks(lab: Lab) -> None:
    ports = [25, 80, *lab.take(5)]
    for port in ports:
        lab.forward(range(port, port + 1))
    lab._rule("internet", "forward", "tcp dport { 25, 80 } drop")
    report = check(lab, "provider", ports, url_of(network.CHECKER))
    assert report.reachable == 5
    assert {results(report)[port][1] for port in (25, 80)} == {advice.NOTHING_ARRIVED}
    assert advice.LOW_PORTS_BLOCKED.format(ports="25, 80") in report.notes


# What stands between


@BOTH
def test_something_before_a_machine_without_a_router_accepts_everything(
    lab: Lab, version: int
) -> None:
    ports = lab.take(3)
    lab.listen("internet", ports)
    target = {4: "ip daddr 60.0.3.2", 6: "ip6 daddr 2a00:3::2"}[version]
    chain = f"table inet guard{version} {{\nchain in {{ type nat hook prerouting priority dstnat;\n"
    chain += f"{target} tcp dport {word(ports)} redirect\n}}\n}}"
    lab.run("internet", "nft", "-f", "-", stdin=chain)
    report = check(lab, "third", ports, url_of(network.CHECKER, version))
    assert (report.reachable, advised(report)) == (0, {advice.ANSWERED_IN_FRONT})
    lab.run("internet", "nft", "delete", "table", "inet", f"guard{version}")


@pytest.mark.parametrize(
    ("count", "seconds", "waits"),
    [(1, 0, PATIENT), (6, 0, PATIENT), (1, 0.6, replace(PATIENT, late_connections=1.5))],
    ids=["one port", "six ports", "late"],
)
def test_a_proxy_that_accepts_for_everybody(
    lab: Lab, count: int, seconds: float, waits: Waits
) -> None:
    """As docker-proxy does: whoever comes has the proxy's address."""
    ports = lab.take(count)
    with traffic(lab, "router", "proxy", OWN[4], ports[0], ports[-1], seconds):
        lab.wait_until_listening("router", ports)
        report = check(lab, "provider", ports, url_of(network.CHECKER), waits=waits)
    assert (report.reachable, advised(report)) == (count, {None})


def test_a_proxy_before_which_two_servers_come_at_different_times(lab: Lab) -> None:
    """Both have its address: what the later one's request brings is no stranger's."""
    ports = lab.take(2)
    checker = url_of(network.CHECKER)
    other = url_of(network.CHECKER, port=network.SERVICE_PORT + 1)
    with (
        service(lab, "checker", network.SERVICE_PORT + 1),
        traffic(lab, "router", "proxy", OWN[4], ports[0], ports[-1], 0.1),
    ):
        lab.wait_until_listening("router", ports)
        report = check(lab, "provider", ports, checker, other, waits=replace(PATIENT, quiet=0.6))
    assert (report.reachable, advised(report)) == (2, {None})


def test_a_router_that_hides_who_connects_and_a_monitor_behind_it(lab: Lab) -> None:
    """Both come from the router's address; the monitor looks at one port."""
    ports = lab.take(10)
    lab.forward(ports)
    hide = f"oifname provider tcp dport {word(ports)} masquerade"
    lab._rule("router", "postrouting", hide)
    with monitor(lab, "third", network.ROUTER[4], ports[4:5]):
        report = check(lab, "provider", ports, url_of(network.CHECKER), waits=PATIENT)
    assert (report.reachable, advised(report)) == (10, {None})


@BOTH
def test_a_program_before_everything_else(lab: Lab, version: int) -> None:
    """It is named first, and then what stands before this machine."""
    ports = lab.take(3)
    lab.forward(ports)
    with dropping(lab, "provider", "router", ports, version):
        report = check(lab, "provider", ports, url_of(network.CHECKER, version))
    (said,) = advised(report)
    rest = {4: advice.TIMED_OUT, 6: advice.OWN_FIREWALL_FIRST}[version]
    assert said == f"{advice.XDP_FIRST.format(interface='router')} {rest}"


# This machine


@BOTH
def test_replies_that_leave_by_another_interface(lab: Lab, version: int) -> None:
    """A VPN took the route; nothing filters by it."""
    ports = lab.take(5)
    lab.forward(ports)
    family = "ip6" if version == 6 else "ip"
    other = network.CHECKER_SECONDARY[version]
    target = f"{family} daddr {network.PROVIDER[version]} tcp dport {word(ports)}"
    translate(lab, "checker", f"{target} snat {family} to {other}")
    vpn = f"""
        link add wg7 type veth peer wg8
        link set wg7 up
        link set wg8 up
        route add {other} dev wg7
        neigh add {other} lladdr 02:00:00:00:00:01 dev wg7
    """
    lab.run("provider", "ip", "-batch", "-", stdin=vpn)
    try:
        report = check(lab, "provider", ports, url_of(network.CHECKER, version))
    finally:
        lab.run("provider", "ip", "link", "delete", "wg7")
    expected = advice.REPLIES_ELSEWHERE.format(interface="router", other="wg7")
    assert (report.reachable, advised(report)) == (0, {expected})


def test_lost_replies_beside_ports_that_are_not_forwarded(lab: Lab) -> None:
    """Where something arrives, no note says that nothing does."""
    ports = lab.take(6)
    lab.forward(ports[:3])
    lab.drop_answers(ports[:3])
    report = check(lab, "provider", ports, url_of(network.CHECKER))
    assert results(report) == {
        **dict.fromkeys(ports[:3], (False, advice.REPLIES_LOST)),
        **dict.fromkeys(ports[3:], (False, advice.NOT_FORWARDED)),
    }
    assert notes(report) == []


@BOTH
@pytest.mark.parametrize(
    ("priority", "statement"),
    [
        ("raw", "drop"),
        ("mangle", "drop"),
        ("raw", "tcp flags syn tcp option maxseg size 1-9999 drop"),
    ],
)
def test_firewalls_before_the_firewall(
    lab: Lab, version: int, priority: str, statement: str
) -> None:
    ports = lab.take(3)
    lab.forward(ports)
    hook = f"chain in {{ type filter hook prerouting priority {priority};"
    rule = f"tcp dport {word(ports)} {statement}"
    early = f"table inet early {{\n{hook}\n{rule}\n}}\n}}"
    lab.run("provider", "nft", "-f", "-", stdin=early)
    try:
        report = check(lab, "provider", ports, url_of(network.CHECKER, version))
    finally:
        lab.run("provider", "nft", "delete", "table", "inet", "early")
    assert advised(report) == {advice.OWN_FIREWALL}


def test_a_limit_of_six_connections_in_half_a_minute(lab: Lab) -> None:
    """As ``ufw limit`` has it: the rest are not said to be closed."""
    ports = lab.take(20)
    lab.forward(ports)
    meter = "ct state new meter six { ip saddr limit rate over 12/minute burst 5 packets } drop"
    only("input", lab, "provider", f"tcp dport {word(ports)} {meter}")
    report = check(lab, "provider", ports, url_of(network.CHECKER))
    assert 0 < report.reachable < 20
    assert advised(report) - {None} <= {advice.OWN_FIREWALL, advice.BANNED}
    assert re.search(
        "limits how many new connections|defence against port scans", str(report.notes)
    )


@BOTH
@pytest.mark.parametrize("answers", [True, False])
def test_a_container_that_is_published_and_runs(lab: Lab, version: int, answers: bool) -> None:
    """What publishes it holds the ports, as docker-proxy does, and the kernel passes them on."""
    ports = lab.take(3)
    name, address, gateway = {
        4: ("docker4", "172.18.0.2/16", "172.18.0.1"),
        6: ("docker6", "2a00:4:0:18::2/64", "2a00:4:0:18::1"),
    }[version]
    container = address.partition("/")[0]
    lab.forward(ports)
    lab.listen("provider", ports)
    forwarding = "net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"
    family = "ip6" if version == 6 else "ip"
    tables = f"""
        table inet docker {{
            chain in {{
                type nat hook prerouting priority dstnat
                tcp dport {word(ports)} dnat {family} to {container}
            }}
            chain out {{
                type nat hook postrouting priority srcnat
                oifname router {family} saddr {container} masquerade
            }}
        }}
    """
    lab.run("provider", "nft", "-f", "-", stdin=tables)
    with setting(lab, "provider", "1", *forwarding):
        try:
            if name not in lab.machines:
                lab.attach(name, "provider", "eth0", address, gateway)
            if answers:
                lab.listen(name, ports)
            report = check(lab, "provider", ports, url_of(network.CHECKER, version))
        finally:
            lab.run("provider", "nft", "delete", "table", "inet", "docker")
    expected = None if answers else advice.CONTAINER_SILENT.format(address=container)
    assert (report.reachable, advised(report)) == (3 if answers else 0, {expected})


# Addresses and servers


def test_a_temporary_address_that_the_firewall_does_not_allow(lab: Lab) -> None:
    """It allows the stable one, which the owner has written into it."""
    ports = lab.take(3)
    add = ["ip", "address", "add", "2a00:3::8/64", "dev", "internet", "mngtmpaddr"]
    with setting(lab, "third", "2", "net/ipv6/conf/internet/use_tempaddr"):
        lab.run("third", *add)
        try:
            listed = lab.run("third", "ip", "-6", "address", "show", "temporary").stdout
            (temporary,) = re.findall("inet6 (2a00:3:[0-9a-f:]+)/64", listed)
            closed = f"ip6 daddr {temporary} tcp dport {word(ports)} drop"
            lab._rule("internet", "forward", closed)
            report = check(lab, "third", ports, url_of(network.CHECKER, 6), ip=temporary)
            stable = check(lab, "third", ports, url_of(network.CHECKER, 6), ip="2a00:3::2")
        finally:
            lab.run("third", "ip", "address", "delete", "2a00:3::8/64", "dev", "internet")
    assert (report.reachable, advised(report)) == (0, {advice.NETWORK_FIREWALL})
    (note,) = report.notes
    assert "is a temporary address" in note
    assert "2a00:3::2" in note
    assert (stable.reachable, notes(stable)) == (3, [])


def test_an_address_that_changes_meanwhile(lab: Lab) -> None:
    ports = lab.take(3)
    before, after = "60.0.2.7", network.ROUTER[4]
    lab.forward(ports)
    lab.run("router", "ip", "address", "add", f"{before}/24", "dev", "internet")
    dropped = f"ip daddr {before} tcp dport {word(ports)} drop"
    lab._rule("internet", "forward", dropped)
    server = f"{network.CHECKER[4]} tcp dport {network.SERVICE_PORT}"
    table = f"""
        table inet moving {{
            chain out {{
                type nat hook postrouting priority srcnat - 1
                oifname internet ip daddr {server} numgen inc mod 100000 < 1 snat ip to {before}
            }}
        }}
    """
    lab.run("router", "nft", "-f", "-", stdin=table)
    try:
        report = check(lab, "provider", ports, url_of(network.CHECKER))
    finally:
        lab.run("router", "nft", "delete", "table", "inet", "moving")
        lab.run("router", "ip", "address", "delete", f"{before}/24", "dev", "internet")
    assert notes(report) == [advice.ADDRESS_CHANGED.format(before=before, after=after)]


@BOTH
def test_another_check_at_the_same_time(lab: Lab, version: int) -> None:
    """The provider's software asks the same server: its connections are no crossed forwards."""
    ours, theirs = lab.take(4), lab.take(4)
    lab.forward(theirs)
    drop = f"tcp dport {word(ours)} drop"
    lab._rule("internet", "forward", drop)
    server = url_of(network.CHECKER, version)
    checks = [start_check(lab, "provider", ports, server) for ports in (ours, theirs)]
    report, other = (check.result() for check in checks)
    assert (report.reachable, advised(report)) == (0, {LOST[version]})
    assert (other.reachable, advised(other)) == (4, {None})


def test_a_thousand_ports_behind_a_limit_on_new_connections(lab: Lab) -> None:
    """25 a second and 50 at once, as OpenWrt has it; here, ten times as many a second."""
    ports = lab.take(1000)
    lab.forward(ports)
    limit = "ct state new limit rate over 250/second burst 50 packets drop"
    lab.filter("router", "forward", ports, limit)
    waits = Waits(between_groups=0.2, patience=12.0)
    report = check(lab, "provider", ports, url_of(network.CHECKER), waits=waits)
    assert report.reachable == 1000
    (note,) = notes(report)
    assert "limits how many new connections it lets in per second" in note
