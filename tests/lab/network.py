"""A small internet, made of network namespaces, in which the truth about every port is known.

    checker ──── internet ──── router ──── provider
                  │ │ │             │
            third ams sgp       neighbour

The checker runs the service. The router is the provider's: for IPv4 it translates addresses and
forwards ports, for IPv6 it only forwards. The neighbour is another machine behind it, and the third
is somebody else on the internet. Two more are places for other services. No namespace has a link to
the machine's own network, and nothing outside them dials these addresses, so public ones are free
to be used.
"""

import ctypes
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ParamSpec, TypeVar

from port_checker.linux import TcpState, tcp_sockets
from tests.support.processes import end_with_parent
from tests.support.waiting import wait_until

P = ParamSpec("P")
T = TypeVar("T")

SERVICE_PORT = 9000
# The service is quicker to call something lost than the defaults are.
QUICK = {
    "PORT_CHECK_RETRIES": "2",
    "PORT_CHECK_TIMEOUT": "0.5",
    "PORT_CHECK_RETRY_DELAY": "0.1",
}

CHECKER = {4: "60.0.1.2", 6: "2a00:1::2"}
CHECKER_SECONDARY = {4: "60.0.1.3", 6: "2a00:1::3"}
ROUTER = {4: "60.0.2.2", 6: "2a00:2::2"}
THIRD = {4: "60.0.3.2", 6: "2a00:3::2"}
AMS = {4: "60.0.5.2", 6: "2a00:5::2"}
SGP = {4: "60.0.6.2", 6: "2a00:6::2"}
PROVIDER = {4: ROUTER[4], 6: "2a00:4:0:1::2"}  # as the internet sees it
PROVIDER_BEHIND_NAT = "192.168.1.2"
NEIGHBOUR = {4: "192.168.2.2", 6: "2a00:4:0:2::2"}
ASLEEP = {4: "192.168.2.9", 6: "2a00:4:0:2::9"}  # the neighbour's network, where nobody has it
SILENT = {4: "60.0.3.9", 6: "2a00:3::9"}  # nobody answers the last router's ARP or ND for it
UNROUTED_BY_INTERNET = {4: "60.0.9.9", 6: "2a00:9::9"}
UNROUTED_BY_CHECKER = {4: "61.0.0.1", 6: "2b00::1"}

# Each namespace, and its interfaces: whom they lead to, and the addresses.
_INTERFACES = {
    "checker": {"internet": ["60.0.1.2/24", "60.0.1.3/24", "2a00:1::2/64", "2a00:1::3/64"]},
    "internet": {
        "checker": ["60.0.1.1/24", "2a00:1::1/64"],
        "router": ["60.0.2.1/24", "2a00:2::1/64"],
        "third": ["60.0.3.1/24", "2a00:3::1/64"],
        "ams": ["60.0.5.1/24", "2a00:5::1/64"],
        "sgp": ["60.0.6.1/24", "2a00:6::1/64"],
    },
    "router": {
        "internet": ["60.0.2.2/24", "2a00:2::2/64"],
        "provider": ["192.168.1.1/24", "2a00:4:0:1::1/64"],
        "neighbour": ["192.168.2.1/24", "2a00:4:0:2::1/64"],
    },
    "provider": {"router": ["192.168.1.2/24", "2a00:4:0:1::2/64"]},
    "neighbour": {"router": ["192.168.2.2/24", "2a00:4:0:2::2/64"]},
    "third": {"internet": ["60.0.3.2/24", "2a00:3::2/64"]},
    "ams": {"internet": ["60.0.5.2/24", "2a00:5::2/64"]},
    "sgp": {"internet": ["60.0.6.2/24", "2a00:6::2/64"]},
}
# The checker has no default route, so that there are addresses that it has no route to.
_ROUTES = {
    "checker": ["60.0.0.0/8 via 60.0.1.1", "2a00::/16 via 2a00:1::1"],
    "internet": ["2a00:4::/32 via 2a00:2::2"],
    "router": ["default via 60.0.2.1", "default via 2a00:2::1"],
    "provider": ["default via 192.168.1.1", "default via 2a00:4:0:1::1"],
    "neighbour": ["default via 192.168.2.1", "default via 2a00:4:0:2::1"],
    "third": ["default via 60.0.3.1", "default via 2a00:3::1"],
    "ams": ["default via 60.0.5.1", "default via 2a00:5::1"],
    "sgp": ["default via 60.0.6.1", "default via 2a00:6::1"],
}
_SYSCTLS = {
    "net/ipv6/conf/all/disable_ipv6": "0",
    "net/ipv6/conf/default/disable_ipv6": "0",
    # Duplicate address detection would keep each IPv6 address unusable for a second.
    "net/ipv6/conf/all/accept_dad": "0",
    "net/ipv6/conf/default/accept_dad": "0",
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
    # No limits to ICMP's errors: Linux would send six to a destination, then one a second, and
    # which of a range's ports get one would be chance.
    "net/ipv4/icmp_ratemask": "0",
    "net/ipv6/icmp/ratemask": "255",
}
_FORWARDING = {"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1"}

FILTERS = """
table inet lab {
    set attempted { type inet_service; size 65535; flags dynamic; }
    set closed { type inet_service; size 65535; flags dynamic, timeout; }
    chain input { type filter hook input priority filter; }
    chain forward { type filter hook forward priority filter; }
    chain output { type filter hook output priority filter; }
}
"""
# Not in every namespace: translation turns connection tracking on.
_TRANSLATION = """
table inet lab {
    chain prerouting { type nat hook prerouting priority dstnat; }
    chain postrouting {
        type nat hook postrouting priority srcnat
        oifname internet meta nfproto ipv4 masquerade
    }
}
"""

_CLONE_NEWNET = 0x40000000  # linux/sched.h
_SO_RCVBUFFORCE = 33  # asm-generic/socket.h; the socket module does not name it
_IP_TRANSPARENT = 19  # linux/in.h; the same
_ETH_P_ALL = 3  # linux/if_ether.h
_TCP_RST = 0x04

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the service answered.

    Attributes:
        status: The HTTP status.
        body: The decoded JSON.
        seconds: How long it took.
    """

    status: int
    body: Any
    seconds: float

    @property
    def code(self) -> str | None:
        """The error code; None where the answer is not an error."""
        code: str | None = self.body.get("detail", {}).get("code")
        return code


@contextmanager
def open_lab(directory: Path) -> Iterator["Lab"]:
    """Build the network and start the service; take all of it down in the end.

    Args:
        directory: Where the service runs and leaves its log.
    """
    # SIGTERM ends Python on the spot, and would leave the namespaces behind.
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with ExitStack() as stack:
            lab = Lab(directory, stack)
            lab.serve(**QUICK)
            lab.wait_until_connected()
            yield lab
    finally:
        signal.signal(signal.SIGTERM, previous)


class Lab:
    """The network, and what one can do in it.

    Namespaces are called by their short names: ``checker``, ``internet``, ``router``, ``provider``,
    ``neighbour``, ``third``, ``ams`` and ``sgp``. Ports come from ``take``; nothing has been said
    about them yet, so they are refused: by the router for IPv4, since it does not forward them, and
    by the provider for IPv6. The other methods say what is true of them from then on, for both
    families.

    Args:
        directory: Where the service runs and leaves its log.
        stack: Undoes everything when it is closed.
    """

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.log = directory / "service.log"
        self._directory = directory
        self._stack = stack
        self.machines: list[str] = []
        self._threads: dict[str, ThreadPoolExecutor] = {}
        self._next_port = 20_000  # below the ephemeral ports, which begin at 32768
        for name in _INTERFACES:
            self._add_namespace(name)
        for name, interfaces in _INTERFACES.items():
            for peer in interfaces:
                if name < peer:
                    self._link(name, peer)
        for name, interfaces in _INTERFACES.items():
            commands = ["link set lo up"]
            for peer, addresses in interfaces.items():
                commands += [f"address add {address} dev {peer}" for address in addresses]
                commands += [f"link set {peer} up"]
            commands += [f"route add {route}" for route in _ROUTES[name]]
            self.run(name, "ip", "-batch", "-", stdin="\n".join(commands))
            self.run(name, "nft", "-f", "-", stdin=FILTERS)
        self.run("router", "nft", "-f", "-", stdin=_TRANSLATION)

    def _add_namespace(self, name: str) -> None:
        add_namespace(self.full_name(name))
        self._stack.callback(delete_namespace, self.full_name(name))
        # A thread can be in another network than its process. These never come back from theirs:
        # whatever they run cannot reach the machine's own network. Each request under way has one.
        threads = ThreadPoolExecutor(128, name, _enter, (self.full_name(name),))
        self._stack.callback(threads.shutdown)
        self._threads[name] = threads
        self.machines.append(name)
        forwarding = _FORWARDING if name in ("internet", "router") else {}
        self.submit(name, _set_sysctls, _SYSCTLS | forwarding).result()

    def _link(self, one: str, other: str) -> None:
        here, there = self.full_name(one), self.full_name(other)
        ends = f"{other} netns {here} type veth peer {one} netns {there}"
        _run("ip", "link", "add", *ends.split())

    def attach(self, name: str, to: str, interface: str, address: str, gateway: str) -> None:
        """Add a machine behind another one: a container, or one behind a VPN or in a cloud.

        Args:
            name: The new one.
            to: Its router.
            interface: What it calls its link to that.
            address: Its address and the length of the network's prefix.
            gateway: Its router's address there.
        """
        self._add_namespace(name)
        here, there = self.full_name(to), self.full_name(name)
        ends = f"{name} netns {here} type veth peer {interface} netns {there}"
        _run("ip", "link", "add", *ends.split())
        prefix = address.partition("/")[2]
        ends_up = f"address add {gateway}/{prefix} dev {name}\nlink set {name} up"
        self.run(to, "ip", "-batch", "-", stdin=ends_up)
        commands = f"link set lo up\naddress add {address} dev {interface}\n"
        commands += f"link set {interface} up\nroute add default via {gateway}"
        self.run(name, "ip", "-batch", "-", stdin=commands)
        server = CHECKER[6 if ":" in address else 4]

        def connected() -> bool:
            return self.submit(name, _is_healthy, server).result()

        wait_until(connected, f"{name} to reach the checker", seconds=20)

    def full_name(self, name: str) -> str:
        """Return what a namespace is called on this machine."""
        return f"port-checker-lab-{os.getpid()}-{name}"

    # Programs, functions and requests.

    def run(
        self, name: str, *argv: str, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in a namespace and wait for it; it must succeed."""
        return _run("ip", "netns", "exec", self.full_name(name), *argv, stdin=stdin)

    def popen(
        self,
        name: str,
        *argv: str,
        env: Mapping[str, str] | None = None,
        output: IO[bytes] | int = subprocess.DEVNULL,
    ) -> subprocess.Popen[bytes]:
        """Start a program in a namespace; it is ended with the lab, if not before."""
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.full_name(name), *argv],
            cwd=self._directory,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            preexec_fn=end_with_parent,
        )
        self._stack.callback(end, process)
        return process

    def submit(
        self, name: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> Future[T]:
        """Call a function from a thread in a namespace, in which the sockets that it makes stay."""
        return self._threads[name].submit(function, *args, **kwargs)

    def serve(self, host: str = "checker", **settings: str) -> subprocess.Popen[bytes]:
        """Start the service in a namespace and wait until it answers.

        Its limits are off; the rest is the defaults, unless ``settings`` say otherwise.
        """
        limits = ("CHECKER", "CHECK_OWN", "CHECK_OTHERS", "CHECK_TARGET")
        limits_off = {f"PORT_{limit}_RATE_LIMIT": "off" for limit in limits}
        inherited = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        environment = inherited | limits_off | {"PORT_CHECKER_HOST": "::"} | settings
        with self.log.open("ab") as log:
            service = self.popen(
                host, sys.executable, "-m", "port_checker", env=environment, output=log
            )

        port = int(settings.get("PORT_CHECKER_PORT", SERVICE_PORT))

        def ready() -> bool:
            assert service.poll() is None, self.log.read_text()
            return self.submit(host, _is_healthy, "::1", port).result()

        wait_until(ready, "the service to answer")
        return service

    def wait_until_connected(self) -> None:
        """Wait until everybody reaches the checker: Linux takes a second to call a new link up."""

        def connected() -> bool:
            reached = [
                self.submit(name, _is_healthy, server)
                for name in ("provider", "neighbour", "third")
                for server in CHECKER.values()
            ]
            return all(healthy.result() for healthy in reached)

        wait_until(connected, "the network to come up")

    def ask(
        self,
        caller: str,
        target: str,
        ports: Iterable[int],
        server: str | None = None,
        service: int = SERVICE_PORT,
    ) -> Future[Answer]:
        """Have a namespace POST a check.

        Args:
            caller: The namespace that asks.
            target: ``provider_ip``.
            ports: What to check.
            server: The service's address; the checker's of the target's family, if not told.
            service: The service's port.
        """
        server = server or CHECKER[6 if ":" in target else 4]
        body = json.dumps({"provider_ip": target, "ports": list(ports)})
        return self.submit(caller, _post_check, server, service, body)

    # What is true of a port.

    def take(self, count: int) -> range:
        """Return the next ports that nobody has taken."""
        ports = range(self._next_port, self._next_port + count)
        self._next_port += count
        return ports

    def forward(self, ports: range, to: Mapping[int, str] | None = None) -> None:
        """Make the router forward ports: to the provider, or to another machine behind it."""
        ipv4 = to[4] if to else PROVIDER_BEHIND_NAT
        self._rule("router", "prerouting", f"iif internet {_dport(ports)} dnat ip to {ipv4}")
        if to:
            self._rule("router", "prerouting", f"iif internet {_dport(ports)} dnat ip6 to {to[6]}")

    def cross(self, ports: range, offset: int) -> None:
        """Make the router forward each of ports to another one of the provider: so many further."""
        for family, address in (("ip", PROVIDER_BEHIND_NAT), ("ip6", f"[{PROVIDER[6]}]")):
            rules = "".join(
                f"add rule inet lab prerouting iif internet tcp dport {port} "
                f"dnat {family} to {address}:{port + offset}\n"
                for port in ports
            )
            self.run("router", "nft", "-f", "-", stdin=rules)

    def take_over(self, ports: range) -> None:
        """Make the router itself accept every connection to ports, as some middleboxes do."""
        (proxy,) = self.take(1)
        self.listen("router", range(proxy, proxy + 1))
        self._rule("router", "prerouting", f"iif internet {_dport(ports)} redirect to :{proxy}")

    def listen(self, name: str, ports: range, *, transparent: bool = False) -> None:
        """Listen on ports; the kernel completes the handshakes of the backlog.

        A transparent listener takes connections to other machines, if a firewall leads them there.
        """
        self.submit(name, self._listen, ports, transparent=transparent).result()

    def listen_at(self, name: str, address: str, ports: range) -> Callable[[], None]:
        """Listen on ports at one address of a machine; return what ends that."""

        def listen() -> list[socket.socket]:
            return [socket.create_server((address, port)) for port in ports]

        listeners = self.submit(name, listen).result()

        def close() -> None:
            for listener in listeners:
                listener.close()

        return close

    def wait_until_listening(self, name: str, ports: Iterable[int]) -> None:
        """Wait until a program that was started listens on ports; it gets no connection by that."""

        def is_listening() -> bool:
            listening = tcp_sockets(frozenset(ports), TcpState.LISTEN)
            return {sock.port for sock in listening} == {*ports}

        wait_until(lambda: self.submit(name, is_listening).result(), "the program to listen")

    def listen_once_refused(self, name: str, ports: range) -> Future[None]:
        """Listen on each of ports as soon as a refusal of it has left the machine.

        Returns:
            Ended when all of them have been refused and listened on; a ``TimeoutError`` if not.
        """
        sniffer = self.submit(
            name, socket.socket, socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_ALL)
        ).result()
        self._stack.enter_context(sniffer)
        sniffer.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 16 * 1024 * 1024)
        sniffer.settimeout(120)

        def listen() -> None:
            waiting = set(ports)
            while waiting:
                packet, origin = sniffer.recvfrom(128)
                port = _refused_port(packet) if origin[2] == socket.PACKET_OUTGOING else None
                if port in waiting:
                    waiting.remove(port)
                    self._listen([port])

        return self.submit(name, listen)

    def filter(
        self, name: str, chain: str, ports: range, statement: str, version: int | None = None
    ) -> None:
        """Have a firewall do something with what is sent to ports.

        Args:
            name: The namespace.
            chain: ``input``, ``forward`` or ``output``.
            ports: Destination ports.
            statement: nftables' words for what to do: ``drop``, ``reject with tcp reset``, …
            version: 4 or 6 for that family alone.
        """
        family = f"meta nfproto ipv{version}" if version else ""
        self._rule(name, chain, f"{family} {_dport(ports)} {statement}")

    def lose(self, ports: range, percent: int) -> None:
        """Lose packets to and from ports at random on the internet, so many each way."""
        for direction in "dport", "sport":
            match = f"tcp {direction} {ports[0]}-{ports[-1]}"
            self._rule("internet", "forward", f"{match} numgen random mod 100 < {percent} drop")

    def drop_answers(self, ports: range) -> None:
        """Have the router drop what comes back from ports: the way there works alone."""
        match = f"tcp sport {ports[0]}-{ports[-1]}"
        self._rule("router", "forward", f"{match} drop")

    def drop_at_first(self, ports: range, seconds: float) -> None:
        """Have the router drop what is sent to each of ports in the time after its first packet."""
        new = "tcp dport != @attempted add @attempted { tcp dport }"
        closed = f"add @closed {{ tcp dport timeout {round(seconds * 1000)}ms }} drop"
        self.filter("router", "forward", ports, f"{new} {closed}")
        self.filter("router", "forward", ports, "tcp dport @closed drop")

    def _listen(self, ports: Iterable[int], *, transparent: bool = False) -> None:
        for port in ports:
            listener = self._stack.enter_context(
                socket.create_server(
                    ("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096
                )
            )
            if transparent:
                listener.setsockopt(socket.SOL_IP, _IP_TRANSPARENT, 1)

    def _rule(self, name: str, chain: str, rule: str) -> None:
        self.run(name, "nft", "add", "rule", "inet", "lab", chain, rule)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process that was started here, in peace if it can be."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def add_namespace(full_name: str) -> None:
    """Make a network namespace.

    Raises:
        subprocess.CalledProcessError: That is not possible here; ``stderr`` says why.
    """
    _run("ip", "netns", "add", full_name)


def delete_namespace(full_name: str) -> None:
    """Delete a network namespace."""
    _run("ip", "netns", "delete", full_name)


def _run(*argv: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv, check=True, capture_output=True, text=True, input=stdin, timeout=120
    )


def _enter(full_name: str) -> None:
    with open(f"/var/run/netns/{full_name}") as namespace:
        if _libc.setns(namespace.fileno(), _CLONE_NEWNET):
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))


def _set_sysctls(sysctls: Mapping[str, str]) -> None:
    for name, value in sysctls.items():
        Path("/proc/sys", name).write_text(value)


def _is_healthy(server: str, port: int = SERVICE_PORT) -> bool:
    connection = http.client.HTTPConnection(server, port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.HTTPStatus.OK
    except OSError:
        return False
    finally:
        connection.close()


def _post_check(server: str, port: int, body: str) -> Answer:
    connection = http.client.HTTPConnection(server, port, timeout=120)
    started = time.monotonic()
    try:
        connection.request("POST", "/check-ports", body)
        response = connection.getresponse()
        return Answer(response.status, json.load(response), time.monotonic() - started)
    finally:
        connection.close()


def _dport(ports: range) -> str:
    return f"tcp dport {ports[0]}-{ports[-1]}"


def _refused_port(packet: bytes) -> int | None:
    """The port that a packet, from its IP header on, refuses a connection to."""
    version, protocol, header = packet[0] >> 4, packet[9], (packet[0] & 15) * 4
    if version == 6:
        protocol, header = packet[6], 40
    if protocol != socket.IPPROTO_TCP or not packet[header + 13] & _TCP_RST:
        return None
    return int.from_bytes(packet[header : header + 2], "big")
