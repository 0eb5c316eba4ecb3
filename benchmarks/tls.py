"""``python -m benchmarks.tls``: POST /check-tls, with the settings for software that waits 8 s.

First a good endpoint, side by side with ``openssl s_client``; then 1,000 peers that accept the
connection and never shake hands, twice. It prints its figures for people to judge. Wrong answers
are a failure.
"""

import asyncio
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
from tests.support.http import check_tls_of
from tests.support.loopback import free_port
from tests.support.waiting import wait_until

HANDSHAKES = 40
STALLED = 1_000
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
    """Run ``openssl s_client``, as strict as the service; return whether it is content."""
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


async def stalled(running: Service) -> bool:
    """Have so many handshakes stall at once; print what that costs."""
    before, descriptors = running.resident(), running.descriptors()
    health: list[float] = []
    probe = asyncio.create_task(probe_health(running.port, health))
    # Nobody accepts: the kernel makes the connections, and takes what the service says.
    with socket.create_server((HOST, 0), backlog=4096) as listener:
        request = check_tls_of(listener.getsockname()[1])
        async with asyncio.timeout(_HANG):
            answers = await asyncio.gather(*(ask(running.port, request) for _ in range(STALLED)))
    if probe.done():
        raise BenchmarkFailed("/health did not answer") from probe.exception()
    probe.cancel()
    right = sum(answer.body.get("error") == "TLS handshake failed: timed out" for answer in answers)
    slowest = max(answer.seconds for answer in answers)
    print_figure("right answers", f"{right} of {STALLED}")
    print_figure("slowest", f"{slowest:.2f} s{'' if slowest < PATIENCE else ', too slow'}")
    print_figure("/health", percentiles(health))
    await asyncio.sleep(1)
    print_figure(
        "resident memory",
        f"{before // 1024} MiB before, {running.peak_resident() // 1024} at most, "
        f"{running.resident() // 1024} after",
    )
    print_figure("descriptors", f"{descriptors} before, {running.descriptors()} after")
    return right == STALLED


async def _ask_both(running: Service, port: int, authority: Path) -> bool:
    print(f"A good endpoint, {HANDSHAKES} times")
    all_right = await good(running, port, authority)
    for time_ in "first", "second":
        print(f"\n{STALLED:,} handshakes that stall, the {time_} time")
        all_right &= await stalled(running)
    return all_right


def measure(stack: ExitStack, directory: Path) -> bool:
    """Measure and print; see ``processes.run``."""
    authority = trustme.CA()
    authority_file, certificate = directory / "authority.pem", directory / "server.pem"
    authority.cert_pem.write_to_path(str(authority_file))
    authority.issue_cert(HOST).private_key_and_cert_chain_pem.write_to_path(str(certificate))
    port = stack.enter_context(tls_server(certificate, authority_file))
    command = ("env", f"SSL_CERT_FILE={authority_file}", *_SETTINGS, *OURS_COMMAND)
    running = stack.enter_context(service("this", command, directory))
    return uvloop.run(_ask_both(running, port, authority_file))


def main() -> int:
    """Return the exit status: that of ``processes.run``; 2 if openssl is not installed."""
    if not shutil.which("openssl"):
        sys.stderr.write("tls: openssl is not installed: apt-get install openssl\n")
        return 2
    return run("tls", measure)


if __name__ == "__main__":
    sys.exit(main())
