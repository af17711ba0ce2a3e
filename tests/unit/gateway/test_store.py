import sqlite3
import threading

import pytest

from edgesync.errors import ConfigError, StateCorruptError, StorageError
from edgesync.storage.datadir import DataDir
from gateway.store import GatewayStore


@pytest.fixture
def datadir(tmp_path):
    return DataDir.create(tmp_path / "gw", "gateway")


def test_events_are_append_only_and_ids_grow(datadir):
    with GatewayStore.open(datadir) as store:
        first = store.emit("operator", "token.created", "token:a", {"uses": 1})
        assert store.emit("operator", "token.created", "token:b") == first + 1
        for sql in ("DELETE FROM events", "UPDATE events SET actor = 'x'"):
            with pytest.raises(StorageError, match="append-only"), store.atomic() as db:
                db.conn.execute(sql)
        assert [row["subject"] for row in store.rows("SELECT * FROM events")] == [
            "token:a",
            "token:b",
        ]


def fail_after_event(store, subject):
    with store.atomic():
        store.emit("operator", "a.b", subject)
        raise RuntimeError


def test_atomic_rolls_back_whole_or_nested(datadir):
    with GatewayStore.open(datadir) as store:
        with pytest.raises(RuntimeError):
            fail_after_event(store, "x:1")
        with store.atomic():
            store.emit("operator", "a.b", "x:2")
            with pytest.raises(RuntimeError):
                fail_after_event(store, "x:3")
        assert [row["subject"] for row in store.rows("SELECT * FROM events")] == ["x:2"]


def test_data_version_tells_of_other_connections(datadir):
    with GatewayStore.open(datadir) as store, GatewayStore.open(datadir) as other:
        before = store.data_version()
        store.emit("operator", "a.b", "x:1")
        assert store.data_version() == before
        other.emit("operator", "a.b", "x:2")
        assert store.data_version() != before


def test_two_first_openers_migrate_once(datadir):
    errors = []

    def opener():
        try:
            GatewayStore.open(datadir).close()
        except Exception as exc:  # noqa: BLE001 - reported below
            errors.append(exc)

    threads = [threading.Thread(target=opener) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_damaged_and_newer(datadir):
    GatewayStore.open(datadir).close()
    connection = sqlite3.connect(datadir.database)
    with connection:
        connection.execute(
            "INSERT INTO _sqlite_migrations (migration_set, name, applied_at) VALUES ('gateway', 'm999_future', 'x')"
        )
    connection.close()
    with pytest.raises(ConfigError, match="newer version"):
        GatewayStore.open(datadir)
    for suffix in ("", "-wal", "-shm"):
        datadir.database.with_name(datadir.database.name + suffix).unlink(missing_ok=True)
    datadir.database.write_bytes(b"not a database" * 100)
    with pytest.raises(StateCorruptError, match="damaged"):
        GatewayStore.open(datadir)
