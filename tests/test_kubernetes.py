"""The manifests in contrib/: against Kubernetes' own schemas, and against the program."""

import importlib
import subprocess
import sys
from typing import Any

import pytest

from port_checker.settings import Settings
from tests.support.cli import Done, invoke
from tests.support.http import client_of
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
def test_a_pod_answers_its_probes_and_prometheus() -> None:
    (container,) = pod()["containers"]
    environment: dict[str, str] = {each["name"]: each["value"] for each in container["env"]}
    environment["PORT_CHECKER_PORT"] = "9000"  # the default, for which the helper has another
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    annotations = manifest("deployment")["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(ports["metrics"])
    assert manifest("service")["spec"]["ports"][0]["targetPort"] == "http"
    probes = [container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")]
    asked = {("metrics", "/metrics"), *((probe["port"], probe["path"]) for probe in probes)}
    with loopback_alone(), program(ready=True, descriptors=None, **environment):
        for host in "127.0.0.1", "[::1]":
            for port, path in asked:
                with client_of(f"http://{host}:{ports[port]}") as client:
                    assert client.get(path).status_code == 200


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
    assert invoke("serve", "--check-settings", **links) == Done(
        2,
        "",
        "port-checker: PORT_CHECKER_PORT='tcp://10.0.0.1:80' is wrong: "
        "it must be a port to listen on, from 1 to 65535\n",
    )
    assert pod()["enableServiceLinks"] is False
    # Those of a Service with the name that ours has are no settings, nor taken for misspelt ones.
    prefix = manifest("service")["metadata"]["name"].upper().replace("-", "_")
    others = {prefix + name.removeprefix("PORT_CHECKER"): value for name, value in links.items()}
    assert invoke("serve", "--check-settings", **others) == Done(0, "", "")
