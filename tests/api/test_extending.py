"""What ``create_app`` returns can be extended as any other application of FastAPI's."""

import asyncio
import inspect
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import pytest
from fastapi import (
    APIRouter,
    BackgroundTasks,
    Depends,
    FastAPI,
    HTTPException,
    Request,
    Response,
    WebSocket,
)
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException

from port_checker import main
from port_checker.api.app import create_app
from port_checker.settings import Settings
from tests.support.namespace import ROOT
from tests.support.service import ask, serve

OUR_PATHS = ["/check-ports", "/check-tls", "/ip", "/health", "/port/{port}"]


class Item(BaseModel):
    """What the added routes take and return."""

    name: str
    price: float | None = None


@pytest.fixture
def app() -> FastAPI:
    return create_app(Settings(retries=1))


def test_it_is_a_plain_fastapi(app: FastAPI) -> None:
    assert type(app) is FastAPI


def test_the_one_that_the_environment_makes_can_be_found_without_making_it() -> None:
    assert "app" in dir(main)
    assert "app" not in vars(main)
    assert type(main.app) is FastAPI
    del main.app


def test_routes_take_parameters_and_return_values(app: FastAPI) -> None:
    @app.get("/one")
    def one() -> dict[str, int]:
        return {"one": 1}

    @app.post("/items/{number}", status_code=201, response_model_exclude_none=True)
    async def add(number: int, item: Item, shout: bool = False) -> Item:
        return Item(name=f"{number} {item.name.upper() if shout else item.name}")

    with serve(app) as client:
        assert client.get("/one").json() == {"one": 1}
        added = client.post("/items/7?shout=true", json={"name": "port"})
        assert (added.status_code, added.json()) == (201, {"name": "7 PORT"})


def test_wrong_input_to_a_route_is_answered_as_fastapi_does(app: FastAPI) -> None:
    @app.post("/items")
    def add(item: Item) -> Item:
        return item

    with serve(app) as client:
        answer = client.post("/items", json={"price": 1})
    assert answer.status_code == 422
    (error,) = answer.json()["detail"]
    assert (error["type"], error["loc"]) == ("missing", ["body", "name"])


def test_dependencies_are_cleaned_up_and_background_tasks_run(app: FastAPI) -> None:
    events: list[str] = []

    async def resource() -> AsyncIterator[str]:
        events.append("open")
        try:
            yield "resource"
        finally:
            events.append("close")

    router = APIRouter(prefix="/more", dependencies=[Depends(lambda: events.append("router"))])

    @router.get("/use")
    async def use(used: Annotated[str, Depends(resource)], tasks: BackgroundTasks) -> str:
        tasks.add_task(events.append, "task")
        return used

    app.include_router(router)
    with serve(app) as client:
        assert client.get("/more/use").json() == "resource"
    assert events == ["router", "open", "task", "close"]


def test_middleware_sees_every_request(app: FastAPI) -> None:
    @app.middleware("http")
    async def mark(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        response = await call_next(request)
        response.headers["Marked"] = request.url.path
        return response

    with serve(app) as client:
        for path in ["/check-ports", "/ip", "/health", "/port/0", "/", "/docs", "/nothing"]:
            assert client.get(path).headers["Marked"] == path
        assert ask(client, client.base_url.port or 0).json()["success"] is True


def test_http_exceptions_of_a_route_are_answered_as_fastapi_does(app: FastAPI) -> None:
    @app.get("/raise/{status}")
    def fail(status: int, detail: str | None = None) -> None:
        raise HTTPException(status, detail, {"Why": "because"})

    @app.get("/starlette/{status}")
    def fail_otherwise(status: int) -> None:
        raise StarletteHTTPException(status, "No.")

    with serve(app) as client:
        for status in 400, 404, 405, 418, 503:
            answer = client.get(f"/raise/{status}?detail=No.")
            assert (answer.status_code, answer.json()) == (status, {"detail": "No."})
            assert answer.headers["Why"] == "because"
        assert client.get("/raise/404").json() == {"detail": "Not Found"}
        assert client.get("/raise/304").content == b""
        for status in 404, 405, 418:
            answer = client.get(f"/starlette/{status}")
            assert (answer.status_code, answer.json()) == (status, {"detail": "No."})


def test_a_bug_of_a_route_is_not_shown(app: FastAPI, caplog: pytest.LogCaptureFixture) -> None:
    @app.get("/bug")
    def bug() -> None:
        raise ZeroDivisionError("secret")

    with serve(app) as client:
        answer = client.get("/bug")
    assert answer.status_code == 500
    assert answer.json()["detail"]["code"] == "INTERNAL_ERROR"
    assert "secret" in caplog.text


def test_exception_handlers_can_be_added_and_replaced(app: FastAPI) -> None:
    class Broken(Exception):
        pass

    @app.get("/broken")
    def broken() -> None:
        raise Broken

    @app.exception_handler(Broken)
    def answer_broken(_: Request, __: Broken) -> JSONResponse:
        return JSONResponse("broken", 418)

    @app.exception_handler(StarletteHTTPException)
    def answer_other(_: Request, error: StarletteHTTPException) -> JSONResponse:
        return JSONResponse("other", error.status_code)

    with serve(app) as client:
        answers = [client.get("/broken"), client.get("/nothing")]
    assert [(it.status_code, it.json()) for it in answers] == [(418, "broken"), (404, "other")]


def test_method_not_allowed_names_the_methods_of_all_routes_of_a_path(app: FastAPI) -> None:
    @app.put("/check-ports")
    def put() -> None: ...

    @app.get("/one")
    def one() -> None: ...

    with serve(app) as client:
        for path, allow in {"/check-ports": "POST, PUT", "/ip": "GET, HEAD", "/one": "GET"}.items():
            answer = client.delete(path)
            assert answer.json()["detail"]["code"] == "METHOD_NOT_ALLOWED"
            assert answer.headers["Allow"] == allow


def test_other_applications_can_be_mounted_and_it_can_be_mounted(app: FastAPI) -> None:
    inner = FastAPI()

    @inner.get("/one")
    def one() -> int:
        return 1

    app.mount("/inner", inner)
    outer = FastAPI()
    outer.mount("/checker", app)
    with serve(app) as client:
        assert client.get("/inner/one").json() == 1
        assert client.get("/inner/none").json() == {"detail": "Not Found"}
    with serve(outer) as client:
        assert client.get("/checker/health").json() == {"status": "ok"}
        assert client.get("/checker/inner/one").json() == 1
        body = {"provider_ip": "127.0.0.1", "ports": [client.base_url.port]}
        assert client.post("/checker/check-ports", json=body).json()["success"] is True
        refused = client.get("/checker/check-ports")
        assert (refused.status_code, refused.headers["Allow"]) == (405, "POST")


def talk(app: FastAPI, path: str, host: bytes = b"localhost") -> list[MutableMapping[str, Any]]:
    """Take a server's part, since ours has no web sockets; return what the application sends."""
    received = iter([{"type": "websocket.connect"}, {"type": "websocket.receive", "text": "hello"}])
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        return next(received)

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "websocket",
        "path": path,
        "query_string": b"",
        "headers": [(b"host", host)],
        "extensions": {"websocket.http.response": {}},
    }
    asyncio.run(app(scope, receive, send))
    return sent


async def echo(socket: WebSocket) -> None:
    await socket.accept()
    await socket.send_text(await socket.receive_text())
    await socket.close()


def test_web_sockets_can_be_added(app: FastAPI) -> None:
    app.add_api_websocket_route("/echo", echo)
    accepted, answer, closed = talk(app, "/echo")
    assert (accepted["type"], closed["type"]) == ("websocket.accept", "websocket.close")
    assert answer["text"] == "hello"


def test_web_sockets_can_be_refused_as_fastapi_does(app: FastAPI) -> None:
    @app.websocket("/none")
    async def none(_: WebSocket) -> None:
        raise StarletteHTTPException(404)

    start, body = talk(app, "/none")
    assert (start["status"], body["body"]) == (404, b'{"detail":"Not Found"}')


def test_web_sockets_are_for_allowed_hosts_too() -> None:
    app = create_app(Settings(allowed_hosts=("checker.example",)))
    app.add_api_websocket_route("/echo", echo)
    assert talk(app, "/echo", b"checker.example")[1]["text"] == "hello"
    assert talk(app, "/echo", b"elsewhere.example")[0]["status"] == 403


def test_files_can_be_mounted_beside_ours(app: FastAPI, tmp_path: Path) -> None:
    (tmp_path / "mine.css").write_text("body {}")
    app.mount("/static", StaticFiles(directory=tmp_path), name="static")
    with serve(app) as client:
        assert client.get("/static/mine.css").text == "body {}"
        ours = re.findall(r'static/[^"]+', client.get("/docs").text)
        assert {client.get(f"/{path}").status_code for path in ours} == {200}


def test_a_router_brings_its_lifespan(app: FastAPI) -> None:
    events: list[str] = []

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        events.append("start")
        yield
        events.append("stop")

    app.include_router(APIRouter(lifespan=lifespan))
    with serve(app) as client:
        client.get("/health").raise_for_status()
        assert events == ["start"]
    assert events == ["start", "stop"]


def test_dependencies_can_be_overridden(app: FastAPI) -> None:
    def word() -> str:
        return "real"

    @app.get("/word")
    def get_word(word: Annotated[str, Depends(word)]) -> str:
        return word

    app.dependency_overrides[word] = lambda: "other"
    with serve(app) as client:
        assert client.get("/word").json() == "other"


@pytest.mark.skipif(
    "max_body_size" not in inspect.signature(FastAPI.post).parameters,
    reason="FastAPI has it from 0.163 on",
)
def test_the_size_of_a_route_body_can_be_limited(app: FastAPI) -> None:
    options: dict[str, Any] = {"max_body_size": 20}

    @app.post("/items", **options)
    def add(item: Item) -> Item:
        return item

    with serve(app) as client:
        assert client.post("/items", json={"name": "short"}).status_code == 200
        assert client.post("/items", json={"name": "long" * 10}).status_code == 413


def test_the_schema_lists_what_is_added_before_and_after_it_was_first_read(app: FastAPI) -> None:
    @app.get("/one", operation_id="one")
    def one() -> int:
        return 1

    with serve(app) as client:
        first = client.get("/openapi.json").json()
        assert list(first["paths"]) == [*OUR_PATHS, "/one"]
        app.add_api_route("/two", one, operation_id="two")
        second = client.get("/openapi.json").json()
    assert list(second["paths"]) == [*OUR_PATHS, "/one", "/two"]
    assert second == app.openapi()
    for path in OUR_PATHS:
        assert second["paths"][path] == first["paths"][path]


def test_the_schema_can_be_completed_by_hand(app: FastAPI) -> None:
    by_hand = {"summary": "A proxy's", "get": {"responses": {}}, "parameters": []}
    app.openapi()["paths"]["/by-hand"] = by_hand
    assert app.openapi()["paths"]["/by-hand"] == by_hand


def test_models_may_have_the_names_of_ours(app: FastAPI) -> None:
    class CheckPortsRequest(BaseModel):
        mine: int

    class ErrorResponse(BaseModel):
        mine: str

    @app.post("/mine", responses={400: {"model": ErrorResponse}})
    def mine(body: CheckPortsRequest) -> int:
        return body.mine

    with serve(app) as client:
        assert client.post("/mine", json={"mine": 1}).json() == 1
        schema = client.get("/openapi.json").json()
    models = schema["components"]["schemas"]
    named = set(re.findall(r"#/components/schemas/([^\"]+)", json.dumps(schema)))
    assert named <= models.keys()
    limits = [
        model["properties"].get("ports", {}).get("maxItems")
        for model in models.values()
        if "properties" in model
    ]
    assert limits.count(Settings().max_ports) == 1


def test_our_routes_can_be_replaced(app: FastAPI) -> None:
    for route in [*app.routes]:
        if getattr(route, "path", "") in ("/", "/check-ports", "/check-tls"):
            app.routes.remove(route)

    @app.post("/check-ports")
    def check_ports(ports: int) -> int:
        return ports

    @app.get("/")
    def home() -> str:
        return "mine"

    with serve(app) as client:
        assert client.post("/check-ports?ports=7").json() == 7
        assert client.get("/").json() == "mine"
        assert client.post("/check-tls").status_code == 404
        assert client.get("/openapi.json").json() == app.openapi()


def test_the_example_in_the_docs_mounts_it_and_runs_its_lifespan() -> None:
    (example,) = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs/settings.md").read_text(), re.M | re.S
    )
    names: dict[str, Any] = {}
    exec(example, names)  # noqa: S102  # our own
    with serve(names["app"]) as client:
        assert client.get("/checker/health").json() == {"status": "ok"}
        assert names["checker"].openapi_schema, "made by the lifespan"
