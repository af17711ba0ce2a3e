"""Which fleet this gateway serves and who it is: one row, written by ``gateway init``."""

from dataclasses import dataclass

from edgesync.errors import ConfigError
from edgesync.ids import FleetId, GatewayId, PeerKey
from gateway.store import GatewayStore

RESERVED_PREFIXES = ("gateway", "bridge")
"""Device ids no machine may join under: they are, or could be taken for, gateways and broker bridges."""


@dataclass(frozen=True)
class Fleet:
    name: str
    fleet_id: FleetId
    region: str
    gateway_id: GatewayId
    gateway_key: PeerKey
    created: float


def load(store: GatewayStore) -> Fleet:
    """Raises ConfigError: the directory was never initialised."""
    row = store.one("SELECT * FROM fleet WHERE id = 1")
    if row is None:
        raise ConfigError(f"{store.datadir.path} holds no fleet: run edgesync gateway init again")
    return Fleet(
        row["name"],
        FleetId(row["fleet_id"]),
        row["region"],
        GatewayId(row["gateway_id"]),
        PeerKey(row["gateway_key"]),
        row["created"],
    )


def save(store: GatewayStore, fleet: Fleet) -> None:
    with store.atomic() as db:
        db.conn.execute(
            "INSERT INTO fleet (id, name, fleet_id, region, gateway_id, gateway_key, created) "
            "VALUES (1, ?, ?, ?, ?, ?, ?)",
            (
                fleet.name,
                fleet.fleet_id,
                fleet.region,
                fleet.gateway_id,
                fleet.gateway_key,
                fleet.created,
            ),
        )
