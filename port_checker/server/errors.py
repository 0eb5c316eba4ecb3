"""Error responses: which status each code has, and the handlers that turn exceptions into them."""

import logging
from collections.abc import Mapping
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from port_checker.checker import Overloaded
from port_checker.connect import CheckFailed
from port_checker.schemas import ErrorCode, InvalidRequest
from port_checker.server.rate_limit import RateLimited
from port_checker.server.targets import TargetNotAllowed

logger = logging.getLogger(__name__)


STATUS = {
    ErrorCode.INVALID_IP: HTTPStatus.UNPROCESSABLE_ENTITY,
    ErrorCode.INVALID_PORT: HTTPStatus.UNPROCESSABLE_ENTITY,
    ErrorCode.TOO_MANY_PORTS: HTTPStatus.UNPROCESSABLE_ENTITY,
    ErrorCode.INVALID_REQUEST: HTTPStatus.UNPROCESSABLE_ENTITY,
    ErrorCode.TARGET_NOT_ALLOWED: HTTPStatus.FORBIDDEN,
    ErrorCode.RATE_LIMITED: HTTPStatus.TOO_MANY_REQUESTS,
    ErrorCode.REQUEST_TOO_LARGE: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    ErrorCode.OVERLOADED: HTTPStatus.SERVICE_UNAVAILABLE,
    ErrorCode.CHECK_FAILED: HTTPStatus.SERVICE_UNAVAILABLE,
    ErrorCode.NOT_FOUND: HTTPStatus.NOT_FOUND,
    ErrorCode.METHOD_NOT_ALLOWED: HTTPStatus.METHOD_NOT_ALLOWED,
    ErrorCode.INTERNAL_ERROR: HTTPStatus.INTERNAL_SERVER_ERROR,
}


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        code: The error code; it decides the HTTP status.
        message: A sentence that tells the caller what to do.
        headers: Additional HTTP headers of the response.
    """

    def __init__(
        self, code: ErrorCode, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.headers = headers


def to_api_error(error: Exception) -> ApiError:
    """Return the error response for ``error``; one for a bug gives no details away."""
    match error:
        case ApiError():
            return error
        case InvalidRequest():
            return ApiError(error.code, str(error))
        case TargetNotAllowed():
            return ApiError(ErrorCode.TARGET_NOT_ALLOWED, str(error))
        case RateLimited():
            return ApiError(
                ErrorCode.RATE_LIMITED,
                f"{error} Try again in {error.retry_after} s.",
                {"Retry-After": str(error.retry_after)},
            )
        case Overloaded() if error.asked > error.max_in_flight:
            return ApiError(
                ErrorCode.OVERLOADED,
                f"This service checks at most {error.max_in_flight} ports at once. "
                "Send fewer per request.",
                {"Retry-After": str(error.retry_after)},
            )
        case Overloaded():
            return ApiError(
                ErrorCode.OVERLOADED,
                f"Too many checks are running. Try again in {error.retry_after} s.",
                {"Retry-After": str(error.retry_after)},
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
                ErrorCode.METHOD_NOT_ALLOWED,
                "Method not allowed. See /docs.",
                error.headers or {"Allow": "GET, HEAD"},  # static files set no headers
            )
        case _:
            return ApiError(
                ErrorCode.INTERNAL_ERROR,
                "Internal error; it has been logged.",
                {"Connection": "close"},  # uvicorn closes it after logging the traceback
            )


async def answer_error(_: Request, error: Exception) -> JSONResponse:
    """Answer with an error response; a Starlette exception handler."""
    if isinstance(error, CheckFailed):
        logger.error("Check failed: %s", error)
    answer = to_api_error(error)
    return JSONResponse(
        {"detail": {"code": answer.code, "message": answer.message}},
        status_code=STATUS[answer.code],
        headers=answer.headers,
    )


def answer_errors(app: FastAPI) -> None:
    """Have every exception in ``app`` answered with an error response."""
    for error in (
        ApiError,
        InvalidRequest,
        TargetNotAllowed,
        RateLimited,
        Overloaded,
        CheckFailed,
        ClientDisconnect,
        HTTPException,
        Exception,  # a bug: uvicorn logs its traceback
    ):
        app.add_exception_handler(error, answer_error)
