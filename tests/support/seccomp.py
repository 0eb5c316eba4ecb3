"""System calls that the kernel refuses to a process, as sandboxes have it (seccomp(2))."""

import ctypes
import errno
import os
import platform
import socket
import struct

# By architecture; asm/unistd.h. The C library's setrlimit() calls prlimit64, as getrlimit() does.
_NUMBERS = {
    "x86_64": {
        "memfd_create": 319,
        "prlimit64": 302,
        "setrlimit": 302,
        "fallocate": 285,
        "socket": 41,
        "connect": 42,
        "recvmsg": 47,
        "getsockname": 51,
        "setsockopt": 54,
        "getsockopt": 55,
        "epoll_ctl": 233,
        "epoll_create1": 291,
        "clone": 56,
        "clone3": 435,
        "socket of IPv6": 41,
        "socket of netlink": 41,
    },
    "aarch64": {
        "memfd_create": 279,
        "prlimit64": 261,
        "setrlimit": 261,
        "fallocate": 47,
        "socket": 198,
        "connect": 203,
        "recvmsg": 212,
        "getsockname": 204,
        "setsockopt": 208,
        "getsockopt": 209,
        "epoll_ctl": 21,
        "epoll_create1": 20,
        "clone": 220,
        "clone3": 435,
        "socket of IPv6": 198,
        "socket of netlink": 198,
    },
}[platform.machine()]

# When a call is refused that is not always, and with EPERM: the place of an argument in struct
# seccomp_data, a number, whether the argument must be that number, and the error.
_CASES = {
    "setrlimit": (32, 0, False, errno.EPERM),  # the third, a pointer to the new limit
    "socket of IPv6": (16, socket.AF_INET6, True, errno.EAFNOSUPPORT),
    "socket of netlink": (16, socket.AF_NETLINK, True, errno.EAFNOSUPPORT),
}

# linux/prctl.h, linux/seccomp.h
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000
_NUMBER = 0  # the call's, in struct seccomp_data

# linux/bpf_common.h: load a word, skip the next instruction if it is not this number, return.
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06


def refuse(*calls: str) -> None:
    """Have these system calls fail, in this process and all that it starts."""
    instructions = []
    for call in calls:
        refusal = [(_RETURN, 0, 0, _REFUSE | errno.EPERM)]
        if call in _CASES:
            argument, number, equal, error = _CASES[call]
            refusal = [
                (_LOAD, 0, 0, argument),
                (_JUMP_IF_EQUAL, 0 if equal else 1, 1 if equal else 0, number),
                (_RETURN, 0, 0, _REFUSE | error),
            ]
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
