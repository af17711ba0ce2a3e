"""The gateway's database: the truth about devices, tokens, assignments and everything that happened.

One SQLite file in WAL mode that the daemon and any number of commands open at once. It opens it, migrates it, gives one
kind of write transaction and the append-only ``events`` log; what the tables mean is the business of the modules that
own them. Invariants:

* a write happens inside ``atomic()``, which takes the write lock at its start, so what it read is still true when it
  commits;
* an event is inserted in the same transaction as the change it tells of, and never changed or deleted;
* event ids only grow, in the order of commit.

A GatewayStore may move between threads, but only one may use it at a time: the daemon gives it to its one writer
thread. Readers elsewhere open their own.
"""

import importlib
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Self

from sqlite_utils import Database, Migrations

from edgesync.errors import ConfigError, DiskFullError, StateCorruptError, StorageError
from edgesync.storage.datadir import DataDir

BUSY_TIMEOUT_S: Final = 10.0
MAX_EVENT_DATA_BYTES: Final = 16 * 1024
"""Largest ``data`` of one event: a device's report is capped far below it."""

MIGRATIONS: Final[tuple[str, ...]] = (
    "gateway.migrations",
    "gateway.packs",
    "gateway.catalogue",
    "gateway.repository",
)
"""Modules that own tables, in the order their ``migrations`` set is applied."""


class GatewayStore:
    def __init__(self, datadir: DataDir, db: Database) -> None:
        self.datadir = datadir
        self.db = db

    @classmethod
    def open(cls, datadir: DataDir, *, migrate: bool = True) -> Self:
        """Open the database of a gateway's directory, making and migrating it as needed.

        Raises StateCorruptError: the file is damaged. Raises ConfigError: it cannot be opened, or is newer.
        """
        path = datadir.database
        with storage_errors(path):
            if not path.exists():
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            db = Database(connect(path))
            try:
                if migrate:
                    _migrate(db, path)
            except BaseException:
                db.close()
                raise
        return cls(datadir, db)

    def close(self) -> None:
        self.db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    @contextmanager
    def atomic(self) -> Iterator[Database]:
        """One write transaction (``BEGIN IMMEDIATE``); inside another one, a savepoint of it."""
        with storage_errors(self.datadir.database):
            if self.db.conn.in_transaction:
                with self.db.atomic():
                    yield self.db
                return
            self.db.conn.execute("BEGIN IMMEDIATE")
            try:
                yield self.db
                self.db.conn.execute("COMMIT")
            except BaseException:
                if self.db.conn.in_transaction:
                    self.db.conn.execute("ROLLBACK")
                raise

    def emit(
        self,
        actor: str,
        kind: str,
        subject: str,
        data: Mapping[str, Any] | None = None,
        *,
        utc_now: float | None = None,
    ) -> int:
        """Append one event and return its id; call it inside the transaction of the change it tells of.

        ``actor`` is ``operator``, ``gateway`` or ``device:ID``; ``kind`` a dotted past tense (``device.joined``);
        ``subject`` what it is about (``device:ID``, ``bundle:NAME@V``, ``token:ID``).
        """
        text = json.dumps(data or {}, sort_keys=True, separators=(",", ":"))
        if len(text) > MAX_EVENT_DATA_BYTES:
            text = json.dumps({"truncated": len(text)})
        with self.atomic() as db:
            cursor = db.conn.execute(
                "INSERT INTO events (ts, actor, kind, subject, data) VALUES (?, ?, ?, ?, ?)",
                (time.time() if utc_now is None else utc_now, actor, kind, subject, text),
            )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def data_version(self) -> int:
        """A number that changes when another connection committed; cheap enough to poll."""
        return int(self.db.conn.execute("PRAGMA data_version").fetchone()[0])

    def one(self, sql: str, parameters: tuple[Any, ...] = ()) -> dict[str, Any] | None:
        """First row of a query as a dict, or None."""
        for row in self.rows(sql, parameters):
            return row
        return None

    def rows(self, sql: str, parameters: tuple[Any, ...] = ()) -> list[dict[str, Any]]:
        with storage_errors(self.datadir.database):
            cursor = self.db.conn.execute(sql, parameters)
            names = [column[0] for column in cursor.description]
            return [dict(zip(names, row, strict=True)) for row in cursor]


def connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """A connection with the settings every one of ours has; the caller keeps it to one thread at a time."""
    mode = "ro" if read_only else "rw"
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}",
        uri=True,
        timeout=BUSY_TIMEOUT_S,
        check_same_thread=False,
    )
    if not read_only:
        connection.execute("PRAGMA journal_mode=WAL")
    # An acknowledged command must survive a power cut: tokens are spent and versions allocated in here.
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")
    return connection


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Map SQLite's errors about ``path`` to ours, once."""
    try:
        yield
    except sqlite3.Error as exc:
        raise _mapped(exc, path) from exc


def _mapped(exc: sqlite3.Error, path: Path) -> Exception:
    match getattr(exc, "sqlite_errorcode", 0) & 0xFF:
        case sqlite3.SQLITE_FULL:
            return DiskFullError(f"no space left for {path}")
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
            return StateCorruptError(f"{path} is damaged ({exc}): restore a backup")
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return StorageError(
                f"{path} stayed locked by another process for {BUSY_TIMEOUT_S:.0f} s"
            )
        # SQLite does not say why it cannot make its journal; without an inode left it cannot.
        case sqlite3.SQLITE_CANTOPEN if _is_full(path):
            return DiskFullError(f"the disk is full: opening {path} needs more space or inodes")
        case sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_READONLY | sqlite3.SQLITE_PERM:
            return ConfigError(
                f"cannot open {path}: {exc}: run this as the owner of its directory or as root"
            )
        case _:
            return StorageError(f"{path}: {exc}")


def _is_full(path: Path) -> bool:
    with suppress(OSError):
        found = os.statvfs(path.parent)
        return found.f_bavail == 0 or (found.f_files > 0 and found.f_favail == 0)
    return False


def _migrate(db: Database, path: Path) -> None:
    sets = [importlib.import_module(name).migrations for name in MIGRATIONS]
    for migration_set in sets:
        assert isinstance(migration_set, Migrations)
        known = {migration.name for migration in migration_set._migrations}  # noqa: SLF001 - it has no public list
        newer = [m.name for m in migration_set.applied(db) if m.name not in known]
        if newer:
            raise ConfigError(
                f"{path} was written by a newer version of edgesync ({newer[0]}): install that version"
            )
    if not any(migration_set.pending(db) for migration_set in sets):
        return
    # Two commands may find the same migration pending; the write lock lets one do it and the other see it done.
    db.conn.execute("BEGIN IMMEDIATE")
    try:
        for migration_set in sets:
            migration_set.apply(db)
        if db.conn.in_transaction:
            db.conn.execute("COMMIT")
    except BaseException:
        if db.conn.in_transaction:
            db.conn.execute("ROLLBACK")
        raise


__all__ = ["BUSY_TIMEOUT_S", "MIGRATIONS", "GatewayStore", "connect", "storage_errors"]
