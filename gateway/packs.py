"""Where the gateway keeps pieces: append-only pack files and an index of them in the gateway's database.

It stores pieces in the form they are sent in, finds them by id and notices when their bytes have rotted; it knows
nothing of bundles and does not decide what may be dropped. Layout: ``packs/NNNNNN.pack`` holds encoded pieces back to
back, nothing else; table ``pieces`` says where each one lies, table ``packs`` how far a pack is durable.

Invariants:

* an index row is committed only after the bytes it points at are on stable storage;
* one process at a time appends to a pack: it holds the file's ``flock``, so any number of publishers may run;
* what lies behind the durable end of a pack is the torn tail of a killed publisher: the next one to lock that pack
  cuts it off;
* bytes below the durable end are never rewritten; space is given back by punching holes and deleting empty packs;
* ``read`` returns bytes that match the checksum taken when they were stored, or None.

The publisher appends, the seeder reads from worker threads, ``bundle verify`` and ``bundle remove`` mark and drop.
"""

import ctypes
import fcntl
import logging
import os
import sqlite3
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple, Self

from sqlite_utils import Database, Migrations

from edgesync.errors import FsyncFailedError, StorageError
from edgesync.ids import PieceId
from edgesync.piece_codec import ENCODINGS, Encoding
from edgesync.storage.atomic import FULL_ERRNOS, fsync_directory, storage_error
from gateway.store import GatewayStore, connect, storage_errors

logger = logging.getLogger(__name__)

PACK_BYTES: Final = 256 * 1024 * 1024
"""A pack that has reached this is not appended to any more."""
MAX_OPEN_PACKS: Final = 64
_IDS_PER_QUERY: Final = 500
_SUFFIX: Final = ".pack"
_PUNCH_HOLE: Final = 0x01 | 0x02
"""FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE."""

migrations = Migrations("content")


@migrations()
def m001_pieces(db: Database) -> None:
    for statement in (
        # size: durable end of the file; live: bytes of it that rows of pieces point at.
        """CREATE TABLE packs (
            id INTEGER PRIMARY KEY,
            size INTEGER NOT NULL,
            live INTEGER NOT NULL)""",
        """CREATE TABLE pieces (
            id BLOB PRIMARY KEY,
            pack INTEGER NOT NULL REFERENCES packs (id),
            offset INTEGER NOT NULL,
            length INTEGER NOT NULL,
            plain_length INTEGER NOT NULL,
            encoding INTEGER NOT NULL,
            checksum INTEGER NOT NULL,
            damaged INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID""",
        "CREATE INDEX pieces_damaged ON pieces (id) WHERE damaged",
    ):
        db.conn.execute(statement)


class NewPiece(NamedTuple):
    """A piece to store; ``data`` is its encoded form."""

    id: PieceId
    encoding: Encoding
    data: bytes | memoryview
    plain_length: int


class StoredPiece(NamedTuple):
    encoding: Encoding
    data: bytes
    plain_length: int


class Extent(NamedTuple):
    """Bytes of a pack no row points at any more."""

    pack: int
    offset: int
    length: int


class _Descriptor:
    """A file descriptor that lives as long as somebody reads through it, so that a cache may drop it at any time."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


class PieceStore:
    """Thread-safe. ``add`` calls take turns; ``read`` and ``sizes`` go on meanwhile."""

    def __init__(self, directory: Path, database: Path) -> None:
        self._directory = directory
        self._database = database
        self._reader = connect(database)
        self._reader_lock = threading.Lock()
        self._descriptors: OrderedDict[int, _Descriptor] = OrderedDict()
        self._descriptors_lock = threading.Lock()
        self._add_lock = threading.Lock()
        self._pack: _OpenPack | None = None

    @classmethod
    def open(cls, store: GatewayStore) -> Self:
        """Use the packs of a gateway; ``store`` has applied the migrations and is not used afterwards."""
        directory = store.datadir.packs
        with disk_errors(f"making {directory}"):
            directory.mkdir(mode=0o700, exist_ok=True)
        return cls(directory, store.datadir.database)

    def close(self) -> None:
        with self._add_lock:
            if self._pack is not None:
                self._pack.close()
                self._pack = None
        with self._descriptors_lock:
            self._descriptors.clear()
        with self._reader_lock:
            self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    # --- reading ---------------------------------------------------------------------------------------------------
    def read(self, piece_id: PieceId) -> StoredPiece | None:
        """The piece in the form it is stored in; None if it is not held or its bytes are damaged."""
        with storage_errors(self._database), self._reader_lock:
            row = self._reader.execute(
                "SELECT pack, offset, length, plain_length, encoding, checksum FROM pieces"
                " WHERE id = ? AND NOT damaged",
                (piece_id,),
            ).fetchone()
        if row is None:
            return None
        pack, offset, length, plain_length, encoding, checksum = row
        try:
            # Named, so that it outlives the call: the cache may drop it meanwhile.
            descriptor = self._descriptor(pack)
            data = os.pread(descriptor.fd, length, offset)
        except OSError as exc:
            logger.warning("cannot read pack %06d: %s", pack, exc)
            return None
        if len(data) != length or zlib.crc32(data) != checksum:
            logger.warning(
                "piece %s in pack %06d is damaged: run edgesync bundle verify",
                piece_id.hex()[:12],
                pack,
            )
            return None
        return StoredPiece(ENCODINGS[encoding], data, plain_length)

    def sizes(self, ids: Iterable[PieceId]) -> dict[PieceId, int]:
        """Encoded length in bytes of each of ``ids`` that is held and not known to be damaged."""
        with storage_errors(self._database), self._reader_lock:
            return _held(self._reader, list(ids))

    def has(self, ids: Iterable[PieceId]) -> set[PieceId]:
        return set(self.sizes(ids))

    def _descriptor(self, pack: int) -> _Descriptor:
        with self._descriptors_lock:
            held = self._descriptors.get(pack)
            if held is None:
                held = _Descriptor(os.open(self._path(pack), os.O_RDONLY | os.O_CLOEXEC))
                self._descriptors[pack] = held
                if len(self._descriptors) > MAX_OPEN_PACKS:
                    self._descriptors.popitem(last=False)
            self._descriptors.move_to_end(pack)
            return held

    def _path(self, pack: int) -> Path:
        return self._directory / f"{pack:06d}{_SUFFIX}"

    # --- appending -------------------------------------------------------------------------------------------------
    def add(self, batch: Sequence[NewPiece]) -> None:
        """Store pieces; when it returns they survive a power cut. Pieces held already are passed over.

        Raises DiskFullError: nothing of the batch is stored. Raises FsyncFailedError: the disk may have lost it.
        """
        if not batch:
            return
        with self._add_lock:
            if self._pack is not None and self._pack.size >= PACK_BYTES:
                self._pack.close()
                self._pack = None
            if self._pack is None:
                self._pack = _OpenPack.find(self._directory, self._database)
            try:
                self._pack.append(batch)
            except BaseException:
                # Whatever reached the file lies behind its durable end; the next writer cuts it off.
                self._pack.close()
                self._pack = None
                raise

    # --- dropping --------------------------------------------------------------------------------------------------
    def mark_damaged(self, ids: Iterable[PieceId]) -> None:
        """Remember that these pieces are not whole; publishing their content again stores them anew."""
        with storage_errors(self._database), closing(connect(self._database)) as db, db:
            db.executemany("UPDATE pieces SET damaged = 1 WHERE id = ?", [(i,) for i in ids])

    def reclaim(self, extents: Iterable[Extent]) -> None:
        """Give the space of dropped pieces back to the file system, as far as it can; call it after the commit."""
        by_pack: dict[int, list[Extent]] = {}
        for extent in extents:
            by_pack.setdefault(extent.pack, []).append(extent)
        for pack, parts in sorted(by_pack.items()):
            with suppress(OSError):
                if not self._delete_if_empty(pack):
                    _punch(self._path(pack), parts)

    def _delete_if_empty(self, pack: int) -> bool:
        path = self._path(pack)
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            with storage_errors(self._database), closing(connect(self._database)) as db:
                live = db.execute("SELECT live FROM packs WHERE id = ?", (pack,)).fetchone()
            if live is None or live[0] > 0:
                return False
            # Its row stays, so that the number is never given to another file: readers keep descriptors by it.
            path.unlink()
            return True
        finally:
            os.close(fd)


class _OpenPack:
    """The pack this process appends to, locked."""

    def __init__(self, fd: int, number: int, size: int, database: Path) -> None:
        self._fd = fd
        self._number = number
        self.size = size
        self._database = database
        self._db = connect(database)

    @classmethod
    def find(cls, directory: Path, database: Path) -> Self:
        """Lock the first pack that is neither full nor in use, or make one."""
        with (
            disk_errors(f"adding a pack to {directory}"),
            storage_errors(database),
            closing(connect(database)) as db,
        ):
            sizes = dict(db.execute("SELECT id, size FROM packs"))
            numbers = sorted(_numbers(directory))
            for number in numbers:
                if sizes.get(number, 0) < PACK_BYTES:
                    found = cls._lock(directory, number, db, database)
                    if found is not None:
                        return found
            number = max([0, *numbers, *sizes]) + 1
            while True:
                with suppress(FileExistsError):
                    path = directory / f"{number:06d}{_SUFFIX}"
                    os.close(
                        os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                    )
                    fsync_directory(directory)
                    found = cls._lock(directory, number, db, database)
                    if found is not None:
                        return found
                number += 1

    @classmethod
    def _lock(
        cls, directory: Path, number: int, db: sqlite3.Connection, database: Path
    ) -> Self | None:
        path = directory / f"{number:06d}{_SUFFIX}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # ``remove`` may have deleted the file between the two calls.
            if os.fstat(fd).st_nlink == 0:
                os.close(fd)
                return None
            # Only now, under the lock, is the durable end certain to stay what it is.
            with db:
                db.execute("INSERT OR IGNORE INTO packs VALUES (?, 0, 0)", (number,))
            size = db.execute("SELECT size FROM packs WHERE id = ?", (number,)).fetchone()[0]
            if size >= PACK_BYTES or os.fstat(fd).st_size < size:
                os.close(fd)
                return None
            os.ftruncate(fd, size)
            return cls(fd, number, size, database)
        except BlockingIOError:
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise

    def append(self, batch: Sequence[NewPiece]) -> None:
        end = self.size + sum(len(piece.data) for piece in batch)
        name = f"pack {self._number:06d}"
        try:
            with disk_errors(f"writing {name}"):
                _write_all(self._fd, [piece.data for piece in batch], self.size)
                try:
                    os.fdatasync(self._fd)
                except OSError as exc:
                    if exc.errno in FULL_ERRNOS:
                        raise
                    raise FsyncFailedError(
                        f"the disk did not confirm that {name} was written: {exc.strerror}"
                    ) from exc
        except StorageError:
            with suppress(OSError):
                os.ftruncate(self._fd, self.size)
            raise
        rows = []
        offset = self.size
        for piece in batch:
            length = len(piece.data)
            rows.append(
                (
                    piece.id,
                    self._number,
                    offset,
                    length,
                    piece.plain_length,
                    ENCODINGS.index(piece.encoding),
                    zlib.crc32(piece.data),
                )
            )
            offset += length
        with storage_errors(self._database):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                _drop_damaged(self._db, [row[0] for row in rows])
                held = _held(self._db, [row[0] for row in rows])
                # Another publisher may have stored some of them meanwhile: our copies are lost space.
                fresh = {row[0]: row for row in rows if row[0] not in held}
                self._db.executemany(
                    "INSERT INTO pieces (id, pack, offset, length, plain_length, encoding, checksum)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?)",
                    list(fresh.values()),
                )
                self._db.execute(
                    "UPDATE packs SET size = ?, live = live + ? WHERE id = ?",
                    (end, sum(row[3] for row in fresh.values()), self._number),
                )
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
        self.size = end

    def close(self) -> None:
        self._db.close()
        os.close(self._fd)


def drop(db: sqlite3.Connection, ids: Iterable[PieceId]) -> list[Extent]:
    """Delete the index rows of ``ids`` inside the caller's transaction; hand the result to ``reclaim`` after it."""
    extents = [
        Extent(*row)
        for piece_id in ids
        for row in db.execute(
            "DELETE FROM pieces WHERE id = ? RETURNING pack, offset, length", (piece_id,)
        ).fetchall()
    ]
    freed: dict[int, int] = {}
    for extent in extents:
        freed[extent.pack] = freed.get(extent.pack, 0) + extent.length
    db.executemany(
        "UPDATE packs SET live = live - ? WHERE id = ?", [(n, pack) for pack, n in freed.items()]
    )
    return extents


def count_held(db: sqlite3.Connection, ids: Iterable[PieceId]) -> int:
    """How many of ``ids`` are held, as the caller's transaction sees it."""
    return len(_held(db, list(ids)))


def _held(db: sqlite3.Connection, ids: Sequence[PieceId]) -> dict[PieceId, int]:
    found: dict[PieceId, int] = {}
    for start in range(0, len(ids), _IDS_PER_QUERY):
        part = ids[start : start + _IDS_PER_QUERY]
        marks = ",".join("?" * len(part))
        found.update(
            db.execute(
                f"SELECT id, length FROM pieces WHERE NOT damaged AND id IN ({marks})",  # noqa: S608 - marks only
                part,
            )
        )
    return found


def _drop_damaged(db: sqlite3.Connection, ids: Sequence[PieceId]) -> None:
    damaged = {row[0] for row in db.execute("SELECT id FROM pieces WHERE damaged")}
    if damaged:
        drop(db, [piece_id for piece_id in ids if piece_id in damaged])


@contextmanager
def disk_errors(doing: str) -> Iterator[None]:
    """Map an OSError met while ``doing`` something to the gateway's own files."""
    try:
        yield
    except OSError as exc:
        raise storage_error(exc, doing) from exc


def _numbers(directory: Path) -> Iterator[int]:
    for path in directory.iterdir():
        if path.suffix == _SUFFIX and path.stem.isdecimal():
            yield int(path.stem)


def _write_all(fd: int, parts: Sequence[bytes | memoryview], offset: int) -> None:
    limit = os.sysconf("SC_IOV_MAX")
    for start in range(0, len(parts), limit):
        vector = list(parts[start : start + limit])
        while vector:
            written = os.pwritev(fd, vector, offset)
            offset += written
            while vector and written >= len(vector[0]):
                written -= len(vector.pop(0))
            if written:
                vector[0] = memoryview(vector[0])[written:]


def _punch(path: Path, extents: Sequence[Extent]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    fallocate = libc.fallocate
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        for offset, length in _joined(extents):
            if fallocate(fd, _PUNCH_HOLE, offset, length) != 0:
                return
    finally:
        os.close(fd)


def _joined(extents: Sequence[Extent]) -> Iterator[tuple[int, int]]:
    start = end = -1
    for extent in sorted(extents):
        if extent.offset == end:
            end += extent.length
            continue
        if end > start:
            yield start, end - start
        start, end = extent.offset, extent.offset + extent.length
    if end > start:
        yield start, end - start


__all__ = [
    "PACK_BYTES",
    "Extent",
    "NewPiece",
    "PieceStore",
    "StoredPiece",
    "count_held",
    "disk_errors",
    "drop",
    "migrations",
]
