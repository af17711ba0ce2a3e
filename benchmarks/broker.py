"""What a broker costs: memory, connecting, fan-out, fan-in and idle CPU with many TLS clients, one JSON line each.

``python -m benchmarks.broker [embedded|mosquitto] [CLIENTS]``. The broker is a process of its own; the generator shares
the machine with it, so rates are to be read against each other. Loopback only.
"""

import asyncio
import json
import shutil
import ssl
import tempfile
import time
from pathlib import Path

from edgesync.identity import Identity
from edgesync.io.mqtt import LinkConfig, client_context
from edgesync.wire import topics
from simulations.netlab.hosts import cpu_seconds
from tests.contract.brokers import GATEWAY, BrokerProcess, Fleet, until

MIB = 1024 * 1024
REPORTS = 10
CONNECTED, GRANTED = 4, 5


def text(value: str) -> bytes:
    return len(value.encode()).to_bytes(2) + value.encode()


def packet(kind: int, body: bytes) -> bytes:
    length, head = len(body), bytearray([kind])
    while True:
        length, digit = divmod(length, 128)
        head.append(digit | (128 if length else 0))
        if not length:
            return bytes(head) + body


class Client:
    """As little of a client as the measurement needs, so that it weighs little itself."""

    def __init__(self, device: Identity, broker: BrokerProcess) -> None:
        self.name = device.name
        self._context = client_context(device, lambda: {broker.fleet.gateway.key})
        self._context.sslsocket_class = ssl.SSLSocket
        self._port = broker.port
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter

    async def connect(self) -> None:
        self.reader, self.writer = await asyncio.open_connection(
            "127.0.0.1", self._port, ssl=self._context
        )
        self.writer.write(packet(0x10, b"\0\4MQTT\4\2\0\x78" + text(self.name)))
        await self.reader.readexactly(CONNECTED)
        for number, (name, qos) in enumerate(topics.device_filters(self.name, GATEWAY), 1):  # type: ignore[arg-type]
            self.writer.write(packet(0x82, number.to_bytes(2) + text(name) + bytes([qos])))
            await self.reader.readexactly(GRANTED)

    async def receive(self) -> None:
        await self.reader.readexactly(1)
        length = shift = 0
        while True:
            byte = (await self.reader.readexactly(1))[0]
            length |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        body = await self.reader.readexactly(length)
        at = 2 + int.from_bytes(body[:2])
        self.writer.write(packet(0x40, body[at : at + 2]))

    async def report(self) -> None:
        body = text(topics.report(self.name))  # type: ignore[arg-type]
        for number in range(1, REPORTS + 1):
            self.writer.write(packet(0x32, body + number.to_bytes(2) + bytes(300)))
        await self.reader.readexactly(4 * REPORTS)


async def measure(kind: str, count: int, directory: Path) -> dict[str, object]:
    broker = BrokerProcess(kind, Fleet(), directory)
    await broker.start()
    pid = broker.process.pid
    out: dict[str, object] = {"broker": kind, "clients": count}
    try:
        out["rss_empty_mib"] = round(broker.rss_bytes() / MIB, 1)
        clients = [Client(broker.fleet.device(f"d{n}"), broker) for n in range(count)]
        gate = asyncio.Semaphore(16)

        async def enter(client: Client) -> None:
            async with gate:
                await client.connect()

        began, used = time.perf_counter(), cpu_seconds(pid)
        await asyncio.gather(*(enter(client) for client in clients))
        out["connects_per_s"] = round(count / (time.perf_counter() - began))
        out["connect_cpu_ms"] = round(1000 * (cpu_seconds(pid) - used) / count, 2)
        out["rss_mib"] = round(broker.rss_bytes() / MIB, 1)
        link = broker.link(broker.fleet.gateway, config=LinkConfig.for_gateway())
        running = asyncio.create_task(link.run())
        await link.wait_connected()
        began = time.perf_counter()
        await link.publish(topics.presence(GATEWAY), bytes(2048), qos=1, retain=True)
        await asyncio.gather(*(client.receive() for client in clients))
        out["fan_out_2kib_last_ms"] = round(1000 * (time.perf_counter() - began))
        began, used = time.perf_counter(), cpu_seconds(pid)
        await asyncio.gather(*(client.report() for client in clients))
        await until(lambda: len(link.inbox) >= REPORTS * count, timeout_s=120)
        out["fan_in_per_s"] = round(REPORTS * count / (time.perf_counter() - began))
        out["fan_in_cpu_us"] = round(1e6 * (cpu_seconds(pid) - used) / (REPORTS * count))
        await asyncio.sleep(2)
        used = cpu_seconds(pid)
        await asyncio.sleep(10)
        out["idle_cpu_percent"] = round(10 * (cpu_seconds(pid) - used), 2)
        out["rss_after_mib"] = round(broker.rss_bytes() / MIB, 1)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    finally:
        broker.kill()
    return out


def run(count: int = 300) -> list[str]:
    """One row a broker; mosquitto only where it is installed."""
    rows = []
    for kind in ("embedded", "mosquitto"):
        if kind == "mosquitto" and shutil.which("mosquitto", path="/usr/sbin:/usr/bin") is None:
            rows.append("mosquitto is not installed")
            continue
        with tempfile.TemporaryDirectory() as directory:
            rows.append(json.dumps(asyncio.run(measure(kind, count, Path(directory)))))
    return rows


if __name__ == "__main__":
    print(*run(), sep="\n")
