"""Assignment sets on their way in: one that cannot be taken now is kept, said in status, and tried again.

It judges nothing: ``accept`` verifies and stores. The newest refused set is kept, in memory only: after a restart the
broker or the gateway brings it again. Called by ``device.agent``; event loop only.
"""

from collections.abc import Awaitable, Callable, Iterable

from edgesync.assignment import Entry
from edgesync.errors import EdgeSyncError, RollbackRefusedError, StorageError


class Orders:
    def __init__(
        self,
        *,
        accept: Callable[[bytes], Awaitable[Iterable[Entry]]],
        want: Callable[[Iterable[Entry]], None],
        make_room: Callable[[], None],
    ) -> None:
        """``accept`` raises EdgeSyncError: refused, or not stored. ``make_room`` is called where the disk refused."""
        self._accept = accept
        self._want = want
        self._make_room = make_room
        self._refused: bytes | None = None
        self.problem = ""
        """Why the newest set is not obeyed, for status; empty when it is."""

    async def offered(self, data: bytes) -> None:
        """Obey a set. Raises EdgeSyncError: it cannot be taken; ``refused`` then keeps it for another try."""
        entries = await self._accept(data)
        self._refused, self.problem = None, ""
        self._want(entries)

    def refused(self, data: bytes, error: EdgeSyncError) -> None:
        """Say why, and keep it: the disk gets room, the clock right, the signer known."""
        self._refused = data
        self.problem = f"an assignment cannot be taken now: {error}"
        if isinstance(error, StorageError):
            self._make_room()

    async def try_again(self) -> None:
        """Offer what was refused once more, if there is something."""
        data = self._refused
        if data is None:
            return
        try:
            await self.offered(data)
        except RollbackRefusedError:
            if self._refused is data:
                self._refused, self.problem = None, ""  # a newer one was taken meanwhile
        except EdgeSyncError as exc:
            if self._refused is data:
                self.refused(data, exc)
