"""contrib/compose.yaml: what it starts works together, without the images it starts it from."""

import importlib
import os
import shutil
import subprocess
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from dotenv import dotenv_values

from port_checker.settings import Settings
from tests.support.http import client_of
from tests.support.namespace import ROOT, loopback_alone, needs_root
from tests.support.packages import needs
from tests.support.processes import end_with_parent
from tests.support.proxies import as_shipped
from tests.support.service import program
from tests.support.waiting import wait_until

PROMETHEUS = ROOT / "contrib" / "prometheus"


@needs_root
@needs("yaml")
@pytest.mark.skipif(
    os.environ.get("CI") != "true"
    and not all(map(shutil.which, ["prometheus", "redis-server", "nginx"])),
    reason="prometheus, redis-server or nginx is not installed",
)
def test_what_compose_puts_together_works_together(tmp_path: Path) -> None:
    # Without the images, which come from the network: all are on the host's, here a namespace.
    yaml: Any = importlib.import_module("yaml")
    services = yaml.safe_load((ROOT / "contrib" / "compose.yaml").read_text())["services"]
    checker, redis, prometheus = (
        services[each] for each in ("port-checker", "redis", "prometheus")
    )
    mounted = [
        volume.split(":") for each in services.values() for volume in each.get("volumes", [])
    ]
    assert all((ROOT / "contrib" / source).exists() for source, *_ in mounted)
    assert (ROOT / "contrib" / checker["build"]["context"] / "Containerfile").exists()
    assert all("max-size" in each["logging"]["options"] for each in services.values())
    assert checker["environment"].keys() <= dotenv_values(ROOT / ".env.example").keys()
    assert float(checker["stop_grace_period"].rstrip("s")) > Settings().longest_check
    arguments = [
        each.replace("/etc/prometheus/", f"{PROMETHEUS}/") for each in prometheus["command"]
    ]
    commands = [
        [*redis["command"], "--bind", "127.0.0.1"],
        ["prometheus", *arguments, "--storage.tsdb.path", str(tmp_path / "data")],
    ]
    with ExitStack() as stack:
        stack.enter_context(loopback_alone())
        for command in commands:
            log = stack.enter_context((tmp_path / "log").open("ab"))
            process = subprocess.Popen(
                command, cwd=tmp_path, stdout=log, stderr=log, preexec_fn=end_with_parent
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
        running = stack.enter_context(
            program(**checker["environment"], PORT_CHECKER_PORT="9000", ready=True)
        )
        stack.enter_context(as_shipped(ROOT / "contrib" / "nginx.conf", tmp_path))
        store = {"port_checker_rate_limit_store_up": "1"}

        client = stack.enter_context(client_of("http://127.0.0.1:9090/api/v1"))

        def scraped() -> dict[str, str]:
            with suppress(httpx.TransportError):
                query = {"query": '{__name__="port_checker_rate_limit_store_up"}'}
                found = client.get("query", params=query).json()["data"]["result"]
                return {each["metric"]["__name__"]: each["value"][1] for each in found}
            return {}

        wait_until(lambda: scraped() == store, "Prometheus to scrape")
        rules = client.get("rules").json()["data"]["groups"]
        assert {rule["health"] for group in rules for rule in group["rules"]} <= {"ok", "unknown"}
        assert running.process.poll() is None
