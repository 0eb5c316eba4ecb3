"""TLS endpoints of this machine, with certificates of an authority made for the test."""

import contextlib
import socket
import socketserver
import ssl
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme

from tests.support.loopback import family_of
from tests.support.scripted import running


def trust(authority: trustme.CA, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    """Have this process trust one authority alone.

    Args:
        authority: Which.
        monkeypatch: Takes that back at the end of the test.
        directory: For the authority's certificate.
    """
    file = directory / "authority.pem"
    authority.cert_pem.write_to_path(str(file))
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    monkeypatch.setenv("SSL_CERT_DIR", str(directory / "none"))


@contextlib.contextmanager
def endpoint(
    behave: Callable[[socket.socket], None], host: str = "127.0.0.1", port: int = 0
) -> Iterator[int]:
    """A port of which each connection is treated as ``behave`` does."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):
                behave(self.request)

    class Server(socketserver.ThreadingTCPServer):
        address_family = family_of(host)
        request_queue_size = 128

    server = Server((host, port), Handler)
    with running(server):
        yield server.server_address[1]


def server_context(certificate: trustme.LeafCert | trustme.CA) -> ssl.SSLContext:
    """A server's context; an authority shows its own certificate, which is self-signed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if isinstance(certificate, trustme.LeafCert):
        certificate.configure_cert(context)
    else:
        key, chain = certificate.private_key_pem, certificate.cert_pem
        with trustme.Blob(key.bytes() + chain.bytes()).tempfile() as path:
            context.load_cert_chain(path)
    return context


def speaking_tls(
    context: ssl.SSLContext, received: list[bytes] | None = None
) -> Callable[[socket.socket], None]:
    """Shake hands, and note what comes until the other end closes."""

    def behave(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as tls:
            try:
                data = tls.recv(1000)
            except ConnectionResetError:  # it closed before it had read our session tickets
                data = b""
            if received is not None:
                received.append(data)

    return behave


@contextlib.contextmanager
def https(
    certificate: trustme.LeafCert | trustme.CA, host: str = "127.0.0.1", port: int = 0
) -> Iterator[int]:
    """A port that speaks TLS, and shows this certificate."""
    with endpoint(speaking_tls(server_context(certificate)), host, port) as bound:
        yield bound


def answering(data: bytes) -> Callable[[socket.socket], None]:
    """Answer the client's first words with ``data``, and wait until it closes."""

    def behave(connection: socket.socket) -> None:
        connection.recv(1000)
        connection.sendall(data)
        wait_for_close(connection)

    return behave


def wait_for_close(connection: socket.socket) -> None:
    """Say nothing."""
    while connection.recv(1000):
        pass


def hang_up(connection: socket.socket) -> None:
    """Close the connection after the client's first words."""
    connection.recv(1000)
    connection.close()


def reset(connection: socket.socket) -> None:
    """Reset the connection after the client's first words."""
    connection.recv(1000)
    linger = struct.pack("=ii", 1, 0)  # on, for 0 s: close() sends a reset
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    connection.close()
