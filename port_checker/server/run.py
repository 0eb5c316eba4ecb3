"""The server process: its listening socket, its limits, its workers, and its shutdown."""

import asyncio
import contextlib
import errno
import functools
import gc
import logging
import math
import os
import resource
import socket
import stat
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import cast

import uvicorn
from starlette.types import ASGIApp
from uvicorn import Config

from port_checker.checker import max_for_caller, max_for_others, max_request_for_others
from port_checker.handshake import trust_trouble
from port_checker.linux import (
    ConnectionTracking,
    connection_tracking,
    descriptor_limit,
    grow_descriptor_table,
    raise_descriptor_limit,
)
from port_checker.metrics import Metrics, StatusLine, Totals
from port_checker.server import systemd
from port_checker.server.connections import ConnectionLimits, LogRefusal
from port_checker.server.distributor import ReceivedConnections
from port_checker.server.listener import Listener
from port_checker.server.logs import dropped_lines, log_uncaught, set_up_logging
from port_checker.server.protocol import BoundedProtocol
from port_checker.server.reload import ReloadRequest, ReloadRequests
from port_checker.server.signals import stop_on_signals
from port_checker.server.workers import (
    BEAT,
    Assignment,
    Supervisor,
    own_command,
    shared_row,
    write_traceback_when_aborted,
)
from port_checker.settings import (
    CLIENT_PATIENCE,
    IN_PROCESS,
    PREFIXES,
    UNIX,
    Endpoint,
    Rate,
    Settings,
    SettingsError,
    load_settings,
    warnings_of_names,
)

# Connections waiting for accept(). The kernel caps it at net.core.somaxconn.
_BACKLOG = 4096

# Bytes that the kernel keeps of what a client has sent and we have not read. It doubles the number
# for its own use. Requests are much smaller.
_RECEIVE_BUFFER = 64 * 1024

# Seconds between two looks at whether the requests in progress have finished.
_STOP_INTERVAL = 0.1

# Seconds, from when it stops, for requests of those whose connections it has accepted, where others
# wait for the next process, and none has to be refused.
_LAST_REQUESTS = 2.0

# Clients' connections in one process, however many descriptors there are.
_MAX_CONNECTIONS = 50_000

# Collections of the young generation for each of the middle one, and of that for each full one.
# With the defaults of 10, in an attack by 3,000 connections, the one took 3 to 18 ms five times a
# second, and the other 20 to 40 ms every two seconds (measured).
_MIDDLE_COLLECTION = 3
_FULL_COLLECTION = 3000

# Descriptors that the process itself needs: log, event loop, listening socket, and some to spare.
_RESERVED_DESCRIPTORS = 50
_MIN_DESCRIPTORS = _RESERVED_DESCRIPTORS + 2  # for one connection, and one port in flight
_WHERE_LIMIT_IS_RAISED = "LimitNOFILE= in systemd, ulimit -n in a shell"

# Providers' software, and how many seconds it waits for an answer.
_PATIENCE = {
    "golem-vm-provider up to 0.1.63": CLIENT_PATIENCE,
    "golem-vm-provider after 0.1.63": 8.0,
}

# Makes the application of one process, which counts in these metrics.
MakeApp = Callable[[Settings, Metrics], ASGIApp]

logger = logging.getLogger(__name__)


class CannotStart(Exception):
    """The service cannot start; the message is one line for the operator."""


@contextlib.contextmanager
def _refusals_of_the_system(is_starting: Callable[[], bool]) -> Iterator[None]:
    """Turn errors of the system into CannotStart while the service starts."""
    try:
        yield
    except Exception as error:
        if isinstance(error, CannotStart) or not is_starting():
            raise
        cause: BaseException | None = error
        while cause:  # libraries fail once more while they clean up
            if isinstance(cause, OSError) and cause.strerror:
                raise CannotStart(f"cannot start: {cause.strerror}") from error
            if isinstance(cause, MemoryError):
                raise CannotStart("cannot start: out of memory") from error
            if isinstance(cause, RuntimeError) and str(cause) == "can't start new thread":
                raise CannotStart(f"cannot start: {cause}") from error
            cause = cause.__cause__ or cause.__context__
        raise


class Service:
    """The service, in one process or in several.

    Args:
        settings: The operator's settings.
        make_app: Makes the application.
        log_refusal: Logs refusals that the application does not see.
    """

    def __init__(self, settings: Settings, make_app: MakeApp, log_refusal: LogRefusal) -> None:
        self._settings = settings
        self._make_app = make_app
        self._log_refusal = log_refusal
        self._supervisor: Supervisor | None = None
        self._request: ReloadRequest | None = None  # the reload in progress
        self._before: tuple[Settings, dict[str, str]] = (settings, {})  # the last reload
        self._is_ready = False
        with _refusals_of_the_system(lambda: True):
            set_up_logging(debug=settings.debug)
        sys.excepthook = log_uncaught
        write_traceback_when_aborted()

    def run(self) -> bool:
        """Serve until SIGTERM, SIGINT or SIGHUP, then finish the checks in flight.

        Returns:
            Whether it served; False if no worker could start.

        Raises:
            CannotStart: It cannot listen, or lacks memory, descriptors or the like.
        """
        with _refusals_of_the_system(lambda: not self._is_ready):
            return self._run()

    def _run(self) -> bool:
        for warning in warnings_of_names(os.environ):
            logger.warning(warning)
        limit = raise_descriptor_limit()
        if limit != resource.RLIM_INFINITY and limit < _MIN_DESCRIPTORS:  # libuv would abort
            raise CannotStart(
                f"cannot start: this process may open only {limit} files, and needs "
                f"{_MIN_DESCRIPTORS}. Raise that limit ({_WHERE_LIMIT_IS_RAISED})."
            )
        self._settings = fit_descriptor_limit(self._settings, limit)
        warn_of_small_shares(self._settings)
        if trouble := trust_trouble():
            logger.warning("/check-tls answers CHECK_FAILED: %s", trouble)
        passed = systemd.passed_sockets()
        self._listeners, self._listeners_stay = passed or [self._listen()], bool(passed)
        with contextlib.ExitStack() as listening:
            for listener in self._listeners:
                listening.enter_context(listener)
            has_served = self._serve()
        if not passed and self._settings.host.startswith(UNIX):
            with contextlib.suppress(OSError):
                os.unlink(self._settings.host.removeprefix(UNIX))
        if has_served:
            logger.info("Stopped")
        else:
            logger.critical("No worker could start; see the lines above for why")
        return has_served

    def run_worker(self, assignment: Assignment) -> None:
        """Serve as one of several processes, until SIGTERM, or until others serve in its place.

        Raises:
            CannotStart: It lacks memory, descriptors or the like.
        """
        with _refusals_of_the_system(lambda: not self._is_ready):
            self._run_worker(assignment)

    def _run_worker(self, assignment: Assignment) -> None:
        metrics = Metrics(shared_row(assignment.memory, assignment.slot))
        heartbeat = systemd.Heartbeat()
        self._listeners_stay = assignment.listeners_stay
        server = self._server(metrics, heartbeat.beat, heartbeat.stop)
        with ReceivedConnections(assignment.channel, metrics) as connections:
            server.run([connections])

    def _listen(self) -> socket.socket:
        host, port = self._settings.host, self._settings.port
        try:
            return listen(host, port)
        except OSError as error:
            address = host if host.startswith(UNIX) else f"{host} port {port}"
            raise CannotStart(f"cannot listen on {address}: {error.strerror}") from None

    def _expose(self) -> None:
        endpoint = self._settings.metrics
        if endpoint:
            from port_checker.server.prometheus import expose

            try:
                expose(self._totals, listen(endpoint.host, endpoint.port))
            except OSError as error:
                raise CannotStart(f"cannot serve metrics on {endpoint}: {error.strerror}") from None

    def _serve(self) -> bool:
        self._totals = Totals()
        self._expose()
        _log_start(self._settings, self._listeners)
        self._heartbeat = systemd.Heartbeat(StatusLine(self._totals).text)
        with ReloadRequests() as self._requests:
            if self._settings.workers == 1:
                self._serve_alone()
            else:
                self._supervisor = self._make_supervisor()
            if not self._supervisor:
                return True
            stop_on_signals(self._supervisor.stop)
            return self._supervisor.run()

    def _serve_alone(self) -> None:
        """Serve in this process until a signal to stop, or until a reload has started workers."""
        metrics = Metrics()
        self._totals.add(metrics.row, perspectives=self._settings.perspective_names)

        def beat() -> None:
            self._heartbeat.beat()
            self._reload()
            if self._supervisor:
                self._supervisor.look()
                if self._supervisor.is_complete:
                    server.leave()

        server = self._server(metrics, beat, self._heartbeat.stop)
        server.run(list(self._listeners))
        if self._supervisor:
            self._totals.end(metrics.row, is_death=False)
            if server.is_told_to_stop:
                self._supervisor.stop()

    def _make_supervisor(self) -> Supervisor:
        def beat() -> None:
            self._is_ready = True
            self._heartbeat.beat()
            self._reload()

        try:
            return Supervisor(
                own_command("worker"),
                self._settings,
                self._listeners,
                self._totals,
                listeners_stay=self._listeners_stay,
                stop_patience=_stop_patience(self._settings) + 5,
                on_beat=beat,
                on_stop=self._heartbeat.stop,
            )
        except OSError as error:
            raise CannotStart(f"cannot share memory: {error.strerror}") from None

    def _reload(self) -> None:
        """Begin a requested reload, or finish the one in progress."""
        if not self._request:
            self._request = self._requests.next()
            if self._request and (error := self._begin_reload(self._request)):
                self._end_reload(error)
        elif self._supervisor and self._supervisor.is_complete:
            self._end_reload()
        elif self._supervisor and self._supervisor.abandon_renewal():
            self._end_reload("no worker can start; the log says why")
        elif self._supervisor and self._supervisor.has_given_up:
            self._supervisor.stop_workers()
            self._supervisor = None
            self._end_reload("no worker can start; the log says why")

    def _begin_reload(self, request: ReloadRequest) -> str | None:
        """Start workers with new settings; return what went wrong, if anything did."""
        self._before = self._settings, _exchange_environment(request.environment)
        try:
            settings = load_settings()
        except SettingsError as error:
            return str(error)
        in_use = {name: getattr(self._settings, name) for name in ("host", "port", "metrics")}
        for name, value in in_use.items():
            if getattr(settings, name) != value:
                logger.warning("Another %s is used only after a restart", name)
        settings = settings.model_copy(update=in_use)
        self._settings = fit_descriptor_limit(settings, descriptor_limit())
        warn_of_small_shares(self._settings)
        if self._supervisor:
            self._supervisor.renew(self._settings, _stop_patience(self._settings) + 5)
            return None
        try:
            self._supervisor = self._make_supervisor()
        except CannotStart as error:
            return str(error)
        return None

    def _end_reload(self, error: str | None = None) -> None:
        if error:
            self._settings, environment = self._before
            _exchange_environment(environment)
            logger.error("Not reloaded: %s", error)
        else:
            logger.info("Reloaded")
        if self._request:
            self._request.answer(error)
        self._request = None

    def _server(
        self, metrics: Metrics, on_beat: Callable[[], None], on_stop: Callable[[], None]
    ) -> "Server":
        """Return the server of this process."""
        most = max_connections(self._settings)
        grow_descriptor_table(self._settings.max_in_flight + most)
        limits = ConnectionLimits(
            most,
            trusted_proxies=self._settings.trusted_proxies,
            metrics=metrics,
            log_refusal=self._log_refusal,
        )

        def beat() -> None:
            self._is_ready = True
            metrics.sample()
            on_beat()

        make_app = functools.partial(self._make_app, self._settings, metrics)
        config = server_config(self._settings, make_app)
        server = Server(config, limits, beat, on_stop, listeners_stay=self._listeners_stay)
        metrics.watch("connections", lambda: limits.size)
        metrics.watch("connections_limit", lambda: most)
        metrics.watch("event_loop_lag_seconds", lambda: server.lag)
        metrics.watch("log_lines_dropped", dropped_lines)
        return server


class Server(uvicorn.Server):
    """uvicorn's server, with our own listeners and a heartbeat.

    Args:
        config: uvicorn's configuration.
        limits: Of the connections.
        on_beat: Called by the event loop when the server is ready, and every second from then on.
        on_stop: Called when it begins to stop.
        listeners_stay: Whether the listening sockets stay open elsewhere, for the next process:
            connections wait there, rather than be refused while this one stops.

    Attributes:
        lag: How many seconds late the event loop made the last of these calls.
        is_told_to_stop: Whether it has received a signal to stop.
    """

    def __init__(
        self,
        config: Config,
        limits: ConnectionLimits,
        on_beat: Callable[[], None] = lambda: None,
        on_stop: Callable[[], None] = lambda: None,
        *,
        listeners_stay: bool = False,
    ) -> None:
        super().__init__(config)
        self._limits = limits
        self._listeners_stay = listeners_stay
        self._is_leaving = False
        self.is_told_to_stop = False
        self.lag = 0.0
        self._on_beat = on_beat
        self._on_stop = on_stop

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on signals.

        uvicorn would raise a signal again after its shutdown, which would end the process before it
        returns an exit status, and it would not leave alone what was ignored.
        """
        stop_on_signals(self.handle_exit)
        yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop."""
        self.is_told_to_stop = True
        super().handle_exit(sig, frame)

    def leave(self) -> None:
        """Stop after one more answer on each connection: another process has taken over."""
        self._is_leaving = self._limits.is_leaving = self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to serve."""
        await super().startup([])
        loop = asyncio.get_running_loop()
        make_connection = functools.partial(
            BoundedProtocol,
            self._limits,
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
            _loop=loop,
        )
        listeners = [
            Listener(listening, self._limits, make_connection, loop, self.leave)
            for listening in sockets or []
        ]
        self.servers = cast(list[asyncio.Server], listeners)  # uvicorn only closes them
        # What was made until now stays. To look at it again in each full collection would hold up
        # everybody for 38 ms; one takes 1 ms so (measured, with 18,000 ports in flight).
        gc.collect()
        gc.freeze()
        # With 3,000 connections a full collection takes 20 to 40 ms (measured), and finds nothing:
        # they leave no cycles. Young objects are collected as usual, but fewer at once. (Since 3.14
        # the collector does so by itself, and the middle threshold means something else.)
        young, middle, _ = gc.get_threshold()
        if sys.version_info < (3, 14):
            middle = _MIDDLE_COLLECTION
        gc.set_threshold(young, middle, _FULL_COLLECTION)
        self._keep_beating(loop, loop.time())

    def _keep_beating(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        self.lag = max(0.0, loop.time() - due)
        self._on_beat()
        self._limits.return_memory()
        due = loop.time() + BEAT
        loop.call_at(due, self._keep_beating, loop, due)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish what is in progress, and refuse all other requests meanwhile."""
        if self._is_leaving:
            await self._wait_for_connections(self.config.timeout_graceful_shutdown or 0)
        else:
            self._on_stop()
            if self._listeners_stay:
                self._limits.is_leaving = True
                await self._wait_for_connections(_LAST_REQUESTS)
        for connection in list(self.server_state.connections):
            if isinstance(connection, BoundedProtocol):
                connection.drain()
        # uvicorn would stop listening first, and leave new connections without an answer.
        patience: float = self.config.timeout_graceful_shutdown or 0
        while self.server_state.tasks and patience > 0 and not self.force_exit:
            await asyncio.sleep(_STOP_INTERVAL)
            patience -= _STOP_INTERVAL
        self.config.timeout_graceful_shutdown = math.ceil(patience) + 1
        self._limits.has_stopped = True  # some may have been accepted, and not made yet
        # uvicorn closes the sockets. The parent of workers needs them, which this process may be.
        await super().shutdown([] if self._is_leaving else sockets)

    async def _wait_for_connections(self, patience: float) -> None:
        """Wait until each connection has had one more answer; new ones wait, or are another's."""
        is_told_to_stop = self.is_told_to_stop
        for listener in self.servers:
            listener.close()
        for connection in list(self.server_state.connections):
            if isinstance(connection, BoundedProtocol):
                connection.leave()
        await asyncio.sleep(_STOP_INTERVAL)  # some may have been accepted, and not made yet
        while (
            self.server_state.connections
            and patience > 0
            and self.is_told_to_stop == is_told_to_stop
        ):
            await asyncio.sleep(_STOP_INTERVAL)
            patience -= _STOP_INTERVAL


def server_config(settings: Settings, make_app: Callable[[], ASGIApp]) -> Config:
    """Return uvicorn's configuration.

    Args:
        settings: The operator's settings.
        make_app: Called once.
    """
    return Config(
        make_app,
        factory=True,
        http=BoundedProtocol,
        loop="uvloop",
        ws="none",
        lifespan="on",
        log_config=None,  # server/logs.py has set it up
        # A line for each request would cost a fifth of the throughput (measured), and says less
        # than our own line for each check.
        access_log=settings.debug,
        # api/caller.py works out the caller. uvicorn would hide whether it was forwarded.
        proxy_headers=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_graceful_shutdown=_stop_patience(settings),
    )


def _stop_patience(settings: Settings) -> int:
    """Return how many seconds running checks have to finish when the service stops."""
    return math.ceil(settings.longest_check) + 1


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Args:
        host: ``unix:/path``, or an address. On ``::`` it accepts IPv4 connections as well, and only
            those where the kernel has no IPv6.
        port: Not used on a Unix socket.

    Raises:
        OSError: The address is in use, is not this machine's, or is not permitted.
    """
    if host.startswith(UNIX):
        return _listen_on_path(host.removeprefix(UNIX))
    address = "127.0.0.1" if host == "localhost" else host
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        if address == "::" and error.errno == errno.EAFNOSUPPORT:
            return listen("0.0.0.0", port)  # noqa: S104  # as asked
        raise
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted connections inherit it.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address != "::"))
        # An IPv6 address may have a scope: fe80::1%eth0.
        listener.bind(socket.getaddrinfo(address, port, flags=socket.AI_NUMERICHOST)[0][4])
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _listen_on_path(path: str) -> socket.socket:
    """Listen on a Unix socket, for everyone who has access to its directory.

    A socket that an earlier process left behind is replaced.
    """
    listener = socket.socket(socket.AF_UNIX)
    try:
        if _is_left_behind(path):
            os.unlink(path)
        listener.bind(path)
        os.chmod(path, 0o666)  # noqa: S103  # nginx has a user of its own, as this service does
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _is_left_behind(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        client.setblocking(False)  # where the backlog is full, somebody listens
        return client.connect_ex(path) == errno.ECONNREFUSED and stat.S_ISSOCK(
            os.stat(path).st_mode
        )


def _exchange_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Replace the environment variables that may be settings, and return the old ones."""
    before = {name: value for name, value in os.environ.items() if name.startswith(PREFIXES)}
    for name in before:
        del os.environ[name]
    os.environ.update(environment)
    return before


def fit_descriptor_limit(settings: Settings, limit: int) -> Settings:
    """Return settings whose ports in flight use at most half of ``limit`` descriptors.

    Each port in flight uses one descriptor. The other half is for clients' connections and for the
    process itself. The share of one caller is lowered in proportion.
    """
    fitting = max(1, limit // 2)
    if limit == resource.RLIM_INFINITY or settings.max_in_flight <= fitting:
        return settings
    logger.warning(
        "PORT_CHECK_MAX_IN_FLIGHT=%d lowered to %d: this process may open only %d files. "
        "Raise that limit (%s).",
        settings.max_in_flight,
        fitting,
        limit,
        _WHERE_LIMIT_IS_RAISED,
    )
    share = max(1, settings.max_in_flight_per_caller * fitting // settings.max_in_flight)
    return settings.model_copy(update={"max_in_flight": fitting, "max_in_flight_per_caller": share})


def warn_of_small_shares(settings: Settings) -> None:
    """Warn of each share of the ports in flight that is too small for a full request."""
    for whose, share in (
        (
            "one caller",
            max_for_caller(settings.max_in_flight, settings.max_in_flight_per_caller),
        ),
        ("all checks of others' addresses together", max_for_others(settings.max_in_flight)),
    ):
        if share < settings.max_ports:
            logger.warning(
                "A request for PORT_CHECK_MAX_PORTS=%d ports will be refused: %s may have at most "
                "%d in flight. Raise PORT_CHECK_MAX_IN_FLIGHT, or the limit of open files.",
                settings.max_ports,
                whose,
                share,
            )
    if settings.perspectives and settings.targets != "caller":
        _warn_of_places_that_do_not_fit(settings)


def _warn_of_places_that_do_not_fit(settings: Settings) -> None:
    """Warn if a full request for somebody else's ports can never be admitted.

    Each of its ports takes room, and counts towards the limits, once for each place.
    """
    places = 1 + len(settings.perspectives)
    least = settings.max_ports * places
    in_flight, share = settings.max_in_flight, settings.max_in_flight_per_caller
    rates = {
        "PORT_CHECK_OTHERS_RATE_LIMIT": settings.others_rate_limit,
        "PORT_CHECK_TARGET_RATE_LIMIT": settings.target_rate_limit,
    }
    fitting = min(
        max_request_for_others(in_flight, share, places),
        *(rate.count // places if rate else sys.maxsize for rate in rates.values()),
    )
    if fitting >= settings.max_ports:
        return
    needed = [
        f"{name}={Rate(least, rate.period)}"
        for name, rate in rates.items()
        if rate and rate.count < least
    ]
    if share < least:
        needed.append(f"PORT_CHECK_MAX_IN_FLIGHT_PER_CALLER={least}")
    if max_request_for_others(in_flight, least, places) < settings.max_ports:
        # Half of them are for others' addresses, and half of that for one request.
        needed.append(f"PORT_CHECK_MAX_IN_FLIGHT={4 * least}")
    logger.warning(
        "A request for more than %d ports of an address that is not the caller's own will be "
        "refused, since each counts once for each of %d places. For PORT_CHECK_MAX_PORTS=%d, set "
        "at least %s.",
        fitting,
        places,
        settings.max_ports,
        ", ".join(needed),
    )


def max_connections(settings: Settings) -> int:
    """Return how many clients' connections the descriptor limit allows beside the ports in flight.

    Each connection may run a check, which uses one more descriptor for each other place.
    """
    limit = descriptor_limit()
    if limit == resource.RLIM_INFINITY:
        return _MAX_CONNECTIONS
    left = limit - settings.max_in_flight - _RESERVED_DESCRIPTORS
    return min(_MAX_CONNECTIONS, max(1, left // (1 + len(settings.perspectives))))


def _log_start(settings: Settings, listeners: Sequence[socket.socket]) -> None:
    logger.info(
        "Listening on %s; processes: %d, "
        "ports in flight in each: %d; limits: %s requests per caller, %s ports per target; %s%s",
        ", ".join(map(_describe, listeners)),
        settings.workers,
        settings.max_in_flight,
        settings.caller_rate_limit or "unlimited",
        settings.target_rate_limit or "unlimited",
        _longest_check(settings),
        _perspectives(settings),
    )
    if settings.longest_check > CLIENT_PATIENCE:
        logger.warning(
            "Providers' software will give up: %s; lower PORT_CHECK_RETRIES, PORT_CHECK_TIMEOUT "
            "or PORT_CHECK_RETRY_DELAY",
            _longest_check(settings),
        )
    if advice := connection_tracking_advice(settings, connection_tracking()):
        logger.warning(advice)


def _perspectives(settings: Settings) -> str:
    if not settings.perspectives:
        return ""
    mode = ", only observed" if settings.perspectives_mode == "observe" else ""
    return f"; perspectives: {', '.join(settings.perspective_names)}{mode}"


def _describe(listener: socket.socket) -> str:
    """Return where a socket listens, and the page's URL, where it has one."""
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:  # systemd may pass one with an abstract name: bytes
        return f"{UNIX}{name if isinstance(name, str) else '@' + name[1:].decode(errors='replace')}"
    host, port, *_ = name
    anywhere = host in ("0.0.0.0", "::")  # noqa: S104  # compared, not bound
    url = f"http://{Endpoint('localhost' if anywhere else host, port)}"
    return f"{Endpoint(host, port)}, page at {url}/, docs at {url}/docs"


def _longest_check(settings: Settings) -> str:
    text = f"a check takes up to {settings.longest_check:g} s"
    impatient = [
        f"{software} waits {patience:g} s"
        for software, patience in _PATIENCE.items()
        if patience < settings.longest_check
    ]
    return f"{text} ({', '.join(impatient)})" if impatient else text


def connection_tracking_advice(
    settings: Settings, tracking: ConnectionTracking | None
) -> str | None:
    """Return what to do where checks can fill the firewall's table of connections.

    A port that does not answer leaves an entry for each attempt, and a port that is open leaves one
    for its closed connection (TIME_WAIT). Both stay long after the attempt has ended. When the
    table is full the kernel drops every new connection, and ports that are open would look closed.

    Args:
        settings: The operator's settings.
        tracking: How connection tracking is set on this machine, if it is there.

    Returns:
        The advice, or None if the table holds what silent ports leave, and the open ports of one
        caller that asks for all that it may.
    """
    if tracking is None:
        return None
    # One port in flight after the other, none of which answers.
    attempt = settings.longest_check / settings.retries
    kept = tracking.syn_sent_timeout + settings.timeout  # SYNs that are sent again prolong it
    silent = settings.max_in_flight * math.ceil(kept / attempt) * settings.workers
    open_ = math.ceil(_open_ports_within(settings, tracking.time_wait_timeout))
    if silent + open_ <= tracking.max_entries:
        return None
    return (
        f"If this machine's firewall tracks connections, checks can fill its table of "
        f"{tracking.max_entries} entries: silent ports take up to {silent}, and open ports "
        f"{open_} for each caller at its full rate. Set "
        f"net.netfilter.nf_conntrack_max={silent + open_} or more (sysctl), lower "
        "PORT_CHECK_MAX_IN_FLIGHT and PORT_CHECK_OWN_RATE_LIMIT, or exempt the checks (notrack in "
        "docs/operating.md)"
    )


def _open_ports_within(settings: Settings, seconds: float) -> float:
    """Return how many ports one caller may have had checked in the last ``seconds``.

    A limit lets its whole count through at once, and then as many again in each period.
    """

    def passed(rate: Rate) -> float:
        return rate.count * (1 + seconds / rate.period.total_seconds())

    by_requests = math.inf
    if requests := settings.caller_rate_limit:
        by_requests = passed(requests) * settings.max_ports
    rates = settings.own_rate_limit, settings.others_rate_limit
    by_ports = sum(passed(rate) if rate else math.inf for rate in rates)
    most = min(by_requests, by_ports)
    if math.isinf(most):
        return 0  # without limits no table is large enough for certain
    # Only a store that processes share makes them share the limits.
    return most * (settings.workers if settings.rate_limit_store == IN_PROCESS else 1)
