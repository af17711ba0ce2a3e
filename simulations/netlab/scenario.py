"""A scenario: one TOML file that says which sites there are, what moves, and what goes wrong when.

Reading is strict: an unknown key or a value that does not parse is one sentence with the place of it. The file says
what happens, never what should be measured: bars belong to benchmarks.
"""

import dataclasses
import difflib
import random
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

from simulations.netlab.forwarder import Impairment
from simulations.netlab.hosts import LabError

_NUMBER = r"\s*(\d{1,9}(?:\.\d{1,6})?)\s*"
_RATE_UNITS: Final = {"bit": 1.0, "kbit": 1e3, "Mbit": 1e6, "Gbit": 1e9}
_TIME_UNITS: Final = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_SIZE_UNITS: Final = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 1024.0, "MiB": 1048576.0}
MIN_QUEUE_BYTES: Final = 10_000


@dataclass(frozen=True)
class SitePlan:
    name: str
    devices: int
    there: Impairment
    back: Impairment
    mtu: int = 1500
    nat: bool = False
    proxy: bool = False
    """Devices reach the world through an HTTP CONNECT proxy only."""


@dataclass(frozen=True)
class Fault:
    """Something that happens once; times are seconds after the assignment."""

    do: str
    at: float | None = None
    at_progress: float | None = None
    """Instead of a time: when the devices together hold this share of what they are to get."""
    lasts: float = 0.0
    """0: for good."""
    site: str = ""
    device: str = ""
    values: dict[str, float] = field(default_factory=dict)
    """For ``set``: keys of a link's impairment."""

    def __str__(self) -> str:
        what = self.device or self.site or "gateway"
        when = f"{self.at:.1f} s" if self.at is not None else f"{self.at_progress:.0%}"
        return f"{self.do} {what} at {when}" + (f" for {self.lasts:g} s" if self.lasts else "")


@dataclass(frozen=True)
class Scenario:
    name: str
    about: str
    seed: int
    size: int
    files: int
    sites: tuple[SitePlan, ...]
    faults: tuple[Fault, ...]
    timeout: float
    gateway_environment: dict[str, str]
    agent_environment: dict[str, str]

    @property
    def devices(self) -> int:
        return sum(site.devices for site in self.sites)


FAULTS: Final = ("outage", "set", "kill", "move", "rebind", "kill_gateway")
"""``outage`` and ``set`` need a site, ``kill`` and ``move`` a device, ``rebind`` a site with NAT; ``kill`` and
``kill_gateway`` with ``for`` start the process again after it."""


def load(path: Path) -> Scenario:
    """Raises LabError: not readable, or not a scenario."""
    try:
        with path.open("rb") as file:
            raw = tomllib.load(file)
    except OSError as exc:
        raise LabError(f"{path}: {exc.strerror}") from exc
    except tomllib.TOMLDecodeError as exc:
        raise LabError(f"{path}: not TOML: {exc}") from exc
    return _scenario(_Reader(str(path), raw), path.stem)


def _scenario(read: "_Reader", name: str) -> Scenario:
    seed = read.number("seed", 1)
    bundle = read.table("bundle")
    agents = read.table("agents")
    gateway = read.table("gateway")
    sites = tuple(_site(part) for part in read.tables("site"))
    if not sites:
        raise read.error("site", "a scenario has at least one [[site]]")
    names = {s.name for s in sites}
    if len(names) != len(sites):
        raise read.error("site", "two sites have the same name")
    known = {f"{s.name}-{n}" for s in sites for n in range(1, s.devices + 1)}
    faults = [_fault(part, names, known) for part in read.tables("fault")]
    for part in read.tables("cuts"):
        faults += _cuts(part, names, known, random.Random(int(seed)))
    scenario = Scenario(
        name=name,
        about=read.text("about", ""),
        seed=int(seed),
        size=int(bundle.quantity("size", "10MB", _SIZE_UNITS)),
        files=int(bundle.number("files", 1)),
        sites=sites,
        faults=tuple(faults),
        timeout=read.quantity("timeout", "10m", _TIME_UNITS),
        gateway_environment=gateway.strings("environment"),
        agent_environment=agents.strings("environment"),
    )
    for part in (bundle, agents, gateway, read):
        part.done()
    return scenario


def _site(read: "_Reader") -> SitePlan:
    rate = read.quantity("rate", "0bit", _RATE_UNITS)
    rtt = read.quantity("rtt", "0ms", _TIME_UNITS)
    bdp = read.number("queue_bdp", 1.0)
    queue = read.quantity("queue", "0B", _SIZE_UNITS)
    if not queue:
        queue = max(MIN_QUEUE_BYTES, bdp * rate * rtt / 8) if rate and rtt else 1_000_000
    both = Impairment(
        rate=rate,
        delay=rtt / 2,
        jitter=read.quantity("jitter", "0ms", _TIME_UNITS),
        loss=read.share("loss"),
        burst=read.number("burst", 1.0),
        reorder=read.share("reorder"),
        reorder_by=read.quantity("reorder_by", "0ms", _TIME_UNITS),
        duplicate=read.share("duplicate"),
        queue=queue,
        mtu=read.number("black_hole_mtu", 0),
        no_udp=0.0 if read.flag("udp", default=True) else 1.0,
        only_port=read.number("only_port", 0),
        police=read.quantity("police", "0bit", _RATE_UNITS),
    )
    back = read.table("back")
    other = dataclasses.replace(
        both,
        rate=back.quantity("rate", f"{rate:.0f}bit", _RATE_UNITS),
        loss=back.share("loss", both.loss),
    )
    back.done()
    plan = SitePlan(
        name=read.text("name"),
        devices=int(read.number("devices", 1)),
        there=both,
        back=other,
        mtu=int(read.number("mtu", 1500)),
        nat=read.flag("nat", default=False),
        proxy=read.flag("proxy", default=False),
    )
    if not re.fullmatch(r"[a-z][a-z0-9]{0,9}", plan.name):
        raise read.error("name", f"{plan.name!a} is not 1 to 10 lower-case letters and digits")
    read.done()
    return plan


def _fault(read: "_Reader", sites: set[str], devices: set[str]) -> Fault:
    fault = Fault(
        do=read.text("do"),
        at=read.quantity("at", "0s", _TIME_UNITS) if "at" in read.left else None,
        at_progress=read.share("at_progress") if "at_progress" in read.left else None,
        lasts=read.quantity("for", "0s", _TIME_UNITS),
        site=read.text("site", ""),
        device=read.text("device", ""),
        values=read.numbers("values"),
    )
    read.done()
    return _checked(fault, read, sites, devices)


def _checked(fault: Fault, read: "_Reader", sites: set[str], devices: set[str]) -> Fault:
    if fault.do not in FAULTS:
        raise read.error("do", f"{fault.do!a} is none of {', '.join(FAULTS)}")
    if (fault.at is None) == (fault.at_progress is None):
        raise read.error("at", "say either `at` or `at_progress`")
    if fault.do in {"outage", "set", "rebind"} and fault.site not in sites:
        raise read.error("site", f"there is no site {fault.site!a}")
    if fault.do in {"kill", "move"} and fault.device not in devices:
        raise read.error("device", f"there is no device {fault.device!a}")
    known = {f.name for f in dataclasses.fields(Impairment)}
    for key in fault.values:
        if key not in known:
            raise read.error("values", f"a link has no {key!a}{_nearest(key, known)}")
    return fault


def _cuts(read: "_Reader", sites: set[str], devices: set[str], rng: random.Random) -> list[Fault]:
    """Several outages of one link, and kills of one device, spread over the transfer."""
    site = read.text("site")
    count = int(read.number("count", 20))
    shortest = read.quantity("shortest", "1s", _TIME_UNITS)
    longest = read.quantity("longest", "60s", _TIME_UNITS)
    device = read.text("kill", "")
    kills = int(read.number("kills", 0))
    read.done()
    faults = [
        Fault(
            "outage",
            at_progress=round((n + rng.uniform(0.1, 0.9)) / (count + 1), 4),
            lasts=round(shortest * (longest / shortest) ** rng.random(), 1),
            site=site,
        )
        for n in range(count)
    ]
    faults += [
        Fault(
            "kill",
            at_progress=round((n + rng.uniform(0.1, 0.9)) / (kills + 1), 4),
            lasts=1.0,
            device=device,
        )
        for n in range(kills)
    ]
    return [_checked(fault, read, sites, devices) for fault in faults]


class _Reader:
    """One table; ``done`` complains of keys nobody asked for."""

    def __init__(self, where: str, raw: Mapping[str, Any]) -> None:
        self.where = where
        self.left = dict(raw)
        self._known: list[str] = []

    def error(self, key: str, problem: str) -> LabError:
        return LabError(f"{self.where}: {key}: {problem}")

    def _take(self, key: str, default: Any) -> Any:
        self._known.append(key)
        return self.left.pop(key, default)

    def _of(self, key: str, default: Any, kinds: tuple[type, ...], what: str) -> Any:
        value = self._take(key, default)
        if (
            value is None
            or not isinstance(value, kinds)
            or (isinstance(value, bool) and bool not in kinds)
        ):
            raise self.error(key, f"{value!a} is not {what}" if value is not None else "is missing")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        return cast("str", self._of(key, default, (str,), "a text"))

    def number(self, key: str, default: float) -> float:
        value = float(self._of(key, default, (int, float), "a number"))
        if not 0 <= value <= 1e12:
            raise self.error(key, f"{value} is out of range")
        return value

    def share(self, key: str, default: float = 0.0) -> float:
        value = self.number(key, default)
        if value > 1:
            raise self.error(key, f"{value} is not a share between 0 and 1")
        return value

    def flag(self, key: str, *, default: bool) -> bool:
        return bool(self._of(key, default, (bool,), "true or false"))

    def quantity(self, key: str, default: str, units: Mapping[str, float]) -> float:
        value = self.text(key, default)
        match = re.fullmatch(_NUMBER + f"({'|'.join(sorted(units, key=len, reverse=True))})", value)
        if match is None:
            raise self.error(key, f"{value!a} is not a number with one of {', '.join(units)}")
        return float(match[1]) * units[match[2]]

    def strings(self, key: str) -> dict[str, str]:
        value = self._of(key, {}, (dict,), "a table")
        if not all(isinstance(v, str) for v in value.values()):
            raise self.error(key, "every value is a text")
        return cast("dict[str, str]", value)

    def numbers(self, key: str) -> dict[str, float]:
        value = self._of(key, {}, (dict,), "a table")
        if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in value.values()):
            raise self.error(key, "every value is a number")
        return {k: float(v) for k, v in value.items()}

    def table(self, key: str) -> "_Reader":
        return _Reader(f"{self.where}: {key}", self._of(key, {}, (dict,), "a table"))

    def tables(self, key: str) -> "list[_Reader]":
        value = self._of(key, [], (list,), f"a list of [[{key}]] tables")
        return [_Reader(f"{self.where}: {key} {n}", part) for n, part in enumerate(value, 1)]

    def done(self) -> None:
        for key in self.left:
            raise self.error(key, f"is not known here{_nearest(key, self._known)}")


def _nearest(key: str, known: "set[str] | list[str]") -> str:
    close = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def parse_size(text: str) -> int:
    """Bytes from ``20MB``. Raises LabError."""
    return int(_Reader("--size", {"size": text}).quantity("size", "", _SIZE_UNITS))


SCENARIOS: Final = Path(__file__).with_name("scenarios")


def find(name: str) -> Path:
    """A file by its path, or a shipped scenario by its name. Raises LabError: neither."""
    path = Path(name)
    shipped = SCENARIOS / f"{name}.toml"
    if path.is_file():
        return path
    if shipped.is_file():
        return shipped
    known = sorted(p.stem for p in SCENARIOS.glob("*.toml"))
    raise LabError(f"there is no file and no scenario {name!a}; shipped are {', '.join(known)}")
