"""May this caller have this check now? And does it still wait for the result?"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import TracebackType

from fastapi import Request
from starlette.requests import ClientDisconnect

from port_checker.addresses import Address, have_one_subscriber, site, subscriber
from port_checker.api.limits import RateLimiter
from port_checker.api.targets import TargetRules, verify_local_binding
from port_checker.checker import Checker, Reservation

# Seconds after which a check begins to watch whether its caller is still connected. Most checks of
# open ports are over by then, and are spared the cost.
_WATCH_AFTER = 0.05


class Admission:
    """Admits checks, one after the other.

    Args:
        targets: Who may be checked.
        limiter: How many ports callers may ask for.
        checker: Whose room a check takes.
    """

    def __init__(self, targets: TargetRules, limiter: RateLimiter, checker: Checker) -> None:
        self._targets = targets
        self._limiter = limiter
        self._checker = checker

    @asynccontextmanager
    async def admit(
        self,
        request: Request,
        caller: Address | None,
        target: Address,
        ports: int,
        *,
        places: int = 1,
        is_tls: bool = False,
    ) -> AsyncIterator[Reservation]:
        """Run the block, which makes a check, or refuse it before it begins.

        Args:
            request: The caller's; its body must have been read.
            caller: Who asks; None if unknown.
            target: The address to check.
            ports: How many ports to check on it.
            places: From how many places; others' addresses take room and are paid for once each.
            is_tls: Whether there will be a TLS handshake.

        Yields:
            The room for the ports, which is given back when the block ends.

        Raises:
            TargetNotAllowed: The caller may not have this address checked.
            CheckFailed: This machine has no route to it.
            NoRoom: Too many ports are under check.
            RateLimited: The caller asks for too many ports, or too many are asked of the target.
            ClientDisconnect: The caller left, and the block was cancelled.
        """
        await self._targets.require_allowed(caller, target)
        if not request.client or request.client.host != str(target):
            # Not needed for the peer: this connection proves that there is a route.
            verify_local_binding(target)
        # The room comes before the ports are paid for, so that refusals cost nothing.
        is_own = have_one_subscriber(caller, target)
        if not is_own:
            ports *= places
        with self._checker.reserve(
            ports,
            caller=caller and subscriber(caller),
            network=caller and site(caller),
            is_own=is_own,
            is_tls=is_tls,
        ) as room:
            await self._limiter.pay_ports(caller, target, ports)
            async with _WhileConnected(request):
                yield room


class _WhileConnected:
    """Cancels its block when the caller disconnects, and then raises ``ClientDisconnect``."""

    def __init__(self, request: Request) -> None:
        self._request = request
        # asyncio's timeout cancels a block on our behalf, and tells that from the cancellation of
        # the whole task by others, which it lets pass. This one expires when the caller leaves.
        self._connected = asyncio.timeout(None)
        self._watch: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        await self._connected.__aenter__()
        self._timer = asyncio.get_running_loop().call_later(_WATCH_AFTER, self._begin_to_watch)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._timer.cancel()
        if self._watch:
            self._watch.cancel()
        try:
            await self._connected.__aexit__(kind, error, traceback)
        except TimeoutError:
            raise ClientDisconnect from None

    def _begin_to_watch(self) -> None:
        self._watch = asyncio.create_task(self._wait_for_disconnect())

    async def _wait_for_disconnect(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._connected.reschedule(asyncio.get_running_loop().time())
