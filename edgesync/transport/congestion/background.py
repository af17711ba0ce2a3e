"""A controller that yields: it uses what other traffic leaves and steps back when a queue forms.

It holds the queue at a small delay target, below what any loss-based sender builds, so beside one it shrinks to a few
packets, and alone it fills the link. Loss counts only together with a queue, or when much is lost: random loss is no
sign of other traffic. It does not share evenly with anybody, by design.

Source: RFC 6817 (LEDBAT), draft-irtf-iccrg-ledbat-plus-plus-01 (round trips instead of one-way delay, multiplicative
decrease, slow start that ends at three quarters of the target, slow-downs in which the base delay shows). What differs:
the target is 20 ms at most and half of a shorter queue, where LEDBAT++ takes 60 ms; growth speeds up while the path
stays clear.
"""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import ClassVar, Final

from aioquic.quic.packet_builder import QuicSentPacket

from edgesync import limits
from edgesync.transport.congestion.base import CongestionController, CongestionStatus
from edgesync.transport.congestion.pacer import Pacer

TARGET_S: Final = 0.020
MIN_TARGET_S: Final = 0.005
"""Less cannot be told from delayed ACKs and late timers."""
QUEUE_SHARE: Final = 0.5
"""Of the longest queue seen: in a shallow one a fixed target would never be reached before it overflows."""
QUEUE_DECAY: Final = 0.99
INITIAL_PACKETS: Final = 16
MIN_WINDOW_PACKETS: Final = 2
SLOW_START_SHARE: Final = 0.75
CLEAR_SHARE: Final = 0.5
MAX_CLEAR_ROUNDS: Final = 16
GROWTH: Final = 1.0 / 256.0
"""Of the window, for each round the path has been clear (up to ``MAX_CLEAR_ROUNDS``); at least a packet."""
MOST_DECREASE: Final = 0.5
"""Of the window in a round."""
LOSS_SHARE: Final = 0.1
"""Lost in a round beyond which it steps back even without a queue."""
BASE_BUCKET_S: Final = 10.0
BASE_BUCKETS: Final = 9
"""The shortest round trip of the last minute and a half is the base; a longer route is believed after that."""
SLOWDOWN_S: Final = 20.0
"""Time between slow-downs of ``SLOWDOWN_ROUNDS`` rounds at a few packets: our own queue must not become the base."""
SLOWDOWN_ROUNDS: Final = 2
PACING_GAIN: Final = 1.2
RTT_FLOOR_S: Final = 0.002


class BackgroundController(CongestionController):
    """See the module."""

    name: ClassVar[str] = "background"

    def __init__(self, *, max_datagram_size: int, pacer: Pacer | None = None) -> None:
        super().__init__(max_datagram_size=max_datagram_size)
        self.pacer = pacer or Pacer(max_datagram_size=max_datagram_size)
        self._sent = 0
        self._acked = 0
        self._lost = 0
        self._begin(0.0)

    def _begin(self, now: float) -> None:
        self._window = float(INITIAL_PACKETS * self.max_datagram_size)
        self._slow_start = True
        self._base: deque[tuple[float, float]] = deque(maxlen=BASE_BUCKETS)
        self._longest = 0.0
        self._clear_rounds = 0
        self._yielding = False
        self._limited = False
        self._round_ends = self._sent
        self._round_rtt = math.inf
        self._last_rtt = math.inf
        self._round_lost = self._lost
        self._round_acked = self._acked
        self._slowdown_at = now + SLOWDOWN_S
        self._slowdown_rounds = 0
        self._resume_window = 0.0
        self._bound()

    def on_packet_sent(self, *, packet: QuicSentPacket) -> None:
        self.on_burst_sent((packet,))

    def on_packet_acked(self, *, now: float, packet: QuicSentPacket) -> None:
        self.on_burst_acked((packet,), now)

    def on_burst_sent(self, packets: Sequence[QuicSentPacket]) -> None:
        size = sum([packet.sent_bytes for packet in packets])
        self.bytes_in_flight += size
        self._sent += size

    def on_burst_acked(self, packets: Sequence[QuicSentPacket], now: float) -> None:
        size = sum([packet.sent_bytes for packet in packets])
        self.bytes_in_flight = max(0, self.bytes_in_flight - size)
        self._acked += size

    def on_packets_expired(self, *, packets: Iterable[QuicSentPacket]) -> None:
        for packet in packets:
            self.bytes_in_flight = max(0, self.bytes_in_flight - packet.sent_bytes)
            self._sent -= packet.sent_bytes

    def on_packets_lost(self, *, now: float, packets: Iterable[QuicSentPacket]) -> None:
        for packet in packets:
            self.bytes_in_flight = max(0, self.bytes_in_flight - packet.sent_bytes)
            self._lost += packet.sent_bytes

    def on_persistent_congestion(self) -> None:
        self._window = float(MIN_WINDOW_PACKETS * self.max_datagram_size)
        self._clear_rounds = 0
        self._bound()

    def on_rtt_measurement(self, *, now: float, rtt: float) -> None:
        if not 0.0 < rtt < math.inf:
            return
        self._round_rtt = min(self._round_rtt, rtt)
        bucket = math.floor(now / BASE_BUCKET_S)
        if not self._base or self._base[-1][0] != bucket:
            self._base.append((bucket, rtt))
        elif rtt < self._base[-1][1]:
            self._base[-1] = (bucket, rtt)

    def on_ack_end(self, now: float) -> None:
        if self._acked + self._lost >= self._round_ends and self._round_rtt < math.inf:
            self._end_round(now)
            self._round_ends = self._sent
        self._bound()

    def on_app_limited(self) -> None:
        self._limited = True

    def on_path_change(self, now: float) -> None:
        self._begin(now)

    def follow(self, before: CongestionController, now: float) -> None:
        self._begin(now)
        super().follow(before, now)  # it begins with its own small window: it is asked to step back
        self._sent = self._acked + self._lost + self.bytes_in_flight

    def set_rate_cap(self, bytes_per_s: float) -> None:
        super().set_rate_cap(bytes_per_s)
        self._bound()

    def set_window_cap(self, size_bytes: int) -> None:
        super().set_window_cap(size_bytes)
        self._bound()

    def status(self) -> CongestionStatus:
        base = self._base_rtt()
        return CongestionStatus(
            name=self.name,
            state="slow start" if self._slow_start else "delay target",
            rate_bytes_s=self.pacer.rate_bytes_s,
            min_rtt_s=base if base < math.inf else None,
            window_bytes=self.congestion_window,
            yielding=self._yielding,
        )

    def _base_rtt(self) -> float:
        return min((rtt for _, rtt in self._base), default=math.inf)

    def _end_round(self, now: float) -> None:
        queue = max(0.0, self._round_rtt - self._base_rtt())
        lost = self._lost - self._round_lost
        acked = self._acked - self._round_acked
        was_limited = self._limited
        self._last_rtt = self._round_rtt
        self._round_rtt = math.inf
        self._round_lost = self._lost
        self._round_acked = self._acked
        self._limited = False
        self._longest = max(queue, self._longest * QUEUE_DECAY)
        target = min(TARGET_S, max(MIN_TARGET_S, self._longest * QUEUE_SHARE))
        if self._slowdown_rounds:
            self._slowdown_rounds -= 1
            if not self._slowdown_rounds:
                self._window = self._resume_window
                self._slowdown_at = now + SLOWDOWN_S
            return
        harmful = lost and (queue > CLEAR_SHARE * target or lost > LOSS_SHARE * (lost + acked))
        if harmful:
            self._slow_start = False
            self._step_back(MOST_DECREASE)
        elif queue > target:
            self._slow_start = False
            self._step_back(min(MOST_DECREASE, (queue - target) / target * 0.5))
        else:
            self._grow(queue, target, was_limited=was_limited)
        if now >= self._slowdown_at and not self._slow_start:
            self._resume_window = self._window
            self._window = float(4 * self.max_datagram_size)
            self._slowdown_rounds = SLOWDOWN_ROUNDS

    def _step_back(self, share: float) -> None:
        self._yielding = True
        self._clear_rounds = 0
        self._window *= 1.0 - share

    def _grow(self, queue: float, target: float, *, was_limited: bool) -> None:
        self._yielding = False
        if was_limited:
            return
        size = self.max_datagram_size
        if self._slow_start:
            if queue > SLOW_START_SHARE * target:
                self._slow_start = False
            else:
                self._window *= 2.0
            return
        if queue < CLEAR_SHARE * target:
            self._clear_rounds = min(self._clear_rounds + 1, MAX_CLEAR_ROUNDS)
        else:
            self._clear_rounds = 0
        step = max(size, self._window * self._clear_rounds * GROWTH)
        self._window += step * (1.0 - queue / target)

    def _bound(self) -> None:
        size = self.max_datagram_size
        least = float(MIN_WINDOW_PACKETS * size)
        most = float(self.window_cap_bytes or limits.MAX_PATH_WINDOW_BYTES)
        most = min(most, limits.MAX_PATH_WINDOW_BYTES)
        self._window = max(least, min(self._window, most))
        self.congestion_window = int(self._window)
        rtt = self._round_rtt if self._round_rtt < math.inf else self._last_rtt
        rate = self._window * 10.0 if rtt == math.inf else self._window / max(rtt, RTT_FLOOR_S)
        rate = min(PACING_GAIN * rate, limits.MAX_PATH_RATE_BYTES_S)
        if self.rate_cap_bytes_s:
            rate = min(rate, self.rate_cap_bytes_s)
        self.pacer.set_rate(rate)
