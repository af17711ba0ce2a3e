"""One open session of the device as the swarm sees it: what each side wants to hear about, and words on their way out.

It decides nothing. What is said to a slow peer waits here in bounded form: haves are merged, everything else is dropped
with the connection when too much waits. Event loop only.
"""

import asyncio
import logging
from collections import deque
from typing import Final

from edgesync import limits
from edgesync.errors import EdgeSyncError, ErrorCode
from edgesync.ids import Digest, PeerKey
from edgesync.transport.connection import PeerConnection
from edgesync.wire.messages import ControlMessage, Have

logger = logging.getLogger(__name__)

HAVE_DELAY_S: Final = 0.02
"""Haves gathered into one message."""
MAX_WAITING: Final = 256
HAVES_PER_MESSAGE: Final = 4096


class PeerLink:
    def __init__(self, conn: PeerConnection) -> None:
        self.conn = conn
        self.key: PeerKey = conn.peer.key
        self.they_want: dict[Digest, None] = {}
        """Manifests the peer asked to hear about."""
        self.announced: dict[Digest, bytes] = {}
        """Bitfields that came before we wanted the manifest, as they came."""
        self.rejected = 0
        """Pieces of this session that were not what they claimed to be."""
        self._waiting: deque[ControlMessage] = deque()
        self._haves: dict[Digest, list[int]] = {}
        self._wake = asyncio.Event()
        self._ending: asyncio.Task[None] | None = None
        self._task = asyncio.get_running_loop().create_task(
            self._send(), name=f"tell {self.key[:12]}"
        )

    def tell(self, message: ControlMessage) -> None:
        if len(self._waiting) >= MAX_WAITING:
            logger.info("peer %s does not read: its session ends", self.key[:16])
            self._task.cancel()
            if self._ending is None:
                # A link that tells nothing any more would look like a peer that has nothing to tell.
                self._ending = asyncio.get_running_loop().create_task(
                    self.conn.close(ErrorCode.LIMIT, "messages are not read")
                )
            return
        self._waiting.append(message)
        self._wake.set()

    def tell_have(self, digest: Digest, pieces: tuple[int, ...]) -> None:
        if digest in self.they_want:
            self._haves.setdefault(digest, []).extend(pieces)
            self._wake.set()

    def wants(self, digest: Digest) -> bool:
        """Note that the peer wants to hear about a manifest; False: it named too many."""
        if len(self.they_want) >= limits.MAX_MANIFESTS_PER_CONNECTION:
            return digest in self.they_want
        self.they_want[digest] = None
        return True

    async def _send(self) -> None:
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                while self._waiting:
                    await self.conn.send(self._waiting.popleft())
                if self._haves:
                    await asyncio.sleep(HAVE_DELAY_S)
                    haves, self._haves = self._haves, {}
                    for digest, pieces in haves.items():
                        for first in range(0, len(pieces), HAVES_PER_MESSAGE):
                            batch = pieces[first : first + HAVES_PER_MESSAGE]
                            await self.conn.send(Have(manifest=bytes.fromhex(digest), pieces=batch))
        except EdgeSyncError as exc:
            logger.debug("telling %s ended: %s", self.key[:16], exc)

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
