"""How long a path's datagrams may be, found by trying: packetization-layer path MTU discovery (RFC 8899).

A path begins with the size every QUIC path carries. Once a transfer wants it, the largest size the interface takes is
tried first, for most paths are as wide as their ends; if it does not arrive, sizes that real links have are halved
between what arrived and what did not. A probe is padding, so its loss costs nobody a retransmission. When full-sized
datagrams vanish while small ones arrive, or nothing at all is answered, the path goes back to the base at once (a black
hole, or an outage that looks like one) and searches again, later each time it happens.

Router messages (ICMP "packet too big") are not believed: anybody can forge them, and the search finds the same.

Decides from what it is told. It sends nothing, opens nothing and knows no clock: time is an argument, in seconds.
"""

from bisect import bisect_left, bisect_right
from typing import Final

from edgesync import limits

BASE_BYTES: Final = 1200
"""UDP payload every path must carry.   Source: RFC 9000 section 14."""
SIZES: Final = (
    1232,
    1252,
    1280,
    1324,
    1352,
    1372,
    1392,
    1412,
    1432,
    1452,
    1472,
    2952,
    4052,
    8192,
    8900,
    8952,
    8972,
)
"""UDP payloads that common links leave: IPv6's least, tunnels, PPPoE, Ethernet, jumbo frames."""
MAX_PROBES: Final = 3
"""Losses of one size that count as an answer.   Source: RFC 8899 section 5.1.2."""
PROBE_TIMEOUT_S: Final = 15.0
"""A probe of which nothing was heard for so long is taken for lost."""
RAISE_S: Final = 600.0
"""A search that ended below the interface's size begins again after this.   Source: RFC 8899 section 5.1.1."""
FIRST_RETRY_S: Final = 2.0
"""Pause after a fall; one that soon follows another doubles it, up to ``RAISE_S``."""
FORGET_FALLS_S: Final = 60.0
"""A fall so long after the last one (an outage, say) is the first one again."""
BLACK_HOLE_LOSSES: Final = 6
"""Full-sized datagrams lost in a row, with smaller ones sent later arriving, that make a black hole."""
BLACK_HOLE_TIMEOUTS: Final = 2
"""Probe timeouts (PTO) in a row that do, with nothing arriving at all."""


class PathMtu:
    """The size of one path's datagrams (UDP payload, bytes), and what to try next."""

    def __init__(self) -> None:
        self.size = BASE_BYTES
        """What datagrams may be now: it arrived, and nothing spoke against it since."""
        self.held = False
        """The size is given: nothing is tried, and nothing changes it."""
        self.falls = 0
        """Times a size that had arrived stopped arriving."""
        self._forget()

    def _forget(self) -> None:
        self.size = BASE_BYTES
        self.ceiling = BASE_BYTES
        """Largest size worth trying."""
        self._low = BASE_BYTES
        """Largest size that arrived in this search."""
        self._high = BASE_BYTES
        """Largest size that may still arrive."""
        self._failed: dict[int, int] = {}
        self._outstanding: int | None = None
        self._sent_at = 0.0
        self._resume_at = 0.0
        self._pause = FIRST_RETRY_S
        self._fell_at = -RAISE_S
        self._confirmed = -1
        """Highest packet number of a full-sized datagram that arrived."""
        self._suspects = 0

    # --- what the link tells

    def begin(self, ceiling: int, now: float) -> None:
        """A transfer begins on an interface that takes ``ceiling`` bytes of UDP payload."""
        if self.held:
            return
        ceiling = min(max(ceiling, BASE_BYTES), limits.MAX_DATAGRAM_BYTES)
        if ceiling == self.ceiling:
            return
        self.ceiling = ceiling
        if ceiling < self.size:
            self._settle(BASE_BYTES)
        self._search(now)

    def reset(self) -> None:
        """Another path: nothing is known of it. ``begin`` starts the search."""
        if not self.held:
            self._forget()

    def hold(self, size: int) -> None:
        """Keep to ``size``, for comparison, or for a path that somebody measured."""
        self._forget()
        self.size = size
        self.held = True

    def next_probe(self, now: float) -> int | None:
        """The size to send as a probe now; None: nothing to find out, or an answer is awaited."""
        if self._outstanding is not None:
            if now - self._sent_at < PROBE_TIMEOUT_S:
                return None
            self.probed(self._outstanding, False, now)
        if now < self._resume_at:
            return None
        if self._high <= self._low:
            if self._low >= self.ceiling:
                return None
            self._search(now)  # the raise timer
        self._outstanding, self._sent_at = self._candidate(), now
        return self._outstanding

    def probed(self, size: int, arrived: bool, now: float) -> None:
        """What became of a probe. An answer to a question that is no longer asked changes nothing."""
        if size != self._outstanding:
            return
        self._outstanding = None
        if arrived:
            self._low = max(self._low, size)
            if self._low > self.size:
                self._settle(self._low)
        else:
            self._failed[size] = self._failed.get(size, 0) + 1
            if self._failed[size] >= MAX_PROBES:
                self._rule_out(size)
        self._rest_if_done(now)

    def refused(self, size: int, now: float) -> None:
        """The kernel says that ``size`` bytes do not fit the interface (EMSGSIZE)."""
        if size <= BASE_BYTES or self.held:
            return
        if self._outstanding is not None and self._outstanding >= size:
            self._outstanding = None
        self._rule_out(size)
        if self.size >= size:
            self._low = BASE_BYTES
            self._settle(BASE_BYTES)
        self._rest_if_done(now)

    def arrived(self, number: int) -> None:
        """Packet ``number``, of at least the current size, was acknowledged."""
        if number > self._confirmed:
            self._confirmed = number
            self._suspects = 0

    def lost(self, number: int, size: int, now: float) -> bool:
        """Packet ``number`` of ``size`` bytes was lost; whether the path fell back to the base."""
        if self.held or self.size == BASE_BYTES or size <= BASE_BYTES or number <= self._confirmed:
            return False
        self._suspects += 1
        return self._suspects >= BLACK_HOLE_LOSSES and self._fall(now)

    def timeouts(self, count: int, now: float) -> bool:
        """``count`` probe timeouts in a row found no answer; whether the path fell back to the base."""
        if self.held:
            return False
        return self.size > BASE_BYTES and count >= BLACK_HOLE_TIMEOUTS and self._fall(now)

    # --- the search

    def _search(self, now: float) -> None:
        self._low = self.size
        self._high = self.ceiling
        self._failed.clear()
        self._outstanding = None
        self._resume_at = min(self._resume_at, now)

    def _candidate(self) -> int:
        """The top first; once that failed, the middle of what is left."""
        if self._high == self.ceiling:
            return self._high
        first, last = bisect_right(SIZES, self._low), bisect_right(SIZES, self._high)
        return SIZES[(first + last) // 2] if first < last else self._high

    def _rule_out(self, size: int) -> None:
        """``size`` does not arrive: the next one below that links have, at most, does."""
        at = bisect_left(SIZES, size)
        below = SIZES[at - 1] if at else BASE_BYTES
        self._high = min(self._high, max(below, self._low))

    def _rest_if_done(self, now: float) -> None:
        if self._high <= self._low and self._low < self.ceiling:
            self._resume_at = now + RAISE_S

    def _settle(self, size: int) -> None:
        self.size = size
        self._suspects = 0

    def _fall(self, now: float) -> bool:
        self.falls += 1
        self._settle(BASE_BYTES)
        self._search(now)
        quiet = now - self._fell_at > FORGET_FALLS_S + self._pause
        self._pause = FIRST_RETRY_S if quiet else min(self._pause * 2, RAISE_S)
        self._fell_at = now
        self._resume_at = now + self._pause
        return True
