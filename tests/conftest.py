"""Fixtures: the service on a real uvicorn, and an environment without settings of the developer."""

import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from uvicorn import Server

from port_checker.server.app import create_app
from port_checker.server.protocol import Room
from port_checker.server.run import listen, server_config
from port_checker.server.settings import Settings


@pytest.fixture(autouse=True)
def _no_settings_of_the_developer(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for name in os.environ:
        if name.startswith(("PORT_CHECK_", "PORT_CHECKER_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))  # without a .env


@contextmanager
def serve(
    app: FastAPI | None = None, host: str = "127.0.0.1", room: Room | None = None, **values: Any
) -> Iterator[httpx.Client]:
    """Serve an application from a thread, on a port of its own.

    Args:
        app: The application; else one is made of the settings.
        host: The address to listen on.
        room: Bounds the connections.
        values: Settings, by field name.

    Yields:
        A client of it.
    """
    settings = Settings(**values)
    with listen(host, 0) as listener:
        make_app = functools.partial(create_app, settings) if app is None else lambda: app
        server = Server(server_config(settings, make_app, room or Room(1000)))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            port = listener.getsockname()[1]
            reachable = {"::": "[::1]", "::1": "[::1]"}.get(host, "127.0.0.1")
            with httpx.Client(base_url=f"http://{reachable}:{port}", timeout=30) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join()
