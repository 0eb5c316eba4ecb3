"""The program ``port-checker``."""

import sys

from port_checker.server import serve
from port_checker.settings import SettingsError, load_settings


def main() -> None:
    """Start the server; exit with 0 after a stop, 1 if it cannot listen, 2 for a wrong setting."""
    try:
        settings = load_settings()
    except SettingsError as error:
        sys.stderr.write(f"port-checker: {error}\n")
        sys.exit(2)
    sys.exit(serve(settings))
