"""What only Linux tells: descriptors, routes, and what the kernel knows of TCP connections.

All of it is asked of the kernel at the moment of the call; nothing is kept.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import resource
import select
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import ip_address, ip_network
from pathlib import Path

from port_checker.addresses import Address, Network, parse_address, parse_host, unpack_address

# linux/rtnetlink.h and linux/netlink.h
_RTM_GETROUTE, _RTA_DST, _NLM_F_REQUEST, _NLMSG_ERROR = 26, 1, 1, 2
_RTA_SRC, _RTA_IIF, _RTA_OIF, _RTA_PREFSRC, _RTA_IP_PROTO = 2, 3, 4, 7, 27
_RTA_DPORT = 29
_RTM_GETNEIGH, _NDA_DST, _NDA_PROBES = 30, 1, 4  # and linux/neighbour.h
_NUD_INCOMPLETE, _NUD_PROBE, _NUD_FAILED = 0x01, 0x10, 0x20
_IFF_RUNNING, _IFF_NOARP = 0x40, 0x80  # linux/if.h
_RTM_GETADDR, _IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 22, 1, 2, 8  # and linux/if_addr.h
_IFA_F_TEMPORARY, _IFA_F_DEPRECATED = 0x01, 0x20
_RTM_GETLINK, _IFLA_XDP, _IFLA_XDP_ATTACHED = 18, 43, 2  # and linux/if_link.h
_IFLA_IFNAME, _IFLA_LINKINFO, _IFLA_INFO_KIND = 3, 18, 1
_IFLA_STATS64, _LOOPBACK = 23, 1  # the interface's index, in every network namespace
_RTA_GATEWAY, _RTA_MULTIPATH, _RTA_VIA, _NLM_F_DUMP, _NLMSG_DONE = 5, 9, 18, 0x300, 3
_NLA_TYPE_MASK = 0x3FFF

# How the kernel says that it has no route, or one that is prohibited, or one that leads nowhere.
_LEADS_NOWHERE = {6, 7, 8, 9}  # RTN_BLACKHOLE, RTN_UNREACHABLE, RTN_PROHIBIT, RTN_THROW
_NO_ROUTE = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL}

_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP = 270, 1  # linux/socket.h and linux/netlink.h
# RTNLGRP_LINK, IPV4_IFADDR, IPV4_ROUTE, IPV4_RULE, IPV6_IFADDR, IPV6_ROUTE, IPV6_RULE, NEXTHOP
_ROUTE_GROUPS = (1, 5, 7, 8, 9, 11, 19, 32)

# linux/sock_diag.h and linux/inet_diag.h
_NETLINK_SOCK_DIAG, _TCPDIAG_GETSOCK, _SOCK_DIAG_BY_FAMILY = 4, 18, 20
# struct nlmsghdr and struct inet_diag_req_v2, up to the interface and the cookie
_DIAG_REQUEST = struct.Struct("=IHHIIBB6x2s2s16s16sIq")
_INET_DIAG_REQ_BYTECODE, _INET_DIAG_BC_D_COND = 1, 8
# Sets of states (net/tcp_states.h): all but LISTEN and CLOSE; and those of a socket whose other end
# is open: ESTABLISHED, SYN_RECV, FIN_WAIT1, FIN_WAIT2, NEW_SYN_RECV.
_STATES = 0x1FFF & ~(1 << 10) & ~(1 << 7)
_OPEN_STATES = 1 << 1 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 12

_IPV6_RECVERR = 25  # linux/in6.h; the socket module lacks it
_SO_ORIGINAL_DST = 80  # linux/netfilter_ipv4.h; linux/netfilter_ipv6/ip6_tables.h has the same
_ORIGIN_ICMP = 2  # linux/errqueue.h: SO_EE_ORIGIN_ICMP; ICMPv6 is the other one that we meet

# Connections that have to be refused before this machine is held to refuse them itself.
_ATTEMPTS = 3

_TCP_INFO_SIZE = 104  # bytes of struct tcp_info, up to tcpi_total_retrans (linux/tcp.h)


class TcpState(IntEnum):
    """The state of a TCP socket (net/tcp_states.h); the states that we ask for."""

    SYN_SENT = 2
    SYN_RECV = 3
    CLOSE = 7
    LISTEN = 10
    OTHER = -1

    @classmethod
    def _missing_(cls, _: object) -> "TcpState":
        return cls.OTHER


# Descriptors: sockets are files


def descriptor_limit() -> int:
    """Return how many files this process may open; ``resource.RLIM_INFINITY`` for any number."""
    try:
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    except OSError:  # a sandbox forbids prlimit(2), which also reads the limit
        limits = Path("/proc/self/limits").read_text()
        (soft,) = re.findall("^Max open files +([0-9]+|unlimited)", limits, re.MULTILINE)
        return resource.RLIM_INFINITY if soft == "unlimited" else int(soft)


def raise_descriptor_limit() -> int:
    """Raise this process's limit of open files to its hard limit, and return the limit.

    It stays as it is where a sandbox forbids prlimit(2), or where the hard limit is above
    fs.nr_open, which has been lowered since.
    """
    with contextlib.suppress(OSError, ValueError):  # Python's words for EPERM and EINVAL
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return descriptor_limit()


def grow_descriptor_table(size: int) -> None:
    """Have the kernel make room for ``size`` descriptors of this process now.

    Otherwise it doubles its table as they come. A process with threads waits for that: 8 to 20 ms
    each time (measured), an RCU grace period (Linux expand_fdtable()).
    """
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
        os.close(fcntl.fcntl(sock, fcntl.F_DUPFD_CLOEXEC, size - 1))


def descriptors_left() -> int:
    """Return how many more files this process may open.

    Those that are open have the lowest numbers, as a rule; /proc, which lists them, may be missing.
    """
    limit = descriptor_limit()
    lowest_free = os.open("/", os.O_RDONLY)
    os.close(lowest_free)
    return (sys.maxsize if limit == resource.RLIM_INFINITY else limit) - lowest_free


# Routes


class RouteType(IntEnum):
    """What a route does with its packets (linux/rtnetlink.h, RTN_*); the types that we ask for."""

    UNICAST = 1
    LOCAL = 2
    BROADCAST = 3
    ANYCAST = 4
    OTHER = -1

    @classmethod
    def _missing_(cls, _: object) -> "RouteType":
        return cls.OTHER


def route_type(address: Address) -> RouteType | None:
    """Ask the kernel for the type of its route to ``address`` (rtnetlink(7)).

    The kernel's routes know each address of an interface, what is routed to this machine without
    being any interface's (``ip route add local``), and the broadcast and anycast addresses of its
    networks.

    Returns:
        The type; None if there is no route.

    Raises:
        OSError: The kernel cannot tell now: no descriptor is left, say.
    """
    route = _route(address)
    if route is None:
        return None
    return RouteType(*struct.unpack_from("=7xB", route))


def _route(
    address: Address,
    source: Address | None = None,
    interface: int | None = None,
    port: int | None = None,
) -> bytes | None:
    """Ask the kernel for its route to an address: a struct rtmsg with attributes; None without.

    It is the route for TCP: rules may send other protocols elsewhere (``ip rule``, ``ipproto``).

    Args:
        address: The destination of packets.
        source: Their source.
        interface: The index of the interface at which they arrive, if they come from elsewhere.
        port: Their destination port, if it is about one alone.

    Raises:
        OSError: The kernel cannot tell now.
    """
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    source_bits = source.max_prefixlen if source else 0
    request = struct.pack("=BBB9x", family, address.max_prefixlen, source_bits)  # struct rtmsg
    request += _attribute(_RTA_DST, address.packed)
    request += _attribute(_RTA_IP_PROTO, bytes([socket.IPPROTO_TCP]))
    if source:
        request += _attribute(_RTA_SRC, source.packed)
    if interface:
        request += _attribute(_RTA_IIF, struct.pack("=I", interface))
    if port:
        request += _attribute(_RTA_DPORT, port.to_bytes(2, "big"))
    try:
        return _ask(_RTM_GETROUTE, request)
    except OSError as error:
        if error.errno in _NO_ROUTE:
            return None
        raise


def _ask(kind: int, request: bytes) -> bytes:
    """Ask the kernel for one thing (rtnetlink(7)); return its answer's content.

    Raises:
        OSError: There is no such thing, or the kernel cannot tell now.
    """
    head = struct.pack("=IHHII", 16 + len(request), kind, _NLM_F_REQUEST, 0, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as netlink:
        netlink.send(head + request)
        answer = netlink.recv(65536)
    (answer_kind,) = struct.unpack_from("=4xH", answer)
    if answer_kind == _NLMSG_ERROR:  # a struct nlmsgerr
        (error,) = struct.unpack_from("=i", answer, 16)
        raise OSError(-error, os.strerror(-error))
    return answer[16:]


def _attribute(kind: int, value: bytes) -> bytes:
    """Return an attribute of a request (netlink(7), struct rtattr)."""
    size = 4 + len(value)
    return struct.pack("=HH", size, kind) + value + bytes(_aligned(size) - size)


@dataclass(frozen=True, slots=True)
class Route:
    """The kernel's route for a TCP connection of this machine's.

    Attributes:
        type: What it does with its packets.
        source: The address that they have; None if this machine has none for them.
        next_hop: The router that they are sent to; None if the destination is on our link.
        interface: The index of the interface that they leave by.
    """

    type: RouteType
    source: Address | None
    next_hop: Address | None
    interface: int

    def source_trouble(self, target: Address) -> str | None:
        """Say why connections from ``source`` do not reach ``target``, if they do not.

        A link-local address reaches its own link alone (RFC 4291 section 2.5.6, RFC 3927 section
        2.7): a machine that has no other yet, or no more, cannot tell whether a target can be
        reached.
        """
        source = self.source
        if source is None or source.is_unspecified:
            return f"this machine has no address from which it could reach {target}"
        is_local = source.is_link_local or (source.is_loopback and self.type is not RouteType.LOCAL)
        if is_local and not target.is_link_local:
            return (
                f"this machine has only the address {source} for {target}, which does not reach it"
            )
        return None

    def trouble(self) -> str | None:
        """Say what is wrong with the first link that packets take, if something is.

        Raises:
            OSError: The kernel cannot tell now.
        """
        if self.type is not RouteType.UNICAST:
            return None
        if not _link_flags(self.interface) & _IFF_RUNNING:
            return "the link of this machine's route is down"
        if self.next_hop and _is_silent(self.next_hop, self.interface):
            return "the gateway of this machine's route does not answer"
        return None

    def asks_in_vain(self, target: Address) -> bool:
        """Whether nobody on our link answers requests for a target, as far as is known.

        A link without addresses of its own, such as a tunnel, has no such requests.

        Raises:
            OSError: The kernel cannot tell now.
        """
        if _link_flags(self.interface) & _IFF_NOARP:
            return False
        state, _ = _neighbour_state(target, self.interface)
        return not state or bool(state & (_NUD_INCOMPLETE | _NUD_FAILED))


def route_to(
    address: Address, source: Address | None = None, port: int | None = None
) -> Route | None:
    """Ask the kernel for its route to ``address``; None if it has none.

    Args:
        address: The destination.
        source: The address of this machine that packets have, which rules may look at.
        port: Their destination port, which rules may look at, too.

    Raises:
        OSError: The kernel cannot tell now: no descriptor is left, say.
    """
    answer = _route(address, source, port=port)
    if answer is None:
        return None
    (number,) = struct.unpack_from("=7xB", answer)
    if number in _LEADS_NOWHERE:
        return None
    attributes = dict(_attributes(answer[12:]))
    preferred = attributes.get(_RTA_PREFSRC)
    next_hop = next(_next_hops(answer[12:]), None)
    (interface,) = struct.unpack("=I", attributes.get(_RTA_OIF, bytes(4)))
    return Route(
        RouteType(number),
        unpack_address(preferred) if preferred else source,
        unpack_address(next_hop) if next_hop else None,
        interface,
    )


def _link_flags(interface: int) -> int:
    """Return an interface's flags (netdevice(7)); it is on, and has a link, if it is running."""
    (flags,) = struct.unpack_from("=8xI", _link(interface))
    return int(flags)


def loopback_packets() -> int:
    """Return how many packets this machine has sent to itself.

    Raises:
        OSError: The kernel cannot tell.
    """
    statistics = dict(_attributes(_link(_LOOPBACK)[16:])).get(_IFLA_STATS64)
    if not statistics:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    (received,) = struct.unpack_from("=Q", statistics)
    return int(received)


def _link(interface: int) -> bytes:
    """Return what the kernel knows of an interface: a struct ifinfomsg with attributes."""
    return _ask(_RTM_GETLINK, struct.pack("=BxHiII", socket.AF_UNSPEC, 0, interface, 0, 0))


def _is_silent(neighbour: Address, interface: int) -> bool:
    """Whether a neighbour does not answer this machine's ARP or neighbour solicitations.

    That is so if it never did, or if it no longer does and has been asked more than once, a second
    apart (linux/neighbour.h). A live one answers within milliseconds. The kernel asks again five
    seconds after it has begun to doubt, which is when attempts of five seconds end.
    """
    state, probes = _neighbour_state(neighbour, interface)
    return bool(state & (_NUD_INCOMPLETE | _NUD_FAILED)) or (state == _NUD_PROBE and probes > 1)


def _neighbour_state(neighbour: Address, interface: int) -> tuple[int, int]:
    """Return what the kernel knows of a neighbour, and how often it has asked; zeros if nothing."""
    family = socket.AF_INET if neighbour.version == 4 else socket.AF_INET6
    request = struct.pack("=B3xiHBB", family, interface, 0, 0, 0)
    try:
        answer = _ask(_RTM_GETNEIGH, request + _attribute(_NDA_DST, neighbour.packed))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EOPNOTSUPP, errno.EINVAL):  # Linux before 5.0
            return 0, 0
        raise
    (state,) = struct.unpack_from("=8xH", answer)
    (probes,) = struct.unpack("=I", dict(_attributes(answer[12:])).get(_NDA_PROBES, bytes(4)))
    return int(state), int(probes)


class RouteChanges:
    """Tells whether this machine's addresses or routes may have changed (rtnetlink(7)).

    The kernel reports each change on a socket that has joined its groups. One look at the socket
    takes 1 µs, where the kernel would need 20 to find a route (measured).
    """

    def __init__(self) -> None:
        self._poll = select.poll()
        self._socket = self._joined()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Give back the descriptor; the next look takes another."""
        if self._socket:
            self._socket.close()
        self._socket = None

    def since_last(self) -> bool:
        """Return whether anything may have changed since the last call, as far as that shows."""
        if not self._socket:
            self._socket = self._joined()
            return True
        if not self._poll.poll(0):  # an error, too: there were too many to keep
            return False
        # Another socket, instead of reading however much there is.
        self._socket.close()
        self._socket = self._joined()
        return True

    def _joined(self) -> socket.socket | None:
        """Return a socket that has joined the groups; None if there cannot be one now."""
        try:
            netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK)
        except OSError:
            return None
        try:
            netlink.bind((0, 0))  # a socket without a port gets no reports
            for group in _ROUTE_GROUPS:
                netlink.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)
        except OSError:
            netlink.close()
            return None
        self._poll = select.poll()
        self._poll.register(netlink, select.POLLIN)
        return netlink


@dataclass(frozen=True)
class Way:
    """How this machine's TCP packets to an address leave.

    Attributes:
        interface: The name of the interface.
        source: The address of this machine that they have by default; None if that is open.
    """

    interface: str
    source: Address | None


def way_to(address: Address, source: Address | None = None) -> Way | None:
    """Ask the kernel as ``route_to`` does; None if it has no route or cannot tell."""
    with contextlib.suppress(OSError):
        if route := route_to(address, source):
            return Way(socket.if_indextoname(route.interface), route.source)
    return None


def accepts_from(source: Address, address: Address, interface: str) -> bool:
    """Whether the kernel's routes let in packets from ``source`` to ``address`` at an interface.

    IPv4's reverse-path filter drops those whose answers would leave by another interface (RFC 3704;
    rp_filter in ip-sysctl.rst). IPv6 has none in the kernel; firewalls do the same, so the answers'
    interface counts there.
    """
    if source.version == 6:
        way = way_to(source)
        return way is None or way.interface in (interface, "lo")
    try:
        return _route(address, source, socket.if_nametoindex(interface)) is not None
    except OSError as error:
        return error.errno != errno.EXDEV


def is_next_hop(address: Address) -> bool:
    """Whether a route of this machine, in any of its tables, leads through ``address``.

    The kernel is asked for all routes (rtnetlink(7)). The next hop of an IPv4 route may be an IPv6
    address (``via inet6``), and a route may have several next hops.

    Raises:
        OSError: The kernel cannot tell now: no descriptor is left, say.
    """
    wanted = address.packed
    family = socket.AF_INET if address.version == 4 else socket.AF_UNSPEC
    # After the header comes a struct rtmsg, and then the route's attributes.
    request = struct.pack("=B11x", family)
    return any(
        wanted in message and wanted in _next_hops(message[12:])
        for message in _dump(_RTM_GETROUTE, request)
    )


def _dump(kind: int, request: bytes, protocol: int = 0) -> Iterator[bytes]:
    """Ask the kernel for everything of one kind (netlink(7)); yield each message's content.

    Raises:
        OSError: The kernel cannot tell now.
    """
    flags = _NLM_F_REQUEST | _NLM_F_DUMP
    head = struct.pack("=IHHII", 16 + len(request), kind, flags, 0, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol) as netlink:
        netlink.send(head + request)
        while True:
            answer = netlink.recv(65536)
            start = 0
            while start < len(answer):
                size, answer_kind = struct.unpack_from("=IH", answer, start)
                if answer_kind in (_NLMSG_DONE, _NLMSG_ERROR):  # either may bring an error
                    (error,) = struct.unpack_from("=i", answer, start + 16)
                    if error:
                        raise OSError(-error, os.strerror(-error))
                    return
                yield answer[start + 16 : start + size]
                start += _aligned(size)


def _next_hops(attributes: bytes) -> Iterator[bytes]:
    """Yield the packed addresses of a route's next hops."""
    for kind, value in _attributes(attributes):
        if kind == _RTA_GATEWAY:
            yield value
        elif kind == _RTA_VIA:  # struct rtvia: the address follows its family
            yield value[2:]
        elif kind == _RTA_MULTIPATH:  # each struct rtnexthop is followed by its attributes
            start = 0
            while start < len(value):
                (size,) = struct.unpack_from("=H", value, start)
                yield from _next_hops(value[start + 8 : start + size])
                start += _aligned(size)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the type and value of each attribute (netlink(7), struct rtattr)."""
    start = 0
    while start < len(data):
        size, kind = struct.unpack_from("=HH", data, start)
        yield kind & _NLA_TYPE_MASK, data[start + 4 : start + size]
        start += _aligned(size)


def _aligned(size: int) -> int:
    """Round up to the 4 bytes by which netlink aligns messages and attributes."""
    return (size + 3) & ~3


@dataclass(frozen=True, slots=True)
class OwnAddress:
    """An address of an interface of this machine.

    Attributes:
        address: The address.
        network: The network that it shares with its neighbours.
        temporary: Whether it is replaced within hours or days (RFC 8981).
        deprecated: Whether new connections no longer use it.
    """

    address: Address
    network: Network
    temporary: bool
    deprecated: bool


def own_addresses() -> list[OwnAddress]:
    """Return the addresses of this machine's interfaces; none if the kernel cannot tell."""
    found = []
    with contextlib.suppress(OSError):
        for message in _dump(_RTM_GETADDR, struct.pack("=B7x", socket.AF_UNSPEC)):
            prefix, flags = struct.unpack_from("=xBB", message)
            attributes = dict(_attributes(message[8:]))
            packed = attributes.get(_IFA_LOCAL) or attributes.get(_IFA_ADDRESS)
            if packed is None:
                continue
            (flags,) = struct.unpack("=I", attributes.get(_IFA_FLAGS, struct.pack("=I", flags)))
            address = ip_address(packed)
            found.append(
                OwnAddress(
                    address,
                    ip_network(f"{address}/{prefix}", strict=False),
                    address.version == 6 and bool(flags & _IFA_F_TEMPORARY),
                    bool(flags & _IFA_F_DEPRECATED),
                )
            )
    return found


def interface_kind(name: str) -> str:
    """Return the kernel's name for a virtual interface's kind (``veth``, ``tun``, ``wireguard``).

    Empty for others, and where the kernel cannot tell.
    """
    with contextlib.suppress(OSError):
        attributes = dict(_attributes(_link(socket.if_nametoindex(name))[16:]))
        info = dict(_attributes(attributes.get(_IFLA_LINKINFO, b"")))
        return info.get(_IFLA_INFO_KIND, b"").rstrip(b"\0").decode(errors="replace")
    return ""


def xdp_interface() -> str:
    """Return an interface with an XDP program, which sees packets first; empty if there is none."""
    with contextlib.suppress(OSError):
        for message in _dump(_RTM_GETLINK, struct.pack("=B15x", socket.AF_UNSPEC)):
            attributes = dict(_attributes(message[16:]))
            xdp = dict(_attributes(attributes.get(_IFLA_XDP, b"")))
            if any(xdp.get(_IFLA_XDP_ATTACHED, b"")):
                return attributes[_IFLA_IFNAME].rstrip(b"\0").decode(errors="replace")
    return ""


# Connections


@dataclass(frozen=True, slots=True)
class IcmpError:
    """An ICMP or ICMPv6 error that a socket received.

    Attributes:
        type: A type of ICMP (RFC 792) or ICMPv6 (RFC 4443), by the IP version of ``sender``.
        code: The code within the type.
        sender: Who sent it.
    """

    type: int
    code: int
    sender: Address


def report_icmp_errors(sock: socket.SocketType, report: bool = True) -> None:
    """Have ICMPv6 errors reported to an IPv6 socket at once, and queued, as ICMP errors are.

    They end a connection, too, which ICMP errors do not: IPv4 reports these to attempts alone.
    """
    sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVERR, report)


def take_icmp_error(sock: socket.SocketType) -> IcmpError | None:
    """Take an ICMP error off a socket's error queue (ip(7), MSG_ERRQUEUE); None if it is empty.

    Raises:
        OSError: The queue cannot be read.
    """
    try:
        _, ancillary, *_ = sock.recvmsg(0, 512, socket.MSG_ERRQUEUE)
    except BlockingIOError:
        return None
    for *_, data in ancillary:
        # struct sock_extended_err, and then the address of whoever sent the error
        origin, kind, code = struct.unpack_from("=4xBBB", data)
        if origin == _ORIGIN_ICMP:
            sender = socket.inet_ntop(socket.AF_INET, data[20:24])
        else:
            sender = socket.inet_ntop(socket.AF_INET6, data[24:40])
        return IcmpError(kind, code, parse_address(sender))
    return None


def could_not_retransmit(sock: socket.SocketType) -> bool:
    """Whether the kernel could not send a socket's SYN again, while connecting or until it gave up.

    An outgoing firewall dropped it, or the queue of a network device was full. connect() does not
    report that (Linux tcp_connect() looks at ECONNREFUSED alone). But in struct tcp_info,
    ``tcpi_total_retrans`` counts what should have been sent again, and ``tcpi_retrans`` is 0 if the
    last of that was not sent (tcp_retransmit_skb()). It shows only in attempts of more than a
    second, after which the first SYN is sent again.
    """
    info = _tcp_info(sock)
    retrans, total_retrans = struct.unpack_from("=36xI60xI", info)
    # On a connected socket nothing remains to be sent again, whatever happened before.
    return bool(total_retrans and not retrans) and info[0] in (TcpState.SYN_SENT, TcpState.CLOSE)


def is_connecting(sock: socket.SocketType) -> bool:
    """Whether a socket's attempt to connect still goes on."""
    return _tcp_info(sock)[0] == TcpState.SYN_SENT


def round_trip_time(sock: socket.SocketType) -> float:
    """Return the seconds that the kernel measured from a SYN to its answer; 0 if it did not."""
    (microseconds,) = struct.unpack_from("=I", _tcp_info(sock), 68)
    return float(microseconds / 1e6)


def _tcp_info(sock: socket.SocketType) -> bytes:
    """Return a socket's struct tcp_info (linux/tcp.h), with zeros where the kernel has less."""
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_SIZE)
    except OSError:  # not of every kind of socket (Multipath TCP)
        info = b""
    return info.ljust(_TCP_INFO_SIZE, b"\0")


_End = tuple[Address, int, int]


def is_tracked(sock: socket.SocketType) -> bool:
    """Whether the firewall may track a connection, as it does each one that it redirects.

    The kernel knows the original destination of a connection that it tracks (SO_ORIGINAL_DST, which
    transparent proxies use); for others, asking is an error. Rules that change addresses without
    tracking, or in another zone than the default one, do not show.
    """
    is_ipv4 = sock.family == socket.AF_INET
    level = socket.IPPROTO_IP if is_ipv4 else socket.IPPROTO_IPV6
    try:
        sock.getsockopt(level, _SO_ORIGINAL_DST, 28)
    except OSError as error:
        return error.errno not in (errno.ENOENT, errno.ENOPROTOOPT)
    return True


class ConnectionsHere:
    """Looks up connections whose other end is on this machine, too.

    That end has the target's address: it belongs to a transparent proxy (``tproxy`` of nftables),
    or to a program that listens on that address. It keeps the socket on which it asks: making one
    takes as long as a look (measured).
    """

    def __init__(self) -> None:
        self._netlink: socket.SocketType | None = None

    def __del__(self) -> None:
        """Close the socket."""
        if self._netlink:
            self._netlink.close()

    def ports(self, target: Address, connections: Mapping[int, socket.SocketType]) -> set[int]:
        """Return the ports of such connections.

        Args:
            target: The address that the connections lead to.
            connections: The connections, by port.

        Raises:
            OSError: The kernel cannot tell.
        """
        if not self._netlink:
            kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK
            self._netlink = socket.SocketType(socket.AF_NETLINK, kind, _NETLINK_SOCK_DIAG)
        try:
            return {
                port
                for port, connection in connections.items()
                if _is_here(self._netlink, target, port, connection)
            }
        except BaseException:  # an answer may still be on its way
            self._netlink.close()
            self._netlink = None
            raise


def _is_here(
    netlink: socket.SocketType, target: Address, port: int, connection: socket.SocketType
) -> bool:
    source, local_port = connection.getsockname()[:2]
    head = _DIAG_REQUEST.size, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 0, 0
    ports = port.to_bytes(2, "big"), local_port.to_bytes(2, "big")
    addresses = target.packed, parse_host(source).packed
    of_tcp = connection.family, socket.IPPROTO_TCP
    netlink.send(_DIAG_REQUEST.pack(*head, *of_tcp, *ports, *addresses, 0, -1))
    answer = netlink.recv(1024)
    answer_kind, error = struct.unpack_from("=4xH10xi", answer)
    if answer_kind != _NLMSG_ERROR:
        # A listener is found if there is no connection.
        return bool(answer[17] != TcpState.LISTEN)
    if error != -errno.ENOENT:
        raise OSError(-error, os.strerror(-error))
    return False


def answers_itself(source: Address) -> bool:
    """Whether this machine itself answers connections that it makes from ``source`` to others.

    A firewall rule may redirect them to this machine, whatever their sockets say (``redirect`` and
    ``dnat`` of nftables). Then this machine has one end of a connection with itself, and none that
    matches it. Ports alone do not show that: the rule may change them, too.

    Raises:
        OSError: The kernel cannot tell.
    """
    suspects = _ends_without_another(source)
    # An end whose other end was closed meanwhile is gone when we look again.
    return bool(suspects and suspects & _ends_without_another(source))


def refuses_itself(target: Address, port: int) -> bool:
    """Whether this machine itself refuses its connections to a port of another one.

    A firewall rule may reset them, or redirect them to a port here on which nobody listens. That
    happens during connect(), with packets that this machine sends to itself. It may send itself
    other packets at the same moment, so connections are made until one is refused without any.

    Raises:
        OSError: The kernel cannot tell, or no connection can be made.
    """
    family = socket.AF_INET if target.version == 4 else socket.AF_INET6
    for _ in range(_ATTEMPTS):
        before = loopback_packets()
        with socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
            sock.connect_ex((str(target), port))
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error != errno.ECONNREFUSED or loopback_packets() == before:
            return False
    return True


def _ends_without_another(source: Address) -> set[_End]:
    ends = _connected_to(source, _OPEN_STATES)
    addresses = {address for address, _, _ in ends}
    others = {address: _connected_to(address, _STATES) for address in addresses}
    return {
        (address, port, remote_port)
        for address, port, remote_port in ends
        if (source, remote_port, port) not in others[address]
    }


def _connected_to(remote: Address, states: int) -> set[_End]:
    """Return this machine's TCP connections to an address: local address and port, remote port.

    Those of every program in this network namespace, and those that no program has accepted yet.

    Raises:
        OSError: The kernel cannot tell.
    """
    family = socket.AF_INET if remote.version == 4 else socket.AF_INET6
    condition = struct.pack("=BBxxi", family, remote.max_prefixlen, -1) + remote.packed
    size = 4 + len(condition)
    is_remote_end = struct.pack("=BBH", _INET_DIAG_BC_D_COND, size, size + 4) + condition
    bytecode = _attribute(_INET_DIAG_REQ_BYTECODE, is_remote_end)
    # Not as TcpSockets, which would take three times as long (measured) for thousands.
    found = set()
    for answer in _dump_tcp(states, bytecode):
        size = 4 if answer[0] == socket.AF_INET else 16
        port, remote_port = struct.unpack_from("!4xHH", answer)
        found.add((unpack_address(answer[8 : 8 + size]), port, remote_port))
    return found


@dataclass(frozen=True, slots=True)
class TcpSocket:
    """A TCP socket of this machine, as sock_diag(7) and proc_net_tcp.rst have it.

    Attributes:
        address: Its local address; ``0.0.0.0`` or ``::`` for all of them.
        port: Its local port.
        state: Its state (net/tcp_states.h).
        queued: If it listens, how many connections wait for its program to accept them.
        ipv6: Whether it is an IPv6 socket; one on ``::`` may take IPv4 connections, too.
        peer: The address of the other end, unspecified if there is none.
        peer_port: The port of the other end, 0 if there is none.
    """

    address: Address
    port: int
    state: TcpState
    queued: int
    ipv6: bool
    peer: Address
    peer_port: int = 0


def tcp_sockets(ports: Container[int], state: TcpState | None = None) -> list[TcpSocket]:
    """Return this machine's TCP sockets whose local port is one of ``ports``.

    Those of the network namespace that this thread is in; every user may ask for them.

    Args:
        ports: The ports.
        state: The only state to return; None for every state but CLOSE.
    """
    states = _STATES | 1 << TcpState.LISTEN if state is None else 1 << state
    try:
        return list(_dumped_sockets(ports, states))
    except OSError:  # a sandbox, or a kernel without it
        return [sock for sock in _listed_sockets(ports) if state in (None, sock.state)]


def _dump_tcp(states: int, bytecode: bytes = b"") -> Iterator[bytes]:
    """Yield a struct inet_diag_msg (linux/inet_diag.h) for each TCP socket, as netlink has them.

    The request is an older one than that in sock_diag(7), and finds sockets of both families at
    once: an IPv4 connection may have an IPv6 socket.

    Args:
        states: A bit for each state.
        bytecode: An attribute with a filter for the kernel.

    Raises:
        OSError: The kernel cannot tell.
    """
    request = struct.pack("=4x48xI4x", states) + bytecode  # struct inet_diag_req
    return _dump(_TCPDIAG_GETSOCK, request, _NETLINK_SOCK_DIAG)


def _dumped_sockets(ports: Container[int], states: int) -> Iterator[TcpSocket]:
    """Ask by netlink: in a fifth of the time that it takes to read the tables (measured).

    Raises:
        OSError: The kernel cannot tell.
    """
    for answer in _dump_tcp(states):
        family, number, port, peer_port = struct.unpack_from("!BBxxHH", answer)
        if port in ports:
            size = 4 if family == socket.AF_INET else 16
            yield TcpSocket(
                unpack_address(answer[8 : 8 + size]),
                port,
                TcpState(number),
                int(struct.unpack_from("=I", answer, 56)[0]),
                family == socket.AF_INET6,
                unpack_address(answer[24 : 24 + size]),
                peer_port,
            )


def _listed_sockets(ports: Container[int]) -> Iterator[TcpSocket]:
    for table, ipv6 in ("/proc/thread-self/net/tcp", False), ("/proc/thread-self/net/tcp6", True):
        with contextlib.suppress(OSError), open(table) as lines:
            next(lines)
            for line in lines:
                _, local, remote, state, queues, *_ = line.split(None, 5)
                host, _, number = local.partition(":")
                if (port := int(number, 16)) in ports:
                    peer, _, peer_port = remote.partition(":")
                    yield TcpSocket(
                        _kernels_address(host),
                        port,
                        TcpState(int(state, 16)),
                        int(queues.partition(":")[2], 16),
                        ipv6,
                        _kernels_address(peer),
                        int(peer_port, 16),
                    )


def shows_sockets() -> bool:
    """Whether this process may read the tables of sockets: in some sandboxes it may not."""
    return os.access("/proc/thread-self/net/tcp", os.R_OK)


def _kernels_address(text: str) -> Address:
    """Read an address that is written in 32-bit words, each in this machine's byte order."""
    words = (int(text[at : at + 8], 16) for at in range(0, len(text), 8))
    return unpack_address(b"".join(struct.pack("=I", word) for word in words))


def ephemeral_ports() -> range:
    """Return the range from which the kernel takes the local ports of outgoing connections.

    Of both families (ip-sysctl.rst, ip_local_port_range); the kernel's default if it is unknown.
    """
    try:
        with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
            low, high = map(int, file.read().split())
    except (OSError, ValueError):
        low, high = 32768, 60999
    return range(low, high + 1)


def reserved_ports() -> str:
    """Return the ports that the kernel does not take from that range: ``50800-50899,51000``."""
    return read_text("/proc/sys/net/ipv4/ip_local_reserved_ports").strip()


def read_text(path: str | Path) -> str:
    """Return a file's text; empty if the file cannot be read."""
    with contextlib.suppress(OSError):
        return Path(path).read_text(errors="replace")
    return ""


# Processes

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def start_thread(target: Callable[[], object], name: str | None = None) -> None:
    """Start a thread for which the process does not wait at its end.

    Raises:
        OSError: There are too many; Python's own words for that are a bare RuntimeError.
    """
    try:
        threading.Thread(target=target, name=name, daemon=True).start()
    except RuntimeError:
        raise OSError(
            "no more threads may be started: raise that limit (ulimit -u, or a container's)"
        ) from None


def end_with_parent(parent: int) -> None:
    """Have SIGTERM sent to this process when its parent ends (prctl(2), PR_SET_PDEATHSIG).

    Args:
        parent: The parent's process id; if that has ended before, the signal is sent now.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        signal.raise_signal(signal.SIGTERM)


# Connection tracking


@dataclass(frozen=True, slots=True)
class ConnectionTracking:
    """How the firewall's connection tracking is set (nf_conntrack-sysctl in the kernel's manual).

    Attributes:
        max_entries: Connections that it can track; when it is full, new ones are dropped.
        syn_sent_timeout: Seconds for which it keeps a connection after seeing only its SYN.
        time_wait_timeout: Seconds for which it keeps a connection that both ends have closed.
    """

    max_entries: int
    syn_sent_timeout: int
    time_wait_timeout: int


def connection_tracking() -> ConnectionTracking | None:
    """Return the settings of connection tracking; None if this machine has none."""
    directory = Path("/proc/sys/net/netfilter")
    try:
        return ConnectionTracking(
            int((directory / "nf_conntrack_max").read_text()),
            int((directory / "nf_conntrack_tcp_timeout_syn_sent").read_text()),
            int((directory / "nf_conntrack_tcp_timeout_time_wait").read_text()),
        )
    except OSError:
        return None


# Memory


def return_free_memory() -> None:
    """Have the C library return free memory to the kernel (malloc_trim(3)).

    Does nothing where it is not glibc.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)
