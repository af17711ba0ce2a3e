"""The one gate through which a name from somebody else becomes a file on this disk.

A ``Tree`` is an open directory; every path is walked from it one component at a time with ``O_NOFOLLOW``, so neither a
hostile manifest nor an application that swaps a folder for a symlink can lead a read or a write outside. It does not
judge names beyond that: ``edgesync.manifest.check_path`` has done so before (the two are independent on purpose).

Invariants: no call follows a symlink below the root; no call passes a component that is empty, ``.``, ``..`` or holds a
slash or NUL to the kernel; at most ``DIRECTORY_CACHE`` folder descriptors stay open. Not thread-safe: the owner locks.
"""

import contextlib
import os
import stat
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from edgesync.errors import UnsafePathError

DIRECTORY_CACHE = 24
"""Open folder descriptors a tree keeps: neighbours in path order share their parents."""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO in the way must not hang the caller


class Entry(NamedTuple):
    """One name met on a walk."""

    path: str
    info: os.stat_result
    target: str | None
    """What a symlink says, None for anything else."""


def components(path: str) -> list[str]:
    """Split a relative path. Raises UnsafePathError: a component the kernel must not be given."""
    parts = path.split("/")
    for part in parts:
        if part in {"", ".", ".."} or "\0" in part:
            raise UnsafePathError(f"{path!a} is not a plain relative path")
    return parts


class Tree:
    """A directory and what lies below it. Every method raises OSError as the system call did."""

    def __init__(self, fd: int) -> None:
        """Takes ownership of ``fd``."""
        self.fd = fd
        self._directories: OrderedDict[str, int] = OrderedDict()

    @classmethod
    def open(cls, path: Path | str, *, dir_fd: int | None = None) -> Self:
        """Open a directory; its last component may not be a symlink."""
        return cls(os.open(path, _DIRECTORY, dir_fd=dir_fd))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self.forget()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def forget(self) -> None:
        """Close cached folders (before they are removed, or when nothing is going on)."""
        while self._directories:
            os.close(self._directories.popitem()[1])

    def directory(self, path: str) -> int:
        """Descriptor of a folder ('' is the root); it stays the tree's and valid until the next call."""
        if not path:
            return self.fd
        cached = self._directories.get(path)
        if cached is not None:
            self._directories.move_to_end(path)
            return cached
        parts = components(path)
        fd, depth = self.fd, 0
        for known in range(len(parts) - 1, 0, -1):
            near = self._directories.get("/".join(parts[:known]))
            if near is not None:
                fd, depth = near, known
                break
        for position in range(depth, len(parts)):
            fd = os.open(parts[position], _DIRECTORY, dir_fd=fd)
            self._directories["/".join(parts[: position + 1])] = fd
            while len(self._directories) > DIRECTORY_CACHE:
                os.close(self._directories.popitem(last=False)[1])
        return fd

    def parent(self, path: str) -> tuple[int, str]:
        """Descriptor of the folder ``path`` lies in, and its last component."""
        head, _, name = path.rpartition("/")
        components(name)
        return self.directory(head), name

    def open_file(self, path: str, flags: int = os.O_RDONLY, mode: int = 0o600) -> int:
        """Open a regular file; raises UnsafePathError where something else has its name."""
        fd, name = self.parent(path)
        out = os.open(name, flags | _FILE, mode, dir_fd=fd)
        if not stat.S_ISREG(os.fstat(out).st_mode):
            os.close(out)
            raise UnsafePathError(f"{path!a} is not a regular file")
        return out

    def stat(self, path: str) -> os.stat_result:
        fd, name = self.parent(path)
        return os.stat(name, dir_fd=fd, follow_symlinks=False)

    def make_directory(self, path: str, mode: int = 0o700) -> bool:
        """False where a folder of that name is there already."""
        fd, name = self.parent(path)
        try:
            os.mkdir(name, mode, dir_fd=fd)
        except FileExistsError:
            if not stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
                raise
            return False
        return True

    def make_symlink(self, path: str, target: str) -> None:
        fd, name = self.parent(path)
        os.symlink(target, name, dir_fd=fd)

    def link_from(self, source: "Tree", source_path: str, path: str) -> None:
        """Give a file of another tree a second name here; a symlink is linked itself, never followed."""
        there, name = source.parent(source_path)
        here, own = self.parent(path)
        os.link(name, own, src_dir_fd=there, dst_dir_fd=here, follow_symlinks=False)

    def unlink(self, path: str) -> None:
        fd, name = self.parent(path)
        os.unlink(name, dir_fd=fd)

    def sync_directory(self, path: str) -> None:
        os.fsync(self.directory(path))

    def walk(self) -> Iterator[Entry]:
        """Every entry below the root, folders before what they hold, in no further order."""
        yield from _walk(self.fd, "")


def _walk(fd: int, prefix: str) -> Iterator[Entry]:
    # Depth is bounded by MAX_PATH_BYTES; a stack of (descriptor, prefix) would hold as many descriptors, so each folder
    # is listed and closed before its children are opened by their path from the root.
    pending = [prefix]
    while pending:
        here = pending.pop()
        folder = _descend(fd, here)
        try:
            with os.scandir(folder) as listing:
                for item in list(listing):  # the caller may unlink what it is given
                    path = f"{here}/{item.name}" if here else item.name
                    info = item.stat(follow_symlinks=False)
                    if stat.S_ISDIR(info.st_mode):
                        pending.append(path)
                    target = None
                    if stat.S_ISLNK(info.st_mode):
                        target = os.readlink(item.name, dir_fd=folder)
                    yield Entry(path, info, target)
        finally:
            os.close(folder)


def _descend(fd: int, path: str) -> int:
    here = os.open(".", _DIRECTORY, dir_fd=fd)
    for part in path.split("/") if path else ():
        try:
            below = os.open(part, _DIRECTORY, dir_fd=here)
        finally:
            os.close(here)
        here = below
    return here


def remove_tree(dir_fd: int, name: str) -> None:
    """Remove a folder and all below it without following a symlink; what is not there is fine."""
    components(name)
    try:
        top = os.open(name, _DIRECTORY, dir_fd=dir_fd)
    except FileNotFoundError:
        return
    except NotADirectoryError:
        os.unlink(name, dir_fd=dir_fd)
        return
    except OSError:  # ELOOP: a symlink
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=dir_fd)
        return
    try:
        folders: list[str] = []
        with Tree(os.dup(top)) as tree:
            os.fchmod(top, 0o700)
            for entry in tree.walk():
                if stat.S_ISDIR(entry.info.st_mode):
                    folders.append(entry.path)
                else:
                    tree.unlink(entry.path)
            for path in reversed(folders):
                parent, last = tree.parent(path)
                os.rmdir(last, dir_fd=parent)
    finally:
        os.close(top)
    os.rmdir(name, dir_fd=dir_fd)
