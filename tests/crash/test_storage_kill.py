"""SIGKILL a real process that fills, updates and activates bundles, again and again, at random moments."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from device.bundle_store import BundleStore
from device.state import StateDatabase
from tests.crash.builders import build, random_files, read_tree

ROOT = Path(__file__).parents[2]
SEED = int(os.environ.get("EDGESYNC_SEED", "3"))
KILLS = 12

PROGRAM = """
import random, sys
from pathlib import Path
from device.bundle_store import BundleStore
from device.state import StateDatabase
from tests.crash.test_storage_kill import bundles
directory, seed = Path(sys.argv[1]), int(sys.argv[2])
state = StateDatabase.open(directory / "state.db")
store = BundleStore.open(directory, state)
print("ready", flush=True)
for built in bundles():
    if store.held(built.digest):
        continue
    staged = store.begin(built.data, built.manifest)
    print("held", staged.have.count, len(built.pieces), flush=True)
    staged.import_local()
    missing = list(staged.have.missing())
    random.Random(seed).shuffle(missing)
    for index in missing:
        staged.write_piece(index, built.pieces[index], source="peer", carried_bytes=len(built.pieces[index]))
        print("wrote", built.manifest.version, len(built.pieces[index]), flush=True)
        if staged.flush_due() or random.random() < 0.02:
            staged.flush()
    staged.activate()
    print("active", built.manifest.version, flush=True)
store.close()
print("done", flush=True)
"""


def bundles() -> list:  # type: ignore[type-arg]
    files = random_files(SEED, 150, 60_000)
    first = build(files)
    for path in sorted(files)[:30]:
        files[path] = files[path][::-1] + b"!"
    return [first, build(files, version="2.0")]


@pytest.mark.slow
def test_killed_at_random_it_finishes_and_fetches_nothing_twice(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    print(f"seed {SEED}")
    deadline = time.monotonic() + 90
    kills, done = 0, False
    while not done:
        assert time.monotonic() < deadline
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path), str(rng.randrange(1000))],
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        patience = rng.randrange(1, 120)
        for count, line in enumerate(process.stdout):
            done |= line.strip() == "done"
            if count == patience and kills < KILLS:
                process.send_signal(signal.SIGKILL)
                kills += 1
        process.wait()
        process.stdout.close()
    assert kills == KILLS
    state = StateDatabase.open(tmp_path / "state.db")
    store = BundleStore.open(tmp_path, state)
    for built in bundles():
        path = tmp_path / "bundles/app" / built.manifest.version
        assert read_tree(path) == built.files
        counters = store.held(built.digest).counters  # type: ignore[union-attr]
        received = counters.bytes_from_peers + counters.bytes_local
        # At most the piece in hand is received twice for each kill; at most what was counted last is forgotten.
        slack = KILLS * 2 * 64 * 1024
        assert abs(received - built.manifest.unique_bytes) <= slack
    assert (tmp_path / "bundles/app/current").readlink() == Path("2.0")
    store.close()
    state.close()
