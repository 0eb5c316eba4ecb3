"""Error responses: which status each code has, and the handlers that turn exceptions into them."""

from collections.abc import Awaitable, Callable
from http import HTTPStatus

from fastapi import FastAPI, Request, Response
from fastapi.exception_handlers import http_exception_handler
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.routing import Match

from port_checker.api.accept import prefers_html
from port_checker.api.admission import CallerLeft
from port_checker.api.caller import CallerResolver
from port_checker.api.records import RefusalLog
from port_checker.errors import ErrorCode, ServiceError
from port_checker.metrics import Metrics

# No proxy's cache may keep an answer and give it to somebody else.
NO_STORE = {"Cache-Control": "no-store"}

# For answers in text: others get them in JSON, and no browser may take them for anything else.
TEXT_HEADERS = {**NO_STORE, "Vary": "Accept", "X-Content-Type-Options": "nosniff"}

STATUS = {
    ErrorCode.INVALID_IP: HTTPStatus.UNPROCESSABLE_ENTITY,
    ErrorCode.INVALID_PORT: HTTPStatus.UNPROCESSABLE_ENTITY,
    ErrorCode.TOO_MANY_PORTS: HTTPStatus.UNPROCESSABLE_ENTITY,
    ErrorCode.INVALID_REQUEST: HTTPStatus.UNPROCESSABLE_ENTITY,
    ErrorCode.TARGET_NOT_ALLOWED: HTTPStatus.FORBIDDEN,
    ErrorCode.CROSS_ORIGIN: HTTPStatus.FORBIDDEN,
    ErrorCode.RATE_LIMITED: HTTPStatus.TOO_MANY_REQUESTS,
    ErrorCode.REQUEST_TOO_LARGE: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    ErrorCode.OVERLOADED: HTTPStatus.SERVICE_UNAVAILABLE,
    ErrorCode.CHECK_FAILED: HTTPStatus.SERVICE_UNAVAILABLE,
    ErrorCode.NOT_FOUND: HTTPStatus.NOT_FOUND,
    ErrorCode.METHOD_NOT_ALLOWED: HTTPStatus.METHOD_NOT_ALLOWED,
    ErrorCode.INTERNAL_ERROR: HTTPStatus.INTERNAL_SERVER_ERROR,
}


class ApiError(ServiceError):
    """A request that is answered with an error which has no class of its own."""

    def __init__(self, code: ErrorCode, text: str) -> None:
        super().__init__(text)
        self.code = code


def answer_errors(
    app: FastAPI,
    callers: CallerResolver,
    metrics: Metrics,
    not_found_page: Callable[[Request], Response],
) -> Callable[[HTTPConnection, Exception], Awaitable[Response]]:
    """Have every exception in ``app`` answered, counted, and, if it is a refusal, logged.

    Args:
        app: The application.
        callers: Finds out who asks.
        metrics: Where errors are counted.
        not_found_page: Returns what a browser shows for a path that does not exist.

    Returns:
        The handler, for those who answer without raising.
    """
    refusals = RefusalLog()

    def respond(request: HTTPConnection, error: ServiceError, **headers: str) -> Response:
        metrics.count("errors", error.code)
        detail: dict[str, object] = {"code": error.code, "message": error.message}
        if error.ports:
            detail["ports"] = error.ports
        if error.retry_after:
            headers["Retry-After"] = str(error.retry_after)
        status = STATUS[error.code]
        if getattr(request.state, "errors_in_text", False):
            return PlainTextResponse(f"{error.message}\n", status, {**TEXT_HEADERS, **headers})
        return JSONResponse({"detail": detail}, status, {**NO_STORE, **headers})

    async def answer(request: HTTPConnection, error: Exception) -> Response:
        if not isinstance(error, ServiceError):
            bug = ApiError(ErrorCode.INTERNAL_ERROR, "Internal error; it has been logged.")
            # uvicorn closes the connection after logging the traceback.
            return respond(request, bug, Connection="close")
        if error.code is not ErrorCode.CHECK_FAILED:  # which has a log line of its own
            refusals.add(callers.resolve(request), error.code, error.limit, error.target)
            if error.limit:
                metrics.count("refusals", error.limit)
        return respond(request, error)

    async def answer_incomplete_body(request: Request, _: Exception) -> Response:
        return respond(request, ApiError(ErrorCode.INVALID_REQUEST, "The body is incomplete."))

    async def answer_nobody(_: Request, __: Exception) -> Response:
        return Response()  # nobody reads it; the check is on record as cancelled

    async def answer_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # noqa: S101  # it is added for those alone
        if request.scope["type"] != "http" or not _tells_that_no_route_fits(error):
            return await http_exception_handler(request, error)
        if error.status_code == HTTPStatus.NOT_FOUND:
            answer = respond(request, ApiError(ErrorCode.NOT_FOUND, "Not found. See /docs."))
            is_page = request.method in ("GET", "HEAD") and prefers_html(request)
            return not_found_page(request) if is_page else answer
        return respond(
            request,
            ApiError(ErrorCode.METHOD_NOT_ALLOWED, "Method not allowed. See /docs."),
            Allow=", ".join(_allowed_methods(request, error)),
        )

    app.add_exception_handler(ServiceError, answer)
    app.add_exception_handler(ClientDisconnect, answer_incomplete_body)
    app.add_exception_handler(CallerLeft, answer_nobody)
    app.add_exception_handler(HTTPException, answer_http_exception)
    app.add_exception_handler(Exception, answer)
    return answer


def answer_errors_in_text(request: Request) -> None:
    """Have each error of this request answered with its sentence alone."""
    request.state.errors_in_text = True


def _tells_that_no_route_fits(error: HTTPException) -> bool:
    """Tell the router's own exceptions from those that added routes raise."""
    return (
        type(error) is HTTPException  # routes raise FastAPI's
        and error.status_code in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED)
        and error.detail == HTTPStatus(error.status_code).phrase
    )


def _allowed_methods(request: Request, error: HTTPException) -> list[str]:
    """Return the methods of all routes for the request's path; Starlette tells the first one's."""
    allowed = set((error.headers or {}).get("Allow", "").split(", "))
    for route in request.app.routes:
        if route.matches(request.scope)[0] == Match.PARTIAL:
            allowed.update(getattr(route, "methods", None) or ())
    return sorted(allowed - {""})
