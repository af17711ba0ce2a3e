"""One lasting link to an MQTT broker: connects, connects again, and never makes its caller wait for a dead broker.

What it hides of aiomqtt and paho: they acknowledge a message before the program sees it and drop it when their queue
is full (here: the newest per retained topic is kept, and what had to go is asked for again); they do not reconnect;
``publish`` hangs while a broker dies; a packet of 256 MB is read to the end. What it does not do: decide, sign, verify,
store. The broker is a courier: what must arrive is acknowledged by the other end, not by the broker.

Invariants:

* the broker is authenticated by the public key of its certificate, never by chain or name; over ``mqtt://`` it is not
  authenticated at all, which is allowed on loopback only;
* every wait has an end: connecting, publishing, subscribing, closing;
* sessions are clean: each connect subscribes again, then calls ``on_connect``, which says everything again.

Called by ``device.agent`` and ``gateway.daemon``; one instance per event loop task.
"""

import asyncio
import contextlib
import functools
import logging
import math
import random
import ssl
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Self, cast

import aiomqtt
from paho.mqtt.client import Client as PahoClient

from edgesync import limits
from edgesync.config import HostPort
from edgesync.errors import EdgeSyncError, ProtocolError
from edgesync.identity import Identity, certificate_key
from edgesync.ids import PeerKey
from edgesync.io.broker_url import BrokerAddress, parse_broker_url
from edgesync.io.outage_log import DetourLog, OutageLog
from edgesync.io.proxy import ProxySettings, open_tunnel
from edgesync.io.proxy import connect as connect_tcp
from edgesync.io.tcp import connect_in_short_segments
from edgesync.io.tls import load_identity
from edgesync.wire.topics import Kind, Topic, check_size, parse

logger = logging.getLogger(__name__)
# What the libraries call errors are ordinary events of a link that comes and goes; it tells them once, as a sentence.
_library_logger = logging.getLogger(f"{__name__}.library")
_library_logger.setLevel(logging.CRITICAL)

# The packet cap and closing after a failed connect reach below paho's public surface: fail at import, not in the field.
for _name in ("_sock_recv", "_sock_close", "_create_socket_connection"):
    if not hasattr(PahoClient, _name):
        raise ImportError(f"paho-mqtt no longer has {_name}, which edgesync.io.mqtt relies on")

SOON_AGAIN = 2
"""Failures that still count after a connection that was up."""
LOOK_SPREAD = (0.75, 1.25)
"""Of the pauses between looks at the broker's own port: a fleet does not look as one."""
FIFO_KINDS = frozenset({Kind.CMD, Kind.REPORT, Kind.RSP, Kind.AGGREGATE})
"""Each of these counts; of every other kind only the newest per topic does."""


@dataclass(frozen=True, kw_only=True)
class LinkConfig:
    """Times in seconds. The defaults suit a fleet; tests and the demo use shorter ones."""

    min_backoff_s: float = 1.0
    max_backoff_s: float = 300.0
    """The wait after the n-th failure is uniform in (0, min(max, min * 2^n)): a fleet does not return as one."""
    settled_s: float = 30.0
    """A connection that lived this long starts the back-off anew."""
    keepalive_s: int = 60
    connect_timeout_s: float = 20.0
    """For each step, TCP, TLS, CONNACK, SUBACK: two seconds of round trip and a lost packet or two on each."""
    publish_timeout_s: float = 20.0
    """A broker that acknowledges nothing and says nothing for so long is taken for dead: the link connects again."""
    max_queued_messages: int = limits.MAX_MQTT_QUEUED_MESSAGES
    max_queued_bytes: int = limits.MAX_MQTT_QUEUED_BYTES
    max_publishing: int = 32
    min_detour_s: float = 30.0
    """The first look whether the broker's own port answers again while another serves; each later one waits longer. A
    detour that is no shorter is worth a warning."""
    max_detour_s: float = 1800.0

    @classmethod
    def for_gateway(cls) -> Self:
        """With room for one state, one progress and some reports of every device, and soon back: it is only one."""
        return cls(
            max_backoff_s=30.0,
            max_queued_messages=2 * limits.MAX_MQTT_RETAINED,
            max_queued_bytes=64 * limits.MIB,
        )


@dataclass(frozen=True)
class Will:
    """What the broker says for us when we are gone without a goodbye."""

    topic: str
    payload: bytes
    retain: bool = True


@dataclass(frozen=True, slots=True)
class Incoming:
    """One message, within the size cap of its topic; nothing in it is verified yet."""

    topic: Topic
    payload: bytes
    retained: bool


class Published(Enum):
    """What became of a message. Only SENT means that the broker has it, and not that it will keep it."""

    SENT = "sent"
    NOT_CONNECTED = "not connected"
    LOST = "connection lost"
    TIMED_OUT = "timed out"

    def __bool__(self) -> bool:
        return self is Published.SENT


@dataclass(frozen=True, kw_only=True)
class LinkStatus:
    """What a status screen prints."""

    connected: bool
    broker: str
    last_error: str
    """Empty while connected."""
    last_connected: float | None
    """Unix time of the last moment the link was known to be up."""
    retry_in_s: float | None
    queued: int
    dropped: int
    detour: str = ""
    """A sentence while the broker is reached by the gateway's TLS port instead of its own."""


def client_context(
    identity: Identity,
    allowed_keys: Callable[[], Collection[PeerKey]],
    *,
    handshake_timeout_s: float = 10.0,
    alpn: str = "",
) -> ssl.SSLContext:
    """TLS 1.3 with our certificate, towards a server whose certificate holds one of the allowed public keys.

    OpenSSL proves that the server has the private half; chain, name and dates are not looked at.
    """

    class PinnedSocket(ssl.SSLSocket):
        def do_handshake(self, block: bool = False) -> None:
            self.settimeout(handshake_timeout_s)
            super().do_handshake(block)
            presented = self.getpeercert(binary_form=True)
            try:
                key = certificate_key(presented) if presented else None
            except (EdgeSyncError, ValueError):
                key = None
            if key is None or key not in allowed_keys():
                raise ssl.SSLCertVerificationError(
                    "the broker shows a key that no gateway of this fleet has"
                )

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.sslsocket_class = PinnedSocket
    if alpn:
        context.set_alpn_protocols([alpn])
    load_identity(context, identity)
    return context


class Inbox:
    """Bounded queue of what arrived. Of a latest-wins topic only the newest waits; an overflow is remembered."""

    def __init__(self, *, max_messages: int, max_bytes: int) -> None:
        self.max_messages = max_messages
        self.max_bytes = max_bytes
        self.dropped = 0
        self.missed_retained = False
        self._waiting: OrderedDict[tuple[str, int], Incoming] = OrderedDict()
        self._bytes = 0
        self._counter = 0
        self._filled = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, message: Incoming) -> bool:
        """False: there was no room, and the message is gone."""
        key = (str(message.topic), 0)
        if message.topic.kind in FIFO_KINDS:
            self._counter += 1
            key = (key[0], self._counter)
        old = self._waiting.get(key)
        size = self._bytes + len(message.payload) - (len(old.payload) if old else 0)
        if size > self.max_bytes or (old is None and len(self._waiting) >= self.max_messages):
            self.dropped += 1
            self.missed_retained |= message.topic.policy.retain
            return False
        self._waiting[key] = message
        self._bytes = size
        self._filled.set()
        return True

    async def get(self) -> Incoming:
        while not self._waiting:
            self._filled.clear()
            await self._filled.wait()
        _, message = self._waiting.popitem(last=False)
        self._bytes -= len(message.payload)
        return message


class _Intake:
    """Stands where aiomqtt wants a queue, and hands each message straight to the link."""

    def __init__(self, deliver: Callable[[aiomqtt.Message], None]) -> None:
        self._deliver = deliver

    def put_nowait(self, message: aiomqtt.Message) -> None:
        self._deliver(message)

    async def get(self) -> aiomqtt.Message:
        """Never returns: whoever iterates over aiomqtt's messages only learns when the connection ends."""
        never: asyncio.Future[aiomqtt.Message] = asyncio.get_running_loop().create_future()
        return await never


class _Client(aiomqtt.Client):
    """aiomqtt's client, connecting on a thread of its own.

    Resolving a name cannot be interrupted. Stock does it on the event loop's common threads, where a few attempts on a
    dead resolver leave none for anybody else, and where the program waits for them before it can end.
    """

    heard_at = 0.0
    """When the broker last said anything, in monotonic seconds."""

    def begin_connect(self) -> "asyncio.Future[Exception | None]":
        """Start connecting. The future holds what went wrong, or None; it is never cancelled by who waits for it."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Exception | None] = loop.create_future()

        def finish(outcome: Exception | None) -> None:
            if not done.done():
                done.set_result(outcome)

        def connect() -> None:
            try:
                self._client_connect()
            except Exception as exc:  # noqa: BLE001  handed to whoever waits
                outcome: Exception | None = exc
            else:
                outcome = None
            with contextlib.suppress(RuntimeError):  # the loop is closed: the program ends
                loop.call_soon_threadsafe(finish, outcome)

        threading.Thread(target=connect, name="mqtt-connect", daemon=True).start()
        return done

    async def wait_accepted(self) -> None:
        """Wait for CONNACK. Raises MqttError: it does not come in time."""
        try:
            await self._wait_for(self._connected, timeout=None)
        finally:
            # Whoever waits no longer takes the future along; aiomqtt's callbacks would raise on it for ever.
            if self._connected.cancelled():
                self._connected = asyncio.get_running_loop().create_future()

    def _on_socket_register_write(self, client: Any, userdata: Any, sock: Any) -> None:
        """As aiomqtt's, but a socket that was closed before the loop came to it is left alone."""
        del userdata

        def write() -> None:
            try:
                client.loop_write()
            except Exception as exc:  # noqa: BLE001  whatever it was, the connection is over
                if not self._disconnected.done():
                    self._disconnected.set_exception(exc)

        def register() -> None:
            if sock.fileno() >= 0:
                self._loop.add_writer(sock.fileno(), write)

        self._loop.call_soon_threadsafe(register)

    @property
    def is_open(self) -> bool:
        accepted = self._connected
        return accepted.done() and not accepted.exception() and not self._disconnected.done()

    def close_socket(self) -> None:
        """Leave nothing behind: no socket, and no future whose exception nobody looked at."""
        for ended in (self._connected, self._disconnected):
            if ended.done() and not ended.cancelled():
                ended.exception()
        with contextlib.suppress(OSError, ValueError):
            self._client._sock_close()  # noqa: SLF001  see the check at import


class MqttLink:
    """Run ``run()`` as a task for as long as the link is wanted; cancelling it says goodbye to the broker."""

    def __init__(
        self,
        *,
        client_id: str,
        brokers: Callable[[], Sequence[str]],
        identity: Identity | None,
        allowed_keys: Callable[[], Collection[PeerKey]],
        subscriptions: Callable[[], Sequence[tuple[str, int]]],
        will: Callable[[], Will | None] = lambda: None,
        on_connect: Callable[[], Awaitable[None]] | None = None,
        config: LinkConfig | None = None,
        rng: random.Random | None = None,
        doors: Callable[[], Sequence[HostPort]] = tuple,
        proxies: ProxySettings | None = None,
    ) -> None:
        """Everything that may change is a callable and is asked at each connect.

        ``brokers`` are URLs, tried in turn. ``identity`` may be None where every broker is ``mqtt://``. ``will`` is
        asked before each attempt, so that it can carry a new epoch. ``on_connect`` runs after the subscriptions stand
        and may publish; the link is torn down when it raises. ``doors`` are TLS ports that pass MQTT on (ALPN
        ``mqtt``): they are tried where the broker's own port cannot be reached, and left when it can be again.
        """
        self.client_id = client_id
        self.config = config or LinkConfig()
        self.inbox = Inbox(
            max_messages=self.config.max_queued_messages, max_bytes=self.config.max_queued_bytes
        )
        self.refused = 0
        """Messages that were no message of this protocol or larger than their topic allows."""
        self._brokers = brokers
        self._subscriptions = subscriptions
        self._will = will
        self._on_connect = on_connect
        self._rng = rng or random.SystemRandom()
        self._tls = (
            client_context(
                identity, allowed_keys, handshake_timeout_s=self.config.connect_timeout_s
            )
            if identity
            else None
        )
        self._door_tls = (
            client_context(
                identity,
                allowed_keys,
                handshake_timeout_s=self.config.connect_timeout_s,
                alpn="mqtt",
            )
            if identity
            else None
        )
        self._doors = doors
        self._proxies = proxies or ProxySettings()
        self._door: HostPort | None = None
        self._unreached = False
        self._client: _Client | None = None
        self._attempt: _Client | None = None
        self._connecting: asyncio.Future[Exception | None] | None = None
        self._lost: asyncio.Future[None] | None = None
        self._up = asyncio.Event()
        self._was_up = False
        self._log = OutageLog()
        self._detour_pause_s = self.config.min_detour_s
        self._detour_log = DetourLog(lasts_s=LOOK_SPREAD[0] * self.config.min_detour_s)
        self._kick = asyncio.Event()
        self._slots = asyncio.Semaphore(self.config.max_publishing)
        self._broker = ""
        self._last_error = "not tried yet"
        self._last_connected: float | None = None
        self._retry_at: float | None = None
        self._resubscribing: asyncio.Task[None] | None = None

    # --- what others see ---------------------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """Whether subscriptions stand on a live connection."""
        return self._up.is_set()

    @property
    def last_error(self) -> str:
        """Why the link is down, one sentence; empty while it is up."""
        return "" if self.connected else self._last_error

    async def wait_connected(self) -> None:
        await self._up.wait()

    def status(self) -> LinkStatus:
        if self.connected:
            self._last_connected = time.time()
        retry = self._retry_at
        return LinkStatus(
            connected=self.connected,
            broker=self._broker,
            last_error=self.last_error,
            last_connected=self._last_connected,
            retry_in_s=None if retry is None else max(0.0, retry - time.monotonic()),
            queued=len(self.inbox),
            dropped=self.inbox.dropped + self.refused,
            detour=self._detour() if self.connected else "",
        )

    async def messages(self) -> AsyncIterator[Incoming]:
        """Everything that arrives, across reconnects. One consumer."""
        while True:
            yield await self.inbox.get()
            if not self.inbox and self.inbox.missed_retained:
                self._ask_again()

    async def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int,
        retain: bool = False,
        timeout_s: float | None = None,
    ) -> Published:
        """Hand one message to the broker; for QoS 1 wait until it has it. Never raises for a broker's sake.

        Raises LimitExceededError, MalformedMessageError: we would break our own protocol.
        """
        check_size(parse(topic), payload)
        client, lost = self._client, self._lost
        if client is None or lost is None:
            return Published.NOT_CONNECTED
        timeout = self.config.publish_timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + timeout
        try:
            async with asyncio.timeout(timeout):
                await self._slots.acquire()
        except TimeoutError:
            return Published.TIMED_OUT
        try:
            sending = asyncio.ensure_future(
                client.publish(topic, payload, qos=qos, retain=retain, timeout=math.inf)
            )
            try:
                await asyncio.wait(
                    {sending, lost},
                    timeout=max(0.0, deadline - time.monotonic()),
                    return_when=asyncio.FIRST_COMPLETED,
                )
            finally:
                if not sending.done():
                    sending.cancel()
                    await asyncio.wait({sending})
            if not sending.cancelled():
                return Published.LOST if sending.exception() else Published.SENT
            if lost.done():
                return Published.LOST
            if (
                timeout >= self.config.publish_timeout_s
                and time.monotonic() - client.heard_at >= timeout
            ):
                # On a slow path an acknowledgement waits behind other messages.
                self._lose(f"{self._broker} acknowledged nothing for {timeout:.0f} s")
            return Published.TIMED_OUT
        finally:
            self._slots.release()

    def kick(self) -> None:
        """Try now: something changed (an interface came up, the list of brokers is new)."""
        self._kick.set()

    def reconnect(self, reason: str) -> None:
        """Give up the present connection: who the broker may be has changed."""
        self._lose(reason)
        self.kick()

    # --- the loop ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep the link up until cancelled. Returns never otherwise."""
        failures = 0
        turn = 0
        while True:
            self._kick.clear()
            self._was_up = False
            began = time.monotonic()
            urls = self._brokers()
            if urls:
                url = urls[turn % len(urls)]
                self._last_error = await self._outlive(url)
                for door in self._doors() if self._unreached else ():
                    logger.debug("mqtt: %s; trying TLS at %s", self._last_error, door)
                    error = await self._outlive(url, door)
                    if not self._unreached:
                        self._last_error = error
                        break
                if self._unreached:
                    self._detour_log.nothing_serves()
            else:
                self._last_error = "no broker is known yet"
            turn += 1
            _heed_cancellation()
            self._tell_failure()
            if time.monotonic() - began >= self.config.settled_s:
                failures = 0
            else:  # One that was up for a moment ends a long series of failures, not a fight over the client id.
                failures = min(failures, SOON_AGAIN if self._was_up else failures) + 1
            ceiling = min(
                self.config.max_backoff_s, self.config.min_backoff_s * 2.0 ** min(failures, 20)
            )
            delay = self._rng.uniform(0, ceiling)
            self._retry_at = time.monotonic() + delay
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._kick.wait()
                failures = 0
            self._retry_at = None

    def _tell_failure(self) -> None:
        untold = self._log.failed(now=time.monotonic())
        level = logging.DEBUG if untold is None else logging.INFO
        more = f" (and {untold} failures before it)" if untold else ""
        logger.log(level, "mqtt: %s%s", self._last_error, more)

    def _detour(self) -> str:
        if self._door is None:
            return ""
        return f"{self._broker} cannot be reached: using TLS on port {self._door.port}"

    def _tell_detour(self) -> None:
        lasts = self._detour_log.serves(self._detour(), now=time.monotonic())
        if lasts is not None:
            logger.log(logging.WARNING if lasts else logging.INFO, "mqtt: %s", self._detour())

    async def _look_back(self, broker: BrokerAddress) -> None:
        """While the door serves, look with growing pauses whether the broker's own port answers again.

        They go on growing until a connection by that port stands: what lets TCP through may let no more through.
        """
        while True:
            await asyncio.sleep(self._detour_pause_s * self._rng.uniform(*LOOK_SPREAD))
            self._detour_pause_s = min(2 * self._detour_pause_s, self.config.max_detour_s)
            try:
                sock, _ = await connect_tcp(
                    self._proxies.towards(broker.host),
                    broker.host,
                    broker.port,
                    timeout_s=self.config.connect_timeout_s,
                )
            except EdgeSyncError:
                self._tell_detour()
                continue
            sock.close()
            self.reconnect(f"{broker} answers at its own port again")
            return

    async def _outlive(self, url: str, door: HostPort | None = None) -> str:
        """As ``_one_connection``; a cancellation that nobody asked for ends the connection, not the link."""
        try:
            return await self._one_connection(url, door)
        except asyncio.CancelledError:
            _heed_cancellation()
            logger.exception("mqtt: the connection to %s was broken off", self._broker)
            return f"connection to {self._broker} broke off"

    async def _one_connection(self, url: str, door: HostPort | None = None) -> str:
        """Connect, serve until it ends; returns why it ended. ``_unreached`` tells that it never began."""
        self._unreached = False
        try:
            broker = parse_broker_url(url)
        except EdgeSyncError as exc:
            return str(exc)
        self._broker = str(broker)
        try:
            client = self._make_client(broker, door)
        except EdgeSyncError as exc:
            return str(exc)
        self._attempt = client
        self._door = door
        began = time.monotonic()
        looking: asyncio.Task[None] | None = None
        self._lost = asyncio.get_running_loop().create_future()
        try:
            try:
                await self._connect(client)
            except (aiomqtt.MqttError, OSError, TimeoutError) as exc:
                self._unreached = True
                where = f" by TLS at {door}" if door else ""
                return f"{broker} cannot be reached{where}: {_reason(exc)}"
            _heed_cancellation()
            self._client = client
            self._tell_detour()
            if door is None:
                self._detour_pause_s = self.config.min_detour_s
            else:
                looking = asyncio.ensure_future(self._look_back(broker))
            await self._serve(client)
        except (aiomqtt.MqttError, OSError, TimeoutError) as exc:
            return f"connection to {broker} lost: {_reason(exc)}"
        except EdgeSyncError as exc:
            return f"connection to {broker} given up: {exc}"
        else:
            return f"connection to {broker} given up: {self._last_error}"
        finally:
            if self._up.is_set():
                self._last_connected = time.time()
                if time.monotonic() - began >= self.config.settled_s:
                    self._log.settled()
            self._up.clear()
            self._client = self._attempt = None
            if not self._lost.done():
                self._lost.set_result(None)
            if self._resubscribing:
                self._resubscribing.cancel()
            if looking is not None:
                looking.cancel()
            await self._close(client)

    async def _connect(self, client: _Client) -> None:
        """Raises MqttError, OSError, TimeoutError."""
        async with asyncio.timeout(2 * self.config.connect_timeout_s):
            if self._connecting is not None:
                await asyncio.shield(self._connecting)  # one attempt at a time, also given-up ones
            self._connecting = connecting = client.begin_connect()
            connecting.add_done_callback(lambda _: self._connect_ended(client, connecting))
            if (error := await asyncio.shield(connecting)) is not None:
                raise OSError(str(error)) from error
            await client.wait_accepted()

    def _connect_ended(self, client: _Client, connecting: asyncio.Future[Any]) -> None:
        if self._connecting is connecting:
            self._connecting = None
        if self._attempt is not client:
            client.close_socket()  # nobody waits for it any more

    async def _serve(self, client: aiomqtt.Client) -> None:
        """Returns when the link gives up; raises MqttError when the connection ends."""
        assert self._lost is not None
        watching = asyncio.ensure_future(_until_lost(client))
        preparing = asyncio.ensure_future(self._prepare(client))
        given_up = self._lost
        try:
            await asyncio.wait({watching, preparing, given_up}, return_when=asyncio.FIRST_COMPLETED)
            if preparing.done():
                preparing.result()
                await asyncio.wait({watching, given_up}, return_when=asyncio.FIRST_COMPLETED)
            if watching.done():
                watching.result()
        finally:
            for task in (watching, preparing):
                task.cancel()
            await asyncio.gather(watching, preparing, return_exceptions=True)

    async def _prepare(self, client: aiomqtt.Client) -> None:
        self.inbox.missed_retained = False
        await self._subscribe(client)
        self._last_connected = time.time()
        self._up.set()
        self._was_up = True
        level = logging.INFO if self._log.up() else logging.DEBUG
        logger.log(level, "mqtt: connected to %s", self._broker)
        if self._on_connect:
            await self._on_connect()

    async def _subscribe(self, client: aiomqtt.Client) -> None:
        wanted = list(self._subscriptions())
        if not wanted:
            return
        granted = await client.subscribe(wanted, timeout=self.config.connect_timeout_s)
        codes = [code if isinstance(code, int) else code.value for code in granted]
        for (topic, _), code in zip(wanted, codes, strict=False):
            if code >= 0x80:
                raise aiomqtt.MqttError(f"the broker does not let us read {topic}")

    def _make_client(self, broker: BrokerAddress, door: HostPort | None) -> _Client:
        will = self._will()
        if will:
            check_size(parse(will.topic), will.payload)
        if broker.tls and self._tls is None:
            raise ProtocolError("this machine has no certificate to show to a broker")
        host, port = (door.host, door.port) if door else (broker.host, broker.port)
        tls = self._door_tls if door else self._tls
        client = _Client(
            host,
            port,
            identifier=self.client_id,
            logger=_library_logger,
            queue_type=cast("Any", lambda maxsize: _Intake(self._deliver)),  # noqa: ARG005  aiomqtt's call
            will=aiomqtt.Will(will.topic, will.payload, 1, will.retain) if will else None,
            clean_session=True,
            timeout=self.config.connect_timeout_s,
            keepalive=self.config.keepalive_s,
            max_inflight_messages=self.config.max_publishing,
            tls_context=tls if broker.tls else None,
        )
        client.pending_calls_threshold = 2 * self.config.max_publishing
        paho = client._client  # noqa: SLF001  see the check at import
        paho.connect_timeout = self.config.connect_timeout_s
        proxy = self._proxies.towards(host)
        reach = (
            functools.partial(connect_in_short_segments, host, port)
            if proxy is None
            else functools.partial(open_tunnel, proxy, host, port)
        )
        paho._create_socket_connection = functools.partial(  # type: ignore[method-assign]  # noqa: SLF001
            reach, timeout_s=self.config.connect_timeout_s
        )
        receive = paho._sock_recv  # noqa: SLF001

        def receive_capped(bufsize: int) -> bytes:
            if bufsize > limits.MAX_MQTT_PACKET_BYTES:
                raise ConnectionAbortedError(f"the broker sends a packet of {bufsize} bytes")
            client.heard_at = time.monotonic()
            return receive(bufsize)

        paho._sock_recv = receive_capped  # type: ignore[method-assign]  # noqa: SLF001
        return client

    def _deliver(self, message: aiomqtt.Message) -> None:
        try:
            topic = parse(str(message.topic))
            payload = message.payload if isinstance(message.payload, bytes) else b""
            check_size(topic, payload)
        except EdgeSyncError as exc:
            self.refused += 1
            logger.debug("mqtt: refused: %s", exc)
            return
        if not self.inbox.put(Incoming(topic, payload, bool(message.retain))):
            logger.debug("mqtt: no room for %s", topic)

    def _ask_again(self) -> None:
        """Subscribe again, which makes the broker repeat what it retains."""
        self.inbox.missed_retained = False
        client = self._client
        if client is not None and (self._resubscribing is None or self._resubscribing.done()):
            self._resubscribing = asyncio.ensure_future(self._subscribe_again(client))

    async def _subscribe_again(self, client: aiomqtt.Client) -> None:
        try:
            await asyncio.sleep(self.config.min_backoff_s)
            await self._subscribe(client)
        except (aiomqtt.MqttError, OSError) as exc:
            self._lose(_reason(exc))

    def _lose(self, reason: str) -> None:
        self._last_error = reason
        if self._lost is not None and not self._lost.done():
            self._lost.set_result(None)

    async def _close(self, client: _Client) -> None:
        """Say goodbye if anyone listens, and leave no socket behind in any case."""
        with contextlib.suppress(aiomqtt.MqttError, OSError, TimeoutError):
            async with asyncio.timeout(2.0):
                if client.is_open:
                    await client.__aexit__(None, None, None)
        client.close_socket()


def _heed_cancellation() -> None:
    """Raise what the library swallowed: ``asyncio.wait_for`` forgets a cancellation that comes with its result."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def _until_lost(client: aiomqtt.Client) -> None:
    """Raises MqttError when the connection ends."""
    async for _ in client.messages:
        pass


def _reason(exc: BaseException) -> str:
    """One short clause, without paho's decoration."""
    if isinstance(exc, TimeoutError):
        return "no answer in time"
    cause = exc.__cause__
    text = str(cause if cause and str(cause) else exc) or type(exc).__name__
    return text.removeprefix("[Errno 111] ").strip()
