"""A real nginx in front of the service."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from tests.support.loopback import free_port
from tests.support.waiting import wait_until

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")

# CI must not skip them.
needs_nginx = pytest.mark.skipif(
    os.environ.get("CI") != "true" and not NGINX, reason="nginx is not installed"
)

# One process in the foreground, which writes nowhere but into its own directory.
_CONFIGURATION = """\
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
        listen {host}:{port};
        location {prefix} {{
            proxy_pass http://127.0.0.1:{upstream}{upstream_path};
            {directives}
        }}
    }}
}}
"""


@contextmanager
def nginx(
    directory: Path,
    upstream: int,
    *directives: str,
    host: str = "127.0.0.1",
    prefix: str = "",
) -> Iterator[int]:
    """Run nginx in front of a port of 127.0.0.1.

    Args:
        directory: Where it keeps its files.
        upstream: The port.
        directives: What its ``location`` holds besides ``proxy_pass``.
        host: The address that it listens on.
        prefix: The path that it serves and takes off, such as ``/portcheck/``; else it serves all
            paths and takes nothing off.

    Yields:
        The port that it listens on.
    """
    assert NGINX, "nginx is not installed"
    port = free_port()
    home = directory / f"nginx-{port}"
    home.mkdir()
    configuration = home / "nginx.conf"
    configuration.write_text(
        _CONFIGURATION.format(
            host=host,
            port=port,
            upstream=upstream,
            prefix=prefix or "/",
            upstream_path="/" if prefix else "",
            directives=" ".join(directives),
        )
    )
    log = home / "stderr"
    with (
        log.open("wb") as stderr,
        subprocess.Popen(
            [NGINX, "-p", home, "-c", configuration, "-e", "stderr"], stderr=stderr
        ) as process,
    ):

        def answers() -> bool:
            assert process.poll() is None, log.read_text()
            with suppress(httpx.TransportError):
                health = httpx.get(f"http://{host}:{port}{prefix or '/'}health", timeout=30)
                return health.status_code == 200
            return False

        try:
            wait_until(answers, "nginx to answer")
            yield port
        finally:
            process.kill()
