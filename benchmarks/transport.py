"""Loopback throughput of one connection against stock aioquic in the same run, and what importing the stack costs.

Server and client are processes of their own; the client asks for 256 pieces of 64 KiB at a time. Runs alternate between
the two stacks, medians are given. Both send 1200-byte datagrams.
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

PIECE = 65_536
PIECES = 256
ROUNDS = 2


def _judge(der: bytes) -> Any:
    from edgesync.identity import certificate_id, certificate_key
    from edgesync.ids import PeerIdentity

    return PeerIdentity("device", certificate_id(der), certificate_key(der))


async def _endpoint(name: str) -> Any:
    from edgesync.identity import Identity, self_signed
    from edgesync.testing.transport import TestHandler
    from edgesync.transport.endpoint import Endpoint

    handler = TestHandler()
    identity = self_signed(Identity.generate(), name)
    endpoint = await Endpoint.open(
        host="127.0.0.1", port=0, identity=identity, judge=_judge, handler=handler
    )
    return endpoint, handler


def _data() -> list[bytes]:
    import random

    rng = random.Random(7)
    return [rng.randbytes(PIECE) for _ in range(PIECES)]


async def serve_edgesync() -> None:
    endpoint, handler = await _endpoint("server")
    for data in _data():
        handler.shelf.put(data)
    _say(port=endpoint.port)
    await asyncio.to_thread(sys.stdin.read)
    await endpoint.close()


async def fetch_edgesync(port: int) -> None:
    import hashlib

    endpoint, _ = await _endpoint("client")
    ids = [hashlib.sha256(data).digest() for data in _data()]
    conn = await endpoint.connect(("127.0.0.1", port))

    async def once() -> int:
        total = 0
        async for answer in conn.request("ab" * 32, ids, max_piece_bytes=4 * PIECE):
            total += len(answer.data)
        return total

    await once()
    cpu, started = time.process_time(), time.perf_counter()
    total = sum([await once() for _ in range(ROUNDS)])
    _say(seconds=time.perf_counter() - started, cpu=time.process_time() - cpu, total=total)
    await endpoint.close()


async def serve_stock() -> None:
    from aioquic.asyncio import serve
    from aioquic.quic.configuration import QuicConfiguration

    from edgesync.identity import Identity, self_signed

    identity = self_signed(Identity.generate(), "server")
    body = b"".join(_data())

    def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def work() -> None:
            await reader.read()
            writer.write(body)
            writer.write_eof()

        tasks.append(asyncio.ensure_future(work()))

    tasks: list[Any] = []
    configuration = QuicConfiguration(
        is_client=False,
        alpn_protocols=["x"],
        certificate=identity.certificate,
        private_key=identity.private_key,
    )
    server = await serve("127.0.0.1", 0, configuration=configuration, stream_handler=answer)
    _say(port=server._transport.get_extra_info("sockname")[1])
    await asyncio.to_thread(sys.stdin.read)
    server.close()


async def fetch_stock(port: int) -> None:
    import ssl

    from aioquic.asyncio import connect
    from aioquic.quic.configuration import QuicConfiguration

    configuration = QuicConfiguration(alpn_protocols=["x"], verify_mode=ssl.CERT_NONE)
    async with connect("127.0.0.1", port, configuration=configuration) as client:

        async def once() -> int:
            reader, writer = await client.create_stream()
            writer.write(b"all")
            writer.write_eof()
            return len(await reader.read())

        await once()
        cpu, started = time.process_time(), time.perf_counter()
        total = sum([await once() for _ in range(ROUNDS)])
        _say(seconds=time.perf_counter() - started, cpu=time.process_time() - cpu, total=total)


def _say(**facts: Any) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


def _process(role: str, *arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.transport", role, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def measure(stack: str) -> tuple[float, float]:
    """(MB/s, client's CPU microseconds per datagram's worth of payload)."""
    with _process(f"serve_{stack}") as server:
        assert server.stdout is not None
        port = json.loads(server.stdout.readline())["port"]
        with _process(f"fetch_{stack}", port) as client:
            assert client.stdout is not None
            facts = json.loads(client.stdout.readline())
        server.stdin.close()  # type: ignore[union-attr]
        server.wait(20)
    assert facts["total"] == ROUNDS * PIECES * PIECE
    return facts["total"] / facts["seconds"] / 1e6, facts["cpu"] * 1e6 / (facts["total"] / 1170)


def import_cost() -> tuple[float, float]:
    """(seconds, MiB) that importing the endpoint adds to a bare interpreter."""
    script = (
        "import resource,time;a=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;t=time.perf_counter();"
        "import edgesync.transport.endpoint;"
        "print(time.perf_counter()-t,(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-a)/1024)"
    )
    outcomes = [
        [float(x) for x in subprocess.check_output([sys.executable, "-c", script]).split()]
        for _ in range(3)
    ]
    return statistics.median(o[0] for o in outcomes), statistics.median(o[1] for o in outcomes)


def run(repeats: int = 3) -> list[str]:
    """Rows for the benchmark table."""
    results: dict[str, list[tuple[float, float]]] = {"stock": [], "edgesync": []}
    for _ in range(repeats):
        for stack, outcomes in results.items():
            outcomes.append(measure(stack))
    rates = {s: statistics.median(o[0] for o in outcomes) for s, outcomes in results.items()}
    costs = {s: statistics.median(o[1] for o in outcomes) for s, outcomes in results.items()}
    seconds, mebibytes = import_cost()
    return [
        (
            f"one connection, loopback, 1200 B: stock aioquic {rates['stock']:.1f} MB/s"
            f" ({costs['stock']:.0f} us/datagram at the receiver)"
        ),
        (
            f"one connection, loopback, 1200 B: edgesync {rates['edgesync']:.1f} MB/s"
            f" ({costs['edgesync']:.0f} us/datagram) = {rates['edgesync'] / rates['stock']:.1f} x stock"
        ),
        (
            f"import of the transport: {seconds * 1000:.0f} ms, {mebibytes:.1f} MiB"
            f" (Python {sys.version.split()[0]}, {os.cpu_count()} cores)"
        ),
    ]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        asyncio.run(globals()[sys.argv[1]](*map(int, sys.argv[2:])))
    else:
        print("\n".join(run()))
