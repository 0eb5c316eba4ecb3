"""``python -m benchmarks.hostile [--pin] [SECONDS] [ATTACK ...]``: hostile and honest callers.

The service runs with its default settings in a network namespace of its own. Another one is the
whole internet to it: its addresses look public, and no packet leaves the two. Needs root, ip of
iproute2 and nft of nftables.

The honest callers check 100 open ports of their own; one of them, a single port again and again
over a kept connection; another one, its TLS endpoint, whose certificate nobody trusts. Every answer
to these that is not 200 is a failure. ``/health`` is asked for on new connections. All attacks take
place at the same time, each from addresses of its own:

- ``checks``: three callers ask as often as they can for as many ports as they may: silent ones of
  strangers, ports of the honest callers (to use up how often these may be checked), silent ones of
  their own. The third has an IPv6 /48 and asks from another /64 each time.
- ``crowd``: 400 connections of one address ask for ``/health`` again and again, 3,000 only connect.
- ``requests``: 490 connections of one address pipeline what costs most to read, at 28 Mbit/s.
- ``heads``: ten addresses with 300 connections each send all of a head but its end.
- ``room``: five addresses have 1,000 silent ports of their own checked twice at a time.
- ``tls``: one address has a TLS endpoint of its own checked 16 times at a time. Its 260
  certificates take OpenSSL minutes to read.

The attackers take as much of this machine as they get. ``--pin`` gives the service one processor,
and everything else the others: the attackers' work, which in the world takes place elsewhere, does
not slow the service down, and the processes that it starts share its processor.

``--python PATH`` attacks the service that is installed for that interpreter.
"""

import argparse
import asyncio
import json
import os
import secrets
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from ipaddress import IPv6Address
from itertools import count
from pathlib import Path
from socket import create_server
from tempfile import TemporaryDirectory

import uvloop

from benchmarks.capacity import percentiles, read_answer
from benchmarks.processes import Service
from port_checker.linux import raise_descriptor_limit

SECONDS = 120.0
MAX_SECONDS = 600.0

HONEST = 20
HONEST_EVERY = 3.0  # seconds
HONEST_PORTS = range(50800, 50900)
HOSTILE_CONNECTIONS = 8  # of each hostile caller, with one request at a time
HOSTILE_PAUSE = 0.1  # seconds between these
HOSTILE_PORTS = 1000
HEALTH_EVERY = 0.02  # seconds
SINGLE_EVERY = 0.25

ASKING = 400
CONNECTING = 3000
PIPELINING = 490
PIPELINED_BYTES = 3_500_000  # a second, together
HEAD_ADDRESSES = 10
HEADS_EACH = 300
ROOM_ADDRESSES = 5
ROOM_CHECKS_EACH = 2  # at a time
TLS_CHECKS = 16
CERTIFICATES = 260
RECONNECT_PAUSE = 1.0  # seconds
SETTLED = 5.0  # seconds after the attack, when memory and descriptors must be back

_SERVICE = {4: "60.0.0.2", 6: "2a00:1::2"}
_PORT = 9000

# In the namespace of the internet, all addresses of these networks are its own, so that callers can
# have them. Those of strangers, 62.0.0.0/8 and 2a00:62::/32, are nobody's, and silent.
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
    """The outcome of each request, and the seconds that it took."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, float]] = []

    @property
    def outcomes(self) -> Counter[str]:
        """How many requests had each outcome."""
        return Counter(outcome for outcome, _ in self.requests)

    def __str__(self) -> str:
        if not self.requests:
            return "none"
        outcomes = ", ".join(
            f"{number} {outcome}" for outcome, number in sorted(self.outcomes.items())
        )
        return f"{outcomes}; {percentiles([seconds for _, seconds in self.requests])}"


def main() -> None:
    """Make a namespace, and run inside it."""
    if "--inside" not in sys.argv:
        command = ["unshare", "--net", sys.executable, "-m", "benchmarks.hostile", "--inside"]
        sys.exit(subprocess.call([*command, *sys.argv[1:]]))
    parser = argparse.ArgumentParser()
    parser.add_argument("seconds", type=float, nargs="?", default=SECONDS)
    parser.add_argument("attacks", nargs="*", default=[*ATTACKS])
    parser.add_argument("--inside", action="store_true")
    parser.add_argument("--part", action="store_true")
    parser.add_argument("--pin", action="store_true")
    parser.add_argument("--python", default=sys.executable)
    given = parser.parse_args()
    seconds = min(given.seconds, MAX_SECONDS)
    if given.part:
        if given.attacks[0] not in ATTACKS:
            with suppress(PermissionError):
                os.setpriority(os.PRIO_PROCESS, 0, -20)
        uvloop.run(PARTS[given.attacks[0]](seconds))
    else:
        sys.exit(uvloop.run(run(seconds, given.attacks, given.python, pin=given.pin)))


async def run(seconds: float, attacks: Sequence[str], python: str, *, pin: bool) -> int:
    """Return the exit status: 0 if every honest check was served."""
    honest, single, handshake, health = Tally(), Tally(), Tally(), Tally()
    load = os.getloadavg()[0]
    async with service(python, pin=pin) as (log, pid), listeners():
        running = Service(_PORT, pid)
        before = running.resident(), running.descriptors()
        async with asyncio.TaskGroup() as group:
            until = time.monotonic() + seconds
            group.create_task(watch("health", seconds, health))
            group.create_task(watch("single", seconds, single))
            group.create_task(watch("handshake", seconds, handshake))
            for number in range(HONEST):
                address = f"60.1.0.{number + 1}"
                group.create_task(check_honestly(until, address, honest))
            for attack in attacks:
                group.create_task(run_part(attack, seconds))
        await asyncio.sleep(SETTLED)
        after, peak = (running.resident(), running.descriptors()), running.peak_resident()
        used, waited, _ = map(int, Path(f"/proc/{pid}/schedstat").read_text().split())
        errors = [line for line in log.read_text().splitlines() if "ERROR" in line]
        syns = {name: packets(name) for name in ("to_strangers", "to_honest")}
    print(f"{seconds:g} s, load {load:.1f} before and {os.getloadavg()[0]:.1f} after")
    print(f"service:   ran for {used / 1e9:.1f} s, waited {waited / 1e9:.1f} s for a processor")
    memory = [f"{size // 1024} MiB" for size in (before[0], peak, after[0])]
    print("memory:    {} before, {} at most, {} after".format(*memory))
    print(f"descriptors: {before[1]} before, {after[1]} after")
    print(f"honest:    {honest}")
    print(f"one port, kept connection: {single}")
    print(f"TLS endpoint, new connections: {handshake}")
    print(f"/health, new connections:  {health}")
    for name, number in syns.items():
        print(f"SYNs {name.replace('_', ' ')}: {number}, {number / seconds:.0f} a second")
    print(f"errors in the service's log: {len(errors)}", *errors[:5], sep="\n")
    outcomes = honest.outcomes + single.outcomes + handshake.outcomes
    return 0 if outcomes.keys() == {"200"} else 1


@asynccontextmanager
async def service(python: str, *, pin: bool) -> AsyncIterator[tuple[Path, int]]:
    """Build the network, and run the service in it.

    Args:
        python: The interpreter.
        pin: Whether it gets a processor of its own.

    Yields:
        Its log and process id.
    """
    directory = TemporaryDirectory()
    log = Path(directory.name, "log")
    # It starts once the network is there: when a line arrives.
    process = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", 'read line && exec "$0" -P -m port_checker', python],
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
        if pin:
            first, *others = os.sched_getaffinity(0)
            os.sched_setaffinity(process.pid, {first})
            os.sched_setaffinity(0, others)
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
        terminated = time.monotonic()
        process.wait()
        print(f"ended {time.monotonic() - terminated:.1f} s after SIGTERM")
        directory.cleanup()


def shell(script: str, *prefix: str) -> None:
    """Run a script, in a namespace if the prefix says so."""
    subprocess.run([*prefix, "sh", "-ec", script], check=True, stdin=subprocess.DEVNULL)


def packets(counter: str) -> int:
    """Return how many packets an nft counter has counted."""
    command = ["nft", "--json", "list", "counter", "inet", "t", counter]
    document = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    (found,) = (item["counter"] for item in document["nftables"] if "counter" in item)
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
    """Ask at each interval, or as soon as the last answer has come."""
    while time.monotonic() < until:
        began = time.monotonic()
        await ask()
        await asyncio.sleep(max(0.0, every - (time.monotonic() - began)))


async def ask_health(tally: Tally) -> None:
    """Ask once, from an address that nobody else has."""
    await ask("GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", "60.0.0.1", tally)


async def run_part(name: str, seconds: float) -> bytes:
    """Run one of ``PARTS`` in a process of its own; return what it prints."""
    command = ["-m", "benchmarks.hostile", "--inside", "--part", str(seconds), name]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, stdout=asyncio.subprocess.PIPE
    )
    printed, _ = await process.communicate()
    print(printed.decode() if name in ATTACKS else "", end="")
    return printed


async def watch(part: str, seconds: float, tally: Tally) -> None:
    """Ask again and again from a process of its own, which must not wait for others.

    Nor for a processor, if the machine gives it precedence.
    """
    tally.requests += json.loads(await run_part(part, seconds))


async def probe_health(seconds: float) -> None:
    """Print the outcome of each request, and the seconds that it took."""
    tally = Tally()
    await repeat(time.monotonic() + seconds, HEALTH_EVERY, lambda: ask_health(tally))
    print(json.dumps(tally.requests))


async def probe_single(seconds: float) -> None:
    """Print the same for checks of one port, over a kept connection."""
    requests: list[tuple[str, float]] = []
    until = time.monotonic() + seconds
    address = f"60.1.0.{HONEST + 1}"
    request = check_request(address, [HONEST_PORTS[0]]).replace("Connection: close\r\n", "")
    reader, writer = await asyncio.open_connection(_SERVICE[4], _PORT, local_addr=(address, 0))

    async def ask_once() -> None:
        started = time.perf_counter()
        writer.write(request.encode())
        answer = await read_answer(reader, started)
        requests.append((str(answer.status), answer.seconds))

    await repeat(until, SINGLE_EVERY, ask_once)
    print(json.dumps(requests))


async def probe_handshake(seconds: float) -> None:
    """Print the same for checks of a TLS endpoint."""
    import trustme  # as for attack_by_tls

    from tests.support.tls import https

    tally, address = Tally(), f"60.1.0.{HONEST + 2}"
    until = time.monotonic() + seconds
    with https(trustme.CA(), address) as port:
        request = post_request("/check-tls", {"host": address, "port": port})
        expected = "certificate verify failed: self-signed certificate"
        await repeat(until, SINGLE_EVERY, lambda: ask(request, address, tally, expected))
    print(json.dumps(tally.requests))


async def check_honestly(until: float, address: str, tally: Tally) -> None:
    """Have a caller's own ports checked again and again; a wrong verdict is an outcome, too."""
    await asyncio.sleep(secrets.randbelow(1000) / 1000 * HONEST_EVERY)
    request = check_request(address, [*HONEST_PORTS])
    expected = f"Successfully verified {len(HONEST_PORTS)} out of {len(HONEST_PORTS)} ports"
    await repeat(until, HONEST_EVERY, lambda: ask(request, address, tally, expected))


async def attack_by_checks(seconds: float) -> None:
    """Be the callers that ask for many ports."""
    until = time.monotonic() + seconds
    tallies = [Tally() for _ in range(3)]
    async with asyncio.TaskGroup() as group:
        for number, tally in enumerate(tallies):
            for _ in range(HOSTILE_CONNECTIONS):
                group.create_task(ask_for_much(until, number, tally))
    for number, tally in enumerate(tallies):
        print(f"checks {number + 1}:  {tally}")


async def attack_by_crowd(seconds: float) -> None:
    """Be the crowd that asks again and again, and the one that only connects."""
    answers, connections = Counter[str](), Counter[str]()

    async def ask_again(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            answers[(await reader.readuntil(b"}"))[9:12].decode()] += 1

    async def only_connect(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        connections["made"] += 1
        await reader.read()

    await crowd(
        seconds, [("61.0.0.10", ask_again)] * ASKING + [("61.0.0.10", only_connect)] * CONNECTING
    )
    print(f"crowd:     answers {dict(answers)}, connections {dict(connections)}")


async def attack_by_requests(seconds: float) -> None:
    """Be the caller that pipelines what costs most."""
    path = b"/" + b"%c3%a9" * 340
    costly = [
        b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path,
        b"GET / HTTP/1.1\r\nHost: x\r\nAccept-Encoding: %b\r\n\r\n" % (b"a," * 8000),
        b"POST /check-ports HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n%b0\r\n\r\n"
        % (b"1\r\n \r\n" * 650),
        b"GET / HTTP/1.1\r\nHost: x\r\n%b\r\n" % (b"X-Forwarded-For: %b\r\n" % (b"1," * 70) * 97),
        b"GET /%b HTTP/1.1\r\nHost: x\r\n\r\n" % (b"%c3%a9" * 11_000),  # over every bound
    ]
    sent = 0

    async def pipeline(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        drain = asyncio.create_task(read_to_the_end(reader))
        while not drain.done():
            batch = b"".join(secrets.choice(costly) for _ in range(3))
            writer.write(batch)
            sent += len(batch)
            await writer.drain()
            await asyncio.sleep(len(batch) * PIPELINING / PIPELINED_BYTES)

    await crowd(seconds, [("61.0.0.11", pipeline)] * PIPELINING)
    print(f"requests:  {sent / seconds * 8 / 1e6:.1f} Mbit/s")


async def attack_by_heads(seconds: float) -> None:
    """Be the callers that send only the beginning of a head."""
    head = b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: %b\r\n" % (b"y" * 158) * 98

    async def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        await reader.read()

    addresses = [f"61.0.1.{number + 1}" for number in range(HEAD_ADDRESSES)]
    await crowd(seconds, [(address, begin) for address in addresses] * HEADS_EACH)


async def attack_by_room(seconds: float) -> None:
    """Be the callers that have as many silent ports of their own checked as they may."""
    until = time.monotonic() + seconds
    tally = Tally()

    async def ask_for_own(address: str) -> None:
        request = check_request(address, [*range(1, HOSTILE_PORTS + 1)])
        await repeat(until, HOSTILE_PAUSE, lambda: ask(request, address, tally))

    async with asyncio.TaskGroup() as group:
        for number in range(ROOM_ADDRESSES):
            for _ in range(ROOM_CHECKS_EACH):
                group.create_task(ask_for_own(f"61.0.2.{number + 1}"))
    print(f"room:      {tally}")


async def attack_by_tls(seconds: float) -> None:
    """Be the caller whose certificates take OpenSSL minutes to read."""
    # They take a second to import; the other parts need not wait for that.
    from tests.support.hostile_tls import showing_in_tls_1_2, slow_certificate
    from tests.support.tls import endpoint

    until = time.monotonic() + seconds
    tally, address = Tally(), "61.0.0.12"
    certificates = [slow_certificate(serial) for serial in range(1, 1 + CERTIFICATES)]
    with endpoint(showing_in_tls_1_2(certificates), address) as port:
        request = post_request("/check-tls", {"host": address, "port": port})
        async with asyncio.TaskGroup() as group:
            for _ in range(TLS_CHECKS):
                group.create_task(
                    repeat(until, HOSTILE_PAUSE, lambda: ask(request, address, tally))
                )
    print(f"tls:       {tally}")


async def read_to_the_end(reader: asyncio.StreamReader) -> None:
    """Read until the service closes the connection, in whatever way."""
    with suppress(OSError):
        await reader.read()


Behaviour = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def crowd(seconds: float, members: Sequence[tuple[str, Behaviour]]) -> None:
    """Have each member connect from its address and behave, again and again."""

    async def stay(address: str, behave: Behaviour) -> None:
        await asyncio.sleep(secrets.randbelow(1000) / 1000 * RECONNECT_PAUSE)
        while True:
            with suppress(OSError, EOFError):
                reader, writer = await asyncio.open_connection(
                    _SERVICE[4], _PORT, local_addr=(address, 0)
                )
                try:
                    await behave(reader, writer)
                finally:
                    writer.transport.abort()
            await asyncio.sleep(RECONNECT_PAUSE)

    raise_descriptor_limit()
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds), asyncio.TaskGroup() as group:
            for address, behave in members:
                group.create_task(stay(address, behave))


async def ask_for_much(until: float, number: int, tally: Tally) -> None:
    """Ask for what hurts most, one request after another."""
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
    return post_request("/check-ports", {"provider_ip": target, "ports": ports})


def post_request(path: str, document: object) -> str:
    """Return a request with a document in JSON."""
    body = json.dumps(document)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
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
    tally.requests.append((outcome, time.monotonic() - began))


ATTACKS = {
    "checks": attack_by_checks,
    "crowd": attack_by_crowd,
    "requests": attack_by_requests,
    "heads": attack_by_heads,
    "room": attack_by_room,
    "tls": attack_by_tls,
}
PARTS = {
    **ATTACKS,
    "health": probe_health,
    "single": probe_single,
    "handshake": probe_handshake,
}

if __name__ == "__main__":
    main()
