"""Every setting: what it may be, where it is read, and what the operator is told if it is wrong."""

import os
import subprocess
import sys
from datetime import timedelta
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Any

import pytest
from dotenv import dotenv_values

from port_checker.settings import (
    Endpoint,
    Rate,
    Settings,
    SettingsError,
    load_settings,
    unknown_names,
)
from tests.support.namespace import ROOT, needs_root

FIELDS = {str(field.validation_alias): name for name, field in Settings.model_fields.items()}
NETWORKS = (IPv4Network("10.0.0.0/8"), IPv4Network("192.0.2.7/32"), IPv6Network("fd00::/8"))


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        *[
            ("PORT_CHECKER_HOST", host, host)
            for host in ("127.0.0.1", "::", "localhost", "unix:/run/x.sock")
        ],
        ("PORT_CHECKER_PORT", "1", 1),
        ("PORT_CHECKER_PORT", "65535", 65535),
        ("PORT_CHECKER_DEBUG", "true", True),
        ("PORT_CHECKER_DEBUG", "0", False),
        ("PORT_CHECKER_WORKERS", "64", 64),
        ("PORT_CHECKER_TRUSTED_PROXIES", "", ()),
        ("PORT_CHECKER_TRUSTED_PROXIES", "10.0.0.0/8, 192.0.2.7 ,\nfd00::/8\n", NETWORKS),
        ("PORT_CHECKER_TRUSTED_PROXIES", "::ffff:10.0.0.0/104", (NETWORKS[0],)),
        ("PORT_CHECKER_ALLOWED_HOSTS", "", ()),
        (
            "PORT_CHECKER_ALLOWED_HOSTS",
            "Checker.example., *.checker.example,my_box",
            ("checker.example", "*.checker.example", "my_box"),
        ),
        ("PORT_CHECKER_CONTACT", "noc@checker.example", "noc@checker.example"),
        ("PORT_CHECKER_CONTACT", "https://checker.example/who", "https://checker.example/who"),
        ("PORT_CHECKER_RATE_LIMIT", "off", None),
        ("PORT_CHECKER_RATE_LIMIT", "1/second", Rate(1, timedelta(seconds=1))),
        ("PORT_CHECKER_RATE_LIMIT", "999999999/hour", Rate(999_999_999, timedelta(hours=1))),
        *[
            ("PORT_CHECKER_RATE_LIMIT_STORE", store, store)
            for store in (
                "memory://",
                "redis://localhost",
                "redis://:s3cret@192.0.2.7/15",
                "redis://user:s3:cr%2Fet@[2001:db8::7]:65535/",
                "rediss://user:s3cret@redis.example:6380/0",
            )
        ],
        (
            "PORT_CHECKER_PERSPECTIVES",
            "https://ams.example, http://[::1]:9000/checker/ ,https://ams.example/",
            ("https://ams.example", "http://[::1]:9000/checker"),
        ),
        ("PORT_CHECKER_PERSPECTIVES_MODE", "observe", "observe"),
        ("PORT_CHECKER_METRICS", "false", None),
        ("PORT_CHECKER_METRICS", "", None),
        ("PORT_CHECKER_METRICS", "127.0.0.1:9464", Endpoint("127.0.0.1", 9464)),
        ("PORT_CHECKER_METRICS", "[::1]:65535", Endpoint("::1", 65535)),
        ("PORT_CHECK_RETRIES", "10", 10),
        ("PORT_CHECK_RETRY_DELAY", "0", 0.0),
        ("PORT_CHECK_RETRY_DELAY", "30", 30.0),
        ("PORT_CHECK_TIMEOUT", "0.1", 0.1),
        ("PORT_CHECK_TIMEOUT", "30", 30.0),
        ("PORT_CHECK_MAX_PORTS", "1000", 1000),
        ("PORT_CHECK_MAX_IN_FLIGHT", "1000000", 1_000_000),
        ("PORT_CHECK_TARGETS", "caller", "caller"),
        ("PORT_CHECK_ALLOWED_NETWORKS", "10.0.0.0/8,192.0.2.7,fd00::/8", NETWORKS),
        ("PORT_CHECK_DENIED_NETWORKS", "10.0.0.0/8,192.0.2.7,fd00::/8", NETWORKS),
        ("PORT_CHECK_TARGET_RATE_LIMIT", "off", None),
        ("PORT_CHECK_TARGET_RATE_LIMIT", "1000/hour", Rate(1000, timedelta(hours=1))),
    ],
)
def test_a_good_value(
    monkeypatch: pytest.MonkeyPatch, variable: str, text: str, value: object
) -> None:
    monkeypatch.setenv(variable, text)
    name = FIELDS[variable]
    loaded = dict(load_settings())
    assert loaded == dict(Settings()) | {name: value}
    assert type(loaded[name]) is type(value)


# What is never a number, whole or not.
NO_NUMBERS = ["", " ", "ten", "nan", "inf", "-inf", "1e999", "0x1", "1,5", "1 2", "-1", "true"]
NO_NUMBERS += ["5s", "\u0665", "9" * 5000, "1/2", "1\n2", "\udcff"]
NO_WHOLE_NUMBERS = [*NO_NUMBERS, "0", "1.5", "1e1", "0.1"]
NO_NETWORKS = ["10.0.0.1/8", "::1/64", "10.0.0.0/33", "::/129", "10/8", "10.0.0.0/8 fd00::/8"]
NO_NETWORKS += ["10.0.0.0/8,localhost", "*", "[::1]", "127.0.0.1:80", "2130706433", "010.0.0.0/8"]
NO_NETWORKS += ["x" * 5000, "\udcff"]
NO_RATES = """
    30 30/ /minute 0/minute 030/minute -1/minute +1/minute 1.5/minute 1e3/hour nan/hour inf/second
    1_0/minute 1000000000/second 30/min 30/minutes 30/MINUTE 30/day 30/60 30/1minute 30//minute
    30:minute 30/minute;5/second OFF no none None false 0 unlimited \u0663/minute \udcff
"""
BAD_RATES = [*NO_RATES.split(), "", " ", "30 per minute", "30 / minute", "30/minute\n"]
RATE = "a whole number per second, minute or hour, such as {}, or off"
ALLOWED: dict[str, tuple[str, list[str]]] = {
    "PORT_CHECKER_HOST": (
        "an IP address to listen on, such as 0.0.0.0 or ::, localhost, or unix:/path",
        [
            *["", " ", "*", "provider.example", "LOCALHOST", "127.0.0.1:9000", "[::]", " 0.0.0.0"],
            *["unix:", "unix:x.sock", f"unix:/{107 * 'x'}"],
            *["0.0.0.0/0", "127.1", "01.2.3.4", "0", "256.0.0.1", "x" * 5000, "\U0001f600"],
        ],
    ),
    "PORT_CHECKER_PORT": (
        "a port to listen on, from 1 to 65535",
        [*NO_WHOLE_NUMBERS, "65536", "http", "tcp://10.0.0.1:9000"],
    ),
    "PORT_CHECKER_DEBUG": ("true or false", ["", " ", "2", "-1", "maybe", "tru", "\udcff"]),
    "PORT_CHECKER_WORKERS": ("a number of processes, from 1 to 64", [*NO_WHOLE_NUMBERS, "65"]),
    "PORT_CHECKER_TRUSTED_PROXIES": (
        "addresses or networks, such as 192.0.2.7,2001:db8::/64, or empty for none",
        NO_NETWORKS,
    ),
    "PORT_CHECKER_ALLOWED_HOSTS": (
        "host names, such as checker.example,*.checker.example, or empty for any",
        [
            *("*", "http://checker.example", "checker.example:9000", "a b", "a..b", "-a.example"),
            *("a.*.example", "*a.example", "[::1]", "x" * 300, "\u00e9.example", "\udcff"),
        ],
    ),
    "PORT_CHECKER_CONTACT": (
        "a mail address, such as operator@checker.example, or an https:// URL, or empty for none",
        ["somebody", "javascript://x/%0aalert(1)", 'a"@b.example', "<b>@c.example", "ftp://x/"],
    ),
    "PORT_CHECKER_RATE_LIMIT": (RATE.format("300/minute"), BAD_RATES),
    "PORT_CHECKER_RATE_LIMIT_STORE": (
        "memory://, or redis:// or rediss:// with [[user]:password@]host[:port][/db], where "
        "?ssl_ca_certs=/file may follow on rediss://; redis+cluster:// with the same but /db; or "
        "unix:// with [[user]:password@]/path[?db=N]",
        ["memory", "memory:", "MEMORY://", "redis", "redis:", "redis://"],
    ),
    "PORT_CHECKER_PERSPECTIVES": (
        "base URLs of at most 16 other port checkers, such as "
        "https://ams.checker.example,https://sgp.checker.example, or empty for none",
        [
            *("ams.example", "ftp://ams.example", "https://", "https://ams.example:0"),
            "https://ams.example:65536",
            *("https://ams.example?a", "https://a b", "https://\u00e9.example"),
            ",".join(f"https://{number}.example" for number in range(17)),
        ],
    ),
    "PORT_CHECKER_PERSPECTIVES_MODE": ("decide or observe", ["", "Decide", "off"]),
    "PORT_CHECKER_METRICS": (
        "address:port, such as 127.0.0.1:9464 or [::1]:9464, or empty for no metrics",
        [
            " ",
            "true",
            "9464",
            ":9464",
            "::1:9464",
            "localhost:9464",
            "127.1:1",
            "127.0.0.1:0",
            "127.0.0.1:65536",
            "[::1%lo]:9464",
            "\udcff",
        ],
    ),
    "PORT_CHECK_RETRIES": ("a number of attempts, from 1 to 10", [*NO_WHOLE_NUMBERS, "11"]),
    "PORT_CHECK_RETRY_DELAY": (
        "seconds, from 0 to 30",
        [*NO_NUMBERS, "-0.001", "30.001"],
    ),
    "PORT_CHECK_TIMEOUT": (
        "seconds, from 0.1 to 30",
        [*NO_NUMBERS, "0", "0.099", "30.001"],
    ),
    "PORT_CHECK_MAX_PORTS": ("a number of ports, from 1 to 10000", [*NO_WHOLE_NUMBERS, "10001"]),
    "PORT_CHECK_MAX_IN_FLIGHT": (
        "a number of ports, from 1 to 1000000",
        [*NO_WHOLE_NUMBERS, "1000001"],
    ),
    "PORT_CHECK_MAX_IN_FLIGHT_PER_CALLER": (
        "a number of ports, from 1 to 1000000",
        [*NO_WHOLE_NUMBERS, "1000001"],
    ),
    "PORT_CHECK_TARGETS": ("public or caller", ["", " ", "PUBLIC", "all", "caller ", "\udcff"]),
    "PORT_CHECK_ALLOWED_NETWORKS": (
        "networks, such as 10.0.0.0/8,fd00::/8, or empty for none",
        NO_NETWORKS,
    ),
    "PORT_CHECK_DENIED_NETWORKS": (
        "networks, such as 198.51.100.0/24,2001:db8::/32, or empty for none",
        NO_NETWORKS,
    ),
    "PORT_CHECK_OWN_RATE_LIMIT": (RATE.format("20000/minute"), BAD_RATES),
    "PORT_CHECK_OTHERS_RATE_LIMIT": (RATE.format("1000/minute"), BAD_RATES),
    "PORT_CHECK_TARGET_RATE_LIMIT": (RATE.format("2000/minute"), BAD_RATES),
}


def complaint() -> str:
    """What an operator is told: one line that any terminal can show."""
    with pytest.raises(SettingsError) as error:
        load_settings()
    told = str(error.value)
    assert told.isprintable()
    assert len(told) < 1000
    told.encode()
    if ".env" in told:
        folder = f"{Path.cwd()}/"
        assert told.startswith(folder)
        return told.removeprefix(folder)
    return told


def test_every_setting_is_tried_with_bad_values() -> None:
    assert list(ALLOWED) == list(FIELDS)


@pytest.mark.parametrize("variable", ALLOWED)
def test_a_bad_value_is_one_line(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    allowed, bad = ALLOWED[variable]
    for text in bad:
        monkeypatch.setenv(variable, text)
        shown = repr(text if len(text) <= 80 else text[:80] + "…")
        assert complaint() == f"{variable}={shown} is wrong: it must be {allowed}"


def test_several_bad_values_are_one_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, text in (("PORT_CHECK_RETRIES", "0"), ("PORT_CHECK_TIMEOUT", "nan")):
        monkeypatch.setenv(variable, text)
    assert complaint() == (
        "PORT_CHECK_RETRIES='0' is wrong: it must be a number of attempts, from 1 to 10; "
        "PORT_CHECK_TIMEOUT='nan' is wrong: it must be seconds, from 0.1 to 30"
    )


@pytest.mark.parametrize(
    "store",
    [
        "s3cretpw",
        "s3cret:pw",
        "rediss3cret",
        "redis://:s3cret@",
        "redis://s3cret@redis.example",
        "redis://:s3c/s3cret@redis.example",
        "redis://:s3cret@redis.example:0",
        "redis://:s3cret@redis.example:65536",
        "redis://:s3cret@redis.example/zero",
        "redis://:s3cret@redis.example/0?db=1",
        "redis://redis.example?password=s3cret",
        "redis://:s3cret @redis.example:6379",
        "redis://:s3cret@[2001:db8::7",
        "redis:\n//:s3cret@redis.example",
        "redis:s3cret@redis.example",
        "redis+cluster://:s3cret@redis.example/zero",
        "redis+cluster://:s3cret@",
        "unix://:s3cret@run/redis.sock",
        "unix://:s3cret@/run/redis.sock?db=one",
        "rediss://:s3cret@redis.example?ssl_cert_reqs=none",
    ],
)
def test_the_password_of_a_wrong_store_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    monkeypatch.setenv("PORT_CHECKER_RATE_LIMIT_STORE", store)
    told = complaint()
    assert told.startswith("PORT_CHECKER_RATE_LIMIT_STORE='")
    assert "…' is wrong: it must be memory://" in told
    assert "3c" not in told


@pytest.mark.parametrize("variable", ["PORT_CHECKER_PERSPECTIVES", "PORT_CHECKER_CONTACT"])
def test_the_password_in_another_wrong_url_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "https://me:s3cret@checker.example")
    assert complaint().startswith(f"{variable}='https://…@checker.example' is wrong: ")


@pytest.mark.parametrize("store", ["redis://:s3cret@redis.example\n", " s3cret", "memory:// "])
def test_white_space_around_the_store_is_said_for_what_it_is(
    monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    monkeypatch.setenv("PORT_CHECKER_RATE_LIMIT_STORE", store)
    assert complaint() == (
        "PORT_CHECKER_RATE_LIMIT_STORE is wrong: it begins or ends with white space (a newline, "
        "say)"
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read: No such file or directory"),
        ("no certificate", "has no certificate in it"),
    ],
)
def test_the_authority_of_the_store_must_be_readable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None, reason: str
) -> None:
    file = tmp_path / "ca.pem"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv(
        "PORT_CHECKER_RATE_LIMIT_STORE", f"rediss://:s3cret@redis.example?ssl_ca_certs={file}"
    )
    assert complaint() == (f"PORT_CHECKER_RATE_LIMIT_STORE is wrong: ssl_ca_certs={file} {reason}")


def test_the_password_of_the_store_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT_CHECKER_RATE_LIMIT_STORE", "redis://:s3cret@redis.example")
    settings = load_settings()
    assert "s3cret" not in f"{settings} {settings!r}"


def test_a_target_limit_below_a_full_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT_CHECK_MAX_PORTS", "10")
    monkeypatch.setenv("PORT_CHECK_TARGET_RATE_LIMIT", "10/second")
    load_settings()
    monkeypatch.setenv("PORT_CHECK_TARGET_RATE_LIMIT", "9/second")
    assert complaint() == (
        "PORT_CHECK_TARGET_RATE_LIMIT='9/second' is wrong: it must be off or at least 10 "
        "(PORT_CHECK_MAX_PORTS): anything less would refuse every full request"
    )


# .env


def test_dotenv_is_read_and_the_environment_takes_precedence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path(".env").write_text(
        "# ours\nPORT_CHECKER_PORT=9001\nexport PORT_CHECK_TIMEOUT='7'\nOTHER=1\n"
    )
    settings = load_settings()
    assert (settings.port, settings.timeout) == (9001, 7.0)
    monkeypatch.setenv("PORT_CHECKER_PORT", "9002")
    settings = load_settings()
    assert (settings.port, settings.timeout) == (9002, 7.0)


def test_dotenv_of_the_working_directory_only(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("PORT_CHECKER_PORT=9001\n")
    Path("below").mkdir()
    monkeypatch.chdir("below")
    assert load_settings().port == 9000


def test_a_bad_value_in_dotenv(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("PORT_CHECKER_PORT=0\n")
    told = "PORT_CHECKER_PORT='0' is wrong: it must be a port to listen on, from 1 to 65535"
    assert complaint() == told
    monkeypatch.setenv("PORT_CHECKER_PORT", "1")
    assert load_settings().port == 1


def test_dotenv_that_is_not_utf_8() -> None:
    Path(".env").write_bytes("PORT_CHECKER_PORT=1\n".encode("utf-16"))
    told = complaint()
    assert told.startswith(".env cannot be read: 'utf-8' codec can't decode byte 0xff in position")


def test_dotenv_that_cannot_be_read() -> None:
    Path(".env").symlink_to("/proc/self/mem")  # a file whose first page cannot be read
    assert complaint() == ".env cannot be read: Input/output error"
    Path(".env").unlink()
    Path(".env").symlink_to("nowhere")
    assert complaint() == ".env cannot be read: No such file or directory"
    Path(".env").unlink()
    Path(".env").mkdir()  # as Docker does for the missing source of a bind mount
    assert complaint() == ".env cannot be read: Is a directory"


NOT_PARSED = "cannot be parsed: it must be NAME=value, with every quote closed"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('PORT_CHECK_TARGETS="caller\n', f".env line 1 {NOT_PARSED}"),
        ("\n\n# s3cret\n  PORT_CHECKER_RATE_LIMIT_STORE='s3cret\n", f".env line 4 {NOT_PARSED}"),
        ("PORT_CHECK_TARGETS: caller\n", f".env line 1 {NOT_PARSED}"),
        ('PORT_CHECK_ALLOWED_NETWORKS="10.0.0.0/8\nX="1"\n', f".env line 1 {NOT_PARSED}"),
        (
            "X=1\n\nexport PORT_CHECK_TARGETS\n",
            ".env line 3 has no value: it must be PORT_CHECK_TARGETS=value",
        ),
        (
            "PORT_CHECKER_RATE_LIMIT_STORE:s3cret\n",
            ".env line 1 has no value: it must be PORT_CHECKER_RATE_LIMIT_STORE=value",
        ),
    ],
)
def test_dotenv_that_cannot_be_read_as_meant(content: str, told: str) -> None:
    Path(".env").write_text(content)
    assert complaint() == told


def test_dotenv_of_other_programs_is_left_alone() -> None:
    Path(".env").write_text("\ufeffPORT_CHECK_TARGETS=caller\r\nOTHER\nexport ANOTHER\n\n#\n")
    assert load_settings().targets == "caller"


# Names


def test_other_names_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, name in FIELDS.items():
        for other in variable.lower(), name, name.upper():
            monkeypatch.setenv(other, "7")
    assert dict(load_settings()) == dict(Settings())


def test_arguments_are_field_names_and_the_environment_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PORT_CHECKER_PORT", "9002")
    settings: Any = Settings(timeout=7, caller_rate_limit=None)
    assert (settings.port, settings.timeout, settings.caller_rate_limit) == (9000, 7.0, None)
    with pytest.raises(ValueError, match="Instance is frozen"):
        settings.port = 1


def test_the_longest_check() -> None:
    assert Settings().longest_check == 17
    assert Settings(retries=1, timeout=0.5, retry_delay=9).longest_check == 0.5


def test_rates_read_as_they_are_written() -> None:
    for text in ("1/second", "30/minute", "2000/hour"):
        assert str(Settings.model_validate({"caller_rate_limit": text}).caller_rate_limit) == text


def test_unknown_names_and_the_nearest_setting() -> None:
    Path(".env").write_text("PORT_CHECK_RETRYS=1\nPORT_CHECKER_PORT=1\nOTHER=1\n")
    environment = {
        "PORT_CHECKER_PROT": "1",
        "PORT_CHECK_TIMEOUT_SECONDS": "1",
        "PORT_CHECK_HOST": "1",
        "port_checker_host": "1",
        "PORT_CHECK_TIMEOUT": "1",
        "PORT_CHECKER_URL": "1",  # of the provider's side
        "PATH": "1",
        "MY_PORT_CHECKER_PORT": "1",
        "PORT_CHECK_" + "Z" * 40: "1",
    }
    assert unknown_names(environment) == {
        "PORT_CHECKER_PROT": "PORT_CHECKER_PORT",
        "PORT_CHECK_TIMEOUT_SECONDS": "PORT_CHECK_TIMEOUT",
        "PORT_CHECK_HOST": "PORT_CHECKER_HOST",
        "port_checker_host": "PORT_CHECKER_HOST",
        "PORT_CHECK_" + "Z" * 40: None,
        "PORT_CHECK_RETRYS": "PORT_CHECK_RETRIES",
    }


def test_the_example_lists_all_settings_with_their_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    example = dotenv_values(ROOT / ".env.example")
    assert list(example) == list(FIELDS)
    for variable, text in example.items():
        assert text is not None
        monkeypatch.setenv(variable, text)
    settings = load_settings()
    assert settings.model_fields_set == set(Settings.model_fields)
    assert dict(settings) == dict(Settings())
    assert unknown_names(os.environ) == {}


def test_defaults_follow_the_most_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT_CHECK_MAX_PORTS", "1500")
    settings = load_settings()
    minute = timedelta(minutes=1)
    assert settings.max_in_flight_per_caller == 2000
    assert settings.others_rate_limit == Rate(1500, minute)
    assert settings.target_rate_limit == Rate(2000, minute)
    monkeypatch.setenv("PORT_CHECK_MAX_PORTS", "5000")
    settings = load_settings()
    assert settings.max_in_flight_per_caller == 5000
    assert settings.others_rate_limit == settings.target_rate_limit == Rate(5000, minute)
    monkeypatch.setenv("PORT_CHECK_OTHERS_RATE_LIMIT", "off")
    assert load_settings().others_rate_limit is None


@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [
        ("PORT_CHECK_MAX_IN_FLIGHT_PER_CALLER", "1499", "at least 1500"),
        ("PORT_CHECK_OWN_RATE_LIMIT", "1499/hour", "off or at least 1500"),
        ("PORT_CHECK_OTHERS_RATE_LIMIT", "1000/minute", "off or at least 1500"),
        ("PORT_CHECK_TARGET_RATE_LIMIT", "1499/second", "off or at least 1500"),
    ],
)
def test_what_was_set_too_low_for_a_full_request_is_an_error(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, allowed: str
) -> None:
    monkeypatch.setenv("PORT_CHECK_MAX_PORTS", "1500")
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError) as error:
        load_settings()
    assert str(error.value).startswith(f"{variable}='{value}' is wrong: it must be {allowed}")


@needs_root
def test_a_working_directory_that_may_not_be_searched_has_no_settings_file(tmp_path: Path) -> None:
    """``sudo -u`` leaves the program in the folder of somebody else."""
    (tmp_path / ".env").write_text("PORT_CHECKER_PORT=1\n")
    code = "from port_checker.settings import *; print(load_settings().port, unknown_names({}))"
    tmp_path.chmod(0)
    # As root, but without root's right to pass by permissions.
    words = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", sys.executable, "-c", code]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "9000 {}\n"
