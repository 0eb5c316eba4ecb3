"""How often a caller may ask, and how many ports may be asked of a target."""

import asyncio
from collections.abc import Awaitable
from datetime import timedelta
from ipaddress import IPv4Address

import pytest

from port_checker.addresses import parse_address
from port_checker.server.rate_limit import RateLimited, RateLimiter
from port_checker.server.settings import Rate

SECOND, MINUTE, HOUR = timedelta(seconds=1), timedelta(minutes=1), timedelta(hours=1)
CALLER = parse_address("203.0.113.7")
OTHER = parse_address("203.0.113.8")


class Clock:
    """Stands still unless the test sets it."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def limiter(
    callers: tuple[int, timedelta] | None = None,
    targets: tuple[int, timedelta] | None = None,
    clock: Clock | None = None,
) -> RateLimiter:
    return RateLimiter(
        callers and Rate(*callers), targets and Rate(*targets), clock=clock or Clock()
    )


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
                await limits.pay_caller(address)
            except RateLimited:
                return count
        return 10_000

    return asyncio.run(pay())


@pytest.mark.parametrize(
    ("rate", "retry_after"),
    [((1, HOUR), 3600), ((60, HOUR), 60), ((30, MINUTE), 2), ((1, SECOND), 1), ((100, SECOND), 1)],
)
def test_that_many_at_once_and_then_one_each_fraction_of_the_period(
    rate: tuple[int, timedelta], retry_after: int
) -> None:
    clock = Clock()
    limits = limiter(rate, clock=clock)
    count, period = rate
    assert let_through(limits, "203.0.113.7") == count
    refused = refusal(limits.pay_caller(CALLER))
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
    assert RateLimited("", seconds).retry_after == whole


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
    limits = limiter((3, HOUR))
    assert let_through(limits, one) == 3
    assert let_through(limits, other) == (0 if are_one else 3)


def test_a_target_pays_by_the_port_and_nothing_for_what_was_refused() -> None:
    limits = limiter(targets=(100, HOUR))
    assert not refusal(limits.pay_target(CALLER, 70))
    refused = refusal(limits.pay_target(CALLER, 80))
    assert refused
    assert str(refused) == "Too many ports of 203.0.113.7 were asked for."
    assert refused.retry_after == 1800  # 50 ports, at 36 s each
    assert not refusal(limits.pay_target(CALLER, 30))
    assert refusal(limits.pay_target(CALLER, 1))
    assert not refusal(limits.pay_target(OTHER, 100))


def test_callers_and_targets_are_counted_apart() -> None:
    limits = limiter((1, HOUR), (1, HOUR))
    assert not refusal(limits.pay_caller(CALLER))
    assert not refusal(limits.pay_target(CALLER, 1))


def test_off_is_no_limit() -> None:
    assert let_through(limiter(targets=(1, HOUR)), "203.0.113.7") == 10_000
    limits = limiter(callers=(1, HOUR))
    for _ in range(10):
        assert not refusal(limits.pay_target(CALLER, 10_000))


def test_that_many_keys_are_remembered_and_no_more() -> None:
    """The one that was not heard of for longest makes way, so the store cannot grow."""

    async def run() -> None:
        limits = RateLimiter(Rate(1, HOUR), None, max_keys=100)

        async def is_remembered(number: int) -> bool:
            try:
                await limits.pay_caller(IPv4Address(number))
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
