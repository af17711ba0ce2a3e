"""The verified metadata a machine keeps: a value, to be stored by whoever has a disk."""

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

from tuf.api.exceptions import RepositoryError

from edgesync import manifest
from edgesync.errors import EdgeSyncError
from edgesync.ids import FleetId
from edgesync.trust.files import datetime_of
from edgesync.trust.tuf_checks import EnvelopeType, TrustedMetadataSet
from edgesync.trust.view import Trusted, build_view, load_targets


@dataclass(frozen=True)
class TrustState:
    """Verified metadata as bytes: all roots from version 1, and a whole set below the last of them, or none."""

    roots: tuple[bytes, ...]
    timestamp: bytes | None = None
    snapshot: bytes | None = None
    targets: bytes | None = None
    delegated: tuple[tuple[str, bytes], ...] = ()
    regions: bytes | None = None
    """Document ``trust/regions`` of the last accepted set; outlives the set when a root takes that away."""
    accepted_at: float = 0.0
    """Trusted time at which the set was accepted, Unix seconds."""
    floor: float | None = None
    """Largest ``x-issued-at`` accepted under the present timestamp keys, Unix seconds."""

    @property
    def root_version(self) -> int:
        return len(self.roots)

    @property
    def fleet_id(self) -> FleetId:
        return FleetId(hashlib.sha256(self.roots[0]).hexdigest())

    @cached_property
    def view(self) -> "Trusted":
        """What this state says; built once, and costs a verification of every file."""
        return _read_back(self)

    @cached_property
    def _blobs(self) -> dict[str, bytes]:
        below = [self.snapshot, self.targets, self.regions, *(data for _, data in self.delegated)]
        return {manifest.digest(data): data for data in below if data is not None}

    def file(self, name: str) -> bytes | None:
        """A metadata file as a member may ask for it: ``timestamp``, ``root/N`` or ``sha256/HEX``."""
        if name == "timestamp":
            return self.timestamp
        kind, _, rest = name.partition("/")
        if kind == "root" and rest.isdecimal() and 0 < len(rest) < 10 and rest.isascii():
            number = int(rest)
            return self.roots[number - 1] if 1 <= number <= len(self.roots) else None
        return self._blobs.get(rest) if kind == "sha256" else None


def _read_back(state: TrustState) -> Trusted:
    """Read a stored state as of the time it was accepted, without what no longer holds under a newer root."""
    trusted = TrustedMetadataSet(state.roots[-1], EnvelopeType.METADATA)
    trusted.reference_time = datetime_of(state.accepted_at)
    expired: list[str] = []
    files = dict(state.delegated)
    if state.timestamp is not None and state.snapshot is not None and state.targets is not None:
        with suppress(RepositoryError, EdgeSyncError):
            trusted.update_timestamp(state.timestamp)
            trusted.update_snapshot(state.snapshot, trusted=True)
            expired = load_targets(trusted, {**files, "targets": state.targets}, partial=False)
    return build_view(state.fleet_id, state.root_version, state.regions, trusted, expired)
