"""Becoming the owner of the data directory when a command is run by root.

The service runs as a user of its own; a file that root wrote into its directory is one it cannot read. So a command
started by root gives up being root for good before it opens the directory. A command keeps one privilege, reading any
file (CAP_DAC_READ_SEARCH), because its input, or Python itself, may be readable by root alone; it cannot write as root.
The daemon keeps none.
"""

import ctypes
import os
import pwd
from pathlib import Path
from typing import Final

from edgesync.errors import ConfigError

_CAP_DAC_READ_SEARCH: Final = 2
_PR_SET_KEEPCAPS: Final = 8
_CAPABILITY_VERSION_3: Final = 0x20080522


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Data(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


def become_owner(path: Path, *, keep_reading: bool = True) -> None:
    """Run as ``path``'s owner from here on, if this process is root and the owner is not; else do nothing.

    ``keep_reading`` keeps the right to read every file. Raises ConfigError: the kernel refuses, or the owner could not
    even read the program.
    """
    if os.geteuid() != 0:
        return
    try:
        status = path.stat()
    except OSError:
        return  # Whoever opens it says what is wrong with it.
    if status.st_uid == 0:
        return
    try:
        try:
            name = pwd.getpwuid(status.st_uid).pw_name
            os.initgroups(name, status.st_gid)
        except KeyError:
            os.setgroups([])
        if keep_reading:
            _prctl(_PR_SET_KEEPCAPS, 1)
        os.setresgid(status.st_gid, status.st_gid, status.st_gid)
        os.setresuid(status.st_uid, status.st_uid, status.st_uid)
        if keep_reading:
            _set_capabilities(1 << _CAP_DAC_READ_SEARCH)
    except OSError as exc:
        raise ConfigError(f"cannot act as the owner of {path}: {exc.strerror or exc}") from exc
    program = Path(os.__file__)
    if not keep_reading and not os.access(program, os.R_OK):
        raise ConfigError(
            f"the owner of {path} cannot read {program.parent}: install edgesync where it can, or run this as it"
        )
    # Root's HOME and the like are not the owner's; nothing of ours reads them, children of ours might.
    os.environ.pop("HOME", None)
    os.umask(0o077)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _set_capabilities(mask: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    header = _Header(_CAPABILITY_VERSION_3, 0)
    data = (_Data * 2)(_Data(mask, mask, 0), _Data(0, 0, 0))
    if libc.capset(ctypes.byref(header), data) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
