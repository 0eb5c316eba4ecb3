"""Servers whose answers a test scripts, over real HTTP, and checks that ask them."""

import asyncio
import contextlib
import json
import socket
import socketserver
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from port_checker.api.errors import STATUS
from port_checker.provider import Report, Waits, verify
from port_checker.schemas import ErrorCode

REFUSED = "Connection refused"


def check(
    ports: Sequence[int],
    *servers: str,
    tls: Sequence[int | tuple[int, int]] = (),
    ip: str | None = None,
    **waits: Any,
) -> Report:
    """Have servers check ports of this machine, and wait for nothing that does not happen."""
    return asyncio.run(verify(ports, servers=servers, tls=tls, ip=ip, waits=short_waits(**waits)))


def short_waits(slept: list[float] | None = None, **waits: Any) -> Waits:
    """Waits in which sleeping takes no time, and is recorded."""

    async def sleep(seconds: float) -> None:
        if slept is not None:
            slept.append(seconds)
        await asyncio.sleep(0)

    return Waits(**{"late_connections": 0.2, "sleep": sleep, **waits})


def connect(ports: Sequence[int]) -> None:
    """Do what a checker does."""
    for port in ports:
        # Whoever accepts it may have too many, and reset it before we look.
        with contextlib.suppress(ConnectionResetError):
            socket.create_connection(("127.0.0.1", port), 60).close()


@dataclass(frozen=True)
class Answer:
    """What a scripted server sends: as it is if it is bytes, else as JSON."""

    document: object
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> bytes:
        if isinstance(self.document, bytes):
            return self.document
        return json.dumps(self.document).encode()


TELLS_IP = Answer({"ip": "127.0.0.1"})
NOT_FOUND = Answer({"detail": "Not Found"}, 404)  # as a server without GET /ip has it


def verdicts(errors: Mapping[int, str | None]) -> Answer:
    """An error for each port; None for those that are accessible."""
    results = {
        str(port): {"accessible": error is None, "error": error} for port, error in errors.items()
    }
    return Answer({"success": None in errors.values(), "results": results, "message": "Verified"})


def accessible(ports: Sequence[int]) -> Answer:
    """Say it, without a look."""
    return verdicts(dict.fromkeys(ports))


def connected(ports: Sequence[int]) -> Answer:
    """Say it, and do it."""
    connect(ports)
    return accessible(ports)


def refused(ports: Sequence[int]) -> Answer:
    return verdicts(dict.fromkeys(ports, REFUSED))


def refusal(code: ErrorCode, message: str = "No.", **headers: str) -> Answer:
    """An error of the service."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer({"detail": {"code": code, "message": message}}, STATUS[code], named)


class ScriptedServer(ThreadingHTTPServer):
    """A server over real HTTP.

    Attributes:
        asked: The ports of each request, in the order of the requests.
        addresses: The ``provider_ip`` of each.
    """

    daemon_threads = False  # whoever closes it waits for them
    request_queue_size = 128

    def __init__(self, check: Callable[[list[int]], Answer], ip: Callable[[], Answer]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.check = check
        self.ip = ip
        self.asked: list[list[int]] = []
        self.addresses: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def server_bind(self) -> None:
        """Bind, and do not look up this machine's name as HTTPServer does."""
        socketserver.TCPServer.server_bind(self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Tell of errors but those of clients that close the connection when they have enough."""
        if not isinstance(sys.exception(), BrokenPipeError | ConnectionResetError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, ScriptedServer)
        self._send(self.server.ip() if self.path == "/ip" else NOT_FOUND)

    def do_POST(self) -> None:
        assert isinstance(self.server, ScriptedServer)
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/check-tls":  # older servers lack it
            return self._send(NOT_FOUND)
        assert self.path == "/check-ports"
        self.server.addresses.append(asked["provider_ip"])
        self.server.asked.append(sorted(asked["ports"]))
        return self._send(self.server.check(asked["ports"]))

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body)

    def log_message(self, *_: object) -> None:
        """Stay quiet."""


@contextlib.contextmanager
def running(server: socketserver.TCPServer) -> Iterator[None]:
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def scripted(
    check: Callable[[list[int]], Answer] = connected, ip: Callable[[], Answer] | Answer = TELLS_IP
) -> Iterator[ScriptedServer]:
    """Run a server which answers what the functions return."""
    server = ScriptedServer(check, (lambda: ip) if isinstance(ip, Answer) else ip)
    with running(server):
        yield server


@contextlib.contextmanager
def raw_server(behave: Callable[[socket.socket], None]) -> Iterator[str]:
    """Run a server that does something of its own with each connection."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            behave(self.request)

    class Server(socketserver.ThreadingTCPServer):
        def handle_error(self, *_: object) -> None:
            """Stay quiet."""

    server = Server(("127.0.0.1", 0), Handler)
    with running(server):
        yield f"http://127.0.0.1:{server.server_address[1]}"
