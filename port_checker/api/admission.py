"""May this caller have this check now? And does it still wait for the result?"""

import asyncio
from types import TracebackType

from fastapi import Request
from starlette.requests import ClientDisconnect

from port_checker.addresses import Address, have_one_subscriber, site, subscriber, text_of
from port_checker.api.limits import RateLimiter
from port_checker.api.targets import KnownRoutes, TargetRules, verify_local_binding
from port_checker.checker import Checker, Reservation

# Seconds after which a check begins to watch whether its caller is still connected. Most checks of
# open ports are over by then, and are spared the cost.
_WATCH_AFTER = 0.05


class CallerLeft(ClientDisconnect):
    """The caller of a check left before its end."""


class Admission:
    """Admits checks, one after the other.

    Args:
        targets: Who may be checked.
        limiter: How many ports callers may ask for.
        checker: Whose room a check takes.
        known: What is known of this machine's routes.
    """

    def __init__(
        self, targets: TargetRules, limiter: RateLimiter, checker: Checker, known: KnownRoutes
    ) -> None:
        self._known = known
        self._targets = targets
        self._limiter = limiter
        self._checker = checker

    async def admit(
        self,
        request: Request,
        caller: Address | None,
        target: Address,
        ports: int,
        *,
        places: int = 1,
        is_tls: bool = False,
    ) -> "_WhileConnected":
        """Admit a check, or refuse it before it begins.

        Args:
            request: The caller's; its body must have been read.
            caller: Who asks; None if unknown.
            target: The address to check.
            ports: How many ports to check on it.
            places: From how many places; others' addresses take room and are paid for once each.
            is_tls: Whether there will be a TLS handshake.

        Returns:
            A context manager for the block that makes the check. Enter it at once: it
            holds the room for the ports until the block ends, and if the caller leaves, it
            cancels the block and raises ``CallerLeft``.

        Raises:
            TargetNotAllowed: The caller may not have this address checked.
            CheckFailed: This machine has no route to it.
            NoRoom: Too many ports are under check.
            RateLimited: The caller asks for too many ports, or too many are asked of the target.
        """
        await self._targets.require_allowed(caller, target)
        if not (client := request.scope.get("client")) or client[0] != text_of(target):
            # Not needed for the peer: this connection proves that there is a route.
            verify_local_binding(target, self._known.route_to)
        # The room comes before the ports are paid for, so that refusals cost nothing.
        is_own = have_one_subscriber(caller, target)
        if is_own:
            places = 1
        room = self._checker.reserve(
            ports,
            caller=caller and subscriber(caller),
            network=site(caller),
            is_own=is_own,
            is_tls=is_tls,
            places=places,
        )
        try:
            await self._limiter.pay_ports(caller, target, ports, places)
        except BaseException:
            room.__exit__()
            raise
        return _WhileConnected(request, room)


class _WhileConnected:
    """Room for a block that is cancelled when the caller disconnects: ``CallerLeft``.

    Args:
        request: The caller's.
        room: It is given back when the block ends.
    """

    def __init__(self, request: Request, room: Reservation) -> None:
        self._request = request
        self._room = room
        self._watch: asyncio.Task[None] | None = None
        self._has_left = False

    def __enter__(self) -> Reservation:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task(loop)
        assert task, "a coroutine enters it"  # noqa: S101  # for type checkers
        self._task = task
        self._cancelling = task.cancelling()
        self._timer = loop.call_later(_WATCH_AFTER, self._begin_to_watch)
        return self._room

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._timer.cancel()
        if self._watch:
            self._watch.cancel()
        # As asyncio's timeout does, which takes 4 % of a check of one port (measured): a
        # cancellation of the whole task by others, at the same time, passes.
        has_left = self._has_left and self._task.uncancel() <= self._cancelling
        # Both may end with a traceback that leads back here: only the collector of garbage, which
        # seldom looks at what is as old as a check, would free all that this request has.
        del self._watch, self._task
        self._room.__exit__()
        if has_left and kind is asyncio.CancelledError:
            raise CallerLeft from None

    def _begin_to_watch(self) -> None:
        self._watch = asyncio.create_task(self._wait_for_disconnect())

    async def _wait_for_disconnect(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._has_left = True
        self._task.cancel()
