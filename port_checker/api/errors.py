"""Error responses: which status each code has, and the handlers that turn exceptions into them."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from http import HTTPStatus

from fastapi import FastAPI, Request, Response
from fastapi.exception_handlers import http_exception_handler
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from port_checker.api.caller import CallerResolver
from port_checker.api.limits import RateLimited
from port_checker.api.origin import CrossOrigin
from port_checker.api.records import RefusalLog
from port_checker.api.targets import TargetNotAllowed
from port_checker.checker import CallerOverLimit, NoRoom
from port_checker.connect import CheckFailed
from port_checker.metrics import Metrics
from port_checker.schemas import ErrorCode, InvalidRequest

# Nothing that is answered may be kept by a proxy's cache and given to somebody else.
NO_STORE = {"Cache-Control": "no-store"}

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

# Codes of which each one is logged: the request was turned away. The others mean a wrong URL, or
# have a log line of their own.
_REFUSALS = STATUS.keys() - {
    ErrorCode.NOT_FOUND,
    ErrorCode.METHOD_NOT_ALLOWED,
    ErrorCode.CHECK_FAILED,
    ErrorCode.INTERNAL_ERROR,
}


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        code: The error code; it decides the HTTP status.
        message: A sentence that tells the caller what to do.
        headers: Additional HTTP headers of the response.
        ports: The ports that it is about, if it is about certain ports alone.
    """

    def __init__(
        self,
        code: ErrorCode,
        message: str,
        headers: Mapping[str, str] | None = None,
        ports: Sequence[int] = (),
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.headers = headers
        self.ports = ports


def to_api_error(error: Exception) -> ApiError:
    """Return the error response for ``error``; one for a bug gives no details away."""
    match error:
        case ApiError():
            return error
        case InvalidRequest():
            return ApiError(error.code, str(error))
        case TargetNotAllowed():
            return ApiError(ErrorCode.TARGET_NOT_ALLOWED, str(error))
        case CrossOrigin():
            return ApiError(ErrorCode.CROSS_ORIGIN, str(error))
        case RateLimited():
            return ApiError(
                ErrorCode.RATE_LIMITED,
                f"{error} Try again in {error.retry_after} s.",
                {"Retry-After": str(error.retry_after)},
            )
        case NoRoom():
            is_too_large = error.asked > error.limit
            advice = (
                "Send fewer per request."
                if is_too_large
                else f"Try again in {error.retry_after} s."
            )
            return ApiError(
                ErrorCode.RATE_LIMITED
                if isinstance(error, CallerOverLimit)
                else ErrorCode.OVERLOADED,
                f"{error} {advice}",
                {"Retry-After": str(error.retry_after)},
            )
        case CheckFailed(ports=[_, *_]):
            return ApiError(
                ErrorCode.CHECK_FAILED,
                f"This service cannot connect to some of these ports ({error}). That says nothing "
                "about them, nor about the others. Leave them out, or try again later.",
                ports=error.ports,
            )
        case CheckFailed():
            return ApiError(
                ErrorCode.CHECK_FAILED,
                f"This service failed to check ({error}). That says nothing about your ports. "
                "Try again later.",
            )
        case ClientDisconnect():
            return ApiError(ErrorCode.INVALID_REQUEST, "The body is incomplete.")
        case HTTPException(status_code=HTTPStatus.NOT_FOUND):
            return ApiError(ErrorCode.NOT_FOUND, "Not found. See /docs.")
        case HTTPException(status_code=HTTPStatus.METHOD_NOT_ALLOWED):
            return ApiError(
                ErrorCode.METHOD_NOT_ALLOWED, "Method not allowed. See /docs.", error.headers
            )
        case _:
            return ApiError(
                ErrorCode.INTERNAL_ERROR,
                "Internal error; it has been logged.",
                {"Connection": "close"},  # uvicorn closes it after logging the traceback
            )


def answer_errors(
    app: FastAPI, callers: CallerResolver, metrics: Metrics
) -> Callable[[Request, Exception], Awaitable[JSONResponse]]:
    """Have every exception in ``app`` answered, counted, and, if it is a refusal, logged.

    Returns:
        What does that.
    """
    refusals = RefusalLog()

    async def answer(request: Request, error: Exception) -> JSONResponse:
        told = to_api_error(error)
        metrics.count("errors", told.code)
        if told.code in _REFUSALS and not isinstance(error, ClientDisconnect):
            refusals.add(callers.resolve(request), told.code)
        detail: dict[str, object] = {"code": told.code, "message": told.message}
        if told.ports:
            detail["ports"] = told.ports
        return JSONResponse(
            {"detail": detail},
            status_code=STATUS[told.code],
            headers={**NO_STORE, **(told.headers or {})},
        )

    async def answer_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # noqa: S101  # that is what it is added for
        if not _tells_that_no_route_fits(error):
            return await http_exception_handler(request, error)
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            allowed = ", ".join(_allowed_methods(request, error))
            error = HTTPException(error.status_code, headers={"Allow": allowed})
        return await answer(request, error)

    app.add_exception_handler(HTTPException, answer_http_exception)
    for error in (
        ApiError,
        InvalidRequest,
        TargetNotAllowed,
        CrossOrigin,
        RateLimited,
        NoRoom,
        CheckFailed,
        ClientDisconnect,
        Exception,  # a bug: uvicorn logs its traceback
    ):
        app.add_exception_handler(error, answer)
    return answer


def _tells_that_no_route_fits(error: HTTPException) -> bool:
    """Tell the router's exceptions from those of routes that somebody added to ours."""
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
