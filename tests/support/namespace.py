"""Network namespaces that have nothing but loopback: what is dialled there reaches nobody."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

needs_root = pytest.mark.skipif(
    os.environ.get("CI") != "true"
    and (os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("nft"))),
    reason="network namespaces need root, ip of iproute2 and nft of nftables",
)

needs_setpriv = pytest.mark.skipif(
    os.environ.get("CI") != "true" and not shutil.which("setpriv"),
    reason="giving up a capability needs setpriv of util-linux",
)


def in_namespace(script: str, *setup: str) -> str:
    """Run Python inside a namespace of its own.

    Args:
        script: The program; it can import the package and the tests.
        setup: Shell commands that come before it, inside.

    Returns:
        What it printed.
    """
    commands = " && ".join(["ip link set lo up", *setup, f'exec {sys.executable} -c "$0"'])
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", commands, script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
