"""The program as its users have it: a process, its exit status, and what is on the screen."""

import contextlib
import json
import os
import pty
import re
import resource
import select
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from port_checker import __version__
from port_checker.schemas import ErrorCode
from tests.provider.test_verify import ANSWERED_ELSEWHERE, NOT_ASKED, TO_FORWARD
from tests.support.loopback import free_ports, open_port, refused_port
from tests.support.namespace import in_namespace, needs_root, needs_setpriv
from tests.support.scripted import (
    REFUSED,
    Answer,
    accessible,
    connect,
    connected,
    refusal,
    refused,
    scripted,
    verdicts,
)
from tests.support.service import program, serve
from tests.support.waiting import wait_until

PORT_CHECKER = [sys.executable, "-m", "port_checker"]
DASH = "\N{EN DASH}"
ESCAPE = "\x1b"
COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-7]|9[0-7]|38;[0-9;]+)m")

needs_tmux = pytest.mark.skipif(
    os.environ.get("CI") != "true" and not shutil.which("tmux"),
    reason="looking at a terminal's screen needs tmux",
)


def environment(**more: str) -> dict[str, str]:
    """This environment, without what changes how terminals are written to."""
    changing = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TERM", "PYTHONIOENCODING")
    return {name: os.environ[name] for name in os.environ if name not in changing} | more


@dataclass(frozen=True)
class Done:
    """How a run of the program ended."""

    status: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """What it says on stderr, without the frame around it and its line breaks."""
        return " ".join(re.sub("[─│╭╮╰╯]", " ", self.err).split())


def run(*words: str, **more: str) -> Done:
    return run_in(environment(**more), *words)


def run_in(
    environment: Mapping[str, str], *words: str, files: tuple[int, int] | None = None
) -> Done:
    """Run the program; with ``files``, under these limits of open files."""

    def limit_files() -> None:
        if files:
            resource.setrlimit(resource.RLIMIT_NOFILE, files)

    done = subprocess.run(
        [*PORT_CHECKER, *words],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
        preexec_fn=limit_files,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return Done(done.returncode, done.stdout, done.stderr)


def check(url: str, *words: str, **more: str) -> Done:
    return run("check", "--server", url, *words, **more)


def written(ports: Sequence[int]) -> str:
    """Ports in a row, as the program is given them."""
    return f"{ports[0]}-{ports[-1]}"


def shown(ports: Sequence[int]) -> str:
    """Ports in a row, as the program shows them."""
    return f"{ports[0]}{DASH}{ports[-1]}"


# Exit status and plain lines


def test_all_reachable() -> None:
    ports = free_ports(12)
    with serve(retries=1) as client:
        done = check(str(client.base_url), str(ports[0]), written(ports[2:]))
    assert done == Done(
        0,
        f"{ports[0]}, {shown(ports[2:])}: bound; reachable.\n"
        "11 of 11 ports of 127.0.0.1 are reachable.\n",
        "",
    )


def test_all_reachable_over_ipv6_by_the_installed_program() -> None:
    (port,) = free_ports(1)
    installed = str(Path(sys.executable).with_name("port-checker"))
    with serve(host="::1", retries=1) as client:
        done = subprocess.run(
            [installed, "check", "--server", str(client.base_url), str(port)],
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.stdout == f"{port}: bound; reachable.\n1 of 1 ports of ::1 are reachable.\n"
    assert (done.returncode, done.stderr) == (0, "")


def test_a_program_has_the_port() -> None:
    with serve(retries=1) as client, open_port() as used, refused_port() as unreached:
        done = check(str(client.base_url), str(used), str(unreached))
    reached, not_reached, total = done.out.splitlines()
    assert reached == f"{used}: in use; reachable."
    assert not_reached.startswith(f"{unreached}: in use; {REFUSED}. A program on this machine")
    assert total == "1 of 2 ports of 127.0.0.1 are reachable."
    assert done.status == 1


@contextlib.contextmanager
def ten_in_trouble() -> Iterator[tuple[str, list[int], list[int]]]:
    """A server, a hundred ports, and the ten of them that it does not reach."""
    ports = free_ports(100)
    troubled = [ports[3], *ports[20:25], ports[50], ports[52], *ports[98:]]

    def check_most(asked: list[int]) -> Answer:
        connect([port for port in asked if port not in troubled])
        return verdicts({port: REFUSED if port in troubled else None for port in asked})

    with scripted(check_most) as server:
        yield server.url, ports, troubled


def test_ten_of_a_hundred_in_trouble() -> None:
    with ten_in_trouble() as (url, ports, troubled):
        done = check(url, written(ports))
    good, bad, total = done.out.splitlines()
    assert numbers_in(bad.partition(":")[0]) == troubled
    assert bad.partition(": ")[2].startswith(f"bound; {REFUSED}. {TO_FORWARD}")
    assert bad.endswith("forward it to this one.")
    assert numbers_in(good.partition(":")[0]) == sorted({*ports} - {*troubled})
    assert good.partition(": ")[2] == "bound; reachable."
    assert total == "90 of 100 ports of 127.0.0.1 are reachable."
    assert (done.status, done.err) == (1, "")


def numbers_in(text: str) -> list[int]:
    """The ports that the program names."""
    numbers: list[int] = []
    for word in text.split(","):
        first, _, last = word.strip().partition(DASH)
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def test_servers_that_disagree() -> None:
    one, other = free_ports(2)
    with (
        scripted(lambda asked: accessible(asked) if other in asked else refused(asked)) as believer,
        scripted(refused) as doubter,
    ):
        servers = f"{believer.url} {doubter.url}"
        done = run("check", str(one), str(other), PORT_CHECKER_URL=servers)
    line, total = done.out.splitlines()
    # Somebody says that it is accessible, somebody that it is not: both stand there.
    assert line.startswith(f"{one}{DASH}{other}: bound; accessible, but not here")
    assert f"{doubter.url}: {REFUSED}" in line
    assert ANSWERED_ELSEWHERE in line
    assert total == "0 of 2 ports of 127.0.0.1 are reachable."
    assert done.status == 1


def test_no_server_could_be_asked() -> None:
    (port,) = free_ports(1)
    with refused_port() as down:
        url = f"http://127.0.0.1:{down}"
        done = check(url, str(port))
    line, failure, total = done.out.splitlines()
    assert line.startswith(f"{port}: bound; not asked. {NOT_ASKED}")
    assert failure == f"{url} could not be asked: it cannot be reached: {REFUSED}."
    assert total == "0 of 1 ports of this machine are reachable."
    assert (done.status, done.err) == (3, "")


@pytest.mark.parametrize("url", ["http://[::1", "http://127.0.0.1:70000"])
def test_a_url_that_is_none_is_a_sentence(url: str) -> None:
    done = check(url, "--ip", "127.0.0.1", str(free_ports(1)[0]))
    assert done.status in (2, 3)
    assert url in done.out + done.complaint


def test_one_of_two_servers_could_not_be_asked() -> None:
    (port,) = free_ports(1)
    with refused_port() as down, serve(retries=1) as client:
        urls = f"http://127.0.0.1:{down} {client.base_url}"
        done = run("check", str(port), PORT_CHECKER_URL=urls)
    line, failure, total = done.out.splitlines()
    assert line == f"{port}: bound; reachable."
    assert failure.startswith(f"http://127.0.0.1:{down} could not be asked: ")
    assert total == "1 of 1 ports of 127.0.0.1 are reachable."
    assert done.status == 0


def test_a_server_could_not_be_asked_about_all() -> None:
    ports = free_ports(2)

    def check_one(asked: list[int]) -> Answer:
        if len(asked) > 1:
            return refusal(ErrorCode.TOO_MANY_PORTS)
        return connected(asked) if ports[0] in asked else refusal(ErrorCode.CHECK_FAILED, "Sorry.")

    with scripted(check_one) as server:
        done = check(server.url, *map(str, ports))
    assert done.out.splitlines()[2] == (
        f"{server.url} could not be asked about all of them: Sorry. (CHECK_FAILED)."
    )
    assert done.status == 1


FORBIDDEN_SCRIPT = """
import subprocess, sys
from tests.support.service import serve
with serve(retries=1) as client:
    words = ["setpriv", "--bounding-set=-net_bind_service", sys.executable, "-m", "port_checker"]
    words += ["check", "--server", str(client.base_url), "80", "81"]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
print(done.stdout, done.returncode)
"""


@needs_root
@needs_setpriv
def test_ports_that_one_may_not_listen_on() -> None:
    line, _, status = in_namespace(FORBIDDEN_SCRIPT).splitlines()
    assert line.startswith(f"80{DASH}81: not permitted; not asked. You may not listen on it")
    assert status.strip() == "1"  # the server is there; it is the ports that are not reachable


@pytest.mark.parametrize("seen_by", ["a pipe", "a terminal"])
def test_an_interrupt_ends_it_quietly(seen_by: str) -> None:
    asked, done = threading.Event(), threading.Event()

    def never(_: list[int]) -> Answer:
        asked.set()
        done.wait(30)
        return Answer(b"")

    (port,) = free_ports(1)
    with scripted(never) as server, contextlib.ExitStack() as stack:
        stack.callback(done.set)
        words = [*PORT_CHECKER, "check", "--server", server.url, str(port)]
        read: Callable[[], bytes]
        if seen_by == "a pipe":
            process = stack.enter_context(
                subprocess.Popen(
                    words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
                )
            )
            stack.callback(process.kill)
            assert process.stdout
            read = process.stdout.read
        else:
            process, read = stack.enter_context(on_terminal(words))
        assert asked.wait(30)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        output = read().decode()
    assert "Traceback" not in output
    assert "reachable" not in output
    assert "Ports" not in output
    if seen_by == "a pipe":
        assert output == ""
    else:
        assert output.rfind(f"{ESCAPE}[?25h") > output.rfind(f"{ESCAPE}[?25l")  # the cursor is back


def test_more_ports_than_it_may_open_files() -> None:
    ports = free_ports(1000)
    with scripted(connected) as server:
        words = ["check", "--server", server.url, written(ports)]
        done = run_in(environment(), *words, files=(256, 256))
    assert done.out == (
        f"{shown(ports)}: bound; reachable.\n1000 of 1000 ports of 127.0.0.1 are reachable.\n"
    )
    assert (done.status, done.err) == (0, "")
    assert [port for asked in server.asked for port in asked] == ports
    assert len(server.asked) > 3


def test_it_raises_its_limit_of_open_files() -> None:
    ports = free_ports(300)
    with scripted(connected) as server:
        words = ["check", "--server", server.url, written(ports)]
        done = run_in(environment(), *words, files=(64, 512))
    assert done.status == 0
    assert server.asked == [ports]


# What it is given


def test_several_servers_from_the_environment() -> None:
    (port,) = free_ports(1)
    with scripted() as one, scripted() as other:
        done = run("check", str(port), PORT_CHECKER_URL=f"{one.url} {other.url}")
    assert done.status == 0
    assert one.asked == other.asked == [[port]]


def test_a_server_that_is_named_counts_instead_of_the_environments() -> None:
    (port,) = free_ports(1)
    with scripted() as one, scripted() as other, scripted() as third:
        words = ["--server", one.url, "--server", other.url, str(port)]
        done = run("check", *words, PORT_CHECKER_URL=third.url)
    assert done.status == 0
    assert one.asked == other.asked == [[port]]
    assert third.asked == []


def test_the_services_settings_do_not_concern_it() -> None:
    (port,) = free_ports(1)
    with scripted() as server:
        assert check(server.url, str(port), PORT_CHECK_TIMEOUT="nan").status == 0


def test_it_goes_through_no_proxy() -> None:
    # The server would see, and check, the proxy's address.
    (port,) = free_ports(1)
    with scripted() as server, refused_port() as down:
        proxy = f"http://127.0.0.1:{down}"
        done = check(server.url, str(port), HTTP_PROXY=proxy, http_proxy=proxy, ALL_PROXY=proxy)
    assert done.status == 0


def test_the_address_that_is_given() -> None:
    (port,) = free_ports(1)
    with scripted(ip=Answer(b"", 404)) as server:
        done = check(server.url, "--ip", "127.0.0.5", str(port))
    assert server.addresses == ["127.0.0.5"]
    assert done.out.endswith("1 of 1 ports of 127.0.0.5 are reachable.\n")


def test_without_ports_it_checks_those_of_a_provider() -> None:
    # No server is there: nothing depends on whether this machine uses one of them.
    with refused_port() as down:
        done = check(f"http://127.0.0.1:{down}", "--json")
    assert [port["port"] for port in json.loads(done.out)["ports"]] == [*range(50800, 50900)]
    assert done.status == 3


@pytest.mark.parametrize("dash", ["-", DASH])
def test_ports_and_ranges_in_any_order(dash: str) -> None:
    ports = free_ports(10)
    words = [f"{ports[4]}{dash}{ports[9]}", str(ports[0]), f"{ports[3]}{dash}{ports[6]}"]
    with scripted() as server:
        done = check(server.url, *words)
    assert server.asked == [[*ports[4:], ports[0], ports[3]]]
    assert done.out.splitlines()[0] == f"{ports[0]}, {shown(ports[3:])}: bound; reachable."


WRONG = {
    "text": ["--server", "http://127.0.0.1:1", "ssh"],
    "zero": ["--server", "http://127.0.0.1:1", "0"],
    "too high at the end": ["--server", "http://127.0.0.1:1", "65000-65536"],
    "reversed": ["--server", "http://127.0.0.1:1", "50899-50800"],
    "no server": ["50800"],
    "no scheme": ["--server", "127.0.0.1:9000", "50800"],
    "a name for an address": ["--server", "http://127.0.0.1:1", "--ip", "localhost", "50800"],
    "an unknown option": ["--servers", "http://127.0.0.1:1", "50800"],
}


@pytest.fixture(scope="module")
def complaints() -> Mapping[str, Done]:
    """What the program says of each wrong use; run a few at a time."""
    with ThreadPoolExecutor(4) as pool:
        done = pool.map(lambda words: run("check", *words), WRONG.values())
        return dict(zip(WRONG, done, strict=True))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("text", "Invalid value for PORTS: 'ssh' is neither a port (1-65535) nor a range"),
        ("zero", "'0' is neither a port (1-65535) nor a range such as 50800-50899."),
        ("too high at the end", "'65000-65536' is neither a port"),
        ("reversed", "'50899-50800' is neither a port"),
        ("no server", "Invalid value for --server: name one, or set PORT_CHECKER_URL."),
        ("no scheme", "'127.0.0.1:9000' must begin with http:// or https://."),
        ("a name for an address", "Invalid value for --ip: 'localhost' is not an IP address."),
        ("an unknown option", "No such option"),
    ],
)
def test_wrong_use_is_a_sentence(complaints: Mapping[str, Done], what: str, said: str) -> None:
    done = complaints[what]
    assert said in done.complaint
    assert (done.status, done.out) == (2, "")
    assert ESCAPE not in done.err


# JSON


def document(done: Done) -> Any:
    """What was printed as one JSON document, with nothing besides."""
    assert done.err == ""
    told = json.loads(done.out)
    assert {"ip", "servers", "ports", "reachable", "total"} <= told.keys()
    for server in told["servers"]:
        assert {"url", "asked", "error"} <= server.keys()
    for port in told["ports"]:
        assert {"port", "local", "reachable", "confirmed", "error", "advice"} <= port.keys()
    return told


def test_a_json_document() -> None:
    (port,) = free_ports(1)
    with serve(retries=1) as client, refused_port() as busy:
        url = str(client.base_url)
        done = check(url, "--json", str(port), str(busy))
    told = document(done)
    assert told["ip"] == "127.0.0.1"
    assert told["servers"] == [{"url": url, "asked": True, "error": None}]
    good, bad = told["ports"]
    assert (good["port"], good["local"]) == (port, "bound")
    assert (good["reachable"], good["confirmed"]) == (True, True)
    assert (good["error"], good["advice"]) == (None, None)
    assert (bad["port"], bad["local"]) == (busy, "in use")
    assert (bad["reachable"], bad["confirmed"], bad["error"]) == (False, None, REFUSED)
    assert bad["advice"]
    assert (told["reachable"], told["total"]) == (1, 2)
    assert done.status == 1


def test_a_json_document_when_no_server_could_be_asked() -> None:
    with refused_port() as down:
        done = check(f"http://127.0.0.1:{down}", "--json", str(free_ports(1)[0]))
    told = document(done)
    assert (told["ip"], told["reachable"], told["total"]) == (None, 0, 1)
    assert told["servers"][0]["error"] == f"it cannot be reached: {REFUSED}"
    assert done.status == 3


def test_a_json_document_on_a_terminal_is_only_that() -> None:
    (port,) = free_ports(1)
    with (
        scripted() as server,
        on_terminal([*PORT_CHECKER, "check", "--server", server.url, "--json", str(port)]) as (
            process,
            read,
        ),
    ):
        output = read().decode()
        assert process.wait(30) == 0
    assert json.loads(output)["reachable"] == 1


# What a server must not do to the reader


@pytest.mark.parametrize("where", ["message", "verdict"])
def test_no_escape_code_of_a_server_reaches_the_reader(where: str) -> None:
    nasty = "\x1b[2J\x1b]0;title\x07\x9b31mGo away"
    answers: dict[str, Callable[[list[int]], Answer]] = {
        "message": lambda _: refusal(ErrorCode.CHECK_FAILED, nasty),
        "verdict": lambda ports: verdicts(dict.fromkeys(ports, nasty)),
    }
    words = ["check", "--server"]
    with scripted(answers[where]) as server:
        done = run(*words, server.url, str(free_ports(1)[0]))
        line = [*PORT_CHECKER, *words, server.url, str(free_ports(1)[0])]
        with on_terminal(line) as (_, read):
            screen = read().decode()
    for text in (done.out, screen):
        assert "Go away" in text
        for code in ("\x1b[2J", "\x1b]0", "\x07", "\x9b"):
            assert code not in text


def test_markup_and_emoji_codes_are_only_text() -> None:
    message = "[red]Wait[/red] :warning: [link=http://127.0.0.1]here"
    with scripted(lambda _: refusal(ErrorCode.CHECK_FAILED, message)) as server:
        done = check(server.url, "--ip", "2001:db8:1:a::7", str(free_ports(1)[0]))
    assert f"{message} (CHECK_FAILED)." in done.out
    assert "0 of 1 ports of 2001:db8:1:a::7 are reachable." in done.out


def test_an_encoding_without_dashes_is_no_failure() -> None:
    ports = free_ports(2)
    with scripted() as server:
        done = check(server.url, *map(str, ports), PYTHONIOENCODING="latin-1")
    assert done.status == 0
    assert str(ports[1]) in done.out


# Terminals


@contextlib.contextmanager
def on_terminal(
    words: Sequence[str], **more: str
) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], bytes]]]:
    """Run a program on a terminal of its own; yield it, and what reads all that it writes."""
    ours, its = pty.openpty()
    more = {"TERM": "xterm-256color", "COLUMNS": "120", **more}
    process = subprocess.Popen(words, stdin=its, stdout=its, stderr=its, env=environment(**more))
    os.close(its)

    def read() -> bytes:
        output = b""
        with contextlib.suppress(OSError):  # EIO: nobody has the other end any more
            while select.select([ours], [], [], 30)[0] and (some := os.read(ours, 65536)):
                output += some
        return output

    try:
        yield process, read
    finally:
        process.kill()
        process.wait()
        os.close(ours)


@pytest.mark.parametrize("no_color", [{}, {"NO_COLOR": "1"}], ids=["colour", "no colour"])
def test_colours_on_a_terminal(no_color: dict[str, str]) -> None:
    ports = free_ports(2)

    def check_the_first(asked: list[int]) -> Answer:
        connect(asked[:1])
        return verdicts({asked[0]: None, asked[1]: REFUSED})

    with (
        scripted(check_the_first) as server,
        on_terminal(
            [*PORT_CHECKER, "check", "--server", server.url, written(ports)], **no_color
        ) as (process, read),
    ):
        output = read().decode()
        assert process.wait(30) == 1
    assert REFUSED in output
    assert "What to do" in output
    if no_color:
        assert not COLOUR.search(output)
    else:
        assert f"{ESCAPE}[31m{REFUSED}" in output
        assert f"{ESCAPE}[32mreachable" in output


class Screen:
    """A terminal with a program on it."""

    def __init__(self, socket: Path, width: int) -> None:
        self._tmux = ["tmux", "-u", "-f", "/dev/null", "-S", str(socket)]
        self._width = width

    def start(self, words: Sequence[str]) -> None:
        # The shell outlives an interrupt from the keyboard, to tell how the program ended.
        line = f"trap : INT; {shlex.join(words)}; echo status=$?; read wait"
        size = ["-x", str(self._width), "-y", "40"]
        self._run("new-session", "-d", *size, "sh", "-c", line)

    def lines(self) -> list[str]:
        """What stands there now."""
        return self._run("capture-pane", "-p", "-t", "0").splitlines()

    def wait_for(self, text: str) -> list[str]:
        wait_until(lambda: any(text in line for line in self.lines()))
        return self.lines()

    def press(self, key: str) -> None:
        self._run("send-keys", "-t", "0", key)

    def close(self) -> None:
        self._run("kill-server")

    def _run(self, *words: str) -> str:
        done = subprocess.run(
            [*self._tmux, *words],
            env=environment(TERM="xterm-256color"),
            capture_output=True,
            encoding="utf-8",
            timeout=30,
            check=True,
        )
        return done.stdout


@contextlib.contextmanager
def on_screen(directory: Path, *words: str, width: int = 120) -> Iterator[Screen]:
    screen = Screen(directory / "tmux", width)
    screen.start([*PORT_CHECKER, *words])
    try:
        yield screen
    finally:
        screen.close()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]


def rows(lines: Sequence[str]) -> list[list[str]]:
    """The rows of a table; cells of more lines put together."""
    table: list[list[str]] = []
    for line in lines:
        if not (here := cells(line)):
            continue
        if here[1] or not table:  # the local binding is one line: a new row
            table.append(here)
        else:
            table[-1] = [" ".join(filter(None, both)) for both in zip(table[-1], here, strict=True)]
    return table


@needs_tmux
@pytest.mark.parametrize("width", [120, 80])
def test_the_table_on_a_terminal(tmp_path: Path, width: int) -> None:
    with (
        ten_in_trouble() as (url, ports, troubled),
        on_screen(tmp_path, "check", "--server", url, written(ports), width=width) as screen,
    ):
        lines = screen.wait_for("status=")
    header, good, bad = rows(lines)
    assert header == ["Ports", "Local binding", "From outside", "What to do"]
    assert good[1:] == ["bound", "reachable", ""]
    assert bad[1:3] == ["bound", REFUSED]
    assert bad[3].startswith(TO_FORWARD)
    assert bad[3].endswith("forward it to this one.")
    assert numbers_in(bad[0]) == troubled
    assert shown(troubled[1:6]) in bad[0]
    assert numbers_in(good[0]) == sorted({*ports} - {*troubled})
    *_, total, status = (line for line in lines if line)
    assert total == "90 of 100 ports of 127.0.0.1 are reachable."
    assert status == "status=1"
    assert lines[0].startswith("┏")  # what was shown while it waited is gone


@needs_tmux
def test_what_it_waits_for_is_on_the_terminal(tmp_path: Path) -> None:
    done = threading.Event()
    ports = free_ports(100)

    def check_later(asked: list[int]) -> Answer:
        done.wait(30)
        return connected(asked)

    with (
        scripted(check_later) as server,
        on_screen(tmp_path, "check", "--server", server.url, written(ports)) as screen,
    ):
        try:
            screen.wait_for(f"{server.url} is checking 100 ports")
        finally:
            done.set()
        lines = screen.wait_for("status=0")
    assert "100 of 100 ports of 127.0.0.1 are reachable." in lines
    assert not any("is checking" in line for line in lines)
    _, row = rows(lines)
    assert row == [shown(ports), "bound", "reachable", ""]


@needs_tmux
def test_an_interrupt_from_the_keyboard(tmp_path: Path) -> None:
    done = threading.Event()

    def never(_: list[int]) -> Answer:
        done.wait(30)
        return Answer(b"")

    with (
        scripted(never) as server,
        on_screen(tmp_path, "check", "--server", server.url, str(free_ports(1)[0])) as screen,
    ):
        try:
            screen.wait_for("is checking 1 ports")
            screen.press("C-c")
            lines = screen.wait_for("status=")
        finally:
            done.set()
    assert [line for line in lines if line.strip("^C")] == ["status=130"]


# The rest of the program


def test_help_and_version() -> None:
    words = [["--help"], ["-h"], ["check", "--help"], ["serve", "--help"], ["--version"]]
    with ThreadPoolExecutor(4) as pool:
        overview, short, of_check, of_serve, version = pool.map(lambda some: run(*some), words)
    for done in (overview, short, of_check, of_serve, version):
        assert (done.status, done.err) == (0, "")
        assert ESCAPE not in done.out
    assert overview.out == short.out
    for command in ("serve", "check", "--version"):
        assert command in overview.out
    for option in ("--server", "--ip", "--json", "PORT_CHECKER_URL", "50800-50899", "[PORTS]"):
        assert option.lower() in of_check.out.lower()
    assert "Exit status: 0 all ports are reachable" in of_check.out
    assert "Start the server" in of_serve.out
    assert version.out == f"port-checker {__version__}\n"


@pytest.mark.parametrize("words", [[], ["serve"]], ids=["no words", "serve"])
def test_it_starts_the_server(words: list[str]) -> None:
    with program(*PORT_CHECKER, *words) as running, running.client() as client:
        assert client.get("/ip").json() == {"ip": "127.0.0.1"}
        assert running.stop() == 0


@pytest.mark.parametrize("words", [[], ["serve"]], ids=["no words", "serve"])
def test_a_wrong_setting_is_one_line(words: list[str]) -> None:
    done = run(*words, PORT_CHECKER_PORT="x")
    assert done.status == 2
    assert done.err == (
        "port-checker: PORT_CHECKER_PORT='x' is wrong: it must be a port to listen on, "
        "from 1 to 65535\n"
    )


def test_an_unknown_command() -> None:
    done = run("chekc")
    assert "No such command 'chekc'." in done.complaint
    assert done.status == 2
