"""What this device tells the gateway over MQTT, and what it hears there.

Shell around the link: it signs and publishes state, reports and progress, resends reports until a signed
acknowledgement, and hands verified orders and untrusted courier bytes to the agent. Only ``progress`` is unsigned.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

import msgspec

from device.outbox import Outbox
from edgesync.config import HostPort
from edgesync.errors import EdgeSyncError
from edgesync.identity import Identity
from edgesync.ids import DeviceId, GatewayId, PeerKey
from edgesync.io.mqtt import Incoming, LinkConfig, MqttLink, Will
from edgesync.io.proxy import ProxySettings
from edgesync.wire import mqtt, topics
from edgesync.wire.topics import Kind

logger = logging.getLogger(__name__)

RESEND_S = 60.0
RESEND_SPREAD_S = 1.0
"""A report without an acknowledgement is sent again after this long."""
GOODBYE_TIMEOUT_S = 1.0


class Listener(Protocol):
    """What the agent does with what came."""

    async def timestamp_offered(self, data: bytes) -> None: ...
    def file_offered(self, name: str, data: bytes) -> None: ...
    async def assignment_offered(self, data: bytes) -> None: ...
    def assignment_refused(self, data: bytes, error: EdgeSyncError) -> None: ...
    def peers_told(self, peers: mqtt.Peers) -> None: ...
    async def caps_told(self, message: mqtt.Caps) -> None: ...
    def presence_told(self, presence: mqtt.Presence) -> None: ...


class Telemetry:
    def __init__(
        self,
        *,
        device_id: DeviceId,
        gateway_id: GatewayId,
        identity: Identity,
        brokers: Callable[[], list[str]],
        gateway_keys: Callable[[], list[PeerKey]],
        outbox: Outbox,
        state: Callable[[], mqtt.State],
        progress: Callable[[], mqtt.Progress | None],
        listener: Listener,
        in_storage: Callable[..., Awaitable[Any]],
        utc_now: Callable[[], float] = time.time,
        config: LinkConfig | None = None,
        doors: Callable[[], Sequence[HostPort]] = tuple,
        proxies: ProxySettings | None = None,
    ) -> None:
        """``state`` makes a State whose epoch, sequence and ``online`` are filled in here."""
        self._id = device_id
        self._gateway = gateway_id
        self._identity = identity
        self._gateway_keys = gateway_keys
        self._outbox = outbox
        self._state = state
        self._progress = progress
        self._listener = listener
        self._in_storage = in_storage
        self._utc_now = utc_now
        self._epoch = 0
        self._next_epoch = 0
        self._sequence = 0
        self._command_floor = 0
        self._presence: mqtt.Presence | None = None
        self._report_interval_s = 30.0
        self._changed = asyncio.Event()
        self._reports_waiting = asyncio.Event()
        self.last_seen: float | None = None
        """Unix time anything signed by the gateway came."""
        self.link = MqttLink(
            client_id=device_id,
            brokers=brokers,
            identity=identity,
            allowed_keys=gateway_keys,
            subscriptions=self._subscriptions,
            will=self._will,
            on_connect=self._connected,
            config=config,
            doors=doors,
            proxies=proxies,
        )

    def state_changed(self) -> None:
        """Publish the state soon; calls in quick succession become one message."""
        self._changed.set()

    def report_added(self) -> None:
        self._reports_waiting.set()

    async def run(self) -> None:
        self._next_epoch = await self._in_storage(self._outbox.next_connection_epoch)
        async with asyncio.TaskGroup() as group:
            group.create_task(self.link.run(), name="mqtt-link")
            group.create_task(self._listen(), name="mqtt-listen")
            group.create_task(self._tell_state(), name="mqtt-state")
            group.create_task(self._tell_reports(), name="mqtt-reports")
            group.create_task(self._tell_progress(), name="mqtt-progress")

    async def goodbye(self) -> None:
        """Say that this device goes: a broker publishes no will for who leaves in good order."""
        if self.link.connected:
            gone = self._gone()
            await self.link.publish(
                topics.state(self._id), gone, qos=1, retain=True, timeout_s=GOODBYE_TIMEOUT_S
            )

    # --- telling ----------------------------------------------------------------------------------------------------
    def _subscriptions(self) -> list[tuple[str, int]]:
        return [
            (f"es1/g/{self._gateway}/#", 1),
            (topics.assign(self._id), 1),
            (topics.cmd(self._id), 1),
            (topics.peers(self._id), 0),
        ]

    def _will(self) -> Will:
        # Asked on the event loop, so the number was drawn from the database beforehand.
        self._epoch = max(self._epoch + 1, self._next_epoch)
        self._sequence = 0
        return Will(topics.state(self._id), self._gone())

    def _gone(self) -> bytes:
        """A state that ends the present epoch."""
        gone = mqtt.State(
            device=self._id,
            key=self._identity.key,
            epoch=self._epoch,
            sequence=0,
            online=False,
            issued=time.time(),
        )
        return mqtt.seal(gone, self._identity)

    async def _connected(self) -> None:
        await self._raise_epoch(self._epoch)
        self._changed.set()
        self._reports_waiting.set()

    async def _tell_state(self) -> None:
        while True:
            await self._changed.wait()
            await self.link.wait_connected()
            self._changed.clear()
            self._sequence += 1
            state = msgspec.structs.replace(
                self._state(),
                epoch=self._epoch,
                sequence=self._sequence,
                online=True,
                issued=time.time(),
            )
            sealed = mqtt.seal_state(state, self._identity)
            await self.link.publish(topics.state(self._id), sealed, qos=1, retain=True)
            await asyncio.sleep(0.2)  # what changes together is told together

    async def _tell_reports(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RESEND_S):
                    await self._reports_waiting.wait()
            self._reports_waiting.clear()
            await self.link.wait_connected()
            for report in await self._in_storage(self._outbox.pending):
                sealed = mqtt.seal(report, self._identity)
                if not await self.link.publish(topics.report(self._id), sealed, qos=1):
                    break

    async def _tell_progress(self) -> None:
        while True:
            await asyncio.sleep(random.uniform(0.5, 1.0) * self._report_interval_s)  # noqa: S311 - spreads load
            progress = self._progress()
            if progress is not None and self.link.connected:
                await self.link.publish(topics.progress(self._id), mqtt.encode(progress), qos=0)

    # --- hearing ----------------------------------------------------------------------------------------------------
    async def _listen(self) -> None:
        async for message in self.link.messages():
            try:
                await self._hear(message)
            except EdgeSyncError as exc:
                logger.warning("%s ignored: %s", message.topic, exc)
                if message.topic.kind is Kind.ASSIGN:
                    self._listener.assignment_refused(message.payload, exc)

    async def _hear(self, message: Incoming) -> None:
        topic, data = message.topic, message.payload
        if not data:
            return  # an empty retained message means nothing: absence never removes
        match topic.kind:
            case Kind.TUF_TIMESTAMP:
                await self._listener.timestamp_offered(data)
            case Kind.TUF_ROOT:
                self._listener.file_offered(f"root/{topic.value}", data)
            case Kind.TUF_FILE:
                self._listener.file_offered(f"sha256/{topic.value}", mqtt.decode_file(topic, data))
            case Kind.BUNDLE:
                found = mqtt.decode_bundle(topic, data)
                if isinstance(found, bytes):
                    self._listener.file_offered(f"sha256/{topic.value}", found)
            case Kind.ASSIGN:
                await self._listener.assignment_offered(data)
            case Kind.PRESENCE:
                presence = mqtt.unseal(topic, data, keys=self._gateway_keys())
                if mqtt.presence_supersedes(presence, self._presence):
                    known, self._presence = self._presence, presence
                    if not message.retained and (known is None or known.epoch != presence.epoch):
                        self._gateway_came()
                    self._seen()
                    self._report_interval_s = float(presence.report_interval_s)
                    self._listener.presence_told(presence)
            case Kind.PEERS:
                told = mqtt.unseal(topic, data, keys=self._gateway_keys(), utc_now=self._utc_now())
                self._listener.peers_told(told)
            case Kind.CAPS:
                said = mqtt.unseal(topic, data, keys=self._gateway_keys(), utc_now=self._utc_now())
                await self._listener.caps_told(said)
            case Kind.CMD:
                await self._obey(mqtt.unseal(topic, data, keys=self._gateway_keys()))
            case _:
                logger.debug("nothing to do with %s", topic)

    async def _obey(self, order: mqtt.Cmd) -> None:
        if order.sequence <= self._command_floor:
            return
        self._command_floor = order.sequence
        self._seen()
        match order.body:
            case mqtt.Ack(epoch=epoch, sequences=sequences):
                await self._in_storage(self._outbox.ack, epoch, sequences)
            case mqtt.Resync(epoch=epoch):
                await self._raise_epoch(epoch)
                self._changed.set()
                self._reports_waiting.set()
            case mqtt.SetInterval(report_interval_s=interval):
                self._report_interval_s = float(interval)
            case mqtt.Ping():
                await self._answer(order.sequence)

    async def _raise_epoch(self, seen: int) -> None:
        await self._in_storage(self._outbox.raise_connection_epoch, seen)
        self._next_epoch = await self._in_storage(self._outbox.next_connection_epoch)

    async def _answer(self, sequence: int) -> None:
        answer = mqtt.Rsp(
            device=self._id,
            key=self._identity.key,
            epoch=self._epoch,
            sequence=sequence,
            ok=True,
        )
        sealed = mqtt.seal(answer, self._identity)
        await self.link.publish(topics.rsp(self._id), sealed, qos=1)

    def _gateway_came(self) -> None:
        """It subscribed just now: what was said before it did, a broker confirmed and passed to nobody."""
        if self._presence is not None and self._presence.online and self._outbox.last_size.waiting:
            wait_s = random.uniform(0.0, RESEND_SPREAD_S)  # noqa: S311  # spreads load
            asyncio.get_running_loop().call_later(wait_s, self._reports_waiting.set)

    def _seen(self) -> None:
        self.last_seen = time.time()
