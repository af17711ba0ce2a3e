"""What lies at PATH, and whether a bundle can be made of it, before a byte is read.

It walks a folder (or takes a single file), leaves out what ``.edgesyncignore`` names, refuses what no device could
write and remembers what it saw, so that anything changed since is noticed; it does not read file contents.

Invariants: every path handed out passed ``manifest.check_path``, no two clash after case folding, every symlink
resolves inside the tree; modes are what a device will give them (``file_mode``, ``directory_mode``); the walk never
follows a symlink below PATH, opens no device and does not block on a FIFO; at most MAX_FILES entries are remembered.

Called by ``gateway.service.bundles``; every refusal is one sentence that names the path.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple, Self

from edgesync import limits, manifest
from edgesync.errors import InputError, NotFoundError, UnsafePathError, VerificationError

IGNORE_FILE: Final = ".edgesyncignore"
"""At the top of the folder; gitignore rules. It is not part of the bundle."""
MAX_LEFT_OUT_NAMES: Final = 10_000
"""Names of left-out paths that are kept for the report; the rest is counted."""

_OPEN: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_OPEN_DIRECTORY: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY


class _Identity(NamedTuple):
    """Two of these are equal only if nobody wrote to the file in between, as far as the file system tells."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, info: os.stat_result) -> Self:
        return cls(info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)


class ScannedFile(NamedTuple):
    path: str
    mode: int
    size: int
    identity: _Identity


class ScannedDirectory(NamedTuple):
    path: str
    mode: int
    identity: _Identity


class ScannedSymlink(NamedTuple):
    path: str
    target: str
    identity: _Identity


@dataclass
class LeftOut:
    """What ``.edgesyncignore`` kept out of the bundle; a folder stands for all below it and ends in ``/``."""

    count: int = 0
    names: list[str] = field(default_factory=list)

    def add(self, path: str) -> None:
        self.count += 1
        if len(self.names) < MAX_LEFT_OUT_NAMES:
            self.names.append(path)


class Scan:
    """A tree as it was when it was walked. Keeps one descriptor open; ``open`` may be called from any thread."""

    def __init__(self, root: Path, fd: int) -> None:
        self.root = root
        self.files: list[ScannedFile] = []
        self.directories: list[ScannedDirectory] = []
        self.symlinks: list[ScannedSymlink] = []
        self.left_out = LeftOut()
        self._fd = fd
        self._taken = 0
        self._top: _Identity | None = None
        """Of the folder itself; None where PATH is a single file."""

    @classmethod
    def of(cls, path: Path) -> Self:
        """Walk ``path``.

        Raises NotFoundError: nothing is there. Raises InputError: a bundle cannot be made of what is.
        """
        single = False
        with _reading(path, ""):
            info = path.stat()
            if stat.S_ISREG(info.st_mode):
                single = True
                fd = os.open(path.parent, _OPEN_DIRECTORY)
            elif stat.S_ISDIR(info.st_mode):
                fd = os.open(path, _OPEN_DIRECTORY)
            else:
                raise InputError(
                    f"{path} is {_kind(info.st_mode)}: give a folder or a regular file"
                )
        self = cls(path, fd)
        try:
            if single:
                self._take_file(_checked(path, path.name), info)
            else:
                self._top = _Identity.of(os.fstat(fd))
                self._walk()
                self._check_clashes()
                self._check_links()
        except BaseException:
            self.close()
            raise
        if not self.entry_count:
            self.close()
            raise InputError(f"{path} holds nothing to publish")
        for table in (self.files, self.directories, self.symlinks):
            table.sort(key=lambda entry: entry.path.encode())
        return self

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    @property
    def entry_count(self) -> int:
        return len(self.files) + len(self.directories) + len(self.symlinks)

    @property
    def payload_bytes(self) -> int:
        return sum(file.size for file in self.files)

    def open(self, file: ScannedFile) -> int:
        """A descriptor to read ``file`` from. Raises InputError: unreadable, or not the file that was scanned."""
        # A single file's PATH may itself be a symlink, which the operator named.
        flags = _OPEN if self._top is not None else _OPEN & ~os.O_NOFOLLOW
        try:
            fd = os.open(file.path, flags, dir_fd=self._fd)
        except OSError as exc:
            raise _error(self.root, file.path, exc) from exc
        try:
            self.check_unchanged(file, fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def read_into(self, file: ScannedFile, fd: int, view: memoryview, offset: int) -> None:
        """Fill ``view`` from the open file. Raises InputError: it cannot be read, or has become shorter."""
        while view:
            try:
                count = os.preadv(fd, [view], offset)
            except OSError as exc:
                raise _error(self.root, file.path, exc) from exc
            if not count:
                raise self.changed(file.path)
            view = view[count:]
            offset += count

    def check_unchanged(self, file: ScannedFile, fd: int) -> None:
        """Raise InputError if the open file is not as it was scanned: call it again after the last read."""
        try:
            now = _Identity.of(os.fstat(fd))
        except OSError as exc:
            raise _error(self.root, file.path, exc) from exc
        if now != file.identity:
            raise self.changed(file.path)

    def recheck(self) -> None:
        """Raise InputError if anything was changed, added or removed since the walk."""
        top = self._top
        if top is not None and _moved(_Identity.of(os.fstat(self._fd)), top):
            raise self.changed("")
        for directory in self.directories:
            if _moved(self._stat(directory.path), directory.identity):
                raise self.changed(directory.path)
        for table in (self.files, self.symlinks):
            for entry in table:
                if self._stat(entry.path) != entry.identity:
                    raise self.changed(entry.path)

    def changed(self, path: str) -> InputError:
        return InputError(
            f"{_where(self.root, path)} changed while it was read: publish a tree at rest"
        )

    def _stat(self, path: str) -> _Identity:
        try:
            return _Identity.of(os.stat(path, dir_fd=self._fd, follow_symlinks=self._top is None))
        except OSError as exc:
            raise self.changed(path) from exc

    # --- the walk --------------------------------------------------------------------------------------------------
    def _walk(self) -> None:
        ignored = _Ignore.load(self.root, self._fd)
        todo = [""]
        while todo:
            here = todo.pop()
            prefix = f"{here}/" if here else ""
            with _reading(self.root, here):
                fd = os.open(here or ".", _OPEN_DIRECTORY | os.O_NOFOLLOW, dir_fd=self._fd)
                try:
                    with os.scandir(fd) as listing:
                        names = [
                            (entry.name, entry.stat(follow_symlinks=False)) for entry in listing
                        ]
                finally:
                    os.close(fd)
            for name, info in names:
                path = prefix + name
                if ignored.matches(path, is_directory=stat.S_ISDIR(info.st_mode)):
                    self.left_out.add(path + "/" * stat.S_ISDIR(info.st_mode))
                    continue
                self._take(path, info, todo)

    def _take(self, path: str, info: os.stat_result, todo: list[str]) -> None:
        self._taken += 1
        if self._taken > limits.MAX_FILES:
            raise InputError(
                f"{self.root} holds more than {limits.MAX_FILES} files and folders: "
                "split the bundle or pack it into an image"
            )
        _checked(self.root, path)
        if stat.S_ISREG(info.st_mode):
            self._take_file(path, info)
        elif stat.S_ISDIR(info.st_mode):
            mode = manifest.directory_mode(stat.S_IMODE(info.st_mode))
            self.directories.append(ScannedDirectory(path, mode, _Identity.of(info)))
            todo.append(path)
        elif stat.S_ISLNK(info.st_mode):
            with _reading(self.root, path):
                target = os.readlink(path, dir_fd=self._fd)
            self.symlinks.append(ScannedSymlink(path, target, _Identity.of(info)))
        else:
            raise InputError(
                f"{_where(self.root, path)} is {_kind(info.st_mode)}: "
                f"only files, folders and symlinks can be published (name it in {IGNORE_FILE})"
            )

    def _take_file(self, path: str, info: os.stat_result) -> None:
        mode = manifest.file_mode(stat.S_IMODE(info.st_mode))
        self.files.append(ScannedFile(path, mode, info.st_size, _Identity.of(info)))

    def _check_clashes(self) -> None:
        folded: dict[str, str] = {}
        for table in (self.directories, self.files, self.symlinks):
            for entry in table:
                other = folded.setdefault(manifest.fold(entry.path), entry.path)
                if other != entry.path:
                    one, two = sorted((other, entry.path))
                    raise InputError(
                        f"{one!a} and {two!a} in {self.root} are one name on a device that folds case: rename one"
                    )

    def _check_links(self) -> None:
        links = {link.path: link.target for link in self.symlinks}
        for path, target in links.items():
            try:
                manifest.check_symlink(path, target)
            except UnsafePathError as exc:
                raise InputError(
                    f"{self.root}: {exc}: make it relative and inside, or leave it out"
                ) from exc
        try:
            escaping = manifest.escaping_symlink(links)
        except VerificationError as exc:
            raise InputError(f"{self.root}: {exc}") from exc
        if escaping is not None:
            raise InputError(
                f"{self.root}: symlink {escaping!a} leads out of the tree through another link, or in a circle"
            )


class _Ignore:
    """The rules of one ``.edgesyncignore``; without one nothing matches."""

    def __init__(self, text: str | None, where: Path) -> None:
        self._spec = None
        if text is not None:
            from pathspec import GitIgnoreSpec

            try:
                self._spec = GitIgnoreSpec.from_lines(text.splitlines())
            except ValueError as exc:
                raise InputError(f"{where / IGNORE_FILE}: {exc}") from exc

    @classmethod
    def load(cls, root: Path, fd: int) -> Self:
        try:
            file = os.open(IGNORE_FILE, _OPEN, dir_fd=fd)
        except FileNotFoundError:
            return cls(None, root)
        except OSError as exc:
            raise InputError(f"cannot read {root / IGNORE_FILE}: {exc.strerror or exc}") from exc
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise InputError(f"{root / IGNORE_FILE} is not a regular file")
            data = b""
            while part := os.read(file, limits.MAX_IGNORE_FILE_BYTES + 1 - len(data)):
                data += part
        except OSError as exc:
            raise InputError(f"cannot read {root / IGNORE_FILE}: {exc.strerror or exc}") from exc
        finally:
            os.close(file)
        if len(data) > limits.MAX_IGNORE_FILE_BYTES:
            raise InputError(
                f"{root / IGNORE_FILE} has more than {limits.MAX_IGNORE_FILE_BYTES} bytes"
            )
        try:
            return cls(data.decode(), root)
        except UnicodeDecodeError as exc:
            raise InputError(f"{root / IGNORE_FILE} is not UTF-8") from exc

    def matches(self, path: str, *, is_directory: bool) -> bool:
        if self._spec is None:
            return False
        return path == IGNORE_FILE or self._spec.match_file(path + "/" * is_directory)


def _checked(root: Path, path: str) -> str:
    try:
        return manifest.check_path(path)
    except UnsafePathError as exc:
        raise InputError(f"{root}: {exc}: rename it, or leave it out with {IGNORE_FILE}") from exc


def _moved(now: _Identity, then: _Identity) -> bool:
    """Whether names were added to or removed from a folder; its size and ctime may move for other reasons."""
    return (now.device, now.inode, now.mtime_ns) != (then.device, then.inode, then.mtime_ns)


def _where(root: Path, path: str) -> str:
    return ascii(str(root / path))[1:-1] if path else str(root)


def _kind(mode: int) -> str:
    for test, words in (
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISBLK, "a block device"),
        (stat.S_ISCHR, "a character device"),
    ):
        if test(mode):
            return words
    return "of a kind no device can be sent"


@contextmanager
def _reading(root: Path, path: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise _error(root, path, exc) from exc


def _error(root: Path, path: str, exc: OSError) -> InputError | NotFoundError:
    where = _where(root, path)
    if not path and exc.errno in {errno.ENOENT, errno.ENOTDIR}:
        return NotFoundError(f"{where} does not exist")
    if path and exc.errno in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO}:
        return InputError(f"{where} changed while it was read: publish a tree at rest")
    return InputError(f"cannot read {where}: {exc.strerror or exc}")


__all__ = [
    "IGNORE_FILE",
    "LeftOut",
    "Scan",
    "ScannedDirectory",
    "ScannedFile",
    "ScannedSymlink",
]
