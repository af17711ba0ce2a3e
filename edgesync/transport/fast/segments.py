"""The sending half of a stream that keeps what was written as it was written, instead of in one growing buffer.

aioquic appends to a bytearray and deletes from its front, which copies everything unacknowledged again and again. Here
bytes objects stay where they are until all of them are acknowledged; a packet is cut from one of them, or from two
where it spans their border. Everything else is ``QuicStreamSender``.
"""

from bisect import bisect_right

from aioquic.quic.packet import QuicStreamFrame
from aioquic.quic.packet_builder import QuicDeliveryState
from aioquic.quic.stream import QuicStreamSender

_SMALL_BYTES = 2048
"""Writes below this are joined with a small one before: an object each would cost more than the copy."""


class SegmentSender(QuicStreamSender):
    """See the module. ``_buffer`` of the base class stays empty."""

    def __init__(self, stream_id: int | None, writable: bool) -> None:
        super().__init__(stream_id=stream_id, writable=writable)
        self._starts: list[int] = []
        self._segments: list[bytes] = []

    def around(self, start: int, stop: int) -> tuple[memoryview, int, int]:
        """Bytes with those from offset ``start`` to ``stop`` among them; the offset of their first and of their end."""
        index = bisect_right(self._starts, start) - 1
        segment, base = self._segments[index], self._starts[index]
        end = base + len(segment)
        if stop <= end:
            return memoryview(segment), base, end
        parts = [segment[start - base :]]
        while end < stop:
            index += 1
            parts.append(self._segments[index][: stop - end])
            end += len(parts[-1])
        return memoryview(b"".join(parts)), start, stop

    def cut(self, start: int, stop: int) -> bytes:
        """The bytes from offset ``start`` to ``stop``; they were written and are not all acknowledged."""
        view, base, _ = self.around(start, stop)
        return bytes(view[start - base : stop - base])

    def write(self, data: bytes, end_stream: bool = False) -> None:
        if data and self._buffer_fin is None and self._reset_error_code is None:
            segments = self._segments
            if len(data) < _SMALL_BYTES and segments and len(segments[-1]) < _SMALL_BYTES:
                segments[-1] += data
            else:
                self._starts.append(self._buffer_stop)
                segments.append(bytes(data))
            self.buffer_is_empty = False
            self._pending.add(self._buffer_stop, self._buffer_stop + len(data))
            self._buffer_stop += len(data)
            data = b""
        super().write(data, end_stream)

    def get_frame(self, max_size: int, max_offset: int | None = None) -> QuicStreamFrame | None:
        """Stock semantics."""
        assert self._reset_error_code is None, "cannot call get_frame() after reset()"
        if max_size < 0:
            return None
        if not len(self._pending):
            if self._pending_eof:
                self._pending_eof = False
                assert self._buffer_fin is not None
                return QuicStreamFrame(fin=True, offset=self._buffer_fin)
            self.buffer_is_empty = True
            return None
        pending = self._pending[0]
        start, stop = pending.start, min(pending.stop, pending.start + max_size)
        if max_offset is not None:
            stop = min(stop, max_offset)
        if stop <= start:
            return None
        frame = QuicStreamFrame(data=self.cut(start, stop), offset=start)
        self._pending.subtract(start, stop)
        self.highest_offset = max(self.highest_offset, stop)
        if self._buffer_fin == stop:
            frame.fin = True
            self._pending_eof = False
        return frame

    def on_data_delivery(
        self, delivery: QuicDeliveryState, start: int, stop: int, fin: bool
    ) -> None:
        if (
            delivery is not QuicDeliveryState.ACKED
            or self._reset_error_code is not None
            or stop <= start
        ):
            super().on_data_delivery(delivery, start, stop, fin)
            return
        self._acked.add(start, stop)
        first = self._acked[0]
        if first.start == self._buffer_start:
            self._acked.shift()
            self._forget_below(first.stop)
        super().on_data_delivery(delivery, stop, stop, fin)

    def _forget_below(self, offset: int) -> None:
        self._buffer_start = offset
        done = bisect_right(self._starts, offset) - 1
        if done >= 0 and offset >= self._starts[done] + len(self._segments[done]):
            done += 1
        if done > 0:
            del self._starts[:done]
            del self._segments[:done]

    def reset(self, error_code: int) -> None:
        super().reset(error_code)
        if self._reset_error_code is not None:
            self._starts.clear()
            self._segments.clear()
