"""``python -m benchmarks.tls``: POST /check-tls, with the settings for software that waits 8 s.

First a good endpoint, side by side with ``openssl s_client``; then beside an endpoint whose 260
certificates take OpenSSL a minute to read; then 1,000 peers that accept the connection and never
shake hands, and 300 that stall after 100 KiB. It prints its figures for people to judge. Wrong
answers are a failure.
"""

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

import trustme
import uvloop

from benchmarks import HOST, BenchmarkFailed
from benchmarks.capacity import ask, percentiles, print_figure, probe_health
from benchmarks.processes import OURS_COMMAND, Service, run, service
from tests.support.hostile_tls import (
    showing_in_tls_1_2,
    showing_in_tls_1_3,
    slow_certificate,
    stalling_in_tls_1_2,
)
from tests.support.http import check_tls_of
from tests.support.loopback import free_port
from tests.support.tls import endpoint
from tests.support.waiting import wait_until

HANDSHAKES = 40
STALLED = 1_000
STALLED_WITH_DATA = 300
HOSTILE_CERTIFICATES = 260
PATIENCE = 8.0  # seconds that the network's next provider software waits

_SETTINGS = ("PORT_CHECK_RETRIES=2", "PORT_CHECK_TIMEOUT=3", "PORT_CHECK_RETRY_DELAY=0.5")
_HANG = 60.0  # seconds


@contextmanager
def tls_server(certificate: Path, authority: Path) -> Iterator[int]:
    """Run ``openssl s_server`` with this certificate and its key; yield its port."""
    port = free_port()
    command = ["openssl", "s_server", "-accept", f"{HOST}:{port}", "-quiet", "-naccept", "1000"]
    with subprocess.Popen(
        [*command, "-cert", certificate, "-key", certificate],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            wait_until(lambda: _shakes_hands(port, authority), "openssl s_server")
            yield port
        finally:
            process.terminate()


def _shakes_hands(port: int, authority: Path) -> bool:
    """Run ``openssl s_client``, as strict as the service; return whether it succeeds."""
    command = ["openssl", "s_client", "-connect", f"{HOST}:{port}", "-CAfile", str(authority)]
    done = subprocess.run(
        [*command, "-verify_return_error", "-verify_ip", HOST, "-x509_strict"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=_HANG,
    )
    return done.returncode == 0


async def good(running: Service, port: int, authority: Path) -> bool:
    """Check a good endpoint, and have s_client do the same in turn; print both times."""
    request = check_tls_of(port)
    ours, theirs, all_right = [], [], True
    for _ in range(HANDSHAKES):
        answer = await ask(running.port, request)
        ours.append(answer.seconds)
        all_right &= answer.body.get("valid") is True
        started = time.perf_counter()
        all_right &= _shakes_hands(port, authority)
        theirs.append(time.perf_counter() - started)
    print_figure("/check-tls", percentiles(ours))
    print_figure("openssl s_client", percentiles(theirs))
    print_figure("ratio of medians", f"{median(ours) / median(theirs):.2f}")
    return all_right


async def beside_hostile(running: Service, good_port: int, hostile_port: int) -> bool:
    """Check an endpoint that takes a minute to read, and a good one meanwhile; print both."""
    before = _cpu_seconds(running.pid)
    alone = await ask(running.port, check_tls_of(hostile_port))
    cpu = _cpu_seconds(running.pid) - before
    hostile = asyncio.create_task(ask(running.port, check_tls_of(hostile_port)))
    honest: list[float] = []
    all_right = True
    while not hostile.done() or len(honest) < HANDSHAKES:
        answer = await ask(running.port, check_tls_of(good_port))
        honest.append(answer.seconds)
        all_right &= answer.body.get("valid") is True
    print_figure("answer", f"{alone.body.get('error') or alone.body} after {alone.seconds:.2f} s")
    print_figure("CPU for it", f"{cpu:.2f} s")
    print_figure("/check-tls beside it", percentiles(honest))
    return all_right and alone.body == hostile.result().body


def _processes(service: int) -> list[int]:
    """Return the service's process, and those that it has started to shake hands."""
    children = Path(f"/proc/{service}/task/{service}/children").read_text()
    return [service, *map(int, children.split())]


def _cpu_seconds(service: int) -> float:
    ticks = 0
    for process in _processes(service):
        # utime, stime, and both of the children that have ended (proc_pid_stat(5))
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def _resident(processes: list[int]) -> int:
    """Return the memory of processes, in MiB; what they share is counted once."""
    total = 0
    for process in processes:
        total += int(Path(f"/proc/{process}/smaps_rollup").read_text().split("Pss:")[1].split()[0])
    return total // 1024


async def stalled(running: Service, port: int, count: int) -> bool:
    """Have ``count`` handshakes stall at once; print what that costs."""
    before, descriptors = _resident(_processes(running.pid)), running.descriptors()
    health: list[float] = []
    probe = asyncio.create_task(probe_health(running.port, health))
    request = check_tls_of(port)
    async with asyncio.timeout(_HANG):
        asked = [asyncio.create_task(ask(running.port, request)) for _ in range(count)]
        await asyncio.sleep(2)
        service, *others = _processes(running.pid)
        meanwhile = f"{_resident([service])} + {_resident(others)}"
        answers = await asyncio.gather(*asked)
    if probe.done():
        raise BenchmarkFailed("/health did not answer") from probe.exception()
    probe.cancel()
    timed_out = sum(
        answer.body.get("error") == "TLS handshake failed: timed out" for answer in answers
    )
    too_busy = sum("too busy" in str(answer.body.get("detail")) for answer in answers)
    slowest = max(answer.seconds for answer in answers)
    print_figure("answers", f"{timed_out} timed out, {too_busy} failed as it was too busy")
    print_figure("slowest", f"{slowest:.2f} s{'' if slowest < PATIENCE else ', too slow'}")
    print_figure("/health", percentiles(health))
    await asyncio.sleep(1)
    after = _resident(_processes(running.pid))
    print_figure(
        "MiB of all its processes", f"{before} before, {meanwhile} meanwhile, {after} after"
    )
    print_figure("descriptors", f"{descriptors} before, {running.descriptors()} after")
    return timed_out + too_busy == count


async def _ask_all(running: Service, port: int, authority: Path, stack: ExitStack) -> bool:
    print(f"A good endpoint, {HANDSHAKES} times")
    all_right = await good(running, port, authority)
    certificates = [slow_certificate(serial) for serial in range(1, 1 + HOSTILE_CERTIFICATES)]
    for version, showing in ("1.2", showing_in_tls_1_2), ("1.3", showing_in_tls_1_3):
        print(f"\n{HOSTILE_CERTIFICATES} certificates that take long to read, in TLS {version}")
        hostile = stack.enter_context(endpoint(showing(certificates)))
        all_right &= await beside_hostile(running, port, hostile)
    # Nobody accepts: the kernel makes the connections, and takes what the service says.
    with socket.create_server((HOST, 0), backlog=4096) as listener:
        print(f"\n{STALLED:,} handshakes that stall")
        all_right &= await stalled(running, listener.getsockname()[1], STALLED)
    print(f"\n{STALLED_WITH_DATA:,} handshakes that stall after 100 KiB")
    stalling = stack.enter_context(endpoint(stalling_in_tls_1_2(100 * 1024)))
    return all_right & await stalled(running, stalling, STALLED_WITH_DATA)


def measure(stack: ExitStack, directory: Path) -> bool:
    """Measure and print; see ``processes.run``."""
    authority = trustme.CA()
    authority_file, certificate = directory / "authority.pem", directory / "server.pem"
    authority.cert_pem.write_to_path(str(authority_file))
    authority.issue_cert(HOST).private_key_and_cert_chain_pem.write_to_path(str(certificate))
    port = stack.enter_context(tls_server(certificate, authority_file))
    command = ("env", f"SSL_CERT_FILE={authority_file}", *_SETTINGS, *OURS_COMMAND)
    running = stack.enter_context(service("this", command, directory))
    return uvloop.run(_ask_all(running, port, authority_file, stack))


def main() -> int:
    """Return the exit status: that of ``processes.run``; 2 if openssl is not installed."""
    if not shutil.which("openssl"):
        sys.stderr.write("tls: openssl is not installed: apt-get install openssl\n")
        return 2
    return run("tls", measure)


if __name__ == "__main__":
    sys.exit(main())
