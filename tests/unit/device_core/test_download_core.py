import random

import pytest

from device.core import events as e
from device.core.download import (
    CARRIED_FACTOR,
    LEASE_TIMEOUT_S,
    METERED_AFTER_S,
    UNAVAILABLE_AFTER_S,
    Download,
)
from device.core.peer_ranker import LIES_ALLOWED
from edgesync.bitfield import Bitfield
from edgesync.ids import PeerKey

A, B = PeerKey("a" * 64), PeerKey("b" * 64)


def download(pieces: int = 16, held: tuple[int, ...] = ()) -> Download:
    have = Bitfield(pieces)
    have.update(held)
    return Download([65_536] * pieces, have, rng=random.Random(3), now=0.0)


def requests(effects: list[e.DownloadEffect]) -> dict[PeerKey, list[int]]:
    found: dict[PeerKey, list[int]] = {}
    for effect in effects:
        if isinstance(effect, e.RequestPieces):
            found.setdefault(effect.source, []).extend(effect.pieces)
    return found


def lease(*pieces: int, retry: float = 0.0) -> e.LeaseReceived:
    grants = tuple(e.LeasedPiece(piece, e.GATEWAY, e.GATEWAY) for piece in pieces)
    return e.LeaseReceived(grants, (), 10.0, retry)


def test_gateway_is_asked_only_under_a_lease() -> None:
    core = download()
    effects = core.handle(e.GatewayUp(), now=0.0)
    assert [type(effect) for effect in effects] == [e.AskLease]
    effects = core.handle(lease(3, 5), now=0.1)
    assert requests(effects) == {e.GATEWAY: [3, 5]}


def test_what_a_peer_holds_is_not_taken_from_the_gateway() -> None:
    core = download()
    core.handle(e.GatewayUp(), now=0.0)
    core.handle(e.PeerJoined(A), now=0.0)
    effects = core.handle(e.PeerBitfield(A, 1 << 3), now=0.0)
    assert requests(effects) == {A: [3]}
    assert requests(core.handle(lease(3, 5), now=0.1)) == {e.GATEWAY: [5]}


def test_silent_gateway_does_not_hold_peers_up() -> None:
    core = download()
    core.handle(e.GatewayUp(), now=0.0)
    assert core.next_deadline() == LEASE_TIMEOUT_S
    core.handle(e.PeerJoined(A), now=0.5)
    effects = core.handle(e.PeerBitfield(A, 0xFFFF), now=0.5)
    assert requests(effects)[A]
    core.handle(e.GatewayDown(), now=0.6)
    assert core.next_deadline() is not None


def test_completes_and_says_so_once() -> None:
    core = download(2)
    core.handle(e.PeerJoined(A), now=0.0)
    core.handle(e.PeerBitfield(A, 0b11), now=0.0)
    first = core.handle(e.PieceArrived(A, 0, 10), now=0.1)
    assert e.Announce((0,)) in first
    last = core.handle(e.PieceArrived(A, 1, 10), now=0.2)
    assert e.Completed() in last
    assert core.complete
    assert core.explain(now=1.0) == "complete"
    assert e.Completed() not in core.handle(e.PieceArrived(A, 1, 10), now=0.3)


def test_two_bad_hashes_are_quarantine() -> None:
    core = download()
    core.handle(e.PeerJoined(A), now=0.0)
    asked = requests(core.handle(e.PeerBitfield(A, 0xFFFF), now=0.0))[A]
    assert e.QuarantinePeer(A) not in core.handle(e.PieceFailed(A, asked[0], "bad_hash"), now=0.1)
    assert e.QuarantinePeer(A) in core.handle(e.PieceFailed(A, asked[1], "bad_hash"), now=0.2)
    core.handle(e.PeerLeft(A), now=0.3)
    core.handle(e.PeerJoined(A), now=500.0)
    assert not requests(core.handle(e.PeerBitfield(A, 0xFFFF), now=500.0))


def test_gone_is_no_fault_and_lies_are() -> None:
    core = download(64)
    core.handle(e.PeerJoined(A), now=0.0)
    core.handle(e.PeerBitfield(A, (1 << 64) - 1), now=0.0)
    for piece in range(20):
        core.handle(e.PieceFailed(A, piece, "gone"), now=0.1)
    source = core.ranker[A]
    assert source.aside_until is None
    for piece in range(20, 21 + LIES_ALLOWED):
        core.handle(e.PieceFailed(A, piece, "not_held"), now=0.2)
    assert source.aside_until is not None


def test_straggler_is_replaced() -> None:
    core = download(4)
    for peer in (A, B):
        core.handle(e.PeerJoined(peer), now=0.0)
    asked = requests(core.handle(e.PeerBitfield(A, 0b1111), now=0.0))[A]
    core.handle(e.PeerBitfield(B, 0b1111), now=0.0)
    deadline = core.next_deadline()
    assert deadline is not None
    effects = core.handle(e.Tick(), now=60.0)
    assert e.CancelRequests(A) in effects
    assert asked


@pytest.mark.parametrize("source", [A, e.GATEWAY])
def test_bytes_that_move_keep_a_slow_source_and_a_trickle_does_not(source: PeerKey) -> None:
    for bytes_s, kept in ((8_000, True), (20, False)):
        core = download(4)
        if source == e.GATEWAY:
            core.handle(e.GatewayUp(2.0), now=0.0)
            core.handle(lease(*range(4)), now=0.1)
        else:
            core.handle(e.PeerJoined(source), now=0.0)
            core.handle(e.PeerBitfield(source, 0b1111), now=0.0)
        assert core.ranker[source].outstanding
        effects = []
        for second in range(1, 200):
            effects += core.handle(e.BytesMoved(source, bytes_s), now=float(second))
            effects += core.handle(e.Tick(), now=second + 0.5)
        assert (e.CancelRequests(source) not in effects) is kept
        effects = core.handle(e.Tick(), now=300.0)
        assert (e.CancelRequests(source) in effects) is kept  # silence ends it in any case


def test_an_answer_to_a_lease_may_take_its_round_trips() -> None:
    core = download(4)
    asked = core.handle(e.GatewayUp(2.0), now=0.0)
    assert any(isinstance(effect, e.AskLease) for effect in asked)
    core.handle(e.Tick(), now=5.0)
    assert "unreachable" not in core.explain(now=5.0)
    core.handle(e.Tick(), now=8.0)
    assert "unreachable" in core.explain(now=8.0)


def test_unreachable_pieces_are_told_to_the_gateway() -> None:
    core = download(4)
    core.handle(e.GatewayUp(), now=0.0)
    core.handle(lease(retry=0.5), now=0.1)
    now = 0.1
    told: list[e.AskLease] = []
    while now < UNAVAILABLE_AFTER_S + 3:
        deadline = core.next_deadline()
        assert deadline is not None
        now = max(now + 0.01, deadline)
        for effect in core.handle(e.Tick(), now=now):
            if isinstance(effect, e.AskLease):
                told.append(effect)
                core.handle(lease(retry=0.5), now=now)
    assert told[0].unavailable == ()
    assert set(told[-1].unavailable) == {0, 1, 2, 3}


def test_says_what_it_waits_for() -> None:
    core = download(4)
    assert "no peer has 4 of 4" in core.explain(now=2.0)
    assert "gateway unreachable for 2 s" in core.explain(now=2.0)
    core.handle(e.StoragePaused("the disk is full"), now=2.0)
    assert core.explain(now=3.0) == "waiting: the disk is full"


def test_durable_pieces_name_their_source() -> None:
    core = download(4)
    core.handle(e.PeerJoined(A), now=0.0)
    core.handle(e.PeerBitfield(A, 0b0001), now=0.0)
    core.handle(e.PieceArrived(A, 0, 10), now=0.1)
    core.handle(e.PieceArrived(e.GATEWAY, 1, 10), now=0.1)
    effects = core.handle(e.PiecesDurable((0, 1, 2)), now=0.2)
    assert [x for x in effects if isinstance(x, e.ReportDurable)] == [
        e.ReportDurable((0,), A),
        e.ReportDurable((1, 2), None),
    ]


def test_deadlines_never_spin() -> None:
    core = download(8)
    core.handle(e.GatewayUp(), now=0.0)
    core.handle(e.PeerJoined(A), now=0.0)
    core.handle(e.PeerBitfield(A, 0xFF), now=0.0)
    now, steps = 0.0, 0
    while now < 120.0:
        core.handle(e.Tick(), now=now)
        deadline = core.next_deadline()
        assert deadline is not None
        assert deadline > now
        now = deadline
        steps += 1
    assert steps < 400


def test_a_metered_gateway_is_asked_late_and_for_what_the_budget_has() -> None:
    core = download()
    why = "the budget of 2 GB for November is spent; renews 2026-12-01"
    core.handle(e.GatewayAllowance(int(3.5 * 65_536 * CARRIED_FACTOR), why), now=0.0)
    assert not core.handle(e.GatewayUp(), now=0.0)
    assert core.next_deadline() == METERED_AFTER_S
    core.handle(e.PeerJoined(A), now=1.0)
    core.handle(e.PeerBitfield(A, 1 << 3), now=1.0)
    (asked,) = core.handle(e.Tick(), now=METERED_AFTER_S)
    assert asked == e.AskLease(3)
    # More than was asked for: only what the budget pays is taken.
    assert requests(core.handle(lease(3, 5, 6, 7, 8), now=3.1)) == {e.GATEWAY: [5, 6, 7]}
    for piece in (5, 6, 7):
        assert e.AskLease not in {
            type(effect)
            for effect in core.handle(e.PieceArrived(e.GATEWAY, piece, 65_536), now=3.2)
        }
    core.handle(e.PieceArrived(A, 3, 65_536), now=3.3)
    assert core.explain(now=4.0) == f"waiting: {why}"
    # Nothing is asked of the gateway from here on, however slow peers are; what one has is taken.
    assert not core.handle(e.Tick(), now=1000.0)
    assert requests(core.handle(e.PeerHave(A, (9,)), now=1001.0)) == {A: [9]}
    core.handle(e.PieceArrived(A, 9, 65_536), now=1002.0)
    assert core.next_deadline() is None
    # A new month.
    effects = core.handle(e.GatewayAllowance(10**9, why), now=1003.0)
    assert [type(effect) for effect in effects] == [e.AskLease]


def test_the_gateways_own_reason_is_told() -> None:
    core = download()
    core.handle(e.GatewayUp(), now=0.0)
    why = "the budget of site plant-7, 2 GB for November is spent; renews 2026-12-01"
    core.handle(e.LeaseReceived((), (), 0.0, 30.0, why), now=0.1)
    assert core.explain(now=1.0) == f"waiting: {why}"
    assert core.next_deadline() == 30.1
    # Raised: it says so unasked.
    core.handle(e.LeaseReceived((), (), 0.0, 0.4), now=9.0)
    assert core.next_deadline() == 9.4
    assert why not in core.explain(now=9.1)
    core.handle(e.LeaseReceived((), (), 0.0, 20.0, why), now=10.1)
    assert [type(one) for one in core.handle(e.Tick(), now=30.1)] == [e.AskLease]
    core.handle(lease(3), now=30.2)
    assert core.explain(now=30.3) == "downloading from the gateway"


def test_what_is_being_written_is_asked_of_nobody_though_its_source_leaves() -> None:
    core = download(4)
    for peer in (A, B):
        core.handle(e.PeerJoined(peer), now=0.0)
    asked = requests(core.handle(e.PeerBitfield(A, 0b1111), now=0.0))[A]
    here = asked[0]
    assert core.handle(e.PieceReceived(A, here), now=0.1) == []
    core.handle(e.PeerLeft(A), now=0.2)
    again = requests(core.handle(e.PeerBitfield(B, 0b1111), now=0.2))
    for moment in range(3, 30):
        for source, pieces in requests(core.handle(e.Tick(), now=moment / 10)).items():
            again.setdefault(source, []).extend(pieces)
    assert again
    assert here not in again[B]
    assert e.Announce((here,)) in core.handle(e.PieceArrived(A, here, 10), now=3.0)


@pytest.mark.parametrize("quarantined", [False, True])
def test_what_was_sent_wrong_is_asked_again(quarantined: bool) -> None:
    core = download(6)
    core.handle(e.PeerJoined(A), now=0.0)
    core.handle(e.PeerBitfield(A, 0b111111), now=0.0)
    wrong = (0, 1) if quarantined else (0,)
    for piece in (0, 1, 2):
        core.handle(e.PieceReceived(A, piece), now=0.1)
    for piece in wrong:
        core.handle(e.PieceFailed(A, piece, "bad_hash"), now=0.2)
    core.handle(e.PeerLeft(A), now=0.2)
    core.handle(e.PeerJoined(B), now=0.3)
    core.handle(e.PeerBitfield(B, 0b111111), now=0.3)
    free = core.picker.free | sum(1 << piece for piece in core.ranker.get(B).outstanding)  # type: ignore[union-attr]
    assert free == (0b111111 if quarantined else 0b111001)
