"""The size of a path's datagrams: what is tried, what is believed, and what a black hole costs."""

import random

import pytest

from edgesync import limits
from edgesync.transport.pmtud import (
    BASE_BYTES,
    BLACK_HOLE_LOSSES,
    FIRST_RETRY_S,
    MAX_PROBES,
    PROBE_TIMEOUT_S,
    RAISE_S,
    PathMtu,
)


def search(mtu: PathMtu, path: int, now: float = 0.0) -> list[int]:
    """Answer every probe as a path of ``path`` bytes would; the probes."""
    probes: list[int] = []
    while (size := mtu.next_probe(now)) is not None:
        assert len(probes) < 100
        probes.append(size)
        mtu.probed(size, size <= path, now)
    return probes


def test_nothing_is_tried_before_a_transfer() -> None:
    assert PathMtu().next_probe(1e9) is None


@pytest.mark.parametrize("ceiling", [1472, 1452, 8952, 1300])
def test_a_path_as_wide_as_its_end_takes_one_probe(ceiling: int) -> None:
    mtu = PathMtu()
    mtu.begin(ceiling, 0.0)
    assert search(mtu, 10_000) == [ceiling]
    assert mtu.size == ceiling
    assert mtu.next_probe(1e9) is None, "there is nothing above the interface"


@pytest.mark.parametrize(
    ("path", "found"), [(1452, 1452), (1400, 1392), (1280, 1280), (1231, 1200), (1460, 1452)]
)
def test_a_narrower_path_is_found_with_few_probes(path: int, found: int) -> None:
    mtu = PathMtu()
    mtu.begin(1472, 0.0)
    probes = search(mtu, path)
    assert mtu.size == found
    assert len(probes) <= 5 * MAX_PROBES
    assert mtu.next_probe(RAISE_S - 1) is None
    assert search(mtu, 1472, RAISE_S + 1)[0] == 1472
    assert mtu.size == 1472


def test_one_probe_at_a_time_and_one_loss_is_no_answer() -> None:
    mtu = PathMtu()
    mtu.begin(1472, 0.0)
    assert mtu.next_probe(0.0) == 1472
    assert mtu.next_probe(1.0) is None
    mtu.probed(1472, False, 1.0)
    assert mtu.next_probe(1.0) == 1472
    assert mtu.next_probe(1.0 + PROBE_TIMEOUT_S) == 1472, "nothing was heard of the second"
    mtu.probed(1400, True, 2.0)
    assert mtu.size == BASE_BYTES, "nobody asked that"
    mtu.probed(1472, True, 2.0)
    assert mtu.size == 1472


def test_a_ceiling_beyond_reason_is_none() -> None:
    mtu = PathMtu()
    mtu.begin(65_507, 0.0)
    assert mtu.next_probe(0.0) == limits.MAX_DATAGRAM_BYTES
    mtu = PathMtu()
    mtu.begin(576, 0.0)
    assert mtu.next_probe(0.0) is None
    assert mtu.size == BASE_BYTES


def found(ceiling: int = 1472) -> PathMtu:
    mtu = PathMtu()
    mtu.begin(ceiling, 0.0)
    search(mtu, ceiling)
    assert mtu.size == ceiling
    return mtu


def test_full_datagrams_that_vanish_are_a_black_hole() -> None:
    mtu = found()
    mtu.arrived(100)
    assert not mtu.lost(99, 1472, 1.0), "overtaken by one of its size"
    assert not mtu.lost(101, 1200, 1.0)
    fell = [mtu.lost(102 + i, 1472, 1.0) for i in range(BLACK_HOLE_LOSSES)]
    assert fell == [False] * (BLACK_HOLE_LOSSES - 1) + [True]
    assert mtu.size == BASE_BYTES
    assert mtu.falls == 1
    assert mtu.next_probe(1.0) is None
    assert search(mtu, 1400, 1.0 + FIRST_RETRY_S)[:MAX_PROBES] == [1472] * MAX_PROBES
    assert mtu.size == 1392


def test_random_loss_is_no_black_hole() -> None:
    mtu = found()
    for number in range(100_000):
        if number % 3:
            assert not mtu.lost(number, 1472, 1.0)
        else:
            mtu.arrived(number)
    assert mtu.size == 1472


def test_silence_goes_back_to_the_base_and_up_again() -> None:
    mtu = found()
    assert not mtu.timeouts(1, 5.0)
    assert mtu.timeouts(2, 5.0)
    assert not mtu.timeouts(3, 6.0), "once is enough"
    assert mtu.size == BASE_BYTES
    assert search(mtu, 1472, 5.0 + FIRST_RETRY_S) == [1472]
    assert mtu.size == 1472


def test_a_size_that_keeps_falling_is_tried_ever_later() -> None:
    mtu, now, pauses = found(), 1000.0, []
    for _ in range(12):
        assert mtu.timeouts(2, now)
        begun = now
        while mtu.next_probe(now) is None:
            now += 1.0
        mtu.probed(1472, True, now)
        pauses.append(now - begun)
    assert pauses == sorted(pauses)
    assert pauses[0] == FIRST_RETRY_S
    assert pauses[-1] == RAISE_S
    assert mtu.timeouts(2, now + 2 * RAISE_S)
    assert mtu.next_probe(now + 2 * RAISE_S + FIRST_RETRY_S) == 1472, "forgiven"


def test_a_size_the_kernel_refuses_is_dropped_at_once() -> None:
    mtu = PathMtu()
    mtu.begin(8952, 0.0)
    assert mtu.next_probe(0.0) == 8952
    mtu.refused(8952, 0.0)
    probes = search(mtu, 1472)
    assert max(probes) < 8952
    assert mtu.size == 1472
    mtu.refused(1472, 1.0)
    assert mtu.size == BASE_BYTES
    mtu.refused(BASE_BYTES, 1.0)
    assert mtu.size == BASE_BYTES


def test_another_path_is_searched_anew() -> None:
    mtu = found()
    mtu.reset()
    assert mtu.size == BASE_BYTES
    assert mtu.next_probe(1e9) is None
    mtu.begin(1452, 1.0)
    assert search(mtu, 10_000, 1.0) == [1452]


def test_an_interface_that_shrank_is_believed() -> None:
    mtu = found(8952)
    mtu.begin(1472, 1.0)
    assert mtu.size == BASE_BYTES
    assert search(mtu, 10_000, 1.0) == [1472]


@pytest.mark.parametrize("seed", range(200))
def test_whatever_happens_the_size_is_one_that_arrived(seed: int) -> None:
    rng = random.Random(seed)
    mtu, now = PathMtu(), 0.0
    ceiling, path = rng.randint(500, 20_000), rng.randint(BASE_BYTES, 10_000)
    arrived = {BASE_BYTES}
    mtu.begin(ceiling, now)
    for number in range(400):
        now += rng.expovariate(1.0)
        match rng.randrange(8):
            case 0:
                mtu.lost(number, mtu.size, now)
            case 1:
                mtu.timeouts(rng.randrange(4), now)
            case 2 if rng.random() < 0.1:
                path = rng.randint(BASE_BYTES, 10_000)
            case 3 if rng.random() < 0.1:
                ceiling = rng.randint(500, 20_000)
                mtu.begin(ceiling, now)
            case 4 if mtu.size <= path:
                mtu.arrived(number)
            case 5 if rng.random() < 0.05:
                mtu.refused(rng.randint(1000, 9000), now)
            case _:
                probe = mtu.next_probe(now)
                if probe is not None:
                    assert BASE_BYTES < probe <= max(BASE_BYTES, min(ceiling, 8952)), f"seed {seed}"
                    came = probe <= path and rng.random() > 0.1
                    if came:
                        arrived.add(probe)
                    mtu.probed(probe, came, now)
        assert mtu.size in arrived, f"seed {seed}"
        assert BASE_BYTES <= mtu.size <= limits.MAX_DATAGRAM_BYTES
    # left alone, it settles on what the path and the interface carry
    mtu.begin(ceiling, now)
    for _ in range(10):
        if mtu.size > path:
            assert mtu.timeouts(2, now)
        now += RAISE_S + 1
        search(mtu, path, now)
    best = min(path, max(BASE_BYTES, min(ceiling, limits.MAX_DATAGRAM_BYTES)))
    assert best * 0.49 <= mtu.size <= best or best < 1232, f"seed {seed}"
