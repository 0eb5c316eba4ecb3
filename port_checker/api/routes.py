"""The routes: each reads a request, passes it on, and builds the response."""

import logging
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse
from starlette.requests import ClientDisconnect

from port_checker.addresses import Address, lies_in, subscriber
from port_checker.api.accept import prefers
from port_checker.api.admission import Admission
from port_checker.api.caller import CallerResolver
from port_checker.api.errors import NO_STORE, TEXT_HEADERS, ApiError, answer_errors_in_text
from port_checker.api.limits import RateLimiter
from port_checker.api.openapi import (
    DOCUMENTED_PROGRESS,
    PORT_PARAMETER,
    documented_answers_in_text,
    documented_body,
    documented_errors,
)
from port_checker.api.origin import require_same_origin
from port_checker.api.progress import NDJSON, Answer, ProgressResponse
from port_checker.api.records import CheckRecord
from port_checker.api.shortcut import PlainRoute
from port_checker.api.targets import TargetNotAllowed, special_purpose
from port_checker.checker import Checker
from port_checker.connect import OPEN, OnVerdict, Verdict
from port_checker.errors import ServiceError
from port_checker.metrics import Metrics
from port_checker.schemas import (
    ERROR_EXAMPLES,
    PERSPECTIVE_MARK,
    TLS_ERROR_EXAMPLES,
    CallerAddress,
    CheckPortsRequest,
    CheckPortsResponse,
    CheckTlsRequest,
    CheckTlsResponse,
    ErrorCode,
    Health,
    PortsSeen,
    TlsFromPlace,
    parse_port,
    port_results_json,
)
from port_checker.settings import Settings
from port_checker.tls import TlsVerdict
from port_checker.verdicts import HERE

if TYPE_CHECKING:
    from port_checker.api.perspectives import Perspectives

MAX_BODY = 64 * 1024  # bytes

_NO_STORE_FIELDS = [(name.lower().encode(), value.encode()) for name, value in NO_STORE.items()]

logger = logging.getLogger(__name__)


class Api:
    """The operations of the HTTP API.

    Args:
        settings: Allowed targets, ports per request.
        callers: Finds out who asks.
        limiter: The rate limits.
        admission: Who may have which check.
        checker: Connects to the ports.
        metrics: Where checks are counted.
        answer: Returns the answer to an exception.
        perspectives: The other places that checks are made from, if there are any.
    """

    def __init__(
        self,
        settings: Settings,
        callers: CallerResolver,
        limiter: RateLimiter,
        admission: Admission,
        checker: Checker,
        metrics: Metrics,
        answer: Answer,
        perspectives: "Perspectives | None" = None,
    ) -> None:
        self._settings = settings
        self._callers = callers
        self._limiter = limiter
        self._checker = checker
        self._admission = admission
        self._metrics = metrics
        self._answer = answer
        self._perspectives = perspectives

    def add_routes(self, app: FastAPI) -> None:
        """Add the routes to ``app``."""
        add = app.add_api_route
        class_of_others, app.router.route_class = app.router.route_class, PlainRoute
        add(
            "/check-ports",
            self.check_ports,
            methods=["POST"],
            operation_id="check_ports",
            summary="Check which ports are reachable",
            tags=["checks"],
            dependencies=[documented_body(CheckPortsRequest)],
            response_model=CheckPortsResponse,
            response_description="The result for each port",
            responses=documented_errors(ERROR_EXAMPLES) | DOCUMENTED_PROGRESS,
        )
        add(
            "/check-tls",
            self.check_tls,
            methods=["POST"],
            operation_id="check_tls",
            summary="Check whether a TLS endpoint can be trusted",
            tags=["checks"],
            dependencies=[documented_body(CheckTlsRequest)],
            response_model=CheckTlsResponse,
            response_description="The result",
            responses=documented_errors(TLS_ERROR_EXAMPLES),
        )
        add(
            "/ip",
            self.ip,
            methods=["GET"],
            operation_id="ip",
            summary="Return the caller's address",
            tags=["checks"],
            response_model=CallerAddress,
            response_description="The caller's address",
        )
        add(
            "/health",
            self.health,
            methods=["GET"],
            operation_id="health",
            summary="Tell whether the service is up",
            tags=["service"],
            response_model=Health,
            response_description="The service is up",
        )
        add(
            "/port/{port}",
            self.check_own_port,
            methods=["GET"],
            operation_id="check_own_port",
            summary="Check a port of your own address",
            tags=["checks"],
            response_model=CheckPortsResponse,
            response_description='The port, and "reachable" or why it is not',
            responses=documented_answers_in_text(ERROR_EXAMPLES),
            openapi_extra={"parameters": [PORT_PARAMETER]},
        )
        # As routes of their own, because the schema lists every method of a route.
        add("/health", self.health, methods=["HEAD"], include_in_schema=False)
        add("/ip", self.ip, methods=["HEAD"], include_in_schema=False)
        add("/port/{port}", self.check_own_port, methods=["HEAD"], include_in_schema=False)
        app.router.route_class = class_of_others

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
        by_place: list[PortsSeen] | None = [] if asked.perspectives else None

        async def check(on_final: OnVerdict | None = None) -> str:
            verdicts = await self._check(
                request, caller, asked.provider_ip, asked.ports, on_final, by_place
            )
            return port_results_json(verdicts, by_place)

        if prefers(request, NDJSON, "application/json"):
            return ProgressResponse(request, check, self._answer)
        return _JsonResponse(await check())

    async def check_own_port(self, request: Request) -> Response:
        """Connect to a port of the address that your request comes from.

        The answer is a line of text for people: the port, and `reachable` or why it is not. So are
        errors. Accept `application/json` for the answers of `POST /check-ports`.
        """
        wants_json = prefers(request, "application/json", "text/plain")
        if not wants_json:
            answer_errors_in_text(request)
        caller = self._callers.resolve(request)
        require_same_origin(request, caller)
        await self._limiter.pay_request(caller)
        port = parse_port(request.path_params["port"])
        if not caller:
            raise TargetNotAllowed(
                "This service cannot see your address. Send it to /check-ports instead."
            )
        verdicts = await self._check(request, caller, caller, [port])
        if wants_json:
            response = _JsonResponse(port_results_json(verdicts))
            response.headers["Vary"] = "Accept"
            return response
        error = verdicts[port].error
        return PlainTextResponse(f"{port} {error or 'reachable'}\n", headers=TEXT_HEADERS)

    async def _check(
        self,
        request: Request,
        caller: Address | None,
        target: Address,
        ports: list[int],
        on_final: OnVerdict | None = None,
        by_place: list[PortsSeen] | None = None,
    ) -> dict[int, Verdict]:
        with CheckRecord(caller, target, len(ports), self._metrics) as record:
            others = self._perspectives_for(request, target)
            places = others.places if others else 1
            admitted = await self._admission.admit(
                request, caller, target, len(ports), places=places
            )
            with admitted as room:
                if others:
                    # Who answers with its own verdicts tells these, and only logs what others say.
                    here, together = (on_final, None) if others.observes else (None, on_final)
                    own = self._checker.check(target, ports, room, here)
                    verdicts = await others.check_ports(
                        own, caller, target, ports, together, by_place
                    )
                else:
                    verdicts = await self._checker.check(target, ports, room, on_final)
                    if by_place is not None:
                        by_place.append((HERE, verdicts))
            kinds = [verdict.kind for verdict in verdicts.values()]
            record.result = f"accessible={kinds.count(OPEN.kind)}"
        self._metrics.count_ports(kinds)
        if logger.isEnabledFor(logging.DEBUG):
            for port, verdict in verdicts.items():
                logger.debug("%s port %d: %s", target, port, verdict.error or "open")
        return verdicts

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
            others = self._perspectives_for(request, target)
            places = others.places if others else 1
            with await self._admission.admit(
                request, caller, target, 1, places=places, is_tls=True
            ):
                own = self._checker.check_tls(
                    target, asked.port, asked.expected, caller and subscriber(caller)
                )
                by_place: list[tuple[str, TlsVerdict | ServiceError]] | None = None
                if asked.perspectives:
                    by_place = []
                if others:
                    verdict = await others.check_tls(own, caller, asked, by_place)
                else:
                    verdict = await own
                    if by_place is not None:
                        by_place.append((HERE, verdict))
            record.result = f'tls="{verdict.error or "valid"}"'
        self._metrics.count("tls_checks", verdict.kind.outcome)
        answer = CheckTlsResponse.of(asked, verdict)
        if by_place is not None:
            answer.perspectives = [TlsFromPlace.of(name, asked, seen) for name, seen in by_place]
        return _JsonResponse(answer.model_dump_json(exclude_unset=True))

    def _perspectives_for(self, request: Request, target: Address) -> "Perspectives | None":
        """Return the places to ask, besides this one.

        None if another server asks; and if the target's address is a private one, which is another
        machine's in a network elsewhere.
        """
        others = self._perspectives
        if not others or PERSPECTIVE_MARK in request.headers:
            return None
        is_one_machines = not special_purpose(target) or lies_in(
            target, self._settings.allowed_networks
        )
        return others if is_one_machines or others.are_nearby else None

    async def ip(self, request: Request) -> Response:
        """Return the address that your requests come from."""
        caller = self._callers.resolve(request)
        answer = CallerAddress(ip=str(caller) if caller else None)
        return _JsonResponse(answer.model_dump_json())

    async def health(self, _: Request) -> Response:
        """Answer at once, however busy the service is."""
        return _JsonResponse('{"status":"ok"}')


class _JsonResponse(Response):
    """An answer in JSON, which nobody may keep."""

    def __init__(self, text: str) -> None:
        """Write the fields as they are sent: Starlette takes five times as long (measured)."""
        self.status_code, self.background = 200, None
        self.body = text.encode()
        length = b"content-length", b"%d" % len(self.body)
        self.raw_headers = [*_NO_STORE_FIELDS, length, (b"content-type", b"application/json")]


async def _read_body(request: Request) -> bytes:
    """Return the request's body.

    Raises:
        ApiError: It is longer than ``MAX_BODY``; no more than that was read.
    """
    body = bytearray()
    is_too_large = int(dict(request.scope["headers"]).get(b"content-length", 0)) > MAX_BODY
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
