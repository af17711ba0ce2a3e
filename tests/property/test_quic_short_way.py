"""The short way for plain packets against stock code, on a network that loses, repeats, delays and rekeys."""

import random

import pytest
from aioquic.quic import events

from edgesync.identity import Identity, self_signed
from edgesync.transport.quic import (
    BoundedQuicConnection,
    client_configuration,
    server_configuration,
)
from edgesync.wire.messages import ALPN

CLIENT_ADDRESS = ("192.0.2.1", 1000)
SERVER_ADDRESS = ("192.0.2.2", 7443)
IDENTITY = self_signed(Identity.generate(), "server")


def connections(short_way: bool) -> tuple[BoundedQuicConnection, BoundedQuicConnection]:
    client = BoundedQuicConnection(
        configuration=client_configuration(alpn=ALPN, idle_timeout_s=30), peer_streams=0
    )
    assert IDENTITY.certificate is not None
    server = BoundedQuicConnection(
        configuration=server_configuration(
            certificate=IDENTITY.certificate,
            private_key=IDENTITY.private_key,
            idle_timeout_s=30,
            joins=False,
        ),
        original_destination_connection_id=client.original_destination_connection_id,
        peer_streams=1,
    )
    client.short_way = server.short_way = short_way
    return client, server


def transfer(seed: int, *, short_way: bool, client_address_moves: bool) -> tuple[bytes, int]:
    """64 KiB each way on a bad network; what the client read, and how many packets went the short way."""
    rng = random.Random(seed)
    client, server = connections(short_way)
    address = CLIENT_ADDRESS
    upload, download = rng.randbytes(65_536), rng.randbytes(65_536)
    read = {id(client): bytearray(), id(server): bytearray()}
    wire: list[tuple[float, int, BoundedQuicConnection, bytes]] = []
    now, count, sent, moved = 0.0, 0, False, False
    client.connect(SERVER_ADDRESS, now=now)
    for _ in range(20_000):
        for quic, other in ((client, server), (server, client)):
            if quic is server and not server._network_paths:
                continue
            for data, _to in quic.datagrams_to_send(now):
                for _copy in range(rng.choices([0, 1, 2], [5, 92, 3])[0]):
                    count += 1
                    wire.append((now + rng.uniform(0.001, 0.006), count, other, data))
        wire.sort(key=lambda item: item[:2])
        timers = [t for q in (client, server) if q._network_paths and (t := q.get_timer())]
        upcoming = [*timers, *(item[0] for item in wire[:1])]
        now = max(now + 1e-6, min(upcoming))
        while wire and wire[0][0] <= now:
            _, _, quic, data = wire.pop(0)
            quic.receive_datagram(data, SERVER_ADDRESS if quic is client else address, now)
        for quic in (client, server):
            timer = quic.get_timer() if quic._network_paths else None
            if timer is not None and timer <= now:
                quic.handle_timer(now)
            while (event := quic.next_event()) is not None:
                if isinstance(event, events.StreamDataReceived):
                    read[id(quic)] += event.data
                    stream = quic.stream(event.stream_id)
                    consumed = len(read[id(quic)])
                    if stream is not None:
                        stream.max_stream_data_local = consumed + 16_384
                    quic.set_connection_limit(consumed + 16_384)
                    if quic is server and not sent:
                        sent = True
                        server.send_stream_data(0, download, end_stream=True)
                elif isinstance(event, events.HandshakeCompleted) and quic is client:
                    client.send_stream_data(0, upload, end_stream=True)
                assert not isinstance(event, events.ConnectionTerminated), event
        if len(read[id(server)]) > 20_000 and not moved:
            moved = True
            client.request_key_update()
            if client_address_moves:
                address = ("192.0.2.1", 2000)
        if bytes(read[id(server)]) == upload and bytes(read[id(client)]) == download:
            return bytes(read[id(client)]), client.took_short_way + server.took_short_way
    raise AssertionError(f"seed {seed}: not finished after {now:.1f} s")


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("moves", [False, True])
def test_the_short_way_delivers_what_stock_code_delivers(seed: int, moves: bool) -> None:
    stock, none = transfer(seed, short_way=False, client_address_moves=moves)
    short, some = transfer(seed, short_way=True, client_address_moves=moves)
    assert stock == short
    assert none == 0
    assert some > 50
