"""Which addresses may be checked, and whether this machine has a route to them.

Anyone can ask this service to connect somewhere. These rules keep it from being used as a port
scanner of other people's machines and of the network it runs in.
"""

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Hashable
from ipaddress import IPv4Network, IPv6Address, IPv6Network
from typing import TypeVar, cast

from port_checker.addresses import Address, Network, lies_in
from port_checker.connect import CheckFailed, own_failures
from port_checker.errors import ErrorCode, ServiceError
from port_checker.linux import (
    Route,
    RouteChanges,
    RouteType,
    is_next_hop,
    route_to,
    route_type,
)
from port_checker.settings import Settings

logger = logging.getLogger(__name__)


class TargetNotAllowed(ServiceError):
    """The caller may not have this target checked."""

    code = ErrorCode.TARGET_NOT_ALLOWED


_LINK_LOCAL = "a link-local address"

# The IANA special-purpose address registries, row by row (as of 2025-10), and the multicast blocks
# of the address space registries. None of these is a provider's address: even the "globally
# reachable" ones are anycast services, which the checker's own network answers.
# https://www.iana.org/assignments/iana-ipv4-special-registry
_SPECIAL_IPV4: dict[Network, str] = {
    IPv4Network("0.0.0.0/8"): "an address of this network",  # RFC 791
    IPv4Network("10.0.0.0/8"): "a private address",  # RFC 1918
    IPv4Network("100.64.0.0/10"): "a shared address (CGNAT)",  # RFC 6598
    IPv4Network("127.0.0.0/8"): "a loopback address",  # RFC 1122
    IPv4Network("169.254.0.0/16"): _LINK_LOCAL,  # RFC 3927
    IPv4Network("172.16.0.0/12"): "a private address",  # RFC 1918
    IPv4Network("192.0.0.0/24"): "reserved for protocols",  # RFC 6890; dummy, PCP, TURN, NAT64
    IPv4Network("192.0.2.0/24"): "a documentation address",  # RFC 5737
    IPv4Network("192.31.196.0/24"): "an AS112 anycast address",  # RFC 7535
    IPv4Network("192.52.193.0/24"): "an AMT anycast address",  # RFC 7450
    IPv4Network("192.88.99.0/24"): "a 6to4 relay's anycast address",  # RFC 7526
    IPv4Network("192.168.0.0/16"): "a private address",  # RFC 1918
    IPv4Network("192.175.48.0/24"): "an AS112 anycast address",  # RFC 7534
    IPv4Network("198.18.0.0/15"): "a benchmarking address",  # RFC 2544
    IPv4Network("198.51.100.0/24"): "a documentation address",  # RFC 5737
    IPv4Network("203.0.113.0/24"): "a documentation address",  # RFC 5737
    IPv4Network("224.0.0.0/4"): "a multicast address",  # RFC 5771
    IPv4Network("240.0.0.0/4"): "a reserved address",  # RFC 1112; with 255.255.255.255
}
# https://www.iana.org/assignments/iana-ipv6-special-registry
_SPECIAL_IPV6: dict[Network, str] = {
    IPv6Network("::1/128"): "a loopback address",  # RFC 4291
    IPv6Network("::/128"): "the unspecified address",  # RFC 4291
    IPv6Network("::/96"): "an IPv4-compatible address",  # RFC 4291, deprecated
    IPv6Network("64:ff9b::/96"): "an IPv4 address behind NAT64",  # RFC 6052
    IPv6Network("64:ff9b:1::/48"): "an IPv4 address behind NAT64",  # RFC 8215
    IPv6Network("100::/64"): "a discard-only address",  # RFC 6666
    IPv6Network("100:0:0:1::/64"): "a dummy address",  # RFC 9780
    IPv6Network("2001::/32"): "an IPv4 address behind Teredo",  # RFC 4380
    IPv6Network("2001:2::/48"): "a benchmarking address",  # RFC 5180
    IPv6Network("2001::/23"): "reserved for protocols",  # RFC 2928; AMT, AS112, ORCHID, DRIP
    IPv6Network("2001:db8::/32"): "a documentation address",  # RFC 3849
    IPv6Network("2002::/16"): "an IPv4 address behind 6to4",  # RFC 3056
    IPv6Network("2620:4f:8000::/48"): "an AS112 anycast address",  # RFC 7534
    IPv6Network("3fff::/20"): "a documentation address",  # RFC 9637
    IPv6Network("5f00::/16"): "a segment routing identifier",  # RFC 9602
    IPv6Network("fc00::/7"): "a private address",  # RFC 4193
    IPv6Network("fe80::/10"): _LINK_LOCAL,  # RFC 4291
    IPv6Network("ff00::/8"): "a multicast address",  # RFC 4291
}
# Public addresses that lead into the cloud that the checker runs in, not to anybody's machine.
_CLOUD_INTERNAL: dict[Network, str] = {
    # https://learn.microsoft.com/azure/virtual-network/what-is-ip-address-168-63-129-16
    IPv4Network("168.63.129.16/32"): "Azure's own address",
    # https://cloud.google.com/vpc/docs/configure-private-google-access
    IPv4Network("199.36.153.4/30"): "Google Cloud's own address",
    IPv4Network("199.36.153.8/30"): "Google Cloud's own address",
    IPv6Network("2600:2d00:2:1000::/64"): "Google Cloud's own address",
    IPv6Network("2600:2d00:2:2000::/64"): "Google Cloud's own address",
    # https://cloud.ibm.com/docs/vpc?topic=vpc-service-endpoints-for-vpc
    IPv4Network("161.26.0.0/16"): "IBM Cloud's own address",
    IPv4Network("166.8.0.0/14"): "IBM Cloud's own address",
}


def _by_prefix(version: int) -> list[tuple[int, dict[int, str]]]:
    """Return the networks above by how many bits an address has behind their prefix, and prefix.

    Few prefixes are that long, so a look-up takes 2 us instead of the 20 us of a walk (measured).
    """
    tables: dict[int, dict[int, str]] = {}
    for network, name in (_SPECIAL_IPV4 | _SPECIAL_IPV6 | _CLOUD_INTERNAL).items():
        if network.version == version:
            bits = network.max_prefixlen - network.prefixlen
            tables.setdefault(bits, {})[int(network.network_address) >> bits] = name
    return sorted(tables.items())


_NOT_PUBLIC = {version: _by_prefix(version) for version in (4, 6)}

# The most answers that are kept, and for how many seconds: the kernel announces no change when a
# route expires (an IPv6 router's lifetime, RFC 4861).
_MOST_KNOWN = 1024
_LONGEST_KNOWN = 10.0

_T = TypeVar("_T")

_OWN_ROUTES = {RouteType.LOCAL, RouteType.BROADCAST, RouteType.ANYCAST}

_GLOBAL_UNICAST_IPV6 = IPv6Network("2000::/3")  # RFC 4291 section 2.4


@functools.lru_cache(maxsize=1024)  # a request asks twice about the same address
def special_purpose(address: Address) -> str | None:
    """Return what kind of address this is if it is not public unicast, and None if it is.

    Only the tables above decide, so the answer is the same with every version of Python.
    """
    number = int(address)
    for bits, names in _NOT_PUBLIC[address.version]:  # the narrowest networks first
        if name := names.get(number >> bits):
            return name
    if isinstance(address, IPv6Address) and address not in _GLOBAL_UNICAST_IPV6:
        return "a reserved address"
    return None


def is_own_address(address: Address) -> bool:
    """Whether ``address`` is one of this machine's, or a broadcast address of its networks.

    The kernel's routing table knows all of these: the addresses of interfaces, addresses that are
    routed to this machine (``ip route add local``), and subnets' anycast and broadcast addresses.

    Raises:
        CheckFailed: The kernel could not be asked, for example because no descriptor is left.
    """
    with own_failures(f"cannot look up the route to {address}"):
        return route_type(address) in _OWN_ROUTES


class KnownRoutes:
    """Remembers the kernel's answers about routes until it announces a change.

    For one thread.

    Args:
        clock: Tells the seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._changes = RouteChanges()
        self._known: dict[tuple[Hashable, Address], object] = {}
        self._since = clock()

    def close(self) -> None:
        """Give back what it has of the kernel."""
        self._changes.close()

    def is_own(self, address: Address) -> bool:
        """Whether an address is this machine's, as ``is_own_address`` has it."""
        return self.ask(is_own_address, address)

    def route_to(self, address: Address) -> Route | None:
        """Return the kernel's route to an address, as ``linux.route_to`` has it."""
        return self.ask(route_to, address)

    def ask(self, question: Callable[[Address], _T], address: Address) -> _T:
        """Return the answer to a question about an address; ask the kernel unless it is known.

        Raises:
            OSError, CheckFailed: As the question does.
        """
        known = self._current()
        key = question, address
        if key not in known:
            known[key] = question(address)
        return cast(_T, known[key])

    async def ask_in_thread(self, question: Callable[[Address], _T], address: Address) -> _T:
        """Do as ``ask`` does, but let a thread wait for the kernel."""
        known = self._current()
        key = question, address
        if key not in known:
            known[key] = await asyncio.to_thread(question, address)
        return cast(_T, known[key])

    def _current(self) -> dict[tuple[Hashable, Address], object]:
        now = self._clock()
        is_old = now - self._since > _LONGEST_KNOWN or len(self._known) >= _MOST_KNOWN
        if self._changes.since_last() or is_old:
            # Not cleared: whoever is asking the kernel now may still write to the old one.
            self._known, self._since = {}, now
        return self._known


class TargetRules:
    """Decides which addresses a caller may have checked.

    Args:
        settings: ``targets``, ``allowed_networks`` and ``denied_networks`` are used.
        is_own: Whether an address is one of this machine's. Others may not have those checked,
            because a connection from a machine to itself bypasses its firewall.
        is_gateway: Whether an address is the next hop of a route of this machine's. It runs in a
            thread, since that takes 0.15 s for each 100,000 routes (measured).
        is_relay: Whether others' requests come from an address of this machine's own.
        known: Remembers the kernel's answers.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        is_own: Callable[[Address], bool] = is_own_address,
        is_gateway: Callable[[Address], bool] = is_next_hop,
        is_relay: Callable[[Address], bool] = lambda _: False,
        known: KnownRoutes | None = None,
    ) -> None:
        self._known = known or KnownRoutes()
        self._settings = settings
        self._is_own = is_own
        self._is_gateway = is_gateway
        self._is_relay = is_relay
        self._has_warned = False

    async def require_allowed(self, caller: Address | None, target: Address) -> None:
        """Refuse a target that ``caller`` may not have checked.

        Args:
            caller: Who asks; None if unknown, and then nothing is the caller's own address.
            target: The address to check.

        Raises:
            TargetNotAllowed: The message says why, and which address the caller may check.
            CheckFailed: The kernel could not be asked about its routes.
        """
        settings = self._settings
        if settings.denied_networks and lies_in(target, settings.denied_networks):
            raise TargetNotAllowed(f"{target} is in a network that this service does not check.")
        special = special_purpose(target)
        if target == caller:
            if special and not lies_in(target, settings.allowed_networks):
                await self._require_callers_own(target, special)
            return
        if lies_in(target, settings.allowed_networks):
            return
        if caller:
            instead = f"You may check your own address, {caller}."
        else:
            instead = "You may check your own address, but this service cannot see which that is."
        if special:
            raise TargetNotAllowed(f"{target} is {special}. {instead}")
        if settings.targets == "caller":
            raise TargetNotAllowed(
                f"This service does not check other addresses than the caller's. {instead}"
            )
        if self._known.ask(self._is_own, target):
            raise TargetNotAllowed(f"{target} is this service's own address. {instead}")

    async def _require_callers_own(self, address: Address, special: str) -> None:
        """Refuse an address that requests come from and that cannot be their caller's own."""
        if special == _LINK_LOCAL:
            raise TargetNotAllowed(
                f"{address} is {special}, which only means something on its own link. "
                "Connect to this service from another address."
            )
        if self._is_relay(address):
            raise TargetNotAllowed(
                f"{address} is this service's own address, from which others' requests come as "
                "well. This service cannot see your own address behind it."
            )
        if address.is_loopback:
            return
        with own_failures(f"cannot look up the routes through {address}"):
            if not await self._known.ask_in_thread(self._is_gateway, address):
                return
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "Requests come from %s, a gateway of this machine: a NAT in front of this service "
                "hides its callers, so that they cannot check their own addresses. Let their "
                "addresses through (Docker: --network host, or turn off userland-proxy), or have a "
                "proxy there set X-Forwarded-For and add it to PORT_CHECKER_TRUSTED_PROXIES. If %s "
                "itself may be checked, add it to PORT_CHECK_ALLOWED_NETWORKS.",
                address,
                address,
            )
        raise TargetNotAllowed(
            f"{address} is the address of a gateway. This service cannot see your own address "
            "behind it."
        )


def verify_local_binding(
    target: Address, find_route: Callable[[Address], Route | None] = route_to
) -> None:
    """Verify that this machine has a route to ``target``, and a source address that reaches it.

    Args:
        target: Its address.
        find_route: Asks the kernel for its route to an address.

    Raises:
        CheckFailed: It has none, for example because the machine has no IPv6.
    """
    with own_failures(f"cannot look up the route to {target}"):
        route = find_route(target)
    if route is None:
        raise CheckFailed(f"this machine has no route to {target}")
    if trouble := route.source_trouble(target):
        raise CheckFailed(trouble)
