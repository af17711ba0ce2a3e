"""The agent's ``state.db``: which pieces are durable, which bundles are here, what was moved.

Nothing in it must survive: it is rebuilt from disk. It decides nothing about trust (``device.trust_store``) and touches
no bundle files (``device.bundle_store``).

Invariants:

* piece bits are committed only by ``claim``, after the caller has made the bytes durable; losing the newest commits
  (WAL, ``synchronous=NORMAL``) only clears bits;
* a bitfield carries a checksum over (bundle, flush number, bits): one that does not match counts as empty;
* rows that say which version is active, and every commit that takes a claim back, are FULL;
* a failed sync may have taken frames of the log (``-wal``) that later, confirmed commits stand on: the log is written
  again, and checkpoints are made here, where their errors are seen, not by SQLite, which passes over them;
* an unreadable file is set aside as ``state.db.damaged`` and begun anew (``rebuilt``); one with migrations this program
  does not know is refused.

Methods are synchronous and safe from any thread; none belongs on an event loop.
"""

import array
import contextlib
import hashlib
import logging
import os
import sqlite3
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, Self

from sqlite_utils import Database

from device.migrations import STATE
from edgesync.bitfield import Bitfield
from edgesync.errors import DiskFullError, MalformedMessageError, StateCorruptError, StorageError
from edgesync.ids import BundleName, Digest, Version
from edgesync.storage.atomic import fsync_directory, storage_error, write_all

logger = logging.getLogger(__name__)

Source = Literal["gateway", "peer", "local", "import"]
"""Where a byte came from, everywhere bytes are counted."""

KILLED, POWER_CUT, DISTRUST = 1, 2, 3
"""How much of what an earlier run left must be looked at before it is believed."""
BUSY_TIMEOUT_S = 10.0
CHECKPOINT_WEIGHT = 256
"""Pages, roughly, the log may hold before it is copied into the database: two syncs, so not too often."""
_LIGHT, _HEAVY = 1, 4
_CORRUPT = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT})


@dataclass
class Counters:
    """What moved for one bundle since it was first seen, over all restarts; bytes as carried, local ones plain."""

    bytes_from_gateway: int = 0
    bytes_from_peers: int = 0
    bytes_local: int = 0
    bytes_import: int = 0
    bytes_sent: int = 0
    pieces_rejected: int = 0
    resumes: int = 0

    def total(self) -> int:
        """Changes whenever a counter does, since none ever falls."""
        return (
            self.bytes_from_gateway
            + self.bytes_from_peers
            + self.bytes_local
            + self.bytes_import
            + self.bytes_sent
            + self.pieces_rejected
            + self.resumes
        )

    def received(self, source: Source, size: int) -> None:
        match source:
            case "gateway":
                self.bytes_from_gateway += size
            case "peer":
                self.bytes_from_peers += size
            case "local":
                self.bytes_local += size
            case "import":
                self.bytes_import += size


@dataclass(frozen=True)
class BundleRow:
    """One bundle as the database knows it."""

    digest: Digest
    name: BundleName
    version: Version
    kind: str
    access: str
    release_counter: int
    payload_bytes: int
    unique_bytes: int
    piece_count: int
    state: Literal["staged", "held"]


@dataclass(frozen=True)
class Activating:
    """An activation that had begun; ``switch`` is False when only the tree was to be put in its place."""

    name: BundleName
    old: Digest | None
    new: Digest
    switch: bool


_BUNDLE_COLUMNS = tuple(field.name for field in fields(BundleRow))
_COUNTER_COLUMNS = tuple(field.name for field in fields(Counters))


class StateDatabase:
    """Open with ``open``; close with ``close``."""

    def __init__(self, path: Path, db: Database, *, rebuilt: bool) -> None:
        self.path = path
        self.db = db
        """For modules with tables of their own in this file; hold ``lock`` while using it."""
        self.lock = threading.RLock()
        self._log_weight = 0
        self.rebuilt = rebuilt
        """The file was new or unreadable: what lies on disk is the only record."""

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open or create, apply migrations.

        Raises:
            StorageError: the file belongs to a newer EdgeSync, or the disk fails.
            DiskFullError: no room to create it.
        """
        rebuilt = not path.exists()
        try:
            try:
                db = _connect(path)
            except sqlite3.DatabaseError as exc:
                if not _is_corrupt(exc):
                    raise
                _set_aside(path)
                rebuilt = True
                db = _connect(path)
        except sqlite3.Error as exc:
            raise database_error(exc, "opening state.db") from exc
        except OSError as exc:
            raise storage_error(exc, "opening state.db") from exc
        return cls(path, db, rebuilt=rebuilt)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Open for reading beside a running agent, or without one. Raises StorageError: it cannot be read."""
        try:
            connection = sqlite3.connect(
                f"file:{path}?mode=ro",
                uri=True,
                timeout=BUSY_TIMEOUT_S,
                isolation_level=None,
                check_same_thread=False,
            )
            db = Database(connection, execute_plugins=False, recursive_triggers=False)
            _refuse_newer(db)
        except sqlite3.Error as exc:
            raise database_error(exc, "reading state.db") from exc
        return cls(path, db, rebuilt=False)

    def close(self) -> None:
        with self.lock:
            self.db.close()

    # --- transactions ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def transaction(
        self, *, full: bool = False, weight: int = _HEAVY
    ) -> Iterator[sqlite3.Connection]:
        """One write transaction; ``full`` makes it durable before it returns.

        Raises:
            DiskFullError: no room for the commit; nothing was changed.
            StorageError: the database failed; whether the commit happened is for the next start to find out.
        """
        with self.lock:
            connection = self.db.conn
            try:
                if full:
                    connection.execute("pragma synchronous=full")
                connection.execute("begin immediate")
                try:
                    yield connection
                    connection.execute("commit")
                except BaseException:
                    if connection.in_transaction:
                        with contextlib.suppress(sqlite3.Error):
                            connection.execute("rollback")
                    raise
            except sqlite3.Error as exc:
                if _primary(exc) == sqlite3.SQLITE_IOERR:
                    with contextlib.suppress(OSError):
                        self.rewrite_log()
                raise database_error(exc, "writing state.db") from exc
            finally:
                if full:
                    with contextlib.suppress(sqlite3.Error):
                        connection.execute("pragma synchronous=normal")
            self._log_weight += weight
            if self._log_weight >= CHECKPOINT_WEIGHT:
                self._checkpoint()

    def _checkpoint(self) -> None:
        self._log_weight = 0
        try:
            self.db.conn.execute("pragma wal_checkpoint(passive)").fetchall()
        except sqlite3.Error as exc:
            logger.warning("copying the log into state.db failed, it is written again: %s", exc)
            try:
                self.rewrite_log()
            except OSError as again:
                raise storage_error(again, "writing state.db") from again

    def rewrite_log(self) -> None:
        """After any failed sync on this disk: write the log's bytes once more and make them durable.

        The page cache still holds what SQLite wrote, but may count it as clean: a hole in the log would take every
        later commit with it at the next power cut. Raises OSError: a second failure.
        """
        with self.lock:
            # Locks are on the database and its index: opening and closing the log here releases none of them.
            try:
                fd = os.open(f"{self.path}-wal", os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                return
            try:
                offset = 0
                while data := os.pread(fd, 1 << 20, offset):
                    write_all(fd, data, offset)
                    offset += len(data)
                os.fsync(fd)
            finally:
                os.close(fd)

    def _rows(self, sql: str, *parameters: object) -> list[tuple[object, ...]]:
        with self.lock:
            try:
                return self.db.conn.execute(sql, parameters).fetchall()
            except sqlite3.Error as exc:
                raise database_error(exc, "reading state.db") from exc

    # --- starts and stops --------------------------------------------------------------------------------------------

    def begin_run(self, boot_id: str) -> tuple[int, Literal["clean", "killed", "power"]]:
        """Record that a store is in use. Returns its epoch, higher than any before, and how the last run ended."""
        meta = {str(key): str(value) for key, value in self._rows("select key, value from meta")}
        if "epoch" not in meta or meta.get("clean") == "1":
            ended: Literal["clean", "killed", "power"] = "clean"
        else:
            ended = "killed" if meta.get("boot_id") == boot_id else "power"
        epoch = int(meta.get("epoch", "0")) + 1
        if self.rebuilt:
            # A number peers have not seen under this store's former self.
            epoch = int.from_bytes(os.urandom(3), "big") + 1
            ended = "power"
        with self.transaction(full=True) as connection:
            if ended != "clean":
                # Kept per bundle: a start that ends before it looked must not make the next one believe.
                found = KILLED if ended == "killed" else POWER_CUT
                connection.execute(
                    "update bundles set unchecked = max(unchecked, ?) where state = 'staged'",
                    (found,),
                )
            connection.executemany(
                "insert into meta values (?, ?) on conflict (key) do update set value = excluded.value",
                [("epoch", str(epoch)), ("boot_id", boot_id), ("clean", "0")],
            )
        return epoch, ended

    def meta(self, key: str) -> str | None:
        """A small fact kept under a name; None: not there."""
        rows = self._rows("select value from meta where key = ?", key)
        return str(rows[0][0]) if rows else None

    def set_meta(self, key: str, value: str) -> None:
        with self.transaction() as connection:
            connection.execute("insert or replace into meta values (?, ?)", (key, value))

    def end_run(self) -> None:
        """Record a clean stop: everything written is claimed or never will be."""
        with self.transaction(full=True) as connection:
            connection.execute("insert or replace into meta values ('clean', '1')")

    # --- bundles -----------------------------------------------------------------------------------------------------

    def bundles(self) -> list[BundleRow]:
        sql = f"select {', '.join(_BUNDLE_COLUMNS)} from bundles order by name, version, digest"  # noqa: S608  # constants
        return [BundleRow(*row) for row in self._rows(sql)]  # type: ignore[arg-type]

    def put_bundle(self, row: BundleRow, bits: Bitfield, *, unchecked: int = 0) -> None:
        """Record a bundle and exactly these claims, durably; one that is known keeps its counters."""
        marks = ", ".join("?" * len(_BUNDLE_COLUMNS))
        with self.transaction(full=True) as connection:
            connection.execute(
                f"insert into bundles ({', '.join(_BUNDLE_COLUMNS)}, unchecked) values ({marks}, ?) "  # noqa: S608  # constants
                "on conflict (digest) do update set state = excluded.state, unchecked = excluded.unchecked",
                (*asdict(row).values(), unchecked),
            )
            connection.execute("delete from flushes where digest = ?", (row.digest,))
            _put_bits(connection, row.digest, bits, _next_flush(connection, row.digest))

    def unchecked(self, digest: Digest) -> int:
        """How a run ended whose leavings of this bundle were not looked at: 0, KILLED, POWER_CUT, DISTRUST."""
        rows = self._rows("select unchecked from bundles where digest = ?", digest)
        return int(str(rows[0][0])) if rows else 0

    def set_checked(self, digest: Digest) -> None:
        with self.transaction() as connection:
            connection.execute("update bundles set unchecked = 0 where digest = ?", (digest,))

    def distrust(self, digest: Digest) -> None:
        """A sync failed: until this start ends well, what is read back may never have reached the disk."""
        with self.transaction() as connection:
            connection.execute(
                "update bundles set unchecked = ? where digest = ?", (DISTRUST, digest)
            )

    def forget_bundle(self, digest: Digest) -> None:
        """Drop a bundle's row, bits and counters, durably."""
        with self.transaction(full=True) as connection:
            for table in ("bundles", "bits", "flushes"):
                connection.execute(f"delete from {table} where digest = ?", (digest,))  # noqa: S608  # constants

    def counters(self, digest: Digest) -> Counters:
        sql = f"select {', '.join(_COUNTER_COLUMNS)} from bundles where digest = ?"  # noqa: S608  # constants
        rows = self._rows(sql, digest)
        return Counters(*rows[0]) if rows else Counters()  # type: ignore[arg-type]

    def save_counters(self, digest: Digest, counters: Counters) -> None:
        with self.transaction(weight=_LIGHT) as connection:
            _put_counters(connection, digest, counters)

    # --- pieces ------------------------------------------------------------------------------------------------------

    def bits(self, digest: Digest, piece_count: int) -> Bitfield:
        """The pieces claimed durable; empty when the record is missing or damaged."""
        rows = self._rows("select bits, checksum, flush from bits where digest = ?", digest)
        if not rows:
            return Bitfield(piece_count)
        bits, checksum, flush = rows[0]
        if (
            isinstance(bits, bytes)
            and isinstance(flush, int)
            and checksum == _checksum(digest, flush, bits)
        ):
            with contextlib.suppress(MalformedMessageError):
                return Bitfield.from_bytes(bits, piece_count)
        logger.warning("the record of pieces held of %s is damaged: all are checked anew", digest)
        return Bitfield(piece_count)

    def claim(
        self, digest: Digest, bits: Bitfield, pieces: Sequence[int], counters: Counters
    ) -> None:
        """Record ``bits``, which gained ``pieces``. The caller has made their bytes and names durable before."""
        with self.transaction() as connection:
            flush = _next_flush(connection, digest)
            _put_bits(connection, digest, bits, flush)
            connection.execute(
                "insert into flushes values (?, ?, ?)", (digest, flush, _pack(pieces))
            )
            connection.execute(
                "delete from flushes where digest = ? and flush <= ?", (digest, flush - 2)
            )
            _put_counters(connection, digest, counters)

    def unclaim(self, digest: Digest, bits: Bitfield) -> None:
        """Record ``bits`` that lost some pieces: durable at once, since their bytes may be overwritten next."""
        with self.transaction(full=True) as connection:
            _put_bits(connection, digest, bits, _next_flush(connection, digest))

    def last_flushes(self, digest: Digest) -> list[int]:
        """Pieces of the last two flush epochs: what a card that lied about a flush may have lost."""
        found: list[int] = []
        for (packed,) in self._rows("select pieces from flushes where digest = ?", digest):
            found.extend(_unpack(packed))
        return found

    # --- activation --------------------------------------------------------------------------------------------------

    def active(self) -> dict[BundleName, Digest]:
        rows = self._rows("select name, digest from active")
        return {BundleName(str(name)): Digest(str(digest)) for name, digest in rows}

    def activating(self) -> list[Activating]:
        return [
            Activating(
                BundleName(str(name)),
                None if old is None else Digest(str(old)),
                Digest(str(new)),
                bool(switch),
            )
            for name, old, new, switch in self._rows(
                "select name, old, new, switch from activating"
            )
        ]

    def begin_activation(self, activating: Activating) -> None:
        """Durable when it returns."""
        with self.transaction(full=True) as connection:
            connection.execute(
                "insert or replace into activating values (?, ?, ?, ?)",
                (activating.name, activating.old, activating.new, activating.switch),
            )

    def end_activation(
        self, name: BundleName, *, held: Digest | None, active: Digest | None
    ) -> None:
        """Record how an activation ended: which bundle's tree is in its place, which one is active; durable."""
        with self.transaction(full=True) as connection:
            connection.execute("delete from activating where name = ?", (name,))
            if held is not None:
                connection.execute("update bundles set state = 'held' where digest = ?", (held,))
            if active is None:
                connection.execute("delete from active where name = ?", (name,))
            else:
                connection.execute("insert or replace into active values (?, ?)", (name, active))


def database_error(exc: sqlite3.Error, doing: str) -> StorageError:
    """The project's own error for one of SQLite's."""
    if _primary(exc) == sqlite3.SQLITE_FULL:
        return DiskFullError(f"the disk is full: {doing} needs more space")
    if _is_corrupt(exc):
        return StateCorruptError(f"{doing} failed: {exc}")
    return StorageError(f"{doing} failed: {exc}")


def _is_corrupt(exc: sqlite3.Error) -> bool:
    return _primary(exc) in _CORRUPT


def _primary(exc: sqlite3.Error) -> int:
    """SQLite's result code without what it adds about where."""
    return int(getattr(exc, "sqlite_errorcode", 0)) & 0xFF


def _connect(path: Path) -> Database:
    """Raises sqlite3.Error, with its code; StorageError for a newer file."""
    connection = sqlite3.connect(
        path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
    )
    try:
        created = connection.execute("pragma page_count").fetchone()[0] == 0
        connection.execute("pragma journal_mode=wal")
        connection.execute("pragma synchronous=full")
        connection.execute("pragma wal_autocheckpoint=0")
        connection.execute("pragma cache_size=-512")
        # Also finds what a torn page or a bad card left: the file is small, and a wrong row here is a false claim.
        verdict = connection.execute("pragma quick_check(1)").fetchone()[0]
        if verdict != "ok":
            raise _corrupt(str(verdict))  # noqa: TRY301  # leaves by the same door as SQLite's own
        db = Database(connection, execute_plugins=False, recursive_triggers=False)
        _refuse_newer(db)
        STATE.apply(db)
        connection.execute("pragma synchronous=normal")
        if created:
            path.chmod(0o600)
            fsync_directory(path.parent)
    except BaseException:
        connection.close()
        raise
    return db


def _corrupt(verdict: str) -> sqlite3.DatabaseError:
    error = sqlite3.DatabaseError(verdict)
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    return error


def _refuse_newer(db: Database) -> None:
    known = {migration.name for migration in STATE._migrations}  # noqa: SLF001  # no public list
    unknown = sorted({migration.name for migration in STATE.applied(db)} - known)
    if unknown:
        raise StorageError(
            f"state.db was written by a newer EdgeSync (it has {unknown[-1]}): update this program"
        )


def _set_aside(path: Path) -> None:
    logger.error("state.db is unreadable and is rebuilt from disk; the old one is state.db.damaged")
    path.replace(path.with_name(path.name + ".damaged"))
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    fsync_directory(path.parent)


def _put_counters(connection: sqlite3.Connection, digest: Digest, counters: Counters) -> None:
    sets = ", ".join(f"{column} = ?" for column in _COUNTER_COLUMNS)
    connection.execute(
        f"update bundles set {sets} where digest = ?",  # noqa: S608  # constants
        (*asdict(counters).values(), digest),
    )


def _next_flush(connection: sqlite3.Connection, digest: Digest) -> int:
    row = connection.execute("select flush from bits where digest = ?", (digest,)).fetchone()
    return int(row[0]) + 1 if row else 1


def _put_bits(connection: sqlite3.Connection, digest: Digest, bits: Bitfield, flush: int) -> None:
    data = bits.to_bytes()
    connection.execute(
        "insert or replace into bits values (?, ?, ?, ?)",
        (digest, data, _checksum(digest, flush, data), flush),
    )


def _checksum(digest: Digest, flush: int, bits: bytes) -> bytes:
    return hashlib.blake2b(f"{digest} {flush} ".encode() + bits, digest_size=16).digest()


def _pack(pieces: Sequence[int]) -> bytes:
    packed = array.array("I", pieces)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _unpack(packed: object) -> Iterator[int]:
    if not isinstance(packed, bytes) or len(packed) % 4:
        return
    values = array.array("I")
    values.frombytes(packed)
    if sys.byteorder == "big":
        values.byteswap()
    yield from values
