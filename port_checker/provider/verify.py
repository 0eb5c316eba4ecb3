"""The provider's side: listeners on its own ports, servers that are asked, and what it all means.

As a library::

    report = await verify([7466, 50800], servers=["https://checker.example"])
    for port in report.ports:
        print(port.port, port.reachable, port.advice)
"""

import asyncio
import contextlib
import errno
import os
import socket
import ssl
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Literal, Self, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from port_checker.addresses import Address, parse_address
from port_checker.connect import REFUSED, TIMED_OUT, Verdict
from port_checker.linux import descriptors_left
from port_checker.schemas import CallerAddress, CheckResponse, ErrorResponse
from port_checker.server.errors import ErrorCode

_Model = TypeVar("_Model", bound=BaseModel)

LocalBinding = Literal["bound", "in use", "not permitted", "failed"]

# Seconds for one answer. A server with default settings needs 17 at the most, and must not need
# more than 30.
_ANSWER_TIMEOUT = 35.0
_CONNECT_TIMEOUT = 10.0
# Seconds that one server may make us wait by Retry-After, all told.
_PATIENCE = 120.0
# Ports asked for at once: what a server with default settings takes.
_MOST_AT_ONCE = 1000
# Bytes of an answer that are read. One on 10,000 ports has less than 1 MiB.
_LONGEST_ANSWER = 4 * 1024 * 1024
# Characters of a server's words that are shown.
_LONGEST_WORDS = 300
# Seconds after the answer in which a listener may still see what the server said it did: when the
# last packet of the handshake is lost, the next comes after the sender's retransmission timeout.
_AFTERMATH = 3.0
# Descriptors kept for connections to servers, connections that listeners see, and the rest.
_OTHER_DESCRIPTORS = 48


@dataclass(frozen=True)
class ServerReport:
    """How asking one server went.

    Attributes:
        url: The server.
        asked: Whether it answered for at least some of the ports.
        error: Why it did not for all; None when it did.
    """

    url: str
    asked: bool
    error: str | None


@dataclass(frozen=True)
class PortReport:
    """What is known of one port.

    Attributes:
        port: The TCP port.
        local: Whether a listener could be opened on this machine. With "in use" a program has the
            port, which was left alone.
        reachable: Whether the world reaches this machine on it: a server says so, and the listener
            saw it, or a program of this machine has the port.
        confirmed: Whether the listener saw a connection that a server says it made; None where
            there was no listener to see it.
        error: What the servers say is wrong, in the system's words; None if one of them says that
            the port is accessible, and if none was asked.
        advice: What to do; None when nothing is wrong.
        answers: What each server says that answered.
    """

    port: int
    local: LocalBinding
    reachable: bool
    confirmed: bool | None
    error: str | None
    advice: str | None
    answers: dict[str, Verdict]


@dataclass(frozen=True)
class Report:
    """What ``verify`` found.

    Attributes:
        ip: The address that was checked; None when nobody could tell it.
        servers: One for each server, in the order given.
        ports: One for each port, in the order given.
        reachable: How many ports are reachable.
        total: How many there are.
    """

    ip: str | None
    servers: list[ServerReport]
    ports: list[PortReport]
    reachable: int = field(init=False)
    total: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "reachable", sum(port.reachable for port in self.ports))
        object.__setattr__(self, "total", len(self.ports))


async def verify(
    ports: Sequence[int],
    *,
    servers: Sequence[str],
    ip: str | None = None,
    on_progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Verify that the world reaches this machine on its ports.

    For each port a temporary listener is opened, unless a program has the port. While the
    listeners stand, the servers are asked, side by side; then the listeners are closed, also when
    this is cancelled. What goes wrong with a server stands in the report.

    Args:
        ports: TCP ports, 1 to 65535.
        servers: URLs of port checkers.
        ip: This machine's address as the world sees it; by default what the first server that
            answers says.
        on_progress: Told, in a few words, what is being waited for.

    Returns:
        The report.

    Raises:
        ValueError: ``ip`` is not an IP address, or a port is not one.
    """
    ports = list(dict.fromkeys(ports))
    if wrong := [port for port in ports if not 1 <= port <= 65535]:
        raise ValueError(f"{wrong[0]} is not a port (1-65535)")
    address = parse_address(ip) if ip else None
    async with httpx.AsyncClient(
        timeout=httpx.Timeout(_ANSWER_TIMEOUT, connect=_CONNECT_TIMEOUT),
        trust_env=False,  # through a proxy, a server would see the proxy's address
    ) as http:
        asked = [_Server(url, http, on_progress) for url in dict.fromkeys(servers)]
        if not address:
            on_progress("asking for this machine's address")
            told = await asyncio.gather(*(server.tell_address() for server in asked))
            address = next((one for one in told if one), None)
        reports = []
        for some in _in_parts(ports, descriptors_left() - _OTHER_DESCRIPTORS):
            reports += await _verify_part(some, address, asked)
    return Report(
        ip=str(address) if address else None,
        servers=[server.report() for server in asked],
        ports=reports,
    )


async def _verify_part(
    ports: Sequence[int], address: Address | None, servers: Sequence["_Server"]
) -> list[PortReport]:
    """Verify as many ports as there can be listeners at a time."""
    with Listeners(ports, address.version if address else 4) as listeners:
        worth_asking = [port for port in ports if listeners.local[port] in ("bound", "in use")]
        if address and worth_asking:
            await asyncio.gather(*(server.ask(address, worth_asking) for server in servers))
        answers = {
            port: {
                server.url: server.verdicts[port] for server in servers if port in server.verdicts
            }
            for port in ports
        }
        open_outside = [
            port
            for port in ports
            if listeners.local[port] == "bound"
            and any(verdict.accessible for verdict in answers[port].values())
        ]
        await listeners.wait_until_seen(open_outside, _AFTERMATH)
        seen = listeners.seen
        if any(listeners.local[port] == "bound" and port not in seen for port in answers):
            seen = seen | half_open_ports()
        return [_judge(port, listeners.local[port], port in seen, answers[port]) for port in ports]


def _in_parts(ports: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    size = max(1, min(size, _MOST_AT_ONCE))
    for start in range(0, len(ports), size):
        yield ports[start : start + size]


# What to do

_REFUSED = (
    "The address answers, but nothing listens there, or the router forwards it to another machine: "
    "forward it to this one."
)
_TIMED_OUT = (
    "A firewall or router drops what arrives: open it in the firewalls, and forward it to this "
    "machine."
)
_UNREACHABLE = (
    "A router on the way says that it cannot or may not deliver: check the address, and the "
    "firewall of your router."
)
_ANSWERED_ELSEWHERE = (
    "Something else answered in this machine's place (another machine, a proxy, a firewall that "
    "accepts everything): forward it to this one."
)
_WAY_BACK = (
    "Connections arrive here, but the answers do not get back: check what leaves this machine, "
    "its firewall and its routes."
)
_IN_USE = (
    "A program on this machine has it, and is not reached: check that it listens on all "
    "addresses, that the firewalls let it, and that the router forwards it."
)
_NOT_PERMITTED = (
    "You may not listen on it: take ports from 1024 up, or run this as root (CAP_NET_BIND_SERVICE)."
)
_FAILED = "This machine could not listen on it: see whether it is out of files or memory."
_NOT_ASKED = "No server told anything about it: try again later, or ask another server."


def _judge(port: int, local: LocalBinding, seen: bool, answers: dict[str, Verdict]) -> PortReport:
    """Put together what was done here and what was seen from there."""
    accessible = any(verdict.accessible for verdict in answers.values())
    errors = [verdict.error for verdict in answers.values()]
    confirmed = accessible and seen if local == "bound" else None
    reachable = accessible if local == "in use" else confirmed is True
    advice: str | None
    if local == "not permitted":
        advice = _NOT_PERMITTED
    elif local == "failed":
        advice = _FAILED
    elif not answers:
        advice = _NOT_ASKED
    elif reachable:
        advice = None
    elif accessible:
        advice = _ANSWERED_ELSEWHERE
    elif local == "in use":
        advice = _IN_USE
    elif seen:
        advice = _WAY_BACK
    else:
        advice = {REFUSED.error: _REFUSED, TIMED_OUT.error: _TIMED_OUT}.get(errors[0], _UNREACHABLE)
    error = errors[0] if errors and not accessible else None
    return PortReport(port, local, reachable, confirmed, error, advice, answers)


# This machine


class Listeners:
    """Temporary listeners on all addresses of this machine, which see who connects.

    A context manager, within a running event loop; closed at its end, whatever happens.

    Attributes:
        local: For each port, whether a listener could be opened.
        seen: The ports to which a connection was made.
    """

    def __init__(self, ports: Iterable[int], ip_version: int) -> None:
        self.local: dict[int, LocalBinding] = {}
        self.seen: set[int] = set()
        self._ports = list(ports)
        self._ipv6 = ip_version == 6
        self._listeners: dict[int, socket.socket] = {}
        self._news = asyncio.Event()

    def __enter__(self) -> Self:
        try:
            for port in self._ports:
                self._open(port)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        loop = asyncio.get_running_loop()
        for listener in self._listeners.values():
            loop.remove_reader(listener)
            listener.close()
        self._listeners.clear()

    async def wait_until_seen(self, ports: Iterable[int], timeout: float) -> None:
        """Wait until connections to all of ``ports`` were seen, or ``timeout`` seconds."""
        missing = set(ports)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while missing - self.seen:
                    self._news.clear()
                    await self._news.wait()

    def _open(self, port: int) -> None:
        try:
            listener = self._listen(port)
        except OSError as error:
            self.local[port] = _BINDINGS.get(error.errno or 0, "failed")
        else:
            self.local[port] = "bound"
            self._listeners[port] = listener
            asyncio.get_running_loop().add_reader(listener, self._on_connection, port)

    def _listen(self, port: int) -> socket.socket:
        listener = socket.socket(socket.AF_INET6 if self._ipv6 else socket.AF_INET)
        try:
            # Connections of an earlier run may still be in TIME_WAIT.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if self._ipv6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(("::" if self._ipv6 else "0.0.0.0", port))  # noqa: S104  # as promised
            listener.listen()
            listener.setblocking(False)
        except OSError:
            listener.close()
            raise
        return listener

    def _on_connection(self, port: int) -> None:
        self.seen.add(port)
        self._news.set()
        # Nothing to accept, it was reset meanwhile, or no descriptor is left: it was seen.
        with contextlib.suppress(OSError):
            self._listeners[port].accept()[0].close()


_BINDINGS: dict[int, LocalBinding] = {
    errno.EADDRINUSE: "in use",
    errno.EACCES: "not permitted",
    errno.EPERM: "not permitted",
}


def half_open_ports() -> set[int]:
    """Return the local TCP ports at which a connection has arrived, but is not established.

    The kernel (Linux) answers the other end's SYN and waits for the end of the handshake, for some
    seconds. That a port stays here means that packets arrive, and that the answers get lost.
    """
    ports = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError), open(table) as lines:
            for line in lines:
                _, local, _, state, *_ = line.split()
                if state == "03":  # TCP_SYN_RECV
                    ports.add(int(local.rpartition(":")[2], 16))
    return ports


# The servers


class _ServerError(Exception):
    """A server could not be asked; the message says why."""


class _Server:
    """One server: what it told, and why it told no more.

    Attributes:
        url: Where it is.
        verdicts: What it says of each port that it was asked about.
    """

    def __init__(
        self, url: str, http: httpx.AsyncClient, on_progress: Callable[[str], None]
    ) -> None:
        self.url = url
        self.verdicts: dict[int, Verdict] = {}
        self._http = http
        self._on_progress = on_progress
        self._patience = _PATIENCE
        self._most = _MOST_AT_ONCE
        self._error: str | None = None if _is_url(url) else "it is no URL of a server"
        self._knows_not: str | None = None

    def report(self) -> ServerReport:
        """Say how asking it went."""
        asked = bool(self.verdicts)
        return ServerReport(self.url, asked, self._error or (None if asked else self._knows_not))

    async def tell_address(self) -> Address | None:
        """Return this machine's address as the server sees it; None if it cannot tell."""
        if self._error:
            return None
        try:
            response, body = await self._request("GET", "/ip")
            if response.status_code == HTTPStatus.OK:
                if ip := _parse(CallerAddress, response, body).ip:
                    return parse_address(ip)
                self._knows_not = "it does not know this machine's address: give it with --ip"
            elif response.status_code == HTTPStatus.NOT_FOUND:
                self._knows_not = "it does not tell callers their address: give it with --ip"
            else:
                raise _ServerError(_told(response, body))
        except ValueError:
            self._error = "it tells an address that is none"
        except _ServerError as error:
            self._error = str(error)
        return None

    async def ask(self, address: Address, ports: Sequence[int]) -> None:
        """Ask about ``ports``, unless asking this server has failed before."""
        left = list(ports)
        try:
            while left and not self._error:
                some = left[: self._most]
                if verdicts := await self._check(address, some):
                    self.verdicts |= verdicts
                    left = left[len(some) :]
        except _ServerError as error:
            self._error = str(error)

    async def _check(self, address: Address, ports: list[int]) -> dict[int, Verdict]:
        """Make one request; none are the verdicts when it is to be made again, after a wait."""
        self._on_progress(f"{self.url} is checking {len(ports)} ports")
        response, body = await self._request(
            "POST", "/check-ports", {"provider_ip": str(address), "ports": ports}
        )
        if response.status_code == HTTPStatus.OK:
            results = _parse(CheckResponse, response, body).results
            if list(results) != [str(port) for port in ports]:
                raise _ServerError("it answered for other ports than it was asked about")
            return {
                port: Verdict(said.accessible, said.error and _printable(said.error))
                for port, said in zip(ports, results.values(), strict=True)
            }
        error = _parse(ErrorResponse, response, body).detail
        if error.code in (ErrorCode.TOO_MANY_PORTS, ErrorCode.OVERLOADED) and len(ports) > 1:
            self._most = (len(ports) + 1) // 2
        elif error.code == ErrorCode.TOO_MANY_PORTS:
            raise _ServerError(_told(response, body))
        if error.code != ErrorCode.TOO_MANY_PORTS:
            await self._wait_as_told(response, body)
        return {}

    async def _wait_as_told(self, response: httpx.Response, body: bytes) -> None:
        """Honour ``Retry-After``, in seconds, within our patience."""
        try:
            seconds = max(1, int(response.headers["retry-after"]))
        except (KeyError, ValueError):
            raise _ServerError(_told(response, body)) from None
        self._patience -= seconds
        if self._patience < 0:
            raise _ServerError(_told(response, body))
        self._on_progress(f"{self.url} asks to wait {seconds} s")
        await asyncio.sleep(seconds)

    async def _request(
        self, method: str, path: str, document: object = None
    ) -> tuple[httpx.Response, bytes]:
        body = bytearray()
        try:
            async with (
                asyncio.timeout(_CONNECT_TIMEOUT + _ANSWER_TIMEOUT),
                self._http.stream(method, self.url.rstrip("/") + path, json=document) as response,
            ):
                async for chunk in response.aiter_bytes():
                    body += chunk
                    if len(body) > _LONGEST_ANSWER:
                        raise _ServerError("its answer has no end: is it a port checker?")
        except (httpx.ConnectTimeout, httpx.ReadTimeout, TimeoutError):
            raise _ServerError("it does not answer in time") from None
        except httpx.HTTPError as error:
            raise _ServerError(_why(error)) from error
        return response, bytes(body)


def _is_url(text: str) -> bool:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        return False
    return url.scheme in ("http", "https") and bool(url.host) and (url.port or 1) in range(1, 65536)


def _why(error: BaseException) -> str:
    """Say what is behind an error of httpx: its cause's causes know."""
    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    for cause in causes:
        if isinstance(cause, ssl.SSLError):
            return f"TLS fails: {getattr(cause, 'verify_message', '') or cause.reason or cause}"
        if isinstance(cause, socket.gaierror):
            return f"its name cannot be resolved: {cause.strerror}"
    for cause in reversed(causes):
        if isinstance(cause, OSError) and cause.errno:
            return f"it cannot be reached: {os.strerror(cause.errno)}"
    return f"it cannot be talked to: {error or type(error).__name__}"


def _parse(model: type[_Model], response: httpx.Response, body: bytes) -> _Model:
    try:
        return model.model_validate_json(body)
    except ValidationError:
        raise _ServerError(_told(response, body)) from None


def _told(response: httpx.Response, body: bytes) -> str:
    """What a server told, other than what it was asked."""
    try:
        detail = ErrorResponse.model_validate_json(body).detail
    except ValidationError:
        return f"its answer is no port checker's (HTTP status {response.status_code})"
    return f"{_printable(detail.message)} ({detail.code})"


def _printable(text: str) -> str:
    """A server's words, which must not steer the reader's terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:_LONGEST_WORDS])
