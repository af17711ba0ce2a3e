"""Orders that cross each other on a device: get and assign, assign and unassign, repair while nothing is ordered."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from edgesync.demo import source
from edgesync.demo.fleet import COMMAND, Fleet
from edgesync.demo.run import assign, publish, wait_delivered
from edgesync.errors import EdgeSyncError
from tests.acceptance import cases, inputs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def known(fleet: Fleet) -> None:
    """Wait until the device has the metadata of what was published last."""
    want = next(
        row["version"] for row in fleet.gateway_status()["metadata"] if row["role"] == "timestamp"
    )

    def has() -> bool:
        status: dict[str, Any] = fleet.devices[0].status() or {"metadata": {"timestamp": 0}}
        return bool(status["metadata"]["timestamp"] >= want)

    fleet.wait("the metadata", has, timeout_s=30)


def test_an_assignment_takes_over_what_a_get_is_fetching(tmp_path: Path) -> None:
    tree = inputs.incompressible(tmp_path / "tree", 6_000_000, seed=1, files=3)
    with cases.running_fleet(tmp_path / "work", 1, upload_limit=1_500_000) as fleet:
        device = fleet.devices[0]
        publish(fleet, tree, "1")
        known(fleet)
        command = [*COMMAND, "get", "demo@1", "--data", str(device.data)]
        gets = [
            subprocess.Popen([*command, "-o", str(tmp_path / name)], stderr=subprocess.PIPE)
            for name in ("a", "b")
        ]
        fleet.wait("the get to begin", lambda: device.bundle("demo", "1") is not None, timeout_s=30)
        assign(fleet, "1")
        wait_delivered(fleet, "1")
        want = source.describe(tree)
        for get in gets:
            _out, errors = get.communicate(timeout=60)
            assert (get.returncode, errors) == (0, b"")
        for place in (tmp_path / "a", tmp_path / "b", device.data / "bundles/demo/current"):
            assert source.first_difference(want, place) is None


def test_unassigned_and_assigned_again_at_once(tmp_path: Path) -> None:
    tree = inputs.incompressible(tmp_path / "tree", 4_000_000, seed=2, files=3)
    with cases.running_fleet(tmp_path / "work", 1, upload_limit=1_000_000) as fleet:
        publish(fleet, tree, "1")
        assign(fleet, "1")
        device = fleet.devices[0]
        fleet.wait("the transfer to begin", lambda: cases._share(device) > 0.05, timeout_s=30)
        for _ in range(3):
            fleet.run("unassign", "demo", "--all", "--data", str(fleet.gateway_data))
            assign(fleet, "1")
        fleet.wait(
            "the bundle",
            lambda: (device.bundle("demo", "1") or {}).get("state") == "succeeded",
            timeout_s=60,
        )
        assert (
            source.first_difference(source.describe(tree), device.data / "bundles/demo/current")
            is None
        )


def test_a_running_agent_repairs_what_was_changed(tmp_path: Path) -> None:
    tree = inputs.incompressible(tmp_path / "tree", 1_000_000, seed=3, files=4)
    with cases.running_fleet(tmp_path / "work", 1) as fleet:
        publish(fleet, tree, "1")
        assign(fleet, "1")
        wait_delivered(fleet, "1")
        device = fleet.devices[0]
        current = device.data / "bundles/demo/current"
        changed = sorted(current.iterdir())
        changed[0].write_bytes(b"edited")
        changed[1].unlink()
        with pytest.raises(EdgeSyncError):
            fleet.run("bundle", "verify", "demo@1", "--data", str(device.data))
        want = source.describe(tree)
        fleet.wait(
            "the repair", lambda: source.first_difference(want, current) is None, timeout_s=60
        )
        fleet.wait("a clean verify", lambda: _verifies(fleet, str(device.data)), timeout_s=60)


def _verifies(fleet: Fleet, data: str) -> bool:
    try:
        fleet.run("bundle", "verify", "demo@1", "--data", data)
    except EdgeSyncError:
        return False
    return True
