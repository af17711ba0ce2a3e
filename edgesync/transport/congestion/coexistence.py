"""Sharing a bottleneck with senders that fill its queue: when to, and how much to have in flight meanwhile.

BBR v1 beside a loss-based sender is unfair either way: in a queue of one bandwidth-delay product it ignores the drops
and takes nearly all, in a deep one its window of two products is pushed aside. ``Coexistence`` notices that a queue
stands which is not ours to drain, and then gives the window of CUBIC: the same growth and the same back-off as the
neighbour's. Random loss is told from a full queue by what the path lost while no queue stood.

Decides from what each round showed; knows neither packets nor pacing.

Source: RFC 9438 sections 4.2 to 4.7 (CUBIC); the mode itself: ADR 0020.
"""

import math
from dataclasses import dataclass
from typing import Final

CUBIC_C: Final = 0.4
CUBIC_BETA: Final = 0.7
RENO_FRIENDLY: Final = 3.0 * (1.0 - CUBIC_BETA) / (1.0 + CUBIC_BETA)
"""Packets a round that a Reno sender with this back-off would add (RFC 9438, 4.3)."""

QUEUE_GAIN: Final = 1.35
QUEUE_S: Final = 0.020
"""A queue stands when no round trip of a round was below max(gain x shortest, shortest + this)."""
DEEP_GAIN: Final = 2.0
"""Two products in flight, ours alone, cannot make a round trip longer than this: others are there."""
ENTER_ROUNDS: Final = 4
"""Rounds a queue must stand; longer than one probe and its drain."""
LOSS_MEMORY_ROUNDS: Final = 8
"""A queue that is not deep counts only if the path lost more than its usual within this many rounds."""
CLEAR_GAIN: Final = 1.1
CLEAR_S: Final = 0.005
CLEAR_ROUNDS: Final = 3
"""Rounds without a queue after which the neighbour is taken to have gone."""
BASE_LOSS_WEIGHT: Final = 1.0 / 16.0
FULL_SHARE: Final = 0.7
"""A queue is full in the upper part of what was seen of it: losses below that are the path's own."""
FULL_DECAY: Final = 0.98
"""How much of the longest queue a round remembers of the one before."""
MIN_WINDOW_PACKETS: Final = 4


@dataclass(frozen=True, slots=True)
class Round:
    """What one round trip showed."""

    rtt_s: float
    """Shortest round trip in it; infinite if none was measured."""
    min_rtt_s: float
    """Shortest of the path."""
    packets: int
    """Delivered or lost."""
    lost_packets: int


class Coexistence:
    """``window`` (packets) counts only while ``is_active``."""

    def __init__(self) -> None:
        self.is_active = False
        self.window = 0.0
        self._peak = 0.0
        self._epoch: float | None = None
        self._origin_s = 0.0
        self._reno = 0.0
        self._base_loss = 0.0
        self._standing = 0
        self._clear = 0
        self._since_loss = LOSS_MEMORY_ROUNDS + 1
        self._deaf_until = 0
        self._longest_s = 0.0
        self._is_full = False

    def expected_losses(self, packets: float) -> float:
        """Losses among ``packets`` that the path's usual loss explains (mean and two deviations)."""
        mean = self._base_loss * packets
        return mean + 2.0 * math.sqrt(mean)

    def on_round(self, seen: Round, *, in_flight_packets: float, now: float) -> None:
        """A round ended outside PROBE_RTT and start-up."""
        if seen.rtt_s == math.inf or not seen.packets:
            return
        queue = seen.rtt_s > max(QUEUE_GAIN * seen.min_rtt_s, seen.min_rtt_s + QUEUE_S)
        deep = seen.rtt_s > max(DEEP_GAIN * seen.min_rtt_s, seen.min_rtt_s + QUEUE_S)
        clear = seen.rtt_s <= max(CLEAR_GAIN * seen.min_rtt_s, seen.min_rtt_s + CLEAR_S)
        waited = seen.rtt_s - seen.min_rtt_s
        self._longest_s = max(waited, self._longest_s * FULL_DECAY)
        self._is_full = not clear and waited >= FULL_SHARE * self._longest_s
        if not self._is_full:
            share = seen.lost_packets / seen.packets
            self._base_loss += (share - self._base_loss) * BASE_LOSS_WEIGHT
        if seen.lost_packets > self.expected_losses(seen.packets):
            self._since_loss = 0
        else:
            self._since_loss += 1
        pressed = deep or (queue and self._since_loss <= LOSS_MEMORY_ROUNDS)
        self._standing = self._standing + 1 if pressed else 0
        self._clear = self._clear + 1 if clear else 0
        if not self.is_active and self._standing >= ENTER_ROUNDS:
            self.is_active = True
            self.window = in_flight_packets
            self._back_off(now)
        elif self.is_active and self._clear >= CLEAR_ROUNDS:
            self.leave()

    def leave(self) -> None:
        """The queue was ours: alone again."""
        self.is_active = False
        self._standing = 0
        self._clear = 0

    def on_ack(self, *, acked_packets: float, rtt_s: float, now: float) -> None:
        """Grow (RFC 9438, 4.2 to 4.5)."""
        if self._epoch is None:
            self._epoch = now
            self._reno = self.window
            self._origin_s = ((max(self._peak - self.window, 0.0)) / CUBIC_C) ** (1.0 / 3.0)
            self._peak = max(self._peak, self.window)
        time = now - self._epoch + rtt_s
        target = CUBIC_C * (time - self._origin_s) ** 3 + self._peak
        target = min(max(target, self.window), 1.5 * self.window)
        self.window += (target - self.window) / self.window * acked_packets
        alpha = RENO_FRIENDLY if self._reno < self._peak else 1.0
        self._reno += alpha * acked_packets / self.window
        self.window = max(self.window, self._reno)

    def on_losses(self, lost_packets: int, *, round_count: int, now: float) -> bool:
        """``lost_packets`` so far in this round; True if that made it back off (once in two rounds)."""
        if (
            not self._is_full
            or round_count < self._deaf_until
            or lost_packets <= self.expected_losses(self.window)
        ):
            return False
        self._deaf_until = round_count + 2  # what was in flight then is judged already
        self._back_off(now)
        return True

    def _back_off(self, now: float) -> None:
        # fast convergence (4.7): below the last peak, leave room for who is new
        shrinks = self.window < self._peak
        self._peak = self.window * (1.0 + CUBIC_BETA) / 2.0 if shrinks else self.window
        self.window = max(self.window * CUBIC_BETA, MIN_WINDOW_PACKETS)
        self._epoch = None
