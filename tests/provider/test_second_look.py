"""Tracing forwards and asking in small groups: servers with scripts, and listeners of our own."""

import itertools
import threading
from collections.abc import Callable, Mapping

import pytest

from port_checker import advice
from port_checker.provider.report import PortPair
from port_checker.provider.second_look import looks_limited
from tests.support.loopback import free_ports
from tests.support.scripted import Answer, accessible, check, connect, scripted, verdicts

TIMED_OUT = "Connection timed out"


def forwarding(forwards: Mapping[int, int | None]) -> Callable[[list[int]], Answer]:
    """A server before a router: each outer port leads to an inner one, or to another machine."""

    def check_through_them(asked: list[int]) -> Answer:
        connect([inner for port in asked if (inner := forwards.get(port))])
        return verdicts(
            {port: None if port in forwards else "Connection refused" for port in asked}
        )

    return check_through_them


def arrivals(forwards: Mapping[int, int | None], ports: list[int]) -> dict[int, int | None]:
    """Where the report says that connections arrive; the port itself if it is reachable."""
    with scripted(forwarding(forwards)) as server:
        report = check(ports, server.url, late_connections=0.3)
    return {port.port: port.port if port.reachable else port.arrives_at for port in report.ports}


def test_ports_that_lead_to_the_next_one() -> None:
    ports = free_ports(20)
    forwards = dict(itertools.pairwise(ports))
    assert arrivals(forwards, ports) == {**forwards, ports[-1]: None}


def test_ports_that_lead_to_the_one_before() -> None:
    ports = free_ports(20)
    forwards = dict(zip(ports[1:], ports, strict=False))
    assert arrivals(forwards, ports) == {**forwards, ports[0]: None}


def test_one_wrong_forward_among_right_ones() -> None:
    ports = free_ports(10)
    forwards = dict(zip(ports, ports, strict=True)) | {ports[3]: ports[4]}
    assert arrivals(forwards, ports) == forwards


def test_ports_that_another_machine_answers_among_right_ones() -> None:
    ports = free_ports(10)
    forwards: dict[int, int | None] = dict(zip(ports, ports, strict=True))
    forwards |= dict.fromkeys(ports[2:4])
    assert arrivals(forwards, ports) == forwards


def test_connections_that_come_late_each_time_are_not_taken_for_crossed_forwards() -> None:
    """As through a proxy that accepts them first."""
    ports = free_ports(3)
    late: list[threading.Timer] = []

    def pass_on(asked: list[int]) -> Answer:
        late.append(threading.Timer(0.5, connect, [asked]))
        late[-1].start()
        return accessible(asked)

    with scripted(pass_on) as server:
        report = check(ports, server.url, ip="203.0.113.7", late_connections=1.4)
    for timer in late:
        timer.join()
    assert [(port.reachable, port.arrives_at) for port in report.ports] == [(True, None)] * 3


def test_crossed_forwards_make_one_note() -> None:
    ports = free_ports(4)
    with scripted(forwarding(dict(itertools.pairwise(ports)))) as server:
        report = check(ports, server.url, late_connections=0.3)
    outer, inner = f"{ports[0]}-{ports[2]}", f"{ports[1]}-{ports[3]}"
    assert report.notes[-1] == advice.FORWARDS_CROSSED.format(
        outer=outer, inner=inner, pairs=f"{outer}:{inner}"
    )


@pytest.mark.parametrize(
    ("row", "limited"),
    [
        ("R" * 100, False),
        ("." * 100, False),
        ("R" * 50 + "." * 5 + "R" * 45, False),  # a firewall's
        ("R" * 50 + "." * 50, False),
        ("R" * 50 + "." * 20 + "R" * 10 + "." * 20, True),  # as nftables' limit lets them in
        ("R." * 50, True),
        ("R." * 5, False),
    ],
)
def test_what_looks_like_a_limit_on_new_connections(row: str, limited: bool) -> None:
    pairs = [PortPair(port, port) for port in range(1, len(row) + 1)]
    reached = {port for port, mark in enumerate(row, 1) if mark == "R"}
    lost = {port for port, mark in enumerate(row, 1) if mark == "."}
    assert looks_limited(pairs, reached, lost) is limited


def limiting(most: int) -> Callable[[list[int]], Answer]:
    """A server behind a limit: of a large request, the first half of the ports gets through."""

    def check_some(asked: list[int]) -> Answer:
        through = asked if len(asked) <= most else asked[: len(asked) // 2]
        connect(through)
        return verdicts({port: None if port in through else TIMED_OUT for port in asked})

    return check_some


def test_what_a_limit_kept_out_is_asked_for_in_small_groups() -> None:
    ports = free_ports(200)
    slept: list[float] = []
    with scripted(limiting(40)) as server:
        report = check(ports, server.url, slept=slept)
    assert report.reachable == 200
    assert [len(asked) for asked in server.asked] == [200, 40, 40, 20]
    assert slept == [2, 2, 2]
    assert advice.CONNECTION_LIMIT.format(count=100) in report.notes


def test_where_small_groups_do_not_help_one_is_enough() -> None:
    ports = free_ports(200)
    lost = set(ports[::2])

    def check_half(asked: list[int]) -> Answer:
        connect([port for port in asked if port not in lost])
        return verdicts({port: TIMED_OUT if port in lost else None for port in asked})

    with scripted(check_half) as server:
        report = check(ports, server.url)
    assert report.reachable == 100
    assert [len(asked) for asked in server.asked] == [200, 40]
