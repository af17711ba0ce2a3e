"""The demo's input: a real tree of files, an edited copy of it, and the comparison that judges a device's copy."""

import hashlib
import os
import random
import shutil
import stat
import sysconfig
from collections.abc import Collection
from pathlib import Path

from edgesync.manifest import directory_mode, file_mode

DEFAULT_BYTES = 60_000_000
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
)
SUFFIXES = (".py", ".so")


def make_default(target: Path, *, max_bytes: int = DEFAULT_BYTES) -> None:
    """Copy up to ``max_bytes`` of the running Python's standard library, and add what trees in the field have too.

    Those are a symlink inside the tree, an executable and an empty folder.
    """
    library = Path(sysconfig.get_path("stdlib")).resolve()
    total = 0
    for folder, names, files in os.walk(library):
        names[:] = sorted(set(names) - SKIPPED_FOLDERS)
        for name in sorted(files):
            path = Path(folder, name)
            if not name.endswith(SUFFIXES) or not path.resolve().is_relative_to(library):
                continue
            size = path.stat().st_size
            if total + size > max_bytes:
                continue
            copy = target / path.relative_to(library)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
            total += size
    target.mkdir(parents=True, exist_ok=True)
    (target / "bin").mkdir(exist_ok=True)
    script = target / "bin" / "hello"
    script.write_text("#!/bin/sh\necho hello from the edge\n")
    script.chmod(0o755)
    (target / "hello").symlink_to("bin/hello")
    (target / "empty").mkdir(exist_ok=True)


def make_update(source: Path, target: Path, *, share: float = 0.01, seed: int = 1) -> int:
    """Copy ``source`` to ``target`` and edit a line in ``share`` of its files; returns how many were edited."""
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True)
        files = sorted(p for p in target.rglob("*") if p.is_file() and not p.is_symlink())
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)
        files = [target]
    chosen = random.Random(seed).sample(files, max(1, int(len(files) * share))) if files else []  # noqa: S311
    for path in chosen:
        data = path.read_bytes()
        middle = len(data) // 2
        path.chmod(path.stat().st_mode | stat.S_IWUSR)
        path.write_bytes(data[:middle] + b"\n# edited for the second version\n" + data[middle:])
    return len(chosen)


def make_random(target: Path, size: int, *, seed: int) -> None:
    """One file of ``size`` bytes that no compressor makes smaller."""
    target.mkdir(parents=True)
    with (target / "weights.bin").open("wb") as file:
        rng = random.Random(seed)  # noqa: S311
        for start in range(0, size, 1 << 20):
            file.write(rng.randbytes(min(1 << 20, size - start)))


def describe(root: Path, left_out: Collection[str] = ()) -> dict[str, tuple[str, int, str]]:
    """Path → (type, mode, content hash or link target), modes as a device is given them.

    A bundle made of one file is described as the tree it becomes: that file alone.
    """
    if root.is_file():
        return {root.name: ("file", file_mode(root.stat().st_mode), _sha256(root))}
    entries: dict[str, tuple[str, int, str]] = {}
    for folder, names, files in os.walk(root):
        for name in (*names, *files):
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            if any(
                relative == out or relative.startswith(out.rstrip("/") + "/") for out in left_out
            ):
                continue
            info = path.lstat()
            if stat.S_ISLNK(info.st_mode):
                entries[relative] = ("symlink", 0, str(path.readlink()))
            elif stat.S_ISDIR(info.st_mode):
                entries[relative] = ("folder", directory_mode(info.st_mode), "")
            else:
                entries[relative] = ("file", file_mode(info.st_mode), _sha256(path))
    return entries


def first_difference(want: dict[str, tuple[str, int, str]], root: Path) -> str | None:
    """A sentence about the first entry of ``root`` that is not as in ``want``; None when the trees are equal."""
    have = describe(root) if root.is_dir() else {}
    for path in sorted(want.keys() | have.keys()):
        if want.get(path) != have.get(path):
            return f"{path}: published {want.get(path)}, found {have.get(path)}"
    return None


def disk_bytes(root: Path) -> int:
    """Bytes the tree takes on disk; a file with several links counts once."""
    seen: set[tuple[int, int]] = set()
    total = 0
    for folder, _names, files in os.walk(root):
        for path in (Path(folder), *(Path(folder, name) for name in files)):
            try:
                info = path.lstat()
            except FileNotFoundError:
                continue
            if (info.st_dev, info.st_ino) not in seen:
                seen.add((info.st_dev, info.st_ino))
                total += info.st_blocks * 512
    return total


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
