"""The load over HTTP: wrk, with a Lua script that makes the requests and checks the answers."""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from benchmarks import HOST, BenchmarkFailed
from benchmarks.processes import Cost, Service

CONNECTIONS = 4

# For small requests at a distance: four would leave a service idle for most of the time, and waking
# up would be half of what a request takes (measured).
CONNECTIONS_AT_A_DISTANCE = 64
SECONDS = 2

# Seconds for an answer. On a busy machine the published version takes over one for 100 ports.
_PATIENCE = 20

# Runs in two interpreters: init(), request() and response() in the sending thread, setup() and
# done() in the main one. The arguments are a text that every answer must contain, then the bodies
# to send in turn; without bodies it sends GET. Every answer is checked, since an error or a port
# reported as closed may come faster than a right answer.
_SCRIPT = """\
wrong = 0
local requests = {}
local turn = 0

function init(arguments)
  expected = arguments[1]
  for n = 2, #arguments do
    local headers = {["Content-Type"] = "application/json"}
    requests[n - 1] = wrk.format("POST", nil, headers, arguments[n])
  end
  if #requests == 0 then requests[1] = wrk.format("GET") end
end

function request()
  turn = turn % #requests + 1
  return requests[turn]
end

function response(status, _, body)
  if status ~= 200 or not body:find(expected, 1, true) then wrong = wrong + 1 end
end

function setup(thread) sender = thread end

function done(summary)
  local errors = summary.errors
  print(string.format(
    '{"answers": %d, "microseconds": %d, "wrong": %d, "errors": %d}',
    summary.requests, summary.duration, sender:get("wrong"),
    errors.connect + errors.read + errors.write + errors.timeout
  ))
end
"""


@dataclass(frozen=True, slots=True)
class Load:
    """A request to repeat, and what its answer must contain.

    Attributes:
        name: The label of the figure.
        path: The path of the URL.
        bodies: Bodies to POST in turn; without any, the request is a GET.
        expected: A text that every answer must contain.
        connections: How many ask at the same time.
    """

    name: str
    path: str
    bodies: Sequence[str]
    expected: str
    connections: int = CONNECTIONS


def loads(ports: Sequence[int], host: str = HOST) -> list[Load]:
    """Return the loads to measure, which check these open ports of a host."""
    connections = CONNECTIONS if host == HOST else CONNECTIONS_AT_A_DISTANCE
    # The single-port load takes the ports in turn. Each connection leaves a local port in TIME-WAIT
    # for a minute, and towards one port alone they would soon be used up.
    singles = [_body([port], host) for port in ports]
    many = [_body(ports, host)]
    return [
        Load("1 open port", "/check-ports", singles, _all(1), connections),
        Load(f"{len(ports)} open ports", "/check-ports", many, _all(len(ports))),
        Load("GET /health", "/health", [], '"ok"', connections),
    ]


def measure(service: Service, load: Load, directory: Path) -> Cost:
    """Put a load on a service, and return what a request costs.

    Args:
        service: The service.
        load: The load.
        directory: Where the script for wrk may be written.

    Raises:
        BenchmarkFailed: wrk or a connection failed, or an answer was late or wrong.
    """
    _require_expected_answer(service, load)
    url = f"http://{service.host}:{service.port}{load.path}"
    script = directory / "load.lua"
    script.write_text(_SCRIPT)
    options = ["--threads", "1", "--connections", str(load.connections)]
    options += ["--duration", f"{SECONDS}s", "--timeout", f"{_PATIENCE}s"]
    before = service.cpu_seconds()
    done = subprocess.run(
        ["wrk", *options, "--script", script, url, "--", load.expected, *load.bodies],
        capture_output=True,
        text=True,
        timeout=SECONDS + 30,
        check=False,
    )
    if done.returncode:
        raise BenchmarkFailed(f"wrk failed: {done.stderr}{done.stdout}")
    count = json.loads(done.stdout.splitlines()[-1])
    if count["wrong"] or count["errors"] or not count["answers"]:
        raise BenchmarkFailed(
            f"{load.name}: of {count['answers']} answers from {url}, {count['wrong']} were wrong; "
            f"{count['errors']} connections failed or timed out"
        )
    used = service.cpu_seconds() - before
    return Cost(
        float(count["answers"]) / float(count["microseconds"]) * 1e6, used / count["answers"]
    )


def _require_expected_answer(service: Service, load: Load) -> None:
    # Under load, answers about closed ports would go unnoticed: they come after wrk has finished.
    connection = HTTPConnection(service.host, service.port, timeout=30)
    try:
        if load.bodies:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", load.path, load.bodies[0], headers)
        else:
            connection.request("GET", load.path)
        answer = connection.getresponse().read().decode()
    except (OSError, HTTPException) as error:
        raise BenchmarkFailed(f"{load.name}: no answer from port {service.port}") from error
    finally:
        connection.close()
    if load.expected not in answer:
        raise BenchmarkFailed(f"{load.name}: port {service.port} answered {answer}")


def _body(ports: Sequence[int], host: str) -> str:
    return json.dumps({"provider_ip": host, "ports": list(ports)})


def _all(count: int) -> str:
    return f"Successfully verified {count} out of {count} ports"
