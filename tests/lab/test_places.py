"""Servers on three networks, and what each of them can reach, compared with the rule."""

import asyncio
import contextlib
import json
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme

from port_checker import advice
from port_checker.addresses import parse_networks
from port_checker.provider import Report, Waits, verify
from tests.lab import network
from tests.lab.checks import service
from tests.lab.network import Lab, end
from tests.support.http import client_of
from tests.support.namespace import ROOT
from tests.support.proxies import needs_proxies, nginx_of
from tests.support.tls import endpoint, server_context, speaking_tls, trust
from tests.support.waiting import wait_until

pytestmark = pytest.mark.xdist_group("lab 3")

ADDRESSES = {"checker": network.CHECKER, "ams": network.AMS, "sgp": network.SGP}
PLACES = tuple(ADDRESSES)
REFUSED, TIMED_OUT = "Connection refused", "Connection timed out"

FROM_HERE = parse_networks(",".join(network.CHECKER.values()))


def url(place: str, port: int) -> str:
    return f"http://{ADDRESSES[place][4]}:{port}"


@pytest.fixture(scope="module")
def ports_of_services(lab: Lab) -> Iterator[list[int]]:
    """The port of the services in all three places; and one at which another here asks them."""
    ordinary, asking = lab.take(2)
    with ExitStack() as stack:
        for place in "ams", "sgp":
            stack.enter_context(service(lab, place, ordinary, trusted_proxies=FROM_HERE))
        others = url("ams", ordinary), url("sgp", ordinary)
        stack.enter_context(service(lab, "checker", asking, perspectives=others))
        yield [ordinary, asking]


def ask(lab: Lab, port: int, version: int, ports: Sequence[int], **more: object) -> Any:
    """Have the third machine ask about itself."""
    host = network.CHECKER[version]
    base = f"http://[{host}]:{port}" if version == 6 else f"http://{host}:{port}"

    def post() -> httpx.Response:
        with client_of(base) as client:
            body = {"provider_ip": network.THIRD[version], "ports": [*ports], **more}
            return client.post("/check-ports", json=body)

    return lab.submit("third", post).result().json()


def errors(answer: Any) -> list[str | None]:
    return [result["error"] for result in answer.get("results", {}).values()]


def votes(
    lab: Lab, port: int, version: int, ports: Sequence[int], voters: int
) -> tuple[Any, list[list[str | None]]]:
    """Ask until so many places vote, as one that is held up does not; return their words, too."""
    while True:
        answer = ask(lab, port, version, ports, perspectives=True)
        voting = [each for each in answer.get("perspectives", ()) if "results" in each]
        if len(voting) == voters:
            return answer, [[r["error"] for r in each["results"].values()] for each in voting]
        assert len(voting) < voters


def keep_away(lab: Lab, place: str, ports: Sequence[int], how: str) -> None:
    """Have the internet do something with what a place sends to ports."""
    to = f"tcp dport {{ {', '.join(map(str, ports))} }}"
    lab.run("internet", "nft", f"add rule inet lab forward iifname {place} {to} {how}")


DROP, RESET = "drop", "reject with tcp reset"
WORDS = {"": None, DROP: TIMED_OUT, RESET: REFUSED}


def arrange(lab: Lab) -> dict[int, Sequence[str]]:
    """Listen on a port for each combination of what is in the way of the three places."""
    combinations = [*product(WORDS, repeat=3)]
    ports = lab.take(len(combinations))
    lab.listen("third", ports)
    arranged: dict[int, Sequence[str]] = dict(zip(ports, combinations, strict=True))
    for (number, place), how in product(enumerate(PLACES), (DROP, RESET)):
        keep_away(lab, place, [port for port in ports if arranged[port][number] == how], how)
    return arranged


def expected(votes: Sequence[str | None]) -> str | None:
    """What must come of the words of those that have a vote, here first; it is the rule again."""
    bad = [words for words in votes if words]
    if len(bad) <= (1 if len(votes) == 3 else 0):
        return None
    return max(bad, key=bad.count)


@pytest.fixture(scope="module")
def arranged(lab: Lab) -> dict[int, Sequence[str]]:
    return arrange(lab)


@pytest.mark.parametrize("version", [4, 6])
def test_what_is_in_the_way_of_each_place_decides_by_the_rule(
    lab: Lab, ports_of_services: list[int], arranged: dict[int, Sequence[str]], version: int
) -> None:
    _, asking = ports_of_services
    answer, seen = votes(lab, asking, version, [*arranged], 3)
    ways = [[WORDS[how] for how in combination] for combination in arranged.values()]
    assert [*zip(*seen, strict=True)] == [*map(tuple, ways)]
    assert errors(answer) == [*map(expected, ways)]

    def is_decided_alike() -> bool:
        # Whoever does not ask for all of them hears the words of those that came first.
        early = ask(lab, asking, version, [*arranged])
        return [not error for error in errors(early)] == [not error for error in errors(answer)]

    wait_until(is_decided_alike, "all to vote")


def says(accessible: bool) -> type[BaseHTTPRequestHandler]:
    """A place that does not look, and says one thing of every port; it knows of no places."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            result = {"accessible": accessible, "error": None if accessible else REFUSED}
            results = {str(port): result for port in asked["ports"]}
            body = json.dumps({"success": accessible, "results": results, "message": ""}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Stay quiet."""

    return Handler


@contextmanager
def liar(lab: Lab, port: int, *, accessible: bool) -> Iterator[None]:
    server = lab.submit("sgp", HTTPServer, ("", port), says(accessible)).result()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def hung(lab: Lab, port: int) -> Iterator[None]:
    lab.listen("sgp", range(port, port + 1))  # nobody accepts what its kernel does
    yield


@contextmanager
def dead(_: Lab, __: int) -> Iterator[None]:
    yield


@contextmanager
def cut_off(lab: Lab, port: int) -> Iterator[None]:
    lab.filter("internet", "forward", range(port, port + 1), DROP)
    yield


Trouble = Callable[[Lab, int], Any]
# What a place does, and its vote, if it has one.
TROUBLES: Mapping[str, tuple[Trouble, Sequence[str | None]]] = {
    "dead": (dead, ()),
    "cut off": (cut_off, ()),
    "hung": (hung, ()),
    "sees everything": (lambda lab, port: liar(lab, port, accessible=True), [None]),
    "sees nothing": (lambda lab, port: liar(lab, port, accessible=False), [REFUSED]),
}


@pytest.mark.parametrize(("trouble", "vote"), TROUBLES.values(), ids=TROUBLES.keys())
def test_a_place_in_trouble_or_that_lies_has_no_more_than_its_vote(
    lab: Lab,
    ports_of_services: list[int],
    arranged: dict[int, Sequence[str]],
    trouble: Trouble,
    vote: Sequence[str | None],
) -> None:
    ordinary, _ = ports_of_services
    port, asking = lab.take(2)
    others = url("ams", ordinary), url("sgp", port)
    with trouble(lab, port), service(lab, "checker", asking, perspectives=others):
        answer, _ = votes(lab, asking, 4, [*arranged], 2 + len(vote))
    ways = [[WORDS[how] for how in combination[:2]] for combination in arranged.values()]
    assert errors(answer) == [expected([*way, *vote]) for way in ways]


@pytest.mark.parametrize("trusted", [True, False])
def test_the_target_gets_one_connection_from_each_place_however_they_list_each_other(
    lab: Lab, trusted: bool
) -> None:
    *ports, here, ams = lab.take(12)
    lab.listen("third", range(ports[0], ports[-1] + 1))
    addresses = {place: ADDRESSES[place][4] for place in ("checker", "ams")}
    for address in addresses.values():
        count = f"ip saddr {address} tcp flags & (syn | ack) == syn counter"
        lab.filter("third", "input", range(ports[0], ports[-1] + 1), count)
    networks = parse_networks("60.0.0.0/16") if trusted else ()
    settings = {
        "perspectives": (url("checker", here), url("ams", ams)),
        "trusted_proxies": networks,
    }
    with service(lab, "checker", here, **settings), service(lab, "ams", ams, **settings):
        answer = ask(lab, here, 4, ports, perspectives=True)
    assert errors(answer) == [None] * len(ports)
    rules = lab.run("third", "nft", "--json", "list", "chain", "inet", "lab", "input").stdout
    counted = {
        address: sum(
            each["counter"]["packets"]
            for rule in json.loads(rules)["nftables"]
            if str(ports[0]) in str(rule) and address in str(rule)
            for each in rule["rule"]["expr"]
            if "counter" in each
        )
        for address in addresses.values()
    }
    # This server is in its own list: that is one place more.
    assert counted == {addresses["checker"]: 2 * len(ports), addresses["ams"]: len(ports)}


# /check-tls


def test_a_certificate_is_trusted_if_enough_places_reach_it(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    authority = trustme.CA()
    trust(authority, monkeypatch, tmp_path)
    context = server_context(authority.issue_cert(network.THIRD[4]))
    here, ordinary, *ports = lab.take(5)
    ways = (["ams"], ["checker"], ["ams", "sgp"])
    for port, places in zip(ports, ways, strict=True):
        for place in places:
            keep_away(lab, place, [port], DROP)

    def post(port: int) -> Any:
        with client_of(f"http://{network.CHECKER[4]}:{here}") as client:
            body = {"host": network.THIRD[4], "port": port, "perspectives": True}
            return client.post("/check-tls", json=body).json()

    # On a busy machine, the endpoints in this process may take longer than the lab's half second.
    patient = {"timeout": 3, "retries": 1}
    with ExitStack() as stack:
        for place in "ams", "sgp":
            stack.enter_context(service(lab, place, ordinary, trusted_proxies=FROM_HERE, **patient))
        others = url("ams", ordinary), url("sgp", ordinary)
        stack.enter_context(service(lab, "checker", here, perspectives=others, **patient))
        for port in ports:
            serving = endpoint(speaking_tls(context), network.THIRD[4], port)
            lab.submit("third", stack.enter_context, serving).result()
        answers = [lab.submit("third", post, port).result() for port in ports]
    assert [answer["error"] for answer in answers] == [None, None, TIMED_OUT]
    names = [f"{network.AMS[4]}:{ordinary}", f"{network.SGP[4]}:{ordinary}"]
    assert [place["name"] for place in answers[0]["perspectives"]] == ["here", *names]


# As the manual has it


def settings_of_the_manual() -> list[dict[str, str]]:
    """The settings of the first machine, and of the others."""
    page = (ROOT / "docs" / "operating.md").read_text()
    section = page.partition("\n## Several places\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```text\n(PORT_CHECKER_.*?)```", section, re.DOTALL)
    # The first one's address here is another.
    lines = [block.replace("203.0.113.10", network.CHECKER[4]).splitlines() for block in blocks]
    return [dict(line.split("=", 1) for line in each) for each in lines]


@contextmanager
def named(namespace: str, names: Mapping[str, str]) -> Iterator[None]:
    """Give addresses names in a namespace, as ip-netns(8) has it."""
    directory = Path("/etc/netns", namespace)
    directory.mkdir(parents=True)
    try:
        hosts = "".join(f"{address} {name}\n" for name, address in names.items())
        (directory / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
        yield
    finally:
        shutil.rmtree(directory)
        with contextlib.suppress(OSError):  # others are there
            directory.parent.rmdir()


def is_listening() -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", 443)) == 0


@needs_proxies
def test_three_machines_work_with_what_the_manual_says(lab: Lab, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    first, others = settings_of_the_manual()
    quick = {"PORT_CHECK_RETRIES": "1"}
    names = {f"{place}.checker.example": ADDRESSES[place][4] for place in ("ams", "sgp")}
    shipped = (ROOT / "contrib" / "nginx.conf").read_text()
    asking, open_, filtered = lab.take(3)
    lab.listen("third", range(open_, filtered + 1))
    keep_away(lab, "ams", [filtered], DROP)
    keep_away(lab, "sgp", [filtered], DROP)
    keep_away(lab, "sgp", [open_], DROP)
    with ExitStack() as stack:
        for place in "ams", "sgp":
            lab.serve(place, **quick, **others)
            certificate = tmp_path / f"{place}.pem"
            issued = authority.issue_cert(f"{place}.checker.example")
            trustme.Blob(
                issued.private_key_pem.bytes() + issued.cert_chain_pems[0].bytes()
            ).write_to_path(str(certificate))
            tls = (
                f"listen 443 ssl; ssl_certificate {certificate}; ssl_certificate_key {certificate};"
            )
            proxy = nginx_of(tmp_path, shipped.replace("listen 80;", tls), is_listening)
            lab.submit(place, stack.enter_context, proxy).result()
        stack.enter_context(named(lab.full_name("checker"), names))
        log = lab.log.stat().st_size
        server = lab.serve(
            PORT_CHECKER_PORT=str(asking),
            **quick,
            SSL_CERT_FILE=str(tmp_path / "authority.pem"),
            **first,
        )
        stack.callback(end, server)
        answer = ask(lab, asking, 4, [open_, filtered], perspectives=True)
    assert errors(answer) == [None, TIMED_OUT]
    assert [place["name"] for place in answer["perspectives"]] == ["here", *names]
    assert not any("error" in place for place in answer["perspectives"])
    assert "The perspective" not in lab.log.read_text()[log:]  # nothing to warn of


def test_a_private_address_is_not_checked_in_other_networks(lab: Lab) -> None:
    """The first server's private network has the same addresses as that of another place."""
    private = "10.9.8.7"
    for name in "checker", "ams":
        lab.run(name, "ip", "address", "add", f"{private}/32", "dev", "lo")
    (port, asking, ordinary) = lab.take(3)
    connections: list[socket.socket] = []
    listener = lab.submit("ams", socket.create_server, (private, port)).result()
    listener.setblocking(False)
    body = {"provider_ip": private, "ports": [port], "perspectives": True}

    def post() -> Any:
        transport = httpx.HTTPTransport(local_address=private)
        with httpx.Client(transport=transport, timeout=30) as client:
            return client.post(f"http://{private}:{asking}/check-ports", json=body).json()

    others = (url("ams", ordinary),)
    with (
        listener,
        service(lab, "ams", ordinary, trusted_proxies=FROM_HERE),
        service(lab, "checker", asking, perspectives=others),
    ):
        answer = lab.submit("checker", post).result()
        with contextlib.suppress(BlockingIOError):
            connections.append(listener.accept()[0])
    assert errors(answer) == [REFUSED]
    assert [place["name"] for place in answer["perspectives"]] == ["here"]
    assert connections == []


# The provider's side


def check(lab: Lab, server: str, ports: Sequence[int]) -> Report:
    """Check ports of the provider's machine, behind its router, until all places vote."""

    def run() -> Report:
        return asyncio.run(verify(ports, servers=[server], waits=Waits(late_connections=1)))

    while True:
        report = lab.submit("provider", run).result()
        if all(len(port.places.get(server, ())) == len(PLACES) for port in report.ports):
            return report


@contextmanager
def stranger(lab: Lab, ports: Sequence[int]) -> Iterator[None]:
    """Have the third machine connect to ports again and again."""
    is_over = threading.Event()

    def connect() -> None:
        while not is_over.wait(0.5):
            for port in ports:
                with contextlib.suppress(OSError):
                    socket.create_connection((network.PROVIDER[4], port), 0.2).close()

    connecting = lab.submit("third", connect)
    try:
        yield
    finally:
        is_over.set()
        connecting.result()


def test_connections_of_other_places_are_the_servers_and_strangers_are_not(lab: Lab) -> None:
    ways = ("checker",), ("checker", "ams"), PLACES
    groups = [lab.take(1) for _ in ways]
    ordinary, asking = lab.take(2)
    for ports, places in zip(groups, ways, strict=True):
        lab.forward(ports)
        for place in places:
            keep_away(lab, place, ports, DROP)
    everything = [port for ports in groups for port in ports]
    others = url("ams", ordinary), url("sgp", ordinary)
    with (
        stranger(lab, everything),
        service(lab, "ams", ordinary, trusted_proxies=FROM_HERE, retries=1),
        service(lab, "sgp", ordinary, trusted_proxies=FROM_HERE, retries=1),
        service(lab, "checker", asking, perspectives=others, retries=1),
    ):
        report = check(lab, url("checker", asking), everything)
    found = [(port.reachable, port.confirmed, port.advice) for port in report.ports]
    reached_by_some = (False, False, advice.REACHED_FROM_SOME_PLACES)
    assert found[:2] == [(True, True, None), reached_by_some]
    assert found[2][:2] == (False, False)
    assert found[2][2] != advice.REACHED_FROM_SOME_PLACES
    (seen,) = report.ports[0].places.values()
    here = f"{network.CHECKER[4]}:{asking}"
    assert {name: said.error for name, said in seen.items() if said.error} == {here: TIMED_OUT}
