"""What an operator can do with the register of devices: list, show, label, accept, reject.

A device is *accepted* (it has a certificate), *pending* (it joined with a token of many uses and waits) or *rejected*
(its key may not come back). Who is a device at all is decided by ``gateway.enrolment``.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from edgesync import limits
from edgesync.errors import ConflictError, NotFoundError, UsageError
from edgesync.ids import DeviceId
from edgesync.selectors import Selector, check_label
from gateway.site import site_of
from gateway.store import GatewayStore

Certify = Callable[[DeviceId, bytes], bytes]
"""Issues a certificate, DER, for an id and a raw public key."""

OFFLINE_AFTER_S: Final = 90.0
"""A device is shown as live when it was heard of within this, or its connection stands."""


def labels_of(row: Mapping[str, Any]) -> dict[str, str]:
    """What selectors see: the device's own labels, and ``id``, ``region``, ``hardware``, ``state`` and ``site``."""
    own: dict[str, str] = json.loads(row["labels"])
    site, _why = site_of(own, row["address"], json.loads(row["local_addresses"]))
    implied = {
        "id": row["id"],
        "region": row["region"],
        "hardware": row["hardware"],
        "state": row["state"],
        "site": site,
    }
    return implied | own


def check_site(name: str) -> None:
    """Raises UsageError: no site can be named so. What a terminal obeys has no place in events and tables."""
    if not 0 < len(name) <= limits.MAX_LABEL_BYTES or not name.isprintable():
        raise UsageError(
            f"a site is named with 1 to {limits.MAX_LABEL_BYTES} characters that can be printed"
        )


def is_site_empty(store: GatewayStore, site: str) -> bool:
    """Whether no device, accepted or pending, is at ``site`` as far as is known."""
    rows = store.rows("SELECT * FROM devices WHERE state != 'rejected'")
    return all(labels_of(row)["site"] != site for row in rows)


def select(
    store: GatewayStore,
    *,
    ids: Sequence[str] = (),
    selector: Selector | None = None,
    everything: bool = False,
    states: Sequence[str] = ("accepted",),
) -> list[dict[str, Any]]:
    """Rows of the devices meant, by id. Raises NotFoundError: an id is not in the register.

    Raises UsageError: neither ids nor a selector nor ``everything``, or more than one of them.
    Raises ConflictError: an id names a device that is not in one of ``states``.
    """
    if (bool(ids), selector is not None, everything).count(True) != 1:
        raise UsageError("say which devices: --device ID, -l SELECTOR or --all, one of them")
    rows = {row["id"]: row for row in store.rows("SELECT * FROM devices ORDER BY id")}
    if ids:
        for device_id in ids:
            if device_id not in rows:
                raise NotFoundError(f"there is no device {device_id!a}: see edgesync device list")
            if rows[device_id]["state"] not in states:
                raise ConflictError(
                    f"device {device_id} is {rows[device_id]['state']}, not {' or '.join(states)}"
                )
        return [rows[device_id] for device_id in sorted(set(ids))]
    return [
        row
        for row in rows.values()
        if row["state"] in states and (selector is None or selector.matches(labels_of(row)))
    ]


def list_devices(store: GatewayStore, selector: Selector | None = None) -> list[dict[str, Any]]:
    """The register, by id."""
    rows = store.rows("SELECT * FROM devices ORDER BY id")
    held = _by_device(store.rows("SELECT * FROM device_bundles ORDER BY device_id, name, version"))
    return [
        _shown(row, held.get(row["id"], []))
        for row in rows
        if selector is None or selector.matches(labels_of(row))
    ]


def show(store: GatewayStore, device_id: str) -> dict[str, Any]:
    """One device with its assignments and executions. Raises NotFoundError."""
    row = _row(store, device_id)
    shown = _shown(
        row,
        store.rows(
            "SELECT * FROM device_bundles WHERE device_id = ? ORDER BY name, version", (device_id,)
        ),
    )
    shown["assignments"] = [
        {
            key: entry[key]
            for key in (
                "kind",
                "name",
                "version",
                "action",
                "assignment_id",
                "not_before",
                "created",
            )
        }
        for entry in store.rows(
            "SELECT * FROM assignments WHERE device_id = ? ORDER BY name", (device_id,)
        )
    ]
    shown["executions"] = [
        {
            **{
                key: entry[key]
                for key in (
                    "kind",
                    "name",
                    "version",
                    "assignment_id",
                    "status",
                    "step",
                    "reason",
                    "updated",
                )
            },
            "counters": json.loads(entry["counters"]),
        }
        for entry in store.rows(
            "SELECT * FROM executions WHERE device_id = ? ORDER BY updated DESC LIMIT 50",
            (device_id,),
        )
    ]
    return shown


def label(
    store: GatewayStore, device_id: str, *, setting: Mapping[str, str], removing: Sequence[str] = ()
) -> dict[str, str]:
    """Set and remove labels; returns those it has now. Raises NotFoundError, UsageError."""
    for key, value in setting.items():
        check_label(key, value)
    with store.atomic() as db:
        row = _row(store, device_id)
        before: dict[str, str] = json.loads(row["labels"])
        after = {key: value for key, value in before.items() if key not in removing} | dict(setting)
        if len(after) > limits.MAX_LABELS:
            raise UsageError(f"a device has at most {limits.MAX_LABELS} labels")
        if after != before:
            db.conn.execute(
                "UPDATE devices SET labels = ? WHERE id = ?",
                (json.dumps(after, sort_keys=True), device_id),
            )
            store.emit("operator", "device.labelled", f"device:{device_id}", {"labels": after})
    return after


def accept(store: GatewayStore, device_id: str, certify: Certify) -> bool:
    """Let a pending or rejected device in; False when it is in already. Raises NotFoundError."""
    with store.atomic() as db:
        row = _row(store, device_id)
        if row["state"] == "accepted":
            return False
        certificate = row["certificate"] or certify(DeviceId(device_id), bytes.fromhex(row["key"]))
        db.conn.execute(
            "UPDATE devices SET state = 'accepted', certificate = ? WHERE id = ?",
            (certificate, device_id),
        )
        store.emit("operator", "device.accepted", f"device:{device_id}")
    return True


def reject(store: GatewayStore, device_id: str) -> bool:
    """Refuse a device that waits; its key cannot join again. False when it is rejected already.

    Raises NotFoundError. Raises ConflictError: it is a member, which only revocation ends.
    """
    with store.atomic() as db:
        row = _row(store, device_id)
        if row["state"] == "rejected":
            return False
        if row["state"] == "accepted":
            raise ConflictError(
                f"device {device_id} is a member already: other members believe its certificate until it is revoked"
            )
        db.conn.execute("UPDATE devices SET state = 'rejected' WHERE id = ?", (device_id,))
        store.emit("operator", "device.rejected", f"device:{device_id}")
    return True


def _row(store: GatewayStore, device_id: str) -> dict[str, Any]:
    row = store.one("SELECT * FROM devices WHERE id = ?", (device_id,))
    if row is None:
        raise NotFoundError(f"there is no device {device_id[:80]!a}: see edgesync device list")
    return row


def _by_device(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["device_id"], []).append(row)
    return found


def _shown(row: Mapping[str, Any], bundles: list[dict[str, Any]]) -> dict[str, Any]:
    labels: dict[str, str] = json.loads(row["labels"])
    site, why = site_of(labels, row["address"], json.loads(row["local_addresses"]))
    return {
        "id": row["id"],
        "key": row["key"],
        "state": row["state"],
        "online": bool(row["online"]),
        "region": row["region"],
        "site": site,
        "site_why": why,
        "labels": labels,
        "hardware": row["hardware"],
        "agent_version": row["agent_version"],
        "joined": row["joined"],
        "last_seen": row["last_seen"],
        "address": row["address"],
        "waiting": row["waiting"],
        "udp_blocked": bool(row["udp_blocked"]),
        "reports_lost": row["reports_lost"],
        "metadata": {"root": row["root_version"], "timestamp": row["timestamp_version"]},
        "bundles": [
            {
                key: bundle[key]
                for key in (
                    "kind",
                    "name",
                    "version",
                    "digest",
                    "state",
                    "reason",
                    "pieces_have",
                    "pieces_total",
                )
            }
            for bundle in bundles
        ],
    }
