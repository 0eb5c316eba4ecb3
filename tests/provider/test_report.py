"""The judgement on one port, as the pure function that it is."""

import pytest

from port_checker import advice
from port_checker.connect import Verdict
from port_checker.provider.report import LocalBinding, Report, judge

OPEN = Verdict(accessible=True, error=None)
REFUSED, TIMED_OUT = "Connection refused", "Connection timed out"


def closed(error: str) -> Verdict:
    return Verdict(accessible=False, error=error)


JUDGEMENTS: list[tuple[LocalBinding, bool, list[Verdict], bool, bool | None, str | None]] = [
    # local, seen, verdicts; reachable, confirmed, advice
    ("bound", True, [OPEN], True, True, None),
    ("bound", True, [closed(REFUSED), OPEN], True, True, None),
    ("bound", False, [OPEN], False, False, advice.ANSWERED_ELSEWHERE),
    ("bound", False, [OPEN, closed(REFUSED)], False, False, advice.ANSWERED_ELSEWHERE),
    ("bound", True, [closed(TIMED_OUT)], False, False, advice.WAY_BACK),
    ("bound", True, [closed(REFUSED)], False, False, advice.WAY_BACK),
    ("bound", False, [closed(REFUSED)], False, False, advice.REFUSED),
    ("bound", False, [closed(TIMED_OUT)], False, False, advice.TIMED_OUT),
    ("bound", False, [closed("No route to host")], False, False, advice.UNREACHABLE),
    ("bound", False, [closed("Network is unreachable")], False, False, advice.UNREACHABLE),
    ("bound", False, [closed("Permission denied")], False, False, advice.UNREACHABLE),
    ("bound", False, [], False, False, advice.NOT_ASKED),
    ("in use", False, [OPEN], True, None, None),
    ("in use", False, [closed(REFUSED)], False, None, advice.IN_USE),
    ("not permitted", False, [], False, None, advice.NOT_PERMITTED),
    ("failed", False, [], False, None, advice.FAILED),
]


@pytest.mark.parametrize(
    ("local", "seen", "verdicts", "reachable", "confirmed", "expected"), JUDGEMENTS
)
def test_the_judgement_on_a_port(
    local: LocalBinding,
    seen: bool,
    verdicts: list[Verdict],
    reachable: bool,
    confirmed: bool | None,
    expected: str | None,
) -> None:
    answers = {f"http://{number}": verdict for number, verdict in enumerate(verdicts)}
    port = judge(50800, local, seen, answers)
    assert (port.port, port.local, port.answers) == (50800, local, answers)
    assert (port.reachable, port.confirmed, port.advice) == (reachable, confirmed, expected)
    failed = verdicts and OPEN not in verdicts
    assert port.error == (verdicts[0].error if failed else None)


def test_a_report_counts_what_is_reachable() -> None:
    ports = [judge(1, "bound", True, {"a": OPEN}), judge(2, "bound", False, {"a": OPEN})]
    report = Report("203.0.113.7", [], ports)
    assert (report.reachable, report.total) == (1, 2)
