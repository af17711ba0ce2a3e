"""Header-protection masks for many packets in one call, and which cipher this machine is quicker at.

Knows aioquic's ``HeaderProtection`` from inside; decides nothing about packets.   Source: RFC 9001 section 5.4.
"""

import time
from collections.abc import Sequence
from typing import Final

from aioquic._crypto import HeaderProtection
from aioquic.tls import CipherSuite
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

SAMPLE_BYTES: Final = 16
"""A sample, and the stride of ``masks``: five bytes of each mask are used."""
_ZEROS: Final = bytes(SAMPLE_BYTES)
_PROBE_BYTES: Final = 8192
_PROBE_ROUNDS: Final = 5


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


def preferred_ciphers() -> list[CipherSuite]:
    """Cipher suites, the one this machine is quicker at first.

    Boards without AES instructions run ChaCha20 several times faster. It is measured, in about a millisecond.
    """
    aes = CipherSuite.AES_128_GCM_SHA256
    chacha = CipherSuite.CHACHA20_POLY1305_SHA256
    seconds_aes = _seconds(AESGCM(bytes(16)))
    seconds_chacha = _seconds(ChaCha20Poly1305(bytes(32)))
    first = [aes, chacha] if seconds_aes <= seconds_chacha * 1.2 else [chacha, aes]
    return [*first, CipherSuite.AES_256_GCM_SHA384]


def _seconds(cipher: AESGCM | ChaCha20Poly1305) -> float:
    nonce, data = bytes(12), bytes(_PROBE_BYTES)
    best = float("inf")
    for _ in range(_PROBE_ROUNDS):
        started = time.perf_counter()
        cipher.encrypt(nonce, data, None)
        best = min(best, time.perf_counter() - started)
    return best
