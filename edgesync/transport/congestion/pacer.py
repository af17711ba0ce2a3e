"""When the next datagram may leave: one pacer for each connection, rate caps shared by many.

Decides by bytes and by the time it is told; sends nothing, arms no timer, measures nothing. The controller owns the
rate (``Pacer.set_rate``), the operator's caps come as ``RateLimiter`` objects that several pacers share.

- A pacer keeps its debt. Stock aioquic's bucket forgives it, which under timers of 1 ms sends up to a fifth more than
  the rate.
- What may leave at one wake-up is bounded by ``BURST_S`` of the rate: a shallow queue loses more to larger bursts than
  late timers cost with smaller ones (measured on a 10 ms queue: 4 to 16 datagrams are right, 2 and 32 are not).
- A limiter never starves a member: among those that wait, the one that was given least goes first.
"""

import math
from typing import Final

BURST_S: Final = 0.004
"""Seconds of the rate that may leave at one wake-up."""
QUANTUM_S: Final = (0.002, 0.004)
"""Seconds of the rate worth a wake-up: below, timers cost more than smoothness gains. The longer one is for paths whose
delay hides it."""
QUANTUM_OF_RTT: Final = 1 / 12
LATE_S: Final = 0.012
"""A wake-up that comes late may make up for as much. Otherwise a machine that is busy with other things sends less than
its rate, a model of the path takes that for what the path carries, and the next rate is lower still."""
MIN_BURST: Final = 2
MAX_BURST: Final = 128
UNPACED_BURST: Final = 64
"""Datagrams a wake-up when no rate is set."""
_SLACK_BYTES: Final = 0.5
"""Rounding: a wake-up exactly at the time that was promised finds what was promised."""
_SLACK_S: Final = 1e-6

LIMITER_BURST_S: Final = 0.01
"""Seconds of a cap's rate that may leave at once after a pause."""
LIMITER_GRACE_S: Final = 0.025
"""A member that does not come for its turn within this time of it loses the turn: it has nothing to send."""


class RateLimiter:
    """A cap on bytes per second that several pacers share: a token bucket with turns. Rate 0: no cap.

    Source: turns by start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996), a datagram quantum each.
    """

    def __init__(self, rate_bytes_s: float = 0.0) -> None:
        self._rate = 0.0
        self._credit = 0.0
        self._at = 0.0
        self._virtual = 0.0
        self._given: dict[int, float] = {}
        """Member to its finish tag: bytes it was given, on the common scale."""
        self._waiting: dict[int, float] = {}
        """Member to the time until which its turn is kept."""
        self._next_member = 0
        self.set_rate(rate_bytes_s)

    @property
    def rate_bytes_s(self) -> float:
        return self._rate

    def set_rate(self, rate_bytes_s: float) -> None:
        """Change the cap of all members from now on; 0 lifts it. Raises ValueError: negative or not finite."""
        if not 0.0 <= rate_bytes_s < math.inf:
            raise ValueError(f"a rate cap is 0 or more bytes per second, not {rate_bytes_s}")
        if rate_bytes_s and self._rate:
            # debt is time that must pass: a debt made at 10 MB/s is not paid off at 8 kB/s byte for byte
            self._credit *= min(1.0, rate_bytes_s / self._rate)
        else:
            self._credit = 0.0
        self._rate = rate_bytes_s

    def join(self) -> int:
        """A new member's number."""
        self._next_member += 1
        self._given[self._next_member] = self._virtual
        return self._next_member

    def leave(self, member: int) -> None:
        self._given.pop(member, None)
        self._waiting.pop(member, None)

    def next_turn(self, member: int, *, now: float, size_bytes: int) -> float | None:
        """None: ``size_bytes`` may leave now; else when to ask again."""
        if not self._rate:
            return None
        self._refill(now)
        if self._credit < -_SLACK_BYTES:
            at = now - self._credit / self._rate + _SLACK_S
            self._waiting[member] = at + LIMITER_GRACE_S
            return at
        mine = max(self._given.get(member, self._virtual), self._virtual)
        for other, until in list(self._waiting.items()):
            if until < now:
                del self._waiting[other]
            elif other != member and self._given[other] + size_bytes < mine:
                at = now + size_bytes / self._rate + _SLACK_S
                self._waiting[member] = at + LIMITER_GRACE_S
                return at
        return None

    def room(self, *, now: float) -> float:
        """Bytes that may leave now beyond the first datagram (infinite without a cap)."""
        if not self._rate:
            return math.inf
        self._refill(now)
        return max(0.0, self._credit)

    def took(self, member: int, size_bytes: int) -> None:
        """``member`` sent ``size_bytes``."""
        if not self._rate:
            return
        self._credit -= size_bytes
        start = max(self._given.get(member, self._virtual), self._virtual)
        # those that wait with less than this member hold the common clock back: their turn is still to come
        self._virtual = min(
            [start, *(self._given[other] for other in self._waiting if other != member)]
        )
        self._given[member] = start + size_bytes
        self._waiting.pop(member, None)

    def _refill(self, now: float) -> None:
        if now > self._at:
            full = self._rate * LIMITER_BURST_S
            self._credit = min(full, self._credit + (now - self._at) * self._rate)
            self._at = now


class Pacer:
    """Spreads a connection's datagrams at the rate its controller set; also answers what stock aioquic asks a pacer.

    Without a rate (0) it lets ``UNPACED_BURST`` datagrams go a wake-up.
    """

    packet_time: float | None = None
    """Stock aioquic reads it in its log only."""

    def __init__(self, *, max_datagram_size: int) -> None:
        self.datagram_bytes = max_datagram_size
        self.rate_bytes_s = 0.0
        self.min_burst = MIN_BURST
        """Datagrams that may leave at a wake-up even where ``BURST_S`` of the rate is less."""
        self.quantum_s = QUANTUM_S[0]
        self._credit = 0.0
        self._at: float | None = None
        self._due: float | None = None
        """When it promised to let something go, while nothing left since."""
        self._late_bytes = 0.0
        """What should have left since then."""
        self._limiters: dict[RateLimiter, int] = {}

    def set_rate(self, rate_bytes_s: float) -> None:
        """What the controller wants from now on, bytes per second; 0: no pacing."""
        self.rate_bytes_s = rate_bytes_s

    def suit_delay(self, rtt_s: float) -> None:
        """Wake up as seldom as a path of this round trip hardly notices."""
        self.quantum_s = min(max(QUANTUM_S[0], rtt_s * QUANTUM_OF_RTT), QUANTUM_S[1])

    def set_limiters(self, limiters: tuple[RateLimiter, ...]) -> None:
        """The caps this connection shares with others; replaces those set before."""
        for limiter in [limiter for limiter in self._limiters if limiter not in limiters]:
            limiter.leave(self._limiters.pop(limiter))
        for limiter in limiters:
            if limiter not in self._limiters:
                self._limiters[limiter] = limiter.join()

    def close(self) -> None:
        """Leave the shared caps: the connection has ended."""
        self.set_limiters(())

    @property
    def burst(self) -> int:
        """Datagrams that may leave at one wake-up after a pause."""
        if self.rate_bytes_s <= 0.0:
            return UNPACED_BURST
        wanted = math.ceil(self.rate_bytes_s * BURST_S / self.datagram_bytes)
        return max(self.min_burst, min(MAX_BURST, wanted))

    def quota(self, now: float) -> int:
        """Datagrams that may leave now. Ask only with something to send: who is refused keeps a turn in shared caps."""
        allowed = self._own_quota(now)
        if allowed and self._limiters:
            size = self.datagram_bytes
            for limiter, member in self._limiters.items():
                if limiter.next_turn(member, now=now, size_bytes=size) is not None:
                    return 0
                room = limiter.room(now=now)
                if room < allowed * size:
                    allowed = min(allowed, int(room / size) + 1)
        return allowed

    def next_send(self, now: float, room: int) -> float | None:
        """When to try again: None now, else the time at which a quantum, or ``room`` datagrams if fewer, may leave."""
        if self.rate_bytes_s > 0.0:
            have = self._own_quota(now)
            want = round(self.rate_bytes_s * self.quantum_s / self.datagram_bytes)
            want = max(1, min(want, self.burst, room))
            if have < want:
                missing = (want - 1) * self.datagram_bytes - self._credit
                # the shared caps are not asked: it would keep a turn it cannot use
                self._due = now + missing / self.rate_bytes_s + _SLACK_S
                return self._due
        at: float | None = None
        for limiter, member in self._limiters.items():
            turn = limiter.next_turn(member, now=now, size_bytes=self.datagram_bytes)
            if turn is not None:
                at = turn if at is None else max(at, turn)
        return at

    def sent(self, size_bytes: int) -> None:
        """``size_bytes`` left (all datagrams of a wake-up together, or one by one)."""
        if self.rate_bytes_s > 0.0:
            self._credit -= size_bytes
            self._late_bytes = max(0.0, self._late_bytes - size_bytes)
            self._due = None
        for limiter, member in self._limiters.items():
            limiter.took(member, size_bytes)

    def _own_quota(self, now: float) -> int:
        rate = self.rate_bytes_s
        if rate <= 0.0:
            return UNPACED_BURST
        size = self.datagram_bytes
        most = (self.burst - 1) * size
        if self._at is None:
            self._credit = most
            self._at = now
        elif now > self._at:
            self._credit += (now - self._at) * rate
            self._at = now
            if self._due is not None and now > self._due:
                self._late_bytes = min(now - self._due, LATE_S) * rate
        self._credit = min(self._credit, most + self._late_bytes)
        if self._credit < -_SLACK_BYTES:
            return 0
        return int((self._credit + _SLACK_BYTES) / size) + 1

    # --- what stock aioquic calls, one datagram at a time

    def next_send_time(self, now: float) -> float | None:
        """None: a datagram may leave now."""
        return None if self.quota(now) else self.next_send(now, 1)

    def update_after_send(self, now: float) -> None:
        self.sent(self.datagram_bytes)

    def update_rate(self, congestion_window: int, smoothed_rtt: float) -> None:
        """Ignored: the rate is the controller's."""


class WindowPacer(Pacer):
    """The rate follows window and round trip, as in stock aioquic, for controllers that have only a window.

    Source: RFC 9002 section 7.7 (N = 1.25, so that pacing does not limit what the window allows).
    """

    GAIN: Final = 1.25

    def __init__(self, *, max_datagram_size: int) -> None:
        super().__init__(max_datagram_size=max_datagram_size)
        self.min_burst = 16  # stock's bucket
        self.cap_bytes_s = 0.0

    def update_rate(self, congestion_window: int, smoothed_rtt: float) -> None:
        rate = self.GAIN * congestion_window / max(smoothed_rtt, 1e-6)
        self.set_rate(min(rate, self.cap_bytes_s) if self.cap_bytes_s else rate)
