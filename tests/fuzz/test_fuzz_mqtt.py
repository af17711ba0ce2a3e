"""Whatever bytes a broker hands over, only errors of the project's own tree come out."""

import contextlib
import random

from hypothesis import given
from hypothesis import strategies as st

from edgesync import envelope
from edgesync.envelope import SigningKey
from edgesync.errors import EdgeSyncError, MalformedMessageError
from edgesync.ids import DeviceId, Digest, GatewayId
from edgesync.wire import mqtt, topics
from edgesync.wire.topics import Kind, Topic

KEY = SigningKey.from_seed(b"k" * 32)
DEV, GW, DIGEST = DeviceId("van-1"), GatewayId("gw-1"), Digest("ab" * 32)
SEALED = {
    kind: Topic(kind, GW if topics.POLICIES[kind].scope == "g" else DEV)
    for kind in mqtt.SIGNED_KINDS
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.text(max_size=300))
def test_any_text_as_a_topic(text: str) -> None:
    with contextlib.suppress(MalformedMessageError):
        assert str(topics.parse(text)) == text


@given(st.sampled_from(sorted(SEALED)), st.binary(max_size=400))
def test_any_bytes_as_a_payload(kind: Kind, data: bytes) -> None:
    for call in (
        lambda: mqtt.unseal(SEALED[kind], data, keys={KEY.key}, utc_now=0.0),
        lambda: mqtt.decode_progress(Topic(Kind.PROGRESS, DEV), data),
        lambda: mqtt.decode_bundle(Topic(Kind.BUNDLE, GW, DIGEST), data),
    ):
        with contextlib.suppress(EdgeSyncError):
            call()


@given(st.sampled_from(sorted(SEALED)), st.binary(max_size=400) | JSON)
def test_any_payload_that_a_member_signed(kind: Kind, payload: object) -> None:
    import msgspec

    data = payload if isinstance(payload, bytes) else msgspec.json.encode(payload)
    with contextlib.suppress(EdgeSyncError):
        mqtt.unseal(SEALED[kind], envelope.sign(kind.value, data, KEY), keys={KEY.key}, utc_now=0.0)


def test_mutations_of_a_real_message() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    state = mqtt.State(device=DEV, key=KEY.key, epoch=1, sequence=1, online=True)
    payload = mqtt.encode(state)
    for _ in range(3000):
        changed = bytearray(payload)
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(len(changed))
            match rng.randrange(3):
                case 0:
                    changed[at] = rng.randrange(256)
                case 1:
                    del changed[at : at + rng.randrange(1, 8)]
                case _:
                    changed[at:at] = rng.randbytes(rng.randrange(1, 8))
        data = envelope.sign("state", bytes(changed), KEY)
        with contextlib.suppress(EdgeSyncError):
            mqtt.unseal(SEALED[Kind.STATE], data, keys={KEY.key})
