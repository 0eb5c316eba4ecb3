"""The program as its users have it: a process, its exit status, and what is on the screen."""

import contextlib
import gzip
import json
import os
import pty
import resource
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

from port_checker import __version__, advice
from port_checker.schemas import ErrorCode
from tests.support.cli import Done, invoke
from tests.support.hostile_tls import showing_in_tls_1_3, slow_certificate
from tests.support.loopback import free_port, free_ports, refused_port
from tests.support.namespace import ROOT
from tests.support.scripted import (
    REFUSED,
    Answer,
    accessible,
    connect,
    connected,
    raw_server,
    refusal,
    refused,
    scripted,
    verdicts,
)
from tests.support.seccomp import refuse
from tests.support.service import serve
from tests.support.tls import endpoint
from tests.support.waiting import wait_until

PORT_CHECKER = [sys.executable, "-m", "port_checker"]
DASH = "\N{EN DASH}"
SERVER = f"BaseHTTP/0.6 Python/{sys.version.split()[0]}"
ESCAPE = "\x1b"

needs_tmux = pytest.mark.skipif(
    os.environ.get("CI") != "true" and not shutil.which("tmux"),
    reason="looking at a terminal's screen needs tmux",
)


def environment(**more: str) -> dict[str, str]:
    """This environment, without what changes how terminals are written to."""
    changing = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TERM", "PYTHONIOENCODING")
    return {name: os.environ[name] for name in os.environ if name not in changing} | more


def prepare(before: Callable[[], None] = lambda: None) -> None:
    """Restore SIGINT, which a shell may have had its background jobs ignore; set a limit."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    before()


def run(*words: str, before: Callable[[], None] = lambda: None, **more: str) -> Done:
    done = subprocess.run(
        [*PORT_CHECKER, *words],
        env=environment(**more),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
        preexec_fn=lambda: prepare(before),
    )
    assert "Traceback" not in done.stderr, done.stderr
    return Done(done.returncode, done.stdout, done.stderr)


def check(url: str, *words: str, **more: str) -> Done:
    return invoke("check", "--server", url, *words, **more)


def written(ports: Sequence[int]) -> str:
    """Ports in a row, as the program is given them and shows them."""
    return f"{ports[0]}-{ports[-1]}"


BROKEN = Answer(b"", 500)
BROKEN_SAYS = "unexpected answer, HTTP status 500 (Internal Server Error)"


# Exit status and plain lines


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_all_reachable(host: str) -> None:
    ports = free_ports(12)
    with serve(host=host, retries=1) as client:
        url = str(client.base_url)
        done = run("check", "--server", url, str(ports[0]), written(ports[2:]))
    assert done == Done(
        0,
        f"{ports[0]}, {written(ports[2:])}: bound; reachable.\n"
        f"{advice.SERVER_HERE.format(url=client.base_url)}\n"
        f"11 of 11 ports of {host} are reachable over IPv{6 if ':' in host else 4}.\n",
        "",
    )


def test_some_not_reachable_and_one_server_of_two_down() -> None:
    one, other = free_ports(2)

    def check_the_first(_: list[int]) -> Answer:
        connect([one])
        return verdicts({one: None, other: REFUSED})

    with scripted(lambda _: BROKEN) as broken, scripted(check_the_first) as server:
        urls = f"{broken.url} {server.url}"
        done = invoke("check", str(one), str(other), PORT_CHECKER_URL=urls)
    assert done.out.splitlines() == [
        f"{other}: bound; {REFUSED}. {advice.NETWORK_FIREWALL}",
        f"{one}: bound; reachable.",
        f"{broken.url}: {BROKEN_SAYS} from {SERVER}: is this a port checker?",
        advice.SERVER_HERE.format(url=broken.url),
        advice.SERVER_HERE.format(url=server.url),
        "1 of 2 ports of 127.0.0.1 are reachable over IPv4.",
    ]
    assert (done.status, done.err) == (1, "")


def test_no_server_could_check() -> None:
    with scripted(ip=BROKEN) as server:
        done = check(server.url, "--json")
    report = json.loads(done.out)
    assert (report["ip"], report["reachable"], report["total"]) == (None, 0, 101)
    assert [port["port"] for port in report["ports"]] == [7466, *range(50800, 50900)]  # the default
    assert (done.status, done.err) == (3, "")


def test_a_json_document() -> None:
    port = free_port()
    with serve(retries=1) as client, refused_port() as busy:
        url = str(client.base_url)
        done = check(url, "--json", str(port), str(busy))
    assert json.loads(done.out) == {
        "ip": "127.0.0.1",
        "servers": [{"url": url, "asked": True, "error": None, "ip": "127.0.0.1"}],
        "ports": [
            {
                "port": port,
                "local": "bound",
                "reachable": True,
                "confirmed": True,
                "error": None,
                "advice": None,
                "answers": {url: {"accessible": True, "error": None}},
                "inner": port,
                "arrives_at": None,
                "places": {},
            },
            {
                "port": busy,
                "local": "in use",
                "reachable": False,
                "confirmed": None,
                "error": REFUSED,
                "advice": advice.IN_USE_NOT_LISTENING,
                "answers": {url: {"accessible": False, "error": REFUSED}},
                "inner": busy,
                "arrives_at": None,
                "places": {},
            },
        ],
        "notes": [advice.SERVER_HERE.format(url=url)],
        "family": 4,
        "tls": [],
        "reachable": 1,
        "total": 2,
    }
    assert (done.status, done.err) == (1, "")


def test_it_raises_its_limit_of_open_files_and_does_with_what_there_is() -> None:
    ports = free_ports(500)
    limit = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (64, 256))
    with scripted(connected) as server:
        done = run("check", "--server", server.url, written(ports), before=limit)
    assert done.out.startswith(f"{written(ports)}: bound; reachable.\n")
    assert (done.status, done.err) == (0, "")
    assert sorted(port for asked in server.asked for port in asked) == ports
    assert 3 < len(server.asked) < 25


# What it is given


def test_servers_that_are_named_count_instead_of_the_environments() -> None:
    port = free_port()
    with scripted() as one, scripted() as other, scripted() as third:
        words = ["--server", one.url, "--server", other.url, str(port)]
        done = invoke("check", *words, PORT_CHECKER_URL=third.url)
    assert done.status == 0
    assert one.asked == other.asked == [[port]]
    assert third.asked == []


def test_neither_a_proxy_nor_the_services_settings_concern_it() -> None:
    # Through a proxy, the server would see and check the proxy's address.
    with scripted() as server, refused_port() as down:
        proxy = f"http://127.0.0.1:{down}"
        proxies = {"HTTP_PROXY": proxy, "http_proxy": proxy, "ALL_PROXY": proxy}
        done = check(server.url, str(free_port()), PORT_CHECK_TIMEOUT="nan", **proxies)
    assert done.status == 0


def test_the_address_that_is_given() -> None:
    with scripted(ip=Answer(b"", 404)) as server:
        done = check(server.url, "--ip", "127.0.0.5", str(free_port()))
    assert server.addresses == ["127.0.0.5"]
    assert done.out.endswith("1 of 1 port of 127.0.0.5 is reachable over IPv4.\n")


def test_ports_and_ranges_in_any_order() -> None:
    ports = free_ports(10)
    words = [f"{ports[4]}{DASH}{ports[9]}", str(ports[0]), f"{ports[3]}-{ports[6]}"]
    with scripted() as server:
        done = check(server.url, *words)
    assert server.asked == [[ports[0], *ports[3:]]]
    assert done.out.splitlines()[0] == f"{ports[0]}, {written(ports[3:])}: bound; reachable."


WRONG = {
    "Invalid value for PORTS: 'ssh' is neither a port (1-65535) nor a range": ["ssh"],
    "'0' is neither a port (1-65535) nor a range such as 50800-50899, nor two": ["0"],
    "'65000-65536' is neither a port": ["65000-65536"],
    "'50899-50800' is neither a port": ["50899-50800"],
    "Invalid value for --server: give one, or set PORT_CHECKER_URL.": None,
    "'127.0.0.1:9000' must start with http:// or https://.": ["--server", "127.0.0.1:9000"],
    "'http://' is not a valid server URL.": ["--server", "http://"],
    "'http://h:99999' is not a valid server URL.": ["--server", "http://me:secret@h:99999"],
    "'http://a,http://b' is not a valid server URL.": ["--server", "http://a,http://b"],
    "Invalid value for --ip: '' is not an IP address.": ["--ip", ""],
    "Invalid value for --ip: ::1 is an IPv6 address.": ["--ip", "::1", "-4"],
    "'1-2:3-5' is neither a port": ["1-2:3-5"],
    "Invalid value for PORTS: two ports cannot lead to port 3 of this": ["1:3", "2:3"],
    "Invalid value for PORTS: port 1 cannot lead to two ports of this": ["1:2", "1:3"],
    "Invalid value for --ip: 'localhost' is not an IP address.": ["--ip", "localhost", "50800"],
    "No such option": ["--servers", "http://127.0.0.1:1", "50800"],
}


@pytest.mark.parametrize("said", WRONG)
def test_wrong_use_is_a_sentence(said: str) -> None:
    words = WRONG[said]
    server = [] if words is None else ["--server", "http://127.0.0.1:1"]
    done = invoke("check", *server, *(words or ["50800"]))
    assert said in done.complaint
    assert (done.status, done.out) == (2, "")
    assert ESCAPE not in done.err
    assert "secret" not in done.err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--every", "59"], "Invalid value for '--every': 59 is not in the range"),
        (["--every", "nan"], "Invalid value for '--every': 'nan' is not a valid int"),
        (["--every", "9" * 30], "is not in the range 60<=x<=31536000."),
        (["--on-change", "it's"], "Invalid value for --on-change: No closing quotation."),
    ],
)
def test_wrong_use_of_watch_is_a_sentence(words: list[str], expected: str) -> None:
    done = invoke("watch", "--server", "http://127.0.0.1:1", "50800", *words)
    assert expected in done.complaint
    assert (done.status, done.out) == (2, "")


def test_what_is_printed_can_be_pasted_back() -> None:
    ports = free_ports(10)
    words = [str(ports[0]), written(ports[2:4]), f"{ports[8]}-{ports[9]}:{ports[5]}-{ports[6]}"]

    def connect_inside(asked: list[int]) -> Answer:
        connect([ports[0], *ports[2:4], *ports[5:7]])
        return accessible(asked)

    with scripted(connect_inside) as server:
        done = check(server.url, *words)
        printed, _, _ = done.out.partition(": bound; reachable.")
        again = check(server.url, printed)
        as_words = check(server.url, *printed.split())
    assert printed == ", ".join(words)
    assert done.out == again.out == as_words.out
    assert server.asked == [[ports[0], *ports[2:4], *ports[8:]]] * 3


def test_both_families_one_after_the_other() -> None:
    port = free_port()
    with serve(host="::", retries=1) as client:
        urls = [f"http://{host}:{client.base_url.port}" for host in ("127.0.0.1", "[::1]")]
        words = ["check", "--server", urls[0], "--server", urls[1], "-4", "-6", str(port)]
        done, as_json = invoke(*words), invoke(*words, "--json")
    assert [line for line in done.out.splitlines() if line.startswith("1 of 1")] == [
        "1 of 1 port of 127.0.0.1 is reachable over IPv4.",
        "1 of 1 port of ::1 is reachable over IPv6.",
    ]
    assert f"{urls[1]}: has no IPv4 address." in done.out
    assert f"{urls[0]}: has no IPv6 address." in done.out
    assert [report["family"] for report in json.loads(as_json.out)] == [4, 6]
    assert done.status == as_json.status == 0


def in_a_shell(redirection: str, *words: str) -> Done:
    """Have an open port checked, with the streams redirected."""
    with scripted() as server:
        command = [*PORT_CHECKER, *words, "--server", server.url, str(free_port())]
        done = subprocess.run(
            ["sh", "-c", f"{shlex.join(command)} {redirection}"],
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize(
    ("words", "redirection", "why"),
    [
        ([], ">/dev/full", "No space left on device"),
        (["--json"], ">&-", "Bad file descriptor"),
    ],
)
def test_output_that_cannot_be_written_is_a_sentence(
    words: list[str], redirection: str, why: str
) -> None:
    done = in_a_shell(redirection, "check", *words)
    assert done == Done(1, "", f"port-checker: cannot write the report: {why}\n")


def test_watching_needs_an_output() -> None:
    done = in_a_shell(">&-", "watch")
    assert done == Done(3, "", "port-checker: cannot go on: Bad file descriptor\n")


@pytest.mark.parametrize("words", [[], ["--json"]], ids=["lines", "JSON"])
def test_a_reader_that_has_left_changes_nothing(words: list[str]) -> None:
    theirs, ours = os.pipe()
    os.close(theirs)
    with scripted() as server:
        done = subprocess.run(
            [*PORT_CHECKER, "check", "--server", server.url, str(free_port()), *words],
            env=environment(),
            stdout=ours,
            stderr=subprocess.PIPE,
            check=False,
        )
    os.close(ours)
    assert (done.returncode, done.stderr) == (0, b"")


def test_streams_that_are_closed_are_not_needed() -> None:
    done = in_a_shell("<&- 2>&-", "check")
    assert done.status == 0
    assert "1 of 1 port" in done.out


@pytest.mark.parametrize(
    ("limit", "why"),
    [
        (
            partial(resource.setrlimit, resource.RLIMIT_NOFILE, (5, 5)),
            "this process may open only 5 files, and needs 24: raise that limit (ulimit -n)",
        ),
        (
            partial(refuse, "clone", "clone3"),
            "no more threads may be started: raise that limit (ulimit -u, or a container's)",
        ),
    ],
    ids=["files", "threads"],
)
def test_what_there_is_too_little_of_is_a_sentence(limit: Callable[[], None], why: str) -> None:
    done = run("check", "--server", "http://127.0.0.1:1", str(free_port()), before=limit)
    assert done == Done(3, "", f"port-checker: cannot check anything: {why}\n")


# Terminals


class Screen:
    """A terminal with the program on it; real, in tmux."""

    def __init__(self, socket: Path) -> None:
        self._tmux = ["tmux", "-u", "-f", "/dev/null", "-S", str(socket)]

    def start(self, words: Sequence[str]) -> None:
        # The shell outlives an interrupt from the keyboard, to tell how the program ended.
        line = f"trap : INT; {shlex.join(words)}; echo status=$?; read wait"
        self._run("new-session", "-d", "-x", "120", "-y", "40", "sh", "-c", line)

    def wait_for(self, text: str) -> list[str]:
        wait_until(lambda: any(text in line for line in self.lines()))
        return self.lines()

    def lines(self) -> list[str]:
        """What stands there now."""
        return self._run("capture-pane", "-p", "-t", "0").splitlines()

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
            timeout=60,
            check=True,
            preexec_fn=prepare,
        )
        return done.stdout


@contextlib.contextmanager
def on_screen(directory: Path, *words: str) -> Iterator[Screen]:
    screen = Screen(directory / "tmux")
    screen.start([*PORT_CHECKER, *words])
    try:
        yield screen
    finally:
        screen.close()


@needs_tmux
def test_what_it_waits_for_and_success_on_a_terminal(tmp_path: Path) -> None:
    done = threading.Event()
    ports = free_ports(100)

    def check_later(asked: list[int]) -> Answer:
        done.wait(60)
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
    # What was shown while it waited is gone, and success is one line.
    assert lines[0].startswith(f"{server.url} runs on this machine")
    assert "100 of 100 ports of 127.0.0.1 are reachable over IPv4." in lines
    assert not any("bound" in line for line in lines)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["http://h:1"], "did you mean to put --server before it?"),
        (["--url", "http://h"], "did you mean --server?"),
        (["--ports", "80"], "did you mean ports without an option?"),
    ],
)
def test_what_was_meant(words: list[str], expected: str) -> None:
    done = invoke("check", *words)
    assert done.status == 2
    assert expected in done.complaint


def test_ports_that_may_be_meant_otherwise_make_a_note() -> None:
    ports = free_ports(1)
    with scripted(refused) as server:
        done = check(server.url, "50810:50899")
        assert "If you mean the ports from 50810 to 50899, write 50810-50899." in done.out
        done = check(server.url, f"{ports[0]}")
        assert "If you mean" not in done.out


def test_watching_tells_how_things_are_and_ends_with_the_last_status(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    changes = tmp_path / "changes"
    command = f"sh -c 'cat > {changes}.new && mv {changes}.new {changes}'"
    with scripted(refused) as server:
        words = ["watch", str(port), "--server", server.url, "--on-change", command]
        process = subprocess.Popen([*PORT_CHECKER, *words], stdout=subprocess.PIPE, text=True)
        with process:
            assert process.stdout
            first = process.stdout.readline()
            second = process.stdout.readline()
            wait_until(changes.exists, "the command")
            process.terminate()
            assert process.wait(60) == 1
    assert first.endswith("0 of 1 ports of 127.0.0.1 are reachable over IPv4\n")
    assert f" {port}: not reachable: Connection refused. " in second
    assert json.loads(changes.read_text())["reachable"] == 0


def test_watching_goes_on_where_nobody_can_read_that_the_command_failed(tmp_path: Path) -> None:
    command = f"sh -c 'touch {tmp_path}/ran; exit 1'"
    with scripted() as server, Path("/dev/full").open("w") as full:
        words = ["watch", str(free_port()), "--server", server.url, "--on-change", command]
        process = subprocess.Popen([*PORT_CHECKER, *words], stdout=subprocess.DEVNULL, stderr=full)
        with process:
            wait_until((tmp_path / "ran").exists, "the command")
            process.terminate()
            assert process.wait(60) == 0


def never_answering(asked: threading.Event, done: threading.Event) -> Callable[..., Answer]:
    def never(_: list[int]) -> Answer:
        asked.set()
        done.wait(60)
        return Answer(b"")

    return never


@needs_tmux
def test_an_interrupt_from_the_keyboard(tmp_path: Path) -> None:
    asked, done = threading.Event(), threading.Event()
    with (
        scripted(never_answering(asked, done)) as server,
        on_screen(tmp_path, "check", "--server", server.url, str(free_port())) as screen,
    ):
        try:
            screen.wait_for("is checking 1 port")
            screen.press("C-c")
            lines = screen.wait_for("status=")
        finally:
            done.set()
    assert [line for line in lines if line.strip("^C")] == ["status=130"]


def test_an_interrupt_ends_it_quietly() -> None:
    asked, done = threading.Event(), threading.Event()
    with (
        scripted(never_answering(asked, done)) as server,
        subprocess.Popen(
            [*PORT_CHECKER, "check", "--server", server.url, str(free_port())],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=prepare,
        ) as process,
    ):
        try:
            assert asked.wait(60)
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=60)
        finally:
            done.set()
            process.kill()
    assert (process.returncode, output) == (130, b"")


@pytest.mark.parametrize(
    ("command", "number"), [("check", signal.SIGTERM), ("watch", signal.SIGINT)]
)
def test_a_signal_ends_it_while_it_reads_certificates_that_take_minutes(
    command: str, number: int
) -> None:
    shown = threading.Event()
    show = showing_in_tls_1_3([slow_certificate(serial) for serial in range(1, 261)])

    def behave(connection: socket.socket) -> None:
        connection.recv(1, socket.MSG_PEEK)
        shown.set()
        show(connection)

    with (
        endpoint(behave) as port,
        subprocess.Popen(
            [*PORT_CHECKER, command, "--server", f"https://localhost:{port}", str(free_port())],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=prepare,
        ) as process,
    ):
        try:
            assert shown.wait(60)
            busy = _cpu_seconds(process.pid) + 0.2
            wait_until(lambda: _cpu_seconds(process.pid) > busy, "the program to be busy with them")
            process.send_signal(number)
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, output) == (128 + number, b"")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_that_ends_it_leaves_the_terminal_its_cursor(number: int) -> None:
    asked, done = threading.Event(), threading.Event()
    ours, its = pty.openpty()
    with (
        scripted(never_answering(asked, done)) as server,
        subprocess.Popen(
            [*PORT_CHECKER, "check", "--server", server.url, str(free_port())],
            stdin=its,
            stdout=its,
            stderr=its,
            env=environment(TERM="xterm-256color"),
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)),
        ) as process,
    ):
        os.close(its)
        try:
            assert asked.wait(60)
            process.send_signal(number)
            output = _read_all(ours)
        finally:
            done.set()
            process.kill()
    assert process.returncode == -number
    assert b"\x1b[?25l" in output
    assert output.rindex(b"\x1b[?25h") > output.rindex(b"\x1b[?25l")


def _read_all(terminal: int) -> bytes:
    output = b""
    with contextlib.suppress(OSError):  # EIO: nobody has the other end any more
        poll = select.poll()
        poll.register(terminal, select.POLLIN)
        while poll.poll(60_000) and (some := os.read(terminal, 65536)):
            output += some
    os.close(terminal)
    return output


def _cpu_seconds(process: int) -> float:
    return time.clock_gettime(~process << 3 | 2)  # clock_getcpuclockid(3)


@pytest.mark.parametrize("as_json", [False, True], ids=["table", "JSON"])
def test_no_escape_code_of_a_server_reaches_a_terminal(as_json: bool) -> None:
    nasty = "\x1b[2J\x1b]0;title\x07\x9b31mGoaway"
    ours, its = pty.openpty()
    with scripted(lambda ports: verdicts(dict.fromkeys(ports, nasty))) as server:
        words = ["check", "--server", server.url, str(free_port()), *["--json"] * as_json]
        process = subprocess.Popen(
            [*PORT_CHECKER, *words],
            stdin=its,
            stdout=its,
            stderr=its,
            env=environment(TERM="xterm-256color", COLUMNS="200"),
            preexec_fn=prepare,
        )
        os.close(its)
        output = _read_all(ours)
        assert process.wait(60) == 1
    assert b"Goaway" in output
    for code in (b"\x1b[2J", b"\x1b]0", b"\x07", b"\x9b"):
        assert code not in output
    if as_json:
        assert json.loads(output)["reachable"] == 0  # and nothing else is printed


@pytest.mark.parametrize("module", ["click.core", "h11._connection"])
def test_an_interrupt_while_it_is_being_loaded_ends_it_quietly(module: str) -> None:
    words = [sys.executable, "-X", "importtime", "-m", "port_checker", "check", "50800"]
    words += ["--server", "http://127.0.0.1:1", "--ip", "127.0.0.1"]
    with subprocess.Popen(
        words, env=environment(), stderr=subprocess.PIPE, text=True, preexec_fn=prepare
    ) as process:
        assert process.stderr
        for line in process.stderr:  # one for each module, as soon as it is loaded
            if module in line:
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    assert "Traceback" not in rest
    assert process.returncode == 130


def http(body: bytes, *headers: bytes) -> bytes:
    fields = b"".join(header + b"\r\n" for header in (b"Content-Length: %d" % len(body), *headers))
    return b"HTTP/1.1 200 OK\r\n" + fields + b"\r\n" + body


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
HOSTILE: dict[str, tuple[bytes, bytes]] = {  # what is sent first, and then without end
    "many chunks": (CHUNKED, b"10000\r\n" + b"x" * 65536 + b"\r\n"),
    "a long header": (b"HTTP/1.1 200 OK\r\na: ", b"x" * 65536),
    "a long trailer": (CHUNKED + b"2\r\n{}\r\n0\r\n", b"a: b\r\n" * 10_000),
    "a long chunk extension": (CHUNKED + b"1;", b"x" * 65536),
    "many values": (http(b'{"results": {}, "x": [' + b"1," * 150_000 + b"1]}"), b""),
}


def sending(first: bytes, more: bytes) -> Callable[[socket.socket], None]:
    def send(connection: socket.socket) -> None:
        connection.recv(65536)
        with contextlib.suppress(OSError):
            connection.sendall(first)
            while more:
                connection.sendall(more)

    return send


def test_nothing_that_a_server_sends_takes_memory() -> None:
    script = """
import atexit, runpy
status = open("/proc/self/status")
atexit.register(lambda: print(status.read().split("VmHWM:")[1].split()[0]))
runpy.run_module("port_checker", run_name="__main__")
"""
    bomb = gzip.compress(gzip.compress(bytes(100_000_000)))
    encoded = http(bomb, b"Content-Encoding: gzip, gzip"), b""
    with contextlib.ExitStack() as stack:
        words = ["check", "--ip", "::1", "1000-1999"]
        for first, more in (encoded, *HOSTILE.values()):
            words += ["--server", stack.enter_context(raw_server(sending(first, more)))]
        done = subprocess.run(
            [sys.executable, "-c", script, *words],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert (done.returncode, done.stderr) == (3, "")
    assert int(done.stdout.splitlines()[-1]) < 120 * 1024  # KiB


def test_markup_in_a_message_is_only_text() -> None:
    message = "[red]Wait[/red] :warning: [link=http://127.0.0.1]here"
    refused = refusal(ErrorCode.CHECK_FAILED, message, retry_after="3600")  # longer than it waits
    with scripted(lambda _: refused) as server:
        done = check(server.url, "--ip", "127.0.0.1", str(free_port()))
    assert f"{message} (CHECK_FAILED)." in done.out


# The rest of the program


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_help_that_cannot_be_written_is_a_sentence(word: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*PORT_CHECKER, word], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (1, "port-checker: No space left on device\n")


def test_help_and_version() -> None:
    words = [["--help"], ["-h"], ["check", "--help"], ["serve", "--help"], ["--version"]]
    overview, short, of_check, of_serve, version = (invoke(*each) for each in words)
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


def test_the_manual_page_has_the_words_of_the_help() -> None:
    made = subprocess.run(
        [sys.executable, ".ci/man_page.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert made.stdout == (ROOT / "port-checker.1").read_text(), "make man writes it anew"
    for words in ("50800\\-50899", "\\-\\-on\\-change CMD", "Exit status: 0 all ports"):
        assert words in made.stdout


@pytest.mark.parametrize(
    ("variable", "value", "status", "message"),
    [
        ("PORT_CHECKER_PORT", "80", 0, ""),
        (
            "PORT_CHECKER_PROT",
            "80",
            0,
            "port-checker: PORT_CHECKER_PROT is not a setting; did you mean PORT_CHECKER_PORT?\n",
        ),
        (
            "PORT_CHECK_TARGETS",
            "all",
            2,
            "port-checker: PORT_CHECK_TARGETS='all' is wrong: it must be public or caller\n",
        ),
    ],
)
def test_settings_are_checked_and_nothing_is_started(
    variable: str, value: str, status: int, message: str
) -> None:
    assert invoke("serve", "--check-settings", **{variable: value}) == Done(status, "", message)


def test_a_wrong_setting_is_one_line() -> None:
    done = run(PORT_CHECKER_PORT="x")
    assert done.status == 2
    assert done.err.startswith("port-checker: PORT_CHECKER_PORT='x' ")
    assert done.err.count("\n") == 1


def test_an_unknown_command() -> None:
    done = invoke("chekc")
    assert "No such command 'chekc'." in done.complaint
    assert done.status == 2
