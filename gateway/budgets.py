"""The months' bytes of sites, as the running gateway keeps them: counts what sessions move, says what is left.

Counted is every datagram between this gateway and a device of the site, in both directions, with its headers; not
MQTT. It holds nothing back itself: the seeder asks before it grants and before it sends. Event loop only.
"""

import datetime as dt
from collections.abc import Mapping, Sequence
from typing import Any, Final

from edgesync import budget, caps
from edgesync.budget import Ledger, Verdict
from edgesync.transport.connection import PeerConnection
from gateway.service.budgets import SiteBudget

SAVE_S: Final = 2.0
"""A kill loses so much of the count."""


class SiteBudgets:
    """``update`` with the database's entries; ``count`` often; ``left`` and ``reason`` decide."""

    def __init__(self) -> None:
        self._limits: dict[str, tuple[SiteBudget, dt.tzinfo]] = {}
        self._ledgers: dict[str, Ledger] = {}
        self._seen: dict[PeerConnection, int] = {}
        self._dirty: set[str] = set()
        self.problems: list[str] = []

    def load(self, ledgers: Mapping[str, Ledger]) -> None:
        """What earlier runs counted; once, at the start."""
        self._ledgers = dict(ledgers)

    def update(self, entries: Sequence[SiteBudget]) -> None:
        self._limits, self.problems = {}, []
        for entry in entries:
            try:
                self._limits[entry.site] = (entry, caps.load_zone(entry.zone))
            except ValueError as exc:
                self.problems.append(f"the budget of site {entry.site} is not kept: {exc}")

    def count(self, conn: PeerConnection, site: str, *, utc_now: float) -> None:
        """What the connection moved since it was looked at last."""
        now = conn.wire_bytes
        moved = now - self._seen.get(conn, 0)
        self._seen[conn] = now
        if moved and site in self._limits:
            self._ledger(site).spend(moved, self._month(site, utc_now))
            self._dirty.add(site)

    def forget(self, conn: PeerConnection) -> None:
        self._seen.pop(conn, None)

    def verdict(self, site: str, *, utc_now: float) -> Verdict | None:
        """Where the site's budget stands; None: it has none."""
        found = self._limits.get(site)
        if found is None:
            return None
        entry, zone = found
        return budget.judge(
            self._ledger(site),
            entry.limit_bytes,
            utc_now=utc_now,
            zone=zone,
            owner=f"site {site}",
        )

    def take_changed(self) -> dict[str, dict[str, Any]]:
        """Ledgers that changed since the last call, for the database."""
        changed, self._dirty = self._dirty, set()
        return {site: self._ledgers[site].to_json() for site in sorted(changed)}

    def _ledger(self, site: str) -> Ledger:
        return self._ledgers.setdefault(site, Ledger())

    def _month(self, site: str, utc_now: float) -> int:
        return budget.month_at(utc_now, self._limits[site][1]).number


__all__ = ["SAVE_S", "SiteBudgets"]
