"""A bad path for tests: passes UDP on to one address late and, as its caller decides, not at all. Event loop only."""

import asyncio
from collections.abc import Callable
from typing import Self

Drop = Callable[[int, bool], bool]
"""(number of the datagram in its direction, whether it goes to the server) -> it is lost."""


class SlowPath:
    """Listens on ``address``; each client gets a socket of its own towards the server."""

    def __init__(
        self,
        server: tuple[str, int],
        *,
        delay_s: float = 0.0,
        rate_bytes_s: float = 0.0,
        drop: Drop = lambda _number, _up: False,
    ) -> None:
        """``delay_s`` each way; ``rate_bytes_s`` each way, 0: unlimited. All three may be changed while it runs."""
        self.delay_s = delay_s
        self.rate_bytes_s = rate_bytes_s
        self.drop = drop
        self.up = True
        """While False everything is lost."""
        self.carried = [0, 0]
        """Datagrams towards the client, towards the server; lost ones count."""
        self.address = ("127.0.0.1", 0)
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._free_at = [0.0, 0.0]
        self._listener: asyncio.DatagramTransport | None = None
        self._clients: dict[tuple[str, int], asyncio.DatagramTransport] = {}

    async def __aenter__(self) -> Self:
        self._listener, _ = await self._loop.create_datagram_endpoint(
            lambda: _Side(self._from_client), local_addr=("127.0.0.1", 0)
        )
        self.address = self._listener.get_extra_info("sockname")[:2]
        return self

    async def __aexit__(self, *_: object) -> None:
        for transport in (self._listener, *self._clients.values()):
            if transport is not None:
                transport.close()

    async def _open(self, client: tuple[str, int], first: bytes) -> None:
        def back(data: bytes, _server: tuple[str, int]) -> None:
            if self._listener is not None:
                self._carry(data, self._listener, client, up=False)

        transport, _ = await self._loop.create_datagram_endpoint(
            lambda: _Side(back), remote_addr=self._server
        )
        self._clients[client] = transport
        self._carry(first, transport, None, up=True)

    def _from_client(self, data: bytes, client: tuple[str, int]) -> None:
        transport = self._clients.get(client)
        if transport is None:
            self._opening = self._loop.create_task(self._open(client, data))
        else:
            self._carry(data, transport, None, up=True)

    def _carry(
        self,
        data: bytes,
        transport: asyncio.DatagramTransport,
        to: tuple[str, int] | None,
        *,
        up: bool,
    ) -> None:
        self.carried[up] += 1
        if not self.up or self.drop(self.carried[up], up):
            return
        now = self._loop.time()
        if self.rate_bytes_s:
            self._free_at[up] = max(now, self._free_at[up]) + len(data) / self.rate_bytes_s
            now = self._free_at[up]

        def deliver() -> None:
            if not transport.is_closing():
                transport.sendto(data, to)

        self._loop.call_at(now + self.delay_s, deliver)


class _Side(asyncio.DatagramProtocol):
    def __init__(self, received: Callable[[bytes, tuple[str, int]], None]) -> None:
        self._received = received

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._received(data, addr)

    def error_received(self, exc: Exception) -> None:
        del exc
