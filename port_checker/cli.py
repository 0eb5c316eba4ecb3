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

_ALL_REACHABLE, _SOME_NOT, _NOBODY_ASKED, _INTERRUPTED = 0, 1, 3, 130

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
            help="Ports and ranges of ports, such as 7466 50800-50899.",
            show_default=_DEFAULT_PORTS,
        ),
    ] = None,
    servers: Annotated[
        list[str] | None,
        typer.Option(
            "--server",
            envvar="PORT_CHECKER_URL",
            metavar="URL",
            help="A port checker to ask. May be given several times.",
        ),
    ] = None,
    ip: Annotated[
        str | None,
        typer.Option(help="This machine's address as the world sees it; else the server tells it."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Check that the world reaches this machine on its ports.

    Run it on the provider's machine. It opens a listener on each port, asks a server to connect to
    it from outside, and says what to do about those that are not reached.

    Exit status: 0 all ports are reachable, 1 some are not, 2 wrong usage, 3 no server could be
    asked.
    """
    from rich.console import Console
    from rich.markup import escape

    from port_checker.linux import raise_descriptor_limit
    from port_checker.provider import verify
    from port_checker.provider.screen import show

    numbers = _parse_ports(ports or [_DEFAULT_PORTS])
    if not servers:
        raise typer.BadParameter("name one, or set PORT_CHECKER_URL.", param_hint="--server")
    for url in servers:
        if not url.lower().startswith(("http://", "https://")):
            raise typer.BadParameter(
                f"{url!r} must begin with http:// or https://.", param_hint="--server"
            )
    if ip:
        _require_address(ip)
    raise_descriptor_limit()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an encoding may have no dash
    waiting = Console(stderr=True).status("")
    try:
        if waiting.console.is_terminal and not as_json:
            waiting.start()
        report = asyncio.run(
            verify(
                numbers,
                servers=servers,
                ip=ip,
                on_progress=lambda text: waiting.update(escape(text)),
            )
        )
    except KeyboardInterrupt:
        raise typer.Exit(_INTERRUPTED) from None
    finally:
        waiting.stop()
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(report), indent=2))
    else:
        show(report, Console(markup=False, emoji=False, highlight=False))
    if all(server.error and not server.asked for server in report.servers):
        raise typer.Exit(_NOBODY_ASKED)
    raise typer.Exit(_ALL_REACHABLE if report.reachable == report.total else _SOME_NOT)


def _parse_ports(words: Iterable[str]) -> list[int]:
    """Return the ports that words like ``7466`` and ``50800-50899`` name, in order, each once."""
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
