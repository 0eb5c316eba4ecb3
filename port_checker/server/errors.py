"""The one shape of every error: its codes, its exception, and what turns each failure into it."""

import logging
from collections.abc import Mapping
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from port_checker.checker import CallerOverLimit, NoRoom
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
    """A request that gets an error for an answer.

    Args:
        code: Which; it decides the HTTP status.
        message: A sentence that tells the caller what to do.
        headers: Further HTTP headers of the answer.
    """

    def __init__(
        self, code: ErrorCode, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.headers = headers


def to_api_error(error: Exception) -> ApiError:
    """Return what a caller is told of ``error``; of a bug, nothing but that it is one."""
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
        case NoRoom():
            is_callers = isinstance(error, CallerOverLimit)
            instead = (
                "Ask for fewer in one request."
                if error.asked > error.limit
                else f"Try again in {error.retry_after} s."
            )
            return ApiError(
                ErrorCode.RATE_LIMITED if is_callers else ErrorCode.OVERLOADED,
                f"{error} {instead}",
                {"Retry-After": str(error.retry_after)},
            )
        case CheckFailed():
            return ApiError(
                ErrorCode.CHECK_FAILED,
                f"This service could not do its work ({error}), which says nothing about your "
                "ports. Try again later.",
            )
        case ClientDisconnect():
            return ApiError(ErrorCode.INVALID_REQUEST, "The body did not arrive in full.")
        case HTTPException(status_code=HTTPStatus.NOT_FOUND):
            return ApiError(ErrorCode.NOT_FOUND, "Nothing is here. /docs shows what there is.")
        case HTTPException(status_code=HTTPStatus.METHOD_NOT_ALLOWED):
            return ApiError(
                ErrorCode.METHOD_NOT_ALLOWED,
                "This path does not answer this method. /docs shows which it does.",
                error.headers or {"Allow": "GET, HEAD"},  # the latter: static files
            )
        case _:
            return ApiError(
                ErrorCode.INTERNAL_ERROR,
                "This service has a bug, and its operators a trace of it.",
                {"Connection": "close"},  # the server will, once it has logged the traceback
            )


async def answer_error(_: Request, error: Exception) -> JSONResponse:
    """Answer with the one error shape; a Starlette exception handler."""
    if isinstance(error, CheckFailed):
        logger.error("Check failed: %s", error)
    told = to_api_error(error)
    return JSONResponse(
        {"detail": {"code": told.code, "message": told.message}},
        status_code=STATUS[told.code],
        headers=told.headers,
    )


def answer_errors(app: FastAPI) -> None:
    """Make every failure of ``app`` an answer in the one shape."""
    for error in (
        ApiError,
        InvalidRequest,
        TargetNotAllowed,
        RateLimited,
        NoRoom,
        CheckFailed,
        ClientDisconnect,
        HTTPException,
        Exception,  # a bug: answered here, and its traceback logged by the server
    ):
        app.add_exception_handler(error, answer_error)
