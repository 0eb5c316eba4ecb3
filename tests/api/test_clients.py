"""Clients that are generated from the schema make checks, and refuse what no check is."""

import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

import pytest
import trustme

from port_checker.api.app import create_app
from port_checker.settings import Settings
from tests.support.loopback import open_port, refused_port
from tests.support.packages import needs
from tests.support.service import serve
from tests.support.tls import https

pytestmark = needs("openapi_python_client")

TYPESCRIPT = Path(__file__).parent / "typescript"

needs_npm = pytest.mark.skipif(
    os.environ.get("CI") != "true" and not shutil.which("npm"),
    reason="TypeScript's compiler needs npm",
)


@pytest.fixture
def schema(tmp_path: Path) -> Path:
    file = tmp_path / "openapi.json"
    file.write_text(json.dumps(create_app(Settings()).openapi()))
    return file


@pytest.fixture
def generated(
    schema: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ModuleType]:
    """The client that openapi-python-client generates."""
    command = ["generate", "--path", str(schema), "--output-path", "generated", "--meta", "none"]
    subprocess.run(
        [sys.executable, "-m", "openapi_python_client", *command],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("generated")
    for name in [*sys.modules]:
        if name.partition(".")[0] == "generated":
            del sys.modules[name]


def test_the_schema_is_valid(schema: Path) -> None:
    from openapi_spec_validator import validate

    validate(json.loads(schema.read_text()))


def test_a_python_client_makes_both_checks(generated: ModuleType, authority: trustme.CA) -> None:
    models = importlib.import_module("generated.models")
    check_ports = importlib.import_module("generated.api.checks.check_ports").sync
    check_tls = importlib.import_module("generated.api.checks.check_tls").sync
    certificate = authority.issue_cert("127.0.0.1")
    with serve() as service, generated.Client(str(service.base_url)) as client:
        with open_port() as opened, refused_port() as refused:
            body = models.CheckPortsRequest("127.0.0.1", [opened, refused])
            results = check_ports(client=client, body=body).results
        assert results[str(opened)].accessible
        assert results[str(refused)].error == "Connection refused"
        with https(certificate) as port:
            body = models.CheckTlsRequest("127.0.0.1", port)
            assert check_tls(client=client, body=body).valid
            body = models.CheckTlsRequest("provider.example", port, "127.0.0.1")
            answer = check_tls(client=client, body=body)
        assert answer.error == "certificate does not match provider.example"
    with pytest.raises(TypeError, match="port"):
        models.CheckTlsRequest(host="127.0.0.1")


@needs_npm
def test_a_typescript_client_takes_requests_and_nothing_else(schema: Path, tmp_path: Path) -> None:
    tools = typescript_tools()
    generated = tmp_path / "schema.ts"
    subprocess.run(
        [tools / "openapi-typescript", schema, "--output", generated],
        check=True,
        capture_output=True,
    )
    requests = shutil.copy(TYPESCRIPT / "requests.ts", tmp_path)
    done = subprocess.run(
        [tools / "tsc", "--strict", "--noEmit", requests],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def typescript_tools() -> Path:
    """Install the generator and the compiler, once for all runs; return the directory of both."""
    files = [TYPESCRIPT / "package.json", TYPESCRIPT / "package-lock.json"]
    version = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "golem-port-checker")
    installed = cache / f"typescript-{version}"
    if not installed.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=cache) as directory:
            part = Path(directory, "part")
            part.mkdir()
            for file in files:
                shutil.copy(file, part)
            subprocess.run(["npm", "ci", "--silent", "--ignore-scripts"], cwd=part, check=True)
            part.rename(installed)
    return installed / "node_modules" / ".bin"
