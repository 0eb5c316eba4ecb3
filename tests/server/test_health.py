"""``port-checker health``."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from port_checker.server.health import DEFAULT_HOST, DEFAULT_PORT, run
from port_checker.settings import Settings
from tests.support.loopback import refused_port
from tests.support.namespace import loopback_alone, needs_root
from tests.support.scripted import raw_server, scripted
from tests.support.service import program, serve
from tests.support.waiting import wait_until


def health(*words: str, **environment: str) -> tuple[int, str]:
    """Its exit status, and what it says."""
    done = subprocess.run(
        [sys.executable, "-m", "port_checker", "health", *words],
        env={**os.environ, "http_proxy": "http://127.0.0.1:1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


@pytest.mark.parametrize(("host", "reached"), [("0.0.0.0", "127.0.0.1"), ("::", "[::1]")])  # noqa: S104
def test_a_healthy_service(host: str, reached: str) -> None:
    with serve(host=host) as client:
        port = str(client.base_url.port)
        assert health(PORT_CHECKER_HOST=host, PORT_CHECKER_PORT=port) == (0, "")
        url = f"http://{reached}:{port}"
        assert health(url) == health(f"{url}/health") == (0, "")


def test_a_service_that_is_not_there() -> None:
    with refused_port() as port:
        status, said = health(f"http://127.0.0.1:{port}")
    assert status == 1
    assert said.startswith(f"port-checker: http://127.0.0.1:{port} does not answer: ")
    assert "refused" in said


def test_a_server_that_is_none_of_ours() -> None:
    with scripted() as server:
        assert health(server.url) == (
            1,
            f"port-checker: {server.url} answers 404 Not Found\n",
        )


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 1000, "does not answer as a port checker does"),
        (b"HTTP/1.1 500 \x1b[2JNo\r\n\r\n", "answers 500 ?[2JNo"),
    ],
    ids=["nested", "control"],
)
def test_a_hostile_server(answer: bytes, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    def behave(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(answer)

    with raw_server(behave) as url:
        assert run(url.replace("//", "//user:p@ss@")) == 1
        assert capsys.readouterr().err == f"port-checker: {url} {message}\n"


@pytest.mark.parametrize("url", ["http://a b", "http://[", "http://h:x", "ftp://h"])
def test_a_url_that_is_none(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(url) == 2
    assert capsys.readouterr().err.startswith("port-checker: ")


def test_the_service_of_a_settings_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with serve() as client:
        (tmp_path / ".env").write_text(f"PORT_CHECKER_PORT={client.base_url.port}\n")
        assert health() == (0, "")


@needs_root
def test_a_service_on_all_addresses_where_ipv6_is_switched_off() -> None:
    with (
        loopback_alone("echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6"),
        serve(host="::", on_port=9000),
    ):
        assert health(PORT_CHECKER_HOST="::", PORT_CHECKER_PORT="9000") == (0, "")


@needs_root
def test_a_service_on_all_addresses_where_there_is_no_ipv4() -> None:
    with (
        loopback_alone("ip address delete 127.0.0.1/8 dev lo"),
        program(ready=False, PORT_CHECKER_HOST="::", PORT_CHECKER_PORT="9000") as running,
    ):
        asked = {"PORT_CHECKER_HOST": "::", "PORT_CHECKER_PORT": "9000"}
        wait_until(lambda: run("http://[::1]:9000") == 0, "the program to answer")
        assert health(**asked) == (0, "")
        assert "Listening on [::]:9000, page at http://localhost:9000/" in running.lines[0]


def test_a_wrong_setting_is_one_line() -> None:
    status, message = health(PORT_CHECKER_PORT="99999")
    wrong = "PORT_CHECKER_PORT='99999' is wrong: it must be a port to listen on, from 1 to 65535"
    assert (status, message) == (2, f"port-checker: {wrong}\n")


def test_the_defaults_are_those_of_the_settings() -> None:
    assert Settings(host=DEFAULT_HOST, port=int(DEFAULT_PORT)) == Settings()


def test_it_loads_no_library() -> None:
    script = "import sys; sys.argv[1:] = ['health', 'http://127.0.0.1:1']\n"
    script += "from port_checker.__main__ import main\n"
    script += "try: main()\nexcept SystemExit: print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "port_checker" in loaded
    assert not {"typer", "click", "rich", "pydantic", "dotenv", "asyncio"} & loaded


def test_what_is_no_url_is_wrong_usage() -> None:
    status, said = health("localhost:9000")
    assert status == 2
    assert said == "port-checker: 'localhost:9000' must start with http:// or https://.\n"
