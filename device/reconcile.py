"""What lies on disk against what ``state.db`` says, at every start: the disk is right about names, hashes about bytes.

* an interrupted activation is settled by what ``current`` says;
* a staged row whose tree is gone starts again; a staged tree without a row (the database was lost) is taken up with
  nothing claimed, so that ``resume`` hashes it;
* an installed tree without a row is taken up after all of it was hashed; a row without a tree is dropped;
* ``current`` decides which version is active;
* what belongs to nobody in ``staging`` is removed. Nothing below ``bundles`` is ever removed here.

Called by ``BundleStore.open``. Damage found later, while serving, clears bits; ``bundle verify`` finds all of it, and
``begin`` + ``activate`` replace the whole tree by a repaired copy that shares the good files.
"""

import logging
import stat
from dataclasses import replace
from typing import TYPE_CHECKING

from device import activation
from device.state import POWER_CUT, BundleRow
from device.tree_map import TreeMap
from edgesync import manifest as manifests
from edgesync.bitfield import Bitfield
from edgesync.errors import EdgeSyncError, VerificationError
from edgesync.ids import BundleName, Digest, Version
from edgesync.manifest import Manifest
from edgesync.storage.paths import Tree

if TYPE_CHECKING:
    from device.bundle_store import BundleStore

logger = logging.getLogger(__name__)


def reconcile(store: "BundleStore") -> None:
    """Bring store and disk together. Raises StorageError."""
    activation.settle(store)
    for row in store.state.bundles():
        if row.state == "staged":
            _take_up_staged(store, row)
        else:
            _take_up_held(store, row)
    _find_unknown_trees(store)
    _follow_current(store)
    _clean_staging(store)


def _take_up_staged(store: "BundleStore", row: BundleRow) -> None:
    from device.bundle_store import StagedBundle

    try:
        parsed = store.manifest(row.digest)
        tree_map = TreeMap(parsed)
    except EdgeSyncError as exc:
        logger.warning("staged %s@%s is dropped: %s", row.name, row.version, exc)
        store.state.forget_bundle(row.digest)
        return
    bits = store.state.bits(row.digest, row.piece_count)
    root = store.directory / "staging" / row.digest
    if not (root / "tree").is_dir():
        root.mkdir(mode=0o700, exist_ok=True)
        (root / "tree").mkdir(mode=0o700)
        bits = Bitfield(row.piece_count)
        store.state.put_bundle(row, bits)
    store.adopt(StagedBundle(store, row, bits, tree_map))
    # A repair: the damaged tree stays in use, and a source of good files, until the new one takes its place.
    if store.bundle_path(row.name, row.version).is_dir():
        adopt_tree(store, row.digest, row.name, row.version)


def _take_up_held(store: "BundleStore", row: BundleRow) -> None:
    from device.bundle_store import HeldBundle

    if not store.bundle_path(row.name, row.version).is_dir():
        logger.warning("%s@%s is gone from the disk", row.name, row.version)
        store.notes_about[row.digest] = (
            f"the tree of {row.name}@{row.version} is gone from the disk"
        )
        store.state.forget_bundle(row.digest)
        return
    try:
        store.manifest_bytes(row.digest)
    except EdgeSyncError as exc:
        store.notes_about[row.digest] = (
            f"{row.name}@{row.version} cannot be served or checked: {exc}"
        )
        store.state.forget_bundle(row.digest)
        return
    store.adopt(HeldBundle(store, row, store.state.bits(row.digest, row.piece_count)))


def adopt_tree(store: "BundleStore", digest: Digest, name: BundleName, version: Version) -> None:
    """Hold an installed tree of which nothing is known: every file is hashed, only what matches counts."""
    from device.bundle_store import HeldBundle, bundle_row

    parsed = store.manifest(digest)
    row = bundle_row(digest, parsed, "held")
    held = HeldBundle(store, row, Bitfield(row.piece_count))
    staged = store.staged(digest)
    if staged is None:
        store.state.put_bundle(row, held.durable)
        held.durable = Bitfield.full(row.piece_count)
        held.have = held.durable.copy()
        store.adopt(held)
        damaged = activation.verify_held(held, None)
        store.state.put_bundle(row, held.durable)
        if damaged:
            store.notes_about[digest] = (
                f"{name}@{version} differs from its manifest in {len(damaged)} places"
            )
        return
    # The bits in the database are the staged tree's: what is known about this one lives in memory.
    held.damaged = True
    held.counters = staged.counters
    held.have = Bitfield.full(row.piece_count)
    store.adopt(held)


def _find_unknown_trees(store: "BundleStore") -> None:
    """Installed and staged trees without a row: all of them after the database was lost."""
    known = {(row.name, row.version) for row in store.state.bundles()}
    by_name: dict[tuple[str, str], list[tuple[Digest, Manifest]]] | None = None
    bundles = store.directory / "bundles"
    for folder in sorted(bundles.iterdir()):
        if not stat.S_ISDIR(folder.lstat().st_mode):
            continue
        for place in sorted(folder.iterdir()):
            if place.name == activation.CURRENT or not stat.S_ISDIR(place.lstat().st_mode):
                continue
            if (folder.name, place.name) in known:
                continue
            if by_name is None:
                by_name = _manifests_by_name(store)
            candidates = by_name.get((folder.name, place.name), [])
            for digest, parsed in candidates:
                if len(candidates) == 1 or _has_names_of(store, parsed):
                    logger.warning("%s@%s is taken up from the disk", folder.name, place.name)
                    adopt_tree(store, digest, BundleName(folder.name), Version(place.name))
                    break
            else:
                store.notes.append(f"{place} belongs to no bundle known here and is left alone")
    for folder in sorted((store.directory / "staging").iterdir()):
        digest = Digest(folder.name)
        if store.get(digest) is None and (folder / "tree").is_dir():
            _adopt_staged(store, digest)


def _manifests_by_name(
    store: "BundleStore",
) -> dict[tuple[str, str], list[tuple[Digest, Manifest]]]:
    found: dict[tuple[str, str], list[tuple[Digest, Manifest]]] = {}
    for path in sorted((store.directory / "manifests").iterdir()):
        try:
            parsed = manifests.parse(store.manifest_bytes(Digest(path.name)))
        except (EdgeSyncError, ValueError):
            continue
        key = (parsed.name, parsed.version)
        found.setdefault(key, []).append((Digest(path.name), parsed))
    return found


def _has_names_of(store: "BundleStore", parsed: Manifest) -> bool:
    """Where one version has several manifests, only the one whose names are on the disk is taken."""
    try:
        with Tree.open(store.bundle_path(parsed.name, parsed.version)) as tree:
            return not activation.walk_differences(tree, TreeMap(parsed), first_only=True)
    except OSError:
        return False


def _adopt_staged(store: "BundleStore", digest: Digest) -> None:
    from device.bundle_store import StagedBundle, bundle_row

    try:
        parsed = store.manifest(digest)
        row = bundle_row(digest, parsed, "staged")
        tree_map = TreeMap(parsed)
    except (EdgeSyncError, VerificationError):
        return  # cleaned up below
    empty = Bitfield(row.piece_count)
    store.state.put_bundle(row, empty, unchecked=POWER_CUT)
    logger.warning("the staged tree of %s@%s is taken up and hashed anew", row.name, row.version)
    store.adopt(StagedBundle(store, replace(row, state="staged"), empty, tree_map))


def _follow_current(store: "BundleStore") -> None:
    rows = store.state.active()
    held = {(bundle.name, bundle.version): bundle.digest for bundle in store.held_bundles()}
    names = {bundle.name for bundle in store.held_bundles()} | set(rows)
    for name in sorted(names):
        version = activation.current_version(store, name)
        digest = held.get((name, Version(version))) if version is not None else None
        if digest is not None:
            store.current[name] = digest
        if digest != rows.get(name):
            logger.warning("current of %s says %s", name, version)
            store.state.end_activation(name, held=None, active=digest)
        if version is not None and digest is None:
            store.notes.append(f"bundles/{name}/current points at {version}, which is not here")


def _clean_staging(store: "BundleStore") -> None:
    try:
        for folder in (store.directory / "staging").iterdir():
            if store.staged(Digest(folder.name)) is None:
                store.sweep_staging(folder.name)
        for staged in store.staged_bundles():
            for leftover in staged.root.iterdir():
                if leftover.name != "tree":
                    store.sweep_staging(staged.digest, leftover.name)
        for path in (store.directory / "manifests").iterdir():
            if path.name.startswith("."):  # a replacement a crash interrupted
                path.unlink()
    except OSError as exc:
        logger.warning("some leftovers could not be removed: %s", exc)
