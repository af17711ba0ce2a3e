"""Says when this machine's links, addresses or routes changed: nobody need wait out a long pause once a cable is back.

The kernel tells (rtnetlink); where it does not, the addresses are looked at every POLL_S. It costs nothing while
nothing changes. It does not say whether anybody can be reached: who is told tries.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from typing import Final

import ifaddr

logger = logging.getLogger(__name__)

SETTLE_S: Final = 0.3
"""Changes come in bursts: link, address, route."""
POLL_S: Final = 10.0
_LINK: Final = 0x1
_IPV4_ADDRESS: Final = 0x10
_IPV4_ROUTE: Final = 0x40
_IPV6_ADDRESS: Final = 0x100
_IPV6_ROUTE: Final = 0x400
"""RTMGRP_* of linux/rtnetlink.h."""
_ANYWHERE: Final = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))
"""Documentation addresses: a connected UDP socket towards them names the default route's source; nothing is sent."""

View = tuple[tuple[str, ...], tuple[str, ...]]
"""Source addresses of the default routes; all addresses but loopback's."""


def view() -> View:
    """How this machine stands in its networks."""
    sources = []
    for family, address in _ANYWHERE:
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((address, 9))
            sources.append(str(sock.getsockname()[0]))
    addresses = {
        f"{adapter.name} {ip.ip}" for adapter in ifaddr.get_adapters() for ip in adapter.ips
    }
    return tuple(sources), tuple(sorted(a for a in addresses if not a.startswith("lo ")))


async def follow(changed: Callable[[], None]) -> None:
    """Call ``changed`` after each change that leaves this machine with an address. Runs until cancelled."""
    news = asyncio.Event()
    with contextlib.ExitStack() as stack:
        told = _listen(stack, news)
        known = await asyncio.to_thread(view)
        while True:
            if told:
                await news.wait()
                await asyncio.sleep(SETTLE_S)
                news.clear()
            else:
                await asyncio.sleep(POLL_S)
            seen = await asyncio.to_thread(view)
            if seen != known:
                known = seen
                logger.debug("the network changed: %s", seen)
                if any(seen):
                    changed()


def _listen(stack: contextlib.ExitStack, news: asyncio.Event) -> bool:
    """Have ``news`` set at each change; False: the kernel does not tell."""
    loop = asyncio.get_running_loop()
    try:
        kernel = stack.enter_context(_subscribe())
    except OSError as exc:
        logger.debug("the kernel tells no network changes: %s", exc)
        return False
    loop.add_reader(kernel.fileno(), _drain, kernel, news)
    stack.callback(loop.remove_reader, kernel.fileno())
    return True


def _subscribe() -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
    try:
        sock.bind((0, _LINK | _IPV4_ADDRESS | _IPV4_ROUTE | _IPV6_ADDRESS | _IPV6_ROUTE))
    except OSError:
        sock.close()
        raise
    return sock


def _drain(sock: socket.socket, news: asyncio.Event) -> None:
    """What it says is read anew from the kernel, so an overflow (ENOBUFS) is news like any other."""
    with contextlib.suppress(OSError):
        while sock.recv(65_536):
            pass
    news.set()
