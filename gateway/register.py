"""The register of devices as the daemon holds it in memory: who may connect, where each is, what each may read.

Read from the database whole, after every change; handlers on the event loop ask it and never the database. It is
immutable: a reload makes a new one, so whoever holds one sees one moment.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from edgesync.errors import NotAuthorizedError
from edgesync.ids import DeviceId, Digest, PeerIdentity, PeerKey
from edgesync.trust import Trusted
from gateway.service.devices import labels_of
from gateway.site import site_of
from gateway.store import GatewayStore


@dataclass(frozen=True)
class Device:
    id: DeviceId
    key: PeerKey
    state: str
    site: str
    labels: Mapping[str, str]
    address: str
    """Where the gateway saw it last, ``HOST`` or ``HOST:PORT``."""
    local_addresses: tuple[str, ...]
    online: bool
    row: tuple[Any, ...] = field(default=(), repr=False)
    """What it was read from."""


@dataclass(frozen=True)
class Register:
    by_key: Mapping[PeerKey, Device] = field(default_factory=dict)
    by_id: Mapping[DeviceId, Device] = field(default_factory=dict)
    assigned: Mapping[PeerKey, frozenset[Digest]] = field(default_factory=dict)

    def is_assigned(self, key: PeerKey, digest: Digest) -> bool:
        return digest in self.assigned.get(key, ())

    def at_site(self, site: str) -> list[Device]:
        """Accepted devices of one site that are online, by id."""
        return [
            d for d in self.by_id.values() if d.site == site and d.online and d.state == "accepted"
        ]


def load(store: GatewayStore, before: Register | None = None) -> Register:
    """Read the register; devices whose rows did not change are taken from ``before``."""
    devices = []
    known = before.by_id if before is not None else {}
    for row in store.rows(
        "SELECT id, key, region, labels, hardware, state, address, local_addresses, online FROM devices ORDER BY id"
    ):
        facts = tuple(row.values())
        old = known.get(row["id"])
        devices.append(old if old is not None and old.row == facts else _device(row, facts))
    keys = {device.id: device.key for device in devices}
    assigned: dict[PeerKey, set[Digest]] = {}
    for row in store.rows("SELECT device_id, target_hash FROM assignments"):
        assigned.setdefault(keys[row["device_id"]], set()).add(Digest(row["target_hash"]))
    return Register(
        MappingProxyType({device.key: device for device in devices}),
        MappingProxyType({device.id: device for device in devices}),
        MappingProxyType({key: frozenset(digests) for key, digests in assigned.items()}),
    )


def _device(row: dict[str, Any], facts: tuple[Any, ...]) -> Device:
    local = tuple(json.loads(row["local_addresses"]))
    site, _why = site_of(json.loads(row["labels"]), row["address"], local)
    return Device(
        DeviceId(row["id"]),
        PeerKey(row["key"]),
        row["state"],
        site,
        labels_of(row),
        row["address"],
        local,
        bool(row["online"]),
        facts,
    )


class Judge:
    """Who a certificate is to this gateway: a gateway of ``trust/regions``, or an accepted device of its region."""

    def __init__(self, *, region: str) -> None:
        self._region = region
        self.trusted: Trusted | None = None
        self.register = Register()

    def __call__(self, der: bytes) -> PeerIdentity:
        """Raises NotAuthorizedError: a stranger, a device of another region, or one that is not accepted."""
        if self.trusted is None:
            raise NotAuthorizedError("this gateway has read no metadata yet")
        peer = self.trusted.judge_certificate(der, region=self._region)
        if peer.role == "gateway":
            return peer
        device = self.register.by_key.get(peer.key)
        if device is None or device.state != "accepted":
            raise NotAuthorizedError("this key is not that of an accepted device")
        if peer.id != device.id:
            raise NotAuthorizedError(f"the certificate of {device.id} carries another name")
        return peer
