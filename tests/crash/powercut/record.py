"""Run a program on a recording file system, in a process of its own."""

import contextlib
import ctypes
import fcntl
import os
import platform
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.crash.powercut.fuse import ACKS_NAME, Fault, RecordingFileSystem, libc
from tests.crash.powercut.log import LogWriter

# Numbers of seccomp(2), syncfs(2) and sync(2), and what the kernel calls the architecture.
_SECCOMP, _SYNCFS, _SYNC, _ARCHITECTURE = {
    "x86_64": (317, 306, 162, 0xC000003E),
    "aarch64": (277, 267, 81, 0xC00000B7),
}[platform.machine()]
_PR_SET_CHILD_SUBREAPER = 36

Program = Callable[[Path, Path], int]
"""Called with the directory and the file acknowledgements go to (one ``write`` each); returns an exit status."""


@dataclass(frozen=True)
class Recording:
    status: int
    counts: dict[str, int]
    struck: list[str]


def acknowledge(acks: Path, line: str) -> None:
    """Tell the outside world something: after a cut that comes later, it must be true."""
    fd = os.open(acks, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(fd, line.encode() + b"\n")
    finally:
        os.close(fd)


def record(directory: Path, log_path: Path, program: Program, faults: list[str]) -> Recording:
    """Record ``program`` on ``directory``, whose contents are the durable start; they stay untouched below.

    Forks a server process and, from that, the program: modules imported before are shared. Raises OSError: no root, no
    FUSE.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        try:
            done = _serve(directory, log_path, program, faults)
            answer = repr((done.status, done.counts, done.struck))
        except BaseException:  # noqa: BLE001  # reported by the parent
            answer = traceback.format_exc()
        with os.fdopen(writer, "w") as pipe:
            pipe.write(answer)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    if not answer.startswith("("):
        raise OSError(f"recording failed: {answer or 'the recorder died'}")
    status, counts, struck = eval(answer)  # a repr of ours
    return Recording(status, counts, struck)


def _serve(directory: Path, log_path: Path, program: Program, rules: list[str]) -> Recording:
    log = LogWriter(log_path)
    system = RecordingFileSystem(directory, log, [Fault(rule) for rule in rules])
    system.mount()
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    ours, theirs = socket.socketpair()
    child = os.fork()
    if not child:
        _run(program, system.directory, theirs)
    theirs.close()
    mount = os.fsencode(system.directory)
    server = threading.Thread(target=system.serve, daemon=True)
    server.start()
    try:
        mount_fd = os.open(mount, os.O_RDONLY | os.O_CLOEXEC)
        for listener in socket.recv_fds(ours, 1, 1)[1]:
            threading.Thread(
                target=_watch_sync_calls, args=(system, listener, mount_fd), daemon=True
            ).start()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.close(mount_fd)
    finally:
        _outlive_children()
        if libc.umount2(mount, 0):  # somebody else is in there
            libc.umount2(mount, 2)
        server.join(5)
        with system.lock:
            log.close()
    return Recording(status, dict(log.counts), system.struck)


def _run(program: Program, directory: Path, channel: socket.socket) -> None:
    status = 70
    try:
        socket.send_fds(channel, [b"."], [_install_sync_filter()])
        channel.close()
        status = program(directory, directory / os.fsdecode(ACKS_NAME))
    except BaseException:  # noqa: BLE001  # the status tells
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _install_sync_filter() -> int:
    """syncfs(2) and sync(2) never reach a FUSE server: have the kernel hand each such call to a listener first."""
    steps = [
        (0x20, 0, 0, 4), (0x15, 0, 4, _ARCHITECTURE), (0x20, 0, 0, 0), (0x15, 1, 0, _SYNCFS),
        (0x15, 0, 1, _SYNC), (6, 0, 0, 0x7FC00000), (6, 0, 0, 0x7FFF0000),
    ]  # fmt: skip
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *step) for step in steps))
    header = ctypes.create_string_buffer(struct.pack("<H6xQ", len(steps), ctypes.addressof(code)))
    listener: int = libc.syscall(_SECCOMP, 1, 8, header)  # 1: set a filter; 8: with a listener
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return listener


def _watch_sync_calls(system: RecordingFileSystem, listener: int, mount_fd: int) -> None:
    system.own_thread = threading.get_native_id()
    device = os.fstat(mount_fd).st_dev
    poller = select.poll()
    poller.register(listener, select.POLLIN)
    while not (ready := poller.poll(500)) or ready[0][1] == select.POLLIN:
        if not ready:
            continue
        with contextlib.suppress(OSError):  # the caller was killed meanwhile
            notice = bytearray(80)
            if fcntl.ioctl(listener, 0xC0502100, notice):
                continue
            ident, thread, number, first = struct.unpack_from("<QI4xi12xQ", notice)
            code, everything = 0, number == _SYNC
            ours = everything or Path(f"/proc/{thread}/fd/{first}").stat().st_dev == device
            if ours:
                libc.syncfs(mount_fd)  # brings pages dirtied through mmap to us
                os.fsync(mount_fd)  # queued behind them
                try:
                    with system.lock:
                        system.sync_point("syncfs", b"")
                except OSError as exc:
                    code = 0 if everything else exc.errno or 5
            run_it = everything or not ours
            fcntl.ioctl(listener, 0xC0182101, struct.pack("<QqiI", ident, 0, -code, run_it))


def _outlive_children() -> None:
    """What the program left running is ours now: killed, so that the log has an end."""
    with contextlib.suppress(ChildProcessError):
        while True:
            if not os.waitpid(-1, os.WNOHANG)[0]:
                for path in Path("/proc/self/task").glob("*/children"):
                    for pid in path.read_text(encoding="ascii").split():
                        os.kill(int(pid), signal.SIGKILL)
                time.sleep(0.01)
