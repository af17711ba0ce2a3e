"""Manifests: what is encoded parses to the same, and nothing else than a sound manifest parses at all."""

import hashlib
import json
import random
import re
import string
import unicodedata
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edgesync import limits, manifest
from edgesync.errors import EdgeSyncError, UnsafePathError, VerificationError
from edgesync.manifest import Chunking, DirectoryEntry, FileEntry, Manifest, SymlinkEntry

ALPHABET = string.ascii_letters + "0123456789-_. éßЖ日"
names = st.text(ALPHABET, min_size=1, max_size=8).filter(lambda name: name not in {".", ".."})
paths = st.lists(names, min_size=1, max_size=4).map("/".join)


def piece(number: int) -> bytes:
    return hashlib.sha256(b"%d" % number).digest()


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """Trees with shared pieces, runs that jump, empty files and folders, links to siblings."""
    taken: dict[str, str] = {}
    directories: list[str] = []

    def take(path: str) -> bool:
        """Claim a path and the folders above it, unless something is in the way."""
        parts = path.split("/")
        above = ["/".join(parts[:n]) for n in range(1, len(parts))]
        new = [p for p in above if p not in directories]
        wanted = [manifest.fold(p) for p in [*new, path]]
        if any(p in taken for p in wanted) or any(
            taken.get(manifest.fold(p), p) != p for p in above
        ):
            return False
        taken.update((manifest.fold(p), p) for p in [*new, path])
        directories.extend(new)
        return True

    lengths = draw(st.lists(st.integers(1, 5000), max_size=12))
    files = []
    used: set[int] = set()
    for path in draw(st.lists(paths, max_size=10)):
        if not take(path):
            continue
        count = len(lengths)
        starts = draw(st.lists(st.integers(0, count - 1), max_size=3)) if count else []
        runs = tuple((s, draw(st.integers(1, count - s))) for s in starts)
        files.append((path, runs))
        used.update(i for s, n in runs for i in range(s, s + n))
    unused = [i for i in range(len(lengths)) if i not in used]
    if unused:
        assume(take("the rest"))
        files.append(("the rest", tuple((i, 1) for i in unused)))
    entries = []
    for path, runs in files:
        pieces = sum(n for _, n in runs)
        size = sum(lengths[i] for s, n in runs for i in range(s, s + n))
        mode = manifest.file_mode(draw(st.integers(0, 0o7777)))
        digest = piece(99) if pieces > 1 else None
        entries.append(FileEntry(path, mode, size, runs, digest, draw(st.booleans())))
    for path in draw(st.lists(paths, max_size=3)):
        directories += [path] if take(path) else []
    links = [SymlinkEntry(p, draw(names)) for p in draw(st.lists(paths, max_size=3)) if take(p)]
    assume(manifest.escaping_symlink({x.path: x.target for x in links}) is None)
    for table in (entries, links):
        table.sort(key=lambda entry: entry.path.encode())
    return Manifest(
        requires_features=[],
        kind=draw(st.sampled_from(manifest.KINDS)),
        name=draw(st.from_regex(manifest.NAME_PATTERN, fullmatch=True)),
        version=draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,20}", fullmatch=True)),
        release_counter=draw(st.integers(0, 2**31 - 1)),
        hardware=draw(st.lists(st.sampled_from(["pi4", "pi5", "jetson.nano"]), max_size=3)),
        access=draw(st.sampled_from(["fleet", "assigned"])),
        payload_bytes=sum(entry.size for entry in entries),
        chunking=Chunking(algorithm="fastcdc", min=1, avg=2, max=3),
        piece_ids=b"".join(piece(n) for n in range(len(lengths))),
        piece_lengths=lengths,
        directories=[
            DirectoryEntry(path, manifest.directory_mode(draw(st.integers(0, 0o7777))))
            for path in sorted(set(directories), key=str.encode)
        ],
        files=entries,
        symlinks=links,
    )


@given(manifests())
@settings(max_examples=150, deadline=None)
def test_round_trip(made: Manifest) -> None:
    assume(made.version != "current")
    data = manifest.encode(made)
    parsed = manifest.parse(data)
    assert parsed == made
    assert manifest.encode(parsed) == data
    for entry in parsed.files:
        assert sum(parsed.piece_lengths[i] for i in entry.pieces()) == entry.size
        assert len(manifest.file_sha256(parsed, entry)) == 32


def sample() -> dict[str, Any]:
    """A sound manifest as plain JSON values."""
    made = Manifest(
        requires_features=[],
        kind="files",
        name="app",
        version="1.0",
        release_counter=1,
        hardware=["pi5"],
        access="fleet",
        payload_bytes=10 + 30 + 60,
        chunking=Chunking(algorithm="fastcdc", min=16, avg=64, max=256),
        piece_ids=piece(0) + piece(1) + piece(2),
        piece_lengths=[10, 20, 30],
        directories=[DirectoryEntry("bin", 0o755), DirectoryEntry("etc", 0o755)],
        files=[
            FileEntry("bin/run", 0o755, 60, ((0, 3),), piece(9)),
            FileEntry("etc/a", 0o644, 10, ((0, 1),)),
            FileEntry("etc/b", 0o644, 30, ((2, 1),)),
            FileEntry("etc/zero", 0o644, 0, ()),
        ],
        symlinks=[SymlinkEntry("etc/link", "../bin/run")],
    )
    value: dict[str, Any] = json.loads(manifest.encode(made))
    return value


def test_the_sample_is_sound() -> None:
    assert manifest.parse(json.dumps(sample()).encode()).piece_count == 3


def put(*keys: Any) -> Callable[[dict[str, Any]], None]:
    """Set the value at a path of keys; the last argument is the value."""

    def change(value: dict[str, Any]) -> None:
        *path, last, new = keys
        target: Any = value
        for key in path:
            target = target[key]
        if last == "append":
            target.append(new)
        else:
            target[last] = new

    return change


B64 = "A" * 43 + "="
TAMPERED: dict[str, Callable[[dict[str, Any]], None]] = {
    "schema": put("schema", "edgesync.manifest/2"),
    "required feature": put("requires_features", ["teleport"]),
    "kind": put("kind", "virus"),
    "name": put("name", "App"),
    "name with newline": put("name", "app\n"),
    "version with newline": put("version", "1.0\n"),
    "hardware with newline": put("hardware", ["pi5\n"]),
    "version": put("version", "../1"),
    "version current": put("version", "current"),
    "release counter": put("release_counter", -1),
    "release counter too large": put("release_counter", 2**31),
    "release counter as text": put("release_counter", "1"),
    "hardware": put("hardware", ["a b"]),
    "hardware too many": put("hardware", ["pi"] * 65),
    "access": put("access", "world"),
    "payload": put("payload_bytes", 99),
    "payload huge": put("payload_bytes", 2**63),
    "algorithm": put("chunking", "algorithm", "rabin"),
    "chunking zero": put("chunking", "min", 0),
    "chunking order": put("chunking", "avg", 8),
    "chunking too large": put("chunking", "max", limits.MAX_PIECE_BYTES + 1),
    "piece ids short": put("piece_ids", B64),
    "piece ids not base64": put("piece_ids", "???"),
    "piece length zero": put("piece_lengths", 0, 0),
    "piece length too large": put("piece_lengths", 0, limits.MAX_PIECE_BYTES + 1),
    "piece length": put("piece_lengths", 0, 11),
    "piece lengths more": put("piece_lengths", "append", 5),
    "directory mode": put("directories", 0, 1, 0o644),
    "directory set-id": put("directories", 0, 1, 0o2755),
    "directory twice": put("directories", 1, 0, "bin"),
    "directories out of order": put("directories", "append", ["a", 0o755]),
    "directory below a file": put("directories", "append", ["etc/a/x", 0o755]),
    "file missing folder": put("files", 0, 0, "bni/run"),
    "file is a folder": put("files", 0, 0, "bin"),
    "file twice": put("files", 2, 0, "etc/a"),
    "file case clash": put("files", 1, 0, "etc/B"),
    "file dotdot": put("files", 0, 0, "../run"),
    "file dot": put("files", 0, 0, "bin/./run"),
    "file absolute": put("files", 0, 0, "/bin/run"),
    "file NUL": put("files", 0, 0, "bin/a\0b"),
    "file newline": put("files", 0, 0, "bin/a\nb"),
    "file backslash": put("files", 0, 0, "bin\\run"),
    "file C1 control": put("files", 0, 0, "bin/a\x9bb"),
    "file not NFC": put("files", 0, 0, "bin/e\u0301"),
    "file component": put("files", 0, 0, "bin/" + "a" * 256),
    "file lone surrogate": put("files", 0, 0, "bin/\ud800"),
    "file set-id": put("files", 0, 1, 0o4755),
    "file world write": put("files", 0, 1, 0o757),
    "file unreadable": put("files", 0, 1, 0o355),
    "file size": put("files", 0, 2, 61),
    "file size negative": put("files", 3, 2, -1),
    "run beyond the table": put("files", 1, 3, [[3, 1]]),
    "run too long": put("files", 1, 3, [[0, 100_000]]),
    "run empty": put("files", 1, 3, [[0, 0]]),
    "run negative": put("files", 1, 3, [[-1, 1]]),
    "run of the wrong piece": put("files", 1, 3, [[1, 1]]),
    "piece unused": put("files", 0, 3, [[0, 2]]),
    "hash missing": put("files", 0, 4, None),
    "hash too short": put("files", 0, 4, "AAAA"),
    "hash where the piece is the file": put("files", 1, 4, B64),
    "symlink absolute": put("symlinks", 0, 1, "/etc/passwd"),
    "symlink escaping": put("symlinks", 0, 1, "../../x"),
    "symlink escaping late": put("symlinks", 0, 1, "../bin/../../x"),
    "symlink empty": put("symlinks", 0, 1, ""),
    "symlink NUL": put("symlinks", 0, 1, "a\0"),
    "symlink over a file": put("symlinks", 0, 0, "etc/a"),
    "symlink to itself": put("symlinks", 0, 1, "link"),
    "symlink as a folder": put("files", "append", ["etc/link/x", 0o644, 0, [], None]),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_every_field_is_checked(name: str) -> None:
    value = sample()
    TAMPERED[name](value)
    with pytest.raises(VerificationError):
        manifest.parse(json.dumps(value).encode())


@pytest.mark.parametrize("key", [key for key in sample() if key != "schema"])
def test_every_field_is_needed(key: str) -> None:
    value = sample()
    del value[key]
    with pytest.raises(VerificationError):
        manifest.parse(json.dumps(value).encode())


def test_unknown_fields_are_ignored() -> None:
    value = sample()
    value["later"] = {"x": [1]}
    value["files"][0] += [False, "later"]
    manifest.parse(json.dumps(value).encode())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff",
        b'{"schema":"edgesync.manifest/1","later":' + b"[" * 100_000,
        b"[" * 100_000,
        b'{"schema": 1e999}',
        b" " * (limits.MAX_MANIFEST_BYTES + 1),
    ],
    ids=range(9),
)
def test_what_is_no_manifest(data: bytes) -> None:
    with pytest.raises(VerificationError):
        manifest.parse(data)


def test_mutated_bytes() -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    good = json.dumps(sample()).encode()
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(data))
            match rng.randrange(3):
                case 0:
                    data[at] = rng.randrange(256)
                case 1:
                    del data[at : at + rng.randrange(1, 9)]
                case _:
                    data[at:at] = rng.choice((b'"', b"-", b"9", b"[", b"..", b"/", b"null", b"\0"))
        try:
            parsed = manifest.parse(bytes(data))
        except EdgeSyncError:
            continue
        manifest.check(parsed)


@given(st.text("a./\\~ \x7f\x1fé", max_size=300) | st.text(max_size=12))
@settings(max_examples=1500, deadline=None)
def test_the_short_way_for_plain_paths_takes_no_other(path: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        try:
            short = manifest.check_path(path)
        except UnsafePathError:
            short = None
        patch.setattr(manifest, "_PLAIN", re.compile(r"(?!)"))
        try:
            long = manifest.check_path(path)
        except UnsafePathError:
            long = None
    assert short == long
    assert manifest.fold(path) == unicodedata.normalize("NFC", path.casefold())


def test_long_components_and_paths() -> None:
    manifest.check_path("a" * 255 + "/" + "b" * 255)
    for path in ("a" * 256, "b/" + "a" * 256, "a/" * 2048, "/".join(["a" * 200] * 21), "é" * 128):
        with pytest.raises(UnsafePathError):
            manifest.check_path(path)


def link_farm(links: dict[str, str]) -> Manifest:
    folders = sorted({path.rpartition("/")[0] for path in links} - {""}, key=str.encode)
    return msgspec.structs.replace(
        msgspec.convert(sample(), Manifest),
        files=[FileEntry("zz", 0o644, 60, ((0, 3),), piece(9))],
        payload_bytes=60,
        directories=[DirectoryEntry(path, 0o755) for path in folders],
        symlinks=[SymlinkEntry(p, links[p]) for p in sorted(links, key=str.encode)],
    )


def test_chains_of_symlinks() -> None:
    # 40 links in a row are what a kernel follows.
    chain = {f"l{n:02}": f"l{n + 1:02}" for n in range(40)} | {"l40": "zz"}
    with pytest.raises(UnsafePathError, match="circle"):
        manifest.check(link_farm(chain | {"k": "l00"}))
    del chain["l00"]
    manifest.check(link_farm(chain))
    # A link that only leaves through another one, which itself is sound.
    with pytest.raises(UnsafePathError, match="through another link"):
        manifest.check(link_farm({"d/up": "..", "d/out": "up/.."}))
    manifest.check(link_farm({"d/up": "..", "d/in": "up/zz"}))
    # Links at any depth are followed.
    deep = "/".join("a" * 300)
    folders = {f"{'/'.join('a' * n)}/x": "y" for n in range(1, 301)}
    with pytest.raises(UnsafePathError):
        manifest.check(
            link_farm(folders | {f"{deep}/out": "up/" + "../" * 300 + "..", f"{deep}/up": "."})
        )


def test_entangled_symlinks_cost_a_bounded_time() -> None:
    links = {f"d{n:04}/l": "x/" * 2000 for n in range(4000)}
    with pytest.raises(VerificationError, match="entangled"):
        manifest.escaping_symlink(links)


def test_overlapping_runs_cost_what_they_say() -> None:
    """99,000 files that each name the whole piece table are summed without walking it for each."""
    count = 90_000
    lengths = [1] * count
    files = [
        FileEntry(f"f{n:05}", 0o644, count, ((0, count),), piece(9))
        for n in range(limits.MAX_FILES)
    ]
    made = msgspec.structs.replace(
        link_farm({}),
        piece_ids=bytes(32 * count),
        piece_lengths=lengths,
        files=files,
        payload_bytes=count * limits.MAX_FILES,
    )
    manifest.check(made)
    with pytest.raises(VerificationError, match="more than"):
        manifest.check(
            msgspec.structs.replace(made, directories=[DirectoryEntry("one-more", 0o755)])
        )


def test_a_manifest_that_would_be_too_large_is_not_made() -> None:
    folders = [f"{n:05}" + "x" * 240 for n in range(70_000)]
    made = msgspec.structs.replace(
        link_farm({}), directories=[DirectoryEntry(path, 0o755) for path in folders]
    )
    with pytest.raises(VerificationError, match="split the bundle"):
        manifest.encode(made)
