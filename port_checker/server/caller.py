"""Who is asking: the peer of the connection, or the address that a trusted proxy forwarded."""

import logging
from collections.abc import Sequence

from starlette.requests import HTTPConnection

from port_checker.addresses import Address, Network, lies_in, parse_address

# Fields by which a proxy shows itself without telling, or not so that it counts, for whom it asks
# (RFC 7239, RFC 9110 section 7.6.3, and nginx's custom).
OTHER_PROXY_FIELDS = frozenset((b"forwarded", b"via", b"x-real-ip"))

logger = logging.getLogger(__name__)


class Callers:
    """Names the caller of a request.

    Args:
        trusted_proxies: The peers whose ``X-Forwarded-For`` counts.
    """

    def __init__(self, trusted_proxies: Sequence[Network]) -> None:
        self._trusted_proxies = trusted_proxies
        self._has_warned = False

    def find(self, connection: HTTPConnection) -> Address | None:
        """Return the caller's address, or None when it is not known."""
        peer = connection.scope["client"][0] if connection.scope.get("client") else None
        forwarded_for: list[str] = []
        is_proxy = False
        for name, value in connection.scope["headers"]:
            if name == b"x-forwarded-for":
                forwarded_for.append(value.decode("latin-1"))
            elif name in OTHER_PROXY_FIELDS:
                is_proxy = True
        is_proxy = is_proxy and not forwarded_for
        caller = find_caller(peer, forwarded_for, self._trusted_proxies, is_proxy=is_proxy)
        if is_proxy and peer and not caller and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "A proxy at %s, which is in PORT_CHECKER_TRUSTED_PROXIES, forwards no address: "
                "callers behind it are unknown. Let it set X-Forwarded-For.",
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
    """Return the caller's address, or None when it is not known.

    Each proxy appends the address of its own peer to ``X-Forwarded-For``, so the list is read from
    the right for as long as the addresses are those of trusted proxies: the first other one is the
    caller, and all before it is the caller's own claim and counts for nothing.

    Args:
        peer: The other end of the TCP connection; None where there is no address.
        forwarded_for: The request's ``X-Forwarded-For`` fields, in their order.
        trusted_proxies: The peers whose ``X-Forwarded-For`` counts.
        is_proxy: Whether the request has come through a proxy that forwarded no address.

    Returns:
        The address; None for a peer without one, when a trusted proxy forwarded none or a text
        that is none, and when every forwarded address is a trusted proxy's.
    """
    if peer is None:
        return None
    try:
        # A link-local peer comes with a scope id, which is this machine's affair.
        address = parse_address(peer.partition("%")[0])
        if not (forwarded_for or is_proxy) or not lies_in(address, trusted_proxies):
            return address
        for hop in reversed(",".join(forwarded_for).split(",")):
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
