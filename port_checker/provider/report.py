"""The result for each port, and the advice that follows from it."""

import errno
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, NamedTuple

from port_checker import advice as advice_for
from port_checker.addresses import MAX_PORT, MIN_UNPRIVILEGED_PORT, Address
from port_checker.connect import Verdict, VerdictKind
from port_checker.linux import TcpSocket, TcpState
from port_checker.provider.evidence import Attempt
from port_checker.tls import TlsVerdictKind

BindingState = Literal["bound", "in use", "outgoing connection", "not permitted", "failed"]


class PortPair(NamedTuple):
    """A port as the world sees it, and as this machine does.

    Attributes:
        outer: The port that a server connects to.
        inner: The port of this machine that it is forwarded to, as a rule the same.
    """

    outer: int
    inner: int


@dataclass(frozen=True)
class Binding:
    """Whether a listener could be opened on a port, and if not, what has the port.

    Attributes:
        state: If "in use", another program has the port; if "outgoing connection", a connection
            from this machine has it.
        error: Why a listener could not be opened: the system's error number; 0 if it could.
        other_family: Whether the program that has the port listens over the other IP version alone.
        holders: The sockets that have the port, if it is in use; None if that is unknown.
        checked: Whether another check of this machine has the port.
    """

    state: BindingState
    error: int = 0
    other_family: bool = False
    holders: Sequence[TcpSocket] | None = ()
    checked: bool = False


@dataclass(frozen=True)
class ServerReport:
    """How asking one server went.

    Attributes:
        url: The server, without a password.
        asked: Whether it checked at least some of the ports.
        error: Why it did not check all of them; None if it did.
        ip: The address that it checked; None if it is unknown.
    """

    url: str
    asked: bool
    error: str | None
    ip: str | None = None


@dataclass(frozen=True)
class PortReport:
    """The result for one port.

    Attributes:
        port: The TCP port as the world sees it.
        local: Whether a listener could be opened on this machine; see ``Binding.state``.
        reachable: Whether the world can reach this machine on the port: a server connected, and
            the listener saw the connection or another program has the port.
        confirmed: Whether the listener saw the connection that a server reports; None if there was
            no listener.
        error: The connection error that the servers report, in the system's words; None if one of
            them could connect, or if none checked the port.
        advice: What to do; None if nothing is wrong.
        answers: The verdict of each server that checked the port, by URL.
        inner: The port of this machine that was listened on.
        arrives_at: The other port of this machine at which connections arrive; None if they do not.
        places: The verdict of each place from which a server looked, by URL and name, where the
            server asks other places.
    """

    port: int
    local: BindingState
    reachable: bool
    confirmed: bool | None
    error: str | None
    advice: str | None
    answers: dict[str, Verdict]
    inner: int
    arrives_at: int | None = None
    places: dict[str, dict[str, Verdict]] = field(default_factory=dict)

    @property
    def pair(self) -> PortPair:
        """The port, outside and here."""
        return PortPair(self.port, self.inner)


@dataclass(frozen=True)
class TlsAnswer:
    """What one server says about a TLS endpoint.

    Attributes:
        kind: Its verdict.
        error: Why it does not trust the certificate; None if it does.
        not_after: Until when the certificate is valid, in ISO 8601; None if its chain was not
            verified.
        places: The error of each place from which the server looked, by name, where it asks other
            places; None for those that trust the certificate.
    """

    kind: TlsVerdictKind
    error: str | None
    not_after: str | None
    places: dict[str, str | None] = field(default_factory=dict)

    @property
    def valid(self) -> bool:
        """Whether the server trusts the certificate."""
        return self.kind is TlsVerdictKind.VALID


@dataclass(frozen=True)
class TlsReport:
    """The result for one TLS endpoint of this machine.

    Attributes:
        port: The TCP port as the world sees it.
        inner: The port of this machine that it is forwarded to.
        valid: Whether a server checked the endpoint, and every one that did trusts it.
        error: Why not, as the first of them says; None if none checked it.
        not_after: Until when the certificate is valid, as ``TlsAnswer`` has it.
        advice: What to do; None if nothing is wrong.
        answers: The answer of each server that checked it, by URL.
    """

    port: int
    inner: int
    valid: bool
    error: str | None
    not_after: str | None
    advice: str | None
    answers: dict[str, TlsAnswer]

    @property
    def pair(self) -> PortPair:
        """The port, outside and here."""
        return PortPair(self.port, self.inner)


@dataclass(frozen=True)
class Report:
    """The result of ``verify``.

    Attributes:
        ip: The address that was checked, at which the ports are reachable; None if it is unknown,
            or if different ports are reachable at different addresses (see ``servers``).
        servers: One for each server, in the order given.
        ports: One for each port, in the order given.
        notes: What is true of all of them, in sentences.
        family: 4 or 6: the IP version of the address.
        tls: One for each TLS endpoint, in the order given.
        reachable: How many ports are reachable.
        total: How many ports there are.
    """

    ip: str | None
    servers: list[ServerReport]
    ports: list[PortReport]
    notes: list[str] = field(default_factory=list)
    family: int = 4
    tls: list[TlsReport] = field(default_factory=list)
    reachable: int = field(init=False)
    total: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "reachable", sum(port.reachable for port in self.ports))
        object.__setattr__(self, "total", len(self.ports))

    @property
    def is_checked(self) -> bool:
        """Whether a server checked at least some of the ports."""
        return any(server.asked for server in self.servers)


def reached_at(servers: Iterable[ServerReport], ports: Sequence[PortReport]) -> dict[str, set[int]]:
    """Return the ports that were reached at each address that was checked."""
    reached: dict[str, set[int]] = {server.ip: set() for server in servers if server.ip}
    for port in ports:
        for server in servers:
            verdict = port.answers.get(server.url)
            if port.reachable and server.ip and verdict and verdict.accessible:
                reached[server.ip].add(port.port)
    return reached


class Router(StrEnum):
    """What forwards connections to this machine if it does not have the address itself."""

    ROUTER = "router"
    CONTAINER = "container"
    VPN = "vpn"
    CLOUD = "cloud"
    SHARED = "shared"  # the internet provider's NAT, where customers share an address


@dataclass(frozen=True)
class Place:
    """What is known of the way to this machine.

    Attributes:
        own_address: Whether the address that was checked is one of this machine's: then no router
            translates addresses.
        caller_hidden: Whether that address is probably another machine's: it is private, and not
            one of this machine's.
        family: 4 or 6.
        address: The address at which connections arrive here; None if it is unknown.
        router: What forwards connections, if the address is not this machine's.
        interface: Where connections to the internet leave; empty if that is unknown.
        xdp: An interface at which a program sees packets before everything else; empty if none.
    """

    own_address: bool = False
    caller_hidden: bool = False
    family: int = 4
    address: Address | None = None
    router: Router = Router.ROUTER
    interface: str = ""
    xdp: str = ""


class WrongWay(NamedTuple):
    """Answers leave by another interface than the one at which connections arrive.

    Attributes:
        interface: The interface by which they leave.
        filtered: Whether the kernel drops the connections because of that.
    """

    interface: str
    filtered: bool


@dataclass(frozen=True)
class Observation:
    """What was seen of one port, here and by the servers.

    Attributes:
        ports: The port, outside and here.
        binding: Whether a listener could be opened.
        seen: Whether the listener saw a connection from a server to this very port.
        half_open: Whether such a connection began and was not completed.
        attempt: Such connections as the interfaces see them; None if there are none.
        captured: Whether all packets at the interfaces were seen.
        wrong_way: How answers leave, if not where the connections arrive.
        in_container: Whether this machine passes the connections on to a container of its own.
        answers: The verdicts, by server.
        counted: The servers whose verdicts say something about the world; by default all.
        banned: Whether a server seems to be banned as a scanner.
        arrives_at: The other port of this machine at which the port's connections arrive.
        unused: Whether nobody listens there.
        excluded: Whether a server may not connect to the port.
        reason: Why no server checked the port.
        places: The verdict of each place from which a server looked, by URL and name.
    """

    ports: PortPair
    binding: Binding
    seen: bool = False
    half_open: bool = False
    attempt: Attempt | None = None
    captured: bool = False
    wrong_way: WrongWay | None = None
    in_container: bool = False
    answers: dict[str, Verdict] = field(default_factory=dict)
    counted: Collection[str] | None = None
    banned: bool = False
    arrives_at: int | None = None
    unused: bool = False
    excluded: bool = False
    reason: str = "there is no server"
    places: dict[str, dict[str, Verdict]] = field(default_factory=dict)

    @property
    def is_reached_from_some_place(self) -> bool:
        """Whether at least one place could connect from which a counted server looked."""
        return any(
            verdict.accessible
            for url, places in self.places.items()
            if self.counted is None or url in self.counted
            for verdict in places.values()
        )


def judge(observed: Observation, place: Place) -> PortReport:
    """Judge a port by what this machine saw and what the servers report."""
    answers, counted = observed.answers, observed.counted
    verdicts = [v for url, v in answers.items() if counted is None or url in counted]
    accessible = any(verdict.accessible for verdict in verdicts)
    crossed = observed.arrives_at is not None
    confirmed = None
    if observed.binding.state == "bound":
        confirmed = reachable = accessible and observed.seen and not crossed
    else:
        reachable = accessible and not crossed and _is_programs(observed, place)
    return PortReport(
        port=observed.ports.outer,
        local=observed.binding.state,
        reachable=reachable,
        confirmed=confirmed,
        error=verdicts[0].error if verdicts and not accessible else None,
        advice=None if reachable else _advise(observed, place, [v.kind for v in verdicts]),
        answers=answers,
        inner=observed.ports.inner,
        arrives_at=observed.arrives_at,
        places=observed.places,
    )


def _is_programs(observed: Observation, place: Place) -> bool:
    """Whether the program that has the port may be what answered."""
    binding = observed.binding
    if binding.state != "in use" or binding.other_family or binding.checked:
        return False
    # The program that publishes a container's port holds it, too (docker-proxy, conmon).
    arrived = observed.attempt and (observed.in_container or not observed.attempt.passed_to)
    if observed.captured and not arrived:
        return False
    if binding.holders is None:
        return True
    own = place.address if place.own_address else None
    address = observed.attempt.address if observed.attempt else own
    return any(
        _listens_at(sock, address) if address else not sock.address.is_loopback
        for sock in binding.holders
        if sock.state is TcpState.LISTEN
    )


def _listens_at(sock: TcpSocket, address: Address | None) -> bool:
    return sock.address.is_unspecified or sock.address == address


def _advise(observed: Observation, place: Place, kinds: Sequence[VerdictKind]) -> str:
    match observed.binding.state:
        case "not permitted":
            port = observed.ports.inner
            is_low = port < MIN_UNPRIVILEGED_PORT
            return advice_for.NOT_PERMITTED if is_low else advice_for.NOT_PERMITTED_HERE
        case "failed":
            no_family = observed.binding.error in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
            family = f"IPv{place.family}"
            return advice_for.NO_FAMILY.format(family=family) if no_family else advice_for.FAILED
        case "outgoing connection":
            return advice_for.OUTGOING_CONNECTION
    if not kinds:
        if observed.excluded:
            return advice_for.SERVER_CANNOT
        return advice_for.sentence(advice_for.NOT_CHECKED.format(reason=observed.reason))
    if observed.arrives_at is not None:
        sentence = advice_for.ARRIVES_UNUSED if observed.unused else advice_for.CROSSED
        return sentence.format(port=observed.arrives_at)
    is_in_use = observed.binding.state == "in use"
    if observed.attempt and observed.attempt.passed_to:
        published = is_in_use and observed.in_container
        sentence = advice_for.CONTAINER_SILENT if published else advice_for.PASSED_ON
        return sentence.format(address=observed.attempt.passed_to)
    if is_in_use and (fault := _advise_on_program(observed, place, kinds)):
        return fault
    if VerdictKind.OPEN in kinds:
        if observed.attempt:
            return advice_for.REDIRECTED_HERE
        return _advise_on_what_is_in_front(observed, place, VerdictKind.OPEN)
    if observed.is_reached_from_some_place:
        return advice_for.REACHED_FROM_SOME_PLACES
    return _advise_on_way(observed, place, kinds[0])


def _advise_on_way(observed: Observation, place: Place, kind: VerdictKind) -> str:
    """Name what keeps connections from a port on which a program listens."""
    attempt = observed.attempt
    if observed.banned:
        return advice_for.BANNED
    began = observed.seen or observed.half_open or (attempt and attempt.answered_at)
    if attempt and (way := observed.wrong_way) and (began or way.filtered):
        sentence = advice_for.REPLIES_ELSEWHERE if began else advice_for.REVERSE_PATH
        return sentence.format(interface=attempt.interface, other=way.interface)
    if attempt and attempt.answered_at:
        return advice_for.REPLIES_LOST
    if began:
        return advice_for.WAY_BACK if attempt else advice_for.WAY_BACK_FIRST
    if attempt:
        return advice_for.OWN_FIREWALL
    if place.caller_hidden:
        return advice_for.CALLER_HIDDEN
    then = _advise_on_what_is_in_front(observed, place, kind)
    return f"{advice_for.XDP_FIRST.format(interface=place.xdp)} {then}" if place.xdp else then


def _advise_on_what_is_in_front(observed: Observation, place: Place, kind: VerdictKind) -> str:
    """Name what keeps connections away from this machine, or answers in its place."""
    answered = kind is VerdictKind.OPEN
    if place.own_address and not answered:
        captured = observed.captured
        return advice_for.NETWORK_FIREWALL if captured else advice_for.OWN_FIREWALL_FIRST
    match place.router:
        case Router.CONTAINER:
            return advice_for.IN_CONTAINER
        case Router.VPN:
            return advice_for.BEHIND_VPN.format(interface=place.interface)
        case Router.CLOUD if not answered:
            return advice_for.IN_CLOUD
        case Router.SHARED:
            return advice_for.BEHIND_PROVIDERS_NAT
    match kind:
        case VerdictKind.OPEN:
            no_router = place.own_address or place.router is Router.CLOUD
            return advice_for.ANSWERED_IN_FRONT if no_router else advice_for.ANSWERED_ELSEWHERE
        case VerdictKind.REFUSED:
            return advice_for.NOT_FORWARDED if observed.captured else advice_for.REFUSED
        case VerdictKind.TIMED_OUT:
            return advice_for.NOTHING_ARRIVED if observed.captured else advice_for.TIMED_OUT
    return advice_for.ROUTER_REJECTS


def _advise_on_program(
    observed: Observation, place: Place, kinds: Sequence[VerdictKind]
) -> str | None:
    """Say what is wrong with the program that has the port; None if it is not to blame."""
    binding = observed.binding
    if binding.checked:
        return advice_for.CHECK_RUNNING
    listeners = [sock for sock in binding.holders or () if sock.state is TcpState.LISTEN]
    if binding.holders and not listeners and binding.holders[0].peer_port:
        return advice_for.IN_USE_BY_CONNECTION.format(port=observed.ports.inner)
    if not listeners and binding.holders is not None:
        return advice_for.IN_USE_NOT_LISTENING
    if binding.other_family:
        return advice_for.IN_USE_OTHER_FAMILY.format(family=f"IPv{place.family}")
    address = observed.attempt.address if observed.attempt else place.address
    if listeners and not any(_listens_at(sock, address) for sock in listeners):
        addresses = ", ".join(sorted({str(sock.address) for sock in listeners}))
        return advice_for.IN_USE_LOCALLY.format(addresses=addresses)
    queued = max((sock.queued for sock in listeners), default=0)
    if queued and VerdictKind.TIMED_OUT in kinds:
        return advice_for.IN_USE_NOT_ACCEPTING.format(queued=queued)
    if VerdictKind.OPEN in kinds or observed.captured:
        return None
    router = "" if place.own_address else advice_for.AND_ROUTER
    return advice_for.IN_USE.format(and_router=router)


def port_pairs(ports: Sequence[int | tuple[int, int]]) -> list[PortPair]:
    """Return ports as pairs, without repeats.

    Args:
        ports: Ports, which lead to themselves, or pairs of an outer and an inner port.

    Raises:
        TypeError: One is neither an integer nor a pair of integers.
        ValueError: One is out of range, or a port leads to two others.
    """
    if isinstance(ports, str | bytes):
        raise TypeError(f"ports must be a list of ports, not {ports!r}")
    pairs: dict[int, PortPair] = {}
    outer_of: dict[int, int] = {}
    for port in ports:
        both = port if isinstance(port, tuple) else (port, port)
        if len(both) != 2 or {*map(type, both)} != {int}:
            raise TypeError(f"a port must be an integer or a pair of integers, not {port!r}")
        for number in both:
            if not 1 <= number <= MAX_PORT:
                raise ValueError(f"{number} is not a port (1-65535)")
        pair = PortPair(*both)
        if pairs.setdefault(pair.outer, pair) != pair:
            raise ValueError(f"port {pair.outer} cannot lead to two ports of this machine")
        if outer_of.setdefault(pair.inner, pair.outer) != pair.outer:
            raise ValueError(f"two ports cannot lead to port {pair.inner} of this machine")
    return list(pairs.values())


def port_ranges(ports: Iterable[PortPair]) -> str:
    """Write ports as the program reads them: ``7466, 50800-50899, 60800-60899:50800-50899``."""
    runs: list[list[PortPair]] = []  # of consecutive ports, both outside and here
    for port in sorted(ports):
        if runs and port == PortPair(runs[-1][-1].outer + 1, runs[-1][-1].inner + 1):
            runs[-1].append(port)
        else:
            runs.append([port])
    return ", ".join(_write(run[0], run[-1]) for run in runs)


def _write(first: PortPair, last: PortPair) -> str:
    outer = _range(first.outer, last.outer)
    return outer if first.outer == first.inner else f"{outer}:{_range(first.inner, last.inner)}"


def _range(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}-{high}"
