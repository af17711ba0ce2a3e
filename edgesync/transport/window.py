"""How far a peer may be ahead of the reader on one connection: grown from what the path turns out to carry.

A receiver that grants too little caps a long path at window / RTT; one that grants much pays with memory whenever a
packet is missing. So windows start small and double while the peer uses them up faster than the path's delay explains.
It decides a number; reserving it in the budget and telling the peer are the link's. Pure: time is an argument.
"""

from typing import Final

from edgesync import limits

ROUND_TRIPS: Final = 4.0
"""A window is large enough when using it up takes so many round trips: a packet lost twice holds up delivery for about
three, and the sender must not be stopped meanwhile."""


FIRST_RATE_BYTES_S: Final = 2_500_000.0
"""Assumed of a long path before anything was measured: its sender's window doubles each round trip, and ours must not
be what stops it."""


class WindowTuner:
    """One connection's answer window in bytes; it never shrinks."""

    def __init__(self, window: int = limits.FIRST_ANSWER_WINDOW_BYTES) -> None:
        self.window = window
        self._counted = 0
        self._since: float | None = None

    def begin(self, *, rtt: float) -> int:
        """The window for a new answer on a path of ``rtt`` seconds."""
        first = int(FIRST_RATE_BYTES_S * ROUND_TRIPS * rtt)
        self.window = max(self.window, min(first, limits.MAX_ANSWER_WINDOW_BYTES))
        return self.window

    def consumed(self, size: int, *, now: float, rtt: float) -> bool:
        """Count bytes the reader took; True when the window grew. ``rtt`` in seconds, 0.0 while unknown."""
        if self._since is None:
            self._since = now
        self._counted += size
        if 2 * self._counted < self.window:
            return False
        elapsed = now - self._since
        self._counted = 0
        self._since = now
        if 2 * elapsed > ROUND_TRIPS * rtt or self.window >= limits.MAX_ANSWER_WINDOW_BYTES:
            return False
        self.window = min(2 * self.window, limits.MAX_ANSWER_WINDOW_BYTES)
        return True
