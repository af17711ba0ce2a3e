"""One QUIC connection and its streams: back-pressure both ways, deadlines that follow progress, one error for all.

``Link`` drives a ``BoundedQuicConnection``: the switchboard feeds it datagrams, it hands streams and the end to its
owner (``edgesync.transport.streams``). It does not know who the peer is.

Event loop only.
"""

import asyncio
import errno
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from aioquic.quic import events
from aioquic.quic.packet import QuicErrorCode
from aioquic.quic.stream import QuicStream

from edgesync import limits
from edgesync.budget import IP_HEADERS_BYTES
from edgesync.errors import (
    EdgeSyncError,
    ErrorCode,
    LimitExceededError,
    PeerBusyError,
    PeerTimeoutError,
    PeerUnreachableError,
    ProtocolError,
    TransportError,
    VersionMismatchError,
)
from edgesync.peer.session import error_from_code, printable
from edgesync.transport.congestion.choice import PathController
from edgesync.transport.flow import Budget
from edgesync.transport.interfaces import Way, source_towards
from edgesync.transport.pmtud import BASE_BYTES
from edgesync.transport.quic import BoundedQuicConnection
from edgesync.transport.streams import GrantedWindow, LinkOwner, Stream
from edgesync.transport.udp import Address

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
LOOK_S: Final = 10.0
"""How long what the interfaces say of a path holds while nothing says otherwise."""
MAX_BURSTS: Final = 8
"""Calls to the engine before the loop looks at what arrived."""
_NO_APPLICATION_PROTOCOL: Final = QuicErrorCode.CRYPTO_ERROR + 120


class QuicLinkStream(Stream):
    """A stream whose limits and queues aioquic keeps."""

    def __init__(self, link: "Link", stream_id: int, quic_stream: QuicStream) -> None:
        super().__init__(link, stream_id, window=quic_stream.max_stream_data_local)
        self._quic_stream = quic_stream

    @property
    def backlog(self) -> int:
        sender = self._quic_stream.sender
        return sender._buffer_stop - sender._buffer_start  # noqa: SLF001

    def _unsent(self) -> int:
        sender = self._quic_stream.sender
        return sender._buffer_stop - sender.highest_offset  # noqa: SLF001

    def _advertised(self) -> int:
        return self._quic_stream.max_stream_data_local

    def _advertise(self, limit: int) -> None:
        self._quic_stream.max_stream_data_local = limit
        self._link.transmit_soon()

    def _highest_received(self) -> int:
        return self._quic_stream.receiver.highest_offset


class Link(GrantedWindow):
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
        super().__init__()
        self.loop = asyncio.get_running_loop()
        self.quic = quic
        self.owner = owner
        self.address = address
        self.proxy = ""
        """Where the connection started; ``current_address`` follows the peer."""
        self.dialed = dialed
        self.budget = budget
        self.error: EdgeSyncError | None = None
        self.handshake_complete = False
        self.draining: set[Stream] = set()
        self.last_received = self.loop.time()
        self.wire_bytes_in = 0
        """With the headers below QUIC."""
        self._wire_bytes_out = 0
        self.moved_in = 0
        self.moved_out = 0
        self._switchboard = switchboard
        self._streams: dict[int, Stream] = {}
        self._window_cap = 0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self.connection_ids: set[bytes] = set()
        self._source = ""
        self._look_at = 0.0
        quic.probe_done = self._probe_done
        quic.path_moved = self._path_moved
        self._look_at_path(self.loop.time())

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

    # --- what the endpoint asks of any carrier

    @property
    def name(self) -> str:
        return "QUIC"

    @property
    def wire_bytes(self) -> int:
        return self.wire_bytes_in + self._wire_bytes_out

    @property
    def controller_name(self) -> str:
        return self.quic.controller.status().name

    def yield_to_others(self) -> None:
        controller = self.quic.controller
        if isinstance(controller, PathController) and controller.may_choose:
            controller.choose("background", self.loop.time())

    @property
    def unproven(self) -> bool:
        return self._switchboard.is_unproven(self)

    def proven(self) -> None:
        self._switchboard.proven(self)

    def smoothed_rtt(self) -> float:
        return self.quic.smoothed_rtt()

    def peer_certificate(self) -> bytes | None:
        return self.quic.peer_certificate()

    def allow_streams(self, count: int) -> None:
        self.quic.allow_streams(count)
        self.transmit_soon()

    # --- windows

    def _granted(self) -> int:
        return self.quic.connection_limit()

    def _grant(self, limit: int) -> None:
        self.quic.set_connection_limit(limit)
        self.transmit_soon()

    @property
    def send_ahead(self) -> int:
        """Bytes a writer may have sent and not seen acknowledged."""
        share = limits.TOTAL_SEND_AHEAD_BYTES // max(1, len(self._switchboard.sending))
        return max(limits.SEND_BACKLOG_BYTES, min(limits.MAX_SEND_AHEAD_BYTES, share))

    def starts_draining(self, stream: Stream) -> None:
        if not self.draining:
            self._want_size()
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

    # --- the path

    @property
    def datagram_size(self) -> int:
        """UDP payload of full datagrams, in bytes."""
        return self.quic.datagram_size

    def _look_at_path(self, now: float) -> Way | None:
        """What the interfaces say of it: near or far, and from where packets leave."""
        self._look_at = now + LOOK_S
        way = self._switchboard.interfaces.way(self.current_address or self.address, now)
        if way is not None:
            self._source = way.source
            controller = self.quic.controller
            if isinstance(controller, PathController):
                controller.set_near(way.near, now)
        return way

    def _want_size(self) -> None:
        """A transfer begins: find out, if it is not known, how long its datagrams may be."""
        now = self.loop.time()
        if now >= self._look_at or self.quic.mtu.ceiling == BASE_BYTES:
            way = self._look_at_path(now)
            if way is not None:
                self.quic.mtu.begin(way.payload, now)
        self._search_size(now)

    def _search_size(self, now: float) -> None:
        size = self.quic.mtu.next_probe(now)
        if size is not None:
            self.quic.send_probe(size)
            self.transmit_soon()

    def _probe_done(self, size: int, arrived: bool) -> None:
        self.quic.mtu.probed(size, arrived, self.loop.time())

    def _follow_size(self) -> None:
        if self.quic.mtu.size != self.quic.datagram_size:
            log.debug("%r: datagrams of %d bytes from now on", self, self.quic.mtu.size)
            self.quic.set_datagram_size(self.quic.mtu.size)
            self.transmit_soon()

    def _path_moved(self) -> None:
        self._switchboard.interfaces.forget()
        self._look_at_path(self.loop.time())
        if self.draining:
            self._want_size()

    def check_source(self) -> None:
        """Tell the peer at once where packets come from now, if that changed.

        A peer that only receives would say nothing, and what is sent to it would go to where it was.
        """
        if self.error is not None or not self.handshake_complete:
            return
        source = source_towards(self.current_address)
        if source is None or source == self._source:
            return
        log.info("%r: this machine's address is %s now, it was %s", self, source, self._source)
        self._source = source
        self.quic.path_changed(self.loop.time())
        self.ping()

    # --- streams

    def open_stream(self, held_back: int | None = None) -> Stream:
        """Raises EdgeSyncError: the link is over."""
        if self.error is not None:
            raise self.error
        stream_id, quic_stream = self.quic.open_stream()
        stream = self._streams[stream_id] = QuicLinkStream(self, stream_id, quic_stream)
        stream.begin(limits.MEMBER_STREAM_WINDOW_BYTES, held_back)
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
        self.wire_bytes_in += sum(map(len, datagrams)) + IP_HEADERS_BYTES * len(datagrams)
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
        if self.error is None:
            self._follow_size()
            if self.draining:
                self._search_size(now)
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
            self._wire_bytes_out += sum(len(data) + IP_HEADERS_BYTES for data, _to in datagrams)
            trouble = self._switchboard.send(datagrams)
            if trouble is not None and not self.handshake_complete and self.dialed:
                self.lost(
                    PeerUnreachableError(f"the address cannot be reached: {trouble.strerror}")
                )
                return
            if trouble is not None and trouble.errno == errno.EMSGSIZE:
                self.quic.mtu.refused(max(len(data) for data, _ in datagrams), now)
                self._follow_size()
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
            self.quic.mtu.timeouts(self.quic.timeouts(), now)
            self._follow_size()
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
            stream = QuicLinkStream(self, stream_id, quic_stream)
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
