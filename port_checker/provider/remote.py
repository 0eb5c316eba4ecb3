"""One server: asking it, waiting for it, and what went wrong with it."""

import asyncio
import os
import socket
import ssl
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from port_checker.addresses import Address, parse_address
from port_checker.connect import Verdict
from port_checker.provider.report import ServerReport
from port_checker.schemas import CallerAddress, CheckResponse, ErrorCode, ErrorResponse

_Model = TypeVar("_Model", bound=BaseModel)

# Seconds for one answer. A server with default settings needs 17 at the most, and must not need
# more than 30.
ANSWER_TIMEOUT = 35.0
CONNECT_TIMEOUT = 10.0
# Seconds that one server may make us wait by Retry-After, all told.
_PATIENCE = 120.0
# Ports asked for at once: what a server with default settings takes.
MOST_AT_ONCE = 1000
# Bytes of an answer that are read. One on 10,000 ports has less than 1 MiB.
_LONGEST_ANSWER = 4 * 1024 * 1024
# Characters of a server's words that are shown.
_LONGEST_WORDS = 300


class _ServerError(Exception):
    """A server could not be asked; the message says why."""


class Server:
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
        self._most = MOST_AT_ONCE
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
                asyncio.timeout(CONNECT_TIMEOUT + ANSWER_TIMEOUT),
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
