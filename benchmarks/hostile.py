"""``python -m benchmarks.hostile [SECONDS]``: three hostile callers beside honest ones.

The service runs with its default settings in a network namespace of its own. Another one is the
whole internet to it: its addresses look public, and no packet leaves the two. Needs root, ip of
iproute2 and nft of nftables.

The hostile callers ask as often as they can for as many ports as they may: silent ones of
strangers, ports of the honest callers (to use up what may be asked of these), silent ones of their
own. The third has an IPv6 /48 and asks from another /64 each time. The honest ones check 100 open
ports of their own. Every answer to these that is not 200 is a failure.
"""

import asyncio
import json
import os
import secrets
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from ipaddress import IPv6Address
from itertools import count
from pathlib import Path
from socket import create_server
from tempfile import TemporaryDirectory

import uvloop

SECONDS = 120.0
MAX_SECONDS = 600.0

HONEST = 20
HONEST_EVERY = 3.0  # seconds
HONEST_PORTS = range(50800, 50900)
HOSTILE_CONNECTIONS = 8  # of each hostile caller, one request after the other
HOSTILE_PAUSE = 0.1  # seconds between these
HOSTILE_PORTS = 1000
HEALTH_EVERY = 0.02  # seconds

_SERVICE = {4: "60.0.0.2", 6: "2a00:1::2"}
_PORT = 9000

# In the namespace of the internet: all addresses of these networks are its own, so that callers
# can have them; those of strangers, 62.0.0.0/8 and 2a00:62::/32, are nobody's, and silent.
_INTERNET = """
ip link set lo up
echo 1 > /proc/sys/net/ipv6/ip_nonlocal_bind
ip link add service type veth peer name internet netns {pid}
ip addr add 60.0.0.1/30 dev service
ip addr add 2a00:1::1/64 dev service nodad
ip link set service up
ip route add local 60.1.0.0/16 dev lo
ip route add local 61.0.0.0/16 dev lo
ip -6 route add local 2a00:61::/48 dev lo
"""
_FILTERS = """
table inet t {
    counter to_strangers {}
    counter to_honest {}
    chain input {
        type filter hook prerouting priority -300
        tcp flags & (syn | ack) == syn goto opened
        tcp dport 1-1000 drop
    }
    chain opened {
        ip daddr 62.0.0.0/8 counter name to_strangers
        ip6 daddr 2a00:62::/32 counter name to_strangers
        ip daddr 60.1.0.0/16 tcp dport 1-1000 counter name to_honest
        tcp dport 1-1000 drop
    }
}
"""
_WITHIN_SERVICE = """
ip link set lo up
ip addr add 60.0.0.2/30 dev internet
ip addr add 2a00:1::2/64 dev internet nodad
ip link set internet up
ip route add default via 60.0.0.1
ip -6 route add default via 2a00:1::1
"""


class Tally:
    """What was answered, and how long it took."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.seconds: list[float] = []

    def add(self, outcome: str, seconds: float) -> None:
        """Count one answer."""
        self.outcomes[outcome] += 1
        self.seconds.append(seconds)

    def __str__(self) -> str:
        if not self.seconds:
            return "none"
        cuts = statistics.quantiles([*self.seconds, self.seconds[-1]], n=100)
        outcomes = ", ".join(
            f"{number} {outcome}" for outcome, number in sorted(self.outcomes.items())
        )
        return (
            f"{outcomes}; p50 {cuts[49] * 1000:.1f} ms, p99 {cuts[98] * 1000:.1f} ms, "
            f"max {max(self.seconds) * 1000:.1f} ms"
        )


def main() -> None:
    """Run inside a namespace, which is made first."""
    if "--inside" not in sys.argv:
        command = ["unshare", "--net", sys.executable, "-m", "benchmarks.hostile", "--inside"]
        sys.exit(subprocess.call([*command, *sys.argv[1:]]))
    given = [word for word in sys.argv[1:] if not word.startswith("--")]
    seconds = min(float(given[0]), MAX_SECONDS) if given else SECONDS
    if "--health" in sys.argv:
        uvloop.run(probe_health(seconds))
    else:
        sys.exit(uvloop.run(run(seconds)))


async def run(seconds: float) -> int:
    """Return the exit status: 0 if every honest check was served."""
    honest, health, hostile = Tally(), Tally(), [Tally(), Tally(), Tally()]
    load = os.getloadavg()[0]
    async with service() as (log, pid), listeners():
        async with asyncio.TaskGroup() as group:
            until = time.monotonic() + seconds
            group.create_task(watch_health(seconds, health))
            for number in range(HONEST):
                address = f"60.1.0.{number + 1}"
                group.create_task(check_honestly(until, address, honest))
            for number, tally in enumerate(hostile):
                for _ in range(HOSTILE_CONNECTIONS):
                    group.create_task(attack(until, number, tally))
        used, waited, _ = map(int, Path(f"/proc/{pid}/schedstat").read_text().split())
        errors = [line for line in log.read_text().splitlines() if "ERROR" in line]
        syns = {name: packets(name) for name in ("to_strangers", "to_honest")}
    print(f"{seconds:g} s, load {load:.1f} before and {os.getloadavg()[0]:.1f} after")
    print(f"service:   ran for {used / 1e9:.1f} s, waited {waited / 1e9:.1f} s for a processor")
    print(f"honest:    {honest}")
    for number, tally in enumerate(hostile):
        print(f"hostile {number + 1}: {tally}")
    print(f"/health:   {health}")
    for name, number in syns.items():
        print(f"SYNs {name.replace('_', ' ')}: {number}, {number / seconds:.0f} a second")
    print(f"errors in the service's log: {len(errors)}", *errors[:5], sep="\n")
    return 0 if honest.outcomes.keys() == {"200"} else 1


@asynccontextmanager
async def service() -> AsyncIterator[tuple[Path, int]]:
    """Build the network, and run the service in it.

    Yields:
        Its log and process id.
    """
    directory = TemporaryDirectory()
    log = Path(directory.name, "log")
    # It starts once the network is there: when a line arrives.
    process = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", 'read line && exec "$0" -m port_checker', sys.executable],
        env={**os.environ, "PORT_CHECKER_HOST": "::"},
        stdin=subprocess.PIPE,
        stderr=log.open("w"),
    )
    try:
        own = os.readlink("/proc/self/ns/net")
        while os.readlink(f"/proc/{process.pid}/ns/net") == own:
            await asyncio.sleep(0.01)
        shell(_INTERNET.format(pid=process.pid))
        subprocess.run(["nft", "-f", "-"], check=True, input=_FILTERS, text=True)
        shell(_WITHIN_SERVICE, "nsenter", f"--net=/proc/{process.pid}/ns/net")
        assert process.stdin
        process.stdin.write(b"\n")
        process.stdin.close()
        started = Tally()
        while "200" not in started.outcomes:
            assert process.poll() is None
            await asyncio.sleep(0.1)
            await ask_health(started)
        yield log, process.pid
    finally:
        process.terminate()
        process.wait()
        directory.cleanup()


def shell(script: str, *prefix: str) -> None:
    """Run a script, in a namespace if the prefix says so."""
    subprocess.run([*prefix, "sh", "-ec", script], check=True, stdin=subprocess.DEVNULL)


def packets(counter: str) -> int:
    """Return how many packets an nft counter has counted."""
    command = ["nft", "--json", "list", "counter", "inet", "t", counter]
    told = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    (found,) = (item["counter"] for item in told["nftables"] if "counter" in item)
    return int(found["packets"])


@asynccontextmanager
async def listeners() -> AsyncIterator[None]:
    """Listen on the honest callers' ports, on all of their addresses."""
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        for port in HONEST_PORTS:
            listener = stack.enter_context(create_server(("", port), backlog=1000))
            listener.setblocking(False)

            def accept(listener: object = listener) -> None:
                try:
                    while True:
                        listener.accept()[0].close()  # type: ignore[attr-defined]
                except BlockingIOError:
                    pass

            loop.add_reader(listener, accept)
            stack.callback(loop.remove_reader, listener)
        yield


async def repeat(until: float, every: float, ask: Callable[[], Awaitable[None]]) -> None:
    """Ask at each interval, or as soon as the last answer is there."""
    while time.monotonic() < until:
        began = time.monotonic()
        await ask()
        await asyncio.sleep(max(0.0, every - (time.monotonic() - began)))


async def ask_health(tally: Tally) -> None:
    """Ask once, from an address of nobody else."""
    await ask("GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", "60.0.0.1", tally)


async def watch_health(seconds: float, tally: Tally) -> None:
    """Ask again and again, from a process that does nothing else: it must not wait for its turn."""
    command = ["-m", "benchmarks.hostile", "--inside", "--health", str(seconds)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, stdout=asyncio.subprocess.PIPE
    )
    told, _ = await process.communicate()
    for outcome, took in json.loads(told):
        tally.add(outcome, took)


async def probe_health(seconds: float) -> None:
    """Print how each question ended, and how long it took."""
    told: list[tuple[str, float]] = []
    until = time.monotonic() + seconds

    async def ask_once() -> None:
        tally = Tally()
        await ask_health(tally)
        told.append((next(iter(tally.outcomes)), tally.seconds[0]))

    await repeat(until, HEALTH_EVERY, ask_once)
    print(json.dumps(told))


async def check_honestly(until: float, address: str, tally: Tally) -> None:
    """Check one's own ports again and again; a wrong verdict is an outcome of its own."""
    await asyncio.sleep(secrets.randbelow(1000) / 1000 * HONEST_EVERY)
    request = check_request(address, [*HONEST_PORTS])
    expected = f"Successfully verified {len(HONEST_PORTS)} out of {len(HONEST_PORTS)} ports"
    await repeat(until, HONEST_EVERY, lambda: ask(request, address, tally, expected))


async def attack(until: float, number: int, tally: Tally) -> None:
    """Ask for what hurts most, one request after the other."""
    silent = [*range(1, HOSTILE_PORTS + 1)]
    for turn in count(secrets.randbelow(3)):
        if time.monotonic() >= until:
            return
        source = f"61.0.0.{number + 1}"
        stranger = f"62.{secrets.randbelow(256)}.{secrets.randbelow(256)}.7"
        if number == 2:
            source = str(IPv6Address("2a00:61::7") + (secrets.randbelow(1 << 16) << 64))
            stranger = str(IPv6Address("2a00:62::7") + (secrets.randbelow(1 << 32) << 64))
        honest = f"60.1.0.{secrets.randbelow(HONEST) + 1}"
        target = (stranger, honest, source)[turn % 3]
        await ask(check_request(target, silent), source, tally)
        await asyncio.sleep(HOSTILE_PAUSE)


def check_request(target: str, ports: list[int]) -> str:
    """Return a request for a check."""
    body = json.dumps({"provider_ip": target, "ports": ports})
    head = f"POST /check-ports HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Connection: close\r\n\r\n{body}"


async def ask(request: str, source: str, tally: Tally, expected: str = "") -> None:
    """Send a request from an address, and count the outcome."""
    began = time.monotonic()
    try:
        async with asyncio.timeout(60):
            server = _SERVICE[6 if ":" in source else 4]
            reader, writer = await asyncio.open_connection(server, _PORT, local_addr=(source, 0))
            writer.write(request.encode())
            answer = (await reader.read()).decode()
            writer.close()
        outcome = answer[9:12] or "closed"
        if outcome != "200" and '"code":"' in answer:
            outcome += " " + answer.partition('"code":"')[2].partition('"')[0]
        elif expected not in answer:
            outcome = "wrong"
    except OSError as error:
        outcome = type(error).__name__
    tally.add(outcome, time.monotonic() - began)


if __name__ == "__main__":
    main()
