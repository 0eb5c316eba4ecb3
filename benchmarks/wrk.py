"""The load over HTTP: wrk, told by a Lua script what to ask and which answer to expect."""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from benchmarks import HOST, BenchmarkFailed

CONNECTIONS = 4
SECONDS = 2

# Seconds that both services wait before they try a port again: an answer that took as long is one
# of a port that was not found open at once, and no answer to measure.
_RETRY_DELAY = 1

# Runs in two interpreters: init(), request() and response() in the thread that sends, setup() and
# done() in the main one. The arguments are what every answer must hold, then the bodies to send in
# turn; without bodies it is a GET. An answer that nobody read could be an error that came quickly,
# or ports called closed, so each is read.
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
    """What is asked of a service, over and over.

    Attributes:
        name: What the figure is called.
        path: What is asked for.
        bodies: What is posted, in turn; with none it is a GET.
        expected: What every answer must hold.
        required: The least ratio to the published version, where one is required.
    """

    name: str
    path: str
    bodies: Sequence[str]
    expected: str
    required: float | None


def loads(ports: Sequence[int]) -> list[Load]:
    """Return the loads that are measured, of these open ports."""
    # One port at a time means each in its turn. A connection leaves its local port in TIME-WAIT
    # for a minute, and to one port alone there would soon be none left.
    singles = [_body([port]) for port in ports]
    return [
        Load(f"{len(ports)} open ports", "/check-ports", [_body(ports)], _all(len(ports)), 3.5),
        Load("1 open port", "/check-ports", singles, _all(1), 2.0),
        Load("GET /health", "/health", [], '"ok"', None),
    ]


def requests_per_second(service_port: int, load: Load, directory: Path) -> float:
    """Put ``load`` on a service and return how many requests a second it answers.

    Args:
        service_port: Where it listens on loopback.
        load: What to ask it.
        directory: Where the script for wrk may be written.

    Raises:
        BenchmarkFailed: wrk failed, a connection did, or an answer was late or not the expected.
    """
    _require_expected_answer(service_port, load)
    url = f"http://{HOST}:{service_port}{load.path}"
    script = directory / "load.lua"
    script.write_text(_SCRIPT)
    options = ["--threads", "1", "--connections", str(CONNECTIONS)]
    options += ["--duration", f"{SECONDS}s", "--timeout", f"{_RETRY_DELAY}s"]
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
            f"{count['errors']} connections failed or answers came late"
        )
    return float(count["answers"]) / float(count["microseconds"]) * 1e6


def _require_expected_answer(service_port: int, load: Load) -> None:
    # Under load, answers about closed ports would be overlooked: they come when wrk has ended.
    connection = HTTPConnection(HOST, service_port, timeout=30)
    try:
        if load.bodies:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", load.path, load.bodies[0], headers)
        else:
            connection.request("GET", load.path)
        answer = connection.getresponse().read().decode()
    except (OSError, HTTPException) as error:
        raise BenchmarkFailed(f"{load.name}: no answer from port {service_port}") from error
    finally:
        connection.close()
    if load.expected not in answer:
        raise BenchmarkFailed(f"{load.name}: port {service_port} answered {answer}")


def _body(ports: Sequence[int]) -> str:
    return json.dumps({"provider_ip": HOST, "ports": list(ports)})


def _all(count: int) -> str:
    return f"Successfully verified {count} out of {count} ports"
