"""A connection to a member, and a connection to join: what the swarm, the seeder and the enrolment hold.

A ``PeerConnection`` exists once both sides know each other; either side sends control messages, asks for pieces and
blobs, and answers. A ``JoinConnection`` is a stranger's, on its own ALPN. Who may say what is
``edgesync.peer.session``; bytes, windows and deadlines are ``edgesync.transport.streams``. Pieces are not hashed here:
who asked checks.
"""

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from edgesync import limits
from edgesync.errors import (
    EdgeSyncError,
    ErrorCode,
    LimitExceededError,
    PeerBusyError,
    ProtocolError,
    TransportError,
    UnexpectedMessageError,
)
from edgesync.ids import Digest, PeerIdentity, PieceId
from edgesync.peer import session as sessions
from edgesync.peer.session import BlobQuestion, PieceQuestion, Session, code_of, opening_question
from edgesync.rate import TokenBucket
from edgesync.transport.streams import Carrier, Stream
from edgesync.transport.throttle import OVERHEAD, ReceiveCap
from edgesync.transport.udp import plain
from edgesync.wire import codec
from edgesync.wire.messages import (
    Blob,
    Close,
    ControlMessage,
    Encoding,
    Fetch,
    Join,
    Joined,
    JoinRefused,
    Missing,
    MissingBlob,
    PieceHeader,
    Request,
)

log = logging.getLogger(__name__)

UNCAPPED_STEP_BYTES = 1 << 20
"""A cap that is set is noticed after so many bytes of a piece at the latest."""
PIECE_HEADER_BYTES = 128
"""More than the message before a piece's body has."""
MissingReason = Literal["gone", "not_held", "refused", "busy"]


@dataclass(frozen=True, slots=True)
class PieceAnswer:
    """One piece in the form it travels, or why it does not come."""

    piece: PieceId
    encoding: Encoding = "identity"
    data: bytes = b""
    missing: MissingReason | None = None


class Handler(Protocol):
    """What a machine does with its connections. Called from the event loop; errors it raises cost only the stream."""

    async def connected(self, conn: "PeerConnection") -> None: ...
    async def disconnected(self, conn: "PeerConnection", error: EdgeSyncError) -> None: ...
    async def message(self, conn: "PeerConnection", message: ControlMessage) -> None: ...
    def serve(self, conn: "PeerConnection", request: Request) -> AsyncIterator[PieceAnswer]: ...
    async def serve_fetch(self, conn: "PeerConnection | None", name: str) -> bytes | None:
        """``conn`` is None for a stranger that just joined."""

    async def serve_join(
        self, address: tuple[str, int], join: Join, server_certificate_sha256: bytes
    ) -> Joined | JoinRefused: ...


class Tasks(Protocol):
    """Where connections run their tasks: the endpoint, which awaits them all when it closes."""

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> "asyncio.Task[None]": ...


class PeerConnection:
    """A session with a member of the fleet."""

    def __init__(
        self, link: Carrier, session: Session, tasks: Tasks, handler: Handler, control: Stream
    ) -> None:
        self.dialed = link.dialed
        self.listen_port = 0
        """UDP port the peer says others may dial it at; 0: none, or this side dialed."""
        self.observed_address = ""
        """Where the peer sees this machine (told by a server)."""
        self.peer_versions = (0, 0)
        """The server's root and timestamp versions as of WELCOME."""
        self.peer_background = False
        """The peer asks that what is sent to it leaves room to other traffic."""
        self.certificate = b""
        self.keep_alive = False
        """Set while something is wanted from the peer for longer than a stream lives."""
        self.bytes_in = 0
        """Piece bodies received, as carried."""
        self.bytes_out = 0
        self.send_caps: tuple[TokenBucket, ...] = ()
        """Shared with other connections: bodies of answers are sent no faster than the lowest."""
        self.receive_caps: tuple[ReceiveCap, ...] = ()
        """Shared with other connections: bodies of answers are read no faster than the lowest."""
        self.closed = asyncio.Event()
        self.error: EdgeSyncError | None = None
        self._link = link
        self._session = session
        self._tasks = tasks
        self._handler = handler
        self._control = control
        self._questions = asyncio.Semaphore(limits.MAX_REQUESTS_PER_CONNECTION)
        self._asking: dict[Stream, None] = {}
        self._answered = asyncio.Event()
        self._answered.set()
        self._ahead: dict[Stream, int] = {}
        """How far ahead of its reader each capped answer may be."""
        self._paid_bytes = 0
        """What of the wire the caps were charged for."""
        self._answered_bytes = 0
        self._peer: PeerIdentity | None = None
        self._running: set[asyncio.Task[None]] = set()
        self._started = asyncio.Event()

    def __repr__(self) -> str:
        who = f"{self._peer.role} {self._peer.id}" if self._peer else "nobody yet"
        return f"<PeerConnection {who} {self._link!r}>"

    @property
    def peer(self) -> PeerIdentity:
        assert self._peer is not None
        return self._peer

    @property
    def address(self) -> tuple[str, int]:
        """Where the peer is now; it may move. Through a proxy: where that is."""
        return plain(self._link.current_address)

    @property
    def proxy(self) -> str:
        """``HOST:PORT`` of the HTTP proxy that carries the connection; empty: none."""
        return self._link.proxy

    @property
    def carrier(self) -> str:
        """``QUIC``, or ``TLS`` where UDP does not get through."""
        return self._link.name

    @property
    def wire_bytes(self) -> int:
        """What went over the wire in both directions, with headers, as near as it can be told."""
        return self._link.wire_bytes

    @property
    def controller(self) -> str:
        """Which congestion controller decides how fast the peer is sent to, now."""
        return self._link.controller_name

    def yield_to_others(self) -> None:
        """From now on, what is sent to the peer leaves room to other traffic on the path."""
        self._link.yield_to_others()

    @property
    def rtt(self) -> float:
        """Smoothed round-trip time in seconds; 0.0 before the first sample."""
        return 0.0 if self._link.error is not None else self._link.smoothed_rtt()

    @property
    def silent_s(self) -> float:
        """Seconds since anything came from the peer."""
        return self._link.loop.time() - self._link.last_received

    @property
    def wanted(self) -> bool:
        """Whether anything is open that silence should not end."""
        return self.keep_alive or bool(self._asking) or bool(self._running)

    @property
    def answer_bytes(self) -> int:
        """Bytes that came on the streams this side opened, of unfinished answers too."""
        return self._answered_bytes + sum(stream.received for stream in self._asking)

    def established(self, facts: sessions.Established) -> None:
        self._peer = facts.peer
        self.certificate = facts.certificate
        self.listen_port = facts.listen_port
        self.peer_versions = (facts.root_version, facts.timestamp_version)
        self.observed_address = facts.observed_address
        self.peer_background = facts.background

    # --- asking

    async def send(self, message: ControlMessage) -> None:
        """Raises EdgeSyncError: the connection is over, or the peer does not read."""
        if not self._session.may_send(message):
            raise self.error or UnexpectedMessageError(
                f"a {type(message).__name__} cannot be sent now"
            )
        self._control.write(codec.encode(message))
        try:
            await self._control.drain()
        except TransportError as exc:
            await self.close(code_of(exc), str(exc), error=exc)
            raise

    async def request(
        self,
        manifest: Digest,
        pieces: Sequence[PieceId],
        encodings: Sequence[Encoding] = ("identity", "zstd"),
        *,
        max_piece_bytes: int = limits.DEFAULT_MAX_PIECE_BYTES,
        answer_bytes: int | None = None,
        stall_s: float = limits.STALL_TIMEOUT_S,
    ) -> AsyncGenerator[PieceAnswer, None]:
        """Ask for 1 to 256 pieces; answers come in any order, exactly one for each.

        ``answer_bytes`` is the length of all the pieces together, where it is known.

        Answers that are not taken hold back the peer: two pieces of ``max_piece_bytes`` wait here, or what the path
        holds where that is more and the budget has it. Leaving the iterator early (``aclose``, cancellation) ends the
        stream. Raises ProtocolError: the peer broke the rules and was dropped; TransportError: it went away, is busy,
        or nothing moved for ``stall_s`` seconds.
        """
        question = PieceQuestion(manifest, pieces, encodings, max_piece_bytes=max_piece_bytes)
        held = [cap for cap in self.receive_caps if cap.rate_bytes_s]
        # From the first byte on: what was granted once cannot be taken back.
        window = min((cap.window_bytes(self.rtt) for cap in held), default=None)
        if window is not None:
            await self._pay(held, window)
        async with self._asked(codec.encode(question.request), held_back=window) as stream:
            await stream.grant(2 * max_piece_bytes + limits.MEMBER_STREAM_WINDOW_BYTES)
            bodies = len(pieces) * max_piece_bytes if answer_bytes is None else answer_bytes
            stream.follow_path(bodies + len(pieces) * PIECE_HEADER_BYTES)
            while question.waiting:
                message = await stream.read_frame(limits.MAX_CONTROL_FRAME_BYTES, stall_s=stall_s)
                if message is None:
                    raise UnexpectedMessageError(
                        f"the peer left {question.waiting} pieces unanswered"
                    )
                header = question.answer(message)
                if isinstance(header, Missing):
                    yield PieceAnswer(PieceId(header.piece), missing=header.reason)
                    continue
                body = await self._read_body(stream, header.length, stall_s)
                self.bytes_in += header.length
                yield PieceAnswer(PieceId(header.piece), header.encoding, body)
            await stream.expect_end(stall_s=stall_s)

    async def _read_body(self, stream: Stream, length: int, stall_s: float) -> bytes:
        """Bytes of an answer as fast as the caps allow; they may change meanwhile."""
        body = bytearray()
        while (left := length - len(body)) > 0:
            held = [cap for cap in self.receive_caps if cap.rate_bytes_s]
            if not held:
                stream.hold_back(None)
                self._ahead.pop(stream, None)
                self._paid_bytes = self._link.wire_bytes_in
                step = min(left, UNCAPPED_STEP_BYTES)
                if step == length:
                    return await stream.read_exactly(length, stall_s=stall_s)
            for cap in held:
                cap.streams += 1
            try:
                if held:
                    window = min(cap.window_bytes(self.rtt) for cap in held)
                    stream.hold_back(window)
                    self._ahead[stream] = window
                    step = min(left, window // 4)
                    await self._pay(held)
                body += await stream.read_exactly(step, stall_s=stall_s)
            finally:
                for cap in held:
                    cap.streams -= 1
        return bytes(body)

    async def _pay(self, held: Sequence[ReceiveCap], more: int = 0) -> None:
        """Charge the caps with all that came since, whatever it was, and with what may come: windows and ``more``."""
        may_come = int((sum(self._ahead.values()) + more) * OVERHEAD)
        due = self._link.wire_bytes_in + may_come - self._paid_bytes
        if due > 0:
            self._paid_bytes += due
            for cap in held:
                await cap.take(due)

    async def _write_body(self, stream: Stream, data: bytes) -> None:
        """Bytes of an answer as fast as the caps allow; they may change meanwhile."""
        at = 0
        while at < len(data):
            held = [cap for cap in self.send_caps if cap.rate_bytes_s]
            if not held:
                stream.write(data[at:] if at else data)
                break
            step = min(cap.step_bytes for cap in held)
            for cap in held:
                await cap.take(int(min(step, len(data) - at) * OVERHEAD))
            stream.write(data[at : at + step])
            at += step
            await stream.drain()

    async def fetch(
        self, name: str, max_bytes: int, *, stall_s: float = limits.STALL_TIMEOUT_S
    ) -> bytes:
        """Metadata or a manifest by name. Raises NotFoundError; LimitExceededError: longer than ``max_bytes``."""
        question = BlobQuestion(name, max_bytes=max_bytes)
        async with self._asked(codec.encode(question.fetch)) as stream:
            return await _read_blob(stream, question, stall_s)

    @contextlib.asynccontextmanager
    async def _asked(self, frame: bytes, *, held_back: int | None = None) -> AsyncIterator[Stream]:
        """A stream with one question on it; a peer that breaks the rules on it is dropped."""
        async with self._questions:
            stream = self._link.open_stream(held_back)
            self._asking[stream] = None
            self._answered.clear()
            if held_back is not None:
                self._ahead[stream] = held_back
            try:
                stream.write(frame, end=True)
                yield stream
            except ProtocolError as exc:
                # Only what this side found is a reason to drop; what the peer said about us came with its own end.
                if self._link.error is None and not stream.reset_by_peer:
                    await self.close(exc.code, str(exc), error=exc)
                raise
            finally:
                del self._asking[stream]
                if not self._asking:
                    self._answered.set()
                self._ahead.pop(stream, None)
                self._answered_bytes += stream.received
                self._link.forget(stream)

    async def answered(self) -> None:
        """Return when no question of this side is open."""
        await self._answered.wait()

    async def is_answered(self, timeout_s: float) -> bool:
        """Whether the peer says anything within ``timeout_s``, now that it is asked."""
        asked_at = self._link.loop.time()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self.closed.is_set() and self._link.last_received <= asked_at:
                    self._link.ping()
                    await asyncio.sleep(timeout_s / 50)
        return not self.closed.is_set() and self._link.last_received > asked_at

    async def close(
        self,
        code: ErrorCode = ErrorCode.OK,
        reason: str = "",
        *,
        error: EdgeSyncError | None = None,
    ) -> None:
        """End the session; ``disconnected`` follows. May be repeated."""
        self._link.close(code, reason, error=error)

    # --- answering

    def start(self) -> None:
        """Tell the handler, then deliver what the peer says."""
        self._started.set()
        self._spawn(self._pump(), "control")

    def stream_opened(self, stream: Stream) -> None:
        self._spawn(self._answer(stream), f"stream-{stream.id}", counts=True)

    def _spawn(
        self, work: Coroutine[Any, Any, None], name: str, *, counts: bool = False
    ) -> "asyncio.Task[None]":
        task = self._tasks.spawn(work, f"{name} {self!r}")
        if counts:
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        return task

    async def _pump(self) -> None:
        try:
            while True:
                if not await self._control.wait_readable(stall_s=None):
                    await self.close(ErrorCode.OK, "control stream ended")
                    return
                message = await self._control.read_frame(limits.MAX_CONTROL_FRAME_BYTES)
                if message is None:
                    continue
                for effect in self._session.handle(message):
                    if isinstance(effect, sessions.Deliver):
                        await self._handler.message(self, effect.message)
                    elif isinstance(effect, sessions.Abort):
                        await self.close(effect.code, str(effect.error), error=effect.error)
                        return
        except EdgeSyncError as exc:
            await self.close(code_of(exc), str(exc), error=exc)
        except Exception:
            log.exception("a control message from %s could not be handled", self._peer)
            await self.close(ErrorCode.INTERNAL)

    async def _answer(self, stream: Stream) -> None:
        try:
            message = await stream.read_frame(limits.MAX_QUESTION_FRAME_BYTES)
            question = opening_question(message)
            await stream.expect_end()
            await self._started.wait()
            if isinstance(question, Fetch):
                await _write_blob(stream, question.name, self._fetch_for(question.name))
            else:
                await self._answer_pieces(stream, question)
        except ProtocolError as exc:
            if self._link.error is None and not stream.reset_by_peer:
                await self.close(exc.code, str(exc), error=exc)
        except EdgeSyncError as exc:
            stream.abandon(code_of(exc))
        except Exception:
            log.exception("a question from %s could not be answered", self._peer)
            stream.abandon(ErrorCode.INTERNAL)
        finally:
            self._link.forget(stream)

    def _fetch_for(self, name: str) -> Awaitable[bytes | None]:
        return self._handler.serve_fetch(self, name)

    async def _answer_pieces(self, stream: Stream, request: Request) -> None:
        waiting = set(request.pieces)
        answers = self._handler.serve(self, request)
        try:
            async for answer in answers:
                if answer.piece not in waiting:
                    raise RuntimeError(
                        "the handler answered a piece twice, or one nobody asked for"
                    )
                waiting.discard(answer.piece)
                if answer.missing is not None:
                    stream.write(codec.encode(Missing(piece=answer.piece, reason=answer.missing)))
                else:
                    header = PieceHeader(
                        piece=answer.piece, encoding=answer.encoding, length=len(answer.data)
                    )
                    if self.send_caps:
                        stream.write(codec.encode(header))
                        await self._write_body(stream, answer.data)
                    else:
                        stream.write(codec.encode(header) + answer.data)
                    self.bytes_out += len(answer.data)
                await stream.drain()
        finally:
            aclose = getattr(answers, "aclose", None)
            if aclose is not None:
                await aclose()
        for piece in request.pieces:
            if piece in waiting:
                stream.write(codec.encode(Missing(piece=piece, reason="not_held")))
        stream.write(b"", end=True)
        await stream.drain(low_water=0)

    # --- the end

    def lost(self, error: EdgeSyncError) -> list["asyncio.Task[None]"]:
        """Record the end; the tasks that still answer, for the endpoint to cancel."""
        self.error = error
        self.closed.set()
        return list(self._running)


def surviving(
    own_key: str, first: PeerConnection, second: PeerConnection
) -> tuple[PeerConnection, PeerConnection]:
    """(keep, drop) of two connections to one peer, such that both ends keep the same: the lower key's dial wins."""
    lower_dialed = own_key < first.peer.key
    if first.dialed != second.dialed:
        return (first, second) if first.dialed == lower_dialed else (second, first)
    return second, first  # the older of two of a kind is the likelier corpse


class JoinConnection:
    """The asking side of joining; the server is known by its key alone."""

    def __init__(self, link: Carrier, server_certificate: bytes) -> None:
        self.server_certificate_sha256 = hashlib.sha256(server_certificate).digest()
        self._link = link

    @property
    def address(self) -> tuple[str, int]:
        return plain(self._link.current_address)

    async def ask(
        self, join: Join, *, stall_s: float = limits.STALL_TIMEOUT_S
    ) -> Joined | JoinRefused:
        """Raises EdgeSyncError: no answer came, or none that is one."""
        stream = self._link.open_stream()
        try:
            stream.write(codec.encode(join), end=True)
            message = await stream.read_frame(limits.MAX_CONTROL_FRAME_BYTES, stall_s=stall_s)
            if not isinstance(message, Joined | JoinRefused):
                raise UnexpectedMessageError("the gateway did not answer the question to join")
            return message
        finally:
            self._link.forget(stream)

    async def fetch(
        self, name: str, max_bytes: int, *, stall_s: float = limits.STALL_TIMEOUT_S
    ) -> bytes:
        question = BlobQuestion(name, max_bytes=max_bytes)
        stream = self._link.open_stream()
        try:
            stream.write(codec.encode(question.fetch), end=True)
            return await _read_blob(stream, question, stall_s)
        finally:
            self._link.forget(stream)

    async def close(self) -> None:
        self._link.close(ErrorCode.OK)


async def answer_join(
    link: Carrier, stream: Stream, handler: Handler, server_certificate_sha256: bytes
) -> bool:
    """The first stream of a stranger's join connection; True once it may fetch."""
    message = await stream.read_frame(limits.UNPROVEN_WINDOW_BYTES // 2)
    if not isinstance(message, Join):
        raise UnexpectedMessageError("a join connection began with something else than JOIN")
    await stream.expect_end()
    answer = await handler.serve_join(plain(link.address), message, server_certificate_sha256)
    stream.write(codec.encode(answer), end=True)
    await stream.drain(low_water=0)
    return isinstance(answer, Joined)


async def answer_joined_fetch(stream: Stream, handler: Handler) -> None:
    """Any later stream of a join connection: FETCH and nothing else."""
    message = await stream.read_frame(limits.MAX_QUESTION_FRAME_BYTES)
    if not isinstance(message, Fetch):
        raise UnexpectedMessageError("a join connection asked for something else than metadata")
    await stream.expect_end()
    await _write_blob(stream, message.name, handler.serve_fetch(None, message.name))


async def _read_blob(stream: Stream, question: BlobQuestion, stall_s: float) -> bytes:
    window = limits.UNPROVEN_WINDOW_BYTES
    message = await stream.read_frame(limits.MAX_CONTROL_FRAME_BYTES, stall_s=stall_s)
    if message is None:
        raise UnexpectedMessageError("the peer ended a stream without an answer")
    left = question.answer(message)
    body = bytearray()
    if left > window:
        window = min(left, 256 * limits.KIB)
        await stream.grant(window)
    while left:
        step = min(left, window // 2)
        body += await stream.read_exactly(step, stall_s=stall_s)
        left -= step
    await stream.expect_end(stall_s=stall_s)
    return bytes(body)


async def _write_blob(stream: Stream, name: str, found: Awaitable[bytes | None]) -> None:
    data = await found
    if data is None:
        stream.write(codec.encode(MissingBlob(name=name)), end=True)
    elif len(data) > limits.MAX_MANIFEST_BYTES:
        raise LimitExceededError(f"{name} is too large to be sent")
    else:
        stream.write(codec.encode(Blob(length=len(data))))
        view = memoryview(data)
        step = limits.SEND_BACKLOG_BYTES
        for at in range(0, len(view), step):
            stream.write(bytes(view[at : at + step]))
            await stream.drain()
        stream.write(b"", end=True)
    await stream.drain(low_water=0)


__all__ = [
    "Close",
    "Handler",
    "JoinConnection",
    "PeerBusyError",
    "PeerConnection",
    "PieceAnswer",
    "Tasks",
    "answer_join",
    "answer_joined_fetch",
    "surviving",
]

Connected = Callable[[PeerConnection], Awaitable[None]]
