"""One TLS connection and its streams: the carrier for networks that let no UDP through.

The same streams, windows and ends as ``edgesync.transport.link``, from the same budget, in frames of
``edgesync.transport.mux``. What differs is TCP's: a lost packet holds up all streams, and an address that changes ends
the connection. Neither who the peer is nor which carrier to choose is decided here.

Invariants: nothing is sent beyond the peer's windows or kept beyond ours; streams take turns, a frame each; what a peer
provokes and does not read is bounded. Event loop only.
"""

import asyncio
import socket
import ssl
from collections import deque
from typing import Final

from edgesync import limits
from edgesync.budget import TCP_OVERHEAD
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
from edgesync.peer.session import code_of, error_from_code, printable
from edgesync.transport import mux
from edgesync.transport.flow import Budget
from edgesync.transport.mux import CONNECTION, FrameType
from edgesync.transport.read_buffer import ReadBuffer
from edgesync.transport.streams import GrantedWindow, LinkOwner, Stream
from edgesync.transport.tls_pipe import TlsPipe, tune
from edgesync.transport.udp import Address

STREAM_WINDOW: Final = limits.MEMBER_STREAM_WINDOW_BYTES
"""What a new stream may carry before its receiver says more."""
MAX_OFFSET: Final = 2**63


class MuxStream(Stream):
    """A stream whose limits and queue this side keeps itself."""

    def __init__(self, link: "TlsLink", stream_id: int) -> None:
        super().__init__(link, stream_id, window=STREAM_WINDOW)
        self._mux = link
        self.told = STREAM_WINDOW
        """The offset up to which the peer may send."""
        self.limit = STREAM_WINDOW
        """The offset up to which we may."""
        self.sent = 0
        self.queue = ReadBuffer()
        self.ending = False
        self.said_all = False
        """END or RESET left."""
        self.heard_all = False
        self.begun = not link.is_ours(stream_id)
        """Whether the peer has heard of it; before, it would not know whose a window is."""
        self.has_place = True
        """Whether the peer lets this stream exist yet."""

    @property
    def backlog(self) -> int:
        return len(self.queue)

    def _unsent(self) -> int:
        return len(self.queue)

    def _advertised(self) -> int:
        return self.told

    def _advertise(self, limit: int) -> None:
        self.told = limit
        if not self.heard_all:
            self._mux.tell_window(self.id, limit)


class TlsLink(GrantedWindow):
    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext,
        owner: LinkOwner,
        *,
        address: Address,
        dialed: bool,
        budget: Budget,
        idle_timeout_s: float,
        door: "set[TlsLink]",
        protocols: tuple[str, ...],
        proxy: str = "",
    ) -> None:
        """The caller reserved UNPROVEN_WINDOW_BYTES; ``door`` holds the strangers, this link too until it is proven."""
        super().__init__()
        self.loop = asyncio.get_running_loop()
        self.owner = owner
        self.address = address
        self.proxy = proxy
        self.dialed = dialed
        self.budget = budget
        self.error: EdgeSyncError | None = None
        self.handshake_complete = False
        self.last_received = self.loop.time()
        self.moved_in = 0
        self.moved_out = 0
        self._protocols = protocols
        self._idle_timeout_s = idle_timeout_s
        self._door = door
        self._streams: dict[int, MuxStream] = {}
        self._draining: set[Stream] = set()
        self._ready: dict[MuxStream, None] = {}
        self._placeless: deque[MuxStream] = deque()
        self._ours = 0
        self._theirs = 0
        self._places = 1 if dialed else 0
        """Streams of ours the peer takes at a time."""
        self._allowed = 0 if dialed else 1
        self._next_id = 1 if dialed else 2
        self._last_theirs = 0
        self._answers: deque[bytes] = deque()
        self._pong: bytes | None = None
        self._windows: dict[int, int] = {}
        self._sent = 0
        self._limit = limits.UNPROVEN_WINDOW_BYTES
        self._received = 0
        self._told = limits.UNPROVEN_WINDOW_BYTES
        self._reader = mux.FrameReader()
        self._pump_soon = False
        self._raw = 0
        self._pinged_at = 0.0
        self._rtt = 0.0
        tune(sock, dead_after_s=idle_timeout_s)
        self._pipe = TlsPipe(sock, context, self, server=not dialed)
        self._idle = self.loop.call_later(idle_timeout_s, self._check_idle)
        self.loop.call_soon(self._start)

    def __repr__(self) -> str:
        return f"<TlsLink {'to' if self.dialed else 'from'} {self.address[0]}:{self.address[1]}>"

    def _start(self) -> None:
        if self.error is None:
            self._pipe.start()

    @property
    def name(self) -> str:
        return "TLS"

    @property
    def wire_bytes(self) -> int:
        return int(self._pipe.bytes_moved * TCP_OVERHEAD)

    @property
    def wire_bytes_in(self) -> int:
        return int(self._pipe.bytes_received * TCP_OVERHEAD)

    @property
    def controller_name(self) -> str:
        return self._pipe.controller_name()

    def yield_to_others(self) -> None:
        self._pipe.yield_to_others()

    @property
    def current_address(self) -> Address:
        return self.address

    @property
    def unproven(self) -> bool:
        return self in self._door

    def proven(self) -> None:
        self._door.discard(self)

    def smoothed_rtt(self) -> float:
        return self._rtt

    def peer_certificate(self) -> bytes | None:
        return self._pipe.peer_certificate()

    def allow_streams(self, count: int) -> None:
        allowed = self._theirs + count
        if allowed > self._allowed and self.error is None:
            self._allowed = allowed
            self._answer(mux.coded(FrameType.STREAMS, CONNECTION, allowed))

    # --- windows

    def _granted(self) -> int:
        return self._told

    def _grant(self, limit: int) -> None:
        self._told = limit
        self.tell_window(CONNECTION, limit)

    @property
    def send_ahead(self) -> int:
        return limits.SEND_BACKLOG_BYTES

    def tell_window(self, stream_id: int, limit: int) -> None:
        self._windows[stream_id] = limit
        self.transmit_soon()

    # --- streams

    def open_stream(self, held_back: int | None = None) -> Stream:
        """Raises EdgeSyncError: the link is over."""
        if self.error is not None:
            raise self.error
        stream = self._streams[self._next_id] = MuxStream(self, self._next_id)
        if held_back is not None:
            stream.hold_back(held_back)
        self._next_id += 2
        stream.has_place = False
        self._placeless.append(stream)
        self._seat()
        return stream

    def _seat(self) -> None:
        """Let streams of ours begin, in order, as far as the peer has places."""
        while self._placeless and self._ours < self._places:
            stream = self._placeless.popleft()
            if stream.said_all:
                continue
            stream.has_place = True
            self._ours += 1
            if stream.queue or stream.ending:
                self._ready[stream] = None
                self.transmit_soon()

    def forget(self, stream: Stream) -> None:
        stream.finish()

    def write(self, stream_id: int, data: bytes, *, end: bool) -> None:
        if self.error is not None:
            raise self.error
        stream = self._streams.get(stream_id)
        if stream is None or stream.said_all:
            return
        stream.queue.append(data)
        stream.ending = stream.ending or end
        if stream.has_place:
            self._ready[stream] = None
            self.transmit_soon()

    def reset(self, stream_id: int, code: ErrorCode) -> None:
        stream = self._streams.get(stream_id)
        if stream is None or stream.said_all:
            return
        stream.queue.clear()
        self._ready.pop(stream, None)
        stream.said_all = True
        if not stream.has_place:
            stream.heard_all = True  # the peer never heard of it
            del self._streams[stream_id]
            return
        stream.begun = True
        self._answer(mux.coded(FrameType.RESET, stream_id, code))
        self._retire(stream)

    def stop(self, stream_id: int, code: ErrorCode) -> None:
        stream = self._streams.get(stream_id)
        if stream is not None and not stream.heard_all and stream.has_place:
            self._answer(mux.coded(FrameType.STOP, stream_id, code))

    def _retire(self, stream: MuxStream) -> None:
        """Both sides said all: the stream's place is free."""
        if not (stream.said_all and stream.heard_all):
            return
        if self._streams.pop(stream.id, None) is None:
            return
        self._windows.pop(stream.id, None)
        if self.is_ours(stream.id):
            self._ours -= 1
            self._seat()
        else:
            self._theirs -= 1

    def is_ours(self, stream_id: int) -> bool:
        return bool(stream_id & 1) == self.dialed

    def starts_draining(self, stream: Stream) -> None:
        self._draining.add(stream)

    def ends_draining(self, stream: Stream) -> None:
        self._draining.discard(stream)

    # --- sending

    def _answer(self, frame: bytes) -> None:
        if len(self._answers) >= limits.MAX_MUX_ANSWERS:
            self.loop.call_soon(
                self.lost, LimitExceededError("the peer makes us answer and does not read")
            )
            return
        self._answers.append(frame)
        self.transmit_soon()

    def transmit_soon(self) -> None:
        if not self._pump_soon and self.error is None:
            self._pump_soon = True
            self.loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._pump_soon = False
        if self.error is not None or not self.handshake_complete:
            return
        while self._pipe.has_room:
            frames = self._control() or self._data()
            if not frames:
                break
            self._pipe.write(frames)
        self._pipe.flush()
        for stream in tuple(self._draining):
            stream.check_drained()

    def _control(self) -> bytes:
        out = bytearray()
        if self._pong is not None:
            out += mux.encode(FrameType.PONG, CONNECTION, self._pong)
            self._pong = None
        while self._answers and len(out) < limits.MAX_MUX_DATA_BYTES // 2:
            out += self._answers.popleft()
        for stream_id in list(self._windows)[:256]:
            stream = self._streams.get(stream_id)
            if stream is None or stream.begun:
                out += mux.window(stream_id, self._windows.pop(stream_id))
        return bytes(out)

    def _data(self) -> bytes:
        """One frame of the stream whose turn it is."""
        for stream in tuple(self._ready):
            del self._ready[stream]
            size = min(
                len(stream.queue),
                limits.MAX_MUX_DATA_BYTES,
                stream.limit - stream.sent,
                self._limit - self._sent,
            )
            if size > 0:
                stream.begun = True
                stream.sent += size
                self._sent += size
                self._ready[stream] = None
                return mux.encode(FrameType.DATA, stream.id, stream.queue.take(size))
            if not stream.queue and stream.ending and not stream.said_all:
                stream.begun = stream.said_all = True
                self._retire(stream)
                return mux.encode(FrameType.END, stream.id)
        return b""

    def _rearm(self) -> None:
        """The connection's window grew: all who have something may go on."""
        for stream in self._streams.values():
            if stream.has_place and not stream.said_all and stream.queue:
                self._ready[stream] = None
        self.transmit_soon()

    # --- what the pipe tells

    def shaken(self) -> None:
        self.handshake_complete = True
        self.last_received = self.loop.time()
        alpn = self._pipe.protocol
        if alpn not in self._protocols:
            self.close(
                ErrorCode.VERSION,
                "no common protocol",
                error=VersionMismatchError("the peer speaks none of our protocols"),
            )
            return
        self.owner.handshake_done(self, alpn)
        self.ping()

    def room(self) -> None:
        self._pump()

    def plaintext(self, data: bytes) -> None:
        if self.error is not None:
            return
        self.last_received = self.loop.time()
        self._raw += len(data)
        try:
            if self.unproven and self._raw > 2 * limits.UNPROVEN_WINDOW_BYTES:
                raise LimitExceededError("a stranger sent more than a proof needs")
            for frame in self._reader.feed(data):
                self._handle(frame)
                if self.error is not None:
                    return
        except EdgeSyncError as exc:
            self.close(code_of(exc), str(exc), error=exc)

    def _handle(self, frame: mux.Frame) -> None:
        match frame.type:
            case FrameType.DATA:
                self._got_data(frame)
            case FrameType.END:
                self._heard_all(self._known(frame)).data_received(b"", ended=True)
            case FrameType.RESET:
                stream = self._known(frame)
                if not stream.heard_all:
                    self._heard_all(stream).was_reset(frame.number)
            case FrameType.STOP:
                stopped = self._streams.get(frame.stream)
                if stopped is not None:
                    stopped.was_stopped(frame.number)
                    self.reset(frame.stream, ErrorCode.OK)
            case FrameType.WINDOW:
                self._got_window(frame)
            case FrameType.STREAMS:
                self._places = max(
                    self._places, min(frame.number, 4 * limits.MAX_REQUESTS_PER_CONNECTION)
                )
                self._seat()
            case FrameType.PING:
                self._pong = frame.payload
                self.transmit_soon()
            case FrameType.PONG:
                if self._pinged_at:
                    took = self.loop.time() - self._pinged_at
                    self._rtt = took if not self._rtt else min(took, 0.75 * self._rtt + 0.25 * took)
                    self._pinged_at = 0.0
            case FrameType.CLOSE:
                reason = printable(frame.payload[4:].decode(errors="replace"))
                # Whoever was woken by what came before reads it first: it may say more than the code.
                self.loop.call_soon(self.lost, error_from_code(frame.number, reason))

    def _got_data(self, frame: mux.Frame) -> None:
        stream = self._known(frame)
        if stream.heard_all:
            raise UnexpectedMessageError("bytes came on a stream after its end")
        size = len(frame.payload)
        self._received += size
        if self._received > self._told or stream.received + size > stream.told:
            raise LimitExceededError("more was sent than was granted")
        stream.data_received(frame.payload, ended=False)

    def _got_window(self, frame: mux.Frame) -> None:
        offset = min(frame.number, MAX_OFFSET)
        if frame.stream == CONNECTION:
            if offset > self._limit:
                self._limit = offset
                self._rearm()
            return
        stream = self._streams.get(frame.stream)
        if stream is not None and offset > stream.limit:
            stream.limit = offset
            if stream.has_place and (stream.queue or stream.ending) and not stream.said_all:
                self._ready[stream] = None
                self.transmit_soon()

    def _heard_all(self, stream: MuxStream) -> MuxStream:
        if stream.heard_all:
            raise UnexpectedMessageError("a stream was ended twice")
        stream.heard_all = True
        self._retire(stream)
        return stream

    def _known(self, frame: mux.Frame) -> MuxStream:
        """The stream of a frame; the peer's first frame opens it."""
        stream = self._streams.get(frame.stream)
        if stream is not None and stream.has_place:
            return stream
        if self.is_ours(frame.stream) or frame.stream <= self._last_theirs:
            raise UnexpectedMessageError("a frame came on a stream that is over or never was")
        if self._theirs >= self._allowed:
            raise LimitExceededError("more streams were opened than were granted")
        self._last_theirs = frame.stream
        self._theirs += 1
        stream = self._streams[frame.stream] = MuxStream(self, frame.stream)
        self.owner.stream_opened(self, stream)
        return stream

    # --- the end

    def ping(self) -> None:
        if self.error is None and self.handshake_complete:
            if not self._pinged_at:
                self._pinged_at = self.loop.time()
                self._answer(mux.encode(FrameType.PING, CONNECTION, bytes(8)))
            self.transmit_soon()

    def _check_idle(self) -> None:
        left = self.last_received + self._idle_timeout_s - self.loop.time()
        if left <= 0:
            self.lost(PeerTimeoutError("the peer fell silent"))
        else:
            self._idle = self.loop.call_later(left, self._check_idle)

    def broke(self, reason: str, *, unheard: bool) -> None:
        if self.handshake_complete:
            self.lost(TransportError(f"the TLS connection broke: {reason}"))
        elif unheard and self.dialed:
            # Refusing a stranger costs a gateway no handshake: it closes.
            self.lost(
                PeerBusyError(f"TCP was closed before TLS began: {reason}", retry_after_s=0.1)
            )
        elif self.dialed:
            self.lost(PeerUnreachableError(f"no TLS with that address: {reason}"))
        else:
            self.lost(ProtocolError(f"the TLS handshake failed: {reason}"))

    def close(
        self, code: ErrorCode, reason: str = "", *, error: EdgeSyncError | None = None
    ) -> None:
        """Tell the peer once and forget the connection; ``error`` is what this side's callers see."""
        if self.error is not None:
            return
        if self.handshake_complete:
            self._pump()
            if not self._pipe.closed:
                self._pipe.write(mux.close(code, reason))
                self._pipe.finish()
        self.lost(error or TransportError("the connection was closed by this machine"))

    def lost(self, error: EdgeSyncError) -> None:
        if self.error is not None:
            return
        self.error = error
        self._idle.cancel()
        self._pipe.abort()
        for stream in tuple(self._streams.values()):
            stream.link_lost(error)
        self._streams.clear()
        self._ready.clear()
        self._placeless.clear()
        self._draining.clear()
        self.proven()
        self.budget.release(self._base)
        self.owner.link_closed(self, error)
