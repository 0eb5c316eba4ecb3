"""The ASGI application: its parts put together, and nothing else."""

import sys
from typing import Any

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from port_checker import __version__
from port_checker.api import Api
from port_checker.checker import Checker
from port_checker.errors import answer_errors
from port_checker.rate_limit import RateLimiter
from port_checker.settings import Settings, SettingsError, load_settings


def create_app(
    settings: Settings, *, limiter: RateLimiter | None = None, checker: Checker | None = None
) -> FastAPI:
    """Make an application; each has its own limits and capacity.

    Args:
        settings: How it behaves.
        limiter: Used instead of one made of the settings.
        checker: Used instead of one made of the settings.
    """
    limits = limiter or RateLimiter(
        settings.caller_rate_limit, settings.target_rate_limit, settings.rate_limit_store
    )
    app = FastAPIOffline(
        title="Golem Port Checker",
        version=__version__,
        description="Tells a provider which of its TCP ports the world can reach.",
        license_info={"name": "MIT", "identifier": "MIT"},
        openapi_tags=[
            {"name": "checks", "description": "What providers ask for."},
            {"name": "service", "description": "What operators ask for."},
        ],
        # No validator: it would send the schema to a site on the internet.
        swagger_ui_parameters={"tryItOutEnabled": True, "validatorUrl": None},
        redoc_url=None,
        redirect_slashes=False,  # a wrong path is told as NOT_FOUND, not redirected
        lifespan=lambda _: limits.shared(),
    )
    Api(
        settings,
        limits,
        checker
        or Checker(
            retries=settings.retries,
            retry_delay=settings.retry_delay,
            timeout=settings.timeout,
            max_in_flight=settings.max_in_flight,
        ),
    ).add_routes(app)
    answer_errors(app)
    return app


def __getattr__(name: str) -> Any:
    """Make ``port_checker.main:app`` from the environment when an ASGI server asks for it.

    Not at import: that must not depend on the environment for those who want ``create_app`` alone.
    """
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        app = globals()["app"] = create_app(load_settings())
    except SettingsError as error:
        sys.stderr.write(f"port-checker: {error}\n")
        raise SystemExit(2) from None
    return app
