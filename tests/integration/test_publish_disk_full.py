"""A gateway whose file system really is full, first of bytes, then of inodes: the command says so, nothing is lost."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.root, pytest.mark.slow]
FULL_BYTES = 20 << 20
INODES = 60


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    target = tmp_path / "disk"
    target.mkdir()
    options = f"size={FULL_BYTES},nr_inodes={INODES}"
    mount = ("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(target))
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    yield target
    subprocess.run(("umount", str(target)), check=True)


def edgesync(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        (sys.executable, "-m", "edgesync", *arguments), check=False, capture_output=True, text=True
    )


def test_bytes_then_inodes(disk: Path, tmp_path: Path) -> None:
    data = ("--data", str(disk / "gw"), "--json")

    def ask(*arguments: str) -> dict[str, Any]:
        done = edgesync(*arguments, *data)
        assert done.returncode == 0, done.stderr
        value: dict[str, Any] = json.loads(done.stdout)
        return value

    edgesync("gateway", "init", "acme", "--advertise", "127.0.0.1", *data[:2])
    (tmp_path / "small").write_bytes(os.urandom(100_000))
    (tmp_path / "large").write_bytes(os.urandom(2 * FULL_BYTES))
    ask("publish", "bundle", str(tmp_path / "small"), "small@1")

    refused = edgesync("publish", "bundle", str(tmp_path / "large"), "large@1", *data)
    assert refused.returncode == 1
    assert "disk is full" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    left = os.statvfs(disk)
    assert left.f_bavail * left.f_bsize > FULL_BYTES * 0.9

    for number in range(INODES):
        try:
            (disk / f"{number}").touch()
        except OSError:
            break
    refused = edgesync("publish", "bundle", str(tmp_path / "small"), "small@2", *data)
    assert refused.returncode == 1
    assert "disk is full" in refused.stderr
    for path in disk.glob("[0-9]*"):
        path.unlink()

    assert ask("bundle", "verify", "small@1")["bad"] == []
    ask("publish", "bundle", str(tmp_path / "small"), "small@2")
    listed = ask("bundle", "list")["bundles"]
    assert [row["version"] for row in listed] == ["2", "1"]
