import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgesync import piece_codec
from edgesync.errors import DiskFullError, FsyncFailedError
from edgesync.ids import PieceId
from edgesync.storage.datadir import DataDir
from gateway import packs
from gateway.packs import NewPiece, PieceStore, StoredPiece
from gateway.store import GatewayStore


@pytest.fixture
def store(tmp_path: Path) -> Iterator[GatewayStore]:
    with GatewayStore.open(DataDir.create(tmp_path / "gw", "gateway")) as opened:
        yield opened


@pytest.fixture
def pieces(store: GatewayStore) -> Iterator[PieceStore]:
    with PieceStore.open(store) as opened:
        yield opened


def new(plain: bytes) -> NewPiece:
    encoding, data = piece_codec.encode(plain)
    return NewPiece(PieceId(hashlib.sha256(plain).digest()), encoding, data, len(plain))


def plain_of(piece: StoredPiece | None) -> bytes | None:
    return piece and piece_codec.decode(piece.encoding, piece.data, piece.plain_length)


def files(store: GatewayStore) -> list[Path]:
    return sorted(store.datadir.packs.iterdir())


def test_what_was_added_is_read_back_by_this_and_by_a_later_store(
    store: GatewayStore, pieces: PieceStore
) -> None:
    plains = [b"a" * 5000, os.urandom(5000), b"x", os.urandom(1)]
    batch = [new(plain) for plain in plains]
    pieces.add(batch[:2])
    pieces.add(batch[2:])
    pieces.add([])
    with PieceStore.open(store) as later:
        for plain, piece in zip(plains, batch, strict=True):
            assert plain_of(pieces.read(piece.id)) == plain == plain_of(later.read(piece.id))
    assert pieces.read(PieceId(bytes(32))) is None
    assert pieces.sizes([piece.id for piece in batch]) == {p.id: len(p.data) for p in batch}


def test_a_piece_is_stored_once(store: GatewayStore, pieces: PieceStore) -> None:
    one, two = new(os.urandom(100)), new(os.urandom(100))
    pieces.add([one])
    pieces.add([one, two, two])
    live = store.rows("SELECT sum(live) AS n FROM packs")[0]["n"]
    assert live == len(one.data) + len(two.data)
    assert plain_of(pieces.read(two.id)) is not None


def test_full_packs_are_left_alone(
    store: GatewayStore, pieces: PieceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packs, "PACK_BYTES", 1000)
    batch = [new(os.urandom(600)) for _ in range(5)]
    for piece in batch:
        pieces.add([piece])
    assert [path.stat().st_size for path in files(store)] == [1200, 1200, 600]
    assert all(pieces.read(piece.id) for piece in batch)


def test_two_publishers_use_two_packs(store: GatewayStore, pieces: PieceStore) -> None:
    with PieceStore.open(store) as other:
        one, two, three = (new(os.urandom(50)) for _ in range(3))
        pieces.add([one])
        other.add([two])
        other.add([three])
        assert len(files(store)) == 2
        assert pieces.read(three.id)
        assert other.read(one.id)
    # The first one's pack is free again once it is gone, and used before a new one is made.
    pieces.close()
    with PieceStore.open(store) as later:
        later.add([new(os.urandom(50))])
    assert len(files(store)) == 2


def test_the_torn_tail_of_a_killed_publisher_is_cut_off(store: GatewayStore) -> None:
    first, second = new(os.urandom(70)), new(os.urandom(90))
    with PieceStore.open(store) as pieces:
        pieces.add([first])
    (path,) = files(store)
    with path.open("ab") as stream:
        stream.write(os.urandom(12345))
    orphan = store.datadir.packs / "000000.pack"  # made, never indexed
    orphan.write_bytes(os.urandom(99))
    with PieceStore.open(store) as pieces, PieceStore.open(store) as other:
        pieces.add([second])
        other.add([new(b"third")])
        assert plain_of(pieces.read(first.id))
        assert plain_of(pieces.read(second.id))
    assert [p.stat().st_size for p in files(store)] == [90, 75]


@pytest.mark.parametrize("damage", ["flip", "truncate", "unlink"])
def test_damaged_bytes_are_never_handed_out_and_can_be_stored_anew(
    store: GatewayStore, damage: str
) -> None:
    piece = new(os.urandom(3000))
    with PieceStore.open(store) as pieces:
        pieces.add([new(b"first" * 99), piece])
    (path,) = files(store)
    if damage == "flip":
        data = bytearray(path.read_bytes())
        data[-100] ^= 4
        path.write_bytes(data)
    elif damage == "truncate":
        os.truncate(path, 500)
    else:
        path.unlink()
    with PieceStore.open(store) as pieces:
        assert pieces.read(piece.id) is None
        assert pieces.has([piece.id]) == {piece.id}
        pieces.mark_damaged([piece.id])
        assert not pieces.has([piece.id])
        pieces.add([piece])
        assert plain_of(pieces.read(piece.id)) is not None
        assert pieces.has([piece.id])


def test_a_full_disk_loses_nothing(
    store: GatewayStore, pieces: PieceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = new(os.urandom(70)), new(os.urandom(90))
    pieces.add([first])

    def full(*_args: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", full)
        with pytest.raises(DiskFullError, match="full"):
            pieces.add([second])
        patch.setattr(os, "fdatasync", full)
        with pytest.raises(DiskFullError):
            pieces.add([second])
    assert pieces.read(second.id) is None
    pieces.add([second])
    assert plain_of(pieces.read(first.id))
    assert plain_of(pieces.read(second.id))


def test_a_failed_fsync_claims_nothing(
    store: GatewayStore, pieces: PieceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    piece = new(os.urandom(70))

    def failing(_fd: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", failing)
        with pytest.raises(FsyncFailedError):
            pieces.add([piece])
    assert pieces.read(piece.id) is None
    assert not pieces.has([piece.id])


def test_short_writes_are_continued(pieces: PieceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwritev

    def short(fd: int, vector: list[bytes], offset: int) -> int:
        joined = b"".join(vector)[:7]
        return whole(fd, [joined], offset)

    batch = [new(os.urandom(n)) for n in (1, 30, 7, 14)]
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", short)
        pieces.add(batch)
    assert all(plain_of(pieces.read(piece.id)) for piece in batch)


def test_dropped_pieces_give_their_space_back(
    store: GatewayStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packs, "PACK_BYTES", 1 << 20)
    batch = [new(os.urandom(1 << 16)) for _ in range(32)]
    with PieceStore.open(store) as pieces:
        for piece in batch:
            pieces.add([piece])
    with PieceStore.open(store) as pieces:
        assert all(pieces.read(piece.id) for piece in batch)  # readers hold both packs open
        with store.atomic() as db:
            extents = packs.drop(db.conn, [piece.id for piece in batch[:24]])
        pieces.reclaim(extents)
        assert [pieces.read(piece.id) is not None for piece in batch] == [False] * 24 + [True] * 8
        # The first pack is gone, half of the second is a hole (where the file system can make one).
        (path,) = files(store)
        assert path.name == "000002.pack"
        assert path.stat().st_blocks * 512 <= 1 << 20
        again = new(os.urandom(100))
        pieces.add([again])
        assert [p.name for p in files(store)] == ["000002.pack", "000003.pack"]
        assert pieces.read(again.id)


def test_readers_may_be_many_and_packs_more_than_open_files(
    store: GatewayStore, pieces: PieceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packs, "PACK_BYTES", 1)
    monkeypatch.setattr(packs, "MAX_OPEN_PACKS", 2)
    batch = [new(os.urandom(500)) for _ in range(12)]
    for piece in batch:
        pieces.add([piece])
    before = len(list(Path("/proc/self/fd").iterdir()))
    wrong: list[PieceId] = []

    def work() -> None:
        for piece in batch * 20:
            found = pieces.read(piece.id)
            if found is None or found.data != piece.data:
                wrong.append(piece.id)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2
