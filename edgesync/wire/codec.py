"""The only place where peers' bytes become messages.

A frame is a 4-byte big-endian length and that many bytes of msgpack. The length is capped before anything is decoded.
Nothing but MalformedMessageError and LimitExceededError comes out, whatever the bytes.
"""

import msgspec

from edgesync import limits
from edgesync.errors import LimitExceededError, MalformedMessageError
from edgesync.wire.messages import Message

PREFIX_BYTES = 4

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """The frame of one message. Raises LimitExceededError: our own message is over the cap."""
    body = _encoder.encode(message)
    if len(body) > limits.MAX_FRAME_BYTES:
        raise LimitExceededError(
            f"a {type(message).__name__} of {len(body)} bytes is over the frame cap"
        )
    return len(body).to_bytes(PREFIX_BYTES, "big") + body


def frame_length(prefix: bytes | bytearray | memoryview) -> int:
    """Length of the body that follows these 4 bytes. Raises LimitExceededError: over the cap, or empty."""
    length = int.from_bytes(prefix[:PREFIX_BYTES], "big")
    if not 0 < length <= limits.MAX_FRAME_BYTES:
        raise LimitExceededError(
            f"a frame says it has {length} bytes, at most {limits.MAX_FRAME_BYTES} are allowed"
        )
    return length


def decode(body: bytes | bytearray | memoryview) -> Message:
    try:
        return _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise MalformedMessageError(f"a message cannot be read: {exc}") from exc
