"""Static files, served from memory."""

import functools
import hashlib
import mimetypes
from collections.abc import Mapping
from pathlib import Path

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send


class StaticFiles:
    """An ASGI application that serves the files of a directory.

    All clients share one copy. So one that does not read its answer takes no memory, descriptor or
    thread for it, as it would with Starlette's class of this name (measured: 80 KiB each).

    Args:
        directory: It is read once, without its subdirectories.
    """

    def __init__(self, directory: Path) -> None:
        self._responses = _responses(directory)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request.

        Raises:
            HTTPException: The method is neither GET nor HEAD, or there is no such file.
        """
        if scope["method"] not in ("GET", "HEAD"):
            raise HTTPException(405, headers={"Allow": "GET, HEAD"})
        response = self._responses.get(scope["path"].removeprefix(scope["root_path"] + "/"))
        if response is None:
            raise HTTPException(404)
        tag = response.headers["etag"]
        if Headers(scope=scope).get("if-none-match") == tag:
            response = Response(status_code=304, headers={"etag": tag})
        await response(scope, receive, send)


@functools.cache
def _responses(directory: Path) -> Mapping[str, Response]:
    """Return the response for each file, by name; sending one does not change it."""
    responses = {}
    for path in directory.iterdir():
        if path.is_file():
            content = path.read_bytes()
            tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            media_type = mimetypes.guess_type(path.name)[0]
            responses[path.name] = Response(content, media_type=media_type, headers={"etag": tag})
    return responses
