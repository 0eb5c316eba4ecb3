"""What a caller says that it takes: ``Accept`` and ``Accept-Encoding``."""

import re

from starlette.requests import HTTPConnection

# How much is read of a field. Browsers send ten elements; a field that is as long as a request may
# be would take some milliseconds.
_MAX_ELEMENTS = 50
_MAX_PARAMETERS = 10


def accepts(connection: HTTPConnection, field: bytes, *names: str) -> bool:
    """Read a field as RFC 9110 section 12.5 has it.

    Args:
        connection: The request.
        field: The name of the field, in lower case.
        names: What to look for, in lower case; nothing else stands for them.

    Returns:
        Whether the field lists one of ``names``, the first of them without a weight of 0.
    """
    for name, value in connection.scope["headers"]:
        if name == field:
            elements = value.decode("latin-1").lower().split(",", _MAX_ELEMENTS)
            for element in elements[:_MAX_ELEMENTS]:
                listed, *parameters = element.split(";", _MAX_PARAMETERS)
                if listed.strip() in names:
                    return not any(re.fullmatch(r"\s*q=0(\.0*)?\s*", it) for it in parameters)
    return False
