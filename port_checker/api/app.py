"""The ASGI application: its parts put together, and nothing else."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.types import ASGIApp

from port_checker import __version__
from port_checker.api.admission import Admission
from port_checker.api.caller import CallerResolver
from port_checker.api.errors import answer_errors
from port_checker.api.limits import RateLimiter
from port_checker.api.openapi import extend_openapi
from port_checker.api.origin import AllowedHosts
from port_checker.api.pages import add_pages, not_found_page
from port_checker.api.records import RequestTimer
from port_checker.api.routes import Api
from port_checker.api.shortcut import Shortcut
from port_checker.api.targets import KnownRoutes, TargetRules
from port_checker.checker import Checker
from port_checker.metrics import Metrics
from port_checker.settings import Settings

if TYPE_CHECKING:
    from port_checker.api.perspectives import Perspectives


def create_app(
    settings: Settings,
    metrics: Metrics | None = None,
    *,
    limiter: RateLimiter | None = None,
    checker: Checker | None = None,
) -> FastAPI:
    """Make an application; each has its own limits and capacity.

    It is FastAPI's: routes, dependencies, routers and middleware can be added to it.

    Args:
        settings: How it behaves.
        metrics: Where to count; by default, where nobody reads the figures.
        limiter: Used instead of one made of the settings.
        checker: Used instead of one made of the settings.
    """
    limits = limiter or RateLimiter(
        settings.caller_rate_limit,
        settings.others_rate_limit,
        settings.target_rate_limit,
        settings.rate_limit_store,
        own=settings.own_rate_limit,
    )

    metrics = metrics or Metrics()
    perspectives: Perspectives | None = None
    if settings.perspectives:
        from port_checker.api import perspectives as other_places  # h11 takes a while to load

        perspectives = other_places.Perspectives(
            settings.perspectives,
            settings.longest_check,
            observes=settings.perspectives_mode == "observe",
            metrics=metrics,
        )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.openapi()  # makes the schema, which takes a while, before anybody waits for an answer
        async with limits.shared(), perspectives.connected() if perspectives else nullcontext():
            yield
        known.close()  # FastAPI's caches may keep all this for as long as the process lasts

    app = FastAPI(
        title="Golem Port Checker",
        version=__version__,
        description="Tells a provider which of its TCP ports the world can reach.",
        license_info={"name": "MIT", "identifier": "MIT"},
        openapi_tags=[
            {"name": "checks", "description": "What providers ask for."},
            {"name": "service", "description": "What operators ask for."},
        ],
        servers=[{"url": "."}],  # beside the schema, whatever path a proxy puts before both
        openapi_url=None,  # it and /docs are pages of ours
        redirect_slashes=False,  # a wrong path is NOT_FOUND, not redirected
        # Nobody configures OpenTelemetry here, and each request would look for it in vain.
        telemetry={"tracing": False, "metrics": False, "logs": False},
        lifespan=lifespan,
    )
    known = KnownRoutes()
    callers = CallerResolver(settings.trusted_proxies, is_own=known.is_own)
    checker = checker or Checker(
        retries=settings.retries,
        retry_delay=settings.retry_delay,
        timeout=settings.timeout,
        max_in_flight=settings.max_in_flight,
        max_per_caller=settings.max_in_flight_per_caller,
    )
    metrics.watch("ports_in_flight", lambda: checker.in_flight)
    metrics.watch("ports_in_flight_limit", lambda: settings.max_in_flight)
    metrics.watch("rate_limit_store_up", lambda: limits.store_is_available)
    answer = answer_errors(app, callers, metrics, not_found_page)
    admission = Admission(
        TargetRules(settings, is_relay=callers.is_relay, known=known), limits, checker, known
    )
    Api(settings, callers, limits, admission, checker, metrics, answer, perspectives).add_routes(
        app
    )
    extend_openapi(app, settings)
    add_pages(app, settings)
    app.add_middleware(RequestTimer, metrics=metrics)
    if settings.allowed_hosts:
        app.add_middleware(AllowedHosts, allowed=settings.allowed_hosts, refuse=answer)
    return app


def create_served_app(settings: Settings, metrics: Metrics) -> ASGIApp:
    """Make an application for a server of our own, which nobody adds anything to.

    Args:
        settings: How it behaves.
        metrics: Where to count.
    """
    app = create_app(settings, metrics)
    return app if settings.allowed_hosts else Shortcut(app, metrics)
