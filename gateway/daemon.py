"""`gateway run`: lets devices join, serves pieces, announces what the database says and stores what devices report.

It wires shells to each other and decides little: the database is the truth, commands change it, and every 250 ms the
daemon looks whether they did. Invariants:

* it holds the directory's lock from before the first port is bound until after the last is closed;
* SQLite runs in one writer thread and never on the event loop;
* what is said on the broker was committed before; a report is acknowledged after it was;
* it starts and keeps serving by QUIC when the broker cannot be reached, and says so.

Called by ``gateway.cli``.
"""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

from edgesync import __version__, caps, limits
from edgesync.config import HostPort
from edgesync.errors import ConfigError, EdgeSyncError
from edgesync.ids import DeviceId, Digest, PeerKey
from edgesync.io import systemd
from edgesync.io.broker_url import parse_broker_url
from edgesync.io.mqtt import Incoming, LinkConfig, MqttLink, Will
from edgesync.storage.datadir import DataDir
from edgesync.transport.connection import PeerConnection
from edgesync.transport.endpoint import Endpoint, EndpointConfig
from edgesync.wire import mqtt as wire
from edgesync.wire import topics
from edgesync.wire.messages import Join, Joined, JoinRefused
from gateway import catalogue, certificates, fleet, http
from gateway.announcer import Announcement, Announcer, reserve_epochs
from gateway.broker import EmbeddedBroker
from gateway.budgets import SAVE_S, SiteBudgets
from gateway.config import GatewaySettings, broker_urls
from gateway.enrolment import Enrolment, Places
from gateway.health import BEAT_S, MAX_LAG_S, Health, Parts
from gateway.ingest import Batch, Ingest
from gateway.moment import Moment, MomentReader
from gateway.mqtt_relay import MqttRelay
from gateway.packs import PieceStore
from gateway.register import Judge
from gateway.seeder import Seeder
from gateway.service import assignments, budgets, setup, status
from gateway.site import host_of
from gateway.store import GatewayStore
from gateway.throttles import Throttles
from gateway.writer import Writer

logger = logging.getLogger(__name__)

POLL_S: Final = 0.25
UPKEEP_S: Final = 600.0
"""How often it is looked whether something is past half of its life."""
MAX_BATCH: Final = 256
"""Messages of devices stored in one transaction."""
PEERS_TOLD: Final = 8
PEERS_AGAIN_S: Final = 10.0
"""A device is told of its neighbours at most this often."""
STOP_TIMEOUT_S: Final = 10.0


def run(datadir: DataDir, settings: GatewaySettings) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises ConfigError: the directory is in use, a port is taken, or a key is not there.
    """
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    # Each is heard of through its own shell's log lines; at INFO they would say it a second time.
    for noisy in ("amqtt", "transitions", "quic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # What was imported stays: the collector need not walk it while pieces go out.
    gc.freeze()
    with datadir.lock():
        asyncio.run(_main(datadir, settings))


async def _main(datadir: DataDir, settings: GatewaySettings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with Daemon.running(datadir, settings) as daemon:
        await daemon.until(stop)


class Daemon:
    """See ``running``."""

    def __init__(self, datadir: DataDir, settings: GatewaySettings, writer: Writer) -> None:
        self.datadir = datadir
        self.settings = settings
        self.started = time.time()
        self.writer = writer
        self.health = Health()
        self.moment: Moment
        self.here: fleet.Fleet
        self.judge: Judge
        self.endpoint: Endpoint
        self.seeder: Seeder
        self.broker: EmbeddedBroker | None = None
        self.link: MqttLink
        self.announcer: Announcer
        self.http: http.HttpServer
        self._ingest: Ingest
        self._enrolment: Enrolment
        zone = caps.load_zone(settings.time_zone)
        limit = caps.parse(settings.upload_limit, zone, settings.time_zone)
        self.budgets = SiteBudgets()
        self.throttles = Throttles([caps.Cap("gateway.toml", upload=limit)])
        self._reader = MomentReader()
        self._dirty = asyncio.Event()
        self._news = asyncio.Event()
        self._version = -1
        self._told: dict[DeviceId, float] = {}
        self._silent: set[DeviceId] = set()

    # --- life ------------------------------------------------------------------------------------------------------
    @classmethod
    @contextlib.asynccontextmanager
    async def running(cls, datadir: DataDir, settings: GatewaySettings) -> AsyncIterator["Daemon"]:
        """Start everything, in an order in which nothing is announced that cannot be had yet; stop it in reverse."""
        async with contextlib.AsyncExitStack() as stack:
            writer = Writer(datadir)
            stack.push_async_callback(writer.close)
            await writer.open()
            daemon = cls(datadir, settings, writer)
            await daemon._start(stack)
            yield daemon

    async def _start(self, stack: contextlib.AsyncExitStack) -> None:
        self.here = await self.writer(fleet.load)
        identity = certificates.load_identity(
            self.datadir.identity_key, self.datadir.identity_certificate
        )
        authority = certificates.load_authority(self.datadir.ca)
        certificates.load_assign_key(self.datadir.online)
        self.judge = Judge(region=self.here.region)
        await self.writer(self._open_tables)
        stack.push_async_callback(self.writer, _close_tables)
        await self._upkeep()
        await self._load()
        self.seeder = await self._make_seeder(stack)
        # The broker before the door that leads to it too: the door serves who finds the broker's port closed.
        if self.settings.broker:
            relay = MqttRelay(parse_broker_url(self.settings.broker))
            stack.push_async_callback(relay.close)
            adopt_mqtt = relay.adopt
        else:
            self.broker = EmbeddedBroker(
                identity=identity,
                authorities=lambda: (authority.certificate_der, identity.certificate_der),
                judge=self.judge,
            )
            await self.broker.open(self.settings.listen_mqtt.host, self.settings.listen_mqtt.port)
            stack.push_async_callback(self.broker.stop)
            adopt_mqtt = self.broker.adopt
        self.endpoint = await self._open_endpoint(identity)
        stack.push_async_callback(self.endpoint.close)
        self.seeder.attach(self.endpoint)
        door = self.endpoint.tcp_door
        assert door is not None
        door.mqtt = adopt_mqtt
        self.announcer = Announcer(
            self.here.gateway_id,
            identity,
            self._announcement,
            self._quic_addresses,
            self._next_commands,
            first_epoch=await self.writer(reserve_epochs, time.time()),
        )
        self.link = MqttLink(
            client_id=self.here.gateway_id,
            brokers=lambda: [self.broker_url],
            identity=identity,
            allowed_keys=lambda: {PeerKey(entry.key) for entry in self.moment.trusted.gateways()},
            subscriptions=topics.gateway_filters,
            will=self._will,
            on_connect=self.announcer.connected,
            config=LinkConfig.for_gateway(),
        )
        self.announcer.link = self.link
        self.health.parts = Parts(
            self.endpoint,
            self.seeder,
            self.link,
            self.broker,
            self.broker_url,
            self._ingest.dropped,
            self.throttles,
            self.budgets,
        )
        self.http = http.HttpServer(self.health.pages())
        await self.http.start(self.settings.listen_http.host, self.settings.listen_http.port)
        stack.push_async_callback(self.http.close)
        logger.info(
            "gateway %s of fleet %s: QUIC %d, MQTT %s, HTTP %d",
            self.here.gateway_id,
            self.here.name,
            self.endpoint.port,
            self.broker_url,
            self.http.port,
        )

    async def until(self, stop: asyncio.Event) -> None:
        """Serve until ``stop``, or until a part of it fails."""
        loops = {
            "mqtt": self.link.run(),
            "ingest": self._consume(),
            "watch": self._watch(),
            "announce": self._announce(),
            "runtime": self._report_runtime(),
            "upkeep": self._keep_up(),
            "watchdog": self._watchdog(),
        }
        tasks = [asyncio.ensure_future(work) for work in loops.values()]
        stopping = asyncio.ensure_future(stop.wait())
        systemd.notify("READY=1", f"STATUS=serving {self.here.name}")
        try:
            done, _ = await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {stopping}:
                task.result()
        finally:
            systemd.notify("STOPPING=1")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await self.announcer.goodbye()
            for task in (stopping, *tasks):
                task.cancel()
            await asyncio.gather(stopping, *tasks, return_exceptions=True)
            with contextlib.suppress(EdgeSyncError):
                await self.writer(status.add_sent, self.seeder.take_sent())
                self.seeder.count_budgets()
                await self._save_budgets()

    def _open_tables(self, store: GatewayStore) -> None:
        self._ingest = Ingest(store)
        self._ingest.reset_liveness()
        self._enrolment = Enrolment(
            store,
            setup.certifier(store),
            on_member=lambda device_id: _follow(store, device_id),
            gateway_ids=[gateway.id for gateway in setup.repository(store).trusted().gateways()],
        )
        status.clear_runtime(store)

    async def _make_seeder(self, stack: contextlib.AsyncExitStack) -> Seeder:
        pieces = await self.writer(PieceStore.open)
        stack.push_async_callback(asyncio.to_thread, pieces.close)
        seeder = Seeder(
            pieces=pieces,
            manifest=self._manifest,
            fetch=self.serve_fetch,
            join=self.serve_join,
            register=self.moment.register,
            trusted=self.moment.trusted,
            throttles=self.throttles,
            budgets=self.budgets,
        )
        stack.push_async_callback(seeder.close)
        return seeder

    async def _open_endpoint(self, identity: Any) -> Endpoint:
        where = self.settings.listen_quic
        try:
            return await Endpoint.open(
                host=where.host,
                port=where.port,
                identity=identity,
                judge=self.judge,
                handler=self.seeder,
                config=EndpointConfig(
                    role="gateway",
                    agent=f"edgesync-gateway/{__version__}",
                    max_connections=limits.MAX_GATEWAY_CONNECTIONS,
                    accept_joins=True,
                    tcp=True,
                    announce_port=False,
                    congestion=self.settings.congestion,
                    versions=lambda: (
                        self.moment.trusted.root_version,
                        self.moment.trusted.timestamp_version,
                    ),
                ),
            )
        except OSError as exc:
            raise ConfigError(
                f"cannot listen for devices on {where} (UDP and TCP): {exc.strerror or exc}: "
                "stop what uses it, or choose another with --listen-quic"
            ) from exc

    # --- the database, on this side --------------------------------------------------------------------------------
    async def _load(self) -> None:
        """Read what changed, and let it act: sessions are judged again, the broker is told."""
        before = getattr(self, "moment", None)
        self.moment = await self.writer(self._reader.read)
        self.health.moment = self.moment
        self.judge.trusted = self.moment.trusted
        self.judge.register = self.moment.register
        if before is None:
            self.budgets.load(await self.writer(budgets.load_ledgers))
        if before is None or before.budgets != self.moment.budgets:
            self.budgets.update(self.moment.budgets)
        if before is None or before.caps != self.moment.caps:
            self.throttles.update(self.moment.caps.entries, utc_now=time.time())
        if before is None:
            return
        if (
            before.members() - self.moment.members()
            or before.trusted.regions != self.moment.trusted.regions
        ):
            await self.endpoint.rejudge()
            if self.broker is not None:
                await self.broker.rejudge()
        await self.seeder.updated(self.moment.register, self.moment.trusted)
        self._news.set()

    async def _announce(self) -> None:
        """Say what changed. On its own, so that a join or a report never waits for a broker that does not answer."""
        while True:
            await self._news.wait()
            self._news.clear()
            await self.announcer.refresh()

    async def _watch(self) -> None:
        """Notice commits of other processes, and what our own ones asked to be told on."""
        saved_at = time.monotonic()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await self._dirty.wait()
            try:
                self.throttles.follow(utc_now=time.time())
                self.seeder.count_budgets()
                if sent := self.seeder.take_sent():
                    await self.writer(status.add_sent, sent)
                if time.monotonic() - saved_at >= SAVE_S:
                    saved_at = time.monotonic()
                    await self._save_budgets()
                version = await self.writer(GatewayStore.data_version)
                if version == self._version and not self._dirty.is_set():
                    continue
                self._dirty.clear()
                await self._load()
                self._version = version
                self.health.problems.pop("database", None)
            except EdgeSyncError as exc:
                self.health.problems["database"] = str(exc)
                logger.error("%s", exc)  # noqa: TRY400 - the sentence says it all
                await asyncio.sleep(BEAT_S)

    async def _save_budgets(self) -> None:
        if changed := self.budgets.take_changed():
            await self.writer(budgets.save_ledgers, changed)

    async def _announcement(self) -> Announcement:
        return self.moment.announcement

    async def _next_commands(self, devices: list[str]) -> dict[str, int]:
        return await self.writer(_next_commands, devices, time.time())

    async def _keep_up(self) -> None:
        while True:
            await asyncio.sleep(UPKEEP_S)
            await self._upkeep()
            self._dirty.set()

    async def _upkeep(self) -> None:
        """Sign anew what is past half of its life."""
        try:
            await self.writer(_renew, time.time())
            self.health.problems.pop("signing", None)
        except EdgeSyncError as exc:
            self.health.problems["signing"] = str(exc)
            logger.error("%s", exc)  # noqa: TRY400 - the sentence says it all

    # --- devices ---------------------------------------------------------------------------------------------------
    async def serve_fetch(self, conn: PeerConnection | None, name: str) -> bytes | None:
        """Metadata to everybody who joined, manifests and its own assignment set to a member."""
        if name in self.moment.files:
            return self.moment.files[name]
        kind, _, rest = name.partition("/")
        if kind == "assign":
            if conn is None or conn.peer.id != rest:
                return None
            return self.moment.announcement.sets.get(DeviceId(rest))
        found = await self.writer(lambda store: self._reader.repository(store).metadata(name))
        if found is not None or kind != "sha256" or conn is None:
            return found
        return await self._manifest(Digest(rest))

    async def _manifest(self, digest: Digest) -> bytes | None:
        known = self.moment.announcement.manifests.get(digest)
        if known is not None or self.moment.trusted.by_digest(digest) is None:
            return known
        return await self.writer(catalogue.load_manifest, digest)

    async def serve_join(
        self, address: tuple[str, int], join: Join, server_certificate_sha256: bytes
    ) -> Joined | JoinRefused:
        self.health.joins += 1
        places = Places(
            self._quic_addresses(),
            broker_urls(self.settings, self.broker.port if self.broker else None),
            self.moment.trusted.root_version,
        )
        answer = await self.writer(
            lambda _store: self._enrolment.join(
                join,
                address=host_of(address[0]),
                server_certificate_sha256=server_certificate_sha256,
                places=places,
                now=time.monotonic(),
                utc_now=time.time(),
            )
        )
        # A device connects the moment it has its answer: it must be known by then.
        await self._load()
        return answer

    async def _consume(self) -> None:
        """Store what devices say, as much in one transaction as has come."""
        waiting: list[Incoming] = []
        async for message in self.link.messages():
            waiting.append(message)
            kind = message.topic.kind.value
            self.health.received[kind] += 1
            if len(self.link.inbox) == 0 or len(waiting) >= MAX_BATCH:
                batch, waiting = waiting, []
                await self._store_batch(batch)

    async def _store_batch(self, messages: list[Incoming]) -> None:
        try:
            batch: Batch = await self.writer(
                lambda _store: self._ingest.handle(messages, utc_now=time.time())
            )
        except EdgeSyncError as exc:
            # Not acknowledged: devices keep their reports and send them again.
            self.health.problems["database"] = str(exc)
            logger.error("%s", exc)  # noqa: TRY400 - the sentence says it all
            return
        try:
            await self._act_on(batch)
        except EdgeSyncError as exc:
            # Stored, but not acknowledged: devices send those reports again, and are acknowledged then.
            logger.error("%s", exc)  # noqa: TRY400 - the sentence says it all

    async def _act_on(self, batch: Batch) -> None:
        if batch.states:
            await self._load()
            for device, state in batch.states.items():
                held = [
                    Digest(bundle.digest) for bundle in state.bundles if bundle.state == "succeeded"
                ]
                await self.seeder.seen(PeerKey(state.key), live=state.online, held=held)
                if state.online:
                    await self._tell_peers(DeviceId(device))
        await self.announcer.acknowledge(batch.acks)

    async def _tell_peers(self, device_id: DeviceId) -> None:
        """Introduce a device that came to those at its site, and them to it."""
        device = self.moment.register.by_id.get(device_id)
        if device is None:
            return
        neighbours = [
            one for one in self.moment.register.at_site(device.site) if one.local_addresses
        ]
        now = time.monotonic()
        for other in {device.id, *(one.id for one in neighbours[:PEERS_TOLD])}:
            if now - self._told.get(other, -PEERS_AGAIN_S) < PEERS_AGAIN_S and other != device.id:
                continue
            self._told[other] = now
            told = [
                wire.ToldPeer(id=one.id, key=one.key, addresses=list(one.local_addresses[:8]))
                for one in neighbours
                if one.id != other
            ]
            await self.announcer.tell_peers(other, told[:PEERS_TOLD], site=device.site)

    # --- what it says of itself ------------------------------------------------------------------------------------
    @property
    def broker_url(self) -> str:
        if self.broker is None:
            return self.settings.broker
        return (
            f"mqtts://{HostPort(self.settings.listen_mqtt.host or '127.0.0.1', self.broker.port)}"
        )

    def _quic_addresses(self) -> list[str]:
        return [str(address) for address in self.settings.advertise]

    async def _report_runtime(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            self.health.beat()
            try:
                await self._write_runtime()
                self.health.problems.pop("database", None)
            except EdgeSyncError as exc:
                self.health.problems["database"] = str(exc)

    async def _write_runtime(self) -> None:
        seen = {conn.peer.id: HostPort(*conn.address[:2]) for conn in self.endpoint.connections}
        await self.writer(
            status.write_runtime,
            pid=os.getpid(),
            started=self.started,
            utc_now=time.time(),
            data=self.health.facts(),
        )
        moved = {
            device_id: str(address)
            for device_id, address in seen.items()
            if (known := self.moment.register.by_id.get(DeviceId(device_id))) is not None
            and host_of(known.address) != address.host
        }
        if moved:
            await self.writer(_set_addresses, moved)
            self._dirty.set()
        await self._notice_the_silent()

    def _will(self) -> Will:
        """Asked before each connect. Who is there is then told anew, by what an external broker retained."""
        if self.broker is None:
            self.writer.soon(_nobody_is_known)
            self._dirty.set()
        return self.announcer.will()

    async def _notice_the_silent(self) -> None:
        """A device that left the embedded broker without a word is offline; one that connects says so itself."""
        if self.broker is None:
            return
        connected = self.broker.connected_ids()
        silent = {
            device.id
            for device in self.moment.register.by_id.values()
            if device.online and device.id not in connected
        }
        # Twice in a row: its last word may still be on its way through our own link.
        gone = sorted(silent & self._silent)
        self._silent = silent
        if gone:
            await self.writer(_set_offline, gone, time.time())
            for device_id in gone:
                await self.seeder.seen(self.moment.register.by_id[device_id].key, live=False)
            self._dirty.set()

    async def _watchdog(self) -> None:
        """Feed systemd's watchdog only while the loop keeps time and the database answers."""
        interval = systemd.watchdog_interval_s()
        if interval is None:
            await asyncio.Event().wait()
            return
        while True:
            await asyncio.sleep(interval)
            if self.health.lag_s < MAX_LAG_S:
                await self.writer(GatewayStore.data_version)
                systemd.notify("WATCHDOG=1")


def _follow(store: GatewayStore, device_id: DeviceId) -> None:
    assignments.follow(store, [device_id])


def _renew(store: GatewayStore, utc_now: float) -> None:
    roles = setup.repository(store).refresh(utc_now=utc_now)
    if roles:
        store.emit("gateway", "metadata.refreshed", "metadata", {"roles": roles}, utc_now=utc_now)
    assignments.renew(store, utc_now=utc_now)


def _nobody_is_known(store: GatewayStore) -> None:
    Ingest(store).reset_liveness()


def _close_tables(store: GatewayStore) -> None:
    _nobody_is_known(store)
    status.clear_runtime(store)


def _next_commands(store: GatewayStore, devices: list[str], utc_now: float) -> dict[str, int]:
    """A command sequence for each device, with room for as many commands as one batch of acks may need."""
    found: dict[str, int] = {}
    with store.atomic() as db:
        for device in devices:
            row = store.one("SELECT cmd_sequence FROM devices WHERE id = ?", (device,))
            if row is not None:
                found[device] = max(row["cmd_sequence"] + 1, int(utc_now * 1000))
                db.conn.execute(
                    "UPDATE devices SET cmd_sequence = ? WHERE id = ?",
                    (found[device] + MAX_BATCH, device),
                )
    return found


def _set_addresses(store: GatewayStore, addresses: Mapping[str, str]) -> None:
    with store.atomic() as db:
        for device, address in addresses.items():
            db.conn.execute("UPDATE devices SET address = ? WHERE id = ?", (address, device))


def _set_offline(store: GatewayStore, devices: list[DeviceId], utc_now: float) -> None:
    with store.atomic() as db:
        for device in devices:
            db.conn.execute("UPDATE devices SET online = 0 WHERE id = ?", (device,))
            store.emit(f"device:{device}", "device.offline", f"device:{device}", utc_now=utc_now)
