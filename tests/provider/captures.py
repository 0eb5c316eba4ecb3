"""What the terminal shows at several widths: ``python -m tests.provider.captures`` prints it."""

import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address

from rich.console import Console

from port_checker import advice
from port_checker.connect import OPEN, REFUSED, TIMED_OUT, Verdict
from port_checker.linux import TcpSocket, TcpState
from port_checker.provider import PortReport, Report, ServerReport
from port_checker.provider.evidence import Attempt
from port_checker.provider.report import Binding, Observation, Place, PortPair, judge
from port_checker.provider.screen import progress, show

WIDTHS = 40, 80, 120
URL = "https://checker.example"
IP = "203.0.113.7"
ARRIVED = Attempt(ip_address("192.168.1.2"), "eth0")
LOCAL = TcpSocket(ip_address("127.0.0.1"), 50830, TcpState.LISTEN, 0, False, ip_address("0.0.0.0"))  # noqa: S104  # shown only
DEAD = ServerReport(URL, False, "cannot be reached: Connection refused")


def port(number: int, verdict: Verdict | None = OPEN, **observed: object) -> PortReport:
    known = {"seen": verdict is OPEN, "captured": True, "binding": Binding("bound"), **observed}
    answers = {URL: verdict} if verdict else {}
    return judge(Observation(PortPair(number, number), answers=answers, **known), Place())  # type: ignore[arg-type]


def report(*ports: PortReport) -> Report:
    return Report(IP, [ServerReport(URL, True, None, IP)], list(ports))


SUCCESS = report(*(port(n) for n in (7466, *range(50800, 50900))))
TWO_CAUSES = report(
    *(port(n, REFUSED) for n in range(50800, 50820)),
    *(port(n, TIMED_OUT, attempt=ARRIVED) for n in range(50820, 50840, 2)),
    *(port(n) for n in range(50840, 50900)),
)
SEVEN_CAUSES = replace(
    report(
        port(7466, REFUSED),
        *(port(n, TIMED_OUT, attempt=ARRIVED) for n in range(50800, 50810)),
        *(port(n, OPEN, seen=False) for n in range(50810, 50820)),
        *(port(n, OPEN, arrives_at=n + 1) for n in range(50820, 50830)),
        port(50830, REFUSED, binding=Binding("in use", holders=[LOCAL])),
        *(port(n, None, binding=Binding("outgoing connection")) for n in (50840, 50842)),
        *(port(n, None, excluded=True) for n in range(50850, 50860)),
        *(port(n) for n in range(50860, 50900)),
    ),
    notes=[advice.NOT_LOOPED_BACK.format(ip=IP)],
)
DEAD_SERVER = Report(
    None, [DEAD], [port(n, None, reason=f"{URL}: {DEAD.error}") for n in range(50800, 50900)]
)
REPORTS = {
    "success": SUCCESS,
    "two causes": TWO_CAUSES,
    "seven causes": SEVEN_CAUSES,
    "dead server": DEAD_SERVER,
}
WAITING = {
    "checking": f"{URL} is checking 100 ports (at most 35 s): 12 done",
    "waiting": f"{URL}: answer with HTTP status 503: it is busy; next attempt in 15 s",
}


def terminal(width: int) -> Console:
    return Console(
        file=io.StringIO(),
        force_terminal=True,
        width=width,
        markup=False,
        emoji=False,
        highlight=False,
        color_system="truecolor",
    )


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def capture(report: Report, width: int) -> str:
    """What a report looks like, with its colours."""
    console = terminal(width)
    show(report, console)
    return written(console)


def capture_waiting(text: str, width: int) -> str:
    """The line that is shown while something is waited for."""
    console = terminal(width)
    with progress(100, console) as (on_progress, _):
        on_progress(text)
    frames = re.split(r"\x1b\[2K|\r|\n", written(console))
    return [line for line in map(without_colours, frames) if line.strip()][-1]


def capture_help(width: int, *words: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "port_checker", *words, "--help"],
        env={**os.environ, "COLUMNS": str(width), "TERMINAL_WIDTH": str(width)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def without_colours(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def captures() -> Iterator[tuple[str, str]]:
    for width in WIDTHS:
        for name, report in REPORTS.items():
            yield f"{name}, {width} columns", without_colours(capture(report, width))
        for name, text in WAITING.items():
            yield f"{name}, {width} columns", capture_waiting(text, width)
    for width in 40, 80:
        yield f"help, {width} columns", capture_help(width, "check")


if __name__ == "__main__":
    for title, text in captures():
        sys.stdout.write(f"--- {title}\n{text}\n")
