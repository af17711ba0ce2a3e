import random

from edgesync import limits
from edgesync.ids import Digest, PeerKey
from gateway.core import events as e
from gateway.core.scheduler import (
    DOUBT_DEADLINES,
    GRACE_S,
    MIN_DEADLINE_S,
    UNAVAILABLE_AGAIN_S,
    Scheduler,
)

M = Digest("0" * 64)
A, B, C = (PeerKey(letter * 64) for letter in "abc")
FULL = (1 << 32) - 1


def scheduler(*devices: PeerKey, site: str = "s") -> Scheduler:
    core = Scheduler(rng=random.Random(5))
    core.handle(e.BundleServed(M, 32, 50_000), now=0.0)
    for number, device in enumerate(devices):
        connect(core, device, site=site, session=number)
    return core


def connect(core: Scheduler, device: PeerKey, *, site: str = "s", session: int = 0) -> None:
    core.handle(e.DeviceConnected(device, device[0], site, (f"{device[0]}:1",), session), now=0.0)


def ask(
    core: Scheduler,
    device: PeerKey,
    count: int = 8,
    *,
    now: float = 0.0,
    lacks: tuple[int, ...] = (),
) -> e.GiveLease:
    (given,) = core.handle(e.LeaseAsked(device, M, count, lacks), now=now)
    return given


def from_gateway(lease: e.GiveLease) -> set[int]:
    return {grant.piece for grant in lease.grants if grant.primary == e.GATEWAY}


def test_no_piece_leaves_twice_before_every_piece_left() -> None:
    core = scheduler(A, B)
    seen: set[int] = set()
    for _ in range(20):
        for device in (A, B):
            pieces = from_gateway(ask(core, device, 4))
            assert not pieces & seen
            seen |= pieces
            core.handle(e.PiecesHeld(device, M, tuple(pieces), ()), now=0.0)
    assert len(seen) == 32
    assert core.min_site_replication(now=0.0) == 1


def test_sites_are_apart() -> None:
    core = scheduler(A)
    connect(core, B, site="other", session=9)
    one = from_gateway(ask(core, A, 32))
    two = from_gateway(ask(core, B, 32))
    assert one & two


def test_late_device_is_sent_to_peers() -> None:
    core = scheduler(A)
    core.handle(e.HoldingsReported(A, M, FULL), now=0.0)
    core.handle(e.DeviceDisconnected(A, idle=True), now=1.0)
    connect(core, B, session=5)
    lease = ask(core, B, now=5_000.0)
    assert not from_gateway(lease)
    assert {grant.primary for grant in lease.grants} == {A}
    assert [source.device for source in lease.sources] == [A]


def test_silent_holder_stops_counting_and_gets_a_new_chance() -> None:
    core = scheduler(A, B)
    core.handle(e.HoldingsReported(A, M, FULL), now=0.0)
    assert not from_gateway(ask(core, B, now=1.0))
    late = 1.0 + DOUBT_DEADLINES * MIN_DEADLINE_S
    assert from_gateway(ask(core, B, now=late + 0.1))


def test_confirmed_holder_stays() -> None:
    core = scheduler(A, B, C)
    core.handle(e.HoldingsReported(A, M, FULL), now=0.0)
    ask(core, B, now=1.0)
    core.handle(e.PiecesHeld(B, M, (1,), (A,)), now=2.0)
    assert not from_gateway(ask(core, C, now=20.0))


def test_device_that_reaches_no_holder_gets_it_from_the_gateway() -> None:
    core = scheduler(A, B)
    core.handle(e.HoldingsReported(A, M, FULL), now=0.0)
    assert not from_gateway(ask(core, B, now=0.0, lacks=(3,)))
    assert not from_gateway(ask(core, B, now=1.0, lacks=(3,)))
    lease = ask(core, B, now=1.0 + UNAVAILABLE_AGAIN_S, lacks=(3,))
    assert from_gateway(lease) == {3}
    # It is on its way now: nobody gets it a second time.
    assert not from_gateway(ask(core, B, now=6.0, lacks=(3,)))


def test_disconnect_returns_leases_after_a_grace_for_what_was_sent() -> None:
    core = scheduler(A, B)
    pieces = from_gateway(ask(core, A, 32))
    sent = min(pieces)
    core.handle(e.PieceSent(A, M, sent, 1000), now=1.0)
    core.handle(e.DeviceDisconnected(A, idle=False), now=1.0)
    # Nothing else in the way: B may have everything but what A may have passed on.
    soon = set()
    for _ in range(8):
        soon |= from_gateway(ask(core, B, 32, now=1.5))
    assert soon == set(range(32)) - {sent}
    core.handle(e.Tick(), now=1.0 + GRACE_S)
    assert from_gateway(ask(core, B, 32, now=1.1 + GRACE_S)) == {sent}


def test_new_session_returns_the_old_ones_leases() -> None:
    core = scheduler(A, B)
    pieces = from_gateway(ask(core, A, 8))
    connect(core, A, session=77)
    again: set[int] = set()
    for _ in range(8):
        again |= from_gateway(ask(core, B, 32))
    assert pieces <= again


def test_a_will_counts_though_the_session_lives() -> None:
    core = scheduler(A, B)
    core.handle(e.HoldingsReported(A, M, FULL), now=0.0)
    core.handle(e.HoldingsReported(B, M, FULL), now=0.0)
    assert core.min_site_replication(now=0.0) == 2
    core.handle(e.DeviceSeen(A, live=False), now=1.0)
    assert core.min_site_replication(now=1.0) == 1
    core.handle(e.PiecesHeld(A, M, (), ()), now=2.0)
    assert core.min_site_replication(now=2.0) == 2


def test_leases_run_out() -> None:
    core = scheduler(A, B)
    taken = from_gateway(ask(core, A, 32))
    assert not from_gateway(ask(core, B, 32)) & taken
    now = 0.0
    while now < 400.0:
        now = core.next_deadline() or now + 1.0
        core.handle(e.Tick(), now=now)
    got: set[int] = set()
    for _ in range(8):
        got |= from_gateway(ask(core, B, 32, now=now))
    assert taken <= got


def test_nothing_active_is_none() -> None:
    core = scheduler(A)
    assert core.min_site_replication(now=0.0) is None
    core.handle(e.HoldingsReported(A, M, 0), now=0.0)
    assert core.min_site_replication(now=0.0) == 0
    core.handle(e.BundleRetired(M), now=0.0)
    assert core.min_site_replication(now=0.0) is None


def test_unknown_manifest_is_refused_politely() -> None:
    core = scheduler(A)
    (lease,) = core.handle(e.LeaseAsked(A, Digest("f" * 64), 8, ()), now=0.0)
    assert not lease.grants
    assert lease.retry_after_s > 1


def test_a_budget_bounds_what_the_gateway_gives_and_not_what_peers_do() -> None:
    core = scheduler(A, B)
    core.handle(e.PiecesHeld(A, M, tuple(range(16)), ()), now=0.0)
    (given,) = core.handle(e.LeaseAsked(B, M, 20, (), 3), now=0.1)
    assert len(from_gateway(given)) == 3
    (given,) = core.handle(e.LeaseAsked(B, M, 8, (), 0), now=0.2)
    assert not from_gateway(given)
    assert {grant.primary for grant in given.grants} == {A}
    # Nor by begging.
    (given,) = core.handle(e.LeaseAsked(B, M, 8, tuple(range(16, 32)), 0), now=60.0)
    assert not from_gateway(given)


def test_a_lease_names_each_piece_once_and_no_more_than_was_asked() -> None:
    core = Scheduler(rng=random.Random(3))
    core.handle(e.BundleServed(M, 400, 65_536), now=0.0)
    connect(core, A)
    for count, gateway_pieces in ((196, None), (300, 1000), (50, 20)):
        lacks = (*range(200), *range(200))
        (given,) = core.handle(e.LeaseAsked(A, M, count, lacks, gateway_pieces), now=1.0)
        assert isinstance(given, e.GiveLease)
        pieces = [grant.piece for grant in given.grants]
        assert len(set(pieces)) == len(pieces)
        allowed = count if gateway_pieces is None else min(count, gateway_pieces)
        assert 0 < len(pieces) <= min(allowed, limits.MAX_LEASE_PIECES)
        core.handle(e.DeviceDisconnected(A, False), now=1.0)
        connect(core, A, session=count)
