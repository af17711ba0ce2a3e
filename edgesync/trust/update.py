"""Taking in metadata: what is missing, what is refused, and the state that follows.

The order of checks is python-tuf's TrustedMetadataSet; what it leaves to its own client (caps, storage, fast-forward
recovery, reading again after expiry) is done here.
"""

import datetime as dt
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

from tuf.api.exceptions import (
    BadVersionNumberError,
    EqualVersionNumberError,
    ExpiredMetadataError,
    UnsignedMetadataError,
)
from tuf.api.metadata import MetaFile, Root, Snapshot, TargetFile, Timestamp

from edgesync import limits, manifest
from edgesync.errors import VerificationError
from edgesync.ids import Digest
from edgesync.trust.files import (
    MAX_TIME,
    MetadataUpdate,
    Want,
    cap,
    check_exact,
    datetime_of,
    digest_of,
    issued_at,
    mapped,
    newest_root,
)
from edgesync.trust.regions import REGIONS_PATH, parse_regions
from edgesync.trust.state import TrustState
from edgesync.trust.tuf_checks import EnvelopeType, TrustedMetadataSet
from edgesync.trust.view import build_view, load_targets

_EPOCH: Final = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


def trusted_time(utc_now: float, floor: float | None, elapsed_s: float = 0.0) -> float:
    """Unix seconds to compare expiries with.

    ``floor`` is a signed time, ``elapsed_s`` how long this machine has been running since it learned it. A system
    clock behind their sum is behind the truth; one far ahead of it is not believed. Without a floor, the clock is all.
    """
    if floor is None:
        return min(max(utc_now, 0.0), MAX_TIME)
    known = floor + max(elapsed_s, 0.0)
    believed = utc_now if utc_now <= known + limits.MAX_CLOCK_AHEAD_S else known
    return min(max(believed, known), MAX_TIME)


def bootstrap(roots: Mapping[int, bytes], expected: tuple[int, Digest]) -> TrustState:
    """The first state of a machine, from a chain of roots of which one is known by version and hash beforehand.

    Raises VerificationError: the chain does not start at 1, does not hold, or lacks the expected root.
    """
    version, digest = expected
    chain: list[bytes] = []
    for number in range(1, limits.MAX_ROOT_ROTATIONS + 1):
        if number not in roots:
            break
        chain.append(roots[number])
    if len(chain) < version or version < 1:
        raise VerificationError(f"root metadata 1 to {version} is not complete")
    if manifest.digest(chain[version - 1]) != digest:
        raise VerificationError(
            f"root metadata {version} is not the one this machine was told to trust"
        )
    cap("root/1", chain[0], limits.MAX_ROOT_BYTES)
    check_exact("root/1", chain[0])
    with mapped("root/1"):
        first = TrustedMetadataSet(chain[0], EnvelopeType.METADATA).root
    if first.version != 1:
        raise VerificationError("the first root metadata has another version than 1")
    state = TrustState((chain[0],))
    for root in chain[1:]:
        state = add_root(state, root)
    return state


def add_root(state: TrustState, data: bytes) -> TrustState:
    """The state with the next root; commit it before anything else is done with it.

    Raises VerificationError (and its kinds): not the successor of the last root.
    """
    number = state.root_version + 1
    cap(f"root/{number}", data, limits.MAX_ROOT_BYTES)
    if number > limits.MAX_ROOT_ROTATIONS:
        raise VerificationError(f"more than {limits.MAX_ROOT_ROTATIONS} roots are not supported")
    check_exact(f"root/{number}", data)
    with mapped(f"root/{number}"):
        trusted = TrustedMetadataSet(state.roots[-1], EnvelopeType.METADATA)
        old = trusted.root
        new = trusted.update_root(data)
    roots = (*state.roots, data)
    if _online_keys(old) == _online_keys(new):
        return replace(state, roots=roots)
    # TUF 5.3.11: a rotation of the online keys forgets what they signed, or a fast-forward would last for ever.
    return TrustState(roots, regions=state.regions)


def pending_roots(state: TrustState, update: MetadataUpdate) -> Iterator[bytes]:
    """The update's roots that follow the state's, in order and without a gap."""
    number = state.root_version + 1
    while number in update.roots:
        yield update.roots[number]
        number += 1


def wanted(state: TrustState, update: MetadataUpdate) -> list[Want]:
    """What to fetch next to complete ``update``; empty when it is complete, or not newer than ``state``.

    Ask again with each answer added: what is wanted is only known from verified metadata above it. Expiry is not
    judged here. Raises VerificationError (and its kinds): something in the update is bad, so drop its source.
    """
    if update.timestamp is None:
        return [Want("timestamp", limits.MAX_TIMESTAMP_BYTES)]
    for root in pending_roots(state, update):
        state = add_root(state, root)
    if newest_root(update.timestamp) > state.root_version:
        return [Want(f"root/{state.root_version + 1}", limits.MAX_ROOT_BYTES)]
    walk = _Walk(state, update)
    return walk.missing if walk.run() else []


def apply(
    state: TrustState, update: MetadataUpdate, *, utc_now: float, elapsed_s: float = 0.0
) -> TrustState:
    """The state after a complete update; the same state when the update is not newer.

    ``utc_now`` is the system clock, ``elapsed_s`` the running time since ``state.floor`` was learned. Roots in the
    update are taken first; a caller that keeps states on disk commits those one by one itself (``add_root``).
    Raises VerificationError (and its kinds): incomplete, forged, older, contradictory or expired.
    """
    if update.timestamp is None:
        raise VerificationError("the metadata update has no timestamp")
    for root in pending_roots(state, update):
        state = add_root(state, root)
    newest = newest_root(update.timestamp)
    walk = _Walk(state, update, utc_now=utc_now, elapsed_s=elapsed_s)
    if not walk.run():
        return state
    if newest > state.root_version:
        raise VerificationError(f"the metadata was signed under root {newest}, which is missing")
    if walk.missing:
        names = ", ".join(want.name for want in walk.missing)
        raise VerificationError(f"the metadata update lacks {names}")
    return walk.result()


class _Walk:
    """One pass over an update, from the timestamp down; used to see what is missing and to accept."""

    def __init__(
        self,
        state: TrustState,
        update: MetadataUpdate,
        *,
        utc_now: float | None = None,
        elapsed_s: float = 0.0,
    ) -> None:
        self._state = state
        self._update = update
        self._utc_now = utc_now
        self._elapsed_s = elapsed_s
        self._set: TrustedMetadataSet
        self._files: dict[str, bytes] = {}
        self._expired: list[str] = []
        self._issued = 0.0
        self._reference = 0.0
        self._regions: bytes | None = None
        self.missing: list[Want] = []

    def run(self) -> bool:
        """False when the update is not newer than the state."""
        assert self._update.timestamp is not None
        cap("timestamp", self._update.timestamp, limits.MAX_TIMESTAMP_BYTES)
        with mapped("metadata"):
            self._set = TrustedMetadataSet(self._state.roots[-1], EnvelopeType.METADATA)
            # Nothing is expired in 1970: what is known must hold versions down whatever its age.
            self._set.reference_time = _EPOCH
            if self._state.timestamp is not None:
                with suppress(UnsignedMetadataError):
                    self._set.update_timestamp(self._state.timestamp)
        with mapped("timestamp"):
            try:
                timestamp = self._set.update_timestamp(self._update.timestamp)
            except EqualVersionNumberError:
                return False
            self._judge_time(timestamp)
        if self._snapshot(timestamp) and self._lower():
            self._find_regions()
        return True

    def _judge_time(self, timestamp: Timestamp) -> None:
        self._issued = issued_at(timestamp)
        if self._utc_now is None:
            return
        floor, elapsed = self._state.floor, self._elapsed_s
        if floor is None or self._issued > floor + elapsed:
            floor, elapsed = self._issued, 0.0
        self._reference = trusted_time(self._utc_now, floor, elapsed)
        self._set.reference_time = datetime_of(self._reference)
        if self._set.root.is_expired(self._set.reference_time):
            raise ExpiredMetadataError("root.json is expired")
        if timestamp.is_expired(self._set.reference_time):
            raise ExpiredMetadataError("timestamp.json is expired")

    def _snapshot(self, timestamp: Timestamp) -> bool:
        meta = timestamp.snapshot_meta
        digest = digest_of("snapshot", meta, limits.MAX_SNAPSHOT_BYTES)
        old = self._state.snapshot
        with mapped("snapshot"):
            if old is not None and manifest.digest(old) != digest:
                # Known already, so it holds versions down; it is not the final one, which the set says by raising.
                with suppress(BadVersionNumberError, UnsignedMetadataError, ExpiredMetadataError):
                    self._set.update_snapshot(old, trusted=True)
            data = self._get(digest, meta, "snapshot")
            if data is None:
                return False
            snapshot = self._set.update_snapshot(data)
        if "targets.json" not in snapshot.meta:
            raise VerificationError("the snapshot does not name the targets metadata")
        if len(snapshot.meta) > limits.MAX_DELEGATED_ROLES + 1:
            raise VerificationError(
                f"the snapshot names more than {limits.MAX_DELEGATED_ROLES} delegated roles"
            )
        return True

    def _lower(self) -> bool:
        for filename, meta in self._set.snapshot.meta.items():
            role = filename.removesuffix(".json")
            self._get(digest_of(role, meta, limits.MAX_TARGETS_BYTES), meta, role)
        if "targets" not in self._files:
            return False
        self._expired = load_targets(self._set, self._files, partial=bool(self.missing))
        return True

    def _find_regions(self) -> None:
        target = self._set.targets.targets.get(REGIONS_PATH)
        if target is None:
            return
        digest = digest_of(REGIONS_PATH, target, limits.MAX_REGIONS_BYTES)
        self._regions = self._get(digest, target, REGIONS_PATH)
        if self._regions is not None:
            parse_regions(self._regions)

    def _get(self, digest: Digest, meta: MetaFile | TargetFile, role: str) -> bytes | None:
        assert meta.length is not None
        data = self._update.blobs.get(digest) or self._state.file(f"sha256/{digest}")
        if data is None:
            self.missing.append(Want(f"sha256/{digest}", meta.length))
            return None
        with mapped(role):
            meta.verify_length_and_hashes(data)
        self._files[role] = data
        return data

    def result(self) -> TrustState:
        delegated = tuple(
            (role, data)
            for role, data in sorted(self._files.items())
            if role not in {"snapshot", "targets", REGIONS_PATH}
        )
        floor = self._issued if self._state.floor is None else max(self._issued, self._state.floor)
        state = TrustState(
            roots=self._state.roots,
            timestamp=self._update.timestamp,
            snapshot=self._files["snapshot"],
            targets=self._files["targets"],
            delegated=delegated,
            regions=self._regions,
            accepted_at=self._reference,
            floor=floor,
        )
        # The files have just been verified: keep what they say instead of reading them all again.
        state.__dict__["view"] = build_view(
            state.fleet_id, state.root_version, state.regions, self._set, self._expired
        )
        return state


def _online_keys(root: Root) -> list[tuple[int, dict[str, Any]]]:
    return [
        (root.roles[role].threshold, {k: root.keys[k].to_dict() for k in root.roles[role].keyids})
        for role in (Timestamp.type, Snapshot.type)
    ]
