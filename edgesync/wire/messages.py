"""Every message that travels between peers over QUIC, and nothing else.

A message is a frozen msgspec struct with an integer tag; bounds stand in the types and are checked on decoding (not on
construction). Piece bodies and blobs follow their header raw, outside the message. Retired tags stay reserved. Unknown
fields are ignored, unknown tags refused. MQTT payloads are in ``edgesync.wire.mqtt``.

Three places a message may stand:

* control stream (the connection's first, opened by the client): HELLO, CHALLENGE, PROOF, WELCOME, then anything from
  INTERESTED to CLOSE in either direction;
* request stream (opened by either side after WELCOME): one REQUEST answered by PIECE or MISSING for each id, in any
  order; or one FETCH answered by BLOB or MISSING_BLOB;
* join stream (ALPN ``edgesync-join/1``): one JOIN answered by JOINED or JOIN_REFUSED, then FETCH as above.
"""

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from edgesync import limits

ALPN = "edgesync/1"
ALPN_JOIN = "edgesync-join/1"

Hash = Annotated[bytes, Meta(min_length=32, max_length=32)]
Key = Annotated[bytes, Meta(min_length=32, max_length=32)]
Signature = Annotated[bytes, Meta(min_length=64, max_length=64)]
Index = Annotated[int, Meta(ge=0, lt=limits.MAX_PIECES)]
Milliseconds = Annotated[int, Meta(ge=0, le=86_400_000)]
Port = Annotated[int, Meta(ge=0, le=65_535)]
ShortText = Annotated[str, Meta(max_length=200)]
Name = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,62}\Z")]
Encoding = Literal["identity", "zstd"]
FetchName = Annotated[
    str,
    Meta(
        pattern=r"^(timestamp|root/[1-9][0-9]{0,8}|sha256/[0-9a-f]{64}|assign/[a-z0-9][a-z0-9-]{0,62})\Z"
    ),
]


class Hello(Struct, frozen=True, kw_only=True, tag=1):
    """Client's first words; it has not said who it is."""

    protocols: Annotated[list[Annotated[int, Meta(ge=1, le=255)]], Meta(min_length=1, max_length=8)]
    agent: ShortText = ""


class Challenge(Struct, frozen=True, kw_only=True, tag=2):
    protocol: Annotated[int, Meta(ge=1, le=255)]
    nonce: Hash
    agent: ShortText = ""


class Proof(Struct, frozen=True, kw_only=True, tag=3):
    """The client's certificate, and its signature over ``proof_payload``."""

    certificate: Annotated[bytes, Meta(min_length=1, max_length=limits.MAX_CERTIFICATE_BYTES)]
    signature: Signature
    listen_port: Port = 0
    """UDP port others may dial this member at (0: none), at the address this connection comes from."""
    background: bool | UnsetType = UNSET
    """Whether what is sent to this member shall leave room to other traffic of its line."""


class Welcome(Struct, frozen=True, kw_only=True, tag=4):
    """The server believes the proof. Versions let either side see that the other has newer metadata."""

    root_version: Annotated[int, Meta(ge=0)] = 0
    timestamp_version: Annotated[int, Meta(ge=0)] = 0
    observed_address: ShortText = ""
    background: bool | UnsetType = UNSET
    """As in PROOF, of the server."""


class Interested(Struct, frozen=True, kw_only=True, tag=5):
    """Tell me what you hold of this manifest, now (BITFIELD) and whenever it changes (HAVE)."""

    manifest: Hash


class BitfieldMessage(Struct, frozen=True, kw_only=True, tag=6):
    """Everything the sender holds; replaces what it said before. ``epoch`` changes when its store restarted."""

    manifest: Hash
    bits: Annotated[bytes, Meta(max_length=(limits.MAX_PIECES + 7) // 8)]
    epoch: Annotated[int, Meta(ge=0, lt=2**62)] = 0
    durable: bool = False
    """To a gateway only durable pieces are told, and counted as replicas."""


class Have(Struct, frozen=True, kw_only=True, tag=7):
    manifest: Hash
    pieces: Annotated[list[Index], Meta(max_length=4096)]
    durable: bool = False
    fetched_from: Annotated[list[Key], Meta(max_length=16)] = []
    """To a gateway: the peers these pieces came from, which proves that they held them."""


class Lost(Struct, frozen=True, kw_only=True, tag=8):
    """The sender no longer holds these (an application edited a file)."""

    manifest: Hash
    pieces: Annotated[list[Index], Meta(max_length=4096)]


class LeaseRequest(Struct, frozen=True, kw_only=True, tag=9):
    manifest: Hash
    count: Annotated[int, Meta(ge=1, le=limits.MAX_LEASE_PIECES)]
    unavailable: Annotated[list[Index], Meta(max_length=limits.MAX_LEASE_PIECES)] = []
    """Pieces no source the device can reach would give it."""


class Grant(Struct, frozen=True, array_like=True):
    """One leased piece: sources are positions in ``Lease.sources``, -1 is the gateway."""

    piece: Index
    primary: Annotated[int, Meta(ge=-1, lt=64)]
    backup: Annotated[int, Meta(ge=-1, lt=64)]


class PeerAddress(Struct, frozen=True, kw_only=True):
    key: Key
    id: Name
    addresses: Annotated[list[ShortText], Meta(max_length=8)]
    """``host:port`` or ``[v6]:port``."""


class Lease(Struct, frozen=True, kw_only=True, tag=10):
    """The scheduler's advice. An empty one with ``retry_after_ms`` says: nothing for you now, ask again then."""

    manifest: Hash
    grants: Annotated[list[Grant], Meta(max_length=limits.MAX_LEASE_PIECES)]
    sources: Annotated[list[PeerAddress], Meta(max_length=64)] = []
    deadline_ms: Milliseconds = 0
    retry_after_ms: Milliseconds = 0
    reason: ShortText | UnsetType = UNSET
    """Why the gateway gives nothing itself, for people."""


class Versions(Struct, frozen=True, kw_only=True, tag=11):
    """The sender's metadata versions changed."""

    root_version: Annotated[int, Meta(ge=0)]
    timestamp_version: Annotated[int, Meta(ge=0)]


class Busy(Struct, frozen=True, kw_only=True, tag=12):
    """Come back later; the sender closes the connection after it."""

    retry_after_ms: Milliseconds


class Close(Struct, frozen=True, kw_only=True, tag=13):
    code: Annotated[int, Meta(ge=0, le=255)]
    reason: ShortText = ""


class Request(Struct, frozen=True, kw_only=True, tag=20):
    manifest: Hash
    pieces: Annotated[list[Hash], Meta(min_length=1, max_length=limits.MAX_PIECES_PER_REQUEST)]
    encodings: Annotated[list[Encoding], Meta(min_length=1, max_length=4)]


class PieceHeader(Struct, frozen=True, kw_only=True, tag=21):
    """``length`` raw bytes follow: the piece in ``encoding``."""

    piece: Hash
    encoding: Encoding
    length: Annotated[int, Meta(ge=1, le=limits.MAX_PIECE_BYTES)]


class Missing(Struct, frozen=True, kw_only=True, tag=22):
    piece: Hash
    reason: Literal["gone", "not_held", "refused", "busy"]


class Fetch(Struct, frozen=True, kw_only=True, tag=23):
    """Ask for metadata: ``timestamp``, ``root/N``, ``assign/DEVICE`` or ``sha256/HEX`` (manifests, TUF files)."""

    name: FetchName


class Blob(Struct, frozen=True, kw_only=True, tag=24):
    """``length`` raw bytes follow."""

    length: Annotated[int, Meta(ge=0, le=limits.MAX_MANIFEST_BYTES)]


class MissingBlob(Struct, frozen=True, kw_only=True, tag=25):
    name: ShortText


class Join(Struct, frozen=True, kw_only=True, tag=30):
    token_id: Annotated[str, Meta(pattern=r"^[a-z0-9]{8,32}\Z")]
    secret: Annotated[bytes, Meta(min_length=16, max_length=64)]
    public_key: Key
    signature: Signature
    """By ``public_key`` over ``join_payload``: the asker holds the private half."""
    device_id: Name
    hardware: ShortText = ""
    agent: ShortText = ""


class Joined(Struct, frozen=True, kw_only=True, tag=31):
    """``certificate`` is empty while the device is ``pending``; the same question later gets the rest."""

    state: Literal["accepted", "pending"]
    device_id: Name
    certificate: Annotated[bytes, Meta(max_length=limits.MAX_CERTIFICATE_BYTES)] = b""
    gateway_id: Name
    region: Name
    labels: Annotated[dict[ShortText, ShortText], Meta(max_length=limits.MAX_LABELS)] = {}
    hardware: ShortText = ""
    gateway_quic: Annotated[list[ShortText], Meta(max_length=8)] = []
    brokers: Annotated[list[ShortText], Meta(max_length=8)] = []
    root_version: Annotated[int, Meta(ge=1, le=limits.MAX_ROOT_ROTATIONS)]
    """Roots 1 to this one are to be had by FETCH on the same connection."""


class JoinRefused(Struct, frozen=True, kw_only=True, tag=32):
    reason: Literal[
        "unknown_token",
        "expired",
        "used_up",
        "revoked",
        "id_refused",
        "id_taken",
        "busy",
        "rejected",
    ]
    text: ShortText = ""


ControlMessage = (
    Hello
    | Challenge
    | Proof
    | Welcome
    | Interested
    | BitfieldMessage
    | Have
    | Lost
    | LeaseRequest
    | Lease
    | Versions
    | Busy
    | Close
)
StreamMessage = (
    Request | PieceHeader | Missing | Fetch | Blob | MissingBlob | Join | Joined | JoinRefused
)
Message = ControlMessage | StreamMessage


def proof_payload(*, role: str, nonce: bytes, server_certificate_sha256: bytes) -> bytes:
    """What PROOF signs, in the envelope context ``proof``: protocol, role, challenge and server."""
    return b"\0".join((ALPN.encode(), role.encode(), nonce + server_certificate_sha256))


def join_payload(*, token_id: str, device_id: str, server_certificate_sha256: bytes) -> bytes:
    """What JOIN signs (under the envelope context ``join``)."""
    return b"\0".join(
        (ALPN_JOIN.encode(), token_id.encode(), device_id.encode(), server_certificate_sha256)
    )
