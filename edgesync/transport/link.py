"""One QUIC connection and its streams: back-pressure both ways, deadlines that follow progress, one error for all.

``Link`` drives a ``BoundedQuicConnection``: the switchboard feeds it datagrams, it hands streams and the end to its
owner. ``Stream`` is what sessions see: frames and bodies in, bytes out. Neither knows who the peer is.

Invariants: a peer's window grows only by what was consumed here; every granted window is reserved in the budget; every
wait on a stream ends, by data, by the peer, by the stall timeout or with the link. Event loop only.
"""

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Protocol

from aioquic.quic import events
from aioquic.quic.packet import QuicErrorCode
from aioquic.quic.stream import QuicStream

from edgesync import limits
from edgesync.errors import (
    EdgeSyncError,
    ErrorCode,
    LimitExceededError,
    PeerBusyError,
    PeerTimeoutError,
    PeerUnreachableError,
    ProtocolError,
    TransportError,
    UnexpectedMessageError,
    VersionMismatchError,
)
from edgesync.peer.session import error_from_code, printable
from edgesync.transport.flow import Budget
from edgesync.transport.quic import BoundedQuicConnection
from edgesync.transport.read_buffer import ReadBuffer
from edgesync.transport.udp import Address
from edgesync.transport.window import WindowTuner
from edgesync.wire import codec
from edgesync.wire.messages import Message

if TYPE_CHECKING:
    from edgesync.transport.switchboard import Switchboard

log = logging.getLogger(__name__)

MIN_TIMER_S: Final = 0.001
PROMPT_ACK_PACKETS: Final = 8
"""Packets that are acknowledged at once; fewer wait for the delay an ACK may have."""
MAX_ACK_THINNING: Final = 4
"""With so many links, or more, at a time each acknowledges that much more rarely."""
SHORT_PATH_RTT_S: Final = 0.005
"""Below, what limits a transfer is the receiver's socket, and windows are capped."""
MAX_BURSTS: Final = 8
"""Calls to the engine before the loop looks at what arrived."""
_NO_APPLICATION_PROTOCOL: Final = QuicErrorCode.CRYPTO_ERROR + 120


class LinkOwner(Protocol):
    """What a link tells; each call returns at once."""

    def handshake_done(self, link: "Link", alpn: str) -> None: ...
    def stream_opened(self, link: "Link", stream: "Stream") -> None: ...
    def link_closed(self, link: "Link", error: EdgeSyncError) -> None: ...


class Stream:
    """A bidirectional stream. One reader and one writer at a time."""

    def __init__(self, link: "Link", stream_id: int, quic_stream: QuicStream) -> None:
        self.id = stream_id
        self.received = 0
        """Bytes delivered in order so far, read or not."""
        self._link = link
        self._quic_stream = quic_stream
        self._window = quic_stream.max_stream_data_local
        self._ceiling: int | None = None
        self._reserved = 0
        self.follows_path = False
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

    def follow_path(self) -> None:
        """Grow the window with what the path carries, as far as the budget has room; ``grant`` was the least."""
        self.follows_path = True
        self.widen_to(self._link.first_answer_window())

    def hold_back(self, window: int | None) -> None:
        """Let the peer be no more than ``window`` bytes ahead, whatever was granted; None: as granted."""
        self._ceiling = window
        self._raise_limit()

    def widen_to(self, window: int) -> None:
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
        while len(self._buffer) < count:
            if self._error is not None:
                raise self._error
            if self._ended:
                return
            before = self.received
            self._needed = count
            self._reader = self._link.loop.create_future()
            try:
                await _within(self._reader, stall_s)
            except TimeoutError:
                if self.received == before:
                    raise PeerTimeoutError(f"the peer sent nothing for {stall_s:g} s") from None
            finally:
                self._reader = None

    def _consume(self, count: int) -> None:
        self._consumed += count
        self._raise_limit()
        self._link.consumed(count)

    def _raise_limit(self) -> None:
        window = self._window if self._ceiling is None else min(self._window, self._ceiling)
        limit = self._consumed + window
        if limit - self._quic_stream.max_stream_data_local >= window // 4:
            self._quic_stream.max_stream_data_local = limit
            self._link.transmit_soon()

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
        """Bytes written and not acknowledged."""
        sender = self._quic_stream.sender
        return sender._buffer_stop - sender._buffer_start  # noqa: SLF001

    async def drain(
        self,
        *,
        low_water: int | None = None,
        stall_s: float = limits.STALL_TIMEOUT_S,
    ) -> None:
        """Wait until at most ``low_water`` bytes are unacknowledged; None: until there is room for another piece.

        Raises PeerTimeoutError: nothing moved.
        """
        while not self._has_room(low_water):
            if self._error is not None:
                raise self._error
            if self._writer is not None:
                await _within(asyncio.shield(self._writer), stall_s)
                continue
            before = self.backlog
            self._low_water = low_water
            self._writer = self._link.loop.create_future()
            self._link.starts_draining(self)
            try:
                await _within(self._writer, stall_s)
            except TimeoutError:
                if self.backlog >= before:
                    raise PeerTimeoutError(f"the peer accepted nothing for {stall_s:g} s") from None
            finally:
                if self._writer is not None and not self._writer.done():
                    self._writer.cancel()
                self._writer = None
                self._link.ends_draining(self)
        if self._error is not None:
            raise self._error

    def check_drained(self) -> None:
        waiter = self._writer
        if waiter is None or waiter.done():
            return
        if self._has_room(self._low_water):
            waiter.set_result(None)

    def _has_room(self, low_water: int | None) -> bool:
        if low_water is not None:
            return self.backlog <= low_water
        # Not by what is unacknowledged alone: one lost packet would stop the writer until it arrived after all.
        sender = self._quic_stream.sender
        unsent = sender._buffer_stop - sender.highest_offset  # noqa: SLF001
        return unsent <= limits.SEND_BACKLOG_BYTES and self.backlog <= self._link.send_ahead

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
        missed = self._quic_stream.receiver.highest_offset - self.received
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


class Link:
    def __init__(
        self,
        quic: BoundedQuicConnection,
        switchboard: "Switchboard",
        owner: LinkOwner,
        *,
        address: Address,
        dialed: bool,
        budget: Budget,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.quic = quic
        self.owner = owner
        self.address = address
        """Where the connection started; ``current_address`` follows the peer."""
        self.dialed = dialed
        self.budget = budget
        self.error: EdgeSyncError | None = None
        self.handshake_complete = False
        self.draining: set[Stream] = set()
        self.last_received = self.loop.time()
        self._switchboard = switchboard
        self._streams: dict[int, Stream] = {}
        self._consumed = 0
        self._tuner = WindowTuner()
        self._window_cap = 0
        self._window = limits.UNPROVEN_WINDOW_BYTES
        self._base = limits.UNPROVEN_WINDOW_BYTES
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self.connection_ids: set[bytes] = set()

    def __repr__(self) -> str:
        return f"<Link {'to' if self.dialed else 'from'} {self.address[0]}:{self.address[1]}>"

    @property
    def current_address(self) -> Address:
        if self.error is not None:
            return self.address
        return self.quic.get_peer_address() or self.address

    @property
    def busy(self) -> bool:
        """Whether any stream besides the control stream is open."""
        return len(self._streams) > 1

    @property
    def open_streams(self) -> int:
        return len(self._streams)

    # --- windows

    def set_base_window(self, window: int) -> None:
        """Unread bytes allowed besides granted answers; the caller reserved the difference."""
        self._window += window - self._base
        self._base = window
        self.consumed(0)

    def first_answer_window(self) -> int:
        """How far ahead of its reader a new answer on this path should be."""
        return self._tuner.begin(rtt=self.quic.smoothed_rtt())

    @property
    def send_ahead(self) -> int:
        """Bytes a writer may have sent and not seen acknowledged."""
        share = limits.TOTAL_SEND_AHEAD_BYTES // max(1, len(self._switchboard.sending))
        return max(limits.SEND_BACKLOG_BYTES, min(limits.MAX_SEND_AHEAD_BYTES, share))

    def starts_draining(self, stream: Stream) -> None:
        self.draining.add(stream)
        sending = self._switchboard.sending
        sending[self] = None
        share = max(limits.LAN_WINDOW_BYTES // len(sending), limits.MIN_LAN_WINDOW_BYTES)
        self._cap_window(share if self.quic.min_rtt() < SHORT_PATH_RTT_S else 0)

    def _cap_window(self, size: int) -> None:
        if size != self._window_cap:
            self._window_cap = size
            self.quic.controller.set_window_cap(size)

    def ends_draining(self, stream: Stream) -> None:
        self.draining.discard(stream)
        if not self.draining:
            self._switchboard.sending.pop(self, None)

    @property
    def base_window(self) -> int:
        return self._base

    def widen(self, by: int) -> None:
        self._window += by
        self.consumed(0)

    def narrow(self, by: int) -> None:
        self._window -= by

    def consumed(self, count: int) -> None:
        self._consumed += count
        if self.error is not None:
            return
        if count and self._tuner.consumed(
            count, now=self.loop.time(), rtt=self.quic.smoothed_rtt()
        ):
            for stream in self._streams.values():
                if stream.follows_path:
                    stream.widen_to(self._tuner.window)
        limit = self._consumed + self._window
        if limit - self.quic.connection_limit() >= self._window // 4:
            self.quic.set_connection_limit(limit)
            self.transmit_soon()

    # --- streams

    def open_stream(self) -> Stream:
        """Raises EdgeSyncError: the link is over."""
        if self.error is not None:
            raise self.error
        stream_id, quic_stream = self.quic.open_stream()
        stream = self._streams[stream_id] = Stream(self, stream_id, quic_stream)
        return stream

    def forget(self, stream: Stream) -> None:
        """The stream's task is done with it; it stays known until nothing more can arrive on it."""
        stream.finish()
        if stream.ended or self.error is not None:
            self._streams.pop(stream.id, None)

    def write(self, stream_id: int, data: bytes, *, end: bool) -> None:
        if self.error is not None:
            raise self.error
        self.quic.send_stream_data(stream_id, data, end_stream=end)
        self.transmit_soon()

    def reset(self, stream_id: int, code: ErrorCode) -> None:
        self.quic.reset_stream(stream_id, code)
        self.transmit_soon()

    def stop(self, stream_id: int, code: ErrorCode) -> None:
        if self.quic.stream(stream_id) is not None:
            self.quic.stop_stream(stream_id, code)
            self.transmit_soon()

    # --- datagrams

    def datagrams_received(self, datagrams: Sequence[bytes], address: Address, now: float) -> None:
        if self.quic.closing():
            return
        self.last_received = now
        self.quic.receive_datagrams(datagrams, address, now)

    def transmit_soon(self) -> None:
        self._switchboard.mark(self)

    def settle(self, now: float, batch_links: int = 1) -> None:
        """After a batch: act on what arrived. Sending follows, once the tasks this wakes have run.

        Where datagrams of ``batch_links`` links came together, each acknowledges less often.
        """
        if self.error is not None:
            return
        crowd = min(batch_links, MAX_ACK_THINNING)
        self.quic.acknowledge_soon(now, PROMPT_ACK_PACKETS * crowd)
        self._process_events()
        self._wake_writers()

    def _wake_writers(self) -> None:
        for stream in tuple(self.draining):
            stream.check_drained()

    def transmit(self, now: float) -> None:
        if self.error is not None:
            return
        for _ in range(MAX_BURSTS):
            datagrams = self.quic.datagrams_to_send(now)
            if not datagrams:
                break
            trouble = self._switchboard.send(datagrams)
            if trouble is not None and not self.handshake_complete and self.dialed:
                self.lost(
                    PeerUnreachableError(f"the address cannot be reached: {trouble.strerror}")
                )
                return
            if self.quic.closing() or self._switchboard.socket.blocked:
                break
            now = self.loop.time()
        else:
            self.transmit_soon()  # what came in meanwhile goes first
        self._wake_writers()
        if self.quic.closing():
            self._closed_by_quic()
            return
        self._arm(now)

    def _arm(self, now: float) -> None:
        at = self.quic.get_timer()
        if at is None:
            return
        at = max(at, now + MIN_TIMER_S)
        if self._timer is not None:
            if self._timer_at <= at:
                return  # the earlier one looks again when it fires
            self._timer.cancel()
        self._timer = self.loop.call_at(at, self._on_timer)
        self._timer_at = at

    def _on_timer(self) -> None:
        self._timer = None
        if self.error is not None:
            return
        now = self.loop.time()
        at = self.quic.get_timer()
        if at is not None and at <= now:
            self.quic.handle_timer(now)
            self._process_events()
            if self.error is not None:
                return
        self.transmit(now)

    def _process_events(self) -> None:
        while self.error is None and (event := self.quic.next_event()) is not None:
            match event:
                case events.StreamDataReceived():
                    self._stream(event.stream_id).data_received(event.data, ended=event.end_stream)
                case events.StreamReset():
                    self._stream(event.stream_id).was_reset(event.error_code)
                case events.StopSendingReceived():
                    stream = self._streams.get(event.stream_id)
                    if stream is not None:
                        stream.was_stopped(event.error_code)
                case events.HandshakeCompleted():
                    self.handshake_complete = True
                    self.owner.handshake_done(self, event.alpn_protocol or "")
                case events.ConnectionIdIssued():
                    self._switchboard.route(event.connection_id, self)
                case events.ConnectionIdRetired():
                    self._switchboard.unroute(event.connection_id, self)
                case events.ConnectionTerminated():
                    self.lost(self._error_of(event))
                case _:
                    pass

    def _stream(self, stream_id: int) -> Stream:
        stream = self._streams.get(stream_id)
        if stream is None:
            quic_stream = self.quic.stream(stream_id) or QuicStream(stream_id=stream_id)
            stream = Stream(self, stream_id, quic_stream)
            if bool(stream_id & 1) == self.dialed:
                self._streams[stream_id] = stream
                self.owner.stream_opened(self, stream)
            else:
                stream.abandon()  # late bytes of a stream this side is done with
        return stream

    # --- the end

    def ping(self) -> None:
        if self.error is None:
            self.quic.send_ping(0)
            self.transmit_soon()

    def close(
        self, code: ErrorCode, reason: str = "", *, error: EdgeSyncError | None = None
    ) -> None:
        """Tell the peer once and forget the connection; ``error`` is what this side's callers see."""
        if self.error is not None:
            return
        if not self.quic.closing():
            self.quic.close(error_code=code, reason_phrase=reason[:200])
        self._switchboard.send(self.quic.datagrams_to_send(self.loop.time()))
        self.lost(error or TransportError("the connection was closed by this machine"))

    def _closed_by_quic(self) -> None:
        event = self.quic.close_event()
        assert event is not None
        self._process_events()  # what came before the close still counts
        self.lost(self._error_of(event))

    def lost(self, error: EdgeSyncError) -> None:
        """The connection is over, for whatever reason; nothing is sent any more."""
        if self.error is not None:
            return
        self.error = error
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for stream in tuple(self._streams.values()):
            stream.link_lost(error)
        self._streams.clear()
        self.draining.clear()
        self._switchboard.remove(self)
        self.owner.link_closed(self, error)
        self.quic.discard()

    def _error_of(self, event: events.ConnectionTerminated) -> EdgeSyncError:
        reason = printable(event.reason_phrase)
        if event.frame_type is None:
            return error_from_code(event.error_code, reason)
        match event.error_code:
            case QuicErrorCode.CONNECTION_REFUSED:
                return PeerBusyError("the peer takes no more strangers now", retry_after_s=0.1)
            case QuicErrorCode.INTERNAL_ERROR if reason == "Idle timeout":
                return PeerTimeoutError("the peer fell silent")
            case QuicErrorCode.NO_VIABLE_PATH:
                return PeerTimeoutError("the peer's new address never answered")
            case QuicErrorCode.FLOW_CONTROL_ERROR | QuicErrorCode.STREAM_LIMIT_ERROR:
                return LimitExceededError(f"more was sent than was granted: {reason}")
            case QuicErrorCode.CRYPTO_BUFFER_EXCEEDED:
                return LimitExceededError("more TLS bytes were sent than a handshake needs")
            case QuicErrorCode.APPLICATION_ERROR | QuicErrorCode.NO_ERROR:
                return TransportError("the peer closed the connection during the handshake")
            case code if code == _NO_APPLICATION_PROTOCOL:
                return VersionMismatchError("the peer speaks none of our protocols")
            case code:
                return ProtocolError(f"the QUIC connection broke (code {code:#x}): {reason}")
