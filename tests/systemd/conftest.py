"""What the service is installed from where there is no network."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.namespace import ROOT


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, and those that it needs, since the container has no network."""
    directory = tmp_path_factory.mktemp("wheels")
    words = [sys.executable, "-m", "pip", "wheel", "--quiet", "--wheel-dir", str(directory)]
    words += ["--constraint", "constraints.txt", ".[metrics,redis]", "hatchling"]
    words += ["async-timeout"]  # which redis needs on Debian 12's Python 3.11.2
    subprocess.run(words, cwd=ROOT, check=True)
    return directory
