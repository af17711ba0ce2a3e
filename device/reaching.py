"""How the gateway is reached: by QUIC where UDP gets through, else over TLS on the TCP port of the same number.

``UdpVerdict`` decides and is pure: time is an argument. ``reach`` acts: it dials by QUIC, and where not a byte of an
answer came for PATIENCE_S, over TLS as well; who first stands wins. When TLS stood and QUIC had heard nothing, UDP is
suspected only: after an outage whichever asks next stands first. A dial begun while TLS serves decides: blocked means
that not a byte came by it and that TLS was heard meanwhile. Blocked is remembered for the network this machine is in,
and UDP is tried again with growing pauses.
"""

import asyncio
import logging
import random
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

from edgesync.errors import EdgeSyncError, PeerTimeoutError, PeerUnreachableError

logger = logging.getLogger(__name__)

PATIENCE_S: Final = 2.5
"""More than a satellite's three round trips of handshake."""
MIN_PAUSE_S: Final = 30.0
MAX_PAUSE_S: Final = 1800.0
PROBE_TIMEOUT_S: Final = 8.0
MAX_NETWORKS: Final = 16
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class UdpVerdict:
    """Whether UDP to the gateway is taken for blocked, per network, and when to look again."""

    def __init__(self, rng: random.Random | None = None) -> None:
        self._rng = rng or random.Random()  # noqa: S311  # spreads probes, guards nothing
        self._doubts: dict[str, _Doubt] = {}

    def is_blocked(self, network: str) -> bool:
        known = self._doubts.get(network)
        return known is not None and known.blocked

    def probe_at(self, network: str) -> float | None:
        """When UDP is worth another try; None: nothing speaks against it."""
        known = self._doubts.get(network)
        return known.probe_at if known else None

    def suspect(self, network: str, *, now: float) -> None:
        """TLS stood first and nothing had come by UDP: it is to be tried at once."""
        if network not in self._doubts:
            self._remember(network, _Doubt(now, 0.0, blocked=False))

    def blocked(self, network: str, *, now: float) -> bool:
        """UDP got no answer while TLS did; True: that is news."""
        news = not self.is_blocked(network)
        self._look_later(network, now, blocked=True)
        return news

    def undecided(self, network: str, *, now: float) -> bool:
        """UDP brought no session, and yet it is not blocked; True: that is news."""
        news = self.is_blocked(network)
        self._look_later(network, now, blocked=False)
        return news

    def _look_later(self, network: str, now: float, *, blocked: bool) -> None:
        known = self._doubts.pop(network, None)
        pause = min(2 * known.pause_s, MAX_PAUSE_S) if known and known.pause_s else MIN_PAUSE_S
        at = now + pause * self._rng.uniform(0.75, 1.25)
        self._remember(network, _Doubt(at, pause, blocked=blocked))

    def _remember(self, network: str, doubt: "_Doubt") -> None:
        self._doubts[network] = doubt
        while len(self._doubts) > MAX_NETWORKS:
            del self._doubts[next(iter(self._doubts))]

    def open(self, network: str) -> bool:
        """UDP was answered; True: that is news."""
        news = self.is_blocked(network)
        self._doubts.pop(network, None)
        return news


@dataclass(frozen=True)
class _Doubt:
    probe_at: float
    pause_s: float
    """What was waited before that; 0: UDP was never tried while TLS served."""
    blocked: bool


class Dial(Protocol[T_co]):
    def __call__(self, *, over_tls: bool, timeout_s: float) -> Awaitable[T_co]: ...


async def reach(
    verdict: UdpVerdict,
    address: tuple[str, int],
    dial: Dial[T],
    *,
    timeout_s: float,
    heard: Callable[[], bool] = lambda: False,
) -> T:
    """What ``dial`` makes of ``address``, whichever way. Raises EdgeSyncError: what one or both ran into.

    ``heard`` says whether anything came by QUIC: then it is slow, and not blocked.
    """
    loop = asyncio.get_running_loop()
    network = network_towards(address)
    probe_at = verdict.probe_at(network)
    if probe_at is not None and loop.time() < probe_at:
        try:
            return await dial(over_tls=True, timeout_s=timeout_s)
        except EdgeSyncError as exc:
            logger.debug("the gateway by TLS at %s:%d: %s", *address, exc)
    return await _race(verdict, network, dial, timeout_s, heard)


async def _race(
    verdict: UdpVerdict, network: str, dial: Dial[T], timeout_s: float, heard: Callable[[], bool]
) -> T:
    loop = asyncio.get_running_loop()
    quic = asyncio.ensure_future(dial(over_tls=False, timeout_s=timeout_s))
    tls: asyncio.Future[T] | None = None
    try:
        await asyncio.wait({quic}, timeout=PATIENCE_S)
        if heard():
            await asyncio.wait({quic})
        if quic.done() and not _is_silence(quic):
            verdict.open(network)
            return quic.result()
        tls = asyncio.ensure_future(dial(over_tls=True, timeout_s=timeout_s))
        pending = {tls} if quic.done() else {quic, tls}
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            if quic in done and not _is_silence(quic):
                verdict.open(network)
                return quic.result()
            if tls in done and tls.exception() is None:
                if heard():
                    pass  # slow, not blocked
                elif verdict.is_blocked(network):
                    verdict.blocked(network, now=loop.time())
                else:
                    verdict.suspect(network, now=loop.time())
                return tls.result()
        if tls.exception() is not None and not _is_silence(tls):
            return tls.result()
        raise PeerUnreachableError(f"by TCP: {tls.exception()}; by UDP: {quic.exception()}")
    finally:
        for task in (quic, tls):
            if task is not None and not task.done():
                task.cancel()
        await asyncio.gather(*(t for t in (quic, tls) if t is not None), return_exceptions=True)


def _is_silence(task: "asyncio.Future[T]") -> bool:
    """Whether a dial ended without an answer: silence, or a network that says it does not let this through."""
    return isinstance(task.exception(), PeerTimeoutError | PeerUnreachableError)


async def probe(
    verdict: UdpVerdict,
    address: tuple[str, int],
    dial: Callable[[], Awaitable[object]],
    *,
    heard: Callable[[], bool] = lambda: False,
    tls_stands: Callable[[], Awaitable[bool]] | None = None,
) -> bool:
    """Try UDP again while TLS serves; True: it gets through.

    ``heard`` says whether anything came by UDP, ``tls_stands`` asks whether TLS is still answered: silence on a path
    that is down for both is an outage and proves nothing.
    """
    loop = asyncio.get_running_loop()
    network = network_towards(address)
    try:
        await dial()
    except (PeerTimeoutError, PeerUnreachableError) as exc:
        if heard():
            logger.debug("by QUIC something came, but no session: %s", exc)
            verdict.undecided(network, now=loop.time())
        elif tls_stands is not None and not await tls_stands():
            logger.debug("neither UDP nor TLS is answered: %s", exc)
        elif verdict.blocked(network, now=loop.time()):
            logger.warning("%s", sentence(address[1]))
        return False
    except EdgeSyncError as exc:
        logger.debug("by QUIC the gateway answered: %s", exc)
        verdict.undecided(network, now=loop.time())
        return False
    if verdict.open(network):
        logger.warning("UDP to the gateway gets through again: using QUIC")
    return True


def sentence(port: int) -> str:
    return f"UDP to the gateway is blocked: using TLS on port {port}"


def network_towards(address: tuple[str, int]) -> str:
    """Names the network by the address this machine has on it; nothing is sent, and no name is resolved."""
    for family, host in ((socket.AF_INET, address[0]), (socket.AF_INET6, address[0])):
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            try:
                sock.connect((host if _is_literal(family, host) else _ANYWHERE[family], 9))
                return str(sock.getsockname()[0])
            except OSError:
                continue
    return ""


_ANYWHERE: Final = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}


def _is_literal(family: int, host: str) -> bool:
    try:
        socket.inet_pton(family, host)
    except OSError:
        return False
    return True
