"""What the cores of a device are told (past tense) and what they want done (imperative).

Plain frozen dataclasses that never meet bytes: the wire has messages of its own. Piece indexes are positions in the
manifest's piece table and were range-checked by the shell; peers are named by key.
"""

from dataclasses import dataclass
from typing import Final, Literal

from edgesync.ids import PeerKey

GATEWAY: Final = PeerKey("gateway")
"""The gateway as a source; no key looks like it."""

FailureReason = Literal["gone", "not_held", "refused", "busy", "bad_hash", "broken"]
"""Why a piece did not come: the wire's four, bytes that are not the piece, or a stream that broke off."""


# --- events of one bundle's download


@dataclass(frozen=True, slots=True)
class GatewayUp:
    """A session with the gateway is open."""

    rtt_s: float = 0.0


@dataclass(frozen=True, slots=True)
class GatewayDown:
    """The session ended, or could not be opened."""


@dataclass(frozen=True, slots=True)
class LeasedPiece:
    piece: int
    primary: PeerKey
    backup: PeerKey


@dataclass(frozen=True, slots=True)
class SourceAddress:
    peer: PeerKey
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LeaseReceived:
    grants: tuple[LeasedPiece, ...]
    sources: tuple[SourceAddress, ...]
    deadline_s: float
    retry_after_s: float
    reason: str = ""
    """Why the gateway gives nothing itself, where it says so."""


@dataclass(frozen=True, slots=True)
class GatewayAllowance:
    """The way to the gateway is metered: so many bytes are left of its budget, and what to say when none are."""

    left_bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class PeerJoined:
    """A session with a peer is open; it holds nothing until it says so."""

    peer: PeerKey


@dataclass(frozen=True, slots=True)
class PeerLeft:
    peer: PeerKey


@dataclass(frozen=True, slots=True)
class PeerBitfield:
    """Everything the peer says it holds, as a mask; replaces what it said before."""

    peer: PeerKey
    mask: int


@dataclass(frozen=True, slots=True)
class PeerHave:
    peer: PeerKey
    pieces: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PeerLost:
    peer: PeerKey
    pieces: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PieceReceived:
    """Its bytes are here to be checked and written; PieceArrived or PieceFailed follows, whatever the source does."""

    source: PeerKey
    piece: int


@dataclass(frozen=True, slots=True)
class PieceArrived:
    """Hash checked and written."""

    source: PeerKey
    piece: int
    carried_bytes: int
    rtt_s: float = 0.0
    """Of the source's path now; 0: not known."""


@dataclass(frozen=True, slots=True)
class BytesMoved:
    """Parts of pieces came from a source, told now and then while it is asked: slow is not dead."""

    source: PeerKey
    carried_bytes: int


@dataclass(frozen=True, slots=True)
class PieceFailed:
    source: PeerKey
    piece: int
    reason: FailureReason


@dataclass(frozen=True, slots=True)
class PieceDropped:
    """A piece we held is no longer good."""

    piece: int


@dataclass(frozen=True, slots=True)
class PiecesDurable:
    pieces: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoragePaused:
    """Writing is impossible (``why``: one sentence), or possible again (None)."""

    why: str | None


@dataclass(frozen=True, slots=True)
class Tick:
    """``next_deadline`` has come."""


DownloadEvent = (
    GatewayUp
    | GatewayDown
    | LeaseReceived
    | GatewayAllowance
    | PeerJoined
    | PeerLeft
    | PeerBitfield
    | PeerHave
    | PeerLost
    | PieceReceived
    | PieceArrived
    | BytesMoved
    | PieceFailed
    | PieceDropped
    | PiecesDurable
    | StoragePaused
    | Tick
)


# --- effects of one bundle's download


@dataclass(frozen=True, slots=True)
class RequestPieces:
    """Ask ``source`` for these, on one stream."""

    source: PeerKey
    pieces: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CancelRequests:
    """Give up every stream of this bundle to ``source``; no PieceFailed is wanted for their pieces."""

    source: PeerKey


@dataclass(frozen=True, slots=True)
class AskLease:
    count: int
    unavailable: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Dial:
    """The gateway named this peer as a source and we have no session with it."""

    peer: PeerKey
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Announce:
    """Tell interested peers that we hold these."""

    pieces: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ReportDurable:
    """Tell the gateway that these are durable here, and which peer they came from (None: not from a peer)."""

    pieces: tuple[int, ...]
    fetched_from: PeerKey | None


@dataclass(frozen=True, slots=True)
class QuarantinePeer:
    """Two pieces from this key had a wrong hash: nothing more from it, here and in no other transfer."""

    peer: PeerKey


@dataclass(frozen=True, slots=True)
class Completed:
    """Every piece is held (not yet necessarily durable)."""


DownloadEffect = (
    RequestPieces
    | CancelRequests
    | AskLease
    | Dial
    | Announce
    | ReportDurable
    | QuarantinePeer
    | Completed
)
