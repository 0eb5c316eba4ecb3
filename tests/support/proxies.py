"""A real nginx, HAProxy or Caddy in front of the service."""

import os
import shutil
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp

import httpx
import pytest

from tests.support.http import client_of
from tests.support.loopback import free_port
from tests.support.processes import end_with_parent
from tests.support.waiting import wait_until

_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
_NGINX = shutil.which("nginx", path=_PATH)
_HAPROXY = shutil.which("haproxy", path=_PATH)
_CADDY = shutil.which("caddy", path=_PATH)

# CI must not skip them.
needs_proxies = pytest.mark.skipif(
    os.environ.get("CI") != "true" and not (_NGINX and _HAPROXY and _CADDY),
    reason="nginx, haproxy or caddy is not installed",
)

# Where Caddy keeps the certificate of its own authority.
CADDY_AUTHORITY = "pki/authorities/local/root.crt"

# The name in contrib/Caddyfile.
CADDY_NAME = "checker.example"

# One process in the foreground, which writes nowhere but into its own directory.
_NGINX_CONFIGURATION = """\
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
    {servers}
}}
"""

_NGINX_SERVER = """\
server {{
    listen {host}:{port};
    location {prefix} {{
        proxy_pass http://{upstream}{upstream_path};
        {directives}
    }}
}}
"""

# With certificates of its own authority, since the world's gives none for loopback.
_CADDY_CONFIGURATION = """\
{{
	admin off
	local_certs
	skip_install_trust
	storage file_system {directory}
}}
import {file}
"""

_HAPROXY_CONFIGURATION = """\
defaults
    mode http
    timeout connect 60s
    timeout client 60s
    timeout server 60s
    option forwardfor
    http-reuse always
frontend here
    bind 127.0.0.1:{port}
    default_backend service
backend service
    server only 127.0.0.1:{upstream}
"""


@contextmanager
def nginx(
    directory: Path,
    upstream: int | Path,
    *directives: str,
    host: str = "127.0.0.1",
    prefix: str = "",
) -> Iterator[int]:
    """Run nginx in front of a port of 127.0.0.1, or a Unix socket.

    Args:
        directory: For its files.
        upstream: The port, or the path.
        directives: For its ``location``, besides ``proxy_pass``.
        host: The address that it listens on.
        prefix: The path that it serves and takes off, such as ``/portcheck/``; else it serves all
            paths and takes nothing off.

    Yields:
        The port it listens on.
    """
    port = free_port()
    server = _NGINX_SERVER.format(
        host=host,
        port=port,
        upstream=f"unix:{upstream}:" if isinstance(upstream, Path) else f"127.0.0.1:{upstream}",
        prefix=prefix or "/",
        upstream_path="/" if prefix else "",
        directives=" ".join(directives),
    )
    with nginx_of(directory, server, _passes_on(f"http://{host}:{port}{prefix or '/'}")):
        yield port


@contextmanager
def nginx_of(directory: Path, servers: str, answers: Callable[[], bool]) -> Iterator[None]:
    """Run nginx with these lines in its ``http`` block, until ``answers`` says that it is there."""
    home = Path(mkdtemp(prefix="nginx-", dir=directory))
    configuration = home / "nginx.conf"
    configuration.write_text(_NGINX_CONFIGURATION.format(servers=servers))
    with _running(answers, home, _NGINX, "-p", home, "-c", configuration, "-e", "stderr"):
        yield


@contextmanager
def haproxy(directory: Path, upstream: int) -> Iterator[int]:
    """Run HAProxy in front of a port of 127.0.0.1; yield the port it listens on."""
    port = free_port()
    configuration = directory / "haproxy.cfg"
    configuration.write_text(_HAPROXY_CONFIGURATION.format(port=port, upstream=upstream))
    answers = _passes_on(f"http://127.0.0.1:{port}/")
    with _running(answers, directory, _HAPROXY, "-db", "-f", configuration):
        yield port


def _passes_on(url: str) -> Callable[[], bool]:
    """Return what tells whether a proxy passes requests on to the service."""

    def answers() -> bool:
        with suppress(httpx.TransportError), client_of(url) as client:
            return client.get("health").status_code == 200
        return False

    return answers


@contextmanager
def _running(
    answers: Callable[[], bool], home: Path, *command: str | Path | None
) -> Iterator[None]:
    """Run a proxy from when it answers."""
    log = home / "stderr"
    assert all(command), "it is not installed"
    with (
        log.open("wb") as stderr,
        subprocess.Popen(
            [str(word) for word in command], stderr=stderr, preexec_fn=end_with_parent
        ) as process,
    ):

        def runs() -> bool:
            assert process.poll() is None, log.read_text()
            return answers()

        try:
            wait_until(runs, "the proxy to answer")
            yield
        finally:
            process.kill()


@contextmanager
def as_shipped(file: Path, directory: Path) -> Iterator[None]:
    """Run a proxy with a file that operators copy; it serves port 80, and Caddy 443 as well."""
    answers = _passes_on("http://127.0.0.1:80/")
    if file.name == "Caddyfile":
        configuration = directory / "Caddyfile"
        configuration.write_text(_CADDY_CONFIGURATION.format(directory=directory, file=file))
        caddy = [_CADDY, "run", "--adapter", "caddyfile", "--config", configuration]

        def serves() -> bool:
            trusted = directory / CADDY_AUTHORITY
            with suppress(OSError):  # ssl.SSLError is one: it listens before it has a certificate
                context = ssl.create_default_context(cafile=trusted)
                with (
                    socket.create_connection(("127.0.0.1", 443)) as client,
                    context.wrap_socket(client, server_hostname=CADDY_NAME),
                ):
                    return True
            return False

        with _running(serves, directory, *caddy):
            yield
        return
    if file.name == "nginx.conf":
        with nginx_of(directory, f"include {file};", answers):
            yield
    else:
        with _running(answers, directory, _HAPROXY, "-db", "-f", file):
            yield
