"""The parts of the link that need no broker: its inbox, its URLs, and how it waits."""

import asyncio
import contextlib
import random
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable

import pytest

from edgesync.config import HostPort
from edgesync.errors import ConfigError, EdgeSyncError
from edgesync.ids import DeviceId, GatewayId
from edgesync.io.broker_url import BrokerAddress, parse_broker_url
from edgesync.io.mqtt import Inbox, Incoming, LinkConfig, MqttLink, Published
from edgesync.wire import topics

STATE = topics.parse(topics.state(DeviceId("a")))
OTHER = topics.parse(topics.state(DeviceId("b")))
REPORT = topics.parse(topics.report(DeviceId("a")))
PROGRESS = topics.parse(topics.progress(DeviceId("a")))


async def until(condition: Callable[[], bool], *, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the awaited state did not come"
        await asyncio.sleep(0.005)


def message(topic: topics.Topic, payload: bytes = b"x") -> Incoming:
    return Incoming(topic, payload, retained=False)


async def test_the_newest_state_and_every_report_wait() -> None:
    inbox = Inbox(max_messages=10, max_bytes=100)
    for number in range(3):
        payload = b"%d" % number
        for topic in (STATE, REPORT, PROGRESS):
            assert inbox.put(message(topic, payload))
    assert len(inbox) == 5
    got = [await inbox.get() for _ in range(5)]
    assert [(one.topic.kind, one.payload) for one in got] == [
        ("state", b"2"),
        ("report", b"0"),
        ("progress", b"2"),
        ("report", b"1"),
        ("report", b"2"),
    ]
    assert len(inbox) == 0


async def test_an_overflow_is_counted_and_what_was_retained_is_asked_for_again() -> None:
    inbox = Inbox(max_messages=2, max_bytes=10)
    assert inbox.put(message(REPORT))
    assert inbox.put(message(REPORT))
    assert not inbox.put(message(REPORT))
    assert (inbox.dropped, inbox.missed_retained) == (1, False)
    assert not inbox.put(message(STATE))
    assert (inbox.dropped, inbox.missed_retained) == (2, True)
    await inbox.get()
    assert inbox.put(message(STATE, b"12345"))
    assert inbox.put(message(STATE, b"123456789"))
    assert not inbox.put(message(OTHER, b"1"))
    assert [(await inbox.get()).payload for _ in range(2)] == [b"x", b"123456789"]
    assert inbox.put(message(OTHER, b"0123456789"))


async def test_a_reader_waits_for_the_next_message() -> None:
    inbox = Inbox(max_messages=2, max_bytes=10)
    waiting = asyncio.ensure_future(inbox.get())
    await asyncio.sleep(0)
    assert not waiting.done()
    inbox.put(message(REPORT))
    assert (await waiting).topic == REPORT


@pytest.mark.parametrize(
    ("url", "host", "port", "tls"),
    [
        ("mqtts://broker.example", "broker.example", 8883, True),
        ("mqtts://10.0.0.1:18883/", "10.0.0.1", 18883, True),
        ("mqtts://[fd00::1]:1", "fd00::1", 1, True),
        ("mqtt://127.0.0.2", "127.0.0.2", 1883, False),
        ("mqtt://[::1]:7", "::1", 7, False),
        ("mqtt://localhost", "localhost", 1883, False),
    ],
)
def test_broker_urls(url: str, host: str, port: int, *, tls: bool) -> None:
    address = parse_broker_url(url)
    assert address == BrokerAddress(host, port, tls)
    assert parse_broker_url(str(address)) == address


@pytest.mark.parametrize(
    "url",
    [
        "",
        "broker",
        "http://broker",
        "mqtts://",
        "mqtts://broker:0x1",
        "mqtts://broker:70000",
        "mqtts://user:secret@broker",
        "mqtts://broker/topic",
        "mqtts://broker?x=1",
        "mqtts://[::1",
        "mqtt://broker.example",
        "mqtt://10.0.0.1",
        "mqtt://localhost.example",
        "mqtt://127.0.0.1.example",
    ],
)
def test_what_is_no_broker_url_or_would_go_in_the_clear(url: str) -> None:
    with pytest.raises(ConfigError):
        parse_broker_url(url)


class Recorded(random.Random):
    """Remembers the ceilings it was asked for and always waits next to nothing."""

    def __init__(self) -> None:
        super().__init__(1)
        self.ceilings: list[float] = []

    def uniform(self, a: float, b: float) -> float:
        self.ceilings.append(b)
        return a


def link(urls: list[str], rng: random.Random | None = None) -> MqttLink:
    return MqttLink(
        client_id="a",
        brokers=lambda: urls,
        identity=None,
        allowed_keys=set,
        subscriptions=lambda: topics.device_filters(DeviceId("a"), GatewayId("gw")),
        config=LinkConfig(min_backoff_s=1.0, max_backoff_s=300.0, connect_timeout_s=1.0),
        rng=rng,
    )


async def test_back_off_doubles_to_its_ceiling_with_full_jitter(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "edgesync.io.mqtt")
    rng = Recorded()
    lonely = link(["mqtt://127.0.0.1:1"], rng)
    task = asyncio.create_task(lonely.run())
    await until(lambda: len(rng.ceilings) >= 12)
    task.cancel()
    assert rng.ceilings[:12] == [2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300, 300]
    status = lonely.status()
    assert not status.connected
    assert "mqtt://127.0.0.1:1 cannot be reached" in status.last_error
    assert status.last_connected is None
    (line,) = caplog.messages  # of twelve failures
    assert line.startswith("mqtt: mqtt://127.0.0.1:1 cannot be reached: ")


@pytest.mark.parametrize(
    ("urls", "error"),
    [
        ([], "no broker is known"),
        (["mqtts://127.0.0.1:1"], "no certificate"),
        (["mqtt://broker.example"], "in the clear"),
    ],
)
async def test_a_link_that_cannot_even_try_says_why(urls: list[str], error: str) -> None:
    lonely = link(urls, Recorded())
    task = asyncio.create_task(lonely.run())
    await until(lambda: error in lonely.last_error)
    task.cancel()


async def test_publish_without_a_connection_answers_at_once() -> None:
    lonely = link([])
    assert await lonely.publish(str(REPORT), b"x", qos=1) is Published.NOT_CONNECTED
    assert not Published.NOT_CONNECTED
    with pytest.raises(EdgeSyncError):
        await lonely.publish("es1/nowhere", b"x", qos=1)
    with pytest.raises(EdgeSyncError):
        await lonely.publish(str(REPORT), bytes(100_000), qos=1)


class Answering:
    """A broker that accepts whoever connects, but for the first ``silent``, and no more."""

    def __init__(self, *, silent: int = 0) -> None:
        self.came = 0
        self._silent = silent
        self._writers: list[asyncio.StreamWriter] = []

    @contextlib.asynccontextmanager
    async def at(self, sock: socket.socket) -> AsyncIterator[None]:
        async with await asyncio.start_server(self._serve, sock=sock):
            yield
            self.drop()

    def drop(self) -> None:
        """Everybody."""
        for writer in self._writers:
            writer.close()
        self._writers.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        with contextlib.suppress(OSError):
            self.came += 1
            is_silent = self.came <= self._silent
            if await reader.read(1000) and not is_silent:
                writer.write(bytes.fromhex("20020000"))  # CONNACK: accepted
            while await reader.read(1000):
                pass
        writer.close()


@contextlib.asynccontextmanager
async def going_round(
    min_detour_s: float,
    connect_timeout_s: float = 10.0,
) -> AsyncIterator[tuple[MqttLink, Answering, socket.socket]]:
    """A link by the door, which answers, because the broker's port, which is returned bound, does not."""
    door = Answering()
    with contextlib.closing(socket.socket()) as own, contextlib.closing(socket.socket()) as beside:
        for sock in (own, beside):
            sock.bind(("127.0.0.1", 0))
        port, door_port = own.getsockname()[1], beside.getsockname()[1]
        link = MqttLink(
            client_id="a",
            brokers=lambda: [f"mqtt://127.0.0.1:{port}"],
            identity=None,
            allowed_keys=set,
            subscriptions=list,
            config=LinkConfig(
                min_backoff_s=0.01,
                connect_timeout_s=connect_timeout_s,
                min_detour_s=min_detour_s,
            ),
            rng=random.Random(1),
            doors=lambda: [HostPort("127.0.0.1", door_port)],
        )
        async with door.at(beside):
            task = asyncio.create_task(link.run())
            await asyncio.wait_for(link.wait_connected(), 20)
            assert f"using TLS on port {door_port}" in link.status().detour
            yield link, door, own
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def detours(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.levelname for one in caplog.records if "using TLS on port" in one.getMessage()]


async def test_a_detour_is_shown_at_once_and_warned_of_once_when_it_lasts(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "edgesync.io.mqtt")
    looks = 0

    async def refused(*_: object, **__: object) -> None:
        nonlocal looks
        looks += 1
        raise EdgeSyncError("refused")

    monkeypatch.setattr("edgesync.io.mqtt.connect_tcp", refused)
    async with going_round(min_detour_s=0.02):
        assert detours(caplog)[0] == "INFO"
        await until(lambda: looks >= 3)
        assert detours(caplog) == ["INFO", "WARNING"]


async def test_a_detour_that_ends_soon_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "edgesync.io.mqtt")
    async with going_round(min_detour_s=600.0) as (link, door, own), Answering().at(own):
        door.drop()
        await until(lambda: link.status().connected and not link.status().detour)
        assert detours(caplog) == ["INFO"]


async def test_a_name_that_does_not_resolve_blocks_neither_threads_nor_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, release = 0, threading.Event()

    def stuck(*_: object, **__: object) -> None:
        nonlocal asked
        asked += 1
        release.wait(30)
        raise OSError("no such name")

    monkeypatch.setattr("edgesync.io.mqtt.connect_in_short_segments", stuck)
    lonely = MqttLink(
        client_id="a",
        brokers=lambda: ["mqtt://localhost:1"],
        identity=None,
        allowed_keys=set,
        subscriptions=list,
        config=LinkConfig(min_backoff_s=0.01, max_backoff_s=0.01, connect_timeout_s=0.05),
    )
    task = asyncio.create_task(lonely.run())
    await until(lambda: "no answer in time" in lonely.last_error)
    await asyncio.wait_for(asyncio.to_thread(lambda: None), 1)
    assert asked == 1, "attempts do not pile up behind a dead resolver"
    release.set()
    await until(lambda: asked > 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 1)


async def test_a_broker_that_answers_no_connect_is_tried_again() -> None:
    broker = Answering(silent=2)
    with contextlib.closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        link = MqttLink(
            client_id="a",
            brokers=lambda: [f"mqtt://127.0.0.1:{sock.getsockname()[1]}"],
            identity=None,
            allowed_keys=set,
            subscriptions=list,
            config=LinkConfig(min_backoff_s=0.01, connect_timeout_s=0.2),
            rng=random.Random(1),
        )
        async with broker.at(sock):
            task = asyncio.create_task(link.run())
            await asyncio.wait_for(link.wait_connected(), 20)
            assert broker.came == 3
            assert not task.done()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_a_cancellation_that_nobody_asked_for_does_not_end_the_link(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = link(["mqtt://127.0.0.1:1"])
    attempts = 0

    async def one_connection(*_: object) -> str:
        nonlocal attempts
        attempts += 1
        raise asyncio.CancelledError

    monkeypatch.setattr(broken, "_one_connection", one_connection)
    task = asyncio.create_task(broken.run())
    await until(lambda: attempts >= 2)
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_port_that_takes_connections_and_no_more_is_looked_at_ever_less_often() -> None:
    mute = Answering(silent=1_000_000)
    async with going_round(0.01, connect_timeout_s=0.2) as (link, _door, own), mute.at(own):
        await until(lambda: link._detour_pause_s >= 0.16, timeout_s=20)
        await until(lambda: bool(link.status().detour))
