"""A fleet's TUF metadata with every key at hand, for tests that rotate, forge, replay and mix it.

The gateway's own repository never signs anything unsound; this one signs whatever a test puts into it. It is a second
implementation of the repository only as far as tests need one, and is no part of any program.
"""

import datetime as dt
from collections.abc import Iterable, Mapping
from typing import Any

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from edgesync import identity, manifest, trust
from edgesync.envelope import SigningKey
from edgesync.trust import GatewayEntry, MetadataUpdate, RegionEntry, Regions

DAY_S = 86_400.0


class FleetMetadata:
    """Mutable TUF objects and their keys; ``commit`` signs what changed and everything above it."""

    def __init__(self, *, utc_now: float, region: str = "eu", threshold: int = 1) -> None:
        self.authority = identity.CertificateAuthority.create(region)
        self.gateway = identity.self_signed(identity.Identity.generate(), "gw-1")
        self.assign_key = SigningKey.from_seed(
            identity.Identity.generate().private_key.private_bytes_raw()
        )
        self.utc_now = utc_now
        count = {"root": threshold, "targets": threshold}
        self.signers = {
            role: [CryptoSigner.generate_ed25519() for _ in range(count.get(role, 1))]
            for role in ("root", "targets", "bundles", "snapshot", "timestamp")
        }
        self.root = Root(version=1, expires=self.after(1825), consistent_snapshot=True)
        for role in ("root", "targets", "snapshot", "timestamp"):
            for signer in self.signers[role]:
                self.root.add_key(signer.public_key, role)
            self.root.roles[role].threshold = count.get(role, 1)
        key = self.signers["bundles"][0].public_key
        self.targets = Targets(
            version=1,
            expires=self.after(365),
            delegations=Delegations({key.keyid: key}, self._delegated(key.keyid)),
        )
        self.bundles = Targets(version=1, expires=self.after(365))
        self.snapshot = Snapshot(version=1, expires=self.after(30))
        self.timestamp = Timestamp(version=1, expires=self.after(14))
        for signed in (self.root, self.targets, self.bundles, self.snapshot, self.timestamp):
            signed.version = 0  # so that the first one signed is 1; the constructors refuse 0
        self.files: dict[str, bytes] = {}
        """Everything ever signed, by its name on the wire; ``timestamp`` is the newest."""
        self.published = 0
        self.set_regions(self.regions())
        self.new_root()
        self.commit("targets", "bundles")

    @staticmethod
    def _delegated(keyid: str) -> dict[str, DelegatedRole]:
        paths = [f"{kind}/*" for kind in manifest.KINDS]
        return {"bundles": DelegatedRole("bundles", [keyid], 1, terminating=False, paths=paths)}

    def after(self, days: float) -> dt.datetime:
        return dt.datetime.fromtimestamp(int(self.utc_now + days * DAY_S), dt.UTC)

    def regions(self) -> Regions:
        gateway = GatewayEntry(id="gw-1", key=self.gateway.key, assign_key=self.assign_key.key)
        entry = RegionEntry(
            name=self.authority.region, ca=self.authority.certificate_der, gateways=(gateway,)
        )
        return Regions(regions=(entry,))

    def set_regions(self, regions: Regions) -> None:
        self.add_document(trust.REGIONS_PATH, trust.encode_regions(regions))

    def add_document(self, path: str, data: bytes) -> None:
        self.targets.targets[path] = TargetFile.from_data(path, data, ["sha256"])
        self.files[f"sha256/{manifest.digest(data)}"] = data

    def add_bundle(
        self,
        name: str,
        version: str,
        *,
        kind: str = "files",
        path: str | None = None,
        custom: Mapping[str, Any] | None = None,
    ) -> str:
        """List a bundle; ``custom`` changes or adds to its custom data. Returns its digest."""
        self.published += 1
        data = f"{kind}/{name}@{version}".encode()
        path = path if path is not None else data.decode()
        target = TargetFile.from_data(path, data, ["sha256"])
        target.unrecognized_fields = {
            "custom": {
                "name": name,
                "version": version,
                "kind": kind,
                "release_counter": 0,
                "published_seq": self.published,
                "hardware": [],
            }
            | dict(custom or {})
        }
        self.bundles.targets[path] = target
        return manifest.digest(data)

    def sign(
        self, role: str, signed: Any, *, signers: Iterable[CryptoSigner] | None = None
    ) -> bytes:
        metadata = Metadata(signed)
        for signer in self.signers[role] if signers is None else signers:
            metadata.sign(signer, append=True)
        return metadata.to_bytes()

    def new_root(self, *rotate: str) -> bytes:
        """Sign the next root, with new keys for the roles named; the old root keys sign it too."""
        old = list(self.signers["root"])
        for role in rotate:
            for signer in self.signers[role]:
                self.root.revoke_key(signer.public_key.keyid, role)
            self.signers[role] = [CryptoSigner.generate_ed25519() for _ in self.signers[role]]
            for signer in self.signers[role]:
                self.root.add_key(signer.public_key, role)
        self.root.version += 1
        self.root.expires = self.after(1825)
        both = old + [signer for signer in self.signers["root"] if signer not in old]
        data = self.sign("root", self.root, signers=both)
        self.files[f"root/{self.root.version}"] = data
        return data

    def commit(self, *roles: str, snapshot: bool = True, issued: float | None = None) -> None:
        """Bump and sign ``roles`` (targets, bundles), then snapshot and timestamp."""
        signed = {"targets": self.targets, "bundles": self.bundles}
        for role in roles:
            signed[role].version += 1
            signed[role].expires = self.after(365)
            data = self._keep(self.sign(role, signed[role]))
            self.snapshot.meta[f"{role}.json"] = MetaFile.from_data(
                signed[role].version, data, ["sha256"]
            )
        if snapshot:
            self.snapshot.version += 1
            self.snapshot.expires = self.after(30)
            data = self._keep(self.sign("snapshot", self.snapshot))
            self.timestamp.snapshot_meta = MetaFile.from_data(
                self.snapshot.version, data, ["sha256"]
            )
        self.timestamp.version += 1
        self.timestamp.expires = self.after(14)
        self.timestamp.unrecognized_fields = {
            trust.ISSUED_FIELD: int(self.utc_now if issued is None else issued),
            trust.ROOT_FIELD: self.root.version,
        }
        self.files["timestamp"] = self.sign("timestamp", self.timestamp)

    def _keep(self, data: bytes) -> bytes:
        self.files[f"sha256/{manifest.digest(data)}"] = data
        return data

    def pin(self, version: int = 1) -> tuple[int, Any]:
        return version, manifest.digest(self.files[f"root/{version}"])

    def roots(self) -> dict[int, bytes]:
        return {n: self.files[f"root/{n}"] for n in range(1, self.root.version + 1)}

    def bootstrap(self) -> trust.TrustState:
        return trust.bootstrap({1: self.files["root/1"]}, self.pin())

    def update_for(self, state: trust.TrustState) -> MetadataUpdate:
        """What a device in ``state`` ends up with when it asks for everything it wants."""
        update = MetadataUpdate()
        while wants := trust.wanted(state, update):
            for want in wants:
                update = update.with_file(want.name, self.files[want.name])
        return update

    def accepted(
        self, state: trust.TrustState | None = None, *, utc_now: float | None = None
    ) -> trust.TrustState:
        """The state of a device that takes the newest metadata."""
        state = self.bootstrap() if state is None else state
        now = self.utc_now if utc_now is None else utc_now
        return trust.apply(state, self.update_for(state), utc_now=now)

    def device(self, name: str) -> identity.Identity:
        """A member the region's authority vouched for."""
        made = identity.Identity.generate()
        return made.with_certificate(self.authority.issue(made.public_raw, name))


__all__ = ["FleetMetadata"]
