"""Worker processes: as the program runs them, and how their parent watches them."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support.loopback import open_port
from tests.support.namespace import ROOT
from tests.support.service import Program, ask, check_under_way, program
from tests.support.waiting import wait_until


def is_running(pid: int) -> bool:
    try:
        return " Z" not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def lines_with(running: Program, text: str) -> list[str]:
    return [line for line in running.lines if text in line]


@contextmanager
def at_the_start_of_workers(code: str, directory: Path) -> Iterator[str]:
    """Have each worker run some code before anything else; yields the PYTHONPATH for that."""
    condition = 'import sys\nif sys.orig_argv[-1] == "worker":\n    '
    (directory / "sitecustomize.py").write_text(condition + code)
    yield str(directory)


def test_workers_share_the_port_start_as_their_parent_did_and_stop_together() -> None:
    words = [sys.executable, "-I", "-W", "error", "-m", "port_checker"]
    # They share a file, too, where memory without a name is refused.
    refused = ["memfd_create"]
    with (
        program(*words, refused_calls=refused, PORT_CHECKER_WORKERS="2") as running,
        open_port() as opened,
    ):
        for _ in range(8):
            with running.client() as client:
                assert ask(client, opened).json()["success"] is True
        workers = running.workers()
        assert len(workers) == 2
        for worker in workers:
            command = Path(f"/proc/{worker}/cmdline").read_text().split("\0")
            assert command == [*words, "worker", ""]
        assert running.stop() == 0
    assert not any(map(is_running, workers))
    assert not lines_with(running, "Warning:")
    assert len(lines_with(running, " outcome=completed ")) == 8


def test_each_worker_has_as_many_connections_as_the_other_and_ends_with_its_parent() -> None:
    with (
        program(PORT_CHECKER_WORKERS="2", PORT_CHECKER_DEBUG="true") as running,
        ExitStack() as stack,
    ):
        wait_until(lambda: len(lines_with(running, "startup complete")) == 2, "both workers")
        before = {pid: descriptors(pid) for pid in running.workers()}

        def each_has_many() -> bool:
            for _ in range(5):
                stack.enter_context(socket.create_connection(("127.0.0.1", running.port)))
            return all(descriptors(pid) >= before[pid] + 30 for pid in before)

        wait_until(each_has_many, "connections of both workers")
        first, second = (descriptors(pid) - before[pid] for pid in before)
        assert abs(first - second) <= 5
        stack.close()  # they would be waited for
        running.process.kill()
        wait_until(lambda: not any(map(is_running, before)), "the workers' end")


def test_a_worker_that_is_told_to_stop_gets_no_more_connections_and_has_not_died() -> None:
    """It would answer that the service is stopping; one without work is gone at once."""

    def stop_one(running: Program) -> int:
        worker = min(running.workers())
        os.kill(worker, signal.SIGTERM)
        wait_until(lambda: lines_with(running, f"Worker {worker} was told to stop"), "the log")
        return worker

    def wait_for_end(worker: int) -> None:
        wait_until(lambda: not is_running(worker), "its end")

    def wait_for_starts(count: int) -> None:
        wait_until(lambda: len(lines_with(running, "startup complete")) == count, "workers")

    with program(
        PORT_CHECKER_WORKERS="2",
        PORT_CHECKER_DEBUG="true",
        # A check shall last for longer than a worker takes to start on a busy machine.
        PORT_CHECK_RETRIES="10",
        PORT_CHECK_TIMEOUT="30",
    ) as running:
        wait_for_starts(2)
        with check_under_way(running) as one, check_under_way(running) as other:
            worker = stop_one(running)  # each has one of the checks, mostly
            assert all(running.answers() for _ in range(10))
            wait_for_starts(3)
            assert one.finish().status_code == other.finish().status_code == 200
        wait_for_end(worker)
        for starts in 4, 5:
            wait_for_end(stop_one(running))
            wait_for_starts(starts)
        assert running.stop() == 0
    assert not lines_with(running, " exited with ")


def test_a_worker_that_dies_while_it_stops_is_on_record() -> None:
    with program(PORT_CHECKER_WORKERS="2") as running, check_under_way(running):
        running.process.terminate()
        wait_until(lambda: len(running.workers()) == 1, "the idle worker to stop")
        (worker,) = running.workers()
        os.kill(worker, signal.SIGKILL)
        assert running.wait() == 0
    assert lines_with(running, f"ERROR port_checker.server.workers: Worker {worker} was killed by ")


def test_a_slow_start_is_waited_for(tmp_path: Path) -> None:
    go = tmp_path / "go"
    wait = f"import os, time\n    while not os.path.exists({str(go)!r}): time.sleep(0.05)"
    with (
        at_the_start_of_workers(wait, tmp_path) as path,
        program(ready=False, PORT_CHECKER_WORKERS="2", PYTHONPATH=path) as running,
    ):
        wait_until(lambda: len(running.workers()) == 2, "two workers")
        workers = running.workers()
        time.sleep(7)  # uvicorn's supervisor would kill them after 5 s
        assert running.workers() == workers
        go.touch()
        wait_until(running.answers, "the program to answer")
        assert running.workers() == workers


def test_ctrl_c_is_for_the_parent_of_workers(tmp_path: Path) -> None:
    """A terminal sends it to all processes of the program's group, also while they start."""
    go = tmp_path / "go"
    wait = (
        f"import os, time\n    os.mkdir(f'{tmp_path}/{{os.getpid()}}')\n"
        f"    while not os.path.exists({str(go)!r}): time.sleep(0.05)"
    )
    with (
        at_the_start_of_workers(wait, tmp_path) as path,
        program(ready=False, PORT_CHECKER_WORKERS="2", PYTHONPATH=path) as running,
    ):
        wait_until(
            lambda: sum((tmp_path / str(pid)).exists() for pid in running.workers()) == 2,
            "two workers",
        )
        os.killpg(running.process.pid, signal.SIGINT)
        assert running.wait() == 0
    assert all(line.startswith("20") for line in running.lines), running.lines
    assert running.lines[-1].endswith(": Stopped\n")


def test_no_memory_to_share_is_one_line() -> None:
    with program(
        ready=False, refused_calls=["memfd_create", "fallocate"], PORT_CHECKER_WORKERS="2"
    ) as running:
        assert running.wait() == 1
    assert "port-checker: cannot share memory: Operation not permitted\n" in running.lines
    assert "Traceback" not in "".join(running.lines)


def test_workers_that_cannot_start_end_the_program(tmp_path: Path) -> None:
    refuse = "from tests.support.seccomp import refuse; refuse('epoll_create1')"
    with (
        at_the_start_of_workers(f"sys.path.append({str(ROOT)!r}); {refuse}", tmp_path) as path,
        program(ready=False, PORT_CHECKER_WORKERS="2", PYTHONPATH=path) as running,
    ):
        assert running.wait() == 1
    assert lines_with(running, "port-checker: cannot start: Operation not permitted\n")
    assert not lines_with(running, "Traceback")
    assert re.search(r"ERROR .*: Worker \d+ exited with 1 while starting$", running.lines[-2])
    assert running.lines[-1].endswith(": No worker could start; see the lines above for why\n")


@pytest.mark.parametrize("failure", ["hang", "stop"])
def test_a_worker_that_gives_no_sign_of_life_is_replaced(failure: str, tmp_path: Path) -> None:
    words = ["-m", "tests.support.worker", "supervise", failure, str(tmp_path / "failed")]
    with subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "replacing it" in line:
                break
        process.terminate()
        lines += process.stderr
        assert process.wait() == 0
    log = "".join(lines)
    assert re.search(r"Worker \d+ does not respond; ending it\n", log)
    if failure == "hang":
        assert re.search(r'worker.py", line \d+ in hang\n', log)  # its traceback
        assert re.search(r"Worker \d+ was killed by SIGABRT; replacing it\n", log)
    else:
        assert re.search(r"Worker \d+ was killed by SIGKILL; replacing it\n", log)
