"""state.db: rebuilt when unreadable, refused when newer, readable beside a running agent."""

import sqlite3
from pathlib import Path

import pytest

from device.state import Activating, BundleRow, Counters, StateDatabase
from edgesync.bitfield import Bitfield
from edgesync.errors import StorageError
from edgesync.ids import BundleName, Digest, Version

DIGEST = Digest("a" * 64)
ROW = BundleRow(DIGEST, BundleName("app"), Version("1"), "files", "fleet", 0, 10, 10, 20, "staged")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.db"


def test_how_the_last_run_ended(path: Path) -> None:
    found = []
    for boot, clean in (("a", True), ("a", False), ("a", False), ("b", True), ("c", True)):
        state = StateDatabase.open(path)
        found.append(state.begin_run(boot)[1])
        if clean:
            state.end_run()
        state.close()
    assert found == ["power", "clean", "killed", "power", "clean"]


def test_claims_and_the_last_two_flushes(path: Path) -> None:
    state = StateDatabase.open(path)
    state.put_bundle(ROW, Bitfield(20))
    bits = Bitfield(20)
    for pieces in ([0, 1], [2], [3, 4]):
        bits.update(pieces)
        state.claim(DIGEST, bits, pieces, Counters(bytes_from_peers=5))
    assert sorted(state.last_flushes(DIGEST)) == [2, 3, 4]
    state.close()
    state = StateDatabase.open(path)
    assert list(state.bits(DIGEST, 20)) == [0, 1, 2, 3, 4]
    assert state.bits(DIGEST, 200).count == 0  # not this many pieces: not believed
    assert state.counters(DIGEST).bytes_from_peers == 5
    state.forget_bundle(DIGEST)
    assert not state.bundles()
    assert not state.bits(DIGEST, 20).count
    state.close()


def test_an_activation_is_recorded(path: Path) -> None:
    state = StateDatabase.open(path)
    state.put_bundle(ROW, Bitfield.full(20))
    row = Activating(BundleName("app"), None, DIGEST, switch=True)
    state.begin_activation(row)
    assert state.activating() == [row]
    state.end_activation(row.name, held=DIGEST, active=DIGEST)
    assert state.activating() == []
    assert state.active() == {"app": DIGEST}
    assert state.bundles()[0].state == "held"
    state.close()


@pytest.mark.parametrize("damage", ["garbage", "header", "pages", "empty"])
def test_an_unreadable_file_is_set_aside(path: Path, damage: str) -> None:
    state = StateDatabase.open(path)
    state.put_bundle(ROW, Bitfield(20))
    state.close()
    data = bytearray(path.read_bytes())
    if damage == "garbage":
        data = bytearray(b"garbage" * 5000)
    elif damage == "header":
        data[:16] = b"x" * 16
    elif damage == "pages":
        data[4096:] = b"\xff" * (len(data) - 4096)
    else:
        data.clear()
    path.write_bytes(data)
    state = StateDatabase.open(path)
    assert state.rebuilt == (damage != "empty")
    assert not state.bundles()
    assert path.with_name("state.db.damaged").exists() == (damage != "empty")
    state.put_bundle(ROW, Bitfield(20))
    state.close()


def test_a_newer_file_is_refused_and_kept(path: Path) -> None:
    StateDatabase.open(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute(
            "insert into _sqlite_migrations (migration_set, name, applied_at) values (?, ?, ?)",
            ("device-state", "m999_future", "2030"),
        )
    connection.close()
    for opening in (StateDatabase.open, StateDatabase.read):
        with pytest.raises(StorageError, match=r"newer.*m999_future"):
            opening(path)
    assert not path.with_name("state.db.damaged").exists()


def test_reading_beside_a_writer(path: Path) -> None:
    state = StateDatabase.open(path)
    state.put_bundle(ROW, Bitfield(20))
    reader = StateDatabase.read(path)
    assert reader.bundles() == [ROW]
    with pytest.raises(StorageError):
        reader.put_bundle(ROW, Bitfield(20))
    reader.close()
    state.close()
    with pytest.raises(StorageError):
        StateDatabase.read(path.with_name("missing.db"))


def test_the_log_stays_small(path: Path) -> None:
    state = StateDatabase.open(path)
    state.put_bundle(ROW, Bitfield(20))
    for number in range(3000):
        state.save_counters(DIGEST, Counters(bytes_sent=number))
    assert path.with_name("state.db-wal").stat().st_size < 4 * 1024 * 1024
    state.rewrite_log()
    state.close()
