"""The schema that ``app.openapi()`` returns and ``/openapi.json`` serves.

FastAPI generates it from the routes. This adds what it cannot see there: the routes read their
bodies themselves.
"""

from collections.abc import Mapping
from typing import Any

from fastapi import Depends, FastAPI
from pydantic import BaseModel

from port_checker.api.errors import STATUS
from port_checker.schemas import (
    CHECK_EXAMPLE,
    PORT_SCHEMA,
    TLS_CHECK_EXAMPLE,
    ErrorCode,
    ErrorResponse,
)
from port_checker.settings import Settings

# The answer of /check-ports to callers that accept this type.
DOCUMENTED_PROGRESS: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {
            "application/x-ndjson": {
                "schema": {
                    "type": "string",
                    "description": "A line for each port as soon as its verdict is final, with "
                    "`port`, `accessible` and `error`; the last line is what others get, or an "
                    "error.",
                }
            }
        }
    }
}

PORT_PARAMETER = {"name": "port", "in": "path", "required": True, "schema": PORT_SCHEMA}

# Errors that only a request's body can cause.
_OF_BODIES = {
    ErrorCode.INVALID_IP,
    ErrorCode.TOO_MANY_PORTS,
    ErrorCode.INVALID_REQUEST,
    ErrorCode.REQUEST_TOO_LARGE,
}


def documented_body(model: type[BaseModel]) -> Any:
    """Return a dependency with which FastAPI documents the body of a route that reads it itself."""

    def body(body: Any) -> None:
        """Never called."""

    body.__annotations__["body"] = model
    return Depends(body)


def documented_errors(examples: Mapping[ErrorCode, str]) -> dict[int | str, dict[str, Any]]:
    """Return OpenAPI's ``responses`` for the error codes in ``examples``, with these messages."""
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


def documented_answers_in_text(
    examples: Mapping[ErrorCode, str],
) -> dict[int | str, dict[str, Any]]:
    """Return ``responses`` of a route that answers in text, or in JSON to those who accept it."""
    messages = {code: message for code, message in examples.items() if code not in _OF_BODIES}
    answers: dict[int | str, dict[str, Any]] = {200: {"content": {}}, **documented_errors(messages)}
    for answer in answers.values():
        answer["content"]["text/plain"] = {"schema": {"type": "string"}}
    return answers


def extend_openapi(app: FastAPI, settings: Settings) -> None:
    """Add the limits in ``settings``, and examples of checks, to what ``app.openapi()`` returns."""
    bodies = {
        "check_ports": {
            "here": {
                "summary": "This service itself, from its own machine",
                "value": {"provider_ip": "127.0.0.1", "ports": [settings.port]},
            },
            "provider": {
                "summary": "A provider",
                "value": {"provider_ip": "203.0.113.7", "ports": [7466, 50800, 50801]},
            },
        },
        "check_tls": {
            "address": {
                "summary": "A certificate for an address",
                "value": {"host": "203.0.113.7", "port": 443, "expected_ip": "203.0.113.7"},
            },
            "name": {
                "summary": "A certificate for a name",
                "value": {"host": "provider.example", "port": 443, "expected_ip": "203.0.113.7"},
            },
        },
    }
    answers = {"check_ports": CHECK_EXAMPLE, "check_tls": TLS_CHECK_EXAMPLE}

    def openapi() -> dict[str, Any]:
        schema = FastAPI.openapi(app)  # the same each time, until routes are added
        operations = {
            operation["operationId"]: operation
            for path in schema["paths"].values()
            for operation in path.values()
            if "operationId" in operation  # others may have been added by hand
        }
        # Somebody may have taken a route of ours away, or named a model of theirs as we name one.
        for name in answers.keys() & operations.keys():
            body = operations[name]["requestBody"]["content"]["application/json"]
            body["examples"] = bodies[name]
            # Here, because FastAPI drops nulls from examples that it is given.
            answer = operations[name]["responses"]["200"]["content"]["application/json"]
            answer["example"] = answers[name]
            model = schema["components"]["schemas"][body["schema"]["$ref"].rpartition("/")[2]]
            if "ports" in model["properties"]:
                model["properties"]["ports"]["maxItems"] = settings.max_ports
        if "check_own_port" in operations:
            for answer in operations["check_own_port"]["responses"].values():
                # Text first, because clients get it that do not ask for JSON.
                answer["content"]["application/json"] = answer["content"].pop("application/json")
        return schema

    # FastAPI documents this assignment as the way to extend the schema.
    app.openapi = openapi  # type: ignore[method-assign]
