"""TLS with another place, for whose certificates the event loop does not wait.

A peer decides how long OpenSSL takes to read its certificates: minutes, if it wants (see
``handshake_process``). Event loops shake hands in their own turn, which would take as long. Here
threads do it, one at a time for each place: a place can keep one processor busy, and nobody waiting
but those who ask it.
"""

import asyncio
import contextlib
import ssl
from collections.abc import Callable
from typing import Final, cast

from port_checker.linux import start_thread

# Bytes that a place may send before the handshake is done: a chain has at most 100 KiB.
_MOST_RECEIVED: Final = 128 * 1024

_PIECE: Final = 16 * 1024  # bytes that are decrypted at once: a record


class HandshakeSteps:
    """Takes the steps of a place's handshakes in threads, one after the other."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()

    async def take(self, step: Callable[[], object]) -> Exception | None:
        """Take a step once all before it are over; return what it raised.

        Whoever gives up leaves it running, and those after it wait.

        Raises:
            OSError: No thread can be started.
        """
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[Exception | None] = loop.create_future()
        ended.add_done_callback(lambda _: self._turn.release())

        def run() -> None:
            result = None
            try:
                step()
            except Exception as error:
                result = error.with_traceback(None)  # which would lead back here
            with contextlib.suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(ended.set_result, result)

        await self._turn.acquire()
        try:
            start_thread(run, "TLS with a place")
        except OSError:
            ended.cancel()
            raise
        return await asyncio.shield(ended)


class PlaceTls(asyncio.Protocol):
    """A connection with TLS; once hands are shaken, it is the transport of ``protocol``.

    Args:
        context: How to verify the place's certificate; it must forbid renegotiation.
        host: What the certificate must be good for.
        protocol: Gets what the place sends.
        steps: Shared by all connections to the place.
    """

    def __init__(
        self,
        context: ssl.SSLContext,
        host: str,
        protocol: asyncio.Protocol,
        steps: HandshakeSteps,
    ) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        self._protocol = protocol
        self._steps = steps
        self._received = bytearray()  # and not decrypted
        self._received_size = 0
        self._has_arrived = asyncio.Event()  # something, or the end
        self._is_ready = False
        self._end: Exception | None = None

    async def shake_hands(self) -> None:
        """Shake hands; the connection must have been made. It is closed if that fails.

        Raises:
            OSError: The handshake has failed (``ssl.SSLError``), or the connection has ended.
        """
        try:
            await self._take_steps()
        except BaseException:
            self.abort()
            raise
        self._is_ready = True
        self._protocol.connection_made(cast(asyncio.Transport, self))
        self._read()

    async def _take_steps(self) -> None:
        while (error := await self._steps.take(self._tls.do_handshake)) is not None:
            self._flush()
            if not isinstance(error, ssl.SSLWantReadError):
                raise error
            await self._has_arrived.wait()
            if self._end:
                raise self._end
            self._take_received()
        self._flush()
        if self._end:  # during the last step
            raise self._end

    # Called by the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Keep what arrives for the next step of the handshake, or decrypt it."""
        self._received += data
        self._received_size += len(data)
        if self._is_ready:
            self._read()
        elif self._received_size > _MOST_RECEIVED:
            self._lose(OSError("its handshake is too long"))
        else:
            self._has_arrived.set()

    def connection_lost(self, error: Exception | None) -> None:
        """End the handshake, or pass it on."""
        self._lose(error)

    # Called by the protocol, as its transport

    def write(self, data: bytes) -> None:
        """Send data.

        Raises:
            OSError: It cannot be encrypted.
        """
        while data:
            data = data[self._tls.write(data) :]
        self._flush()

    def is_closing(self) -> bool:
        """Whether nothing more can be written."""
        return self._transport.is_closing()

    def abort(self) -> None:
        """Close the connection at once."""
        self._transport.abort()

    def _take_received(self) -> None:
        # Not before a step is over: it reads the same buffer in another thread.
        self._incoming.write(self._received)
        self._received.clear()
        self._has_arrived.clear()

    def _read(self) -> None:
        self._take_received()
        try:
            while not self.is_closing():
                data = self._tls.read(_PIECE)
                if not data:  # the place has said that it will close
                    self._lose(None)
                else:
                    self._protocol.data_received(data)
        except ssl.SSLWantReadError:
            self._flush()
        except ssl.SSLError as error:
            self._lose(error)

    def _flush(self) -> None:
        data = self._outgoing.read()
        if data and not self.is_closing():
            self._transport.write(data)

    def _lose(self, error: Exception | None) -> None:
        if self._end:
            return
        self._end = error or ConnectionResetError("it closes the connection")
        self._transport.abort()
        self._has_arrived.set()
        if self._is_ready:
            self._protocol.connection_lost(error)
