"""Rounds of attempts, capacity and what is left of a check."""

import asyncio
import gc
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from typing import Any

import pytest

from port_checker.addresses import Address, parse_address
from port_checker.checker import (
    TLS_CHECKS_PER_CALLER,
    Checker,
    NoRoom,
    Overloaded,
    max_for_caller,
)
from port_checker.connect import OPEN, PER_TURN, REFUSED, TIMED_OUT, CheckFailed, Verdict
from port_checker.errors import Limit
from tests.support.loopback import (
    full_backlog,
    open_listener,
    open_port,
    ports,
    refused_port,
    silent_port,
)

LOOPBACK = parse_address("127.0.0.1")


async def do_not_wait(_: float) -> None:
    """Sleep no time."""


def make_checker(
    retries: int = 1,
    timeout: float = 5,
    max_in_flight: int = 1000,
    sleep: Callable[[float], Awaitable[None]] = do_not_wait,
) -> Checker:
    return Checker(
        retries=retries, retry_delay=7, timeout=timeout, max_in_flight=max_in_flight, sleep=sleep
    )


async def check(checker: Checker, target: Address, ports: list[int]) -> dict[int, Verdict]:
    with checker.reserve(len(ports)) as room:
        return await checker.check(target, ports, room)


def test_verdicts_come_in_the_order_asked() -> None:
    with open_port() as opened, refused_port() as refused, silent_port() as silent:
        asked = [silent, opened, refused]
        verdicts = asyncio.run(check(make_checker(timeout=1), LOOPBACK, asked))
    assert list(verdicts.items()) == [(silent, TIMED_OUT), (opened, OPEN), (refused, REFUSED)]


def test_it_checks_in_one_event_loop_after_another() -> None:
    """As it does when an application is tested: Starlette's client may make one per request."""
    checker = make_checker(timeout=1)
    with silent_port() as silent:
        for _ in range(2):
            assert asyncio.run(check(checker, LOOPBACK, [silent])) == {silent: TIMED_OUT}


def test_a_port_that_opens_after_the_first_attempt_is_found() -> None:
    with refused_port() as port:
        pass
    with ExitStack() as stack:

        async def open_it(_: float) -> None:
            stack.enter_context(open_listener(port=port))

        checker = make_checker(retries=2, sleep=open_it)
        assert asyncio.run(check(checker, LOOPBACK, [port])) == {port: OPEN}


@pytest.mark.parametrize("retries", [1, 2, 4])
def test_a_failed_port_is_tried_that_often_with_the_delay_between(retries: int) -> None:
    waits = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    with refused_port() as refused:
        asyncio.run(check(make_checker(retries, sleep=sleep), LOOPBACK, [refused]))
    assert waits == [7] * (retries - 1)


@pytest.mark.parametrize("retries", [1, 2])
def test_a_round_that_proves_nothing_is_made_again_or_the_check_fails(retries: int) -> None:
    """The loop is held up in the first round alone."""

    async def run() -> dict[int, Verdict]:
        asyncio.get_running_loop().call_later(0.1, time.sleep, 1.5)
        return await check(make_checker(retries, timeout=1), LOOPBACK, [silent])

    with silent_port() as silent:
        if retries > 1:
            assert asyncio.run(run()) == {silent: TIMED_OUT}
        else:
            with pytest.raises(CheckFailed, match="held up while it waited"):
                asyncio.run(run())


def test_a_verdict_before_a_round_that_proves_nothing_is_final() -> None:
    with refused_port() as port:
        pass
    told = []
    with ExitStack() as stack:

        async def fall_silent(_: float) -> None:
            stack.enter_context(full_backlog(port=port))
            asyncio.get_running_loop().call_later(0.1, time.sleep, 1.5)

        async def run() -> dict[int, Verdict]:
            checker = make_checker(retries=2, timeout=1, sleep=fall_silent)
            with checker.reserve(1) as room:
                return await checker.check(
                    LOOPBACK, [port], room, lambda *verdict: told.append(verdict)
                )

        assert asyncio.run(run()) == {port: REFUSED}
    assert told == [(port, REFUSED)]


def test_an_open_port_is_tried_once() -> None:
    with open_listener() as listener, refused_port() as refused:
        port = listener.getsockname()[1]
        asyncio.run(check(make_checker(retries=3), LOOPBACK, [port, refused]))
        listener.setblocking(False)
        listener.accept()[0].close()
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_each_verdict_is_told_once_when_it_is_final() -> None:
    told: list[tuple[int, Verdict]] = []
    events: list[object] = []

    async def sleep(_: float) -> None:
        events.append([*told])

    async def check_and_tell(asked: list[int]) -> dict[int, Verdict]:
        checker = make_checker(retries=2, timeout=1, sleep=sleep)
        with checker.reserve(len(asked)) as room:
            return await checker.check(
                LOOPBACK, asked, room, lambda port, verdict: told.append((port, verdict))
            )

    with open_port() as opened, refused_port() as refused, silent_port() as silent:
        verdicts = asyncio.run(check_and_tell([silent, refused, opened]))
    assert events == [[(opened, OPEN)]]  # the others may change until their last attempt ends
    assert told == [(opened, OPEN), (refused, REFUSED), (silent, TIMED_OUT)]
    assert verdicts == dict(told)


def test_a_check_without_room_is_refused_at_once() -> None:
    with ports(3, silent_port) as silent:

        async def run() -> None:
            checker = make_checker(max_in_flight=4)
            running = asyncio.create_task(check(checker, LOOPBACK, silent))
            await asyncio.sleep(0)
            assert checker.in_flight == 3
            with pytest.raises(Overloaded, match="Too many checks are running") as refusal:
                checker.reserve(2)
            assert (refusal.value.asked, refusal.value.most) == (2, 4)
            assert refusal.value.retry_after == 5
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running
            assert checker.in_flight == 0

        asyncio.run(run())


def reserve(
    checker: Checker,
    ports: int,
    caller: str,
    is_own: bool = True,
    is_tls: bool = False,
    places: int = 1,
) -> str | None:
    """Take room for ever; what is said if there is none."""
    network = caller.partition("/")[0]
    try:
        checker.reserve(
            ports, caller=caller, network=network, is_own=is_own, is_tls=is_tls, places=places
        ).__enter__()
    except NoRoom as refusal:
        return f"{type(refusal).__name__}: {refusal}"
    return None


def shared_checker(max_in_flight: int, max_per_caller: int) -> Checker:
    return Checker(
        retries=1,
        retry_delay=0,
        timeout=5,
        max_in_flight=max_in_flight,
        max_per_caller=max_per_caller,
    )


def refusing_limit(checker: Checker, ports: int, **who: Any) -> Limit | None:
    """What refuses a reservation."""
    with pytest.raises(NoRoom) as refusal:
        checker.reserve(ports, **who)
    return refusal.value.limit


def test_a_refusal_names_what_was_full() -> None:
    checker = shared_checker(1000, 200)
    assert refusing_limit(checker, 201, caller="a") is Limit.CALLER_IN_FLIGHT
    for _ in range(TLS_CHECKS_PER_CALLER):
        checker.reserve(1, caller="t", is_tls=True).__enter__()
    assert refusing_limit(checker, 1, caller="t", is_tls=True) is Limit.CALLER_TLS_CHECKS
    for number in range(2):
        checker.reserve(190, caller=f"a/{number}", network="a").__enter__()
    for number in range(2 * TLS_CHECKS_PER_CALLER):
        checker.reserve(1, caller=f"b/{number}", network="b", is_tls=True).__enter__()
    site = {"caller": "a/9", "network": "a"}
    assert refusing_limit(checker, 100, **site) is Limit.NETWORK_IN_FLIGHT
    assert refusing_limit(checker, 1, caller="c", network="b", is_tls=True) is (
        Limit.NETWORK_TLS_CHECKS
    )
    full = shared_checker(1000, 1000)  # one caller's share is all
    full.reserve(500, caller="a", is_own=False).__enter__()
    assert refusing_limit(full, 1, caller="b", is_own=False) is Limit.OTHERS_IN_FLIGHT
    full.reserve(500, caller="a").__enter__()
    assert refusing_limit(full, 1, caller="b") is Limit.IN_FLIGHT


def test_nobody_can_keep_others_out() -> None:
    checker = shared_checker(1000, 200)
    for is_own in (True, False):
        assert not reserve(checker, 100, "a/1", is_own)
    for is_own in (True, False):
        assert reserve(checker, 1, "a/1", is_own) == (
            "CallerOverLimit: Too many checks of one caller are running."
        )
    assert not reserve(checker, 200, "a/2")
    assert reserve(checker, 1, "a/3") == ("CallerOverLimit: Too many checks of a are running.")
    assert not reserve(checker, 200, "b/1", is_own=False)
    assert reserve(checker, 201, "f/1") == (
        "CallerOverLimit: This service checks at most 200 ports of one caller at once."
    )


def test_a_caller_has_a_share_of_the_tls_checks() -> None:
    checker = shared_checker(1000, 200)
    for caller in ("a/1", "a/2"):
        for _ in range(TLS_CHECKS_PER_CALLER):
            assert not reserve(checker, 1, caller, is_tls=True)
        assert reserve(checker, 1, caller, is_tls=True) == (
            "CallerOverLimit: Too many checks of TLS endpoints of one caller are running."
        )
    assert reserve(checker, 1, "a/3", is_tls=True) == (
        "CallerOverLimit: Too many checks of TLS endpoints of a are running."
    )
    assert not reserve(checker, 1, "a/1")
    assert not reserve(checker, 1, "b/1", is_tls=True)
    unshared = shared_checker(1000, 1000)
    assert not any(reserve(unshared, 1, "a/1", is_tls=True) for _ in range(200))


def test_a_tls_check_that_has_ended_makes_way_for_another() -> None:
    checker = shared_checker(1000, 200)
    for _ in range(TLS_CHECKS_PER_CALLER + 1):
        with checker.reserve(1, caller="a/1", network="a", is_tls=True):
            pass


def test_each_place_takes_room_for_the_ports_and_none_for_handshakes_made_elsewhere() -> None:
    checker = shared_checker(1000, 200)
    assert reserve(checker, 67, "a/1", is_own=False, places=3) == (
        "CallerOverLimit: This service checks at most 66 ports of one caller at once."
    )
    assert not reserve(checker, 66, "a/1", is_own=False, places=3)
    assert checker.in_flight == 198
    for _ in range(TLS_CHECKS_PER_CALLER):
        assert not reserve(checker, 1, "b/1", is_own=False, is_tls=True, places=3)
    assert reserve(checker, 1, "b/1", is_own=False, is_tls=True, places=3) == (
        "CallerOverLimit: Too many checks of TLS endpoints of one caller are running."
    )
    with checker.reserve(1, caller="c", is_own=False, is_tls=True, places=17):
        assert checker.in_flight == 198 + 3 * TLS_CHECKS_PER_CALLER + 17
    assert checker.in_flight == 198 + 3 * TLS_CHECKS_PER_CALLER


def test_shares_shrink_as_room_runs_out() -> None:
    checker = shared_checker(10_000, 2000)
    # Two requests of 1,000 ports each, by as many callers as find room.
    asked = [reserve(checker, 1000, f"{n}/1") for n in range(7) for _ in range(2)]
    assert asked.count(None) == checker.in_flight // 1000 == 9
    refusal = "Overloaded: Too many checks are running: there is room for 500 now."
    assert asked[-1] == refusal
    # Half of what is left is somebody else's, to the last but 10.
    for number in range(100):
        while not reserve(checker, 11, f"late {number}/1"):
            pass
    assert 10_000 - checker.in_flight in range(11, 22)
    refused = reserve(checker, 11, "small/1", is_own=False) or ""
    assert refused.startswith("Overloaded: Too many checks are running: there is room for ")
    # Who asks for few of its own ports finds room until there is none.
    assert not reserve(checker, 10, "small/1")
    for number in range(10_000 - checker.in_flight):
        assert not reserve(checker, 1, f"last {number}/1")
    assert reserve(checker, 1, "e/1") == "Overloaded: Too many checks are running."
    assert checker.in_flight == 10_000


def test_strangers_shares_shrink_within_their_half() -> None:
    checker = shared_checker(10_000, 2000)
    asked = [reserve(checker, 1000, f"{n}/1", is_own=False) for n in range(6)]
    refusal = "Too many checks of others' addresses are running: there is room for 500 now."
    assert asked == [None] * 4 + [f"Overloaded: {refusal}"] * 2
    assert not reserve(checker, 500, "7/1", is_own=False)
    assert not reserve(checker, 1000, "7/1")


def test_a_network_cannot_take_the_last_of_the_room_either() -> None:
    checker = shared_checker(1000, 300)
    taken = sum(11 for n in range(100) if not reserve(checker, 11, f"one/{n}"))
    assert taken == 495  # half of the room, which is less than two shares
    assert not reserve(checker, 250, "other/1")


def test_no_caller_has_more_than_half_of_the_room_unless_its_share_is_all_of_it() -> None:
    assert reserve(shared_checker(1000, 900), 501, "a/1") == (
        "Overloaded: This service checks at most 500 ports of one caller at once."
    )
    assert not reserve(shared_checker(1000, 900), 500, "a/1")
    alone = shared_checker(1000, 1000)
    assert not reserve(alone, 990, "a/1")
    assert not reserve(alone, 10, "b/1")
    assert [max_for_caller(1000, share) for share in (200, 900, 1000)] == [200, 500, 1000]


def test_room_comes_back_to_everybody_who_had_it() -> None:
    checker = make_checker(max_in_flight=10)
    for _ in range(3):
        with checker.reserve(5, caller="a", network="n", is_own=False) as reservation:
            reservation.release(2)
            assert checker.in_flight == 3
            with pytest.raises(Overloaded):
                checker.reserve(3, caller="b", is_own=False)
            with checker.reserve(2, caller="b", is_own=False):
                assert checker.in_flight == 5
        assert checker.in_flight == 0


@pytest.mark.parametrize("count", [1, PER_TURN])
def test_ports_that_are_done_are_in_flight_no_more(count: int) -> None:
    """Even all of a batch, while another one of the same check goes on."""
    with ports(count, open_port) as opened, silent_port() as silent:
        in_flight = []

        async def sleep(_: float) -> None:
            in_flight.append(checker.in_flight)

        checker = make_checker(retries=2, timeout=1, sleep=sleep)
        asyncio.run(check(checker, LOOPBACK, [*opened, silent]))
    assert in_flight == [1]
    assert checker.in_flight == 0


def test_the_checkers_own_failure_gives_its_room_back() -> None:
    checker = make_checker()
    with pytest.raises(CheckFailed):  # a broadcast address: connect() is not permitted
        asyncio.run(check(checker, parse_address("127.255.255.255"), [80]))
    assert checker.in_flight == 0


def test_nothing_grows_with_the_number_of_checks() -> None:
    """In descriptors and tasks; ``make soak`` measures the memory, too."""
    with open_port() as opened, refused_port() as refused:

        async def run() -> None:
            checker = make_checker()
            await check(checker, LOOPBACK, [refused])  # makes the epoll of all checks
            gc.collect()  # what other tests have left
            before = len(os.listdir("/proc/self/fd"))
            for _ in range(300):
                await check(checker, LOOPBACK, [opened, refused])
            assert len(os.listdir("/proc/self/fd")) == before
            assert asyncio.all_tasks() == {asyncio.current_task()}
            assert checker.in_flight == 0

        asyncio.run(run())
