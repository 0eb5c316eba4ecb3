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

from tests.support.loopback import refused_port
from tests.support.service import Program, ask, check_under_way, program
from tests.support.waiting import wait_until


def reload(running: Program, directory: Path, **settings: str) -> tuple[int, str]:
    """Its exit status, and what it says."""
    own = {"PORT_CHECKER_HOST": "127.0.0.1", "PORT_CHECKER_PORT": str(running.port)}
    done = subprocess.run(
        [sys.executable, "-m", "port_checker", "reload"],
        env={**os.environ, **own, **settings, "RUNTIME_DIRECTORY": str(directory)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


def max_ports(client: httpx.Client) -> int:
    """How many ports one may ask for, by the message that refuses more."""
    error = ask(client, *range(1, 1000)).json()["detail"]
    assert error["code"] == "TOO_MANY_PORTS"
    return int(error["message"].split("at most ")[1].split()[0])


@contextmanager
def asking(running: Program) -> Iterator[list[object]]:
    """Ask for the service's health, over new connections and a kept one; yield what was wrong."""
    wrong: list[object] = []
    is_over = threading.Event()

    def ask_on_and_on(is_kept: bool) -> None:
        kept = running.client()
        while not is_over.wait(0.05):
            client = kept if is_kept else running.client()
            try:
                if (answer := client.get("/health")).status_code != 200:
                    wrong.append(answer)
            except httpx.TransportError as error:
                wrong.append(error)
            if not is_kept:
                client.close()
        kept.close()

    with ThreadPoolExecutor() as pool:
        for is_kept in True, False:
            pool.submit(ask_on_and_on, is_kept)
        try:
            yield wrong
        finally:
            is_over.set()


@pytest.mark.parametrize(("before", "after"), [("1", "2"), ("2", "1")])
def test_a_reload_takes_other_settings_and_refuses_nobody(
    before: str, after: str, tmp_path: Path
) -> None:
    with (
        program(
            RUNTIME_DIRECTORY=str(tmp_path),
            PORT_CHECKER_WORKERS=before,
            # The check shall last for longer than workers take to start on a busy machine.
            PORT_CHECK_RETRIES="10",
            PORT_CHECK_TIMEOUT="30",
        ) as running,
        check_under_way(running) as check,
        asking(running) as wrong,
    ):
        assert reload(running, tmp_path, PORT_CHECKER_WORKERS=after, PORT_CHECK_MAX_PORTS="7") == (
            0,
            "",
        )
        with running.client() as newcomer:
            wait_until(lambda: max_ports(newcomer) == 7, "the other settings")
        assert not check.is_done()
        assert check.finish().json()["message"] == "Successfully verified 2 out of 2 ports"
        assert not wrong
        assert len(running.workers()) >= int(after)
        # And once more, when there are workers in any case.
        assert reload(running, tmp_path, PORT_CHECK_MAX_PORTS="8") == (0, "")
        with running.client() as newcomer:
            wait_until(lambda: max_ports(newcomer) == 8, "the other settings")
        assert not wrong
        assert running.stop() == 0
    log = "".join(running.lines)
    assert log.count(": Reloaded\n") == 2
    assert "ERROR" not in log


def test_a_wrong_setting_leaves_everything_as_it_is(tmp_path: Path) -> None:
    with program(
        RUNTIME_DIRECTORY=str(tmp_path), PORT_CHECKER_WORKERS="2", PORT_CHECK_MAX_PORTS="9"
    ) as running:
        processes = running.workers()
        status, message = reload(running, tmp_path, PORT_CHECK_TIMEOUT="soon")
        assert status == 2
        assert message.startswith("port-checker: PORT_CHECK_TIMEOUT='soon' is wrong: ")
        with running.client() as client:
            assert max_ports(client) == 9
        assert running.workers() == processes
        assert running.stop() == 0


NO_START = """
import os, sys
if sys.orig_argv[-1] == "worker" and os.environ.get("PORT_CHECK_MAX_PORTS") == "7":
    sys.exit("no memory for me")
"""


@pytest.mark.parametrize("workers", ["1", "2"])
def test_where_no_worker_starts_everything_stays_as_it_is(workers: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(NO_START)
    with program(
        RUNTIME_DIRECTORY=str(tmp_path),
        PYTHONPATH=str(tmp_path),
        PORT_CHECKER_WORKERS=workers,
        PORT_CHECK_MAX_PORTS="9",
    ) as running:
        status, message = reload(running, tmp_path, PORT_CHECK_MAX_PORTS="7")
        assert status == 1
        assert message == "port-checker: cannot reload: no worker can start; the log says why\n"
        with running.client() as client:
            assert max_ports(client) == 9
        assert reload(running, tmp_path, PORT_CHECK_MAX_PORTS="8") == (0, "")
        with running.client() as client:
            wait_until(lambda: max_ports(client) == 8, "the other settings")
        assert running.stop() == 0


def test_a_stop_in_the_middle_of_a_reload(tmp_path: Path) -> None:
    go = tmp_path / "go"
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys, time\nif sys.orig_argv[-1] == 'worker':\n"
        f"    while not os.path.exists({str(go)!r}): time.sleep(0.05)\n"
    )
    with (
        program(RUNTIME_DIRECTORY=str(tmp_path), PYTHONPATH=str(tmp_path)) as running,
        ThreadPoolExecutor() as pool,
    ):
        reloading = pool.submit(reload, running, tmp_path)
        wait_until(running.workers, "a worker")
        workers = running.workers()
        assert running.stop(signal.SIGTERM) == 0
        assert reloading.result()[0] == 1
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


def test_systemd_may_end_a_reload_for_a_stop(tmp_path: Path) -> None:
    # A service that takes the request, and never answers.
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as service:
        service.bind(str(tmp_path / "reload"))
        service.listen()
        with (
            subprocess.Popen(
                [sys.executable, "-m", "port_checker", "reload"],
                env={**os.environ, "RUNTIME_DIRECTORY": str(tmp_path)},
            ) as process,
            service.accept()[0] as request,
        ):
            assert request.recv(100)
            process.terminate()
            assert process.wait(timeout=60) == 0


def test_where_there_is_no_service_to_reload(tmp_path: Path) -> None:
    with refused_port() as port, program(PORT_CHECKER_PORT=str(port), ready=False) as running:
        status, message = reload(running, tmp_path)
    assert status == 1
    assert message.startswith("port-checker: cannot reload: ")
