import os
import random
import threading

import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st

from edgesync import limits, piece_codec
from edgesync.errors import VerificationError

KIB = 1024


@given(st.binary(min_size=1, max_size=4096), st.integers(1, 64))
@settings(max_examples=200, deadline=None)
def test_round_trip(seed: bytes, times: int) -> None:
    plain = seed * times
    encoding, data = piece_codec.encode(plain)
    assert len(data) <= len(plain)
    assert piece_codec.decode(encoding, data, len(plain)) == plain


def test_compresses_only_where_it_helps() -> None:
    noise = os.urandom(64 * KIB)
    assert piece_codec.encode(noise) == ("identity", noise)
    assert piece_codec.encode(b"a" * 64 * KIB)[0] == "zstd"
    # 2 % of zeros behind noise: zstd would gain, but less than it is worth.
    nearly = os.urandom(98 * KIB) + bytes(2 * KIB)
    assert piece_codec.encode(nearly)[0] == "identity"


@pytest.mark.parametrize("size", [1, 16 * KIB, 2 << 20, (2 << 20) + 1, 16 << 20])
def test_frames_of_every_piece_size_declare_their_length_and_fit_the_window(size: int) -> None:
    plain = (b"0123456789abcdef" * (size // 16 + 1))[:size]
    encoding, data = piece_codec.encode(memoryview(plain))
    if encoding == "zstd":
        assert zstd.get_frame_info(data).decompressed_size == size
    assert piece_codec.decode(encoding, data, size) == plain


def test_threads_do_not_share_a_compressor() -> None:
    rng = random.Random(7)
    pieces = [bytes(rng.choices(b"abcd", k=20_000)) for _ in range(8)]
    wrong: list[int] = []

    def work() -> None:
        for n, piece in enumerate(pieces * 4):
            if piece_codec.decode(*piece_codec.encode(piece), len(piece)) != piece:
                wrong.append(n)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


PLAIN = b"edge" * 16 * KIB
FRAME = zstd.compress(PLAIN, 3)


def _frame(plain: bytes, **parameters: int) -> bytes:
    options = {
        getattr(zstd.CompressionParameter, name): value for name, value in parameters.items()
    }
    compressor = zstd.ZstdCompressor(options=options)
    return compressor.compress(plain, zstd.ZstdCompressor.FLUSH_FRAME)


def _skippable(body: bytes) -> bytes:
    return b"\x50\x2a\x4d\x18" + len(body).to_bytes(4, "little") + body


DICTIONARY = zstd.train_dict([os.urandom(40) + b"edge%d" % n * 50 for n in range(2000)], 1024)
BOMB_BYTES = 1 << 30
HOSTILE = {
    "empty": b"",
    "noise": os.urandom(100),
    "only a header": FRAME[:12],
    "cut": FRAME[:-1],
    "trailing byte": FRAME + b"\0",
    "second frame": FRAME + _frame(b"x"),
    "second empty frame": FRAME + _frame(b""),
    "skippable frame first": _skippable(b"hidden") + FRAME,
    "skippable frame last": FRAME + _skippable(b"hidden"),
    "no content size": _frame(PLAIN, content_size_flag=0),
    "shorter than said": zstd.compress(PLAIN[:-1], 3),
    "longer than said": zstd.compress(PLAIN + b"x", 3),
    "window of 128 MiB": b"\x28\xb5\x2f\xfd\x80"
    + bytes([17 << 3])
    + len(PLAIN).to_bytes(4, "little"),
    "dictionary": zstd.compress(PLAIN, 3, zstd_dict=DICTIONARY),
    "longer than plain": b"\x28\xb5\x2f\xfd" + bytes(len(PLAIN)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_frames_are_refused(name: str) -> None:
    with pytest.raises(VerificationError):
        piece_codec.decode("zstd", HOSTILE[name], len(PLAIN))


def test_a_bomb_never_inflates_past_the_declared_length() -> None:
    # The header lies: it declares len(PLAIN), the blocks hold 1 GiB of run-length zeros.
    blocks = b"".join(
        ((128 * KIB) << 3 | 1 << 1 | last).to_bytes(3, "little") + b"\0"
        for last in [0] * (BOMB_BYTES // (128 * KIB) - 1) + [1]
    )
    header = b"\x28\xb5\x2f\xfd\x80" + bytes([11 << 3]) + len(PLAIN).to_bytes(4, "little")
    assert len(header + blocks) < len(PLAIN)
    with pytest.raises(VerificationError):
        piece_codec.decode("zstd", header + blocks, len(PLAIN))


@pytest.mark.parametrize("length", [0, -1, limits.MAX_PIECE_BYTES + 1])
def test_lengths_outside_the_bounds_are_refused(length: int) -> None:
    with pytest.raises(VerificationError):
        piece_codec.decode("identity", b"", length)


def test_other_encodings_and_lengths_are_refused() -> None:
    with pytest.raises(VerificationError, match="unknown encoding"):
        piece_codec.decode("gzip", PLAIN, len(PLAIN))
    with pytest.raises(VerificationError):
        piece_codec.decode("identity", PLAIN, len(PLAIN) - 1)
