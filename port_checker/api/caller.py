"""Who the caller is: the peer of the connection, or the address that a trusted proxy forwarded."""

import logging
from collections.abc import Sequence

from starlette.requests import HTTPConnection

from port_checker.addresses import Address, Network, lies_in, parse_address, parse_host

# Headers that show that a proxy forwarded the request (RFC 7239, RFC 9110 section 7.6.3, and a
# convention of nginx), but from which we do not take the caller's address.
_OTHER_PROXY_HEADERS = frozenset((b"forwarded", b"via", b"x-real-ip"))

# How many hops of X-Forwarded-For are read. Chains of proxies are shorter; a header that is as long
# as a request may be would take 0.2 s.
_MAX_HOPS = 20

logger = logging.getLogger(__name__)


class CallerResolver:
    """Finds out the caller of a request.

    Args:
        trusted_proxies: The peers whose ``X-Forwarded-For`` counts.
    """

    def __init__(self, trusted_proxies: Sequence[Network]) -> None:
        self._trusted_proxies = trusted_proxies
        self._has_warned = False

    def resolve(self, connection: HTTPConnection) -> Address | None:
        """Return the caller's address, or None if it is unknown."""
        peer = connection.scope["client"][0] if connection.scope.get("client") else None
        forwarded_for: list[str] = []
        is_proxy = False
        for name, value in connection.scope["headers"]:
            if name == b"x-forwarded-for":
                forwarded_for.append(value.decode("latin-1"))
            elif name in _OTHER_PROXY_HEADERS:
                is_proxy = True
        is_proxy = is_proxy and not forwarded_for
        caller = find_caller(peer, forwarded_for, self._trusted_proxies, is_proxy=is_proxy)
        if is_proxy and peer and not caller and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "The proxy at %s, listed in PORT_CHECKER_TRUSTED_PROXIES, does not forward its "
                "callers' addresses. Configure it to set X-Forwarded-For.",
                peer,
            )
        return caller


def find_caller(
    peer: str | None,
    forwarded_for: Sequence[str],
    trusted_proxies: Sequence[Network],
    *,
    is_proxy: bool = False,
) -> Address | None:
    """Return the caller's address, or None if it is unknown.

    Each proxy appends the address of its own peer to ``X-Forwarded-For``. So the list is read from
    the right, skipping trusted proxies: the first other address is the caller. Anything to the left
    of it came from the caller, who may have made it up.

    Args:
        peer: The other end of the TCP connection; None if it has no address.
        forwarded_for: The request's ``X-Forwarded-For`` headers, in order.
        trusted_proxies: The peers whose ``X-Forwarded-For`` counts.
        is_proxy: Whether the request came through a proxy that forwarded no address.

    Returns:
        The address; None if the peer has none, if a trusted proxy forwarded none or something
        that is not an address, or if every forwarded address, or each of the last 20, is a trusted
        proxy's.
    """
    if peer is None:
        return None
    try:
        address = parse_host(peer)
        if not (forwarded_for or is_proxy) or not lies_in(address, trusted_proxies):
            return address
        hops = ",".join(forwarded_for).rsplit(",", _MAX_HOPS)
        for hop in reversed(hops[-_MAX_HOPS:]):
            address = parse_address(_without_port(hop.strip()))
            if not lies_in(address, trusted_proxies):
                return address
    except ValueError:
        pass
    return None


def _without_port(hop: str) -> str:
    """Strip the port that some proxies add: ``203.0.113.7:4711``, ``[2001:db8::7]:4711``."""
    if hop.startswith("["):
        return hop[1:].partition("]")[0]
    host, _, port = hop.partition(":")
    return host if port.isdecimal() else hop
