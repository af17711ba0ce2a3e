"""`edgesync get`: ask the agent for a bundle and write it as the caller.

The agent sends the tree as a tar stream over its socket, so it never opens a path of the caller's. What arrives is
written beside OUT under a temporary name and renamed once it is whole; an interrupted get leaves OUT as it was.
"""

import contextlib
import os
import shutil
import tarfile
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

from edgesync import manifest
from edgesync.cli.output import Progress
from edgesync.errors import (
    ConflictError,
    NotFoundError,
    StorageError,
    UnsafePathError,
    UsageError,
    VerificationError,
)
from edgesync.io import control


def parse(bundle: str) -> tuple[str, str | None]:
    """``NAME`` or ``NAME@VERSION``. Raises UsageError."""
    name, at, version = bundle.partition("@")
    try:
        manifest.check_name(name)
        if at:
            manifest.check_version(version)
    except VerificationError as exc:
        raise UsageError(str(exc)) from exc
    return name, version if at else None


def get(data: Path, bundle: str, out: Path) -> str:
    """Write a bundle to ``out``; returns ``NAME@VERSION``.

    Raises NotFoundError: no such bundle. Raises ConflictError: OUT exists. Raises StorageError: it broke off.
    """
    name, version = parse(bundle)
    if os.path.lexists(out):
        raise ConflictError(f"{out} exists already: remove it or name another path")
    if not out.parent.is_dir():
        raise NotFoundError(f"{out.parent} is not a folder: make it first")
    sock = control.connect(data, timeout_s=None)
    with closing(sock), sock.makefile("rb") as stream, Progress(bundle) as progress:
        control.send(sock, {"op": "get", "name": name, "version": version})
        header: dict[str, Any] = {}
        for header in control.answers(stream):
            if "pieces_total" in header:
                payload = header["payload_bytes"]
                progress.update(
                    payload * header["pieces_have"] / max(1, header["pieces_total"]), payload
                )
        if not header.get("stream"):
            raise StorageError(
                f"the agent went away before {bundle} was whole: run the same command again"
            )
        _write(stream, out, single=bool(header["single_file"]))
        return f"{header['name']}@{header['version']}"


def _write(stream: Any, out: Path, *, single: bool) -> None:
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        tree = scratch / "tree"
        tree.mkdir()
        try:
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                _extract(tar, tree)
        except (tarfile.TarError, EOFError) as exc:
            raise StorageError(
                f"the agent's stream broke off: run the same command again ({exc})"
            ) from exc
        whole = next(tree.iterdir()) if single else tree
        os.rename(whole, out)  # noqa: PTH104 - replaces nothing: OUT was checked, and a folder never replaces a file
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _extract(tar: tarfile.TarFile, tree: Path) -> None:
    """Write every entry below ``tree``, folders' modes last so that a read-only one can be filled."""
    folders: list[tuple[Path, int]] = []
    ended = False
    for entry in tar:
        if entry.name == END_ENTRY:
            ended = True
            break
        path = tree / manifest.check_path(entry.name)
        if entry.isdir():
            path.mkdir()
            folders.append((path, entry.mode))
        elif entry.issym():
            manifest.check_symlink(entry.name, entry.linkname)
            path.symlink_to(entry.linkname)
        elif entry.isreg():
            source = tar.extractfile(entry)
            assert source is not None
            with contextlib.closing(source), path.open("xb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
                os.fchmod(file.fileno(), entry.mode & 0o775)
        else:
            raise UnsafePathError(f"{entry.name!a} is neither file, folder nor symlink")
    if not ended:
        raise EOFError("no end mark")
    for path, mode in reversed(folders):
        path.chmod(mode & 0o775)


END_ENTRY = "../end-of-bundle"
"""Last entry of a whole stream, a name no bundle may have: a tar cut between entries looks complete without it."""
