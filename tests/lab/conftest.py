"""The lab, and when there is none."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.network import Lab, add_namespace, delete_namespace, open_lab


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A network with the service running in it, for all tests of a process.

    They are in four groups that take about as long, each in a process: they mostly wait.
    """
    if obstacle := _obstacle():
        # On the machine whose job it is to run these tests they may not be passed over.
        give_up = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        give_up(f"the lab cannot be built: {obstacle}")
    with open_lab(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


def _obstacle() -> str | None:
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    for tool, package in ("ip", "iproute2"), ("nft", "nftables"):
        if not shutil.which(tool):
            return f"there is no {tool} (of {package})"
    if not Path("/proc/sys/net/ipv6").exists():
        return "the kernel has no IPv6"
    name = f"port-checker-lab-{os.getpid()}"
    try:
        add_namespace(name)
        delete_namespace(name)
    except subprocess.CalledProcessError as error:
        return str(error.stderr).strip()
    return None
