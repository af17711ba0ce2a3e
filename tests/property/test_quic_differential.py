"""The fast engine against stock aioquic, in short; ``python -m tests.differential --seeds 10000`` takes longer."""

import pytest

from tests.differential import compare


@pytest.mark.parametrize("first", range(0, 120, 20))
def test_both_engines_deliver_the_same(first: int) -> None:
    differences = [sentence for seed in range(first, first + 20) for sentence in compare(seed)]
    assert not differences
