"""Verdicts through routers, firewalls and packet loss, compared with the truth."""

import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import product

import pytest

from tests.lab import network
from tests.lab.network import Answer, Lab, end

pytestmark = pytest.mark.xdist_group("lab 3")

ACCESSIBLE = None
REFUSED = "Connection refused"
TIMED_OUT = "Connection timed out"
NO_ROUTE = "No route to host"
UNREACHABLE = "Network is unreachable"
NOT_PERMITTED = "Permission denied"  # Linux's error for ICMPv6 "administratively prohibited"

DEFAULTS_PORT = 9001  # of a service with the default number of attempts, and their timeout
PORTS_OF_A_KIND = 10
CALLERS = "provider", "third"
VERSIONS = 4, 6

Arrangement = Callable[[Lab, range], object]


@dataclass(frozen=True)
class Kind:
    """A kind of port, and the verdict that it must get.

    Attributes:
        name: What it is.
        arrange: Sets it up.
        ipv4: The verdict's error; None if the port is accessible.
        ipv6: The same for IPv6, where the words can differ.
        changes: Whether attempts change its state, so that each request needs ports of its own.
    """

    name: str
    arrange: Arrangement
    ipv4: str | None
    ipv6: str | None
    changes: bool = False

    def error(self, version: int) -> str | None:
        return self.ipv4 if version == 4 else self.ipv6


def nothing(_lab: Lab, _ports: range) -> None:
    """Leave the ports closed: not forwarded, and nobody listens."""


def open_(lab: Lab, ports: range) -> None:
    lab.listen("provider", ports)
    lab.forward(ports)


def behind(firewall: Arrangement) -> Arrangement:
    """Ports that are open but for a firewall."""

    def arrange(lab: Lab, ports: range) -> None:
        open_(lab, ports)
        firewall(lab, ports)

    return arrange


def reset_by(name: str, chain: str) -> Arrangement:
    return behind(lambda lab, ports: lab.filter(name, chain, ports, "reject with tcp reset"))


def dropped_by(name: str, chain: str) -> Arrangement:
    return behind(lambda lab, ports: lab.filter(name, chain, ports, "drop"))


def rejected(icmp: str, icmpv6: str) -> Arrangement:
    def firewall(lab: Lab, ports: range) -> None:
        lab.filter("router", "forward", ports, f"reject with icmp {icmp}", version=4)
        lab.filter("router", "forward", ports, f"reject with icmpv6 {icmpv6}", version=6)

    return behind(firewall)


def opened_after(seconds: float) -> Arrangement:
    return behind(lambda lab, ports: lab.drop_at_first(ports, seconds))


def listened_on_once_refused(lab: Lab, ports: range) -> None:
    lab.forward(ports)
    lab.listen_once_refused("provider", ports)


def closed_elsewhere(lab: Lab, ports: range) -> None:
    lab.listen("provider", ports)
    lab.forward(ports, network.NEIGHBOUR)


def open_elsewhere(lab: Lab, ports: range) -> None:
    lab.listen("neighbour", ports)
    lab.forward(ports, network.NEIGHBOUR)


KINDS = [
    Kind("open", open_, ACCESSIBLE, ACCESSIBLE),
    Kind("not forwarded", nothing, REFUSED, REFUSED),
    Kind("forwarded, nobody listens", Lab.forward, REFUSED, REFUSED),
    Kind("reset by the router", reset_by("router", "forward"), REFUSED, REFUSED),
    Kind("reset by the provider", reset_by("provider", "input"), REFUSED, REFUSED),
    Kind("dropped by the router", dropped_by("router", "forward"), TIMED_OUT, TIMED_OUT),
    Kind("dropped by the provider", dropped_by("provider", "input"), TIMED_OUT, TIMED_OUT),
    *(
        Kind(f"rejected with {icmp}, {icmpv6}", rejected(icmp, icmpv6), ipv4, ipv6)
        for icmp, icmpv6, ipv4, ipv6 in [
            ("port-unreachable", "port-unreachable", REFUSED, REFUSED),
            ("host-unreachable", "addr-unreachable", NO_ROUTE, NO_ROUTE),
            ("net-unreachable", "no-route", UNREACHABLE, UNREACHABLE),
            ("admin-prohibited", "admin-prohibited", NO_ROUTE, NOT_PERMITTED),
            ("host-prohibited", "policy-fail", NO_ROUTE, NOT_PERMITTED),
            ("net-prohibited", "reject-route", UNREACHABLE, NOT_PERMITTED),
        ]
    ),
    Kind("forwarded to a machine that listens", open_elsewhere, ACCESSIBLE, ACCESSIBLE),
    Kind("forwarded to one that does not", closed_elsewhere, REFUSED, REFUSED),
    Kind(
        "forwarded to one that is asleep",
        lambda lab, ports: lab.forward(ports, network.ASLEEP),
        NO_ROUTE,
        NO_ROUTE,
    ),
    Kind("taken over by the router", Lab.take_over, ACCESSIBLE, ACCESSIBLE),
    Kind(
        "open behind loss",
        behind(lambda lab, ports: lab.lose(ports, 10)),
        ACCESSIBLE,
        ACCESSIBLE,
    ),
    Kind("listened on late", listened_on_once_refused, ACCESSIBLE, ACCESSIBLE, changes=True),
    Kind("open to the second attempt", opened_after(5.5), ACCESSIBLE, ACCESSIBLE, changes=True),
    Kind("open to the last attempt", opened_after(11.5), ACCESSIBLE, ACCESSIBLE, changes=True),
]
# Whole addresses, how many ports of each to check, and the expected error.
ADDRESSES = [
    (network.SILENT, 10, NO_ROUTE),
    # One port: Linux sends only one "no route" per second for IPv4 (ip_error()), and no setting of
    # a namespace changes that.
    (network.UNROUTED_BY_INTERNET, 1, UNREACHABLE),
]
Expected = dict[int, str | None]


@dataclass(frozen=True)
class Check:
    """A request under way, and the expected error of each of its ports."""

    what: str
    expected: Expected
    answer: Future[Answer]

    def mistakes(self) -> list[str]:
        answer = self.answer.result()
        if answer.status != 200:
            return [f"{self.what}: {answer.status} {answer.body}"] * len(self.expected)
        results = answer.body["results"]
        assert list(results) == [str(port) for port in self.expected]
        return [
            f"{self.what}: port {port}: {results[str(port)]} instead of {error!r}"
            for port, error in self.expected.items()
            if results[str(port)] != {"accessible": error is None, "error": error}
        ]


def ask(lab: Lab, caller: str, target: str, what: str, expected: Expected) -> Check:
    answer = lab.ask(caller, target, expected, service=DEFAULTS_PORT)
    return Check(f"{caller} checks {what}", expected, answer)


def test_every_verdict_is_true(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    """Each kind of port alone in a request, and all in one; both IP versions, both callers."""
    lab.serve(PORT_CHECKER_PORT=str(DEFAULTS_PORT))

    def arrange(kind: Kind) -> range:
        ports = lab.take(PORTS_OF_A_KIND)
        kind.arrange(lab, ports)
        return ports

    lasting = {kind.name: arrange(kind) for kind in KINDS if not kind.changes}
    requests: list[tuple[str, str, str, Expected]] = []
    for caller, version in product(CALLERS, VERSIONS):
        everything: Expected = {}
        for kind in KINDS:
            alone = lasting.get(kind.name) or arrange(kind)
            what = f"{kind.name}, IPv{version}"
            expected: Expected = dict.fromkeys(alone, kind.error(version))
            requests.append((caller, network.PROVIDER[version], what, expected))
            among_others = lasting.get(kind.name) or arrange(kind)
            everything |= dict.fromkeys(among_others, kind.error(version))
        what = f"everything, IPv{version}"
        requests.append((caller, network.PROVIDER[version], what, everything))
        for address, count, error in ADDRESSES:
            expected = dict.fromkeys(range(1, 1 + count), error)
            requests.append((caller, address[version], address[version], expected))

    started = time.monotonic()
    checks = [ask(lab, *request) for request in requests]
    mistakes = [mistake for check in checks for mistake in check.mistakes()]
    lasted = time.monotonic() - started

    verdicts = sum(len(check.expected) for check in checks)
    slowest = max(check.answer.result().seconds for check in checks)
    with capsys.disabled():
        sys.stdout.write(
            f"\n{verdicts} verdicts of {len(checks)} checks, "
            f"{len(mistakes)} wrong, in {lasted:.1f} s; the slowest check took {slowest:.2f} s\n"
        )
    assert not mistakes, "\n".join(mistakes)


@pytest.mark.parametrize(
    ("caller", "target"),
    [
        ("third", "127.0.0.1"),
        ("third", "::1"),
        ("third", network.CHECKER[4]),
        ("third", network.CHECKER[6]),
        ("third", network.CHECKER_SECONDARY[4]),
        ("third", network.CHECKER_SECONDARY[6]),
        ("third", f"::ffff:{network.CHECKER_SECONDARY[4]}"),
        ("provider", network.PROVIDER_BEHIND_NAT),
    ],
)
@pytest.mark.parametrize("version", VERSIONS)
def test_addresses_that_may_not_be_checked(
    lab: Lab, caller: str, target: str, version: int
) -> None:
    answer = lab.ask(caller, target, [80], server=network.CHECKER[version]).result()
    assert (answer.status, answer.code) == (403, "TARGET_NOT_ALLOWED")


def test_a_callers_own_address_is_the_one_that_the_internet_sees(lab: Lab) -> None:
    """Shown by a service that checks only the caller's own address."""
    ports = lab.take(1)
    open_(lab, ports)
    service = lab.serve("third", PORT_CHECK_TARGETS="caller")
    try:
        statuses = {
            (caller, version): lab.ask(
                caller, network.PROVIDER[version], ports, server=network.THIRD[version]
            )
            .result()
            .status
            for caller, version in product(("provider", "neighbour", "checker"), VERSIONS)
        }
    finally:
        end(service)
    assert statuses == {
        ("provider", 4): 200,
        ("provider", 6): 200,
        ("neighbour", 4): 200,  # shares the router's address
        ("neighbour", 6): 403,
        ("checker", 4): 403,
        ("checker", 6): 403,
    }


@pytest.mark.parametrize("version", VERSIONS)
def test_the_checker_may_check_its_own_address(lab: Lab, version: int) -> None:
    answer = lab.ask("checker", network.CHECKER[version], [network.SERVICE_PORT, 1]).result()
    assert answer.body["results"] == {
        str(network.SERVICE_PORT): {"accessible": True, "error": None},
        "1": {"accessible": False, "error": REFUSED},
    }


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("version", VERSIONS)
def test_without_a_route_the_check_fails(lab: Lab, caller: str, version: int) -> None:
    target = network.UNROUTED_BY_CHECKER[version]
    answer = lab.ask(caller, target, [80], server=network.CHECKER[version]).result()
    assert (answer.status, answer.code) == (503, "CHECK_FAILED")
