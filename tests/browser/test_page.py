"""The page on which people check their ports."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import httpx
import pytest
import trustme
from playwright.sync_api import Browser, FloatRect, Route, expect

from port_checker import advice
from port_checker.addresses import parse_networks
from port_checker.api.app import create_app
from port_checker.api.limits import RateLimiter
from port_checker.checker import Checker
from port_checker.connect import OPEN, TIMED_OUT, CheckFailed, Verdict
from port_checker.settings import Rate, Settings
from port_checker.tls import TlsVerdict, TlsVerdictKind
from tests.support.browser import ADDRESS, OTHER_SITE, OWN_NAME, SERVICE, Visitor
from tests.support.checkers import HeldChecker
from tests.support.loopback import open_listener, open_port, ports, refused_port, silent_port
from tests.support.namespace import ROOT
from tests.support.proxies import needs_proxies, nginx
from tests.support.service import program, serve
from tests.support.tls import answering, endpoint, https

pytestmark = pytest.mark.xdist_group("browser")

Visit = Callable[..., Visitor]

DEFAULT_PORTS = "7466, 50800-50899"
HINT = "Ports and ranges. 7466 is for the provider’s API, 50800-50899 for its virtual machines."  # noqa: RUF001
HEADING = "Can the world reach your ports?"

# What the location of a proxy should have, and the one of these that it must.
OPERATING = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")
AS_DOCUMENTED = re.findall(r"^ +(proxy_(?:set_header|http_version) .*;)$", OPERATING, re.MULTILINE)
FORWARDS = "proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The service's, which gives each port one attempt of a second."""
    with serve(retries=1, timeout=1, caller_rate_limit="off") as client:
        yield str(client.base_url)


def test_a_check_by_keyboard_alone(url: str, visit: Visit) -> None:
    visitor = visit(url)
    page, keyboard = visitor.page, visitor.page.keyboard
    expect(page.get_by_text("Your address: 127.0.0.1 (IPv4)")).to_be_visible()
    with open_port() as opened, refused_port() as refused:
        keyboard.press("Tab")
        expect(page.get_by_role("link", name="API").first).to_be_focused()
        keyboard.press("Tab")
        expect(page.get_by_label("Ports")).to_be_focused()
        expect(page.get_by_label("Ports")).to_have_value(DEFAULT_PORTS)
        keyboard.press("Control+A")
        keyboard.type(f"{opened} {refused}")
        keyboard.press("Enter")
        visitor.expect_status("✕ 1 of 2 ports can be reached")
        keyboard.press("Tab")
        expect(page.get_by_role("button", name="Check", exact=True)).to_be_focused()
        keyboard.press("Tab")
        expect(page.get_by_text("Check an HTTPS certificate")).to_be_focused()
        keyboard.press("Tab")
        expect(page.get_by_role("button", name="Copy as text")).to_be_focused()
        keyboard.press("Enter")
        expect(page.get_by_role("status").get_by_text("Copied.")).to_be_visible()
    assert visitor.checks == [
        {"provider_ip": "127.0.0.1", "ports": [opened, refused], "perspectives": True}
    ]


def test_an_older_browser_only_waits_without_an_end(url: str, visit: Visit) -> None:
    visitor = visit(url)
    visitor.page.evaluate("() => { delete AbortSignal.timeout; }")
    with open_port() as opened:
        visitor.check(opened)
        visitor.expect_status("✓ The port can be reached")


def test_it_checks_over_ipv6_whoever_comes_over_it(visit: Visit) -> None:
    with serve(host="::1", retries=1) as client, open_port("::1") as opened:
        visitor = visit(str(client.base_url))
        expect(visitor.page.get_by_text("Your address: ::1 (IPv6)")).to_be_visible()
        visitor.check(opened)
        visitor.expect_status("✓ The port can be reached")


@needs_proxies
def test_a_visitor_whose_address_is_unknown_is_told_so(
    url: str, visit: Visit, tmp_path: Path
) -> None:
    unknown = "proxy_set_header X-Forwarded-For unknown;"
    with nginx(tmp_path, httpx.URL(url).port or 0, unknown) as port:
        visitor = visit(f"http://127.0.0.1:{port}")
        told = "The service does not see your address, so it cannot check it from here."
        visitor.expect_status(told)
        expect(visitor.page.get_by_text("Your address: unknown")).to_be_visible()
        visitor.check(7466)
        visitor.expect_status(told)
    assert not visitor.checks


def test_ports_with_the_same_result_share_a_row(url: str, visit: Visit) -> None:
    visitor = visit(url)
    with open_port() as opened, refused_port() as refused, silent_port() as silent:
        visitor.check(opened, refused, silent)
        assert sorted(visitor.rows()) == sorted(
            [
                (str(opened), "✓Reachable", advice.PAGE_REACHABLE),
                (str(refused), "✕Connection refused", advice.PAGE_REFUSED),
                (str(silent), "✕Connection timed out", advice.PAGE_TIMED_OUT),
            ]
        )
    visitor.check("50802, 50800-50801, 7466")  # nobody listens in the namespace
    visitor.expect_status("✕ None of 4 ports can be reached")
    assert visitor.rows() == [("7466, 50800-50802", "✕Connection refused", advice.PAGE_REFUSED)]
    expect(visitor.page.get_by_role("table")).to_have_accessible_name(
        re.compile(f"Ports of 127.0.0.1, checked .* by {re.escape(url)}")
    )


class FilteredChecker(Checker):
    """A place that a filter keeps from everything but one port."""

    def __init__(self, reached: int) -> None:
        super().__init__(retries=1, retry_delay=0, timeout=1, max_in_flight=1000)
        self._reached = reached

    async def check(
        self, _: object, ports: Sequence[int], __: object, ___: object = None
    ) -> dict[int, Verdict]:
        return {port: OPEN if port == self._reached else TIMED_OUT for port in ports}

    async def check_tls(self, *_: object) -> TlsVerdict:
        return TlsVerdict(TlsVerdictKind.VALID)


def test_a_place_that_disagrees_has_a_line(visit: Visit) -> None:
    # Forwarded by another server, this machine's address is nobody's own.
    settings = Settings(retries=1, allowed_networks=parse_networks("127.0.0.0/8"))
    with ExitStack() as stack:
        first, second = [stack.enter_context(open_port()) for _ in range(2)]
        refused = stack.enter_context(refused_port())
        filtered = create_app(settings, checker=FilteredChecker(refused))
        elsewhere = [
            str(stack.enter_context(serve(app)).base_url)
            for app in (filtered, create_app(settings))
        ]
        service = stack.enter_context(serve(retries=1, perspectives=tuple(elsewhere)))
        place = httpx.URL(elsewhere[0]).netloc.decode()
        visitor = visit(str(service.base_url))
        visitor.check(first, second, refused)
        visitor.expect_status("✕ 2 of 3 ports can be reached")
        low, high = sorted((first, second))
        both = f"{low}-{high}" if high == low + 1 else f"{low}, {high}"
        assert visitor.rows() == [
            (
                str(refused),
                "✕Connection refused",
                advice.PAGE_REFUSED,
                f"Reachable as seen from {place}.",
            ),
            (
                both,
                "✓Reachable",
                advice.PAGE_REACHABLE,
                f"Not from {place}: Connection timed out",
            ),
        ]
        visitor.check_certificate(refused)
        visitor.expect_status(f"✕ Port {refused} cannot be reached")
        assert visitor.rows()[0][3] == f"Valid as seen from {place}."
        assert visitor.violations() == {}


def test_it_tells_how_long_a_check_takes(url: str, visit: Visit) -> None:
    visitor = visit(url)
    with silent_port() as silent:
        # All that is said is kept, since a busy machine may look too late.
        visitor.page.evaluate(
            """() => {
                window.said = [];
                const look = () => said.push([
                    document.getElementById("status").textContent,
                    document.querySelector("#progress:not([hidden]) progress")?.max,
                ]);
                const status = document.getElementById("status");
                new MutationObserver(look).observe(status, {childList: true});
            }"""
        )
        visitor.check(silent)
        visitor.expect_status("✕ The port cannot be reached")
    assert visitor.page.evaluate("() => said[0]") == [
        "Checking 1 port of 127.0.0.1. This takes 1 s at most.",
        1,
    ]
    expect(visitor.page.locator("progress")).to_be_hidden()


NO_PORT = "“{text}” is neither a port (1 to 65535) nor a range such as 50800-50899."
WRONG_PORTS = {
    "": "Enter at least one port.",
    " , ": "Enter at least one port.",
    "7466, 70000": NO_PORT.format(text="70000"),
    "0": NO_PORT.format(text="0"),
    "10-9": NO_PORT.format(text="10-9"),
    "a" * 99: NO_PORT.format(text="a" * 30 + "…"),
    "http": NO_PORT.format(text="http"),
    "1-1001": "These are too many ports for one check. Enter at most 1000.",
}


def test_a_wrong_port_is_told_before_anything_is_sent(url: str, visit: Visit) -> None:
    visitor = visit(url)
    field = visitor.page.get_by_label("Ports")
    for text, fault in WRONG_PORTS.items():
        visitor.check(text)
        expect(field).to_be_focused()
        expect(field).to_have_attribute("aria-invalid", "true")
        expect(field).to_have_accessible_description(f"{HINT} {fault}")
        # It is read out where the focus was in the field already, too.
        expect(visitor.page.get_by_role("alert")).to_have_text(fault)
        assert not visitor.checks
        field.fill("7466")
        expect(visitor.page.get_by_text(fault, exact=True)).to_be_hidden()
        expect(field).to_have_attribute("aria-invalid", "false")


def test_ports_may_be_written_as_people_do(url: str, visit: Visit) -> None:
    ports = {
        "7466": [7466],
        "7466,50800-50802": [7466, 50800, 50801, 50802],
        "  7466 ;\t50800 – 50801\n": [7466, 50800, 50801],  # noqa: RUF001  # a dash
        "1-2, 2-3, 65535": [1, 2, 3, 65535],
        "7466/tcp and 50800 to 50801": [7466, 50800, 50801],
        "7466 — 7467": [7466, 7467],
        "60800-60801:50800-50801 443:8443": [60800, 60801, 443],
    }
    read = "texts => texts.map(text => [text, parsePorts(text, 1000)])"
    assert dict(visit(url).page.evaluate(read, [*ports])) == ports


PRIVATE = """
    10.0.0.1 127.0.0.1 169.254.0.1 172.16.0.1 172.31.0.1 192.168.0.1
    100.64.0.1 100.99.0.1 100.127.0.1 ::1 fc00::1 fd00::1 fe80::1
"""
PUBLIC = """
    1.0.0.10 100.63.0.1 100.128.0.1 101.64.0.1 172.15.0.1 172.32.0.1 192.169.0.1
    203.0.113.7 2600::7 2a00:fc::1
"""


def test_what_is_seen_of_a_private_address_says_nothing_about_the_world(
    url: str, visit: Visit
) -> None:
    judge = "addresses => addresses.filter(isPrivate)"
    assert visit(url).page.evaluate(judge, (PRIVATE + PUBLIC).split()) == PRIVATE.split()


def test_after_a_limit_it_counts_down_and_tries_again(visit: Visit) -> None:
    now = 0.0
    settings = Settings(retries=1)
    limiter = RateLimiter(Rate(1, timedelta(minutes=1)), clock=lambda: now)
    with serve(create_app(settings, limiter=limiter)) as client, open_port() as opened:
        # Playwright's clock stays in its browser: this one is no other test's.
        visitor = visit(str(client.base_url), locale="en-GB")
        visitor.check(opened)
        visitor.expect_status("✓ The port can be reached")
        visitor.page.clock.install()
        visitor.page.clock.pause_at(datetime(2099, 1, 1, tzinfo=UTC))
        with visitor.page.expect_response("**/check-ports") as answered:
            visitor.check(opened)
        visitor.expect_status(answered.value.json()["detail"]["message"])
        expect(visitor.page.get_by_text("Trying again in 60 s.")).to_be_visible()
        expect(visitor.page.locator("#results")).to_be_hidden()
        visitor.page.clock.run_for(10_000)
        expect(visitor.page.get_by_text("Trying again in 50 s.")).to_be_visible()
        now = 60
        visitor.page.clock.run_for(50_000)
        visitor.expect_status("✓ The port can be reached")
        visitor.forgive("429")
    assert len(visitor.checks) == 3


def good(authority: trustme.CA) -> AbstractContextManager[int]:
    until = datetime(2099, 12, 1, 8, 30, tzinfo=UTC)
    return https(authority.issue_cert("127.0.0.1", not_after=until))


def expired(authority: trustme.CA) -> AbstractContextManager[int]:
    year, month = datetime(2020, 1, 1, tzinfo=UTC), timedelta(days=31)
    return https(authority.issue_cert("127.0.0.1", not_before=year, not_after=year + month))


def for_another_address(authority: trustme.CA) -> AbstractContextManager[int]:
    return https(authority.issue_cert("203.0.113.8"))


def of_unknown_authority(_: trustme.CA) -> AbstractContextManager[int]:
    return https(trustme.CA().issue_cert("127.0.0.1"))


def plain_http(_: trustme.CA) -> AbstractContextManager[int]:
    return endpoint(answering(b"HTTP/1.1 400 Bad Request\r\n\r\n"))


def nobody(_: trustme.CA) -> AbstractContextManager[int]:
    return refused_port()


Kind = Callable[[trustme.CA], AbstractContextManager[int]]
# Certificates, and the verdict and sentence on each.
CERTIFICATES: list[tuple[Kind, str, str]] = [
    (expired, "✕certificate expired", advice.CERTIFICATE_EXPIRED),
    (
        for_another_address,
        "✕certificate does not match expected IP",
        advice.CERTIFICATE_FOR_ANOTHER.format(ip="127.0.0.1"),
    ),
    (
        of_unknown_authority,
        "✕certificate verify failed: unable to get local issuer certificate",
        advice.CERTIFICATE_OF_UNKNOWN_AUTHORITY,
    ),
    (plain_http, "✕TLS handshake failed: wrong version number", advice.NOT_TLS),
    (nobody, "✕Connection refused", advice.PAGE_REFUSED),
    (good, "✓Valid until 1 December 2099 at 08:30:00 UTC", advice.PAGE_CERTIFICATE_VALID),
]


def test_a_certificate_is_valid_until_a_time_or_it_says_what_to_do(
    visit: Visit, authority: trustme.CA
) -> None:
    # A service of its own, since each reads once what it trusts.
    with serve(retries=1) as client:
        visitor = visit(str(client.base_url), locale="en-GB", timezone_id="UTC")
        for kind, verdict, sentence in CERTIFICATES:
            with kind(authority) as port:
                visitor.check_certificate(port)
                summary = {
                    good: f"✓ Port {port} has a valid certificate",
                    nobody: f"✕ Port {port} cannot be reached",
                }.get(kind, f"✕ Port {port} has no valid certificate")
                visitor.expect_status(summary)
            assert visitor.rows() == [(str(port), verdict, sentence)]
            assert visitor.checks[-1] == {
                "host": "127.0.0.1",
                "port": port,
                "expected_ip": "127.0.0.1",
                "perspectives": True,
            }
    assert len(visitor.checks) == len(CERTIFICATES)
    expect(visitor.page.get_by_role("table")).to_have_accessible_name(
        re.compile("Certificate at 127.0.0.1, checked ")
    )
    assert visitor.violations() == {}


def test_a_wrong_https_port_is_told_before_anything_is_sent(url: str, visit: Visit) -> None:
    visitor = visit(url)
    fault = visitor.page.get_by_text("Enter one port (1 to 65535), such as 443.")
    for text in "", "0", "65536", "443, 8443", "https":
        visitor.check_certificate(text)
        field = visitor.page.get_by_label("HTTPS port")
        expect(field).to_be_focused()
        expect(field).to_have_attribute("aria-invalid", "true")
        expect(fault).to_be_visible()
        assert not visitor.checks
        field.fill("443")
        expect(fault).to_be_hidden()
        expect(field).to_have_attribute("aria-invalid", "false")


@needs_proxies
def test_a_proxys_own_error_is_told_in_words(url: str, visit: Visit, tmp_path: Path) -> None:
    limited = "if ($request_method = POST) { add_header Retry-After 7 always; return 503; }"
    with nginx(tmp_path, httpx.URL(url).port or 0, limited) as port:
        visitor = visit(f"http://127.0.0.1:{port}")
        visitor.check(7466)
        visitor.expect_status(
            "The service did not answer as it should (HTTP status 503). Try again in 7 s."
        )
        visitor.forgive("503")


@pytest.mark.parametrize("wait", ["-7", "1.5", "Thu, 01 Jan 2099 00:00:00 GMT"])
def test_what_is_no_number_of_seconds_is_not_waited_for(url: str, visit: Visit, wait: str) -> None:
    visitor = visit(url)
    answer = {"status": 429, "headers": {"Retry-After": wait}}
    visitor.page.route("**/check-ports", lambda route: route.fulfill(**answer), times=1)
    visitor.check(7466)
    visitor.expect_status(
        "The service did not answer as it should (HTTP status 429). Try again later."
    )
    assert len(visitor.checks) == 1
    visitor.forgive("429")


def test_what_the_page_asked_first_hides_no_result_when_it_fails(url: str, visit: Visit) -> None:
    visitor = visit(url)
    first: list[Route] = []
    visitor.page.route("**/ip", lambda route: first.append(route), times=1)
    visitor.page.reload()
    with open_port() as opened:
        visitor.check(opened)
        visitor.expect_status("✓ The port can be reached")
    first[0].abort()
    visitor.page.evaluate("() => fetch('ip')")
    visitor.expect_status("✓ The port can be reached")
    visitor.forgive("ERR_FAILED")


def test_a_link_may_have_a_user_and_a_password(url: str, visit: Visit) -> None:
    visitor = visit(url.replace("//", "//user:password@"))
    with open_port() as opened:
        visitor.check(opened)
        visitor.expect_status("✓ The port can be reached")
    assert "password" not in visitor.page.content()
    visitor.page.get_by_role("link", name="API").first.click()
    visitor.page.locator("#operations-checks-ip").click()
    visitor.page.get_by_role("button", name="Execute").click()
    expect(visitor.page.locator("tr.response").get_by_text("200").first).to_be_visible()
    visitor.requests.clear()  # that of the link has its user and password
    visitor.page.goto(url)


def test_a_service_that_is_gone_is_told_in_words(visit: Visit) -> None:
    with serve() as client:
        visitor = visit(str(client.base_url), viewport={"width": 390, "height": 664})
        expect(visitor.page.get_by_text("127.0.0.1 (IPv4)")).to_be_visible()
    visitor.check(7466)
    visitor.expect_status(
        "The service cannot be reached. See whether you are online, and try again."
    )
    expect(visitor.page.locator("#status")).to_be_in_viewport(ratio=1)
    visitor.forgive("ERR_CONNECTION_REFUSED")


def test_a_bar_tells_how_far_a_check_is_and_results_appear(visit: Visit) -> None:
    checker = HeldChecker()
    with serve(create_app(Settings(), checker=checker)) as client, open_port() as opened:
        visitor = visit(str(client.base_url))
        visitor.check(opened, 1)
        expect(visitor.page.get_by_text("1 of 2 ports done")).to_be_visible()
        bar = visitor.page.get_by_role("progressbar")
        assert bar.evaluate("bar => [bar.value, bar.max]") == [1, 2]
        assert visitor.page.locator("#results .verdict").all_inner_texts() == ["✓Reachable"]
        expect(visitor.page.get_by_role("button", name="Copy as text")).to_be_hidden()
        checker.may_go_on.set()
        visitor.expect_status("✕ 1 of 2 ports can be reached")
        expect(bar).to_be_hidden()


def test_nothing_counts_of_a_check_that_fails_in_the_middle(visit: Visit) -> None:
    checker = HeldChecker(CheckFailed("no descriptors"))
    with serve(create_app(Settings(), checker=checker)) as client:
        visitor = visit(str(client.base_url))
        visitor.check(80, 81)
        expect(visitor.page.locator("#results .verdict")).to_have_text("✓Reachable")
        checker.may_go_on.set()
        visitor.expect_status(
            "This service failed to check (no descriptors). That says nothing about your ports. "
            "Try again later."
        )
        expect(visitor.page.locator("#results")).to_be_hidden()


def test_a_service_that_ends_in_the_middle_of_its_answer_is_told_in_words(visit: Visit) -> None:
    with program() as running, open_port() as opened, silent_port() as silent:
        visitor = visit(f"http://127.0.0.1:{running.port}")
        visitor.check(opened, silent)
        expect(visitor.page.locator("#results .verdict")).to_have_text("✓Reachable")
        running.stop(signal.SIGKILL)
        visitor.expect_status("The answer broke off, so nothing of it counts. Check again.")
        expect(visitor.page.locator("#results")).to_be_hidden()
        visitor.forgive("ERR_INCOMPLETE_CHUNKED_ENCODING")


def test_without_javascript_it_says_what_to_do_instead(url: str, visit: Visit) -> None:
    page = visit(url, java_script_enabled=False).page
    expect(page.get_by_role("heading", name=HEADING)).to_be_visible()
    expect(page.locator("noscript p")).to_be_visible()
    expect(page.get_by_text("curl -s URL/check-ports")).to_be_visible()
    expect(page.get_by_text("pipx run --spec URL/static/")).to_be_visible()
    expect(page.get_by_role("textbox")).to_have_count(0)
    expect(page.get_by_role("button")).to_have_count(0)


@pytest.mark.parametrize(("width", "height"), [(390, 664), (640, 400), (320, 600)])
def test_a_result_comes_into_view(url: str, visit: Visit, width: int, height: int) -> None:
    visitor = visit(url, viewport={"width": width, "height": height})
    with open_port() as opened:
        visitor.check(opened)
        visitor.expect_status("✓ The port can be reached")
    expect(visitor.page.locator("#status")).to_be_in_viewport(ratio=1)
    nearby = advice.PAGE_NEARBY.format(ip="127.0.0.1")
    expect(visitor.page.locator("#next")).to_have_text(nearby)
    expect(visitor.page.locator("tbody .verdict")).to_be_in_viewport(ratio=1)
    visitor.check_certificate(1)
    visitor.expect_status("✕ Port 1 cannot be reached")
    expect(visitor.page.locator("#status")).to_be_in_viewport(ratio=1)
    expect(visitor.page.locator("tbody .verdict").first).to_be_in_viewport(ratio=1)
    assert [verdict for _, verdict, _ in visitor.rows()] == ["✕Connection refused", "✓Reachable"]


def test_a_link_fills_in_the_ports_and_checks_nothing(url: str, visit: Visit) -> None:
    visitor = visit(f"{url}/#7466,50800-50899&tls=8443")
    page = visitor.page
    expect(page.get_by_text("(IPv4)")).to_be_visible()
    expect(page.get_by_label("Ports")).to_have_value(DEFAULT_PORTS)
    expect(page.get_by_label("HTTPS port")).to_have_value("8443")
    assert not visitor.checks
    visitor.check("50801 50800")
    visitor.expect_status("✕ None of 2 ports can be reached")
    expect(page).to_have_title("✕ None of 2 ports can be reached · Golem Port Checker")
    assert page.url == f"{url}/#50800-50801&tls=8443"
    page.reload()
    expect(page.get_by_label("Ports")).to_have_value("50800-50801")


def test_the_lines_for_a_shell_are_for_this_server_and_these_ports(url: str, visit: Visit) -> None:
    visitor = visit(url)
    expect(visitor.page.locator("#plain-http")).to_be_hidden()  # on loopback nobody is on the way
    visitor.page.get_by_label("Ports").fill("60800:50800, 1-2")
    expect(visitor.page.get_by_text("Of outer:inner, the outer port is checked.")).to_be_visible()
    wheel = f"{url}/{httpx.get(url).json()['program']['wheel']}"
    check = f"port-checker check 60800:50800 1-2 --server {url}"
    *program_lines, curl, variable = visitor.page.locator("pre").all_text_contents()
    assert program_lines == [
        f"pipx run --spec {wheel} {check}",
        f"uv tool run --python 3.12 --from {wheel} {check}",
        f"uv tool run --from {wheel} {check}",
        f"python3 -m venv golem-check && golem-check/bin/pip install --no-compile {wheel}"
        f" && golem-check/bin/{check}",
    ]
    assert variable == f"GOLEM_PROVIDER_PORT_CHECK_TLS_URL={url}"
    done = subprocess.run(["sh", "-c", curl], capture_output=True, check=True)
    assert list(json.loads(done.stdout)["results"]) == ["1", "2", "60800"]


def test_an_ipv6_address_is_quoted_for_shells_that_would_look_for_files(visit: Visit) -> None:
    with serve(host="::1") as client:
        url = str(client.base_url)
        command = visit(url).page.locator("#command")
        expect(command).to_contain_text(f"--server '{url}'")
        expect(command).to_contain_text(f"--spec '{url}'/static/")


def test_the_page_about_providers_software_is_for_phones_and_axe(url: str, visit: Visit) -> None:
    visitor = visit(url, viewport={"width": 320, "height": 700})
    visitor.page.get_by_role("link", name="Other versions").click()
    expect(visitor.page.get_by_role("heading", name="Golem providers’ software")).to_be_visible()  # noqa: RUF001
    assert visitor.page.evaluate("() => document.documentElement.scrollWidth") <= 320
    assert visitor.violations() == {}
    visitor.page.get_by_role("link", name="0.1.63", exact=True).click()
    expect(visitor.page.get_by_role("heading", name="0.1.63", exact=True)).to_be_in_viewport()


def test_an_answer_without_its_last_line_counts_for_nothing(url: str, visit: Visit) -> None:
    line = '{"port":1,"error":null}\n'
    read = "text => readLines(new Response(text).body, () => {}).then(() => true, () => false)"
    page = visit(url).page
    for text in "", line, line + '{"results":{}}', "{":
        assert page.evaluate(read, text) is False, text
    assert page.evaluate(read, line + '{"results":{}}\n') is True


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(url: str, visit: Visit, scheme: str) -> None:
    visitor = visit(url, color_scheme=scheme)
    expect(visitor.page.get_by_text("(IPv4)")).to_be_visible()
    found = [visitor.violations()]
    with open_port() as opened, refused_port() as refused:
        visitor.check(opened, refused)
        visitor.expect_status("✕ 1 of 2 ports can be reached")
    found.append(visitor.violations())
    visitor.check("no port")
    found.append(visitor.violations())
    visitor.check_certificate("no port")
    found.append(visitor.violations())
    assert found == [{}, {}, {}, {}]


def test_nothing_is_wider_than_the_window(url: str, visit: Visit) -> None:
    visitor = visit(url)
    with ports(40, refused_port) as refused, open_port() as opened:
        visitor.check(*refused, opened)
        visitor.expect_status("✕ 1 of 41 ports can be reached")
    # As long as another place's error may be.
    visitor.page.locator(".verdict").first.evaluate("it => it.append('x'.repeat(400))")
    for width in 320, 480, 768, 1920:
        visitor.page.set_viewport_size({"width": width, "height": 700})
        assert visitor.page.evaluate("() => document.documentElement.scrollWidth") <= width
        expect(visitor.page.get_by_role("columnheader", name="Ports")).to_have_count(1)
        expect(visitor.page.get_by_role("rowheader")).to_have_count(2)


def test_on_paper_the_results_are_black_on_white(url: str, visit: Visit) -> None:
    visitor = visit(url, color_scheme="dark")
    visitor.check(7466)
    visitor.expect_status("✕ The port cannot be reached")
    visitor.page.emulate_media(media="print")
    expect(visitor.page.locator("body")).to_have_css("color", "rgb(0, 0, 0)")
    expect(visitor.page.get_by_role("table")).to_be_visible()
    expect(visitor.page.get_by_role("textbox")).to_have_count(0)
    expect(visitor.page.get_by_role("button")).to_have_count(0)


@needs_proxies
@pytest.mark.parametrize(
    ("directives", "address", "host"),
    [
        (AS_DOCUMENTED, ADDRESS, SERVICE),
        ((FORWARDS,), ADDRESS, SERVICE),  # Host is that of proxy_pass then
        ((), "127.0.0.1", "127.0.0.1"),  # nothing shows that there is a proxy
    ],
)
def test_it_works_under_any_path_of_a_proxy(
    url: str, visit: Visit, tmp_path: Path, directives: Sequence[str], address: str, host: str
) -> None:
    service = httpx.URL(url).port or 0
    with (
        nginx(tmp_path, service, *directives, host=address, prefix="/portcheck/") as port,
        open_port(address) as opened,
    ):
        visitor = visit(f"http://{host}:{port}/portcheck/")
        visitor.check(opened)
        visitor.expect_status("✓ The port can be reached")
        visitor.check_certificate(1)
        visitor.expect_status("✕ Port 1 cannot be reached")
        command = f"port-checker check {opened} --server http://{host}:{port}/portcheck"
        expect(visitor.page.locator("#command")).to_contain_text(command)


@needs_proxies
def test_the_api_can_be_tried_under_any_path_of_a_proxy(
    url: str, visit: Visit, tmp_path: Path
) -> None:
    service = httpx.URL(url).port or 0
    with nginx(tmp_path, service, FORWARDS, host=ADDRESS, prefix="/portcheck/") as port:
        visitor = visit(f"http://{SERVICE}:{port}/portcheck/")
        visitor.page.get_by_role("link", name="API").first.click()
        visitor.page.locator("#operations-checks-ip").click()
        visitor.page.get_by_role("button", name="Execute").click()
        expect(visitor.page.locator("tr.response").get_by_text("200").first).to_be_visible()
        visitor.page.get_by_role("link", name="Golem Port Checker").click()
        expect(visitor.page.get_by_role("heading", name=HEADING)).to_be_visible()


@needs_proxies
def test_nothing_is_offered_for_a_shell_that_it_would_take_apart(
    url: str, visit: Visit, tmp_path: Path
) -> None:
    service = httpx.URL(url).port or 0
    with (
        nginx(tmp_path, service, *AS_DOCUMENTED, host=ADDRESS, prefix="/p/") as port,
        open_port(ADDRESS) as opened,
    ):
        for path in ";id;/..%2f", "$(id)/..%2f", "&id&/..%2f", "%60id%60/..%2f", "x'/..%2f":
            visitor = visit(f"http://{ADDRESS}:{port}/p/{path}/")
            visitor.check(opened)
            visitor.expect_status("✓ The port can be reached")
            for line in visitor.page.locator("pre").all_text_contents():
                assert re.search("[ =]URL(/|$)", line)
                assert path not in line
            expect(visitor.page.get_by_role("button", name="Copy command")).to_have_count(0)
            expect(visitor.page.locator("caption").first).to_contain_text("by this service")


@needs_proxies
def test_the_result_can_be_copied_on_plain_http(url: str, visit: Visit, tmp_path: Path) -> None:
    with (
        nginx(tmp_path, httpx.URL(url).port or 0, *AS_DOCUMENTED, host=ADDRESS) as port,
        refused_port(ADDRESS) as refused,
    ):
        visitor = visit(f"http://{SERVICE}:{port}")
        assert visitor.page.evaluate("() => navigator.clipboard") is None
        expect(visitor.page.locator("#plain-http")).to_be_visible()
        visitor.check(refused)
        visitor.page.get_by_role("button", name="Copy as text").click()
        expect(visitor.page.get_by_text("Copied.")).to_be_visible()
    field = visitor.page.get_by_label("Ports")
    field.fill("")
    field.press("Control+V")
    pasted = field.input_value()
    assert pasted.startswith(f"Ports of {ADDRESS}, checked ")
    assert f"{refused}: Connection refused. {advice.PAGE_REFUSED}" in pasted
    assert pasted.endswith("The port cannot be reached")


def named(name: str, folder: Path) -> list[str]:
    """The command of a service whose machine has a name in its /etc/hosts."""
    hosts = folder / "hosts"
    hosts.write_text(f"127.0.0.1 localhost {name}\n")
    command = 'mount --bind "$0" /etc/hosts && exec "$@"'
    own = [sys.executable, "-m", "port_checker"]
    return ["unshare", "--mount", "sh", "-c", command, str(hosts), *own]


def test_it_works_on_a_name_that_etc_hosts_gives_this_machine(visit: Visit, tmp_path: Path) -> None:
    with program(*named(OWN_NAME, tmp_path)) as running:
        visitor = visit(f"http://{OWN_NAME}:{running.port}")
        visitor.check(running.port)
        visitor.expect_status("✓ The port can be reached")


def test_the_pictures_in_the_readme(visit: Visit, tmp_path: Path) -> None:
    """Its pictures are made here: ``make pictures`` keeps them."""
    folder = Path(os.environ.get("PICTURES", tmp_path))
    with ExitStack() as stack:
        for port in [7466, *range(50800, 50900)]:
            stack.enter_context(open_listener(ADDRESS, port))
        stack.enter_context(
            program(
                *named(SERVICE, tmp_path),
                PORT_CHECKER_HOST="0.0.0.0",  # noqa: S104  # of the namespace
                PORT_CHECKER_PORT="80",
                PORT_CHECK_RETRIES="1",
            )
        )
        visitor = visit(
            f"http://{SERVICE}",
            viewport={"width": 680, "height": 900},
            device_scale_factor=0.85,
            locale="en-GB",
            timezone_id="UTC",
        )
        visitor.check(DEFAULT_PORTS)
        visitor.expect_status("✓ All 101 ports can be reached")
        expect(visitor.page.locator("#next")).to_have_text(advice.PAGE_ALL_REACHABLE)
        visitor.page.locator("h1").click()  # takes the focus off the button
        visitor.page.evaluate("() => scrollTo(0, 0)")
        results = visitor.page.locator("#results").bounding_box()
        assert results
        height = results["y"] + results["height"] + 20
        clip: FloatRect = {"x": 0, "y": 80, "width": 680, "height": height - 80}
        schemes: list[Literal["light", "dark"]] = ["light", "dark"]
        for scheme in schemes:
            visitor.page.emulate_media(color_scheme=scheme)
            picture = folder / f"page-{scheme}.png"
            visitor.page.screenshot(path=picture, full_page=True, clip=clip)
            assert picture.stat().st_size < 100_000


@needs_proxies
@pytest.mark.parametrize(
    ("site", "service"),
    [
        (OTHER_SITE, "127.0.0.1"),
        ("127.0.0.1", "127.0.0.1"),  # another port is another origin of the same site
        (OTHER_SITE, SERVICE),  # on plain http, and so without Sec-Fetch-Site
    ],
)
def test_another_sites_page_cannot_make_its_visitor_check(
    chromium: Browser, tmp_path: Path, site: str, service: str
) -> None:
    with ExitStack() as stack:
        start = stack.enter_context
        checker, elsewhere = start(serve(retries=1)), start(serve())
        port = checker.base_url.port or 0
        if service == SERVICE:
            port = start(nginx(tmp_path, port, *AS_DOCUMENTED, host=ADDRESS))
        listener = start(open_listener("0.0.0.0"))  # noqa: S104
        listener.setblocking(False)
        page = start(chromium.new_context()).new_page()
        # This one has no content policy that is in the way.
        page.goto(f"http://{site}:{elsewhere.base_url.port}/ip")
        with page.expect_response("**/check-ports") as answered:
            page.evaluate(
                """([url, ip, port]) => fetch(url, {
                    method: "POST",
                    mode: "no-cors",
                    headers: {"Content-Type": "text/plain"},
                    body: JSON.stringify({provider_ip: ip, ports: [port]}),
                })""",
                [
                    f"http://{service}:{port}/check-ports",
                    ADDRESS if service == SERVICE else service,
                    listener.getsockname()[1],
                ],
            )
        assert answered.value.status == 403
        with pytest.raises(BlockingIOError):
            listener.accept()
