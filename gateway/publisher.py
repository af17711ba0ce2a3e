"""Turns a scanned tree into pieces: has them cut, hashed and compressed, and stores them.

It chooses the chunking parameters, hands tasks to worker processes, puts their results in path order and stores new
pieces in batches; it signs nothing and makes nothing visible: until the service commits the bundle, what was stored is
unreferenced pieces that a repeated publish finds again.

Invariants: the same bytes with the same parameters give the same manifest tables, whatever the number of workers; a
piece is compressed and stored once; every piece of the result is durable when ``chunk`` returns; plain bytes in flight
stay under IN_FLIGHT_BYTES (or a few of the largest pieces, where those are larger), whatever the file size.

Called by ``gateway.service.bundles``.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Final

from edgesync import limits
from edgesync.errors import EdgeSyncError, InputError
from edgesync.ids import PieceId
from edgesync.manifest import Chunking, FileEntry
from gateway.packs import NewPiece, PieceStore
from gateway.piece_worker import (
    Block,
    Boundaries,
    Cut,
    Encode,
    FilePieces,
    Ids,
    Piece,
    PieceWorker,
    Task,
    Whole,
    receive,
    serve,
)
from gateway.scan import Scan

Progress = Callable[[int, int], None]
"""Called with plain bytes done and plain bytes in all, from the thread that called ``chunk``."""

SMALLEST_AVERAGE: Final = limits.MIN_PIECE_AVERAGE_BYTES
USUAL_LARGEST_AVERAGE: Final = 1024 * 1024
"""Size alone raises the average up to here; beyond it only the cap on pieces does."""
LARGEST_AVERAGE: Final = 4 * 1024 * 1024
"""What the chunker can do; its largest piece is then 16 MiB."""
BYTES_AT_SMALLEST_AVERAGE: Final = 256 * 1024 * 1024
KEEP_PARAMETERS_FACTOR: Final = 4
"""A new version keeps its predecessor's parameters, so that pieces are shared, unless its size changed by more."""
_PIECE_BUDGET: Final = limits.MAX_PIECES * 9 // 10
"""What an estimate may promise: the chunker's pieces scatter around their average."""

IN_FLIGHT_BYTES: Final = 32 * 1024 * 1024
BATCH_BYTES: Final = 16 * 1024 * 1024
"""Encoded bytes made durable together; at most this is done again after a kill."""
INLINE_BYTES: Final = 8 * 1024 * 1024
"""A tree up to this is published without worker processes."""
_SMALL_FILE_BYTES: Final = 4 * 1024 * 1024
"""Files up to this are read whole, many to a task; larger ones are cut as they stream by."""
_GROUP_BYTES: Final = 4 * 1024 * 1024
_GROUP_FILES: Final = 128


class TooManyPiecesError(InputError):
    """The tree has more than MAX_PIECES pieces under these parameters: try a larger average."""


@dataclass
class Content:
    """The tables of a manifest, and what the pieces weigh."""

    chunking: Chunking
    files: list[FileEntry] = field(default_factory=list)
    piece_ids: bytearray = field(default_factory=bytearray)
    piece_lengths: list[int] = field(default_factory=list)
    encoded_lengths: list[int] = field(default_factory=list)
    """By piece index: bytes of the form the gateway sends."""
    stored_pieces: int = 0
    """Pieces that were not held before."""

    @property
    def wire_bytes(self) -> int:
        return sum(self.encoded_lengths)

    def ids(self) -> Iterator[PieceId]:
        for start in range(0, len(self.piece_ids), 32):
            yield PieceId(bytes(self.piece_ids[start : start + 32]))


def choose_chunking(
    sizes: Sequence[int], predecessor: tuple[Chunking, int] | None = None
) -> Chunking:
    """Parameters for files of these ``sizes``; ``predecessor`` is the last version's and its payload in bytes.

    Raises InputError: even the largest pieces would be too many.
    """
    total = sum(sizes)
    if predecessor is not None:
        chunking, before = predecessor
        similar = (
            total <= before * KEEP_PARAMETERS_FACTOR and before <= total * KEEP_PARAMETERS_FACTOR
        )
        if similar and _estimate(sizes, chunking.avg) <= _PIECE_BUDGET:
            return chunking
    average = SMALLEST_AVERAGE
    covered = BYTES_AT_SMALLEST_AVERAGE
    while covered < total and average < USUAL_LARGEST_AVERAGE:
        average *= 2
        covered *= 2
    while _estimate(sizes, average) > _PIECE_BUDGET and average < LARGEST_AVERAGE:
        average *= 2
    return parameters(average)


def parameters(average: int) -> Chunking:
    """Raises InputError: the chunker has no such average."""
    if average > LARGEST_AVERAGE:
        raise InputError(
            f"the tree has more than {limits.MAX_PIECES} pieces of the largest size: split the bundle"
        )
    return Chunking(algorithm="fastcdc", min=average // 4, avg=average, max=average * 4)


def _estimate(sizes: Sequence[int], average: int) -> int:
    return sum(1 + size // average for size in sizes if size)


def chunk(
    scan: Scan,
    chunking: Chunking,
    pieces: PieceStore,
    *,
    measure_only: bool = False,
    stored: list[PieceId] | None = None,
    progress: Progress | None = None,
) -> Content:
    """Cut the files of ``scan`` and store those pieces that are not held; ``measure_only`` stores nothing.

    ``stored`` collects the ids of what was stored, also when this fails.

    Raises TooManyPiecesError. Raises InputError: a file changed or cannot be read. Raises StorageError: no room, …
    """
    processes = 0
    if scan.payload_bytes > INLINE_BYTES:
        # One more than there are cores: somebody always waits for an answer or cuts ahead.
        processes = max(2, (os.cpu_count() or 1) + 1)
    publisher = _Publisher(
        scan,
        chunking,
        pieces,
        progress,
        [] if stored is None else stored,
        measure_only=measure_only,
    )
    return publisher.run(processes)


class _Slot:
    """A task's place in path order: what it returned waits here until everything before it was taken."""

    def __init__(self, files: range) -> None:
        self.files = files
        self.parts: deque[_Part] = deque()
        self.boundaries: Boundaries | None = None
        """Of a large file: set when it is cut to its end. A group of small files is one part."""
        self.cutting = False

    @property
    def finished(self) -> bool:
        return not self.parts and not self.cutting


class _Part:
    def __init__(self, size: int) -> None:
        self.size = size
        self.result: list[FilePieces] | None = None


class _Member:
    """A worker process as the parent sees it."""

    def __init__(self, process: ForkProcess, pipe: Connection) -> None:
        self.process = process
        self.pipe = pipe
        self.task: tuple[_Slot, _Part | None] | None = None
        """None while it is idle; the part is None while it cuts."""
        self.cut_offset = 0
        self.waits_for_room = False


class _Publisher:
    """Hands out tasks, answers questions and puts results in order, all in the calling thread."""

    def __init__(
        self,
        scan: Scan,
        chunking: Chunking,
        pieces: PieceStore,
        progress: Progress | None,
        stored: list[PieceId],
        *,
        measure_only: bool,
    ) -> None:
        self._scan = scan
        self._chunking = chunking
        self._pieces = pieces
        self._stored = stored
        self._measure_only = measure_only
        self._progress = progress
        self._total = scan.payload_bytes
        self._done = 0
        self._content = Content(chunking)
        self._index: dict[PieceId, int] = {}
        self._encoded: dict[PieceId, int] = {}
        """Encoded length of every piece met so far that is held; 0 while a worker compresses it."""
        self._slots: deque[_Slot] = deque()
        self._in_flight = 0
        self._allowed = max(IN_FLIGHT_BYTES, 8 * chunking.max)
        self._encode_next: deque[tuple[_Slot, _Part, Encode]] = deque()
        self._groups = self._split()
        self._next_group: range | None = next(self._groups, None)
        self._runs: list[list[int]] = []
        self._batch: list[NewPiece] = []
        self._batch_bytes = 0
        self._writing: Future[None] | None = None

    def run(self, processes: int) -> Content:
        members = self._fork(processes)
        try:
            with ThreadPoolExecutor(1, "packs") as self._writer:
                if members:
                    self._run_members(members)
                else:
                    self._run_inline()
                self._flush()
                if self._writing is not None:
                    self._writing.result()
        finally:
            for member in members:
                member.pipe.close()
            for member in members:
                member.process.join()
        return self._content

    def _split(self) -> Iterator[range]:
        """The files in path order: each large one alone, small ones in groups."""
        first = size = 0
        for number, file in enumerate(self._scan.files):
            large = file.size > _SMALL_FILE_BYTES
            full = size + file.size > _GROUP_BYTES or number - first >= _GROUP_FILES
            if number > first and (large or full):
                yield range(first, number)
                first, size = number, 0
            if large:
                yield range(number, number + 1)
                first = number + 1
            else:
                size += file.size
        if first < len(self._scan.files):
            yield range(first, len(self._scan.files))

    def _is_large(self, files: range) -> bool:
        return self._scan.files[files[0]].size > _SMALL_FILE_BYTES

    # --- without workers -------------------------------------------------------------------------------------------
    def _run_inline(self) -> None:
        worker, cutter = (PieceWorker(self._scan, self._chunking) for _ in range(2))
        for files in self._groups_left():
            slot = _Slot(files)
            self._slots.append(slot)
            if not self._is_large(files):
                self._inline(worker, slot, Whole(files.start, files.stop))
                continue
            slot.cutting = True
            offset = 0
            work = cutter.start(Cut(files.start))
            with closing(work):
                try:
                    question = next(work)
                    while True:
                        assert isinstance(question, Block)
                        self._inline(worker, slot, Encode(files.start, offset, question.lengths))
                        offset += sum(question.lengths)
                        question = work.send(None)
                except StopIteration as stop:
                    self._end_cut(slot, stop.value)
            self._take()

    def _groups_left(self) -> Iterator[range]:
        while self._next_group is not None:
            yield self._next_group
            self._next_group = next(self._groups, None)

    def _inline(self, worker: PieceWorker, slot: _Slot, task: Task) -> None:
        part = _Part(0)
        slot.parts.append(part)
        work = worker.start(task)
        with closing(work):
            question = next(work)
            assert isinstance(question, Ids)
            try:
                work.send(self._wanted(question.ids))
            except StopIteration as stop:
                part.result = stop.value
        self._take()

    # --- with workers ----------------------------------------------------------------------------------------------
    def _fork(self, count: int) -> list[_Member]:
        context = get_context("fork")
        members: list[_Member] = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            others = [member.pipe for member in members]
            process = context.Process(
                target=_worker_main,
                args=(self._scan, self._chunking, theirs, [ours, *others]),
                daemon=True,
            )
            process.start()
            theirs.close()
            members.append(_Member(process, ours))
        return members

    def _run_members(self, members: list[_Member]) -> None:
        by_pipe = {member.pipe: member for member in members}
        while True:
            for member in members:
                if member.task is None:
                    self._assign(member, members)
                elif member.waits_for_room and self._has_room(member.task[0]):
                    member.waits_for_room = False
                    member.pipe.send(None)
            busy = [m.pipe for m in members if m.task is not None and not m.waits_for_room]
            if not busy:
                assert not self._slots
                return
            for pipe in wait(busy):
                assert isinstance(pipe, Connection)
                self._hear(by_pipe[pipe])

    def _has_room(self, slot: _Slot) -> bool:
        # What everything else waits for goes on in any case.
        return self._in_flight < self._allowed or (slot is self._slots[0] and not slot.parts)

    def _assign(self, member: _Member, members: list[_Member]) -> None:
        if self._encode_next:
            slot, part, encode = self._encode_next.popleft()
            self._send(member, slot, part, encode)
            return
        files = self._next_group
        if files is None or self._in_flight >= self._allowed:
            return
        slot = _Slot(files)
        if self._is_large(files):
            if any(other.task is not None and other.task[1] is None for other in members):
                return
            slot.cutting = True
            member.cut_offset = 0
            self._send(member, slot, None, Cut(files.start))
        else:
            part = _Part(sum(file.size for file in self._scan.files[files.start : files.stop]))
            self._in_flight += part.size
            slot.parts.append(part)
            self._send(member, slot, part, Whole(files.start, files.stop))
        self._slots.append(slot)
        self._next_group = next(self._groups, None)

    def _send(self, member: _Member, slot: _Slot, part: _Part | None, task: Task) -> None:
        member.task = (slot, part)
        member.pipe.send(task)

    def _hear(self, member: _Member) -> None:
        assert member.task is not None
        slot, part = member.task
        try:
            message = member.pipe.recv()
            if isinstance(message, tuple) and message[0] == "done":
                message = ("done", receive(member.pipe, *message[1:]))
        except (EOFError, ConnectionResetError) as exc:
            member.process.join()
            raise EdgeSyncError(
                f"a publishing process was killed (exit {member.process.exitcode}): publish again"
            ) from exc
        match message:
            case Ids(ids):
                member.pipe.send(self._wanted(ids))
            case Block(lengths):
                ahead = _Part(sum(lengths))
                self._in_flight += ahead.size
                slot.parts.append(ahead)
                encode = Encode(slot.files.start, member.cut_offset, lengths)
                self._encode_next.append((slot, ahead, encode))
                member.cut_offset += ahead.size
                member.waits_for_room = True
            case ("done", Boundaries() as boundaries):
                member.task = None
                self._end_cut(slot, boundaries)
                self._take()
            case ("done", result):
                assert part is not None
                member.task = None
                part.result = result
                self._take()
            case ("failed", error):
                raise error

    # --- results, in order -----------------------------------------------------------------------------------------
    def _wanted(self, ids: list[PieceId]) -> list[bool]:
        """Which of ``ids`` nobody holds or compresses yet; from now on somebody does."""
        self._encoded.update(self._pieces.sizes([i for i in ids if i not in self._encoded]))
        flags = []
        for piece_id in ids:
            flags.append(piece_id not in self._encoded)
            self._encoded.setdefault(piece_id, 0)
        return flags

    def _end_cut(self, slot: _Slot, boundaries: Boundaries) -> None:
        slot.boundaries = boundaries
        slot.cutting = False

    def _take(self) -> None:
        while self._slots:
            slot = self._slots[0]
            while slot.parts and slot.parts[0].result is not None:
                part = slot.parts.popleft()
                self._in_flight -= part.size
                assert part.result is not None
                for number, result in enumerate(part.result):
                    for piece in result.pieces:
                        self._take_piece(piece)
                    if not self._is_large(slot.files):
                        self._end_file(slot.files[number], result.sha256)
                if self._batch_bytes >= BATCH_BYTES:
                    self._flush()
            if not slot.finished:
                break
            if slot.boundaries is not None:
                self._end_file(slot.files[0], slot.boundaries.sha256)
            self._slots.popleft()
        if self._progress is not None:
            self._progress(self._done, self._total)

    def _take_piece(self, piece: Piece) -> None:
        content = self._content
        index = self._index.get(piece.id)
        if index is None:
            index = len(content.piece_lengths)
            if index >= limits.MAX_PIECES:
                raise TooManyPiecesError(
                    f"{self._scan.root} has more than {limits.MAX_PIECES} different pieces: split the bundle"
                )
            self._index[piece.id] = index
            content.piece_ids += piece.id
            content.piece_lengths.append(piece.length)
            content.encoded_lengths.append(self._encoded[piece.id])
        # Whoever compressed a piece may come after others that only name it.
        if piece.encoding is not None:
            content.encoded_lengths[index] = self._encoded[piece.id] = len(piece.data)
            content.stored_pieces += 1
            if not self._measure_only:
                self._batch.append(NewPiece(piece.id, piece.encoding, piece.data, piece.length))
                self._batch_bytes += len(piece.data)
        if self._runs and sum(self._runs[-1]) == index:
            self._runs[-1][1] += 1
        else:
            self._runs.append([index, 1])
        self._done += piece.length

    def _end_file(self, number: int, sha256: bytes | None) -> None:
        file = self._scan.files[number]
        runs = tuple((first, count) for first, count in self._runs)
        self._content.files.append(FileEntry(file.path, file.mode, file.size, runs, sha256))
        self._runs = []

    def _flush(self) -> None:
        batch, self._batch, self._batch_bytes = self._batch, [], 0
        if self._writing is not None:
            self._writing.result()
        if batch:
            self._stored += [piece.id for piece in batch]
            self._writing = self._writer.submit(self._pieces.add, batch)


def _worker_main(
    scan: Scan, chunking: Chunking, pipe: Connection, others: list[Connection]
) -> None:
    # Copies of the parent's ends would keep the pipes open after the parent is gone.
    for other in others:
        other.close()
    serve(PieceWorker(scan, chunking), pipe)


__all__ = ["Content", "Progress", "TooManyPiecesError", "choose_chunking", "chunk", "parameters"]
