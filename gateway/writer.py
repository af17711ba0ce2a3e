"""The daemon's one writer thread: SQLite never runs on the event loop, and our own writes never wait for each other."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Concatenate, ParamSpec, TypeVar

from edgesync.storage.datadir import DataDir
from gateway.store import GatewayStore

P = ParamSpec("P")
T = TypeVar("T")


class Writer:
    """Owns the daemon's GatewayStore; ``await writer(function, …)`` runs ``function(store, …)`` in its thread."""

    def __init__(self, datadir: DataDir) -> None:
        self._executor = ThreadPoolExecutor(1, "gateway-writer")
        self._datadir = datadir
        self._store: GatewayStore | None = None

    async def open(self) -> None:
        """Raises what ``GatewayStore.open`` raises."""
        self._store = await self._run(lambda: GatewayStore.open(self._datadir))

    async def __call__(
        self, function: Callable[Concatenate[GatewayStore, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        store = self._store
        assert store is not None
        return await self._run(lambda: function(store, *args, **kwargs))

    async def close(self) -> None:
        """Waits for what is queued."""
        if self._store is not None:
            await self._run(self._store.close)
            self._store = None
        self._executor.shutdown(wait=True)

    async def _run(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function)
