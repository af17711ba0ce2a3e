"""The main job through real processes, small and seeded; ``make acceptance`` runs the same cases in full."""

import json
import os
import random
import subprocess
from pathlib import Path

import pytest

from edgesync.demo import source
from edgesync.demo.fleet import COMMAND
from edgesync.demo.run import assign, publish, wait_delivered
from tests.acceptance import attacks, cases, inputs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture
def seed() -> int:
    chosen = int(os.environ.get("SEED") or random.SystemRandom().randrange(100_000))
    print(f"SEED={chosen}")
    return chosen


def passes(result: cases.Result) -> None:
    print(result.figures)
    assert not result.misses, result.misses


def test_demo_brings_a_bundle_and_an_update(tmp_path: Path) -> None:
    source.make_default(tmp_path / "v1", max_bytes=3_000_000)
    done = subprocess.run(
        [*COMMAND, "demo", str(tmp_path / "v1"), "--devices", "3", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["schema"] == "edgesync.demo/1"
    assert [row["verified"] for row in (*told["devices"], *told["update"]["devices"])] == [True] * 6
    assert told["gateway_bytes_out"] <= 1.10 * told["wire_bytes"]
    for row in told["devices"]:
        total = row["bytes_from_gateway"] + row["bytes_from_peers"] + row["bytes_import"]
        assert told["wire_bytes"] <= total <= 1.05 * told["wire_bytes"]
    for row in told["update"]["devices"]:
        moved = row["bytes_from_gateway"] + row["bytes_from_peers"]
        assert moved <= 1.1 * told["update"]["new_wire_bytes"]
        assert row["bytes_local"] > 2_000_000


def test_an_agent_killed_on_the_way_finishes(tmp_path: Path, seed: int) -> None:
    tree = inputs.incompressible(tmp_path / "tree", 12_000_000, seed=seed, files=5)
    passes(cases.agent_kills(tmp_path / "work", tree, kills=3, seed=seed, rate=2_000_000))


def test_peers_finish_without_the_gateway(tmp_path: Path, seed: int) -> None:
    tree = inputs.incompressible(tmp_path / "tree", 12_000_000, seed=seed, files=5)
    passes(cases.gateway_loss(tmp_path / "work", tree, runs=1, devices=3, rate=2_000_000))


@pytest.mark.parametrize("mode", ["tamper", "garbage", "not_held", "stall"])
def test_a_hostile_member_costs_nothing_but_time(tmp_path: Path, seed: int, mode: str) -> None:
    tree = inputs.incompressible(tmp_path / "tree", 6_000_000, seed=seed, files=3)
    with cases.running_fleet(tmp_path / "work", 2, upload_limit=3_000_000) as fleet:
        published = publish(fleet, tree, "1")
        with attacks.intruder(fleet, str(published["id"]), mode):
            assign(fleet, "1")
            wait_delivered(fleet, "1")
        for device in fleet.devices:
            assert (
                source.first_difference(source.describe(tree), device.data / "bundles/demo/current")
                is None
            )
            rejected = (device.bundle("demo", "1") or {})["pieces_rejected"]
            assert rejected <= 2 or mode not in {"tamper", "garbage"}


def test_get_needs_no_assignment(tmp_path: Path) -> None:
    source.make_default(tmp_path / "v1", max_bytes=500_000)
    with cases.running_fleet(tmp_path / "work", 1) as fleet:
        publish(fleet, tmp_path / "v1", "1")
        data = str(fleet.devices[0].data)
        fleet.wait(
            "the metadata to arrive",
            lambda: (fleet.devices[0].status() or {})["metadata"]["timestamp"] > 1,
            timeout_s=30,
        )
        fleet.run("get", "demo", "-o", str(tmp_path / "out"), "--data", data)
        assert source.first_difference(source.describe(tmp_path / "v1"), tmp_path / "out") is None
        assert not (fleet.devices[0].data / "bundles/demo/current").exists()
        listed = fleet.ask("bundle", "list", "--data", data)["bundles"]
        assert [(row["name"], row["version"]) for row in listed] == [("demo", "1")]
