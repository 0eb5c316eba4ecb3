"""Which requests other sites' pages make: a browser lends its visitor's address to every page.

Programs send none of the headers that give a page away, so this does not affect them.
"""

import socket
from collections.abc import Callable, Collection
from pathlib import Path

from starlette.requests import HTTPConnection

from port_checker.addresses import Address, parse_address, parse_host

_CROSS_SITE = (b"cross-site", b"same-site")
_SAME_ORIGIN = (b"same-origin", b"none")  # "none": typed in, or opened from a bookmark


class CrossOrigin(Exception):
    """Another site's page makes this request from its visitor's browser."""


def local_names(hosts: Path = Path("/etc/hosts")) -> set[str]:
    """Return this machine's host name and the names that ``hosts`` gives a loopback address."""
    names = {socket.gethostname().lower()}
    try:
        lines = hosts.read_text(errors="replace").splitlines()
    except OSError:
        return names
    for line in lines:
        address, *aliases = line.partition("#")[0].split() or [""]
        if _is_loopback(address):
            names.update(alias.lower() for alias in aliases)
    return names


def require_same_origin(
    connection: HTTPConnection,
    caller: Address | None,
    names: Callable[[], Collection[str]] = local_names,
) -> None:
    """Refuse a request that another site's page makes.

    Browsers tell by ``Sec-Fetch-Site``, but over plain HTTP only by ``Origin``
    (https://www.w3.org/TR/fetch-metadata/). A page whose host name its owner has pointed at
    127.0.0.1 (DNS rebinding) is of the same origin, and is told by that name in ``Host``.

    Args:
        connection: The request.
        caller: Its caller, which a trusted proxy forwarded if it is not the peer.
        names: Returns the names of this machine.

    Raises:
        CrossOrigin: The message says what to do.
    """
    site = origin = host = None
    for name, value in connection.scope["headers"]:
        if name == b"host":
            host = value
        elif name == b"origin":
            origin = value
        elif name == b"sec-fetch-site":
            site = value
    if site in _CROSS_SITE or (
        site not in _SAME_ORIGIN
        and origin is not None
        and not _is_same_host(origin, host, _is_forwarded(connection, caller))
    ):
        raise CrossOrigin(
            "This request comes from another site's page. Use this service's own page, or a "
            "program that is not a browser. If a proxy forwarded it, have the proxy set "
            "X-Forwarded-For."
        )
    if not (host and caller and caller.is_loopback):
        return
    name = _host_name(host)
    if _is_literal_or_localhost(name) or _is_forwarded(connection, caller) or name in names():
        return
    raise CrossOrigin(
        "This request comes from this machine, but its Host is not a name of this machine. Use "
        "localhost or an IP address. If a proxy forwarded it, have the proxy set X-Forwarded-For."
    )


def _is_forwarded(connection: HTTPConnection, caller: Address | None) -> bool:
    """Whether a trusted proxy forwarded the request: then the caller is not the peer."""
    if caller is None or connection.client is None:
        return True
    return parse_host(connection.client.host) != caller


def _is_same_host(origin: bytes, host: bytes | None, is_forwarded: bool) -> bool:
    authority = origin.partition(b"://")[2]
    if not authority:  # "null", of a page that has no origin
        return False
    name = _host_name(host or b"")
    if is_forwarded and (not name or _is_literal_or_localhost(name)):
        return True  # the proxy did not pass Host on
    return _host_name(authority) == name


def _host_name(authority: bytes) -> str:
    """Return the host of ``host:port``, in lower case and without brackets."""
    text = authority.decode("latin-1").lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0].removesuffix(".")


def _is_literal_or_localhost(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        parse_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(text: str) -> bool:
    try:
        return parse_address(text).is_loopback
    except ValueError:
        return False
