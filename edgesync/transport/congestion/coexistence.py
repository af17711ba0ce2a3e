"""Sharing a bottleneck with senders that fill its queue: when to, and how much to have in flight meanwhile.

BBR v1 beside a loss-based sender is unfair either way: in a queue of one bandwidth-delay product it ignores the drops
and takes nearly all, in a deep one its window of two products is pushed aside. ``Coexistence`` notices that a queue
stands which is not ours to drain, and then gives the window of CUBIC: the same growth and the same back-off as the
neighbour's. Random loss is told from a full queue by what the path lost while no queue was full.

Handing a path to CUBIC's window wrongly is costly, so the evidence must be strong. A queue that stands without losses
is only suspected of being another's until a test (we hold back for a moment) did not make it go: a busy machine looks
the same. A path that loses packets at random is never shared so, because nobody who backs off at each loss could fill
its queue.

Decides from what each round showed; knows neither packets nor pacing.

Source: RFC 9438 sections 4.2 to 4.7 (CUBIC); the mode itself: ADR 0020.
"""

import math
import statistics
from collections import deque
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
CLEAR_S: Final = 0.010
"""Round trips are this much longer on a machine that is busy with other things, without any queue."""
CLEAR_ROUNDS: Final = 3
"""Rounds without a queue after which the neighbour is taken to have gone."""
LOSS_BLOCK_PACKETS: Final = 400
"""The path's own loss is counted in blocks of so many packets, long enough for bursts to show in most of them ..."""
LOSS_BLOCKS: Final = 7
"""... and is the median of so many: a queue that overflows now and then does not show in it."""
LOSS_BLOCK_ROUNDS: Final = 20
"""A slow flow's block is complete after so many rounds: what it believes must not be minutes old."""
SHORTER: Final = 0.9
"""A shortest round trip this much below the one before: the queue stood all the time, what was lost was lost to it."""
MAX_SHARED_LOSS: Final = 0.003
"""A path that loses more than this at random is not shared by CUBIC's window: it would hold 15 packets there, and so
would a neighbour of that kind, which therefore is not who fills the queue."""
TEST_PAUSE_S: Final = 10.0
"""Suspicions that a test dispelled are not tested again sooner: tests cost two per cent at most."""
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
        self._blocks: deque[float] = deque(maxlen=LOSS_BLOCKS)
        self._block_packets = 0
        self._block_lost = 0
        self._block_rounds = 0
        self._base_loss = 0.0
        self._shortest_s = math.inf
        self._standing = 0
        self._not_before = -math.inf
        self._clear = 0
        self._since_loss = LOSS_MEMORY_ROUNDS + 1
        self._deaf_until = 0
        self._longest_s = 0.0
        self._is_full = False

    def expected_losses(self, packets: float) -> float:
        """Losses among ``packets`` that the path's usual loss explains (mean and two deviations)."""
        mean = self._base_loss * packets
        return mean + 2.0 * math.sqrt(mean)

    @property
    def is_lossy(self) -> bool:
        """The path loses at random what no sender that backs off at each loss can live with."""
        return self._base_loss > MAX_SHARED_LOSS

    def is_suspected(self, now: float) -> bool:
        """A deep queue stands and nothing was lost: time for a test, whose end is told to ``on_tested``."""
        return (
            not self.is_active
            and self._standing >= ENTER_ROUNDS
            and now >= self._not_before
            and not self.is_lossy
        )

    def learn_loss(self, seen: Round) -> None:
        """Count a round in which no queue was full: what it lost, the path lost by itself."""
        self._block_packets += seen.packets
        self._block_lost += seen.lost_packets
        self._block_rounds += 1
        share = self._block_lost / max(self._block_packets, 1)
        if self._block_packets >= LOSS_BLOCK_PACKETS or self._block_rounds >= LOSS_BLOCK_ROUNDS:
            self._blocks.append(share)
            self._block_packets = self._block_lost = self._block_rounds = 0
        elif self._blocks:
            return
        # before the first block is complete what there is of it has to do
        self._base_loss = statistics.median(self._blocks) if self._blocks else share

    def _forget_if_shorter(self, min_rtt_s: float) -> None:
        if min_rtt_s < SHORTER * self._shortest_s:
            self._shortest_s = min_rtt_s
            self._blocks.clear()
            self._block_packets = self._block_lost = self._block_rounds = 0
            self._base_loss = 0.0
        elif min_rtt_s < self._shortest_s:
            self._shortest_s = min_rtt_s

    def on_startup_round(self, seen: Round) -> None:
        """A round ended while the rate was still sought: only its losses count, and only without a queue."""
        self._forget_if_shorter(seen.min_rtt_s)
        if seen.packets and _is_clear(seen.rtt_s, seen.min_rtt_s):
            self.learn_loss(seen)

    def on_round(self, seen: Round, *, in_flight_packets: float, now: float) -> None:
        """A round ended outside PROBE_RTT and start-up."""
        if seen.rtt_s == math.inf or not seen.packets:
            return
        self._forget_if_shorter(seen.min_rtt_s)
        queue = seen.rtt_s > max(QUEUE_GAIN * seen.min_rtt_s, seen.min_rtt_s + QUEUE_S)
        deep = seen.rtt_s > max(DEEP_GAIN * seen.min_rtt_s, seen.min_rtt_s + QUEUE_S)
        clear = _is_clear(seen.rtt_s, seen.min_rtt_s)
        waited = seen.rtt_s - seen.min_rtt_s
        self._longest_s = max(waited, self._longest_s * FULL_DECAY)
        self._is_full = not clear and waited >= FULL_SHARE * self._longest_s
        if not self._is_full:
            self.learn_loss(seen)
        if seen.lost_packets > self.expected_losses(seen.packets):
            self._since_loss = 0
        else:
            self._since_loss += 1
        pressed = deep or (queue and self._since_loss <= LOSS_MEMORY_ROUNDS)
        self._standing = self._standing + 1 if pressed else 0
        self._clear = self._clear + 1 if clear else 0
        if self.is_active:
            if self._clear >= CLEAR_ROUNDS or self.is_lossy:
                self.leave()
        elif (
            self._standing >= ENTER_ROUNDS
            and self._since_loss <= LOSS_MEMORY_ROUNDS
            and not self.is_lossy
        ):
            self._enter(in_flight_packets, now)

    def on_tested(
        self, *, rtt_s: float, min_rtt_s: float, in_flight_packets: float, now: float
    ) -> None:
        """We held back and saw ``rtt_s`` at best; ``in_flight_packets`` was in flight before."""
        if _is_clear(rtt_s, min_rtt_s):
            self.leave()  # the queue went as we held back: it was ours
            self._not_before = now + TEST_PAUSE_S
        elif not self.is_active and not self.is_lossy:
            self._enter(in_flight_packets, now)

    def _enter(self, in_flight_packets: float, now: float) -> None:
        self.is_active = True
        self._clear = 0
        self.window = in_flight_packets
        self._back_off(now)

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


def _is_clear(rtt_s: float, min_rtt_s: float) -> bool:
    return rtt_s <= max(CLEAR_GAIN * min_rtt_s, min_rtt_s + CLEAR_S)
