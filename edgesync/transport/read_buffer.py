"""Bytes that arrived and were not read yet, kept as they came: read once, they are copied once.

A peer that sends single bytes must not make us keep an object for each: small arrivals are joined.
"""

from collections import deque
from typing import Final

_SMALL_BYTES: Final = 1024
_JOINED_BYTES: Final = 65_536


class ReadBuffer:
    """See the module."""

    def __init__(self) -> None:
        self._chunks: deque[bytes | bytearray] = deque()
        self._at = 0
        """Bytes of the first chunk that were read."""
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def append(self, data: bytes) -> None:
        self._length += len(data)
        if len(data) >= _SMALL_BYTES:
            self._chunks.append(data)
        elif data:
            last = self._chunks[-1] if self._chunks else None
            if isinstance(last, bytearray) and len(last) < _JOINED_BYTES:
                last += data
            else:
                self._chunks.append(bytearray(data))

    def take(self, count: int) -> bytes:
        """The first ``count`` bytes; at least so many are there."""
        self._length -= count
        parts: list[memoryview] = []
        while count:
            first = memoryview(self._chunks[0])
            part = first[self._at : self._at + count]
            parts.append(part)
            count -= len(part)
            self._at += len(part)
            if self._at == len(first):
                self._chunks.popleft()
                self._at = 0
        return b"".join(parts)

    def clear(self) -> None:
        self._chunks.clear()
        self._at = self._length = 0
