import json

import pytest

from edgesync import jointoken
from edgesync.identity import Identity
from edgesync.ids import Digest
from edgesync.wire.messages import Join, Joined, join_payload
from gateway import enrolment
from gateway.service import tokens

PLACES = enrolment.Places(("gw:7443",), ("mqtts://gw:8883",), 2)
CERT_SHA = b"c" * 32


@pytest.fixture
def world(register):
    members = []
    made = enrolment.Enrolment(
        register,
        lambda device_id, raw: b"cert:" + device_id.encode(),
        on_member=members.append,
        gateway_ids=("hub",),
    )

    class World:
        store = register
        joined = members
        now = 1000.0

        def token(self, **kwargs):
            text = tokens.create(
                register,
                root_version=1,
                root_sha256=Digest("b" * 64),
                addresses=["gw:7443"],
                utc_now=1000.0,
                **kwargs,
            ).token
            return jointoken.decode(text)

        def join(
            self,
            token,
            identity,
            device_id="cam-1",
            *,
            address="10.0.0.1",
            secret=None,
            signer=None,
            hardware="",
        ):
            payload = join_payload(
                token_id=token.token_id, device_id=device_id, server_certificate_sha256=CERT_SHA
            )
            return made.join(
                Join(
                    token_id=token.token_id,
                    secret=secret or token.secret,
                    public_key=identity.public_raw,
                    signature=(signer or identity).sign("join", payload),
                    device_id=device_id,
                    hardware=hardware,
                    agent="test",
                ),
                address=address,
                server_certificate_sha256=CERT_SHA,
                places=PLACES,
                now=self.now,
                utc_now=self.now,
            )

    return World()


def reason(answer):
    return None if isinstance(answer, Joined) else answer.reason


def test_one_use_makes_a_member_at_once(world):
    token = world.token(site="lab", labels={"rack": "1"}, hardware="pi4")
    answer = world.join(token, Identity.generate(), hardware="other")
    assert answer == Joined(
        state="accepted",
        device_id="cam-1",
        certificate=b"cert:cam-1",
        gateway_id="gateway-eu",
        region="eu",
        labels={"rack": "1", "site": "lab"},
        hardware="pi4",
        gateway_quic=["gw:7443"],
        brokers=["mqtts://gw:8883"],
        root_version=2,
    )
    assert world.joined == ["cam-1"]
    row = world.store.one("SELECT * FROM devices")
    assert (row["state"], row["address"], json.loads(row["labels"])) == (
        "accepted",
        "10.0.0.1",
        answer.labels,
    )


def test_same_token_same_key_same_answer_even_when_it_is_over(world):
    token, identity = world.token(), Identity.generate()
    first = world.join(token, identity)
    assert world.join(token, identity) == first
    world.now = 10**6
    assert world.join(token, identity) == first
    assert world.joined == ["cam-1"]


def test_another_key_is_refused(world):
    token = world.token()
    world.join(token, Identity.generate())
    assert reason(world.join(token, Identity.generate(), "cam-2")) == "used_up"


def test_wrong_secret_and_unknown_token_look_the_same(world):
    token, identity = world.token(), Identity.generate()
    unknown = jointoken.JoinToken(
        "zzzzzzzzzzzz", b"s" * 32, token.gateway_key, 1, token.root_sha256, ()
    )
    answers = [world.join(token, identity, secret=b"x" * 32), world.join(unknown, identity)]
    assert [reason(answer) for answer in answers] == ["unknown_token"] * 2
    assert answers[0] == answers[1]
    # A secret of another token does not help.
    other = world.token()
    assert reason(world.join(token, identity, secret=other.secret)) == "unknown_token"


def test_the_asker_must_hold_the_key(world):
    assert (
        reason(world.join(world.token(), Identity.generate(), signer=Identity.generate()))
        == "unknown_token"
    )
    assert world.store.rows("SELECT * FROM devices") == []


def test_expired_and_revoked(world):
    token = world.token(ttl_s=10)
    world.now = 1010.0
    assert reason(world.join(token, Identity.generate())) == "expired"
    world.now = 1000.0
    token, identity = world.token(), Identity.generate()
    world.join(token, identity)
    tokens.revoke(world.store, token.token_id, utc_now=1000.0)
    assert reason(world.join(token, identity)) == "revoked"


@pytest.mark.parametrize("device_id", ["gateway", "gateway-eu", "bridge-1", "hub"])
def test_reserved_ids(world, device_id):
    assert reason(world.join(world.token(), Identity.generate(), device_id)) == "id_refused"


def test_id_pattern_and_taken_ids(world):
    token = world.token(uses=5, auto_accept=True, id_pattern="cam-*")
    assert reason(world.join(token, Identity.generate(), "door-1")) == "id_refused"
    first = Identity.generate()
    assert reason(world.join(token, first, "cam-1")) is None
    assert reason(world.join(token, Identity.generate(), "cam-1")) == "id_taken"
    assert reason(world.join(token, first, "cam-2")) == "id_refused"


def test_many_uses_wait_for_the_operator(world):
    token, identity = world.token(uses=2), Identity.generate()
    answer = world.join(token, identity)
    assert (answer.state, answer.certificate) == ("pending", b"")
    assert world.joined == []
    from gateway.service import devices

    devices.accept(world.store, "cam-1", lambda device_id, raw: b"later")
    assert world.join(token, identity).certificate == b"later"
    second = Identity.generate()
    world.join(token, second, "cam-2")
    devices.reject(world.store, "cam-2")
    assert reason(world.join(token, second, "cam-2")) == "rejected"
    assert reason(world.join(world.token(), second, "cam-2")) == "rejected"


def test_a_member_that_lost_its_trust_store_comes_back_with_a_new_token(world):
    identity = Identity.generate()
    first = world.join(world.token(site="lab"), identity)
    again = world.join(world.token(site="roof"), identity)
    assert again == first
    assert [
        row["kind"]
        for row in world.store.rows("SELECT kind FROM events WHERE kind LIKE 'device.%'")
    ] == [
        "device.joined",
        "device.rejoined",
    ]


def test_a_pending_device_with_a_token_of_one_use_becomes_a_member(world):
    identity = Identity.generate()
    assert world.join(world.token(uses=2), identity).state == "pending"
    assert world.join(world.token(), identity).state == "accepted"
    assert world.joined == ["cam-1"]


def test_guessing_is_slowed_and_does_not_fill_the_log(world):
    token, identity = world.token(), Identity.generate()
    reasons = [reason(world.join(token, identity, secret=b"x" * 32)) for _ in range(40)]
    assert reasons == ["unknown_token"] * 30 + ["busy"] * 10
    assert reason(world.join(token, identity, address="10.0.0.2")) is None
    for number in range(300):
        world.join(token, identity, secret=b"x" * 32, address=f"10.1.{number}.1")
    count = world.store.one("SELECT COUNT(*) AS n FROM events WHERE kind = 'join.refused'")["n"]
    assert count == enrolment.LOGGED_REFUSALS_PER_MINUTE
    world.now += 60
    assert reason(world.join(token, identity, secret=b"x" * 32)) == "unknown_token"


def test_a_site_of_a_hundred_devices_joins_from_one_address(world):
    token = world.token(uses=100, auto_accept=True)
    answers = [world.join(token, Identity.generate(), f"cam-{n}") for n in range(100)]
    assert {reason(answer) for answer in answers} == {None}
