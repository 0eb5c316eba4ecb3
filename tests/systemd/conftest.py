"""What the service is installed from, and the Debians in which it is."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.namespace import ROOT
from tests.systemd.container import DEBIANS, Container, booted

# To pack it so takes 20 s less than by default. Beside what the service needs on Debian 12's Python
# 3.11.2, redis' async-timeout included, there are wheels of what builds it.
_BUILD = """
export DPKG_DEB_COMPRESSOR_TYPE=gzip DPKG_DEB_COMPRESSOR_LEVEL=1
rm -rf "$1"
mkdir -p "$1"/{checkout,newer,wheels}
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$1/checkout"
make -C "$1/checkout" deb VENV="$0"
mv "$1"/checkout/build/deb/*.whl "$1/wheels"
rm -r "$1"/checkout/{build,debian/golem-port-checker}
"$0/bin/python" -m pip download --quiet --dest "$1/wheels" --only-binary :all: \\
    --python-version 3.11 --platform=manylinux_2_{17,28}_"$(uname -m)" -c constraints.txt \\
    "$(ls "$1"/wheels/*.whl)[metrics,redis]" hatchling editables async-timeout
dpkg-deb --raw-extract "$1"/checkout/dist/*.deb "$1/files"
cd "$1/files"
change() {
    grep -q "$1" "$3"
    sed -i "s/$1/$2/" "$3"
}
change '^Version: ' '&9.' DEBIAN/control
change '# Settings of' '# The settings of' etc/golem/port-checker.env
change '^__version__ = "' '&9.' usr/lib/golem-port-checker/site-packages/port_checker/__init__.py
dpkg-deb --root-owner-group -Znone --build . "$1/newer"
rm -r "$1/files"
"""


@pytest.fixture(scope="session")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the first of the test processes has built.

    ``checkout`` is what git has of this one, changes that are not committed included, with the
    Debian package in ``dist``. ``newer`` has the same package with a higher version, and another
    comment in its settings. ``wheels`` is all that pip needs where there is no network.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    builds = shared / "builds"
    with (shared / "builds.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not builds.exists():
            unfinished = shared / "unfinished"
            words = ["bash", "-euo", "pipefail", "-c", _BUILD, sys.prefix, str(unfinished)]
            subprocess.run(words, cwd=ROOT, check=True)
            unfinished.rename(builds)
    return builds


@pytest.fixture(scope="session")
def container(
    builds: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Container]:
    """A booted Debian, whose name is the parameter; its network is loopback alone."""
    scratch = tmp_path_factory.mktemp("container")
    with booted(DEBIANS / request.param, scratch, builds) as container:
        yield container
