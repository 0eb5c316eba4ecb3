"""What people see of a report: rendered in the process, from Report objects."""

import io
import re
from collections.abc import Sequence

import pytest
from rich.console import Console

from port_checker import advice
from port_checker.connect import Verdict
from port_checker.provider import PortReport, Report, ServerReport
from port_checker.provider.report import LocalBinding, judge
from port_checker.provider.screen import show

URL, OTHER = "https://checker.example", "https://other.example"
OPEN = Verdict(accessible=True, error=None)
REFUSED = Verdict(accessible=False, error="Connection refused")


def port(
    number: int, *verdicts: Verdict, seen: bool = True, local: LocalBinding = "bound"
) -> PortReport:
    return judge(number, local, seen, dict(zip((URL, OTHER), verdicts, strict=False)))


def report(*ports: PortReport, ip: str | None = "203.0.113.7", error: str | None = None) -> Report:
    return Report(ip, [ServerReport(URL, any(port.answers for port in ports), error)], list(ports))


def shown(report: Report, width: int | None = None, **options: object) -> str:
    """What is printed: with a width, on a terminal that is so wide."""
    console = Console(
        file=io.StringIO(),
        force_terminal=width is not None,
        width=width or 80,
        markup=False,
        emoji=False,
        highlight=False,
        no_color=bool(options.get("no_color")),
        color_system="truecolor" if width else None,
    )
    show(report, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def without_colours(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def rows(text: str) -> list[list[str]]:
    """The rows of a table; cells of more lines put together."""
    table: list[list[str]] = []
    for line in without_colours(text).splitlines():
        here = [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]
        if not here:
            continue
        if here[1] or not table:  # the local binding is one line: a new row
            table.append(here)
        else:
            table[-1] = [" ".join(filter(None, both)) for both in zip(table[-1], here, strict=True)]
    return table


TROUBLED = [50803, *range(50820, 50825), 50850, 50852]
NINETY = report(
    *(port(n, REFUSED, seen=False) if n in TROUBLED else port(n, OPEN) for n in range(50800, 50900))
)


def test_ports_with_the_same_result_share_one_line() -> None:
    good, bad, total = shown(NINETY).splitlines()
    assert good.startswith("50800–50802, 50804–50819, ")  # noqa: RUF001  # as shown
    assert good.endswith(": bound; reachable.")
    assert bad.startswith("50803, 50820–50824, 50850, 50852: bound; Connection refused. ")  # noqa: RUF001
    assert bad.endswith(advice.REFUSED)
    assert total == "92 of 100 ports of 203.0.113.7 are reachable."


@pytest.mark.parametrize("width", [120, 80])
def test_a_table_on_a_terminal(width: int) -> None:
    text = shown(NINETY, width)
    header, good, bad = rows(text)
    assert header == ["Ports", "Local binding", "From outside", "What to do"]
    assert good[1:] == ["bound", "reachable", ""]
    assert bad[1:] == ["bound", "Connection refused", advice.REFUSED]
    assert bad[0] == "50803, 50820–50824, 50850, 50852"  # noqa: RUF001
    assert "\x1b[31mConnection" in text
    assert "\x1b[32mreachable" in text


def test_no_colour_where_none_is_wanted() -> None:
    assert not re.search(r"\x1b\[3[0-9]", shown(NINETY, 80, no_color=True))


@pytest.mark.parametrize(
    ("ports", "ip", "error", "lines"),
    [
        (
            [port(50800, local="not permitted"), port(50801, OPEN, local="in use")],
            "::1",
            None,
            [
                f"50800: not permitted; not asked. {advice.NOT_PERMITTED}",
                "50801: in use; reachable.",
                "1 of 2 ports of ::1 are reachable.",
            ],
        ),
        (
            [port(50800, OPEN, REFUSED, seen=False)],
            "203.0.113.7",
            None,
            [
                f"50800: bound; answered by another machine ({URL}: accessible, "
                f"{OTHER}: Connection refused). {advice.ANSWERED_ELSEWHERE}",
                "0 of 1 ports of 203.0.113.7 are reachable.",
            ],
        ),
        (
            [port(50800)],
            None,
            "[red]Wait[/red] :warning:",
            [
                f"50800: bound; not asked. {advice.NOT_ASKED}",
                f"{URL} could not check any port: [red]Wait[/red] :warning:.",
                "0 of 1 ports of this machine are reachable.",
            ],
        ),
        (
            [port(50800, OPEN), port(50801)],
            "203.0.113.7",
            "Sorry. (CHECK_FAILED)",
            [
                "50800: bound; reachable.",
                f"50801: bound; not asked. {advice.NOT_ASKED}",
                f"{URL} could not check all ports: Sorry. (CHECK_FAILED).",
                "1 of 2 ports of 203.0.113.7 are reachable.",
            ],
        ),
    ],
)
def test_each_result_and_failure_in_words(
    ports: Sequence[PortReport], ip: str | None, error: str | None, lines: list[str]
) -> None:
    assert shown(report(*ports, ip=ip, error=error)).splitlines() == lines
