"""What is shipped for operators beside the package."""

import json
import os
import re
import shutil
import subprocess

import pytest

from port_checker.metrics import DURATION, FAMILIES
from tests.support.namespace import ROOT

PROMETHEUS = ROOT / "contrib" / "prometheus"

OTHERS = [family for family in FAMILIES if family is not DURATION]

# Metrics by the names that expressions use.
METRICS = {
    *(f"port_checker_{each.name}" + "_total" * each.is_counter for each in OTHERS),
    f"port_checker_{DURATION.name}_bucket",
    "port_checker_build_info",
    "port_checker_workers",
    "port_checker_worker_deaths_total",
}


@pytest.mark.skipif(
    os.environ.get("CI") != "true" and not shutil.which("promtool"),
    reason="promtool of prometheus judges the rules",
)
@pytest.mark.parametrize("command", ["check rules rules.yml", "test rules rules_test.yml"])
def test_promtool_finds_no_fault_with_the_rules(command: str) -> None:
    done = subprocess.run(
        ["promtool", *command.split()], cwd=PROMETHEUS, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("name", ["rules.yml", "dashboard.json"])
def test_rules_and_dashboard_use_metrics_that_there_are(name: str) -> None:
    text = (PROMETHEUS / name).read_text()
    assert set(re.findall(r"\bport_checker_\w+", text)) <= METRICS


def test_the_dashboard_shows_every_metric() -> None:
    text = (PROMETHEUS / "dashboard.json").read_text()
    assert json.loads(text)["panels"]
    assert set(re.findall(r"\bport_checker_\w+", text)) == METRICS
