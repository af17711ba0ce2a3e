"""Frames over TLS: the published bytes, any cut, and hostile input."""

import random
import time
from pathlib import Path

import pytest

from edgesync import limits
from edgesync.errors import EdgeSyncError, LimitExceededError, MalformedMessageError
from edgesync.transport import mux
from edgesync.transport.mux import Frame, FrameReader, FrameType

VECTORS = {
    "DATA": (mux.encode(FrameType.DATA, 1, b"hello"), Frame(FrameType.DATA, 1, b"hello")),
    "END": (mux.encode(FrameType.END, 1), Frame(FrameType.END, 1, b"")),
    "RESET": (mux.coded(FrameType.RESET, 2, 9), Frame(FrameType.RESET, 2, bytes([0, 0, 0, 9]))),
    "STOP": (mux.coded(FrameType.STOP, 3, 0), Frame(FrameType.STOP, 3, bytes(4))),
    "WINDOW": (mux.window(0, 65_536), Frame(FrameType.WINDOW, 0, (65_536).to_bytes(8, "big"))),
    "STREAMS": (mux.coded(FrameType.STREAMS, 0, 9), Frame(FrameType.STREAMS, 0, b"\0\0\0\x09")),
    "PING": (mux.encode(FrameType.PING, 0, bytes(8)), Frame(FrameType.PING, 0, bytes(8))),
    "PONG": (mux.encode(FrameType.PONG, 0, bytes(8)), Frame(FrameType.PONG, 0, bytes(8))),
    "CLOSE": (mux.close(7, "busy"), Frame(FrameType.CLOSE, 0, b"\0\0\0\x07busy")),
}


def published() -> dict[str, bytes]:
    text = (Path(__file__).parents[2] / "vectors" / "tls" / "frames.hex").read_text()
    rows = [line.split("#")[0].split() for line in text.splitlines()]
    return {row[0]: bytes.fromhex("".join(row[1:])) for row in rows if row}


def merged(frames: list[Frame]) -> list[Frame]:
    """DATA may come in parts."""
    out: list[Frame] = []
    for frame in frames:
        if out and frame.type is FrameType.DATA and out[-1][:2] == frame[:2]:
            out[-1] = Frame(frame.type, frame.stream, out[-1].payload + frame.payload)
        else:
            out.append(frame)
    return out


def test_the_published_bytes() -> None:
    assert published() == {name: data for name, (data, _) in VECTORS.items()}


def test_any_cut_gives_the_same_frames() -> None:
    whole = b"".join(data for data, _ in VECTORS.values())
    wanted = [frame for _, frame in VECTORS.values()]
    for size in range(1, len(whole) + 1):
        reader = FrameReader()
        frames: list[Frame] = []
        for at in range(0, len(whole), size):
            frames += reader.feed(whole[at : at + size])
        assert merged(frames) == wanted


@pytest.mark.parametrize(
    ("header", "error"),
    [
        ("00ffffff00000001", LimitExceededError),
        ("0800010000000000", LimitExceededError),
        ("0000000000000001", MalformedMessageError),
        ("0900000000000001", MalformedMessageError),
        ("0000000100000000", MalformedMessageError),
        ("0600000800000001", MalformedMessageError),
        ("0400000700000001", MalformedMessageError),
    ],
)
def test_a_bad_header_is_refused_before_its_payload(
    header: str, error: type[EdgeSyncError]
) -> None:
    with pytest.raises(error):
        FrameReader().feed(bytes.fromhex(header))


def test_a_long_reason_is_cut() -> None:
    frame = FrameReader().feed(mux.close(1, "ä" * 300))[0]
    assert len(frame.payload) <= 4 + limits.MAX_MUX_REASON_BYTES
    frame.payload[4:].decode()


def test_noise_gives_frames_or_an_error_of_ours() -> None:
    seed = time.time_ns()
    print(f"seed {seed}")
    rng = random.Random(seed)
    whole = b"".join(data for data, _ in VECTORS.values())
    for _ in range(3000):
        data = bytearray(whole if rng.random() < 0.7 else rng.randbytes(rng.randrange(200)))
        for _ in range(rng.randrange(4)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        reader = FrameReader()
        try:
            while data:
                size = rng.randrange(1, 40)
                for frame in reader.feed(bytes(data[:size])):
                    assert len(frame.payload) <= limits.MAX_MUX_DATA_BYTES
                del data[:size]
        except EdgeSyncError:
            pass
