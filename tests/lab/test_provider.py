"""``port-checker check`` behind a router: what a provider sees."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from port_checker import advice
from tests.lab import network
from tests.lab.network import Lab

ONE_COMMAND = [sys.executable, "-m", "port_checker", "check"]


def server(version: int) -> str:
    host = network.CHECKER[version]
    return f"http://[{host}]:9000" if version == 6 else f"http://{host}:9000"


def check_as_json(lab: Lab, *words: str, version: int = 4) -> tuple[int, Any]:
    """Run the program on the provider's machine; return its exit status and document."""
    program = lab.popen(
        "provider",
        *ONE_COMMAND,
        *words,
        "--server",
        server(version),
        "--json",
        env={**os.environ},
        output=subprocess.PIPE,
    )
    told, _ = program.communicate(timeout=60)
    return program.returncode, json.loads(told)


def check_on_a_terminal(lab: Lab, *words: str, columns: int = 120) -> tuple[int, str]:
    """The same on a terminal; return the exit status and all that it shows, less the colours."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color"}
    for name in ("NO_COLOR", "COLUMNS", "LINES"):
        environment.pop(name, None)
    program = lab.popen(
        "provider", *ONE_COMMAND, *words, "--server", server(4), env=environment, output=its
    )
    os.close(its)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # the terminal's last user is gone
        pass
    os.close(ours)
    return program.wait(60), re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())


def word(ports: range) -> str:
    return f"{ports[0]}-{ports[-1]}"


def nothing(_lab: Lab, _ports: range) -> None:
    """Not forwarded: refused by the router."""


def dropped(lab: Lab, ports: range) -> None:
    lab.forward(ports)
    lab.filter("router", "forward", ports, "drop")


def rejected(lab: Lab, ports: range) -> None:
    lab.forward(ports)
    lab.filter("router", "forward", ports, "reject with icmpx host-unreachable")


def elsewhere(lab: Lab, ports: range) -> None:
    lab.listen("neighbour", ports)
    lab.forward(ports, network.NEIGHBOUR)


def one_way(lab: Lab, ports: range) -> None:
    lab.forward(ports)
    lab.drop_answers(ports)


def in_use(lab: Lab, ports: range) -> None:
    lab.listen("provider", ports)
    lab.forward(ports)


def lossy(lab: Lab, ports: range) -> None:
    lab.forward(ports)
    lab.lose(ports, 20)


# What is done to ten ports, and for each of them: local binding, reachable, confirmed, error,
# advice.
Told = tuple[str, bool, bool | None, str | None, str | None]
KINDS: list[tuple[Callable[[Lab, range], object], Told]] = [
    (Lab.forward, ("bound", True, True, None, None)),
    (lossy, ("bound", True, True, None, None)),
    (in_use, ("in use", True, None, None, None)),
    (dropped, ("bound", False, False, "Connection timed out", advice.TIMED_OUT)),
    (rejected, ("bound", False, False, "No route to host", advice.UNREACHABLE)),
    (elsewhere, ("bound", False, False, None, advice.ANSWERED_ELSEWHERE)),
    (Lab.take_over, ("bound", False, False, None, advice.ANSWERED_ELSEWHERE)),
    (one_way, ("bound", False, False, "Connection timed out", advice.WAY_BACK)),
]
REFUSED: Told = ("bound", False, False, "Connection refused", advice.REFUSED)


def test_each_kind_of_trouble_has_its_sentence(lab: Lab) -> None:
    """For both families, side by side."""
    expected: dict[int, dict[int, Told]] = {4: {}, 6: {}}
    for version, told_of in expected.items():
        # For IPv6 there is no forwarding that could be forgotten.
        for arrange, told in [*KINDS, (nothing, REFUSED)] if version == 4 else KINDS:
            ports = lab.take(10)
            arrange(lab, ports)
            told_of |= dict.fromkeys(ports, told)
    with ThreadPoolExecutor() as pool:
        checks = {
            version: pool.submit(check_as_json, lab, *map(str, told_of), version=version)
            for version, told_of in expected.items()
        }
    for version, check in checks.items():
        status, report = check.result()
        assert report["ip"] == network.PROVIDER[version]
        assert report["servers"] == [{"url": server(version), "asked": True, "error": None}]
        for port in report["ports"]:
            *facts, expected_advice = expected[version][port["port"]]
            known = ("local", "reachable", "confirmed", "error")
            assert [port[fact] for fact in known] == facts, port
            assert port["advice"] == expected_advice, port
        assert (report["reachable"], report["total"]) == (30, len(expected[version]))
        assert status == 1


def test_a_hundred_ports_of_which_ten_are_not_forwarded(lab: Lab) -> None:
    ports = lab.take(100)
    forwarded, forgotten, forwarded_too = ports[:40], ports[40:50], ports[50:]
    lab.forward(forwarded)
    lab.forward(forwarded_too)
    status, shown = check_on_a_terminal(lab, word(ports))
    assert status == 1
    rows = [line for line in shown.splitlines() if re.match(r"│ \d", line)]
    assert [row.split("│")[1].strip().rstrip(",") for row in rows] == [
        f"{forwarded[0]}–{forwarded[-1]}, {forwarded_too[0]}–{forwarded_too[-1]}",  # noqa: RUF001  # as shown
        f"{forgotten[0]}–{forgotten[-1]}",  # noqa: RUF001
    ]
    assert "reachable" in rows[0]
    assert "Connection refused" in rows[1]
    assert "nothing listens on this port there" in " ".join(re.split(r"[│\s]+", shown))
    assert shown.rstrip().endswith("90 of 100 ports of 60.0.2.2 are reachable.")

    status, report = check_as_json(lab, word(ports))
    assert status == 1
    assert [port["port"] for port in report["ports"] if not port["reachable"]] == list(forgotten)


def test_all_forwarded_is_a_success(lab: Lab) -> None:
    ports = lab.take(100)
    lab.forward(ports)
    status, report = check_as_json(lab, word(ports))
    assert (status, report["reachable"]) == (0, 100)
    assert all(port["confirmed"] for port in report["ports"])
