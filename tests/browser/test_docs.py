"""/docs: Swagger UI in our own page."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import expect

from port_checker.schemas import ERROR_EXAMPLES
from tests.support.browser import ADDRESS, Visitor
from tests.support.loopback import open_port
from tests.support.proxies import needs_proxies, nginx
from tests.support.service import serve

pytestmark = pytest.mark.xdist_group("browser")

Visit = Callable[..., Visitor]

# What axe finds in Swagger UI's own markup and colours.
SWAGGER_UI = {"color-contrast", "heading-order", "label", "nested-interactive", "select-name"}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with open_port() as port, serve(port=port, retries=1) as client:
        yield str(client.base_url)


def open_operation(visitor: Visitor, name: str) -> None:
    visitor.page.locator(f"#{name} .opblock-summary-control").click()


def test_the_prefilled_check_works_on_one_machine(url: str, visit: Visit) -> None:
    visitor = visit(f"{url}/docs")
    open_operation(visitor, "operations-checks-check_ports")
    with visitor.page.expect_response("**/check-ports") as answered:
        visitor.page.get_by_role("button", name="Execute").click()
    answer: dict[str, Any] = answered.value.json()
    assert answer["message"] == "Successfully verified 1 out of 1 ports"
    expect(visitor.page.locator(".live-responses-table")).to_contain_text(answer["message"])


@needs_proxies
def test_the_prefilled_check_is_of_the_visitors_own_address(
    url: str, visit: Visit, tmp_path: Path
) -> None:
    forwards = "proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;"
    host = "proxy_set_header Host $http_host;"
    with nginx(tmp_path, httpx.URL(url).port or 0, forwards, host, host=ADDRESS) as port:
        visitor = visit(f"http://{ADDRESS}:{port}/docs")
        open_operation(visitor, "operations-checks-check_ports")
        with visitor.page.expect_response("**/check-ports") as answered:
            visitor.page.get_by_role("button", name="Execute").click()
        assert answered.value.status == 200
    assert visitor.checks == [{"provider_ip": ADDRESS, "ports": [7466, 50800, 50801]}]


def test_every_error_shows_its_example(url: str, visit: Visit) -> None:
    visitor = visit(f"{url}/docs")
    open_operation(visitor, "operations-checks-check_ports")
    rows = visitor.page.locator("tr.response", has=visitor.page.locator(".examples-select-element"))
    expect(rows.first).to_be_visible()
    shown = set()
    for row in rows.all():
        choice = row.locator(".examples-select-element")
        for code in choice.locator("option").all_inner_texts():
            choice.select_option(code)
            expect(row.locator("pre.example")).to_contain_text(f'"code": "{code}"')
            shown.add(code)
    assert shown == set(ERROR_EXAMPLES)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_what_is_swagger_uis_own(url: str, visit: Visit, scheme: str) -> None:
    visitor = visit(f"{url}/docs", color_scheme=scheme)
    open_operation(visitor, "operations-checks-check_ports")
    expect(visitor.page.get_by_role("button", name="Execute")).to_be_visible()
    assert set(visitor.violations()) == SWAGGER_UI


def test_without_javascript_it_leads_to_the_schema(url: str, visit: Visit) -> None:
    link = visit(f"{url}/docs", java_script_enabled=False).page.locator("noscript a")
    expect(link).to_be_visible()
    expect(link).to_have_attribute("href", "openapi.json")
