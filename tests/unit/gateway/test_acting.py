import os
import stat
import subprocess
import sys

import pytest

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
NOBODY = 65534

SCRIPT = """
import os, sys
from pathlib import Path
from gateway.acting import become_owner
become_owner(Path(sys.argv[1]), keep_reading=sys.argv[3] == "keep")
print(os.geteuid(), os.getuid(), os.getegid(), os.getgroups())
(Path(sys.argv[1]) / "made").write_text("x")
try:
    print(Path(sys.argv[2]).read_text())
except PermissionError:
    print("cannot read")
try:
    Path(sys.argv[2]).write_text("y")
    print("wrote")
except PermissionError:
    print("cannot write")
try:
    os.setuid(0)
    print("root again")
except PermissionError:
    print("not root")
"""


@pytest.fixture
def world(tmp_path):
    path = tmp_path / "data"
    path.mkdir()
    for parent in (tmp_path, *tmp_path.parents):
        if parent.owner() == "root" and not parent.stat().st_mode & stat.S_IXOTH:
            parent.chmod(parent.stat().st_mode | stat.S_IXOTH)
        if parent.name.startswith("pytest-of-"):
            break
    os.chown(path, NOBODY, NOBODY)
    secret = tmp_path / "secret"
    secret.write_text("for root alone")
    secret.chmod(0o600)

    def run(how):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(path), str(secret), how],
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout.splitlines(), done.stderr

    return path, run


@ROOT
def test_a_command_reads_as_root_and_writes_as_the_owner(world):
    path, run = world
    lines, _err = run("keep")
    assert lines[0].startswith(f"{NOBODY} {NOBODY} {NOBODY}")
    assert lines[1:] == ["for root alone", "cannot write", "not root"]
    assert (path / "made").stat().st_uid == NOBODY


@ROOT
def test_the_daemon_keeps_no_privilege(world):
    path, run = world
    lines, err = run("none")
    if not lines:
        assert (
            f"the owner of {path} cannot read" in err
        )  # Python itself lies where only root can read.
    else:
        assert lines[1:] == ["cannot read", "cannot write", "not root"]


def test_nothing_changes_for_the_owner(tmp_path):
    from gateway.acting import become_owner

    before = os.geteuid(), os.getegid(), os.getgroups()
    become_owner(tmp_path)
    become_owner(tmp_path / "missing")
    assert (os.geteuid(), os.getegid(), os.getgroups()) == before
