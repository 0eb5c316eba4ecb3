"""Shows a report: a table on a terminal, plain lines elsewhere."""

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from port_checker.provider.report import PortReport, Report


def show(report: Report, console: Console) -> None:
    """Print a table on a terminal, and plain lines elsewhere."""
    table = Table("Ports", "Local binding", "From outside", "What to do")
    for ports, local, outside, advice in _rows(report.ports):
        if console.is_terminal:
            seen = Text(outside, "red" if advice else "green")
            table.add_row(Text(ports), Text(local), seen, Text(advice))
        else:
            console.print(f"{ports}: {local}; {outside}. {advice}".rstrip(), soft_wrap=True)
    if console.is_terminal:
        console.print(table)
    for note in _notes(report):
        console.print(note, soft_wrap=True)


def _rows(ports: Iterable[PortReport]) -> list[tuple[str, str, str, str]]:
    """Ports with the same result share one row."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for port in ports:
        key = port.local, _outside(port), port.advice or ""
        groups.setdefault(key, []).append(port.port)
    return [(_ranges(numbers), *key) for key, numbers in groups.items()]


def _outside(port: PortReport) -> str:
    if port.reachable:
        outside = "reachable"
    elif not port.answers:
        outside = "not asked"
    else:
        outside = port.error or "answered by another machine"
    if len({verdict.accessible for verdict in port.answers.values()}) > 1:
        answers = [f"{url}: {said.error or 'accessible'}" for url, said in port.answers.items()]
        outside += f" ({', '.join(answers)})"
    return outside


def _ranges(ports: list[int]) -> str:
    """Write ports like ``7466, 50800–50899``."""  # noqa: RUF002  # an en dash, for people
    runs: list[list[int]] = []
    for port in sorted(ports):
        if runs and runs[-1][1] == port - 1:
            runs[-1][1] = port
        else:
            runs.append([port, port])
    return ", ".join(str(low) if low == high else f"{low}–{high}" for low, high in runs)  # noqa: RUF001  # the same


def _notes(report: Report) -> Iterable[str]:
    for server in report.servers:
        if server.error:
            extent = " all ports" if server.asked else " any port"
            yield f"{server.url} could not check{extent}: {server.error}."
    whose = report.ip or "this machine"
    yield f"{report.reachable} of {report.total} ports of {whose} are reachable."
