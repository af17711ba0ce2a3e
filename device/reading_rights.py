"""Whether a peer may have the pieces of a bundle that only assigned devices may read.

A peer proves it with its own assignment set, which a gateway of this fleet signed for its key: the set is fetched from
the peer itself, verified here and remembered until it expires. The first question is therefore refused while the proof
is fetched; the peer asks again. Bounded: MAX_REMEMBERED sets, one fetch a peer at a time.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass

from edgesync import assignment, limits
from edgesync.errors import EdgeSyncError
from edgesync.ids import DeviceId, Digest, FleetId, PeerKey
from edgesync.transport.connection import PeerConnection

logger = logging.getLogger(__name__)

MAX_REMEMBERED = 256
ASK_AGAIN_S = 5.0


@dataclass(frozen=True)
class _Rights:
    digests: frozenset[str]
    expires: float


class ReadingRights:
    def __init__(
        self,
        *,
        connection: Callable[[PeerKey], PeerConnection | None],
        keys: Callable[[], Collection[PeerKey]],
        fleet: FleetId,
        utc_now: Callable[[], float],
    ) -> None:
        """``keys`` are the assignment keys of every gateway of the fleet."""
        self._connection = connection
        self._keys = keys
        self._fleet = fleet
        self._utc_now = utc_now
        self._known: OrderedDict[PeerKey, _Rights] = OrderedDict()
        self._asking: dict[PeerKey, asyncio.Task[None]] = {}
        self._asked_at: OrderedDict[PeerKey, float] = OrderedDict()

    def may_read(self, peer: PeerKey, device_id: str, digest: Digest) -> bool:
        rights = self._known.get(peer)
        if rights is not None and rights.expires > self._utc_now() and digest in rights.digests:
            return True
        due = time.monotonic() - self._asked_at.get(peer, -ASK_AGAIN_S) >= ASK_AGAIN_S
        if due and peer not in self._asking and len(self._asking) < MAX_REMEMBERED:
            task = asyncio.ensure_future(self._ask(peer, device_id))
            self._asking[peer] = task
            task.add_done_callback(lambda _done: self._asking.pop(peer, None))
        return False

    async def _ask(self, peer: PeerKey, device_id: str) -> None:
        self._asked_at[peer] = time.monotonic()
        while len(self._asked_at) > MAX_REMEMBERED:
            self._asked_at.popitem(last=False)
        connection = self._connection(peer)
        if connection is None:
            return
        try:
            data = await connection.fetch(f"assign/{device_id}", limits.MAX_ENVELOPE_BYTES)
            found = assignment.verify(
                data,
                keys=self._keys(),
                fleet=self._fleet,
                device_id=DeviceId(device_id),
                device_key=peer,
                floor_sequence=0,
                utc_now=self._utc_now(),
            )
        except EdgeSyncError as exc:
            logger.info("%s showed no assignment: %s", device_id, exc)
            return
        self._known[peer] = _Rights(frozenset(e.target_hash for e in found.entries), found.expires)
        while len(self._known) > MAX_REMEMBERED:
            self._known.popitem(last=False)
