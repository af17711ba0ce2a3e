"""What an operator can do with the months' bytes of sites: set, list, clear. Each change is one event.

A budget is what this gateway and the devices of one site may exchange in a calendar month. The running daemon counts
and holds back (``gateway.budgets``); what was spent before a budget was set does not count in it.
"""

import json
from dataclasses import dataclass
from typing import Any

from edgesync import budget, caps, limits
from edgesync.budget import Ledger
from edgesync.errors import NotFoundError, UsageError
from gateway.service.devices import check_site
from gateway.store import GatewayStore


@dataclass(frozen=True)
class SiteBudget:
    site: str
    limit_bytes: int
    zone: str = caps.UTC


def set_budget(
    store: GatewayStore, *, site: str, size: str, utc_now: float, zone: str = caps.UTC
) -> SiteBudget:
    """Set the budget of a site; what its month has spent stays. Raises UsageError: the size or the zone is none."""
    check_site(site)
    try:
        limit_bytes = budget.parse(size)
        caps.load_zone(zone)
    except ValueError as exc:
        raise UsageError(str(exc)) from exc
    if not limit_bytes:
        raise UsageError(f"{size!a} is no budget: lift one with edgesync budget clear")
    with store.atomic() as db:
        db.conn.execute(
            "INSERT OR REPLACE INTO budgets (site, limit_bytes, zone, created) VALUES (?, ?, ?, ?)",
            (site, limit_bytes, zone, utc_now),
        )
        row = store.one("SELECT COUNT(*) AS n FROM budgets")
        if row is not None and row["n"] > limits.MAX_BUDGETS:
            raise UsageError(f"there are {limits.MAX_BUDGETS} budgets already: clear one first")
        said = {"limit": limit_bytes, "zone": zone}
        store.emit("operator", "budget.set", f"site:{site}", said, utc_now=utc_now)
    return SiteBudget(site, limit_bytes, zone)


def clear(store: GatewayStore, *, site: str, utc_now: float) -> None:
    """Lift the budget of a site. Raises NotFoundError: it has none."""
    with store.atomic() as db:
        if not db.conn.execute("DELETE FROM budgets WHERE site = ?", (site,)).rowcount:
            raise NotFoundError(f"no budget is set for site {site}: see edgesync budget list")
        store.emit("operator", "budget.cleared", f"site:{site}", {}, utc_now=utc_now)


def load(store: GatewayStore) -> tuple[SiteBudget, ...]:
    return tuple(
        SiteBudget(row["site"], row["limit_bytes"], row["zone"])
        for row in store.rows("SELECT site, limit_bytes, zone FROM budgets ORDER BY site")
    )


def load_ledgers(store: GatewayStore) -> dict[str, Ledger]:
    """What each site has spent; a row that cannot be read counts anew."""
    found = {}
    for row in store.rows("SELECT site, ledger FROM budget_ledgers"):
        try:
            found[row["site"]] = Ledger.from_json(json.loads(row["ledger"]))
        except ValueError:
            found[row["site"]] = Ledger()
    return found


def save_ledgers(store: GatewayStore, ledgers: dict[str, dict[str, Any]]) -> None:
    with store.atomic() as db:
        db.conn.executemany(
            "INSERT OR REPLACE INTO budget_ledgers (site, ledger) VALUES (?, ?)",
            [(site, json.dumps(ledger)) for site, ledger in ledgers.items()],
        )


def list_budgets(store: GatewayStore, *, utc_now: float) -> list[dict[str, Any]]:
    """Each budget and where it stands, as last kept (2 s); sizes in bytes, times in Unix seconds."""
    ledgers = load_ledgers(store)
    rows = []
    for one in load(store):
        try:
            zone = caps.load_zone(one.zone)
        except ValueError:
            zone = caps.load_zone(caps.UTC)  # the daemon says that it cannot keep this one
        verdict = budget.judge(
            ledgers.get(one.site, Ledger()),
            one.limit_bytes,
            utc_now=utc_now,
            zone=zone,
            owner=f"site {one.site}",
        )
        rows.append({"site": one.site, "zone": one.zone, **verdict.facts()})
    return rows


__all__ = [
    "SiteBudget",
    "clear",
    "list_budgets",
    "load",
    "load_ledgers",
    "save_ledgers",
    "set_budget",
]
