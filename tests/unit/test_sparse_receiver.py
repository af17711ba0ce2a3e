"""Reassembly: whatever order, overlap and repetition, the bytes come out once and in order, and gaps cost nothing."""

import random

import pytest
from aioquic.quic.connection import QuicConnectionError
from aioquic.quic.packet import QuicStreamFrame
from aioquic.quic.stream import FinalSizeError

from edgesync.transport.quic import SparseReceiver


def frame(offset: int, data: bytes, *, fin: bool = False) -> QuicStreamFrame:
    return QuicStreamFrame(data=data, offset=offset, fin=fin)


@pytest.mark.parametrize("seed", range(20))
def test_any_order_gives_the_same_bytes(seed: int) -> None:
    rng = random.Random(seed)
    whole = rng.randbytes(rng.randrange(1, 20_000))
    frames = []
    at = 0
    while at < len(whole):
        size = rng.choice([1, 7, 100, 1170])
        frames.append((at, whole[at : at + size]))
        at += size
    for _ in range(len(frames) // 3):  # retransmissions, cut differently
        start = rng.randrange(len(whole))
        frames.append((start, whole[start : start + rng.randrange(1, 3000)]))
    chunked = [frames[n : n + 40] for n in range(0, len(frames), 40)]
    for part in chunked:  # disorder within a window, as on a network
        rng.shuffle(part)
    receiver = SparseReceiver(0, readable=True)
    out = bytearray()
    for part in chunked:
        for offset, data in part:
            event = receiver.handle_frame(frame(offset, data, fin=offset + len(data) == len(whole)))
            if event is not None:
                out += event.data
    assert bytes(out) == whole
    assert receiver.is_finished
    assert receiver.held == 0


def test_a_far_byte_costs_a_byte() -> None:
    receiver = SparseReceiver(0, readable=True)
    assert receiver.handle_frame(frame(10**9, b"x")) is None
    assert receiver.held == 1
    assert receiver.highest_offset == 10**9 + 1


def test_shredding_is_refused() -> None:
    receiver = SparseReceiver(0, readable=True)
    for offset in range(1, 129, 2):
        receiver.handle_frame(frame(offset, b"x"))
    with pytest.raises(QuicConnectionError):
        receiver.handle_frame(frame(131, b"x"))


def test_many_gaps_between_full_packets_are_a_lossy_network() -> None:
    receiver = SparseReceiver(0, readable=True)
    for number in range(1, 4000, 2):
        receiver.handle_frame(frame(number * 1170, bytes(1170)))
    assert receiver.held == 2000 * 1170


def test_small_neighbours_are_joined() -> None:
    receiver = SparseReceiver(0, readable=True)
    for offset in range(10, 5000, 10):
        receiver.handle_frame(frame(offset, b"0123456789"))
    event = receiver.handle_frame(frame(0, b"0123456789"))
    assert event is not None
    assert event.data == b"0123456789" * 500


def test_final_size_cannot_change() -> None:
    receiver = SparseReceiver(0, readable=True)
    receiver.handle_frame(frame(10, b"xx", fin=True))
    with pytest.raises(FinalSizeError):
        receiver.handle_frame(frame(10, b"xxx"))
    with pytest.raises(FinalSizeError):
        receiver.handle_frame(frame(0, b"x", fin=True))


def test_an_end_without_data() -> None:
    receiver = SparseReceiver(0, readable=True)
    receiver.handle_frame(frame(0, b"ab"))
    event = receiver.handle_frame(frame(2, b"", fin=True))
    assert event is not None
    assert event.end_stream
    assert event.data == b""
