"""A page of situations: what a provider's owner is told in each, over IPv4 and IPv6.

Each situation is a network, made by a function, and the sentences that the owner must get. The
provider's machine is behind a router, which translates addresses for IPv4 alone; the third's
machine has its public addresses itself.
"""

import contextlib
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from port_checker import advice
from tests.lab import network
from tests.lab.checks import ANSWERED, check, notes, results, service, url_of, word
from tests.lab.network import Lab

pytestmark = pytest.mark.xdist_group("lab 2")

ONE_COMMAND = [sys.executable, "-m", "port_checker", "check", "--json"]
REFUSED, TIMED_OUT, NO_ROUTE = "Connection refused", "Connection timed out", "No route to host"


# Networks


def forwarded(lab: Lab, ports: range) -> None:
    lab.forward(ports)


def the_first_packet_is_lost(lab: Lab, ports: range) -> None:
    lab.forward(ports)
    lab.drop_at_first(ports, 0.5)


def not_forwarded(_lab: Lab, _ports: range) -> None:
    """Refused by the router itself."""


def forwarded_to_a_machine_that_does_not_listen(lab: Lab, ports: range) -> None:
    lab.forward(ports, network.NEIGHBOUR)


def answered_by_a_neighbour(lab: Lab, ports: range) -> None:
    lab.listen("neighbour", ports)
    lab.forward(ports, network.NEIGHBOUR)


def answered_by_the_router(lab: Lab, ports: range) -> None:
    lab.take_over(ports)


def router_drops(lab: Lab, ports: range) -> None:
    lab.forward(ports)
    lab.filter("router", "forward", ports, "drop")


def router_rejects(lab: Lab, ports: range) -> None:
    lab.forward(ports)
    lab.filter("router", "forward", ports, "reject with icmpx host-unreachable")


def replies_get_lost(lab: Lab, ports: range) -> None:
    lab.forward(ports)
    lab.drop_answers(ports)


def own_firewall(machine: str, statement: str) -> Callable[[Lab, range], None]:
    def arrange(lab: Lab, ports: range) -> None:
        if machine == "provider":
            lab.forward(ports)
        lab.filter(machine, "input", ports, statement)

    arrange.__name__ = f"own firewall: {statement}"
    return arrange


def a_firewall_before_the_machine(lab: Lab, ports: range) -> None:
    lab.filter("internet", "forward", ports, "drop")


def a_program_has_them(lab: Lab, ports: range) -> None:
    lab.forward(ports)
    lab.listen("provider", ports)


# The table

Row = tuple[str, str | None, str | None]  # local binding, error and advice
REACHABLE: Row = ("bound", None, None)


@dataclass(frozen=True)
class Situation:
    """What is arranged, and what the owner must be told of every port.

    Attributes:
        arrange: Makes the network.
        expected: The row that all ports make, by IP version; no key, no check.
        notes: What is true of all ports, by IP version.
        machine: Where the program runs.
        count: How many ports.
    """

    arrange: Callable[[Lab, range], None]
    expected: Mapping[int, Row]
    notes: Mapping[int, Sequence[str]] = field(default_factory=dict)
    machine: str = "provider"
    count: int = 20

    def __str__(self) -> str:
        return f"{self.arrange.__name__} ({self.machine}, {self.count})".replace("_", " ")


def both(local: str, error: str | None, sentence: str | None) -> dict[int, Row]:
    return dict.fromkeys((4, 6), (local, error, sentence))


CGNAT = {4: [advice.SHARED_ADDRESS.format(ip=network.PROVIDER[4])]}
STATEMENTS = {
    "drop": {4: TIMED_OUT, 6: TIMED_OUT},
    "reject": {4: REFUSED, 6: REFUSED},
    "reject with tcp reset": {4: REFUSED, 6: REFUSED},
    "reject with icmpx host-unreachable": {4: NO_ROUTE, 6: NO_ROUTE},
    "reject with icmpx admin-prohibited": {4: NO_ROUTE, 6: "Permission denied"},
}
SITUATIONS = [
    Situation(forwarded, both(*REACHABLE)),
    Situation(the_first_packet_is_lost, both(*REACHABLE), count=5),
    Situation(a_program_has_them, both("in use", None, None)),
    Situation(not_forwarded, {4: ("bound", REFUSED, advice.NOT_FORWARDED)}, CGNAT),
    Situation(not_forwarded, {4: ("bound", REFUSED, advice.NOT_FORWARDED)}, CGNAT, count=1),
    Situation(
        forwarded_to_a_machine_that_does_not_listen,
        {
            4: ("bound", REFUSED, advice.NOT_FORWARDED),
            6: ("bound", REFUSED, advice.NETWORK_FIREWALL),
        },
        CGNAT,
    ),
    Situation(
        answered_by_a_neighbour,
        {version: ("bound", None, said) for version, said in ANSWERED.items()},
    ),
    Situation(
        answered_by_the_router,
        {version: ("bound", None, said) for version, said in ANSWERED.items()},
    ),
    Situation(
        router_drops,
        {
            4: ("bound", TIMED_OUT, advice.NOTHING_ARRIVED),
            6: ("bound", TIMED_OUT, advice.NETWORK_FIREWALL),
        },
        CGNAT,
    ),
    Situation(
        router_rejects,
        {
            4: ("bound", NO_ROUTE, advice.ROUTER_REJECTS),
            6: ("bound", NO_ROUTE, advice.NETWORK_FIREWALL),
        },
        CGNAT,
    ),
    Situation(replies_get_lost, both("bound", TIMED_OUT, advice.REPLIES_LOST)),
    *(
        Situation(
            own_firewall(machine, statement),
            {version: ("bound", errors[version], advice.OWN_FIREWALL) for version in (4, 6)},
            machine=machine,
        )
        for machine in ("provider", "third")
        for statement, errors in STATEMENTS.items()
    ),
    Situation(
        own_firewall("third", "drop"),
        both("bound", TIMED_OUT, advice.OWN_FIREWALL),
        machine="third",
        count=1,
    ),
    Situation(
        own_firewall("provider", "drop"),
        both("bound", TIMED_OUT, advice.OWN_FIREWALL),
        count=1,
    ),
    Situation(
        a_firewall_before_the_machine,
        both("bound", TIMED_OUT, advice.NETWORK_FIREWALL),
        machine="third",
    ),
]


@pytest.mark.parametrize("situation", SITUATIONS, ids=str)
def test_each_situation_has_its_sentences(lab: Lab, situation: Situation) -> None:
    ports = lab.take(situation.count)
    situation.arrange(lab, ports)
    with ThreadPoolExecutor() as pool:
        checks = {
            version: pool.submit(
                check, lab, situation.machine, ports, url_of(network.CHECKER, version)
            )
            for version in situation.expected
        }
    for version, running in checks.items():
        report = running.result()
        rows = {(port.local, port.error, port.advice) for port in report.ports}
        assert rows == {situation.expected[version]}, version
        assert notes(report) == situation.notes.get(version, []), version


@pytest.mark.parametrize("version", [4, 6])
def test_crossed_forwards_are_named(lab: Lab, version: int) -> None:
    """Each port but the last leads to the next one, and a forward of the last is missing."""
    ports = lab.take(50)
    lab.cross(ports[:-1], 1)
    lab.filter("internet", "forward", ports[-1:], "reject with tcp reset")
    report = check(lab, "provider", ports, url_of(network.CHECKER, version))
    assert report.reachable == 0
    assert {results(report)[port] for port in ports[:-1]} == {(False, advice.CROSSED)}
    assert report.ports[-1].error == REFUSED
    assert [port.arrives_at for port in report.ports] == [*ports[1:], None]
    assert notes(report) == [
        advice.FORWARDS_CROSSED.format(
            outer=word(ports[:-1]),
            inner=word(ports[1:]),
            pairs=f"{word(ports[:-1])}:{word(ports[1:])}",
        )
    ]


def test_two_ports_that_are_exchanged_are_found_behind_a_router(lab: Lab) -> None:
    """All is accessible and every listener sees a connection."""
    ports = lab.take(10)
    lab.cross(ports[3:4], 1)
    lab.cross(ports[4:5], -1)
    lab.forward(ports[:3])
    lab.forward(ports[5:])
    report = check(lab, "provider", ports, url_of(network.CHECKER))
    assert [port.port for port in report.ports if not port.reachable] == list(ports[3:5])
    assert [port.arrives_at for port in report.ports[3:5]] == [ports[4], ports[3]]


@pytest.mark.parametrize("version", [4, 6])
def test_outer_and_inner_ports_may_differ(lab: Lab, version: int) -> None:
    ports = lab.take(40)
    outer, inner = ports[:20], ports[20:]
    lab.cross(outer, 20)
    server = url_of(network.CHECKER, version)
    report = check(lab, "provider", [*zip(outer, inner, strict=True)], server)
    assert results(report) == dict.fromkeys(outer, (True, None))
    assert notes(report) == []
    # Who does not say so is not told falsehoods.
    report = check(lab, "provider", ports, server)
    assert {results(report)[port] for port in outer} == {(False, advice.CROSSED)}
    # Without translation the inner ports can be reached as well.
    assert report.reachable == (20 if version == 6 else 0)


def test_a_hundred_ports_of_which_ten_are_not_forwarded(lab: Lab) -> None:
    ports = lab.take(100)
    forgotten = ports[40:50]
    lab.forward(ports[:40])
    lab.forward(ports[50:])
    report = check(lab, "provider", ports, url_of(network.CHECKER))
    assert [port for port, (good, _) in results(report).items() if not good] == list(forgotten)
    assert {results(report)[port][1] for port in forgotten} == {advice.NOT_FORWARDED}
    assert notes(report) == []


def test_ports_that_the_server_may_not_connect_to_cost_no_other_its_verdict(
    lab: Lab,
) -> None:
    ports = lab.take(20)
    lab.forward(ports)
    lab.filter("checker", "output", ports[3:5], "reject")
    report = check(lab, "provider", ports, url_of(network.CHECKER))
    assert report.reachable == 18
    assert [results(report)[port] for port in ports[3:5]] == [(False, advice.SERVER_CANNOT)] * 2
    assert notes(report) == []


def test_a_server_on_this_machine_says_nothing_about_the_world(lab: Lab) -> None:
    with service(lab, "provider"):
        for host in ("127.0.0.1", network.PROVIDER_BEHIND_NAT):
            server = url_of({4: host})
            report = check(lab, "provider", lab.take(5), server)
            assert report.reachable == 5
            assert notes(report) == [advice.SERVER_HERE.format(url=server)]


def test_a_server_on_the_same_network_says_nothing_about_the_world(lab: Lab) -> None:
    server = url_of(network.NEIGHBOUR)
    with service(lab, "neighbour"):
        report = check(lab, "provider", lab.take(5), server)
    assert report.reachable == 5
    assert notes(report) == [
        advice.SERVER_NEARBY.format(url=server, ip=network.PROVIDER_BEHIND_NAT)
    ]


def test_a_nat_before_the_server_hides_its_callers(lab: Lab) -> None:
    """The neighbour's service is reached as Docker's would be: it sees its router for everybody."""
    ports, port = lab.take(5), lab.take(1)
    lab.forward(port, network.NEIGHBOUR)
    masquerade = f"oifname neighbour tcp dport {port[0]} masquerade"
    lab.run("router", "nft", "add", "rule", "inet", "lab", "postrouting", masquerade)
    server = url_of(network.ROUTER, port=port[0])
    with service(lab, "neighbour", port[0]):
        report = check(lab, "third", ports, server)
        given = check(lab, "third", ports, server, ip=network.THIRD[4])
    assert notes(report) == [advice.NAT_BEFORE_SERVER.format(url=server, ip="192.168.2.1")]
    assert not report.reachable
    for port_report in report.ports:
        assert port_report.advice
        assert port_report.advice.startswith(
            (advice.CALLER_HIDDEN, advice.NOT_CHECKED.format(reason="")[:-2])
        )
    assert (given.reachable, notes(given)) == (5, [])


def test_connections_of_this_machine_do_not_get_in_the_way(lab: Lab) -> None:
    """With the ephemeral range on the ports: three times in a row, and all can be bound after."""
    ports = lab.take(100)
    lab.forward(ports)
    own_range = "/proc/sys/net/ipv4/ip_local_port_range"
    reserved = "/proc/sys/net/ipv4/ip_local_reserved_ports"

    def set_range(value: str) -> str:
        before = Path(own_range).read_text()
        Path(own_range).write_text(value)
        return before

    def bind_all_without_reuseaddr() -> None:
        with contextlib.ExitStack() as stack:
            for port in ports:
                sock = stack.enter_context(socket.socket())
                sock.bind(("", port))
                sock.listen()

    before = lab.submit("provider", set_range, f"{ports[0]} {ports[-1]}").result()
    try:
        for _ in range(3):
            report = check(lab, "provider", ports, url_of(network.CHECKER))
            assert report.reachable == 100
            lab.submit("provider", bind_all_without_reuseaddr).result()
        # Another program's outgoing connection takes one of them.
        where = (network.CHECKER[4], network.SERVICE_PORT)
        outgoing = lab.submit("provider", socket.create_connection, where, 30).result()
        with outgoing:
            port = outgoing.getsockname()[1]
            report = check(lab, "provider", ports, url_of(network.CHECKER))
        assert report.reachable == 99
        assert results(report)[port] == (False, advice.OUTGOING_CONNECTION)
        assert notes(report) == [advice.RESERVE_PORTS.format(ports=word(ports))]
        lab.submit("provider", Path(reserved).write_text, word(ports)).result()
        with pytest.raises(OSError, match="Cannot assign"):
            lab.submit("provider", socket.create_connection, where, 30).result()
    finally:
        lab.submit("provider", Path(reserved).write_text, "\n").result()
        lab.submit("provider", set_range, before).result()


def test_programs_that_have_a_port_and_are_not_reached(lab: Lab) -> None:
    ports = lab.take(5)
    lab.forward(ports)
    loopback, ipv6_only, full, bound, firewalled = ports

    def hold() -> list[socket.socket]:
        held = [
            socket.create_server(("127.0.0.1", loopback)),
            socket.create_server(("::", ipv6_only), family=socket.AF_INET6),
            socket.create_server(("", full), backlog=1),
            socket.create_server(("", firewalled)),
            socket.socket(),
        ]
        held[-1].bind(("", bound))
        while True:  # until its backlog is full
            client = socket.socket()
            held.append(client)
            client.settimeout(1)
            if client.connect_ex(("127.0.0.1", full)):
                return held

    lab.filter("provider", "input", range(firewalled, firewalled + 1), "drop")
    held = lab.submit("provider", hold).result()
    try:
        report = check(lab, "provider", ports, url_of(network.CHECKER))
    finally:
        for sock in held:
            sock.close()
    assert {port.local for port in report.ports} == {"in use"}
    assert {port: text for port, (_, text) in results(report).items()} == {
        loopback: advice.IN_USE_LOCALLY.format(addresses="127.0.0.1"),
        ipv6_only: advice.IN_USE_OTHER_FAMILY.format(family="IPv4"),
        full: advice.IN_USE_NOT_ACCEPTING.format(queued=2),
        bound: advice.IN_USE_NOT_LISTENING,
        firewalled: advice.OWN_FIREWALL,
    }
