"""SIGKILL of a real publishing process at random points, then publish again: all or nothing, and cheap to repeat."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgesync.storage.datadir import DataDir
from gateway import packs
from gateway.service import bundles, setup
from gateway.store import GatewayStore

KILLS = int(os.environ.get("EDGESYNC_PUBLISH_KILLS", "4"))
LARGE_BYTES = 10_000_000
BATCH_BYTES = 256 << 10
PUBLISH = f"""
import os, sys, time
from gateway import piece_worker, publisher
sync = os.fdatasync
def slow_sync(fd):
    sync(fd)
    time.sleep(0.004)
os.fdatasync = slow_sync
publisher.BATCH_BYTES = {BATCH_BYTES}
publisher.INLINE_BYTES = 0
publisher._GROUP_BYTES = piece_worker.BLOCK_BYTES = {BATCH_BYTES}
from edgesync.cli.main import main
sys.exit(main())
"""


def start(data: Path, tree: Path) -> subprocess.Popen[bytes]:
    command = ("publish", "bundle", str(tree), "app@1", "--data", str(data), "--json")
    return subprocess.Popen(
        [sys.executable, "-c", PUBLISH, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def stored(data: Path) -> int:
    return sum(path.stat().st_size for path in (data / "packs").iterdir())


def wait_until_gone(group: int) -> None:
    """Workers of a killed publisher notice at their next word to it."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    pytest.fail("workers outlive their publisher")


def test_killed_publishes(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    tree = tmp_path / "tree"
    (tree / "small").mkdir(parents=True)
    for number in range(200):
        (tree / "small" / f"{number}").write_bytes(rng.randbytes(rng.randrange(20_000)))
    (tree / "large").write_bytes(rng.randbytes(LARGE_BYTES))
    payload = sum(path.stat().st_size for path in tree.rglob("*") if path.is_file())
    data = tmp_path / "gw"
    setup.init(data, name="acme", advertise=["gw.example"], region="eu", threshold=(1, 1))

    for kill in range(KILLS):
        # Half of the kills while pieces are stored, the others around the signature.
        before = stored(data)
        enough = before + int((payload - before) * rng.random() / 2)
        written_ns = (data / "blobs").stat().st_mtime_ns
        early = kill < KILLS / 2
        pause_s = rng.random() * (0.004 if early else 0.05)
        with start(data, tree) as process:
            while process.poll() is None:
                if early and stored(data) > enough:
                    break
                if (data / "blobs").stat().st_mtime_ns != written_ns:
                    break
                time.sleep(0.0005)
            time.sleep(pause_s)
            process.kill()
            process.wait()
        wait_until_gone(process.pid)
        with GatewayStore.open(DataDir.open(data, "gateway")) as store:
            listed = bundles.list_bundles(store)
            print(
                f"kill {kill}: {process.returncode}, {stored(data)} bytes stored, listed {len(listed)}"
            )
            if process.returncode == -signal.SIGKILL and not listed:
                # Every piece the index names is whole, though nothing is listed.
                with packs.PieceStore.open(store) as pieces:
                    for row in store.rows("SELECT id FROM pieces"):
                        assert pieces.read(row["id"]) is not None
            for row in listed:
                assert bundles.verify(store, row["name"], row["version"])["bad"] == []

    with start(data, tree) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err.decode()
    published = json.loads(out)
    with GatewayStore.open(DataDir.open(data, "gateway")) as store:
        assert bundles.verify(store, "app", "1")["bad"] == []
        assert len(bundles.list_bundles(store)) == 1
        live = store.rows("SELECT sum(live) AS n FROM packs")[0]["n"]
    assert live == published["wire_bytes"]
    # A kill costs the batches that were on their way, never what was durable.
    assert stored(data) <= published["wire_bytes"] + KILLS * 4 * BATCH_BYTES
