"""The register of devices as the daemon holds it in memory: who may connect, where each is, what each may read.

Read from the database whole, after every change; handlers on the event loop ask it and never the database. It is
immutable: a reload makes a new one, so whoever holds one sees one moment.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from edgesync import identity as identities
from edgesync.errors import NotAuthorizedError
from edgesync.ids import DeviceId, Digest, GatewayId, PeerIdentity, PeerKey
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
    local_addresses: tuple[str, ...]
    online: bool


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


def load(store: GatewayStore) -> Register:
    devices = []
    for row in store.rows("SELECT * FROM devices ORDER BY id"):
        local = tuple(json.loads(row["local_addresses"]))
        site, _why = site_of(json.loads(row["labels"]), row["address"], local)
        devices.append(
            Device(
                DeviceId(row["id"]),
                PeerKey(row["key"]),
                row["state"],
                site,
                labels_of(row),
                local,
                bool(row["online"]),
            )
        )
    keys = {device.id: device.key for device in devices}
    assigned: dict[PeerKey, set[Digest]] = {}
    for row in store.rows("SELECT device_id, target_hash FROM assignments"):
        assigned.setdefault(keys[row["device_id"]], set()).add(Digest(row["target_hash"]))
    return Register(
        MappingProxyType({device.key: device for device in devices}),
        MappingProxyType({device.id: device for device in devices}),
        MappingProxyType({key: frozenset(digests) for key, digests in assigned.items()}),
    )


class Judge:
    """Who a certificate is to this gateway: itself by its key, else an accepted device of its own region."""

    def __init__(self, *, gateway_id: GatewayId, gateway_key: PeerKey, authority: bytes) -> None:
        """``authority`` is the region's certificate, DER."""
        self._self = PeerIdentity("gateway", gateway_id, gateway_key)
        self._authority = authority
        self.register = Register()

    def __call__(self, der: bytes) -> PeerIdentity:
        """Raises NotAuthorizedError: a stranger, a device of another region, or one that is not accepted."""
        key = identities.certificate_key(der)
        if key == self._self.key:
            return self._self
        identities.check_issued(der, self._authority)
        device = self.register.by_key.get(key)
        if device is None or device.state != "accepted":
            raise NotAuthorizedError("this key is not that of an accepted device")
        if identities.certificate_id(der) != device.id:
            raise NotAuthorizedError(f"the certificate of {device.id} carries another name")
        return PeerIdentity("device", device.id, key)
