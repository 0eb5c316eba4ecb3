"""For all tests: no settings of the developer, a TLS authority, and names of failures at once."""

import gc
import os
import signal
import tempfile
from collections.abc import Iterator

import pytest
import trustme

from tests.support.packages import is_missing

collect_ignore = ["browser"] if is_missing("playwright") else []


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> trustme.CA:
    """The only authority that a test trusts, and the programs that it starts.

    To load those of the system takes each of them 20 ms of CPU (measured).
    """
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path_factory.getbasetemp() / "authority.pem"))
    return authority


@pytest.fixture(autouse=True)
def _no_settings_of_the_developer(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
    authority: trustme.CA,  # noqa: ARG001  # its file is there
) -> None:
    for name in os.environ:
        if name.startswith(("PORT_CHECK_", "PORT_CHECKER_")):
            monkeypatch.delenv(name)
    base = tmp_path_factory.getbasetemp()
    monkeypatch.setenv("SSL_CERT_FILE", str(base / "authority.pem"))
    monkeypatch.setenv("SSL_CERT_DIR", str(base / "none"))
    # Without a .env. pytest's mktemp() looks at all directories that it has made.
    monkeypatch.chdir(tempfile.mkdtemp(dir=base))


def pytest_configure() -> None:
    """Have signals mean what they usually do, to programs that the tests start, too.

    A run in the background, or one of nohup(1), inherits that some are ignored.
    """
    for number in (signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Keep what is imported and collected from the garbage collector.

    It finds nothing there, and takes a second of CPU in each process to look (measured).
    """
    gc.disable()
    yield
    gc.enable()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """See that groups are kept together, without which each process builds a lab of its own."""
    if hasattr(config, "workerinput"):  # it is one of pytest-xdist's processes
        grouped = [item for item in items if item.get_closest_marker("xdist_group")]
        if not all("@" in item.nodeid for item in grouped):
            raise pytest.UsageError("pytest-xdist parts the tests of an xdist_group")


def pytest_report_header() -> list[str]:
    """Say what cannot even be skipped."""
    return [f"tests/{name} is left out: playwright is in the extra dev" for name in collect_ignore]


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """Name a test when it fails: the summary may be minutes away."""
    if report.failed:
        outcome = "failed" if report.when == "call" else "error"
        return outcome, f"\n{outcome.upper()} {report.nodeid}\n", outcome.upper()
    return None
