"""One moment of the database, as the event loop asks about it: who is a member, what is signed, what is announced.

It is read in the writer thread after every change and never changes itself. Large parts that did not change (manifests,
assignment sets, verified metadata) are kept from the moment before.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from edgesync import limits
from edgesync.ids import DeviceId, Digest, PeerKey
from edgesync.trust import Trusted
from edgesync.wire import topics
from gateway import catalogue, fleet, register
from gateway.announcer import Announcement
from gateway.register import Register
from gateway.repository import Repository
from gateway.service import budgets, caps, setup
from gateway.service.budgets import SiteBudget
from gateway.service.caps import CapsNow
from gateway.store import GatewayStore


@dataclass(frozen=True)
class Moment:
    """Everything the event loop asks about, read from the database in one go."""

    register: Register
    trusted: Trusted
    files: Mapping[str, bytes]
    """The newest metadata, by name on the wire."""
    announcement: Announcement
    caps: CapsNow = field(default_factory=CapsNow)
    budgets: tuple[SiteBudget, ...] = ()

    def members(self) -> set[PeerKey]:
        return {key for key, device in self.register.by_key.items() if device.state == "accepted"}


class MomentReader:
    """Reads a Moment in the writer thread; keeps what is large and did not change."""

    def __init__(self) -> None:
        self._sets: dict[DeviceId, tuple[int, bytes]] = {}
        self._register: Register | None = None
        self._repository: Repository | None = None
        self._manifests: dict[Digest, bytes] = {}

    def repository(self, store: GatewayStore) -> Repository:
        """One for the daemon's life: it verifies the metadata again only when there is newer."""
        if self._repository is None:
            self._repository = setup.repository(store)
        return self._repository

    def read(self, store: GatewayStore) -> Moment:
        repository = self.repository(store)
        trusted = repository.trusted()
        files = repository.current_files()
        here = fleet.load(store)
        now = self._register = register.load(store, self._register)
        self._read_sets(store)
        active = {digest for digests in now.assigned.values() for digest in digests}
        self._manifests = {
            digest: self._manifests.get(digest) or catalogue.load_manifest(store, digest)
            for digest in active
        }
        caps_now = caps.load(store)
        return Moment(
            now,
            trusted,
            files,
            Announcement(
                root_version=trusted.root_version,
                timestamp_version=trusted.timestamp_version,
                metadata=_metadata_topics(here, files),
                manifests=self._manifests,
                sets={device: envelope for device, (_sequence, envelope) in self._sets.items()},
                active=_working(store),
                caps=caps_now,
            ),
            caps_now,
            budgets.load(store),
        )

    def _read_sets(self, store: GatewayStore) -> None:
        sequences = {
            DeviceId(row["device_id"]): row["sequence"]
            for row in store.rows(
                "SELECT s.device_id, s.sequence FROM assignment_sets s JOIN devices d ON d.id = s.device_id "
                "WHERE d.state = 'accepted'"
            )
        }
        for device in self._sets.keys() - sequences.keys():
            del self._sets[device]
        for device, sequence in sequences.items():
            if device not in self._sets or self._sets[device][0] != sequence:
                row = store.one(
                    "SELECT sequence, envelope FROM assignment_sets WHERE device_id = ?", (device,)
                )
                assert row is not None
                self._sets[device] = (row["sequence"], row["envelope"])


def _metadata_topics(here: fleet.Fleet, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Files small enough for the broker; larger ones are fetched by digest over QUIC."""
    found: dict[str, bytes] = {}
    for name, data in files.items():
        kind, _, rest = name.partition("/")
        if kind == "timestamp":
            found[topics.tuf_timestamp(here.gateway_id)] = data
        elif kind == "root":
            found[topics.tuf_root(here.gateway_id, int(rest))] = data
        elif len(data) <= limits.SOFT_MQTT_PAYLOAD_BYTES:
            found[topics.tuf_file(here.gateway_id, Digest(rest))] = data
    return found


def _working(store: GatewayStore) -> int:
    row = store.one(
        "SELECT COUNT(DISTINCT device_id) AS n FROM executions WHERE status = 'in_progress'"
    )
    return 0 if row is None else int(row["n"])
