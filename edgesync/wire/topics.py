"""Every MQTT topic of protocol ``es1``: how it is spelled, who may write it, who may read it, and how large it may be.

Pure. Nothing else in the project joins or splits a topic. The access rules here are what the embedded broker enforces
and what the printed configuration of other brokers says; a contract test holds the two against each other.

Invariants:

* ``parse(build(x)) == x`` for every topic, and nothing that ``parse`` accepts is spelled in a second way;
* no device may write a wildcard, another owner's topic, or anything below ``es1/g``.
"""

import re
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final, Literal

from edgesync import limits
from edgesync.errors import LimitExceededError, MalformedMessageError
from edgesync.ids import DeviceId, Digest, GatewayId

PREFIX: Final = "es1"

Role = Literal["device", "gateway"]


class Kind(StrEnum):
    """What a message is; the value is its place in the topic."""

    PRESENCE = "presence"
    TUF_TIMESTAMP = "tuf/timestamp"
    TUF_ROOT = "tuf/root"
    TUF_FILE = "tuf/sha256"
    BUNDLE = "bundle"
    REVOKED = "revoked"
    CAPS = "caps"

    ASSIGN = "assign"
    CMD = "cmd"
    PEERS = "peers"
    STATE = "state"
    PROGRESS = "progress"
    REPORT = "report"
    RSP = "rsp"

    AGGREGATE = "up"


Signer = Literal["gateway", "assignment key", "device", "TUF", "by digest", "none"]


@dataclass(frozen=True, slots=True)
class Policy:
    """How one kind of message travels. ``max_bytes`` is the whole payload, signature included."""

    scope: Literal["g", "d", "up"]
    writer: Role
    qos: Literal[0, 1]
    retain: bool
    max_bytes: int
    signer: Signer


POLICIES: Final = MappingProxyType(
    {
        Kind.PRESENCE: Policy("g", "gateway", 1, True, limits.MAX_PRESENCE_BYTES, "gateway"),
        Kind.TUF_TIMESTAMP: Policy("g", "gateway", 1, True, limits.MAX_TIMESTAMP_BYTES, "TUF"),
        Kind.TUF_ROOT: Policy("g", "gateway", 1, True, limits.MAX_ROOT_BYTES, "TUF"),
        Kind.TUF_FILE: Policy("g", "gateway", 1, True, limits.SOFT_MQTT_PAYLOAD_BYTES, "by digest"),
        Kind.BUNDLE: Policy("g", "gateway", 1, True, limits.SOFT_MQTT_PAYLOAD_BYTES, "by digest"),
        Kind.REVOKED: Policy("g", "gateway", 1, True, limits.SOFT_MQTT_PAYLOAD_BYTES, "gateway"),
        Kind.CAPS: Policy("g", "gateway", 1, True, limits.MAX_CAPS_BYTES, "gateway"),
        Kind.ASSIGN: Policy(
            "d", "gateway", 1, True, limits.MAX_ASSIGNMENT_SET_BYTES, "assignment key"
        ),
        Kind.CMD: Policy("d", "gateway", 1, False, limits.MAX_COMMAND_BYTES, "gateway"),
        Kind.PEERS: Policy("d", "gateway", 0, False, limits.MAX_STATE_BYTES, "gateway"),
        Kind.STATE: Policy("d", "device", 1, True, limits.MAX_STATE_BYTES, "device"),
        Kind.PROGRESS: Policy("d", "device", 0, False, limits.MAX_PROGRESS_BYTES, "none"),
        Kind.REPORT: Policy("d", "device", 1, False, limits.MAX_REPORT_BYTES, "device"),
        Kind.RSP: Policy("d", "device", 1, False, limits.MAX_COMMAND_BYTES, "device"),
        Kind.AGGREGATE: Policy("up", "gateway", 1, True, limits.SOFT_MQTT_PAYLOAD_BYTES, "gateway"),
    }
)


@dataclass(frozen=True, slots=True)
class Topic:
    """One parsed topic.

    ``owner`` is the gateway (``es1/g``, ``es1/up``) or the device (``es1/d``). ``value`` is the root version of
    TUF_ROOT in decimal, the digest of TUF_FILE and BUNDLE, the subject of AGGREGATE, else empty.
    """

    kind: Kind
    owner: str
    value: str = ""

    @property
    def policy(self) -> Policy:
        return POLICIES[self.kind]

    def __str__(self) -> str:
        head = f"{PREFIX}/{self.policy.scope}/{self.owner}"
        match self.kind:
            case Kind.TUF_ROOT | Kind.BUNDLE:
                return f"{head}/{self.kind}/{self.value}"
            case Kind.TUF_FILE:
                return f"{head}/{self.kind}-{self.value}"
            case Kind.AGGREGATE:
                return f"{head}/{self.value}"
            case _:
                return f"{head}/{self.kind}"


_NAME = r"[a-z0-9][a-z0-9-]{0,62}"
_TOPIC = re.compile(
    rf"es1/(?:"
    rf"g/(?P<gateway>{_NAME})/(?:"
    rf"(?P<plain>presence|revoked|caps|tuf/timestamp)"
    rf"|tuf/root/(?P<root>[1-9][0-9]{{0,8}})"
    rf"|tuf/sha256-(?P<file>[0-9a-f]{{64}})"
    rf"|bundle/(?P<bundle>[0-9a-f]{{64}}))"
    rf"|d/(?P<device>{_NAME})/(?P<verb>assign|cmd|peers|state|progress|report|rsp)"
    rf"|up/(?P<up>{_NAME})/(?P<subject>{_NAME})"
    rf")",
    re.ASCII,
)


def parse(topic: str) -> Topic:
    """The parts of a topic. Raises MalformedMessageError: it is not one of this protocol."""
    found = _TOPIC.fullmatch(topic) if len(topic) <= limits.MAX_TOPIC_BYTES else None
    if found is None:
        raise MalformedMessageError(f"{topic[:80]!r} is not a topic of {PREFIX}")
    part = found.groupdict()
    if part["device"]:
        return Topic(Kind(part["verb"]), part["device"])
    if part["up"]:
        return Topic(Kind.AGGREGATE, part["up"], part["subject"])
    gateway = part["gateway"]
    if part["plain"]:
        return Topic(Kind(part["plain"]), gateway)
    if part["root"]:
        return Topic(Kind.TUF_ROOT, gateway, part["root"])
    if part["file"]:
        return Topic(Kind.TUF_FILE, gateway, part["file"])
    return Topic(Kind.BUNDLE, gateway, part["bundle"])


def check_size(topic: Topic, payload: bytes) -> None:
    """Raises LimitExceededError: the payload is larger than this kind of message may be."""
    if len(payload) > topic.policy.max_bytes:
        raise LimitExceededError(
            f"{topic} carries {len(payload)} bytes, at most {topic.policy.max_bytes} are allowed"
        )


def presence(gateway: GatewayId) -> str:
    return str(Topic(Kind.PRESENCE, gateway))


def tuf_timestamp(gateway: GatewayId) -> str:
    return str(Topic(Kind.TUF_TIMESTAMP, gateway))


def tuf_root(gateway: GatewayId, version: int) -> str:
    return str(Topic(Kind.TUF_ROOT, gateway, str(version)))


def tuf_file(gateway: GatewayId, digest: Digest) -> str:
    """Where a snapshot, targets or delegated file of this SHA-256 lies."""
    return str(Topic(Kind.TUF_FILE, gateway, digest))


def bundle(gateway: GatewayId, digest: Digest) -> str:
    return str(Topic(Kind.BUNDLE, gateway, digest))


def revoked(gateway: GatewayId) -> str:
    return str(Topic(Kind.REVOKED, gateway))


def caps(gateway: GatewayId) -> str:
    return str(Topic(Kind.CAPS, gateway))


def assign(device: DeviceId) -> str:
    return str(Topic(Kind.ASSIGN, device))


def cmd(device: DeviceId) -> str:
    return str(Topic(Kind.CMD, device))


def peers(device: DeviceId) -> str:
    return str(Topic(Kind.PEERS, device))


def state(device: DeviceId) -> str:
    return str(Topic(Kind.STATE, device))


def progress(device: DeviceId) -> str:
    return str(Topic(Kind.PROGRESS, device))


def report(device: DeviceId) -> str:
    return str(Topic(Kind.REPORT, device))


def rsp(device: DeviceId) -> str:
    return str(Topic(Kind.RSP, device))


def aggregate(gateway: GatewayId, subject: str) -> str:
    return str(Topic(Kind.AGGREGATE, gateway, subject))


def device_filters(device: DeviceId, gateway: GatewayId) -> list[tuple[str, int]]:
    """What an agent subscribes to, with the QoS: its own orders, and everything its gateway announces."""
    own = [assign(device), cmd(device), peers(device)]
    return [(f"{PREFIX}/g/{gateway}/#", 1), *((topic, 1) for topic in own)]


def gateway_filters() -> list[tuple[str, int]]:
    """What a gateway subscribes to: everything its devices say."""
    return [
        (f"{PREFIX}/d/+/{kind}", POLICIES[kind].qos)
        for kind in (Kind.STATE, Kind.PROGRESS, Kind.REPORT, Kind.RSP)
    ]


def may_publish(role: str, name: str, topic: Topic) -> bool:
    """Whether this member may write this topic: a gateway all of them, a device its own voice."""
    if role == "gateway":
        return True
    return role == "device" and topic.policy.writer == "device" and topic.owner == name


def may_retain(role: str, name: str, topic: Topic) -> bool:
    """Whether the broker may keep what this member writes here: for a device only ``state``."""
    return topic.policy.retain and may_publish(role, name, topic)


def may_receive(role: str, name: str, topic: Topic) -> bool:
    """Whether this member may be sent this topic, whatever it subscribed to."""
    if role == "gateway":
        return True
    if role != "device":
        return False
    if topic.policy.scope == "g":
        return True
    return topic.policy.scope == "d" and topic.owner == name and topic.policy.writer == "gateway"
