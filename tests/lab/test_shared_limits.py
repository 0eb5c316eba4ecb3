"""Limits that two machines share in a Redis cluster, whatever happens to it."""

import os
import re
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import redis

from port_checker.addresses import parse_address, subscriber
from tests.lab import network
from tests.lab.network import Answer, Lab, end
from tests.support.waiting import wait_until

pytestmark = [
    pytest.mark.xdist_group("lab 4"),
    pytest.mark.skipif(
        os.environ.get("CI") != "true"
        and not (shutil.which("redis-server") and shutil.which("faketime")),
        reason="it needs redis-server and faketime",
    ),
]

# The service runs on two machines; both see the provider by one address.
MACHINES = {"third": network.THIRD[6], "neighbour": network.NEIGHBOUR[6]}

REDIS = "60.0.2.1"  # the internet's address on the side of the router
SLOTS = 16384
KEYS = "port-checker:{limits}:"  # how the keys of all limits begin


class Cluster:
    """Three masters, and a replica of the one that has the limits, with an hour less on its clock.

    Args:
        lab: They run in its internet.
        folder: For their files.
    """

    def __init__(self, lab: Lab, folder: Path) -> None:
        self._lab = lab
        self._folder = folder
        self._ports = lab.take(4)
        self._nodes = [self._start(port) for port in self._ports[:3]]
        bounds = pairwise(SLOTS * part // 3 for part in range(4))
        for port, (first, end_) in zip(self._ports, bounds, strict=False):
            self._command(port, "CLUSTER ADDSLOTSRANGE", str(first), str(end_ - 1))
            self._command(port, "CLUSTER SET-CONFIG-EPOCH", str(port))
        self._nodes.append(self._start(self._ports[3], "-1h"))
        for port in self._ports[1:]:
            self._command(port, "CLUSTER MEET", REDIS, str(self._ports[0]))
        self._master = int(self._command(self._ports[0], "CLUSTER KEYSLOT", KEYS)) * 3 // SLOTS
        master_id = self._command(self._ports[self._master], "CLUSTER MYID")
        wait_until(lambda: self._replicates(master_id), "the replica to know its master")
        wait_until(self._is_complete, "the cluster to be complete")

    def url(self, number: int) -> str:
        """A URL of the cluster, by one of its masters."""
        return f"redis+cluster://{REDIS}:{self._ports[number]}"

    @property
    def master_url(self) -> str:
        """The same by the master that has the limits."""
        return self.url(self._master)

    def silence_the_master(self) -> None:
        """Have the machine of the master disappear, without a word to those connected with it."""
        port = self._ports[self._master]
        for it in port, port + 10_000:  # of the cluster's own protocol
            self._lab.filter("internet", "input", range(it, it + 1), "drop")
        self._nodes[self._master].send_signal(signal.SIGSTOP)

    def has_failed_over(self) -> bool:
        """Whether the replica is the master."""
        return bool(self._command(self._ports[3], "INFO", "replication")["role"] == "master")

    def knows_caller(self, address: str) -> bool:
        """Whether the replica, as the master, has a limit of a caller."""
        key = f"{KEYS}requests:{subscriber(parse_address(address))}"
        return bool(self._command(self._ports[3], "EXISTS", key))

    def clocks_difference(self) -> int:
        """By how many seconds the replica's clock differs from a master's."""
        (there, _), (here, _) = (self._command(self._ports[it], "TIME") for it in (3, 0))
        return int(there) - int(here)

    def close(self) -> None:
        for node in self._nodes:
            node.kill()
            node.wait()

    def _start(self, port: int, clock: str | None = None) -> subprocess.Popen[bytes]:
        environment = dict(os.environ)
        if clock:
            words = ["faketime", "-m", "-f", clock, "printenv", "LD_PRELOAD"]
            fake = subprocess.run(words, check=True, capture_output=True, text=True).stdout
            # jemalloc asks for the time before the library is ready to answer; the C library's
            # malloc() does not.
            environment |= {"FAKETIME": clock, "LD_PRELOAD": f"{fake.strip()} libc.so.6"}
        folder = self._folder / str(port)
        folder.mkdir()
        # Beside busy programs, too, it answers within the 40 ms that a payment waits.
        node = self._lab.popen(
            "internet",
            *["nice", "-n", "-20", "env", "-C", str(folder)],
            *["redis-server", "--port", str(port), "--bind", REDIS],
            *["--cluster-enabled", "yes", "--cluster-node-timeout", "1000", "--save", ""],
            *["--protected-mode", "no"],
            env=environment,
        )  # fmt: skip
        wait_until(lambda: node.poll() is not None or self._answers(port), "Redis to answer")
        return node

    def _answers(self, port: int) -> bool:
        try:
            return bool(self._command(port, "PING"))
        except redis.ConnectionError:
            return False

    def _command(self, port: int, *words: str) -> Any:
        def send() -> Any:
            with redis.Redis(REDIS, port, decode_responses=True) as client:
                return client.execute_command(*words)

        return self._lab.submit("internet", send).result()

    def _replicates(self, master_id: str) -> bool:
        try:
            return bool(self._command(self._ports[3], "CLUSTER REPLICATE", master_id))
        except redis.ResponseError:  # it does not know the master yet
            return False

    def _is_complete(self) -> bool:
        link = self._command(self._ports[3], "INFO", "replication")
        states = [self._command(port, "CLUSTER INFO") for port in self._ports]
        return link["master_link_status"] == "up" and all(
            state["cluster_state"] == "ok" for state in states
        )


@contextmanager
def cluster(lab: Lab, folder: Path) -> Iterator[Cluster]:
    made = Cluster(lab, folder)
    try:
        yield made
    finally:
        made.close()


def serve(lab: Lab, stack: ExitStack, name: str, store: str, **settings: str) -> None:
    limits = {"PORT_CHECKER_RATE_LIMIT": "30/hour", "PORT_CHECK_RETRIES": "1"}
    service = lab.serve(name, PORT_CHECKER_RATE_LIMIT_STORE=store, **limits, **settings)
    stack.callback(end, service)
    # Like Redis: it has 40 ms to read an answer.
    with suppress(PermissionError):
        for thread in os.listdir(f"/proc/{service.pid}/task"):
            os.setpriority(os.PRIO_PROCESS, int(thread), -20)


def crowd(lab: Lab, caller: str) -> list[Answer]:
    """The answers to forty requests of one caller on each machine, all made at once."""
    address = {"provider": network.PROVIDER, "checker": network.CHECKER}[caller][6]
    pending = [
        lab.ask(caller, address, [9], server=server)
        for _ in range(40)
        for server in MACHINES.values()
    ]
    return [answer.result() for answer in pending]


def seconds_to_wait(answer: Answer) -> int:
    (seconds,) = re.findall("Try again in ([0-9]+) s", answer.body["detail"]["message"])
    return int(seconds)


def statuses(answers: list[Answer]) -> Counter[int]:
    return Counter(answer.status for answer in answers)


def test_two_machines_share_limits_and_a_failover_bars_nobody(lab: Lab, tmp_path: Path) -> None:
    """The master's machine disappears; the clock of the replica that takes over is behind."""
    with cluster(lab, tmp_path) as shared, ExitStack() as stack:
        for name in MACHINES:
            serve(lab, stack, name, shared.master_url)
        assert shared.clocks_difference() < -3500
        assert statuses(crowd(lab, "provider")) == {200: 30, 429: 50}
        shared.silence_the_master()
        wait_until(shared.has_failed_over, "the replica to take over")

        for name, server in MACHINES.items():

            def pays_there(name: str = name, server: str = server) -> bool:
                lab.ask(name, server, [9], server=server).result()
                return shared.knows_caller(server)

            wait_until(pays_there, "Redis to be available again")
        assert statuses(crowd(lab, "checker")) == {200: 30, 429: 50}
        for answer in crowd(lab, "provider"):
            assert answer.status == 200 or seconds_to_wait(answer) <= 120
