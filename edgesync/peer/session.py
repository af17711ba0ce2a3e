"""Who may say what, and when, on a connection between two members: decided without sockets, clock or tasks.

``Session`` is the control stream of one connection; ``PieceQuestion`` and ``BlobQuestion`` are the asking side of one
request stream, ``opening_question`` the answering side's look at its first message. The transport feeds decoded
messages and runs the effects.

Invariants: nothing but HELLO and PROOF is accepted from a stranger; nothing is delivered before the peer is known; a
question is answered at most once per piece, within the encodings and sizes it named. Whatever a peer says, only
subclasses of EdgeSyncError come out, as an ``Abort`` effect or raised by the question classes.
"""

import enum
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from msgspec import UNSET

from edgesync import limits
from edgesync.envelope import verify_raw
from edgesync.errors import (
    BadSignatureError,
    EdgeSyncError,
    ErrorCode,
    LimitExceededError,
    NotAuthorizedError,
    NotFoundError,
    PeerBusyError,
    PeerTimeoutError,
    PeerUnreachableError,
    ProtocolError,
    TransportError,
    UnexpectedMessageError,
    VersionMismatchError,
)
from edgesync.identity import certificate_key
from edgesync.ids import Digest, PeerIdentity, PieceId, Role
from edgesync.wire import messages
from edgesync.wire.messages import (
    BitfieldMessage,
    Blob,
    Busy,
    Challenge,
    Close,
    ControlMessage,
    Encoding,
    Fetch,
    Have,
    Hello,
    Interested,
    Lease,
    LeaseRequest,
    Lost,
    Message,
    Missing,
    MissingBlob,
    PieceHeader,
    Proof,
    Request,
    Versions,
    Welcome,
)

PROTOCOL = 1
"""Protocol number offered and accepted; ALPN names the same."""

PROOF_CONTEXT = "proof"
MAX_REASON = 200

_AFTER_WELCOME = (Interested, BitfieldMessage, Have, Lost, LeaseRequest, Lease, Versions)


class Side(enum.Enum):
    CLIENT = "client"
    SERVER = "server"


class State(enum.Enum):
    NEW = "new"
    EXPECT_HELLO = "expect_hello"
    EXPECT_CHALLENGE = "expect_challenge"
    EXPECT_PROOF = "expect_proof"
    EXPECT_WELCOME = "expect_welcome"
    OPEN = "open"
    CLOSED = "closed"


class Signer(Protocol):
    """The part of an identity a session needs."""

    def sign(self, context: str, payload: bytes, /) -> bytes: ...


Judge = Callable[[bytes], PeerIdentity]
"""Says whose certificate (DER) this is. Raises NotAuthorizedError: nobody's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalPeer:
    """What this machine says about itself."""

    role: Role
    certificate: bytes
    """DER; presented in PROOF."""
    signer: Signer
    judge: Judge
    agent: str = ""
    listen_port: int = 0
    root_version: int = 0
    timestamp_version: int = 0
    background: bool = False
    """Ask peers to leave room to other traffic in what they send here."""


@dataclass(frozen=True, slots=True)
class Send:
    message: ControlMessage


@dataclass(frozen=True, slots=True)
class Established:
    """The peer is a member; streams may be opened and served from now on."""

    peer: PeerIdentity
    certificate: bytes
    listen_port: int
    root_version: int
    timestamp_version: int
    observed_address: str
    background: bool = False
    """The peer asks that what is sent to it leaves room to other traffic."""


@dataclass(frozen=True, slots=True)
class Deliver:
    message: ControlMessage


@dataclass(frozen=True, slots=True)
class Abort:
    """Close the connection with ``code``; ``error`` is what callers of this side see."""

    code: ErrorCode
    error: EdgeSyncError


Effect = Send | Established | Deliver | Abort


class Session:
    """The control stream of one connection, from either side.

    ``server_certificate`` is the DER the TLS handshake showed (the client) or ours (the server). ``server_peer`` is
    the client's verdict about it, reached before the session starts. ``nonce`` is 32 fresh random bytes (server).
    ``busy_ms`` above zero makes the server turn the caller away politely.
    """

    def __init__(
        self,
        *,
        side: Side,
        me: LocalPeer,
        server_certificate: bytes,
        started_at: float,
        server_peer: PeerIdentity | None = None,
        nonce: bytes = b"",
        busy_ms: int = 0,
        observed_address: str = "",
    ) -> None:
        if side is Side.SERVER and len(nonce) != 32:
            raise ValueError("a server session needs a nonce of 32 bytes")
        if side is Side.CLIENT and server_peer is None:
            raise ValueError("a client session needs the verdict about its server")
        self.side = side
        self.state = State.NEW if side is Side.CLIENT else State.EXPECT_HELLO
        self.peer: PeerIdentity | None = None
        self._me = me
        self._server_certificate = server_certificate
        self._server_peer = server_peer
        self._nonce = nonce
        self._busy_ms = busy_ms
        self._observed_address = observed_address
        self._deadline: float | None = started_at + limits.UNPROVEN_TIMEOUT_S

    def next_deadline(self) -> float | None:
        return self._deadline if self.state not in {State.OPEN, State.CLOSED} else None

    def start(self) -> list[Effect]:
        """The client's first words."""
        if self.state is not State.NEW:
            raise ValueError("a session starts once, on the client")
        self.state = State.EXPECT_CHALLENGE
        return [Send(Hello(protocols=[PROTOCOL], agent=self._me.agent))]

    def tick(self, *, now: float) -> list[Effect]:
        deadline = self.next_deadline()
        if deadline is None or now < deadline:
            return []
        return self._abort(
            PeerTimeoutError("the peer did not finish the handshake in time"), ErrorCode.TIMEOUT
        )

    def handle(self, message: Message) -> list[Effect]:
        """What follows from one decoded message of the control stream."""
        if self.state is State.CLOSED:
            return []
        try:
            return self._handle(message)
        except EdgeSyncError as exc:
            return self._abort(exc, code_of(exc))

    def _handle(self, message: Message) -> list[Effect]:
        match message:
            case Close():
                return self._abort(error_from_code(message.code, message.reason), ErrorCode.OK)
            case Busy() if self.side is Side.CLIENT or self.state is State.OPEN:
                return self._abort(
                    PeerBusyError("the peer is busy", retry_after_s=message.retry_after_ms / 1000),
                    ErrorCode.OK,
                )
            case Hello() if self.state is State.EXPECT_HELLO:
                return self._on_hello(message)
            case Challenge() if self.state is State.EXPECT_CHALLENGE:
                return self._on_challenge(message)
            case Proof() if self.state is State.EXPECT_PROOF:
                return self._on_proof(message)
            case Welcome() if self.state is State.EXPECT_WELCOME:
                return self._on_welcome(message)
            case (
                Interested()
                | BitfieldMessage()
                | Have()
                | Lost()
                | LeaseRequest()
                | Lease()
                | Versions()
            ) if self.state is State.OPEN:
                return self._on_open(message)
            case _:
                raise UnexpectedMessageError(
                    f"a {type(message).__name__} came while the session was in {self.state.value}"
                )

    def _on_hello(self, message: Hello) -> list[Effect]:
        if PROTOCOL not in message.protocols:
            raise VersionMismatchError(f"the peer offers none of our protocols ({PROTOCOL})")
        if self._busy_ms:
            error = PeerBusyError(
                "this machine has as many connections as it takes",
                retry_after_s=self._busy_ms / 1000,
            )
            return [
                Send(Busy(retry_after_ms=self._busy_ms)),
                *self._abort(error, ErrorCode.BUSY),
            ]
        self.state = State.EXPECT_PROOF
        return [
            Send(Challenge(protocol=PROTOCOL, nonce=self._nonce, agent=self._me.agent)),
        ]

    def _on_challenge(self, message: Challenge) -> list[Effect]:
        if message.protocol != PROTOCOL:
            raise VersionMismatchError(f"the server chose protocol {message.protocol}")
        payload = self._proof_payload(message.nonce)
        self.state = State.EXPECT_WELCOME
        return [
            Send(
                Proof(
                    certificate=self._me.certificate,
                    signature=self._me.signer.sign(PROOF_CONTEXT, payload),
                    listen_port=self._me.listen_port,
                    background=self._me.background or UNSET,
                )
            )
        ]

    def _on_proof(self, message: Proof) -> list[Effect]:
        verify_raw(
            PROOF_CONTEXT,
            self._proof_payload(self._nonce),
            message.signature,
            certificate_key(message.certificate),
        )
        peer = self._me.judge(message.certificate)
        self.peer = peer
        self.state = State.OPEN
        return [
            Send(
                Welcome(
                    root_version=self._me.root_version,
                    timestamp_version=self._me.timestamp_version,
                    observed_address=self._observed_address,
                    background=self._me.background or UNSET,
                )
            ),
            Established(
                peer=peer,
                certificate=message.certificate,
                listen_port=message.listen_port,
                root_version=0,
                timestamp_version=0,
                observed_address="",
                background=message.background is True,
            ),
        ]

    def _on_welcome(self, message: Welcome) -> list[Effect]:
        assert self._server_peer is not None
        self.peer = self._server_peer
        self.state = State.OPEN
        return [
            Established(
                peer=self._server_peer,
                certificate=self._server_certificate,
                listen_port=0,
                root_version=message.root_version,
                timestamp_version=message.timestamp_version,
                observed_address=message.observed_address,
                background=message.background is True,
            )
        ]

    def _on_open(self, message: ControlMessage) -> list[Effect]:
        assert self.peer is not None
        if isinstance(message, Lease) and self.peer.role != "gateway":
            raise UnexpectedMessageError("only a gateway gives leases")
        if isinstance(message, LeaseRequest) and self._me.role != "gateway":
            raise UnexpectedMessageError("only a gateway is asked for leases")
        return [Deliver(message)]

    def may_send(self, message: ControlMessage) -> bool:
        """Whether the caller may send this now; handshake messages are the session's own."""
        return self.state is State.OPEN and isinstance(message, _AFTER_WELCOME)

    def _proof_payload(self, nonce: bytes) -> bytes:
        return messages.proof_payload(
            role=Side.CLIENT.value,
            nonce=nonce,
            server_certificate_sha256=hashlib.sha256(self._server_certificate).digest(),
        )

    def _abort(self, error: EdgeSyncError, code: ErrorCode) -> list[Effect]:
        self.state = State.CLOSED
        return [Abort(code, error)]


def code_of(error: EdgeSyncError) -> ErrorCode:
    """The code a connection is closed with because of ``error``."""
    match error:
        case ProtocolError():
            return error.code
        case NotAuthorizedError() | BadSignatureError():
            return ErrorCode.NOT_A_MEMBER
        case PeerBusyError():
            return ErrorCode.BUSY
        case PeerTimeoutError():
            return ErrorCode.TIMEOUT
        case _:
            return ErrorCode.INTERNAL


def error_from_code(code: int, reason: str = "") -> EdgeSyncError:
    """What it means for us that the peer closed with ``code``; the counterpart of ``code_of``."""
    text = f": {printable(reason)}" if reason else ""
    match code:
        case ErrorCode.NOT_A_MEMBER | ErrorCode.REVOKED:
            return NotAuthorizedError(f"the peer does not accept this machine as a member{text}")
        case ErrorCode.BUSY:
            return PeerBusyError(f"the peer is busy{text}", retry_after_s=1.0)
        case ErrorCode.TIMEOUT:
            return PeerTimeoutError(f"the peer gave up waiting{text}")
        case ErrorCode.VERSION:
            return VersionMismatchError(f"the peer speaks another version{text}")
        case ErrorCode.LIMIT:
            return LimitExceededError(f"the peer says a limit was exceeded{text}")
        case ErrorCode.MALFORMED | ErrorCode.UNEXPECTED:
            return UnexpectedMessageError(f"the peer did not understand this machine{text}")
        case ErrorCode.OK | ErrorCode.GOING_AWAY | ErrorCode.DUPLICATE:
            return PeerUnreachableError(f"the peer closed the connection{text}")
        case _:
            return TransportError(f"the peer closed the connection with code {code}{text}")


def printable(text: str) -> str:
    """A remote's words without control characters, cut to a line."""
    return "".join(c if c.isprintable() else "?" for c in text[:MAX_REASON])


class PieceQuestion:
    """The asking side of one request stream: REQUEST, then one answer for each piece in any order."""

    def __init__(
        self,
        manifest: Digest,
        pieces: Sequence[PieceId],
        encodings: Sequence[Encoding],
        *,
        max_piece_bytes: int,
    ) -> None:
        if not 1 <= len(pieces) <= limits.MAX_PIECES_PER_REQUEST:
            raise ValueError(f"a request names 1 to {limits.MAX_PIECES_PER_REQUEST} pieces")
        self.request = Request(
            manifest=bytes.fromhex(manifest), pieces=list(pieces), encodings=list(encodings)
        )
        self._waiting = set(pieces)
        if len(self._waiting) != len(pieces):
            raise ValueError("a request names a piece once")
        self._max_piece_bytes = max_piece_bytes

    @property
    def waiting(self) -> int:
        """Pieces not answered yet."""
        return len(self._waiting)

    def answer(self, message: Message) -> PieceHeader | Missing:
        """Check one header. Raises ProtocolError: not an answer to what was asked."""
        if not isinstance(message, PieceHeader | Missing):
            raise UnexpectedMessageError(f"a {type(message).__name__} came instead of a piece")
        if message.piece not in self._waiting:
            raise LimitExceededError("the peer sent a piece it was not asked for")
        if isinstance(message, PieceHeader):
            if message.encoding not in self.request.encodings:
                raise UnexpectedMessageError("a piece came in an encoding that was not asked for")
            if message.length > self._max_piece_bytes:
                raise LimitExceededError(
                    f"a piece of {message.length} bytes came, at most {self._max_piece_bytes} were expected"
                )
        self._waiting.discard(PieceId(message.piece))
        return message


class BlobQuestion:
    """The asking side of FETCH."""

    def __init__(self, name: str, *, max_bytes: int) -> None:
        self.fetch = Fetch(name=name)
        self._max_bytes = max_bytes

    def answer(self, message: Message) -> int:
        """Length of the body. Raises NotFoundError: the peer has none; ProtocolError: no answer, or too long."""
        if isinstance(message, MissingBlob):
            raise NotFoundError(f"the peer does not have {self.fetch.name}")
        if not isinstance(message, Blob):
            raise UnexpectedMessageError(f"a {type(message).__name__} came instead of a blob")
        if message.length > self._max_bytes:
            raise LimitExceededError(
                f"{self.fetch.name} has {message.length} bytes, at most {self._max_bytes} are expected"
            )
        return message.length


def opening_question(message: Message | None) -> Request | Fetch:
    """The first message of a stream a peer opened. Raises ProtocolError."""
    if message is None:
        raise UnexpectedMessageError("a stream ended before it asked anything")
    if isinstance(message, Fetch):
        return message
    if isinstance(message, Request):
        if len(set(message.pieces)) != len(message.pieces):
            raise UnexpectedMessageError("a request names a piece twice")
        return message
    raise UnexpectedMessageError(f"a stream began with a {type(message).__name__}")
