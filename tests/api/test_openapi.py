"""The service conforms to its OpenAPI schema: schemathesis generates requests from it.

It generates addresses, too, and some of them belong to somebody. So it runs, with the service, in a
network namespace whose default route leads to a veth with nobody at its other end: the service has
a route, as on the internet, and every packet is lost.

``FUZZ_EXAMPLES`` sets how many requests are generated per operation (``make fuzz``).
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.namespace import ROOT, needs_root
from tests.support.service import program

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "100"))

ROUTE_TO_NOBODY = [
    "ip link set lo up",
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
def test_the_service_does_what_its_schema_says(tmp_path: Path) -> None:
    inside = (
        f"import sys; sys.path.append({str(ROOT)!r}); "
        f"import tests.api.test_openapi; tests.api.test_openapi.run_schemathesis({EXAMPLES})"
    )
    commands = " && ".join([*ROUTE_TO_NOBODY, 'exec "$0" -c "$1"'])
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", commands, sys.executable, inside],
        cwd=tmp_path,  # schemathesis writes files there
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600 + EXAMPLES,  # only catches a hang
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "No issues found" in done.stdout, done.stdout


def run_schemathesis(examples: int) -> None:
    """Start the service and test it with schemathesis; called in the namespace.

    Exits with schemathesis' status, after checking the log.
    """
    from schemathesis.cli import schemathesis as command

    is_repeatable = os.environ.get("CI") == "true" and "FUZZ_EXAMPLES" not in os.environ
    words = [
        "run",
        "{url}/openapi.json",
        "--checks=all",
        f"--max-examples={examples}",
        "--continue-on-failure",
        "--no-color",
        "--warnings=off",  # it may happen that all addresses generated for a route are refused ones
        # In CI the same requests every time.
        "--generation-deterministic" if is_repeatable else "--generation-database=none",
    ]
    with program(**QUICK) as running:
        url = f"http://127.0.0.1:{running.port}"
        status = command.main([word.format(url=url) for word in words], standalone_mode=False)
        running.stop()
    log = "".join(running.lines)
    assert "Traceback" not in log, log
    assert " outcome=completed duration=0.1" in log, log  # public addresses were checked
    sys.exit(status)
