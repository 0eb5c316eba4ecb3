"""Temporary listeners: real sockets on loopback."""

import asyncio
import contextlib
import socket
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address

import pytest

from port_checker.addresses import Address
from port_checker.linux import TcpState, _dump, tcp_sockets
from port_checker.provider.listeners import Listeners
from tests.support.loopback import (
    family_of,
    free_port,
    free_ports,
    is_listened_on,
    open_listener,
)
from tests.support.namespace import ROOT, loopback_alone, needs_root
from tests.support.seccomp import refuse


@pytest.mark.parametrize(
    ("ip_version", "hosts"), [(4, ["127.0.0.1", "127.9.9.9"]), (6, ["::1"])], ids=["IPv4", "IPv6"]
)
def test_listeners_are_on_all_addresses_and_see_who_connects(
    ip_version: int, hosts: list[str]
) -> None:
    quiet, *ports = free_ports(1 + len(hosts))

    async def listen() -> None:
        async with Listeners([quiet, *ports], ip_version) as listeners:
            assert {binding.state for binding in listeners.bindings.values()} == {"bound"}
            assert not listeners.seen()
            for host, port in zip(hosts, ports, strict=True):
                await asyncio.to_thread(is_listened_on, port, host)
            await listeners.wait_until_seen(ports, 30)
            assert listeners.seen().keys() == set(ports)
        assert not any(is_listened_on(port, hosts[0]) for port in (quiet, *ports))

    asyncio.run(listen())


def test_waiting_for_connections_ends_when_the_time_is_up() -> None:
    one, other = free_ports(2)

    async def listen() -> None:
        async with Listeners([one, other], 4) as listeners:
            await asyncio.to_thread(is_listened_on, one)
            await listeners.wait_until_seen([one, other], 0.2)
            assert listeners.seen().keys() == {one}
            await listeners.wait_until_seen([], 60)
            await listeners.wait_until_seen([one], 60)

    asyncio.run(asyncio.wait_for(listen(), 30))


def test_listeners_close_whatever_happens() -> None:
    ports = free_ports(3)

    async def fail() -> None:
        async with Listeners(ports, 4):
            assert all(map(is_listened_on, ports))
            raise LookupError

    with pytest.raises(LookupError):
        asyncio.run(fail())
    assert not any(map(is_listened_on, ports))


OUT_OF_FILES_SCRIPT = """
import asyncio, os, resource, sys
from port_checker.provider.listeners import Listeners

async def listen():
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 5, used + 5))
    async with Listeners(map(int, sys.argv[1:]), 4) as listeners:
        return [binding.state for binding in listeners.bindings.values()]

print(*asyncio.run(listen()), sep=",")
"""


def test_out_of_files_concerns_only_the_ports_without_one() -> None:
    words = [sys.executable, "-c", OUT_OF_FILES_SCRIPT, *map(str, free_ports(20))]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    states = done.stdout.strip().split(",")
    assert len(states) == 20
    assert set(states) == {"bound", "failed"}


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_handshake_that_does_not_end_is_half_open(host: str) -> None:
    with open_listener(host) as listener:
        port = listener.getsockname()[1]
        # The kernel ignores the end of a handshake until there are data, or the time is up.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 30)
        assert not tcp_sockets({port}, TcpState.SYN_RECV)
        with socket.create_connection((host, port), 5) as client:
            (half_open,) = tcp_sockets({port}, TcpState.SYN_RECV)
            assert half_open.peer == ip_address(host)
            client.sendall(b"data")
            listener.accept()[0].close()
            assert not tcp_sockets({port}, TcpState.SYN_RECV)


def test_a_kernel_that_does_not_tell_of_sockets_is_not_one_that_has_none() -> None:
    """One without tcp_diag says so at the end of a list, as each does for a protocol like this."""
    protocol = 253  # for experiments (RFC 3692)
    question = struct.pack("=BBxxI48x", socket.AF_INET, protocol, 0x1FFF)
    with pytest.raises(FileNotFoundError):
        list(_dump(20, question, 4))  # SOCK_DIAG_BY_FAMILY, NETLINK_SOCK_DIAG


KEEP_BACK = (
    "nft add table inet filter",
    "nft add chain inet filter output { type filter hook output priority 0 \\; }",
)


@needs_root
def test_a_half_open_connection_is_remembered() -> None:
    """The kernel gives it up after a second, since it cannot repeat its answer."""

    async def remembered(port: int) -> dict[int, set[Address]]:
        async with Listeners([port], 4) as listeners:
            with socket.socket() as client:
                client.setblocking(False)
                client.connect_ex(("127.0.0.1", port))
                while not listeners.half_open():
                    await asyncio.sleep(0.01)
            while tcp_sockets({port}, TcpState.SYN_RECV):
                await asyncio.sleep(0.01)
            return listeners.half_open()

    port = free_port()
    keep_back = f"nft add rule inet filter output tcp sport {port} drop"
    with loopback_alone(*KEEP_BACK, keep_back):
        assert asyncio.run(remembered(port)) == {port: {ip_address("127.0.0.1")}}


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_every_port_can_be_bound_afterwards_without_reuseaddr(host: str) -> None:
    ports = free_ports(100)  # more than connections are held

    async def listen() -> None:
        async with Listeners(ports, 6 if ":" in host else 4) as listeners:
            for port in ports:
                await asyncio.to_thread(is_listened_on, port, host)
            await listeners.wait_until_seen(ports, 30)
            assert listeners.seen().keys() == set(ports)

    asyncio.run(listen())
    with contextlib.ExitStack() as stack:
        for port in ports:
            sock = stack.enter_context(socket.socket(family_of(host)))
            sock.bind((host, port))
            sock.listen()


def local_binding(port: int, ip_version: int = 4) -> str:
    async def listen() -> str:
        async with Listeners([port], ip_version) as listeners:
            return listeners.bindings[port].state

    return asyncio.run(listen())


def test_an_outgoing_connection_is_told_from_a_program_that_listens() -> None:
    with open_listener() as listener, socket.socket() as outgoing:
        outgoing.bind(("127.0.0.1", 0))
        outgoing.connect(listener.getsockname())
        assert local_binding(listener.getsockname()[1]) == "in use"
        assert local_binding(outgoing.getsockname()[1]) == "outgoing connection"


def test_a_sandbox_without_netlink_has_the_kernels_tables() -> None:
    def bindings(*ports: int) -> list[str]:
        refuse("socket of netlink")  # for this thread
        with pytest.raises(OSError, match="Address family"):
            socket.socket(socket.AF_NETLINK)
        return [local_binding(port) for port in ports]

    with open_listener() as listener, socket.create_connection(listener.getsockname()) as outgoing:
        ports = listener.getsockname()[1], outgoing.getsockname()[1]
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(bindings, *ports).result() == ["in use", "outgoing connection"]


def test_a_port_that_is_held_without_listening_is_in_use() -> None:
    port = free_port()  # no connection of another program has it at another address
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", port))
        assert local_binding(port) == "in use"


@pytest.mark.parametrize(("ip_version", "host"), [(4, "::"), (6, "0.0.0.0")])  # noqa: S104  # closed at once
def test_a_program_on_the_other_family_alone_has_the_port(ip_version: int, host: str) -> None:
    with open_listener(host) as listener:
        port = listener.getsockname()[1]
        assert local_binding(port, ip_version) == "in use"


def test_checks_of_both_families_do_not_take_each_other_for_programs() -> None:
    port = free_port()

    async def listen() -> None:
        async with Listeners([port], 4) as one, Listeners([port], 6) as other:
            assert one.bindings[port].state == other.bindings[port].state == "bound"

    asyncio.run(listen())


def test_an_accepted_connection_of_a_closed_listener_is_no_outgoing_one() -> None:
    with socket.socket() as listener, socket.socket() as client:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        client.connect(listener.getsockname())  # from an ephemeral port
        port = listener.getsockname()[1]
        with listener.accept()[0]:
            listener.close()
            assert local_binding(port) == "in use"


def test_a_second_check_of_the_same_ports_says_so() -> None:
    port = free_port()

    async def listen() -> None:
        async with Listeners([port], 4), Listeners([port], 4) as second:
            assert (second.bindings[port].state, second.bindings[port].checked) == ("in use", True)

    asyncio.run(listen())
