"""Topics are spelled in one way only, and the access rules leave no gap."""

import pytest

from edgesync import limits
from edgesync.errors import LimitExceededError, MalformedMessageError
from edgesync.ids import DeviceId, Digest, GatewayId
from edgesync.wire import topics
from edgesync.wire.topics import POLICIES, Kind, Topic, parse

GW = GatewayId("gw-eu1")
DEV = DeviceId("van-0017")
DIGEST = Digest("ab" * 32)

EVERY = {
    topics.presence(GW): Topic(Kind.PRESENCE, GW),
    topics.tuf_timestamp(GW): Topic(Kind.TUF_TIMESTAMP, GW),
    topics.tuf_root(GW, 12): Topic(Kind.TUF_ROOT, GW, "12"),
    topics.tuf_file(GW, DIGEST): Topic(Kind.TUF_FILE, GW, DIGEST),
    topics.bundle(GW, DIGEST): Topic(Kind.BUNDLE, GW, DIGEST),
    topics.revoked(GW): Topic(Kind.REVOKED, GW),
    topics.caps(GW): Topic(Kind.CAPS, GW),
    topics.assign(DEV): Topic(Kind.ASSIGN, DEV),
    topics.cmd(DEV): Topic(Kind.CMD, DEV),
    topics.peers(DEV): Topic(Kind.PEERS, DEV),
    topics.state(DEV): Topic(Kind.STATE, DEV),
    topics.progress(DEV): Topic(Kind.PROGRESS, DEV),
    topics.report(DEV): Topic(Kind.REPORT, DEV),
    topics.rsp(DEV): Topic(Kind.RSP, DEV),
    topics.aggregate(GW, "rollouts"): Topic(Kind.AGGREGATE, GW, "rollouts"),
}


def test_every_kind_has_a_topic_and_a_policy() -> None:
    assert {topic.kind for topic in EVERY.values()} == set(Kind) == set(POLICIES)


@pytest.mark.parametrize(("text", "topic"), EVERY.items(), ids=[t.kind for t in EVERY.values()])
def test_build_and_parse_agree(text: str, topic: Topic) -> None:
    assert parse(text) == topic
    assert str(topic) == text
    assert len(text) <= limits.MAX_TOPIC_BYTES
    assert topic.policy.max_bytes <= limits.MAX_MQTT_PACKET_BYTES - 1024


def test_the_longest_topic_fits() -> None:
    parse(topics.tuf_file(GatewayId("g" * 63), DIGEST))
    with pytest.raises(MalformedMessageError):
        parse(topics.presence(GatewayId("g" * 64)))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "es1",
        "es1/",
        "es1/d/+/state",
        "es1/d/van/#",
        "es1/d/van/state/",
        "/es1/d/van/state",
        "es1/d/Van/state",
        "es1/d/-van/state",
        "es1/d/van/state\n",
        "es1/d/ván/state",
        "es1/d/van/presence",
        "es1/g/gw/state",
        "es1/g/gw/tuf/root/0",
        "es1/g/gw/tuf/root/01",
        "es1/g/gw/tuf/root/1\n",
        "es1/g/gw/tuf/root/\u0661",
        "es1/g/gw/tuf/sha256-" + "AB" * 32,
        "es1/g/gw/tuf/sha256",
        "es1/g/gw/bundle/" + "ab" * 31,
        "es1/g/gw/tuf",
        "es2/d/van/state",
        "$SYS/broker",
        "es1/d/" + "a" * 300 + "/state",
    ],
)
def test_nothing_else_is_a_topic(text: str) -> None:
    with pytest.raises(MalformedMessageError):
        parse(text)


def test_sizes_are_capped_by_kind() -> None:
    topic = parse(topics.progress(DEV))
    topics.check_size(topic, bytes(limits.MAX_PROGRESS_BYTES))
    with pytest.raises(LimitExceededError):
        topics.check_size(topic, bytes(limits.MAX_PROGRESS_BYTES + 1))


def test_what_a_device_may_write_hear_and_leave_behind() -> None:
    own = {t for t in EVERY.values() if t.kind in {"state", "progress", "report", "rsp"}}
    heard = {t for t in EVERY.values() if t.policy.scope == "g"} | {
        t for t in EVERY.values() if t.kind in {"assign", "cmd", "peers"}
    }
    for topic in EVERY.values():
        assert topics.may_publish("device", DEV, topic) == (topic in own)
        assert topics.may_receive("device", DEV, topic) == (topic in heard)
        assert topics.may_retain("device", DEV, topic) == (topic.kind is Kind.STATE)
        assert topics.may_publish("gateway", GW, topic)
        assert topics.may_receive("gateway", GW, topic)
        assert topics.may_retain("gateway", GW, topic) == topic.policy.retain
        assert not topics.may_publish("device", "other", topic)
        assert topics.may_receive("device", "other", topic) == (topic.policy.scope == "g")
        assert not topics.may_publish("visitor", DEV, topic)
        assert not topics.may_receive("visitor", DEV, topic)


def test_a_device_subscribes_to_all_it_may_hear() -> None:
    filters = {name for name, _ in topics.device_filters(DEV, GW)}
    assert filters == {f"es1/g/{GW}/#", topics.assign(DEV), topics.cmd(DEV), topics.peers(DEV)}
