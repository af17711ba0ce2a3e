"""The data directory of one role on one machine: what it is called, whose it is, and who may use it now.

It makes and opens the directory and names the files in it; it does not read or write their content. Invariants:

* a directory belongs to exactly one role, written in ``role`` before anything else is put there;
* a directory of a newer format is left alone, untouched;
* at most one process holds ``lock``: the daemon while it runs, and ``init`` or ``restore`` while they write.

Every command opens its directory here, so every way it can be wrong is one sentence and exit code 78.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, get_args

from edgesync.errors import ConfigError

Role = Literal["gateway", "agent"]
ROLES: tuple[Role, ...] = get_args(Role)

FORMAT = 1
"""Layout this version writes and reads; raised when an older version could no longer use what is there."""

MAX_ROLE_BYTES = 4096
DATA_VARIABLE = "EDGESYNC_DATA"
_DEFAULT_ROOT = Path("/var/lib/edgesync")
_DEFAULT_CONFIG = Path("/etc/edgesync")

_NOT_CONTENT = {"lock", "lost+found", ".building"}
_MISSING: dict[Role, str] = {
    "gateway": "no gateway in {path}: run edgesync gateway init --advertise HOST",
    "agent": "not joined: on the gateway run edgesync token create (looked in {path})",
}
_NOUN: dict[Role, str] = {"gateway": "a gateway's", "agent": "an agent's"}


def default_path(role: Role) -> Path:
    """Where a role lives when neither ``--data`` nor ``EDGESYNC_DATA`` says otherwise."""
    return _DEFAULT_ROOT / role


def choose_path(role: Role, given: Path | None) -> Path:
    """``--data``, else ``EDGESYNC_DATA``, else the default."""
    if given is not None:
        return given.absolute()
    named = os.environ.get(DATA_VARIABLE)
    return Path(named).absolute() if named else default_path(role)


class DataLock:
    """The exclusive right to run on a directory, held until closed or the process ends."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class DataDir:
    path: Path
    role: Role

    @classmethod
    def create(cls, path: Path, role: Role) -> Self:
        """Make an empty directory of ``role``; see ``building`` for its modes and errors."""
        with cls.building(path, role) as made:
            return made

    @classmethod
    @contextlib.contextmanager
    def building(cls, path: Path, role: Role) -> Iterator[Self]:
        """Make the directory, or adopt an empty one, let the caller fill it, then give it its role.

        It becomes a role's directory whole or not at all: after an error what was written is removed, and what a
        killed process left (marked by ``.building``) is cleared by the next attempt. A gateway's is 0700. An agent's
        is 0755, because applications read ``bundles/`` below it; what is secret in there has modes of its own.

        Raises ConfigError: it holds something already, is being made by another process, or cannot be made.
        """
        existing = _read_role(path)
        if existing is not None:
            _check_role(path, existing, role)
            raise ConfigError(f"{path} is {_NOUN[role]} data directory already")
        mode = 0o700 if role == "gateway" else 0o755
        marker = path / ".building"
        try:
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            path.mkdir(mode=mode, exist_ok=True)
            if not marker.exists() and any(
                entry.name not in _NOT_CONTENT for entry in os.scandir(path)
            ):
                raise ConfigError(f"{path} is not empty and not {_NOUN[role]} data directory")
            path.chmod(mode)
            with lock(path):
                _clear(path)
                marker.touch(mode=0o600)
                try:
                    yield cls(path, role)
                    _write_role(path, role)
                except BaseException:
                    _clear(path)
                    marker.unlink(missing_ok=True)
                    raise
                marker.unlink()
        except OSError as exc:
            raise ConfigError(f"cannot make {path}: {exc.strerror or exc}") from exc

    @classmethod
    def open(cls, path: Path, role: Role | None = None) -> Self:
        """Open what ``create`` made; without ``role``, whichever role it is.

        Raises ConfigError: missing, of the other role, of a newer format, or unreadable for this user.
        """
        existing = _read_role(path)
        if existing is None:
            if role is None:
                raise ConfigError(f"{path} is not an EdgeSync data directory")
            raise ConfigError(_MISSING[role].format(path=path))
        return cls(path, _check_role(path, existing, role))

    @classmethod
    def exists(cls, path: Path) -> bool:
        """Whether a role lives here, without judging which."""
        return (path / "role").exists()

    def lock(self) -> DataLock:
        """Take the directory for this process. Raises ConfigError: another process has it."""
        return lock(self.path)

    def holder(self) -> int | None:
        """Process id of the daemon that holds the directory now, or None."""
        try:
            fd = os.open(self.path / "lock", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _lock_pid(fd)
        finally:
            os.close(fd)
        return None

    # --- names of what is inside -----------------------------------------------------------------------------------
    @property
    def config(self) -> Path:
        """The role's settings: beside the data, or below /etc for the default directory."""
        if self.path == default_path(self.role):
            return _DEFAULT_CONFIG / f"{self.role}.toml"
        return self.path / f"{self.role}.toml"

    @property
    def identity_key(self) -> Path:
        return self.path / "identity.key"

    @property
    def identity_certificate(self) -> Path:
        return self.path / "identity.crt"

    # gateway
    @property
    def database(self) -> Path:
        return self.path / "gateway.db"

    @property
    def keys(self) -> Path:
        """Root and targets keys; may be moved offline."""
        return self.path / "keys"

    @property
    def online(self) -> Path:
        return self.path / "online"

    @property
    def ca(self) -> Path:
        return self.path / "ca"

    @property
    def packs(self) -> Path:
        return self.path / "packs"

    @property
    def blobs(self) -> Path:
        return self.path / "blobs"

    # agent
    @property
    def join_file(self) -> Path:
        return self.path / "join.json"

    @property
    def state_database(self) -> Path:
        return self.path / "state.db"

    @property
    def socket(self) -> Path:
        return self.path / "agent.sock"

    @property
    def manifests(self) -> Path:
        return self.path / "manifests"

    @property
    def bundles(self) -> Path:
        return self.path / "bundles"

    @property
    def staging(self) -> Path:
        return self.path / "staging"

    @property
    def reserve(self) -> Path:
        return self.path / "reserve"


def role_of(path: Path) -> Role:
    """Which role lives in ``path``. Raises ConfigError as ``DataDir.open`` does."""
    return DataDir.open(path).role


def lock(path: Path) -> DataLock:
    """Take ``path`` for this process, whatever role it has. Raises ConfigError: another process has it."""
    try:
        fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as exc:
        raise ConfigError(f"cannot open {path / 'lock'}: {exc.strerror or exc}") from exc
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError as exc:
        pid = _lock_pid(fd)
        os.close(fd)
        who = f"process {pid}" if pid else "another process"
        raise ConfigError(f"{path} is in use by {who}") from exc
    except OSError as exc:
        os.close(fd)
        raise ConfigError(f"cannot lock {path}: {exc.strerror or exc}") from exc
    return DataLock(fd)


def _clear(path: Path) -> None:
    for entry in os.scandir(path):
        if entry.name in _NOT_CONTENT:
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            Path(entry.path).unlink()


def _lock_pid(fd: int) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(os.pread(fd, 32, 0))
    return None


def _read_role(path: Path) -> dict[str, object] | None:
    file = path / "role"
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_ROLE_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as exc:
        raise ConfigError(
            f"cannot read {file}: run this as the owner of {path} or as root"
        ) from exc
    except OSError as exc:
        raise ConfigError(f"cannot read {file}: {exc.strerror or exc}") from exc
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"{file} is damaged: it is not JSON") from exc
    if not isinstance(value, dict):
        raise ConfigError(f"{file} is damaged: it is not a JSON object")
    return value


def _check_role(path: Path, value: dict[str, object], wanted: Role | None) -> Role:
    number, role = value.get("format"), value.get("role")
    if not isinstance(number, int) or number < 1:
        raise ConfigError(f"{path / 'role'} is damaged: it names no format")
    if number > FORMAT:
        raise ConfigError(
            f"{path} was written by a newer version of edgesync (format {number}, this version reads {FORMAT}): "
            "install that version or a later one"
        )
    for known in ROLES:
        if role == known:
            if wanted is not None and known != wanted:
                raise ConfigError(
                    f"{path} is {_NOUN[known]} data directory, not {_NOUN[wanted]}: name another one with --data"
                )
            return known
    raise ConfigError(f"{path / 'role'} is damaged: it names no role this version knows")


def _write_role(path: Path, role: Role) -> None:
    # Written whole or not at all: a directory whose role cannot be read would be refused for ever.
    temporary = path / ".role"
    fd = os.open(
        temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644
    )
    try:
        os.write(fd, json.dumps({"role": role, "format": FORMAT}).encode() + b"\n")
        os.fsync(fd)
    finally:
        os.close(fd)
    temporary.rename(path / "role")
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


__all__ = [
    "DATA_VARIABLE",
    "FORMAT",
    "ROLES",
    "DataDir",
    "DataLock",
    "Role",
    "choose_path",
    "default_path",
    "lock",
    "role_of",
]
