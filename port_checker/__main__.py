"""``python -m port_checker`` and ``port-checker``."""

import os
import signal

_INTERRUPTED = 130


def main() -> None:
    """Run the program; an interrupt while it is still being loaded ends it quietly."""
    # Whoever has interrupts ignored (nohup, a shell's background jobs) wants them to stay so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(_INTERRUPTED))

    from port_checker.cli import app

    app()


if __name__ == "__main__":
    main()
