"""The answer window follows what a path carries, and nothing else."""

from edgesync import limits
from edgesync.transport.window import ROUND_TRIPS, WindowTuner


def read_at(rate: float, *, rtt: float, seconds: float) -> WindowTuner:
    """A reader that takes 64 KiB pieces at ``rate`` bytes per second."""
    tuner = WindowTuner()
    step = 65_536
    now = 100.0
    while now < 100.0 + seconds:
        tuner.consumed(step, now=now, rtt=rtt)
        now += step / rate
    return tuner


def test_a_long_fat_path_gets_a_window_of_several_round_trips() -> None:
    rate, rtt = 2.5e6, 0.6
    window = read_at(rate, rtt=rtt, seconds=30).window
    assert ROUND_TRIPS * rate * rtt <= window <= limits.MAX_ANSWER_WINDOW_BYTES


def test_a_fast_lan_needs_no_more_than_the_first_window() -> None:
    assert read_at(100e6, rtt=0.0005, seconds=3).window == limits.FIRST_ANSWER_WINDOW_BYTES


def test_a_slow_reader_on_a_slow_path_is_not_given_more() -> None:
    assert read_at(8_000, rtt=2.0, seconds=3_000).window == limits.FIRST_ANSWER_WINDOW_BYTES


def test_the_window_has_a_ceiling() -> None:
    assert read_at(1e9, rtt=5.0, seconds=10).window == limits.MAX_ANSWER_WINDOW_BYTES


def test_a_long_path_starts_wide() -> None:
    tuner = WindowTuner()
    assert tuner.begin(rtt=0.6) > 3 * limits.FIRST_ANSWER_WINDOW_BYTES
    assert tuner.begin(rtt=100.0) == limits.MAX_ANSWER_WINDOW_BYTES
    assert WindowTuner().begin(rtt=0.01) == limits.FIRST_ANSWER_WINDOW_BYTES


def test_an_idle_hour_is_no_reason_to_grow() -> None:
    tuner = WindowTuner()
    tuner.consumed(tuner.window // 2 - 1, now=1.0, rtt=0.1)
    assert not tuner.consumed(1, now=3_601.0, rtt=0.1)
    assert tuner.window == limits.FIRST_ANSWER_WINDOW_BYTES
