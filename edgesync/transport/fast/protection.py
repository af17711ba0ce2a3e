"""Header-protection masks for many packets in one call.

Knows aioquic's ``HeaderProtection`` from inside; decides nothing about packets.   Source: RFC 9001 section 5.4.
"""

from collections.abc import Sequence
from typing import Final

from aioquic._crypto import HeaderProtection

SAMPLE_BYTES: Final = 16
"""A sample, and the stride of ``masks``: five bytes of each mask are used."""
_ZEROS: Final = bytes(SAMPLE_BYTES)


def masks(protection: HeaderProtection, samples: Sequence[bytes]) -> bytes:
    """The masks of ``samples`` (16 bytes each), one after the other at a stride of ``SAMPLE_BYTES``."""
    cipher = protection._encryptor
    if not protection._is_chacha20:
        return cipher.update(b"".join(samples))
    parts = []
    for sample in samples:
        cipher.reset_nonce(sample)
        parts.append(cipher.update(_ZEROS))
    return b"".join(parts)
