"""Why a request gets an error instead of a result."""

from collections.abc import Sequence
from enum import StrEnum


class ErrorCode(StrEnum):
    """What went wrong, for programs."""

    INVALID_IP = "INVALID_IP"
    INVALID_PORT = "INVALID_PORT"
    TOO_MANY_PORTS = "TOO_MANY_PORTS"
    INVALID_REQUEST = "INVALID_REQUEST"
    TARGET_NOT_ALLOWED = "TARGET_NOT_ALLOWED"
    CROSS_ORIGIN = "CROSS_ORIGIN"
    RATE_LIMITED = "RATE_LIMITED"
    REQUEST_TOO_LARGE = "REQUEST_TOO_LARGE"
    OVERLOADED = "OVERLOADED"
    CHECK_FAILED = "CHECK_FAILED"
    NOT_FOUND = "NOT_FOUND"
    METHOD_NOT_ALLOWED = "METHOD_NOT_ALLOWED"
    INTERNAL_ERROR = "INTERNAL_ERROR"


class ServiceError(Exception):
    """A request that gets an error instead of a result.

    Each kind of error is a class; its text says what went wrong.

    Attributes:
        code: What went wrong, for programs.
        retry_after: Whole seconds after which the same request may succeed; None if that is not
            a matter of time.
        ports: The ports that it is about, if it is about certain ports alone.
    """

    code: ErrorCode
    retry_after: int | None = None
    ports: Sequence[int] = ()

    @property
    def message(self) -> str:
        """What went wrong and what to do, for people."""
        return f"{self} Try again in {self.retry_after} s." if self.retry_after else str(self)
