"""The device among its peers: who is connected, who holds what, what is fetched and from whom metadata comes.

The shell around ``device.core.download`` (in ``device.transfer``) and ``device.serving``; the endpoint's handler. It
does not verify metadata or manifests (the caller of ``fetch_any`` does, though a ``sha256/…`` name is checked here) and
decides nothing about pieces. Invariants: one session per peer (both ends keep the same of two); what a peer says about
a manifest is bounded before it is kept; the gateway's session lives while a transfer or a question needs it, and
GATEWAY_IDLE_S longer; a quarantined key is not dialed, asked or served.
"""

import asyncio
import contextlib
import functools
import hashlib
import logging
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

from device.bundle_store import BundleStore, StagedBundle
from device.core import events as e
from device.discovery import Candidate, Verdict
from device.peer_link import PeerLink
from device.reaching import (
    PROBE_TIMEOUT_S,
    UdpVerdict,
    network_towards,
    probe,
    reach,
    sentence,
)
from device.serving import MayRead, Uploads
from device.transfer import Transfer
from edgesync import limits
from edgesync.config import parse_host_port
from edgesync.errors import (
    EdgeSyncError,
    ErrorCode,
    LimitExceededError,
    MalformedMessageError,
    NotAuthorizedError,
    NotFoundError,
    PeerBusyError,
    PeerUnreachableError,
    ProtocolError,
    TransportError,
    UnexpectedMessageError,
    VerificationError,
)
from edgesync.ids import Digest, PeerKey
from edgesync.peer.session import printable
from edgesync.piece_finder import PieceFinder
from edgesync.rarity import mask_from_bits
from edgesync.transport.connection import PeerConnection, PieceAnswer, surviving
from edgesync.transport.endpoint import Attempt, Endpoint
from edgesync.wire.messages import (
    BitfieldMessage,
    ControlMessage,
    Have,
    Interested,
    Join,
    Joined,
    JoinRefused,
    Lease,
    LeaseRequest,
    Lost,
    Request,
    Versions,
)

logger = logging.getLogger(__name__)

GATEWAY_IDLE_S: Final = 30.0
FIRST_RETRY_S: Final = 0.5
SETTLED_S: Final = 5.0
"""A session that ended sooner counts as a failed dial: what breaks it at once will break the next one too."""
MAX_RETRY_S: Final = 10.0
"""Longest pause between dials while something is wanted: after an outage of days, data moves within seconds."""
DIAL_TIMEOUT_S: Final = 3.0
"""How long a peer may be silent while it is dialed."""
GATEWAY_DIAL_TIMEOUT_S: Final = 6.0
"""The gateway is worth a lost packet on a path with two seconds of round trip."""
PROBE_LOOK_S: Final = 5.0
FINISH_S: Final = 60.0
"""How long the session over TLS may take to answer what it was asked, once QUIC serves."""
SILENT_S: Final = 2.0
"""A session from which nothing came for this long gives way to a new one of the same peer."""
MAX_DIALS: Final = 4
"""Peers the gateway named that are dialed at the same time."""
ENOUGH_PEERS: Final = 16
"""Sessions with peers beyond which no more are dialed by ourselves."""
TOLD_PEERS: Final = 64
FIRST_PEER_RETRY_S: Final = 10.0
MAX_PEER_RETRY_S: Final = 600.0
DEFAULT_PORT: Final = 7443
FETCH_WAIT_S: Final = 3.0
"""How long a question for metadata waits for a session to form when there is none."""
_BLOB: Final = re.compile(r"sha256/([0-9a-f]{64})\Z")


class Swarm:
    """``attach`` the endpoint before anything is fetched; ``close`` ends every transfer."""

    def __init__(
        self,
        *,
        store: BundleStore,
        metadata: Callable[[str], bytes | None],
        gateway_key: Callable[[], PeerKey],
        gateway_addresses: Callable[[], Sequence[str]],
        may_read: MayRead,
        obey_caps: Callable[[PeerConnection], None] | None = None,
        refuses: Callable[[PeerConnection], str] = lambda _conn: "",
        rng: random.Random | None = None,
        on_versions: Callable[[PeerKey, int, int], None] | None = None,
    ) -> None:
        self._store = store
        self._metadata = metadata
        self._gateway_key = gateway_key
        self._gateway_addresses = gateway_addresses
        self._rng = rng or random.Random()  # noqa: S311  # picks pieces and jitter, guards nothing
        self._on_versions = on_versions
        self._obey_caps = obey_caps
        self._refuses = refuses
        """Why nothing is to be had of a session now, and nothing to be given; empty: go on."""
        self._allowance: e.GatewayAllowance | None = None
        self.uploads = Uploads(store, may_read=may_read)
        self._loop = asyncio.get_running_loop()
        self._endpoint: Endpoint | None = None
        self._links: dict[PeerKey, PeerLink] = {}
        self._gateway: PeerLink | None = None
        self._transfers: dict[Digest, Transfer] = {}
        self._quarantined: dict[PeerKey, None] = {}
        self._rejected: dict[PeerKey, int] = {}
        self._told: dict[PeerKey, tuple[str, ...]] = {}
        self._dial_at: dict[PeerKey, tuple[float, int]] = {}
        """Of told peers that did not answer: when to dial again, and how often they did not."""
        self._dialing: dict[PeerKey, asyncio.Task[None]] = {}
        self._dial_slots = asyncio.Semaphore(MAX_DIALS)
        self._gateway_wanted = asyncio.Event()
        self._gateway_questions = 0
        self._gateway_seen = asyncio.Event()
        self._gateway_ready = asyncio.Event()
        self._gateway_tried = asyncio.Event()
        self._gateway_problem = "not connected yet"
        self._gateway_at: tuple[str, int] | None = None
        self.udp = UdpVerdict()
        self._udp_doubtful = asyncio.Event()
        self._prober: asyncio.Task[None] | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    # --- life

    def attach(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._keeper = asyncio.get_running_loop().create_task(
            self._keep_gateway(), name="gateway session"
        )
        self._prober = asyncio.get_running_loop().create_task(self._probe_udp(), name="probe UDP")

    async def close(self) -> None:
        tasks = [
            task
            for task in (self._keeper, self._prober, *self._dialing.values())
            if task is not None
        ]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for link in [*self._links.values(), *([self._gateway] if self._gateway else [])]:
            await link.close()
        self.uploads.close()

    # --- what the agent asks

    async def fetch_bundle(self, staged: StagedBundle) -> None:
        """Return once every piece is held and durable. Raises StorageError; never gives up for the network's sake."""
        digest = staged.digest
        if digest in self._transfers:
            raise RuntimeError("a bundle is fetched once at a time")
        finder = await asyncio.to_thread(PieceFinder, staged.map.piece_ids)
        transfer = Transfer(
            staged,
            finder,
            self,
            uploads=self.uploads,
            rng=random.Random(self._rng.random()),  # noqa: S311  # as above
            now=asyncio.get_running_loop().time(),
        )
        self._transfers[digest] = transfer
        try:
            self._begin(transfer)
            await transfer.run()
        finally:
            del self._transfers[digest]
            self._update_wants()

    def _begin(self, transfer: Transfer) -> None:
        digest = transfer.digest
        self._update_wants()
        if self._allowance is not None:
            transfer.feed(self._allowance)
        if self._gateway is not None:
            self._gateway.tell(self._bitfield(digest, durable=True))
            transfer.feed(e.GatewayUp(self._gateway.conn.rtt))
        for link in self._links.values():
            self._introduce(link, transfer)
            if digest in link.they_want:
                # It asked while there was nothing to tell.
                link.tell(self._bitfield(digest, durable=False))
        self._dial_told()

    def _dial_told(self) -> None:
        """Peers that were named or met before, the latest first; one that does not answer after growing pauses."""
        now = self._loop.time()
        for key, addresses in reversed(list(self._told.items())):
            if now >= self._dial_at.get(key, (0.0, 0))[0]:
                self.dial(key, addresses)

    def _left_unanswered(self, key: PeerKey) -> None:
        failures = self._dial_at.pop(key, (0.0, 0))[1]
        wait_s = min(FIRST_PEER_RETRY_S * 2.0**failures, MAX_PEER_RETRY_S)
        due = self._loop.time() + wait_s * self._rng.uniform(0.5, 1.0)
        self._dial_at[key] = (due, min(failures + 1, 16))
        while len(self._dial_at) > TOLD_PEERS:
            del self._dial_at[next(iter(self._dial_at))]

    def _introduce(self, link: PeerLink, transfer: Transfer) -> None:
        transfer.feed(e.PeerJoined(link.key))
        link.tell(Interested(manifest=bytes.fromhex(transfer.digest)))
        bits = link.announced.pop(transfer.digest, None)
        if bits is not None:
            self._bits_said(link, transfer, bits)

    def _update_wants(self) -> None:
        wanted = bool(self._transfers)
        for link in self._links.values():
            link.conn.keep_alive = wanted
        if self._gateway is not None:
            self._gateway.conn.keep_alive = wanted or self._gateway_questions > 0
        self._gateway_wanted.set()

    def gateway_seen(self, *, restarted: bool = False) -> None:
        """Word came that the gateway is there: a pause after failed attempts ends now.

        ``restarted``: it may be another process than before, so a session that is silent is dead.
        """
        self._gateway_seen.set()
        if (
            restarted
            and self._endpoint is not None
            and self._gateway is not None
            and self._gateway.conn.silent_s >= SILENT_S / 2
        ):
            self._endpoint.spawn(
                self._gateway.conn.close(ErrorCode.GOING_AWAY, "the gateway was restarted"),
                "close a dead gateway session",
            )

    def set_allowance(self, allowance: e.GatewayAllowance) -> None:
        """The way out of the site is metered, and this much may still pass."""
        self._allowance = allowance
        for transfer in list(self._transfers.values()):
            transfer.feed(allowance)
        for link in list(self._links.values()):
            if (reason := self._refuses(link.conn)) and self._endpoint is not None:
                self._endpoint.spawn(link.conn.close(ErrorCode.BUSY, reason), "close a paid peer")

    def network_changed(self) -> None:
        """Our network is another or is back: whoever did not answer may answer now."""
        self._gateway_seen.set()
        self._dial_at.clear()
        if self.wants_peers():
            self._dial_told()

    def wants_peers(self) -> bool:
        """Whether looking for peers would help now."""
        if len(self._links) >= ENOUGH_PEERS:
            return False
        return bool(self._transfers) or (self._gateway_questions > 0 and self._gateway is None)

    def waiting_reason(self, digest: Digest) -> str:
        transfer = self._transfers.get(digest)
        if transfer is None:
            return ""
        reason = transfer.explain()
        if self._gateway is None and self._gateway_problem:
            reason += f" ({self._gateway_problem})"
        return reason

    def peers(self) -> list[dict[str, Any]]:
        """For status screens: every open session with a peer."""
        return [
            {
                "id": link.conn.peer.id,
                "key": link.key,
                "role": link.conn.peer.role,
                # Through a proxy its address is all that is seen: it is not the peer's.
                "address": "" if link.conn.proxy else "{}:{}".format(*link.conn.address),
                "proxy": link.conn.proxy,
                "bytes_in": link.conn.bytes_in,
                "bytes_out": link.conn.bytes_out,
                "controller": link.conn.controller,
                "background": link.conn.peer_background,
                "pieces_rejected": self._rejected.get(link.key, 0),
                "quarantined": link.key in self._quarantined,
            }
            for link in (*self._links.values(), *([self._gateway] if self._gateway else ()))
        ]

    # --- metadata

    async def fetch_any(
        self, name: str, max_bytes: int, check: Callable[[bytes], Awaitable[None]] | None = None
    ) -> bytes:
        """A file by its wire name from the gateway, else from a peer. What is named by hash is checked against it.

        ``check`` raises VerificationError for bytes that are not what was meant: then the next one is asked.
        Raises NotFoundError: nobody in reach has it; VerificationError: what the last of them has is something else;
        PeerUnreachableError: nobody is in reach.
        """
        self._gateway_questions += 1
        self._update_wants()
        if self._gateway is None:
            self._dial_told()
        asked: dict[PeerKey, None] = {}
        error: EdgeSyncError = PeerUnreachableError(
            f"neither the gateway nor a peer is in reach: {self._gateway_problem}"
        )
        try:
            deadline = asyncio.get_running_loop().time() + FETCH_WAIT_S
            while True:
                for link in self._for_metadata(name):
                    if link.key in asked:
                        continue
                    asked[link.key] = None
                    try:
                        return await self._fetch_from(link, name, max_bytes, check)
                    except EdgeSyncError as exc:
                        error = exc
                        break
                else:
                    if not await self._wait_for_change(deadline):
                        raise error
        finally:
            self._gateway_questions -= 1
            self._update_wants()

    def _for_metadata(self, name: str) -> list[PeerLink]:
        links = [link for link in self._links.values() if link.key not in self._quarantined]
        self._rng.shuffle(links)
        gateway = [self._gateway] if self._gateway is not None else []
        if self._allowance is not None and _BLOB.match(name):
            return links[:8] + gateway  # it is the same from everybody, and here it costs nothing
        return gateway + links[:8]

    async def _wait_for_change(self, deadline: float) -> bool:
        """Wait for a new session; False when none formed and none is likely to."""
        left = deadline - asyncio.get_running_loop().time()
        if left <= 0 or (self._gateway is not None and not self._transfers):
            return False
        self._changed.clear()
        try:
            async with asyncio.timeout(left):
                await self._changed.wait()
        except TimeoutError:
            return False
        return True

    async def _fetch_from(
        self,
        link: PeerLink,
        name: str,
        max_bytes: int,
        check: Callable[[bytes], Awaitable[None]] | None,
    ) -> bytes:
        data = await link.conn.fetch(name, max_bytes)
        match = _BLOB.match(name)
        if match is not None and hashlib.sha256(data).hexdigest() != match[1]:
            self.rejected(link.key)
            raise VerificationError(f"{name[:19]} from {link.conn.peer.id} does not match its hash")
        if check is not None:
            await check(data)
        return data

    # --- the gateway's session

    @property
    def _needs_gateway(self) -> bool:
        return bool(self._transfers) or self._gateway_questions > 0

    async def _keep_gateway(self) -> None:
        failures = 0
        while True:
            if self._gateway is not None:
                began = self._loop.time()
                await self._watch_gateway()
                if self._gateway is not None or not self._needs_gateway:
                    continue
                if self._loop.time() - began >= SETTLED_S:
                    failures = 0  # an outage: back at once
                    continue
                failures = min(failures + 1, 16)
                ceiling = min(FIRST_RETRY_S * 2.0**failures, MAX_RETRY_S)
                await self._pause(self._rng.uniform(0.0, ceiling), failures)
                continue
            self._gateway_wanted.clear()
            if not self._needs_gateway:
                await self._gateway_wanted.wait()
                continue
            try:
                await self._connect_gateway()
                continue
            except PeerBusyError as exc:
                self._gateway_problem = f"the gateway is busy: {exc}"
                wait = exc.retry_after_s * self._rng.uniform(1.0, 2.0)
            except EdgeSyncError as exc:
                self._gateway_problem = f"the gateway cannot be reached: {exc}"
                # Full jitter: after an outage a thousand devices must not come back in step.
                if self.wants_peers():
                    self._dial_told()
                wait = self._rng.uniform(0.1, min(FIRST_RETRY_S * 2.0**failures, MAX_RETRY_S))
            failures = await self._pause(wait, min(failures + 1, 16))

    async def _pause(self, wait_s: float, failures: int) -> int:
        """Wait, unless word comes that the gateway is there; the failures that count from then on."""
        logger.debug("%s; again in %.1f s", self._gateway_problem, wait_s)
        self._gateway_seen.clear()
        try:
            async with asyncio.timeout(wait_s):
                await self._gateway_seen.wait()
        except TimeoutError:
            return failures
        return 0

    async def _watch_gateway(self) -> None:
        """Return when the session is over or was idle for long enough."""
        link = self._gateway
        assert link is not None
        closed = asyncio.ensure_future(link.conn.closed.wait())
        try:
            while self._gateway is link and not link.conn.closed.is_set():
                self._gateway_wanted.clear()
                if self._needs_gateway:
                    woken = asyncio.ensure_future(self._gateway_wanted.wait())
                    await asyncio.wait({closed, woken}, return_when=asyncio.FIRST_COMPLETED)
                    woken.cancel()
                    continue
                try:
                    async with asyncio.timeout(GATEWAY_IDLE_S):
                        woken = asyncio.ensure_future(self._gateway_wanted.wait())
                        await asyncio.wait({closed, woken}, return_when=asyncio.FIRST_COMPLETED)
                        woken.cancel()
                except TimeoutError:
                    if not self._needs_gateway:
                        await link.conn.close(ErrorCode.OK, "idle")
                        self._drop_gateway(link)
        finally:
            closed.cancel()
            if self._gateway is link:
                self._drop_gateway(link)

    async def _connect_gateway(self) -> None:
        """Raises EdgeSyncError: at no address."""
        assert self._endpoint is not None
        error: EdgeSyncError = PeerUnreachableError("no address of the gateway is known")
        for text in list(self._gateway_addresses())[:8]:
            attempt = Attempt()
            try:
                address = _address(text)
                await reach(
                    self.udp,
                    address,
                    functools.partial(
                        self._endpoint.connect,
                        address,
                        expected_key=self._gateway_key(),
                        attempt=attempt,
                    ),
                    timeout_s=GATEWAY_DIAL_TIMEOUT_S,
                    heard=attempt.heard,
                )
            except EdgeSyncError as exc:
                error = exc
            else:
                if self._gateway is not None:
                    self._gateway_at = address
                    self._udp_doubtful.set()
                    return
                error = PeerUnreachableError("its session ended as it began")
        raise error

    @property
    def gateway_carrier(self) -> str:
        """``QUIC`` or ``TLS``; empty without a session."""
        return self._gateway.conn.carrier if self._gateway is not None else ""

    @property
    def gateway_proxy(self) -> str:
        """``HOST:PORT`` of the HTTP proxy that carries the session; empty without one."""
        return self._gateway.conn.proxy if self._gateway is not None else ""

    def carrier_problem(self) -> str:
        """A sentence while UDP to the gateway is taken for blocked; else empty."""
        at = self._gateway_at
        return sentence(at[1]) if at and self.udp.is_blocked(network_towards(at)) else ""

    async def _probe_udp(self) -> None:
        """Look now and then whether UDP gets through: while TLS serves, and while nothing is wanted of the gateway."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PROBE_LOOK_S):
                    await self._udp_doubtful.wait()
            self._udp_doubtful.clear()
            at, link = self._gateway_at, self._gateway
            if at is None or self._endpoint is None:
                continue
            network = network_towards(at)
            if link is None and (self._needs_gateway or not self.udp.is_blocked(network)):
                continue
            if link is not None and link.conn.carrier != "TLS":
                continue
            due = self.udp.probe_at(network)
            if due is not None and self._loop.time() < due:
                continue
            tls_stands = None
            if link is not None:
                tls_stands = functools.partial(link.conn.is_answered, PROBE_TIMEOUT_S)
                if not await tls_stands():
                    continue
            attempt = Attempt()
            dial = functools.partial(
                self._endpoint.connect,
                at,
                expected_key=self._gateway_key(),
                timeout_s=PROBE_TIMEOUT_S,
                attempt=attempt,
            )
            await probe(self.udp, at, dial, heard=attempt.heard, tls_stands=tls_stands)

    def _drop_gateway(self, link: PeerLink) -> None:
        if self._gateway is not link:
            return
        self._gateway = None
        if self._endpoint is not None:
            # Nobody else closes it: ``disconnected`` no longer knows whose it was.
            self._endpoint.spawn(link.close(), "close a gateway link")
        error = link.conn.error
        self._gateway_problem = f"the gateway's session ended: {error}" if error else ""
        self._gateway_wanted.set()
        for transfer in list(self._transfers.values()):
            transfer.feed(e.GatewayDown())

    # --- dialing peers

    def dial(self, key: PeerKey, addresses: tuple[str, ...]) -> None:
        """A peer the gateway named, by its full key."""
        if (
            self._endpoint is None
            or key in self._links
            or key in self._dialing
            or key in self._quarantined
            or key == self._endpoint.identity.key
            or len(self._links) >= limits.MAX_CONNECTIONS // 2
            or len(self._dialing) >= TOLD_PEERS
        ):
            return
        task = asyncio.get_running_loop().create_task(
            self._dial(key, addresses), name=f"dial {key[:12]}"
        )
        self._dialing[key] = task
        task.add_done_callback(lambda _done: self._dialing.pop(key, None))

    async def _dial(self, key: PeerKey, addresses: tuple[str, ...]) -> None:
        assert self._endpoint is not None
        for text in addresses[:8]:
            async with self._dial_slots:
                if key in self._links:
                    return
                try:
                    await self._endpoint.connect(
                        _address(text), expected_key=key, timeout_s=DIAL_TIMEOUT_S
                    )
                except EdgeSyncError as exc:
                    logger.debug("peer %s at %s: %s", key[:12], text, exc)
                else:
                    return
        self._left_unanswered(key)

    def told_peer(self, key: PeerKey, address: str) -> None:
        """The gateway's signed list named a peer; it is dialed now if something is wanted, else when it is."""
        known = self._remember(key, address)
        if self.wants_peers():
            self.dial(key, known)

    def _remember(self, key: PeerKey, address: str) -> tuple[str, ...]:
        known = (address, *(other for other in self._told.pop(key, ()) if other != address))[:8]
        self._told[key] = known
        while len(self._told) > TOLD_PEERS:
            del self._told[next(iter(self._told))]
        return known

    def known_peers(self) -> dict[PeerKey, tuple[str, ...]]:
        """Peers that were named or met, and where, the latest last: worth keeping over a restart."""
        return dict(self._told)

    def recall_peers(self, peers: Mapping[PeerKey, tuple[str, ...]]) -> None:
        """What ``known_peers`` said before a restart; dialed when something is wanted."""
        for key, addresses in peers.items():
            for address in reversed(addresses):
                self._remember(key, address)

    async def candidate(self, candidate: Candidate) -> Verdict:
        """MDNS says a peer may be there: dial it and say whether the hint was true."""
        if self._endpoint is None or not self.wants_peers():
            return "unwanted"
        fingerprint = candidate.fingerprint
        if self._endpoint.identity.key.startswith(fingerprint):
            return "unwanted"
        if any(key.startswith(fingerprint) for key in (*self._links, *self._dialing)):
            return "connected"
        if any(key.startswith(fingerprint) for key in self._quarantined):
            return "false"
        for address in candidate.addresses:
            try:
                conn = await self._endpoint.connect(address, timeout_s=DIAL_TIMEOUT_S)
            except (NotAuthorizedError, ProtocolError):
                return "false"
            except TransportError:
                continue
            if conn.peer.key.startswith(fingerprint) and conn.peer.id == candidate.id:
                return "connected"
            await conn.close(ErrorCode.NOT_A_MEMBER, "another machine was announced here")
            return "false"
        return "unreachable"

    # --- sessions (Handler)

    async def connected(self, conn: PeerConnection) -> None:
        key = conn.peer.key
        if key in self._quarantined:
            await conn.close(ErrorCode.NOT_A_MEMBER, "quarantined")
            return
        if reason := self._refuses(conn):
            await conn.close(ErrorCode.BUSY, reason)
            return
        if self._obey_caps is not None:
            self._obey_caps(conn)
        if self._on_versions is not None and any(conn.peer_versions):
            self._on_versions(key, *conn.peer_versions)
        if conn.peer.role == "gateway":
            await self._gateway_connected(conn)
            return
        old = self._links.get(key)
        if old is not None and not old.conn.closed.is_set():
            assert self._endpoint is not None
            keep, drop = surviving(self._endpoint.identity.key, old.conn, conn)
            # A silent session may be a killed process's: its successor at the door must not be sent away for it.
            if drop is conn and old.conn.silent_s < SILENT_S:
                await conn.close(ErrorCode.DUPLICATE, "another session is kept")
                return
            del keep
            await old.conn.close(ErrorCode.DUPLICATE, "another session is kept")
        if old is not None:
            await self._unlink(old)
        link = PeerLink(conn)
        self._links[key] = link
        self._dial_at.pop(key, None)
        if conn.dialed or conn.listen_port:
            host, port = conn.address
            port = port if conn.dialed else conn.listen_port
            self._remember(key, f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        conn.keep_alive = bool(self._transfers)
        for transfer in self._transfers.values():
            self._introduce(link, transfer)
        self._changed.set()

    async def _gateway_connected(self, conn: PeerConnection) -> None:
        if conn.peer.key != self._gateway_key():
            return
        old, self._gateway = self._gateway, PeerLink(conn)
        if old is not None:
            await old.close()
            if (old.conn.carrier, conn.carrier) == ("TLS", "QUIC") and self._endpoint is not None:
                # What was asked there is on its way: asked again it would be paid twice.
                self._endpoint.spawn(_finish(old.conn), "finish what was asked over TLS")
            else:
                await old.conn.close(ErrorCode.DUPLICATE, "a newer session")
        self._gateway_wanted.set()
        self._gateway_problem = ""
        conn.keep_alive = self._needs_gateway
        held = [info.digest for info in self._store.bundles() if info.digest not in self._transfers]
        room = limits.MAX_MANIFESTS_PER_CONNECTION - len(self._transfers)
        for digest in (*self._transfers, *held[: max(0, room)]):
            self._gateway.tell(self._bitfield(digest, durable=True))
        for transfer in list(self._transfers.values()):
            transfer.feed(e.GatewayUp(conn.rtt))
        self._changed.set()

    async def disconnected(self, conn: PeerConnection, error: EdgeSyncError) -> None:
        del error
        self.uploads.forget(conn)
        if self._gateway is not None and self._gateway.conn is conn:
            link = self._gateway
            self._drop_gateway(link)
            await link.close()
            return
        found = self._links.get(conn.peer.key)
        if found is not None and found.conn is conn:
            await self._unlink(found)

    async def _unlink(self, link: PeerLink) -> None:
        if self._links.get(link.key) is link:
            del self._links[link.key]
            for transfer in list(self._transfers.values()):
                transfer.feed(e.PeerLeft(link.key))
        await link.close()

    def _link_of(self, conn: PeerConnection) -> PeerLink | None:
        if self._gateway is not None and self._gateway.conn is conn:
            return self._gateway
        link = self._links.get(conn.peer.key)
        return link if link is not None and link.conn is conn else None

    async def message(self, conn: PeerConnection, message: ControlMessage) -> None:
        """Raises ProtocolError: the peer is dropped."""
        link = self._link_of(conn)
        if link is None:
            return
        match message:
            case Interested():
                self._on_interested(link, Digest(message.manifest.hex()))
            case BitfieldMessage():
                self._on_bitfield(link, message)
            case Have():
                transfer = self._transfers.get(Digest(message.manifest.hex()))
                if transfer is not None:
                    pieces = self._in_range(transfer, message.pieces)
                    transfer.feed(e.PeerHave(link.key, pieces))
            case Lost():
                transfer = self._transfers.get(Digest(message.manifest.hex()))
                if transfer is not None:
                    pieces = self._in_range(transfer, message.pieces)
                    transfer.feed(e.PeerLost(link.key, pieces))
            case Lease():
                self._on_lease(message)
            case Versions():
                if self._on_versions is not None:
                    self._on_versions(link.key, message.root_version, message.timestamp_version)
            case _:
                raise UnexpectedMessageError(f"a {type(message).__name__} came from a peer")

    @staticmethod
    def _in_range(transfer: Transfer, pieces: list[int]) -> tuple[int, ...]:
        if any(piece >= transfer.piece_count for piece in pieces):
            raise MalformedMessageError("a peer named a piece its manifest does not have")
        return tuple(pieces)

    def _on_interested(self, link: PeerLink, digest: Digest) -> None:
        if not link.wants(digest):
            raise LimitExceededError("a peer wants to hear about too many manifests")
        bundle = self._store.get(digest)
        if bundle is not None and self.uploads.readable(link.conn, bundle):
            link.tell(self._bitfield(digest, durable=False))

    def _on_bitfield(self, link: PeerLink, message: BitfieldMessage) -> None:
        digest = Digest(message.manifest.hex())
        transfer = self._transfers.get(digest)
        if transfer is not None:
            self._bits_said(link, transfer, message.bits)

    @staticmethod
    def _bits_said(link: PeerLink, transfer: Transfer, bits: bytes) -> None:
        mask = mask_from_bits(bits, transfer.piece_count)
        transfer.feed(e.PeerBitfield(link.key, mask))

    def _on_lease(self, lease: Lease) -> None:
        transfer = self._transfers.get(Digest(lease.manifest.hex()))
        if transfer is None:
            return
        keys = [PeerKey(source.key.hex()) for source in lease.sources]

        def source(position: int) -> PeerKey:
            if position < 0:
                return e.GATEWAY
            if position >= len(keys):
                raise MalformedMessageError("a lease names a source it does not list")
            return keys[position]

        grants = tuple(
            e.LeasedPiece(grant.piece, source(grant.primary), source(grant.backup))
            for grant in lease.grants
            if grant.piece < transfer.piece_count
        )
        sources = tuple(
            e.SourceAddress(key, tuple(address.addresses))
            for key, address in zip(keys, lease.sources, strict=True)
        )
        transfer.feed(
            e.LeaseReceived(
                grants,
                sources,
                lease.deadline_ms / 1000,
                lease.retry_after_ms / 1000,
                printable(lease.reason) if isinstance(lease.reason, str) else "",
            )
        )

    def _bitfield(self, digest: Digest, *, durable: bool) -> BitfieldMessage:
        bundle = self._store.get(digest)
        assert bundle is not None
        bits = bundle.durable if durable else bundle.have
        return BitfieldMessage(
            manifest=bytes.fromhex(digest),
            bits=bits.to_bytes(),
            epoch=bundle.epoch,
            durable=durable,
        )

    # --- questions (Handler)

    def serve(self, conn: PeerConnection, request: Request) -> AsyncIterator[PieceAnswer]:
        return self.uploads.serve(conn, request)

    async def serve_fetch(self, conn: PeerConnection | None, name: str) -> bytes | None:
        if conn is None:
            return None
        data = self._metadata(name)
        match = _BLOB.match(name)
        if data is None and match is not None:
            with contextlib.suppress(NotFoundError):
                digest = Digest(match[1])
                if self._store.get(digest) is not None:
                    data = await asyncio.to_thread(self._store.manifest_bytes, digest)
        return data

    async def serve_join(
        self, address: tuple[str, int], join: Join, server_certificate_sha256: bytes
    ) -> Joined | JoinRefused:
        del address, join, server_certificate_sha256
        return JoinRefused(reason="rejected", text="a device takes no joins")

    # --- what transfers need (Neighbourhood)

    def source(self, key: PeerKey) -> PeerConnection | None:
        link = self._gateway if key == e.GATEWAY else self._links.get(key)
        return None if link is None else link.conn

    def announce(self, digest: Digest, pieces: tuple[int, ...]) -> None:
        for link in self._links.values():
            link.tell_have(digest, pieces)

    def report(self, digest: Digest, pieces: tuple[int, ...], origin: PeerKey | None) -> None:
        if self._gateway is None:
            return
        sources = [] if origin is None else [bytes.fromhex(origin)]
        for first in range(0, len(pieces), 4096):
            self._gateway.tell(
                Have(
                    manifest=bytes.fromhex(digest),
                    pieces=list(pieces[first : first + 4096]),
                    durable=True,
                    fetched_from=sources,
                )
            )

    def ask_lease(self, digest: Digest, count: int, unavailable: tuple[int, ...]) -> None:
        if self._gateway is not None:
            self._gateway.tell(
                LeaseRequest(
                    manifest=bytes.fromhex(digest), count=count, unavailable=list(unavailable)
                )
            )

    def quarantine(self, key: PeerKey) -> None:
        self._quarantined[key] = None
        while len(self._quarantined) > 4 * limits.MAX_CONNECTIONS:
            del self._quarantined[next(iter(self._quarantined))]
        link = self._links.get(key)
        if link is not None:
            self._spawn_close(link)

    def _spawn_close(self, link: PeerLink) -> None:
        assert self._endpoint is not None
        self._endpoint.spawn(
            link.conn.close(ErrorCode.NOT_A_MEMBER, "quarantined"), "close a quarantined peer"
        )

    def rejected(self, key: PeerKey) -> None:
        if key == e.GATEWAY:
            key = self._gateway_key()
        if key in self._rejected or len(self._rejected) < 4 * limits.MAX_CONNECTIONS:
            self._rejected[key] = self._rejected.get(key, 0) + 1

    def rejected_by_peer(self) -> dict[PeerKey, int]:
        """Pieces and files each key sent that were not what they claimed to be."""
        return dict(self._rejected)

    def lost(self, digest: Digest, piece: int) -> None:
        """The store found a piece it no longer holds: stop offering it, fetch it where it is wanted. Any thread."""
        self._loop.call_soon_threadsafe(self._on_lost, digest, piece)

    def _on_lost(self, digest: Digest, piece: int) -> None:
        self.uploads.drop(digest, piece)
        message = Lost(manifest=bytes.fromhex(digest), pieces=[piece])
        for link in self._links.values():
            if digest in link.they_want:
                link.tell(message)
        if self._gateway is not None:
            self._gateway.tell(message)
        transfer = self._transfers.get(digest)
        if transfer is not None:
            transfer.feed(e.PieceDropped(piece))


def _address(text: str) -> tuple[str, int]:
    """``host:port`` or ``[v6]:port`` as a peer's list says it. Raises PeerUnreachableError."""
    try:
        parsed = parse_host_port(text, default_port=DEFAULT_PORT)
    except ValueError as exc:
        raise PeerUnreachableError(f"{text[:100]!a} is no address") from exc
    return parsed.host, parsed.port


async def _finish(conn: PeerConnection) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(FINISH_S):
            await conn.answered()
    await conn.close(ErrorCode.DUPLICATE, "a newer session")
