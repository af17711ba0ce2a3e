"""Small seeded swarms of the real cores."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from simulations.scenarios.lan_swarm import PLANS, Outcome, run

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_same_seed_same_trace_whatever_the_hash_seed() -> None:
    script = (
        "from dataclasses import replace\n"
        "from simulations.scenarios.lan_swarm import PLANS, run\n"
        "print(run(replace(PLANS['kills'], pieces=96, liars=1), 11).fingerprint)"
    )
    prints = {
        subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "4242")
    }
    assert len(prints) == 1
    assert len(prints.pop()) == 65


def outcome(name: str, seed: int = 5, **changes: object) -> Outcome:
    result = run(replace(PLANS[name], **changes), seed)  # type: ignore[arg-type]
    assert result.finished == result.devices, result
    return result


@pytest.mark.slow
def test_clean_swarm_is_near_the_bound_with_one_copy() -> None:
    result = outcome("clean-8")
    assert result.makespan_s <= 1.5 * result.bound_s
    assert result.gateway_copies <= 1.02
    assert result.duplicates <= 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", ["throttled-4", "late", "gateway-dies", "sparse"])
def test_one_copy_is_enough(name: str) -> None:
    result = outcome(name, pieces=128)
    assert result.gateway_copies <= 1.05
    assert result.duplicates <= 0.02


@pytest.mark.slow
@pytest.mark.parametrize("name", ["liar", "staller", "poisoner", "kills", "liar-alone"])
def test_faults_cost_time_not_copies(name: str) -> None:
    result = outcome(name, pieces=128)
    assert result.gateway_copies <= 1.15
    assert result.worst_share <= 1.05
