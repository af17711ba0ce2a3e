"""How long a path may be silent."""

import pytest

from edgesync import limits
from edgesync.transport.patience import silence_s, stranger_s


@pytest.mark.parametrize(
    ("base", "rtt", "expected"),
    [
        (8.0, 0.0, 8.0),
        (8.0, 0.1, 8.0),
        (8.0, 2.0, 12.0),
        (3.0, 2.0, 12.0),
        (8.0, 1000.0, limits.MAX_SILENCE_S),
    ],
)
def test_a_silence_is_longer_on_a_long_path_and_bounded(
    base: float, rtt: float, expected: float
) -> None:
    assert silence_s(base, rtt) == expected


@pytest.mark.parametrize(
    ("rtt", "crowded", "expected"),
    [
        (0.05, False, limits.UNPROVEN_TIMEOUT_S),
        (0.6, False, 12.0),
        (2.0, False, limits.MAX_HANDSHAKE_S),
        (2.0, True, limits.UNPROVEN_TIMEOUT_S),
        (0.0, False, 2 * limits.UNPROVEN_TIMEOUT_S),
        (0.0, True, limits.UNPROVEN_TIMEOUT_S),
    ],
)
def test_a_stranger_gets_its_round_trips_unless_many_wait(
    rtt: float, crowded: bool, expected: float
) -> None:
    assert stranger_s(rtt, crowded=crowded) == expected
