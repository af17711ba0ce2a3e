"""Many datagrams at once: bulk stream data and ACKs of an established connection, made without aioquic's builder.

Stream bytes, first sent or sent again, leave in packets of one STREAM frame; all of a batch but the last of a range are
equally long, so that the kernel can cut them from one buffer. An ACK with nothing else is made here too. Whenever
another frame is due (limits, connection ids, resets, probes, a FIN alone) stock code makes one datagram of it.

Who may send how much is the congestion controller's and its pacer's to say; nothing here goes around them.
"""

import struct
from typing import Any, Final, cast

from aioquic.buffer import UINT_VAR_MAX_SIZE, Buffer, encode_uint_var  # type: ignore[attr-defined]
from aioquic.quic.crypto import CryptoPair
from aioquic.quic.packet import QuicFrameType, push_ack_frame
from aioquic.quic.packet_builder import QuicDeliveryState
from aioquic.quic.recovery import QuicPacketSpace
from aioquic.quic.stream import QuicStream, QuicStreamReceiver, QuicStreamSender
from aioquic.tls import Epoch

from edgesync.transport.congestion.base import CongestionController
from edgesync.transport.fast.protection import masks
from edgesync.transport.fast.receiving import BatchReceiving
from edgesync.transport.fast.recovery import FastRecovery, SentOther, SentStream
from edgesync.transport.fast.segments import SegmentSender
from edgesync.transport.quic import SparseReceiver

BATCH_DATAGRAMS: Final = 40
"""Datagrams of one call: of 1452 bytes about what one system call takes."""
ACK_DELAY_S: Final = 0.008
"""Longest an ACK waits for company; stock code's millisecond acknowledges almost every packet of a slow link."""

_PLACE: Final = struct.Struct(">QH")
_EIGHT_BYTES: Final = 0xC000000000000000
_TWO_BYTES: Final = 0x4000
"""Tags of variable-length integers of these lengths."""
_UNPACK_MASKS: Final = struct.Struct(">BH13x").iter_unpack
_TAG_BYTES: Final = 16
_NUMBER_BYTES: Final = 2
_STREAM_OVERHEAD: Final = (
    1 + UINT_VAR_MAX_SIZE + 2
)  # type, offset and length; the stream id comes on top
_ACK_TRIGGER: Final = (
    8  # as stock code: every so many packets an ACK with gaps asks to be acknowledged
)
_PADDED_ACK_BYTES: Final = 4


class _Streams(dict[int, QuicStream]):
    """Gives every stream, on whatever path aioquic creates it, our two halves."""

    def __setitem__(self, stream_id: int, stream: QuicStream) -> None:
        if type(stream.receiver) is QuicStreamReceiver:
            stream.receiver = SparseReceiver(stream_id, not stream.receiver.is_finished)
        if type(stream.sender) is QuicStreamSender:
            stream.sender = SegmentSender(stream_id, not stream.sender.is_finished)
        super().__setitem__(stream_id, stream)


class FastQuicConnection(BatchReceiving):
    """See the module."""

    sent_fast = 0
    """Packets made here."""
    resent_bytes = 0
    """Stream bytes that were sent again."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._ack_delay = ACK_DELAY_S
        self._streams = _Streams()
        self._host: Any = None
        """The peer's IP address: another one is another path, another port is not (RFC 9000 section 9.4)."""
        stock = self._loss
        controller = self.controller
        self._recovery = self._loss = FastRecovery(
            congestion_control_algorithm=self._configuration.congestion_control_algorithm,
            initial_rtt=self._configuration.initial_rtt,
            max_datagram_size=self._max_datagram_size,
            peer_completed_address_validation=stock.peer_completed_address_validation,
            quic_logger=self._quic_logger,
            send_probe=self._send_probe,
            logger=self._logger,
        )
        self._recovery.mtu = self.mtu
        self.use_controller(controller)

    def use_controller(self, controller: CongestionController) -> None:
        super().use_controller(controller)
        if isinstance(self._loss, FastRecovery):
            self._loss.controller = controller

    # --- path probes

    def send_probe(self, size: int) -> None:
        """Send one datagram of exactly ``size`` bytes (PING and PADDING) soon; ``probe_done`` hears what became of it.

        It is outside the congestion window, and its loss is no sign of congestion.   Source: RFC 8899 section 4.1.
        """
        self._probes.append(size)

    # --- sending

    def datagrams_to_send(self, now: float) -> list[tuple[bytes, Any]]:
        """Stock semantics, except that a call makes at most ``BATCH_DATAGRAMS``: call until nothing comes."""
        if not self.settled() or self._probe_pending:
            return super().datagrams_to_send(now)
        if self._one_rtt is None:
            self._one_rtt = (self._spaces[Epoch.ONE_RTT], self._cryptos[Epoch.ONE_RTT])
        space, pair = self._one_rtt
        host = self._network_paths[0].addr[0]
        if host != self._host:
            if self._host is not None:
                self.path_changed(now)
            self._host = host
        if pair._update_key_requested:
            return self._one_datagram(now)
        if self._probes:
            return [self._probe_datagram(space, pair, self._probes.pop(0), now)]
        if self._control_is_due():
            return self._one_datagram(now)
        if space.ack_at is not None and space.ack_at <= now:
            ack = self._ack_datagram(space, pair, now)
            return self._one_datagram(now) if ack is None else [ack]
        return self._stream_datagrams(space, pair, now)

    def _one_datagram(self, now: float) -> list[tuple[bytes, Any]]:
        """What stock code has to say, in one datagram."""
        self._recovery.held_to = self._max_datagram_size
        try:
            return super().datagrams_to_send(now)
        finally:
            self._recovery.held_to = None

    def _control_is_due(self) -> bool:
        """Whether any frame besides ACK and STREAM waits."""
        if (
            self._ping_pending
            or self._datagrams_pending
            or self._retire_connection_ids
            or self._handshake_done_pending
            or self._streams_blocked_pending
            or self._network_paths[0].remote_challenges
            or self._remote_preferred_address is not None
            or not self._crypto_streams[Epoch.ONE_RTT].sender.buffer_is_empty
        ):
            return True
        for limit in (self._local_max_data, self._local_max_streams_bidi):
            if limit.value != limit.sent:
                return True
        for connection_id in self._host_cids:
            if not connection_id.was_sent:
                return True
        for stream in self._streams.values():
            receiver = stream.receiver
            if (
                receiver.stop_pending
                or stream.sender.reset_pending
                or (receiver.is_finished and stream.sender.is_finished)
                or (
                    stream.max_stream_data_local_sent != stream.max_stream_data_local
                    and not receiver.is_finished
                    and not stream.is_blocked
                )
            ):
                return True
        return False

    # --- streams

    def _stream_datagrams(
        self, space: QuicPacketSpace, pair: CryptoPair, now: float
    ) -> list[tuple[bytes, Any]]:
        self._pacing_at = None
        stream = self._next_stream()
        controller = self.controller
        room = (
            controller.congestion_window - controller.bytes_in_flight
        ) // self._max_datagram_size
        if stream is None:
            if room > 0:
                controller.on_app_limited()
            return []
        if room < 1:  # a window smaller than a datagram must still let something go
            return [] if controller.bytes_in_flight else self._one_datagram(now)
        pacer = controller.pacer
        self._pacing_at = pacer.next_send(now, room)
        if self._pacing_at is not None:
            return []
        sender = stream.sender
        budget = self._remote_max_data - self._remote_max_data_used
        stop = min(sender.highest_offset + budget, stream.max_stream_data_remote)
        stream_id: bytes = encode_uint_var(cast("int", stream.stream_id))
        header = 1 + len(self._peer_cid.cid) + _NUMBER_BYTES
        size = self._max_datagram_size - header - _TAG_BYTES - _STREAM_OVERHEAD - len(stream_id)
        count = min(BATCH_DATAGRAMS, room, pacer.quota(now))
        ranges = _ranges(sender, stop, size, count)
        if not ranges:
            return self._one_datagram(now)
        return self._seal(space, pair, stream, stream_id, ranges, size, now)

    def _next_stream(self) -> QuicStream | None:
        """The first in line that has something its peer lets it send; a FIN alone counts."""
        budget = self._remote_max_data - self._remote_max_data_used
        for stream in self._streams_queue:
            sender = stream.sender
            if sender.buffer_is_empty or stream.is_blocked:
                continue
            pending = sender._pending
            if not len(pending):
                if sender._pending_eof:
                    return stream
                sender.buffer_is_empty = True  # as stock code finds when it looks for a frame
            elif pending[0].start < min(
                sender.highest_offset + budget, stream.max_stream_data_remote
            ):
                return stream
        return None

    def _seal(
        self,
        space: QuicPacketSpace,
        pair: CryptoPair,
        stream: QuicStream,
        stream_id: bytes,
        ranges: list[tuple[int, int]],
        size: int,
        now: float,
    ) -> list[tuple[bytes, Any]]:
        """Packets of at most ``size`` bytes for ``ranges`` of a stream, booked as sent."""
        send, sender = pair.send, stream.sender
        assert isinstance(sender, SegmentSender)
        assert send.aead is not None
        assert send.hp is not None
        encrypt, iv = send.aead._aead.encrypt, send.aead._iv
        first = 0x40 | self._spin_bit << 5 | pair.key_phase << 2 | _NUMBER_BYTES - 1
        cid = self._peer_cid.cid
        start_of_header = bytes((first,)) + cid
        overhead = len(start_of_header) + _NUMBER_BYTES + _TAG_BYTES + _STREAM_OVERHEAD
        overhead += len(stream_id)
        frame, last_frame = b"\x0e" + stream_id, b"\x0f" + stream_id
        final, highest = sender._buffer_fin, sender.highest_offset
        number = first_number = self._packet_number
        sent: dict[int, Any] = space.sent_packets
        packets: list[Any] = []
        pack_place = _PLACE.pack
        pack_plain = struct.Struct(f">{len(start_of_header)}sH").pack
        bodies: list[bytes] = []
        base = limit = 0
        segment = memoryview(b"")
        for begin, end in ranges:
            if begin < highest:
                self.resent_bytes += end - begin
            stop = begin
            while stop < end:
                start, stop = stop, min(stop + size, end)
                if stop > limit or start < base:
                    segment, base, limit = sender.around(start, stop)
                is_final = stop == final
                bodies.append(
                    encrypt(
                        (iv ^ number).to_bytes(12, "big"),
                        (last_frame if is_final else frame)
                        + pack_place(start | _EIGHT_BYTES, stop - start | _TWO_BYTES)
                        + segment[start - base : stop - base],
                        pack_plain(start_of_header, number & 0xFFFF),
                    )
                )
                packet = SentStream()
                packet.packet_number, packet.sent_time = number, now
                packet.sent_bytes = overhead + stop - start
                packet.sender, packet.fin = sender, is_final
                packet.start, packet.stop = start, stop
                sent[number] = packet
                packets.append(packet)
                number += 1
        if final is not None and ranges[-1][1] == final:
            sender._pending_eof = False
        self.controller.on_burst_sent(packets)
        mask = masks(send.hp, [body[2:18] for body in bodies])
        address = self._network_paths[0].addr
        pack_header = struct.Struct(f">B{len(cid)}sH").pack
        datagrams: list[tuple[bytes, Any]] = [
            (pack_header(first ^ high & 0x1F, cid, hidden & 0xFFFF ^ low) + body, address)
            for hidden, body, (high, low) in zip(
                range(first_number, number), bodies, _UNPACK_MASKS(mask), strict=True
            )
        ]
        self._book(space, stream, ranges, len(packets), overhead, now)
        return datagrams

    def _book(
        self,
        space: QuicPacketSpace,
        stream: QuicStream,
        ranges: list[tuple[int, int]],
        count: int,
        overhead: int,
        now: float,
    ) -> None:
        sender, total = stream.sender, count * overhead
        self._packet_number += count
        self.sent_fast += count
        space.ack_eliciting_in_flight += count
        self._loss._time_of_last_sent_ack_eliciting_packet = now
        for start, stop in ranges:
            sender._pending.subtract(start, stop)
            total += stop - start
        highest = ranges[-1][1]
        if highest > sender.highest_offset:
            self._remote_max_data_used += highest - sender.highest_offset
            sender.highest_offset = highest
        if len(self._streams_queue) > 1:
            self._streams_queue.remove(stream)
            self._streams_queue.append(stream)
        self._network_paths[0].bytes_sent += total
        self.controller.pacer.sent(total)
        self._restart_idle_timer(now)

    def _restart_idle_timer(self, now: float) -> None:
        """On the first packet since one was received that asks for an answer.   Source: RFC 9000 section 10.1."""
        if not self._ack_eliciting_sent_since_receipt:
            self._close_at = now + self._idle_timeout()
            self._ack_eliciting_sent_since_receipt = True

    # --- single packets

    def _ack_datagram(
        self, space: QuicPacketSpace, pair: CryptoPair, now: float
    ) -> tuple[bytes, Any] | None:
        """An ACK and nothing else; None leaves it to stock code."""
        queue = space.ack_queue
        if not len(queue) or (len(queue) > 1 and not self._packet_number % _ACK_TRIGGER):
            return None
        assert space.largest_received_time is not None
        delay = int((now - space.largest_received_time) * 1_000_000)
        capacity = self._max_datagram_size - len(self._peer_cid.cid) - 32
        buffer = Buffer(capacity=capacity)
        buffer.push_uint_var(QuicFrameType.ACK)
        push_ack_frame(buffer, queue, delay >> self._local_ack_delay_exponent, capacity - 1)
        space.ack_at = None
        packet = SentOther(
            self._packet_number,
            now,
            0,
            is_ack_eliciting=False,
            handler=(self._on_ack_delivery, (space, space.largest_received_packet)),
        )
        return self._single(space, pair, buffer.data, packet)

    def _probe_datagram(
        self, space: QuicPacketSpace, pair: CryptoPair, size: int, now: float
    ) -> tuple[bytes, Any]:
        room = size - 1 - len(self._peer_cid.cid) - _NUMBER_BYTES - _TAG_BYTES
        packet = SentOther(
            self._packet_number,
            now,
            0,
            is_ack_eliciting=True,
            handler=(self._on_probe_delivery, (size,)),
        )
        space.ack_eliciting_in_flight += 1
        self._loss._time_of_last_sent_ack_eliciting_packet = now
        self._restart_idle_timer(now)
        return self._single(space, pair, b"\x01" + bytes(room - 1), packet)

    def _on_probe_delivery(self, delivery: QuicDeliveryState, size: int) -> None:
        if self.probe_done is not None:
            self.probe_done(size, delivery is QuicDeliveryState.ACKED)

    def _single(
        self, space: QuicPacketSpace, pair: CryptoPair, plain: bytes, packet: SentOther
    ) -> tuple[bytes, Any]:
        send = pair.send
        assert send.aead is not None
        assert send.hp is not None
        number, cid = self._packet_number, self._peer_cid.cid
        first = 0x40 | self._spin_bit << 5 | pair.key_phase << 2 | _NUMBER_BYTES - 1
        header = bytes((first,)) + cid + (number & 0xFFFF).to_bytes(2, "big")
        body = send.aead.encrypt(plain.ljust(_PADDED_ACK_BYTES, b"\0"), header, number)
        datagram = send.hp.apply(header, body)
        packet.sent_bytes = len(datagram)
        sent: dict[int, Any] = space.sent_packets
        sent[number] = packet
        self._packet_number += 1
        self.sent_fast += 1
        path = self._network_paths[0]
        path.bytes_sent += len(datagram)
        return datagram, path.addr


def _ranges(sender: QuicStreamSender, stop: int, size: int, count: int) -> list[tuple[int, int]]:
    """What waits to be sent below offset ``stop`` and fits ``count`` packets of ``size`` bytes."""
    ranges: list[tuple[int, int]] = []
    for pending in sender._pending:
        start, end = pending.start, min(pending.stop, stop)
        if count <= 0 or start >= end:
            break
        end = min(end, start + count * size)
        ranges.append((start, end))
        count -= -((start - end) // size)
    return ranges
