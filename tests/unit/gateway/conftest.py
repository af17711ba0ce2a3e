import pytest

from edgesync.ids import FleetId, GatewayId, PeerKey
from edgesync.storage.datadir import DataDir
from gateway import fleet
from gateway.store import GatewayStore


@pytest.fixture
def register(tmp_path):
    """A gateway's database with a fleet in it and nothing else."""
    with GatewayStore.open(DataDir.create(tmp_path / "register", "gateway")) as store:
        fleet.save(
            store,
            fleet.Fleet(
                "acme", FleetId("f" * 64), "eu", GatewayId("gateway-eu"), PeerKey("a" * 64), 0.0
            ),
        )
        yield store


@pytest.fixture
def add_device(register):
    """Put a device into the register as a join would."""

    def add(
        device_id, *, state="accepted", labels="{}", hardware="", address="", key=None, region="eu"
    ):
        with register.atomic() as db:
            db.conn.execute(
                "INSERT INTO devices (id, key, region, labels, hardware, state, joined, address) "
                "VALUES (?, ?, ?, ?, ?, ?, 0, ?)",
                (
                    device_id,
                    key or device_id.encode().hex().ljust(64, "0"),
                    region,
                    labels,
                    hardware,
                    state,
                    address,
                ),
            )

    return add
