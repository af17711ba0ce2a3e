"""Attacks on a QUIC endpoint's memory, by a stranger and by a member, on raw aioquic.

::

    python -m edgesync.testing.hostile_quic HOST PORT [--identity KEY_PEM CERT_PEM] [--pid PID]

runs every attack there is (those after the proof only with an identity of the fleet) and prints one JSON line each:
``{"schema":"edgesync.attack/1","attack","seconds","rss_growth_bytes"}``; growth is the target's peak resident size over
its size before the first attack, null without ``--pid``. Only ever point it at a machine of your own. ``HostileQuic``
is also what tests build single misbehaviours from.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from aioquic.buffer import encode_uint_var
from aioquic.quic import events
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.packet import QuicFrameType, QuicPacketType
from aioquic.quic.packet_builder import QuicPacketBuilder
from aioquic.tls import Epoch
from cryptography.hazmat.primitives.serialization import Encoding

from edgesync import limits
from edgesync.identity import Identity
from edgesync.wire import codec, messages
from edgesync.wire.messages import ALPN, ALPN_JOIN, Hello, Message, Proof

_PACKET: Final = {
    Epoch.INITIAL: QuicPacketType.INITIAL,
    Epoch.HANDSHAKE: QuicPacketType.HANDSHAKE,
    Epoch.ONE_RTT: QuicPacketType.ONE_RTT,
}


class HostileQuic:
    """A client that may do anything: handshake, prove, and put any frame into any packet."""

    def __init__(self, address: tuple[str, int], *, alpn: str = ALPN, source: str = "") -> None:
        self.address = address
        self._loop = asyncio.get_running_loop()
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._sock = socket.socket(family, socket.SOCK_DGRAM)
        self._sock.setblocking(False)
        if source:
            self._sock.bind((source, 0))
        self.quic = QuicConnection(
            configuration=QuicConfiguration(
                alpn_protocols=[alpn],
                idle_timeout=30,
                verify_mode=ssl.CERT_NONE,
                max_data=16 * limits.MIB,
                max_stream_data=16 * limits.MIB,
            )
        )
        self.handshaken = asyncio.Event()
        self.ended: events.ConnectionTerminated | None = None
        self.over = asyncio.Event()
        self._data: dict[int, bytearray] = {}
        self._arrived = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self.reading = True

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.drop()

    def first_flight(self) -> None:
        """Send an Initial and nothing after it: half a handshake."""
        self.quic.connect(self.address, now=self._loop.time())
        self._transmit()

    async def handshake(self, timeout_s: float = 10.0) -> None:
        """Raises TimeoutError, ConnectionError."""
        self.first_flight()
        await self.handshake_rest(timeout_s)

    async def handshake_rest(self, timeout_s: float = 0.5) -> None:
        """What follows ``first_flight``, if the other side still wants it."""
        self._loop.add_reader(self._sock.fileno(), self._readable)
        await self._until(self.handshaken, timeout_s)

    async def prove(self, identity: Identity, *, listen_port: int = 0) -> None:
        """The honest opening of a session, so that what follows is a member's misbehaviour."""
        self.send(0, codec.encode(Hello(protocols=[1])))
        challenge = await self.read_message(0)
        assert isinstance(challenge, messages.Challenge)
        certificate = self.quic.tls._peer_certificate  # noqa: SLF001 - aioquic has no public way to it
        assert certificate is not None
        digest = hashlib.sha256(certificate.public_bytes(Encoding.DER)).digest()
        payload = messages.proof_payload(
            role="client", nonce=challenge.nonce, server_certificate_sha256=digest
        )
        proof = Proof(
            certificate=identity.certificate_der,
            signature=identity.sign("proof", payload),
            listen_port=listen_port,
        )
        self.send(0, codec.encode(proof))
        welcome = await self.read_message(0)
        assert isinstance(welcome, messages.Welcome), welcome

    def send(self, stream_id: int, data: bytes, *, end: bool = False) -> None:
        self.quic.send_stream_data(stream_id, data, end_stream=end)
        self._transmit()

    def frame(self, frame_type: int, body: bytes, *, epoch: Epoch = Epoch.ONE_RTT) -> None:
        """One packet with one frame of our making."""
        quic: Any = self.quic
        builder = QuicPacketBuilder(
            host_cid=quic.host_cid,
            is_client=True,
            max_datagram_size=1200,
            packet_number=quic._packet_number,  # noqa: SLF001
            peer_cid=quic._peer_cid.cid,  # noqa: SLF001
            peer_token=quic._peer_token,  # noqa: SLF001
            version=quic._version,  # noqa: SLF001
        )
        builder.start_packet(_PACKET[epoch], quic._cryptos[epoch])  # noqa: SLF001
        builder.start_frame(frame_type, capacity=len(body) + 1).push_bytes(body)
        datagrams, _ = builder.flush()
        quic._packet_number = builder.packet_number  # noqa: SLF001
        for datagram in datagrams:
            self._sendto(datagram)

    def stream_frame(self, stream_id: int, offset: int, data: bytes) -> None:
        body = encode_uint_var(stream_id) + encode_uint_var(offset) + encode_uint_var(len(data))
        self.frame(QuicFrameType.STREAM_BASE | 4 | 2, body + data)

    def crypto_frame(self, offset: int, data: bytes, *, epoch: Epoch) -> None:
        body = encode_uint_var(offset) + encode_uint_var(len(data)) + data
        self.frame(QuicFrameType.CRYPTO, body, epoch=epoch)

    async def read(self, stream_id: int, count: int, timeout_s: float = 10.0) -> bytes:
        async with asyncio.timeout(timeout_s):
            while len(self._data.get(stream_id, b"")) < count:
                if self.ended is not None:
                    raise ConnectionError(self.ended.reason_phrase)
                self._arrived.clear()
                await self._arrived.wait()
        buffer = self._data[stream_id]
        data = bytes(buffer[:count])
        del buffer[:count]
        return data

    async def read_message(self, stream_id: int) -> Message:
        length = int.from_bytes(await self.read(stream_id, 4), "big")
        return codec.decode(await self.read(stream_id, length))

    async def wait_ended(self, timeout_s: float = 10.0) -> events.ConnectionTerminated:
        """Why the other side closed. Raises TimeoutError: it did not."""
        async with asyncio.timeout(timeout_s):
            await self.over.wait()
        assert self.ended is not None
        return self.ended

    def leave(self) -> None:
        """Close as an honest client does."""
        self.quic.close()
        self._transmit()

    def drop(self) -> None:
        """Vanish without a word."""
        if self._timer is not None:
            self._timer.cancel()
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()

    async def _until(self, event: asyncio.Event, timeout_s: float) -> None:
        over = self._loop.create_task(self.over.wait())
        wanted = self._loop.create_task(event.wait())
        done, pending = await asyncio.wait(
            (over, wanted), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        for task in pending:
            task.cancel()
        if not done:
            raise TimeoutError
        if not event.is_set():
            assert self.ended is not None
            raise ConnectionError(self.ended.reason_phrase or hex(self.ended.error_code))

    def _sendto(self, datagram: bytes) -> None:
        with contextlib.suppress(OSError):
            self._sock.sendto(datagram, self.address)

    def _readable(self) -> None:
        if not self.reading:
            self._loop.remove_reader(self._sock.fileno())
            return
        with contextlib.suppress(OSError):
            for _ in range(64):
                data, _address = self._sock.recvfrom(2048)
                self.quic.receive_datagram(data, self.address, self._loop.time())
        self._events()
        self._transmit()

    def _events(self) -> None:
        while (event := self.quic.next_event()) is not None:
            match event:
                case events.HandshakeCompleted():
                    self.handshaken.set()
                case events.StreamDataReceived():
                    self._data.setdefault(event.stream_id, bytearray()).extend(event.data)
                case events.ConnectionTerminated():
                    self.ended = event
                    self.over.set()
                case _:
                    pass
        closing = self.quic._close_event  # noqa: SLF001
        if closing is not None and self.ended is None:
            self.ended = closing
            self.over.set()
        self._arrived.set()

    def _transmit(self) -> None:
        if self._sock.fileno() < 0:
            return
        now = self._loop.time()
        for datagram, _ in self.quic.datagrams_to_send(now):
            self._sendto(datagram)
        at = self.quic.get_timer()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if at is not None:
            self._timer = self._loop.call_at(max(at, now + 0.001), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.quic.handle_timer(self._loop.time())
        self._events()
        self._transmit()


# --- attacks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    address: tuple[str, int]
    member: Identity | None = None
    sources: tuple[str, ...] = ("",)
    """Local addresses to attack from; several get past the cap per address."""


async def far_crypto(target: Target) -> None:
    """A byte of TLS far ahead, in each packet space a stranger reaches."""
    for number in range(40):
        source = target.sources[number % len(target.sources)]
        async with HostileQuic(target.address, source=source) as client:
            client.first_flight()
            for offset in (500_000, 16_000):
                client.crypto_frame(offset, b"x", epoch=Epoch.INITIAL)
            with contextlib.suppress(OSError, TimeoutError):
                await client.handshake_rest()
                for offset in (400_000, 500_000, 16_000):
                    client.crypto_frame(offset, b"x", epoch=Epoch.ONE_RTT)
        await asyncio.sleep(0)


async def far_stream_before_proof(target: Target) -> None:
    """One byte at the end of the stranger's window, and one far behind it."""
    for offset in (limits.UNPROVEN_WINDOW_BYTES - 1, 2**20, 2**40):
        for _ in range(4):
            with contextlib.suppress(OSError, TimeoutError):
                async with HostileQuic(target.address) as client:
                    await client.handshake()
                    client.stream_frame(0, offset, b"x")
                    with contextlib.suppress(TimeoutError):
                        await client.wait_ended(0.2)
                    client.leave()


async def half_open(target: Target, count: int = 1000) -> None:
    """Handshakes that are begun and left, from as many addresses as there are."""
    clients = []
    for number in range(count):
        client = HostileQuic(target.address, source=target.sources[number % len(target.sources)])
        client.first_flight()
        clients.append(client)
        if len(clients) >= 200:
            clients.pop(0).drop()
        if number % 20 == 19:
            await asyncio.sleep(0.01)
    for client in clients:
        client.drop()


async def silent_strangers(target: Target) -> None:
    """Finished handshakes that never say who they are, with a window full of nothing."""
    async with contextlib.AsyncExitStack() as stack:
        for number in range(64):
            source = target.sources[number % len(target.sources)]
            client = await stack.enter_async_context(HostileQuic(target.address, source=source))
            with contextlib.suppress(OSError, TimeoutError):
                await client.handshake(0.5)
                client.send(
                    0, (limits.UNPROVEN_WINDOW_BYTES - 8).to_bytes(4, "big") + bytes(15_000)
                )
        await asyncio.sleep(0.5)


def _bombs() -> list[bytes]:
    """Frame bodies that want to be more than they are."""
    nested = b"\x91" * 30_000
    maps = b"\x81\xa1x" * 10_000
    claims = [
        b"\xdd\xff\xff\xff\xff",  # an array of four thousand million
        b"\xdf\xff\xff\xff\xff",  # a map of as many
        b"\xc6\xff\xff\xff\xff",  # bytes of as many
        b"\xdb\xff\xff\xff\xff",  # text of as many
    ]
    known = [b"\x82\xa4type\x05\xa8manifest" + claim for claim in claims]
    ignored = [b"\x83\xa4type\x05\xa8manifest\xc4\x20" + bytes(32) + b"\xa1z" + b for b in claims]
    deep = [
        b"\x83\xa4type\x05\xa8manifest\xc4\x20" + bytes(32) + b"\xa1z" + b for b in (nested, maps)
    ]
    wide = (
        b"\x83\xa4type\x07\xa8manifest\xc4\x20"
        + bytes(32)
        + b"\xa6pieces\xdc\x75\x30"
        + b"\x00" * 30_000
    )
    return [nested, maps, *claims, *known, *ignored, *deep, wide]


async def bombs_before_proof(target: Target) -> None:
    for alpn in (ALPN, ALPN_JOIN):
        for bomb in _bombs():
            body = bomb[: limits.UNPROVEN_WINDOW_BYTES // 2]
            with contextlib.suppress(OSError, TimeoutError):
                async with HostileQuic(target.address, alpn=alpn) as client:
                    await client.handshake()
                    client.send(0, len(body).to_bytes(4, "big") + body)
                    await client.wait_ended(2)


async def bombs_after_proof(target: Target) -> None:
    for bomb in _bombs():
        body = bomb[: limits.MAX_CONTROL_FRAME_BYTES]
        with contextlib.suppress(OSError, TimeoutError):
            async with await _member(target) as client:
                client.send(0, len(body).to_bytes(4, "big") + body)
                await client.wait_ended(2)
        with contextlib.suppress(OSError, TimeoutError):
            async with await _member(target) as client:
                body = bomb[: limits.MAX_QUESTION_FRAME_BYTES]
                client.send(4, len(body).to_bytes(4, "big") + body, end=True)
                await client.wait_ended(2)


async def far_stream_after_proof(target: Target) -> None:
    """Every stream a member may open, one byte at the end of each window; then behind it."""
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(limits.MAX_CONNECTIONS_PER_KEY):
            client = await stack.enter_async_context(await _member(target))
            for stream_id in range(0, 4 * (1 + limits.MAX_REQUESTS_PER_CONNECTION), 4):
                client.stream_frame(stream_id, limits.MEMBER_STREAM_WINDOW_BYTES - 1, b"x")
        await asyncio.sleep(0.3)
    for stream_id, offset in ((4, 2**20), (4, 2**50), (4 * 4096, 0), (0, 2**30)):
        async with await _member(target) as client:
            client.stream_frame(stream_id, offset, b"x")
            with contextlib.suppress(TimeoutError):
                await client.wait_ended(2)


async def shredded_stream(target: Target) -> None:
    """Every other byte of every window: as many gaps as bytes."""
    async with await _member(target) as client:
        for stream_id in range(4, 4 + 4 * limits.MAX_REQUESTS_PER_CONNECTION, 4):
            for offset in range(1, limits.MEMBER_STREAM_WINDOW_BYTES, 2):
                client.stream_frame(stream_id, offset, b"x")
                if offset % 400 == 1:
                    await asyncio.sleep(0.001)
                if client.ended is not None:
                    return


async def half_questions(target: Target) -> None:
    """Questions that are never finished, on every stream of every connection a member gets."""
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(limits.MAX_CONNECTIONS_PER_KEY):
            client = await stack.enter_async_context(await _member(target))
            half = limits.MAX_QUESTION_FRAME_BYTES.to_bytes(4, "big") + bytes(15_000)
            for stream_id in range(4, 4 + 4 * limits.MAX_REQUESTS_PER_CONNECTION, 4):
                client.send(stream_id, half)
            client.send(0, limits.MAX_CONTROL_FRAME_BYTES.to_bytes(4, "big") + bytes(30_000))
        await asyncio.sleep(1.0)


async def greedy_reader(target: Target) -> None:
    """Asks for everything at once and reads nothing."""
    async with await _member(target) as client:
        client.reading = False
        for stream_id in range(4, 4 + 4 * limits.MAX_REQUESTS_PER_CONNECTION, 4):
            pieces = [hashlib.sha256(b"%d" % n).digest() for n in range(256)]
            request = messages.Request(
                manifest=bytes(32), pieces=pieces, encodings=["identity", "zstd"]
            )
            client.send(stream_id, codec.encode(request), end=True)
        await asyncio.sleep(1.0)


async def frame_floods(target: Target) -> None:
    """Path challenges, retired connection ids, stops and resets by the thousand."""
    async with await _member(target) as client:
        half = limits.MAX_QUESTION_FRAME_BYTES.to_bytes(4, "big")
        client.send(4, half)
        client.send(8, half)
        for number in range(3000):
            client.frame(QuicFrameType.PATH_CHALLENGE, os.urandom(8))
            client.frame(QuicFrameType.STOP_SENDING, encode_uint_var(4) + encode_uint_var(0))
            client.frame(QuicFrameType.MAX_STREAM_DATA, encode_uint_var(8) + encode_uint_var(9))
            if number % 50 == 0:
                await asyncio.sleep(0.001)
            if client.ended is not None:
                return


async def _member(target: Target) -> HostileQuic:
    assert target.member is not None
    client = HostileQuic(target.address)
    try:
        await client.handshake()
        await client.prove(target.member)
    except BaseException:
        client.drop()
        raise
    return client


Attack = Callable[[Target], Awaitable[None]]
STRANGER_ATTACKS: Final[tuple[Attack, ...]] = (
    half_open,
    silent_strangers,
    far_crypto,
    far_stream_before_proof,
    bombs_before_proof,
)
FILLING_ATTACKS: Final = (half_open, silent_strangers, far_crypto)
"""Those that leave as many strangers behind as are taken."""
MEMBER_ATTACKS: Final[tuple[Attack, ...]] = (
    far_stream_after_proof,
    shredded_stream,
    half_questions,
    greedy_reader,
    bombs_after_proof,
    frame_floods,
)


def resident_bytes(pid: int, *, peak: bool = False) -> int:
    """Resident memory of a process (Linux); its peak since ``forget_peak``."""
    field = "VmHWM:" if peak else "VmRSS:"
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ProcessLookupError(pid)


def forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")


@dataclass(frozen=True)
class Outcome:
    attack: str
    seconds: float
    rss_growth_bytes: int | None
    """Peak resident size during the attack over the size before the first attack."""


async def run_all(
    target: Target,
    pid: int | None = None,
    *,
    by_strangers: tuple[Attack, ...] = STRANGER_ATTACKS,
    by_members: tuple[Attack, ...] = MEMBER_ATTACKS,
) -> AsyncIterator[Outcome]:
    """Every attack, the stranger's first; those after the proof only with a member's identity."""
    quiet = logging.getLogger("quic")
    quiet.setLevel(logging.CRITICAL)  # what the attacker's own stack thinks of it is of no interest
    if target.member is not None:
        async with await _member(
            target
        ) as client:  # one honest session, so that lazy imports are paid for
            client.leave()
    before = resident_bytes(pid) if pid is not None else 0
    for attacks in (by_strangers, by_members if target.member is not None else ()):
        for attack in attacks:
            if pid is not None:
                forget_peak(pid)
            started = time.monotonic()
            await attack(target)
            yield Outcome(
                getattr(attack, "__name__", "?"),
                round(time.monotonic() - started, 2),
                resident_bytes(pid, peak=True) - before if pid is not None else None,
            )
            if attack in FILLING_ATTACKS:
                # Strangers are given up after their time; until then they keep the next attack out too.
                await asyncio.sleep(limits.UNPROVEN_TIMEOUT_S + 0.2)


def many_sources(host: str) -> tuple[str, ...]:
    """Local addresses to attack ``host`` from: on loopback there are plenty."""
    return tuple(f"127.0.0.{n}" for n in range(2, 40)) if host.startswith("127.") else ("",)


async def _main(options: argparse.Namespace, member: Identity | None) -> None:
    target = Target((options.host, options.port), member, many_sources(options.host))
    async for outcome in run_all(target, options.pid):
        line = {"schema": "edgesync.attack/1", **dataclasses.asdict(outcome)}
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("--identity", nargs=2, metavar=("KEY_PEM", "CERT_PEM"))
    parser.add_argument("--pid", type=int)
    options = parser.parse_args()
    member = None
    if options.identity:
        key, certificate = (Path(name).read_bytes() for name in options.identity)
        member = Identity.from_pem(key, certificate)
    asyncio.run(_main(options, member))


if __name__ == "__main__":
    main()
