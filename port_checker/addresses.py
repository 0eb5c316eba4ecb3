"""IP addresses and networks, as every other module understands them.

One rule is here so that it holds everywhere: an IPv4-mapped IPv6 address (``::ffff:a.b.c.d``,
RFC 4291 section 2.5.5.2) *is* the IPv4 address that it wraps; the kernel reaches it over IPv4.
"""

import functools
import ipaddress
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

MAX_PORT: Final = 65535
# Ports below are well-known, and for root, unless ip_unprivileged_port_start says otherwise.
MIN_UNPRIVILEGED_PORT: Final = 1024

# The longest literal: eight groups, the last two as dotted IPv4 (INET6_ADDRSTRLEN less its NUL).
_LONGEST_LITERAL = 45
_MAPPED = IPv6Network("::ffff:0:0/96")


class _IPv4(IPv4Address):
    """One that is hashed, and asked whether it is a loopback address, several times in a request.

    For the first, the standard library's writes a text each time, and for the second it looks into
    a network: together 7 % of the instructions of a check of one port (measured).
    """

    __slots__ = ("_hash", "is_loopback")
    is_loopback: bool

    def __init__(self, address: int) -> None:
        super().__init__(address)
        self._hash = super().__hash__()
        self.is_loopback = address >> 24 == 127

    def __hash__(self) -> int:
        return self._hash


@functools.lru_cache(maxsize=1024)  # a check names the same few addresses again and again
def parse_address(text: str) -> Address:
    """Return the address that an IPv4 or IPv6 literal stands for.

    Args:
        text: The literal alone: no scope id (``fe80::1%eth0``), brackets, port or white space.

    Raises:
        ValueError: ``text`` is anything else.
    """
    if len(text) > _LONGEST_LITERAL or "%" in text:
        raise ValueError("not an IPv4 or IPv6 address")
    address = ipaddress.ip_address(text)
    if isinstance(address, IPv6Address):
        if not address.ipv4_mapped:
            return address
        address = address.ipv4_mapped
    return _IPv4(int(address))


@functools.lru_cache(maxsize=1024)
def unpack_address(packed: bytes) -> Address:
    """Return the address that 4 or 16 bytes stand for."""
    return parse_address(str(ipaddress.ip_address(packed)))


@functools.lru_cache(maxsize=1024)
def parse_host(host: str) -> Address:
    """Return the address of an end of a socket, as ``getsockname`` and ASGI servers have it.

    A link-local one has a scope id (RFC 4007), which only means something on this machine.

    Raises:
        ValueError: ``host`` is not an address: that of a Unix socket, say.
    """
    return parse_address(host.partition("%")[0])


@functools.lru_cache(maxsize=1024)  # a request writes the same one or two, several times
def text_of(address: Address) -> str:
    """Return an address as people write it."""
    return str(address)


def parse_networks(text: str) -> tuple[Network, ...]:
    """Return the networks of a comma-separated list; an address alone is a network of one.

    Raises:
        ValueError: An entry is not a network, or has bits set to the right of its prefix.
    """
    return tuple(_parse_network(entry.strip()) for entry in text.split(",") if entry.strip())


def _parse_network(text: str) -> Network:
    network = ipaddress.ip_network(text)
    if isinstance(network, IPv6Network) and network.subnet_of(_MAPPED):
        mapped = network.network_address.ipv4_mapped
        return IPv4Network((mapped or 0, network.prefixlen - 96))
    return network


def lies_in(address: Address, networks: Iterable[Network]) -> bool:
    """Whether ``address`` lies in one of ``networks``."""
    # any() makes a generator: 0.7 us more, several times in each request (measured).
    for network in networks:  # noqa: SIM110
        if address in network:
            return True
    return False


@functools.lru_cache(maxsize=1024)  # a request needs the same two or three, several times
def subscriber(address: Address) -> str:
    """Return the network that one subscriber has: an IPv4 address, or an IPv6 /64 (RFC 6177).

    Whoever has one address of a /64 has all of them, so counting by address would be pointless.
    """
    if isinstance(address, IPv6Address):
        return _prefix(address, 64)
    return str(address)


def site(address: Address | None) -> str | None:
    """Return the /48 of an IPv6 address, the most that one site is given (RFC 6177); else None."""
    return _prefix(address, 48) if isinstance(address, IPv6Address) else None


def have_one_subscriber(one: Address | None, other: Address | None) -> bool:
    """Whether two addresses belong to one subscriber; an unknown address belongs to nobody."""
    if one is None or other is None:
        return False
    return one is other or subscriber(one) == subscriber(other)


@functools.lru_cache(maxsize=1024)
def _prefix(address: IPv6Address, length: int) -> str:
    # IPv6Network() does the same in four times the time, and each request needs one or two.
    host_bits = 128 - length
    return f"{IPv6Address(int(address) >> host_bits << host_bits)}/{length}"
