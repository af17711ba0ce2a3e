"""The demo slowed down for a person: four acts, each ending in one line of measured figures.

The gateway is throttled by its ordinary upload cap. Bars are drawn only on a terminal; elsewhere a line a quarter.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgesync.cli import output
from edgesync.demo import source
from edgesync.demo.fleet import Device, Fleet
from edgesync.demo.run import Delivery, assign, measure, publish, received, wait_delivered
from edgesync.errors import EdgeSyncError

ACT_ONE_S = 9.0
"""How long the throttled gateway needs to send one copy of the first version."""
MODEL = "demo-model"
MODEL_S = 7.0
KILL_AT = 0.6
TAMPERED = "demo-tampered"
Say = Callable[[str], None]


def run(
    fleet: Fleet, path: Path, update: Path, *, devices: int, say: Say
) -> tuple[Delivery, Delivery, dict[str, Any]]:
    """Play all four acts; what the plain demo measures is measured here too."""
    say(f"Setting up: one gateway, {devices} agents, each its own process ({fleet.work})")
    fleet.init_gateway()
    first = Delivery("1", publish(fleet, path, "1"))
    rate = max(64_000, int(first.published["wire_bytes"] / ACT_ONE_S))
    fleet.start_gateway(upload_limit=rate)
    for number in range(1, devices + 1):
        fleet.start_device(fleet.join(f"device-{number}"))
    fleet.wait_connected()
    started = time.monotonic()
    _act_one(fleet, path, first, rate, say)
    resume = _act_two(fleet, rate, say)
    second = Delivery("2", {})
    _act_three(fleet, update, second, rate, say)
    _act_four(fleet, rate, say)
    say(f"\nThe tour took {time.monotonic() - started:.0f} s. Next, on machines of your own:")
    for command in (
        "edgesync gateway init --advertise HOST",
        "edgesync gateway run",
        "edgesync token create",
    ):
        say(f"  {command}")
    return first, second, resume


def _act_one(fleet: Fleet, path: Path, first: Delivery, rate: int, say: Say) -> None:
    payload = first.published["payload_bytes"]
    say(
        f"\n1. {output.size(payload)} for {len(fleet.devices)} devices; gateway held to {output.size(rate)}/s"
    )
    before = fleet.gateway_bytes_out()
    assign(fleet, "1")
    with _bars(fleet.devices) as watch:
        seconds = wait_delivered(fleet, "1", watch=watch)
    measure(fleet, first, path, seconds)
    first.gateway_bytes_out = fleet.gateway_bytes_out() - before
    copies = first.gateway_bytes_out / first.published["wire_bytes"]
    say(f"   gateway sent {copies:.1f}x copies, not {len(fleet.devices)}")


def _act_two(fleet: Fleet, rate: int, say: Say) -> dict[str, Any]:
    model = fleet.work / "model"
    source.make_random(model, int(rate * MODEL_S), seed=2)
    say(
        f"\n2. {output.size(rate * MODEL_S)} more. One agent is killed on the way, then the gateway"
    )
    publish(fleet, model, "1", name=MODEL)
    assign(fleet, "1", name=MODEL)
    victim, others = fleet.devices[-1], fleet.devices[:-1]

    def far_enough() -> bool:
        bundle = victim.bundle(MODEL, "1")
        return bundle is not None and bundle["pieces_have"] >= KILL_AT * bundle["pieces_total"]

    fleet.wait(f"{victim.name} to have {KILL_AT:.0%}", far_enough, timeout_s=60)
    before = victim.bundle(MODEL, "1") or {}
    victim.kill()
    say(f"   {victim.name} killed")
    with _bars(others) as watch:
        wait_delivered(fleet, "1", name=MODEL, devices=others, watch=watch)
    fleet.kill_gateway()
    say("   gateway killed")
    fleet.start_device(victim)
    with _bars([victim]) as watch:
        wait_delivered(fleet, "1", name=MODEL, devices=[victim], watch=watch)
    after = victim.bundle(MODEL, "1") or {}
    payload = int(after["payload_bytes"])
    again = max(0, received(after) - payload)
    held = int(before["pieces_have"])
    resume = {"device": victim.name, "pieces_before": held, "bytes_fetched_again": again}
    share = held / int(before["pieces_total"])
    say(
        f"   resumed at {share:.0%}, {output.size(again)} fetched again; gateway down, finishing from peers"
    )
    _expect_equal(victim, model, MODEL)
    return resume


def _act_three(fleet: Fleet, update: Path, second: Delivery, rate: int, say: Say) -> None:
    fleet.start_gateway(upload_limit=rate)
    say("\n3. The gateway is back; an update")
    before = fleet.gateway_bytes_out()
    second.published = publish(fleet, update, "2")
    assign(fleet, "2")
    with _bars(fleet.devices) as watch:
        seconds = wait_delivered(fleet, "2", watch=watch)
    measure(fleet, second, update, seconds)
    second.gateway_bytes_out = fleet.gateway_bytes_out() - before
    moved = max(row["bytes_from_gateway"] + row["bytes_from_peers"] for row in second.devices)
    payload = second.published["payload_bytes"]
    say(f"   {output.size(moved)} of {output.size(payload)} moved")


def _act_four(fleet: Fleet, rate: int, say: Say) -> None:
    say("\n4. One more member joins, and lies about what it sends")
    intruder = Device("intruder", fleet.work / "intruder")
    arguments = (
        "agent",
        "join",
        "--token-file",
        "-",
        "--id",
        "intruder",
        "--data",
        str(intruder.data),
    )
    fleet.run(*arguments, stdin=fleet.token())
    target = fleet.work / "tampered"
    source.make_random(target, rate * 2, seed=4)
    published = publish(fleet, target, "1", name=TAMPERED)
    with fleet.log_file("intruder").open("ab") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "edgesync.testing.hostile_member"),
                *("--data", str(intruder.data), "--bundle", str(published["id"])),
                *("--interface", "127.0.0.1"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
        )
    try:
        assert process.stdout is not None
        process.stdout.readline()  # it says that it is ready to lie
        assign(fleet, "1", name=TAMPERED)
        wait_delivered(fleet, "1", name=TAMPERED)
    finally:
        process.kill()
        process.wait()
    rejected = {
        device.name: int((device.bundle(TAMPERED, "1") or {}).get("pieces_rejected", 0))
        for device in fleet.devices
    }
    if not any(rejected.values()):
        raise EdgeSyncError("no device met the intruder, so nothing was shown: run the tour again")
    for name, count in rejected.items():
        if count:
            say(
                f"   {name}: {count} tampered piece{'s' if count > 1 else ''} rejected from intruder"
            )
    for device in fleet.devices:
        _expect_equal(device, target, TAMPERED)
    say("   every device holds what was signed")


def _expect_equal(device: Device, path: Path, name: str) -> None:
    difference = source.first_difference(
        source.describe(path), device.data / "bundles" / name / "current"
    )
    if difference is not None:
        raise EdgeSyncError(f"{device.name} does not hold {name} as published: {difference}")


@contextmanager
def _bars(devices: list[Device]) -> Iterator[Callable[[dict[str, dict[str, Any]]], None]]:
    """Yield what draws one bar a device from their bundle rows."""
    if not sys.stdout.isatty():
        yield lambda _bundles: None
        return
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (
        TextColumn("   {task.description:12}"),
        BarColumn(28),
        TextColumn("{task.percentage:3.0f} %"),
    )
    with Progress(*columns, TextColumn("{task.fields[note]}")) as progress:
        tasks = {
            device.name: progress.add_task(device.name, total=1.0, note="") for device in devices
        }

        def watch(bundles: dict[str, dict[str, Any]]) -> None:
            for name, bundle in bundles.items():
                if name not in tasks:
                    continue
                note = (
                    f"{output.size(bundle['bytes_from_gateway'])} gateway, "
                    f"{output.size(bundle['bytes_from_peers'])} peers"
                )
                done = bundle["pieces_have"] / max(1, bundle["pieces_total"])
                progress.update(tasks[name], completed=done, note=note)

        yield watch
