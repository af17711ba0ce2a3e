"""Peers that stall, lie, vanish or move; callers that give up. Nothing leaks and every end has its class of error."""

import asyncio
import contextlib
import gc
import hashlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator

import pytest

from edgesync import limits
from edgesync.errors import (
    EdgeSyncError,
    ErrorCode,
    LimitExceededError,
    MalformedMessageError,
    NotAuthorizedError,
    PeerBusyError,
    PeerTimeoutError,
    PeerUnreachableError,
    ProtocolError,
    TransportError,
    UnexpectedMessageError,
    VersionMismatchError,
)
from edgesync.identity import Identity, certificate_id, certificate_key
from edgesync.ids import Digest, PeerIdentity, PieceId
from edgesync.testing.hostile_quic import HostileQuic
from edgesync.testing.transport import TestFleet, TestHandler, TestPeer, gathered
from edgesync.transport.endpoint import (
    Endpoint,
    EndpointConfig,
    PeerConnection,
    PieceAnswer,
    surviving,
)
from edgesync.transport.quic import BoundedQuicConnection
from edgesync.wire import codec
from edgesync.wire.messages import (
    Blob,
    Fetch,
    Interested,
    Join,
    PieceHeader,
    Request,
    Versions,
    Welcome,
)

MANIFEST = Digest("ab" * 32)


@pytest.fixture
async def fleet() -> AsyncIterator[TestFleet]:
    async for fleet in _fleet(over_tls=False):
        yield fleet


@pytest.fixture(params=[False, True], ids=["quic", "tls"])
async def either(request: pytest.FixtureRequest) -> AsyncIterator[TestFleet]:
    """A fleet for what must hold whatever carries it."""
    async for fleet in _fleet(over_tls=bool(request.param)):
        yield fleet


async def _fleet(*, over_tls: bool) -> AsyncIterator[TestFleet]:
    before = asyncio.all_tasks()
    async with TestFleet(over_tls=over_tls) as fleet:
        yield fleet
    leaked = asyncio.all_tasks() - before - {asyncio.current_task()}
    assert not leaked, leaked


async def eventually(condition: object, timeout_s: float = 10.0) -> None:
    assert callable(condition)
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - conditions here are plain reads
            await asyncio.sleep(0.01)


# --- dialing


async def test_nobody_listens(fleet: TestFleet) -> None:
    peer = await fleet.device("a")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        address = sock.getsockname()
    started = asyncio.get_running_loop().time()
    with pytest.raises(PeerUnreachableError):
        await peer.endpoint.connect(address, timeout_s=5)
    assert asyncio.get_running_loop().time() - started < 2, "ICMP was not heard"


async def test_nobody_answers(fleet: TestFleet) -> None:
    peer = await fleet.device("a")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        with pytest.raises(PeerTimeoutError):
            await peer.endpoint.connect(sock.getsockname(), timeout_s=0.3)


async def test_giving_up_a_dial_leaves_no_error_unheard(fleet: TestFleet) -> None:
    peer = await fleet.device("a")
    unheard: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: unheard.append(context))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        where = sock.getsockname()
        with pytest.raises(PeerTimeoutError):
            await peer.endpoint.connect(where, timeout_s=0.1)
        task = asyncio.create_task(peer.endpoint.connect(where, timeout_s=10))
        await eventually(lambda: bool(select.select([sock], [], [], 0)[0]))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    del task
    gc.collect()
    await asyncio.sleep(0)
    assert not unheard


async def test_names_that_lead_nowhere(fleet: TestFleet) -> None:
    peer = await fleet.device("a")
    with pytest.raises(PeerUnreachableError):
        await peer.endpoint.connect(("host.invalid", 1), timeout_s=5)
    with pytest.raises(PeerUnreachableError):
        await peer.endpoint.connect(("::1", 1), timeout_s=5)


async def test_another_key_answers(either: TestFleet) -> None:
    a, b, c = await either.device("a"), await either.device("b"), await either.device("c")
    with pytest.raises(NotAuthorizedError):
        await a.endpoint.connect(b.address, expected_key=c.identity.key, over_tls=either.over_tls)
    assert b.handler.connections.empty()


async def test_no_joins_at_a_device(either: TestFleet) -> None:
    a, b = await either.device("a"), await either.device("b")
    with pytest.raises((VersionMismatchError, ProtocolError)):
        await a.endpoint.join(b.address, expected_key=b.identity.key, over_tls=either.over_tls)


async def test_a_refused_join(either: TestFleet) -> None:
    a, hub = await either.stranger("a"), await either.gateway("hub")
    conn = await a.endpoint.join(
        hub.address, expected_key=hub.identity.key, over_tls=either.over_tls
    )
    answer = await conn.ask(
        Join(
            token_id="abcdefgh",
            secret=bytes(16),
            public_key=bytes(32),
            signature=bytes(64),
            device_id="a",
        )
    )
    assert type(answer).__name__ == "JoinRefused"
    with pytest.raises(EdgeSyncError):
        await conn.fetch("root/1", 100)


@pytest.mark.parametrize("moment", [0.0, 0.002, 0.005, 0.01, 0.02, 0.04])
async def test_a_dial_can_be_cancelled_at_any_time(either: TestFleet, moment: float) -> None:
    a, b = await either.device("a"), await either.device("b")
    task = asyncio.create_task(a.connect(b))
    await asyncio.sleep(moment)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await eventually(lambda: b.endpoint.stats().unproven == 0)
    if task.cancelled():
        await eventually(lambda: not b.endpoint.connections and not a.endpoint.connections)
        assert a.endpoint.stats().budget_used == 0


async def test_more_dials_at_once_than_strangers_are_let_in(either: TestFleet) -> None:
    hub = await either.gateway("hub")
    peers = [await either.device(f"d{n}") for n in range(12)]
    conns = await asyncio.gather(*(p.connect(hub, timeout_s=10) for p in peers))
    assert len({c.peer.key for c in conns}) == 1
    assert len(hub.endpoint.connections) == 12


async def test_a_full_house_says_so(either: TestFleet) -> None:
    hub = await either.gateway("hub", EndpointConfig(role="gateway", max_connections=1))
    first, second = await either.device("a"), await either.device("b")
    conn = await first.connect(hub)
    with pytest.raises(PeerBusyError) as caught:
        await second.connect(hub)
    assert caught.value.retry_after_s == 5.0
    await conn.close()
    await eventually(lambda: not hub.endpoint.connections)
    await second.connect(hub)


async def test_both_dial_each_other_and_keep_the_same_one(either: TestFleet) -> None:
    a, b = await either.device("a"), await either.device("b")
    from_a, from_b = await asyncio.gather(a.connect(b), b.connect(a))
    at_a = [await a.handler.next_connection() for _ in range(2)]
    at_b = [await b.handler.next_connection() for _ in range(2)]
    keep_a, drop_a = surviving(a.identity.key, at_a[0], at_a[1])
    keep_b, drop_b = surviving(b.identity.key, at_b[0], at_b[1])
    assert (keep_a is from_a) == (keep_b is not from_b), "both ends keep the same connection"
    await drop_a.close(ErrorCode.DUPLICATE)
    await drop_b.close(ErrorCode.DUPLICATE)
    await asyncio.sleep(0.05)
    ids = [b.shelf.put(b"x")]
    assert (await gathered(keep_a.request(MANIFEST, ids)))[0].data == b"x"


async def test_many_sessions_of_one_member_close_its_oldest(either: TestFleet) -> None:
    hub = await either.gateway("hub")
    a = await either.device("a")
    conns = [await a.connect(hub) for _ in range(limits.MAX_CONNECTIONS_PER_KEY + 1)]
    await asyncio.wait_for(conns[0].closed.wait(), 5)
    assert all(not c.closed.is_set() for c in conns[1:])


# --- trust changes


async def test_a_banned_member_is_out_at_once(either: TestFleet) -> None:
    a, b, c = await either.device("a"), await either.device("b"), await either.device("c")
    bad, good = await a.connect(b), await c.connect(b)
    either.banned.add(a.identity.key)
    await b.endpoint.rejudge()
    assert isinstance(await a.handler.next_end(), NotAuthorizedError)
    assert isinstance(await b.handler.next_end(), NotAuthorizedError)
    assert bad.closed.is_set()
    assert not good.closed.is_set()


# --- streams


class Slow(TestHandler):
    """Serves one piece and then waits."""

    async def serve(self, conn: PeerConnection, request: Request) -> AsyncIterator[PieceAnswer]:
        del conn
        yield PieceAnswer(PieceId(request.pieces[0]), data=b"first")
        await asyncio.Event().wait()


class Broken(TestHandler):
    async def serve(self, conn: PeerConnection, request: Request) -> AsyncIterator[PieceAnswer]:
        del conn, request
        raise RuntimeError("our own mistake")
        yield


def with_handler(peer: TestPeer, handler: TestHandler) -> None:
    peer.endpoint.handler = handler
    for connection in peer.endpoint.connections:
        connection._handler = handler


async def test_a_peer_that_stalls_is_given_up(either: TestFleet) -> None:
    a, b = await either.device("a"), await either.device("b")
    conn = await a.connect(b)
    await b.handler.next_connection()
    with_handler(b, Slow())
    answers = conn.request(MANIFEST, [PieceId(bytes(32)), PieceId(b"1" * 32)], stall_s=0.2)
    assert (await anext(answers)).data == b"first"
    with pytest.raises(PeerTimeoutError):
        await anext(answers)
    assert not conn.closed.is_set(), "a slow peer is not a bad one"


async def test_a_mistake_of_the_handler_costs_the_stream_alone(either: TestFleet) -> None:
    a, b = await either.device("a"), await either.device("b")
    conn = await a.connect(b)
    await b.handler.next_connection()
    old = b.handler
    with_handler(b, Broken())
    with pytest.raises(TransportError):
        await gathered(conn.request(MANIFEST, [PieceId(bytes(32))]))
    with_handler(b, old)
    assert (await gathered(conn.request(MANIFEST, [old.shelf.put(b"x")])))[0].data == b"x"


async def test_leaving_a_request_early_ends_it_at_both_ends(either: TestFleet) -> None:
    a, b = await either.device("a"), await either.device("b")
    ids = [b.shelf.put(os.urandom(100_000)) for _ in range(100)]
    conn = await a.connect(b)
    other = await b.handler.next_connection()
    for _ in range(20):
        answers = conn.request(MANIFEST, ids, max_piece_bytes=100_000)
        await anext(answers)
        await answers.aclose()
    await eventually(lambda: not other.wanted)
    got = await gathered(conn.request(MANIFEST, ids, max_piece_bytes=100_000))
    assert len(got) == 100
    await eventually(lambda: a.endpoint.stats().budget_used == a.endpoint.config.base_window())


@pytest.mark.parametrize("moment", [0.0, 0.001, 0.003, 0.01, 0.03, 0.1])
async def test_a_request_can_be_cancelled_at_any_time(either: TestFleet, moment: float) -> None:
    a, b = await either.device("a"), await either.device("b")
    ids = [b.shelf.put(os.urandom(100_000)) for _ in range(50)]
    conn = await a.connect(b)
    other = await b.handler.next_connection()
    task = asyncio.create_task(gathered(conn.request(MANIFEST, ids, max_piece_bytes=100_000)))
    await asyncio.sleep(moment)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await eventually(lambda: not other.wanted)
    assert len(await gathered(conn.request(MANIFEST, ids, max_piece_bytes=100_000))) == 50
    assert a.endpoint.stats().budget_used == a.endpoint.config.base_window()


async def test_an_asker_that_does_not_read_holds_the_server_back(either: TestFleet) -> None:
    a, b = await either.device("a"), await either.device("b")
    ids = [b.shelf.put(os.urandom(100_000)) for _ in range(200)]
    conn = await a.connect(b)
    other = await b.handler.next_connection()
    answers = conn.request(MANIFEST, ids, max_piece_bytes=100_000)
    await anext(answers)
    await asyncio.sleep(0.5)  # nothing to wait for: the point is that nothing more happens
    # What the window lets through, the same again unacknowledged, and the pieces on their way into either.
    assert other.bytes_out <= 2 * limits.FIRST_ANSWER_WINDOW_BYTES + 5 * 100_000
    rest = [answer async for answer in answers]
    assert len(rest) == 199


async def test_requests_do_not_starve_each_other(either: TestFleet) -> None:
    a, b = await either.device("a"), await either.device("b")
    ids = [b.shelf.put(os.urandom(60_000)) for _ in range(30)]
    conn = await a.connect(b)
    stuck = conn.request(MANIFEST, ids, max_piece_bytes=60_000)
    await anext(stuck)
    for _ in range(3):
        got = await gathered(conn.request(MANIFEST, ids, max_piece_bytes=60_000))
        assert len(got) == 30
    await stuck.aclose()


async def test_more_requests_than_streams_wait_their_turn(either: TestFleet) -> None:
    a, b = await either.device("a"), await either.device("b")
    ids = [b.shelf.put(os.urandom(5_000)) for _ in range(10)]
    conn = await a.connect(b)
    got = await asyncio.gather(
        *(gathered(conn.request(MANIFEST, ids, max_piece_bytes=5_000)) for _ in range(40))
    )
    assert all(len(answers) == 10 for answers in got)


async def test_a_small_budget_only_slows(either: TestFleet) -> None:
    config = EndpointConfig(budget_bytes=2_000_000, max_connections=10)
    a, b = await either.device("a", config), await either.device("b")
    ids = [b.shelf.put(os.urandom(200_000)) for _ in range(10)]
    conn = await a.connect(b)
    peak = 0

    async def one() -> int:
        nonlocal peak
        count = 0
        async for _ in conn.request(MANIFEST, ids, max_piece_bytes=300_000):
            peak = max(peak, a.endpoint.budget.used)
            count += 1
        return count

    assert await asyncio.gather(*(one() for _ in range(6))) == [10] * 6
    assert peak <= 2_000_000


# --- lies


async def hostile(fleet: TestFleet, target: TestPeer) -> HostileQuic:
    client = HostileQuic(target.address)
    await client.handshake()
    await client.prove(fleet.member("mallory"))
    return client


@pytest.mark.parametrize(
    ("stream_id", "data", "code"),
    [
        (0, b"\x00\x00\x00\x03abc", ErrorCode.MALFORMED),
        (0, b"\xff\xff\xff\xff", ErrorCode.LIMIT),
        (0, codec.encode(Welcome()), ErrorCode.UNEXPECTED),
        (0, codec.encode(Blob(length=1)), ErrorCode.UNEXPECTED),
        (4, b"\x00\x00\x00\x00", ErrorCode.LIMIT),
        (4, b"\x00\x00\x00\x02\xc1\xc1", ErrorCode.MALFORMED),
        (4, codec.encode(Interested(manifest=bytes(32))), ErrorCode.UNEXPECTED),
        (4, codec.encode(Fetch(name="timestamp")) + b"more", ErrorCode.LIMIT),
    ],
)
async def test_garbage_closes_with_its_code(
    fleet: TestFleet, stream_id: int, data: bytes, code: ErrorCode
) -> None:
    victim = await fleet.device("victim")
    async with await hostile(fleet, victim) as client:
        client.send(stream_id, data)
        end = await client.wait_ended()
        assert end.frame_type is None
        assert end.error_code == code
    assert isinstance(await victim.handler.next_end(), ProtocolError)


async def test_a_stranger_may_not_ask(fleet: TestFleet) -> None:
    victim = await fleet.device("victim")
    async with HostileQuic(victim.address) as client:
        await client.handshake()
        client.send(0, codec.encode(Fetch(name="timestamp")), end=True)
        end = await client.wait_ended()
        assert end.error_code == ErrorCode.UNEXPECTED
    async with HostileQuic(victim.address) as client:
        await client.handshake()
        client.stream_frame(4, 0, codec.encode(Fetch(name="timestamp")))
        end = await client.wait_ended()
        assert end.frame_type is not None, "the second stream is refused by QUIC itself"


async def test_silence_before_the_proof_ends_after_five_seconds(fleet: TestFleet) -> None:
    victim = await fleet.device("victim")
    async with HostileQuic(victim.address) as client:
        await client.handshake()
        assert victim.endpoint.stats().unproven == 1
        end = await client.wait_ended(8)
        assert end.error_code == ErrorCode.TIMEOUT
        assert victim.endpoint.stats().unproven == 0


ASKED = PieceId(b"p" * 32)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (codec.encode(PieceHeader(piece=b"q" * 32, encoding="identity", length=5)), ProtocolError),
        (
            codec.encode(PieceHeader(piece=ASKED, encoding="identity", length=50_000_000)),
            LimitExceededError,
        ),
        (
            codec.encode(PieceHeader(piece=ASKED, encoding="identity", length=5)) + b"12345EXTRA",
            LimitExceededError,
        ),
        (codec.encode(Welcome()), UnexpectedMessageError),
        (b"\x00\x00\x00\x05nonse", MalformedMessageError),
        (b"\x7f\xff\xff\xff", LimitExceededError),
    ],
)
async def test_a_lying_server_is_dropped(
    fleet: TestFleet, raw: bytes, expected: type[EdgeSyncError]
) -> None:
    a, b = await fleet.device("a"), await fleet.device("b")
    conn = await a.connect(b)
    other = await b.handler.next_connection()

    class Liar(TestHandler):
        async def serve(self, conn: PeerConnection, request: Request) -> AsyncIterator[PieceAnswer]:
            del request
            stream = max(conn._link._streams.values(), key=lambda s: s.id)
            stream.write(raw)
            await asyncio.Event().wait()
            yield PieceAnswer(ASKED)

    with_handler(b, Liar())
    with pytest.raises(expected):
        await gathered(conn.request(MANIFEST, [ASKED], max_piece_bytes=100_000))
    await asyncio.wait_for(other.closed.wait(), 5)
    assert conn.closed.is_set()


# --- vanishing and moving


@pytest.fixture
def server_process() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "edgesync.testing.victim", "device"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.wait()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    process.stdout.close()


async def test_a_peer_killed_in_the_middle(server_process: subprocess.Popen[str]) -> None:
    assert server_process.stdout is not None
    told = json.loads(await asyncio.to_thread(server_process.stdout.readline))
    identity = Identity.from_pem(told["key_pem"].encode(), told["certificate_pem"].encode())
    endpoint = await Endpoint.open(
        host="127.0.0.1",
        port=0,
        identity=identity,
        judge=lambda der: PeerIdentity("device", certificate_id(der), certificate_key(der)),
        handler=TestHandler(),
        config=EndpointConfig(),
    )
    try:
        conn = await endpoint.connect(("127.0.0.1", told["port"]))
        pieces = [PieceId(hashlib.sha256(b"%d" % n).digest()) for n in range(256)]
        answers = conn.request(MANIFEST, pieces, max_piece_bytes=262_144, stall_s=1.0)
        for _ in range(5):
            await anext(answers)
        server_process.send_signal(signal.SIGKILL)
        with pytest.raises(TransportError):
            async for _ in answers:
                pass
    finally:
        await endpoint.close()


class Nat:
    """A UDP relay that can start sending from another port, as a NAT box that lost its table."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.loop = asyncio.get_running_loop()
        self.front = self._socket(self._from_client)
        self.back = self._socket(self._from_server)
        self.client: object = None
        self.old: list[socket.socket] = []

    def _socket(self, reader: object) -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**21)
        sock.bind(("127.0.0.1", 0))
        sock.setblocking(False)
        self.loop.add_reader(sock.fileno(), reader)
        return sock

    def _from_client(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                data, self.client = self.front.recvfrom(2048)
                self.back.sendto(data, self.target)

    def _from_server(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                data, _ = self.back.recvfrom(2048)
                if self.client is not None:
                    self.front.sendto(data, self.client)

    def rebind(self) -> None:
        self.loop.remove_reader(self.back.fileno())
        self.old.append(self.back)
        self.back = self._socket(self._from_server)

    def close(self) -> None:
        for sock in (self.front, self.back):
            self.loop.remove_reader(sock.fileno())
        for sock in (self.front, self.back, *self.old):
            sock.close()


async def test_a_nat_that_forgets_does_not_end_a_transfer(fleet: TestFleet) -> None:
    a, b = await fleet.device("a"), await fleet.device("b")
    ids = [b.shelf.put(os.urandom(50_000)) for _ in range(120)]
    nat = Nat(b.address)
    try:
        conn = await a.endpoint.connect(nat.front.getsockname(), expected_key=b.identity.key)
        other = await b.handler.next_connection()
        before = other.address
        count = 0
        async for _ in conn.request(MANIFEST, ids, max_piece_bytes=50_000):
            count += 1
            if count in {20, 60}:
                nat.rebind()
        assert count == 120
        assert other.address != before
    finally:
        nat.close()


async def test_closing_while_everything_runs(either: TestFleet) -> None:
    a, b = await either.device("a"), await either.device("b")
    ids = [b.shelf.put(os.urandom(50_000)) for _ in range(200)]
    conn = await a.connect(b)
    transfers = [
        asyncio.create_task(gathered(conn.request(MANIFEST, ids, max_piece_bytes=50_000)))
        for _ in range(4)
    ]
    await asyncio.sleep(0.05)
    await b.endpoint.close()
    for outcome in await asyncio.gather(*transfers, return_exceptions=True):
        assert isinstance(outcome, TransportError)
    assert isinstance(await a.handler.next_end(), PeerUnreachableError)
    with pytest.raises(EdgeSyncError):
        await conn.send(Versions(root_version=1, timestamp_version=1))
    with pytest.raises(TransportError):
        await b.connect(a)


async def test_what_is_closed_is_freed(either: TestFleet) -> None:
    a, b = await either.device("a"), await either.device("b")
    gc.collect()
    gc.disable()
    try:
        for _ in range(5):
            conn = await a.connect(b)
            await conn.close()
            await eventually(lambda: not b.endpoint.connections)
        del conn
        held = [o for o in gc.get_objects() if isinstance(o, BoundedQuicConnection)]
        heavy = [q for q in held if q._streams or q._crypto_buffers or q._cryptos]
        assert not heavy
        del held, heavy
    finally:
        gc.enable()
