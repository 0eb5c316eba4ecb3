"""Checks in the lab, as a provider's owner makes them."""

import asyncio
from collections.abc import Mapping, Sequence

from port_checker.provider import Report, Waits, verify
from tests.lab.network import Lab

# A service that is quicker to call something lost than the defaults are.
QUICK_PORT = 9001
QUICK = {
    "PORT_CHECKER_PORT": str(QUICK_PORT),
    "PORT_CHECK_RETRIES": "2",
    "PORT_CHECK_TIMEOUT": "1.0",
    "PORT_CHECK_RETRY_DELAY": "0.1",
}


def check(
    lab: Lab,
    machine: str,
    ports: Sequence[int | tuple[int, int]],
    *servers: str,
    ip: str | None = None,
    waits: Waits = Waits(),  # noqa: B008  # frozen
) -> Report:
    """Check a machine's ports from a thread in its namespace."""

    def run() -> Report:
        return asyncio.run(verify(ports, servers=servers, ip=ip, waits=waits))

    return lab.submit(machine, run).result(timeout=120)


def url_of(hosts: Mapping[int, str], version: int = 4, port: int = QUICK_PORT) -> str:
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
