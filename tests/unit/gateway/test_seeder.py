"""How the seeder reads pieces for one device: each answered once and in order, few of them held."""

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator, Coroutine, Iterable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from msgspec import UNSET

from edgesync.errors import PeerUnreachableError
from edgesync.ids import DeviceId, Digest, PeerKey, PieceId
from edgesync.transport.connection import PieceAnswer
from edgesync.wire.messages import Lease, LeaseRequest, Request
from gateway.packs import StoredPiece
from gateway.register import Device, Register
from gateway.seeder import RAISED_SPREAD_S, READ_BYTES, READ_PIECES, Seeder
from gateway.service.budgets import SiteBudget

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


class Session:
    """A device's session: keeps the leases it is sent."""

    def __init__(self, key: PeerKey) -> None:
        self.peer = SimpleNamespace(key=key, role="device")
        self.wire_bytes = 0
        self.peer_background = False
        self.listen_port = 0
        self.address = ("10.0.0.5", 1)
        self.closed = SimpleNamespace(is_set=lambda: False)
        self.send_caps: object = None
        self.told: list[Lease] = []

    async def send(self, message: Lease) -> None:
        self.told.append(message)


class Tasks:
    """What the seeder asks of an endpoint."""

    def __init__(self) -> None:
        self.tasks: list[asyncio.Task[None]] = []

    def spawn(self, work: Coroutine[Any, Any, None], _name: str) -> None:
        self.tasks.append(asyncio.get_running_loop().create_task(work))

    async def done(self) -> None:
        await asyncio.gather(*self.tasks)


async def test_a_raised_budget_is_told_to_who_waits_and_only_once(
    seeding: tuple[Seeder, Shelf, list[PieceId]],
) -> None:
    seeder, _shelf, _ids = seeding
    budgets = seeder._budgets
    tasks = Tasks()
    seeder.attach(tasks)  # type: ignore[arg-type]
    keys = [PeerKey(f"{number:064x}") for number in (1, 2, 3)]
    devices = {
        key: Device(DeviceId(f"cam-{at}"), key, "accepted", site, {}, "", (), online=True)
        for at, (key, site) in enumerate(zip(keys, ("roof", "roof", "yard"), strict=True))
    }
    register = Register(devices)
    await seeder.updated(register, seeder._trusted)
    sessions = [Session(key) for key in keys]
    for session in sessions:
        await seeder.connected(session)  # type: ignore[arg-type]

    def limit(roof: int, yard: int) -> None:
        budgets.update([SiteBudget("roof", roof), SiteBudget("yard", yard)])

    async def told() -> list[list[Lease]]:
        await seeder.updated(register, seeder._trusted)
        await tasks.done()
        found = [session.told for session in sessions]
        for session in sessions:
            session.told = []
        return found

    async def ask_lease(session: Session) -> None:
        await seeder.message(session, LeaseRequest(manifest=bytes.fromhex(DIGEST), count=4))  # type: ignore[arg-type]

    limit(1, 1)
    for session in sessions:
        await ask_lease(session)
    for (lease,) in await told():
        assert (lease.grants, lease.retry_after_ms) == ([], 30_000)
        assert "is spent" in str(lease.reason)
    limit(2, 1)  # no room for a piece: nobody is troubled
    assert await told() == [[], [], []]
    limit(10**9, 1)
    first, second, third = await told()
    assert third == []
    for (lease,) in (first, second):
        assert (lease.grants, lease.reason) == ([], UNSET)
        assert lease.retry_after_ms <= 1000 * RAISED_SPREAD_S
    assert await told() == [[], [], []]
    # Who asked by itself when there was room again waits no longer.
    limit(1, 1)
    await ask_lease(sessions[0])
    assert [len(leases) for leases in await told()] == [1, 0, 0]
    limit(10**9, 1)
    await ask_lease(sessions[0])
    assert [len(leases) for leases in await told()] == [1, 0, 0]
    await seeder.disconnected(sessions[2], PeerUnreachableError("gone"))  # type: ignore[arg-type]
    budgets.update([])
    assert await told() == [[], [], []]


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
