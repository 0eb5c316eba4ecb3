"""What a browser test needs besides a browser."""

from collections.abc import Callable
from typing import Any, Self

from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]  # has none
from playwright.sync_api import ConsoleMessage, Page, Request, expect

# An address of the namespace: whoever connects to it comes from it. 127.0.0.1 is a trusted proxy's,
# and so no caller's behind one.
ADDRESS = "203.0.113.7"
# Names in the browser. That of the service leads to that address, the others to loopback.
SERVICE = "checker.example"
OTHER_SITE = "elsewhere.example"
OWN_NAME = "provider.example"

HANGS_AFTER = 60_000  # milliseconds
expect.set_options(timeout=HANGS_AFTER)

FLAGS = [
    "--no-sandbox",  # Chromium's own sandbox does not work for root
    "--disable-gpu",
    "--disable-lcd-text",  # for pictures without coloured edges
    "--disable-quic",
    "--explicitly-allowed-ports=10080",  # a test may get it, and browsers refuse it
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    f"--host-resolver-rules=MAP {SERVICE} {ADDRESS}, MAP {OTHER_SITE} 127.0.0.1, "
    f"MAP {OWN_NAME} 127.0.0.1",
]


class Visitor:
    """Somebody with a browser, whose page must not show a fault.

    Attributes:
        page: The page that is open.
        requests: What it asked for, in order.
        problems: Errors on its console, of its script and of its content policy.
    """

    def __init__(self, page: Page) -> None:
        self.page = page
        self.requests: list[Request] = []
        self.problems: list[str] = []
        self._listeners: dict[Any, Callable[[Any], None]] = {
            "request": lambda request: self.requests.append(request),
            "console": self._listen,
            "pageerror": lambda error: self.problems.append(str(error)),
        }

    def __enter__(self) -> Self:
        for event, listener in self._listeners.items():
            self.page.on(event, listener)
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the page to the next visitor, who must not hear how this one's ends."""
        self.page.goto("about:blank")
        for event, listener in self._listeners.items():
            self.page.remove_listener(event, listener)

    def _listen(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(message.text)

    @property
    def checks(self) -> list[Any]:
        """The bodies of the checks that it asked for."""
        return [sent.post_data_json for sent in self.requests if sent.method == "POST"]

    def check(self, *ports: int | str) -> None:
        """Enter ports and have them checked."""
        self.page.get_by_label("Ports").fill(", ".join(map(str, ports)))
        self.page.get_by_role("button", name="Check", exact=True).click()

    def check_certificate(self, port: int | str) -> None:
        """Enter an HTTPS port and have its certificate checked."""
        if not self.page.get_by_label("HTTPS port").is_visible():
            self.page.get_by_text("Check an HTTPS certificate").click()
        self.page.get_by_label("HTTPS port").fill(str(port))
        self.page.get_by_role("button", name="Check certificate").click()

    def rows(self) -> list[tuple[str, ...]]:
        """The ports, verdict and sentence of each row of the results."""
        expect(self.page.locator("#results")).to_be_visible()
        expect(self.page.locator("[aria-disabled=true]")).to_have_count(0)  # all have come
        rows = self.page.locator("#results tbody tr").all()
        return [
            (row.locator("th").inner_text(), *row.locator("p").all_inner_texts()) for row in rows
        ]

    def status(self) -> str:
        """What the page says of how it goes."""
        return self.page.locator("#status").inner_text()

    def violations(self) -> dict[str, list[str]]:
        """What axe finds: the elements by the rule that they break."""
        found = Axe().run(self.page).response["violations"]
        return {rule["id"]: [node["html"] for node in rule["nodes"]] for rule in found}

    def forgive(self, fault: str) -> None:
        """Take the one problem that a test provokes, and that the browser notes on its console."""
        (problem,) = self.problems
        assert fault in problem
        self.problems.clear()

    def expect_status(self, text: str) -> None:
        expect(self.page.locator("#status")).to_have_text(text)
