"""``python -m port_checker`` and ``port-checker``."""

import os
import signal
import sys

_INTERRUPTED = 130


def main() -> None:
    """Run the program; a signal to stop while it is still being loaded ends it quietly."""
    _open_standard_descriptors()
    # Whoever has signals ignored (nohup, a shell's background jobs) wants them to stay so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(_INTERRUPTED))
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end)

    # It is run every few seconds, so it does without the libraries that read a command line.
    if sys.argv[1:2] == ["health"] and len(sys.argv) <= 3 and not sys.argv[-1].startswith("-"):
        from port_checker.server.health import run

        sys.exit(run(*sys.argv[2:]))

    from port_checker.cli import app

    try:
        app()
    except OSError as error:  # the help cannot be written, say
        sys.stderr.write(f"port-checker: {error.strerror or error}\n")
        os._exit(1)  # sys.exit() would write to stdout once more


def _open_standard_descriptors() -> None:
    """Open /dev/null where stdin, stdout or stderr was closed.

    The next file or socket would get its number, and then what is written to stderr. libuv ends the
    process when it is to close a socket with such a number.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free


def _end(number: int, _: object) -> None:
    """Do what the signal does by default, also in the first process of a container.

    The kernel has no default for that one: without a handler a signal would be lost.
    """
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)


if __name__ == "__main__":
    main()
