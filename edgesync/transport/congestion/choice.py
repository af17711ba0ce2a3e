"""Which controller a path gets, and when it gets another.

An operator's word decides; without one (``auto``) a near path gets the window-based class and every other the
model-based one. Near is what the caller says of the address and what round trips confirm. A path that was taken for a
LAN and loses packets, or takes longer than one, is handed to the model: what is in flight and the caps go with it.

Decides from what it is told; opens nothing, looks up no address.
"""

import ipaddress
import random
from collections.abc import Iterable
from typing import Any, ClassVar, Final

from aioquic.quic.congestion.cubic import CubicCongestionControl
from aioquic.quic.congestion.reno import RenoCongestionControl
from aioquic.quic.packet_builder import QuicSentPacket

from edgesync.transport.congestion.background import BackgroundController
from edgesync.transport.congestion.base import CongestionController, CongestionStatus, adapt
from edgesync.transport.congestion.bbr import BbrController
from edgesync.transport.congestion.lan import LanController
from edgesync.transport.congestion.pacer import MIN_BURST, Pacer
from edgesync.transport.controller_names import AUTO, SETTINGS

STOCK: Final = frozenset({"cubic", "reno"})
LAN_RTT_S: Final = 0.005
"""Shortest round trip up to which an unknown path is taken for a LAN: more than a busy small machine adds to one."""
WAN_RTT_S: Final = 0.015
"""Shortest round trip beyond which no path is a LAN, whatever its address."""
RTT_SAMPLES: Final = 8
"""Round trips to see before the shortest means something: the first ones hold the handshake's arithmetic."""
LOSS_WINDOW_PACKETS: Final = 2000
LOSS_SHARE: Final = 0.005
LOSSY_WINDOWS: Final = 2
"""Windows in a row that lose more than ``LOSS_SHARE`` at more than ``LOSS_EVENTS`` different times: a switch or a
socket that overflowed loses in one go, a radio all the time."""
LOSS_EVENTS: Final = 4


def is_near(
    address: str, networks: Iterable[ipaddress.IPv4Network | ipaddress.IPv6Network]
) -> bool:
    """Whether ``address`` is this machine or on one of its interfaces' ``networks``. False if it is no address."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    return (
        parsed.is_loopback
        or parsed.is_link_local
        or any(parsed.version == network.version and parsed in network for network in networks)
    )


def make(
    name: str, *, max_datagram_size: int, rng: random.Random, pacer: Pacer | None = None
) -> CongestionController:
    """A bare controller of one of ``controller_names.CLASSES``. Raises ValueError: no such class."""
    size = max_datagram_size
    match name:
        case "bbr":
            return BbrController(max_datagram_size=size, rng=rng, pacer=pacer)
        case "lan":
            return LanController(max_datagram_size=size, pacer=pacer)
        case "background":
            return BackgroundController(max_datagram_size=size, pacer=pacer)
        case "cubic":
            cubic = CubicCongestionControl(max_datagram_size=size)
            return adapt(cubic, name=name, max_datagram_size=size)
        case "reno":
            reno = RenoCongestionControl(max_datagram_size=size)
            return adapt(reno, name=name, max_datagram_size=size)
    raise ValueError(f"there is no congestion controller called {name!r}")


class PathController(CongestionController):
    """Stands for the controller of a path, which may change while it runs.

    Stock classes (cubic, reno) are for comparison: they are chosen at the start and keep their own pacer.
    """

    name: ClassVar[str] = AUTO

    def __init__(
        self,
        setting: str,
        *,
        max_datagram_size: int,
        rng: random.Random,
        near: bool | None = None,
    ) -> None:
        if setting not in SETTINGS:
            raise ValueError(f"there is no congestion controller called {setting!r}")
        self._setting = setting
        self._near = near
        self._rng = rng
        self._size = max_datagram_size
        first = setting if setting != AUTO else "lan" if near else "bbr"
        self.inner = make(first, max_datagram_size=max_datagram_size, rng=rng)
        self.pacer = self.inner.pacer
        self._forget()
        self._bind()

    def _forget(self) -> None:
        self._settled = False
        """It was moved off the LAN class: it does not go back on this path."""
        self._rtts = 0
        self._acks = 0
        self._window_began = 0
        self._lost = 0
        self._loss_events = 0
        self._lossy_windows = 0

    def _bind(self) -> None:
        # once per packet: no detour through this object
        self.on_packet_sent = self.inner.on_packet_sent  # type: ignore[method-assign]
        self.on_packet_acked = self.inner.on_packet_acked  # type: ignore[method-assign]
        self.on_burst_sent = self.inner.on_burst_sent  # type: ignore[method-assign]
        self.on_burst_acked = self.inner.on_burst_acked  # type: ignore[method-assign]

    @property
    def setting(self) -> str:
        """What was asked for last: one of ``SETTINGS``."""
        return self._setting

    @property
    def may_choose(self) -> bool:
        """Whether another class may take over: not from those that are there to be compared with."""
        return self._setting not in STOCK

    @property
    def is_auto(self) -> bool:
        return self._setting == AUTO

    # attributes of aioquic's class that belong to the controller behind

    @property
    def bytes_in_flight(self) -> int:
        return self.inner.bytes_in_flight

    @bytes_in_flight.setter
    def bytes_in_flight(self, value: int) -> None:
        self.inner.bytes_in_flight = value

    @property
    def congestion_window(self) -> int:
        return self.inner.congestion_window

    @congestion_window.setter
    def congestion_window(self, value: int) -> None:
        self.inner.congestion_window = value

    @property
    def ssthresh(self) -> int | None:
        return self.inner.ssthresh

    @ssthresh.setter
    def ssthresh(self, value: int | None) -> None:
        self.inner.ssthresh = value

    # --- choosing

    def choose(self, setting: str, now: float) -> None:
        """Change class while running (one of ``SETTINGS``). Raises ValueError: no such class, or a stock one."""
        if setting not in SETTINGS:
            raise ValueError(f"there is no congestion controller called {setting!r}")
        if setting in STOCK or not self.may_choose:
            raise ValueError("cubic and reno are chosen before a connection begins, for comparison")
        self._setting = setting
        wanted = setting
        if setting == AUTO:
            wanted = "lan" if self._near and not self._settled else "bbr"
        self._switch(wanted, now)

    def set_near(self, near: bool, now: float) -> None:
        """What the peer's address says: this machine or an attached network (see ``is_near``)."""
        self._near = near
        if self.is_auto and not self._settled:
            self._switch("lan" if near else "bbr", now)

    def _switch(self, name: str, now: float) -> None:
        before = self.inner
        if before.name == name:
            return
        after = make(name, max_datagram_size=self._size, rng=self._rng, pacer=self.pacer)
        after.follow(before, now)
        if name != "lan":
            self.pacer.min_burst = MIN_BURST
        self.inner = after
        self._window_began = self._lost = self._loss_events = self._lossy_windows = 0
        self._bind()

    def _reconsider(self, now: float) -> None:
        """Between lan and bbr, by what the path shows."""
        min_rtt = self.inner.status().min_rtt_s
        if min_rtt is None or self._rtts < RTT_SAMPLES:
            return
        if isinstance(self.inner, LanController):
            self._count_losses(self.inner.acked_packets)
            if min_rtt > WAN_RTT_S or self._lossy_windows >= LOSSY_WINDOWS:
                self._settled = True
                self._switch("bbr", now)
        elif self._near is not False and min_rtt <= LAN_RTT_S:
            self._switch("lan", now)

    def _count_losses(self, acked_packets: int) -> None:
        packets = acked_packets - self._window_began + self._lost
        if packets < LOSS_WINDOW_PACKETS:
            return
        lossy = self._lost > LOSS_SHARE * packets and self._loss_events > LOSS_EVENTS
        self._lossy_windows = self._lossy_windows + 1 if lossy else 0
        self._window_began = acked_packets
        self._lost = self._loss_events = 0

    # --- what aioquic and the transport call

    def on_packet_sent(self, *, packet: QuicSentPacket) -> None:  # see _bind
        self.inner.on_packet_sent(packet=packet)

    def on_packet_acked(self, *, now: float, packet: QuicSentPacket) -> None:  # see _bind
        self.inner.on_packet_acked(now=now, packet=packet)

    def on_packets_expired(self, *, packets: Iterable[QuicSentPacket]) -> None:
        self.inner.on_packets_expired(packets=packets)

    def on_packets_lost(self, *, now: float, packets: Iterable[QuicSentPacket]) -> None:
        packets = list(packets)
        self._lost += len(packets)
        self._loss_events += 1
        self.inner.on_packets_lost(now=now, packets=packets)

    def on_persistent_congestion(self) -> None:
        self.inner.on_persistent_congestion()

    def on_rtt_measurement(self, *, now: float, rtt: float) -> None:
        self._rtts += 1
        self.inner.on_rtt_measurement(now=now, rtt=rtt)

    def on_ack_end(self, now: float) -> None:
        self.inner.on_ack_end(now)
        if self.is_auto and not self._settled:
            self._acks += 1
            if self._acks % RTT_SAMPLES == 0:
                self._reconsider(now)

    def on_app_limited(self) -> None:
        self.inner.on_app_limited()

    def on_path_change(self, now: float) -> None:
        self._forget()
        self.inner.on_path_change(now)

    def resize(self, max_datagram_size: int) -> None:
        self._size = max_datagram_size
        self.inner.resize(max_datagram_size)

    def set_rate_cap(self, bytes_per_s: float) -> None:
        self.inner.set_rate_cap(bytes_per_s)

    def set_window_cap(self, size_bytes: int) -> None:
        self.inner.set_window_cap(size_bytes)

    def status(self) -> CongestionStatus:
        return self.inner.status()

    def get_log_data(self) -> dict[str, Any]:
        return self.inner.get_log_data()


def create_controller(
    setting: str, *, max_datagram_size: int, rng: random.Random, near: bool | None = None
) -> PathController:
    """The controller of a new path; ``near`` None: not known yet. Raises ValueError: not one of ``SETTINGS``."""
    return PathController(setting, max_datagram_size=max_datagram_size, rng=rng, near=near)
