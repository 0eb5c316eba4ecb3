"""One port checker: asking it, waiting for it, and explaining its failures."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import TypeVar
from urllib.parse import urljoin

from pydantic import BaseModel, ValidationError

from port_checker.addresses import Address, parse_address
from port_checker.connect import Verdict, VerdictKind
from port_checker.provider.http_client import (
    HttpClient,
    HttpError,
    Response,
    ServerUrl,
    printable,
    without_password,
)
from port_checker.provider.report import ServerReport, TlsAnswer
from port_checker.schemas import CallerAddress, CheckPortsResponse, CheckTlsResponse, ErrorCode

_Model = TypeVar("_Model", bound=BaseModel)

# Ports in one request: what a server with default settings accepts.
MAX_PORTS_PER_REQUEST = 1000
# Bytes of an answer that are read: so many, and so many for each port. A verdict has about 70.
_ANSWER_SIZE = 64 * 1024
_VERDICT_SIZE = 256
# What a server or a proxy before it answers when it may succeed later.
_PASSING = {
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.BAD_GATEWAY,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT,
}


@dataclass(frozen=True)
class Waits:
    """How long to wait for servers and for connections from them, in seconds.

    Attributes:
        connect: For a connection to a server.
        answer: For an answer. A server with default settings needs 17 at most, and must not need
            more than 30.
        pauses: Before each new attempt after failures in a row, where the server does not say how
            long to wait by ``Retry-After``.
        patience: In total, for one server, until it checks something; attempts without an answer
            count, too.
        late_connections: After an answer, for the connections that it reports: when the last
            packet of a handshake is lost, the next one follows after a retransmission timeout.
        between_groups: Between small groups of ports, when new connections are limited on the way.
        sleep: What to wait with.
    """

    connect: float = 10.0
    answer: float = 35.0
    pauses: tuple[float, ...] = (1, 2, 4, 8, 15)
    patience: float = 120.0
    late_connections: float = 3.0
    between_groups: float = 2.0
    sleep: Callable[[float], Awaitable[None]] = field(default=asyncio.sleep, repr=False)


class ServerError(Exception):
    """The server could not check the ports; the message says why, without naming the server."""


class _Overloaded(Exception):
    """The server has no room for so many ports at once."""


class _ErrorDetail(BaseModel):
    """An error of a server, whose codes may be newer than ours."""

    code: str
    message: str
    ports: list[int] | None = None


class _ErrorBody(BaseModel):
    detail: _ErrorDetail


class Server:
    """One port checker, and what it has reported so far.

    Attributes:
        url: Its base URL.
        address: This machine's address, which it is asked about; None while that is unknown.
        verdicts: Its verdict on each port that it has checked.
        excluded: The ports that it may not connect to.
        error: Why it does not check, or no longer; None if it does.
        does_not_know_address: Whether that is all that is wrong with it.
        local: The address of this machine from which it was asked.
        remote: Its own address.
    """

    def __init__(
        self, url: ServerUrl, http: HttpClient, on_progress: Callable[[str], None], waits: Waits
    ) -> None:
        self.url = url
        self.address: Address | None = None
        self.verdicts: dict[int, Verdict] = {}
        self.excluded: set[int] = set()
        self.error: str | None = None
        self.does_not_know_address = False
        self.local: Address | None = None
        self.remote: Address | None = None
        self._http = http
        self._on_progress = on_progress
        self._waits = waits
        self._patience = waits.patience
        self._batch_size = MAX_PORTS_PER_REQUEST

    def report(self) -> ServerReport:
        """Summarize how asking it went."""
        address = str(self.address) if self.address else None
        return ServerReport(
            str(self.url), bool(self.verdicts or self.excluded), self.error, address
        )

    async def fetch_address(self) -> None:
        """Ask for this machine's address as the server sees it, or keep the reason in ``error``."""
        try:
            response = await self._request("GET", "/ip", None, _ANSWER_SIZE)
            if response.status == HTTPStatus.NOT_FOUND:
                raise ServerError(self._no_address(response))
            if response.status != HTTPStatus.OK:
                raise ServerError(_describe(response, self.url))
            ip = _parse(CallerAddress, response, self.url).ip
            if ip is None:
                self.does_not_know_address = True
                raise ServerError("does not know this machine's address; give it with --ip")
            try:
                self.address = parse_address(ip)
            except ValueError:
                raise ServerError("sent an invalid IP address") from None
        except ServerError as error:
            self.error = str(error)

    def _no_address(self, response: Response) -> str:
        if self.url.path:
            return f"has nothing at {self.url}/ip: try {self.url.root}"
        if _error_detail(response) or b'"Not Found"' in response.body:  # FastAPI's own words
            self.does_not_know_address = True
            return "does not tell callers their address; give it with --ip"
        return _describe(response, self.url)

    async def ask(self, ports: Sequence[int]) -> None:
        """Ask about ``ports``, unless asking this server has failed before.

        The verdicts, and the reason if there are none for some, are kept in the attributes.
        """
        left = [port for port in ports if port not in self.excluded]
        try:
            while left and not self.error:
                verdicts, excluded = await self._check_first(left)
                self.verdicts |= verdicts
                self.excluded |= excluded
                self._patience = self._waits.patience
                done = verdicts.keys() | excluded
                left = [port for port in left if port not in done]
        except ServerError as error:
            self.error = str(error)

    async def check_tls(self, port: int) -> TlsAnswer:
        """Ask whether the certificate at a port of this machine's address can be trusted.

        Raises:
            ServerError: It does not say.
        """
        if self.error or not self.address:
            raise ServerError(self.error or "does not know this machine's address")
        self._on_progress(f"{self.url} is checking the certificate at port {port}")
        address = str(self.address)
        asked = {"host": address, "port": port, "expected_ip": address}
        body = json.dumps(asked).encode()
        response = await self._request("POST", "/check-tls", body, _ANSWER_SIZE)
        if response.status in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED):
            raise ServerError("does not check certificates")
        if response.status != HTTPStatus.OK:
            raise ServerError(_describe(response, self.url))
        said = _parse(CheckTlsResponse, response, self.url)
        return TlsAnswer(
            said.kind,
            None if said.valid else printable(said.error or "no reason given"),
            said.not_after and printable(said.not_after),
        )

    async def look_again(self, ports: Sequence[int]) -> dict[int, Verdict]:
        """Ask about ports that it has checked before.

        Returns:
            The verdicts, which are not kept.

        Raises:
            ServerError: It does not answer for all of them.
        """
        verdicts: dict[int, Verdict] = {}
        while left := [port for port in ports if port not in verdicts]:
            some, excluded = await self._check_first(left)
            if excluded:
                raise ServerError("may not connect to a port that it did connect to")
            verdicts |= some
        return verdicts

    async def _check_first(self, ports: list[int]) -> tuple[dict[int, Verdict], set[int]]:
        """Do what ``_check`` does for as many of the ports as the server takes at once."""
        while True:
            some = ports[: self._batch_size]
            try:
                return await self._check(some)
            except _Overloaded:
                self._batch_size = (len(some) + 1) // 2

    async def _check(self, ports: list[int]) -> tuple[dict[int, Verdict], set[int]]:
        """Have ports checked; return the verdicts, or the ports that the server may not reach."""
        self._on_progress(f"{self.url} is checking {_count(ports)}")
        document = json.dumps({"provider_ip": str(self.address), "ports": ports}).encode()
        size = _ANSWER_SIZE + _VERDICT_SIZE * len(ports)
        response = await self._request("POST", "/check-ports", document, size, len(ports))
        if response.status == HTTPStatus.OK:
            results = _parse(CheckPortsResponse, response, self.url).results
            if list(results) != [str(port) for port in ports]:
                raise ServerError("reported on other ports than it was asked about")
            return {
                port: _printable(result.verdict)
                for port, result in zip(ports, results.values(), strict=True)
            }, set()
        detail = _error_detail(response)
        if detail and detail.code == ErrorCode.TOO_MANY_PORTS and len(ports) > 1:
            raise _Overloaded
        if detail and (excluded := set(detail.ports or ()) & set(ports)):
            return {}, excluded
        raise ServerError(_describe(response, self.url))

    async def _request(
        self, method: str, path: str, body: bytes | None, max_size: int, ports: int = 1
    ) -> Response:
        """Make a request, and make it again while what hinders it may pass.

        Raises:
            ServerError: It does not pass, or not within our patience.
            _Overloaded: After a wait: the server would take fewer ports.
        """
        pauses = iter(self._waits.pauses)
        while True:
            retry_after = None
            started = asyncio.get_running_loop().time()
            try:
                response = await self._http.request(self.url, method, path, body, max_size)
            except HttpError as error:
                if not error.passes:
                    raise ServerError(str(error)) from None
                trouble, detail = str(error), None
                self._patience -= asyncio.get_running_loop().time() - started
            else:
                self.local, self.remote = response.local, response.remote
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
                raise _Overloaded


def _printable(verdict: Verdict) -> Verdict:
    if verdict.kind is VerdictKind.OTHER:  # the words of the others are ours
        return Verdict(verdict.kind, printable(verdict.error or "no reason given"))
    return verdict


def _count(ports: Sequence[int]) -> str:
    return "1 port" if len(ports) == 1 else f"{len(ports)} ports"


def _retry_after(response: Response) -> float | None:
    """Read ``Retry-After``, seconds or a date (RFC 9110 section 10.2.3): at least one second."""
    text = response.headers.get("retry-after", "")
    try:
        if re.fullmatch(r"-?[0-9]{1,9}", text):
            return max(1.0, float(text))
        seconds = (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds()
    except (TypeError, ValueError):
        return None
    return max(1.0, seconds)


def _parse(model: type[_Model], response: Response, url: ServerUrl) -> _Model:
    try:
        return model.model_validate_json(response.body)
    except ValidationError:
        raise ServerError(_describe(response, url)) from None


def _error_detail(response: Response) -> _ErrorDetail | None:
    try:
        return _ErrorBody.model_validate_json(response.body).detail
    except ValidationError:
        return None


def _describe(response: Response, url: ServerUrl) -> str:
    """Describe an answer that is not the expected one."""
    if detail := _error_detail(response):
        return f"{printable(detail.message)} ({printable(detail.code)})"
    if target := response.headers.get("location"):
        target = printable(without_password(urljoin(f"{url}/", target)))
        target = target.removesuffix("/check-ports").removesuffix("/ip")
        return f"redirects to {target}: give that URL"
    status = f"HTTP status {response.status}"
    if reason := response.reason:
        status += f" ({reason})"
    if sender := response.headers.get("server"):
        status += f" from {printable(sender)}"
    if response.status in _PASSING:
        return f"answer with {status}: it, or a proxy before it, is down or busy"
    return f"unexpected answer, {status}: is this a port checker?"
