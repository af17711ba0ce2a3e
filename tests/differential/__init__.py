"""The short cuts of ``edgesync.transport.fast`` against stock aioquic: one story, four pairs of engines, one outcome.

A seed makes a story (streams, resets, key updates, address and connection-id changes, broken peers) and a bad network.
It is played in memory on a virtual clock by fast/fast, fast/stock, stock/fast and stock/stock; what each side read and
why each connection ended must be the same for all four. Packets, timing and order of events may differ.
"""

import hashlib
import heapq
import random
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aioquic.buffer import encode_uint_var
from aioquic.quic import events
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection, QuicConnectionState
from aioquic.tls import CipherSuite, Epoch

from edgesync.identity import Identity, self_signed
from edgesync.transport.fast.sending import FastQuicConnection
from edgesync.transport.quic import CONNECTION_ID_BYTES, BoundedQuicConnection

PAIRS = (("fast", "fast"), ("fast", "stock"), ("stock", "fast"), ("stock", "stock"))
IDENTITY = self_signed(Identity.generate(), "server")
SERVER_ADDRESS = ("192.0.2.2", 7443)
STREAMS = 8
BATCH_S = 0.0004
PATIENCE_S = 300.0
KEEP_ALIVE_S = 1.0
"""A client that moved must go on showing its address: the server may have given up on it after lost challenges."""
MAX_STEPS = 60_000


@dataclass
class Story:
    """What both sides do, whatever engine they use."""

    seed: int
    loss: float
    duplication: float
    reordering: float
    delay: float
    window: int
    datagram: int
    cipher: CipherSuite
    sends: list[tuple[str, int, bytes, str]]
    """(side, stream id, bytes, how it ends: fin, reset, stop)"""
    key_updates: dict[str, float]
    """Side to the share of all bytes read at which it asks for new keys."""
    rebind_at: float | None
    moves_address: bool
    change_id_at: float | None
    ending: str


def tell(seed: int) -> Story:
    rng = random.Random(seed)
    rough = rng.random() < 0.8
    sends = []
    for index in range(rng.randint(1, 4)):
        stream_id = 4 * index + rng.choice((0, 0, 1))
        if any(stream_id == other for _, other, _, _ in sends):
            continue
        size = rng.choice((0, 1, rng.randint(2, 2000), rng.randint(2000, 40_000)))
        for side in ("client", "server"):
            end = rng.choices(("fin", "reset", "stop"), (8, 1, 1))[0]
            count = size if side == "server" else rng.choice((3, 500, size))
            if end != "fin":
                count = max(1, count)
            sends.append((side, stream_id, rng.randbytes(count), end))
    rebind_at = rng.random() if rng.random() < 0.25 else None
    # aioquic keeps no old keys: a server that took new ones cannot read what a client it lost still sends.
    updaters = ("client",) if rebind_at is not None else ("client", "server")
    return Story(
        seed=seed,
        loss=rng.choice((0.01, 0.05, 0.15)) if rough else 0.0,
        duplication=rng.choice((0.0, 0.05)) if rough else 0.0,
        reordering=rng.choice((0.0, 0.1, 0.5)) if rough else 0.0,
        delay=rng.choice((0.0005, 0.005, 0.05)),
        window=rng.choice((2_500, 16_384, 100_000)),
        datagram=rng.choice((1200, 1452, 1452, 4000)),
        cipher=rng.choice((CipherSuite.AES_128_GCM_SHA256, CipherSuite.CHACHA20_POLY1305_SHA256)),
        sends=sends,
        key_updates={side: rng.random() for side in updaters if rng.random() < 0.25},
        rebind_at=rebind_at,
        moves_address=rng.random() < 0.5,
        change_id_at=rng.random() if rng.random() < 0.2 else None,
        ending=rng.choices(
            ("client closes", "server closes", "silence", *BREAKS), (4, 4, 1, *[1] * len(BREAKS))
        )[0],
    )


@dataclass
class Outcome:
    read: dict[tuple[str, int], tuple[int, str, str]] = field(default_factory=dict)
    """(reader, stream id) to bytes, their hash, and how it ended."""
    closed: dict[str, tuple[int, int | None, str]] = field(default_factory=dict)
    trouble: str = ""


class Reading:
    def __init__(self) -> None:
        self.count = 0
        self.hash = hashlib.sha256()
        self.end = ""


class Play:
    """One story with one pair of engines."""

    def __init__(self, story: Story, engines: tuple[str, str]) -> None:
        self.story = story
        self.rng = random.Random(story.seed * 4 + 1)
        self.now = 0.0
        self.client_address = ("192.0.2.1", 1000)
        self.wire: list[tuple[float, int, str, bytes, tuple[str, int]]] = []
        self.count = 0
        self.perfect = False
        self.cut = False
        self.read: dict[tuple[str, int], Reading] = {}
        self.closed: dict[str, tuple[int, int | None, str]] = {}
        self.ping_at = KEEP_ALIVE_S
        self.done: set[str] = set()
        self.total = sum(len(data) for _, _, data, _ in story.sends)
        client = self._make(engines[0], client=True, original=None)
        server = self._make(
            engines[1], client=False, original=client.original_destination_connection_id
        )
        self.sides: dict[str, Any] = {"client": client, "server": server}
        self.consumed = {"client": 0, "server": 0}
        client.connect(SERVER_ADDRESS, now=0.0)

    def _make(self, engine: str, *, client: bool, original: bytes | None) -> QuicConnection:
        assert IDENTITY.certificate is not None
        configuration = QuicConfiguration(
            is_client=client,
            alpn_protocols=["x"],
            connection_id_length=CONNECTION_ID_BYTES,
            idle_timeout=30.0,
            max_datagram_size=self.story.datagram,
            max_data=4 * self.story.window,
            max_stream_data=self.story.window,
            verify_mode=ssl.CERT_NONE if client else None,
            certificate=None if client else IDENTITY.certificate,
            private_key=None if client else IDENTITY.private_key,
            cipher_suites=[self.story.cipher],
        )
        kwargs = {
            "configuration": configuration,
            "original_destination_connection_id": original,
        }
        if engine == "fast":
            return FastQuicConnection(peer_streams=STREAMS, **kwargs)
        if engine == "bounded":
            return BoundedQuicConnection(peer_streams=STREAMS, **kwargs)
        return QuicConnection(**kwargs)

    # --- the network

    def _transmit(self, side: str) -> None:
        quic = self.sides[side]
        if not quic._network_paths:
            return
        other = "server" if side == "client" else "client"
        while datagrams := quic.datagrams_to_send(self.now):
            for data, to in datagrams:
                if self.cut or (other == "client" and to != self.client_address):
                    continue
                self._carry(other, data)
            if not isinstance(quic, FastQuicConnection):
                break

    def _carry(self, to: str, data: bytes) -> None:
        story, rng = self.story, self.rng
        copies = 1
        if not self.perfect:
            if rng.random() < story.loss:
                return
            copies += rng.random() < story.duplication
        origin = self.client_address if to == "server" else SERVER_ADDRESS
        for _ in range(copies):
            self.count += 1
            late = story.delay
            if not self.perfect and rng.random() < story.reordering:
                late += rng.random() * 0.8 * story.delay
            heapq.heappush(self.wire, (self.now + late, self.count, to, data, origin))

    def _arrive(self) -> None:
        batches: dict[tuple[str, tuple[str, int]], list[bytes]] = {}
        while self.wire and self.wire[0][0] <= self.now + BATCH_S:
            _, _, to, data, origin = heapq.heappop(self.wire)
            batches.setdefault((to, origin), []).append(data)
        for (to, origin), datagrams in batches.items():
            quic = self.sides[to]
            if isinstance(quic, BoundedQuicConnection):
                quic.receive_datagrams(datagrams, origin, self.now)
            else:
                for data in datagrams:
                    quic.receive_datagram(data, origin, self.now)

    # --- the two sides

    def _start(self, side: str) -> None:
        """Write everything this side sends on streams it opens; what the peer opens is answered when it shows."""
        quic = self.sides[side]
        for who, stream_id, data, end in self.story.sends:
            if who == side and (stream_id & 1) == (side == "server"):
                self._write(quic, stream_id, data, end)

    def _write(self, quic: Any, stream_id: int, data: bytes, end: str) -> None:
        for lower in range(stream_id & 3, stream_id, 4):
            mine = bool(stream_id & 1) != quic._is_client
            if mine and lower not in quic._streams and not quic._stream_is_discarded(lower):
                quic.send_stream_data(lower, b"")
        quic.send_stream_data(stream_id, data, end_stream=end == "fin")

    def _events(self, side: str) -> None:
        quic = self.sides[side]
        while (event := quic.next_event()) is not None:
            if isinstance(event, events.ConnectionTerminated):
                self.closed[side] = (event.error_code, event.frame_type, event.reason_phrase)
            elif isinstance(event, events.HandshakeCompleted):
                self._start(side)
            elif isinstance(event, events.StreamDataReceived):
                self._data(side, event)
            elif isinstance(event, events.StreamReset):
                self._reading(side, event.stream_id).end = f"reset {event.error_code}"

    def _reading(self, side: str, stream_id: int) -> Reading:
        reading = self.read.get((side, stream_id))
        if reading is None:
            reading = self.read[side, stream_id] = Reading()
            if (stream_id & 1) != (side == "server"):  # the peer opened it: answer
                for who, other, data, end in self.story.sends:
                    if who == side and other == stream_id:
                        self._write(self.sides[side], stream_id, data, end)
        return reading

    def _data(self, side: str, event: events.StreamDataReceived) -> None:
        reading = self._reading(side, event.stream_id)
        reading.count += len(event.data)
        reading.hash.update(event.data)
        if event.end_stream:
            reading.end = "fin"
        quic = self.sides[side]
        self.consumed[side] += len(event.data)
        if isinstance(quic, BoundedQuicConnection):
            stream = quic.stream(event.stream_id)
            if stream is not None:
                stream.max_stream_data_local = max(
                    stream.max_stream_data_local, reading.count + self.story.window
                )
            quic.set_connection_limit(self.consumed[side] + 4 * self.story.window)
            quic.allow_streams(STREAMS)
        other = "client" if side == "server" else "server"
        for who, stream_id, data, end in self.story.sends:
            if who == other and stream_id == event.stream_id and reading.count == len(data):
                if end == "reset":
                    self.sides[other].reset_stream(stream_id, 7)
                elif end == "stop" and stream_id in quic._streams:
                    quic.stop_stream(stream_id, 9)

    # --- turns of the story

    def _turns(self) -> None:
        story = self.story
        share = sum(self.consumed.values()) / self.total if self.total else 1.0
        settled = all(q._handshake_confirmed for q in self.sides.values())
        if not settled:
            self.ping_at = max(self.ping_at, self.now + KEEP_ALIVE_S)
            return
        if self.now >= self.ping_at and not self.perfect:
            self.ping_at = self.now + KEEP_ALIVE_S
            self.sides["client"].send_ping(4)
        for side, at in story.key_updates.items():
            if share >= at:
                self._once(f"keys of {side}", lambda side=side: self._update_keys(side))
        if story.rebind_at is not None and share >= story.rebind_at:
            self._once("rebind", self._rebind)
        if story.change_id_at is not None and share >= story.change_id_at:
            self._once("id", self.sides["client"].change_connection_id)

    def _once(self, name: str, act: Callable[[], None]) -> None:
        if name not in self.done:
            self.done.add(name)
            act()

    def _update_keys(self, side: str) -> None:
        self.sides[side].request_key_update()
        # aioquic keeps no old keys: something must go on being sent until the peer has followed.
        self.sides[side].send_ping(2)

    def _rebind(self) -> None:
        host = "192.0.2.9" if self.story.moves_address else self.client_address[0]
        self.client_address = (host, 2000)
        self.sides["client"].send_ping(1)

    def _finished(self) -> bool:
        for who, stream_id, _, _ in self.story.sends:
            reader = "client" if who == "server" else "server"
            reading = self.read.get((reader, stream_id))
            if reading is None or not reading.end:
                return False
        return True

    def _end(self) -> None:
        self.perfect = True
        ending = self.story.ending
        if ending == "silence":
            self.cut = True
        elif ending in BREAKS:
            self._inject(BREAKS[ending])
        else:
            self.sides[ending.split()[0]].close(error_code=0x155, reason_phrase=ending)

    def _inject(self, make: Callable[["Play"], tuple[bytes, int]]) -> None:
        """A packet of the server's that no honest one sends."""
        server = self.sides["server"]
        payload, flags = make(self)
        pair = server._cryptos[Epoch.ONE_RTT]
        number = server._packet_number
        server._packet_number += 1
        header = bytes([0x43 | pair.key_phase << 2 | flags]) + server._peer_cid.cid
        header += number.to_bytes(4, "big")
        body = pair.send.aead.encrypt(payload, header, number)
        self._carry("client", pair.send.hp.apply(header, body))

    # --- the play

    def run(self) -> Outcome:
        outcome = Outcome()
        ended = False
        self._transmit("client")
        for _ in range(MAX_STEPS):
            timers = [
                timer
                for quic in self.sides.values()
                if quic._network_paths and (timer := quic.get_timer()) is not None
            ]
            upcoming = [*timers, *(item[0] for item in self.wire[:1])]
            if not self.perfect:
                upcoming.append(max(self.now, self.ping_at))
            if not upcoming:
                break
            self.now = max(self.now + 1e-6, min(upcoming))
            if self.now > PATIENCE_S:
                outcome.trouble = "not finished in time"
                break
            self._arrive()
            for side, quic in self.sides.items():
                if not quic._network_paths:
                    continue
                timer = quic.get_timer()
                if timer is not None and timer <= self.now:
                    quic.handle_timer(self.now)
                self._events(side)
            self._turns()
            if not ended and self._finished():
                self.perfect = True
                if self._quiet():
                    ended = True
                    self._end()
            if len(self.closed) == 2:
                break
            for side in self.sides:
                self._transmit(side)
        else:
            outcome.trouble = "too many steps"
        outcome.closed = self.closed
        for key, reading in self.read.items():
            if reading.count or reading.end:
                outcome.read[key] = (reading.count, reading.hash.hexdigest(), reading.end)
        return outcome

    def _quiet(self) -> bool:
        """Whether nothing is under way that the end could cut off: both sides have all turns behind them."""
        if self.wire:
            return False
        if self.sides["server"]._network_paths[0].addr != self.client_address:
            self.sides["client"].send_ping(
                3
            )  # the server gave up on the new address: show it again
            return False
        return all(
            quic._state is QuicConnectionState.CONNECTED
            and quic._network_paths[0].is_validated
            and not quic._spaces[Epoch.ONE_RTT].ack_eliciting_in_flight
            for quic in self.sides.values()
        )


def _free_stream(play: Play) -> int:
    """A stream of the client's that the server never answered or that is open no more is not enough: take a new one."""
    used = [stream_id for _, stream_id, _, _ in play.story.sends if stream_id & 1]
    return max(used, default=-3) + 4


def _stream(stream_id: int, offset: int, data: bytes, *, fin: bool) -> bytes:
    return (
        bytes([0x0E | fin])
        + encode_uint_var(stream_id)
        + encode_uint_var(offset)
        + encode_uint_var(len(data))
        + data
    )


BREAKS: dict[str, Callable[[Play], tuple[bytes, int]]] = {
    "unknown frame": lambda _: (b"\x3f" + bytes(20), 0),
    "truncated stream frame": lambda p: (
        b"\x0e" + encode_uint_var(_free_stream(p)) + b"\x00\x7f\xff" + bytes(20),
        0,
    ),
    "over the stream's window": lambda p: (
        _stream(_free_stream(p), p.story.window - 10, bytes(11), fin=False),
        0,
    ),
    "too many streams": lambda _: (_stream(4 * 5000 + 1, 0, bytes(20), fin=False), 0),
    "a stream nobody opened": lambda _: (_stream(4 * 5000, 0, bytes(20), fin=False), 0),
    "final size changed": lambda p: (
        _stream(_free_stream(p), 0, bytes(20), fin=True)
        + _stream(_free_stream(p), 15, bytes(20), fin=False),
        0,
    ),
    "reserved bits": lambda _: (b"\x01" + bytes(20), 0x18),
    "no frames": lambda _: (b"", 0),
    "too far": lambda p: (
        b"\x0e"
        + encode_uint_var(_free_stream(p))
        + (0xC000000000000000 | (1 << 62) - 5).to_bytes(8, "big")
        + b"\x0a"
        + bytes(10),
        0,
    ),
}


def play(seed: int, engines: tuple[str, str]) -> Outcome:
    return Play(tell(seed), engines).run()


def compare(seed: int) -> list[str]:
    """How the four outcomes of a seed differ; empty: not at all."""
    outcomes = {pair: play(seed, pair) for pair in PAIRS}
    reference = outcomes["stock", "stock"]
    return [
        f"seed {seed}: {'/'.join(pair)} {outcome.trouble or 'differs from stock/stock'}"
        for pair, outcome in outcomes.items()
        if outcome.trouble or outcome != reference
    ]
