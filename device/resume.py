"""What an earlier run left in a staged tree, looked at before the first request.

Decides which pieces may be claimed, which claims are dropped, and which have to be fetched again:

* always: a claimed piece whose file is missing or has another size is dropped;
* after a kill (same boot): unclaimed pieces whose bytes are there and hash are made durable and claimed;
* after a power cut: also the last two flush epochs and RANDOM_SHARE of the other claims are hashed; one that is wrong
  means that nothing is believed and everything is hashed;
* after a sync that failed: unclaimed bytes are not believed, since the page cache answers for a disk that lost them.

Called by ``BundleStore.begin``, in its lock.
"""

import errno
import hashlib
import logging
import math
import os
import random
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING

from device.state import DISTRUST, KILLED, POWER_CUT
from edgesync.bitfield import Bitfield
from edgesync.errors import UnsafePathError

if TYPE_CHECKING:
    from device.bundle_store import StagedBundle

logger = logging.getLogger(__name__)

RANDOM_SHARE = 0.01


def check(staged: "StagedBundle", rng: random.Random | None = None) -> None:
    """Settle a staged tree; afterwards ``have`` and ``durable`` hold what is there. Raises StorageError."""
    store = staged.store
    doubt = store.state.unchecked(staged.digest)
    before = staged.durable.count
    present = _drop_missing(staged)
    count = len(staged.durable)
    suspects = Bitfield(count)
    if doubt >= POWER_CUT:
        suspects.update(
            piece for piece in store.state.last_flushes(staged.digest) if piece in staged.durable
        )
        claimed = list(staged.durable)
        chance = rng or random.SystemRandom()
        suspects.update(chance.sample(claimed, math.ceil(len(claimed) * RANDOM_SHARE)))
    unclaimed = Bitfield(count)
    if doubt in {KILLED, POWER_CUT} and present:
        unclaimed.update(staged.durable.missing())
    wrong = _hash(staged, suspects, skip_holes=False)
    if wrong.count:
        logger.warning(
            "%d of %d pieces claimed of %s are not on the disk: all are hashed anew",
            wrong.count, suspects.count, staged.digest[:12],
        )  # fmt: skip
        wrong = _hash(staged, staged.durable.copy(), skip_holes=False)
        staged.lose(wrong)
        store.notes.append(
            f"{wrong.count} stored pieces of {staged.name}@{staged.version} were damaged and are fetched again"
        )
    found = unclaimed
    for piece in _hash(staged, unclaimed, skip_holes=True):
        found.discard(piece)
    if found.count:
        staged.counters.bytes_local += _linked_bytes(staged, found)
        staged.claim_found(list(found))
    if before or found.count:
        staged.counters.resumes += 1
        staged.save_counters()
    if doubt:
        store.committing(lambda: store.state.set_checked(staged.digest))
    if doubt == DISTRUST:
        staged.suspect = False
    staged.checked = True


def _linked_bytes(staged: "StagedBundle", found: Bitfield) -> int:
    """Bytes of found pieces in hard-linked files: a local import made them, and was killed before it counted them."""
    total = 0
    for file, path in enumerate(staged.map.files):
        try:
            shared = staged.tree.stat(path).st_nlink > 1
        except OSError:  # a name the power cut took
            continue
        if shared:
            for piece, offset in staged.map.pieces_of(file):
                if piece in found and next(staged.map.occurrences(piece)) == (file, offset):
                    total += staged.map.piece_lengths[piece]
    return total


def _drop_missing(staged: "StagedBundle") -> bool:
    """Drop claims on files that are not there at full size; False when there is no file at all (a fresh start)."""
    tree, tree_map = staged.tree, staged.map
    lost: set[int] = set()
    present = False
    for file, path in enumerate(tree_map.files):
        try:
            info = tree.stat(path)
            whole = stat.S_ISREG(info.st_mode) and info.st_size == tree_map.file_sizes[file]
            present = True
        except OSError:
            whole = False
        if not whole and staged.durable.count:
            lost.update(piece for piece, _ in tree_map.pieces_of(file) if piece in staged.durable)
    if lost:
        logger.warning(
            "%d pieces claimed of %s lie in files that are gone", len(lost), staged.digest[:12]
        )
        staged.lose(lost)
    return present


def _hash(staged: "StagedBundle", wanted: Bitfield, *, skip_holes: bool) -> Bitfield:
    """Those of ``wanted`` that do not hash at one of their occurrences, read in file order.

    ``skip_holes`` takes what was never written for missing without reading it; a piece of zeros is then fetched again.
    """
    wrong = Bitfield(len(wanted))
    if not wanted.count:
        return wrong
    tree, tree_map = staged.tree, staged.map
    for file, path in enumerate(tree_map.files):
        pieces = [(piece, offset) for piece, offset in tree_map.pieces_of(file) if piece in wanted]
        if not pieces:
            continue
        try:
            fd = tree.open_file(path)
        except (OSError, UnsafePathError):
            wrong.update(piece for piece, _ in pieces)
            continue
        try:
            whole = tree_map.file_sizes[file]
            data_ranges = _data_ranges(fd, whole) if skip_holes else iter([(0, whole)])
            start, end = next(data_ranges, (0, 0))
            for piece, offset in pieces:
                size = tree_map.piece_lengths[piece]
                while end <= offset and end > start:
                    start, end = next(data_ranges, (0, 0))
                if start >= offset + size or end <= start:
                    wrong.add(piece)
                    continue
                data = os.pread(fd, size, offset)
                if hashlib.sha256(data).digest() != tree_map.piece_id(piece):
                    wrong.add(piece)
        except OSError:
            wrong.update(piece for piece, _ in pieces)
        finally:
            os.close(fd)
    return wrong


def _data_ranges(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, end) of what is not a hole; a file system that cannot tell has one range."""
    position = 0
    while position < size:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as exc:
            if exc.errno != errno.ENXIO:
                yield position, size
            return
        yield start, end
        position = end
