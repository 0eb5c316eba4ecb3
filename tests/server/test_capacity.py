"""The service at its limits, as a process of its own, asked by another.

The load comes from a third process, so that neither making it nor measuring it slows what is
measured. Figures are printed: ``pytest -rP tests/test_capacity.py``.
"""

import asyncio
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Coroutine, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from tests.support.http import HEALTH, check_of
from tests.support.loopback import open_port, ports, silent_port
from tests.support.namespace import ROOT
from tests.support.service import Program, program

NO_LIMITS: dict[str, Any] = {
    "PORT_CHECKER_RATE_LIMIT": "off",
    "PORT_CHECK_TARGET_RATE_LIMIT": "off",
}
Figures = dict[str, Any]


# What runs in the process of the load.


async def ask(port: int, request: bytes) -> tuple[int, Any, float]:
    """Ask on a connection of its own; return the status, the JSON and how many seconds it took."""
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        status, body = await _answer(reader)
        return status, body, time.perf_counter() - started
    finally:
        writer.close()


async def _answer(reader: asyncio.StreamReader) -> tuple[int, Any]:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
    return int(head.split()[1]), json.loads(await reader.readexactly(length))


class Prober:
    """Asks for ``/health`` over and over, on new connections and on one that is kept."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._seconds: list[float] = []
        self._task = asyncio.create_task(self._probe())

    async def _probe(self) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        while True:
            started = time.perf_counter()
            writer.write(HEALTH)
            assert await _answer(reader) == (200, {"status": "ok"})
            self._seconds.append(time.perf_counter() - started)
            status, _, seconds = await ask(self._port, HEALTH)
            assert status == 200
            self._seconds.append(seconds)
            await asyncio.sleep(0.01)

    def figures(self) -> Figures:
        """Stop; return how many there were, and milliseconds of the median, 99th and last."""
        if self._task.done():
            self._task.result()
        self._task.cancel()
        ordered = sorted(self._seconds)
        at = {"p50": 0.5, "p99": 0.99, "max": 1.0}
        return {"health": len(ordered)} | {
            f"health_{name}_ms": _ms(ordered[min(len(ordered) - 1, int(share * len(ordered)))])
            for name, share in at.items()
        }


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)


async def fill(port: int, opened: int, silent: Sequence[int]) -> Figures:
    """Have 100 checks of 100 silent ports at once, and ask for one more while they last."""
    prober = Prober(port)
    request = check_of(*silent)
    checks = [asyncio.create_task(ask(port, request)) for _ in range(100)]
    started = time.perf_counter()
    further = check_of(opened)
    while (await ask(port, further))[0] != 503:
        assert time.perf_counter() - started < 5, "never full"
        await asyncio.sleep(0.02)
    refused = []
    for _ in range(50):
        status, body, seconds = await ask(port, further)
        assert (status, body["detail"]["code"]) == (503, "OVERLOADED")
        refused.append(seconds)
    expected = {str(one): {"accessible": False, "error": "Connection timed out"} for one in silent}
    answers = await asyncio.gather(*checks)
    status, body, _ = await ask(port, further)
    return prober.figures() | {
        "right": sum(status == 200 and body["results"] == expected for status, body, _ in answers),
        "slowest_s": round(max(seconds for *_, seconds in answers), 2),
        "overloaded_p50_ms": _ms(sorted(refused)[25]),
        "overloaded_max_ms": _ms(max(refused)),
        "right_afterwards": (status, body["success"]) == (200, True),
    }


HALF_A_HEAD = b"POST /check-ports HTTP/1.1\r\nHost: x\r\nX: y"
HALF_A_BODY = b"POST /check-ports HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{"


async def _misbehave(port: int, sent: bytes, trickle: bytes = b"") -> float:
    """Send a part of a request; return after how many seconds the connection was closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    started = time.perf_counter()
    closed = asyncio.create_task(_until_closed(reader))
    try:
        writer.write(sent)
        for byte in trickle:
            if await asyncio.wait([closed], timeout=1) != (set(), {closed}):
                break
            writer.write(bytes([byte]))
        await closed
        return time.perf_counter() - started
    finally:
        writer.close()


async def _until_closed(reader: asyncio.StreamReader) -> None:
    try:
        while await reader.read(1000):
            pass
    except ConnectionError:
        pass


async def crowd(port: int, *opened: int) -> Figures:
    """Have 2,400 connections misbehave, and for 15 s 20 honest checks a second beside them."""
    prober = Prober(port)
    loop = asyncio.get_running_loop()
    started = loop.time()
    kinds = [(HALF_A_HEAD, b"")] * 10 + [(HALF_A_HEAD, b"y" * 30), (HALF_A_BODY, b"")]
    bad: list[asyncio.Task[float]] = []
    honest: list[asyncio.Task[tuple[int, Any, float]]] = []

    async def be_honest() -> None:
        for number in range(300):
            await asyncio.sleep(started + number / 20 - loop.time())
            honest.append(asyncio.create_task(ask(port, check_of(*opened))))

    async def be_bad() -> None:
        for _ in range(200):  # within half a second or so, before any honest one is done
            bad.extend(asyncio.create_task(_misbehave(port, *kind)) for kind in kinds)
            await asyncio.sleep(0.002)

    await asyncio.gather(be_honest(), be_bad())
    answers = await asyncio.gather(*honest)
    lasted = await asyncio.gather(*bad)
    expected = {str(one): {"accessible": True, "error": None} for one in opened}
    slowest = max(seconds for *_, seconds in answers)
    return prober.figures() | {
        "honest": len(answers),
        "right": sum(status == 200 and body["results"] == expected for status, body, _ in answers),
        "honest_max_ms": _ms(slowest),
        "bad": len(lasted),
        "closed_first_s": round(min(lasted), 2),
        "closed_last_s": round(max(lasted), 2),
    }


def put(load: Coroutine[Any, Any, Figures]) -> None:
    """Run a load, and print what it measured for the test to read."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard > 0 else soft, hard))

    async def bounded() -> Figures:
        async with asyncio.timeout(40):
            return await load

    print(json.dumps(asyncio.run(bounded())))  # noqa: T201  # it is what the test reads


def measure(load: str, *arguments: object) -> Figures:
    """Put a load on a service from a process of its own, and show the figures."""
    words = ", ".join(map(repr, arguments))
    done = subprocess.run(
        [sys.executable, "-c", f"from tests.server.test_capacity import *; put({load}({words}))"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures: Figures = json.loads(done.stdout)
    print(load, figures)  # noqa: T201  # figures are worth having when nothing fails, too
    return figures


# What is required.


def resident_peak(running: Program) -> int:
    """The most memory that the service has held, in MiB."""
    status = Path(f"/proc/{running.process.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) // 1024


def descriptors(running: Program) -> int:
    return len(os.listdir(f"/proc/{running.process.pid}/fd"))


def wait_for_descriptors(running: Program, most: int) -> None:
    """Wait until the service has no more descriptors than it once had."""
    deadline = time.monotonic() + 10
    while descriptors(running) > most:
        assert time.monotonic() < deadline, (descriptors(running), most)
        time.sleep(0.02)


def test_ten_thousand_ports_in_flight_in_one_process() -> None:
    with (
        ports(100, silent_port) as silent,
        open_port() as opened,
        program(**NO_LIMITS) as running,
    ):
        figures = measure("fill", running.port, opened, silent)
        peak = resident_peak(running)
        print("peak", peak, "MiB")  # noqa: T201
        running.stop()
    assert figures["right"] == 100
    assert figures["slowest_s"] < 18
    assert figures["health_p99_ms"] < 50
    assert figures["overloaded_p50_ms"] < 50
    assert figures["right_afterwards"]
    assert peak < 200
    assert "Traceback" not in "".join(running.lines)


def test_bad_connections_by_the_thousand_take_nothing_from_honest_ones() -> None:
    with ports(5, open_port) as opened, program(**NO_LIMITS) as running:
        with running.client() as client:
            client.get("/health")
        before = descriptors(running)
        figures = measure("crowd", running.port, *opened)
        wait_for_descriptors(running, before)
        running.stop()
    assert (figures["honest"], figures["right"]) == (300, 300)
    assert figures["health_p99_ms"] < 100
    assert figures["bad"] == 2400
    assert figures["closed_last_s"] < 15
    assert "Traceback" not in "".join(running.lines)


def outcome(client: httpx.Client, opened: Sequence[int]) -> str:
    """Ask for a check of open ports: "right" or an error code, and nothing else may come."""
    try:
        answer = client.post("/check-ports", json={"provider_ip": "127.0.0.1", "ports": opened})
    except httpx.TransportError as error:
        return type(error).__name__
    if answer.status_code == 200:
        assert all(verdict["accessible"] for verdict in answer.json()["results"].values())
        return "right"
    assert answer.status_code == 503, answer.text
    code: str = answer.json()["detail"]["code"]
    return code


def test_connections_that_take_all_descriptors() -> None:
    """Under a low limit, more connections than it allows: they make way for each other."""
    limit = 128
    with (
        ports(40, open_port) as opened,
        program(descriptors=limit, **NO_LIMITS) as running,
        ExitStack() as stack,
    ):
        with running.client() as client:
            assert outcome(client, opened) == "right"
        before = descriptors(running)
        outcomes = set()
        for number in range(4 * limit):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", running.port))
            if number % 8 == 0:
                with running.client() as client:
                    outcomes.add(outcome(client, opened))
        assert outcomes <= {"right", "CHECK_FAILED", "OVERLOADED"}
        # And all at once: they are there when the service comes to accept the first of them.
        running.process.send_signal(signal.SIGSTOP)
        for number in range(4 * limit):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", running.port), 20))
            sock.sendall(check_of(*opened) if number % 8 == 0 else b"GET")
        running.process.send_signal(signal.SIGCONT)
        with running.client() as client:
            deadline = time.monotonic() + 10
            while outcome(client, opened) != "right":
                assert time.monotonic() < deadline
        stack.close()
        with running.client() as client:
            assert outcome(client, opened) == "right"
        wait_for_descriptors(running, before)
        running.stop()
    assert "Traceback" not in "".join(running.lines)


def test_running_out_of_descriptors() -> None:
    """What was there at the start is taken away, and given back."""
    with (
        ports(60, open_port) as opened,
        program(descriptors=1000, **NO_LIMITS) as running,
        running.client() as kept,
        ExitStack() as stack,
    ):
        assert outcome(kept, opened) == "right"
        before = descriptors(running)
        for left in 30, 1, 0:
            # The lowest that is free counts, and the service has them without gaps.
            limit = before + left
            resource.prlimit(running.process.pid, resource.RLIMIT_NOFILE, (limit, 1000))
            assert outcome(kept, opened) == "CHECK_FAILED"
            assert kept.get("/health").status_code == 200
        # Nor can anybody else be accepted, which must not keep it from answering.
        crowd = [
            stack.enter_context(socket.create_connection(("127.0.0.1", running.port), 20))
            for _ in range(20)
        ]
        for sock in crowd:
            sock.sendall(HEALTH)
        for _ in range(20):
            assert kept.get("/health").status_code == 200
            assert outcome(kept, opened) == "CHECK_FAILED"
        resource.prlimit(running.process.pid, resource.RLIMIT_NOFILE, (1000, 1000))
        assert outcome(kept, opened) == "right"
        with running.client() as client:
            assert outcome(client, opened) == "right"
        stack.close()
        wait_for_descriptors(running, before)
        running.stop()
    log = "".join(running.lines)
    assert "Traceback" not in log
    assert "Check failed: could not connect: Too many open files" in log
