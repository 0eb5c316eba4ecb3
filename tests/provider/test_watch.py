"""Watching: only what changes is told."""

from collections.abc import Sequence

import pytest

from port_checker.connect import OPEN, REFUSED, Verdict
from port_checker.provider import Report, ServerReport
from port_checker.provider.report import Binding, Observation, Place, PortPair, judge
from port_checker.provider.watch import watch

URL = "https://checker.example"


class Enough(Exception):
    """The test has seen what it wants."""


def report(*verdicts: Verdict, error: str | None = None) -> Report:
    ports = [
        judge(
            Observation(
                PortPair(50800 + number, 50800 + number),
                Binding("bound"),
                seen=verdict == OPEN,
                answers={} if error else {URL: verdict},
            ),
            Place(own_address=True),
        )
        for number, verdict in enumerate(verdicts)
    ]
    return Report("203.0.113.7", [ServerReport(URL, not error, error, "203.0.113.7")], ports)


def watched(*reports: Report) -> tuple[list[Sequence[str]], list[float]]:
    """What is told of reports, one after the other, and the pauses between them."""
    coming = iter(reports)
    told: list[Sequence[str]] = []
    pauses: list[float] = []

    def check() -> list[Report]:
        found = next(coming, None)
        if not found:
            raise Enough
        return [found]

    with pytest.raises(Enough):
        watch(check, 100, lambda lines, _: told.append(lines), pauses.append)
    return told, pauses


def test_only_changes_are_told() -> None:
    good, bad = report(OPEN, OPEN), report(OPEN, REFUSED)
    told, pauses = watched(good, good, bad, bad, good)
    first, worse, better = told
    assert first == ["2 of 2 ports of 203.0.113.7 are reachable over IPv4"]
    assert len(worse) == 1
    assert worse[0].startswith("50801: not reachable: Connection refused. ")
    assert better == ["50801: reachable again"]
    assert all(90 <= pause <= 110 for pause in pauses)
    assert len(set(pauses)) > 1


def test_a_server_that_is_away_is_told_once_and_changes_no_port() -> None:
    good, away = report(OPEN), report(OPEN, error="is down")
    told, _ = watched(good, away, away, good)
    assert told == [
        ["1 of 1 ports of 203.0.113.7 are reachable over IPv4"],
        [f"no server could check over IPv4: {URL}: is down"],
        ["1 of 1 ports of 203.0.113.7 are reachable over IPv4"],
    ]
