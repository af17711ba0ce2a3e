"""How much of a month's bytes is spent: a ledger by calendar month of a named zone, and why one waits.

Pure: the time and the zone's data are arguments. It counts nothing by itself and holds nothing back; a device's shell
is ``device.budget``, a gateway's ``gateway.budgets``.

Invariants of a ledger, whatever the clock does:

* what is spent under a clock that says November counts in November and in every later month already known;
* a clock that goes back finds what that month has spent; a month it never was in begins with what the month it came
  from has spent. So going back refunds nothing;
* a clock that goes forward begins the month it comes to, once.
"""

import datetime as dt
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from edgesync.config import parse_rate

MAX_MONTHS: Final = 12
"""Months a ledger keeps: a clock that jumps about must not fill the database."""
IP_HEADERS_BYTES: Final = 28
"""IPv4 and UDP headers around each datagram; IPv6 has 20 more."""
SPENT: Final = "is spent; renews"
"""Stands in each reason to wait for a new month."""
TCP_OVERHEAD: Final = 1.05
"""Bytes on the wire for each TLS byte: IP and TCP headers, records."""


@dataclass(frozen=True, slots=True)
class Month:
    """One calendar month somewhere."""

    number: int
    """Months since year 0."""
    began: float
    """Unix seconds of its first moment."""
    ends: float
    zone: dt.tzinfo = dt.UTC

    @property
    def name(self) -> str:
        """``November``."""
        return _NAMES[self.number % 12]

    @property
    def renews(self) -> str:
        """The day the next one begins on, ``2026-12-01``."""
        return _first(self.number + 1, self.zone).date().isoformat()


_NAMES: Final = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)


def _first(number: int, zone: dt.tzinfo) -> dt.datetime:
    return dt.datetime(number // 12, number % 12 + 1, 1, tzinfo=zone)


def month_at(utc_now: float, zone: dt.tzinfo = dt.UTC) -> Month:
    """The month of ``zone`` that ``utc_now`` lies in."""
    local = dt.datetime.fromtimestamp(math.floor(utc_now), zone)  # it would round up otherwise
    number = local.year * 12 + local.month - 1
    began = _first(number, zone).timestamp()
    ends = _first(number + 1, zone).timestamp()
    return Month(number, began, ends, zone)


@dataclass(slots=True)
class Ledger:
    """What each month has spent; ``to_json`` and ``from_json`` for where it is kept."""

    last: int | None = None
    """The month it was used in last; None: never."""
    spent: dict[int, int] = field(default_factory=dict)

    def spend(self, count: int, month: int) -> None:
        """Count bytes in the month numbered so, and in the later ones that are known."""
        self._come_to(month)
        for known in self.spent:
            if known >= month:
                self.spent[known] += count

    def spent_in(self, month: int) -> int:
        self._come_to(month)
        return self.spent[month]

    def _come_to(self, month: int) -> None:
        if self.last == month:
            return
        if month not in self.spent:
            back = self.last is not None and month < self.last
            self.spent[month] = self.spent[self.last] if back and self.last is not None else 0
        self.last = month
        while len(self.spent) > MAX_MONTHS:
            # The one furthest from now: what it says is needed least.
            del self.spent[max(self.spent, key=lambda known: abs(known - month))]

    def to_json(self) -> dict[str, Any]:
        return {"last": self.last, "spent": {str(key): value for key, value in self.spent.items()}}

    @classmethod
    def from_json(cls, value: Any) -> "Ledger":
        """Raises ValueError: not what ``to_json`` made."""
        try:
            last, spent = value["last"], value["spent"]
            if last is None:
                return cls()
            ledger = cls(int(last), {int(key): int(count) for key, count in spent.items()})
        except (KeyError, TypeError, AttributeError) as exc:
            raise ValueError(f"{str(value)[:80]!a} is no ledger") from exc
        if ledger.last not in ledger.spent or min(ledger.spent.values()) < 0:
            raise ValueError("a ledger does not know its own month")
        return ledger


@dataclass(frozen=True, slots=True)
class Verdict:
    """Where a budget stands."""

    limit_bytes: int
    spent_bytes: int
    month: Month
    owner: str = ""
    """Whose it is, such as ``site plant-7``; empty: this machine's."""

    @property
    def left_bytes(self) -> int:
        return max(0, self.limit_bytes - self.spent_bytes)

    @property
    def reason(self) -> str:
        """Why nothing more is fetched once nothing is left."""
        whose = f"the budget of {self.owner}," if self.owner else "the budget of"
        return (
            f"{whose} {size_text(self.limit_bytes)} for {self.month.name} {SPENT} "
            f"{self.month.renews}"
        )

    def facts(self) -> Mapping[str, Any]:
        """For status; sizes in bytes, times in Unix seconds."""
        return {
            "limit": self.limit_bytes,
            "spent": self.spent_bytes,
            "left": self.left_bytes,
            "month": f"{self.month.number // 12:04}-{self.month.number % 12 + 1:02}",
            "renews": self.month.ends,
            "text": str(self),
        }

    def __str__(self) -> str:
        return (
            f"{size_text(self.spent_bytes)} of {size_text(self.limit_bytes)} "
            f"spent in {self.month.name}; renews {self.month.renews}"
        )


def judge(
    ledger: Ledger, limit_bytes: int, *, utc_now: float, zone: dt.tzinfo = dt.UTC, owner: str = ""
) -> Verdict:
    """Where a limit for each month stands now."""
    month = month_at(utc_now, zone)
    return Verdict(limit_bytes, ledger.spent_in(month.number), month, owner)


def parse(value: Any) -> int:
    """Bytes for each month from ``2GB``, ``2GB/month``, ``500MiB`` or a number; 0: no budget. Raises ValueError."""
    text = value
    if isinstance(value, str):
        text = value.strip().removesuffix("/month").strip()
        if text.isascii() and text.isdigit():
            text = int(text)
    if isinstance(text, str) and "/" in text:
        raise ValueError(f"{value!a} is no budget: write bytes for each month such as 2GB")
    try:
        return parse_rate(text)
    except ValueError as exc:
        raise ValueError(f"{value!a} is no budget: write bytes for each month such as 2GB") from exc


def size_text(size_bytes: float) -> str:
    """``2 GB``: for people."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size_bytes >= size:
            return f"{size_bytes / size:.4g} {unit}"
    return f"{size_bytes:.0f} B"
