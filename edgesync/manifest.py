"""The manifest: what a bundle consists of, as bytes that are signed and kept verbatim.

Decides whether those bytes describe a tree a device may write: it parses, bounds and cross-checks; it does not verify
the signature (the caller compares the digest first) and touches no files.

Form (``edgesync.manifest/1``), JSON, at most MAX_MANIFEST_BYTES; tables are arrays so that 100,000 entries fit::

    {"schema": "edgesync.manifest/1", "requires_features": [], "kind": "files", "name": "app", "version": "1.0",
     "release_counter": 0, "hardware": [], "access": "fleet", "payload_bytes": 123456,
     "chunking": {"algorithm": "fastcdc", "min": 16384, "avg": 65536, "max": 262144},
     "piece_ids": "<base64 of the concatenated SHA-256 ids, 32 bytes each>", "piece_lengths": [65536, …],
     "directories": [["etc", 493], …],
     "files": [["etc/app.conf", 420, 1234, [[0, 1]], null], …],
     "symlinks": [["etc/alias", "app.conf"], …]}

A file is ``[path, mode, size, runs, sha256, mutable?]``: runs are ``[first piece, count]``; sha256 (base64) is null
where one piece is the whole file (the piece id says it) or the file is empty. Entries are sorted by path bytes.

Invariants of a parsed Manifest: every path passed ``check_path``; no two are equal after NFC and case folding; nothing
lies below a file or symlink; every parent folder is listed; symlinks resolve inside; sizes equal the sum of their
pieces; every piece is used; modes obey ``file_mode`` and ``directory_mode``.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterator
from itertools import accumulate
from typing import Annotated, Literal

import msgspec

from edgesync import limits
from edgesync.errors import UnsafePathError, VerificationError
from edgesync.ids import Digest, PieceId

SCHEMA: Literal["edgesync.manifest/1"] = "edgesync.manifest/1"
FEATURES: frozenset[str] = frozenset()
"""``requires_features`` this version understands."""

# Not ``$``, which also matches before a final newline.
NAME_PATTERN = r"^[a-z0-9][a-z0-9-]{0,62}\Z"
VERSION_PATTERN = r"^(?!current\Z)[A-Za-z0-9][A-Za-z0-9.+_-]{0,63}\Z"
_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f-\x9f\\]")
"""Control characters of ASCII and Latin-1, and the separator of another system."""
_PLAIN = re.compile(r"(?:(?!\.\.?(?:/|\Z))[ -.0-\[\]-~]{1,255}(?:/(?=.)|\Z))+\Z")
"""Paths of printable ASCII that obey every rule; any other is looked at rule by rule."""
_NO_NAMES = frozenset((b"", b".", b".."))
_MAX_FOLLOWED = 40
"""As Linux: a path that leads through more symlinks is taken for a circle."""
_NAME = re.compile(NAME_PATTERN)
_VERSION = re.compile(VERSION_PATTERN)

Kind = Literal["firmware", "model", "files"]
KINDS: tuple[Kind, ...] = ("firmware", "model", "files")
Access = Literal["fleet", "assigned"]

_Length = Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_PIECE_BYTES)]
_Size = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
_Mode = Annotated[int, msgspec.Meta(ge=0, le=0o775)]
_Index = Annotated[int, msgspec.Meta(ge=0, lt=limits.MAX_PIECES)]
_Count = Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_PIECES)]
Hardware = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")]


class Chunking(msgspec.Struct, frozen=True):
    """Parameters of the content-defined chunker, in bytes."""

    algorithm: Literal["fastcdc"]
    min: _Length
    avg: _Length
    max: _Length


class FileEntry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    path: str
    mode: _Mode
    size: _Size
    runs: tuple[tuple[_Index, _Count], ...]
    sha256: bytes | None = None
    mutable: bool = False

    def pieces(self) -> Iterator[int]:
        """Piece indexes in file order."""
        for first, count in self.runs:
            yield from range(first, first + count)


class DirectoryEntry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    path: str
    mode: _Mode


class SymlinkEntry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    path: str
    target: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    schema: Literal["edgesync.manifest/1"] = SCHEMA
    requires_features: Annotated[list[str], msgspec.Meta(max_length=64)]
    kind: Kind
    name: Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)]
    version: Annotated[str, msgspec.Meta(pattern=VERSION_PATTERN)]
    release_counter: Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
    hardware: Annotated[list[Hardware], msgspec.Meta(max_length=64)]
    access: Access
    payload_bytes: _Size
    chunking: Chunking
    piece_ids: bytes
    piece_lengths: Annotated[list[_Length], msgspec.Meta(max_length=limits.MAX_PIECES)]
    directories: Annotated[list[DirectoryEntry], msgspec.Meta(max_length=limits.MAX_FILES)]
    files: Annotated[list[FileEntry], msgspec.Meta(max_length=limits.MAX_FILES)]
    symlinks: Annotated[list[SymlinkEntry], msgspec.Meta(max_length=limits.MAX_FILES)]

    @property
    def piece_count(self) -> int:
        return len(self.piece_lengths)

    @property
    def unique_bytes(self) -> int:
        """Plain bytes of all pieces, each once; at most ``payload_bytes``."""
        return sum(self.piece_lengths)

    def piece_id(self, index: int) -> PieceId:
        return PieceId(self.piece_ids[index * 32 : index * 32 + 32])

    def piece_index(self) -> dict[PieceId, int]:
        """Piece id → index; built anew on each call (100,000 pieces: about 14 MB), so keep the result or do without."""
        return {self.piece_id(index): index for index in range(self.piece_count)}

    def entry_count(self) -> int:
        return len(self.files) + len(self.directories) + len(self.symlinks)


def digest(data: bytes) -> Digest:
    """The bundle id: SHA-256 of a manifest's exact bytes."""
    return Digest(hashlib.sha256(data).hexdigest())


def encode(manifest: Manifest) -> bytes:
    """The bytes to sign and keep. Raises VerificationError: the manifest breaks an invariant or is too large."""
    check(manifest)
    data = msgspec.json.encode(manifest)
    if len(data) > limits.MAX_MANIFEST_BYTES:
        raise VerificationError(
            f"the manifest would have {len(data)} bytes, at most {limits.MAX_MANIFEST_BYTES} are allowed: "
            "publish fewer files or split the bundle"
        )
    return data


_decoder = msgspec.json.Decoder(Manifest)


def parse(data: bytes) -> Manifest:
    """Decode and check a manifest whose digest the caller has compared with signed metadata.

    Raises VerificationError: not this schema, out of bounds, an unknown required feature or a broken invariant.
    Raises UnsafePathError: a path no device may write.
    """
    if len(data) > limits.MAX_MANIFEST_BYTES:
        raise VerificationError(
            f"a manifest of {len(data)} bytes is over the cap of {limits.MAX_MANIFEST_BYTES}"
        )
    try:
        manifest = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise VerificationError(f"the manifest cannot be read: {exc}") from exc
    unknown = sorted(set(manifest.requires_features) - FEATURES)
    if unknown:
        raise VerificationError(
            f"the bundle needs features this version does not have: {', '.join(unknown)}"
        )
    check(manifest)
    return manifest


def check_name(name: str) -> str:
    if not _NAME.match(name):
        raise VerificationError(
            f"bundle name {name!r} is not of the form [a-z0-9][a-z0-9-]{{0,62}}"
        )
    return name


def check_version(version: str) -> str:
    if not _VERSION.match(version):
        raise VerificationError(
            f"version {version!r} is not of the form [A-Za-z0-9][A-Za-z0-9.+_-]{{0,63}} or is 'current'"
        )
    return version


def check_path(path: str) -> str:
    """Return ``path`` if it is a relative path a device may create, else raise UnsafePathError."""
    # Nearly every path is plain, and there may be 100,000 of them.
    if len(path) <= limits.MAX_PATH_BYTES and _PLAIN.match(path):
        return path
    try:
        raw = path.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise UnsafePathError(f"{path!a} is not UTF-8") from exc
    if len(raw) > limits.MAX_PATH_BYTES:
        raise UnsafePathError(
            f"a path has {len(raw)} bytes, at most {limits.MAX_PATH_BYTES} are allowed"
        )
    if not unicodedata.is_normalized("NFC", path):
        raise UnsafePathError(f"{path!a} is not in Unicode form NFC")
    if _FORBIDDEN.search(path):
        raise UnsafePathError(f"{path!a} has a backslash or control character")
    for component in raw.split(b"/"):
        if component in _NO_NAMES:
            raise UnsafePathError(f"{path!a} has an empty, '.' or '..' component")
        if len(component) > limits.MAX_COMPONENT_BYTES:
            raise UnsafePathError(
                f"{path!a} has a component over {limits.MAX_COMPONENT_BYTES} bytes"
            )
    return path


def check_symlink(path: str, target: str) -> None:
    """Raise UnsafePathError unless ``target``, read as text from the link's folder, stays inside the tree."""
    if (
        not target
        or target.startswith("/")
        or len(target.encode("utf-8", "replace")) > limits.MAX_SYMLINK_BYTES
    ):
        raise UnsafePathError(f"symlink {path!a} has an absolute, empty or overlong target")
    if _FORBIDDEN.search(target):
        raise UnsafePathError(
            f"symlink {path!a} has a backslash or control character in its target"
        )
    depth = path.count("/")
    for component in target.split("/"):
        if component == "..":
            depth -= 1
        elif component not in {"", "."}:
            depth += 1
        if depth < 0:
            raise UnsafePathError(f"symlink {path!a} points outside the bundle")


def file_mode(mode: int) -> int:
    """The mode a file is given on a device: no set-id, no world write, always readable by its owner."""
    return (mode & 0o775) | 0o400


def directory_mode(mode: int) -> int:
    """The mode a folder is given on a device: always rwx for its owner, who must be able to rename it."""
    return (mode & 0o775) | 0o700


def fold(path: str) -> str:
    """The form under which two paths clash on some file system."""
    if path.isascii():
        return path.lower()
    return unicodedata.normalize("NFC", path.casefold())


def check(manifest: Manifest) -> None:
    """Raise VerificationError or UnsafePathError unless every invariant in the module's docstring holds."""
    count = manifest.piece_count
    if len(manifest.piece_ids) != 32 * count:
        raise VerificationError("the manifest's piece ids and piece lengths differ in number")
    if manifest.entry_count() > limits.MAX_FILES:
        raise VerificationError(f"the manifest lists more than {limits.MAX_FILES} entries")
    chunking = manifest.chunking
    if not chunking.min <= chunking.avg <= chunking.max:
        raise VerificationError("the manifest's chunking bounds are not in order")
    _check_tree(manifest)
    _check_links(manifest)
    # Sums and uses come from tables of differences: a run costs the same however long it says it is.
    starts = [0, *accumulate(manifest.piece_lengths)]
    uses = [0] * (count + 1)
    total = 0
    for entry in manifest.files:
        if entry.mode != file_mode(entry.mode):
            raise VerificationError(f"file {entry.path!a} has mode {entry.mode:o}")
        size = 0
        pieces = 0
        for first, length in entry.runs:
            if first + length > count:
                raise VerificationError(
                    f"file {entry.path!a} names a piece the manifest does not have"
                )
            uses[first] += 1
            uses[first + length] -= 1
            pieces += length
            size += starts[first + length] - starts[first]
        if size != entry.size:
            raise VerificationError(f"file {entry.path!a} has size {entry.size}, its pieces {size}")
        if (entry.sha256 is None) != (pieces <= 1) or (
            entry.sha256 is not None and len(entry.sha256) != 32
        ):
            raise VerificationError(f"file {entry.path!a} has no hash, or one it must not have")
        total += size
    if total != manifest.payload_bytes:
        raise VerificationError(
            f"the manifest says {manifest.payload_bytes} bytes, its files have {total}"
        )
    if any(n <= 0 for n in accumulate(uses[:-1])):
        raise VerificationError("the manifest lists pieces no file uses")


def _check_tree(manifest: Manifest) -> None:
    folded: set[str] = set()
    directories: set[str] = set()
    for table in (manifest.directories, manifest.files, manifest.symlinks):
        previous = b""
        for entry in table:
            path = check_path(entry.path)
            raw = path.encode()
            if raw <= previous:
                raise VerificationError(f"{path!a} is out of order or listed twice")
            previous = raw
            key = fold(path)
            if key == path:
                key = path  # one string instead of two, 100,000 times
            if key in folded:
                raise UnsafePathError(f"{path!a} clashes with another path after case folding")
            folded.add(key)
            if isinstance(entry, DirectoryEntry):
                directories.add(path)
                if entry.mode != directory_mode(entry.mode):
                    raise VerificationError(f"folder {path!a} has mode {entry.mode:o}")
            parent = path.rpartition("/")[0]
            if parent and parent not in directories:
                raise UnsafePathError(f"{path!a} lies in a folder the manifest does not list")


def _check_links(manifest: Manifest) -> None:
    links = {entry.path: entry.target for entry in manifest.symlinks}
    for path, target in links.items():
        check_symlink(path, target)
    escaping = escaping_symlink(links)
    if escaping is not None:
        raise UnsafePathError(
            f"symlink {escaping!a} points outside the bundle through another link, or in a circle"
        )


def escaping_symlink(links: dict[str, str]) -> str | None:
    """A symlink that leaves the tree when followed as a kernel would, or takes over 40 links; None if there is none.

    ``links`` is every symlink of the tree, path to target. Raises VerificationError: following them all takes more
    than MAX_SYMLINK_STEPS.
    """
    steps = 0
    deepest = max((path.count("/") + 1 for path in links), default=0)
    for path, target in links.items():
        here = path.split("/")[:-1]
        todo = target.split("/")[::-1]
        followed = 0
        while todo:
            steps += 1
            if steps > limits.MAX_SYMLINK_STEPS:
                raise VerificationError(
                    "the symlinks are too entangled to be followed: use fewer or shorter ones"
                )
            component = todo.pop()
            if component in {"", "."}:
                continue
            if component == "..":
                if not here:
                    return path
                here.pop()
                continue
            here.append(component)
            # Deeper than any link lies, joining would only cost more with each step.
            link = links.get("/".join(here)) if len(here) <= deepest else None
            if link is not None:
                followed += 1
                if followed > _MAX_FOLLOWED:
                    return path
                here.pop()
                todo.extend(link.split("/")[::-1])
    return None


def file_sha256(manifest: Manifest, entry: FileEntry) -> bytes:
    """The whole file's SHA-256, wherever the manifest keeps it."""
    if entry.sha256 is not None:
        return entry.sha256
    for first, _count in entry.runs:
        return bytes(manifest.piece_id(first))
    return hashlib.sha256(b"").digest()


def short(bundle: Digest) -> str:
    """The first 12 digits, as screens show a bundle id."""
    return bundle[:12]


__all__ = [
    "FEATURES",
    "KINDS",
    "SCHEMA",
    "Access",
    "Chunking",
    "DirectoryEntry",
    "FileEntry",
    "Hardware",
    "Kind",
    "Manifest",
    "SymlinkEntry",
    "check",
    "check_name",
    "check_path",
    "check_symlink",
    "check_version",
    "digest",
    "directory_mode",
    "encode",
    "escaping_symlink",
    "file_mode",
    "file_sha256",
    "fold",
    "parse",
    "short",
]
