"""The whole flow: real listeners, the real service, and servers with scripts."""

import asyncio
import contextlib
import gc
import os
import re
import threading
from ipaddress import ip_address

import pytest

from port_checker import advice
from port_checker.provider import verify
from port_checker.provider.listeners import Listeners
from tests.support.loopback import free_port, free_ports, is_listened_on, open_listener
from tests.support.namespace import (
    CAP_NET_BIND_SERVICE,
    loopback_alone,
    needs_root,
    without_capability,
)
from tests.support.scripted import (
    REFUSED,
    TELLS_IP,
    Answer,
    accessible,
    check,
    connect,
    connected,
    refused,
    scripted,
    short_waits,
)
from tests.support.service import serve
from tests.support.waiting import wait_until


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_ports_are_reachable_and_confirmed(host: str) -> None:
    ports = free_ports(3)
    heard: list[str] = []
    with serve(host=host, retries=1) as client:
        url = str(client.base_url)
        report = asyncio.run(verify(ports, servers=[url], on_progress=heard.append))
    assert report.ip == host
    assert [(said.url, said.asked, said.error) for said in report.servers] == [(url, True, None)]
    assert [port.port for port in report.ports] == ports
    for port in report.ports:
        assert (port.local, port.reachable, port.confirmed) == ("bound", True, True)
        assert (port.error, port.advice) == (None, None)
        assert port.answers[url].accessible
    assert (report.reachable, report.total) == (3, 3)
    assert f"{url} is checking 3 ports (at most 35 s)" in heard
    assert not any(is_listened_on(port, host) for port in ports)


def test_the_address_that_is_given_is_the_one_that_is_checked() -> None:
    with scripted() as server:
        report = check(free_ports(1), server.url, ip="::ffff:127.0.0.3")
    assert server.addresses == [report.ip] == ["127.0.0.3"]


def test_a_program_keeps_its_port() -> None:
    port = free_port()
    with serve(retries=1) as client, open_listener(port=port) as program:
        (said,) = check([port], str(client.base_url)).ports
        program.settimeout(30)
        program.accept()[0].close()  # the service came here
    assert (said.local, said.reachable, said.confirmed, said.advice) == ("in use", True, None, None)


@needs_root
def test_a_port_that_one_may_not_listen_on() -> None:
    with loopback_alone(), serve(retries=1) as client, without_capability(CAP_NET_BIND_SERVICE):
        low, high = check([80, 20000], str(client.base_url)).ports
    assert (low.local, low.reachable, low.advice) == ("not permitted", False, advice.NOT_PERMITTED)
    assert (high.local, high.reachable, high.confirmed) == ("bound", True, True)


def test_a_connection_that_comes_after_the_answer_confirms() -> None:
    ports = free_ports(2)
    later = threading.Timer(0.5, connect, [ports])

    def check_early(asked: list[int]) -> Answer:
        later.start()
        return accessible(asked)

    with scripted(check_early) as server:
        report = check(ports, server.url, late_connections=30)
    later.join()
    assert report.reachable == 2


def test_what_a_server_says_without_connecting_is_not_confirmed() -> None:
    with scripted(accessible) as server:
        (said,) = check(free_ports(1), server.url, late_connections=0.01).ports
    assert (said.reachable, said.confirmed, said.error) == (False, False, None)
    assert said.advice == advice.ANSWERED_IN_FRONT


@needs_root
def test_lost_answers_of_the_kernel_point_at_the_way_back() -> None:
    lose = "tcp sport 20000 tcp flags '&' '(syn|ack)' == '(syn|ack)' drop"
    setup = (
        "nft add table inet lost",
        "nft add chain inet lost output '{ type filter hook output priority 0; }'",
        f"nft add rule inet lost output {lose}",
    )
    with loopback_alone(*setup), serve(retries=1, timeout=0.3) as client:
        lost, reached = check([20000, 20001], str(client.base_url)).ports
    assert (lost.reachable, lost.error) == (False, "Connection timed out")
    assert lost.advice == advice.WAY_BACK
    assert (reached.reachable, reached.error, reached.advice) == (True, None, None)


# Several servers


def test_servers_are_asked_side_by_side() -> None:
    asked_for_address, asked = threading.Barrier(2), threading.Barrier(2)

    def ip() -> Answer:
        asked_for_address.wait(30)
        return TELLS_IP

    def check_together(ports: list[int]) -> Answer:
        asked.wait(30)
        return connected(ports)

    with scripted(check_together, ip) as one, scripted(check_together, ip) as other:
        report = check(free_ports(2), one.url, other.url)
    assert [server.error for server in report.servers] == [None, None]
    assert report.reachable == 2


def test_one_server_that_reaches_a_port_is_enough() -> None:
    with (
        scripted(lambda _: Answer(b"", 500)) as broken,
        scripted(refused) as unlucky,
        scripted() as lucky,
    ):
        report = check(free_ports(1), broken.url, unlucky.url, lucky.url)
    (said,) = report.ports
    assert (said.reachable, said.confirmed, said.error, said.advice) == (True, True, None, None)
    assert said.answers[unlucky.url].error == REFUSED
    assert said.answers[lucky.url].accessible
    assert [server.asked for server in report.servers] == [False, True, True]


def test_what_is_named_twice_counts_once() -> None:
    one, other = free_ports(2)
    with scripted() as server:
        report = check([other, one, other], server.url, server.url)
    assert server.asked == [sorted([other, one])]
    assert [port.port for port in report.ports] == [other, one]
    assert len(report.servers) == 1


def test_without_a_server_nothing_is_known() -> None:
    report = check(free_ports(1))
    assert (report.ip, report.servers, report.reachable) == (None, [], 0)
    assert report.ports[0].local == "bound"
    assert report.ports[0].advice == advice.NOT_CHECKED.format(reason="no server was asked")


# What the caller does wrong, and what is left behind


WRONG: list[tuple[type[Exception], str, dict[str, object]]] = [
    (ValueError, "0 is not a port", {"ports": [50800, 0]}),
    (ValueError, "65536 is not a port", {"ports": [(50800, 65536)]}),
    (TypeError, "'51800'", {"ports": ["51800"]}),
    (TypeError, "'51800'", {"ports": "51800"}),
    (TypeError, "True", {"ports": [True]}),
    (TypeError, "1.5", {"ports": [1.5]}),
    (TypeError, "(1, 2, 3)", {"ports": [(1, 2, 3)]}),
    (ValueError, "port 1 cannot lead to two", {"ports": [(1, 2), (1, 3)]}),
    (ValueError, "two ports cannot lead to port 3", {"ports": [(1, 3), (2, 3)]}),
    (TypeError, "servers must be a list", {"servers": "http://127.0.0.1:1"}),
    (TypeError, "servers must be a list", {"servers": [None]}),
    (ValueError, "not a valid server URL", {"servers": ["http://"]}),
    (ValueError, "address", {"ip": "localhost"}),
    (ValueError, "address", {"ip": ""}),
    (ValueError, "address", {"ip": "fe80::1%lo"}),
    (TypeError, "7", {"ip": 7}),
    (ValueError, "family must be 4 or 6", {"family": 5}),
    (ValueError, "127.0.0.1 is not an IPv6 address", {"ip": "127.0.0.1", "family": 6}),
]


@pytest.mark.parametrize(("error", "said", "given"), WRONG)
def test_wrong_arguments_are_told_at_the_door(
    error: type[Exception], said: str, given: dict[str, object]
) -> None:
    arguments = {"ports": [50800], "servers": [], **given}
    with pytest.raises(error, match=re.escape(said)):
        asyncio.run(verify(**arguments))  # type: ignore[arg-type]


def test_an_address_may_be_given_as_an_object() -> None:
    with scripted() as server:
        report = asyncio.run(
            verify(free_ports(1), servers=[server.url], ip=ip_address("127.0.0.3"))
        )
    assert report.ip == "127.0.0.3"


def test_other_tasks_run_while_many_listeners_are_opened() -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def listen() -> None:
        counting = asyncio.create_task(count())
        async with Listeners(free_ports(350), 4):
            counting.cancel()

    asyncio.run(listen())
    assert turns >= 7


# What is known about the way to this machine


def test_each_server_is_asked_about_the_address_that_it_sees() -> None:
    with scripted() as one, scripted(ip=Answer({"ip": "127.0.0.2"})) as other:
        report = check(free_ports(1), one.url, other.url)
    assert (one.addresses, other.addresses) == (["127.0.0.1"], ["127.0.0.2"])
    written = f"127.0.0.1 ({one.url}), 127.0.0.2 ({other.url})"
    assert advice.ADDRESSES_DIFFER.format(addresses=written) in report.notes


def test_an_address_of_the_other_family_is_not_checked() -> None:
    with scripted(ip=Answer({"ip": "::1"})) as server:
        report = check(free_ports(1), server.url)
    assert report.servers[0].error == "sees this machine at ::1, not at an IPv4 address"
    assert server.asked == []


def test_a_private_address_that_is_not_this_machines_is_that_of_a_nat() -> None:
    with scripted(refused, ip=Answer({"ip": "172.17.0.1"})) as server:
        report = check(free_ports(1), server.url)
    assert report.ports[0].advice == advice.CALLER_HIDDEN


def test_outer_ports_are_asked_for_and_inner_ports_are_listened_on() -> None:
    inner, outer = free_ports(2)

    def check_through_a_forward(asked: list[int]) -> Answer:
        connect([inner])
        return accessible(asked)

    with scripted(check_through_a_forward) as server:
        report = asyncio.run(verify([(outer, inner)], servers=[server.url], waits=short_waits()))
    assert server.asked == [[outer]]
    (port,) = report.ports
    assert (port.port, port.inner, port.reachable) == (outer, inner, True)


def test_ports_are_bound_before_the_server_is_asked_anything() -> None:
    ports = free_ports(20)
    bound: list[bool] = []

    def ip() -> Answer:
        bound.extend(map(is_listened_on, ports))
        return TELLS_IP

    with scripted(ip=ip) as server:
        check(ports, server.url)
    assert bound == [True] * 20


@needs_root
def test_how_far_a_long_check_is() -> None:
    ports = range(10_000, 12_001)
    told: list[tuple[int, int]] = []
    with loopback_alone(), scripted() as server:
        report = asyncio.run(
            verify(
                ports,
                servers=[server.url],
                on_checked=lambda done, total: told.append((done, total)),
                waits=short_waits(),
            )
        )
    assert report.reachable == 2001
    assert told[-1] == (2001, 2001)
    assert len(told) >= 3


def test_cancelling_closes_the_listeners_at_once() -> None:
    ports = free_ports(20)
    asked, done = threading.Event(), threading.Event()

    def never(_: list[int]) -> Answer:
        asked.set()
        done.wait(60)
        return Answer(b"")

    async def cancel_in_the_middle(url: str) -> None:
        task = asyncio.create_task(verify(ports, servers=[url]))
        await asyncio.to_thread(asked.wait, 60)
        assert all(map(is_listened_on, ports))
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert task.cancelled()
        assert not any(map(is_listened_on, ports))
        assert asyncio.all_tasks() == {asyncio.current_task()}

    with scripted(never) as server:
        try:
            asyncio.run(cancel_in_the_middle(server.url))
        finally:
            done.set()


def test_nothing_is_left_behind() -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    async def check_all(urls: list[str]) -> None:
        before = descriptors()
        report = await verify(free_ports(50), servers=urls, waits=short_waits())
        assert report.reachable == 50
        # The servers' ends are in this process, too, and close a moment later.
        await asyncio.to_thread(wait_until, lambda: descriptors() <= before)
        async with asyncio.timeout(30):  # an answer that was not read to its end closes in turn
            while asyncio.all_tasks() != {asyncio.current_task()}:
                await asyncio.sleep(0)

    endless = Answer(b" " * (8 * 1024 * 1024))
    with (
        scripted() as server,
        scripted(lambda _: endless) as babbler,
        scripted(lambda _: Answer(b"<html>")) as stranger,
    ):
        urls = [server.url, babbler.url, stranger.url, server.url.replace("http:", "https:")]
        gc.collect()  # what earlier tests left
        asyncio.run(check_all(urls))
