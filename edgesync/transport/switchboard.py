"""Which datagram belongs to which link, and who may become one.

One UDP socket serves every connection, dialed or accepted: a datagram's destination connection id finds its link. The
doorman stands here too: strangers are few in all and per source, from the eighth on a client must show that it receives
at its address (Retry), and those turned away hear it from a stateless packet, at a bounded rate. Knows no sessions.
"""

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from aioquic.buffer import Buffer  # type: ignore[attr-defined]
from aioquic.quic.configuration import SMALLEST_MAX_DATAGRAM_SIZE, QuicConfiguration
from aioquic.quic.connection import TRANSPORT_CLOSE_FRAME_CAPACITY
from aioquic.quic.crypto import CryptoPair
from aioquic.quic.packet import (
    QuicErrorCode,
    QuicFrameType,
    QuicHeader,
    QuicPacketType,
    encode_quic_retry,
    encode_quic_version_negotiation,
    pull_quic_header,
)
from aioquic.quic.packet_builder import QuicPacketBuilder
from aioquic.quic.retry import QuicRetryTokenHandler

from edgesync import limits
from edgesync.errors import PeerBusyError, PeerUnreachableError, TransportError
from edgesync.transport.engine import Connection
from edgesync.transport.flow import Budget
from edgesync.transport.interfaces import Interfaces
from edgesync.transport.link import Link
from edgesync.transport.quic import CONNECTION_ID_BYTES, DEFAULT_CONTROLLER
from edgesync.transport.streams import LinkOwner
from edgesync.transport.udp import Address, UdpSocket, bind, source_key

REFUSALS_PER_S: Final = 50
"""Stateless answers to strangers: each costs key derivation, so a flood gets silence."""


class Doorman(Protocol):
    """What the endpoint decides about accepting."""

    def new_owner(self) -> LinkOwner: ...
    def accepted(self, link: Link) -> None: ...


class Switchboard:
    def __init__(
        self,
        host: str,
        port: int,
        *,
        server: QuicConfiguration,
        doorman: Doorman,
        budget: Budget,
        max_unproven: int = limits.MAX_UNPROVEN_CONNECTIONS,
        max_unproven_per_address: int = limits.MAX_UNPROVEN_PER_ADDRESS,
        congestion: str = DEFAULT_CONTROLLER,
        offload: bool = True,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._server = server
        self._doorman = doorman
        self._budget = budget
        self._max_unproven = max_unproven
        self._max_unproven_per_address = max_unproven_per_address
        self._congestion = congestion
        self._links: dict[bytes, Link] = {}
        self._touched: dict[Link, None] = {}
        self._dirty: dict[Link, None] = {}
        self._flush_scheduled = False
        self._gathered: list[bytes] = []
        self._gathered_id = b""
        self._gathered_from: Address = ()
        self.sending: dict[Link, None] = {}
        """Links on which somebody waits for sent bytes to be acknowledged."""
        self._unproven: dict[Link, str] = {}
        self._unproven_by_source: Counter[str] = Counter()
        self._retry = QuicRetryTokenHandler()
        self._refusals = float(REFUSALS_PER_S)
        self._refusals_at = self._loop.time()
        self._dialing: dict[Link, None] = {}
        self.refused = 0
        self.retried = 0
        self.accepting = True
        self.interfaces = Interfaces()
        self.socket = UdpSocket(
            bind(host, port),
            received=self._received,
            batch_done=self._batch_done,
            refused=self._unreachable,
            offload=offload,
        )

    # --- routes

    def route(self, connection_id: bytes, link: Link) -> None:
        self._links[connection_id] = link
        link.connection_ids.add(connection_id)

    def unroute(self, connection_id: bytes, link: Link) -> None:
        self._links.pop(connection_id, None)
        link.connection_ids.discard(connection_id)

    def remove(self, link: Link) -> None:
        """Forget a link that is over, and give back what its base window reserved."""
        for connection_id in link.connection_ids:
            self._links.pop(connection_id, None)
        link.connection_ids.clear()
        self._touched.pop(link, None)
        self._dirty.pop(link, None)
        self.sending.pop(link, None)
        self._dialing.pop(link, None)
        self.proven(link)
        self._budget.release(link.base_window)

    @property
    def unproven(self) -> int:
        return len(self._unproven)

    def is_unproven(self, link: Link) -> bool:
        return link in self._unproven

    def proven(self, link: Link) -> None:
        """The link is a stranger's no more (or is over)."""
        source = self._unproven.pop(link, None)
        if source is not None:
            self._unproven_by_source[source] -= 1
            if not self._unproven_by_source[source]:
                del self._unproven_by_source[source]

    # --- sending

    def send(self, datagrams: Sequence[tuple[bytes, Address]]) -> OSError | None:
        return self.socket.send(datagrams)

    def mark(self, link: Link) -> None:
        """Transmit once for everything that happens until the loop has run what is ready now."""
        self._dirty[link] = None
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_scheduled = False
        dirty, self._dirty = self._dirty, {}
        now = self._loop.time()
        for link in dirty:
            link.transmit(now)

    # --- receiving

    def _received(self, datagrams: Sequence[bytes], address: Address) -> None:
        """Gather what belongs together; the kernel may have joined datagrams of several connections."""
        for data in datagrams:
            if not data:
                continue
            if data[0] & 0x80:
                self._deliver()
                self._long_header(data, address)
                continue
            connection_id = data[1 : 1 + CONNECTION_ID_BYTES]
            if connection_id != self._gathered_id or address != self._gathered_from:
                self._deliver()
                self._gathered_id, self._gathered_from = connection_id, address
            self._gathered.append(data)

    def _deliver(self) -> None:
        """Hand what was gathered to its link."""
        datagrams, self._gathered = self._gathered, []
        if not datagrams:
            return
        link = self._links.get(self._gathered_id)
        if link is not None:
            self._hand(link, datagrams, self._gathered_from)

    def _long_header(self, data: bytes, address: Address) -> None:
        if len(data) <= 6:
            return
        link = self._links.get(data[6 : 6 + data[5]])
        if link is None:
            link = self._stranger(data, address)
        if link is not None:
            self._hand(link, [data], address)

    def _hand(self, link: Link, datagrams: Sequence[bytes], address: Address) -> None:
        link.datagrams_received(datagrams, address, self._loop.time())
        if link.quic.heard() or link.dialed:
            self._touched[link] = None
        else:
            # Noise, or the late answer to a dial that was given up: no reason to keep a stranger's place.
            link.lost(TransportError("what came was no client's first packet"))

    def _batch_done(self) -> None:
        self._deliver()
        touched, self._touched = self._touched, {}
        if touched:
            self.socket.suit_delay(min(link.quic.smoothed_rtt() for link in touched))
        now = self._loop.time()
        for link in touched:
            link.settle(now, len(touched))
            if link.error is None:
                self.mark(link)

    def _unreachable(self, address: Address) -> None:
        """ICMP says nobody listens there. Anybody can forge that, so only a dial believes it."""
        for link in tuple(self._dialing):
            if link.address[:2] == address[:2] and not link.handshake_complete:
                link.lost(PeerUnreachableError("nothing listens at that address"))

    # --- opening

    def dial(self, configuration: QuicConfiguration, address: Address, owner: LinkOwner) -> Link:
        """Raises PeerBusyError: the budget is used up."""
        if not self._budget.reserve(limits.UNPROVEN_WINDOW_BYTES):
            raise PeerBusyError("this machine has no room for another connection", retry_after_s=1)
        quic = Connection(configuration=configuration, peer_streams=0, congestion=self._congestion)
        link = Link(quic, self, owner, address=address, dialed=True, budget=self._budget)
        self.route(quic.host_cid, link)
        self._dialing[link] = None
        quic.connect(address, now=self._loop.time())
        self.mark(link)
        return link

    def dialed(self, link: Link) -> None:
        self._dialing.pop(link, None)

    def _stranger(self, data: bytes, address: Address) -> Link | None:
        if len(data) < SMALLEST_MAX_DATAGRAM_SIZE or not self.accepting:
            return None
        try:
            header = pull_quic_header(Buffer(data=data), host_cid_length=CONNECTION_ID_BYTES)
        except ValueError:
            return None
        if header.version is None or header.packet_type is QuicPacketType.VERSION_NEGOTIATION:
            return None
        if header.version not in self._server.supported_versions:
            self._answer(
                address,
                lambda: encode_quic_version_negotiation(
                    source_cid=header.destination_cid,
                    destination_cid=header.source_cid,
                    supported_versions=self._server.supported_versions,
                ),
            )
            return None
        if header.packet_type is not QuicPacketType.INITIAL:
            return None
        return self._admit(header, address)

    def _admit(self, header: QuicHeader, address: Address) -> Link | None:
        source = source_key(address)
        if (
            len(self._unproven) >= self._max_unproven
            or self._unproven_by_source[source] >= self._max_unproven_per_address
        ):
            self.refused += 1
            self._refuse(header, address, QuicErrorCode.CONNECTION_REFUSED)
            return None
        original_id = header.destination_cid
        retry_id: bytes | None = None
        if header.token:
            try:
                original_id = self._retry.validate_token(
                    address=address,
                    destination_cid=header.destination_cid,
                    token=header.token,
                    now=self._loop.time(),
                )
            except ValueError:
                self._refuse(header, address, QuicErrorCode.INVALID_TOKEN)
                return None
            retry_id = header.destination_cid
        elif len(self._unproven) >= limits.RETRY_FROM_UNPROVEN - 1:
            self._send_retry(header, address)
            return None
        if not self._budget.reserve(limits.UNPROVEN_WINDOW_BYTES):
            self._refuse(header, address, QuicErrorCode.CONNECTION_REFUSED)
            return None
        return self._accept(header, address, original_id, retry_id, source)

    def _accept(
        self,
        header: QuicHeader,
        address: Address,
        original_id: bytes,
        retry_id: bytes | None,
        source: str,
    ) -> Link:
        quic = Connection(
            configuration=self._server,
            original_destination_connection_id=original_id,
            retry_source_connection_id=retry_id,
            peer_streams=1,
            congestion=self._congestion,
        )
        owner = self._doorman.new_owner()
        link = Link(quic, self, owner, address=address, dialed=False, budget=self._budget)
        self.route(header.destination_cid, link)
        self.route(quic.host_cid, link)
        self._unproven[link] = source
        self._unproven_by_source[source] += 1
        self._doorman.accepted(link)
        return link

    def _answer(self, address: Address, make: Callable[[], bytes]) -> None:
        now = self._loop.time()
        self._refusals = min(
            float(REFUSALS_PER_S), self._refusals + (now - self._refusals_at) * REFUSALS_PER_S
        )
        self._refusals_at = now
        if self._refusals >= 1:
            self._refusals -= 1
            self.socket.send([(make(), address)])

    def _send_retry(self, header: QuicHeader, address: Address) -> None:
        assert header.version is not None
        self.retried += 1
        source_id = os.urandom(CONNECTION_ID_BYTES)
        token = self._retry.create_token(
            address=address,
            original_destination_connection_id=header.destination_cid,
            retry_source_connection_id=source_id,
            now=self._loop.time(),
        )
        packet = encode_quic_retry(
            version=header.version,
            source_cid=source_id,
            destination_cid=header.source_cid,
            original_destination_cid=header.destination_cid,
            retry_token=token,
        )
        self.socket.send([(packet, address)])

    def _refuse(self, header: QuicHeader, address: Address, code: QuicErrorCode) -> None:
        self._answer(address, lambda: _initial_close(header, code))

    def close(self) -> None:
        self.socket.close()


def _initial_close(header: QuicHeader, code: QuicErrorCode) -> bytes:
    """A server's Initial packet that closes, made without any state (RFC 9000 section 5.2.2)."""
    assert header.version is not None
    crypto = CryptoPair()
    crypto.setup_initial(cid=header.destination_cid, is_client=False, version=header.version)
    builder = QuicPacketBuilder(
        host_cid=header.destination_cid,
        is_client=False,
        max_datagram_size=SMALLEST_MAX_DATAGRAM_SIZE,
        peer_cid=header.source_cid,
        version=header.version,
    )
    builder.start_packet(QuicPacketType.INITIAL, crypto)
    buf = builder.start_frame(
        QuicFrameType.TRANSPORT_CLOSE, capacity=TRANSPORT_CLOSE_FRAME_CAPACITY
    )
    buf.push_uint_var(code)
    buf.push_uint_var(QuicFrameType.PADDING)
    buf.push_uint_var(0)
    datagrams, _ = builder.flush()
    return bytes(datagrams[0])
