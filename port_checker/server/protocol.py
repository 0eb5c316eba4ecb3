"""uvicorn's HTTP protocol, fit for the open internet: deadlines for callers, and room for others.

uvicorn waits for ever for the rest of a request, lets each byte put off its keep-alive timeout,
waits for ever for an answer to be taken, and bounds neither heads (with httptools) nor connections.
"""

import asyncio
import json
from http import HTTPStatus
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from port_checker.schemas import ErrorCode

# Seconds for receiving a request, head and body together, from accept or from its first byte; and
# for the caller to take what is written to it.
DEADLINE = 10.0

# Bytes of a request's head: uvicorn's own bound with its other parser, h11.
MAX_HEAD = 64 * 1024

# Seconds after which a caller who found no room may try again: deadlines make room by then.
_RETRY_AFTER = 10


class Room:
    """The connections that owe us a request, oldest first, and what bounds all of them.

    Args:
        most: Open connections, in one process.
        deadline: Seconds for receiving a request, and for taking an answer.
    """

    def __init__(self, most: int, deadline: float = DEADLINE) -> None:
        self.most = most
        self.deadline = deadline
        self.owing: dict[BoundedProtocol, None] = {}


class BoundedProtocol(HttpToolsProtocol):
    """One connection, which has one deadline for each request as a whole.

    Only a complete request ends the deadline, and while its answer is being made there is none. A
    caller that does not take its answer is given as long, and then cut off. When there are more
    connections than the room holds, the one that has owed us a request for the longest makes way;
    if none does, the newcomer is told so.

    Args:
        room: Shared by all connections of the process.
        arguments: uvicorn's.
    """

    def __init__(self, room: Room, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._room = room
        self._deadline: asyncio.TimerHandle | None = None
        self._cut_off: asyncio.TimerHandle | None = None
        self._head_bytes = 0  # of the head that is here in part

    # What the transport tells

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Make room, or refuse."""
        self._joining = _Joining(transport, self.loop)
        super().connection_made(cast(asyncio.Transport, self._joining))
        if len(self.connections) > self._room.most:
            if not self._room.owing:
                self._refuse(503, ErrorCode.OVERLOADED, "Too many connections are open.")
                return
            next(iter(self._room.owing)).close()
        self._start_deadline()

    def data_received(self, data: bytes) -> None:
        """Feed the parser; see to it that there is a deadline for what is missing."""
        scope, cycle = self.scope, self.cycle
        was_idle = cycle is None or not cycle.more_body
        super().data_received(data)
        if self.cycle is None or self.scope is not self.cycle.scope:
            # A head is here in part.
            if self.scope is scope:
                self._head_bytes += len(data)
            else:  # it began in this data, which may have the end of another request, too
                self._head_bytes = len(data) if was_idle and self.cycle is cycle else 0
            if self._head_bytes > MAX_HEAD and not self.transport.is_closing():
                self._refuse(
                    413, ErrorCode.REQUEST_TOO_LARGE, f"The head is over {MAX_HEAD} bytes."
                )
        if self._is_answering():
            self._stop_deadline()
        elif not (self._deadline and self.scope is scope) and not self.transport.is_closing():
            self._start_deadline()

    def eof_received(self) -> None:
        """The caller sends no more, and the transport closes by itself: answers go before that."""
        self._joining.flush()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_deadline()
        if self._cut_off:
            self._cut_off.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The caller does not take its answer as fast as it is made: give it so long."""
        super().pause_writing()
        self._cut_off_later()

    def resume_writing(self) -> None:
        """It took most of it."""
        super().resume_writing()
        if self._cut_off and not self.transport.is_closing():
            self._cut_off.cancel()
            self._cut_off = None

    # What the parser tells

    def on_message_complete(self) -> None:
        """The request is here; uvicorn does not note that of one that was answered early."""
        super().on_message_complete()
        if self.cycle.more_body:
            self.cycle.more_body = False
            self._stop_deadline()

    # What the application tells

    def on_response_complete(self) -> None:
        """Wait for the next request, or for the rest of one that is here in part."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._cut_off_later()
        elif self._is_answering():
            self._room.owing.pop(self, None)
        elif self.cycle.more_body and not self._deadline:
            self._start_deadline()
        else:  # uvicorn's keep-alive timeout is running
            self._room.owing[self] = None

    def timeout_keep_alive_handler(self) -> None:
        """No further request came."""
        self.close()

    def send_400_response(self, msg: str) -> None:
        """Tell that what came is not HTTP, in the one shape of errors."""
        self._refuse(400, ErrorCode.INVALID_REQUEST, msg)

    def close(self) -> None:
        """Close the connection, and cut it off if the caller does not take what is written."""
        self._stop_deadline()
        self.transport.close()
        self._cut_off_later()

    def _is_answering(self) -> bool:
        """Whether a complete request awaits its answer."""
        cycle = self.cycle
        complete = cycle is not None and not cycle.response_complete and not cycle.more_body
        return complete or bool(self.pipeline)

    def _start_deadline(self) -> None:
        self._stop_deadline()
        self._deadline = self.loop.call_later(self._room.deadline, self.close)
        self._room.owing[self] = None

    def _stop_deadline(self) -> None:
        self._room.owing.pop(self, None)
        if self._deadline:
            self._deadline.cancel()
            self._deadline = None

    def _cut_off_later(self) -> None:
        if not self._cut_off:
            self._cut_off = self.loop.call_later(self._room.deadline, self.transport.abort)

    def _refuse(self, status: int, code: ErrorCode, message: str) -> None:
        """Answer without the application, and close."""
        body = json.dumps({"detail": {"code": code, "message": message}}, separators=(",", ":"))
        head = [
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            "connection: close",
        ]
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            head.append(f"retry-after: {_RETRY_AFTER}")
        self.transport.write("\r\n".join([*head, "", body]).encode())
        self.close()


class _Joining:
    """A transport that sends at once what is written in one turn of the event loop.

    uvicorn writes an answer's head and its body one after the other, and uvloop sends each as it
    comes: that is one more system call, and one more packet (measured: a tenth fewer answers of
    `/health` a second).
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._written: list[bytes] = []
        self.is_closing = transport.is_closing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send ``data`` with what else is written in this turn."""
        if not self._written:
            self._loop.call_soon(self.flush)
        self._written.append(data)

    def close(self) -> None:
        """Send what is written, and close."""
        self.flush()
        self._transport.close()

    def flush(self) -> None:
        """Send what is written."""
        data = b"".join(self._written)
        self._written.clear()
        if data and not self.is_closing():
            self._transport.write(data)
