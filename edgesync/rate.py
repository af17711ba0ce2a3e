"""A cap on bytes per second for one direction of one machine.

A token bucket that lends: whoever takes more than is there waits until the debt is paid, in the order of asking, so a
piece larger than the bucket still goes through whole. It does not measure; it does not know what the bytes are.
"""

import asyncio
from typing import Final

BURST_S: Final = 0.03
"""How much of a second may go at once after a pause."""


class TokenBucket:
    """``rate_bytes_s`` None or 0: no cap. Event loop only."""

    def __init__(self, rate_bytes_s: float | None) -> None:
        self._rate = float(rate_bytes_s or 0.0)
        self._level = self._rate * BURST_S
        self._at: float | None = None

    @property
    def rate_bytes_s(self) -> float | None:
        return self._rate or None

    @property
    def step_bytes(self) -> int:
        """What to take at a time, so that the average over a second stays near the cap."""
        return max(1024, min(int(self._rate * BURST_S / 2), 1 << 18))

    def set_rate(self, rate_bytes_s: float | None) -> None:
        """Change the cap from now on; a debt is paid at the new rate and never takes longer than before."""
        rate = float(rate_bytes_s or 0.0)
        if rate and self._rate:
            self._level *= min(1.0, rate / self._rate)
        else:
            self._level = 0.0
        self._rate = rate

    def wait_for(self, size_bytes: int, *, now: float) -> float:
        """Take ``size_bytes`` at ``now``; returns the seconds to wait before they may be used."""
        if not self._rate:
            return 0.0
        if self._at is not None:
            self._level = min(self._rate * BURST_S, self._level + (now - self._at) * self._rate)
        self._at = now
        self._level -= size_bytes
        return max(0.0, -self._level / self._rate)

    async def take(self, size_bytes: int) -> None:
        """Return when ``size_bytes`` more may pass."""
        wait = self.wait_for(size_bytes, now=asyncio.get_running_loop().time())
        if wait > 0.0:
            await asyncio.sleep(wait)
