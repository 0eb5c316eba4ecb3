"""A LAN is noisy: beside ten minutes of that, no sentence about a router changes.

They are compressed: as many packets in a hundredth of the time, at least six seconds.
"""

import sys
from collections.abc import Callable
from concurrent.futures import Future
from itertools import count

import pytest

from port_checker import advice
from port_checker.provider import Report
from tests.lab import network
from tests.lab.checks import (
    ANSWERED,
    LOST,
    NOT_HERE,
    OWN,
    TRAFFIC,
    advised,
    monitor,
    start_check,
    url_of,
)
from tests.lab.network import Lab

pytestmark = pytest.mark.xdist_group("lab 2")

PORTS_OF_EACH = 4
MINUTES = 10
CGNAT = {4: [advice.SHARED_ADDRESS.format(ip=network.PROVIDER[4])], 6: []}


def forwarded_elsewhere(lab: Lab, ports: range) -> None:
    lab.forward(ports, network.NEIGHBOUR)


def answered_elsewhere(lab: Lab, ports: range) -> None:
    lab.listen("neighbour", ports)
    lab.forward(ports, network.NEIGHBOUR)


def forwarded_but(name: str, chain: str, statement: str) -> Callable[[Lab, range], None]:
    def arrange(lab: Lab, ports: range) -> None:
        lab.forward(ports)
        lab.filter(name, chain, ports, statement)

    return arrange


def replies_dropped(lab: Lab, ports: range) -> None:
    lab.forward(ports)
    lab.drop_answers(ports)


REJECTS = {4: advice.ROUTER_REJECTS, 6: advice.NETWORK_FIREWALL}
# What is arranged, and what is said of it over each IP version.
SITUATIONS: list[tuple[Callable[[Lab, range], None], dict[int, str | None], bool]] = [
    (Lab.forward, {4: None, 6: None}, False),
    (forwarded_elsewhere, {**NOT_HERE}, True),
    (answered_elsewhere, {**ANSWERED}, False),
    (Lab.take_over, {**ANSWERED}, False),
    (forwarded_but("router", "forward", "drop"), {**LOST}, True),
    (forwarded_but("router", "forward", "reject with icmpx host-unreachable"), {**REJECTS}, True),
    (forwarded_but("provider", "input", "drop"), dict.fromkeys((4, 6), advice.OWN_FIREWALL), False),
    (replies_dropped, dict.fromkeys((4, 6), advice.REPLIES_LOST), False),
]


def test_ten_minutes_of_a_lans_noise_change_no_sentence(lab: Lab) -> None:
    """Each situation alone, while all the others are checked as well."""
    arranged = []
    for arrange, sentences, nothing_arrives in SITUATIONS:
        ports = lab.take(PORTS_OF_EACH)
        arrange(lab, ports)
        arranged.append((ports, sentences, nothing_arrives))
    everything = range(arranged[0][0][0], arranged[-1][0][-1] + 1)
    noise = ["noise", "provider", "192.168.1.1", OWN[4], str(60 * MINUTES)]
    with monitor(lab, "provider", "127.0.0.1", everything):
        heard = lab.popen("router", sys.executable, TRAFFIC, *noise)
        for _ in count():
            checks = [
                (check_all(lab, ports, version), sentences[version], nothing_arrives, version)
                for ports, sentences, nothing_arrives in arranged
                for version in (4, 6)
            ]
            for check, said, nothing_arrives, version in checks:
                report = check.result()
                assert advised(report) == {said}
                shared = [note for note in report.notes if "CGNAT" in note]
                assert shared == (CGNAT[version] if nothing_arrives else [])
            if heard.poll() is not None:
                break
    assert heard.returncode == 0


def check_all(lab: Lab, ports: range, version: int) -> Future[Report]:
    return start_check(lab, "provider", ports, url_of(network.CHECKER, version))
