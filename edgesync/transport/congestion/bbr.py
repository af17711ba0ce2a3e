"""A model-based controller for wide-area paths: BBR v1 with a safety valve.

It measures what the path delivers and its shortest round trip, sends at that rate and keeps about two
bandwidth-delay products in flight. Random loss changes nothing; it is judged only when it persists (the valve). It does
not detect loss, retransmit or read a clock.

Source: draft-cardwell-iccrg-bbr-congestion-control-00 (sections named below; "BBR v1") and
draft-cheng-iccrg-delivery-rate-estimation-02. What differs from it, and why, with figures: ADR 0020.

- ``congestion_window`` is at least ``MIN_WINDOW_PACKETS`` and the rate at least ``MIN_RATE_PACKETS_S``: whatever was
  measured, the path is tried again.
- Neither exceeds ``MAX_PATH_WINDOW_BYTES`` and ``MAX_PATH_RATE_BYTES_S``: a peer that acknowledges what it has not
  received gains nothing beyond that.
"""

import enum
import math
import random
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Final

from aioquic.quic.packet_builder import QuicSentPacket

from edgesync import limits
from edgesync.transport.congestion.base import CongestionController, CongestionStatus
from edgesync.transport.congestion.coexistence import Coexistence, Round
from edgesync.transport.congestion.delivery_rate import DeliveryRate, MaxFilter, RateSample
from edgesync.transport.congestion.pacer import Pacer

HIGH_GAIN: Final = 2.885
"""2/ln 2: the smallest that doubles the rate each round (4.3.2)."""
STARTUP_WINDOW_GAIN: Final = 2.0
"""Not 2.885: the same goodput with a quarter of the packets lost as start-up overshoots."""
WINDOW_GAIN: Final = 2.0
"""Room for delayed and bunched ACKs (4.2.3.2)."""
PROBE_GAIN: Final = 1.25
DRAIN_GAIN: Final = 0.75
PACING_MARGIN: Final = 0.99
"""A hair under the measured rate, so that a queue once built empties and the shortest round trip shows again."""
BANDWIDTH_ROUNDS: Final = 10
CRUISE_ROUNDS: Final = (4, 7)
"""Rounds at the measured rate between two probes, drawn anew: flows on one link do not probe in step."""
MIN_RTT_WINDOW_S: Final = 10.0
MIN_RTT_SLACK: Final = 1.05
MIN_RTT_SLACK_S: Final = 0.0005
"""A round trip this near the shortest confirms it: no need to empty the pipe to see it."""
PROBE_RTT_S: Final = 0.2
PROBE_RTT_GAIN: Final = 0.5
"""Half a BDP empties a queue of our own making as well as four packets do, at a fraction of the cost."""
STARTUP_FULL_ROUNDS: Final = 3
STARTUP_GROWTH: Final = 1.25
STARTUP_LOSS: Final = 0.25
"""A shallow queue overflows long before three flat rounds: leave start-up at once."""
STARTUP_LOSS_PACKETS: Final = 8
RTT_FLOOR_S: Final = 0.004
"""Rounds, phases and BDP are not measured in less: timers and delayed ACKs are as long."""
WINDOW_SLACK_S: Final = 0.012
"""Rate times this is in flight on top of the BDP: a burst of 4 ms and an ACK delayed by 8."""
WINDOW_SLACK_PACKETS: Final = 8
INITIAL_RATE_PACKETS_S: Final = 320
INITIAL_PACKETS: Final = (32, 128)
"""First window: what ``INITIAL_RATE_PACKETS_S`` holds in a round trip, within these bounds. A satellite path gets 128
and is at full rate 3 s sooner."""
MIN_WINDOW_PACKETS: Final = 4
MIN_RATE_PACKETS_S: Final = 2

VALVE_LOSS: Final = 0.18
"""Share lost in a round beyond which it counts as harm: v1 holds up to 20 %, few real paths lose as much."""
VALVE_ROUNDS: Final = 3
VALVE_STEP: Final = 0.85
VALVE_RECOVERY: Final = 1.1
VALVE_MIN: Final = 0.3

SHARE_PACING_GAIN: Final = 1.2
"""While sharing the window governs; the pacer only spreads it."""
SHARE_TEST_S: Final = 10.0
"""Time between tests whether the queue is ours."""
SHARE_FIRST_TEST_S: Final = 1.0
"""The first comes soon: a link that became slower shows a queue that is ours alone."""
SHARE_TEST_MIN_S: Final = 7.0
SHARE_DROP: Final = 0.88
"""A round trip shorter by this than the round's before is others holding back: a test now shows the path
empty. So flows of this kind test together, though none knows of the others."""
SHARE_RTT_GROWTH: Final = 1.1


class State(enum.Enum):
    """Section 4.3."""

    STARTUP = "startup"
    DRAIN = "drain"
    PROBE_BW = "probe_bw"
    PROBE_RTT = "probe_rtt"
    SHARING = "sharing"
    """Not in the draft: others fill the queue, see ``coexistence``."""


class Phase(enum.Enum):
    """Of PROBE_BW (4.3.4)."""

    PROBE = "probe"
    DRAIN = "drain"
    CRUISE = "cruise"


_PHASE_GAIN: Final = {Phase.PROBE: PROBE_GAIN, Phase.DRAIN: DRAIN_GAIN, Phase.CRUISE: 1.0}


class BbrController(CongestionController):
    """See the module. ``rng`` draws the phases of PROBE_BW."""

    name: ClassVar[str] = "bbr"

    def __init__(
        self, *, max_datagram_size: int, rng: random.Random, pacer: Pacer | None = None
    ) -> None:
        super().__init__(max_datagram_size=max_datagram_size)
        self.pacer = pacer or Pacer(max_datagram_size=max_datagram_size)
        self._rng = rng
        self._rate = DeliveryRate()
        self._lost = 0
        self._lost_packets = 0
        self._begin(0.0)

    def _begin(self, now: float) -> None:
        """Know nothing of the path."""
        self._bandwidth = 0.0
        self._latest_rate = 0.0
        self._filter = MaxFilter(BANDWIDTH_ROUNDS)
        self._min_rtt = math.inf
        self._min_rtt_at = now
        self._last_ack_at = now
        self._began = self._rate.delivered
        # rounds (4.1.1.3)
        self._round = 0
        self._filter_round = 0
        self._round_ends = self._rate.delivered
        self._round_at = now
        self._round_rtt = math.inf
        self._last_round_rtt = math.inf
        self._round_delivered = self._rate.delivered
        self._round_lost = self._lost
        self._round_lost_packets = self._lost_packets
        # the machine
        self._state = State.STARTUP
        self._full_bandwidth = 0.0
        self._full_rounds = 0
        self._is_full = False
        self._phase = Phase.CRUISE
        self._phase_at = now
        self._phase_length = 1
        self._phase_bandwidth = 0.0
        self._probe_rtt_ends: float | None = None
        self._probe_rtt_round = 0
        self._probe_rtt_window = 0
        self._probe_rtt_best = math.inf
        # the valve
        self._lossy_rounds = 0
        self._sharing = Coexistence()
        self._share_test_at = now
        self._suspects = False
        self._tested_packets = 0.0
        self._valve = 1.0
        self._pacing = INITIAL_RATE_PACKETS_S * HIGH_GAIN * self.max_datagram_size
        self.congestion_window = INITIAL_PACKETS[0] * self.max_datagram_size
        self._apply_rate()

    # --- what aioquic calls

    def on_packet_sent(self, *, packet: QuicSentPacket) -> None:
        self.on_burst_sent((packet,))

    def on_packet_acked(self, *, now: float, packet: QuicSentPacket) -> None:
        self.on_burst_acked((packet,), now)

    def on_burst_sent(self, packets: Sequence[QuicSentPacket]) -> None:
        if packets:
            self._rate.on_sent(packets, nothing_in_flight=self.bytes_in_flight <= 0)
            self.bytes_in_flight += sum([packet.sent_bytes for packet in packets])

    def on_burst_acked(self, packets: Sequence[QuicSentPacket], now: float) -> None:
        size = self._rate.on_acked(packets, now)
        self.bytes_in_flight = max(0, self.bytes_in_flight - size)

    def on_packets_expired(self, *, packets: Iterable[QuicSentPacket]) -> None:
        """A probe timeout or a discarded space: no sign of loss."""
        for packet in packets:
            self._forget(packet)

    def on_packets_lost(self, *, now: float, packets: Iterable[QuicSentPacket]) -> None:
        for packet in packets:
            self._forget(packet)
            self._lost += packet.sent_bytes
            self._lost_packets += 1

    def _forget(self, packet: QuicSentPacket) -> None:
        self.bytes_in_flight = max(0, self.bytes_in_flight - packet.sent_bytes)

    def on_persistent_congestion(self) -> None:
        """An outage: start over with half a BDP, at the rate known before; each ACK gives its bytes back."""
        half = int(self._bdp() * PROBE_RTT_GAIN)
        self.congestion_window = max(MIN_WINDOW_PACKETS * self.max_datagram_size, half)
        self._round_lost = self._lost  # what an outage swallowed is not the path's loss rate
        self._round_lost_packets = self._lost_packets

    def on_rtt_measurement(self, *, now: float, rtt: float) -> None:
        if not 0.0 < rtt < math.inf:
            return
        if self._min_rtt == math.inf:
            self._first_rtt(rtt)
        self._round_rtt = min(self._round_rtt, rtt)
        if rtt <= self._min_rtt:
            self._min_rtt = rtt
            self._min_rtt_at = now
        elif rtt <= self._min_rtt * MIN_RTT_SLACK + MIN_RTT_SLACK_S:
            self._min_rtt_at = now
        if self._state is State.PROBE_RTT:
            self._probe_rtt_best = min(self._probe_rtt_best, rtt)

    # --- our hooks

    def on_app_limited(self) -> None:
        self._rate.on_app_limited(self.bytes_in_flight)

    def on_path_change(self, now: float) -> None:
        self._begin(now)

    def follow(self, before: CongestionController, now: float) -> None:
        self._begin(now)
        self._rate.start(now)
        super().follow(before, now)
        min_rtt = before.status().min_rtt_s
        if min_rtt is not None:
            self.on_rtt_measurement(now=now, rtt=min_rtt)

    def on_ack_end(self, now: float) -> None:
        sample = self._rate.sample(now)
        if sample is None:
            return
        silent = now - self._last_ack_at
        if silent > 1.0:
            self._min_rtt_at += silent  # an outage does not age what is known
        self._last_ack_at = now
        is_new_round = (
            sample.prior_delivered >= self._round_ends and now - self._round_at >= RTT_FLOOR_S
        )
        if is_new_round:
            self._round_ends = self._rate.delivered
            self._round += 1
            self._round_at = now
            if self._valve > VALVE_MIN or not self._lossy_rounds:
                # else each look would find less than the one before, down to nothing: 1.25 times (1 - loss) is under 1
                self._filter_round += 1
        if sample.rate_bytes_s >= self._bandwidth or not sample.is_app_limited:
            # 4.1.1.5: what the application held back says nothing, unless it is more than was known
            bounded = min(sample.rate_bytes_s, limits.MAX_PATH_RATE_BYTES_S)
            if bounded > 0.0:
                self._filter.update(bounded, self._filter_round)
                self._latest_rate = bounded
        self._bandwidth = self._filter.best(self._filter_round)
        if is_new_round:
            self._end_round(now, is_app_limited=sample.is_app_limited)
        self._advance(now)
        self._apply(sample, now)

    def set_rate_cap(self, bytes_per_s: float) -> None:
        super().set_rate_cap(bytes_per_s)
        self._apply_rate()

    def set_window_cap(self, size_bytes: int) -> None:
        super().set_window_cap(size_bytes)
        self._bound_window()

    def status(self) -> CongestionStatus:
        return CongestionStatus(
            name=self.name,
            state=self._state.value,
            rate_bytes_s=self.pacer.rate_bytes_s,
            min_rtt_s=self._min_rtt if self._min_rtt < math.inf else None,
            window_bytes=self.congestion_window,
            yielding=self._valve < 1.0 or self._sharing.is_active,
        )

    def get_log_data(self) -> dict[str, Any]:
        return dict(
            super().get_log_data(),
            pacing_rate=int(self.pacer.rate_bytes_s * 8),
            state=self._state.value,
        )

    # --- the model

    def _bdp(self) -> float:
        if not self._bandwidth or self._min_rtt == math.inf:
            return float(INITIAL_PACKETS[0] * self.max_datagram_size)
        return self._bandwidth * max(self._min_rtt, RTT_FLOOR_S)

    def _first_rtt(self, rtt: float) -> None:
        packets = min(max(INITIAL_RATE_PACKETS_S * rtt, INITIAL_PACKETS[0]), INITIAL_PACKETS[1])
        self.congestion_window = max(self.congestion_window, int(packets) * self.max_datagram_size)
        self._pacing = HIGH_GAIN * self.congestion_window / max(rtt, RTT_FLOOR_S)
        self._bound_window()
        self._apply_rate()

    def _end_round(self, now: float, *, is_app_limited: bool) -> None:
        lost = self._lost - self._round_lost
        lost_packets = self._lost_packets - self._round_lost_packets
        delivered = self._rate.delivered - self._round_delivered
        share = lost / max(lost + delivered, 1)
        rtt = self._round_rtt
        if self._state is State.SHARING and rtt < SHARE_DROP * self._last_round_rtt < math.inf:
            earliest = self._share_test_at - SHARE_TEST_S + SHARE_TEST_MIN_S
            self._share_test_at = min(self._share_test_at, max(now, earliest))
        self._last_round_rtt = rtt
        self._round_lost = self._lost
        self._round_lost_packets = self._lost_packets
        self._round_delivered = self._rate.delivered
        self._round_rtt = math.inf
        if not self._is_full and not is_app_limited:
            if self._bandwidth >= self._full_bandwidth * STARTUP_GROWTH:
                self._full_bandwidth = self._bandwidth
                self._full_rounds = 0
            else:
                self._full_rounds += 1
            overflows = share > STARTUP_LOSS and lost_packets > STARTUP_LOSS_PACKETS
            self._is_full = self._full_rounds >= STARTUP_FULL_ROUNDS or overflows
        packets = (delivered + lost) // self.max_datagram_size
        seen = Round(rtt, self._min_rtt, packets, lost_packets)
        if self._state in {State.PROBE_BW, State.SHARING}:
            self._judge(share, lost_packets)
            in_flight = self.bytes_in_flight / self.max_datagram_size
            self._sharing.on_round(seen, in_flight_packets=in_flight, now=now)
        elif self._state is State.STARTUP:
            self._sharing.on_startup_round(seen)

    def _judge(self, share: float, lost_packets: int) -> None:
        """The valve: harm that lasts ``VALVE_ROUNDS`` rounds closes it by a step each round, its absence opens it."""
        lossy = share > VALVE_LOSS and lost_packets > 1
        self._lossy_rounds = self._lossy_rounds + 1 if lossy else 0
        if self._lossy_rounds >= VALVE_ROUNDS:
            self._valve = max(VALVE_MIN, self._valve * VALVE_STEP)
        elif not lossy:
            self._valve = min(1.0, self._valve * VALVE_RECOVERY)

    def _advance(self, now: float) -> None:
        if self._state is State.STARTUP and self._is_full:
            self._state = State.DRAIN
        if self._state is State.DRAIN and self.bytes_in_flight <= self._bdp():
            self._enter_probe_bw(now)
        if self._state is State.PROBE_BW and self._sharing.is_active:
            self._state = State.SHARING
            self._share_test_at = max(now + SHARE_FIRST_TEST_S, self._share_test_at)
        if self._state is State.SHARING and not self._sharing.is_active:
            self._enter_probe_bw(now)
        if self._state is State.PROBE_BW:
            self._advance_phase(now)
        if self._state is State.PROBE_RTT:
            self._advance_probe_rtt(now)
        elif self._min_rtt < math.inf and not self._rate.is_app_limited and self._wants_probe(now):
            self._tested_packets = self.bytes_in_flight / self.max_datagram_size
            self._state = State.PROBE_RTT
            self._probe_rtt_window = self._half_product()
            self._probe_rtt_ends = None
            self._probe_rtt_best = math.inf

    def _wants_probe(self, now: float) -> bool:
        """Whether to hold back now: to see the shortest round trip again, or whose queue it is that stands."""
        if self._state is State.SHARING:
            self._suspects = True
            return now >= self._share_test_at
        self._suspects = self._state is State.PROBE_BW and self._sharing.is_suspected(now)
        return self._suspects or now - self._min_rtt_at > MIN_RTT_WINDOW_S

    def _enter_probe_bw(self, now: float) -> None:
        self._state = State.PROBE_BW
        self._enter_phase(Phase.CRUISE, now)
        self._phase_length = self._rng.randint(0, CRUISE_ROUNDS[1])

    def _enter_phase(self, phase: Phase, now: float) -> None:
        self._phase = phase
        self._phase_at = now
        self._phase_length = self._rng.randint(*CRUISE_ROUNDS) if phase is Phase.CRUISE else 1
        self._phase_bandwidth = self._bandwidth

    def _advance_phase(self, now: float) -> None:
        bdp = self._bdp()
        is_over = now - self._phase_at > max(self._min_rtt, RTT_FLOOR_S) * self._phase_length
        if self._phase is Phase.CRUISE:
            if is_over:
                self._enter_phase(Phase.PROBE, now)
        elif self._phase is Phase.PROBE:
            # 4.3.4.2: until the extra packets are in flight or some were lost
            is_done = self.bytes_in_flight >= PROBE_GAIN * bdp or self._lost > self._round_lost
            if is_over and is_done:
                self._enter_phase(Phase.DRAIN, now)
        elif is_over or self.bytes_in_flight <= bdp:
            self._enter_phase(Phase.CRUISE, now)

    def _advance_probe_rtt(self, now: float) -> None:
        if self._probe_rtt_ends is None:
            if self.bytes_in_flight <= self._probe_rtt_window:
                self._probe_rtt_ends = now + PROBE_RTT_S
                self._probe_rtt_round = self._round + 1
        elif now >= self._probe_rtt_ends and self._round >= self._probe_rtt_round:
            self._take_probed_rtt(now)
            self._min_rtt_at = now
            self._share_test_at = now + SHARE_TEST_S
            if self._sharing.is_active:
                self._state = State.SHARING
            elif self._is_full:
                self._enter_probe_bw(now)
            else:
                self._state = State.STARTUP

    def _take_probed_rtt(self, now: float) -> None:
        best = self._probe_rtt_best
        if best == math.inf:
            return
        if not self._suspects:
            self._min_rtt = best
            return
        self._sharing.on_tested(
            rtt_s=best,
            min_rtt_s=self._min_rtt,
            in_flight_packets=self._tested_packets,
            now=now,
        )
        if self._sharing.is_active:
            # others' queue, or a longer route: believe the latter little by little
            self._min_rtt = min(best, self._min_rtt * SHARE_RTT_GROWTH)

    # --- what follows from it

    def _gain(self) -> float:
        if self._state is State.STARTUP:
            return HIGH_GAIN
        if self._state is State.DRAIN:
            return 1.0 / HIGH_GAIN
        if self._state is State.PROBE_BW:
            return _PHASE_GAIN[self._phase]
        return 1.0

    def _half_product(self) -> int:
        bdp = self._bdp()
        if self._suspects and self._min_rtt < math.inf:
            # the largest rate of ten rounds is stale when the link became slower, and those rounds are long
            bdp = min(bdp, self._latest_rate * max(self._min_rtt, RTT_FLOOR_S))
        return max(MIN_WINDOW_PACKETS * self.max_datagram_size, int(PROBE_RTT_GAIN * bdp))

    def _apply(self, sample: RateSample, now: float) -> None:
        """Pacing rate (4.2.1) and window (4.2.3)."""
        if self._state is State.SHARING:
            self._apply_sharing(sample, now)
            return
        if self._bandwidth:
            rate = self._gain() * self._bandwidth * PACING_MARGIN * self._valve
            if self._is_full or rate > self._pacing:
                self._pacing = rate
            gain = WINDOW_GAIN if self._is_full else STARTUP_WINDOW_GAIN
            target = gain * self._bdp() * self._valve + self._bandwidth * WINDOW_SLACK_S
            target += WINDOW_SLACK_PACKETS * self.max_datagram_size
        else:
            target = float(limits.MAX_PATH_WINDOW_BYTES)
        window = self.congestion_window + sample.acked_bytes
        early = self._rate.delivered - self._began < INITIAL_PACKETS[0] * self.max_datagram_size
        if self._is_full:
            window = min(window, int(target))
        elif self.congestion_window >= target and not early:
            window = self.congestion_window
        if self._state is State.PROBE_RTT:
            window = min(window, self._probe_rtt_window)
        self.congestion_window = window
        self._bound_window()
        self._apply_rate()

    def _apply_sharing(self, sample: RateSample, now: float) -> None:
        sharing = self._sharing
        size = self.max_datagram_size
        rtt = min(self._last_round_rtt, self._round_rtt)
        if rtt == math.inf:
            rtt = self._min_rtt
        lost = self._lost_packets - self._round_lost_packets
        if not sharing.on_losses(lost, round_count=self._round, now=now):
            sharing.on_ack(acked_packets=sample.acked_bytes / size, rtt_s=rtt, now=now)
        sharing.window = min(sharing.window, limits.MAX_PATH_WINDOW_BYTES / size)
        self.congestion_window = int(sharing.window * self._valve) * size
        self._pacing = SHARE_PACING_GAIN * self.congestion_window / max(rtt, RTT_FLOOR_S)
        self._bound_window()
        self._apply_rate()

    def _bound_window(self) -> None:
        window = min(self.congestion_window, limits.MAX_PATH_WINDOW_BYTES)
        if self.window_cap_bytes:
            window = min(window, self.window_cap_bytes)
        self.congestion_window = max(window, MIN_WINDOW_PACKETS * self.max_datagram_size)

    def _apply_rate(self) -> None:
        rate = max(self._pacing, MIN_RATE_PACKETS_S * self.max_datagram_size)
        rate = min(rate, limits.MAX_PATH_RATE_BYTES_S)
        if self.rate_cap_bytes_s:
            rate = min(rate, self.rate_cap_bytes_s)
        self.pacer.set_rate(rate)
        if self._min_rtt < math.inf:
            self.pacer.suit_delay(self._min_rtt)
