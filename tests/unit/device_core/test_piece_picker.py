import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from device.core.piece_picker import PiecePicker
from edgesync.ids import PeerKey
from edgesync.rarity import mask_of

A, B, C = PeerKey("a"), PeerKey("b"), PeerKey("c")


def test_rarest_first() -> None:
    picker = PiecePicker(8, 0, rng=random.Random(1))
    for peer, pieces in ((A, range(8)), (B, range(6)), (C, range(3))):
        picker.add_peer(peer)
        picker.set_mask(peer, mask_of(pieces))
    assert set(picker.pick(A, count=2)) == {6, 7}
    assert set(picker.pick(A, count=5)) == {3, 4, 5, 6, 7}


def test_ties_differ_by_seed() -> None:
    def order(seed: int) -> list[int]:
        picker = PiecePicker(64, 0, rng=random.Random(seed))
        picker.add_peer(A)
        picker.set_mask(A, (1 << 64) - 1)
        return picker.pick(A, count=64)

    assert order(1) == order(1) != order(2)


def test_endgame_picks_one_duplicate() -> None:
    picker = PiecePicker(4, 0b0011, rng=random.Random(1))
    for peer in (A, B):
        picker.add_peer(peer)
        picker.set_mask(peer, 0b1111)
    picker.start(2, A)
    assert not picker.endgame
    picker.start(3, A)
    assert picker.endgame
    assert picker.pick(B, count=4) == []
    assert picker.pick_duplicate(B, count=4) == [2, 3]
    assert picker.pick_duplicate(A, count=4) == []
    picker.start(2, B)
    assert picker.pick_duplicate(B, count=4) == [3]


class Model(RuleBasedStateMachine):
    """Against sets: what is free, unseen and rare."""

    COUNT = 24

    def __init__(self) -> None:
        super().__init__()
        self.picker = PiecePicker(self.COUNT, 0, rng=random.Random(7))
        self.held: set[int] = set()
        self.claims: dict[PeerKey, set[int]] = {}
        self.flying: dict[int, list[PeerKey]] = {}

    peers = st.sampled_from([A, B, C])
    pieces = st.integers(0, COUNT - 1)

    @rule(peer=peers, claimed=st.sets(pieces))
    def bitfield(self, peer: PeerKey, claimed: set[int]) -> None:
        self.picker.add_peer(peer)
        self.picker.set_mask(peer, mask_of(claimed))
        self.claims[peer] = set(claimed)

    @rule(peer=peers, piece=pieces)
    def have(self, peer: PeerKey, piece: int) -> None:
        if peer in self.claims:
            self.picker.add_mask(peer, 1 << piece)
            self.claims[peer].add(piece)

    @rule(peer=peers)
    def leave(self, peer: PeerKey) -> None:
        if self.claims.pop(peer, None) is not None:
            for piece, sources in list(self.flying.items()):
                if peer in sources:
                    self.picker.stop(piece, peer)
                    sources.remove(peer)
                    if not sources:
                        del self.flying[piece]
            self.picker.remove_peer(peer)

    @rule(peer=peers, count=st.integers(1, 6))
    def ask(self, peer: PeerKey, count: int) -> None:
        if peer not in self.claims:
            return
        picked = self.picker.pick(peer, count=count)
        free = self.claims[peer] - self.held - set(self.flying)
        assert len(picked) == min(count, len(free))
        assert set(picked) <= free
        rarity = {n: sum(n in claim for claim in self.claims.values()) for n in free}
        chosen = sorted(rarity[n] for n in picked)
        assert chosen == sorted(rarity.values())[: len(picked)]
        for piece in picked:
            self.picker.start(piece, peer)
            self.flying[piece] = [peer]

    @rule(piece=pieces)
    def arrive(self, piece: int) -> None:
        assert list(self.picker.held(piece)) == self.flying.pop(piece, [])
        self.held.add(piece)

    @rule(piece=pieces)
    def lose(self, piece: int) -> None:
        self.picker.dropped(piece)
        self.held.discard(piece)

    @invariant()
    def agrees(self) -> None:
        everything = set(range(self.COUNT))
        assert self.picker.missing == mask_of(everything - self.held)
        assert self.picker.free == mask_of(everything - self.held - set(self.flying))
        seen = set().union(*self.claims.values()) if self.claims else set()
        unseen = everything - self.held - set(self.flying) - seen
        assert self.picker.unseen == mask_of(unseen)


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=60, deadline=None)
