"""The result for a TLS endpoint, and the advice that follows from what servers say about it."""

import asyncio
from collections.abc import Mapping, Sequence

from port_checker import advice as advice_for
from port_checker.linux import TcpState, tcp_sockets
from port_checker.provider.origin import Contact, is_own
from port_checker.provider.remote import ServerError
from port_checker.provider.report import PortPair, TlsAnswer, TlsReport
from port_checker.tls import TlsVerdictKind


async def check_tls(contacts: Sequence[Contact], pair: PortPair) -> TlsReport:
    """Have each server check the certificate at one port."""
    answers: dict[str, TlsAnswer] = {}
    reasons = [f"{contact.url} {contact.error}" for contact in contacts if contact.error]
    able = {c: c.address for c in contacts if c.address and not c.error}
    results = await asyncio.gather(
        *(contact.server.check_tls(address, pair.outer) for contact, address in able.items()),
        return_exceptions=True,
    )
    for contact, result in zip(able, results, strict=True):
        if isinstance(result, TlsAnswer):
            answers[contact.url] = result
        elif isinstance(result, ServerError):
            reasons.append(f"{contact.url} {result}")
        else:
            raise result
    is_listened_on = bool(tcp_sockets({pair.inner}, TcpState.LISTEN))
    ip = next((contact.address for contact in contacts if contact.address), None)
    return judge_tls(
        pair,
        answers,
        reason="; ".join(reasons) or "no server was asked",
        is_listened_on=is_listened_on,
        own_address=bool(ip and is_own(ip)),
        ip=str(ip),
    )


def judge_tls(
    ports: PortPair,
    answers: Mapping[str, TlsAnswer],
    *,
    reason: str,
    is_listened_on: bool,
    own_address: bool,
    ip: str,
) -> TlsReport:
    """Judge one TLS endpoint.

    Args:
        ports: Its port, outside and here.
        answers: What the servers say, by URL.
        reason: Why the other servers say nothing.
        is_listened_on: Whether a program of this machine listens on the port.
        own_address: Whether the address that was checked is one of this machine's.
        ip: The address that was checked.
    """
    invalid = [answer for answer in answers.values() if not answer.valid]
    answer = next(iter(invalid or answers.values()), None)
    if not answer:
        advice: str | None = advice_for.sentence(advice_for.TLS_NOT_CHECKED.format(reason=reason))
    elif answer.valid:
        advice = None
    else:
        advice = _advise(answer.kind, is_listened_on).format(
            ip=ip, port=ports.inner, and_router="" if own_address else advice_for.AND_ROUTER
        )
    return TlsReport(
        port=ports.outer,
        inner=ports.inner,
        valid=bool(answer and answer.valid),
        error=answer.error if answer else None,
        not_after=answer.not_after if answer else None,
        advice=advice,
        answers=dict(answers),
    )


def _advise(kind: TlsVerdictKind, is_listened_on: bool) -> str:
    if kind is not TlsVerdictKind.NO_CONNECTION:
        return advice_for.FOR_TLS[kind]
    return advice_for.IN_USE if is_listened_on else advice_for.NOTHING_SERVES_TLS
