"""HTTP clients; by hand where a library would hide what is sent."""

import json
import socket
import ssl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import httpx

# For plain HTTP. The context that httpx makes for each client loads all authorities: 28 ms of CPU.
_NO_AUTHORITIES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

Headers = Mapping[str, str] | Sequence[tuple[str, str]]

HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


def client_of(url: str, address: str | None = None, headers: Headers = ()) -> httpx.Client:
    """A client of a service that speaks plain HTTP.

    Args:
        url: The service's.
        address: What it connects from.
        headers: Of each request.
    """
    transport = httpx.HTTPTransport(_NO_AUTHORITIES, local_address=address)
    return httpx.Client(base_url=url, transport=transport, headers=headers, timeout=60)


def check_of(*ports: int) -> bytes:
    """A request for a check of ports of 127.0.0.1."""
    return _post("/check-ports", {"provider_ip": "127.0.0.1", "ports": ports})


def check_tls_of(port: int) -> bytes:
    """A request for a check of a TLS endpoint on 127.0.0.1."""
    return _post("/check-tls", {"host": "127.0.0.1", "port": port, "expected_ip": "127.0.0.1"})


def _post(path: str, document: object) -> bytes:
    body = json.dumps(document).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


@contextmanager
def connected(client: httpx.Client) -> Iterator[socket.socket]:
    """A raw connection to what the client is for."""
    with socket.create_connection(("127.0.0.1", client.base_url.port or 0), timeout=60) as sock:
        yield sock


def read_answer(sock: socket.socket, *, has_body: bool = True) -> tuple[bytes, bytes]:
    """The head and body of one answer; both empty when the connection was closed."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = sock.recv(1)
        if not byte:
            return b"", b""
        head += byte
    if not has_body:
        return head, b""
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    body = b""
    while len(body) < length:
        body += sock.recv(length - len(body))
    return head, body
