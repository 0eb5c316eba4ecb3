"""Where this machine is: behind a router, in a container, behind a VPN's exit, or in a cloud."""

import contextlib
from ipaddress import IPv4Network
from pathlib import Path

from port_checker.addresses import Address, lies_in
from port_checker.linux import interface_kind
from port_checker.provider.report import Router

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
    # A mark alone says nothing of the network: programs that build images leave it behind, and a
    # container may have its host's network. A tun that is no VPN's is pasta's or slirp4netns'.
    looks_like_containers = kind == "tun" or (
        kind == "veth" and local is not None and lies_in(local, _CONTAINER_NETWORKS)
    )
    if looks_like_containers and _is_container(root):
        return Router.CONTAINER
    identity = root / "sys/class/dmi/id"
    names = ("sys_vendor", "product_name", "chassis_asset_tag")
    if any(cloud in _read(identity / name) for name in names for cloud in _CLOUDS):
        return Router.CLOUD
    return Router.ROUTER


def _is_container(root: Path) -> bool:
    if any((root / mark).exists() for mark in _CONTAINER_MARKS):
        return True
    groups = _read(root / "proc/1/cgroup") + _read(root / "proc/self/cgroup")
    return any(group in groups for group in _CONTAINER_GROUPS)


def _read(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace")
    return ""
