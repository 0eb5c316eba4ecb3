"""uvicorn around the application: its listening socket, its processes, its limits, its end."""

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

# Connections that wait for accept(). The kernel lowers it to net.core.somaxconn.
_BACKLOG = 4096

# Connections of callers in one process, however many descriptors there are.
_MOST_CONNECTIONS = 50_000

# Descriptors of the process itself: its log, its event loop, its listening socket, some to spare.
_OWN_DESCRIPTORS = 50

logger = logging.getLogger(__name__)


def serve(settings: Settings) -> int:
    """Run the service until SIGTERM or SIGINT; checks in flight are finished first.

    Returns:
        The exit status of the program: 0, or 1 if it could not listen.
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
    # uvicorn raises the signal that ended it once more, when all is done: the process is then
    # ended by that signal, unless somebody takes it.
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
        settings: How to serve.
        make_app: Makes the application, once in each process.
        room: Bounds the connections; each process has its own.
        log_config: For ``logging.config.dictConfig``, in each process; None leaves logging alone.
    """
    return Config(
        make_app,
        factory=True,
        workers=settings.workers,
        # Called like the class that uvicorn expects.
        http=functools.partial(BoundedProtocol, room),  # type: ignore[arg-type]
        loop="uvloop",
        ws="none",
        lifespan="on",
        log_config=log_config,
        # A line for each request costs a fifth of all (measured) and says less than ours does.
        access_log=settings.debug,
        # The application decides who the caller is; uvicorn would lose whether it was forwarded.
        proxy_headers=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_graceful_shutdown=math.ceil(settings.longest_check) + 1,
    )


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; on ``::`` it takes IPv4 connections, too.

    Raises:
        OSError: The address is in use, not this machine's, or not permitted.
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
    # Worker processes inherit it.
    listener.set_inheritable(True)
    return listener


def fit_descriptor_limit(settings: Settings, limit: int) -> Settings:
    """Return settings under which the ports in flight take at most half of ``limit`` descriptors.

    A port takes one descriptor. The other half is for callers' connections, and what each check
    and the process need besides.
    """
    fitting = max(1, limit // 2)
    if limit == resource.RLIM_INFINITY or settings.max_in_flight <= fitting:
        return settings
    logger.warning(
        "PORT_CHECK_MAX_IN_FLIGHT=%d lowered to %d: this process may open %d files. "
        "Raise that limit (LimitNOFILE= in systemd, ulimit -n in a shell).",
        settings.max_in_flight,
        fitting,
        limit,
    )
    return settings.model_copy(update={"max_in_flight": fitting})


def max_connections(settings: Settings) -> int:
    """Return how many connections of callers fit this process's descriptors, beside the ports.

    Each may have a check, which takes a descriptor of its own; and some are the process's own.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return _MOST_CONNECTIONS
    return min(_MOST_CONNECTIONS, max(1, (limit - settings.max_in_flight - _OWN_DESCRIPTORS) // 2))


def _warn_of_unknown_names() -> None:
    for name, nearest in unknown_names(os.environ).items():
        advice = f"did you mean {nearest}?" if nearest else "the README lists all settings."
        logger.warning("%s is not a setting; %s", name, advice)


def _log_start(settings: Settings, listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    anywhere = settings.host in ("0.0.0.0", "::")  # noqa: S104  # compared, not bound
    local = "localhost" if anywhere else host
    logger.info(
        "Listening on %s:%d, docs at http://%s:%d/docs; %d process(es), %d ports in flight each; "
        "limits: %s requests per caller, %s ports per target; checks take up to %g s",
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
            "Checks can take %g s, and providers' software gives up after %g s; lower "
            "PORT_CHECK_RETRIES, PORT_CHECK_TIMEOUT or PORT_CHECK_RETRY_DELAY",
            settings.longest_check,
            CLIENT_PATIENCE,
        )
