"""Temporary listeners that record incoming connections."""

import asyncio
import contextlib
import errno
import socket
from collections.abc import Iterable
from typing import Self

from port_checker.provider.report import LocalBinding


class Listeners:
    """Temporary listeners on all addresses of this machine.

    A context manager that needs a running event loop and always closes them.

    Attributes:
        local: Whether a listener could be opened, by port.
        seen: The ports on which a connection arrived.
    """

    def __init__(self, ports: Iterable[int], ip_version: int) -> None:
        self.local: dict[int, LocalBinding] = {}
        self.seen: set[int] = set()
        self._ports = list(ports)
        self._ipv6 = ip_version == 6
        self._listeners: dict[int, socket.socket] = {}
        self._arrival = asyncio.Event()

    def __enter__(self) -> Self:
        try:
            for port in self._ports:
                self._open(port)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        loop = asyncio.get_running_loop()
        for listener in self._listeners.values():
            loop.remove_reader(listener)
            listener.close()
        self._listeners.clear()

    async def wait_until_seen(self, ports: Iterable[int], timeout: float) -> None:
        """Wait until connections to all of ``ports`` were seen, or ``timeout`` seconds."""
        missing = set(ports)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while missing - self.seen:
                    self._arrival.clear()
                    await self._arrival.wait()

    def _open(self, port: int) -> None:
        try:
            listener = self._listen(port)
        except OSError as error:
            self.local[port] = _BINDINGS.get(error.errno or 0, "failed")
        else:
            self.local[port] = "bound"
            self._listeners[port] = listener
            asyncio.get_running_loop().add_reader(listener, self._on_connection, port)

    def _listen(self, port: int) -> socket.socket:
        listener = socket.socket(socket.AF_INET6 if self._ipv6 else socket.AF_INET)
        try:
            # Connections of an earlier run may still be in TIME_WAIT.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if self._ipv6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(("::" if self._ipv6 else "0.0.0.0", port))  # noqa: S104  # all addresses, as documented
            listener.listen()
            listener.setblocking(False)
        except OSError:
            listener.close()
            raise
        return listener

    def _on_connection(self, port: int) -> None:
        self.seen.add(port)
        self._arrival.set()
        # It may have been reset since, or no descriptor is left; it arrived all the same.
        with contextlib.suppress(OSError):
            self._listeners[port].accept()[0].close()


_BINDINGS: dict[int, LocalBinding] = {
    errno.EADDRINUSE: "in use",
    errno.EACCES: "not permitted",
    errno.EPERM: "not permitted",
}
