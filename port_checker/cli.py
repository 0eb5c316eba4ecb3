"""The program ``port-checker``: the server, and the provider's side."""

import asyncio
import dataclasses
import io
import json
import re
import sys
from collections.abc import Iterable
from typing import Annotated

import typer

from port_checker import __version__

# What a provider of the Golem network opens by default.
_DEFAULT_PORTS = "50800-50899"

_ALL_REACHABLE, _SOME_UNREACHABLE, _NO_SERVER, _INTERRUPTED = 0, 1, 3, 130

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # which puts the lines of a docstring's paragraph together
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the program."""
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"port-checker {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    _: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Tells a provider which of its TCP ports the world can reach.

    Without a command it starts the server, as "serve" does.
    """
    if context.invoked_subcommand is None:
        serve()


@app.command()
def serve() -> None:
    """Start the server. Settings come from environment variables and .env.

    Exit status: 0 after a normal stop, 1 if it cannot start, 2 if a setting is wrong.
    """
    from port_checker.server.run import serve as run_server
    from port_checker.server.settings import SettingsError, load_settings

    try:
        settings = load_settings()
    except SettingsError as error:
        sys.stderr.write(f"port-checker: {error}\n")
        raise typer.Exit(2) from None
    raise typer.Exit(run_server(settings))


@app.command()
def check(
    ports: Annotated[
        list[str] | None,
        typer.Argument(
            help="Ports and port ranges, such as 7466 50800-50899.",
            show_default=_DEFAULT_PORTS,
        ),
    ] = None,
    servers: Annotated[
        list[str] | None,
        typer.Option(
            "--server",
            envvar="PORT_CHECKER_URL",
            metavar="URL",
            help="URL of a port checker to ask; may be repeated.",
        ),
    ] = None,
    ip: Annotated[
        str | None,
        typer.Option(help="This machine's public address; by default, what the server sees."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Check that the world can reach this machine on its ports.

    Run it on the provider's machine. It listens on each port, asks a server to connect from
    outside, and says what to do about the ports that cannot be reached.

    Exit status: 0 all ports are reachable, 1 some are not, 2 wrong usage, 3 no server could check
    them, 130 interrupted.
    """
    from rich.console import Console
    from rich.markup import escape

    from port_checker.linux import raise_descriptor_limit
    from port_checker.provider import verify
    from port_checker.provider.screen import show

    numbers = _parse_ports(ports or [_DEFAULT_PORTS])
    if not servers:
        raise typer.BadParameter("give one, or set PORT_CHECKER_URL.", param_hint="--server")
    for url in servers:
        if not url.lower().startswith(("http://", "https://")):
            raise typer.BadParameter(
                f"{url!r} must start with http:// or https://.", param_hint="--server"
            )
    if ip:
        _require_address(ip)
    raise_descriptor_limit()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an encoding may have no dash
    status = Console(stderr=True).status("")
    try:
        if status.console.is_terminal and not as_json:
            status.start()
        report = asyncio.run(
            verify(
                numbers,
                servers=servers,
                ip=ip,
                on_progress=lambda text: status.update(escape(text)),
            )
        )
    except KeyboardInterrupt:
        raise typer.Exit(_INTERRUPTED) from None
    finally:
        status.stop()
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(report), indent=2))
    else:
        show(report, Console(markup=False, emoji=False, highlight=False))
    if all(server.error and not server.asked for server in report.servers):
        raise typer.Exit(_NO_SERVER)
    raise typer.Exit(_ALL_REACHABLE if report.reachable == report.total else _SOME_UNREACHABLE)


def _parse_ports(words: Iterable[str]) -> list[int]:
    """Expand words like ``7466`` and ``50800-50899`` into ports, in order, without repeats."""
    ports: dict[int, None] = {}
    for word in words:
        match = re.fullmatch("([0-9]{1,5})(?:[-–]([0-9]{1,5}))?", word)  # noqa: RUF001  # as shown
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= low <= high <= 65535:
            raise typer.BadParameter(
                f"{word!r} is neither a port (1-65535) nor a range such as 50800-50899.",
                param_hint="PORTS",
            )
        ports |= dict.fromkeys(range(low, high + 1))
    return list(ports)


def _require_address(ip: str) -> None:
    from port_checker.addresses import parse_address

    try:
        parse_address(ip)
    except ValueError:
        raise typer.BadParameter(f"{ip!r} is not an IP address.", param_hint="--ip") from None
