"""The MQTT chapter of the wire protocol says what the program does."""

import re
from pathlib import Path

import pytest

from edgesync import limits
from edgesync.wire.topics import POLICIES, Kind, Topic

TEXT = Path(__file__).parents[2].joinpath("docs/wire-protocol.md").read_text(encoding="utf-8")
VALUES = {
    Kind.TUF_ROOT: "{n}",
    Kind.TUF_FILE: "{hex}",
    Kind.BUNDLE: "{digest}",
    Kind.AGGREGATE: "{subject}",
}


@pytest.mark.parametrize("kind", Kind)
def test_each_topic_stands_in_the_table_with_its_policy(kind: Kind) -> None:
    policy = POLICIES[kind]
    owner = "{device}" if policy.scope == "d" else "{gateway}"
    topic = Topic(kind, owner, VALUES.get(kind, ""))
    row = f"| `{topic}` | {policy.writer} | {policy.qos} | {'yes' if policy.retain else 'no'} | "
    row += f"{policy.max_bytes} | {policy.signer} | "
    assert row in TEXT


def test_the_table_has_no_other_topic() -> None:
    assert len(re.findall(r"^\| `es1/", TEXT, re.MULTILINE)) == len(Kind)


@pytest.mark.parametrize(
    "phrase",
    [
        f"No packet may exceed {limits.MAX_MQTT_PACKET_BYTES} bytes, no CONNECT {limits.MAX_MQTT_CONNECT_BYTES}",
        f"at most {limits.MAX_COMMAND_LIFETIME_S // 86_400} days after",
        f"at most {limits.MAX_OUTBOX_REPORTS} reports",
        f"within {limits.MQTT_UNPROVEN_TIMEOUT_S:.0f} s",
        f"at most {limits.MAX_MQTT_UNPROVEN} at a time, {limits.MAX_MQTT_UNPROVEN_PER_ADDRESS} per address",
        f"at most {limits.MAX_MQTT_KEEPALIVE_S} s",
        f"more than {limits.MAX_MQTT_QUEUED_MESSAGES} messages or {limits.MAX_MQTT_QUEUED_BYTES // limits.MIB} MiB",
        f"no more than {limits.MAX_MQTT_PACKETS_S} packets a second",
    ],
)
def test_the_numbers_are_the_constants(phrase: str) -> None:
    assert phrase in re.sub(r"\s+", " ", TEXT)
