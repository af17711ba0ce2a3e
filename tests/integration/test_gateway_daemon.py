"""The gateway's daemon with its real parts on loopback, and a device made of the shared shells."""

import asyncio
import contextlib
import json
import time

import pytest

from edgesync import jointoken
from edgesync.config import HostPort
from edgesync.errors import ConfigError, EdgeSyncError, ExitCode, NotFoundError
from edgesync.identity import Identity
from edgesync.ids import DeviceId, PeerIdentity
from edgesync.io.mqtt import LinkConfig, MqttLink, Will
from edgesync.storage.datadir import DataDir
from edgesync.transport.endpoint import Endpoint
from edgesync.wire import mqtt as wire
from edgesync.wire import topics
from edgesync.wire.messages import Join, Joined, join_payload
from edgesync.wire.topics import Kind
from gateway import fleet
from gateway.config import GatewaySettings
from gateway.daemon import Daemon
from gateway.service import assignments, bundles, devices, events, setup, status, tokens
from gateway.store import GatewayStore

LOOPBACK = HostPort("127.0.0.1", 0)


async def until(condition, *, timeout_s=10.0, what="it"):
    """Poll a condition; fail by name after a deadline."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"gave up waiting for {what}"
        await asyncio.sleep(0.02)
    return found


class NoHandler:
    async def connected(self, conn):
        pass

    async def disconnected(self, conn, error):
        pass

    async def message(self, conn, message):
        pass

    async def serve(self, conn, request):
        return
        yield

    async def serve_fetch(self, conn, name):
        return None

    async def serve_join(self, address, join, sha256):
        raise NotImplementedError


class Gateway:
    """A daemon in this process, and a second connection to its database: what a command would use."""

    def __init__(self, path):
        self.datadir = DataDir.open(path, "gateway")
        self.store = GatewayStore.open(self.datadir)
        self.here = fleet.load(self.store)
        self.daemon = None
        self._stop = None
        self._task = None

    async def start(self, **settings):
        self._stop = asyncio.Event()
        ready = asyncio.get_running_loop().create_future()

        async def serve():
            try:
                given = GatewaySettings(
                    **{
                        "listen_quic": LOOPBACK,
                        "listen_mqtt": LOOPBACK,
                        "listen_http": LOOPBACK,
                        "advertise": (HostPort("127.0.0.1", 7443),),
                        **settings,
                    }
                )
                with self.datadir.lock():
                    async with Daemon.running(self.datadir, given) as daemon:
                        ready.set_result(daemon)
                        await daemon.until(self._stop)
            except BaseException as exc:
                if not ready.done():
                    ready.set_exception(exc)
                    return
                raise

        self._task = asyncio.ensure_future(serve())
        self.daemon = await ready

    async def stop(self):
        if self._task is not None:
            self._stop.set()
            await self._task
            self._task = None

    def publish(self, path, name="app", version="1"):
        return bundles.publish(self.store, setup.repository(self.store), path, name, version)

    def token(self, **limits):
        version, digest = setup.repository(self.store).root_pin()
        port = self.daemon.endpoint.port
        return jointoken.decode(
            tokens.create(
                self.store,
                root_version=version,
                root_sha256=digest,
                addresses=[f"127.0.0.1:{port}"],
                utc_now=time.time(),
                **limits,
            ).token
        )

    def status(self):
        return status.read(self.store, utc_now=time.time())

    async def http(self, path):
        reader, writer = await asyncio.open_connection("127.0.0.1", self.daemon.http.port)
        writer.write(f"GET {path} HTTP/1.1\r\n\r\n".encode())
        answer = await reader.read()
        writer.close()
        head, _, body = answer.partition(b"\r\n\r\n")
        return int(head.split()[1]), body


class FakeDevice:
    """Joins, connects and speaks as an agent does; decides nothing."""

    def __init__(self, gateway, name):
        self.gateway = gateway
        self.name = name
        self.identity = Identity.generate()
        self.retained = {}
        self.got = []
        self.link = None
        self.epoch = 0
        self._tasks = []

    async def _endpoint(self):
        def judge(der):
            from edgesync.identity import certificate_key

            return PeerIdentity("gateway", self.gateway.here.gateway_id, certificate_key(der))

        return await Endpoint.open(
            host="127.0.0.1", port=0, identity=self.identity, judge=judge, handler=NoHandler()
        )

    async def join(self, token):
        endpoint = await self._endpoint()
        try:
            host, _, port = token.addresses[0].rpartition(":")
            connection = await endpoint.join((host, int(port)), expected_key=token.gateway_key)
            payload = join_payload(
                token_id=token.token_id,
                device_id=self.name,
                server_certificate_sha256=connection.server_certificate_sha256,
            )
            answer = await connection.ask(
                Join(
                    token_id=token.token_id,
                    secret=token.secret,
                    public_key=self.identity.public_raw,
                    signature=self.identity.sign("join", payload),
                    device_id=self.name,
                )
            )
            if isinstance(answer, Joined):
                assert len(await connection.fetch("root/1", 65_536)) > 100
                # A stranger is told the metadata and nothing else.
                with pytest.raises(NotFoundError):
                    await connection.fetch(f"assign/{self.name}", 65_536)
                if answer.state == "accepted":
                    self.identity = self.identity.with_certificate(answer.certificate)
            return answer
        finally:
            await endpoint.close()

    async def connect(self):
        self.endpoint = await self._endpoint()
        return await self.endpoint.connect(
            ("127.0.0.1", self.gateway.daemon.endpoint.port),
            expected_key=self.gateway.here.gateway_key,
        )

    def state(self, online=True, sequence=1, **facts):
        return wire.seal_state(
            wire.State(
                device=self.name,
                key=self.identity.key,
                epoch=self.epoch,
                sequence=sequence,
                online=online,
                **facts,
            ),
            self.identity,
        )

    async def say(self, payload, kind=Kind.STATE, **how):
        return await self.link.publish(
            str(topics.Topic(kind, self.name)), payload, qos=1, retain=kind is Kind.STATE, **how
        )

    def report(self, sequence, status_="succeeded"):
        return wire.seal(
            wire.Report(
                device=self.name,
                key=self.identity.key,
                epoch=1,
                sequence=sequence,
                issued=1.0,
                kind="files",
                name="app",
                version="1",
                digest="d" * 64,
                status=status_,
            ),
            self.identity,
        )

    async def start_mqtt(self):
        def will():
            self.epoch += 1
            return Will(topics.state(DeviceId(self.name)), self.state(online=False, sequence=0))

        async def on_connect():
            await self.say(self.state(agent="test", addresses=["127.0.0.1:9"]))

        self.link = MqttLink(
            client_id=self.name,
            brokers=lambda: [self.gateway.daemon.broker_url],
            identity=self.identity,
            allowed_keys=lambda: {self.gateway.here.gateway_key},
            subscriptions=lambda: topics.device_filters(
                DeviceId(self.name), self.gateway.here.gateway_id
            ),
            will=will,
            on_connect=on_connect,
            config=LinkConfig(min_backoff_s=0.05, max_backoff_s=0.2),
        )

        async def pump():
            async for message in self.link.messages():
                self.got.append(message)
                self.retained[str(message.topic)] = message.payload

        self._tasks = [asyncio.ensure_future(self.link.run()), asyncio.ensure_future(pump())]
        await asyncio.wait_for(self.link.wait_connected(), 10)

    def commands(self):
        return [
            wire.unseal(message.topic, message.payload, keys=(self.gateway.here.gateway_key,)).body
            for message in self.got
            if message.topic.kind is Kind.CMD
        ]

    async def close(self):
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if hasattr(self, "endpoint"):
            await self.endpoint.close()


@pytest.fixture
async def gateway(tmp_path):
    setup.init(
        tmp_path / "gw", name="acme", advertise=["127.0.0.1:7443"], region="eu", threshold=(1, 1)
    )
    made = Gateway(tmp_path / "gw")
    yield made
    await made.stop()
    made.store.close()


@pytest.fixture
async def device(gateway):
    made = []

    async def make(name, *, joined=True, **limits):
        one = FakeDevice(gateway, name)
        made.append(one)
        if joined:
            assert isinstance(await one.join(gateway.token(**limits)), Joined)
        return one

    yield make
    for one in made:
        await one.close()


@pytest.fixture
def tree(tmp_path):
    path = tmp_path / "tree"
    path.mkdir()
    (path / "a.txt").write_text("hello")
    return path


async def test_a_device_joins_and_is_a_member_at_once(gateway, device):
    await gateway.start()
    one = await device("cam-1", site="lab")
    connection = await one.connect()
    assert connection.peer.key == gateway.here.gateway_key
    assert len(await connection.fetch("timestamp", 16_384)) > 100
    assert len(await connection.fetch("assign/cam-1", 65_536)) > 100
    for name in ("assign/cam-2", "root/99", f"sha256/{'0' * 64}"):
        with pytest.raises(NotFoundError):
            await connection.fetch(name, 65_536)
    [row] = devices.list_devices(gateway.store)
    assert (row["state"], row["site"], row["site_why"]) == ("accepted", "lab", "label")


async def test_a_pending_device_is_let_in_when_an_operator_accepts_it(gateway, device):
    await gateway.start()
    one = await device("cam-1", joined=False)
    token = gateway.token(uses=5)
    assert (await one.join(token)).state == "pending"
    devices.accept(gateway.store, "cam-1", setup.certifier(gateway.store))
    answer = await one.join(token)
    assert answer.state == "accepted"
    await one.connect()


async def test_assignment_and_manifest_are_announced_within_two_seconds(gateway, device, tree):
    await gateway.start()
    one = await device("cam-1")
    await one.start_mqtt()
    await until(lambda: topics.assign(DeviceId("cam-1")) in one.retained, what="the first set")
    published = gateway.publish(tree)
    began = time.monotonic()
    assignments.assign(gateway.store, "app", None, everything=True, utc_now=time.time())
    topic = topics.bundle(gateway.here.gateway_id, published.id)
    await until(lambda: topic in one.retained, what="the manifest")
    await until(lambda: b'"' in one.retained[topics.assign(DeviceId("cam-1"))], what="the set")
    assert time.monotonic() - began < 2.0
    assert isinstance(wire.decode_bundle(topics.parse(topic), one.retained[topic]), bytes)
    presence = wire.unseal(
        topics.parse(topics.presence(gateway.here.gateway_id)),
        one.retained[topics.presence(gateway.here.gateway_id)],
        keys=(gateway.here.gateway_key,),
    )
    assert presence.online
    connection = await one.connect()
    assert len(await connection.fetch(f"sha256/{published.id}", 1 << 20)) > 100


async def test_states_and_reports_are_stored_and_acknowledged(gateway, device):
    await gateway.start()
    one = await device("cam-1")
    await one.start_mqtt()
    await until(lambda: gateway.status()["devices"]["online"] == 1, what="the device to be online")
    assert await one.say(one.report(1), Kind.REPORT)
    await until(one.commands, what="an acknowledgement")
    assert one.commands()[0] == wire.Ack(epoch=1, sequences=[1])
    shown = devices.show(gateway.store, "cam-1")
    assert (shown["agent_version"], shown["executions"][0]["status"]) == ("test", "succeeded")
    # Goodbye without a word: noticed, though no will is published for a clean close.
    await one.close()
    await until(
        lambda: not devices.show(gateway.store, "cam-1")["online"], what="the device to be offline"
    )
    kinds = [event["kind"] for event in events.since(gateway.store, 0)]
    assert kinds[-3:] == ["device.online", "execution.succeeded", "device.offline"]


async def test_neighbours_are_introduced(gateway, device):
    await gateway.start()
    first = await device("cam-1")
    await first.start_mqtt()
    await until(lambda: gateway.status()["devices"]["online"] == 1, what="the first")
    second = await device("cam-2")
    await second.start_mqtt()
    topic = topics.peers(DeviceId("cam-2"))
    await until(lambda: topic in second.retained, what="the list of peers")
    told = wire.unseal(
        topics.parse(topic), second.retained[topic], keys=(gateway.here.gateway_key,)
    )
    assert [(peer.id, peer.key) for peer in told.peers] == [("cam-1", first.identity.key)]


async def test_a_restarted_gateway_says_everything_again(gateway, device, tree):
    await gateway.start()
    gateway.publish(tree)
    one = await device("cam-1")
    assignments.assign(gateway.store, "app", None, everything=True, utc_now=time.time())
    await gateway.stop()
    assert not gateway.status()["running"]
    await gateway.start()
    await one.start_mqtt()
    await until(lambda: topics.assign(DeviceId("cam-1")) in one.retained, what="the set")
    await until(lambda: any("/bundle/" in topic for topic in one.retained), what="the manifest")


async def test_standing_rules_reach_who_joins(gateway, device, tree):
    await gateway.start()
    gateway.publish(tree)
    assignments.assign(
        gateway.store, "app", None, everything=True, follow=True, utc_now=time.time()
    )
    await device("cam-1")
    assert [entry["name"] for entry in devices.show(gateway.store, "cam-1")["assignments"]] == [
        "app"
    ]


async def test_http_and_status(gateway, device):
    await gateway.start()
    await until(lambda: gateway.daemon.link.connected, what="the broker")
    assert await gateway.http("/livez") == (200, b"ok\n")
    assert await gateway.http("/readyz") == (200, b"ok\n")
    await device("cam-1")
    code, body = await gateway.http("/metrics")
    assert code == 200
    assert b'edgesync_gateway_devices{state="accepted"} 1' in body
    now = await until(
        lambda: (s := gateway.status())["running"] and s["broker"]["connected"] and s, what="status"
    )
    assert (now["broker"]["kind"], now["problems"], now["devices"]["accepted"]) == (
        "embedded",
        [],
        1,
    )


async def test_it_serves_while_an_external_broker_cannot_be_reached(gateway, device):
    await gateway.start(broker="mqtts://127.0.0.1:1")
    one = await device("cam-1")
    connection = await one.connect()
    assert await connection.fetch("timestamp", 16_384)
    code, body = await gateway.http("/readyz")
    assert code == 503
    assert "not connected to the broker mqtts://127.0.0.1:1" in json.loads(body)["reasons"][0]
    now = await until(lambda: (s := gateway.status())["running"] and s, what="status")
    assert now["broker"]["kind"] == "external"
    assert "not connected to the broker" in now["problems"][0]


async def test_ports_in_use_and_the_directory_too(gateway, tmp_path):
    await gateway.start()
    with pytest.raises(ConfigError, match="in use by process"):
        gateway.datadir.lock()
    setup.init(tmp_path / "two", name="two", advertise=["127.0.0.1"], region="eu", threshold=(1, 1))
    other = Gateway(tmp_path / "two")
    for setting, port, flag in (
        ("listen_quic", gateway.daemon.endpoint.port, "--listen-quic"),
        ("listen_mqtt", gateway.daemon.broker.port, "--listen-mqtt"),
        ("listen_http", gateway.daemon.http.port, "--listen-http"),
    ):
        with pytest.raises(ConfigError, match=rf"{port}.* use.*{flag}") as caught:
            await other.start(**{setting: HostPort("127.0.0.1", port)})
        assert "127.0.0.1" in str(caught.value)
        assert caught.value.exit_code == ExitCode.CONFIG
        with contextlib.closing(other.datadir.lock()):
            pass  # Whatever failed, the directory is free again.
    other.store.close()


async def test_it_stops_at_once_also_while_it_still_connects(gateway, caplog):
    for _ in range(4):
        await gateway.start()
        await asyncio.wait_for(gateway.stop(), 10)
    assert [record for record in caplog.records if record.name == "asyncio"] == []


async def test_a_stranger_gets_nothing(gateway, device):
    await gateway.start()
    await device("cam-1")
    stranger = await device("cam-2", joined=False)
    with pytest.raises(EdgeSyncError):
        await stranger.connect()
