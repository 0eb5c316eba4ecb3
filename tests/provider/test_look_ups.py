"""A DNS server that is silent: that is told, and holds up nothing."""

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.namespace import ROOT, loopback_alone, needs_root

pytestmark = needs_root

CHECK = """
import asyncio
from port_checker.provider import Waits, verify
waits = Waits(look_up=0.1, pauses=())
report = asyncio.run(verify([50800], servers=["http://checker.example"], waits=waits))
print(report.servers[0].error)
"""


@pytest.fixture
def resolver() -> Iterator[socket.socket]:
    """The DNS server, which this thread and what it starts can reach."""
    with loopback_alone(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 53))
        sock.settimeout(60)
        yield sock


def start(directory: Path, *words: str) -> subprocess.Popen[str]:
    """Start Python where that DNS server is the only one."""
    file = directory / "resolv.conf"
    file.write_text("nameserver 127.0.0.1\noptions timeout:30 attempts:5\n")
    command = f'mount --bind {file} /etc/resolv.conf && exec "$@"'
    return subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", command, "sh", sys.executable, *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.usefixtures("resolver")
def test_a_look_up_has_a_bound_and_is_told_as_such(tmp_path: Path) -> None:
    with start(tmp_path, "-c", CHECK) as process:
        output, _ = process.communicate(timeout=60)
    assert output == "host name cannot be resolved: no DNS server answers\n"


@pytest.mark.parametrize(
    ("command", "number", "status"),
    [("check", signal.SIGINT, 130), ("watch", signal.SIGTERM, 3)],  # that of its last check
)
def test_a_signal_ends_it_during_a_look_up(
    resolver: socket.socket, tmp_path: Path, command: str, number: int, status: int
) -> None:
    words = ["-m", "port_checker", command, "--server", "http://checker.example", "50800"]
    with start(tmp_path, *words) as process:
        assert resolver.recv(512)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (status, "")
