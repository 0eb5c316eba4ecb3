"""A check's answer in newline-delimited JSON: a line for each port, as soon as it is final."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable

from fastapi import Request, Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from port_checker.api.errors import NO_STORE
from port_checker.connect import OnVerdict, Verdict
from port_checker.errors import ServiceError

NDJSON = "application/x-ndjson"

# Makes a check, calls what it is given with each verdict that is final, and returns the answer.
ReportingCheck = Callable[[OnVerdict], Awaitable[str]]

# Returns the answer to an exception.
Answer = Callable[[Request, Exception], Awaitable[Response]]

logger = logging.getLogger(__name__)


class ProgressResponse(Response):
    """Makes a check, and sends a line for each port as soon as its verdict is final.

    The last line is the usual answer, or the usual error if the check fails after the first line.
    If it fails before that, the error is raised, and answered with its own status.

    Args:
        request: The caller's.
        check: Makes the check.
        answer: Returns the answer to an exception.
    """

    def __init__(self, request: Request, check: ReportingCheck, answer: Answer) -> None:
        # Without the second field, nginx would buffer the lines.
        headers = {**NO_STORE, "X-Accel-Buffering": "no"}
        super().__init__(media_type=NDJSON, headers=headers)
        del self.headers["Content-Length"]  # nobody knows it yet
        self._request = request
        self._check = check
        self._answer = answer
        self._unsent = bytearray()
        self._has_news = asyncio.Event()
        self._has_started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Make the check, and send the lines."""
        del scope, receive  # those of the request

        async def make_check() -> str:
            return await self._check(self._add_line)

        check = asyncio.create_task(make_check())
        check.add_done_callback(lambda _: self._has_news.set())
        try:
            while await self._has_news.wait() and not check.done():
                self._has_news.clear()
                await self._send(send, more=True)
            await self._add_last_line(check)
        finally:
            if check.cancel():  # this task was cancelled
                await asyncio.wait([check])
            del check  # it has the error, whose traceback leads back here
        await self._send(send, more=False)

    def _add_line(self, port: int, verdict: Verdict) -> None:
        line = {"port": port, "accessible": verdict.accessible, "error": verdict.error}
        self._unsent += json.dumps(line, separators=(",", ":")).encode() + b"\n"
        self._has_news.set()

    async def _add_last_line(self, check: asyncio.Task[str]) -> None:
        try:
            last = check.result().encode()
        except ClientDisconnect:
            if not self._has_started:
                raise
            return  # nobody reads it
        except Exception as error:
            if not self._has_started:
                raise
            if not isinstance(error, ServiceError):
                logger.exception("A check was ended by a bug")
            last = bytes((await self._answer(self._request, error)).body)
        finally:
            del check
        self._unsent += last + b"\n"

    async def _send(self, send: Send, *, more: bool) -> None:
        if not self._has_started:
            self._has_started = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        body, self._unsent = bytes(self._unsent), bytearray()
        await send({"type": "http.response.body", "body": body, "more_body": more})
