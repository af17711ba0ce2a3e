"""Congestion control of the QUIC transport: pure decisions, fed with packets and time."""

from edgesync.transport.congestion.base import (
    AdaptedController,
    CongestionController,
    CongestionStatus,
    adapt,
)
from edgesync.transport.congestion.choice import PathController, create_controller, is_near
from edgesync.transport.congestion.pacer import Pacer, RateLimiter

__all__ = [
    "AdaptedController",
    "CongestionController",
    "CongestionStatus",
    "Pacer",
    "PathController",
    "RateLimiter",
    "adapt",
    "create_controller",
    "is_near",
]
