"""The checker's own firewall must not be taken for the provider's."""

from collections.abc import Iterator
from itertools import product

import pytest

from tests.lab import network
from tests.lab.checks import service
from tests.lab.network import Lab

pytestmark = pytest.mark.xdist_group("lab 2")

DROPS = "this machine's own firewall or a full queue drops what it sends"
REJECTS = "this machine's own firewall or tunnel rejects what it sends"
RESETS = "this machine itself refuses in its place: a rule of its firewall resets what it sends"
STATEMENTS = {
    "drop": DROPS,
    "reject": REJECTS,
    "reject with icmpx admin-prohibited": REJECTS,
    "reject with icmpx no-route": REJECTS,
    "reject with tcp reset": RESETS,
}


@pytest.fixture(scope="module")
def patient(lab: Lab) -> Iterator[int]:
    """The port of a service that waits for what the kernel sends again, after a second."""
    (port,) = lab.take(1)
    with service(lab, "checker", port, timeout=1.5):
        yield port


def test_what_the_checker_does_not_let_out_blames_nobody(lab: Lab, patient: int) -> None:
    opened = lab.take(3)
    lab.listen("provider", opened)
    lab.forward(opened)
    failing, passing = [], []
    for (statement, said), version in product(STATEMENTS.items(), (4, 6)):
        firewalled = lab.take(3)
        lab.listen("provider", firewalled)
        lab.forward(firewalled)
        lab.filter("checker", "output", firewalled, statement, version=version)
        target = network.PROVIDER[version]
        answer = lab.ask("provider", target, [*firewalled, *opened], service=patient)
        failing.append((said, firewalled, answer))
        passing.append(lab.ask("provider", target, opened, service=patient))
    for said, firewalled, answer in failing:
        assert (answer.result().status, answer.result().code) == (503, "CHECK_FAILED")
        assert said in answer.result().body["detail"]["message"]
        assert answer.result().body["detail"]["ports"] == [*firewalled]
    for answer in passing:
        assert all(verdict["accessible"] for verdict in answer.result().body["results"].values())


def test_every_port_that_the_checker_does_not_let_out_is_named(lab: Lab, patient: int) -> None:
    dropped, rejected, opened, silent = (lab.take(2) for _ in range(4))
    lab.filter("checker", "output", dropped, "drop")
    lab.filter("checker", "output", rejected, "reject")
    lab.listen("provider", opened)
    lab.forward(opened)
    lab.filter("router", "forward", silent, "drop")
    lab.forward(silent)
    asked = [*silent, *rejected, *opened, *dropped]
    pending = [
        lab.ask("provider", target, asked, service=patient) for target in network.PROVIDER.values()
    ]
    for answer in pending:
        detail = answer.result().body["detail"]
        assert list(detail) == ["code", "message", "ports"]
        assert detail["ports"] == [*rejected, *dropped]
