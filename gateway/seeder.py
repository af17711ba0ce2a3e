"""The gateway towards its devices: gives pieces and metadata, gives leases, keeps account of who holds what.

The shell around ``gateway.core.scheduler``, and the endpoint's handler. It decides neither who is a member (the judge
has) nor who may join (the enrolment does). Invariants: a bundle that signed metadata does not list is not served; one
with ``access: assigned`` is served and leased to devices its assignment names only; what is sent passes the upload cap
piece by piece, so devices take turns; only durable pieces count as replicas.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from random import Random
from typing import Final

import msgspec
from msgspec import UNSET

from edgesync import limits
from edgesync.budget import Verdict
from edgesync.errors import (
    EdgeSyncError,
    ErrorCode,
    MalformedMessageError,
    PeerUnreachableError,
    UnexpectedMessageError,
)
from edgesync.ids import Digest, PeerKey, PieceId
from edgesync.io.runner import Runner
from edgesync.piece_finder import PieceFinder
from edgesync.rarity import full_mask, mask_from_bits
from edgesync.transport.connection import PeerConnection, PieceAnswer
from edgesync.transport.endpoint import Endpoint
from edgesync.trust import Trusted
from edgesync.wire.messages import (
    BitfieldMessage,
    ControlMessage,
    Grant,
    Have,
    Interested,
    Join,
    Joined,
    JoinRefused,
    Lease,
    LeaseRequest,
    Lost,
    PeerAddress,
    Request,
    Versions,
)
from gateway.budgets import SiteBudgets
from gateway.core import events as e
from gateway.core.scheduler import Scheduler
from gateway.packs import PieceStore
from gateway.register import Register
from gateway.throttles import Throttles

logger = logging.getLogger(__name__)

READ_THREADS: Final = 2
READ_PIECES: Final = 16
READ_BYTES: Final = 256 * limits.KIB
"""Pieces read for a device in one go: it holds so much and a piece more, and nothing is read ahead before the last."""
SERVED_BUNDLES: Final = 16
"""Piece tables kept in memory: 3.6 MB each at most."""
REFUSED_RETRY_S: Final = 30.0
SPENT_RETRY_S: Final = 30.0
"""A device at a site whose budget is spent asks again so often: a new month may have begun."""
RAISED_SPREAD_S: Final = 0.5
"""When a site's budget is raised its devices ask within so long, not all in one moment."""
CARRIED_FACTOR: Final = 1.05
"""What a piece costs on the wire for each of its bytes."""
SAMPLED_PIECES: Final = 256


class _Table(msgspec.Struct, frozen=True):
    """The parts of a manifest that serving needs; the rest of it is skipped."""

    piece_ids: bytes
    access: str = "fleet"


@dataclass(frozen=True, slots=True)
class Served:
    """A bundle the gateway can give."""

    digest: Digest
    finder: PieceFinder
    access: str
    piece_bytes: int = limits.MIN_PIECE_AVERAGE_BYTES
    """Average piece as it is sent."""


@dataclass(frozen=True, slots=True)
class Totals:
    bytes_out: int
    pieces_out: int


class Seeder:
    """``attach`` the endpoint it is the handler of; ``close`` after that was closed."""

    def __init__(
        self,
        *,
        pieces: PieceStore,
        manifest: Callable[[Digest], Awaitable[bytes | None]],
        fetch: Callable[[PeerConnection | None, str], Awaitable[bytes | None]],
        join: Callable[[tuple[str, int], Join, bytes], Awaitable[Joined | JoinRefused]],
        register: Register,
        trusted: Trusted,
        throttles: Throttles | None = None,
        budgets: SiteBudgets | None = None,
        rng: Random | None = None,
    ) -> None:
        self._pieces = pieces
        self._manifest = manifest
        self._fetch = fetch
        self._join = join
        self._register = register
        self._trusted = trusted
        self._throttles = throttles or Throttles()
        self._budgets = budgets or SiteBudgets()
        self._loop = asyncio.get_running_loop()
        self._threads = ThreadPoolExecutor(READ_THREADS, "seeder")
        self._served: OrderedDict[Digest, Served] = OrderedDict()
        self._loading: dict[Digest, asyncio.Lock] = {}
        self._connections: dict[PeerKey, PeerConnection] = {}
        self._sessions = 0
        self._session_of: dict[PeerKey, int] = {}
        self._turns: dict[PeerConnection, asyncio.Lock] = {}
        self._told_spent: dict[PeerKey, dict[Digest, float]] = {}
        """Connected devices that wait for their site's budget: bundle → bytes that a piece of it needs."""
        self._sent: dict[str, int] = {}
        self._bytes_out = 0
        self._pieces_out = 0
        self._endpoint: Endpoint | None = None
        self._rng = rng = rng or Random()  # noqa: S311  # spreads pieces, guards nothing
        self.scheduler = Scheduler(rng=rng)
        self._runner = Runner[e.SchedulerEvent, e.SchedulerEffect](
            self.scheduler, self._give_lease, tick=e.Tick()
        )

    def attach(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    async def close(self) -> None:
        self._runner.close()
        await asyncio.to_thread(self._threads.shutdown, wait=True, cancel_futures=True)

    # --- what the daemon tells and asks

    async def updated(self, register: Register, trusted: Trusted) -> None:
        """The database changed: who is where, what is listed, which budgets hold."""
        self._register = register
        self._trusted = trusted
        for digest in list(self._served):
            if trusted.by_digest(digest) is None:
                del self._served[digest]
                self._runner.feed(e.BundleRetired(digest))
        for key, conn in list(self._connections.items()):
            if key in register.by_key:
                self._hold(conn)
            if key in register.by_key and not conn.closed.is_set():
                self._runner.feed(self._connected_event(conn))
        self._tell_raised()

    def _tell_raised(self) -> None:
        """Devices that wait for their site's budget ask again soon once it has room: an empty lease says when."""
        verdicts: dict[str, Verdict | None] = {}
        for key, waiting in list(self._told_spent.items()):
            site = self._site(key)
            if site not in verdicts:
                verdicts[site] = self._verdict(key)
            verdict = verdicts[site]
            for digest, needed_bytes in list(waiting.items()):
                if verdict is None or verdict.left_bytes >= needed_bytes:
                    del waiting[digest]
                    wait_s = self._rng.uniform(0, RAISED_SPREAD_S)
                    self._give_lease(e.GiveLease(key, digest, (), (), 0.0, wait_s))
            if not waiting:
                del self._told_spent[key]

    async def seen(self, key: PeerKey, *, live: bool, held: Sequence[Digest] = ()) -> None:
        """What a device's signed state says: it is there, or its will came; and which whole bundles it holds."""
        device = self._register.by_key.get(key)
        if device is None:
            return
        self._runner.feed(
            e.DeviceSeen(key, live, device.id, device.site, tuple(device.local_addresses))
        )
        if not live or key in self._connections:
            return
        for digest in held[: limits.MAX_MANIFESTS_PER_CONNECTION]:
            served = await self._serve_bundle(digest)
            if served is not None:
                mask = full_mask(len(served.finder))
                self._runner.feed(e.HoldingsReported(key, digest, mask))

    def take_sent(self) -> dict[str, int]:
        """Piece bytes sent for each site since the last call, as carried."""
        sent, self._sent = self._sent, {}
        return sent

    def totals(self) -> Totals:
        return Totals(self._bytes_out, self._pieces_out)

    def count_budgets(self) -> None:
        """What every session moved since the last call; called often."""
        for conn in self._connections.values():
            self._spend(conn)

    def _site(self, key: PeerKey) -> str:
        device = self._register.by_key.get(key)
        return device.site if device is not None else "unknown"

    def _spend(self, conn: PeerConnection) -> None:
        self._budgets.count(conn, self._site(conn.peer.key), utc_now=time.time())

    def _verdict(self, key: PeerKey) -> Verdict | None:
        return self._budgets.verdict(self._site(key), utc_now=time.time())

    def controllers(self) -> dict[str, int]:
        """Sessions with devices by the congestion controller of what is sent."""
        found = Counter(conn.controller for conn in self._connections.values())
        return dict(sorted(found.items()))

    def min_site_replication(self) -> int | None:
        return self.scheduler.min_site_replication(now=self._loop.time())

    # --- sessions (Handler)

    async def connected(self, conn: PeerConnection) -> None:
        if conn.peer.role != "device":
            return
        key = conn.peer.key
        device = self._register.by_key.get(key)
        if device is None:
            await conn.close(ErrorCode.NOT_A_MEMBER, "not in the register")
            return
        self._connections[key] = conn
        self._hold(conn)
        if conn.peer_background:
            conn.yield_to_others()
        self._sessions += 1
        self._session_of[key] = self._sessions
        self._runner.feed(self._connected_event(conn))

    def _hold(self, conn: PeerConnection) -> None:
        """To the caps on all that is sent, and on what is sent to its site."""
        conn.send_caps = self._throttles.limiters(self._register.by_key[conn.peer.key].site)

    def _connected_event(self, conn: PeerConnection) -> e.DeviceConnected:
        key = conn.peer.key
        device = self._register.by_key[key]
        return e.DeviceConnected(
            key, device.id, device.site, self._addresses(conn), self._session_of[key]
        )

    def _addresses(self, conn: PeerConnection) -> tuple[str, ...]:
        """Where other devices may dial a connected one: what it says of itself first, then where we see it."""
        device = self._register.by_key.get(conn.peer.key)
        found = list(device.local_addresses) if device is not None else []
        if conn.listen_port:
            host = conn.address[0].removeprefix("::ffff:")
            seen = f"[{host}]:{conn.listen_port}" if ":" in host else f"{host}:{conn.listen_port}"
            if seen not in found:
                found.append(seen)
        return tuple(found[:8])

    async def disconnected(self, conn: PeerConnection, error: EdgeSyncError) -> None:
        self._turns.pop(conn, None)
        self._spend(conn)
        self._budgets.forget(conn)
        if self._connections.get(conn.peer.key) is conn:
            del self._connections[conn.peer.key]
            del self._session_of[conn.peer.key]
            self._told_spent.pop(conn.peer.key, None)
            # A session closed in good order says nothing against the device; one that broke off does.
            idle = isinstance(error, PeerUnreachableError)
            self._runner.feed(e.DeviceDisconnected(conn.peer.key, idle))

    async def message(self, conn: PeerConnection, message: ControlMessage) -> None:
        """Raises ProtocolError: the device is dropped."""
        key = conn.peer.key
        if self._connections.get(key) is not conn:
            return
        match message:
            case BitfieldMessage() | Have() | Lost() | LeaseRequest():
                digest = Digest(message.manifest.hex())
                served = await self._serve_bundle(digest)
                if served is None or not self._may_read(key, served):
                    if isinstance(message, LeaseRequest):
                        refusal = e.GiveLease(key, digest, (), (), 0.0, REFUSED_RETRY_S)
                        self._give_lease(refusal)
                    return
                self._account(key, served, message)
            case Interested() | Versions():
                pass
            case _:
                raise UnexpectedMessageError(f"a {type(message).__name__} came from a device")

    def _account(
        self, key: PeerKey, served: Served, message: BitfieldMessage | Have | Lost | LeaseRequest
    ) -> None:
        count = len(served.finder)
        digest = served.digest
        match message:
            case BitfieldMessage():
                if message.durable:
                    mask = mask_from_bits(message.bits, count)
                    self._runner.feed(e.HoldingsReported(key, digest, mask))
            case Have():
                if message.durable:
                    sources = tuple(PeerKey(source.hex()) for source in message.fetched_from)
                    pieces = _in_range(message.pieces, count)
                    self._runner.feed(e.PiecesHeld(key, digest, pieces, sources))
            case Lost():
                pieces = _in_range(message.pieces, count)
                self._runner.feed(e.PiecesLost(key, digest, pieces))
            case LeaseRequest():
                pieces = _in_range(message.unavailable, count)
                verdict = self._verdict(key)
                most = None
                if verdict is not None:
                    most = int(verdict.left_bytes / (CARRIED_FACTOR * served.piece_bytes))
                self._runner.feed(e.LeaseAsked(key, digest, message.count, pieces, most))

    def _may_read(self, key: PeerKey, served: Served) -> bool:
        return served.access != "assigned" or self._register.is_assigned(key, served.digest)

    def _give_lease(self, lease: e.GiveLease) -> None:
        conn = self._connections.get(lease.device)
        if conn is None:
            return
        position = {source.device: at for at, source in enumerate(lease.sources)}
        position[e.GATEWAY] = -1
        retry_s, reason = lease.retry_after_s, ""
        verdict = self._verdict(lease.device)
        served = self._served.get(lease.manifest)
        needed_bytes = CARRIED_FACTOR * served.piece_bytes if served is not None else 0.0
        if verdict is not None and verdict.left_bytes < needed_bytes:
            retry_s, reason = max(retry_s, SPENT_RETRY_S), verdict.reason[:200]
            self._told_spent.setdefault(lease.device, {})[lease.manifest] = needed_bytes
        else:
            self._told_spent.get(lease.device, {}).pop(lease.manifest, None)
        message = Lease(
            manifest=bytes.fromhex(lease.manifest),
            grants=[
                Grant(grant.piece, position[grant.primary], position[grant.backup])
                for grant in lease.grants
            ],
            sources=[
                PeerAddress(
                    key=bytes.fromhex(source.device),
                    id=source.id,
                    addresses=list(source.addresses),
                )
                for source in lease.sources
            ],
            deadline_ms=int(lease.deadline_s * 1000),
            retry_after_ms=int(retry_s * 1000),
            reason=reason or UNSET,
        )
        assert self._endpoint is not None
        self._endpoint.spawn(_tell(conn, message), "lease")

    # --- pieces (Handler)

    async def _serve_bundle(self, digest: Digest) -> Served | None:
        """The bundle's piece table; None when signed metadata does not list it or its manifest is not here."""
        if self._trusted.by_digest(digest) is None:
            return None
        served = self._served.get(digest)
        if served is not None:
            self._served.move_to_end(digest)
            return served
        async with self._loading.setdefault(digest, asyncio.Lock()):
            if digest in self._served:
                return self._served[digest]
            try:
                data = await self._manifest(digest)
            except EdgeSyncError as exc:
                logger.warning("bundle %s cannot be served: %s", digest[:12], exc)
                data = None
            if data is None:
                return None
            table, average = await self._loop.run_in_executor(
                self._threads, self._read_table, digest, data
            )
            served = self._served[digest] = table
            while len(self._served) > SERVED_BUNDLES:
                self._served.popitem(last=False)
            self._runner.feed(e.BundleServed(digest, len(served.finder), average))
        self._loading.pop(digest, None)
        return served

    def _read_table(self, digest: Digest, data: bytes) -> tuple[Served, int]:
        table = msgspec.json.decode(data, type=_Table)
        finder = PieceFinder(table.piece_ids)
        step = max(1, len(finder) // SAMPLED_PIECES)
        sizes = self._pieces.sizes(finder.id_of(at) for at in range(0, len(finder), step))
        average = sum(sizes.values()) // max(1, len(sizes))
        average = average or limits.MIN_PIECE_AVERAGE_BYTES
        return Served(digest, finder, table.access, average), average

    async def serve(self, conn: PeerConnection, request: Request) -> AsyncIterator[PieceAnswer]:
        served = await self._serve_bundle(Digest(request.manifest.hex()))
        pieces = [PieceId(piece) for piece in request.pieces]
        if served is None:
            return
        if not self._may_read(conn.peer.key, served):
            for piece in pieces:
                yield PieceAnswer(piece, missing="refused")
            return
        turn = self._turns.setdefault(conn, asyncio.Lock())
        async with turn:
            async for answer in self._answers(conn, served, pieces, request):
                yield answer

    async def _answers(
        self, conn: PeerConnection, served: Served, pieces: list[PieceId], request: Request
    ) -> AsyncIterator[PieceAnswer]:
        packed_ok = "zstd" in request.encodings

        def read(first: int) -> "asyncio.Future[list[PieceAnswer]]":
            wanted = pieces[first : first + READ_PIECES]
            return self._loop.run_in_executor(
                self._threads, self._read_some, served, wanted, packed_ok
            )

        ready: deque[PieceAnswer] = deque()
        ahead: asyncio.Future[list[PieceAnswer]] | None = read(0)
        spent = False
        try:
            for position, piece in enumerate(pieces):
                self._spend(conn)
                verdict = self._verdict(conn.peer.key)
                if spent or (verdict is not None and not verdict.left_bytes):
                    spent = True  # for the rest of this question, whatever is raised meanwhile
                    yield PieceAnswer(piece, missing="busy")
                    continue
                if not ready:
                    assert ahead is not None
                    ready.extend(await ahead)
                    ahead = None
                answer = ready.popleft()
                if not ready and position + 1 < len(pieces):
                    ahead = read(position + 1)
                if answer.missing is None:
                    self._count(conn.peer.key, len(answer.data))
                yield answer
                index = served.finder.find(piece)
                if answer.missing is None and index is not None:
                    # The peer took it, or what was before it, from our buffers.
                    sent = e.PieceSent(conn.peer.key, served.digest, index, len(answer.data))
                    self._runner.feed(sent)
        finally:
            if ahead is not None:
                ahead.cancel()

    def _read_some(
        self, served: Served, pieces: list[PieceId], packed_ok: bool
    ) -> list[PieceAnswer]:
        """The first of ``pieces``, and more until READ_BYTES are passed: a call costs as much as a read."""
        answers: list[PieceAnswer] = []
        size = 0
        for piece in pieces:
            answer = self._read(served, piece, packed_ok)
            answers.append(answer)
            size += len(answer.data)
            if size >= READ_BYTES:
                break
        return answers

    def _read(self, served: Served, piece: PieceId, packed_ok: bool) -> PieceAnswer:
        if served.finder.find(piece) is None:
            return PieceAnswer(piece, missing="not_held")
        stored = self._pieces.read(piece)
        if stored is None:
            return PieceAnswer(piece, missing="gone")
        if stored.encoding != "identity" and not packed_ok:
            return PieceAnswer(piece, missing="refused")
        return PieceAnswer(piece, stored.encoding, stored.data)

    def _count(self, key: PeerKey, size: int) -> None:
        self._bytes_out += size
        self._pieces_out += 1
        site = self._site(key)
        self._sent[site] = self._sent.get(site, 0) + size

    # --- other questions (Handler)

    async def serve_fetch(self, conn: PeerConnection | None, name: str) -> bytes | None:
        return await self._fetch(conn, name)

    async def serve_join(
        self, address: tuple[str, int], join: Join, server_certificate_sha256: bytes
    ) -> Joined | JoinRefused:
        return await self._join(address, join, server_certificate_sha256)


async def _tell(conn: PeerConnection, message: Lease) -> None:
    with contextlib.suppress(EdgeSyncError):
        await conn.send(message)


def _in_range(pieces: list[int], count: int) -> tuple[int, ...]:
    if any(piece >= count for piece in pieces):
        raise MalformedMessageError("a device named a piece its manifest does not have")
    return tuple(pieces)


__all__ = ["Seeder", "Served", "Totals"]
