"""One TLS handshake without a socket, step by step, and what came of it.

This is the border at which OpenSSL's errors become ours: a ``TlsVerdict`` on the peer, or
``Trouble`` on this machine. It runs in ``handshake_process``, because a peer decides how much work
a step is.
"""

import ipaddress
import os
import re
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final

# What ssl.create_default_context() sets since Python 3.13, written out so that every Python judges
# alike: before, it lacks the last two.
_VERIFY_FLAGS: Final = (
    ssl.VerifyFlags.VERIFY_X509_TRUSTED_FIRST
    | ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
    | ssl.VerifyFlags.VERIFY_X509_STRICT
)

# Key exchange over elliptic curves only: with finite fields the server chooses the group, as large
# as it likes, and browsers no longer offer them. The security level forbids RSA keys below 2048
# bits, and signatures with SHA-1.
_TLS_1_2_CIPHERS: Final = "@SECLEVEL=2:ECDHE+AESGCM:ECDHE+CHACHA20:ECDHE+AES:!aNULL:!SHA1"

# Python wraps OpenSSL's reason:
# "[SSL: WRONG_VERSION_NUMBER] wrong version number (_ssl.c:1006)"
_REASON: Final = re.compile(r"(?:\[[^]]*\] )?(.*?)(?: \(_ssl\.c:\d+\))?")

# The names by which OpenSSL finds certificates in a directory (openssl-rehash(1)).
_HASHED_NAME: Final = re.compile(r"[0-9a-f]{8}\.\d+")


class TlsVerdictKind(StrEnum):
    """How an attempt to check a TLS endpoint ended."""

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
        """The kind that it is counted as: kinds that only advice tells apart count as one."""
        match self:
            case TlsVerdictKind.NOT_YET_VALID | TlsVerdictKind.UNKNOWN_AUTHORITY:
                return TlsVerdictKind.UNTRUSTED
            case TlsVerdictKind.NOT_TLS | TlsVerdictKind.TOO_OLD:
                return TlsVerdictKind.HANDSHAKE_FAILED
        return self


# By OpenSSL's code for why a certificate was not verified (X509_V_ERR_*, openssl/x509_vfy.h).
_KINDS_OF_CERTIFICATES: Final = {
    9: TlsVerdictKind.NOT_YET_VALID,
    10: TlsVerdictKind.EXPIRED,
    18: TlsVerdictKind.UNKNOWN_AUTHORITY,  # self-signed
    19: TlsVerdictKind.UNKNOWN_AUTHORITY,  # self-signed, in its chain
    20: TlsVerdictKind.UNKNOWN_AUTHORITY,  # no issuer
}

# By OpenSSL's reasons (SSL_R_*, openssl/sslerr.h).
_KINDS_OF_HANDSHAKES: Final = {
    "WRONG_VERSION_NUMBER": TlsVerdictKind.NOT_TLS,
    "TLSV1_ALERT_PROTOCOL_VERSION": TlsVerdictKind.TOO_OLD,
    "UNSUPPORTED_PROTOCOL": TlsVerdictKind.TOO_OLD,
}


@dataclass(frozen=True, slots=True)
class TlsVerdict:
    """What an attempt found out about a TLS endpoint.

    Attributes:
        kind: How it ended.
        error: Why the endpoint is not valid; None if it is.
        not_after: Until when the certificate is good; None unless its chain was verified.
        try_again: Whether the connection failed, so that another attempt may end differently.
    """

    kind: TlsVerdictKind
    error: str | None = None
    not_after: datetime | None = None
    try_again: bool = False

    @property
    def valid(self) -> bool:
        """Whether the handshake succeeded and the certificate is good for what was expected."""
        return self.kind is TlsVerdictKind.VALID


def handshake_failed(
    reason: str,
    kind: TlsVerdictKind = TlsVerdictKind.HANDSHAKE_FAILED,
    *,
    try_again: bool = False,
) -> TlsVerdict:
    """Return the verdict on a handshake that failed."""
    return TlsVerdict(kind, f"TLS handshake failed: {reason}", try_again=try_again)


class Trouble(Exception):
    """This machine cannot make a handshake; the message says why."""


# What is trusted


def make_context() -> ssl.SSLContext:
    """Return a context that trusts OpenSSL's default store, or SSL_CERT_FILE and SSL_CERT_DIR.

    Raises:
        Trouble: They cannot be read, or no certificate could be verified with them.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # OpenSSL would look at the names before the dates, and say nothing of the dates if they differ.
    context.check_hostname = False
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_flags = _VERIFY_FLAGS
    context.set_ciphers(_TLS_1_2_CIPHERS)
    context.options |= ssl.OP_NO_RENEGOTIATION
    try:
        context.load_default_certs()
        _require_authority(context)
    except OSError as error:
        raise Trouble(f"cannot read the trusted certificates: {error.strerror}") from error
    return context


def trust_trouble() -> str | None:
    """Return why this machine cannot verify any certificate; None if it can."""
    try:
        make_context()
    except Trouble as trouble:
        return str(trouble)
    return None


def _require_authority(context: ssl.SSLContext) -> None:
    paths = ssl.get_default_verify_paths()
    folders = os.environ.get(paths.openssl_capath_env, paths.openssl_capath).split(os.pathsep)
    files = [
        os.path.join(folder, name)
        for folder in folders
        if os.path.isdir(folder)
        for name in os.listdir(folder)
    ]
    hashed = [file for file in files if _HASHED_NAME.fullmatch(os.path.basename(file))]
    loaded = context.cert_store_stats()["x509"]
    if _trusts_somebody_now(context) or any(map(_holds_authority, hashed)):
        return
    if not loaded and not files:
        raise Trouble(
            "no certificate authority is trusted on this machine: "
            "is the package ca-certificates missing, or SSL_CERT_FILE wrong?"
        )
    if not loaded and not hashed:
        raise Trouble(
            "no certificate authority can be found in SSL_CERT_DIR: "
            "its files need the names that openssl rehash gives them"
        )
    raise Trouble(
        "no certificate authority that is trusted on this machine can be read and is in date: "
        "is its clock wrong, or what SSL_CERT_FILE and SSL_CERT_DIR name?"
    )


def _trusts_somebody_now(context: ssl.SSLContext) -> bool:
    authorities: Sequence[Any] = context.get_ca_certs()
    if len(authorities) < context.cert_store_stats()["x509"]:
        return True  # a certificate that is trusted itself, without being an authority's
    now = time.time()
    return any(
        ssl.cert_time_to_seconds(authority["notBefore"])
        <= now
        <= ssl.cert_time_to_seconds(authority["notAfter"])
        for authority in authorities
    )


def _holds_authority(file: str) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(file)
    except OSError:  # SSLError is one: there is no certificate in it
        return False
    return _trusts_somebody_now(context)


# One handshake


class Handshake:
    """A client's TLS handshake, step by step.

    Args:
        context: Of ``make_context``.
        name: A DNS name that the certificate must be good for; it is sent to the server (SNI).
        addresses: IP addresses that must be among the certificate's alternative names.
    """

    def __init__(self, context: ssl.SSLContext, name: str | None, addresses: Sequence[str]) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=name)
        self._name = name
        self._addresses = addresses

    def step(self, received: bytes) -> tuple[TlsVerdict | None, bytes]:
        """Take what was received; return the verdict, if there is one now, and what to send.

        Raises:
            Trouble: Out of memory.
        """
        self._incoming.write(received)
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return None, self._outgoing.read()
        except ssl.SSLError as error:
            return _failure(error), b""
        return self._judge(), self._outgoing.read()

    def _judge(self) -> TlsVerdict:
        try:
            certificate: Mapping[str, Any] = self._tls.getpeercert() or {}
            seconds = ssl.cert_time_to_seconds(certificate["notAfter"])
        except (ValueError, ssl.SSLError):  # a name that is not UTF-8: UnicodeDecodeError
            return TlsVerdict(
                TlsVerdictKind.UNTRUSTED,
                "certificate verify failed: it holds a name that is not text",
            )
        mismatch = self._mismatch(certificate.get("subjectAltName", ()))
        kind = TlsVerdictKind.MISMATCH if mismatch else TlsVerdictKind.VALID
        return TlsVerdict(kind, mismatch, datetime.fromtimestamp(seconds, tz=UTC))

    def _mismatch(self, alternative_names: Sequence[tuple[str, str]]) -> str | None:
        """Return why the certificate is not good for all that is expected; None if it is."""
        addresses = {_packed(value) for kind, value in alternative_names if kind == "IP Address"}
        if any(_packed(address) not in addresses for address in self._addresses):
            return "certificate does not match expected IP"
        names = [value.lower() for kind, value in alternative_names if kind == "DNS"]
        name = self._name
        if name and not any(_name_matches(pattern, name.lower()) for pattern in names):
            return f"certificate does not match {name}"
        return None


def _failure(error: ssl.SSLError) -> TlsVerdict:
    if isinstance(error, ssl.SSLCertVerificationError):
        kind = _KINDS_OF_CERTIFICATES.get(error.verify_code, TlsVerdictKind.UNTRUSTED)
        if kind is TlsVerdictKind.EXPIRED:
            return TlsVerdict(kind, "certificate expired")
        return TlsVerdict(kind, f"certificate verify failed: {error.verify_message}")
    if isinstance(error, ssl.SSLZeroReturnError):
        return handshake_failed("connection closed by peer", try_again=True)
    if error.reason == "MALLOC_FAILURE":
        raise Trouble("out of memory") from error
    reason = _REASON.fullmatch(str(error.args[-1]))
    kind = _KINDS_OF_HANDSHAKES.get(error.reason, TlsVerdictKind.HANDSHAKE_FAILED)
    return handshake_failed(reason[1] if reason else str(error), kind)


def _packed(address: str) -> bytes | None:
    # Not parse_address(): in a certificate, an IPv4-mapped address is an IPv6 address.
    try:
        return ipaddress.ip_address(address.strip()).packed
    except ValueError:
        return None  # an alternative name of a wrong length


def _name_matches(pattern: str, name: str) -> bool:
    """Whether a certificate's DNS name covers ``name`` (RFC 9525 section 6.3); both lower case.

    An asterisk stands for exactly one label, the first of at least three, as in OpenSSL.
    """
    if pattern.startswith("*.") and pattern.count(".") > 1:
        return name.partition(".")[1:] == (".", pattern[2:])
    return pattern == name
