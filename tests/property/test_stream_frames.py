"""Where a STREAM frame's data begins: the short way says what aioquic's own reading of the frame says."""

import struct

from aioquic.buffer import Buffer, BufferReadError, encode_uint_var  # type: ignore[attr-defined]
from hypothesis import given
from hypothesis import strategies as st

from edgesync.transport.fast.receiving import _place

IDS = st.one_of(
    st.integers(0, 63), st.integers(0, 16_383), st.integers(0, 2**30 - 1), st.integers(0, 2**62 - 1)
)


@st.composite
def frames(draw: st.DrawFn) -> bytes:
    body = bytes(draw(st.integers(0, 40)))
    head = bytes([draw(st.sampled_from([0x08, 0x0A, 0x0C, 0x0E]))]) + encode_uint_var(draw(IDS))
    offset = draw(st.integers(0, 2**61))
    length = draw(st.one_of(st.just(len(body)), st.integers(0, 16_383)))
    if draw(st.booleans()):
        head += struct.pack(">QH", offset | 3 << 62, length | 0x4000)
    else:
        head += encode_uint_var(offset) + encode_uint_var(length)
    frame = head + body
    return frame[: draw(st.integers(2, len(frame)))] if draw(st.booleans()) else frame


def stock(frame: bytes) -> tuple[int, int, int] | None:
    """Stream id, offset and where the data begins, as stock reads them; None: it is not one whole frame with data."""
    buffer = Buffer(data=frame)
    kind = buffer.pull_uint8()
    try:
        stream_id = buffer.pull_uint_var()
        offset = buffer.pull_uint_var() if kind & 4 else 0
        length = buffer.pull_uint_var() if kind & 2 else len(frame) - buffer.tell()
    except BufferReadError:
        return None
    at = buffer.tell()
    return (stream_id, offset, at) if at < at + length == len(frame) else None


@given(frames())
def test_a_frame_begins_where_stock_says_and_what_is_none_goes_to_stock(frame: bytes) -> None:
    expected = stock(frame)
    found = _place(frame)
    if expected is None:
        assert found[2] == len(frame)
    else:
        assert found == expected
