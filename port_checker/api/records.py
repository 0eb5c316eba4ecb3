"""One log line for each check, and for each refusal: caller, target, outcome; and requests' times.

The lines' format is stable, so that programs (fail2ban, say) can read them::

    check caller=192.0.2.7 target=192.0.2.7 ports=3 outcome=completed duration=0.004 accessible=2
    check caller=192.0.2.7 target=192.0.2.7 ports=3 outcome=cancelled duration=0.731
    check caller=192.0.2.7 target=192.0.2.7 ports=3 outcome=failed duration=0.002 reason="..."
    refused caller=192.0.2.7 code=TARGET_NOT_ALLOWED target=10.0.0.1
    refused caller=192.0.2.7 code=RATE_LIMITED limit=target_ports target=203.0.113.5

``limit`` and ``target`` are left out where there is none, or it was not known yet.
"""

import asyncio
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from port_checker.addresses import Address, subscriber, text_of
from port_checker.connect import CheckFailed
from port_checker.errors import ErrorCode, Limit, ServiceError
from port_checker.metrics import CheckOutcome, Metrics

# Callers and codes whose last line is remembered: 2 MB (measured).
MAX_REMEMBERED: Final = 10_000

# Refusals that are logged one by one in a second, of all callers: whoever has an IPv6 /48 is 65,536
# callers.
MAX_LOGGED: Final = 100

# Where a request's scope keeps when it began, if ``RequestTimer`` was not the first to see it.
STARTED: Final = "port_checker.started"

_CHECK: Final = "check caller=%s target=%s ports=%d outcome=%s duration=%.3f%s"

logger = logging.getLogger(__name__)


class CheckRecord:
    """Logs how a check ended, and how long it took, when the block ends that it is made for.

    A refused check is logged as a refusal instead.

    Args:
        caller: Who asked; None if unknown.
        target: The address to check.
        ports: How many ports to check on it.
        metrics: Where the check is counted; None if nowhere.

    Attributes:
        result: What came out, as ``name=value``; empty for nothing.
    """

    def __init__(
        self,
        caller: Address | None,
        target: Address,
        ports: int,
        metrics: Metrics | None = None,
    ) -> None:
        self.result = ""
        self._caller = caller
        self._target = target
        self._ports = ports
        self._metrics = metrics or Metrics()
        self._started = time.perf_counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None
    ) -> None:
        seconds = time.perf_counter() - self._started
        match error:
            case None:
                self._metrics.time_check(seconds)
                more = self.result and f" {self.result}"
                self._end(logging.INFO, CheckOutcome.COMPLETED, seconds, more)
            case ClientDisconnect() | asyncio.CancelledError():
                self._end(logging.INFO, CheckOutcome.CANCELLED, seconds)
            case CheckFailed():
                self._end(logging.ERROR, CheckOutcome.FAILED, seconds, f' reason="{error}"')
            case ServiceError():
                error.target = self._target  # for the line of the refusal
            case _:
                self._end(logging.ERROR, CheckOutcome.BUG, seconds)

    def _end(self, level: int, outcome: CheckOutcome, seconds: float, more: str = "") -> None:
        self._metrics.count("checks", outcome)
        if logger.isEnabledFor(level):
            caller = text_of(self._caller) if self._caller else "unknown"
            values = caller, text_of(self._target), self._ports, outcome, seconds, more
            if logging._srcfile:  # whoever reads the record may ask where it is from
                logger.log(level, _CHECK, *values)
            else:
                logger.handle(_Line(level, values))


class _Line(logging.LogRecord):
    """The line of a check where no line names the file and the line of code that it is from.

    Our own server's do not (Logging HOWTO, "Optimization"). Without what else logging finds out, a
    line takes half of the instructions (measured).
    """

    _others = vars(logging.makeLogRecord({"name": logger.name, "msg": _CHECK}))

    def __init__(self, level: int, values: tuple[object, ...]) -> None:
        self.__dict__ = self._others.copy()  # an update would take three times as long (measured)
        self.created = time.time()
        self.levelno, self.levelname = level, logging.getLevelName(level)
        self.args = values


class RefusalLog:
    """Logs refusals: at most one a second for each caller (IPv6: /64) and code, and 100 in all.

    Those that are too many in all are told by their number.

    Args:
        clock: Returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._logged: OrderedDict[tuple[str | None, ErrorCode], float] = OrderedDict()
        self._second = -math.inf  # when it began
        self._lines = 0  # since then
        self._untold = 0  # refusals

    @property
    def remembered(self) -> int:
        """How many callers and codes are remembered."""
        return len(self._logged)

    def add(
        self,
        caller: Address | None,
        code: ErrorCode,
        limit: Limit | None = None,
        target: Address | None = None,
    ) -> None:
        """Log a refusal, unless one like it, or very many, were logged less than a second ago.

        Args:
            caller: Who was refused; None if unknown.
            code: Why.
            limit: What was reached, if it was a limit.
            target: The address that was to be checked, if that is known.
        """
        now = self._clock()
        key = (subscriber(caller) if caller else None, code)
        if now - self._logged.get(key, now - 1) < 1:
            return
        self._logged[key] = now
        self._logged.move_to_end(key)
        if self.remembered > MAX_REMEMBERED:
            self._logged.popitem(last=False)
        if now - self._second >= 1:
            self._second, self._lines = now, 0
            if self._untold:
                logger.info("refused %d more callers, which are not logged", self._untold)
                self._untold = 0
        self._lines += 1
        if self._lines > MAX_LOGGED:
            self._untold += 1
            return
        logger.info(
            "refused caller=%s code=%s%s%s",
            caller or "unknown",
            code,
            f" limit={limit}" if limit else "",
            f" target={target}" if target else "",
        )


class RequestTimer:
    """Times each request that ``app`` gets, by its route, however it is answered.

    Args:
        app: The application.
        metrics: Where requests are counted.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Do what ``app`` does."""
        started = scope.get(STARTED) or time.perf_counter()
        try:
            await self._app(scope, receive, send)
        finally:
            if scope["type"] == "http":
                route = getattr(scope.get("route"), "path", "")  # as the router has noted it
                self._metrics.time_request(route, time.perf_counter() - started)
