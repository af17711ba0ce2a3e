"""How much reordering loss detection puts up with: more after a packet that was taken for lost arrives.

Decides the two thresholds of loss detection from what was declared lost and what was acknowledged later. It declares
nothing lost, reads no clock and sends nothing.

A peer can raise both by acknowledging late; it gains that its losses are found a little later, within the bounds here.

Source: RFC 9002 sections 6.1.1 and 6.1.2 (thresholds may be raised after spurious losses).
"""

from bisect import bisect_left, insort
from typing import Final

from aioquic.quic.rangeset import RangeSet

from edgesync import limits

PACKET_THRESHOLD: Final = 3
TIME_THRESHOLD: Final = 9 / 8
TIME_STEP: Final = 1 / 8
MAX_TIME_THRESHOLD: Final = 1.5
CALM_S: Final = 30.0
"""So long after the last spurious loss the packet threshold is halved and the time threshold lowered by a step: paths
change, and a loss found late is repaired late."""


class Reordering:
    """The thresholds of one packet number space."""

    def __init__(self) -> None:
        self.packet_threshold = PACKET_THRESHOLD
        """A packet is lost when one sent so many later is acknowledged."""
        self.time_threshold = TIME_THRESHOLD
        """In round trips."""
        self.spurious = 0
        """Packets that were declared lost and arrived."""
        self._lost: list[int] = []
        self._by_time: set[int] = set()
        self._calm_at = 0.0

    def on_lost(self, number: int, *, largest_acked: int) -> None:
        """Packet ``number`` is declared lost."""
        insort(self._lost, number)
        if largest_acked - number < self.packet_threshold:
            self._by_time.add(number)

    def on_ack(self, acked: RangeSet, *, largest_acked: int, now: float) -> None:
        """An ACK frame came; ``largest_acked`` includes it."""
        if self._lost:
            self._find_spurious(acked, largest_acked, now)
            self._forget_below(largest_acked - limits.MAX_REORDERED_PACKETS)
        if now >= self._calm_at and self._is_raised():
            self.packet_threshold = max(PACKET_THRESHOLD, self.packet_threshold // 2)
            self.time_threshold = max(TIME_THRESHOLD, self.time_threshold - TIME_STEP)
            self._calm_at = now + CALM_S

    def _is_raised(self) -> bool:
        return self.packet_threshold > PACKET_THRESHOLD or self.time_threshold > TIME_THRESHOLD

    def _find_spurious(self, acked: RangeSet, largest_acked: int, now: float) -> None:
        lost = self._lost
        is_late = False
        for span in acked:
            if span.stop <= lost[0]:
                continue
            first = bisect_left(lost, span.start)
            last = bisect_left(lost, span.stop, first)
            for number in lost[first:last]:
                self.spurious += 1
                if number in self._by_time:
                    self._by_time.discard(number)
                    is_late = True
                else:
                    extent = min(largest_acked - number + 1, limits.MAX_REORDERED_PACKETS)
                    self.packet_threshold = max(self.packet_threshold, extent)
                self._calm_at = now + CALM_S
            del lost[first:last]
            if not lost:
                break
        if is_late:  # one step for all that came late together
            self.time_threshold = min(MAX_TIME_THRESHOLD, self.time_threshold + TIME_STEP)

    def _forget_below(self, number: int) -> None:
        old = bisect_left(self._lost, number)
        if old:
            self._by_time.difference_update(self._lost[:old])
            del self._lost[:old]
