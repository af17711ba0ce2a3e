"""What hostile input may cost the real daemons: memory, a running transfer's time, dials."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgesync.demo.fleet import Device, Fleet, free_port
from edgesync.demo.run import assign, publish, wait_delivered
from edgesync.testing.hostile_quic import resident_bytes
from tests.acceptance import inputs
from tests.acceptance.cases import Result, running_fleet

GROWTH_MB = 10.0
SLOWDOWN = 1.05


def memory(work: Path) -> Result:
    """Every QUIC attack, as a stranger and as a member, on a running gateway and a running agent."""
    result = Result("memory attacks")
    with running_fleet(work, 0) as fleet:
        victim = fleet.join("victim")
        port = free_port(socket.SOCK_DGRAM)
        fleet.start_device(victim, port=port)
        fleet.wait_connected()
        member = fleet.work / "attacker"
        _join_only(fleet, member)
        assert victim.process is not None
        targets = {
            "gateway": (fleet.gateway_quic_port, fleet.gateway_pid),
            "agent": (port, victim.process.pid),
        }
        for name, (target_port, pid) in targets.items():
            for outcome in _attack(target_port, pid, member):
                growth = outcome["rss_growth_bytes"] / 1e6
                result.bar(f"{name}: {outcome['attack']} RSS growth MB", growth, GROWTH_MB)
        result.require("the agent still answers", victim.status() is not None)
        result.require("the gateway still answers", "bytes_out" in fleet.gateway_status())
    return result


def _join_only(fleet: Fleet, data: Path) -> None:
    arguments = ("agent", "join", "--token-file", "-", "--id", "attacker", "--data", str(data))
    fleet.run(*arguments, stdin=fleet.token())


def _attack(port: int, pid: int, member: Path) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "edgesync.testing.hostile_quic", "127.0.0.1", str(port)]
        + [
            "--identity",
            str(member / "identity.key"),
            str(member / "identity.crt"),
            "--pid",
            str(pid),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@contextmanager
def intruder(fleet: Fleet, digest: str, mode: str) -> Iterator[None]:
    """A member that joined like any other and lies about one bundle."""
    data = fleet.work / "intruder"
    arguments = ("agent", "join", "--token-file", "-", "--id", "intruder", "--data", str(data))
    fleet.run(*arguments, stdin=fleet.token())
    with fleet.log_file("intruder").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "edgesync.testing.hostile_member", "--data", str(data)]
            + ["--bundle", digest, "--mode", mode, "--interface", "127.0.0.1"],
            stdout=subprocess.PIPE,
            stderr=log,
        )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield
    finally:
        process.kill()
        process.wait()


def mdns_flood(
    work: Path, cache: Path, *, records: int = 10_000, seconds: float = 60.0, pairs: int = 3
) -> Result:
    """Hostile mDNS records during a transfer, against the same transfer without them, in turns."""
    result = Result("mDNS flood")
    os.environ["EDGESYNC_LOG"] = "DEBUG"  # dials are counted in the log
    result.figures |= {"records": records, "within s": seconds}
    times: dict[str, list[float]] = {"quiet": [], "flooded": []}
    growths: list[float] = []
    rates: list[float] = []
    size = 48_000_000
    for pair in range(pairs):
        for kind in ("quiet", "flooded"):
            tree = inputs.incompressible(cache / f"random-mdns-{pair}", size, seed=pair)
            with running_fleet(work, 2, upload_limit=2_000_000) as fleet:
                publish(fleet, tree, "1")
                before = [_rss(device) for device in fleet.devices]
                flood = _flood(records, seconds, fleet) if kind == "flooded" else None
                started = time.monotonic()
                assign(fleet, "1")
                wait_delivered(fleet, "1")
                times[kind].append(time.monotonic() - started)
                if flood is not None:
                    flood.wait()
                    growths += [_rss(d) - b for d, b in zip(fleet.devices, before, strict=True)]
                    rates += [_dial_rate(fleet, device, seconds) for device in fleet.devices]
                else:
                    quiet = [_rss(d) - b for d, b in zip(fleet.devices, before, strict=True)]
                    result.figures.setdefault("growth by the transfer alone MB", []).append(
                        max(quiet) / 1e6
                    )
            shutil.rmtree(work, ignore_errors=True)
    alone = result.figures["growth by the transfer alone MB"]
    result.figures |= {"quiet s": times["quiet"], "flooded s": times["flooded"]}
    result.bar(
        "flooded / quiet, median", _median(times["flooded"]) / _median(times["quiet"]), SLOWDOWN
    )
    result.bar("RSS growth over the transfer's own MB", max(growths) / 1e6 - max(alone), GROWTH_MB)
    result.bar("dials per second", max(rates), 1.0)
    return result


def _flood(records: int, seconds: float, fleet: Fleet) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "edgesync.testing.mdns_flood", "--interface", "127.0.0.1"]
        + ["--records", str(records), "--seconds", str(seconds)],
        stdout=subprocess.DEVNULL,
        stderr=fleet.log_file("flood").open("ab"),
    )


def _rss(device: Device) -> int:
    assert device.process is not None
    return resident_bytes(device.process.pid)


def _dial_rate(fleet: Fleet, device: Device, seconds: float) -> float:
    """Dials the agent logged while it was flooded, per second."""
    log = fleet.log_file(device.name).read_text(errors="replace")
    dials = len(re.findall(r"mDNS candidate .*: (?!unwanted)", log))
    assert dials, "the agent logged no dial at all: is it logging at DEBUG?"
    return dials / seconds


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
