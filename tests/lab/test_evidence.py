"""Whose connection it was, which address it was, whose fault it is: in each, the owner is told so.

Situations in which others connect meanwhile, in which the kernel drops or passes on what arrives,
and in which servers are not where they seem to be.
"""

import contextlib
import itertools
import re
import socket
from pathlib import Path

import pytest

from port_checker import advice
from port_checker.provider import Report, Waits
from tests.lab import network
from tests.lab.checks import (
    ANSWERED,
    BOTH,
    LOOPBACK,
    LOST,
    NOT_HERE,
    OWN,
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

pytestmark = pytest.mark.xdist_group("lab 1")


def only(chain: str, lab: Lab, name: str, rule: str) -> None:
    lab.run(name, "nft", "add", "rule", "inet", "lab", chain, *rule.split())


# Anybody's connection


def test_others_connections_are_not_the_servers(lab: Lab) -> None:
    """The router forwards to a machine that answers; a monitor or a scanner connects here."""
    checks = []
    with contextlib.ExitStack() as meanwhile:
        for version, count, machine, host in [
            (4, 1, "provider", LOOPBACK),
            (6, 10, "provider", LOOPBACK),
            (4, 10, "provider", OWN),
            (6, 1, "provider", OWN),
            (4, 1, "neighbour", OWN),
            (6, 10, "neighbour", OWN),
        ]:
            ports = lab.take(count)
            lab.listen("router", ports)
            lab._rule("router", "prerouting", f"iif internet tcp dport {word(ports)} redirect")
            meanwhile.enter_context(monitor(lab, machine, host[version], ports))
            server = url_of(network.CHECKER, version)
            checks.append((version, start_check(lab, "provider", ports, server)))
        found = [(version, running.result()) for version, running in checks]
    for version, report in found:
        assert (report.reachable, advised(report)) == (0, {ANSWERED[version]})


def test_others_connections_do_not_prove_that_replies_get_lost(lab: Lab) -> None:
    checks = []
    with contextlib.ExitStack() as meanwhile:
        for version, kind, machine, host in [
            (4, "connect", "neighbour", OWN),
            (6, "half-open", "neighbour", OWN),
            (4, "half-open", "third", network.PROVIDER),
            (6, "connect", "third", network.PROVIDER),
        ]:
            ports = lab.take(5)
            lab.forward(ports)
            source = f"ip saddr {network.CHECKER[4]}" if version == 4 else "ip6 saddr 2a00:1::/64"
            lab._rule("internet", "forward", f"{source} tcp dport {word(ports)} drop")
            meanwhile.enter_context(monitor(lab, machine, host[version], ports, kind))
            server = url_of(network.CHECKER, version)
            checks.append((version, start_check(lab, "provider", ports, server)))
        found = [(version, running.result()) for version, running in checks]
    for version, report in found:
        assert (report.reachable, advised(report)) == (0, {LOST[version]})


def test_a_monitor_and_no_forward(lab: Lab) -> None:
    ports = lab.take(3)
    with monitor(lab, "provider", "127.0.0.1", ports):
        report = check(lab, "provider", ports, url_of(network.CHECKER))
    assert (report.reachable, advised(report)) == (0, {advice.NOT_FORWARDED})


# Where a server connects from


@pytest.mark.parametrize("count", [1, 10])
def test_a_server_that_connects_from_another_address(lab: Lab, count: int) -> None:
    """Its peer is learnt, and the neighbour's and the monitor's is not."""
    ports = lab.take(count)
    lab.forward(ports)
    rule = f"ip daddr {network.PROVIDER[4]} tcp dport {word(ports)} snat ip to 60.0.1.3"
    translate(lab, "checker", rule)
    with monitor(lab, "provider", "127.0.0.1", ports):
        report = check(lab, "provider", ports, url_of(network.CHECKER))
    assert (report.reachable, notes(report)) == (count, [])


@pytest.mark.parametrize("count", [1, 10])
def test_a_router_that_hides_who_connects(lab: Lab, count: int) -> None:
    ports = lab.take(count)
    lab.forward(ports)
    hide = f"oifname provider tcp dport {word(ports)} masquerade"
    lab._rule("router", "postrouting", hide)
    report = check(lab, "provider", ports, url_of(network.CHECKER))
    assert (report.reachable, notes(report)) == (count, [])


# Ports in use


@pytest.mark.parametrize("who", ["neighbour", "nobody"])
def test_a_program_that_cannot_have_answered(lab: Lab, who: str) -> None:
    ports = lab.take(4)
    loopback, other_family, bound, everywhere = ports
    if who == "neighbour":
        lab.listen("neighbour", ports)
    lab.forward(ports, network.NEIGHBOUR)

    def hold() -> list[socket.socket]:
        held = socket.socket()
        held.bind(("", bound))
        only_ipv6 = socket.create_server(("::", other_family), family=socket.AF_INET6)
        on_loopback = socket.create_server(("127.0.0.1", loopback))
        return [held, only_ipv6, on_loopback, socket.create_server(("", everywhere))]

    held = lab.submit("provider", hold).result()
    try:
        report = check(lab, "provider", ports, url_of(network.CHECKER))
    finally:
        for sock in held:
            sock.close()
    answered = who == "neighbour"
    assert results(report) == {
        loopback: (False, advice.IN_USE_LOCALLY.format(addresses="127.0.0.1")),
        other_family: (False, advice.IN_USE_OTHER_FAMILY.format(family="IPv4")),
        bound: (False, advice.IN_USE_NOT_LISTENING),
        everywhere: (False, advice.ANSWERED_ELSEWHERE if answered else advice.NOT_FORWARDED),
    }


# Servers that are not outside


def nothing_about_the_world(report: Report) -> bool:
    return any("says nothing about the world" in note for note in notes(report))


@pytest.mark.parametrize("way", ["private", "hairpin"])
def test_a_server_behind_the_same_router(lab: Lab, way: str) -> None:
    """It is given the public address, and the router loops that back."""
    ports, port = lab.take(10), lab.take(1)
    for forwarded, to in ((ports, network.PROVIDER_BEHIND_NAT), (port, network.NEIGHBOUR[4])):
        public = f"ip daddr {network.ROUTER[4]} tcp dport {word(forwarded)} dnat ip to {to}"
        lab._rule("router", "prerouting", public)
    host = network.NEIGHBOUR[4] if way == "private" else network.ROUTER[4]
    with service(lab, "neighbour", port[0]):
        server = url_of({4: host}, port=port[0])
        report = check(lab, "provider", ports, server, ip=network.ROUTER[4])
    assert nothing_about_the_world(report)


@BOTH
def test_a_server_in_the_same_network(lab: Lab, version: int) -> None:
    host = {4: "60.0.3.1", 6: "2a00:3::1"}
    with service(lab, "internet"):
        report = check(lab, "third", lab.take(3), url_of(host, version))
    assert report.reachable == 3
    assert nothing_about_the_world(report)


def test_what_a_server_nearby_reaches_is_not_reached_by_the_world(lab: Lab) -> None:
    ports, port = lab.take(5), lab.take(1)
    lab.filter("internet", "forward", ports, "drop")
    outside, nearby = url_of(network.CHECKER), url_of({4: "60.0.3.1"}, port=port[0])
    with service(lab, "internet", port[0]):
        report = check(lab, "third", ports, nearby, outside)
    assert report.reachable == 0
    assert advised(report) == {advice.NETWORK_FIREWALL}
    assert nothing_about_the_world(report)


def test_a_machine_that_servers_see_at_two_addresses(lab: Lab) -> None:
    """Only one of them is forwarded: what was reached there is not said of the other."""
    ports, port = lab.take(4), lab.take(1)
    here, other = network.ROUTER[4], "60.0.2.3"
    lab.run("router", "ip", "address", "add", f"{other}/24", "dev", "internet")
    try:
        to_second = f"ip daddr {network.THIRD[4]} tcp dport {port[0]}"
        rule = f"oifname internet {to_second} snat ip to {other}"
        lab.run("router", "nft", "insert", "rule", "inet", "lab", "postrouting", rule)
        forward = f"ip daddr {here} tcp dport {word(ports)} dnat ip to {OWN[4]}"
        lab._rule("router", "prerouting", f"iif internet {forward}")
        one, second = url_of(network.CHECKER), url_of(network.THIRD, port=port[0])
        with service(lab, "third", port[0]):
            report = check(lab, "provider", ports, second, one)
    finally:
        lab.run("router", "ip", "address", "delete", f"{other}/24", "dev", "internet")
    assert (report.ip, report.reachable) == (here, 4)
    assert [server.ip for server in report.servers] == [other, here]
    differ, disagree = notes(report)
    listed = f"{other} ({second}), {here} ({one})"
    assert differ == advice.ADDRESSES_DIFFER.format(addresses=listed)
    assert disagree == advice.SERVERS_DISAGREE.format(
        url=second, ports=word(ports), ip=other, error="Connection refused"
    )


def test_servers_that_disagree(lab: Lab) -> None:
    ports, port = lab.take(6), lab.take(1)
    lab.forward(ports)
    source = f"ip saddr {network.THIRD[4]} tcp dport {word(ports[:3])}"
    lab._rule("internet", "forward", f"{source} reject with tcp reset")
    one, other = url_of(network.CHECKER), url_of(network.THIRD, port=port[0])
    with service(lab, "third", port[0]):
        report = check(lab, "provider", ports, one, other)
    assert report.reachable == 6
    (note,) = notes(report)
    assert other in note
    assert word(ports[:3]) in note
    assert "cannot reach" in note


# Advice about the right device


@BOTH
def test_a_firewall_that_allows_the_ports_is_not_blamed_for_background_packets(
    lab: Lab, version: int
) -> None:
    """It denies everything else, and a LAN is noisy: the router does not forward."""
    ports = lab.take(10)
    deny = f"tcp dport {word(ports)} accept"
    for rule in ("ct state established,related accept", deny):
        only("input", lab, "provider", rule)
    only("input", lab, "provider", "meta l4proto udp drop")
    if version == 6:
        lab.filter("router", "forward", ports, "reject with tcp reset", 6)
    with traffic(lab, "router", "noise", "provider", "192.168.1.1", OWN[4], 6000):
        report = check(lab, "provider", ports, url_of(network.CHECKER, version))
    assert advised(report) == {NOT_HERE[version]}


@BOTH
def test_each_port_has_its_own_cause(lab: Lab, version: int) -> None:
    ports = lab.take(35)
    dropped, lost, good = ports[:20], ports[20:30], ports[30:]
    lab.forward(dropped)
    lab.forward(good)
    lab.filter("provider", "input", dropped, "drop")
    lab.filter("router", "forward", lost, "drop")
    report = check(lab, "provider", ports, url_of(network.CHECKER, version))
    expected = {4: advice.NOT_FORWARDED, 6: advice.NETWORK_FIREWALL}[version]
    assert results(report) == (
        dict.fromkeys(dropped, (False, advice.OWN_FIREWALL))
        | dict.fromkeys(lost, (False, expected))
        | dict.fromkeys(good, (True, None))
    )
    assert notes(report) == []


def test_the_reverse_path_filter(lab: Lab) -> None:
    """Replies to the server would leave by another interface, as a VPN's routes make them."""
    ports = lab.take(5)
    lab.forward(ports)
    rule = f"ip daddr {network.PROVIDER[4]} tcp dport {word(ports)} snat ip to 60.0.1.3"
    translate(lab, "checker", rule)
    vpn = "link add wg7 type veth peer wg8\nlink set wg7 up\nlink set wg8 up\n"
    vpn += "route add 60.0.1.3/32 dev wg7"
    lab.run("provider", "ip", "-batch", "-", stdin=vpn)
    setting = Path("/proc/sys/net/ipv4/conf/router/rp_filter")
    lab.submit("provider", setting.write_text, "1").result()
    try:
        report = check(lab, "provider", ports, url_of(network.CHECKER))
    finally:
        lab.submit("provider", setting.write_text, "0").result()
        lab.run("provider", "ip", "link", "delete", "wg7")
    assert advised(report) == {advice.REVERSE_PATH.format(interface="router", other="wg7")}
    assert notes(report) == []


@BOTH
def test_packets_that_are_dropped_before_they_are_counted(lab: Lab, version: int) -> None:
    ports = lab.take(5)
    lab.forward(ports)
    table = "table netdev lab {\nchain in { type filter hook ingress device router priority 0; }\n}"
    lab.run("provider", "nft", "-f", "-", stdin=table)
    drop = f"tcp dport {word(ports)} drop"
    lab.run("provider", "nft", "add", "rule", "netdev", "lab", "in", *drop.split())
    try:
        report = check(lab, "provider", ports, url_of(network.CHECKER, version))
    finally:
        lab.run("provider", "nft", "delete", "table", "netdev", "lab")
    assert advised(report) == {advice.OWN_FIREWALL}


@BOTH
@pytest.mark.parametrize("count", [1, 5])
def test_a_forward_to_a_port_that_nobody_listens_on(lab: Lab, version: int, count: int) -> None:
    ports, wrong = lab.take(count), lab.take(count)
    lab.cross(ports, wrong[0] - ports[0])
    report = check(lab, "provider", ports, url_of(network.CHECKER, version))
    assert [port.advice for port in report.ports] == [
        advice.ARRIVES_UNUSED.format(port=port) for port in wrong
    ]


@BOTH
@pytest.mark.parametrize("answers", [True, False])
def test_a_container_that_takes_the_ports(lab: Lab, version: int, answers: bool) -> None:
    """Its host passes connections on before a listener sees them."""
    ports = lab.take(5)
    lab.forward(ports)
    if answers:
        lab.listen("neighbour", ports)
    family = "ip6" if version == 6 else "ip"
    chains = (
        "table inet nat {\nchain in { type nat hook prerouting priority dstnat; }\n"
        "chain out { type nat hook postrouting priority srcnat; }\n}"
    )
    lab.run("provider", "nft", "-f", "-", stdin=chains)
    to = network.NEIGHBOUR[version]
    rule = f"tcp dport {word(ports)} dnat {family} to {to}"
    lab.run("provider", "nft", "add", "rule", "inet", "nat", "in", *rule.split())
    masquerade = f"{family} daddr {to} masquerade"
    lab.run("provider", "nft", "add", "rule", "inet", "nat", "out", *masquerade.split())
    forwarding = ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"]
    for name in forwarding:
        lab.submit("provider", Path("/proc/sys", name).write_text, "1").result()
    try:
        report = check(lab, "provider", ports, url_of(network.CHECKER, version))
    finally:
        for name in forwarding:
            lab.submit("provider", Path("/proc/sys", name).write_text, "0").result()
        lab.run("provider", "nft", "delete", "table", "inet", "nat")
    assert (report.reachable, advised(report)) == (0, {advice.PASSED_ON.format(address=to)})


@BOTH
def test_replies_that_this_machine_keeps_back(lab: Lab, version: int) -> None:
    ports = lab.take(5)
    lab.forward(ports)
    only("output", lab, "provider", f"tcp sport {word(ports)} drop")
    report = check(lab, "provider", ports, url_of(network.CHECKER, version))
    assert (advised(report), notes(report)) == ({advice.WAY_BACK}, [])


@pytest.mark.parametrize("count", [1, 5])
def test_an_address_of_the_other_family_than_the_servers(lab: Lab, count: int) -> None:
    ports = lab.take(count)
    lab.forward(ports)
    for arrange, expected in (None, None), ("drop", advice.OWN_FIREWALL):
        if arrange:
            lab.filter("provider", "input", ports, arrange)
        server = url_of(network.CHECKER, 6)
        report = check(lab, "provider", ports, server, ip=network.PROVIDER[4])
        if expected and count == 1:  # it stays unclear who came: nothing is said for certain
            assert advised(report) == {advice.TIMED_OUT}
        else:
            assert advised(report) == {expected}


def test_a_defence_against_scans(lab: Lab) -> None:
    """It bans who begins so many connections; the conversation with the server may go on."""
    checks = []
    for (machine, chain), statement, limit in itertools.product(
        (("provider", "input"), ("router", "forward")), ("drop", "reject with tcp reset"), (6, 20)
    ):
        ports = lab.take(60)
        lab.forward(ports)
        banned = f"tcp dport {word(ports)} ct state new"
        count = f"numgen inc mod 100000 >= {limit} {statement}"
        lab._rule(machine, chain, f"{banned} {count}")
        checks.append((limit, start_check(lab, "provider", ports, url_of(network.CHECKER))))
    for limit, running in checks:
        report = running.result()
        assert 0 < report.reachable <= limit
        assert advised(report) == {None, advice.BANNED}
        (note,) = notes(report)
        assert "fail2ban" in note
        assert f"The first {report.reachable} connections" in note


def test_a_defence_that_cuts_the_server_off(lab: Lab) -> None:
    """Its answer gets lost, too: that is not all that is said."""
    count = 5
    ports = lab.take(count + 5)
    lab.forward(ports)
    table = (
        f"table inet ban {{\nset banned {{ type ipv4_addr; flags dynamic; }}\n"
        "chain in { type filter hook input priority -5;\nip saddr @banned drop\n"
        f"tcp dport {word(ports)} ct state new numgen inc mod 100000 >= {count} "
        "add @banned { ip saddr } drop\n}\n}"
    )
    lab.run("provider", "nft", "-f", "-", stdin=table)
    impatient = Waits(connect=2, answer=5, patience=10)
    try:
        report = check(lab, "provider", ports, url_of(network.CHECKER), waits=impatient)
    finally:
        lab.run("provider", "nft", "delete", "table", "inet", "ban")
    said = "\n".join(notes(report))
    assert report.reachable == 0
    assert "fail2ban" in said
    assert f"The first {count} connections" in said


def test_a_temporary_address(lab: Lab) -> None:
    """It is good today, and gone tomorrow."""
    ports = lab.take(3)
    add = ["ip", "address", "add", "2a00:3::7/64", "dev", "internet", "mngtmpaddr"]
    setting = Path("/proc/sys/net/ipv6/conf/internet/use_tempaddr")
    lab.submit("third", setting.write_text, "2").result()
    lab.run("third", *add)
    try:
        listed = lab.run("third", "ip", "-6", "address", "show", "temporary").stdout
        (temporary,) = re.findall("inet6 (2a00:3:[0-9a-f:]+)/64", listed)
        report = check(lab, "third", ports, url_of(network.CHECKER, 6), ip=temporary)
    finally:
        lab.submit("third", setting.write_text, "0").result()
        lab.run("third", "ip", "address", "delete", "2a00:3::7/64", "dev", "internet")
    assert report.reachable == 3
    (note,) = notes(report)
    assert temporary in note
    assert "2a00:3::2" in note
