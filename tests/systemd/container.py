"""A Debian of our own, booted by its systemd in a container that has only loopback."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.support.waiting import wait_until

# The files of Debians, by their names, which are not changed.
DEBIANS = Path(os.environ.get("SYSTEMD_TEST_DEBIANS", ""))

needs_debian = pytest.mark.skipif(
    "SYSTEMD_TEST_DEBIANS" not in os.environ,
    reason="make systemd-test makes Debians for these tests",
)

_CGROUPS = Path("/sys/fs/cgroup")

# Each container has cgroups of its own: with --keep-unit, systemd uses those that it is started in.
# Its mount ends with it, what it writes waits for no disk, and it ends when its test run is killed.
_BOOT = """
debian=$0 name=$1 scratch=$2 mounted=$3
for tree in /sys/fs/cgroup{,/systemd,/unified}; do
    [[ -e $tree/cgroup.procs ]] || continue
    mkdir -p "$tree/$name"
    echo $$ >"$tree/$name/cgroup.procs"
done
cd "$scratch"
rm -rf work
mkdir -p changed work root
mount -t overlay -o "lowerdir=$debian,upperdir=changed,workdir=work,volatile" overlay root
exec systemd-nspawn --boot --register=no --keep-unit --private-network --quiet \\
    --machine="$name" --directory=root --bind-ro="$mounted:/mnt"
"""

# How systemd-nspawn with --keep-unit ends when the container wants to be booted again.
_REBOOT = 133


class Container:
    """A booted Debian.

    Args:
        words: The command that boots it.
        log: Where its console goes.
    """

    def __init__(self, words: Sequence[str], log: Path) -> None:
        self._words = words
        self._log = log
        self.boot()

    def boot(self) -> None:
        """Boot it, and wait for systemd to have started what it starts."""
        with self._log.open("ab") as console:
            self._nspawn = subprocess.Popen(
                self._words, stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT
            )
        wait_until(self._has_booted, "systemd to boot", seconds=300)

    def _has_booted(self) -> bool:
        state = "systemctl is-system-running"
        return self._init is not None and self.try_to_run(state).stdout.strip() in (
            "running",
            "degraded",
        )

    @property
    def _init(self) -> str | None:
        """The process id of its systemd, seen from outside."""
        pid = self._nspawn.pid
        assert self._nspawn.poll() is None, self._log.read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return children[-1] if children else None

    def try_to_run(self, script: str) -> "subprocess.CompletedProcess[str]":
        """Run a shell script as root inside; its stderr goes where its stdout does."""
        return subprocess.run(
            ["nsenter", "--all", "--target", str(self._init), "--", "bash", "-euo", "pipefail"],
            input=script,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
            text=True,
            timeout=300,
            check=False,
        )

    def run(self, script: str) -> str:
        """Run a shell script as root inside, and return what it printed.

        Raises:
            AssertionError: It failed.
        """
        done = self.try_to_run(script)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def reboot(self) -> None:
        """Boot it again; its files are kept."""
        self.try_to_run("systemctl reboot")
        assert self._nspawn.wait(timeout=300) == _REBOOT
        self.boot()

    def end(self) -> None:
        """Power it off."""
        self._nspawn.terminate()
        self._nspawn.wait(timeout=300)


@contextlib.contextmanager
def booted(root: Path, scratch: Path, mounted: Path) -> Iterator[Container]:
    """Boot a Debian.

    Args:
        root: Its files, which are not changed.
        scratch: An empty folder for what is changed, and for the console's log.
        mounted: What is seen inside as /mnt, read-only.
    """
    name = f"port-checker-{os.getpid()}"
    words = ["setpriv", "--pdeathsig", "TERM", "unshare", "--mount", "bash", "-euc", _BOOT]
    words += [str(root), name, str(scratch), str(mounted)]
    try:
        container = Container(words, scratch / "log")
        try:
            yield container
        finally:
            container.end()
    finally:
        cgroups = [*_CGROUPS.glob(name), *_CGROUPS.glob(f"*/{name}")]
        subprocess.run(["find", *cgroups, "-type", "d", "-delete"], check=True)
        shutil.rmtree(scratch)
