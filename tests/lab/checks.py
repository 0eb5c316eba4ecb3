"""Checks in the lab, as a provider's owner makes them."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from port_checker import advice
from port_checker.provider import Report, Waits, verify
from port_checker.verdicts import port_verdict
from tests.lab import network
from tests.lab.network import Lab, end
from tests.support.service import serve

TRAFFIC = str(Path(__file__).parent / "traffic.py")
OWN = {4: network.PROVIDER_BEHIND_NAT, 6: network.PROVIDER[6]}
LOOPBACK = {4: "127.0.0.1", 6: "::1"}
BOTH = pytest.mark.parametrize("version", [4, 6])
# Nothing gets to the provider's machine: what is said of that behind a router, and without one.
ANSWERED = {4: advice.ANSWERED_ELSEWHERE, 6: advice.ANSWERED_IN_FRONT}
NOT_HERE = {4: advice.NOT_FORWARDED, 6: advice.NETWORK_FIREWALL}
LOST = {4: advice.NOTHING_ARRIVED, 6: advice.NETWORK_FIREWALL}
_QUICK: dict[str, Any] = {
    "retries": 2,
    "timeout": 0.5,
    "retry_delay": 0.1,
    "caller_rate_limit": "off",
    "own_rate_limit": "off",
    "others_rate_limit": "off",
    "target_rate_limit": "off",
}
# The lab's bans last for ever, and its packets take no time.
WAITS = Waits(late_connections=0.6, between_groups=0.1, ban=0.1, quiet=0.3)
# For connections that do arrive, as late as a busy machine passes them on.
PATIENT = replace(WAITS, late_connections=30)


def start_check(
    lab: Lab,
    machine: str,
    ports: Sequence[int | tuple[int, int]],
    *servers: str,
    ip: str | None = None,
    waits: Waits = WAITS,
) -> Future[Report]:
    """Check a machine's ports from a thread in its namespace."""

    def run() -> Report:
        return asyncio.run(verify(ports, servers=servers, ip=ip, waits=waits))

    return lab.submit(machine, run)


def check(
    lab: Lab,
    machine: str,
    ports: Sequence[int | tuple[int, int]],
    *servers: str,
    ip: str | None = None,
    waits: Waits = WAITS,
) -> Report:
    """Check a machine's ports, and wait for the report."""
    return start_check(lab, machine, ports, *servers, ip=ip, waits=waits).result(timeout=120)


def run(lab: Lab, machine: str, *words: str, behind: Sequence[str] = ()) -> Report:
    """Run the whole program.

    Args:
        lab: Where.
        machine: The machine on which it runs.
        words: Its arguments.
        behind: A command that runs it.
    """
    program = [*behind, sys.executable, "-m", "port_checker", "check", "--json", *words]
    process = lab.popen(machine, *program, env={**os.environ}, output=subprocess.PIPE)
    document = json.loads(process.communicate(timeout=120)[0])
    for port in document["ports"]:
        answers = port["answers"].items()
        port["answers"] = {url: port_verdict(**answer) for url, answer in answers}
    return TypeAdapter(Report).validate_python(document)


def url_of(hosts: Mapping[int, str], version: int = 4, port: int = network.SERVICE_PORT) -> str:
    """The URL of a service on a machine."""
    host = hosts[version]
    return f"http://[{host}]:{port}" if version == 6 else f"http://{host}:{port}"


def results(report: Report) -> dict[int, tuple[bool, str | None]]:
    """Whether each port is reachable, and the advice."""
    return {port.port: (port.reachable, port.advice) for port in report.ports}


def advised(report: Report) -> set[str | None]:
    """All advice about ports."""
    return {port.advice for port in report.ports}


def word(ports: range) -> str:
    """Ports as nftables and the program's users write them."""
    return f"{ports[0]}-{ports[-1]}"


def notes(report: Report) -> list[str]:
    """The notes of a report, but for what every check through the lab's router finds out."""
    expected = advice.NOT_LOOPED_BACK.format(ip=network.ROUTER[4])
    return [note for note in report.notes if note != expected]


@contextlib.contextmanager
def service(
    lab: Lab, machine: str, port: int = network.SERVICE_PORT, **settings: Any
) -> Iterator[None]:
    """Run a service in a thread, which is in the machine's network; as quick as the lab's own."""
    with contextlib.ExitStack() as stack:
        values = {**_QUICK, "trusted_proxies": (), **settings}
        running = serve(host="::", on_port=port, **values)
        client = lab.submit(machine, stack.enter_context, running).result()
        lab.submit(machine, client.get, "/health").result().raise_for_status()
        yield


@contextlib.contextmanager
def traffic(lab: Lab, name: str, *words: object) -> Iterator[None]:
    """Have somebody do something meanwhile."""
    process = lab.popen(name, sys.executable, TRAFFIC, *map(str, words))
    try:
        yield
    finally:
        end(process)


def monitor(
    lab: Lab, name: str, host: str, ports: range, kind: str = "connect"
) -> AbstractContextManager[None]:
    return traffic(lab, name, kind, host, ports[0], ports[-1], 0.3)


def translate(lab: Lab, name: str, rule: str) -> None:
    """Translate sources of what leaves a namespace."""
    table = "table inet nat {\nchain out { type nat hook postrouting priority srcnat; }\n}"
    lab.run(name, "nft", "-f", "-", stdin=table)
    lab.run(name, "nft", "add", "rule", "inet", "nat", "out", *rule.split())
