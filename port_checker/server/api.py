"""The routes: what comes in, whom it is passed to, what goes out."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from port_checker.addresses import Address, have_one_subscriber, site, subscriber
from port_checker.checker import Checker, Reservation
from port_checker.schemas import (
    CHECK_EXAMPLE,
    ERROR_EXAMPLES,
    CallerAddress,
    CheckRequest,
    CheckResponse,
    ErrorCode,
    ErrorResponse,
    Health,
)
from port_checker.server.caller import Callers
from port_checker.server.errors import STATUS, ApiError
from port_checker.server.rate_limit import RateLimiter
from port_checker.server.settings import Settings
from port_checker.server.targets import require_allowed, verify_local_binding

MAX_BODY = 64 * 1024  # bytes

# Seconds before somebody looks out for the caller's leaving: most checks of open ports are over
# by then, and do not pay for it.
_WATCHED_AFTER = 0.05

logger = logging.getLogger(__name__)


class Api:
    """The operations, and the collaborators that they are made of.

    Args:
        settings: How to name callers, which targets are allowed, how many ports a request may have.
        limiter: What a caller and a target have left.
        checker: What does the work.
    """

    def __init__(self, settings: Settings, limiter: RateLimiter, checker: Checker) -> None:
        self._settings = settings
        self._callers = Callers(settings.trusted_proxies)
        self._limiter = limiter
        self._checker = checker

    def add_routes(self, app: FastAPI) -> None:
        """Route ``app`` to the operations."""
        app.router.route_class = _PlainRoute
        app.add_api_route(
            "/check-ports",
            self.check_ports,
            methods=["POST"],
            operation_id="check_ports",
            summary="Check which ports can be reached",
            tags=["checks"],
            response_model=CheckResponse,
            response_description="A verdict for each port",
            responses=_documented_errors(
                ErrorCode.INVALID_IP,
                ErrorCode.INVALID_PORT,
                ErrorCode.TOO_MANY_PORTS,
                ErrorCode.INVALID_REQUEST,
                ErrorCode.TARGET_NOT_ALLOWED,
                ErrorCode.REQUEST_TOO_LARGE,
                ErrorCode.RATE_LIMITED,
                ErrorCode.OVERLOADED,
                ErrorCode.CHECK_FAILED,
            ),
            openapi_extra={"requestBody": self._documented_body()},
        )
        app.add_api_route(
            "/ip",
            self.ip,
            methods=["GET"],
            operation_id="ip",
            summary="Tell the caller's address",
            tags=["checks"],
            response_model=CallerAddress,
            response_description="The address",
        )
        app.add_api_route(
            "/health",
            self.health,
            methods=["GET"],
            operation_id="health",
            summary="Tell whether the service answers",
            tags=["service"],
            response_model=Health,
            response_description="It does",
        )

        # Added to the finished schema: FastAPI leaves nulls out of what it puts there itself.
        answers = app.openapi()["paths"]["/check-ports"]["post"]["responses"]
        answers["200"]["content"]["application/json"]["example"] = CHECK_EXAMPLE

    async def check_ports(self, request: Request) -> Response:
        """Connect to each port from outside, all at once, and tell which answer.

        A port is tried several times before it is called inaccessible, so an answer can take some
        seconds. Anybody may check the address that the request comes from; other addresses must
        be public.
        """
        started = time.perf_counter()
        caller = self._callers.find(request)
        # Before anything that costs more than this does.
        await self._limiter.pay_request(caller)
        asked = CheckRequest.parse(await _read_body(request), self._settings.max_ports)
        require_allowed(caller, asked.provider_ip, self._settings)
        if not request.client or request.client.host != str(asked.provider_ip):
            # For the other end of this very connection, the connection is the proof.
            verify_local_binding(asked.provider_ip)
        with self._reserve(caller, asked) as reservation:
            await self._limiter.pay_ports(caller, asked.provider_ip, len(asked.ports))
            with _EndedWhenCallerLeaves(request):
                verdicts = await self._checker.check(asked.provider_ip, asked.ports, reservation)
        answer = CheckResponse.of(verdicts)
        logger.info(
            "%s checked %s: %d ports, %d accessible, %.3f s",
            caller or "Somebody unknown",
            asked.provider_ip,
            len(verdicts),
            sum(verdict.accessible for verdict in verdicts.values()),
            time.perf_counter() - started,
        )
        if logger.isEnabledFor(logging.DEBUG):
            for port, verdict in verdicts.items():
                logger.debug("%s port %d: %s", asked.provider_ip, port, verdict.error or "open")
        return Response(answer.model_dump_json(), media_type="application/json")

    def _reserve(self, caller: Address | None, asked: CheckRequest) -> Reservation:
        """Make room for a check before its ports are paid for, so that refusals cost nothing."""
        return self._checker.reserve(
            len(asked.ports),
            caller=caller and subscriber(caller),
            network=caller and site(caller),
            is_own=have_one_subscriber(caller, asked.provider_ip),
        )

    async def ip(self, request: Request) -> Response:
        """Answer with the address that requests come from, as a check would see it."""
        caller = self._callers.find(request)
        answer = CallerAddress(ip=str(caller) if caller else None)
        return Response(answer.model_dump_json(), media_type="application/json")

    async def health(self, _: Request) -> Response:
        """Answer at once, whatever else the service is doing."""
        return Response('{"status":"ok"}', media_type="application/json")

    def _documented_body(self) -> dict[str, Any]:
        schema = CheckRequest.model_json_schema()
        schema["properties"]["ports"]["maxItems"] = self._settings.max_ports
        here = {"provider_ip": "127.0.0.1", "ports": [self._settings.port]}
        provider = {"provider_ip": "203.0.113.7", "ports": [7466, 50800, 50801]}
        return {
            "required": True,
            "content": {
                "application/json": {
                    "schema": schema,
                    "examples": {
                        "here": {"summary": "This service, asked on its machine", "value": here},
                        "provider": {"summary": "A provider", "value": provider},
                    },
                }
            },
        }


def _documented_errors(*codes: ErrorCode) -> dict[int | str, dict[str, Any]]:
    """The answers with these codes as OpenAPI wants them: by status, an example for each code."""
    answers: dict[int | str, dict[str, Any]] = {}
    for code in codes:
        status = STATUS[code]
        answer = answers.setdefault(
            status.value,
            {
                "model": ErrorResponse,
                "description": status.phrase,
                "content": {"application/json": {"examples": {}}},
            },
        )
        example = {"detail": {"code": code, "message": ERROR_EXAMPLES[code]}}
        answer["content"]["application/json"]["examples"][code] = {"value": example}
        if code in (ErrorCode.RATE_LIMITED, ErrorCode.OVERLOADED):
            answer["headers"] = {
                "Retry-After": {
                    "description": f"Whole seconds, at least 1; with {code}",
                    "schema": {"type": "integer", "minimum": 1},
                }
            }
    return answers


class _PlainRoute(APIRoute):
    """A route whose function takes the request and returns the response.

    FastAPI documents it and finds the way to it, but does not stand in between: its reading and
    checking of bodies would cost a third of the requests a second for one port (measured: 4,800
    instead of 6,800, in a service that did nothing else).
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        return self.endpoint


class _EndedWhenCallerLeaves:
    """Cancels a block when the request's connection is lost; the body must have been read.

    The block raises ``ClientDisconnect`` then.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._watching: asyncio.Task[None] | None = None
        self._has_left = False

    def __enter__(self) -> None:
        loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._timer = loop.call_later(_WATCHED_AFTER, self._begin_to_watch, loop)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._timer.cancel()
        if self._watching:
            self._watching.cancel()
        if self._has_left and self._task and kind is asyncio.CancelledError:
            self._task.uncancel()
            raise ClientDisconnect

    def _begin_to_watch(self, loop: asyncio.AbstractEventLoop) -> None:
        self._watching = loop.create_task(self._watch())

    async def _watch(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._has_left = True
        if self._task:
            self._task.cancel()


async def _read_body(request: Request) -> bytes:
    """Return the request's body.

    Raises:
        ApiError: It is longer than ``MAX_BODY``; no more than that was read.
    """
    body = bytearray()
    is_too_large = int(request.headers.get("content-length", "0")) > MAX_BODY
    while not is_too_large:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body += message.get("body", b"")
        is_too_large = len(body) > MAX_BODY
        if not (is_too_large or message.get("more_body")):
            return bytes(body)
    raise ApiError(
        ErrorCode.REQUEST_TOO_LARGE, f"The body is over {MAX_BODY} bytes. Ask for fewer ports."
    )
