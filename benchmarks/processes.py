"""What benchmarks start: services, bare loops, and a process with open ports."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

from benchmarks import HOST, BenchmarkFailed
from tests.support.loopback import free_port

PUBLISHED = "0.1.25"

_CHECKOUT = Path(__file__).parent.parent

OURS_COMMAND = (sys.executable, "-m", "port_checker")
PYTHON_LOOP = (sys.executable, str(Path(__file__).with_name("bare_loop.py")))

# Answers everything with one constant: what uvicorn takes by itself.
UVICORN_COMMAND = (
    "sh",
    "-c",
    'cd "$0" && exec "$1" -m uvicorn --host $PORT_CHECKER_HOST --port $PORT_CHECKER_PORT '
    "--no-access-log --log-level warning benchmarks.constant:app",
    str(_CHECKOUT),
    sys.executable,
)

_PUBLISHED_VENV = _CHECKOUT / ".benchmarks" / "published"

_LOOP_SECONDS = 1.0

_PATIENCE = 30.0  # seconds for a service to answer, and for a process to end

# Limits that are never reached. They are on, since the figures should include what they cost; the
# published version has none.
_SETTINGS = {
    "PORT_CHECKER_RATE_LIMIT": "100000000/second",
    "PORT_CHECK_TARGET_RATE_LIMIT": "100000000/second",
    "PORT_CHECK_OWN_RATE_LIMIT": "100000000/second",
    "PORT_CHECK_OTHERS_RATE_LIMIT": "100000000/second",
    "PORT_CHECK_MAX_IN_FLIGHT_PER_CALLER": "10000",
}


@dataclass(frozen=True, slots=True)
class Cost:
    """What requests cost a program.

    Attributes:
        per_second: Requests that it answered in a second.
        cpu: Seconds of CPU for each.
    """

    per_second: float
    cpu: float


@dataclass(frozen=True, slots=True)
class Service:
    """A running service.

    Attributes:
        port: The port it listens on.
        pid: Its process.
        host: The address it listens on.
    """

    port: int
    pid: int
    host: str = HOST

    def cpu_seconds(self) -> float:
        """Return the CPU time that it has used, in all of its threads."""
        tasks = Path(f"/proc/{self.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9

    def descriptors(self) -> int:
        """Return how many files and sockets it has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def resident(self) -> int:
        """Return its resident memory, in KiB."""
        return self._status("VmRSS")

    def peak_resident(self) -> int:
        """Return the most resident memory it has had, in KiB."""
        return self._status("VmHWM")

    def _status(self, name: str) -> int:
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.partition(f"{name}:")[2].split()[0])


def run(name: str, measure: Callable[[ExitStack, Path], bool]) -> int:
    """Run a benchmark, and make sure that what it has started ends with it.

    Args:
        name: The beginning of the line that says why something could not be measured.
        measure: Prints the figures, and returns whether every answer was right. It gets a stack for
            what it starts, and a directory that is deleted at the end.

    Returns:
        The exit status: 0; 1 for a wrong answer, or if something could not be measured.
    """
    # So that what was started is stopped, as it is after Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with TemporaryDirectory(prefix=f"port-checker-{name}-") as directory, ExitStack() as stack:
        try:
            return 0 if measure(stack, Path(directory)) else 1
        except BenchmarkFailed as error:
            sys.stderr.write(f"{name}: {error}\n")
            return 1


def published_command() -> tuple[str, ...]:
    """Return the command that starts the published version, installed first where needed.

    Raises:
        BenchmarkFailed: The installation failed.
    """
    python = str(_PUBLISHED_VENV / "bin" / "python")
    # Written last, so that an interrupted installation is started over.
    stamp = _PUBLISHED_VENV / f"{PUBLISHED}.stamp"
    if not stamp.exists():
        where = _PUBLISHED_VENV.relative_to(_CHECKOUT)
        sys.stderr.write(f"Installing golem-port-checker {PUBLISHED} into {where} ...\n")
        requirement = f"golem-port-checker=={PUBLISHED}"
        _run(sys.executable, "-m", "venv", "--clear", str(_PUBLISHED_VENV))
        _run(python, "-m", "pip", "install", "--disable-pip-version-check", requirement)
        stamp.touch()
    return python, "-c", "from port_checker.main import start; start()"


def go_command() -> tuple[str, ...]:
    """Return the command that starts the server in Go, built first.

    Raises:
        BenchmarkFailed: It could not be built.
    """
    program = _built("go/server.go", "env", "GO111MODULE=off", "go", "build", "-o")
    start = 'GOMAXPROCS=1 exec "$0" $PORT_CHECKER_HOST:$PORT_CHECKER_PORT'
    return "sh", "-c", start, program


def c_loop_command() -> tuple[str, ...]:
    """Return the command that starts the bare loop in C, built first.

    Raises:
        BenchmarkFailed: It could not be built.
    """
    return (_built("c/loop.c", "cc", "-O2", "-o"),)


def _built(source: str, *compiler: str) -> str:
    """Compile a source file of this folder; return the program."""
    program = _CHECKOUT / ".benchmarks" / Path(source).stem
    program.parent.mkdir(exist_ok=True)
    _run(*compiler, str(program), str(Path(__file__).parent / source))
    return str(program)


def cost_of_loop(command: Sequence[str], host: str, batch: int, ports: Sequence[int]) -> Cost:
    """Run a bare loop that connects to ``batch`` ports at once; return what one batch takes.

    Raises:
        BenchmarkFailed: It could not connect.
    """
    printed = _run(*command, host, str(_LOOP_SECONDS), str(batch), *map(str, ports))
    batches, seconds, used = map(float, printed.split())
    return Cost(batches / seconds, used / batches)


@contextmanager
def open_ports(count: int, host: str = HOST) -> Iterator[list[int]]:
    """Open ``count`` ports in another process.

    Raises:
        BenchmarkFailed: They could not be opened.
    """
    script = Path(__file__).with_name("open_ports.py")
    command = [sys.executable, str(script), str(count), host]
    with _running(command, stdout=subprocess.PIPE) as process:
        assert process.stdout
        ports = [int(port) for port in process.stdout.readline().split()]
        if len(ports) != count:
            raise BenchmarkFailed(f"could not open {count} ports; see above for the reason")
        yield ports


@contextmanager
def service(
    name: str, command: Sequence[str], directory: Path, host: str = HOST
) -> Iterator[Service]:
    """Run a service, with its log written to a file; wait until it answers.

    Args:
        name: The log is called ``NAME.log``.
        command: Starts the service.
        directory: For the log. It is also the working directory, so that the service finds neither
            the ``port_checker`` nor the ``.env`` of the checkout.
        host: The address on which it listens.

    Yields:
        The running service.

    Raises:
        BenchmarkFailed: It exited, or did not answer in time.
    """
    port = free_port()
    # Without the settings of whoever runs the benchmark, and without their PYTHONPATH.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PORT_CHECK", "PYTHON"))
    }
    environment |= _SETTINGS | {"PORT_CHECKER_HOST": host, "PORT_CHECKER_PORT": str(port)}
    log = directory / f"{name}.log"
    with (
        log.open("wb") as output,
        _running(command, stdout=output, directory=directory, environment=environment) as process,
    ):
        deadline = time.monotonic() + _PATIENCE
        while not _answers(host, port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise BenchmarkFailed(f"{name} did not start:\n{log.read_text(errors='replace')}")
            time.sleep(0.05)
        yield Service(port, process.pid, host)


@contextmanager
def _running(
    command: Sequence[str],
    *,
    stdout: IO[bytes] | int,
    directory: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process. Its stderr goes where its stdout goes, unless that is a pipe to us."""
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


def _run(*command: str) -> str:
    """Run a command, and return what it prints."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
    except OSError as error:
        raise BenchmarkFailed(f"{command[0]} is not installed: {error.strerror}") from None
    if done.returncode:
        raise BenchmarkFailed(f"{' '.join(command)[:100]} failed: {done.stdout[-200:]}")
    return done.stdout


def _answers(host: str, port: int) -> bool:
    connection = HTTPConnection(host, port, timeout=1)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()
