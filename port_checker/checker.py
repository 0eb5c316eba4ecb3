"""One check: rounds of attempts with a delay between them, within the capacity of the process."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from port_checker.addresses import Address
from port_checker.connect import TIMED_OUT, OpenConnectionPacer, Verdict, attempt
from port_checker.tls import TlsClient, TlsVerdict


class Overloaded(Exception):
    """The check would put more ports in flight than the checker may have.

    Attributes:
        asked: Ports that the refused check asked for.
        max_in_flight: Ports that may be in flight at once.
        retry_after: Whole seconds after which room is to be expected.
    """

    def __init__(self, asked: int, max_in_flight: int, retry_after: int) -> None:
        super().__init__(f"{asked} more ports would pass {max_in_flight} in flight")
        self.asked = asked
        self.max_in_flight = max_in_flight
        self.retry_after = retry_after


class Checker:
    """Checks ports, many targets at a time.

    For one event loop. A check takes at most ``retries * timeout + (retries - 1) * retry_delay``
    seconds and some milliseconds: one that there is no room for is refused rather than queued.

    Args:
        retries: Attempts for each port, the first included.
        retry_delay: Seconds between the end of one round of attempts and the next.
        timeout: Seconds that one attempt may last.
        max_in_flight: Ports that may be under check at once.
        sleep: Waits for so many seconds; called between rounds.
    """

    def __init__(
        self,
        *,
        retries: int,
        retry_delay: float,
        timeout: float,
        max_in_flight: int,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.in_flight = 0
        self._retries = retries
        self._retry_delay = retry_delay
        self._timeout = timeout
        self._max_in_flight = max_in_flight
        self._sleep = sleep
        self._pacer = OpenConnectionPacer()
        self._tls = TlsClient()

    def require_room(self, ports: int) -> None:
        """Refuse a check for which there is no room.

        Args:
            ports: How many ports it asks for.

        Raises:
            Overloaded: They would pass ``max_in_flight``.
        """
        if self.in_flight + ports > self._max_in_flight:
            # Nothing is certain to end sooner than one round of attempts.
            retry_after = max(1, round(self._timeout))
            raise Overloaded(ports, self._max_in_flight, retry_after)

    async def check(self, target: Address, ports: Sequence[int]) -> dict[int, Verdict]:
        """Find out which of ``ports`` accept connections.

        All of them are tried at once; those that fail are tried again, all at once, after the
        delay. A port that succeeds is not tried again, and counts as in flight no more after that
        round. A cancelled check leaves nothing behind.

        Args:
            target: The address that the ports are on.
            ports: TCP ports, each at most once.

        Returns:
            A verdict for each port, in the order of ``ports``. If all attempts of a port failed,
            it is that of the last one which was answered, if any was.

        Raises:
            Overloaded: There is no room for them; no attempt was made.
            CheckFailed: The checker itself is in trouble, so nothing is known about any port.
        """
        self.require_room(len(ports))
        verdicts: dict[int, Verdict] = {}
        failed = list(ports)
        self.in_flight += len(failed)
        try:
            for round_ in range(self._retries):
                if round_:
                    await self._sleep(self._retry_delay)
                for port, verdict in (
                    await attempt(target, failed, self._timeout, self._pacer)
                ).items():
                    # Routers answer some attempts and are silent at others, as they limit ICMP.
                    if verdict is not TIMED_OUT or port not in verdicts:
                        verdicts[port] = verdict
                still_failed = [port for port in failed if not verdicts[port].accessible]
                self.in_flight -= len(failed) - len(still_failed)
                failed = still_failed
                if not failed:
                    break
        finally:
            self.in_flight -= len(failed)
        return {port: verdicts[port] for port in ports}

    async def check_tls(
        self, target: Address, port: int, expected: Sequence[Address | str]
    ) -> TlsVerdict:
        """Tell whether a TLS endpoint has a certificate that is good for what is expected.

        It takes the room and the time of a check of one port. A connection that fails, in the
        handshake too, is tried again; what a certificate tells is final.

        Args:
            target: The address that the port is on.
            port: A TCP port.
            expected: Addresses and at most one DNS name, as for ``TlsClient.attempt``.

        Raises:
            Overloaded: There is no room for it; nothing was attempted.
            CheckFailed: The checker's own trouble; nothing can be said about the endpoint.
        """
        self.require_room(1)
        self.in_flight += 1
        try:
            verdict = None
            for round_ in range(self._retries):
                if round_:
                    await self._sleep(self._retry_delay)
                latest = await self._tls.attempt(target, port, expected, self._timeout, self._pacer)
                if verdict is None or latest.error != TIMED_OUT.error:
                    verdict = latest
                if not latest.try_again:
                    break
        finally:
            self.in_flight -= 1
        assert verdict, "there is at least one attempt"  # noqa: S101
        return verdict
