import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from edgesync import limits
from edgesync.errors import InputError, NotFoundError
from gateway.scan import Scan


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "etc" / "empty").mkdir(parents=True)
    (root / "etc" / "app.conf").write_text("a = 1\n")
    (root / "bin").mkdir()
    (root / "bin" / "run").write_text("#!/bin/sh\n")
    (root / "bin" / "run").chmod(0o4777)
    (root / "etc" / "link").symlink_to("../bin/run")
    (root / "zero").touch()
    return root


def refused(path: Path) -> str:
    """The one sentence a refusal consists of."""
    with pytest.raises(InputError) as caught:
        Scan.of(path).close()
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    return text


def test_what_a_tree_consists_of(tree: Path) -> None:
    (tree / "etc").chmod(0o2057)
    with Scan.of(tree) as scan:
        assert [f.path for f in scan.files] == ["bin/run", "etc/app.conf", "zero"]
        assert [d.path for d in scan.directories] == ["bin", "etc", "etc/empty"]
        assert [(s.path, s.target) for s in scan.symlinks] == [("etc/link", "../bin/run")]
        assert scan.payload_bytes == 16
        # Equality is judged on these: no set-id, no world write, always usable by the owner.
        assert scan.files[0].mode == 0o775
        assert scan.directories[1].mode == 0o755
        assert not scan.left_out.count
        scan.recheck()


def test_order_is_that_of_the_bytes(tmp_path: Path) -> None:
    for name in ("a.b", "a0", "Z", "é", "a"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "x").mkdir()
    with Scan.of(tmp_path) as scan:
        assert [d.path for d in scan.directories] == ["Z", "a", "a.b", "a/x", "a0", "é"]


def test_a_single_file_is_a_bundle_of_its_name(tree: Path, tmp_path: Path) -> None:
    with Scan.of(tree / "bin" / "run") as scan:
        assert [f.path for f in scan.files] == ["run"]
        scan.recheck()
        os.close(scan.open(scan.files[0]))
    # An operator may name a symlink; what it points at is published under the link's name.
    (tmp_path / "latest").symlink_to(tree / "bin" / "run")
    with Scan.of(tmp_path / "latest") as scan:
        assert [f.path for f in scan.files] == ["latest"]
        os.close(scan.open(scan.files[0]))
        scan.recheck()
    (tmp_path / "tree-link").symlink_to(tree)
    with Scan.of(tmp_path / "tree-link") as scan:
        assert len(scan.files) == 3


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        Scan.of(tmp_path / "missing")
    (tmp_path / "dangling").symlink_to("missing")
    with pytest.raises(NotFoundError, match="does not exist"):
        Scan.of(tmp_path / "dangling")
    (tmp_path / "empty").mkdir()
    assert "nothing to publish" in refused(tmp_path / "empty")


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.path.relpath(path))


def _bytes_name(name: bytes) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with open(os.path.join(os.fsencode(path.parent), name), "w"):  # noqa: PTH118, PTH123
            pass

    return make


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "fifo": (_fifo, "is a named pipe: only files, folders and symlinks"),
    "socket": (_socket, "is a socket: only files, folders and symlinks"),
    "absolute symlink": (lambda p: p.symlink_to("/etc/passwd"), "absolute"),
    "escaping symlink": (lambda p: p.symlink_to("../../outside"), "points outside"),
    "symlink through a symlink": (
        lambda p: (p.symlink_to("."), (p.parent / "b").symlink_to("bad/../..")),
        "points outside|leads out",
    ),
    "circle": (lambda p: (p.symlink_to("b"), (p.parent / "b").symlink_to("bad")), "circle"),
    "not UTF-8": (_bytes_name(b"caf\xe9"), "not UTF-8: rename it"),
    "not NFC": (_bytes_name("e\u0301".encode()), "not in Unicode form NFC: rename it"),
    "control character": (_bytes_name(b"a\nb"), "control character: rename it"),
    "backslash": (_bytes_name(b"a\\b"), "backslash"),
    "case clash": (
        lambda p: (p.touch(), (p.parent / "BAD").touch()),
        r"'etc/BAD' and 'etc/bad' .* rename one",
    ),
    "clash of a folder and a file": (
        lambda p: (p.mkdir(), (p.parent / "Bad").touch()),
        "'etc/Bad' and 'etc/bad'",
    ),
    "sharp s": (
        lambda p: ((p.parent / "straße").touch(), (p.parent / "STRASSE").touch()),
        "are one name on a device that folds case",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_device_could_write_is_refused(
    tree: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree)
    make, words = REFUSED[name]
    make(tree / "etc" / "bad")
    with pytest.raises(InputError, match=words):
        Scan.of(tree)


@pytest.mark.root
def test_devices_are_refused(tree: Path) -> None:
    os.mknod(tree / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    assert "null is a character device" in refused(tree)


def test_a_device_given_as_path_is_refused() -> None:
    assert refused(Path("/dev/null")) == (
        "/dev/null is a character device: give a folder or a regular file"
    )


def test_too_many_entries(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_FILES", 7)
    Scan.of(tree).close()
    monkeypatch.setattr(limits, "MAX_FILES", 6)
    assert "more than 6 files and folders" in refused(tree)


def test_unreadable_files_and_folders(tree: Path) -> None:
    (tree / "zero").chmod(0)
    (tree / "etc").chmod(0)
    nobody = 65534
    with Scan.of(tree / "bin") as scan:
        (tree / "bin" / "run").chmod(0)
        _as_user(nobody, lambda: scan.open(scan.files[0]), r"cannot read .*run: Permission denied")
    _as_user(nobody, lambda: Scan.of(tree), "Permission denied")
    (tree / "etc").chmod(0o700)


def _as_user(uid: int, act: Callable[[], object], words: str) -> None:
    """Root reads everything, so it steps down; the folders above belong to it and are entered by descriptor."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(uid)
    try:
        with pytest.raises(InputError, match=words):
            act()
    finally:
        if root:
            os.seteuid(0)


def test_errors_of_the_disk_are_one_sentence(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_args: object, **_more: object) -> int:
        raise OSError(5, "Input/output error")

    with Scan.of(tree) as scan:
        file = scan.files[0]
        fd = scan.open(file)
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", failing)
            with pytest.raises(InputError, match=r"cannot read .*bin/run: Input/output error"):
                scan.read_into(file, fd, memoryview(bytearray(file.size)), 0)
        os.close(fd)
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", failing)
            with pytest.raises(InputError, match="Input/output error"):
                scan.open(file)


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "written": (lambda t: (t / "etc" / "app.conf").write_text("a = 2\n"), "etc/app.conf"),
    "removed": (lambda t: (t / "zero").unlink(), "tree"),
    "added": (lambda t: (t / "etc" / "new").touch(), "etc"),
    "folder for a file": (lambda t: ((t / "zero").unlink(), (t / "zero").mkdir()), "tree"),
    "link": (
        lambda t: ((t / "etc" / "link").unlink(), (t / "etc" / "link").symlink_to("app.conf")),
        "etc",
    ),
    "mode": (lambda t: (t / "zero").chmod(0o755), "zero"),
    "moved": (lambda t: (t / "etc").rename(t / "etc2"), "tree"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_after_the_walk_is_noticed(tree: Path, name: str) -> None:
    change, where = CHANGES[name]
    with Scan.of(tree) as scan:
        change(tree)
        with pytest.raises(InputError, match=rf"{where} changed while it was read"):
            scan.recheck()


def test_what_was_swapped_is_not_opened(tree: Path, tmp_path: Path) -> None:
    outside = tmp_path / "secret"
    outside.write_text("!")
    with Scan.of(tree) as scan:
        (tree / "zero").unlink()
        (tree / "zero").symlink_to(outside)
        with pytest.raises(InputError, match="changed while"):
            scan.open(scan.files[-1])
        (tree / "zero").unlink()
        os.mkfifo(tree / "zero")  # opening it must not wait for a writer
        with pytest.raises(InputError, match="changed while"):
            scan.open(scan.files[-1])
        (tree / "bin").rename(tree / "bin2")
        (tree / "bin").symlink_to(tmp_path)
        with pytest.raises(InputError, match="changed while"):
            scan.open(scan.files[0])


def test_ignore_rules_are_those_of_git(tree: Path) -> None:
    (tree / ".edgesyncignore").write_text(
        "# comment\n*.pyc\nbuild/\n!keep.pyc\n/zero\ndocs/**/draft\n\n"
    )
    for path in ("a.pyc", "keep.pyc", "etc/b.pyc", "etc/zero", "build2", "docs/a/b/draft"):
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).touch()
    (tree / "etc" / "build").mkdir()
    os.mkfifo(tree / "etc" / "build" / "fifo")  # below a left-out folder nothing is looked at
    with Scan.of(tree) as scan:
        assert [f.path for f in scan.files] == [
            "bin/run",
            "build2",
            "etc/app.conf",
            "etc/zero",
            "keep.pyc",
        ]
        assert sorted(scan.left_out.names) == [
            ".edgesyncignore",
            "a.pyc",
            "docs/a/b/draft",
            "etc/b.pyc",
            "etc/build/",
            "zero",
        ]
        assert scan.left_out.count == 6
        assert "docs/a/b" in [d.path for d in scan.directories]


def test_a_bad_name_may_be_left_out(tree: Path) -> None:
    _bytes_name(b"caf\xe9.tmp")(tree / "x")
    os.mkfifo(tree / "pipe")
    (tree / ".edgesyncignore").write_text("*.tmp\npipe\n")
    with Scan.of(tree) as scan:
        assert scan.left_out.count == 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"!\n", "Invalid git pattern"),
        (b"caf\xe9\n", "is not UTF-8"),
        (b"#" * (limits.MAX_IGNORE_FILE_BYTES + 1), "more than"),
    ],
)
def test_bad_ignore_files(tree: Path, content: bytes, words: str) -> None:
    (tree / ".edgesyncignore").write_bytes(content)
    assert words in refused(tree)


def test_an_ignore_file_that_is_no_file(tree: Path) -> None:
    (tree / ".edgesyncignore").mkdir()
    assert "not a regular file" in refused(tree)


def test_scans_leave_no_descriptors_open(tree: Path) -> None:
    def count() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = count()
    Scan.of(tree).close()
    os.mkfifo(tree / "pipe")
    refused(tree)
    assert count() == before
