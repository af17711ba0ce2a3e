"""Mutated frames: out comes the declared number of bytes or VerificationError, never anything else."""

import random
import resource

from backports import zstd

from edgesync import piece_codec
from edgesync.errors import VerificationError

ROUNDS = 20_000


def test_mutated_frames() -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    sources = [
        zstd.compress(plain, level)
        for level in (1, 3, 19)
        for plain in (b"a" * 3000, bytes(rng.choices(b"abcdefgh", k=3000)), rng.randbytes(500) * 6)
    ]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(ROUNDS):
        frame = bytearray(rng.choice(sources))
        for _ in range(rng.randrange(1, 4)):
            match rng.randrange(4):
                case 0:
                    # Most damage of interest sits in the header.
                    frame[rng.randrange(min(len(frame), rng.choice((14, len(frame)))))] = (
                        rng.randrange(256)
                    )
                case 1:
                    del frame[rng.randrange(len(frame)) :]
                case 2:
                    frame += rng.randbytes(rng.randrange(1, 20))
                case _:
                    frame += rng.choice(sources)
            if not frame:
                break
        try:
            plain = piece_codec.decode("zstd", bytes(frame), 3000)
        except VerificationError:
            continue
        assert len(plain) == 3000
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 10 * 1024, f"peak memory grew by {grown} KiB"
