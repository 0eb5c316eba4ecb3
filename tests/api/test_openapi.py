"""The service conforms to its OpenAPI schema: schemathesis generates requests from it.

It generates addresses, too, and some of them belong to somebody. So it runs, with the service, in a
network namespace whose default route leads to a veth with nobody at its other end: the service has
a route, as on the internet. On it, every connection is refused, so that none is waited for.

``FUZZ_EXAMPLES`` sets how many requests are generated per operation (``make fuzz``).
"""

import os
import re
import subprocess
import sys
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from port_checker.connect import HELD_UP
from port_checker.handshake_process import TOO_BUSY
from tests.support.namespace import loopback_alone, needs_root
from tests.support.packages import needs
from tests.support.service import program

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "100"))

ROUTE_TO_NOBODY = [
    "ip link add cable type veth peer name nobody",
    "ip link set cable up",
    "ip link set nobody up",
    "ip address add 198.51.100.1/24 dev cable",
    "ip address add 2001:db8::1/64 dev cable nodad",
    # Packets leave at once: nobody has to be asked for the router's link-layer address.
    "ip neighbour add 198.51.100.2 lladdr 02:00:00:00:00:01 dev cable nud permanent",
    "ip neighbour add 2001:db8::2 lladdr 02:00:00:00:00:01 dev cable nud permanent",
    "ip route add default via 198.51.100.2",
    "ip route add default via 2001:db8::2",
]
QUICK: dict[str, Any] = {
    "PORT_CHECKER_HOST": "::",
    "PORT_CHECKER_RATE_LIMIT": "off",
    "PORT_CHECK_OWN_RATE_LIMIT": "off",
    "PORT_CHECK_OTHERS_RATE_LIMIT": "off",
    "PORT_CHECK_TARGET_RATE_LIMIT": "off",
    "PORT_CHECK_RETRIES": "1",
    "PORT_CHECK_TIMEOUT": "0.1",
}


@needs_root
@needs("schemathesis")
def test_the_service_does_what_its_schema_says(tmp_path: Path) -> None:
    is_repeatable = os.environ.get("CI") == "true" and "FUZZ_EXAMPLES" not in os.environ
    options = [
        "--checks=all",
        f"--max-examples={EXAMPLES}",
        "--continue-on-failure",
        "--no-color",
        "--warnings=off",  # it may happen that all addresses generated for a route are refused ones
        "--generation-database=none",
        *(["--seed=1"] if is_repeatable else []),  # in CI the same requests every time
    ]
    # On a busy machine, 0.1 s is too short to prove anything. The log shows what else fails.
    expected = '["2xx", "4xx", "503"]'
    configuration = f"[checks.not_a_server_error]\nexpected-statuses = {expected}\n"
    (tmp_path / "schemathesis.toml").write_text(configuration)
    with loopback_alone(*ROUTE_TO_NOBODY), program(**QUICK) as running:
        url = f"http://127.0.0.1:{running.port}/openapi.json"
        done = subprocess.run(
            [sys.executable, "-m", "schemathesis.cli", "run", url, *options],
            cwd=tmp_path,  # it reads its configuration there, and writes files
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600 + EXAMPLES,  # only catches a hang
            check=False,
        )
        running.stop()
    assert done.returncode == 0, done.stdout
    assert "No issues found" in done.stdout, done.stdout
    log = "".join(running.lines)
    assert "Traceback" not in log, log
    assert "OVERLOADED" not in log, log
    failed = [line for line in running.lines if "outcome=failed" in line]
    assert all(any(reason in line for reason in (HELD_UP, TOO_BUSY)) for line in failed), failed
    checked = re.findall(r" target=(\S+) ports=\d+ outcome=(?:completed|failed) ", log)
    assert any(ip_address(target).is_global for target in checked), log
