"""The caps this gateway obeys itself: one on all it sends, one for each site on what it sends there.

It turns the database's entries and the configured limit into the transport's limiters; which rate holds now is
``edgesync.caps``'. A cap it cannot read, for want of the zone's data, is a problem that status shows.
"""

from collections.abc import Sequence
from typing import Any, Final

from edgesync import caps
from edgesync.rate import TokenBucket
from edgesync.transport.throttle import Throttle
from edgesync.wire.mqtt import CapEntry
from gateway.service.caps import entry_cap

LOOK_AGAIN_S: Final = 30.0
"""A clock that was set is noticed by then."""


class Throttles:
    """``update`` with the entries, ``follow`` the clock. Event loop only."""

    def __init__(self, own: Sequence[caps.Cap] = ()) -> None:
        self._own = list(own)
        self._gateway: list[caps.Cap] = []
        self._sites: dict[str, list[caps.Cap]] = {}
        self._total = Throttle()
        self._site: dict[str, TokenBucket] = {}
        self._held: dict[str, caps.Held] = {}
        self._applied = 0.0
        self._due = 0.0
        self.problems: list[str] = []

    def update(self, entries: Sequence[CapEntry], *, utc_now: float) -> None:
        self._gateway, self._sites, self.problems = [], {}, []
        for entry in entries:
            try:
                cap = entry_cap(entry)
            except ValueError as exc:
                self.problems.append(f"the cap of {entry.scope} {entry.target}: {exc}")
                continue
            if entry.scope == "gateway":
                self._gateway.append(cap)
            elif entry.scope == "site":
                self._sites.setdefault(entry.target, []).append(cap)
        self.apply(utc_now=utc_now)

    def apply(self, *, utc_now: float) -> None:
        self._total.apply([*self._own, *self._gateway], utc_now=utc_now)
        self._held = {
            site: caps.lowest(found, upload=False, utc_now=utc_now)
            for site, found in self._sites.items()
        }
        every = [*self._own, *self._gateway, *(c for found in self._sites.values() for c in found)]
        at = caps.next_change(every, utc_now=utc_now)
        self._applied = utc_now
        self._due = min(utc_now + LOOK_AGAIN_S, utc_now + LOOK_AGAIN_S if at is None else at)
        for site, limiter in self._site.items():
            rate = self._held[site].rate_bytes_s if site in self._held else 0
            if rate != (limiter.rate_bytes_s or 0):
                limiter.set_rate(rate)

    def follow(self, *, utc_now: float) -> None:
        """``apply`` if something may have changed since: called often, and cheap when nothing did."""
        if utc_now >= self._due or utc_now < self._applied:
            self.apply(utc_now=utc_now)

    def limiters(self, site: str) -> tuple[TokenBucket, ...]:
        """What a connection to a device of ``site`` obeys."""
        limiter = self._site.get(site)
        if limiter is None:
            held = self._held.get(site)
            limiter = self._site[site] = TokenBucket(held.rate_bytes_s if held is not None else 0)
        return self._total.upload, limiter

    def facts(self) -> list[dict[str, Any]]:
        """What holds now, for status; rates in bytes per second."""
        rows = [("gateway", self._total.holds_up), *sorted(self._held.items())]
        return [
            {
                "what": "all it sends" if name == "gateway" else f"to site {name}",
                "rate": held.rate_bytes_s,
                "until": held.until,
                "text": str(held),
            }
            for name, held in rows
            if held.rate_bytes_s
        ]


__all__ = ["Throttles"]
