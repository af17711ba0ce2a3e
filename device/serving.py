"""What this device gives to peers: pieces of staged and installed bundles, under upload slots and an upload cap.

It does not decide who is a member (the endpoint has) and holds no connections. Invariants: what is sent was hashed in
the very buffer it is sent or compressed from; a piece an application changed is answered ``gone`` and never
sent; at most UPLOAD_SLOTS peers are served at a time, one request of each at a time.
"""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from device.bundle_store import Bundle, BundleStore
from edgesync import limits, piece_codec
from edgesync.errors import EdgeSyncError
from edgesync.ids import Digest, PeerKey, PieceId
from edgesync.piece_finder import PieceFinder
from edgesync.transport.connection import PeerConnection, PieceAnswer
from edgesync.wire.messages import Encoding, Request

UPLOAD_SLOTS: Final = 4
SLOT_WAIT_S: Final = 2.0
"""A peer that finds no free slot for so long is told ``busy`` and asks elsewhere."""
CACHE_BYTES: Final = limits.MIB
"""Pieces just received, in the form they came: the next peers ask for exactly these."""
FINDERS: Final = 4
READ_THREADS: Final = 1
TRIED_BYTES: Final = 4 * limits.MIB
WORTH: Final = 0.97
"""A bundle of which TRIED_BYTES shrank to no less than this is sent as it is from then on."""

MayRead = Callable[[PeerKey, str, Digest], bool]


@dataclass(slots=True)
class _Compression:
    """What compressing pieces of one bundle has brought."""

    plain: int = 0
    packed: int = 0

    def worth_trying(self) -> bool:
        return self.plain < TRIED_BYTES or self.packed < self.plain * WORTH


class Uploads:
    """``may_read`` is asked about bundles with ``access: assigned`` only."""

    def __init__(
        self,
        store: BundleStore,
        *,
        may_read: MayRead,
        slots: int = UPLOAD_SLOTS,
    ) -> None:
        self._store = store
        self._may_read = may_read
        self._slots = asyncio.Semaphore(slots)
        self._turns: dict[PeerConnection, asyncio.Lock] = {}
        self._threads = ThreadPoolExecutor(READ_THREADS, "uploads")
        self._finders: OrderedDict[Digest, PieceFinder] = OrderedDict()
        self._compression: dict[Digest, _Compression] = {}
        self._cache: OrderedDict[tuple[Digest, int], tuple[Encoding, bytes]] = OrderedDict()
        self._cached = 0

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def readable(self, conn: PeerConnection, bundle: Bundle) -> bool:
        return bundle.access != "assigned" or self._may_read(
            conn.peer.key, conn.peer.id, bundle.digest
        )

    def forget(self, conn: PeerConnection) -> None:
        self._turns.pop(conn, None)

    def remember(self, digest: Digest, piece: int, encoding: Encoding, data: bytes) -> None:
        """Keep a verified piece in the form it came in, for a while."""
        if len(data) * 8 > CACHE_BYTES or (digest, piece) in self._cache:
            return
        self._cache[digest, piece] = (encoding, data)
        self._cached += len(data)
        while self._cached > CACHE_BYTES:
            _key, (_encoding, old) = self._cache.popitem(last=False)
            self._cached -= len(old)

    def drop(self, digest: Digest, piece: int) -> None:
        old = self._cache.pop((digest, piece), None)
        if old is not None:
            self._cached -= len(old[1])

    async def serve(self, conn: PeerConnection, request: Request) -> AsyncIterator[PieceAnswer]:
        digest = Digest(request.manifest.hex())
        pieces = [PieceId(piece) for piece in request.pieces]
        bundle = self._store.get(digest)
        if bundle is None:
            for piece in pieces:
                yield PieceAnswer(piece, missing="not_held")
            return
        if not self.readable(conn, bundle):
            for piece in pieces:
                yield PieceAnswer(piece, missing="refused")
            return
        turn = self._turns.setdefault(conn, asyncio.Lock())
        async with contextlib.AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(limits.STALL_TIMEOUT_S / 2):
                    await stack.enter_async_context(turn)
                async with asyncio.timeout(SLOT_WAIT_S):
                    await stack.enter_async_context(self._slots)
            except TimeoutError:
                for piece in pieces:
                    yield PieceAnswer(piece, missing="busy")
                return
            async for answer in self._answers(bundle, pieces, request.encodings):
                yield answer

    async def _answers(
        self, bundle: Bundle, pieces: list[PieceId], encodings: list[Encoding]
    ) -> AsyncIterator[PieceAnswer]:
        loop = asyncio.get_running_loop()
        finder = await loop.run_in_executor(self._threads, self._finder, bundle)
        if finder is None:
            for piece in pieces:
                yield PieceAnswer(piece, missing="gone")
            return
        packed_ok = "zstd" in encodings

        def read(piece: PieceId) -> "asyncio.Future[PieceAnswer]":
            index = finder.find(piece)
            if index is None or index not in bundle.have:
                done: asyncio.Future[PieceAnswer] = loop.create_future()
                done.set_result(PieceAnswer(piece, missing="not_held"))
                return done
            kept = self._cache.get((bundle.digest, index))
            if kept is not None and (packed_ok or kept[0] == "identity"):
                done = loop.create_future()
                done.set_result(PieceAnswer(piece, kept[0], kept[1]))
                return done
            return loop.run_in_executor(self._threads, self._read, bundle, index, piece, packed_ok)

        # The next piece is read and compressed while one is sent.
        ahead: asyncio.Future[PieceAnswer] | None = read(pieces[0])
        try:
            for position, piece in enumerate(pieces):
                assert ahead is not None
                answer = await ahead
                ahead = read(pieces[position + 1]) if position + 1 < len(pieces) else None
                if answer.missing is None:
                    bundle.count_sent(len(answer.data))
                    index = finder.find(piece)
                    if index is not None:
                        self.remember(bundle.digest, index, answer.encoding, answer.data)
                yield answer
        finally:
            if ahead is not None:
                ahead.cancel()

    def _finder(self, bundle: Bundle) -> PieceFinder | None:
        finder = self._finders.get(bundle.digest)
        if finder is None:
            try:
                finder = PieceFinder(bundle.map.piece_ids)
            except EdgeSyncError:
                return None
            self._finders[bundle.digest] = finder
            while len(self._finders) > FINDERS:
                with contextlib.suppress(KeyError):
                    self._finders.popitem(last=False)
        return finder

    def _read(self, bundle: Bundle, index: int, piece: PieceId, packed_ok: bool) -> PieceAnswer:
        plain = bundle.read_piece(index)
        if plain is None:
            return PieceAnswer(piece, missing="gone")
        compression = self._compression.setdefault(bundle.digest, _Compression())
        if not packed_ok or not compression.worth_trying():
            return PieceAnswer(piece, "identity", plain)
        encoding, data = piece_codec.encode(plain)
        compression.plain += len(plain)
        compression.packed += len(data)
        return PieceAnswer(piece, encoding, data)
