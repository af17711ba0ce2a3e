"""A file system in memory, served over /dev/fuse one request at a time, that logs every operation in one order."""

import contextlib
import ctypes
import errno
import fnmatch
import os
import stat
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from tests.crash.powercut.disk import ROOT, resize
from tests.crash.powercut.log import LogWriter

ACKS = 2
ACKS_NAME = b".powercut-acks"
"""Answers a look-up in the root; never listed, never part of a crash state."""

_FOREVER = 1 << 30
_MAX_WRITE = 1 << 20
_FORGET, _INTERRUPT, _BATCH_FORGET = 2, 36, 42
_DO_NOT_REPLY = (_FORGET, _INTERRUPT, _BATCH_FORGET)
_SYMLINK, _MKNOD, _MKDIR, _CREATE, _RENAME2, _TMPFILE = 6, 8, 9, 35, 45, 51
_EXCHANGE = 2
_HEADER = struct.Struct("<IIQQIII")

libc = ctypes.CDLL(None, use_errno=True)


class Caller(NamedTuple):
    uid: int
    gid: int
    thread: int
    opcode: int


class Fault:
    """``KIND:N[+]:ERRNO[:GLOB]``: fail the N-th call of a kind (to names that match)."""

    def __init__(self, rule: str) -> None:
        kind, number, code, *pattern = rule.split(":", 3)
        self.rule, self.kind = rule, kind
        self.first, self.on = int(number.rstrip("+")), number.endswith("+")
        self.errno: int = getattr(errno, code)
        self.pattern = pattern[0] if pattern else "*"
        self.calls = 0

    def strikes(self, kind: str, name: bytes) -> bool:
        if kind != self.kind or not fnmatch.fnmatch(os.fsdecode(name), self.pattern):
            return False
        self.calls += 1
        return self.calls == self.first or (self.on and self.calls > self.first)


class Inode:
    def __init__(
        self, ino: int, mode: int, uid: int, gid: int, rdev: int = 0, target: bytes | None = None
    ) -> None:
        self.ino, self.mode, self.uid, self.gid, self.rdev = ino, mode, uid, gid, rdev
        self.atime = self.mtime = self.ctime = time.time_ns()
        self.nlink, self.lookups, self.parent, self.name = 0, 0, ROOT, b""
        self.children: dict[bytes, int] = {}
        self.data = bytearray()
        self.target = target or b""

    @property
    def size(self) -> int:
        if stat.S_ISDIR(self.mode):
            return len(self.children)
        return len(self.target) if stat.S_ISLNK(self.mode) else len(self.data)

    def attributes(self) -> bytes:
        seconds, nanos = zip(
            *(divmod(moment, 10**9) for moment in (self.atime, self.mtime, self.ctime)), strict=True
        )
        links = 2 if stat.S_ISDIR(self.mode) else self.nlink
        return struct.pack(
            "<6Q10I",
            self.ino, self.size, (self.size + 511) // 512, *seconds, *nanos, self.mode, links,
            self.uid, self.gid, self.rdev, 4096, 0,
        )  # fmt: skip


def _refuse(code: int) -> NoReturn:
    raise OSError(code, os.strerror(code))


class RecordingFileSystem:
    """The FUSE server. ``serve`` answers until the file system is unmounted."""

    def __init__(self, directory: Path, log: LogWriter, faults: list[Fault]) -> None:
        self.lock = threading.Lock()
        self.log, self.faults = log, faults
        self.directory = directory.resolve()
        self.own_thread: int | None = None
        self.struck: list[str] = []
        self._device = -1
        self._next = 3
        self._inodes: dict[int, Inode] = {}
        self._listings: dict[int, list[tuple[bytes, int]]] = {}
        info = self.directory.stat()
        log.record("directory", str(self.directory), info.st_mode, info.st_uid, info.st_gid)
        self._inodes[ROOT] = Inode(ROOT, info.st_mode, info.st_uid, info.st_gid)
        self._inodes[ACKS] = Inode(ACKS, stat.S_IFREG | 0o666, 0, 0)
        self._import(ROOT, self.directory, {})
        log.record("syncfs", True)  # what was there at the start is on disk
        log.record("start")
        log.counts.clear()
        self._handlers: dict[int, Callable[[int, memoryview, Caller], bytes]] = {
            1: self._lookup, _FORGET: self._forget, 3: self._getattr, 4: self._setattr, 5: self._readlink,
            _SYMLINK: self._make, _MKNOD: self._make, _MKDIR: self._make, 10: self._unlink, 11: self._unlink,
            12: self._rename, 13: self._link, 15: self._read, 16: self._write, 17: self._statfs, 18: self._nothing,
            20: self._fsync, 26: self._init, 27: self._opendir, 28: self._readdir, 29: self._releasedir,
            30: self._fsyncdir, _CREATE: self._make, _INTERRUPT: self._nothing, _BATCH_FORGET: self._nothing,
            43: self._fallocate, _RENAME2: self._rename, _TMPFILE: self._make,
        }  # fmt: skip

    def _import(self, parent: int, path: Path, seen: dict[tuple[int, int], Inode]) -> None:
        for entry in os.scandir(path):
            info, name = entry.stat(follow_symlinks=False), os.fsencode(entry.name)
            key, kind = (info.st_dev, info.st_ino), stat.S_IFMT(info.st_mode)
            if key in seen:
                self._add_name(parent, name, seen[key], "link")
                continue
            target = os.fsencode(Path(entry.path).readlink()) if kind == stat.S_IFLNK else None
            node = self._new(
                parent, name, info.st_mode, info.st_uid, info.st_gid, info.st_rdev, target
            )
            seen[key] = node
            if kind == stat.S_IFDIR:
                self._import(node.ino, Path(entry.path), seen)
            elif kind == stat.S_IFREG:
                node.data = bytearray(Path(entry.path).read_bytes())
                self.log.record("write", node.ino, 0, bytes(node.data))
            node.mtime = info.st_mtime_ns
            self.log.record("attr", node.ino, node.mode, node.uid, node.gid, node.mtime)

    # --- the mount ---------------------------------------------------------------------------------------------------

    def mount(self) -> None:
        """Raises OSError: not root, or no FUSE."""
        self._device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = (
            f"fd={self._device},rootmode={self._inodes[ROOT].mode:o},user_id=0,group_id=0,"
            "allow_other,default_permissions"
        )
        if libc.mount(b"powercut", os.fsencode(self.directory), b"fuse", 6, options.encode()):
            _refuse(ctypes.get_errno())

    def serve(self) -> None:
        buffer = bytearray(_MAX_WRITE + 8192)
        view = memoryview(buffer)
        while True:
            try:
                length = os.readv(self._device, [buffer])
            except OSError as exc:
                if exc.errno == errno.ENODEV:  # unmounted
                    return
                continue
            _, opcode, unique, ino, uid, gid, thread = _HEADER.unpack_from(buffer)
            # ENOSYS to open, flush, access, getxattr, lseek: the kernel stops asking.
            code, reply, handler = errno.ENOSYS, b"", self._handlers.get(opcode)
            if handler is not None:
                try:
                    with self.lock:
                        reply = handler(ino, view[40:length], Caller(uid, gid, thread, opcode))
                    code = 0
                except OSError as exc:
                    code = exc.errno or errno.EIO
            if opcode not in _DO_NOT_REPLY:
                with contextlib.suppress(OSError):  # the caller was killed meanwhile
                    os.writev(
                        self._device, [struct.pack("<IiQ", 16 + len(reply), -code, unique), reply]
                    )

    def fault(self, kind: str, name: bytes = b"") -> None:
        """Raises OSError where a rule says so."""
        for rule in self.faults:
            if rule.strikes(kind, name):
                self.struck.append(f"{rule.rule} struck {os.fsdecode(name)}")
                _refuse(rule.errno)

    def sync_point(self, kind: str, name: bytes, *fields: Any) -> bytes:
        try:
            self.fault(kind, name)
        except OSError:
            self.log.record(kind, *fields, False)
            raise
        self.log.record(kind, *fields, True)
        return b""

    # --- names -------------------------------------------------------------------------------------------------------

    def _new(
        self,
        parent: int,
        name: bytes,
        mode: int,
        uid: int,
        gid: int,
        rdev: int,
        target: bytes | None,
    ) -> Inode:
        node = Inode(self._next, mode, uid, gid, rdev, target)
        self._inodes[node.ino] = node
        self._next += 1
        self._add_name(parent, name, node, "create", mode, uid, gid, rdev, target)
        return node

    def _add_name(self, parent: int, name: bytes, node: Inode, kind: str, *fields: Any) -> None:
        self.log.record(kind, parent, name, node.ino, *fields)
        if parent:  # 0: an O_TMPFILE, no name yet
            self._inodes[parent].children[name] = node.ino
            self._touch(self._inodes[parent])
            node.nlink, node.parent, node.name = node.nlink + 1, parent, name
            node.ctime = time.time_ns()

    def _remove_name(self, parent: int, name: bytes) -> None:
        node = self._inodes[self._inodes[parent].children.pop(name)]
        node.nlink, node.ctime = node.nlink - 1, time.time_ns()
        self._touch(self._inodes[parent])

    def _touch(self, node: Inode) -> None:
        node.mtime = node.ctime = time.time_ns()

    def _entry(self, node: Inode) -> bytes:
        node.lookups += 1
        return struct.pack("<QQQQII", node.ino, 0, _FOREVER, _FOREVER, 0, 0) + node.attributes()

    def _find(self, parent: int, name: bytes) -> Inode:
        ino = self._inodes[parent].children.get(name)
        return self._inodes[ino] if ino else _refuse(errno.ENOENT)

    # --- requests: (inode number, body, caller) to the reply's bytes -------------------------------------------------

    def _init(self, _ino: int, body: memoryview, _caller: Caller) -> bytes:
        # Asynchronous reads, big writes, no open calls, parallel look-ups, writes of up to 1 MiB.
        flags = struct.unpack_from("<IIII", body)[3] & (
            1 << 0 | 1 << 5 | 1 << 17 | 1 << 18 | 1 << 22
        )
        return struct.pack(
            "<IIIIHHIIHH", 7, 31, 1 << 20, flags, 65535, 65535, _MAX_WRITE, 1, 256, 0
        ) + bytes(32)

    def _nothing(self, _ino: int, _body: memoryview, _caller: Caller) -> bytes:
        return b""

    def _lookup(self, ino: int, body: memoryview, _caller: Caller) -> bytes:
        name = bytes(body[:-1])
        if ino == ROOT and name == ACKS_NAME:
            return self._entry(self._inodes[ACKS])
        if (
            name not in self._inodes[ino].children
        ):  # inode 0 lets the kernel remember that there is none
            return struct.pack("<QQQ", 0, 0, _FOREVER) + bytes(104)
        return self._entry(self._find(ino, name))

    def _forget(self, ino: int, body: memoryview, _caller: Caller) -> bytes:
        node = self._inodes.get(ino)
        if node is not None:
            node.lookups -= struct.unpack_from("<Q", body)[0]
            if node.nlink <= 0 and node.lookups <= 0 and ino > ACKS:
                del self._inodes[ino]
        return b""

    def _getattr(self, ino: int, _body: memoryview, _caller: Caller) -> bytes:
        return struct.pack("<QQ", _FOREVER, 0) + self._inodes[ino].attributes()

    def _setattr(self, ino: int, body: memoryview, caller: Caller) -> bytes:
        valid, size, seconds, nanos, mode, uid, gid = struct.unpack_from(
            "<I12xQ16xQ12xI4xI4xII", body
        )
        node = self._inodes[ino]
        if valid & 8 and size != len(node.data):
            self.fault("truncate", node.name)
            self.log.record("truncate", ino, size)
            resize(node.data, size)
            self._touch(node)
        stamp = valid & 32 and not valid & 8  # a time alone, not the one that goes with a truncate
        node.ctime = time.time_ns()
        if stamp:
            node.mtime = node.ctime if valid & 256 else seconds * 10**9 + nanos
        if valid & 1:
            node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(mode)
        node.uid, node.gid = uid if valid & 2 else node.uid, gid if valid & 4 else node.gid
        if valid & 7 or stamp:
            self.log.record("attr", ino, node.mode, node.uid, node.gid, node.mtime if stamp else -1)
        return self._getattr(ino, body, caller)

    def _readlink(self, ino: int, _body: memoryview, _caller: Caller) -> bytes:
        return self._inodes[ino].target

    def _make(self, ino: int, body: memoryview, caller: Caller) -> bytes:
        first, second = struct.unpack("<II", bytes(body[:8]).ljust(8, b"\0"))
        start = {_SYMLINK: 0, _MKDIR: 8}.get(caller.opcode, 16)
        name, *targets = bytes(body[start:-1]).split(b"\0")
        modes = {_SYMLINK: stat.S_IFLNK | 0o777, _MKNOD: first, _MKDIR: stat.S_IFDIR | first}
        if caller.opcode == _TMPFILE:
            ino, name = 0, b"%d" % self._next
        elif name in self._inodes[ino].children:
            _refuse(errno.EEXIST)
        self.fault("create", name)
        node = self._new(
            ino,
            name,
            modes.get(caller.opcode, second),
            caller.uid,
            caller.gid,
            second if caller.opcode == _MKNOD else 0,
            targets[0] if targets else None,
        )
        opened = struct.pack("<QII", 0, 2, 0) if caller.opcode in {_CREATE, _TMPFILE} else b""
        return self._entry(node) + opened

    def _link(self, ino: int, body: memoryview, _caller: Caller) -> bytes:
        name, node = bytes(body[8:-1]), self._inodes[struct.unpack_from("<Q", body)[0]]
        if name in self._inodes[ino].children:
            _refuse(errno.EEXIST)
        self.fault("link", name)
        self._add_name(ino, name, node, "link")
        return self._entry(node)

    def _unlink(self, ino: int, body: memoryview, _caller: Caller) -> bytes:
        name = bytes(body[:-1])
        node = self._find(ino, name)
        if stat.S_ISDIR(node.mode) and node.children:
            _refuse(errno.ENOTEMPTY)
        self.fault("unlink", name)
        self.log.record("unlink", ino, name, node.ino)
        self._remove_name(ino, name)
        return b""

    def _rename(self, ino: int, body: memoryview, caller: Caller) -> bytes:
        flags, start = 0, 8
        if caller.opcode == _RENAME2:
            there, flags = struct.unpack_from("<QI", body)
            start = 16
        else:
            there = struct.unpack_from("<Q", body)[0]
        old, new = bytes(body[start:-1]).split(b"\0")
        node, other = self._find(ino, old), self._inodes[there].children.get(new)
        if flags == _EXCHANGE:
            return self._exchange(ino, old, there, new)
        if flags > 1:
            _refuse(errno.EINVAL)
        if other and (flags or self._inodes[other].children):
            _refuse(errno.EEXIST if flags else errno.ENOTEMPTY)
        self.fault("rename", new)
        self.log.record("rename", ino, old, node.ino, there, new, other or 0)
        if other:
            self._remove_name(there, new)
        del self._inodes[ino].children[old]
        self._inodes[there].children[new] = node.ino
        node.parent, node.name, node.ctime = there, new, time.time_ns()
        self._touch(self._inodes[ino])
        self._touch(self._inodes[there])
        return b""

    def _exchange(self, ino: int, old: bytes, there: int, new: bytes) -> bytes:
        node, other = self._find(ino, old), self._find(there, new)
        self.fault("rename", new)
        self.log.record("exchange", ino, old, node.ino, there, new, other.ino)
        self._inodes[ino].children[old], self._inodes[there].children[new] = other.ino, node.ino
        node.parent, node.name = there, new
        other.parent, other.name = ino, old
        self._touch(self._inodes[ino])
        self._touch(self._inodes[there])
        return b""

    def _read(self, ino: int, body: memoryview, _caller: Caller) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", body)
        return bytes(self._inodes[ino].data[offset : offset + size])

    def _write(self, ino: int, body: memoryview, _caller: Caller) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", body)
        node, data = self._inodes[ino], bytes(body[40 : 40 + size])
        if ino == ACKS:
            self.log.record("ack", data)
        else:
            self.fault("write", node.name)
            self.log.record("write", ino, offset, data)
        resize(node.data, max(len(node.data), offset))
        node.data[offset : offset + size] = data
        self._touch(node)
        return struct.pack("<II", size, 0)

    def _fallocate(self, ino: int, body: memoryview, _caller: Caller) -> bytes:
        offset, length, mode = struct.unpack_from("<8xQQI", body)
        node, end = self._inodes[ino], offset + length
        if mode not in {0, 1, 3, 0x10, 0x11}:
            _refuse(errno.EOPNOTSUPP)
        self.fault("fallocate", node.name)
        if mode & 0x12 and offset < len(node.data):  # punch a hole, zero a range
            stop = min(end, len(node.data))
            self.log.record("zero", ino, offset, stop - offset)
            node.data[offset:stop] = bytes(stop - offset)
        if not mode & 1 and end > len(node.data):
            self.log.record("truncate", ino, end)
            resize(node.data, end)
        return b""

    def _fsync(self, ino: int, body: memoryview, _caller: Caller) -> bytes:
        data_only = bool(struct.unpack_from("<8xI", body)[0] & 1)
        return self.sync_point("fsync", self._inodes[ino].name, ino, data_only)

    def _fsyncdir(self, ino: int, _body: memoryview, caller: Caller) -> bytes:
        if caller.thread == self.own_thread:
            return b""
        return self.sync_point("fsyncdir", self._inodes[ino].name, ino)

    def _statfs(self, _ino: int, _body: memoryview, _caller: Caller) -> bytes:
        return struct.pack(
            "<5Q3I", 1 << 28, 1 << 27, 1 << 27, 1 << 24, 1 << 23, 4096, 255, 4096
        ) + bytes(28)

    def _opendir(self, _ino: int, _body: memoryview, _caller: Caller) -> bytes:
        self._next += 1  # the handle: readdir keeps one listing for each
        return struct.pack("<QQ", self._next - 1, 0)

    def _readdir(self, ino: int, body: memoryview, _caller: Caller) -> bytes:
        handle, offset, size = struct.unpack_from("<QQI", body)
        if not offset or handle not in self._listings:
            node = self._inodes[ino]
            self._listings[handle] = [(b".", ino), (b"..", node.parent), *node.children.items()]
        reply = b""
        for position, (name, child) in enumerate(self._listings[handle][offset:], offset + 1):
            kind = self._inodes[child].mode >> 12 if child in self._inodes else 0
            item = struct.pack("<QQII", child, position, len(name), kind) + name
            if len(reply) + len(item) + 8 > size:
                break
            reply += item + bytes(-len(item) % 8)
        return reply

    def _releasedir(self, _ino: int, body: memoryview, _caller: Caller) -> bytes:
        self._listings.pop(struct.unpack_from("<Q", body)[0], None)
        return b""


def report(message: str) -> None:
    print(message, file=sys.stderr)
