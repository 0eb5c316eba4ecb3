"""The metrics as Prometheus reads them: over HTTP, on an address of their own."""

import contextlib
import functools
import logging
import os
import resource
import socket
import sys
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, Metric, ProcessCollector, make_wsgi_app
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.registry import Collector

from port_checker import __version__
from port_checker.metrics import DURATION, FAMILIES, REQUESTS, VOTES, Family, Snapshot, Totals

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication

_PREFIX: Final = "port_checker_"

# Connections, and so threads, at once: scrapers are one or two.
_MAX_CONNECTIONS = 8

_CPU_SECONDS: Final = "process_cpu_seconds"
_START_TIME: Final = "process_start_time_seconds"

logger = logging.getLogger(__name__)


def expose(totals: Totals, listener: socket.socket) -> None:
    """Serve the metrics from a thread, at ``/metrics``, until the process ends.

    A thread answers while the event loop is busy, and callers' connections do not count there.

    Args:
        totals: The figures.
        listener: A listening TCP socket.
    """
    registry = CollectorRegistry()
    registry.register(_TotalsCollector(totals))
    registry.register(_ProcessesCollector(totals))
    server = _Server(listener, registry)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()


class _Handler(WSGIRequestHandler):
    timeout = 10  # seconds for which a thread waits for somebody who sends or reads nothing

    def log_message(self, *_: object) -> None:
        """Log no scrape."""


class _Server(ThreadingMixIn, WSGIServer):
    """What prometheus_client's own server does, without tracebacks on stderr, and without DNS.

    It has few threads: the connection that has been there for the longest makes way for another.
    """

    daemon_threads = True

    def __init__(self, listener: socket.socket, registry: CollectorRegistry) -> None:
        super().__init__(listener.getsockname(), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        # Not HTTPServer's, which would ask DNS for the name of the address.
        self.server_name, self.server_port = listener.getsockname()[:2]
        self.setup_environ()
        self.set_app(functools.partial(_answer, make_wsgi_app(registry)))
        self._connections: dict[socket.socket, None] = {}
        self._has_room = threading.Semaphore(_MAX_CONNECTIONS)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread, once there is room for one."""
        if not self._has_room.acquire(blocking=False):
            with contextlib.suppress(OSError, StopIteration):  # it is about to end by itself
                next(iter(self._connections.copy())).shutdown(socket.SHUT_RDWR)
            self._has_room.acquire()
        self._connections[request] = None
        try:
            super().process_request(request, client_address)
        except BaseException:  # no more threads
            self._forget(request)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, and leave room for the next one."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._forget(request)

    def _forget(self, request: socket.socket) -> None:
        del self._connections[request]
        self._has_room.release()

    def handle_error(self, *_: object) -> None:
        """Log a bug. A connection that was reset is none."""
        error = sys.exception()
        if not isinstance(error, OSError):
            logger.error("The metrics could not be sent", exc_info=error)


def _answer(
    app: "WSGIApplication", environ: dict[str, Any], start_response: "StartResponse"
) -> Iterable[bytes]:
    """Do what ``app`` does, and log its bugs, which wsgiref would write to stderr."""
    try:
        return app(environ, start_response)
    except Exception:
        logger.exception("The metrics could not be put together")
        start_response("500 Internal Server Error", [])
        return []


class _TotalsCollector(Collector):
    def __init__(self, totals: Totals) -> None:
        self._totals = totals

    def describe(self) -> Iterable[Metric]:
        """Leave out what it collects: no other collector has the same names."""
        return ()

    def collect(self) -> Iterator[Metric]:
        totals = self._totals.snapshot()
        build = GaugeMetricFamily(
            "port_checker_build_info", "The version that runs.", labels=["version"]
        )
        build.add_metric([__version__], 1)
        yield build
        for family in FAMILIES:
            if family is DURATION or family is REQUESTS:
                yield _histogram(family, totals)
                continue
            if family is VOTES:
                yield _votes(totals)
                continue
            kind = CounterMetricFamily if family.is_counter else GaugeMetricFamily
            labels = [family.label] if family.label else []
            metric = kind(_PREFIX + family.name, family.documentation, labels=labels)
            for value in family.values if family.is_counter or totals.has_gauges else ():
                metric.add_metric([value] if family.label else [], totals[family.name, value])
            yield metric
        yield GaugeMetricFamily(
            "port_checker_workers", "Processes that serve.", value=len(totals.workers)
        )
        yield CounterMetricFamily(
            "port_checker_worker_deaths",
            "Workers that ended without being told to.",
            value=totals.deaths,
        )


def _votes(totals: Snapshot) -> Metric:
    metric = CounterMetricFamily(
        _PREFIX + VOTES.name, VOTES.documentation, labels=["perspective", "vote"]
    )
    for labels, number in totals.votes.items():
        metric.add_metric(labels, number)
    return metric


def _histogram(family: Family, totals: Snapshot) -> Metric:
    """Return a histogram, or one for each value of the label: ``value bucket`` are the figures'."""
    labels = [family.label] if family is REQUESTS else []
    metric = HistogramMetricFamily(_PREFIX + family.name, family.documentation, labels=labels)
    buckets: list[tuple[str, float]] = []
    count = 0.0
    for value in family.values:
        *label, bound = value.split(" ")
        if bound == "sum":  # the last one
            metric.add_metric(label, buckets, totals[family.name, value])
            buckets, count = [], 0.0
            continue
        count += totals[family.name, value]
        buckets.append((bound, count))
    return metric


class _ProcessesCollector(Collector):
    """The standard figures of a process, for this one and its workers together.

    All are sums but the time of the start, which is this process's.
    """

    def __init__(self, totals: Totals) -> None:
        self._totals = totals
        self._lock = threading.Lock()
        self._cpu_seconds = 0.0

    def collect(self) -> Iterator[Metric]:
        # What ended workers have used comes first: one that ends just now is then left out, rather
        # than counted twice.
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        workers: defaultdict[str, float] = defaultdict(float)
        workers[_CPU_SECONDS] = ended.ru_utime + ended.ru_stime
        for worker in set(self._totals.snapshot().workers) - {os.getpid()}:
            for metric in _process(worker):
                workers[metric.name] += metric.samples[0].value
        for metric in _process(os.getpid()):
            (sample,) = metric.samples
            value = sample.value
            if metric.name != _START_TIME:
                value += workers[metric.name]
            if metric.name == _CPU_SECONDS:
                with self._lock:  # a counter never falls, also when somebody was left out
                    value = self._cpu_seconds = max(self._cpu_seconds, value)
            metric.samples = [sample._replace(value=value)]
            yield metric


def _process(process: int) -> Iterable[Metric]:
    """Return the figures of one process; none if it has ended."""
    return ProcessCollector(pid=lambda: process, registry=None).collect()
