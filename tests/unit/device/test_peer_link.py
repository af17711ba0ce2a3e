"""A peer that does not read: what waits for it is bounded, and the session ends with a reason."""

import asyncio
from typing import Any, cast

from device.peer_link import MAX_WAITING, PeerLink
from edgesync.errors import ErrorCode
from edgesync.ids import PeerIdentity, PeerKey
from edgesync.transport.connection import PeerConnection
from edgesync.wire.messages import Have


class Unread:
    """A connection whose other end takes nothing."""

    def __init__(self) -> None:
        self.peer = PeerIdentity("device", "cam-1", PeerKey("a" * 64))
        self.sent: list[Any] = []
        self.closed: list[tuple[ErrorCode, str]] = []

    async def send(self, message: Any) -> None:
        self.sent.append(message)
        await asyncio.Event().wait()

    async def close(self, code: ErrorCode, reason: str) -> None:
        self.closed.append((code, reason))


async def test_too_much_unread_closes_the_session_once() -> None:
    conn = Unread()
    link = PeerLink(cast("PeerConnection", conn))
    message = Have(manifest=bytes(32), pieces=(1,))
    link.tell(message)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert conn.sent == [message]
    for _ in range(MAX_WAITING):
        link.tell(message)
    await asyncio.sleep(0)
    assert conn.closed == []
    for _ in range(3):
        link.tell(message)
    await asyncio.sleep(0)
    assert conn.closed == [(ErrorCode.LIMIT, "messages are not read")]
    await link.close()
    assert conn.sent == [message]
