"""How each source has behaved in one transfer, and what follows: how much to ask of it, whether to leave it alone.

It keeps rates, waits and faults; it picks no pieces. Invariants: a source's faults are only what it did to us, never
hearsay; quarantine is for good.
"""

import math
from dataclasses import dataclass, field
from typing import Final

from edgesync import limits
from edgesync.ids import PeerKey

RATE_WINDOW_S: Final = 2.0
"""Time constant of the goodput average."""
HORIZON_S: Final = 0.5
"""A peer is asked for what it delivers in this time besides its round trips: a killed one holds up little."""
ROUND_TRIPS: Final = 3.0
"""A source is asked again when half of what it was asked for is here: the other half must outlast the answer, and half
as much more, or the goodput measured from it would shrink the next question."""
MAX_DRY: Final = 8.0
DRY_DECAY: Final = 0.998
"""A piece: what ran dry once is asked for more over the next thousand pieces."""
LONG_RTT_S: Final = 0.05
"""On shorter paths running dry costs less than a killed peer that was asked for much."""
MAX_RTT_S: Final = 5.0
FIRST_LONG_RATE_BYTES_S: Final = 2_000_000.0
"""Assumed of a source at the end of a long path that has not delivered yet: it is filled in few questions."""
MIN_ASKED_PIECES: Final = 4
MAX_ASKED_BYTES: Final = 8 * limits.MIB
MIN_STALL_S: Final = 4.0
SILENT_ROUND_TRIPS: Final = 4.0
STALL_FACTOR: Final = 4.0
"""A source is a straggler when its next piece takes so many times what its goodput promises."""
FIRST_STALL_FACTOR: Final = 1.5
MAX_STALL_S: Final = 30.0
SLOWEST_BYTES_S: Final = 16_000.0
"""Goodput assumed of a source that has not delivered yet."""
ALIVE_BYTES_S: Final = 1_000.0
"""Bytes that come at this rate keep a source, however long its pieces take: a cap may be 8 kB/s, a link 64 kbit/s."""
FIRST_BACKOFF_S: Final = 2.0
MAX_BACKOFF_S: Final = 60.0
BAD_HASHES_ALLOWED: Final = 1
LIES_ALLOWED: Final = 8
"""``not_held`` answers about pieces a peer had announced, before it is left alone for a while."""


@dataclass(slots=True)
class Source:
    """One source's record. Times are monotonic seconds."""

    outstanding: dict[int, int] = field(default_factory=dict)
    """Piece → its length, in the order asked."""
    outstanding_bytes: int = 0
    rate_bytes_s: float = 0.0
    progress_at: float = 0.0
    """Last arrival, or when the first answer could be here."""
    alive_until: float = 0.0
    """Until when the bytes of unfinished pieces that came vouch for it."""
    rtt_s: float = 0.0
    """Of the path to it, as the transport measures it; 0: not known."""
    dry: float = 1.0
    """By how much its goodput is multiplied for having run dry while it was asked again."""
    bad_hashes: int = 0
    lies: int = 0
    faults: int = 0
    aside_until: float | None = None
    quarantined: bool = False
    _bytes: float = 0.0
    _seconds: float = 0.0

    def asked(self, piece: int, length: int, *, now: float) -> None:
        if not self.outstanding:
            self.progress_at = now + self.rtt_s
            if self.rate_bytes_s and self.rtt_s >= LONG_RTT_S:
                self.dry = min(2 * self.dry, MAX_DRY)
        self.outstanding[piece] = length
        self.outstanding_bytes += length

    def settled(self, piece: int) -> bool:
        """The piece will no longer come from here; False if it was not asked."""
        length = self.outstanding.pop(piece, None)
        if length is None:
            return False
        self.outstanding_bytes -= length
        return True

    def delivered(self, plain_bytes: int, *, now: float, rtt_s: float = 0.0) -> None:
        """Count a piece towards the goodput; time spent waiting for nothing is not held against the source."""
        elapsed = max(now - self.progress_at, 1e-4)
        keep = math.exp(-elapsed / RATE_WINDOW_S)
        self._bytes = self._bytes * keep + plain_bytes
        self._seconds = self._seconds * keep + elapsed
        self.rate_bytes_s = self._bytes / self._seconds
        self.rtt_s = min(rtt_s, MAX_RTT_S)
        self.dry = max(1.0, self.dry * DRY_DECAY)
        self.progress_at = now
        self.faults = 0

    def target_bytes(
        self,
        piece_bytes: int,
        *,
        horizon_s: float = HORIZON_S,
        questions: int = 1,
        most: int = MAX_ASKED_BYTES,
    ) -> int:
        """How much to have outstanding.

        ``piece_bytes`` is the average piece; ``questions`` follow one another until a piece comes.
        """
        least = MIN_ASKED_PIECES * piece_bytes
        wait = ROUND_TRIPS * questions * self.rtt_s
        promised = self.dry * self.rate_bytes_s * (horizon_s + wait)
        if not self.rate_bytes_s:
            promised = FIRST_LONG_RATE_BYTES_S * wait
        return max(least, min(int(promised), most))

    def stalls_at(self) -> float | None:
        """When this source counts as a straggler unless something comes."""
        for length in self.outstanding.values():
            if self.rate_bytes_s:
                expected = STALL_FACTOR * length / self.rate_bytes_s
            else:
                expected = FIRST_STALL_FACTOR * length / SLOWEST_BYTES_S
            patience = max(MIN_STALL_S, SILENT_ROUND_TRIPS * self.rtt_s, expected)
            return max(self.progress_at + min(patience, MAX_STALL_S), self.alive_until)
        return None

    def moved(self, carried_bytes: int, *, now: float) -> None:
        """Bytes of pieces that are not whole yet came."""
        until = max(self.alive_until, now) + carried_bytes / ALIVE_BYTES_S
        self.alive_until = min(until, now + MAX_STALL_S)

    def leave_alone(self, *, now: float, seconds: float | None = None) -> None:
        """Ask nothing of it for a while, longer each time nothing came in between."""
        if seconds is None:
            seconds = min(FIRST_BACKOFF_S * 2.0**self.faults, MAX_BACKOFF_S)
        self.faults = min(self.faults + 1, 16)
        self.aside_until = now + seconds


class PeerRanker:
    """Every source of one transfer."""

    def __init__(self) -> None:
        self.sources: dict[PeerKey, Source] = {}

    def add(self, peer: PeerKey) -> Source:
        """The record of a source; a peer that comes back finds its faults again."""
        source = self.sources.get(peer)
        if source is None:
            self._bound()
            source = self.sources[peer] = Source()
        return source

    def __getitem__(self, peer: PeerKey) -> Source:
        return self.sources[peer]

    def get(self, peer: PeerKey) -> Source | None:
        return self.sources.get(peer)

    def _bound(self) -> None:
        # Keys come and go; a member that churns identities must not grow this for ever.
        if len(self.sources) >= limits.MAX_CONNECTIONS * 2:
            for peer, source in self.sources.items():
                if not source.outstanding and not source.quarantined:
                    del self.sources[peer]
                    return
