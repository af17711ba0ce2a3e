"""The recording: one length-prefixed tuple per operation, in the order they happened.

Kinds and fields (after kind and monotonic nanoseconds)::

    directory path mode uid gid        create folder name ino mode uid gid rdev target
    start                              link | unlink folder name ino
    write ino offset bytes             rename | exchange folder name ino new-folder new-name other-ino
    zero ino offset length             fsync ino data-only fine
    truncate ino size                  fsyncdir ino fine        syncfs fine
    attr ino mode uid gid mtime        ack bytes
"""

import marshal
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Record = tuple[Any, ...]

_LENGTH = struct.Struct("<I")


class LogWriter:
    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=1 << 20)
        self.counts: dict[str, int] = {}

    def record(self, kind: str, *fields: object) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        blob = marshal.dumps((kind, time.monotonic_ns(), *fields))
        self._file.write(_LENGTH.pack(len(blob)) + blob)

    def close(self) -> None:
        self._file.close()


def read_log(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        while len(head := file.read(4)) == 4:
            yield marshal.loads(file.read(_LENGTH.unpack(head)[0]))
