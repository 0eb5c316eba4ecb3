"""One exchange with another place: what it may send, and what it may not make this server do."""

import asyncio
import contextlib
import itertools
import socket
import ssl
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme
import uvloop

from port_checker.api.place_client import NoAnswer, PlaceAnswer, PlaceClient
from port_checker.api.place_tls import HandshakeSteps, PlaceTls
from port_checker.resolver import Resolver
from tests.support.hostile_tls import showing_in_tls_1_3, slow_certificate
from tests.support.loopback import refused_port, silent_port
from tests.support.tls import endpoint

Behave = Callable[["Place", asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Use = Callable[[PlaceClient], Awaitable[None]]

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


def answer(body: bytes, *fields: bytes) -> bytes:
    length = b"Content-Length: %d" % len(body)
    return OK + b"\r\n".join([length, *fields]) + b"\r\n\r\n" + body


class Addresses(Resolver):
    """What a name stands for; without an address, nobody ever tells."""

    def __init__(self, *addresses: str) -> None:
        super().__init__()
        self._addresses = addresses

    async def resolve(self, host: str, family: int = 0) -> list[str]:
        assert (host, family) == ("place.test", 0)
        if not self._addresses:
            await asyncio.Event().wait()
        return [*self._addresses]


class Place:
    """A server that does what a test wants.

    Attributes:
        requests: The heads of the requests that came.
        connections: How many connections were made.
    """

    def __init__(self, behave: Behave) -> None:
        self.requests: list[bytes] = []
        self.connections = 0
        self._behave = behave
        self.tasks: list[asyncio.Task[None] | None] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.tasks.append(asyncio.current_task())
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                self.requests.append(await reader.readuntil(b"\r\n\r\n"))
                await self._behave(self, reader, writer)
                await writer.drain()
        writer.transport.abort()


def visit(
    behave: Behave | bytes,
    use: Use,
    resolver: Resolver | None = None,
    *,
    context: ssl.SSLContext | None = None,
    trusting: ssl.SSLContext | None = None,
) -> Place:
    """Use a client of a place that behaves so, or that answers each request with some bytes."""

    async def send(_: Place, __: object, writer: asyncio.StreamWriter) -> None:
        assert isinstance(behave, bytes)
        writer.write(behave)

    place = Place(send if isinstance(behave, bytes) else behave)

    async def run() -> None:
        server = await asyncio.start_server(place.serve, "127.0.0.1", 0, ssl=context)
        host = "place.test" if resolver else "127.0.0.1"
        scheme = "https" if context else "http"
        port = server.sockets[0].getsockname()[1]
        client = PlaceClient(
            f"{scheme}://{host}:{port}/base",
            resolver or Resolver(),
            trusting or ssl.create_default_context(),
        )
        async with server:
            try:
                async with asyncio.timeout(60):
                    await use(client)
            finally:
                client.close()
                await asyncio.gather(*filter(None, place.tasks))

    asyncio.run(run())
    return place


async def get(client: PlaceClient, size: int = 1000) -> PlaceAnswer:
    return await client.request("GET", "/ip", {}, b"", size)


def test_a_connection_is_used_again_and_a_request_says_who_it_is_for() -> None:
    async def use(client: PlaceClient) -> None:
        for _ in range(2):
            assert (await client.request("POST", "/x", {"A": "b"}, b"", 9))[:2] == (200, b"{}")

    place = visit(answer(b"{}"), use)
    assert place.connections == 1
    line, *fields = place.requests[1].decode().splitlines()[:-1]
    assert line == "POST /base/x HTTP/1.1"
    values = {name.lower(): value for name, value in (field.split(": ") for field in fields)}
    assert values.pop("host").startswith("127.0.0.1:")
    assert values.pop("user-agent").startswith("port-checker/")
    assert values == {"accept": "application/json", "accept-encoding": "identity", "a": "b"}


def test_what_the_environment_and_a_place_say_changes_no_request(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("default login somebody password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    with refused_port() as nobody:
        for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{nobody}")

        async def use(client: PlaceClient) -> None:
            for _ in range(2):
                await get(client)

        place = visit(answer(b"{}", b"Set-Cookie: a=b", b"Alt-Svc: h3=:1"), use)
    first, second = place.requests
    assert first == second
    assert b"cookie" not in first.lower()
    assert b"authorization" not in first.lower()


def test_a_redirect_is_an_answer() -> None:
    async def use(client: PlaceClient) -> None:
        assert (await get(client)).status == 307

    answered = b"HTTP/1.1 307 X\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"
    assert visit(answered, use).connections == 1


@pytest.mark.parametrize(
    "answered",
    [
        b"HTTP/1.0 200 OK\r\n\r\n{}",
        OK + b"Connection: close\r\n\r\n{}",
        CHUNKED + b"2;x=y\r\n{}\r\n0\r\nA: b\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 X\r\nLink: x\r\n\r\n" + answer(b"{}"),
    ],
)
def test_answers_are_read_as_http_has_them(answered: bytes) -> None:
    async def behave(_: Place, __: object, writer: asyncio.StreamWriter) -> None:
        writer.write(answered)
        writer.close()

    async def use(client: PlaceClient) -> None:
        assert (await get(client))[:2] == (200, b"{}")

    visit(behave, use)


MEGABYTE = 1_000_000
NONSENSE = {
    "not HTTP": b"SSH-2.0-x\r\n\r\n",
    "half an answer": OK + b"Content-Length: 9\r\n\r\n{",
    "half a chunk": CHUNKED + b"9\r\n{",
    "two lengths": OK + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}x",
    "no answer": b"",
    "an endless head": OK + b"A: " + b"b" * MEGABYTE,
    "endless fields": OK + b"A: b\r\n" * MEGABYTE,
    "endless interim answers": b"HTTP/1.1 100 C\r\n\r\n" * MEGABYTE,
    "chunks of one byte": CHUNKED + b"1\r\nx\r\n" * MEGABYTE,
    "an endless chunk extension": CHUNKED + b"1;" + b"x" * MEGABYTE,
    "an endless trailer": CHUNKED + b"0\r\n" + b"A: b\r\n" * MEGABYTE,
    "a long body": answer(b"x" * 1001),
    "a body without an end": OK + b"\r\n" + b"x" * MEGABYTE,
    "another protocol": b"HTTP/1.1 101 X\r\nUpgrade: websocket\r\n\r\n",
}


@pytest.mark.parametrize("answered", NONSENSE.values(), ids=NONSENSE.keys())
def test_nonsense_is_no_answer_and_its_connection_is_not_kept(answered: bytes) -> None:
    async def behave(_: Place, __: object, writer: asyncio.StreamWriter) -> None:
        writer.write(answered)
        if len(answered) < MEGABYTE:
            writer.close()

    async def use(client: PlaceClient) -> None:
        for _ in range(2):
            with pytest.raises(NoAnswer):
                await get(client)

    assert visit(behave, use).connections == 2


def test_what_follows_an_answer_is_not_the_next_one() -> None:
    """It may be one to another caller, about the same ports."""
    is_answered, is_closed = asyncio.Event(), asyncio.Event()

    async def behave(
        place: Place, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if place.connections == 1:  # at once
            writer.write(answer(b"1") + answer(b"another's"))
        elif place.connections == 2:  # when nothing is asked any more
            writer.write(answer(b"2"))
            await is_answered.wait()
            writer.write(answer(b"another's"))
            with contextlib.suppress(ConnectionError):
                await reader.read()
            is_closed.set()
        else:
            writer.write(answer(b"3"))

    async def use(client: PlaceClient) -> None:
        assert (await get(client)).body == b"1"
        assert (await get(client)).body == b"2"
        is_answered.set()
        await is_closed.wait()
        assert (await get(client)).body == b"3"

    assert visit(behave, use).connections == 3


def test_no_request_is_made_twice() -> None:
    """A place may have made the check, though its answer never came."""

    async def behave(place: Place, _: object, writer: asyncio.StreamWriter) -> None:
        if len(place.requests) == 1:
            writer.write(answer(b"{}"))
        else:
            writer.close()

    async def use(client: PlaceClient) -> None:
        await get(client)
        with pytest.raises(NoAnswer, match=r"It cannot be reached \(.*clos"):
            await get(client)

    place = visit(behave, use)
    assert (place.connections, len(place.requests)) == (1, 2)


def test_a_connection_that_is_reset_at_any_moment_is_no_answer() -> None:
    """With uvloop, which serves: it refuses to write before it tells that a connection is lost."""

    def reset(listener: socket.socket) -> None:
        for number in range(1000):
            try:
                connection, _ = listener.accept()
            except OSError:  # the test has failed
                return
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if number % 2:
                connection.recv(4096)
                connection.sendall(answer(b"{}"))
            threading.Timer(0.0005 * (number % 7), connection.close).start()
        listener.close()

    async def ask_until_it_refuses(port: int) -> int:
        client = PlaceClient(f"http://127.0.0.1:{port}", Resolver(), ssl.create_default_context())
        answered = 0
        for number in itertools.count():
            await asyncio.sleep(0.001 * (number % 3 == 0))
            try:
                answered += (await get(client)).status == 200
            except NoAnswer as error:
                if "refused" in str(error):
                    break
        return answered

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor() as pool:
        pool.submit(reset, listener)
        try:
            assert uvloop.run(ask_until_it_refuses(listener.getsockname()[1])) > 0
        finally:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)


def test_a_request_that_is_cancelled_closes_its_connection() -> None:
    is_asked, is_closed = asyncio.Event(), asyncio.Event()

    async def behave(_: Place, reader: asyncio.StreamReader, __: object) -> None:
        is_asked.set()
        with contextlib.suppress(ConnectionError):
            await reader.read()
        is_closed.set()

    async def use(client: PlaceClient) -> None:
        request = asyncio.create_task(get(client))
        await is_asked.wait()
        request.cancel()
        await is_closed.wait()

    visit(behave, use)


# Where it is


def test_the_next_address_of_a_name_is_tried_when_one_refuses_or_is_silent() -> None:
    async def use(client: PlaceClient) -> None:
        assert (await get(client)).body == b"{}"

    for first in "127.0.0.2", "127.0.0.3":  # nobody listens there
        visit(answer(b"{}"), use, Addresses(first, "127.0.0.1"))


def test_a_silent_address_does_not_stand_in_the_way_of_the_next() -> None:
    async def ask(port: int) -> None:
        async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer(b"{}"))
            writer.close()

        addresses = Addresses("127.0.0.1", "127.0.0.2")
        client = PlaceClient(f"http://place.test:{port}", addresses, ssl.create_default_context())
        async with await asyncio.start_server(behave, "127.0.0.2", port):
            assert (await get(client)).body == b"{}"
            client.close()

    with silent_port() as silent:
        asyncio.run(ask(silent))


def test_a_name_without_an_address_or_an_answer_is_no_answer() -> None:
    async def ask(url: str, resolver: Resolver) -> None:
        client = PlaceClient(url, resolver, ssl.create_default_context())
        await get(client)

    with pytest.raises(NoAnswer, match=r"It cannot be reached \(.+\)\."):
        asyncio.run(ask("http://place.invalid", Resolver()))
    with pytest.raises(NoAnswer, match=r"It cannot be reached \(timed out\)\."):
        asyncio.run(ask("http://place.test", Addresses()))


# Over TLS


def test_a_certificate_is_verified_for_the_name_wherever_that_leads(authority: trustme.CA) -> None:
    trusting = ssl.create_default_context()
    names: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("place.test").configure_cert(context)
    context.sni_callback = lambda _, name, __: names.append(name)

    async def use(client: PlaceClient) -> None:
        assert (await get(client)).body == b"{}"

    resolver = Addresses("127.0.0.1")
    place = visit(answer(b"{}"), use, resolver, context=context, trusting=trusting)
    assert names == ["place.test"]
    assert b"\r\nHost: place.test:" in place.requests[0]


def bad_certificates(authority: trustme.CA) -> Iterator[tuple[trustme.LeafCert, str]]:
    past = datetime.now(UTC) - timedelta(days=1)
    yield authority.issue_cert("place.test", not_after=past), "certificate has expired"
    yield authority.issue_cert("other.test"), "Hostname mismatch"
    yield trustme.CA().issue_cert("place.test"), "unable to get local issuer certificate"


def test_a_place_whose_certificate_is_bad_hears_no_request(authority: trustme.CA) -> None:
    trusting = ssl.create_default_context()
    for certificate, reason in bad_certificates(authority):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.configure_cert(context)

        async def use(client: PlaceClient, reason: str = reason) -> None:
            with pytest.raises(NoAnswer, match=f"certificate verify failed: .*{reason}"):
                await get(client)

        resolver = Addresses("127.0.0.1")
        place = visit(answer(b"{}"), use, resolver, context=context, trusting=trusting)
        assert place.requests == []


def test_answers_over_tls_are_read_as_others(authority: trustme.CA) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("place.test").configure_cert(context)
    long = b"a" * 100_000

    async def behave(place: Place, _: object, writer: asyncio.StreamWriter) -> None:
        if len(place.requests) < 3:
            writer.write(answer(long))
        else:
            writer.write(OK + b"\r\n{}")
            writer.close()  # the end of a body without a length

    async def use(client: PlaceClient) -> None:
        for body in long, long, b"{}", b"{}":
            assert (await get(client, 200_000)).body == body

    place = visit(behave, use, Addresses("127.0.0.1"), context=context)
    assert place.connections == 2


def test_who_asks_others_waits_for_no_places_certificates() -> None:
    """OpenSSL would take two seconds in the event loop's turn, and minutes for a longer chain."""
    certificates = [slow_certificate(serial) for serial in range(1, 11)]

    async def run(port: int) -> tuple[float, int]:
        client = PlaceClient(f"https://127.0.0.1:{port}", Resolver(), ssl.create_default_context())
        before = time.thread_time(), threading.active_count()
        requests = [asyncio.create_task(get(client)) for _ in range(5)]
        for request in requests:
            with pytest.raises(NoAnswer, match="timed out"):
                await request
        return time.thread_time() - before[0], threading.active_count() - before[1]

    with endpoint(showing_in_tls_1_3(certificates)) as port:
        before = time.process_time()
        loops, threads = uvloop.run(run(port))
        assert loops < (time.process_time() - before) / 2
        # The endpoint has one for each connection.
    assert threads <= 1 + 5


def test_a_place_that_leaves_during_the_last_step_of_a_handshake(authority: trustme.CA) -> None:
    context, trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("127.0.0.1").configure_cert(context)
    context.maximum_version = ssl.TLSVersion.TLSv1_2  # the server says the last word
    authority.configure_trust(trusting)

    def behave(connection: socket.socket) -> None:
        context.wrap_socket(connection, server_side=True).close()

    class SlowSteps(HandshakeSteps):
        async def take(self, step: Callable[[], object]) -> Exception | None:
            error = await super().take(step)
            while error is None and not connections[0].is_closing():
                await asyncio.sleep(0.01)
            return error

    async def run(port: int) -> None:
        tls = PlaceTls(trusting, "127.0.0.1", asyncio.Protocol(), SlowSteps())
        connections.append(tls)
        await asyncio.get_running_loop().create_connection(lambda: tls, "127.0.0.1", port)
        with pytest.raises(ConnectionResetError):
            await tls.shake_hands()

    connections: list[PlaceTls] = []
    with endpoint(behave) as port:
        asyncio.run(run(port))


def test_a_handshake_that_never_ends_is_bounded_in_bytes() -> None:
    hello_requests = b"\x16\3\3\x3e\x80" + b"\0\0\0\0" * 4000  # which OpenSSL ignores

    def behave(connection: socket.socket) -> None:
        connection.recv(1000)
        while True:
            connection.sendall(hello_requests)

    async def run(port: int) -> None:
        client = PlaceClient(f"https://127.0.0.1:{port}", Resolver(), ssl.create_default_context())
        with pytest.raises(NoAnswer, match="its handshake is too long"):
            await get(client)

    with endpoint(behave) as port:
        asyncio.run(run(port))
