"""A Chromium in a network namespace that has nothing but loopback."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.support.browser import ADDRESS, FLAGS, HANGS_AFTER, Visitor
from tests.support.namespace import loopback_alone

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module", autouse=True)
def _loopback_alone() -> Iterator[None]:
    if os.environ.get("CI") != "true" and (not CHROMIUM or os.geteuid() != 0):
        pytest.skip("needs Debian's chromium, and root for a network namespace")
    with loopback_alone(
        f"ip address add {ADDRESS} dev lo",
        # No connection gets a port that tests listen on.
        "echo 50800-50899 > /proc/sys/net/ipv4/ip_local_reserved_ports",
    ):
        yield


@pytest.fixture(scope="module")
def chromium(_loopback_alone: None) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Browser) -> Iterator[Callable[..., Visitor]]:
    """Open a URL in a browser of its own, which Playwright's settings describe."""
    visitors = []
    with ExitStack() as stack:

        def open_url(url: str, **settings: Any) -> Visitor:
            context = stack.enter_context(chromium.new_context(**settings))
            context.set_default_timeout(HANGS_AFTER)
            visitor = Visitor(context.new_page())
            visitors.append(visitor)
            visitor.page.goto(url)
            return visitor

        yield open_url
        for visitor in visitors:
            assert not visitor.problems
            assert {urlsplit(request.url).netloc for request in visitor.requests} == {
                urlsplit(visitor.page.url).netloc
            }
