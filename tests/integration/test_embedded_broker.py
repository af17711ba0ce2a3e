"""What the embedded broker does beyond the contract: its bounds, its judgement, and how it starts and stops."""

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from edgesync import limits
from edgesync.errors import ConfigError, NotAuthorizedError
from edgesync.identity import Identity
from edgesync.ids import PeerIdentity
from edgesync.io.mqtt import LinkConfig, MqttLink, Published, Will, client_context
from edgesync.wire import topics
from gateway.broker import EmbeddedBroker
from tests.contract.brokers import FAST, GATEWAY, Fleet, until


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


class Site:
    """A broker in this process, and who may talk to it."""

    def __init__(self) -> None:
        self.fleet = Fleet()
        self.revoked: set[str] = set()
        self.broker: EmbeddedBroker

    async def open(self, **options: object) -> None:
        self.broker = EmbeddedBroker(
            identity=self.fleet.gateway,
            authorities=self.fleet.authorities,
            judge=self.judge,
            **options,  # type: ignore[arg-type]
        )
        await self.broker.open("127.0.0.1", 0)

    def judge(self, der: bytes) -> PeerIdentity:
        identity = self.fleet.judge(der)
        if identity.key in self.revoked:
            raise NotAuthorizedError("revoked")
        return identity

    def link(self, identity: Identity, config: LinkConfig = FAST, **changes: object) -> MqttLink:
        settings: dict[str, object] = {
            "subscriptions": lambda: (
                topics.gateway_filters()
                if identity is self.fleet.gateway
                else topics.device_filters(identity.name, GATEWAY)  # type: ignore[arg-type]
            ),
            **changes,
        }
        return MqttLink(
            client_id=identity.name,
            brokers=lambda: [f"mqtts://127.0.0.1:{self.broker.port}"],
            identity=identity,
            allowed_keys=lambda: {self.fleet.gateway.key},
            config=config,
            **settings,  # type: ignore[arg-type]
        )

    @contextlib.asynccontextmanager
    async def linked(
        self, identity: Identity, config: LinkConfig = FAST, **changes: object
    ) -> AsyncIterator[MqttLink]:
        link = self.link(identity, config, **changes)
        task = asyncio.create_task(link.run())
        try:
            await asyncio.wait_for(link.wait_connected(), 10)
            yield link
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def raw(
        self, identity: Identity, keepalive: int = 60
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """TLS and CONNECT, and nothing more."""
        context = client_context(identity, lambda: {self.fleet.gateway.key})
        context.sslsocket_class = ssl.SSLSocket
        reader, writer = await asyncio.open_connection("127.0.0.1", self.broker.port, ssl=context)
        writer.write(b"\x10\x0d\0\4MQTT\4\2" + keepalive.to_bytes(2) + b"\0\1x")
        assert await reader.readexactly(4) == b"\x20\2\0\0"
        return reader, writer


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    site = Site()
    yield site
    await site.broker.stop()


async def test_a_device_may_leave_only_its_state_behind(site: Site) -> None:
    await site.open()
    device = site.fleet.device("van-1")
    async with site.linked(device) as link:
        for topic in (topics.state, topics.report, topics.progress, topics.rsp):
            assert await link.publish(topic("van-1"), b"x", qos=1, retain=True)
        assert set(site.broker.retained_messages) == {topics.state("van-1")}
        assert site.broker.stats().refused == {"not its topic": 3}


async def test_who_never_proves_itself_is_closed_in_time(site: Site) -> None:
    await site.open(unproven_timeout_s=0.3)
    reader, writer = await asyncio.open_connection("127.0.0.1", site.broker.port)
    assert site.broker.stats().unproven <= 1
    assert await asyncio.wait_for(reader.read(), 3) == b""
    writer.close()
    context = client_context(site.fleet.device("mute"), set)
    context.sslsocket_class = ssl.SSLSocket
    reader, writer = await asyncio.open_connection("127.0.0.1", site.broker.port, ssl=context)
    assert await asyncio.wait_for(reader.read(), 3) == b""
    writer.close()
    await until(lambda: site.broker.stats().unproven == 0)


async def test_strangers_beyond_the_cap_are_closed_at_once(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_MQTT_UNPROVEN_PER_ADDRESS", 4)
    await site.open(unproven_timeout_s=5)
    strangers = [await asyncio.open_connection("127.0.0.1", site.broker.port) for _ in range(4)]
    await until(lambda: site.broker.stats().unproven == 4)
    reader, writer = await asyncio.open_connection("127.0.0.1", site.broker.port)
    assert await asyncio.wait_for(reader.read(), 1) == b""
    for _, stranger in [*strangers, (reader, writer)]:
        stranger.close()
    await until(lambda: site.broker.stats().unproven == 0)
    async with site.linked(site.fleet.device("honest")):
        pass


async def test_rejudging_closes_who_is_no_longer_trusted_and_nobody_else(site: Site) -> None:
    await site.open()
    bad, good = site.fleet.device("bad"), site.fleet.device("good")
    gone = Will(topics.state("bad"), b"gone")
    async with (
        site.linked(site.fleet.gateway) as gateway,
        site.linked(bad, will=lambda: gone) as expelled,
        site.linked(good) as stays,
    ):
        site.revoked.add(bad.key)
        assert await site.broker.rejudge() == ["bad"]
        await until(lambda: not expelled.connected)
        async with asyncio.timeout(5):
            assert (await gateway.inbox.get()).payload == b"gone"
        assert site.broker.connected_ids() == {GATEWAY, "good"}
        assert await stays.publish(topics.report("good"), b"x", qos=1)
        await until(lambda: "lost" in expelled.last_error or "reached" in expelled.last_error)


async def test_another_key_with_a_name_in_use_is_refused(site: Site) -> None:
    await site.open()
    first, second = site.fleet.device("twin"), site.fleet.device("twin")
    async with site.linked(first) as link:
        refused = site.link(second)
        task = asyncio.create_task(refused.run())
        await until(lambda: "reached" in refused.last_error)
        assert link.connected
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_full_broker_says_so_but_lets_its_gateway_in(site: Site) -> None:
    await site.open(max_clients=1)
    async with site.linked(site.fleet.device("one")):
        late = site.link(site.fleet.device("two"))
        task = asyncio.create_task(late.run())
        await until(lambda: "reached" in late.last_error)
        async with site.linked(site.fleet.gateway):
            pass
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_slow_reader_is_closed_before_it_costs_memory(site: Site) -> None:
    await site.open(max_queued=50)
    reader, writer = await site.raw(site.fleet.device("slow"))
    name = topics.cmd("slow").encode()
    writer.write(b"\x82" + bytes([5 + len(name)]) + b"\0\1" + len(name).to_bytes(2) + name + b"\1")
    assert await reader.readexactly(5) == b"\x90\3\0\1\1"
    async with site.linked(site.fleet.gateway) as gateway:
        for _ in range(200):
            await gateway.publish(topics.cmd("slow"), bytes(limits.MAX_COMMAND_BYTES), qos=1)
            if "slow" not in site.broker.connected_ids():
                break
        assert "slow" not in site.broker.connected_ids()
    writer.transport.abort()


async def test_of_a_retained_topic_a_slow_reader_gets_the_newest_once(site: Site) -> None:
    await site.open(max_queued=50)
    reader, writer = await site.raw(site.fleet.device("slow"))
    name = topics.assign("slow").encode()
    writer.write(b"\x82" + bytes([5 + len(name)]) + b"\0\1" + len(name).to_bytes(2) + name + b"\1")
    assert await reader.readexactly(5) == b"\x90\3\0\1\1"
    async with site.linked(site.fleet.gateway) as gateway:
        for number in range(300):
            assert await gateway.publish(
                topics.assign("slow"), b"%05d" % number * 10, qos=1, retain=True
            )
        assert "slow" in site.broker.connected_ids()
    # Sixteen are on their way unacknowledged; acknowledging them brings the newest, and then nothing.
    seen = []
    while not seen or not seen[-1].startswith(b"00299"):
        head = await asyncio.wait_for(reader.readexactly(2), 5)
        body = await reader.readexactly(head[1])
        packet_id, payload = body[2 + len(name) : 4 + len(name)], body[4 + len(name) :]
        seen.append(payload)
        writer.write(b"\x40\2" + packet_id)
    assert len(seen) <= 18
    writer.transport.abort()


async def test_a_flood_slows_down_only_its_sender(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_MQTT_PACKETS_S", 20)
    monkeypatch.setattr(limits, "MAX_MQTT_PACKET_BURST", 40)
    await site.open()
    flooder, honest = site.fleet.device("flooder"), site.fleet.device("honest")
    reader, writer = await site.raw(flooder)
    writer.write(b"\xc0\0" * 5000)
    async with site.linked(honest) as link:
        async with asyncio.timeout(5):
            assert await link.publish(topics.report("honest"), b"x", qos=1)
        answered = len(await reader.readexactly(80)) // 2
        assert answered == 40
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.readexactly(100), 0.5)
    writer.transport.abort()


async def test_only_so_many_subscriptions_each(site: Site) -> None:
    await site.open()
    filters = [(f"es1/g/{n}/presence", 1) for n in range(limits.MAX_MQTT_SUBSCRIPTIONS + 1)]
    greedy = site.link(site.fleet.device("greedy"), subscriptions=lambda: filters)
    task = asyncio.create_task(greedy.run())
    await until(lambda: "does not let us read" in greedy.last_error)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await until(lambda: site.broker.stats().subscriptions == 0)


async def test_an_inbox_that_overflowed_asks_for_what_is_retained_again(site: Site) -> None:
    await site.open()
    device = site.fleet.device("small")
    config = LinkConfig(min_backoff_s=0.05, max_backoff_s=0.3, max_queued_messages=2)
    async with (
        site.linked(site.fleet.gateway) as gateway,
        site.linked(device, config) as link,
    ):
        wanted = {topics.tuf_root(GATEWAY, n): b"%d" % n for n in range(1, 8)}
        for topic, payload in wanted.items():
            assert await gateway.publish(topic, payload, qos=1, retain=True)
        await until(lambda: link.inbox.dropped > 0)
        got: dict[str, bytes] = {}
        async with asyncio.timeout(10):
            async for message in link.messages():
                got[str(message.topic)] = message.payload
                await asyncio.sleep(0)
                if got == wanted:
                    break


async def test_a_port_in_use_is_one_clear_sentence(site: Site) -> None:
    await site.open()
    other = EmbeddedBroker(
        identity=site.fleet.gateway, authorities=site.fleet.authorities, judge=site.judge
    )
    with pytest.raises(ConfigError, match=f"MQTT port {site.broker.port} on 127.0.0.1 is in use"):
        await other.open("127.0.0.1", site.broker.port)
    with pytest.raises(ConfigError, match="cannot listen for MQTT"):
        await other.open("192.0.2.1", 0)
    await other.stop()


async def test_stopping_frees_the_port_and_says_no_wills(site: Site) -> None:
    await site.open()
    will = Will(topics.state("van-1"), b"gone")
    async with site.linked(site.fleet.device("van-1"), will=lambda: will) as link:
        port = site.broker.port
        await site.broker.stop()
        assert topics.state("van-1") not in site.broker.retained_messages
        await until(lambda: not link.connected)
        assert await link.publish(topics.report("van-1"), b"x", qos=1) is Published.NOT_CONNECTED
        socket.create_server(("127.0.0.1", port)).close()


async def test_reconnecting_leaves_nothing_behind(site: Site) -> None:
    await site.open()
    device = site.fleet.device("flapper")
    connects = 0

    async def count() -> None:
        nonlocal connects
        connects += 1

    config = LinkConfig(min_backoff_s=0.001, max_backoff_s=0.001)
    async with site.linked(device, config, on_connect=count) as link:
        sizes = []
        for cycle in range(1, 31):
            await until(lambda cycle=cycle: connects >= cycle)  # type: ignore[misc]
            await until(lambda: link.connected)
            if cycle in {5, 30}:
                await until(lambda: len(asyncio.all_tasks()) <= 16)
                sizes.append((open_files(), len(asyncio.all_tasks()), threading.active_count()))
            for _, handler in list(site.broker.sessions.values()):
                handler.close("flap")
            await until(lambda: not site.broker.connected_ids())
        assert sizes[1][0] <= sizes[0][0] + 2, sizes
        assert sizes[1][1] <= sizes[0][1] + 2, sizes
        assert sizes[1][2] <= sizes[0][2] + 2, sizes
