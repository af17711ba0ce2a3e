import json

import msgspec
import pytest

from edgesync import assignment, envelope, limits
from edgesync.assignment import AssignmentSet, Entry
from edgesync.envelope import SigningKey
from edgesync.errors import (
    BadSignatureError,
    MetadataExpiredError,
    NotAuthorizedError,
    RollbackRefusedError,
    VerificationError,
)

KEY = SigningKey.from_seed(bytes(range(32)))
OTHER = SigningKey.from_seed(bytes(32))
NOW = 1_800_000_000.0
FLEET, DEVICE_KEY = "f" * 64, "d" * 64
ENTRY = Entry(
    kind="files",
    name="app",
    version="1.0",
    target_hash="a" * 64,
    target_length=100,
    assignment_id="a-1",
)


def made(**changes):
    fields = {
        "fleet": FLEET,
        "gateway_key": KEY.key,
        "device": "cam-1",
        "device_key": DEVICE_KEY,
        "sequence": 7,
        "issued": NOW,
        "expires": NOW + assignment.LIFETIME_S,
        "entries": (ENTRY,),
    }
    return AssignmentSet(**(fields | changes))


def verify(data, **changes):
    arguments = {
        "keys": {KEY.key},
        "fleet": FLEET,
        "device_id": "cam-1",
        "device_key": DEVICE_KEY,
        "floor_sequence": 0,
        "utc_now": NOW,
    }
    return assignment.verify(data, **(arguments | changes))


def test_round_trip():
    assert verify(assignment.sign(made(), KEY)) == made()
    assert verify(assignment.sign(made(entries=()), KEY)).entries == ()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"keys": {OTHER.key}}, NotAuthorizedError),
        ({"keys": ()}, NotAuthorizedError),
        ({"fleet": "0" * 64}, NotAuthorizedError),
        ({"device_id": "cam-2"}, NotAuthorizedError),
        ({"device_key": "0" * 64}, NotAuthorizedError),
        ({"floor_sequence": 8}, RollbackRefusedError),
        ({"utc_now": NOW + assignment.LIFETIME_S}, MetadataExpiredError),
    ],
)
def test_whose_and_when(changes, error):
    data = assignment.sign(made(), KEY)
    with pytest.raises(error):
        verify(data, **changes)


def test_the_same_sequence_and_the_last_second_still_count():
    data = assignment.sign(made(), KEY)
    assert verify(data, floor_sequence=7, utc_now=NOW + assignment.LIFETIME_S - 1) == made()


def test_read_accepted_ignores_age_but_not_the_signer():
    data = assignment.sign(made(), KEY)
    assert assignment.read_accepted(data, keys={KEY.key}) == made()
    with pytest.raises(NotAuthorizedError):
        assignment.read_accepted(data, keys={OTHER.key})


@pytest.mark.parametrize("field", [field.name for field in msgspec.structs.fields(AssignmentSet)])
def test_tampering_with_any_field_of_the_set_breaks_its_signature(field):
    form = json.loads(assignment.sign(made(), KEY))
    payload = json.loads(msgspec.json.decode(json.dumps(form["payload"]), type=bytes))
    payload[field] = "changed" if isinstance(payload[field], str) else 9_999_999_999
    form["payload"] = json.loads(msgspec.json.encode(json.dumps(payload).encode()))
    with pytest.raises(BadSignatureError):
        verify(json.dumps(form).encode())


@pytest.mark.parametrize("field", [field.name for field in msgspec.structs.fields(Entry)])
def test_tampering_with_any_field_of_an_entry_breaks_its_signature(field):
    form = json.loads(assignment.sign(made(), KEY))
    payload = json.loads(msgspec.json.decode(json.dumps(form["payload"]), type=bytes))
    payload["entries"][0][field] = "b" if field != "target_length" else 101
    form["payload"] = json.loads(msgspec.json.encode(json.dumps(payload).encode()))
    with pytest.raises(BadSignatureError):
        verify(json.dumps(form).encode())


def test_a_set_names_its_signer():
    with pytest.raises(VerificationError, match="must name the key"):
        assignment.sign(made(gateway_key=OTHER.key), KEY)
    forged = envelope.sign("assign", assignment.encode(made(gateway_key=OTHER.key)), KEY)
    with pytest.raises(NotAuthorizedError, match="names another key"):
        verify(forged)


def test_another_type_of_envelope_with_the_same_payload_is_no_set():
    with pytest.raises(VerificationError):
        verify(envelope.sign("cmd", assignment.encode(made()), KEY))


@pytest.mark.parametrize(
    "changes",
    [
        {"sequence": 0},
        {"sequence": 2**53},
        {"sequence": -1},
        {"issued": NOW, "expires": NOW},
        {"expires": 2.0**50},
        {"device": "Cam"},
        {"fleet": "F" * 64},
        {"entries": (ENTRY, ENTRY)},
        {"entries": (msgspec.structs.replace(ENTRY, kind="image"),)},
        {"entries": (msgspec.structs.replace(ENTRY, name="App\n"),)},
        {"entries": (msgspec.structs.replace(ENTRY, version="current"),)},
        {"entries": (msgspec.structs.replace(ENTRY, version="1.0\n"),)},
        {"entries": (msgspec.structs.replace(ENTRY, target_hash="a" * 63),)},
        {"entries": (msgspec.structs.replace(ENTRY, target_length=0),)},
        {"entries": (msgspec.structs.replace(ENTRY, target_length=limits.MAX_MANIFEST_BYTES + 1),)},
        {"entries": (msgspec.structs.replace(ENTRY, action="erase"),)},
        {"entries": (msgspec.structs.replace(ENTRY, not_before=-1.0),)},
        {"schema": "edgesync.assignment/2"},
    ],
)
def test_out_of_bounds_is_refused_by_signer_and_device(changes):
    with pytest.raises(VerificationError):
        assignment.sign(made(**changes), KEY)
    forged = envelope.sign("assign", msgspec.json.encode(made(**changes)), KEY)
    with pytest.raises(VerificationError):
        verify(forged)


def test_too_many_entries():
    many = tuple(
        msgspec.structs.replace(ENTRY, name=f"app-{n}")
        for n in range(limits.MAX_ASSIGNMENT_ENTRIES + 1)
    )
    with pytest.raises(VerificationError):
        assignment.sign(made(entries=many), KEY)
    assert len(verify(assignment.sign(made(entries=many[:-1]), KEY)).entries) == len(many) - 1


def test_unknown_fields_leave_room_to_grow():
    payload = json.loads(assignment.encode(made())) | {"later": True}
    assert verify(envelope.sign("assign", json.dumps(payload).encode(), KEY)) == made()


def test_next_sequence_outruns_clock_and_backup():
    assert assignment.next_sequence(0, NOW) == NOW * 1000
    assert assignment.next_sequence(2**45, NOW) == 2**45 + 1
