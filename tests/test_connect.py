"""One round of attempts, on sockets of this machine."""

import asyncio
import gc
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import pytest
import uvloop

from port_checker.addresses import Address, parse_address
from port_checker.connect import (
    OPEN,
    PER_TURN,
    REFUSED,
    TIMED_OUT,
    CheckFailed,
    HoldUps,
    OpenConnectionPacer,
    SelfAnswers,
    Verdict,
    WayToTarget,
    _Round,
    attempt,
    connect,
    own_failures,
)
from port_checker.linux import could_not_retransmit
from tests.support.loopback import (
    connecting,
    full_backlog,
    is_closing,
    open_listener,
    open_port,
    ports,
    refused_port,
    silent_port,
)
from tests.support.namespace import ROOT, loopback_alone, needs_root
from tests.support.waiting import wait_until

LOOPBACK = parse_address("127.0.0.1")


async def attempt_here(
    asked: Sequence[int],
    timeout: float,
    pacer: OpenConnectionPacer | None = None,
    host: str = "127.0.0.1",
) -> dict[int, Verdict]:
    way = WayToTarget(parse_address(host))
    return await attempt(way, asked, timeout, pacer or OpenConnectionPacer())


def try_once(
    asked: Sequence[int], host: str = "127.0.0.1", timeout: float = 5, hangs_after: float = 60
) -> dict[int, Verdict]:
    async def run() -> dict[int, Verdict]:
        async with asyncio.timeout(hangs_after):
            return await attempt_here(asked, timeout, host=host)

    return asyncio.run(run())


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_tells_open_refused_and_silent_ports_apart(host: str) -> None:
    listening_host = "127.0.0.1" if "ffff" in host else host
    with (
        open_port(listening_host) as opened,
        refused_port(listening_host) as refused,
        silent_port(listening_host) as silent,
    ):
        verdicts = try_once([opened, refused, silent], host, timeout=1)
    assert verdicts == {opened: OPEN, refused: REFUSED, silent: TIMED_OUT}
    assert (REFUSED.error, TIMED_OUT.error) == ("Connection refused", "Connection timed out")


def test_all_attempts_go_at_once() -> None:
    """None of 100 is answered before all of them have been tried."""
    with ExitStack() as stack:
        room_makers = dict(stack.enter_context(full_backlog()) for _ in range(100))
        before = connecting(room_makers)

        async def run() -> dict[int, Verdict]:
            attempts = attempt_here([*room_makers], 50)
            running = asyncio.create_task(attempts)
            while connecting(room_makers) < before + 100:
                await asyncio.sleep(0.01)
            for make_room in room_makers.values():
                make_room()
            return await running

        assert asyncio.run(run()) == dict.fromkeys(room_makers, OPEN)


def test_a_round_without_silent_ports_does_not_wait() -> None:
    with ports(50, open_port) as opened, ports(50, refused_port) as refused:
        try_once(opened + refused, timeout=1000, hangs_after=60)


def test_no_ports_are_no_verdicts() -> None:
    assert try_once([]) == {}


def test_a_verdict_that_comes_later_is_waited_for() -> None:
    with full_backlog() as (port, make_room):

        async def run() -> dict[int, Verdict]:
            asyncio.get_running_loop().call_later(0.2, make_room)
            return await attempt_here([port], 50)

        assert asyncio.run(run()) == {port: OPEN}


def test_closes_politely_at_once_and_sends_nothing() -> None:
    with open_listener() as listener:
        listener.settimeout(60)
        try_once([listener.getsockname()[1]])
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(60)
            # The end of the stream, not a reset, which recv() would raise.
            assert connection.recv(1) == b""


def test_a_port_that_resets_what_it_accepted_is_open() -> None:
    """It did accept: when the reset arrives must not decide what the verdict is."""
    with open_listener() as listener:
        port = listener.getsockname()[1]
        stop = threading.Event()

        def reset_all() -> None:
            listener.settimeout(0.05)
            while not stop.is_set():
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    continue
                linger = b"\1\0\0\0\0\0\0\0"  # on, for 0 s: close() sends a reset
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                connection.close()

        thread = threading.Thread(target=reset_all)
        thread.start()
        try:
            verdicts = [try_once([port]) for _ in range(200)]
        finally:
            stop.set()
            thread.join()
    assert verdicts == [{port: OPEN}] * 200


@needs_root
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_connection_with_itself_is_no_open_port(host: str) -> None:
    """With one ephemeral port left, connecting to it on loopback meets itself."""
    with loopback_alone("echo 40001 40001 > /proc/sys/net/ipv4/ip_local_port_range"):
        assert try_once([40001, 40000], host) == {40001: REFUSED, 40000: REFUSED}


@needs_root
def test_running_out_of_local_ports_is_the_checkers_failure() -> None:
    with (
        loopback_alone("echo 40000 40001 > /proc/sys/net/ipv4/ip_local_port_range"),
        open_listener(port=50000) as listener,
    ):
        held = [socket.create_connection(listener.getsockname()) for _ in range(2)]
        with pytest.raises(CheckFailed, match="Cannot assign requested address"):
            try_once([50000])
        for connection in held:
            linger = b"\1\0\0\0\0\0\0\0"  # on, for 0 s: close() sends a reset
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            connection.close()
        assert try_once([50000]) == {50000: OPEN}


@needs_root
@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("192.0.2.1", "Permission denied"),
        ("198.51.100.1", "No route to host"),
        ("203.0.113.1", "Network is unreachable"),
    ],
)
def test_a_prohibition_and_a_lack_of_route_are_the_checkers_failures(
    host: str, reason: str
) -> None:
    routes = ("ip route add prohibit 192.0.2.0/24", "ip route add unreachable 198.51.100.0/24")
    with (
        loopback_alone(*routes),
        pytest.raises(CheckFailed, match=f"^could not connect: {reason}$"),
    ):
        try_once([80], host)


@needs_root
def test_connections_that_the_kernel_leads_elsewhere_blame_and_clear_nobody() -> None:
    """As eBPF of a service mesh does: connect() leads to another address than it is given."""
    program = [sys.executable, "-m", "tests.programs.check_where_connections_are_led_here"]
    with loopback_alone():
        done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[80, "), done.stdout
    assert "a redirect of a proxy or a service mesh, answers in its place" in done.stdout


OUTPUT_CHAIN = (
    "nft add table inet t",
    "nft add chain inet t o '{ type filter hook output priority 0; }'",
)
INPUT_CHAIN = (
    "nft add table inet t",
    "nft add chain inet t i '{ type filter hook input priority 0; }'",
)


@needs_root
def test_all_ports_that_this_machine_may_not_connect_to_are_named() -> None:
    with (
        loopback_alone(*OUTPUT_CHAIN, "nft add rule inet t o tcp dport 25-26 drop"),
        open_listener(port=80),
    ):
        with pytest.raises(CheckFailed) as raised:
            try_once([26, 80, 81, 25], timeout=2)
        assert try_once([80]) == {80: OPEN}
    reason = "could not connect: this machine's own firewall or a full queue drops what it sends"
    assert (str(raised.value), raised.value.ports) == (reason, [26, 25])


@needs_root
def test_the_own_firewall_is_told_apart_when_the_kernel_gives_up_first() -> None:
    async def run() -> list[dict[int, Verdict] | BaseException]:
        rounds = (attempt_here([port], 60) for port in (25, 80))
        return await asyncio.gather(*rounds, return_exceptions=True)

    with loopback_alone(
        "echo 1 > /proc/sys/net/ipv4/tcp_syn_retries",
        "(echo 0 > /proc/sys/net/ipv4/tcp_syn_linear_timeouts || true)",  # from Linux 6.5 on
        *OUTPUT_CHAIN,
        "nft add rule inet t o tcp dport 25 drop",
        *INPUT_CHAIN,
        "nft add rule inet t i tcp dport 80 drop",
    ):
        failure, verdicts = asyncio.run(run())
    assert isinstance(failure, CheckFailed)
    assert failure.ports == [25]
    assert verdicts == {80: TIMED_OUT}


@needs_root
@pytest.mark.parametrize(
    "trouble",
    [
        "tcp dport 80 tcp flags fin drop",  # the target acknowledges nothing: FIN-WAIT-1
        "tcp dport 80 accept",  # it never closes its end: FIN-WAIT-2
    ],
)
def test_a_connection_is_gone_for_good_within_seconds(trouble: str) -> None:
    """By default it takes a minute and more."""
    with (
        loopback_alone(*INPUT_CHAIN, f"nft add rule inet t i {trouble}"),
        open_listener(port=80),
    ):
        try_once([80])
        wait_until(is_closing)
        wait_until(lambda: not is_closing(), seconds=40)  # the kernel's own minute is longer


@needs_root
def test_rejection_by_the_target_is_its_verdict_when_it_is_this_machine() -> None:
    reject = "nft add rule inet t i tcp dport 80 reject with icmpx admin-prohibited"
    with loopback_alone(*INPUT_CHAIN, reject):
        errors = [try_once([80], host)[80].error for host in ("127.0.0.1", "::1")]
    assert errors == ["No route to host", "Permission denied"]


@contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """Let this process open only ``count`` more files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    with open("/dev/null") as filler:
        fillers = [os.dup(filler.fileno()) for _ in range(highest - open_descriptors())]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_descriptors() - 1 + count, hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in fillers:
            os.close(descriptor)


@pytest.mark.parametrize("left", [0, 1, 5])
def test_running_out_of_descriptors_is_the_checkers_failure(left: int) -> None:
    """None for the epoll; one for it and none for a socket; some for sockets."""
    with ports(20, open_port) as opened:

        async def run() -> dict[int, Verdict]:
            with descriptors_left(left):
                return await attempt_here(opened, 5)

        gc.collect()  # pacers, which have an epoll
        before = open_descriptors()
        with pytest.raises(CheckFailed, match="could not connect: Too many open files"):
            asyncio.run(run())
        gc.collect()
        assert open_descriptors() == before
        assert try_once(opened) == dict.fromkeys(opened, OPEN)


def test_cancellation_leaves_nothing() -> None:
    with ports(100, silent_port) as silent:

        async def run() -> None:
            pacer = OpenConnectionPacer()
            await attempt_here([], 30, pacer)  # makes the epoll of all rounds
            before = open_descriptors()
            for delay in (0, 0.01, 0.2):  # while it opens, and while it waits
                task = asyncio.create_task(attempt_here(silent, 30, pacer))
                await asyncio.sleep(delay)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert open_descriptors() == before
                assert asyncio.all_tasks() == {asyncio.current_task()}

        asyncio.run(run())


def test_many_rounds_at_once_do_not_hold_up_the_loop() -> None:
    """They take turns: 30 rounds open 3,000 connections a few at a time, the loop going round."""
    with ports(100, open_port) as opened:

        async def run() -> int:
            pacer = OpenConnectionPacer()
            rounds = [asyncio.create_task(attempt_here(opened, 5, pacer)) for _ in range(30)]
            times_around = 0
            while not all(round_.done() for round_ in rounds):
                await asyncio.sleep(0)
                times_around += 1
            return times_around

        assert asyncio.run(run()) >= 30


class CountingPacer(OpenConnectionPacer):
    """Counts what it lets through."""

    granted = 0

    async def take(self, wanted: int, whose: object = None) -> None:
        await super().take(wanted, whose)
        self.granted += wanted


def test_a_round_of_few_ports_waits_for_nobody_elses_many() -> None:
    async def run() -> int:
        pacer = CountingPacer()

        async def take_many() -> None:
            for _ in range(10):
                await pacer.take(PER_TURN)

        many = [asyncio.create_task(take_many()) for _ in range(10)]
        await asyncio.sleep(0)
        await pacer.take(1)
        before = pacer.granted
        await asyncio.gather(*many)
        return before

    assert asyncio.run(run()) <= 4 * PER_TURN


def test_rounds_of_few_ports_leave_room_for_one_of_many() -> None:
    async def run() -> int:
        pacer = OpenConnectionPacer()
        few = 0

        async def take_few() -> None:
            nonlocal few
            while True:
                await pacer.take(1)
                few += 1

        others = [asyncio.create_task(take_few()) for _ in range(200)]
        await asyncio.sleep(0)
        async with asyncio.timeout(60):
            for _ in range(4):
                await pacer.take(80)
        for other in others:
            other.cancel()
        return few

    assert asyncio.run(run()) < 320 * 10


def test_answers_that_arrive_together_do_not_hold_up_the_loop() -> None:
    """Of 1,000 ports that are open, no more are looked at in one turn than may be opened."""
    in_turn = [0]

    def on_verdict(_: int, __: Verdict) -> None:
        in_turn[-1] += 1

    with ports(100, open_port) as opened, ExitStack() as stack:

        async def run() -> None:
            loop = asyncio.get_running_loop()

            def count_turns() -> None:
                in_turn.append(0)
                loop.call_soon(count_turns)

            pacer = OpenConnectionPacer()
            pacer.sockets.begin()
            way = WayToTarget(LOOPBACK)
            rounds = [_Round(way, pacer, on_verdict) for _ in range(10)]
            for round_ in rounds:
                stack.callback(round_.close)
                pacer.sockets.add(round_.open(opened), round_)
            loop.call_soon(count_turns)
            await asyncio.gather(*(round_.wait(5) for round_ in rounds))

        asyncio.run(run())
    assert sum(in_turn) == 1000
    assert max(in_turn) <= PER_TURN


def test_the_end_of_many_silent_attempts_does_not_hold_up_the_loop() -> None:
    """It is spread over the turns like their beginning."""
    pacer = CountingPacer()
    with ports(20, silent_port) as silent, ports(20, open_port) as opened:
        verdicts = asyncio.run(attempt_here(silent + opened, 0.5, pacer))
    assert verdicts == dict.fromkeys(silent, TIMED_OUT) | dict.fromkeys(opened, OPEN)
    assert pacer.granted == 20 + 20 + 20


@needs_root
def test_a_connection_made_by_the_second_packet_is_not_the_firewalls_fault() -> None:
    lose_the_first = "tcp dport 80 tcp flags syn numgen inc mod 2 == 0 drop"
    with (
        loopback_alone(*INPUT_CHAIN, f"nft add rule inet t i {lose_the_first}"),
        open_listener(port=80) as listener,
        socket.create_connection(listener.getsockname()) as client,
    ):
        assert not could_not_retransmit(client)


@pytest.mark.parametrize("fails", [False, True])
def test_this_machines_connections_are_looked_through_once_for_all_who_ask(fails: bool) -> None:
    other = parse_address("127.0.0.2")
    looks: list[Address] = []
    loop_goes_on = threading.Event()

    def look(source: Address) -> bool:
        assert loop_goes_on.wait(60)
        looks.append(source)
        if fails:
            raise OSError
        return len(looks) == 2

    async def run() -> list[bool]:
        answers = SelfAnswers(look)
        first = answers.ask(LOOPBACK)
        await asyncio.sleep(0)
        others = [answers.ask(source) for source in (*[LOOPBACK] * 100, other)]
        loop_goes_on.set()
        return [await answer for answer in (first, *others)]

    assert asyncio.run(run()) == [False] + [not fails] * 100 + [False]
    assert looks == [LOOPBACK, LOOPBACK, other]


# A loop that is held up, and a process that is stopped


@contextmanager
def held_up(seconds: float, meanwhile: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Hold up the event loop from 0.1 s on, for so long.

    It is something that arrives that does: after that uvloop comes to its timers first.
    """
    loop = asyncio.get_running_loop()
    ours, others = socket.socketpair()

    def hold() -> None:
        loop.remove_reader(ours)
        meanwhile()
        time.sleep(seconds)

    with ours, others:
        loop.add_reader(ours, hold)
        loop.call_later(0.1, others.send, b"x")
        yield


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_what_has_arrived_is_looked_at_before_an_attempt_is_given_up(
    run: Callable[[Coroutine[None, None, dict[int, Verdict]]], dict[int, Verdict]],
) -> None:
    """The kernel sends the SYN again after a second, while the loop sleeps past the timeout."""

    async def check(waiting: dict[int, Callable[[], None]]) -> dict[int, Verdict]:
        def make_room() -> None:
            for make_room_of in waiting.values():
                make_room_of()

        with held_up(2.5, make_room):
            return await attempt_here([*waiting], 0.3)

    with ExitStack() as stack:
        waiting = dict(stack.enter_context(full_backlog()) for _ in range(5))
        assert run(check(waiting)) == dict.fromkeys(waiting, OPEN)


@pytest.mark.parametrize("hold_up", [1.5, 3.0])  # before the timeout ends, and past it
def test_silence_while_the_loop_is_held_up_proves_nothing(hold_up: float) -> None:
    async def check(pacer: OpenConnectionPacer, asked: Sequence[int]) -> dict[int, Verdict]:
        with held_up(hold_up):
            return await attempt_here(asked, 2, pacer)

    with silent_port() as silent, open_port() as opened, refused_port() as refused:
        verdicts = asyncio.run(check(OpenConnectionPacer(), [silent, opened, refused]))
        assert verdicts == {opened: OPEN, refused: REFUSED}

        async def wait_once_more() -> dict[int, Verdict]:
            pacer = OpenConnectionPacer()
            await check(pacer, [silent])
            verdicts: dict[int, Verdict] = {}
            for _ in range(20):  # a busy machine may hold the loop up once more
                verdicts = verdicts or await attempt_here([silent], 2, pacer)
            return verdicts

        assert asyncio.run(wait_once_more()) == {silent: TIMED_OUT}  # of this round alone
        with pytest.raises(CheckFailed, match="it was held up while it waited for answers"):
            asyncio.run(connect_while_held_up(silent, hold_up))


async def connect_while_held_up(port: int, seconds: float) -> object:
    with held_up(seconds):
        return await connect(LOOPBACK, port, 2, OpenConnectionPacer())


def test_hold_ups_are_measured_and_small_delays_are_none() -> None:
    async def measure(*sleeps: float) -> float:
        hold_ups = HoldUps()
        begun = hold_ups.begin()
        for sleep in sleeps:
            time.sleep(sleep)
            await asyncio.sleep(0)
        seconds = hold_ups.end(begun)
        await asyncio.sleep(0.3)
        total = hold_ups.end(begun)
        time.sleep(0.5)  # while nobody waits
        assert hold_ups.end(begun) == total
        return seconds

    # On a busy machine it may take longer once.
    assert any(asyncio.run(measure(0.05)) < 0.05 for _ in range(10))
    assert asyncio.run(measure(0.5, 0.5)) >= 0.7


# What the kernel refuses

REFUSED_CALL_SCRIPT = """
import asyncio, os, sys
from port_checker.addresses import parse_address
from port_checker.connect import CheckFailed, OpenConnectionPacer, WayToTarget, attempt
from tests.support.loopback import open_port, refused_port, silent_port
from tests.support.seccomp import refuse

async def check(host, call):
    with open_port(host) as opened, refused_port(host) as refused, silent_port(host) as silent:
        ports = {opened: "open", refused: "refused", silent: "silent"}
        refuse(call)
        try:
            way = WayToTarget(parse_address(host))
            verdicts = await attempt(way, [*ports], 0.5, OpenConnectionPacer())
        except CheckFailed as failure:
            print(failure)
        else:
            print({ports[port]: verdict.kind.value for port, verdict in verdicts.items()})

host, *calls = sys.argv[1:]
for call in calls:
    if not os.fork():  # which costs less than an interpreter
        asyncio.run(check(host, call))
        break
    os.wait()
"""
ALL_RIGHT = "{'open': 'accessible', 'refused': 'refused', 'silent': 'timed_out'}"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_call_that_is_refused_is_the_checkers_failure(host: str) -> None:
    nice_to_have = ["setsockopt"]
    needed = ["epoll_create1", "socket", "epoll_ctl", "connect", "getsockopt"]
    needed += ["getsockname", "recvmsg"]
    done = subprocess.run(
        [sys.executable, "-c", REFUSED_CALL_SCRIPT, host, *nice_to_have, *needed],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    failure = "could not connect: Operation not permitted"
    assert done.stdout.splitlines() == [ALL_RIGHT] + [failure] * len(needed)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (OSError(12, "Cannot allocate memory"), "could not: Cannot allocate memory"),
        (OSError("no number"), "could not: no number"),
        (MemoryError(), "could not: out of memory"),
        (RuntimeError("can't start new thread"), "could not: can't start new thread"),
    ],
)
def test_what_cannot_be_had_is_the_checkers_failure_in_words(
    trouble: Exception, words: str
) -> None:
    with pytest.raises(CheckFailed) as failure, own_failures("could not"):
        raise trouble
    assert str(failure.value) == words


def test_other_errors_are_bugs() -> None:
    with pytest.raises(RuntimeError, match="a bug"), own_failures("could not"):
        raise RuntimeError("a bug")
