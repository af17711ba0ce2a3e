"""Frames that carry the streams of one connection over TLS: written and read, nothing decided. Pure.

A frame is ``type (1) | length (3) | stream (4) | payload``, numbers big-endian. Stream 0 is the connection; streams the
TCP client opens have odd numbers, the server's even ones, each larger than the one before. The reader holds at most a
header and a control payload: stream bytes are handed on as they come. Lengths are checked before anything is kept.

Source: docs/wire-protocol.md, "Over TLS"; ADR 0023.
"""

import struct
from enum import IntEnum
from typing import Final, NamedTuple

from edgesync import limits
from edgesync.errors import LimitExceededError, MalformedMessageError, ProtocolError

HEADER_BYTES: Final = 8
CONNECTION: Final = 0


class FrameType(IntEnum):
    DATA = 0
    """Bytes of a stream."""
    END = 1
    """The sender's last word on a stream."""
    RESET = 2
    """The sender gives up what it was sending; payload: error code."""
    STOP = 3
    """The sender wants no more of a stream; payload: error code. The peer answers with RESET."""
    WINDOW = 4
    """Up to which offset the peer may send, on a stream or on all together; payload: 8 bytes."""
    STREAMS = 5
    """How many streams the peer may have open at a time; payload: 4 bytes."""
    PING = 6
    """Payload: 8 bytes, which PONG repeats."""
    PONG = 7
    CLOSE = 8
    """The last frame; payload: error code, then a reason in UTF-8."""


_LENGTHS: Final = {
    FrameType.DATA: (1, limits.MAX_MUX_DATA_BYTES),
    FrameType.END: (0, 0),
    FrameType.RESET: (4, 4),
    FrameType.STOP: (4, 4),
    FrameType.WINDOW: (8, 8),
    FrameType.STREAMS: (4, 4),
    FrameType.PING: (8, 8),
    FrameType.PONG: (8, 8),
    FrameType.CLOSE: (4, 4 + limits.MAX_MUX_REASON_BYTES),
}
_OF_STREAMS: Final = frozenset({FrameType.DATA, FrameType.END, FrameType.RESET, FrameType.STOP})


class Frame(NamedTuple):
    """``payload`` of DATA may be a part of the frame's; of all others it is whole."""

    type: FrameType
    stream: int
    payload: bytes

    @property
    def number(self) -> int:
        """The payload's leading number: a code, an offset or a count."""
        size = 8 if self.type is FrameType.WINDOW else 4
        return int.from_bytes(self.payload[:size], "big")


def encode(kind: FrameType, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">II", kind << 24 | len(payload), stream) + payload


def coded(kind: FrameType, stream: int, code: int) -> bytes:
    """RESET, STOP or STREAMS."""
    return encode(kind, stream, code.to_bytes(4, "big"))


def window(stream: int, offset: int) -> bytes:
    return encode(FrameType.WINDOW, stream, offset.to_bytes(8, "big"))


def close(code: int, reason: str) -> bytes:
    """The reason is cut where it is too long, never inside a character."""
    cut = reason.encode()[: limits.MAX_MUX_REASON_BYTES].decode(errors="ignore").encode()
    return encode(FrameType.CLOSE, CONNECTION, code.to_bytes(4, "big") + cut)


class FrameReader:
    """Feed it plaintext as it comes."""

    def __init__(self) -> None:
        self._held = bytearray()
        self._body = 0
        """Bytes of a DATA frame still to come."""
        self._stream = 0

    def feed(self, data: bytes) -> list[Frame]:
        """Raises MalformedMessageError, LimitExceededError: no such frame; the connection cannot go on."""
        frames: list[Frame] = []
        view = memoryview(data)
        while view:
            if self._body:
                part = bytes(view[: self._body])
                view = view[len(part) :]
                self._body -= len(part)
                frames.append(Frame(FrameType.DATA, self._stream, part))
                continue
            need = HEADER_BYTES
            if len(self._held) >= HEADER_BYTES:
                need += int.from_bytes(self._held[1:4], "big")
            part = bytes(view[: need - len(self._held)])
            view = view[len(part) :]
            self._held += part
            if len(self._held) < need:
                break
            if need == HEADER_BYTES:
                kind, length, stream = self._header()
                if kind is FrameType.DATA:
                    self._body, self._stream = length, stream
                    self._held.clear()
                    continue
                if length:
                    continue
            frames.append(
                Frame(
                    FrameType(self._held[0]),
                    int.from_bytes(self._held[4:8], "big"),
                    bytes(self._held[HEADER_BYTES:]),
                )
            )
            self._held.clear()
        return frames

    def _header(self) -> tuple[FrameType, int, int]:
        first, stream = struct.unpack(">II", self._held)
        length = first & 0xFFFFFF
        try:
            kind = FrameType(first >> 24)
        except ValueError:
            raise MalformedMessageError(f"a frame of unknown type {first >> 24} came") from None
        low, high = _LENGTHS[kind]
        if not low <= length <= high:
            error: type[ProtocolError] = (
                LimitExceededError if length > high else MalformedMessageError
            )
            raise error(f"a {kind.name} frame of {length} bytes came")
        if kind is not FrameType.WINDOW and (kind in _OF_STREAMS) != (stream != CONNECTION):
            raise MalformedMessageError(f"a {kind.name} frame on stream {stream} came")
        return kind, length, stream
