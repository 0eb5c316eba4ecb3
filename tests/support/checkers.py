"""Checkers that do what a test needs to see."""

import asyncio
import threading
from typing import Any

from port_checker.addresses import Address
from port_checker.checker import Checker, Reservation
from port_checker.connect import OPEN, OnVerdict, Verdict


class HeldChecker(Checker):
    """A checker that finds one port open, and waits before what comes then.

    Attributes:
        may_go_on: Set by the test.
    """

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__(retries=1, retry_delay=0, timeout=1, max_in_flight=200)
        self.may_go_on = threading.Event()
        self._error = error

    async def check(
        self,
        target: Address,
        ports: Any,
        room: Reservation,
        on_final: OnVerdict | None = None,
    ) -> dict[int, Verdict]:
        """Tell of the first port."""
        if on_final:
            on_final(ports[0], OPEN)
        while not self.may_go_on.is_set():
            await asyncio.sleep(0.001)
        if self._error:
            raise self._error
        return await super().check(target, ports, room)
