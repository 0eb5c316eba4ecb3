"""What imports what, and what we use of libraries beyond their public interface."""

import ast
import functools
import inspect
import io
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import fastapi_offline
import pytest
import redis.asyncio
import uvicorn
from dotenv.parser import Binding, parse_stream
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

import port_checker
from port_checker.server.protocol import BoundedProtocol

PACKAGE = Path(port_checker.__file__).parent
ROOMS = {"server", "api", "provider"}
ENTRY_POINTS = {"port_checker.cli", "port_checker.main", "port_checker.__main__"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path.read_text() for path in PACKAGE.rglob("*.py")}


def imports(nodes: list[ast.AST]) -> set[str]:
    """The package's modules that these import statements name."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports are not followed here"
            within = {f"{node.module}.{alias.name}" for alias in node.names} & SOURCES.keys()
            names.update(within or {str(node.module)})
    return names & SOURCES.keys()


@functools.cache
def imports_by_module() -> dict[str, set[str]]:
    """Imports anywhere in a module, inside functions and under TYPE_CHECKING included."""
    return {name: imports(list(ast.walk(ast.parse(text)))) for name, text in SOURCES.items()}


def room_of(module: str) -> str | None:
    """The room that a module is in; None on the ground floor."""
    return next((part for part in module.split(".") if part in ROOMS), None)


def test_contributing_describes_every_module() -> None:
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    layout = text.partition("## Layout")[2].partition("\ntests/")[0]
    described = set(re.findall(r"\b\w+[.]py\b", layout)) - {"test_layout.py"}
    assert described == {path.name for path in PACKAGE.rglob("[!_]*.py")}


def test_imports_have_no_circle() -> None:
    TopologicalSorter(imports_by_module()).prepare()  # raises CycleError, which names the modules


def test_rooms_are_imported_only_from_inside_and_by_entry_points() -> None:
    wrong = [
        f"{module} imports {imported}"
        for module, all_imported in imports_by_module().items()
        for imported in all_imported
        if room_of(imported) not in (None, room_of(module)) and module not in ENTRY_POINTS
    ]
    assert not wrong


# Where libraries are imported; the ground floor serves programs that have none of them.
ROOMS_OF_LIBRARIES = {
    "fastapi": {"api"},
    "starlette": {"api", "server"},
    "uvicorn": {"server"},
    "redis": {"api"},
    "prometheus_client": {"server"},
}


@pytest.mark.parametrize("library", ROOMS_OF_LIBRARIES)
def test_a_library_is_imported_only_in_its_rooms(library: str) -> None:
    statement = re.compile(rf"^\s*(?:from|import) {library}\b", re.MULTILINE)
    rooms = {room_of(module) for module, text in SOURCES.items() if statement.search(text)}
    assert rooms == ROOMS_OF_LIBRARIES[library]


@pytest.mark.parametrize("module", ["checker", "connect", "tls"])
def test_checks_know_nothing_of_http_and_settings(module: str) -> None:
    of_http = {f"port_checker.{name}" for name in ("schemas", "settings", "verdicts", "metrics")}
    assert not imports_by_module()[f"port_checker.{module}"] & of_http


def test_program_imports_a_room_only_when_its_command_is_called() -> None:
    at_import = imports(list(ast.parse(SOURCES["port_checker.cli"]).body))
    assert not {module for module in at_import if room_of(module)}


def test_provider_loads_nothing_of_the_server_and_nothing_slow() -> None:
    """Most of the time that a check takes of the processor is its start."""
    modules = "port_checker.provider, port_checker.provider.lines"
    script = f"import {modules}, sys; print(*sys.modules, sep='\\n')"
    loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "port_checker.provider.verify" in loaded
    slow = {"pydantic", "rich"}
    assert not {"fastapi", "starlette", "uvicorn", "redis", *slow}.intersection(loaded)


# When one of these fails, the library's new version changed what is not part of its interface.
# Read the new version, adapt the module named, and only then raise the upper bound in pyproject.


def test_uvicorn_protocol_is_the_one_that_server_protocol_extends() -> None:
    has = {*dir(HttpToolsProtocol), *HttpToolsProtocol.__init__.__code__.co_names}
    uses = {"client", "cycle", "flow", "headers", "loop", "parser", "scope", "transport"}
    overrides = {
        name
        for name, value in vars(BoundedProtocol).items()
        if inspect.isfunction(value) and not name.startswith("_")
    } - {"drain", "leave", "make_way"}  # our own
    assert uses | overrides <= has
    of_cycle = {"keep_alive", "message_event", "more_body", "response_complete", "response_started"}
    assert of_cycle <= {*RequestResponseCycle.__init__.__code__.co_names}


def test_uvicorn_server_is_the_one_that_server_run_extends() -> None:
    made = {*uvicorn.Server.__init__.__code__.co_names, *ServerState.__init__.__code__.co_names}
    assert {"config", "server_state", "force_exit", "should_exit"} <= made
    assert {"connections", "tasks", "total_requests"} <= made
    for method in "startup", "shutdown":
        parameters = inspect.signature(getattr(uvicorn.Server, method)).parameters
        assert [*parameters] == ["self", "sockets"]
    # It closes the listeners, and then waits for tasks as long as the configuration says.
    names = uvicorn.Server.shutdown.__code__.co_names
    assert {"servers", "close", "server_state", "timeout_graceful_shutdown"} <= {*names}
    assert callable(uvicorn.Server.handle_exit)
    assert "capture_signals" in uvicorn.Server.serve.__code__.co_names


def test_fastapi_offline_has_the_files_of_swagger_ui() -> None:
    folder = Path(fastapi_offline.__file__).parent / "static"
    assert (folder / "swagger-ui-bundle.js").stat().st_size > 100_000
    assert (folder / "swagger-ui.css").stat().st_size > 10_000


def test_dotenv_parser_tells_what_settings_look_for() -> None:
    """Each binding's name and value, whether it is wrong, and the line in which its text begins."""
    good, bare, wrong = parse_stream(io.StringIO("A='1'\n\nB\n'C=\n"))
    assert isinstance(good, Binding)
    assert (good.key, good.value, good.error) == ("A", "1", False)
    assert (bare.key, bare.value, bare.error) == ("B", None, False)
    assert (bare.original.string, bare.original.line) == ("\nB\n", 2)
    assert wrong.error


def test_redis_connects_to_where_its_connections_say() -> None:
    """Api's shared_limits puts addresses there that it has looked up itself, and a name for TLS."""
    assert redis.asyncio.Connection(host="a", port=1)._connection_arguments() == {
        "host": "a",
        "port": 1,
    }
    assert {"ssl", "host"} <= {*redis.asyncio.SSLConnection(host="a")._connection_arguments()}
    assert "_connection_arguments" in redis.asyncio.Connection._connect.__code__.co_names


def test_the_debian_package_has_the_version_of_the_program() -> None:
    first = (PACKAGE.parent / "debian" / "changelog").read_text().splitlines()[0]
    assert first.startswith(f"golem-port-checker ({port_checker.__version__}) ")
