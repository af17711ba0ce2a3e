"""The acceptance cases: each runs real processes, returns its figures and says which bars they miss.

The same functions serve the full run and the short seeded form in the test suite; only sizes and counts differ.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgesync.demo import source
from edgesync.demo.fleet import COMMAND, Device, Fleet
from edgesync.demo.run import assign, publish, received, wait_delivered

MIB = 1 << 20


@dataclass
class Result:
    name: str
    figures: dict[str, Any] = field(default_factory=dict)
    misses: list[str] = field(default_factory=list)

    def bar(self, what: str, value: float, limit: float) -> None:
        """Record a figure and a miss if it is above its bar."""
        self.figures[what] = round(value, 4)
        if value > limit:
            self.misses.append(f"{what} is {value:.4g}, the bar is {limit:g}")

    def require(self, what: str, holds: bool) -> None:
        self.figures[what] = holds
        if not holds:
            self.misses.append(f"not so: {what}")


@contextmanager
def running_fleet(work: Path, devices: int, **gateway: Any) -> Iterator[Fleet]:
    """A gateway and connected devices in a fresh folder."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    with Fleet(work) as fleet:
        fleet.init_gateway()
        fleet.start_gateway(**gateway)
        for number in range(1, devices + 1):
            fleet.start_device(fleet.join(f"device-{number}"))
        fleet.wait_connected()
        yield fleet


def swarm_and_update(work: Path, first: Path, second: Path, *, devices: int = 5) -> Result:
    """One bundle, then an update, to a swarm, through `edgesync demo --json`; rsync of the same tree beside it."""
    result = Result("swarm and update")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    arguments = ["demo", str(first), "--update", str(second), "--devices", str(devices), "--json"]
    done = subprocess.run(
        [*COMMAND, *arguments, "--keep", str(work / "demo")],
        capture_output=True,
        text=True,
        check=False,
    )
    result.require("demo ended with 0", done.returncode == 0)
    if done.returncode != 0:
        result.misses.append(done.stderr.strip()[-500:])
        return result
    told = json.loads(done.stdout)
    payload, wire = told["payload_bytes"], told["wire_bytes"]
    rows, update = told["devices"], told["update"]
    result.figures |= {"payload MB": payload / 1e6, "wire MB": wire / 1e6}
    result.require("every device verified", all(r["verified"] for r in (*rows, *update["devices"])))
    result.bar("gateway bytes out / wire bytes", told["gateway_bytes_out"] / wire, 1.10)
    result.bar(
        "highest agent RSS MB",
        max(r["rss_peak_bytes"] for r in (*rows, *update["devices"])) / 1e6,
        80,
    )
    wall = max(row["seconds"] for row in rows)
    result.figures |= {"wall s": wall, "aggregate MB/s": round(payload * devices / wall / 1e6, 1)}
    new = update["new_wire_bytes"]
    result.figures["update new wire MB"] = new / 1e6
    moved = [
        r["bytes_from_gateway"] + r["bytes_from_peers"] + r["bytes_import"]
        for r in update["devices"]
    ]
    result.bar("update bytes moved / new wire bytes, worst device", max(moved) / new, 1.1)
    unique = [r["bytes_local"] for r in update["devices"]]
    result.figures["update local MB, least"] = min(unique) / 1e6
    allowed = source.disk_bytes(first) + _changed_bytes(first, second) + 64 * MIB
    result.bar("disk / allowed", max(r["disk_bytes"] for r in update["devices"]) / allowed, 1.0)
    result.figures |= _rsync(work, first, devices, payload)
    return result


def _changed_bytes(first: Path, second: Path) -> int:
    """Disk bytes of files of ``second`` that ``first`` does not have as they are."""
    total = 0
    for path in second.rglob("*"):
        if path.is_file() and not path.is_symlink():
            old = first / path.relative_to(second)
            if not old.is_file() or old.read_bytes() != path.read_bytes():
                total += path.stat().st_blocks * 512
    return total


def _rsync(work: Path, tree: Path, copies: int, payload: int) -> dict[str, Any]:
    rsync = shutil.which("rsync")
    if rsync is None:
        return {"rsync": "not installed"}
    started = time.monotonic()
    processes = [
        subprocess.Popen([rsync, "-a", f"{tree}/", str(work / "rsync" / str(n))])
        for n in range(copies)
        if not (work / "rsync").mkdir(exist_ok=True)
    ]
    for process in processes:
        process.wait()
    os.sync()
    wall = time.monotonic() - started
    shutil.rmtree(work / "rsync")
    return {
        "rsync wall s": round(wall, 2),
        "rsync aggregate MB/s": round(payload * copies / wall / 1e6, 1),
    }


def agent_kills(work: Path, tree: Path, *, kills: int, seed: int, rate: int) -> Result:
    """SIGKILL one agent at random moments of a transfer; it must finish and fetch almost nothing twice."""
    result = Result(f"{kills} agent kills")
    result.figures["seed"] = seed
    rng = random.Random(seed)
    with running_fleet(work, 1, upload_limit=rate) as fleet:
        device = fleet.devices[0]
        published = publish(fleet, tree, "1")
        payload = published["payload_bytes"]
        assign(fleet, "1")
        marks = sorted(rng.uniform(0.02, 0.98) for _ in range(kills))
        for mark in marks:
            fleet.wait(
                f"{mark:.0%} to have arrived",
                lambda mark=mark: _share(device) >= mark,
                timeout_s=600,
            )
            device.kill()
            fleet.start_device(device)
        wait_delivered(fleet, "1")
        bundle = device.bundle("demo", "1") or {}
        difference = source.first_difference(
            source.describe(tree), device.data / "bundles/demo/current"
        )
        result.require("tree equal", difference is None and bundle["state"] == "succeeded")
        result.figures |= {"payload MB": payload / 1e6, "resumes": bundle["resumes"]}
        result.bar("received / payload", received(bundle) / payload, 1.02)
    return result


def _share(device: Device) -> float:
    bundle = device.bundle("demo", "1")
    return 0.0 if bundle is None else bundle["pieces_have"] / max(1, bundle["pieces_total"])


def gateway_loss(work: Path, tree: Path, *, runs: int, devices: int, rate: int) -> Result:
    """SIGKILL the gateway once every piece has two durable copies; every device must finish from its peers.

    Peers are quick, so that mostly all are done by then: one device is killed on its way and started again only after
    the gateway is gone, with most of the bundle still to come.
    """
    result = Result(f"gateway lost, {runs} runs")
    finished = 0
    unfinished_at_kill = 0
    for run in range(runs):
        with running_fleet(work / f"run-{run}", devices, upload_limit=rate) as fleet:
            publish(fleet, tree, "1")
            assign(fleet, "1")

            def replicated(fleet: Fleet = fleet) -> bool:
                replication = fleet.gateway_status()["min_site_replication"]
                return replication is not None and replication >= 2

            late = fleet.devices[-1]
            fleet.wait(
                "a quarter to have arrived", lambda late=late: _share(late) >= 0.25, timeout_s=300
            )
            late.kill()
            fleet.wait("two copies of every piece", replicated, timeout_s=300)
            unfinished_at_kill += sum(
                (d.bundle("demo", "1") or {}).get("state") != "succeeded" for d in fleet.devices
            )
            os.kill(fleet.gateway_pid, signal.SIGKILL)
            fleet.kill_gateway()
            fleet.start_device(late)
            wait_delivered(fleet, "1")
            want = source.describe(tree)
            finished += all(
                source.first_difference(want, d.data / "bundles/demo/current") is None
                for d in fleet.devices
            )
        shutil.rmtree(work / f"run-{run}", ignore_errors=True)
    result.figures |= {
        "runs": runs,
        "all devices finished": finished,
        "unfinished at kill": unfinished_at_kill,
    }
    result.require("every device finished in every run", finished == runs)
    result.require("some device was unfinished when the gateway died", unfinished_at_kill > 0)
    return result


def power_cuts(*, cuts: int, seed: int) -> Result:
    """The recorded power cuts of ``tests.crash``, both models, all write paths."""
    result = Result(f"{cuts} power cuts a write path")
    done = subprocess.run(
        [sys.executable, "-m", "tests.crash", "--cuts", str(cuts), "--seed", str(seed)]
        + ["--model", "ordered", "--model", "harsh"],
        capture_output=True,
        text=True,
        check=False,
    )
    result.figures["summary"] = done.stdout.strip().splitlines()[-12:]
    result.require("no violation", done.returncode == 0)
    if done.returncode:
        result.misses.append(done.stderr.strip()[-1000:])
    return result
