"""The screen at 40, 80 and 120 columns: nothing is cut, and no line is wider than that."""

import pytest

from port_checker.provider import Report
from port_checker.provider.report import PortPair, port_ranges
from tests.provider.captures import (
    DEAD_SERVER,
    REPORTS,
    SUCCESS,
    WAITING,
    WIDTHS,
    capture,
    capture_help,
    capture_waiting,
    without_colours,
)

AT_EACH_WIDTH = pytest.mark.parametrize("width", WIDTHS)


def words(text: str) -> str:
    """The text without what lines and tables are drawn with."""
    return " ".join(without_colours(text).translate(dict.fromkeys(map(ord, "│┃|"), " ")).split())


def has_in_order(text: str, sentence: str) -> bool:
    """Whether all words of a sentence come in its order; in a table, other columns are between."""
    rest = iter(words(text).split())
    return all(word in rest for word in sentence.split())


@AT_EACH_WIDTH
@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
def test_a_report_is_whole_at_each_width(report: Report, width: int) -> None:
    text = capture(report, width)
    assert max(map(len, without_colours(text).splitlines())) <= width
    assert "…" not in text
    if report in (SUCCESS, DEAD_SERVER):
        return
    for port in report.ports:
        if port.advice:
            assert has_in_order(text, port.advice)
    good = [PortPair(port.port, port.inner) for port in report.ports if port.reachable]
    assert has_in_order(text, port_ranges(good))
    for note in report.notes:
        assert note in words(text)


@AT_EACH_WIDTH
def test_success_is_one_green_line(width: int) -> None:
    text = capture(SUCCESS, width)
    assert words(text) == "101 of 101 ports of 203.0.113.7 are reachable over IPv4."
    assert all(line.startswith("\x1b[32m") for line in text.splitlines())


@AT_EACH_WIDTH
def test_a_dead_server_is_a_sentence_and_no_table(width: int) -> None:
    said, total = words(capture(DEAD_SERVER, width)).split(". ")
    assert said == "https://checker.example: cannot be reached: Connection refused"
    assert total == "0 of 100 ports of this machine are reachable over IPv4."


@AT_EACH_WIDTH
@pytest.mark.parametrize("text", WAITING.values(), ids=WAITING)
def test_a_narrow_terminal_shows_how_long_it_may_take(width: int, text: str) -> None:
    line = capture_waiting(text, width)
    assert len(line) <= width
    assert line[0] in "-\\|/"  # the spinner
    assert "0:00:0" in line  # since when
    assert text.split(" ports ")[-1].split("; ")[-1] in line
    if len(text) < width - 10:
        assert text in line


@pytest.mark.parametrize("width", [40, 80])
@pytest.mark.parametrize("command", ["check", "watch"])
def test_the_help_is_whole_at_each_width(width: int, command: str) -> None:
    text = capture_help(width, command)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for part in (
        "7466 50800-50899",
        "60800-60899:50800-50899.",
        "[default: (7466 50800-50899)]",
        "[env var: PORT_CHECKER_URL]",
        "Exit status:",
    ):
        assert part in " ".join(text.split())
    flags = [line for line in text.splitlines() if line.startswith(("  --all", "  -4", "  -6"))]
    assert len(flags) == 3
    for line in flags:  # they take no value
        assert not any(word.isupper() for word in line.split()[:3])
