"""Every message against bytes written down: a change of the wire shows as a failing vector, not as a broken fleet."""

import typing
from pathlib import Path

import msgspec
import pytest

from edgesync.errors import MalformedMessageError
from edgesync.wire import codec, messages
from tests.vectors.wire_messages import MESSAGES

HERE = Path(__file__).parent


def read(name: str) -> bytes:
    """The bytes of a commented hex file: ``#`` starts a comment."""
    lines = (HERE / f"{name}.hex").read_text(encoding="utf-8").splitlines()
    return bytes.fromhex("".join(line.split("#", 1)[0] for line in lines))


@pytest.mark.parametrize("name", MESSAGES)
def test_vector(name: str) -> None:
    frame = read(name)
    message = MESSAGES[name]
    assert codec.encode(message) == frame
    assert codec.frame_length(frame[:4]) == len(frame) - 4
    assert codec.decode(frame[4:]) == message


def test_every_message_has_a_vector() -> None:
    kinds = set(typing.get_args(messages.Message))
    assert {type(message) for message in MESSAGES.values()} == kinds
    assert {path.stem for path in HERE.glob("*.hex")} == set(MESSAGES)


def test_tags_are_unique_and_stay() -> None:
    tags = {kind.__name__: kind.__struct_config__.tag for kind in typing.get_args(messages.Message)}
    assert tags == {
        "Hello": 1,
        "Challenge": 2,
        "Proof": 3,
        "Welcome": 4,
        "Interested": 5,
        "BitfieldMessage": 6,
        "Have": 7,
        "Lost": 8,
        "LeaseRequest": 9,
        "Lease": 10,
        "Versions": 11,
        "Busy": 12,
        "Close": 13,
        "Request": 20,
        "PieceHeader": 21,
        "Missing": 22,
        "Fetch": 23,
        "Blob": 24,
        "MissingBlob": 25,
        "Join": 30,
        "Joined": 31,
        "JoinRefused": 32,
    }


def test_unknown_fields_are_ignored_and_unknown_tags_refused() -> None:
    plain = msgspec.msgpack.decode(codec.encode(MESSAGES["busy"])[4:])
    newer = msgspec.msgpack.encode({**plain, "mood": "fine"})
    assert codec.decode(newer) == MESSAGES["busy"]
    with pytest.raises(MalformedMessageError):
        codec.decode(msgspec.msgpack.encode({**plain, "type": 14}))
