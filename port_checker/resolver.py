"""Host names to addresses, for callers that cannot wait for a silent resolver.

``getaddrinfo()`` blocks for as long as the system's resolver likes, and nothing interrupts it.
asyncio would run one for each question, in threads that the process waits for at its end. Here each
runs in a daemon thread, and serves all who ask for the same name meanwhile.
"""

import asyncio
import contextlib
import socket

from port_checker.addresses import parse_address
from port_checker.linux import start_thread


class Resolver:
    """Looks host names up, for one event loop."""

    def __init__(self) -> None:
        self._look_ups: dict[tuple[str, int], asyncio.Future[list[str] | OSError]] = {}

    def is_looking_up(self, host: str) -> bool:
        """Whether somebody has asked for ``host``, and the resolver has not answered."""
        return any(name == host and not it.done() for (name, _), it in self._look_ups.items())

    async def resolve(self, host: str, family: int = socket.AF_UNSPEC) -> list[str]:
        """Return the addresses of ``host``, the preferred one first.

        A caller that gives up leaves the look-up running: whoever asks next gets its result.

        Args:
            host: A host name, or an IP address, which needs no look-up.
            family: ``AF_INET`` or ``AF_INET6`` for addresses of this family alone.

        Raises:
            OSError: The name has no address, or the resolver failed (``socket.gaierror``).
        """
        if address := _literal(host, family):
            return [address]
        question = host, family
        if question not in self._look_ups:
            self._look_ups[question] = self._start(host, family)
        result = await asyncio.shield(self._look_ups[question])
        self._look_ups.pop(question, None)
        if isinstance(result, OSError):
            raise result
        return result

    def _start(self, host: str, family: int) -> asyncio.Future[list[str] | OSError]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[str] | OSError] = loop.create_future()

        def set_result(result: list[str] | OSError) -> None:
            if not future.done():
                future.set_result(result)

        def look_up() -> None:
            result: list[str] | OSError
            try:
                found = socket.getaddrinfo(host, None, family, socket.SOCK_STREAM)
                result = list(dict.fromkeys(str(address[0]) for *_, address in found))
            except OSError as error:
                result = error
            except UnicodeError:  # a label that is empty or too long
                result = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            with contextlib.suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(set_result, result)

        start_thread(look_up, f"look-up of {host}")
        return future


def _literal(host: str, family: int) -> str | None:
    """Return the address that ``host`` is, if it is one of ``family``."""
    with contextlib.suppress(ValueError):
        address = parse_address(host)
        own_family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        return str(address) if family in (socket.AF_UNSPEC, own_family) else None
    return None
