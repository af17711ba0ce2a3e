"""Who may fetch which piece from whom: leases for the devices of each site, so that little leaves the gateway twice.

A swarm is one manifest at one site. The scheduler decides on what devices say is durable; it trusts none of it with
more than time: what a lease says is advice, signatures and hashes decide on the device. The simulator runs this very
class.

Rules:

* A piece is granted from the gateway only while it is not *covered* at the site: on its way to another device under a
  running lease, or held by a live device that is believed. Pieces that never left go before pieces that left once
  (super-seeding, BEP 16).
* A device is believed until someone was sent to it; from then on until another device fetched from it, at most for
  DOUBT_DEADLINES lease deadlines. Pieces another device fetched from it stay believed while it is live.
* A device that says it reaches no source of a piece is told of live holders; when it says so again it gets the piece
  from the gateway.
* A lease runs while its device makes progress, then its pieces are free. After a disconnect they are kept back for
  GRACE_S: a device that fetched them from the lost one may be about to say so.
* Peers are chosen by what is already asked of them and by their goodput, ties by chance; the rarest pieces first.

Called by ``gateway.seeder`` and ``simulations.actors``.
"""

import math
from dataclasses import dataclass, field
from random import Random
from typing import Final, assert_never

from edgesync import limits
from edgesync.ids import Digest, PeerKey
from edgesync.rarity import Rarity, full_mask, mask_of, pieces_of, random_piece, sample
from gateway.core.events import (
    GATEWAY,
    BundleRetired,
    BundleServed,
    DeviceConnected,
    DeviceDisconnected,
    DeviceSeen,
    GiveLease,
    Granted,
    HoldingsReported,
    LeaseAsked,
    NamedSource,
    PieceSent,
    PiecesHeld,
    PiecesLost,
    SchedulerEffect,
    SchedulerEvent,
    Tick,
)

MIN_DEADLINE_S: Final = 10.0
MAX_DEADLINE_S: Final = 300.0
DEADLINE_FACTOR: Final = 4.0
"""A lease may take so many times what the device's goodput promises."""
DOUBT_DEADLINES: Final = 3
FORGIVE_S: Final = 120.0
"""A doubted device that was asked nothing for so long gets a new chance: who doubted it may just have gone away."""
GRACE_S: Final = 3.0
"""Longer than a device waits before it makes pieces durable and says so."""
UNAVAILABLE_AGAIN_S: Final = 4.0
"""Time a device has to reach a holder it was told of before its word that it cannot is taken."""
FIRST_RATE_BYTES_S: Final = 100_000.0
RATE_WINDOW_S: Final = 3.0
RETRY_S: Final = 0.5
"""When to ask again while pieces are on their way to others."""
MIN_SHARE_PIECES: Final = 4
MAX_PEER_GRANTS: Final = 32
MAX_NAMED: Final = 8
MAX_HOLDERS_WEIGHED: Final = 16
TICK_S: Final = 1.0
ACTIVE_FOR_S: Final = 600.0
"""A swarm nobody moved anything in for so long no longer counts in ``min_site_replication``."""
FORGET_DEVICE_S: Final = 86_400.0


@dataclass(slots=True)
class _Lease:
    """One piece on its way from the gateway to one device."""

    until: float
    sent: bool = False


@dataclass(slots=True)
class _Member:
    """One device in one swarm."""

    have: int = 0
    confirmed: int = 0
    """Pieces another device fetched from it."""
    doubt_until: float | None = None
    """Set when somebody was sent to it; past it only what is confirmed counts."""
    leases: dict[int, _Lease] = field(default_factory=dict)
    leased: int = 0
    asked_of: float = 0.0
    """Pieces others were advised to fetch from it, decaying."""
    asked_at: float = 0.0
    told: dict[PeerKey, float] = field(default_factory=dict)
    rate_bytes_s: float = 0.0
    progress_at: float = 0.0
    _bytes: float = 0.0
    _seconds: float = 0.0

    def believed(self, *, now: float) -> int:
        if self.doubted(now=now):
            return self.confirmed & self.have
        return self.have

    def doubted(self, *, now: float) -> bool:
        """Somebody was sent to it and nothing came of it."""
        return self.doubt_until is not None and (
            self.doubt_until < now <= self.doubt_until + FORGIVE_S
        )

    def named(self, *, now: float) -> None:
        """Somebody is sent to it: from here on it has to prove itself."""
        if self.doubt_until is None or now > self.doubt_until + FORGIVE_S:
            self.doubt_until = now + DOUBT_DEADLINES * MIN_DEADLINE_S

    def queue(self, *, now: float) -> float:
        return self.asked_of * math.exp(-(now - self.asked_at) / RATE_WINDOW_S)

    def sent(self, carried_bytes: int, *, now: float) -> None:
        elapsed = min(max(now - self.progress_at, 1e-4), RATE_WINDOW_S)
        keep = math.exp(-elapsed / RATE_WINDOW_S)
        self._bytes = self._bytes * keep + carried_bytes
        self._seconds = self._seconds * keep + elapsed
        self.rate_bytes_s = self._bytes / self._seconds
        self.progress_at = now


@dataclass(slots=True)
class _Device:
    id: str = ""
    site: str = ""
    addresses: tuple[str, ...] = ()
    connected: bool = False
    session: int = 0
    live: bool = False
    seen_at: float = 0.0
    swarms: list[Digest] = field(default_factory=list)


@dataclass(slots=True)
class _Bundle:
    piece_count: int
    piece_bytes: int


class _Swarm:
    def __init__(self, bundle: _Bundle, *, now: float) -> None:
        self.bundle = bundle
        self.full = full_mask(bundle.piece_count)
        self.members: dict[PeerKey, _Member] = {}
        self.left = 0
        """Pieces that left the gateway for this site, or arrived at it another way."""
        self.in_flight = 0
        """Under a running lease from the gateway, to whichever device."""
        self.cooling: dict[int, float] = {}
        """Pieces of a lost lease → when they are free."""
        self.rarity = Rarity(self.full)
        """Durable copies at live devices."""
        self.active_at = now

    def covered(self, asker: PeerKey, live: dict[PeerKey, _Device], *, now: float) -> int:
        """Pieces the asker will get from others, as far as they are believed."""
        covered = self.in_flight | mask_of(self.cooling)
        for key, member in self.members.items():
            if key != asker and live[key].live:
                covered |= member.believed(now=now)
        return covered


class Scheduler:
    """All sites of one gateway. ``handle`` one event, get effects."""

    def __init__(self, *, rng: Random) -> None:
        self._rng = rng
        self._bundles: dict[Digest, _Bundle] = {}
        self._devices: dict[PeerKey, _Device] = {}
        self._swarms: dict[tuple[str, Digest], _Swarm] = {}
        self._tick_at: float | None = None

    def next_deadline(self) -> float | None:
        return self._tick_at

    def handle(self, event: SchedulerEvent, *, now: float) -> list[SchedulerEffect]:
        effects: list[SchedulerEffect] = []
        match event:
            case BundleServed():
                self._bundles.setdefault(
                    event.manifest, _Bundle(event.piece_count, max(1, event.piece_bytes))
                )
            case BundleRetired(manifest):
                self._bundles.pop(manifest, None)
                for site, digest in list(self._swarms):
                    if digest == manifest:
                        del self._swarms[site, digest]
            case DeviceConnected():
                self._on_connected(event, now=now)
            case DeviceDisconnected(device, idle):
                self._on_disconnected(device, idle=idle, now=now)
            case DeviceSeen():
                self._on_seen(event, now=now)
            case HoldingsReported(device, manifest, mask):
                self._on_holdings(device, manifest, mask, now=now)
            case PiecesHeld():
                self._on_held(event, now=now)
            case PiecesLost(device, manifest, pieces):
                self._on_lost(device, manifest, pieces)
            case LeaseAsked():
                effects.extend(self._on_lease_asked(event, now=now))
            case PieceSent():
                self._on_sent(event, now=now)
            case Tick():
                self._on_tick(now=now)
            case _:
                assert_never(event)
        if self._tick_at is None and self._devices:
            self._tick_at = now + TICK_S
        return effects

    # --- what others read

    def min_site_replication(self, *, now: float) -> int | None:
        """Durable copies of the rarest piece at live devices: the smallest of all active swarms; None: none is."""
        found: list[int] = []
        for swarm in self._swarms.values():
            if now - swarm.active_at > ACTIVE_FOR_S:
                continue
            if not any(self._devices[key].live for key in swarm.members):
                continue
            lowest = swarm.rarity.lowest()
            if lowest is not None:
                found.append(lowest)
        return min(found, default=None)

    def replication(self, *, now: float) -> dict[tuple[str, Digest], int]:
        """For each active (site, manifest): durable copies of its rarest piece at live devices."""
        return {
            key: lowest
            for key, swarm in self._swarms.items()
            if now - swarm.active_at <= ACTIVE_FOR_S
            and (lowest := swarm.rarity.lowest()) is not None
        }

    # --- devices

    def _device(self, key: PeerKey, *, now: float) -> _Device:
        device = self._devices.get(key)
        if device is None:
            device = self._devices[key] = _Device(seen_at=now)
        return device

    def _on_connected(self, event: DeviceConnected, *, now: float) -> None:
        device = self._device(event.device, now=now)
        if device.site and device.site != event.site:
            self._leave(event.device, device)
        if device.connected and device.session != event.session:
            # It came back before its last session was seen to be dead: what was on its way is lost.
            self._return_all(event.device, device, now=now)
        device.session = event.session
        device.id = event.id
        device.site = event.site
        device.addresses = event.addresses
        device.connected = True
        self._set_live(event.device, live=True, now=now)

    def _on_seen(self, event: DeviceSeen, *, now: float) -> None:
        if event.device not in self._devices:
            if not event.site:
                return
            device = self._device(event.device, now=now)
            device.id = event.id
            device.site = event.site
            device.addresses = event.addresses
        self._set_live(event.device, live=event.live, now=now)
        if not event.live:
            # A killed device's QUIC session looks alive for half a minute more; its next word brings it back.
            self._return_all(event.device, self._devices[event.device], now=now)

    def _on_disconnected(self, key: PeerKey, *, idle: bool, now: float) -> None:
        device = self._devices.get(key)
        if device is None:
            return
        device.connected = False
        self._return_all(key, device, now=now)
        if not idle:
            self._set_live(key, live=False, now=now)

    def _return_all(self, key: PeerKey, device: _Device, *, now: float) -> None:
        for digest in device.swarms:
            swarm = self._swarms.get((device.site, digest))
            if swarm is not None:
                self._return_leases(swarm, swarm.members[key], now=now)

    def _set_live(self, key: PeerKey, *, live: bool, now: float) -> None:
        device = self._devices.get(key)
        if device is None:
            return
        device.seen_at = now
        if device.live == live:
            return
        device.live = live
        for digest in device.swarms:
            swarm = self._swarms.get((device.site, digest))
            if swarm is None:
                continue
            member = swarm.members[key]
            if live:
                swarm.rarity.more(member.have)
            else:
                swarm.rarity.fewer(member.have)

    def _leave(self, key: PeerKey, device: _Device) -> None:
        """The device moved to another site, or is forgotten."""
        for digest in device.swarms:
            swarm = self._swarms.get((device.site, digest))
            if swarm is None:
                continue
            member = swarm.members.pop(key)
            swarm.in_flight &= ~member.leased
            if device.live:
                swarm.rarity.fewer(member.have)
            if not swarm.members:
                del self._swarms[device.site, digest]
        device.swarms.clear()

    def _join(self, key: PeerKey, manifest: Digest, *, now: float) -> tuple[_Swarm, _Member] | None:
        """The swarm a device is in for a manifest; None when the gateway knows one of them not."""
        device = self._devices.get(key)
        bundle = self._bundles.get(manifest)
        if device is None or bundle is None:
            return None
        if device.connected and not device.live:
            self._set_live(key, live=True, now=now)
        swarm = self._swarms.get((device.site, manifest))
        if swarm is None:
            swarm = self._swarms[device.site, manifest] = _Swarm(bundle, now=now)
        member = swarm.members.get(key)
        if member is None:
            member = swarm.members[key] = _Member(progress_at=now)
            device.swarms.append(manifest)
        swarm.active_at = now
        return swarm, member

    # --- what devices hold

    def _on_holdings(self, key: PeerKey, manifest: Digest, mask: int, *, now: float) -> None:
        found = self._join(key, manifest, now=now)
        if found is None:
            return
        swarm, member = found
        mask &= swarm.full
        lost = member.have & ~mask
        self._gained(key, swarm, member, mask)
        if lost:
            self._take(key, swarm, member, lost)

    def _on_held(self, event: PiecesHeld, *, now: float) -> None:
        found = self._join(event.device, event.manifest, now=now)
        if found is None:
            return
        swarm, member = found
        mask = mask_of(event.pieces) & swarm.full
        self._gained(event.device, swarm, member, mask)
        member.progress_at = now
        for source in event.fetched_from:
            other = swarm.members.get(source)
            if other is not None and source != event.device:
                other.confirmed |= mask & other.have
                other.doubt_until = None

    def _gained(self, key: PeerKey, swarm: _Swarm, member: _Member, mask: int) -> None:
        new = mask & ~member.have
        if self._devices[key].live:
            swarm.rarity.more(new)
        member.have |= mask
        swarm.left |= mask
        done = member.leased & mask
        if done:
            for piece in pieces_of(done):
                self._end_lease(swarm, member, piece)
        if swarm.cooling:
            for piece in list(swarm.cooling):
                if mask >> piece & 1:
                    del swarm.cooling[piece]

    def _on_lost(self, key: PeerKey, manifest: Digest, pieces: tuple[int, ...]) -> None:
        device = self._devices.get(key)
        swarm = None if device is None else self._swarms.get((device.site, manifest))
        member = None if swarm is None else swarm.members.get(key)
        if swarm is not None and member is not None:
            self._take(key, swarm, member, mask_of(pieces) & member.have)

    def _take(self, key: PeerKey, swarm: _Swarm, member: _Member, mask: int) -> None:
        if self._devices[key].live:
            swarm.rarity.fewer(mask)
        member.have &= ~mask
        member.confirmed &= ~mask

    def _on_sent(self, event: PieceSent, *, now: float) -> None:
        found = self._join(event.device, event.manifest, now=now)
        if found is None:
            return
        swarm, member = found
        member.sent(event.carried_bytes, now=now)
        swarm.left |= (1 << event.piece) & swarm.full
        lease = member.leases.get(event.piece)
        if lease is not None and not lease.sent:
            # From now on only the device's own disk is waited for.
            lease.sent = True
            lease.until = now + MIN_DEADLINE_S

    # --- leases

    def _end_lease(self, swarm: _Swarm, member: _Member, piece: int) -> None:
        del member.leases[piece]
        bit = 1 << piece
        member.leased &= ~bit
        if not any(other.leased & bit for other in swarm.members.values()):
            swarm.in_flight &= ~bit

    def _return_leases(self, swarm: _Swarm, member: _Member, *, now: float) -> None:
        for piece, lease in list(member.leases.items()):
            if lease.sent:
                swarm.cooling[piece] = now + GRACE_S
            self._end_lease(swarm, member, piece)

    def _on_tick(self, *, now: float) -> None:
        self._tick_at = None
        for swarm in self._swarms.values():
            for piece, until in list(swarm.cooling.items()):
                if until <= now:
                    del swarm.cooling[piece]
            for member in swarm.members.values():
                if not member.leases:
                    continue
                for piece, lease in list(member.leases.items()):
                    # Whatever moves for this device keeps what it is still to be sent.
                    moving = not lease.sent and now - member.progress_at < MIN_DEADLINE_S / 2
                    if lease.until <= now and not moving:
                        self._end_lease(swarm, member, piece)
        for key, device in list(self._devices.items()):
            if not device.live and now - device.seen_at > FORGET_DEVICE_S:
                self._leave(key, device)
                del self._devices[key]

    def _on_lease_asked(self, event: LeaseAsked, *, now: float) -> list[SchedulerEffect]:
        found = self._join(event.device, event.manifest, now=now)
        if found is None:
            return [GiveLease(event.device, event.manifest, (), (), 0.0, 30.0)]
        swarm, member = found
        count = min(event.count, limits.MAX_LEASE_PIECES)
        missing = swarm.full & ~member.have & ~member.leased
        covered = swarm.covered(event.device, self._devices, now=now)
        named: list[PeerKey] = []
        most = count if event.gateway_pieces is None else min(count, event.gateway_pieces)
        begged = self._begged(event, swarm, member, missing, named, most, now=now)
        eligible = missing & ~covered & ~mask_of(begged)
        granted = self._from_gateway(swarm, member, eligible, most - len(begged), now=now)
        grants = [Granted(piece, GATEWAY, GATEWAY) for piece in (*begged, *granted)]
        for piece in (*begged, *granted):
            member.leased |= 1 << piece
            swarm.in_flight |= 1 << piece
        deadline_s = self._deadline(swarm, member, len(member.leases) + len(grants))
        for grant in grants:
            member.leases[grant.piece] = _Lease(until=now + deadline_s)
        room = min(count - len(grants), MAX_PEER_GRANTS)
        if room > 0:
            grants += self._from_peers(event.device, swarm, missing, room, named, now=now)
        self._name_some(event.device, swarm, named, now=now)
        retry_s = 0.0 if grants else RETRY_S
        return [
            GiveLease(
                event.device,
                event.manifest,
                tuple(grants),
                tuple(
                    NamedSource(key, self._devices[key].id, self._devices[key].addresses)
                    for key in named
                ),
                deadline_s,
                retry_s,
            )
        ]

    def _deadline(self, swarm: _Swarm, member: _Member, pieces: int) -> float:
        rate = member.rate_bytes_s or FIRST_RATE_BYTES_S
        expected = pieces * swarm.bundle.piece_bytes / rate
        return min(max(MIN_DEADLINE_S, DEADLINE_FACTOR * expected), MAX_DEADLINE_S)

    def _from_gateway(
        self, swarm: _Swarm, member: _Member, eligible: int, count: int, *, now: float
    ) -> list[int]:
        """Pieces to send, those that never left first."""
        if not eligible:
            return []
        # Near the end nobody takes more than a share, or the others wait for one slow device.
        fetching = sum(
            1
            for other in swarm.members.values()
            if other is member or (other.leases and now - other.progress_at < MIN_DEADLINE_S)
        )
        share = max(MIN_SHARE_PIECES, eligible.bit_count() // (2 * fetching))
        room = min(count, share) if fetching > 1 else count
        chosen = sample(eligible & ~swarm.left, room, self._rng)
        if len(chosen) < room:
            chosen += sample(eligible & swarm.left, room - len(chosen), self._rng)
        return chosen

    def _begged(
        self,
        event: LeaseAsked,
        swarm: _Swarm,
        member: _Member,
        missing: int,
        named: list[PeerKey],
        most: int,
        *,
        now: float,
    ) -> list[int]:
        """Pieces the device reaches no source of: it is told of one, or, when it was, gets them from the gateway."""
        chosen: list[int] = []
        busy = swarm.in_flight | mask_of(swarm.cooling)
        for piece in dict.fromkeys(event.unavailable):
            if len(chosen) >= most:
                break
            bit = 1 << piece
            if not missing & bit or busy & bit:
                continue
            told_all = True
            for key, other in swarm.members.items():
                if key == event.device or not other.have & bit or not self._devices[key].live:
                    continue
                told_at = member.told.get(key)
                if told_at is None:
                    told_all = False
                    if key not in named and len(named) < MAX_NAMED:
                        self._name(key, other, member, named, now=now)
                    elif key not in named:
                        continue
                elif now - told_at < UNAVAILABLE_AGAIN_S:
                    told_all = False
            if told_all:
                chosen.append(piece)
        return chosen

    def _name(
        self, key: PeerKey, holder: _Member, asker: _Member, named: list[PeerKey], *, now: float
    ) -> None:
        named.append(key)
        asker.told.setdefault(key, now)
        holder.named(now=now)

    def _from_peers(
        self,
        asker: PeerKey,
        swarm: _Swarm,
        missing: int,
        room: int,
        named: list[PeerKey],
        *,
        now: float,
    ) -> list[Granted]:
        """Rare pieces the asker lacks, each with the two live holders least is asked of."""
        holders = [
            (key, other)
            for key, other in swarm.members.items()
            if key != asker
            and self._devices[key].live
            and self._devices[key].addresses
            and other.believed(now=now)
        ]
        if not holders:
            return []
        if len(holders) > MAX_HOLDERS_WEIGHED:
            holders = self._rng.sample(holders, MAX_HOLDERS_WEIGHED)
        within = 0
        for _key, other in holders:
            within |= other.believed(now=now)
        grants: list[Granted] = []
        member = swarm.members[asker]
        wanted = missing & within
        for level in swarm.rarity.levels[1:]:
            pieces = level & wanted
            while pieces and len(grants) < room:
                piece = random_piece(pieces, self._rng)
                pieces ^= 1 << piece
                best = sorted(
                    (other.queue(now=now), self._rng.random(), position)
                    for position, (_key, other) in enumerate(holders)
                    if other.believed(now=now) >> piece & 1
                )
                sources: list[PeerKey] = []
                for queue, _tie, position in best:
                    key, other = holders[position]
                    if key not in named:
                        if len(named) >= MAX_NAMED:
                            continue
                        self._name(key, other, member, named, now=now)
                    if not sources:
                        other.asked_of = queue + 1.0
                        other.asked_at = now
                    sources.append(key)
                    if len(sources) == 2:
                        break
                if sources:
                    grants.append(Granted(piece, sources[0], sources[-1]))
        return grants

    def _name_some(
        self, asker: PeerKey, swarm: _Swarm, named: list[PeerKey], *, now: float
    ) -> None:
        """Introduce members of a swarm to each other before they need it."""
        member = swarm.members[asker]
        strangers = [
            key
            for key in swarm.members
            if key != asker
            and key not in member.told
            and self._devices[key].live
            and self._devices[key].addresses
        ]
        self._rng.shuffle(strangers)
        for key in strangers[: max(0, MAX_NAMED // 2 - len(named))]:
            named.append(key)
            member.told[key] = now
