"""Asking a running service whether it answers, for containers and scripts."""

import json
from http.client import HTTPException
from urllib.request import ProxyHandler, build_opener

from port_checker.settings import Endpoint, Settings

# Seconds. /health is never slow: a service that takes longer is not well.
_TIMEOUT = 5.0

# Addresses to listen on that mean all of this machine's, and where to reach them.
_REACHABLE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  # compared, not bound


class Unhealthy(Exception):
    """The service does not answer as it should; the message says how it failed."""


def local_url(settings: Settings) -> str:
    """Return the URL of the service that runs with these settings on this machine."""
    host = _REACHABLE.get(settings.host, settings.host)
    return f"http://{Endpoint(host, settings.port)}"


def require_healthy(url: str) -> None:
    """Ask a service for ``/health``.

    Args:
        url: Of the service, with or without ``/health``.

    Raises:
        Unhealthy: It does not answer, or with something else than that it is well.
        ValueError: The URL is not one of HTTP.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{url!r} must start with http:// or https://.")
    url = url.removesuffix("/").removesuffix("/health") + "/health"
    try:
        # Never through a proxy, which may be set for the programs of a whole container.
        with build_opener(ProxyHandler({})).open(url, timeout=_TIMEOUT) as answer:
            is_well = json.loads(answer.read(1000)) == {"status": "ok"}
    except (OSError, HTTPException, ValueError) as error:
        raise Unhealthy(f"{url} does not answer: {error}") from None
    if not is_well:
        raise Unhealthy(f"{url} does not answer as a port checker does")
