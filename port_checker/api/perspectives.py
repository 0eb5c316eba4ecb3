"""The same check from other places, and the rule that makes one verdict of many.

The other places are port checkers like this one, which trust it as a proxy: each is sent the
caller's request with ``X-Forwarded-For``, and votes.
"""

import asyncio
import contextlib
import functools
import itertools
import json
import logging
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from datetime import datetime, timedelta
from http import HTTPStatus
from typing import Any, Final, Generic, TypeVar

from pydantic import ValidationError
from pydantic_core import from_json

from port_checker.addresses import Address
from port_checker.api.place_client import NoAnswer, PlaceAnswer, PlaceClient
from port_checker.connect import OPEN, CheckFailed, Verdict
from port_checker.errors import ErrorCode, ServiceError
from port_checker.metrics import Metrics, VoteOutcome
from port_checker.resolver import Resolver
from port_checker.schemas import (
    PERSPECTIVE_MARK,
    CallerAddress,
    CheckTlsRequest,
    CheckTlsResponse,
    PortsSeen,
)
from port_checker.settings import place_name
from port_checker.tls import TlsVerdict, TlsVerdictKind
from port_checker.verdicts import HERE, port_verdict, tls_kind

_MARGIN: Final = 1.0  # seconds that a place may take longer than a check

# The most bytes of an answer, and how many more for each port.
_ANSWER_SIZE: Final = 16 * 1024
_VERDICT_SIZE: Final = 256

# The most characters of an error. Its longest part, a host name, has at most 253.
_ERROR_LENGTH: Final = 400

# Checks whose votes are compared at once, where places are only observed.
_MOST_COMPARED: Final = 1000

# Lines in the log about one of them.
_MOST_DIFFERENCES: Final = 10

# Why a place that answered has no vote.
_WORDS: Final = {
    ErrorCode.CHECK_FAILED: "It failed to check.",
    ErrorCode.OVERLOADED: "It is busy.",
    ErrorCode.RATE_LIMITED: "It is asked too often, by this caller or about this address.",
    ErrorCode.TARGET_NOT_ALLOWED: "It does not check this address for this caller.",
}
_REFUSED: Final = "It refuses the request."

_LOOK_INTERVAL: Final = 60.0  # seconds
_FORWARDED_TEST_ADDRESS: Final = "192.0.2.1"  # of documentation (RFC 5737)

logger = logging.getLogger(__name__)

Vote = TypeVar("Vote", Verdict, TlsVerdict)


# The rule


def outcome(good: int, bad: int, places: int) -> bool | None:
    """Decide by majority whether a port can be reached.

    It follows the CA/Browser Forum's Baseline Requirements (section 3.2.2.9), except that a place
    in trouble of its own has no vote.

    Args:
        good: How many places could connect.
        bad: How many could not.
        places: How many places there are, those without a vote included.

    Returns:
        Whether it can be reached; None if too few places have a vote.
    """
    votes = good + bad
    if 2 * votes <= places:
        return None
    if votes <= 2:
        return bad == 0
    return bad <= (1 if votes <= 6 else 2)


@functools.cache
def is_settled(good: int, bad: int, pending: int, places: int) -> bool:
    """Whether the outcome is the same however the ``pending`` places vote, or if they do not."""
    outcomes = {
        outcome(good + more_good, bad + more_bad, places)
        for more_good in range(pending + 1)
        for more_bad in range(pending + 1 - more_good)
    }
    return len(outcomes) == 1


def is_good(vote: Verdict | TlsVerdict) -> bool:
    """Whether a place could connect, and trusts what it found."""
    return vote.valid if isinstance(vote, TlsVerdict) else vote.accessible


def common_verdict(votes: Sequence[Vote], places: int) -> Vote | None:
    """Make one verdict of several.

    Args:
        votes: This server's own first, if it has one.
        places: How many places there are.

    Returns:
        The verdict; None if too few places have a vote. Its error is the most frequent one, and
        the first of several that are equally frequent. A certificate is good until the earliest
        time that any place reports.
    """
    good = [vote for vote in votes if is_good(vote)]
    bad = [vote for vote in votes if not is_good(vote)]
    match outcome(len(good), len(bad), places):
        case None:
            return None
        case True:
            return min(good, key=_not_after)
    errors = Counter(vote.error for vote in bad)
    return max(bad, key=lambda vote: errors[vote.error])


def _not_after(vote: Verdict | TlsVerdict) -> float:
    is_known = isinstance(vote, TlsVerdict) and vote.not_after
    return vote.not_after.timestamp() if is_known else float("inf")  # type: ignore[union-attr]


class NoVote(ServiceError):
    """A place has no vote.

    Args:
        reason: Why, in a sentence.
        code: The error code that the place gave, if it gave one.
    """

    def __init__(self, reason: str, code: ErrorCode = ErrorCode.CHECK_FAILED) -> None:
        super().__init__(reason)
        self.code = code


class Ballot(Generic[Vote]):
    """The votes of one check.

    Args:
        ports: What the places vote on.
        places: How many may vote; number 0 is this server.
        on_final: Called once with each port and its verdict, as soon as nothing can change it.
        hears_all: Whether to wait for all votes: late ones change no outcome, but the words of an
            error, or until when a certificate is good.

    Attributes:
        ports: As given.
        votes: Those cast so far, by place: one for each port, or why there are none.
    """

    def __init__(
        self,
        ports: Sequence[int],
        places: int,
        on_final: Callable[[int, Vote], object] | None = None,
        *,
        hears_all: bool = False,
    ) -> None:
        self.ports = ports
        self.hears_all = hears_all
        self._places = places
        self._on_final: Callable[[int, Vote], object] | None = on_final
        self.votes: dict[int, Mapping[int, Vote] | ServiceError] = {}
        self._verdicts: dict[int, Vote | None] = {}  # the settled ones

    @property
    def is_settled(self) -> bool:
        """Whether nothing can change any verdict."""
        return len(self._verdicts) == len(self.ports)

    def cast(self, place: int, votes: Mapping[int, Vote] | ServiceError) -> None:
        """Count the votes of a place, or that it has none and why."""
        self.votes[place] = votes
        pending = self._places - len(self.votes)
        voting = [each for _, each in sorted(self.votes.items()) if isinstance(each, Mapping)]
        for port in self.ports:
            if port in self._verdicts:
                continue
            cast = [each[port] for each in voting]
            good = sum(map(is_good, cast))
            if is_settled(good, len(cast) - good, pending, self._places):
                verdict = common_verdict(cast, self._places)
                if self.hears_all and pending and verdict not in (OPEN, None):
                    continue
                self._verdicts[port] = verdict
                if verdict and self._on_final:
                    self._on_final(port, verdict)

    def verdicts(self) -> dict[int, Vote]:
        """Return the verdict on each port, once all are settled.

        Raises:
            CheckFailed: Too few places have a vote; on which ports, if others have a verdict.
        """
        verdicts = {port: verdict for port in self.ports if (verdict := self._verdicts[port])}
        missing = [port for port in self.ports if port not in verdicts]
        if missing:
            reason = f"too few of {self._places} places could check"
            if isinstance(own := self.votes.get(0), CheckFailed):
                reason += f"; here: {own}"
            raise CheckFailed(reason, missing if verdicts else ())
        return verdicts

    def comparison(self, place: int) -> Counter[VoteOutcome]:
        """Count how the votes of a place compare with the verdicts, once all are settled."""
        votes = self.votes[place]
        if isinstance(votes, ServiceError):
            return Counter({VoteOutcome.FAILED: len(self.ports)})
        return Counter(
            VoteOutcome.AGREED
            if is_good(votes[port]) == is_good(verdict)
            else VoteOutcome.DISAGREED
            for port, verdict in self._verdicts.items()
            if verdict
        )


# The places


class Perspectives:
    """The other places, which it also probes from time to time.

    Args:
        urls: Their base URLs.
        longest_check: The most seconds that a check takes.
        observes: Whether this server's own verdict is the answer, and votes are only compared.
        metrics: Where votes are counted.
        sleep: Waits for a number of seconds; called between probes.

    Attributes:
        observes: As given.
        names: What the places are called: each URL's host, and port where it has one.
    """

    def __init__(
        self,
        urls: Sequence[str],
        longest_check: float,
        *,
        observes: bool = False,
        metrics: Metrics | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.observes = observes
        self.names = [place_name(url) for url in urls]
        self._urls = urls
        self._metrics = metrics or Metrics()
        self._timeout = longest_check + _MARGIN
        self._sleep = sleep
        self._keeps_connections = False
        self._compared: set[asyncio.Task[None]] = set()
        self._trouble: dict[str, str] = {}  # what has been warned of, by URL

    @property
    def places(self) -> int:
        """How many places there are, this server included."""
        return 1 + len(self._urls)

    @property
    def are_nearby(self) -> bool:
        """Whether all other places are known to be in networks that are not the internet."""
        return all(client.is_nearby for client in self._clients)

    @functools.cached_property
    def _clients(self) -> list[PlaceClient]:
        """What asks the places, outside ``connected``, too: not every server runs a lifespan."""
        resolver, tls = Resolver(), _tls_context()
        return [PlaceClient(url, resolver, tls) for url in self._urls]

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Probe the places, and keep connections to them, during the block."""
        self._keeps_connections = True
        looking = asyncio.create_task(self._look_again_and_again())
        try:
            yield
        finally:
            running = [looking, *self._compared]
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            self._keeps_connections = False
            for client in self._clients:
                client.close()

    async def check_ports(
        self,
        own: Awaitable[dict[int, Verdict]],
        caller: Address | None,
        target: Address,
        ports: Sequence[int],
        on_final: Callable[[int, Verdict], object] | None = None,
        by_place: list[PortsSeen] | None = None,
    ) -> dict[int, Verdict]:
        """Check ports here and at the other places.

        Args:
            own: Makes the check here.
            caller: Who asks; None if unknown.
            target: The address that the ports are on.
            ports: TCP ports, each at most once.
            on_final: Called once with each port and its verdict, as soon as nothing can change it.
            by_place: Where to list what each place says. If given, the check waits for all places;
                if places are only observed, it lists this server alone.

        Returns:
            A verdict for each port.

        Raises:
            CheckFailed: Some ports have no verdict.
        """
        body = {"provider_ip": str(target), "ports": list(ports)}

        size = _ANSWER_SIZE + _VERDICT_SIZE * len(ports)

        def read(answer: bytes) -> dict[int, Verdict]:
            # Not by a model: thousands of faults take pydantic seven times as long to list as they
            # take to read (measured).
            results = from_json(answer)["results"]
            if not isinstance(results, dict) or [*results] != [str(port) for port in ports]:
                raise ValueError
            votes = [(each["accessible"], each["error"]) for each in results.values()]
            for accessible, error in set(votes):
                _require_result(accessible, error)
            return {port: port_verdict(*vote) for port, vote in zip(ports, votes, strict=True)}

        async def ask(client: PlaceClient) -> dict[int, Verdict]:
            return await self._ask(client, "/check-ports", body, caller, size, read)

        hears_all = self.observes or by_place is not None
        ballot = Ballot(ports, self.places, on_final, hears_all=hears_all)
        return await self._decide(ballot, own, ask, target, by_place)

    async def check_tls(
        self,
        own: Awaitable[TlsVerdict],
        caller: Address | None,
        asked: CheckTlsRequest,
        by_place: list[tuple[str, TlsVerdict | ServiceError]] | None = None,
    ) -> TlsVerdict:
        """Check a TLS endpoint here and at the other places, as ``check_ports`` does."""
        body = {"host": str(asked.host), "port": asked.port}
        if asked.expected_ip:
            body["expected_ip"] = str(asked.expected_ip)
        peer = CheckTlsResponse.of(asked, TlsVerdict(TlsVerdictKind.VALID)).peer

        def read(answer: bytes) -> dict[int, TlsVerdict]:
            result = CheckTlsResponse.model_validate_json(answer, strict=True)
            if result.peer != peer:
                raise ValueError
            _require_result(result.valid, result.error)
            until = datetime.fromisoformat(result.not_after) if result.not_after else None
            if until and until.utcoffset() != timedelta(0):
                raise ValueError
            kind = tls_kind(result.valid, result.error)
            return {asked.port: TlsVerdict(kind, result.error, until)}

        async def ask(client: PlaceClient) -> dict[int, TlsVerdict]:
            return await self._ask(client, "/check-tls", body, caller, _ANSWER_SIZE, read)

        async def check_here() -> dict[int, TlsVerdict]:
            return {asked.port: await own}

        hears_all = self.observes or by_place is not None
        ballot = Ballot[TlsVerdict]([asked.port], self.places, hears_all=hears_all)
        seen: list[tuple[str, Mapping[int, TlsVerdict] | ServiceError]] | None = None
        if by_place is not None:
            seen = []
        verdicts = await self._decide(ballot, check_here(), ask, asked.target, seen)
        if by_place is not None:
            for name, votes in seen or ():
                vote = votes if isinstance(votes, ServiceError) else votes[asked.port]
                by_place.append((name, vote))
        return verdicts[asked.port]

    async def _decide(
        self,
        ballot: Ballot[Vote],
        own: Awaitable[dict[int, Vote]],
        ask: Callable[[PlaceClient], Awaitable[dict[int, Vote]]],
        target: Address,
        by_place: list[tuple[str, Mapping[int, Vote] | ServiceError]] | None,
    ) -> dict[int, Vote]:
        if not self.observes:
            verdicts = await self._poll(ballot, own, ask)
            if by_place is not None:
                names = [HERE, *self.names]
                by_place += [(names[place], ballot.votes[place]) for place in range(self.places)]
            return verdicts
        here = asyncio.ensure_future(own)
        if len(self._compared) < _MOST_COMPARED:
            comparison = asyncio.create_task(self._compare(ballot, here, ask, target))
            self._compared.add(comparison)
            comparison.add_done_callback(self._compared.discard)
        verdicts = await here
        if by_place is not None:
            by_place.append((HERE, verdicts))
        return verdicts

    async def _compare(
        self,
        ballot: Ballot[Vote],
        here: asyncio.Future[dict[int, Vote]],
        ask: Callable[[PlaceClient], Awaitable[dict[int, Vote]]],
        target: Address,
    ) -> None:
        """Log where the places together would have decided differently from this server."""

        async def words(verdicts: Awaitable[dict[int, Vote]]) -> dict[int, str]:
            try:
                return {
                    port: "reachable" if is_good(vote) else vote.error or "not reachable"
                    for port, vote in (await verdicts).items()
                }
            except CheckFailed:
                return {}

        # At the same time as here: the provider may close its ports once it has the answer.
        poll = self._poll(ballot, asyncio.shield(here), ask)
        together = await words(poll)
        alone = await words(here)
        differences: dict[tuple[str, str], list[int]] = {}
        for port in ballot.ports:
            one, other = alone.get(port, "CHECK_FAILED"), together.get(port, "CHECK_FAILED")
            if one != other:
                differences.setdefault((one, other), []).append(port)
        # Not one for each port: where a place is away, all ports of all checks differ.
        for (one, other), ports in itertools.islice(differences.items(), _MOST_DIFFERENCES):
            logger.info(
                "observed target=%s port=%d here=%r together=%r ports=%d",
                *(target, ports[0], one, other, len(ports)),
            )

    async def _poll(
        self,
        ballot: Ballot[Vote],
        own: Awaitable[dict[int, Vote]],
        ask: Callable[[PlaceClient], Awaitable[dict[int, Vote]]],
    ) -> dict[int, Vote]:
        """Have all places vote at once, until nothing can change a verdict, or all have voted."""
        tasks = {asyncio.ensure_future(own): 0}
        tasks |= {asyncio.ensure_future(ask(each)): n for n, each in enumerate(self._clients, 1)}
        pending = set(tasks)
        try:
            while pending and (ballot.hears_all or not ballot.is_settled):
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in sorted(done, key=tasks.__getitem__):
                    # Raised here, it would lead back to this poll, and both stay in memory.
                    if isinstance(error := task.exception(), (CheckFailed, NoVote)):
                        ballot.cast(tasks[task], error)
                    else:
                        ballot.cast(tasks[task], task.result())
        finally:
            for task in pending:
                task.cancel()
            if pending:
                await asyncio.gather(*pending, return_exceptions=True)
        self._count(ballot)
        return ballot.verdicts()

    def _count(self, ballot: Ballot[Vote]) -> None:
        """Count the votes cast."""
        for place in ballot.votes.keys() - {0}:
            for vote, number in ballot.comparison(place).items():
                self._metrics.count_votes(place - 1, vote, number)

    async def _ask(
        self,
        client: PlaceClient,
        path: str,
        body: Mapping[str, Any],
        caller: Address | None,
        size: int,
        read: Callable[[bytes], dict[int, Vote]],
    ) -> dict[int, Vote]:
        """Return the votes of a place.

        Raises:
            NoVote: It has none.
        """
        forwarded_for = str(caller) if caller else "unknown"
        request = (
            "POST",
            path,
            forwarded_for,
            json.dumps(body, separators=(",", ":")).encode(),
            size,
        )
        answer = await self._request(client, *request)
        try:
            if answer.status == HTTPStatus.OK:
                return read(answer.body)
            code = ErrorCode(from_json(answer.body)["detail"]["code"])
        except (LookupError, TypeError, ValueError):  # pydantic's is one of the last
            raise NoVote(f"Its answer is not understood (HTTP status {answer.status}).") from None
        # Not in its own words, which may name addresses of its network, or of ours.
        raise NoVote(_WORDS.get(code, _REFUSED), code)

    async def _request(
        self,
        client: PlaceClient,
        method: str,
        path: str,
        forwarded_for: str,
        body: bytes = b"",
        size: int = _ANSWER_SIZE,
    ) -> PlaceAnswer:
        fields = {PERSPECTIVE_MARK: "1", "X-Forwarded-For": forwarded_for}
        try:
            async with asyncio.timeout(self._timeout):
                return await client.request(method, path, fields, body, size)
        except NoAnswer as error:
            raise NoVote(str(error)) from None
        except TimeoutError:
            raise NoVote("It does not answer in time.") from None
        finally:
            if not self._keeps_connections:
                client.close()

    async def _look_again_and_again(self) -> None:
        while True:
            await asyncio.gather(*map(self._look, range(len(self._urls))))
            await self._sleep(_LOOK_INTERVAL)

    async def _look(self, place: int) -> None:
        """Warn once of what is wrong with a place, and log its recovery."""
        client = self._clients[place]
        url = client.url
        try:
            trouble = await self._trouble_of(client)
        except NoVote as error:
            trouble = str(error)
        if trouble:
            # No check waits for the vote of a place that hangs, so no vote of its would fail.
            self._metrics.count_votes(place, VoteOutcome.FAILED)
        if trouble == self._trouble.get(url, ""):
            return
        self._trouble[url] = trouble
        if trouble:
            logger.warning("The perspective %s: %s", url, trouble)
        else:
            logger.info("The perspective %s is well again", url)

    async def _trouble_of(self, client: PlaceClient) -> str:
        answer = await self._request(client, "GET", "/ip", _FORWARDED_TEST_ADDRESS)
        try:
            seen = CallerAddress.model_validate_json(answer.body).ip
        except ValidationError:
            return f"It does not answer as a port checker does (HTTP status {answer.status})."
        if seen != _FORWARDED_TEST_ADDRESS:
            return (
                "It does not trust this server. Add this server's address to its "
                "PORT_CHECKER_TRUSTED_PROXIES, and have a proxy in front of it add to "
                "X-Forwarded-For, not replace it."
            )
        if client.url.startswith("http:") and not client.is_nearby:
            return "It is asked in plain text over the internet. Use https."
        return ""


def _require_result(good: object, error: object) -> None:
    """Refuse a result that no port checker gives.

    Raises:
        ValueError: It is good and has an error, or neither; or the error does not fit one line of
            the log: it is too long, or has characters that control terminals or end a value.
    """
    if good is not (error is None):
        raise ValueError
    if error is None:
        return
    if not isinstance(error, str) or len(error) > _ERROR_LENGTH or not error.strip():
        raise ValueError
    if not error.isprintable() or '"' in error:
        raise ValueError


def _tls_context() -> ssl.SSLContext:
    """Return a context that trusts the system's authorities, or those of SSL_CERT_FILE."""
    context = ssl.create_default_context()
    # Python 3.13 sets this flag; here every Python judges alike.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    context.options |= ssl.OP_NO_RENEGOTIATION
    return context
