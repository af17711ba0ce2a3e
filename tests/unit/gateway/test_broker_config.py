"""The printed configuration says what the topic table says, for every kind of message."""

import re

import pytest

from edgesync import limits
from edgesync.errors import UsageError
from edgesync.ids import GatewayId
from edgesync.wire.topics import POLICIES, Kind, Topic, may_publish, may_receive
from gateway.broker_config import BrokerSite, broker_config, emqx_acl, mosquitto_acl, mosquitto_conf

SITE = BrokerSite(gateway=GatewayId("gw-eu1"))
VALUES = {Kind.TUF_ROOT: "1", Kind.TUF_FILE: "ab" * 32, Kind.BUNDLE: "ab" * 32, Kind.AGGREGATE: "x"}


def covers(pattern: str, topic: str) -> bool:
    return pattern == topic or (pattern.endswith("/#") and topic.startswith(pattern[:-1]))


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("owner", ["van-1", "van-2"])
def test_mosquitto_grants_a_device_what_the_table_grants(kind: Kind, owner: str) -> None:
    topic = Topic(kind, owner, VALUES.get(kind, ""))
    rights: set[str] = set()
    for line in mosquitto_acl(SITE).splitlines():
        found = re.fullmatch(r"pattern (read|write) (\S+)", line)
        if found and covers(found[2].replace("%u", "van-1"), str(topic)):
            rights.add(found[1])
    assert ("write" in rights) == may_publish("device", "van-1", topic)
    assert ("read" in rights) == may_receive("device", "van-1", topic)


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("owner", ["van-1", "van-2"])
def test_emqx_grants_a_device_what_the_table_grants(kind: Kind, owner: str) -> None:
    topic = Topic(kind, owner, VALUES.get(kind, ""))
    rights: dict[str, bool] = {}
    for line in emqx_acl(SITE).splitlines():
        found = re.fullmatch(
            r"\{allow, all, (subscribe|publish|\{publish, .*\}), \[\"(\S+)\"\]\}\.", line
        )
        if found and covers(found[2].replace("${username}", "van-1"), str(topic)):
            rights["publish" if "publish" in found[1] else "subscribe"] = (
                "retain, false" not in found[1]
            )
    assert ("publish" in rights) == may_publish("device", "van-1", topic)
    assert ("subscribe" in rights) == may_receive("device", "van-1", topic)
    if "publish" in rights:
        assert rights["publish"] == POLICIES[kind].retain
    assert emqx_acl(SITE).rstrip().endswith("{deny, all}.")


def test_mosquitto_demands_certificates_and_caps_packets() -> None:
    conf = mosquitto_conf(SITE).splitlines()
    for line in (
        "listener 8883",
        "require_certificate true",
        "use_identity_as_username true",
        "use_username_as_clientid true",
        "allow_anonymous false",
        f"max_packet_size {limits.MAX_MQTT_PACKET_BYTES}",
        "autosave_on_changes true",
    ):
        assert line in conf


def test_both_files_come_in_one_text_and_unknown_brokers_are_named() -> None:
    for kind in ("mosquitto", "emqx"):
        text = broker_config(kind, SITE)
        assert f"{kind}.conf" in text
        assert SITE.acl in text
    with pytest.raises(UsageError, match="hive"):
        broker_config("hive", SITE)
    with pytest.raises(UsageError, match="blanks"):
        broker_config("mosquitto", BrokerSite(gateway=GatewayId("gw"), acl="/a b"))
