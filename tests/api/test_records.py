"""One log line for each check and each refusal, whoever asks and however it ends."""

import asyncio
import logging
from datetime import timedelta
from logging.handlers import QueueHandler
from queue import SimpleQueue

import pytest
from starlette.requests import ClientDisconnect

from port_checker.addresses import parse_address
from port_checker.api.app import create_app
from port_checker.api.limits import RateLimited, RateLimiter
from port_checker.api.records import MAX_LOGGED, MAX_REMEMBERED, CheckRecord, RefusalLog
from port_checker.api.targets import TargetNotAllowed
from port_checker.checker import Checker, Overloaded
from port_checker.connect import CheckFailed
from port_checker.errors import ErrorCode, Limit
from port_checker.metrics import CheckOutcome, Metrics, Totals
from port_checker.settings import Rate, Settings
from tests.support.http import check_of, connected
from tests.support.loopback import open_port, refused_port, silent_port
from tests.support.service import serve
from tests.support.waiting import wait_until

CALLER = parse_address("192.0.2.7")
TARGET = parse_address("2001:db8::7")
HOUR = timedelta(hours=1)


@pytest.fixture(autouse=True)
def _log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "port_checker.api")


def test_completed_checks_and_refusals(caplog: pytest.LogCaptureFixture) -> None:
    with serve(retries=1) as client, open_port() as opened, refused_port() as refused:
        for body in (
            {"provider_ip": "127.0.0.1", "ports": [opened, refused, opened]},
            {"provider_ip": "127.0.0.1\nrefused caller=192.0.2.1", "ports": [1]},
            {"provider_ip": "::1", "ports": [1]},
        ):
            client.post("/check-ports", json=body)
        client.post("/check-ports", content=b" " * 65537, headers={"x-forwarded-for": "?"})
        client.get("/nothing")
        with connected(client) as leaving:
            leaving.sendall(check_of(opened)[:-1])
        client.get("/health")
    ours = [record for record in caplog.records if record.name == "port_checker.api.records"]
    check, *refusals = [record.getMessage() for record in ours]
    begins = "check caller=127.0.0.1 target=127.0.0.1 ports=2 outcome=completed duration="
    assert check.startswith(begins)
    assert check.endswith(" accessible=1")
    assert 0 <= float(check.removeprefix(begins).split()[0]) < 60
    assert refusals == [
        "refused caller=127.0.0.1 code=INVALID_IP",
        "refused caller=127.0.0.1 code=TARGET_NOT_ALLOWED target=::1",
        "refused caller=unknown code=REQUEST_TOO_LARGE",
    ]


def test_a_check_whose_caller_disconnects(caplog: pytest.LogCaptureFixture) -> None:
    checker = Checker(retries=1, retry_delay=0, timeout=30, max_in_flight=10)
    with silent_port() as silent, serve(create_app(Settings(), checker=checker)) as client:
        with connected(client) as caller:
            caller.sendall(check_of(silent))
            wait_until(lambda: checker.in_flight, "the check to begin")
        wait_until(lambda: caplog.messages, "the line")
    (line,) = caplog.messages
    assert line.startswith(
        "check caller=127.0.0.1 target=127.0.0.1 ports=1 outcome=cancelled duration="
    )


UNFINISHED: list[tuple[BaseException, str, str, str]] = [
    (CheckFailed("no route"), "ERROR", "failed", ' reason="no route"'),
    (ClientDisconnect(), "INFO", "cancelled", ""),
    (asyncio.CancelledError(), "INFO", "cancelled", ""),
    (ZeroDivisionError(), "ERROR", "bug", ""),
]


def test_the_log_has_the_words_of_the_metrics() -> None:
    assert {"completed", *(outcome for _, _, outcome, _ in UNFINISHED)} == set(CheckOutcome)


@pytest.mark.parametrize(("error", "level", "outcome", "more"), UNFINISHED)
def test_a_check_that_does_not_complete(
    caplog: pytest.LogCaptureFixture,
    error: BaseException,
    level: str,
    outcome: str,
    more: str,
) -> None:
    metrics = Metrics()
    with pytest.raises(type(error)), CheckRecord(None, TARGET, 3, metrics):
        raise error
    (record,) = caplog.records
    begins = f"check caller=unknown target=2001:db8::7 ports=3 outcome={outcome} duration=0."
    assert record.levelname == level
    assert record.getMessage().startswith(begins)
    assert record.getMessage()[len(begins) + 3 :] == more
    expected = Metrics()
    expected.count("checks", outcome)
    assert metrics.row == expected.row


def test_a_record_of_a_check_is_like_any_other() -> None:
    records: SimpleQueue[logging.LogRecord] = SimpleQueue()
    log, handler = logging.getLogger(CheckRecord.__module__), QueueHandler(records)
    log.addHandler(handler)
    try:
        with CheckRecord(CALLER, TARGET, 3):
            pass
    finally:
        log.removeHandler(handler)
    record = records.get_nowait()  # which the handler has formatted, and freed of its arguments
    assert record.getMessage().startswith("check caller=192.0.2.7 target=2001:db8::7 ports=3 ")
    assert record.filename == "records.py"
    assert record.msecs == pytest.approx(record.created % 1 * 1000, abs=1)


def test_a_check_without_a_result_is_a_check(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()
    with CheckRecord(CALLER, TARGET, 3, metrics):
        pass
    (line,) = caplog.messages
    assert line.startswith("check caller=192.0.2.7 target=2001:db8::7 ports=3 outcome=completed ")
    totals = Totals()
    totals.add(metrics.row)
    assert totals.snapshot()["checks", "completed"] == 1


def test_a_refusal_names_the_limit_and_the_target(caplog: pytest.LogCaptureFixture) -> None:
    totals, metrics = Totals(), Metrics()
    totals.add(metrics.row)
    settings = Settings(
        own_rate_limit=Rate(2, HOUR), caller_rate_limit=Rate(3, HOUR), max_ports=2, retries=1
    )
    with serve(create_app(settings, metrics)) as client, refused_port() as port:
        for ports in ([port, port + 1], [port], [0], [port]):
            client.post("/check-ports", json={"provider_ip": "127.0.0.1", "ports": ports})
    refusals = [line for line in caplog.messages if line.startswith("refused")]
    assert refusals[0] == (
        "refused caller=127.0.0.1 code=RATE_LIMITED limit=caller_own_ports target=127.0.0.1"
    )
    snapshot = totals.snapshot()
    counted = {limit for limit in Limit if snapshot["refusals", limit] == 1}
    assert counted == {Limit.CALLER_OWN_PORTS, Limit.CALLER_REQUESTS}
    assert sum(snapshot["refusals", limit] for limit in Limit) == 2


ONE = ["192.0.2.7"]
SITE = [f"2001:db8:0:{number:x}::7" for number in range(21)]  # 21 callers in one /48
OTHER = "203.0.113.5"


@pytest.mark.parametrize(
    ("rates", "callers", "target", "limit"),
    [
        ("requests", ONE, None, Limit.CALLER_REQUESTS),
        ("own", ONE, ONE[0], Limit.CALLER_OWN_PORTS),
        ("others", ONE, OTHER, Limit.CALLER_OTHERS_PORTS),
        ("targets", ONE, OTHER, Limit.TARGET_PORTS),
        ("requests", SITE, None, Limit.NETWORK_REQUESTS),
        ("own", SITE, "itself", Limit.NETWORK_OWN_PORTS),
        ("others", SITE, OTHER, Limit.NETWORK_OTHERS_PORTS),
    ],
)
def test_each_rate_has_its_name(
    rates: str, callers: list[str], target: str | None, limit: Limit
) -> None:
    limiter = RateLimiter(**{rates: Rate(2, HOUR)})  # type: ignore[arg-type]  # by name

    async def ask() -> None:
        for caller in [*callers, *(ONE * 2 if callers is ONE else [])]:
            address = parse_address(caller)
            if target:
                checked = caller if target == "itself" else target
                await limiter.pay_ports(address, parse_address(checked), 1)
            else:
                await limiter.pay_request(address)

    with pytest.raises(RateLimited) as refusal:
        asyncio.run(ask())
    assert refusal.value.limit is limit


@pytest.mark.parametrize(
    "refusal",
    [
        TargetNotAllowed(),
        RateLimited("", 1, Limit.CALLER_REQUESTS),
        Overloaded(Limit.IN_FLIGHT, 3, 2, "", 1),
    ],
)
def test_a_refused_check_is_no_check(caplog: pytest.LogCaptureFixture, refusal: Exception) -> None:
    metrics = Metrics()
    with pytest.raises(type(refusal)), CheckRecord(CALLER, TARGET, 3, metrics):
        raise refusal
    assert not caplog.messages
    assert metrics.row == Metrics().row


def test_one_refusal_a_second_for_each_caller_and_code(caplog: pytest.LogCaptureFixture) -> None:
    now = 100.0
    log = RefusalLog(lambda: now)
    for text in ("192.0.2.7", "2001:db8::7", "192.0.2.8", "2001:db8::8", "2001:db8:0:1::7"):
        for code in ErrorCode.INVALID_IP, ErrorCode.RATE_LIMITED, ErrorCode.INVALID_IP:
            log.add(parse_address(text), code)
    log.add(None, ErrorCode.INVALID_IP)
    log.add(None, ErrorCode.INVALID_IP)
    assert caplog.messages == [
        *(
            f"refused caller={text} code={code}"
            for text in ("192.0.2.7", "2001:db8::7", "192.0.2.8", "2001:db8:0:1::7")
            for code in ("INVALID_IP", "RATE_LIMITED")
        ),
        "refused caller=unknown code=INVALID_IP",
    ]
    caplog.clear()
    now = 100.9
    log.add(CALLER, ErrorCode.INVALID_IP)
    assert not caplog.messages
    now = 101.0
    log.add(CALLER, ErrorCode.INVALID_IP)
    assert len(caplog.messages) == 1


def test_refusals_take_bounded_memory() -> None:
    log = RefusalLog(lambda: 0.0)
    for number in range(MAX_REMEMBERED + 100):
        log.add(CALLER + number, ErrorCode.INVALID_IP)
    assert log.remembered == MAX_REMEMBERED


def test_a_crowd_of_callers_is_not_logged_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    log = RefusalLog(lambda: now)
    for caller in range(1000):
        log.add(parse_address(f"2001:db8:0:{caller:x}::7"), ErrorCode.OVERLOADED)
    assert len(caplog.messages) == MAX_LOGGED
    now = 1.0
    log.add(CALLER, ErrorCode.OVERLOADED)
    assert caplog.messages[MAX_LOGGED:] == [
        "refused 900 more callers, which are not logged",
        "refused caller=192.0.2.7 code=OVERLOADED",
    ]
