"""The plain demo: publish, assign, wait, compare, update, compare; each figure comes from a daemon or the disk."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgesync.demo import source
from edgesync.demo.fleet import Device, Fleet
from edgesync.errors import EdgeSyncError

NAME = "demo"
SOURCES = ("gateway", "peers", "local", "import")
STALL_S = 120.0
"""The demo gives up when no device got a byte for this long; not a limit on how long it may take."""
ENDED = frozenset({"succeeded", "failed", "timed_out", "rejected", "canceled", "removed"})


@dataclass
class Delivery:
    """One version brought to every device, in figures."""

    version: str
    published: dict[str, Any]
    gateway_bytes_out: int = 0
    devices: list[dict[str, Any]] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return bool(self.devices) and all(row["verified"] for row in self.devices)


def publish(fleet: Fleet, path: Path, version: str, *, name: str = NAME) -> dict[str, Any]:
    bundle = f"{name}@{version}"
    return fleet.ask("publish", "bundle", str(path), bundle, "--data", str(fleet.gateway_data))


def assign(fleet: Fleet, version: str, *, name: str = NAME) -> None:
    fleet.ask("assign", f"{name}@{version}", "--all", "--data", str(fleet.gateway_data))


def received(bundle: dict[str, Any]) -> int:
    """Bytes that came over a network for this bundle, duplicates too."""
    return int(bundle["bytes_from_gateway"]) + int(bundle["bytes_from_peers"])


def wait_delivered(
    fleet: Fleet,
    version: str,
    *,
    name: str = NAME,
    devices: list[Device] | None = None,
    watch: Callable[[dict[str, dict[str, Any]]], None] = lambda _bundles: None,
) -> dict[str, float]:
    """Wait until the bundle ended on every device, as long as something moves; seconds each took, by device name."""
    started = time.monotonic()
    waiting = {device.name: device for device in (fleet.devices if devices is None else devices)}
    seconds: dict[str, float] = {}
    bundles: dict[str, dict[str, Any]] = {}
    moved: Any = None
    moved_at = started
    while waiting:
        for device in list(waiting.values()):
            bundle = device.bundle(name, version)
            if bundle is None:
                continue
            bundles[device.name] = bundle
            if bundle["state"] in ENDED:
                seconds[device.name] = time.monotonic() - started
                del waiting[device.name]
        watch(bundles)
        now = {
            key: (value["state"], value["pieces_have"], received(value))
            for key, value in bundles.items()
        }
        if now != moved:
            moved, moved_at = now, time.monotonic()
        elif time.monotonic() - moved_at > STALL_S:
            stuck = ", ".join(
                f"{n} ({bundles.get(n, {}).get('reason') or 'no word'})" for n in waiting
            )
            raise EdgeSyncError(f"nothing moved for {STALL_S:.0f} s; unfinished: {stuck}")
        time.sleep(0.1)
    watch(bundles)
    return seconds


def deliver(
    fleet: Fleet,
    path: Path,
    version: str,
    *,
    watch: Callable[[dict[str, dict[str, Any]]], None] = lambda _bundles: None,
) -> Delivery:
    """Publish ``path`` as a version, bring it to every device and compare what arrived."""
    before = fleet.gateway_bytes_out()
    delivery = Delivery(version, publish(fleet, path, version))
    assign(fleet, version)
    seconds = wait_delivered(fleet, version, watch=watch)
    measure(fleet, delivery, path, seconds)
    delivery.gateway_bytes_out = fleet.gateway_bytes_out() - before
    return delivery


def measure(
    fleet: Fleet, delivery: Delivery, path: Path, seconds: dict[str, float], *, name: str = NAME
) -> None:
    want = source.describe(path, [str(entry) for entry in delivery.published.get("left_out", [])])
    delivery.devices = []
    for device in fleet.devices:
        bundle = device.bundle(name, delivery.version)
        if bundle is None:
            raise EdgeSyncError(f"{device.name} does not answer, see {fleet.log_file(device.name)}")
        difference = source.first_difference(want, device.data / "bundles" / name / "current")
        delivery.devices.append(
            {
                "id": device.name,
                "state": bundle["state"],
                "bytes_from_gateway": bundle["bytes_from_gateway"],
                "bytes_from_peers": bundle["bytes_from_peers"],
                "bytes_local": bundle["bytes_local"],
                "bytes_import": bundle["bytes_import"],
                "rss_peak_bytes": device.rss_peak_bytes,
                "disk_bytes": source.disk_bytes(device.data),
                "seconds": round(seconds.get(device.name, 0.0), 3),
                "verified": bundle["state"] == "succeeded" and difference is None,
                "difference": difference or bundle.get("reason") or "",
            }
        )


def report(
    first: Delivery, update: Delivery | None, resume: dict[str, Any] | None
) -> dict[str, Any]:
    """The object ``--json`` prints."""

    def rows(delivery: Delivery) -> list[dict[str, Any]]:
        return [{k: v for k, v in row.items() if k != "difference"} for row in delivery.devices]

    return {
        "schema": "edgesync.demo/1",
        "payload_bytes": first.published["payload_bytes"],
        "wire_bytes": first.published["wire_bytes"],
        "gateway_bytes_out": first.gateway_bytes_out,
        "devices": rows(first),
        "resume": resume,
        "update": None
        if update is None
        else {
            "payload_bytes": update.published["payload_bytes"],
            "wire_bytes": update.published["wire_bytes"],
            "new_wire_bytes": update.published["new_wire_bytes"],
            "gateway_bytes_out": update.gateway_bytes_out,
            "devices": rows(update),
        },
    }
