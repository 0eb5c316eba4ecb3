"""uvicorn's HTTP protocol, hardened for the open internet: deadlines and limits.

On its own uvicorn waits for ever for the rest of a request, restarts its keep-alive timeout at each
byte, waits for ever for a client to read its answer, and limits neither the size of a head (with
httptools) nor the number of connections.
"""

import asyncio
import json
from http import HTTPStatus
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from port_checker.schemas import ErrorCode

# Seconds for a request to arrive, head and body together: the first from accept, a later one from
# its first byte. A client that stops reading its answer has as long.
DEADLINE = 10.0

# Bytes of a request's head. uvicorn has the same limit with its other parser, h11.
MAX_HEAD = 64 * 1024

# Seconds after which a client that was refused for want of room may try again: by then deadlines
# have closed the connections that did nothing.
_RETRY_AFTER = 10


class ConnectionLimits:
    """What all connections of a process share: their limits, and which of them may be closed.

    Args:
        max_connections: Open connections, in one process.
        deadline: Seconds for receiving a request, and for the client to read an answer.

    Attributes:
        awaiting_request: The connections that have no complete request, longest waiting first.
    """

    def __init__(self, max_connections: int, deadline: float = DEADLINE) -> None:
        self.max_connections = max_connections
        self.deadline = deadline
        self.awaiting_request: dict[BoundedProtocol, None] = {}


class BoundedProtocol(HttpToolsProtocol):
    """One connection, with one deadline for each request as a whole.

    Only a complete request stops the deadline; there is none while the answer is being made. A
    client that does not read its answer is disconnected after as long. When a new connection
    exceeds the limit, the connection that has waited longest for a request is closed; if none
    waits, the new one is refused.

    Args:
        limits: Shared by all connections of the process.
        arguments: uvicorn's.
    """

    def __init__(self, limits: ConnectionLimits, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._limits = limits
        self._deadline: asyncio.TimerHandle | None = None
        self._abort_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0  # of a head that is still incomplete

    # Called by the transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Accept the connection, or refuse it."""
        self._coalescing = WriteCoalescingTransport(transport, self.loop)
        super().connection_made(cast(asyncio.Transport, self._coalescing))
        if len(self.connections) > self._limits.max_connections:
            if not self._limits.awaiting_request:
                self._refuse(503, ErrorCode.OVERLOADED, "Too many connections are open.")
                return
            next(iter(self._limits.awaiting_request)).close()
        self._start_deadline()

    def data_received(self, data: bytes) -> None:
        """Feed the parser, and set a deadline for what is still missing."""
        scope, cycle = self.scope, self.cycle
        was_idle = cycle is None or not cycle.more_body
        super().data_received(data)
        if self.cycle is None or self.scope is not self.cycle.scope:
            # The head is incomplete.
            if self.scope is scope:
                self._head_bytes += len(data)
            else:  # it began in this data, perhaps behind the end of another request
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
        """Send what is written before the transport closes, as it does on return."""
        self._coalescing.flush()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_deadline()
        if self._abort_timer:
            self._abort_timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client has stopped reading its answer, or is slow: start its deadline."""
        super().pause_writing()
        self._abort_later()

    def resume_writing(self) -> None:
        """The client has read most of it."""
        super().resume_writing()
        if self._abort_timer and not self.transport.is_closing():
            self._abort_timer.cancel()
            self._abort_timer = None

    # Called by the parser

    def on_message_complete(self) -> None:
        """Note that the request is complete, which uvicorn does not if it was answered early."""
        super().on_message_complete()
        if self.cycle.more_body:
            self.cycle.more_body = False
            self._stop_deadline()

    # Called by the application, through uvicorn

    def on_response_complete(self) -> None:
        """Wait for the next request, or for the rest of one that was answered early."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._abort_later()
        elif self._is_answering():
            self._limits.awaiting_request.pop(self, None)
        elif self.cycle.more_body and not self._deadline:
            self._start_deadline()
        else:  # uvicorn's keep-alive timeout is running
            self._limits.awaiting_request[self] = None

    def timeout_keep_alive_handler(self) -> None:
        """Close the connection: no further request came."""
        self.close()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, in the API's error format."""
        self._refuse(400, ErrorCode.INVALID_REQUEST, msg)

    def close(self) -> None:
        """Close the connection once the client has read what is written, or at a deadline."""
        self._stop_deadline()
        self.transport.close()
        self._abort_later()

    def _is_answering(self) -> bool:
        """Whether a complete request is being answered."""
        cycle = self.cycle
        complete = cycle is not None and not cycle.response_complete and not cycle.more_body
        return complete or bool(self.pipeline)

    def _start_deadline(self) -> None:
        self._stop_deadline()
        self._deadline = self.loop.call_later(self._limits.deadline, self.close)
        self._limits.awaiting_request[self] = None

    def _stop_deadline(self) -> None:
        self._limits.awaiting_request.pop(self, None)
        if self._deadline:
            self._deadline.cancel()
            self._deadline = None

    def _abort_later(self) -> None:
        if not self._abort_timer:
            self._abort_timer = self.loop.call_later(self._limits.deadline, self.transport.abort)

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


class WriteCoalescingTransport:
    """A transport that sends everything written in one turn of the event loop together.

    uvicorn writes the head and the body of an answer separately, and uvloop would send each at
    once, at the price of a system call and a packet more (measured: 6 to 8 % fewer answers of
    `/health` for the same CPU time).
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._written: list[bytes] = []
        self.is_closing = transport.is_closing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send ``data`` together with what else is written in this turn."""
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
