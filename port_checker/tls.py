"""One TLS attempt: a connection, a handshake on it, and what the certificate is good for.

TLS errors become ours here, as the operating system's do in ``connect``: an attempt ends in a
``TlsVerdict`` on the target, or in ``CheckFailed`` because the trouble was the checker's own.
"""

import asyncio
import errno
import ipaddress
import os
import re
import socket
import ssl
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, TypeVar

from port_checker.addresses import Address
from port_checker.connect import (
    OWN_TROUBLE,
    CheckFailed,
    OpenConnectionPacer,
    Verdict,
    close_for_good,
    connect,
    own_failures,
)
from port_checker.linux import return_free_memory

# A TLS record is at most 16 KiB and some bytes (RFC 8446 section 5.2).
_RECEIVED_AT_ONCE = 16 * 1024

# OpenSSL takes a chain of at most 100 KiB (SSL_CTX_set_max_cert_list), and all else in a handshake
# is small. But it ignores requests to renegotiate during a handshake, however many come.
_MOST_RECEIVED = 128 * 1024

_MEMORY_KEPT_FOR = 200  # handshakes; giving it back takes 5 ms of the thread (measured)

# What Python 3.13 sets in ssl.create_default_context(), written out so that every Python judges
# alike: earlier ones lack the last two there, and 3.11 and 3.12 know them.
_VERIFY_FLAGS = (
    ssl.VerifyFlags.VERIFY_X509_TRUSTED_FIRST
    | ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
    | ssl.VerifyFlags.VERIFY_X509_STRICT
)

# Key exchange over elliptic curves only: the group of a finite field is the server's to choose, as
# large as it likes, and no browser offers that any more. The security level forbids RSA keys below
# 2048 bits, and signatures with SHA-1.
_TLS_1_2_CIPHERS = "@SECLEVEL=2:ECDHE+AESGCM:ECDHE+CHACHA20:ECDHE+AES:!aNULL:!SHA1"

# Python puts OpenSSL's reason between additions of its own:
# "[SSL: WRONG_VERSION_NUMBER] wrong version number (_ssl.c:1006)"
_REASON = re.compile(r"(?:\[[^]]*\] )?(.*?)(?: \(_ssl\.c:\d+\))?")

_T = TypeVar("_T")


class TlsVerdictKind(StrEnum):
    """What came of attempts to a TLS endpoint."""

    VALID = "valid"
    EXPIRED = "expired"
    MISMATCH = "mismatch"
    UNTRUSTED = "untrusted"
    NOT_YET_VALID = "not_yet_valid"
    UNKNOWN_AUTHORITY = "unknown_authority"
    HANDSHAKE_FAILED = "handshake_failed"
    NOT_TLS = "not_tls"
    TOO_OLD = "too_old"
    NO_CONNECTION = "no_connection"

    @property
    def outcome(self) -> "TlsVerdictKind":
        """The kind that this is counted as: those that only advice tells apart are one."""
        match self:
            case TlsVerdictKind.NOT_YET_VALID | TlsVerdictKind.UNKNOWN_AUTHORITY:
                return TlsVerdictKind.UNTRUSTED
            case TlsVerdictKind.NOT_TLS | TlsVerdictKind.TOO_OLD:
                return TlsVerdictKind.HANDSHAKE_FAILED
        return self


# By OpenSSL's codes of why a certificate was not verified (X509_V_ERR_*, openssl/x509_vfy.h).
_KINDS_OF_CERTIFICATES = {
    9: TlsVerdictKind.NOT_YET_VALID,
    10: TlsVerdictKind.EXPIRED,
    18: TlsVerdictKind.UNKNOWN_AUTHORITY,  # self-signed
    19: TlsVerdictKind.UNKNOWN_AUTHORITY,  # self-signed, in its chain
    20: TlsVerdictKind.UNKNOWN_AUTHORITY,  # no issuer
}

# By OpenSSL's reasons (SSL_R_*, openssl/sslerr.h).
_KINDS_OF_HANDSHAKES = {
    "WRONG_VERSION_NUMBER": TlsVerdictKind.NOT_TLS,
    "TLSV1_ALERT_PROTOCOL_VERSION": TlsVerdictKind.TOO_OLD,
    "UNSUPPORTED_PROTOCOL": TlsVerdictKind.TOO_OLD,
}


@dataclass(frozen=True, slots=True)
class TlsVerdict:
    """What an attempt told about a TLS endpoint.

    Attributes:
        kind: What came of it.
        error: Why the endpoint is not valid; None when it is.
        not_after: Until when the certificate is good; None unless its chain was verified.
        try_again: Whether the connection failed, so that another attempt may end otherwise.
    """

    kind: TlsVerdictKind
    error: str | None = None
    not_after: datetime | None = None
    try_again: bool = False

    @property
    def valid(self) -> bool:
        """Whether the handshake succeeded and the certificate is good for what was expected."""
        return self.kind is TlsVerdictKind.VALID


class TlsClient:
    """Makes TLS handshakes, for one event loop.

    It trusts the authorities of OpenSSL's default store, or those that ``SSL_CERT_FILE`` and
    ``SSL_CERT_DIR`` name. They are read once, at the first handshake.

    Its cryptography runs in one thread of its own, as the peer decides how much of it there is: a
    handshake takes 1 ms, but one with a key exchange of 8192 bits takes 180 ms (measured).

    Args:
        patience: Seconds that a step of a handshake may wait for its turn and be worked on.
    """

    def __init__(self, patience: float = 5.0) -> None:
        self._patience = patience
        self._context: ssl.SSLContext | None = None
        self._under_way = 0
        self._most_under_way = 0  # since memory was last given back
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tls")

    async def attempt(
        self,
        target: Address,
        port: int,
        expected: Sequence[Address | str],
        timeout: float,
        pacer: OpenConnectionPacer,
    ) -> TlsVerdict:
        """Connect to a port, and shake hands.

        Nothing is sent after the handshake. Whatever way this ends, cancellation included, it
        leaves no socket open.

        Args:
            target: The address to connect to.
            port: The TCP port.
            expected: What the certificate must be good for: addresses, which must be among its
                alternative names of that type, and at most one DNS name, which the server is told
                (SNI), too. The subject's common name never counts (RFC 9525).
            timeout: Seconds that the attempt may last, connection and handshake together.
            pacer: Shared by all who open connections in the event loop.

        Raises:
            CheckFailed: The checker's own trouble: as for a port, or no authority is trusted on
                this machine, or it is too busy.
        """
        deadline = asyncio.get_running_loop().time() + timeout
        connection = await connect(target, port, timeout, pacer)
        if isinstance(connection, Verdict):
            return TlsVerdict(TlsVerdictKind.NO_CONNECTION, connection.error, try_again=True)
        try:
            with self._counted():
                certificate = await self._certificate(connection, expected, deadline, pacer)
        except _Failed as failure:
            return failure.verdict
        finally:
            close_for_good(connection)
        not_after = datetime.fromtimestamp(
            ssl.cert_time_to_seconds(certificate["notAfter"]), tz=UTC
        )
        mismatch = _mismatch(certificate, expected)
        kind = TlsVerdictKind.MISMATCH if mismatch else TlsVerdictKind.VALID
        return TlsVerdict(kind, mismatch, not_after)

    async def _certificate(
        self,
        connection: socket.socket,
        expected: Sequence[Address | str],
        deadline: float,
        pacer: OpenConnectionPacer,
    ) -> dict[str, Any]:
        """Shake hands; return the peer's certificate, verified but for what it is good for.

        The deadline is the peer's: a step that this machine is slow with is not the peer's fault.
        """
        loop = asyncio.get_running_loop()
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        name = next((name for name in expected if isinstance(name, str)), None)

        def begin() -> ssl.SSLObject:
            self._context = self._context or _make_context()
            tls = self._context.wrap_bio(incoming, outgoing, server_hostname=name)
            _is_finished(tls)  # it is not, but has made the client's first message
            return tls

        tls = await self._in_thread(begin)
        finished = False
        received = 0
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    await loop.sock_sendall(connection, outgoing.read())
                    if finished:
                        return tls.getpeercert() or {}
                    data = await loop.sock_recv(connection, _RECEIVED_AT_ONCE)
            except TimeoutError:
                await pacer.take(1)  # many may time out together
                raise _handshake_failed("timed out", try_again=True) from None
            except OSError as error:
                raise _connection_failure(error) from error
            if not data:
                raise _handshake_failed("connection closed by peer", try_again=True)
            received += len(data)
            if received > _MOST_RECEIVED:
                raise _handshake_failed(f"more than {_MOST_RECEIVED} bytes received")
            incoming.write(data)
            finished = await self._in_thread(lambda: _is_finished(tls))

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Count the handshakes under way, and give memory back when many have ended.

        One takes 44 KiB while it waits (measured), most of which the C library would keep.
        """
        self._under_way += 1
        self._most_under_way = max(self._most_under_way, self._under_way)
        try:
            yield
        finally:
            self._under_way -= 1
            if self._under_way < self._most_under_way - _MEMORY_KEPT_FOR:
                self._most_under_way = self._under_way
                self._thread.submit(return_free_memory)

    async def _in_thread(self, step: Callable[[], _T]) -> _T:
        try:
            async with asyncio.timeout(self._patience):
                return await asyncio.get_running_loop().run_in_executor(self._thread, step)
        except TimeoutError:
            raise CheckFailed("too busy for a TLS handshake") from None


class _Failed(Exception):
    """The attempt has ended before there was a verified certificate."""

    def __init__(self, kind: TlsVerdictKind, error: str, *, try_again: bool = False) -> None:
        super().__init__(error)
        self.verdict = TlsVerdict(kind, error, try_again=try_again)


def _handshake_failed(
    reason: str,
    kind: TlsVerdictKind = TlsVerdictKind.HANDSHAKE_FAILED,
    *,
    try_again: bool = False,
) -> _Failed:
    return _Failed(kind, f"TLS handshake failed: {reason}", try_again=try_again)


def _make_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # OpenSSL would look at the names before the dates, and say nothing of the dates if they differ.
    context.check_hostname = False
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_flags = _VERIFY_FLAGS
    context.set_ciphers(_TLS_1_2_CIPHERS)
    context.options |= ssl.OP_NO_RENEGOTIATION
    with own_failures("cannot read the trusted certificates"):
        context.load_default_certs()
        if not _trusts_somebody(context):
            raise CheckFailed(
                "no certificate authority is trusted on this machine: "
                "is the package ca-certificates missing, or SSL_CERT_FILE wrong?"
            )
    return context


def _trusts_somebody(context: ssl.SSLContext) -> bool:
    paths = ssl.get_default_verify_paths()
    directories = os.environ.get(paths.openssl_capath_env, paths.openssl_capath).split(os.pathsep)
    return bool(context.cert_store_stats()["x509"]) or any(
        os.listdir(directory) for directory in directories if os.path.isdir(directory)
    )


def _is_finished(tls: ssl.SSLObject) -> bool:
    """Take one step of a handshake; whether it was the last."""
    try:
        tls.do_handshake()
    except ssl.SSLWantReadError:
        return False
    except ssl.SSLCertVerificationError as error:
        kind = _KINDS_OF_CERTIFICATES.get(error.verify_code, TlsVerdictKind.UNTRUSTED)
        if kind is TlsVerdictKind.EXPIRED:
            raise _Failed(kind, "certificate expired") from error
        raise _Failed(kind, f"certificate verify failed: {error.verify_message}") from error
    except ssl.SSLZeroReturnError as error:
        raise _handshake_failed("connection closed by peer", try_again=True) from error
    except ssl.SSLError as error:
        if error.reason == "MALLOC_FAILURE":
            raise CheckFailed("out of memory") from error
        reason = _REASON.fullmatch(str(error.args[-1]))
        kind = _KINDS_OF_HANDSHAKES.get(error.reason, TlsVerdictKind.HANDSHAKE_FAILED)
        raise _handshake_failed(reason[1] if reason else str(error), kind) from error
    return True


def _connection_failure(error: OSError) -> _Failed | CheckFailed:
    if error.errno in OWN_TROUBLE or error.errno == errno.EPERM:  # this machine's own firewall
        return CheckFailed(f"could not send or receive: {error.strerror}")
    if isinstance(error, BrokenPipeError):  # the same, noticed when sending
        return _handshake_failed("Connection reset by peer", try_again=True)
    return _handshake_failed(error.strerror or str(error), try_again=True)


def _mismatch(certificate: dict[str, Any], expected: Sequence[Address | str]) -> str | None:
    """Why the certificate is not good for all that is expected of it; None if it is."""
    alternative_names = certificate.get("subjectAltName", ())
    addresses = {_address(value) for kind, value in alternative_names if kind == "IP Address"}
    names = [value.lower() for kind, value in alternative_names if kind == "DNS"]
    for subject in expected:
        if not isinstance(subject, str):
            if subject not in addresses:
                return "certificate does not match expected IP"
        elif not any(_name_matches(name, subject.lower()) for name in names):
            return f"certificate does not match {subject}"
    return None


def _address(text: str) -> Address | None:
    # Not parse_address(): to those who verify a certificate, an IPv4-mapped address in it is IPv6.
    try:
        return ipaddress.ip_address(text.strip())
    except ValueError:
        return None  # an alternative name of a wrong length


def _name_matches(pattern: str, name: str) -> bool:
    """Whether a certificate's DNS name covers ``name`` (RFC 9525 section 6.3); both lower case.

    A star stands for one whole label, the first, and not above two others, as OpenSSL has it.
    """
    if pattern.startswith("*.") and pattern.count(".") > 1:
        return name.partition(".")[1:] == (".", pattern[2:])
    return pattern == name
