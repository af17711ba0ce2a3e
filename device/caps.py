"""The caps this device obeys: its own configuration's, and what its gateway signs for it and for its site.

A device's caps hold for all it sends and fetches; a site's for the way out of the site alone: the gateway and peers
that are on no network of this machine. What was signed last is kept in ``state.db``, so that a restart without a
broker changes nothing; it ends by itself. Which cap holds now is ``edgesync.caps``'.
"""

import asyncio
import contextlib
import ipaddress
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import msgspec

from device.state import StateDatabase
from edgesync import caps
from edgesync.transport.congestion.choice import is_near
from edgesync.transport.connection import PeerConnection
from edgesync.transport.throttle import Throttle, floored
from edgesync.wire import mqtt

logger = logging.getLogger(__name__)

LOOK_AGAIN_S: Final = 30.0
"""A clock that was set, or a zone's new data, is noticed by then."""
META_KEY: Final = "caps"
_decoder = msgspec.json.Decoder(mqtt.Caps)


class DeviceCaps:
    """``heard`` and ``site_told`` from the broker; ``obey`` for each connection; ``run`` follows the clock."""

    def __init__(
        self,
        *,
        device_id: str,
        site: str,
        own: Sequence[caps.Cap],
        state: StateDatabase | None,
        in_storage: Callable[..., Awaitable[Any]],
        utc_now: Callable[[], float],
        background: bool = False,
    ) -> None:
        """``background``: leave room to others in all that is sent out of the site."""
        self._device = device_id
        self._site = site
        self._own = list(own)
        self._state = state
        self._in_storage = in_storage
        self._utc_now = utc_now
        self._background = background
        self._message: mqtt.Caps | None = None
        self._changed = asyncio.Event()
        self._total = Throttle()
        self._out = Throttle()
        self._for_all: list[caps.Cap] = []
        self._for_out: list[caps.Cap] = []
        self.problems: list[str] = []
        if state is not None and (kept := state.meta(META_KEY)):
            with contextlib.suppress(msgspec.DecodeError):
                self._message = _decoder.decode(kept)
        self._decide()

    def obey(self, conn: PeerConnection) -> None:
        """Hold a new connection to the caps."""
        if leaves_site(conn):
            throttles = [self._total, self._out]
            if self._background or conn.peer_background:
                conn.yield_to_others()
        else:
            throttles = [self._total]
        conn.send_caps = tuple(one.upload for one in throttles)
        conn.receive_caps = tuple(one.download for one in throttles)

    async def heard(self, message: mqtt.Caps) -> None:
        """A verified message of the gateway; one that is not newer changes nothing."""
        old = self._message
        if old is not None and (message.sequence, message.issued) <= (old.sequence, old.issued):
            return
        self._message = message
        self._decide()
        self._changed.set()
        if self._state is not None:
            await self._in_storage(
                self._state.set_meta, META_KEY, msgspec.json.encode(message).decode()
            )

    def site_told(self, site: str) -> None:
        """The gateway says which site this device is at."""
        if site and site != self._site:
            self._site = site
            self._decide()
            self._changed.set()

    async def run(self) -> None:
        """Obey each change when it comes."""
        while True:
            now = self._utc_now()
            every = [*self._for_all, *self._for_out]
            at = caps.next_change(every, utc_now=now)
            wait = LOOK_AGAIN_S if at is None else min(LOOK_AGAIN_S, max(0.05, at - now))
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._changed.wait()
            self._decide()

    def rows(self) -> list[dict[str, Any]]:
        """What holds now, for status; rates in bytes per second."""
        found = []
        for where, throttle in (("all", self._total), ("out of the site", self._out)):
            for word, held in (("upload", throttle.holds_up), ("download", throttle.holds_down)):
                if held.rate_bytes_s:
                    found.append(
                        {
                            "what": word,
                            "where": where,
                            "rate": held.rate_bytes_s,
                            "until": held.until,
                            "origin": held.origin,
                            "text": str(held),
                        }
                    )
        return found

    def _decide(self) -> None:
        now = self._utc_now()
        self._for_all, self._for_out, self.problems = list(self._own), [], []
        message = self._message
        if message is not None and message.expires > now:
            self._read(message)
        self._total.apply(self._for_all, utc_now=now)
        self._out.apply(self._for_out, utc_now=now)

    def _read(self, message: mqtt.Caps) -> None:
        whole = _cap(
            f"gateway {message.gateway}",
            floored(message.upload_bytes_s or 0),
            floored(message.download_bytes_s or 0),
            caps.UTC,
            expires=message.expires,
        )
        self._for_all.append(whole)
        for entry in message.caps:
            mine = entry.scope == "device" and entry.target == self._device
            ours = entry.scope == "site" and entry.target == self._site
            if not mine and not ours:
                continue
            origin = f"{entry.scope} {entry.target}"
            try:
                cap = _cap(
                    origin,
                    entry.upload,
                    entry.download,
                    entry.zone,
                    until=entry.until,
                    expires=message.expires,
                )
            except ValueError as exc:
                self.problems.append(f"the cap of {origin} cannot be obeyed: {exc}")
                continue
            (self._for_all if mine else self._for_out).append(cap)


def _cap(
    origin: str,
    upload: str | int,
    download: str | int,
    zone: str,
    *,
    expires: float,
    until: float | None = None,
) -> caps.Cap:
    rules = caps.load_zone(zone)
    both = [caps.parse(text, rules, zone) if text else None for text in (upload, download)]
    up, down = (one.floored() if one is not None else None for one in both)
    return caps.Cap(origin, up, down, until, expires)


def own_caps(upload: int | str, download: int | str, zone_name: str) -> list[caps.Cap]:
    """The caps of the configuration."""
    zone = caps.load_zone(zone_name)
    return [
        caps.Cap(
            "configuration",
            caps.parse(upload, zone, zone_name),
            caps.parse(download, zone, zone_name),
        )
    ]


def leaves_site(conn: PeerConnection) -> bool:
    """Whether what the connection carries crosses the border of the site."""
    return conn.peer.role == "gateway" or not is_near(conn.address[0], _networks())


def _networks() -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    import ifaddr

    found: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
    for adapter in ifaddr.get_adapters():
        for ip in adapter.ips:
            address = ip.ip if isinstance(ip.ip, str) else ip.ip[0]
            with contextlib.suppress(ValueError):
                found.append(ipaddress.ip_network((address, ip.network_prefix), strict=False))
    return found


__all__ = ["DeviceCaps", "leaves_site", "own_caps"]
