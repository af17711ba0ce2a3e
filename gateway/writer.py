"""The daemon's one writer thread: SQLite never runs on the event loop, and our own writes never wait for each other."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Concatenate, ParamSpec, TypeVar

from edgesync.errors import EdgeSyncError
from edgesync.storage.datadir import DataDir
from gateway.store import GatewayStore

logger = logging.getLogger(__name__)

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

    def soon(self, function: Callable[[GatewayStore], object]) -> None:
        """Queue ``function`` without waiting for it: it runs before whatever is asked for later. Errors are logged."""
        store = self._store
        assert store is not None

        def run() -> None:
            try:
                function(store)
            except EdgeSyncError as exc:
                logger.error("%s", exc)  # noqa: TRY400 - the sentence says it all

        self._executor.submit(run)

    async def close(self) -> None:
        """Waits for what is queued."""
        if self._store is not None:
            await self._run(self._store.close)
            self._store = None
        self._executor.shutdown(wait=True)

    async def _run(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function)
