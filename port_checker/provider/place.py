"""Where this machine is: behind a router, in a container, behind a VPN's exit, or in a cloud.

And what the network before it does with whole addresses: shares them out, or loops them back.
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
# Seconds in which one's own router answers; it is near.
_LOOP_PATIENCE = 1.0
# Ports of a block in an address that is shared by ports, in bits: MAP-E's are of 16, as a rule.
_BLOCK_BITS = range(10, 1, -1)
_LIKELY_BLOCK = 8


def place_of(contact: Contact | None, family: int) -> Place:
    """Tell what is known of the way from a server to this machine.

    Args:
        contact: The server; None if there is none.
        family: 4 or 6: the version of the address that it checks.
    """
    address = contact.address if contact else None
    if not contact or not address:
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
    """Tell what stands between this machine and the internet, for its addresses are translated.

    Args:
        interface: Where connections to the internet leave.
        local: This machine's address there.
        root: Where the files are that tell.
    """
    kind = interface_kind(interface)
    if kind == "wireguard" or interface.startswith(_VPN_NAMES):
        return Router.VPN
    if is_shared(local):
        return Router.SHARED
    # A mark alone says nothing of the network: programs that build images leave it behind, and a
    # container may have its host's network. A tun that is no VPN's is pasta's or slirp4netns'.
    looks_like_containers = kind == "tun" or (
        kind == "veth" and local is not None and lies_in(local, _CONTAINER_NETWORKS)
    )
    if looks_like_containers and _is_container(root):
        return Router.CONTAINER
    identity = root / "sys/class/dmi/id"
    names = ("sys_vendor", "product_name", "chassis_asset_tag")
    if any(cloud in read_text(identity / name) for name in names for cloud in _CLOUDS):
        return Router.CLOUD
    return Router.ROUTER


def is_shared(local: Address | None) -> bool:
    """Whether a local address is of those that internet providers share out behind their NAT."""
    return isinstance(local, IPv4Address) and lies_in(local, _SHARED_NETWORKS)


class Share(NamedTuple):
    """The ports of an address that one customer has, where others have the others (RFC 7597).

    Attributes:
        size: The ports in each block.
        certain: Whether several blocks make the pattern.
    """

    size: int
    certain: bool


def share_of(reached: Collection[int], lost: Collection[int]) -> Share | None:
    """Recognize the ports of one customer of a shared address by which ones got through.

    The blocks have 2^m ports, begin at multiples of that, and the lowest bits of their numbers are
    the customer's (RFC 7597 section 5.1): they lie at equal distances. Of the ports that were asked
    about, it is all of those and no other.
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
    """Whether a connection of this machine's to its own public address comes back to it.

    Args:
        address: The public address, which is not this machine's.
        port: A port that the world reaches there, and at which a listener stands.
        listeners: Which see the connection come.
        local_ports: From where to connect.
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
