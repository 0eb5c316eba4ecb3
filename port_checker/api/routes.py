"""The routes: each reads a request, passes it on, and builds the response."""

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from port_checker.api.admission import Admission
from port_checker.api.caller import CallerResolver
from port_checker.api.errors import NO_STORE, STATUS, ApiError
from port_checker.api.limits import RateLimiter
from port_checker.api.origin import require_same_origin
from port_checker.api.records import CheckRecord
from port_checker.api.targets import TargetRules
from port_checker.checker import Checker
from port_checker.metrics import Metrics
from port_checker.schemas import (
    CHECK_EXAMPLE,
    ERROR_EXAMPLES,
    TLS_CHECK_EXAMPLE,
    TLS_ERROR_EXAMPLES,
    CallerAddress,
    CheckPortsRequest,
    CheckPortsResponse,
    CheckTlsRequest,
    CheckTlsResponse,
    ErrorCode,
    ErrorResponse,
    Health,
)
from port_checker.settings import Settings

MAX_BODY = 64 * 1024  # bytes

logger = logging.getLogger(__name__)


class Api:
    """The operations of the HTTP API.

    Args:
        settings: Allowed targets, ports per request.
        callers: Finds out who asks.
        limiter: The rate limits.
        checker: Connects to the ports.
        metrics: Where checks are counted.
    """

    def __init__(
        self,
        settings: Settings,
        callers: CallerResolver,
        limiter: RateLimiter,
        checker: Checker,
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._callers = callers
        self._limiter = limiter
        self._checker = checker
        self._admission = Admission(TargetRules(settings), limiter, checker)
        self._metrics = metrics

    def add_routes(self, app: FastAPI) -> None:
        """Add the routes to ``app``."""
        app.router.route_class = _PlainRoute
        app.add_api_route(
            "/check-ports",
            self.check_ports,
            methods=["POST"],
            operation_id="check_ports",
            summary="Check which ports are reachable",
            tags=["checks"],
            response_model=CheckPortsResponse,
            response_description="The result for each port",
            responses=_documented_errors(ERROR_EXAMPLES),
            openapi_extra={"requestBody": self._documented_body()},
        )
        app.add_api_route(
            "/check-tls",
            self.check_tls,
            methods=["POST"],
            operation_id="check_tls",
            summary="Check whether a TLS endpoint can be trusted",
            tags=["checks"],
            response_model=CheckTlsResponse,
            response_description="The result",
            responses=_documented_errors(TLS_ERROR_EXAMPLES),
            openapi_extra={"requestBody": _documented_tls_body()},
        )
        app.add_api_route(
            "/ip",
            self.ip,
            methods=["GET"],
            operation_id="ip",
            summary="Return the caller's address",
            tags=["checks"],
            response_model=CallerAddress,
            response_description="The caller's address",
        )
        app.add_api_route(
            "/health",
            self.health,
            methods=["GET"],
            operation_id="health",
            summary="Tell whether the service is up",
            tags=["service"],
            response_model=Health,
            response_description="The service is up",
        )

        # Every GET route answers HEAD, too; the schema does not list that.
        schema = app.openapi()
        for route in app.routes:
            if isinstance(route, APIRoute) and route.methods and "GET" in route.methods:
                route.methods.add("HEAD")

        # Added to the finished schema, because FastAPI drops nulls from examples that it adds.
        for path, example in ("/check-ports", CHECK_EXAMPLE), ("/check-tls", TLS_CHECK_EXAMPLE):
            answer = schema["paths"][path]["post"]["responses"]["200"]
            answer["content"]["application/json"]["example"] = example

    async def check_ports(self, request: Request) -> Response:
        """Connect to all ports at once and report which of them accept connections.

        A port is tried several times before it is reported as inaccessible, so a response can
        take some seconds. You may check your own address; any other must be public.
        """
        caller = self._callers.resolve(request)
        require_same_origin(request, caller)
        # Before anything that costs more than this does.
        await self._limiter.pay_request(caller)
        asked = CheckPortsRequest.parse(await _read_body(request), self._settings.max_ports)
        target, ports = asked.provider_ip, asked.ports
        with CheckRecord(caller, target, len(ports), self._metrics) as record:
            async with self._admission.admit(request, caller, target, len(ports)) as room:
                verdicts = await self._checker.check(target, ports, room)
            accessible = sum(verdict.accessible for verdict in verdicts.values())
            record.result = f"accessible={accessible}"
        self._metrics.count_ports(verdict.kind for verdict in verdicts.values())
        answer = CheckPortsResponse.of(verdicts)
        if logger.isEnabledFor(logging.DEBUG):
            for port, verdict in verdicts.items():
                logger.debug("%s port %d: %s", asked.provider_ip, port, verdict.error or "open")
        return _json_response(answer.model_dump_json())

    async def check_tls(self, request: Request) -> Response:
        """Connect to a port, make a TLS handshake (1.2 or later), and verify the certificate.

        Its chain must lead to an authority that this service's system trusts; it must be in date,
        and good for the host. Nothing is sent after the handshake. A connection that fails is
        tried again, so a response can take some seconds. You may check your own address; any other
        must be public.
        """
        caller = self._callers.resolve(request)
        require_same_origin(request, caller)
        await self._limiter.pay_request(caller)
        asked = CheckTlsRequest.parse(await _read_body(request))
        target = asked.target
        with CheckRecord(caller, target, 1, self._metrics) as record:
            async with self._admission.admit(request, caller, target, ports=1):
                verdict = await self._checker.check_tls(target, asked.port, asked.expected)
            record.result = f'tls="{verdict.error or "valid"}"'
        self._metrics.count("tls_checks", verdict.kind.outcome)
        return _json_response(CheckTlsResponse.of(asked, verdict).model_dump_json())

    async def ip(self, request: Request) -> Response:
        """Return the address that your requests come from."""
        caller = self._callers.resolve(request)
        answer = CallerAddress(ip=str(caller) if caller else None)
        return _json_response(answer.model_dump_json())

    async def health(self, _: Request) -> Response:
        """Answer at once, however busy the service is."""
        return _json_response('{"status":"ok"}')

    def _documented_body(self) -> dict[str, Any]:
        schema = CheckPortsRequest.model_json_schema()
        schema["properties"]["ports"]["maxItems"] = self._settings.max_ports
        here = {"provider_ip": "127.0.0.1", "ports": [self._settings.port]}
        provider = {"provider_ip": "203.0.113.7", "ports": [7466, 50800, 50801]}
        return {
            "required": True,
            "content": {
                "application/json": {
                    "schema": schema,
                    "examples": {
                        "here": {
                            "summary": "This service itself, from its own machine",
                            "value": here,
                        },
                        "provider": {"summary": "A provider", "value": provider},
                    },
                }
            },
        }


def _documented_tls_body() -> dict[str, Any]:
    by_address = {"host": "203.0.113.7", "port": 443, "expected_ip": "203.0.113.7"}
    by_name = {"host": "provider.example", "port": 443, "expected_ip": "203.0.113.7"}
    return {
        "required": True,
        "content": {
            "application/json": {
                "schema": CheckTlsRequest.model_json_schema(),
                "examples": {
                    "address": {"summary": "A certificate for an address", "value": by_address},
                    "name": {"summary": "A certificate for a name", "value": by_name},
                },
            }
        },
    }


def _json_response(body: str) -> Response:
    return Response(body, media_type="application/json", headers=NO_STORE)


def _documented_errors(examples: Mapping[ErrorCode, str]) -> dict[int | str, dict[str, Any]]:
    """Return OpenAPI's ``responses`` for the codes of ``examples``, which holds their messages."""
    answers: dict[int | str, dict[str, Any]] = {}
    for code, message in examples.items():
        status = STATUS[code]
        answer = answers.setdefault(
            status.value,
            {
                "model": ErrorResponse,
                "description": status.phrase,
                "content": {"application/json": {"examples": {}}},
            },
        )
        example = {"detail": {"code": code, "message": message}}
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

    FastAPI only documents it. Having FastAPI read and validate the body would cost a third of the
    throughput of one-port checks (measured: 4,800 instead of 6,800 requests a second, in a service
    that did nothing else); its wrapper for the clean-up of dependencies, of which there are none,
    another twentieth.
    """

    def __init__(
        self, path: str, endpoint: Callable[[Request], Awaitable[Response]], **arguments: Any
    ) -> None:
        super().__init__(path, endpoint, **arguments)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            response = await endpoint(Request(scope, receive, send))
            await response(scope, receive, send)

        self.app = app


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
        ErrorCode.REQUEST_TOO_LARGE,
        f"The body is over {MAX_BODY} bytes. Send a shorter one.",
    )
