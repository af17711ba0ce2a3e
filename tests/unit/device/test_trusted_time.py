"""What expires on a device expires by the time it was given, not by the clock of the machine it runs on."""

import asyncio
from typing import Any, cast

import pytest

from device.reading_rights import ReadingRights
from device.telemetry import Telemetry
from edgesync import assignment
from edgesync.assignment import AssignmentSet, Entry
from edgesync.envelope import SigningKey
from edgesync.errors import EdgeSyncError
from edgesync.identity import Identity, self_signed
from edgesync.ids import DeviceId, Digest, FleetId, GatewayId, PeerKey
from edgesync.io.mqtt import Incoming
from edgesync.transport.connection import PeerConnection
from edgesync.wire import mqtt
from edgesync.wire.topics import Kind, Topic

PAST = 1_000_000_000.0
"""Long before the clock of whoever runs this."""
KEY, FLEET, DIGEST = "d" * 64, "f" * 64, Digest("a" * 64)


class Courier:
    """A connection that serves one file."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    async def fetch(self, _name: str, _max_bytes: int) -> bytes:
        return self.data


def rights(signer: SigningKey, data: bytes, times: list[float]) -> ReadingRights:
    courier = cast("PeerConnection", Courier(data))
    return ReadingRights(
        connection=lambda _key: courier,
        keys=lambda: [PeerKey(signer.key)],
        fleet=FleetId(FLEET),
        utc_now=lambda: times[-1],
    )


async def test_reading_rights_end_by_the_time_given() -> None:
    signer = SigningKey.from_seed(b"g" * 32)
    entry = Entry(
        kind="files",
        name="app",
        version="1",
        target_hash=DIGEST,
        target_length=10,
        assignment_id="a-1",
    )
    data = assignment.sign(
        AssignmentSet(
            fleet=FLEET,
            gateway_key=signer.key,
            device="cam-1",
            device_key=KEY,
            sequence=1,
            issued=PAST,
            expires=PAST + assignment.LIFETIME_S,
            entries=(entry,),
        ),
        signer,
    )
    times = [PAST + 1.0]
    asked = rights(signer, data, times)
    assert not asked.may_read(PeerKey(KEY), "cam-1", DIGEST)  # the proof is fetched first
    await asyncio.gather(*asked._asking.values())
    assert asked.may_read(PeerKey(KEY), "cam-1", DIGEST)
    times.append(PAST + assignment.LIFETIME_S)
    assert not asked.may_read(PeerKey(KEY), "cam-1", DIGEST)
    await asyncio.gather(*asked._asking.values())
    late = rights(signer, data, times)
    late.may_read(PeerKey(KEY), "cam-1", DIGEST)
    await asyncio.gather(*late._asking.values())
    assert not late.may_read(PeerKey(KEY), "cam-1", DIGEST)


async def test_what_the_gateway_tells_expires_by_the_time_given() -> None:
    gateway, device = Identity.generate(), self_signed(Identity.generate(), "cam-1")
    told: list[Any] = []

    class Listener:
        def peers_told(self, peers: mqtt.Peers) -> None:
            told.append(peers)

    times = [PAST + 1.0]
    telemetry = Telemetry(
        device_id=DeviceId("cam-1"),
        gateway_id=GatewayId("gw-1"),
        identity=device,
        brokers=list,
        gateway_keys=lambda: [gateway.key],
        outbox=cast("Any", None),
        state=cast("Any", None),
        progress=lambda: None,
        listener=cast("Any", Listener()),
        in_storage=cast("Any", None),
        utc_now=lambda: times[-1],
    )
    message = mqtt.Peers(
        device="cam-1", gateway="gw-1", sequence=1, issued=PAST, expires=PAST + 60.0, peers=[]
    )
    incoming = Incoming(Topic(Kind.PEERS, "cam-1"), mqtt.seal(message, gateway), retained=False)
    await telemetry._hear(incoming)
    assert told == [message]
    times.append(PAST + 61.0)
    with pytest.raises(EdgeSyncError, match="expired"):
        await telemetry._hear(incoming)
    assert told == [message]
