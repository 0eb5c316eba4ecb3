"""Network namespaces that have nothing but loopback: what is dialled there reaches nobody."""

import ctypes
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
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


_CLONE_NEWNET = 0x40000000  # linux/sched.h
CAP_NET_BIND_SERVICE = 10  # linux/capability.h
_CAPABILITY_VERSION = 0x20080522


@contextmanager
def loopback_alone(*setup: str) -> Iterator[None]:
    """Move this thread, and all that it starts from here on, into a namespace of its own.

    Args:
        setup: Shell commands that come first, inside.
    """
    libc = ctypes.CDLL(None, use_errno=True)  # Python has os.unshare from 3.12 on
    commands = " && ".join(["ip link set lo up", *setup])
    with open("/proc/thread-self/ns/net") as outside:
        assert libc.unshare(_CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        try:
            subprocess.run(["sh", "-c", commands], check=True)
            yield
        finally:
            assert libc.setns(outside.fileno(), _CLONE_NEWNET) == 0, "cannot return"


@contextmanager
def without_capability(number: int) -> Iterator[None]:
    """Take a capability from this thread alone (capset(2)), and give it back."""
    libc = ctypes.CDLL(None, use_errno=True)
    head = struct.pack("=Ii", _CAPABILITY_VERSION, 0)
    had = ctypes.create_string_buffer(24)  # effective, permitted and inheritable ones, twice
    assert libc.capget(head, had) == 0, os.strerror(ctypes.get_errno())
    effective, *others = struct.unpack("=6I", had)
    assert libc.capset(head, struct.pack("=6I", effective & ~(1 << number), *others)) == 0
    try:
        yield
    finally:
        assert libc.capset(head, had) == 0
