"""What the program tells systemd, which is here a socket of the test's."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from port_checker.schemas import ErrorCode, ErrorResponse
from port_checker.server import systemd
from tests.support.http import HEALTH, connected, read_answer
from tests.support.loopback import free_port
from tests.support.service import Program, passing, program


class Manager:
    """Receives notices as systemd does."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def next(self) -> list[str]:
        return self._socket.recv(4096).decode().splitlines()

    def next_other_than(self, state: str) -> list[str]:
        while state in (assignments := self.next()):
            pass
        return assignments


@contextmanager
def manager(address: str) -> Iterator[Manager]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + address[1:] if address.startswith("@") else address)
        sock.settimeout(60)
        yield Manager(sock)


def is_healthy(running: Program) -> bool:
    with running.client() as client:
        return client.get("/health").status_code == 200


@pytest.mark.parametrize("workers", ["1", "2"])
def test_it_listens_on_a_socket_that_systemd_passes_and_tells_how_it_is(
    workers: str, tmp_path: Path
) -> None:
    port, address = free_port(), str(tmp_path / "notify")
    with (
        manager(address) as notices,
        program(
            *passing("socket.AF_INET", f"('127.0.0.1', {port})"),
            ready=False,
            PORT_CHECKER_HOST="192.0.2.7",  # which cannot be bound
            PORT_CHECKER_PORT=str(port),
            PORT_CHECKER_WORKERS=workers,
            NOTIFY_SOCKET=address,
        ) as running,
        running.client() as client,
        ExitStack() as stack,
    ):
        first = notices.next()
        assert "READY=1" in first
        status = "0 checks in the last [0-9]+ s; 0 ports in flight, [0-9]+ connections"
        assert re.fullmatch(f"STATUS={status}", first[-1])
        accepted = stack.enter_context(connected(client))
        assert is_healthy(running)
        assert "WATCHDOG=1" in notices.next()
        running.process.send_signal(signal.SIGTERM)
        assert notices.next_other_than("WATCHDOG=1") == [
            "STOPPING=1",
            "STATUS=Finishing the checks in flight",
        ]
        head = b""  # whoever was accepted is answered
        while b"\r\nconnection: close\r\n" not in head.lower():  # workers hear of it a little later
            accepted.sendall(HEALTH)
            head, _ = read_answer(accepted)
            assert head.startswith(b"HTTP/1.1 200 ")
        assert running.wait() == 0
    assert f"Listening on 127.0.0.1:{port}," in running.lines[0]


def test_a_wrong_setting_answers_those_who_wait_at_a_passed_socket() -> None:
    """Else systemd would start the service again for them, and again."""
    path = f"\0{__name__} {os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        clients = [socket.socket(socket.AF_UNIX) for _ in range(3)]
        with ExitStack() as stack:
            for client in clients:
                stack.enter_context(client)
                client.settimeout(60)
                client.connect(path)
            clients[0].sendall(HEALTH)
            environment = {**os.environ, "LISTEN_FDS": "1", "PORT_CHECKER_PORT": "0"}
            done = subprocess.run(
                ["sh", "-c", f"LISTEN_PID=$$ exec {sys.executable} -m port_checker"],
                env=environment,
                preexec_fn=lambda: os.dup2(listener.fileno(), 3),
                pass_fds=[3],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            for client in clients:
                head, _, body = client.recv(4096).partition(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 503 ")
                assert ErrorResponse.model_validate_json(body).detail.code == ErrorCode.OVERLOADED
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr


@pytest.mark.parametrize(
    ("command", "port", "status"),
    [
        (passing("socket.AF_INET", "('127.0.0.1', 0)", "pass"), "9000", 1),
        (passing("socket.AF_UNIX, socket.SOCK_SEQPACKET", "''"), "9000", 1),
        (passing("socket.AF_INET, socket.SOCK_DGRAM", "('127.0.0.1', 0)", "pass"), "0", 2),
    ],
    ids=["not listening", "no stream", "a wrong setting as well"],
)
def test_a_passed_socket_that_does_not_listen(command: list[str], port: str, status: int) -> None:
    with program(*command, ready=False, PORT_CHECKER_PORT=port) as running:
        assert running.wait() == status
    assert len(running.lines) == 1, running.lines
    assert ("ListenStream=" if status == 1 else "PORT_CHECKER_PORT") in running.lines[0]


def test_an_abstract_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"@{tmp_path}"  # a name that nobody else has
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    with manager(address) as notices:
        systemd.notify("READY=1", "STATUS=as ever")
        assert notices.next() == ["READY=1", "STATUS=as ever"]


def test_a_service_manager_that_cannot_be_reached_is_no_trouble(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere/notify")
    systemd.notify("READY=1")
