"""How often a caller may ask, and how many ports may be asked of a target."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from ipaddress import IPv4Address

import pytest

from port_checker.addresses import parse_address
from port_checker.server.rate_limit import MAX_KEYS, RateLimited, RateLimiter
from port_checker.server.settings import Rate

SECOND, MINUTE, HOUR = timedelta(seconds=1), timedelta(minutes=1), timedelta(hours=1)
CALLER = parse_address("203.0.113.7")
OTHER = parse_address("203.0.113.8")


def limiter(
    callers: tuple[int, timedelta] | None = None, targets: tuple[int, timedelta] | None = None
) -> RateLimiter:
    return RateLimiter(callers and Rate(*callers), targets and Rate(*targets))


async def refusal(payment: Awaitable[None]) -> RateLimited | None:
    try:
        await payment
    except RateLimited as limited:
        refused = limited
    else:
        return None
    assert isinstance(refused.retry_after, int)
    assert refused.retry_after >= 1
    return refused


async def let_through(pay: Callable[[], Awaitable[None]], most: int) -> int:
    """How many payments go through before one is refused, or ``most``."""
    for count in range(most):
        if await refusal(pay()):
            return count
    return most


def callers_let_through(limits: RateLimiter, caller: str | None, most: int = 100) -> int:
    address = parse_address(caller) if caller else None
    return asyncio.run(let_through(lambda: limits.pay_caller(address), most))


@pytest.mark.parametrize("count", [1, 2, 30])
def test_that_many_at_once_and_no_more(count: int) -> None:
    async def run() -> None:
        limits = limiter((count, HOUR), (count, HOUR))
        assert await let_through(lambda: limits.pay_caller(CALLER), 100) == count
        assert await refusal(limits.pay_caller(CALLER))
        assert await let_through(lambda: limits.pay_target(CALLER, 1), 100) == count
        assert await refusal(limits.pay_target(CALLER, 1))

    asyncio.run(run())


@pytest.mark.parametrize(
    ("rate", "retry_after"),
    [((1, HOUR), 3600), ((60, HOUR), 60), ((30, MINUTE), 2), ((1, SECOND), 1), ((100, SECOND), 1)],
)
def test_a_refusal_says_when_to_come_again(rate: tuple[int, timedelta], retry_after: int) -> None:
    async def run() -> None:
        limits = limiter(rate)
        began = time.monotonic()
        while not (refused := await refusal(limits.pay_caller(CALLER))):
            pass
        late = time.monotonic() - began
        assert retry_after - late - 1 <= refused.retry_after <= retry_after
        assert str(refused) == "You ask too often."

    asyncio.run(run())


@pytest.mark.parametrize(
    ("seconds", "whole"), [(0, 1), (0.001, 1), (1, 1), (1.001, 2), (59.5, 60), (3600, 3600)]
)
def test_retry_after_is_whole_seconds_rounded_up(seconds: float, whole: int) -> None:
    assert RateLimited("", seconds).retry_after == whole


def test_time_gives_back_evenly() -> None:
    """A limit of 20 a second lets 20 through at once, and one more each twentieth of a second."""

    async def run() -> None:
        limits = limiter((20, SECOND))
        before = time.monotonic()
        await limits.pay_caller(CALLER)
        after = time.monotonic()
        passed = 1
        while (last := time.monotonic()) < after + 0.25:
            passed += await let_through(lambda: limits.pay_caller(CALLER), 100)
            await asyncio.sleep(0.005)
        passed += await let_through(lambda: limits.pay_caller(CALLER), 100)
        assert (last - after) * 20 - 1 <= passed - 20 <= (time.monotonic() - before) * 20

    asyncio.run(run())


def test_who_comes_again_when_told_is_let_through() -> None:
    async def run() -> None:
        limits = limiter((20, SECOND))
        while not (refused := await refusal(limits.pay_caller(CALLER))):
            pass
        told = time.monotonic() + refused.retry_after
        came = time.monotonic()
        while await refusal(limits.pay_caller(CALLER)):
            assert came < told
            await asyncio.sleep(0.005)
            came = time.monotonic()

    asyncio.run(run())


def test_callers_do_not_pay_for_each_other() -> None:
    limits = limiter((3, HOUR))
    for caller in ("203.0.113.7", "203.0.113.8", "2001:db8::7", None):
        assert callers_let_through(limits, caller) == 3


def test_an_ipv6_caller_is_its_64() -> None:
    limits = limiter((3, HOUR))
    assert callers_let_through(limits, "2001:db8:0:1::", 1) == 1
    assert callers_let_through(limits, "2001:db8:0:1::7", 1) == 1
    assert callers_let_through(limits, "2001:db8:0:1:ffff:ffff:ffff:ffff") == 1
    assert callers_let_through(limits, "2001:db8:0:1:8000::") == 0
    for other in ("2001:db8::", "2001:db8:0:2::", "2001:db8:1:1::"):
        assert callers_let_through(limits, other) == 3


def test_a_mapped_caller_is_its_ipv4_address() -> None:
    limits = limiter((3, HOUR))
    assert callers_let_through(limits, "::ffff:203.0.113.7") == 3
    assert callers_let_through(limits, "203.0.113.7") == 0
    assert callers_let_through(limits, "::ffff:203.0.113.8") == 3


def test_callers_without_an_address_share_one_limit() -> None:
    limits = limiter((3, HOUR))
    assert callers_let_through(limits, None, 2) == 2
    assert callers_let_through(limits, None) == 1
    assert callers_let_through(limits, "0.0.0.0") == 3  # noqa: S104  # a caller of that name


def test_a_target_pays_by_the_port() -> None:
    async def run() -> None:
        limits = limiter(targets=(100, HOUR))
        assert not await refusal(limits.pay_target(CALLER, 70))
        refused = await refusal(limits.pay_target(CALLER, 80))
        assert refused
        assert str(refused) == "Too many ports of 203.0.113.7 were asked for."
        assert 1790 <= refused.retry_after <= 1800  # 50 ports, at 36 s each
        # What was refused cost nothing, so that what is left can still be had.
        assert not await refusal(limits.pay_target(CALLER, 30))
        assert await refusal(limits.pay_target(CALLER, 2))
        assert not await refusal(limits.pay_target(OTHER, 100))

    asyncio.run(run())


def test_each_ipv6_target_has_its_own_limit() -> None:
    async def run() -> None:
        limits = limiter(targets=(100, HOUR))
        for target in ("2001:db8::1", "2001:db8::2"):
            assert not await refusal(limits.pay_target(parse_address(target), 100))
            assert await refusal(limits.pay_target(parse_address(target), 1))

    asyncio.run(run())


def test_callers_and_targets_are_counted_apart() -> None:
    async def run() -> None:
        limits = limiter((1, HOUR), (1, HOUR))
        other_limits = limiter((1, HOUR), (1, HOUR))
        for one in (limits, other_limits):
            assert not await refusal(one.pay_caller(CALLER))
            assert not await refusal(one.pay_target(CALLER, 1))

    asyncio.run(run())


def test_off_is_no_limit() -> None:
    async def run() -> None:
        limits = limiter()
        assert await let_through(lambda: limits.pay_caller(CALLER), 10_000) == 10_000
        assert await let_through(lambda: limits.pay_target(CALLER, 10_000), 10_000) == 10_000
        limits = limiter(callers=(1, HOUR))
        assert await let_through(lambda: limits.pay_target(CALLER, 10_000), 100) == 100
        limits = limiter(targets=(1, HOUR))
        assert await let_through(lambda: limits.pay_caller(CALLER), 100) == 100

    asyncio.run(run())


def test_requests_at_the_same_time_are_counted_one_by_one() -> None:
    async def run() -> None:
        limits = limiter((30, HOUR), (2000, HOUR))
        asked = [refusal(limits.pay_caller(CALLER)) for _ in range(500)]
        assert (await asyncio.gather(*asked)).count(None) == 30
        asked = [refusal(limits.pay_target(CALLER, 300)) for _ in range(500)]
        assert (await asyncio.gather(*asked)).count(None) == 6

    asyncio.run(run())


@pytest.mark.parametrize("limited", ["callers", "targets"])
def test_that_many_keys_are_remembered_and_no_more(limited: str) -> None:
    """The one that was not heard of for longest makes way, so the store cannot grow."""

    async def run() -> None:
        limits = limiter((1, HOUR), (1, HOUR))

        def pay(number: int) -> Awaitable[None]:
            address = IPv4Address(number)
            if limited == "callers":
                return limits.pay_caller(address)
            return limits.pay_target(address, 1)

        for number in range(MAX_KEYS):
            await pay(number)
        assert await refusal(pay(0))  # is remembered, and was heard of just now
        assert not await refusal(pay(MAX_KEYS))  # one too many
        for remembered in (0, 2, MAX_KEYS - 1, MAX_KEYS):
            assert await refusal(pay(remembered))
        assert not await refusal(pay(1))  # was forgotten

    asyncio.run(run())
