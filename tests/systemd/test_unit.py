"""The units of the package, run by a real systemd."""

import json
import re
import time
from collections.abc import Iterator

import pytest

from tests.support.namespace import ROOT
from tests.support.waiting import wait_until
from tests.systemd.container import Container, needs_debian

# One process installs the package for all of them.
pytestmark = [
    needs_debian,
    pytest.mark.parametrize("container", ["bookworm"], indirect=True),
    pytest.mark.xdist_group("unit"),
]

SHOW = "systemctl show golem-port-checker --value --property "

# The unit's own is 30 s.
SOONER = "WatchdogSec=10"


@pytest.fixture(autouse=True, scope="module")
def _installed(container: Container) -> Iterator[None]:
    container.run("apt-get install -qq /mnt/checkout/dist/*.deb")
    yield
    container.run("dpkg --purge golem-port-checker")


@pytest.fixture(autouse=True)
def _as_installed(container: Container) -> Iterator[None]:
    yield
    container.run(
        "added=/run/systemd/system/golem-port-checker.service.d\n"
        "if [[ -e $added || $(ls /etc/golem) ]] || ! systemctl is-active golem-port-checker; then\n"
        "  rm -rf /etc/golem/* $added; systemctl daemon-reload\n"
        "  systemctl restart golem-port-checker\n"
        "fi"
    )


def configure(container: Container, **settings: object) -> None:
    """Start the service with these settings."""
    lines = "".join(f"{name}={value}\n" for name, value in settings.items())
    container.run(
        f"printf %s '{lines}' > /etc/golem/port-checker.env\nsystemctl restart golem-port-checker"
    )


def drop_in(container: Container, lines: str) -> None:
    """Start the service with these lines added to its unit."""
    directory = "/run/systemd/system/golem-port-checker.service.d"
    container.run(
        f"mkdir -p {directory}\ncat > {directory}/test.conf <<'END'\n[Service]\n{lines}\nEND\n"
        "systemctl daemon-reload; systemctl restart golem-port-checker"
    )


def curl(container: Container, path: str = "/health", body: object = None) -> object:
    posted = f"--data '{json.dumps(body)}'" if body else ""
    answer: object = json.loads(container.run(f"curl -sS {posted} http://localhost:9000{path}"))
    return answer


def main_pid(container: Container) -> str:
    return container.run(SHOW + "MainPID").strip()


def wait_for_another_process(container: Container, pid: str) -> None:
    """Wait until the service has another process than this one, which answers."""
    container.run(
        f"tail --pid={pid} --sleep-interval=0.1 --follow /dev/null\n"
        f"until [[ $({SHOW}MainPID) != @(0|{pid}) ]]; do sleep 0.1; done\n"
        "until curl -sf localhost:9000/health; do sleep 0.1; done"
    )


def journal_mark(container: Container) -> str:
    """A time that all lines so far are before; journalctl counts in seconds."""
    return container.run("sleep 1.1; date +@%s").strip()


def journal_since(container: Container, mark: str, options: str = "") -> list[str]:
    """The service's lines since then."""
    command = f"journalctl --quiet --output=cat -t port-checker --since={mark} {options}"
    return container.run(f"journalctl --sync; {command} || true").splitlines()


def test_the_first_request_after_the_start_is_answered(container: Container) -> None:
    for _ in range(3):
        container.run("systemctl restart golem-port-checker; curl -sS localhost:9000/health")


def test_checks_inside_the_sandbox_are_right(container: Container) -> None:
    configure(container, PORT_CHECKER_HOST="::", PORT_CHECK_RETRIES=1)
    container.run("ip addr replace 192.0.2.7/32 dev lo; ip addr replace 2001:db8::7/128 dev lo")
    for address in "127.0.0.1", "::1", "192.0.2.7", "2001:db8::7":
        body = json.dumps({"provider_ip": address, "ports": [9000, 1]})
        url = f"http://[{address}]:9000" if ":" in address else f"http://{address}:9000"
        answer = container.run(f"curl -sS --data '{body}' --interface {address} {url}/check-ports")
        assert json.loads(answer)["results"] == {
            "9000": {"accessible": True, "error": None},
            "1": {"accessible": False, "error": "Connection refused"},
        }


def test_own_addresses_are_known_in_the_sandbox(container: Container) -> None:
    container.run("ip addr replace 192.0.2.7/32 dev lo")
    answer = curl(container, "/check-ports", {"provider_ip": "192.0.2.7", "ports": [9000]})
    assert isinstance(answer, dict)
    assert answer["detail"]["code"] == "TARGET_NOT_ALLOWED"


def test_it_has_no_right_that_it_does_not_need(container: Container) -> None:
    exposure = container.run("systemd-analyze security golem-port-checker | tail -1")
    # A tenth of it for setpriority(2): TLS handshakes are to give precedence to the service.
    assert float(exposure.split(": ")[1].split()[0]) <= 1.2
    assert container.run("systemd-analyze verify golem-port-checker.service") == ""
    pid = main_pid(container)
    status = container.run(f"cat /proc/{pid}/status")
    assert re.findall(r"^Cap\w+:\s+(\w+)", status, re.MULTILINE) == ["0" * 16] * 5
    assert re.search(r"^NoNewPrivs:\s+1", status, re.MULTILINE)
    assert re.search(r"^Uid:\s+[1-9]", status, re.MULTILINE)


def test_it_can_write_nothing_and_sees_no_other_process(container: Container) -> None:
    # Commands of the unit, so that they have the service's user and sandbox.
    find = "find / -path /proc -prune -o -type d,f -writable -print"
    drop_in(
        container,
        f"ExecStartPost=-sh -c '{find} > /tmp/files'\n"
        "ExecStartPost=sh -c 'cat /proc/[0-9]*/comm > /tmp/seen'",
    )
    temporary = f"/proc/{main_pid(container)}/root/tmp"
    writable = container.run(f"cat {temporary}/files").split()
    assert "/tmp" in writable  # noqa: S108
    own = ("/tmp", "/var/tmp", "/run/golem-port-checker")  # noqa: S108
    assert all(path.startswith(own) for path in writable), writable
    # Not even the service, whose user namespace is another one.
    assert set(container.run(f"cat {temporary}/seen").split()) == {"sh"}


@pytest.mark.parametrize("signal", ["KILL", "TERM"])
def test_who_ends_the_process_does_not_end_the_service(container: Container, signal: str) -> None:
    configure(container, PORT_CHECKER_WORKERS=2)
    before = main_pid(container)
    container.run(f"kill -{signal} {before}")
    wait_for_another_process(container, before)


def test_a_stopped_process_is_replaced(container: Container) -> None:
    assert container.run(SHOW + "WatchdogUSec").strip() == "30s"
    drop_in(container, f"{SOONER}\nEnvironment=PORT_CHECKER_WORKERS=2")
    before = main_pid(container)
    container.run(f"kill -STOP {before}")
    wait_for_another_process(container, before)


def test_a_stop_while_workers_start_is_not_their_death(container: Container) -> None:
    configure(container, PORT_CHECKER_WORKERS=3)
    mark = journal_mark(container)
    container.run(
        "systemctl stop golem-port-checker; systemctl start --no-block golem-port-checker\n"
        "until [[ $(pgrep -fc 'port-checker worker') == 3 ]]; do sleep 0.05; done\n"
        "systemctl stop golem-port-checker"
    )
    assert journal_since(container, mark, "-p err") == []


def test_a_stuck_event_loop_leaves_its_traceback_and_is_replaced(container: Container) -> None:
    # The test's own hook: a module that the service imports and that can stop the event loop. It
    # sleeps, since a bug that computes would take a processor until the watchdog bites.
    container.run(
        "mkdir -p /run/hook\n"
        "cat > /run/hook/sitecustomize.py <<'END'\n"
        "import logging, signal, time\n"
        "def stick(*_):\n"
        "    try: 1 / 0\n"
        "    except ZeroDivisionError: logging.getLogger('port_checker').exception('Failed')\n"
        "    time.sleep(600)\n"
        "signal.signal(signal.SIGUSR1, stick)\n"
        "END\n"
    )
    drop_in(container, f"{SOONER}\nEnvironment=PYTHONPATH=/run/hook")
    before = main_pid(container)
    mark = journal_mark(container)
    container.run(f"kill -USR1 {before}")
    wait_for_another_process(container, before)
    assert any(
        "sitecustomize.py" in line and "in stick" in line for line in journal_since(container, mark)
    )
    # The traceback of an exception is one entry.
    (entry,) = journal_since(container, mark, "-p err")
    assert re.search(r": Failed \| Traceback .+ \| ZeroDivisionError: division by zero$", entry)


def test_a_wrong_setting_fails_once_and_is_told(container: Container) -> None:
    container.run("echo PORT_CHECK_TIMEOUT=soon > /etc/golem/port-checker.env")
    mark = journal_mark(container)
    assert container.try_to_run("systemctl restart golem-port-checker").returncode != 0
    time.sleep(3)  # longer than RestartSec=
    assert container.run(SHOW + "ActiveState").strip() == "failed"
    lines = [line for line in journal_since(container, mark) if "port-checker:" in line]
    assert lines == [
        "port-checker: PORT_CHECK_TIMEOUT='soon' is wrong: it must be seconds, from 0.1 to 30"
    ]
    assert lines[0] in container.try_to_run("systemctl status golem-port-checker").stdout


# Listens on 127.0.0.1:7466, where no connection is completed any more.
SILENT_PORT = """
python3 - <<'END' &
import socket, time
listener = socket.create_server(("127.0.0.1", 7466), backlog=0)
held = []
for _ in range(3):
    held.append(socket.socket())
    held[-1].setblocking(False)
    held[-1].connect_ex(("127.0.0.1", 7466))
print("silent", flush=True)
time.sleep(60)
END
silent=$!
sleep 1
"""


def test_a_restart_refuses_nobody_where_systemd_listens(container: Container) -> None:
    container.run(
        "systemctl stop golem-port-checker\n"
        "systemctl start golem-port-checker.socket golem-port-checker.service\n"
    )
    body = json.dumps({"provider_ip": "127.0.0.1", "ports": [9000, 7466]})
    try:
        *answers, check = container.run(
            f"{SILENT_PORT}\n"
            f"curl -sS --data '{body}' localhost:9000/check-ports > /tmp/check & check=$!\n"
            "sleep 1\n"
            "systemctl restart golem-port-checker & restart=$!\n"
            "for n in $(seq 30); do\n"
            "  curl -sS localhost:9000/health > /tmp/health.$n 2>&1 & curls[$n]=$!\n"
            "  sleep 0.2\n"
            "done\n"
            "wait $check ${curls[@]}; wait $restart; kill $silent\n"
            "for n in $(seq 30); do cat /tmp/health.$n; echo; done; cat /tmp/check"
        ).splitlines()[1:]
    finally:
        container.run("systemctl stop golem-port-checker.socket")
    assert answers == ['{"status":"ok"}'] * 30
    assert json.loads(check)["message"] == "Successfully verified 1 out of 2 ports"


def test_a_reload_refuses_nobody_and_reads_the_settings(container: Container) -> None:
    before = main_pid(container)
    body = json.dumps({"provider_ip": "127.0.0.1", "ports": [9000, 7466]})
    *answers, check = container.run(
        f"{SILENT_PORT}\n"
        f"curl -sS --data '{body}' localhost:9000/check-ports > /tmp/check & check=$!\n"
        "sleep 1; echo PORT_CHECK_MAX_PORTS=1 > /etc/golem/port-checker.env\n"
        "systemctl reload golem-port-checker & reload=$!\n"
        "for n in $(seq 100); do\n"
        "  curl -sS localhost:9000/health > /tmp/health.$n 2>&1 & curls[$n]=$!\n"
        "  sleep 0.1\n"
        "done\n"
        "wait $check ${curls[@]}; wait $reload; kill $silent\n"
        "for n in $(seq 100); do cat /tmp/health.$n; echo; done; cat /tmp/check"
    ).splitlines()[1:]
    assert answers == ['{"status":"ok"}'] * 100
    assert json.loads(check)["message"] == "Successfully verified 1 out of 2 ports"
    assert main_pid(container) == before
    refused = curl(container, "/check-ports", json.loads(body))
    assert isinstance(refused, dict)
    assert refused["detail"]["code"] == "TOO_MANY_PORTS"


def test_a_reload_with_a_wrong_setting_leaves_the_service_as_it_is(container: Container) -> None:
    before = main_pid(container)
    mark = journal_mark(container)
    container.run("echo PORT_CHECK_TIMEOUT=soon > /etc/golem/port-checker.env")
    assert container.try_to_run("systemctl reload golem-port-checker").returncode != 0
    assert "PORT_CHECK_TIMEOUT='soon' is wrong" in "".join(journal_since(container, mark))
    assert main_pid(container) == before
    assert curl(container) == {"status": "ok"}


def test_a_settings_file_in_the_root_folder_is_somebody_elses(container: Container) -> None:
    container.run("echo no line of ours > /.env; chmod 600 /.env")
    try:
        container.run("systemctl restart golem-port-checker")
    finally:
        container.run("rm /.env")


def test_a_wrong_setting_is_no_endless_loop_where_systemd_listens(container: Container) -> None:
    container.run(
        "systemctl stop golem-port-checker\n"
        "systemctl start golem-port-checker.socket\n"
        "echo PORT_CHECK_TIMEOUT=soon > /etc/golem/port-checker.env"
    )
    mark = journal_mark(container)
    try:
        answer = container.run("curl -sS -w ' %{http_code}' localhost:9000/health")
        assert json.loads(answer.removesuffix(" 503"))["detail"]["code"] == "OVERLOADED"
        time.sleep(5)  # for many starts
        lines = [line for line in journal_since(container, mark) if "'soon' is wrong" in line]
        assert len(lines) == 1
    finally:
        container.run("systemctl stop golem-port-checker.socket")


def test_a_check_in_flight_is_finished_before_it_stops(container: Container) -> None:
    body = json.dumps({"provider_ip": "127.0.0.1", "ports": [9000, 7466]})
    answer = container.run(
        f"{SILENT_PORT}\n"
        f"curl -sS --data '{body}' localhost:9000/check-ports > /tmp/check & check=$!\n"
        "sleep 2; systemctl stop golem-port-checker\n"
        "wait $check; kill $silent; cat /tmp/check"
    ).splitlines()[-1]
    assert json.loads(answer)["message"] == "Successfully verified 1 out of 2 ports"
    assert container.run(SHOW + "Result").strip() == "success"


def test_the_journal_has_priorities_and_one_time_a_line(container: Container) -> None:
    mark = journal_mark(container)
    # With limits that every machine can track, or the start would warn of that.
    small = {"PORT_CHECK_MAX_IN_FLIGHT": 1000, "PORT_CHECK_OWN_RATE_LIMIT": "500/minute"}
    configure(container, PORT_CHECK_TIMOUT=3, PORT_CHECK_MAX_PORTS=100, **small)
    curl(container, "/check-ports", {"provider_ip": "127.0.0.1", "ports": [9000, 1]})
    curl(container, "/nothing")
    warnings = journal_since(container, mark, "-p warning")
    assert [line.partition(": ")[2].partition(";")[0] for line in warnings] == [
        "PORT_CHECK_TIMOUT is not a setting"
    ]
    everything = journal_since(container, mark)
    assert any("Listening on" in line for line in everything)
    assert any(" outcome=completed " in line for line in everything)
    unit = "_SYSTEMD_UNIT=golem-port-checker.service"
    command = f"journalctl --quiet --output=cat --since={mark} {unit}"
    assert container.run(command).splitlines() == everything
    assert not any(re.search(r"\d\d:\d\d:\d\d", line) for line in everything)


def test_metrics_are_what_was_sent(container: Container) -> None:
    metrics_at, workers = "127.0.0.1:9464", 2
    configure(
        container,
        PORT_CHECKER_WORKERS=workers,
        PORT_CHECKER_METRICS=metrics_at,
        PORT_CHECK_RETRIES=1,
    )
    for _ in range(9):  # a new connection each: all workers get some
        curl(container, "/check-ports", {"provider_ip": "127.0.0.1", "ports": [9000, 1]})
        curl(container, "/nothing")

    def metrics() -> dict[str, float]:
        lines = container.run(f"curl -sS http://{metrics_at}/metrics").splitlines()
        words = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(number) for name, number in words}

    sent = {
        'port_checker_checks_total{outcome="completed"}': 9,
        'port_checker_checks_total{outcome="failed"}': 0,
        "port_checker_check_duration_seconds_count": 9,
        'port_checker_ports_total{verdict="accessible"}': 9,
        'port_checker_ports_total{verdict="refused"}': 9,
        'port_checker_errors_total{code="NOT_FOUND"}': 9,
    }
    before = metrics()
    assert before.items() >= sent.items()
    limit = container.run(f"prlimit --pid {main_pid(container)} --nofile -o SOFT --noheadings")
    # The sandbox shows the workers.
    assert before["process_max_fds"] == (1 + workers) * int(limit)
    container.run(f"kill -KILL $(pgrep -P {main_pid(container)} -f 'port-checker worker')")
    deaths = "port_checker_worker_deaths_total"
    wait_until(lambda: metrics()[deaths] == workers, "the deaths to be seen")
    after = metrics()
    assert after.items() >= sent.items()
    assert after["process_cpu_seconds_total"] >= before["process_cpu_seconds_total"]


def test_a_port_below_1024_takes_the_drop_in_of_the_unit(container: Container) -> None:
    unit = (ROOT / "golem-port-checker.service").read_text()
    comment = unit.partition("#   [Service]\n")[2].partition("\nCapability")[0]
    drop_in(container, comment.replace("#   ", "") + "\nEnvironment=PORT_CHECKER_PORT=80")
    assert container.run("curl -sS localhost:80/health") == '{"status":"ok"}'


def test_it_starts_at_boot(container: Container) -> None:
    container.reboot()
    container.run("until curl -sf localhost:9000/health; do sleep 0.1; done")
