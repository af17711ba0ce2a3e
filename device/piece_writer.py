"""Pieces on their way from the network to the disk: what arrived while the disk was busy is written in one go.

A thread switch costs as much as a piece, so the storage thread is handed all that waits. It decides nothing and asks
nobody for pieces. Invariants: a piece is hashed before it is written; whoever brought a piece waits while more than
``MAX_UNWRITTEN_BYTES`` wait for the disk; what was put is written and told of, also when the request that brought it
was cancelled while it waited; after a failing disk nothing more is taken.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from device.bundle_store import StagedBundle
from device.core.events import GATEWAY
from edgesync import limits, piece_codec
from edgesync.errors import StorageError, VerificationError
from edgesync.ids import PeerKey
from edgesync.transport.connection import PieceAnswer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class ReceivedPiece:
    """One answer that holds bytes, and who gave it."""

    source: PeerKey
    index: int
    answer: PieceAnswer


class PieceWriter:
    """``put`` pieces on the event loop; ``written``, ``rejected`` and ``failed`` are called there."""

    def __init__(
        self,
        staged: StagedBundle,
        *,
        written: Callable[[ReceivedPiece], None],
        rejected: Callable[[ReceivedPiece, VerificationError], None],
        failed: Callable[[StorageError], None],
    ) -> None:
        self._staged = staged
        self._lengths = staged.map.piece_lengths
        self._on_written = written
        self._on_rejected = rejected
        self._on_failed = failed
        self._loop = asyncio.get_running_loop()
        self._waiting: list[ReceivedPiece] = []
        self._bytes = 0
        self._room = asyncio.Event()
        self._room.set()
        self._told = asyncio.Event()
        self._told.set()
        self._working: asyncio.Task[None] | None = None
        self._error: StorageError | None = None

    async def put(self, piece: ReceivedPiece) -> None:
        """Hand a piece over; wait while the disk is behind. Raises StorageError: nothing can be stored any more."""
        if self._error is not None:
            raise self._error
        self._waiting.append(piece)
        self._bytes += len(piece.answer.data)
        if self._working is None:
            self._working = self._loop.create_task(self._work(), name="write pieces")
        while self._bytes > limits.MAX_UNWRITTEN_BYTES:
            self._room.clear()
            await self._room.wait()

    async def drained(self) -> None:
        """Return once all that was put is written and told of."""
        if self._working is not None:
            await asyncio.shield(self._working)

    async def told(self) -> None:
        """Return once every piece that is on the disk by now was told of, or the disk failed."""
        await self._told.wait()

    async def _work(self) -> None:
        try:
            while self._waiting and self._error is None:
                self._told.clear()
                batch, self._waiting = self._waiting, []
                outcomes, failure = await self._loop.run_in_executor(
                    self._staged.store.executor, self._write, batch
                )
                self._waiting[:0] = [piece for piece in batch if piece not in outcomes]
                self._release(outcomes)
                for piece, error in outcomes.items():
                    if error is None:
                        self._on_written(piece)
                    else:
                        self._on_rejected(piece, error)
                if failure is not None:
                    self._fail(failure)
                self._told.set()
        except Exception:
            logger.exception("pieces could not be stored")
            self._fail(StorageError("storing a piece failed; the log of this device says why"))
        finally:
            self._told.set()
            self._working = None

    def forget(self, source: PeerKey) -> None:
        """Drop what waits from a source that is not to be believed any more."""
        dropped = [piece for piece in self._waiting if piece.source == source]
        self._waiting = [piece for piece in self._waiting if piece.source != source]
        self._release(dropped)

    def _release(self, pieces: Iterable[ReceivedPiece]) -> None:
        self._bytes -= sum(len(piece.answer.data) for piece in pieces)
        self._room.set()

    def _fail(self, error: StorageError) -> None:
        self._error = error
        self._waiting.clear()
        self._bytes = 0
        self._room.set()
        self._on_failed(error)

    def _write(
        self, batch: Sequence[ReceivedPiece]
    ) -> tuple[dict[ReceivedPiece, VerificationError | None], StorageError | None]:
        """Check and write, on the storage thread; what became of each piece, and why the disk took no more.

        After a piece that is not what it claims, the others of its source wait for what is made of that.
        """
        outcomes: dict[ReceivedPiece, VerificationError | None] = {}
        doubtful: set[PeerKey] = set()
        try:
            for piece in batch:
                if piece.source in doubtful:
                    continue
                try:
                    self._write_one(piece)
                except VerificationError as exc:
                    outcomes[piece] = exc
                    doubtful.add(piece.source)
                else:
                    outcomes[piece] = None
            self._staged.save_counters(force=False)
        except StorageError as exc:
            with contextlib.suppress(StorageError):
                self._staged.save_counters()
            return outcomes, exc
        return outcomes, None

    def _write_one(self, piece: ReceivedPiece) -> None:
        answer = piece.answer
        self._staged.put_piece(
            piece.index,
            piece_codec.decode(answer.encoding, answer.data, self._lengths[piece.index]),
            source="gateway" if piece.source == GATEWAY else "peer",
            carried_bytes=len(answer.data),
        )


__all__ = ["PieceWriter", "ReceivedPiece"]
