"""The whole flow: listen, ask, judge."""

import asyncio
from collections.abc import Callable, Iterator, Sequence

import httpx

from port_checker.addresses import Address, parse_address
from port_checker.linux import descriptors_left, half_open_ports
from port_checker.provider.listeners import Listeners
from port_checker.provider.remote import MAX_PORTS_PER_REQUEST, Server, Waits
from port_checker.provider.report import PortReport, Report, judge

# Descriptors kept for connections to servers, connections that listeners see, and the rest.
_OTHER_DESCRIPTORS = 48


async def verify(
    ports: Sequence[int],
    *,
    servers: Sequence[str],
    ip: str | None = None,
    on_progress: Callable[[str], None] = lambda _: None,
    waits: Waits = Waits(),  # noqa: B008  # frozen
) -> Report:
    """Verify that the world can reach this machine on its ports.

    Opens a temporary listener on each port, unless another program uses it, and asks all servers
    at once to connect. The listeners are always closed, also when this is cancelled. A server's
    failure is part of the report.

    Args:
        ports: TCP ports, 1 to 65535.
        servers: URLs of port checkers.
        ip: This machine's public address; by default, as seen by the first server that answers.
        on_progress: Called with a few words on what is happening.
        waits: How long to wait.

    Returns:
        The report.

    Raises:
        ValueError: ``ip`` is not an IP address, or a port is not one.
    """
    ports = list(dict.fromkeys(ports))
    if wrong := [port for port in ports if not 1 <= port <= 65535]:
        raise ValueError(f"{wrong[0]} is not a port (1-65535)")
    address = parse_address(ip) if ip else None
    async with httpx.AsyncClient(
        timeout=httpx.Timeout(waits.answer, connect=waits.connect),
        trust_env=False,  # through a proxy, a server would see the proxy's address
    ) as http:
        checkers = [Server(url, http, on_progress, waits) for url in dict.fromkeys(servers)]
        if not address:
            on_progress("asking for this machine's address")
            addresses = await asyncio.gather(*(server.fetch_address() for server in checkers))
            address = next((one for one in addresses if one), None)
        reports = []
        for some in _in_parts(ports, descriptors_left() - _OTHER_DESCRIPTORS):
            reports += await _verify_part(some, address, checkers, waits)
    return Report(
        ip=str(address) if address else None,
        servers=[server.report() for server in checkers],
        ports=reports,
    )


async def _verify_part(
    ports: Sequence[int], address: Address | None, servers: Sequence[Server], waits: Waits
) -> list[PortReport]:
    """Verify as many ports as this process can listen on at once."""
    with Listeners(ports, address.version if address else 4) as listeners:
        worth_asking = [port for port in ports if listeners.local[port] in ("bound", "in use")]
        if address and worth_asking:
            await asyncio.gather(*(server.ask(address, worth_asking) for server in servers))
        answers = {
            port: {
                server.url: server.verdicts[port] for server in servers if port in server.verdicts
            }
            for port in ports
        }
        open_outside = [
            port
            for port in ports
            if listeners.local[port] == "bound"
            and any(verdict.accessible for verdict in answers[port].values())
        ]
        await listeners.wait_until_seen(open_outside, waits.late_connections)
        seen = listeners.seen
        if any(listeners.local[port] == "bound" and port not in seen for port in answers):
            seen = seen | half_open_ports()
        return [judge(port, listeners.local[port], port in seen, answers[port]) for port in ports]


def _in_parts(ports: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    size = max(1, min(size, MAX_PORTS_PER_REQUEST))
    for start in range(0, len(ports), size):
        yield ports[start : start + size]
