"""What is read is what arrived, in any cut; single bytes do not become single objects."""

import random

from edgesync.transport.read_buffer import ReadBuffer


def test_any_cut_reads_the_same() -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    written, read = bytearray(), bytearray()
    buffer = ReadBuffer()
    for _ in range(2000):
        if rng.random() < 0.5:
            data = rng.randbytes(rng.choice((0, 1, 7, 1023, 1024, 5000, 70_000)))
            written += data
            buffer.append(data)
        elif len(buffer):
            read += buffer.take(rng.randint(0, len(buffer)))
    read += buffer.take(len(buffer))
    assert read == written
    assert not buffer


def test_single_bytes_are_joined() -> None:
    buffer = ReadBuffer()
    for _ in range(100_000):
        buffer.append(b"x")
    assert len(buffer._chunks) == 2
    buffer.clear()
    assert not buffer
