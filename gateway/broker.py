"""The MQTT broker inside the gateway: amqtt with everything closed that stock amqtt leaves open.

It is a soft cache for up to MAX_MQTT_CLIENTS devices and forgets all when it stops; MQTT 3.1.1, QoS 0 and 1. It does
not do MQTT 5, persistence, shared subscriptions or QoS 2: larger fleets run mosquitto or EMQX
(``gateway.broker_config``).

What this subclass changes, and why:

* the client certificate is demanded in TLS and judged by ``judge``; client id and user name are the certificate's name
  before any session is looked up, and only the same key may take over a session (stock: anyone, before authentication);
* CONNECT, with its will and retain flag, is checked before it is believed; nobody stays unproven for longer than
  MQTT_UNPROVEN_TIMEOUT_S, and only so many at a time;
* packets are capped from their fixed header and parsed from a buffer of exactly their length (stock: 200 MB = 200 MB);
* the access rules of ``edgesync.wire.topics`` hold at publish, at delivery, for retained messages and for wills (stock:
  retained messages are replayed to everybody, wills go past the rules);
* a silent client is closed after 1.5 keepalives and its will is published (stock: never);
* what waits for a slow reader is bounded; who reads too slowly is closed and starts afresh.

Called by ``gateway.daemon``. Everything runs on one event loop.
"""

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
from asyncio.sslproto import SSLProtocol
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Final

from amqtt.adapters import BufferReader, StreamReaderAdapter, StreamWriterAdapter
from amqtt.broker import Broker, RetainedApplicationMessage
from amqtt.contexts import BrokerConfig
from amqtt.mqtt import packet_class
from amqtt.mqtt.connack import (
    CONNECTION_ACCEPTED,
    NOT_AUTHORIZED,
    SERVER_UNAVAILABLE,
    ConnackPacket,
)
from amqtt.mqtt.disconnect import DisconnectPacket
from amqtt.mqtt.packet import CONNECT, MQTTFixedHeader
from amqtt.mqtt.pingreq import PingReqPacket
from amqtt.mqtt.protocol.broker_handler import BrokerProtocolHandler
from amqtt.mqtt.puback import PubackPacket
from amqtt.mqtt.publish import PublishPacket
from amqtt.mqtt.subscribe import SubscribePacket
from amqtt.mqtt.unsubscribe import UnsubscribePacket
from amqtt.session import Session

from edgesync import limits
from edgesync.errors import ConfigError, EdgeSyncError
from edgesync.identity import Identity
from edgesync.ids import PeerIdentity
from edgesync.io.tls import load_identity
from edgesync.wire import topics
from edgesync.wire.topics import Topic

logger = logging.getLogger(__name__)
for _chatty in ("amqtt", "transitions"):
    logging.getLogger(_chatty).setLevel(logging.WARNING)

if not hasattr(SSLProtocol, "max_size"):
    raise ImportError("asyncio's TLS no longer has max_size, which gateway.broker relies on")

WINDOW: Final = 16
"""QoS 1 messages on their way to one client."""
WRITE_TIMEOUT_S: Final = 60.0
"""A client that takes or acknowledges nothing for so long is gone."""
CLOSE_TIMEOUT_S: Final = 2.0
GATEWAY_SHARE: Final = 20
"""Times a device's bounds on packets and queues that a gateway has."""
SUBSCRIBE_COST: Final = 10
"""In packets: each makes the broker look through what it retains."""
REFUSED: Final = 0x80


@dataclass(frozen=True)
class BrokerStats:
    clients: int
    unproven: int
    retained: int
    subscriptions: int
    received: int
    sent: int
    refused: dict[str, int]
    """By reason, since start."""


class _LeanTls(SSLProtocol):
    """The event loop's own TLS with smaller buffers: stock touches 256 KiB for every connection, proven or not."""

    max_size = 32 * limits.KIB


class _ClosedError(Exception):
    """Ends this connection; ``str()`` says why. Never leaves this module."""


class _Delivery:
    """One message waiting for one client. ``payload`` None: the newest retained one on ``topic``, read when sent."""

    __slots__ = ("payload", "qos", "retain", "topic")

    def __init__(self, topic: str, payload: bytes | None, qos: int, *, retain: bool) -> None:
        self.topic = topic
        self.payload = payload
        self.qos = qos
        self.retain = retain


class _Handler(BrokerProtocolHandler):  # type: ignore[misc]  # amqtt carries no types
    """One proven client: reads its packets one after the other, and sends it what it may see."""

    identity: PeerIdentity
    certificate: bytes
    broker: "EmbeddedBroker"

    def admit(
        self, broker: "EmbeddedBroker", identity: PeerIdentity, certificate: bytes, address: str
    ) -> None:
        self.broker = broker
        self.identity = identity
        self.certificate = certificate
        self.address = address
        # A gateway hears all its devices at once; only its own process can make it slow.
        share = GATEWAY_SHARE if identity.role == "gateway" else 1
        self._max_queued = share * broker.max_queued
        self._max_queued_bytes = share * limits.MAX_MQTT_QUEUED_BYTES
        self._pace_share = share
        self._paced_until = 0.0
        self.filters: set[str] = set()
        self.closed = asyncio.Event()
        self.ended = asyncio.Event()
        self.close_reason = ""
        self.will_topic: Topic | None = None
        self._queue: OrderedDict[object, _Delivery] = OrderedDict()
        self._queued_bytes = 0
        self._waiting = asyncio.Event()
        self._window = asyncio.Semaphore(WINDOW)
        self._unacked: set[int] = set()
        self._next_id = 0

    async def pace(self, cost: int) -> None:
        """Read no faster than MAX_MQTT_PACKETS_S in the long run: one member must not have the whole processor."""
        now = asyncio.get_running_loop().time()
        rate = self._pace_share * limits.MAX_MQTT_PACKETS_S
        self._paced_until = max(self._paced_until, now) + cost / rate
        ahead_s = self._paced_until - now - limits.MAX_MQTT_PACKET_BURST / limits.MAX_MQTT_PACKETS_S
        if ahead_s > 0:
            await asyncio.sleep(ahead_s)

    def close(self, reason: str) -> None:
        """Ask for the end; ``ended`` tells when it is done."""
        if not self.closed.is_set():
            self.close_reason = reason
            self.closed.set()

    # --- reading -----------------------------------------------------------------------------------------------------

    async def serve(self, reader: asyncio.StreamReader, keepalive_s: float) -> bool:
        """Handle packets until the connection ends. True: the client said DISCONNECT, so no will is due."""
        reading = asyncio.ensure_future(self._read(reader, 1.5 * keepalive_s))
        sending = asyncio.ensure_future(self._send())
        closing = asyncio.ensure_future(self.closed.wait())
        tasks = {reading, sending, closing}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if not reading.cancelled() and reading.exception() is None:
            return reading.result()
        for task in (reading, sending):
            error = None if task.cancelled() else task.exception()
            if error is not None:
                self.close_reason = str(error) or type(error).__name__
                if not isinstance(error, _ClosedError | OSError | TimeoutError):
                    logger.error("broker: %s failed", self.identity.id, exc_info=error)
        return False

    async def _read(self, reader: asyncio.StreamReader, timeout_s: float) -> bool:
        while True:
            try:
                async with asyncio.timeout(timeout_s):
                    header, body = await _read_packet(reader, limits.MAX_MQTT_PACKET_BYTES)
            except TimeoutError as exc:
                raise _ClosedError(f"silent for {timeout_s:.0f} s") from exc
            packet = await _parse(header, body)
            if isinstance(packet, DisconnectPacket):
                self.close_reason = "disconnected"
                return True
            await self.pace(SUBSCRIBE_COST if isinstance(packet, SubscribePacket) else 1)
            await self._handle(packet)

    async def _handle(self, packet: Any) -> None:
        match packet:
            case PublishPacket():
                if packet.qos not in {0, 1}:
                    raise _ClosedError("QoS 2 is not offered")
                self.broker.receive(self, packet)
                if packet.qos == 1:
                    await self._send_packet(PubackPacket.build(packet.packet_id))
            case PubackPacket():
                if packet.packet_id in self._unacked:
                    self._unacked.discard(packet.packet_id)
                    self._window.release()
            case PingReqPacket():
                await self.handle_pingreq(packet)
            case SubscribePacket():
                wanted = list(packet.payload.topics)
                if not wanted:
                    raise _ClosedError("an empty SUBSCRIBE")
                codes = [await self.broker.subscribe(self, name, qos) for name, qos in wanted]
                await self.mqtt_acknowledge_subscription(packet.variable_header.packet_id, codes)
                for (name, _), code in zip(wanted, codes, strict=True):
                    if code != REFUSED:
                        self.broker.replay(self, name, code)
            case UnsubscribePacket():
                for name in packet.payload.topics:
                    self.broker.unsubscribe(self, name)
                await self.mqtt_acknowledge_unsubscription(packet.variable_header.packet_id)
            case _:
                raise _ClosedError(f"sent a {type(packet).__name__}")

    # --- sending -----------------------------------------------------------------------------------------------------

    def enqueue(self, delivery: _Delivery) -> None:
        """Queue one message; a client that lets too much wait is closed: it will connect and ask again."""
        key: object = delivery.topic if delivery.payload is None else object()
        old = self._queue.get(key)
        if old is None:
            self._queue[key] = delivery
        elif old.retain and not delivery.retain:
            old.retain = False
        self._queued_bytes += len(delivery.payload or b"")
        if (
            self._queued_bytes > self._max_queued_bytes
            or len(self._queue) > limits.MAX_MQTT_RETAINED
            or (delivery.payload is not None and len(self._queue) > self._max_queued)
        ):
            self.close(f"reads too slowly: {len(self._queue)} messages wait")
        self._waiting.set()

    async def _send(self) -> None:
        while True:
            while not self._queue:
                self._waiting.clear()
                await self._waiting.wait()
            _, delivery = self._queue.popitem(last=False)
            payload = delivery.payload
            if payload is None:
                kept = self.broker.retained_messages.get(delivery.topic)
                if kept is None and delivery.retain:
                    continue  # erased since it was queued for a new subscriber
                payload = bytes(kept.data) if kept is not None else b""
            else:
                self._queued_bytes -= len(payload)
            packet_id = None
            if delivery.qos:
                try:
                    async with asyncio.timeout(WRITE_TIMEOUT_S):
                        await self._window.acquire()
                except TimeoutError as exc:
                    raise _ClosedError(f"acknowledged nothing for {WRITE_TIMEOUT_S:.0f} s") from exc
                packet_id = self._new_id()
            self.broker.sent += 1
            await self._send_packet(
                PublishPacket.build(
                    delivery.topic,
                    payload,
                    packet_id,
                    dup_flag=False,
                    qos=delivery.qos,
                    retain=delivery.retain,
                )
            )

    def _new_id(self) -> int:
        self._next_id = self._next_id % 65_535 + 1
        while self._next_id in self._unacked:
            self._next_id = self._next_id % 65_535 + 1
        self._unacked.add(self._next_id)
        return self._next_id

    async def _send_packet(self, packet: Any) -> None:
        if self.writer is None:
            raise _ClosedError("closed")
        try:
            async with asyncio.timeout(WRITE_TIMEOUT_S), self._write_lock:
                await packet.to_stream(self.writer)
        except TimeoutError as exc:
            raise _ClosedError(f"took nothing for {WRITE_TIMEOUT_S:.0f} s") from exc
        except OSError as exc:
            raise _ClosedError(f"connection lost: {exc}") from exc


class EmbeddedBroker(Broker):  # type: ignore[misc]  # amqtt carries no types
    """``await open(...)`` serves until ``await stop()``; both may be called once per instance."""

    def __init__(
        self,
        *,
        identity: Identity,
        authorities: Callable[[], Collection[bytes]],
        judge: Callable[[bytes], PeerIdentity],
        max_clients: int = limits.MAX_MQTT_CLIENTS,
        max_queued: int = limits.MAX_MQTT_QUEUED_MESSAGES,
        unproven_timeout_s: float = limits.MQTT_UNPROVEN_TIMEOUT_S,
    ) -> None:
        """Nothing is opened yet.

        ``authorities`` are the certificates (DER) TLS lets a client certificate descend from: the region's CA and the
        gateway's own certificate. They only sort out strangers early; ``judge`` decides who a certificate is, and
        raises NotAuthorizedError for who may not connect.
        """
        super().__init__(
            BrokerConfig.from_dict({"listeners": {"default": {"type": "external"}}, "plugins": {}})
        )
        self.max_queued = max_queued
        self.received = 0
        self.sent = 0
        self.refused: Counter[str] = Counter()
        self._identity = identity
        self._authorities = authorities
        self._judge = judge
        self._max_clients = max_clients
        self._unproven_timeout_s = unproven_timeout_s
        self._context = self._make_context()
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._unproven: Counter[str] = Counter()
        self._wildcards: list[str] | None = None
        self._stopping = False

    # --- life --------------------------------------------------------------------------------------------------------

    @property
    def port(self) -> int:
        assert self._listener is not None
        return int(self._listener.getsockname()[1])

    async def open(self, host: str, port: int) -> None:
        """Listen. Raises ConfigError: the address is taken or not ours."""
        try:
            self._listener = _listen(host, port)
        except OSError as exc:
            if exc.errno == errno.EADDRINUSE:
                raise ConfigError(
                    f"MQTT port {port} on {host} is in use by another program: "
                    "stop it, or choose another with --listen-mqtt"
                ) from exc
            raise ConfigError(f"cannot listen for MQTT on {host}:{port}: {exc.strerror}") from exc
        await self.start()
        self._accepting = asyncio.ensure_future(self._accept(self._listener))

    async def stop(self) -> None:
        """Close every connection without publishing wills, and free the port."""
        self._stopping = True
        if self._accepting:
            self._accepting.cancel()
            await asyncio.gather(self._accepting, return_exceptions=True)
        if self._listener:
            self._listener.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        if self.transitions.is_started():
            await self.shutdown()

    async def rejudge(self) -> list[str]:
        """Judge every live session again after a change of trust; returns the ids that were closed."""
        self._context = self._make_context()
        closed = []
        for handler in self._handlers():
            try:
                still = self._judge(handler.certificate) == handler.identity
            except EdgeSyncError:
                still = False
            if not still:
                handler.close("no longer trusted")
                closed.append(handler.identity.id)
        return closed

    def stats(self) -> BrokerStats:
        return BrokerStats(
            clients=len(self._sessions),
            unproven=self._unproven.total(),
            retained=len(self._retained_messages),
            subscriptions=sum(len(one) for one in self._subscriptions.values()),
            received=self.received,
            sent=self.sent,
            refused=dict(self.refused),
        )

    def connected_ids(self) -> set[str]:
        return set(self._sessions)

    # --- connections -------------------------------------------------------------------------------------------------

    def _make_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.num_tickets = 0  # a resumed session would skip the certificate
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        for der in self._authorities():
            context.load_verify_locations(cadata=der)
        load_identity(context, self._identity)
        return context

    def _handlers(self) -> list[_Handler]:
        return [handler for _, handler in self._sessions.values() if isinstance(handler, _Handler)]

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, address = await loop.sock_accept(listener)
            except OSError as exc:
                logger.warning("broker: cannot accept a connection: %s", exc)
                await asyncio.sleep(0.1)
                continue
            self.adopt(connection, str(address[0]))

    def adopt(self, connection: socket.socket, host: str) -> None:
        """Serve a TCP connection from ``host`` of which nothing was read yet, wherever it was accepted."""
        if (
            self._stopping
            or self._unproven.total() >= limits.MAX_MQTT_UNPROVEN
            or self._unproven[host] >= limits.MAX_MQTT_UNPROVEN_PER_ADDRESS
        ):
            self.refused["too many unproven connections"] += 1
            connection.close()
            return
        self._unproven[host] += 1
        task = asyncio.ensure_future(self._connection(connection, host))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _connection(self, connection: socket.socket, host: str) -> None:
        """One TCP connection from accept to close."""
        writer: asyncio.StreamWriter | None = None
        handler: _Handler | None = None
        try:
            try:
                async with asyncio.timeout(self._unproven_timeout_s):
                    reader, writer = await self._open_tls(connection)
                    handler, session, keepalive_s = await self._welcome(reader, writer, host)
            finally:
                self._unproven[host] -= 1
                if not self._unproven[host]:
                    del self._unproven[host]
            await self._serve(handler, session, reader, keepalive_s)
        except (_ClosedError, EdgeSyncError, TimeoutError, OSError) as exc:
            reason = "no CONNECT in time" if isinstance(exc, TimeoutError) else str(exc)
            self.refused[type(exc).__name__.strip("_")] += 1
            logger.debug("broker: %s refused: %s", host, reason)
        finally:
            if writer is not None:
                writer.close()
                with contextlib.suppress(Exception):
                    async with asyncio.timeout(CLOSE_TIMEOUT_S):
                        await writer.wait_closed()
                writer.transport.abort()
            else:
                connection.close()

    async def _open_tls(
        self, connection: socket.socket
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        loop = asyncio.get_running_loop()
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        reader = asyncio.StreamReader(limit=16 * limits.KIB, loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        shaken: asyncio.Future[None] = loop.create_future()
        tls = _LeanTls(
            loop,
            protocol,
            self._context,
            shaken,
            server_side=True,
            ssl_handshake_timeout=self._unproven_timeout_s,  # type: ignore[arg-type]  # any number will do
            ssl_shutdown_timeout=CLOSE_TIMEOUT_S,
        )
        transport, _ = await loop.connect_accepted_socket(lambda: tls, connection)
        try:
            await shaken
        except BaseException:
            transport.abort()
            raise
        return reader, asyncio.StreamWriter(tls._app_transport, protocol, reader, loop)  # noqa: SLF001

    async def _welcome(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str
    ) -> tuple[_Handler, Session, float]:
        """Who is it, and may it connect as it asks? Raises _ClosedError, NotAuthorizedError."""
        tls = writer.get_extra_info("ssl_object")
        certificate = tls.getpeercert(binary_form=True) if tls else None
        if not certificate:
            raise _ClosedError("showed no certificate")
        identity = self._judge(certificate)
        header, body = await _read_packet(reader, limits.MAX_MQTT_CONNECT_BYTES)
        if header.packet_type != CONNECT:
            raise _ClosedError("its first packet is no CONNECT")
        output = StreamWriterAdapter(writer)
        try:
            handler, session = await _Handler.init_from_connect(
                BufferReader(header.to_bytes() + body), output, self.plugins_manager
            )
        except Exception as exc:
            raise _ClosedError(f"its CONNECT cannot be read: {exc}") from exc
        assert isinstance(handler, _Handler)
        handler.admit(self, identity, certificate, host)
        session.client_id = session.username = identity.id
        session.clean_session = True
        session.password = None
        try:
            self._check_will(handler, session)
            await self._make_room(handler)
        except _ClosedError:
            code = NOT_AUTHORIZED
            if len(self._sessions) >= self._max_clients:
                code = SERVER_UNAVAILABLE
            await ConnackPacket.build(0, code).to_stream(output)
            raise
        handler.attach(session, StreamReaderAdapter(reader), output)
        self._sessions[identity.id] = (session, handler)
        try:
            await ConnackPacket.build(0, CONNECTION_ACCEPTED).to_stream(output)
        except BaseException:
            self._forget(handler)
            handler.ended.set()
            raise
        keepalive_s = min(
            session.keep_alive or limits.MAX_MQTT_KEEPALIVE_S, limits.MAX_MQTT_KEEPALIVE_S
        )
        return handler, session, float(keepalive_s)

    def _check_will(self, handler: _Handler, session: Session) -> None:
        if not session.will_flag:
            return
        identity = handler.identity
        try:
            topic = topics.parse(session.will_topic or "")
            topics.check_size(topic, bytes(session.will_message or b""))
        except EdgeSyncError as exc:
            raise _ClosedError(f"its will is refused: {exc}") from exc
        if not topics.may_publish(identity.role, identity.id, topic):
            raise _ClosedError(f"its will on {topic} is not its to say")
        if session.will_retain and not topics.may_retain(identity.role, identity.id, topic):
            raise _ClosedError(f"its will on {topic} may not be retained")
        if session.will_qos not in {0, 1}:
            raise _ClosedError("its will wants QoS 2")
        handler.will_topic = topic

    async def _make_room(self, handler: _Handler) -> None:
        """A second connection of the same key replaces the first; of another key it is refused."""
        identity = handler.identity
        while isinstance(old := self._sessions.get(identity.id, (None, None))[1], _Handler):
            if old.identity.key != identity.key:
                raise _ClosedError(f"{identity.id} is connected with another key")
            old.close("taken over by a new connection")
            await old.ended.wait()
        if len(self._sessions) >= self._max_clients and identity.role != "gateway":
            raise _ClosedError(f"{self._max_clients} clients are connected already")

    async def _serve(
        self, handler: _Handler, session: Session, reader: asyncio.StreamReader, keepalive_s: float
    ) -> None:
        clean = True
        try:
            clean = await handler.serve(reader, keepalive_s)
        finally:
            self._forget(handler)
            if not clean and not self._stopping and handler.will_topic is not None:
                self._route(
                    handler.will_topic,
                    bytes(session.will_message or b""),
                    int(session.will_qos or 0),
                    retain=bool(session.will_retain),
                )
            handler.ended.set()
            logger.debug("broker: %s left: %s", handler.identity.id, handler.close_reason)

    def _forget(self, handler: _Handler) -> None:
        for name in list(handler.filters):
            self.unsubscribe(handler, name)
        if self._sessions.get(handler.identity.id, (None, None))[1] is handler:
            del self._sessions[handler.identity.id]

    # --- messages ----------------------------------------------------------------------------------------------------

    def receive(self, handler: _Handler, packet: PublishPacket) -> None:
        """Take one PUBLISH. What is not allowed is dropped: MQTT 3.1.1 has no way to say no."""
        self.received += 1
        identity = handler.identity
        payload = bytes(packet.data or b"")
        try:
            topic = topics.parse(packet.topic_name or "")
            topics.check_size(topic, payload)
        except EdgeSyncError as exc:
            self.refused[type(exc).__name__] += 1
            return
        retain = bool(packet.retain_flag)
        if not topics.may_publish(identity.role, identity.id, topic) or (
            retain and not topics.may_retain(identity.role, identity.id, topic)
        ):
            self.refused["not its topic"] += 1
            logger.debug("broker: %s may not write %s", identity.id, topic)
            return
        self._route(topic, payload, int(packet.qos or 0), retain=retain)

    def _route(self, topic: Topic, payload: bytes, qos: int, *, retain: bool) -> None:
        name = str(topic)
        kept = retain and bool(payload)
        if kept:
            if (
                name not in self._retained_messages
                and len(self._retained_messages) >= limits.MAX_MQTT_RETAINED
            ):
                self.refused["retained store full"] += 1
                kept = False
            else:
                self._retained_messages[name] = RetainedApplicationMessage(None, name, payload, qos)
        elif retain:
            self._retained_messages.pop(name, None)
        targets: dict[str, int] = {}
        for pattern in (name, *self._wildcard_filters()):
            if pattern is not name and not self._matches(name, pattern):
                continue
            for session, granted in self._subscriptions.get(pattern, ()):
                client = str(session.client_id)
                targets[client] = max(targets.get(client, 0), min(granted, qos))
        for client, target_qos in targets.items():
            _, handler = self._sessions.get(client, (None, None))
            if isinstance(handler, _Handler) and self._may_receive(handler, topic):
                # What is retained is looked up when it is sent: the newest counts, and nothing is held twice.
                waiting = None if kept or (retain and not payload) else payload
                handler.enqueue(_Delivery(name, waiting, target_qos, retain=False))

    @staticmethod
    def _may_receive(handler: _Handler, topic: Topic) -> bool:
        return topics.may_receive(handler.identity.role, handler.identity.id, topic)

    def _wildcard_filters(self) -> list[str]:
        if self._wildcards is None:
            self._wildcards = [name for name in self._subscriptions if "+" in name or "#" in name]
        return self._wildcards

    async def subscribe(self, handler: _Handler, name: str, qos: int) -> int:
        """The SUBACK code. Any filter is granted, as mosquitto does: what it may see is decided at delivery."""
        if (
            not name
            or len(name.encode()) > limits.MAX_TOPIC_BYTES
            or len(handler.filters | {name}) > limits.MAX_MQTT_SUBSCRIPTIONS
            or qos not in {0, 1, 2}
        ):
            return REFUSED
        assert handler.session is not None
        self.unsubscribe(handler, name)
        code = int(await self.add_subscription((name, min(qos, 1)), handler.session))
        if code != REFUSED:
            handler.filters.add(name)
            self._wildcards = None
        return code

    def unsubscribe(self, handler: _Handler, name: str) -> None:
        if name not in handler.filters:
            return
        handler.filters.discard(name)
        if handler.session is not None:
            self._del_subscription(name, handler.session)
        if not self._subscriptions.get(name, True):
            del self._subscriptions[name]
        self._wildcards = None

    def replay(self, handler: _Handler, name: str, qos: int) -> None:
        """Queue what is retained under a filter for a new subscriber, as far as it may see it."""
        if "+" not in name and "#" not in name:
            found = [name] if name in self._retained_messages else []
        else:
            prefix = name.replace("#", "+").split("+", 1)[0]
            found = [
                topic
                for topic in self._retained_messages
                if topic.startswith(prefix) and self._matches(topic, name)
            ]
        for topic in found:
            if self._may_receive(handler, topics.parse(topic)):
                kept = self._retained_messages[topic]
                handler.enqueue(_Delivery(topic, None, min(qos, kept.qos or 0), retain=True))

    # --- what stock amqtt would do in the background -----------------------------------------------------------------

    async def _session_monitor(self) -> None:
        """Nothing to expire: a session ends with its connection."""

    async def _broadcast_message(
        self, session: Any, topic: Any, data: Any, force_qos: int | None = None
    ) -> None:
        """Stock code's way to send; ours is ``_route``."""
        del session
        self._route(topics.parse(str(topic)), bytes(data or b""), force_qos or 0, retain=False)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server(
        (host, port), family=family, backlog=256, dualstack_ipv6=host == "::"
    )
    listener.setblocking(False)
    return listener


async def _read_packet(reader: asyncio.StreamReader, cap: int) -> tuple[MQTTFixedHeader, bytes]:
    """One packet, capped by its own header before its body is read. Raises _ClosedError."""
    try:
        first = (await reader.readexactly(1))[0]
        length = shift = 0
        while True:
            byte = (await reader.readexactly(1))[0]
            length |= (byte & 0x7F) << shift
            if not byte & 0x80:
                break
            shift += 7
            if shift > 21:
                raise _ClosedError("a packet length of more than four bytes")
        if length > cap:
            raise _ClosedError(f"a packet of {length} bytes, at most {cap} are allowed")
        body = await reader.readexactly(length) if length else b""
    except asyncio.IncompleteReadError as exc:
        raise _ClosedError("connection lost") from exc
    return MQTTFixedHeader(first >> 4, first & 0x0F, length), body


async def _parse(header: MQTTFixedHeader, body: bytes) -> Any:
    """The packet in a buffer of exactly its length. Raises _ClosedError."""
    reader = BufferReader(body)
    try:
        packet = await packet_class(header).from_stream(reader, fixed_header=header)
    except Exception as exc:
        raise _ClosedError(f"a packet that cannot be read: {exc}") from exc
    if await reader.read(1):
        raise _ClosedError("a packet with bytes left over")
    return packet
