"""The HTTP interface, to the byte, over real sockets."""

import json
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import httpx
import pytest
from starlette.routing import Route

from port_checker.addresses import parse_networks
from port_checker.api.app import create_app
from port_checker.api.errors import STATUS
from port_checker.api.limits import RateLimiter
from port_checker.api.routes import MAX_BODY
from port_checker.checker import Checker, Reservation
from port_checker.connect import CheckFailed
from port_checker.schemas import ERROR_EXAMPLES, CheckPortsResponse, ErrorCode
from port_checker.settings import Rate, Settings
from tests.support.http import HEALTH, check_of, connected, read_answer
from tests.support.loopback import open_port, ports, refused_port, silent_port
from tests.support.namespace import loopback_alone, needs_root
from tests.support.service import serve
from tests.support.waiting import wait_until

# For tests that send more requests or ports than the limits allow.
UNLIMITED: Mapping[str, Any] = {
    "caller_rate_limit": None,
    "others_rate_limit": None,
    "target_rate_limit": None,
}


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with serve(**UNLIMITED, retries=1, timeout=1) as client:
        yield client


def check(
    client: httpx.Client, ports: object, ip: object = "127.0.0.1", **options: Any
) -> httpx.Response:
    return client.post("/check-ports", json={"provider_ip": ip, "ports": ports}, **options)


def error_of(answer: httpx.Response) -> tuple[int, str, str]:
    """The status, code and message of an error response, which has nothing else."""
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert list(body) == ["detail"]
    assert list(body["detail"]) == ["code", "message"]
    return answer.status_code, body["detail"]["code"], body["detail"]["message"]


def test_a_check_to_the_byte(client: httpx.Client) -> None:
    with open_port() as first, open_port() as second, refused_port() as third:
        answer = check(client, [first, second, third, first])
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.text == (
        '{"success":true,"results":{'
        f'"{first}":{{"accessible":true,"error":null}},'
        f'"{second}":{{"accessible":true,"error":null}},'
        f'"{third}":{{"accessible":false,"error":"Connection refused"}}}},'
        '"message":"Successfully verified 2 out of 3 ports"}'
    )


def test_no_accessible_port_is_no_success(client: httpx.Client) -> None:
    with silent_port() as silent:
        answer = check(client, [silent])
    assert answer.json() == {
        "success": False,
        "results": {str(silent): {"accessible": False, "error": "Connection timed out"}},
        "message": "Successfully verified 0 out of 1 ports",
    }


def test_the_content_type_is_ignored(client: httpx.Client) -> None:
    with open_port() as opened:
        body = json.dumps({"ports": [opened], "provider_ip": "127.0.0.1"})
        answer = client.post("/check-ports", content=body, headers={"content-type": "text/plain"})
    assert answer.json()["success"] is True


def test_ipv6_and_mapped_callers() -> None:
    """A listener on :: takes both families; ::ffff:127.0.0.1 is 127.0.0.1."""
    with serve(host="::", retries=1, timeout=0.2) as client, open_port("::1") as opened:
        assert check(client, [opened], "::1").json()["success"] is True
        assert error_of(check(client, [opened], "127.0.0.1"))[1] == "TARGET_NOT_ALLOWED"
        url = f"http://127.0.0.1:{client.base_url.port}"
        with httpx.Client(base_url=url) as client_ipv4, open_port() as opened_ipv4:
            for ip in ("127.0.0.1", "::ffff:127.0.0.1"):
                assert check(client_ipv4, [opened_ipv4], ip).json()["success"] is True


def test_health_to_the_byte(client: httpx.Client) -> None:
    answer = client.get("/health")
    assert (answer.status_code, answer.text) == (200, '{"status":"ok"}')
    assert answer.headers["content-type"] == "application/json"


def test_ip_is_the_callers_address() -> None:
    with serve(host="::") as client:
        assert client.get("/ip").text == '{"ip":"::1"}'
        port = client.base_url.port
        assert httpx.get(f"http://127.0.0.1:{port}/ip").text == '{"ip":"127.0.0.1"}'
        forwarded = {"x-forwarded-for": "203.0.113.7"}
        assert client.get("/ip", headers=forwarded).text == '{"ip":"203.0.113.7"}'
        assert client.get("/ip", headers={"x-forwarded-for": "?"}).text == '{"ip":null}'


PATHS = ["/health", "/ip", "/docs", "/openapi.json", "/"]


@pytest.mark.parametrize("path", PATHS)
def test_head_is_answered_like_get_without_a_body(client: httpx.Client, path: str) -> None:
    with connected(client) as sock:
        heads = []
        for method in "GET", "HEAD":
            request = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n\r\n"
            sock.sendall(request.encode() + HEALTH)
            head, _ = read_answer(sock, has_body=method == "GET")
            assert head.startswith(b"HTTP/1.1 200 OK\r\n")
            heads.append([line for line in head.splitlines() if not line.startswith(b"date:")])
            assert read_answer(sock)[1] == b'{"status":"ok"}'  # right behind it
    assert heads[0] == heads[1]


def test_every_get_route_answers_head() -> None:
    methods: dict[str, set[str]] = {}
    for route in create_app(Settings()).routes:
        assert isinstance(route, Route)
        methods.setdefault(route.path, set()).update(route.methods or ())
    assert {path for path, its in methods.items() if its != {"GET", "HEAD"}} == {
        "/check-ports",
        "/check-tls",
    }


def test_no_answer_may_be_cached(client: httpx.Client) -> None:
    with open_port() as opened:
        answers = [
            *(client.request(method, path) for path in PATHS for method in ("GET", "HEAD")),
            check(client, [opened]),
            check(client, [opened], "::1"),
            client.get("/nothing"),
            client.get("/check-ports"),
        ]
    assert [it.headers["cache-control"] for it in answers] == ["no-store"] * len(answers)


# Errors


def test_the_documented_errors(client: httpx.Client) -> None:
    """Each example's message, provoked; TARGET_NOT_ALLOWED and CHECK_FAILED in a namespace below.

    tests/test_schemas.py has all wrong bodies.
    """
    provoked = {
        ErrorCode.INVALID_IP: check(client, [80], "provider.example"),
        ErrorCode.INVALID_PORT: check(client, [70000]),
        ErrorCode.TOO_MANY_PORTS: check(client, list(range(1, 1002))),
        ErrorCode.INVALID_REQUEST: client.post("/check-ports", json={"provider_ip": "127.0.0.1"}),
        ErrorCode.REQUEST_TOO_LARGE: client.post("/check-ports", content=b" " * 65537),
    }
    limiter = RateLimiter(Rate(30, timedelta(minutes=1)), clock=lambda: 0.0)
    app = create_app(Settings(retries=1), limiter=limiter)
    with serve(app) as limited, open_port() as opened:
        for _ in range(30):
            assert check(limited, [opened]).status_code == 200
        provoked[ErrorCode.RATE_LIMITED] = check(limited, [opened])
    for code, answer in provoked.items():
        assert error_of(answer) == (STATUS[code], code, ERROR_EXAMPLES[code])


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_64_kib_is_refused(client: httpx.Client, chunked: bool) -> None:
    for size, expected in [(65536, (422, "INVALID_REQUEST")), (65537, (413, "REQUEST_TOO_LARGE"))]:
        body = b" " * size
        content = iter([body[:1000], body[1000:]]) if chunked else body
        assert error_of(client.post("/check-ports", content=content))[:2] == expected


def test_a_body_announced_as_too_long_is_refused_before_it_is_sent(client: httpx.Client) -> None:
    with connected(client) as sock:
        head = b"POST /check-ports HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
        sock.sendall(head % (MAX_BODY + 1))
        assert b" 413 " in read_answer(sock)[0]


@pytest.mark.parametrize(
    ("method", "path", "expected", "allow"),
    [
        ("POST", "/check-ports/", (404, "NOT_FOUND", "Not found. See /docs."), None),
        ("GET", "/static/nothing.js", (404, "NOT_FOUND", "Not found. See /docs."), None),
        ("POST", "/static/nothing.js", (404, "NOT_FOUND", "Not found. See /docs."), None),
        *(
            (method, path, (405, "METHOD_NOT_ALLOWED", "Method not allowed. See /docs."), allow)
            for method, path, allow in [
                ("GET", "/check-ports", "POST"),
                ("DELETE", "/health", "GET, HEAD"),
                ("POST", "/docs", "GET, HEAD"),
            ]
        ),
    ],
)
def test_wrong_paths_and_methods(
    client: httpx.Client, method: str, path: str, expected: tuple[int, str, str], allow: str | None
) -> None:
    answer = client.request(method, path)
    assert error_of(answer) == expected
    told = answer.headers.get("allow")
    assert (told and sorted(told.split(", "))) == (allow and sorted(allow.split(", ")))


def test_a_caller_that_disconnects_during_its_body_is_not_an_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with serve() as client:
        with socket.create_connection(("127.0.0.1", client.base_url.port or 0)) as caller:
            caller.sendall(
                b"POST /check-ports HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{"
            )
        client.get("/health")
    assert not caplog.records


def open_sockets() -> int:
    """How many sockets this process has; pytest opens files as it likes."""
    kinds = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            kinds.append(descriptor.readlink().name)
    return sum(kind.startswith("socket:") for kind in kinds)


def test_the_check_of_a_caller_that_disconnects_is_cancelled(
    caplog: pytest.LogCaptureFixture,
) -> None:
    checker = Checker(retries=10, retry_delay=30, timeout=30, max_in_flight=100)
    with ports(20, silent_port) as silent, serve(create_app(Settings(), checker=checker)) as client:
        before = open_sockets()
        with connected(client) as caller:
            caller.sendall(check_of(*silent))
            wait_until(lambda: checker.in_flight == 20, "the check to begin")
        wait_until(lambda: not checker.in_flight, "the check to end")
        wait_until(lambda: open_sockets() <= before, "its sockets to be closed")
        assert client.get("/health").status_code == 200
    assert not caplog.records


class BrokenChecker(Checker):
    """A checker with a bug."""

    async def check(self, *asked: object) -> NoReturn:
        raise ZeroDivisionError(asked)


def test_a_bug_is_logged_and_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    checker = BrokenChecker(retries=1, retry_delay=0, timeout=1, max_in_flight=10)
    with serve(create_app(Settings(), checker=checker)) as client:
        expected = (500, "INTERNAL_ERROR", "Internal error; it has been logged.")
        answer = check(client, [80])
        assert error_of(answer) == expected
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["connection"] == "close"
        assert client.get("/health").status_code == 200
    assert "ZeroDivisionError" in caplog.text


class ForbiddenChecker(Checker):
    """A checker that cannot connect to port 25."""

    async def check(self, *_: object) -> NoReturn:
        raise CheckFailed("could not connect: Operation not permitted", [25])


def test_ports_that_the_checker_may_not_connect_to_are_named() -> None:
    checker = ForbiddenChecker(retries=1, retry_delay=0, timeout=1, max_in_flight=10)
    with serve(create_app(Settings(), checker=checker)) as client:
        answer = check(client, [25, 80])
    assert answer.status_code == 503
    assert answer.json() == {
        "detail": {
            "code": "CHECK_FAILED",
            "message": "This service cannot connect to some of these ports (could not connect: "
            "Operation not permitted). That says nothing about them, nor about the others. "
            "Leave them out, or try again later.",
            "ports": [25],
        }
    }


# Who may check what


@needs_root
def test_who_may_be_checked() -> None:
    """In a namespace: if one of them were not refused, nobody would be reached."""
    wrong = ("::1", "10.0.0.1", "::ffff:10.0.0.1", "169.254.169.254", "fe80::1", "2002:a00:1::1")
    with loopback_alone(), serve(retries=1) as client:
        refused = [check(client, [80], ip) for ip in wrong]
        refused += [
            check(client, [80], headers={"x-forwarded-for": forwarded})
            for forwarded in ("unknown", "198.51.100.9")
        ]
        private = check(client, [80], "192.168.1.100")
        unrouted = check(client, [80], "2600::7")
    assert [error_of(answer)[:2] for answer in refused] == [(403, "TARGET_NOT_ALLOWED")] * 8
    for answer, code in (
        (private, ErrorCode.TARGET_NOT_ALLOWED),
        (unrouted, ErrorCode.CHECK_FAILED),
    ):
        assert answer.json()["detail"] == {"code": code, "message": ERROR_EXAMPLES[code]}


@needs_root
def test_addresses_that_are_not_the_callers_own() -> None:
    """A gateway's, link-local ones, and those that the operator forbids."""
    forbidden = ("198.51.100.200", "127.0.0.3")
    gateways = ("198.51.100.1", "fd01::1")
    network = (
        "ip link add one type veth peer name other",
        "ip address add 198.51.100.6/24 dev one",
        "ip address add fd01::6/64 dev one nodad",
        "ip link set one up",
        "ip link set other up",
        "ip route add default via 198.51.100.1",
        "ip -6 route add default via fd01::1",
    )
    denied = "198.51.100.128/25,127.0.0.3"
    with (
        loopback_alone(*network),
        serve(retries=1, timeout=0.1, denied_networks=denied) as client,
    ):
        for ip in (*gateways, "169.254.7.7", "fe80::7", *forbidden):
            headers = {"x-forwarded-for": ip}
            answer = check(client, [80], ip, headers=headers)
            assert error_of(answer)[:2] == (403, "TARGET_NOT_ALLOWED"), ip
            assert client.get("/ip", headers=headers).json() == {"ip": ip}
        own = "198.51.100.7"
        answer = check(client, [80], own, headers={"x-forwarded-for": own})
    assert answer.json()["results"] == {
        "80": {"accessible": False, "error": "Connection timed out"}
    }


def test_only_trusted_proxies_forward_addresses() -> None:
    with open_port() as opened:
        with serve(trusted_proxies="192.0.2.1", retries=1) as client:
            answer = client.get("/ip", headers={"x-forwarded-for": "198.51.100.9"})
            assert answer.json() == {"ip": "127.0.0.1"}
        with serve(retries=1) as client:
            for headers in {"x-forwarded-for": "127.0.0.1"}, {"via": "1.1 proxy"}:
                assert error_of(check(client, [opened], headers=headers))[0] == 403


# Limits


def test_a_caller_is_limited() -> None:
    with open_port() as opened, serve(caller_rate_limit="3/hour", retries=1) as client:
        for _ in range(3):
            assert check(client, [opened]).status_code == 200
        answer = check(client, [opened])
        assert error_of(answer)[:2] == (429, "RATE_LIMITED")
        assert 1 <= int(answer.headers["retry-after"]) <= 1200
        other = {"x-forwarded-for": "198.51.100.9"}
        assert error_of(check(client, [opened], headers=other))[1] == "TARGET_NOT_ALLOWED"
        assert client.get("/health").status_code == 200


OTHERS = {"x-forwarded-for": "198.51.100.9"}  # another caller than 127.0.0.1


def test_a_request_is_paid_for_before_its_body_is_read() -> None:
    with serve(caller_rate_limit="3/hour") as client:
        for content in (b"{", b'{"provider_ip": "x", "ports": []}', b"x" * (MAX_BODY + 1)):
            assert client.post("/check-ports", content=content).status_code in (413, 422)
        answer = client.post("/check-ports", content=b"x" * (MAX_BODY + 1))
        assert error_of(answer)[:2] == (429, "RATE_LIMITED")


def test_others_are_limited_and_an_owner_is_not() -> None:
    with (
        serve(
            others_rate_limit="20/hour",
            target_rate_limit="10/hour",
            max_ports=10,
            allowed_networks="127.0.0.0/8",
            retries=1,
        ) as client,
        refused_port() as refused,
    ):
        # Named twice, counted once.
        assert check(client, [refused, refused], headers=OTHERS).status_code == 200
        assert check(client, [refused, *range(1, 9)], headers=OTHERS).status_code == 200
        limited = check(client, [refused], headers=OTHERS)
        assert error_of(limited)[:2] == (429, "RATE_LIMITED")
        assert 350 <= int(limited.headers["retry-after"]) <= 360
        assert "Too many ports of 127.0.0.1" in error_of(limited)[2]
        for _ in range(3):
            assert check(client, [refused, *range(1, 9)]).status_code == 200
        of_another = {"provider_ip": "127.0.0.2", "ports": list(range(1, 11))}
        assert client.post("/check-ports", json=of_another, headers=OTHERS).status_code == 200
        limited = client.post("/check-ports", json=of_another, headers=OTHERS)
        assert "You ask for too many ports of others' addresses." in error_of(limited)[2]


def test_a_refused_request_costs_its_target_nothing() -> None:
    limits: dict[str, Any] = {"target_rate_limit": "2/hour", "max_ports": 2, "max_in_flight": 2}
    limits["allowed_networks"] = "127.0.0.1"
    with open_port() as opened, refused_port() as refused, serve(**limits, retries=1) as client:
        for _ in range(5):
            assert error_of(check(client, [opened, refused], headers=OTHERS))[1] == "OVERLOADED"
        for _ in range(2):
            assert check(client, [opened], headers=OTHERS).status_code == 200
        assert error_of(check(client, [opened], headers=OTHERS))[1] == "RATE_LIMITED"


def test_a_check_without_room_is_refused_and_not_queued() -> None:
    checker = Checker(retries=1, retry_delay=0, timeout=30, max_in_flight=5, max_per_caller=4)
    settings = Settings(allowed_networks=parse_networks("127.0.0.1"))
    with (
        ports(3, silent_port) as silent,
        open_port() as opened,
        serve(create_app(settings, checker=checker)) as client,
    ):
        with connected(client) as other:
            other.sendall(check_of(*silent))
            wait_until(lambda: checker.in_flight == 3)
            for asked, headers, *refusal in (
                ([1, 2], {}, 429, "RATE_LIMITED", "Too many checks of one caller are running."),
                ([1, 2, 3], OTHERS, 503, "OVERLOADED", "This service checks at most 2 ports of "),
                ([1, 2, 3, 4], OTHERS, 503, "OVERLOADED", "This service checks at most 2 ports of"),
            ):
                answer = check(client, asked, headers=headers)
                assert list(error_of(answer)[:2]) == refusal[:2]
                assert error_of(answer)[2].startswith(str(refusal[2]))
                assert answer.headers["retry-after"] == "30"
            assert checker.in_flight == 3
        wait_until(lambda: not checker.in_flight)
        assert check(client, [opened]).status_code == 200
        message = (
            "This service checks at most 4 ports of one caller at once. Send fewer per request."
        )
        assert error_of(check(client, [1, 2, 3, 4, 5])) == (429, "RATE_LIMITED", message)


def test_the_room_of_a_caller_can_be_set() -> None:
    settings: dict[str, Any] = {"max_ports": 2, "max_in_flight_per_caller": 2, "timeout": 30}
    with (
        ports(2, silent_port) as silent,
        open_port() as opened,
        serve(**settings, **UNLIMITED) as client,
        connected(client) as other,
    ):
        other.sendall(check_of(*silent))
        refusal = "Too many checks of one caller are running."
        wait_until(lambda: refusal in check(client, [opened]).text, "the check to begin")


class RecordingChecker(Checker):
    """A checker that records for whom room is reserved."""

    def __init__(self) -> None:
        super().__init__(retries=1, retry_delay=0, timeout=30, max_in_flight=10)
        self.reserved: list[tuple[object, ...]] = []

    def reserve(self, ports: int, **whose: Any) -> Reservation:
        self.reserved.append((whose["caller"], whose["network"], whose["is_own"]))
        return super().reserve(ports, **whose)


def test_room_is_that_of_a_subscriber_and_its_network() -> None:
    checker = RecordingChecker()
    settings = Settings(allowed_networks=parse_networks("127.0.0.1,::1"))
    with refused_port("::1") as refused, serve(create_app(settings, checker=checker)) as client:
        for caller, target in (
            ("2001:db8:1:2::7", "127.0.0.1"),
            ("127.0.0.9", "127.0.0.1"),
            ("unknown", "127.0.0.1"),
        ):
            answer = check(client, [refused], target, headers={"x-forwarded-for": caller})
            assert answer.status_code == 200
    assert checker.reserved == [
        ("2001:db8:1:2::/64", "2001:db8:1::/48", False),
        ("127.0.0.9", None, False),
        (None, None, False),
    ]


# OpenAPI


def test_the_schema_documents_every_error(client: httpx.Client) -> None:
    schema = client.get("/openapi.json").json()
    assert list(schema["paths"]) == [
        "/check-ports",
        "/check-tls",
        "/ip",
        "/health",
        "/port/{port}",
    ]
    operation = schema["paths"]["/check-ports"]["post"]
    assert list(schema["paths"]["/health"]["get"]["responses"]) == ["200"]
    error = {"$ref": "#/components/schemas/ErrorResponse"}
    documented = {}
    for status, answer in operation["responses"].items():
        content = answer["content"]["application/json"]
        if status == "200":
            example = content["example"]
            assert example == CheckPortsResponse.model_validate(example).model_dump(
                mode="json", exclude_unset=True
            )
            assert example["results"]["7466"] == {"accessible": True, "error": None}
        else:
            assert content["schema"] == error
            for code, shown in content["examples"].items():
                assert STATUS[ErrorCode(code)] == int(status)
                assert shown["value"]["detail"]["code"] == code
                documented[code] = shown["value"]["detail"]["message"]
    assert documented == ERROR_EXAMPLES
    body = operation["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/CheckPortsRequest"}
    request = schema["components"]["schemas"]["CheckPortsRequest"]
    assert request["required"] == ["provider_ip", "ports"]
    assert request["properties"]["ports"]["maxItems"] == 1000


def test_the_example_in_the_docs_works() -> None:
    with open_port() as port, serve(port=port, retries=1) as client:
        body = client.get("/openapi.json").json()["paths"]["/check-ports"]["post"]["requestBody"]
        first = next(iter(body["content"]["application/json"]["examples"].values()))["value"]
        assert client.post("/check-ports", json=first).json()["success"] is True
