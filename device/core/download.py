"""One bundle's download: which pieces to ask of whom, when to ask the gateway, when to give a source up.

It decides; the swarm shell moves bytes, checks hashes and writes. The simulator runs this very class.

Rules:

* Peers are always used, whether or not a gateway answers: rarest first among what joined peers say they hold.
* The gateway is asked for a piece only under a lease it gave; a piece some usable peer holds is not fetched from it.
* The pieces no reachable source has are told to the gateway as ``unavailable`` after ``UNAVAILABLE_AFTER_S``.
* A silent gateway costs LEASE_TIMEOUT_S once; nothing else waits for it.
* A source is asked for as much as its goodput promises (``device.core.peer_ranker``), at most MAX_SOURCES peers at a
  time, and given up when it stops making progress.
* Where the gateway is metered (GatewayAllowance), it is asked only for what no peer has had for METERED_AFTER_S,
  however slow peers are, and never for more than is left of the budget.
* Only the endgame asks two sources for one piece, and never the gateway.
* ``explain`` says at any time what the download waits for.

Called by ``device.swarm`` and ``simulations.actors``.
"""

import math
from collections.abc import Sequence
from random import Random
from typing import Final, assert_never

from device.core.events import (
    GATEWAY,
    Announce,
    AskLease,
    BytesMoved,
    CancelRequests,
    Completed,
    Dial,
    DownloadEffect,
    DownloadEvent,
    FailureReason,
    GatewayAllowance,
    GatewayDown,
    GatewayUp,
    LeaseReceived,
    PeerBitfield,
    PeerHave,
    PeerJoined,
    PeerLeft,
    PeerLost,
    PieceArrived,
    PieceDropped,
    PieceFailed,
    PieceReceived,
    PiecesDurable,
    QuarantinePeer,
    ReportDurable,
    RequestPieces,
    StoragePaused,
    Tick,
)
from device.core.peer_ranker import (
    BAD_HASHES_ALLOWED,
    LIES_ALLOWED,
    MAX_RTT_S,
    MIN_ASKED_PIECES,
    PeerRanker,
    Source,
)
from device.core.piece_picker import PiecePicker
from edgesync import limits
from edgesync.bitfield import Bitfield
from edgesync.ids import PeerKey
from edgesync.rarity import mask_of, mask_of_bitfield, sample

MAX_SOURCES: Final = 5
"""Peers asked at the same time; more would only queue at their upload slots."""
LEASE_TIMEOUT_S: Final = 1.5
"""A gateway that has not answered a lease request by then, and LEASE_ROUND_TRIPS, is left alone for a while."""
LEASE_ROUND_TRIPS: Final = 3.0
"""The answer's own, and a lost packet's."""
EMPTY_LEASE_RETRY_S: Final = 0.3
"""Soonest next question after a lease that gave nothing from the gateway."""
FIRST_SILENCE_S: Final = 2.0
MAX_SILENCE_S: Final = 30.0
UNAVAILABLE_AFTER_S: Final = 3.0
"""How long nobody in reach holds a piece before the gateway is told so."""
METERED_AFTER_S: Final = 3.0
"""How long peers are looked for before bytes are paid for: longer than mDNS takes."""
CARRIED_FACTOR: Final = 1.05
"""What a piece costs on the wire for each of its bytes."""
STARVING_BYTES_S: Final = 16_000.0
"""Less than this from all peers together, and the gateway is asked to help although peers hold the pieces."""
STARVING_AFTER_S: Final = 8.0
GATEWAY_HORIZON_S: Final = 1.0
"""As a peer's horizon, and the time of a question to the scheduler on top."""
MAX_GATEWAY_BYTES: Final = limits.MAX_LEASE_PIECES * limits.MIN_PIECE_AVERAGE_BYTES
"""What one lease may name where pieces are smallest; larger pieces mean fewer of them."""
MIN_GATEWAY_STALL_S: Final = 10.0
PATIENCE: Final = 2
"""Faults without a delivery between them, until what a peer holds is asked of the gateway."""
DIAL_AGAIN_S: Final = 10.0


class Download:
    """``handle`` one event, get effects; ``next_deadline`` says when a Tick is due."""

    def __init__(
        self, piece_lengths: Sequence[int], held: Bitfield, *, rng: Random, now: float
    ) -> None:
        self._lengths = piece_lengths
        self._rng = rng
        self._started_at = now
        self._average = max(1, sum(piece_lengths) // max(1, len(piece_lengths)))
        self.picker = PiecePicker(len(piece_lengths), mask_of_bitfield(held), rng=rng)
        self.ranker = PeerRanker()
        self._joined: dict[PeerKey, Source] = {}
        self._preferred: dict[PeerKey, list[int]] = {}
        self._origins: dict[int, PeerKey | None] = {}
        self._dialed_at: dict[PeerKey, float] = {}
        self._gateway = self.ranker.add(GATEWAY)
        self._gateway_up = False
        self._gateway_changed_at = now
        self._lease_asked_at: float | None = None
        self._lease_silences = 0
        self._lease_at = now
        self._lease_was_empty = False
        self._begged = 0
        self._left_bytes: float | None = None
        """Of the budget; None: the gateway is not metered."""
        self._spent_reason = ""
        self._gateway_said = ""
        self._unseen_since: float | None = None
        self._recent_bytes = 0.0
        self._recent_at = now
        self._paused: str | None = None
        self._completed = False

    # --- what others read

    @property
    def complete(self) -> bool:
        return not self.picker.missing

    def explain(self, *, now: float) -> str:
        """One clause for status screens: what this download does or waits for, and why."""
        picker = self.picker
        if not picker.missing:
            return "complete"
        if self._paused:
            return f"waiting: {self._paused}"
        outstanding = [peer for peer, source in self._joined.items() if source.outstanding]
        if self._gateway.outstanding:
            outstanding.append(GATEWAY)
        if outstanding:
            names = "the gateway" if outstanding == [GATEWAY] else f"{len(outstanding)} sources"
            return f"downloading from {names}"
        if not self._affords_a_piece():
            return f"waiting: {self._spent_reason}"
        if self._gateway_said and self._gateway_up:
            return f"waiting: {self._gateway_said}"
        gateway = (
            "the gateway has none to give now"
            if self._gateway_up and not self._lease_silences
            else f"gateway unreachable for {max(0.0, now - self._gateway_changed_at):.0f} s"
        )
        unseen = picker.unseen.bit_count()
        if unseen:
            return (
                f"waiting: no peer has {unseen} of {picker.missing_count} missing pieces; {gateway}"
            )
        return f"waiting: the peers that have the missing pieces do not answer; {gateway}"

    def next_deadline(self) -> float | None:
        if not self.picker.missing or self._paused:
            return None
        times: list[float] = []
        for source in self._joined.values():
            if source.aside_until is not None and not source.quarantined:
                times.append(source.aside_until)
            stall = source.stalls_at()
            if stall is not None:
                times.append(stall)
        stall = self._gateway_stalls_at()
        if stall is not None:
            times.append(stall)
        if self._gateway_up:
            if self._lease_asked_at is not None:
                times.append(self._lease_asked_at + self._lease_patience_s())
            elif self._lease_useful():
                times.append(self._lease_due(now=self._lease_at))
            elif self._left_bytes is None:
                times.append(max(self._lease_at, self._starving_at()))
        return min(times, default=None)

    # --- events

    def handle(self, event: DownloadEvent, *, now: float) -> list[DownloadEffect]:
        effects: list[DownloadEffect] = []
        match event:
            case GatewayUp(rtt_s):
                self._gateway.rtt_s = min(rtt_s, MAX_RTT_S)
                self._gateway_up = True
                self._gateway_changed_at = now
                self._lease_asked_at = None
                self._lease_silences = 0
                self._lease_at = now
            case GatewayDown():
                if self._gateway_up:
                    self._gateway_changed_at = now
                self._gateway_up = False
                self._lease_asked_at = None
                self._give_back(GATEWAY, self._gateway)
            case LeaseReceived():
                self._on_lease(event, effects, now=now)
            case GatewayAllowance(left_bytes, reason):
                self._left_bytes = left_bytes
                self._spent_reason = reason
            case PeerJoined(peer):
                source = self.ranker.add(peer)
                self._joined[peer] = source
                self.picker.add_peer(peer)
                if source.quarantined:
                    self.picker.set_aside(peer)
            case PeerLeft(peer):
                self._on_left(peer)
            case PeerBitfield(peer, mask):
                if peer in self._joined:
                    self.picker.set_mask(peer, mask)
            case PeerHave(peer, pieces):
                if peer in self._joined:
                    self.picker.add_mask(peer, mask_of(pieces))
            case PeerLost(peer, pieces):
                if peer in self._joined:
                    self.picker.remove_mask(peer, mask_of(pieces))
            case PieceReceived(source_key, piece):
                self.picker.landing(piece, source_key)
                return effects
            case PieceArrived():
                self._on_arrived(event, effects, now=now)
            case BytesMoved(peer, carried_bytes):
                moving = self.ranker.get(peer)
                if moving is not None and moving.outstanding:
                    moving.moved(carried_bytes, now=now)
            case PieceFailed(source_key, piece, reason):
                self._on_failed(source_key, piece, reason, effects, now=now)
            case PieceDropped(piece):
                self.picker.dropped(piece)
                self._completed = False
            case PiecesDurable(pieces):
                self._on_durable(pieces, effects)
            case StoragePaused(why):
                self._paused = why
                if why is not None:
                    self._cancel_all(effects)
            case Tick():
                pass
            case _:
                assert_never(event)
        self._schedule(effects, now=now)
        return effects

    def _on_lease(self, lease: LeaseReceived, effects: list[DownloadEffect], *, now: float) -> None:
        self._lease_asked_at = None
        self._lease_silences = 0
        begged, self._begged = self._begged, 0
        self._lease_was_empty = not any(grant.primary == GATEWAY for grant in lease.grants)
        least = EMPTY_LEASE_RETRY_S if self._lease_was_empty else 0.0
        self._lease_at = now + max(lease.retry_after_s, least)
        for address in lease.sources:
            self._dial(address.peer, address.addresses, effects, now=now)
        wanted: list[int] = []
        for grant in lease.grants:
            if grant.primary == GATEWAY:
                # What a peer holds by now is fetched there, unless it was asked for because no peer gives it.
                if self.picker.is_free(grant.piece) and (
                    begged >> grant.piece & 1 or not self.picker.has_usable(grant.piece)
                ):
                    wanted.append(grant.piece)
                continue
            peer = grant.primary if grant.primary in self._joined else grant.backup
            if peer in self._joined:
                self._preferred.setdefault(peer, []).append(grant.piece)
        self._gateway_said = lease.reason
        wanted = self._affordable(wanted)
        if wanted and self._gateway_up and self._paused is None:
            self._request(GATEWAY, self._gateway, wanted, effects, now=now)

    def _dial(
        self,
        peer: PeerKey,
        addresses: tuple[str, ...],
        effects: list[DownloadEffect],
        *,
        now: float,
    ) -> None:
        if peer in self._joined or not addresses:
            return
        last = self._dialed_at.get(peer)
        if last is not None and now - last < DIAL_AGAIN_S:
            return
        if len(self._dialed_at) >= limits.MAX_CONNECTIONS:
            self._dialed_at.pop(next(iter(self._dialed_at)))
        self._dialed_at[peer] = now
        effects.append(Dial(peer, addresses))

    def _on_left(self, peer: PeerKey) -> None:
        source = self._joined.pop(peer, None)
        self._preferred.pop(peer, None)
        if source is not None:
            self._give_back(peer, source)
            self.picker.remove_peer(peer)

    def _on_arrived(
        self, event: PieceArrived, effects: list[DownloadEffect], *, now: float
    ) -> None:
        source = self.ranker.get(event.source)
        if source is not None and source.settled(event.piece):
            source.delivered(self._lengths[event.piece], now=now, rtt_s=event.rtt_s)
        if event.source == GATEWAY:
            if self._left_bytes is not None:
                self._left_bytes -= event.carried_bytes * CARRIED_FACTOR
        else:
            self._note_bytes(self._lengths[event.piece], now=now)
        if not self.picker.is_missing(event.piece):
            return
        others = self.picker.held(event.piece)
        self._origins[event.piece] = None if event.source == GATEWAY else event.source
        effects.append(Announce((event.piece,)))
        for other in others:
            if other != event.source:
                self._cancel_if_useless(other, effects)
        if not self.picker.missing and not self._completed:
            self._completed = True
            self._cancel_all(effects)
            effects.append(Completed())

    def _cancel_if_useless(self, key: PeerKey, effects: list[DownloadEffect]) -> None:
        """Cancel a source's streams once all they would bring is here."""
        source = self.ranker.get(key)
        if source is None or not source.outstanding:
            return
        if any(self.picker.is_missing(piece) for piece in source.outstanding):
            return
        self._give_back(key, source)
        effects.append(CancelRequests(key))

    def _on_failed(
        self,
        key: PeerKey,
        piece: int,
        reason: FailureReason,
        effects: list[DownloadEffect],
        *,
        now: float,
    ) -> None:
        self.picker.lost(piece, key)
        source = self.ranker.get(key)
        if source is None:
            return
        source.settled(piece)
        self.picker.stop(piece, key)
        match reason:
            case "gone":
                self.picker.remove_mask(key, 1 << piece)
            case "not_held":
                self.picker.remove_mask(key, 1 << piece)
                source.lies += 1
                if source.lies > LIES_ALLOWED:
                    source.lies = 0
                    self._leave_alone(key, source, now=now)
            case "busy":
                self._leave_alone(key, source, now=now, seconds=self._rng.uniform(0.5, 1.5))
            case "refused":
                self._leave_alone(key, source, now=now, seconds=60.0)
            case "broken":
                self._leave_alone(key, source, now=now)
            case "bad_hash":
                self.picker.remove_mask(key, 1 << piece)
                source.bad_hashes += 1
                if source.bad_hashes > BAD_HASHES_ALLOWED and key != GATEWAY:
                    self._quarantine(key, source, effects)
                else:
                    self._leave_alone(key, source, now=now, seconds=1.0)
            case _:
                assert_never(reason)

    def _quarantine(self, key: PeerKey, source: Source, effects: list[DownloadEffect]) -> None:
        if source.quarantined:
            return
        source.quarantined = True
        self.picker.set_aside(key)
        self.picker.lost_all(key)
        if source.outstanding:
            self._give_back(key, source)
            effects.append(CancelRequests(key))
        effects.append(QuarantinePeer(key))

    def _leave_alone(
        self, key: PeerKey, source: Source, *, now: float, seconds: float | None = None
    ) -> None:
        """Once per incident: a broken stream fails many pieces."""
        if source.aside_until is not None and source.aside_until > now:
            return
        source.leave_alone(now=now, seconds=seconds)
        if key == GATEWAY:
            assert source.aside_until is not None
            self._lease_at = max(self._lease_at, source.aside_until)
        else:
            self.picker.set_aside(key)

    def _on_durable(self, pieces: tuple[int, ...], effects: list[DownloadEffect]) -> None:
        groups: dict[PeerKey | None, list[int]] = {}
        for piece in pieces:
            groups.setdefault(self._origins.pop(piece, None), []).append(piece)
        for origin, group in groups.items():
            effects.append(ReportDurable(tuple(group), origin))

    # --- decisions

    def _schedule(self, effects: list[DownloadEffect], *, now: float) -> None:
        if not self.picker.missing or self._paused is not None:
            return
        self._give_up_stragglers(effects, now=now)
        self._ask_peers(effects, now=now)
        self._ask_gateway(effects, now=now)

    def _give_up_stragglers(self, effects: list[DownloadEffect], *, now: float) -> None:
        for key, source in self._joined.items():
            if source.aside_until is not None and source.aside_until <= now:
                source.aside_until = None
                if not source.quarantined:
                    self.picker.let_in(key)
            stall = source.stalls_at()
            if stall is not None and stall <= now:
                self._give_back(key, source)
                effects.append(CancelRequests(key))
                self._leave_alone(key, source, now=now)
        stall = self._gateway_stalls_at()
        if stall is not None and stall <= now:
            self._give_back(GATEWAY, self._gateway)
            effects.append(CancelRequests(GATEWAY))
            self._leave_alone(GATEWAY, self._gateway, now=now)

    def _lease_patience_s(self) -> float:
        return LEASE_TIMEOUT_S + LEASE_ROUND_TRIPS * self._gateway.rtt_s

    def _gateway_stalls_at(self) -> float | None:
        stall = self._gateway.stalls_at()
        return (
            None if stall is None else max(stall, self._gateway.progress_at + MIN_GATEWAY_STALL_S)
        )

    def _ask_peers(self, effects: list[DownloadEffect], *, now: float) -> None:
        picker = self.picker
        active = 0
        idle: list[tuple[float, float, PeerKey, Source]] = []
        hungry: list[tuple[PeerKey, Source]] = []
        for key, source in self._joined.items():
            if source.aside_until is not None or source.quarantined:
                continue
            if source.outstanding:
                active += 1
                if source.outstanding_bytes * 2 <= source.target_bytes(self._average):
                    hungry.append((key, source))
            elif picker.mask(key) & picker.missing:
                idle.append((-source.rate_bytes_s, self._rng.random(), key, source))
        idle.sort(key=lambda item: item[:2])
        hungry.extend(
            (key, source) for _rate, _tie, key, source in idle[: max(0, MAX_SOURCES - active)]
        )
        if not hungry:
            return
        sources = max(active, min(MAX_SOURCES, active + len(idle)))
        for key, source in hungry:
            self._ask_peer(key, source, sources, effects, now=now)
        if picker.endgame:
            for key, source in hungry:
                if not source.outstanding:
                    duplicates = picker.pick_duplicate(key, count=2)
                    # Not from a source that will bring it any moment.
                    late = [piece for piece in duplicates if self._is_late(piece, source, now=now)]
                    if late:
                        self._request(key, source, late, effects, now=now)

    def _is_late(self, piece: int, other: Source, *, now: float) -> bool:
        holder = self.ranker.get(self.picker.sources(piece)[0])
        if holder is None:
            return True
        waited = now - holder.progress_at
        mine = self._lengths[piece] / (other.rate_bytes_s or 1e6)
        return waited > 2 * mine + 0.25

    def _ask_peer(
        self,
        key: PeerKey,
        source: Source,
        sources: int,
        effects: list[DownloadEffect],
        *,
        now: float,
    ) -> None:
        picker = self.picker
        room = source.target_bytes(self._average) - source.outstanding_bytes
        # Near the end nobody takes more than its share of what is left, or it would be waited for alone.
        share = max(1, picker.free.bit_count() // (2 * max(1, sources)))
        count = min(max(1, math.ceil(room / self._average)), share, limits.MAX_PIECES_PER_REQUEST)
        wanted: list[int] = []
        preferred = self._preferred.get(key)
        if preferred:
            mask = picker.mask(key)
            while preferred and len(wanted) < count:
                piece = preferred.pop()
                if mask >> piece & 1 and picker.is_free(piece) and piece not in wanted:
                    wanted.append(piece)
        if len(wanted) < count:
            chosen = mask_of(wanted)
            wanted.extend(
                piece
                for piece in picker.pick(key, count=count)[: count - len(wanted)]
                if not chosen >> piece & 1
            )
        if wanted:
            self._request(key, source, wanted, effects, now=now)

    def _request(
        self,
        key: PeerKey,
        source: Source,
        pieces: list[int],
        effects: list[DownloadEffect],
        *,
        now: float,
    ) -> None:
        for piece in pieces:
            self.picker.start(piece, key)
            source.asked(piece, self._lengths[piece], now=now)
        most = limits.MAX_PIECES_PER_REQUEST
        effects.extend(
            RequestPieces(key, tuple(pieces[first : first + most]))
            for first in range(0, len(pieces), most)
        )

    def _lease_useful(self) -> bool:
        gateway = self._gateway
        return (
            bool(self._unseen())
            and gateway.outstanding_bytes * 2 <= self._gateway_target_bytes()
            and self._affords_a_piece()
        )

    def _room_bytes(self) -> float:
        """What the budget has left beside what is on its way."""
        if self._left_bytes is None:
            return math.inf
        return self._left_bytes / CARRIED_FACTOR - self._gateway.outstanding_bytes

    def _affords_a_piece(self) -> bool:
        return self._room_bytes() >= self._average

    def _affordable(self, pieces: list[int]) -> list[int]:
        """As many as the budget has room for."""
        room = self._room_bytes()
        for position, piece in enumerate(pieces):
            room -= self._lengths[piece]
            if room < 0:
                return pieces[:position]
        return pieces

    def _lease_due(self, *, now: float) -> float:
        """When the gateway may be asked for what no peer has."""
        if self._left_bytes is None:
            return self._lease_at
        since = now if self._unseen_since is None else self._unseen_since
        return max(self._lease_at, since + METERED_AFTER_S)

    def _unseen(self) -> int:
        """Pieces no peer has that may still be expected to give them."""
        return self.picker.unseen_but_for(self._is_patient)

    def _is_patient(self, peer: PeerKey) -> bool:
        """A peer that is slow or busy once is waited for: what it holds need not leave the gateway again."""
        source = self.ranker.get(peer)
        return source is not None and not source.quarantined and source.faults < PATIENCE

    def _gateway_target_bytes(self) -> int:
        least = 2 * MIN_ASKED_PIECES * self._average
        target = self._gateway.target_bytes(
            self._average, horizon_s=GATEWAY_HORIZON_S, questions=2, most=MAX_GATEWAY_BYTES
        )
        return max(least, target)

    def _ask_gateway(self, effects: list[DownloadEffect], *, now: float) -> None:
        unseen = self._unseen()
        if not unseen:
            self._unseen_since = None
        elif self._unseen_since is None:
            self._unseen_since = now
        if self._gateway.aside_until is not None and self._gateway.aside_until <= now:
            self._gateway.aside_until = None
        if not self._gateway_up:
            return
        if self._lease_asked_at is not None:
            if now < self._lease_asked_at + self._lease_patience_s():
                return
            if not self._lease_silences:
                self._gateway_changed_at = now
            silence = min(FIRST_SILENCE_S * 2.0**self._lease_silences, MAX_SILENCE_S)
            self._lease_silences = min(self._lease_silences + 1, 16)
            self._lease_asked_at = None
            self._lease_at = now + silence
        if now < self._lease_due(now=now):
            return
        starving = self._left_bytes is None and now >= self._starving_at()
        if not self._lease_useful() and not starving:
            return
        unavailable: tuple[int, ...] = ()
        if (
            self._lease_was_empty
            and self._unseen_since is not None
            and now - self._unseen_since >= UNAVAILABLE_AFTER_S
        ):
            unavailable = tuple(sample(unseen, limits.MAX_LEASE_PIECES, self._rng))
        elif starving and self._lease_was_empty:
            unavailable = tuple(sample(self.picker.free, MIN_ASKED_PIECES, self._rng))
            self._recent_at = now
        room = self._gateway_target_bytes() - self._gateway.outstanding_bytes
        count = min(
            max(1, math.ceil(room / self._average)),
            limits.MAX_LEASE_PIECES,
            max(1, self.picker.free.bit_count()),
        )
        if self._left_bytes is not None:
            count = min(count, max(1, int(self._room_bytes() / self._average)))
        self._lease_asked_at = now
        self._begged = mask_of(unavailable)
        effects.append(AskLease(count, tuple(sorted(unavailable))))

    def _note_bytes(self, plain_bytes: int, *, now: float) -> None:
        """A leaky count of what peers bring: below STARVING_BYTES_S it empties, and ``_starving_at`` comes."""
        self._recent_at = min(self._recent_at + plain_bytes / STARVING_BYTES_S, now)

    def _starving_at(self) -> float:
        return self._recent_at + STARVING_AFTER_S

    # --- small ones

    def _give_back(self, key: PeerKey, source: Source) -> None:
        """Nothing more is expected of the source: its pieces are free again."""
        for piece in list(source.outstanding):
            self.picker.stop(piece, key)
        source.outstanding.clear()
        source.outstanding_bytes = 0

    def _cancel_all(self, effects: list[DownloadEffect]) -> None:
        for key, source in (*self._joined.items(), (GATEWAY, self._gateway)):
            if source.outstanding:
                self._give_back(key, source)
                effects.append(CancelRequests(key))
