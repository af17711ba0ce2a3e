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
async def relaying() -> AsyncIterator[MqttRelay]:
    """A relay to a broker that sends back each byte it gets."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(100):
                writer.write(data)
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
    monkeypatch.setattr(limits, "RELAY_UNPROVEN_TIMEOUT_S", 0.2)
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
