"""A small deterministic network for congestion controllers: senders, one shared bottleneck, receivers, virtual time.

Drives the real controllers and pacers, packet by packet, the way the transport does: loss by packet threshold 3 or time
threshold 9/8, a probe timeout capped at a second, ACKs every few packets or milliseconds, timers that fire late. It
is not a model of the transport's streams or encryption, and its figures are for comparing controllers, not promises:
``simulations.netlab`` measures real processes.

The same seed gives the same packets at the same times.
"""

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, cast

from edgesync.transport.congestion import CongestionController

DATAGRAM_BYTES: Final = 1400
UDP_OVERHEAD_BYTES: Final = 28
_PACKET_THRESHOLD: Final = 3
_TIME_THRESHOLD: Final = 9 / 8
_GRANULARITY_S: Final = 0.001
_MAX_ACK_DELAY_S: Final = 0.025
_MAX_PTO_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class LinkConfig:
    """One direction's bottleneck and the way back. Rates are bytes per second at IP level, delays one-way seconds."""

    rate_bytes_s: float
    delay_s: float
    queue_bytes: int
    loss: float = 0.0
    """Mean share of packets lost after the queue, so that they cost link time."""
    loss_burst: float = 1.0
    """Mean length of a run of lost packets (Gilbert-Elliott); 1: independent losses."""
    jitter_s: float = 0.0
    """Most extra delay of a packet; order is kept."""
    reorder: float = 0.0
    """Share of packets that overtake what is ahead by ``reorder_s``."""
    reorder_s: float = 0.005
    policer_bytes_s: float = 0.0
    """Token bucket that drops what exceeds it; 0: none."""
    policer_burst_bytes: int = 0
    ack_loss: float = 0.0

    @property
    def bdp_bytes(self) -> float:
        return self.rate_bytes_s * 2 * self.delay_s


def megabits(rate: float) -> float:
    """Mbit/s as bytes per second."""
    return rate * 125_000.0


@dataclass(slots=True, eq=False)
class SentPacket:
    """What controllers read of a packet: the fields of aioquic's record that they use, and ``cc``."""

    packet_number: int
    sent_time: float
    sent_bytes: int
    chunk: int
    cc: object = None


class LinkModel:
    """Virtual time and the shared bottleneck."""

    def __init__(self, config: LinkConfig, *, seed: int) -> None:
        self.now = 0.0
        self.config = config
        self.rng = random.Random(seed)  # noqa: S311 - a model wants repeatable chance
        self.flows: list[Flow] = []
        self.up = True
        self.queue_peak_bytes = 0
        self.queue_drops = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._queue: deque[tuple[Flow, SentPacket]] = deque()
        self._queued_bytes = 0
        self._serving = False
        self._bad = False
        self._last_arrival = 0.0
        self._tokens = float(config.policer_burst_bytes)
        self._tokens_at = 0.0

    def at(self, time: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (max(time, self.now), next(self._count), action))

    def change(self, time: float, **fields: Any) -> None:
        """From ``time`` on the link differs in ``fields``."""

        def apply() -> None:
            self.config = replace(self.config, **fields)

        self.at(time, apply)

    def outage(self, start: float, seconds: float) -> None:
        """Nothing passes for a while, in either direction; the queue is lost."""

        def down() -> None:
            self.up = False
            self._queue.clear()
            self._queued_bytes = 0

        def back() -> None:
            self.up = True

        self.at(start, down)
        self.at(start + seconds, back)

    def run(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, action = heapq.heappop(self._events)
            action()
        self.now = until

    # --- the bottleneck

    def enter(self, flow: "Flow", packet: SentPacket) -> None:
        config = self.config
        size = packet.sent_bytes + UDP_OVERHEAD_BYTES
        if not self.up:
            return
        if config.policer_bytes_s:
            filled = self._tokens + (self.now - self._tokens_at) * config.policer_bytes_s
            self._tokens = min(float(config.policer_burst_bytes), filled)
            self._tokens_at = self.now
            if self._tokens < size:
                self.queue_drops += 1
                return
            self._tokens -= size
        if self._queued_bytes + size > config.queue_bytes and self._queue:
            self.queue_drops += 1
            return
        self._queued_bytes += size
        self.queue_peak_bytes = max(self.queue_peak_bytes, self._queued_bytes)
        self._queue.append((flow, packet))
        if not self._serving:
            self._serve()

    def _serve(self) -> None:
        self._serving = bool(self._queue)
        if self._serving:
            size = self._queue[0][1].sent_bytes + UDP_OVERHEAD_BYTES
            self.at(self.now + size / self.config.rate_bytes_s, self._leave)

    def _leave(self) -> None:
        config = self.config
        if self._queue:  # an outage may have emptied it
            flow, packet = self._queue.popleft()
            self._queued_bytes -= packet.sent_bytes + UDP_OVERHEAD_BYTES
            if self.up and not self._lost():
                arrival = self.now + config.delay_s
                if config.jitter_s:
                    arrival += self.rng.uniform(0.0, config.jitter_s)
                    arrival = max(arrival, self._last_arrival)
                    self._last_arrival = arrival
                if config.reorder and self.rng.random() < config.reorder:
                    arrival = max(self.now, arrival - config.reorder_s)
                self.at(arrival, lambda: flow.arrived(packet))
        self._serve()

    def _lost(self) -> bool:
        config = self.config
        if not config.loss:
            return False
        if config.loss_burst <= 1.0:
            return self.rng.random() < config.loss
        leave_bad = 1.0 / config.loss_burst
        enter_bad = leave_bad * config.loss / (1.0 - config.loss)
        self._bad = self.rng.random() < (1.0 - leave_bad if self._bad else enter_bad)
        return self._bad

    def way_back(self, action: Callable[[], None]) -> None:
        if self.up and not (self.config.ack_loss and self.rng.random() < self.config.ack_loss):
            self.at(self.now + self.config.delay_s, lambda: action() if self.up else None)


class Flow:
    """A sender with ``size_bytes`` to send (None: without end) and its receiver."""

    def __init__(
        self,
        model: LinkModel,
        controller: CongestionController,
        *,
        start: float = 0.0,
        size_bytes: int | None = None,
        demand_bytes_s: float = 0.0,
        ack_every: int = 8,
        ack_delay_s: float = 0.008,
        timer_late_s: float = 0.001,
        datagram_bytes: int = DATAGRAM_BYTES,
    ) -> None:
        self.model = model
        self.cc = controller
        self.size = datagram_bytes
        self.total = None if size_bytes is None else math.ceil(size_bytes / datagram_bytes)
        self.demand = demand_bytes_s
        self.start = start
        self.finished_at: float | None = None
        self.sent_packets = 0
        self.lost_packets = 0
        self.delivered: list[tuple[float, int]] = []
        """Arrival time and wire bytes of each new chunk."""
        self.rtts: list[tuple[float, float]] = []
        self._ack_every = ack_every
        self._ack_delay = ack_delay_s
        self._late = timer_late_s
        self._sent: dict[int, SentPacket] = {}
        self._next_number = 0
        self._next_chunk = 0
        self._again: deque[int] = deque()
        self._received: list[tuple[int, int]] = []
        self._acked_received = 0
        self._seen = 0
        self._have: set[int] = set()
        self._ack_armed = False
        self._largest_acked = -1
        self._srtt = 0.0
        self._rttvar = 0.0
        self._latest = 0.0
        self._last_sent = 0.0
        self._pto_count = 0
        self._pto_armed = False
        self._loss_generation = 0
        self._wake_at = math.inf
        model.flows.append(self)
        model.at(start, self.transmit)

    # --- sending

    def _queued(self) -> float:
        fresh = math.inf if self.total is None else self.total - self._next_chunk
        if self.demand:
            produced = int((self.model.now - self.start) * self.demand / self.size)
            fresh = min(fresh, produced - self._next_chunk)
        return len(self._again) + max(0.0, fresh)

    def transmit(self) -> None:
        now = self.model.now
        cc = self.cc
        while True:
            queued = self._queued()
            room = (cc.congestion_window - cc.bytes_in_flight) // self.size
            if queued <= 0:
                if self.demand and (self.total is None or self._next_chunk < self.total):
                    self._wake(now + self.size / self.demand)
                if room > 0 and cc.pacer.quota(now):
                    cc.on_app_limited()
                return
            if room <= 0:
                return
            count = int(min(queued, room, cc.pacer.quota(now)))
            if not count:
                at = cc.pacer.next_send(now, int(min(room, queued)))
                self._wake(now if at is None else at)
                return
            for _ in range(count):
                self._send_one()
            cc.pacer.sent(count * self.size)

    def _wake(self, at: float) -> None:
        at = max(at, self.model.now) + self.model.rng.uniform(1e-6, self._late)
        if at >= self._wake_at > self.model.now:
            return
        self._wake_at = at

        def wake() -> None:
            if self._wake_at == at:
                self._wake_at = math.inf
                self.transmit()

        self.model.at(at, wake)

    def _send_one(self) -> None:
        now = self.model.now
        if self._again:
            chunk = self._again.popleft()
        else:
            chunk = self._next_chunk
            self._next_chunk += 1
        packet = SentPacket(self._next_number, now, self.size, chunk)
        self._next_number += 1
        self._sent[packet.packet_number] = packet
        self.sent_packets += 1
        self.cc.on_packet_sent(packet=cast("Any", packet))
        self._last_sent = now
        self._arm_pto()
        self.model.enter(self, packet)

    # --- the receiver

    def arrived(self, packet: SentPacket) -> None:
        if packet.chunk not in self._have:
            self._have.add(packet.chunk)
            self.delivered.append((self.model.now, packet.sent_bytes + UDP_OVERHEAD_BYTES))
            if self.total is not None and len(self._have) == self.total:
                self.finished_at = self.model.now
        self._received.append((packet.packet_number, packet.sent_bytes))
        gap = len(self._received) > 1 and packet.packet_number != self._received[-2][0] + 1
        if gap or len(self._received) - self._acked_received >= self._ack_every:
            self._acknowledge()
        elif not self._ack_armed:
            self._ack_armed = True
            self.model.at(self.model.now + self._ack_delay, self._ack_timer)

    def _ack_timer(self) -> None:
        self._ack_armed = False
        if len(self._received) > self._acked_received:
            self._acknowledge()

    def _acknowledge(self) -> None:
        upto = self._acked_received = len(self._received)
        self.model.way_back(lambda: self._on_ack(upto))

    # --- the sender's recovery, as RFC 9002 and aioquic have it

    def _on_ack(self, upto: int) -> None:
        now = self.model.now
        newly = self._received[self._seen : upto]
        self._seen = max(self._seen, upto)
        latest: SentPacket | None = None
        for number, _ in newly:
            packet = self._sent.pop(number, None)
            if packet is not None:
                self.cc.on_packet_acked(now=now, packet=cast("Any", packet))
                if latest is None or number > latest.packet_number:
                    latest = packet
        if latest is None:
            return
        if latest.packet_number > self._largest_acked:
            self._largest_acked = latest.packet_number
            self._on_rtt(now - latest.sent_time)
        self._pto_count = 0
        self._detect_loss()
        self.cc.on_ack_end(now)
        self._arm_pto()
        self.transmit()

    def _on_rtt(self, rtt: float) -> None:
        self._latest = rtt
        if not self._srtt:
            self._srtt = rtt
            self._rttvar = rtt / 2
        else:
            self._rttvar += (abs(self._srtt - rtt) - self._rttvar) / 4
            self._srtt += (rtt - self._srtt) / 8
        self.rtts.append((self.model.now, rtt))
        self.cc.on_rtt_measurement(now=self.model.now, rtt=rtt)
        self._update_pacer()

    def _update_pacer(self) -> None:
        self.cc.pacer.update_rate(
            congestion_window=self.cc.congestion_window, smoothed_rtt=self._srtt
        )

    def _detect_loss(self) -> None:
        now = self.model.now
        delay = max(_TIME_THRESHOLD * max(self._latest, self._srtt), _GRANULARITY_S)
        lost: list[SentPacket] = []
        loss_at: float | None = None
        for packet in self._sent.values():
            if packet.packet_number > self._largest_acked:
                break
            overdue = packet.sent_time <= now - delay
            if overdue or packet.packet_number <= self._largest_acked - _PACKET_THRESHOLD:
                lost.append(packet)
            elif loss_at is None:
                loss_at = packet.sent_time + delay
        if lost:
            for packet in lost:
                del self._sent[packet.packet_number]
                self._again.append(packet.chunk)
            self.lost_packets += len(lost)
            self.cc.on_packets_lost(now=now, packets=cast("Any", lost))
            if lost[-1].sent_time - lost[0].sent_time > 3 * (self._pto_period() + _MAX_ACK_DELAY_S):
                self.cc.on_persistent_congestion()
            self._update_pacer()
        if loss_at is not None:
            self._loss_generation += 1
            generation = self._loss_generation
            self.model.at(loss_at + 1e-6, lambda: self._loss_timer(generation))

    def _loss_timer(self, generation: int) -> None:
        if generation == self._loss_generation:
            self._detect_loss()
            self.transmit()

    def _pto_period(self) -> float:
        if not self._srtt:
            return 0.2
        return self._srtt + max(4 * self._rttvar, _GRANULARITY_S) + _MAX_ACK_DELAY_S

    def _arm_pto(self) -> None:
        """One standing timer: while packets flow it only moves on when it fires."""
        if not self._sent or self._pto_armed:
            return
        self._pto_armed = True
        self.model.at(self._pto_at(), self._pto)

    def _pto_at(self) -> float:
        # a cap below the path's own round trip would only send the same again
        period = self._pto_period()
        return self._last_sent + min(max(_MAX_PTO_S, period), math.ldexp(period, self._pto_count))

    def _pto(self) -> None:
        self._pto_armed = False
        if not self._sent:
            return
        if self._pto_at() > self.model.now:
            self._arm_pto()
            return
        self._pto_count += 1
        oldest = next(iter(self._sent.values()))
        del self._sent[oldest.packet_number]
        self._again.appendleft(oldest.chunk)
        self.cc.on_packets_expired(packets=cast("Any", [oldest]))
        self._send_one()

    # --- what came of it

    def goodput(self, start: float, end: float) -> float:
        """Wire bytes per second of new data between two times."""
        moved: int = sum(size for at, size in self.delivered if start <= at < end)
        return moved / (end - start)

    def delay(self, start: float, end: float) -> float:
        """Mean round trip between two times, seconds."""
        rtts = [rtt for at, rtt in self.rtts if start <= at < end]
        return sum(rtts) / len(rtts) if rtts else math.nan


def jain(shares: list[float]) -> float:
    """Jain's fairness index of ``shares``: 1 all equal, 1/n one has all."""
    total = sum(shares)
    return total * total / (len(shares) * sum(share * share for share in shares)) if total else 0.0
