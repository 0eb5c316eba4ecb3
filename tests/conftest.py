"""For all tests: no settings of the developer, a TLS authority, and which tests share a process."""

import os
from pathlib import Path
from typing import Any

import pytest
import trustme
from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]  # has no types

from tests.support.tls import trust


@pytest.fixture(autouse=True)
def _no_settings_of_the_developer(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for name in os.environ:
        if name.startswith(("PORT_CHECK_", "PORT_CHECKER_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))  # without a .env


@pytest.fixture
def authority(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> trustme.CA:
    """The only authority that this process trusts, and the processes that it starts."""
    authority = trustme.CA()
    trust(authority, monkeypatch, tmp_path)
    return authority


class _Scheduling(LoadScopeScheduling):  # type: ignore[misc]  # the same
    """Any process takes the next test, but what is built once for several tests stays in one.

    That is the lab, a browser, and what a parametrized test has in a fixture.
    """

    def _split_scope(self, nodeid: str) -> str:
        folder, _, _ = nodeid.partition("/test_")
        return folder if folder in ("tests/lab", "tests/browser") else nodeid.partition("[")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return _Scheduling(config, log)
