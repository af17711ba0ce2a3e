"""What `bundle …` does on a device's store: damage is named by path, nothing is removed that is in use."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from device import role
from device.bundle_store import BundleStore
from device.state import StateDatabase
from edgesync import limits
from edgesync.errors import ConflictError, NotFoundError, UsageError
from edgesync.storage.datadir import DataDir
from tests.crash.builders import Built, build

TREE = {"a/one": b"1" * 9000, "b": b"2" * 5000}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataDir:
    monkeypatch.setattr(limits, "RESERVE_BYTES", 4096)
    return DataDir.create(tmp_path / "agent", "agent")


@pytest.fixture
def store(data: DataDir) -> Iterator[BundleStore]:
    state = StateDatabase.open(data.state_database)
    opened = BundleStore.open(data.path, state)
    yield opened
    opened.close()
    state.close()


def install(store: BundleStore, *versions: str) -> list[Built]:
    made = [build(TREE | {"v": version.encode()}, version=version) for version in versions]
    for built in made:
        staged = store.begin(built.data, built.manifest)
        for index in list(staged.have.missing()):
            staged.write_piece(index, built.pieces[index])
        staged.activate()
    return made


def perform(store: BundleStore, op: str, bundle: str, *, assigned=False, fetching=False):
    return role.perform(
        store,
        {"op": op, "bundle": bundle},
        assigned=lambda _name, _version: assigned,
        fetching=lambda _digest: fetching,
    )


def test_verify_names_every_path_that_differs(store: BundleStore) -> None:
    (built,) = install(store, "1")
    path = store.bundle_path("app", "1")
    clean = perform(store, "bundle_verify", "app@1")
    assert (clean["bad"], clean["paths"]) == ([], [])
    assert clean["pieces"] == len(built.pieces)
    (path / "b").write_bytes(b"edited")
    (path / "a/one").unlink()
    (path / "more").write_bytes(b"")
    found = perform(store, "bundle_verify", "app@1")
    assert found["bad"]
    assert sorted(sentence.split("' ")[0] for sentence in found["paths"]) == [
        "'a/one",
        "'b",
        "'more",
    ]


def test_verify_without_an_agent_reads_the_disk(data: DataDir, store: BundleStore) -> None:
    install(store, "1")
    path = store.bundle_path("app", "1")
    store.close()
    (path / "b").chmod(0o600)
    found = role.bundle_verify(data.path, "app@1")
    assert found["paths"] == ["'b' is unknown or differs"]


def test_what_is_in_use_is_not_removed(store: BundleStore) -> None:
    first, _ = install(store, "1", "2")
    with pytest.raises(ConflictError, match="app@1 is assigned to this device"):
        perform(store, "bundle_remove", "app@1", assigned=True)
    with pytest.raises(ConflictError, match="app@1 is being fetched"):
        perform(store, "bundle_remove", "app@1", fetching=True)
    with pytest.raises(ConflictError, match="app@2 is the active version"):
        perform(store, "bundle_remove", "app@2")
    assert perform(store, "bundle_remove", "app@1") == {
        "id": first.digest,
        "name": "app",
        "version": "1",
    }
    assert [info.version for info in store.bundles()] == ["2"]


def test_names_that_are_not_there(store: BundleStore) -> None:
    with pytest.raises(NotFoundError, match="app@9 is not on this device"):
        perform(store, "bundle_show", "app@9")
    with pytest.raises(UsageError, match="name a version"):
        perform(store, "bundle_show", "app")
