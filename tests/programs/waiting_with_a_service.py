"""A test that starts the service and waits, for the tests of how a test run ends."""

import os
import time
from pathlib import Path

from tests.support.service import program


def test_waits() -> None:
    with program() as running:
        Path(os.environ["PID_FILE"]).write_text(str(running.process.pid))
        time.sleep(600)
