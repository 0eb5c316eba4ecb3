"""Machines that show less, or have less, than others."""

import subprocess
import sys
from collections.abc import Callable

import pytest

from port_checker import advice
from tests.support.loopback import free_port, open_port
from tests.support.namespace import ROOT, loopback_alone, needs_root
from tests.support.seccomp import refuse
from tests.support.service import serve

# As hidepid, subset=pid and Android have it: the tables of sockets are not there.
HIDE_SOCKETS = 'mount -t proc -o subset=pid proc /proc && exec "$@"'
# As a chroot has it, in which nobody has mounted it.
HIDE_ALL = 'mount -t tmpfs none /proc && exec "$@"'


def run(
    *words: str, before: Callable[[], None] | None = None, behind: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*behind, sys.executable, "-m", "port_checker", "check", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=before,
    )


@needs_root
@pytest.mark.parametrize("hide", [HIDE_SOCKETS, HIDE_ALL], ids=["sockets", "all"])
def test_what_is_hidden_is_no_evidence(hide: str) -> None:
    free = str(free_port())
    # Alone, since other tests' checks may take ports below and above this one.
    with loopback_alone(), open_port() as busy, serve(retries=1) as client:
        hidden = ("unshare", "--mount", "sh", "-c", hide, "sh")
        done = run("--server", str(client.base_url), free, str(busy), behind=hidden)
    assert f"{busy}: in use; reachable." in done.stdout
    assert f"{free}: bound; reachable." in done.stdout
    assert (done.returncode, done.stderr) == (0, "")


def test_a_machine_without_ipv6() -> None:
    """The server is not to blame: no port could be opened, which is status 1."""
    port = free_port()
    with serve(host="::1") as client:
        words = ["-6", "--server", str(client.base_url), str(port)]
        done = run(*words, before=lambda: refuse("socket of IPv6"))
    advised = advice.NO_FAMILY.format(family="IPv6")
    assert f"{port}: failed; not checked. {advised}\n" in done.stdout
    assert (done.returncode, done.stderr) == (1, "")
