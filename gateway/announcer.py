"""Keeps the broker saying what the database says: presence, metadata, manifests and every device's assignment set.

The broker is a soft cache that may forget everything at any moment, so after each connect everything is said again;
between connects only what changed. It decides what lies on which retained topic; it signs presence and commands, and
carries everything else as it is stored. Bundles that nobody is assigned are not announced: they are fetched by digest.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from edgesync import __version__, limits
from edgesync.envelope import Signer
from edgesync.errors import EdgeSyncError
from edgesync.ids import DeviceId, Digest, GatewayId
from edgesync.io.mqtt import MqttLink, Will
from edgesync.wire import mqtt as wire
from edgesync.wire import topics
from gateway.service.caps import CapsNow
from gateway.store import GatewayStore

logger = logging.getLogger(__name__)

COMMAND_LIFETIME_S: Final = 3600.0
CAPS_LIFETIME_S: Final = 14 * 86_400.0
"""How long devices obey caps without hearing from the gateway; signed anew after half of it."""
EPOCHS_RESERVED: Final = 1 << 24
"""Connections of one run: a run takes its epochs from the database once, since a will is made without waiting."""
PARALLEL: Final = 32
"""Retained messages on their way at a time, after a connect."""


@dataclass(frozen=True)
class Announcement:
    """Everything that shall lie on the broker, read from the database in one transaction."""

    root_version: int
    timestamp_version: int
    metadata: Mapping[str, bytes]
    """Topic → payload of TUF files."""
    manifests: Mapping[Digest, bytes]
    """Assigned bundles."""
    sets: Mapping[DeviceId, bytes]
    """Assignment sets of accepted devices."""
    caps: CapsNow = field(default_factory=CapsNow)
    active: int = 0
    """Devices that are working on something: it sets how often they report."""


@dataclass
class _Said:
    """What this connection has carried: topic → the payload's hash."""

    payloads: dict[str, int] = field(default_factory=dict)


class Announcer:
    def __init__(
        self,
        gateway: GatewayId,
        identity: Signer,
        read: Callable[[], Awaitable[Announcement]],
        quic: Callable[[], list[str]],
        next_commands: Callable[[list[str]], Awaitable[dict[str, int]]],
        *,
        first_epoch: int,
    ) -> None:
        """``read`` asks the database; ``next_commands`` allocates a command sequence for each of these devices.

        ``first_epoch`` comes from ``reserve_epochs``.
        """
        self._gateway = gateway
        self._identity = identity
        self._read = read
        self._quic = quic
        self._next_commands = next_commands
        self._said = _Said()
        self._epoch = first_epoch - 1
        self._caps: tuple[int, float, bytes] | None = None
        """Sequence, when it was signed, payload."""
        self._lock = asyncio.Lock()
        self.link: MqttLink | None = None

    def will(self) -> Will:
        """A new epoch for each connection; the will ends it."""
        self._epoch += 1
        gone = wire.Presence(
            gateway=self._gateway, epoch=self._epoch, online=False, issued=time.time()
        )
        return Will(topics.presence(self._gateway), wire.seal(gone, self._identity))

    async def connected(self) -> None:
        """Say everything: the broker may have forgotten, or be another one."""
        self._said = _Said()
        await self.refresh()

    async def refresh(self) -> None:
        """Say what changed since it was last said on this connection; does nothing without one."""
        link = self.link
        if link is None:
            return
        async with self._lock:
            wanted = self._payloads(await self._read())
            said = self._said
            news = [
                (topic, payload)
                for topic, payload in wanted.items()
                if said.payloads.get(topic) != hash(payload)
            ]
            gone = [topic for topic in said.payloads if topic not in wanted]
            for start in range(0, len(news), PARALLEL):
                await asyncio.gather(
                    *(self._say(link, said, *item) for item in news[start : start + PARALLEL])
                )
            for topic in gone:
                if await link.publish(topic, b"", qos=1, retain=True):
                    said.payloads.pop(topic, None)

    async def _say(self, link: MqttLink, said: _Said, topic: str, payload: bytes) -> None:
        try:
            if await link.publish(topic, payload, qos=1, retain=True):
                said.payloads[topic] = hash(payload)
        except EdgeSyncError as exc:
            logger.warning("cannot announce on %s: %s", topic, exc)

    def _payloads(self, now: Announcement) -> dict[str, bytes]:
        wanted: dict[str, bytes] = dict(now.metadata)
        for digest, manifest in now.manifests.items():
            wanted[topics.bundle(self._gateway, digest)] = wire.bundle_payload(digest, manifest)
        for device, envelope in now.sets.items():
            wanted[topics.assign(device)] = envelope
        if now.caps.sequence:
            wanted[topics.caps(self._gateway)] = self._sealed_caps(now.caps)
        # Presence last: who sees a version in it finds that version on the broker.
        presence = wire.Presence(
            gateway=self._gateway,
            epoch=self._epoch,
            online=True,
            issued=0.0,
            version=__version__,
            quic=self._quic()[:8],
            report_interval_s=max(30, now.active // 500),
            root_version=now.root_version,
            timestamp_version=now.timestamp_version,
        )
        wanted[topics.presence(self._gateway)] = wire.seal(presence, self._identity)
        return wanted

    def _sealed_caps(self, now: CapsNow) -> bytes:
        utc_now = time.time()
        kept = self._caps
        if (
            kept is not None
            and kept[0] == now.sequence
            and 0.0 <= utc_now - kept[1] < CAPS_LIFETIME_S / 2
        ):
            return kept[2]
        message = wire.Caps(
            gateway=self._gateway,
            sequence=now.sequence,
            issued=utc_now,
            expires=utc_now + CAPS_LIFETIME_S,
            caps=list(now.entries),
        )
        payload = wire.seal(message, self._identity)
        self._caps = (now.sequence, utc_now, payload)
        return payload

    async def goodbye(self) -> None:
        """Say that the gateway goes; a clean close publishes no will."""
        if self.link is not None and self.link.connected:
            self._epoch += 1
            gone = wire.Presence(
                gateway=self._gateway, epoch=self._epoch, online=False, issued=time.time()
            )
            await self.link.publish(
                topics.presence(self._gateway),
                wire.seal(gone, self._identity),
                qos=1,
                retain=True,
                timeout_s=2.0,
            )

    # --- to one device ----------------------------------------------------------------------------------------------
    async def acknowledge(self, acks: Mapping[tuple[str, int], list[int]]) -> None:
        """Tell devices which of their reports are stored."""
        if self.link is None or not acks:
            return
        sequences = await self._next_commands([device for device, _epoch in acks])
        now = time.time()
        for (device, epoch), stored in acks.items():
            if device not in sequences:
                continue  # It left the register meanwhile.
            for start in range(0, len(stored), limits.MAX_ACKED_REPORTS):
                command = wire.Cmd(
                    device=device,
                    gateway=self._gateway,
                    sequence=sequences[device],
                    issued=now,
                    expires=now + COMMAND_LIFETIME_S,
                    body=wire.Ack(
                        epoch=epoch, sequences=stored[start : start + limits.MAX_ACKED_REPORTS]
                    ),
                )
                sequences[device] += 1
                await self.link.publish(
                    topics.cmd(DeviceId(device)), wire.seal(command, self._identity), qos=1
                )

    async def tell_peers(
        self, device: DeviceId, peers: list[wire.ToldPeer], *, site: str = ""
    ) -> None:
        """Give a device the members near it, for when it hears nobody itself, and the site it is taken to be at."""
        if self.link is None or not (peers or site):
            return
        now = time.time()
        message = wire.Peers(
            device=device,
            gateway=self._gateway,
            sequence=int(now * 1000),
            issued=now,
            expires=now + COMMAND_LIFETIME_S,
            peers=peers[: limits.MAX_PEERS_TOLD],
            site=site[:64],
        )
        await self.link.publish(topics.peers(device), wire.seal(message, self._identity), qos=0)


def reserve_epochs(store: GatewayStore, utc_now: float) -> int:
    """The first presence epoch of this run: above every epoch of any run before, and no lower than unix milliseconds.

    The clock is only a start for a new database. A gateway whose clock was once in 2099 counts on from there.
    """
    with store.atomic() as db:
        row = store.one("SELECT next FROM presence_epoch")
        first = max(row["next"] if row is not None else 0, int(utc_now * 1000))
        db.conn.execute(
            "INSERT OR REPLACE INTO presence_epoch (id, next) VALUES (1, ?)",
            (first + EPOCHS_RESERVED,),
        )
    return first
