"""What others do on a network meanwhile: a program for a lab's namespaces, which ends by itself.

traffic.py connect HOST FIRST LAST INTERVAL    connect to each port, again and again
traffic.py half-open HOST FIRST LAST INTERVAL  send a SYN to each, and never more
traffic.py noise LINK ADDRESS NEIGHBOUR SECONDS  what a LAN hears in that time, in a hundredth
traffic.py proxy HOST FIRST LAST SECONDS       accept connections to each port, and connect to HOST
                                               for each, so many seconds later
"""

import contextlib
import selectors
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Sequence

SECONDS = 120
# SSDP, mDNS, LLMNR and NetBIOS; and SSDP and mDNS over IPv6.
_GROUPS = [
    ("239.255.255.250", 1900),
    ("224.0.0.251", 5353),
    ("224.0.0.252", 5355),
    ("255.255.255.255", 138),
]
_GROUPS_IPV6 = [("ff02::c", 1900), ("ff02::fb", 5353)]
_FRAGMENTED = bytes(3000)
_SCANNED = range(1, 1000)


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


def noise(link: str, address: str, neighbour: str, seconds: int) -> None:
    """Send what a LAN hears in so many seconds, each in a hundredth of that.

    Each second has multicasts, broadcasts, fragments for a neighbour, and a scan of another of its
    ports.
    """
    index = socket.if_nametoindex(link)
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock6,
    ):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(address))
        sock.bind((address, 0))
        sock6.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
        for second in range(seconds):
            for group in _GROUPS:
                with contextlib.suppress(OSError):
                    sock.sendto(b"M-SEARCH * HTTP/1.1\r\n", group)
            for group in _GROUPS_IPV6:
                with contextlib.suppress(OSError):
                    sock6.sendto(b"M-SEARCH * HTTP/1.1\r\n", group)
            with contextlib.suppress(OSError):  # the neighbour's ICMP errors
                sock.sendto(_FRAGMENTED, (neighbour, 9))
            half_open(neighbour, [_SCANNED[second % len(_SCANNED)]])
            time.sleep(0.01)


def proxy(host: str, ports: Sequence[int], delay: float) -> None:
    """Connect to HOST for everybody who connects here, and close when they do."""
    accepted = deque[tuple[float, int, socket.socket]]()
    with selectors.DefaultSelector() as selector:
        for port in ports:
            selector.register(socket.create_server(("", port)), selectors.EVENT_READ, port)
        end = time.monotonic() + SECONDS
        while (now := time.monotonic()) < end:
            while accepted and accepted[0][0] <= now:
                _, port, client = accepted.popleft()
                onwards = socket.socket()
                onwards.setblocking(False)
                onwards.connect_ex((host, port))
                selector.register(onwards, selectors.EVENT_WRITE, client)
            for key, _ in selector.select(accepted[0][0] - now if accepted else 1):
                assert isinstance(key.fileobj, socket.socket)
                if key.events == selectors.EVENT_WRITE:  # it has connected
                    selector.unregister(key.fileobj)
                    selector.register(key.data, selectors.EVENT_READ, key.fileobj)
                elif isinstance(key.data, socket.socket):  # a client that closes, and its other end
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
                    key.data.close()
                else:
                    client, _ = key.fileobj.accept()
                    accepted.append((time.monotonic() + delay, key.data, client))


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
    if kind == "noise":
        noise(host, rest[0], rest[1], int(rest[2]))
        return
    ports = range(int(rest[0]), int(rest[1]) + 1)
    if kind == "proxy":
        proxy(host, ports, float(rest[2]))
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        (connect if kind == "connect" else half_open)(host, ports)
        time.sleep(float(rest[2]))


if __name__ == "__main__":
    main()
