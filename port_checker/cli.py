"""The program ``port-checker``: the server, and the provider's side."""

import asyncio
import contextlib
import dataclasses
import errno
import io
import json
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from port_checker import __version__

if TYPE_CHECKING:
    from port_checker.provider import Report
    from port_checker.server.run import Service
    from port_checker.settings import Settings

# What a provider of the Golem network opens by default.
_DEFAULT_PORTS = "7466 50800-50899"

# Seconds that the program has to end by itself when a signal is to end it.
_SIGNAL_PATIENCE = 1.0

# Open files that a check needs, and some to spare: with less than 8 asyncio writes a traceback.
_MIN_DESCRIPTORS = 24

_ALL_REACHABLE, _SOME_UNREACHABLE, _NO_SERVER, _INTERRUPTED = 0, 1, 3, 130

# Columns of the help, two less than the terminal's: click alone would take 50 at least.
_HELP_WIDTH = max(30, min(shutil.get_terminal_size().columns, 80) - 2)

app = typer.Typer(
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # whose frames cut examples and defaults off at 40 columns
    context_settings={"help_option_names": ["-h", "--help"], "terminal_width": _HELP_WIDTH},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"port-checker {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    _: Annotated[
        bool,
        typer.Option(
            "--version", "-V", callback=_show_version, is_eager=True, help="Show the version."
        ),
    ] = False,
) -> None:
    """Tells a provider which of its TCP ports the world can reach.

    Without a command it starts the server, as "serve" does.
    """
    if context.invoked_subcommand is None:
        serve()


@app.command()
def serve(
    check_settings: Annotated[
        bool,
        typer.Option(
            "--check-settings", help="Say what is wrong with the settings; start nothing."
        ),
    ] = False,
) -> None:
    """Start the server. Settings come from environment variables and .env.

    Exit status: 0 after a normal stop, 1 if it cannot start, 2 if a setting is wrong.
    """
    _raise_interrupts()
    from port_checker.settings import SettingsError, load_settings, warnings_of_names

    try:
        settings = load_settings()
    except SettingsError as error:
        sys.stderr.write(f"port-checker: {error}\n")
        if not check_settings:
            from port_checker.server.systemd import refuse_waiting

            refuse_waiting()
        raise typer.Exit(2) from None
    if check_settings:
        for warning in warnings_of_names(os.environ):
            sys.stderr.write(f"port-checker: {warning}\n")
        return

    with _saying_why_it_cannot_start():
        has_served = _service(settings).run()
    raise typer.Exit(0 if has_served else 1)


@app.command(hidden=True)
def reload() -> None:
    """Have the running service go on with the settings as they are now, in new processes.

    It is what "systemctl reload" runs.

    Exit status: 0 they serve, 1 the service goes on as before, 2 a setting is wrong.
    """
    from port_checker.server.reload import ReloadFailed, request_reload
    from port_checker.settings import SettingsError, load_settings

    # systemd ends it so when the service is to stop, and would call that stop a failure otherwise.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    try:
        load_settings()
        request_reload()
    except (SettingsError, ReloadFailed) as error:
        sys.stderr.write(f"port-checker: {error}\n")
        raise typer.Exit(2 if isinstance(error, SettingsError) else 1) from None


@app.command(hidden=True)
def worker() -> None:
    """Serve as one of the processes that "serve" starts."""
    from port_checker.server.workers import receive_assignment

    assignment = receive_assignment()
    with _saying_why_it_cannot_start():
        _service(assignment.settings).run_worker(assignment)


@contextlib.contextmanager
def _saying_why_it_cannot_start() -> Iterator[None]:
    from port_checker.server.run import CannotStart

    try:
        yield
    except CannotStart as error:
        sys.stderr.write(f"port-checker: {error}\n")
        raise typer.Exit(1) from None


def _service(settings: "Settings") -> "Service":
    from port_checker.api.app import create_served_app
    from port_checker.api.records import RefusalLog
    from port_checker.server.run import Service

    return Service(settings, create_served_app, RefusalLog().add)


@app.command()
def health(
    url: Annotated[
        str | None,
        typer.Argument(
            metavar="URL",
            help="URL of the service, or unix:/path; by default, of the one that these settings "
            "start on this machine.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Ask a running server whether it is healthy; for containers and scripts.

    Exit status: 0 it is, 1 it is not, 2 wrong usage or a wrong setting.
    """
    # __main__.py does the same without typer, which takes most of the time.
    from port_checker.server.health import run

    raise typer.Exit(run(url))


def _refuse_name(parameter: typer.CallbackParam, value: list[str] | None) -> None:
    """Say what was meant by an option that there is not."""
    if value:
        intended = "--server" if parameter.name == "url" else "ports without an option"
        raise typer.BadParameter(f"there is no such option: did you mean {intended}?")


_Ports = Annotated[
    list[str] | None,
    typer.Argument(
        help="Ports and port ranges.",  # examples are in the docstrings: newer typers keep no room
        show_default=_DEFAULT_PORTS,
    ),
]
_Servers = Annotated[
    list[str] | None,
    typer.Option(
        "--server",
        envvar="PORT_CHECKER_URL",
        metavar="URL",
        help="URL of a port checker to ask; may be repeated.",
    ),
]
_Tls = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PORT",
        help="Also check the certificate at this port, on which a program of this machine "
        "serves TLS (HTTPS, say), such as 443 or 443:8443; may be repeated.",
    ),
]
_Ip = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS", help="This machine's public address; by default, what the server sees."
    ),
]
_Ipv4 = Annotated[
    bool,
    typer.Option(
        "-4",
        "--ipv4",
        help="Check over IPv4; with -6, over both. By default, IPv4 "
        "where a server can be reached over it, else IPv6.",
    ),
]
_Ipv6 = Annotated[bool, typer.Option("-6", "--ipv6", help="Check over IPv6.")]
_All = Annotated[
    bool,
    typer.Option(
        "--all", help="Every server that answers must reach a port; by default, one is enough."
    ),
]
_Url = Annotated[list[str] | None, typer.Option("--url", hidden=True, callback=_refuse_name)]
_Port = Annotated[
    list[str] | None, typer.Option("--port", "--ports", hidden=True, callback=_refuse_name)
]


@app.command()
def check(
    ports: _Ports = None,
    servers: _Servers = None,
    tls: _Tls = None,
    ip: _Ip = None,
    ipv4: _Ipv4 = False,
    ipv6: _Ipv6 = False,
    every_server: _All = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON document; with -4 -6, a list of two."),
    ] = False,
    url: _Url = None,  # noqa: ARG001  # refused
    port: _Port = None,  # noqa: ARG001  # refused
) -> None:
    """Check that the world can reach this machine on its ports.

    Run it on the provider's machine. It listens on each port, asks a server to connect from
    outside, and says what to do about the ports that cannot be reached.

    Ports are written like 7466 50800-50899. Where your router forwards a port to another one of
    this machine: outer:inner, such as 60800-60899:50800-50899.

    Exit status: 0 all ports are reachable and certificates valid, 1 some are not, 2 wrong usage,
    3 no server could check them, 130 interrupted.
    """
    try:
        run = _prepare(ports, servers, tls, ip, ipv4, ipv6, quiet=as_json)
        _raise_signals()
        with _ended_by_signals():
            reports = run()
        _print(reports, as_json)
    except KeyboardInterrupt:
        raise typer.Exit(_INTERRUPTED) from None
    except _Ended as end:
        _end_by(end.number)
    except (OSError, MemoryError) as error:
        raise _failure("cannot check anything", error) from None
    raise typer.Exit(_status(reports, every_server))


@app.command(name="watch")
def watch_ports(
    ports: _Ports = None,
    servers: _Servers = None,
    tls: _Tls = None,
    ip: _Ip = None,
    ipv4: _Ipv4 = False,
    ipv6: _Ipv6 = False,
    every_server: _All = False,
    every: Annotated[
        int,
        typer.Option(
            metavar="SECONDS",
            min=60,  # each check costs the server and this machine's firewall something
            max=365 * 24 * 3600,
            help="Seconds between checks, about; at least 60.",
        ),
    ] = 600,
    on_change: Annotated[
        str | None,
        typer.Option(
            metavar="CMD",
            help="Run this at each change; the new report is on its stdin, as check --json has it.",
        ),
    ] = None,
    url: _Url = None,  # noqa: ARG001  # refused
    port: _Port = None,  # noqa: ARG001  # refused
) -> None:
    """Check again and again, and print only what changes: beside a running provider, say.

    Each change is a line with its time. It runs until it is ended.

    Ports are written like 7466 50800-50899. Where your router forwards a port to another one of
    this machine: outer:inner, such as 60800-60899:50800-50899.

    Exit status: after SIGTERM that of the last check (see check), 130 interrupted.
    """
    from port_checker.provider.watch import log, run_command, watch

    with _refusing("--on-change"):
        command = shlex.split(on_change or "")
    status = _NO_SERVER

    def run_and_remember() -> "Sequence[Report]":
        nonlocal status
        with _ended_by_signals():
            reports = run()
        status = _status(reports, every_server)
        return reports

    def tell(lines: Sequence[str], reports: "Sequence[Report]") -> None:
        log(lines)
        if command and (fault := run_command(command, _document(reports))):
            _say(f"--on-change: {fault}")

    try:
        _require_stdout()
        run = _prepare(ports, servers, tls, ip, ipv4, ipv6, quiet=True)
        _raise_signals()
        watch(run_and_remember, every, tell)
    except KeyboardInterrupt:
        raise typer.Exit(_INTERRUPTED) from None
    except _Ended as end:
        if end.number != signal.SIGTERM:
            _end_by(end.number)
        raise typer.Exit(status) from None
    except (OSError, MemoryError) as error:
        raise _failure("cannot go on", error) from None


def _failure(what: str, error: OSError | MemoryError) -> typer.Exit:
    """Say what this machine has too little of (files, threads or memory, say); return the end."""
    reason = error.strerror or error if isinstance(error, OSError) else "out of memory"
    _say(f"{what}: {reason}")
    return typer.Exit(_NO_SERVER)


def _prepare(
    ports: Sequence[str] | None,
    servers: Sequence[str] | None,
    tls: Sequence[str] | None,
    ip: str | None,
    ipv4: bool,
    ipv6: bool,
    *,
    quiet: bool,
) -> "Callable[[], list[Report]]":
    """Read the arguments of a check; return what makes it.

    Raises:
        OSError: This process may open too few files.
    """
    from port_checker.linux import raise_descriptor_limit
    from port_checker.provider.http_client import ServerUrl
    from port_checker.provider.report import port_pairs

    pairs = _parse_ports(ports or [_DEFAULT_PORTS], "PORTS")
    with _refusing("PORTS"):
        port_pairs(pairs)
    endpoints = _parse_ports(tls, "--tls") if tls else []
    if not servers:
        raise typer.BadParameter("give one, or set PORT_CHECKER_URL.", param_hint="--server")
    with _refusing("--server"):
        for url in servers:
            ServerUrl.parse(url)
    families: list[int | None] = [*([4] if ipv4 else []), *([6] if ipv6 else [])] or [None]
    if ip is not None:
        _require_address(ip, families)
    limit = raise_descriptor_limit()
    if limit != resource.RLIM_INFINITY and limit < _MIN_DESCRIPTORS:
        raise OSError(
            f"this process may open only {limit} files, and needs {_MIN_DESCRIPTORS}: "
            "raise that limit (ulimit -n)"
        )
    hints = list(_hints(ports or []))

    def run() -> "list[Report]":
        reports = [
            _verify(pairs, endpoints, servers, ip, family, quiet=quiet) for family in families
        ]
        return [dataclasses.replace(report, notes=[*report.notes, *hints]) for report in reports]

    return run


def _status(reports: "Sequence[Report]", every_server: bool) -> int:
    """Return the exit status that reports make."""
    ports = [port for report in reports for port in report.ports]
    if not any(report.is_checked for report in reports):
        could_listen = any(port.local in ("bound", "in use") for port in ports)
        return _NO_SERVER if could_listen or not ports else _SOME_UNREACHABLE
    verdicts = [verdict for port in ports for verdict in port.answers.values()]
    all_good = (
        all(port.reachable for port in ports)
        and all(endpoint.valid for report in reports for endpoint in report.tls)
        and not (every_server and not all(verdict.accessible for verdict in verdicts))
    )
    return _ALL_REACHABLE if all_good else _SOME_UNREACHABLE


def _hints(words: Iterable[str]) -> Iterator[str]:
    """Say what is read otherwise than it may be meant."""
    from port_checker.advice import READ_AS_FORWARD, READ_AS_LIST

    for word in words:
        if match := re.fullmatch("([0-9]{1,5}):([0-9]{1,5})", word):
            low, high = int(match[1]), int(match[2])
            if low < high and low // 100 == high // 100:
                yield READ_AS_FORWARD.format(word=word, low=low, high=high)
        elif match := re.fullmatch("([1-9][0-9]?),([0-9]{3})", word):
            low, high = int(match[1]), int(match[2])
            yield READ_AS_LIST.format(word=word, low=low, high=high, number=f"{low}{match[2]}")


def _raise_interrupts() -> None:
    """Have an interrupt raised as ``KeyboardInterrupt`` from here on, not end the process."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class _Ended(SystemExit):  # which asyncio lets through wherever it is raised
    """A signal is to end the program, which restores the terminal's cursor first."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


def _raise_signals() -> None:
    """Have signals that end the program raise exceptions from here on, unless they are ignored."""

    def end(number: int, _: object) -> None:
        raise _Ended(number)

    _raise_interrupts()
    for number in signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)


def _end_by(number: int) -> NoReturn:
    """End as the signal does by default."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """End the program if a signal is to end the block, and that has not ended a second later.

    Python runs a signal's handler between two of its own instructions, and OpenSSL may take minutes
    over one handshake: a server can show certificates that are that much work.
    """
    from port_checker.linux import start_thread

    has_ended = threading.Event()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        while number := os.read(reader, 1):
            if not has_ended.wait(_SIGNAL_PATIENCE):
                if sys.stderr is not None and sys.stderr.isatty():
                    os.write(sys.stderr.fileno(), b"\x1b[?25h\n")  # shows the cursor again
                os._exit(128 + number[0])
        os.close(reader)

    start_thread(watch)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # gets signals at once
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        has_ended.set()
        os.close(writer)


def _verify(
    pairs: Sequence[tuple[int, int]],
    endpoints: Sequence[tuple[int, int]],
    servers: Sequence[str],
    ip: str | None,
    family: int | None,
    *,
    quiet: bool,
) -> "Report":
    """Have the ports verified; on a terminal, show what is happening meanwhile."""
    from port_checker.provider import verify

    reports: list[Report] = []

    async def check(**callbacks: Any) -> None:
        # Not returned: asyncio writes out what a task returns when it restores a signal's handler.
        reports.append(
            await verify(pairs, servers=servers, tls=endpoints, ip=ip, family=family, **callbacks)
        )

    on_terminal = sys.stderr is not None and sys.stderr.isatty()  # None if it was closed
    if not on_terminal:
        asyncio.run(check(on_progress=_tell_wait))
    elif quiet:
        asyncio.run(check())
    else:
        from port_checker.provider.screen import progress

        with progress(len(pairs)) as (on_progress, on_checked):
            asyncio.run(check(on_progress=on_progress, on_checked=on_checked))
    return reports[0]


def _tell_wait(text: str) -> None:
    """Where there is no terminal, say what is waited for, and nothing else."""
    if "next attempt in" in text:
        _say(text)


def _say(text: str) -> None:
    """Write a line to stderr; it is no reason to end that nobody can read it."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            sys.stderr.write(f"port-checker: {text}\n")


def _print(reports: Sequence["Report"], as_json: bool) -> None:
    """Write the reports to stdout. It is no failure if their reader (head, say) has left."""
    try:
        _write(reports, as_json)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left cannot be written either
        if isinstance(error, BrokenPipeError):
            return
        _say(f"cannot write the report: {error.strerror}")
        raise typer.Exit(_SOME_UNREACHABLE) from None


def _write(reports: Sequence["Report"], as_json: bool) -> None:
    _require_stdout()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a server's words may not fit the encoding
    if as_json:
        typer.echo(_document(reports))
    elif sys.stdout.isatty():
        from rich.console import Console

        from port_checker.provider.screen import show

        console = Console(markup=False, emoji=False, highlight=False)
        with console.capture() as capture:  # if it wrote and could not, it would end the program
            for report in reports:
                show(report, console)
        sys.stdout.write(capture.get())
    else:
        from port_checker.provider.lines import lines

        sys.stdout.writelines(f"{line}\n" for report in reports for line in lines(report))
    sys.stdout.flush()


def _require_stdout() -> None:
    if sys.stdout is None:  # it was closed
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))


def _document(reports: Sequence["Report"]) -> str:
    """Return a report as JSON, or a list of several."""
    documents = [dataclasses.asdict(report, dict_factory=_in_words) for report in reports]
    return json.dumps(documents if len(documents) > 1 else documents[0], indent=2)


def _in_words(fields: Sequence[tuple[str, object]]) -> dict[str, object]:
    """Return the fields of a report for JSON, with what the kind of a verdict means for it."""
    from port_checker.connect import VerdictKind
    from port_checker.tls import TlsVerdictKind

    document = dict[str, object]()
    for name, value in fields:
        match value:
            case VerdictKind():
                document["accessible"] = value is VerdictKind.OPEN
            case TlsVerdictKind():
                document["valid"] = value is TlsVerdictKind.VALID
            case _:
                document[name] = value
    return document


def _parse_ports(words: Iterable[str], param_hint: str) -> list[tuple[int, int]]:
    """Expand words like ``7466`` and ``60800-60899:50800-50899``: pairs of outer and inner port.

    They come in order, without repeats. The lists that the program prints are read as well.
    """
    pairs: dict[tuple[int, int], None] = {}
    for word in re.split(r"[\s,]+", " ".join(words).strip(" ,")):
        if "://" in word:
            raise typer.BadParameter(
                "that is a URL: did you mean to put --server before it?", param_hint=param_hint
            )
        outer, _, inner = word.partition(":")
        outers, inners = _parse_range(outer), _parse_range(inner if ":" in word else outer)
        if not outers or len(outers) != len(inners):
            raise typer.BadParameter(
                f"{word!r} is neither a port (1-65535) nor a range such as 50800-50899, nor two of "
                "the same length such as 60800-60899:50800-50899.",
                param_hint=param_hint,
            )
        pairs |= dict.fromkeys(zip(outers, inners, strict=True))
    return list(pairs)


def _parse_range(text: str) -> range:
    """Return the ports of a range; none if it is not one."""
    match = re.fullmatch("([0-9]{1,5})(?:[-–]([0-9]{1,5}))?", text)  # noqa: RUF001  # as typeset
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    return range(low, high + 1) if 1 <= low <= high <= 65535 else range(0)


@contextlib.contextmanager
def _refusing(param_hint: str) -> Iterator[None]:
    """Say what is wrong with an argument."""
    try:
        yield
    except ValueError as error:
        message = str(error).removesuffix(".") + "."
        raise typer.BadParameter(message, param_hint=param_hint) from None


def _require_address(ip: str, families: Sequence[int | None]) -> None:
    from port_checker.addresses import parse_address

    try:
        version = parse_address(ip).version
    except ValueError:
        raise typer.BadParameter(f"{ip!r} is not an IP address.", param_hint="--ip") from None
    if families not in ([None], [version]):
        raise typer.BadParameter(f"{ip} is an IPv{version} address.", param_hint="--ip")
