"""Which cipher suites are offered and preferred: boards without AES instructions run ChaCha20 several times faster.

It is measured once, in about a millisecond, since no list of processors is ever complete. A server picks by its own
order. So a machine that is much slower with AES does not offer it: then neither end can choose what hurts it.
"""

import functools
import time
from typing import Final

from aioquic.tls import CipherSuite
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

_AES: Final = CipherSuite.AES_128_GCM_SHA256
_AES_256: Final = CipherSuite.AES_256_GCM_SHA384
_CHACHA: Final = CipherSuite.CHACHA20_POLY1305_SHA256
_PROBE_BYTES: Final = 8192
_PROBE_ROUNDS: Final = 5
CLEARLY: Final = 1.5
"""AES must be slower by this factor to be put last: with instructions it is the faster one by as much."""


@functools.cache
def aes_is_slow() -> bool:
    """Whether this machine encrypts with ChaCha20 clearly faster than with AES."""
    return _seconds(AESGCM(bytes(16))) > CLEARLY * _seconds(ChaCha20Poly1305(bytes(32)))


def preferred() -> list[CipherSuite]:
    """What a server takes, best first."""
    return [_CHACHA, _AES, _AES_256] if aes_is_slow() else [_AES, _CHACHA, _AES_256]


def offered() -> list[CipherSuite]:
    """What a client offers. Every EdgeSync server takes ChaCha20."""
    return [_CHACHA] if aes_is_slow() else [_AES, _CHACHA, _AES_256]


def _seconds(cipher: AESGCM | ChaCha20Poly1305) -> float:
    nonce, data = bytes(12), bytes(_PROBE_BYTES)
    best = float("inf")
    for _ in range(_PROBE_ROUNDS):
        started = time.perf_counter()
        cipher.encrypt(nonce, data, None)
        best = min(best, time.perf_counter() - started)
    return best
