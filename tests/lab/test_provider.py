"""A page of situations: what a provider's owner is told in each, over IPv4 and IPv6.

Each situation is a network, made by a function, and the sentences that the owner must get. The
provider's machine is behind a router, which translates addresses for IPv4 alone; the third's
machine has its public addresses itself.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest

from port_checker import advice
from tests.lab import network
from tests.lab.network import Lab

ONE_COMMAND = [sys.executable, "-m", "port_checker", "check", "--json"]
# A service that is quicker to call something lost than the defaults are.
QUICK_PORT = 9001
QUICK = {
    "PORT_CHECKER_PORT": str(QUICK_PORT),
    "PORT_CHECK_RETRIES": "2",
    "PORT_CHECK_TIMEOUT": "1.0",
    "PORT_CHECK_RETRY_DELAY": "0.1",
}
REFUSED, TIMED_OUT, NO_ROUTE = "Connection refused", "Connection timed out", "No route to host"


@pytest.fixture(scope="module")
def quick_lab(lab: Lab) -> Lab:
    lab.serve(**QUICK)
    return lab


def url_of(hosts: Mapping[int, str], version: int, port: int = QUICK_PORT) -> str:
    host = hosts[version]
    return f"http://[{host}]:{port}" if version == 6 else f"http://{host}:{port}"


def check(lab: Lab, machine: str, *words: str, server: str) -> Any:
    """Run the program on a machine; return its document."""
    program = lab.popen(
        machine,
        *ONE_COMMAND,
        *words,
        "--server",
        server,
        env={**os.environ},
        output=subprocess.PIPE,
    )
    output, _ = program.communicate(timeout=120)
    document = json.loads(output)
    assert program.returncode == (document["reachable"] < document["total"])
    return document


# Networks


def forwarded(lab: Lab, ports: range) -> None:
    lab.forward(ports)


def lossy(lab: Lab, ports: range) -> None:
    lab.forward(ports)
    lab.lose(ports, 10)


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


def connections_are_limited(lab: Lab, ports: range) -> None:
    lab.forward(ports)
    limit = "ct state new limit rate over 25/second burst 50 packets drop"
    lab.filter("router", "forward", ports, limit)


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
    Situation(lossy, both(*REACHABLE), count=5),
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
    Situation(answered_by_a_neighbour, both("bound", None, advice.ANSWERED_ELSEWHERE)),
    Situation(answered_by_the_router, both("bound", None, advice.ANSWERED_ELSEWHERE)),
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
    Situation(replies_get_lost, both("bound", TIMED_OUT, advice.WAY_BACK), CGNAT),
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
        both("bound", TIMED_OUT, advice.OWN_FIREWALL_FIRST),
        machine="third",
        count=1,
    ),
    Situation(
        own_firewall("provider", "drop"),
        {
            4: ("bound", TIMED_OUT, advice.TIMED_OUT),
            6: ("bound", TIMED_OUT, advice.OWN_FIREWALL_FIRST),
        },
        CGNAT,
        count=1,
    ),
    Situation(
        a_firewall_before_the_machine,
        both("bound", TIMED_OUT, advice.NETWORK_FIREWALL),
        machine="third",
    ),
    Situation(connections_are_limited, {4: REACHABLE}, count=300),
]


@pytest.mark.parametrize("situation", SITUATIONS, ids=str)
def test_each_situation_has_its_sentences(quick_lab: Lab, situation: Situation) -> None:
    ports = quick_lab.take(situation.count)
    situation.arrange(quick_lab, ports)
    word = f"{ports[0]}-{ports[-1]}"
    with ThreadPoolExecutor() as pool:
        checks = {
            version: pool.submit(
                check, quick_lab, situation.machine, word, server=url_of(network.CHECKER, version)
            )
            for version in situation.expected
        }
    for version, running in checks.items():
        report = running.result()
        rows = {(port["local"], port["error"], port["advice"]) for port in report["ports"]}
        assert rows == {situation.expected[version]}, version
        notes = situation.notes.get(version, [])
        if situation.arrange is connections_are_limited:
            (note,) = report["notes"]
            assert "limits how many new connections it lets in per second" in note
        else:
            assert report["notes"] == notes, version
