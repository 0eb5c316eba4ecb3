"""``port_checker.main:app`` and ``create_app``, for ASGI servers: what api/app.py makes."""

import sys
from typing import Any

from port_checker.api.app import create_app
from port_checker.settings import SettingsError, load_settings

__all__ = ["create_app"]


def __getattr__(name: str) -> Any:
    """Make ``app`` from the environment when an ASGI server asks for it.

    Not on import, which must not depend on the environment for those who want ``create_app`` alone.
    """
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        app = globals()["app"] = create_app(load_settings())
    except SettingsError as error:
        sys.stderr.write(f"port-checker: {error}\n")
        raise SystemExit(2) from None
    return app


def __dir__() -> list[str]:
    """List ``app``, too: FastAPI's own command looks for it there."""
    return [*globals(), "app"]
