"""Reloading: other processes go on with other settings, and nobody notices."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.support.cli import Done, invoke
from tests.support.service import Program, ask, check_under_way, program
from tests.support.waiting import wait_until

DONE = Done(0, "", "")


def reload(running: Program, directory: Path, **settings: str) -> Done:
    own = {"PORT_CHECKER_HOST": "127.0.0.1", "PORT_CHECKER_PORT": str(running.port)}
    # As systemd writes it where there are two.
    directories = f"{directory}:{directory}/another"
    return invoke("reload", **own | settings, RUNTIME_DIRECTORY=directories)


def max_ports(client: httpx.Client) -> int:
    """How many ports one may ask for, by the message that refuses more."""
    error = ask(client, *range(1, 1000)).json()["detail"]
    assert error["code"] == "TOO_MANY_PORTS"
    return int(error["message"].split("at most ")[1].split()[0])


def wait_for_max_ports(running: Program, count: int) -> None:
    """Wait until new connections meet that setting."""
    with running.client() as newcomer:
        wait_until(lambda: max_ports(newcomer) == count, "the other settings")


@contextmanager
def asking(running: Program) -> Iterator[list[object]]:
    """Ask for the service's health, over new connections and a kept one; yield what was wrong."""
    wrong: list[object] = []
    is_over = threading.Event()

    def ask_on_and_on() -> None:
        with running.client() as kept:
            while not is_over.wait(0.05):
                if not running.answers():
                    wrong.append("a new connection")
                try:
                    if (answer := kept.get("/health")).status_code != 200:
                        wrong.append(answer)
                except httpx.TransportError as error:
                    wrong.append(error)

    with ThreadPoolExecutor() as pool:
        over = pool.submit(ask_on_and_on)
        try:
            yield wrong
        finally:
            is_over.set()
            over.result()


def test_a_reload_takes_other_settings_and_refuses_nobody(tmp_path: Path) -> None:
    with program(
        RUNTIME_DIRECTORY=str(tmp_path),
        # A check shall last for longer than workers take to start on a busy machine.
        PORT_CHECK_RETRIES="10",
        PORT_CHECK_TIMEOUT="30",
    ) as running:
        # From one process to two workers, and from those to one.
        for workers, most in ("2", 7), ("1", 8):
            settings = {"PORT_CHECKER_WORKERS": workers, "PORT_CHECK_MAX_PORTS": str(most)}
            with check_under_way(running) as check, asking(running) as wrong:
                assert reload(running, tmp_path, **settings) == DONE
                wait_for_max_ports(running, most)
                assert not check.is_done()
                answer = check.finish().json()
                assert answer["message"] == "Successfully verified 2 out of 2 ports"
            assert not wrong
            assert len(running.workers()) >= int(workers)
        assert running.stop() == 0
    log = "".join(running.lines)
    assert log.count(": Reloaded\n") == 2
    assert "ERROR" not in log


def test_where_it_listens_stays_as_it_is(tmp_path: Path) -> None:
    """Also at its end: it removes its own socket, and no other service's."""
    with (
        socket.socket(socket.AF_UNIX) as another,
        program(RUNTIME_DIRECTORY=str(tmp_path)) as running,
    ):
        path = tmp_path / "socket"
        another.bind(str(path))
        for _ in range(2):
            assert reload(running, tmp_path, PORT_CHECKER_HOST=f"unix:{path}") == DONE
        assert running.stop() == 0
        assert path.exists()
    log = "".join(running.lines)
    assert log.count("Another host is used only after a restart") == 2


NO_START = """
import os, sys
if sys.orig_argv[-1] == "worker" and os.environ.get("PORT_CHECK_MAX_PORTS") == "7":
    sys.exit("no memory for me")
"""


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_reload_that_fails_leaves_everything_as_it_is(workers: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(NO_START)
    with program(
        RUNTIME_DIRECTORY=str(tmp_path),
        PYTHONPATH=str(tmp_path),
        PORT_CHECKER_WORKERS=workers,
        PORT_CHECK_MAX_PORTS="9",
    ) as running:
        processes = running.workers()
        wrong = reload(running, tmp_path, PORT_CHECK_TIMEOUT="soon")
        assert (wrong.status, wrong.out) == (2, "")
        assert wrong.err.startswith("port-checker: PORT_CHECK_TIMEOUT='soon' is wrong: ")
        no_worker = "port-checker: cannot reload: no worker can start; the log says why\n"
        assert reload(running, tmp_path, PORT_CHECK_MAX_PORTS="7") == Done(1, "", no_worker)
        with running.client() as client:
            assert max_ports(client) == 9
        assert running.workers() == processes
        assert reload(running, tmp_path, PORT_CHECK_MAX_PORTS="8") == DONE
        wait_for_max_ports(running, 8)
        assert running.stop() == 0


@contextmanager
def reloading(directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The command, as a process."""
    environment = {**os.environ, "RUNTIME_DIRECTORY": str(directory)}
    words = [sys.executable, "-m", "port_checker", "reload"]
    with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE) as process:
        yield process


def test_a_stop_in_the_middle_of_a_reload(tmp_path: Path) -> None:
    go = tmp_path / "go"
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys, time\nif sys.orig_argv[-1] == 'worker':\n"
        f"    while not os.path.exists({str(go)!r}): time.sleep(0.05)\n"
    )
    with (
        program(RUNTIME_DIRECTORY=str(tmp_path), PYTHONPATH=str(tmp_path)) as running,
        reloading(tmp_path) as process,
    ):
        wait_until(running.workers, "a worker")
        workers = running.workers()
        assert running.stop(signal.SIGTERM) == 0
        ended = b"port-checker: cannot reload: the service ended before it had reloaded\n"
        assert process.communicate(timeout=60)[1] == ended
        assert process.returncode == 1
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


def test_systemd_may_end_a_reload_for_a_stop(tmp_path: Path) -> None:
    # A service that takes the request, and never answers.
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as service:
        service.bind(str(tmp_path / "reload"))
        service.listen()
        with reloading(tmp_path) as process, service.accept()[0] as request:
            assert request.recv(100)
            process.terminate()
            assert process.wait(timeout=60) == 0


def test_where_there_is_no_service_to_reload(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as service:
        service.bind(str(tmp_path / "reload"))  # as one that was killed leaves it
    done = invoke("reload", RUNTIME_DIRECTORY=str(tmp_path))
    assert (done.status, done.out) == (1, "")
    reason = "the service does not answer: Connection refused"
    assert done.err == f"port-checker: cannot reload: {reason}\n"
