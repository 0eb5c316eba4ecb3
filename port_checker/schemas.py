"""What client and server exchange: requests, responses, error codes, and examples of them."""

import functools
import json
import re
from codecs import BOM_UTF8
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import Annotated, Final, Literal, NamedTuple, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
)
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError, from_json, to_json

from port_checker.addresses import MAX_PORT, Address, parse_address
from port_checker.connect import Verdict
from port_checker.errors import ErrorCode as ErrorCode  # clients look for it here
from port_checker.errors import ServiceError
from port_checker.tls import TlsVerdict

# A server answers a request with this field alone, whoever sends it, so that servers that ask each
# other do not go in circles.
PERSPECTIVE_MARK: Final = "Port-Checker-Perspective"
_LONGEST_SHOWN: Final = 40  # characters of a wrong value

# Each alternative names the type: otherwise client generators do not make a string of it.
_IP_SCHEMAS: Final[list[JsonDict]] = [
    {"type": "string", "format": "ipv4"},
    {"type": "string", "format": "ipv6"},
]
_IP_SCHEMA: Final[JsonDict] = {"anyOf": [*_IP_SCHEMAS]}
PORT_SCHEMA: Final[JsonDict] = {"type": "integer", "minimum": 1, "maximum": MAX_PORT}

# RFC 1123 section 2.1. The last label begins with a letter, so that no name looks like an address.
_DNS_NAME: Final = (
    "^([A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?[.])*[A-Za-z]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?$"
)
_LONGEST_DNS_NAME: Final = 253
_DNS_NAME_SCHEMA: Final[JsonDict] = {
    "type": "string",
    "pattern": _DNS_NAME,
    "maxLength": _LONGEST_DNS_NAME,
}

_RequestT = TypeVar("_RequestT", bound=BaseModel)


class InvalidRequest(ServiceError):
    """A body that is not a valid request.

    Args:
        code: The error code.
        message: A sentence that tells the caller what to do.
    """

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


def _shown(value: object) -> str:
    """The value as JSON, short enough for a message."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except ValueError:  # it has a number of more digits than PYTHONINTMAXSTRDIGITS allows
        return "…"
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "…"


def _validate_ip(value: object) -> Address:
    try:
        if isinstance(value, str):
            return parse_address(value)
    except ValueError:
        pass
    raise PydanticCustomError(
        "INVALID_IP",
        "{shown} is not an IP address. Use an IPv4 or IPv6 address in a string, such as "
        '"203.0.113.7" or "2001:db8::7": no host name, port, brackets or scope id.',
        {"shown": _shown(value)},
    )


def _validate_ports(value: object, info: ValidationInfo) -> list[int]:
    if not isinstance(value, list) or not value:
        raise PydanticCustomError(
            "INVALID_REQUEST", "ports must be a list of at least one port number."
        )
    most = (info.context or {}).get("max_ports", len(value))
    if len(value) > most:
        raise PydanticCustomError(
            "TOO_MANY_PORTS",
            "{asked} ports are too many: send at most {most} per request.",
            {"asked": len(value), "most": most},
        )
    for index, port in enumerate(value):
        if type(port) is not int:  # isinstance() would let true in: bool is a subclass of int
            if type(port) is not float or not port.is_integer():
                raise PydanticCustomError(
                    "INVALID_PORT",
                    "Port {shown} is not an integer (1-65535).",
                    {"shown": _shown(port)},
                )
            port = value[index] = int(port)  # as in JSON Schema, 80.0 is an integer
        if not 1 <= port <= MAX_PORT:
            raise PydanticCustomError(
                "INVALID_PORT",
                "Port {shown} is out of range (1-65535).",
                {"shown": _shown(port)},
            )
    return list(dict.fromkeys(value))


def _validate_flag(value: object, info: ValidationInfo) -> bool:
    if isinstance(value, bool):
        return value
    raise PydanticCustomError(
        "INVALID_REQUEST", "{name} must be true or false.", {"name": info.field_name}
    )


_AsksForPlaces = Annotated[
    bool | None,
    PlainValidator(_validate_flag),
    WithJsonSchema({"type": "boolean"}),
    Field(
        description="Whether the answer tells what each of this service's places says. "
        "It then waits for all of them."
    ),
]


def parse_port(text: str) -> int:
    """Read a port in a URL.

    Raises:
        InvalidRequest: It is none.
    """
    if not re.fullmatch("[0-9]+", text):
        raise InvalidRequest(
            ErrorCode.INVALID_PORT, f"Port {_shown(text)} is not an integer (1-65535)."
        )
    port = text.lstrip("0")
    if not port or len(port) > len(str(MAX_PORT)) or int(port) > MAX_PORT:
        raise InvalidRequest(
            ErrorCode.INVALID_PORT, f"Port {_shown(text)} is out of range (1-65535)."
        )
    return int(port)


def _read_json(body: bytes) -> object:
    try:
        return from_json(body.removeprefix(BOM_UTF8), allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(
            ErrorCode.INVALID_REQUEST, f"The body is not valid JSON in UTF-8: {error}."
        ) from None


def _validate(model: type[_RequestT], document: object, context: Mapping[str, int]) -> _RequestT:
    try:
        return model.model_validate(document, context=context)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    match first["type"]:
        case "missing":
            message = f"{first['loc'][0]} is missing."
        case "model_type":
            required = [name for name, field in model.model_fields.items() if field.is_required()]
            message = f"The body must be a JSON object with {' and '.join(required)}."
        case code:
            raise InvalidRequest(ErrorCode(code), first["msg"])
    raise InvalidRequest(ErrorCode.INVALID_REQUEST, message)


class PortsToCheck(NamedTuple):
    """What a valid ``CheckPortsRequest`` asks for."""

    provider_ip: Address
    ports: list[int]
    perspectives: bool = False


class CheckPortsRequest(BaseModel):
    """A provider's address and the ports to check on it."""

    provider_ip: Annotated[
        Address,
        PlainValidator(_validate_ip),
        WithJsonSchema(_IP_SCHEMA),
        Field(description="The address to check, usually your own: an IPv4 or IPv6 literal."),
    ]
    ports: Annotated[
        list[int],
        PlainValidator(_validate_ports),
        WithJsonSchema(
            {
                "type": "array",
                "items": PORT_SCHEMA,
                "minItems": 1,
            }
        ),
        Field(description="The TCP ports to check. Duplicates count once."),
    ]
    perspectives: _AsksForPlaces = None

    @classmethod
    def parse(cls, body: bytes, max_ports: int) -> PortsToCheck:
        """Read a request's body.

        Args:
            body: JSON in UTF-8; a byte order mark is ignored (RFC 8259 section 8.1).
            max_ports: How many entries ``ports`` may have.

        Raises:
            InvalidRequest: The message names the first error, in the order body,
                ``provider_ip``, ``ports``, ``perspectives``.
        """
        document = _read_json(body)
        # pydantic takes four times as long (by cProfile), and finds out what is wrong.
        if plain := _plain_ports_request(document, max_ports):
            return plain
        request = _validate(cls, document, {"max_ports": max_ports})
        return PortsToCheck(request.provider_ip, request.ports, bool(request.perspectives))


def _plain_ports_request(document: object, max_ports: int) -> PortsToCheck | None:
    """Return a request as nearly all are: valid, and with integers for ports."""
    if not isinstance(document, dict):
        return None
    text, ports = document.get("provider_ip"), document.get("ports")
    if not (isinstance(text, str) and isinstance(ports, list) and len(ports) <= max_ports):
        return None
    # bool is a subclass of int, and an empty list has no types.
    if set(map(type, ports)) != {int} or min(ports) < 1 or max(ports) > MAX_PORT:
        return None
    perspectives = document.get("perspectives", False)
    if type(perspectives) is not bool:
        return None
    try:
        return PortsToCheck(parse_address(text), list(dict.fromkeys(ports)), perspectives)
    except ValueError:
        return None


@dataclass(slots=True)
class PortResult:
    """Whether one port can be reached.

    Attributes:
        accessible: Whether a TCP connection to it was established.
        error: Why not, in the system's words; None if it was.
    """

    accessible: bool
    error: str | None


class ErrorDetail(BaseModel):
    """What went wrong: a code for programs, a message for people."""

    code: ErrorCode
    message: str = Field(description="A sentence that says what to do.")
    ports: list[int] | None = Field(
        default=None,
        description="With CHECK_FAILED, the ports to which this service cannot connect, if it is "
        "about these alone; else absent.",
    )


class ErrorResponse(BaseModel):
    """The body of every error response."""

    detail: ErrorDetail


def _error_detail(error: ServiceError) -> ErrorDetail:
    return ErrorDetail(code=error.code, message=error.message)


class Place(BaseModel):
    """A place from which the check was made."""

    name: str = Field(description="`here`, or the host (and port) of another port checker.")
    error: ErrorDetail | None = Field(
        default=None, description="Why it has no result, which says nothing about the port."
    )


class PortsFromPlace(Place):
    """What one place says about the ports."""

    results: dict[str, PortResult] | None = Field(
        default=None, description="The result for each port; absent if there is an error."
    )


class CheckPortsResponse(BaseModel):
    """The result of a check, port by port."""

    success: bool = Field(description="Whether at least one port is accessible.")
    results: dict[str, PortResult] = Field(
        description="The result for each port, in the order of the request."
    )
    message: str = Field(description="How many of the ports are accessible.")
    perspectives: list[PortsFromPlace] | None = Field(
        default=None, description="What each place says, if the request asks; else absent."
    )


# The name of a place, and its verdict on each port, or why it has none.
PortsSeen = tuple[str, Mapping[int, Verdict] | ServiceError]


def port_results_json(
    verdicts: Mapping[int, Verdict], places: Sequence[PortsSeen] | None = None
) -> str:
    """Return the JSON of the ``CheckPortsResponse`` to a check.

    Written here, since pydantic takes seven times as long for one port (by cProfile).

    Args:
        verdicts: For each port.
        places: What each place says; None if nobody asks.
    """
    accessible, results = _results_json(verdicts)
    perspectives = f',"perspectives":[{",".join(map(_place_json, places))}]' if places else ""
    return (
        f'{{"success":{"true" if accessible else "false"},'
        f'"results":{results},'
        f'"message":"Successfully verified {accessible} out of {len(verdicts)} ports"'
        f"{perspectives}}}"
    )


def _place_json(place: PortsSeen) -> str:
    name, seen = place
    if isinstance(seen, ServiceError):
        return PortsFromPlace(name=name, error=_error_detail(seen)).model_dump_json(
            exclude_unset=True
        )
    return f'{{"name":{to_json(name).decode()},"results":{_results_json(seen)[1]}}}'


def _results_json(verdicts: Mapping[int, Verdict]) -> tuple[int, str]:
    """Return how many ports are accessible, and the JSON of the results."""
    accessible = 0
    results = []
    previous = None
    for port, verdict in verdicts.items():
        if verdict is not previous:  # most ports of a check end alike
            previous, is_open = verdict, verdict.accessible
            result = _result_json(is_open, verdict.error)
        accessible += is_open
        results.append(f'"{port}":{result}')
    return accessible, f"{{{','.join(results)}}}"


@functools.lru_cache(maxsize=64)  # there are few errors
def _result_json(accessible: bool, error: str | None) -> str:
    return to_json(PortResult(accessible, error)).decode()


def _validate_host(value: object) -> Address | str:
    if isinstance(value, str):
        if len(value) <= _LONGEST_DNS_NAME and re.fullmatch(_DNS_NAME, value):
            return value
        try:
            return parse_address(value)
        except ValueError:
            pass
    raise PydanticCustomError(
        "INVALID_IP",
        "{shown} is neither an IP address nor a DNS name. Use a string such as "
        '"203.0.113.7", "2001:db8::7" or "provider.example": no port, brackets or scope id.',
        {"shown": _shown(value)},
    )


def _validate_expected_ip(value: object, info: ValidationInfo) -> Address | None:
    if value is not None:
        return _validate_ip(value)
    if isinstance(info.data.get("host"), str):
        raise PydanticCustomError(
            "INVALID_REQUEST",
            "expected_ip is missing. This service does not ask DNS, so it needs the address of "
            "{host}.",
            {"host": info.data["host"]},
        )
    return None


def _validate_port(value: object, info: ValidationInfo) -> int:
    return _validate_ports([value], info)[0]


class CheckTlsRequest(BaseModel):
    """A TLS endpoint, and what its certificate must be good for."""

    model_config = ConfigDict(
        json_schema_extra={
            # One schema for addresses and names, of which generators make one type.
            "if": {"properties": {"host": _DNS_NAME_SCHEMA}},
            "then": {"properties": {"expected_ip": _IP_SCHEMA}, "required": ["expected_ip"]},
        }
    )

    host: Annotated[
        Address | str,
        PlainValidator(_validate_host),
        WithJsonSchema({"anyOf": [*_IP_SCHEMAS, _DNS_NAME_SCHEMA]}),
        Field(
            description="What the certificate must be good for: an IPv4 or IPv6 literal, which is "
            "connected to, or a DNS name, together with expected_ip."
        ),
    ]
    expected_ip: Annotated[
        Address | None,
        PlainValidator(_validate_expected_ip),
        WithJsonSchema({"anyOf": [*_IP_SCHEMAS, {"type": "null"}]}),
        Field(
            description="With a DNS name: the address to connect to, since DNS is never asked. "
            "With an address: another one that the certificate must be good for.",
            validate_default=True,
        ),
    ] = None
    port: Annotated[
        int,
        PlainValidator(_validate_port),
        WithJsonSchema(PORT_SCHEMA),
        Field(description="The TCP port."),
    ]
    perspectives: _AsksForPlaces = None

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Read a request's body.

        Args:
            body: JSON in UTF-8.

        Raises:
            InvalidRequest: The message names the first error, in the order body, ``host``,
                ``expected_ip``, ``port``, ``perspectives``.
        """
        return _validate(cls, _read_json(body), {})

    @property
    def target(self) -> Address:
        """The address to connect to."""
        if isinstance(self.host, str):
            assert self.expected_ip, "validated"  # noqa: S101
            return self.expected_ip
        return self.host

    @property
    def expected(self) -> list[Address | str]:
        """What the certificate must be good for."""
        if isinstance(self.host, str) or self.expected_ip in (None, self.host):
            return [self.host]
        return [self.host, self.expected_ip]


class TlsResult(BaseModel):
    """Whether a TLS endpoint can be trusted."""

    valid: bool = Field(description="Whether everybody can trust the endpoint.")
    error: str | None = Field(description="Why not; null if it is valid.")
    peer: str = Field(description="What was checked: host:port, an IPv6 address in brackets.")
    not_after: Annotated[
        str | None,
        WithJsonSchema({"anyOf": [{"type": "string", "format": "date-time"}, {"type": "null"}]}),
        Field(
            description="Until when the certificate is good; null unless its chain was verified."
        ),
    ]

    @classmethod
    def of(cls, asked: CheckTlsRequest, verdict: TlsVerdict) -> Self:
        """Build the response from the verdict of a check."""
        host = f"[{asked.host}]" if isinstance(asked.host, IPv6Address) else asked.host
        return cls(
            valid=verdict.valid,
            error=verdict.error,
            peer=f"{host}:{asked.port}",
            not_after=verdict.not_after.isoformat() if verdict.not_after else None,
        )


class TlsFromPlace(Place):
    """What one place says about a TLS endpoint."""

    result: TlsResult | None = Field(
        default=None, description="The result; absent if there is an error."
    )

    @classmethod
    def of(cls, name: str, asked: CheckTlsRequest, verdict: TlsVerdict | ServiceError) -> Self:
        """Build it from the verdict of a place, or from why it has none."""
        if isinstance(verdict, ServiceError):
            return cls(name=name, error=_error_detail(verdict))
        return cls(name=name, result=TlsResult.of(asked, verdict))


class CheckTlsResponse(TlsResult):
    """The result of a check of a TLS endpoint."""

    perspectives: list[TlsFromPlace] | None = Field(
        default=None, description="What each place says, if the request asks; else absent."
    )


class Health(BaseModel):
    """The service is up."""

    status: Literal["ok"] = "ok"


class CallerAddress(BaseModel):
    """The caller's address."""

    model_config = ConfigDict(json_schema_extra={"example": {"ip": "203.0.113.7"}})

    ip: str | None = Field(
        description="The caller's address as this service sees it; null if unknown."
    )


# The response that /docs shows.
CHECK_EXAMPLE: Final = {
    "success": True,
    "results": {
        "7466": {"accessible": True, "error": None},
        "50800": {"accessible": True, "error": None},
        "50801": {"accessible": False, "error": "Connection refused"},
    },
    "message": "Successfully verified 2 out of 3 ports",
}

TLS_CHECK_EXAMPLE: Final = {
    "valid": True,
    "error": None,
    "peer": "203.0.113.7:443",
    "not_after": "2026-12-01T08:30:00+00:00",
}

# The message that /docs shows for each error code of a check. The tests compare them with what the
# service says.
ERROR_EXAMPLES: Final = {
    ErrorCode.INVALID_IP: (
        '"provider.example" is not an IP address. Use an IPv4 or IPv6 address in a string, such as '
        '"203.0.113.7" or "2001:db8::7": no host name, port, brackets or scope id.'
    ),
    ErrorCode.INVALID_PORT: "Port 70000 is out of range (1-65535).",
    ErrorCode.TOO_MANY_PORTS: "1001 ports are too many: send at most 1000 per request.",
    ErrorCode.INVALID_REQUEST: "ports is missing.",
    ErrorCode.TARGET_NOT_ALLOWED: (
        "192.168.1.100 is a private address. You may check your own address, 127.0.0.1."
    ),
    ErrorCode.CROSS_ORIGIN: (
        "This request comes from another site's page. Use this service's own page, or a program "
        "that is not a browser."
    ),
    ErrorCode.REQUEST_TOO_LARGE: "The body is over 65536 bytes. Send a shorter one.",
    ErrorCode.RATE_LIMITED: "You ask too often. Try again in 2 s.",
    ErrorCode.OVERLOADED: "Too many checks are running. Try again in 5 s.",
    ErrorCode.CHECK_FAILED: (
        "This service failed to check (this machine has no route to 2600::7). That says "
        "nothing about your ports. Try again later."
    ),
}

TLS_ERROR_EXAMPLES: Final = ERROR_EXAMPLES | {
    ErrorCode.INVALID_IP: (
        '"203.0.113.7:443" is neither an IP address nor a DNS name. Use a string such as '
        '"203.0.113.7", "2001:db8::7" or "provider.example": no port, brackets or scope id.'
    ),
    ErrorCode.INVALID_REQUEST: (
        "expected_ip is missing. This service does not ask DNS, so it needs the address of "
        "provider.example."
    ),
}
del TLS_ERROR_EXAMPLES[ErrorCode.TOO_MANY_PORTS]
