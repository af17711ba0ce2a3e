"""The caps of one machine or site, as the transport obeys them: a bucket for what is sent, one for what is received.

Sending is held where bodies of pieces are written to streams, in steps of a few hundredths of a second. Receiving is
held by flow control: bytes are taken from streams no faster than the cap, and a peer is let only so far ahead of that
as the path's delay needs. Bodies of pieces count, with ``OVERHEAD`` for their packets; what is lost and sent again,
questions, control messages and MQTT pass beside it.

Which cap holds is ``edgesync.caps``'; this module is told the time and opens nothing.
"""

from collections.abc import Sequence
from typing import Final

from edgesync import caps, limits
from edgesync.rate import TokenBucket

OVERHEAD: Final = 1.05
"""Bytes on the wire for each byte of a body: headers and tags of 1200-byte datagrams."""
AHEAD_S: Final = 0.03
"""Seconds of the cap's rate a peer may be ahead, beyond the round trip."""
MIN_WINDOW_BYTES: Final = 2048


class ReceiveCap(TokenBucket):
    """A cap on what several connections receive together. Event loop only."""

    def __init__(self, rate_bytes_s: float = 0) -> None:
        super().__init__(rate_bytes_s)
        self.streams = 0
        """Answers being read now: they share the window."""

    def window_bytes(self, rtt_s: float) -> int:
        """How far ahead of its reader one stream may be."""
        rate = self.rate_bytes_s or 0.0
        share = rate * (min(rtt_s, 5.0) + AHEAD_S) / max(1, self.streams)
        return max(MIN_WINDOW_BYTES, int(share))


class Throttle:
    """``apply`` what holds; hand ``upload`` and ``download`` to connections."""

    def __init__(self) -> None:
        self.upload = TokenBucket(0)
        self.download = ReceiveCap()
        self.holds_up = caps.Held(0)
        self.holds_down = caps.Held(0)

    def apply(self, found: Sequence[caps.Cap], *, utc_now: float) -> None:
        """Obey the lowest of ``found`` in each direction from now on."""
        self.holds_up = caps.lowest(found, upload=True, utc_now=utc_now)
        self.holds_down = caps.lowest(found, upload=False, utc_now=utc_now)
        up, down = self.holds_up.rate_bytes_s, self.holds_down.rate_bytes_s
        if up != (self.upload.rate_bytes_s or 0):
            self.upload.set_rate(up)
        if down != (self.download.rate_bytes_s or 0):
            self.download.set_rate(down)


def floored(rate_bytes_s: int) -> int:
    """A cap that came over the network, no lower than MIN_CAP_BYTES_S; 0 stays no cap."""
    return max(rate_bytes_s, limits.MIN_CAP_BYTES_S) if rate_bytes_s else 0


__all__ = ["ReceiveCap", "Throttle", "floored"]
