"""What a disk may hold after a power cut, given the log of everything that was done to it.

Decides which pending changes survive, by a seeded strategy; lays the result out in a directory. See the package's
docstring for the two models.
"""

import math
import os
import random
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tests.crash.powercut.log import Record

ROOT = 1
NAMELESS = 0
"""Folder of files that never had a name (O_TMPFILE)."""

Model = Literal["ordered", "harsh"]
_NOTHING, _ALL = -1.0, math.inf

# Strategy: (newest name change kept, newest data change kept); None where each file or block decides for itself.
_STRATEGIES: dict[str, tuple[float, float] | None] = {
    "lose-all": (_NOTHING, _NOTHING),
    "keep-all": (_ALL, _ALL),
    "names-only": (_ALL, _NOTHING),
    "data-only": (_NOTHING, _ALL),
    "prefix": None,
    "per-file": None,
    "blocks": None,
}
_CHOICES = [*_STRATEGIES, "per-file", "blocks"]


def resize(buffer: bytearray, size: int) -> None:
    if size < len(buffer):
        del buffer[size:]
    else:
        buffer.extend(bytes(size - len(buffer)))


class Change(NamedTuple):
    """One change of a file no sync has covered yet: write (offset, bytes), truncate (size) or attr."""

    number: int
    kind: str
    offset: int
    data: Any


class NameChange(NamedTuple):
    """One change of a directory no sync has covered yet; the last three are a rename's or an exchange's."""

    number: int
    kind: str
    folder: int
    name: bytes
    ino: int
    new_folder: int = 0
    new_name: bytes = b""
    other_ino: int = 0


@dataclass
class Told:
    """What one crash state lost, for the reader of a failure."""

    strategy: str
    grain: int
    names_lost: list[str] = field(default_factory=list)
    data_lost: list[str] = field(default_factory=list)


class Node:
    """One inode: what is surely on disk, and the changes that are pending."""

    def __init__(
        self, name: bytes, mode: int, uid: int, gid: int, rdev: int = 0, target: bytes | None = None
    ) -> None:
        self.name, self.mode, self.uid, self.gid, self.rdev = name, mode, uid, gid, rdev
        self.target = target
        self.mtime = -1
        self.base = bytearray()
        self.pending: list[Change] = []

    def apply(self, change: Change) -> None:
        if change.kind == "attr":
            self.mode, self.uid, self.gid, mtime = change.data
            self.mtime = mtime if mtime >= 0 else self.mtime
        elif change.kind == "truncate":
            resize(self.base, change.offset)
        else:
            self._store(change.offset, change.data)

    def _store(self, offset: int, data: bytes) -> None:
        resize(self.base, max(len(self.base), offset))
        self.base[offset : offset + len(data)] = data

    def sync(self, *, fine: bool, data_only: bool) -> None:
        """A sync that failed leaves pages that count as clean: what they held is never written, as on Linux."""
        if not fine:
            self.pending = [change for change in self.pending if change.kind != "write"]
            return
        left = [change for change in self.pending if change.kind == "attr" and data_only]
        for change in self.pending:
            if change not in left:
                self.apply(change)
        self.pending = left

    def crash(
        self, bound: float | None, rng: random.Random, *, tear: bool, grain: int, harsh: bool
    ) -> int:
        """Keep some pending changes; returns how many are lost.

        With a ``bound`` those up to that number, and with ``tear`` parts of the others; without one each block holds
        one of its own versions since the last sync.
        """
        numbers = [change.number for change in self.pending]
        versions: dict[int, float] = {}
        keep = rng.choice((0.1, 0.5, 0.9))
        size_bound = (
            bound if bound is not None else rng.choice((_NOTHING, _ALL, _ALL, rng.choice(numbers)))
        )
        size = newest = len(self.base)
        lost = 0
        for change in self.pending:
            number, kind, offset, data = change
            on_time = number <= size_bound
            lost += not on_time
            if kind == "truncate":
                if on_time:
                    del self.base[offset:]
                    size = offset
                elif offset < newest and not harsh:
                    break  # blocks allocated after a lost truncate cannot be reached
                newest = offset
            elif kind == "attr" or (on_time and bound is not None):
                if on_time:
                    self.apply(change)
                    size = max(size, offset + len(data)) if kind == "write" else size
            else:
                end = offset + len(data)
                newest = max(newest, end)
                for start, stop in (
                    _blocks(offset, len(data), grain) if bound is None or tear else ()
                ):
                    if bound is None:
                        block = start // grain
                        if block not in versions:
                            kept = rng.random() < keep
                            versions[block] = _ALL if kept else rng.choice([_NOTHING, *numbers])
                        survives = number <= versions[block]
                    else:
                        survives = rng.random() < 0.5
                    if survives:
                        self._store(start, data[start - offset : stop - offset])
                if on_time:
                    size = max(size, end)
                elif bound is None or tear:  # the size on disk covers only some of a write's blocks
                    whole = (offset // grain + rng.randint(0, len(data) // grain + 1)) * grain
                    size, tear = max(size, min(end, whole)), False
        resize(self.base, size)
        self.pending = []
        return lost


def _blocks(offset: int, length: int, grain: int) -> list[tuple[int, int]]:
    """The parts of a write that lie in different blocks."""
    found = []
    start, end = offset, offset + length
    while start < end:
        stop = min(end, (start // grain + 1) * grain)
        found.append((start, stop))
        start = stop
    return found


class Disk:
    """Feed it the log, then ``crash`` a forked copy and ``materialise`` it."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.nodes: dict[int, Node] = {}
        self.names: dict[int, dict[bytes, int]] = {NAMELESS: {}, ROOT: {}}
        self.pending_names: list[NameChange] = []
        self.dirty: set[int] = set()
        self.acks: list[bytes] = []
        self._tidy_at = 1000

    def feed(self, number: int, record: Record) -> None:
        kind, _when, *fields = record
        match kind:
            case "write" | "zero" | "truncate" | "attr":
                self._change_file(number, kind, fields)
            case "fsync" | "fsyncdir" | "syncfs":
                self._sync(kind, fields)
            case "ack":
                self.acks.append(fields[0])
            case "directory":
                self.nodes[ROOT] = Node(b".", *fields[1:])
            case "create":
                folder, name, ino, *rest = fields
                self.nodes[ino] = Node(name, *rest)
                self.names[ino] = {}
                self.pending_names.append(NameChange(number, kind, folder, name, ino))
            case "link" | "unlink" | "rename" | "exchange":
                self.pending_names.append(NameChange(number, kind, *fields))

    def _change_file(self, number: int, kind: str, fields: list[Any]) -> None:
        ino, offset, *rest = fields
        node = self.nodes.get(ino)
        if node is None:  # without a name for good
            return
        data: Any = fields[1:]
        if kind in {"write", "zero"}:
            data = bytes(rest[0])  # bytes(n) is n zeros
        node.pending.append(Change(number, "write" if kind == "zero" else kind, offset, data))
        self.dirty.add(ino)

    def _sync(self, kind: str, fields: list[Any]) -> None:
        *target, fine = fields
        inos = self.dirty.copy() if kind == "syncfs" else self.nodes.keys() & set(target[:1])
        for ino in inos:
            self.nodes[ino].sync(fine=fine, data_only=kind == "fsync" and bool(target[1]))
        self.dirty = {ino for ino in self.dirty if self.nodes[ino].pending}
        if fine and kind != "fsync":
            self._cover(None if kind == "syncfs" else target[0])

    def _folders(self, change: NameChange) -> set[int]:
        if change.kind in {"rename", "exchange"}:
            return {change.folder, change.new_folder}
        return {change.folder}

    def _cover(self, folder: int | None) -> None:
        """A directory's fsync (None: everything): its changes, and those they build on, are on disk for good."""
        harsh = self.model == "harsh"
        folders, inos = {folder}, set[int]()
        covered, left = [], []
        for change in reversed(self.pending_names):
            touched = self._folders(change)
            if harsh and change.kind in {"rename", "exchange"}:
                touched = {change.new_folder}  # a move is durable with its new directory
            hit = (
                folder is None
                or bool(touched & folders)
                or change.folder == NAMELESS
                or (harsh and change.ino in inos)
            )
            (covered if hit else left).append(change)
            if hit:
                inos.add(change.ino)
                if not harsh:
                    folders |= touched
        self.pending_names = left[::-1]
        for change in reversed(covered):
            self._apply(change, durable=True)
        if len(self.nodes) > self._tidy_at:
            self._forget_nameless()

    def _forget_nameless(self) -> None:
        alive = {ino for names in self.names.values() for ino in names.values()} | {ROOT}
        alive |= {change.ino for change in self.pending_names}
        self.nodes = {ino: node for ino, node in self.nodes.items() if ino in alive}
        self.dirty &= self.nodes.keys()
        self._tidy_at = 2 * len(self.nodes) + 1000

    def _apply(self, change: NameChange, *, durable: bool = False) -> None:
        here = self.names[change.folder]
        if change.kind in {"create", "link"}:
            here[change.name] = change.ino
            return
        if not durable and here.get(change.name) != change.ino:
            return  # without its precondition an operation is void
        if change.kind == "exchange":
            there = self.names[change.new_folder]
            if durable or there.get(change.new_name) == change.other_ino:
                here[change.name], there[change.new_name] = change.other_ino, change.ino
            return
        here.pop(change.name, None)
        if change.kind == "rename":
            self.names[change.new_folder][change.new_name] = change.ino

    def settle(self) -> None:
        """Everything reached the disk: the state at the end, with no cut."""
        self._sync("syncfs", [True])

    def crash(self, seed: int) -> Told:
        """Decide which pending changes reached the disk."""
        rng = random.Random(seed)
        strategy, grain = rng.choice(_CHOICES), rng.choice((512, 4096))
        told = Told(strategy, grain)
        fixed = _STRATEGIES[strategy]
        if strategy == "prefix":
            numbers: list[float] = [change.number for change in self.pending_names]
            numbers += [c.number for ino in sorted(self.dirty) for c in self.nodes[ino].pending]
            bound = rng.choice(numbers or [0])
            fixed = (bound, bound)
        self._crash_names(fixed, rng, told)
        for ino in sorted(self.dirty):
            node = self.nodes[ino]
            data_bound = fixed[1] if fixed else None
            if strategy == "per-file":
                data_bound = rng.choice((_NOTHING, _ALL, rng.choice(node.pending).number))
            count = len(node.pending)
            tear = strategy in {"prefix", "per-file"} and rng.random() < 0.5
            lost = node.crash(data_bound, rng, tear=tear, grain=grain, harsh=self.model == "harsh")
            if lost or data_bound is None or tear:
                told.data_lost.append(
                    f"{os.fsdecode(node.name)}: {lost or 'parts'} of {count} changes"
                )
        return told

    def _crash_names(
        self, fixed: tuple[float, float] | None, rng: random.Random, told: Told
    ) -> None:
        keep = rng.choice((0.1, 0.5, 0.9))
        bounds: dict[int, float] = {}
        stopped: set[int] = set()
        for change in self.pending_names:
            folders = self._folders(change)
            for folder in sorted(folders - bounds.keys()):
                own = [c.number for c in self.pending_names if folder in self._folders(c)]
                bounds[folder] = (
                    fixed[0] if fixed else rng.choice((_NOTHING, _ALL, rng.choice(own)))
                )
            if self.model == "harsh":
                kept = change.number <= fixed[0] if fixed else rng.random() < keep
            else:
                kept = not folders & stopped and all(change.number <= bounds[f] for f in folders)
                if not kept:
                    stopped |= folders
            if kept or change.folder == NAMELESS:
                self._apply(change)
            else:
                names = os.fsdecode(b" ".join((change.name, change.new_name)).strip())
                told.names_lost.append(f"{change.kind} {names}")

    def materialise(self, path: Path) -> None:
        """Lay the tree out in a new directory."""
        made: dict[int, Path] = {}
        finish: list[tuple[Path, Node]] = []
        todo = [(ROOT, path)]
        path.mkdir()
        finish.append((path, self.nodes[ROOT]))
        while todo:
            folder, place = todo.pop()
            for raw, ino in self.names[folder].items():
                node, target = self.nodes[ino], place / os.fsdecode(raw)
                if ino in made:
                    if not stat.S_ISDIR(
                        node.mode
                    ):  # the harsh model could show one directory twice
                        os.link(made[ino], target, follow_symlinks=False)
                    continue
                made[ino] = target
                if stat.S_ISDIR(node.mode):
                    target.mkdir()
                    todo.append((ino, target))
                    finish.append((target, node))
                elif stat.S_ISLNK(node.mode):
                    target.symlink_to(os.fsdecode(node.target or b""))
                else:
                    target.write_bytes(node.base)
                    finish.append((target, node))
        for place, node in reversed(finish):
            os.chown(place, node.uid, node.gid)
            place.chmod(stat.S_IMODE(node.mode))
            if node.mtime >= 0:
                os.utime(place, ns=(node.mtime, node.mtime))
