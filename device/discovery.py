"""Who else of this fleet may be on the LAN: says that we are here by mDNS, and hears the same of others.

Everything heard is a hint from an unauthenticated network: it is bounded here and proved, or not, by a QUIC handshake
elsewhere. zeroconf sends, answers and parses; its browser is not used, since that keeps state for every name it hears.

Invariants, whatever is sent to the multicast group:

* at most MAX_PEER_CANDIDATES peers and MAX_HOSTS host names are remembered; zeroconf's cache is emptied above
  CACHE_RECORDS;
* only addresses on a network of our own interfaces are dialed, at most one dial in MIN_DIAL_INTERVAL_S, with a growing
  pause for one that does not answer; one that proved false is left alone for FALSE_FOR_S;
* what is concluded from a dial holds for that announcement (key, name, address, port) alone: anybody can announce an
  honest peer's key elsewhere, and must not silence it by that;
* no query follows from what is heard: the only questions are the browser's own, on its own schedule;
* questions are asked only while something is wanted.

The agent owns it; ``run`` until cancelled.
"""

import asyncio
import contextlib
import ipaddress
import logging
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import ifaddr
from zeroconf import (
    Error as ZeroconfError,
)
from zeroconf import (
    IPVersion,
    RecordUpdateListener,
    ServiceInfo,
    Zeroconf,
    current_time_millis,
)
from zeroconf._dns import DNSAddress, DNSPointer, DNSQuestion, DNSService, DNSText
from zeroconf._protocol.outgoing import DNSOutgoing
from zeroconf._record_update import RecordUpdate
from zeroconf.asyncio import AsyncZeroconf

from edgesync import limits
from edgesync.ids import PeerKey

logger = logging.getLogger(__name__)

SERVICE: Final = "_edgesync._udp.local."
TXT_VERSION: Final = "1"
FINGERPRINT_CHARS: Final = 16
"""First hex digits of a key: enough to tell peers apart, proved in full by the handshake."""
INTERFACES_EVERY_S: Final = 10.0
FIRST_QUERY_S: Final = 1.0
MAX_QUERY_S: Final = 60.0
MAX_HOSTS: Final = 128
CACHE_RECORDS: Final = 512
FIRST_BACKOFF_S: Final = 4.0
MAX_BACKOFF_S: Final = 600.0
CONNECTED_AGAIN_S: Final = 15.0
"""A peer we have a session with is looked at again after so long: it may have gone and come back."""
FALSE_FOR_S: Final = 3600.0
MAX_PAUSES: Final = 8 * limits.MAX_PEER_CANDIDATES
"""Announcements not dialed for a while; beyond it the oldest is forgotten, which costs one dial."""
POLL_S: Final = 0.25
TTL_S: Final = 120
_TYPE_PTR: Final = 12
_CLASS_IN: Final = 1
_ID: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}\Z")
_FINGERPRINT: Final = re.compile(rf"[0-9a-f]{{{FINGERPRINT_CHARS}}}\Z")

Verdict = Literal["connected", "unreachable", "false", "unwanted"]
"""What became of a candidate: a session; no answer; another machine, or no member; nothing was tried."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A peer that may be there."""

    id: str
    fingerprint: str
    addresses: tuple[tuple[str, int], ...]
    root_version: int = 0
    timestamp_version: int = 0


Announcement = tuple[str, str, str, int]
"""Fingerprint, service name, address, port."""


@dataclass(slots=True)
class _Pause:
    """An announcement that is not dialed for a while."""

    until: float
    failures: int = 0


@dataclass(slots=True)
class _Instance:
    """What was heard under one service name; any part may be missing still."""

    host: str = ""
    port: int = 0
    txt: dict[str, str] | None = None
    next_dial: float = 0.0
    failures: int = 0
    turn: int = 0


def parse_txt(data: bytes) -> dict[str, str] | None:
    """The keys we know of a TXT record. None: too long, not ours, or not understood."""
    if len(data) > limits.MAX_TXT_BYTES:
        return None
    found: dict[str, str] = {}
    at = 0
    while at < len(data):
        length = data[at]
        entry = data[at + 1 : at + 1 + length]
        at += 1 + length
        key, equals, value = entry.partition(b"=")
        if equals:
            with contextlib.suppress(UnicodeDecodeError):
                found.setdefault(key.decode("ascii"), value.decode("ascii"))
    if (
        found.get("v") != TXT_VERSION
        or not _ID.match(found.get("id", ""))
        or not _FINGERPRINT.match(found.get("fp", ""))
    ):
        return None
    return found


def _number(text: str | None) -> int:
    return (
        int(text)
        if text is not None and text.isascii() and text.isdigit() and len(text) < 10
        else 0
    )


class Sightings:
    """The bounded memory of what was heard. No I/O; times are monotonic seconds."""

    def __init__(self, own_fingerprint: str) -> None:
        self._own = own_fingerprint
        self._instances: OrderedDict[str, _Instance] = OrderedDict()
        self._hosts: OrderedDict[str, tuple[str, ...]] = OrderedDict()
        self._pauses: OrderedDict[Announcement, _Pause] = OrderedDict()
        self.networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
        """What counts as on-link."""

    def __len__(self) -> int:
        return len(self._instances)

    def _instance(self, name: str) -> _Instance | None:
        instance = self._instances.get(name)
        if instance is None:
            if len(self._instances) >= limits.MAX_PEER_CANDIDATES and not self._evict():
                return None
            instance = self._instances[name] = _Instance()
        return instance

    def _evict(self) -> bool:
        """Make room: one that is incomplete, else one that failed. Peers that answered stay through any flood."""
        for name, instance in self._instances.items():
            if instance.txt is None or not instance.port:
                del self._instances[name]
                return True
        worst = max(self._instances, key=lambda name: self._instances[name].failures)
        if not self._instances[worst].failures:
            return False
        del self._instances[worst]
        return True

    def service(self, name: str, host: str, port: int) -> None:
        if not name.endswith("." + SERVICE) or not 0 < port < 65_536 or len(host) > 255:
            return
        instance = self._instance(name)
        if instance is not None:
            instance.host, instance.port = host.lower(), port

    def text(self, name: str, data: bytes) -> None:
        if not name.endswith("." + SERVICE):
            return
        parsed = parse_txt(data)
        if parsed is None or parsed["fp"] == self._own:
            self._instances.pop(name, None)
            return
        instance = self._instance(name)
        if instance is not None:
            if instance.txt is not None and instance.txt["fp"] != parsed["fp"]:
                instance.next_dial = 0.0
            instance.txt = parsed

    def address(self, host: str, address: str) -> None:
        host = host.lower()
        known = self._hosts.get(host)
        if known is None:
            while len(self._hosts) >= MAX_HOSTS:
                self._hosts.popitem(last=False)
            known = ()
        if address not in known:
            known = (address, *known)[:4]
        self._hosts[host] = known

    def gone(self, name: str) -> None:
        """A goodbye: anybody can send one, so it only lets the entry be evicted."""
        instance = self._instances.get(name)
        if instance is not None:
            instance.failures += 1

    def on_link(self, address: str) -> bool:
        try:
            ip = ipaddress.ip_address(address)
        except ValueError:
            return False
        return any(ip in network for network in self.networks)

    def next_candidate(self, *, now: float) -> tuple[str, Candidate] | None:
        """The peer to dial now, with one address; None: nobody is due."""
        best: str | None = None
        for name, instance in self._instances.items():
            if instance.txt is None or not instance.port or instance.next_dial > now:
                continue
            if not self._usable(name, instance, now=now):
                continue
            if best is None or instance.failures < self._instances[best].failures:
                best = name
        if best is None:
            return None
        instance = self._instances[best]
        assert instance.txt is not None
        usable = self._usable(best, instance, now=now)
        instance.turn += 1
        address = usable[instance.turn % len(usable)]
        return best, Candidate(
            instance.txt["id"],
            instance.txt["fp"],
            ((address, instance.port),),
            _number(instance.txt.get("root")),
            _number(instance.txt.get("timestamp")),
        )

    def _usable(self, name: str, instance: _Instance, *, now: float) -> list[str]:
        """Its addresses that may be dialed now."""
        assert instance.txt is not None
        usable = []
        for address in self._hosts.get(instance.host, ()):
            pause = self._pauses.get((instance.txt["fp"], name, address, instance.port))
            if (pause is None or pause.until <= now) and self.on_link(address):
                usable.append(address)
        return usable

    def settle(self, name: str, candidate: Candidate, verdict: Verdict, *, now: float) -> None:
        """What became of a dial."""
        instance = self._instances.get(name)
        announced: list[Announcement] = [
            (candidate.fingerprint, name, address, port) for address, port in candidate.addresses
        ]
        if verdict in {"false", "unreachable"}:
            for one in announced:
                pause = self._pauses.pop(one, None) or _Pause(now)
                if verdict == "false":
                    pause.until = now + FALSE_FOR_S
                else:
                    wait = min(FIRST_BACKOFF_S * 2.0**pause.failures, MAX_BACKOFF_S)
                    pause.until = now + wait
                pause.failures = min(pause.failures + 1, 16)
                self._pauses[one] = pause
            while len(self._pauses) > MAX_PAUSES:
                self._pauses.popitem(last=False)
            if instance is not None:
                instance.failures = min(instance.failures + 1, 16)
            return
        if verdict == "connected":
            for one in announced:
                self._pauses.pop(one, None)
        if instance is not None:
            if verdict == "connected":
                instance.failures = 0
            instance.next_dial = now + CONNECTED_AGAIN_S

    def forget_pauses(self) -> None:
        """Something is wanted anew: peers left for a while are due again, failed and false ones are not."""
        for instance in self._instances.values():
            instance.next_dial = 0.0


class _Listener(RecordUpdateListener):
    """Hears every record zeroconf takes in, and keeps its cache small."""

    def __init__(self, sightings: Sightings) -> None:
        self._sightings = sightings
        self._zeroconf: Zeroconf | None = None

    def async_update_records(self, zc: Zeroconf, now: float, records: "list[RecordUpdate]") -> None:
        self._zeroconf = zc
        for update in records:
            record = update.new
            if isinstance(record, DNSService):
                if not record.is_expired(now):
                    self._sightings.service(record.name, record.server, record.port)
            elif isinstance(record, DNSText):
                if not record.is_expired(now):
                    self._sightings.text(record.name, record.text)
            elif isinstance(record, DNSAddress):
                if not record.is_expired(now):
                    with contextlib.suppress(ValueError):
                        address = ipaddress.ip_address(record.address)
                        self._sightings.address(record.name, str(address))
            elif isinstance(record, DNSPointer) and record.is_expired(now):
                self._sightings.gone(record.alias)

    def async_update_records_complete(self) -> None:
        if self._zeroconf is None:
            return
        cache = self._zeroconf.cache
        if cache._total_records > CACHE_RECORDS:  # noqa: SLF001  # there is no public count of records
            # What is worth knowing is in the sightings; a flood must find nothing that grows.
            for name in list(cache.names()):
                cache.async_remove_records(list(cache.entries_with_name(name)))
            cache.async_expire(current_time_millis())


class _OneSentence(logging.Filter):
    """zeroconf logs a traceback when a network goes away beneath one of its sockets, which is daily life here."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, OSError):
            record.msg = "mDNS could not be sent, the network of this machine may have changed: %s"
            record.args = (error.strerror or str(error),)
            record.exc_info = record.exc_text = None
        return True


_one_sentence: Final = _OneSentence()


class Discovery:
    """``on_candidate`` dials one candidate and says what became of it; ``wanted`` says whether to look at all."""

    def __init__(
        self,
        *,
        device_id: str,
        key: PeerKey,
        port: int,
        interface: str = "",
        versions: Callable[[], tuple[int, int]] = lambda: (0, 0),
        wanted: Callable[[], bool],
        on_candidate: Callable[[Candidate], Awaitable[Verdict]],
    ) -> None:
        self._id = device_id
        self._fingerprint = key[:FINGERPRINT_CHARS]
        self._port = port
        self._interface = interface
        self._versions = versions
        self._wanted = wanted
        self._on_candidate = on_candidate
        self.sightings = Sightings(self._fingerprint)
        self.dials = 0
        """Candidates handed out to be dialed, for tests and screens."""
        self._zeroconf: AsyncZeroconf | None = None
        self._info: ServiceInfo | None = None
        self._scan_now = False
        self._announced: tuple[int, int] = (-1, -1)
        self._addresses: tuple[str, ...] = ()
        self._announcing: set[asyncio.Future[None]] = set()

    async def run(self) -> None:
        """Announce and look until cancelled; a network that is not there yet is waited for."""
        loop = asyncio.get_running_loop()
        scan_at = query_at = dial_at = 0.0
        query_pause = FIRST_QUERY_S
        was_wanted = False
        try:
            while True:
                now = loop.time()
                if now >= scan_at or self._scan_now:
                    self._scan_now = False
                    scan_at = now + INTERFACES_EVERY_S
                    await self._follow_interfaces()
                    await self._follow_versions()
                wanted = self._wanted()
                if wanted and not was_wanted:
                    self.sightings.forget_pauses()
                    query_at, query_pause = now, FIRST_QUERY_S
                was_wanted = wanted
                if wanted and now >= query_at:
                    self._query()
                    query_at = now + query_pause
                    query_pause = min(query_pause * 2, MAX_QUERY_S)
                if wanted and now >= dial_at:
                    found = self.sightings.next_candidate(now=now)
                    if found is not None:
                        dial_at = now + limits.MIN_DIAL_INTERVAL_S
                        if await self._dial(*found) in {"connected", "unwanted"}:
                            # A session that was there already cost no dial.
                            continue
                await asyncio.sleep(POLL_S)
        finally:
            await self._stop()

    def interfaces_changed(self) -> None:
        """Look at once: there may be another network."""
        self._scan_now = True

    async def _dial(self, name: str, candidate: Candidate) -> Verdict:
        self.dials += 1
        verdict = await self._on_candidate(candidate)
        logger.debug("mDNS candidate %s: %s", candidate.id, verdict)
        now = asyncio.get_running_loop().time()
        self.sightings.settle(name, candidate, verdict, now=now)
        return verdict

    # --- interfaces

    def _scan(self) -> tuple[tuple[str, ...], list[ipaddress.IPv4Network | ipaddress.IPv6Network]]:
        """Our IPv4 addresses to speak on, and the networks that count as on-link."""
        addresses: list[str] = []
        loopback: list[str] = []
        networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
        for adapter in ifaddr.get_adapters():
            for ip in adapter.ips:
                text = ip.ip if isinstance(ip.ip, str) else ip.ip[0]
                if self._interface not in {"", adapter.name, adapter.nice_name, text}:
                    continue
                parsed = ipaddress.ip_address(text)
                if parsed.version == 4:
                    (loopback if parsed.is_loopback else addresses).append(text)
                if parsed.is_loopback and not self._interface:
                    continue
                networks.append(ipaddress.ip_network((text, ip.network_prefix), strict=False))
        return tuple(sorted(addresses) or sorted(loopback)), networks

    async def _follow_interfaces(self) -> None:
        """Begin anew when our interfaces changed: zeroconf does not see ones that appear or go."""
        addresses, networks = await asyncio.to_thread(self._scan)
        self.sightings.networks = networks
        if addresses == self._addresses and (self._zeroconf is not None or not addresses):
            return
        await self._stop()
        self._addresses = addresses
        if not addresses:
            return
        try:
            await self._start(addresses)
        except (OSError, ZeroconfError) as exc:
            logger.warning("mDNS cannot be used on %s: %s", ", ".join(addresses), exc)
            await self._stop()
            self._addresses = ()

    async def _start(self, addresses: Sequence[str]) -> None:
        logging.getLogger("zeroconf").addFilter(_one_sentence)
        self._zeroconf = AsyncZeroconf(
            interfaces=list(addresses), ip_version=IPVersion.V4Only, apple_p2p=False
        )
        await self._zeroconf.zeroconf.async_wait_for_start()
        self._zeroconf.zeroconf.async_add_listener(_Listener(self.sightings), None)
        self._announced = self._versions()
        self._info = self._service(addresses)
        # A name of two machines is told apart by the key's fingerprint, so the name need not be defended for long.
        self._follow(
            await self._zeroconf.async_register_service(self._info, cooperating_responders=True)
        )

    def _follow(self, announcing: Awaitable[None]) -> None:
        """Announcements go on for a while after the call; what they run into is one line."""
        task = asyncio.ensure_future(announcing)
        self._announcing.add(task)
        task.add_done_callback(self._announced_all)

    def _announced_all(self, task: "asyncio.Future[None]") -> None:
        self._announcing.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            said = str(error) or type(error).__name__
            logger.warning("mDNS could not announce this device: %s", said)

    def _service(self, addresses: Sequence[str]) -> ServiceInfo:
        root, timestamp = self._announced
        return ServiceInfo(
            SERVICE,
            f"{self._id[:40]}-{self._fingerprint[:8]}.{SERVICE}",
            parsed_addresses=list(addresses)[:8],
            port=self._port,
            properties={
                "v": TXT_VERSION,
                "id": self._id,
                "fp": self._fingerprint,
                "root": str(root),
                "timestamp": str(timestamp),
            },
            server=f"{self._fingerprint}.local.",
            host_ttl=TTL_S,
            other_ttl=TTL_S,
        )

    async def _follow_versions(self) -> None:
        if self._zeroconf is None or self._info is None or self._versions() == self._announced:
            return
        self._announced = self._versions()
        self._info = self._service(self._addresses)
        with contextlib.suppress(OSError, ZeroconfError):
            self._follow(await self._zeroconf.async_update_service(self._info))

    def _query(self) -> None:
        if self._zeroconf is None:
            return
        out = DNSOutgoing(0)
        out.add_question(DNSQuestion(SERVICE, _TYPE_PTR, _CLASS_IN))
        with contextlib.suppress(OSError, ZeroconfError):
            self._zeroconf.zeroconf.async_send(out)

    async def _stop(self) -> None:
        if self._zeroconf is not None:
            closing, self._zeroconf, self._info = self._zeroconf, None, None
            for task in self._announcing:
                task.cancel()
            with contextlib.suppress(OSError, ZeroconfError, TimeoutError):
                await closing.async_unregister_all_services()
            with contextlib.suppress(OSError, ZeroconfError, TimeoutError):
                await closing.async_close()


__all__ = ["SERVICE", "Candidate", "Discovery", "Sightings", "Verdict", "parse_txt"]
