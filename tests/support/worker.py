"""A worker that fails the first time, and its parent: ``python -m tests.support.worker``."""

import os
import signal
import socket
import sys
import time
from pathlib import Path

from port_checker.metrics import Totals
from port_checker.server.systemd import Heartbeat
from port_checker.server.workers import (
    Supervisor,
    receive_assignment,
    write_traceback_when_aborted,
)
from port_checker.settings import Settings


def hang() -> None:
    """Be stuck, as an event loop can be."""
    time.sleep(3600)


def stop() -> None:
    """Be stopped."""
    os.kill(os.getpid(), signal.SIGSTOP)


def supervise(failure: str, marker: str) -> None:
    """Supervise one worker whose first process fails."""
    command = [sys.executable, "-m", "tests.support.worker", "work", failure, marker]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        supervisor = Supervisor(
            command,
            Settings(),
            [listener],
            Totals(),
            listeners_stay=False,
            stop_patience=60,
            patience=2,
        )
        signal.signal(signal.SIGTERM, supervisor.stop)
        supervisor.run()


def work(failure: str, marker: str) -> None:
    """Fail in the first process; work in the next."""
    receive_assignment()
    write_traceback_when_aborted()
    heartbeat = Heartbeat()
    heartbeat.beat()
    try:
        Path(marker).mkdir()
    except FileExistsError:
        while True:
            heartbeat.beat()
            time.sleep(0.05)
    {"hang": hang, "stop": stop}[failure]()


if __name__ == "__main__":
    {"supervise": supervise, "work": work}[sys.argv[1]](*sys.argv[2:])
