"""What a gateway's state is, in one object: for `gateway status`, for an exporter, for a later web page.

It reads the database and which key files are there; what only the daemon knows comes from the row the daemon rewrites
each second, and is said to be unknown when that row is old.
"""

import json
import os
from collections import Counter
from typing import Any, Final

from gateway import fleet
from gateway.repository import ONLINE_ROLES
from gateway.service import budgets, setup
from gateway.service.devices import labels_of
from gateway.store import GatewayStore

STALE_AFTER_S: Final = 10.0
"""A daemon that has not written its row for this long does not run, or hangs."""


def read(store: GatewayStore, *, utc_now: float) -> dict[str, Any]:
    """``edgesync.gateway-status/1``; times are Unix seconds, sizes bytes."""
    here = fleet.load(store)
    runtime = _runtime(store, utc_now)
    metadata, key_problems = _metadata(store, utc_now)
    counts: Counter[str] = Counter()
    devices_at: Counter[str] = Counter()
    blocked_at: Counter[str] = Counter()
    for row in store.rows("SELECT * FROM devices"):
        counts[row["state"]] += 1
        if row["state"] == "accepted":
            site = labels_of(row)["site"]
            devices_at[site] += 1
            is_online = bool(row["online"]) and runtime["running"]
            counts["online"] += is_online
            blocked_at[site] += is_online and bool(row["udp_blocked"])
    sent = {row["site"]: row["bytes_out"] for row in store.rows("SELECT * FROM site_bytes")}
    broker = runtime["broker"]
    problems = list(key_problems)
    if runtime["running"] and not broker["connected"]:
        problems.append(f"not connected to the broker {broker['url']}: {broker['error']}")
    problems += runtime["problems"]
    return {
        "schema": "edgesync.gateway-status/1",
        "fleet": here.name,
        "fleet_id": here.fleet_id,
        "region": here.region,
        "gateway": here.gateway_id,
        "key": here.gateway_key,
        "running": runtime["running"],
        "pid": runtime["pid"],
        "started": runtime["started"],
        "broker": broker,
        "quic": runtime["quic"],
        "caps": runtime.get("caps", []),
        "budgets": budgets.list_budgets(store, utc_now=utc_now),
        "devices": {
            state: counts[state] for state in ("accepted", "pending", "rejected", "online")
        },
        "bundles": _bundles(store),
        "bytes_out": sum(sent.values()),
        "sites": [
            {
                "site": site,
                "devices": devices_at[site],
                "udp_blocked": blocked_at[site],
                "bytes_out": sent.get(site, 0),
            }
            for site in sorted(devices_at.keys() | sent.keys())
        ],
        "min_site_replication": runtime["min_site_replication"],
        "metadata": metadata,
        "keys": _keys(store),
        "rules": len(store.rows("SELECT 1 FROM follow_rules")),
        "problems": problems,
    }


def is_running(store: GatewayStore, *, utc_now: float) -> bool:
    return bool(_runtime(store, utc_now)["running"])


def write_runtime(
    store: GatewayStore,
    *,
    pid: int,
    started: float,
    utc_now: float,
    data: dict[str, Any],
) -> None:
    """What the running daemon says of itself."""
    with store.atomic() as db:
        db.conn.execute(
            "INSERT OR REPLACE INTO runtime (id, pid, started, updated, data) VALUES (1, ?, ?, ?, ?)",
            (pid, started, utc_now, json.dumps(data)),
        )


def add_sent(store: GatewayStore, sent: dict[str, int]) -> None:
    """Count piece bytes sent to each site."""
    with store.atomic() as db:
        for site, count in sent.items():
            db.conn.execute(
                "INSERT INTO site_bytes (site, bytes_out) VALUES (?, ?) "
                "ON CONFLICT (site) DO UPDATE SET bytes_out = bytes_out + excluded.bytes_out",
                (site, count),
            )


def clear_runtime(store: GatewayStore) -> None:
    with store.atomic() as db:
        db.conn.execute("DELETE FROM runtime")


def _runtime(store: GatewayStore, utc_now: float) -> dict[str, Any]:
    row = store.one("SELECT * FROM runtime WHERE id = 1")
    if row is None or not -60.0 < utc_now - row["updated"] < STALE_AFTER_S:
        return {
            "running": False,
            "pid": None,
            "started": None,
            "broker": {
                "kind": None,
                "url": "",
                "connected": False,
                "error": "the gateway does not run",
            },
            "quic": None,
            "min_site_replication": None,
            "problems": [],
        }
    return {
        "running": True,
        "pid": row["pid"],
        "started": row["started"],
        **json.loads(row["data"]),
    }


def _metadata(store: GatewayStore, utc_now: float) -> tuple[list[dict[str, Any]], list[str]]:
    repository = setup.repository(store)
    trusted = repository.trusted()
    expiries = repository.expiries()
    versions = {
        row["role"]: row["version"]
        for row in store.rows(
            "SELECT role, MAX(version) AS version FROM trust_metadata GROUP BY role"
        )
    }
    roles = [
        {"role": role, "version": versions.get(role), "expires": expires}
        for role, expires in expiries.items()
    ]
    problems = [*repository.warnings(utc_now=utc_now), *trusted.problems]
    problems += [
        f"the {role} metadata has expired: devices accept nothing new until it is signed again"
        for role, expires in expiries.items()
        if role in ONLINE_ROLES and expires <= utc_now
    ]
    return roles, problems


def _keys(store: GatewayStore) -> list[dict[str, Any]]:
    found = [
        {"role": key.role, "path": str(key.path), "readable": key.readable}
        for key in setup.repository(store).readable_keys()
    ]
    for role, path in (
        ("identity", store.datadir.identity_key),
        ("authority", store.datadir.ca / "ca.key"),
    ):
        found.append({"role": role, "path": str(path), "readable": os.access(path, os.R_OK)})
    return found


def _bundles(store: GatewayStore) -> list[dict[str, Any]]:
    """Bundles assigned to somebody, with how far their devices are."""
    rows = store.rows(
        "SELECT a.name, a.version, a.kind, a.target_hash AS digest, COUNT(*) AS assigned, "
        "SUM(COALESCE(e.status = 'succeeded' OR b.state = 'succeeded', 0)) AS succeeded, "
        "SUM(COALESCE(e.status IN ('failed', 'timed_out', 'rejected', 'canceled'), 0)) AS failed, "
        "SUM(COALESCE(e.status = 'in_progress', 0)) AS in_progress "
        "FROM assignments a "
        "LEFT JOIN executions e ON e.device_id = a.device_id AND e.name = a.name AND e.version = a.version "
        "AND e.assignment_id = a.assignment_id "
        "LEFT JOIN device_bundles b ON b.device_id = a.device_id AND b.name = a.name AND b.version = a.version "
        "GROUP BY a.name, a.version, a.kind, a.target_hash ORDER BY a.name, a.version"
    )
    return [{**row, "in_progress": row["in_progress"] or 0} for row in rows]
