"""What the gateway knows of its bundles beside the signed metadata: their manifests and what their pieces weigh.

Which bundles exist is said by the TUF targets alone; a row here is written and deleted in the same transaction as its
target. Manifests lie in ``blobs/`` under their digest, durable before the target that names them is signed.

Called by ``gateway.service.bundles``; daemon and seeder read manifests here.
"""

from collections.abc import Iterator
from typing import Final

import msgspec
from sqlite_utils import Database, Migrations

from edgesync import limits, manifest
from edgesync.errors import NotFoundError, VerificationError
from edgesync.ids import Digest, PieceId
from edgesync.manifest import Chunking
from edgesync.storage.atomic import replace_file
from gateway.packs import disk_errors
from gateway.store import GatewayStore

migrations = Migrations("catalogue")


@migrations()
def m001_bundles(db: Database) -> None:
    db.conn.execute(
        # new_wire_bytes: pieces no earlier version of the name had, when it was published.
        """CREATE TABLE bundles (
            digest TEXT PRIMARY KEY,
            published REAL NOT NULL,
            access TEXT NOT NULL,
            payload_bytes INTEGER NOT NULL,
            files INTEGER NOT NULL,
            directories INTEGER NOT NULL,
            symlinks INTEGER NOT NULL,
            pieces INTEGER NOT NULL,
            wire_bytes INTEGER NOT NULL,
            new_wire_bytes INTEGER NOT NULL) WITHOUT ROWID"""
    )


class Summary(msgspec.Struct, frozen=True):
    """The parts of a manifest that another version is compared with, decoded without its tables of files."""

    payload_bytes: int
    chunking: Chunking
    release_counter: int
    hardware: list[str]
    access: manifest.Access
    piece_ids: bytes

    def ids(self) -> Iterator[PieceId]:
        for start in range(0, len(self.piece_ids), 32):
            yield PieceId(self.piece_ids[start : start + 32])


_summary: Final = msgspec.json.Decoder(Summary)


def save_manifest(store: GatewayStore, data: bytes) -> Digest:
    """Keep a manifest's exact bytes; durable when it returns. Raises StorageError."""
    digest = manifest.digest(data)
    with disk_errors("making the folder of manifests"):
        store.datadir.blobs.mkdir(mode=0o700, exist_ok=True)
    replace_file(store.datadir.blobs, digest, data)
    return digest


def load_manifest(store: GatewayStore, digest: Digest) -> bytes:
    """The manifest of a bundle, as it was signed.

    Raises NotFoundError: not held. Raises VerificationError: what is on disk is not what was signed.
    """
    path = store.datadir.blobs / digest
    with disk_errors(f"reading manifest {manifest.short(digest)}"):
        try:
            with path.open("rb") as stream:
                data = stream.read(limits.MAX_MANIFEST_BYTES + 1)
        except FileNotFoundError as exc:
            raise NotFoundError(f"no manifest {manifest.short(digest)} is held here") from exc
    if manifest.digest(data) != digest:
        raise VerificationError(
            f"manifest {manifest.short(digest)} is damaged on disk: publish the bundle again"
        )
    return data


def has_manifest(store: GatewayStore, digest: Digest) -> bool:
    """Whether there is one, damaged or not."""
    return (store.datadir.blobs / digest).is_file()


def load_summary(store: GatewayStore, digest: Digest) -> Summary:
    """Raises what ``load_manifest`` raises."""
    return _summary.decode(load_manifest(store, digest))


def delete_manifest(store: GatewayStore, digest: Digest) -> None:
    with disk_errors(f"deleting manifest {manifest.short(digest)}"):
        (store.datadir.blobs / digest).unlink(missing_ok=True)


__all__ = [
    "Summary",
    "delete_manifest",
    "has_manifest",
    "load_manifest",
    "load_summary",
    "migrations",
    "save_manifest",
]
