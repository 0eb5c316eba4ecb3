"""One HTTP exchange at a time with a port checker, bounded in time and size.

Unlike other clients, it takes no local port from those that are being checked, can be held to one
IP version, and decodes no content. HTTP itself is h11's.
"""

import asyncio
import base64
import contextlib
import errno
import functools
import json
import os
import random
import re
import socket
import ssl
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Self
from urllib.parse import unquote, urlsplit

import h11

from port_checker import __version__
from port_checker.addresses import MAX_PORT, MIN_UNPRIVILEGED_PORT, Address, parse_address
from port_checker.linux import ephemeral_ports, reserved_ports
from port_checker.resolver import Resolver

_FAMILIES = {None: socket.AF_UNSPEC, 4: socket.AF_INET, 6: socket.AF_INET6}
_HOST_NAME = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?", re.IGNORECASE)
# Characters that are shown of a server's text.
_MAX_TEXT_LENGTH = 300
# Attempts to find a free local port. Each fails only if that port is taken.
_BIND_ATTEMPTS = 50
_READ_SIZE = 65536
# A certificate that is not valid yet, or no more (openssl/x509_vfy.h, X509_V_ERR_CERT_...).
_WRONG_DATES = (9, 10)
_NDJSON = "application/x-ndjson"
# Called with the number of lines of an answer that have come.
OnLines = Callable[[int], None]
SILENCE = "does not answer in time"


class HttpError(Exception):
    """There was no answer; the message says why.

    Args:
        message: The rest of a sentence whose subject is the server.
        passes: Whether the trouble may pass, so that a later attempt may succeed.
        timed_out: Whether nothing came in time.
    """

    def __init__(self, message: str, *, passes: bool, timed_out: bool = False) -> None:
        super().__init__(message)
        self.passes = passes
        self.timed_out = timed_out


@dataclass(frozen=True)
class ServerUrl:
    """The base URL of a port checker.

    Attributes:
        host: A host name or IP address.
        port: Its port.
        tls: Whether it is ``https``.
        path: What the paths of the API are appended to, without a slash at the end.
        authorization: The Authorization field for the URL's user and password; None without them.
    """

    host: str
    port: int
    tls: bool
    path: str
    authorization: str | None = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a URL.

        Raises:
            ValueError: It is not the URL of a server; the message is for users.
        """
        fault = ValueError(f"{without_password(text)!r} is not a valid server URL.")
        if not text.isprintable() or re.search(r"[\s,]", text):
            raise fault
        if not text.lower().startswith(("http://", "https://")):
            raise ValueError(f"{without_password(text)!r} must start with http:// or https://.")
        try:
            parts = urlsplit(text)
            host, port = parts.hostname or "", parts.port
            if "[" in parts.netloc:
                parse_address(host)
            else:
                host = host if host.isascii() else host.encode("idna").decode()
        except ValueError:
            raise fault from None
        is_host = ":" in host or _HOST_NAME.fullmatch(host)
        if not is_host or port == 0 or parts.query or parts.fragment:
            raise fault
        authorization = None
        if parts.username is not None or parts.password is not None:
            login = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
            authorization = f"Basic {base64.b64encode(login.encode()).decode()}"
        tls = parts.scheme == "https"
        default = 443 if tls else 80
        return cls(
            host, port if port is not None else default, tls, parts.path.rstrip("/"), authorization
        )

    def __str__(self) -> str:
        return self.root + self.path

    @property
    def root(self) -> str:
        """The URL without its path, user and password."""
        scheme = "https" if self.tls else "http"
        return f"{scheme}://{self.authority}"

    @property
    def authority(self) -> str:
        """The host, and the port where it is not the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"


def without_password(url: str) -> str:
    """Return what may be shown of a URL, or of a text that was meant to be one."""
    return re.sub(r"^([a-z+.-]*://)?.*@", r"\1", url, flags=re.IGNORECASE | re.DOTALL)


def printable(text: str) -> str:
    """Make a server's text safe to print: it must not control the terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:_MAX_TEXT_LENGTH])


class LocalPorts:
    """Local ports for this program's own connections: none of those that are being checked.

    If those are in the ephemeral range, as the network's default ports are, the kernel might give
    one of them to a connection to a server.
    """

    def __init__(self, checked: Collection[int]) -> None:
        excluded = set(checked) | _expand(reserved_ports())
        ranges = ephemeral_ports(), range(MIN_UNPRIVILEGED_PORT, MAX_PORT + 1)
        usable = (list(set(ports) - excluded) for ports in ranges)
        self._ports = next(filter(None, usable), list(ranges[1]))

    def bind(self, sock: socket.socket) -> None:
        """Bind a socket to one of the ports, on all addresses.

        Raises:
            OSError: None of those that were tried is free.
        """
        count = min(_BIND_ATTEMPTS, len(self._ports))
        for port in random.sample(self._ports, count):
            try:
                sock.bind(("", port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                return
        raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))


def _expand(ports: str) -> set[int]:
    """Expand a list as the kernel writes it: ``50800-50899,51000``."""
    expanded: set[int] = set()
    for word in filter(None, ports.split(",")):
        low, _, high = word.partition("-")
        expanded |= set(range(int(low), int(high or low) + 1))
    return expanded


@dataclass(frozen=True)
class Response:
    """An answer.

    Attributes:
        status: The HTTP status.
        reason: The name of the status.
        headers: The values of the fields, by lower-case name; of a repeated field, the last.
        body: At most as many bytes as were asked for.
        local: This machine's address of the connection.
        remote: The server's address of the connection.
    """

    status: int
    reason: str
    headers: Mapping[str, str]
    body: bytes
    local: Address
    remote: Address

    @functools.cached_property
    def document(self) -> object:
        """The body, read as JSON; None if it is not JSON."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None


@dataclass(frozen=True)
class HttpClient:
    """Makes requests.

    Attributes:
        ports: Where its local ports come from.
        family: 4 or 6: the only IP version that it uses; None for both.
        connect_timeout: Seconds for a connection, with its TLS handshake.
        answer_timeout: Seconds for the answer.
        look_up_timeout: Seconds for the look-up of a host name.
        resolver: What looks it up.
    """

    ports: LocalPorts
    family: int | None
    connect_timeout: float
    answer_timeout: float
    look_up_timeout: float
    resolver: Resolver = field(default_factory=Resolver, repr=False)

    async def families(self, url: ServerUrl) -> set[int]:
        """Return the IP versions over which a server has addresses; none if that is unknown."""
        try:
            addresses = await self._look_up(url, None)
        except (OSError, HttpError):
            return set()
        return {6 if ":" in address else 4 for address in addresses}

    async def reaches(self, url: ServerUrl) -> bool:
        """Whether a TCP connection to a server can be made."""
        try:
            async with asyncio.timeout(self.connect_timeout):
                sock = await self._connect(url)
        except (OSError, HttpError):
            return False
        sock.close()
        return True

    async def request(
        self,
        url: ServerUrl,
        method: str,
        path: str,
        body: bytes | None,
        max_size: int,
        on_lines: OnLines | None = None,
    ) -> Response:
        """Make a request and read its answer.

        Args:
            url: The server.
            method: ``GET`` or ``POST``.
            path: Appended to the URL's.
            body: JSON; None for none.
            max_size: Bytes of the answer's body that are read.
            on_lines: Called with the number of lines that have come, if the answer is to come line
                by line. The body of the response is then the last line alone.

        Raises:
            HttpError: There is no answer that makes sense.
        """
        try:
            async with asyncio.timeout(self.look_up_timeout + self.connect_timeout):
                reader, writer = await self._open(url)
            try:
                async with asyncio.timeout(self.answer_timeout):
                    head = _head(url, method, path, body, lines=on_lines is not None)
                    return _last_line(await _exchange(reader, writer, head, max_size, on_lines))
            finally:
                writer.transport.abort()
        except TimeoutError:
            raise HttpError(SILENCE, passes=True, timed_out=True) from None
        except ssl.SSLCertVerificationError as error:
            raise HttpError(f"TLS failed: {_distrust(error)}", passes=False) from None
        except ssl.SSLError as error:
            raise HttpError(f"TLS failed: {error.reason or error}", passes=False) from None
        except h11.ProtocolError as error:
            message = f"does not speak HTTP: {printable(str(error))}"
            raise HttpError(message, passes=False) from None
        except OSError as error:
            passes = error.errno != errno.EAFNOSUPPORT  # this machine has no IPv6
            raise HttpError(f"cannot be reached: {_strerror(error)}", passes=passes) from None

    async def _open(self, url: ServerUrl) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        context, name = (self._tls_context, url.host) if url.tls else (None, None)
        sock = await self._connect(url)
        try:
            return await asyncio.open_connection(sock=sock, ssl=context, server_hostname=name)
        except BaseException:
            sock.close()
            raise

    @functools.cached_property  # it takes some 30 ms to read the system's authorities
    def _tls_context(self) -> ssl.SSLContext:
        """What the system trusts; SSL_CERT_FILE and SSL_CERT_DIR name other authorities.

        Raises:
            HttpError: SSL_CERT_FILE has no certificates. OpenSSL would ignore that, and blame the
                server's certificate.
        """
        context = ssl.create_default_context()
        if name := os.environ.get("SSL_CERT_FILE"):
            try:
                context.load_verify_locations(name)
            except OSError as error:
                is_empty = isinstance(error, ssl.SSLError)
                why = "no certificate in it" if is_empty else _strerror(error)
                message = f"TLS failed: SSL_CERT_FILE={printable(name)} cannot be used: {why}"
                raise HttpError(message, passes=False) from None
        # Python 3.13 changed its defaults; here every Python judges alike, and a private authority
        # can be used whose certificates lack what RFC 5280 asks for.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        return context

    async def _connect(self, url: ServerUrl) -> socket.socket:
        """Connect to the first of the server's addresses that answers."""
        loop = asyncio.get_running_loop()
        try:
            addresses = await self._look_up(url, self.family)
        except socket.gaierror as error:
            if self.family and error.errno != socket.EAI_AGAIN and await self.families(url):
                raise HttpError(f"has no IPv{self.family} address", passes=False) from None
            passes = error.errno == socket.EAI_AGAIN
            raise HttpError(
                f"host name cannot be resolved: {error.strerror}", passes=passes
            ) from None
        failures: list[OSError] = []
        for address in addresses:
            sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
            try:
                sock.setblocking(False)
                # A reset at the end leaves no connection in TIME_WAIT at the local port.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.ports.bind(sock)
                async with asyncio.timeout(self.connect_timeout / len(addresses)):
                    await loop.sock_connect(sock, (address, url.port))
            except BaseException as error:
                sock.close()
                if not isinstance(error, OSError):
                    raise
                failures.append(error)
            else:
                return sock
        raise failures[0]

    async def _look_up(self, url: ServerUrl, family: int | None) -> list[str]:
        try:
            async with asyncio.timeout(self.look_up_timeout):
                return await self.resolver.resolve(url.host, _FAMILIES[family])
        except TimeoutError:
            message = "host name cannot be resolved: no DNS server answers"
            raise HttpError(message, passes=False) from None


def _head(
    url: ServerUrl, method: str, path: str, body: bytes | None, *, lines: bool
) -> list[h11.Event]:
    headers = {
        "Host": url.authority,
        "User-Agent": f"port-checker/{__version__}",
        "Accept": f"{_NDJSON}, application/json" if lines else "application/json",
        "Accept-Encoding": "identity",
        "Connection": "close",
    }
    if url.authorization:
        headers["Authorization"] = url.authorization
    if body is not None:
        headers |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
    target = url.path + path
    request = h11.Request(method=method, target=target, headers=list(headers.items()))
    return [request, *([h11.Data(data=body)] if body else []), h11.EndOfMessage()]


async def _exchange(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    events: list[h11.Event],
    max_size: int,
    on_lines: OnLines | None,
) -> Response:
    http = h11.Connection(h11.CLIENT)
    with contextlib.suppress(ConnectionError):  # it may have answered without reading all
        writer.write(b"".join(http.send(event) or b"" for event in events))
        await writer.drain()
    response, body, lines = None, bytearray(), 0
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            data = await reader.read(_READ_SIZE)
            if not data and not _ends_at_close(response):
                if not response and http.trailing_data[0][:5] not in (b"", b"HTTP/"):
                    raise HttpError("does not speak HTTP", passes=False)
                raise HttpError("closes the connection without a full answer", passes=True)
            http.receive_data(data)
        elif isinstance(event, h11.Response):
            response = event
        elif isinstance(event, h11.Data):
            body += event.data
            lines += (new_lines := event.data.count(b"\n"))
            if on_lines and new_lines:
                on_lines(lines)
            if len(body) > max_size:
                raise HttpError("answer is too long: is this a port checker?", passes=False)
        elif isinstance(event, h11.EndOfMessage) and response:
            break
        elif not isinstance(event, h11.InformationalResponse):
            raise HttpError("does not speak HTTP", passes=False)
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in response.headers}
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise HttpError("encodes its answer, though it was asked not to", passes=False)
    local, remote = (writer.get_extra_info(name)[0] for name in ("sockname", "peername"))
    return Response(
        response.status_code,
        printable(response.reason.decode("latin-1")),
        headers,
        bytes(body),
        parse_address(local.partition("%")[0]),
        parse_address(remote.partition("%")[0]),
    )


def _last_line(response: Response) -> Response:
    """Reduce an answer that came line by line to its last line, which is the answer proper.

    An error in that line has no HTTP status of its own: the check had begun when it failed.

    Raises:
        HttpError: The last line is missing. Where the body ends with the connection, nothing else
            shows that the server broke off.
    """
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != _NDJSON:
        return response
    *_, last = response.body.splitlines() or [b""]
    if not response.body.endswith(b"\n") or last.startswith(b'{"port":'):
        raise HttpError("closes the connection without a full answer", passes=True)
    if last.startswith(b'{"detail":'):
        status = HTTPStatus.SERVICE_UNAVAILABLE
        return replace(response, status=status, reason=status.phrase, body=last)
    return replace(response, body=last)


def _ends_at_close(response: h11.Response | None) -> bool:
    """Whether the body ends with the connection (RFC 9112 section 6.3)."""
    names = {name for name, _ in response.headers} if response else set()
    return bool(response) and not names & {b"content-length", b"transfer-encoding"}


def _distrust(error: ssl.SSLCertVerificationError) -> str:
    """Say why a certificate is not trusted, and if it is for its dates, by which clock."""
    if error.verify_code not in _WRONG_DATES:
        return error.verify_message
    return f"{error.verify_message} by this machine's clock ({datetime.now(UTC):%F %R} UTC)"


def _strerror(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error) or type(error).__name__
