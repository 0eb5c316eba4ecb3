"""``port-checker health``."""

import os
import subprocess
import sys

import pytest

from tests.support.loopback import refused_port
from tests.support.scripted import scripted
from tests.support.service import program


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
    with program(PORT_CHECKER_HOST=host) as running:
        port = str(running.port)
        assert health(PORT_CHECKER_HOST=host, PORT_CHECKER_PORT=port) == (0, "")
        url = f"http://{reached}:{port}"
        assert health(url) == health(f"{url}/health") == (0, "")


def test_a_service_that_is_not_there() -> None:
    with refused_port() as port:
        status, said = health(f"http://127.0.0.1:{port}")
    assert status == 1
    assert said.startswith(f"port-checker: http://127.0.0.1:{port}/health does not answer: ")
    assert "refused" in said


def test_a_server_that_is_none_of_ours() -> None:
    with scripted() as server:
        assert health(server.url) == (
            1,
            f"port-checker: {server.url}/health does not answer: HTTP Error 404: Not Found\n",
        )


def test_what_is_no_url_is_wrong_usage() -> None:
    status, said = health("localhost:9000")
    assert status == 2
    assert said == "port-checker: 'localhost:9000' must start with http:// or https://.\n"
