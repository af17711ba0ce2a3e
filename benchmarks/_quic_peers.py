"""The engines EdgeSync is compared with, each as a process of its own; imports nothing of EdgeSync.

``python _quic_peers.py serve|fetch ENGINE FOLDER PORT DATAGRAM BYTES CONNECTIONS`` (aioquic, qh3, guest or tls): FOLDER
holds cert.pem and key.pem. A server prints its port, and at the end of its input the CPU seconds since the first
request; a client prints seconds and CPU seconds. A guest is stock aioquic that asks a bare EdgeSync link.
"""

import asyncio
import importlib
import json
import os
import ssl
import sys
import time
from pathlib import Path
from typing import Any

SLICE = 1 << 16
WINDOW = 1 << 26


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


class Clock:
    """CPU seconds since the first request."""

    started: float | None = None

    def start(self) -> None:
        if self.started is None:
            self.started = time.process_time()

    def seconds(self) -> float:
        return time.process_time() - (self.started or 0.0)


def configuration(library: str, folder: Path, datagram: int, *, client: bool) -> Any:
    guest, library = library == "guest", "aioquic" if library == "guest" else library
    made = importlib.import_module(f"{library}.quic.configuration").QuicConfiguration(
        is_client=client,
        alpn_protocols=["edgesync/1" if guest else "x"],
        max_data=WINDOW,
        max_stream_data=WINDOW,
    )
    made.max_datagram_size = datagram
    if client:
        made.verify_mode = ssl.CERT_NONE
        made.server_name = "localhost"
    else:
        made.load_cert_chain(str(folder / "cert.pem"), str(folder / "key.pem"))
    return made


async def serve_quic(library: str, folder: Path, datagram: int) -> None:
    clock, block = Clock(), os.urandom(1 << 20)
    base: Any = importlib.import_module(f"{library}.asyncio.protocol").QuicConnectionProtocol
    received = importlib.import_module(f"{library}.quic.events").StreamDataReceived

    class Server(base):  # type: ignore[misc]
        def quic_event_received(self, event: Any) -> None:
            if isinstance(event, received) and event.end_stream:
                clock.start()
                for _ in range(int(event.data) >> 20):
                    self._quic.send_stream_data(event.stream_id, block)
                self._quic.send_stream_data(event.stream_id, b"", end_stream=True)
                self.transmit()

    server = await importlib.import_module(f"{library}.asyncio").serve(
        "127.0.0.1",
        0,
        configuration=configuration(library, folder, datagram, client=False),
        create_protocol=Server,
    )
    say(port=server._transport.get_extra_info("sockname")[1])
    await asyncio.to_thread(sys.stdin.read)
    say(cpu=clock.seconds())
    os._exit(0)


async def fetch_quic(
    asked: str, folder: Path, port: int, datagram: int, size: int, connections: int
) -> None:
    library = "aioquic" if asked == "guest" else asked
    base: Any = importlib.import_module(f"{library}.asyncio.protocol").QuicConnectionProtocol
    received = importlib.import_module(f"{library}.quic.events").StreamDataReceived
    connect = importlib.import_module(f"{library}.asyncio").connect

    class Client(base):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self.count = 0
            self.done = asyncio.Event()

        def quic_event_received(self, event: Any) -> None:
            if isinstance(event, received):
                self.count += len(event.data)
                if event.end_stream:
                    self.done.set()

        async def fetch(self, share: int) -> None:
            stream_id = self._quic.get_next_available_stream_id()
            request = share.to_bytes(8, "big") if asked == "guest" else str(share).encode()
            self._quic.send_stream_data(stream_id, request, end_stream=True)
            self.transmit()
            await asyncio.wait_for(self.done.wait(), 200)
            assert self.count == share

    made = configuration(asked, folder, datagram, client=True)
    managers = [
        connect("127.0.0.1", port, configuration=made, create_protocol=Client)
        for _ in range(connections)
    ]
    clients = [await manager.__aenter__() for manager in managers]
    cpu, started = time.process_time(), time.perf_counter()
    await asyncio.gather(*(client.fetch(size // connections) for client in clients))
    say(seconds=time.perf_counter() - started, cpu=time.process_time() - cpu)
    os._exit(0)


async def serve_tls(folder: Path) -> None:
    clock, block = Clock(), memoryview(os.urandom(1 << 20))

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        size = int.from_bytes(await reader.readexactly(8), "big")
        clock.start()
        for at in range(0, size, SLICE):
            begin = at & (1 << 20) - 1
            writer.write(block[begin : begin + SLICE])
            await writer.drain()

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context, limit=1 << 18)
    say(port=server.sockets[0].getsockname()[1])
    await asyncio.to_thread(sys.stdin.read)
    say(cpu=clock.seconds())
    os._exit(0)


async def fetch_tls(port: int, size: int, connections: int) -> None:
    context = ssl._create_unverified_context()
    pairs = [
        await asyncio.open_connection("127.0.0.1", port, ssl=context, limit=1 << 18)
        for _ in range(connections)
    ]

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        share = size // connections
        writer.write(share.to_bytes(8, "big"))
        while share > 0:
            data = await reader.read(1 << 16)
            assert data
            share -= len(data)

    cpu, started = time.process_time(), time.perf_counter()
    await asyncio.gather(*(one(*pair) for pair in pairs))
    say(seconds=time.perf_counter() - started, cpu=time.process_time() - cpu)
    os._exit(0)


def main() -> None:
    role, library, folder, *numbers = sys.argv[1:]
    port, datagram, size, connections = map(int, numbers)
    if library == "tls":
        asyncio.run(
            serve_tls(Path(folder)) if role == "serve" else fetch_tls(port, size, connections)
        )
    elif role == "serve":
        asyncio.run(serve_quic(library, Path(folder), datagram))
    else:
        asyncio.run(fetch_quic(library, Path(folder), port, datagram, size, connections))


if __name__ == "__main__":
    main()
