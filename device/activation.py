"""Putting a complete tree in its place and making it the active version: old or new at every instant, never a mixture.

The order (each step durable before the next):

1. everything written is flushed; modes and symlinks are set; one ``syncfs`` makes files and folders durable;
2. every file is hashed whole and the walked tree compared with the manifest, nothing more and nothing less;
3. FULL commit of ``activating(old, new)``;
4. the tree is renamed to ``bundles/NAME/VERSION`` (exchanged with a damaged one of that name), both parents are synced;
5. ``current`` is replaced by a new symlink under a temporary name, its folder synced;
6. FULL commit of ``active``.

A failed step leaves the old version; what is left half done is settled by ``settle`` at the next start, by what the
symlink says. Called by ``StagedBundle`` and ``BundleStore``.
"""

import contextlib
import hashlib
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from device.state import Activating
from device.tree_map import TreeMap
from edgesync import manifest as manifests
from edgesync.bitfield import Bitfield
from edgesync.errors import InstallError, StorageError, TreeDamagedError, UnsafePathError
from edgesync.ids import BundleName, Digest
from edgesync.storage import atomic
from edgesync.storage.paths import Tree, remove_tree

if TYPE_CHECKING:
    from device.bundle_store import BundleStore, HeldBundle, StagedBundle

logger = logging.getLogger(__name__)

CURRENT = "current"
_NEW_LINK = ".current.new"  # no version begins with a dot
_REPLACED = "replaced"
_READ_BYTES = 1024 * 1024
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_ROOT_MODE = 0o755


def install(staged: "StagedBundle", *, switch: bool) -> Path:
    """See ``StagedBundle.hold`` and ``StagedBundle.activate``."""
    store, digest, name = staged.store, staged.digest, staged.name
    what = f"{name}@{staged.version}"
    with store.lock:
        store.check_writable()
        if not staged.have.complete:
            raise InstallError(f"{what} lacks {len(staged.have) - staged.have.count} pieces")
    staged.flush()
    with store.lock:
        staged.close_files()
    # Without the lock: peers are served meanwhile, and nobody writes into a complete tree.
    try:
        with Tree.open(staged.root / "tree") as tree:
            _finish_tree(staged, tree)
            _sync(staged)
            _check_files(staged, tree)
            check_walk(tree, staged.map)
    except OSError as exc:
        raise store.failure(exc, f"preparing {what}") from exc
    with store.lock:
        store.check_writable()
        if not staged.have.complete or staged.suspect:
            raise TreeDamagedError(f"{what} was damaged on disk while it was checked")
        active = store.current.get(name)
        row = Activating(name, active, digest, switch)
        replaced = next(
            (
                held.digest
                for held in store.held_bundles()
                if (held.name, held.version) == (name, staged.version) and held.digest != digest
            ),
            None,
        )
        store.committing(lambda: store.state.begin_activation(row))
        try:
            _put_tree_in_place(store, staged)
            if switch:
                _point_current(store, name, staged.version)
        except OSError as exc:
            _undo(store, row)
            raise store.failure(exc, f"activating {what}") from exc
        now_active = digest if switch or (active is not None and active == replaced) else active
        _finish_row(store, name, held=digest, active=now_active)
        return _take_up(store, staged, replaced)


def _take_up(store: "BundleStore", staged: "StagedBundle", replaced: Digest | None) -> Path:
    """The staged bundle is a held one from here on."""
    from device.bundle_store import HeldBundle

    store.drop_staged(staged.digest)
    store.drop_held(staged.digest)
    if replaced is not None:
        store.drop_held(replaced)
        store.committing(lambda: store.state.forget_bundle(replaced))
    held = HeldBundle(store, staged.row, Bitfield.full(staged.row.piece_count))
    held.counters = staged.counters
    store.adopt(held)
    store.sweep(staged.digest)
    return held.path


def _undo(store: "BundleStore", row: Activating) -> None:
    """After a failed step: back to the old version as far as the disk lets us, and no half-done state in memory."""
    old = next((b for b in store.state.bundles() if b.digest == row.old), None)
    new = next((b for b in store.state.bundles() if b.digest == row.new), None)
    if new is None:
        return
    try:
        if row.switch and current_version(store, row.name) == new.version and new != old:
            if old is not None and old.version != new.version:
                _point_current(store, row.name, old.version)
            elif old is None:
                (store.directory / "bundles" / row.name / CURRENT).unlink()
    except OSError:
        logger.exception("the current version of %s could not be put back", row.name)
    try:
        settle(store)
    except (OSError, StorageError):
        logger.exception("the interrupted activation of %s waits for the next start", row.name)
    store.current = store.state.active()
    staged = store.staged(row.new)
    if staged is not None and not (staged.root / "tree").is_dir():
        _take_up(store, staged, None)


def switch(held: "HeldBundle") -> Path:
    """See ``BundleStore.activate``."""
    store, name = held.store, held.name
    store.check_writable()
    damaged = verify_held(held, None)
    if damaged:
        raise TreeDamagedError(
            f"{name}@{held.version} was changed on disk: {damaged[0]}, {len(damaged)} differences in all"
        )
    with store.lock:
        active = store.current.get(name)
        row = Activating(name, active, held.digest, switch=True)
        store.committing(lambda: store.state.begin_activation(row))
        try:
            _point_current(store, name, held.version)
        except OSError as exc:
            _undo(store, row)
            raise store.failure(exc, f"activating {name}@{held.version}") from exc
        _finish_row(store, name, held=held.digest, active=held.digest)
        return held.path


def _finish_row(
    store: "BundleStore", name: BundleName, *, held: Digest, active: Digest | None
) -> None:
    if active is None:
        store.current.pop(name, None)
    else:
        store.current[name] = active
    try:
        try:
            store.committing(lambda: store.state.end_activation(name, held=held, active=active))
        except StorageError:
            store.committing(lambda: store.state.end_activation(name, held=held, active=active))
    except StorageError:
        # The disk has the new version and the row says which was meant: the next start records what the symlink says.
        logger.exception("the activation of %s is done but could not be recorded", name)
        store.notes.append(
            f"the activation of {name} could not be recorded: the disk or state.db fails"
        )


def _finish_tree(staged: "StagedBundle", tree: Tree) -> None:
    """Set modes and make symlinks; remove what the manifest does not list, make what is missing."""
    tree_map = staged.map
    _prune(tree, tree_map)
    with staged.store.lock:
        # Makes what is missing: files of a bundle without pieces, or one that was deleted, whose hash will tell.
        staged.allocated = False
        staged.allocate()
    for file, path in enumerate(tree_map.files):
        info = tree.stat(path)
        mode = tree_map.file_modes[file]
        if stat.S_ISREG(info.st_mode) and stat.S_IMODE(info.st_mode) != mode:
            if info.st_nlink > 1:  # it is another version's file too
                with staged.store.lock:
                    staged.detach(file)
            fd = tree.open_file(path)
            try:
                os.fchmod(fd, mode)
            finally:
                os.close(fd)
    for path, target in zip(tree_map.symlinks, tree_map.symlink_targets, strict=True):
        with contextlib.suppress(FileExistsError):
            tree.make_symlink(path, target)
    for position, path in enumerate(tree_map.directories):
        os.fchmod(tree.directory(path), tree_map.directory_modes[position])
    os.fchmod(tree.fd, _ROOT_MODE)


def _prune(tree: Tree, tree_map: TreeMap) -> None:
    files = set(tree_map.files)
    folders = set(tree_map.directories)
    links = dict(zip(tree_map.symlinks, tree_map.symlink_targets, strict=True))
    unknown: list[tuple[str, bool]] = []
    for entry in tree.walk():
        mode = entry.info.st_mode
        if stat.S_ISDIR(mode):
            fine = entry.path in folders
        elif stat.S_ISLNK(mode):
            fine = links.get(entry.path) == entry.target
        else:
            fine = entry.path in files
        if not fine:
            unknown.append((entry.path, stat.S_ISDIR(mode)))
    tree.forget()
    for path, is_folder in unknown:
        logger.warning("removing %a from a staged tree: the manifest does not list it", path)
        parent, last = tree.parent(path)
        if is_folder:
            remove_tree(parent, last)
        else:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(last, dir_fd=parent)


def _sync(staged: "StagedBundle") -> None:
    try:
        staged.store.sync_all()
    except OSError as exc:
        staged.store.note_failed_sync(exc, staged.digest)
        raise
    if staged.suspect:
        raise StorageError(
            f"{staged.name}@{staged.version} is not activated: a sync failed, its files are written again"
        )


def _check_files(staged: "StagedBundle", tree: Tree) -> None:
    """Hash every file whole; clears the pieces of one that is wrong."""
    lost: set[int] = set()
    for file in range(len(staged.map.files)):
        if _file_digest(tree, staged.map, file) != staged.map.file_sha256(file):
            lost |= _wrong_pieces(tree, staged.map, file)
    if lost:
        staged.lose(lost)
        staged.allocated = False  # a file may be gone
        raise TreeDamagedError(
            f"{len(lost)} pieces of {staged.name}@{staged.version} are damaged on disk and must be fetched again"
        )


def _file_digest(tree: Tree, tree_map: TreeMap, file: int) -> bytes | None:
    try:
        fd = tree.open_file(tree_map.files[file])
    except (OSError, UnsafePathError):
        return None
    try:
        hasher, offset = hashlib.sha256(), 0
        while data := os.pread(fd, _READ_BYTES, offset):
            hasher.update(data)
            offset += len(data)
            if offset > tree_map.file_sizes[file]:
                return None
    except OSError:
        return None
    finally:
        os.close(fd)
    return hasher.digest()


def _wrong_pieces(tree: Tree, tree_map: TreeMap, file: int) -> set[int]:
    """The pieces of one file that do not hash where they stand in it."""
    wrong: set[int] = set()
    try:
        fd = tree.open_file(tree_map.files[file])
    except (OSError, UnsafePathError):
        return {piece for piece, _ in tree_map.pieces_of(file)}
    try:
        for piece, offset in tree_map.pieces_of(file):
            try:
                data = os.pread(fd, tree_map.piece_lengths[piece], offset)
            except OSError:
                data = b""
            if hashlib.sha256(data).digest() != tree_map.piece_id(piece):
                wrong.add(piece)
    finally:
        os.close(fd)
    return wrong


def check_walk(tree: Tree, tree_map: TreeMap) -> None:
    """Raise InstallError unless the tree's names, kinds, sizes, modes and links are the manifest's, and no more."""
    difference = walk_differences(tree, tree_map, first_only=True)
    if difference:
        raise InstallError(f"the tree on disk is not the manifest's: {difference[0]}")


def walk_differences(
    tree: Tree, tree_map: TreeMap, *, first_only: bool = False, in_use: bool = False
) -> list[str]:
    """Sentences on every entry that is missing, unknown or not as the manifest says; contents are not read.

    Of a tree ``in_use`` the ``mutable`` files may have any size and mode.
    """
    files = {path: file for file, path in enumerate(tree_map.files)}
    folders = {path: position for position, path in enumerate(tree_map.directories)}
    links = dict(zip(tree_map.symlinks, tree_map.symlink_targets, strict=True))
    found: list[str] = []
    for path, info, target in tree.walk():
        mode = stat.S_IMODE(info.st_mode)
        if stat.S_ISREG(info.st_mode):
            file = files.pop(path, None)
            fine = file is not None and (
                (info.st_size == tree_map.file_sizes[file] and mode == tree_map.file_modes[file])
                or (in_use and bool(tree_map.file_mutable[file]))
            )
        elif stat.S_ISDIR(info.st_mode):
            position = folders.pop(path, None)
            fine = position is not None and mode == tree_map.directory_modes[position]
        elif stat.S_ISLNK(info.st_mode):
            fine = links.pop(path, None) == target
        else:
            fine = False
        if not fine:
            found.append(f"{path!a} is unknown or differs")
            if first_only:
                return found
    found.extend(f"{path!a} is missing" for path in (*files, *folders, *links))
    return found


def verify_held(held: "HeldBundle", progress: Callable[[int, int], None] | None) -> list[str]:
    """See ``BundleStore.verify``."""
    store = held.store
    tree_map, _ = store.loaded(held)
    wrong: set[int] = set()
    found: list[str] = []
    done = 0
    try:
        with Tree.open(held.path) as tree:
            for file, path in enumerate(tree_map.files):
                if _file_digest(tree, tree_map, file) != tree_map.file_sha256(file):
                    if not tree_map.file_mutable[file]:
                        found.append(f"{path!a} has other contents or is missing")
                    wrong |= _wrong_pieces(tree, tree_map, file)
                done += tree_map.file_sizes[file]
                if progress is not None:
                    progress(done, tree_map.payload_bytes)
            found.extend(
                sentence
                for sentence in walk_differences(tree, tree_map, in_use=True)
                if not any(known.startswith(sentence.split("' ")[0]) for known in found)
            )
    except OSError as exc:
        raise atomic.storage_error(exc, f"verifying {held.name}@{held.version}") from exc
    with store.lock:
        held.damaged = bool(found)
        held.lose(wrong)
        back = [piece for piece in held.have.missing() if piece not in wrong]
        held.have.update(back)
        if back and store.staged(held.digest) is None:
            held.durable.update(back)
            store.committing(lambda: store.state.unclaim(held.digest, held.durable))
    return found


def _is_exact(tree_path: Path, tree_map: TreeMap) -> bool:
    try:
        with Tree.open(tree_path) as tree:
            return not walk_differences(tree, tree_map, first_only=True) and all(
                _file_digest(tree, tree_map, file) == tree_map.file_sha256(file)
                for file in range(len(tree_map.files))
            )
    except OSError:
        return False


def _put_tree_in_place(store: "BundleStore", staged: "StagedBundle") -> None:
    """Rename the staged tree to its final place, or exchange it with the tree that has it. Raises OSError."""
    bundles = os.open(store.directory / "bundles", _DIRECTORY)
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(staged.name, 0o755, dir_fd=bundles)
            _chmod(bundles, staged.name, 0o755)
        os.fsync(bundles)
        name_fd = os.open(staged.name, _DIRECTORY, dir_fd=bundles)
    finally:
        os.close(bundles)
    try:
        root = os.open(staged.root, _DIRECTORY)
        try:
            if not (staged.store.bundle_path(staged.name, staged.version)).is_dir():
                os.rename("tree", staged.version, src_dir_fd=root, dst_dir_fd=name_fd)
            elif not atomic.exchange(root, "tree", name_fd, staged.version):
                os.rename(staged.version, _REPLACED, src_dir_fd=name_fd, dst_dir_fd=root)
                os.fsync(root)
                os.rename("tree", staged.version, src_dir_fd=root, dst_dir_fd=name_fd)
            os.fsync(name_fd)
            os.fsync(root)
        finally:
            os.close(root)
    finally:
        os.close(name_fd)


def _chmod(dir_fd: int, name: str, mode: int) -> None:
    fd = os.open(name, _DIRECTORY, dir_fd=dir_fd)
    try:
        os.fchmod(fd, mode)
    finally:
        os.close(fd)


def _point_current(store: "BundleStore", name: str, version: str) -> None:
    folder = os.open(store.directory / "bundles" / manifests.check_name(name), _DIRECTORY)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_NEW_LINK, dir_fd=folder)
        os.symlink(version, _NEW_LINK, dir_fd=folder)
        # The link's own inode is durable before it can take the old one's place.
        os.fsync(folder)
        os.rename(_NEW_LINK, CURRENT, src_dir_fd=folder, dst_dir_fd=folder)
        os.fsync(folder)
    finally:
        os.close(folder)


def current_version(store: "BundleStore", name: str) -> str | None:
    """What ``current`` of a bundle name says, None where there is none."""
    try:
        return str((store.directory / "bundles" / name / CURRENT).readlink())
    except OSError:
        return None


def move_away(store: "BundleStore", held: "HeldBundle") -> None:
    """Take an installed tree out of sight in one step; ``sweep`` removes it. Raises OSError."""
    staging = store.directory / "staging"
    root = staging / held.digest
    root.mkdir(mode=0o700, exist_ok=True)
    atomic.fsync_directory(staging)
    held.path.rename(root / _REPLACED)
    # Both, before the first file is removed: a half-removed tree must not come back under its old name.
    atomic.fsync_directory(root)
    atomic.fsync_directory(held.path.parent)
    with contextlib.suppress(OSError):  # other versions or ``current`` may still be there
        held.path.parent.rmdir()


def settle(store: "BundleStore") -> None:
    """Finish or undo what an interrupted activation left, by what is in place and what the symlink says.

    Raises OSError, StorageError.
    """
    for row in store.state.activating():
        rows = store.state.bundles()
        bundle = next((found for found in rows if found.digest == row.new), None)
        active = store.state.active().get(row.name)
        if bundle is None:
            store.state.end_activation(row.name, held=None, active=active)
            continue
        place = store.bundle_path(bundle.name, bundle.version)
        staging = store.directory / "staging" / row.new
        tree, replaced = staging / "tree", staging / _REPLACED
        if not place.is_dir() and replaced.is_dir() and tree.is_dir():
            # Between the two renames that stand in for an exchange: the new tree was verified and durable before.
            tree.rename(place)
            atomic.fsync_directory(place.parent)
            atomic.fsync_directory(staging)
        installed = place.is_dir()
        if installed and tree.is_dir():  # an exchange: which of the two is the new one?
            installed = _is_exact(place, TreeMap(store.manifest(row.new)))
        pointed = current_version(store, row.name) == bundle.version
        logger.warning(
            "the activation of %s@%s was interrupted: its tree is %s, current is %s",
            row.name, bundle.version, "in place" if installed else "staged", "switched" if pointed else "not switched",
        )  # fmt: skip
        store.state.end_activation(
            row.name,
            held=row.new if installed else None,
            active=row.new if installed and pointed else active,
        )
        if installed:
            for other in rows:
                if (other.name, other.version) == (
                    bundle.name,
                    bundle.version,
                ) and other.digest != row.new:
                    store.state.forget_bundle(other.digest)
