"""The wheel that the service hands out."""

import hashlib
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import pytest

import port_checker
from port_checker.api.wheel import Wheel
from tests.support.loopback import free_ports
from tests.support.namespace import ROOT
from tests.support.service import serve

PACKAGE = Path(port_checker.__file__).parent


def built(folder: Path) -> zipfile.ZipFile:
    """What pip would build, but without a virtual environment that it fills for that."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory"]
    subprocess.run([*command, str(folder)], cwd=ROOT, check=True)
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel)


def fields(archive: zipfile.ZipFile, name: str) -> bytes:
    """A file without README's text, which in an editable installation is that of long ago."""
    content = archive.read(name)
    return content.partition(b"\n\n")[0] if Path(name).name == "METADATA" else content


def test_it_has_what_the_build_puts_into_a_wheel(tmp_path: Path) -> None:
    wheel = Wheel.of_installed()
    assert wheel
    archive, other = zipfile.ZipFile(BytesIO(wheel.content)), built(tmp_path)
    assert wheel.name == Path(str(other.filename)).name
    names = {name for name in other.namelist() if ".data/" not in name}
    assert {*archive.namelist()} == names
    for name in names:
        if Path(name).name not in ("RECORD", "WHEEL"):  # which name who made them
            assert fields(archive, name) == fields(other, name), name


def test_it_is_the_same_whenever_it_is_made() -> None:
    one, other = Wheel.of_installed(), Wheel.of_installed()
    assert one
    assert one == other
    assert {entry.date_time for entry in zipfile.ZipFile(BytesIO(one.content)).infolist()} == {
        (1980, 1, 1, 0, 0, 0)
    }


@pytest.mark.parametrize("tags", ["{}", "W/{}", '"other", {}'])
def test_who_has_the_wheel_need_not_get_it_again(tags: str) -> None:
    with serve() as client:
        wheel = client.get("/").json()["program"]["wheel"]
        full, head = client.get(wheel), client.head(wheel)
        again = client.get(wheel, headers={"If-None-Match": tags.format(full.headers["ETag"])})
        other = client.get(wheel, headers={"If-None-Match": '"other"'})
    assert (head.status_code, head.headers["Content-Length"]) == (200, str(len(full.content)))
    assert (again.status_code, again.content, again.headers["ETag"]) == (
        304,
        b"",
        full.headers["ETag"],
    )
    assert other.content == full.content


def test_pip_installs_what_the_service_serves_and_it_checks(tmp_path: Path) -> None:
    ports = free_ports(100)
    with serve() as client:
        program = client.get("/").json()["program"]
        assert program["run"] == (
            f"pipx run --spec URL/{program['wheel']} port-checker check --server URL"
        )
        answer = client.get(program["wheel"])
        assert hashlib.sha256(answer.content).hexdigest() == program["sha256"]
        server = str(client.base_url)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
        target = ["--target", str(tmp_path), f"{server}/{program['wheel']}"]
        subprocess.run([*command, *target], check=True)
        installed = {path.relative_to(tmp_path) for path in tmp_path.rglob("port_checker/**/*.py")}
        assert installed == {path.relative_to(PACKAGE.parent) for path in PACKAGE.rglob("*.py")}
        check = ["bin/port-checker", "check", f"{ports[0]}-{ports[-1]}", "--server", server]
        shown = subprocess.run(
            [sys.executable, *check],
            cwd=tmp_path,
            env={"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
    assert "100 of 100 ports of 127.0.0.1 are reachable" in shown.stdout
