import base64
import json

import pytest

from edgesync import envelope, limits
from edgesync.envelope import SigningKey
from edgesync.errors import BadSignatureError, NotAuthorizedError, VerificationError
from edgesync.identity import Identity

KEY = SigningKey.from_seed(bytes(range(32)))
OTHER = SigningKey.from_seed(bytes(32))


def test_round_trip_gives_the_exact_bytes():
    payload = b'{"b": 1,  "a": 2}\n\x00\xff'
    opened = envelope.verify(
        envelope.sign("state", payload, KEY), type_="state", keys={KEY.key, OTHER.key}
    )
    assert (opened.type, opened.key, opened.payload) == ("state", KEY.key, payload)


def test_identity_and_signing_key_of_one_seed_sign_alike():
    machine = Identity.generate()
    key = SigningKey.from_seed(machine.private_key.private_bytes_raw())
    assert key.key == machine.key
    assert key.sign("proof", b"x") == machine.sign("proof", b"x")


def test_known_signature():
    """A fixed vector: the prefix is part of the protocol."""
    assert KEY.key == "03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8"
    assert envelope.message("proof", b"abc") == b"edgesync/1/proof\0abc"
    assert KEY.sign("proof", b"abc").hex() == (
        "d0ab649f6df7f085bc500e3d021d3d0b18f56295d3d3a6cefd44d3427a61b5a40c83e21015f43f7bf4adc46f246e8a5d0c476ec6f174a1da4b3424f5c7906a01"
    )


def test_a_signature_is_for_one_type():
    data = json.loads(envelope.sign("state", b"x", KEY))
    data["type"] = "report"
    with pytest.raises(BadSignatureError):
        envelope.verify(json.dumps(data).encode(), type_="report", keys={KEY.key})
    with pytest.raises(VerificationError, match="expected a signed report"):
        envelope.verify(envelope.sign("state", b"x", KEY), type_="report", keys={KEY.key})


def test_a_key_that_is_not_expected_is_refused_before_its_signature_counts():
    with pytest.raises(NotAuthorizedError):
        envelope.verify(envelope.sign("state", b"x", OTHER), type_="state", keys={KEY.key})


@pytest.mark.parametrize("field", ["v", "type", "key", "sig", "payload"])
def test_tampering_with_any_field_is_refused(field):
    data = json.loads(envelope.sign("state", b"payload", KEY))
    value = data[field]
    if field == "v":
        changed = [2, 0, "1", None]
    elif field in {"type", "key"}:
        changed = ["report", OTHER.key, "", value.upper(), 1]
    else:
        raw = bytearray(base64.b64decode(value))
        raw[0] ^= 1
        changed = [base64.b64encode(raw).decode(), "", "!", None]
    for new in changed:
        if new == value:
            continue
        with pytest.raises(VerificationError):
            envelope.verify(
                json.dumps(data | {field: new}).encode(), type_="state", keys={KEY.key, OTHER.key}
            )
    del data[field]
    with pytest.raises(VerificationError):
        envelope.verify(json.dumps(data).encode(), type_="state", keys={KEY.key})


def test_size_is_capped_before_anything_is_parsed():
    with pytest.raises(VerificationError, match="over the cap"):
        envelope.verify(b"x" * (limits.MAX_ENVELOPE_BYTES + 1), type_="state", keys={KEY.key})
    with pytest.raises(ValueError, match="over the cap"):
        envelope.sign("state", bytes(limits.MAX_ENVELOPE_BYTES), KEY)


def test_json_bombs_are_errors_of_ours():
    for bomb in (b"[" * 100_000, b'{"v":' * 20_000, b'{"v":1,"x":' + b"[" * 50_000):
        with pytest.raises(VerificationError):
            envelope.verify(bomb, type_="state", keys={KEY.key})


def test_raw_signatures():
    signature = envelope.sign_raw("join", b"x", KEY)
    envelope.verify_raw("join", b"x", signature, KEY.key)
    envelope.verify_raw("join", b"x", signature, bytes.fromhex(KEY.key))
    for context, payload, made, key in (
        ("proof", b"x", signature, KEY.key),
        ("join", b"y", signature, KEY.key),
        ("join", b"x", signature[:-1], KEY.key),
        ("join", b"x", bytes(64), KEY.key),
        ("join", b"x", signature, OTHER.key),
        ("join", b"x", signature, b"short"),
        ("join", b"x", signature, bytes(32)),  # a point of small order signs nothing
        ("join", b"x", signature, "zz" * 32),
    ):
        with pytest.raises(BadSignatureError):
            envelope.verify_raw(context, payload, made, key)
    with pytest.raises(ValueError, match="not an envelope type"):
        envelope.message("Join\0", b"")


def test_claimed_key_and_repr_tell_no_secret():
    assert envelope.claimed_key(envelope.sign("state", b"x", KEY)) == KEY.key
    assert bytes(range(32)).hex() not in repr(KEY)
    assert "\\x" not in repr(KEY)
