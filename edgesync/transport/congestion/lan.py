"""A window-based controller for local networks: slow start, additive growth, a mild back-off, large bursts.

On a LAN round trips are shorter than timers and delayed ACKs, so a measured rate mostly measures wake-ups; a window
does not care. It grows faster and backs off less than stock Reno, never past its cap, and does not leave slow start
for the jitter of round trips, which stock aioquic does. It is no controller for wide-area paths: random loss slows it.

Source: RFC 5681 (slow start, congestion avoidance), RFC 9002 section 7 (one back-off a round trip).
"""

import math
from collections.abc import Iterable, Sequence
from typing import ClassVar, Final

from aioquic.quic.packet_builder import QuicSentPacket

from edgesync import limits
from edgesync.transport.congestion.base import CongestionController, CongestionStatus
from edgesync.transport.congestion.pacer import Pacer

INITIAL_PACKETS: Final = 32
MIN_WINDOW_PACKETS: Final = 8
"""As many as one delayed ACK waits for."""
BACK_OFF: Final = 0.7
GROWTH_PACKETS: Final = 2
"""Packets a round trip after slow start: a LAN's round trip is a thousandth of those Reno's one packet was made for."""
QUEUE_S: Final = 0.025
"""Slow start ends when round trips are longer than the shortest by this: a switch's queue is full long before."""
PACING_GAIN: Final = 4.0
"""The window governs; the pacer only keeps a whole window from leaving in one burst."""
MIN_BURST: Final = 64
RTT_FLOOR_S: Final = 0.001


class LanController(CongestionController):
    """See the module."""

    name: ClassVar[str] = "lan"

    def __init__(self, *, max_datagram_size: int, pacer: Pacer | None = None) -> None:
        super().__init__(max_datagram_size=max_datagram_size)
        self.pacer = pacer or Pacer(max_datagram_size=max_datagram_size)
        self.pacer.min_burst = MIN_BURST
        self.acked_packets = 0
        """Since it took over: with the losses, what tells a LAN from another path."""
        self._begin()

    def _begin(self) -> None:
        self.congestion_window = INITIAL_PACKETS * self.max_datagram_size
        self.ssthresh = None
        self._recovery_from = -math.inf
        self._min_rtt = math.inf
        self._smoothed = 0.0
        self._limited = False
        self._bound()

    def on_packet_sent(self, *, packet: QuicSentPacket) -> None:
        self.on_burst_sent((packet,))

    def on_burst_sent(self, packets: Sequence[QuicSentPacket]) -> None:
        self.bytes_in_flight += sum([packet.sent_bytes for packet in packets])
        self._limited = False

    def on_packet_acked(self, *, now: float, packet: QuicSentPacket) -> None:
        self.on_burst_acked((packet,), now)

    def on_burst_acked(self, packets: Sequence[QuicSentPacket], now: float) -> None:
        self.acked_packets += len(packets)
        was_full = self.bytes_in_flight * 2 >= self.congestion_window
        acked = size = 0
        for packet in packets:
            acked += packet.sent_bytes
            if (packet.sent_time or 0.0) > self._recovery_from:
                size += packet.sent_bytes
        self.bytes_in_flight = max(0, self.bytes_in_flight - acked)
        if not size or not was_full or self._limited:
            return  # a window that was not used is not proved (RFC 9002, 7.8)
        if self.ssthresh is None or self.congestion_window < self.ssthresh:
            self.congestion_window += size
        else:
            step = GROWTH_PACKETS * self.max_datagram_size * size
            self.congestion_window += max(1, step // self.congestion_window)

    def on_packets_expired(self, *, packets: Iterable[QuicSentPacket]) -> None:
        for packet in packets:
            self.bytes_in_flight = max(0, self.bytes_in_flight - packet.sent_bytes)

    def on_packets_lost(self, *, now: float, packets: Iterable[QuicSentPacket]) -> None:
        latest = -math.inf
        for packet in packets:
            self.bytes_in_flight = max(0, self.bytes_in_flight - packet.sent_bytes)
            latest = max(latest, packet.sent_time or 0.0)
        if latest > self._recovery_from:
            self._recovery_from = now
            self.congestion_window = int(self.congestion_window * BACK_OFF)
            self.ssthresh = self.congestion_window
            self._bound()

    def on_persistent_congestion(self) -> None:
        self.congestion_window = MIN_WINDOW_PACKETS * self.max_datagram_size
        self._recovery_from = -math.inf
        self._bound()

    def on_rtt_measurement(self, *, now: float, rtt: float) -> None:
        if not 0.0 < rtt < math.inf:
            return
        self._min_rtt = min(self._min_rtt, rtt)
        self._smoothed += (rtt - self._smoothed) / 8 if self._smoothed else rtt
        if self.ssthresh is None and self._smoothed > self._min_rtt + QUEUE_S:
            self.ssthresh = self.congestion_window

    def on_ack_end(self, now: float) -> None:
        self._bound()

    def on_app_limited(self) -> None:
        self._limited = True

    def on_path_change(self, now: float) -> None:
        self._begin()

    def set_rate_cap(self, bytes_per_s: float) -> None:
        super().set_rate_cap(bytes_per_s)
        self._bound()

    def set_window_cap(self, size_bytes: int) -> None:
        super().set_window_cap(size_bytes)
        self._bound()

    def _bound(self) -> None:
        window = min(self.congestion_window, limits.MAX_PATH_WINDOW_BYTES)
        if self.window_cap_bytes:
            window = min(window, self.window_cap_bytes)
        self.congestion_window = max(window, MIN_WINDOW_PACKETS * self.max_datagram_size)
        rate = 0.0
        if self._smoothed:
            rate = PACING_GAIN * self.congestion_window / max(self._smoothed, RTT_FLOOR_S)
            rate = min(rate, limits.MAX_PATH_RATE_BYTES_S)
        if self.rate_cap_bytes_s:
            rate = min(rate or math.inf, self.rate_cap_bytes_s)
        self.pacer.set_rate(rate)

    def status(self) -> CongestionStatus:
        slow_start = self.ssthresh is None or self.congestion_window < self.ssthresh
        return CongestionStatus(
            name=self.name,
            state="slow start" if slow_start else "congestion avoidance",
            rate_bytes_s=self.pacer.rate_bytes_s,
            min_rtt_s=self._min_rtt if self._min_rtt < math.inf else None,
            window_bytes=self.congestion_window,
            yielding=False,
        )
