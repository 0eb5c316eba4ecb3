"""Why a request gets an error instead of a result."""

from collections.abc import Sequence
from enum import StrEnum

from port_checker.addresses import Address


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


class Limit(StrEnum):
    """What is limited, in the log and in the metrics.

    A network is an IPv6 /48, whose callers share what it may have besides their own.
    """

    CALLER_REQUESTS = "caller_requests"
    CALLER_OWN_PORTS = "caller_own_ports"  # that a caller asks for on its own address
    CALLER_OTHERS_PORTS = "caller_others_ports"
    CALLER_IN_FLIGHT = "caller_in_flight"
    CALLER_TLS_CHECKS = "caller_tls_checks"
    CALLER_CONNECTIONS = "caller_connections"
    NETWORK_REQUESTS = "network_requests"
    NETWORK_OWN_PORTS = "network_own_ports"
    NETWORK_OTHERS_PORTS = "network_others_ports"
    NETWORK_IN_FLIGHT = "network_in_flight"
    NETWORK_TLS_CHECKS = "network_tls_checks"
    NETWORK_CONNECTIONS = "network_connections"
    TARGET_PORTS = "target_ports"
    IN_FLIGHT = "in_flight"
    OTHERS_IN_FLIGHT = "others_in_flight"
    CONNECTIONS = "connections"
    ARRIVING_BYTES = "arriving_bytes"  # of requests that are not complete


class ServiceError(Exception):
    """A request that gets an error instead of a result.

    Each kind of error is a class; its text says what went wrong.

    Attributes:
        code: What went wrong, for programs.
        retry_after: Whole seconds after which the same request may succeed; None if that is not
            a matter of time.
        ports: The ports that it is about, if it is about certain ports alone.
        limit: What was reached, if it was a limit.
        target: The address that was to be checked, once that is known.
    """

    code: ErrorCode
    retry_after: int | None = None
    ports: Sequence[int] = ()
    limit: Limit | None = None
    target: Address | None = None

    @property
    def message(self) -> str:
        """What went wrong and what to do, for people."""
        return f"{self} Try again in {self.retry_after} s." if self.retry_after else str(self)
