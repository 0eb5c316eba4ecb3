"""A program at a network interface that drops connections to some ports before all else (XDP)."""

import contextlib
import os
import socket
import struct
from collections.abc import Iterator

from tests.lab.network import Lab
from tests.support.ebpf import load

_BPF_PROG_TYPE_XDP = 6  # linux/bpf.h
_XDP_DROP, _XDP_PASS, _XDP_FLAGS_SKB_MODE = 1, 2, 2  # linux/bpf.h, linux/if_link.h
_RTM_SETLINK, _NLM_F_REQUEST, _NLM_F_ACK = 19, 1, 4
_IFLA_XDP, _IFLA_XDP_FD, _IFLA_XDP_FLAGS, _NLA_F_NESTED = 43, 1, 3, 0x8000
# Behind the Ethernet header: where the protocol's number is, and a TCP header's port.
_OFFSETS = {4: (14 + 9, 14 + 20 + 2), 6: (14 + 6, 14 + 40 + 2)}


@contextlib.contextmanager
def dropping(lab: Lab, name: str, interface: str, ports: range, version: int) -> Iterator[None]:
    """Have a machine's interface drop TCP packets to ports."""
    program = lab.submit(name, _load, ports, version).result()
    try:
        lab.submit(name, _attach, interface, program).result()
        yield
    finally:
        lab.submit(name, _attach, interface, -1).result()
        os.close(program)


def _load(ports: range, version: int) -> int:
    protocol, port = _OFFSETS[version]
    code = [
        (0x61, 0x12, 0, 0),  # r2 = the packet's begin
        (0x61, 0x13, 4, 0),  # r3 = its end
        (0xBF, 0x24, 0, 0),  # r4 = r2
        (0x07, 0x04, 0, port + 2),  # r4 += as far as we read
        (0x2D, 0x34, 8, 0),  # r4 > r3: pass
        (0x71, 0x25, protocol, 0),  # r5 = the protocol
        (0x55, 0x05, 6, socket.IPPROTO_TCP),  # another: pass
        (0x69, 0x25, port, 0),  # r5 = the port
        (0xDC, 0x05, 0, 16),  # in this machine's byte order
        (0xA5, 0x05, 3, ports[0]),  # below: pass
        (0x25, 0x05, 2, ports[-1]),  # above: pass
        (0xB7, 0x00, 0, _XDP_DROP),
        (0x95, 0x00, 0, 0),
        (0xB7, 0x00, 0, _XDP_PASS),
        (0x95, 0x00, 0, 0),
    ]
    return load(_BPF_PROG_TYPE_XDP, code)


def _attach(interface: str, program: int) -> None:
    xdp = struct.pack("=HHiHHI", 8, _IFLA_XDP_FD, program, 8, _IFLA_XDP_FLAGS, _XDP_FLAGS_SKB_MODE)
    content = struct.pack("=BxHiII", 0, 0, socket.if_nametoindex(interface), 0, 0)
    content += struct.pack("=HH", 4 + len(xdp), _IFLA_XDP | _NLA_F_NESTED) + xdp
    head = (16 + len(content), _RTM_SETLINK, _NLM_F_REQUEST | _NLM_F_ACK, 0, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as netlink:
        netlink.send(struct.pack("=IHHII", *head) + content)
        (error,) = struct.unpack_from("=i", netlink.recv(65536), 16)
    if error:
        raise OSError(-error, os.strerror(-error))
