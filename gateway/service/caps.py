"""What an operator can do with rate caps: set, list, clear. Each change is one event and one number higher.

One cap for each target: the gateway itself, a site, a device. A new one replaces it. The daemon signs and announces
what stands here and obeys its part; devices obey theirs.
"""

from dataclasses import dataclass
from typing import Any, Final, get_args

from edgesync import caps, limits
from edgesync.errors import NotFoundError, UsageError
from edgesync.wire.mqtt import CapEntry, CapScope
from gateway.service.devices import check_site
from gateway.store import GatewayStore

SCOPES: Final[tuple[str, ...]] = get_args(CapScope)


@dataclass(frozen=True)
class CapsNow:
    sequence: int = 0
    """0: none was ever set."""
    entries: tuple[CapEntry, ...] = ()


def set_cap(
    store: GatewayStore,
    *,
    scope: CapScope,
    target: str,
    utc_now: float,
    upload: str = "",
    download: str = "",
    zone: str = caps.UTC,
    until: float | None = None,
) -> CapEntry:
    """Set the cap of one target; texts are those of ``edgesync.caps``, empty: none.

    Raises UsageError: a text or the zone does not parse, the cap is below the floor, or there are too many caps.
    NotFoundError: there is no such device.
    """
    _check(upload, "--upload", zone)
    _check(download, "--download", zone)
    if not upload and not download:
        raise UsageError("say what to cap: --upload RATE, --download RATE, or both")
    if scope == "site":
        check_site(target)
    with store.atomic() as db:
        if scope == "device" and store.one("SELECT 1 FROM devices WHERE id = ?", (target,)) is None:
            raise NotFoundError(f"there is no device {target[:80]!a}: see edgesync device list")
        db.conn.execute("DELETE FROM caps WHERE until IS NOT NULL AND until <= ?", (utc_now,))
        db.conn.execute(
            "INSERT OR REPLACE INTO caps (scope, target, upload, download, zone, until, created) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (scope, target, upload, download, zone, until, utc_now),
        )
        row = store.one("SELECT COUNT(*) AS n FROM caps")
        if row is not None and row["n"] > limits.MAX_CAPS:
            raise UsageError(f"there are {limits.MAX_CAPS} caps already: clear one first")
        _changed(store, utc_now)
        said: dict[str, Any] = {
            "upload": upload,
            "download": download,
            "zone": zone,
            "until": until,
        }
        store.emit("operator", "caps.set", f"{scope}:{target}", said, utc_now=utc_now)
    return CapEntry(
        scope=scope, target=target, upload=upload, download=download, zone=zone, until=until
    )


def clear(store: GatewayStore, *, scope: CapScope, target: str, utc_now: float) -> None:
    """Lift the cap of one target. Raises NotFoundError: it has none."""
    with store.atomic() as db:
        gone = db.conn.execute("DELETE FROM caps WHERE scope = ? AND target = ?", (scope, target))
        if not gone.rowcount:
            raise NotFoundError(f"no cap is set for {scope} {target}: see edgesync caps list")
        _changed(store, utc_now)
        store.emit("operator", "caps.cleared", f"{scope}:{target}", {}, utc_now=utc_now)


def load(store: GatewayStore) -> CapsNow:
    row = store.one("SELECT sequence FROM caps_state WHERE id = 1")
    if row is None:
        return CapsNow()
    entries = tuple(
        CapEntry(
            scope=one["scope"],
            target=one["target"],
            upload=one["upload"],
            download=one["download"],
            zone=one["zone"],
            until=one["until"],
        )
        for one in store.rows("SELECT * FROM caps ORDER BY scope, target")
    )
    return CapsNow(row["sequence"], entries)


def list_caps(store: GatewayStore, *, utc_now: float) -> list[dict[str, Any]]:
    """Each cap with what it comes to now; rates in bytes per second, times in Unix seconds."""
    found = []
    for entry in load(store).entries:
        cap = entry_cap(entry)
        row: dict[str, Any] = {
            "scope": entry.scope,
            "target": entry.target,
            "upload": entry.upload,
            "download": entry.download,
            "zone": entry.zone,
            "until": entry.until,
        }
        for word in ("upload", "download"):
            held = caps.lowest([cap], upload=word == "upload", utc_now=utc_now)
            row[f"{word}_now"] = held.rate_bytes_s
            row[f"{word}_changes"] = held.until
        found.append(row)
    return found


def entry_cap(entry: CapEntry) -> caps.Cap:
    """What an entry of our own database says. Raises ValueError: this machine does not know its zone."""
    zone = caps.load_zone(entry.zone)
    return caps.Cap(
        f"{entry.scope} {entry.target}",
        caps.parse(entry.upload, zone, entry.zone) if entry.upload else None,
        caps.parse(entry.download, zone, entry.zone) if entry.download else None,
        entry.until,
    )


def _check(text: str, option: str, zone: str) -> None:
    if not text:
        return
    try:
        schedule = caps.parse(text, caps.load_zone(zone), zone)
        if schedule is not None:
            caps.check_floor(schedule, text)
    except ValueError as exc:
        raise UsageError(f"{option}: {exc}") from exc
    if schedule is None:
        raise UsageError(f"{option}: {text!a} caps nothing: lift a cap with edgesync caps clear")


def _changed(store: GatewayStore, utc_now: float) -> None:
    # By the clock, so that a database restored from a backup does not repeat numbers devices have seen.
    store.db.conn.execute(
        "INSERT INTO caps_state (id, sequence) VALUES (1, ?) "
        "ON CONFLICT (id) DO UPDATE SET sequence = max(sequence + 1, excluded.sequence)",
        (int(utc_now * 1000),),
    )


__all__ = ["SCOPES", "CapsNow", "clear", "entry_cap", "list_caps", "load", "set_cap"]
