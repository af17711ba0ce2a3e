"""What a congestion controller of EdgeSync answers beyond aioquic's own interface.

A controller decides how many bytes may be in flight (``congestion_window``) and, by its pacer, when they leave. It
reads no clock and sends nothing: the connection calls it with the time. The order of calls of one ACK frame:
``on_packet_acked`` for each packet, ``on_rtt_measurement`` if the largest was new, ``on_packets_lost``, ``on_ack_end``.

What is noted with a packet as it leaves stands in ``packet.cc``: a plain attribute of aioquic's record, a slot in ours.
"""

import abc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from aioquic.quic.congestion.base import QuicCongestionControl
from aioquic.quic.packet_builder import QuicSentPacket

from edgesync.transport.congestion.pacer import Pacer, WindowPacer


@dataclass(frozen=True, slots=True)
class CongestionStatus:
    """What a status screen shows of one path."""

    name: str
    state: str
    rate_bytes_s: float
    """What the pacer is set to; 0: not paced."""
    min_rtt_s: float | None
    window_bytes: int
    yielding: bool
    """It sends less than it could because the path or other traffic suffers."""


class CongestionController(QuicCongestionControl):
    """aioquic's controller with a pacer of its own and the hooks a model of the path needs."""

    name: ClassVar[str]
    pacer: Pacer

    def __init__(self, *, max_datagram_size: int) -> None:
        super().__init__(max_datagram_size=max_datagram_size)
        self.bytes_in_flight = 0
        self.max_datagram_size = max_datagram_size
        self.rate_cap_bytes_s = 0.0
        self.window_cap_bytes = 0

    def on_burst_sent(self, packets: Sequence[QuicSentPacket]) -> None:
        """Packets that leave together; the engine calls it once where aioquic calls ``on_packet_sent`` for each."""
        for packet in packets:
            self.on_packet_sent(packet=packet)

    def on_burst_acked(self, packets: Sequence[QuicSentPacket], now: float) -> None:
        """Packets that one ACK frame acknowledges; called once where aioquic calls ``on_packet_acked`` for each."""
        for packet in packets:
            self.on_packet_acked(now=now, packet=packet)

    @abc.abstractmethod
    def on_ack_end(self, now: float) -> None:
        """An ACK frame is processed, its losses included."""

    @abc.abstractmethod
    def on_app_limited(self) -> None:
        """Nothing is queued though window and pacer would let it go: what follows does not measure the path."""

    @abc.abstractmethod
    def on_path_change(self, now: float) -> None:
        """The peer's IP address changed (a new port alone is the same path)."""

    @abc.abstractmethod
    def status(self) -> CongestionStatus:
        """A snapshot for an operator."""

    def follow(self, before: "CongestionController", now: float) -> None:
        """Take over a connection that ``before`` controlled: what is in flight, its caps, its window to begin with."""
        self.bytes_in_flight = before.bytes_in_flight
        self.congestion_window = max(self.congestion_window, before.congestion_window)
        self.set_window_cap(before.window_cap_bytes)
        self.set_rate_cap(before.rate_cap_bytes_s)

    def resize(self, max_datagram_size: int) -> None:
        """Path MTU probing found another datagram size."""
        self.max_datagram_size = max_datagram_size
        self.pacer.datagram_bytes = max_datagram_size

    def set_rate_cap(self, bytes_per_s: float) -> None:
        """Highest rate of this connection alone, bytes per second; 0: none. Shared caps are ``pacer.set_limiters``."""
        self.rate_cap_bytes_s = max(0.0, bytes_per_s)

    def set_window_cap(self, size_bytes: int) -> None:
        """Most bytes in flight, whatever the path would take; 0: none. Keeps a receiver's socket from overflowing."""
        self.window_cap_bytes = max(0, size_bytes)


class AdaptedController(CongestionController):
    """A stock window-based controller behind our interface, paced from its window."""

    name: ClassVar[str] = "adapted"
    pacer: WindowPacer

    def __init__(self, inner: QuicCongestionControl, *, name: str, max_datagram_size: int) -> None:
        super().__init__(max_datagram_size=max_datagram_size)
        self._inner = inner
        self._label = name
        self._min_rtt: float | None = None
        self._limited = False
        self.pacer = WindowPacer(max_datagram_size=max_datagram_size)
        self._mirror()

    def _mirror(self) -> None:
        window = self._inner.congestion_window
        cap = self.window_cap_bytes
        self.congestion_window = min(window, cap) if cap else window
        self.bytes_in_flight = self._inner.bytes_in_flight
        self.ssthresh = self._inner.ssthresh

    def on_packet_sent(self, *, packet: QuicSentPacket) -> None:
        self._inner.on_packet_sent(packet=packet)
        self._mirror()

    def on_burst_sent(self, packets: Sequence[QuicSentPacket]) -> None:
        on_packet_sent = self._inner.on_packet_sent
        for packet in packets:
            on_packet_sent(packet=packet)
        self._mirror()

    def on_packet_acked(self, *, now: float, packet: QuicSentPacket) -> None:
        self.on_burst_acked((packet,), now)

    def on_burst_acked(self, packets: Sequence[QuicSentPacket], now: float) -> None:
        window = self._inner.congestion_window
        cap = self.window_cap_bytes
        on_packet_acked = self._inner.on_packet_acked
        for packet in packets:
            on_packet_acked(now=now, packet=packet)
        if cap and self._inner.congestion_window > max(window, cap):
            self._inner.congestion_window = max(cap, window)  # growth past the cap was never tested
        self._mirror()

    def on_packets_expired(self, *, packets: Iterable[QuicSentPacket]) -> None:
        self._inner.on_packets_expired(packets=packets)
        self._mirror()

    def on_packets_lost(self, *, now: float, packets: Iterable[QuicSentPacket]) -> None:
        self._inner.on_packets_lost(now=now, packets=packets)
        self._mirror()

    def on_persistent_congestion(self) -> None:
        self._inner.on_persistent_congestion()
        self._mirror()

    def on_rtt_measurement(self, *, now: float, rtt: float) -> None:
        self._min_rtt = rtt if self._min_rtt is None else min(rtt, self._min_rtt)
        self._inner.on_rtt_measurement(now=now, rtt=rtt)
        self._mirror()

    def on_ack_end(self, now: float) -> None:
        """Nothing: a window-based controller acts packet by packet."""

    def on_app_limited(self) -> None:
        """Nothing: as in stock aioquic."""

    def on_path_change(self, now: float) -> None:
        """Nothing: as in stock aioquic, the window finds the new path by its losses."""

    def resize(self, max_datagram_size: int) -> None:
        super().resize(max_datagram_size)
        cast("Any", self._inner)._max_datagram_size = max_datagram_size  # noqa: SLF001

    def set_rate_cap(self, bytes_per_s: float) -> None:
        super().set_rate_cap(bytes_per_s)
        self.pacer.cap_bytes_s = self.rate_cap_bytes_s
        if self.rate_cap_bytes_s:
            rate = self.pacer.rate_bytes_s or self.rate_cap_bytes_s
            self.pacer.set_rate(min(rate, self.rate_cap_bytes_s))

    def set_window_cap(self, size_bytes: int) -> None:
        super().set_window_cap(size_bytes)
        self._mirror()

    def status(self) -> CongestionStatus:
        slow_start = self.ssthresh is None or self.congestion_window < self.ssthresh
        return CongestionStatus(
            name=self._label,
            state="slow start" if slow_start else "congestion avoidance",
            rate_bytes_s=self.pacer.rate_bytes_s,
            min_rtt_s=self._min_rtt,
            window_bytes=self.congestion_window,
            yielding=False,
        )

    def get_log_data(self) -> dict[str, Any]:
        return self._inner.get_log_data()


def adapt(inner: QuicCongestionControl, *, name: str, max_datagram_size: int) -> AdaptedController:
    """Give a stock controller (``reno``, ``cubic``) this interface, for comparison."""
    return AdaptedController(inner, name=name, max_datagram_size=max_datagram_size)
