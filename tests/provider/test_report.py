"""The judgement on one port, as the pure function that it is."""

from collections.abc import Sequence
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest

from port_checker import advice
from port_checker.connect import OPEN, Verdict
from port_checker.linux import TcpSocket, TcpState
from port_checker.provider.evidence import Attempt
from port_checker.provider.report import (
    Binding,
    Observation,
    Place,
    PortPair,
    PortReport,
    Report,
    Router,
    WrongWay,
    judge,
    port_ranges,
)
from port_checker.verdicts import port_verdict

REFUSED, TIMED_OUT = "Connection refused", "Connection timed out"
NO_ROUTE, PROHIBITED = "No route to host", "Permission denied"
PORT = PortPair(60800, 50800)
OWN, BEHIND_ROUTER = Place(own_address=True), Place()
BOUND, IN_USE = Binding("bound"), Binding("in use")


def closed(error: str) -> Verdict:
    return port_verdict(False, error)


def judged(
    *verdicts: Verdict, place: Place = BEHIND_ROUTER, binding: Binding = BOUND, **observed: Any
) -> PortReport:
    answers = {f"http://{number}": verdict for number, verdict in enumerate(verdicts)}
    return judge(Observation(PORT, binding, answers=answers, **observed), place)


def holder(address: str, state: TcpState = TcpState.LISTEN, queued: int = 0) -> TcpSocket:
    return TcpSocket(
        ip_address(address), 50800, state, queued, ":" in address, ip_address("192.0.2.1")
    )


ARRIVED = Attempt(ip_address("203.0.113.7"), "eth0")
SERVED = Binding("in use", holders=[holder("0.0.0.0")])  # noqa: S104  # shown only

# What was observed; reachable, confirmed, advice.
JUDGEMENTS: list[tuple[PortReport, bool, bool | None, str | None]] = [
    (judged(OPEN, seen=True), True, True, None),
    (judged(closed(REFUSED), OPEN, seen=True), True, True, None),
    (judged(OPEN), False, False, advice.ANSWERED_ELSEWHERE),
    (judged(OPEN, closed(REFUSED)), False, False, advice.ANSWERED_ELSEWHERE),
    (judged(OPEN, arrives_at=50801), False, False, advice.CROSSED),
    (judged(OPEN, seen=True, arrives_at=50801), False, False, advice.CROSSED),
    (judged(OPEN, binding=IN_USE, arrives_at=50801), False, None, advice.CROSSED),
    (judged(OPEN, attempt=ARRIVED, captured=True), False, False, advice.REDIRECTED_HERE),
    (judged(closed(TIMED_OUT), seen=True), False, False, advice.WAY_BACK_FIRST),
    (judged(closed(REFUSED), seen=True), False, False, advice.WAY_BACK_FIRST),
    (judged(), False, False, advice.NOT_CHECKED.format(reason="there is no server")),
    (judged(excluded=True), False, False, advice.SERVER_CANNOT),
    (judged(OPEN, binding=SERVED), True, None, None),
    (
        judged(OPEN, binding=SERVED, captured=True, attempt=ARRIVED),
        True,
        None,
        None,
    ),
    (
        judged(OPEN, binding=SERVED, captured=True),
        False,
        None,
        advice.ANSWERED_ELSEWHERE,
    ),
    (
        judged(OPEN, binding=Binding("in use", holders=[holder("127.0.0.1")])),
        False,
        None,
        advice.IN_USE_LOCALLY.format(addresses="127.0.0.1"),
    ),
    (judged(OPEN, binding=IN_USE), False, None, advice.IN_USE_NOT_LISTENING),
    (
        judged(OPEN, binding=Binding("in use", other_family=True, holders=[holder("::")])),
        False,
        None,
        advice.IN_USE_OTHER_FAMILY.format(family="IPv4"),
    ),
    (judged(binding=Binding("outgoing connection")), False, None, advice.OUTGOING_CONNECTION),
    (judged(binding=Binding("not permitted")), False, None, advice.NOT_PERMITTED_HERE),
    (judged(binding=Binding("failed")), False, None, advice.FAILED),
]


@pytest.mark.parametrize(("port", "reachable", "confirmed", "expected"), JUDGEMENTS)
def test_the_judgement_on_a_port(
    port: PortReport, reachable: bool, confirmed: bool | None, expected: str | None
) -> None:
    assert (port.port, port.inner) == (60800, 50800)
    assert (port.reachable, port.confirmed, port.advice) == (reachable, confirmed, expected)


def test_the_error_is_that_of_the_servers_if_none_could_connect() -> None:
    assert judged(closed(TIMED_OUT), closed(REFUSED)).error == TIMED_OUT
    assert judged(closed(TIMED_OUT), OPEN).error is None
    assert judged().error is None


@pytest.mark.parametrize("error", [REFUSED, TIMED_OUT, NO_ROUTE, PROHIBITED])
@pytest.mark.parametrize(
    ("place", "observed", "expected"),
    [
        (OWN, {"attempt": ARRIVED, "captured": True}, advice.OWN_FIREWALL),
        (BEHIND_ROUTER, {"attempt": ARRIVED, "captured": True}, advice.OWN_FIREWALL),
        (OWN, {}, advice.OWN_FIREWALL_FIRST),
        (OWN, {"captured": True}, advice.NETWORK_FIREWALL),
        (Place(caller_hidden=True), {"captured": True}, advice.CALLER_HIDDEN),
        (Place(router=Router.CONTAINER), {"captured": True}, advice.IN_CONTAINER),
        (Place(router=Router.CLOUD), {}, advice.IN_CLOUD),
        (
            Place(router=Router.VPN, interface="wg0"),
            {},
            advice.BEHIND_VPN.format(interface="wg0"),
        ),
    ],
)
def test_the_router_is_left_out_where_it_is_not_to_blame(
    place: Place, observed: dict[str, Any], expected: str, error: str
) -> None:
    assert judged(closed(error), place=place, **observed).advice == expected


ARRIVALS = [
    ({"attempt": replace(ARRIVED, answered_at="eth0")}, advice.REPLIES_LOST),
    ({"attempt": ARRIVED, "half_open": True}, advice.WAY_BACK),
    ({"half_open": True}, advice.WAY_BACK_FIRST),
    ({"attempt": replace(ARRIVED, refused=True)}, advice.OWN_FIREWALL),
    (
        {"attempt": replace(ARRIVED, passed_to=ip_address("172.17.0.2"))},
        advice.PASSED_ON.format(address="172.17.0.2"),
    ),
    (
        {"attempt": ARRIVED, "wrong_way": WrongWay("wg0", filtered=True)},
        advice.REVERSE_PATH.format(interface="eth0", other="wg0"),
    ),
    (
        {"attempt": ARRIVED, "half_open": True, "wrong_way": WrongWay("wg0", filtered=False)},
        advice.REPLIES_ELSEWHERE.format(interface="eth0", other="wg0"),
    ),
    (
        {
            "attempt": replace(ARRIVED, answered_at="wg0"),
            "wrong_way": WrongWay("wg0", filtered=False),
        },
        advice.REPLIES_ELSEWHERE.format(interface="eth0", other="wg0"),
    ),
    (
        {"attempt": ARRIVED, "wrong_way": WrongWay("wg0", filtered=False)},
        advice.OWN_FIREWALL,
    ),
    ({"arrives_at": 50900, "unused": True}, advice.ARRIVES_UNUSED.format(port=50900)),
]


@pytest.mark.parametrize(("observed", "expected"), ARRIVALS)
def test_what_arrives_here_is_not_the_routers_fault(
    observed: dict[str, Any], expected: str
) -> None:
    judgement = judged(closed(TIMED_OUT), captured="attempt" in observed, **observed)
    assert (judgement.reachable, judgement.advice) == (False, expected)


def test_only_servers_that_say_something_about_the_world_count() -> None:
    nearby = judged(closed(REFUSED), OPEN, seen=True, counted={"http://0"}, captured=True)
    assert (nearby.reachable, nearby.error) == (False, REFUSED)
    assert judged(closed(REFUSED), OPEN, seen=True).reachable


@pytest.mark.parametrize(
    ("error", "captured", "expected"),
    [
        (REFUSED, True, advice.NOT_FORWARDED),
        (REFUSED, False, advice.REFUSED),
        (TIMED_OUT, True, advice.NOTHING_ARRIVED),
        (TIMED_OUT, False, advice.TIMED_OUT),
        (NO_ROUTE, True, advice.ROUTER_REJECTS),
        (PROHIBITED, False, advice.ROUTER_REJECTS),
        ("Network is unreachable", False, advice.ROUTER_REJECTS),
    ],
)
def test_behind_a_router_each_error_has_its_own_advice(
    error: str, captured: bool, expected: str
) -> None:
    assert judged(closed(error), captured=captured).advice == expected


PROGRAMS: list[tuple[Sequence[TcpSocket], str, bool, str]] = [
    ([], REFUSED, False, advice.IN_USE_NOT_LISTENING),
    ([holder("0.0.0.0", TcpState.OTHER)], REFUSED, False, advice.IN_USE_NOT_LISTENING),  # noqa: S104  # shown only
    (
        [holder("127.0.0.1")],
        REFUSED,
        False,
        advice.IN_USE_LOCALLY.format(addresses="127.0.0.1"),
    ),
    ([holder("::")], REFUSED, True, advice.IN_USE_OTHER_FAMILY.format(family="IPv4")),
    ([holder("::", queued=5)], TIMED_OUT, False, advice.IN_USE_NOT_ACCEPTING.format(queued=5)),
    ([holder("::", queued=5)], REFUSED, False, advice.IN_USE.format(and_router="")),
    ([holder("0.0.0.0")], TIMED_OUT, False, advice.IN_USE.format(and_router="")),  # noqa: S104  # shown only
]


@pytest.mark.parametrize(("holders", "error", "other_family", "expected"), PROGRAMS)
def test_why_a_program_is_not_reached(
    holders: Sequence[TcpSocket], error: str, other_family: bool, expected: str
) -> None:
    binding = Binding("in use", other_family=other_family, holders=holders)
    port = judged(closed(error), binding=binding, place=OWN)
    assert (port.reachable, port.confirmed, port.advice) == (False, None, expected)


def test_a_report_counts_what_is_reachable() -> None:
    report = Report("203.0.113.7", [], [judged(OPEN, seen=True), judged(OPEN)])
    assert (report.reachable, report.total) == (1, 2)


@pytest.mark.parametrize(
    ("pairs", "written"),
    [
        ([(1, 1)], "1"),
        ([(3, 3), (1, 1), (2, 2), (5, 5)], "1-3, 5"),
        ([(6, 5), (7, 6), (9, 8)], "6-7:5-6, 9:8"),
        ([(6, 5), (7, 7)], "6:5, 7"),
        ([], ""),
    ],
)
def test_ports_are_written_as_the_program_reads_them(
    pairs: list[tuple[int, int]], written: str
) -> None:
    assert port_ranges(PortPair(*pair) for pair in pairs) == written
