"""The server process: its listening socket, its limits, its workers, and its shutdown."""

import functools
import logging
import logging.config
import math
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from uvicorn import Config, Server
from uvicorn.supervisors import Multiprocess

from port_checker.linux import raise_descriptor_limit
from port_checker.server.app import create_app
from port_checker.server.logs import logging_config
from port_checker.server.protocol import BoundedProtocol, ConnectionLimits
from port_checker.server.settings import CLIENT_PATIENCE, Settings, unknown_names

# Connections waiting for accept(). The kernel caps it at net.core.somaxconn.
_BACKLOG = 4096

# Clients' connections in one process, however many descriptors there are.
_MAX_CONNECTIONS = 50_000

# Descriptors that the process itself needs: log, event loop, listening socket, and some to spare.
_RESERVED_DESCRIPTORS = 50

logger = logging.getLogger(__name__)


def serve(settings: Settings) -> int:
    """Run the service until SIGTERM or SIGINT, then finish the checks in flight.

    Returns:
        The program's exit status: 0, or 1 if it could not listen.
    """
    log_config = logging_config(debug=settings.debug)
    logging.config.dictConfig(log_config)
    _warn_of_unknown_names()
    settings = fit_descriptor_limit(settings, raise_descriptor_limit())
    try:
        listener = listen(settings.host, settings.port)
    except OSError as error:
        address = f"{settings.host} port {settings.port}"
        sys.stderr.write(f"port-checker: cannot listen on {address}: {error.strerror}\n")
        return 1
    _log_start(settings, listener)
    room = ConnectionLimits(max_connections(settings))
    config = server_config(settings, functools.partial(create_app, settings), room, log_config)
    # After its shutdown uvicorn raises the signal that it received again, and the default handler
    # would end the process before it returns an exit status.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    if settings.workers == 1:
        Server(config).run(sockets=[listener])
    else:
        Multiprocess(config, sockets=[listener]).run()
    logger.info("Stopped")
    return 0


def server_config(
    settings: Settings,
    make_app: Callable[[], FastAPI],
    room: ConnectionLimits,
    log_config: dict[str, Any] | None = None,
) -> Config:
    """Return uvicorn's configuration.

    Args:
        settings: The operator's settings.
        make_app: Called once in each process.
        room: Limits the connections; each process has its own copy.
        log_config: For ``logging.config.dictConfig`` in each process; None leaves logging as it is.
    """
    return Config(
        make_app,
        factory=True,
        workers=settings.workers,
        # uvicorn calls it as it would call the class.
        http=functools.partial(BoundedProtocol, room),  # type: ignore[arg-type]
        loop="uvloop",
        ws="none",
        lifespan="on",
        log_config=log_config,
        # A line for each request would cost a fifth of the throughput (measured), and says less
        # than our own line for each check.
        access_log=settings.debug,
        # server/caller.py works out the caller. uvicorn would hide whether it was forwarded.
        proxy_headers=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_graceful_shutdown=math.ceil(settings.longest_check) + 1,
    )


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; on ``::`` it accepts IPv4 connections as well.

    Raises:
        OSError: The address is in use, is not this machine's, or is not permitted.
    """
    address = "127.0.0.1" if host == "localhost" else host
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address != "::"))
        listener.bind((address, port))
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    # For the worker processes.
    listener.set_inheritable(True)
    return listener


def fit_descriptor_limit(settings: Settings, limit: int) -> Settings:
    """Return settings whose ports in flight use at most half of ``limit`` descriptors.

    Each port in flight uses one descriptor. The other half is for clients' connections, for the
    one more that each check uses, and for the process itself.
    """
    fitting = max(1, limit // 2)
    if limit == resource.RLIM_INFINITY or settings.max_in_flight <= fitting:
        return settings
    logger.warning(
        "PORT_CHECK_MAX_IN_FLIGHT=%d lowered to %d: this process may open only %d files. "
        "Raise that limit (LimitNOFILE= in systemd, ulimit -n in a shell).",
        settings.max_in_flight,
        fitting,
        limit,
    )
    return settings.model_copy(update={"max_in_flight": fitting})


def max_connections(settings: Settings) -> int:
    """Return how many clients' connections the descriptor limit allows beside the ports in flight.

    Each connection may run a check, which uses one more descriptor.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return _MAX_CONNECTIONS
    left = limit - settings.max_in_flight - _RESERVED_DESCRIPTORS
    return min(_MAX_CONNECTIONS, max(1, left // 2))


def _warn_of_unknown_names() -> None:
    for name, nearest in unknown_names(os.environ).items():
        advice = f"did you mean {nearest}?" if nearest else "see the README for all settings."
        logger.warning("%s is not a setting; %s", name, advice)


def _log_start(settings: Settings, listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    anywhere = settings.host in ("0.0.0.0", "::")  # noqa: S104  # compared, not bound
    local = "localhost" if anywhere else host
    logger.info(
        "Listening on %s:%d, docs at http://%s:%d/docs; processes: %d, "
        "ports in flight in each: %d; limits: %s requests per caller, %s ports per target; "
        "a check takes up to %g s",
        host,
        port,
        local,
        port,
        settings.workers,
        settings.max_in_flight,
        settings.caller_rate_limit or "unlimited",
        settings.target_rate_limit or "unlimited",
        settings.longest_check,
    )
    if settings.longest_check > CLIENT_PATIENCE:
        logger.warning(
            "A check can take %g s, but providers' software gives up after %g s: lower "
            "PORT_CHECK_RETRIES, PORT_CHECK_TIMEOUT or PORT_CHECK_RETRY_DELAY",
            settings.longest_check,
            CLIENT_PATIENCE,
        )
