"""Loss recovery with slim records: what an ACK says about neighbouring stream bytes reaches the stream once.

Semantics are aioquic's (RFC 9002), with four additions: the thresholds of loss detection rise where packets overtake
each other (``reordering``); probes after an outage are at most ``PROBE_INTERVAL_S`` apart; one transmission can be held
to one datagram without touching the congestion controller; and an ACK of a packet whose data was sent again meanwhile
is a sample of the round-trip time. Without it a path slower than the probes is never measured: aioquic forgets the
oldest packet at each probe, and what is acknowledged is always one it has forgotten.
"""

from bisect import bisect_left
from collections.abc import Iterable
from typing import Any, ClassVar, Final

from aioquic.quic.packet import QuicPacketType
from aioquic.quic.packet_builder import QuicDeliveryState
from aioquic.quic.rangeset import RangeSet
from aioquic.quic.recovery import QuicPacketRecovery, QuicPacketSpace
from aioquic.quic.stream import QuicStreamSender
from aioquic.tls import Epoch

from edgesync.transport.congestion.base import CongestionController
from edgesync.transport.fast.reordering import Reordering
from edgesync.transport.pmtud import BASE_BYTES, PathMtu

PROBE_INTERVAL_S: Final = 1.0
"""Longest pause between probes of a silent peer: doubling would sleep for seconds after an outage is over."""
MIN_RTT_S: Final = 0.001
GRANULARITY_S: Final = 0.001
"""RFC 9002 section 6.1.2."""
MAX_GIVEN_UP: Final = 64
"""Packets a probe took the data of, whose late acknowledgement still tells the round-trip time."""

_ACKED: Final = QuicDeliveryState.ACKED


class SentStream:
    """A sent 1-RTT packet that holds one STREAM frame and nothing else; stands in for ``QuicSentPacket``."""

    __slots__ = (
        "cc",
        "fin",
        "packet_number",
        "sender",
        "sent_bytes",
        "sent_time",
        "start",
        "stop",
    )
    epoch: ClassVar = Epoch.ONE_RTT
    packet_type: ClassVar = QuicPacketType.ONE_RTT
    in_flight: ClassVar = True
    is_ack_eliciting: ClassVar = True
    is_crypto_packet: ClassVar = False
    quic_logger_frames: ClassVar[tuple[()]] = ()

    cc: Any
    """For the congestion controller's stamps."""
    packet_number: int
    sent_time: float
    sent_bytes: int
    sender: QuicStreamSender
    start: int
    stop: int
    fin: bool
    # No __init__: filling the slots where packets are made takes half the time, for each packet.

    @property
    def delivery_handlers(self) -> list[tuple[Any, Any]]:
        return [(self.sender.on_data_delivery, (self.start, self.stop, self.fin))]


class SentOther:
    """A sent 1-RTT packet outside congestion control: an ACK alone, or a path probe, whose loss means no congestion."""

    __slots__ = (
        "cc",
        "delivery_handlers",
        "is_ack_eliciting",
        "packet_number",
        "sent_bytes",
        "sent_time",
    )
    epoch: ClassVar = Epoch.ONE_RTT
    packet_type: ClassVar = QuicPacketType.ONE_RTT
    in_flight: ClassVar = False
    is_crypto_packet: ClassVar = False
    quic_logger_frames: ClassVar[tuple[()]] = ()

    cc: Any

    def __init__(
        self,
        packet_number: int,
        sent_time: float,
        sent_bytes: int,
        *,
        is_ack_eliciting: bool,
        handler: tuple[Any, Any],
    ) -> None:
        self.packet_number = packet_number
        self.sent_time = sent_time
        self.sent_bytes = sent_bytes
        self.is_ack_eliciting = is_ack_eliciting
        self.delivery_handlers = [handler]


class FastRecovery(QuicPacketRecovery):
    """See the module."""

    held_to: int | None = None
    """While set, no more than so many bytes are let out beyond those in flight."""
    controller: CongestionController
    """The same object as aioquic's ``_cc``."""
    mtu: PathMtu
    """Told what became of full-sized packets."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.reordering = Reordering()
        self._given_up: dict[tuple[int, int], float] = {}
        """(Space, packet number) to when it was sent, of packets a probe took the data of."""

    @property
    def congestion_window(self) -> int:
        window = self._cc.congestion_window
        if self.held_to is None:
            return window
        return min(window, self._cc.bytes_in_flight + self.held_to)

    def on_ack_received(
        self,
        *,
        ack_rangeset: RangeSet,
        ack_delay: float,
        now: float,
        space: QuicPacketSpace,
    ) -> None:
        """Stock semantics, except that a stream hears of neighbouring acknowledged bytes once."""
        largest_acked = ack_rangeset.bounds().stop - 1
        space.largest_acked_packet = max(space.largest_acked_packet, largest_acked)
        sent: dict[int, Any] = space.sent_packets
        packet: Any = None
        flown: list[Any] = []
        sender: QuicStreamSender | None = None
        start = stop = eliciting = 0
        numbers = list(sent)
        for acked in ack_rangeset:
            first = bisect_left(numbers, acked.start)
            for number in numbers[first : bisect_left(numbers, acked.stop, first)]:
                packet = sent.pop(number)
                if type(packet) is not SentStream or packet.fin:
                    eliciting += packet.is_ack_eliciting
                    if packet.in_flight:
                        flown.append(packet)
                    for handler, arguments in packet.delivery_handlers:
                        handler(_ACKED, *arguments)
                    continue
                eliciting += 1
                flown.append(packet)
                if packet.sender is not sender or packet.start != stop:
                    if sender is not None:
                        sender.on_data_delivery(_ACKED, start, stop, False)
                    sender, start = packet.sender, packet.start
                stop = packet.stop
        if sender is not None:
            sender.on_data_delivery(_ACKED, start, stop, False)
        if space.is_application_data:
            self.reordering.on_ack(ack_rangeset, largest_acked=space.largest_acked_packet, now=now)
        if packet is None:
            self._acked_late(space, largest_acked, ack_delay, now)
            return
        if flown:
            self.controller.on_burst_acked(flown, now)
            if self.mtu.size > BASE_BYTES:
                self._watch_sizes(flown)
        space.ack_eliciting_in_flight -= eliciting
        if packet.packet_number == largest_acked and eliciting:
            self._sample_rtt(now - packet.sent_time, min(ack_delay, self.max_ack_delay), now)
        else:
            self._acked_late(space, largest_acked, ack_delay, now)
        self._detect_loss(now=now, space=space)
        if self.peer_completed_address_validation:
            self._pto_count = 0
        self.controller.on_ack_end(now)

    def _acked_late(
        self, space: QuicPacketSpace, number: int, ack_delay: float, now: float
    ) -> None:
        """A packet number is used once, so this sample is unambiguous (RFC 9002 section 5.1)."""
        sent_time = self._given_up.pop((self.spaces.index(space), number), None)
        if sent_time is None:
            return
        self._sample_rtt(now - sent_time, min(ack_delay, self.max_ack_delay), now)
        if self.peer_completed_address_validation:
            self._pto_count = 0

    def _watch_sizes(self, acked: list[Any]) -> None:
        full = self.mtu.size
        for packet in reversed(acked):
            if packet.sent_bytes >= full:
                self.mtu.arrived(packet.packet_number)
                return

    def _on_packets_lost(
        self,
        *,
        congestion_event: bool = True,
        now: float,
        packets: Iterable[Any],
        persistent_congestion: bool = False,
        space: QuicPacketSpace,
    ) -> None:
        """Stock semantics; what a later packet overtook is also told to ``mtu``, what is merely sent again is not."""
        packets = tuple(packets)
        if not congestion_event or not self._rtt_initialized:
            index = self.spaces.index(space)
            for packet in packets:
                if packet.is_ack_eliciting:
                    self._given_up[index, packet.packet_number] = packet.sent_time
            while len(self._given_up) > MAX_GIVEN_UP:
                del self._given_up[next(iter(self._given_up))]
        super()._on_packets_lost(
            congestion_event=congestion_event,
            now=now,
            packets=packets,
            persistent_congestion=persistent_congestion,
            space=space,
        )
        if congestion_event and self.mtu.size > BASE_BYTES:
            for packet in packets:
                if packet.in_flight and self.mtu.lost(packet.packet_number, packet.sent_bytes, now):
                    break

    def _sample_rtt(self, rtt: float, ack_delay: float, now: float) -> None:
        """RFC 9002 section 5.3, with aioquic's floor of a millisecond."""
        latest = max(rtt, MIN_RTT_S)
        self._rtt_min = min(self._rtt_min, latest)
        if latest > self._rtt_min + ack_delay:
            latest -= ack_delay
        self._rtt_latest = latest
        if self._rtt_initialized:
            deviation = abs(self._rtt_min - latest)
            self._rtt_variance = 3 / 4 * self._rtt_variance + 1 / 4 * deviation
            self._rtt_smoothed = 7 / 8 * self._rtt_smoothed + 1 / 8 * latest
        else:
            self._rtt_first_sample_time = now
            self._rtt_initialized = True
            self._rtt_variance = rtt / 2
            self._rtt_smoothed = rtt
        self._cc.on_rtt_measurement(now=now, rtt=rtt)
        self._pacer.update_rate(
            congestion_window=self._cc.congestion_window, smoothed_rtt=self._rtt_smoothed
        )

    def _detect_loss(self, *, now: float, space: QuicPacketSpace) -> None:
        """RFC 9002 section 6.1 with thresholds that follow the path's reordering."""
        if not space.is_application_data or not self._rtt_initialized:
            super()._detect_loss(now=now, space=space)
            return
        reordering = self.reordering
        largest = space.largest_acked_packet
        patience = reordering.time_threshold * max(self._rtt_latest, self._rtt_smoothed)
        patience = max(patience, GRANULARITY_S)
        last_lost = largest - reordering.packet_threshold
        sent_before = now - patience
        lost = []
        space.loss_time = None
        for number, packet in space.sent_packets.items():
            if number > largest:
                break
            sent_time = packet.sent_time or 0.0
            if number <= last_lost or sent_time <= sent_before:
                lost.append(packet)
                reordering.on_lost(number, largest_acked=largest)
            elif space.loss_time is None:  # in the order they were sent: the first is the earliest
                space.loss_time = sent_time + patience
        self._on_packets_lost(
            now=now,
            packets=lost,
            persistent_congestion=self._in_persistent_congestion(packets=lost),
            space=space,
        )

    def get_loss_detection_time(self, *, amplification_limited: bool) -> float | None:
        at = super().get_loss_detection_time(amplification_limited=amplification_limited)
        if (
            at is not None
            and self._pto_count > 0
            and self.handshake_confirmed
            and self._get_loss_space() is None
        ):
            pause = max(2 * self.get_probe_timeout(), PROBE_INTERVAL_S)
            at = min(at, self._time_of_last_sent_ack_eliciting_packet + pause)
        return at
