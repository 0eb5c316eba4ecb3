"""The judgement on one port, as the pure function that it is."""

from collections.abc import Sequence
from ipaddress import ip_address

import pytest

from port_checker import advice
from port_checker.connect import OPEN, Verdict
from port_checker.linux import TcpSocket, TcpState
from port_checker.provider.report import (
    Observation,
    Place,
    PortPair,
    PortReport,
    Report,
    judge,
    port_ranges,
)
from port_checker.schemas import PortResult

REFUSED, TIMED_OUT = "Connection refused", "Connection timed out"
NO_ROUTE, PROHIBITED = "No route to host", "Permission denied"
PORT = PortPair(60800, 50800)
OWN, BEHIND_ROUTER = Place(own_address=True), Place()


def closed(error: str) -> Verdict:
    return PortResult(accessible=False, error=error).verdict


def judged(
    *verdicts: Verdict, place: Place = BEHIND_ROUTER, local: str = "bound", **observed: object
) -> PortReport:
    answers = {f"http://{number}": verdict for number, verdict in enumerate(verdicts)}
    return judge(Observation(PORT, local, answers=answers, **observed), place)  # type: ignore[arg-type]


# What was observed; reachable, confirmed, advice.
JUDGEMENTS: list[tuple[PortReport, bool, bool | None, str | None]] = [
    (judged(OPEN, seen=True), True, True, None),
    (judged(closed(REFUSED), OPEN, seen=True), True, True, None),
    (judged(OPEN), False, False, advice.ANSWERED_ELSEWHERE),
    (judged(OPEN, closed(REFUSED)), False, False, advice.ANSWERED_ELSEWHERE),
    (judged(OPEN, arrives_at=50801), False, False, advice.CROSSED),
    (judged(OPEN, seen=True, arrives_at=50801), False, False, advice.CROSSED),
    (judged(OPEN, local="in use", arrives_at=50801), False, None, advice.CROSSED),
    (judged(closed(TIMED_OUT), seen=True), False, False, advice.WAY_BACK),
    (judged(closed(REFUSED), seen=True), False, False, advice.WAY_BACK),
    (judged(), False, False, advice.NOT_CHECKED.format(reason="there is no server")),
    (judged(excluded=True), False, False, advice.SERVER_CANNOT),
    (judged(OPEN, local="in use"), True, None, None),
    (judged(local="outgoing connection"), False, None, advice.OUTGOING_CONNECTION),
    (judged(local="not permitted"), False, None, advice.NOT_PERMITTED),
    (judged(local="failed"), False, None, advice.FAILED),
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
    ("place", "expected"),
    [
        (Place(own_address=True, arrived=True), advice.OWN_FIREWALL),
        (Place(own_address=False, arrived=True), advice.OWN_FIREWALL),
        (Place(own_address=True), advice.OWN_FIREWALL_FIRST),
        (Place(own_address=True, arrived=False), advice.NETWORK_FIREWALL),
        (Place(caller_hidden=True, arrived=False), advice.CALLER_HIDDEN),
    ],
)
def test_the_router_is_left_out_where_it_is_not_to_blame(
    place: Place, expected: str, error: str
) -> None:
    assert judged(closed(error), place=place).advice == expected


@pytest.mark.parametrize(
    ("error", "arrived", "expected"),
    [
        (REFUSED, False, advice.NOT_FORWARDED),
        (REFUSED, None, advice.REFUSED),
        (TIMED_OUT, False, advice.NOTHING_ARRIVED),
        (TIMED_OUT, None, advice.TIMED_OUT),
        (NO_ROUTE, False, advice.ROUTER_REJECTS),
        (PROHIBITED, None, advice.ROUTER_REJECTS),
        ("Network is unreachable", None, advice.ROUTER_REJECTS),
    ],
)
def test_behind_a_router_each_error_has_its_own_advice(
    error: str, arrived: bool | None, expected: str
) -> None:
    assert judged(closed(error), place=Place(arrived=arrived)).advice == expected


def holder(address: str, state: TcpState = TcpState.LISTEN, queued: int = 0) -> TcpSocket:
    return TcpSocket(ip_address(address), 50800, state, queued, ":" in address)


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
    port = judged(
        closed(error), local="in use", holders=holders, other_family=other_family, place=OWN
    )
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
