"""What people see of a report: rendered in the process, from Report objects."""

import io
import re
from collections.abc import Sequence
from ipaddress import ip_address

import pytest
from rich.console import Console

from port_checker import advice
from port_checker.connect import OPEN, REFUSED, TIMED_OUT, Verdict
from port_checker.linux import TcpSocket, TcpState
from port_checker.provider import PortReport, Report, ServerReport
from port_checker.provider.lines import lines
from port_checker.provider.report import (
    Binding,
    Observation,
    Place,
    PortPair,
    TlsAnswer,
    TlsReport,
    judge,
)
from port_checker.provider.screen import show
from port_checker.tls import TlsVerdictKind

URL, OTHER = "https://checker.example", "https://other.example"

PROGRAM = TcpSocket(ip_address("::"), 50801, TcpState.LISTEN, 0, True, ip_address("::"))


def port(number: int, *verdicts: Verdict, inner: int = 0, **observed: object) -> PortReport:
    answers = dict(zip((URL, OTHER), verdicts, strict=False))
    observation = Observation(
        PortPair(number, inner or number),
        **{
            "binding": Binding("bound"),
            "seen": OPEN in verdicts,
            "answers": answers,
            "captured": True,
            **observed,
        },  # type: ignore[arg-type]
    )
    return judge(observation, Place())


def report(*ports: PortReport, error: str | None = None, **more: object) -> Report:
    server = ServerReport(URL, any(port.answers for port in ports), error)
    fields = {"ip": "203.0.113.7", "servers": [server], "ports": list(ports), **more}
    return Report(**fields)  # type: ignore[arg-type]


def shown(report: Report, width: int, encoding: str = "utf-8") -> str:
    """What is printed on a terminal that is so wide."""
    output = io.BytesIO()
    console = Console(
        file=io.TextIOWrapper(output, encoding, write_through=True),
        force_terminal=True,
        width=width,
        markup=False,
        emoji=False,
        highlight=False,
        color_system="truecolor",
    )
    show(report, console)
    return output.getvalue().decode(encoding)


def without_colours(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def rows(text: str) -> list[list[str]]:
    """The rows of a table; cells of more lines put together."""
    table: list[list[str]] = []
    for line in without_colours(text).splitlines():
        here = [cell.strip() for cell in re.split("[│┃|]", line)[1:-1]]
        if len(here) < 4:  # a rule
            continue
        if here[1] or not table:  # the local binding is one line: a new row
            table.append(here)
        else:
            table[-1] = [" ".join(filter(None, both)) for both in zip(table[-1], here, strict=True)]
    return table


TROUBLED = [50803, *range(50820, 50825), 50850, 50852]
WRITTEN = "50803, 50820-50824, 50850, 50852"
NINETY = report(
    *(port(n, REFUSED) if n in TROUBLED else port(n, OPEN) for n in range(50800, 50900))
)
LAST_LINE = "92 of 100 ports of 203.0.113.7 are reachable over IPv4."


def test_ports_with_the_same_result_share_one_line() -> None:
    bad, good, total = lines(NINETY)
    assert good.startswith("50800-50802, 50804-50819, ")
    assert good.endswith(": bound; reachable.")
    assert bad == f"{WRITTEN}: bound; Connection refused. {advice.NOT_FORWARDED}"
    assert total == LAST_LINE


@pytest.mark.parametrize("encoding", ["utf-8", "iso-8859-1", "cp437", "ascii"])
@pytest.mark.parametrize("width", [120, 100])
def test_a_table_on_a_terminal(width: int, encoding: str) -> None:
    text = shown(NINETY, width, encoding)
    header, bad, good = rows(text)
    assert header == ["Ports", "Local binding", "From outside", "What to do"]
    assert good[1:] == ["bound", "reachable", ""]
    assert bad[:2] == [WRITTEN, "bound"]
    assert " ".join(bad[2:]).replace("  ", " ") == f"Connection refused {advice.NOT_FORWARDED}"
    assert "\x1b[31mConnection" in text
    assert "\x1b[32mreachable" in text
    assert "?" not in text
    assert max(map(len, without_colours(text).splitlines())) <= width


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_narrow_terminal_loses_nothing(encoding: str) -> None:
    text = without_colours(shown(NINETY, 40, encoding))
    assert max(map(len, text.splitlines())) <= 40
    one_line = " ".join(text.split())
    assert f"{WRITTEN} bound; Connection refused {advice.NOT_FORWARDED}" in one_line
    assert one_line.endswith(LAST_LINE)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            report(
                port(50800, binding=Binding("not permitted")),
                port(50801, OPEN, binding=Binding("in use", holders=[PROGRAM]), captured=False),
                ip="::1",
                family=6,
            ),
            [
                f"50800: not permitted; not checked. {advice.NOT_PERMITTED_HERE}",
                "50801: in use; reachable.",
                "1 of 2 ports of ::1 are reachable over IPv6.",
            ],
        ),
        (
            report(port(50800, OPEN, REFUSED, seen=False)),
            [
                f"50800: bound; answered by another machine ({URL}: accessible, "
                f"{OTHER}: Connection refused). {advice.ANSWERED_ELSEWHERE}",
                "0 of 1 port of 203.0.113.7 is reachable over IPv4.",
            ],
        ),
        (
            report(
                *(port(n, OPEN, inner=n - 10000) for n in (60800, 60801)),
                port(50900, OPEN, arrives_at=50901),
                notes=["This is true of all."],
            ),
            [
                f"50900: bound; arrives at another port. {advice.CROSSED}",
                "60800-60801:50800-50801: bound; reachable.",
                "This is true of all.",
                "2 of 3 ports of 203.0.113.7 are reachable over IPv4.",
            ],
        ),
        (  # the reason stands in the row
            report(port(50800, reason=f"{URL} [red]waits[/red] :warning:"), ip=None, error="waits"),
            [
                f"50800: bound; not checked. "
                f"{advice.NOT_CHECKED.format(reason=f'{URL} [red]waits[/red] :warning:')}",
                "0 of 1 port of this machine is reachable over IPv4.",
            ],
        ),
        (
            report(port(50800, OPEN), port(50801, reason="so"), error="Sorry. (CHECK_FAILED)"),
            [
                f"50801: bound; not checked. {advice.NOT_CHECKED.format(reason='so')}",
                "50800: bound; reachable.",
                f"{URL} checked only some of the ports: Sorry. (CHECK_FAILED).",
                "1 of 2 ports of 203.0.113.7 are reachable over IPv4.",
            ],
        ),
        (
            report(
                port(50800, OPEN),
                servers=[
                    ServerReport(URL, True, None),
                    ServerReport(OTHER, False, "cannot be reached: Connection refused"),
                ],
            ),
            [
                "50800: bound; reachable.",
                f"{OTHER}: cannot be reached: Connection refused.",
                "1 of 1 port of 203.0.113.7 is reachable over IPv4.",
            ],
        ),
    ],
)
def test_each_result_and_failure_in_words(given: Report, expected: Sequence[str]) -> None:
    assert [*lines(given)] == expected


# Where a server looks from several places

SGP, LON = "sgp.checker.example", "lon.checker.example"


def test_who_cannot_reach_a_port_is_named_though_the_verdict_is_good() -> None:
    places = {"checker.example": OPEN, SGP: TIMED_OUT, LON: TIMED_OUT}
    some = report(port(80, OPEN), port(81, OPEN, places={URL: places}))
    total = "2 of 2 ports of 203.0.113.7 are reachable over IPv4."
    assert [*lines(some)] == [
        "80: bound; reachable.",
        f"81: bound; reachable; not from {SGP}, {LON} (Connection timed out).",
        total,
    ]
    on_terminal = without_colours(shown(some, 200))
    assert f"reachable; not from {SGP}, {LON} (Connection timed out)" in on_terminal
    assert "80 " not in on_terminal
    assert without_colours(shown(report(port(80, OPEN)), 200)).splitlines() == [
        "1 of 1 port of 203.0.113.7 is reachable over IPv4."
    ]


def test_who_can_reach_a_port_is_named_though_the_verdict_is_bad() -> None:
    places = {"checker.example": TIMED_OUT, SGP: OPEN, LON: TIMED_OUT}
    # The connection that was seen is that of the place which got through.
    result = report(port(80, TIMED_OUT, seen=True, places={URL: places}))
    assert next(lines(result)) == (
        f"80: bound; Connection timed out; reachable from {SGP}. {advice.REACHED_FROM_SOME_PLACES}"
    )


def test_a_certificate_that_some_place_does_not_trust() -> None:
    answer = TlsAnswer(TlsVerdictKind.VALID, None, "2030", {SGP: "certificate expired", LON: None})
    endpoint = TlsReport(443, 443, True, None, "2030", None, {URL: answer})
    line = f"443: TLS; certificate valid until 2030; not from {SGP} (certificate expired)."
    assert next(lines(report(tls=[endpoint]))) == line
