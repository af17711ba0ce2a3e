"""How long to wait for a path before it counts as dead: longer where its round trips are.

Pure: seconds in, seconds out. A slow path is not a dead one: what is waited for takes its round trips, some of them
twice because a packet was lost. Each wait has a most, since a peer can make a path look as slow as it likes.
"""

from typing import Final

from edgesync import limits

SILENCE_ROUND_TRIPS: Final = 6.0
"""A ping, a lost answer and the pause before the next, which doubles: about four probe timeouts (RFC 9002, 6.2)."""
HANDSHAKE_ROUND_TRIPS: Final = 20.0
"""Three without a loss; two losses in a row on the same flight cost nine more."""


def silence_s(base_s: float, rtt_s: float) -> float:
    """How long nothing at all may come on a path with this round-trip time (0.0: unknown)."""
    return max(base_s, min(SILENCE_ROUND_TRIPS * rtt_s, limits.MAX_SILENCE_S))


def stranger_s(rtt_s: float, *, crowded: bool) -> float:
    """How long a stranger may take to prove who it is; where many are at the door nobody gets more than the base."""
    if crowded:
        return limits.UNPROVEN_TIMEOUT_S
    if not rtt_s:  # it has not answered once: its path may be as slow as any
        return 2 * limits.UNPROVEN_TIMEOUT_S
    return max(
        limits.UNPROVEN_TIMEOUT_S,
        min(HANDSHAKE_ROUND_TRIPS * rtt_s, limits.MAX_HANDSHAKE_S),
    )
