"""Small bundles for storage tests: a tree as a dict, cut into pieces without a chunker."""

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgesync import manifest as manifests
from edgesync.ids import Digest
from edgesync.manifest import (
    Chunking,
    DirectoryEntry,
    FileEntry,
    Manifest,
    SymlinkEntry,
    directory_mode,
    file_mode,
)


@dataclass(frozen=True)
class Built:
    """A manifest and the plain bytes of its pieces."""

    manifest: Manifest
    data: bytes
    digest: Digest
    pieces: list[bytes]
    files: dict[str, bytes]


def build(
    files: Mapping[str, bytes],
    *,
    name: str = "app",
    version: str = "1.0",
    piece_bytes: int = 4096,
    modes: Mapping[str, int] | None = None,
    mutable: frozenset[str] = frozenset(),
    symlinks: Mapping[str, str] | None = None,
    folders: tuple[str, ...] = (),
) -> Built:
    """Cut every file into pieces of ``piece_bytes``; equal pieces are listed once."""
    index: dict[bytes, int] = {}
    pieces: list[bytes] = []
    entries = []
    directories: set[str] = set(folders)
    for path in sorted(files, key=str.encode):
        content = files[path]
        runs: list[tuple[int, int]] = []
        for offset in range(0, len(content), piece_bytes):
            piece = content[offset : offset + piece_bytes]
            number = index.setdefault(hashlib.sha256(piece).digest(), len(pieces))
            if number == len(pieces):
                pieces.append(piece)
            if runs and runs[-1][0] + runs[-1][1] == number:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((number, 1))
        count = sum(length for _, length in runs)
        entries.append(
            FileEntry(
                path,
                file_mode((modes or {}).get(path, 0o644)),
                len(content),
                tuple(runs),
                hashlib.sha256(content).digest() if count > 1 else None,
                path in mutable,
            )
        )
    for path in [*files, *(symlinks or {}), *folders]:
        parts = path.split("/")[:-1]
        directories |= {"/".join(parts[: depth + 1]) for depth in range(len(parts))}
    manifest = Manifest(
        requires_features=[],
        kind="files",
        name=name,
        version=version,
        release_counter=0,
        hardware=[],
        access="fleet",
        payload_bytes=sum(map(len, files.values())),
        chunking=Chunking("fastcdc", 1, piece_bytes, piece_bytes),
        piece_ids=b"".join(index),
        piece_lengths=[len(piece) for piece in pieces],
        directories=[
            DirectoryEntry(path, directory_mode(0o755))
            for path in sorted(directories, key=str.encode)
        ],
        files=entries,
        symlinks=[
            SymlinkEntry(path, (symlinks or {})[path])
            for path in sorted(symlinks or {}, key=str.encode)
        ],
    )
    data = manifests.encode(manifest)
    return Built(manifest, data, manifests.digest(data), pieces, dict(files))


def random_files(
    seed: int, count: int, largest: int, *, folders: int = 4, duplicates: float = 0.1
) -> dict[str, bytes]:
    """A tree of incompressible files, some of them equal."""
    rng = random.Random(seed)
    files: dict[str, bytes] = {}
    for number in range(count):
        path = f"d{rng.randrange(folders)}/f{number:05d}"
        if files and rng.random() < duplicates:
            files[path] = rng.choice(list(files.values()))
        else:
            files[path] = rng.randbytes(rng.randint(0, largest))
    return files


def read_tree(root: Path) -> dict[str, bytes]:
    """Contents of every regular file below ``root``."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }
