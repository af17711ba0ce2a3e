"""Signed payloads: nothing is believed before cap, signature, shape and owner agree."""

import hashlib
import json

import msgspec
import pytest

from edgesync import envelope, limits
from edgesync.envelope import SigningKey
from edgesync.errors import (
    BadSignatureError,
    LimitExceededError,
    MalformedMessageError,
    MetadataExpiredError,
    NotAuthorizedError,
    PieceHashMismatchError,
    UnexpectedMessageError,
    VerificationError,
)
from edgesync.ids import DeviceId, Digest, GatewayId
from edgesync.wire import mqtt, topics
from edgesync.wire.topics import parse

DEVICE = SigningKey.from_seed(b"d" * 32)
GATEWAY = SigningKey.from_seed(b"g" * 32)
DEV = DeviceId("van-0017")
GW = GatewayId("gw-eu1")
DIGEST = Digest("ab" * 32)
NOW = 1_800_000_000.0
EXPIRING = {"issued": NOW, "expires": NOW + 60}
HELD = mqtt.HeldBundle(kind="files", name="fw", version="1.0", digest=DIGEST, state="active")


def state(**changes: object) -> mqtt.State:
    fields: dict[str, object] = {
        "device": DEV,
        "key": DEVICE.key,
        "epoch": 7,
        "sequence": 1,
        "online": True,
        **changes,
    }
    return mqtt.State(**fields)  # type: ignore[arg-type]


REPORT = mqtt.Report(
    device=DEV,
    key=DEVICE.key,
    epoch=3,
    sequence=9,
    issued=NOW,
    kind="firmware",
    name="fw",
    version="1.0",
    digest=DIGEST,
    assignment="a-1",
    status="failed",
    step="verifying",
    reason="the tree differs",
    bytes_from_peers=12,
    duration_s=1.5,
)
COMMAND = mqtt.Cmd(
    device=DEV, gateway=GW, sequence=4, body=mqtt.Ack(epoch=3, sequences=[9]), **EXPIRING
)
SIGNED = {
    topics.state(DEV): (state(bundles=[HELD], addresses=["10.0.0.7:7443"]), DEVICE),
    topics.report(DEV): (REPORT, DEVICE),
    topics.rsp(DEV): (
        mqtt.Rsp(device=DEV, key=DEVICE.key, epoch=7, sequence=4, ok=True, text="pong"),
        DEVICE,
    ),
    topics.presence(GW): (
        mqtt.Presence(gateway=GW, epoch=1, online=True, issued=NOW, quic=["[::1]:7443"]),
        GATEWAY,
    ),
    topics.cmd(DEV): (COMMAND, GATEWAY),
    topics.peers(DEV): (
        mqtt.Peers(
            device=DEV,
            gateway=GW,
            sequence=1,
            peers=[mqtt.ToldPeer(id="b", key=GATEWAY.key, addresses=["10.0.0.8:7443"])],
            **EXPIRING,
        ),
        GATEWAY,
    ),
    topics.caps(GW): (mqtt.Caps(gateway=GW, sequence=1, upload_bytes_s=5, **EXPIRING), GATEWAY),
    topics.revoked(GW): (
        mqtt.Revoked(gateway=GW, sequence=1, issued=NOW, keys=[DEVICE.key]),
        GATEWAY,
    ),
}


@pytest.mark.parametrize("topic", SIGNED)
def test_round_trip(topic: str) -> None:
    message, signer = SIGNED[topic]
    data = mqtt.seal(message, signer)  # type: ignore[arg-type]
    assert mqtt.unseal(parse(topic), data, keys={signer.key}, utc_now=NOW) == message


@pytest.mark.parametrize("topic", SIGNED)
def test_another_key_and_another_topic_are_refused(topic: str) -> None:
    message, signer = SIGNED[topic]
    data = mqtt.seal(message, signer)  # type: ignore[arg-type]
    other = SigningKey.from_seed(b"x" * 32)
    with pytest.raises(NotAuthorizedError):
        mqtt.unseal(parse(topic), data, keys={other.key})
    for elsewhere in SIGNED:
        if elsewhere != topic:
            with pytest.raises(VerificationError):
                mqtt.unseal(parse(elsewhere), data, keys={signer.key})
    foreign = topic.replace(DEV, "other").replace(GW, "other")
    with pytest.raises(NotAuthorizedError):
        mqtt.unseal(parse(foreign), data, keys={signer.key})


def test_every_changed_byte_is_noticed() -> None:
    data = mqtt.seal(REPORT, DEVICE)
    for position in range(0, len(data), 7):
        changed = bytearray(data)
        changed[position] ^= 1
        with pytest.raises(VerificationError):
            mqtt.unseal(parse(topics.report(DEV)), bytes(changed), keys={DEVICE.key})


def test_a_message_that_names_another_key_is_refused() -> None:
    forged = envelope.sign("state", mqtt.encode(state(key=GATEWAY.key)), DEVICE)
    with pytest.raises(NotAuthorizedError):
        mqtt.unseal(parse(topics.state(DEV)), forged, keys={DEVICE.key})


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": -1},
        {"epoch": 2**53},
        {"sequence": "1"},
        {"online": 1},
        {"device": "Van"},
        {"device": "van\n"},
        {"listen_port": 65_536},
        {"addresses": ["10.0.0.1:1"] * 9},
        {"addresses": ["10.0.0.1 :1"]},
        {"bundles": [{}]},
        {"waiting": "x" * 201},
        {"root_version": -1},
        {"issued": float("1e300")},
    ],
    ids=str,
)
def test_fields_out_of_bounds_are_refused(change: dict[str, object]) -> None:
    told = json.loads(mqtt.encode(state())) | change
    data = envelope.sign("state", json.dumps(told).encode(), DEVICE)
    with pytest.raises(MalformedMessageError):
        mqtt.unseal(parse(topics.state(DEV)), data, keys={DEVICE.key})


def test_unknown_fields_are_room_to_grow_and_missing_ones_are_not() -> None:
    told = json.loads(mqtt.encode(state()))
    data = envelope.sign("state", json.dumps(told | {"later": 1}).encode(), DEVICE)
    assert mqtt.unseal(parse(topics.state(DEV)), data, keys={DEVICE.key}) == state()
    del told["epoch"]
    data = envelope.sign("state", json.dumps(told).encode(), DEVICE)
    with pytest.raises(MalformedMessageError):
        mqtt.unseal(parse(topics.state(DEV)), data, keys={DEVICE.key})


def test_deep_nesting_is_an_ordinary_refusal() -> None:
    bomb = b'{"x":' + b"[" * 3000 + b"]" * 3000 + b"}"
    with pytest.raises(MalformedMessageError):
        mqtt.unseal(
            parse(topics.state(DEV)), envelope.sign("state", bomb, DEVICE), keys={DEVICE.key}
        )


def test_orders_end() -> None:
    data = mqtt.seal(COMMAND, GATEWAY)
    topic = parse(topics.cmd(DEV))
    with pytest.raises(MetadataExpiredError):
        mqtt.unseal(topic, data, keys={GATEWAY.key}, utc_now=NOW + 60)
    eternal = msgspec.structs.replace(COMMAND, expires=NOW + limits.MAX_COMMAND_LIFETIME_S + 1)
    with pytest.raises(LimitExceededError):
        mqtt.unseal(topic, mqtt.seal(eternal, GATEWAY), keys={GATEWAY.key}, utc_now=NOW)


def test_sizes_are_capped_before_anything_is_verified() -> None:
    with pytest.raises(LimitExceededError):
        mqtt.unseal(
            parse(topics.report(DEV)), bytes(limits.MAX_REPORT_BYTES + 1), keys={DEVICE.key}
        )


def test_what_carries_no_signed_message_is_refused() -> None:
    for topic in (topics.assign(DEV), topics.progress(DEV), topics.bundle(GW, DIGEST)):
        with pytest.raises(UnexpectedMessageError):
            mqtt.unseal(parse(topic), b"{}", keys={DEVICE.key})


def test_a_large_state_leaves_out_bundles_and_says_how_many() -> None:
    bundles = [
        msgspec.structs.replace(
            HELD,
            name=f"b{n}" + "x" * 50,
            version="9" * 60,
            reason="\u20ac" * 200,
            pieces_have=99_999,
            pieces_total=99_999,
        )
        for n in range(limits.MAX_STATE_BUNDLES)
    ]
    data = mqtt.seal_state(state(bundles=bundles), DEVICE)
    assert len(data) <= limits.MAX_STATE_BYTES
    got = mqtt.unseal(parse(topics.state(DEV)), data, keys={DEVICE.key})
    assert got.bundles == bundles[: len(got.bundles)]
    assert len(got.bundles) + got.bundles_omitted == len(bundles)


def test_the_largest_of_the_others_fit_their_topics() -> None:
    long = {"reason": "\u20ac" * 200, "assignment": "a" * 64, "name": "n" * 63, "version": "9" * 64}
    counters = {
        field: 2**53 - 1
        for field in mqtt.Report.__struct_fields__
        if field.startswith(("bytes", "pieces", "payload"))
    }
    mqtt.seal(msgspec.structs.replace(REPORT, **long, **counters), DEVICE)
    peers = [
        mqtt.ToldPeer(id="i" * 63, key=DEVICE.key, addresses=["[fe80::1234:5678]:65535"] * 8)
        for _ in range(limits.MAX_PEERS_TOLD)
    ]
    mqtt.seal(mqtt.Peers(device=DEV, gateway=GW, sequence=1, peers=peers, **EXPIRING), GATEWAY)
    acks = mqtt.Ack(epoch=2**53 - 1, sequences=[2**53 - 1] * limits.MAX_ACKED_REPORTS)
    mqtt.seal(msgspec.structs.replace(COMMAND, body=acks), GATEWAY)
    keys = [DEVICE.key] * 700
    mqtt.seal(mqtt.Revoked(gateway=GW, sequence=1, issued=NOW, keys=keys), GATEWAY)


def test_a_bundle_topic_carries_its_manifest_or_a_pointer() -> None:
    manifest = b'{"schema":"x"}'
    digest = Digest(hashlib.sha256(manifest).hexdigest())
    topic = parse(topics.bundle(GW, digest))
    assert mqtt.decode_bundle(topic, mqtt.bundle_payload(digest, manifest)) == manifest
    large = bytes(limits.SOFT_MQTT_PAYLOAD_BYTES + 1)
    far = Digest(hashlib.sha256(large).hexdigest())
    pointer = mqtt.decode_bundle(parse(topics.bundle(GW, far)), mqtt.bundle_payload(far, large))
    assert pointer == mqtt.BundlePointer(length=len(large))
    for data in (b"", manifest + b" ", b'{"edgesync":"pointer","length":0}'):
        with pytest.raises(PieceHashMismatchError):
            mqtt.decode_bundle(topic, data)


def test_a_metadata_file_must_have_the_digest_in_its_topic() -> None:
    data = b"snapshot"
    topic = parse(topics.tuf_file(GW, Digest(hashlib.sha256(data).hexdigest())))
    assert mqtt.decode_file(topic, data) == data
    with pytest.raises(PieceHashMismatchError):
        mqtt.decode_file(topic, data + b"x")


def test_progress_is_bounded_and_belongs_to_its_topic() -> None:
    transfer = mqtt.TransferProgress(digest=DIGEST, pieces_have=1, pieces_total=2)
    data = mqtt.encode(mqtt.Progress(device=DEV, transfers=[transfer]))
    assert mqtt.decode_progress(parse(topics.progress(DEV)), data).transfers == [transfer]
    with pytest.raises(NotAuthorizedError):
        mqtt.decode_progress(parse(topics.progress(DeviceId("other"))), data)
    with pytest.raises(MalformedMessageError):
        mqtt.decode_progress(parse(topics.progress(DEV)), b"[]")


HERE, LATER, GONE = state(sequence=5), state(sequence=6), state(sequence=0, online=False)
NEXT = state(epoch=8, sequence=0)


@pytest.mark.parametrize(
    ("new", "old", "counts"),
    [
        (HERE, None, True),
        (GONE, None, True),
        (LATER, HERE, True),
        (HERE, LATER, False),
        (HERE, HERE, False),
        (GONE, LATER, True),
        (LATER, GONE, False),
        (GONE, GONE, False),
        (NEXT, LATER, True),
        (NEXT, GONE, True),
        (GONE, NEXT, False),
        (LATER, NEXT, False),
    ],
)
def test_a_will_counts_only_while_its_epoch_is_the_newest(
    new: mqtt.State, old: mqtt.State | None, counts: bool
) -> None:
    assert mqtt.supersedes(new, old) is counts


def test_presence_follows_the_same_rule() -> None:
    here = mqtt.Presence(gateway=GW, epoch=2, online=True, issued=NOW)
    later = msgspec.structs.replace(here, issued=NOW + 1)
    gone = msgspec.structs.replace(here, online=False, issued=NOW - 9)
    restarted = msgspec.structs.replace(here, epoch=3, issued=0.0)
    assert mqtt.presence_supersedes(here, None)
    assert mqtt.presence_supersedes(later, here)
    assert not mqtt.presence_supersedes(here, later)
    assert mqtt.presence_supersedes(gone, later)
    assert not mqtt.presence_supersedes(later, gone)
    assert mqtt.presence_supersedes(restarted, gone)
    assert not mqtt.presence_supersedes(gone, restarted)


def test_an_envelope_with_a_broken_signature_is_refused() -> None:
    told = json.loads(mqtt.seal(REPORT, DEVICE))
    told["sig"] = json.loads(mqtt.seal(msgspec.structs.replace(REPORT, sequence=8), DEVICE))["sig"]
    with pytest.raises(BadSignatureError):
        mqtt.unseal(parse(topics.report(DEV)), json.dumps(told).encode(), keys={DEVICE.key})
