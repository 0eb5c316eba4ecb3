"""The whole flow: listen, ask, judge."""

import asyncio
from collections.abc import Callable, Iterator, Sequence

import httpx

from port_checker.addresses import Address, parse_address
from port_checker.linux import descriptors_left, half_open_ports
from port_checker.provider.listeners import Listeners
from port_checker.provider.remote import ANSWER_TIMEOUT, CONNECT_TIMEOUT, MOST_AT_ONCE, Server
from port_checker.provider.report import PortReport, Report, judge

# Seconds after the answer in which a listener may still see what the server said it did: when the
# last packet of the handshake is lost, the next comes after the sender's retransmission timeout.
_AFTERMATH = 3.0
# Descriptors kept for connections to servers, connections that listeners see, and the rest.
_OTHER_DESCRIPTORS = 48


async def verify(
    ports: Sequence[int],
    *,
    servers: Sequence[str],
    ip: str | None = None,
    on_progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Verify that the world reaches this machine on its ports.

    For each port a temporary listener is opened, unless a program has the port. While the
    listeners stand, the servers are asked, side by side; then the listeners are closed, also when
    this is cancelled. What goes wrong with a server stands in the report.

    Args:
        ports: TCP ports, 1 to 65535.
        servers: URLs of port checkers.
        ip: This machine's address as the world sees it; by default what the first server that
            answers says.
        on_progress: Told, in a few words, what is being waited for.

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
        timeout=httpx.Timeout(ANSWER_TIMEOUT, connect=CONNECT_TIMEOUT),
        trust_env=False,  # through a proxy, a server would see the proxy's address
    ) as http:
        asked = [Server(url, http, on_progress) for url in dict.fromkeys(servers)]
        if not address:
            on_progress("asking for this machine's address")
            told = await asyncio.gather(*(server.tell_address() for server in asked))
            address = next((one for one in told if one), None)
        reports = []
        for some in _in_parts(ports, descriptors_left() - _OTHER_DESCRIPTORS):
            reports += await _verify_part(some, address, asked)
    return Report(
        ip=str(address) if address else None,
        servers=[server.report() for server in asked],
        ports=reports,
    )


async def _verify_part(
    ports: Sequence[int], address: Address | None, servers: Sequence[Server]
) -> list[PortReport]:
    """Verify as many ports as there can be listeners at a time."""
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
        await listeners.wait_until_seen(open_outside, _AFTERMATH)
        seen = listeners.seen
        if any(listeners.local[port] == "bound" and port not in seen for port in answers):
            seen = seen | half_open_ports()
        return [judge(port, listeners.local[port], port in seen, answers[port]) for port in ports]


def _in_parts(ports: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    size = max(1, min(size, MOST_AT_ONCE))
    for start in range(0, len(ports), size):
        yield ports[start : start + size]
