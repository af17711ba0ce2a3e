"""The part of publishing that uses the processor: reads files, cuts, hashes and compresses, in processes of its own.

Small files cost so many short system calls that threads would spend their time handing the interpreter lock around
(measured: 90 MB/s with threads, 200 with processes), so workers are processes. They are forked, not started anew: they
need the scanned tree, its open folder and the one privilege a command run by root may have kept to read its input.

A task is a generator: it yields questions, is sent answers and returns its result. A worker puts the questions on a
pipe; a small tree is done without workers by asking directly. Workers never touch the gateway's directory.

Invariants: boundaries depend on the bytes and parameters alone; a task holds at most one block or one group of small
files; a worker whose parent is gone, however it went, ends at its next question.
"""

import hashlib
import os
import signal
import traceback
from collections.abc import Generator, Sequence
from contextlib import suppress
from itertools import accumulate
from multiprocessing.connection import Connection
from typing import Final, NamedTuple

from pyfastcdc import FastCDC

from edgesync import piece_codec
from edgesync.errors import EdgeSyncError
from edgesync.ids import PieceId
from edgesync.manifest import Chunking
from gateway.scan import Scan, ScannedFile

BLOCK_BYTES: Final = 4 * 1024 * 1024
"""How much of a large file is cut and encoded at a time, unless its largest piece wants more."""


class Whole(NamedTuple):
    """Task: read the files ``first`` to ``last`` (excluded) whole, cut and encode them."""

    first: int
    last: int


class Cut(NamedTuple):
    """Task: find the piece boundaries of one large file; yields the lengths of a Block at a time."""

    file: int


class Encode(NamedTuple):
    """Task: hash and encode pieces of a large file that lie back to back from ``offset``."""

    file: int
    offset: int
    lengths: list[int]


Task = Whole | Cut | Encode


class Ids(NamedTuple):
    """Question: which of these pieces are wanted? Answer: a flag each."""

    ids: list[PieceId]


class Block(NamedTuple):
    """Question: here are the next pieces of the file; go on? Answer: None, when there is room for more."""

    lengths: list[int]


class Piece(NamedTuple):
    id: PieceId
    length: int
    encoding: piece_codec.Encoding | None
    """None where the piece was not wanted."""
    data: bytes | memoryview


class FilePieces(NamedTuple):
    """Pieces of one file, in order: all of them, or those of an Encode task."""

    pieces: list[Piece]
    sha256: bytes | None
    """Of the whole file; None where it is one piece or none, and from an Encode task."""


class Boundaries(NamedTuple):
    """Result of a Cut task: the whole file's hash, None where it is one piece."""

    sha256: bytes | None


Question = Ids | Block
Answer = Sequence[bool] | None
Result = list[FilePieces] | Boundaries
Work = Generator[Question, Answer, Result]


class PieceWorker:
    def __init__(self, scan: Scan, chunking: Chunking) -> None:
        self._scan = scan
        self._chunking = chunking
        # The normalisation level is part of what ``fastcdc`` in a manifest means.
        self._chunker = FastCDC(
            chunking.avg, min_size=chunking.min, max_size=chunking.max, normalized_chunking=1
        )
        self._block_bytes = max(BLOCK_BYTES, 2 * chunking.max)
        self._buffer = bytearray()

    def start(self, task: Task) -> Work:
        match task:
            case Whole(first, last):
                return self._whole(self._scan.files[first:last])
            case Cut(file):
                return self._cut(self._scan.files[file])
            case Encode(file, offset, lengths):
                return self._encode(self._scan.files[file], offset, lengths)

    def _whole(self, files: Sequence[ScannedFile]) -> Work:
        buffer = self._room(sum(file.size for file in files))
        views: list[list[memoryview]] = []
        digests = []
        start = 0
        for file in files:
            data = buffer[start : start + file.size]
            start += file.size
            fd = self._scan.open(file)
            try:
                self._scan.read_into(file, fd, data, 0)
                self._scan.check_unchanged(file, fd)
            finally:
                os.close(fd)
            if len(data) <= self._chunking.min:
                pieces = [data] if data else []
            else:
                pieces = [piece.data for piece in self._chunker.cut_buf(data)]
            views.append(pieces)
            digests.append(hashlib.sha256(data).digest() if len(pieces) > 1 else None)
        done = yield from self._pieces([view for pieces in views for view in pieces])
        result = []
        start = 0
        for pieces, digest in zip(views, digests, strict=True):
            result.append(FilePieces(done[start : start + len(pieces)], digest))
            start += len(pieces)
        return result

    def _cut(self, file: ScannedFile) -> Work:
        whole = hashlib.sha256()
        fd = self._scan.open(file)
        try:
            buffer = self._room(self._block_bytes)
            offset = rest = count = 0
            while offset < file.size or rest:
                fill = min(file.size - offset, self._block_bytes - rest)
                self._scan.read_into(file, fd, buffer[rest : rest + fill], offset)
                offset += fill
                block = buffer[: rest + fill]
                lengths = []
                used = 0
                for piece in self._chunker.cut_buf(block):
                    # A cut nearer to the end than the largest piece could lie elsewhere had more been read.
                    if offset < file.size and len(block) - piece.offset < self._chunking.max:
                        break
                    used = piece.offset + piece.length
                    lengths.append(piece.length)
                whole.update(block[:used])
                count += len(lengths)
                rest = len(block) - used
                yield Block(lengths)
                buffer[:rest] = bytes(block[used:])
            self._scan.check_unchanged(file, fd)
        finally:
            os.close(fd)
        return Boundaries(whole.digest() if count > 1 else None)

    def _encode(self, file: ScannedFile, offset: int, lengths: Sequence[int]) -> Work:
        data = self._room(sum(lengths))
        fd = self._scan.open(file)
        try:
            self._scan.read_into(file, fd, data, offset)
            self._scan.check_unchanged(file, fd)
        finally:
            os.close(fd)
        views = []
        start = 0
        for length in lengths:
            views.append(data[start : start + length])
            start += length
        return [FilePieces((yield from self._pieces(views)), None)]

    def _pieces(self, views: Sequence[memoryview]) -> Generator[Question, Answer, list[Piece]]:
        ids = [PieceId(hashlib.sha256(view).digest()) for view in views]
        wanted = yield Ids(ids)
        assert wanted is not None
        pieces = []
        for piece_id, view, want in zip(ids, views, wanted, strict=True):
            encoding, data = piece_codec.encode(view) if want else (None, b"")
            pieces.append(Piece(piece_id, len(view), encoding, data))
        return pieces

    def _room(self, size: int) -> memoryview:
        """The worker's one buffer, large enough: fresh memory for every block would cost as much as cutting it."""
        if len(self._buffer) < size:
            self._buffer = bytearray(size)
        return memoryview(self._buffer)[:size]


def serve(worker: PieceWorker, pipe: Connection) -> None:
    """Work on tasks from ``pipe`` until it ends; the body of a worker process.

    Messages to the parent: a Question, ``("done", Result, lengths)`` followed by raw bytes, or ``("failed", error)``;
    ``receive`` puts a result together again.
    """
    # The terminal's Ctrl-C reaches the whole group; the parent decides, and closes the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            work = worker.start(pipe.recv())
            try:
                answer: Answer = None
                while True:
                    pipe.send(work.send(answer))
                    answer = pipe.recv()
            except StopIteration as stop:
                _send_result(pipe, stop.value)
            except EdgeSyncError as exc:
                pipe.send(("failed", exc))
            except (EOFError, BrokenPipeError, ConnectionResetError):
                raise
            except Exception:  # noqa: BLE001 - a bug of ours: the parent raises it
                pipe.send(("failed", RuntimeError(traceback.format_exc())))


def _send_result(pipe: Connection, result: Result) -> None:
    if isinstance(result, Boundaries):
        pipe.send(("done", result, []))
        return
    # Piece bytes go past pickle: copying them four times took a tenth of all processor time.
    parts = [piece.data for file in result for piece in file.pieces if piece.encoding]
    bare = [
        FilePieces([Piece(p.id, p.length, p.encoding, b"") for p in file.pieces], file.sha256)
        for file in result
    ]
    pipe.send(("done", bare, [len(part) for part in parts]))
    limit = os.sysconf("SC_IOV_MAX")
    while parts:
        written = os.writev(pipe.fileno(), parts[:limit])
        done = 0
        while done < len(parts) and written >= len(parts[done]):
            written -= len(parts[done])
            done += 1
        del parts[:done]
        if written:
            parts[0] = memoryview(parts[0])[written:]


def receive(pipe: Connection, result: Result, lengths: Sequence[int]) -> Result:
    """The rest of a ``done`` message: its result with the pieces' bytes. Raises EOFError: the worker is gone."""
    if isinstance(result, Boundaries):
        return result
    data = memoryview(bytearray(sum(lengths)))
    filled = 0
    while filled < len(data):
        count = os.readv(pipe.fileno(), [data[filled:]])
        if not count:
            raise EOFError
        filled += count
    ends = accumulate(lengths)
    views = iter([data[end - length : end] for end, length in zip(ends, lengths, strict=True)])
    return [
        FilePieces(
            [
                piece._replace(data=next(views)) if piece.encoding else piece
                for piece in file.pieces
            ],
            file.sha256,
        )
        for file in result
    ]


__all__ = [
    "Answer",
    "Block",
    "Boundaries",
    "Cut",
    "Encode",
    "FilePieces",
    "Ids",
    "Piece",
    "PieceWorker",
    "Question",
    "Result",
    "Task",
    "Whole",
    "Work",
    "receive",
    "serve",
]
