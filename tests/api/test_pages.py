"""What the pages are made of, as a program sees it; tests/browser has them in a browser."""

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import Request

import port_checker.api
from port_checker import advice
from port_checker.api.app import create_app
from port_checker.api.pages import not_found_page
from port_checker.settings import Settings
from port_checker.verdicts import TLS_KINDS
from tests.support.service import serve

BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
PAGES = ["/", "/docs", "/golem-provider"]
WEB = Path(port_checker.api.__file__).parent / "web"


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with serve() as service:
        yield service


def urls(page: str) -> list[str]:
    """What an HTML page refers to."""
    return re.findall(r'(?:href|src)="([^"]+)"', page)


def static_files(client: httpx.Client) -> list[str]:
    pages = [client.get(path, headers=BROWSER).text for path in PAGES]
    found = {url for page in pages for url in urls(page) if url.startswith("static/")}
    return sorted(url for url in found if not url.endswith(".whl"))


@pytest.mark.parametrize("path", PAGES)
def test_a_page_is_protected(client: httpx.Client, path: str) -> None:
    headers = client.get(path, headers=BROWSER).raise_for_status().headers
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["X-Frame-Options"] == "DENY"
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; ")
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert "*" not in policy
    assert "http" not in policy


@pytest.mark.parametrize("path", PAGES)
def test_a_page_refers_to_what_is_beside_it(client: httpx.Client, path: str) -> None:
    found = urls(client.get(path, headers=BROWSER).text)
    assert found
    for url in found:
        if path == "/golem-provider" and url.startswith(("#", "https://github.com/")):
            continue  # its own headings; the software that it is about
        assert re.fullmatch(r"[a-z.-]+(#program)?|static/[\w.-]+", url), url
        client.get(f"/{url}").raise_for_status()


@pytest.mark.parametrize("accept", ["*/*", "application/json", ""])
def test_programs_are_told_where_everything_is(client: httpx.Client, accept: str) -> None:
    answer = client.get("/", headers={"Accept": accept}).raise_for_status()
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["Vary"] == "Accept"
    links = answer.json()
    assert links.pop("name") == "Golem Port Checker"
    for name in "check_ports", "check_tls":
        assert client.post(links.pop(name)).status_code == 422
    client.get(links.pop("program")["wheel"]).raise_for_status()
    assert "connects to TCP ports when somebody asks" in links.pop("about")
    assert set(links) == {"ip", "health", "docs", "openapi"}
    for link in links.values():
        client.get(link).raise_for_status()


@pytest.mark.parametrize(
    ("contact", "link"),
    [
        ("noc@checker.example", "mailto:noc@checker.example"),
        ("https://checker.example/?a=1&b", "https://checker.example/?a=1&amp;b"),
    ],
)
def test_people_and_programs_are_told_whom_to_write_to(contact: str, link: str) -> None:
    with serve(contact=contact) as service:
        assert service.get("/").json()["contact"] == contact
        assert f'<a href="{link}">' in service.get("/", headers=BROWSER).text


def test_static_files_are_kept_for_ever_under_names_that_follow_their_content(
    client: httpx.Client,
) -> None:
    files = static_files(client)
    assert len(files) == 8
    for url in files:
        plain = client.get(url, headers={"Accept-Encoding": "identity"}).raise_for_status()
        assert plain.headers["Cache-Control"] == "public, max-age=31536000, immutable"
        assert plain.headers["X-Content-Type-Options"] == "nosniff"
        assert plain.headers["Vary"] == "Accept-Encoding"
        assert "Content-Encoding" not in plain.headers
        with client.stream("GET", url, headers={"Accept-Encoding": "gzip"}) as compressed:
            assert compressed.headers["Content-Encoding"] == "gzip"
            assert gzip.decompress(b"".join(compressed.iter_raw())) == plain.content
        assert client.get(url.replace(".", ".0", 1)).status_code == 404


@pytest.mark.parametrize(
    ("field", "compressed"),
    [
        ("gzip, deflate, br", True),
        ("br, GZIP;q=0.5", True),
        ("*", True),
        ("gzip;q=1.0", True),
        ("gzip;q=0", False),
        ("gzip; q=0.000, br", False),
        ("deflate, br", False),
        ("", False),
    ],
)
def test_a_static_file_is_compressed_for_those_who_take_it(
    client: httpx.Client, field: str, compressed: bool
) -> None:
    url = static_files(client)[0]
    answer = client.get(url, headers={"Accept-Encoding": field})
    assert answer.headers.get("Content-Encoding") == ("gzip" if compressed else None)


def test_head_of_a_static_file_has_the_same_head(client: httpx.Client) -> None:
    for path in static_files(client):
        full, head = client.get(path), client.head(path)
        assert head.status_code == 200
        assert head.content == b""
        for answer in full, head:
            del answer.headers["Date"]
        assert head.headers == full.headers


@pytest.mark.parametrize(
    "path",
    ["/redoc", "/docs/oauth2-redirect", "/static/redoc.standalone.js", "/static/..%2fpages.py"],
)
def test_nothing_else_is_there(client: httpx.Client, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 404
    assert answer.json()["detail"]["code"] == "NOT_FOUND"


@pytest.mark.parametrize(("path", "up"), [("/nothing", "./"), ("/no/such/page.html", "../../")])
def test_a_browser_is_shown_a_page_where_there_is_none(
    client: httpx.Client, path: str, up: str
) -> None:
    answer = client.get(path, headers=BROWSER)
    assert answer.status_code == 404
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "Content-Security-Policy" in answer.headers
    assert {up, f"{up}docs"} < set(urls(answer.text))
    for url in urls(answer.text):
        client.get(httpx.URL(client.base_url).join(path).join(url)).raise_for_status()


@pytest.mark.parametrize("path", ["/nothing/here", "/below/nothing/here"])
def test_its_links_lead_up_whether_or_not_a_server_has_the_root_in_the_path(path: str) -> None:
    scope = {"type": "http", "path": path, "root_path": "/below", "headers": []}
    assert b'href="../docs"' in not_found_page(Request(scope)).body


@pytest.mark.parametrize(
    ("method", "path", "accept", "status"),
    [
        ("GET", "/nothing", "*/*", 404),
        ("GET", "/nothing", "application/json, text/html;q=0.9", 404),
        ("GET", "/nothing", "text/html;q=0", 404),
        ("POST", "/nothing", "text/html", 404),
        ("GET", "/check-ports", "text/html", 405),
    ],
)
def test_programs_are_answered_in_json(
    client: httpx.Client, method: str, path: str, accept: str, status: int
) -> None:
    answer = client.request(method, path, headers={"Accept": accept})
    assert answer.status_code == status
    assert answer.json()["detail"]["code"]


def test_the_page_is_told_what_the_program_says() -> None:
    settings = Settings(
        max_ports=7, retries=2, retry_delay=0.5, timeout=3, perspectives=("http://127.0.0.1:1",)
    )
    with serve(create_app(settings)) as client:
        page = client.get("/", headers=BROWSER).text
    found = re.search(r'<script type="application/json" id="page-data">(.*?)</script>', page)
    assert found
    data = json.loads(found[1])
    sentences: dict[str, str] = data.pop("advice")

    def sentence_for(error: str) -> str:
        return next(sentences[words] for words in sentences if error.startswith(words))

    assert sentence_for("Connection refused") == advice.PAGE_REFUSED
    assert sentence_for("Connection timed out") == advice.PAGE_TIMED_OUT
    assert sentence_for("Permission denied") == advice.PAGE_UNREACHABLE
    assert sentence_for("certificate expired") == advice.CERTIFICATE_EXPIRED
    assert sentence_for("TLS handshake failed: timed out") == advice.TLS_HANDSHAKE_FAILED
    assert data == {
        "tlsErrors": [words for words in TLS_KINDS if words],
        "reachable": advice.PAGE_REACHABLE,
        "allReachable": advice.PAGE_ALL_REACHABLE,
        "nearby": advice.PAGE_NEARBY,
        "validCertificate": advice.PAGE_CERTIFICATE_VALID,
        "longestCheck": 7.5,  # a second more for the other place
        "maxPorts": 7,
    }


def test_our_own_files_are_small() -> None:
    assert sum(len(gzip.compress(path.read_bytes())) for path in WEB.iterdir()) < 25_000


def test_what_a_visitor_loads_is_small(client: httpx.Client) -> None:
    page = client.get("/", headers=BROWSER)
    sizes = [len(page.content)]
    for url in urls(page.text):
        if url.startswith("static/") and not url.endswith(".whl"):
            with client.stream("GET", url, headers={"Accept-Encoding": "gzip"}) as answer:
                sizes.append(len(b"".join(answer.iter_raw())))
    assert sum(sizes) < 25_000


def test_the_schema_stands_beside_the_service(client: httpx.Client) -> None:
    answer = client.get("/openapi.json").raise_for_status()
    assert answer.headers["Cache-Control"] == "no-store"
    schema: dict[str, Any] = answer.json()
    assert schema["servers"] == [{"url": "."}]
