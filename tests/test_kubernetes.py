"""The manifests in contrib/, against Kubernetes' own schemas."""

import subprocess
import sys

import pytest

from tests.support.namespace import ROOT
from tests.support.packages import needs

pytestmark = needs("kubernetes_validate")


@pytest.mark.parametrize("name", ["deployment", "service", "networkpolicy"])
def test_kubernetes_understands_its_manifests(name: str) -> None:
    manifest = ROOT / "contrib" / "kubernetes" / f"{name}.yaml"
    done = subprocess.run(
        [sys.executable, "-m", "kubernetes_validate", "--strict", str(manifest)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
