"""A Chromium in a network namespace that has nothing but loopback."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, Literal
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, ViewportSize, sync_playwright

from tests.support.browser import ADDRESS, FLAGS, HANGS_AFTER, Visitor
from tests.support.namespace import loopback_alone

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="package", autouse=True)
def _loopback_alone() -> Iterator[None]:
    if os.environ.get("CI") != "true" and (not CHROMIUM or os.geteuid() != 0):
        pytest.skip("needs Debian's chromium, and root for a network namespace")
    with loopback_alone(
        f"ip address add {ADDRESS} dev lo",
        # No connection gets a port that tests listen on.
        "echo 50800-50899 > /proc/sys/net/ipv4/ip_local_reserved_ports",
    ):
        yield


@pytest.fixture(scope="package")
def chromium(_loopback_alone: None) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def window(chromium: Browser) -> Iterator[Page]:
    """What most tests share: to open another one takes longer than most of them."""
    with chromium.new_context() as context:
        yield context.new_page()


@pytest.fixture
def visit(chromium: Browser, window: Page) -> Iterator[Callable[..., Visitor]]:
    """Open a URL: in the window that tests share, or in a browser with other settings.

    How large that window is and which colours its user prefers can be chosen for each visit.
    """
    visitors = []
    with ExitStack() as stack:

        def open_url(
            url: str,
            viewport: ViewportSize | None = None,
            color_scheme: Literal["light", "dark"] = "light",
            **settings: Any,
        ) -> Visitor:
            page = window
            if settings:
                page = stack.enter_context(chromium.new_context(**settings)).new_page()
            page.set_default_timeout(HANGS_AFTER)
            page.set_viewport_size(viewport or {"width": 1280, "height": 720})
            page.emulate_media(media="null", color_scheme=color_scheme)
            visitor = stack.enter_context(Visitor(page))
            visitors.append(visitor)
            page.goto(url)
            return visitor

        yield open_url
        for visitor in visitors:
            assert not visitor.problems
            assert {urlsplit(request.url).netloc for request in visitor.requests} == {
                urlsplit(visitor.page.url).netloc
            }
