"""How one piece is carried: as it is (``identity``) or as one zstd frame (``zstd``).

It compresses at the gateway and inflates hostile frames under strict caps; it does not hash: the caller compares the
plain bytes with the piece id before it writes them.

Invariants: an encoded piece is never longer than its plain form; ``decode`` allocates at most ``plain_length`` + 1
bytes of output and a window of 2 ** MAX_ZSTD_WINDOW_LOG; whatever comes back has exactly ``plain_length`` bytes.

Both functions are thread-safe; zstd works outside the interpreter lock. The publisher encodes; swarm, seeder and the
``verify`` verb decode.
"""

import sys
import threading
from typing import Final, Literal

from edgesync import limits
from edgesync.errors import VerificationError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Encoding = Literal["identity", "zstd"]
ENCODINGS: Final[tuple[Encoding, ...]] = ("identity", "zstd")

ZSTD_LEVEL: Final = 3
"""Level 6 misses the publish rate, level 1 costs 5 % of size."""
_WORTH_NUM: Final = 97
_WORTH_DEN: Final = 100
_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_DECODER_OPTIONS: Final[dict[int, int]] = {
    int(zstd.DecompressionParameter.window_log_max): limits.MAX_ZSTD_WINDOW_LOG
}
_SMALL_WINDOW_LOG: Final = 19
"""Enough for most pieces (up to 512 KiB), and 1.6 MB less in every thread that compresses."""


class _PerThread(threading.local):
    """Compressors each thread keeps, by window, so that their tables are not set up anew for every piece."""

    def __init__(self) -> None:
        self.compressors: dict[int, zstd.ZstdCompressor] = {}


_per_thread = _PerThread()


def encode(plain: bytes | memoryview) -> tuple[Encoding, bytes]:
    """The form a piece is stored and sent in: zstd where that is at least 3 % smaller, else the plain bytes."""
    small = len(plain) <= 1 << _SMALL_WINDOW_LOG
    window = _SMALL_WINDOW_LOG if small else limits.MAX_ZSTD_WINDOW_LOG
    compressor = _per_thread.compressors.get(window)
    if compressor is None:
        compressor = _per_thread.compressors[window] = zstd.ZstdCompressor(
            options={
                int(zstd.CompressionParameter.compression_level): ZSTD_LEVEL,
                int(zstd.CompressionParameter.window_log): window,
            }
        )
    packed = compressor.compress(plain, zstd.ZstdCompressor.FLUSH_FRAME)
    if len(packed) * _WORTH_DEN <= len(plain) * _WORTH_NUM:
        return "zstd", packed
    return "identity", bytes(plain)


def decode(encoding: str, data: bytes, plain_length: int) -> bytes:
    """Inflate ``data`` to exactly ``plain_length`` bytes, the length the signed manifest gives the piece.

    Raises VerificationError: another length, an unknown encoding, not one whole zstd frame of that content size, a
    dictionary or a window above the cap. The sender is at fault: the source is not asked for this again.
    """
    if not 1 <= plain_length <= limits.MAX_PIECE_BYTES:
        raise VerificationError(
            f"a piece of {plain_length} bytes is outside 1..{limits.MAX_PIECE_BYTES}"
        )
    if encoding == "identity":
        if len(data) != plain_length:
            raise VerificationError(f"a piece of {plain_length} bytes came as {len(data)} bytes")
        return data
    if encoding != "zstd":
        raise VerificationError(f"a piece came in the unknown encoding {encoding[:32]!a}")
    if len(data) > plain_length:
        raise VerificationError(
            f"a piece of {plain_length} bytes came as {len(data)} compressed bytes"
        )
    # Skippable frames have another magic number: they would hide bytes that no hash covers.
    if data[:4] != _MAGIC:
        raise VerificationError("a compressed piece is not a zstd frame")
    decoder = zstd.ZstdDecompressor(options=_DECODER_OPTIONS)
    try:
        info = zstd.get_frame_info(data)
        if info.decompressed_size != plain_length:
            raise VerificationError(
                f"a compressed piece declares {info.decompressed_size} bytes instead of {plain_length}"
            )
        if info.dictionary_id:
            raise VerificationError("a compressed piece asks for a dictionary")
        plain = decoder.decompress(data, plain_length + 1)
    except (zstd.ZstdError, EOFError, ValueError) as exc:
        raise VerificationError(f"a compressed piece cannot be inflated: {exc}") from exc
    if not decoder.eof or decoder.unused_data or len(plain) != plain_length:
        raise VerificationError("a compressed piece is not exactly one zstd frame of its length")
    return plain


__all__ = ["ENCODINGS", "ZSTD_LEVEL", "Encoding", "decode", "encode"]
