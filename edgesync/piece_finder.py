"""From a piece's id to its place in a manifest, in 4 bytes a piece where a dictionary takes 140.

Pure; built once for each bundle that is served or fetched (100,000 pieces: 0.1 s, so off the event loop).
"""

from array import array
from bisect import bisect_left

from edgesync.ids import PieceId


class PieceFinder:
    """``piece_ids`` are the concatenated ids of a manifest, 32 bytes each."""

    __slots__ = ("_ids", "_order")

    def __init__(self, piece_ids: bytes) -> None:
        self._ids = piece_ids
        self._order = array("I", sorted(range(len(piece_ids) // 32), key=self._id))

    def _id(self, index: int) -> bytes:
        return self._ids[index * 32 : index * 32 + 32]

    def id_of(self, index: int) -> PieceId:
        return PieceId(self._id(index))

    def __len__(self) -> int:
        return len(self._order)

    def find(self, piece: bytes) -> int | None:
        """The piece's index; None when the manifest does not name it."""
        position = bisect_left(self._order, piece, key=self._id)
        if position < len(self._order):
            index = self._order[position]
            if self._id(index) == piece:
                return index
        return None
