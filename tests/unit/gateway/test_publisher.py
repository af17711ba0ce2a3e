import hashlib
import os
import random
import signal
from collections.abc import Iterator
from multiprocessing import active_children
from pathlib import Path

import pytest
from pyfastcdc import FastCDC

from edgesync import limits, piece_codec
from edgesync.errors import DiskFullError, EdgeSyncError, InputError
from edgesync.manifest import Chunking
from edgesync.storage.datadir import DataDir
from gateway import publisher
from gateway.packs import PieceStore
from gateway.publisher import Content, choose_chunking, chunk
from gateway.scan import Scan
from gateway.store import GatewayStore

MIB = 1024 * 1024
SMALL = Chunking(algorithm="fastcdc", min=1024, avg=4096, max=16384)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[GatewayStore]:
    with GatewayStore.open(DataDir.create(tmp_path / "gw", "gateway")) as opened:
        yield opened


@pytest.fixture
def pieces(store: GatewayStore) -> Iterator[PieceStore]:
    with PieceStore.open(store) as opened:
        yield opened


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Small, large, empty, repeated and incompressible files."""
    rng = random.Random(3)
    root = tmp_path / "tree"
    (root / "deep" / "er").mkdir(parents=True)
    words = [bytes(rng.choices(b"abcdefgh \n", k=rng.randrange(1, 400))) for _ in range(200)]
    text = b"".join(rng.choices(words, k=60_000))
    (root / "a-large").write_bytes(text)
    (root / "b-empty").touch()
    (root / "c-noise").write_bytes(rng.randbytes(300_000))
    (root / "d-same").write_bytes(rng.randbytes(5_000))
    (root / "deep" / "d-same-too").write_bytes((root / "d-same").read_bytes())
    (root / "deep" / "e-shifted").write_bytes(b"!" + text[: len(text) // 2])
    for number in range(300):
        (root / "deep" / "er" / f"{number}").write_bytes(rng.choice(words) * rng.randrange(20))
    (root / "z-zeros").write_bytes(bytes(6 * MIB))
    return root


def run(tree: Path, pieces: PieceStore, *, measure_only: bool = False) -> Content:
    with Scan.of(tree) as scan:
        return chunk(scan, SMALL, pieces, measure_only=measure_only)


def assert_restores(content: Content, pieces: PieceStore, tree: Path) -> None:
    ids = list(content.ids())
    assert len(set(ids)) == len(ids)
    for entry in content.files:
        parts = []
        for index in entry.pieces():
            stored = pieces.read(ids[index])
            assert stored is not None
            assert len(stored.data) == content.encoded_lengths[index]
            plain = piece_codec.decode(stored.encoding, stored.data, content.piece_lengths[index])
            assert hashlib.sha256(plain).digest() == ids[index]
            parts.append(plain)
        data = b"".join(parts)
        assert data == (tree / entry.path).read_bytes()
        assert entry.size == len(data)
        if sum(count for _, count in entry.runs) > 1:
            assert entry.sha256 == hashlib.sha256(data).digest()
        else:
            assert entry.sha256 is None


@pytest.mark.parametrize("inline", [True, False])
def test_every_file_is_restored_from_what_was_stored(
    tree: Path, pieces: PieceStore, monkeypatch: pytest.MonkeyPatch, inline: bool
) -> None:
    monkeypatch.setattr(publisher, "INLINE_BYTES", 1 << 40 if inline else 0)
    content = run(tree, pieces)
    assert_restores(content, pieces, tree)
    assert content.stored_pieces == len(content.piece_lengths)
    assert not active_children()


def test_workers_or_none_the_tables_are_the_same(
    tree: Path, pieces: PieceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "INLINE_BYTES", 1 << 40)
    alone = run(tree, pieces, measure_only=True)
    monkeypatch.setattr(publisher, "INLINE_BYTES", 0)
    monkeypatch.setattr(publisher, "IN_FLIGHT_BYTES", 1)
    together = run(tree, pieces)
    again = run(tree, pieces)
    assert again.stored_pieces == 0
    for other in (together, again):
        assert other.files == alone.files
        assert other.piece_ids == alone.piece_ids
        assert other.piece_lengths == alone.piece_lengths
        assert other.encoded_lengths == alone.encoded_lengths


def test_streamed_cuts_are_those_of_the_whole_file(tree: Path, pieces: PieceStore) -> None:
    content = run(tree, pieces, measure_only=True)
    data = (tree / "a-large").read_bytes()
    assert len(data) > publisher._SMALL_FILE_BYTES
    cutter = FastCDC(SMALL.avg, min_size=SMALL.min, max_size=SMALL.max, normalized_chunking=1)
    expected = [piece.length for piece in cutter.cut_buf(data)]
    entry = content.files[0]
    assert [content.piece_lengths[index] for index in entry.pieces()] == expected


def test_an_insertion_moves_few_pieces(tmp_path: Path, pieces: PieceStore) -> None:
    data = random.Random(5).randbytes(2 * MIB)
    (tmp_path / "one").write_bytes(data)
    (tmp_path / "two").write_bytes(data[:MIB] + b"inserted" + data[MIB:])
    before = run(tmp_path / "one", pieces)
    after = run(tmp_path / "two", pieces)
    assert len(before.piece_lengths) > 200
    assert after.stored_pieces <= 5


@pytest.mark.parametrize("inline", [True, False])
def test_a_file_that_changes_meanwhile_is_refused(
    tree: Path, pieces: PieceStore, monkeypatch: pytest.MonkeyPatch, inline: bool
) -> None:
    monkeypatch.setattr(publisher, "INLINE_BYTES", 1 << 40 if inline else 0)
    for path, change in (
        ("d-same", lambda p: p.write_bytes(b"!" * p.stat().st_size)),
        ("a-large", lambda p: os.truncate(p, 5 * MIB)),
        ("z-zeros", lambda p: p.unlink()),
        ("deep/er/7", lambda p: (p.unlink(), p.symlink_to("8"))),
    ):
        with Scan.of(tree) as scan:
            change(tree / path)
            with pytest.raises(InputError, match=rf"{path} changed while it was read"):
                chunk(scan, SMALL, pieces)
    assert not active_children()


def test_a_killed_worker_is_an_error_not_a_wait(
    tree: Path, pieces: PieceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "INLINE_BYTES", 0)

    def progress(_done: int, _total: int) -> None:
        for child in active_children():
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)

    with Scan.of(tree) as scan, pytest.raises(EdgeSyncError, match="was killed"):
        chunk(scan, SMALL, pieces, progress=progress)
    assert_restores(run(tree, pieces), pieces, tree)


def test_a_full_disk_ends_the_publish(
    tree: Path, pieces: PieceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "INLINE_BYTES", 0)
    monkeypatch.setattr(publisher, "BATCH_BYTES", 1000)

    def full(*_args: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", full)
        with pytest.raises(DiskFullError):
            run(tree, pieces)
    assert not active_children()
    assert_restores(run(tree, pieces), pieces, tree)


def test_more_pieces_than_a_manifest_takes_are_refused(
    tree: Path, pieces: PieceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_PIECES", 50)
    with pytest.raises(publisher.TooManyPiecesError):
        run(tree, pieces)
    assert not active_children()


def test_progress_ends_at_the_payload(tree: Path, pieces: PieceStore) -> None:
    seen: list[tuple[int, int]] = []
    with Scan.of(tree) as scan:
        chunk(scan, SMALL, pieces, progress=lambda done, total: seen.append((done, total)))
        assert seen[-1] == (scan.payload_bytes, scan.payload_bytes)
    assert seen == sorted(seen)


@pytest.mark.parametrize(
    ("total", "average"),
    [
        (0, 64),
        (256 * MIB, 64),
        (256 * MIB + 1, 128),
        (512 * MIB, 128),
        (1024 * MIB, 256),
        (4096 * MIB, 1024),
        (40_000 * MIB, 1024),
        (100_000 * MIB, 2048),
        (300_000 * MIB, 4096),
    ],
)
def test_pieces_grow_with_the_bundle(total: int, average: int) -> None:
    chunking = choose_chunking([total])
    assert chunking == Chunking(
        algorithm="fastcdc", min=average * 256, avg=average * 1024, max=average * 4096
    )


def test_a_new_version_keeps_its_predecessors_parameters() -> None:
    before = publisher.parameters(256 * 1024)
    for total, kept in ((100, True), (400, True), (401, False), (25, True), (24, False)):
        assert (choose_chunking([total * MIB], (before, 100 * MIB)) == before) is kept
    many = [1] * 80_000 + [256 * 1024] * 8_000
    assert choose_chunking(many, (before, sum(many))) != before
