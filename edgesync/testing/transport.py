"""A fleet of endpoints on loopback for tests: members of one region, a gateway, strangers."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Self

from edgesync import identity as identities
from edgesync.errors import EdgeSyncError, NotAuthorizedError
from edgesync.identity import CertificateAuthority, Identity
from edgesync.ids import PeerIdentity, PeerKey, PieceId
from edgesync.transport.endpoint import Endpoint, EndpointConfig, PeerConnection, PieceAnswer
from edgesync.wire.messages import ControlMessage, Join, Joined, JoinRefused, Request


class PieceShelf(dict[PieceId, bytes]):
    def put(self, data: bytes) -> PieceId:
        piece = PieceId(hashlib.sha256(data).digest())
        self[piece] = data
        return piece


class TestHandler:
    """Serves a shelf and named blobs, and keeps what it is told in queues."""

    __test__ = False

    def __init__(self) -> None:
        self.shelf = PieceShelf()
        self.blobs: dict[str, bytes] = {}
        self.joins: Callable[[Join], Joined | JoinRefused] = lambda _: JoinRefused(
            reason="unknown_token"
        )
        self.connections: asyncio.Queue[PeerConnection] = asyncio.Queue()
        self.messages: asyncio.Queue[ControlMessage] = asyncio.Queue()
        self.ends: asyncio.Queue[EdgeSyncError] = asyncio.Queue()

    async def connected(self, conn: PeerConnection) -> None:
        self.connections.put_nowait(conn)

    async def disconnected(self, conn: PeerConnection, error: EdgeSyncError) -> None:
        del conn
        self.ends.put_nowait(error)

    async def message(self, conn: PeerConnection, message: ControlMessage) -> None:
        del conn
        self.messages.put_nowait(message)

    async def serve(self, conn: PeerConnection, request: Request) -> AsyncIterator[PieceAnswer]:
        del conn
        for raw in request.pieces:
            piece = PieceId(raw)
            data = self.shelf.get(piece)
            if data is None:
                yield PieceAnswer(piece, missing="not_held")
            else:
                yield PieceAnswer(piece, "identity", data)

    async def serve_fetch(self, conn: PeerConnection | None, name: str) -> bytes | None:
        del conn
        return self.blobs.get(name)

    async def serve_join(
        self, address: tuple[str, int], join: Join, server_certificate_sha256: bytes
    ) -> Joined | JoinRefused:
        del address, server_certificate_sha256
        return self.joins(join)

    async def next_connection(self) -> PeerConnection:
        return await asyncio.wait_for(self.connections.get(), 10)

    async def next_message(self) -> ControlMessage:
        return await asyncio.wait_for(self.messages.get(), 10)

    async def next_end(self) -> EdgeSyncError:
        return await asyncio.wait_for(self.ends.get(), 45)


class TestPeer:
    __test__ = False

    def __init__(
        self,
        identity: Identity,
        endpoint: Endpoint,
        handler: TestHandler,
        *,
        over_tls: bool = False,
    ) -> None:
        self.over_tls = over_tls
        self.identity = identity
        self.endpoint = endpoint
        self.handler = handler
        self.shelf = handler.shelf

    @property
    def address(self) -> tuple[str, int]:
        return ("127.0.0.1", self.endpoint.port)

    async def connect(self, other: "TestPeer", *, timeout_s: float = 5.0) -> PeerConnection:
        return await self.endpoint.connect(
            other.address,
            expected_key=other.identity.key,
            timeout_s=timeout_s,
            over_tls=self.over_tls,
        )


class TestFleet:
    """Context manager; closes every endpoint it opened. ``banned`` keys fail the judge from then on."""

    __test__ = False

    def __init__(self, *, over_tls: bool = False) -> None:
        """``over_tls``: every machine listens on TCP too, and dials there."""
        self.over_tls = over_tls
        self.authority = CertificateAuthority.create("region")
        self.gateways: dict[PeerKey, str] = {}
        self.banned: set[PeerKey] = set()
        self.peers: list[TestPeer] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for peer in self.peers:
            await peer.endpoint.close()

    def judge(self, der: bytes) -> PeerIdentity:
        key = identities.certificate_key(der)
        if key in self.banned:
            raise NotAuthorizedError("banned")
        if key in self.gateways:
            return PeerIdentity("gateway", self.gateways[key], key)
        identities.check_issued(der, self.authority.certificate_der)
        return PeerIdentity("device", identities.certificate_id(der), key)

    def member(self, name: str) -> Identity:
        """An identity with a certificate of the region."""
        identity = Identity.generate(name)
        return identity.with_certificate(self.authority.issue(identity.public_raw, name))

    async def device(self, name: str, config: EndpointConfig | None = None) -> TestPeer:
        return await self._open(self.member(name), config or EndpointConfig())

    async def gateway(self, name: str, config: EndpointConfig | None = None) -> TestPeer:
        identity = Identity.generate(name)
        self.gateways[identity.key] = name
        return await self._open(
            identity, config or EndpointConfig(role="gateway", accept_joins=True)
        )

    async def stranger(self, name: str) -> TestPeer:
        return await self._open(Identity.generate(name), EndpointConfig())

    async def _open(self, identity: Identity, config: EndpointConfig) -> TestPeer:
        handler = TestHandler()
        endpoint = await Endpoint.open(
            host="127.0.0.1",
            port=0,
            identity=identity,
            judge=self.judge,
            handler=handler,
            config=replace(config, tcp=config.tcp or self.over_tls),
        )
        peer = TestPeer(identity, endpoint, handler, over_tls=self.over_tls)
        self.peers.append(peer)
        return peer


async def gathered(answers: AsyncIterator[PieceAnswer]) -> list[PieceAnswer]:
    return [answer async for answer in answers]
