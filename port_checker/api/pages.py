"""What people open in a browser: a page that checks their ports, /docs, and the files of both.

All URLs in them are relative, so both work under any path that a proxy puts before them.
"""

import asyncio
import functools
import gzip
import hashlib
import html
import json
import re
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Final

import fastapi_offline
from fastapi import FastAPI, Request, Response

from port_checker import advice
from port_checker.api.accept import accepts, prefers_html
from port_checker.api.errors import NO_STORE
from port_checker.api.wheel import Wheel, installed_wheel
from port_checker.connect import VerdictKind
from port_checker.settings import Settings
from port_checker.verdicts import PORT_VERDICTS, TLS_KINDS

_WEB = Path(__file__).parent / "web"

# The advice for each error of a certificate or a port, by how the error begins. The first that fits
# counts; the last fits all.
_ADVICE: Final = {
    **{words: advice.FOR_TLS[kind] for words, kind in TLS_KINDS.items() if kind in advice.FOR_TLS},
    **{str(words): advice.FOR_PAGE[verdict.kind] for words, verdict in PORT_VERDICTS.items()},
    "": advice.FOR_PAGE[VerdictKind.OTHER],
}

# Where programs find everything, relative to the page.
_LINKS = {
    "name": "Golem Port Checker",
    "check_ports": "check-ports",
    "check_tls": "check-tls",
    "ip": "ip",
    "health": "health",
    "docs": "docs",
    "openapi": "openapi.json",
}

# For people who wonder who connects to them.
_ABOUT: Final = (
    "This service connects to TCP ports when somebody asks it to, sends nothing over the "
    "connection but, for a certificate, a TLS handshake, and closes it at once."
)

_MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

_CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src {images}; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

_NOSNIFF = {"X-Content-Type-Options": "nosniff"}
_NO_STORE = {**_NOSNIFF, **NO_STORE}
_PAGE_HEADERS = {
    **_NO_STORE,
    "Content-Security-Policy": _CONTENT_POLICY.format(images="'self'"),
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
}
_DOCS_HEADERS = {
    **_PAGE_HEADERS,
    # Swagger UI's style sheet holds its icons.
    "Content-Security-Policy": _CONTENT_POLICY.format(images="'self' data:"),
}
# A file's name changes with its content, so a browser never needs to ask for it again.
_FOR_EVER = {
    **_NOSNIFF,
    "Cache-Control": "public, max-age=31536000, immutable",
    "Vary": "Accept-Encoding",
}
# A wheel's name has only its version.
_REVALIDATED = {**_NOSNIFF, "Cache-Control": "no-cache"}
_WHEEL_TYPE = "application/octet-stream"

# Of a path that was not found: no stranger makes its page long.
_MAX_DEPTH = 20

# Seconds that a check may take longer when several places make it.
_FOR_OTHER_PLACES: Final = 1.0

# The page's script puts the service's URL in its place.
_URL = '<var data-is="url">URL</var>'


@dataclass(frozen=True)
class _StaticFile:
    """A file as it is served.

    Attributes:
        name: Its own, with a hash of its content in it.
        media_type: The value of ``Content-Type``.
        content: Its bytes.
    """

    name: str
    media_type: str
    content: bytes

    @classmethod
    def read(cls, path: Path) -> "_StaticFile":
        content = path.read_bytes()
        version = hashlib.sha256(content).hexdigest()[:12]
        name = f"{path.stem}.{version}{path.suffix}"
        return cls(name, _MEDIA_TYPES[path.suffix], content)

    @functools.cached_property
    def compressed(self) -> bytes:
        """The same in gzip's format. Swagger UI takes 50 ms, for which no start has to wait."""
        return gzip.compress(self.content, mtime=0)


@functools.cache  # once in a process, for all its applications
def _static_files() -> dict[str, _StaticFile]:
    """Return all of them, by the names that the pages use."""
    swagger_ui = Path(fastapi_offline.__file__).parent / "static"
    paths = [_WEB / name for name in ("mark.svg", "page.css", "ports.js", "page.js")]
    paths += [_WEB / name for name in ("docs.css", "docs.js")]
    paths += [swagger_ui / name for name in ("swagger-ui.css", "swagger-ui-bundle.js")]
    return {path.name: _StaticFile.read(path) for path in paths}


def add_pages(app: FastAPI, settings: Settings) -> None:
    """Route ``app`` to the pages."""
    data = {
        "advice": _ADVICE,
        "tlsErrors": [words for words in TLS_KINDS if words],
        "reachable": advice.PAGE_REACHABLE,
        "allReachable": advice.PAGE_ALL_REACHABLE,
        "nearby": advice.PAGE_NEARBY,
        "validCertificate": advice.PAGE_CERTIFICATE_VALID,
        "longestCheck": settings.longest_check
        + (_FOR_OTHER_PLACES if settings.perspectives else 0),
        "maxPorts": settings.max_ports,
    }
    wheel = installed_wheel()
    page = _fill_in(
        "page.html",
        contact=_contact(settings.contact),
        # "<" could end the script element that holds it.
        data=json.dumps(data).replace("<", r"\u003c"),
        wheel=f"static/{wheel.name}" if wheel else "",
        sha256=wheel.sha256 if wheel else "",
        pipx_run=f"pipx run --spec {_URL}/static/{wheel.name} " if wheel else "",
        no_wheel="" if wheel else "hidden",
    )
    docs = _fill_in("docs.html")
    provider = _fill_in("golem-provider.html")
    about = {"about": _ABOUT, **({"contact": settings.contact} if settings.contact else {})}
    links = json.dumps({**_LINKS, **about, **({"program": _program(wheel)} if wheel else {})})
    files = {file.name: file for file in _static_files().values()}
    vary = {"Vary": "Accept"}

    async def home(request: Request) -> Response:
        if prefers_html(request):
            return Response(page, media_type="text/html", headers={**_PAGE_HEADERS, **vary})
        return Response(links, media_type="application/json", headers={**_NO_STORE, **vary})

    async def api_docs(_: Request) -> Response:
        return Response(docs, media_type="text/html", headers=_DOCS_HEADERS)

    async def golem_provider(_: Request) -> Response:
        return Response(provider, media_type="text/html", headers=_PAGE_HEADERS)

    async def openapi(_: Request) -> Response:
        schema = json.dumps(app.openapi())
        return Response(schema, media_type="application/json", headers=_NO_STORE)

    async def hand_out(request: Request) -> Response:
        assert wheel  # noqa: S101  # else there is no such route
        tag = f'"{wheel.sha256}"'
        headers = {**_REVALIDATED, "ETag": tag}
        if tag in request.headers.get("If-None-Match", ""):
            return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
        return Response(wheel.content, media_type=_WHEEL_TYPE, headers=headers)

    async def static(request: Request) -> Response:
        file = files[request.scope["path"].rpartition("/")[2]]
        headers = {**_FOR_EVER, "Content-Type": file.media_type}
        if not accepts(request, b"accept-encoding", "gzip", "*"):
            return Response(file.content, headers=headers)
        compressed = await asyncio.to_thread(getattr, file, "compressed")
        return Response(compressed, headers={**headers, "Content-Encoding": "gzip"})

    for path, endpoint in {
        "/": home,
        "/docs": api_docs,
        "/golem-provider": golem_provider,
        "/openapi.json": openapi,
        # Each by its name: others may add files of theirs at /static.
        **{f"/static/{name}": static for name in files},
        **({f"/static/{wheel.name}": hand_out} if wheel else {}),
    }.items():
        app.add_route(path, endpoint, methods=["GET"], include_in_schema=False)


def not_found_page(request: Request) -> Response:
    """Return the page that a browser shows for a path that does not exist."""
    # A proxy may have put more before its path, so its links lead up from there.
    path, root = request.scope["path"], request.scope.get("root_path", "")
    raw_path = request.scope.get("raw_path") or path.encode()
    # Not every server has the root in the path.
    depth = raw_path.count(b"/") - 1 - (root.count("/") if path.startswith(root) else 0)
    page = _not_found_template().replace("[up]", "../" * min(depth, _MAX_DEPTH) or "./")
    headers = {**_PAGE_HEADERS, "Vary": "Accept"}
    return Response(page, HTTPStatus.NOT_FOUND, media_type="text/html", headers=headers)


@functools.cache
def _not_found_template() -> str:
    return _fill_in("not-found.html")


def _contact(contact: str) -> str:
    """Return the sentence about whom to write to, in HTML."""
    if not contact:
        return ""
    link = contact if "://" in contact else f"mailto:{contact}"
    return f'If that troubles you: <a href="{html.escape(link)}">{html.escape(contact)}</a>.'


def _program(wheel: Wheel) -> dict[str, str]:
    """Tell where the program is, and how to run it; URL stands for this service's."""
    path = f"static/{wheel.name}"
    return {
        "wheel": path,
        "sha256": wheel.sha256,
        "run": f"pipx run --spec URL/{path} port-checker check --server URL",
    }


def _fill_in(page: str, **values: str) -> str:
    """Return one of our pages with ``{{name}}`` replaced by a value, or by that file's URL."""
    values |= {name: f"static/{file.name}" for name, file in _static_files().items()}
    text = (_WEB / page).read_text(encoding="utf-8")
    return re.sub(r"\{\{([\w.-]+)\}\}", lambda match: values[match[1]], text)
