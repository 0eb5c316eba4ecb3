"""Who the caller is behind a real nginx: set up well, chained, and set up badly.

nginx comes to the service from 127.0.0.1, which is trusted by default. Its clients come from
127.0.0.2, which is not: the outside, as far as the service is concerned.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.support.loopback import free_port, open_port
from tests.support.service import serve

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")

# On the machine whose job it is to run these tests they may not be passed over.
pytestmark = pytest.mark.skipif(
    os.environ.get("CI") != "true" and not NGINX, reason="nginx is not installed"
)

OUTSIDE = "127.0.0.2"
OUTER_NGINX = "127.0.0.3"

FORWARDS = "proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;"  # as the README has it

# One process in the foreground, which writes nowhere but into its own directory.
CONFIGURATION = """\
daemon off;
master_process off;
pid nginx.pid;
error_log stderr warn;
events {{}}
http {{
    access_log off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://127.0.0.1:{upstream};
            {directives}
        }}
    }}
}}
"""


@contextmanager
def nginx(directory: Path, upstream: int, *directives: str) -> Iterator[int]:
    """Run nginx in front of a port of 127.0.0.1.

    Args:
        directory: Where it keeps its files.
        upstream: The port.
        directives: What its ``location`` holds besides ``proxy_pass``.

    Yields:
        The port that it listens on.
    """
    assert NGINX, "nginx is not installed"
    port = free_port()
    home = directory / f"nginx-{port}"
    home.mkdir()
    configuration = home / "nginx.conf"
    configuration.write_text(
        CONFIGURATION.format(port=port, upstream=upstream, directives=" ".join(directives))
    )
    log = home / "stderr"
    with (
        log.open("wb") as stderr,
        subprocess.Popen(
            [NGINX, "-p", home, "-c", configuration, "-e", "stderr"], stderr=stderr
        ) as process,
    ):
        try:
            deadline = time.monotonic() + 20
            while not _answers(port):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.01)
            yield port
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def _answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    except httpx.TransportError:
        return False


Headers = Mapping[str, str] | Sequence[tuple[str, str]]


@contextmanager
def outsider(port: int, address: str = OUTSIDE, headers: Headers = ()) -> Iterator[httpx.Client]:
    """A client of what listens on a port, coming from an address of its own."""
    transport = httpx.HTTPTransport(local_address=address)
    with httpx.Client(
        base_url=f"http://127.0.0.1:{port}", transport=transport, headers=headers, timeout=30
    ) as client:
        yield client


def ip(client: httpx.Client) -> str | None:
    """Who the service says that the caller is."""
    caller: str | None = client.get("/ip").raise_for_status().json()["ip"]
    return caller


def check(client: httpx.Client, target: str, port: int) -> str:
    """The message of a check's answer, or its error code."""
    answer = client.post("/check-ports", json={"provider_ip": target, "ports": [port]}).json()
    told: str = answer["detail"]["code"] if "detail" in answer else answer["message"]
    return told


ACCESSIBLE = "Successfully verified 1 out of 1 ports"

FORGED: list[Headers] = [
    {"X-Forwarded-For": "127.0.0.1"},
    {"X-Forwarded-For": "127.0.0.1, 127.0.0.1"},
    {"X-Forwarded-For": "203.0.113.7, 127.0.0.1"},
    {"X-Forwarded-For": "::1"},
    {"X-Forwarded-For": "nonsense"},
    {"X-Forwarded-For": ""},
    {"X-Forwarded-For": ","},
    [("X-Forwarded-For", "127.0.0.1"), ("X-Forwarded-For", "127.0.0.1")],
    [("X-Forwarded-For", "127.0.0.1"), ("x-forwarded-for", "10.0.0.1,")],
    {"X_Forwarded_For": "127.0.0.1"},
    {"X-Real-IP": "127.0.0.1", "Forwarded": "for=127.0.0.1", "Via": "1.1 x"},
]


def test_the_caller_is_who_nginx_says(tmp_path: Path) -> None:
    with (
        serve() as service,
        nginx(tmp_path, service.base_url.port or 0, FORWARDS) as port,
        outsider(port) as client,
        open_port(OUTSIDE) as opened,
    ):
        assert ip(client) == OUTSIDE
        assert check(client, OUTSIDE, opened) == ACCESSIBLE


@pytest.mark.parametrize("headers", FORGED)
def test_what_a_client_forges_changes_nothing(tmp_path: Path, headers: Headers) -> None:
    with (
        serve() as service,
        nginx(tmp_path, service.base_url.port or 0, FORWARDS) as port,
        outsider(port, headers=headers) as client,
        open_port() as opened,
    ):
        assert ip(client) == OUTSIDE
        for target in "127.0.0.1", "::1", "::ffff:127.0.0.1", "10.0.0.1", "203.0.113.7":
            assert check(client, target, opened) == "TARGET_NOT_ALLOWED"


@pytest.mark.parametrize("headers", FORGED)
def test_nor_does_it_without_nginx(headers: Headers) -> None:
    with serve() as service, outsider(service.base_url.port or 0, headers=headers) as client:
        assert ip(client) == OUTSIDE
        assert check(client, "127.0.0.1", service.base_url.port or 0) == "TARGET_NOT_ALLOWED"


def test_a_limit_is_the_callers_and_not_nginxs(tmp_path: Path) -> None:
    with (
        serve(caller_rate_limit="1/hour") as service,
        nginx(tmp_path, service.base_url.port or 0, FORWARDS) as port,
        open_port(OUTSIDE) as opened,
    ):
        with outsider(port) as client:
            assert check(client, OUTSIDE, opened) == ACCESSIBLE
        with outsider(port, headers={"X-Forwarded-For": "203.0.113.7"}) as client:
            assert check(client, OUTSIDE, opened) == "RATE_LIMITED"
        with outsider(port, "127.0.0.4") as client:
            assert check(client, OUTSIDE, opened) == "TARGET_NOT_ALLOWED"


@pytest.mark.parametrize(
    ("trusted", "caller"),
    [
        (f"127.0.0.1,{OUTER_NGINX}", OUTSIDE),
        ("127.0.0.1", OUTER_NGINX),  # the outer one is nobody to be believed then
    ],
)
@pytest.mark.parametrize("forged", [{}, {"X-Forwarded-For": f"127.0.0.1, {OUTER_NGINX}"}])
def test_two_nginxes_in_a_row(
    tmp_path: Path, trusted: str, caller: str, forged: Mapping[str, str]
) -> None:
    with (
        serve(trusted_proxies=trusted) as service,
        nginx(tmp_path, service.base_url.port or 0, FORWARDS) as inner,
        nginx(tmp_path, inner, FORWARDS, f"proxy_bind {OUTER_NGINX};") as outer,
        outsider(outer, headers=forged) as client,
        open_port() as opened,
    ):
        assert ip(client) == caller
        assert check(client, "127.0.0.1", opened) == "TARGET_NOT_ALLOWED"


@pytest.mark.parametrize(
    "shows_itself",
    [
        "proxy_set_header X-Real-IP $remote_addr;",
        'proxy_set_header Via "1.1 nginx";',
        'proxy_set_header Forwarded "for=$remote_addr";',
    ],
)
def test_behind_an_nginx_that_forwards_no_address_the_caller_is_unknown(
    tmp_path: Path, shows_itself: str, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        serve() as service,
        nginx(tmp_path, service.base_url.port or 0, shows_itself) as port,
        outsider(port) as client,
        open_port() as opened,
    ):
        for _ in range(3):
            assert ip(client) is None
            assert check(client, "127.0.0.1", opened) == "TARGET_NOT_ALLOWED"
    (warning,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert "127.0.0.1, which is in PORT_CHECKER_TRUSTED_PROXIES, forwards no address" in warning


def test_an_nginx_of_which_nothing_shows_is_the_caller(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The README warns of it: all look like nginx, and may check what is nginx's own."""
    with (
        serve() as service,
        nginx(tmp_path, service.base_url.port or 0) as port,
        outsider(port) as client,
        open_port() as opened,
    ):
        assert ip(client) == "127.0.0.1"
        assert check(client, "127.0.0.1", opened) == ACCESSIBLE
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_an_nginx_that_is_not_trusted_is_the_caller(tmp_path: Path) -> None:
    with (
        serve(trusted_proxies="") as service,
        nginx(tmp_path, service.base_url.port or 0, FORWARDS) as port,
        outsider(port, headers={"X-Forwarded-For": "203.0.113.7"}) as client,
    ):
        assert ip(client) == "127.0.0.1"


def test_an_nginx_that_does_not_set_the_header_lets_its_clients_say_who_they_are(
    tmp_path: Path,
) -> None:
    """Why it must: it passes on theirs, which then comes from a trusted proxy."""
    with (
        serve() as service,
        nginx(tmp_path, service.base_url.port or 0) as port,
        outsider(port, headers={"X-Forwarded-For": "203.0.113.7"}) as client,
    ):
        assert ip(client) == "203.0.113.7"
