"""The service: in a thread of the test's process, and as a program."""

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from starlette.types import ASGIApp

from port_checker.api.app import create_served_app
from port_checker.api.records import RefusalLog
from port_checker.metrics import Metrics
from port_checker.server.connections import ConnectionLimits
from port_checker.server.run import Server, listen, server_config
from port_checker.settings import Settings
from tests.support.http import HEALTH, client_of, read_answer
from tests.support.loopback import free_port, full_backlog, open_listener
from tests.support.processes import end_with_parent
from tests.support.seccomp import refuse
from tests.support.waiting import wait_until


class ThreadServer(Server):
    """A server in a thread, which may not handle signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.contextmanager
def serve(
    app: ASGIApp | None = None,
    host: str = "127.0.0.1",
    limits: ConnectionLimits | None = None,
    on_port: int = 0,
    **values: Any,
) -> Iterator[httpx.Client]:
    """Serve an application from a thread, on a port of its own.

    Args:
        app: The application; else one is made of the settings.
        host: The address to listen on.
        limits: Of the connections.
        on_port: The port to listen on; else one that is free, whatever the settings say.
        values: Settings, by field name.

    Yields:
        A client of it.
    """
    settings = Settings(**values)
    with listen(host, on_port) as listener:
        served = app or create_served_app(settings, Metrics())
        limits = limits or ConnectionLimits(
            1000, trusted_proxies=settings.trusted_proxies, log_refusal=RefusalLog().add
        )
        server = ThreadServer(server_config(settings, lambda: served), limits)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            port = listener.getsockname()[1]
            reachable = {"::": "[::1]", "::1": "[::1]"}.get(host, "127.0.0.1")
            with client_of(f"http://{reachable}:{port}") as client:
                yield client
        finally:
            server.should_exit = True
            thread.join()


class Program:
    """A running ``port-checker``, and what it writes to stderr."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process = process
        self.port = port
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr
        self.lines.extend(self.process.stderr)

    def client(self, host: str = "127.0.0.1") -> httpx.Client:
        return client_of(f"http://{host}:{self.port}")

    def answers(self) -> bool:
        """Whether it serves by now.

        Raises:
            AssertionError: It has ended.
        """
        assert self.process.poll() is None, "".join(self.lines)
        # Tests ask often: by hand, which costs a tenth of what a client of httpx does.
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", self.port), timeout=60) as sock,
        ):
            sock.sendall(HEALTH)
            return read_answer(sock)[0].startswith(b"HTTP/1.1 200 ")
        return False

    def workers(self) -> set[int]:
        """The process ids of its workers."""
        pid = self.process.pid
        workers = set()
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                if Path("/proc", child, "cmdline").read_bytes().endswith(b"\0worker\0"):
                    workers.add(int(child))
        return workers

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        status = self.process.wait(timeout=60)
        self._reader.join()
        return status


@contextlib.contextmanager
def program(
    *command: str,
    ready: bool = True,
    descriptors: int | None = None,
    refused_calls: Sequence[str] = (),
    **environment: str,
) -> Iterator[Program]:
    """Start the program on a free port of 127.0.0.1; wait until it answers.

    Args:
        command: Starts it; by default, as a module.
        ready: Whether to wait.
        descriptors: Its hard limit of open files; the soft one is half of it.
        refused_calls: System calls that fail with EPERM.
        environment: Variables that are added.
    """
    port = int(environment.get("PORT_CHECKER_PORT") or free_port())
    bounds = {"PORT_CHECKER_HOST": "127.0.0.1", "PORT_CHECKER_PORT": str(port), **environment}

    def prepare() -> None:
        end_with_parent()
        # A shell makes its background jobs ignore SIGINT, and child processes inherit that.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if descriptors:
            resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors // 2, descriptors))
        if refused_calls:
            refuse(*refused_calls)

    with subprocess.Popen(
        command or [sys.executable, "-m", "port_checker"],
        env={**os.environ, **bounds},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,
        start_new_session=True,  # a process group, so that workers are killed as well
    ) as process:
        running = Program(process, port)
        try:
            if ready:
                wait_until(running.answers, "the program to answer")
            yield running
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            running.wait()


class PendingCheck:
    """A check of an open port and a silent one, which goes on until ``finish`` is called."""

    def __init__(self, answer: Future[httpx.Response], make_room: Callable[[], None]) -> None:
        self._answer = answer
        self._make_room = make_room

    def is_done(self) -> bool:
        return self._answer.done()

    def finish(self) -> httpx.Response:
        """Have the silent port answer, and return the service's answer."""

        def is_done() -> bool:
            self._make_room()
            return self.is_done()

        wait_until(is_done, "the check")
        return self._answer.result()


@contextlib.contextmanager
def check_under_way(running: Program) -> Iterator[PendingCheck]:
    """Ask a service for a check, and wait until it has begun."""
    with (
        open_listener() as opened,
        full_backlog() as (silent, make_room),
        running.client() as client,
        ThreadPoolExecutor() as pool,
    ):
        answer = pool.submit(ask, client, opened.getsockname()[1], silent)
        opened.accept()[0].close()
        yield PendingCheck(answer, make_room)


def passing(kind: str, address: str, prepare: str = "s.listen()") -> list[str]:
    """The command that starts the program with a socket, as systemd does.

    Args:
        kind: Python's expressions for the socket's family and type.
        address: Its expression for the address.
        prepare: What is done with the socket, ``s``.
    """
    code = (
        f"import os, socket, sys; s = socket.socket({kind}); s.bind({address}); {prepare};"
        "os.dup2(s.fileno(), 3); os.set_inheritable(3, True);"
        "os.environ |= {'LISTEN_FDS': '1', 'LISTEN_PID': str(os.getpid())};"
        "os.execv(sys.executable, [sys.executable, '-m', 'port_checker'])"
    )
    return [sys.executable, "-c", code]


def ask(client: httpx.Client, *ports: int) -> httpx.Response:
    """POST a check of ports of 127.0.0.1."""
    return client.post("/check-ports", json={"provider_ip": "127.0.0.1", "ports": ports})
