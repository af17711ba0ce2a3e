"""What an operator can do with bundles on a gateway: publish, list, show, verify, remove.

``publish`` works outside any transaction until everything is durable, then signs, records and tells in one: a bundle
is listed with all its pieces or not at all, and an interrupted publish leaves pieces that the next one finds.

Invariants: a version never changes its content; a name belongs to one kind; a release counter never falls; pieces that
any listed bundle names are never dropped.
"""

import fnmatch
import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from edgesync import manifest, piece_codec
from edgesync.errors import (
    ConflictError,
    DiskFullError,
    EdgeSyncError,
    NotFoundError,
    StorageError,
    UsageError,
    VerificationError,
)
from edgesync.ids import Digest, PieceId
from edgesync.manifest import Access, Chunking, DirectoryEntry, Kind, Manifest, SymlinkEntry
from edgesync.trust import BundleTarget, Trusted
from gateway import catalogue, packs, publisher
from gateway.catalogue import Summary, load_manifest
from gateway.packs import Extent, PieceStore
from gateway.publisher import Content, Progress, TooManyPiecesError
from gateway.repository import Repository
from gateway.scan import Scan
from gateway.service import setup
from gateway.store import GatewayStore

MAX_RELEASE_COUNTER: Final = 2**31 - 1
MAX_HARDWARE: Final = 64
_ATTEMPTS: Final = 3
"""How often what ``remove`` dropped in the meantime is stored again before it is given up."""


@dataclass(frozen=True)
class Published:
    """Sizes in bytes."""

    id: Digest
    name: str
    version: str
    kind: Kind
    release_counter: int
    published_seq: int | None
    """None after a dry run of something new."""
    already_published: bool
    payload_bytes: int
    files: int
    pieces: int
    wire_bytes: int
    """All different pieces of the bundle, each once, in the form the gateway sends them."""
    new_wire_bytes: int
    """Of these, the pieces no earlier version of the name has: what an up-to-date device will fetch."""
    shared_bytes: int
    """The rest of ``wire_bytes``."""
    stored_pieces: int
    """Pieces the gateway did not hold before, from any bundle or an interrupted publish."""
    returnable: list[str]
    """Versions a device that has committed this one may still go back to, newest first."""
    left_out: list[str]
    left_out_count: int
    seconds: float


@dataclass(frozen=True)
class _Draft:
    """What the manifest says beside its tables."""

    name: str
    version: str
    kind: Kind
    release_counter: int
    hardware: list[str]
    access: Access
    mutable: tuple[str, ...]
    """Globs of files the device's applications may change; ``*`` also crosses folders."""

    def check(self, scan: Scan) -> None:
        """Raises UsageError: a glob means no file, so it is not what somebody meant."""
        for glob in self.mutable:
            if not any(fnmatch.fnmatchcase(file.path, glob) for file in scan.files):
                raise UsageError(
                    f"--mutable {glob[:80]!a} matches no file of {self.name}@{self.version}"
                )

    def _is_mutable(self, path: str) -> bool:
        return any(fnmatch.fnmatchcase(path, glob) for glob in self.mutable)

    def manifest(self, scan: Scan, content: Content) -> bytes:
        files = content.files
        if self.mutable:
            files = [
                msgspec.structs.replace(file, mutable=True) if self._is_mutable(file.path) else file
                for file in files
            ]
        return manifest.encode(
            Manifest(
                requires_features=[],
                kind=self.kind,
                name=self.name,
                version=self.version,
                release_counter=self.release_counter,
                hardware=self.hardware,
                access=self.access,
                payload_bytes=scan.payload_bytes,
                chunking=content.chunking,
                piece_ids=bytes(content.piece_ids),
                piece_lengths=content.piece_lengths,
                directories=[DirectoryEntry(d.path, d.mode) for d in scan.directories],
                files=files,
                symlinks=[SymlinkEntry(link.path, link.target) for link in scan.symlinks],
            )
        )


def publish(
    store: GatewayStore,
    repo: Repository,
    path: Path,
    name: str,
    version: str,
    *,
    kind: Kind = "files",
    hardware: Sequence[str] = (),
    release_counter: int | None = None,
    access: Access = "fleet",
    mutable: Sequence[str] = (),
    dry_run: bool = False,
    progress: Progress | None = None,
    utc_now: float | None = None,
) -> Published:
    """Make ``path`` the content of ``name@version``, sign it and list it; the same content again changes nothing.

    ``mutable`` are globs of files that applications on a device may change without being told of damage.

    Raises:
        UsageError: a name, version, hardware or counter is not of its form, or a ``mutable`` glob matches no file.
        InputError, NotFoundError: nothing a bundle can be made of lies at ``path``, or it changed meanwhile.
        ConflictError: the version has other content, the name another kind, or the counter would fall.
        ConfigError: the publisher's key is not readable.
        StorageError: the disk is full or failed; what is published already is untouched.
    """
    started = time.monotonic()
    utc_now = time.time() if utc_now is None else utc_now
    trusted = repo.trusted()
    known = trusted.find(name, version)
    model = known or trusted.latest(name)
    draft = _draft(
        name, version, kind, release_counter, hardware, access, mutable, model=model, new=not known
    )
    earlier = _versions(trusted, name, before=known)
    similar = _summary(store, model)
    stored: list[PieceId] = []
    with (
        Scan.of(path) as scan,
        PieceStore.open(store) as pieces,
        _room_given_back(store, repo, pieces, stored),
    ):
        draft.check(scan)
        for _ in range(_ATTEMPTS):
            chunking = _chunking(scan, similar, known)
            content = _chunk(
                scan,
                chunking,
                pieces,
                stored,
                dry_run=dry_run,
                fixed=known,
                progress=progress,
            )
            data = draft.manifest(scan, content)
            scan.recheck()
            digest = manifest.digest(data)
            if known is not None and known.digest != digest:
                raise _other_content(known)
            new = _new_wire_bytes(store, content, earlier)
            if dry_run:
                listed = known
                break
            catalogue.save_manifest(store, data)
            listed = _list(store, repo, draft, scan, content, data, new, utc_now)
            if listed is not None:
                break
        else:
            raise StorageError(
                f"pieces of {name}@{version} were removed while it was published: publish it again"
            )
    return Published(
        id=digest,
        name=name,
        version=version,
        kind=kind,
        release_counter=draft.release_counter,
        published_seq=None if listed is None else listed.published_seq,
        already_published=known is not None,
        payload_bytes=scan.payload_bytes,
        files=len(scan.files),
        pieces=len(content.piece_lengths),
        wire_bytes=content.wire_bytes,
        new_wire_bytes=new,
        shared_bytes=content.wire_bytes - new,
        stored_pieces=content.stored_pieces,
        returnable=[b.version for b in earlier if b.release_counter >= draft.release_counter],
        left_out=scan.left_out.names,
        left_out_count=scan.left_out.count,
        seconds=time.monotonic() - started,
    )


def list_bundles(store: GatewayStore) -> list[dict[str, Any]]:
    """Every published bundle, newest first."""
    listed = sorted(setup.repository(store).trusted().bundles, key=lambda b: -b.published_seq)
    return [_row(store, bundle) for bundle in listed]


def show(store: GatewayStore, name: str, version: str) -> dict[str, Any]:
    """One bundle with what its manifest says. Raises NotFoundError, VerificationError: the manifest is damaged."""
    trusted = setup.repository(store).trusted()
    bundle = _find(trusted, name, version)
    summary = catalogue.load_summary(store, bundle.digest)
    return {
        **_row(store, bundle),
        "manifest_bytes": bundle.length,
        "average_piece_bytes": summary.chunking.avg,
        "returnable": [
            other.version
            for other in _versions(trusted, name, before=bundle)
            if other.release_counter >= bundle.release_counter
        ],
    }


def verify(
    store: GatewayStore, name: str, version: str, *, progress: Progress | None = None
) -> dict[str, Any]:
    """Read and hash every piece again; ``bad`` lists the indexes of those that are not what was signed.

    They are not served from now on; publishing the same content again stores them anew.
    Raises NotFoundError. Raises VerificationError: the manifest itself is damaged or missing.
    """
    bundle = _find(setup.repository(store).trusted(), name, version)
    try:
        content = manifest.parse(load_manifest(store, bundle.digest))
    except NotFoundError as exc:
        raise VerificationError(f"{exc}: publish {name}@{version} again") from exc
    bad = []
    done = 0
    with PieceStore.open(store) as pieces:
        for index, length in enumerate(content.piece_lengths):
            if not _is_whole(pieces, content.piece_id(index), length):
                bad.append(index)
            done += length
            if progress is not None:
                progress(done, content.unique_bytes)
        if bad:
            pieces.mark_damaged(content.piece_id(index) for index in bad)
    return {
        "id": bundle.digest,
        "name": name,
        "version": version,
        "pieces": content.piece_count,
        "bad": bad,
    }


def remove(
    store: GatewayStore,
    repo: Repository,
    name: str,
    version: str,
    *,
    utc_now: float | None = None,
) -> dict[str, Any]:
    """Stop listing a bundle and drop the pieces no other bundle has. Devices keep what they hold.

    Raises NotFoundError. Raises ConflictError: a device is assigned it, or a standing rule names it.
    """
    utc_now = time.time() if utc_now is None else utc_now
    with store.atomic() as db:
        trusted = repo.trusted()
        bundle = _find(trusted, name, version)
        _refuse_assigned(store, trusted, bundle)
        repo.withdraw(bundle.kind, name, version, utc_now=utc_now)
        db.conn.execute("DELETE FROM bundles WHERE digest = ?", (bundle.digest,))
        extents = _drop_unshared(store, trusted, bundle)
        freed = sum(extent.length for extent in extents)
        store.emit(
            "operator",
            "bundle.removed",
            f"bundle:{name}@{version}",
            {"id": bundle.digest, "kind": bundle.kind, "freed_bytes": freed},
            utc_now=utc_now,
        )
    with PieceStore.open(store) as pieces:
        pieces.reclaim(extents)
    _delete_unlisted_manifest(store, repo, bundle)
    return {"id": bundle.digest, "name": name, "version": version, "freed_bytes": freed}


# --- publishing, step by step ----------------------------------------------------------------------------------------
def _draft(
    name: str,
    version: str,
    kind: Kind,
    release_counter: int | None,
    hardware: Sequence[str],
    access: Access,
    mutable: Sequence[str],
    *,
    model: BundleTarget | None,
    new: bool,
) -> _Draft:
    """What to publish; ``model`` is the version itself where it is published, else the one before it."""
    try:
        manifest.check_name(name)
        manifest.check_version(version)
    except VerificationError as exc:
        raise UsageError(str(exc)) from exc
    fits = sorted(set(hardware))
    for text in fits:
        try:
            msgspec.convert(text, manifest.Hardware)
        except msgspec.ValidationError as exc:
            raise UsageError(
                f"--hardware {text[:80]!a} is not 1 to 63 letters, digits, '.', '_' or '-', the first a letter or digit"
            ) from exc
    if len(fits) > MAX_HARDWARE:
        raise UsageError(f"a bundle can name {MAX_HARDWARE} kinds of hardware, not {len(fits)}")
    if release_counter is not None and not 0 <= release_counter <= MAX_RELEASE_COUNTER:
        raise UsageError(f"release counter {release_counter} is outside 0..{MAX_RELEASE_COUNTER}")
    if model is not None and model.kind != kind:
        raise ConflictError(
            f"{name} is a bundle of kind {model.kind} and a name belongs to one kind: "
            f"choose another name for {kind}"
        )
    floor = 0 if model is None else model.release_counter
    counter = floor if release_counter is None else release_counter
    if new and model is not None and counter < floor:
        raise ConflictError(
            f"release counter {counter} is below {floor} of {name}@{model.version}: "
            "devices that have committed that version would refuse this one"
        )
    return _Draft(name, version, kind, counter, fits, access, tuple(mutable))


def _summary(store: GatewayStore, model: BundleTarget | None) -> Summary | None:
    if model is None:
        return None
    try:
        return catalogue.load_summary(store, model.digest)
    except (NotFoundError, VerificationError):
        # A lost manifest must not keep new versions from being published; they only share less.
        return None


def _chunking(scan: Scan, similar: Summary | None, known: BundleTarget | None) -> Chunking:
    if known is not None and similar is not None:
        return similar.chunking
    before = None if similar is None else (similar.chunking, similar.payload_bytes)
    return publisher.choose_chunking([file.size for file in scan.files], before)


def _chunk(
    scan: Scan,
    chunking: Chunking,
    pieces: PieceStore,
    stored: list[PieceId],
    *,
    dry_run: bool,
    fixed: BundleTarget | None,
    progress: Progress | None,
) -> Content:
    while True:
        try:
            return publisher.chunk(
                scan, chunking, pieces, measure_only=dry_run, stored=stored, progress=progress
            )
        except TooManyPiecesError:
            # What is published has other content than what needs more pieces than it may have.
            if fixed is not None:
                raise _other_content(fixed) from None
            chunking = publisher.parameters(chunking.avg * 2)


@contextmanager
def _room_given_back(
    store: GatewayStore, repo: Repository, pieces: PieceStore, stored: list[PieceId]
) -> Iterator[None]:
    """When the disk fills up, drop what was ``stored`` in vain: the gateway's database needs room too."""
    try:
        yield
    except DiskFullError:
        with suppress(EdgeSyncError):
            with store.atomic() as db:
                extents = packs.drop(db.conn, _unlisted(store, repo.trusted(), set(stored)))
            pieces.reclaim(extents)
        raise


def _list(
    store: GatewayStore,
    repo: Repository,
    draft: _Draft,
    scan: Scan,
    content: Content,
    data: bytes,
    new_wire_bytes: int,
    utc_now: float,
) -> BundleTarget | None:
    """Sign, record and tell, in one transaction; None if a piece or the manifest is no longer held."""
    digest = manifest.digest(data)
    with store.atomic() as db:
        if packs.count_held(db.conn, content.ids()) != len(content.piece_lengths):
            return None
        if not catalogue.has_manifest(store, digest):
            return None
        before = repo.trusted().find(draft.name, draft.version)
        listed = repo.publish(
            draft.kind,
            draft.name,
            draft.version,
            digest,
            len(data),
            release_counter=draft.release_counter,
            hardware=draft.hardware,
            utc_now=utc_now,
        )
        if before is not None:
            return listed
        row = {
            "digest": digest,
            "published": utc_now,
            "access": draft.access,
            "payload_bytes": scan.payload_bytes,
            "files": len(scan.files),
            "directories": len(scan.directories),
            "symlinks": len(scan.symlinks),
            "pieces": len(content.piece_lengths),
            "wire_bytes": content.wire_bytes,
            "new_wire_bytes": new_wire_bytes,
        }
        db.table("bundles").insert(row)
        store.emit(
            "operator",
            "bundle.published",
            f"bundle:{draft.name}@{draft.version}",
            {**asdict(draft), **row, "published_seq": listed.published_seq},
            utc_now=utc_now,
        )
        return listed


def _new_wire_bytes(store: GatewayStore, content: Content, earlier: list[BundleTarget]) -> int:
    new = dict(zip(content.ids(), content.encoded_lengths, strict=True))
    for bundle in earlier:
        summary = _summary(store, bundle)
        if summary is not None:
            for piece_id in summary.ids():
                new.pop(piece_id, None)
    return sum(new.values())


def _other_content(known: BundleTarget) -> ConflictError:
    return ConflictError(
        f"{known.name}@{known.version} is published already with other content: choose another version"
    )


# --- the rest ------------------------------------------------------------------------------------------------------
def _versions(trusted: Trusted, name: str, *, before: BundleTarget | None) -> list[BundleTarget]:
    """Versions of ``name`` published before another one, or all; newest first."""
    found = [
        bundle
        for bundle in trusted.bundles
        if bundle.name == name and (before is None or bundle.published_seq < before.published_seq)
    ]
    return sorted(found, key=lambda bundle: -bundle.published_seq)


def _find(trusted: Trusted, name: str, version: str) -> BundleTarget:
    bundle = trusted.find(name, version)
    if bundle is None:
        raise NotFoundError(f"{name}@{version} is not published")
    return bundle


def _row(store: GatewayStore, bundle: BundleTarget) -> dict[str, Any]:
    known = store.one("SELECT * FROM bundles WHERE digest = ?", (bundle.digest,)) or {}
    known.pop("digest", None)
    assigned = _assigned(store, bundle)
    return {
        "id": bundle.digest,
        "name": bundle.name,
        "version": bundle.version,
        "kind": bundle.kind,
        "state": "assigned" if assigned else "published",
        "assigned": assigned,
        "release_counter": bundle.release_counter,
        "published_seq": bundle.published_seq,
        "hardware": list(bundle.hardware),
        # A bundle listed by other means than this gateway's own publish has no row: say what is known.
        "payload_bytes": 0,
        **known,
    }


def _assigned(store: GatewayStore, bundle: BundleTarget) -> int:
    row = store.one(
        "SELECT count(*) AS n FROM assignments WHERE name = ? AND version = ?",
        (bundle.name, bundle.version),
    )
    return 0 if row is None else int(row["n"])


def _refuse_assigned(store: GatewayStore, trusted: Trusted, bundle: BundleTarget) -> None:
    what = f"{bundle.name}@{bundle.version}"
    assigned = _assigned(store, bundle)
    if assigned:
        raise ConflictError(
            f"{what} is assigned to {assigned} device{'s' * (assigned > 1)}: "
            f"edgesync unassign {what} first"
        )
    alone = len(_versions(trusted, bundle.name, before=None)) == 1
    rule = store.one(
        "SELECT id FROM follow_rules WHERE name = ? AND (version = ? OR (version IS NULL AND ?))",
        (bundle.name, bundle.version, alone),
    )
    if rule is not None:
        raise ConflictError(
            f"{what} is named by a standing rule: edgesync unassign {bundle.name} --all first"
        )


def _delete_unlisted_manifest(store: GatewayStore, repo: Repository, removed: BundleTarget) -> None:
    """Delete the manifest of what was ``removed``, unless it was published again since.

    Not in the transaction of the removal, which may yet fail; in one all the same, since ``_list`` looks for the
    manifest in its own: the one that comes second sees what the other did.
    """
    with store.atomic():
        if all(bundle.digest != removed.digest for bundle in repo.trusted().bundles):
            catalogue.delete_manifest(store, removed.digest)


def _drop_unshared(store: GatewayStore, trusted: Trusted, bundle: BundleTarget) -> list[Extent]:
    """Drop the index rows of pieces only ``bundle`` has."""
    try:
        own = set(catalogue.load_summary(store, bundle.digest).ids())
    except (NotFoundError, VerificationError):
        return []
    return packs.drop(store.db.conn, _unlisted(store, trusted, own, besides=bundle))


def _unlisted(
    store: GatewayStore,
    trusted: Trusted,
    ids: set[PieceId],
    *,
    besides: BundleTarget | None = None,
) -> list[PieceId]:
    """Those of ``ids`` that no listed bundle has; none if any manifest is unreadable, for it may have them all."""
    try:
        for bundle in trusted.bundles:
            if bundle != besides:
                ids.difference_update(catalogue.load_summary(store, bundle.digest).ids())
    except (NotFoundError, VerificationError):
        return []
    return sorted(ids)


def _is_whole(pieces: PieceStore, piece_id: PieceId, length: int) -> bool:
    stored = pieces.read(piece_id)
    if stored is None:
        return False
    try:
        plain = piece_codec.decode(stored.encoding, stored.data, length)
    except VerificationError:
        return False
    return hashlib.sha256(plain).digest() == piece_id


__all__ = ["Published", "list_bundles", "load_manifest", "publish", "remove", "show", "verify"]
