"""Every payload that travels over MQTT, and the only place where such bytes become messages.

Pure. A payload is JSON through msgspec, in an envelope where POLICIES names a signer. Three kinds are carried as they
are: TUF files, manifests and assignment sets, which have signatures or digests of their own. The order is always cap,
signature, parse; nothing but errors of ProtocolError and VerificationError comes out, whatever the bytes.

Two orders of numbers keep old messages from undoing new ones, since a broker repeats and reorders:

* a **state** carries the connection's ``epoch`` (higher at each connect, also after a restart) and a ``sequence``
  inside it; the last will is a state signed at CONNECT with ``online`` false, and counts only while its epoch is the
  newest (``supersedes``);
* a **report** carries the outbox's epoch and sequence, and is sent again until an ``Ack`` names it.
"""

import hashlib
from collections.abc import Collection
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct

from edgesync import envelope, limits
from edgesync.envelope import Signer
from edgesync.errors import (
    LimitExceededError,
    MalformedMessageError,
    MetadataExpiredError,
    NotAuthorizedError,
    PieceHashMismatchError,
    UnexpectedMessageError,
)
from edgesync.ids import Digest, PeerKey
from edgesync.wire.topics import Kind, Topic, check_size

Name = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,62}\Z")]
VersionText = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9.+_-]{0,63}\Z")]
HexKey = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
HexDigest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Address = Annotated[str, Meta(pattern=r"^[\x21-\x7e]{1,260}\Z")]
"""``host:port`` or ``[v6]:port``."""
Addresses = Annotated[list[Address], Meta(max_length=8)]
Text = Annotated[str, Meta(max_length=200)]
ShortText = Annotated[str, Meta(max_length=64)]
Port = Annotated[int, Meta(ge=0, le=65_535)]
Epoch = Annotated[int, Meta(ge=0, lt=2**53)]
Sequence = Annotated[int, Meta(ge=0, lt=2**53)]
Seconds = Annotated[float, Meta(ge=0, le=2**40)]
"""Unix time, or a duration."""
Count = Annotated[int, Meta(ge=0, lt=2**53)]
BundleKind = Literal["firmware", "model", "files"]
Status = Literal[
    "queued", "in_progress", "succeeded", "failed", "timed_out", "rejected", "canceled", "removed"
]
TERMINAL: frozenset[str] = frozenset(
    {"succeeded", "failed", "timed_out", "rejected", "canceled", "removed"}
)
Step = Literal[
    "", "downloading", "downloaded", "installing", "rebooting", "verifying", "rolling_back"
]
ReportInterval = Annotated[
    int, Meta(ge=limits.MIN_REPORT_INTERVAL_S, le=limits.MAX_REPORT_INTERVAL_S)
]


class Presence(Struct, frozen=True, kw_only=True):
    """A gateway says that it is there; its last will says that it is not."""

    gateway: Name
    epoch: Epoch
    online: bool
    issued: Seconds
    version: ShortText = ""
    quic: Addresses = []
    http: Annotated[str, Meta(max_length=200)] | None = None
    report_interval_s: ReportInterval = 30
    root_version: Annotated[int, Meta(ge=0, le=limits.MAX_ROOT_ROTATIONS)] = 0
    timestamp_version: Count = 0


class BundlePointer(Struct, frozen=True, kw_only=True, tag="pointer", tag_field="edgesync"):
    """Stands where a manifest would, when that is too large for MQTT: fetch it by digest over QUIC.

    It is not signed: the length is a hint, what the targets metadata says decides.
    """

    length: Annotated[int, Meta(ge=1, le=limits.MAX_MANIFEST_BYTES)]


class Ack(Struct, frozen=True, kw_only=True, tag="ack"):
    """The gateway has stored these reports; the device may forget them."""

    epoch: Epoch
    sequences: Annotated[list[Sequence], Meta(min_length=1, max_length=limits.MAX_ACKED_REPORTS)]


class Resync(Struct, frozen=True, kw_only=True, tag="resync"):
    """Say your state again, and everything unacknowledged. ``epoch`` is the newest the gateway has seen of you."""

    epoch: Epoch = 0


class SetInterval(Struct, frozen=True, kw_only=True, tag="interval"):
    report_interval_s: ReportInterval


class Ping(Struct, frozen=True, kw_only=True, tag="ping"):
    """Answer with RSP."""


class Cmd(Struct, frozen=True, kw_only=True):
    """An order to one device. A device obeys a sequence once, and only before ``expires``."""

    device: Name
    gateway: Name
    sequence: Sequence
    issued: Seconds
    expires: Seconds
    body: Ack | Resync | SetInterval | Ping


class Rsp(Struct, frozen=True, kw_only=True):
    device: Name
    key: HexKey
    epoch: Epoch
    sequence: Sequence
    """Of the CMD this answers."""
    ok: bool
    text: Text = ""


class ToldPeer(Struct, frozen=True, kw_only=True):
    id: Name
    key: HexKey
    addresses: Annotated[list[Address], Meta(min_length=1, max_length=8)]


class Peers(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Members near one device, for when it hears nobody itself."""

    device: Name
    gateway: Name
    sequence: Sequence
    issued: Seconds
    expires: Seconds
    peers: Annotated[list[ToldPeer], Meta(max_length=limits.MAX_PEERS_TOLD)]
    site: ShortText = ""
    """Which site the gateway takes the device to be at: whose caps it obeys."""


class HeldBundle(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A bundle a device holds or works on."""

    kind: BundleKind
    name: Name
    version: VersionText
    digest: HexDigest
    state: ShortText
    reason: Text = ""
    pieces_have: Annotated[int, Meta(ge=0, le=limits.MAX_PIECES)] = 0
    pieces_total: Annotated[int, Meta(ge=0, le=limits.MAX_PIECES)] = 0


class State(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Who a device is and what it holds now. The whole of it each time: the newest replaces the rest."""

    device: Name
    key: HexKey
    epoch: Epoch
    sequence: Sequence
    online: bool
    issued: Seconds = 0.0
    agent: ShortText = ""
    listen_port: Port = 0
    addresses: Addresses = []
    hardware: ShortText = ""
    bundles: Annotated[list[HeldBundle], Meta(max_length=limits.MAX_STATE_BUNDLES)] = []
    bundles_omitted: Count = 0
    waiting: Text = ""
    """Why it does not act, when something waits."""
    root_version: Annotated[int, Meta(ge=0, le=limits.MAX_ROOT_ROTATIONS)] = 0
    timestamp_version: Count = 0
    assignment_sequence: Sequence = 0
    outbox: Count = 0
    """Reports not acknowledged yet."""
    reports_lost: Count = 0
    """Results dropped from a full outbox since it was made."""
    udp_blocked: bool = False
    """UDP to the gateway gets no answer while TLS does: sessions with it go over TLS."""


class Report(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One step of one execution. Byte counters follow the four sources of a byte."""

    device: Name
    key: HexKey
    epoch: Epoch
    sequence: Sequence
    issued: Seconds
    kind: BundleKind
    name: Name
    version: VersionText
    digest: HexDigest
    assignment: ShortText = ""
    status: Status
    step: Step = ""
    reason: Text = ""
    payload_bytes: Count = 0
    bytes_from_gateway: Count = 0
    bytes_from_peers: Count = 0
    bytes_local: Count = 0
    bytes_import: Count = 0
    bytes_sent: Count = 0
    pieces_total: Count = 0
    pieces_have: Count = 0
    pieces_rejected: Count = 0
    resumes: Count = 0
    duration_s: Seconds = 0.0

    @property
    def terminal(self) -> bool:
        """Whether nothing more follows for this execution."""
        return self.status in TERMINAL


class TransferProgress(Struct, frozen=True, kw_only=True, omit_defaults=True):
    digest: HexDigest
    pieces_have: Count
    pieces_total: Count
    bytes_from_gateway: Count = 0
    bytes_from_peers: Count = 0
    bytes_local: Count = 0
    bytes_import: Count = 0
    bytes_sent: Count = 0


class Progress(Struct, frozen=True, kw_only=True):
    """Unsigned, for eyes only: nothing is decided by it."""

    device: Name
    transfers: Annotated[list[TransferProgress], Meta(max_length=4)]


CapScope = Literal["gateway", "site", "device"]
CapText = Annotated[str, Meta(max_length=limits.MAX_CAP_TEXT_CHARS)]


class CapEntry(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The ceiling of one target; texts such as ``08:00-18:00 200kB/s; 2MB/s`` (``edgesync.caps``), empty: none."""

    scope: CapScope
    target: ShortText
    upload: CapText = ""
    download: CapText = ""
    zone: ShortText = "UTC"
    until: Seconds | None = None


class Caps(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Ceilings a gateway sets: the numbers for its whole region, the entries for one target each.

    The whole of it each time; the higher ``sequence`` counts, then the later ``issued``.
    """

    gateway: Name
    sequence: Sequence
    issued: Seconds
    expires: Seconds
    upload_bytes_s: Count | None = None
    download_bytes_s: Count | None = None
    caps: Annotated[list[CapEntry], Meta(max_length=limits.MAX_CAPS)] = []


class Revoked(Struct, frozen=True, kw_only=True):
    """The region's deny set: it only grows."""

    gateway: Name
    sequence: Sequence
    issued: Seconds
    keys: Annotated[list[HexKey], Meta(max_length=800)]


Signed = Presence | Cmd | Rsp | Peers | State | Report | Caps | Revoked

_KINDS: dict[type[Signed], Kind] = {
    Presence: Kind.PRESENCE,
    Cmd: Kind.CMD,
    Rsp: Kind.RSP,
    Peers: Kind.PEERS,
    State: Kind.STATE,
    Report: Kind.REPORT,
    Caps: Kind.CAPS,
    Revoked: Kind.REVOKED,
}
_encoder = msgspec.json.Encoder()
_decoders: dict[Kind, msgspec.json.Decoder[Any]] = {
    kind: msgspec.json.Decoder(type_) for type_, kind in _KINDS.items()
}
SIGNED_KINDS: Final = frozenset(_decoders)
"""Kinds whose payload is an envelope that ``unseal`` opens."""
_progress_decoder = msgspec.json.Decoder(Progress)
_pointer_decoder = msgspec.json.Decoder(BundlePointer)


def encode(message: Signed | Progress | BundlePointer) -> bytes:
    """The bytes that are signed (or, for what is not signed, sent)."""
    return _encoder.encode(message)


def seal(message: Signed, signer: Signer) -> bytes:
    """The payload to publish. Raises LimitExceededError: larger than its topic allows."""
    kind = _KINDS[type(message)]
    sealed = envelope.sign(kind.value, encode(message), signer)
    check_size(Topic(kind, owner_of(message)), sealed)
    return sealed


def seal_state(state: State, signer: Signer) -> bytes:
    """As ``seal``, but a state that is too large leaves out bundles from the end of its list, and says how many."""
    while True:
        try:
            return seal(state, signer)
        except LimitExceededError:
            if not state.bundles:
                raise
            keep = len(state.bundles) * 3 // 4
            left_out = len(state.bundles) - keep
            state = msgspec.structs.replace(
                state,
                bundles=state.bundles[:keep],
                bundles_omitted=state.bundles_omitted + left_out,
            )


def owner_of(message: Signed) -> str:
    """The device or gateway whose topic this message belongs on."""
    if isinstance(message, Presence | Caps | Revoked):
        return message.gateway
    return message.device


def unseal(
    topic: Topic, data: bytes, *, keys: Collection[PeerKey], utc_now: float | None = None
) -> Any:
    """The message in a signed payload: cap, then signature by one of ``keys``, then parse, then whose it is.

    ``keys`` are the registered key of the device, or the listed ones of the gateway. With ``utc_now`` messages that
    expire are refused once they did, and when they claim to live longer than MAX_COMMAND_LIFETIME_S.
    Raises ProtocolError: too large, malformed, or of no signed kind. Raises VerificationError: not signed by one of
    ``keys``, about somebody else (NotAuthorizedError), or expired (MetadataExpiredError).
    """
    check_size(topic, data)
    decoder = _decoders.get(topic.kind)
    if decoder is None:
        raise UnexpectedMessageError(f"{topic} does not carry a message of this kind")
    opened = envelope.verify(
        data, type_=topic.kind.value, keys=keys, max_bytes=topic.policy.max_bytes
    )
    message = _decode(decoder, opened.payload)
    if owner_of(message) != topic.owner:
        raise NotAuthorizedError(f"a message for {owner_of(message)} came on {topic}")
    if getattr(message, "key", opened.key) != opened.key:
        raise NotAuthorizedError(f"the message on {topic} names another key than its signer's")
    expires = getattr(message, "expires", None)
    if utc_now is not None and expires is not None:
        if expires <= utc_now:
            raise MetadataExpiredError(f"the message on {topic} has expired")
        if expires > message.issued + limits.MAX_COMMAND_LIFETIME_S:
            raise LimitExceededError(f"the message on {topic} wants to live too long")
    return message


def decode_progress(topic: Topic, data: bytes) -> Progress:
    """Unsigned: for display only."""
    check_size(topic, data)
    progress: Progress = _decode(_progress_decoder, data)
    if progress.device != topic.owner:
        raise NotAuthorizedError(f"the progress of {progress.device} came on {topic}")
    return progress


def decode_bundle(topic: Topic, data: bytes) -> bytes | BundlePointer:
    """What lies on a bundle topic: the manifest itself (its digest matches), or where else to look for it.

    Raises PieceHashMismatchError: neither.
    """
    check_size(topic, data)
    if hashlib.sha256(data).hexdigest() == topic.value:
        return data
    if len(data) <= 256:
        try:
            pointer: BundlePointer = _decode(_pointer_decoder, data)
        except MalformedMessageError:
            pass
        else:
            return pointer
    raise PieceHashMismatchError(f"what lies on {topic} is neither that manifest nor a pointer")


def decode_file(topic: Topic, data: bytes) -> bytes:
    """A metadata file on a topic that names its digest. Raises PieceHashMismatchError."""
    check_size(topic, data)
    if hashlib.sha256(data).hexdigest() != topic.value:
        raise PieceHashMismatchError(f"what lies on {topic} has another digest")
    return data


def bundle_payload(digest: Digest, manifest: bytes) -> bytes:
    """What to publish for a manifest: itself when it is small enough, else a pointer."""
    if len(manifest) <= limits.SOFT_MQTT_PAYLOAD_BYTES:
        assert hashlib.sha256(manifest).hexdigest() == digest
        return manifest
    return encode(BundlePointer(length=len(manifest)))


def supersedes(new: State, old: State | None) -> bool:
    """Whether ``new`` replaces what is known: a later epoch, or a later word in the same one.

    A last will (``online`` false) ends its epoch whatever its sequence; nothing of an ended epoch counts after it.
    """
    if old is None or new.epoch != old.epoch:
        return old is None or new.epoch > old.epoch
    if not old.online:
        return False
    return not new.online or new.sequence > old.sequence


def presence_supersedes(new: Presence, old: Presence | None) -> bool:
    """As ``supersedes``; inside one epoch the later ``issued`` counts."""
    if old is None or new.epoch != old.epoch:
        return old is None or new.epoch > old.epoch
    if not old.online:
        return False
    return not new.online or new.issued >= old.issued


def _decode(decoder: msgspec.json.Decoder[Any], data: bytes) -> Any:
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise MalformedMessageError(f"a message cannot be read: {exc}") from exc
