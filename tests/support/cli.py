"""The program's commands, called in this process: for what does not concern a process."""

import re
import signal
from dataclasses import dataclass

from typer.testing import CliRunner

from port_checker.cli import app


@dataclass(frozen=True)
class Done:
    """How a run of the program ended."""

    status: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """What it says on stderr, without the frame around it and its line breaks."""
        return " ".join(re.sub("[─│╭╮╰╯]", " ", self.err).split())


def invoke(*words: str, **environment: str) -> Done:
    """Run the program with these variables added to the environment."""
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        result = CliRunner().invoke(app, words, prog_name="port-checker", env=environment)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Done(result.exit_code, result.stdout, result.stderr)
