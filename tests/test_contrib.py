"""What is shipped for operators beside the package."""

import configparser
import json
import logging
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from port_checker.addresses import parse_address
from port_checker.api.records import RefusalLog
from port_checker.errors import ErrorCode, Limit
from port_checker.metrics import DURATION, FAMILIES, REQUESTS
from tests.support.http import client_of
from tests.support.loopback import is_listened_on
from tests.support.namespace import ROOT, loopback_alone, needs_root
from tests.support.processes import end_with_parent
from tests.support.service import serve
from tests.support.waiting import wait_until

PROMETHEUS = ROOT / "contrib" / "prometheus"

HISTOGRAMS = (DURATION, REQUESTS)
OTHERS = [family for family in FAMILIES if family not in HISTOGRAMS]

# Metrics by the names that expressions use.
METRICS = {
    *(f"port_checker_{each.name}" + "_total" * each.is_counter for each in OTHERS),
    *(f"port_checker_{each.name}_bucket" for each in HISTOGRAMS),
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
    less_work = ["env", "GOGC=400", "GOMAXPROCS=1"]  # by a third (measured)
    words = [*less_work, "promtool", *command.split()]
    done = subprocess.run(words, cwd=PROMETHEUS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""


@needs_root
@pytest.mark.skipif(
    os.environ.get("CI") != "true" and not shutil.which("prometheus-blackbox-exporter"),
    reason="prometheus-blackbox-exporter is not installed",
)
def test_the_blackbox_exporter_tests_the_service_with_its_modules(tmp_path: Path) -> None:
    with loopback_alone(), serve(on_port=9000), (tmp_path / "log").open("wb") as log:
        exporter = subprocess.Popen(
            [
                "prometheus-blackbox-exporter",
                f"--config.file={PROMETHEUS / 'blackbox.yml'}",
                "--web.listen-address=127.0.0.1:9115",
            ],
            stderr=log,
            preexec_fn=end_with_parent,
        )

        def is_success(module: str, path: str) -> bool:
            asked = {"module": module, "target": f"http://127.0.0.1:9000/{path}"}
            with client_of("http://127.0.0.1:9115") as client:
                return "\nprobe_success 1\n" in client.get("probe", params=asked).text

        try:
            wait_until(lambda: is_listened_on(9115), "the exporter")
            assert is_success("port_checker", "health")
            assert not is_success("port_checker", "ip")
            assert is_success("port_checker_check", "port/9115")
            assert not is_success("port_checker_check", "port/9")
        finally:
            exporter.kill()
            exporter.wait()


@pytest.mark.parametrize("name", ["rules.yml", "dashboard.json"])
def test_rules_and_dashboard_use_metrics_that_there_are(name: str) -> None:
    text = (PROMETHEUS / name).read_text()
    assert set(re.findall(r"\bport_checker_\w+", text)) <= METRICS


def test_no_two_panels_of_the_dashboard_lie_on_each_other_or_have_one_id() -> None:
    panels = json.loads((PROMETHEUS / "dashboard.json").read_text())["panels"]
    cells = [
        (place["x"] + column, place["y"] + row)
        for place in (panel["gridPos"] for panel in panels)
        for column in range(place["w"])
        for row in range(place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_the_dashboard_shows_rates_as_such() -> None:
    for panel in json.loads((PROMETHEUS / "dashboard.json").read_text())["panels"]:
        expressions = [target["expr"] for target in panel["targets"]]
        unit = panel["fieldConfig"]["defaults"]["unit"]
        if any(re.match(r"sum by \([\w, ]+\) \(rate\(", each) for each in expressions):
            assert unit in ("cps", "reqps"), panel["title"]


def test_the_dashboard_shows_every_metric() -> None:
    text = (PROMETHEUS / "dashboard.json").read_text()
    assert json.loads(text)["panels"]
    assert set(re.findall(r"\bport_checker_\w+", text)) == METRICS


@pytest.mark.parametrize("caller", ["192.0.2.7", "2001:db8::7"])
def test_fail2ban_bans_on_limits_of_the_caller_alone(
    caller: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "port_checker")
    definition = configparser.ConfigParser(interpolation=None)
    definition.read(ROOT / "contrib" / "fail2ban" / "filter.d" / "port-checker.conf")
    failregex = definition["Definition"]["failregex"].replace("<ADDR>", r"(?P<ip>[\da-f:.]+)")
    target = parse_address("203.0.113.5")
    banned = set()
    for limit in [None, *Limit]:
        for code in ErrorCode:
            caplog.clear()
            RefusalLog().add(parse_address(caller), code, limit, target)
            line = f"{caplog.records[0].name}: {caplog.messages[0]}"
            if match := re.search(failregex, f"host port-checker[7]: INFO {line}"):
                assert match["ip"] == caller
                banned.add(limit)
    assert banned == {limit for limit in Limit if limit.startswith("caller_")}
