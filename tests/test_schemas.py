"""What a request may look like, the first fault that is told of one, and the answer to the byte."""

import json
from typing import Any

import pytest

from port_checker.addresses import parse_address
from port_checker.connect import OPEN, REFUSED, TIMED_OUT
from port_checker.schemas import (
    ERROR_EXAMPLES,
    CheckRequest,
    CheckResponse,
    ErrorCode,
    ErrorDetail,
    ErrorResponse,
    Health,
    InvalidRequest,
)


def short(value: object) -> str:
    """The name of a test's argument, of which some are 60,000 characters long."""
    return repr(value)[:40]


GOOD = b'{"provider_ip": "203.0.113.7", "ports": [80]}'
NOT_AN_OBJECT = "The body must be a JSON object with provider_ip and ports."
NOT_A_LIST = "ports must be a list of at least one port."


def fault(body: bytes | dict[str, Any], max_ports: int = 1000) -> tuple[str, str]:
    """The code and the message that a body is refused with."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(InvalidRequest) as error:
        CheckRequest.parse(raw, max_ports)
    message = str(error.value)
    assert len(message) < 300
    assert message.isprintable()
    message.encode()
    return error.value.code.value, message


def fault_of_ip(literal: bytes) -> tuple[str, str]:
    return fault(b'{"provider_ip": ' + literal + b', "ports": [80]}')


def fault_of_ports(literal: bytes) -> tuple[str, str]:
    return fault(b'{"provider_ip": "203.0.113.7", "ports": ' + literal + b"}")


def test_a_request() -> None:
    request = CheckRequest.parse(
        b'\r\n\t {"provider_ip": "203.0.113.7", "ports": [7466, 50800, 1, 65535]} \n', 4
    )
    assert request.provider_ip == parse_address("203.0.113.7")
    assert request.ports == [7466, 50800, 1, 65535]


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("0.0.0.0", "0.0.0.0"),  # noqa: S104  # whether it may be checked is asked elsewhere
        ("2001:DB8:0::7", "2001:db8::7"),
        ("::", "::"),
        ("fe80::1", "fe80::1"),
        ("::ffff:1.2.3.4", "1.2.3.4"),
        ("::FFFF:102:304", "1.2.3.4"),
        ("0000:0000:0000:0000:0000:ffff:203.113.113.107", "203.113.113.107"),
        (r"\u0031.2.3.4", "1.2.3.4"),  # JSON's own way to write a 1
    ],
)
def test_addresses(text: str, address: str) -> None:
    body = f'{{"provider_ip": "{text}", "ports": [80]}}'
    assert str(CheckRequest.parse(body.encode(), 1).provider_ip) == address


def test_a_port_named_twice_counts_once_where_it_was_named_first() -> None:
    body = b'{"provider_ip": "203.0.113.7", "ports": [81, 80, 81, 82, 80]}'
    assert CheckRequest.parse(body, 5).ports == [81, 80, 82]


def test_unknown_fields_are_ignored() -> None:
    body = (
        b'{"timeout": 60, "Ports": [0], "provider_ip": "203.0.113.7", "x": {"ports": []}, '
        b'"ports": [80], "": null, "y": [[[1e999]]], "\\u0000": "\\ud83d\\ude00"}'
    )
    assert CheckRequest.parse(body, 1).ports == [80]


def test_of_a_field_given_twice_the_last_counts() -> None:
    body = b'{"provider_ip": "nonsense", "ports": [0], "ports": [80], "provider_ip": "203.0.113.7"}'
    assert CheckRequest.parse(body, 1) == CheckRequest.parse(GOOD, 1)
    twice = b'{"provider_ip": "203.0.113.7", "provider_ip": "nonsense", "ports": [80]}'
    assert fault(twice)[0] == "INVALID_IP"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        GOOD[:-1],
        GOOD + b"x",
        GOOD + b"\0",
        GOOD + GOOD,
        GOOD[:-1] + b",}",
        GOOD.replace(b'"', b"'"),
        GOOD.replace(b": ", b"="),
        b"/* */" + GOOD,
        b"provider_ip=203.0.113.7&ports=80",
        b"\0",
        b"\xef\xbb\xbf" + GOOD,  # RFC 8259 section 8.1 forbids a byte order mark
        GOOD.decode().encode("utf-16"),
        GOOD.decode().encode("utf-16-le"),
        GOOD.decode().encode("utf-32"),
        b"\x1f\x8b\x08\x00",  # gzip
        b"\xff",
        GOOD.replace(b"203", b"\xff203"),
        GOOD.replace(b"203", b"\xc3203"),
        GOOD.replace(b"203", b"\xed\xa0\x80"),  # a surrogate in what would be UTF-8
        GOOD.replace(b"203", b"\xc0\x80"),  # an overlong NUL
        GOOD.replace(b"203", b"\n"),
        GOOD.replace(b"203", b"\\x"),
        GOOD.replace(b"203", b"\\ud800"),
        GOOD.replace(b"203", b"\\udc00\\ud800"),
        GOOD.replace(b"80", b'"\\ud800"'),
        GOOD.replace(b'"ports"', b'"\\udfff": 1, "ports"'),
        GOOD.replace(b"80", b"080"),
        GOOD.replace(b"80", b"+80"),
        GOOD.replace(b"80", b"0x50"),
        GOOD.replace(b"80", b"80,"),
        GOOD.replace(b"80", b"80 81"),
        GOOD.replace(b"80", b"True"),
        GOOD.replace(b"80", b"NaN"),
        GOOD.replace(b"80", b"Infinity"),
        GOOD.replace(b"80", b"-Infinity"),
        GOOD.replace(b'"ports"', b'"x": NaN, "ports"'),
        b"[" * 30_000,
        b"[" * 30_000 + b"]" * 30_000,
        b'{"ports":' * 7000,
        GOOD.replace(b"80", b"[" * 30_000 + b"]" * 30_000),
    ],
    ids=short,
)
def test_what_is_not_json_in_utf_8(body: bytes) -> None:
    code, message = fault(body)
    assert code == "INVALID_REQUEST"
    assert message.startswith("The body is not JSON in UTF-8: ")


@pytest.mark.parametrize(
    "body", [b"null", b"true", b"80", b'"203.0.113.7"', b"[]", b"[" + GOOD + b"]"]
)
def test_what_is_no_object(body: bytes) -> None:
    assert fault(body) == ("INVALID_REQUEST", NOT_AN_OBJECT)


@pytest.mark.parametrize(
    ("literal", "shown"),
    [
        *[
            (f'"{text}"'.encode(), f'"{text}"')
            for text in (
                "",
                " ",
                "provider.example",
                "localhost",
                "2130706433",
                "127.1",
                "0x7f000001",
                "0177.0.0.1",
                "01.2.3.4",
                "256.0.0.1",
                "1.2.3",
                "1.2.3.4.5",
                "127.0.0.1 ",
                " 127.0.0.1",
                "127.0.0.1:80",
                "127.0.0.1/32",
                "http://127.0.0.1/",
                "[::1]",
                "[::1]:80",
                "::1/128",
                ":::",
                "1::2::3",
                "fe80::1%eth0",
                "fe80::1%",
                "::ffff:1.2.3.4%1",
                "\u0661.2.3.4",
                "\U0001f600",
                "{shown}",
                r"\n",
                r"127.0.0.1\n",
                r"127.0.0.1\u0000",
                r"\u0000",
            )
        ],
        (b"null", "null"),
        (b"true", "true"),
        (b"2130706433", "2130706433"),
        (b"127.1", "127.1"),
        (b"1e999", "Infinity"),
        (b"[]", "[]"),
        (b'["203.0.113.7"]', '["203.0.113.7"]'),
        (b'{"a": 1}', '{"a": 1}'),
        (b'"' + b"x" * 60_000 + b'"', '"' + "x" * 39 + "…"),
        (b'"' + "\U0001f600".encode() * 15_000 + b'"', '"' + "\U0001f600" * 39 + "…"),
        (b'"' + b"\\u0000" * 10_000 + b'"', '"' + ("\\u0000" * 10)[:39] + "…"),
        (b"9" * 1000, "9" * 40 + "…"),
        (b"[" * 100 + b"]" * 100, "[" * 40 + "…"),
    ],
    ids=short,
)
def test_what_is_no_address(literal: bytes, shown: str) -> None:
    assert fault_of_ip(literal) == (
        "INVALID_IP",
        f"{shown} is not an IP address. Give an IPv4 or IPv6 address in a string, such as "
        '"203.0.113.7" or "2001:db8::7", without a host name, port, brackets or scope.',
    )


@pytest.mark.parametrize(
    "literal",
    [b"[]", b"null", b"true", b"80", b"80.5", b'"80"', b'""', b"{}", b'{"80": true}', b"9" * 1000],
    ids=short,
)
def test_what_is_no_list_of_ports(literal: bytes) -> None:
    assert fault_of_ports(literal) == ("INVALID_REQUEST", NOT_A_LIST)


@pytest.mark.parametrize(
    ("literal", "shown"),
    [
        (b"true", "true"),
        (b"false", "false"),
        (b"null", "null"),
        (b'"80"', '"80"'),
        (b'""', '""'),
        (b"80.5", "80.5"),
        (b"80.0", "80.0"),
        (b"8e1", "80.0"),
        (b"1e999", "Infinity"),
        (b"-0.0", "-0.0"),
        (b"[80]", "[80]"),
        (b"[[80]]", "[[80]]"),
        (b"[]", "[]"),
        (b"{}", "{}"),
        (b'{"port": 80}', '{"port": 80}'),
        (b'"{shown}"', '"{shown}"'),
        (b'"\\u0000"', '"\\u0000"'),
        ('"\U0001f600"'.encode(), '"\U0001f600"'),
        (b'"' + b"x" * 60_000 + b'"', '"' + "x" * 39 + "…"),
        (b"[" * 100 + b"]" * 100, "[" * 40 + "…"),
    ],
    ids=short,
)
def test_what_is_no_integer(literal: bytes, shown: str) -> None:
    told = ("INVALID_PORT", f"Port {shown} is not an integer (1-65535).")
    assert fault_of_ports(b"[" + literal + b"]") == told
    assert fault_of_ports(b"[80, " + literal + b", 81]") == told


@pytest.mark.parametrize(
    ("literal", "shown"),
    [
        (b"0", "0"),
        (b"-0", "0"),
        (b"-1", "-1"),
        (b"65536", "65536"),
        (b"70000", "70000"),
        (b"4294967376", "4294967376"),  # 80 in the lower 16 and 32 bits
        (b"18446744073709551696", "18446744073709551696"),
        (b"9" * 1000, "9" * 40 + "…"),
        (b"-" + b"9" * 1000, "-" + "9" * 39 + "…"),
    ],
    ids=short,
)
def test_what_is_out_of_range(literal: bytes, shown: str) -> None:
    told = ("INVALID_PORT", f"Port {shown} is out of range (1-65535).")
    assert fault_of_ports(b"[" + literal + b"]") == told
    assert fault_of_ports(b"[80, " + literal + b", 81]") == told


@pytest.mark.parametrize("digits", [4300, 4301, 5000, 60_000])
def test_numbers_longer_than_python_prints(digits: int) -> None:
    """JSON readers may limit what numbers they take (RFC 8259 section 6); ours does at 4,300."""
    assert fault_of_ports(b"[" + b"9" * digits + b"]")[0] in ("INVALID_PORT", "INVALID_REQUEST")
    assert fault_of_ip(b"9" * digits)[0] in ("INVALID_IP", "INVALID_REQUEST")


def test_the_first_of_several_bad_ports_is_named() -> None:
    assert fault_of_ports(b'[80, 0, "80", 70000]')[1] == "Port 0 is out of range (1-65535)."
    assert fault_of_ports(b'[80, "80", 0]')[1] == 'Port "80" is not an integer (1-65535).'


@pytest.mark.parametrize(
    "ports",
    [list(range(1, 1002)), [80] * 1001, [*range(1, 1001), 0], ["80", *range(1, 1001)], [[]] * 1001],
    ids=short,
)
def test_too_many_ports_are_told_before_a_bad_one(ports: list[object]) -> None:
    told = ("TOO_MANY_PORTS", ERROR_EXAMPLES[ErrorCode.TOO_MANY_PORTS])
    assert fault({"provider_ip": "203.0.113.7", "ports": ports}) == told


def test_the_most_ports() -> None:
    body = json.dumps({"provider_ip": "203.0.113.7", "ports": list(range(1, 1001))}).encode()
    assert CheckRequest.parse(body, 1000).ports == list(range(1, 1001))
    message = "1000 ports are too many for one request. Ask for at most 999 at a time."
    assert fault(body, 999) == ("TOO_MANY_PORTS", message)


PROVIDER_IP_MISSING = ("INVALID_REQUEST", "provider_ip is missing.")
PORTS_MISSING = ("INVALID_REQUEST", "ports is missing.")


def test_what_is_missing() -> None:
    assert fault({}) == PROVIDER_IP_MISSING
    assert fault({"ports": [80]}) == PROVIDER_IP_MISSING
    assert fault({"provider_ip": "203.0.113.7"}) == PORTS_MISSING
    assert fault({"Provider_IP": "203.0.113.7", "ports": [80]}) == PROVIDER_IP_MISSING


@pytest.mark.parametrize("ports", [[0], ["80"], [], None, "80", [80] * 1001], ids=short)
def test_a_fault_of_provider_ip_is_told_before_one_of_ports(ports: object) -> None:
    for body in ({"provider_ip": "x", "ports": ports}, {"ports": ports, "provider_ip": "x"}):
        assert fault(body)[0] == "INVALID_IP"
    assert fault({"ports": ports}) == PROVIDER_IP_MISSING
    assert fault({"provider_ip": "x"})[0] == "INVALID_IP"


def test_a_fault_of_the_body_is_told_before_all() -> None:
    code, message = fault(b'{"provider_ip": "x", "ports": [0]')
    assert (code, message[:20]) == ("INVALID_REQUEST", "The body is not JSON")


def test_the_documented_faults() -> None:
    examples = {
        ErrorCode.INVALID_IP: fault({"provider_ip": "provider.example", "ports": [80]}),
        ErrorCode.INVALID_PORT: fault({"provider_ip": "203.0.113.7", "ports": [70000]}),
        ErrorCode.INVALID_REQUEST: fault({"provider_ip": "203.0.113.7"}),
    }
    for code, told in examples.items():
        assert told == (code.value, ERROR_EXAMPLES[code])


def test_the_documented_answer_to_the_byte() -> None:
    answer = CheckResponse.of({7466: OPEN, 50800: OPEN, 50801: REFUSED})
    assert answer.model_dump_json() == (
        '{"success":true,'
        '"results":{"7466":{"accessible":true,"error":null},'
        '"50800":{"accessible":true,"error":null},'
        '"50801":{"accessible":false,"error":"Connection refused"}},'
        '"message":"Successfully verified 2 out of 3 ports"}'
    )


def test_no_accessible_port_is_no_success() -> None:
    assert CheckResponse.of({2: TIMED_OUT, 1: REFUSED}).model_dump_json() == (
        '{"success":false,'
        '"results":{"2":{"accessible":false,"error":"Connection timed out"},'
        '"1":{"accessible":false,"error":"Connection refused"}},'
        '"message":"Successfully verified 0 out of 2 ports"}'
    )


def test_one_accessible_port_is_a_success() -> None:
    answer = CheckResponse.of({1: REFUSED, 2: OPEN, 3: REFUSED})
    assert answer.success
    assert answer.message == "Successfully verified 1 out of 3 ports"


def test_the_shapes_of_health_and_errors() -> None:
    assert Health().model_dump_json() == '{"status":"ok"}'
    detail = ErrorDetail(code=ErrorCode.INVALID_PORT, message="No.")
    shape = '{"detail":{"code":"INVALID_PORT","message":"No."}}'
    assert ErrorResponse(detail=detail).model_dump_json() == shape
