"""Programs that run in the kernel (bpf(2)), and the one that leads connections elsewhere."""

import contextlib
import ctypes
import os
import platform
import socket
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

_SYSTEM_CALL = {"x86_64": 321, "aarch64": 280}  # the number of bpf(2)
_PROG_LOAD, _PROG_ATTACH = 5, 8  # linux/bpf.h, as the numbers below
_CGROUP_SOCK_ADDR, _INET4_CONNECT = 18, 10


def load(kind: int, code: Sequence[tuple[int, int, int, int]], attach_type: int = 0) -> int:
    """Load a program; return its descriptor.

    Args:
        kind: ``BPF_PROG_TYPE_...``.
        code: Instructions: code, registers, offset and constant of each (linux/bpf.h, bpf_insn).
        attach_type: Where it is to be attached, if its kind leaves that open.
    """
    instructions = b"".join(struct.pack("=BBhi", *instruction) for instruction in code)
    program, licence = map(ctypes.create_string_buffer, (instructions, b"GPL"))
    where = ctypes.addressof(program), ctypes.addressof(licence)
    return _bpf(_PROG_LOAD, struct.pack("=IIQQ44xI", kind, len(code), *where, attach_type))


@contextlib.contextmanager
def connections_led_to(port: int) -> Iterator[None]:
    """Lead all IPv4 connections of this process to a port of 127.0.0.1, within connect()."""
    (mount,) = (
        Path(line.split()[1])
        for line in Path("/proc/mounts").read_text().splitlines()
        if line.split()[2] == "cgroup2"
    )
    code = [
        (0xB7, 0x02, 0, int.from_bytes(socket.inet_aton("127.0.0.1"), "little")),  # r2
        (0x63, 0x21, 4, 0),  # user_ip4 of the struct bpf_sock_addr = r2
        (0xB7, 0x02, 0, socket.htons(port)),
        (0x63, 0x21, 24, 0),  # user_port = r2
        (0xB7, 0x00, 0, 1),  # let it pass
        (0x95, 0x00, 0, 0),
    ]
    group = mount / f"port-checker-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "cgroup.procs").write_text(str(os.getpid()))
        program = load(_CGROUP_SOCK_ADDR, code, _INET4_CONNECT)
        directory = os.open(group, os.O_RDONLY)
        _bpf(_PROG_ATTACH, struct.pack("=III", directory, program, _INET4_CONNECT))
        yield
    finally:
        (mount / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def _bpf(command: int, attributes: bytes) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(attributes.ljust(144, b"\0"))
    result: int = libc.syscall(_SYSTEM_CALL[platform.machine()], command, buffer, 144)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
