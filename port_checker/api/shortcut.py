"""Routes that read requests themselves, and the way to them past FastAPI's layers."""

import time
from collections.abc import Callable, Coroutine
from typing import Any, cast

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.types import Receive, Scope, Send

from port_checker.api.records import STARTED
from port_checker.metrics import Metrics

# Where a request's scope keeps an exception, on its way to whoever answers it.
_ERROR = "port_checker.error"


class PlainRoute(APIRoute):
    """A route whose function takes the request and returns the response; FastAPI documents it.

    It reads a body itself, which may only be read once it is paid for.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what answers a request: it raises what ``Shortcut`` has met."""

        async def handle(request: Request) -> Response:
            if _ERROR in request.scope:
                # Not by a name, which would lead from its traceback to itself.
                raise request.scope.pop(_ERROR)
            return cast(Response, await self.endpoint(request))

        return handle


class Shortcut:
    """Answers requests for plain routes without parameters; leaves others, and errors, to ``app``.

    The layers of FastAPI and Starlette in between, which look for telemetry, limit bodies, find a
    route, answer exceptions and close what dependencies have opened, would take nearly half of the
    instructions of ``/health`` (measured). Middleware of the application does not see what is
    answered here.

    Args:
        app: The application.
        metrics: Where requests are counted.
    """

    def __init__(self, app: FastAPI, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics
        self._routes = {
            (method, route.path): route
            for route in app.routes
            if isinstance(route, PlainRoute) and not route.param_convertors
            for method in route.methods or ()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        route = self._routes.get((scope.get("method", ""), scope.get("path", "")))
        if route:
            started = scope[STARTED] = time.perf_counter()
            try:
                response = await route.endpoint(Request(scope, receive, send))
                await response(scope, receive, send)
                return
            except Exception as error:
                scope[_ERROR] = error
            finally:  # when it is cancelled, too
                if _ERROR not in scope:
                    self._metrics.time_request(route.path, time.perf_counter() - started)
        await self._app(scope, receive, send)
