"""Shows a report on a terminal: a table, or blocks where it is narrow; and the check's progress."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

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

from port_checker.provider.lines import NOT_FROM, Row, is_unchecked, notes, rows, totals
from port_checker.provider.remote import MAX_PORTS_PER_REQUEST
from port_checker.provider.report import Report

# A narrower terminal has no room for four columns with readable advice.
_MIN_TABLE_WIDTH = 100
_CUT = "..."


def show(report: Report, console: Console) -> None:
    """Print a report on a terminal.

    Args:
        report: What to show.
        console: Where to print it; without markup, emoji codes and highlighting.
    """
    shown, unchecked = rows(report), is_unchecked(report)
    all_good = not report.tls and not any(row.advice for row in shown)
    if unchecked:
        shown = []
    elif all_good:
        shown = [row for row in shown if NOT_FROM in row.outside]
    if console.width < _MIN_TABLE_WIDTH:
        _show_blocks(shown, console)
    elif shown:
        _show_table(shown, console)
    for note in notes(report, show_reason=unchecked):
        console.print(note)
    for total in totals(report):
        console.print(Text(total, "green" if all_good else ""))


class _End:
    """Text of which a narrow terminal shows the end, which says how far the check is."""

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
    """What is happening; the time until the next attempt counts down."""

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
        ports: How many ports are checked. If they are more than a server takes at once, a bar shows
            how far the check is and how long it may still take.
        console: Where to show it; stderr by default.

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


def _show_table(rows: Iterable[Row], console: Console) -> None:
    table = Table()
    table.add_column("Ports", min_width=len("50800-50899,"))
    table.add_column("Local binding", min_width=len("connection"))
    table.add_column("From outside", min_width=len("machine)"))
    table.add_column("What to do")
    for row in rows:
        outside = Text(row.outside, _colour(row))
        table.add_row(Text(row.ports), Text(row.local), outside, Text(row.advice))
    console.print(table)


def _show_blocks(rows: Iterable[Row], console: Console) -> None:
    for row in rows:
        result = Text.assemble(f"{row.local}; ", (row.outside, _colour(row)))
        console.print(Text(row.ports))
        console.print(Padding(result, (0, 0, 0, 2)))
        if row.advice:
            console.print(Padding(Text(row.advice), (0, 0, 0, 2)))
        console.print()


def _colour(row: Row) -> str:
    return "red" if row.advice else "green"
