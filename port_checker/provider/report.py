"""The result for each port and the advice that follows from it."""

from dataclasses import dataclass, field
from typing import Literal

from port_checker import advice as advice_for
from port_checker.connect import REFUSED, TIMED_OUT, Verdict

LocalBinding = Literal["bound", "in use", "not permitted", "failed"]


@dataclass(frozen=True)
class ServerReport:
    """How asking one server went.

    Attributes:
        url: The server.
        asked: Whether it checked at least some of the ports.
        error: Why it did not check all of them; None if it did.
    """

    url: str
    asked: bool
    error: str | None


@dataclass(frozen=True)
class PortReport:
    """The result for one port.

    Attributes:
        port: The TCP port.
        local: Whether a listener could be opened on this machine; "in use" means that another
            program has the port.
        reachable: Whether the world can reach this machine on the port: a server connected, and
            the listener saw the connection or another program has the port.
        confirmed: Whether the listener saw the connection that a server reports; None where there
            was no listener.
        error: The connection error that the servers report, in the system's words; None if one of
            them could connect, and if none checked the port.
        advice: What to do; None if nothing is wrong.
        answers: The verdict of each server that checked the port, by URL.
    """

    port: int
    local: LocalBinding
    reachable: bool
    confirmed: bool | None
    error: str | None
    advice: str | None
    answers: dict[str, Verdict]


@dataclass(frozen=True)
class Report:
    """The result of ``verify``.

    Attributes:
        ip: The address that was checked; None if no server could tell it.
        servers: One for each server, in the order given.
        ports: One for each port, in the order given.
        reachable: How many ports are reachable.
        total: How many there are.
    """

    ip: str | None
    servers: list[ServerReport]
    ports: list[PortReport]
    reachable: int = field(init=False)
    total: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "reachable", sum(port.reachable for port in self.ports))
        object.__setattr__(self, "total", len(self.ports))


_ADVICE_ON_ERROR = {
    REFUSED.error: advice_for.REFUSED,
    TIMED_OUT.error: advice_for.TIMED_OUT,
}


def judge(port: int, local: LocalBinding, seen: bool, answers: dict[str, Verdict]) -> PortReport:
    """Combine what this machine saw with what the servers report."""
    accessible = any(verdict.accessible for verdict in answers.values())
    errors = [verdict.error for verdict in answers.values()]
    confirmed = accessible and seen if local == "bound" else None
    reachable = accessible if local == "in use" else confirmed is True
    advice: str | None
    if local == "not permitted":
        advice = advice_for.NOT_PERMITTED
    elif local == "failed":
        advice = advice_for.FAILED
    elif not answers:
        advice = advice_for.NOT_ASKED
    elif reachable:
        advice = None
    elif accessible:
        advice = advice_for.ANSWERED_ELSEWHERE
    elif local == "in use":
        advice = advice_for.IN_USE
    elif seen:
        advice = advice_for.WAY_BACK
    else:
        advice = _ADVICE_ON_ERROR.get(errors[0], advice_for.UNREACHABLE)
    error = errors[0] if errors and not accessible else None
    return PortReport(port, local, reachable, confirmed, error, advice, answers)
