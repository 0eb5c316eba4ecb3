"""uvicorn's HTTP protocol, hardened for the open internet: deadlines and limits.

On its own uvicorn waits for ever for the rest of a request and for a client to read its answer. It
does not limit heads and trailers (with httptools), pipelined requests, or connections. It takes
trailer fields for header fields. And when a request asks for an upgrade, it loses the body, or even
reads it as the next request.

Here the parser gets one request at a time. What a client sends behind a complete request stays
unparsed until that request is answered.
"""

import asyncio
import json
import math
from collections.abc import Sequence
from enum import Enum, auto
from http import HTTPStatus
from typing import Any, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from port_checker.addresses import Address, parse_host
from port_checker.schemas import ErrorCode
from port_checker.server.connections import ConnectionGroup, ConnectionLimits

# Seconds for which a connection is kept between requests: longer than proxies keep theirs (60 s in
# nginx), which would answer 502 if we closed one that they are about to use.
KEEP_ALIVE = 75.0

# Bytes of a request's head. uvicorn has the same limit with its other parser, h11.
MAX_HEAD = 64 * 1024

# Fields of a head: each takes some 150 bytes of memory besides its own.
MAX_FIELDS = 256

# Bytes of a chunked request besides its head and body: chunk sizes and extensions, and the trailer.
# Enough for a body of 64 KiB in chunks of 8 bytes. The application limits the body itself, and what
# arrives of it after the answer is dropped.
MAX_FRAMING = 64 * 1024

# Unparsed bytes, of some hundred requests, above which reading pauses until some are answered.
_MAX_UNPARSED = 16 * 1024

# Bytes that the parser gets at once; the limits are checked in between.
_MAX_PIECE = 16 * 1024

# Seconds between two looks at whether a client reads its answer.
_PROGRESS_INTERVAL = 1.0

# Bytes that are copied to be written at once. What is longer may be a file that many share.
_MAX_JOINED = 64 * 1024

# Seconds after which a client may try again that was refused for want of room: by then deadlines
# have closed the connections that did nothing.
_RETRY_AFTER = 10


class Stage(Enum):
    """How far a request has arrived."""

    NOTHING = auto()
    HEAD = auto()
    BODY = auto()


class Message:
    """The request that is arriving: how far it is, and how long its parts may be.

    Args:
        stage: How far it is. The first one of a connection begins with the connection.

    Attributes:
        head: Bytes of its head so far.
        framing: Bytes of its body so far that are not content: chunk sizes, extensions, trailer.
    """

    def __init__(self, stage: Stage = Stage.NOTHING) -> None:
        self.stage = stage
        self.head = 0
        self.framing = 0
        self._content_left = 0  # bytes, where their number was announced
        self._tail = b""  # the last bytes of its head, or of its chunked body

    def piece_end(self, data: bytes, start: int) -> int:
        """Return where the next piece for the parser ends.

        A request ends at the end of a piece, never within one. Heads, and chunked bodies with their
        trailers, end with the first empty line after something else: llhttp accepts no other line
        end than CRLF.

        Args:
            data: What has arrived.
            start: Where the piece begins.
        """
        if self._content_left:
            return min(start + self._content_left, len(data))
        if self._tail:  # the empty line may have begun in the piece before
            end = (self._tail + data[start : start + 3]).find(b"\r\n\r\n")
            if end >= 0:
                return start + end + 4 - len(self._tail)
        end = data.find(b"\r\n\r\n", start, start + _MAX_PIECE)
        return end + 4 if end >= 0 else min(start + _MAX_PIECE, len(data))

    def begin_piece(self, piece: bytes) -> None:
        """Count a piece that the parser gets next."""
        if self.stage is Stage.BODY:
            self.framing += len(piece)
        else:
            self.stage = Stage.HEAD
            self.head += len(piece)

    def begin_body(self, content_length: int) -> None:
        """Go on to the body: its length, 0 where it is chunked."""
        self.stage = Stage.BODY
        self._content_left = content_length

    def add_content(self, size: int) -> None:
        """Count bytes of the last piece as content."""
        self.framing -= size
        if self._content_left:
            self._content_left -= size

    def end_piece(self, piece: bytes) -> None:
        """Remember how a piece ended in which the request did not."""
        self._tail = (self._tail + piece[-3:])[-3:]


class _Refused(Exception):
    """A request that the application does not get to see."""

    def __init__(self, status: HTTPStatus, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class _Dropped(list[tuple[bytes, bytes]]):
    """A list of header fields that keeps none of them."""

    def append(self, _: tuple[bytes, bytes]) -> None:
        """Drop a field."""


_DROPPED = _Dropped()


class BoundedProtocol(HttpToolsProtocol):
    """One connection, which answers one request at a time.

    Each request has one deadline as a whole, which only its last byte stops. While an answer is
    being made there is none. A client that stops reading its answer is disconnected after as long.
    When a new connection exceeds a limit, the connection that has waited longest for its client is
    closed; if none waits, the new one is refused.

    Args:
        limits: Shared by all connections of the process.
        arguments: uvicorn's.
    """

    def __init__(self, limits: ConnectionLimits, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._limits = limits
        self._groups: Sequence[ConnectionGroup] = ()
        # When to close the connection, if it still waits for its client then. Looking at this when
        # the timer fires costs less than a new timer for each request.
        self._expires = math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._progress_timer: asyncio.TimerHandle | None = None

        self._message = Message(Stage.HEAD)
        self._unparsed = b""  # what has arrived behind a request that is not answered yet
        self._has_paused_reading = False
        self._unread = 0  # bytes that the client has not read
        self._read_at = 0.0  # when it last read some
        self.headers = _DROPPED

    # Called by the transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Accept the connection, or refuse it."""
        # We hear at once, and not only beyond 64 KiB, that the client does not read.
        transport.set_write_buffer_limits(high=0)
        self._coalescing = WriteCoalescingTransport(transport, self.loop)
        super().connection_made(cast(asyncio.Transport, self._coalescing))
        self._groups = self._limits.groups_of(_address_of(self.client))
        for group in self._groups:
            group.add()
        if all(group.make_room() for group in self._groups):
            self._wait_for_client()
        else:
            self._refuse(_overloaded("Too many connections are open."))

    def data_received(self, data: bytes) -> None:
        """Parse a request, or keep what comes before the last one is answered."""
        if self._unparsed or self._is_answering():
            self._keep_unparsed(self._unparsed + data)
        else:
            self._parse(data)

    def eof_received(self) -> None:
        """Send what is written before the transport closes, as it does on return."""
        self._coalescing.flush()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        for timer in self._timer, self._progress_timer:
            if timer:
                timer.cancel()
        self._leave_groups()
        self._unparsed = b""
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client has not read everything: watch it."""
        super().pause_writing()
        for group in self._groups:
            group.waiting[self] = None
        self._unread = self.transport.get_write_buffer_size()
        self._read_at = self.loop.time()
        self._watch_progress()

    def resume_writing(self) -> None:
        """The client has read everything, or the connection is lost."""
        super().resume_writing()
        if self._progress_timer:
            self._progress_timer.cancel()
            self._progress_timer = None
        if self._is_answering():
            self._leave_waiting()

    # Called by the parser

    def on_headers_complete(self) -> None:
        """Hand the request to the application, or refuse it.

        Raises:
            _Refused: The application shall not see it.
        """
        self._require_bounded_head()
        if self._limits.is_stopping:
            raise _stopping()
        if self.cycle and not self.cycle.response_complete:
            # This would be a bug, since a piece ends where a request ends.
            raise _bad_request("it begins too early")
        names = [name for name, _ in self.headers]
        version = self.parser.get_http_version()
        if version not in ("1.1", "1.0"):
            raise _bad_request(f"HTTP/{version} is not supported")
        hosts = names.count(b"host")
        if hosts != 1 and (hosts or version == "1.1"):
            raise _bad_request("it needs one Host field")  # RFC 9112 section 3.2
        super().on_headers_complete()
        has_length = b"content-length" in names
        self._message.begin_body(
            int(self.headers[names.index(b"content-length")][1]) if has_length else 0
        )
        # Of a trailer (RFC 9110 section 6.5) nothing is kept.
        self.headers = _DROPPED

    def on_body(self, body: bytes) -> None:
        """Hand a part of the body to the application."""
        self._message.add_content(len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Stop the deadline, and the parsing until the request is answered."""
        if self.parser.should_upgrade():
            return  # it is complete only for the parser; see _ignore_upgrade
        # Also of a request that was answered early, for which uvicorn would not.
        self.cycle.more_body = False
        self.cycle.message_event.set()
        self._message = Message()
        self._expires = math.inf
        if not self.flow.write_paused:
            self._leave_waiting()

    # Called by the application and the server, through uvicorn

    def on_response_complete(self) -> None:
        """Go on with the next request, or with the rest of one that was answered early."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self._unparsed:
            self._parse(self._unparsed)
        else:
            self._wait_for_client()

    def drain(self) -> None:
        """Answer no more requests, but finish the one that is complete; others get an error."""
        self._limits.is_stopping = True
        if self._is_answering():
            self.cycle.keep_alive = False
        elif self._message.stage is Stage.BODY:
            self._refuse(_stopping())

    def shutdown(self) -> None:
        """Do as ``drain`` does, and close the connection if it has no complete request."""
        self.drain()
        if self._is_answering() or self.transport.is_closing():
            return
        if self._message.head:
            self._refuse(_stopping())
        else:
            self.transport.close()

    def make_way(self) -> None:
        """Close this connection, which waits for its client, in favour of another."""
        self._leave_groups()
        if self.flow.write_paused:
            self.transport.abort()
        else:
            self.transport.close()

    # Parsing

    def _parse(self, data: bytes) -> None:
        """Feed the parser up to the end of one request, and keep what comes after it."""
        position = 0
        is_answering = False
        while position < len(data) and not is_answering:
            end = self._message.piece_end(data, position)
            if not self._feed(data[position:end]):
                return
            position = end
            is_answering = self._is_answering()
        if position < len(data) or self._unparsed:
            self._keep_unparsed(data[position:])
        if not is_answering:
            self._wait_for_client()

    def _keep_unparsed(self, data: bytes) -> None:
        self._unparsed = data
        if len(data) > _MAX_UNPARSED:
            self._has_paused_reading = True
            self.transport.pause_reading()
        elif self._has_paused_reading:
            self._has_paused_reading = False
            self.transport.resume_reading()

    def _feed(self, piece: bytes) -> bool:
        """Feed the parser; return whether all is well."""
        message = self._message
        if message.stage is Stage.NOTHING:
            self._expires = math.inf
        message.begin_piece(piece)
        try:
            try:
                self.parser.feed_data(piece)
            except HttpParserUpgrade as upgrade:
                if upgrade.args[0] != len(piece):
                    raise _bad_request("its head ends too early") from None  # a bug, as above
                self._ignore_upgrade()
            if message is self._message:  # it has not ended
                message.end_piece(piece)
                if message.stage is Stage.HEAD:
                    self._require_bounded_head()
                elif message.framing > MAX_FRAMING:
                    raise _too_large(f"The body has over {MAX_FRAMING} bytes of chunk framing.")
        except _Refused as refused:
            self._refuse(refused)
            return False
        except HttpParserError as error:
            reason = error.__context__  # of an error in one of our callbacks
            if not isinstance(reason, _Refused):
                is_http2 = self.parser.get_method() == b"PRI"
                reason = _bad_request("HTTP/2 is not supported" if is_http2 else str(error))
            self._refuse(reason)
            return False
        return True

    def _require_bounded_head(self) -> None:
        if self._message.head > MAX_HEAD:
            raise _too_large(f"The head is over {MAX_HEAD} bytes.")
        if len(self.headers) > MAX_FIELDS:
            raise _too_large(f"The head has over {MAX_FIELDS} fields.")

    def _ignore_upgrade(self) -> None:
        """Parse the rest of a request as if it had no Upgrade field (RFC 9110 section 7.8).

        Behind a head with such a field, the parser expects another protocol. So a new parser gets
        the rest, behind a head with only the fields that say how long the body is.
        """
        framing = [
            b"%b: %b\r\n" % field
            for field in self.scope["headers"]
            if field[0] in (b"content-length", b"transfer-encoding")
        ]
        self.parser = HttpRequestParser(_BodyCallbacks(self))
        self.parser.feed_data(b"".join([b"POST / HTTP/1.1\r\n", *framing, b"\r\n"]))

    def _refuse(self, refused: _Refused) -> None:
        """Answer without the application, and close."""
        self._limits.metrics.count("errors", refused.code)
        self._limits.log_refusal(_address_of(self.client), refused.code)
        status = refused.status
        error = {"detail": {"code": refused.code, "message": str(refused)}}
        body = json.dumps(error, separators=(",", ":"))
        head = [
            f"HTTP/1.1 {status} {status.phrase}",
            "content-type: application/json",
            "cache-control: no-store",
            f"content-length: {len(body)}",
            "connection: close",
        ]
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            head.append(f"retry-after: {_RETRY_AFTER}")
        # A request that was answered early gets no second answer, which would be the next one's.
        if self._message.stage is not Stage.BODY or not self.cycle.response_started:
            self.transport.write("\r\n".join([*head, "", body]).encode())
        self.transport.close()

    # Waiting

    def _is_answering(self) -> bool:
        """Whether a complete request is being answered."""
        cycle = self.cycle
        return cycle is not None and not cycle.response_complete and not cycle.more_body

    def _wait_for_client(self) -> None:
        """Limit the time until the rest of a request, or the next one, is here."""
        for group in self._groups:
            group.waiting[self] = None
        if self._expires == math.inf:
            has_begun = self._message.stage is not Stage.NOTHING
            seconds = self._limits.deadline if has_begun else KEEP_ALIVE
            self._expires = self.loop.time() + seconds
            if self._timer and self._timer.when() > self._expires:
                self._timer.cancel()
                self._timer = None
            if not self._timer:
                self._timer = self.loop.call_later(seconds, self._close_if_expired)

    def _close_if_expired(self) -> None:
        self._timer = None
        if self._expires == math.inf:
            return
        left = self._expires - self.loop.time()
        if left > 0:
            self._timer = self.loop.call_later(left, self._close_if_expired)
        else:
            if self._message.stage is not Stage.NOTHING and not self.transport.is_closing():
                self._limits.metrics.count("receive_deadlines")
            self.transport.close()

    def _leave_groups(self) -> None:
        for group in self._groups:
            group.remove(self)
        self._groups = ()

    def _leave_waiting(self) -> None:
        for group in self._groups:
            group.waiting.pop(self, None)

    def _watch_progress(self) -> None:
        """Disconnect a client that has read nothing for too long."""
        now = self.loop.time()
        unread = self.transport.get_write_buffer_size()
        if unread < self._unread:
            self._unread, self._read_at = unread, now
        left = self._read_at + self._limits.deadline - now
        if left > 0:
            self._progress_timer = self.loop.call_later(
                min(left, _PROGRESS_INTERVAL), self._watch_progress
            )
        else:
            self.transport.abort()


def _overloaded(message: str) -> _Refused:
    return _Refused(HTTPStatus.SERVICE_UNAVAILABLE, ErrorCode.OVERLOADED, message)


def _stopping() -> _Refused:
    return _overloaded("The service is stopping.")


def _address_of(client: tuple[str, int] | None) -> Address | None:
    return parse_host(client[0]) if client else None


def _too_large(message: str) -> _Refused:
    return _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, ErrorCode.REQUEST_TOO_LARGE, message)


def _bad_request(reason: str) -> _Refused:
    message = f"This is not a valid HTTP/1.1 request: {reason}."
    return _Refused(HTTPStatus.BAD_REQUEST, ErrorCode.INVALID_REQUEST, message)


class _BodyCallbacks:
    """What a parser calls that shall see nothing but the body of a request."""

    def __init__(self, connection: BoundedProtocol) -> None:
        self._connection = connection
        self.on_body = connection.on_body

    def on_message_complete(self) -> None:
        """Complete the request, and leave the next one to a parser that sees all of it."""
        self._connection.on_message_complete()
        self._connection.parser = HttpRequestParser(self._connection)


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
        written, self._written = self._written, []
        if not written or self.is_closing():
            return
        if sum(map(len, written)) <= _MAX_JOINED:
            self._transport.write(b"".join(written))
        else:
            self._transport.writelines(written)
