"""The tests themselves: what a run shows, and what it leaves behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.namespace import ROOT
from tests.support.processes import end_with_parent
from tests.support.waiting import wait_until

pytest_plugins = "pytester"


def test_a_run_that_is_killed_leaves_no_service(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    words = "-m pytest tests/programs/waiting_with_a_service.py"
    with subprocess.Popen(
        [sys.executable, *words.split()],
        cwd=ROOT,
        env={**os.environ, "PID_FILE": str(pid_file)},
        stdout=subprocess.DEVNULL,
        preexec_fn=end_with_parent,
    ) as run:
        wait_until(lambda: pid_file.exists() and pid_file.read_text(), "the service")
        service = Path("/proc", pid_file.read_text())
        assert service.exists()
        run.kill()
        wait_until(lambda: not service.exists(), "the service to end")


def test_a_test_is_named_as_soon_as_it_fails(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("from tests.conftest import pytest_report_teststatus")
    pytester.makepyfile(test_it="def test_fails(): raise ValueError\ndef test_passes(): pass")
    output = pytester.runpytest_inprocess().stdout
    output.fnmatch_lines(["FAILED test_it.py::test_fails", "*[[]100%*", "*= FAILURES =*"])
