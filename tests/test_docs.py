"""README and docs name all that there is, and say what the service answers."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import httpx
import pytest
from dotenv import dotenv_values

from port_checker.api.app import create_app
from port_checker.api.errors import STATUS
from port_checker.metrics import Metrics, Totals
from port_checker.schemas import ErrorCode
from port_checker.server.prometheus import expose
from port_checker.server.run import listen
from port_checker.settings import Settings
from tests.support.namespace import ROOT, loopback_alone, needs_root
from tests.support.service import program

DOCS = ROOT / "docs"
PAGES = [*ROOT.glob("*.md"), *DOCS.glob("*.md")]

# A command, and the block behind it that shows what it prints.
EXAMPLE = re.compile(r"^```bash\n([^`]+)^```\n\n^```(?:json|text)\n([^`]+)^```$", re.MULTILINE)

needs_curl = pytest.mark.skipif(
    os.environ.get("CI") != "true" and not shutil.which("curl"),
    reason="the examples use curl",
)


def table(page: str, heading: str) -> list[list[str]]:
    """The cells of the rows of the first table under a heading."""
    section = (DOCS / page).read_text().partition(f"{heading}\n")[2]
    rows = [line.strip("| ").split(" | ") for line in re.findall(r"^\|.*\|$", section, re.M)]
    end = next((n for n, row in enumerate(rows) if n > 1 and row[0].startswith("---")), len(rows))
    return rows[2:end]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_docs_have_every_error_code_with_its_status() -> None:
    documented = {
        (quoted(code)[0], int(status)) for code, status, _ in table("api.md", "## Errors")
    }
    not_http = (ErrorCode.INVALID_REQUEST, 400)
    assert documented - {not_http} == set(STATUS.items())
    assert STATUS.keys() == set(ErrorCode)


def test_picture_of_the_way_has_verdicts_that_there_are() -> None:
    picture = ElementTree.parse(DOCS / "where-packets-die.svg")  # noqa: S314  # our own file
    verdicts = {text.text for text in picture.iterfind(".//*[@class='verdict']")}
    documented = {
        name for row in table("api.md", "## `POST /check-ports`") for name in quoted(row[0])
    }
    assert verdicts
    assert verdicts <= documented


def test_the_page_about_providers_software_says_what_the_docs_say() -> None:
    command = [sys.executable, ".ci/provider_page.py"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    page = ROOT / "port_checker" / "api" / "web" / "golem-provider.html"
    assert made.stdout == page.read_text(), "make provider-page writes it anew"


def test_docs_have_every_setting_with_its_default() -> None:
    documented = {
        quoted(variable)[0]: "" if default == "empty" else quoted(default)[0]
        for variable, default, _ in table("settings.md", "# Settings")
    }
    assert documented == dotenv_values(ROOT / ".env.example")


def test_docs_have_every_metric_and_what_its_labels_say() -> None:
    totals = Totals()
    totals.add(Metrics().row, perspectives=["ams.checker.example"])
    listener = listen("127.0.0.1", 0)
    expose(totals, listener)
    text = httpx.get(f"http://127.0.0.1:{listener.getsockname()[1]}/metrics", timeout=30).text
    names = re.findall(r"^# TYPE (port_checker_\w+)", text, re.MULTILINE)
    labels = {
        (name, ",".join(label for label in re.findall(r'(\w+)="', pairs) if label != "le"))
        for name, pairs in re.findall(r"^(\w+?)(?:_bucket|_count|_sum)?{(.*)}", text, re.MULTILINE)
    }
    values = set(re.findall(r'^port_checker_\w+_total{.*?="([^"]*)"}', text, re.MULTILINE))

    rows = table("operating.md", "## Metrics")
    documented = {name for cell, _ in rows for name in quoted(cell)} - {"process_*"}
    assert {name.partition("{")[0] for name in documented} == set(names)
    with_label = {name for name in documented if "{" in name}
    assert with_label == {f"{name}{{{label}}}" for name, label in labels if label}
    assert values <= {*ErrorCode} | {word for _, meaning in rows for word in quoted(meaning)}


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r'(?:\]\(|src(?:set)?=")([^)":]+)[)"]', page.read_text()):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_readme_leads_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text()
    assert {page.name for page in DOCS.glob("*.md")} <= set(
        re.findall(r"docs/([\w-]+\.md)", readme)
    )


def test_docs_have_every_operation() -> None:
    paths = create_app(Settings()).openapi()["paths"]
    operations = {f"{method.upper()} {path}" for path in paths for method in paths[path]}
    headings = re.findall(r"^## `(.*)`$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert operations == set(headings)


@needs_root
@needs_curl
def test_examples_print_what_is_shown() -> None:
    examples = [example for page in PAGES for example in EXAMPLE.findall(page.read_text())]
    assert len(examples) >= 7
    # With the port of the examples, which nobody else has in a namespace, and none of whose own
    # connections takes a port that another example checks.
    reserve = "sysctl -qw net.ipv4.ip_local_reserved_ports=7466,50800-50899"
    with loopback_alone(reserve), program(PORT_CHECKER_PORT="9000"):
        for command, shown in examples:
            command = command.replace(".venv/bin/port-checker", f"{sys.executable} -m port_checker")
            done = subprocess.run(
                ["sh", "-c", command], capture_output=True, text=True, timeout=60, check=False
            )
            assert done.stdout.strip() == shown.strip(), command + done.stderr
