"""What a request may look like, which error each wrong one gets, and the response to the byte."""

import json
import subprocess
import sys
from codecs import BOM_UTF8

import pytest

from port_checker.addresses import parse_address
from port_checker.connect import (
    HOST_UNREACHABLE,
    NETWORK_UNREACHABLE,
    OPEN,
    REFUSED,
    TIMED_OUT,
    Verdict,
    VerdictKind,
)
from port_checker.schemas import (
    ERROR_EXAMPLES,
    TLS_ERROR_EXAMPLES,
    CheckPortsRequest,
    CheckPortsResponse,
    CheckTlsRequest,
    CheckTlsResponse,
    ErrorCode,
    ErrorDetail,
    ErrorResponse,
    Health,
    InvalidRequest,
    PortsToCheck,
    port_results_json,
)
from port_checker.tls import TlsVerdict, TlsVerdictKind
from port_checker.verdicts import port_verdict

GOOD = b'{"provider_ip": "203.0.113.7", "ports": [80]}'
NOT_JSON = "The body is not valid JSON in UTF-8: "
NOT_AN_OBJECT = "The body must be a JSON object with provider_ip and ports."
NOT_A_LIST = "ports must be a list of at least one port number."
NOT_AN_IP = (
    " is not an IP address. Use an IPv4 or IPv6 address in a string, such as "
    '"203.0.113.7" or "2001:db8::7": no host name, port, brackets or scope id.'
)
NO_INTEGER = " is not an integer (1-65535)."
OUT_OF_RANGE = " is out of range (1-65535)."


def short(value: object) -> str:
    """The name of a test's argument; some are 60,000 characters long."""
    return repr(value)[:40]


def asking(ip: str = '"203.0.113.7"', ports: str = "[80]") -> bytes:
    return f'{{"provider_ip": {ip}, "ports": {ports}}}'.encode()


def with_port(port: str) -> bytes:
    return asking(ports=f"[80, {port}, 81]")


def parse(body: bytes, max_ports: int = 1000) -> PortsToCheck:
    return CheckPortsRequest.parse(body, max_ports)


@pytest.mark.parametrize(
    ("body", "ip", "ports"),
    [
        (b"\r\n\t " + asking(ports="[7466, 1, 65535]") + b" \n", "203.0.113.7", [7466, 1, 65535]),
        (asking('"2001:DB8:0::7"'), "2001:db8::7", [80]),
        (asking('"::ffff:1.2.3.4"'), "1.2.3.4", [80]),
        (asking('"::FFFF:102:304"'), "1.2.3.4", [80]),
        (asking('"0000:0000:0000:0000:0000:ffff:203.113.113.107"'), "203.113.113.107", [80]),
        (asking(r'"\u0031.2.3.4"'), "1.2.3.4", [80]),  # JSON's own way to write a 1
        # A number without a fraction is an integer, however it is written.
        (asking(ports="[80.0, 81, 8.2e1, 80]"), "203.0.113.7", [80, 81, 82]),
        (BOM_UTF8 + asking(), "203.0.113.7", [80]),
        # Duplicates count once, where they come first.
        (asking(ports="[81, 80, 81, 82, 80]"), "203.0.113.7", [81, 80, 82]),
        # Unknown fields are ignored.
        (
            b'{"timeout": 60, "Ports": [0], "provider_ip": "1.2.3.4", "x": {"ports": []}, '
            b'"ports": [80], "": null, "y": [[[1e999]]], "\\u0000": "\\ud83d\\ude00"}',
            "1.2.3.4",
            [80],
        ),
        # Of a field given twice, the last counts.
        (b'{"provider_ip": "x", "ports": [0], ' + asking()[1:], "203.0.113.7", [80]),
        (asking(ports=str(list(range(1, 1001)))), "203.0.113.7", list(range(1, 1001))),
    ],
    ids=short,
)
def test_valid_requests(body: bytes, ip: str, ports: list[int]) -> None:
    request = parse(body)
    assert (request.provider_ip, request.ports) == (parse_address(ip), ports)
    assert {type(port) for port in request.ports} == {int}


NO_ADDRESSES = r"""
    provider.example localhost 2130706433 127.1 0x7f000001 0177.0.0.1 01.2.3.4 256.0.0.1 1.2.3
    1.2.3.4.5 127.0.0.1:80 127.0.0.1/32 http://127.0.0.1/ [::1] [::1]:80 ::1/128 ::: 1::2::3
    fe80::1%eth0 fe80::1% ::ffff:1.2.3.4%1 😀 {shown} \n 127.0.0.1\n 127.0.0.1\u0000
"""
TOO_MANY: list[list[object]] = [[80] * 1001, [*range(1, 1001), 0], [[]] * 1001]
# Each wrong body, its error code, and how the message begins.
BAD_BODIES: list[tuple[bytes, str, str]] = [
    *(
        (body, "INVALID_REQUEST", NOT_JSON)
        for body in (
            b"",
            b"{",
            GOOD + b"x",
            GOOD + b"\0",
            GOOD + GOOD,
            GOOD[:-1] + b",}",
            GOOD.replace(b'"', b"'"),
            b"provider_ip=203.0.113.7&ports=80",
            GOOD.decode().encode("utf-16"),
            b"\x1f\x8b\x08\x00",  # gzip
            BOM_UTF8 * 2 + GOOD,
            GOOD.replace(b"203", b"\xff203"),
            GOOD.replace(b"203", b"\xed\xa0\x80"),  # a surrogate in UTF-8
            GOOD.replace(b"203", b"\xc0\x80"),  # an overlong NUL
            GOOD.replace(b"203", b"\n"),
            GOOD.replace(b"203", b"\\ud800"),
            *(with_port(port) for port in ('"\\ud800"', "080", "+80", "0x50", "True", "NaN")),
            *(with_port(port) for port in ("Infinity", "-Infinity", "80 81", "[" * 30_000)),
            asking('"203.0.113.7"', "[0]")[:-1],  # the body comes before ports
            b'{"ports":' * 7000,
            b"[" * 30_000 + b"]" * 30_000,
        )
    ),
    *(
        (body, "INVALID_REQUEST", NOT_AN_OBJECT)
        for body in (b"null", b"true", b"80", b'"203.0.113.7"', b"[]", b"[" + GOOD + b"]")
    ),
    (b"{}", "INVALID_REQUEST", "provider_ip is missing."),
    (b'{"ports": [0]}', "INVALID_REQUEST", "provider_ip is missing."),
    (b'{"Provider_IP": "::1", "ports": [80]}', "INVALID_REQUEST", "provider_ip is missing."),
    (b'{"provider_ip": "203.0.113.7"}', "INVALID_REQUEST", "ports is missing."),
    *((asking(f'"{text}"'), "INVALID_IP", f'"{text}"{NOT_AN_IP}') for text in NO_ADDRESSES.split()),
    *(
        (asking(ip), "INVALID_IP", shown + NOT_AN_IP)
        for ip, shown in [
            *((ip, ip) for ip in ('""', '" 1.2.3.4"', '"1.2.3.4 "', "null", "true", "127.1")),
            *((ip, ip) for ip in ("2130706433", "[]", '["203.0.113.7"]', '{"a": 1}')),
            ("1e999", "Infinity"),
            (f'"{"x" * 60_000}"', '"' + "x" * 39 + "…"),
            (f'"{"😀" * 15_000}"', '"' + "😀" * 39 + "…"),
            ("9" * 1000, "9" * 40 + "…"),
            ("[" * 100 + "]" * 100, "[" * 40 + "…"),
        ]
    ),
    (b'{"provider_ip": "x"}', "INVALID_IP", '"x"'),  # provider_ip comes before ports
    (b'{"ports": [0], "provider_ip": "x"}', "INVALID_IP", '"x"'),
    *(
        (asking(ports=ports), "INVALID_REQUEST", NOT_A_LIST)
        for ports in ("[]", "null", "true", "80", '"80"', "{}", '{"80": true}', "9" * 1000)
    ),
    *(
        (with_port(port), "INVALID_PORT", f"Port {shown}{NO_INTEGER}")
        for port, shown in [
            *((port, port) for port in ("true", "false", "null", '"80"', '""', "80.5", "[80]")),
            *((port, port) for port in ("[]", "{}", '{"port": 80}', '"{shown}"', '"😀"')),
            ("1e999", "Infinity"),
            (f'"{"x" * 60_000}"', '"' + "x" * 39 + "…"),
        ]
    ),
    *(
        (with_port(port), "INVALID_PORT", f"Port {shown}{OUT_OF_RANGE}")
        for port, shown in [
            *((port, port) for port in ("0", "-1", "65536", "70000")),
            ("-0.0", "0"),
            ("7e4", "70000"),
            ("4294967376", "4294967376"),  # 80 in the lower 16 and 32 bits
            ("18446744073709551696", "18446744073709551696"),
            ("9" * 1000, "9" * 40 + "…"),
        ]
    ),
    # The first wrong port is named, unless there are too many.
    (asking(ports='[80, 0, "80", 70000]'), "INVALID_PORT", f"Port 0{OUT_OF_RANGE}"),
    (asking(ports='[80, "80", 0]'), "INVALID_PORT", f'Port "80"{NO_INTEGER}'),
    *(
        (asking(ports=json.dumps(ports)), "TOO_MANY_PORTS", "1001 ports are too many: send at most")
        for ports in TOO_MANY
    ),
]


@pytest.mark.parametrize(("body", "code", "message"), BAD_BODIES, ids=short)
def test_bad_bodies(body: bytes, code: str, message: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        parse(body)
    told = str(error.value)
    assert (error.value.code.value, told[: len(message)]) == (code, message)
    assert len(told) < 300
    assert told.isprintable()
    told.encode()


@pytest.mark.parametrize("digits", [4300, 4301, 60_000])
def test_numbers_that_python_does_not_print(digits: int) -> None:
    """JSON parsers may limit numbers (RFC 8259 section 6); pydantic's does at 4,300 digits."""
    for body in (with_port("9" * digits), asking("9" * digits)):
        with pytest.raises(InvalidRequest):
            parse(body)


# Each of these has a number that this Python parses, and may not print.
FEW_DIGITS = """
from port_checker.schemas import CheckPortsRequest, CheckTlsRequest, InvalidRequest

def error(parse, *arguments):
    try:
        parse(*arguments)
    except InvalidRequest as error:
        print(error.code)

number = b"1" * 1000
for port in number, b"-" + number, b"[%s]" % number:
    error(CheckPortsRequest.parse, b'{"provider_ip": "::1", "ports": [%s]}' % port, 1000)
    error(CheckTlsRequest.parse, b'{"host": "::1", "port": %s}' % port)
error(CheckPortsRequest.parse, b'{"provider_ip": %s, "ports": [1]}' % number, 1000)
"""


def test_numbers_that_python_is_told_not_to_print() -> None:
    words = [sys.executable, "-X", "int_max_str_digits=640", "-c", FEW_DIGITS]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["INVALID_PORT"] * 6 + ["INVALID_IP"]


def test_the_documented_errors() -> None:
    for body, code in [
        (asking('"provider.example"'), ErrorCode.INVALID_IP),
        (asking(ports="[70000]"), ErrorCode.INVALID_PORT),
        (asking(ports=str([80] * 1001)), ErrorCode.TOO_MANY_PORTS),
        (b'{"provider_ip": "203.0.113.7"}', ErrorCode.INVALID_REQUEST),
    ]:
        with pytest.raises(InvalidRequest) as error:
            parse(body)
        assert (error.value.code, str(error.value)) == (code, ERROR_EXAMPLES[code])


def test_responses_to_the_byte() -> None:
    assert port_results_json({50801: REFUSED, 7466: OPEN, 50800: OPEN}) == (
        '{"success":true,'
        '"results":{"50801":{"accessible":false,"error":"Connection refused"},'
        '"7466":{"accessible":true,"error":null},'
        '"50800":{"accessible":true,"error":null}},'
        '"message":"Successfully verified 2 out of 3 ports"}'
    )
    assert port_results_json({1: REFUSED}) == (
        '{"success":false,"results":{"1":{"accessible":false,"error":"Connection refused"}},'
        '"message":"Successfully verified 0 out of 1 ports"}'
    )
    assert Health().model_dump_json() == '{"status":"ok"}'
    detail = ErrorDetail(code=ErrorCode.INVALID_PORT, message="No.")
    assert ErrorResponse(detail=detail).model_dump_json(exclude_none=True) == (
        '{"detail":{"code":"INVALID_PORT","message":"No."}}'
    )


@pytest.mark.parametrize(
    "verdict",
    [
        *(OPEN, REFUSED, TIMED_OUT, HOST_UNREACHABLE, NETWORK_UNREACHABLE),
        Verdict(VerdictKind.OTHER, "Permission denied"),
    ],
)
def test_a_verdict_is_read_as_it_was_sent(verdict: Verdict) -> None:
    sent = port_results_json({1: verdict})
    result = CheckPortsResponse.model_validate_json(sent).results["1"]
    assert port_verdict(result.accessible, result.error) == verdict


# POST /check-tls


def shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:40] + "…"


def parse_tls(**fields: object) -> CheckTlsRequest:
    return CheckTlsRequest.parse(json.dumps(fields).encode())


@pytest.mark.parametrize(
    ("host", "expected_ip", "target", "expected", "peer"),
    [
        ("203.0.113.7", None, "203.0.113.7", ["203.0.113.7"], "203.0.113.7:443"),
        ("203.0.113.7", "203.0.113.7", "203.0.113.7", ["203.0.113.7"], "203.0.113.7:443"),
        ("203.0.113.7", "::1", "203.0.113.7", ["203.0.113.7", "::1"], "203.0.113.7:443"),
        ("::ffff:203.0.113.7", None, "203.0.113.7", ["203.0.113.7"], "203.0.113.7:443"),
        ("2001:DB8::7", None, "2001:db8::7", ["2001:db8::7"], "[2001:db8::7]:443"),
        ("A.example", "203.0.113.7", "203.0.113.7", ["A.example"], "A.example:443"),
        ("localhost", "::1", "::1", ["localhost"], "localhost:443"),
        ("1.2.3.4.x--y", "::1", "::1", ["1.2.3.4.x--y"], "1.2.3.4.x--y:443"),
    ],
)
def test_tls_endpoints(
    host: str, expected_ip: str | None, target: str, expected: list[str], peer: str
) -> None:
    asked = parse_tls(host=host, port=443, expected_ip=expected_ip)
    assert str(asked.target) == target
    assert [str(subject) for subject in asked.expected] == expected
    response = CheckTlsResponse.of(asked, TlsVerdict(TlsVerdictKind.UNTRUSTED, "No."))
    assert response.model_dump_json(exclude_unset=True) == (
        f'{{"valid":false,"error":"No.","peer":"{peer}","not_after":null}}'
    )


NO_HOST = " is neither an IP address nor a DNS name."
NO_HOSTS: list[object] = [
    *("", "a..b", ".a", "a.", "a_b.example", "-a.example", "a-.example", "a b", "a\n", "a:443"),
    *("[::1]", "fe80::1%eth0", "203.0.113.07", "127.1", "2130706433", "0x7f.1", "é.example"),
    *("*.example", "a" * 64, "a." * 126 + "aa", "x" * 60_000, None, 7, True, [], {}),
]


@pytest.mark.parametrize(
    ("fields", "code", "message"),
    [
        *(({"host": host}, "INVALID_IP", shown(host) + NO_HOST) for host in NO_HOSTS),
        ({}, "INVALID_REQUEST", "host is missing."),
        ({"expected_ip": "x", "port": 0}, "INVALID_REQUEST", "host is missing."),
        ({"host": "::1", "expected_ip": "a.example"}, "INVALID_IP", '"a.example"' + NOT_AN_IP),
        ({"host": "a.example", "expected_ip": 7, "port": 0}, "INVALID_IP", "7" + NOT_AN_IP),
        ({"host": "a.example", "port": 0}, "INVALID_REQUEST", "expected_ip is missing."),
        ({"host": "a.example", "expected_ip": None}, "INVALID_REQUEST", "expected_ip is missing."),
        ({"host": "::1"}, "INVALID_REQUEST", "port is missing."),
        *(
            ({"host": "::1", "port": port}, "INVALID_PORT", f"Port {shown(port)}{NO_INTEGER}")
            for port in ["80", 80.5, True, None, [80]]
        ),
        ({"host": "::1", "port": 0}, "INVALID_PORT", f"Port 0{OUT_OF_RANGE}"),
        ({"host": "::1", "port": 65536}, "INVALID_PORT", f"Port 65536{OUT_OF_RANGE}"),
    ],
    ids=short,
)
def test_bad_tls_requests(fields: dict[str, object], code: str, message: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        parse_tls(**fields)
    told = str(error.value)
    assert (error.value.code.value, told[: len(message)]) == (code, message)
    assert len(told) < 300


def test_a_tls_request_is_a_json_object() -> None:
    with pytest.raises(InvalidRequest, match="must be a JSON object with host and port"):
        CheckTlsRequest.parse(b"[]")


def test_the_documented_errors_of_check_tls() -> None:
    for fields in {"host": "203.0.113.7:443"}, {"host": "provider.example", "port": 443}:
        with pytest.raises(InvalidRequest) as error:
            parse_tls(**fields)
        assert str(error.value) == TLS_ERROR_EXAMPLES[error.value.code]
