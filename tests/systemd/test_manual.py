"""README's commands and those of docs/operating.md, word by word, in a clean Debian."""

import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tests.support.namespace import ROOT
from tests.systemd.container import Container, needs_debian

pytestmark = [needs_debian, pytest.mark.parametrize("container", ["bookworm"], indirect=True)]

# Where there is no network, pip takes what is there. `make deb` has been run, outside.
# journalctl and grep fail where they find nothing, as of yesterday in a Debian that is a minute
# old.
SHELL = """
export PIP_NO_INDEX=1 PIP_FIND_LINKS=/mnt/wheels PIP_NO_COMPILE=1 DEBIAN_FRONTEND=noninteractive
make() { [[ $1 == deb ]]; }
apt() { command apt-get -qq "$@"; }
journalctl() { command journalctl --quiet "$@" || [[ $? == 1 ]]; }
grep() { command grep "$@" || [[ $? == 1 ]]; }
cd /root/checkout
"""

# What a page takes for granted where it comes to a command: by a word of the command.
BEFORE = {
    "redis-cli ACL": (
        "printf 'port 6379\\naclfile /root/users.acl\\n' > /root/redis.conf\n"
        "echo 'user default on nopass ~* &* +@all' > /root/users.acl\n"
        "systemctl stop redis-server; redis-server /root/redis.conf --daemonize yes > /dev/null\n"
        "until redis-cli ping > /dev/null; do sleep 0.1; done\n"
        "redis-cli ACL SETUSER checker on '>password' '~port-checker:*' "
        "+evalsha +'script|load' +time +get +set\n"
        "echo PORT_CHECKER_RATE_LIMIT_STORE=redis://checker:password@127.0.0.1 "
        ">> /etc/golem/port-checker.env; systemctl restart golem-port-checker"
    ),
}

# What a person does where a command's comment says so.
BY_HAND = {
    "# write it to PORT_CHECKER_RATE_LIMIT_STORE in /etc/golem/port-checker.env": (
        "sed -i s/checker:password/checker:new-password/ /etc/golem/port-checker.env"
    ),
}

CHECK = 'curl -sS localhost:9000/check-ports -d \'{"provider_ip": "127.0.0.1", "ports": [9]}\''


class Block(NamedTuple):
    """Commands, and the comment before them, which says that they are not to be run, or when."""

    mark: str
    commands: str


def blocks(page: str) -> list[Block]:
    found = re.findall(
        r"^(?:<!-- ([^\n]*) -->\n)?```bash\n(.*?)^```$", page, re.MULTILINE | re.DOTALL
    )
    return [Block(*each) for each in found]


@pytest.fixture(autouse=True)
def _clean(container: Container) -> Iterator[None]:
    container.run("cp -r /mnt/checkout /root/checkout")
    yield
    container.run(
        "systemctl stop 'golem*'; rm -rf /opt/golem* /etc/systemd/system/golem*\n"
        "rm -rf /root/checkout /etc/golem; systemctl daemon-reload\n"
        "redis-cli shutdown nosave || true; nft flush ruleset; dpkg --purge golem-port-checker"
    )


def test_every_command_of_the_manual_works(container: Container) -> None:
    manual = blocks((ROOT / "docs" / "operating.md").read_text())
    last = [block for block in manual if block.mark == "run at the end"]
    assert {block.mark.partition(":")[0] for block in manual if block not in last} == {
        "",
        "not run",
        "not run here",
    }
    for block in [*(each for each in manual if not each.mark), *last]:
        commands = block.commands
        for words, by_hand in BY_HAND.items():
            commands = commands.replace(words, by_hand)
        for words, before in BEFORE.items():
            if words in commands:
                container.run(before)
        done = container.try_to_run(SHELL + commands)
        assert done.returncode == 0, f"{commands}\n{done.stdout}"
        if block not in last and "purge" not in commands:
            answer = container.try_to_run(CHECK)
            assert '"9":{"accessible":false' in answer.stdout, f"{commands}\n{answer.stdout}"
        if "callers4" in commands:
            # A caller that is blocked; its address is one of the container's own.
            container.run("ip addr add 203.0.113.7/32 dev lo")
            asked = "curl -sS --max-time 2 --interface 203.0.113.7 localhost:9000/health"
            assert container.try_to_run(asked).returncode != 0
        if "redis-cli" in commands:
            old = "redis-cli --user checker --pass password ping 2>&1"
            assert "WRONGPASS" in container.run(old)
            assert "user=checker" in container.run("redis-cli client list")
        if "-next" in commands:
            assert container.run("curl -sS localhost:9001/health") == '{"status":"ok"}'
    assert (
        container.run(
            "find /opt /etc /usr/local -name 'golem*' ! -path '*-next*' ! -path /etc/golem"
        )
        == ""
    )


def test_the_readme_starts_a_server(container: Container) -> None:
    with_server = [
        block.commands
        for block in blocks((ROOT / "README.md").read_text())
        if "pip install" in block.commands
    ]
    assert len(with_server) == 1
    container.run(
        f"{SHELL}{with_server[0].rstrip()} > /tmp/server 2>&1 & server=$!\n"
        "until curl -sf localhost:9000/health; do kill -0 $server; sleep 0.2; done\n"
        "kill $server; wait $server || true"
    )
