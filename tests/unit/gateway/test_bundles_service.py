import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgesync import limits, manifest
from edgesync.errors import (
    ConfigError,
    ConflictError,
    DiskFullError,
    InputError,
    NotFoundError,
    UsageError,
    VerificationError,
)
from edgesync.storage import atomic
from edgesync.storage.datadir import DataDir
from gateway import catalogue, packs, publisher
from gateway.repository import Repository
from gateway.scan import Scan
from gateway.service import bundles, setup
from gateway.service.bundles import Published
from gateway.store import GatewayStore


class Gateway:
    def __init__(self, store: GatewayStore) -> None:
        self.store = store
        self.repo = setup.repository(store)

    def publish(self, path: Path, bundle: str, **more: Any) -> Published:
        name, _, version = bundle.partition("@")
        return bundles.publish(self.store, self.repo, path, name, version, **more)

    def remove(self, bundle: str) -> dict[str, Any]:
        name, _, version = bundle.partition("@")
        return bundles.remove(self.store, self.repo, name, version)

    def bad(self, bundle: str) -> list[int]:
        name, _, version = bundle.partition("@")
        return list(bundles.verify(self.store, name, version)["bad"])

    def listed(self) -> list[str]:
        return [f"{row['name']}@{row['version']}" for row in bundles.list_bundles(self.store)]

    def events(self, kind: str) -> list[dict[str, Any]]:
        rows = self.store.rows("SELECT * FROM events WHERE kind = ? ORDER BY id", (kind,))
        return [{**row, "data": json.loads(row["data"])} for row in rows]

    def state(self) -> list[Any]:
        """All that a failed command must leave as it was."""
        tables = ("events", "bundles", "trust_metadata", "trust_counters")
        return [self.store.rows(f"SELECT * FROM {table}") for table in tables]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "gw"
    setup.init(path, name="acme", advertise=["gw.example"], region="eu", threshold=(1, 1))
    return path


@pytest.fixture
def gateway(made: Path, tmp_path: Path) -> Iterator[Gateway]:
    shutil.copytree(made, tmp_path / "gw", symlinks=True)
    with GatewayStore.open(DataDir.open(tmp_path / "gw", "gateway")) as store:
        yield Gateway(store)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "empty").mkdir(parents=True)
    for name in "abcdef":
        (root / name).write_bytes(os.urandom(3000) + name.encode() * 3000)
    (root / "link").symlink_to("a")
    return root


def test_mutable_files_are_marked_in_the_manifest(gateway: Gateway, tree: Path) -> None:
    with pytest.raises(UsageError, match=r"'\*\.db' matches no file of app@1"):
        gateway.publish(tree, "app@1", mutable=["a", "*.db"])
    assert gateway.listed() == []
    done = gateway.publish(tree, "app@1", mutable=["a", "[e-z]"])
    parsed = manifest.parse(bundles.load_manifest(gateway.store, done.id))
    assert [file.path for file in parsed.files if file.mutable] == ["a", "e", "f"]


def test_what_is_published_is_listed_shown_verified_and_told(gateway: Gateway, tree: Path) -> None:
    seen: list[tuple[int, int]] = []
    done = gateway.publish(
        tree,
        "app@1",
        kind="firmware",
        hardware=["pi5", "pi4", "pi5"],
        access="assigned",
        progress=lambda *args: seen.append(args),
    )
    assert done.payload_bytes == 36_000
    assert done.pieces == done.stored_pieces == 6
    assert done.wire_bytes == done.new_wire_bytes
    assert 18_000 < done.wire_bytes < 19_000
    assert not done.already_published
    assert seen[-1] == (36_000, 36_000)

    target = gateway.repo.trusted().bundle("firmware", "app", "1")
    assert target is not None
    assert target.digest == done.id
    assert target.hardware == ("pi4", "pi5")
    data = bundles.load_manifest(gateway.store, done.id)
    assert len(data) == target.length
    parsed = manifest.parse(data)
    assert (parsed.kind, parsed.name, parsed.version) == ("firmware", "app", "1")
    assert (parsed.access, parsed.hardware) == ("assigned", ["pi4", "pi5"])
    assert [d.path for d in parsed.directories] == ["empty"]
    assert [(s.path, s.target) for s in parsed.symlinks] == [("link", "a")]

    (row,) = bundles.list_bundles(gateway.store)
    assert row["id"] == done.id
    assert row["state"] == "published"
    assert row["wire_bytes"] == done.wire_bytes
    shown = bundles.show(gateway.store, "app", "1")
    assert shown["files"] == 6
    assert shown["access"] == "assigned"
    assert bundles.verify(gateway.store, "app", "1")["pieces"] == 6
    assert gateway.bad("app@1") == []
    (event,) = gateway.events("bundle.published")
    assert event["subject"] == "bundle:app@1"
    assert event["data"]["digest"] == done.id
    assert event["data"]["wire_bytes"] == done.wire_bytes


def test_the_same_again_changes_nothing(gateway: Gateway, tree: Path) -> None:
    first = gateway.publish(tree, "app@1", release_counter=2)
    gateway.publish(tree / "a", "app@2")
    before = gateway.state()
    again = gateway.publish(tree, "app@1")
    assert again.already_published
    assert (again.id, again.published_seq) == (first.id, first.published_seq)
    assert again.new_wire_bytes == first.new_wire_bytes
    assert gateway.state() == before


def test_a_version_never_changes_its_content(gateway: Gateway, tree: Path) -> None:
    gateway.publish(tree, "app@1")
    before = gateway.state()
    (tree / "a").chmod(0o755)
    with pytest.raises(ConflictError, match="app@1 is published already with other content"):
        gateway.publish(tree, "app@1")
    with pytest.raises(ConflictError, match="other content"):
        gateway.publish(tree, "app@1", dry_run=True)
    (tree / "a").chmod(0o644)
    with pytest.raises(ConflictError, match="other content"):
        gateway.publish(tree, "app@1", release_counter=7)
    assert gateway.state() == before


def test_a_name_belongs_to_one_kind(gateway: Gateway, tree: Path) -> None:
    gateway.publish(tree, "app@1", kind="model")
    for version in ("1", "2"):
        with pytest.raises(ConflictError, match="app is a bundle of kind model"):
            gateway.publish(tree, f"app@{version}", kind="files")


def test_a_new_version_shares_what_it_can(gateway: Gateway, tree: Path) -> None:
    first = gateway.publish(tree, "app@1")
    (tree / "c").write_bytes(os.urandom(1000))
    second = gateway.publish(tree, "app@2")
    assert second.stored_pieces == 1
    assert second.new_wire_bytes == 1000
    assert second.shared_bytes == second.wire_bytes - 1000
    # Another name shares storage, but its devices hold nothing of it yet.
    other = gateway.publish(tree, "other@1")
    assert other.stored_pieces == 0
    assert other.new_wire_bytes == other.wire_bytes == second.wire_bytes
    # Back to old content: a device that went through both versions needs nothing.
    (tree / "c").write_bytes(b"")
    third = gateway.publish(tree, "app@3")
    assert third.new_wire_bytes == 0
    assert first.returnable == []
    assert third.returnable == ["2", "1"]
    assert gateway.listed() == ["app@3", "other@1", "app@2", "app@1"]


def test_release_counters_only_rise(gateway: Gateway, tree: Path) -> None:
    gateway.publish(tree, "app@1")
    raised = gateway.publish(tree, "app@2", release_counter=3)
    assert raised.returnable == []
    kept = gateway.publish(tree, "app@3")
    assert kept.release_counter == 3
    assert kept.returnable == ["2"]
    with pytest.raises(ConflictError, match="release counter 2 is below 3 of app@3"):
        gateway.publish(tree, "app@4", release_counter=2)
    assert bundles.show(gateway.store, "app", "3")["returnable"] == ["2"]
    # Publishing an old version again is not going back.
    assert gateway.publish(tree, "app@1").already_published


@pytest.mark.parametrize(
    ("bundle", "more"),
    [
        ("App@1", {}),
        ("app@current", {}),
        ("app@1/2", {}),
        ("app@1", {"hardware": ["two words"]}),
        ("app@1", {"hardware": [f"h{n}" for n in range(65)]}),
        ("app@1", {"release_counter": -1}),
        ("app@1", {"release_counter": 2**31}),
    ],
)
def test_arguments_of_no_valid_form(
    gateway: Gateway, tree: Path, bundle: str, more: dict[str, Any]
) -> None:
    before = gateway.state()
    with pytest.raises(UsageError):
        gateway.publish(tree, bundle, **more)
    assert gateway.state() == before


def test_a_dry_run_leaves_nothing_behind(gateway: Gateway, tree: Path) -> None:
    before = gateway.state()
    dry = gateway.publish(tree, "app@1", dry_run=True)
    assert dry.published_seq is None
    assert gateway.state() == before
    assert not any(gateway.store.datadir.packs.iterdir())
    assert not any(gateway.store.datadir.blobs.iterdir())
    real = gateway.publish(tree, "app@1")
    assert real.wire_bytes == dry.wire_bytes
    assert real.id == dry.id
    assert gateway.publish(tree, "app@1", dry_run=True).published_seq == real.published_seq


def test_without_the_publishers_key_nothing_is_listed(gateway: Gateway, tree: Path) -> None:
    (gateway.store.datadir.online / "bundles.key").rename(gateway.store.datadir.path / "away")
    before = gateway.state()
    with pytest.raises(ConfigError):
        gateway.publish(tree, "app@1")
    assert gateway.state() == before


def test_a_tree_that_changes_while_it_is_published(
    gateway: Gateway, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = gateway.state()

    def progress(_done: int, _total: int) -> None:
        (tree / "new").touch()

    with pytest.raises(InputError, match="changed while it was read"):
        gateway.publish(tree, "app@1", progress=progress)
    with pytest.raises(NotFoundError):
        gateway.publish(tree / "missing", "app@1")
    assert gateway.state() == before


@pytest.mark.parametrize("where", ["pieces", "inodes", "manifest", "database"])
def test_a_full_disk_loses_nothing(
    gateway: Gateway, tree: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    gateway.publish(tree / "a", "app@0")
    before = gateway.state()

    def full(*_args: object, **_more: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if where == "pieces":
            patch.setattr(os, "pwritev", full)
        elif where == "inodes":
            patch.setattr(packs, "PACK_BYTES", 1)
            whole = os.open

            def no_inodes(path: Any, flags: int, *args: Any, **more: Any) -> int:
                if flags & os.O_CREAT:
                    full()
                return whole(path, flags, *args, **more)

            patch.setattr(os, "open", no_inodes)
        elif where == "manifest":
            patch.setattr(atomic.os, "pwrite", full)
        else:
            gateway.store.db.conn.execute("PRAGMA cache_size = 1")
            pages = gateway.store.db.conn.execute("PRAGMA page_count").fetchone()[0]
            gateway.store.db.conn.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(DiskFullError):
            gateway.publish(tree, "app@1")
    gateway.store.db.conn.execute("PRAGMA max_page_count = 1000000000")
    assert gateway.state() == before
    # What was stored in vain is gone again: the disk is needed for other things.
    assert gateway.store.rows("SELECT count(*) AS n FROM pieces")[0]["n"] == 1
    assert gateway.listed() == ["app@0"]
    assert gateway.bad("app@0") == []
    assert gateway.publish(tree, "app@1").pieces == 6
    assert gateway.bad("app@1") == []


def test_damaged_pieces_are_found_and_publishing_again_mends_them(
    gateway: Gateway, tree: Path
) -> None:
    gateway.publish(tree, "app@1")
    (path,) = gateway.store.datadir.packs.iterdir()
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    data[-10] ^= 1
    path.write_bytes(data)
    assert gateway.bad("app@1") == [0, 5]
    assert gateway.bad("app@1") == [0, 5]
    again = gateway.publish(tree, "app@1")
    assert again.already_published
    assert again.stored_pieces == 2
    assert gateway.bad("app@1") == []


@pytest.mark.parametrize("damage", ["flip", "lose"])
def test_a_damaged_manifest_is_found_and_publishing_again_mends_it(
    gateway: Gateway, tree: Path, damage: str
) -> None:
    done = gateway.publish(tree, "app@1")
    path = gateway.store.datadir.blobs / done.id
    if damage == "flip":
        path.write_bytes(path.read_bytes().replace(b"files", b"filez", 1))
    else:
        path.unlink()
    with pytest.raises(VerificationError, match="publish"):
        gateway.bad("app@1")
    # A new version is not held up by it.
    gateway.publish(tree / "a", "app@2")
    assert gateway.publish(tree, "app@1").already_published
    assert gateway.bad("app@1") == []


def test_removing_drops_what_no_other_bundle_has(gateway: Gateway, tree: Path) -> None:
    first = gateway.publish(tree, "app@1")
    (tree / "b").write_bytes(os.urandom(500))
    gateway.publish(tree, "other@1")
    with pytest.raises(NotFoundError):
        gateway.remove("app@9")
    result = gateway.remove("app@1")
    assert 3000 <= result["freed_bytes"] < 3200
    assert gateway.listed() == ["other@1"]
    assert gateway.bad("other@1") == []
    with pytest.raises(NotFoundError):
        bundles.load_manifest(gateway.store, first.id)
    with pytest.raises(NotFoundError, match="app@1 is not published"):
        bundles.show(gateway.store, "app", "1")
    assert [event["subject"] for event in gateway.events("bundle.removed")] == ["bundle:app@1"]
    gateway.remove("other@1")
    assert not any(gateway.store.datadir.packs.iterdir())
    assert not any(gateway.store.datadir.blobs.iterdir())
    # The version is free again, under a new sequence number.
    assert gateway.publish(tree, "app@1").published_seq == 3


def test_an_assigned_bundle_is_not_removed(gateway: Gateway, tree: Path) -> None:
    gateway.publish(tree, "app@1")
    gateway.publish(tree / "a", "app@2")
    with gateway.store.atomic() as db:
        db.conn.execute(
            "INSERT INTO devices (id, key, region, labels, hardware, state, joined)"
            " VALUES ('cam-1', 'k', 'eu', '{}', '', 'accepted', 0)"
        )
        db.conn.execute(
            "INSERT INTO assignments (device_id, kind, name, version, target_hash, target_length,"
            " assignment_id, action, created) VALUES ('cam-1', 'files', 'app', '1', '', 0, 'x', 'install', 0)"
        )
    with pytest.raises(ConflictError, match="app@1 is assigned to 1 device: edgesync unassign"):
        gateway.remove("app@1")
    assert bundles.show(gateway.store, "app", "1")["assigned"] == 1
    with gateway.store.atomic() as db:
        db.conn.execute(
            "INSERT INTO follow_rules (name, version, selector, action, created) VALUES ('app', NULL, '', 'install', 0)"
        )
    gateway.remove("app@2")
    with gateway.store.atomic() as db:
        db.conn.execute("DELETE FROM assignments")
    with pytest.raises(ConflictError, match="standing rule"):
        gateway.remove("app@1")


def test_pieces_removed_while_a_publish_counts_on_them(
    gateway: Gateway, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway.publish(tree, "old@1")
    save = catalogue.save_manifest

    def interrupted(store: GatewayStore, data: bytes) -> Any:
        if "old@1" in gateway.listed():
            gateway.remove("old@1")
        return save(store, data)

    monkeypatch.setattr(catalogue, "save_manifest", interrupted)
    assert gateway.publish(tree, "new@1").stored_pieces == 6
    assert gateway.bad("new@1") == []


@pytest.mark.parametrize("shared", [False, True])
def test_published_again_between_a_removal_and_the_end_of_its_manifest(
    gateway: Gateway, tree: Path, monkeypatch: pytest.MonkeyPatch, *, shared: bool
) -> None:
    gateway.publish(tree, "app@1")
    if shared:
        gateway.publish(tree, "other@1")
    reclaim = packs.PieceStore.reclaim

    with GatewayStore.open(gateway.store.datadir) as store:

        def interrupted(pieces: packs.PieceStore, extents: Any) -> None:
            monkeypatch.undo()
            reclaim(pieces, extents)
            Gateway(store).publish(tree, "app@1")

        monkeypatch.setattr(packs.PieceStore, "reclaim", interrupted)
        gateway.remove("app@1")
    assert "app@1" in gateway.listed()
    assert gateway.bad("app@1") == []


def test_a_manifest_removed_while_a_publish_counts_on_it(
    gateway: Gateway, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another bundle keeps the pieces, so that the manifest alone is missed."""
    gateway.publish(tree, "other@1")
    gateway.publish(tree, "app@1")
    save = catalogue.save_manifest

    with GatewayStore.open(gateway.store.datadir) as store:

        def then_removed(given: GatewayStore, data: bytes) -> Any:
            monkeypatch.undo()
            digest = save(given, data)
            Gateway(store).remove("app@1")
            return digest

        monkeypatch.setattr(catalogue, "save_manifest", then_removed)
        gateway.publish(tree, "app@1")
    assert "app@1" in gateway.listed()
    assert gateway.bad("app@1") == []


def test_two_publishes_of_one_version(gateway: Gateway, tree: Path, tmp_path: Path) -> None:
    """The second of two commands commits between the scan and the signature of the first."""
    save = catalogue.save_manifest
    with GatewayStore.open(gateway.store.datadir) as store, pytest.MonkeyPatch.context() as patch:
        other = Gateway(store)

        def first_comes_other(store: GatewayStore, data: bytes) -> Any:
            patch.undo()
            other.publish(tree, "app@1")
            return save(store, data)

        patch.setattr(catalogue, "save_manifest", first_comes_other)
        done = gateway.publish(tree, "app@1")
        assert done.published_seq == 1
        assert len(gateway.events("bundle.published")) == 1

        def then_differs(store: GatewayStore, data: bytes) -> Any:
            patch.undo()
            other.publish(tree / "a", "app@2")
            return save(store, data)

        patch.setattr(catalogue, "save_manifest", then_differs)
        with pytest.raises(ConflictError, match="other content"):
            gateway.publish(tree, "app@2")
    assert gateway.listed() == ["app@2", "app@1"]
    assert gateway.bad("app@2") == []


def test_too_many_pieces_are_made_larger(
    gateway: Gateway, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tree / "large").write_bytes(os.urandom(3 << 20))
    monkeypatch.setattr(limits, "MAX_PIECES", 20)
    done = gateway.publish(tree, "app@1")
    parsed = manifest.parse(bundles.load_manifest(gateway.store, done.id))
    assert parsed.chunking.avg > publisher.SMALLEST_AVERAGE
    assert gateway.bad("app@1") == []
    monkeypatch.setattr(limits, "MAX_PIECES", 3)
    with pytest.raises(InputError, match="split the bundle"):
        gateway.publish(tree, "more@1")


def test_a_published_tree_is_judged_after_the_mode_rule(gateway: Gateway, tree: Path) -> None:
    done = gateway.publish(tree, "app@1")
    (tree / "a").chmod(0o646)  # a device drops the world's write bit
    assert gateway.publish(tree, "app@1").id == done.id
    with Scan.of(tree) as scan:
        parsed = manifest.parse(bundles.load_manifest(gateway.store, done.id))
        assert [(f.path, f.mode) for f in scan.files] == [(f.path, f.mode) for f in parsed.files]


def test_the_repository_and_the_catalogue_agree_after_a_failed_transaction(
    gateway: Gateway, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = gateway.state()

    def failing(*_args: object, **_more: object) -> None:
        raise RuntimeError("killed here")

    with monkeypatch.context() as patch:
        patch.setattr(gateway.store, "emit", failing)
        with pytest.raises(RuntimeError):
            gateway.publish(tree, "app@1")
    assert gateway.state() == before
    assert gateway.listed() == []
    assert isinstance(gateway.repo, Repository)
    assert gateway.publish(tree, "app@1").stored_pieces == 0
