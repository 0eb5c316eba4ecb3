"""Reloading: ``port-checker reload`` has the running service adopt changed settings.

They meet at a socket in the service's RuntimeDirectory=, which no other user may enter. systemd
reads EnvironmentFile= again for ExecReload=, so the new settings are the environment of the program
that asks.
"""

import contextlib
import json
import os
import socket
from pathlib import Path
from typing import Self

from port_checker.settings import PREFIXES

# Seconds that the program waits for new processes. systemd's TimeoutStartSec= bounds it as well.
_PATIENCE = 300.0

# The most bytes of an environment, or of an answer.
_MAX_MESSAGE = 128 * 1024


class ReloadFailed(Exception):
    """The service runs on as before; the message says why."""


def request_reload() -> None:
    """Have the running service adopt this process's settings; return when it has.

    Raises:
        ReloadFailed: No service runs, or it cannot adopt them.
    """
    path = _path()
    if not path:
        raise ReloadFailed("cannot reload: RUNTIME_DIRECTORY is not set; use systemctl reload")
    environment = {name: value for name, value in os.environ.items() if name.startswith(PREFIXES)}
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as service:
            service.settimeout(_PATIENCE)
            service.connect(path)
            service.send(json.dumps(environment).encode())
            answer = json.loads(service.recv(_MAX_MESSAGE))
    except (ConnectionResetError, BrokenPipeError, ValueError):  # ValueError: an empty answer
        raise ReloadFailed("cannot reload: the service ended before it had reloaded") from None
    except OSError as error:
        reason = error.strerror or error
        raise ReloadFailed(f"cannot reload: the service does not answer: {reason}") from None
    if answer is not None:
        raise ReloadFailed(f"cannot reload: {answer}")


class ReloadRequest:
    """A program that waits for the service to have reloaded.

    Attributes:
        environment: That program's environment variables, as far as they may be settings.
    """

    def __init__(self, program: socket.socket, environment: dict[str, str]) -> None:
        self.environment = environment
        self._program = program

    def answer(self, error: str | None = None) -> None:
        """Say how the reload ended: with an error, or without one."""
        with self._program, contextlib.suppress(OSError):
            self._program.send(json.dumps(error).encode())


class ReloadRequests:
    """The socket on which the service is asked to reload, if it has a RuntimeDirectory=."""

    def __init__(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        if path := _path():
            with contextlib.suppress(OSError):  # then nobody can reload
                Path(path).unlink(missing_ok=True)
                self._listener.bind(path)
                self._listener.listen()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def next(self) -> ReloadRequest | None:
        """Return a request that has arrived, if one has."""
        with contextlib.suppress(OSError, ValueError):
            program, _ = self._listener.accept()
            program.settimeout(1)
            return ReloadRequest(program, json.loads(program.recv(_MAX_MESSAGE)))
        return None


def _path() -> str | None:
    directory = os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]  # a drop-in may add more
    return f"{directory}/reload" if directory else None
