"""Datagrams of an established connection, a batch at a time.

One call computes all header masks; a packet under the active connection id, in the current key phase, is decrypted in
place, and one that holds a single STREAM frame of a known stream is delivered without parsing objects. Neighbouring
bytes of a stream become one event. Whatever differs goes to stock code in its turn, so order is kept.

Invariants: a frame is accepted here only within the same stream and connection limits that
``edgesync.transport.quic`` grants; gaps go through its ``SparseReceiver``; refusals are stock code's.
"""

import struct
from collections.abc import Sequence
from typing import Any, Final

from aioquic.quic.connection import QuicConnectionError, QuicConnectionState, QuicReceiveContext
from aioquic.quic.events import StreamDataReceived
from aioquic.quic.packet import QuicStreamFrame, decode_packet_number
from aioquic.quic.recovery import MAX_ACK_RANGES, QuicPacketSpace
from aioquic.quic.stream import QuicStream
from aioquic.tls import Epoch
from cryptography.exceptions import InvalidTag

from edgesync.transport.fast.protection import SAMPLE_BYTES, masks
from edgesync.transport.quic import CONNECTION_ID_BYTES, BoundedQuicConnection, SparseReceiver

_NUMBER_AT: Final = 1 + CONNECTION_ID_BYTES
_SAMPLE_AT: Final = _NUMBER_AT + 4
_SAMPLE_END: Final = _SAMPLE_AT + SAMPLE_BYTES
_NO_SAMPLE: Final = bytes(SAMPLE_BYTES)
_UNPACK_HEAD: Final = struct.Struct(f">B{CONNECTION_ID_BYTES}sH").unpack_from
_UNPACK_MASK: Final = struct.Struct(">BH").unpack_from
_FIXED_BITS: Final = 0xDC
"""Of the first byte: a short header, reserved bits, the key phase."""
_COMMON: Final = tuple(
    (struct.Struct(form).unpack_from, 1 + struct.calcsize(form), mask)
    for form, mask in ((">BQH", 0), (">HQH", 0x4000), (">IQH", 0x80000000))
)
"""How our own sender writes stream ids below 64, 16,384 and 2^30: what reads it, its bytes with the type, the bits that
say how long the id is."""
_EIGHT_BYTES: Final = 0xC000000000000000
_TWO_BYTES: Final = 0x4000
"""Tags of variable-length integers of these lengths."""
_CONNECTED: Final = QuicConnectionState.CONNECTED


class BatchReceiving(BoundedQuicConnection):
    """See the module."""

    fast = True
    """Whether the short cuts are taken; tests turn them off."""
    received_fast = 0
    """Packets that went the short way."""

    def settled(self) -> bool:
        """Whether the connection is in the one state the short cuts know: established, on one validated path."""
        paths = self._network_paths
        return (
            self.fast
            and self._state is _CONNECTED
            and self._handshake_confirmed
            and not self._close_pending
            and self._quic_logger is None
            and paths[0].is_validated
            and (
                len(paths) == 1
                or not any(
                    path.remote_challenges or not (path.is_validated or path.local_challenge_sent)
                    for path in paths[1:]
                )
            )
        )

    def receive_datagrams(self, datagrams: Sequence[bytes], address: Any, now: float) -> None:
        """Stock semantics for datagrams that came from ``address``, in this order."""
        if self.settled() and self._network_paths[0].addr == address:
            datagrams = datagrams[self._receive_settled(datagrams, address, now) :]
        for datagram in datagrams:
            self.receive_datagram(datagram, address, now)

    def _receive_settled(self, datagrams: Sequence[bytes], address: Any, now: float) -> int:
        """Take the batch; how many were dealt with before the connection left the settled state."""
        if self._one_rtt is None:
            self._one_rtt = (self._spaces[Epoch.ONE_RTT], self._cryptos[Epoch.ONE_RTT])
        space, pair = self._one_rtt
        recv = pair.recv
        protection, aead = recv.hp, recv.aead
        if protection is None or aead is None:
            return 0
        samples = [
            datagram[_SAMPLE_AT:_SAMPLE_END] if len(datagram) >= _SAMPLE_END else _NO_SAMPLE
            for datagram in datagrams
        ]
        mask = masks(protection, samples)
        decrypt, iv = aead._aead.decrypt, aead._iv
        wanted = 0x40 | recv.key_phase << 2
        window = space.received_packets
        cid = self.host_cid
        streams = self._streams
        connection = self._local_max_data
        first = end = space.largest_received_packet + 1  # packet numbers taken, not yet recorded
        eliciting = heard = False
        taken_fast = 0
        stream: QuicStream | None = None
        parts: list[bytes] = []
        spin_number, spin_flags = self._spin_highest_pn, -1
        prefix, prefix_flags = b"", -1
        at = -SAMPLE_BYTES
        for index, datagram in enumerate(datagrams):
            at += SAMPLE_BYTES
            # --- header
            plain: bytes | None = None
            number = end
            flags = 0
            if len(datagram) >= _SAMPLE_END:
                flags, to, truncated = _UNPACK_HEAD(datagram)
                high, low = _UNPACK_MASK(mask, at)
                flags ^= high & 0x1F
                if flags & _FIXED_BITS == wanted and to == cid:
                    body = _NUMBER_AT + 2
                    if flags & 3 == 1:
                        truncated ^= low
                        if number & 0xFFFF != truncated:
                            number = decode_packet_number(
                                truncated, 16, max(space.expected_packet_number, end)
                            )
                        plain_number = truncated.to_bytes(2, "big")
                    else:
                        body, plain_number = _unmask_number(datagram, flags, mask, at)
                        number = decode_packet_number(
                            int.from_bytes(plain_number, "big"),
                            8 * len(plain_number),
                            max(space.expected_packet_number, end),
                        )
                    if flags != prefix_flags:
                        prefix, prefix_flags = bytes((flags,)) + cid, flags
                    try:
                        plain = decrypt(
                            (iv ^ number).to_bytes(12, "big"),
                            datagram[body:],
                            prefix + plain_number,
                        )
                    except InvalidTag:
                        plain = None
            if not plain:
                # --- anything else, in its turn
                if parts:
                    self._deliver(stream, parts)
                    parts = []
                if end > first:
                    _record(space, first, end, now)
                if heard:
                    self._heard_from_peer(space, eliciting, now)
                    eliciting = heard = False
                if spin_flags >= 0:
                    self._spin(spin_number, spin_flags)
                self.receive_datagram(datagram, address, now)
                if not self.settled() or self._network_paths[0].addr != address:
                    return index + 1
                first = end = space.largest_received_packet + 1
                cid, prefix_flags = self.host_cid, -1
                wanted = 0x40 | recv.key_phase << 2
                spin_number, spin_flags = max(spin_number, self._spin_highest_pn), -1
                aead = recv.aead
                if aead is None:
                    return index + 1
                decrypt, iv = aead._aead.decrypt, aead._iv
                continue
            if number != end and (first <= number < end or number in window):
                continue
            if number > spin_number:
                spin_number, spin_flags = number, flags
            # --- payload
            kind = plain[0]
            taken = False
            if kind & 0xF9 == 0x08:  # STREAM without FIN
                stream_id, offset, position = _place(plain)
                count = len(plain) - position
                one = streams.get(stream_id)
                if one is not None and count > 0:
                    receiver = one.receiver
                    top = offset + count
                    fresh = top - receiver.highest_offset
                    if (
                        top <= one.max_stream_data_local
                        and (fresh <= 0 or connection.used + fresh <= connection.value)
                        and receiver._final_size is None
                        and not receiver.is_finished
                        and type(receiver) is SparseReceiver
                    ):
                        if (
                            fresh == count
                            and not receiver.held
                            and receiver._buffer_start == offset
                        ):
                            if one is not stream:
                                if parts:
                                    self._deliver(stream, parts)
                                    parts = []
                                stream = one
                            parts.append(plain[position:])
                            receiver._buffer_start = receiver.highest_offset = top
                            connection.used += count
                            taken = True
                        else:
                            if parts:
                                self._deliver(stream, parts)
                                parts = []
                            taken = self._out_of_order(receiver, offset, plain[position:])
                            if taken and fresh > 0:
                                connection.used += fresh
            if taken:
                eliciting = True
            else:
                if parts:
                    self._deliver(stream, parts)
                    parts = []
                eliciting |= self._frames(plain, cid, now)
            if self._state is not _CONNECTED or self._close_pending:
                return index + 1
            heard = True
            taken_fast += 1
            if number == end:
                end += 1
            else:
                if end > first:
                    _record(space, first, end, now)
                first, end = number, number + 1
        if parts:
            self._deliver(stream, parts)
        if end > first:
            _record(space, first, end, now)
        if heard:
            self._heard_from_peer(space, eliciting, now)
        if spin_flags >= 0:
            self._spin(spin_number, spin_flags)
        self.received_fast += taken_fast
        return len(datagrams)

    def _spin(self, number: int, flags: int) -> None:
        self._spin_bit = bool(flags & 0x20) != self._is_client
        self._spin_highest_pn = number

    def _deliver(self, stream: QuicStream | None, parts: list[bytes]) -> None:
        assert stream is not None
        assert stream.stream_id is not None
        self._events.append(
            StreamDataReceived(
                data=parts[0] if len(parts) == 1 else b"".join(parts),
                end_stream=False,
                stream_id=stream.stream_id,
            )
        )

    def _out_of_order(self, receiver: SparseReceiver, offset: int, data: bytes) -> bool:
        """A frame that does not simply follow; its limits were checked. False: the connection closes."""
        try:
            event = receiver.handle_frame(QuicStreamFrame(data=data, fin=False, offset=offset))
        except QuicConnectionError as exc:
            self._refuse(exc)
            return False
        if event is not None:
            self._events.append(event)
        return True

    def _frames(self, plain: bytes, cid: bytes, now: float) -> bool:
        """Stock code's handling of a decrypted packet; whether it wants an ACK."""
        if self._close_pending:
            return False
        context = QuicReceiveContext(
            epoch=Epoch.ONE_RTT,
            host_cid=cid,
            network_path=self._network_paths[0],
            quic_logger_frames=None,
            time=now,
            version=None,
        )
        try:
            return self._plain_payload(context, plain)
        except QuicConnectionError as exc:
            self._refuse(exc)
            return False

    def _refuse(self, exc: QuicConnectionError) -> None:
        self.close(
            error_code=exc.error_code,
            frame_type=exc.frame_type,
            reason_phrase=exc.reason_phrase,
        )

    def _heard_from_peer(self, space: QuicPacketSpace, eliciting: bool, now: float) -> None:
        self._close_at = now + self._idle_timeout()
        self._ack_eliciting_sent_since_receipt = False
        if eliciting and space.ack_at is None:
            space.ack_at = now + self._ack_delay


def _record(space: QuicPacketSpace, first: int, end: int, now: float) -> None:
    """Note packet numbers ``first`` to ``end`` (not included) as received."""
    if end - 1 > space.largest_received_packet:
        space.largest_received_packet = end - 1
        space.largest_received_time = now
    space.expected_packet_number = max(space.expected_packet_number, end)
    space.ack_queue.add(first, end)
    if len(space.ack_queue) > MAX_ACK_RANGES:
        space.ack_queue.shift()
    window = space.received_packets
    received = window._received
    received.update(range(first, end))
    lower = end - window._size
    if lower > window._lower:
        window._lower = lower
        if len(received) > 4 * window._size:
            window._received = {number for number in received if number >= lower}


def _unmask_number(datagram: bytes, flags: int, mask: bytes, at: int) -> tuple[int, bytes]:
    """Where the payload begins, and the packet number's bytes without their mask, which begins at ``at``."""
    end = _NUMBER_AT + (flags & 3) + 1
    hidden = datagram[_NUMBER_AT:end]
    return end, bytes(x ^ y for x, y in zip(hidden, mask[at + 1 :], strict=False))


def _place(frame: bytes) -> tuple[int, int, int]:
    """Stream id, offset and where the data begins in a packet whose one frame is a STREAM frame without FIN.

    The data begins at the end of ``frame`` where there is none, where the frame is cut short, or where it is not the
    only one: stock code looks closer.
    """
    size = len(frame)
    if size > 16 and frame[0] == 0x0E and frame[1] < 0xC0:  # as our own sender writes it
        unpack, count, id_bits = _COMMON[frame[1] >> 6]
        stream_id, offset, length = unpack(frame, 1)
        if offset >= _EIGHT_BYTES and length - _TWO_BYTES == size - count:
            return stream_id ^ id_bits, offset - _EIGHT_BYTES, count
    stream_id, at = _varint(frame, 1)
    offset = 0
    if frame[0] & 4:
        offset, at = _varint(frame, at)
    if frame[0] & 2:
        length, at = _varint(frame, at)
        if length != size - at:
            return stream_id, offset, size
    return stream_id, offset, at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A variable-length integer and what follows it; beyond the end of ``data`` it is (0, len(data))."""
    if at >= len(data):
        return 0, len(data)
    first = data[at]
    size = 1 << (first >> 6)
    if size == 1:
        return first, at + 1
    if at + size > len(data):
        return 0, len(data)
    return int.from_bytes(data[at : at + size], "big") & ((1 << (8 * size - 2)) - 1), at + size
