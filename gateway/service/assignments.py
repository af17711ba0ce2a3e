"""What an operator can do with assignments: assign, unassign, wait for them; and what the gateway does to keep them.

The rows say which bundle each device shall hold; from them one signed set per device is made, in the same transaction,
so that the set and the rows never differ. Signing anew is the only way a set changes: its sequence only grows.
A standing rule (``assign --follow``) gives its bundle to devices that join or come to match later.
"""

import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from edgesync import assignment, limits, selectors
from edgesync.assignment import AssignmentSet, Entry
from edgesync.envelope import Signer
from edgesync.errors import ConflictError, NotFoundError, RolloutFailedError, WaitTimeoutError
from edgesync.ids import DeviceId
from edgesync.selectors import Selector
from edgesync.trust import BundleTarget
from gateway import fleet
from gateway.certificates import load_assign_key
from gateway.service import devices, setup
from gateway.store import GatewayStore

POLL_S: Final = 0.25
FAILED: Final = frozenset({"failed", "timed_out", "rejected", "canceled"})


@dataclass(frozen=True)
class Assigned:
    name: str
    version: str
    digest: str
    assignment_id: str
    devices: list[str]
    """Every device that has the assignment now, also those that had it before."""
    changed: list[str]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Devices that were meant but cannot take it, with the reason."""


def assign(
    store: GatewayStore,
    name: str,
    version: str | None,
    *,
    utc_now: float,
    ids: Sequence[str] = (),
    selector: Selector | None = None,
    selector_text: str = "",
    everything: bool = False,
    follow: bool = False,
    signer: Signer | None = None,
) -> Assigned:
    """Sign that these devices shall hold ``name`` at ``version`` (None: the newest published).

    Raises NotFoundError: no such bundle or device, or no device that can take it and no ``follow``.
    Raises UsageError: not exactly one way to say which devices.
    Raises ConflictError: a device named cannot take it, or one would have more than MAX_ASSIGNMENT_ENTRIES bundles.
    """
    signer = signer or load_assign_key(store.datadir.online)
    with store.atomic():
        bundle = _published(store, name, version)
        rows = devices.select(store, ids=ids, selector=selector, everything=everything)
        assignment_id = new_assignment_id(utc_now)
        fitting: list[str] = []
        skipped: list[tuple[str, str]] = []
        for row in rows:
            if _fits(bundle, row["hardware"]):
                fitting.append(row["id"])
            else:
                has = row["hardware"] or "no hardware type"
                skipped.append(
                    (row["id"], f"the bundle is for {', '.join(bundle.hardware)}, it has {has}")
                )
        if ids and skipped:
            raise ConflictError(
                f"{bundle.name}@{bundle.version} does not fit {skipped[0][0]}: {skipped[0][1]}"
            )
        if not fitting and not follow:
            why = f": {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
            raise NotFoundError(
                f"no accepted device matches that can take {bundle.name}@{bundle.version}{why} "
                "(--follow gives it to devices that join later)"
            )
        changed = _give(store, bundle, fitting, assignment_id, signer, utc_now)
        if follow:
            _add_rule(store, bundle, selector_text, ids, utc_now)
        store.emit(
            "operator",
            "bundle.assigned",
            f"bundle:{bundle.name}@{bundle.version}",
            {
                "assignment": assignment_id,
                "devices": len(fitting),
                "changed": len(changed),
                "skipped": len(skipped),
                "selector": selector_text,
                "ids": sorted(ids)[:100],
                "follow": follow,
            },
            utc_now=utc_now,
        )
    return Assigned(
        bundle.name, bundle.version, bundle.digest, assignment_id, fitting, changed, skipped
    )


def unassign(
    store: GatewayStore,
    name: str,
    version: str | None,
    *,
    utc_now: float,
    ids: Sequence[str] = (),
    selector: Selector | None = None,
    everything: bool = False,
    signer: Signer | None = None,
) -> list[str]:
    """Sign that these devices shall no longer hold ``name``; returns those for which that is a change.

    With ``everything`` the bundle's standing rules end too. Raises NotFoundError: no such device, or nothing is
    assigned under this name at all. Raises UsageError.
    """
    signer = signer or load_assign_key(store.datadir.online)
    with store.atomic() as db:
        meant = devices.select(store, ids=ids, selector=selector, everything=everything)
        had = {
            row["device_id"]
            for row in store.rows(
                "SELECT device_id, version FROM assignments WHERE name = ?", (name,)
            )
            if version in {None, row["version"]}
        }
        rules = 0
        if everything:
            where = "name = ?" if version is None else "name = ? AND version = ?"
            parameters = (name,) if version is None else (name, version)
            rules = db.conn.execute(f"DELETE FROM follow_rules WHERE {where}", parameters).rowcount  # noqa: S608 - fixed texts
        if not had and not rules:
            raise NotFoundError(
                f"{name if version is None else f'{name}@{version}'} is assigned to no device"
            )
        changed = [row["id"] for row in meant if row["id"] in had]
        for device_id in changed:
            db.conn.execute(
                "DELETE FROM assignments WHERE device_id = ? AND name = ?", (device_id, name)
            )
        _sign(store, changed, signer, utc_now)
        store.emit(
            "operator",
            "bundle.unassigned",
            f"bundle:{name}" if version is None else f"bundle:{name}@{version}",
            {"devices": len(changed), "ids": changed[:100], "rules": rules},
            utc_now=utc_now,
        )
    return changed


def follow(
    store: GatewayStore,
    device_ids: Iterable[str],
    *,
    utc_now: float | None = None,
    signer: Signer | None = None,
) -> int:
    """Apply the standing rules to these devices, and give each its first set; returns how many assignments came of it.

    A device keeps what an operator assigned to it under the same name.
    """
    utc_now = time.time() if utc_now is None else utc_now
    signer = signer or load_assign_key(store.datadir.online)
    given = 0
    with store.atomic():
        rules = [
            (rule, selectors.parse(rule["selector"]))
            for rule in store.rows("SELECT * FROM follow_rules ORDER BY id DESC")
        ]
        for device_id in device_ids:
            row = store.one(
                "SELECT * FROM devices WHERE id = ? AND state = 'accepted'", (device_id,)
            )
            if row is None:
                continue
            has = {
                entry["name"]
                for entry in store.rows(
                    "SELECT name FROM assignments WHERE device_id = ?", (device_id,)
                )
            }
            for rule, selector in rules:
                if rule["name"] in has or not selector.matches(devices.labels_of(row)):
                    continue
                bundle = setup.bundle(store, rule["name"], rule["version"])
                # Withdrawn since: the rule waits for an operator to end it.
                if bundle is not None and _fits(bundle, row["hardware"]):
                    _give(store, bundle, [device_id], new_assignment_id(utc_now), signer, utc_now)
                    has.add(bundle.name)
                    given += 1
            if (
                store.one("SELECT 1 AS yes FROM assignment_sets WHERE device_id = ?", (device_id,))
                is None
            ):
                _sign(store, [device_id], signer, utc_now)
        if given:
            store.emit("gateway", "rule.applied", "rules", {"assignments": given}, utc_now=utc_now)
    return given


def renew(store: GatewayStore, *, utc_now: float, signer: Signer | None = None) -> int:
    """Sign anew every set that is past half of its life; returns how many."""
    rows = store.rows(
        "SELECT s.device_id FROM assignment_sets s JOIN devices d ON d.id = s.device_id "
        "WHERE d.state = 'accepted' AND (s.issued + s.expires) / 2 <= ?",
        (utc_now,),
    )
    due = [row["device_id"] for row in rows]
    if due:
        signer = signer or load_assign_key(store.datadir.online)
        with store.atomic():
            _sign(store, due, signer, utc_now)
            store.emit(
                "gateway",
                "assignments.renewed",
                "assignments",
                {"devices": len(due)},
                utc_now=utc_now,
            )
    return len(due)


def rules(store: GatewayStore) -> list[dict[str, Any]]:
    return store.rows("SELECT name, version, selector, created FROM follow_rules ORDER BY id")


def wait(
    store: GatewayStore,
    made: Assigned,
    *,
    timeout_s: float | None,
    progress: Callable[[float, float], None] = lambda _done, _total: None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, list[str]]:
    """Wait until every device of ``made`` has the bundle or has failed: ``{"succeeded", "failed", "superseded"}``.

    Raises WaitTimeoutError: some had not within ``timeout_s``.
    """
    deadline = None if timeout_s is None else clock() + timeout_s
    while True:
        outcome = _outcome(store, made)
        settled = sum(len(ids) for ids in outcome.values())
        progress(len(outcome["succeeded"]), len(made.devices))
        if settled == len(made.devices):
            return outcome
        if deadline is not None and clock() >= deadline:
            left = len(made.devices) - settled
            raise WaitTimeoutError(
                f"{left} of {len(made.devices)} devices do not have {made.name}@{made.version} after {timeout_s:g} s: "
                "see edgesync device list"
            )
        sleep(POLL_S)


def judge(made: Assigned, outcome: dict[str, list[str]] | None) -> None:
    """Raise RolloutFailedError if ``outcome`` names a device that failed."""
    if outcome is not None and outcome["failed"]:
        failed = outcome["failed"]
        raise RolloutFailedError(
            f"{made.name}@{made.version} failed on {len(failed)} of {len(made.devices)} devices: "
            f"{', '.join(failed[:10])}"
        )


def new_assignment_id(utc_now: float) -> str:
    return f"{int(utc_now * 1000):x}-{secrets.token_hex(4)}"


def _published(store: GatewayStore, name: str, version: str | None) -> BundleTarget:
    found = setup.bundle(store, name, version)
    if found is None:
        what = name if version is None else f"{name}@{version}"
        raise NotFoundError(f"{what} is not published: see edgesync bundle list")
    return found


def _fits(bundle: BundleTarget, hardware: str) -> bool:
    return not bundle.hardware or hardware in bundle.hardware


def _outcome(store: GatewayStore, made: Assigned) -> dict[str, list[str]]:
    current = {
        row["device_id"]: row
        for row in store.rows(
            "SELECT device_id, target_hash, assignment_id FROM assignments WHERE name = ?",
            (made.name,),
        )
    }
    executions = {
        (row["device_id"], row["assignment_id"]): row["status"]
        for row in store.rows(
            "SELECT device_id, assignment_id, status FROM executions WHERE name = ? AND version = ?",
            (made.name, made.version),
        )
    }
    held = {
        row["device_id"]: row["state"]
        for row in store.rows(
            "SELECT device_id, state FROM device_bundles WHERE name = ? AND version = ? AND digest = ?",
            (made.name, made.version, made.digest),
        )
    }
    # A device that had the assignment before keeps the id of that time.
    changed = frozenset(made.changed)
    outcome: dict[str, list[str]] = {"succeeded": [], "failed": [], "superseded": []}
    for device_id in made.devices:
        row = current.get(device_id)
        if (
            row is None
            or row["target_hash"] != made.digest
            or (device_id in changed and row["assignment_id"] != made.assignment_id)
        ):
            outcome["superseded"].append(device_id)
            continue
        status = executions.get((device_id, row["assignment_id"]))
        if status == "succeeded" or held.get(device_id) == "succeeded":
            outcome["succeeded"].append(device_id)
        elif status in FAILED:
            outcome["failed"].append(device_id)
    return outcome


def _give(
    store: GatewayStore,
    bundle: BundleTarget,
    device_ids: Sequence[str],
    assignment_id: str,
    signer: Signer,
    utc_now: float,
) -> list[str]:
    """Write the rows and sign the sets of devices that do not have just this yet."""
    changed: list[str] = []
    with store.atomic() as db:
        for device_id in device_ids:
            row = store.one(
                "SELECT target_hash FROM assignments WHERE device_id = ? AND name = ?",
                (device_id, bundle.name),
            )
            if row is not None and row["target_hash"] == bundle.digest:
                continue
            db.conn.execute(
                "INSERT OR REPLACE INTO assignments (device_id, kind, name, version, target_hash, target_length, "
                "assignment_id, action, not_before, created) VALUES (?, ?, ?, ?, ?, ?, ?, 'install', NULL, ?)",
                (
                    device_id,
                    bundle.kind,
                    bundle.name,
                    bundle.version,
                    bundle.digest,
                    bundle.length,
                    assignment_id,
                    utc_now,
                ),
            )
            changed.append(device_id)
        _sign(store, changed, signer, utc_now)
    return changed


def _sign(store: GatewayStore, device_ids: Sequence[str], signer: Signer, utc_now: float) -> None:
    """Make each device's set from its rows. Raises ConflictError: more bundles than a set may name."""
    here = fleet.load(store)
    with store.atomic() as db:
        for device_id in device_ids:
            device = store.one("SELECT key FROM devices WHERE id = ?", (device_id,))
            assert device is not None
            rows = store.rows(
                "SELECT * FROM assignments WHERE device_id = ? ORDER BY name", (device_id,)
            )
            if len(rows) > limits.MAX_ASSIGNMENT_ENTRIES:
                raise ConflictError(
                    f"device {device_id} would have {len(rows)} bundles, "
                    f"at most {limits.MAX_ASSIGNMENT_ENTRIES} fit a set"
                )
            last = store.one(
                "SELECT sequence FROM assignment_sets WHERE device_id = ?", (device_id,)
            )
            sequence = assignment.next_sequence(last["sequence"] if last else 0, utc_now)
            made = AssignmentSet(
                fleet=here.fleet_id,
                gateway_key=signer.key,
                device=DeviceId(device_id),
                device_key=device["key"],
                sequence=sequence,
                issued=utc_now,
                expires=utc_now + assignment.LIFETIME_S,
                entries=tuple(
                    Entry(
                        kind=row["kind"],
                        name=row["name"],
                        version=row["version"],
                        target_hash=row["target_hash"],
                        target_length=row["target_length"],
                        assignment_id=row["assignment_id"],
                        action=row["action"],
                        not_before=row["not_before"],
                    )
                    for row in rows
                ),
            )
            db.conn.execute(
                "INSERT OR REPLACE INTO assignment_sets (device_id, sequence, issued, expires, envelope) "
                "VALUES (?, ?, ?, ?, ?)",
                (device_id, sequence, made.issued, made.expires, assignment.sign(made, signer)),
            )


def _add_rule(
    store: GatewayStore,
    bundle: BundleTarget,
    selector_text: str,
    ids: Sequence[str],
    utc_now: float,
) -> None:
    """Remember the rule; one for the same name and the same devices replaces the one before."""
    text = f"id in ({','.join(sorted(ids))})" if ids else selector_text
    with store.atomic() as db:
        db.conn.execute(
            "DELETE FROM follow_rules WHERE name = ? AND selector = ?", (bundle.name, text)
        )
        db.conn.execute(
            "INSERT INTO follow_rules (name, version, selector, action, created) VALUES (?, ?, ?, 'install', ?)",
            (bundle.name, bundle.version, text, utc_now),
        )
