"""What runs beside the benchmark: the two services, and the process with the open ports."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import IO

from benchmarks import HOST, BenchmarkFailed

PUBLISHED = "0.1.25"

OURS_COMMAND = (sys.executable, "-m", "port_checker")

_CHECKOUT = Path(__file__).parent.parent
_PUBLISHED_VENV = _CHECKOUT / ".benchmarks" / "published"

_PATIENCE = 30.0  # seconds for a service to answer, and for a process to end

# Limits that nobody reaches: what they cost belongs to the figures. The published version has none.
_SETTINGS = {
    "PORT_CHECKER_HOST": HOST,
    "PORT_CHECKER_RATE_LIMIT": "100000000/second",
    "PORT_CHECK_TARGET_RATE_LIMIT": "100000000/second",
}


def published_command() -> tuple[str, ...]:
    """Return how to start the published version; installs it if it is not there yet.

    Raises:
        BenchmarkFailed: It could not be installed.
    """
    python = str(_PUBLISHED_VENV / "bin" / "python")
    # Written last, so that an installation that was broken off is made anew.
    stamp = _PUBLISHED_VENV / f"{PUBLISHED}.stamp"
    if not stamp.exists():
        where = _PUBLISHED_VENV.relative_to(_CHECKOUT)
        sys.stderr.write(f"Installing golem-port-checker {PUBLISHED} into {where} ...\n")
        requirement = f"golem-port-checker=={PUBLISHED}"
        _run(sys.executable, "-m", "venv", "--clear", str(_PUBLISHED_VENV))
        _run(python, "-m", "pip", "install", "--disable-pip-version-check", requirement)
        stamp.touch()
    return python, "-c", "from port_checker.server.app import start; start()"


@contextmanager
def open_ports(count: int) -> Iterator[list[int]]:
    """Have ``count`` ports open on loopback, in a process of their own.

    Raises:
        BenchmarkFailed: They could not be opened.
    """
    script = Path(__file__).with_name("open_ports.py")
    command = [sys.executable, str(script), str(count)]
    with _running(command, stdout=subprocess.PIPE) as process:
        assert process.stdout
        ports = [int(port) for port in process.stdout.readline().split()]
        if len(ports) != count:
            raise BenchmarkFailed(f"{count} ports could not be opened; the reason stands above")
        yield ports


@contextmanager
def service(name: str, command: Sequence[str], directory: Path) -> Iterator[int]:
    """Have a service run, from when it answers; its log lines are written, as in production.

    Args:
        name: What to call its log.
        command: How to start it.
        directory: Where the log goes. It is the working directory, too: neither the checkout's
            ``port_checker`` nor its ``.env`` must be what a service finds first.

    Yields:
        The port that it listens on.

    Raises:
        BenchmarkFailed: It ended, or did not answer in time.
    """
    port = _free_port()
    # Nothing of the caller's own settings, nor a PYTHONPATH.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PORT_CHECK", "PYTHON"))
    }
    environment |= _SETTINGS | {"PORT_CHECKER_PORT": str(port)}
    log = directory / f"{name}.log"
    with (
        log.open("wb") as output,
        _running(command, stdout=output, directory=directory, environment=environment) as process,
    ):
        deadline = time.monotonic() + _PATIENCE
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise BenchmarkFailed(f"{name} did not start:\n{log.read_text(errors='replace')}")
            time.sleep(0.05)
        yield port


@contextmanager
def _running(
    command: Sequence[str],
    *,
    stdout: IO[bytes] | int,
    directory: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Have a process run, with stderr where stdout goes unless that is read here."""
    stderr = None if stdout == subprocess.PIPE else subprocess.STDOUT
    process = subprocess.Popen(
        command, stdout=stdout, stderr=stderr, cwd=directory, env=environment
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _run(*command: str) -> None:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise BenchmarkFailed(f"{' '.join(command)} failed:\n{done.stdout}")


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        port: int = sock.getsockname()[1]
        return port


def _answers(port: int) -> bool:
    connection = HTTPConnection(HOST, port, timeout=1)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()
