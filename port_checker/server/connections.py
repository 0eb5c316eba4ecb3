"""Who has how many of a process's connections, and which one makes way for another."""

from collections.abc import Callable, Sequence
from typing import Protocol

from port_checker.addresses import Address, Network, lies_in, subscriber
from port_checker.metrics import Metrics
from port_checker.schemas import ErrorCode

# Seconds for a request to arrive, head and body together: the first from accept, a later one from
# its first byte. A client that stops reading its answer has as long.
DEADLINE = 10.0

# An IPv4 address, or an IPv6 /64, may have one in so many of all connections.
_SHARE = 10

# Takes the caller's address, None if it is unknown, and the code of the refusal.
LogRefusal = Callable[[Address | None, ErrorCode], object]


class Connection(Protocol):
    """A connection that can be closed in favour of another."""

    def make_way(self) -> None:
        """Close the connection, and leave its groups."""


class ConnectionGroup:
    """Connections with a common limit.

    Args:
        limit: How many there may be.
        when_empty: Called when the last one has left.

    Attributes:
        waiting: Those that wait for their client, the longest first: for a request or the rest of
            one, or for the client to read its answer.
    """

    def __init__(self, limit: int, when_empty: Callable[[], object] = lambda: None) -> None:
        self.waiting: dict[Connection, None] = {}
        self._limit = limit
        self._size = 0
        self._when_empty = when_empty

    def add(self) -> None:
        """Count a new connection."""
        self._size += 1

    def make_room(self) -> bool:
        """Return whether the limit is kept, if need be by closing a connection that waits."""
        if self._size > self._limit and self.waiting:
            next(iter(self.waiting)).make_way()
        return self._size <= self._limit

    def remove(self, connection: Connection) -> None:
        """Forget a connection."""
        self.waiting.pop(connection, None)
        self._size -= 1
        if not self._size:
            self._when_empty()


class ConnectionLimits:
    """What the connections of a process share: how many there may be, and for how long.

    Args:
        max_connections: Open connections, in one process.
        deadline: Seconds for a request to arrive, and for a client that does not read its answer.
        trusted_proxies: Addresses without a limit of their own. All others have one: a tenth of the
            connections, for an IPv4 address or an IPv6 /64.
        metrics: Where refusals and missed deadlines are counted; None if nowhere.
        log_refusal: Logs what the application does not get to see: who was refused, and why.

    Attributes:
        is_stopping: Whether new requests are refused because the service is stopping.
    """

    def __init__(
        self,
        max_connections: int,
        deadline: float = DEADLINE,
        trusted_proxies: Sequence[Network] = (),
        metrics: Metrics | None = None,
        log_refusal: LogRefusal = lambda _caller, _code: None,
    ) -> None:
        self.deadline = deadline
        self.metrics = metrics or Metrics()
        self.is_stopping = False
        self.log_refusal = log_refusal
        self._trusted_proxies = trusted_proxies
        self._all = ConnectionGroup(max_connections)
        self._max_per_subscriber = max(1, max_connections // _SHARE)
        self._by_subscriber: dict[str, ConnectionGroup] = {}

    def groups_of(self, address: Address | None) -> list[ConnectionGroup]:
        """Return the groups of connections that one from this address belongs to.

        Args:
            address: Of its other end, if that has one.
        """
        if address is None or lies_in(address, self._trusted_proxies):
            return [self._all]
        key = subscriber(address)
        if key not in self._by_subscriber:
            self._by_subscriber[key] = ConnectionGroup(
                self._max_per_subscriber, when_empty=lambda: self._by_subscriber.pop(key)
            )
        return [self._by_subscriber[key], self._all]
