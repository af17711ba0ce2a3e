"""Carries MQTT from the gateway's TLS port to an external broker, for devices that cannot reach the broker's port.

Bytes go through unread: TLS is between device and broker, who judge each other's certificates as ever. What it does
not do: parse TLS or MQTT, count messages, reconnect. Bounds: connections in all and per source, fewer and for a short
time until the broker has answered as it answers members only, one chunk of MAX_CHUNK_BYTES per direction, and an end
for every silence. A source where it has lately so answered a client, and kept it, is *known*: it has more places for
connections that are not proven yet, beside those of strangers: a site behind one address comes back at once.

Called by ``gateway.daemon``.
"""

import asyncio
import contextlib
import logging
import socket
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Final

from edgesync import limits
from edgesync.io.broker_url import BrokerAddress
from edgesync.transport.udp import source_key

logger = logging.getLogger(__name__)

MAX_CHUNK_BYTES: Final = 16 * limits.KIB
CONNECT_TIMEOUT_S: Final = 10.0
SILENCE_S: Final = 2.0 * limits.MAX_MQTT_KEEPALIVE_S
MAX_PER_ADDRESS: Final = limits.MAX_MQTT_CLIENTS // 4
"""A whole site may come from behind one address."""


class MqttRelay:
    def __init__(self, broker: BrokerAddress) -> None:
        self._broker = broker
        self._tasks: set[asyncio.Task[None]] = set()
        self._by_source: Counter[str] = Counter()
        self._strangers: Counter[str] = Counter()
        self._returning: Counter[str] = Counter()
        """Not proven yet, from unknown and from known sources."""
        self._known: OrderedDict[str, float] = OrderedDict()
        """When a client there was last known to be a member, on the loop's clock."""
        self.refused = 0

    @property
    def unproven(self) -> int:
        return self._strangers.total() + self._returning.total()

    def adopt(self, connection: socket.socket, host: str) -> None:
        """Relay a TCP connection from ``host`` of which nothing was read yet."""
        source = source_key((host, 0))
        places = self._places(source)
        if (
            places is None
            or len(self._tasks) >= limits.MAX_MQTT_CLIENTS
            or self._by_source[source] >= MAX_PER_ADDRESS
            or not self._broker.tls
        ):
            self.refused += 1
            connection.close()
            return
        self._by_source[source] += 1
        places[source] += 1
        task = asyncio.ensure_future(self._relay(connection, host, source, places))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def is_known(self, source: str) -> bool:
        """Whether the broker has lately let a client in from ``source`` (``source_key`` of its address)."""
        seen = self._known.get(source)
        now = asyncio.get_running_loop().time()
        return seen is not None and now - seen < limits.RELAY_KNOWN_S

    def _places(self, source: str) -> Counter[str] | None:
        """Where one more from ``source`` counts until it is proven; None: there is no place."""
        if (
            self.is_known(source)
            and self._returning.total() < limits.MAX_RELAY_UNPROVEN_KNOWN
            and self._returning[source] < limits.MAX_RELAY_UNPROVEN_PER_KNOWN_ADDRESS
        ):
            return self._returning
        if (
            self._strangers.total() < limits.MAX_RELAY_UNPROVEN
            and self._strangers[source] < limits.MAX_RELAY_UNPROVEN_PER_ADDRESS
        ):
            return self._strangers
        return None

    def _know(self, source: str) -> None:
        self._known.pop(source, None)
        self._known[source] = asyncio.get_running_loop().time()
        while len(self._known) > limits.MAX_RELAY_KNOWN_ADDRESSES:
            self._known.popitem(last=False)

    async def close(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _relay(
        self, near: socket.socket, host: str, source: str, places: Counter[str]
    ) -> None:
        far: socket.socket | None = None
        proof = _Proof()
        proof.given.add_done_callback(lambda _: _less(places, source))
        loop = asyncio.get_running_loop()
        deadline = loop.time() + limits.RELAY_UNPROVEN_TIMEOUT_S
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                far = await self._connect()
            tasks = {
                asyncio.ensure_future(_copy(near, far, proof.asked)),
                asyncio.ensure_future(_copy(far, near, proof.answered)),
            }
            try:
                await asyncio.wait(
                    {*tasks, proof.given},
                    timeout=max(0.0, deadline - loop.time()),
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if proof.given.done():
                    await self._await_end(tasks, source)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        except (OSError, TimeoutError) as exc:
            logger.info("mqtt for %s cannot be relayed to %s: %s", host, self._broker, exc)
        finally:
            near.close()
            if far is not None:
                far.close()
            proof.given.cancel()
            _less(self._by_source, source)

    async def _await_end(self, tasks: set[asyncio.Task[None]], source: str) -> None:
        """Of a proven client: from one that stays its source is known, now and anew when it goes."""
        ended, _ = await asyncio.wait(
            tasks, timeout=limits.RELAY_STAYED_S, return_when=asyncio.FIRST_COMPLETED
        )
        if not ended:
            self._know(source)
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            self._know(source)

    async def _connect(self) -> socket.socket:
        loop = asyncio.get_running_loop()
        error: OSError = OSError("the broker has no address")
        found = await loop.getaddrinfo(
            self._broker.host, self._broker.port, type=socket.SOCK_STREAM
        )
        for family, kind, number, _, address in found[:4]:
            far = socket.socket(family, kind, number)
            far.setblocking(False)
            try:
                await loop.sock_connect(far, address)
            except OSError as exc:
                error = exc
                far.close()
            except BaseException:
                far.close()
                raise
            else:
                return far
        raise error


class _Proof:
    """Counts the broker's answers: the last that a stranger can get is the third, which says why it must go."""

    def __init__(self) -> None:
        self.given: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._answers = 0
        self._waits = False

    def asked(self) -> None:
        self._waits = True

    def answered(self) -> None:
        self._answers += self._waits
        self._waits = False
        if self._answers >= limits.RELAY_PROVEN_ANSWERS and not self.given.done():
            self.given.set_result(None)


def _less(counter: Counter[str], source: str) -> None:
    counter[source] -= 1
    if not counter[source]:
        del counter[source]


async def _copy(source: socket.socket, sink: socket.socket, moved: Callable[[], None]) -> None:
    """Until either end closes, or nothing moves for SILENCE_S; ``moved`` is told of each chunk that came."""
    loop = asyncio.get_running_loop()
    with contextlib.suppress(OSError, TimeoutError):
        while True:
            async with asyncio.timeout(SILENCE_S):
                data = await loop.sock_recv(source, MAX_CHUNK_BYTES)
                if not data:
                    return
                moved()
                await loop.sock_sendall(sink, data)
