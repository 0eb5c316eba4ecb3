"""System calls that the kernel refuses to a process, as sandboxes have it (seccomp(2))."""

import ctypes
import errno
import os
import platform
import struct

# By architecture; asm/unistd.h. The C library's setrlimit() calls prlimit64, as getrlimit() does.
_NUMBERS = {
    "x86_64": {"memfd_create": 319, "prlimit64": 302, "setrlimit": 302, "fallocate": 285},
    "aarch64": {"memfd_create": 279, "prlimit64": 261, "setrlimit": 261, "fallocate": 47},
}[platform.machine()]

# Which argument must not be 0 for a call to be refused: its place in struct seccomp_data.
_CONDITIONS = {"setrlimit": 32}  # the third, a pointer to the new limit

# linux/prctl.h, linux/seccomp.h
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM
_NUMBER = 0  # the call's, in struct seccomp_data

# linux/bpf_common.h: load a word, skip the next instruction if it is not this number, return.
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06


def refuse(*calls: str) -> None:
    """Have these system calls fail with EPERM, in this process and all that it starts."""
    instructions = []
    for call in calls:
        refusal = [(_RETURN, 0, 0, _REFUSE)]
        if argument := _CONDITIONS.get(call):
            refusal[:0] = [(_LOAD, 0, 0, argument), (_JUMP_IF_EQUAL, 1, 0, 0)]
        instructions += [(_LOAD, 0, 0, _NUMBER), (_JUMP_IF_EQUAL, 0, len(refusal), _NUMBERS[call])]
        instructions += refusal
    instructions.append((_RETURN, 0, 0, _ALLOW))
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
