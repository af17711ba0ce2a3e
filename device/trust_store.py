"""What a device must never forget: ``trust.db`` and its second copy ``trust.copy.db``.

It keeps the verified metadata (``edgesync.trust`` decides what is verified), the assignment set that was accepted and
the highest sequence seen of each signer, the highest release counter committed of each bundle, and the floor of trusted
time. Unlike ``state.db`` it is never rebuilt from disk: a lost floor would let an attacker replay old, honestly signed
statements. Invariants:

* a change is one transaction with ``synchronous=FULL`` in ``trust.db``, then the same in the copy; only when the first
  is durable does ``state`` (and everybody who asks) see it. The rollback journal is truncated and synced, so that a
  power cut cannot roll a committed change back;
* both files carry a generation and a hash over everything in them. At start the higher intact generation wins and the
  other file is made anew; a file that failed a write or a sync is never trusted again, it is written as a new one;
* a new root commits alone, before anything signed under it is looked at;
* none of the numbers falls, except where keys were rotated: the time floor with the timestamp keys, a sequence with
  the assignment key that signed it.

Not for an event loop. One process holds it for writing (the data directory's lock); inside one, calls take turns.
Called by ``device.agent`` and by ``agent join`` and ``agent recover``.
"""

import contextlib
import hashlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from sqlite_utils import Database, Migrations

from edgesync import assignment, limits, trust
from edgesync.assignment import AssignmentSet
from edgesync.errors import (
    ConfigError,
    ConflictError,
    DiskFullError,
    StateCorruptError,
    StorageError,
    VerificationError,
)
from edgesync.ids import DeviceId, PeerKey
from edgesync.storage.atomic import fsync_directory, storage_error
from edgesync.trust import MetadataUpdate, TrustState

MAIN: Final = "trust.db"
COPY: Final = "trust.copy.db"
SAVE_TIME_S: Final = 3600.0
"""How often the running time is stored: a reboot loses at most this much of trusted time."""
CLOCK_TOLERANCE_S: Final = 300.0
"""What two honest clocks may differ by before it is worth telling an operator."""
_FILES: Final = (MAIN, COPY)

Facts = dict[str, bytes]
"""Everything stored, by name: metadata files and small JSON values."""

migrations = Migrations("device-trust")


@migrations()
def m001_facts(db: Database) -> None:
    db.conn.execute("CREATE TABLE facts (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID")
    db.conn.execute(
        "CREATE TABLE whole (id INTEGER PRIMARY KEY CHECK (id = 1),"
        " generation INTEGER NOT NULL, digest BLOB NOT NULL)"
    )


def running_time() -> float:
    """Seconds since boot, sleep included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True)
class Clocks:
    """Where the store reads time: Unix seconds as this machine believes, and seconds since its boot."""

    utc: Callable[[], float] = time.time
    running: Callable[[], float] = running_time


class TrustStore:
    def __init__(
        self, directory: Path, facts: Facts, generation: int, *, clocks: Clocks, read_only: bool
    ) -> None:
        self._directory = directory
        self._facts = facts
        self._generation = generation
        self._clocks = clocks
        self._read_only = read_only
        self._closed = False
        self._state = _state(facts)
        self._lock = threading.Lock()
        self._open: dict[str, Database] = {}
        self._suspect: set[str] = set()
        self._since = clocks.running()
        self._elapsed_before = float(_json(facts, "time").get("elapsed") or 0.0)
        self.problems: tuple[str, ...] = ()
        """What is wrong with one of the two files, for status; the other one still holds everything."""

    # --- opening ---------------------------------------------------------------------------------------------------
    @classmethod
    def create(cls, directory: Path, state: TrustState, *, clocks: Clocks | None = None) -> Self:
        """Begin with the first roots, or open what is there if it is of the same fleet: joining twice forgets nothing.

        Raises ConflictError: it is of another fleet. Raises StateCorruptError: what is there is damaged.
        """
        if any((directory / name).exists() for name in _FILES):
            store = cls.open(directory, clocks=clocks)
            if store.state.fleet_id != state.fleet_id:
                store.close()
                raise ConflictError(
                    f"{directory} belongs to fleet {store.state.fleet_id[:12]}, the token is for fleet"
                    f" {state.fleet_id[:12]}: use another data directory"
                )
            return store
        facts = _facts(state) | {"time": b"{}"}
        for name in _FILES:
            _write_whole(directory / name, facts, 1)
        return cls(directory, facts, 1, clocks=clocks or Clocks(), read_only=False)

    @classmethod
    def open(
        cls, directory: Path, *, read_only: bool = False, clocks: Clocks | None = None
    ) -> Self:
        """Open the store and make its damaged or lagging copy anew (not with ``read_only``).

        Raises StateCorruptError: neither copy can be read. Raises ConfigError: of a newer version, or not permitted.
        """
        found = {name: _read(directory / name, read_only=read_only) for name in _FILES}
        best = max((copy for copy in found.values() if copy is not None), default=None, key=_age)
        if best is None:
            raise StateCorruptError(
                f"both copies of the trust store ({MAIN} and {COPY} in {directory}) are lost or damaged; make a token"
                " on the gateway with edgesync token create and run edgesync agent recover with it"
            )
        generation, facts = best
        store = cls(directory, facts, generation, clocks=clocks or Clocks(), read_only=read_only)
        if not read_only:
            store._suspect = {
                name for name, copy in found.items() if copy is None or copy[0] != generation
            }
            store._repair()
        return store

    @classmethod
    def discard(cls, directory: Path) -> None:
        """Set both copies aside (``*.damaged``) so that ``create`` can begin anew."""
        try:
            for name in _FILES:
                (directory / f"{name}-journal").unlink(missing_ok=True)
                with contextlib.suppress(FileNotFoundError):
                    (directory / name).replace(directory / f"{name}.damaged")
            fsync_directory(directory)
        except OSError as exc:
            raise storage_error(exc, "setting the damaged trust store aside") from exc

    def close(self) -> None:
        with self._lock:
            if not self._closed and not self._read_only and not self._suspect:
                with contextlib.suppress(StorageError):
                    self._commit({}, save_time=True)
            for db in self._open.values():
                db.close()
            self._open.clear()
            self._closed = True  # another opener may be ahead by now: never write over it

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    # --- metadata --------------------------------------------------------------------------------------------------
    @property
    def state(self) -> TrustState:
        """The metadata believed now; an immutable value."""
        return self._state

    def accept(self, update: MetadataUpdate) -> bool:
        """Believe a complete update, durably; False when it is not newer.

        Its roots are committed one by one first and stay, whatever comes of the rest.
        Raises VerificationError (and its kinds): refused. Raises StorageError: not stored, so not believed.
        """
        with self._lock:
            changed = False
            for root in trust.pending_roots(self._state, update):
                self._believe(trust.add_root(self._state, root))
                changed = True
            new = trust.apply(
                self._state, update, utc_now=self._clocks.utc(), elapsed_s=self._elapsed()
            )
            if new is not self._state:
                self._believe(new)
                changed = True
            return changed

    def _believe(self, new: TrustState) -> None:
        old, facts = self._state, _facts(new)
        changes: dict[str, bytes | None] = {
            name: value for name, value in facts.items() if self._facts.get(name) != value
        }
        changes |= {name: None for name in _facts(old) if name not in facts}
        elapsed = 0.0
        if old.floor is not None and new.floor is not None:
            # A newer floor may be older than what was known by running on: trusted time does not step back.
            elapsed = max(0.0, old.floor + self._elapsed() - new.floor)
        changes["time"] = _time(elapsed)
        self._commit(changes)
        self._elapsed_before, self._since = elapsed, self._clocks.running()
        self._state = new

    # --- time ------------------------------------------------------------------------------------------------------
    def now(self, utc_now: float | None = None) -> float:
        """Trusted now, Unix seconds: what expiries are compared with."""
        utc = self._clocks.utc() if utc_now is None else utc_now
        return trust.trusted_time(utc, self._state.floor, self._elapsed())

    def clock_is_believed(self, utc_now: float | None = None) -> bool:
        """Whether the system clock and trusted time agree to CLOCK_TOLERANCE_S (to say so where a device waits)."""
        utc = self._clocks.utc() if utc_now is None else utc_now
        return abs(self.now(utc) - utc) <= CLOCK_TOLERANCE_S

    def save_time(self, *, force: bool = False) -> bool:
        """Store the running time if SAVE_TIME_S have passed since; call it every few minutes."""
        with self._lock:
            if not force and self._clocks.running() - self._since < SAVE_TIME_S:
                return False
            self._commit({}, save_time=True)
            return True

    def _elapsed(self) -> float:
        return self._elapsed_before + max(0.0, self._clocks.running() - self._since)

    # --- assignments -----------------------------------------------------------------------------------------------
    def accept_assignments(
        self, data: bytes, *, keys: Collection[PeerKey], device_id: str, device_key: PeerKey
    ) -> AssignmentSet:
        """Take this device's set if it is signed by one of ``keys`` and not older than what these have signed before.

        Raises VerificationError (and its kinds): refused. Raises StorageError: not stored, so not taken.
        """
        with self._lock:
            found = assignment.verify(
                data,
                keys=keys,
                fleet=self._state.fleet_id,
                device_id=DeviceId(device_id),
                device_key=device_key,
                floor_sequence=self._sequence_floor(keys),
                utc_now=self.now(),
            )
            if self._facts.get("assignments") == data:
                return found
            if found.sequence == self._sequence_floor(keys):
                raise VerificationError(
                    f"another assignment set with sequence {found.sequence} was accepted before"
                )
            self._commit(
                {
                    f"sequence/{found.gateway_key}": str(found.sequence).encode(),
                    "assignments": data,
                }
            )
            return found

    def assignments(self) -> AssignmentSet | None:
        """The set accepted last, whatever its age; None without one, or when its signer is no longer a gateway."""
        data = self._facts.get("assignments")
        if data is None:
            return None
        keys = {PeerKey(gateway.assign_key) for gateway in self._state.view.gateways()}
        with contextlib.suppress(VerificationError):
            return assignment.read_accepted(data, keys=keys)
        return None

    def assignment_envelope(self) -> bytes | None:
        """The bytes of the set accepted last, as signed: what this device shows to peers that ask what it may read."""
        return self._facts.get("assignments")

    @property
    def assignment_sequence(self) -> int:
        """Sequence of the set accepted last; 0 without one."""
        found = self.assignments()
        return found.sequence if found is not None else 0

    def _sequence_floor(self, keys: Collection[PeerKey]) -> int:
        # A signer that is no longer listed binds nobody: else a stolen key's last act could be sequence 2**53 - 1.
        return max((int(self._facts.get(f"sequence/{key}", b"0")) for key in keys), default=0)

    # --- release counters ------------------------------------------------------------------------------------------
    def counter(self, kind: str, name: str) -> int:
        """The highest release counter this device has committed of a bundle name; nothing below it is installed."""
        return int(self._facts.get(f"counter/{kind}/{name}", b"0"))

    def commit_counter(self, kind: str, name: str, value: int) -> None:
        """Raise the floor to ``value``; lower ones change nothing."""
        with self._lock:
            if value > self.counter(kind, name):
                self._commit({f"counter/{kind}/{name}": str(value).encode()})

    raise_counter = commit_counter

    # --- both files ------------------------------------------------------------------------------------------------
    def _commit(self, changes: Mapping[str, bytes | None], *, save_time: bool = False) -> None:
        """Make changes durable, in the first file, then in the second; only then are they true."""
        if self._read_only or self._closed:
            raise StorageError("the trust store is closed, or was opened for reading")
        if save_time:
            changes = {**changes, "time": _time(self._elapsed())}
        facts = dict(self._facts)
        for name, value in changes.items():
            if value is None:
                facts.pop(name, None)
            else:
                facts[name] = value
        generation = self._generation + 1
        durable, failure = 0, None
        for name in _FILES:
            try:
                self._put(name, facts, changes, generation)
                durable += 1
            except StorageError as exc:
                self._drop(name)
                failure = failure or exc
                # A file that was not confirmed may hold either generation: the second one must not get ahead of a first
                # that reported failure, or a caller who was told "no" would find "yes" after a restart.
                if name == MAIN:
                    break
        if failure is not None:
            self.problems = (f"{failure}",)
            if not durable:
                raise failure
        else:
            self.problems = ()
        if save_time:
            self._elapsed_before, self._since = self._elapsed(), self._clocks.running()
        self._facts, self._generation = facts, generation

    def _put(
        self, name: str, facts: Facts, changes: Mapping[str, bytes | None], generation: int
    ) -> None:
        path = self._directory / name
        if name in self._suspect:
            _write_whole(path, facts, generation)
            self._suspect.discard(name)
            return
        with _storage_errors(path):
            db = self._open.get(name)
            if db is None:
                db = self._open[name] = _connect(path)
            with db.atomic():
                for fact, value in changes.items():
                    if value is None:
                        db.conn.execute("DELETE FROM facts WHERE name = ?", (fact,))
                    else:
                        db.conn.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (fact, value))
                db.conn.execute(
                    "INSERT OR REPLACE INTO whole VALUES (1, ?, ?)", (generation, _digest(facts))
                )

    def _drop(self, name: str) -> None:
        """Never use a file again that failed: after a failed sync the page cache shows what the disk may not have."""
        self._suspect.add(name)
        db = self._open.pop(name, None)
        if db is not None:
            with contextlib.suppress(sqlite3.Error):
                db.close()

    def _repair(self) -> None:
        problems = []
        for name in sorted(self._suspect):
            try:
                _write_whole(self._directory / name, self._facts, self._generation)
            except StorageError as exc:
                problems.append(str(exc))
            else:
                self._suspect.discard(name)
        self.problems = tuple(problems)


# --- what the facts are --------------------------------------------------------------------------------------------
def _facts(state: TrustState) -> Facts:
    below = {
        "timestamp": state.timestamp,
        "snapshot": state.snapshot,
        "targets": state.targets,
        "regions": state.regions,
    }
    facts = {f"root/{number + 1}": data for number, data in enumerate(state.roots)}
    facts |= {name: data for name, data in below.items() if data is not None}
    facts |= {f"role/{role}": data for role, data in state.delegated}
    facts["accepted"] = json.dumps({"at": state.accepted_at, "floor": state.floor}).encode()
    return facts


def _state(facts: Facts) -> TrustState:
    roots: list[bytes] = []
    while (data := facts.get(f"root/{len(roots) + 1}")) is not None:
        roots.append(data)
    accepted = _json(facts, "accepted")
    floor = accepted.get("floor")
    return TrustState(
        roots=tuple(roots),
        timestamp=facts.get("timestamp"),
        snapshot=facts.get("snapshot"),
        targets=facts.get("targets"),
        delegated=tuple(
            (name.removeprefix("role/"), facts[name])
            for name in sorted(facts)
            if name.startswith("role/")
        ),
        regions=facts.get("regions"),
        accepted_at=float(accepted.get("at") or 0.0),
        floor=float(floor) if floor is not None else None,
    )


def _time(elapsed: float) -> bytes:
    return json.dumps({"elapsed": elapsed}).encode()


def _json(facts: Facts, name: str) -> dict[str, float | None]:
    value = json.loads(facts.get(name, b"{}"))
    assert isinstance(value, dict)
    return value


def _digest(facts: Facts) -> bytes:
    """One hash over everything: SQLite does not notice a flipped bit in a page."""
    whole = hashlib.sha256()
    for name in sorted(facts):
        whole.update(hashlib.sha256(name.encode()).digest())
        whole.update(hashlib.sha256(facts[name]).digest())
    return whole.digest()


# --- one file ------------------------------------------------------------------------------------------------------
def _age(copy: tuple[int, Facts]) -> int:
    return copy[0]


def _connect(path: Path, *, mode: str = "rw") -> Database:
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=10.0, check_same_thread=False
    )
    if mode != "ro":
        # Deleting a journal is durable only once its folder is synced, which SQLite leaves out; it syncs a truncation.
        connection.execute("PRAGMA journal_mode=TRUNCATE")
        connection.execute("PRAGMA synchronous=FULL")
    return Database(connection)


def _read(path: Path, *, read_only: bool) -> tuple[int, Facts] | None:
    """Generation and content of one file; None if it is missing, damaged or unfinished.

    Raises ConfigError: a newer version wrote it, or this user may not read it.
    """
    if not path.exists():
        return None
    db = None
    try:
        # Opened for writing where allowed: a transaction a power cut interrupted is rolled back by whoever opens first.
        db = _connect(path, mode="ro" if read_only else "rw")
        _check_version(db, path)
        row = db.conn.execute("SELECT generation, digest FROM whole").fetchone()
        facts = {}
        total = 0
        for name, value in db.conn.execute("SELECT name, value FROM facts"):
            total += len(value)
            if total > _MAX_STORE_BYTES:
                return None
            facts[str(name)] = bytes(value)
        if row is None or _digest(facts) != row[1] or "root/1" not in facts:
            return None
        if db.conn.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
            return None
        return int(row[0]), facts
    except sqlite3.Error as exc:
        if _primary(exc) in {sqlite3.SQLITE_PERM, sqlite3.SQLITE_CANTOPEN} and not os.access(
            path, os.R_OK
        ):
            raise ConfigError(
                f"cannot open {path}: run this as the owner of its directory or as root"
            ) from exc
        return None
    except (TypeError, ValueError):
        return None  # a flipped bit gave a value another type
    finally:
        if db is not None:
            with contextlib.suppress(sqlite3.Error):
                db.close()


_MAX_STORE_BYTES: Final = (
    limits.MAX_ROOT_ROTATIONS * limits.MAX_ROOT_BYTES
    + (limits.MAX_DELEGATED_ROLES + 1) * limits.MAX_TARGETS_BYTES
)


def _check_version(db: Database, path: Path) -> None:
    known = {migration.name for migration in migrations._migrations}  # noqa: SLF001 - it has no public list
    newer = [found.name for found in migrations.applied(db) if found.name not in known]
    if newer:
        raise ConfigError(
            f"{path} was written by a newer version of edgesync ({newer[0]}): install that version"
        )


def _write_whole(path: Path, facts: Facts, generation: int) -> None:
    """Put a complete new file in the place of ``path``: durable, or the old one is still there."""
    new = path.with_name(f"{path.name}.new")
    with _storage_errors(path):
        for leftover in (new, new.with_name(f"{new.name}-journal")):
            leftover.unlink(missing_ok=True)
        os.close(os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        db = _connect(new)
        try:
            migrations.apply(db)
            with db.atomic():
                db.conn.executemany("INSERT INTO facts VALUES (?, ?)", sorted(facts.items()))
                db.conn.execute("INSERT INTO whole VALUES (1, ?, ?)", (generation, _digest(facts)))
        finally:
            db.close()
        # SQLite syncs what it writes; this covers what it never wrote through, such as the file's size after creation.
        with new.open("rb") as stream:
            os.fsync(stream.fileno())
        new.with_name(f"{new.name}-journal").unlink(missing_ok=True)
        # The old file's journal must be gone first: found beside the new file, SQLite would roll that back with it.
        path.with_name(f"{path.name}-journal").unlink(missing_ok=True)
        fsync_directory(path.parent)
        new.replace(path)
        fsync_directory(path.parent)


@contextlib.contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as exc:
        if _primary(exc) == sqlite3.SQLITE_FULL:
            raise DiskFullError(f"no space left for {path}") from exc
        raise StorageError(f"{path}: {exc}") from exc
    except OSError as exc:
        raise storage_error(exc, f"writing {path}") from exc


def _primary(exc: sqlite3.Error) -> int:
    return int(getattr(exc, "sqlite_errorcode", 0)) & 0xFF


__all__ = ["COPY", "MAIN", "SAVE_TIME_S", "Clocks", "TrustStore", "migrations", "running_time"]
