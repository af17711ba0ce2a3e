"""The short, seeded form of the power-cut campaigns; ``python -m tests.crash`` runs the long one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SEED = 20

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/fuse").exists(),
    reason="needs root and /dev/fuse: a recording file system is mounted",
)


@pytest.mark.root
@pytest.mark.slow
@needs_root
@pytest.mark.parametrize("target", ["store", "activation", "trust"])
def test_no_promise_is_broken(target: str) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "tests.crash", "--target", target, "--cuts", "60",
            "--faults", "6", "--fault-cuts", "2", "--seed", str(SEED),
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.root
@pytest.mark.slow
@needs_root
def test_the_campaign_finds_a_store_that_claims_before_it_syncs() -> None:
    """A tool that never complains proves nothing."""
    program = """
import sys
from device.bundle_store import StagedBundle
StagedBundle._sync = lambda self, fds, dirty, *, everything: None
sys.argv = ["tests.crash", "--target", "store", "--cuts", "60", "--faults", "0", "--seed", "20"]
from tests.crash.__main__ import main
sys.exit(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT, capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "is claimed" in done.stdout
