"""Who is asking: the peer of the connection, or the address that a trusted proxy forwarded."""

from collections.abc import Sequence

from port_checker.addresses import Address, Network, lies_in, parse_address


def find_caller(
    peer: str | None, forwarded_for: Sequence[str], trusted_proxies: Sequence[Network]
) -> Address | None:
    """Return the caller's address, or None when it is not known.

    Each proxy appends the address of its own peer to ``X-Forwarded-For``, so the list is read from
    the right for as long as the addresses are those of trusted proxies: the first other one is the
    caller, and all before it is the caller's own claim and counts for nothing.

    Args:
        peer: The other end of the TCP connection; None where there is no address.
        forwarded_for: The request's ``X-Forwarded-For`` fields, in their order.
        trusted_proxies: The peers whose ``X-Forwarded-For`` counts.

    Returns:
        The address; None for a peer without one, for a forwarded text that is not an address, and
        when every forwarded address is a trusted proxy's.
    """
    if peer is None:
        return None
    try:
        # A link-local peer comes with a scope id, which is this machine's affair.
        address = parse_address(peer.partition("%")[0])
        if not forwarded_for or not lies_in(address, trusted_proxies):
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
