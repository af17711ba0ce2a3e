"""Where a STREAM frame's data begins: the short way for frames as our own sender writes them says what stock says."""

import struct

from aioquic.buffer import encode_uint_var
from hypothesis import given
from hypothesis import strategies as st

from edgesync.transport.fast.receiving import _place, _varint

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


@given(frames())
def test_the_short_way_says_what_the_long_way_says(frame: bytes) -> None:
    stream_id, at = _varint(frame, 1)
    offset = 0
    if frame[0] & 4:
        offset, at = _varint(frame, at)
    if frame[0] & 2:
        length, at = _varint(frame, at)
        at = at if length == len(frame) - at else len(frame)
    assert _place(frame) == (stream_id, offset, at)
