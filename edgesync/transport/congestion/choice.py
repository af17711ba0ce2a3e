"""Which controller a path gets. Decides from what it is told; opens nothing, measures nothing."""

import random

from aioquic.quic.congestion.cubic import CubicCongestionControl
from aioquic.quic.congestion.reno import RenoCongestionControl

from edgesync.transport.congestion.base import CongestionController, adapt
from edgesync.transport.congestion.bbr import BbrController


def create_controller(
    name: str,
    *,
    max_datagram_size: int,
    rng: random.Random,
) -> CongestionController:
    """A controller of class ``name``: bbr, cubic or reno. Raises ValueError: no such class."""
    if name == "bbr":
        return BbrController(max_datagram_size=max_datagram_size, rng=rng)
    if name == "cubic":
        cubic = CubicCongestionControl(max_datagram_size=max_datagram_size)
        return adapt(cubic, name=name, max_datagram_size=max_datagram_size)
    if name == "reno":
        reno = RenoCongestionControl(max_datagram_size=max_datagram_size)
        return adapt(reno, name=name, max_datagram_size=max_datagram_size)
    raise ValueError(f"there is no congestion controller called {name!r}")
