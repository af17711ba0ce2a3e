"""One budget for everything remote peers can make this process hold on account of received bytes.

Every window granted to a peer is reserved here before it is granted, so the sum over connections, streams and
reassembly never passes the total. Event loop only; nothing blocks except ``reserve_soon``, which waits its turn.
"""

import asyncio
from collections import deque

from edgesync import limits


class Budget:
    def __init__(self, total: int = limits.REASSEMBLY_BUDGET_BYTES) -> None:
        self.total = total
        self.used = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    def reserve(self, size: int) -> bool:
        """Take ``size`` bytes now, or nothing. Those who wait go first."""
        if self._waiting or self.used + size > self.total:
            return False
        self.used += size
        return True

    async def reserve_soon(self, size: int) -> None:
        """Take ``size`` bytes, waiting in line for them. Raises ValueError: more than there is in all."""
        if size > self.total:
            raise ValueError(f"{size} bytes are more than the whole budget of {self.total}")
        if self.reserve(size):
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (size, turn)
        self._waiting.append(entry)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release(size)  # it was granted in the same breath
            else:
                self._waiting.remove(entry)
                self._serve()
            raise

    def release(self, size: int) -> None:
        self.used -= size
        self._serve()

    def _serve(self) -> None:
        while self._waiting:
            size, turn = self._waiting[0]
            if self.used + size > self.total:
                return
            self._waiting.popleft()
            self.used += size
            turn.set_result(None)
