"""GET /port/{port}: the caller's own port, in a line of text."""

from collections.abc import Iterator

import httpx
import pytest

from tests.support.loopback import open_port, refused_port, silent_port
from tests.support.namespace import loopback_alone, needs_root
from tests.support.service import ask, serve

JSON = {"Accept": "application/json"}


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with serve(caller_rate_limit=None, retries=1, timeout=1) as client:
        yield client


def test_a_port_to_the_byte(client: httpx.Client) -> None:
    with open_port() as opened, refused_port() as refused, silent_port() as silent:
        for port, verdict in {
            opened: "reachable",
            refused: "Connection refused",
            silent: "Connection timed out",
        }.items():
            answer = client.get(f"/port/{port}")
            assert (answer.status_code, answer.text) == (200, f"{port} {verdict}\n")
            assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
            assert answer.headers["Cache-Control"] == "no-store"
            assert answer.headers["Vary"] == "Accept"
            assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_the_same_in_json_is_the_answer_to_check_ports(client: httpx.Client) -> None:
    with refused_port() as port:
        answer = client.get(f"/port/{port}", headers=JSON)
        assert answer.content == ask(client, port).content
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Vary"] == "Accept"


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("*/*", "text/plain"),
        ("text/html, application/xhtml+xml;q=0.9, */*;q=0.8", "text/plain"),
        ("application/json;q=0, */*", "text/plain"),
        ("application/json-seq", "text/plain"),
        ("text/plain;q=0.5, Application/JSON; q=0.9", "application/json"),
        ("text/plain, application/json;q=0.9", "text/plain"),
    ],
)
def test_json_is_for_those_who_ask_for_it_by_name(
    client: httpx.Client, accept: str, media_type: str
) -> None:
    for path in f"/port/{client.base_url.port}", "/port/0":
        answer = client.get(path, headers={"Accept": accept})
        assert answer.headers["Content-Type"].partition(";")[0] == media_type


def test_the_address_is_the_callers(client: httpx.Client) -> None:
    with serve(host="::", retries=1) as service, open_port("::1") as port:
        assert service.get(f"/port/{port}").text == f"{port} reachable\n"
    unknown = client.get("/port/80", headers={"X-Forwarded-For": "unknown"})
    assert (unknown.status_code, unknown.text) == (
        403,
        "This service cannot see your address. Send it to /check-ports instead.\n",
    )


@pytest.mark.parametrize(
    ("port", "message"),
    [
        ("0", 'Port "0" is out of range (1-65535).'),
        ("65536", 'Port "65536" is out of range (1-65535).'),
        ("9" * 100, f'Port "{"9" * 39}… is out of range (1-65535).'),
        ("https", 'Port "https" is not an integer (1-65535).'),
        ("80.5", 'Port "80.5" is not an integer (1-65535).'),
        ("-80", 'Port "-80" is not an integer (1-65535).'),
        ("٨٠", 'Port "٨٠" is not an integer (1-65535).'),
    ],
)
def test_what_is_no_port_is_refused(client: httpx.Client, port: str, message: str) -> None:
    text, document = client.get(f"/port/{port}"), client.get(f"/port/{port}", headers=JSON)
    assert (text.status_code, text.text) == (422, f"{message}\n")
    assert text.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert document.status_code == 422
    assert document.json() == {"detail": {"code": "INVALID_PORT", "message": message}}


@pytest.mark.parametrize("path", ["/port", "/port/", "/port/80/", "/port/80/tcp"])
def test_nothing_else_is_there(client: httpx.Client, path: str) -> None:
    assert client.get(path).json()["detail"]["code"] == "NOT_FOUND"


def test_another_sites_page_cannot_have_its_visitor_checked(client: httpx.Client) -> None:
    for method in "GET", "HEAD":
        answer = client.request(method, "/port/80", headers={"Sec-Fetch-Site": "cross-site"})
        assert answer.status_code == 403
    typed = client.get(f"/port/{client.base_url.port}", headers={"Sec-Fetch-Site": "none"})
    assert typed.status_code == 200


def test_head_has_the_same_head(client: httpx.Client) -> None:
    with open_port() as port:
        full, head = client.get(f"/port/{port}"), client.head(f"/port/{port}")
    for answer in full, head:
        del answer.headers["Date"]
    assert (head.status_code, head.content, head.headers) == (200, b"", full.headers)
    assert client.post("/port/80").headers["Allow"] == "GET, HEAD"


def test_it_counts_as_a_request_and_a_port() -> None:
    with serve(caller_rate_limit="2/minute", retries=1) as client, open_port() as port:
        assert [client.get(f"/port/{it}").status_code for it in (port, "none")] == [200, 422]
        refused = client.get(f"/port/{port}")
        assert (refused.status_code, refused.text) == (
            429,
            f"You ask too often. Try again in {refused.headers['Retry-After']} s.\n",
        )
    with serve(own_rate_limit="1/minute", max_ports=1, retries=1) as client, open_port() as port:
        assert client.get(f"/port/{port}").status_code == 200
        assert client.get(f"/port/{port}").status_code == 429


def test_it_is_on_record(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with serve(retries=1) as client, open_port() as port:
        client.get(f"/port/{port}")
    (line,) = [it.getMessage() for it in caplog.records if it.name.endswith("records")]
    assert line.startswith("check caller=127.0.0.1 target=127.0.0.1 ports=1 outcome=completed")


@needs_root
def test_the_rules_of_who_may_be_checked_apply() -> None:
    """In a namespace: if it were, nobody would be reached."""
    with loopback_alone(), serve(retries=1, denied_networks="127.0.0.3") as client:
        no_route, denied = (
            client.get("/port/80", headers={"X-Forwarded-For": ip})
            for ip in ("198.51.100.9", "127.0.0.3")
        )
    assert (no_route.status_code, denied.status_code) == (503, 403)
    assert no_route.text.startswith("This service failed to check (")
    assert denied.text == "127.0.0.3 is in a network that this service does not check.\n"
