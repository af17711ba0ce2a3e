"""Bundles on this device's disk: trees being filled piece by piece, and whole ones that are served and used.

Layout below the agent's directory (``staging`` 0700; ``bundles`` and what is above a tree 0755)::

    manifests/<digest>           the manifest's exact bytes
    staging/<digest>/tree/…      a bundle on its way: files at full size, folders 0700, no symlinks yet
    bundles/NAME/VERSION/…       a held bundle, modes as in its manifest
    bundles/NAME/current         symlink to the active version
    reserve                      RESERVE_BYTES, freed to record that the disk is full

It does not decide what to fetch, from whom, or whether a bundle may be installed; the caller has verified the
manifest's digest against signed metadata. The order of an installation is ``device.activation``'s, what a start finds
is ``device.reconcile``'s and ``device.resume``'s, copying from other bundles ``device.local_import``'s.

Invariants:

* bytes are hashed before they are written and again, from the buffer that is returned, when they are read;
* a piece counts as held (``have``) when all its occurrences were written, as ``durable`` when a sync that began after
  that returned without an error and the claim was committed;
* a file with more than one name is never written: it belongs to another version too;
* a failed sync claims nothing: files are rewritten under a new inode; a second failure makes the store read-only.

Safe from several threads; meant for one storage thread (``BundleStore.executor``). Nothing belongs on an event loop.
"""

import contextlib
import errno
import hashlib
import logging
import os
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, Self

from device import activation, local_import, reconcile, resume
from device.state import BundleRow, Counters, Source, StateDatabase
from device.tree_map import TreeMap
from edgesync import limits
from edgesync.bitfield import Bitfield
from edgesync.errors import (
    ConflictError,
    DiskFullError,
    EdgeSyncError,
    FsyncFailedError,
    NotFoundError,
    PieceHashMismatchError,
    StorageError,
    UnsafePathError,
    VerificationError,
)
from edgesync.ids import BundleName, Digest, Version
from edgesync.manifest import Manifest, check_name, check_version
from edgesync.manifest import digest as manifest_digest
from edgesync.manifest import parse as parse_manifest
from edgesync.storage import atomic
from edgesync.storage.paths import Tree, remove_tree

logger = logging.getLogger(__name__)

OPEN_FILES = 48
"""Descriptors a staged bundle keeps open for writing."""
LOADED_BUNDLES = 4
"""Held bundles whose tree maps stay in memory."""
SYNC_EACH_UP_TO = 4
"""Up to this many dirty files are synced one by one, more by one ``syncfs``."""
COUNTER_INTERVAL_S = 0.1
COUNTER_BYTES = 64 * limits.KIB
"""Counters are committed (unsynced) this often, so that a kill loses little of what a status screen adds up."""
SERVING_INTERVAL_S = 1.0
"""The same while pieces are only read."""
OCCURRENCES_TRIED = 8
"""Places a piece is looked for before it counts as lost."""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

Lost = Callable[[Digest, int], None]
Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


@dataclass(frozen=True)
class BundleInfo:
    """What screens and reports say about one bundle."""

    digest: Digest
    name: BundleName
    version: Version
    kind: str
    access: str
    release_counter: int
    state: Literal["staged", "held", "active"]
    payload_bytes: int
    unique_bytes: int
    pieces_total: int
    pieces_have: int
    pieces_durable: int
    counters: Counters


class Bundle:
    """What staged and held bundles share: reading, counting, losing."""

    def __init__(self, store: "BundleStore", row: BundleRow, durable: Bitfield) -> None:
        self.store = store
        self.row = row
        self.digest = row.digest
        self.durable = durable
        """Pieces proven to be on the disk."""
        self.have = durable.copy()
        """Pieces verified in this run or durable: what may be offered to peers under the store's epoch."""
        self.spent = False
        """Activated, replaced or removed: whoever still holds this object reads from its successor."""
        self.counters = store.state.counters(row.digest)
        self._counters_saved_at = 0.0
        self._counters_saved = self.counters.total()

    @property
    def name(self) -> BundleName:
        return self.row.name

    @property
    def version(self) -> Version:
        return self.row.version

    @property
    def access(self) -> str:
        return self.row.access

    @property
    def epoch(self) -> int:
        """Changes with every start of the store: unsynced pieces told under an older one may be gone."""
        return self.store.epoch

    @property
    def complete(self) -> bool:
        return self.have.complete

    @property
    def manifest(self) -> Manifest:
        """Parsed anew unless it is one of the few last used: keep it while it is needed, not longer."""
        return self.store.manifest(self.digest)

    @property
    def map(self) -> TreeMap:
        raise NotImplementedError

    @property
    def tree(self) -> Tree:
        raise NotImplementedError

    def count_received(self, source: Source, size: int) -> None:
        """Add carried bytes of one source; cheap, callable from the event loop; stored with the next write."""
        self.counters.received(source, size)

    def count_sent(self, size: int) -> None:
        self.counters.bytes_sent += size

    def count_rejected(self) -> None:
        self.counters.pieces_rejected += 1

    def save_counters(self, *, force: bool = True) -> None:
        """Commit the counters, unsynced: they survive a kill. Raises StorageError."""
        now = time.monotonic()
        counted = self.counters.total()
        if not force and (
            now - self._counters_saved_at < COUNTER_INTERVAL_S
            and counted - self._counters_saved < COUNTER_BYTES
        ):
            return
        if counted != self._counters_saved:
            self.store.committing(
                lambda: self.store.state.save_counters(self.digest, self.counters)
            )
        self._counters_saved_at = now
        self._counters_saved = counted

    def read_piece(self, index: int) -> bytes | None:
        """The piece's plain bytes, hashed in the very buffer returned; None when it is not (or no longer) here.

        A piece that no longer hashes is cleared and reported as lost; nothing is raised.
        """
        with self.store.lock:
            if self.spent:
                successor = self.store.get(self.digest)
                return successor.read_piece(index) if successor is not None else None
            if index not in self.have:
                return None
            try:
                tree_map = self.map
            except EdgeSyncError as exc:
                logger.warning("cannot read %s: %s", self.digest[:12], exc)
                return None
            wanted = tree_map.piece_id(index)
            size = tree_map.piece_lengths[index]
            places = list(islice(tree_map.occurrences(index), OCCURRENCES_TRIED))
        for file, offset in places:
            data = self.read_range(file, offset, size)
            if data is not None and hashlib.sha256(data).digest() == wanted:
                self._save_counters_of_serving()
                return data
        with self.store.lock:
            if self.spent:  # since this call began
                return self.read_piece(index)
            self.lose([index])
        return None

    def _save_counters_of_serving(self) -> None:
        if time.monotonic() - self._counters_saved_at >= SERVING_INTERVAL_S:
            with self.store.lock, contextlib.suppress(StorageError):
                if not self.spent and self.store.read_only_reason is None:
                    self.save_counters()

    def read_range(self, file: int, offset: int, size: int) -> bytes | None:
        """Bytes of a file as they are now; None where it is missing, short or unreadable."""
        with self.store.lock:
            try:
                fd, close = self._reader(file)
            except (OSError, UnsafePathError):
                return None
            try:
                data = os.pread(fd, size, offset)
            except OSError:
                return None
            finally:
                if close:
                    os.close(fd)
        return data if len(data) == size else None

    def _reader(self, file: int) -> tuple[int, bool]:
        """A descriptor for reading, and whether the caller closes it."""
        return self.tree.open_file(self.map.files[file]), True

    def open_file(self, path: str) -> int:
        """A read-only descriptor of one file of the tree. Raises NotFoundError."""
        with self.store.lock:
            try:
                return self.tree.open_file(path)
            except (OSError, UnsafePathError) as exc:
                raise NotFoundError(f"{path!a} is not there: {exc}") from exc

    def lose(self, pieces: Iterable[int]) -> list[int]:
        """Clear pieces whose bytes are wrong, durably, before anything may be written over them."""
        with self.store.lock:
            if self.spent:
                return []
            lost = [piece for piece in pieces if self.have.discard(piece)]
            self._forget_pending(lost)
            unclaimed = [piece for piece in lost if self.durable.discard(piece)]
            if unclaimed:
                try:
                    self.store.committing(
                        lambda: self.store.state.unclaim(self.digest, self.durable)
                    )
                except StorageError:
                    logger.exception(
                        "could not record that pieces of %s are lost", self.digest[:12]
                    )
        for piece in lost:
            self.store.tell_lost(self.digest, piece)
        return lost

    def _forget_pending(self, lost: list[int]) -> None:
        pass

    def close(self) -> None:
        pass


class HeldBundle(Bundle):
    """A bundle installed at ``path``; an application may edit it at any time, so nothing about it is believed."""

    damaged = False
    """The tree was found to differ from its manifest: ``begin`` stages it anew."""

    @property
    def complete(self) -> bool:
        """Nothing has to be fetched again: what an application made of its ``mutable`` files is its own."""
        if self.have.complete:
            return True
        try:
            tree_map = self.map
        except EdgeSyncError:
            return False
        return all(
            any(tree_map.file_mutable[file] for file, _ in tree_map.occurrences(piece))
            for piece in self.have.missing()
        )

    @property
    def path(self) -> Path:
        return self.store.bundle_path(self.name, self.version)

    @property
    def map(self) -> TreeMap:
        return self.store.loaded(self)[0]

    @property
    def tree(self) -> Tree:
        return self.store.loaded(self)[1]

    def close(self) -> None:
        self.store.unload(self.digest)


class StagedBundle(Bundle):
    """A bundle being filled. Pieces are written in place, at every occurrence, into a tree nobody else can enter."""

    def __init__(
        self, store: "BundleStore", row: BundleRow, durable: Bitfield, tree_map: TreeMap
    ) -> None:
        super().__init__(store, row, durable)
        self._map = tree_map
        self.root = store.directory / "staging" / row.digest
        self._tree = Tree.open(self.root / "tree")
        self.checked = False
        """What an earlier run left was looked at."""
        self.allocated = False
        self.names_synced = False
        """Folders and file names are durable: nothing is claimed before."""
        self.suspect = False
        """A failed sync may have been about this bundle's files: they are rewritten before anything is claimed."""
        self._files: OrderedDict[int, int] = OrderedDict()
        self._dirty: set[int] = set()
        self._evicted_dirty = False
        self._pending: list[int] = []
        self._in_flight: set[int] = set()
        self._pending_bytes = 0
        self._pending_since = 0.0
        self._flush_mutex = threading.Lock()

    @property
    def map(self) -> TreeMap:
        return self._map

    @property
    def tree(self) -> Tree:
        return self._tree

    # --- writing -----------------------------------------------------------------------------------------------------

    def write_piece(
        self,
        index: int,
        plain: bytes | memoryview,
        *,
        source: Source | None = None,
        carried_bytes: int = 0,
    ) -> bool:
        """``put_piece``, and keep the counters where that is due."""
        fresh = self.put_piece(index, plain, source=source, carried_bytes=carried_bytes)
        self.save_counters(force=False)
        return fresh

    def put_piece(
        self,
        index: int,
        plain: bytes | memoryview,
        *,
        source: Source | None = None,
        carried_bytes: int = 0,
    ) -> bool:
        """Store one piece at all its occurrences; False if it was held already.

        With ``source`` the bytes as carried are counted, also those of a piece that was held; ``save_counters`` is the
        caller's.

        Raises:
            PieceHashMismatchError: the bytes are not that piece; nothing was written.
            DiskFullError: found before the first byte is written, as far as the file system can tell.
            StorageError: the store is read-only or the disk failed.
        """
        size = self._map.piece_lengths[index]
        if len(plain) != size or hashlib.sha256(plain).digest() != self._map.piece_id(index):
            raise PieceHashMismatchError(
                f"piece {index} of {self.name}@{self.version} does not match its hash"
            )
        with self.store.lock:
            self.store.check_writable()
            if source is not None:
                self.count_received(source, carried_bytes)
            fresh = index not in self.have
            if fresh:
                self.allocate()
                try:
                    for file, offset in self._map.occurrences(index):
                        self._put(file, offset, plain)
                except OSError as exc:
                    raise self.store.failure(exc, f"writing {self.name}@{self.version}") from exc
                self.wrote(index)
        return fresh

    def _put(self, file: int, offset: int, plain: bytes | memoryview) -> None:
        if file not in self._files and self._is_shared(file):
            if self.read_range(file, offset, len(plain)) == plain:
                return  # linked from another version, which had made it durable
            self.detach(file)
        atomic.write_all(self.writer(file), plain, offset)
        self._dirty.add(file)

    def _is_shared(self, file: int) -> bool:
        try:
            return self._tree.stat(self._map.files[file]).st_nlink > 1
        except FileNotFoundError:
            return False

    def wrote(self, index: int) -> None:
        """All occurrences of a piece were written by the caller, who holds the lock."""
        self.have.add(index)
        if not self._pending:
            self._pending_since = time.monotonic()
        self._pending.append(index)
        self._pending_bytes += self._map.piece_lengths[index]

    def writer(self, file: int) -> int:
        """A descriptor for reading and writing a file nobody else shares. Raises OSError."""
        fd = self._files.get(file)
        if fd is not None:
            self._files.move_to_end(file)
            return fd
        path = self._map.files[file]
        fd = self._tree.open_file(path, os.O_RDWR | os.O_CREAT)
        try:
            info = os.fstat(fd)
            if info.st_nlink > 1:
                raise OSError(errno.EMLINK, f"{path!a} is shared with another version")  # noqa: TRY301  # closes
            if info.st_size != self._map.file_sizes[file]:
                # Somebody was here; what it held is checked when it is read.
                self.names_synced = False
                atomic.preallocate(fd, self._map.file_sizes[file])
                os.ftruncate(fd, self._map.file_sizes[file])
        except OSError:
            os.close(fd)
            raise
        self._files[file] = fd
        while len(self._files) > OPEN_FILES:
            evicted, old = self._files.popitem(last=False)
            self._evicted_dirty |= evicted in self._dirty
            os.close(old)
        return fd

    def _reader(self, file: int) -> tuple[int, bool]:
        fd = self._files.get(file)
        if fd is not None:
            return fd, False
        return super()._reader(file)

    def detach(self, file: int) -> None:
        """Give a hard-linked file an inode of its own, with the pieces held of it, durable before it takes the name."""
        fd = self._copy_good(file)
        try:
            os.fsync(fd)
            self._put_in_place(file)
        finally:
            os.close(fd)

    def _copy_good(self, file: int) -> int:
        """Copy what still hashes of a file's held pieces into a new one beside the tree; the rest is lost."""
        root = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink("rewrite", dir_fd=root)
            fd = os.open(
                "rewrite",
                os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC,
                0o600,
                dir_fd=root,
            )
        finally:
            os.close(root)
        lost = []
        try:
            atomic.preallocate(fd, self._map.file_sizes[file])
            for piece, offset in self._map.pieces_of(file):
                if piece not in self.have:
                    continue
                data = self.read_range(file, offset, self._map.piece_lengths[piece])
                if data is None or hashlib.sha256(data).digest() != self._map.piece_id(piece):
                    lost.append(piece)
                else:
                    atomic.write_all(fd, data, offset)
            self.lose(lost)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _put_in_place(self, file: int) -> None:
        parent, name = self._tree.parent(self._map.files[file])
        os.rename(self.root / "rewrite", name, dst_dir_fd=parent)
        os.fsync(parent)

    def allocate(self) -> None:
        """Make every folder and file that is missing, at full size.

        Raises DiskFullError: there is no room for all of it; what this call made is removed again.
        """
        if self.allocated:
            return
        tree, tree_map = self._tree, self._map
        missing: list[int] = []
        inodes = len(tree_map.symlinks)
        need = 0
        try:
            for path in tree_map.directories:
                inodes += tree.make_directory(path)
            for file, path in enumerate(tree_map.files):
                size = tree_map.file_sizes[file]
                try:
                    info = tree.stat(path)
                except FileNotFoundError:
                    inodes += 1
                    need += -(-size // 4096) * 4096
                else:
                    if info.st_nlink > 1 or (info.st_size == size and info.st_blocks * 512 >= size):
                        continue
                    need += max(0, size - info.st_blocks * 512)
                missing.append(file)
            self.store.check_space(need, inodes, f"{self.name}@{self.version}")
            if inodes or missing:
                self.names_synced = False
            self._make_files(missing)
        except OSError as exc:
            raise self.store.failure(exc, f"preparing {self.name}@{self.version}") from exc
        self.allocated = True

    def _make_files(self, missing: list[int]) -> None:
        tree, tree_map = self._tree, self._map
        created: list[str] = []
        try:
            for file in missing:
                path = tree_map.files[file]
                created.append(path)
                fd = tree.open_file(path, os.O_RDWR | os.O_CREAT)
                try:
                    atomic.preallocate(fd, tree_map.file_sizes[file])
                finally:
                    os.close(fd)
        except OSError:
            for path in created if not self.have.count else ():
                with contextlib.suppress(OSError):
                    tree.unlink(path)
            raise

    # --- making durable ----------------------------------------------------------------------------------------------

    @property
    def pending_bytes(self) -> int:
        """Plain bytes written and not yet claimed."""
        return self._pending_bytes

    def flush_due(self) -> bool:
        """FLUSH_BYTES are waiting, or some for FLUSH_INTERVAL_S, or the bundle is complete."""
        if not self._pending:
            return False
        return (
            self._pending_bytes >= limits.FLUSH_BYTES
            or time.monotonic() - self._pending_since >= limits.FLUSH_INTERVAL_S
            or self.have.complete
        )

    def flush(self) -> list[int]:
        """Make what was written durable and claim it; returns the pieces that became durable.

        Raises:
            FsyncFailedError: a second sync failed; the store is read-only now.
            DiskFullError: no room to record it; nothing was claimed, a later call tries again.
            StorageError: the store is read-only, or the claim could not be committed.
        """
        with self._flush_mutex:
            with self.store.lock:
                self.store.check_writable()
                pieces, dirty = self._pending, self._dirty
                if not pieces:
                    return []
                everything = (
                    not self.names_synced or self._evicted_dirty or len(dirty) > SYNC_EACH_UP_TO
                )
                self._pending, self._pending_bytes, self._dirty = [], 0, set()
                self._evicted_dirty = False
                self._in_flight = set(pieces)
                try:
                    fds = [] if everything else [os.dup(self.writer(file)) for file in dirty]
                except OSError as exc:
                    self._put_back(pieces, dirty)
                    raise self.store.failure(exc, "flushing") from exc
            try:
                self._sync(fds, dirty, everything=everything)
                with self.store.lock:
                    claimed = [piece for piece in pieces if piece in self._in_flight]
                    self._claim(claimed)
            except BaseException:
                with self.store.lock:
                    self._put_back(pieces, dirty)
                raise
            finally:
                self._in_flight = set()
            return claimed

    def _put_back(self, pieces: list[int], dirty: set[int]) -> None:
        again = [piece for piece in pieces if piece in self._in_flight and piece in self.have]
        self._pending = again + self._pending
        self._pending_bytes = sum(self._map.piece_lengths[piece] for piece in self._pending)
        self._dirty |= dirty
        self._evicted_dirty = True

    def _sync(self, fds: list[int], dirty: set[int], *, everything: bool) -> None:
        known = self.suspect
        try:
            if not known and everything:
                self.store.sync_all()
            elif not known:
                for fd in fds:
                    os.fdatasync(fd)
            if self.suspect:  # also when another bundle's sync was told of it meanwhile
                raise OSError(errno.EIO, os.strerror(errno.EIO))  # noqa: TRY301  # same way out
        except OSError as exc:
            with self.store.lock:
                if not known:
                    self.store.note_failed_sync(exc, self.digest)
                self._rewrite(dirty)
        finally:
            for fd in fds:
                os.close(fd)
        self.names_synced = True

    def _rewrite(self, dirty: set[int]) -> None:
        """After a failed sync: put every file it was about under a new inode, and prove that one.

        What is read back from the page cache proves nothing about the disk, so it is hashed and written anew. Where
        there is no room for a second copy the file is rewritten in place: that makes its pages dirty again.
        """
        try:
            for file in sorted(dirty):
                self._rewrite_file(file)
            self.store.sync_all()
        except OSError as exc:
            self.store.note_failed_sync(exc, self.digest)
            raise self.store.failure(exc, f"rewriting {self.name}@{self.version}") from exc
        self.suspect = False
        self.store.committing(lambda: self.store.state.set_checked(self.digest))

    def _rewrite_file(self, file: int) -> None:
        old = self._files.pop(file, None)
        if old is not None:
            os.close(old)
        try:
            fd = self._copy_good(file)
        except OSError as exc:
            if exc.errno not in atomic.FULL_ERRNOS:
                raise
            with contextlib.suppress(FileNotFoundError):
                (self.root / "rewrite").unlink()
            fd = self.writer(file)
            for piece, offset in self._map.pieces_of(file):
                if piece in self.have and (
                    data := self.read_range(file, offset, self._map.piece_lengths[piece])
                ):
                    if hashlib.sha256(data).digest() == self._map.piece_id(piece):
                        atomic.write_all(fd, data, offset)
                    else:
                        self.lose([piece])
            os.fsync(fd)
            return
        try:
            os.fsync(fd)
            self._put_in_place(file)
        finally:
            os.close(fd)

    def _claim(self, pieces: list[int]) -> None:
        gained = self.durable.copy()
        gained.update(pieces)
        self.store.committing(
            lambda: self.store.state.claim(self.digest, gained, pieces, self.counters)
        )
        self.durable.update(pieces)

    def claim_found(self, pieces: list[int]) -> None:
        """Take pieces found on disk by a check after a restart: synced, claimed, then held. Raises StorageError."""
        with self.store.lock:
            self.store.check_writable()
            try:
                self.store.sync_all()
            except OSError as exc:
                self.store.note_failed_sync(exc, self.digest)
                return  # they are fetched again
            self.names_synced = True
            self.have.update(pieces)
            self._claim(pieces)

    def _forget_pending(self, lost: list[int]) -> None:
        for piece in lost:
            self._in_flight.discard(piece)
            if piece in self._pending:
                self._pending.remove(piece)
                self._pending_bytes -= self._map.piece_lengths[piece]

    # --- the whole bundle --------------------------------------------------------------------------------------------

    def import_local(self, progress: Progress | None = None) -> int:
        """Take what other bundles on this disk hold of this one; returns the plain bytes gained.

        Raises StorageError, DiskFullError as ``write_piece`` and ``flush``.
        """
        return local_import.import_local(self, progress)

    def hold(self) -> Path:
        """Verify the complete tree and put it in its place without making it the active version."""
        return activation.install(self, switch=False)

    def activate(self) -> Path:
        """Verify the complete tree, put it in its place and make it the active version.

        The bundle is a ``HeldBundle`` afterwards; this object is spent. Any failed step leaves the old version.

        Raises:
            TreeDamagedError: some pieces on disk are not what was written; they are cleared, fetch them again.
            StorageError: the disk failed.
        """
        return activation.install(self, switch=True)

    def discard(self) -> None:
        """Remove the staged tree and everything recorded about it."""
        self.store.discard(self)

    def close_files(self) -> None:
        """Close descriptors; call after ``flush``."""
        while self._files:
            file, fd = self._files.popitem()
            self._evicted_dirty |= file in self._dirty
            os.close(fd)
        self._tree.forget()

    def close(self) -> None:
        self.close_files()
        self._tree.close()


class BundleStore:
    """All bundles of one agent. One process has a store open at a time (the data directory's lock sees to it)."""

    def __init__(
        self, directory: Path, state: StateDatabase, epoch: int, on_lost: Lost | None
    ) -> None:
        self.directory = directory
        self.state = state
        self.epoch = epoch
        self.lock = threading.RLock()
        self.executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="storage")
        self.read_only_reason: str | None = None
        """Why nothing is written any more, as a sentence."""
        self.disk_full_reason: str | None = None
        self.notes: list[str] = []
        """What the start found and an operator should know."""
        self.notes_about: dict[Digest, str] = {}
        """The same on one bundle each, which is said until that bundle is held as it should be."""
        self.reflinks = True
        """False once the file system said it has none."""
        self._on_lost = on_lost
        self._failed_syncs = 0
        self._sync_mutex = threading.Lock()
        self.current: dict[BundleName, Digest] = {}
        """Which bundle ``current`` of a name points at: as on disk, whether or not the row could be written."""
        self._held: dict[Digest, HeldBundle] = {}
        self._staged: dict[Digest, StagedBundle] = {}
        self._loaded: OrderedDict[Digest, tuple[TreeMap, Tree]] = OrderedDict()
        self._manifests: OrderedDict[Digest, Manifest] = OrderedDict()
        self._root_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    @classmethod
    def open(
        cls,
        directory: Path,
        state: StateDatabase,
        *,
        on_lost: Lost | None = None,
        boot_id: str | None = None,
    ) -> Self:
        """Open the store and settle what the last run left.

        ``on_lost`` is called, from the thread that noticed, for each piece that no longer hashes. ``boot_id`` stands in
        for the kernel's in tests.

        Raises:
            StorageError: the directory or the database cannot be used.
        """
        try:
            for name, mode in (("manifests", 0o700), ("staging", 0o700), ("bundles", 0o755)):
                _make_directory(directory / name, mode)
            epoch, _ended = state.begin_run(boot_id or current_boot_id())
            store = cls(directory, state, epoch, on_lost)
        except OSError as exc:
            raise atomic.storage_error(exc, f"opening {directory}") from exc
        try:
            store.fill_reserve()
            reconcile.reconcile(store)
        except OSError as exc:
            store.abandon()
            raise store.failure(exc, f"opening {directory}") from exc
        except BaseException:
            store.abandon()
            raise
        return store

    def close(self) -> None:
        """Flush, record a clean stop, close. A failing flush leaves the record of an unclean one."""
        try:
            with self.lock:
                for bundle in self._staged.values():
                    bundle.flush()
                for other in self._all():
                    other.save_counters()
            self.state.end_run()
        except StorageError:
            logger.exception("the store could not be closed cleanly")
        self.abandon()

    def abandon(self) -> None:
        """Close descriptors and threads without recording anything."""
        self.executor.shutdown(wait=False)
        with self.lock:
            for bundle in list(self._staged.values()):
                bundle.close()
            while self._loaded:
                self._loaded.popitem()[1][1].close()
            if self._root_fd >= 0:
                os.close(self._root_fd)
                self._root_fd = -1

    def _all(self) -> Iterator[Bundle]:
        yield from self._staged.values()
        yield from self._held.values()

    # --- looking -----------------------------------------------------------------------------------------------------

    def bundles(self) -> list[BundleInfo]:
        """Everything on this disk, by name and version."""
        with self.lock:
            active = self.current
            found = [
                _info(bundle, "staged")
                for bundle in self._staged.values()
                if bundle.digest not in self._held
            ]
            for held in self._held.values():
                state: Literal["active", "held"] = (
                    "active" if active.get(held.name) == held.digest else "held"
                )
                # A bundle under repair is one bundle: in use as before, with the new copy's pieces.
                found.append(_info(self._staged.get(held.digest) or held, state))
        return sorted(found, key=lambda info: (info.name, info.version, info.digest))

    def held(self, digest: Digest) -> HeldBundle | None:
        """The installed bundle of that digest."""
        with self.lock:
            return self._held.get(digest)

    def staged(self, digest: Digest) -> StagedBundle | None:
        with self.lock:
            return self._staged.get(digest)

    def get(self, digest: Digest) -> Bundle | None:
        """Whatever pieces can be read from: the staged tree before the held one it repairs."""
        with self.lock:
            return self._staged.get(digest) or self._held.get(digest)

    def held_bundles(self) -> list[HeldBundle]:
        with self.lock:
            return list(self._held.values())

    def staged_bundles(self) -> list[StagedBundle]:
        with self.lock:
            return list(self._staged.values())

    def active(self, name: BundleName) -> HeldBundle | None:
        """The version ``current`` points at."""
        with self.lock:
            digest = self.current.get(name)
            return self._held.get(digest) if digest else None

    def bundle_path(self, name: str, version: str) -> Path:
        return self.directory / "bundles" / check_name(name) / check_version(version)

    def problems(self) -> list[str]:
        """Sentences for ``agent status``."""
        found = [self.read_only_reason, self.disk_full_reason, *self.notes]
        with self.lock:
            for digest, sentence in self.notes_about.items():
                held = self._held.get(digest)
                if held is None or held.damaged:
                    found.append(sentence)
        return [sentence for sentence in found if sentence]

    def manifest_bytes(self, digest: Digest) -> bytes:
        """The exact bytes kept. Raises NotFoundError: not here, or no longer what its name says."""
        try:
            data = (self.directory / "manifests" / _check_digest(digest)).read_bytes()
        except OSError as exc:
            raise NotFoundError(f"the manifest of {digest[:12]} is not on this disk") from exc
        if manifest_digest(data) != digest:
            raise NotFoundError(f"the manifest of {digest[:12]} on this disk is damaged")
        return data

    def manifest(self, digest: Digest) -> Manifest:
        with self.lock:
            kept = self._manifests.get(digest)
            if kept is None:
                kept = parse_manifest(self.manifest_bytes(digest))
                self._manifests[digest] = kept
                if len(self._manifests) > 1:  # one: a large one takes tens of MB
                    self._manifests.popitem(last=False)
            return kept

    def loaded(self, bundle: HeldBundle) -> tuple[TreeMap, Tree]:
        """Map and tree of a held bundle, from memory or disk. Raises NotFoundError."""
        with self.lock:
            kept = self._loaded.get(bundle.digest)
            if kept is None:
                try:
                    tree = Tree.open(bundle.path)
                except OSError as exc:
                    raise NotFoundError(f"{bundle.path} is gone: {exc.strerror}") from exc
                try:
                    kept = TreeMap(parse_manifest(self.manifest_bytes(bundle.digest))), tree
                except BaseException:
                    tree.close()
                    raise
                self._loaded[bundle.digest] = kept
                while len(self._loaded) > LOADED_BUNDLES:
                    self._loaded.popitem(last=False)[1][1].close()
            else:
                self._loaded.move_to_end(bundle.digest)
            return kept

    def unload(self, digest: Digest) -> None:
        with self.lock:
            kept = self._loaded.pop(digest, None)
            if kept is not None:
                kept[1].close()

    # --- changing ----------------------------------------------------------------------------------------------------

    def begin(self, manifest_bytes: bytes, manifest: Manifest) -> StagedBundle:
        """Start filling a bundle, or go on where an earlier run stopped; what it left is checked first.

        A held bundle with lost pieces is staged anew beside its installed tree, which ``activate`` then replaces.

        Raises:
            ConflictError: the bundle is held and whole.
            DiskFullError, StorageError: it cannot be recorded.
        """
        digest = manifest_digest(manifest_bytes)
        with self.lock:
            self.check_writable()
            staged = self._staged.get(digest)
            if staged is None:
                held = self._held.get(digest)
                if held is not None and held.complete and not held.damaged:
                    raise ConflictError(f"{held.name}@{held.version} is already on this device")
                try:
                    staged = self._stage(digest, manifest_bytes, manifest)
                except OSError as exc:
                    raise self.failure(
                        exc, f"preparing {manifest.name}@{manifest.version}"
                    ) from exc
            if not staged.checked:
                resume.check(staged)
            return staged

    def _stage(self, digest: Digest, manifest_bytes: bytes, manifest: Manifest) -> StagedBundle:
        row = bundle_row(digest, manifest, "staged")
        tree_map = TreeMap(manifest)
        atomic.replace_file(self.directory / "manifests", digest, manifest_bytes)
        _make_directory(self.directory / "staging" / digest, 0o700)
        _make_directory(self.directory / "staging" / digest / "tree", 0o700)
        empty = Bitfield(row.piece_count)
        self.committing(lambda: self.state.put_bundle(row, empty))
        staged = StagedBundle(self, row, empty, tree_map)
        staged.checked = True
        held = self._held.get(digest)
        if held is not None:
            # From here on the record under this digest is the staged tree's; the damaged one lives in memory.
            held.durable = Bitfield(row.piece_count)
            staged.counters = held.counters
        self._staged[digest] = staged
        return staged

    def adopt(self, bundle: Bundle) -> None:
        """Take up what ``reconcile`` found or ``activation`` made."""
        with self.lock:
            if isinstance(bundle, StagedBundle):
                self._staged[bundle.digest] = bundle
            elif isinstance(bundle, HeldBundle):
                self._held[bundle.digest] = bundle

    def drop_staged(self, digest: Digest) -> None:
        with self.lock:
            bundle = self._staged.pop(digest, None)
            if bundle is not None:
                bundle.spent = True
                bundle.close()

    def drop_held(self, digest: Digest) -> None:
        with self.lock:
            self.unload(digest)
            bundle = self._held.pop(digest, None)
            if bundle is not None:
                bundle.spent = True

    def activate(self, digest: Digest) -> Path:
        """Make a held version the active one (again), after its whole tree was verified.

        Raises NotFoundError: not held; TreeDamagedError: it was changed: ``begin`` it anew.
        """
        held = self.held(digest)
        if held is None:
            raise NotFoundError(f"bundle {digest[:12]} is not on this device")
        return activation.switch(held)

    def verify(self, digest: Digest, progress: Progress | None = None) -> list[str]:
        """Hash a held bundle against its manifest; returns the paths that differ.

        Pieces that are not there any more are cleared, pieces that are again are taken back. A bundle with lost pieces
        is repaired by ``begin``, fetching, ``activate``. Raises NotFoundError.
        """
        held = self.held(digest)
        if held is None:
            raise NotFoundError(f"bundle {digest[:12]} is not on this device")
        return activation.verify_held(held, progress)

    def remove(self, digest: Digest) -> None:
        """Remove a held bundle that is not the active version, or a staged one.

        Raises NotFoundError; ConflictError: it is the active version.
        """
        with self.lock:
            staged = self._staged.get(digest)
            if staged is not None:
                staged.discard()
                return
            held = self._held.get(digest)
            if held is None:
                raise NotFoundError(f"bundle {digest[:12]} is not on this device")
            if self.current.get(held.name) == digest:
                raise ConflictError(
                    f"{held.name}@{held.version} is the active version: activate another one first"
                )
            try:
                activation.move_away(self, held)
            except OSError as exc:
                raise self.failure(exc, f"removing {held.name}@{held.version}") from exc
            self.drop_held(digest)
            self.committing(lambda: self.state.forget_bundle(digest))
            self.sweep(digest)

    def discard(self, staged: StagedBundle) -> None:
        with self.lock:
            digest = staged.digest
            self.drop_staged(digest)
            self.committing(lambda: self.state.forget_bundle(digest))
            self.sweep(digest)
            held = self._held.get(digest)
            if held is not None:  # a repair given up: the installed tree is what it was
                self.drop_held(digest)
                reconcile.adopt_tree(self, digest, held.name, held.version)
                self.state.save_counters(digest, staged.counters)

    def sweep(self, digest: Digest) -> None:
        """Remove what lies in staging under a digest, and its manifest when no bundle needs it. Failures wait."""
        try:
            self.sweep_staging(digest)
            if digest not in self._held and digest not in self._staged:
                (self.directory / "manifests" / digest).unlink(missing_ok=True)
                self._manifests.pop(digest, None)
        except OSError as exc:
            logger.warning("cleaning up after %s is left to the next start: %s", digest[:12], exc)

    def sweep_staging(self, name: str, below: str | None = None) -> None:
        """Remove ``staging/NAME`` or one thing in it. Raises OSError."""
        path = self.directory / "staging"
        folder = os.open(path if below is None else path / name, _DIRECTORY)
        try:
            remove_tree(folder, name if below is None else below)
        finally:
            os.close(folder)

    # --- the disk ----------------------------------------------------------------------------------------------------

    def check_writable(self) -> None:
        """Raises StorageError: a second sync failed in this run."""
        if self.read_only_reason is not None:
            raise StorageError(self.read_only_reason)

    def check_space(self, size: int, inodes: int, what: str) -> None:
        """Raises DiskFullError: the file system has not that many bytes or inodes left."""
        free = os.fstatvfs(self._root_fd)
        room = free.f_bavail * free.f_frsize
        if size > room:
            self.disk_full_reason = (
                f"the disk is full: {what} needs {size} bytes more, {room} are free"
            )
            raise DiskFullError(self.disk_full_reason)
        if free.f_files and inodes > free.f_favail:
            self.disk_full_reason = (
                f"the disk has no inodes left: {what} needs {inodes}, {free.f_favail} are free"
            )
            raise DiskFullError(self.disk_full_reason)
        self.disk_full_reason = None

    def sync_all(self) -> None:
        """``syncfs`` through a descriptor as old as the store, so that no failed write-back goes unseen.

        The kernel tells a descriptor once, for whichever file it was: every staged bundle is suspect then.
        """
        with self._sync_mutex:
            try:
                atomic.syncfs(self._root_fd)
            except OSError:
                for staged in self._staged.values():
                    staged.suspect = True
                raise

    def failure(self, exc: OSError, doing: str) -> StorageError:
        """Name a failed system call; a full disk frees the reserve, so that it can be recorded."""
        error = atomic.storage_error(exc, doing)
        if isinstance(error, DiskFullError):
            self.disk_full_reason = str(error)
            self.release_reserve()
        return error

    def committing(self, commit: Callable[[], None]) -> None:
        """Run a database write; when the disk is full, once more without the reserve file."""
        try:
            commit()
        except DiskFullError as exc:
            self.disk_full_reason = str(exc)
            self.release_reserve()
            commit()

    def note_failed_sync(self, exc: OSError, digest: Digest) -> None:
        """Record a failed sync. Raises FsyncFailedError: it was the second of this run."""
        logger.error("a sync of %s failed: %s", digest[:12], exc.strerror)
        if exc.errno in atomic.FULL_ERRNOS:
            self.failure(exc, "syncing")
        self._failed_syncs += 1
        try:
            self.state.rewrite_log()
        except OSError:
            self._failed_syncs += 1
        for staged in self._staged.values():
            staged.suspect = True
            with contextlib.suppress(StorageError):
                self.state.distrust(staged.digest)
        if self._failed_syncs > 1:
            self.read_only_reason = (
                f"the disk failed to confirm writes twice ({exc.strerror}): nothing is stored any more; "
                "check the disk, then restart the agent"
            )
            raise FsyncFailedError(self.read_only_reason) from exc
        self.notes.append(
            f"a write was not confirmed by the disk ({exc.strerror}) and was repeated"
        )

    def fill_reserve(self) -> None:
        """Make the reserve file where there is room for it."""
        path = self.directory / "reserve"
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                info = os.fstat(fd)
                if info.st_blocks * 512 < limits.RESERVE_BYTES:
                    atomic.preallocate(fd, limits.RESERVE_BYTES)
            except OSError:
                path.unlink(missing_ok=True)
                raise
            finally:
                os.close(fd)

    def release_reserve(self) -> None:
        with contextlib.suppress(OSError):
            (self.directory / "reserve").unlink(missing_ok=True)

    def tell_lost(self, digest: Digest, piece: int) -> None:
        logger.info("piece %d of %s no longer matches its hash", piece, digest[:12])
        if self._on_lost is not None:
            self._on_lost(digest, piece)


def bundle_row(digest: Digest, manifest: Manifest, state: Literal["staged", "held"]) -> BundleRow:
    return BundleRow(
        digest=digest,
        name=BundleName(manifest.name),
        version=Version(manifest.version),
        kind=manifest.kind,
        access=manifest.access,
        release_counter=manifest.release_counter,
        payload_bytes=manifest.payload_bytes,
        unique_bytes=manifest.unique_bytes,
        piece_count=manifest.piece_count,
        state=state,
    )


def current_boot_id() -> str:
    """The kernel's name for this boot; without one every unclean start counts as a power cut."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return os.urandom(16).hex()


def _info(bundle: Bundle, state: Literal["staged", "held", "active"]) -> BundleInfo:
    row = bundle.row
    return BundleInfo(
        digest=row.digest,
        name=row.name,
        version=row.version,
        kind=row.kind,
        access=row.access,
        release_counter=row.release_counter,
        state=state,
        payload_bytes=row.payload_bytes,
        unique_bytes=row.unique_bytes,
        pieces_total=row.piece_count,
        pieces_have=bundle.have.count,
        pieces_durable=bundle.durable.count,
        counters=bundle.counters,
    )


def _make_directory(path: Path, mode: int) -> None:
    """Make a folder with exactly that mode, its name durable; one that is there is left as it is."""
    try:
        path.mkdir(mode=mode)
    except FileExistsError:
        if not stat.S_ISDIR(path.lstat().st_mode):
            raise
        return
    path.chmod(mode)
    atomic.fsync_directory(path.parent)


def _check_digest(digest: str) -> str:
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise VerificationError(f"{digest[:64]!a} is not a bundle id")
    return digest
