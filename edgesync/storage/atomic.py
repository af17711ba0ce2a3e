"""System calls that make bytes and names durable, with their errors named.

It writes nothing of its own accord and knows no layout. Invariants: no function returns before what it promises is on
the disk; a failed sync is an error, never a log line. Called by everything that stores (``device.bundle_store``,
``device.activation``, ``gateway.packs``, …), never on an event loop.
"""

import contextlib
import ctypes
import errno
import os
import secrets
from pathlib import Path

from edgesync.errors import DiskFullError, FsyncFailedError, StorageError

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.syncfs.argtypes = (ctypes.c_int,)
_RENAME_EXCHANGE = 2

FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})
_UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENOTTY, errno.EXDEV})


def storage_error(exc: OSError, doing: str) -> StorageError:
    """The project's own error for an OSError met while ``doing`` ("writing the bundle app@1")."""
    if exc.errno in FULL_ERRNOS:
        return DiskFullError(f"the disk is full: {doing} needs more space or inodes")
    return StorageError(f"{doing} failed: {exc.strerror or exc}")


def fsync_directory(directory: Path | int) -> None:
    """Make the names in a directory durable. Raises OSError."""
    if isinstance(directory, int):
        os.fsync(directory)
        return
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def syncfs(fd: int) -> None:
    """Make everything on the file system of ``fd`` durable.

    Raises OSError, also for a write-back that failed since ``fd`` was opened (Linux ≥ 5.8): keep one open.
    """
    if _libc.syncfs(fd):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def preallocate(fd: int, size: int) -> None:
    """Reserve ``size`` bytes of disk for a file and give it that size. Raises OSError (ENOSPC).

    Where the file system cannot reserve, only the size is set: callers compare free space first.
    """
    if size <= 0:
        return
    while _libc.fallocate(fd, 0, 0, size):
        code = ctypes.get_errno()
        if code == errno.EINTR:
            continue
        if code not in _UNSUPPORTED:
            raise OSError(code, os.strerror(code))
        os.ftruncate(fd, size)
        return


def write_all(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """``pwrite`` until everything is written. Raises OSError."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written


def exchange(dir_fd: int, name: str, other_fd: int, other: str) -> bool:
    """Swap two names atomically; False where kernel or file system cannot. Raises OSError for any other failure."""
    call = getattr(_libc, "renameat2", None)
    if call is None:
        return False
    if call(dir_fd, os.fsencode(name), other_fd, os.fsencode(other), _RENAME_EXCHANGE):
        code = ctypes.get_errno()
        if code in _UNSUPPORTED:
            return False
        raise OSError(code, os.strerror(code))
    return True


def replace_file(directory: Path | int, name: str, data: bytes, *, mode: int = 0o600) -> None:
    """Write a file so that a crash leaves the old one or the new one, and the new one once this has returned.

    Raises:
        DiskFullError: nothing was changed.
        FsyncFailedError: the disk did not confirm; what is there is the old file, or the new one unconfirmed.
        StorageError: any other failure.
    """
    fd = directory if isinstance(directory, int) else _open_directory(directory, name)
    temporary = f".{name}.{secrets.token_hex(4)}.new"
    try:
        out = os.open(
            temporary,
            os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC,
            mode,
            dir_fd=fd,
        )
        try:
            os.fchmod(out, mode)  # whatever the umask
            write_all(out, data, 0)
            _confirm(out, name)
        finally:
            os.close(out)
        os.rename(temporary, name, src_dir_fd=fd, dst_dir_fd=fd)
        _confirm(fd, name)
    except OSError as exc:
        raise storage_error(exc, f"writing {name}") from exc
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=fd)
        if not isinstance(directory, int):
            os.close(fd)


def _open_directory(directory: Path, name: str) -> int:
    try:
        return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as exc:
        raise storage_error(exc, f"writing {name}") from exc


def _confirm(fd: int, name: str) -> None:
    try:
        os.fsync(fd)
    except OSError as exc:
        if exc.errno in FULL_ERRNOS:
            raise
        raise FsyncFailedError(
            f"the disk did not confirm that {name} was written: {exc.strerror}"
        ) from exc
