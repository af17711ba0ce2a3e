"""Loss detection learns what a path reorders, within bounds, and forgets it."""

import random

import pytest
from aioquic.quic.rangeset import RangeSet

from edgesync import limits
from edgesync.transport.fast.reordering import (
    CALM_S,
    MAX_TIME_THRESHOLD,
    PACKET_THRESHOLD,
    TIME_THRESHOLD,
    Reordering,
)
from edgesync.transport.fast.sending import FastQuicConnection
from tests.differential import Play, Story, tell


def spans(*pairs: tuple[int, int]) -> RangeSet:
    return RangeSet([range(start, stop) for start, stop in pairs])


def test_a_packet_that_arrives_after_all_raises_the_threshold_by_what_it_was_late() -> None:
    reordering = Reordering()
    reordering.on_lost(10, largest_acked=13)
    reordering.on_ack(spans((0, 10), (11, 31)), largest_acked=30, now=1.0)
    assert reordering.packet_threshold == PACKET_THRESHOLD
    reordering.on_ack(spans((0, 31)), largest_acked=30, now=1.1)
    assert (reordering.packet_threshold, reordering.spurious) == (21, 1)
    reordering.on_ack(spans((0, 40)), largest_acked=39, now=1.2)
    assert (reordering.packet_threshold, reordering.spurious) == (21, 1)
    assert reordering.time_threshold == TIME_THRESHOLD


def test_a_packet_given_up_by_time_raises_the_time_only() -> None:
    reordering = Reordering()
    for number in range(0, 100, 10):
        reordering.on_lost(number, largest_acked=number + 1)
        reordering.on_ack(spans((0, number + 2)), largest_acked=number + 1, now=1.0)
    assert reordering.packet_threshold == PACKET_THRESHOLD
    assert reordering.time_threshold == MAX_TIME_THRESHOLD


def test_without_spurious_losses_the_thresholds_return() -> None:
    reordering = Reordering()
    reordering.on_lost(10, largest_acked=13)
    reordering.on_ack(spans((0, 31)), largest_acked=30, now=1.0)
    at = 1.0
    seen = [reordering.packet_threshold]
    for _ in range(4):
        at += CALM_S
        reordering.on_ack(spans((0, 50)), largest_acked=49, now=at)
        seen.append(reordering.packet_threshold)
    assert seen == [21, 10, 5, 3, 3]


def test_a_peer_that_acknowledges_late_reaches_the_bounds_and_no_further() -> None:
    reordering = Reordering()
    for number in range(5000):
        reordering.on_lost(number, largest_acked=number + 3)
        if number > 2000:
            reordering.on_ack(spans((0, number - 250)), largest_acked=number + 3, now=1.0)
        else:
            reordering.on_ack(spans((number + 1, number + 4)), largest_acked=number + 3, now=1.0)
        assert len(reordering._lost) <= limits.MAX_REORDERED_PACKETS + 1
    assert PACKET_THRESHOLD < reordering.packet_threshold <= limits.MAX_REORDERED_PACKETS
    assert reordering.time_threshold <= MAX_TIME_THRESHOLD


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_packets_that_overtake_are_soon_no_longer_sent_twice(share: float) -> None:
    seed = 11
    print(f"seed {seed}")
    chance = random.Random(seed)
    reordering = Reordering()
    received = RangeSet()
    outstanding: set[int] = set()
    losses = 0
    late: list[tuple[int, int]] = []
    for number in range(4000):
        outstanding.add(number)
        if chance.random() < share:
            late.append((number + 20, number))
        else:
            received.add(number, number + 1)
        for due, packet in [entry for entry in late if entry[0] <= number]:
            late.remove((due, packet))
            received.add(packet, packet + 1)
        if not len(received):
            continue
        largest = received.bounds().stop - 1
        outstanding -= {n for n in outstanding if n in received}
        reordering.on_ack(received, largest_acked=largest, now=1.0)
        for lost in sorted(n for n in outstanding if n <= largest - reordering.packet_threshold):
            outstanding.discard(lost)
            reordering.on_lost(lost, largest_acked=largest)
            losses += 1
    assert 1 <= losses <= 20
    assert 20 <= reordering.packet_threshold <= 24


def test_a_connection_learns_it_from_its_acks() -> None:
    story = tell(0)
    calm = {"loss": 0.0, "duplication": 0.0, "key_updates": {}, "rebind_at": None}
    sends = [("client", 0, bytes(1_500_000), "fin")]
    changed = Story(
        **{**vars(story), **calm, "reordering": 0.1, "sends": sends, "change_id_at": None}
    )
    play = Play(changed, ("fast", "fast"))
    play.run()
    sender = play.sides["client"]
    assert isinstance(sender, FastQuicConnection)
    learned = sender._loss.reordering
    assert learned.packet_threshold > PACKET_THRESHOLD
    assert learned.spurious < 50
