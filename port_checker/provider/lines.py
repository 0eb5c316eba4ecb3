"""A report in words: plain lines, and the rows and sentences that ``screen`` shows as well.

It does without the library for terminals, which takes 0.1 s of CPU to load (measured).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from port_checker.advice import sentence
from port_checker.provider.report import (
    PortPair,
    PortReport,
    Report,
    TlsAnswer,
    TlsReport,
    port_ranges,
    reached_at,
)

NOT_FROM = "; not from "


@dataclass(frozen=True)
class Row:
    """Ports with the same result, in words; without advice, nothing is wrong with them."""

    ports: str
    local: str
    outside: str
    advice: str


def lines(report: Report) -> Iterator[str]:
    """Yield a report line by line."""
    for row in rows(report):
        yield f"{row.ports}: {row.local}; {row.outside}. {row.advice}".rstrip()
    yield from notes(report, show_reason=False)
    yield from totals(report)


def rows(report: Report) -> list[Row]:
    """Return the rows of a report, those with trouble first."""
    in_order = [*_port_rows(report.ports), *map(_tls_row, report.tls)]
    return sorted(in_order, key=lambda row: not row.advice)


def _port_rows(ports: Iterable[PortReport]) -> Iterator[Row]:
    groups: dict[tuple[str, str], tuple[list[PortPair], list[str]]] = {}
    for port in ports:
        outside = _outside(port)
        # Ports with the same advice share a row, even if they look different from outside.
        pairs, outsides = groups.setdefault((port.local, port.advice or outside), ([], []))
        pairs.append(port.pair)
        if outside not in outsides:
            outsides.append(outside)
    for (local, advice), (pairs, outsides) in groups.items():
        outside = " / ".join(outsides)
        yield Row(port_ranges(pairs), local, outside, "" if advice == outside else advice)


def _tls_row(endpoint: TlsReport) -> Row:
    outside = _certificate(endpoint)
    if len({answer.error for answer in endpoint.answers.values()}) > 1:
        answers = [f"{url}: {_certificate(answer)}" for url, answer in endpoint.answers.items()]
        outside += f" ({', '.join(answers)})"
    places = {name: e for a in endpoint.answers.values() for name, e in a.places.items()}
    outside += _from_places(places, good=endpoint.valid, word="valid")
    return Row(port_ranges([endpoint.pair]), "TLS", outside, endpoint.advice or "")


def _certificate(result: TlsReport | TlsAnswer) -> str:
    if result.valid:
        return f"certificate valid until {result.not_after}"
    return result.error or "not checked"


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
        answers = [f"{url}: {v.error or 'accessible'}" for url, v in port.answers.items()]
        outside += f" ({', '.join(answers)})"
    places = {name: v.error for verdicts in port.places.values() for name, v in verdicts.items()}
    return outside + _from_places(places, good=port.reachable, word="reachable")


def _from_places(errors: Mapping[str, str | None], *, good: bool, word: str) -> str:
    """Name the places whose results differ from the verdict."""
    if not good:
        others = [name for name, error in errors.items() if not error]
        return f"; {word} from {', '.join(others)}" if others else ""
    by_error: dict[str, list[str]] = {}
    for name, error in errors.items():
        if error:
            by_error.setdefault(error, []).append(name)
    return "".join(f"{NOT_FROM}{', '.join(names)} ({e})" for e, names in by_error.items())


def is_unchecked(report: Report) -> bool:
    """Whether there is nothing to say but that no server checked anything."""
    could_listen = all(port.local in ("bound", "in use") for port in report.ports)
    return could_listen and not report.is_checked


def notes(report: Report, *, show_reason: bool) -> Iterator[str]:
    """Yield what is true of all ports, or of a server.

    Args:
        report: The report.
        show_reason: Whether to say why no port was checked. If not, the rows of the ports say it.
    """
    in_rows = not show_reason and any(not port.answers for port in report.ports)
    for server in report.servers:
        if server.error and server.asked:
            yield sentence(f"{server.url} checked only some of the ports: {server.error}.")
        elif server.error and not in_rows:
            yield sentence(f"{server.url}: {server.error}.")
    yield from report.notes


def totals(report: Report) -> Iterator[str]:
    """Yield how many ports are reachable, at each address that was checked."""
    at_each = reached_at(report.servers, report.ports)
    counts = {ip: len(reached) for ip, reached in at_each.items()}
    if len(counts) < 2:
        counts = {report.ip or "this machine": report.reachable}
    port, verb = ("port", "is") if report.total == 1 else ("ports", "are")
    over = f"over IPv{report.family}"
    for whose, reachable in counts.items():
        yield f"{reachable} of {report.total} {port} of {whose} {verb} reachable {over}."
