"""Caps that an operator sets while a gateway and an agent transfer: over MQTT, without a restart."""

from pathlib import Path
from typing import Any

import pytest

from edgesync.demo.run import assign, publish, wait_delivered
from edgesync.errors import EdgeSyncError
from tests.acceptance import cases, inputs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def test_caps_are_obeyed_and_shown_while_a_transfer_runs(tmp_path: Path) -> None:
    tree = inputs.incompressible(tmp_path / "tree", 6_000_000, seed=4, files=2)
    with cases.running_fleet(tmp_path / "work", 1, upload_limit=1_500_000) as fleet:
        data = ("--data", str(fleet.gateway_data))
        device = fleet.devices[0]
        publish(fleet, tree, "1")
        assign(fleet, "1")
        fleet.wait("the transfer to begin", lambda: cases._share(device) > 0.05, timeout_s=30)

        def caps() -> list[dict[str, Any]]:
            status: dict[str, Any] = device.status() or {"caps": []}
            return list(status["caps"])

        fleet.run(
            *("caps", "set", "--device", device.name, "--download", "00:00-24:00 40kB/s"),
            *("--zone", "Europe/Rome", *data),
        )
        fleet.wait("the cap on the device", lambda: bool(caps()), timeout_s=10)
        (cap,) = caps()
        assert (cap["what"], cap["rate"], cap["origin"]) == (
            "download",
            40_000,
            f"device {device.name}",
        )
        (listed,) = fleet.ask("caps", "list", *data)["caps"]
        assert listed["download_now"] == 40_000
        # It is announced whole: a second one comes with the first.
        fleet.run("caps", "set", "--gateway", "--upload", "50kB/s", *data)
        fleet.wait(
            "the cap on the gateway",
            lambda: any(cap["rate"] == 50_000 for cap in fleet.gateway_status()["caps"]),
            timeout_s=10,
        )
        assert len(caps()) == 1
        assert cases._share(device) < 1.0
        device.kill()
        fleet.start_device(device)
        fleet.wait("the cap after a restart", lambda: bool(caps()), timeout_s=20)
        fleet.run("caps", "clear", "--device", device.name, *data)
        fleet.run("caps", "clear", "--gateway", *data)
        fleet.wait("no cap", lambda: not caps(), timeout_s=10)
        wait_delivered(fleet, "1")
        kinds = [line for line in fleet.run("events", *data).splitlines() if '"caps.' in line]
        assert len(kinds) == 4


def test_a_bad_cap_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with cases.running_fleet(tmp_path / "work", 0) as fleet:
        data = ("--data", str(fleet.gateway_data))
        for arguments, said in (
            (("--site", "a", "--upload", "1kB"), "below the floor"),
            (("--site", "a", "--upload", "1MB", "--zone", "Mars"), "no time zone"),
            (("--site", "a", "--upload", "1MB", "--between", "8-18"), "does not begin with times"),
            (("--site", "a"), "say what to cap"),
            (("--upload", "1MB"), "say whose cap"),
            (("--device", "nobody", "--upload", "1MB"), "no device"),
        ):
            with pytest.raises(EdgeSyncError, match=said):
                fleet.run("caps", "set", *arguments, *data)
        with pytest.raises(EdgeSyncError, match="no cap is set"):
            fleet.run("caps", "clear", "--site", "a", *data)
