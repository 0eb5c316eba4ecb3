"""Shows a report: a table on a terminal, plain lines elsewhere."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from port_checker.advice import sentence
from port_checker.provider.remote import MAX_PORTS_PER_REQUEST
from port_checker.provider.report import (
    PortPair,
    PortReport,
    Report,
    TlsReport,
    port_ranges,
    reached_at,
)

# A narrower terminal has no room for four columns and readable advice.
_MIN_TABLE_WIDTH = 100
_NOT_FROM = "; not from "
_CUT = "..."


@dataclass(frozen=True)
class _Row:
    """Ports with the same result."""

    ports: str
    local: str
    outside: str
    advice: str

    @property
    def colour(self) -> str:
        return "red" if self.advice else "green"


def show(report: Report, console: Console) -> None:
    """Print a report.

    Args:
        report: What to show.
        console: Where to print it; without markup, emoji codes and highlighting.
    """
    rows = [*_rows(report.ports), *map(_tls_row, report.tls)]
    rows.sort(key=lambda row: not row.advice)  # what is bad first
    all_good = not report.tls and not any(row.advice for row in rows)
    if console.is_terminal and _is_unchecked(report):
        rows = []
    elif console.is_terminal and all_good:
        rows = [row for row in rows if _NOT_FROM in row.outside]
    if not console.is_terminal:
        for row in rows:
            line = f"{row.ports}: {row.local}; {row.outside}. {row.advice}".rstrip()
            console.print(line, soft_wrap=True)
    elif console.width < _MIN_TABLE_WIDTH:
        _show_blocks(rows, console)
    elif rows:
        _show_table(rows, console)
    for note in _notes(report, show_reason=console.is_terminal and _is_unchecked(report)):
        console.print(note, soft_wrap=not console.is_terminal)
    for total in _totals(report):
        console.print(Text(total, "green" if all_good else ""), soft_wrap=not console.is_terminal)


class _End:
    """Text of which a narrow terminal shows the end: how long it may take, and how far it is."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, max(1, cell_len(self._text)))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text = Text(self._text, no_wrap=True, overflow="crop")
        if (excess := text.cell_len - options.max_width) > 0:
            text = Text(_CUT, no_wrap=True, overflow="crop") + text[excess + len(_CUT) :]
        yield text


class _Countdown(ProgressColumn):
    """What is happening; a time until the next attempt counts down."""

    def __init__(self, table_column: Column) -> None:
        super().__init__(table_column)
        self._text, self._since = "", 0.0

    def render(self, task: Task) -> _End:
        """Render the description as it is now."""
        now = task.get_time()
        if task.description != self._text:
            self._text, self._since = task.description, now
        passed = int(now - self._since)
        return _End(
            re.sub(
                r"(?<=next attempt in )[0-9]+",
                lambda seconds: str(max(0, int(seconds[0]) - passed)),
                self._text,
            )
        )


@contextmanager
def progress(
    ports: int, console: Console | None = None
) -> Iterator[tuple[Callable[[str], None], Callable[[int, int], None]]]:
    """Show on the terminal what is happening, until the block ends.

    Args:
        ports: How many are checked. Of more than a server takes at once, a bar shows how far the
            check is and how long it may still take.
        console: Where to show it; stderr unless it is given.

    Yields:
        ``on_progress`` and ``on_checked`` of ``verify``.
    """
    whole = Column(no_wrap=True, min_width=1)
    columns: list[ProgressColumn] = [
        SpinnerColumn("line", table_column=whole),
        TimeElapsedColumn(table_column=Column(no_wrap=True, min_width=len("0:00:00"))),
    ]
    if ports > MAX_PORTS_PER_REQUEST:
        columns += [BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn()]
    columns.append(_Countdown(Column()))  # the only one that may become narrower
    console = console or Console(stderr=True)
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=ports)
        yield (
            lambda text: bar.update(task, description=text),
            lambda done, _: bar.update(task, completed=done),
        )


def _show_table(rows: Iterable[_Row], console: Console) -> None:
    table = Table()
    table.add_column("Ports", min_width=len("50800-50899,"))
    table.add_column("Local binding", min_width=len("connection"))
    table.add_column("From outside", min_width=len("machine)"))
    table.add_column("What to do")
    for row in rows:
        outside = Text(row.outside, row.colour)
        table.add_row(Text(row.ports), Text(row.local), outside, Text(row.advice))
    console.print(table)


def _show_blocks(rows: Iterable[_Row], console: Console) -> None:
    for row in rows:
        result = Text.assemble(f"{row.local}; ", (row.outside, row.colour))
        console.print(Text(row.ports))
        console.print(Padding(result, (0, 0, 0, 2)))
        if row.advice:
            console.print(Padding(Text(row.advice), (0, 0, 0, 2)))
        console.print()


def _rows(ports: Iterable[PortReport]) -> Iterator[_Row]:
    groups: dict[tuple[str, str], tuple[list[PortPair], list[str]]] = {}
    for port in ports:
        # What has one cause shares a row, whatever its words from outside.
        key = (str(port.local), port.advice or _outside(port))
        pairs, outsides = groups.setdefault(key, ([], []))
        pairs.append(PortPair(port.port, port.inner))
        if (outside := _outside(port)) not in outsides:
            outsides.append(outside)
    for (local, advice), (pairs, outsides) in groups.items():
        outside = " / ".join(outsides)
        yield _Row(port_ranges(pairs), local, outside, "" if advice == outside else advice)


def _tls_row(endpoint: TlsReport) -> _Row:
    outside = _certificate(endpoint.valid, endpoint.error, endpoint.not_after)
    if len({answer.error for answer in endpoint.answers.values()}) > 1:
        said = endpoint.answers.items()
        answers = [f"{url}: {_certificate(a.valid, a.error, a.not_after)}" for url, a in said]
        outside += f" ({', '.join(answers)})"
    places = {name: e for a in endpoint.answers.values() for name, e in a.places.items()}
    outside += _from_places(places, good=endpoint.valid, word="valid")
    ports = port_ranges([PortPair(endpoint.port, endpoint.inner)])
    return _Row(ports, "TLS", outside, endpoint.advice or "")


def _certificate(valid: bool, error: str | None, not_after: str | None) -> str:
    if valid:
        return f"certificate valid until {not_after}"
    return error or "not checked"


def _outside(port: PortReport) -> str:
    if port.reachable:
        outside = "reachable"
    elif not port.answers:
        outside = "not checked"
    elif port.arrives_at is not None:
        outside = "arrives at another port"
    else:
        outside = port.error or "answered by another machine"
    if len({verdict.accessible for verdict in port.answers.values()}) > 1:
        answers = [f"{url}: {said.error or 'accessible'}" for url, said in port.answers.items()]
        outside += f" ({', '.join(answers)})"
    places = {name: said.error for at in port.places.values() for name, said in at.items()}
    return outside + _from_places(places, good=port.reachable, word="reachable")


def _from_places(errors: Mapping[str, str | None], *, good: bool, word: str) -> str:
    """Say from which places it is otherwise than the verdict says."""
    if not good:
        others = [name for name, error in errors.items() if not error]
        return f"; {word} from {', '.join(others)}" if others else ""
    by_error: dict[str, list[str]] = {}
    for name, error in errors.items():
        if error:
            by_error.setdefault(error, []).append(name)
    return "".join(f"{_NOT_FROM}{', '.join(names)} ({e})" for e, names in by_error.items())


def _is_unchecked(report: Report) -> bool:
    """Whether no server checked anything, and that is all there is to say."""
    is_checked = any(server.asked for server in report.servers)
    return not is_checked and all(port.local in ("bound", "in use") for port in report.ports)


def _notes(report: Report, *, show_reason: bool) -> Iterator[str]:
    in_rows = not show_reason and any(not port.answers for port in report.ports)
    for server in report.servers:
        if server.error and server.asked:
            yield sentence(f"{server.url} checked only some of the ports: {server.error}.")
        elif server.error and not in_rows:
            yield sentence(f"{server.url}: {server.error}.")
    yield from report.notes


def _totals(report: Report) -> Iterator[str]:
    at_each = reached_at(report.servers, report.ports)
    if len(at_each) < 2:
        yield _total(report, report.reachable, report.ip or "this machine")
    for ip, reached in at_each.items() if len(at_each) > 1 else ():
        yield _total(report, len(reached), ip)


def _total(report: Report, reachable: int, whose: str) -> str:
    port, verb = ("port", "is") if report.total == 1 else ("ports", "are")
    over = f"over IPv{report.family}"
    return f"{reachable} of {report.total} {port} of {whose} {verb} reachable {over}."
