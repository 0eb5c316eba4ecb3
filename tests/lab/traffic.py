"""What others do on a network meanwhile: a program for a lab's namespaces, which ends by itself.

traffic.py connect HOST FIRST LAST INTERVAL    connect to each port, again and again
traffic.py half-open HOST FIRST LAST INTERVAL  send a SYN to each, and never more
traffic.py noise ADDRESS                       SSDP, mDNS and broadcasts of a LAN
"""

import contextlib
import socket
import struct
import sys
import time
from collections.abc import Sequence

SECONDS = 120
_SO_BROADCAST_GROUPS = [("239.255.255.250", 1900), ("224.0.0.251", 5353), ("255.255.255.255", 138)]


def connect(host: str, ports: Sequence[int]) -> None:
    for port in ports:
        with contextlib.suppress(OSError), socket.socket(_family(host)) as sock:
            sock.settimeout(0.2)
            sock.connect((host, port))


def half_open(host: str, ports: Sequence[int]) -> None:
    """Send SYNs of which the kernel here knows nothing, and so refuses the answers."""
    source = _source(host)
    family = _family(host)
    with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
        for port in ports:
            number = int(time.monotonic() * 1000) % 2**32
            head = struct.pack("!HHIIHHHH", 40000 + port % 9, port, number, 0, 0x5002, 8192, 0, 0)
            packed = [socket.inet_pton(family, end) for end in (source, host)]
            pseudo = b"".join(packed) + struct.pack("!II", len(head), socket.IPPROTO_TCP)
            checksum = _checksum(pseudo + head)
            raw.sendto(head[:16] + struct.pack("!H", checksum) + head[18:], (host, 0))


def noise(address: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(address))
        sock.bind((address, 0))
        for group in _SO_BROADCAST_GROUPS:
            for _ in range(20):
                with contextlib.suppress(OSError):
                    sock.sendto(b"M-SEARCH * HTTP/1.1\r\n", group)


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _source(host: str) -> str:
    with socket.socket(_family(host), socket.SOCK_DGRAM) as sock:
        sock.connect((host, 9))
        return str(sock.getsockname()[0])


def main() -> None:
    kind, host, *rest = sys.argv[1:]
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if kind == "noise":
            noise(host)
            time.sleep(0.1)
        else:
            ports = range(int(rest[0]), int(rest[1]) + 1)
            (connect if kind == "connect" else half_open)(host, ports)
            time.sleep(float(rest[2]))


if __name__ == "__main__":
    main()
