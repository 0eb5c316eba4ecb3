"""Asking a running service whether it answers, for containers and scripts.

They ask every few seconds, so this imports only what it needs.
"""

import contextlib
import json
import os
import re
import socket
import sys
from collections.abc import Iterable
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from urllib.parse import urlsplit

# Seconds. /health is never slow: a service that takes longer is not well.
_TIMEOUT = 5.0

# The defaults of PORT_CHECKER_HOST and PORT_CHECKER_PORT.
DEFAULT_HOST, DEFAULT_PORT = "0.0.0.0", "9000"  # noqa: S104  # compared, not bound

# Where to reach what listens on all addresses. With IPv6 switched off, :: is IPv4 alone.
_REACHABLE = {DEFAULT_HOST: ["127.0.0.1"], "::": ["[::1]", "127.0.0.1"], "localhost": ["127.0.0.1"]}

_UNIX = "unix:"


class _Unhealthy(Exception):
    """The service does not answer as it should; the message says how it failed."""


def run(url: str | None = None) -> int:
    """Ask a service for its health, and write to stderr what is wrong.

    Args:
        url: Of the service, with or without ``/health``, or ``unix:/path``; by default, of the
            service that these settings start on this machine.

    Returns:
        The program's exit status: 0 it is healthy, 1 it is not, 2 the URL or a setting is wrong.
    """
    try:
        _require_healthy(_local_urls() if url is None else [url])
        return 0
    except _Unhealthy as error:
        message, status = str(error), 1
    except (ValueError, HTTPException) as error:
        message, status = str(error), 2
    message = re.sub(r"//\S*@", "//", message)  # without a password
    printable = "".join(each if each.isprintable() else "?" for each in message)
    sys.stderr.write(f"port-checker: {printable}\n")
    return status


def _local_urls() -> list[str]:
    """Return the URLs at which the service on this machine may answer.

    Raises:
        ValueError: A setting is wrong.
    """
    host = os.environ.get("PORT_CHECKER_HOST", DEFAULT_HOST)
    port = os.environ.get("PORT_CHECKER_PORT", DEFAULT_PORT)
    if os.path.lexists(".env") or not (_is_plain_host(host) and _is_plain_port(port)):
        # This takes several times as long, and knows what is wrong with a value.
        from port_checker.settings import load_settings

        settings = load_settings()
        host, port = settings.host, str(settings.port)
    if host.startswith(_UNIX):
        return [host]
    literal = f"[{host}]" if ":" in host else host
    return [f"http://{address}:{port}" for address in _REACHABLE.get(host, [literal])]


def _is_plain_host(host: str) -> bool:
    if host in _REACHABLE or host.startswith(f"{_UNIX}/"):
        return True
    try:
        socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
    except OSError:
        return False
    return True


def _is_plain_port(port: str) -> bool:
    return len(port) <= 5 and port.isascii() and port.isdecimal() and 1 <= int(port) <= 65535


def _require_healthy(urls: Iterable[str]) -> None:
    """Ask the first of these URLs that accepts a connection.

    Raises:
        _Unhealthy: None does, or it does not answer that it is well.
        ValueError, HTTPException: A URL is not one of HTTP.
    """
    failure = ""
    for url in urls:
        connection, path = _connection(url)
        with contextlib.closing(connection):
            try:
                connection.connect()
            except OSError as error:
                failure = f"{url} does not answer: {error}"
            else:
                return _require_ok(connection, url, path)
    raise _Unhealthy(failure)


def _require_ok(connection: HTTPConnection, url: str, path: str) -> None:
    try:
        connection.request("GET", path)
        with connection.getresponse() as answer:
            body = answer.read(1000)
    except (OSError, HTTPException) as error:
        raise _Unhealthy(f"{url} does not answer: {error}") from None
    if answer.status != 200:
        raise _Unhealthy(f"{url} answers {answer.status} {answer.reason}")
    try:
        is_ok = json.loads(body) == {"status": "ok"}
    except (ValueError, RecursionError):
        is_ok = False
    if not is_ok:
        raise _Unhealthy(f"{url} does not answer as a port checker does")


def _connection(url: str) -> tuple[HTTPConnection, str]:
    """Return a connection that is not made yet, and the path of ``/health``."""
    if url.startswith(_UNIX):
        return _UnixConnection(url.removeprefix(_UNIX)), "/health"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} must start with http:// or https://.")
    # Not through a proxy, which may be set for the programs of a whole container.
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    path = parts.path.removesuffix("/").removesuffix("/health") + "/health"
    return kind(parts.hostname, parts.port, timeout=_TIMEOUT), path


class _UnixConnection(HTTPConnection):
    """A connection to the service on a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_TIMEOUT)
        self._path = path

    def connect(self) -> None:
        """Connect."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(_TIMEOUT)
        self.sock.connect(self._path)
