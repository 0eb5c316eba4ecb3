"""What the service counts, for Prometheus and for systemd's status.

Each process counts in a row of numbers. A worker shares the memory of its row with its parent,
which adds the rows up: nothing is counted twice, no counter falls when a worker dies, and there are
no files.
"""

import math
import os
import threading
import time
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple, Protocol

from port_checker.connect import VerdictKind
from port_checker.errors import ErrorCode, Limit
from port_checker.settings import MOST_PERSPECTIVES
from port_checker.tls import TlsVerdictKind


class CheckOutcome(StrEnum):
    """How a check ended, in the log and in the metrics."""

    COMPLETED = "completed"
    CANCELLED = "cancelled"  # the caller left
    FAILED = "failed"  # the checker's own trouble
    BUG = "bug"


class VoteOutcome(StrEnum):
    """How another place's vote compares with the common verdict."""

    AGREED = "agreed"
    DISAGREED = "disagreed"
    FAILED = "failed"  # it has no vote


class Row(Protocol):
    """A row of numbers, such as an array, or memory that is shared between processes."""

    def __getitem__(self, slot: int, /) -> float: ...
    def __setitem__(self, slot: int, number: float, /) -> None: ...


class Family(NamedTuple):
    """A metric, with all values of its label.

    Attributes:
        name: Its name in Prometheus without ``port_checker_``, and a counter's without ``_total``.
        documentation: What it measures.
        combine: Makes one figure of those of several processes.
        is_counter: Whether the figures are kept when a process ends.
        label: The name of its label; empty if it has none.
        values: All values of the label; there is a figure for each.
    """

    name: str
    documentation: str
    combine: Callable[[Iterable[float]], float] = sum
    is_counter: bool = False
    label: str = ""
    values: tuple[str, ...] = ("",)


def _counter(
    name: str, documentation: str, label: str = "", values: Iterable[str] = ("",)
) -> Family:
    return Family(name, documentation, is_counter=True, label=label, values=tuple(values))


# Upper bounds, in seconds. Open ports on the same continent answer within the first ones; with the
# default settings a check takes at most 17 s.
_BUCKETS: Final = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 7.5, 10.0, 12.5, 15.0, 17.5, 20.0,
)  # fmt: skip

# A histogram. A bucket does not include the lower ones; "sum" is the sum of the durations.
DURATION: Final = _counter(
    "check_duration_seconds",
    "How long completed checks took.",
    "le",
    (*map(str, _BUCKETS), "+Inf", "sum"),
)

# The operations of the API. "other" is for pages, their files, and paths that do not exist.
ROUTES: Final = ("/check-ports", "/check-tls", "/port/{port}", "/ip", "/health", "other")

_REQUEST_BUCKETS: Final = (0.001, 0.0025, *_BUCKETS)

# Such a histogram for each route.
REQUESTS: Final = _counter(
    "request_duration_seconds",
    "How long requests took in the application, by route, however they were answered.",
    "route",
    (
        f"{route} {figure}"
        for route in ROUTES
        for figure in (*map(str, _REQUEST_BUCKETS), "+Inf", "sum")
    ),
)

# A row counts by a place's number, since the names depend on the settings.
VOTES: Final = _counter(
    "perspective_votes",
    "Verdicts of other places on ports, compared with the common verdict.",
    "vote",
    (f"{place} {vote}" for place in range(MOST_PERSPECTIVES) for vote in VoteOutcome),
)

FAMILIES: Final = (
    _counter("checks", "Checks, by how they ended.", "outcome", CheckOutcome),
    _counter("ports", "Ports in completed checks, by verdict.", "verdict", VerdictKind),
    _counter(
        "tls_checks",
        "Completed checks of TLS endpoints, by result.",
        "result",
        dict.fromkeys(kind.outcome for kind in TlsVerdictKind),
    ),
    _counter("errors", "Error responses, by code.", "code", ErrorCode),
    _counter(
        "refusals", "Requests and connections that a limit refused, by limit.", "limit", Limit
    ),
    _counter("receive_deadlines", "Connections closed because a request did not arrive in time."),
    _counter("log_lines_dropped", "Log lines that could not be written, or not fast enough."),
    _counter(
        "connections_closed",
        "Connections closed because there were too many: a new one of an address that has its "
        "share, or one that waited for its client and made way for another.",
        "reason",
        ("over_share", "made_way"),
    ),
    DURATION,
    REQUESTS,
    VOTES,
    Family("ports_in_flight", "Ports under check."),
    Family("ports_in_flight_limit", "Ports that may be under check at once."),
    Family("connections", "Clients' open connections."),
    Family("connections_limit", "Connections that may be open at once."),
    Family("rate_limit_store_up", "Whether the store of rate limits can be reached: 1 or 0.", min),
    Family(
        "event_loop_lag_seconds",
        "How late the event loop was when it last looked, in the process where it was worst.",
        max,
    ),
)


class Figure(NamedTuple):
    """One number of a row: a family's figure for one value of its label."""

    family: Family
    value: str


_FIGURES: Final = [Figure(family, value) for family in FAMILIES for value in family.values]
_SLOTS: Final = {(each.family.name, each.value): slot for slot, each in enumerate(_FIGURES)}
# Where the figures of checks' durations begin, and those of a route.
_DURATION_SLOT: Final = _SLOTS[DURATION.name, DURATION.values[0]]
_REQUEST_SLOTS: Final = {
    route: _SLOTS[REQUESTS.name, f"{route} {_REQUEST_BUCKETS[0]}"] for route in ROUTES
}
_SAMPLED: Final = len(_FIGURES)  # the slot that says whether a row's gauges were ever read
_RECEIVED: Final = _SAMPLED + 1  # connections that other processes have accepted for this one
ROW_SIZE: Final = _RECEIVED + 1

_CONNECTIONS, _MOST_CONNECTIONS, _PORTS, _MOST_PORTS = (
    _SLOTS[name, ""]
    for name in (
        "connections",
        "connections_limit",
        "ports_in_flight",
        "ports_in_flight_limit",
    )
)


class Metrics:
    """The figures of one process.

    Attributes:
        row: ``ROW_SIZE`` numbers, which this process alone writes.
    """

    def __init__(self, row: Row | None = None) -> None:
        self.row: Row = array("d", bytes(8 * ROW_SIZE)) if row is None else row
        self._gauges: dict[int, Callable[[], float]] = {}

    def count(self, name: str, value: str = "", by: float = 1) -> None:
        """Count something.

        Args:
            name: The name of a counter in ``FAMILIES``.
            value: The value of its label.
            by: How many to add.
        """
        self.row[_SLOTS[name, value]] += by

    def count_ports(self, kinds: Sequence[VerdictKind]) -> None:
        """Count ports that were checked, by the kinds of their verdicts."""
        for kind in set(kinds):
            self.count("ports", kind, kinds.count(kind))

    def count_votes(self, place: int, vote: VoteOutcome, by: int = 1) -> None:
        """Count votes of a place, which is given by its number among the perspectives."""
        self.count(VOTES.name, f"{place} {vote}", by)

    def time_check(self, seconds: float) -> None:
        """Count a completed check, and how long it took."""
        self.row[_DURATION_SLOT + bisect_left(_BUCKETS, seconds)] += 1
        self.row[_DURATION_SLOT + len(_BUCKETS) + 1] += seconds

    def time_request(self, route: str, seconds: float) -> None:
        """Count a request, and how long it took; ``route`` is one of ``ROUTES`` or any other."""
        first = _REQUEST_SLOTS.get(route, _REQUEST_SLOTS["other"])
        self.row[first + bisect_left(_REQUEST_BUCKETS, seconds)] += 1
        self.row[first + len(_REQUEST_BUCKETS) + 1] += seconds

    def watch(self, name: str, read: Callable[[], float]) -> None:
        """Have each ``sample`` read a figure: a gauge, or a counter that is kept elsewhere."""
        self._gauges[_SLOTS[name, ""]] = read

    def sample(self) -> None:
        """Read the figures that are watched."""
        for slot, read in self._gauges.items():
            self.row[slot] = read()
        self.row[_SAMPLED] = 1

    def receive_connection(self) -> None:
        """Note that a connection has come which another process accepted."""
        self.row[_RECEIVED] += 1
        self.sample()


def connections_received(row: Row) -> int:
    """Return how many connections have come to a process that another one accepted."""
    return int(row[_RECEIVED])


def share_taken(row: Row, unreceived: int) -> float:
    """Return which share of a process's room is taken: of its connections, and of its ports.

    Args:
        row: What it counts.
        unreceived: Connections that are on their way to it.
    """
    connections = row[_CONNECTIONS] + unreceived
    # An application that checks no ports has no limit of them.
    return connections / row[_MOST_CONNECTIONS] + row[_PORTS] / (row[_MOST_PORTS] or math.inf)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The figures of all processes, put together.

    Attributes:
        workers: The ids of the processes that serve.
        deaths: Workers that ended without being told to.
        has_gauges: Whether any process has read its gauges yet; else they are no figures.
        votes: Other places' votes, by place and outcome.
    """

    workers: list[int]
    deaths: int
    has_gauges: bool
    votes: Mapping[tuple[str, VoteOutcome], float]
    _figures: Row

    def __getitem__(self, key: tuple[str, str]) -> float:
        """Return a figure, by its family's name and its label's value."""
        return self._figures[_SLOTS[key]]


class Totals:
    """The rows of all processes, and what ended ones have counted. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: list[tuple[int, Row, Sequence[str]]] = []
        self._ended_votes: Counter[tuple[str, VoteOutcome]] = Counter()
        self._ended = array("d", bytes(8 * ROW_SIZE))
        self._deaths = 0

    def add(self, row: Row, process: int | None = None, perspectives: Sequence[str] = ()) -> None:
        """Take in the row of a process that starts.

        Args:
            row: Where it counts.
            process: Its id, if it is not this one.
            perspectives: The names of the other places that it asks.
        """
        with self._lock:
            self._rows.append((process or os.getpid(), row, perspectives))

    def end(self, row: Row, *, is_death: bool = True) -> None:
        """Keep the counters of a process that has ended, whether it died or was stopped."""
        with self._lock:
            for _, other, perspectives in self._rows:
                if other is row:
                    self._ended_votes.update(_votes(row, perspectives))
            self._rows = [each for each in self._rows if each[1] is not row]
            for slot, figure in enumerate(_FIGURES):
                if figure.family.is_counter:
                    self._ended[slot] += row[slot]
            self._deaths += is_death

    def snapshot(self) -> Snapshot:
        """Put all figures together."""
        with self._lock:
            workers = [process for process, _, _ in self._rows]
            rows = [[row[slot] for slot in range(ROW_SIZE)] for _, row, _ in self._rows]
            votes = Counter(self._ended_votes)
            for _, row, perspectives in self._rows:
                votes.update(_votes(row, perspectives))
            figures = list(self._ended)
            deaths = self._deaths
        # A process that has just begun has zeros, which would mean that Redis is down.
        sampled = [row for row in rows if row[_SAMPLED]]
        for slot, figure in enumerate(_FIGURES):
            if figures_of := rows if figure.family.is_counter else sampled:
                figures[slot] += figure.family.combine(row[slot] for row in figures_of)
        return Snapshot(workers, deaths, bool(sampled), votes, figures)


def _votes(row: Row, perspectives: Sequence[str]) -> "Counter[tuple[str, VoteOutcome]]":
    votes: Counter[tuple[str, VoteOutcome]] = Counter()
    for place, name in enumerate(perspectives):
        for vote in VoteOutcome:
            votes[name, vote] += int(row[_SLOTS[VOTES.name, f"{place} {vote}"]])
    return votes


class StatusLine:
    """What the service is doing, in a line for people.

    Args:
        totals: The figures.
        clock: Returns the time in seconds.
    """

    def __init__(self, totals: Totals, clock: Callable[[], float] = time.monotonic) -> None:
        self._totals = totals
        self._clock = clock
        self._since = clock()
        self._checks = 0.0

    def text(self) -> str:
        """Return the line, about the time since it was last asked for."""
        now, totals = self._clock(), self._totals.snapshot()
        checks = sum(totals["checks", outcome] for outcome in CheckOutcome)
        line = (
            f"{checks - self._checks:.0f} checks in the last {now - self._since:.0f} s; "
            f"{totals['ports_in_flight', '']:.0f} ports in flight, "
            f"{totals['connections', '']:.0f} connections"
        )
        self._since, self._checks = now, checks
        return line
