"""The agent's local socket: answers `agent status`, `agent sync` and `get` from processes of this machine.

The socket is 0660; besides its mode, the kernel's word on who asks is checked: root, the agent's own user, or a member
of the socket's group. It decides nothing about bundles: operations are functions handed in by the agent. A request is
one line of at most MAX_REQUEST_BYTES; at most MAX_CLIENTS ask at a time.
"""

import asyncio
import contextlib
import json
import logging
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from edgesync.errors import EdgeSyncError, ExitCode
from edgesync.io import control

logger = logging.getLogger(__name__)

MAX_REQUEST_BYTES = 4096
MAX_CLIENTS = 16
REQUEST_TIMEOUT_S = 10.0
SO_PEERGROUPS = 59
"""Linux: asm-generic/socket.h; Python has no name for it. Sparc and PA-RISC number it otherwise and fall back."""
MAX_GETSOCKOPT_BYTES = 1024
"""What Python lets getsockopt return: 256 groups."""
_GID = struct.Struct("I")

Answer = dict[str, Any]
Operation = Callable[[dict[str, Any]], AsyncIterator[Answer | bytes]]
"""Yields answer objects; bytes after an object with ``"stream": true`` travel raw."""


class ControlServer:
    def __init__(self, data: Path, operations: dict[str, Operation]) -> None:
        self._data = data
        self._operations = operations
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(
            self._accept, sock=_bind(self._data), limit=MAX_REQUEST_BYTES
        )

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._clients):
            task.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)
        (self._data / control.SOCKET_NAME).unlink(missing_ok=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._clients.add(task)
        task.add_done_callback(self._clients.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if len(self._clients) > MAX_CLIENTS:
                await _answer(
                    writer, {"error": "the agent answers too many already: try again", "exit": 1}
                )
                return
            sock = writer.get_extra_info("socket")
            if not _may_ask(sock, self._data):
                await _answer(
                    writer,
                    {"error": "this user may not ask the agent: join group edgesync", "exit": 1},
                )
                return
            await self._perform(reader, writer)
        except (
            ConnectionError,
            TimeoutError,
            asyncio.LimitOverrunError,
            ValueError,
        ) as exc:  # an overlong line
            logger.debug("local request ended: %s", exc)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _perform(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            line = await reader.readline()
        try:
            request = json.loads(line)
        except ValueError:
            await _answer(writer, {"error": "the request is not JSON", "exit": 2})
            return
        name = str(request.get("op")) if isinstance(request, dict) else ""
        operation = self._operations.get(name)
        if operation is None:
            await _answer(writer, {"error": f"the agent has no operation {name!a}", "exit": 2})
            return
        try:
            async for answer in operation(request):
                if isinstance(answer, bytes):
                    writer.write(answer)
                    await writer.drain()
                else:
                    await _answer(writer, answer)
        except EdgeSyncError as exc:
            await _answer(writer, {"error": str(exc), "exit": int(exc.exit_code)})
        except OSError as exc:
            if isinstance(exc, ConnectionError):
                raise
            await _answer(writer, {"error": str(exc), "exit": int(ExitCode.FAILURE)})
        except Exception:
            # The asker must not take a fault of ours for an agent that went away.
            logger.exception("the local request %s failed", name)
            await _answer(writer, {"error": "the agent failed: see its log", "exit": 1})


def _bind(data: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    with control.address(data) as name:
        Path(name).unlink(missing_ok=True)
        # Nobody can connect between bind and chmod: the mode is right from the first moment.
        before = os.umask(0o117)
        try:
            sock.bind(name)
        finally:
            os.umask(before)
    return sock


async def _answer(writer: asyncio.StreamWriter, answer: Answer) -> None:
    writer.write(json.dumps(answer, separators=(",", ":")).encode() + b"\n")
    await writer.drain()


def _may_ask(sock: socket.socket, data: Path) -> bool:
    """Whether the kernel says that the other end is root, our user or in the group of the socket file."""
    size = struct.calcsize("3i")
    pid, uid, gid = struct.unpack(
        "3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    )
    if uid in {0, os.geteuid()}:
        return True
    group = (data / control.SOCKET_NAME).stat().st_gid
    return group == gid or group in _peer_groups(sock, pid)


def _peer_groups(sock: socket.socket, pid: int) -> tuple[int, ...]:
    """The supplementary groups of whoever connected; none where the kernel does not say."""
    with contextlib.suppress(OSError):
        # As they were at connect(): /proc may be hidden from a service, and its process ids may name another by now.
        found = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, MAX_GETSOCKOPT_BYTES)
        return tuple(gid for (gid,) in _GID.iter_unpack(found))
    # A kernel before 4.13, or somebody in more groups than Python lets the kernel tell.
    with contextlib.suppress(OSError, ValueError), Path(f"/proc/{pid}/status").open() as file:
        for line in file:
            if line.startswith("Groups:"):
                return tuple(int(text) for text in line.split()[1:])
    return ()
