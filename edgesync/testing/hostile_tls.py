"""Attacks on the TLS port beside QUIC's, by a stranger and by a member, on blocking TLS of our own making.

``HostileTls`` is a client that may put any frame on the connection; the attacks run in threads, so that they disturb
no event loop. ``edgesync.testing.hostile_quic`` measures what they cost. Only ever point it at a machine of your own.
"""

import asyncio
import contextlib
import hashlib
import os
import socket
import ssl
import struct
import time
from collections.abc import Callable
from typing import Final, Self

from edgesync import limits
from edgesync.identity import Identity
from edgesync.testing.hostile_quic import Attack, Target
from edgesync.transport import mux
from edgesync.transport.mux import Frame, FrameReader, FrameType
from edgesync.transport.tls_pipe import client_context
from edgesync.wire import codec, messages
from edgesync.wire.messages import ALPN, Hello, Message, Proof

FIRST_STREAM: Final = 1


class HostileTls:
    """Blocking. Raises OSError where the other end does not want it (``ssl.SSLError`` is one)."""

    def __init__(self, address: tuple[str, int], *, source: str = "", alpn: str = ALPN) -> None:
        self.raw = socket.create_connection(address, 5, (source, 0) if source else None)
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = client_context(alpn).wrap_bio(self.incoming, self.outgoing)
        self._reader = FrameReader()
        self._data: dict[int, bytearray] = {}
        self.closed_by: Frame | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.raw.close()

    def hello(self) -> bytes:
        """A ClientHello, not sent."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.do_handshake()
        return self.outgoing.read()

    def handshake(self) -> None:
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush()
                self._more()
            else:
                self._flush()
                return

    def send(self, data: bytes) -> None:
        self.tls.write(data)
        self._flush()

    def prove(self, identity: Identity) -> None:
        """The honest opening of a session, so that what follows is a member's misbehaviour."""
        self.message(FIRST_STREAM, Hello(protocols=[1]))
        challenge = self.read_message(FIRST_STREAM)
        assert isinstance(challenge, messages.Challenge)
        certificate = self.tls.getpeercert(binary_form=True)
        assert certificate is not None
        payload = messages.proof_payload(
            role="client",
            nonce=challenge.nonce,
            server_certificate_sha256=hashlib.sha256(certificate).digest(),
        )
        self.message(
            FIRST_STREAM,
            Proof(
                certificate=identity.certificate_der,
                signature=identity.sign("proof", payload),
                listen_port=0,
            ),
        )
        assert isinstance(self.read_message(FIRST_STREAM), messages.Welcome)

    def message(self, stream: int, message: Message) -> None:
        self.send(mux.encode(FrameType.DATA, stream, codec.encode(message)))

    def read_message(self, stream: int) -> Message:
        length = int.from_bytes(self._read(stream, 4), "big")
        return codec.decode(self._read(stream, length))

    def wait_ended(self, timeout_s: float) -> None:
        """Read until the other end closes. Raises TimeoutError: it does not."""
        self.raw.settimeout(timeout_s)
        until = time.monotonic() + timeout_s
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while time.monotonic() < until:
                self._take()
            raise TimeoutError("the other end keeps the connection")

    def _read(self, stream: int, count: int) -> bytes:
        buffer = self._data.setdefault(stream, bytearray())
        while len(buffer) < count:
            self._take()
        data = bytes(buffer[:count])
        del buffer[:count]
        return data

    def _take(self) -> None:
        try:
            plain = self.tls.read(65_536)
        except ssl.SSLWantReadError:
            self._more()
            return
        if not plain:
            raise ConnectionResetError
        for frame in self._reader.feed(plain):
            if frame.type is FrameType.DATA:
                self._data.setdefault(frame.stream, bytearray()).extend(frame.payload)
            elif frame.type is FrameType.CLOSE:
                self.closed_by = frame

    def _more(self) -> None:
        data = self.raw.recv(65_536)
        if not data:
            raise ConnectionResetError
        self.incoming.write(data)

    def _flush(self) -> None:
        self.raw.sendall(self.outgoing.read())


def _refusals() -> contextlib.suppress:
    return contextlib.suppress(OSError)


def _source(target: Target, number: int) -> str:
    return target.sources[number % len(target.sources)]


# --- by strangers


def silent_sockets(target: Target) -> None:
    """Connections on which nothing ever comes."""
    held = []
    for number in range(500):
        with _refusals():
            held.append(HostileTls(target.address, source=_source(target, number)))
    for client in held:
        client.raw.close()


def slow_hellos(target: Target) -> None:
    """ClientHellos that come a byte at a time, from many addresses."""
    held = []
    for number in range(64):
        with _refusals():
            client = HostileTls(target.address, source=_source(target, number))
            held.append((client, client.hello()))
    for at in range(80):
        for client, hello in held:
            with _refusals():
                client.raw.sendall(hello[at : at + 1])
        time.sleep(0.005)
    for client, _ in held:
        client.raw.close()


def half_handshakes(target: Target) -> None:
    """ClientHellos whose answers nobody reads."""
    held = []
    for number in range(500):
        with _refusals():
            client = HostileTls(target.address, source=_source(target, number))
            client.raw.sendall(client.hello())
            held.append(client)
        if len(held) > 100:
            held.pop(0).raw.close()
    for client in held:
        client.raw.close()


def endless_handshakes(target: Target) -> None:
    """Records that never complete the handshake, and garbage in all its places."""
    record = b"\x16\x03\x03\x40\x00" + bytes(0x4000)
    wide = b"\x16\x03\x01\xff\xff"
    for number, first in enumerate((record, wide, os.urandom(4096), b"GET / HTTP/1.1\r\n\r\n")):
        with _refusals(), HostileTls(target.address, source=_source(target, number)) as client:
            for _ in range(64):
                client.raw.sendall(first)
    for number in range(8):
        with _refusals(), HostileTls(target.address, source=_source(target, number)) as client:
            client.raw.sendall(client.hello())
            for _ in range(256):
                client.raw.sendall(record)


def strangers_frames(target: Target) -> None:
    """What a stranger may not say: far too much, on streams that it has no places for."""
    full = mux.encode(FrameType.DATA, FIRST_STREAM, bytes(limits.MAX_MUX_DATA_BYTES))
    more = mux.encode(FrameType.DATA, 3, b"x")
    pings = mux.encode(FrameType.PING, mux.CONNECTION, bytes(8)) * 1000
    for number, frames in enumerate((full * 8, more * 100, pings * 10)):
        with _refusals(), HostileTls(target.address, source=_source(target, number)) as client:
            client.handshake()
            for at in range(0, len(frames), 16_000):
                client.send(frames[at : at + 16_000])
            client.wait_ended(3)


# --- by members


def huge_frames(target: Target) -> None:
    """Headers that announce more than a frame may have, of every type."""
    for kind in range(16):
        with _refusals(), _member(target) as client:
            client.send(struct.pack(">II", kind << 24 | 0xFFFFFF, FIRST_STREAM) + bytes(16_000))
            client.wait_ended(3)


def overrun_windows(target: Target) -> None:
    """More than was granted on one stream, then on all."""
    with _refusals(), _member(target) as client:
        for _ in range(4096):
            client.send(mux.encode(FrameType.DATA, 3, bytes(16_000)))
    with _refusals(), _member(target) as client:
        for stream in range(3, 3 + 2 * limits.MAX_REQUESTS_PER_CONNECTION, 2):
            for _ in range(8):
                client.send(mux.encode(FrameType.DATA, stream, bytes(8_000)))


def many_streams(target: Target) -> None:
    """Streams by the thousand: half a question on each; opened, given up, and opened again."""
    half = limits.MAX_QUESTION_FRAME_BYTES.to_bytes(4, "big") + bytes(1000)
    with _refusals(), _member(target) as client:
        for stream in range(3, 20_000, 2):
            client.send(mux.encode(FrameType.DATA, stream, half))
    with _refusals(), _member(target) as client:
        for stream in range(3, 20_000, 2):
            client.send(
                mux.encode(FrameType.DATA, stream, half) + mux.coded(FrameType.RESET, stream, 0)
            )


def deaf_members(target: Target) -> None:
    """Everything asked at once with windows without end, pings without end, and nothing read."""
    pieces = [hashlib.sha256(b"%d" % number).digest() for number in range(256)]
    question = codec.encode(
        messages.Request(manifest=bytes(32), pieces=pieces, encodings=["identity", "zstd"])
    )
    with _refusals(), _member(target) as client:
        client.raw.settimeout(2)
        client.send(mux.window(mux.CONNECTION, 2**62))
        for stream in range(3, 3 + 2 * limits.MAX_REQUESTS_PER_CONNECTION, 2):
            client.send(
                mux.encode(FrameType.DATA, stream, question)
                + mux.encode(FrameType.END, stream)
                + mux.window(stream, 2**62)
            )
        time.sleep(1.0)
        for _ in range(2000):
            client.send(mux.encode(FrameType.PING, mux.CONNECTION, bytes(8)) * 100)


def live_garbage(target: Target) -> None:
    """On a session that stands: another ClientHello, records that no key made, unknown frames, frames after END."""
    for number in range(6):
        with _refusals(), _member(target) as client:
            match number:
                case 0:  # what renegotiation was before TLS 1.3
                    with HostileTls(target.address) as other:
                        client.raw.sendall(other.hello())
                case 1:
                    client.raw.sendall(b"\x17\x03\x03\x40\x00" + os.urandom(0x4000))
                case 2:
                    client.send(struct.pack(">II", 200 << 24 | 8, 0) + bytes(8))
                case 3:
                    client.send(mux.encode(FrameType.END, FIRST_STREAM) * 2)
                case 4:
                    client.send(mux.encode(FrameType.DATA, 2, b"x"))
                case _:
                    client.send(mux.encode(FrameType.STREAMS, mux.CONNECTION, b"\xff" * 4) * 5000)
                    client.send(mux.window(FIRST_STREAM, 2**64 - 1) * 5000)
                    client.send(os.urandom(16_000))
            client.wait_ended(3)


def _member(target: Target) -> HostileTls:
    assert target.member is not None
    client = HostileTls(target.address)
    try:
        client.handshake()
        client.prove(target.member)
    except BaseException:
        client.raw.close()
        raise
    return client


def _threaded(attack: Callable[[Target], None]) -> Attack:
    async def run(target: Target) -> None:
        await asyncio.to_thread(attack, target)

    run.__name__ = f"tls_{attack.__name__}"
    run.__doc__ = attack.__doc__
    return run


STRANGER_ATTACKS: Final = tuple(
    map(
        _threaded,
        (silent_sockets, slow_hellos, half_handshakes, endless_handshakes, strangers_frames),
    )
)
MEMBER_ATTACKS: Final = tuple(
    map(_threaded, (huge_frames, overrun_windows, many_streams, deaf_members, live_garbage))
)
