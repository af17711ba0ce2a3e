"""The fleet's TUF repository: it signs what exists, and keeps every signed file in the gateway's database.

Roles, keys and where they lie::

    root, targets          M of N each      keys/root-1.key … keys/targets-N.key     movable offline
    bundles                1                online/bundles.key      delegated: firmware/*, model/*, files/*
    snapshot, timestamp    1 each           online/snapshot.key, online/timestamp.key

It signs; whether devices believe it is ``edgesync.trust``'s business, which reads the same files. Invariants:

* versions are allocated, signed and stored in one write transaction: two commands at once never fork a version, and a
  crash leaves the old set or the new one;
* a signature is only made with keys that are there: an action that lacks one changes nothing and says which;
* ``x-issued-at`` never goes back, and a clock too far ahead of it signs nothing: one signature from the year 2099
  would stop every device of the fleet.

Called by the publishing commands, by ``gateway init`` and, for ``refresh`` and serving, by the daemon.
"""

import datetime as dt
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import CryptoSigner, SSlibKey
from sqlite_utils import Database, Migrations
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Role,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer

from edgesync import limits, manifest, trust
from edgesync.errors import ConfigError, ConflictError, NotFoundError, UsageError
from edgesync.identity import load_private_key
from edgesync.ids import Digest, FleetId
from edgesync.manifest import Kind
from edgesync.trust import BundleTarget, Regions, Trusted, TrustState
from gateway.certificates import pem, read_key, sync_directory, write_new

DAY_S: Final = 86_400.0
LIFETIMES_S: Final[dict[str, float]] = {
    "root": 5 * 365 * DAY_S,
    "targets": 365 * DAY_S,
    "bundles": 365 * DAY_S,
    "snapshot": 30 * DAY_S,
    "timestamp": 14 * DAY_S,
}
"""How long a signature of each role holds; roles whose keys are online are signed anew at half of it."""
WARN_BEFORE_S: Final = 60 * DAY_S
"""An offline role that expires sooner is a warning: somebody has to fetch keys."""
BUNDLES: Final = "bundles"
ONLINE_ROLES: Final = (BUNDLES, "snapshot", "timestamp")
KEPT_VERSIONS: Final = 16
"""Versions of each role below root that stay servable, for devices that are fetching while a newer set appears."""
MAX_KEYS: Final = 16

migrations = Migrations("trust")


@migrations()
def m001_metadata(db: Database) -> None:
    for statement in (
        """CREATE TABLE trust_metadata (
            role TEXT NOT NULL,
            version INTEGER NOT NULL,
            digest TEXT NOT NULL,
            expires REAL NOT NULL,
            data BLOB NOT NULL,
            PRIMARY KEY (role, version))""",
        "CREATE INDEX trust_metadata_digest ON trust_metadata (digest)",
        # Targets that are documents of the repository itself: trust/regions.
        """CREATE TABLE trust_documents (
            digest TEXT PRIMARY KEY,
            path TEXT NOT NULL,
            added INTEGER NOT NULL,
            data BLOB NOT NULL)""",
        # published_seq: never given twice, not even after the bundle that had it is withdrawn.
        """CREATE TABLE trust_counters (
            name TEXT PRIMARY KEY,
            value INTEGER NOT NULL)""",
    ):
        db.conn.execute(statement)


@dataclass(frozen=True, slots=True)
class KeyFile:
    """One signing key: the role it is for, where it is looked for, and whether it can be read there now."""

    role: str
    path: Path
    readable: bool


SignedT = TypeVar("SignedT", Root, Timestamp, Snapshot, Targets)


class Repository:
    def __init__(self, db: Database, *, keys: Path, online: Path) -> None:
        """Use a repository that ``create`` made; ``db`` belongs to the calling thread for the time of each call."""
        self._db = db
        self._keys = keys
        self._online = online
        self._state: TrustState | None = None

    @classmethod
    def create(
        cls,
        db: Database,
        *,
        keys: Path,
        online: Path,
        regions: Regions,
        threshold: tuple[int, int] = (1, 1),
        utc_now: float,
    ) -> Self:
        """Make the fleet's keys and its first metadata. ``threshold`` is (M, N), for root and for targets.

        Raises UsageError: M-of-N makes no sense. Raises ConflictError: there is metadata already.
        """
        needed, count = threshold
        if not 1 <= needed <= count <= MAX_KEYS:
            raise UsageError(f"--threshold {needed}-of-{count}: it must be 1 ≤ M ≤ N ≤ {MAX_KEYS}")
        repository = cls(db, keys=keys, online=online)
        if repository._newest("root") is not None:
            raise ConflictError("this gateway has fleet metadata already")
        names = [*(f"{role}-{n + 1}" for role in ("root", "targets") for n in range(count))]
        made = {name: _make_key(keys / f"{name}.key") for name in names}
        made |= {name: _make_key(online / f"{name}.key") for name in ONLINE_ROLES}
        for directory in (keys, online):
            sync_directory(directory)
        of = {
            role: [signer for name, signer in made.items() if name.rpartition("-")[0] == role]
            for role in ("root", "targets")
        }
        root = Root(version=1, expires=_expiry("root", utc_now), consistent_snapshot=True)
        for role in ("root", "targets"):
            for signer in of[role]:
                root.add_key(signer.public_key, role)
            root.roles[role].threshold = needed
        for role in ("snapshot", "timestamp"):
            root.add_key(made[role].public_key, role)
        bundles_key = made[BUNDLES].public_key
        targets = Targets(
            version=1,
            expires=_expiry("targets", utc_now),
            delegations=Delegations(
                keys={bundles_key.keyid: bundles_key},
                roles={
                    BUNDLES: DelegatedRole(
                        BUNDLES,
                        [bundles_key.keyid],
                        threshold=1,
                        terminating=False,
                        paths=[f"{kind}/*" for kind in manifest.KINDS],
                    )
                },
            ),
        )
        bundles = Targets(version=1, expires=_expiry(BUNDLES, utc_now))
        with repository._atomic():
            repository._store("root", _signed(root, of["root"]))
            repository._put_document(targets, trust.REGIONS_PATH, trust.encode_regions(regions))
            changed = {
                "targets": _signed(targets, of["targets"]),
                BUNDLES: _signed(bundles, [made[BUNDLES]]),
            }
            repository._commit(changed, utc_now, first=True)
        return repository

    # --- changes ---------------------------------------------------------------------------------------------------
    def publish(
        self,
        kind: Kind,
        name: str,
        version: str,
        digest: str,
        length: int,
        *,
        release_counter: int = 0,
        hardware: Sequence[str] = (),
        utc_now: float,
    ) -> BundleTarget:
        """List a manifest (its digest and length). Publishing the same again changes nothing.

        Raises ConflictError: the version exists with other content, or the name belongs to another kind.
        Raises ConfigError: the publisher's key is not there.
        """
        manifest.check_name(name)
        manifest.check_version(version)
        with self._atomic():
            view = self.trusted()
            known = view.find(name, version)
            if known is not None and known.kind == kind and known.digest == digest:
                return known
            if known is not None:
                raise ConflictError(
                    f"{name}@{version} is published already with other content: choose another version"
                )
            other = view.latest(name)
            if other is not None and other.kind != kind:
                raise ConflictError(
                    f"{name} is a bundle of kind {other.kind}: a name belongs to one kind"
                )
            bundles = self._load(BUNDLES, Targets)
            sequence = self._next("published_seq")
            path = trust.target_path(kind, name, version)
            bundles.targets[path] = _target(
                path,
                digest,
                length,
                {
                    "name": name,
                    "version": version,
                    "kind": kind,
                    "release_counter": release_counter,
                    "published_seq": sequence,
                    "hardware": list(hardware),
                },
            )
            self._sign_and_commit(BUNDLES, bundles, utc_now)
            listed = self.trusted().bundle(kind, name, version)
        if listed is None:
            raise ConfigError(
                f"{path} was signed but is not listed: a delegation for its path precedes"
            )
        return listed

    def withdraw(self, kind: str, name: str, version: str, *, utc_now: float) -> None:
        """Stop listing a bundle. Raises NotFoundError: it is not listed by the publisher's role."""
        path = trust.target_path(kind, name, version)
        with self._atomic():
            bundles = self._load(BUNDLES, Targets)
            if bundles.targets.pop(path, None) is None:
                raise NotFoundError(f"{name}@{version} is not published")
            self._sign_and_commit(BUNDLES, bundles, utc_now)

    def set_regions(self, regions: Regions, *, utc_now: float) -> None:
        """Replace the list of regions, authorities and gateways; needs the targets keys."""
        document = trust.encode_regions(regions)
        with self._atomic():
            targets = self._load("targets", Targets)
            self._put_document(targets, trust.REGIONS_PATH, document)
            self._sign_and_commit("targets", targets, utc_now)

    def refresh(self, *, utc_now: float) -> list[str]:
        """Sign anew what is past half of its life and whose key is online; return those roles.

        Raises ConfigError: a key of snapshot or timestamp is not there, or the clock cannot be right.
        """
        with self._atomic():
            due = [role for role in ONLINE_ROLES if self._is_due(role, utc_now)]
            if BUNDLES in due and not self._key_path(BUNDLES, 0).is_file():
                due.remove(BUNDLES)
            if not due:
                return []
            changed: dict[str, Metadata[Any]] = {}
            if BUNDLES in due:
                changed[BUNDLES] = self._resign(BUNDLES, self._load(BUNDLES, Targets), utc_now)
            self._commit(changed, utc_now, snapshot="snapshot" in due or bool(changed))
        return due

    # --- reading ---------------------------------------------------------------------------------------------------
    def metadata(self, name: str) -> bytes | None:
        """A file by its name on the wire: ``timestamp``, ``root/N`` or ``sha256/HEX``; None if there is none."""
        kind, _, rest = name.partition("/")
        if name == "timestamp":
            return self._newest("timestamp")
        if kind == "root" and rest.isdecimal() and len(rest) < 10:
            return self._blob(
                "SELECT data FROM trust_metadata WHERE role = 'root' AND version = ?", int(rest)
            )
        if kind != "sha256":
            return None
        return self._blob(
            "SELECT data FROM trust_metadata WHERE digest = ? AND role NOT IN ('root', 'timestamp')"
            " UNION ALL SELECT data FROM trust_documents WHERE digest = ?",
            rest,
            rest,
        )

    def current_files(self) -> dict[str, bytes]:
        """Everything a device without anything needs, by name on the wire, in the order to announce it."""
        state = self.state()
        assert state.timestamp is not None
        files = {f"root/{n + 1}": data for n, data in enumerate(state.roots)}
        below = [
            state.regions,
            *(data for _, data in state.delegated),
            state.targets,
            state.snapshot,
        ]
        files |= {f"sha256/{manifest.digest(data)}": data for data in below if data is not None}
        return files | {"timestamp": state.timestamp}

    def state(self) -> TrustState:
        """The repository as one of its own devices would hold it, read as of its signing."""
        with self._reading():
            timestamp = self._newest("timestamp")
            if timestamp is None:
                raise ConfigError("this gateway has no fleet metadata: run edgesync gateway init")
            # A timestamp stands for everything below it, and names the root; versions would not do, since a transaction
            # that is rolled back gives its own to the next.
            if self._state is None or self._state.timestamp != timestamp:
                self._state = self._read_state(timestamp)
            return self._state

    def trusted(self) -> Trusted:
        """What the repository says now."""
        return self.state().view

    def fleet_id(self) -> FleetId:
        return self.state().fleet_id

    def root_pin(self) -> tuple[int, Digest]:
        """Version and hash of the newest root: what a join token tells a machine to trust."""
        state = self.state()
        return state.root_version, manifest.digest(state.roots[-1])

    def expiries(self) -> dict[str, float]:
        """When the newest metadata of each role expires, Unix seconds."""
        rows = self._db.conn.execute(
            "SELECT role, expires FROM trust_metadata t WHERE version ="
            " (SELECT MAX(version) FROM trust_metadata WHERE role = t.role) ORDER BY role"
        )
        return {str(role): float(expires) for role, expires in rows}

    def warnings(self, *, utc_now: float) -> list[str]:
        """One sentence for each role that will need keys this machine does not sign with by itself."""
        return [
            f"the {role} metadata {'has expired' if left <= 0 else f'expires in {left / DAY_S:.0f} days'}:"
            f" it must be signed again with the {role} keys"
            for role, expires in self.expiries().items()
            if role not in ONLINE_ROLES and (left := expires - utc_now) < WARN_BEFORE_S
        ]

    def readable_keys(self) -> list[KeyFile]:
        """Every signing key of the fleet that belongs on this machine, and whether it is there."""
        root = self._load("root", Root)
        found = []
        for role in ("root", "targets"):
            for index in range(len(root.roles[role].keyids)):
                path = self._key_path(role, index)
                found.append(KeyFile(role, path, _readable(path)))
        for role in (*ONLINE_ROLES, "assign"):
            path = self._online / f"{role}.key"
            found.append(KeyFile(role, path, _readable(path)))
        return found

    # --- inside one transaction --------------------------------------------------------------------------------------
    def _sign_and_commit(self, role: str, signed: Targets, utc_now: float) -> None:
        self._commit({role: self._resign(role, signed, utc_now)}, utc_now)

    def _resign(self, role: str, signed: SignedT, utc_now: float) -> Metadata[SignedT]:
        signed.version += 1
        signed.expires = _expiry(role, self._signing_time(utc_now))
        return _signed(signed, self._signers(role))

    def _commit(
        self,
        changed: dict[str, Metadata[Any]],
        utc_now: float,
        *,
        snapshot: bool = True,
        first: bool = False,
    ) -> None:
        """Store ``changed`` roles, and the snapshot and timestamp that make them count."""
        now = self._signing_time(utc_now)
        files = {role: self._store(role, metadata) for role, metadata in changed.items()}
        if first:
            snap, stamp = Snapshot(version=0 + 1), Timestamp(version=1)
        else:
            snap, stamp = self._load("snapshot", Snapshot), self._load("timestamp", Timestamp)
            snap.version += 1 if snapshot else 0
            stamp.version += 1
        if snapshot:
            for role, data in files.items():
                version = changed[role].signed.version
                snap.meta[f"{role}.json"] = MetaFile.from_data(version, data, ["sha256"])
            snap.expires = _expiry("snapshot", now)
            data = self._store("snapshot", _signed(snap, self._signers("snapshot")))
            stamp.snapshot_meta = MetaFile.from_data(snap.version, data, ["sha256"])
        stamp.expires = _expiry("timestamp", now)
        root_version = self._load("root", Root).version
        stamp.unrecognized_fields = {
            trust.ISSUED_FIELD: int(now),
            trust.ROOT_FIELD: root_version,
        }
        self._store("timestamp", _signed(stamp, self._signers("timestamp")))
        self._forget()

    def _store(self, role: str, metadata: Metadata[Any]) -> bytes:
        data = metadata.to_bytes(JSONSerializer(compact=True))
        most = {
            "root": limits.MAX_ROOT_BYTES,
            "timestamp": limits.MAX_TIMESTAMP_BYTES,
            "snapshot": limits.MAX_SNAPSHOT_BYTES,
        }.get(role, limits.MAX_TARGETS_BYTES)
        if len(data) > most:
            raise ConfigError(
                f"the {role} metadata would have {len(data)} bytes, devices accept {most}:"
                " withdraw bundles that no device needs"
            )
        self._db.conn.execute(
            "INSERT INTO trust_metadata (role, version, digest, expires, data) VALUES (?, ?, ?, ?, ?)",
            (
                role,
                metadata.signed.version,
                manifest.digest(data),
                metadata.signed.expires.timestamp(),
                data,
            ),
        )
        return data

    def _put_document(self, targets: Targets, path: str, data: bytes) -> None:
        digest = manifest.digest(data)
        targets.targets[path] = _target(path, digest, len(data), None)
        self._db.conn.execute(
            "INSERT OR IGNORE INTO trust_documents (digest, path, added, data) VALUES (?, ?, ?, ?)",
            (digest, path, targets.version, data),
        )

    def _forget(self) -> None:
        self._db.conn.execute(
            "DELETE FROM trust_metadata WHERE role <> 'root' AND version <="
            " (SELECT MAX(version) FROM trust_metadata t WHERE t.role = trust_metadata.role) - ?",
            (KEPT_VERSIONS,),
        )

    def _next(self, counter: str) -> int:
        row = self._db.conn.execute(
            "INSERT INTO trust_counters (name, value) VALUES (?, 1)"
            " ON CONFLICT (name) DO UPDATE SET value = value + 1 RETURNING value",
            (counter,),
        ).fetchone()
        return int(row[0])

    def _signing_time(self, utc_now: float) -> float:
        data = self._newest("timestamp")
        if data is None:
            return utc_now
        last = Metadata[Timestamp].from_bytes(data).signed.unrecognized_fields[trust.ISSUED_FIELD]
        if utc_now > last + limits.MAX_CLOCK_AHEAD_S:
            raise ConfigError(
                f"this machine's clock says {_datetime(utc_now):%Y-%m-%d}, more than a year after the last signature"
                f" ({_datetime(last):%Y-%m-%d}): set the clock, nothing was signed"
            )
        return max(utc_now, float(last))

    def _is_due(self, role: str, utc_now: float) -> bool:
        expires = self.expiries().get(role)
        return expires is not None and expires - utc_now < LIFETIMES_S[role] / 2

    # --- keys --------------------------------------------------------------------------------------------------------
    def _key_path(self, role: str, index: int) -> Path:
        if role in ONLINE_ROLES:
            return self._online / f"{role}.key"
        return self._keys / f"{role}-{index + 1}.key"

    def _signers(self, role: str) -> list[CryptoSigner]:
        """Enough keys to sign for ``role``. Raises ConfigError: too few of them can be read."""
        wanted: Role
        if role == BUNDLES:
            delegations = self._load("targets", Targets).delegations
            assert delegations is not None
            assert delegations.roles is not None
            wanted = delegations.roles[role]
        else:
            wanted = self._load("root", Root).roles[role]
        signers, first_error = [], None
        for index in range(max(len(wanted.keyids), 1)):
            path = self._key_path(role, index)
            try:
                signer = _signer(load_private_key(read_key(path, f"the {role} key")))
            except ConfigError as exc:
                first_error = first_error or exc
                continue
            if signer.public_key.keyid not in wanted.keyids:
                raise ConfigError(f"{path} is not a key the fleet's metadata names for {role}")
            signers.append(signer)
            if len(signers) == wanted.threshold:
                return signers
        missing = wanted.threshold - len(signers)
        raise ConfigError(
            f"signing {role} metadata needs {wanted.threshold} of {len(wanted.keyids)} keys, {missing} more must be"
            f" readable: {first_error or f'none more at {self._key_path(role, 0).parent}'}"
        )

    # --- rows --------------------------------------------------------------------------------------------------------
    def _newest(self, role: str) -> bytes | None:
        return self._blob(
            "SELECT data FROM trust_metadata WHERE role = ? ORDER BY version DESC LIMIT 1", role
        )

    def _load(self, role: str, _type: Callable[..., SignedT]) -> SignedT:
        data = self._newest(role)
        if data is None:
            raise ConfigError("this gateway has no fleet metadata: run edgesync gateway init")
        return Metadata[SignedT].from_bytes(data).signed

    def _read_state(self, timestamp: bytes) -> TrustState:
        roots = tuple(
            bytes(row[0])
            for row in self._db.conn.execute(
                "SELECT data FROM trust_metadata WHERE role = 'root' ORDER BY version"
            )
        )
        snapshot, targets = self._newest("snapshot"), self._newest("targets")
        roles = self._db.conn.execute(
            "SELECT DISTINCT role FROM trust_metadata WHERE role NOT IN"
            " ('root', 'timestamp', 'snapshot', 'targets') ORDER BY role"
        ).fetchall()
        delegated = tuple((str(role), self._newest(role) or b"") for (role,) in roles)
        regions = None
        target = self._load("targets", Targets).targets.get(trust.REGIONS_PATH)
        if target is not None:
            regions = self.metadata(f"sha256/{target.hashes['sha256']}")
        issued = float(
            Metadata[Timestamp].from_bytes(timestamp).signed.unrecognized_fields[trust.ISSUED_FIELD]
        )
        return TrustState(
            roots,
            timestamp,
            snapshot,
            targets,
            delegated,
            regions,
            accepted_at=issued,
            floor=issued,
        )

    def _blob(self, sql: str, *parameters: object) -> bytes | None:
        row = self._db.conn.execute(sql, parameters).fetchone()
        return bytes(row[0]) if row is not None else None

    @contextmanager
    def _atomic(self) -> Iterator[None]:
        """One write transaction, or a savepoint of the caller's."""
        if self._db.conn.in_transaction:
            with self._db.atomic():
                yield
            return
        self._db.conn.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.conn.execute("COMMIT")
        except BaseException:
            if self._db.conn.in_transaction:
                self._db.conn.execute("ROLLBACK")
            raise

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """One consistent view for several SELECTs."""
        if self._db.conn.in_transaction:
            yield
            return
        self._db.conn.execute("BEGIN")
        try:
            yield
        finally:
            self._db.conn.execute("COMMIT")


def _make_key(path: Path) -> CryptoSigner:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = Ed25519PrivateKey.generate()
    write_new(path, pem(key), mode=0o600)
    return _signer(key)


def _signer(key: Ed25519PrivateKey) -> CryptoSigner:
    return CryptoSigner(key, SSlibKey.from_crypto(key.public_key()))


def _signed(signed: SignedT, signers: Sequence[CryptoSigner]) -> Metadata[SignedT]:
    metadata = Metadata(signed)
    for signer in signers:
        metadata.sign(signer, append=True)
    return metadata


def _target(path: str, digest: str, length: int, custom: dict[str, Any] | None) -> TargetFile:
    extra = {"custom": custom} if custom is not None else None
    return TargetFile(length, {"sha256": digest}, path, extra)


def _expiry(role: str, utc_now: float) -> dt.datetime:
    return _datetime(utc_now + LIFETIMES_S[role])


def _datetime(seconds: float) -> dt.datetime:
    return dt.datetime.fromtimestamp(int(seconds), dt.UTC)


def _readable(path: Path) -> bool:
    try:
        read_key(path, "a key")
    except ConfigError:
        return False
    return True


__all__ = [
    "BUNDLES",
    "KEPT_VERSIONS",
    "LIFETIMES_S",
    "ONLINE_ROLES",
    "WARN_BEFORE_S",
    "KeyFile",
    "Repository",
    "migrations",
]
