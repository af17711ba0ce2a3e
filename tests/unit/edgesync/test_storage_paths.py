"""The gate for remote names, and the system calls that make things durable."""

import errno
import os
from pathlib import Path

import pytest

from edgesync.errors import DiskFullError, FsyncFailedError, StorageError, UnsafePathError
from edgesync.storage import atomic
from edgesync.storage.paths import DIRECTORY_CACHE, Tree, components, remove_tree


def _open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text("secret")
    (tmp_path / "root").mkdir()
    return Tree.open(tmp_path / "root")


@pytest.mark.parametrize(
    "path",
    ["", "/etc/passwd", "..", "../outside/secret", "a/../../outside", ".", "a//b", "a/", "a\0b"],
)
def test_names_the_kernel_is_never_given(tree: Tree, path: str) -> None:
    with tree:
        tree.make_directory("a")
        for call in (
            tree.open_file,
            tree.stat,
            tree.make_directory,
            tree.unlink,
            lambda name: tree.make_symlink(name, "x"),
        ):
            with pytest.raises((UnsafePathError, ValueError)):
                call(path)
    with pytest.raises(UnsafePathError):
        components(path)


def test_no_symlink_leads_outside(tree: Tree, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "folder").symlink_to("../outside")
    (root / "file").symlink_to("../outside/secret")
    with tree:
        for path in ("folder/secret", "file"):
            with pytest.raises(OSError, match=r"Not a directory|Too many levels"):
                tree.open_file(path)
            with pytest.raises(OSError, match=r"Not a directory|Too many levels"):
                tree.open_file(path, os.O_RDWR | os.O_CREAT)
        with pytest.raises(OSError, match=r"Not a directory|Too many levels"):
            tree.make_directory("folder/new")
        with pytest.raises(FileExistsError):
            tree.make_directory("folder")
        assert {entry.path: entry.target for entry in tree.walk()} == {
            "folder": "../outside",
            "file": "../outside/secret",
        }
        (root / "copy").mkdir()
        tree.link_from(tree, "file", "copy/link")
        assert (root / "copy/link").is_symlink()
    with pytest.raises(OSError, match=r"Not a directory|Too many levels"):
        Tree.open(root / "folder")
    assert (tmp_path / "outside/secret").read_text() == "secret"


def test_a_fifo_or_folder_in_the_way_does_not_hang_or_open(tree: Tree, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "root/fifo")
    with tree:
        with pytest.raises(UnsafePathError, match="not a regular file"):
            tree.open_file("fifo")
        tree.make_directory("d")
        with pytest.raises((UnsafePathError, IsADirectoryError)):
            tree.open_file("d")


def test_deep_and_many_folders_keep_few_descriptors(tree: Tree) -> None:
    before = _open_files()
    with tree:
        path = ""
        for depth in range(200):
            path = f"{path}/{depth}".lstrip("/")
            tree.make_directory(path)
        for number in range(100):
            tree.make_directory(f"n{number}")
            os.close(tree.open_file(f"n{number}/f", os.O_RDWR | os.O_CREAT))
        os.close(tree.open_file(f"{path}/deep", os.O_RDWR | os.O_CREAT))
        assert _open_files() - before <= DIRECTORY_CACHE
        assert sum(1 for _ in tree.walk()) == 401
    assert _open_files() < before


def test_removing_a_tree_spares_what_its_links_point_at(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "gone/a/b").mkdir(parents=True)
    (tmp_path / "gone/a/b/c").write_text("c")
    (tmp_path / "gone/out").symlink_to(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "gone/a").chmod(0o700)
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        for name in ("gone", "link", "was never there"):
            remove_tree(fd, name)
        with pytest.raises(UnsafePathError):
            remove_tree(fd, "..")
    finally:
        os.close(fd)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_replace_file_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atomic.replace_file(tmp_path, "f", b"old", mode=0o640)
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o640
    real = os.fsync

    def fails(fd: int) -> None:
        del fd
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(FsyncFailedError):
        atomic.replace_file(tmp_path, "f", b"new")
    monkeypatch.setattr(os, "fsync", real)
    assert (tmp_path / "f").read_bytes() == b"old"

    def full(fd: int, data: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DiskFullError):
        atomic.replace_file(tmp_path, "f", b"new")
    monkeypatch.undo()
    atomic.replace_file(tmp_path, "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    with pytest.raises(StorageError):
        atomic.replace_file(tmp_path / "missing", "f", b"")


def test_exchange_swaps_or_says_it_cannot(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        if atomic.exchange(fd, "a", fd, "b"):
            assert (tmp_path / "a").read_text() == "b"
            with pytest.raises(FileNotFoundError):
                atomic.exchange(fd, "a", fd, "missing")
    finally:
        os.close(fd)


def test_preallocated_bytes_are_reserved(tmp_path: Path) -> None:
    with (tmp_path / "f").open("wb") as stream:
        atomic.preallocate(stream.fileno(), 100_000)
        assert os.fstat(stream.fileno()).st_size == 100_000
        with pytest.raises(OSError, match=r"File too large|No space left"):
            atomic.preallocate(stream.fileno(), 1 << 60)
