"""Who has how many of a process's connections, how much room, and how much of the event loop."""

import asyncio
import math
from collections import deque
from collections.abc import Callable, Sequence

from port_checker.addresses import Address, Network, lies_in, site, subscriber
from port_checker.errors import ErrorCode, Limit
from port_checker.linux import return_free_memory
from port_checker.metrics import Metrics

# Seconds for a request to arrive, head and body together: the first from accept, a later one from
# its first byte. A client that stops reading its answer has as long.
DEADLINE = 10.0

# An IPv4 address, or an IPv6 /64, has a share of all connections: one in so many, at most so many.
_SHARE = 10
_MAX_SHARE = 256

# Bytes of requests that have not arrived in full, or wait for their turn: of such an address, and
# of all. The longest request has 80 KiB.
_MAX_HELD = 2 * 1024 * 1024
_MAX_HELD_BY_ALL = 64 * 1024 * 1024

# Bytes of an idle connection (measured), and how many must be free for it to be worth the
# milliseconds that it takes to return them.
_CONNECTION = 7 * 1024
_WORTH_RETURNING = 4 * 1024 * 1024

# An IPv6 /48, which one site may have, counts as so many addresses (RFC 6177).
_SITE = 2

# Bytes of requests that are read in one turn of the event loop: for all addresses together (and so
# for trusted proxies, since many callers are behind them), and for one.
_PER_TURN = 24 * 1024
_PER_TURN_OF_ADDRESS = 8 * 1024

# Of these, what is kept for addresses that come up within the turn, and had nothing to do before.
_KEPT = 8 * 1024

# A request costs time besides its bytes, as much as so many: a new connection does, too.
MIN_COST = 1024

# Takes the caller's address, None if it is unknown, the code of the refusal, and the limit that was
# reached, None if it was no limit.
LogRefusal = Callable[[Address | None, ErrorCode, Limit | None], object]


class Turns:
    """Shares out the turns of an event loop: a bounded amount of work in each, for all addresses.

    The first request of an address that had none goes first, and those that have more than they
    may do in one turn take turns. So a newcomer waits for nobody's pile, however many have one (as
    flows of packets do with FQ-CoDel: RFC 8290 section 4.2).

    Args:
        per_turn: The amount.
        kept: What those who take turns leave of it to newcomers.
    """

    def __init__(self, per_turn: int, kept: int = 0) -> None:
        self.left = per_turn
        self.number = 0
        self._per_turn = per_turn
        self._kept = kept
        self._time = 0.0
        self._new: deque[WorkQueue] = deque()
        self._old: deque[WorkQueue] = deque()
        self._is_scheduled = False

    def look(self, now: float) -> None:
        """See whether another turn has begun by now, unless queues wait for that."""
        if now != self._time and not self._is_scheduled:  # uvloop's clock stands still in a turn
            self._time = now
            self._begin()

    def add(self, queue: "WorkQueue", loop: asyncio.AbstractEventLoop, *, is_new: bool) -> None:
        """Have a queue served in later turns."""
        (self._new if is_new else self._old).append(queue)
        if not self._is_scheduled:
            self._is_scheduled = True
            loop.call_soon(self._serve, loop)

    def _begin(self) -> None:
        self.number += 1
        self.left = self._per_turn

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        self._begin()
        served: list[WorkQueue] = []
        try:
            while (self._new or self._old) and self.left > self._kept:
                # Half of the time is for those who take turns, however many newcomers there are.
                if self._new and (not self._old or self.left > self._per_turn // 2):
                    served.append(self._new.popleft())
                    served[-1].serve(MIN_COST)
                else:
                    served.append(self._old.popleft())
                    served[-1].serve()
        finally:
            self._old.extend(queue for queue in served if queue.is_waiting)
            self._is_scheduled = bool(self._new or self._old)
            if self._is_scheduled:
                loop.call_soon(self._serve, loop)


class WorkQueue:
    """What one address wants done: a bounded amount in each turn of the event loop, in order.

    Args:
        turns: Shared by all addresses.
        per_turn: The amount.
    """

    def __init__(self, turns: Turns, per_turn: int) -> None:
        self._turns = turns
        self._per_turn = per_turn
        self._left: float = per_turn
        self._turn = -1  # the last one in which something was done
        self._deferred: deque[Callable[[], object]] = deque()
        self._is_being_served = False

    def may_start(
        self, cost: int, loop: asyncio.AbstractEventLoop, resume: Callable[[], object]
    ) -> bool:
        """Return whether there is time for some work in this turn.

        Args:
            cost: How much work it is.
            loop: The event loop.
            resume: If there is none, it is called in a later turn, to ask again.
        """
        turns = self._turns
        if not self._is_being_served:
            turns.look(loop.time())
        is_new = self._turn != turns.number
        if is_new and not self._deferred:
            self._left = self._per_turn
        may_start = self._left > 0 and turns.left > 0
        if may_start and (self._is_being_served or not self._deferred):
            self._turn = turns.number
            self._left -= cost
            turns.left -= cost
            return True
        if not (self._deferred or self._is_being_served):
            turns.add(self, loop, is_new=is_new)
        self._deferred.append(resume)
        return False

    @property
    def is_waiting(self) -> bool:
        """Whether something is left to do."""
        return bool(self._deferred)

    def serve(self, most: float = math.inf) -> None:
        """Do what there is time for in this turn, and no more than ``most``."""
        self._left = min(self._per_turn, most)
        self._is_being_served = True
        try:
            while self._deferred and self._left > 0 and self._turns.left > 0:
                self._deferred.popleft()()
        finally:
            self._is_being_served = False


class ConnectionGroup:
    """Connections with common limits.

    Args:
        limit: How many there may be.
        max_held: Bytes that they may hold of requests that are not complete or not begun.
        work: What they want done, if it is bounded for this group.
        when_empty: Called when the last one has left.

    Attributes:
        waiting: Those that wait for their client, the longest first, and since when: for a request
            or the rest of one, or for the client to read its answer.
        size: How many there are.
        held: Bytes that they hold.
    """

    def __init__(
        self,
        limit: int,
        max_held: int,
        work: WorkQueue,
        when_empty: Callable[[], object] = lambda: None,
    ) -> None:
        self.waiting: dict[Place, float] = {}
        self.size = 0
        self.held = 0
        self.limit = limit
        self.work = work
        self._max_held = max_held
        self._when_empty = when_empty

    def make_room(self) -> bool:
        """Return whether the limits are kept, if need be by closing connections that wait."""
        while self.waiting and not self._is_within_limits():
            next(iter(self.waiting)).make_way()
        return self._is_within_limits()

    def make_room_of_idle(self, before: float) -> bool:
        """Return whether one more may come, if need be in place of one that waits since then."""
        if self.size >= self.limit and self.waiting:
            place, since = next(iter(self.waiting.items()))
            if since < before:
                place.make_way()
        return self.size < self.limit

    def remove(self) -> None:
        """Forget one that has left."""
        self.size -= 1
        if not self.size:
            self._when_empty()

    def _is_within_limits(self) -> bool:
        return self.size <= self.limit and self.held <= self._max_held


class Place:
    """What one connection takes up. A new one waits for its client.

    Args:
        address: Of its client, if that has one.
        groups: Those that it belongs to.
        close: Closes the connection, and returns whether its client loses a request by that.
        limits: Told when it makes way.
        now: The event loop's time.

    Attributes:
        address: The same.
        close: The same; whoever takes the connection over replaces it.
        work: What its address wants done.
        is_taken: Whether it has been neither refused nor given up.
        held: Bytes that the connection holds.
    """

    def __init__(
        self,
        address: Address | None,
        groups: Sequence[ConnectionGroup],
        close: Callable[[], bool],
        limits: "ConnectionLimits",
        now: float,
    ) -> None:
        self.address = address
        self.close = close
        self.work = groups[-1].work
        self.is_taken = True
        self._groups = groups
        self._limits = limits
        self.held = 0
        for group in groups:
            group.size += 1
        self.is_taken = all(group.make_room() for group in groups)
        if self.is_taken:
            self.wait(now)

    def wait(self, now: float) -> None:
        """Note that the connection waits for its client from now on, unless it does already."""
        for group in self._groups:
            group.waiting.setdefault(self, now)

    def stop_waiting(self) -> None:
        """Note that it does not."""
        for group in self._groups:
            group.waiting.pop(self, None)

    def hold(self, size: int) -> bool:
        """Note how many bytes it holds; return whether that is within the limits."""
        growth, self.held = size - self.held, size
        for group in self._groups:
            group.held += growth
        return growth <= 0 or all(group.make_room() for group in self._groups)

    def make_way(self) -> None:
        """Close the connection in favour of another."""
        self.leave()
        self._limits.metrics.count("connections_closed", "made_way")
        if self.close():
            self._limits.record_refusal(self.address, ErrorCode.OVERLOADED, Limit.CONNECTIONS)

    def leave(self) -> None:
        """Give the place up."""
        self.is_taken = False
        self.stop_waiting()
        self.hold(0)
        for group in self._groups:
            group.remove()
        self._groups = ()


class ConnectionLimits:
    """What the connections of a process share: how many there may be, and for how long.

    Args:
        max_connections: Open connections, in one process.
        deadline: Seconds for a request to arrive, and for a client that does not read its answer.
        trusted_proxies: Addresses without a limit of their own. All others have one: an IPv4
            address or an IPv6 /64 a tenth of the connections and 256, an IPv6 /48 twice that.
        metrics: Where closed connections and missed deadlines are counted; None if nowhere.
        log_refusal: Logs what the application does not get to see: who was refused, and why.

    Attributes:
        is_stopping: Whether new requests are refused because the service is stopping.
        has_stopped: Whether new connections are, too: nobody waits for what they may ask.
        is_leaving: Whether each connection is closed after one more answer, since another process
            has taken over.
    """

    def __init__(
        self,
        max_connections: int,
        deadline: float = DEADLINE,
        trusted_proxies: Sequence[Network] = (),
        metrics: Metrics | None = None,
        log_refusal: LogRefusal = lambda *_: None,
    ) -> None:
        self.deadline = deadline
        self.metrics = metrics or Metrics()
        self.is_stopping = False
        self.has_stopped = False
        self.is_leaving = False
        self._log_refusal = log_refusal
        self._trusted_proxies = trusted_proxies
        self._turns = Turns(_PER_TURN, _KEPT)
        self._all = ConnectionGroup(
            max_connections, _MAX_HELD_BY_ALL, WorkQueue(self._turns, _PER_TURN)
        )
        self._share = max(1, min(max_connections // _SHARE, _MAX_SHARE))
        self._groups: dict[str, ConnectionGroup] = {}
        self._used = 0  # bytes, when it was most since memory was returned

    def admit(self, address: Address | None, now: float, close: Callable[[], bool]) -> Place | None:
        """Return the place of a new connection, or None if it shall be closed at once.

        An address that has all of its share gets no more, unless one of its connections is idle,
        which makes way. When all connections are too many, the one that has waited for its client
        for the longest makes way.

        Args:
            address: Of its other end, if that has one.
            now: The event loop's time.
            close: Closes the connection, and returns whether its client loses a request by that.
        """
        if address is None or lies_in(address, self._trusted_proxies):
            return Place(address, (self._all,), close, self, now)
        shares = [(subscriber(address), 1)]
        if network := site(address):
            shares.append((network, _SITE))
        # One that waits for longer than this owes nothing: it is kept for the next request.
        idle_since = now - self.deadline
        for key, size in shares:
            group = self._groups.get(key)
            if group and not group.make_room_of_idle(idle_since):
                self.metrics.count("connections_closed", "over_share")
                limit = Limit.CALLER_CONNECTIONS if size == 1 else Limit.NETWORK_CONNECTIONS
                self.record_refusal(address, ErrorCode.OVERLOADED, limit)
                return None
        groups = (self._all, *(self._group(*share) for share in shares))
        return Place(address, groups, close, self, now)

    def record_refusal(
        self, address: Address | None, code: ErrorCode, limit: Limit | None = None
    ) -> None:
        """Count and log a refusal that the application does not get to see."""
        if limit:
            self.metrics.count("refusals", limit)
        self._log_refusal(address, code, limit)

    @property
    def size(self) -> int:
        """How many connections there are."""
        return self._all.size

    def return_memory(self) -> None:
        """Give back to the kernel what connections have used that are gone; call it every second.

        glibc keeps what lies below something that is still in use.
        """
        used = self._all.held + self._all.size * _CONNECTION
        if used < self._used - _WORTH_RETURNING:
            return_free_memory()
        elif used < self._used:
            return
        self._used = used

    def _group(self, key: str, shares: int) -> ConnectionGroup:
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = ConnectionGroup(
                shares * self._share,
                shares * _MAX_HELD,
                WorkQueue(self._turns, shares * _PER_TURN_OF_ADDRESS),
                when_empty=lambda: self._groups.pop(key, None),
            )
        return group
