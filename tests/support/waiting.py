"""Waiting for what another process or thread does."""

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], what: str = "it", seconds: float = 180) -> None:
    """Poll until ``condition`` holds.

    The bound only catches a hang: it is far above what anything waited for takes.

    Raises:
        TimeoutError: It did not hold within so many seconds.
    """
    deadline = time.monotonic() + seconds
    pause = 0.01
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s for {what}")
        time.sleep(pause)
        pause = min(0.1, 1.1 * pause)  # to look costs time that others need
