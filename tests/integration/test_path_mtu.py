"""Sizes of datagrams and addresses of real links: narrow interfaces, black holes, a move in mid-transfer."""

import asyncio
import contextlib
import errno
import hashlib
import os
import random
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from edgesync import limits
from edgesync.ids import Digest, PieceId
from edgesync.testing.transport import TestFleet, TestPeer, gathered
from edgesync.transport import link as links
from edgesync.transport import udp
from edgesync.transport.endpoint import PeerConnection
from edgesync.transport.interfaces import Interfaces, Way, source_towards
from edgesync.transport.link import Link
from edgesync.transport.pmtud import BASE_BYTES
from edgesync.transport.quic import BoundedQuicConnection

MANIFEST = Digest("ab" * 32)
PIECE = 256 * 1024


class Narrow:
    """A socket whose path, or whose interface, takes datagrams of at most ``most`` bytes."""

    def __init__(self, sock: socket.socket, most: int, *, tells: bool) -> None:
        self._sock = sock
        self.most = most
        self._tells = tells
        self.swallowed = 0
        self.longest = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def _takes(self, size: int) -> bool:
        if size <= self.most:
            self.longest = max(self.longest, size)
            return True
        if self._tells:
            raise OSError(errno.EMSGSIZE, "Message too long")
        self.swallowed += 1
        return False

    def sendto(self, data: bytes, address: Any) -> int:
        return self._sock.sendto(data, address) if self._takes(len(data)) else len(data)

    def sendmsg(self, parts: list[bytes], *more: Any) -> int:
        size = sum(map(len, parts))
        return self._sock.sendmsg(parts, *more) if self._takes(len(parts[0])) else size


def narrow(peer: TestPeer, most: int, *, tells: bool = False) -> Narrow:
    sock = peer.endpoint.switchboard.socket
    wrapped = Narrow(sock._sock, most, tells=tells)
    sock._sock = wrapped  # type: ignore[assignment]
    return wrapped


def link_of(peer: TestPeer) -> Link:
    (link,) = peer.endpoint._links
    assert isinstance(link, Link)
    return link


async def fetch(connection: PeerConnection, ids: list[PieceId]) -> None:
    answers = await gathered(connection.request(MANIFEST, ids))
    assert {hashlib.sha256(answer.data).digest() for answer in answers} == set(ids)


def pieces(peer: TestPeer, count: int) -> list[PieceId]:
    return [peer.shelf.put(os.urandom(PIECE)) for _ in range(count)]


async def test_a_transfer_over_loopback_uses_what_the_interface_takes() -> None:
    async with TestFleet() as fleet:
        left, right = await fleet.device("left"), await fleet.device("right")
        connection = await left.connect(right)
        assert link_of(right).datagram_size == BASE_BYTES, "nothing is tried before a transfer"
        await fetch(connection, pieces(right, 20))
        assert link_of(right).datagram_size == limits.MAX_DATAGRAM_BYTES
        assert link_of(left).datagram_size == BASE_BYTES, "who only receives has nothing to find"


async def test_an_interface_that_refuses_lowers_the_size_at_once() -> None:
    async with TestFleet() as fleet:
        left, right = await fleet.device("left"), await fleet.device("right")
        connection = await left.connect(right)
        sock = narrow(right, 1472, tells=True)
        await fetch(connection, pieces(right, 20))
        assert sock.longest == link_of(right).datagram_size == 1472
        sock.most = 1300
        await fetch(connection, pieces(right, 20))
        assert link_of(right).datagram_size <= 1300
        assert right.endpoint.switchboard.socket.segments, "segmentation is not to blame"


@pytest.mark.parametrize("most", [1472, 1300])
async def test_a_path_that_swallows_is_searched(most: int) -> None:
    async with TestFleet() as fleet:
        left, right = await fleet.device("left"), await fleet.device("right")
        connection = await left.connect(right)
        sock = narrow(right, most)
        for _ in range(10):
            await fetch(connection, pieces(right, 8))
        assert sock.longest == link_of(right).datagram_size
        assert most - 60 < sock.longest <= most
        assert sock.swallowed < 40


async def test_a_black_hole_in_mid_transfer_costs_no_byte() -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = random.Random(seed)
    async with TestFleet() as fleet:
        left, right = await fleet.device("left"), await fleet.device("right")
        connection = await left.connect(right)
        sock = narrow(right, 9000)
        ids = pieces(right, 40)
        answers, shrinks_at = [], rng.randrange(5, 20)
        async for answer in connection.request(MANIFEST, ids):
            answers.append(answer)
            if len(answers) == shrinks_at:
                sock.most = rng.randrange(BASE_BYTES, 1400)
        assert {hashlib.sha256(answer.data).digest() for answer in answers} == set(ids)
        assert link_of(right).quic.mtu.falls == 1
        assert link_of(right).datagram_size <= sock.most
        assert sock.swallowed


async def test_without_the_fast_path_datagrams_stay_at_the_base(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("edgesync.transport.switchboard.Connection", BoundedQuicConnection)
    async with TestFleet() as fleet:
        left, right = await fleet.device("left"), await fleet.device("right")
        connection = await left.connect(right)
        await fetch(connection, pieces(right, 10))
        assert link_of(right).datagram_size == BASE_BYTES


async def test_a_peer_on_this_machine_gets_the_class_for_lans_at_once() -> None:
    async with TestFleet() as fleet:
        left, right = await fleet.device("left"), await fleet.device("right")
        await left.connect(right)
        assert link_of(left).controller_name == "lan"
        assert link_of(right).controller_name == "lan"


def test_what_interfaces_say() -> None:
    interfaces = Interfaces()
    way = interfaces.way(("127.0.0.1", 9), 0.0)
    assert way is not None
    assert way.source == "127.0.0.1"
    assert way.near
    assert way.payload > 8000
    mapped = interfaces.way(("::ffff:127.0.0.1", 9, 0, 0), 1.0)
    assert mapped == way
    assert source_towards(("no address", 9)) is None
    assert interfaces.way(("no address", 9), 2.0) is None


# --- another address


class Relay:
    """What stands between two endpoints: it forgets which port it used (a NAT), or which address (a move)."""

    def __init__(self, server: tuple[str, int]) -> None:
        self._loop = asyncio.get_running_loop()
        self._server = server
        self._client: Any = None
        self.inside = self._open("127.0.0.1", self._from_client)
        self._outside: socket.socket | None = None
        self.move("127.0.0.1")

    def _open(self, host: str, reader: Callable[[socket.socket], None]) -> socket.socket:
        sock = udp.bind(host, 0)
        self._loop.add_reader(sock, reader, sock)
        return sock

    @property
    def address(self) -> tuple[str, int]:
        return self.inside.getsockname()[:2]

    def move(self, host: str) -> None:
        """Leave from ``host`` and another port from now on; what comes to the old one is lost."""
        if self._outside is not None:
            self._close(self._outside)
        self._outside = self._open(host, self._from_server)

    def _close(self, sock: socket.socket) -> None:
        self._loop.remove_reader(sock)
        sock.close()

    def _from_client(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                data, self._client = sock.recvfrom(65536)
                assert self._outside is not None
                self._outside.sendto(data, self._server)

    def _from_server(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.inside.sendto(sock.recv(65536), self._client)

    def close(self) -> None:
        self._close(self.inside)
        if self._outside is not None:
            self._close(self._outside)


@pytest.fixture
async def relayed() -> AsyncIterator[tuple[TestPeer, TestPeer, Relay, PeerConnection]]:
    async with TestFleet() as fleet:
        left, right = await fleet.device("left"), await fleet.device("right")
        relay = Relay(right.address)
        connection = await left.endpoint.connect(relay.address, expected_key=right.identity.key)
        yield left, right, relay, connection
        relay.close()


async def take(
    connection: PeerConnection, ids: list[PieceId], at: int, act: Callable[[], None]
) -> None:
    """Fetch ``ids``, each once, and ``act`` when ``at`` are there."""
    came: list[PieceId] = []
    async with asyncio.timeout(30):
        async for answer in connection.request(MANIFEST, ids):
            assert hashlib.sha256(answer.data).digest() == answer.piece
            came.append(answer.piece)
            if len(came) == at:
                act()
    assert came == ids


async def test_a_nat_that_forgets_costs_the_transfer_nothing(
    relayed: tuple[TestPeer, TestPeer, Relay, PeerConnection], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, right, relay, connection = relayed
    link, moved = link_of(right), []
    monkeypatch.setattr(link.quic, "path_moved", lambda: moved.append(1))
    await take(connection, pieces(right, 60), 10, lambda: relay.move("127.0.0.1"))
    assert link.current_address[1] == relay._outside.getsockname()[1]  # type: ignore[union-attr]
    assert link.current_address != link.address
    assert not moved, "a port is no other path"


async def test_another_address_is_another_path(
    relayed: tuple[TestPeer, TestPeer, Relay, PeerConnection], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, right, relay, connection = relayed
    moved: list[float] = []
    link = link_of(right)
    before = link.quic.controller.on_path_change

    def note(now: float) -> None:
        moved.append(now)
        before(now)

    monkeypatch.setattr(link.quic.controller, "on_path_change", note)
    await take(connection, pieces(right, 60), 10, lambda: relay.move("127.0.0.2"))
    assert link.current_address[0] == "127.0.0.2"
    assert len(moved) == 1
    assert link.datagram_size == limits.MAX_DATAGRAM_BYTES, "it was searched again"


async def test_who_moves_says_so_at_once(
    relayed: tuple[TestPeer, TestPeer, Relay, PeerConnection], monkeypatch: pytest.MonkeyPatch
) -> None:
    left, _, _, _ = relayed
    link = link_of(left)
    pings: list[int] = []
    monkeypatch.setattr(link, "ping", lambda: pings.append(1))
    link.check_source()
    assert not pings
    monkeypatch.setattr(links, "source_towards", lambda _: None)
    link.check_source()
    assert not pings, "no route is no move"
    monkeypatch.setattr(links, "source_towards", lambda _: "192.0.2.7")
    far = Way(source="192.0.2.7", payload=1472, near=False)
    monkeypatch.setattr(link._switchboard.interfaces, "way", lambda *_: far)
    link.check_source()
    link.check_source()
    assert pings == [1]
    assert link.controller_name == "bbr"
