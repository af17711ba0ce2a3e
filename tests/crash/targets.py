"""The programs whose power is cut, and what must hold of whatever is left.

Each target runs the project's real classes on a directory, telling the outside world (``acknowledge``) what it was
promised; its check opens the directory as the next start of the agent does and looks for a broken promise:

* ``store``: no piece is claimed whose bytes do not hash at every place it stands at; whatever is left can be finished;
* ``activation``: ``current`` points at a tree that is exactly a manifest's, the acknowledged version or a later one;
* ``trust``: metadata, sequences and counters are at least the acknowledged ones, and a whole set.
"""

import contextlib
import hashlib
import json
import logging
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from device import activation
from device.bundle_store import BundleStore, StagedBundle
from device.state import StateDatabase
from device.tree_map import TreeMap
from edgesync import limits
from edgesync import manifest as manifests
from edgesync.errors import EdgeSyncError, InstallError, StateCorruptError, StorageError
from edgesync.storage.paths import Tree
from tests.crash.builders import Built, build, random_files, read_tree
from tests.crash.powercut.record import acknowledge

FAILED = 3
"""Status of a program that stopped because the disk failed, as it should."""

limits.RESERVE_BYTES = 64 * limits.KIB  # type: ignore[misc]  # 16 MiB in every crash state would be all they hold
logging.disable(logging.CRITICAL)


@dataclass(frozen=True)
class Target:
    name: str
    program: Callable[[Path, Path, int], int]
    check: Callable[[Path, list[str], int, bool], str | None]
    """Called with directory, acknowledged lines, seed, and whether faults were injected."""


# --- bundles --------------------------------------------------------------------------------------------------------
@cache
def bundles(seed: int) -> tuple[Built, Built, Built]:
    """Three versions: many small files, one large, duplicates; each changes some of the one before."""
    rng = random.Random(seed)
    files = random_files(seed, 18, 9000, duplicates=0.2)
    files["big/image"] = rng.randbytes(90_000)
    files["d0/empty"] = b""
    symlinks = {"link": "big/image", "d1/up": "../d0"}
    modes = {"d0/empty": 0o755}
    made = []
    for version in ("1.0", "1.1", "2.0"):
        made.append(
            build(files, version=version, symlinks=symlinks, modes=modes, folders=("void",))
        )
        files = dict(files)
        for path in rng.sample(sorted(files), 4):
            files[path] = rng.randbytes(len(files[path]) or 10)
        image = bytearray(files["big/image"])
        image[5000:5100] = rng.randbytes(100)
        files["big/image"] = bytes(image)
        files[f"d2/new-{version}"] = rng.randbytes(3000)
        del files[rng.choice([path for path in sorted(files) if path.startswith("d1/")])]
        modes = {**modes, "big/image": 0o755}
    return made[0], made[1], made[2]


@contextmanager
def opened(directory: Path, boot_id: str) -> Iterator[BundleStore]:
    """State and store as the agent opens them; nothing is recorded as clean at the end."""
    state = StateDatabase.open(directory / "state.db")
    try:
        store = BundleStore.open(directory, state, boot_id=boot_id)
        try:
            yield store
        finally:
            store.abandon()
    finally:
        state.close()


def fill(
    staged: StagedBundle, built: Built, rng: random.Random, acks: Path | None, *, share: float = 1.0
) -> None:
    """Write what is missing, in random order, flushing now and then."""
    missing = list(staged.have.missing())
    rng.shuffle(missing)
    for count, index in enumerate(missing[: int(len(missing) * share)]):
        staged.write_piece(index, built.pieces[index], source="peer", carried_bytes=100)
        if rng.random() < 0.15:
            flushed = staged.flush()
            if acks is not None:
                acknowledge(acks, f"flushed {built.digest[:8]} {len(flushed)} {count}")
    if share == 1.0:
        staged.flush()


def false_claims(
    directory: Path, state: StateDatabase, known: tuple[Built, ...], removing: frozenset[str]
) -> str | None:
    """Read the claims as they are on disk and hash every place of every claimed piece."""
    by_digest = {built.digest: built for built in known}
    moving = {row.new for row in state.activating()}
    for row in state.bundles():
        built = by_digest[row.digest]
        bits = state.bits(row.digest, row.piece_count)
        place = directory / "staging" / row.digest / "tree"
        installed = directory / "bundles" / row.name / row.version
        if row.state == "held" or (row.digest in moving and not place.is_dir()):
            place = installed
            if row.version in removing and not place.is_dir():
                continue
            if not bits.complete:
                return f"{row.version} is held with {bits}"
        tree_map = TreeMap(built.manifest)
        for piece in bits:
            for file, offset in tree_map.occurrences(piece):
                path = place / tree_map.files[file]
                try:
                    with path.open("rb") as opened_file:
                        opened_file.seek(offset)
                        data = opened_file.read(tree_map.piece_lengths[piece])
                except OSError as exc:
                    return f"piece {piece} of {row.version} is claimed: {exc}"
                if hashlib.sha256(data).digest() != tree_map.piece_id(piece):
                    return f"piece {piece} of {row.version} is claimed, {path.name} differs"
    return None


def finish(store: BundleStore, built: Built) -> str | None:
    """The device must be able to go on from any state: fetch what is missing, activate, and have the tree."""
    for _ in range(3):
        held = store.held(built.digest)
        if held is not None:
            try:
                store.activate(built.digest)
                break
            except StorageError:
                pass
        staged = store.begin(built.data, built.manifest)
        staged.import_local()
        fill(staged, built, random.Random(1), None)
        try:
            staged.activate()
        except StorageError:
            continue
        break
    return exact(store.directory, "app", built)


def exact(directory: Path, name: str, built: Built, *, current: bool = True) -> str | None:
    """What differs between an installed tree and its manifest."""
    folder = directory / "bundles" / name
    if current and (version := _current(directory, name)) != built.manifest.version:
        return f"current is {version}, not {built.manifest.version}"
    place = folder / built.manifest.version
    try:
        with Tree.open(place) as tree:
            activation.check_walk(tree, TreeMap(built.manifest))
    except (InstallError, OSError) as exc:
        return f"{place.name}: {exc}"
    if read_tree(place) != built.files:
        return f"contents of {place.name} differ from the manifest"
    return None


def _current(directory: Path, name: str) -> str | None:
    try:
        return str((directory / "bundles" / name / "current").readlink())
    except OSError:
        return None


# --- piece store ----------------------------------------------------------------------------------------------------
def run_store(directory: Path, acks: Path, seed: int) -> int:
    first, second, _ = bundles(seed)
    rng = random.Random(seed)
    try:
        with opened(directory, "boot") as store:
            fill(store.begin(first.data, first.manifest), first, rng, acks, share=0.4)
        with opened(directory, "boot") as store:  # killed in between
            staged = store.begin(first.data, first.manifest)
            fill(staged, first, rng, acks, share=0.5)
            store.close()
        with opened(directory, "boot") as store:
            staged = store.begin(first.data, first.manifest)
            fill(staged, first, rng, acks)
            staged.hold()
            acknowledge(acks, "held 0")
            staged = store.begin(second.data, second.manifest)
            staged.import_local()
            acknowledge(acks, f"imported {staged.have.count}")
            fill(staged, second, rng, acks, share=0.6)
            staged.flush()
            other = store.begin(bundles(seed)[2].data, bundles(seed)[2].manifest)
            fill(other, bundles(seed)[2], rng, acks, share=0.3)
            other.discard()
            fill(staged, second, rng, acks)
            staged.hold()
            acknowledge(acks, "held 1")
            acknowledge(acks, "removing 1.0")
            store.remove(first.digest)
            store.close()
    except StorageError:
        return FAILED
    return 0


def check_store(directory: Path, acks: list[str], seed: int, faulty: bool) -> str | None:
    known = bundles(seed)
    removing = _removing(acks)
    state = StateDatabase.open(directory / "state.db")
    try:
        if wrong := false_claims(directory, state, known, removing):
            return wrong
    finally:
        state.close()
    with opened(directory, "next boot") as store:
        if wrong := false_claims(directory, store.state, known, frozenset()):
            return f"after the start: {wrong}"
        for number in (0, 1):
            held = store.held(known[number].digest)
            if f"held {number}" in acks and held is None and f"held {number + 1}" not in acks:
                return f"{known[number].manifest.version} was held and is gone"
        for built in known[:2]:
            if wrong := finish(store, built):
                return wrong
            if wrong := false_claims(directory, store.state, known, frozenset()):
                return f"after finishing {built.manifest.version}: {wrong}"
    return _damaged_database(directory, faulty)


def _removing(acks: list[str]) -> frozenset[str]:
    return frozenset(line.split()[1] for line in acks if line.startswith("removing "))


def _damaged_database(directory: Path, faulty: bool) -> str | None:
    if not faulty and (directory / "state.db.damaged").exists():
        return "state.db was damaged by a power cut alone"
    return None


# --- activation -----------------------------------------------------------------------------------------------------
STEPS = ("1.0", "1.1", "1.0", "1.0-repaired", "2.0", "1.1")


def run_activation(directory: Path, acks: Path, seed: int) -> int:
    first, second, third = bundles(seed)
    rng = random.Random(seed)
    try:
        with opened(directory, "boot") as store:
            for step, built in ((0, first), (1, second)):
                acknowledge(acks, f"begin {step}")
                staged = store.begin(built.data, built.manifest)
                staged.import_local()
                fill(staged, built, rng, None)
                staged.activate()
                acknowledge(acks, f"active {step}")
            acknowledge(acks, "begin 2")
            store.activate(first.digest)
            acknowledge(acks, "active 2")
        with opened(directory, "boot") as store:
            # An application spoils a file of the version in use; the repaired tree takes its place.
            acknowledge(acks, "begin 3")
            spoilt = directory / "bundles/app/1.0" / spoilt_file(first)
            spoilt.write_bytes(b"spoilt")
            if not store.verify(first.digest):
                return 71
            staged = store.begin(first.data, first.manifest)
            staged.import_local()
            fill(staged, first, rng, None)
            staged.activate()
            acknowledge(acks, "active 3")
            acknowledge(acks, "begin 4")
            staged = store.begin(third.data, third.manifest)
            staged.import_local()
            fill(staged, third, rng, None)
            staged.hold()
            store.activate(third.digest)
            acknowledge(acks, "active 4")
            acknowledge(acks, "removing 1.0")
            store.remove(first.digest)
            acknowledge(acks, "begin 5")
            store.activate(second.digest)
            acknowledge(acks, "active 5")
            store.close()
    except StorageError:
        return FAILED
    return 0


def spoilt_file(built: Built) -> str:
    """A file no other version shares, so that spoiling it spoils one tree."""
    others = {content for version in bundles_of(built) for content in version.files.values()}
    return next(
        path
        for path, content in built.files.items()
        if len(content) > 1000 and content not in others
    )


def bundles_of(built: Built) -> list[Built]:
    for known in _all_bundles():
        if built in known:
            return [other for other in known if other is not built]
    return []


def _all_bundles() -> list[tuple[Built, Built, Built]]:
    return [bundles(seed) for seed in _SEEDS]


_SEEDS: set[int] = set()


def check_activation(directory: Path, acks: list[str], seed: int, faulty: bool) -> str | None:
    known = bundles(seed)
    by_version = {built.manifest.version: built for built in known}
    done = max((int(line.split()[1]) for line in acks if line.startswith("active ")), default=-1)
    begun = max((int(line.split()[1]) for line in acks if line.startswith("begin ")), default=-1)
    # A step that failed is undone, so the version before it is right too.
    allowed = {STEPS[step].partition("-")[0] for step in range(max(done, 0), begun + 1)}
    spoiling = begun == 3 and done < 3

    def look() -> str | None:
        version = _current(directory, "app")
        if version is None:
            return "nothing is current" if done >= 0 else None
        if version not in allowed:
            return f"current is {version}, {sorted(allowed)} is right after {acks[-1:]}"
        if spoiling and version == "1.0":
            return _exact_but(directory, known[0], spoilt_file(known[0]))
        return exact(directory, "app", by_version[version])

    if wrong := look():
        return f"before the start: {wrong}"
    with opened(directory, "next boot") as store:
        if wrong := look():
            return f"after the start: {wrong}"
        active = store.active(known[0].manifest.name)  # type: ignore[arg-type]
        if (active.version if active else None) != _current(directory, "app"):
            return f"the database says {active and active.version}, the disk {_current(directory, 'app')}"
        if not spoiling and (wrong := false_claims(directory, store.state, known, frozenset())):
            return wrong
        for built in (known[2], known[0]):
            if wrong := finish(store, built):
                return f"going on: {wrong}"
    return _damaged_database(directory, faulty)


def _exact_but(directory: Path, built: Built, spoilt: str) -> str | None:
    found = read_tree(directory / "bundles/app" / built.manifest.version)
    found.pop(spoilt, None)
    if found != {path: data for path, data in built.files.items() if path != spoilt}:
        return "more than the spoilt file differs"
    return None


# --- trust store ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Story:
    """A fleet's metadata over time, and what a device is told."""

    start: object
    updates: list[object]
    sets: list[bytes]
    keys: tuple[str, ...]
    device_key: str


NOW = 1_800_000_000.0
DEVICE = "device-1"


@cache
def story(seed: int) -> Story:
    """Made by the gateway's own repository. Keys are random: one story a process, shared by forking."""
    from sqlite_utils import Database
    from tuf.api.metadata import Root

    from edgesync import assignment, trust
    from edgesync.identity import CertificateAuthority, Identity
    from gateway.repository import Repository, migrations

    rng = random.Random(seed)
    assigner, device = Identity.generate("gateway-1"), Identity.generate(DEVICE)
    authority = CertificateAuthority.create("main")
    regions = trust.Regions(
        regions=[
            trust.RegionEntry(
                name="main",
                ca=authority.certificate_der,
                gateways=[
                    trust.GatewayEntry(id="gateway-1", key=assigner.key, assign_key=assigner.key)
                ],
            )
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        db = Database(memory=True)
        db.conn.isolation_level = None
        migrations.apply(db)
        place = Path(folder)
        repository = Repository.create(
            db, keys=place / "keys", online=place / "online", regions=regions, utc_now=NOW
        )
        start = trust.TrustState(roots=repository.state().roots)
        updates: list[object] = []

        def tell() -> None:
            update = trust.MetadataUpdate()
            for name, data in repository.current_files().items():
                update = update.with_file(name, data)
            updates.append(update)

        tell()
        for number in range(6):
            now = NOW + 100.0 * (number + 1)
            if number in {2, 4}:
                with repository._atomic():
                    root = repository._load("root", Root)
                    repository._store("root", repository._resign("root", root, now))
                    repository._commit({}, now, snapshot=False)
            else:
                digest = hashlib.sha256(rng.randbytes(8)).hexdigest()
                repository.publish("files", "app", f"1.{number}", digest, 100, utc_now=now)
            tell()
        sets = [
            assignment.sign(
                assignment.AssignmentSet(
                    fleet=repository.fleet_id(),
                    gateway_key=assigner.key,
                    device=DEVICE,
                    device_key=device.key,
                    sequence=number + 1,
                    issued=int(NOW),
                    expires=int(NOW) + 90 * 86_400,
                    entries=[],
                ),
                assigner,
            )
            for number in range(4)
        ]
    return Story(start, updates, sets, (assigner.key,), device.key)


def _clocks() -> object:
    from device.trust_store import Clocks

    return Clocks(utc=lambda: NOW + 1000.0, running=lambda: 1000.0)


def run_trust(directory: Path, acks: Path, seed: int) -> int:
    from device.trust_store import TrustStore

    told = story(seed)
    try:
        store = TrustStore.create(directory, told.start, clocks=_clocks())  # type: ignore[arg-type]
        acknowledge(acks, "created")
        for number, update in enumerate(told.updates):
            store.accept(update)  # type: ignore[arg-type]
            acknowledge(acks, f"metadata {number}")
            if number < len(told.sets):
                store.accept_assignments(
                    told.sets[number],
                    keys=told.keys,  # type: ignore[arg-type]
                    device_id=DEVICE,
                    device_key=told.device_key,  # type: ignore[arg-type]
                )
                acknowledge(acks, f"sequence {number + 1}")
            store.commit_counter("files", "app", number + 1)
            acknowledge(acks, f"counter {number + 1}")
            store.save_time(force=True)
            if number == 3:
                store.close()
                store = TrustStore.open(directory, clocks=_clocks())  # type: ignore[arg-type]
        store.close()
    except StorageError:
        return FAILED
    return 0


def check_trust(directory: Path, acks: list[str], seed: int, faulty: bool) -> str | None:
    del faulty
    from device.trust_store import TrustStore

    told = story(seed)

    def highest(word: str) -> int:
        return max((int(line.split()[1]) for line in acks if line.startswith(word)), default=-1)

    try:
        store = TrustStore.open(directory, clocks=_clocks())  # type: ignore[arg-type]
    except StateCorruptError as exc:
        return str(exc) if "created" in acks else None
    with store:
        state = store.state
        whole = [_files(update) for update in told.updates]
        number = -1
        if state.timestamp is not None:
            have = (state.timestamp, state.snapshot, state.targets)
            number = next((n for n, files in enumerate(whole) if files[:3] == have), -2)
            if number == -2:
                return "timestamp, snapshot and targets are not of one set"
        if number < highest("metadata"):
            return f"metadata {number} where {highest('metadata')} was accepted"
        if number >= 0 and len(state.roots) < whole[number][3]:
            return f"{len(state.roots)} roots under metadata {number}"
        if store.assignment_sequence < highest("sequence"):
            return f"sequence {store.assignment_sequence} where {highest('sequence')} was accepted"
        if store.counter("files", "app") < highest("counter"):
            return (
                f"counter {store.counter('files', 'app')} where {highest('counter')} was committed"
            )
        if wrong := _accepts_older(store, told, number):
            return wrong
        for update in told.updates:  # and it can go on
            try:
                store.accept(update)  # type: ignore[arg-type]
            except EdgeSyncError:
                continue
        if store.state.timestamp != told.updates[-1].timestamp:  # type: ignore[attr-defined]
            return "the newest metadata is not accepted any more"
    return None


def _accepts_older(store: object, told: Story, number: int) -> str | None:
    before = store.state.timestamp  # type: ignore[attr-defined]
    for update in told.updates[: max(number, 0)]:
        with contextlib.suppress(EdgeSyncError):
            store.accept(replace(update, roots={}))  # type: ignore[attr-defined, type-var]
        if store.state.timestamp != before:  # type: ignore[attr-defined]
            return "older metadata was accepted"
    return None


def _files(update: object) -> tuple[bytes | None, bytes | None, bytes | None, int]:
    """(timestamp, snapshot, targets, number of roots) of a complete update."""
    timestamp = update.timestamp  # type: ignore[attr-defined]
    blobs = update.blobs  # type: ignore[attr-defined]
    snapshot_hash = json.loads(timestamp)["signed"]["meta"]["snapshot.json"]["hashes"]["sha256"]
    snapshot = blobs[snapshot_hash]
    targets_hash = json.loads(snapshot)["signed"]["meta"]["targets.json"]["hashes"]["sha256"]
    return timestamp, snapshot, blobs[targets_hash], len(update.roots)  # type: ignore[attr-defined]


TARGETS = {
    "store": Target("store", run_store, check_store),
    "activation": Target("activation", run_activation, check_activation),
    "trust": Target("trust", run_trust, check_trust),
}


def prepare(target: str, seed: int) -> None:
    """Make what program and checks share, before anything is forked."""
    if target == "trust":
        story(seed)
    else:
        _SEEDS.add(seed)
        for built in bundles(seed):
            manifests.parse(built.data)
