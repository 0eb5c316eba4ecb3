"""What this machine's interfaces see of the connections that come.

If this process may (CAP_NET_RAW), it sees the packets that begin, answer and refuse connections as
they pass the interfaces. It sees them before any firewall, so that a packet that is dropped here
can be told from one that never arrived; and with their senders, so that those of strangers prove
nothing.
"""

import asyncio
import contextlib
import ctypes
import itertools
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from port_checker.addresses import Address, unpack_address
from port_checker.linux import start_thread

_ETH_P_ALL = 3  # linux/if_ether.h
_SO_ATTACH_FILTER, _SO_RCVBUFFORCE = 26, 33  # asm-generic/socket.h; the socket module lacks them
_SOL_PACKET, _PACKET_STATISTICS = 263, 6  # linux/socket.h, linux/if_packet.h
_SYN, _RST, _ACK = 0x02, 0x04, 0x10  # RFC 9293 section 3.1
# Packets read in one turn of the event loop; one takes about 3 µs.
_PACKETS_PER_TURN = 200
_RECEIVE_BUFFER = 8 * 1024 * 1024
# Connections that are recorded. Those of strangers are among them: it shows later whose they are.
_MAX_RECORDED = 50_000
# A TCP header's ports, sequence number and flags.
_TCP = struct.Struct("!HHI5xB")
# Bytes of a packet that are read: an IP header with all options, and a TCP header without.
_SNAPPED = 80

# A classic BPF program (linux/filter.h) that passes TCP packets that come with SYN alone, and that
# leave with SYN or RST; it begins at the IP header. IPv6 packets with extension headers do not
# pass: nobody opens a connection with them.
_FILTER = [
    (0x30, 0, 0, 0),  # 0: A = version and header length
    (0x54, 0, 0, 0xF0),  # 1
    (0x15, 0, 7, 0x40),  # 2: not IPv4: go to 10
    (0x30, 0, 0, 9),  # 3: A = protocol
    (0x15, 0, 19, socket.IPPROTO_TCP),  # 4: else drop
    (0x28, 0, 0, 6),  # 5: A = flags and fragment offset
    (0x45, 17, 0, 0x1FFF),  # 6: not the first fragment: drop
    (0xB1, 0, 0, 0),  # 7: X = length of the header
    (0x50, 0, 0, 13),  # 8: A = TCP flags
    (0x05, 0, 0, 4),  # 9: go to 14
    (0x15, 0, 13, 0x60),  # 10: not IPv6: drop
    (0x30, 0, 0, 6),  # 11: A = next header
    (0x15, 0, 11, socket.IPPROTO_TCP),  # 12: else drop
    (0x30, 0, 0, 53),  # 13: A = TCP flags
    (0x54, 0, 0, _SYN | _RST | _ACK),  # 14
    (0x07, 0, 0, 0),  # 15: X = these flags
    (0x30, 0, 0, 0xFFFFF004),  # 16: A = the packet's direction (SKF_AD_PKTTYPE)
    (0x15, 0, 2, socket.PACKET_HOST),  # 17: else go to 20
    (0x87, 0, 0, 0),  # 18: A = X
    (0x15, 3, 4, _SYN),  # 19: pass or drop
    (0x15, 0, 3, socket.PACKET_OUTGOING),  # 20: else drop
    (0x87, 0, 0, 0),  # 21: A = X
    (0x45, 0, 1, _SYN | _RST),  # 22
    (0x06, 0, 0, _SNAPPED),  # 23: pass
    (0x06, 0, 0, 0),  # 24: drop
]


@dataclass
class Attempt:
    """Connections from one peer to one port of this machine, as the interfaces see them.

    Attributes:
        address: The address to which the peer connects.
        interface: The name of the interface at which its packets arrive.
        answered_at: The interface at which this machine's answer left; empty if it did not accept.
        refused: Whether it refused with a RST.
        passed_to: The address to which it passed the packets on instead.
        last: When the latest began, by the capture's clock.
    """

    address: Address
    interface: str
    answered_at: str = ""
    refused: bool = False
    passed_to: Address | None = None
    last: int = 0


class Capture:
    """The connection attempts that this machine's interfaces see; a context manager.

    Attributes:
        clock: How many attempts began so far.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.clock = 0
        self._sock = sock
        # By the peer, packed, and our port; in the order in which the latest began.
        self._attempts: dict[tuple[bytes, int], Attempt] = {}
        self._begun: set[tuple[bytes, int, int]] = set()  # the peer, its port, sequence number
        self._by_number: dict[int, Attempt] = {}
        self._has_lost_packets = False

    @classmethod
    def open(cls) -> Self | None:
        """Begin; None if this process may not."""
        try:
            kind = socket.SOCK_DGRAM  # without the link's header
            sock = socket.socket(socket.AF_PACKET, kind, socket.htons(_ETH_P_ALL))
        except OSError:
            return None
        try:
            program = b"".join(struct.pack("=HBBI", *instruction) for instruction in _FILTER)
            buffer = ctypes.create_string_buffer(program)
            filtering = struct.pack("HP", len(_FILTER), ctypes.addressof(buffer))
            sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, filtering)
            with contextlib.suppress(OSError):  # it needs CAP_NET_ADMIN
                sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER)
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):  # what came before the filter
                while True:
                    sock.recv(1)
        except OSError:
            sock.close()
            return None
        return cls(sock)

    def __enter__(self) -> Self:
        asyncio.get_running_loop().add_reader(self._sock, self._read)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.get_running_loop().remove_reader(self._sock)
        # The kernel waits until no processor looks at the socket any more: 12 to 22 ms.
        try:
            start_thread(self._sock.close)
        except OSError:
            self._sock.close()

    def is_complete(self) -> bool:
        """Whether all packets so far were seen: then a packet that was not seen did not arrive."""
        self._read(_MAX_RECORDED)
        statistics = self._sock.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8)  # resets them
        self._has_lost_packets |= struct.unpack("II", statistics)[1] > 0
        return not self._has_lost_packets

    def attempts(self, is_peer: Callable[[Address], bool], since: int) -> dict[int, Attempt]:
        """Return the attempts of certain peers since a moment, the latest at each port."""
        recent = self._since(since)
        peers = {peer for (peer, _), _ in recent}
        theirs = {peer for peer in peers if is_peer(unpack_address(peer))}
        return {port: attempt for (peer, port), attempt in reversed(recent) if peer in theirs}

    def seen(self, since: int) -> dict[int, set[Address]]:
        """Return who has begun to connect since the clock showed ``since``, by port."""
        found: dict[int, set[Address]] = {}
        for (peer, port), _ in self._since(since):
            found.setdefault(port, set()).add(unpack_address(peer))
        return found

    def _since(self, clock: int) -> list[tuple[tuple[bytes, int], Attempt]]:
        """Return the attempts since a moment, by peer and port, the latest first."""
        self._read(_MAX_RECORDED)
        latest_first = reversed(self._attempts.items())
        return list(itertools.takewhile(lambda item: item[1].last > clock, latest_first))

    def _read(self, most: int = _PACKETS_PER_TURN) -> None:
        for _ in range(most):
            try:
                packet, (interface, _, kind, *_) = self._sock.recvfrom(_SNAPPED)
            except OSError:  # nothing more, or an interface went down
                return
            if packet:
                self._record(packet, interface, outgoing=kind == socket.PACKET_OUTGOING)

    def _record(self, packet: bytes, interface: str, *, outgoing: bool) -> None:
        if packet[0] >> 4 == 4:
            size, source, destination = 4 * (packet[0] & 15), packet[12:16], packet[16:20]
        else:
            size, source, destination = 40, packet[8:24], packet[24:40]
        if len(packet) < size + _TCP.size:
            return
        from_port, to_port, number, flags = _TCP.unpack_from(packet, size)
        if not outgoing:
            self._record_begin((source, from_port, number), destination, to_port, interface)
        elif not flags & _ACK and flags & _SYN:
            # A connection that is passed on keeps its number, whatever else is translated.
            attempt = self._by_number.get(number)
            if attempt and attempt.address != unpack_address(destination):
                attempt.passed_to = unpack_address(destination)
        elif attempt := self._attempts.get((destination, from_port)):
            if flags & _SYN:  # of a bridge and its port, the bridge: packets leave by it first
                attempt.answered_at = attempt.answered_at or interface
            attempt.refused |= not flags & _SYN

    def _record_begin(
        self, begun: tuple[bytes, int, int], destination: bytes, port: int, interface: str
    ) -> None:
        peer, _, number = begun
        if begun in self._begun:  # sent again, or seen at a bridge after its port
            if attempt := self._attempts.get((peer, port)):
                attempt.interface = interface
        elif len(self._begun) < _MAX_RECORDED:
            self.clock += 1
            self._begun.add(begun)
            attempt = self._attempts.pop((peer, port), None) or Attempt(
                unpack_address(destination), interface
            )
            attempt.last = self.clock
            self._attempts[peer, port] = attempt
            self._by_number[number] = attempt
        else:
            self._has_lost_packets = True
