"""The generic cell rate algorithm (GCRA), for payments to several limits at once.

A limit of N in a period lets N through at once and then one each N-th of the period. What is kept
of each key is one number, the theoretical arrival time: when the key's whole limit will be free
again (ITU-T I.371; https://brandur.org/rate-limiting). A payment is made to all of its limits, or
to none of them: what one limit refuses costs nothing in the others.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

# Seconds by which a payment may come early: far more than floating-point errors, far less than
# anybody can notice.
_TOLERANCE: Final = 1e-6


@dataclass(frozen=True, slots=True)
class Quota:
    """What one limit lets through of each key.

    Attributes:
        interval: Seconds after which the limit gives one back.
        capacity: How many the limit lets through at once.
    """

    interval: float
    capacity: int


# What a payment takes from one limit: the key of who pays, and what the limit lets through of it.
Charge = tuple[str, Quota]


class MemoryStore:
    """What one process keeps of limits.

    Args:
        max_keys: How many keys it remembers; the least recently used make way.
    """

    def __init__(self, max_keys: int) -> None:
        self._max_keys = max_keys
        self._arrivals: OrderedDict[str, float] = OrderedDict()

    def __len__(self) -> int:
        """Return how many keys it remembers."""
        return len(self._arrivals)

    def pay(self, charges: Sequence[Charge], cost: int, now: float) -> list[float]:
        """Make a payment, if none of its limits refuses.

        Args:
            charges: One for each limit; no two have the same key.
            cost: How many the payment takes of each; 0 asks, and writes as a payment does.
            now: Seconds on a clock that never goes back.

        Returns:
            For each charge, the seconds after which its limit would let the payment through: 0
            unless it refuses.
        """
        kept = self._arrivals
        arrivals = {}
        waits = []
        for key, quota in charges:
            arrival = kept.get(key, now)
            if arrival < now:
                arrival = now
            arrival += cost * quota.interval
            early = arrival - now - quota.capacity * quota.interval
            arrivals[key] = arrival
            waits.append(early if early > _TOLERANCE else 0.0)
        if any(waits):  # a refused payment uses its keys, too, but changes none
            arrivals = {key: kept[key] for key in arrivals if key in kept}
        for key, arrival in arrivals.items():
            kept[key] = arrival
            kept.move_to_end(key)
        while len(kept) > self._max_keys:
            kept.popitem(last=False)
        return waits


# The same in Redis, by its clock, for any number of payments in one call. Of each payment, ARGV
# has the number of its charges, its cost and, for each charge, interval and capacity; KEYS has the
# keys of all of them. The times are counted from 2025, so that they have digits to spare. Redis'
# clock may go back, or a replica with another clock take over: no arrival can rightly lie further
# ahead than the whole limit, so what does is taken for that.
PAY_IN_REDIS: Final = f"""
local time = redis.call("TIME")
local now = time[1] - 1735689600 + time[2] / 1000000
local waits = {{}}
local argument, paid = 1, 0
while argument <= #ARGV do
  local charges, cost = tonumber(ARGV[argument]), tonumber(ARGV[argument + 1])
  local arrivals, refused = {{}}, false
  argument = argument + 2
  for charge = 1, charges do
    local key = KEYS[paid + charge]
    local interval, capacity = tonumber(ARGV[argument]), tonumber(ARGV[argument + 1])
    argument = argument + 2
    local kept = math.min(tonumber(redis.call("GET", key) or now), now + capacity * interval)
    local arrival = math.max(now, kept) + cost * interval
    arrivals[charge] = arrival
    local early = arrival - now - capacity * interval
    if early > {_TOLERANCE} then
      refused = true
      waits[paid + charge] = tostring(early)
    else
      waits[paid + charge] = "0"
    end
  end
  if not refused then
    for charge, arrival in ipairs(arrivals) do
      redis.call("SET", KEYS[paid + charge], arrival, "EX", math.max(1, math.ceil(arrival - now)))
    end
  end
  paid = paid + charges
end
return waits
"""
