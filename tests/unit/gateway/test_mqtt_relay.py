"""MQTT relays of strangers: few, short, and no longer counted once the broker has answered."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest

from edgesync import limits
from edgesync.io.broker_url import parse_broker_url
from gateway.mqtt_relay import MqttRelay


@contextlib.asynccontextmanager
async def relaying(answers: int = 1000) -> AsyncIterator[MqttRelay]:
    """A relay to a broker that sends back each byte it gets, and closes after so many ``answers``."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left = answers
        with contextlib.suppress(OSError):
            while left and (data := await reader.read(100)):
                writer.write(data)
                left -= 1
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    relay = MqttRelay(parse_broker_url(f"mqtts://127.0.0.1:{server.sockets[0].getsockname()[1]}"))
    try:
        yield relay
    finally:
        await relay.close()
        server.close()


def enter(relay: MqttRelay, host: str) -> socket.socket:
    near, far = socket.socketpair()
    near.setblocking(False)
    far.setblocking(False)
    relay.adopt(far, host)
    return near


async def test_silent_clients_get_few_places_and_lose_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RELAY_UNPROVEN_TIMEOUT_S", 2.0)
    loop = asyncio.get_running_loop()
    async with relaying() as relay:
        clients = [enter(relay, "10.0.0.1") for _ in range(5)]
        assert relay.refused == 1
        clients += [enter(relay, f"10.0.1.{n}") for n in range(29)]
        assert relay.refused == 2
        await loop.sock_sendall(clients[0], b"hello")
        assert await loop.sock_recv(clients[0], 5) == b"hello"
        for client in clients:
            assert await asyncio.wait_for(loop.sock_recv(client, 1), 20) == b""
        last = enter(relay, "10.0.0.1")
        assert relay.refused == 2
        for client in (*clients, last):
            client.close()


async def test_whom_the_broker_answers_stays_and_leaves_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "MAX_RELAY_UNPROVEN_PER_ADDRESS", 1)
    loop = asyncio.get_running_loop()
    async with relaying() as relay:
        with enter(relay, "10.0.0.1") as client:
            for _ in range(limits.RELAY_PROVEN_ANSWERS):
                enter(relay, "10.0.0.1").close()
                await loop.sock_sendall(client, b"x")
                assert await loop.sock_recv(client, 1) == b"x"
            assert relay.refused == limits.RELAY_PROVEN_ANSWERS
            with enter(relay, "10.0.0.1"):
                assert relay.refused == limits.RELAY_PROVEN_ANSWERS


@pytest.fixture
def soon_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RELAY_STAYED_S", 0.01)


async def answered(relay: MqttRelay, host: str) -> socket.socket:
    """A client whom the broker answers often enough."""
    loop = asyncio.get_running_loop()
    client = enter(relay, host)
    for _ in range(limits.RELAY_PROVEN_ANSWERS):
        await loop.sock_sendall(client, b"x")
        assert await loop.sock_recv(client, 1) == b"x"
    return client


async def prove(relay: MqttRelay, host: str) -> socket.socket:
    """A client whom the broker then keeps, so that its source is known."""
    client = await answered(relay, host)
    async with asyncio.timeout(20):
        while not relay.is_known(host):  # noqa: ASYNC110 - the relay tells nobody
            await asyncio.sleep(0)
    assert not relay.unproven
    return client


async def leave(client: socket.socket) -> None:
    """Close the client, and return when the relay has ended."""
    client.shutdown(socket.SHUT_WR)
    assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(client, 1), 20) == b""
    client.close()


async def test_whom_the_broker_sends_away_after_its_answers_stays_a_stranger(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "RELAY_STAYED_S", 60.0)
    loop = asyncio.get_running_loop()
    async with relaying(limits.RELAY_PROVEN_ANSWERS) as relay:
        client = await answered(relay, "10.0.0.1")
        # What a client without a certificate gets for the rest of its handshake: the broker's alert, and the end.
        assert await asyncio.wait_for(loop.sock_recv(client, 1), 20) == b""
        assert not relay.is_known("10.0.0.1")
        clients = [client, *(enter(relay, "10.0.0.1") for _ in range(16))]
        assert relay.unproven == limits.MAX_RELAY_UNPROVEN_PER_ADDRESS
        for each in clients:
            each.close()


@pytest.mark.usefixtures("soon_known")
async def test_strangers_take_no_place_of_known_sources() -> None:
    async with relaying() as relay:
        clients = [await prove(relay, "10.0.0.1")]
        clients += [enter(relay, f"10.1.{n // 4}.{n % 4}") for n in range(100)]
        assert relay.unproven == limits.MAX_RELAY_UNPROVEN
        clients += [enter(relay, "10.0.0.1") for _ in range(20)]
        here = limits.MAX_RELAY_UNPROVEN_PER_KNOWN_ADDRESS
        assert relay.unproven == limits.MAX_RELAY_UNPROVEN + here
        for client in clients:
            client.close()


@pytest.mark.usefixtures("soon_known")
async def test_a_known_source_without_places_gets_those_of_a_stranger(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "MAX_RELAY_UNPROVEN_KNOWN", 16)
    both = 16 + limits.MAX_RELAY_UNPROVEN_PER_ADDRESS
    async with relaying() as relay:
        clients = [await prove(relay, f"10.0.0.{n}") for n in (1, 2)]
        # Its own are taken, then the known ones' in all.
        for number, unproven in ((1, both), (2, both + limits.MAX_RELAY_UNPROVEN_PER_ADDRESS)):
            clients += [enter(relay, f"10.0.0.{number}") for _ in range(30)]
            assert relay.unproven == unproven
        for client in clients:
            client.close()


@pytest.mark.usefixtures("soon_known")
async def test_a_site_that_is_known_comes_back_as_one_while_strangers_hold_their_places() -> None:
    async with relaying() as relay:
        # The broker goes, and with it every client.
        await leave(await prove(relay, "10.0.0.1"))
        clients = [enter(relay, f"10.1.0.{n}") for n in range(40)]
        refused = relay.refused
        assert refused == len(clients) - limits.MAX_RELAY_UNPROVEN
        clients += [enter(relay, "10.0.0.1") for _ in range(17)]
        assert relay.refused == refused + 1
        assert relay.unproven == limits.MAX_RELAY_UNPROVEN + 16
        for client in clients:
            client.close()


@pytest.mark.usefixtures("soon_known")
async def test_places_of_known_sources_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_RELAY_UNPROVEN_KNOWN", 20)
    monkeypatch.setattr(limits, "MAX_RELAY_KNOWN_ADDRESSES", 2)
    async with relaying() as relay:
        clients = [await prove(relay, f"10.0.0.{n}") for n in range(3)]
        # The first was forgotten for the third.
        few = limits.MAX_RELAY_UNPROVEN_PER_ADDRESS
        clients += [enter(relay, "10.0.0.0") for _ in range(16)]
        assert relay.unproven == few
        clients += [enter(relay, f"10.0.0.{1 + n % 2}") for n in range(60)]
        assert relay.unproven == few + 20 + 2 * few
        for client in clients:
            client.close()


@pytest.mark.usefixtures("soon_known")
async def test_a_source_is_known_from_the_end_of_its_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "MAX_RELAY_KNOWN_ADDRESSES", 2)
    async with relaying() as relay:
        first, second = [await prove(relay, f"10.0.0.{n}") for n in (1, 2)]
        await leave(first)
        third = await prove(relay, "10.0.0.3")
        assert [relay.is_known(f"10.0.0.{n}") for n in (1, 2, 3)] == [True, False, True]
        for client in (second, third):
            client.close()


@pytest.mark.usefixtures("soon_known")
async def test_a_source_is_not_known_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    async with relaying() as relay:
        clients = [await prove(relay, "10.0.0.1")]
        monkeypatch.setattr(limits, "RELAY_KNOWN_S", 0.0)
        clients += [enter(relay, "10.0.0.1") for _ in range(16)]
        assert relay.unproven == limits.MAX_RELAY_UNPROVEN_PER_ADDRESS
        for client in clients:
            client.close()


async def test_all_addresses_of_one_ipv6_host_are_one_source() -> None:
    async with relaying() as relay:
        clients = [enter(relay, f"2001:db8::{n}") for n in range(1, 7)]
        assert relay.unproven == limits.MAX_RELAY_UNPROVEN_PER_ADDRESS
        for client in clients:
            client.close()
