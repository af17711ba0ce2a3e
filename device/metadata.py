"""Keeps this device's trust metadata current, whoever carries it: broker, gateway or peers.

It gathers what a newer timestamp makes necessary, by name and digest, and hands it whole to ``edgesync.trust``; it
believes nothing itself. What arrives unasked is kept in a bounded cache and used only if a digest asks for it.
Called by ``device.agent``; one refresh runs at a time.
"""

import asyncio
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import Any, TypeVar

from device.trust_store import TrustStore
from edgesync import limits, trust
from edgesync.errors import EdgeSyncError, NotFoundError, VerificationError
from edgesync.ids import Digest, PeerIdentity

logger = logging.getLogger(__name__)

Check = Callable[[bytes], Awaitable[None]]
"""Raises VerificationError: these bytes are not what was asked for, so ask somebody else."""
Fetch = Callable[[str, int, Check], Awaitable[bytes]]
"""Name, cap and check → bytes, from whoever has some that pass. Raises EdgeSyncError when nobody does."""

T = TypeVar("T")
MAX_CACHED_BYTES = limits.MIB
MAX_ROUNDS = limits.MAX_ROOT_ROTATIONS + limits.MAX_DELEGATED_ROLES + 8
"""Times a refresh may ask for more: each answer of ``trust.wanted`` must bring it nearer to the end."""


class Metadata:
    def __init__(
        self,
        store: TrustStore,
        *,
        fetch: Fetch,
        executor: Executor | None,
    ) -> None:
        self._store = store
        self._fetch = fetch
        self._executor = executor
        self._view = store.state.view
        self._cache: OrderedDict[str, bytes] = OrderedDict()
        self._lock = asyncio.Lock()
        self.problem = ""
        """Why the last refresh did not succeed; empty when it did."""
        self.incomplete = False
        """The last offer is worth another try: something it needs could not be fetched."""
        self.on_change: Callable[[], Awaitable[None]] | None = None

    @property
    def trusted(self) -> trust.Trusted:
        """What is believed now; replaced as a whole when metadata changed."""
        return self._view

    def judge(self, certificate: bytes) -> PeerIdentity:
        return self._view.judge_certificate(certificate)

    def remember(self, name: str, data: bytes) -> None:
        """Keep what a courier brought under the name it will be asked for; too large a file drives nothing out."""
        if len(data) > MAX_CACHED_BYTES:
            return
        self._cache.pop(name, None)
        self._cache[name] = data
        while sum(len(held) for held in self._cache.values()) > MAX_CACHED_BYTES:
            self._cache.popitem(last=False)

    def served(self, name: str) -> bytes | None:
        """A stored, verified file for a peer that asks."""
        return self._store.state.file(name)

    async def blob(self, digest: Digest, max_bytes: int) -> bytes:
        """A file named by digest, from the cache or from whoever has it; checked against the digest."""
        name = f"sha256/{digest}"

        async def check(data: bytes) -> None:
            if len(data) > max_bytes or hashlib.sha256(data).hexdigest() != digest:
                raise VerificationError(f"what was sent as {digest[:12]} is something else")

        data = self._cache.get(name)
        if data is not None:
            try:
                await check(data)
            except VerificationError:
                del self._cache[name]
            else:
                return data
        data = await self._fetch(name, max_bytes, check)
        await check(data)
        return data

    async def offer(self, timestamp: bytes) -> bool:
        """Take a timestamp from any courier and everything it leads to. True: something newer is believed now."""
        async with self._lock:
            try:
                changed = await self._refresh(timestamp)
            except EdgeSyncError as exc:
                self.problem = str(exc)
                # What does not verify stays wrong; what could not be fetched may be had later.
                self.incomplete = not isinstance(exc, VerificationError)
                logger.warning("metadata: %s", exc)
                return False
            self.problem, self.incomplete = "", False
        if changed and self.on_change is not None:
            await self.on_change()
        return changed

    async def refresh(self) -> bool:
        """Ask around for a newer timestamp."""
        try:
            timestamp = await self._fetch("timestamp", limits.MAX_TIMESTAMP_BYTES, _anything)
        except EdgeSyncError as exc:
            self.problem = f"no newer metadata: {exc}"
            return False
        return await self.offer(timestamp)

    async def _refresh(self, timestamp: bytes) -> bool:
        update = trust.MetadataUpdate().with_file("timestamp", timestamp)
        for _round in range(MAX_ROUNDS):
            missing = await self._in_thread(trust.wanted, self._store.state, update)
            if not missing:
                break
            for want in missing:
                update = await self._gather(want, update)
        before = self._store.state
        await self._in_thread(self._store.accept, update)
        state = self._store.state
        if state is before:
            return False
        # Building the view verifies every file again: not on the event loop.
        self._view = await self._in_thread(lambda: state.view)
        return True

    async def _gather(self, want: trust.Want, update: trust.MetadataUpdate) -> trust.MetadataUpdate:
        """The update with the file wanted: a courier's if it is sound, else one asked for.

        A root is named by its number alone, so a courier or a member can bring junk under its name; that is seen here,
        while somebody else can still be asked, and not blamed on the timestamp that made it necessary.
        """
        data = self._cache.get(want.name)
        if data is not None:
            try:
                return await self._in_thread(_extended, self._store.state, update, want, data)
            except VerificationError as exc:
                self._cache.pop(want.name, None)
                logger.warning("metadata a courier brought is dropped: %s", exc)

        async def check(data: bytes) -> None:
            await self._in_thread(_extended, self._store.state, update, want, data)

        data = await self._fetch(want.name, want.max_bytes, check)
        try:
            return await self._in_thread(_extended, self._store.state, update, want, data)
        except VerificationError as exc:
            raise NotFoundError(f"nobody in reach has a sound {want.name[:19]}: {exc}") from exc

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(
            self._executor, function, *arguments
        )


async def _anything(_data: bytes) -> None:
    """A timestamp is judged with what it leads to."""


def _extended(
    state: trust.TrustState, update: trust.MetadataUpdate, want: trust.Want, data: bytes
) -> trust.MetadataUpdate:
    """The update with one more file. Raises VerificationError: too large, of another hash, or no root that follows."""
    if len(data) > want.max_bytes:
        raise VerificationError(f"{want.name[:19]} has more than {want.max_bytes} bytes")
    update = update.with_file(want.name, data)
    for root in trust.pending_roots(state, update):
        state = trust.add_root(state, root)
    return update
