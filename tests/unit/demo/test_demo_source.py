from pathlib import Path

from edgesync.demo import source


def make(root: Path) -> Path:
    (root / "a").mkdir(parents=True)
    (root / "a/x").write_bytes(b"1" * 100)
    (root / "a/run").write_bytes(b"#!/bin/sh\n")
    (root / "a/run").chmod(0o755)
    (root / "link").symlink_to("a/x")
    (root / "empty").mkdir()
    return root


def test_a_tree_equals_itself(tmp_path: Path) -> None:
    tree = make(tmp_path / "t")
    assert source.first_difference(source.describe(tree), tree) is None


def test_every_kind_of_difference_is_seen(tmp_path: Path) -> None:
    want = source.describe(make(tmp_path / "want"))
    changes = {
        "byte": lambda t: (t / "a/x").write_bytes(b"1" * 99 + b"2"),
        "mode": lambda t: (t / "a/run").chmod(0o644),
        "target": lambda t: ((t / "link").unlink(), (t / "link").symlink_to("a/run")),
        "missing folder": lambda t: (t / "empty").rmdir(),
        "extra file": lambda t: (t / "more").write_bytes(b""),
    }
    for name, change in changes.items():
        tree = make(tmp_path / name)
        change(tree)
        assert source.first_difference(want, tree) is not None, name
    assert source.first_difference(want, tmp_path / "nothing") is not None


def test_an_update_edits_one_per_cent(tmp_path: Path) -> None:
    tree = tmp_path / "v1"
    tree.mkdir()
    for number in range(300):
        (tree / f"{number}").write_bytes(b"%d" % number * 50)
    assert source.make_update(tree, tmp_path / "v2") == 3
    changed = [
        p.name for p in tree.iterdir() if p.read_bytes() != (tmp_path / "v2" / p.name).read_bytes()
    ]
    assert len(changed) == 3


def test_a_hard_link_counts_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100_000)
    before = source.disk_bytes(tmp_path)
    (tmp_path / "b").hardlink_to(tmp_path / "a")
    assert source.disk_bytes(tmp_path) == before


def test_the_default_input_is_within_its_bound_and_has_what_trees_have(tmp_path: Path) -> None:
    source.make_default(tmp_path / "d", max_bytes=1_000_000)
    entries = source.describe(tmp_path / "d")
    assert entries["hello"][0] == "symlink"
    assert entries["empty"][0] == "folder"
    assert entries["bin/hello"][1] == 0o755
    assert (
        sum((tmp_path / "d" / p).stat().st_size for p, e in entries.items() if e[0] == "file")
        < 1_100_000
    )
