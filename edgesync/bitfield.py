"""A fixed-length set of piece indexes.

Bit 0 is the highest bit of the first byte (BEP 3), spare bits at the end are zero; ``from_bytes`` refuses else.
It does no I/O and is not thread-safe.
"""

from collections.abc import Iterable, Iterator
from typing import Self

from edgesync.errors import MalformedMessageError


class Bitfield:
    __slots__ = ("_bits", "_count", "_length")

    def __init__(self, length: int) -> None:
        self._length = length
        self._bits = bytearray((length + 7) // 8)
        self._count = 0

    @classmethod
    def from_bytes(cls, data: bytes, length: int) -> Self:
        """Raises MalformedMessageError: wrong size, or a spare bit is set."""
        self = cls(length)
        if len(data) != len(self._bits):
            raise MalformedMessageError(f"a bitfield for {length} pieces has {len(data)} bytes")
        spare = len(data) * 8 - length
        if spare and data and data[-1] & ((1 << spare) - 1):
            raise MalformedMessageError("a bitfield has spare bits set")
        self._bits[:] = data
        self._count = int.from_bytes(data, "big").bit_count()
        return self

    @classmethod
    def full(cls, length: int) -> Self:
        self = cls(length)
        for index in range(len(self._bits)):
            self._bits[index] = 0xFF
        spare = len(self._bits) * 8 - length
        if spare:
            self._bits[-1] = (0xFF << spare) & 0xFF
        self._count = length
        return self

    def __len__(self) -> int:
        """Number of pieces in the table, held or not."""
        return self._length

    def __contains__(self, index: int) -> bool:
        return 0 <= index < self._length and bool(self._bits[index >> 3] & (0x80 >> (index & 7)))

    def __iter__(self) -> Iterator[int]:
        for position, byte in enumerate(self._bits):
            if byte:
                for bit in range(8):
                    if byte & (0x80 >> bit):
                        yield position * 8 + bit

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bitfield) and (self._length, self._bits) == (
            other._length,
            other._bits,
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<Bitfield {self._count}/{self._length}>"

    def add(self, index: int) -> bool:
        """Set one bit; False if it was set. Raises IndexError outside the table."""
        if not 0 <= index < self._length:
            raise IndexError(index)
        mask = 0x80 >> (index & 7)
        if self._bits[index >> 3] & mask:
            return False
        self._bits[index >> 3] |= mask
        self._count += 1
        return True

    def discard(self, index: int) -> bool:
        """Clear one bit; False if it was clear or outside the table."""
        if index not in self:
            return False
        self._bits[index >> 3] &= ~(0x80 >> (index & 7)) & 0xFF
        self._count -= 1
        return True

    def update(self, indexes: Iterable[int]) -> None:
        for index in indexes:
            self.add(index)

    @property
    def count(self) -> int:
        return self._count

    @property
    def complete(self) -> bool:
        return self._count == self._length

    def missing(self) -> Iterator[int]:
        for position, byte in enumerate(self._bits):
            if byte != 0xFF:
                for index in range(position * 8, min(position * 8 + 8, self._length)):
                    if not byte & (0x80 >> (index & 7)):
                        yield index

    def copy(self) -> "Bitfield":
        other = Bitfield(self._length)
        other._bits[:] = self._bits
        other._count = self._count
        return other

    def to_bytes(self) -> bytes:
        return bytes(self._bits)
