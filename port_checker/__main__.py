"""``python -m port_checker`` and ``port-checker``."""

import os
import signal

_INTERRUPTED = 130


def main() -> None:
    """Run the program; an interrupt while it is still being loaded ends it quietly."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        from port_checker.cli import app  # whoever started it wants interrupts to be ignored
    else:
        signal.signal(signal.SIGINT, lambda *_: os._exit(_INTERRUPTED))
        from port_checker.cli import app

        signal.signal(signal.SIGINT, signal.default_int_handler)
    app()


if __name__ == "__main__":
    main()
