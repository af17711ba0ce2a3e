"""A month's bytes: a device that has spent its budget waits and says so, takes what a peer has, and forgets nothing."""

from pathlib import Path

import pytest

from edgesync.demo.run import assign, publish, wait_delivered
from edgesync.errors import EdgeSyncError
from tests.acceptance import cases, inputs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

BUDGET = 900_000


def test_a_device_waits_for_its_budget_and_goes_on_from_a_peer(tmp_path: Path) -> None:
    tree = inputs.incompressible(tmp_path / "tree", 3_000_000, seed=8, files=2)
    with cases.running_fleet(tmp_path / "work", 0) as fleet:
        metered, free = fleet.join("metered"), fleet.join("free")
        with (metered.data / "agent.toml").open("a", encoding="utf-8") as config:
            config.write(f'\nbudget = {BUDGET}\ntime_zone = "Europe/Rome"\n')
        fleet.start_device(metered)
        publish(fleet, tree, "1")
        assign(fleet, "1")

        def reason() -> str:
            status = metered.status()
            rows = status["bundles"] if status else []
            return str(rows[0]["reason"]) if rows else ""

        fleet.wait("the budget to be spent", lambda: "is spent; renews" in reason(), timeout_s=40)
        assert reason().startswith("waiting: the budget of 900 kB for ")

        def spent() -> float:
            status = metered.status()
            return float(status["budget"]["spent"]) if status and status["budget"] else 0.0

        # What the sockets carried is counted now and then.
        fleet.wait("the count to follow", lambda: spent() > 0.7 * BUDGET, timeout_s=20)
        assert spent() < 1.1 * BUDGET
        status = metered.status()
        assert status is not None
        (bundle,) = status["bundles"]
        from_gateway = bundle["bytes_from_gateway"]
        assert 0 < from_gateway <= BUDGET

        def told() -> str:
            shown = fleet.ask("device", "show", "metered", "--data", str(fleet.gateway_data))
            return str(shown["waiting"])

        fleet.wait("the gateway to know why", lambda: "is spent; renews" in told(), timeout_s=40)

        # A kill gives nothing back.
        metered.kill()
        fleet.start_device(metered)
        fleet.wait(
            "the count after a kill",
            lambda: spent() > 0.7 * BUDGET,
            timeout_s=20,
        )
        fleet.wait("the wait after a kill", lambda: "is spent" in reason(), timeout_s=20)

        # A peer of its own network costs nothing.
        fleet.start_device(free)
        wait_delivered(fleet, "1")
        status = metered.status()
        assert status is not None
        (bundle,) = status["bundles"]
        # Under the kill's allowance of one interval.
        assert bundle["bytes_from_gateway"] <= from_gateway + 0.2 * BUDGET
        assert bundle["bytes_from_peers"] > 1_500_000
        assert status["budget"]["spent"] < 1.2 * BUDGET


def test_a_site_waits_for_the_budget_its_gateway_keeps(tmp_path: Path) -> None:
    tree = inputs.incompressible(tmp_path / "tree", 3_000_000, seed=9, files=2)
    with cases.running_fleet(tmp_path / "work", 2) as fleet:
        data = ("--data", str(fleet.gateway_data))
        shown = fleet.ask("device", "show", fleet.devices[0].name, *data)
        site = shown["site"]
        fleet.run("budget", "set", "1MB", "--site", site, "--zone", "Europe/Rome", *data)
        publish(fleet, tree, "1")
        assign(fleet, "1")

        def reasons() -> list[str]:
            found = [device.bundle("demo", "1") for device in fleet.devices]
            return [str(bundle["reason"]) for bundle in found if bundle]

        fleet.wait(
            "a device to wait",
            lambda: any(f"the budget of site {site}, 1 MB for " in one for one in reasons()),
            timeout_s=40,
        )
        (listed,) = fleet.ask("budget", "list", *data)["budgets"]
        assert listed["limit"] == 1_000_000
        fleet.wait(
            "the count to be kept",
            lambda: fleet.ask("budget", "list", *data)["budgets"][0]["spent"] > 900_000,
            timeout_s=10,
        )
        (kept,) = fleet.gateway_status()["budgets"]
        # What waits for a socket when the budget ends still goes.
        assert kept["spent"] < 1_700_000
        assert fleet.gateway_bytes_out() < 1_700_000
        assert all(cases._share(device) < 1.0 for device in fleet.devices)

        # Raised while everything runs: it goes on, and the site shares what it has.
        fleet.run("budget", "set", "20MB", "--site", site, *data)
        wait_delivered(fleet, "1")
        fleet.run("budget", "clear", "--site", site, *data)
        assert fleet.ask("budget", "list", *data)["budgets"] == []
        kinds = [line for line in fleet.run("events", *data).splitlines() if '"budget.' in line]
        assert len(kinds) == 3
        with pytest.raises(EdgeSyncError, match="no budget is set for site"):
            fleet.run("budget", "clear", "--site", site, *data)
        with pytest.raises(EdgeSyncError, match="is no budget: write bytes for each month"):
            fleet.run("budget", "set", "2GB/day", "--site", site, *data)
