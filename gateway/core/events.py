"""What the cores of a gateway are told (past tense) and what they want done (imperative).

Frozen dataclasses that never meet bytes. Devices are named by key; piece indexes were range-checked by the shell.
"""

from dataclasses import dataclass
from typing import Final

from edgesync.ids import Digest, PeerKey

GATEWAY: Final = PeerKey("gateway")


@dataclass(frozen=True, slots=True)
class BundleServed:
    """The gateway can serve this manifest's pieces; told once before any other event names it."""

    manifest: Digest
    piece_count: int
    piece_bytes: int
    """Average piece as it is sent."""


@dataclass(frozen=True, slots=True)
class BundleRetired:
    manifest: Digest


@dataclass(frozen=True, slots=True)
class DeviceConnected:
    """A device's session is open; where other devices may dial it. The same session again: it moved."""

    device: PeerKey
    id: str
    site: str
    addresses: tuple[str, ...]
    session: int = 0


@dataclass(frozen=True, slots=True)
class DeviceDisconnected:
    """The session ended; ``idle``: because nothing needed it, so the device is still believed to be there."""

    device: PeerKey
    idle: bool


@dataclass(frozen=True, slots=True)
class DeviceSeen:
    """What the broker says of a device: it is there, or its will came. With a site it also introduces one."""

    device: PeerKey
    live: bool
    id: str = ""
    site: str = ""
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class HoldingsReported:
    """Everything durable a device says it holds of a manifest, as a mask; replaces what it said before."""

    device: PeerKey
    manifest: Digest
    mask: int


@dataclass(frozen=True, slots=True)
class PiecesHeld:
    """Durable at the device; the peers they came from have thereby shown that they held them."""

    device: PeerKey
    manifest: Digest
    pieces: tuple[int, ...]
    fetched_from: tuple[PeerKey, ...]


@dataclass(frozen=True, slots=True)
class PiecesLost:
    device: PeerKey
    manifest: Digest
    pieces: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LeaseAsked:
    device: PeerKey
    manifest: Digest
    count: int
    unavailable: tuple[int, ...]
    gateway_pieces: int | None = None
    """The gateway itself may give so many, for a budget's sake; None: any number."""


@dataclass(frozen=True, slots=True)
class PieceSent:
    """A piece left the gateway for this device."""

    device: PeerKey
    manifest: Digest
    piece: int
    carried_bytes: int


@dataclass(frozen=True, slots=True)
class Tick:
    """``next_deadline`` has come."""


SchedulerEvent = (
    BundleServed
    | BundleRetired
    | DeviceConnected
    | DeviceDisconnected
    | DeviceSeen
    | HoldingsReported
    | PiecesHeld
    | PiecesLost
    | LeaseAsked
    | PieceSent
    | Tick
)


@dataclass(frozen=True, slots=True)
class Granted:
    piece: int
    primary: PeerKey
    backup: PeerKey


@dataclass(frozen=True, slots=True)
class NamedSource:
    device: PeerKey
    id: str
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GiveLease:
    """Advice for one device; without grants it says when to ask again."""

    device: PeerKey
    manifest: Digest
    grants: tuple[Granted, ...]
    sources: tuple[NamedSource, ...]
    deadline_s: float
    retry_after_s: float


SchedulerEffect = GiveLease
