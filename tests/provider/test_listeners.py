"""Temporary listeners: real sockets on loopback."""

import asyncio
import socket
import subprocess
import sys

import pytest

from port_checker.linux import half_open_ports
from port_checker.provider.listeners import Listeners
from tests.support.loopback import free_port, free_ports, is_listened_on, open_listener
from tests.support.namespace import ROOT


@pytest.mark.parametrize(
    ("ip_version", "hosts"), [(4, ["127.0.0.1", "127.9.9.9"]), (6, ["::1"])], ids=["IPv4", "IPv6"]
)
def test_listeners_are_on_all_addresses_and_see_who_connects(
    ip_version: int, hosts: list[str]
) -> None:
    quiet, *ports = free_ports(1 + len(hosts))

    async def listen() -> None:
        with Listeners([quiet, *ports], ip_version) as listeners:
            assert set(listeners.local.values()) == {"bound"}
            assert listeners.seen == set()
            for host, port in zip(hosts, ports, strict=True):
                await asyncio.to_thread(is_listened_on, port, host)
            await listeners.wait_until_seen(ports, 30)
            assert listeners.seen == set(ports)
        assert not any(is_listened_on(port, hosts[0]) for port in (quiet, *ports))

    asyncio.run(listen())


def test_waiting_for_connections_ends_when_the_time_is_up() -> None:
    one, other = free_ports(2)

    async def listen() -> None:
        with Listeners([one, other], 4) as listeners:
            await asyncio.to_thread(is_listened_on, one)
            await listeners.wait_until_seen([one, other], 0.2)
            assert listeners.seen == {one}
            await listeners.wait_until_seen([], 60)
            await listeners.wait_until_seen([one], 60)

    asyncio.run(asyncio.wait_for(listen(), 30))


def test_listeners_close_whatever_happens() -> None:
    ports = free_ports(3)

    async def fail() -> None:
        with Listeners(ports, 4):
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
    with Listeners(map(int, sys.argv[1:]), 4) as listeners:
        return listeners.local

print(*asyncio.run(listen()).values(), sep=",")
"""


def test_out_of_files_concerns_only_the_ports_without_one() -> None:
    words = [sys.executable, "-c", OUT_OF_FILES_SCRIPT, *map(str, free_ports(20))]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    local = done.stdout.strip().split(",")
    assert len(local) == 20
    assert set(local) == {"bound", "failed"}


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_handshake_that_does_not_end_is_half_open(host: str) -> None:
    with open_listener(host) as listener:
        port = listener.getsockname()[1]
        # The kernel ignores the end of a handshake until there are data, or the time is up.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 30)
        assert port not in half_open_ports()
        with socket.create_connection((host, port), 5) as client:
            assert port in half_open_ports()
            client.sendall(b"data")
            listener.accept()[0].close()
            assert port not in half_open_ports()


def test_ports_are_free_again_at_once() -> None:
    port = free_port()

    async def listen() -> None:
        with Listeners([port], 4) as listeners:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            # The listener closes first, so that the connection stays in TIME_WAIT at this port.
            assert await reader.read() == b""
            writer.close()
            await writer.wait_closed()
            assert listeners.seen == {port}
        with Listeners([port], 4) as listeners:
            assert listeners.local == {port: "bound"}

    asyncio.run(listen())
