"""The manifests in contrib/: against Kubernetes' own schemas, and against the program."""

import importlib
import os
import subprocess
import sys
from typing import Any

import httpx
import pytest

from port_checker.settings import Settings
from tests.support.namespace import ROOT, loopback_alone, needs_root
from tests.support.packages import needs
from tests.support.service import program

pytestmark = needs("kubernetes_validate")

MANIFESTS = ROOT / "contrib" / "kubernetes"


def manifest(name: str) -> Any:
    return importlib.import_module("yaml").safe_load((MANIFESTS / f"{name}.yaml").read_text())


def pod() -> Any:
    return manifest("deployment")["spec"]["template"]["spec"]


@pytest.mark.parametrize("name", ["deployment", "service", "networkpolicy"])
def test_kubernetes_understands_its_manifests(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kubernetes_validate", "--strict", str(MANIFESTS / f"{name}.yaml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_root
@pytest.mark.parametrize("has_ipv6", [True, False])
def test_a_pod_answers_its_probes_and_prometheus(*, has_ipv6: bool) -> None:
    (container,) = pod()["containers"]
    environment: dict[str, str] = {each["name"]: each["value"] for each in container["env"]}
    environment["PORT_CHECKER_PORT"] = "9000"  # the default, for which the helper has another
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    annotations = manifest("deployment")["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(ports["metrics"])
    assert manifest("service")["spec"]["ports"][0]["targetPort"] == "http"
    without = "sysctl -qw net.ipv6.conf.all.disable_ipv6=1"
    with (
        loopback_alone(*([] if has_ipv6 else [without])),
        program(ready=True, descriptors=None, **environment),
    ):
        for host in ("127.0.0.1", "[::1]") if has_ipv6 else ("127.0.0.1",):
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                asked = container[probe]["httpGet"]
                url = f"http://{host}:{ports[asked['port']]}{asked['path']}"
                assert httpx.get(url).status_code == 200
            assert httpx.get(f"http://{host}:{ports['metrics']}/metrics").status_code == 200


def test_a_pod_has_the_time_that_its_checks_need_to_finish() -> None:
    (container,) = pod()["containers"]
    command, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    assert pod()["terminationGracePeriodSeconds"] > float(seconds) + Settings().longest_check + 10


def test_links_to_a_service_of_a_setting_s_name_would_keep_it_from_starting() -> None:
    # What the kubelet sets for a Service named port-checker, unless enableServiceLinks is false.
    links = {
        "PORT_CHECKER_SERVICE_HOST": "10.0.0.1",
        "PORT_CHECKER_SERVICE_PORT": "80",
        "PORT_CHECKER_PORT": "tcp://10.0.0.1:80",
        "PORT_CHECKER_PORT_80_TCP": "tcp://10.0.0.1:80",
    }
    assert check_settings(**links) == (
        2,
        "port-checker: PORT_CHECKER_PORT='tcp://10.0.0.1:80' is wrong: "
        "it must be a port to listen on, from 1 to 65535\n",
    )
    assert pod()["enableServiceLinks"] is False
    # Those of a Service with the name that ours has are no settings, nor taken for misspelt ones.
    prefix = manifest("service")["metadata"]["name"].upper().replace("-", "_")
    others = {prefix + name.removeprefix("PORT_CHECKER"): value for name, value in links.items()}
    assert check_settings(**others) == (0, "")


def check_settings(**environment: str) -> tuple[int, str]:
    """What the program says of these settings, and its exit status."""
    done = subprocess.run(
        [sys.executable, "-m", "port_checker", "serve", "--check-settings"],
        env={**os.environ, **environment},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr
