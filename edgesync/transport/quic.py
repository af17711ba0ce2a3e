"""aioquic with our limits: the only module that leans on its private names.

Stock aioquic 1.7 doubles its flow-control windows as bytes arrive, buffers gaps densely and lets a peer park 512 KiB in
each crypto stream, all before anybody is authenticated. ``BoundedQuicConnection`` grants windows only when it is told
to (``Stream.grant`` through ``set_stream_limit`` and ``set_connection_limit``), keeps only bytes that arrived, and caps
TLS bytes. It does no I/O and knows nothing of sessions. ``edgesync.transport.link`` drives it.
"""

import logging
import random
import ssl
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

from aioquic._crypto import CryptoError
from aioquic.buffer import UINT_VAR_MAX_SIZE, Buffer, BufferReadError  # type: ignore[attr-defined]
from aioquic.quic import events
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import (
    CONNECTION_LIMIT_FRAME_CAPACITY,
    MAX_STREAM_DATA_FRAME_CAPACITY,
    QuicConnection,
    QuicConnectionError,
    QuicConnectionState,
    QuicReceiveContext,
)
from aioquic.quic.crypto import CryptoPair
from aioquic.quic.packet import QuicErrorCode, QuicFrameType, QuicStreamFrame
from aioquic.quic.packet_builder import QuicPacketBuilder
from aioquic.quic.recovery import MAX_ACK_RANGES, QuicPacketSpace
from aioquic.quic.stream import (
    FinalSizeError,
    QuicStream,
    QuicStreamReceiver,
    StreamFinishedError,
)
from aioquic.tls import Epoch
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from edgesync import limits
from edgesync.transport import ciphers
from edgesync.transport.congestion.base import CongestionController
from edgesync.transport.congestion.choice import create_controller
from edgesync.transport.pmtud import BASE_BYTES, PathMtu
from edgesync.wire.messages import ALPN, ALPN_JOIN

DATAGRAM_BYTES: Final = BASE_BYTES
CONNECTION_ID_BYTES: Final = 8
DEFAULT_CONTROLLER: Final = "auto"
"""Until the path's class is known."""

logging.getLogger("quic").setLevel(
    logging.ERROR
)  # it warns of each bad packet: strangers would write our log

_SHORT_HEADER_BYTES: Final = 1 + CONNECTION_ID_BYTES
_IDLE_GRAIN_S: Final = 0.01
"""The idle timeout may be this much too early: it need not be computed anew for each packet."""
_FREE_GAPS: Final = 64
_BYTES_PER_GAP: Final = 256
_MERGE_BYTES: Final = 4096


def client_configuration(*, alpn: str, idle_timeout_s: float) -> QuicConfiguration:
    """A dialler's settings. The server's certificate is judged by the caller: TLS only proves that it holds the key."""
    return QuicConfiguration(
        is_client=True,
        alpn_protocols=[alpn],
        connection_id_length=CONNECTION_ID_BYTES,
        idle_timeout=idle_timeout_s,
        max_datagram_size=DATAGRAM_BYTES,
        max_data=limits.UNPROVEN_WINDOW_BYTES,
        max_stream_data=limits.UNPROVEN_WINDOW_BYTES,
        verify_mode=ssl.CERT_NONE,
        cipher_suites=ciphers.offered(),
    )


def server_configuration(
    *,
    certificate: x509.Certificate,
    private_key: Ed25519PrivateKey,
    idle_timeout_s: float,
    joins: bool,
) -> QuicConfiguration:
    return QuicConfiguration(
        is_client=False,
        alpn_protocols=[ALPN, ALPN_JOIN] if joins else [ALPN],
        connection_id_length=CONNECTION_ID_BYTES,
        idle_timeout=idle_timeout_s,
        max_datagram_size=DATAGRAM_BYTES,
        max_data=limits.UNPROVEN_WINDOW_BYTES,
        max_stream_data=limits.UNPROVEN_WINDOW_BYTES,
        cipher_suites=ciphers.preferred(),
        certificate=certificate,
        private_key=private_key,
    )


class SparseReceiver(QuicStreamReceiver):
    """Reassembly that holds the bytes that arrived and nothing for the gaps between them.

    Runs are kept in order without overlap; small neighbours are joined. More gaps than ``_FREE_GAPS`` plus one per
    ``_BYTES_PER_GAP`` bytes held is a peer that shreds its stream to make us keep books.
    """

    def __init__(self, stream_id: int | None, readable: bool) -> None:
        super().__init__(stream_id=stream_id, readable=readable)
        self._starts: list[int] = []
        self._runs: dict[int, bytes] = {}
        self.held = 0
        """Bytes that wait for a gap to close."""

    def handle_frame(self, frame: QuicStreamFrame) -> events.StreamDataReceived | None:
        data = frame.data
        start = frame.offset
        end = start + len(data)
        if self._final_size is not None:
            if end > self._final_size:
                raise FinalSizeError("Data received beyond final size")
            if frame.fin and end != self._final_size:
                raise FinalSizeError("Cannot change final size")
        if frame.fin:
            if end < self.highest_offset:
                raise FinalSizeError("Data received beyond final size")
            self._final_size = end
        self.highest_offset = max(self.highest_offset, end)
        if self.is_finished:
            return None
        if start != self._buffer_start or self._starts:
            if start > self._buffer_start:
                self._keep(start, data)
                data = b""
            else:
                data = self._drain(data[self._buffer_start - start :])
        self._buffer_start += len(data)
        ended = self._buffer_start == self._final_size
        if ended:
            self.is_finished = True
        if data or ended:
            return events.StreamDataReceived(
                data=data, end_stream=ended, stream_id=cast("int", self._stream_id)
            )
        return None

    def _drain(self, data: bytes) -> bytes:
        """``data`` begins at the front; what it and the runs it reaches deliver together."""
        end = self._buffer_start + len(data)
        parts = [data] if data else []
        while self._starts and self._starts[0] <= end:
            start = self._starts.pop(0)
            run = self._runs.pop(start)
            self.held -= len(run)
            if start + len(run) > end:
                parts.append(run[end - start :])
                end = start + len(run)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _keep(self, start: int, data: bytes) -> None:
        """Hold the bytes of ``data`` that are not held yet."""
        index = bisect_right(self._starts, start)
        if index:
            before = self._starts[index - 1]
            covered = before + len(self._runs[before]) - start
            if covered > 0:
                data = data[covered:]
                start += covered
        while data:
            following = self._starts[index] if index < len(self._starts) else None
            room = len(data) if following is None else following - start
            part = data[:room]
            if part:
                index = self._insert(index, start, part)
            if following is None or room >= len(data):
                break
            skip = following + len(self._runs[following]) - start
            data = data[skip:]
            start += skip
            index += 1
        if len(self._starts) > _FREE_GAPS + self.held // _BYTES_PER_GAP:
            raise QuicConnectionError(
                error_code=QuicErrorCode.PROTOCOL_VIOLATION,
                frame_type=QuicFrameType.STREAM_BASE,
                reason_phrase="too many gaps in a stream",
            )

    def _insert(self, index: int, start: int, part: bytes) -> int:
        """Put a run that overlaps none before position ``index``; the index after it."""
        self.held += len(part)
        if index:
            before = self._starts[index - 1]
            run = self._runs[before]
            if before + len(run) == start and len(run) < _MERGE_BYTES:
                self._runs[before] = run + part
                return index
        self._starts.insert(index, start)
        self._runs[start] = part
        return index + 1


class _Streams(dict[int, QuicStream]):
    """Gives every stream, on whatever path aioquic creates it, the sparse receiver."""

    def __setitem__(self, stream_id: int, stream: QuicStream) -> None:
        if type(stream.receiver) is QuicStreamReceiver:
            stream.receiver = SparseReceiver(stream_id, not stream.receiver.is_finished)
        super().__setitem__(stream_id, stream)


class BoundedQuicConnection(QuicConnection):
    """A connection whose peer may send what it was granted, and open as many streams as it was granted."""

    def __init__(
        self, *, peer_streams: int, congestion: str = DEFAULT_CONTROLLER, **kwargs: Any
    ) -> None:
        """``congestion``: one of ``controller_names.SETTINGS``."""
        super().__init__(**kwargs)
        self.mtu = PathMtu()
        """How long datagrams may be on the path; the link acts on it."""
        self._probes: list[int] = []
        """Sizes of datagrams that were asked for with ``send_probe``."""
        self._streams = _Streams()
        # Only this much of an answer may come before the link has said how much it wants: it says so with the question.
        self._local_max_stream_data_bidi_local = limits.UNASKED_ANSWER_BYTES
        for limit, value in (
            (self._local_max_streams_bidi, peer_streams),
            (self._local_max_streams_uni, 0),
        ):
            limit.value = limit.sent = value
        self.use_controller(
            create_controller(
                congestion,
                max_datagram_size=self._max_datagram_size,
                rng=random.Random(),  # noqa: S311 - spreads flows, hides nothing
            )
        )

    # --- what the link asks for

    def connection_limit(self) -> int:
        return self._local_max_data.value

    def set_connection_limit(self, limit: int) -> None:
        """Highest sum of stream offsets the peer may reach; it never falls."""
        self._local_max_data.value = max(self._local_max_data.value, limit)

    def allow_streams(self, count: int) -> None:
        """How many bidirectional streams the peer may have open at a time."""
        limit = self._local_max_streams_bidi
        limit.value = max(limit.value, limit.used + count)

    def stream(self, stream_id: int) -> QuicStream | None:
        return self._streams.get(stream_id)

    def open_stream(self) -> tuple[int, QuicStream]:
        stream_id = self.get_next_available_stream_id()
        return stream_id, self._get_or_create_stream_for_send(stream_id)

    def peer_certificate(self) -> bytes | None:
        """DER of the certificate the server showed in TLS (clients only)."""
        certificate = self.tls._peer_certificate  # noqa: SLF001
        return certificate.public_bytes(Encoding.DER) if certificate is not None else None

    def close_event(self) -> events.ConnectionTerminated | None:
        """Set as soon as either side has decided to close."""
        return self._close_event

    def closing(self) -> bool:
        return self._close_event is not None

    def heard(self) -> bool:
        """Whether any packet of the peer could be decrypted."""
        return self._state is not QuicConnectionState.FIRSTFLIGHT

    def smoothed_rtt(self) -> float:
        return self._loss._rtt_smoothed  # noqa: SLF001

    def min_rtt(self) -> float:
        """Least round-trip time seen, in seconds; infinite before the first sample."""
        return self._loss._rtt_min  # noqa: SLF001

    def congestion_window(self) -> int:
        """Bytes that may be in flight now."""
        return self._loss.congestion_window

    def acknowledge_soon(self, now: float, every: int) -> None:
        """Let the next transmission carry an ACK if ``every`` packets came since the last one."""
        space = self._spaces.get(Epoch.ONE_RTT)
        if space is None or space.ack_at is None:
            return
        if space.largest_received_packet - self._last_prompt_ack >= every:
            self._last_prompt_ack = space.largest_received_packet
            space.ack_at = now

    _last_prompt_ack = -1

    # --- what a faster engine does better (``edgesync.transport.fast``)

    probe_done: Callable[[int, bool], None] | None = None
    """Told the size of a datagram of ``send_probe`` and whether it arrived."""

    def receive_datagrams(self, datagrams: Sequence[bytes], address: Any, now: float) -> None:
        """Datagrams that came from ``address``, in this order."""
        for datagram in datagrams:
            self.receive_datagram(datagram, address, now)

    @property
    def datagram_size(self) -> int:
        return self._max_datagram_size

    def set_datagram_size(self, size: int) -> None:
        """Longest UDP payload from now on; what was sent already is cut anew only if it is lost."""
        self._max_datagram_size = size
        self.controller.resize(size)

    def path_changed(self, now: float) -> None:
        """One end has another IP address: what was learned of the path is of another one."""
        self.controller.on_path_change(now)
        self.mtu.reset()
        self._probes.clear()
        self.set_datagram_size(self.mtu.size)
        if self.path_moved is not None:
            self.path_moved()

    path_moved: Callable[[], None] | None = None
    """Told that the path is another one."""

    def timeouts(self) -> int:
        """Probe timeouts (PTO) in a row without an answer."""
        return self._loss._pto_count  # noqa: SLF001

    controller: CongestionController

    def use_controller(self, controller: CongestionController) -> None:
        """Let ``controller`` and its pacer decide from now on; it goes on from what is in flight."""
        loss = self._loss
        controller.bytes_in_flight = loss._cc.bytes_in_flight  # noqa: SLF001
        loss._cc = controller  # noqa: SLF001
        loss._pacer = controller.pacer  # type: ignore[assignment]  # noqa: SLF001
        self.controller = controller

    def send_probe(self, size: int) -> None:
        """Ask for one datagram of exactly ``size`` bytes to be sent. This engine cannot: it counts as lost at once."""
        if self.probe_done is not None:
            self.probe_done(size, False)

    def discard(self) -> None:
        """Break the reference cycles of a closed connection, so that its buffers go at once, not at the next GC."""
        for name in (
            "_crypto_buffers",
            "_crypto_streams",
            "_cryptos",
            "_cryptos_initial",
            "_spaces",
            "_streams",
            "_QuicConnection__frame_handlers",
        ):
            getattr(self, name, {}).clear()
        self._streams_queue = []
        self._one_rtt = None
        self._loss.spaces = []
        self._loss._send_probe = _nothing  # noqa: SLF001
        self._events.clear()
        if hasattr(self, "tls"):
            self.tls.alpn_cb = None
            self.tls.update_traffic_key_cb = _nothing
            self.tls.handshake_extensions = []

    # --- the short way in

    short_way = True
    """Whether plain 1-RTT packets skip stock code's preparations for everything they are not."""
    took_short_way = 0

    def receive_datagram(self, data: bytes, addr: Any, now: float) -> None:
        """Stock semantics. A confirmed connection's packet from the known address goes the short way."""
        if not (
            self.short_way
            and self._handshake_confirmed
            and len(data) > _SHORT_HEADER_BYTES
            and data[0] & 0xC0 == 0x40
            and data[1 : 1 + CONNECTION_ID_BYTES] == self.host_cid
            and self._state is QuicConnectionState.CONNECTED
            and self._network_paths[0].addr == addr
            and self._network_paths[0].is_validated
            and self._quic_logger is None
            and not self._close_pending
            and self._receive_plain(data, now)
        ):
            super().receive_datagram(data, addr, now)

    def _receive_plain(self, data: bytes, now: float) -> bool:
        """One 1-RTT packet on the active path under the active connection id; False leaves it to stock code.

        It is ``QuicConnection.receive_datagram`` without what cannot apply: other packet types, version negotiation,
        handshake keys, migration, logging. Nothing is changed before the decision to keep the packet here.
        """
        if self._one_rtt is None:
            self._one_rtt = (self._spaces[Epoch.ONE_RTT], self._cryptos[Epoch.ONE_RTT])
        space, crypto = self._one_rtt
        try:
            header, payload, number = crypto.decrypt_packet(
                data, _SHORT_HEADER_BYTES, space.expected_packet_number
            )
        except CryptoError:
            return False
        if number in space.received_packets or header[0] & 0x18 or not payload:
            return False
        self.took_short_way += 1
        if number > space.expected_packet_number:
            space.expected_packet_number = number + 1
        if number > self._spin_highest_pn:
            self._spin_bit = bool(header[0] & 0x20) != self._is_client
            self._spin_highest_pn = number
        context = QuicReceiveContext(
            epoch=Epoch.ONE_RTT,
            host_cid=self.host_cid,
            network_path=self._network_paths[0],
            quic_logger_frames=None,
            time=now,
            version=None,
        )
        try:
            ack_eliciting = self._plain_payload(context, payload)
        except QuicConnectionError as exc:
            self.close(
                error_code=exc.error_code,
                frame_type=exc.frame_type,
                reason_phrase=exc.reason_phrase,
            )
        if self._state is not QuicConnectionState.CONNECTED or self._close_pending:
            return True
        if now - self._idle_restarted_at > _IDLE_GRAIN_S:
            self._idle_restarted_at = now
            self._close_at = now + self._idle_timeout()
        self._ack_eliciting_sent_since_receipt = False
        if not space.discarded:
            if number > space.largest_received_packet:
                space.largest_received_packet = number
                space.largest_received_time = now
            space.ack_queue.add(number)
            space.received_packets.add(number)
            if len(space.ack_queue) > MAX_ACK_RANGES:
                space.ack_queue.shift()
            if ack_eliciting and space.ack_at is None:
                space.ack_at = now + self._ack_delay
        return True

    def _plain_payload(self, context: QuicReceiveContext, payload: bytes) -> bool:
        """Handle the frames; whether they want an ACK."""
        first = payload[0]
        if first & 0xF8 != QuicFrameType.STREAM_BASE:
            ack_eliciting: bool = self._payload_received(context, payload)[0]
            return ack_eliciting
        buf = Buffer(data=payload)
        buf.seek(1)
        try:
            self._handle_stream_frame(context, first, buf)
        except BufferReadError:
            raise QuicConnectionError(
                error_code=QuicErrorCode.FRAME_ENCODING_ERROR,
                frame_type=first,
                reason_phrase="Failed to parse frame",
            ) from None
        except StreamFinishedError:
            pass  # the stream's state is gone: as stock code does, ignore the frame
        if not buf.eof():
            self._payload_received(context, payload[buf.tell() :])
        return True

    _one_rtt: tuple[QuicPacketSpace, CryptoPair] | None = None
    _idle_restarted_at = 0.0

    # --- what aioquic calls

    def _handle_crypto_frame(
        self, context: QuicReceiveContext, frame_type: int, buf: Buffer
    ) -> None:
        at = buf.tell()
        end = buf.pull_uint_var() + buf.pull_uint_var()
        buf.seek(at)
        stream = self._crypto_streams[context.epoch]
        if type(stream.receiver) is QuicStreamReceiver:
            stream.receiver = SparseReceiver(None, readable=True)
        if end > limits.MAX_CRYPTO_BYTES:
            raise QuicConnectionError(
                error_code=QuicErrorCode.CRYPTO_BUFFER_EXCEEDED,
                frame_type=frame_type,
                reason_phrase="too many TLS bytes",
            )
        super()._handle_crypto_frame(context, frame_type, buf)

    def _write_connection_limits(self, builder: QuicPacketBuilder, space: QuicPacketSpace) -> None:
        del space
        for limit in (self._local_max_data, self._local_max_streams_bidi):
            if limit.value != limit.sent:
                buf = builder.start_frame(
                    limit.frame_type,
                    capacity=CONNECTION_LIMIT_FRAME_CAPACITY,
                    handler=self._on_connection_limit_delivery,
                    handler_args=(limit,),
                )
                buf.push_uint_var(limit.value)
                limit.sent = limit.value

    def _write_stream_limits(
        self, builder: QuicPacketBuilder, space: QuicPacketSpace, stream: QuicStream
    ) -> None:
        del space
        if (
            stream.max_stream_data_local_sent == stream.max_stream_data_local
            or stream.is_blocked
            or stream.receiver.is_finished
        ):
            return
        buf = builder.start_frame(
            QuicFrameType.MAX_STREAM_DATA,
            capacity=MAX_STREAM_DATA_FRAME_CAPACITY,
            handler=self._on_max_stream_data_delivery,
            handler_args=(stream,),
        )
        buf.push_uint_var(cast("int", stream.stream_id))
        buf.push_uint_var(stream.max_stream_data_local)
        stream.max_stream_data_local_sent = stream.max_stream_data_local


def _nothing(*_: object) -> None:
    pass


def _check_private_names() -> None:
    """Refuse at import an aioquic whose insides we do not know: limits that silently do not hold are worse."""
    probe = QuicConnection(
        configuration=client_configuration(alpn=ALPN, idle_timeout_s=limits.QUIC_IDLE_TIMEOUT_S)
    )
    names = (
        "_streams",
        "_streams_queue",
        "_local_max_data",
        "_local_max_streams_bidi",
        "_local_max_streams_uni",
        "_loss",
        "_spaces",
        "_crypto_streams",
        "_close_event",
        "_close_pending",
        "_close_at",
        "_handshake_confirmed",
        "_network_paths",
        "_host_cids",
        "_spin_highest_pn",
        "_ack_eliciting_sent_since_receipt",
        "_payload_received",
        "_handle_stream_frame",
        "_state",
        "_get_or_create_stream_for_send",
        "_handle_crypto_frame",
        "_write_connection_limits",
        "_write_stream_limits",
        "_on_connection_limit_delivery",
        "_on_max_stream_data_delivery",
    )
    missing = [name for name in names if not hasattr(probe, name)]
    if missing or UINT_VAR_MAX_SIZE != 8:
        raise ImportError(f"this aioquic lacks {', '.join(missing)}: edgesync needs 1.7")


_check_private_names()
