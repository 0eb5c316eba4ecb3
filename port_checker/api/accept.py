"""What a caller accepts: ``Accept`` and ``Accept-Encoding``."""

import re

from starlette.requests import HTTPConnection

# How much of a field is read. Browsers send ten elements; the longest field that a request may have
# would take some milliseconds.
_MAX_ELEMENTS = 50
_MAX_PARAMETERS = 10


def accepts(connection: HTTPConnection, field: bytes, *names: str) -> bool:
    """Tell whether the caller accepts something.

    Args:
        connection: The request.
        field: The name of the field, in lower case.
        names: What to look for, in lower case; nothing else stands for them.

    Returns:
        Whether the field lists one of ``names``, the first of them without a weight of 0.
    """
    return _weight(connection, field, *names) > 0


def prefers(connection: HTTPConnection, media_type: str, other: str) -> bool:
    """Tell whether the caller lists a media type, and does not like another one better."""
    weight = _weight(connection, b"accept", media_type)
    return weight > 0 and weight >= _weight(connection, b"accept", other)


def prefers_html(connection: HTTPConnection) -> bool:
    """Tell people's browsers, which list ``text/html``, from programs, even if these list both."""
    return prefers(connection, "text/html", "application/json")


def _weight(connection: HTTPConnection, field: bytes, *names: str) -> float:
    """Return the weight of the first of ``names`` in a field (RFC 9110 section 12.5); 0 if none."""
    for name, value in connection.scope["headers"]:
        if name == field:
            elements = value.decode("latin-1").lower().split(",", _MAX_ELEMENTS)
            for element in elements[:_MAX_ELEMENTS]:
                listed, *parameters = element.split(";", _MAX_PARAMETERS)
                if listed.strip() in names:
                    weights = (re.fullmatch(r"\s*q=([01](\.\d*)?)\s*", it) for it in parameters)
                    return next((float(it[1]) for it in weights if it), 1)
    return 0
