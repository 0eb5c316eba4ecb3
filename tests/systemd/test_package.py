"""The Debian package, from its installation to its purge."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.waiting import wait_until
from tests.systemd.container import Container, needs_debian

both_debians = pytest.mark.parametrize("container", ["bookworm", "trixie"], indirect=True)

SERVICE = "golem-port-checker.service"
SOCKET = "golem-port-checker.socket"
SETTINGS = "/etc/golem/port-checker.env"

# What nobody but the package has put there; dpkg remembers names, and the journal lines.
FILES = (
    "find / -xdev '(' -path /mnt -o -path /tmp -o -path /var/tmp -o -path /var/lib/apt "
    "-o -path /var/log ')' -prune -o '(' -path '*port-checker*' -o -path '*/golem*' ')' -print"
)


def install(container: Container, package: str, options: str = "") -> None:
    container.run(f"DEBIAN_FRONTEND=noninteractive apt-get install -qq {options} /mnt/{package}")


def state(container: Container, unit: str = SERVICE) -> tuple[str, str]:
    """Whether a unit runs, and whether it is started at boot."""
    active, enabled = (
        container.try_to_run(f"systemctl {word} {unit}").stdout.strip()
        for word in ("is-active", "is-enabled")
    )
    return active, enabled


def version(container: Container) -> str:
    schema = json.loads(container.run("curl -sS localhost:9000/openapi.json"))
    found: str = schema["info"]["version"]
    return found


@pytest.fixture(autouse=True)
def _purged(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "container" in request.fixturenames:
        container: Container = request.getfixturevalue("container")
        container.run("dpkg --purge golem-port-checker")


@pytest.mark.skipif("SYSTEMD_TEST_DEBIANS" not in os.environ, reason="make systemd-test")
def test_lintian_finds_no_error_in_it(builds: Path) -> None:
    (package,) = builds.glob("checkout/dist/*.deb")
    done = subprocess.run(
        ["lintian", "--fail-on", "error", package], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@needs_debian
@both_debians
def test_it_serves_from_its_installation_to_its_removal(container: Container) -> None:
    before = container.run(FILES)
    install(container, "checkout/dist/*.deb")
    assert state(container) == ("active", "enabled")
    assert state(container, SOCKET) == ("inactive", "disabled")
    assert container.run("curl -sS localhost:9000/health") == '{"status":"ok"}'
    assert container.run(f"stat -c '%a %U:%G' {SETTINGS}") == "640 root:root\n"
    assert "port-checker.1" in container.run("dpkg -L golem-port-checker")
    # What Python compiled lies beside it, since the service itself could not keep it.
    compiled = "port_checker/__pycache__/cli.cpython-*.pyc"
    container.run(f"ls /usr/lib/golem-port-checker/site-packages/{compiled}")
    # All that it needs is there, also of what is imported for some settings alone.
    container.run(
        f"echo PORT_CHECKER_METRICS=127.0.0.1:9464 >> {SETTINGS}\n"
        f"echo PORT_CHECKER_RATE_LIMIT_STORE=redis://127.0.0.1 >> {SETTINGS}\n"
        f"systemctl restart redis-server {SERVICE}"
    )
    up = "curl -sS localhost:9464/metrics | grep '^port_checker_rate_limit_store_up 1'"
    wait_until(lambda: container.try_to_run(up).returncode == 0, "Redis to be reached")
    # The settings in the file are the defaults.
    container.run(
        f"sed -i 's/^#PORT_/PORT_/' {SETTINGS}; systemctl reload {SERVICE}\n"
        f"systemd-run --wait --quiet --pipe --property=EnvironmentFile={SETTINGS} "
        "port-checker serve --check-settings"
    )

    container.run("apt-get remove -qq golem-port-checker")
    assert state(container)[0] == "inactive"
    assert container.try_to_run("curl -sS localhost:9000/health").returncode != 0
    assert container.run(f"grep -c ^PORT_ {SETTINGS}") != "0\n"
    container.run("apt-get purge -qq golem-port-checker; systemctl reset-failed")
    assert container.run(FILES) == before


@needs_debian
@both_debians
def test_an_upgrade_keeps_settings_and_an_open_socket(container: Container) -> None:
    install(container, "checkout/dist/*.deb")
    before = version(container)
    container.run(
        f"echo PORT_CHECKER_CONTACT=me@checker.example >> {SETTINGS}\n"
        f"systemctl stop {SERVICE}; systemctl enable --now {SOCKET} {SERVICE}"
    )
    answers = container.run(
        "( DEBIAN_FRONTEND=noninteractive apt-get install -qq -o Dpkg::Options::=--force-confold "
        "/mnt/newer/*.deb; touch /tmp/upgraded ) > /tmp/upgrade 2>&1 & upgrade=$!\n"
        "until [[ -e /tmp/upgraded ]]; do curl -sS localhost:9000/health; echo; sleep 0.1; done\n"
        "wait $upgrade; rm /tmp/upgraded"
    )
    assert set(answers.splitlines()) == {'{"status":"ok"}'}
    assert version(container) == f"9.{before}"
    assert container.run(f"tail -n 1 {SETTINGS}") == "PORT_CHECKER_CONTACT=me@checker.example\n"
    assert state(container) == state(container, SOCKET) == ("active", "enabled")

    container.run("apt-get remove -qq golem-port-checker")
    assert container.try_to_run("curl -sS localhost:9000/health").returncode != 0


@needs_debian
@pytest.mark.parametrize("container", ["bookworm"], indirect=True)
def test_an_upgrade_starts_nothing_that_is_disabled(container: Container) -> None:
    install(container, "checkout/dist/*.deb")
    container.run(f"systemctl disable --now {SERVICE}")
    install(container, "newer/*.deb")
    assert state(container) == ("inactive", "disabled")
    install(container, "checkout/dist/*.deb", "--allow-downgrades")
    assert state(container) == ("inactive", "disabled")
