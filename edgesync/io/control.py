"""The agent's local socket, seen by whoever asks: one JSON line out, JSON lines back, perhaps a byte stream after them.

A request is ``{"op": …}``. Each answer line is an object; one with ``"error"`` ends the exchange with that sentence and
``"exit"``; one with ``"stream": true`` says that raw bytes follow until the end of the connection. The server side is
``device.control``. Lines are at most MAX_LINE_BYTES; the socket's mode decides who may ask.
"""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from edgesync.errors import EdgeSyncError, ExitCode, StateCorruptError

MAX_LINE_BYTES = 4 * 1024 * 1024
SOCKET_NAME = "agent.sock"
MAX_SOCKET_PATH_BYTES = 107


class AgentNotRunningError(EdgeSyncError):
    """No agent answers on this machine."""

    exit_code = ExitCode.UNREACHABLE


class RemoteError(EdgeSyncError):
    """What the agent answered; carries the exit code it chose."""

    def __init__(self, sentence: str, exit_code: int) -> None:
        super().__init__(sentence)
        self.exit_code = ExitCode(exit_code)


@contextmanager
def address(data: Path) -> Iterator[str]:
    """A name for the socket short enough for the kernel, however deep the data directory lies.

    A path over the kernel's limit is reached through this process's descriptor of its folder.
    """
    path = str(data / SOCKET_NAME)
    if len(os.fsencode(path)) <= MAX_SOCKET_PATH_BYTES:
        yield path
        return
    folder = os.open(data, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{SOCKET_NAME}"
    finally:
        os.close(folder)


def connect(data: Path, *, timeout_s: float | None) -> socket.socket:
    """Raises AgentNotRunningError: nobody listens. Raises PermissionError: this user may not ask."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(timeout_s)
    try:
        with address(data) as name:
            sock.connect(name)
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError) as exc:
        sock.close()
        raise AgentNotRunningError(
            f"no agent runs on {data}: start it with `edgesync agent run`"
        ) from exc
    except PermissionError as exc:
        sock.close()
        raise PermissionError(exc.errno, exc.strerror, str(data / SOCKET_NAME)) from exc
    return sock


def ask(data: Path, request: dict[str, object], *, timeout_s: float = 10.0) -> dict[str, Any]:
    """One request, one answer.

    Raises AgentNotRunningError, RemoteError, or TimeoutError when it does not answer within ``timeout_s``.
    """
    with closing(connect(data, timeout_s=timeout_s)) as sock, sock.makefile("rb") as stream:
        send(sock, request)
        for answer in answers(stream):
            return answer
    raise AgentNotRunningError(f"the agent on {data} went away before it answered")


def send(sock: socket.socket, request: dict[str, object]) -> None:
    sock.sendall(json.dumps(request).encode() + b"\n")


def answers(stream: BinaryIO) -> Iterator[dict[str, Any]]:
    """Answer lines until the end, or up to and including the one that starts a byte stream. Raises RemoteError."""
    while line := stream.readline(MAX_LINE_BYTES):
        try:
            answer = json.loads(line)
        except ValueError as exc:
            raise StateCorruptError(
                "the agent's answer is not JSON: is it of another version?"
            ) from exc
        if "error" in answer:
            raise RemoteError(str(answer["error"]), int(answer.get("exit", 1)))
        yield cast("dict[str, Any]", answer)
        if answer.get("stream"):
            return
