"""What a verified set of metadata says: bundles, regions, and who a certificate belongs to.

It is built from a TrustedMetadataSet that has passed every check, and keeps none of python-tuf's objects, since a
device holds a view for as long as it runs. What is listed but contradicts itself is left out, with a sentence in
``problems``.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated

import msgspec
from tuf.api.exceptions import ExpiredMetadataError
from tuf.api.metadata import DelegatedRole, TargetFile, Targets

from edgesync import identity, limits, manifest
from edgesync.errors import NotAuthorizedError, VerificationError
from edgesync.ids import BundleName, Digest, FleetId, PeerIdentity, PeerKey, Version
from edgesync.manifest import Kind, Manifest
from edgesync.trust.files import digest_of, issued_at, mapped
from edgesync.trust.regions import GatewayEntry, RegionEntry, parse_regions
from edgesync.trust.tuf_checks import TrustedMetadataSet


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


def build_view(
    fleet_id: FleetId,
    root_version: int,
    regions_file: bytes | None,
    trusted: TrustedMetadataSet,
    expired: list[str],
) -> Trusted:
    """What this set says; ``expired`` are the delegated roles that were left out of it."""
    complete = "targets" in trusted
    names = ["root", "timestamp", "snapshot", "targets"]
    if complete:
        names += _delegations(trusted)
    roles = {name: trusted[name] for name in names if name in trusted}
    problems = [f"role {role} is expired: its bundles are not listed" for role in expired]
    bundles = _bundles(trusted, problems) if complete else []
    regions = parse_regions(regions_file).regions if regions_file is not None else ()
    expiries = {name: signed.expires.timestamp() for name, signed in roles.items()}
    timestamp = trusted.timestamp if complete else None
    return Trusted(
        fleet_id=fleet_id,
        root_version=root_version,
        timestamp_version=timestamp.version if timestamp is not None else 0,
        snapshot_version=trusted.snapshot.version if complete else 0,
        issued_at=issued_at(timestamp) if timestamp is not None else 0.0,
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
    digest = digest_of(path, target, limits.MAX_MANIFEST_BYTES)
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


def load_targets(
    trusted: TrustedMetadataSet, files: Mapping[str, bytes], *, partial: bool
) -> list[str]:
    """Load targets and every role it delegates to; return the names of delegated roles that are expired.

    One team's lapsed role must not stop the others, so it is left out, not refused. ``partial``: some are missing yet.
    """
    expired = []
    with mapped("targets"):
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
        with mapped(role):
            try:
                trusted.update_delegated_targets(files[role], role, "targets")
            except ExpiredMetadataError:
                expired.append(role)
    return expired
