"""The wheel that the service hands out."""

import hashlib
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import port_checker
from port_checker.api.wheel import Wheel
from tests.support.namespace import ROOT
from tests.support.service import serve

PACKAGE = Path(port_checker.__file__).parent


def built_by_pip(folder: Path) -> zipfile.ZipFile:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir"]
    subprocess.run([*command, str(folder), str(ROOT)], check=True)
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel)


def test_it_has_what_the_build_puts_into_a_wheel(tmp_path: Path) -> None:
    wheel = Wheel.of_installed()
    assert wheel
    archive, built = zipfile.ZipFile(BytesIO(wheel.content)), built_by_pip(tmp_path)
    assert wheel.name == Path(str(built.filename)).name
    names = {name for name in built.namelist() if ".data/" not in name}
    assert {*archive.namelist()} == names
    for name in names:
        if Path(name).name not in ("RECORD", "WHEEL"):  # which name who made them
            assert archive.read(name) == built.read(name), name


def test_it_is_the_same_whenever_it_is_made() -> None:
    one, other = Wheel.of_installed(), Wheel.of_installed()
    assert one
    assert one == other
    assert {entry.date_time for entry in zipfile.ZipFile(BytesIO(one.content)).infolist()} == {
        (1980, 1, 1, 0, 0, 0)
    }


def test_pip_installs_what_the_service_serves(tmp_path: Path) -> None:
    with serve() as client:
        program = client.get("/").json()["program"]
        assert program["run"] == (
            f"pipx run --spec URL/{program['wheel']} port-checker check --server URL"
        )
        answer = client.get(program["wheel"])
        assert hashlib.sha256(answer.content).hexdigest() == program["sha256"]
        url = f"{client.base_url}/{program['wheel']}"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
        subprocess.run([*command, "--target", str(tmp_path), url], check=True)
    installed = {path.relative_to(tmp_path) for path in tmp_path.rglob("port_checker/**/*.py")}
    assert installed == {path.relative_to(PACKAGE.parent) for path in PACKAGE.rglob("*.py")}
    shown = subprocess.run(
        [sys.executable, str(tmp_path / "bin" / "port-checker"), "--version"],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout == f"port-checker {port_checker.__version__}\n"
