"""TLS endpoints on sockets of this machine: what their certificates are good for."""

import asyncio
import gc
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trustme
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from port_checker import handshake_process
from port_checker.addresses import Address, parse_address
from port_checker.checker import Checker
from port_checker.connect import HELD_UP, CheckFailed, OpenConnectionPacer
from port_checker.handshake_process import decode, encode
from port_checker.tls import TlsClient, TlsVerdict, TlsVerdictKind, _Messages
from port_checker.verdicts import tls_kind
from tests.support.hostile_tls import (
    showing_in_tls_1_2,
    showing_in_tls_1_3,
    slow_certificate,
)
from tests.support.loopback import (
    full_backlog,
    is_closing,
    open_listener,
    refused_port,
    silent_port,
    unread_by_peer,
)
from tests.support.namespace import ROOT, loopback_alone, needs_root, needs_setpriv
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

LOOPBACK = parse_address("127.0.0.1")
NAME = "provider.example.net"
FOREVER = datetime(3000, 1, 1, tzinfo=UTC)  # until when trustme's certificates are good

IP_MISMATCH = "certificate does not match expected IP"
NAME_MISMATCH = f"certificate does not match {NAME}"
UNKNOWN_ISSUER = "certificate verify failed: unable to get local issuer certificate"

Judge = Callable[..., TlsVerdict]

NOW = datetime.now(UTC)
DAY = timedelta(days=1)


async def attempt(
    client: TlsClient,
    port: int,
    *expected: Address | str,
    host: str = "127.0.0.1",
    timeout: float = 30,
) -> TlsVerdict:
    target = parse_address(host)
    return await client.attempt(target, port, expected or [target], timeout, OpenConnectionPacer())


def judge_alone(
    *words: Any, run: Callable[..., TlsVerdict] = uvloop.run, **options: Any
) -> TlsVerdict:
    """Judge an endpoint with a handshake process of its own."""
    return run(attempt(TlsClient(), *words, **options))


@pytest.fixture(scope="module")
def judge(authority: trustme.CA) -> Iterator[Judge]:  # noqa: ARG001  # it trusts that one
    """Judge endpoints with one handshake process: it takes 0.1 s of CPU to start (measured)."""
    client = TlsClient()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        yield lambda *words, **options: runner.run(attempt(client, *words, **options))


def kind_of(error: str | None) -> TlsVerdictKind:
    """What callers take an error for."""
    return tls_kind(not error, error)


def failed(reason: str, *, try_again: bool = False) -> TlsVerdict:
    error = f"TLS handshake failed: {reason}"
    return TlsVerdict(kind_of(error), error, try_again=try_again)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_certificates_are_judged_in_one_event_loop_after_another(
    authority: trustme.CA, run: Callable[..., TlsVerdict]
) -> None:
    client = TlsClient()
    with https(authority.issue_cert("127.0.0.1")) as port:
        for _ in range(2):
            assert run(attempt(client, port)).kind is TlsVerdictKind.VALID


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_a_good_certificate(authority: trustme.CA, run: Callable[..., TlsVerdict]) -> None:
    received: list[bytes] = []
    context = server_context(authority.issue_cert("127.0.0.1"))
    with endpoint(speaking_tls(context, received)) as port:
        verdict = judge_alone(port, run=run)
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
    judge: Judge,
    authority: trustme.CA,
    names: list[str],
    expected: list[Address | str],
    error: str | None,
) -> None:
    with https(authority.issue_cert(*names)) as port:
        verdict = judge(port, *expected)
    assert verdict == TlsVerdict(kind_of(error), error, FOREVER)


def test_a_common_name_does_not_count(judge: Judge, authority: trustme.CA) -> None:
    certificate = authority.issue_cert("other.example.net", common_name="127.0.0.1")
    with https(certificate) as port:
        assert judge(port).error == IP_MISMATCH


def test_an_ipv6_address(judge: Judge, authority: trustme.CA) -> None:
    with https(authority.issue_cert("::1"), "::1") as port:
        assert judge(port, host="::1").valid
    with https(authority.issue_cert("::2"), "::1") as port:
        assert judge(port, host="::1").error == IP_MISMATCH


def test_names_alone_are_told_to_the_server(judge: Judge, authority: trustme.CA) -> None:
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
    judge: Judge,
    authority: trustme.CA,
    certificate: Callable[[trustme.CA], trustme.LeafCert | trustme.CA],
    error: str,
) -> None:
    with https(certificate(authority)) as port:
        assert judge(port) == TlsVerdict(kind_of(error), error)


def test_a_chain_with_its_intermediate_verifies(judge: Judge, authority: trustme.CA) -> None:
    with https(authority.create_child_ca().issue_cert("127.0.0.1")) as port:
        assert judge(port).valid


def test_what_python_3_13_is_strict_about_is_so_on_every_python(
    judge: Judge, authority: trustme.CA
) -> None:
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
        assert judge_alone(port).valid


def test_tls_below_1_2(judge: Judge, authority: trustme.CA) -> None:
    context = server_context(authority.issue_cert("127.0.0.1"))
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with endpoint(speaking_tls(context)) as port:
        assert judge(port) == failed("tlsv1 alert protocol version")


def test_a_chain_of_a_megabyte(judge: Judge, authority: trustme.CA) -> None:
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
    judge: Judge, behave: Callable[[socket.socket], None], verdict: TlsVerdict
) -> None:
    with endpoint(behave) as port:
        assert judge(port) == verdict


def trickle(connection: socket.socket) -> None:
    connection.sendall(b"\x16\x03\x03\x40\x00")
    while True:  # until the client closes
        connection.sendall(b"\0")
        time.sleep(0.01)


@pytest.mark.parametrize("behave", [wait_for_close, trickle])
def test_peers_that_stall(judge: Judge, behave: Callable[[socket.socket], None]) -> None:
    with endpoint(behave) as port:
        assert judge(port, timeout=2) == failed("timed out", try_again=True)


@pytest.mark.parametrize(
    ("kind", "error"),
    [(refused_port, "Connection refused"), (silent_port, "Connection timed out")],
)
def test_no_connection(judge: Judge, kind: Callable[[], object], error: str) -> None:
    with kind() as port:  # type: ignore[attr-defined]
        verdict = judge(port, timeout=2)
    assert verdict == TlsVerdict(kind_of(error), error, try_again=True)


def expired_authority() -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "expired")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 7, NOW - 9 * DAY, NOW - DAY)
    basics = x509.BasicConstraints(ca=True, path_length=None)
    certificate = builder.add_extension(basics, critical=True).sign(key, hashes.SHA256())
    return certificate.public_bytes(Encoding.PEM)


# What the file of authorities holds; what else there is, in a directory of them, by name; why
# nothing can be verified with that.
@pytest.mark.parametrize(
    ("file", "directory", "trouble"),
    [
        (b"", {}, "no certificate authority is trusted"),
        (b"", {"authority.pem": trustme.CA().cert_pem.bytes()}, "openssl rehash"),
        (b"", {"7f1b6a64.0": b""}, "is in date"),
        (expired_authority(), {}, "is in date"),
    ],
    ids=["nothing", "not hashed", "not readable", "expired"],
)
def test_a_machine_that_can_verify_nothing_judges_nobody(
    authority: trustme.CA,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    file: bytes,
    directory: dict[str, bytes],
    trouble: str,
) -> None:
    (tmp_path / "file").write_bytes(file)
    (tmp_path / "directory").mkdir()
    for name, content in directory.items():
        (tmp_path / "directory" / name).write_bytes(content)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "file"))
    monkeypatch.setenv("SSL_CERT_DIR", f"/nonexistent:{tmp_path / 'directory'}")
    with (
        https(authority.issue_cert("127.0.0.1")) as port,
        pytest.raises(CheckFailed, match=trouble),
    ):
        judge_alone(port)


def test_authorities_in_a_directory_are_enough(
    authority: trustme.CA, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "7f1b6a64.0"))
    monkeypatch.setenv("SSL_CERT_FILE", "/nonexistent")
    monkeypatch.setenv("SSL_CERT_DIR", f"/nonexistent:{tmp_path}")
    with https(authority.issue_cert("127.0.0.1")) as port:
        assert judge_alone(port).error == UNKNOWN_ISSUER


def with_a_name_that_is_not_text(authority: trustme.CA) -> trustme.LeafCert:
    issuer = x509.load_pem_x509_certificate(authority.cert_pem.bytes())
    issuer_key = load_pem_private_key(authority.private_key_pem.bytes(), None)
    assert isinstance(issuer_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    names = b"\x30\x0a\x82\x02\xff\xfe\x87\x04\x7f\0\0\1"  # a DNS name, and 127.0.0.1
    identifiers = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    authority_key = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "not text")])
    certificate = (
        x509.CertificateBuilder(issuer.subject, name, key.public_key(), 7, NOW - DAY, NOW + DAY)
        .add_extension(
            x509.UnrecognizedExtension(x509.SubjectAlternativeName.oid, names), critical=False
        )
        .add_extension(authority_key(identifiers.value), critical=False)
        .sign(issuer_key, hashes.SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return trustme.LeafCert(private, certificate.public_bytes(Encoding.PEM), [])


def test_a_name_that_is_not_text(judge: Judge, authority: trustme.CA) -> None:
    with https(with_a_name_that_is_not_text(authority)) as port:
        verdict = judge(port)
    error = "certificate verify failed: it holds a name that is not text"
    assert verdict == TlsVerdict(TlsVerdictKind.UNTRUSTED, error)


# The process that makes handshakes


TOO_LONG = failed("its certificates take too long to read")


def test_a_few_certificates_that_take_too_long_to_read(judge: Judge) -> None:
    with endpoint(showing_in_tls_1_2([slow_certificate(serial) for serial in range(1, 5)])) as port:
        assert judge(port) == TOO_LONG


@pytest.mark.parametrize("showing", [showing_in_tls_1_2, showing_in_tls_1_3])
def test_one_certificate_that_takes_long_is_read(
    judge: Judge, showing: Callable[[Sequence[bytes]], Callable[[socket.socket], None]]
) -> None:
    with endpoint(showing([slow_certificate(1)])) as port:
        error = "certificate verify failed: self-signed certificate"
        assert judge(port) == TlsVerdict(kind_of(error), error)


def test_nobody_waits_for_another_ones_certificates(authority: trustme.CA) -> None:
    hostile = showing_in_tls_1_3([slow_certificate(serial) for serial in range(1, 261)])

    async def run(hostile: int, good: int) -> list[bool | TlsVerdict]:
        client = TlsClient()
        order: list[bool | TlsVerdict] = []

        async def note(port: int) -> None:
            verdict = await attempt(client, port, timeout=300)
            order.append(verdict.valid or verdict)

        async with asyncio.TaskGroup() as group:
            for _ in range(2):
                group.create_task(note(hostile))
            for _ in range(3):
                await note(good)
        return order

    with endpoint(hostile) as slow, https(authority.issue_cert("127.0.0.1")) as good:
        assert asyncio.run(run(slow, good)) == [True] * 3 + [TOO_LONG] * 2


def test_a_handshake_has_a_few_hundred_records(judge: Judge) -> None:
    """A peer may part its messages into records of one byte, each of which is looked at."""

    def behave(connection: socket.socket) -> None:
        connection.recv(1000)
        for _ in range(2000):
            connection.sendall(record(b"\0"))
        wait_for_close(connection)

    started = time.monotonic()
    with endpoint(behave) as port:
        assert judge(port, timeout=100) == failed("more than 500 records received")
    assert time.monotonic() - started < 50, "it waited for more all the same"


def test_records_that_come_one_by_one_are_not_a_step_each() -> None:
    """A peer may part its messages into records of one byte; each step would cost a fork."""
    others = set(handshake_processes())
    switches: list[int] = []
    sent = 0

    def behave(connection: socket.socket) -> None:
        nonlocal sent
        connection.recv(1000)
        while not (processes := set(handshake_processes()) - others):  # the kernel may miss one
            time.sleep(0.01)
        for _ in range(300):
            connection.sendall(record(b"\0"))
            sent += 1
            time.sleep(0.002)
        switches.extend(map(times_that_it_waited, processes))

    with endpoint(behave) as port:
        verdict = judge_alone(port, timeout=100)
    assert (verdict, sent) == (failed("connection closed by peer", try_again=True), 300)
    (count,) = switches
    assert count < 150  # about three for each step: 33 (measured), and 240 without pauses


def times_that_it_waited(process: int) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    (switches,) = re.findall(r"^voluntary_ctxt_switches:\s+(\d+)", status, re.MULTILINE)
    return int(switches)


def handshake_processes() -> list[int]:
    """The children of this process that make handshakes."""
    found = []
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        with suppress(OSError):  # it may end at any moment
            if "port_checker" in Path(f"/proc/{child}/cmdline").read_text():
                found.append(int(child))
    return found


def after_signal(
    number: signal.Signals, behave: Callable[[socket.socket], None]
) -> Callable[[socket.socket], None]:
    """Send a signal to the process of the client that has just said its first words."""
    others = set(handshake_processes())

    def behave_afterwards(connection: socket.socket) -> None:
        connection.recv(1, socket.MSG_PEEK)
        for process in set(handshake_processes()) - others:
            os.kill(process, number)
        behave(connection)

    return behave_afterwards


def test_handshakes_give_precedence_to_everything_else() -> None:
    """To the service, that is, which may have one processor only."""

    def is_slow() -> bool:
        with suppress(OSError):  # it may end at any moment
            for process in handshake_processes():
                children = Path(f"/proc/{process}/task/{process}/children").read_text()
                for fork in map(int, children.split()):
                    if os.getpriority(os.PRIO_PROCESS, fork) == 10:
                        return True
        return False

    async def run(port: int) -> None:
        task = asyncio.create_task(attempt(TlsClient(), port))
        await asyncio.to_thread(wait_until, is_slow, "a slow fork")
        assert await task == TOO_LONG

    certificates = [slow_certificate(serial) for serial in range(1, 261)]
    with endpoint(showing_in_tls_1_2(certificates)) as port:
        asyncio.run(run(port))


def test_a_handshake_whose_process_is_killed_is_made_again(authority: trustme.CA) -> None:
    good = speaking_tls(server_context(authority.issue_cert("127.0.0.1")))
    killed = after_signal(signal.SIGKILL, good)
    waits: list[float] = []
    with endpoint(in_turn(killed, good)) as port:
        assert check(port, waits=waits, retries=1).valid
    assert waits == []
    with endpoint(killed) as port, pytest.raises(CheckFailed, match="killed twice"):
        check(port, waits=waits, retries=1)


def test_the_process_ends_when_there_is_nothing_to_do(authority: trustme.CA) -> None:
    async def run(port: int) -> None:
        client = TlsClient(idle=0)
        for _ in range(2):
            assert (await attempt(client, port)).valid
            await asyncio.to_thread(wait_until, lambda: others.issuperset(handshake_processes()))

    others = set(handshake_processes())  # of services that ran in this process
    with https(authority.issue_cert("127.0.0.1")) as port:
        asyncio.run(run(port))


def test_a_process_that_is_stopped_is_the_checkers_failure(authority: trustme.CA) -> None:
    good = speaking_tls(server_context(authority.issue_cert("127.0.0.1")))
    with (
        endpoint(after_signal(signal.SIGSTOP, good)) as port,
        pytest.raises(CheckFailed, match="too busy for a TLS handshake"),
    ):
        judge_alone(port, timeout=2)


@pytest.mark.parametrize("delay", [0, 0.001, 0.003, 0.01])
def test_silence_proves_nothing_when_the_event_loop_was_held_up(
    authority: trustme.CA, delay: float
) -> None:
    async def run(port: int) -> str | None:
        client = TlsClient()
        assert (await attempt(client, port)).valid
        asyncio.get_running_loop().call_later(delay, time.sleep, 2)
        try:
            return (await attempt(client, port, timeout=0.5)).error
        except CheckFailed as error:
            return str(error)

    with https(authority.issue_cert("127.0.0.1")) as port:
        assert asyncio.run(run(port)) in (None, "too busy for a TLS handshake", HELD_UP)


ATTEMPT_WITH_FEW_DESCRIPTORS = """
import asyncio, resource, sys
from ipaddress import ip_address
from port_checker.connect import CheckFailed, OpenConnectionPacer
from port_checker.tls import TlsClient

async def attempt(client):
    localhost = ip_address("127.0.0.1")
    pacer = OpenConnectionPacer()
    return await client.attempt(localhost, int(sys.argv[1]), [localhost], 30, pacer)

async def run(limit):
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, 64))
    try:
        print((await attempt(TlsClient())).valid)
    except CheckFailed as error:
        print(error)

for limit in map(int, sys.argv[2:]):
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    with asyncio.Runner() as runner:
        runner.get_loop()
        runner.run(run(limit))
"""


def attempts_elsewhere(port: int, descriptors: Sequence[int], *command: str) -> list[str]:
    """What attempts come to in a program that may have so many descriptors."""
    done = subprocess.run(
        [
            *(*command, sys.executable, "-c", ATTEMPT_WITH_FEW_DESCRIPTORS, str(port)),
            *map(str, descriptors),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout.splitlines()


def test_descriptors_that_cannot_be_had_are_the_checkers_failure(authority: trustme.CA) -> None:
    with https(authority.issue_cert("127.0.0.1")) as port:
        outcomes = attempts_elsewhere(port, range(6, 24))
    assert outcomes[0].endswith("Too many open files")
    assert outcomes[-1] == "True"
    told = [outcome for outcome in outcomes if outcome != "True"]
    assert any("cannot start the process that makes TLS handshakes" in outcome for outcome in told)


@needs_root
@needs_setpriv
@pytest.mark.parametrize(
    ("processes", "outcome"),
    [
        (1, "cannot start the process that makes TLS handshakes: Resource temporarily unavailable"),
        (2, "cannot start a process: Resource temporarily unavailable"),
        (3, "True"),
    ],
)
def test_processes_that_cannot_be_had_are_the_checkers_failure(
    authority: trustme.CA, processes: int, outcome: str
) -> None:
    # A user without any other process, who may read this folder.
    user = str(50_000 + os.getpid() % 10_000)
    capabilities = "-all,+dac_override,+dac_read_search"
    command = ["setpriv", "--reuid", user, "--inh-caps", capabilities, "--ambient-caps"]
    with https(authority.issue_cert("127.0.0.1")) as port:
        assert attempts_elsewhere(
            port, [64], *command, capabilities, "prlimit", f"--nproc={processes}"
        ) == [outcome]


@needs_root
def test_a_connection_is_gone_for_good_within_seconds() -> None:
    """By default it takes a minute and more, where the target acknowledges nothing."""
    drop = (
        "nft add table inet t",
        "nft add chain inet t i '{ type filter hook input priority 0; }'",
        "nft add rule inet t i tcp dport 80 tcp flags fin drop",
    )
    with loopback_alone(*drop), open_listener(port=80):
        assert judge_alone(80, timeout=0.5) == failed("timed out", try_again=True)
        assert is_closing()
        wait_until(lambda: not is_closing(), seconds=40)


def test_cancellation_leaves_nothing(authority: trustme.CA) -> None:
    async def run(port: int, good: int) -> None:
        client = TlsClient()
        pacer = OpenConnectionPacer()

        def used() -> int:
            return len(os.listdir("/proc/self/fd"))

        before = used()
        await client.attempt(LOOPBACK, good, [LOOPBACK], 30, pacer)
        before += 2  # the epoll of all attempts, and the way to the process for handshakes
        for delay in (0, 0.3):  # at once, and in the handshake
            task = asyncio.create_task(client.attempt(LOOPBACK, port, [LOOPBACK], 30, pacer))
            await asyncio.sleep(delay)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            # The endpoint's side of the good one may still be open.
            await asyncio.to_thread(wait_until, lambda: used() <= before)

    gc.collect()  # what other tests have left, and would be counted
    others = set(handshake_processes())  # of services that ran in this process
    # A listener that accepts nothing: the kernel makes the connection, and nobody speaks.
    with (
        https(authority.issue_cert("127.0.0.1")) as good,
        silent_port() as silent,
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        asyncio.run(run(silent, good))
        asyncio.run(run(listener.getsockname()[1], good))
    gc.collect()  # the clients, whose loops are closed
    wait_until(lambda: others.issuperset(handshake_processes()), "the processes to end")


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

        checker = Checker(retries=2, retry_delay=7, timeout=2, max_in_flight=1, sleep=make_silent)
        verdict = asyncio.run(checker.check_tls(LOOPBACK, port, [LOOPBACK]))
    assert verdict.error == "Connection refused"


@pytest.mark.parametrize("names", [["127.0.0.2"], ["127.0.0.1"]])
def test_what_a_certificate_says_is_final(authority: trustme.CA, names: Sequence[str]) -> None:
    speaks = speaking_tls(server_context(authority.issue_cert(*names)))
    waits: list[float] = []
    with endpoint(in_turn(speaks)) as port:
        check(port, waits=waits)
    assert waits == []


# What peers have sent that is no whole message


def whole(*records: bytes) -> tuple[int, int]:
    """How many of the bytes that arrive record by record a step is taken with, and what is missing.

    The last one may be the beginning of a record.
    """
    messages, data = _Messages(), bytearray()
    for record in records:
        data += record
        size = messages.whole(data)
    return size, 0 if size else messages.missing(data)


def record(content: bytes, kind: int = 22) -> bytes:
    return bytes([kind, 3, 3]) + len(content).to_bytes(2) + content


HELLO = b"\2\0\0\3abc"
CHAIN = b"\x0b\0\x90\0" + bytes(0x9000)


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([b""], (0, 5)),
        ([b"\x16\3\3"], (0, 2)),
        ([record(HELLO)[:-1]], (0, 1)),
        ([record(HELLO)], (12, 0)),
        ([record(HELLO), record(HELLO)[:7]], (12, 0)),
        ([record(HELLO + b"\x0b")], (0, 5)),
        ([record(HELLO + CHAIN[:3])], (0, 5)),
        ([record(HELLO + CHAIN[:3]), record(CHAIN[3:4])], (0, 0x9000 + 15)),
        ([record(HELLO + CHAIN[:0x4000])], (0, 0x5004 + 10)),
        ([record(HELLO), record(CHAIN[:0x4000])], (12, 0)),
        ([record(CHAIN[:0x4000]), record(CHAIN[0x4000:0x8000])[:-7]], (0, 7 + 0x1004 + 5)),
        (
            [record(CHAIN[:0x4000]), record(CHAIN[0x4000:0x8000]), record(CHAIN[0x8000:])],
            (36883, 0),
        ),
        ([record(b"\0\0\0\0" * 5)], (25, 0)),
        ([record(b"")], (5, 0)),
        ([record(CHAIN[:9]), record(b"\2\x28", 21)], (21, 0)),  # an alert in the middle
        ([record(b"\1", 20), record(b"\x14\0\0")], (14, 0)),  # encrypted from there on
        ([record(b"\x0b\1\x90\1")], (9, 0)),  # longer than OpenSSL takes
        ([b"HTTP/"], (5, 0)),
    ],
)
def test_a_step_is_taken_with_whole_messages(
    records: list[bytes], expected: tuple[int, int]
) -> None:
    assert whole(*records) == expected


def test_a_step_is_taken_when_the_next_message_has_begun(judge: Judge) -> None:
    """It is no silence of the peer's."""
    first = record(bytes(4096)) * 3 + record(bytes(4332))  # all that is received at once

    def behave(connection: socket.socket) -> None:
        connection.recv(1000)
        connection.sendall(first + record(b"\0") * 2)  # of four
        wait_until(lambda: unread_by_peer(connection) == 0)
        connection.sendall(record(b"\0") * 2)

    with endpoint(behave) as port:
        assert judge(port) == failed("connection closed by peer", try_again=True)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_chain_that_is_almost_too_long(
    judge: Judge, authority: trustme.CA, version: ssl.TLSVersion
) -> None:
    leaf = authority.issue_cert("127.0.0.1")
    certificate = authority.cert_pem.bytes()
    size = len(ssl.PEM_cert_to_DER_cert(certificate.decode()))
    many = [certificate] * (95 * 1024 // size)
    key, chain = leaf.private_key_pem.bytes(), [pem.bytes() for pem in leaf.cert_chain_pems]
    context = server_context(trustme.LeafCert(key, chain[0], chain[1:] + many))
    context.maximum_version = version
    with endpoint(speaking_tls(context)) as port:
        assert judge(port).valid


def test_of_peers_that_stall_in_a_message_those_make_way_that_began_first() -> None:
    """A message in small records is read as it arrives, since nobody knows how many there are."""
    sent = threading.Semaphore(0)

    def behave(connection: socket.socket) -> None:
        connection.recv(1000)
        for start in range(0, len(CHAIN) - 1, 1024):
            connection.sendall(record(CHAIN[start : start + 1024][: len(CHAIN) - 1 - start]))
        sent.release()
        wait_for_close(connection)

    async def run(port: int) -> tuple[list[object], list[bool]]:
        client, pacer = TlsClient(most_held=len(CHAIN) * 5 // 2), OpenConnectionPacer()
        attempts = []
        for _ in range(4):
            attempt = client.attempt(LOOPBACK, port, [LOOPBACK], 60, pacer)
            attempts.append(asyncio.create_task(attempt))
            assert await asyncio.to_thread(sent.acquire, timeout=60)
        ended = await asyncio.gather(*attempts[:2], return_exceptions=True)
        go_on = [attempt.cancel() for attempt in attempts[2:]]
        await asyncio.wait(attempts)
        return list(ended), go_on

    with endpoint(behave) as port:
        ended, go_on = uvloop.run(run(port))
    assert [str(error) for error in ended] == ["too busy for a TLS handshake"] * 2
    assert go_on == [True, True]


@pytest.mark.parametrize("limits", [{"most_kept": 2}, {"most_held": 500}])
def test_the_process_keeps_a_bounded_number_of_handshakes_and_bytes(
    limits: Mapping[str, int],
) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, ours:
        process = handshake_process._Process(theirs, **limits)

        def say(number: int, word: str, data: bytes = b"") -> None:
            head = {"number": number, "do": word, "caller": "", "name": None, "addresses": []}
            ours.send(encode(head, data))
            process._read_message()

        for number in 1, 2, 3:
            say(number, "begin")
            assert decode(ours.recv(10_000))[0]["trouble"] is None
            say(number, "keep", bytes(200))
        assert decode(ours.recv(10_000))[0] == {
            "number": 1,
            "verdict": None,
            "trouble": "too busy for a TLS handshake",
        }
        assert sorted(process._kept) == [2, 3]
        process.close()
        assert process._held == 0


@contextmanager
def handshake_process_alone() -> Iterator[tuple[socket.socket, int]]:
    """The service's end of the socket to a process that makes handshakes, and the process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    program = f"from port_checker.handshake_process import main; main({theirs.fileno()})"
    with ours:
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", program], pass_fds=[theirs.fileno()], process_group=0
            )
        try:
            ours.settimeout(60)
            assert decode(ours.recv(10_000)) == ({"number": 0}, b"")
            yield ours, process.pid
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.parametrize("caller_leaves", [True, False])
def test_a_fork_that_is_killed_before_it_has_read_all_ends_no_other_handshake(
    authority: trustme.CA, caller_leaves: bool
) -> None:
    """Whoever has both ends of a check can leave in the moment in which its own peer answers."""
    context = server_context(authority.issue_cert("127.0.0.1"))
    context.set_ecdh_curve("prime256v1")  # for which the client has to say hello again
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    peer = context.wrap_bio(incoming, outgoing, server_side=True)

    with handshake_process_alone() as (control, process):
        children = Path(f"/proc/{process}/task/{process}/children")

        def say(number: int, word: str, data: bytes = b"") -> None:
            head = {"number": number, "do": word, "caller": "", "name": None, "addresses": []}
            control.send(encode(head, data))

        def answer() -> bytes:
            return decode(control.recv(10_000))[1]

        say(1, "begin")
        incoming.write(answer())
        with suppress(ssl.SSLWantReadError):
            peer.do_handshake()
        say(1, "step", outgoing.read())
        assert answer(), "no second hello"
        fork = int(children.read_text())
        os.kill(fork, signal.SIGSTOP)
        state = Path(f"/proc/{fork}/status")
        wait_until(lambda: "(stopped)" in state.read_text(), "the fork's stop")
        say(1, "step", bytes(5))
        if caller_leaves:
            say(1, "end")
        else:
            say(2, "begin")
            assert answer(), "not begun"  # after the step was passed on
            os.kill(fork, signal.SIGKILL)  # as the kernel does when memory runs out
            say(1, "keep")
            trouble = decode(control.recv(10_000))[0]["trouble"]
            assert trouble == "a process for TLS has ended with -9"
        wait_until(lambda: not children.read_text(), "the fork's end")
        say(3, "begin")
        assert answer(), "the process has ended"
