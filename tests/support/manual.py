"""A clock that the test advances, and connections over no network: time without waiting."""

import asyncio
import re
from collections.abc import Callable
from contextvars import Context
from typing import Any, TypeVarTuple

from uvicorn import Config
from uvicorn.server import ServerState

from port_checker.addresses import parse_host
from port_checker.server.connections import ConnectionLimits
from port_checker.server.protocol import BoundedProtocol

_Ts = TypeVarTuple("_Ts")

# Turns of the event loop that are enough for everything that is ready to happen.
_TURNS = 20_000


class ManualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock stands still until the test advances it."""

    def __init__(self) -> None:
        self._now = 0.0
        self._timers: list[asyncio.TimerHandle] = []
        self.failures: list[dict[str, Any]] = []
        super().__init__()
        self.set_exception_handler(lambda _, failure: self.failures.append(failure))

    def time(self) -> float:
        return self._now

    def call_at(
        self,
        when: float,
        callback: Callable[[*_Ts], object],
        *args: *_Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        timer = super().call_at(when, callback, *args, context=context)
        self._timers.append(timer)
        return timer

    def settle(self, turns: int = _TURNS) -> None:
        """Let happen what is ready to happen, in so many turns at most."""

        async def go_round() -> None:
            for _ in range(turns):
                await asyncio.sleep(0)
                if not self._ready:  # type: ignore[attr-defined]  # there is no public name
                    return

        self.run_until_complete(go_round())

    def advance_to(self, seconds: float) -> None:
        """Set the clock to so many seconds after the loop was made, timer by timer."""
        self.settle()
        while due := [t.when() for t in self._timers if not t.cancelled() and t.when() <= seconds]:
            self._now = max(self._now, min(due))
            self._timers = [t for t in self._timers if not t.cancelled() and t.when() > self._now]
            self.settle()
        self._now = seconds


def config_of(app: Any) -> Config:
    """How uvicorn runs an application without a network, as the service has it."""
    return Config(
        app,
        interface="asgi3",
        ws="none",
        lifespan="off",
        log_config=None,
        proxy_headers=False,
        access_log=False,
    )


class Client(asyncio.Transport):
    """A client of the server's protocol, connected by this transport without a network.

    Attributes:
        received: What it has read so far.
        reads: Whether it reads what it is sent.
        keeps_open: Whether it closes the connection no sooner than the server.
        has_eof: Whether the server has said that it sends no more.
        is_closed: Whether the server has let go of the connection.
        is_aborted: Whether that was without waiting for the client to read the rest.
        is_admitted: Whether the server has accepted the connection.
    """

    def __init__(
        self,
        loop: ManualLoop,
        limits: ConnectionLimits,
        config: Config,
        *,
        state: ServerState | None = None,
        address: str | None = "127.0.0.1",
    ) -> None:
        super().__init__()
        self.received = b""
        self.reads = True
        self.keeps_open = False
        self.has_eof = False
        self.is_closed = self.is_aborted = False
        self._loop = loop
        self._address = address
        self._is_closing = False
        self._server_reads = True
        self._unread = b""  # by the client
        self._unsent = b""  # to the server, which has paused reading
        self._high = 64 * 1024
        self._has_paused_writing = False
        place = limits.admit(parse_host(address) if address else None, loop.time(), lambda: True)
        self.is_admitted = place is not None
        if place:
            self.protocol = BoundedProtocol(
                limits,
                place,
                config=config,
                server_state=state or ServerState(),
                app_state={},
                _loop=loop,
            )
            self.protocol.connection_made(self)
        else:
            self.is_closed = self._is_closing = True

    # What the client does

    def send(self, data: bytes, turns: int = _TURNS) -> None:
        """Send a segment; let the event loop go round so many times after it."""
        self._unsent += data
        self._deliver()
        if turns:
            self._loop.settle(turns)

    def read(self) -> None:
        """Read everything, from now on."""
        self.reads = True
        self.read_some(len(self._unread))
        if self._has_paused_writing:
            self._has_paused_writing = False
            self.protocol.resume_writing()
        self._lose_if_done()
        self._loop.settle()

    def read_some(self, size: int) -> None:
        """Read so many bytes."""
        self.received += self._unread[:size]
        self._unread = self._unread[size:]

    def leave(self) -> None:
        """Close the connection."""
        self.abort()
        self._loop.settle()

    @property
    def unsent(self) -> int:
        """Bytes that the server has not read yet."""
        return len(self._unsent)

    @property
    def statuses(self) -> list[int]:
        """The statuses of the answers so far."""
        return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", self.received)]

    # What the protocol does

    def write(self, data: Any) -> None:
        if self._is_closing:
            raise RuntimeError  # as uvloop's transports do
        if self.reads:
            self.received += data
            return
        self._unread += data
        if len(self._unread) > self._high and not self._has_paused_writing:
            self._has_paused_writing = True
            self.protocol.pause_writing()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        del low
        self._high = 64 * 1024 if high is None else high

    def get_write_buffer_size(self) -> int:
        return len(self._unread)

    def pause_reading(self) -> None:
        self._server_reads = False

    def resume_reading(self) -> None:
        self._server_reads = True
        self._loop.call_soon(self._deliver)

    def write_eof(self) -> None:
        self.has_eof = True
        self._loop.call_soon(self._read_eof)

    def close(self) -> None:
        self._is_closing = True
        self._lose_if_done()

    def abort(self) -> None:
        self._is_closing = True
        self.is_aborted = bool(self._unread)
        self._unread = b""
        self._lose_if_done()

    def is_closing(self) -> bool:
        return self._is_closing

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"peername": (self._address, 1), "sockname": ("127.0.0.1", 2)}.get(name, default)

    def _read_eof(self) -> None:
        """Close the connection, as a client does that has read its last answer."""
        if not (self.keeps_open or self._is_closing):
            self.protocol.eof_received()
            self.close()

    def _deliver(self) -> None:
        if self._server_reads and self._unsent and not self._is_closing:
            data, self._unsent = self._unsent, b""
            self.protocol.data_received(data)

    def _lose_if_done(self) -> None:
        if self._is_closing and not self._unread and not self.is_closed:
            self.is_closed = True
            self._loop.call_soon(self.protocol.connection_lost, None)
