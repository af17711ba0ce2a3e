"""Settings of a program: a TOML file, the environment and flags become one frozen dataclass, with each value's origin.

Later ones win: default < file < environment (``EDGESYNC_`` + upper-case name) < flag. A program declares its settings
as a frozen dataclass whose fields are made with ``setting``: the same declaration parses every source, writes the
commented file and feeds ``config show --origin``. It reads the file it is given and nothing else. An unknown key is an
error that names the file, the key and the nearest known name; so is a value that does not parse.
"""

import dataclasses
import difflib
import ipaddress
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from edgesync.errors import ConfigError, UsageError

ENVIRONMENT_PREFIX = "EDGESYNC_"
MAX_CONFIG_BYTES = 256 * 1024
MAX_HOST_CHARS = 253

T = TypeVar("T")

Parser = Callable[[Any], Any]
"""Takes what TOML gave (str, int, bool, list) or a string from elsewhere; raises ValueError with the reason."""


@dataclass(frozen=True)
class HostPort:
    """Where to listen or connect. An empty host means every address of this machine."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Settings(Generic[T]):
    values: T
    origins: dict[str, str]
    """Name of each setting → ``default``, the file, ``environment NAME`` or ``flag``."""


def setting(
    default: Any, parse: Parser, doc: str, *, mask: Callable[[Any], Any] | None = None
) -> Any:
    """Declare one field of a settings dataclass; ``doc`` is the comment above it in the file.

    ``mask`` takes a secret out of the value before it is shown.
    """
    return field(default=default, metadata={"parse": parse, "doc": doc, "mask": mask})


def load(
    cls: type[T],
    path: Path | None,
    *,
    flags: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Settings[T]:
    """Read the settings ``cls`` declares. A missing file means no file; a flag that is None was not given.

    Raises ConfigError: the file is not TOML, has an unknown key, or a value does not parse.
    Raises UsageError: a flag does not parse.
    """
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    origins = dict.fromkeys(known, "default")
    for key, raw in _read(path).items() if path is not None else ():
        if key not in known:
            raise ConfigError(f"{path}: unknown key {key!a}{_nearest(key, known)}")
        values[key] = _parse(known[key], raw, f"{path}: {key}", ConfigError)
        origins[key] = str(path)
    environment = os.environ if environ is None else environ
    for key, declared in known.items():
        variable = ENVIRONMENT_PREFIX + key.upper()
        if variable in environment:
            values[key] = _parse(declared, environment[variable], variable, ConfigError)
            origins[key] = f"environment {variable}"
    for key, raw in (flags or {}).items():
        if raw is not None:
            option = "--" + key.replace("_", "-")
            values[key] = _parse(known[key], raw, option, UsageError)
            origins[key] = "flag"
    return Settings(cls(**values), origins)


def render(cls: type[Any], title: str, values: Mapping[str, Any] | None = None) -> str:
    """The commented file: every setting with its meaning; those in ``values`` are set, the rest commented out."""
    lines = [f"# {title}", "# A line that starts with '#' shows the default.", ""]
    for declared in dataclasses.fields(cls):
        lines += [f"# {line}" for line in declared.metadata["doc"].splitlines()]
        given = values is not None and declared.name in values
        value = values[declared.name] if values is not None and given else declared.default
        lines += [f"{'' if given else '#'}{declared.name} = {_toml(value)}", ""]
    return "\n".join(lines)


def show(settings: Settings[Any]) -> list[dict[str, Any]]:
    """Rows for ``config show --origin``: name, value as the file would say it without secrets, origin."""
    return [
        {
            "key": declared.name,
            "value": _shown(declared, getattr(settings.values, declared.name)),
            "origin": settings.origins[declared.name],
        }
        for declared in dataclasses.fields(settings.values)
    ]


def _shown(declared: "dataclasses.Field[Any]", value: Any) -> Any:
    mask = declared.metadata["mask"]
    return _plain(mask(value) if mask else value)


def file_mode() -> int:
    """Permissions of a new settings file: it may come to hold a proxy's password.

    Root's group is trusted with it; anybody else's may be shared by all users of the machine.
    """
    return 0o640 if os.geteuid() == 0 else 0o600


# --- parsers -------------------------------------------------------------------------------------------------------
_RATE = re.compile(r"\s*(\d{1,12}(?:\.\d{1,6})?)\s*(?:([kKMG]i?)?B?)(?:/s)?\s*\Z")
_RATE_UNIT = {
    None: 1,
    "k": 10**3,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "ki": 2**10,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
}
_DURATION = re.compile(r"\s*(\d{1,9}(?:\.\d{1,6})?)\s*(s|m|h|d|w)?\s*\Z")
_DURATION_UNIT = {None: 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 7 * 86_400.0}
_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?\Z")


def parse_rate(value: Any) -> int:
    """Bytes per second from ``500kB``, ``4MB``, ``4MiB`` or a plain number; 0 is unlimited. Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _RATE.match(value) if isinstance(value, str) else None
    if match is None or match[2] not in _RATE_UNIT:
        raise ValueError(f"{value!a} is not a rate in bytes per second such as 500kB, 4MB or 4MiB")
    rate = int(float(match[1]) * _RATE_UNIT[match[2]])
    if rate == 0 and float(match[1]) > 0:
        raise ValueError(f"{value!a} is less than one byte per second")
    return rate


def parse_duration(value: Any) -> float:
    """Seconds from ``90``, ``90s``, ``15m``, ``1h``, ``7d`` or ``2w``. Raises ValueError."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0:
        return float(value)
    match = _DURATION.match(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{value!a} is not a duration such as 30s, 15m, 1h or 7d")
    return float(match[1]) * _DURATION_UNIT[match[2]]


def host_port(default_port: int, *, any_host: bool = True) -> Parser:
    """A parser for ``HOST:PORT``, ``[V6]:PORT``, ``HOST``, ``V6`` and, where listening, ``:PORT``."""

    def parse(value: Any) -> HostPort:
        if isinstance(value, HostPort):
            return value
        if not isinstance(value, str):
            raise ValueError(f"{value!a} is not HOST:PORT")  # noqa: TRY004 - parsers speak in ValueError
        return parse_host_port(value, default_port=default_port, any_host=any_host)

    return parse


def parse_host_port(
    text: str, *, default_port: int | None = None, any_host: bool = False
) -> HostPort:
    """Read an address. Raises ValueError: not one, or no port where none is implied."""
    text = text.strip()
    port_text: str | None
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise ValueError(f"{text!a} is not [ADDRESS]:PORT")
        port_text = rest[1:] if rest else None
        _check_v6(host, text)
    elif text.count(":") > 1:
        host, port_text = text, None
        _check_v6(host, text)
    else:
        host, colon, after = text.partition(":")
        port_text = after if colon else None
        if (
            (not host and not any_host)
            or len(host) > MAX_HOST_CHARS
            or (host and not _HOST.match(host))
        ):
            raise ValueError(f"{text!a} names no host: write HOST:PORT")
    if port_text is None:
        if default_port is None or not host:
            raise ValueError(f"{text!a} has no port: write HOST:PORT")
        return HostPort(host, default_port)
    if not (port_text.isascii() and port_text.isdigit()) or int(port_text[:6]) > 65_535:
        raise ValueError(f"{text!a} has no port between 0 and 65535")
    return HostPort(host, int(port_text))


def _check_v6(host: str, text: str) -> None:
    try:
        ipaddress.IPv6Address(host)
    except ValueError as exc:
        raise ValueError(f"{text!a} is not an IPv6 address") from exc


def text(value: Any) -> str:
    """One line that can be printed as it is. Raises ValueError."""
    if not isinstance(value, str) or len(value) > 4096 or not value.isprintable():
        raise ValueError(f"{value!a} is not one line of printable text")
    return value


def boolean(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if not isinstance(value, str) or value.lower() not in words:
        raise ValueError(f"{value!a} is not true or false")
    return words[value.lower()]


def one_of(*names: str) -> Parser:
    def parse(value: Any) -> str:
        if value not in names:
            raise ValueError(f"{value!a} is none of {', '.join(names)}")
        return str(value)

    return parse


def integer(minimum: int, maximum: int) -> Parser:
    def parse(value: Any) -> int:
        number = int(value) if isinstance(value, str) and value.strip().isdecimal() else value
        if (
            isinstance(number, bool)
            or not isinstance(number, int)
            or not minimum <= number <= maximum
        ):
            raise ValueError(f"{value!a} is not a whole number from {minimum} to {maximum}")
        return number

    return parse


def list_of(item: Parser, *, maximum: int = 64) -> Parser:
    """A TOML array, or text separated by commas."""

    def parse(value: Any) -> tuple[Any, ...]:
        parts = [p for p in value.split(",") if p.strip()] if isinstance(value, str) else value
        if not isinstance(parts, (list, tuple)) or len(parts) > maximum:
            raise ValueError(f"{value!a} is not a list of at most {maximum}")
        return tuple(item(part) for part in parts)

    return parse


# --- inside --------------------------------------------------------------------------------------------------------
def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_CONFIG_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as exc:
        raise ConfigError(f"cannot read {path}: {exc.strerror or exc}") from exc
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path} is over {MAX_CONFIG_BYTES} bytes")
    try:
        return tomllib.loads(data.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as exc:
        raise ConfigError(f"{path} is not TOML: {exc}") from exc


def _parse(
    declared: "dataclasses.Field[Any]", raw: Any, where: str, error: type[ConfigError | UsageError]
) -> Any:
    try:
        return declared.metadata["parse"](raw)
    except ValueError as exc:
        raise error(f"{where}: {exc}") from exc


def _nearest(key: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!a}?" if close else f"; known: {', '.join(known)}"


def _plain(value: Any) -> Any:
    if isinstance(value, HostPort):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _toml(value: Any) -> str:
    if value is None:
        return '""'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
