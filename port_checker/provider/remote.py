"""One port checker: asking it, waiting for it, and explaining its failures."""

import asyncio
import os
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from port_checker.addresses import Address, parse_address
from port_checker.connect import Verdict
from port_checker.provider.report import ServerReport
from port_checker.schemas import CallerAddress, CheckResponse, ErrorCode, ErrorResponse

_Model = TypeVar("_Model", bound=BaseModel)

# Ports in one request: what a server with default settings accepts.
MAX_PORTS_PER_REQUEST = 1000
# Bytes of an answer that are read. An answer for 10,000 ports has less than 1 MiB.
_MAX_ANSWER_SIZE = 4 * 1024 * 1024
# Characters of a server's message that are shown.
_MAX_MESSAGE_LENGTH = 300


@dataclass(frozen=True)
class Waits:
    """How long to wait for servers and for connections from them, in seconds.

    Attributes:
        connect: For a connection to a server.
        answer: For an answer. A server with default settings needs 17 at most, and must not need
            more than 30.
        patience: In total, for one server's ``Retry-After``.
        late_connections: After an answer, for the connections that it reports: when the last
            packet of a handshake is lost, the next one follows after a retransmission timeout.
        sleep: What to wait with.
    """

    connect: float = 10.0
    answer: float = 35.0
    patience: float = 120.0
    late_connections: float = 3.0
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


class _ServerError(Exception):
    """The server could not check the ports; the message says why."""


class Server:
    """One port checker, and what it has reported so far.

    Attributes:
        url: Its base URL.
        verdicts: Its verdict on each port that it has checked.
    """

    def __init__(
        self,
        url: str,
        http: httpx.AsyncClient,
        on_progress: Callable[[str], None],
        waits: Waits,
    ) -> None:
        self.url = url
        self.verdicts: dict[int, Verdict] = {}
        self._http = http
        self._on_progress = on_progress
        self._waits = waits
        self._patience = waits.patience
        self._batch_size = MAX_PORTS_PER_REQUEST
        self._error: str | None = None if _is_url(url) else "not a valid server URL"
        self._no_address: str | None = None

    def report(self) -> ServerReport:
        """Summarize how asking it went."""
        asked = bool(self.verdicts)
        return ServerReport(self.url, asked, self._error or (None if asked else self._no_address))

    async def fetch_address(self) -> Address | None:
        """Return this machine's address as the server sees it; None if it cannot tell."""
        if self._error:
            return None
        try:
            response, body = await self._request("GET", "/ip")
            if response.status_code == HTTPStatus.OK:
                if ip := _parse(CallerAddress, response, body).ip:
                    return parse_address(ip)
                self._no_address = "it does not know this machine's address; give it with --ip"
            elif response.status_code == HTTPStatus.NOT_FOUND:
                self._no_address = "it does not tell callers their address; give it with --ip"
            else:
                raise _ServerError(_describe(response, body))
        except ValueError:
            self._error = "it sent an invalid IP address"
        except _ServerError as error:
            self._error = str(error)
        return None

    async def ask(self, address: Address, ports: Sequence[int]) -> None:
        """Ask about ``ports``, unless asking this server has failed before."""
        left = list(ports)
        try:
            while left and not self._error:
                some = left[: self._batch_size]
                if verdicts := await self._check(address, some):
                    self.verdicts |= verdicts
                    left = left[len(some) :]
        except _ServerError as error:
            self._error = str(error)

    async def _check(self, address: Address, ports: list[int]) -> dict[int, Verdict]:
        """Make one request; return no verdicts if it has to be repeated, after a wait."""
        self._on_progress(f"{self.url} is checking {len(ports)} ports")
        response, body = await self._request(
            "POST", "/check-ports", {"provider_ip": str(address), "ports": ports}
        )
        if response.status_code == HTTPStatus.OK:
            results = _parse(CheckResponse, response, body).results
            if list(results) != [str(port) for port in ports]:
                raise _ServerError("it reported on other ports than it was asked about")
            return {
                port: Verdict(said.accessible, said.error and _printable(said.error))
                for port, said in zip(ports, results.values(), strict=True)
            }
        error = _parse(ErrorResponse, response, body).detail
        if error.code in (ErrorCode.TOO_MANY_PORTS, ErrorCode.OVERLOADED) and len(ports) > 1:
            self._batch_size = (len(ports) + 1) // 2
        elif error.code == ErrorCode.TOO_MANY_PORTS:
            raise _ServerError(_describe(response, body))
        if error.code != ErrorCode.TOO_MANY_PORTS:
            await self._wait_as_asked(response, body)
        return {}

    async def _wait_as_asked(self, response: httpx.Response, body: bytes) -> None:
        """Wait for ``Retry-After`` seconds, as long as our patience allows."""
        try:
            seconds = max(1, int(response.headers["retry-after"]))
        except (KeyError, ValueError):
            raise _ServerError(_describe(response, body)) from None
        self._patience -= seconds
        if self._patience < 0:
            raise _ServerError(_describe(response, body))
        self._on_progress(f"waiting {seconds} s for {self.url}")
        await self._waits.sleep(seconds)

    async def _request(
        self, method: str, path: str, document: object = None
    ) -> tuple[httpx.Response, bytes]:
        body = bytearray()
        try:
            async with (
                asyncio.timeout(self._waits.connect + self._waits.answer),
                self._http.stream(method, self.url.rstrip("/") + path, json=document) as response,
            ):
                async for chunk in response.aiter_bytes():
                    body += chunk
                    if len(body) > _MAX_ANSWER_SIZE:
                        raise _ServerError("its answer is too long: is this a port checker?")
        except (httpx.ConnectTimeout, httpx.ReadTimeout, TimeoutError):
            raise _ServerError("it did not answer in time") from None
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
    """Find the reason for an error of httpx in the chain of its causes."""
    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    for cause in causes:
        if isinstance(cause, ssl.SSLError):
            return f"TLS failed: {getattr(cause, 'verify_message', '') or cause.reason or cause}"
        if isinstance(cause, socket.gaierror):
            return f"its host name cannot be resolved: {cause.strerror}"
    for cause in reversed(causes):
        if isinstance(cause, OSError) and cause.errno:
            return f"it cannot be reached: {os.strerror(cause.errno)}"
    return f"the exchange with it failed: {error or type(error).__name__}"


def _parse(model: type[_Model], response: httpx.Response, body: bytes) -> _Model:
    try:
        return model.model_validate_json(body)
    except ValidationError:
        raise _ServerError(_describe(response, body)) from None


def _describe(response: httpx.Response, body: bytes) -> str:
    """Describe an answer that is not the expected one."""
    try:
        detail = ErrorResponse.model_validate_json(body).detail
    except ValidationError:
        return f"unexpected answer (HTTP status {response.status_code}): is this a port checker?"
    return f"{_printable(detail.message)} ({detail.code})"


def _printable(text: str) -> str:
    """Make a server's text safe to print: it must not control the terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:_MAX_MESSAGE_LENGTH])
