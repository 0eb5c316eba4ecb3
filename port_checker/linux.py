"""What only Linux tells: descriptors, routes, and what the kernel knows of TCP connections.

All of it is asked of the kernel at the moment of the call; nothing is kept.
"""

import contextlib
import ctypes
import errno
import os
import resource
import signal
import socket
import struct
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from port_checker.addresses import Address, parse_address

# linux/rtnetlink.h and linux/netlink.h
_RTM_GETROUTE, _RTA_DST, _NLM_F_REQUEST, _NLMSG_ERROR = 26, 1, 1, 2

# How the kernel says that it has no route, or one that is prohibited, or one that leads nowhere.
_NO_ROUTE = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL}

_IPV6_RECVERR = 25  # linux/in6.h; the socket module lacks it
_ORIGIN_ICMP = 2  # linux/errqueue.h: SO_EE_ORIGIN_ICMP; ICMPv6 is the other one that we meet

_TCP_INFO_SIZE = 104  # bytes of struct tcp_info, up to tcpi_total_retrans (linux/tcp.h)

_SYN_RECV = "03"  # TCP_SYN_RECV in the tables of /proc/net (net/tcp_states.h)


# Descriptors: sockets are files


def raise_descriptor_limit() -> int:
    """Raise this process's limit of open files to its hard limit, and return that."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def descriptors_left() -> int:
    """Return how many more files this process may open."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return limit - len(os.listdir("/proc/self/fd"))


# Routes


class RouteType(IntEnum):
    """What a route does with its packets (linux/rtnetlink.h, RTN_*); the types that we ask for."""

    UNICAST = 1
    LOCAL = 2
    BROADCAST = 3
    ANYCAST = 4
    OTHER = -1


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
    # The question is a struct rtmsg with one attribute, the destination; so is the answer, unless
    # it is a struct nlmsgerr.
    destination = address.packed
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    attribute = struct.pack("=HH", 4 + len(destination), _RTA_DST) + destination
    question = struct.pack("=BB10x", family, 8 * len(destination)) + attribute
    head = struct.pack("=IHHII", 16 + len(question), _RTM_GETROUTE, _NLM_F_REQUEST, 0, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as netlink:
        netlink.send(head + question)
        answer = netlink.recv(4096)
    (kind,) = struct.unpack_from("=4xH", answer)
    if kind == _NLMSG_ERROR:
        (error,) = struct.unpack_from("=i", answer, 16)
        if -error in _NO_ROUTE:
            return None
        raise OSError(-error, os.strerror(-error))
    (number,) = struct.unpack_from("=7xB", answer, 16)
    try:
        return RouteType(number)
    except ValueError:
        return RouteType.OTHER


# Connections


@dataclass(frozen=True, slots=True)
class IcmpError:
    """An ICMP or ICMPv6 error that met a socket.

    Attributes:
        type: Of ICMP (RFC 792) or ICMPv6 (RFC 4443), by the version of ``sender``.
        code: Within the type.
        sender: Who sent it.
    """

    type: int
    code: int
    sender: Address


def report_icmp_errors(sock: socket.socket) -> None:
    """Have ICMPv6 errors reported to an IPv6 socket at once, and queued; ICMP's are anyway."""
    sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVERR, 1)


def take_icmp_error(sock: socket.socket) -> IcmpError | None:
    """Take an ICMP error off a socket's error queue (ip(7), MSG_ERRQUEUE); None if it is empty.

    Raises:
        OSError: The queue cannot be read.
    """
    try:
        _, ancillary, *_ = sock.recvmsg(0, 512, socket.MSG_ERRQUEUE)
    except BlockingIOError:
        return None
    for *_, data in ancillary:
        # struct sock_extended_err, and behind it the address of who sent the error
        origin, kind, code = struct.unpack_from("=4xBBB", data)
        if origin == _ORIGIN_ICMP:
            sender = socket.inet_ntop(socket.AF_INET, data[20:24])
        else:
            sender = socket.inet_ntop(socket.AF_INET6, data[24:40])
        return IcmpError(kind, code, parse_address(sender))
    return None


def could_not_retransmit(sock: socket.socket) -> bool:
    """Whether the kernel could not send a connecting socket's SYN again.

    An outgoing firewall that drops it does that, and connect() is not told (Linux tcp_connect()
    looks at ECONNREFUSED alone). But of the struct tcp_info, ``tcpi_total_retrans`` counts what
    should have been sent again, and ``tcpi_retrans`` what was. It takes an attempt of more than a
    second, when the first SYN is sent again.
    """
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_SIZE)
    (retrans,) = struct.unpack_from("=I", info, 36)
    (total_retrans,) = struct.unpack_from("=I", info, 100)
    return bool(total_retrans and not retrans)


def half_open_ports() -> set[int]:
    """Return the local TCP ports at which a connection has arrived, but is not established.

    The kernel answers the other end's SYN and waits some seconds for the end of the handshake. A
    port that stays in this state receives packets, and its answers get lost.
    """
    ports = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError), open(table) as lines:
            for line in lines:
                _, local, _, state, *_ = line.split()
                if state == _SYN_RECV:
                    ports.add(int(local.rpartition(":")[2], 16))
    return ports


# Processes

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


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
        max_entries: Connections that it can track; new ones are dropped when it is full.
        syn_sent_timeout: Seconds that it keeps a connection of which only the SYN was seen.
    """

    max_entries: int
    syn_sent_timeout: int


def connection_tracking() -> ConnectionTracking | None:
    """Return the settings of connection tracking; None if this machine has none."""
    directory = Path("/proc/sys/net/netfilter")
    try:
        return ConnectionTracking(
            int((directory / "nf_conntrack_max").read_text()),
            int((directory / "nf_conntrack_tcp_timeout_syn_sent").read_text()),
        )
    except OSError:
        return None


# Memory


def return_free_memory() -> None:
    """Have the C library give memory that is free back to the kernel (malloc_trim(3)).

    Does nothing where it is not glibc.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)
