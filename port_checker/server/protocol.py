"""uvicorn's HTTP protocol, hardened for the open internet: deadlines and limits.

On its own, uvicorn waits for ever for the rest of a request, and for a client to read its answer.
It limits neither heads and trailers (with httptools) nor pipelined requests nor connections. It
takes trailer fields for header fields. And when a request asks for an upgrade, it loses the body,
or even reads it as the next request.

Here the parser gets one request at a time, and its head in one piece. What a client sends after a
complete request stays unparsed until that request is answered.
"""

import asyncio
import fcntl
import functools
import json
import math
import re
import select
import string
import struct
import termios
from collections.abc import Callable, Sequence
from enum import Enum, auto
from http import HTTPStatus
from typing import Any, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import (
    HEADER_RE,
    HEADER_VALUE_RE,
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from port_checker.errors import ErrorCode, Limit
from port_checker.server.connections import MIN_COST, ConnectionLimits, Place

# Seconds for which an idle connection is kept open: longer than proxies and load balancers keep
# theirs (60 s in nginx, 600 s in a large cloud). They would answer 502 if we closed one that they
# are about to use.
KEEP_ALIVE = 620.0

# Bytes of a request's head, bytes of the target in it, and its fields.
MAX_HEAD = 16 * 1024
MAX_TARGET = 2 * 1024
MAX_FIELDS = 100

# Bytes of the shortest field, including its line end.
_MIN_FIELD = 4

# Bytes of a chunked body besides its content: chunk sizes and extensions, and the trailer. The
# application limits the content itself.
MAX_FRAMING = 4 * 1024

# Unparsed bytes (about a hundred requests) above which reading pauses until some are answered.
_MAX_UNPARSED = 16 * 1024

# Bytes that the parser gets at once; the limits are checked between pieces.
_MAX_PIECE = 16 * 1024

# Bytes that are read and dropped after the last request that is answered. Closing a connection
# while its client still sends would reset it, and could lose the answer (RFC 9112 section 9.6).
_MAX_DROPPED = 1024 * 1024

# Seconds between checks of whether a client reads its answer, or has left while we do not read.
_PROGRESS_INTERVAL = 1.0

# Bytes of a body that is copied to be written together with its head. A longer one may be a file
# that many answers share.
_MAX_JOINED = 64 * 1024

# Seconds after which a client that was refused for want of room may try again: by then deadlines
# have closed the connections that did nothing.
_RETRY_AFTER = 10

# How an HTTP/1 request begins, after empty lines (RFC 9112 section 2.2).
_REQUEST_LINE = re.compile(rb"[A-Z-]+ +[^ \r\n]+ +HTTP/\d\.\d\r\n")

# A target in absolute form, without userinfo (RFC 9112 section 3.2.2, RFC 9110 section 4.2.4).
_ABSOLUTE_TARGET = re.compile(rb"https?://([\w.~!$&'()*+,;=:%\[\]-]+)([/?].*)?", re.IGNORECASE)

# The characters of a host and port (RFC 3986 section 3.2).
_HOST_CHARACTERS = f"{string.ascii_letters}{string.digits}-._~!$&'()*+,;=:%[]".encode()


class Stage(Enum):
    """How far a request has arrived."""

    NOTHING = auto()
    HEAD = auto()
    BODY = auto()


class Message:
    """The request that is arriving: how much of it is here, and how long its parts may be.

    Args:
        stage: How far it has arrived. The first request of a connection begins with the connection.

    Attributes:
        content_size: Bytes of content that have arrived.
    """

    # Class attributes, so that a new request need not set them.
    content_size = 0
    _searched_size = 0  # of an incomplete head, in which no end was found
    _empty_lines_size = 0  # before the head
    _remaining_content = 0  # bytes, where their number was announced
    _framing_size = 0  # of the body so far, without its content
    _tail = b""  # the last bytes of a chunked body

    def __init__(self, stage: Stage = Stage.NOTHING) -> None:
        self.stage = stage

    def piece_end(self, data: bytes, start: int) -> int:
        """Return where the next piece for the parser ends: at ``start`` if there is none yet.

        A request ends at the end of a piece, never within one. Heads, and chunked bodies with their
        trailers, end with the first empty line after something else: llhttp accepts no other line
        end than CRLF.

        Args:
            data: What has arrived.
            start: Where the piece begins.

        Raises:
            _Refusal: A head is too large.
        """
        if self.stage is not Stage.BODY:
            return self._head_end(data, start)
        if self._remaining_content:
            return min(start + self._remaining_content, start + _MAX_PIECE, len(data))
        if self._tail:  # the empty line may have begun in the piece before
            end = (self._tail + data[start : start + 3]).find(b"\r\n\r\n")
            if end >= 0:
                return start + end + 4 - len(self._tail)
        end = data.find(b"\r\n\r\n", start, start + _MAX_PIECE)
        return end + 4 if end >= 0 else min(start + _MAX_PIECE, len(data))

    def _head_end(self, data: bytes, start: int) -> int:
        self.stage = Stage.HEAD
        searched = start + self._searched_size
        found = data.find(b"\r\n\r\n", max(start, searched - 3))
        end = found + 4 if found >= 0 else len(data)
        if end - start + self._empty_lines_size > MAX_HEAD:
            raise _too_large(f"The head is over {MAX_HEAD} bytes.")
        if found < 0:
            # It is kept until it is complete: parsed fields would take several times the memory.
            # But what cannot become a head goes to the parser, which says what is wrong.
            self._searched_size = end - start
            return start if _may_become_head(data, start, searched) else end
        self._searched_size = 0
        if end - start > MAX_FIELDS * _MIN_FIELD:
            lines = data[start:end].lstrip(b"\r\n").count(b"\r\n")
            if lines > MAX_FIELDS + 2:  # besides the request line and the empty line
                raise _too_large(f"The head has over {MAX_FIELDS} fields.")
        elif end - start == 4:
            self._empty_lines_size += 4
        return end

    def begin_body(self, content_length: int) -> None:
        """Go on to the body, whose ``content_length`` is 0 if it is chunked."""
        self.stage = Stage.BODY
        self._remaining_content = content_length

    def begin_piece(self, piece: bytes) -> None:
        """Count a piece before the parser gets it."""
        if self.stage is Stage.BODY:
            self._framing_size += len(piece)

    def add_content(self, size: int) -> None:
        """Count bytes of the piece as content."""
        self.content_size += size
        self._framing_size -= size
        if self._remaining_content:
            self._remaining_content -= size

    def end_piece(self, piece: bytes) -> None:
        """Note the end of a piece in which the request did not end.

        Raises:
            _Refusal: There is too much framing, or the piece was not a head.
        """
        if self.stage is Stage.BODY:
            self._tail = (self._tail + piece[-3:])[-3:]
            if self._framing_size > MAX_FRAMING:
                raise _too_large(f"The body has over {MAX_FRAMING} bytes of chunk framing.")
        elif piece.strip(b"\r\n"):
            raise _bad_request("its head is not one")


def _may_become_head(data: bytes, start: int, searched: int) -> bool:
    """Whether an incomplete head looks like one; up to ``searched`` it did before."""
    line_ends = data.count(b"\r\n", max(start, searched - 1))
    if data.count(b"\n", searched) != line_ends:
        return False  # llhttp accepts no other line end than CRLF
    head = data[start:].lstrip(b"\r\n")
    if b"\n" in head:
        return bool(_REQUEST_LINE.match(head))
    return not head or b"A" <= head[:1] <= b"Z"


class _Refusal(Exception):
    """A request is refused before the application sees it."""

    def __init__(
        self, status: HTTPStatus, code: ErrorCode, message: str, limit: Limit | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.limit = limit


class _NoFields(list[tuple[bytes, bytes]]):
    """A list of header fields that drops all of them."""

    def append(self, _: tuple[bytes, bytes]) -> None:
        """Drop a field."""


_NO_FIELDS = _NoFields()


class BoundedProtocol(HttpToolsProtocol):
    """One connection, which answers one request at a time.

    Each request has one deadline for all of it, which only its last byte stops. There is none while
    an answer is being made. A client that stops reading its answer is disconnected after the same
    time. A request that is answered before it is complete is the last one of its connection.

    Args:
        limits: Shared by all connections of the process.
        place: This connection's place among them.
        arguments: What uvicorn's own protocol takes.
    """

    def __init__(self, limits: ConnectionLimits, place: Place, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._limits = limits
        self._place = place
        place.close = self._make_way
        # When to close the connection, if it still waits for its client then. Checking this when a
        # timer fires costs less than a new timer for each request.
        self._expires = math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._progress_timer: asyncio.TimerHandle | None = None
        self._departure_timer: asyncio.TimerHandle | None = None

        self._has_made_way = False
        self._message = Message(Stage.HEAD)
        self._keeps_alive = False  # whether the connection is kept after this request
        self._unparsed = b""  # an incomplete head, or what follows the request being answered
        self._is_deferred = False  # until a later turn of the event loop
        self._has_paused_reading = False
        self._drops_input = False  # what else arrives is not answered
        self._dropped_size = 0
        self._unread_size = 0  # of the answer, by the client
        self._last_read = 0.0  # when the client last read some of it
        self.headers = _NO_FIELDS

    # Called by the transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Accept the connection, or refuse it."""
        # So that we hear at once, and not only beyond 64 KiB, that the client does not read.
        transport.set_write_buffer_limits(high=0)
        self._client_transport = ClientTransport(transport, self._is_receiving)
        super().connection_made(cast(asyncio.Transport, self._client_transport))
        if self._has_made_way:
            transport.abort()
        elif not self._place.is_taken:
            self._refuse(_overloaded("Too many connections are open.", Limit.CONNECTIONS))
        elif self._limits.has_stopped:
            self._refuse(_stopping())
        else:
            self._wait_for_client()

    def data_received(self, data: bytes) -> None:
        """Parse a request, or keep what arrives before the last one is answered."""
        if self._drops_input or self._client_transport.has_ended:
            self._drop(data)
            return
        self._unparsed = self._unparsed + data if self._unparsed else data
        if self._is_deferred or self._is_answering():
            self._hold()
        else:
            self._parse()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        for timer in self._timer, self._progress_timer, self._departure_timer:
            if timer:
                timer.cancel()
        self._unparsed = b""
        self._place.leave()
        super().connection_lost(exc)
        # Memory comes back at once, without the garbage collector.
        self._client_transport.is_receiving = self._place.close = _nothing

    def pause_writing(self) -> None:
        """The client has not read everything: watch it."""
        super().pause_writing()
        self._place.wait(self.loop.time())
        self._unread_size = self.transport.get_write_buffer_size()
        self._last_read = self.loop.time()
        self._watch_progress()

    def resume_writing(self) -> None:
        """The client has read everything, or the connection is lost."""
        super().resume_writing()
        if self._progress_timer:
            self._progress_timer.cancel()
            self._progress_timer = None
        if self._is_answering():
            self._place.stop_waiting()

    # Called by the parser

    def on_headers_complete(self) -> None:
        """Hand the request to the application, or refuse it.

        Raises:
            _Refusal: The application must not see it.
        """
        if self._limits.is_stopping:
            raise _stopping()
        if self.cycle and not self.cycle.response_complete:
            # That would be a bug, since a piece ends where a request ends.
            raise _bad_request("it begins too early")
        version = self.parser.get_http_version()
        if version not in ("1.1", "1.0"):
            raise _bad_request(f"HTTP/{version} is not supported")
        content_length = self._read_fields(is_http_1_1=version == "1.1")
        if not self.url.startswith(b"/"):
            self._read_target()
        if len(self.url) > MAX_TARGET:
            raise _too_large(f"The target is over {MAX_TARGET} bytes.")
        try:
            super().on_headers_complete()
        except (HttpParserError, ValueError):
            raise _bad_request("its target is not a URL") from None
        self.cycle.__class__ = _Cycle  # uvicorn can only make its own
        self._message.begin_body(content_length)
        # Only a request that is complete when it is answered keeps its connection open.
        self._keeps_alive, self.cycle.keep_alive = self.cycle.keep_alive, False
        # The fields of a trailer (RFC 9110 section 6.5) are dropped.
        self.headers = _NO_FIELDS

    def on_body(self, body: bytes) -> None:
        """Hand a part of the body to the application."""
        self._message.add_content(len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Stop the deadline, and the parsing until the request is answered."""
        if self.parser.should_upgrade():
            return  # it is complete only for the parser; see _ignore_upgrade
        cycle = self.cycle
        cycle.more_body = False
        cycle.message_event.set()
        if not cycle.response_started:
            cycle.keep_alive = self._keeps_alive and not self._limits.is_leaving
        self._message = Message()
        self._expires = math.inf
        if not self.flow.write_paused:
            self._place.stop_waiting()

    # Called by the application and the server, through uvicorn

    def on_response_complete(self) -> None:
        """Go on with the next request."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            self._wait_for_client()
            return
        # An idle connection keeps nothing of its last request.
        self.cycle = self.scope = cast(Any, None)
        self.flow.resume_reading()
        if self._unparsed:
            # Later, since the application may answer while it handles an exception, which would
            # become the context of the parser's, instead of our refusal.
            self._is_deferred = True
            self.loop.call_soon(self._resume)
        else:
            self._wait_for_client()

    def leave(self) -> None:
        """Close the connection after one more answer: the one that is being made, or the next."""
        if self._is_answering():
            self.cycle.keep_alive = False

    def drain(self) -> None:
        """Answer no more requests, but finish the one that is complete; others get an error."""
        self._limits.is_stopping = True
        if self._is_answering():
            self.cycle.keep_alive = False
        elif self._message.stage is Stage.BODY and not self.transport.is_closing():
            self._refuse(_stopping())

    def shutdown(self) -> None:
        """Do as ``drain`` does, and close the connection if it has no complete request."""
        self.drain()
        if self._is_answering():
            return
        if self._unparsed and not self.transport.is_closing():
            self._refuse(_stopping())
        else:
            self._client_transport.close_now()

    # Parsing

    def _parse(self) -> None:
        """Feed the parser up to the end of one request, if there is time for that in this turn."""
        data, position = self._unparsed, 0
        is_answering = False
        try:
            while position < len(data) and not is_answering:
                if self._message.stage is Stage.NOTHING:
                    self._expires = math.inf
                end = self._message.piece_end(data, position)
                if end == position:
                    break
                cost = max(end - position, MIN_COST)
                if not self._place.work.may_start(cost, self.loop, self._resume):
                    self._is_deferred = True
                    break
                self._feed(data[position:end])
                position = end
                is_answering = self._is_answering()
        except _Refusal as refusal:
            self._refuse(refusal)
            self._drop(data[position:])
            return
        self._unparsed = data[position:]
        if not is_answering:
            self._wait_for_client()
        if self._unparsed or self._message.content_size or self._place.held:
            self._hold()

    def _resume(self) -> None:
        self._is_deferred = False
        if not (self._drops_input or self.transport.is_closing()):
            self._parse()

    def _hold(self) -> None:
        """Hold what is incomplete or unparsed; if that is a lot, read no more for now."""
        if len(self._unparsed) > _MAX_UNPARSED:
            self._has_paused_reading = True
            self.transport.pause_reading()
            if not self._departure_timer:
                self._departure_timer = self.loop.call_later(
                    _PROGRESS_INTERVAL, self._watch_departure
                )
        elif self._has_paused_reading:
            self._has_paused_reading = False
            self.transport.resume_reading()
        held = self._message.content_size + len(self._unparsed)
        if not self._place.hold(held) and not self.transport.is_closing():
            if self._is_answering():
                self._drop_input()
            else:
                self._refuse(
                    _overloaded("Too many requests are arriving at once.", Limit.ARRIVING_BYTES)
                )

    def _feed(self, piece: bytes) -> None:
        """Feed the parser.

        Raises:
            _Refusal: The request is not valid.
        """
        message = self._message
        message.begin_piece(piece)
        try:
            self.parser.feed_data(piece)
        except HttpParserUpgrade as upgrade:
            if upgrade.args[0] != len(piece):
                raise _bad_request("its head ends too early") from None  # a bug, as above
            self._ignore_upgrade()
        except HttpParserError as error:
            if isinstance(error.__context__, _Refusal):  # in one of our callbacks
                raise error.__context__ from None  # not by a name, which it would lead back to
            is_http2 = self.parser.get_method() == b"PRI"
            raise _bad_request("HTTP/2 is not supported" if is_http2 else str(error)) from None
        if message is self._message:  # it has not ended
            message.end_piece(piece)

    def _read_fields(self, *, is_http_1_1: bool) -> int:
        """Check the fields that say how to read the request.

        Returns:
            The announced length of the body; 0 if none is announced.

        Raises:
            _Refusal: One of them is missing or not valid.
        """
        hosts, codings, content_length = [], [], 0
        for name, value in self.headers:
            if name == b"host":
                hosts.append(value)
            elif name == b"content-length":
                content_length = int(value)
            elif name == b"transfer-encoding":
                codings.append(value.lower())
        if len(hosts) != 1 and (hosts or is_http_1_1):
            raise _bad_request("it needs one Host field")  # RFC 9112 section 3.2
        if hosts and not _is_host(hosts[0]):
            raise _bad_request("its Host field is not a host")
        if codings and (codings != [b"chunked"] or not is_http_1_1):  # RFC 9112 section 6.1
            raise _bad_request("its Transfer-Encoding is not supported")
        if not is_http_1_1:
            self.expect_100_continue = False  # RFC 9110 section 10.1.1
        return content_length

    def _read_target(self) -> None:
        """Read a target that is not a path (RFC 9112 section 3.2).

        Raises:
            _Refusal: The target is not one of ours.
        """
        if self.url == b"*" and self.parser.get_method() == b"OPTIONS":
            self.url = b"/"
        elif absolute := _ABSOLUTE_TARGET.fullmatch(self.url):
            host, path = absolute.groups()
            self.url = path if path and path.startswith(b"/") else b"/" + (path or b"")
            # That host replaces the one in the Host field.
            self.headers[:] = [
                (name, host if name == b"host" else value) for name, value in self.headers
            ]
        elif self.parser.get_method() == b"CONNECT":
            raise _bad_request("this service is not a proxy")
        else:
            raise _bad_request("its target is neither a path nor a URL")

    def _ignore_upgrade(self) -> None:
        """Parse the rest of a request as if it had no Upgrade field (RFC 9110 section 7.8).

        After a head with such a field, the parser expects another protocol. So a new parser gets
        the rest, after a head with only the fields that say how long the body is.
        """
        framing = [
            b"%b: %b\r\n" % field
            for field in self.scope["headers"]
            if field[0] in (b"content-length", b"transfer-encoding")
        ]
        self.parser = HttpRequestParser(_BodyCallbacks(self))
        self.parser.feed_data(b"".join([b"POST / HTTP/1.1\r\n", *framing, b"\r\n"]))

    def _refuse(self, refusal: _Refusal) -> None:
        """Answer without the application, and close."""
        self._limits.metrics.count("errors", refusal.code)
        self._limits.record_refusal(self._place.address, refusal.code, refusal.limit)
        status = refusal.status
        error = {"detail": {"code": refusal.code, "message": str(refusal)}}
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
        # A request that was answered early gets no second answer: it would be taken for that to the
        # next request.
        is_body = self._message.stage is Stage.BODY
        if not (is_body and self.cycle.response_started):
            begin = self.scope["method"].encode() if is_body else self._unparsed.lstrip(b"\r\n")
            text = [*head, "", "" if begin.startswith(b"HEAD") else body]
            self.transport.write("\r\n".join(text).encode())
        self.transport.close()
        self._wait_for_client()

    # Input that is not answered

    def _is_receiving(self) -> bool:
        """Whether the client may be sending something that is not answered."""
        has_begun = self._message.stage is Stage.BODY or self._unparsed
        return bool(has_begun or self._drops_input) and not self._limits.is_stopping

    def _drop_input(self) -> None:
        """Answer no more than the present request, and drop what follows it."""
        self._drops_input = True
        self.cycle.keep_alive = False
        self._drop(self._unparsed)
        if self._has_paused_reading:
            self._has_paused_reading = False
            self.transport.resume_reading()

    def _drop(self, data: bytes) -> None:
        self._unparsed = b""
        self._place.hold(0)
        self._dropped_size += len(data)
        if self._dropped_size > _MAX_DROPPED:
            self.transport.abort()

    def _watch_departure(self) -> None:
        """Disconnect a client that has left while we do not read from it.

        That it has left shows only after all that it has sent before. Where this fills the kernel's
        buffer, it would never show, so the input is read and dropped.
        """
        self._departure_timer = None
        if not self._has_paused_reading or self.transport.is_closing():
            return
        descriptor = self.transport.get_extra_info("socket").fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLRDHUP)
        (buffered,) = struct.unpack("i", fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)))
        if poll.poll(0):
            self.transport.abort()
        elif buffered > _MAX_UNPARSED and self._is_answering():
            self._drop_input()
        else:
            self._departure_timer = self.loop.call_later(_PROGRESS_INTERVAL, self._watch_departure)

    # Waiting

    def _is_answering(self) -> bool:
        """Whether a complete request is being answered."""
        cycle = self.cycle
        return cycle is not None and not cycle.response_complete and not cycle.more_body

    def _wait_for_client(self) -> None:
        """Limit the time until the rest of a request, or the next one, has arrived."""
        now = self.loop.time()
        self._place.wait(now)
        if self._expires == math.inf:
            has_begun = self._message.stage is not Stage.NOTHING or self._client_transport.has_ended
            seconds = self._limits.deadline if has_begun else KEEP_ALIVE
            self._expires = now + seconds
            if self._timer and self._timer.when() > self._expires:
                self._timer.cancel()
                self._timer = None
            if not self._timer:
                self._timer = self.loop.call_later(seconds, self._close_if_expired)

    def _close_if_expired(self) -> None:
        self._timer = None
        if self._expires == math.inf:
            return
        remaining = self._expires - self.loop.time()
        if remaining > 0:
            self._timer = self.loop.call_later(remaining, self._close_if_expired)
        else:
            if self._message.stage is not Stage.NOTHING and not self.transport.is_closing():
                self._limits.metrics.count("receive_deadlines")
            self._client_transport.close_now()

    def _make_way(self) -> bool:
        """Close this connection, which waits for its client, in favour of another.

        Returns:
            Whether the client loses a request or an answer by that.
        """
        self._has_made_way = True
        if self.transport and self.flow.write_paused:
            self.transport.abort()
        elif self.transport:
            self._client_transport.close_now()
        return self._message.stage is not Stage.NOTHING or self.flow.write_paused

    def _watch_progress(self) -> None:
        """Disconnect a client that has read nothing for too long."""
        now = self.loop.time()
        unread = self.transport.get_write_buffer_size()
        if unread < self._unread_size:
            self._unread_size, self._last_read = unread, now
        remaining = self._last_read + self._limits.deadline - now
        if remaining > 0:
            self._progress_timer = self.loop.call_later(
                min(remaining, _PROGRESS_INTERVAL), self._watch_progress
            )
        else:
            self.transport.abort()


@functools.lru_cache(maxsize=256)  # a quarter of the work with a head's fields (measured)
def _is_host(value: bytes) -> bool:
    return not value.translate(None, _HOST_CHARACTERS)


def _nothing() -> bool:
    return False


def _overloaded(message: str, limit: Limit | None = None) -> _Refusal:
    return _Refusal(HTTPStatus.SERVICE_UNAVAILABLE, ErrorCode.OVERLOADED, message, limit)


def _stopping() -> _Refusal:
    return _overloaded("The service is stopping.")


def _too_large(message: str) -> _Refusal:
    return _Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, ErrorCode.REQUEST_TOO_LARGE, message)


def _bad_request(reason: str) -> _Refusal:
    message = f"This is not a valid HTTP/1.1 request: {reason}."
    return _Refusal(HTTPStatus.BAD_REQUEST, ErrorCode.INVALID_REQUEST, message)


class _BodyCallbacks:
    """The callbacks of a parser that sees only the body of a request."""

    def __init__(self, connection: BoundedProtocol) -> None:
        self._connection = connection
        self.on_body = connection.on_body

    def on_message_complete(self) -> None:
        """Complete the request, and leave the next one to a parser that sees whole requests."""
        self._connection.on_message_complete()
        self._connection.parser = HttpRequestParser(self._connection)


class _Cycle(RequestResponseCycle):
    """A request and its answer, whose head is sent together with the body.

    uvicorn checks and formats every field of each head, and sends the head on its own: that takes a
    quarter of the instructions of ``/health``, one more system call and one more packet (measured).
    """

    _start: Any = None  # the first part of the answer, held back until the next one

    async def send(self, message: Any) -> None:
        """Send a part of the answer."""
        if message["type"] == "http.response.start" and not self.response_started:
            self._start = message
            return
        start, self._start = self._start, None
        if not (start and self._send_together(start, message)):
            if start:
                await super().send(start)
            await super().send(message)

    def _send_together(self, start: Any, message: Any) -> bool:
        """Send an answer of two parts, unless only uvicorn can; return whether it was sent."""
        if self.disconnected or self.flow.write_paused or self.access_log:
            return False
        fields = (*self.default_headers, *map(tuple, start.get("headers", ())))
        head, length = _plain_head(start["status"], fields)
        body = message.get("body", b"")
        is_whole = len(body) == length and not message.get("more_body")
        if not (head and is_whole) or self.scope["method"] == "HEAD":
            return False
        head += b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n"
        self.waiting_for_100_continue = False
        self.response_started = self.response_complete = True
        if length <= _MAX_JOINED:
            self.transport.write(head + body)
        else:
            self.transport.writelines([head, body])
        self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()
        return True


@functools.lru_cache(maxsize=256)
def _plain_head(status: int, fields: Sequence[tuple[bytes, bytes]]) -> tuple[bytes, int]:
    """Return a head without its empty line, and the length of the body that follows.

    The head is empty where uvicorn has to decide: a field is not valid, the length is missing, or a
    field is about the connection.
    """
    lines = [STATUS_LINE[status]]
    lengths = []
    for name, value in fields:
        lower = name.lower()
        if HEADER_RE.search(name) or HEADER_VALUE_RE.search(value):
            return b"", 0
        if lower in (b"connection", b"transfer-encoding"):
            return b"", 0
        if lower == b"content-length":
            lengths.append(int(value))
        lines.append(b"%b: %b\r\n" % (lower, value))
    return (b"".join(lines), lengths[0]) if len(lengths) == 1 else (b"", 0)


class ClientTransport:
    """A transport that lets a client close first that may still be sending.

    If we closed first, that would reset the connection, and could lose the answer.

    Args:
        transport: The transport to the client.
        is_receiving: Whether the client may still be sending.

    Attributes:
        has_ended: Whether we have sent all, and only the client may still be sending.
    """

    def __init__(
        self, transport: asyncio.Transport, is_receiving: Callable[[], bool] = lambda: False
    ) -> None:
        self._transport = transport
        self.is_receiving = is_receiving
        self.has_ended = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Whether nothing more can be written."""
        return self.has_ended or self._transport.is_closing()

    def write(self, data: bytes) -> None:
        """Send data."""
        if not self.is_closing():
            self._transport.write(data)

    def writelines(self, parts: Sequence[bytes]) -> None:
        """Send several parts without copying them."""
        if not self.is_closing():
            self._transport.writelines(parts)

    def close(self) -> None:
        """Send what has been written, and close: now, or when the client does."""
        if not self.is_receiving():
            self.close_now()
        elif not self.is_closing():
            self.has_ended = True
            self._transport.resume_reading()  # to see the client leave
            self._transport.write_eof()

    def close_now(self) -> None:
        """Send what has been written, and close."""
        self._transport.close()
