"""Which piece to ask of which peer: rarest first with random ties, endgame on the last pieces. Bookkeeping only.

It does not know time, rates or leases (``device.core.download`` does). Invariants: a piece that is held is never
picked; a piece in flight is picked a second time only by ``pick_duplicate`` and never from the same source, and not at
all while its bytes wait for the disk; peers that are set aside count for nothing until they are let back in.

Source: Legout et al., IMC 2006 (rarest first); BEP 3 (endgame).
"""

from collections.abc import Callable
from random import Random

from edgesync.ids import PeerKey
from edgesync.rarity import Rarity, full_mask, random_piece

ENDGAME_FRACTION = 0.01
MIN_ENDGAME_PIECES = 4


class PiecePicker:
    def __init__(self, piece_count: int, held: int, *, rng: Random) -> None:
        self.piece_count = piece_count
        self.missing = full_mask(piece_count) & ~held
        """Pieces not held, in flight or not."""
        self._rng = rng
        self._busy = 0
        self._sources: dict[int, tuple[PeerKey, ...]] = {}
        self._landing: dict[int, PeerKey] = {}
        """Whose bytes of a piece wait to be checked and written."""
        self._peers: dict[PeerKey, int] = {}
        self._aside: dict[PeerKey, int] = {}
        self._rarity = Rarity(self.missing)

    # --- what peers hold

    def add_peer(self, peer: PeerKey) -> None:
        if peer not in self._aside:
            self._peers.setdefault(peer, 0)

    def remove_peer(self, peer: PeerKey) -> None:
        """Forget a peer and what it held; pieces in flight from it are the caller's to give back."""
        self._rarity.fewer(self._peers.pop(peer, 0))
        self._aside.pop(peer, None)

    def set_aside(self, peer: PeerKey) -> None:
        """Remember what the peer holds but count and pick nothing of it."""
        if peer in self._peers:
            mask = self._peers.pop(peer)
            self._rarity.fewer(mask)
            self._aside[peer] = mask

    def let_in(self, peer: PeerKey) -> None:
        if peer in self._aside:
            mask = self._aside.pop(peer)
            self._rarity.more(mask)
            self._peers[peer] = mask

    def set_mask(self, peer: PeerKey, mask: int) -> None:
        if peer in self._aside:
            self._aside[peer] = mask
            return
        old = self._peers.get(peer, 0)
        self._rarity.more(mask & ~old)
        self._rarity.fewer(old & ~mask)
        self._peers[peer] = mask

    def add_mask(self, peer: PeerKey, mask: int) -> None:
        self.set_mask(peer, self.mask(peer) | mask)

    def remove_mask(self, peer: PeerKey, mask: int) -> None:
        self.set_mask(peer, self.mask(peer) & ~mask)

    def mask(self, peer: PeerKey) -> int:
        return self._peers.get(peer, self._aside.get(peer, 0))

    def has_usable(self, piece: int) -> bool:
        """Whether some peer that counts holds the piece."""
        return not self._rarity.levels[0] >> piece & 1 and bool(self.missing >> piece & 1)

    # --- what we hold and wait for

    @property
    def missing_count(self) -> int:
        return self.missing.bit_count()

    @property
    def free(self) -> int:
        """Pieces neither held nor in flight."""
        return self.missing & ~self._busy

    @property
    def unseen(self) -> int:
        """Pieces neither held nor in flight that no peer holds."""
        return self._rarity.levels[0] & ~self._busy

    def unseen_but_for(self, patience: Callable[[PeerKey], bool]) -> int:
        """As ``unseen``, without the pieces of peers set aside for which ``patience`` is true."""
        unseen = self.unseen
        for peer, mask in self._aside.items():
            if unseen & mask and patience(peer):
                unseen &= ~mask
        return unseen

    def is_missing(self, piece: int) -> bool:
        return bool(self.missing >> piece & 1)

    def is_free(self, piece: int) -> bool:
        return bool(self.free >> piece & 1)

    def sources(self, piece: int) -> tuple[PeerKey, ...]:
        return self._sources.get(piece, ())

    def start(self, piece: int, source: PeerKey) -> None:
        """The piece was asked of ``source``."""
        self._sources[piece] = (*self._sources.get(piece, ()), source)
        self._busy |= 1 << piece

    def stop(self, piece: int, source: PeerKey) -> None:
        """``source`` will not bring the piece; it is free again if nobody else will."""
        left = tuple(other for other in self._sources.get(piece, ()) if other != source)
        if left:
            self._sources[piece] = left
        elif self._sources.pop(piece, None) is not None and piece not in self._landing:
            self._busy &= ~(1 << piece)

    def landing(self, piece: int, source: PeerKey) -> None:
        """The bytes ``source`` sent are being written: nobody else is asked, though the source may leave."""
        if self.is_missing(piece):
            self._landing.setdefault(piece, source)
            self._busy |= 1 << piece

    def lost(self, piece: int, source: PeerKey) -> None:
        """What ``source`` sent of the piece will not be written."""
        if self._landing.get(piece) == source:
            del self._landing[piece]
            if piece not in self._sources:
                self._busy &= ~(1 << piece)

    def lost_all(self, source: PeerKey) -> None:
        """Nothing ``source`` sent will be written any more."""
        for piece in [piece for piece, sender in self._landing.items() if sender == source]:
            self.lost(piece, source)

    def held(self, piece: int) -> tuple[PeerKey, ...]:
        """The piece is here. Returns the sources it was still asked of."""
        bit = 1 << piece
        self.missing &= ~bit
        self._rarity.drop(bit)
        self._busy &= ~bit
        self._landing.pop(piece, None)
        return self._sources.pop(piece, ())

    def dropped(self, piece: int) -> None:
        """The piece is no longer here."""
        if not self.is_missing(piece):
            self.missing |= 1 << piece
            self._rarity.add(piece, sum(mask >> piece & 1 for mask in self._peers.values()))

    # --- picking

    def pick(self, peer: PeerKey, *, count: int) -> list[int]:
        """Up to ``count`` free pieces the peer holds, rarest first; ties by chance. Marks nothing."""
        free = self._peers.get(peer, 0) & self.free
        found: list[int] = []
        if not free:
            return found
        for level in self._rarity.levels[1:]:
            pieces = level & free
            while pieces:
                if len(found) == count:
                    return found
                piece = random_piece(pieces, self._rng)
                pieces ^= 1 << piece
                found.append(piece)
        return found

    @property
    def endgame(self) -> bool:
        """Nothing is free and what is in flight is the last per cent."""
        limit = max(MIN_ENDGAME_PIECES, int(self.piece_count * ENDGAME_FRACTION))
        return not self.free and 0 < self.missing_count <= limit

    def pick_duplicate(self, peer: PeerKey, *, count: int) -> list[int]:
        """Pieces in flight from exactly one other source that this peer holds too."""
        found: list[int] = []
        mask = self._peers.get(peer, 0) & self.missing
        if mask:
            for piece, sources in self._sources.items():
                if len(found) == count:
                    break
                alone = len(sources) == 1 and piece not in self._landing
                if alone and mask >> piece & 1 and sources[0] != peer:
                    found.append(piece)
        return found
