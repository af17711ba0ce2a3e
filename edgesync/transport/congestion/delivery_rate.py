"""How fast a path delivers: one sample per ACK, and the largest of the last rounds.

Counts bytes and takes times as given; it knows neither windows nor pacing.

Source: draft-cheng-iccrg-delivery-rate-estimation-02 (sections 3.2 and 3.3); the filter: draft-cardwell-iccrg-bbr-
congestion-control-00 section 4.1.1.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from aioquic.quic.packet_builder import QuicSentPacket

Stamp = tuple[int, float, float, int, "DeliveryRate"]
"""delivered, delivered_time, first_sent_time and app_limited as a packet left, and whose books these are."""


@dataclass(frozen=True, slots=True)
class RateSample:
    """What one ACK frame says."""

    rate_bytes_s: float
    """0 when no time passed: it says nothing."""
    prior_delivered: int
    """Bytes delivered when the packet it is taken from left."""
    acked_bytes: int
    is_app_limited: bool


class DeliveryRate:
    """The sender's books of what was delivered when."""

    def __init__(self) -> None:
        self.delivered = 0
        """Bytes acknowledged since the connection began."""
        self._delivered_time = 0.0
        self._first_sent_time = 0.0
        self._app_limited = 0
        """Samples are app-limited until this many bytes are delivered; 0: they are not."""
        self._stamp: Stamp | None = None
        self._best: Stamp | None = None
        self._best_sent = 0.0
        self._acked = 0

    def start(self, now: float) -> None:
        """Begin the books while packets are in flight that are not in them."""
        self._delivered_time = self._first_sent_time = now
        self._stamp = None

    def on_sent(self, packets: Sequence[QuicSentPacket], *, nothing_in_flight: bool) -> None:
        """Packets leave together."""
        if nothing_in_flight:
            self._first_sent_time = self._delivered_time = float(packets[0].sent_time or 0.0)
            self._stamp = None
        if self._stamp is None:  # a burst shares one
            self._stamp = (
                self.delivered,
                self._delivered_time,
                self._first_sent_time,
                self._app_limited,
                self,
            )
        stamp = self._stamp
        for packet in packets:
            cast("Any", packet).cc = stamp

    def on_acked(self, packets: Sequence[QuicSentPacket], now: float) -> int:
        """Packets that one ACK frame acknowledges; their bytes."""
        size = 0
        best = self._best
        for packet in packets:
            size += packet.sent_bytes
            stamp = cast("Stamp | None", getattr(packet, "cc", None))
            if stamp is None or stamp[4] is not self:
                continue  # it left under another controller
            if best is None or stamp[0] >= best[0]:
                best = stamp
                self._best_sent = float(packet.sent_time or 0.0)
        self._best = best
        self.delivered += size
        self._acked += size
        self._delivered_time = now
        self._stamp = None
        return size

    def on_app_limited(self, bytes_in_flight: int) -> None:
        limited = max(self.delivered + bytes_in_flight, 1)
        if limited != self._app_limited:
            self._app_limited = limited
            self._stamp = None

    @property
    def is_app_limited(self) -> bool:
        return self._app_limited != 0

    def sample(self, now: float) -> RateSample | None:
        """Close the sample of an ACK frame; None if it acknowledged nothing of ours.

        The longer of the times between sending and between ACKs counts, so neither ACKs that come in a bunch nor a
        peer that acknowledges early can show more than was sent (section 3.3).
        """
        best = self._best
        acked = self._acked
        self._acked = 0
        if best is None:
            return None
        self._best = None
        delivered, delivered_time, first_sent_time, app_limited, _ = best
        self._first_sent_time = self._best_sent
        self._stamp = None
        if self._app_limited and self.delivered > self._app_limited:
            self._app_limited = 0
        elapsed = max(now - delivered_time, self._best_sent - first_sent_time)
        rate = (self.delivered - delivered) / elapsed if elapsed > 0.0 else 0.0
        return RateSample(rate, delivered, acked, app_limited != 0)


class MaxFilter:
    """The largest value of the last ``rounds`` rounds. Holds at most one entry a round."""

    def __init__(self, rounds: int) -> None:
        self._rounds: Final = rounds
        self._entries: deque[tuple[int, float]] = deque()

    def update(self, value: float, round_count: int) -> None:
        entries = self._entries
        while entries and entries[-1][1] <= value:
            entries.pop()
        if not entries or entries[-1][0] != round_count:
            entries.append((round_count, value))

    def best(self, round_count: int) -> float:
        """0 before the first value; the last value stays however old it is."""
        entries = self._entries
        while len(entries) > 1 and entries[0][0] < round_count - self._rounds:
            entries.popleft()
        return entries[0][1] if entries else 0.0
