"""The checker's own network must not be taken for the provider's: nothing here blames anybody."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import pytest
import trustme

from tests.lab import network
from tests.lab.checks import LOOPBACK, service, url_of
from tests.lab.network import Answer, Lab
from tests.support.http import client_of
from tests.support.tls import endpoint, server_context, speaking_tls, trust
from tests.support.waiting import wait_until

pytestmark = pytest.mark.xdist_group("lab 2")

VERSIONS = 4, 6

# Addresses behind a gateway that nobody has, and behind a link without a carrier.
BEHIND_DEAD_GATEWAY = {4: "61.1.0.1", 6: "2b01::1"}
DEAD_GATEWAY = {4: "60.0.1.77", 6: "2a00:1::77"}
BEHIND_DEAD_LINK = {4: "61.2.0.1", 6: "2b02::1"}
ON_DEAD_LINK = {4: "60.8.0.9", 6: "2a00:8::9"}
DEAD_LINK = {4: "60.8.0.1/24", 6: "2a00:8::1/64"}

NO_GATEWAY = "the gateway of this machine's route does not answer"
LINK_DOWN = "the link of this machine's route is down"
REJECTS_ITSELF = "this machine's own firewall or tunnel rejects what it sends"
REFUSES_ITSELF = "this machine itself refuses in its place: a rule of its firewall resets what it "
ANSWERS_ITSELF = "something on this machine, a redirect of a proxy or a service mesh, answers in "


def open_ports(lab: Lab, count: int) -> range:
    ports = lab.take(count)
    lab.listen("provider", ports)
    lab.forward(ports)
    return ports


def wrong(answers: list[tuple[Answer, str]]) -> list[str]:
    """The answers that are not CHECK_FAILED for this reason."""
    return [
        f"{answer.status} {answer.body}"
        for answer, reason in answers
        if answer.code != "CHECK_FAILED" or reason not in answer.body["detail"]["message"]
    ]


def test_a_dead_gateway_of_ours_blames_nobody(lab: Lab) -> None:
    for version, target in BEHIND_DEAD_GATEWAY.items():
        lab.run("checker", "ip", "route", "add", target, "via", DEAD_GATEWAY[version])
    pending = [
        lab.ask("third", target, ports)
        for target in BEHIND_DEAD_GATEWAY.values()
        for ports in ([80], range(1, 101))
    ]
    assert not wrong([(answer.result(), NO_GATEWAY) for answer in pending])


def test_a_dead_gateway_is_known_before_the_kernel_gives_it_up(lab: Lab) -> None:
    """That takes the kernel three seconds, and an attempt may last shorter."""
    with service(lab, "third", timeout=1, retries=1):
        for version, target in BEHIND_DEAD_GATEWAY.items():
            gateway = DEAD_GATEWAY[version].replace("60.0.1", "60.0.3").replace("00:1:", "00:3:")
            lab.run("third", "ip", "route", "add", target, "via", gateway)
            answer = lab.ask("provider", target, [80], server=network.THIRD[version]).result()
            assert not wrong([(answer, NO_GATEWAY)])


@pytest.mark.parametrize("version", VERSIONS)
def test_a_link_of_ours_without_a_carrier_blames_nobody(lab: Lab, version: int) -> None:
    with suppress(CalledProcessError):  # it is there already
        lab.run("checker", "ip", "link", "add", "dark", "type", "veth", "peer", "name", "unlit")
        lab.run("checker", "ip", "link", "set", "dark", "up")
    lab.run("checker", "ip", "address", "add", DEAD_LINK[version], "dev", "dark")
    target = BEHIND_DEAD_LINK[version]
    lab.run("checker", "ip", "route", "add", target, "via", ON_DEAD_LINK[version], "dev", "dark")
    pending = [lab.ask("third", it, [80, 81]) for it in (target, ON_DEAD_LINK[version])]
    assert not wrong([(answer.result(), LINK_DOWN) for answer in pending])


@pytest.mark.parametrize("version", VERSIONS)
def test_a_link_local_source_blames_nobody(lab: Lab, version: int) -> None:
    source = {4: "169.254.7.7", 6: "fe80::77"}[version]
    target, gateway = {4: ("61.3.0.1", "60.0.1.1"), 6: ("2b03::1", "2a00:1::1")}[version]
    lab.run("checker", "ip", "address", "add", source, "dev", "internet")
    route = (target, "via", gateway, "dev", "internet", "src", source)
    lab.run("checker", "ip", "route", "add", *route)
    answer = lab.ask("third", target, [80]).result()
    assert not wrong([(answer, f"this machine has only the address {source} for {target}")])


def test_an_address_that_goes_in_the_middle_of_a_check_blames_nobody(lab: Lab) -> None:
    """Answers to it cannot arrive, wherever later connections come from."""
    opened, silent = open_ports(lab, 1), open_ports(lab, 1)
    lab.filter("router", "forward", silent, "drop")
    old, new = {4: "60.0.3.2/24", 6: "2a00:3::2/64"}, {4: "60.0.3.7/25", 6: "2a00:3::7/64"}

    def are_under_way() -> bool:
        sent = lab.run("third", "ss", "-Htn", "state", "syn-sent").stdout
        return all(f"{target}:{silent[0]}" in sent for target in ("60.0.2.2", "[2a00:4:0:1::2]"))

    with service(lab, "third", timeout=6, retries=1):
        pending = [
            lab.ask("third", network.PROVIDER[it], [*opened, *silent], server=LOOPBACK[it])
            for it in VERSIONS
        ]
        wait_until(are_under_way, "the checks")
        try:
            for version in VERSIONS:
                lab.run("third", "ip", "address", "add", new[version], "dev", "internet")
                lab.run("third", "ip", "address", "delete", old[version], "dev", "internet")
            for version, answer in zip(VERSIONS, pending, strict=True):
                gone = f"this machine no longer has the address {network.THIRD[version]}"
                assert not wrong([(answer.result(), gone)])
        finally:
            for version, gateway in (4, "60.0.3.1"), (6, "2a00:3::1"):
                lab.run("third", "ip", "address", "replace", old[version], "dev", "internet")
                lab.run("third", "ip", "address", "delete", new[version], "dev", "internet")
                route = ["route", "replace", "default", "via", gateway]
                lab.run("third", "ip", f"-{version}", *route)


def test_what_this_machine_itself_calls_unreachable(lab: Lab) -> None:
    """Its own error comes from a network's first address, whatever the connection's own is."""
    rejected, (closed,) = lab.take(1), lab.take(1)
    link = ["link", "add", "hole", "arp", "off", "type", "veth", "peer", "name", "bottom"]
    lab.run("third", "ip", *link)
    for end in "hole", "bottom":
        lab.run("third", "ip", "link", "set", end, "up")
    for address in "60.0.3.5/24", "2a00:3::5/64":
        lab.run("third", "ip", "address", "add", address, "dev", "internet")
    for target, *way in [
        ("61.4.0.1", "via", "60.0.3.78", "src", "60.0.3.5"),
        ("2b04::1", "via", "2a00:3::78", "src", "2a00:3::5"),
        ("61.5.0.1", "dev", "hole"),
        ("2b05::1", "dev", "hole"),
    ]:
        lab.run("third", "ip", "route", "add", target, *way)
    lab.filter("third", "output", rejected, "reject with icmpx host-unreachable")
    with service(lab, "third", timeout=4, retries=1):

        def ask(target: str, port: int) -> Future[Answer]:
            server = network.THIRD[6 if ":" in target else 4]
            return lab.ask("ams", target, [port], server=server)

        pending = [
            *((ask(target, closed), NO_GATEWAY) for target in ("61.4.0.1", "2b04::1")),
            # On a link without ARP, such as a tunnel's; and at a neighbour that is there.
            *((ask(target, rejected[0]), REJECTS_ITSELF) for target in ("61.5.0.1", "2b05::1")),
            *((ask(target, rejected[0]), REJECTS_ITSELF) for target in ("60.0.3.1", "2a00:3::1")),
        ]
        on_link = [ask(target, closed) for target in ("60.0.3.66", "2a00:3::66")]
        assert not wrong([(answer.result(), reason) for answer, reason in pending])
    for answer in on_link:
        assert answer.result().body["results"][str(closed)]["error"] == "No route to host"


def test_a_route_that_goes_in_the_middle_of_a_check_blames_nobody(lab: Lab) -> None:
    """Whether it has come back by the end or not."""
    kinds = "blackhole", "prohibit", "unreachable"
    silent = lab.take(2 * len(kinds) + 1)
    *led_astray, passing = silent
    lab.filter("internet", "forward", silent, "drop")
    rules = [
        (f"-{version}", "rule", "{}", "ipproto", "tcp", "dport", str(port), kind)
        for port, kind in zip(led_astray, kinds * 2, strict=True)
        for version in VERSIONS
    ]

    def change(rules: Sequence[Sequence[str]], verb: str) -> None:
        for rule in rules:
            lab.run("third", "ip", *(word.format(verb) for word in rule))

    def are_under_way(again: bool) -> bool:
        sent = lab.run("third", "ss", "-Htno", "state", "syn-sent").stdout.splitlines()
        ours = [line for line in sent if not again or ",0)" not in line]  # sent again: 0 times
        return len(ours) == len(VERSIONS) * len(silent)

    with service(lab, "third", timeout=3, retries=1):
        pending = {
            port: [
                lab.ask("ams", network.PROVIDER[version], [port], server=network.THIRD[version])
                for version in VERSIONS
            ]
            for port in silent
        }
        wait_until(lambda: are_under_way(again=False), "the checks")
        change(rules, "add")
        wait_until(lambda: are_under_way(again=True), "the second packets")
        half = len(rules) // 2
        change(rules[:half], "delete")
        for port in led_astray:
            reason = "had no route to" if port in led_astray[: len(kinds)] else "has no route to"
            assert not wrong([(answer.result(), reason) for answer in pending[port]])
        change(rules[half:], "delete")
    for answer in pending[passing]:
        assert answer.result().body["results"][str(passing)]["error"] == "Connection timed out"


def test_a_rule_for_some_packets_may_lead_to_a_gateway_of_its_own(lab: Lab) -> None:
    """IPv4 looks at its own address in rules; both look at ports."""
    opened = open_ports(lab, 1)
    of_the_port = ("ipproto", "tcp", "dport", str(opened[0]))
    conditions = (4, ("from", network.THIRD[4])), (4, of_the_port), (6, of_the_port)
    with service(lab, "third", timeout=1, retries=1):
        for version, condition in conditions:
            gateway = DEAD_GATEWAY[version].replace("60.0.1", "60.0.3").replace("00:1:", "00:3:")
            target = network.PROVIDER[version]
            route = ("route", "replace", target, "via", gateway, "table", "99")
            rule = ("to", target, *condition, "lookup", "99")
            lab.run("third", "ip", f"-{version}", *route)
            lab.run("third", "ip", f"-{version}", "rule", "add", *rule)
            answer = lab.ask("ams", target, opened, server=network.THIRD[version]).result()
            lab.run("third", "ip", f"-{version}", "rule", "delete", *rule)
            assert not wrong([(answer, NO_GATEWAY)])


def test_a_rule_for_another_protocol_says_nothing_of_tcp(lab: Lab) -> None:
    opened = open_ports(lab, 3)
    for version in VERSIONS:
        rule = ("rule", "add", "to", network.PROVIDER[version], "ipproto", "udp", "prohibit")
        lab.run("checker", "ip", f"-{version}", *rule)
        answer = lab.ask("third", network.PROVIDER[version], opened).result()
        lab.run("checker", "ip", f"-{version}", "rule", "delete", *rule[2:])
        assert all(result["accessible"] for result in answer.body["results"].values())


@pytest.mark.parametrize("version", VERSIONS)
def test_an_error_for_one_packet_of_a_handshake_says_nothing(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: int
) -> None:
    """TCP sends the packet again (RFC 5461 section 2.2)."""
    target = network.THIRD[version]
    authority = trustme.CA()
    trust(authority, monkeypatch, tmp_path)
    context = server_context(authority.issue_cert(target))
    here, port = lab.take(2)
    # The first is lost, since an error that comes while it is being sent is put aside.
    for statement in "drop", "reject with icmpx no-route":
        once = f"tcp flags & psh == psh limit rate 1/day burst 1 packets {statement}"
        lab.filter("internet", "forward", range(port, port + 1), once, version=version)

    def post() -> Any:
        with client_of(url_of(LOOPBACK, version, here)) as client:
            return client.post("/check-tls", json={"host": target, "port": port}).json()

    with ExitStack() as stack:
        stack.enter_context(service(lab, "checker", here, timeout=30, retries=1))
        serving = endpoint(speaking_tls(context), target, port)
        lab.submit("third", stack.enter_context, serving).result()
        assert lab.submit("checker", post).result()["error"] is None


@contextmanager
def redirected(lab: Lab, name: str, *rules: str) -> Iterator[None]:
    """Have a machine's own connections answered by itself, as a sidecar's rules do."""
    hook = "{ type nat hook output priority -100; }"
    lab.run(name, "nft", "add", "table", "inet", "mesh")
    lab.run(name, "nft", "add", "chain", "inet", "mesh", "output", hook)
    try:
        for rule in rules:
            lab.run(name, "nft", "add", "rule", "inet", "mesh", "output", *rule.split())
        yield
    finally:
        lab.run(name, "nft", "delete", "table", "inet", "mesh")


@pytest.mark.parametrize(
    ("version", "to"),
    [
        (4, "redirect to :{proxy}"),
        (6, "redirect to :{proxy}"),
        # To an address of this machine that is not loopback.
        (4, "dnat ip to 60.0.1.3:{proxy}"),
        (6, "dnat ip6 to [2a00:1::3]:{proxy}"),
    ],
)
def test_what_answers_in_the_targets_place_blames_and_clears_nobody(
    lab: Lab, version: int, to: str
) -> None:
    opened, elsewhere, (proxy,) = open_ports(lab, 10), open_ports(lab, 10), lab.take(1)
    lab.listen("checker", range(proxy, proxy + 1))
    rule = f"tcp dport {opened[0]}-{opened[-1]} " + to.format(proxy=proxy)
    with redirected(lab, "checker", rule):
        pending = [
            (target, asked, lab.ask("third", target, asked))
            for target in (network.PROVIDER[version], network.SILENT[version])
            for asked in (opened, [opened[0]])
        ]
        for _, asked, answer in pending:
            assert not wrong([(answer.result(), ANSWERS_ITSELF)])
            assert answer.result().body["detail"]["ports"] == [*asked]
        # Ports that are not redirected have their verdicts, and those of this machine itself.
        passing = lab.ask("third", network.PROVIDER[version], elsewhere).result()
        itself = lab.ask("checker", network.CHECKER[version], [network.SERVICE_PORT]).result()
    for answered in passing, itself:
        assert all(result["accessible"] for result in answered.body["results"].values())
    after = lab.ask("third", network.PROVIDER[version], opened).result()
    assert all(result["accessible"] for result in after.body["results"].values())


def test_what_the_firewall_tracks_in_a_zone_of_its_own_is_seen_too(lab: Lab) -> None:
    """The kernel does not show where such connections were to lead."""
    opened, (proxy,) = open_ports(lab, 3), lab.take(1)
    lab.listen("checker", range(proxy, proxy + 1))
    match = f"tcp dport {opened[0]}-{opened[-1]}"
    with redirected(lab, "checker", f"{match} redirect to :{proxy}"):
        hook = "{ type filter hook output priority raw; }"
        lab.run("checker", "nft", "add", "chain", "inet", "mesh", "zones", hook)
        rule = f"{match} ct zone set 7"
        lab.run("checker", "nft", "add", "rule", "inet", "mesh", "zones", *rule.split())
        reply = f"tcp sport {proxy} ct zone set 7"
        lab.run("checker", "nft", "add", "rule", "inet", "mesh", "zones", *reply.split())
        answer = lab.ask("third", network.PROVIDER[4], opened).result()
    assert not wrong([(answer, ANSWERS_ITSELF)])


@pytest.mark.parametrize(
    ("version", "to"),
    [
        (4, "redirect to :{closed}"),
        (6, "redirect to :{closed}"),
        (4, "dnat ip to 60.0.1.3:{closed}"),
        (6, "dnat ip6 to [2a00:1::3]:{closed}"),
    ],
)
def test_what_refuses_in_the_targets_place_blames_nobody(lab: Lab, version: int, to: str) -> None:
    """A sidecar whose proxy is gone, say."""
    led_here, elsewhere, (closed,) = open_ports(lab, 3), lab.take(3), lab.take(1)
    lab.forward(elsewhere)
    target = network.PROVIDER[version]
    rule = f"tcp dport {led_here[0]}-{led_here[-1]} " + to.format(closed=closed)
    with redirected(lab, "checker", rule):
        for asked in led_here, [*led_here, *elsewhere]:
            answer = lab.ask("third", target, asked).result()
            assert not wrong([(answer, REFUSES_ITSELF)])
            assert answer.body["detail"]["ports"] == [*led_here]
        # What another machine refuses, or this one on its own address, is a verdict.
        for caller, address in ("third", target), ("checker", network.CHECKER[version]):
            results = lab.ask(caller, address, elsewhere).result().body["results"]
            assert {result["error"] for result in results.values()} == {"Connection refused"}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_transparent_proxy_that_poses_as_the_target(lab: Lab, version: int) -> None:
    opened, (proxy,) = open_ports(lab, 3), lab.take(1)
    lab.listen("checker", range(proxy, proxy + 1), transparent=True)
    family, anywhere = ("ip", "0.0.0.0/0") if version == 4 else ("ip6", "::/0")
    lab.run("checker", "ip", f"-{version}", "rule", "add", "fwmark", "7", "lookup", "77")
    lab.run("checker", "ip", "route", "add", "local", anywhere, "dev", "lo", "table", "77")
    match = f"meta nfproto ipv{version} tcp dport {opened[0]}-{opened[-1]}"
    rules = f"""
        table inet mesh {{
            chain output {{
                type route hook output priority mangle
                {match} meta mark set 7
            }}
            chain prerouting {{
                type filter hook prerouting priority mangle
                {match} meta mark 7 tproxy {family} to :{proxy} accept
            }}
        }}
    """
    lab.run("checker", "nft", "-f", "-", stdin=rules)
    try:
        answer = lab.ask("third", network.PROVIDER[version], opened).result()
    finally:
        lab.run("checker", "nft", "delete", "table", "inet", "mesh")
        lab.run("checker", "ip", f"-{version}", "rule", "delete", "fwmark", "7")
    assert not wrong([(answer, ANSWERS_ITSELF)])
