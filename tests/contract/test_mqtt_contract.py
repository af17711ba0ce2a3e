"""What EdgeSync needs of any broker, held against the embedded one and a mosquitto configured as we print it."""

import asyncio
import contextlib
import random
import signal
import socket
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiomqtt
import pytest

from edgesync import limits
from edgesync.identity import Identity
from edgesync.io.mqtt import Incoming, MqttLink, Published, Will, client_context
from edgesync.wire import topics
from tests.contract.brokers import GATEWAY, MOSQUITTO, BrokerProcess, Fleet, until

KINDS = ["embedded", "mosquitto"]
MIB = 1024 * 1024


def started(kind: str, directory: Path) -> Iterator[BrokerProcess]:
    if kind == "mosquitto" and not Path(MOSQUITTO).exists():
        pytest.skip("mosquitto is not installed: the contract is held against the embedded broker")
    process = BrokerProcess(kind, Fleet(), directory)
    asyncio.run(process.start())
    yield process
    process.kill()


@pytest.fixture(scope="module", params=KINDS)
def broker(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[BrokerProcess]:
    """One for the whole module: tests use names of their own."""
    yield from started(request.param, tmp_path_factory.mktemp("broker"))


@pytest.fixture(params=KINDS)
def own_broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BrokerProcess]:
    """One for a test that hurts it."""
    yield from started(request.param, tmp_path)


@contextlib.asynccontextmanager
async def running(link: MqttLink) -> AsyncIterator[MqttLink]:
    task = asyncio.create_task(link.run())
    try:
        await asyncio.wait_for(link.wait_connected(), 10)
        yield link
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@contextlib.asynccontextmanager
async def raw(
    broker: BrokerProcess, identity: Identity, **options: object
) -> AsyncIterator[aiomqtt.Client]:
    """A client that may try what the link would not."""
    context = client_context(identity, lambda: {broker.fleet.gateway.key})
    settings: dict[str, object] = {"identifier": identity.name, "timeout": 5, **options}
    async with aiomqtt.Client("127.0.0.1", broker.port, tls_context=context, **settings) as client:
        yield client


def tls_socket(broker: BrokerProcess, identity: Identity | None) -> ssl.SSLSocket:
    if identity is None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        context = client_context(identity, lambda: {broker.fleet.gateway.key})
    sock = socket.create_connection(("127.0.0.1", broker.port), timeout=5)
    return context.wrap_socket(sock, server_hostname="127.0.0.1")


def connect_packet(
    client_id: str = "x", *, flags: int = 2, keepalive: int = 30, tail: bytes = b""
) -> bytes:
    name = client_id.encode()
    body = b"\0\4MQTT\4" + bytes([flags]) + keepalive.to_bytes(2) + len(name).to_bytes(2) + name
    body += tail
    return b"\x10" + length_bytes(len(body)) + body


def length_bytes(length: int) -> bytes:
    out = bytearray()
    while True:
        length, digit = divmod(length, 128)
        out.append(digit | (0x80 if length else 0))
        if not length:
            return bytes(out)


def closes(sock: ssl.SSLSocket, *, within_s: float = 5.0) -> bool:
    """Whether the other end hangs up; what it says before does not matter."""
    sock.settimeout(within_s)
    try:
        while sock.recv(4096):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


def connack(broker: BrokerProcess, identity: Identity | None) -> bytes:
    """What a CONNECT is answered; nothing when TLS already refuses, which TLS 1.3 tells with the first read."""
    try:
        with tls_socket(broker, identity) as sock:
            sock.sendall(connect_packet(identity.name if identity else "x"))
            return sock.recv(4)
    except OSError:
        return b""


async def collect(link: MqttLink, last: str) -> list[Incoming]:
    """Everything up to and with the message on topic ``last``."""
    got: list[Incoming] = []
    async with asyncio.timeout(10):
        async for message in link.messages():
            got.append(message)
            if str(message.topic) == last:
                break
    return got


# --- who may connect -------------------------------------------------------------------------------------------------


def test_a_client_without_certificate_is_refused(broker: BrokerProcess) -> None:
    assert not connack(broker, None)


def test_a_certificate_of_another_authority_is_refused(broker: BrokerProcess) -> None:
    stranger = broker.fleet.device("stranger", broker.fleet.rogue)
    assert not connack(broker, stranger)
    assert connack(broker, broker.fleet.device("stranger")) == b"\x20\2\0\0"


async def test_a_broker_with_another_key_is_refused_by_the_link(broker: BrokerProcess) -> None:
    link = broker.link(broker.fleet.device("picky"))
    link._tls = client_context(broker.fleet.device("picky"), set)
    task = asyncio.create_task(link.run())
    await until(lambda: "shows a key" in link.last_error)
    assert not link.connected
    task.cancel()


# --- who may say and hear what ---------------------------------------------------------------------------------------


async def test_a_device_writes_only_its_own_voice(broker: BrokerProcess) -> None:
    mine, other = broker.fleet.device("writer"), "victim"
    own = [topics.state, topics.progress, topics.report, topics.rsp]
    forbidden = [
        topics.assign("writer"),
        topics.cmd("writer"),
        topics.peers("writer"),
        *(make(other) for make in own),
        topics.presence(GATEWAY),
        topics.tuf_timestamp(GATEWAY),
        topics.bundle(GATEWAY, "0" * 64),
        topics.aggregate(GATEWAY, "rollouts"),
    ]
    listener = broker.link(broker.fleet.gateway, subscriptions=[("es1/#", 1)])
    async with running(listener), raw(broker, mine) as client:
        for topic in forbidden:
            await client.publish(topic, b"forged", qos=1)
        for make in own:
            await client.publish(make("writer"), b"true", qos=1)
        got = [m for m in await collect(listener, topics.rsp("writer")) if not m.retained]
    assert [str(m.topic) for m in got] == [make("writer") for make in own]


async def test_a_device_hears_only_its_own_and_the_gateways_topics(broker: BrokerProcess) -> None:
    device = broker.fleet.device("hearer")
    link = broker.link(device, subscriptions=[("es1/#", 1)])
    async with running(broker.link(broker.fleet.gateway)) as gateway, running(link):
        for topic in (
            topics.assign("somebody"),
            topics.cmd("somebody"),
            topics.peers("somebody"),
            topics.state("somebody"),
            topics.aggregate(GATEWAY, "rollouts"),
            topics.presence(GATEWAY),
            topics.tuf_root(GATEWAY, 1),
            topics.assign("hearer"),
            topics.peers("hearer"),
            topics.cmd("hearer"),
        ):
            assert await gateway.publish(topic, b"x", qos=1)
        got = [str(m.topic) for m in await collect(link, topics.cmd("hearer"))]
    assert [t for t in got if "/d/" in t] == [
        topics.assign("hearer"),
        topics.peers("hearer"),
        topics.cmd("hearer"),
    ]
    assert topics.presence(GATEWAY) in got
    assert topics.tuf_root(GATEWAY, 1) in got
    assert not any(t.startswith("es1/up") for t in got)


async def test_retained_messages_reach_late_subscribers_and_nobody_else(
    broker: BrokerProcess,
) -> None:
    device = broker.fleet.device("late")
    async with running(broker.link(broker.fleet.gateway)) as gateway:
        for topic in (topics.assign("late"), topics.assign("not-late"), topics.caps(GATEWAY)):
            assert await gateway.publish(topic, b"kept", qos=1, retain=True)
        async with running(broker.link(device)) as link:
            got = {str(m.topic): m for m in await collect(link, topics.assign("late"))}
            assert got[topics.assign("late")].retained
            assert topics.assign("not-late") not in got
        async with running(broker.link(device, subscriptions=[])) as link:
            assert await link.publish(topics.progress("late"), b"x", qos=1)
            assert len(link.inbox) == 0
        assert await gateway.publish(topics.assign("late"), b"", qos=1, retain=True)
        async with running(broker.link(device, subscriptions=[(topics.assign("late"), 1)])) as link:
            assert await link.publish(topics.progress("late"), b"x", qos=1)
            assert await gateway.publish(topics.assign("late"), b"new", qos=1)
            assert [m.payload for m in await collect(link, topics.assign("late"))] == [b"new"]


# --- last wills ------------------------------------------------------------------------------------------------------


async def test_a_will_is_said_for_who_vanished_and_not_for_who_left(broker: BrokerProcess) -> None:
    gateway = broker.link(broker.fleet.gateway, subscriptions=[("es1/d/+/state", 1)])
    said: set[tuple[str, bytes]] = set()

    async def listen() -> None:
        async for message in gateway.messages():
            said.add((message.topic.owner, message.payload))

    async with running(gateway):
        listening = asyncio.create_task(listen())
        for name, leaves in (("leaver", True), ("vanisher", False)):
            will = aiomqtt.Will(topics.state(name), b"gone", 1, retain=True)
            async with raw(broker, broker.fleet.device(name), will=will) as client:
                await client.publish(topics.state(name), b"here", qos=1, retain=True)
                await until(lambda name=name: (name, b"here") in said)
                if not leaves:
                    client._client.socket().shutdown(socket.SHUT_RDWR)
                    with pytest.raises(aiomqtt.MqttError):
                        async for _ in client.messages:
                            pass
        await until(lambda: ("vanisher", b"gone") in said)
        listening.cancel()
    assert ("leaver", b"gone") not in said
    late = broker.link(broker.fleet.gateway, subscriptions=[(topics.state("vanisher"), 1)])
    async with running(late):
        (message,) = await collect(late, topics.state("vanisher"))
    assert (message.payload, message.retained) == (b"gone", True)


async def test_a_will_on_a_foreign_topic_is_never_said(broker: BrokerProcess) -> None:
    forger = broker.fleet.device("forger")
    watcher = broker.link(broker.fleet.gateway, subscriptions=[("es1/#", 1)])
    async with running(watcher):
        will = aiomqtt.Will(topics.presence(GATEWAY), b"forged", 1, retain=True)
        try:
            async with raw(broker, forger, will=will) as client:
                client._client.socket().shutdown(socket.SHUT_RDWR)
        except aiomqtt.MqttError:
            pass  # the embedded broker refuses such a CONNECT
        async with raw(broker, forger) as client:
            await client.publish(topics.rsp("forger"), b"end", qos=1)
        got = await collect(watcher, topics.rsp("forger"))
    assert b"forged" not in [m.payload for m in got]


async def test_a_silent_client_is_closed_and_its_will_is_said(broker: BrokerProcess) -> None:
    mute = broker.fleet.device("mute")
    gateway = broker.link(broker.fleet.gateway, subscriptions=[(topics.state("mute"), 1)])
    topic = topics.state("mute").encode()
    tail = len(topic).to_bytes(2) + topic + (4).to_bytes(2) + b"gone"
    async with running(gateway):
        sock = await asyncio.to_thread(tls_socket, broker, mute)
        sock.sendall(connect_packet("mute", flags=2 | 4 | 8, keepalive=1, tail=tail))
        began = time.monotonic()
        assert sock.recv(4) == b"\x20\2\0\0"
        (message,) = await asyncio.wait_for(collect(gateway, topics.state("mute")), 12)
        assert message.payload == b"gone"
        assert time.monotonic() - began >= 1.0
        sock.close()


# --- sessions --------------------------------------------------------------------------------------------------------


async def test_a_client_id_steals_no_session(broker: BrokerProcess) -> None:
    owner, thief = broker.fleet.device("owner"), broker.fleet.device("thief")
    async with (
        running(broker.link(broker.fleet.gateway)) as gateway,
        running(broker.link(owner)) as link,
    ):
        filters = [(topics.cmd("owner"), 1), (topics.cmd("thief"), 1)]
        stolen: list[str] = []
        async with raw(broker, thief, identifier="owner", username="owner") as client:
            await client.subscribe(filters)
            assert await gateway.publish(topics.cmd("owner"), b"order", qos=1)
            assert await gateway.publish(topics.cmd("thief"), b"order", qos=1)
            async for message in client.messages:
                stolen.append(str(message.topic))
                if stolen[-1] == topics.cmd("thief"):
                    break
        assert stolen == [topics.cmd("thief")]
        assert link.connected
        assert (await collect(link, topics.cmd("owner")))[-1].payload == b"order"


async def test_the_same_certificate_takes_over(broker: BrokerProcess) -> None:
    device = broker.fleet.device("twice")
    first = tls_socket(broker, device)
    first.sendall(connect_packet("twice"))
    assert first.recv(4) == b"\x20\2\0\0"
    second = tls_socket(broker, device)
    second.sendall(connect_packet("twice"))
    assert second.recv(4) == b"\x20\2\0\0"
    assert closes(first)
    second.sendall(b"\xc0\0")
    assert second.recv(2) == b"\xd0\0"


async def test_every_acknowledged_report_arrives(broker: BrokerProcess) -> None:
    device = broker.fleet.device("busy")
    filters = [(topics.report("busy"), 1)]
    async with running(broker.link(broker.fleet.gateway, subscriptions=filters)) as gateway:
        async with running(broker.link(device)) as link:
            sent = await asyncio.gather(
                *(
                    link.publish(topics.report("busy"), f"{n:03}".encode() * 300, qos=1)
                    for n in range(200)
                )
            )
        assert all(sent)
        got = set()
        async with asyncio.timeout(10):
            async for message in gateway.messages():
                got.add(int(message.payload[:3]))
                if len(got) == 200:
                    break


async def test_the_link_comes_back_after_the_broker_was_killed(own_broker: BrokerProcess) -> None:
    device = own_broker.fleet.device("stayer")
    connects = 0

    async def again() -> None:
        nonlocal connects
        connects += 1
        assert await gateway.publish(topics.assign("stayer"), b"%d" % connects, qos=1, retain=True)

    gateway = own_broker.link(own_broker.fleet.gateway, on_connect=again)
    async with running(gateway), running(own_broker.link(device)) as link:
        assert (await collect(link, topics.assign("stayer")))[-1].payload == b"1"
        own_broker.kill()
        await until(lambda: not link.connected and not gateway.connected)
        assert link.last_error
        assert await link.publish(topics.report("stayer"), b"x", qos=1) is Published.NOT_CONNECTED
        await own_broker.start()
        async with asyncio.timeout(10):
            await link.wait_connected()
            await gateway.wait_connected()
        assert (await collect(link, topics.assign("stayer")))[-1].payload == b"2"


async def test_publish_does_not_hang_on_a_broker_that_stopped(own_broker: BrokerProcess) -> None:
    device = own_broker.fleet.device("patient")
    async with running(own_broker.link(device)) as link:
        own_broker.signal(signal.SIGSTOP)
        began = time.monotonic()
        results = await asyncio.gather(
            *(link.publish(topics.report("patient"), b"x", qos=1, timeout_s=0.5) for _ in range(50))
        )
        assert time.monotonic() - began < 3
        assert not any(results)
        own_broker.kill()
        await until(lambda: not link.connected)


# --- hostile clients -------------------------------------------------------------------------------------------------


def test_an_oversized_packet_closes_the_connection(broker: BrokerProcess) -> None:
    before = broker.rss_bytes()
    for size in (limits.MAX_MQTT_PACKET_BYTES + 100, 1 * MIB, 200 * MIB):
        sock = tls_socket(broker, broker.fleet.device("heavy"))
        sock.sendall(connect_packet("heavy"))
        assert sock.recv(4) == b"\x20\2\0\0"
        topic = topics.report("heavy").encode()
        head = len(topic).to_bytes(2) + topic
        with contextlib.suppress(OSError):
            sock.sendall(b"\x30" + length_bytes(size) + head)
            for _ in range(16):
                sock.sendall(bytes(64 * 1024))
        assert closes(sock)
    assert broker.rss_bytes() - before < 10 * MIB
    assert broker.alive


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"\x10\x00",
        b"\x10\x02\x00\x04",
        b"\xff" * 64,
        b"\x00" * 64,
        b"\x10\xff\xff\xff\xff\xff",
        b"\x10\xff\xff\xff\x7f" + bytes(1024),
        b"\x30\x05\x00\x01a00",
        connect_packet("x")[:-1],
        connect_packet("x", flags=0xFF),
        connect_packet("x", flags=2 | 4),
        connect_packet("x", flags=2 | 4 | 0x18, tail=b"\0\1a\0\1b"),
        connect_packet("x", flags=3),
        connect_packet("x").replace(b"MQTT\4", b"MQTT\x09"),
        connect_packet("x").replace(b"MQTT\4", b"EVIL\4"),
        connect_packet("\ufffd" * 20).replace(b"\xef\xbf\xbd", b"\xff\xfe\xfd"),
        connect_packet("x", flags=2 | 0x80 | 0x40, tail=b"\xff\xff"),
    ],
    ids=range(17),
)
def test_a_hostile_connect_hurts_nobody_else(broker: BrokerProcess, packet: bytes) -> None:
    hostile = tls_socket(broker, broker.fleet.device("hostile"))
    with contextlib.suppress(OSError):
        hostile.sendall(packet)
        hostile.shutdown(socket.SHUT_WR)
    assert closes(hostile)
    good = tls_socket(broker, broker.fleet.device("good"))
    good.sendall(connect_packet("good"))
    assert good.recv(4) == b"\x20\2\0\0"
    good.close()


def test_garbage_after_connect_ends_only_its_sender(broker: BrokerProcess) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    device = broker.fleet.device("garbler")
    for _ in range(40):
        sock = tls_socket(broker, device)
        sock.sendall(connect_packet("garbler"))
        assert sock.recv(4) == b"\x20\2\0\0"
        kind = rng.choice([0x00, 0x20, 0x30, 0x32, 0x34, 0x36, 0x40, 0x82, 0x80, 0x90, 0xA2, 0xF0])
        body = rng.randbytes(rng.randrange(64))
        with contextlib.suppress(OSError):
            sock.sendall(bytes([kind]) + length_bytes(len(body)) + body)
        sock.close()
    assert broker.alive


def test_two_hundred_garbage_connections_cost_little(broker: BrokerProcess) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    before = broker.rss_bytes()
    open_sockets = []
    for _ in range(200):
        sock = socket.create_connection(("127.0.0.1", broker.port), timeout=5)
        with contextlib.suppress(OSError):
            sock.sendall(rng.randbytes(rng.randrange(1, 4000)))
        open_sockets.append(sock)
    half_open = [
        socket.create_connection(("127.0.0.1", broker.port), timeout=5) for _ in range(200)
    ]
    growth = broker.rss_bytes() - before
    for sock in open_sockets + half_open:
        sock.close()
    assert growth < 15 * MIB
    deadline = time.monotonic() + 10
    good = broker.fleet.device("after-garbage")
    while True:
        try:
            sock = tls_socket(broker, good)
            sock.sendall(connect_packet("after-garbage"))
            assert sock.recv(4) == b"\x20\2\0\0"
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        else:
            break


async def test_a_will_over_the_cap_never_leaves_the_link(broker: BrokerProcess) -> None:
    big = Will(topics.state("wordy"), bytes(limits.MAX_STATE_BYTES + 1))
    link = broker.link(broker.fleet.device("wordy"), will=big)
    task = asyncio.create_task(link.run())
    await until(lambda: "at most" in link.last_error)
    task.cancel()
