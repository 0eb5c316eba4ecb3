"""The interface, to the byte, over real sockets."""

import concurrent.futures
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import httpx
import pytest

from port_checker.addresses import parse_networks
from port_checker.checker import Checker
from port_checker.schemas import ERROR_EXAMPLES, CheckResponse, ErrorCode
from port_checker.server.api import MAX_BODY
from port_checker.server.app import create_app
from port_checker.server.errors import STATUS
from port_checker.server.settings import Settings
from tests.support.loopback import open_port, ports, refused_port, silent_port
from tests.support.namespace import in_namespace, needs_root
from tests.support.service import serve

# For tests that ask more often, or for more, than the limits would let them.
UNLIMITED: Mapping[str, Any] = {"caller_rate_limit": None, "target_rate_limit": None}


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with serve(**UNLIMITED, retries=1, timeout=0.2) as client:
        yield client


def ask(
    client: httpx.Client, asked: object, ip: object = "127.0.0.1", **options: Any
) -> httpx.Response:
    return client.post("/check-ports", json={"provider_ip": ip, "ports": asked}, **options)


def error_of(answer: httpx.Response) -> tuple[int, str, str]:
    """The status, code and message of an answer in the one shape of errors, and nothing else."""
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert list(body) == ["detail"]
    assert list(body["detail"]) == ["code", "message"]
    return answer.status_code, body["detail"]["code"], body["detail"]["message"]


def test_the_documented_example_to_the_byte(client: httpx.Client) -> None:
    with open_port() as first, open_port() as second, refused_port() as third:
        answer = ask(client, [first, second, third])
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
        answer = ask(client, [silent])
    assert answer.json() == {
        "success": False,
        "results": {str(silent): {"accessible": False, "error": "Connection timed out"}},
        "message": "Successfully verified 0 out of 1 ports",
    }


def test_the_order_asked_is_kept_and_a_port_named_twice_counts_once(client: httpx.Client) -> None:
    with open_port() as opened, refused_port() as refused:
        asked = sorted([opened, refused], reverse=True)
        answer = ask(client, [*asked, opened, refused, opened])
    assert list(answer.json()["results"]) == [str(port) for port in asked]
    assert answer.json()["message"] == "Successfully verified 1 out of 2 ports"


def test_unknown_fields_and_the_content_type_are_ignored(client: httpx.Client) -> None:
    with open_port() as opened:
        body = json.dumps({"x": None, "ports": [opened], "provider_ip": "127.0.0.1", "y": [1]})
        answer = client.post("/check-ports", content=body, headers={"content-type": "text/plain"})
    assert answer.json()["success"] is True


def test_ipv6_and_mapped_callers() -> None:
    """A listener on :: takes both families; ::ffff:127.0.0.1 is 127.0.0.1."""
    with serve(host="::", retries=1, timeout=0.2) as client, open_port("::1") as opened:
        assert ask(client, [opened], "::1").json()["success"] is True
        assert error_of(ask(client, [opened], "127.0.0.1"))[1] == "TARGET_NOT_ALLOWED"
        with open_port() as opened_ipv4:
            url = f"http://127.0.0.1:{client.base_url.port}/check-ports"
            for ip in ("127.0.0.1", "::ffff:127.0.0.1"):
                answer = httpx.post(url, json={"provider_ip": ip, "ports": [opened_ipv4]})
                assert answer.json()["success"] is True


def test_health_to_the_byte(client: httpx.Client) -> None:
    answer = client.get("/health")
    assert (answer.status_code, answer.text) == (200, '{"status":"ok"}')
    assert answer.headers["content-type"] == "application/json"


def test_ip_tells_callers_their_address() -> None:
    with serve(host="::") as client:
        assert client.get("/ip").text == '{"ip":"::1"}'
        port = client.base_url.port
        assert httpx.get(f"http://127.0.0.1:{port}/ip").text == '{"ip":"127.0.0.1"}'
        forwarded = {"x-forwarded-for": "203.0.113.7"}
        assert client.get("/ip", headers=forwarded).text == '{"ip":"203.0.113.7"}'
        assert client.get("/ip", headers={"x-forwarded-for": "?"}).text == '{"ip":null}'


# Errors


LOCAL = '"provider_ip":"127.0.0.1"'
BAD_BODIES: list[tuple[bytes, str]] = [
    (b"", "INVALID_REQUEST"),
    (b"{", "INVALID_REQUEST"),
    (b"[]", "INVALID_REQUEST"),
    (b"null", "INVALID_REQUEST"),
    (b"\xff\xfe{}", "INVALID_REQUEST"),
    (b'{"provider_ip":"127.0.0.1\xff","ports":[80]}', "INVALID_REQUEST"),
    (b"[" * 50_000, "INVALID_REQUEST"),
    (b"{}", "INVALID_REQUEST"),
    (f"{{{LOCAL}}}".encode(), "INVALID_REQUEST"),
    (f'{{{LOCAL},"ports":[]}}'.encode(), "INVALID_REQUEST"),
    (f'{{{LOCAL},"ports":80}}'.encode(), "INVALID_REQUEST"),
    (f'{{{LOCAL},"ports":{{"80":1}}}}'.encode(), "INVALID_REQUEST"),
    (f'{{{LOCAL},"ports":null}}'.encode(), "INVALID_REQUEST"),
    (b'{"ports":[0]}', "INVALID_REQUEST"),  # provider_ip comes first, and is missing
    *(
        (f'{{{LOCAL},"ports":[{port}]}}'.encode(), "INVALID_PORT")
        for port in (
            *("0", "-1", "65536", "70000", "true", "null", '"80"', "80.5", "80.0", "1e2", "[80]"),
            *("{}", "[[[80]]]", "9" * 1000, '"' + "x" * 1000 + '"', '"\\u0000"', '"🚪"'),
        )
    ),
    (f'{{{LOCAL},"ports":{list(range(1, 1002))}}}'.encode(), "TOO_MANY_PORTS"),
    (f'{{{LOCAL},"ports":{[80] * 1001}}}'.encode(), "TOO_MANY_PORTS"),
    (f'{{{LOCAL},"ports":{[0] * 1001}}}'.encode(), "TOO_MANY_PORTS"),
    *(
        (f'{{"provider_ip":{ip},"ports":[80]}}'.encode(), "INVALID_IP")
        for ip in (
            *("null", "2130706433", '"2130706433"', '"127.1"', '"0x7f000001"', '"127.0.0.1 "'),
            *('" 127.0.0.1"', '"127.0.0.1:80"', '"[::1]"', '"::1%lo"', '"fe80::1%eth0"', '""'),
            *('"127.0.0.01"', '"localhost"', '"provider.example"', '["127.0.0.1"]', "{}", "true"),
            *('"127.0.0.1\\u0000"', '"🚪"', '"١٢٧.0.0.1"', '"127.0.0.1/32"', f'"{"1" * 9999}"'),
        )
    ),
    (b'{"provider_ip":"nobody","ports":[0]}', "INVALID_IP"),
    (b'{"provider_ip":"nobody"}', "INVALID_IP"),
]


@pytest.mark.parametrize(("body", "code"), BAD_BODIES)
def test_bad_bodies(client: httpx.Client, body: bytes, code: str) -> None:
    status, told, message = error_of(client.post("/check-ports", content=body))
    assert (status, told) == (422, code)
    assert len(message) < 300


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_64_kib_is_refused(client: httpx.Client, chunked: bool) -> None:
    body = b" " * (64 * 1024) + b"{"
    content = iter([body[:1000], body[1000:]]) if chunked else body
    status, code, message = error_of(client.post("/check-ports", content=content))
    assert (status, code) == (413, "REQUEST_TOO_LARGE")
    assert message == ERROR_EXAMPLES[ErrorCode.REQUEST_TOO_LARGE]


def test_a_body_of_64_kib_is_read(client: httpx.Client) -> None:
    answer = client.post("/check-ports", content=b" " * (64 * 1024))
    assert error_of(answer)[1] == "INVALID_REQUEST"


@pytest.mark.parametrize(
    ("method", "path", "expected", "allow"),
    [
        ("GET", "/", (404, "NOT_FOUND"), None),
        ("POST", "/check-ports/", (404, "NOT_FOUND"), None),
        ("GET", "/static-offline-docs/nothing.js", (404, "NOT_FOUND"), None),
        ("GET", "/redoc", (404, "NOT_FOUND"), None),
        ("GET", "/check-ports", (405, "METHOD_NOT_ALLOWED"), "POST"),
        ("DELETE", "/health", (405, "METHOD_NOT_ALLOWED"), "GET"),
        ("POST", "/docs", (405, "METHOD_NOT_ALLOWED"), "GET"),
        ("POST", "/static-offline-docs/swagger-ui.css", (405, "METHOD_NOT_ALLOWED"), "GET, HEAD"),
    ],
)
def test_wrong_paths_and_methods(
    client: httpx.Client, method: str, path: str, expected: tuple[int, str], allow: str | None
) -> None:
    answer = client.request(method, path)
    assert error_of(answer)[:2] == expected
    assert answer.headers.get("allow") == allow


def test_a_caller_that_leaves_amid_its_body_is_no_bug(caplog: pytest.LogCaptureFixture) -> None:
    with serve() as client:
        with socket.create_connection(("127.0.0.1", client.base_url.port or 0)) as caller:
            caller.sendall(b"POST /check-ports HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
        client.get("/health")
    assert not caplog.records


def test_a_caller_that_leaves_takes_its_check_with_it(caplog: pytest.LogCaptureFixture) -> None:
    checker = Checker(retries=3, retry_delay=1, timeout=5, max_in_flight=100)
    with ports(20, silent_port) as silent, serve(create_app(Settings(), checker=checker)) as client:
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(httpx.ReadTimeout):
            ask(client, silent, timeout=0.3)
        left = time.monotonic()
        while checker.in_flight or len(os.listdir("/proc/self/fd")) > before:
            assert time.monotonic() - left < 0.1
            time.sleep(0.005)
        assert client.get("/health").status_code == 200
    assert not caplog.records


class BrokenChecker(Checker):
    """A checker with a bug."""

    async def check(self, *asked: object) -> NoReturn:
        raise ZeroDivisionError(asked)


def test_a_bug_tells_nothing_of_itself(caplog: pytest.LogCaptureFixture) -> None:
    checker = BrokenChecker(retries=1, retry_delay=0, timeout=1, max_in_flight=10)
    with serve(create_app(Settings(), checker=checker)) as client:
        status, code, message = error_of(ask(client, [80]))
        assert (status, code) == (500, "INTERNAL_ERROR")
        assert message == "This service has a bug, and its operators a trace of it."
        assert client.get("/health").status_code == 200
    assert "ZeroDivisionError" in caplog.text


@needs_root
def test_who_may_be_checked() -> None:
    """In a namespace: were one of them not refused, nobody would be reached."""
    script = """
from tests.support.service import serve
with serve(retries=1) as client:
    for ip in ("::1", "10.0.0.1", "::ffff:10.0.0.1", "169.254.169.254", "fe80::1", "2002:a00:1::1"):
        print(client.post("/check-ports", json={"provider_ip": ip, "ports": [80]}).text)
    for forwarded in ("unknown", "198.51.100.9"):
        answer = client.post(
            "/check-ports",
            json={"provider_ip": "127.0.0.1", "ports": [80]},
            headers={"x-forwarded-for": forwarded},
        )
        print(answer.status_code, answer.text)
    print(client.post("/check-ports", json={"provider_ip": "192.168.1.100", "ports": [80]}).text)
    print(client.post("/check-ports", json={"provider_ip": "2600::7", "ports": [80]}).text)
"""
    *refused, example, unrouted = in_namespace(script).splitlines()
    assert len(refused) == 8
    for line in refused:
        assert '"code":"TARGET_NOT_ALLOWED"' in line
    assert json.loads(example)["detail"]["message"] == ERROR_EXAMPLES[ErrorCode.TARGET_NOT_ALLOWED]
    assert json.loads(unrouted)["detail"]["code"] == "CHECK_FAILED"
    assert json.loads(unrouted)["detail"]["message"] == ERROR_EXAMPLES[ErrorCode.CHECK_FAILED]


def test_allowed_networks_may_be_checked_by_anybody() -> None:
    with open_port() as opened, serve(allowed_networks="127.0.0.0/8", retries=1) as client:
        headers = {"x-forwarded-for": "198.51.100.9"}
        assert ask(client, [opened], headers=headers).json()["success"] is True
        assert error_of(ask(client, [opened], "::1", headers=headers))[0] == 403


def test_x_forwarded_for_counts_only_from_trusted_proxies() -> None:
    with open_port() as opened:
        own = {"x-forwarded-for": "127.0.0.1"}
        with serve(trusted_proxies="192.0.2.1", retries=1) as client:
            forged = {"x-forwarded-for": "198.51.100.9"}
            assert ask(client, [opened], headers=forged).json()["success"] is True
        with serve(retries=1) as client:
            assert error_of(ask(client, [opened], headers=own))[0] == 403  # a proxy's is nobody's
            assert ask(client, [opened]).json()["success"] is True


@pytest.mark.parametrize("field", ["Forwarded", "X-Real-IP", "Via"])
def test_a_trusted_proxy_that_forwards_nothing_leaves_the_caller_unknown(
    field: str, caplog: pytest.LogCaptureFixture
) -> None:
    with open_port() as opened, serve(retries=1) as client:
        for _ in range(3):
            silent = {field: "for=198.51.100.9"}
            assert error_of(ask(client, [opened], headers=silent))[1] == "TARGET_NOT_ALLOWED"
        both = {field: "for=198.51.100.9", "x-forwarded-for": "198.51.100.9"}
        assert client.get("/ip", headers=both).json() == {"ip": "198.51.100.9"}
    (warning,) = caplog.messages
    assert "A proxy at 127.0.0.1, which is in PORT_CHECKER_TRUSTED_PROXIES" in warning


# Limits


def test_a_caller_is_limited() -> None:
    with open_port() as opened, serve(caller_rate_limit="3/hour", retries=1) as client:
        for _ in range(3):
            assert ask(client, [opened]).status_code == 200
        answer = ask(client, [opened])
        assert error_of(answer)[:2] == (429, "RATE_LIMITED")
        assert 1190 < int(answer.headers["retry-after"]) <= 1200
        other = {"x-forwarded-for": "198.51.100.9"}
        assert error_of(ask(client, [opened], headers=other))[1] == "TARGET_NOT_ALLOWED"
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
        assert ask(client, [refused, refused], headers=OTHERS).status_code == 200
        assert ask(client, [refused, *range(1, 9)], headers=OTHERS).status_code == 200
        limited = ask(client, [refused], headers=OTHERS)
        assert error_of(limited)[:2] == (429, "RATE_LIMITED")
        assert 350 <= int(limited.headers["retry-after"]) <= 360
        assert "Too many ports of 127.0.0.1" in error_of(limited)[2]
        for _ in range(3):
            assert ask(client, [refused, *range(1, 9)]).status_code == 200
        of_another = {"provider_ip": "127.0.0.2", "ports": list(range(1, 11))}
        assert client.post("/check-ports", json=of_another, headers=OTHERS).status_code == 200
        limited = client.post("/check-ports", json=of_another, headers=OTHERS)
        assert "You ask for too many ports of others' addresses." in error_of(limited)[2]


def test_a_refused_request_costs_its_target_nothing() -> None:
    limits: dict[str, Any] = {"target_rate_limit": "2/hour", "max_ports": 2, "max_in_flight": 2}
    limits["allowed_networks"] = "127.0.0.1"
    with open_port() as opened, refused_port() as refused, serve(**limits, retries=1) as client:
        for _ in range(5):
            assert error_of(ask(client, [opened, refused], headers=OTHERS))[1] == "OVERLOADED"
        for _ in range(2):
            assert ask(client, [opened], headers=OTHERS).status_code == 200
        assert error_of(ask(client, [opened], headers=OTHERS))[1] == "RATE_LIMITED"


def test_no_room_is_told_at_once() -> None:
    checker = Checker(retries=1, retry_delay=0, timeout=1, max_in_flight=5, max_per_caller=3)
    settings = Settings(allowed_networks=parse_networks("127.0.0.1"))
    with (
        ports(3, silent_port) as silent,
        serve(create_app(settings, checker=checker)) as client,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        check = pool.submit(ask, client, silent)
        while not checker.in_flight:
            assert not check.done()
            time.sleep(0.01)
        refusals = [ask(client, silent[:1]), ask(client, [1, 2, 3, 4])]
        refusals += [ask(client, [1, 2, 3], headers=OTHERS)]
        assert [error_of(refusal) for refusal in refusals] == [
            (
                429,
                "RATE_LIMITED",
                "This service checks at most 3 ports at once for one caller. Try again in 1 s.",
            ),
            (
                429,
                "RATE_LIMITED",
                "This service checks at most 3 ports at once for one caller. "
                "Ask for fewer in one request.",
            ),
            (
                503,
                "OVERLOADED",
                "This service checks at most 2 ports at once of addresses that are not the "
                "caller's own. Ask for fewer in one request.",
            ),
        ]
        assert [refusal.headers["retry-after"] for refusal in refusals] == ["1"] * 3
        assert check.result().status_code == 200
        assert ask(client, silent[:1]).status_code == 200


# The bounds that SPEC promises, with the default settings


@pytest.mark.parametrize("requests", [10])
def test_default_settings_answer_in_time_and_health_meanwhile(requests: int) -> None:
    """Ten requests at once for 100 ports, of which 60 time out."""
    with (
        ports(60, silent_port) as silent,
        ports(40, open_port) as opened,
        serve(target_rate_limit=None) as client,
        concurrent.futures.ThreadPoolExecutor(requests) as pool,
    ):
        asked = [port for pair in zip(silent, opened, strict=False) for port in pair] + silent[40:]
        started = time.monotonic()
        checks = [pool.submit(ask, client, asked) for _ in range(requests)]
        waits = []
        while not all(check.done() for check in checks):
            before = time.monotonic()
            assert client.get("/health").status_code == 200
            waits.append(time.monotonic() - before)
            time.sleep(0.02)  # fifty times a second, as a monitor might in a hurry
        lasted = time.monotonic() - started
    expected = {
        str(port): {"accessible": port in opened, "error": None}
        if port in opened
        else {"accessible": False, "error": "Connection timed out"}
        for port in asked
    }
    for check in checks:
        assert check.result().json()["results"] == expected
    assert 17 <= lasted < 17.5
    assert sorted(waits)[int(len(waits) * 0.99)] < 0.05


# OpenAPI


def test_openapi_tells_the_truth(client: httpx.Client) -> None:
    schema = client.get("/openapi.json").json()
    assert list(schema["paths"]) == ["/check-ports", "/ip", "/health"]
    check = schema["paths"]["/check-ports"]["post"]
    health = schema["paths"]["/health"]["get"]
    assert (check["operationId"], health["operationId"]) == ("check_ports", "health")
    for operation in (check, health):
        assert operation["summary"]
        assert operation["tags"]
    assert sorted(check["responses"]) == ["200", "403", "413", "422", "429", "503"]
    assert sorted(health["responses"]) == ["200"]
    assert sorted(schema["components"]["schemas"]) == [
        *(
            "CallerAddress",
            "CheckResponse",
            "ErrorCode",
            "ErrorDetail",
            "ErrorResponse",
            "Health",
            "Verdict",
        ),
    ]
    error = {"$ref": "#/components/schemas/ErrorResponse"}
    documented = {}
    for status, answer in check["responses"].items():
        if status != "200":
            content = answer["content"]["application/json"]
            assert content["schema"] == error
            for code, example in content["examples"].items():
                assert STATUS[ErrorCode(code)] == int(status)
                assert example["value"]["detail"]["code"] == code
                documented[code] = example["value"]["detail"]["message"]
    assert documented == ERROR_EXAMPLES
    request = check["requestBody"]["content"]["application/json"]
    assert request["schema"]["required"] == ["provider_ip", "ports"]
    assert request["schema"]["properties"]["ports"]["maxItems"] == 1000
    example = check["responses"]["200"]["content"]["application/json"]["example"]
    assert example == CheckResponse.model_validate(example).model_dump(mode="json")
    assert list(example["results"]["50801"].items()) == [
        *(("accessible", False), ("error", "Connection refused")),
    ]
    assert example["results"]["7466"] == {"accessible": True, "error": None}


def test_documented_errors_are_what_is_answered(client: httpx.Client) -> None:
    """Each example's message, provoked; that of TARGET_NOT_ALLOWED in a namespace, above."""
    provoked = {
        ErrorCode.INVALID_IP: ask(client, [80], "provider.example"),
        ErrorCode.INVALID_PORT: ask(client, [70000]),
        ErrorCode.TOO_MANY_PORTS: ask(client, list(range(1, 1002))),
        ErrorCode.INVALID_REQUEST: client.post("/check-ports", json={"provider_ip": "127.0.0.1"}),
        ErrorCode.REQUEST_TOO_LARGE: client.post("/check-ports", content=b" " * 65537),
    }
    with serve(caller_rate_limit="30/minute", retries=1) as limited, open_port() as opened:
        for _ in range(30):
            assert ask(limited, [opened]).status_code == 200
        provoked[ErrorCode.RATE_LIMITED] = ask(limited, [opened])
    for code, answer in provoked.items():
        assert error_of(answer) == (STATUS[code], code, ERROR_EXAMPLES[code])


def test_try_it_out_is_prefilled_with_what_works() -> None:
    with open_port() as port, serve(port=port, retries=1) as client:
        body = client.get("/openapi.json").json()["paths"]["/check-ports"]["post"]["requestBody"]
        first = next(iter(body["content"]["application/json"]["examples"].values()))["value"]
        assert client.post("/check-ports", json=first).json()["success"] is True


def test_docs_need_no_internet(client: httpx.Client) -> None:
    page = client.get("/docs").text
    assert "https://" not in page
    assert '"validatorUrl": null' in page
    for path in ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png"):
        assert f"/static-offline-docs/{path}" in page
        assert client.get(f"/static-offline-docs/{path}").status_code == 200
