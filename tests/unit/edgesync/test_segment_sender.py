"""The sender that keeps segments against aioquic's own, on random writes, losses and acknowledgements."""

import random

import pytest
from aioquic.quic.packet_builder import QuicDeliveryState
from aioquic.quic.stream import QuicStreamSender

from edgesync.transport.fast.segments import SegmentSender


@pytest.mark.parametrize("seed", range(40))
def test_it_sends_what_the_stock_sender_sends(seed: int) -> None:
    rng = random.Random(seed)
    senders = [QuicStreamSender(0, True), SegmentSender(0, True)]
    flying: list[tuple[int, int, bool]] = []
    ended = False
    for step in range(400):
        act = rng.random()
        if act < 0.3 and not ended:
            data = rng.randbytes(rng.choice((0, 1, 100, 2047, 2048, 9000)))
            ended = step > 200 and rng.random() < 0.1
            for sender in senders:
                sender.write(data, ended)
        elif act < 0.7:
            size, limit = rng.choice((-1, 0, 1, 1200, 5000)), rng.choice((None, 50_000))
            frames = [sender.get_frame(size, limit) for sender in senders]
            assert frames[0] == frames[1]
            if (frame := frames[0]) is not None:
                flying.append((frame.offset, frame.offset + len(frame.data), frame.fin))
        elif flying:
            start, stop, fin = flying.pop(rng.randrange(len(flying)))
            state = rng.choice((QuicDeliveryState.ACKED, QuicDeliveryState.LOST))
            for sender in senders:
                sender.on_data_delivery(state, start, stop, fin)
        stock, ours = senders
        for name in ("_buffer_start", "_buffer_stop", "highest_offset", "is_finished"):
            assert getattr(stock, name) == getattr(ours, name), name
        assert stock.buffer_is_empty == ours.buffer_is_empty
        assert stock._buffer == b"".join(ours._segments)[-len(stock._buffer) :] or not stock._buffer
    assert sum(map(len, senders[1]._segments)) <= len(senders[0]._buffer) + 9000
    for sender in senders:
        sender.reset(3)
    assert not senders[1]._segments or senders[1].is_finished
