"""One connection over loopback: EdgeSync's engine beside stock aioquic, qh3 and TLS over TCP, in one interleaved run.

``python -m benchmarks.transport [--repeat N] [--quick] [--only NAME,…]`` (``make bench-transport``). Server and client
are processes of their own. "bare" is a link and its stream, without session and pieces; "pieces" asks a member for 64
KiB pieces; "whole path" is ``benchmarks.whole_path``: a gateway and an agent as the commands start them, which also
read, hash, write, sync and commit; its datagrams have 1452 bytes where loopback carries no more, in a network namespace
(root). CPU is per datagram's worth of payload. qh3 is run by the interpreter that ``EDGESYNC_BENCH_QH3`` names (one that
has it installed); it is no dependency of EdgeSync.
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PIECE = 65_536
PIECES = 256
SLICE = 1 << 18
MB = 1_000_000
HEADERS = 39
"""Bytes of a 1-RTT datagram that are not payload."""
FOUND = 8952
"""Not given: what path MTU discovery comes to over loopback."""
PEERS = Path(__file__).with_name("_quic_peers.py")


@dataclass(frozen=True)
class Case:
    """One row: which engine, how, and how much it moves."""

    name: str
    engine: str
    datagram: int = 1452
    megabytes: int = 100
    connections: int = 1
    options: str = ""
    receiver: str = ""
    """The engine of the receiving side where it is another one."""


SLOW = "rate=2430000"
"""Payload bytes per second of a 20 Mbit/s link."""
CASES = (
    Case("stock aioquic", "aioquic", megabytes=30),
    Case("bare, no offload", "bare", megabytes=100, options="plain"),
    Case("bare, GSO/GRO", "bare", megabytes=150),
    Case("bare, 1200 B, GSO/GRO", "bare", datagram=1200, megabytes=100),
    Case("bare, lan class", "bare", megabytes=100, options="cc=lan"),
    Case("bare, stock's reno", "bare", megabytes=100, options="cc=reno"),
    Case("bare, ChaCha20, GSO/GRO", "bare", megabytes=100, options="chacha"),
    Case("pieces, GSO/GRO", "pieces", megabytes=100),
    Case("pieces, 1200 B, GSO/GRO", "pieces", datagram=1200, megabytes=100),
    Case("pieces, size found", "pieces", datagram=FOUND, megabytes=100),
    Case("bare, size found", "bare", datagram=FOUND, megabytes=200),
    Case("whole path", "whole", megabytes=300),
    Case("whole path, size found", "whole", datagram=FOUND, megabytes=400),
    Case("qh3", "qh3", megabytes=60),
    Case("TLS over TCP", "tls", megabytes=200),
    Case("stock aioquic x 4", "aioquic", megabytes=32, connections=4),
    Case("bare x 4, GSO/GRO", "bare", megabytes=120, connections=4),
    Case("stock aioquic, 8900 B", "aioquic", datagram=8900, megabytes=80),
    Case("bare, 8900 B, GSO/GRO", "bare", datagram=8900, megabytes=200),
    Case("20 Mbit/s to stock aioquic", "bare", megabytes=12, options=SLOW, receiver="guest"),
    Case("20 Mbit/s to bare", "bare", megabytes=12, options=SLOW),
)
BARS = (
    ("bare, no offload", "stock aioquic", 5.0),
    ("bare, GSO/GRO", "stock aioquic", 7.0),
    ("bare, GSO/GRO", "qh3", 2.0),
    ("bare x 4, GSO/GRO", "stock aioquic x 4", 4.0),
    ("bare, 8900 B, GSO/GRO", "TLS over TCP", 0.7),
    ("bare, GSO/GRO", "bare, 1200 B, GSO/GRO", 1.0),
    ("pieces, size found", "pieces, 1200 B, GSO/GRO", 1.0),
    ("bare, lan class", "bare, stock's reno", 1.0),
    ("bare, lan class", "stock aioquic", 1.0),
    ("whole path", "bare, GSO/GRO", 0.6),
    ("whole path, size found", "bare, size found", 0.6),
)
CPU_BARS = (("bare, GSO/GRO", "stock aioquic", 0.2, 0.3),)
"""Ours, theirs, receiving, sending."""


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


# --- bare: a link and its streams


def _switchboard(options: str, doorman: Any) -> Any:
    from aioquic.tls import CipherSuite

    from edgesync.identity import Identity, self_signed
    from edgesync.transport import quic
    from edgesync.transport.flow import Budget
    from edgesync.transport.quic import server_configuration
    from edgesync.transport.switchboard import Switchboard

    for option in options.split(","):
        if option.startswith("cc="):
            quic.DEFAULT_CONTROLLER = option[3:]  # type: ignore[misc]
    identity = self_signed(Identity.generate(), "bench")
    assert identity.certificate is not None
    server = server_configuration(
        certificate=identity.certificate,
        private_key=identity.private_key,
        idle_timeout_s=30,
        joins=False,
    )
    if "chacha" in options:
        server.cipher_suites = [CipherSuite.CHACHA20_POLY1305_SHA256]
    return Switchboard(
        "127.0.0.1",
        0,
        server=server,
        doorman=doorman,
        budget=Budget(1 << 28),
        offload="plain" not in options,
    )


class Owner:
    def __init__(self, ready: Any = None, opened: Any = None) -> None:
        self.ready, self.opened = ready, opened

    def handshake_done(self, link: Any, alpn: str) -> None:
        del alpn
        if self.ready is not None:
            self.ready(link)

    def stream_opened(self, link: Any, stream: Any) -> None:
        if self.opened is not None:
            self.opened(link, stream)

    def link_closed(self, link: Any, error: Any) -> None: ...


def hold_size(link: Any, datagram: int) -> None:
    """Datagrams of so many bytes; FOUND leaves it to the path."""
    if datagram != FOUND:
        link.quic.mtu.hold(datagram)
        link.quic.set_datagram_size(datagram)


async def serve_bare(datagram: int, options: str) -> None:
    block = os.urandom(SLICE)
    tasks: set[asyncio.Task[None]] = set()
    began: list[float] = []

    async def answer(link: Any, stream: Any) -> None:
        size = int.from_bytes(await stream.read_exactly(8), "big")
        began.append(time.process_time())
        hold_size(link, datagram)
        for option in options.split(","):
            if option.startswith("rate="):
                link.quic.controller.set_rate_cap(float(option[5:]))
        for _ in range(size // SLICE):
            stream.write(block)
            await stream.drain()
        stream.write(b"", end=True)
        await stream.drain(low_water=0)

    def opened(link: Any, stream: Any) -> None:
        tasks.add(asyncio.ensure_future(answer(link, stream)))

    class Doorman:
        def new_owner(self) -> Owner:
            return Owner(opened=opened)

        def accepted(self, link: Any) -> None:
            board.proven(link)

    board = _switchboard(options, Doorman())
    say(port=board.socket.address[1])
    await asyncio.to_thread(sys.stdin.read)
    say(cpu=time.process_time() - began[0], warnings=board.socket.warnings())
    board.close()
    os._exit(0)


async def fetch_bare(port: int, size: int, connections: int, options: str) -> None:
    from edgesync.transport.quic import client_configuration
    from edgesync.wire.messages import ALPN

    board = _switchboard(options, None)
    links = []
    for _ in range(connections):
        ready = asyncio.get_running_loop().create_future()
        links.append(
            board.dial(
                client_configuration(alpn=ALPN, idle_timeout_s=30),
                ("127.0.0.1", port),
                Owner(ready=ready.set_result),
            )
        )
        await asyncio.wait_for(ready, 10)

    async def one(link: Any) -> None:
        share = size // connections // SLICE * SLICE
        stream = link.open_stream()
        await stream.grant(4 * SLICE)
        stream.follow_path()
        stream.write(share.to_bytes(8, "big"), end=True)
        for _ in range(share // SLICE):
            await stream.read_exactly(SLICE)

    await asyncio.sleep(0.1)
    cpu, started = time.process_time(), time.perf_counter()
    await asyncio.gather(*(one(link) for link in links))
    say(seconds=time.perf_counter() - started, cpu=time.process_time() - cpu)
    os._exit(0)


# --- pieces: a member that asks another


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


async def serve_pieces(datagram: int) -> None:
    endpoint, handler = await _endpoint("server")
    for data in _data():
        handler.shelf.put(data)

    def widen(conn: Any) -> None:
        hold_size(conn._link, datagram)

    say(port=endpoint.port)
    conn = await handler.connections.get()
    widen(conn)
    began = time.process_time()
    await asyncio.to_thread(sys.stdin.read)
    say(cpu=time.process_time() - began)
    await endpoint.close()


async def fetch_pieces(port: int, size: int) -> None:
    import hashlib

    endpoint, _ = await _endpoint("client")
    ids = [hashlib.sha256(data).digest() for data in _data()]
    conn = await endpoint.connect(("127.0.0.1", port))

    async def once() -> int:
        total = 0
        async for answer in conn.request("ab" * 32, ids, max_piece_bytes=4 * PIECE):
            total += len(answer.data)
        return total

    rounds = max(1, size // (PIECE * PIECES))
    cpu, started = time.process_time(), time.perf_counter()
    total = sum([await once() for _ in range(rounds)])
    say(seconds=time.perf_counter() - started, cpu=time.process_time() - cpu, total=total)
    await endpoint.close()


# --- running


@contextlib.contextmanager
def certificate() -> Iterator[Path]:
    """A folder with a self-signed key pair for the engines that are not ours."""
    import datetime as dt

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
        (path / "key.pem").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        yield path


def _command(case: Case, role: str, folder: Path, port: int, size: int) -> list[str]:
    engine = case.receiver if role == "fetch" and case.receiver else case.engine
    if engine in {"bare", "pieces"}:
        head = [sys.executable, "-m", "benchmarks.transport", f"_{role}_{engine}"]
        return [*head, *map(str, (port, case.datagram, size, case.connections)), case.options]
    python = os.environ.get("EDGESYNC_BENCH_QH3", sys.executable)
    return [
        python if engine == "qh3" else sys.executable,
        str(PEERS),
        role,
        engine,
        str(folder),
        *map(str, (port, case.datagram, size, case.connections)),
    ]


def _child(role: str, numbers: list[str], options: str) -> None:
    port, datagram, size, connections = map(int, numbers)
    work: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
        "_serve_bare": lambda: serve_bare(datagram, options),
        "_fetch_bare": lambda: fetch_bare(port, size, connections, options),
        "_serve_pieces": lambda: serve_pieces(datagram),
        "_fetch_pieces": lambda: fetch_pieces(port, size),
    }
    asyncio.run(work[role]())


def measure(case: Case, folder: Path, *, quick: bool) -> tuple[float, float, float]:
    """(MB/s, receiver's and sender's CPU microseconds a datagram)."""
    if case.engine == "whole":
        return _measure_whole(case, quick=quick)
    unit = PIECE * PIECES if case.engine == "pieces" else case.connections << 20
    size = max(1, case.megabytes * MB // (4 if quick else 1) // unit) * unit
    pipes: dict[str, Any] = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "text": True,
    }
    with subprocess.Popen(_command(case, "serve", folder, 0, size), **pipes) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            port = json.loads(server.stdout.readline())["port"]
            fetch = _command(case, "fetch", folder, port, size)
            client = subprocess.run(fetch, capture_output=True, text=True, timeout=240, check=True)
            received = json.loads(client.stdout.splitlines()[-1])
            server.stdin.close()
            sent = json.loads(server.stdout.readline())
        finally:
            server.kill()
    datagrams = size / (case.datagram - HEADERS)
    return (
        size / received["seconds"] / 1e6,
        received["cpu"] * 1e6 / datagrams,
        sent["cpu"] * 1e6 / datagrams,
    )


def _measure_whole(case: Case, *, quick: bool) -> tuple[float, float, float]:
    from benchmarks import whole_path  # the children do without it

    size = case.megabytes * MB // (4 if quick else 1)
    if case.datagram == FOUND:
        found = whole_path.measure(size)
    else:
        found = whole_path.measure_in_namespace(size, datagram=case.datagram)
    datagrams_a_mb = MB / (case.datagram - HEADERS)
    return (
        found["MB/s"],
        found["agent ms/MB"] * 1000 / datagrams_a_mb,
        found["gateway ms/MB"] * 1000 / datagrams_a_mb,
    )


def has_qh3() -> bool:
    python = os.environ.get("EDGESYNC_BENCH_QH3", sys.executable)
    return not subprocess.run(
        [python, "-c", "import qh3"], capture_output=True, check=False
    ).returncode


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


def run(repeats: int = 3, *, quick: bool = False, only: str = "") -> list[str]:
    """Rows for the benchmark table; runs of all cases alternate."""
    wanted = [case for case in CASES if not only or any(o in case.name for o in only.split(","))]
    rows = []
    if not has_qh3():
        wanted = [case for case in wanted if case.engine != "qh3"]
        rows.append("qh3: not measured, EDGESYNC_BENCH_QH3 names no interpreter that has it")
    if os.geteuid():
        wanted = [case for case in wanted if case.engine != "whole" or case.datagram == FOUND]
        rows.append("whole path at 1452 bytes: not measured, it needs root")
    results: dict[str, list[tuple[float, float, float]]] = {case.name: [] for case in wanted}
    with certificate() as folder:
        for _ in range(repeats):
            for case in wanted:
                results[case.name].append(measure(case, folder, quick=quick))
    middle = {
        name: tuple(statistics.median(column) for column in zip(*taken, strict=True))
        for name, taken in results.items()
    }
    for name, taken in results.items():
        rate, receiving, sending = middle[name]
        rates = [one[0] for one in taken]
        rows.append(
            f"{name:26} {rate:7.1f} MB/s [{min(rates):.1f}-{max(rates):.1f}]"
            f"  {receiving:6.1f} us/datagram receiving {sending:6.1f} sending"
        )
    for ours, theirs, bar in BARS:
        if ours in middle and theirs in middle:
            ratio = middle[ours][0] / middle[theirs][0]
            rows.append(f"{ours} = {ratio:.2f} x {theirs} (bar {bar:g})")
    for ours, theirs, receiving, sending in CPU_BARS:
        if ours in middle and theirs in middle:
            mine, other = middle[ours], middle[theirs]
            rows.append(
                f"CPU a datagram, {ours} / {theirs}: {mine[1] / other[1]:.2f} receiving (bar {receiving}),"
                f" {mine[2] / other[2]:.2f} sending (bar {sending})"
            )
    for name in ("20 Mbit/s to stock aioquic", "20 Mbit/s to bare"):
        if name in middle:
            rate, receiving, sending = middle[name]
            per_s = rate * MB / (1452 - HEADERS) / MB
            rows.append(
                f"{name}: {receiving * per_s:.1%} of a core receiving, {sending * per_s:.1%} sending"
            )
    seconds, mebibytes = import_cost()
    rows.append(
        f"import of the transport: {seconds * 1000:.0f} ms, {mebibytes:.1f} MiB"
        f" (Python {sys.version.split()[0]}, {os.cpu_count()} cores, medians of {repeats})"
    )
    return rows


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1].startswith("_"):
        _child(sys.argv[1], sys.argv[2:6], "".join(sys.argv[6:]))
        return
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transport")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a quarter of the bytes")
    parser.add_argument("--only", default="", help="parts of the names of rows, by comma")
    arguments = parser.parse_args()
    rows = run(arguments.repeat, quick=arguments.quick, only=arguments.only)
    print("\n".join(rows))


if __name__ == "__main__":
    main()
