"""What signals mean to the service: some stop it, and no other may end it during a check.

A signal that was ignored when the program started stays ignored: nohup(1) and a shell's background
jobs rely on it.
"""

import signal
from collections.abc import Callable
from types import FrameType

_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

# By default they end the process, and to this one they mean nothing. SIGQUIT and the signals of
# faults keep their default.
_MEANINGLESS = (
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGALRM,
    signal.SIGVTALRM,
    signal.SIGPROF,
    signal.SIGIO,
    signal.SIGPWR,
    *range(signal.SIGRTMIN, signal.SIGRTMAX + 1),
)


def stop_on_signals(stop: Callable[[int, FrameType | None], object]) -> None:
    """Have SIGTERM, SIGINT and SIGHUP call ``stop``, and signals without a meaning do nothing."""
    for number in _STOP:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)
    for number in _MEANINGLESS:
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.SIG_IGN)
