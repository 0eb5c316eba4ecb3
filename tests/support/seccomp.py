"""System calls that the kernel refuses to a process, as sandboxes have it (seccomp(2))."""

import ctypes
import errno
import os
import platform
import struct

# By architecture; asm/unistd.h.
_NUMBERS = {
    "x86_64": {"memfd_create": 319, "prlimit64": 302, "fallocate": 285},
    "aarch64": {"memfd_create": 279, "prlimit64": 261, "fallocate": 47},
}[platform.machine()]

# linux/prctl.h, linux/seccomp.h
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_RET_ALLOW, _RET_ERRNO = 0x7FFF0000, 0x00050000
_NUMBER_OFFSET = 0  # in struct seccomp_data

# linux/bpf_common.h: load a word, skip the next instruction if it is not this number, return.
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06


def refuse(*calls: str) -> None:
    """Have these system calls fail with EPERM, in this process and all that it starts."""
    instructions = [(_LOAD, 0, 0, _NUMBER_OFFSET)]
    for call in calls:
        instructions.append((_JUMP_IF_EQUAL, 0, 1, _NUMBERS[call]))
        instructions.append((_RETURN, 0, 0, _RET_ERRNO | errno.EPERM))
    instructions.append((_RETURN, 0, 0, _RET_ALLOW))
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *i) for i in instructions))
    # struct sock_fprog
    program = struct.pack("@HP", len(instructions), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in (
        (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program),
    ):
        if libc.prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
