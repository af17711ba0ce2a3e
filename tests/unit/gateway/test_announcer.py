import pytest

from edgesync.identity import Identity
from edgesync.ids import DeviceId, Digest, GatewayId
from edgesync.io.mqtt import Published
from edgesync.wire import mqtt as wire
from edgesync.wire import topics
from gateway.announcer import EPOCHS_RESERVED, Announcement, Announcer, reserve_epochs

HUB = GatewayId("hub")
SMALL = b'{"manifest":1}'
LARGE = b"x" * 70_000


class FakeLink:
    """Keeps what is published as a broker would; ``up`` False loses it."""

    def __init__(self):
        self.up = True
        self.connected = True
        self.retained = {}
        self.log = []

    async def publish(self, topic, payload, *, qos, retain=False, timeout_s=None):
        topics.check_size(topics.parse(topic), payload)
        if not self.up:
            return Published.LOST
        self.log.append((topic, payload, qos, retain))
        if retain and payload:
            self.retained[topic] = payload
        elif retain:
            self.retained.pop(topic, None)
        return Published.SENT


class World:
    def __init__(self):
        self.identity = Identity.generate()
        self.now = self.announcement()
        self.link = FakeLink()
        self.announcer = Announcer(
            HUB, self.identity, self.read, lambda: ["gw:7443"], self.commands, first_epoch=100
        )
        self.announcer.link = self.link
        self.sequence = 7

    async def read(self):
        return self.now

    async def commands(self, devices):
        return {device: self.sequence for device in devices if device != "forgotten"}

    def announcement(self, *, version=1, manifests=(SMALL,), sets=None):
        from edgesync.manifest import digest

        return Announcement(
            root_version=1,
            timestamp_version=version,
            metadata={topics.tuf_timestamp(HUB): b"timestamp%d" % version},
            manifests={digest(data): data for data in manifests},
            sets={DeviceId("cam-1"): b"set1"} if sets is None else sets,
        )

    def opened(self, topic, keys=None):
        payload = next(
            payload for said, payload, _qos, _retain in reversed(self.link.log) if said == topic
        )
        return wire.unseal(topics.parse(topic), payload, keys=(self.identity.key,))


@pytest.fixture
def world():
    return World()


async def test_everything_is_said_after_each_connect(world):
    world.announcer.will()
    await world.announcer.connected()
    first = dict(world.link.retained)
    assert topics.assign(DeviceId("cam-1")) in first
    world.link.retained.clear()
    world.announcer.will()
    await world.announcer.connected()
    assert world.link.retained.keys() == first.keys()


async def test_between_connects_only_what_changed(world):
    world.announcer.will()
    await world.announcer.connected()
    world.link.log.clear()
    await world.announcer.refresh()
    assert world.link.log == []
    world.now = world.announcement(version=2, sets={DeviceId("cam-2"): b"set2"})
    await world.announcer.refresh()
    assert {topic for topic, *_rest in world.link.log} == {
        topics.tuf_timestamp(HUB),
        topics.presence(HUB),
        topics.assign(DeviceId("cam-1")),
        topics.assign(DeviceId("cam-2")),
    }
    # A device that is no more leaves no set behind.
    assert topics.assign(DeviceId("cam-1")) not in world.link.retained


async def test_presence_comes_last_and_names_the_versions(world):
    world.announcer.will()
    await world.announcer.connected()
    assert world.link.log[-1][0] == topics.presence(HUB)
    presence = world.opened(topics.presence(HUB))
    assert (presence.online, presence.timestamp_version, presence.quic) == (True, 1, ["gw:7443"])


async def test_a_will_ends_the_epoch_it_was_signed_for(world):
    will = world.announcer.will()
    await world.announcer.connected()
    online = world.opened(topics.presence(HUB))
    gone = wire.unseal(topics.parse(will.topic), will.payload, keys=(world.identity.key,))
    assert gone.epoch == online.epoch
    assert wire.presence_supersedes(gone, online)
    await world.announcer.goodbye()
    bye = world.opened(topics.presence(HUB))
    assert not bye.online
    assert wire.presence_supersedes(bye, online)
    world.announcer.will()
    await world.announcer.connected()
    assert wire.presence_supersedes(world.opened(topics.presence(HUB)), bye)


async def test_large_manifests_are_pointed_to(world):
    world.now = world.announcement(manifests=(LARGE,))
    world.announcer.will()
    await world.announcer.connected()
    [digest] = world.now.manifests
    topic = topics.bundle(HUB, Digest(digest))
    assert wire.decode_bundle(topics.parse(topic), world.link.retained[topic]).length == len(LARGE)


async def test_what_was_lost_is_said_again(world):
    world.announcer.will()
    world.link.up = False
    await world.announcer.connected()
    assert world.link.retained == {}
    world.link.up = True
    await world.announcer.refresh()
    assert topics.presence(HUB) in world.link.retained


async def test_acknowledgements_are_signed_and_split(world):
    await world.announcer.acknowledge({("cam-1", 3): list(range(300)), ("forgotten", 1): [1]})
    commands = [entry for entry in world.link.log if entry[0] == topics.cmd(DeviceId("cam-1"))]
    assert len(world.link.log) == len(commands) == 2
    last = world.opened(topics.cmd(DeviceId("cam-1")))
    assert (last.sequence, last.body.epoch, last.body.sequences) == (8, 3, list(range(256, 300)))
    assert all(not retain for _topic, _payload, _qos, retain in commands)


async def test_peers(world):
    peer = wire.ToldPeer(id="cam-2", key="a" * 64, addresses=["10.0.0.2:7443"])
    await world.announcer.tell_peers(DeviceId("cam-1"), [peer])
    assert world.opened(topics.peers(DeviceId("cam-1"))).peers == [peer]
    world.link.log.clear()
    await world.announcer.tell_peers(DeviceId("cam-1"), [])
    assert world.link.log == []


def test_presence_never_falls_behind_a_clock_that_was_wrong(register):
    utc_2099, utc_2026 = 4_070_908_800.0, 1_790_000_000.0
    right = reserve_epochs(register, utc_2026)
    wrong = reserve_epochs(register, utc_2099)
    mended = reserve_epochs(register, utc_2026)
    assert right == int(utc_2026 * 1000)
    assert wrong == int(utc_2099 * 1000)
    assert mended == wrong + EPOCHS_RESERVED
    first = wire.Presence(gateway=HUB, epoch=wrong + 5, online=True, issued=0.0)
    second = wire.Presence(gateway=HUB, epoch=mended, online=True, issued=0.0)
    assert wire.presence_supersedes(second, first)
