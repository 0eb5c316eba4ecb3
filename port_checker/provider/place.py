"""Where this machine is: behind a router, in a container, behind a VPN's exit, or in a cloud.

And what the network in front of it does with addresses: shares them out, or loops them back.
"""

import asyncio
import socket
from collections import Counter
from collections.abc import Collection
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import NamedTuple

from port_checker.addresses import Address, lies_in
from port_checker.linux import interface_kind, read_text, way_to, xdp_interface
from port_checker.provider.http_client import LocalPorts
from port_checker.provider.listeners import Listeners
from port_checker.provider.origin import Contact, is_own
from port_checker.provider.report import Place, PortPair, Router

# What internet providers share out behind NATs of their own: CGNAT (RFC 6598) and DS-Lite or
# 464XLAT (RFC 7335).
_SHARED_NETWORKS = [IPv4Network("100.64.0.0/10"), IPv4Network("192.0.0.0/29")]

# Docker's and Podman's networks by default; slirp4netns has 10.0.2.0/24.
_CONTAINER_NETWORKS = [
    IPv4Network("172.16.0.0/12"),
    IPv4Network("10.88.0.0/15"),
    IPv4Network("10.0.2.0/24"),
]
# What runtimes leave in a container.
_CONTAINER_MARKS = [".dockerenv", "run/.containerenv"]
_CONTAINER_GROUPS = ("docker", "libpod", "kubepods", "containerd", "lxc")
_VPN_NAMES = ("wg", "tun", "tailscale", "nordlynx", "proton", "mullvad", "ipsec", "vpn", "zt")
# What clouds write into their machines' DMI (sys_vendor, product_name, chassis_asset_tag).
_CLOUDS = (
    "Amazon EC2",
    "Google Compute Engine",
    "7783-7084-3265-9085-8269-3286-77",  # Azure; its vendor is that of a PC's hypervisor, too
    "OracleCloud",
    "Alibaba Cloud",
    "Tencent Cloud",
    "HUAWEICLOUD",
    "OpenStack",
)
# Seconds within which this machine's own router, which is near, answers.
_LOOP_PATIENCE = 1.0
# Ports in each block of one customer of a shared address, as powers of two: MAP-E's blocks have 16,
# as a rule.
_BLOCK_BITS = range(10, 1, -1)
_LIKELY_BLOCK = 8


def place_of(contact: Contact, family: int) -> Place:
    """Return what is known of the way from a server to this machine.

    Args:
        contact: The server.
        family: 4 or 6: the version of the address that it checks.
    """
    address = contact.address
    if not address:
        return Place(family=family)
    own = is_own(address)
    remote = contact.remote
    way = way_to(remote if remote and remote.version == family else address)
    local = contact.local if contact.local and contact.local.version == family else None
    local = local or (way.source if way else None)
    return Place(
        own_address=own,
        caller_hidden=not (own or contact.given or address.is_global),
        family=family,
        address=address if own else local,
        router=router_of(way.interface, local) if way and not own else Router.ROUTER,
        interface=way.interface if way else "",
        xdp=xdp_interface(),
    )


def router_of(interface: str, local: Address | None, root: Path = Path("/")) -> Router:
    """Return what translates addresses between this machine and the internet.

    Args:
        interface: Where connections to the internet leave.
        local: This machine's address there.
        root: The directory that is ``/`` to this machine.
    """
    kind = interface_kind(interface)
    if kind == "wireguard" or interface.startswith(_VPN_NAMES):
        return Router.VPN
    if is_shared(local):
        return Router.SHARED
    # A mark alone says nothing about the network: programs that build images leave it behind, and
    # a container may have its host's network. A tun that no VPN has is pasta's or slirp4netns'.
    has_container_network = kind == "tun" or (
        kind == "veth" and local is not None and lies_in(local, _CONTAINER_NETWORKS)
    )
    if has_container_network and _is_container(root):
        return Router.CONTAINER
    identity = root / "sys/class/dmi/id"
    names = ("sys_vendor", "product_name", "chassis_asset_tag")
    if any(cloud in read_text(identity / name) for name in names for cloud in _CLOUDS):
        return Router.CLOUD
    return Router.ROUTER


def is_shared(local: Address | None) -> bool:
    """Whether a local address is one that internet providers give out behind a NAT of their own."""
    return isinstance(local, IPv4Address) and lies_in(local, _SHARED_NETWORKS)


class Share(NamedTuple):
    """One customer's ports of an address that is shared by ports (RFC 7597).

    Attributes:
        size: How many ports each block has.
        certain: Whether several blocks show the pattern.
    """

    size: int
    certain: bool


def share_of(reached: Collection[int], lost: Collection[int]) -> Share | None:
    """Recognize one customer's ports of a shared address by which ports got through.

    Blocks have 2^m ports and begin at multiples of that. The lowest bits of a block's number name
    the customer (RFC 7597 section 5.1), so a customer's blocks lie at equal distances. Of the ports
    that were asked about, exactly those in the customer's blocks get through.
    """
    for bits in _BLOCK_BITS:
        blocks = Counter(port >> bits for port in reached)
        others = {port >> bits for port in lost}
        has_whole_block = 1 << bits in blocks.values()  # the first and last may be asked in part
        if not others or not has_whole_block or not others.isdisjoint(blocks):
            continue
        if len(blocks) > 1:
            for mask in (2**length - 1 for length in range(1, 16 - bits)):
                customers = {block & mask for block in blocks}
                if len(customers) == 1 and not any(block & mask in customers for block in others):
                    return Share(1 << bits, certain=True)
        elif 1 << bits >= _LIKELY_BLOCK and {min(reached) - 1, max(reached) + 1} <= set(lost):
            return Share(1 << bits, certain=False)
    return None


async def loops_back(
    address: IPv4Address, port: PortPair, listeners: Listeners, local_ports: LocalPorts
) -> bool:
    """Whether a connection from this machine to its own public address comes back to it.

    Args:
        address: The public address, which its router has.
        port: A port that the world reaches there, on which a listener is open.
        listeners: What sees the connection come.
        local_ports: The ports from which to connect.
    """
    start = listeners.clock
    with socket.socket() as sock:
        sock.setblocking(False)
        try:
            local_ports.bind(sock)
            async with asyncio.timeout(_LOOP_PATIENCE):
                await asyncio.get_running_loop().sock_connect(sock, (str(address), port.outer))
        except OSError:  # TimeoutError is one
            return False
        await listeners.wait_until_seen(
            [port.inner], _LOOP_PATIENCE, since=start, ignored=lambda peer: peer.is_loopback
        )
    return any(not peer.is_loopback for peer in listeners.seen(start).get(port.inner, ()))


def _is_container(root: Path) -> bool:
    if any((root / mark).exists() for mark in _CONTAINER_MARKS):
        return True
    groups = read_text(root / "proc/1/cgroup") + read_text(root / "proc/self/cgroup")
    return any(group in groups for group in _CONTAINER_GROUPS)
