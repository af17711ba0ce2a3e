"""Pieces between network and disk: what waits is written together, told once, and bounded."""

import asyncio
import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from device.bundle_store import BundleStore, StagedBundle
from device.core.events import GATEWAY
from device.piece_writer import PieceWriter, ReceivedPiece
from device.state import StateDatabase
from edgesync import limits
from edgesync.errors import StorageError, VerificationError
from edgesync.ids import PeerKey, PieceId
from edgesync.transport.connection import PieceAnswer
from tests.crash.builders import Built, build

PEER = PeerKey("ab" * 32)
FILES = {f"file-{number}": bytes([number]) * (3000 + number) for number in range(8)}


class Told:
    """What a writer says."""

    def __init__(self) -> None:
        self.written: list[int] = []
        self.rejected: list[int] = []
        self.failures: list[StorageError] = []

    def writer(self, staged: StagedBundle) -> PieceWriter:
        return PieceWriter(
            staged,
            written=lambda piece: self.written.append(piece.index),
            rejected=lambda piece, _error: self.rejected.append(piece.index),
            failed=self.failures.append,
        )


@pytest.fixture
def built() -> Built:
    return build(FILES)


@pytest.fixture
def staged(tmp_path: Path, built: Built, monkeypatch: pytest.MonkeyPatch) -> Iterator[StagedBundle]:
    monkeypatch.setattr(limits, "RESERVE_BYTES", 4096)
    state = StateDatabase.open(tmp_path / "state.db")
    store = BundleStore.open(tmp_path, state, boot_id="boot", on_lost=lambda *_: None)
    yield store.begin(built.data, built.manifest)
    store.abandon()
    state.close()


def received(built: Built, index: int, *, source: PeerKey = PEER) -> ReceivedPiece:
    data = built.pieces[index]
    answer = PieceAnswer(PieceId(hashlib.sha256(data).digest()), "identity", data)
    return ReceivedPiece(source, index, answer)


async def test_what_waits_is_written_in_few_turns_and_counted(
    staged: StagedBundle, built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    keep = staged.save_counters
    monkeypatch.setattr(
        staged, "save_counters", lambda **how: (saved.append(len(staged.have)), keep(**how))
    )
    told = Told()
    writer = told.writer(staged)
    for index in range(len(built.pieces)):
        await writer.put(received(built, index, source=PEER if index else GATEWAY))
    await writer.drained()
    assert told.written == list(range(len(built.pieces)))
    assert not list(staged.have.missing())
    assert len(saved) < len(built.pieces)
    assert staged.counters.bytes_from_gateway == len(built.pieces[0])
    assert staged.counters.bytes_from_peers == sum(map(len, built.pieces[1:]))


async def test_a_wrong_piece_costs_only_itself(staged: StagedBundle, built: Built) -> None:
    told = Told()
    writer = told.writer(staged)
    wrong = received(built, 2)
    await writer.put(ReceivedPiece(wrong.source, 1, wrong.answer))
    await writer.put(wrong)
    await writer.drained()
    assert (told.rejected, told.written, told.failures) == ([1], [2], [])
    assert 1 not in staged.have


async def test_after_a_wrong_piece_its_source_is_judged_before_more_is_taken(
    staged: StagedBundle, built: Built
) -> None:
    told = Told()
    writer = told.writer(staged)
    other = PeerKey("cd" * 32)

    def rejected(piece: ReceivedPiece, error: VerificationError) -> None:
        del error
        told.rejected.append(piece.index)
        writer.forget(piece.source)

    writer._on_rejected = rejected
    wrong = received(built, 0).answer
    for index in (1, 2, 3):
        await writer.put(ReceivedPiece(PEER, index, wrong))
    await writer.put(received(built, 4, source=other))
    await writer.drained()
    assert (told.rejected, told.written) == ([1], [4])
    assert writer._bytes == 0


async def test_a_failing_disk_ends_it_and_frees_those_that_wait(
    staged: StagedBundle, built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> bool:
        raise StorageError("the disk failed")

    monkeypatch.setattr(staged, "put_piece", fails)
    monkeypatch.setattr(limits, "MAX_UNWRITTEN_BYTES", 1)
    told = Told()
    writer = told.writer(staged)
    puts = [asyncio.create_task(writer.put(received(built, index))) for index in range(5)]
    outcomes = await asyncio.wait_for(asyncio.gather(*puts, return_exceptions=True), 20)
    await writer.drained()
    assert [str(error) for error in told.failures] == ["the disk failed"]
    assert all(outcome is None or isinstance(outcome, StorageError) for outcome in outcomes)
    with pytest.raises(StorageError):
        await writer.put(received(built, 6))
    assert told.written == []


async def test_who_brings_more_than_the_bound_waits(
    staged: StagedBundle, built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_UNWRITTEN_BYTES", 4000)
    told = Told()
    writer = told.writer(staged)
    await writer.put(received(built, 0))
    held = asyncio.create_task(writer.put(received(built, 1)))
    await asyncio.sleep(0)
    assert not held.done()
    await asyncio.wait_for(held, 20)
    await writer.drained()
    assert told.written == [0, 1]


async def test_what_was_put_is_told_though_who_put_it_is_gone(
    staged: StagedBundle, built: Built
) -> None:
    told = Told()
    writer = told.writer(staged)

    has_put = asyncio.Event()

    async def request() -> None:
        await writer.put(received(built, 3))
        has_put.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(request())
    await has_put.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await writer.drained()
    assert told.written == [3]


async def test_a_request_that_is_cancelled_while_it_waits_has_handed_its_piece_over(
    staged: StagedBundle, built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_UNWRITTEN_BYTES", 1)
    told = Told()
    writer = told.writer(staged)
    waits = asyncio.create_task(writer.put(received(built, 5)))
    await asyncio.sleep(0)
    waits.cancel()
    assert (await asyncio.gather(waits, return_exceptions=True))[0] is not None
    await writer.drained()
    assert told.written == [5]


async def test_what_was_written_before_the_disk_failed_is_told_and_counted(
    staged: StagedBundle, built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = staged.put_piece

    def fails_at_two(index: int, plain: bytes, **how: object) -> bool:
        if index == 2:
            raise StorageError("the disk failed")
        return keep(index, plain, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(staged, "put_piece", fails_at_two)
    told = Told()
    writer = told.writer(staged)
    for index in range(4):
        await writer.put(received(built, index))
    await writer.drained()
    assert (told.written, [str(error) for error in told.failures]) == ([0, 1], ["the disk failed"])
    kept = staged.store.state.counters(staged.digest)
    assert kept.bytes_from_peers == len(built.pieces[0]) + len(built.pieces[1])


async def test_what_a_flush_made_durable_has_been_told_of(
    staged: StagedBundle, built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The storage thread is held after the first piece of a batch, and the flush comes there."""
    first_is_there, go_on = threading.Event(), threading.Event()
    keep = staged.put_piece

    def slow(index: int, plain: bytes, **how: object) -> bool:
        fresh = keep(index, plain, **how)  # type: ignore[arg-type]
        if index == 0:
            first_is_there.set()
            go_on.wait(20)
        return fresh

    monkeypatch.setattr(staged, "put_piece", slow)
    told = Told()
    writer = told.writer(staged)
    for index in range(2):
        await writer.put(received(built, index))
    await asyncio.to_thread(first_is_there.wait, 20)
    assert await asyncio.to_thread(staged.flush) == [0]
    assert told.written == []
    go_on.set()
    await writer.told()
    assert told.written == [0, 1]
