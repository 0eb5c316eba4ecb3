"""The Containerfile, built and run by podman on a Debian of our own."""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

from tests.support.namespace import ROOT
from tests.support.waiting import wait_until
from tests.systemd.container import DEBIANS, needs_debian

pytestmark = needs_debian

# The machine's own hard limits: more than that podman may not be allowed to set.
LIMITS = "--ulimit nofile=10000:10000 --ulimit nproc=10000:10000"

Podman = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def podman() -> Iterator[Podman]:
    """Runs podman, with images and containers of the test's own."""
    store = tempfile.mkdtemp(prefix="podman-")  # podman bounds the length of its path
    storage = f"--root {store}/root --runroot {store}/run --storage-driver overlay"
    common = ["podman", *storage.split(), "--runtime", "runc", "--cgroup-manager", "cgroupfs"]

    def run(words: str, stdin: IO[bytes] | None = None) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*common, *words.split()],
            stdin=stdin,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    yield run
    run("rm --all --force --time 1")
    shutil.rmtree(store)


def test_the_image_serves_as_nobody_on_a_read_only_root(
    podman: Podman, builds: Path, tmp_path: Path
) -> None:
    wheels = builds / "wheels"
    context = tmp_path / "context"
    (context / "dist").mkdir(parents=True)
    for source in (ROOT / "Containerfile", ROOT / "constraints.txt"):
        shutil.copy(source, context)
    wheel = next(wheels.glob("golem_port_checker-*.whl"))
    shutil.copy(wheel, context / "dist")
    (context / "dist" / "golem_port_checker-0.0.1-py3-none-any.whl").touch()  # of an older build
    pip = tmp_path / "pip.conf"
    pip.write_text("[global]\nno-index = true\nfind-links = /wheels\n")

    # Without half of its files, which nothing needs.
    left_out = [
        f"--exclude=./{name}" for name in ("usr/share/doc", "usr/share/locale", "var/cache")
    ]
    with subprocess.Popen(
        ["tar", "-C", DEBIANS / "bookworm", *left_out, "-c", "."], stdout=subprocess.PIPE
    ) as tar:
        done = podman("import - localhost/debian", stdin=tar.stdout)
    assert done.returncode == 0, done.stderr
    # In a chroot: the build needs no network, and no more rights than the test has.
    done = podman(
        "build --format docker --isolation chroot --network host --ulimit nofile=10000:10000 "
        f"--layers=false --volume {wheels}:/wheels:ro --volume {pip}:/etc/pip.conf:ro "
        f"--build-arg BASE=localhost/debian --tag localhost/port-checker {context}"
    )
    assert done.returncode == 0, done.stdout + done.stderr

    inspected = podman("inspect localhost/port-checker").stdout
    (image,) = json.loads(inspected)
    config = image["Config"]
    assert config["StopSignal"] == "SIGTERM"
    assert config["Labels"]["org.opencontainers.image.title"] == "golem-port-checker"
    assert "PORT_CHECKER_HOST=::" in config["Env"]
    assert config["User"] == "65534:65534"  # a name would not do for Kubernetes' runAsNonRoot

    # As the manifests for Kubernetes have it: podman's own read-only root has a /tmp to write to.
    done = podman(
        "run --detach --name checker --read-only --read-only-tmpfs=false --cap-drop all "
        f"--security-opt no-new-privileges --network none {LIMITS} localhost/port-checker"
    )
    assert done.returncode == 0, done.stderr
    wait_until(lambda: podman("exec checker port-checker health").returncode == 0, "its health")
    assert podman("exec checker id -u").stdout == "65534\n"
    status = podman("exec checker cat /proc/1/status").stdout
    assert "CapEff:\t0000000000000000\n" in status
    assert "CapBnd:\t0000000000000000\n" in status
    for path in ("/opt/x", "/tmp/x", "/run/x"):  # noqa: S108
        assert "Read-only file system" in podman(f"exec checker touch {path}").stderr
    assert podman("exec checker sleep 0").returncode == 0  # for the manifests' preStop
    podman("stop --time 60 checker")
    assert podman("inspect checker --format {{.State.ExitCode}}").stdout == "0\n"
