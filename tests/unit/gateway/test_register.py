import json

import pytest

from edgesync.errors import NotAuthorizedError
from edgesync.identity import Identity, self_signed
from edgesync.ids import DeviceId, Digest
from edgesync.storage.datadir import DataDir
from gateway import certificates, register
from gateway.service import setup
from gateway.store import GatewayStore


@pytest.fixture
def gateway(tmp_path):
    setup.init(tmp_path / "gw", name="acme", advertise=["gw"], region="eu", threshold=(1, 1))
    with GatewayStore.open(DataDir.open(tmp_path / "gw", "gateway")) as store:
        yield store


@pytest.fixture
def judged(gateway):
    """A judge and the means to make members."""

    class World:
        store = gateway
        judge = register.Judge(region="eu")

        def member(self, device_id, state="accepted", name=None):
            identity = Identity.generate()
            with gateway.atomic() as db:
                db.conn.execute(
                    "INSERT INTO devices (id, key, region, labels, hardware, state, joined, address, local_addresses, "
                    "online) VALUES (?, ?, 'eu', ?, '', ?, 0, '10.0.0.9', ?, 1)",
                    (device_id, identity.key, json.dumps({}), state, json.dumps(["10.0.0.9:7"])),
                )
            return setup.certifier(gateway)(DeviceId(name or device_id), identity.public_raw)

        def load(self):
            self.judge.trusted = setup.repository(gateway).trusted()
            self.judge.register = register.load(gateway)
            return self.judge.register

    return World()


def test_accepted_devices_and_listed_gateways_are_members(judged):
    device = judged.member("cam-1")
    judged.load()
    assert (judged.judge(device).role, judged.judge(device).id) == ("device", "cam-1")
    datadir = judged.store.datadir
    own = certificates.load_identity(datadir.identity_key, datadir.identity_certificate)
    assert (judged.judge(own.certificate_der).role, judged.judge(own.certificate_der).id) == (
        "gateway",
        "gateway-eu",
    )


def test_everybody_else_is_a_stranger(judged):
    pending = judged.member("cam-1", "pending")
    rejected = judged.member("cam-2", "rejected")
    misnamed = judged.member("cam-3", name="cam-4")
    stranger = self_signed(Identity.generate(), "gateway-eu").certificate_der
    unregistered = setup.certifier(judged.store)(DeviceId("cam-5"), Identity.generate().public_raw)
    judged.load()
    for der in (pending, rejected, misnamed, stranger, unregistered, b"", b"x" * 100):
        with pytest.raises(NotAuthorizedError):
            judged.judge(der)
    with pytest.raises(NotAuthorizedError, match="no metadata yet"):
        register.Judge(region="eu")(pending)


def test_assigned_and_neighbours(judged):
    judged.member("cam-1")
    judged.member("cam-2")
    judged.member("cam-3", "pending")
    with judged.store.atomic() as db:
        db.conn.execute(
            "INSERT INTO assignments VALUES ('cam-1', 'files', 'app', '1', ?, 1, 'a', 'install', NULL, 0)",
            ("d" * 64,),
        )
    now = judged.load()
    key = now.by_id[DeviceId("cam-1")].key
    assert now.is_assigned(key, Digest("d" * 64))
    assert not now.is_assigned(key, Digest("e" * 64))
    assert not now.is_assigned(now.by_id[DeviceId("cam-2")].key, Digest("d" * 64))
    assert [device.id for device in now.at_site("10.0.0.0/24")] == ["cam-1", "cam-2"]
