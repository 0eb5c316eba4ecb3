"""What the service is installed from, and the Debians in which it is."""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.namespace import ROOT
from tests.systemd.container import DEBIANS, Container, booted


def _once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], object]) -> Path:
    """A folder that the first of the test processes fills; the others wait for it."""
    shared = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with open(shared / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = shared / name
        if not folder.exists():
            unfinished = factory.mktemp(name)
            build(unfinished)
            unfinished.rename(folder)
    return folder


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, and those that it needs, since a container has no network."""

    def build(directory: Path) -> None:
        words = [sys.executable, "-m", "pip", "wheel", "--quiet", "--wheel-dir", str(directory)]
        words += ["--constraint", "constraints.txt", ".[metrics,redis]"]
        # What builds it, and what redis needs on Debian 12's Python 3.11.2.
        words += ["hatchling", "editables", "async-timeout"]
        subprocess.run(words, cwd=ROOT, check=True)

    return _once(tmp_path_factory, "wheels", build)


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git has of this checkout, changes that are not committed included, and the package."""

    def build(directory: Path) -> None:
        files = "git ls-files -z --cached --others --exclude-standard"
        copy = f"{files} | xargs -0 cp --parents --target-directory {directory}"
        subprocess.run(["sh", "-c", copy], cwd=ROOT, check=True)
        done = subprocess.run(
            ["make", "deb", f"VENV={Path(sys.executable).parent.parent}"],
            cwd=directory,
            env=os.environ | {"DPKG_DEB_COMPRESSOR_LEVEL": "0"},  # 20 s less for 5 MB more
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    return _once(tmp_path_factory, "checkout", build)


@pytest.fixture(scope="session")
def package(checkout: Path) -> Path:
    """The Debian package."""
    (package,) = (checkout / "dist").glob("*.deb")
    return package


@pytest.fixture(scope="session")
def newer_package(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a higher version, and another comment in its settings."""

    def build(directory: Path) -> None:
        files = directory / "files"
        subprocess.run(["dpkg-deb", "--raw-extract", package, files], check=True)
        for name, before, after in (
            ("DEBIAN/control", "\nVersion: ", "\nVersion: 9."),
            ("etc/golem/port-checker.env", "# Settings of", "# The settings of"),
            (
                "usr/lib/golem-port-checker/site-packages/port_checker/__init__.py",
                '__version__ = "',
                '__version__ = "9.',
            ),
        ):
            text = (files / name).read_text()
            assert before in text
            (files / name).write_text(text.replace(before, after))
        words = ["dpkg-deb", "--root-owner-group", "-Znone", "--build"]
        subprocess.run([*words, files, directory], check=True, stdout=subprocess.DEVNULL)
        shutil.rmtree(files)

    (newer,) = _once(tmp_path_factory, "newer", build).glob("*.deb")
    return newer


@pytest.fixture(scope="session")
def container(
    wheels: Path,
    checkout: Path,
    package: Path,
    newer_package: Path,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[Container]:
    """A booted Debian, whose name is the parameter; its network is loopback alone."""
    folders = {"wheels": wheels, "checkout": checkout}
    folders |= {"package": package.parent, "newer": newer_package.parent}
    mounts = [(folder, f"/mnt/{name}") for name, folder in folders.items()]
    scratch = tmp_path_factory.mktemp("container")
    with booted(DEBIANS / request.param, scratch, *mounts) as container:
        yield container
