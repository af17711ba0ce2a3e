"""One bundle on its way to this device: runs the download core's decisions against connections and the store.

It moves pieces and has them written (``device.piece_writer``); which and from whom is ``device.core.download``'s.
Invariants: a request's task holds at most one piece beside what the transport buffers and the writer takes; peers hear
of a piece after it was written, the gateway after it is durable; a failing disk ends the transfer, a failing network
never does.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from random import Random
from typing import Final, Protocol, assert_never

from device.bundle_store import StagedBundle
from device.core import events as e
from device.core.download import Download
from device.piece_writer import PieceWriter, ReceivedPiece
from device.serving import Uploads
from edgesync.errors import EdgeSyncError, StorageError, VerificationError
from edgesync.ids import Digest, PeerKey
from edgesync.io.runner import Runner
from edgesync.piece_finder import PieceFinder
from edgesync.transport.connection import PeerConnection, PieceAnswer

logger = logging.getLogger(__name__)

FLUSH_POLL_S: Final = 0.25
MOVED_EVERY_S: Final = 1.0


class Neighbourhood(Protocol):
    """What a transfer needs of the swarm around it."""

    def source(self, key: PeerKey) -> PeerConnection | None:
        """The open session with a peer, or with the gateway (``GATEWAY``)."""

    def announce(self, digest: Digest, pieces: tuple[int, ...]) -> None: ...
    def report(self, digest: Digest, pieces: tuple[int, ...], origin: PeerKey | None) -> None: ...
    def ask_lease(self, digest: Digest, count: int, unavailable: tuple[int, ...]) -> None: ...
    def dial(self, key: PeerKey, addresses: tuple[str, ...]) -> None: ...
    def quarantine(self, key: PeerKey) -> None: ...
    def rejected(self, key: PeerKey) -> None: ...


class Transfer:
    """Create on the event loop, ``run`` until complete, ``feed`` what the swarm hears."""

    def __init__(
        self,
        staged: StagedBundle,
        finder: PieceFinder,
        neighbourhood: Neighbourhood,
        *,
        uploads: Uploads,
        rng: Random,
        now: float,
    ) -> None:
        self.staged = staged
        self.digest = staged.digest
        self.piece_count = staged.map.piece_count
        self._lengths = staged.map.piece_lengths
        self._max_piece_bytes = max(self._lengths, default=1)
        self._finder = finder
        self._around = neighbourhood
        self._uploads = uploads
        self._loop = asyncio.get_running_loop()
        self.core = Download(self._lengths, staged.have, rng=rng, now=now)
        self._runner = Runner[e.DownloadEvent, e.DownloadEffect](
            self.core, self._perform, tick=e.Tick()
        )
        self._writer = PieceWriter(
            staged, written=self._written, rejected=self._rejected, failed=self._fail
        )
        self._streams: dict[PeerKey, dict[asyncio.Task[None], None]] = {}
        self._seen_bytes: dict[PeerKey, int] = {}
        self._tell_moved_at = 0.0
        self._complete = asyncio.Event()
        self._failure: StorageError | None = None
        self._flushing: asyncio.Task[None] | None = None
        self.subscribers: list[Callable[[], None]] = []

    def feed(self, event: e.DownloadEvent) -> None:
        self._runner.feed(event)

    def explain(self) -> str:
        return self.core.explain(now=self._loop.time())

    async def run(self) -> None:
        """Return once every piece is held and durable. Raises StorageError."""
        flusher = self._loop.create_task(self._keep_flushing(), name=f"flush {self.digest[:12]}")
        try:
            if self.core.complete:
                self._complete.set()
            else:
                self.feed(e.Tick())
            await self._complete.wait()
            flusher.cancel()
            await asyncio.gather(flusher, return_exceptions=True)
            await self._flush()  # the one under way began before the last pieces came
            await self._flush()
            if self._failure is not None:
                raise self._failure
        finally:
            self._runner.close()
            tasks = [task for streams in self._streams.values() for task in streams]
            for task in (flusher, *tasks):
                task.cancel()
            if self._flushing is not None:
                tasks.append(self._flushing)
            await asyncio.gather(flusher, *tasks, return_exceptions=True)
            await self._writer.drained()

    def _fail(self, error: StorageError) -> None:
        if self._failure is None:
            logger.warning("storing %s failed: %s", self.digest[:12], error)
            self._failure = error
            self.feed(e.StoragePaused(str(error)))
        self._complete.set()

    # --- durability

    async def _keep_flushing(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_POLL_S)
            self._tell_moved()
            if self.staged.flush_due():
                await self._flush()

    def _tell_moved(self) -> None:
        """Sources whose pieces take long are kept by the bytes that come."""
        now = self._loop.time()
        if now < self._tell_moved_at:
            return
        self._tell_moved_at = now + MOVED_EVERY_S
        seen, self._seen_bytes = self._seen_bytes, {}
        for source, streams in self._streams.items():
            conn = self._around.source(source) if streams else None
            if conn is None:
                continue
            total = self._seen_bytes[source] = conn.answer_bytes
            if (moved := total - seen.get(source, total)) > 0:
                self.feed(e.BytesMoved(source, moved))

    async def _flush(self) -> None:
        """One at a time and never broken off: what became durable is told, whoever stops waiting for it."""
        if self._flushing is None or self._flushing.done():
            self._flushing = self._loop.create_task(self._flush_now(), name="flush")
        await asyncio.shield(self._flushing)

    async def _flush_now(self) -> None:
        try:
            # In a thread of its own: writes go on while the disk syncs.
            durable = await asyncio.to_thread(self.staged.flush)
        except StorageError as exc:
            self._fail(exc)
            return
        if durable:
            await self._writer.told()  # the core hears that a piece arrived before it hears more
            self.feed(e.PiecesDurable(tuple(durable)))

    # --- effects

    def _perform(self, effect: e.DownloadEffect) -> None:
        match effect:
            case e.RequestPieces(source, pieces):
                task = self._loop.create_task(self._request(source, pieces), name="request")
                streams = self._streams.setdefault(source, {})
                streams[task] = None
                task.add_done_callback(lambda done: streams.pop(done, None))
            case e.CancelRequests(source):
                for task in list(self._streams.get(source, ())):
                    task.cancel()
            case e.AskLease(count, unavailable):
                self._around.ask_lease(self.digest, count, unavailable)
            case e.Dial(peer, addresses):
                self._around.dial(peer, addresses)
            case e.Announce(pieces):
                self._around.announce(self.digest, pieces)
            case e.ReportDurable(pieces, fetched_from):
                self._around.report(self.digest, pieces, fetched_from)
            case e.QuarantinePeer(peer):
                logger.warning("peer %s sent two pieces with a wrong hash: quarantined", peer[:16])
                self._writer.forget(peer)
                self._around.quarantine(peer)
            case e.Completed():
                self._complete.set()
            case _:
                assert_never(effect)

    async def _request(self, source: PeerKey, pieces: tuple[int, ...]) -> None:
        waiting = {self._finder.id_of(piece): piece for piece in pieces}
        conn = self._around.source(source)
        try:
            if conn is not None:
                answers = conn.request(
                    self.digest,
                    list(waiting),
                    max_piece_bytes=self._max_piece_bytes,
                    answer_bytes=sum(self._lengths[piece] for piece in pieces),
                )
                async with contextlib.aclosing(answers):
                    async for answer in answers:
                        await self._take(source, waiting.pop(answer.piece), answer)
        except StorageError:
            return  # the writer said so
        except EdgeSyncError as exc:
            logger.debug("a request to %s broke off: %s", source[:16], exc)
        for piece in waiting.values():
            self.feed(e.PieceFailed(source, piece, "broken"))

    async def _take(self, source: PeerKey, piece: int, answer: PieceAnswer) -> None:
        """Have one answer checked and written. Raises StorageError."""
        if answer.missing is not None:
            self.feed(e.PieceFailed(source, piece, answer.missing))
            return
        self.feed(e.PieceReceived(source, piece))
        await self._writer.put(ReceivedPiece(source, piece, answer))

    def _written(self, piece: ReceivedPiece) -> None:
        answer = piece.answer
        self._uploads.remember(self.digest, piece.index, answer.encoding, answer.data)
        conn = self._around.source(piece.source)
        rtt_s = conn.rtt if conn is not None else 0.0
        self.feed(e.PieceArrived(piece.source, piece.index, len(answer.data), rtt_s))

    def _rejected(self, piece: ReceivedPiece, error: VerificationError) -> None:
        source = piece.source
        self.staged.count_rejected()
        self._around.rejected(source)
        logger.warning("piece %d from %s was rejected: %s", piece.index, source[:16], error)
        self.feed(e.PieceFailed(source, piece.index, "bad_hash"))


__all__ = ["Neighbourhood", "Transfer"]
