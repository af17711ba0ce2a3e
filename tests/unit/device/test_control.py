"""The agent's socket: every fault is an answer with an exit code, and the kernel says who may ask."""

import asyncio
import os
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from device import control as server
from device.control import MAX_REQUEST_BYTES, Answer, ControlServer
from edgesync.errors import ConflictError, ExitCode
from edgesync.io import control

GROUP, STRANGER = 54_321, 65_534


def failing(error: Exception) -> Callable[[dict[str, Any]], AsyncIterator[Answer | bytes]]:
    async def operation(_request: dict[str, Any]) -> AsyncIterator[Answer | bytes]:
        raise error
        yield {}

    return operation


async def echo(request: dict[str, Any]) -> AsyncIterator[Answer | bytes]:
    yield {"heard": request["word"]}


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncIterator[Path]:
    running = ControlServer(
        tmp_path,
        {
            "echo": echo,
            "conflict": failing(ConflictError("app@1 is assigned")),
            "disk": failing(OSError(5, "Input/output error")),
            "bug": failing(KeyError("oops")),
        },
    )
    await running.start()
    yield tmp_path
    await running.close()


@pytest.mark.parametrize(
    ("operation", "sentence", "code"),
    [
        ("conflict", "app@1 is assigned", ConflictError.exit_code),
        ("disk", "Input/output error", ExitCode.FAILURE),
        ("bug", "the agent failed: see its log", ExitCode.FAILURE),
        ("dance", "the agent has no operation 'dance'", ExitCode.USAGE),
    ],
)
async def test_a_fault_is_answered(
    agent: Path, operation: str, sentence: str, code: ExitCode
) -> None:
    with pytest.raises(control.RemoteError, match=sentence) as caught:
        await asyncio.to_thread(control.ask, agent, {"op": operation})
    assert caught.value.exit_code == code
    # And the next one is served as ever.
    assert await asyncio.to_thread(control.ask, agent, {"op": "echo", "word": 1}) == {"heard": 1}


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        (b"{", b'{"error":"the request is not JSON","exit":2}\n'),
        (b"\xff\xff", b'{"error":"the request is not JSON","exit":2}\n'),
        (b"[]", b'{"error":"the agent has no operation \'\'","exit":2}\n'),
        (b"x" * (MAX_REQUEST_BYTES + 1), b""),
    ],
)
async def test_what_is_no_request(agent: Path, line: bytes, answer: bytes) -> None:
    reader, writer = await asyncio.open_unix_connection(agent / control.SOCKET_NAME)
    writer.write(line + b"\n")
    assert await reader.read() == answer
    writer.close()


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A folder other users can reach."""
    made = Path(tempfile.mkdtemp())
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


def connect_as(path: Path, group: int, groups: list[int]) -> None:
    """Connect and end as another user; a fork, since no other user need be able to run this interpreter."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setgroups(groups)
            os.setgid(group)
            os.setuid(STRANGER)
            socket.socket(socket.AF_UNIX).connect(str(path))
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it becomes other users")
@pytest.mark.parametrize(
    ("group", "groups", "may"),
    [(GROUP, [], True), (STRANGER, [7, GROUP], True), (STRANGER, [7], False)],
)
def test_the_group_counts_without_proc(
    reachable: Path, group: int, groups: list[int], may: bool
) -> None:
    listener = server._bind(reachable)
    path = reachable / control.SOCKET_NAME
    try:
        listener.listen()
        os.chown(path, 0, GROUP)
        path.chmod(0o666)  # the file's mode is the kernel's business, not what is looked at here
        # It is gone, and with it what /proc said of it, when the agent gets to look.
        connect_as(path, group, groups)
        accepted, _ = listener.accept()
        with accepted:
            assert server._may_ask(accepted, reachable) is may
    finally:
        listener.close()


def test_an_older_kernel_is_asked_by_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "SO_PEERGROUPS", 9999)
    left, right = socket.socketpair()
    with left, right:
        assert sorted(server._peer_groups(left, os.getpid())) == sorted(os.getgroups())
        assert server._peer_groups(left, 2**30) == ()
