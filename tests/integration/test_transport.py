"""Two endpoints in one process, over loopback: what holds for QUIC and for TLS over TCP."""

import asyncio
import contextlib
import dataclasses
import hashlib
import os

import pytest

from edgesync.errors import NotAuthorizedError, NotFoundError
from edgesync.ids import Digest, PieceId
from edgesync.io.proxy import Proxy, ProxySettings
from edgesync.testing.transport import TestFleet, gathered
from edgesync.transport.quic import BoundedQuicConnection
from edgesync.wire.messages import Interested, Join, Joined

MANIFEST = Digest("ab" * 32)


@pytest.fixture(params=[False, True], ids=["quic", "tls"])
def over_tls(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


async def test_both_sides_ask_for_pieces_on_one_connection(over_tls: bool) -> None:
    async with TestFleet(over_tls=over_tls) as fleet:
        left, right = await fleet.device("left"), await fleet.device("right")
        ids = [left.shelf.put(os.urandom(70_000)) for _ in range(20)]
        more = [right.shelf.put(os.urandom(1000)) for _ in range(5)]
        conn = await left.connect(right)
        back = await right.handler.next_connection()
        got = await gathered(back.request(MANIFEST, ids))
        assert {hashlib.sha256(a.data).digest() for a in got} == set(ids)
        got = await gathered(conn.request(MANIFEST, [*more, PieceId(bytes(32))]))
        assert {a.piece for a in got if a.missing is None} == set(more)
        assert [a.missing for a in got if a.missing] == ["not_held"]
        assert conn.peer.id == "right"
        assert back.peer.id == "left"
        assert conn.dialed
        assert not back.dialed
        assert back.listen_port == left.endpoint.port


async def test_messages_and_blobs(over_tls: bool) -> None:
    async with TestFleet(over_tls=over_tls) as fleet:
        left, gateway = await fleet.device("left"), await fleet.gateway("hub")
        blob = os.urandom(3_000_000)
        gateway.handler.blobs["timestamp"] = blob
        conn = await left.connect(gateway)
        assert conn.peer.role == "gateway"
        await conn.send(Interested(manifest=bytes(32)))
        assert await gateway.handler.next_message() == Interested(manifest=bytes(32))
        assert await conn.fetch("timestamp", 4_000_000) == blob
        with pytest.raises(NotFoundError):
            await conn.fetch("root/7", 1000)


async def test_a_stranger_joins(over_tls: bool) -> None:
    async with TestFleet(over_tls=over_tls) as fleet:
        gateway = await fleet.gateway("hub")
        joiner = await fleet.stranger("new")
        gateway.handler.blobs["root/1"] = b"root"
        gateway.handler.joins = lambda join: Joined(
            state="accepted", device_id=join.device_id, gateway_id="hub", region="r", root_version=1
        )
        conn = await joiner.endpoint.join(
            ("127.0.0.1", gateway.endpoint.port),
            expected_key=gateway.identity.key,
            over_tls=over_tls,
        )
        assert conn.server_certificate_sha256 == gateway.endpoint.certificate_sha256
        answer = await conn.ask(
            Join(
                token_id="abcdefgh",
                secret=bytes(16),
                public_key=joiner.identity.public_raw,
                signature=bytes(64),
                device_id="new",
            )
        )
        assert isinstance(answer, Joined)
        assert await conn.fetch("root/1", 100) == b"root"
        await conn.close()


async def test_a_stranger_is_no_member(over_tls: bool) -> None:
    async with TestFleet(over_tls=over_tls) as fleet:
        left, stranger = await fleet.device("left"), await fleet.stranger("mallory")
        with pytest.raises(NotAuthorizedError):
            await stranger.connect(left)
        with pytest.raises(NotAuthorizedError):
            await left.connect(stranger)
        assert not left.endpoint.connections


async def test_without_the_fast_path_it_works_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgesync.transport.switchboard.Connection", BoundedQuicConnection)
    async with TestFleet() as fleet:
        left, right = await fleet.device("left"), await fleet.device("right")
        ids = [left.shelf.put(os.urandom(70_000)) for _ in range(20)]
        conn = await right.connect(left)
        got = await gathered(conn.request(MANIFEST, ids))
        assert {hashlib.sha256(a.data).digest() for a in got} == set(ids)
        assert left.endpoint.stats().datagrams_out > 1000


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while part := await reader.read(65_536):
            writer.write(part)
            await writer.drain()
    writer.close()


async def _tunnel(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer one CONNECT as an HTTP proxy does."""
    head = await reader.readuntil(b"\r\n\r\n")
    host, port = head.split()[1].decode().split(":")
    onward_reader, onward = await asyncio.open_connection(host, int(port))
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    await asyncio.gather(_carry(reader, onward), _carry(onward_reader, writer))


async def test_a_connection_says_which_proxy_carries_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgesync.io.proxy._is_loopback", lambda _host: False)
    server = await asyncio.start_server(_tunnel, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, TestFleet(over_tls=True) as fleet:
        left, gateway = await fleet.device("left"), await fleet.gateway("hub")
        config = dataclasses.replace(
            left.endpoint.config, proxy=ProxySettings(Proxy("127.0.0.1", port))
        )
        monkeypatch.setattr(left.endpoint, "config", config)
        conn = await left.connect(gateway)
        back = await gateway.handler.next_connection()
        assert conn.proxy == f"127.0.0.1:{port}"
        assert conn.address == ("127.0.0.1", port)
        assert back.proxy == ""
