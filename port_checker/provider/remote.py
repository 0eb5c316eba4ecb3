"""One port checker: asking it, waiting for it, and explaining its failures."""

import asyncio
import contextlib
import errno
import json
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from http import HTTPStatus
from typing import Any, NamedTuple
from urllib.parse import urljoin, urlsplit

from port_checker.addresses import Address, parse_address
from port_checker.connect import HOST_UNREACHABLE, REFUSED, TIMED_OUT, Verdict, VerdictKind
from port_checker.errors import ErrorCode
from port_checker.provider.http_client import (
    HttpClient,
    HttpError,
    OnLines,
    Response,
    ServerUrl,
    printable,
    without_password,
)
from port_checker.provider.report import TlsAnswer
from port_checker.verdicts import HERE, port_verdict, tls_kind

# How a server names the address that it would check instead.
_OWN_ADDRESS = re.compile(r"your own address, ([0-9A-Fa-f.:]+[0-9A-Fa-f])")

# Ports in one request: what a server with default settings accepts.
MAX_PORTS_PER_REQUEST = 1000
# Bytes of an answer that are read: for everything but verdicts, and for each verdict, on one port
# from one place. A verdict has about 70.
_ANSWER_SIZE = 64 * 1024
_VERDICT_SIZE = 256
_MOST_PLACES = 17  # from which a server looks: it may ask 16 others
# What the error numbers of older servers say about a port. Any other number is the server's own
# trouble: it has no files or ports left, no route, or a firewall of its own.
_BY_ERRNO = {
    errno.ECONNREFUSED: REFUSED,
    errno.ETIMEDOUT: TIMED_OUT,
    errno.EHOSTUNREACH: HOST_UNREACHABLE,
    errno.ECONNRESET: Verdict(VerdictKind.OTHER, "Connection reset by peer"),
}
# How often a server that sees this machine at another address than before is asked again.
_MAX_MOVES = 6
# Statuses of a server, or of a proxy in front of it, after which a later attempt may succeed.
_PASSING = {
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.BAD_GATEWAY,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT,
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.TOO_EARLY,
    499,  # nginx: its client left, which is a proxy here
    *range(520, 531),  # Cloudflare: the server behind it is away or broken
    598,
    599,  # proxies: a timeout while reading or connecting
}
# A server that has moved redirects for good, or keeps the request's path; a network's login page
# does neither.
_MOVED = {HTTPStatus.MOVED_PERMANENTLY, HTTPStatus.PERMANENT_REDIRECT}
_LOGIN_PAGE = "a login page of this network answers in its place: log in there, and try again"


@dataclass(frozen=True)
class Waits:
    """How long to wait for servers and for connections from them, in seconds.

    Attributes:
        connect: For a connection to a server.
        look_up: For the look-up of a server's name. The C library asks each DNS server twice, for
            5 s (resolv.conf(5)).
        answer: For an answer. A server with default settings needs 17 at most, and must not need
            more than 30.
        pauses: Before each new attempt after failures in a row, unless the server says with
            ``Retry-After`` how long to wait.
        patience: In total, for one server, until it checks something; attempts without an answer
            count, too.
        late_connections: After an answer, for the connections that it reports: if the last packet
            of a handshake is lost, it is sent again after a retransmission timeout.
        between_groups: Between small groups of ports, when new connections are limited on the way.
        ban: Before a server that seems to be banned as a scanner is asked again.
        quiet: With no request, to see who connects anyway; about this long.
        sleep: What to wait with.
    """

    connect: float = 10.0
    look_up: float = 10.0
    answer: float = 35.0
    pauses: tuple[float, ...] = (1, 2, 4, 8, 15)
    patience: float = 120.0
    late_connections: float = 3.0
    between_groups: float = 2.0
    ban: float = 15.0
    quiet: float = 1.0
    sleep: Callable[[float], Awaitable[None]] = field(default=asyncio.sleep, repr=False)


class ServerError(Exception):
    """The server could not check the ports; the message says why, without naming the server."""


class _TooManyPorts(Exception):
    """The server takes fewer ports at once."""


class _OtherAddress(ServerError):
    """The server refuses, since it saw this machine at another address this time."""

    def __init__(self, message: str, address: str | None) -> None:
        super().__init__(message)
        self.address: Address | None = None
        with contextlib.suppress(ValueError):
            self.address = parse_address(address or "")


class _ErrorDetail(NamedTuple):
    """An error of a server, whose codes may be newer than ours."""

    code: str
    message: str
    ports: frozenset[int]


@dataclass(frozen=True)
class Answers:
    """What a server answered about some ports.

    Attributes:
        verdicts: Its verdict on each port that it checked, in the order of asking.
        excluded: The ports that it may not connect to.
        error: Why it did not check all the others; None if it did.
        local: The address of this machine from which it was asked; None without an answer.
        remote: The address of the server at which it was asked; None without an answer.
        failures: Its own errors in place of a verdict, by port.
        address: This machine's, about which it was asked, or as it sees it; None if unknown.
        places: The verdict of each place from which it looked, by port and name, where it asks
            other places.
    """

    verdicts: Mapping[int, Verdict] = field(default_factory=dict)
    excluded: frozenset[int] = frozenset()
    error: str | None = None
    local: Address | None = None
    remote: Address | None = None
    failures: Mapping[int, str] = field(default_factory=dict)
    address: Address | None = None
    places: Mapping[int, Mapping[str, Verdict]] = field(default_factory=dict)

    @cached_property
    def reached(self) -> set[int]:
        """The ports that it could connect to."""
        return {port for port, verdict in self.verdicts.items() if verdict.accessible}

    def __or__(self, later: "Answers") -> "Answers":
        """Add later answers; where both have one, the later one counts."""
        return Answers(
            {**self.verdicts, **later.verdicts},
            self.excluded | later.excluded,
            later.error,
            later.local or self.local,
            later.remote or self.remote,
            {**self.failures, **later.failures},
            later.address or self.address,
            {
                port: later.places.get(port, {}) if port in later.verdicts else places
                for port, places in {**self.places, **later.places}.items()
            },
        )


class Server:
    """A client of one port checker. It keeps nothing but the URL and its patience.

    Attributes:
        url: Its base URL.
    """

    def __init__(
        self, url: ServerUrl, http: HttpClient, on_progress: Callable[[str], None], waits: Waits
    ) -> None:
        self.url = url
        self._http = http
        self._on_progress = on_progress
        self._waits = waits
        self._patience = waits.patience

    async def introduce(self) -> Answers:
        """Ask for this machine's address as the server sees it.

        Returns:
            No answers about ports, but the addresses; ``address`` is None if the server has none.

        Raises:
            ServerError: It does not say.
        """
        response = await self._request("GET", "/ip", None, _ANSWER_SIZE)
        address = None
        match response.status, response.document:
            case HTTPStatus.OK, {"ip": str(ip)}:
                try:
                    address = parse_address(ip)
                except ValueError:
                    raise ServerError("sent an invalid IP address") from None
            case HTTPStatus.OK, {"ip": None}:
                pass
            case _ if not self._lacks_ip(response):
                raise ServerError(_describe(response, self.url))
        return Answers(local=response.local, remote=response.remote, address=address)

    def _lacks_ip(self, response: Response) -> bool:
        """Whether the server is an older one that does not tell callers their address."""
        if response.status != HTTPStatus.NOT_FOUND:
            return False
        if self.url.path:
            raise ServerError(f"has nothing at {self.url}/ip: try {self.url.root}")
        return bool(_error_detail(response)) or b'"Not Found"' in response.body  # FastAPI's words

    async def ask(
        self,
        address: Address,
        ports: Sequence[int],
        is_connecting: Callable[[], bool] = lambda: False,
        *,
        may_move: bool = False,
    ) -> Answers:
        """Ask about ports of an address, as many at once as the server takes.

        Its failure is part of the answers.

        Args:
            address: This machine's.
            ports: The ports.
            is_connecting: Whether the server has been seen to connect. If so, silence leads to only
                one more attempt: a ban that has cut the server off would begin anew with each.
            may_move: Whether to ask about another address that the server sees this machine at.
        """
        answers = Answers()
        remaining, batch_size = list(ports), MAX_PORTS_PER_REQUEST
        remaining_moves = _MAX_MOVES if may_move else 0
        while remaining:
            batch = remaining[:batch_size]
            try:
                answers |= await self._check(address, batch, is_connecting)
            except _TooManyPorts:
                batch_size = (len(batch) + 1) // 2
            except _OtherAddress as error:
                # If connections leave by several uplinks in turn, an address is right only now and
                # then.
                seen_at = error.address
                if not (remaining_moves and seen_at and seen_at.version == address.version):
                    return answers | Answers(error=str(error))
                remaining_moves -= 1
                if not answers.verdicts:
                    address = seen_at
            except ServerError as error:
                return answers | Answers(error=str(error))
            else:
                answers |= Answers(address=address)
                self._patience = self._waits.patience
                done = answers.verdicts.keys() | answers.excluded | answers.failures.keys()
                remaining = [port for port in remaining if port not in done]
        return answers

    async def check_tls(self, address: Address, port: int) -> TlsAnswer:
        """Ask whether the certificate at a port of an address can be trusted.

        Raises:
            ServerError: It does not say.
        """
        self._on_progress(f"{self.url} is checking the certificate at port {port}")
        request = {"host": str(address), "port": port, "expected_ip": str(address)}
        body = json.dumps(request | {"perspectives": True}).encode()
        response = await self._request("POST", "/check-tls", body, _ANSWER_SIZE)
        if response.status in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED):
            raise ServerError("does not check certificates")
        answer = _read_tls(response.document) if response.status == HTTPStatus.OK else None
        if not answer:
            raise ServerError(_describe(response, self.url))
        results = ((name, _read_tls(place.get("result"))) for name, place in self._places(response))
        return replace(answer, places={name: result.error for name, result in results if result})

    async def _check(
        self, address: Address, ports: list[int], is_connecting: Callable[[], bool]
    ) -> Answers:
        """Ask about ports in one request; the answer is all verdicts, or ports to exclude."""
        count = "1 port" if len(ports) == 1 else f"{len(ports)} ports"
        checking = f"{self.url} is checking {count} (at most {self._waits.answer:.0f} s)"
        self._on_progress(checking)

        def on_lines(lines: int) -> None:
            self._on_progress(f"{checking}: {min(lines, len(ports))} done")

        request = {"provider_ip": str(address), "ports": ports, "perspectives": True}
        document = json.dumps(request).encode()
        # Each verdict comes in a line, in the answer proper, and once for each place.
        size = _ANSWER_SIZE + _VERDICT_SIZE * len(ports) * (2 + _MOST_PLACES)
        response = await self._request(
            "POST", "/check-ports", document, size, len(ports), is_connecting, on_lines
        )
        results = _read_results(response.document) if response.status == HTTPStatus.OK else None
        if results is not None:
            if results.keys() != {str(port) for port in ports}:
                raise ServerError("reported on other ports than it was asked about")
            places: dict[int, dict[str, Verdict]] = {}
            for name, place in self._places(response):
                for port, result in (_read_results(place) or {}).items():
                    if port in results and isinstance(result, Verdict):
                        places.setdefault(int(port), {})[name] = result
            return Answers(
                verdicts={p: r for p in ports if isinstance(r := results[str(p)], Verdict)},
                failures={p: r for p in ports if isinstance(r := results[str(p)], str)},
                local=response.local,
                remote=response.remote,
                places=places,
            )
        detail = _error_detail(response)
        if detail and detail.code == ErrorCode.TARGET_NOT_ALLOWED:
            address_seen = _OWN_ADDRESS.search(detail.message)
            raise _OtherAddress(_describe(response, self.url), address_seen and address_seen[1])
        if detail and detail.code == ErrorCode.TOO_MANY_PORTS and len(ports) > 1:
            raise _TooManyPorts
        if detail and (excluded := detail.ports & frozenset(ports)):
            return Answers(excluded=excluded, local=response.local, remote=response.remote)
        raise ServerError(_describe(response, self.url))

    def _places(self, response: Response) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the name of each place and what it says; nothing if the server is the only one."""
        match response.document:
            case {"perspectives": [_, _, *_] as places}:
                for place in places[:_MOST_PLACES]:
                    match place:
                        case {"name": str(name)}:
                            yield self.url.authority if name == HERE else printable(name), place

    async def _request(
        self,
        method: str,
        path: str,
        body: bytes | None,
        max_size: int,
        ports: int = 1,
        is_connecting: Callable[[], bool] = lambda: False,
        on_lines: OnLines | None = None,
    ) -> Response:
        """Make a request, and repeat it while the trouble may pass.

        Raises:
            ServerError: It does not pass, or not within our patience.
            _TooManyPorts: The server is busy, and may take fewer ports now, after a pause.
        """
        pauses, was_cut_off = iter(self._waits.pauses), False
        while True:
            retry_after = None
            started = asyncio.get_running_loop().time()
            try:
                response = await self._http.request(
                    self.url, method, path, body, max_size, on_lines
                )
            except HttpError as error:
                cut_off = error.timed_out and was_cut_off
                was_cut_off = error.timed_out and is_connecting()
                if not error.passes or cut_off:
                    raise ServerError(str(error)) from None
                trouble, detail = str(error), None
                self._patience -= asyncio.get_running_loop().time() - started
            else:
                detail = _error_detail(response)
                if response.status not in _PASSING or (detail and detail.ports):
                    return response
                trouble, retry_after = _describe(response, self.url), _retry_after(response)
            pause = retry_after or next(pauses, None)
            if pause is None or pause > self._patience:
                raise ServerError(trouble)
            self._patience -= pause
            self._on_progress(f"{self.url}: {trouble}; next attempt in {pause:.0f} s")
            await self._waits.sleep(pause)
            if detail and detail.code == ErrorCode.OVERLOADED and ports > 1:
                raise _TooManyPorts


def _read_tls(result: object) -> TlsAnswer | None:
    """Read the result for a TLS endpoint; None if it is not one."""
    match result:
        case {
            "valid": bool(valid),
            "error": str() | None as error,
            "not_after": str() | None as not_after,
        }:
            return TlsAnswer(
                tls_kind(valid, error),
                None if valid else printable(error or "no reason given"),
                not_after and printable(not_after),
            )
    return None


def _read_results(answer: object) -> dict[str, Verdict | str] | None:
    """Read the results for ports, each as ``_read_verdict`` does; None if there are none."""
    match answer:
        case {"results": dict(results)}:
            verdicts = {}
            for port, result in results.items():
                match result:
                    case {"accessible": bool(accessible), "error": str() | None as error}:
                        verdicts[port] = _read_verdict(accessible, error)
                    case _:
                        return None
            return verdicts
    return None


def _read_verdict(accessible: bool, error: str | None) -> Verdict | str:
    """Read a verdict, or else the server's words about its own trouble.

    Older servers put the system's error number before its words.
    """
    verdict = port_verdict(accessible, error)
    if verdict.kind is not VerdictKind.OTHER:
        return verdict
    error = printable(error or "no reason given")
    number = re.match(r"\[Errno ([0-9]{1,4})\]", error)
    if not number:
        return Verdict(VerdictKind.OTHER, error)
    return _BY_ERRNO.get(int(number[1])) or error


def _retry_after(response: Response) -> float | None:
    """Read ``Retry-After``, seconds or a date (RFC 9110 section 10.2.3): at least one second."""
    text = response.headers.get("retry-after", "")
    try:
        if re.fullmatch(r"-?[0-9]{1,9}", text):
            return max(1.0, float(text))
        seconds = (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds()
    except (TypeError, ValueError, OverflowError):
        return None
    return max(1.0, seconds)


def _error_detail(response: Response) -> _ErrorDetail | None:
    match response.document:
        case {"detail": {"code": str(code), "message": str(message)} as detail}:
            ports = detail.get("ports")
            named = ports if isinstance(ports, list) else ()
            return _ErrorDetail(code, message, frozenset(p for p in named if isinstance(p, int)))
    return None


# What every shell takes as it is, since people paste the URL that they are advised to give.
_PASTABLE = re.compile(r"[A-Za-z0-9._~/:\[\]-]+")


def _describe(response: Response, url: ServerUrl) -> str:
    """Describe an answer that is not the expected one."""
    if detail := _error_detail(response):
        return f"{printable(detail.message)} ({printable(detail.code)})"
    if response.status == HTTPStatus.NETWORK_AUTHENTICATION_REQUIRED:
        return f"cannot be reached: {_LOGIN_PAGE}"
    if response.status == HTTPStatus.UNAUTHORIZED:
        if url.authorization:
            return "refuses the user name and password of the URL"
        where = url.root.replace("//", "//NAME:PASSWORD@")
        return f"asks for a user name and password: give them in the URL ({where})"
    if location := response.headers.get("location"):
        target = ""
        with contextlib.suppress(ValueError):  # it is not a URL
            target = urljoin(f"{url}/", location)
        if response.status not in _MOVED and _is_elsewhere(target, url):
            return f"cannot be reached: {_LOGIN_PAGE}"
        target = printable(without_password(target))
        target = target.removesuffix("/check-ports").removesuffix("/ip")
        if not _PASTABLE.fullmatch(target):
            return "redirects to another URL: ask those who run it for it, and give that"
        return f"redirects to {target}: give that URL"
    status = f"HTTP status {response.status}"
    if reason := response.reason:
        status += f" ({reason})"
    if sender := response.headers.get("server"):
        status += f" from {printable(sender)}"
    if response.status in _PASSING:
        return f"answer with {status}: it, or a proxy in front of it, is down or busy"
    return f"unexpected answer, {status}: is this a port checker?"


def _is_elsewhere(target: str, url: ServerUrl) -> bool:
    """Whether a redirect leads to another host, and not to the API there."""
    parts = urlsplit(target)
    moved = parts.path.endswith(("/ip", "/check-ports", "/check-tls"))
    return parts.hostname != url.host and not moved
