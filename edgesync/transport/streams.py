"""What sessions need of a connection, whatever carries it: streams with back-pressure, and an end for every wait.

``Carrier`` is the narrow part of a link that ``edgesync.transport.connection`` and the endpoint use; QUIC
(``edgesync.transport.link``) and TLS over TCP (``edgesync.transport.tls_link``) provide it. ``Stream`` is what sessions
read and write; each carrier fills in how limits are told and what still waits to be sent.

Invariants: a peer's window grows only by what was consumed here; every granted window is reserved in the budget; every
wait on a stream ends, by data, by the peer, by the stall timeout or with the link. Event loop only.
"""

import abc
import asyncio
from collections.abc import Mapping
from typing import Protocol

from edgesync import limits
from edgesync.errors import (
    EdgeSyncError,
    ErrorCode,
    LimitExceededError,
    PeerBusyError,
    PeerTimeoutError,
    TransportError,
    UnexpectedMessageError,
)
from edgesync.peer.session import error_from_code
from edgesync.transport.flow import Budget
from edgesync.transport.patience import silence_s
from edgesync.transport.read_buffer import ReadBuffer
from edgesync.transport.udp import Address
from edgesync.transport.window import WindowTuner
from edgesync.wire import codec
from edgesync.wire.messages import Message


class LinkOwner(Protocol):
    """What a link tells; each call returns at once."""

    def handshake_done(self, link: "Carrier", alpn: str) -> None: ...
    def stream_opened(self, link: "Carrier", stream: "Stream") -> None: ...
    def link_closed(self, link: "Carrier", error: EdgeSyncError) -> None: ...


class Carrier(Protocol):
    """One connection to one peer."""

    loop: asyncio.AbstractEventLoop
    budget: Budget
    address: Address
    proxy: str
    """``HOST:PORT`` of the HTTP proxy it goes through, whose address ``address`` then is; empty: none."""
    dialed: bool
    error: EdgeSyncError | None
    handshake_complete: bool
    last_received: float
    moved_in: int
    """Bytes of all its streams that came in order."""
    moved_out: int
    """Bytes let go of, of all streams that were waited for."""

    @property
    def wire_bytes(self) -> int:
        """What went over the wire in both directions, with headers, as near as it can be told."""

    @property
    def wire_bytes_in(self) -> int:
        """The same of what came."""

    @property
    def name(self) -> str:
        """``QUIC`` or ``TLS``."""

    @property
    def controller_name(self) -> str:
        """What decides how fast this side sends."""

    def yield_to_others(self) -> None:
        """Leave room to other traffic of the path in what this side sends, where the carrier can."""

    @property
    def current_address(self) -> Address: ...
    @property
    def base_window(self) -> int: ...
    @property
    def send_ahead(self) -> int:
        """Bytes of a stream that may wait to be let go of."""

    @property
    def unproven(self) -> bool:
        """Whether a stranger at our door may still be anybody."""

    def proven(self) -> None: ...
    def smoothed_rtt(self) -> float:
        """Seconds; 0.0 while unknown."""

    def peer_certificate(self) -> bytes | None:
        """DER of what the server showed (clients only)."""

    def allow_streams(self, count: int) -> None:
        """How many more streams the peer may have open at a time."""

    def set_base_window(self, window: int) -> None: ...
    def first_answer_window(self) -> int: ...
    def widen(self, by: int) -> None: ...
    def narrow(self, by: int) -> None: ...
    def consumed(self, count: int) -> None: ...
    def open_stream(self, held_back: int | None = None) -> "Stream":
        """``held_back``: the peer may be no more than so many bytes ahead from the beginning."""

    def forget(self, stream: "Stream") -> None: ...
    def write(self, stream_id: int, data: bytes, *, end: bool) -> None: ...
    def reset(self, stream_id: int, code: ErrorCode) -> None: ...
    def stop(self, stream_id: int, code: ErrorCode) -> None: ...
    def starts_draining(self, stream: "Stream") -> None: ...
    def ends_draining(self, stream: "Stream") -> None: ...
    def transmit_soon(self) -> None: ...
    def ping(self) -> None: ...
    def close(
        self, code: ErrorCode, reason: str = "", *, error: EdgeSyncError | None = None
    ) -> None: ...
    def lost(self, error: EdgeSyncError) -> None: ...


class GrantedWindow(abc.ABC):
    """How far a connection's peer may be ahead of its readers: a base, and what answers were granted besides.

    Every carrier is one. Whoever widens it has reserved the bytes; it grows otherwise only by what was consumed.
    """

    loop: asyncio.AbstractEventLoop
    error: EdgeSyncError | None
    _streams: Mapping[int, "Stream"]

    def __init__(self) -> None:
        self._consumed = 0
        self._window = self._base = limits.UNPROVEN_WINDOW_BYTES
        self._tuner = WindowTuner()

    @abc.abstractmethod
    def smoothed_rtt(self) -> float: ...

    @abc.abstractmethod
    def _granted(self) -> int:
        """The offset up to which the peer was told it may send, of all streams together."""

    @abc.abstractmethod
    def _grant(self, limit: int) -> None: ...

    @property
    def base_window(self) -> int:
        return self._base

    def set_base_window(self, window: int) -> None:
        """Unread bytes allowed besides granted answers; the caller reserved the difference."""
        self._window += window - self._base
        self._base = window
        self.consumed(0)

    def first_answer_window(self) -> int:
        """How far ahead of its reader a new answer on this path should be."""
        return self._tuner.begin(rtt=self.smoothed_rtt())

    def widen(self, by: int) -> None:
        self._window += by
        self.consumed(0)

    def narrow(self, by: int) -> None:
        self._window -= by

    def consumed(self, count: int) -> None:
        self._consumed += count
        if self.error is not None:
            return
        if count and self._tuner.consumed(count, now=self.loop.time(), rtt=self.smoothed_rtt()):
            for stream in self._streams.values():
                if stream.follows_path:
                    stream.widen_to(self._tuner.window)
        limit = self._consumed + self._window
        if limit - self._granted() >= self._window // 4:
            self._grant(limit)


class Stream:
    """A bidirectional stream. One reader and one writer at a time."""

    def __init__(self, link: "Carrier", stream_id: int, *, window: int) -> None:
        self.id = stream_id
        self.received = 0
        """Bytes delivered in order so far, read or not."""
        self._link = link
        self._window = window
        self._ceiling: int | None = None
        self._reserved = 0
        self.follows_path = False
        self._most: int | None = None
        self._buffer = ReadBuffer()
        self._consumed = 0
        self._ended = False
        self._error: EdgeSyncError | None = None
        self._abandoned = False
        self.reset_by_peer = False
        self._reader: asyncio.Future[None] | None = None
        self._needed = 0
        self._writer: asyncio.Future[None] | None = None
        self._low_water: int | None = None
        self._last_backlog = 0
        self._finished_writing = False

    # --- receiving

    async def grant(self, window: int) -> None:
        """Let the peer be ``window`` bytes ahead of the reader; waits until the budget has them."""
        await self._link.budget.reserve_soon(window)
        if self._error is not None or self._link.error is not None:
            self._link.budget.release(window)
            raise self._error or self._link.error or TransportError("the stream is over")
        self._reserved += window
        self._window = window
        self._link.widen(window)
        self._raise_limit()

    def follow_path(self, most: int | None = None) -> None:
        """Grow the window with what the path carries, as far as the budget has room; ``grant`` was the least.

        ``most`` is all that will come: what a short answer reserves beyond it, a long one beside it lacks.
        """
        self.follows_path = True
        self._most = most
        self.widen_to(self._link.first_answer_window())

    def begin(self, window: int, held_back: int | None) -> None:
        """A stream of ours starts with this window, or with less."""
        self._window = window
        self.hold_back(held_back)

    def hold_back(self, window: int | None) -> None:
        """Let the peer be no more than ``window`` bytes ahead, whatever was granted; None: as granted."""
        self._ceiling = window
        self._raise_limit()

    def widen_to(self, window: int) -> None:
        if self._most is not None:
            window = min(window, self._most)
        extra = window - self._window
        if extra > 0 and self._error is None and self._link.budget.reserve(extra):
            self._reserved += extra
            self._window = window
            self._link.widen(extra)
            self._raise_limit()

    async def read_exactly(self, count: int, *, stall_s: float = limits.STALL_TIMEOUT_S) -> bytes:
        """``count`` bytes. Raises UnexpectedMessageError: the stream ended before; EdgeSyncError: why it broke."""
        if len(self._buffer) < count:
            await self._wait_for(count, stall_s)
        if len(self._buffer) < count:
            raise UnexpectedMessageError("the peer ended a stream in the middle of a message")
        data = self._buffer.take(count)
        self._consume(count)
        return data

    async def read_frame(
        self, max_bytes: int, *, stall_s: float = limits.STALL_TIMEOUT_S
    ) -> Message | None:
        """The next message, or None at a clean end. Raises ProtocolError: too long or not readable."""
        if len(self._buffer) < codec.PREFIX_BYTES:
            await self._wait_for(codec.PREFIX_BYTES, stall_s)
            if not self._buffer and self._ended:
                return None
        length = codec.frame_length(await self.read_exactly(codec.PREFIX_BYTES, stall_s=stall_s))
        if length > max_bytes:
            raise LimitExceededError(
                f"a message of {length} bytes came where at most {max_bytes} are allowed"
            )
        return codec.decode(await self._read_body(length, stall_s))

    async def _read_body(self, length: int, stall_s: float) -> bytes:
        """A frame may be longer than the stream's window: what is taken from it early is reserved apart."""
        step = (
            self._window // 2
        )  # windows are renewed by quarters, so at least three are always open
        if length <= step:
            return await self.read_exactly(length, stall_s=stall_s)
        if not self._link.budget.reserve(length):
            raise PeerBusyError("this machine has no room for the message", retry_after_s=1.0)
        try:
            body = bytearray()
            while len(body) < length:
                body += await self.read_exactly(min(length - len(body), step), stall_s=stall_s)
            return bytes(body)
        finally:
            self._link.budget.release(length)

    async def expect_end(self, *, stall_s: float = limits.STALL_TIMEOUT_S) -> None:
        """Raises LimitExceededError: the peer sends on after it said everything it was asked."""
        if not self._ended:
            await self._wait_for(1, stall_s)
        if self._buffer:
            raise LimitExceededError("the peer sent more bytes than it was asked for")

    async def wait_readable(self, *, stall_s: float | None) -> bool:
        """Wait, without a deadline if ``stall_s`` is None, until something is there; False at the end."""
        if not self._buffer and not self._ended:
            await self._wait_for(1, stall_s)
        return bool(self._buffer)

    async def _wait_for(self, count: int, stall_s: float | None) -> None:
        if self._reader is not None:
            raise RuntimeError("a stream has one reader")
        link = self._link
        since = link.loop.time()
        while len(self._buffer) < count:
            if self._error is not None:
                raise self._error
            if self._ended:
                return
            before, moved = self.received, link.moved_in
            self._needed = count
            self._reader = link.loop.create_future()
            try:
                await _within(self._reader, self._patience(stall_s))
            except TimeoutError:
                if self.received != before:
                    since = link.loop.time()
                elif link.moved_in == moved or link.loop.time() - since >= limits.MAX_TURN_S:
                    raise PeerTimeoutError(f"the peer sent nothing for {stall_s:g} s") from None
            finally:
                self._reader = None

    def _patience(self, stall_s: float | None) -> float | None:
        return None if stall_s is None else silence_s(stall_s, self._link.smoothed_rtt())

    def _consume(self, count: int) -> None:
        self._consumed += count
        self._raise_limit()
        self._link.consumed(count)

    def _raise_limit(self) -> None:
        window = self._window if self._ceiling is None else min(self._window, self._ceiling)
        limit = self._consumed + window
        if limit - self._advertised() >= window // 4:
            self._advertise(limit)

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    # --- sending

    def write(self, data: bytes, *, end: bool = False) -> None:
        """Queue bytes; follow with ``drain``. Raises EdgeSyncError: the stream or link is over."""
        if self._error is not None:
            raise self._error
        if self._finished_writing:
            raise RuntimeError("a stream was written after its end")
        self._link.write(self.id, data, end=end)
        self._finished_writing = end

    @property
    def backlog(self) -> int:
        """Bytes written and not yet let go of: by QUIC once acknowledged, by TLS once in the socket."""
        raise NotImplementedError

    async def drain(
        self,
        *,
        low_water: int | None = None,
        stall_s: float = limits.STALL_TIMEOUT_S,
    ) -> None:
        """Wait until at most ``low_water`` bytes are unacknowledged; None: until there is room for another piece.

        Raises PeerTimeoutError: nothing moved.
        """
        link = self._link
        since = link.loop.time()
        while not self._has_room(low_water):
            if self._error is not None:
                raise self._error
            if self._writer is not None:
                await _within(asyncio.shield(self._writer), stall_s)
                continue
            before, moved = self.backlog, link.moved_out
            self._low_water = low_water
            self._last_backlog = before
            self._writer = link.loop.create_future()
            link.starts_draining(self)
            try:
                await _within(self._writer, self._patience(stall_s))
            except TimeoutError:
                if self.backlog < before:
                    since = link.loop.time()
                elif link.moved_out == moved or link.loop.time() - since >= limits.MAX_TURN_S:
                    raise PeerTimeoutError(f"the peer accepted nothing for {stall_s:g} s") from None
            finally:
                if self._writer is not None and not self._writer.done():
                    self._writer.cancel()
                self._writer = None
                link.ends_draining(self)
        if self._error is not None:
            raise self._error

    def check_drained(self) -> None:
        waiter = self._writer
        if waiter is None or waiter.done():
            return
        backlog = self.backlog
        self._link.moved_out += max(0, self._last_backlog - backlog)
        self._last_backlog = backlog
        if self._has_room(self._low_water):
            waiter.set_result(None)

    def _has_room(self, low_water: int | None) -> bool:
        if low_water is not None:
            return self.backlog <= low_water
        # Not by what is unacknowledged alone: one lost packet would stop the writer until it arrived after all.
        return self._unsent() <= limits.SEND_BACKLOG_BYTES and self.backlog <= self._link.send_ahead

    # --- what a carrier knows of its streams

    def _advertised(self) -> int:
        """The offset up to which the peer was told it may send."""
        raise NotImplementedError

    def _advertise(self, limit: int) -> None:
        raise NotImplementedError

    def _unsent(self) -> int:
        """Bytes written that never left."""
        raise NotImplementedError

    def _highest_received(self) -> int:
        """The offset after the last byte seen, in order or not."""
        return self.received

    # --- ending

    def abandon(self, code: ErrorCode = ErrorCode.OK) -> None:
        """Neither side need go on: what still comes is dropped, what is queued is not sent. May be repeated."""
        if self._abandoned:
            return
        self._abandoned = True
        if self._link.error is None:
            if not (self._finished_writing and self.backlog == 0):
                self._link.reset(self.id, code)
            if not self._ended:
                self._link.stop(self.id, code)
        self._drop_buffer()
        self._give_back()

    def finish(self) -> None:
        """Its task is done with it: what still comes is dropped, the window goes back to the budget."""
        if not (self._ended and self._finished_writing):
            self.abandon()
        self._abandoned = True
        self._drop_buffer()
        self._give_back()

    @property
    def ended(self) -> bool:
        return self._ended

    def _drop_buffer(self) -> None:
        count = len(self._buffer)
        self._buffer.clear()
        if count:
            self._consume(count)

    def _give_back(self) -> None:
        if self._reserved:
            self._link.narrow(self._reserved)
            self._link.budget.release(self._reserved)
            self._reserved = 0

    # --- what the link tells

    def data_received(self, data: bytes, *, ended: bool) -> None:
        self.received += len(data)
        self._link.moved_in += len(data)
        self._ended = self._ended or ended
        if self._abandoned:
            self._consume(len(data))
            if ended:
                self._link.forget(self)
            return
        self._buffer.append(data)
        if self._ended or len(self._buffer) >= self._needed:
            self._wake_reader()

    def was_reset(self, code: int) -> None:
        missed = self._highest_received() - self.received
        if missed > 0:
            self._consume(
                missed
            )  # bytes the peer took from the connection's window and will never deliver
        self._ended = True
        self.reset_by_peer = True
        self.broken(error_from_code(code, "stream reset"))
        if self._abandoned:
            self._link.forget(self)

    def was_stopped(self, code: int) -> None:
        """The peer does not want what this side sends."""
        self._finished_writing = True
        self.reset_by_peer = True
        self.broken(error_from_code(code, "stream stopped"))

    def broken(self, error: EdgeSyncError) -> None:
        if self._error is None:
            self._error = error
        for waiter in (self._reader, self._writer):
            if waiter is not None and not waiter.done():
                waiter.set_exception(self._error)

    def link_lost(self, error: EdgeSyncError) -> None:
        self.broken(error)
        self._buffer.clear()
        if self._reserved:
            self._link.budget.release(self._reserved)
            self._reserved = 0


async def _within(waiter: "asyncio.Future[None]", seconds: float | None) -> None:
    """Await a future of ours; TimeoutError after ``seconds``. Cheaper than a task for each wait."""
    if seconds is None:
        await waiter
        return
    loop = asyncio.get_running_loop()
    handle = loop.call_later(seconds, _expire, waiter)
    try:
        await waiter
    finally:
        handle.cancel()


def _expire(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_exception(TimeoutError())
