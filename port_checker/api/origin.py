"""Refusing requests that other sites' pages make: to us they come from the visitor's address.

Programs other than browsers send none of the headers that show this, so it does not affect them.
"""

import functools
import socket
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from pathlib import Path

from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from port_checker.addresses import Address, parse_address, parse_host
from port_checker.errors import ErrorCode, ServiceError

_CROSS_SITE = (b"cross-site", b"same-site")
_SAME_ORIGIN = (b"same-origin", b"none")  # "none": typed in, or opened from a bookmark


_ANOTHER_SITE = (
    "This request comes from another site's page. Use this service's own page, or a program "
    "that is not a browser."
)
_NOT_FORWARDED = (
    "If a proxy forwarded it, have the proxy pass Host on and set X-Forwarded-For, and list it in "
    "PORT_CHECKER_TRUSTED_PROXIES."
)
_HOST_NOT_PASSED_ON = (
    "If it does come from this service's page, have the proxy in front of it pass Host on (nginx: "
    "proxy_set_header Host $host) or set X-Forwarded-Host."
)


class CrossOrigin(ServiceError):
    """Another site's page makes this request from its visitor's browser."""

    code = ErrorCode.CROSS_ORIGIN


def local_names(hosts: Path = Path("/etc/hosts")) -> set[str]:
    """Return this machine's host name and the names that ``hosts`` gives a loopback address."""
    names = {socket.gethostname().lower()}
    try:
        lines = hosts.read_text(errors="replace").splitlines()
    except OSError:
        return names
    for line in lines:
        address, *aliases = line.partition("#")[0].split() or [""]
        if (literal := _literal(address)) and literal.is_loopback:
            names.update(alias.lower() for alias in aliases)
    return names


def is_name_of_this_machine(
    host: bytes | None,
    is_own: Callable[[Address], bool],
    names: Callable[[], Collection[str]] = local_names,
) -> bool:
    """Whether a ``Host`` field names this machine: localhost, an address or a name of its own.

    Args:
        host: The field; without one (HTTP/1.0), nothing speaks against it.
        is_own: Whether an address is one of this machine's.
        names: Returns the names of this machine.
    """
    if not host:
        return True
    name = _host_name(host)
    if address := _literal(name):
        return address.is_loopback or is_own(address)
    return _is_localhost(name) or name in names()


def require_same_origin(
    connection: HTTPConnection,
    caller: Address | None,
    names: Callable[[], Collection[str]] = local_names,
) -> None:
    """Refuse a request that another site's page makes.

    Browsers say so in ``Sec-Fetch-Site``, but over plain HTTP only in ``Origin``
    (https://www.w3.org/TR/fetch-metadata/). A page whose host name its owner has pointed at
    127.0.0.1 (DNS rebinding) has the same origin; that name in ``Host`` gives it away.

    Args:
        connection: The request.
        caller: Its caller, which a trusted proxy forwarded if it is not the peer.
        names: Returns the names of this machine.

    Raises:
        CrossOrigin: The message says what to do.
    """
    fields = dict(connection.scope["headers"])
    site = fields.get(b"sec-fetch-site")
    origin = fields.get(b"origin")
    host = fields.get(b"host")
    if site in _CROSS_SITE:
        raise CrossOrigin(_ANOTHER_SITE)
    if origin is not None and site not in _SAME_ORIGIN:
        if not _is_forwarded(connection, caller):
            if not _is_same_host(origin, host):
                raise CrossOrigin(f"{_ANOTHER_SITE} {_NOT_FORWARDED}")
        elif not _is_same_host_to_browser(origin, host, connection.scope["headers"]):
            raise CrossOrigin(f"{_ANOTHER_SITE} {_HOST_NOT_PASSED_ON}")
    if not (host and caller and caller.is_loopback):
        return
    name = _host_name(host)
    if _literal(name) or _is_localhost(name) or _is_forwarded(connection, caller):
        return
    if name not in names():
        raise CrossOrigin(
            "This request comes from this machine, but its Host is not a name of this machine. Use "
            "localhost or an IP address. If a proxy forwarded it, have the proxy set "
            "X-Forwarded-For."
        )


class AllowedHosts:
    """An ASGI middleware that refuses requests to names that are not this service's.

    A name that its owner has pointed at a private address (DNS rebinding) is the same origin to a
    browser, which lets that name's pages read the answers.

    Args:
        app: Answers the requests that are let through.
        allowed: Names, in lower case; ``*.example`` is every name below ``example``. IP literals,
            localhost and this machine's names are allowed besides.
        refuse: Answers a request that is not.
        names: Returns the names of this machine.
    """

    def __init__(
        self,
        app: ASGIApp,
        allowed: Sequence[str],
        refuse: Callable[[HTTPConnection, Exception], Awaitable[Response]],
        names: Callable[[], Collection[str]] = local_names,
    ) -> None:
        self._app = app
        self._allowed = frozenset(allowed)
        self._endings = tuple(name[1:] for name in allowed if name.startswith("*."))
        self._refuse = refuse
        self._names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "lifespan":
            for name, value in scope["headers"]:
                if name == b"host" and value and not self._is_allowed(_host_name(value)):
                    refusal = CrossOrigin(
                        "This service does not go by the name in Host. Use its name or its IP "
                        "address. If you run it, add the name to PORT_CHECKER_ALLOWED_HOSTS, or "
                        "have the proxy in front of it pass Host on."
                    )
                    response = await self._refuse(HTTPConnection(scope), refusal)
                    return await response(scope, receive, send)
        return await self._app(scope, receive, send)

    def _is_allowed(self, name: str) -> bool:
        if name in self._allowed or _literal(name) or _is_localhost(name):
            return True
        return name.endswith(self._endings) or name in self._names()


def _is_forwarded(connection: HTTPConnection, caller: Address | None) -> bool:
    """Whether a trusted proxy forwarded the request: then the caller is not the peer."""
    if caller is None or connection.client is None:
        return True
    return parse_host(connection.client.host) != caller


def _is_same_host(origin: bytes, host: bytes | None) -> bool:
    authority = origin.partition(b"://")[2]
    # It is empty in "null", of a page that has no origin.
    return bool(authority) and _host_name(authority) == _host_name(host or b"")


def _is_same_host_to_browser(
    origin: bytes, host: bytes | None, fields: Iterable[tuple[bytes, bytes]]
) -> bool:
    """Whether the browser asked for the host of the page, as far as a proxy passes that on."""
    if hosts := [value for name, value in fields if name == b"x-forwarded-host" and value]:
        # Each proxy may add one: the browser's is the first.
        return _is_same_host(origin, hosts[0].partition(b",")[0].strip(b" \t"))
    name = _host_name(host or b"")
    # A proxy that does not pass Host on sends its own name for this service: an address, or a name
    # that only its configuration or its network knows (nginx: that of an upstream block).
    if origin.partition(b"://")[2] and ("." not in name or _literal(name)):
        return True
    return _is_same_host(origin, host)


@functools.lru_cache(maxsize=16)  # a server has few names, and each request needs one twice
def _host_name(authority: bytes) -> str:
    """Return the host of ``host:port``, in lower case and without brackets."""
    text = authority.decode("latin-1").lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0].removesuffix(".")


def _is_localhost(name: str) -> bool:
    return name == "localhost" or name.endswith(".localhost")


def _literal(name: str) -> Address | None:
    """Return the address that a name is, if it is one."""
    try:
        return parse_address(name)
    except ValueError:
        return None
