"""A check with little patience: ``impatient.py FIRST-LAST SERVER``; prints the notes."""

import asyncio
import sys

from port_checker.provider import Waits, verify


async def main(ports: str, server: str) -> None:
    first, last = map(int, ports.split("-"))
    waits = Waits(connect=2, answer=5, patience=10)
    report = await verify(range(first, last + 1), servers=[server], waits=waits)
    sys.stdout.write("\n".join([str(report.reachable), *report.notes]))


asyncio.run(main(*sys.argv[1:]))
