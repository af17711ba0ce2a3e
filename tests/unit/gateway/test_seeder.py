"""How the seeder reads pieces for one device: each answered once and in order, few of them held."""

import hashlib
import random
from collections.abc import AsyncIterator, Iterable
from types import SimpleNamespace

import msgspec
import pytest

from edgesync.ids import Digest, PieceId
from edgesync.transport.connection import PieceAnswer
from edgesync.wire.messages import Request
from gateway.packs import StoredPiece
from gateway.register import Register
from gateway.seeder import READ_BYTES, READ_PIECES, Seeder

DIGEST = Digest("ab" * 32)


class Shelf:
    """A piece store in memory that remembers what was read."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = {PieceId(hashlib.sha256(data).digest()): data for data in pieces}
        self.read_bytes = 0

    def read(self, piece: PieceId) -> StoredPiece | None:
        data = self.pieces.get(piece)
        if data is None:
            return None
        self.read_bytes += len(data)
        return StoredPiece("identity", data, len(data))

    def sizes(self, ids: Iterable[PieceId]) -> dict[PieceId, int]:
        return {piece: len(self.pieces[piece]) for piece in ids if piece in self.pieces}


class Conn:
    wire_bytes = 0
    peer = SimpleNamespace(key="cd" * 32)


@pytest.fixture
async def seeding() -> AsyncIterator[tuple[Seeder, Shelf, list[PieceId]]]:
    rng = random.Random(5)
    sizes = [rng.choice((100, 20_000, 65_536, 300_000)) for _ in range(3 * READ_PIECES)]
    shelf = Shelf([rng.randbytes(size) for size in sizes])
    ids = list(shelf.pieces)
    manifest = msgspec.json.encode({"piece_ids": b"".join(ids)})

    async def give(_digest: Digest) -> bytes | None:
        return manifest

    seeder = Seeder(
        pieces=shelf,  # type: ignore[arg-type]
        manifest=give,
        fetch=None,  # type: ignore[arg-type]
        join=None,  # type: ignore[arg-type]
        register=Register(),
        trusted=SimpleNamespace(by_digest=lambda _digest: object()),  # type: ignore[arg-type]
        rng=rng,
    )
    yield seeder, shelf, ids
    await seeder.close()


def ask(seeder: Seeder, ids: list[PieceId]) -> AsyncIterator[PieceAnswer]:
    request = Request(manifest=bytes.fromhex(DIGEST), pieces=list(ids), encodings=["identity"])
    return seeder.serve(Conn(), request)  # type: ignore[arg-type]


async def test_every_piece_is_answered_once_and_in_order(
    seeding: tuple[Seeder, Shelf, list[PieceId]],
) -> None:
    seeder, shelf, ids = seeding
    lost = {ids[0], ids[READ_PIECES], ids[-1]}
    unknown = PieceId(bytes(32))
    kept = {piece: data for piece, data in shelf.pieces.items() if piece not in lost}
    shelf.pieces = kept
    asked = [*ids[:5], unknown, *ids[5:]]
    answers = [answer async for answer in ask(seeder, asked)]
    assert [answer.piece for answer in answers] == asked
    for answer in answers:
        if answer.piece == unknown:
            assert answer.missing == "not_held"
        elif answer.piece in lost:
            assert answer.missing == "gone"
        else:
            assert answer.data == kept[answer.piece]
    assert seeder.totals().bytes_out == sum(map(len, kept.values()))


async def test_a_device_that_does_not_take_its_pieces_holds_few_of_them(
    seeding: tuple[Seeder, Shelf, list[PieceId]],
) -> None:
    seeder, shelf, ids = seeding
    taken = 0
    async for answer in ask(seeder, ids):
        taken += len(answer.data)
        # Everything a call may have read by now, with the piece in hand.
        assert shelf.read_bytes - taken <= READ_BYTES + 300_000
