"""What signals do to the program, from its first moment to its last."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.loopback import open_port
from tests.support.namespace import needs_root
from tests.support.service import ask, check_under_way, program
from tests.support.waiting import wait_until

SERVE = f"exec {sys.executable} -m port_checker"

# Runs before anything else in an interpreter that has its folder in PYTHONPATH: says that typer is
# about to be imported, and waits there.
WAIT_AT_IMPORT = """
import sys, time
from pathlib import Path

class Wait:
    def find_spec(name, path, target=None):
        if name == "typer":
            Path(__file__).with_name("loading").touch()
            while True:
                time.sleep(0.05)

sys.meta_path.insert(0, Wait)
"""


@needs_root
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_first_process_of_a_container_ends_when_it_is_told_while_it_is_loaded(
    number: int, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(WAIT_AT_IMPORT)
    words = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-m", "port_checker"]
    with subprocess.Popen(words, env={**os.environ, "PYTHONPATH": str(tmp_path)}) as process:
        try:
            wait_until(lambda: (tmp_path / "loading").exists(), "it to be loaded")
            children = f"/proc/{process.pid}/task/{process.pid}/children"
            os.kill(int(Path(children).read_text()), number)
            assert process.wait(timeout=60) == 128 + number
        finally:
            process.kill()


# Those that mean nothing to the program. So does USR2, with which a parent has its workers leave.
MEANINGLESS = ["USR1", "ALRM", "VTALRM", "PROF", "IO", "PWR", "RTMIN", "RTMAX"]


@pytest.mark.parametrize(
    ("ignored", "other", "workers"),
    [(["INT", "HUP"], signal.SIGTERM, "1"), (["TERM"], signal.SIGHUP, "2")],
)
def test_what_was_ignored_at_the_start_or_has_no_meaning_ends_nothing(
    ignored: list[str], other: int, workers: str
) -> None:
    words = ["sh", "-c", f"trap '' {' '.join(ignored)}; {SERVE}"]
    with program(*words, PORT_CHECKER_WORKERS=workers) as running, open_port() as opened:
        processes = {running.process.pid, *running.workers()}
        for name in [*ignored, "USR2"]:
            running.process.send_signal(signal.Signals[f"SIG{name}"])
        for process in processes:
            for name in MEANINGLESS:
                os.kill(process, signal.Signals[f"SIG{name}"])
        with running.client() as client:  # it has had its time: uvicorn looks ten times a second
            time.sleep(0.3)
            assert ask(client, opened).json()["success"] is True
        assert {running.process.pid, *running.workers()} == processes
        assert running.stop(other) == 0


def test_any_number_of_signals_stops_workers_once() -> None:
    with (
        program(
            PORT_CHECKER_WORKERS="2", PORT_CHECK_RETRIES="1", PORT_CHECK_TIMEOUT="30"
        ) as running,
        check_under_way(running) as check,
    ):
        for _ in range(1000):
            running.process.send_signal(signal.SIGTERM)
            time.sleep(0.001)  # so that each arrives: equal signals that wait are one
        check.finish()
        assert running.wait() == 0


def test_standard_descriptors_that_are_closed_do_no_harm() -> None:
    words = ["sh", "-c", f"{SERVE} <&- >&- 2>&-"]
    with program(*words) as running, open_port() as opened:
        with running.client() as client:
            assert ask(client, opened).json()["success"] is True
        descriptors = Path(f"/proc/{running.process.pid}/fd")
        assert {os.readlink(descriptors / name) for name in "012"} == {os.devnull}
        assert running.stop() == 0
