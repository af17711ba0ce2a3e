import random

import pytest

from edgesync.transport.congestion import Pacer, RateLimiter, create_controller
from edgesync.transport.congestion.pacer import LATE_S, UNPACED_BURST

SIZE = 1200


def drive(
    pacer: Pacer, *, seconds: float, lateness: float, now: float = 0.0
) -> list[tuple[float, int]]:
    """Send all that may leave, then sleep until told (and ``lateness`` longer)."""
    sent = []
    end = now + seconds
    while now < end:
        count = pacer.quota(now)
        if count:
            pacer.sent(count * SIZE)
            sent.append((now, count))
        wake = pacer.next_send(now, 1000)
        now = max(now, wake if wake is not None else now) + lateness
    return sent


@pytest.mark.parametrize("rate", [2_400.0, 100_000.0, 2_500_000.0, 50_000_000.0])
@pytest.mark.parametrize("lateness", [1e-5, 0.001])
def test_the_rate_is_kept_however_late_the_timer_is(rate: float, lateness: float) -> None:
    pacer = Pacer(max_datagram_size=SIZE)
    pacer.set_rate(rate)
    sent = drive(pacer, seconds=20 if rate < 1e6 else 2, lateness=lateness)
    span = sent[-1][0] - sent[0][0]
    average = sum(count for _, count in sent[1:]) * SIZE / span
    assert 0.95 * rate <= average <= 1.01 * rate


def test_a_machine_that_wakes_late_keeps_the_rate_and_makes_up_for_no_more_than_was_late() -> None:
    pacer = Pacer(max_datagram_size=SIZE)
    pacer.set_rate(2_500_000)
    sent = drive(pacer, seconds=4, lateness=0.010)
    span = sent[-1][0] - sent[0][0]
    average = sum(count for _, count in sent[1:]) * SIZE / span
    assert 0.95 * 2_500_000 <= average <= 1.01 * 2_500_000
    most = pacer.burst + LATE_S * 2_500_000 / SIZE + 1
    assert max(count for _, count in drive(pacer, seconds=4, lateness=0.5, now=10.0)) <= most
    # a pause in which nothing was promised is not lateness
    assert pacer.quota(100.0) <= most
    pacer.sent(int(most) * SIZE)
    assert pacer.quota(200.0) <= pacer.burst


def test_a_wakeup_never_releases_more_than_a_burst() -> None:
    pacer = Pacer(max_datagram_size=SIZE)
    pacer.set_rate(2_500_000)
    assert max(count for _, count in drive(pacer, seconds=1, lateness=0.001)) <= pacer.burst == 9


def test_without_a_rate_it_does_not_hold_back() -> None:
    pacer = Pacer(max_datagram_size=SIZE)
    assert pacer.quota(0.0) == UNPACED_BURST
    assert pacer.next_send(0.0, 5) is None
    assert pacer.next_send_time(0.0) is None


def test_debt_is_kept() -> None:
    pacer = Pacer(max_datagram_size=SIZE)
    pacer.set_rate(12_000)
    pacer.sent(pacer.quota(0.0) * SIZE)
    pacer.sent(10 * SIZE)
    assert pacer.quota(0.9) == 0
    assert pacer.next_send(0.9, 1) == pytest.approx(1.1, abs=0.01)


def share(
    limiter: RateLimiter, members: int, *, seconds: float, wanted: dict[int, float]
) -> list[int]:
    """Bytes each member moved; ``wanted`` names members that want less than they could get."""
    pacers = []
    for index in range(members):
        pacer = Pacer(max_datagram_size=SIZE)
        pacer.set_rate(wanted.get(index, 10_000_000.0))
        pacer.set_limiters((limiter,))
        pacers.append(pacer)
    moved = [0] * members
    wake = [0.0] * members
    now = 0.0
    while now < seconds:
        index = min(range(members), key=lambda i: (wake[i], i))  # the first is always asked first
        now = max(now, wake[index])
        count = pacers[index].quota(now)
        if count:
            pacers[index].sent(count * SIZE)
            moved[index] += count * SIZE
        at = pacers[index].next_send(now, 1000)
        wake[index] = max(now + 1e-4, at if at is not None else now)
    return moved


def test_members_of_a_cap_share_it_evenly_and_use_all_of_it() -> None:
    moved = share(RateLimiter(1_000_000), 4, seconds=5, wanted={})
    assert 4_700_000 <= sum(moved) <= 5_100_000
    assert min(moved) >= 0.9 * max(moved)


def test_what_a_slow_member_leaves_goes_to_the_others() -> None:
    moved = share(RateLimiter(1_000_000), 3, seconds=5, wanted={1: 50_000.0})
    assert moved[1] == pytest.approx(250_000, rel=0.1)
    assert sum(moved) >= 4_600_000
    assert min(moved[0], moved[2]) >= 0.9 * max(moved)


def test_a_cap_changes_while_it_is_used() -> None:
    limiter = RateLimiter(1_000_000)
    pacer = Pacer(max_datagram_size=SIZE)
    pacer.set_rate(10_000_000)
    pacer.set_limiters((limiter,))
    fast = sum(count for _, count in drive(pacer, seconds=2, lateness=1e-4)) * SIZE
    limiter.set_rate(100_000)
    slow = sum(count for _, count in drive(pacer, seconds=2, lateness=1e-4, now=2.0)) * SIZE
    limiter.set_rate(0)
    free = sum(count for _, count in drive(pacer, seconds=2, lateness=1e-4, now=4.0)) * SIZE
    assert fast == pytest.approx(2_000_000, rel=0.05)
    assert slow == pytest.approx(200_000, rel=0.1)
    assert free == pytest.approx(20_000_000, rel=0.1)


def test_a_closed_pacer_leaves_the_cap() -> None:
    limiter = RateLimiter(1_000)
    pacer = Pacer(max_datagram_size=SIZE)
    pacer.set_limiters((limiter,))
    pacer.close()
    assert limiter._given == {}
    with pytest.raises(ValueError, match="0 or more"):
        limiter.set_rate(-1)


@pytest.mark.parametrize("name", ["cubic", "reno"])
def test_stock_controllers_stand_behind_the_interface(name: str) -> None:
    controller = create_controller(name, max_datagram_size=SIZE, rng=random.Random(1))
    controller.pacer.update_rate(congestion_window=12_000, smoothed_rtt=0.1)
    assert controller.pacer.rate_bytes_s == pytest.approx(150_000)
    controller.set_rate_cap(50_000)
    assert controller.pacer.rate_bytes_s == 50_000
    controller.set_window_cap(5_000)
    assert controller.congestion_window == 5_000
    controller.resize(1400)
    assert controller.pacer.datagram_bytes == 1400
    assert controller.status().name == name
