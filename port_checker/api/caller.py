"""Who the caller is: the peer of the connection, or the address that a trusted proxy forwarded."""

import logging
import re
from collections.abc import Callable, Sequence
from enum import Enum, auto

from starlette.requests import HTTPConnection

from port_checker.addresses import Address, Network, lies_in, parse_address, parse_host
from port_checker.addresses import parse_networks as networks
from port_checker.api.origin import is_name_of_this_machine
from port_checker.api.targets import is_own_address, special_purpose
from port_checker.connect import CheckFailed

# Fields that only proxies add, from which we do not take the caller's address: those of RFC 7239
# and RFC 9110 section 7.6.3, and what proxies and clouds document as their own.
_TRACES = frozenset(
    b"forwarded via x-real-ip x-client-ip x-cluster-client-ip x-original-forwarded-for "
    b"x-original-host x-proxyuser-ip proxy-client-ip wl-proxy-client-ip true-client-ip "
    b"cf-connecting-ip cf-connecting-ipv6 cf-pseudo-ipv4 cf-ray fly-client-ip fly-forwarded-port "
    b"fastly-client-ip do-connecting-ip x-azure-clientip x-azure-socketip x-azure-ref "
    b"x-appengine-user-ip x-cloud-trace-context cloudfront-viewer-address x-amz-cf-id "
    b"x-amzn-trace-id x-nf-client-connection-ip x-vercel-id".split()
)
_TRACE_PREFIXES = (b"x-forwarded-", b"x-envoy-", b"x-vercel-forwarded-", b"x-traefik-")

# How many hops of X-Forwarded-For are read. Chains of proxies are shorter; the longest header that
# a request may have would take 0.2 s.
_MAX_HOPS = 20

# Characters of an element that is no address, in the log.
_MAX_LOGGED = 100

# An element of X-Forwarded-For: an address, to which some proxies add a port. Brackets and
# obfuscated ports are as in RFC 7239 section 6. What precedes the first colon has none, or a long
# row of colons would take a time that grows with its square.
_HOP = re.compile(r"(?:\[([^]:]*:[^]]*)\]|([0-9.]+))(?::(?:[0-9]{1,5}|_[A-Za-z0-9._-]+))?|([^[]*)")
# What proxies write for a client that has no address, or whose address they hide (RFC 7239,
# sections 6.2 and 6.3).
_NAMELESS = re.compile(r"unknown|unix:.*|_[A-Za-z0-9._-]+", re.IGNORECASE)

# A proxy that has forwarded no address in so many requests will forward none later.
_NAMELESS_PATIENCE = 10

# Addresses that a host can have. The others name no host, or many. Special-purpose ones are among
# them, since private networks have proxies, too.
_IPV4_NOT_OF_HOSTS = networks("0.0.0.0/8,224.0.0.0/3")
_IPV6_OF_HOSTS = networks("::1,64:ff9b::/96,64:ff9b:1::/48,2000::/3,fc00::/7,fe80::/10")

# A peer on a Unix socket is on this machine.
_UNIX_PEER = parse_address("127.0.0.1")

# The most addresses of this machine that are remembered as relays; it has few.
_MAX_RELAYS = 256

logger = logging.getLogger(__name__)


class Unknown(Enum):
    """Why a caller is unknown."""

    NOT_FORWARDED = auto()  # a trusted proxy shows itself, but forwards no address
    NAMELESS = auto()  # what it forwards last stands for a client without an address
    NO_ADDRESS = auto()  # what it forwards last is no address
    NO_ADDRESS_BEFORE = auto()  # what another proxy forwarded is no address
    ONLY_PROXIES = auto()
    NOT_KNOWN_NOW = auto()  # the kernel could not be asked whether an address is this machine's
    IMPOSSIBLE = auto()  # the forwarded address cannot be that of a caller beyond the proxy


class UnknownCaller(Exception):
    """The caller has no address that we know.

    Args:
        why: The reason.
        forwarded: What a proxy forwarded, if that is the reason.
    """

    def __init__(self, why: Unknown, *forwarded: object) -> None:
        super().__init__(*forwarded)
        self.why = why


_WARNINGS = {
    Unknown.NOT_FORWARDED: (
        "The proxy at %s does not forward its callers' addresses. "
        "Configure it to set X-Forwarded-For."
    ),
    Unknown.NAMELESS: (
        "The proxy at %s never forwards an address: "
        "X-Forwarded-For ends in %r. All callers are unknown. Have whatever is in front of it tell "
        "it their addresses (the PROXY protocol, say)."
    ),
    Unknown.NO_ADDRESS: (
        "The proxy at %s forwards what is no address: "
        "X-Forwarded-For ends in %r. Its callers are unknown. Configure it to append the address "
        "of its client, alone."
    ),
    Unknown.IMPOSSIBLE: (
        "The proxy at %s forwards %s, which cannot be the "
        "address of a caller beyond it. Such callers are unknown. Configure it to set "
        "X-Forwarded-For to the address of its client."
    ),
}


class CallerResolver:
    """Finds out the caller of a request.

    Args:
        trusted_proxies: The peers whose ``X-Forwarded-For`` counts.
        is_own: Whether an address is one of this machine's.
    """

    def __init__(
        self,
        trusted_proxies: Sequence[Network],
        *,
        is_own: Callable[[Address], bool] = is_own_address,
    ) -> None:
        self._trusted_proxies = trusted_proxies
        self._is_own = is_own
        self._warned: set[Unknown] = set()
        self._has_read_address = False  # at the end of X-Forwarded-For
        self._nameless = 0  # requests of clients without an address
        self._relays: set[Address] = set()

    def resolve(self, connection: HTTPConnection) -> Address | None:
        """Return the caller's address, or None if it is unknown."""
        client = connection.scope.get("client")
        fields = connection.scope["headers"]
        is_unix = not client and _is_unix_socket(connection.scope.get("server"))
        try:
            address = _UNIX_PEER if is_unix else parse_host(client[0] if client else "")
        except ValueError:
            return None
        if not is_unix and not lies_in(address, self._trusted_proxies):
            self._note_relay(address, fields)
            return address
        if not (is_unix or _has_trace(fields)):
            return address  # a program on the proxy's machine
        forwarded_for = [
            value.decode("latin-1") for name, value in fields if name == b"x-forwarded-for"
        ]
        try:
            caller = forwarded_caller(address, forwarded_for, self._trusted_proxies, self._is_own)
        except UnknownCaller as unknown:
            listed = f"{address}, listed in PORT_CHECKER_TRUSTED_PROXIES,"
            self._note(unknown, "a Unix socket" if is_unix else listed)
            return None
        self._has_read_address = True
        return caller

    def is_relay(self, address: Address) -> bool:
        """Whether others' requests have come from this address, which is this machine's own."""
        return address in self._relays

    def _note(self, unknown: UnknownCaller, proxy: str) -> None:
        """Warn of a proxy that does not forward its callers' addresses, once for each reason."""
        why = unknown.why
        if why in (Unknown.ONLY_PROXIES, Unknown.NO_ADDRESS_BEFORE):
            self._has_read_address = True
        if why not in _WARNINGS or why in self._warned:
            return
        if why is Unknown.NAMELESS:
            self._nameless += 1
            if self._nameless < _NAMELESS_PATIENCE:
                return
        if why in (Unknown.NAMELESS, Unknown.NO_ADDRESS) and self._has_read_address:
            return
        self._warned.add(why)
        logger.warning(_WARNINGS[why], proxy, *unknown.args)

    def _note_relay(self, peer: Address, fields: Sequence[tuple[bytes, bytes]]) -> None:
        """Remember an address of this machine's own from which others' requests come.

        A program on this machine that accepts connections and passes them on, as the port handlers
        of rootless containers and the sidecars of service meshes do, hides its callers. It shows by
        what strangers send: another proxy's fields, or a ``Host`` that is not this machine.
        """
        if peer in self._relays or len(self._relays) >= _MAX_RELAYS or not special_purpose(peer):
            return
        try:
            host = dict(fields).get(b"host")
            if not _has_trace(fields) and is_name_of_this_machine(host, self._is_own):
                return
            if not (peer.is_loopback or self._is_own(peer)):
                return
        except CheckFailed:  # nobody can tell now
            return
        self._relays.add(peer)
        if len(self._relays) == 1:
            logger.warning(
                "Requests of others come from %s, an address of this machine's own: something here "
                "relays them (the port handler of rootless containers, the sidecar of a service "
                "mesh), so that callers cannot check their own addresses. Let their addresses "
                "through (podman: --network host, pasta, or port_handler=slirp4netns), or have a "
                "proxy there set X-Forwarded-For and add it to PORT_CHECKER_TRUSTED_PROXIES.",
                peer,
            )


def _has_trace(fields: Sequence[tuple[bytes, bytes]]) -> bool:
    """Whether a proxy has added one of a request's fields."""
    # any() makes a generator, as in lies_in().
    for name, _ in fields:  # noqa: SIM110
        if name in _TRACES or name.startswith(_TRACE_PREFIXES):
            return True
    return False


def _is_unix_socket(server: tuple[str, int | None] | None) -> bool:
    """Whether our end of a connection whose peer has no address is a Unix socket's.

    A proxy on this machine is at the other, and is trusted. A Unix socket has no port (ASGI's
    specification). The peer of a TCP connection has no address either once the connection has been
    reset, but our end of it has one.
    """
    return bool(server and server[1] is None)


def forwarded_caller(
    proxy: Address,
    forwarded_for: Sequence[str],
    trusted_proxies: Sequence[Network],
    is_own: Callable[[Address], bool] = is_own_address,
) -> Address:
    """Return the caller's address, which trusted proxies forwarded.

    Each proxy appends the address of its own peer to ``X-Forwarded-For``. So the list is read from
    the right, skipping trusted proxies: the first other address is the caller. Anything to the left
    of it came from the caller, who may have made it up. Empty elements count as nothing (RFC 9110
    section 5.6.1.2).

    Args:
        proxy: The other end of the TCP connection.
        forwarded_for: The request's ``X-Forwarded-For`` headers, in order.
        trusted_proxies: The peers whose ``X-Forwarded-For`` counts.
        is_own: Whether an address is one of this machine's.

    Raises:
        UnknownCaller: The proxy forwarded no address, or something that is not one, or one that no
            caller beyond it can have; or every forwarded address, or each of the last 20, is a
            trusted proxy's.
    """
    if not forwarded_for:
        raise UnknownCaller(Unknown.NOT_FORWARDED)
    proxies = [proxy]
    elements = ",".join(forwarded_for).rsplit(",", _MAX_HOPS)[-_MAX_HOPS:]
    hops = [hop for element in reversed(elements) if (hop := element.strip(" \t"))]
    if not hops:
        raise UnknownCaller(Unknown.NAMELESS, "")
    for hop in hops:
        try:
            address = _parse_hop(hop)
        except ValueError:
            why = _why_no_address(hop, is_last=hop is hops[0])
            raise UnknownCaller(why, hop[-_MAX_LOGGED:]) from None
        if not lies_in(address, trusted_proxies):
            try:
                if special_purpose(address) and not _can_be_forwarded(address, proxies, is_own):
                    raise UnknownCaller(Unknown.IMPOSSIBLE, address)
            except CheckFailed:
                raise UnknownCaller(Unknown.NOT_KNOWN_NOW) from None
            return address
        proxies.append(address)
    raise UnknownCaller(Unknown.ONLY_PROXIES)


def _why_no_address(hop: str, *, is_last: bool) -> Unknown:
    if not is_last:
        return Unknown.NO_ADDRESS_BEFORE
    return Unknown.NAMELESS if _NAMELESS.fullmatch(hop) else Unknown.NO_ADDRESS


def _parse_hop(hop: str) -> Address:
    """Return the address of an element: ``203.0.113.7:4711``, ``2001:db8::7``, ``[2001:db8::7]``.

    Raises:
        ValueError: It is none.
    """
    match = _HOP.fullmatch(hop)
    if not match:
        raise ValueError("not an address")
    return parse_address(match[1] or match[2] or match[3])


def _can_be_forwarded(
    address: Address, proxies: Sequence[Address], is_own: Callable[[Address], bool]
) -> bool:
    """Whether a special-purpose address can be that of a caller which these proxies forwarded.

    An address of this machine can be the caller's only if all proxies are on this machine, too. A
    proxy elsewhere means another machine, or was made to write the address.
    """
    if address.version == 4:
        if lies_in(address, _IPV4_NOT_OF_HOSTS):
            return False
    elif not lies_in(address, _IPV6_OF_HOSTS):
        return False
    if all(proxy.is_loopback for proxy in proxies):
        return True
    if not (address.is_loopback or is_own(address)):
        return True
    return all(proxy.is_loopback or is_own(proxy) for proxy in proxies)
