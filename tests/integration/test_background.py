"""A device at a busy site: what its gateway sends to it leaves room to others, and both sides show it."""

from pathlib import Path

import pytest

from edgesync.demo.run import assign, publish, wait_delivered
from tests.acceptance import cases, inputs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def test_the_gateway_yields_to_a_device_that_asks(tmp_path: Path) -> None:
    tree = inputs.incompressible(tmp_path / "tree", 3_000_000, seed=6, files=2)
    with cases.running_fleet(tmp_path / "work", 0, upload_limit=400_000) as fleet:
        polite, plain = fleet.join("polite"), fleet.join("plain")
        with (polite.data / "agent.toml").open("a", encoding="utf-8") as config:
            config.write("\nbackground = true\n")
        for device in (polite, plain):
            fleet.start_device(device)
        fleet.wait_connected()
        publish(fleet, tree, "1")
        assign(fleet, "1")

        def controllers() -> dict[str, int]:
            quic = fleet.gateway_status()["quic"]
            return dict(quic["controllers"]) if quic else {}

        fleet.wait(
            "both to be sent to",
            lambda: (
                sum(controllers().values()) == 2
                and all(0.05 < cases._share(device) < 1.0 for device in (polite, plain))
            ),
            timeout_s=40,
        )
        assert controllers()["background"] == 1
        status = polite.status()
        assert status is not None
        assert status["background"]
        # What it sends there yields as well; the other device is on its own network and is not held back.
        sent_by = {peer["role"]: peer["controller"] for peer in status["peers"]}
        assert sent_by.pop("gateway") == "background"
        assert "background" not in sent_by.values()
        wait_delivered(fleet, "1")
