"""Sets of pieces as integers, and pieces grouped by how many copies are known.

A mask is an ``int`` whose bit *i* is piece *i*: one machine instruction a word makes whole bitfields of 100,000 pieces
cheap to intersect, where a Python loop is not. It knows nothing of peers; the piece picker of a device and the
scheduler of a gateway both count with it.

Invariant: the levels of a ``Rarity`` are disjoint and together cover exactly the pieces it was given.
"""

from collections.abc import Iterable, Iterator
from random import Random

from edgesync.bitfield import Bitfield

_MIRROR = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def mask_of(pieces: Iterable[int]) -> int:
    """The mask with these bits set. Indexes must be bounded by the caller: one bit costs its index in memory."""
    mask = 0
    for piece in pieces:
        mask |= 1 << piece
    return mask


def full_mask(count: int) -> int:
    return (1 << count) - 1


def mask_from_bits(bits: bytes, count: int) -> int:
    """The mask of a bitfield in its wire form. Raises MalformedMessageError: not a bitfield of ``count`` pieces."""
    return mask_of_bitfield(Bitfield.from_bytes(bits, count))


def mask_of_bitfield(bitfield: Bitfield) -> int:
    return int.from_bytes(bitfield.to_bytes().translate(_MIRROR), "little")


def mask_to_bits(mask: int, count: int) -> bytes:
    return mask.to_bytes((count + 7) // 8, "little").translate(_MIRROR)


def pieces_of(mask: int) -> Iterator[int]:
    """Indexes of the set bits, ascending."""
    # A word at a time: taking the lowest bit of a huge integer copies all of it.
    data = mask.to_bytes((mask.bit_length() + 7) // 8, "little")
    for base in range(0, len(data), 8):
        word = int.from_bytes(data[base : base + 8], "little")
        while word:
            low = word & -word
            yield base * 8 + low.bit_length() - 1
            word ^= low


def random_piece(mask: int, rng: Random) -> int:
    """One set bit of a mask that is not empty; close to uniform where the bits lie evenly."""
    start = rng.randrange(mask.bit_length())
    high = mask >> start
    low = high & -high
    return start + low.bit_length() - 1


def sample(mask: int, count: int, rng: Random) -> list[int]:
    """Up to ``count`` different set bits in random order."""
    found: list[int] = []
    while mask and len(found) < count:
        piece = random_piece(mask, rng)
        mask ^= 1 << piece
        found.append(piece)
    return found


class Rarity:
    """How many copies of each piece are known; pieces of one count are one mask."""

    def __init__(self, pieces: int) -> None:
        self.levels: list[int] = [pieces]
        """``levels[n]`` are the pieces with ``n`` copies."""

    def more(self, mask: int) -> None:
        """One more copy of each piece in ``mask``."""
        levels = self.levels
        for level in range(len(levels) - 1, -1, -1):
            moved = levels[level] & mask
            if moved:
                levels[level] ^= moved
                if level + 1 == len(levels):
                    levels.append(0)
                levels[level + 1] |= moved

    def fewer(self, mask: int) -> None:
        """One copy less of each piece in ``mask``; a piece with none stays at none."""
        levels = self.levels
        for level in range(1, len(levels)):
            moved = levels[level] & mask
            if moved:
                levels[level] ^= moved
                levels[level - 1] |= moved
        while len(levels) > 1 and not levels[-1]:
            levels.pop()

    def drop(self, mask: int) -> None:
        """Stop counting these pieces."""
        for level, pieces in enumerate(self.levels):
            self.levels[level] = pieces & ~mask

    def add(self, piece: int, copies: int) -> None:
        """Count a piece that was not counted."""
        while len(self.levels) <= copies:
            self.levels.append(0)
        self.levels[copies] |= 1 << piece

    def lowest(self) -> int | None:
        """Copies of the rarest piece; None when there are no pieces."""
        for level, pieces in enumerate(self.levels):
            if pieces:
                return level
        return None


__all__ = [
    "Rarity",
    "full_mask",
    "mask_from_bits",
    "mask_of",
    "mask_of_bitfield",
    "mask_to_bits",
    "pieces_of",
    "random_piece",
    "sample",
]
