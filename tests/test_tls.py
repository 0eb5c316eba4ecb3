"""TLS endpoints on sockets of this machine: what their certificates are good for."""

import asyncio
import os
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme
import uvloop

from port_checker.addresses import Address, parse_address
from port_checker.checker import Checker
from port_checker.connect import CheckFailed, OpenConnectionPacer
from port_checker.schemas import CheckTlsResponse
from port_checker.tls import TlsClient, TlsVerdict, TlsVerdictKind
from tests.support.loopback import full_backlog, refused_port, silent_port
from tests.support.namespace import in_namespace, needs_root
from tests.support.tls import (
    answering,
    endpoint,
    hang_up,
    https,
    reset,
    server_context,
    speaking_tls,
    trust,
    wait_for_close,
)
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("authority")

LOOPBACK = parse_address("127.0.0.1")
NAME = "provider.example.net"
FOREVER = datetime(3000, 1, 1, tzinfo=UTC)  # until when trustme's certificates are good

IP_MISMATCH = "certificate does not match expected IP"
NAME_MISMATCH = f"certificate does not match {NAME}"
UNKNOWN_ISSUER = "certificate verify failed: unable to get local issuer certificate"

NOW = datetime.now(UTC)
DAY = timedelta(days=1)


def judge(
    port: int,
    *expected: Address | str,
    host: str = "127.0.0.1",
    timeout: float = 30,
    run: Callable[..., TlsVerdict] = uvloop.run,
) -> TlsVerdict:
    async def attempt() -> TlsVerdict:
        target = parse_address(host)
        pacer = OpenConnectionPacer()
        return await TlsClient().attempt(target, port, expected or [target], timeout, pacer)

    return run(attempt())


def kind_of(error: str | None) -> TlsVerdictKind:
    """What callers take an error for."""
    return CheckTlsResponse(valid=not error, error=error, peer="", not_after=None).kind


def failed(reason: str, *, try_again: bool = False) -> TlsVerdict:
    error = f"TLS handshake failed: {reason}"
    return TlsVerdict(kind_of(error), error, try_again=try_again)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_a_good_certificate(authority: trustme.CA, run: Callable[..., TlsVerdict]) -> None:
    received: list[bytes] = []
    context = server_context(authority.issue_cert("127.0.0.1"))
    with endpoint(speaking_tls(context, received)) as port:
        verdict = judge(port, run=run)
    assert verdict == TlsVerdict(TlsVerdictKind.VALID, not_after=FOREVER)
    assert received == [b""]  # nothing is sent after the handshake


# Alternative names of the certificate; what it must be good for; the error.
@pytest.mark.parametrize(
    ("names", "expected", "error"),
    [
        (["127.0.0.2", "127.0.0.1"], [LOOPBACK], None),
        (["127.0.0.2"], [LOOPBACK], IP_MISMATCH),
        (["127.0.0.1"], [LOOPBACK, parse_address("127.0.0.2")], IP_MISMATCH),
        (["127.0.0.1", "127.0.0.2"], [LOOPBACK, parse_address("127.0.0.2")], None),
        ([NAME], [LOOPBACK], IP_MISMATCH),
        # To a browser, which knows IPv4 addresses of four bytes, it is another one.
        (["::ffff:127.0.0.1"], [LOOPBACK], IP_MISMATCH),
        ([NAME], [NAME], None),
        ([NAME], [NAME.upper()], None),
        (["other.example.net", "127.0.0.1"], [NAME], NAME_MISMATCH),
        (["*.example.net"], [NAME], None),
        (["*.net"], ["example.net"], "certificate does not match example.net"),
        (["*.example.net"], ["example.net"], "certificate does not match example.net"),
        (["*.example.net"], [f"a.{NAME}"], f"certificate does not match a.{NAME}"),
    ],
)
def test_what_a_certificate_is_good_for(
    authority: trustme.CA, names: list[str], expected: list[Address | str], error: str | None
) -> None:
    with https(authority.issue_cert(*names)) as port:
        verdict = judge(port, *expected)
    assert verdict == TlsVerdict(kind_of(error), error, FOREVER)


def test_a_common_name_does_not_count(authority: trustme.CA) -> None:
    certificate = authority.issue_cert("other.example.net", common_name="127.0.0.1")
    with https(certificate) as port:
        assert judge(port).error == IP_MISMATCH


def test_an_ipv6_address(authority: trustme.CA) -> None:
    with https(authority.issue_cert("::1"), "::1") as port:
        assert judge(port, host="::1").valid
    with https(authority.issue_cert("::2"), "::1") as port:
        assert judge(port, host="::1").error == IP_MISMATCH


def test_names_alone_are_told_to_the_server(authority: trustme.CA) -> None:
    told: list[str | None] = []
    context = server_context(authority.issue_cert("127.0.0.1", NAME))
    context.sni_callback = lambda _, name, __: told.append(name)
    with endpoint(speaking_tls(context)) as port:
        assert judge(port, LOOPBACK).valid
        assert judge(port, NAME).valid
    assert told == [None, NAME]


def expired(authority: trustme.CA) -> trustme.LeafCert:
    return authority.issue_cert("127.0.0.2", not_before=NOW - 9 * DAY, not_after=NOW - DAY)


def not_yet_valid(authority: trustme.CA) -> trustme.LeafCert:
    return authority.issue_cert("127.0.0.1", not_before=NOW + DAY, not_after=NOW + 9 * DAY)


def of_an_unknown_authority(_: trustme.CA) -> trustme.LeafCert:
    return expired(trustme.CA())


def of_a_staging_authority(_: trustme.CA) -> trustme.LeafCert:
    return trustme.CA().create_child_ca().issue_cert("127.0.0.1")


def self_signed(_: trustme.CA) -> trustme.CA:
    return trustme.CA()


def without_its_intermediate(authority: trustme.CA) -> trustme.LeafCert:
    complete = authority.create_child_ca().issue_cert("127.0.0.1")
    leaf = complete.cert_chain_pems[0].bytes()
    return trustme.LeafCert(complete.private_key_pem.bytes(), leaf, [])


# The certificate is bad in every way that comes later in the order, too.
@pytest.mark.parametrize(
    ("certificate", "error"),
    [
        (expired, "certificate expired"),
        (not_yet_valid, "certificate verify failed: certificate is not yet valid"),
        (of_an_unknown_authority, UNKNOWN_ISSUER),
        (of_a_staging_authority, UNKNOWN_ISSUER),
        (self_signed, "certificate verify failed: self-signed certificate"),
        (without_its_intermediate, UNKNOWN_ISSUER),
    ],
)
def test_certificates_that_do_not_verify(
    authority: trustme.CA,
    certificate: Callable[[trustme.CA], trustme.LeafCert | trustme.CA],
    error: str,
) -> None:
    with https(certificate(authority)) as port:
        assert judge(port) == TlsVerdict(kind_of(error), error)


def test_a_chain_with_its_intermediate_verifies(authority: trustme.CA) -> None:
    with https(authority.create_child_ca().issue_cert("127.0.0.1")) as port:
        assert judge(port).valid


def test_what_python_3_13_is_strict_about_is_so_on_every_python(authority: trustme.CA) -> None:
    with https(authority.issue_cert(common_name="127.0.0.1")) as port:
        verdict = judge(port)
    error = "certificate verify failed: Empty Subject Alternative Name extension"
    assert verdict == TlsVerdict(kind_of(error), error)


def test_an_intermediate_can_be_trusted_on_every_python(
    authority: trustme.CA, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    intermediate = authority.create_child_ca()
    trust(intermediate, monkeypatch, tmp_path)
    with https(intermediate.issue_cert("127.0.0.1")) as port:
        assert judge(port).valid


def test_tls_below_1_2(authority: trustme.CA) -> None:
    context = server_context(authority.issue_cert("127.0.0.1"))
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with endpoint(speaking_tls(context)) as port:
        assert judge(port) == failed("tlsv1 alert protocol version")


def test_a_chain_of_a_megabyte(authority: trustme.CA) -> None:
    leaf = authority.issue_cert("127.0.0.1")
    many = [authority.cert_pem.bytes()] * 2000
    key, chain = leaf.private_key_pem.bytes(), [pem.bytes() for pem in leaf.cert_chain_pems]
    with https(trustme.LeafCert(key, chain[0], chain[1:] + many)) as port:
        assert judge(port) == failed("excessive message size")


HELLO_REQUESTS = b"\x16\x03\x03\x40\x00" + bytes(16384)  # a record of 4,096 (RFC 5246 7.4.1.1)


@pytest.mark.parametrize(
    ("behave", "verdict"),
    [
        (answering(b"220 garbage\r\n"), failed("wrong version number")),
        (answering(b"HTTP/1.1 400 Bad Request\r\n\r\n"), failed("wrong version number")),
        (answering(b"\x15\x03\x03\0\2\2\x28"), failed("sslv3 alert handshake failure")),
        (answering(HELLO_REQUESTS * 64), failed("more than 131072 bytes received")),
        (answering(b"\x15\x03\x03\0\2\1\0"), failed("connection closed by peer", try_again=True)),
        (hang_up, failed("connection closed by peer", try_again=True)),
        (reset, failed("Connection reset by peer", try_again=True)),
    ],
    ids=["garbage", "http", "alert", "renegotiation", "close_notify", "close", "reset"],
)
def test_peers_that_do_not_shake_hands(
    behave: Callable[[socket.socket], None], verdict: TlsVerdict
) -> None:
    with endpoint(behave) as port:
        assert judge(port) == verdict


def trickle(connection: socket.socket) -> None:
    connection.sendall(b"\x16\x03\x03\x40\x00")
    while True:  # until the client closes
        connection.sendall(b"\0")
        time.sleep(0.01)


@pytest.mark.parametrize("behave", [wait_for_close, trickle])
def test_peers_that_stall(behave: Callable[[socket.socket], None]) -> None:
    with endpoint(behave) as port:
        assert judge(port, timeout=0.5) == failed("timed out", try_again=True)


@pytest.mark.parametrize(
    ("kind", "error"),
    [(refused_port, "Connection refused"), (silent_port, "Connection timed out")],
)
def test_no_connection(kind: Callable[[], object], error: str) -> None:
    with kind() as port:  # type: ignore[attr-defined]
        verdict = judge(port, timeout=0.2)
    assert verdict == TlsVerdict(kind_of(error), error, try_again=True)


def test_a_machine_that_trusts_nobody_judges_nobody(
    authority: trustme.CA, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/nonexistent")
    with https(authority.issue_cert("127.0.0.1")) as port:
        with pytest.raises(CheckFailed, match="no certificate authority is trusted"):
            judge(port)
        # Where authorities stand one by one in a directory, they are looked for at each handshake.
        monkeypatch.setenv("SSL_CERT_DIR", f"/nonexistent:{tmp_path}")
        (tmp_path / "7f1b6a64.0").touch()
        assert judge(port).error == UNKNOWN_ISSUER


@needs_root
def test_a_connection_is_gone_for_good_within_seconds() -> None:
    """By default it takes a minute and more, where the target acknowledges nothing."""
    script = """
import asyncio, socket
from ipaddress import ip_address
from port_checker.connect import OpenConnectionPacer
from port_checker.tls import TlsClient
from tests.support.waiting import wait_until

def closing():
    with open("/proc/net/tcp") as table:
        return any(line.split()[3] in ("04", "05") for line in table)  # FIN-WAIT-1, FIN-WAIT-2

with socket.create_server(("127.0.0.1", 80)):
    localhost = ip_address("127.0.0.1")
    attempt = TlsClient().attempt(localhost, 80, [localhost], 0.5, OpenConnectionPacer())
    print(asyncio.run(attempt).error, closing())
    wait_until(lambda: not closing(), seconds=40)
"""
    told = in_namespace(
        script,
        "nft add table inet t",
        "nft add chain inet t i '{ type filter hook input priority 0; }'",
        "nft add rule inet t i tcp dport 80 tcp flags fin drop",
    )
    assert told == "TLS handshake failed: timed out True\n"


def test_cancellation_leaves_nothing() -> None:
    async def run(port: int) -> None:
        client = TlsClient()
        pacer = OpenConnectionPacer()

        def used() -> int:
            return len(os.listdir("/proc/self/fd"))

        before = used()
        for delay in (0, 0.3):  # at once, and in the handshake
            task = asyncio.create_task(client.attempt(LOOPBACK, port, [LOOPBACK], 30, pacer))
            await asyncio.sleep(delay)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            # The client's thread may still be reading the trusted certificates, from a file.
            await asyncio.to_thread(wait_until, lambda: used() == before)

    with silent_port() as silent:
        asyncio.run(run(silent))
    # A listener that accepts nothing: the kernel makes the connection, and nobody speaks.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        asyncio.run(run(listener.getsockname()[1]))


def check(port: int, *expected: Address | str, waits: list[float], retries: int = 3) -> TlsVerdict:
    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    async def run() -> TlsVerdict:
        checker = Checker(retries=retries, retry_delay=7, timeout=30, max_in_flight=1, sleep=sleep)
        verdict = await checker.check_tls(LOOPBACK, port, expected or [LOOPBACK])
        assert checker.in_flight == 0
        return verdict

    return asyncio.run(run())


def in_turn(*behaviours: Callable[[socket.socket], None]) -> Callable[[socket.socket], None]:
    left = list(behaviours)
    return lambda connection: left.pop(0)(connection)


def test_a_connection_that_fails_is_tried_again(authority: trustme.CA) -> None:
    good = speaking_tls(server_context(authority.issue_cert("127.0.0.1")))
    waits: list[float] = []
    with endpoint(in_turn(reset, hang_up, good)) as port:
        assert check(port, waits=waits).valid
    assert waits == [7, 7]
    with endpoint(in_turn(reset, reset)) as port:
        verdict = check(port, waits=waits, retries=2)
    assert verdict == failed("Connection reset by peer", try_again=True)


def test_of_attempts_that_fail_the_last_that_was_answered_counts() -> None:
    with refused_port() as port:
        pass
    with ExitStack() as stack:

        async def make_silent(_: float) -> None:
            stack.enter_context(full_backlog(port=port))

        checker = Checker(retries=2, retry_delay=7, timeout=0.2, max_in_flight=1, sleep=make_silent)
        verdict = asyncio.run(checker.check_tls(LOOPBACK, port, [LOOPBACK]))
    assert verdict.error == "Connection refused"


@pytest.mark.parametrize("names", [["127.0.0.2"], ["127.0.0.1"]])
def test_what_a_certificate_says_is_final(authority: trustme.CA, names: Sequence[str]) -> None:
    speaks = speaking_tls(server_context(authority.issue_cert(*names)))
    waits: list[float] = []
    with endpoint(in_turn(speaks)) as port:
        check(port, waits=waits)
    assert waits == []
