from pathlib import Path

import pytest

from tests.ack_trace import TRACES, VECTORS, replay

RECORDED = sorted(VECTORS.glob("*.jsonl"))


def test_every_trace_is_recorded() -> None:
    assert [path.stem for path in RECORDED] == sorted(TRACES)


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_a_recorded_trace_gets_the_same_decisions(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert sum(line.startswith('["end"') for line in lines) > 50
    assert replay(TRACES[path.stem][0], lines) == []
