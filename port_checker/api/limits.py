"""How often callers may ask, and how many ports they may have checked."""

import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from port_checker.addresses import Address, have_one_subscriber, site, subscriber
from port_checker.api.gcra import Charge, MemoryStore
from port_checker.errors import ErrorCode, Limit, ServiceError
from port_checker.settings import IN_PROCESS, Rate

if TYPE_CHECKING:
    from port_checker.api.shared_limits import SharedStore

# Keys that the process remembers; the least recently used make way. A key takes about 200 bytes
# (measured), so this bounds all of them to about 30 MiB.
MAX_KEYS: Final = 150_000

# How all keys begin. A Redis cluster keeps keys with the same word in braces on one node, which a
# payment to several limits needs.
_PREFIX: Final = "port-checker:{limits}:"

_SITE_RATES: Final = 10  # times the rates of one caller, for an IPv6 /48


class RateLimited(ServiceError):
    """A limit was reached.

    Attributes:
        limit: Which one.
        retry_after: Whole seconds, at least 1, after which the same request would be let through.
    """

    code = ErrorCode.RATE_LIMITED
    retry_after: int

    def __init__(self, text: str, retry_after: float, limit: Limit) -> None:
        super().__init__(text)
        self.limit = limit
        self.retry_after = max(1, math.ceil(retry_after))


class RateLimiter:
    """What callers may ask, and what may be asked of a target.

    A caller is an IPv4 address or an IPv6 /64; an IPv6 /48 has ten times the rates of a caller, in
    addition. Callers whose address is not known share one limit. All limits are kept in this
    process, in constant time and bounded memory however many callers there are; while ``shared``
    is entered, they are kept where ``store`` says.

    Args:
        requests: Requests of one caller; None for no limit.
        others: Ports that one caller may ask for on addresses that are not its own.
        targets: Ports that may be asked of one target by others than itself; an IPv6 target is
            its /64.
        store: ``memory://``, or the URL of the Redis that other processes share.
        own: Ports that one caller may ask for on its own address.
        answer_timeout: Seconds that a payment waits for Redis before it is made in this process;
            None for the default.
        max_keys: How many keys the process remembers.
        clock: Returns the seconds by which limits recover in this process.
    """

    def __init__(
        self,
        requests: Rate | None = None,
        others: Rate | None = None,
        targets: Rate | None = None,
        store: str = IN_PROCESS,
        *,
        own: Rate | None = None,
        answer_timeout: float | None = None,
        max_keys: int = MAX_KEYS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._requests = _limit("requests", requests)
        self._site_requests = _limit("requests", requests, _SITE_RATES)
        self._own = _limit("own", own)
        self._site_own = _limit("own", own, _SITE_RATES)
        self._others = _limit("others", others)
        self._site_others = _limit("others", others, _SITE_RATES)
        self._targets = _limit("targets", targets)
        self._url = store
        self._answer_timeout = answer_timeout
        self._clock = clock
        self._memory = MemoryStore(max_keys)
        self._shared: SharedStore | None = None

    @property
    def store_is_available(self) -> bool:
        """Whether limits can be kept where ``store`` says."""
        return self._shared is None or self._shared.is_available

    @contextlib.asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Share the limits with other processes in the block, if the store is Redis."""
        limits = [
            limit for limit in (self._requests, self._own, self._others, self._targets) if limit
        ]
        if self._url == IN_PROCESS or not limits:
            yield
            return
        # It imports redis, which is an extra.
        from port_checker.api.shared_limits import ANSWER_TIMEOUT, SharedStore

        async with SharedStore(
            self._url,
            probe=[limit.charge("probe", 0) for limit in limits],
            answer_timeout=self._answer_timeout or ANSWER_TIMEOUT,
        ) as self._shared:
            try:
                yield
            finally:
                self._shared = None

    async def pay_request(self, caller: Address | None) -> None:
        """Count one request of ``caller``.

        Raises:
            RateLimited: It has none left, or its /48 has none.
        """
        payment = _Payment()
        payment.add(self._requests, _key(caller), 1, "You ask too often.", Limit.CALLER_REQUESTS)
        if caller and (network := site(caller)):
            payment.add(
                self._site_requests,
                network,
                1,
                f"Your network {network} asks too often.",
                Limit.NETWORK_REQUESTS,
            )
        await self._pay(payment)

    async def pay_ports(
        self, caller: Address | None, target: Address, ports: int, places: int = 1
    ) -> None:
        """Count ``ports`` that ``caller`` asks of ``target``, once for each of so many places.

        What a caller asks about itself has a limit of its own, and costs the target nothing:
        strangers must not be able to use up what an owner has left.

        Raises:
            RateLimited: The caller, its /48 or the target has fewer left; nothing was counted.
        """
        is_own = have_one_subscriber(caller, target)
        if is_own:
            limit, site_limit, whose = self._own, self._site_own, "your own address"
            name, site_name = Limit.CALLER_OWN_PORTS, Limit.NETWORK_OWN_PORTS
        else:
            limit, site_limit, whose = self._others, self._site_others, "others' addresses"
            name, site_name = Limit.CALLER_OTHERS_PORTS, Limit.NETWORK_OTHERS_PORTS
        payment = _Payment(places)
        payment.add(limit, _key(caller), ports, f"You ask for too many ports of {whose}.", name)
        if caller and (network := site(caller)):
            payment.add(
                site_limit,
                network,
                ports,
                f"Your network {network} asks for too many ports of {whose}.",
                site_name,
            )
        if not is_own:
            key = subscriber(target)
            refusal = f"Too many ports of {key} were asked for."
            payment.add(self._targets, key, ports, refusal, Limit.TARGET_PORTS)
        await self._pay(payment)

    async def _pay(self, payment: "_Payment") -> None:
        if not payment.charges:
            return
        waits = await self._shared.pay(payment.charges) if self._shared else None
        if waits is None:
            waits = self._memory.pay(payment.charges, self._clock())
        if longest := max(waits):
            text, name = next(
                refusal for refusal, wait in zip(payment.refusals, waits, strict=True) if wait
            )
            raise RateLimited(text, longest, name)


class _Limit(NamedTuple):
    """One limit for each key that begins with ``prefix``; see ``Charge``."""

    prefix: str
    interval: float
    capacity: int

    def charge(self, key: str, cost: int) -> Charge:
        """Return what a payment takes of it."""
        return Charge(self.prefix + key, self.interval, self.capacity, cost)


def _limit(name: str, rate: Rate | None, factor: int = 1) -> _Limit | None:
    if not rate:
        return None
    capacity = rate.count * factor
    return _Limit(f"{_PREFIX}{name}:", rate.period.total_seconds() / capacity, capacity)


class _Payment:
    """What is taken from several limits, and what to say when one of them refuses.

    Args:
        times: How often each cost is taken.
    """

    def __init__(self, times: int = 1) -> None:
        self._times = times
        self.charges: list[Charge] = []
        self.refusals: list[tuple[str, Limit]] = []

    def add(self, limit: _Limit | None, key: str, cost: int, refusal: str, name: Limit) -> None:
        if limit:
            most = limit.capacity // self._times
            if cost > most:  # no pause would help; the settings see to it where there is one place
                refusal += f" Ask for at most {most} per request."
            self.charges.append(limit.charge(key, cost * self._times))
            self.refusals.append((refusal, name))


def _key(caller: Address | None) -> str:
    return subscriber(caller) if caller else "unknown"
