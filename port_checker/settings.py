"""The settings: read from the environment and ``.env``, and validated."""

import difflib
import os
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import unquote, urlsplit

from dotenv import dotenv_values
from dotenv.parser import parse_stream
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from port_checker.addresses import Network, parse_networks

ENV_FILE = Path(".env")

# Seconds after which the most patient of the providers' software gives up on a response.
CLIENT_PATIENCE = 30.0

# The rate limit store that is not Redis.
IN_PROCESS = "memory://"

# The scheme of a Redis cluster's URL.
REDIS_CLUSTER = "redis+cluster://"

_LOGIN = r"([^\s:@/?#\[\]]*:[^\s@/?#\[\]]+@)?"
_HOST_AND_PORT = r"([\w.-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]+)?"
_REDIS_URL = re.compile(
    rf"redis(\+cluster)?://{_LOGIN}{_HOST_AND_PORT}(/[0-9]*)?"
    rf"|rediss://{_LOGIN}{_HOST_AND_PORT}(/[0-9]*)?(\?ssl_ca_certs=(?P<authorities>[^\s&#]+))?"
    rf"|unix://{_LOGIN}/[^\s?#]+(\?db=[0-9]+)?",
    re.ASCII,
)

_STORE_SCHEME = re.compile(r"(memory|rediss?|redis\+cluster|unix)(:/*|$)", re.IGNORECASE)

# The prefixes of our variables' names.
PREFIXES = ("PORT_CHECK_", "PORT_CHECKER_")

# Not a setting of the server: `port-checker check` reads it.
_CLIENT_VARIABLE = "PORT_CHECKER_URL"

# The type of an error whose message is the whole line.
_EXPLAINED = "explained"

_LONGEST_SHOWN = 80  # characters of a wrong value, so that the message stays one line


# The prefix of a host that is a Unix socket, and the longest path after it (unix(7)).
UNIX = "unix:"
_LONGEST_SOCKET_PATH = 107


class SettingsError(ValueError):
    """A setting is wrong; the message is one line for the operator."""


@dataclass(frozen=True, slots=True)
class Rate:
    """A number of events per period; all of them may come at once.

    Attributes:
        count: The number; at least 1.
        period: One second, minute or hour.
    """

    count: int
    period: timedelta

    def __str__(self) -> str:
        return f"{self.count}/{_PERIOD_NAMES[self.period]}"


_PERIODS = {
    "second": timedelta(seconds=1),
    "minute": timedelta(minutes=1),
    "hour": timedelta(hours=1),
}
_PERIOD_NAMES = {period: name for name, period in _PERIODS.items()}


def _parse_rate(text: object) -> object:
    if text == "off":
        return None
    if not isinstance(text, str):
        return text
    match = re.fullmatch(r"([1-9][0-9]{0,8})/(second|minute|hour)", text)
    if not match:
        raise ValueError
    return Rate(int(match[1]), _PERIODS[match[2]])


def _parse_networks(text: object) -> object:
    return parse_networks(text) if isinstance(text, str) else text


# RFC 1123 section 2.1; names in a container's network may have underscores as well.
_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST_NAME = re.compile(rf"(\*\.)?{_LABEL}(\.{_LABEL})*\.?", re.ASCII)


def _parse_host_names(text: object) -> object:
    if not isinstance(text, str):
        return text
    names = [name for entry in text.split(",") if (name := entry.strip())]
    if not all(len(name) <= 253 and _HOST_NAME.fullmatch(name) for name in names):
        raise ValueError
    return tuple(name.lower().removesuffix(".") for name in names)


# What a link may contain as it is.
_CONTACT = re.compile(
    r"[\w.+-]{1,64}@[\w-]+(\.[\w-]+)*|https?://[\w.-]+(:[0-9]{1,5})?(/[\w./~%?=&#-]*)?", re.ASCII
)


def _parse_contact(text: object) -> object:
    if isinstance(text, str) and text and not (len(text) <= 254 and _CONTACT.fullmatch(text)):
        raise ValueError
    return text


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An address to listen on.

    Attributes:
        host: An IP address.
        port: From 1 to 65535.
    """

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _parse_endpoint(text: object) -> object:
    if text in ("", "false"):
        return None
    if not isinstance(text, str):
        return text
    match = re.fullmatch(r"(?:([0-9.]+)|\[([0-9A-Fa-f:.]+)\]):([1-9][0-9]{0,4})", text)
    if not match or int(match[3]) > 65535:
        raise ValueError
    return Endpoint(str(ip_address(match[1] or match[2])), int(match[3]))


_BASE_URL = re.compile(
    r"https?://([\w.-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?(/[\w./~-]*)?", re.ASCII
)

# Each is asked at each check.
MOST_PERSPECTIVES = 16


def place_name(url: str) -> str:
    """Return what a perspective is called: its URL's host, and port if the URL has one."""
    return urlsplit(url).netloc.lower()


def _parse_base_urls(text: object) -> object:
    if not isinstance(text, str):
        return text
    urls = [url.rstrip("/") for entry in text.split(",") if (url := entry.strip())]
    if not all(_BASE_URL.fullmatch(url) and urlsplit(url).port != 0 for url in urls):
        raise ValueError
    if len(urls) > MOST_PERSPECTIVES:
        raise ValueError
    return tuple(dict.fromkeys(urls))


_BaseUrls = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_parse_base_urls)]
_Networks = Annotated[tuple[Network, ...], NoDecode, BeforeValidator(_parse_networks)]
_HostNames = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_parse_host_names)]
_EndpointOrNone = Annotated[Endpoint | None, NoDecode, BeforeValidator(_parse_endpoint)]
_RateOrOff = Annotated[Rate | None, NoDecode, BeforeValidator(_parse_rate)]


def _setting(variable: str, default: Any, allowed: str, **bounds: Any) -> Any:
    """Return a field: the variable that sets it, its bounds, and the bounds in words."""
    return Field(default, validation_alias=variable, description=allowed, **bounds)


def _rate_setting(variable: str, per_minute: int) -> Any:
    return _setting(
        variable,
        Rate(per_minute, timedelta(minutes=1)),
        f"a whole number per second, minute or hour, such as {per_minute}/minute, or off",
    )


class Settings(BaseModel):
    """Everything that an operator can set; each field's description says what is allowed."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_by_name=True, validate_by_alias=True
    )

    host: str = _setting(
        "PORT_CHECKER_HOST",
        "0.0.0.0",  # noqa: S104  # a public service listens everywhere
        "an IP address to listen on, such as 0.0.0.0 or ::, localhost, or unix:/path",
    )
    port: int = _setting(
        "PORT_CHECKER_PORT", 9000, "a port to listen on, from 1 to 65535", ge=1, le=65535
    )
    debug: bool = _setting("PORT_CHECKER_DEBUG", False, "true or false")
    workers: int = _setting(
        "PORT_CHECKER_WORKERS", 1, "a number of processes, from 1 to 64", ge=1, le=64
    )
    trusted_proxies: _Networks = _setting(
        "PORT_CHECKER_TRUSTED_PROXIES",
        parse_networks("127.0.0.1,::1"),
        "addresses or networks, such as 192.0.2.7,2001:db8::/64, or empty for none",
    )
    allowed_hosts: _HostNames = _setting(
        "PORT_CHECKER_ALLOWED_HOSTS",
        (),
        "host names, such as checker.example,*.checker.example, or empty for any",
    )
    contact: Annotated[str, BeforeValidator(_parse_contact)] = _setting(
        "PORT_CHECKER_CONTACT",
        "",
        "a mail address, such as operator@checker.example, or an https:// URL, or empty for none",
    )
    caller_rate_limit: _RateOrOff = _rate_setting("PORT_CHECKER_RATE_LIMIT", 300)
    rate_limit_store: str = _setting(
        "PORT_CHECKER_RATE_LIMIT_STORE",
        IN_PROCESS,
        "memory://, or redis:// or rediss:// with [[user]:password@]host[:port][/db], where "
        "?ssl_ca_certs=/file may follow on rediss://; redis+cluster:// with the same but /db; or "
        "unix:// with [[user]:password@]/path[?db=N]",
        repr=False,  # it may hold a password, which error messages hide, too
    )
    perspectives: _BaseUrls = _setting(
        "PORT_CHECKER_PERSPECTIVES",
        (),
        "base URLs of at most 16 other port checkers, such as "
        "https://ams.checker.example,https://sgp.checker.example, or empty for none",
    )
    perspectives_mode: Literal["decide", "observe"] = _setting(
        "PORT_CHECKER_PERSPECTIVES_MODE", "decide", "decide or observe"
    )
    metrics: _EndpointOrNone = _setting(
        "PORT_CHECKER_METRICS",
        None,
        "address:port, such as 127.0.0.1:9464 or [::1]:9464, or empty for no metrics",
    )
    retries: int = _setting(
        "PORT_CHECK_RETRIES", 3, "a number of attempts, from 1 to 10", ge=1, le=10
    )
    retry_delay: float = _setting(
        "PORT_CHECK_RETRY_DELAY",
        1.0,
        "seconds, from 0 to 30",
        ge=0,
        le=CLIENT_PATIENCE,
        allow_inf_nan=False,
    )
    timeout: float = _setting(
        "PORT_CHECK_TIMEOUT",
        5.0,
        "seconds, from 0.1 to 30",
        ge=0.1,
        le=CLIENT_PATIENCE,
        allow_inf_nan=False,
    )
    max_ports: int = _setting(
        "PORT_CHECK_MAX_PORTS", 1000, "a number of ports, from 1 to 10000", ge=1, le=10_000
    )
    max_in_flight: int = _setting(
        "PORT_CHECK_MAX_IN_FLIGHT",
        10_000,
        "a number of ports, from 1 to 1000000",
        ge=1,
        le=1_000_000,
    )
    max_in_flight_per_caller: int = _setting(
        "PORT_CHECK_MAX_IN_FLIGHT_PER_CALLER",
        2000,
        "a number of ports, from 1 to 1000000",
        ge=1,
        le=1_000_000,
    )
    targets: Literal["public", "caller"] = _setting(
        "PORT_CHECK_TARGETS", "public", "public or caller"
    )
    allowed_networks: _Networks = _setting(
        "PORT_CHECK_ALLOWED_NETWORKS",
        (),
        "networks, such as 10.0.0.0/8,fd00::/8, or empty for none",
    )
    denied_networks: _Networks = _setting(
        "PORT_CHECK_DENIED_NETWORKS",
        (),
        "networks, such as 198.51.100.0/24,2001:db8::/32, or empty for none",
    )
    own_rate_limit: _RateOrOff = _rate_setting("PORT_CHECK_OWN_RATE_LIMIT", 20_000)
    others_rate_limit: _RateOrOff = _rate_setting("PORT_CHECK_OTHERS_RATE_LIMIT", 1000)
    target_rate_limit: _RateOrOff = _rate_setting("PORT_CHECK_TARGET_RATE_LIMIT", 2000)

    @property
    def longest_check(self) -> float:
        """Upper bound in seconds for the duration of a check, give or take some milliseconds."""
        return self.retries * self.timeout + (self.retries - 1) * self.retry_delay

    @property
    def perspective_names(self) -> list[str]:
        """What the other places are called."""
        return [place_name(url) for url in self.perspectives]

    @field_validator("host")
    @classmethod
    def _check_host(cls, host: str) -> str:
        if host.startswith(UNIX):
            path = host.removeprefix(UNIX)
            if not path.startswith("/") or len(os.fsencode(path)) > _LONGEST_SOCKET_PATH:
                raise ValueError
        elif host != "localhost":
            ip_address(host)
        return host

    @field_validator("rate_limit_store")
    @classmethod
    def _check_rate_limit_store(cls, store: str) -> str:
        if store == IN_PROCESS:
            return store
        match = _REDIS_URL.fullmatch(store)
        if not match or urlsplit(store).port == 0:  # ValueError from 65536
            if store != store.strip():  # a secret from a file often ends with a newline
                raise _wrong_store("it begins or ends with white space (a newline, say)")
            raise ValueError
        if match["authorities"]:
            file = unquote(match["authorities"])
            try:
                ssl.create_default_context(cafile=file)
            except ssl.SSLError:
                raise _wrong_store(f"ssl_ca_certs={file} has no certificate in it") from None
            except OSError as error:
                reason = error.strerror
                raise _wrong_store(f"ssl_ca_certs={file} cannot be read: {reason}") from None
        return store

    @model_validator(mode="after")
    def _make_full_request_fit(self) -> Self:
        """Raise the defaults that would refuse every full request.

        Raises:
            PydanticCustomError: A value that was set would.
        """
        least = self.max_ports
        if self.max_in_flight_per_caller < least:
            self._require_unset("max_in_flight_per_caller", f"at least {least}")
            self.__dict__["max_in_flight_per_caller"] = least  # the model is frozen
        for name in ("own_rate_limit", "others_rate_limit", "target_rate_limit"):
            rate = getattr(self, name)
            if rate and rate.count < least:
                self._require_unset(name, f"off or at least {least}")
                self.__dict__[name] = Rate(least, rate.period)
        return self

    def _require_unset(self, name: str, allowed: str) -> None:
        if name in self.model_fields_set:
            raise PydanticCustomError(
                "wrong",
                _wrong(
                    str(type(self).model_fields[name].validation_alias),
                    str(getattr(self, name)),
                    f"{allowed} (PORT_CHECK_MAX_PORTS): anything less would refuse every full "
                    "request",
                ),
            )

    @model_validator(mode="after")
    def _check_metrics_are_not_public(self) -> Self:
        is_tcp = not self.host.startswith(UNIX)
        if is_tcp and self.metrics and self.metrics.port == self.port:
            raise PydanticCustomError(
                "wrong",
                _wrong(
                    "PORT_CHECKER_METRICS",
                    str(self.metrics),
                    f"another port than PORT_CHECKER_PORT ({self.port}), which is public",
                ),
            )
        return self

    @model_validator(mode="after")
    def _check_extras_are_installed(self) -> Self:
        for is_used, package, extra, what in (
            (self.metrics, "prometheus_client", "metrics", "PORT_CHECKER_METRICS"),
            (
                self.rate_limit_store != IN_PROCESS,
                "redis",
                "redis",
                "PORT_CHECKER_RATE_LIMIT_STORE: Redis",
            ),
        ):
            if is_used and not find_spec(package):
                raise PydanticCustomError(
                    "missing",
                    f"{what} needs a package that is not installed: "
                    f"pip install 'golem-port-checker[{extra}]'",
                )
        return self


class _Environment(Settings, BaseSettings):
    """Settings from the environment and ``.env``."""

    model_config = SettingsConfigDict(
        env_file=ENV_FILE,
        env_file_encoding="utf-8-sig",
        case_sensitive=True,
        extra="ignore",
        validate_by_name=False,  # a variable called "port" is not ours
    )


def load_settings() -> Settings:
    """Read the environment and ``.env``; the environment takes precedence.

    Raises:
        SettingsError: A value is wrong, or ``.env`` cannot be read.
    """
    try:
        # mypy sees the fields alone, and not what BaseSettings takes besides.
        return _Environment(_env_file=_checked_env_file())  # type: ignore[call-arg]
    except ValidationError as error:
        raise SettingsError("; ".join(map(_explain, error.errors()))) from None
    except OSError as error:
        raise SettingsError(f"{ENV_FILE.absolute()} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{ENV_FILE.absolute()} cannot be read: {error}") from None


def _checked_env_file() -> Path | None:
    """Return ``.env``, if it is there; refuse what python-dotenv passes over in silence.

    Raises:
        OSError: ``.env`` cannot be read: it is a directory, say, or a symbolic link to nothing.
        UnicodeDecodeError: It is not UTF-8.
        SettingsError: A line cannot be parsed, or names one of our variables without a value.
    """
    try:
        ENV_FILE.lstat()
    except (FileNotFoundError, PermissionError):  # of the directory: it may not be searched
        return None
    with ENV_FILE.open(encoding="utf-8-sig") as file:
        bindings = list(parse_stream(file))
    for binding in bindings:
        # The line itself may hold a password, so its number has to do.
        blank = len(binding.original.string) - len(binding.original.string.lstrip())
        line = binding.original.line + binding.original.string.count("\n", 0, blank)
        if binding.error:
            raise SettingsError(
                f"{ENV_FILE.absolute()} line {line} cannot be parsed: it must be NAME=value, "
                "with every quote closed"
            )
        if binding.key and binding.value is None and binding.key.startswith(PREFIXES):
            name = re.match("[A-Z_]*", binding.key)
            raise SettingsError(
                f"{ENV_FILE.absolute()} line {line} has no value: "
                f"it must be {name and name[0]}=value"
            )
    return ENV_FILE


def _explain(error: ErrorDetails) -> str:
    if not error["loc"] or error["type"] == _EXPLAINED:  # it has a message of its own
        return error["msg"]
    variable = str(error["loc"][0])
    (field,) = (
        field for field in Settings.model_fields.values() if field.validation_alias == variable
    )
    value = str(error["input"])
    if not field.repr:  # all but a known scheme may be the secret
        scheme = _STORE_SCHEME.match(value)
        known = scheme[0] if scheme else ""
        value = known + "…" * (value != known)
    return _wrong(variable, value, field.description or "")


def _wrong_store(reason: str) -> PydanticCustomError:
    """Return an error about a URL of Redis, which does not show the URL: it may hold a password."""
    return PydanticCustomError(_EXPLAINED, f"PORT_CHECKER_RATE_LIMIT_STORE is wrong: {reason}")


def _wrong(variable: str, value: str, allowed: str) -> str:
    return f"{variable}={_shorten(value)!r} is wrong: it must be {allowed}"


def _shorten(text: str) -> str:
    text = re.sub("//.*@", "//…@", text, flags=re.DOTALL)  # a URL may have a password in it
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "…"


def unknown_names(environment: Mapping[str, str]) -> dict[str, str | None]:
    """Find variables that look like settings but are not: most likely misspelled.

    Args:
        environment: ``os.environ``; the names in ``.env`` are added to it.

    Returns:
        Each such name, with the most similar setting, if any is similar.
    """
    known = [str(field.validation_alias) for field in Settings.model_fields.values()]
    known.append(_CLIENT_VARIABLE)
    names = [*environment, *dotenv_values(ENV_FILE)]
    return {
        name: next(iter(difflib.get_close_matches(name.upper(), known, n=1)), None)
        for name in names
        if name.upper().startswith(PREFIXES) and name not in known
    }


def warnings_of_names(environment: Mapping[str, str]) -> list[str]:
    """Return a line about each variable that looks like a setting but is not."""
    return [
        f"{name} is not a setting; "
        + (f"did you mean {nearest}?" if nearest else "see docs/settings.md for all settings.")
        for name, nearest in unknown_names(environment).items()
    ]
