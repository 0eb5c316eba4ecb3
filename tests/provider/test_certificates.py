"""The certificates of a provider's TLS endpoints: the judgement, the flow, and the program."""

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
import trustme

from port_checker import advice
from port_checker.provider.certificates import judge_tls
from port_checker.provider.report import PortPair, TlsAnswer, TlsReport
from port_checker.tls import TlsVerdictKind
from port_checker.verdicts import tls_kind
from tests.support.loopback import free_port, refused_port
from tests.support.scripted import check, scripted
from tests.support.service import serve
from tests.support.tls import https

UNTIL = "2099-12-01T08:30:00+00:00"
GOOD = TlsAnswer(TlsVerdictKind.VALID, error=None, not_after=UNTIL)


def bad(error: str) -> TlsAnswer:
    return TlsAnswer(tls_kind(False, error), error, not_after=None)


def judged(
    *answers: TlsAnswer, is_listened_on: bool = True, own_address: bool = False
) -> TlsReport:
    return judge_tls(
        PortPair(443, 8443),
        {f"http://{number}": answer for number, answer in enumerate(answers)},
        reason="http://9 does not check certificates",
        is_listened_on=is_listened_on,
        own_address=own_address,
        ip="203.0.113.7",
    )


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ("certificate expired", advice.CERTIFICATE_EXPIRED),
        (
            "certificate does not match expected IP",
            advice.CERTIFICATE_FOR_ANOTHER.format(ip="203.0.113.7"),
        ),
        (
            "certificate verify failed: certificate is not yet valid",
            advice.CERTIFICATE_NOT_YET_VALID,
        ),
        (
            "certificate verify failed: unable to get local issuer certificate",
            advice.CERTIFICATE_OF_UNKNOWN_AUTHORITY,
        ),
        (
            "certificate verify failed: self-signed certificate",
            advice.CERTIFICATE_OF_UNKNOWN_AUTHORITY,
        ),
        ("certificate verify failed: EE certificate key too weak", advice.CERTIFICATE_REJECTED),
        ("TLS handshake failed: wrong version number", advice.NOT_TLS),
        ("TLS handshake failed: tlsv1 alert protocol version", advice.TLS_TOO_OLD),
        ("TLS handshake failed: timed out", advice.TLS_HANDSHAKE_FAILED),
        ("Connection refused", advice.IN_USE.format(and_router=advice.AND_ROUTER)),
    ],
)
def test_the_advice_on_a_certificate(error: str, expected: str) -> None:
    for answers in [bad(error)], [GOOD, bad(error)]:
        report = judged(*answers)
        assert (report.valid, report.error, report.advice) == (False, error, expected)


def test_the_advice_where_there_is_no_connection() -> None:
    timed_out = bad("Connection timed out")
    own = judged(timed_out, own_address=True)
    assert own.advice == advice.IN_USE.format(and_router="")
    idle = judged(timed_out, is_listened_on=False)
    assert idle.advice == advice.NOTHING_SERVES_TLS.format(port=8443)


def test_a_good_certificate_needs_no_advice() -> None:
    report = judged(GOOD, GOOD)
    assert (report.port, report.inner, report.valid) == (443, 8443, True)
    assert (report.error, report.not_after, report.advice) == (None, UNTIL, None)
    assert not judged().valid
    reason = "http://9 does not check certificates"
    assert judged().advice == advice.TLS_NOT_CHECKED.format(reason=reason)


def test_a_server_checks_the_certificate(authority: trustme.CA) -> None:
    until = datetime.fromisoformat(UNTIL)
    with (
        https(authority.issue_cert("127.0.0.1", not_after=until)) as port,
        refused_port() as refused,
        serve(retries=1) as client,
    ):
        url = str(client.base_url)
        report = check([free_port()], url, tls=[port, (refused, port), refused])
    good, closed, idle = report.tls
    assert good.answers == {url: GOOD}
    assert (good.port, good.inner, good.valid, good.advice) == (port, port, True, None)
    assert closed.error == "Connection refused"
    assert closed.advice == advice.IN_USE.format(and_router="")
    assert idle.advice == advice.NOTHING_SERVES_TLS.format(port=refused)


def test_a_server_that_does_not_check_certificates() -> None:
    with scripted() as server:
        report = check([free_port()], server.url, tls=[443])
    reason = f"{server.url} does not check certificates"
    (endpoint,) = report.tls
    assert endpoint.advice == advice.TLS_NOT_CHECKED.format(reason=reason)
    assert report.reachable == 1  # which is no fault of the port


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "port_checker", "check", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_program(authority: trustme.CA) -> None:
    until = datetime.fromisoformat(UNTIL)
    past = datetime.now(UTC) - timedelta(days=2)
    with (
        https(authority.issue_cert("127.0.0.1", not_after=until)) as good,
        https(authority.issue_cert("127.0.0.1", not_after=past)) as expired,
        serve(retries=1) as client,
    ):
        words = [str(free_port()), "--server", str(client.base_url), "--json"]
        done = run(*words, "--tls", str(good), "--tls", f"{expired}:{good}")
        assert done.returncode == 1
        assert [endpoint["error"] for endpoint in json.loads(done.stdout)["tls"]] == [
            None,
            "certificate expired",
        ]


def test_a_wrong_port_on_the_command_line() -> None:
    done = run("--server", "http://127.0.0.1:9", "--tls", "https")
    assert done.returncode == 2
    assert "--tls" in done.stderr
