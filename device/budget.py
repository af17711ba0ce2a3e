"""The month's bytes of this device: counts what crosses the border of its site, and says when none are left.

Counted is every datagram to and from the gateway and peers on none of this machine's networks, with its IP and UDP
headers: pieces, metadata, acknowledgements, what is sent again. Not counted: MQTT, DNS, joining, and peers on the LAN.
The count is kept in ``state.db``; a kill loses at most SAVE_S of it. What a budget means is ``edgesync.budget``'s;
who is asked for what is ``device.core.download``'s.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final

from device.state import StateDatabase
from edgesync import budget, caps
from edgesync.budget import Ledger, Verdict
from edgesync.errors import StorageError
from edgesync.transport.connection import PeerConnection

logger = logging.getLogger(__name__)

META_KEY: Final = "budget"
COUNT_S: Final = 0.25
"""How often sessions are looked at while there are any."""
SAVE_S: Final = 2.0
IDLE_S: Final = 30.0
"""A new month, or a clock that was set, is noticed by then."""


class DeviceBudget:
    """``watch`` each connection that leaves the site; ``run`` counts. With a limit of 0 it does nothing."""

    def __init__(
        self,
        limit_bytes: int,
        zone_name: str,
        *,
        state: StateDatabase,
        in_storage: Callable[..., Awaitable[Any]],
        utc_now: Callable[[], float],
        told: Callable[[Verdict], None],
    ) -> None:
        """``told`` hears where the budget stands, whenever that changes."""
        self.limit_bytes = limit_bytes
        self._zone = caps.load_zone(zone_name)
        self._state = state
        self._in_storage = in_storage
        self._utc_now = utc_now
        self._told = told
        self._ledger = Ledger()
        self._watched: dict[PeerConnection, int] = {}
        self._wanted = asyncio.Event()
        self._said: Verdict | None = None
        self._saved: dict[str, Any] = {}
        self._saved_at = 0.0
        self.problem = ""
        if kept := state.meta(META_KEY):
            try:
                self._ledger = Ledger.from_json(json.loads(kept))
            except ValueError:
                self.problem = "what was spent this month could not be read: it is counted anew"
        self._saved = self._ledger.to_json()

    def watch(self, conn: PeerConnection) -> None:
        """Count what this connection moves, from its first byte on."""
        if self.limit_bytes:
            self._watched[conn] = 0
            self._wanted.set()

    def verdict(self) -> Verdict:
        return budget.judge(
            self._ledger, self.limit_bytes, utc_now=self._utc_now(), zone=self._zone
        )

    @property
    def is_spent(self) -> bool:
        return bool(self.limit_bytes) and not self.verdict().left_bytes

    def facts(self) -> dict[str, Any] | None:
        """For status; None: nothing was set."""
        return dict(self.verdict().facts()) if self.limit_bytes else None

    async def run(self) -> None:
        """Count, keep, and tell."""
        if not self.limit_bytes:
            await asyncio.get_running_loop().create_future()
        loop = asyncio.get_running_loop()
        try:
            while True:
                self._count()
                if not self._watched or loop.time() - self._saved_at >= SAVE_S:
                    await self._save()
                    self._saved_at = loop.time()
                if self._watched:
                    await asyncio.sleep(COUNT_S)
                    continue
                self._wanted.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(IDLE_S):
                        await self._wanted.wait()
        finally:
            self._count()
            with contextlib.suppress(StorageError):
                self._state.set_meta(META_KEY, json.dumps(self._ledger.to_json()))

    def _count(self) -> None:
        moved = 0
        for conn, before in list(self._watched.items()):
            now = conn.wire_bytes
            moved += now - before
            self._watched[conn] = now
            if conn.closed.is_set():
                del self._watched[conn]
        if moved:
            month = budget.month_at(self._utc_now(), self._zone)
            self._ledger.spend(moved, month.number)
        verdict = self.verdict()
        if verdict != self._said:
            self._said = verdict
            self._told(verdict)

    async def _save(self) -> None:
        now = self._ledger.to_json()
        if now == self._saved:
            return
        try:
            await self._in_storage(self._state.set_meta, META_KEY, json.dumps(now))
        except StorageError as exc:
            self.problem = f"what was spent this month cannot be kept: {exc}"
            logger.warning("%s", self.problem)
        else:
            self._saved = now
            self.problem = ""


__all__ = ["DeviceBudget"]
