"""What other bundles on this disk already hold of a new one.

Whole unchanged files are reflinked, else hard-linked; other known pieces are read, hashed and written from the same
buffer. It decides nothing about what is fetched afterwards.

Invariants:

* a file is taken over whole only if its bytes were hashed through the very descriptor that is linked or cloned;
* a hard link is made only where mode and mutability agree, so that one inode can serve both trees, and a ``mutable``
  file (of either version) never shares one;
* links come before anything is allocated: the disk never holds more than the old version and what has changed.

Called by ``StagedBundle.import_local``.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING

from edgesync import limits
from edgesync.errors import EdgeSyncError, UnsafePathError
from edgesync.storage import atomic

if TYPE_CHECKING:
    from device.bundle_store import HeldBundle, StagedBundle

logger = logging.getLogger(__name__)

_FICLONE = 0x40049409
_READ_BYTES = 1024 * 1024


def import_local(staged: "StagedBundle", progress: Callable[[int, int], None] | None) -> int:
    """See ``StagedBundle.import_local``."""
    store = staged.store
    if staged.have.complete:
        return 0
    sources = sorted(
        (held for held in store.held_bundles() if held.have.count),
        key=lambda held: (held.name != staged.name, held.digest),
    )
    total = sum(staged.map.piece_lengths[piece] for piece in staged.have.missing())
    linked: set[int] = set()
    gained = 0
    if sources and not staged.allocated and not staged.have.count:
        wanted = _wanted_files(staged)
        for held in sources:
            with contextlib.suppress(EdgeSyncError):
                _take_files(staged, held, wanted, linked)
        gained += _settle_linked(staged, linked)
        if progress is not None:
            progress(gained, total)
    with store.lock:
        store.check_writable()
        staged.allocate()
    for held in sources:
        missing = {bytes(staged.map.piece_id(piece)): piece for piece in staged.have.missing()}
        if not missing:
            break
        try:
            tree_map = held.map
        except EdgeSyncError as exc:
            logger.warning("%s@%s is passed over: %s", held.name, held.version, exc)
            continue
        for theirs in range(tree_map.piece_count):
            ours = missing.get(bytes(tree_map.piece_id(theirs)))
            if ours is None or theirs not in held.have or ours in staged.have:
                continue
            plain = held.read_piece(theirs)
            if plain is not None and staged.write_piece(ours, plain):
                gained += len(plain)
                staged.count_received("local", len(plain))
                if staged.pending_bytes >= limits.FLUSH_BYTES:
                    staged.flush()
                if progress is not None:
                    progress(gained, total)
    staged.flush()
    staged.save_counters()
    return gained


def _wanted_files(staged: "StagedBundle") -> dict[bytes, list[int]]:
    """Files by hash; empty ones are made, not linked."""
    wanted: dict[bytes, list[int]] = {}
    tree_map = staged.map
    for file in range(len(tree_map.files)):
        if tree_map.file_sizes[file] and not tree_map.file_mutable[file]:
            wanted.setdefault(tree_map.file_sha256(file), []).append(file)
    return wanted


def _take_files(
    staged: "StagedBundle",
    held: "HeldBundle",
    wanted: dict[bytes, list[int]],
    linked: set[int],
) -> None:
    theirs, ours = held.map, staged.map
    for file in range(len(theirs.files)):
        targets = wanted.get(theirs.file_sha256(file))
        if not targets or theirs.file_mutable[file]:
            continue
        left = [target for target in targets if not _take_file(staged, held, file, target, linked)]
        if left:
            wanted[theirs.file_sha256(file)] = left
        else:
            del wanted[ours.file_sha256(targets[0])]


def _take_file(
    staged: "StagedBundle", held: "HeldBundle", file: int, target: int, linked: set[int]
) -> bool:
    """Give ``target`` the bytes of a held file without copying them; False where that cannot be."""
    store = staged.store
    path = staged.map.files[target]
    with store.lock:
        try:
            source = held.tree.open_file(held.map.files[file])
        except (OSError, UnsafePathError):
            return False
        try:
            staged.names_synced = False
            for position, char in enumerate(path):
                if char == "/":
                    staged.tree.make_directory(path[:position])
            done = store.reflinks and _reflink(staged, source, target)
            if not done:
                done = _hard_link(staged, held, file, source, target)
        except OSError as exc:
            if exc.errno in atomic.FULL_ERRNOS:
                raise store.failure(exc, f"linking {path!a}") from exc
            return False
        finally:
            os.close(source)
    if done:
        linked.add(target)
    return done


def _reflink(staged: "StagedBundle", source: int, target: int) -> bool:
    path = staged.map.files[target]
    clone = staged.tree.open_file(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        fcntl.ioctl(clone, _FICLONE, source)
    except OSError:
        staged.store.reflinks = False
    else:
        if _is_file(staged, clone, target):  # the clone, which nobody else can change
            return True
    finally:
        os.close(clone)
    staged.tree.unlink(path)
    return False


def _hard_link(
    staged: "StagedBundle", held: "HeldBundle", file: int, source: int, target: int
) -> bool:
    info = os.fstat(source)
    mode = staged.map.file_modes[target]
    if stat.S_IMODE(info.st_mode) != mode or not _is_file(staged, source, target):
        return False
    path = staged.map.files[target]
    staged.tree.link_from(held.tree, held.map.files[file], path)
    made = staged.tree.stat(path)
    if (made.st_dev, made.st_ino) == (info.st_dev, info.st_ino):
        return True
    staged.tree.unlink(path)  # the name was given to another file meanwhile
    return False


def _is_file(staged: "StagedBundle", fd: int, target: int) -> bool:
    if os.fstat(fd).st_size != staged.map.file_sizes[target]:
        return False
    hasher = hashlib.sha256()
    offset = 0
    while data := os.pread(fd, _READ_BYTES, offset):
        hasher.update(data)
        offset += len(data)
    return hasher.digest() == staged.map.file_sha256(target)


def _settle_linked(staged: "StagedBundle", linked: set[int]) -> int:
    """Count pieces whose every occurrence lies in a linked file as held, and claim them."""
    gained = 0
    tree_map = staged.map
    with staged.store.lock:
        for file in linked:
            for piece, _ in tree_map.pieces_of(file):
                if piece not in staged.have and all(
                    place in linked for place, _ in tree_map.occurrences(piece)
                ):
                    staged.wrote(piece)
                    gained += tree_map.piece_lengths[piece]
                    staged.count_received("local", tree_map.piece_lengths[piece])
    staged.flush()
    return gained
