"""Processes that end with the tests, however these end."""

import ctypes
import signal

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> None:
    """Have this process killed when the thread that started it ends (prctl(2)).

    It is a ``preexec_fn`` for ``subprocess``: a test run that is killed cannot end what it started.
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
