"""Print the manual page, port-checker.1, made of the words of --help.

`make man` writes it anew; a test says when that is due.
"""

import sys
from collections.abc import Iterator
from typing import Any

import typer

from port_checker.cli import app


def escaped(text: str) -> str:
    """Return text as roff prints it, one line for each paragraph."""
    paragraphs = (" ".join(part.split()) for part in text.split("\n\n"))
    lines = [line.replace("\\", "\\e").replace("-", "\\-") for line in paragraphs]
    return "\n.PP\n".join(f"\\&{line}" if line.startswith((".", "'")) else line for line in lines)


def tagged(parameters: list[Any]) -> Iterator[str]:
    """Yield each option with what it does."""
    for parameter in parameters:
        if getattr(parameter, "hidden", False) or not parameter.help:
            continue
        names = ", ".join([*parameter.opts, *parameter.secondary_opts])
        is_option = parameter.param_type_name == "option"
        value = "" if is_option and parameter.is_flag else f" {parameter.metavar or ''}".rstrip()
        name = f"{names}{value}" if is_option else parameter.metavar or parameter.name.upper()
        variable = f" Environment variable: {parameter.envvar}." if parameter.envvar else ""
        default = parameter.show_default
        known = f" Default: {default}." if isinstance(default, str) else ""
        yield f".TP\n.B {escaped(name)}\n{escaped(parameter.help + known + variable)}"


def page() -> Iterator[str]:
    """Yield the lines of the page."""
    program: Any = typer.main.get_command(app)
    yield '.\\" Made by make man of what --help says.'
    yield '.TH PORT\\-CHECKER 1 "" "golem\\-port\\-checker"'
    yield ".SH NAME"
    summary, _, rest = program.help.partition("\n\n")
    summary = summary.strip().rstrip(".")
    yield f"port\\-checker \\- {escaped(summary[0].lower() + summary[1:])}"
    yield ".SH SYNOPSIS"
    commands = {name: it for name, it in program.commands.items() if not it.hidden}
    for name, command in commands.items():
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        words = ["[OPTIONS]", *(f"[{p.metavar or p.name.upper()}]" for p in arguments)]
        yield f".B port\\-checker {name}\n{escaped(' '.join(words))}\n.br"
    yield f".SH DESCRIPTION\n{escaped(rest)}"
    yield ".SH OPTIONS"
    yield from tagged(program.params)
    for name, command in commands.items():
        yield f".SH {name.upper()}\n{escaped(command.help)}"
        yield from tagged(command.params)


sys.stdout.write("\n".join(page()) + "\n")
