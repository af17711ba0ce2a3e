"""A held bundle as a tar stream, for `get`: every piece is hashed in the buffer that is sent.

The stream ends with an entry no bundle can contain, so that a reader tells a whole one from a cut one.
"""

import asyncio
import tarfile
from collections.abc import AsyncIterator
from typing import Any

from device.bundle_store import Bundle, BundleStore
from device.getting import END_ENTRY
from edgesync.errors import StorageError
from edgesync.ids import Digest
from edgesync.manifest import FileEntry


async def tree(store: BundleStore, digest: Digest) -> AsyncIterator[dict[str, Any] | bytes]:
    """First the header object, then the tar's bytes. Raises StorageError: a piece is no longer what was signed."""
    bundle = store.get(digest)
    if bundle is None or not bundle.complete:
        raise StorageError(f"bundle {digest[:12]} is no longer whole on this device: ask again")
    manifest = await asyncio.to_thread(lambda: bundle.manifest)
    single = len(manifest.files) == 1 and not manifest.directories and not manifest.symlinks
    yield {
        "stream": True,
        "single_file": single,
        "name": manifest.name,
        "version": manifest.version,
        "payload_bytes": manifest.payload_bytes,
    }
    for directory in manifest.directories:
        yield _header(directory.path, tarfile.DIRTYPE, mode=directory.mode)
    for file in manifest.files:
        yield _header(file.path, tarfile.REGTYPE, mode=file.mode, size=file.size)
        async for part in _content(store, bundle, file):
            yield part
        if file.size % tarfile.BLOCKSIZE:
            yield bytes(tarfile.BLOCKSIZE - file.size % tarfile.BLOCKSIZE)
    for link in manifest.symlinks:
        yield _header(link.path, tarfile.SYMTYPE, target=link.target)
    yield _header(END_ENTRY, tarfile.REGTYPE)
    yield bytes(2 * tarfile.BLOCKSIZE)


async def _content(store: BundleStore, bundle: Bundle, file: FileEntry) -> AsyncIterator[bytes]:
    loop = asyncio.get_running_loop()
    for index in file.pieces():
        piece = await loop.run_in_executor(store.executor, bundle.read_piece, index)
        if piece is None:
            raise StorageError(
                f"{file.path!a} was changed on this device while it was read: ask again"
            )
        yield piece


def _header(path: str, kind: bytes, *, mode: int = 0o644, size: int = 0, target: str = "") -> bytes:
    entry = tarfile.TarInfo(path)
    entry.type, entry.mode, entry.size, entry.linkname = kind, mode, size, target
    return entry.tobuf(tarfile.PAX_FORMAT)
