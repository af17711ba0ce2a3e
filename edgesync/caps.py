"""Which rate cap holds now, until when, and who set it: schedules by time of day in a named zone, the lowest wins.

Pure: the time and the zone's data are arguments. A cap is text such as ``08:00-18:00 200kB/s; 2MB/s``: the first part
holds from 8 to 18 o'clock on the zone's clock, the part without times at all others. Where parts overlap the lower one
holds. Days on which clocks change are as long as they are: a time that does not exist is passed when the clock jumps
over it, one that comes twice holds both times.

It moves no byte and measures nothing; ``edgesync.rate`` and the transport's limiters obey what it says.
"""

import dataclasses
import datetime as dt
import re
import zoneinfo
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from edgesync import limits
from edgesync.config import parse_rate

DAY_S: Final = 86_400
_TIMES: Final = re.compile(
    r"([01]\d|2[0-4]):([0-5]\d)-([01]\d|2[0-4]):([0-5]\d)\s+(.+)\Z", re.ASCII
)
_ZONE: Final = re.compile(r"[A-Za-z][A-Za-z0-9_+-]{0,31}(?:/[A-Za-z0-9_+-]{1,31}){0,2}\Z", re.ASCII)
UTC: Final = "UTC"


@dataclass(frozen=True, slots=True)
class Part:
    rate_bytes_s: int
    """0: no cap."""
    between: tuple[int, int] | None = None
    """Minutes since midnight, the end excluded; an end before the start is on the next day. None: at other times."""

    def covers(self, minute: int) -> bool:
        if self.between is None:
            return True
        start, end = self.between
        return start <= minute < end if start < end else minute >= start or minute < end


@dataclass(frozen=True, slots=True)
class Schedule:
    """Rates by time of day. Make it with ``parse``."""

    parts: tuple[Part, ...]
    zone: dt.tzinfo
    zone_name: str = UTC

    def rate_at(self, utc_now: float) -> int:
        """Bytes per second; 0: no cap."""
        local = dt.datetime.fromtimestamp(utc_now, self.zone)
        minute = local.hour * 60 + local.minute
        timed = [p.rate_bytes_s for p in self.parts if p.between is not None and p.covers(minute)]
        if timed:
            return min(timed, key=lambda rate: rate or float("inf"))
        return next((p.rate_bytes_s for p in self.parts if p.between is None), 0)

    def next_change(self, utc_now: float) -> float | None:
        """When the rate is another one, Unix seconds; None: not within two days (never, for a daily schedule)."""
        rate = self.rate_at(utc_now)
        for moment in sorted(self._boundaries(utc_now)):
            if moment > utc_now and self.rate_at(moment) != rate:
                return moment
        return None

    def _boundaries(self, utc_now: float) -> set[float]:
        today = dt.datetime.fromtimestamp(utc_now, self.zone).date()
        minutes = {minute for part in self.parts for minute in part.between or ()}
        found: set[float] = set()
        for day in range(-1, 3):
            date = today + dt.timedelta(days=day)
            for minute in minutes:
                # 24:00 is 0:00 of the day after.
                on = date + dt.timedelta(days=minute // 1440)
                at = dt.time(minute % 1440 // 60, minute % 60)
                for fold in (0, 1):
                    wall = dt.datetime.combine(on, at, self.zone).replace(fold=fold)
                    found.add(wall.timestamp())
        if minutes:
            found |= self._clock_changes(utc_now)
        return found

    def _clock_changes(self, utc_now: float) -> set[float]:
        """Moments within the next two days at which the zone's clock jumps, to the second."""
        found: set[float] = set()
        start = int(utc_now)
        for low in range(start, start + 2 * DAY_S, 3600):
            high = low + 3600
            if self._offset(low) == self._offset(high):
                continue
            before = low
            while high - before > 1:
                middle = (before + high) // 2
                if self._offset(middle) == self._offset(low):
                    before = middle
                else:
                    high = middle
            found.add(float(high))
        return found

    def _offset(self, at: int) -> dt.timedelta | None:
        return dt.datetime.fromtimestamp(at, self.zone).utcoffset()

    def floored(self) -> "Schedule":
        """The same with no rate below MIN_CAP_BYTES_S: for what came over the network."""
        least = limits.MIN_CAP_BYTES_S
        return dataclasses.replace(
            self,
            parts=tuple(
                dataclasses.replace(part, rate_bytes_s=max(part.rate_bytes_s, least))
                if part.rate_bytes_s
                else part
                for part in self.parts
            ),
        )

    @property
    def lowest(self) -> int:
        """The lowest rate at any time, bytes per second; 0: it never caps."""
        return min((part.rate_bytes_s for part in self.parts if part.rate_bytes_s), default=0)


@dataclass(frozen=True, slots=True)
class Cap:
    """One ceiling and where it comes from."""

    origin: str
    """Such as ``site plant-7`` or ``agent.toml``."""
    upload: Schedule | None = None
    download: Schedule | None = None
    until: float | None = None
    """Unix seconds after which it does not hold, as whoever set it said."""
    expires: float | None = None
    """Unix seconds after which it is believed no more unless it is said again; no end that a person should see."""

    def is_over(self, utc_now: float) -> bool:
        return any(at is not None and at <= utc_now for at in (self.until, self.expires))


@dataclass(frozen=True, slots=True)
class Held:
    """The cap that holds in one direction."""

    rate_bytes_s: int
    """0: none."""
    origin: str = ""
    until: float | None = None
    """Unix seconds at which this cap ends or changes; None: not by its schedule."""
    zone_name: str = UTC
    zone: dt.tzinfo = dt.UTC
    decided: float = 0.0
    """Unix seconds at which this held."""

    def __str__(self) -> str:
        if not self.rate_bytes_s:
            return "no cap"
        end = ""
        if self.until is not None:
            wall = dt.datetime.fromtimestamp(self.until, self.zone)
            # A time alone is taken for the next time the clock shows it.
            date = "" if self.until - self.decided < DAY_S else f"{wall:%Y-%m-%d} "
            end = f" until {date}{wall:%H:%M} {self.zone_name}"
        return f"{rate_text(self.rate_bytes_s)}{end}: {self.origin}"


def lowest(caps: Iterable[Cap], *, upload: bool, utc_now: float) -> Held:
    """The lowest cap that holds at ``utc_now``; of equals the first."""
    best = Held(0)
    for cap in caps:
        schedule = cap.upload if upload else cap.download
        if schedule is None or cap.is_over(utc_now):
            continue
        rate = schedule.rate_at(utc_now)
        if rate and (not best.rate_bytes_s or rate < best.rate_bytes_s):
            ends = [at for at in (schedule.next_change(utc_now), cap.until) if at is not None]
            best = Held(
                rate,
                cap.origin,
                min(ends, default=None),
                schedule.zone_name,
                schedule.zone,
                utc_now,
            )
    return best


def next_change(caps: Iterable[Cap], *, utc_now: float) -> float | None:
    """When it must be decided again, Unix seconds; None: never by itself."""
    found: list[float | None] = []
    for cap in caps:
        if cap.is_over(utc_now):
            continue
        schedules = [one for one in (cap.upload, cap.download) if one is not None]
        found += [
            cap.until,
            cap.expires,
            *(schedule.next_change(utc_now) for schedule in schedules),
        ]
    return min((at for at in found if at is not None), default=None)


def load_zone(name: str) -> dt.tzinfo:
    """The zone's rules as this machine has them. Raises ValueError: it has none of this name."""
    if name == UTC:
        return dt.UTC
    reason: Exception | None = None
    if _ZONE.match(name):
        try:
            return zoneinfo.ZoneInfo(name)
        except (ValueError, OSError, zoneinfo.ZoneInfoNotFoundError) as exc:
            reason = exc
    raise ValueError(
        f"{name[:80]!a} is no time zone known here: write one such as Europe/Rome or UTC"
    ) from reason


def parse(value: Any, zone: dt.tzinfo = dt.UTC, zone_name: str = UTC) -> Schedule | None:
    """The schedule of a rate or a text such as ``08:00-18:00 200kB/s; 2MB/s``; None: no cap at any time.

    Raises ValueError: it is neither, and why.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        pieces: list[Any] = [value]
    elif isinstance(value, str) and len(value) <= limits.MAX_CAP_TEXT_CHARS:
        pieces = [piece.strip() for piece in value.split(";") if piece.strip()]
    else:
        raise ValueError(
            f"{str(value)[:80]!a} is no cap: write a rate such as 200kB/s, or 08:00-18:00 200kB/s; 2MB/s"
        )
    parts = tuple(_part(piece) for piece in pieces)
    if sum(part.between is None for part in parts) > 1:
        raise ValueError(f"{value!a} has two rates without times: one is for all other times")
    if not any(part.rate_bytes_s for part in parts):
        return None
    return Schedule(parts, zone, zone_name)


def _part(piece: Any) -> Part:
    match = _TIMES.match(piece) if isinstance(piece, str) else None
    if match is None:
        if isinstance(piece, str) and "-" in piece[1:]:
            raise ValueError(f"{piece!a} does not begin with times such as 08:00-18:00")
        return Part(parse_rate(piece))
    start, end = (int(match[at]) * 60 + int(match[at + 1]) for at in (1, 3))
    if start > 1439 or end > 1440 or start == end:
        raise ValueError(f"{piece!a}: times are from 00:00 to 24:00, and the two differ")
    return Part(parse_rate(match[5]), (start, end))


def check_floor(schedule: Schedule, value: Any) -> None:
    """Raises ValueError: a rate of what a person wrote as ``value`` is below MIN_CAP_BYTES_S."""
    if schedule.lowest < limits.MIN_CAP_BYTES_S:
        raise ValueError(
            f"{value!a} is below the floor of {rate_text(limits.MIN_CAP_BYTES_S)}, "
            "under which nothing arrives in time"
        )


def setting(value: Any) -> int | str:
    """A parser for configuration: the rate, or the text of a schedule that parses.

    Raises ValueError: it does not parse, or a rate is below MIN_CAP_BYTES_S.
    """
    schedule = parse(value)
    if schedule is not None:
        check_floor(schedule, value)
    if isinstance(value, str) and any(character in value for character in ";-"):
        return value
    return parse_rate(value)


def zone_setting(value: Any) -> str:
    """A parser for configuration: the name of a zone. Raises ValueError."""
    if not isinstance(value, str):
        raise ValueError(f"{value!a} is no time zone: write one such as Europe/Rome or UTC")  # noqa: TRY004 - as all parsers
    load_zone(value)
    return value


def rate_text(rate_bytes_s: float) -> str:
    """``200 kB/s``: for people."""
    for size, unit in ((1e9, "GB/s"), (1e6, "MB/s"), (1e3, "kB/s")):
        if rate_bytes_s >= size:
            return f"{rate_bytes_s / size:.4g} {unit}"
    return f"{rate_bytes_s:.0f} B/s"
