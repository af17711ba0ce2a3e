"""A gateway and devices of a simulation: thin adapters that turn effects of the real cores into messages and back.

No policy stands here: what an actor decides is what a shell's plumbing fixes (upload slots, when it flushes, how long a
connection takes to be noticed dead).
"""

from collections import deque
from dataclasses import dataclass
from typing import Any

from device.core import events as d
from device.core.download import Download
from edgesync import limits
from edgesync.bitfield import Bitfield
from edgesync.ids import Digest, PeerKey
from edgesync.rarity import mask_of
from gateway.core import events as g
from gateway.core.scheduler import Scheduler
from simulations.kernel import Kernel, Timer
from simulations.network import Network

MANIFEST = Digest("0" * 64)
MESSAGE_BYTES = 100
UPLOAD_SLOTS = 4
NOTICE_S = 2.0
"""Until the other side of a killed machine's connection sees that it is dead."""


@dataclass(frozen=True, slots=True)
class Content:
    """What is moved: plain lengths, and how much smaller pieces travel."""

    lengths: tuple[int, ...]
    ratio: float = 1.0

    def carried(self, piece: int) -> int:
        return max(1, int(self.lengths[piece] * self.ratio))

    @property
    def wire_bytes(self) -> int:
        return sum(self.carried(piece) for piece in range(len(self.lengths)))


class Gateway:
    def __init__(self, kernel: Kernel, network: Network, content: Content) -> None:
        self.key = d.GATEWAY
        self._kernel = kernel
        self._network = network
        self._content = content
        self.devices: dict[str, Device] = {}
        self.bytes_out = 0
        self._sessions = 0
        self.copies = [0] * len(content.lengths)
        self.alive = True
        self.start()

    def start(self) -> None:
        """As after a start of the daemon: it knows what it serves and nobody."""
        self.alive = True
        self.scheduler = Scheduler(rng=self._kernel.rng(f"scheduler{self._kernel.now}"))
        average = self._content.wire_bytes // len(self._content.lengths)
        self._feed(g.BundleServed(MANIFEST, len(self._content.lengths), average))

    def kill(self) -> None:
        self.alive = False
        self._network.cut(self.key)

    def restart(self) -> None:
        self._network.restore(self.key)
        self.start()
        for device in self.devices.values():
            if device.alive:
                device.gateway_back()

    def _feed(self, event: g.SchedulerEvent) -> None:
        if not self.alive:
            return
        for effect in self.scheduler.handle(event, now=self._kernel.now):
            self._run(effect)
        self._arm()

    _timer: Timer | None = None

    def _arm(self) -> None:
        deadline = self.scheduler.next_deadline()
        if self._timer is not None:
            self._timer.cancel()
        if deadline is not None:
            self._timer = self._kernel.at(deadline, lambda: self._feed(g.Tick()))

    def _run(self, lease: g.GiveLease) -> None:
        device = self.devices[lease.device]
        self._kernel.trace("lease", lease.device, [(x.piece, x.primary) for x in lease.grants])
        event = d.LeaseReceived(
            tuple(d.LeasedPiece(x.piece, x.primary, x.backup) for x in lease.grants),
            tuple(d.SourceAddress(x.device, x.addresses) for x in lease.sources),
            lease.deadline_s,
            lease.retry_after_s,
        )
        self._network.send(
            self.key,
            device.key,
            MESSAGE_BYTES + 8 * len(lease.grants),
            lambda: device.feed(event),
        )

    def connected(self, device: "Device") -> None:
        if not self.alive:
            return
        self.devices[device.key] = device
        self._sessions += 1
        self._feed(g.DeviceConnected(device.key, device.key, "site", (device.key,), self._sessions))
        self._feed(g.HoldingsReported(device.key, MANIFEST, device.durable))

    def disconnected(self, device: "Device") -> None:
        self._feed(g.DeviceDisconnected(device.key, idle=False))

    def message(self, event: g.SchedulerEvent) -> None:
        self._feed(event)

    def request(self, device: "Device", pieces: tuple[int, ...]) -> None:
        for piece in pieces:
            self._network.send(
                self.key,
                device.key,
                self._content.carried(piece),
                lambda piece=piece: self._delivered(device, piece),  # type: ignore[misc]
            )

    def _delivered(self, device: "Device", piece: int) -> None:
        carried = self._content.carried(piece)
        self.bytes_out += carried
        self.copies[piece] += 1
        self._feed(g.PieceSent(device.key, MANIFEST, piece, carried))
        device.arrived(d.GATEWAY, piece, carried)


class Device:
    """An honest device; subclasses misbehave."""

    honest = True

    def __init__(
        self, name: str, kernel: Kernel, network: Network, content: Content, gateway: Gateway
    ) -> None:
        self.key = PeerKey(name)
        self._kernel = kernel
        self._network = network
        self._content = content
        self._gateway = gateway
        self.peers: dict[str, Device] = {}
        self.have = Bitfield(len(content.lengths))
        self.durable = 0
        self._dirty: list[int] = []
        self._dirty_bytes = 0
        self._flush_at: Timer | None = None
        self._serving: deque[tuple[Device, tuple[int, ...]]] = deque()
        self._slots = 0
        self.alive = False
        self.finished_at: float | None = None
        self.started_at = 0.0
        self.bytes_gateway = 0
        self.bytes_peers = 0
        self.bytes_duplicate = 0
        self._timer: Timer | None = None
        self._asked: dict[str, int] = {}
        """Generation of requests to each source: answers to a cancelled one are ignored."""

    # --- life

    def start(self) -> None:
        """Begin or resume: what was verified before a kill is on the disk still."""
        self.alive = True
        self._network.restore(self.key)
        self.started_at = self._kernel.now
        self.durable = mask_of(self.have)
        self.core = Download(
            self._content.lengths,
            self.have,
            rng=self._kernel.rng(f"{self.key}{self._kernel.now}"),
            now=self._kernel.now,
        )
        if self._gateway.alive:
            self.gateway_back()

    def kill(self) -> None:
        self.alive = False
        self._network.cut(self.key)
        self._serving.clear()
        self._slots = 0
        self._asked = {key: generation + 1 for key, generation in self._asked.items()}
        if self._timer is not None:
            self._timer.cancel()
        for peer in list(self.peers.values()):
            self._kernel.after(NOTICE_S, lambda peer=peer: peer.lost_peer(self))  # type: ignore[misc]
        self.peers.clear()
        if self._gateway.alive:
            self._kernel.after(
                NOTICE_S, lambda: None if self.alive else self._gateway.disconnected(self)
            )

    def gateway_back(self) -> None:
        self._gateway.connected(self)
        self.feed(d.GatewayUp(self._network.rtt_s(d.GATEWAY, self.key)))

    def gateway_lost(self) -> None:
        self.feed(d.GatewayDown())

    def join(self, other: "Device") -> None:
        """Both sides open a session and say what they hold."""
        if not (self.alive and other.alive):
            return
        if self.peers.get(other.key) is other and other.peers.get(self.key) is self:
            return
        for one, two in ((self, other), (other, self)):
            if one.peers.pop(two.key, None) is not None:
                # A session of before the other was killed; a new one replaces it.
                one.forget_asked(two)
                one.feed(d.PeerLeft(two.key))
        for one, two in ((self, other), (other, self)):
            one.peers[two.key] = two
            one.feed(d.PeerJoined(two.key))
            one.feed(d.PeerBitfield(two.key, two.claimed()))

    def lost_peer(self, other: "Device") -> None:
        if self.alive and self.peers.get(other.key) is other and not other.alive:
            del self.peers[other.key]
            self.forget_asked(other)
            self.feed(d.PeerLeft(other.key))

    def forget_asked(self, other: "Device") -> None:
        self._asked[other.key] = self._asked.get(other.key, 0) + 1

    def claimed(self) -> int:
        return mask_of(self.have)

    # --- the core

    def feed(self, event: d.DownloadEvent) -> None:
        if not self.alive:
            return
        for effect in self.core.handle(event, now=self._kernel.now):
            self._run(effect)
        if self._timer is not None:
            self._timer.cancel()
        deadline = self.core.next_deadline()
        if deadline is not None:
            self._timer = self._kernel.at(deadline, lambda: self.feed(d.Tick()))

    def _run(self, effect: d.DownloadEffect) -> None:
        match effect:
            case d.RequestPieces(source, pieces):
                self._kernel.trace("request", self.key, source, pieces)
                self._request(source, pieces)
            case d.CancelRequests(source):
                self._asked[source] = self._asked.get(source, 0) + 1
                self._network.drop(source, self.key)
            case d.AskLease(count, unavailable):
                event = g.LeaseAsked(self.key, MANIFEST, count, unavailable)
                self._tell_gateway(event)
            case d.Dial(peer, _addresses):
                named = self._gateway.devices.get(peer)
                if named is not None:
                    self._kernel.after(0.01, lambda: self.join(named))
            case d.Announce(pieces):
                for other in self.peers.values():
                    have = d.PeerHave(self.key, pieces)
                    self._network.send(
                        self.key,
                        other.key,
                        MESSAGE_BYTES,
                        lambda other=other, have=have: other.feed(have),  # type: ignore[misc]
                    )
            case d.ReportDurable(pieces, fetched_from):
                sources = () if fetched_from is None else (fetched_from,)
                self._tell_gateway(g.PiecesHeld(self.key, MANIFEST, pieces, sources))
            case d.Completed():
                self.finished_at = self._kernel.now
                self._kernel.trace("complete", self.key)
                self.flush()
            case d.QuarantinePeer():
                pass

    def _tell_gateway(self, event: Any) -> None:
        if self._gateway.alive:
            self._network.send(
                self.key, self._gateway.key, MESSAGE_BYTES, lambda: self._gateway.message(event)
            )

    # --- pieces in

    def _request(self, source: PeerKey, pieces: tuple[int, ...]) -> None:
        generation = self._asked.setdefault(source, 0)
        asked = tuple(pieces)
        if source == d.GATEWAY:
            self._network.send(
                self.key, source, MESSAGE_BYTES, lambda: self._gateway.request(self, asked)
            )
            return
        peer = self.peers[source]
        self._network.send(
            self.key,
            source,
            MESSAGE_BYTES + 32 * len(asked),
            lambda: peer.asked(self, asked, generation),
        )

    def arrived(self, source: PeerKey, piece: int, carried: int) -> None:
        if source == d.GATEWAY:
            self.bytes_gateway += carried
        else:
            self.bytes_peers += carried
        if not self.have.add(piece):
            self.bytes_duplicate += carried
        else:
            self._dirty.append(piece)
            self._dirty_bytes += self._content.lengths[piece]
            if self._dirty_bytes >= limits.FLUSH_BYTES:
                self.flush()
            elif self._flush_at is None:
                self._flush_at = self._kernel.after(limits.FLUSH_INTERVAL_S, self.flush)
        rtt_s = self._network.rtt_s(source, self.key)
        self.feed(d.PieceArrived(source, piece, carried, rtt_s))

    def flush(self) -> None:
        if self._flush_at is not None:
            self._flush_at.cancel()
            self._flush_at = None
        dirty, self._dirty, self._dirty_bytes = tuple(self._dirty), [], 0
        if dirty and self.alive:
            self.durable |= mask_of(dirty)
            self.feed(d.PiecesDurable(dirty))

    # --- pieces out

    def asked(self, peer: "Device", pieces: tuple[int, ...], generation: int) -> None:
        if not self.alive:
            return
        self._serving.append((peer, pieces))
        self._serve(generation)

    def _serve(self, generation: int) -> None:
        while self._slots < UPLOAD_SLOTS and self._serving:
            peer, pieces = self._serving.popleft()
            self._slots += 1
            last = len(pieces) - 1
            for position, piece in enumerate(pieces):
                self._network.send(
                    self.key,
                    peer.key,
                    self._content.carried(piece),
                    lambda peer=peer, piece=piece, end=position == last: self._answered(  # type: ignore[misc]
                        peer, piece, generation, end=end
                    ),
                )

    def _answered(self, peer: "Device", piece: int, generation: int, *, end: bool) -> None:
        if end:
            self._slots = max(0, self._slots - 1)
            self._serve(generation)
        if peer.alive and peer._asked.get(self.key, 0) == generation:  # noqa: SLF001
            self.answer(peer, piece)

    def answer(self, peer: "Device", piece: int) -> None:
        if piece in self.have:
            peer.arrived(self.key, piece, self._content.carried(piece))
        else:
            peer.feed(d.PieceFailed(self.key, piece, "not_held"))


class Liar(Device):
    """Says that it holds everything, to peers and to the gateway, and has nothing."""

    honest = False

    def start(self) -> None:
        super().start()
        self.durable = (1 << len(self._content.lengths)) - 1
        if self._gateway.alive:
            self._gateway.message(g.HoldingsReported(self.key, MANIFEST, self.durable))

    def claimed(self) -> int:
        return (1 << len(self._content.lengths)) - 1

    def feed(self, event: d.DownloadEvent) -> None:
        """It wants nothing."""

    def answer(self, peer: Device, piece: int) -> None:
        peer.feed(d.PieceFailed(self.key, piece, "not_held"))


class Staller(Liar):
    """Says that it holds everything and never answers."""

    def asked(self, peer: Device, pieces: tuple[int, ...], generation: int) -> None:
        """Silence."""


class Poisoner(Liar):
    """Sends bytes that are not the piece."""

    def answer(self, peer: Device, piece: int) -> None:
        peer.feed(d.PieceFailed(self.key, piece, "bad_hash"))
