"""HTTP exchanges with another place: bounded in bytes, in time, and in the event loop's turn.

A connection is kept for later requests, but what comes on it unasked is never taken for an answer,
since that would be one to another caller. No request is made twice, since the target would be
checked twice. There are no proxies, redirects, cookies or passwords, whatever the environment says.
HTTP itself is h11's.
"""

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple, cast
from urllib.parse import urlsplit

import h11

from port_checker import __version__
from port_checker.addresses import Address, parse_address, parse_host
from port_checker.api.place_tls import HandshakeSteps, PlaceTls
from port_checker.api.targets import special_purpose
from port_checker.resolver import Resolver

CONNECT_TIMEOUT: Final = 2.0  # seconds, for the look-up of the name and TLS as well
_NEXT_ADDRESS_AFTER: Final = 0.25  # seconds: RFC 8305 section 5
_MOST_ADDRESSES: Final = 8  # of a name that are tried

# Seconds that a connection is kept without a request. Proxies and servers keep theirs for longer,
# so it rarely happens that one is closed just when it is used.
_KEPT_FOR: Final = 5.0
_MOST_KEPT: Final = 100

# Bytes of an answer besides its body.
_HEAD_SIZE: Final = 16 * 1024
# Pieces that an answer may come in: so many, and one more for so many bytes. h11 takes 15 to 50 µs
# for each (measured), so that a million of them would take the event loop's turn for seconds.
_PIECES: Final = 100
_BYTES_IN_PIECE: Final = 1024


_CLOSED: Final = "it closes the connection"


class NoAnswer(Exception):
    """There was none that makes sense; the message is a sentence that says why."""


class PlaceAnswer(NamedTuple):
    """What a place answered.

    Attributes:
        status: The HTTP status.
        body: As it was sent.
    """

    status: int
    body: bytes


class PlaceClient:
    """Asks one place.

    Args:
        url: Its base URL.
        resolver: What looks its name up.
        tls: How to verify its certificate, if it has one; it must forbid renegotiation.

    Attributes:
        url: As given.
        address: Where it is; None until that is known.
    """

    def __init__(self, url: str, resolver: Resolver, tls: ssl.SSLContext) -> None:
        parts = urlsplit(url)
        self.url = url
        self.address: Address | None = None
        with contextlib.suppress(ValueError):
            self.address = parse_address(parts.hostname or "")
        self._resolver = resolver
        self._authority = parts.netloc
        self._host = parts.hostname or ""
        self._tls = tls if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._path = parts.path
        self._handshakes = HandshakeSteps()
        self._kept: dict[_Connection, asyncio.TimerHandle] = {}

    @property
    def is_nearby(self) -> bool:
        """Whether it is known to be in a network that is not the internet."""
        return bool(self.address and special_purpose(self.address))

    async def request(
        self, method: str, path: str, fields: Mapping[str, str], body: bytes, size: int
    ) -> PlaceAnswer:
        """Make a request and return its answer. If it is cancelled, the connection is closed.

        Args:
            method: ``GET`` or ``POST``.
            path: Appended to the URL's.
            fields: Header fields besides those that every request has.
            body: JSON; empty for none.
            size: Bytes of the answer's body that are read.

        Raises:
            NoAnswer: There is none, or it is longer.
        """
        fields = {
            "Host": self._authority,
            "User-Agent": f"port-checker/{__version__}",
            "Accept": "application/json",
            # Not compressed: what it takes to read an answer is bounded by its size.
            "Accept-Encoding": "identity",
            **fields,
        }
        if body:
            fields |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
        head = h11.Request(method=method, target=self._path + path, headers=[*fields.items()])
        connection = self._take_kept() or await self._connect()
        try:
            return await connection.exchange(head, body, size)
        except h11.ProtocolError:
            raise NoAnswer("It does not speak HTTP.") from None
        except OSError as error:
            raise NoAnswer(f"It cannot be reached ({_reason(error)}).") from None
        finally:
            if connection.is_free and len(self._kept) < _MOST_KEPT:
                loop = asyncio.get_running_loop()
                self._kept[connection] = loop.call_later(_KEPT_FOR, self._drop, connection)
            else:
                connection.abort()

    def close(self) -> None:
        """Close the connections that are kept."""
        for connection, timer in list(self._kept.items()):
            timer.cancel()
            self._drop(connection)

    def _take_kept(self) -> "_Connection | None":
        while self._kept:
            connection, timer = self._kept.popitem()  # the one that was used last
            timer.cancel()
            if connection.is_free:
                return connection
        return None

    def _drop(self, connection: "_Connection") -> None:
        del self._kept[connection]
        connection.abort()

    async def _connect(self) -> "_Connection":
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                addresses = await self._resolver.resolve(self._host)
                return await self._connect_to_any(addresses[:_MOST_ADDRESSES])
        except OSError as error:
            raise NoAnswer(f"It cannot be reached ({_reason(error)}).") from None

    async def _connect_to_any(self, addresses: Sequence[str]) -> "_Connection":
        """Connect to the address that answers first; each is tried some time after the last."""
        remaining = list(addresses)
        attempts: list[asyncio.Task[_Connection | str]] = []
        pending: set[asyncio.Task[_Connection | str]] = set()
        reasons: list[str] = []
        connection: _Connection | None = None
        try:
            while remaining or pending:
                if remaining:
                    attempts.append(asyncio.create_task(self._connect_to(remaining.pop(0))))
                    pending.add(attempts[-1])
                delay = _NEXT_ADDRESS_AFTER if remaining else None
                done, pending = await asyncio.wait(
                    pending, timeout=delay, return_when=asyncio.FIRST_COMPLETED
                )
                for attempt in done:
                    match attempt.result():
                        case _Connection() as connection:
                            return connection
                        case str() as reason:
                            reasons.append(reason)
            raise NoAnswer(f"It cannot be reached ({reasons[0]}).")
        finally:
            for attempt in attempts:
                attempt.cancel()
            for result in await asyncio.gather(*attempts, return_exceptions=True):
                if isinstance(result, _Connection) and result is not connection:
                    result.abort()

    async def _connect_to(self, address: str) -> "_Connection | str":
        """Return a connection, or why there is none."""
        create_connection = asyncio.get_running_loop().create_connection
        connection = _Connection()
        try:
            if self._tls:
                tls = PlaceTls(self._tls, self._host, connection, self._handshakes)
                await create_connection(lambda: tls, address, self._port)
                await tls.shake_hands()
            else:
                await create_connection(lambda: connection, address, self._port)
        except OSError as error:
            return _reason(error)
        self.address = parse_host(address)
        return connection


class _Connection(asyncio.Protocol):
    """A connection to a place, on which one exchange is made after the other."""

    def __init__(self) -> None:
        self._is_free = False
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_HEAD_SIZE)
        self._answer: asyncio.Future[PlaceAnswer] | None = None

    @property
    def is_free(self) -> bool:
        """Whether another exchange can be made."""
        return self._is_free and not self._transport.is_closing()

    async def exchange(self, request: h11.Request, body: bytes, size: int) -> PlaceAnswer:
        """Send a request, and wait for its answer.

        Raises:
            NoAnswer: It is too long.
            OSError: The connection has come to its end.
            h11.ProtocolError: What comes is not HTTP.
        """
        self._is_free = False
        if self._transport.is_closing():  # uvloop refuses to write before it tells why
            raise ConnectionResetError(_CLOSED)
        self._status = 0
        self._body = bytearray()
        self._size = size
        self._pieces = _PIECES + size // _BYTES_IN_PIECE
        self._answer = asyncio.get_running_loop().create_future()
        events = [request, *([h11.Data(data=body)] if body else []), h11.EndOfMessage()]
        self._transport.write(b"".join(self._http.send(event) or b"" for event in events))
        try:
            return await self._answer
        finally:
            self._answer = None  # an error in it would lead back here, and both stay in memory

    def abort(self) -> None:
        """Close it at once: a place sees that nobody waits for its answer any more."""
        self._is_free = False
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Read more of the answer, if one is awaited: what comes unasked would be taken for one."""
        if self._answer and not self._answer.done():
            self._read(data)
        else:
            self.abort()

    def eof_received(self) -> None:
        """End the answer."""
        self._end(None)

    def connection_lost(self, error: Exception | None) -> None:
        """End the answer."""
        self._end(error)

    def _end(self, error: Exception | None) -> None:
        self._is_free = False
        if not self._answer or self._answer.done():
            return
        with contextlib.suppress(h11.ProtocolError):
            self._http.receive_data(b"")
            # It may be that of a body without a length (RFC 9112 section 6.3).
            if not error and isinstance(self._http.next_event(), h11.EndOfMessage):
                self._finish(self._answer)
                return
        self._answer.set_exception(
            error if isinstance(error, OSError) else ConnectionResetError(_CLOSED)
        )

    def _read(self, data: bytes) -> None:
        assert self._answer, "an answer is awaited"  # noqa: S101  # for type checkers
        try:
            self._http.receive_data(data)
            while isinstance(event := self._http.next_event(), h11.Event):
                self._pieces -= 1
                if not self._pieces:
                    raise NoAnswer("Its answer comes in too many pieces.")
                match event:
                    case h11.Response():
                        self._status = event.status_code
                    case h11.Data():
                        self._body += event.data
                        if len(self._body) > self._size:
                            raise NoAnswer("Its answer is too long.")
                    case h11.EndOfMessage():
                        self._finish(self._answer)
                        return
        except (NoAnswer, h11.ProtocolError) as error:
            self._answer.set_exception(error)

    def _finish(self, answer: asyncio.Future[PlaceAnswer]) -> None:
        http = self._http
        is_over = http.our_state is http.their_state is h11.DONE
        # What follows would be taken for the next answer.
        if is_over and not http.trailing_data[0]:
            http.start_next_cycle()
            self._is_free = True
        answer.set_result(PlaceAnswer(self._status, bytes(self._body)))


def _reason(error: OSError) -> str:
    """Say what went wrong, in the system's words where it has some."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate verify failed: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS handshake failed: {error.reason}"
    if isinstance(error, socket.gaierror):
        return error.strerror or "unknown name"
    if isinstance(error, TimeoutError) and not error.errno:
        return "timed out"
    return os.strerror(error.errno) if error.errno else str(error)
