"""How often a caller may ask, and for how many ports of whom."""

import asyncio
from collections.abc import Awaitable
from datetime import timedelta
from ipaddress import IPv4Address

import pytest

from port_checker.addresses import parse_address
from port_checker.api.limits import RateLimited, RateLimiter
from port_checker.errors import Limit
from port_checker.settings import Rate

SECOND, MINUTE, HOUR = timedelta(seconds=1), timedelta(minutes=1), timedelta(hours=1)
CALLER = parse_address("203.0.113.7")


class Clock:
    """Stands still unless the test sets it."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def refusal(payment: Awaitable[None]) -> RateLimited | None:
    async def pay() -> None:
        await payment

    try:
        asyncio.run(pay())
    except RateLimited as refused:
        return refused
    return None


def let_through(limits: RateLimiter, caller: str | None) -> int:
    """How many requests of a caller go through before one is refused."""
    address = parse_address(caller) if caller else None

    async def pay() -> int:
        for count in range(10_000):
            try:
                await limits.pay_request(address)
            except RateLimited:
                return count
        return 10_000

    return asyncio.run(pay())


def pays(limits: RateLimiter, caller: str | None, target: str, ports: int) -> bool:
    """Whether a caller may ask for so many ports of a target."""
    address = parse_address(caller) if caller else None
    return not refusal(limits.pay_ports(address, parse_address(target), ports))


@pytest.mark.parametrize(
    ("rate", "retry_after"),
    [((1, HOUR), 3600), ((60, HOUR), 60), ((30, MINUTE), 2), ((1, SECOND), 1), ((100, SECOND), 1)],
)
def test_that_many_at_once_and_then_one_each_fraction_of_the_period(
    rate: tuple[int, timedelta], retry_after: int
) -> None:
    clock = Clock()
    count, period = rate
    limits = RateLimiter(Rate(count, period), clock=clock)
    assert let_through(limits, "203.0.113.7") == count
    refused = refusal(limits.pay_request(CALLER))
    assert refused
    assert (str(refused), refused.retry_after) == ("You ask too often.", retry_after)
    clock.now += period.total_seconds() / count * 2.5
    assert let_through(limits, "203.0.113.7") == min(2, count)
    clock.now += 10 * period.total_seconds()
    assert let_through(limits, "203.0.113.7") == count


@pytest.mark.parametrize(
    ("seconds", "whole"), [(0, 1), (0.001, 1), (1, 1), (1.001, 2), (59.5, 60), (3600, 3600)]
)
def test_retry_after_is_whole_seconds_rounded_up(seconds: float, whole: int) -> None:
    assert RateLimited("", seconds, Limit.CALLER_REQUESTS).retry_after == whole


@pytest.mark.parametrize(
    ("one", "other", "are_one"),
    [
        ("203.0.113.7", "203.0.113.8", False),
        ("203.0.113.7", "::ffff:203.0.113.7", True),
        ("2001:db8:0:1::", "2001:db8:0:1:ffff:ffff:ffff:ffff", True),
        ("2001:db8:0:1::", "2001:db8:0:2::", False),
        ("2001:db8:0:1::", "2001:db8:1:1::", False),
        (None, None, True),  # those without an address share one limit
        (None, "0.0.0.0", False),  # noqa: S104  # a caller of that name
    ],
)
def test_who_shares_a_limit(one: str | None, other: str | None, are_one: bool) -> None:
    limits = RateLimiter(Rate(3, HOUR))
    assert let_through(limits, one) == 3
    assert let_through(limits, other) == (0 if are_one else 3)


def test_a_48_has_ten_times_the_rates_of_a_caller() -> None:
    limits = RateLimiter(requests=Rate(3, HOUR), others=Rate(3, HOUR))
    assert [let_through(limits, f"2001:db8:1:{n}::") for n in range(12)] == [3] * 10 + [0, 0]
    refused = refusal(limits.pay_request(parse_address("2001:db8:1:ffff::")))
    assert refused
    assert str(refused) == "Your network 2001:db8:1::/48 asks too often."
    assert refused.retry_after == 120  # a tenth of what one caller waits
    assert let_through(limits, "2001:db8:2::") == 3  # another site
    asked = [pays(limits, f"2001:db8:1:{n}::", f"203.0.113.{n}", 3) for n in range(12)]
    assert asked == [True] * 10 + [False] * 2


def test_a_callers_own_ports_have_a_limit_of_their_own() -> None:
    limits = RateLimiter(own=Rate(100, HOUR), others=Rate(1, HOUR), targets=Rate(100, HOUR))
    assert pays(limits, "203.0.113.7", "203.0.113.7", 70)
    refused = refusal(limits.pay_ports(CALLER, CALLER, 40))
    assert refused
    assert str(refused) == "You ask for too many ports of your own address."
    assert refused.retry_after == 360  # 10 ports, at 36 s each
    assert pays(limits, "203.0.113.7", "203.0.113.7", 30)
    assert pays(limits, "203.0.113.7", "203.0.113.8", 1)
    for caller, target in (("198.51.100.1", "198.51.100.1"), (None, "203.0.113.7")):
        assert pays(RateLimiter(own=Rate(1, HOUR)), caller, target, 1)
    # An IPv6 /64 is one caller, and a /48 has ten times as much.
    asked = [pays(limits, f"2001:db8:1:{n}::1", f"2001:db8:1:{n}::2", 100) for n in range(12)]
    assert asked == [True] * 10 + [False] * 2


def test_a_caller_pays_for_each_port_of_others_but_not_for_its_own() -> None:
    limits = RateLimiter(others=Rate(100, HOUR))
    for _ in range(10):
        assert pays(limits, "203.0.113.7", "203.0.113.7", 100)
        assert pays(limits, "2001:db8::1", "2001:db8::2", 100)  # its own /64
    assert pays(limits, "203.0.113.7", "203.0.113.8", 70)
    refused = refusal(limits.pay_ports(CALLER, parse_address("203.0.113.9"), 80))
    assert refused
    assert str(refused) == "You ask for too many ports of others' addresses."
    assert refused.retry_after == 1800  # 50 ports, at 36 s each
    assert pays(limits, "203.0.113.7", "203.0.113.9", 30)  # what was refused cost nothing
    assert not pays(limits, "203.0.113.7", "203.0.113.9", 1)
    assert pays(limits, "203.0.113.7", "203.0.113.7", 100)
    assert pays(limits, "2001:db8:0:1::", "2001:db8:0:2::", 100)
    assert not pays(limits, "2001:db8:0:1::", "2001:db8:0:2::", 1)  # another /64 is another's


def test_strangers_cannot_use_up_an_owners_checks() -> None:
    limits = RateLimiter(targets=Rate(100, HOUR))
    for caller in ("198.51.100.1", None):
        assert pays(limits, caller, "203.0.113.7", 50)
    refused = refusal(limits.pay_ports(None, parse_address("203.0.113.7"), 1))
    assert refused
    assert str(refused) == "Too many ports of 203.0.113.7 were asked for."
    assert refused.retry_after == 36
    for _ in range(10):
        assert pays(limits, "203.0.113.7", "203.0.113.7", 100)
    assert pays(limits, None, "203.0.113.8", 100)


def test_an_ipv6_target_is_its_64() -> None:
    limits = RateLimiter(targets=Rate(100, HOUR))
    assert pays(limits, None, "2001:db8:0:1::7", 100)
    assert not pays(limits, None, "2001:db8:0:1:ffff::", 1)
    assert pays(limits, None, "2001:db8:0:2::7", 100)


def test_what_one_limit_refuses_costs_nothing_in_the_others() -> None:
    limits = RateLimiter(others=Rate(100, HOUR), targets=Rate(150, HOUR))
    assert pays(limits, "198.51.100.1", "203.0.113.7", 100)
    assert not pays(limits, "198.51.100.1", "203.0.113.7", 10)  # the caller's limit refuses
    assert pays(limits, "198.51.100.2", "203.0.113.7", 50)  # the target has these 50 left
    assert not pays(limits, "198.51.100.3", "203.0.113.7", 10)  # the target's limit refuses
    assert pays(limits, "198.51.100.3", "203.0.113.8", 100)


def test_the_wait_is_that_of_the_limit_that_takes_longest() -> None:
    limits = RateLimiter(others=Rate(10, MINUTE), targets=Rate(10, HOUR))
    assert pays(limits, "198.51.100.1", "203.0.113.7", 10)
    refused = refusal(limits.pay_ports(parse_address("198.51.100.1"), CALLER, 10))
    assert refused
    assert refused.retry_after == 3600


def test_off_is_no_limit() -> None:
    limits = RateLimiter()
    assert let_through(limits, "2001:db8::1") == 10_000
    for _ in range(10):
        assert pays(limits, "2001:db8::1", "203.0.113.7", 10_000)


def test_that_many_keys_are_remembered_and_no_more() -> None:
    """The one that was not heard of for longest makes way, so the store cannot grow."""

    async def run() -> None:
        limits = RateLimiter(Rate(1, HOUR), max_keys=100)

        async def is_remembered(number: int) -> bool:
            try:
                await limits.pay_request(IPv4Address(number))
            except RateLimited:
                return True
            return False

        for number in range(100):
            assert not await is_remembered(number)
        assert await is_remembered(0)  # and was heard of just now
        assert not await is_remembered(100)  # one too many
        for number in (0, 2, 99, 100):
            assert await is_remembered(number)
        assert not await is_remembered(1)

    asyncio.run(run())
