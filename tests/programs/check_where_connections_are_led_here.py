"""Check ports of another machine while all connections are led to a port here, and print why not.

For a network namespace of its own.
"""

import asyncio
from ipaddress import ip_address

from port_checker.connect import CheckFailed, OpenConnectionPacer, WayToTarget, attempt
from tests.support.ebpf import connections_led_to
from tests.support.loopback import open_port

if __name__ == "__main__":
    target = WayToTarget(ip_address("203.0.113.7"))
    with open_port() as opened, connections_led_to(opened):
        try:
            print(asyncio.run(attempt(target, [80, opened], 5, OpenConnectionPacer())))  # noqa: T201
        except CheckFailed as error:
            print(error.ports, error)  # noqa: T201  # its result
