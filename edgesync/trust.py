"""What this machine believes: the fleet's TUF metadata, checked in the order the specification gives.

It takes metadata from anywhere (gateway, peer, broker, file), says what is still missing, and turns a complete, newer
set into a new TrustState; ``Trusted`` is what such a state says about bundles, regions and certificates. The checks
are python-tuf's TrustedMetadataSet. It reads no clock and writes nothing: ``device.trust_store`` keeps states,
``gateway.repository`` makes the metadata. Invariants:

* every file is capped before it is parsed: root and timestamp by a constant, all others by the length and hash the
  file above them names;
* versions never fall; a root commits alone (``add_root``), timestamp, snapshot, targets and delegated together
  (``apply``): a state holds a whole set or none;
* when a root changes the keys of timestamp or snapshot, what was known of them is forgotten, time floor included: that
  is how a fleet recovers from a stolen online key that signed version 2**40 or the year 2099;
* metadata that was accepted stays readable after it expires: it is read again as of the time it was accepted. Expiry
  gates accepting;
* a bundle whose ``custom`` data contradicts its path is not listed;
* a gateway is known by its key in ``trust/regions`` and by nothing else, a device by a certificate of an authority
  listed there. That list stays in force while newer metadata is on its way, else nobody could be asked for it.

Trusted time is ``trusted_time``: the larger of the system clock and the signed floor plus the time this machine has
been running since, and never a clock that is further ahead of that than MAX_CLOCK_AHEAD_S.
"""

import datetime as dt
import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any, Final, Literal

import msgspec
from tuf.api.exceptions import (
    BadVersionNumberError,
    EqualVersionNumberError,
    ExpiredMetadataError,
    RepositoryError,
    UnsignedMetadataError,
)
from tuf.api.metadata import (
    DelegatedRole,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

# TUF's client checks without its client: private, so the distribution pins tuf to one minor version.
from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet
from tuf.ngclient.config import EnvelopeType

from edgesync import identity, limits, manifest
from edgesync.errors import (
    BadSignatureError,
    EdgeSyncError,
    MetadataExpiredError,
    NotAuthorizedError,
    RollbackRefusedError,
    VerificationError,
)
from edgesync.ids import BundleName, Digest, FleetId, PeerIdentity, PeerKey, Version
from edgesync.manifest import Kind, Manifest

REGIONS_PATH: Final = "trust/regions"
ISSUED_FIELD: Final = "x-issued-at"
"""Extra field we sign into the timestamp: Unix seconds at signing. TUF has none, and a floor for time needs one."""
ROOT_FIELD: Final = "x-root-version"
"""Extra field of the timestamp: the newest root, so that a courier cannot hide one longer than a timestamp lives."""
_MAX_TIME: Final = 253_402_300_799.0  # the last second of year 9999
_EPOCH: Final = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_HEX64: Final = re.compile(r"[0-9a-f]{64}\Z")


# --- what travels --------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Want:
    """One file to fetch next: its name on the wire and the most bytes it may have."""

    name: str
    max_bytes: int


@dataclass(frozen=True)
class MetadataUpdate:
    """Files collected from anywhere, unverified, towards a newer state."""

    roots: Mapping[int, bytes] = field(default_factory=dict)
    timestamp: bytes | None = None
    blobs: Mapping[Digest, bytes] = field(default_factory=dict)

    def with_file(self, name: str, data: bytes) -> "MetadataUpdate":
        """The update with one more file, as fetched under ``name``.

        Raises VerificationError: over its cap, not what its digest says, or not a name of metadata.
        """
        kind, _, rest = name.partition("/")
        if name == "timestamp":
            _cap(name, data, limits.MAX_TIMESTAMP_BYTES)
            return replace(self, timestamp=data)
        if kind == "root" and rest.isdecimal() and rest.isascii() and len(rest) < 10:
            _cap(name, data, limits.MAX_ROOT_BYTES)
            return replace(self, roots={**self.roots, int(rest): data})
        if kind == "sha256" and _HEX64.match(rest):
            _cap(name, data, limits.MAX_TARGETS_BYTES)
            if manifest.digest(data) != rest:
                raise VerificationError(f"what came as {name[:20]}… has another hash")
            return replace(self, blobs={**self.blobs, Digest(rest): data})
        raise VerificationError(f"{name!a} is not the name of a metadata file")


# --- what is kept --------------------------------------------------------------------------------------------------
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


# --- what it says --------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class BundleTarget:
    """One bundle the metadata lists."""

    kind: Kind
    name: BundleName
    version: Version
    digest: Digest
    """SHA-256 of the manifest: the bundle id."""
    length: int
    """Bytes of the manifest."""
    release_counter: int
    published_seq: int
    """Grows with every publication of the fleet; the highest of a name is its latest version."""
    hardware: tuple[str, ...]
    """Hardware it is for; empty: any."""
    role: str
    """The TUF role that signed it."""

    @property
    def path(self) -> str:
        return target_path(self.kind, self.name, self.version)


class GatewayEntry(msgspec.Struct, frozen=True, kw_only=True):
    id: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,62}\Z")]
    key: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
    """Identity key: what its TLS certificate must carry."""
    assign_key: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


class RegionEntry(msgspec.Struct, frozen=True, kw_only=True):
    name: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,62}\Z")]
    ca: Annotated[bytes, msgspec.Meta(max_length=limits.MAX_CERTIFICATE_BYTES)]
    gateways: Annotated[
        tuple[GatewayEntry, ...], msgspec.Meta(max_length=limits.MAX_GATEWAYS_PER_REGION)
    ]


class Regions(msgspec.Struct, frozen=True, kw_only=True):
    """The document at ``trust/regions``: who the gateways are, and which authority vouches for a region's devices."""

    schema: Literal["edgesync.regions/1"] = "edgesync.regions/1"
    regions: Annotated[tuple[RegionEntry, ...], msgspec.Meta(max_length=limits.MAX_REGIONS)]


class _Custom(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    version: str
    kind: Kind
    release_counter: Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
    published_seq: Annotated[int, msgspec.Meta(ge=1, lt=2**53)]
    hardware: Annotated[
        tuple[Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")], ...],
        msgspec.Meta(max_length=limits.MAX_BUNDLE_HARDWARE),
    ]


@dataclass(frozen=True)
class Trusted:
    """What one TrustState says. Immutable, holds no metadata objects, safe to share between threads."""

    fleet_id: FleetId
    root_version: int
    timestamp_version: int
    """0: there is no set below the root (yet, or any more)."""
    snapshot_version: int
    issued_at: float
    expires: float
    """When the set's first role expires, Unix seconds; 0 without a set. Past it no *new* set or assignment is taken."""
    expiries: Mapping[str, float]
    """Expiry of each role, Unix seconds."""
    bundles: tuple[BundleTarget, ...]
    regions: tuple[RegionEntry, ...]
    problems: tuple[str, ...] = ()
    """Listed things that are left out, one sentence each."""
    _by_path: Mapping[str, BundleTarget] = field(default_factory=dict, repr=False)
    _by_digest: Mapping[Digest, BundleTarget] = field(default_factory=dict, repr=False)
    _gateways: Mapping[PeerKey, PeerIdentity] = field(default_factory=dict, repr=False)

    def bundle(self, kind: str, name: str, version: str) -> BundleTarget | None:
        return self._by_path.get(target_path(kind, name, version))

    def find(self, name: str, version: str | None = None) -> BundleTarget | None:
        """A bundle by name, whatever its kind (a name belongs to one); without ``version`` the latest."""
        if version is None:
            return self.latest(name)
        for kind in manifest.KINDS:
            if (found := self.bundle(kind, name, version)) is not None:
                return found
        return None

    def latest(self, name: str) -> BundleTarget | None:
        """The version published last."""
        return max(
            (bundle for bundle in self.bundles if bundle.name == name),
            key=lambda bundle: bundle.published_seq,
            default=None,
        )

    def by_digest(self, digest: str) -> BundleTarget | None:
        return self._by_digest.get(Digest(digest))

    def region(self, name: str) -> RegionEntry | None:
        return next((region for region in self.regions if region.name == name), None)

    def gateways(self, region: str | None = None) -> tuple[GatewayEntry, ...]:
        """The gateways of one region, or of all."""
        return tuple(
            gateway
            for entry in self.regions
            if region is None or entry.name == region
            for gateway in entry.gateways
        )

    def assign_keys(self, region: str) -> tuple[PeerKey, ...]:
        """Keys that may sign assignment sets for this region's devices."""
        return tuple(PeerKey(gateway.assign_key) for gateway in self.gateways(region))

    def judge_certificate(self, der: bytes, *, region: str | None = None) -> PeerIdentity:
        """Who holds the key this certificate is for. The caller has proof that the peer does.

        With ``region``, only its devices count, and gateways of any region.
        Raises NotAuthorizedError: no member of this fleet.
        """
        key = identity.certificate_key(der)
        if (gateway := self._gateways.get(key)) is not None:
            return gateway
        issuer = identity.certificate_issuer(der)
        entry = self.region(issuer)
        if entry is None or (region is not None and entry.name != region):
            raise NotAuthorizedError(
                "the certificate was issued by no region of this fleet whose devices count here"
            )
        identity.check_issued(der, entry.ca)
        name = identity.certificate_id(der)
        if any(gateway.id == name for gateway in self.gateways()):
            raise NotAuthorizedError(f"a device's certificate claims the name of gateway {name}")
        return PeerIdentity("device", name, key, entry.name)


def target_path(kind: str, name: str, version: str) -> str:
    """Where a bundle stands in the targets metadata."""
    return f"{kind}/{name}@{version}"


def encode_regions(document: Regions) -> bytes:
    """The bytes to sign as ``trust/regions``. Raises VerificationError: as ``parse_regions`` would."""
    data = msgspec.json.encode(document)
    parse_regions(data)
    return data


def parse_regions(data: bytes) -> Regions:
    """Read the regions document. Raises VerificationError: out of bounds, or it contradicts itself."""
    _cap(REGIONS_PATH, data, limits.MAX_REGIONS_BYTES)
    try:
        document = _regions_decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise VerificationError(f"the list of regions cannot be read: {exc}") from exc
    gateways = [gateway for region in document.regions for gateway in region.gateways]
    for what, values in (
        ("region", [region.name for region in document.regions]),
        ("gateway", [gateway.id for gateway in gateways]),
        ("gateway key", [gateway.key for gateway in gateways]),
        ("assignment key", [gateway.assign_key for gateway in gateways]),
    ):
        if len(set(values)) != len(values):
            raise VerificationError(f"the list of regions names a {what} twice")
    for region in document.regions:
        try:
            named = identity.authority_region(region.ca)
        except NotAuthorizedError as exc:
            raise VerificationError(f"the authority of region {region.name}: {exc}") from exc
        if named != region.name:
            raise VerificationError(f"the authority of region {region.name} is made out to {named}")
    return document


_regions_decoder = msgspec.json.Decoder(Regions)


# --- time ----------------------------------------------------------------------------------------------------------
def trusted_time(utc_now: float, floor: float | None, elapsed_s: float = 0.0) -> float:
    """Unix seconds to compare expiries with.

    ``floor`` is a signed time, ``elapsed_s`` how long this machine has been running since it learned it. A system
    clock behind their sum is behind the truth; one far ahead of it is not believed. Without a floor, the clock is all.
    """
    if floor is None:
        return min(max(utc_now, 0.0), _MAX_TIME)
    known = floor + max(elapsed_s, 0.0)
    believed = utc_now if utc_now <= known + limits.MAX_CLOCK_AHEAD_S else known
    return min(max(believed, known), _MAX_TIME)


# --- taking in metadata --------------------------------------------------------------------------------------------
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
    _cap("root/1", chain[0], limits.MAX_ROOT_BYTES)
    with _mapped("root/1"):
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
    _cap(f"root/{number}", data, limits.MAX_ROOT_BYTES)
    if number > limits.MAX_ROOT_ROTATIONS:
        raise VerificationError(f"more than {limits.MAX_ROOT_ROTATIONS} roots are not supported")
    with _mapped(f"root/{number}"):
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
    if _newest_root(update.timestamp) > state.root_version:
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
    newest = _newest_root(update.timestamp)
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
        _cap("timestamp", self._update.timestamp, limits.MAX_TIMESTAMP_BYTES)
        with _mapped("metadata"):
            self._set = TrustedMetadataSet(self._state.roots[-1], EnvelopeType.METADATA)
            # Nothing is expired in 1970: what is known must hold versions down whatever its age.
            self._set.reference_time = _EPOCH
            if self._state.timestamp is not None:
                with suppress(UnsignedMetadataError):
                    self._set.update_timestamp(self._state.timestamp)
        with _mapped("timestamp"):
            try:
                timestamp = self._set.update_timestamp(self._update.timestamp)
            except EqualVersionNumberError:
                return False
            self._judge_time(timestamp)
        if self._snapshot(timestamp) and self._lower():
            self._find_regions()
        return True

    def _judge_time(self, timestamp: Timestamp) -> None:
        self._issued = _issued_at(timestamp)
        if self._utc_now is None:
            return
        floor, elapsed = self._state.floor, self._elapsed_s
        if floor is None or self._issued > floor + elapsed:
            floor, elapsed = self._issued, 0.0
        self._reference = trusted_time(self._utc_now, floor, elapsed)
        self._set.reference_time = _datetime(self._reference)
        if self._set.root.is_expired(self._set.reference_time):
            raise ExpiredMetadataError("root.json is expired")
        if timestamp.is_expired(self._set.reference_time):
            raise ExpiredMetadataError("timestamp.json is expired")

    def _snapshot(self, timestamp: Timestamp) -> bool:
        meta = timestamp.snapshot_meta
        digest = _digest_of("snapshot", meta, limits.MAX_SNAPSHOT_BYTES)
        old = self._state.snapshot
        with _mapped("snapshot"):
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
            self._get(_digest_of(role, meta, limits.MAX_TARGETS_BYTES), meta, role)
        if "targets" not in self._files:
            return False
        self._expired = _load_targets(self._set, self._files, partial=bool(self.missing))
        return True

    def _find_regions(self) -> None:
        target = self._set.targets.targets.get(REGIONS_PATH)
        if target is None:
            return
        digest = _digest_of(REGIONS_PATH, target, limits.MAX_REGIONS_BYTES)
        self._regions = self._get(digest, target, REGIONS_PATH)
        if self._regions is not None:
            parse_regions(self._regions)

    def _get(self, digest: Digest, meta: MetaFile | TargetFile, role: str) -> bytes | None:
        assert meta.length is not None
        data = self._update.blobs.get(digest) or self._state.file(f"sha256/{digest}")
        if data is None:
            self.missing.append(Want(f"sha256/{digest}", meta.length))
            return None
        with _mapped(role):
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
        state.__dict__["view"] = _view(state, self._set, self._expired)
        return state


def _load_targets(
    trusted: TrustedMetadataSet, files: Mapping[str, bytes], *, partial: bool
) -> list[str]:
    """Load targets and every role it delegates to; return the names of delegated roles that are expired.

    One team's lapsed role must not stop the others, so it is left out, not refused. ``partial``: some are missing yet.
    """
    expired = []
    with _mapped("targets"):
        targets = trusted.update_targets(files["targets"])
    delegations = targets.delegations
    if delegations is None:
        return []
    if delegations.roles is None:
        raise VerificationError(
            "the targets metadata delegates to hash bins, which are not supported"
        )
    if len(delegations.roles) > limits.MAX_DELEGATED_ROLES:
        raise VerificationError(
            f"targets delegates to more than {limits.MAX_DELEGATED_ROLES} roles"
        )
    for role in delegations.roles:
        if f"{role}.json" not in trusted.snapshot.meta or (partial and role not in files):
            continue
        with _mapped(role):
            try:
                trusted.update_delegated_targets(files[role], role, "targets")
            except ExpiredMetadataError:
                expired.append(role)
    return expired


def _read_back(state: TrustState) -> Trusted:
    """Read a stored state as of the time it was accepted, without what no longer holds under a newer root."""
    trusted = TrustedMetadataSet(state.roots[-1], EnvelopeType.METADATA)
    trusted.reference_time = _datetime(state.accepted_at)
    expired: list[str] = []
    files = dict(state.delegated)
    if state.timestamp is not None and state.snapshot is not None and state.targets is not None:
        with suppress(RepositoryError, EdgeSyncError):
            trusted.update_timestamp(state.timestamp)
            trusted.update_snapshot(state.snapshot, trusted=True)
            expired = _load_targets(trusted, {**files, "targets": state.targets}, partial=False)
    return _view(state, trusted, expired)


def _view(state: TrustState, trusted: TrustedMetadataSet, expired: list[str]) -> Trusted:
    complete = "targets" in trusted
    names = ["root", "timestamp", "snapshot", "targets"]
    if complete:
        names += _delegations(trusted)
    roles = {name: trusted[name] for name in names if name in trusted}
    problems = [f"role {role} is expired: its bundles are not listed" for role in expired]
    bundles = _bundles(trusted, problems) if complete else []
    regions = parse_regions(state.regions).regions if state.regions is not None else ()
    expiries = {name: signed.expires.timestamp() for name, signed in roles.items()}
    timestamp = trusted.timestamp if complete else None
    return Trusted(
        fleet_id=state.fleet_id,
        root_version=state.root_version,
        timestamp_version=timestamp.version if timestamp is not None else 0,
        snapshot_version=trusted.snapshot.version if complete else 0,
        issued_at=_issued_at(timestamp) if timestamp is not None else 0.0,
        expires=min(expiries[role] for role in ("root", "timestamp", "snapshot", "targets"))
        if complete
        else 0.0,
        expiries=expiries,
        bundles=tuple(bundles),
        regions=regions,
        problems=tuple(problems),
        _by_path={bundle.path: bundle for bundle in bundles},
        _by_digest={bundle.digest: bundle for bundle in bundles},
        _gateways={
            PeerKey(gateway.key): PeerIdentity(
                "gateway", gateway.id, PeerKey(gateway.key), region.name
            )
            for region in regions
            for gateway in region.gateways
        },
    )


def _bundles(trusted: TrustedMetadataSet, problems: list[str]) -> list[BundleTarget]:
    """Every well-formed bundle, each path from the first role that may sign it, as TUF searches them."""
    found: dict[str, BundleTarget] = {}
    for role, targets, blocking in _roles_in_order(trusted):
        for path, target in targets.targets.items():
            if path.partition("/")[0] not in manifest.KINDS or path in found:
                continue
            if role != "targets" and not _may_sign(trusted, role, path):
                continue
            if any(_may_sign(trusted, earlier, path) for earlier in blocking):
                continue
            try:
                found[path] = _bundle(path, target, role)
            except VerificationError as exc:
                problems.append(str(exc))
    first: dict[str, BundleTarget] = {}
    for bundle in sorted(found.values(), key=lambda bundle: bundle.published_seq):
        owner = first.setdefault(bundle.name, bundle)
        if owner.kind != bundle.kind:
            problems.append(f"{bundle.path} is not listed: {bundle.name} is a {owner.kind} bundle")
            del found[bundle.path]
    return list(found.values())


def _roles_in_order(trusted: TrustedMetadataSet) -> Iterator[tuple[str, Targets, list[str]]]:
    """Targets roles in search order, each with the terminating delegations that come before it."""
    yield "targets", trusted.targets, []
    blocking: list[str] = []
    for name, role in _delegations(trusted).items():
        loaded = trusted.get(name)
        if isinstance(loaded, Targets):
            yield name, loaded, list(blocking)
        if role.terminating:
            blocking.append(name)


def _delegations(trusted: TrustedMetadataSet) -> dict[str, DelegatedRole]:
    delegations = trusted.targets.delegations
    return (delegations.roles or {}) if delegations is not None else {}


def _may_sign(trusted: TrustedMetadataSet, role: str, path: str) -> bool:
    return _delegations(trusted)[role].is_delegated_path(path)


def _bundle(path: str, target: TargetFile, role: str) -> BundleTarget:
    digest = _digest_of(path, target, limits.MAX_MANIFEST_BYTES)
    try:
        custom = msgspec.convert(target.custom, type=_Custom)
    except msgspec.ValidationError as exc:
        raise VerificationError(f"{path!a} is not listed: its custom data: {exc}") from exc
    manifest.check_name(custom.name)
    manifest.check_version(custom.version)
    if path != target_path(custom.kind, custom.name, custom.version):
        raise VerificationError(
            f"{path!a} is not listed: its custom data is for {custom.kind}/{custom.name}@{custom.version}"
        )
    return BundleTarget(
        kind=custom.kind,
        name=BundleName(custom.name),
        version=Version(custom.version),
        digest=digest,
        length=target.length,
        release_counter=custom.release_counter,
        published_seq=custom.published_seq,
        hardware=custom.hardware,
        role=role,
    )


def check_manifest(bundle: BundleTarget, found: Manifest) -> None:
    """Raise VerificationError unless a manifest says of itself what the metadata says of it."""
    for what, listed, said in (
        ("kind", bundle.kind, found.kind),
        ("name", bundle.name, found.name),
        ("version", bundle.version, found.version),
        ("release counter", bundle.release_counter, found.release_counter),
        ("hardware", list(bundle.hardware), list(found.hardware)),
    ):
        if listed != said:
            raise VerificationError(
                f"the manifest of {bundle.path} has {what} {said!r}, the metadata says {listed!r}"
            )


# --- small print ---------------------------------------------------------------------------------------------------
@contextmanager
def _mapped(what: str) -> Iterator[None]:
    """Turn python-tuf's errors about one file into ours."""
    try:
        yield
    except ExpiredMetadataError as exc:
        raise MetadataExpiredError(f"{what} metadata is not accepted: {exc}") from exc
    except BadVersionNumberError as exc:
        raise RollbackRefusedError(f"{what} metadata is not accepted: {exc}") from exc
    except UnsignedMetadataError as exc:
        raise BadSignatureError(f"{what} metadata is not accepted: {exc}") from exc
    except (
        RepositoryError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as exc:
        raise VerificationError(f"{what} metadata is not accepted: {exc}") from exc


def _cap(name: str, data: bytes, most: int) -> None:
    if len(data) > most:
        raise VerificationError(f"{name} has {len(data)} bytes, at most {most} are allowed")


def _digest_of(what: str, meta: MetaFile | TargetFile, most: int) -> Digest:
    """The SHA-256 signed metadata names for a file; TUF leaves hash and length optional, we do not."""
    digest = (meta.hashes or {}).get("sha256")
    if digest is None or not _HEX64.match(digest) or meta.length is None:
        raise VerificationError(f"{what!a} is named without its SHA-256 and length")
    if not 0 < meta.length <= most:
        raise VerificationError(f"{what!a} has {meta.length} bytes, at most {most} are allowed")
    return Digest(digest)


def _newest_root(timestamp: bytes) -> int:
    """The root version an unverified timestamp speaks of; 0 if of none."""
    _cap("timestamp", timestamp, limits.MAX_TIMESTAMP_BYTES)
    with _mapped("timestamp"):
        signed = Metadata[Timestamp].from_bytes(timestamp).signed
        value = signed.unrecognized_fields.get(ROOT_FIELD, 0)
    if type(value) is not int or not 0 <= value <= limits.MAX_ROOT_ROTATIONS:
        raise VerificationError(f"the timestamp metadata has no sound {ROOT_FIELD}")
    return value


def _issued_at(timestamp: Timestamp) -> float:
    value = timestamp.unrecognized_fields.get(ISSUED_FIELD)
    if type(value) is not int or not 0 <= value < timestamp.expires.timestamp():
        raise VerificationError(f"the timestamp metadata has no sound {ISSUED_FIELD}")
    return float(value)


def _online_keys(root: Root) -> list[tuple[int, dict[str, Any]]]:
    return [
        (root.roles[role].threshold, {k: root.keys[k].to_dict() for k in root.roles[role].keyids})
        for role in (Timestamp.type, Snapshot.type)
    ]


def _datetime(seconds: float) -> dt.datetime:
    return dt.datetime.fromtimestamp(min(max(seconds, 0.0), _MAX_TIME), dt.UTC)


__all__ = [
    "ISSUED_FIELD",
    "REGIONS_PATH",
    "ROOT_FIELD",
    "BundleTarget",
    "GatewayEntry",
    "MetadataUpdate",
    "RegionEntry",
    "Regions",
    "TrustState",
    "Trusted",
    "Want",
    "add_root",
    "apply",
    "bootstrap",
    "check_manifest",
    "encode_regions",
    "parse_regions",
    "pending_roots",
    "target_path",
    "trusted_time",
    "wanted",
]
