"""One endpoint of one machine: dials and accepts by QUIC on one UDP port, and knows who is at the other end.

Where UDP does not get through it dials over TLS when told to; a gateway takes that on the TCP port of the same number.

It joins the switchboard (datagrams), the session (who may say what) and the handler (what is done about it). It decides
nothing about pieces. Every task it starts ends before ``close`` returns. Event loop only.
"""

import asyncio
import contextlib
import errno
import functools
import hashlib
import logging
import os
import random
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Final, Self

from edgesync import identity as identities
from edgesync import limits
from edgesync.errors import (
    EdgeSyncError,
    ErrorCode,
    NotAuthorizedError,
    PeerBusyError,
    PeerTimeoutError,
    PeerUnreachableError,
    TransportError,
    UnexpectedMessageError,
    VersionMismatchError,
)
from edgesync.identity import Identity
from edgesync.ids import PeerIdentity, PeerKey, Role
from edgesync.io.proxy import ProxySettings
from edgesync.io.proxy import connect as connect_tcp
from edgesync.peer import session as sessions
from edgesync.peer.session import Judge, LocalPeer, Session, Side, code_of
from edgesync.transport.connection import (
    Handler,
    JoinConnection,
    PeerConnection,
    PieceAnswer,
    answer_join,
    answer_joined_fetch,
    surviving,
)
from edgesync.transport.engine import transport_warnings
from edgesync.transport.flow import Budget
from edgesync.transport.link import Link
from edgesync.transport.patience import silence_s, stranger_s
from edgesync.transport.quic import (
    DEFAULT_CONTROLLER,
    client_configuration,
    server_configuration,
)
from edgesync.transport.streams import Carrier, LinkOwner, Stream
from edgesync.transport.switchboard import Switchboard
from edgesync.transport.tcp_door import TcpDoor
from edgesync.transport.tls_link import TlsLink
from edgesync.transport.tls_pipe import client_context as tls_client_context
from edgesync.transport.tls_pipe import let_go
from edgesync.transport.tls_pipe import server_context as tls_server_context
from edgesync.transport.udp import Address, for_family, plain
from edgesync.wire import codec
from edgesync.wire.messages import ALPN, ALPN_JOIN

log = logging.getLogger(__name__)

KEEP_ALIVE_S: Final = 2.0
"""Where something is wanted, a silence of half of this is answered with a ping."""
DEAD_AFTER_S: Final = 8.0
"""Where something is wanted, a peer that answers no ping for this long is gone; on a long path later (``patience``)."""
BUSY_RETRY_MS: Final = 5_000
JOIN_LIFETIME_S: Final = 60.0
PORT_ATTEMPTS: Final = 8
"""Where any port will do, it must be free for UDP and TCP."""
EVICT_LOOK_S: Final = 1.0
"""A stranger with a long path is looked at so often: more at the door end its respite."""
_BASE_SHARE: Final = 0.75
"""Part of the budget that base windows may take, so that answers always find some."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointConfig:
    role: Role = "device"
    agent: str = ""
    """Name and version told to peers."""
    max_connections: int = limits.MAX_CONNECTIONS
    max_unproven: int = limits.MAX_UNPROVEN_CONNECTIONS
    max_unproven_per_address: int = limits.MAX_UNPROVEN_PER_ADDRESS
    max_connections_per_key: int = limits.MAX_CONNECTIONS_PER_KEY
    idle_timeout_s: float = limits.QUIC_IDLE_TIMEOUT_S
    budget_bytes: int = limits.REASSEMBLY_BUDGET_BYTES
    accept_joins: bool = False
    """Offer ``edgesync-join/1`` (a gateway)."""
    congestion: str = DEFAULT_CONTROLLER
    """What decides how fast this side sends: one of ``controller_names.SETTINGS``."""
    background: bool = False
    """Ask peers to leave room to other traffic in what they send here."""
    tcp: bool = False
    """Take the same protocols over TLS on the TCP port of the same number (a gateway)."""
    proxy: ProxySettings = field(default_factory=ProxySettings)
    """By which HTTP proxy TLS goes out."""
    announce_port: bool = True
    """Tell servers the port others may dial this machine at."""
    versions: Callable[[], tuple[int, int]] = lambda: (0, 0)
    """Root and timestamp versions held now."""

    def base_window(self) -> int:
        """What a member may send unasked, so that all of them together fit the budget."""
        whole = (1 + limits.MAX_REQUESTS_PER_CONNECTION) * limits.MEMBER_STREAM_WINDOW_BYTES
        share = int(self.budget_bytes * _BASE_SHARE) // max(1, self.max_connections)
        return max(limits.UNPROVEN_WINDOW_BYTES, min(whole, share))


class Attempt:
    """What a dial by QUIC has come to, for who may try another way meanwhile."""

    def __init__(self) -> None:
        self._began = 0.0
        self._link: Carrier | None = None

    def watch(self, link: Carrier) -> None:
        self._began = link.last_received
        self._link = link

    def heard(self) -> bool:
        """Whether anything came from there."""
        return self._link is not None and self._link.last_received > self._began


@dataclass(frozen=True, slots=True)
class EndpointStats:
    connections: int
    unproven: int
    refused: int
    retried: int
    datagrams_in: int
    datagrams_out: int
    bytes_in: int
    bytes_out: int
    budget_used: int


class Endpoint:
    """See ``open``."""

    def __init__(
        self,
        *,
        host: str,
        port: int,
        identity: Identity,
        judge: Judge,
        handler: Handler,
        config: EndpointConfig,
    ) -> None:
        if identity.certificate is None:
            identity = identities.self_signed(identity, identity.name or "unnamed")
        self.config = config
        self.identity = identity
        self.handler = handler
        self.budget = Budget(config.budget_bytes)
        self.certificate = identity.certificate_der
        self.certificate_sha256 = hashlib.sha256(self.certificate).digest()
        self._judge = judge
        self._connections: dict[PeerConnection, Carrier] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._links: dict[Carrier, None] = {}
        self._closing = False
        self._loop = asyncio.get_running_loop()
        assert identity.certificate is not None
        self.tcp_door: TcpDoor | None = None
        self.switchboard = self._bind(host, port)
        self._keeper = self.spawn(self._keep_alive(), "keep-alive")

    @classmethod
    async def open(
        cls,
        *,
        host: str,
        port: int,
        identity: Identity,
        judge: Judge,
        handler: Handler,
        config: EndpointConfig | None = None,
    ) -> Self:
        """Bind and serve. Host "" is every address; port 0 picks one.

        ``judge`` says whose certificate (DER) a peer shows, at each handshake and at ``rejudge``; it raises
        NotAuthorizedError. Raises OSError: the address is taken or not ours.
        """
        return cls(
            host=host,
            port=port,
            identity=identity,
            judge=judge,
            handler=handler,
            config=config or EndpointConfig(),
        )

    def _bind(self, host: str, port: int) -> Switchboard:
        """UDP and, where TCP is offered, the same port of both. Raises OSError."""
        config = self.config
        assert self.identity.certificate is not None
        for attempt in range(PORT_ATTEMPTS):
            switchboard = Switchboard(
                host,
                port,
                server=server_configuration(
                    certificate=self.identity.certificate,
                    private_key=self.identity.private_key,
                    idle_timeout_s=config.idle_timeout_s,
                    joins=config.accept_joins,
                ),
                doorman=self,
                budget=self.budget,
                max_unproven=config.max_unproven,
                max_unproven_per_address=config.max_unproven_per_address,
                congestion=config.congestion,
            )
            if not config.tcp:
                break
            try:
                listener = switchboard.socket.listen_beside()
            except OSError as exc:
                switchboard.close()
                if port or exc.errno != errno.EADDRINUSE or attempt == PORT_ATTEMPTS - 1:
                    raise OSError(exc.errno, f"{exc.strerror} (TCP port {port})") from exc
                continue
            protocols = (ALPN, ALPN_JOIN) if config.accept_joins else (ALPN,)
            self.tcp_door = TcpDoor(
                listener,
                context=tls_server_context(self.identity, list(protocols)),
                protocols=protocols,
                new_owner=self.new_owner,
                accepted=self.accepted,
                budget=self.budget,
                idle_timeout_s=config.idle_timeout_s,
                max_unproven=config.max_unproven,
                max_unproven_per_address=config.max_unproven_per_address,
            )
            break
        return switchboard

    @property
    def port(self) -> int:
        return int(self.switchboard.socket.address[1])

    @property
    def connections(self) -> tuple[PeerConnection, ...]:
        return tuple(self._connections)

    def stats(self) -> EndpointStats:
        socket = self.switchboard.socket
        return EndpointStats(
            connections=len(self._connections),
            unproven=self.strangers,
            refused=self.switchboard.refused + (self.tcp_door.refused if self.tcp_door else 0),
            retried=self.switchboard.retried,
            datagrams_in=socket.datagrams_in,
            datagrams_out=socket.datagrams_out,
            bytes_in=socket.bytes_in,
            bytes_out=socket.bytes_out,
            budget_used=self.budget.used,
        )

    def warnings(self) -> list[str]:
        """What slows this endpoint and the operator could mend, one sentence each."""
        return [*transport_warnings(), *self.switchboard.socket.warnings()]

    # --- dialing

    async def connect(
        self,
        address: tuple[str, int],
        *,
        expected_key: PeerKey | None = None,
        timeout_s: float = 5.0,
        over_tls: bool = False,
        attempt: Attempt | None = None,
    ) -> PeerConnection:
        """A session with the member at ``address``; ``connected`` was told when this returns.

        ``timeout_s`` is how long nothing may come from there, longer on a path with long round trips; all together may
        take MAX_HANDSHAKE_S. ``attempt`` tells whether anything came by QUIC. The server's certificate must pass the
        judge, and be of ``expected_key`` where one is given. A server with too many strangers from here is asked again
        with jitter. Raises PeerUnreachableError, PeerTimeoutError, PeerBusyError, NotAuthorizedError, ProtocolError.
        """
        dial = await self._dial(
            address,
            ALPN,
            timeout_s,
            lambda: _Dialer(self, expected_key=expected_key),
            over_tls=over_tls,
            attempt=attempt,
        )
        assert isinstance(dial, _Dialer)
        assert dial.connection is not None
        return dial.connection

    async def join(
        self,
        address: tuple[str, int],
        *,
        expected_key: PeerKey,
        timeout_s: float = 5.0,
        over_tls: bool = False,
        attempt: Attempt | None = None,
    ) -> JoinConnection:
        """A connection to ask a gateway of ``expected_key`` for membership. Raises as ``connect``."""
        dial = await self._dial(
            address,
            ALPN_JOIN,
            timeout_s,
            lambda: _Joiner(self, expected_key),
            over_tls=over_tls,
            attempt=attempt,
        )
        assert isinstance(dial, _Joiner)
        assert dial.connection is not None
        return dial.connection

    async def _dial(
        self,
        address: tuple[str, int],
        alpn: str,
        timeout_s: float,
        make: "Callable[[], _Dialer | _Joiner]",
        *,
        over_tls: bool,
        attempt: Attempt | None,
    ) -> "_Dialer | _Joiner":
        deadline = self._loop.time() + timeout_s
        if self._closing:
            raise TransportError("this endpoint is closed")
        if over_tls:
            begin = functools.partial(self._begin_tls, alpn, address, deadline)
        else:
            resolved = await self._resolve(address, timeout_s)
            begin = functools.partial(self._begin_quic, alpn, resolved, attempt or Attempt())
        pause = 0.05
        while True:
            dialer = make()
            try:
                await self._dial_once(begin, dialer, timeout_s)
            except PeerBusyError as exc:
                # Full of strangers is over in moments; a member that says BUSY names its own time.
                wait = random.uniform(pause / 2, pause * 1.5)  # noqa: S311 - jitter, not a secret
                if not dialer.refused_unheard or self._loop.time() + wait >= deadline:
                    raise
                log.debug("%s refuses strangers now: %s", address, exc)
                await asyncio.sleep(wait)
                pause = min(1.0, pause * 2)
            else:
                return dialer

    async def _dial_once(
        self,
        begin: "Callable[[_Dialer | _Joiner], Awaitable[Carrier]]",
        dialer: "_Dialer | _Joiner",
        timeout_s: float,
    ) -> None:
        link = await begin(dialer)
        self._links[link] = None
        try:
            await self._answered(link, dialer.ready, timeout_s)
        except TimeoutError:
            dialer.ready.cancel()  # nobody waits for it any more: what closing says to it would be reported as lost
            error = PeerTimeoutError(f"no session with {plain(link.address)[0]} in time")
            link.close(ErrorCode.TIMEOUT, error=error)
            raise error from None
        except BaseException:
            dialer.ready.cancel()
            link.close(ErrorCode.GOING_AWAY)
            raise
        finally:
            if isinstance(link, Link):
                self.switchboard.dialed(link)

    async def _answered(
        self, link: Carrier, ready: "asyncio.Future[None]", timeout_s: float
    ) -> None:
        """Wait as long as the other side speaks. Raises TimeoutError; EdgeSyncError: what the dial ran into."""
        latest = self._loop.time() + max(timeout_s, limits.MAX_HANDSHAKE_S)
        while not ready.done():
            rtt_s = link.smoothed_rtt() if link.error is None else 0.0
            until = min(latest, link.last_received + silence_s(timeout_s, rtt_s))
            left = until - self._loop.time()
            if left <= 0:
                raise TimeoutError
            await asyncio.wait({ready}, timeout=left)
        ready.result()

    async def _begin_quic(
        self, alpn: str, address: Address, attempt: Attempt, dialer: "_Dialer | _Joiner"
    ) -> Carrier:
        configuration = client_configuration(alpn=alpn, idle_timeout_s=self.config.idle_timeout_s)
        link = self.switchboard.dial(configuration, address, dialer)
        attempt.watch(link)
        return link

    async def _begin_tls(
        self, alpn: str, address: tuple[str, int], deadline: float, dialer: "_Dialer | _Joiner"
    ) -> Carrier:
        host, port = address
        proxy = self.config.proxy.towards(host)
        left = deadline - self._loop.time()
        try:
            sock, where = await connect_tcp(proxy, host, port, timeout_s=left)
        except PeerBusyError:
            dialer.refused_unheard = True
            raise
        if self._closing or not self.budget.reserve(limits.UNPROVEN_WINDOW_BYTES):
            sock.close()
            raise PeerBusyError("this machine has no room for another connection", retry_after_s=1)
        return TlsLink(
            sock,
            tls_client_context(alpn),
            dialer,
            address=where,
            dialed=True,
            budget=self.budget,
            idle_timeout_s=self.config.idle_timeout_s,
            door=set(),
            protocols=(alpn,),
            proxy=str(proxy or ""),
        )

    async def _resolve(self, address: tuple[str, int], timeout_s: float) -> Address:
        host, port = address
        try:
            async with asyncio.timeout(timeout_s):
                found = await self._loop.getaddrinfo(host, port, type=2)
        except (OSError, UnicodeError) as exc:
            raise PeerUnreachableError(f"{host} cannot be resolved") from exc
        except TimeoutError as exc:
            raise PeerTimeoutError(f"{host} was not resolved in time") from exc
        for _, _, _, _, candidate in found:
            usable = for_family(candidate, self.switchboard.socket.family)
            if usable is not None:
                return usable
        raise PeerUnreachableError(f"{host} has no address this machine's socket can reach")

    # --- accepting (Doorman)

    def new_owner(self) -> LinkOwner:
        return _Acceptor(self)

    def accepted(self, link: Carrier) -> None:
        self._links[link] = None
        self._loop.call_later(
            limits.UNPROVEN_TIMEOUT_S, self._evict_unproven, link, self._loop.time()
        )

    def _evict_unproven(self, link: Carrier, since: float) -> None:
        if link.error is not None or not link.unproven:
            return
        crowded = self.strangers >= min(limits.RETRY_FROM_UNPROVEN, self.config.max_unproven)
        left = since + stranger_s(link.smoothed_rtt(), crowded=crowded) - self._loop.time()
        if left > 0:
            self._loop.call_later(min(left, EVICT_LOOK_S), self._evict_unproven, link, since)
            return
        link.close(
            ErrorCode.TIMEOUT,
            error=PeerTimeoutError("a stranger did not prove who it is in time"),
        )

    @property
    def strangers(self) -> int:
        """Connections at the door of which nobody knows who they are."""
        return self.switchboard.unproven + (self.tcp_door.unproven if self.tcp_door else 0)

    @property
    def full(self) -> bool:
        return len(self._connections) >= self.config.max_connections

    # --- sessions

    def local(self) -> LocalPeer:
        root, timestamp = self.config.versions()
        return LocalPeer(
            role=self.config.role,
            certificate=self.certificate,
            signer=self.identity,
            judge=self._judge,
            agent=self.config.agent,
            listen_port=self.port if self.config.announce_port else 0,
            root_version=root,
            timestamp_version=timestamp,
            background=self.config.background,
        )

    def judge_server(self, der: bytes, expected_key: PeerKey | None) -> PeerIdentity:
        """Raises NotAuthorizedError."""
        check_key(der, expected_key)
        return self._judge(der)

    def admit(self, link: Carrier, connection: PeerConnection) -> None:
        """A proven peer becomes a connection. Raises PeerBusyError: no room."""
        if self.full:
            raise PeerBusyError(
                "this machine has as many connections as it takes",
                retry_after_s=BUSY_RETRY_MS / 1000,
            )
        window = self.config.base_window()
        if not self.budget.reserve(window - link.base_window):
            raise PeerBusyError("this machine has no room for another peer", retry_after_s=1.0)
        link.set_base_window(window)
        link.allow_streams(limits.MAX_REQUESTS_PER_CONNECTION)
        link.proven()
        same = [c for c in self._connections if c.peer.key == connection.peer.key]
        self._connections[connection] = link
        for extra in same[: max(0, len(same) + 1 - self.config.max_connections_per_key)]:
            self._connections[extra].close(ErrorCode.DUPLICATE, "too many sessions of one member")

    async def introduce(self, connection: PeerConnection) -> None:
        """Tell the handler, then let the peer's messages through."""
        await self.handler.connected(connection)
        connection.start()

    def lost(self, link: Carrier, connection: PeerConnection | None, error: EdgeSyncError) -> None:
        self._links.pop(link, None)
        if connection is None:
            return
        known = self._connections.pop(connection, None) is not None
        for task in connection.lost(error):
            task.cancel()
        if known:
            self.spawn(self._tell_lost(connection, error), "disconnected")

    async def _tell_lost(self, connection: PeerConnection, error: EdgeSyncError) -> None:
        try:
            await self.handler.disconnected(connection, error)
        except Exception:
            log.exception("the end of %r could not be handled", connection)

    async def rejudge(self) -> None:
        """After a change of trust: sessions whose certificate no longer passes are closed as REVOKED."""
        for count, (connection, link) in enumerate(tuple(self._connections.items())):
            try:
                self._judge(connection.certificate)
            except NotAuthorizedError as exc:
                link.close(ErrorCode.REVOKED, "no longer a member", error=exc)
            if count % 16 == 15:
                await asyncio.sleep(0)

    # --- housekeeping

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> "asyncio.Task[None]":
        task = self._loop.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("task %s failed", task.get_name(), exc_info=error)

    async def _keep_alive(self) -> None:
        """Ping only where something is wanted; an idle session ends by itself, a dead one is not waited for.

        A peer that was killed leaves a session that looks open: nothing comes, and what is sent is lost.
        """
        wanted_since: dict[PeerConnection, float] = {}
        roams = self.switchboard.socket.is_wildcard
        while True:
            await asyncio.sleep(KEEP_ALIVE_S / 2)
            now = self._loop.time()
            wanted = {c: link for c, link in self._connections.items() if c.wanted}
            wanted_since = {c: wanted_since.get(c, now) for c in wanted}
            for connection, link in wanted.items():
                if roams and isinstance(link, Link):
                    link.check_source()
                silent = now - max(link.last_received, wanted_since[connection])
                if silent >= silence_s(DEAD_AFTER_S, link.smoothed_rtt()):
                    link.close(
                        ErrorCode.TIMEOUT,
                        error=PeerTimeoutError(f"nothing came for {silent:.0f} s"),
                    )
                elif now - link.last_received >= KEEP_ALIVE_S / 2:
                    link.ping()

    async def close(self) -> None:
        """Tell every peer, end every task, release the port. May be repeated."""
        self._closing = True
        self.switchboard.accepting = False
        if self.tcp_door is not None:
            self.tcp_door.close()
        for link in tuple(self._links):
            link.close(ErrorCode.GOING_AWAY, error=TransportError("this machine is shutting down"))
        # What ``lost`` started (telling the handler) may finish; everything else is cancelled.
        telling = [task for task in self._tasks if task.get_name() == "disconnected"]
        for task in tuple(self._tasks):
            if task not in telling and task is not asyncio.current_task():
                task.cancel()
        pending = [task for task in self._tasks if task is not asyncio.current_task()]
        await asyncio.gather(*pending, return_exceptions=True)
        self.switchboard.close()
        await let_go()


def check_key(der: bytes, expected_key: PeerKey | None) -> None:
    """Raises NotAuthorizedError: the certificate is of another key."""
    if expected_key is not None and identities.certificate_key(der) != expected_key:
        raise NotAuthorizedError("another machine than the expected one answers at that address")


class _Owner:
    """Parts every kind of link owner shares."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.peer_connection: PeerConnection | None = None
        self.work: asyncio.Task[None] | None = None

    def link_closed(self, link: Carrier, error: EdgeSyncError) -> None:
        if self.work is not None and self.work is not _current_task():
            self.work.cancel()
        self.endpoint.lost(link, self.peer_connection, error)

    async def run_session(self, link: Carrier, session: Session, control: Stream) -> PeerConnection:
        """The control stream up to the moment both sides know each other."""
        connection = PeerConnection(link, session, self.endpoint, self.endpoint.handler, control)
        effects = session.start() if session.side is Side.CLIENT else []
        while True:
            for effect in effects:
                if isinstance(effect, sessions.Send):
                    control.write(codec.encode(effect.message))
                elif isinstance(effect, sessions.Abort):
                    if session.side is Side.SERVER:
                        await _flush(control)
                    link.close(effect.code, str(effect.error), error=effect.error)
                    raise effect.error
                elif isinstance(effect, sessions.Established):
                    connection.established(effect)
                    self.endpoint.admit(link, connection)
                    self.peer_connection = connection
                    return connection
            message = await control.read_frame(limits.UNPROVEN_WINDOW_BYTES // 2)
            if message is None:
                raise UnexpectedMessageError("the peer ended the session before it began")
            effects = session.handle(message)


async def _flush(stream: Stream) -> None:
    """Let a last message leave before the connection closes; a peer that does not take it is not waited for."""
    with contextlib.suppress(EdgeSyncError):
        await stream.drain(low_water=0, stall_s=1.0)


def _current_task() -> "asyncio.Task[Any] | None":
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


class _Dialer(_Owner):
    def __init__(self, endpoint: Endpoint, *, expected_key: PeerKey | None) -> None:
        super().__init__(endpoint)
        self.expected_key = expected_key
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.connection: PeerConnection | None = None
        self.refused_unheard = False

    def handshake_done(self, link: Carrier, alpn: str) -> None:
        """Judge the server before a byte of ours goes to it beyond TLS."""
        der = link.peer_certificate()
        try:
            if alpn != ALPN or der is None:
                raise VersionMismatchError("the server speaks another protocol")
            server = self.endpoint.judge_server(der, self.expected_key)
        except EdgeSyncError as exc:
            link.close(code_of(exc), str(exc), error=exc)
            return
        self.work = self.endpoint.spawn(self._run(link, der, server), f"dial {link!r}")

    async def _run(self, link: Carrier, der: bytes, server: PeerIdentity) -> None:
        session = Session(
            side=Side.CLIENT,
            me=self.endpoint.local(),
            server_certificate=der,
            started_at=asyncio.get_running_loop().time(),
            server_peer=server,
        )
        try:
            connection = await self.run_session(link, session, link.open_stream())
            await self.endpoint.introduce(connection)
        except EdgeSyncError as exc:
            link.close(code_of(exc), str(exc), error=exc)
            self._settle(exc)
            return
        self.connection = connection
        self._settle(None)

    def _settle(self, error: EdgeSyncError | None) -> None:
        if self.ready.done():
            return
        if error is None:
            self.ready.set_result(None)
        else:
            self.ready.set_exception(error)

    def stream_opened(self, link: Carrier, stream: Stream) -> None:
        if self.peer_connection is None:
            link.close(ErrorCode.UNEXPECTED, "a stream before WELCOME")
            return
        self.peer_connection.stream_opened(stream)

    def link_closed(self, link: Carrier, error: EdgeSyncError) -> None:
        self.refused_unheard = not link.handshake_complete
        super().link_closed(link, error)
        self._settle(error)


class _Joiner(_Owner):
    def __init__(self, endpoint: Endpoint, expected_key: PeerKey) -> None:
        super().__init__(endpoint)
        self.expected_key = expected_key
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.connection: JoinConnection | None = None
        self.refused_unheard = False

    def handshake_done(self, link: Carrier, alpn: str) -> None:
        der = link.peer_certificate()
        try:
            if alpn != ALPN_JOIN or der is None:
                raise VersionMismatchError("the server takes no joins")
            check_key(der, self.expected_key)
        except EdgeSyncError as exc:
            link.close(code_of(exc), str(exc), error=exc)
            return
        self.connection = JoinConnection(link, der)
        if not self.ready.done():
            self.ready.set_result(None)

    def stream_opened(self, link: Carrier, stream: Stream) -> None:
        del stream
        link.close(ErrorCode.UNEXPECTED, "a gateway opens no streams to a stranger")

    def link_closed(self, link: Carrier, error: EdgeSyncError) -> None:
        self.refused_unheard = not link.handshake_complete
        super().link_closed(link, error)
        if not self.ready.done():
            self.ready.set_exception(error)


class _Acceptor(_Owner):
    """A link somebody dialed to us: a member's session, or a stranger that wants to join."""

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(endpoint)
        self.joining = False
        self.joined = False
        self.started = False

    def handshake_done(self, link: Carrier, alpn: str) -> None:
        del link
        self.joining = alpn == ALPN_JOIN

    def stream_opened(self, link: Carrier, stream: Stream) -> None:
        if self.peer_connection is not None:
            self.peer_connection.stream_opened(stream)
        elif self.joined:
            self.endpoint.spawn(self._joined_fetch(link, stream), f"join fetch {link!r}")
        elif self.started or not link.handshake_complete:
            link.close(ErrorCode.UNEXPECTED, "one stream before the proof")
        else:
            self.started = True
            work = self._join(link, stream) if self.joining else self._session(link, stream)
            self.work = self.endpoint.spawn(work, f"accept {link!r}")

    async def _session(self, link: Carrier, control: Stream) -> None:
        endpoint = self.endpoint
        session = Session(
            side=Side.SERVER,
            me=endpoint.local(),
            server_certificate=endpoint.certificate,
            started_at=asyncio.get_running_loop().time(),
            nonce=os.urandom(32),
            busy_ms=BUSY_RETRY_MS if endpoint.full else 0,
            observed_address=_written(link.address),
        )
        try:
            connection = await self.run_session(link, session, control)
            await endpoint.introduce(connection)
        except EdgeSyncError as exc:
            link.close(code_of(exc), str(exc), error=exc)

    async def _join(self, link: Carrier, stream: Stream) -> None:
        endpoint = self.endpoint
        try:
            fetching = await answer_join(
                link, stream, endpoint.handler, endpoint.certificate_sha256
            )
        except EdgeSyncError as exc:
            link.close(code_of(exc), str(exc), error=exc)
            return
        except Exception:
            log.exception("a join could not be answered")
            link.close(ErrorCode.INTERNAL)
            return
        finally:
            link.forget(stream)
        if not fetching:
            link.close(ErrorCode.OK)
            return
        self.joined = True
        link.proven()
        link.allow_streams(1)
        asyncio.get_running_loop().call_later(JOIN_LIFETIME_S, link.close, ErrorCode.TIMEOUT)

    async def _joined_fetch(self, link: Carrier, stream: Stream) -> None:
        try:
            await answer_joined_fetch(stream, self.endpoint.handler)
        except EdgeSyncError as exc:
            link.close(code_of(exc), str(exc), error=exc)
        finally:
            link.forget(stream)


def _written(address: Address) -> str:
    host, port = plain(address)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


__all__ = [
    "Attempt",
    "Endpoint",
    "EndpointConfig",
    "EndpointStats",
    "Handler",
    "JoinConnection",
    "PeerConnection",
    "PieceAnswer",
    "surviving",
]
