"""TLS 1.3 over one connected TCP socket on the event loop, with every buffer bounded.

It hands plaintext up and takes plaintext down; frames, windows and peers are ``edgesync.transport.tls_link``. The TLS
engine works on memory, so nothing is read that is not handed on at once, and the writer asks ``has_room`` first.
Certificates are shown, not judged: who the other end is, the owner decides when the handshake is done.
"""

import asyncio
import contextlib
import socket
import ssl
import struct
from typing import Final, Protocol

from edgesync import limits
from edgesync.identity import Identity
from edgesync.io.tls import load_identity

READ_BYTES: Final = 64 * limits.KIB
NOT_SENT_BYTES: Final = 128 * limits.KIB
"""What the kernel keeps unsent of a connection: more would hold up control frames behind pieces."""
LINGER_S: Final = 2.0
MAX_LINGERING: Final = 64
_TCP_NOTSENT_LOWAT: Final = 25
_lingering: "dict[socket.socket, asyncio.Future[None]]" = {}


class PipeOwner(Protocol):
    def shaken(self) -> None:
        """The handshake is done."""

    def plaintext(self, data: bytes) -> None: ...
    def room(self) -> None:
        """More can be written, and what came was handed over."""

    def broke(self, reason: str, *, unheard: bool) -> None:
        """The socket or TLS is over; ``unheard``: the peer never said a byte."""


def client_context(alpn: str) -> ssl.SSLContext:
    """For a client that shows no certificate and judges the server's itself."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols([alpn])
    return context


def server_context(identity: Identity, alpn: list[str]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0  # what is resumed would outlive a change of trust
    context.set_alpn_protocols(alpn)
    load_identity(context, identity)
    return context


def tune(sock: socket.socket, *, dead_after_s: float) -> None:
    """What a lossy path needs of TCP; what a kernel does not have is done without."""
    sock.setblocking(False)
    for level, option, value in (
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(dead_after_s * 1000)),
        (socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, NOT_SENT_BYTES),
    ):
        with contextlib.suppress(OSError):
            sock.setsockopt(level, option, value)
    with contextlib.suppress(OSError):  # CUBIC takes each lost packet for congestion
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"bbr")


class TlsPipe:
    def __init__(
        self, sock: socket.socket, context: ssl.SSLContext, owner: PipeOwner, *, server: bool
    ) -> None:
        """``sock`` is connected and belongs to the pipe from here on; call ``start``."""
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._owner = owner
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server)
        self._server = server
        self._waiting = bytearray()
        self._writing = False
        self._shaken = False
        self._received = 0
        self._sent = 0
        self.closed = False

    def start(self) -> None:
        self._loop.add_reader(self._sock.fileno(), self._readable)
        if not self._server:
            self._advance()

    @property
    def has_room(self) -> bool:
        return self._shaken and not self.closed and len(self._waiting) < limits.TLS_SEND_BYTES

    @property
    def protocol(self) -> str:
        return "" if self.closed else self._tls.selected_alpn_protocol() or ""

    def peer_certificate(self) -> bytes | None:
        return None if self.closed else self._tls.getpeercert(binary_form=True)

    def write(self, data: bytes) -> None:
        """Encrypt; follow with ``flush``. At most one record, and only while ``has_room``."""
        self._tls.write(data)
        self._waiting += self._outgoing.read()

    def flush(self) -> None:
        """Give the socket what it takes now; the rest follows by itself."""
        if self.closed:
            return
        self._waiting += self._outgoing.read()
        try:
            while self._waiting:
                sent = self._sock.send(self._waiting)
                self._sent += sent
                del self._waiting[:sent]
        except BlockingIOError:
            pass
        except OSError as exc:
            self._break(exc.strerror or str(exc))
            return
        if bool(self._waiting) != self._writing:
            self._writing = bool(self._waiting)
            if self._writing:
                self._loop.add_writer(self._sock.fileno(), self._writable)
            else:
                self._loop.remove_writer(self._sock.fileno())

    def _writable(self) -> None:
        self.flush()
        if not self.closed and self.has_room:
            self._owner.room()

    def _readable(self) -> None:
        try:
            data = self._sock.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError as exc:
            self._break(exc.strerror or str(exc))
            return
        if not data:
            self._break("the peer closed it")
            return
        self._received += len(data)
        self._incoming.write(data)
        self._advance()

    def _advance(self) -> None:
        try:
            if not self._shaken:
                self._tls.do_handshake()
                self._shaken = True
                self.flush()
                self._owner.shaken()
            while not self.closed:
                data = self._tls.read(READ_BYTES)
                if not data:
                    self._break("the peer closed it")
                    return
                self._owner.plaintext(data)
        except ssl.SSLWantReadError:
            if not self._shaken and self._received > limits.MAX_CRYPTO_BYTES:
                self._break("more TLS bytes came than a handshake needs")
                return
        except (ssl.SSLError, ValueError) as exc:
            self.flush()  # the alert tells the peer why
            self._break(str(getattr(exc, "reason", None) or exc))
            return
        self.flush()
        if len(self._waiting) > 2 * limits.TLS_SEND_BYTES:
            self._break("the peer makes us answer and does not read")
        elif self._shaken and not self.closed:
            self._owner.room()

    def rtt(self) -> float:
        """What TCP measured on its path, in seconds; 0.0 where it does not tell."""
        try:
            info = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
            return float(struct.unpack_from("=I", info, 68)[0]) / 1e6
        except (OSError, struct.error):
            return 0.0

    @property
    def bytes_moved(self) -> int:
        """TLS bytes in both directions."""
        return self._received + self._sent

    @property
    def bytes_received(self) -> int:
        return self._received

    def controller_name(self) -> str:
        """The kernel's congestion control for what is sent; empty where it does not tell."""
        try:
            found = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
        except OSError:
            return ""
        return found.rstrip(b"\0").decode("ascii", "replace")

    def yield_to_others(self) -> None:
        """As far as this kernel can: TCP-LP where it has it, else CUBIC, which backs off sooner than BBR."""
        for name in (b"lp", b"cubic"):
            with contextlib.suppress(OSError):
                self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name)
                return

    def _break(self, reason: str) -> None:
        if not self.closed:
            unheard = self._received == 0
            self.abort()
            self._owner.broke(reason, unheard=unheard)

    def abort(self) -> None:
        """Close without a word. May be repeated."""
        if self.closed:
            return
        self._forget()
        self._sock.close()

    def _forget(self) -> None:
        self.closed = True
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        # Timers and tracebacks keep an ended link for a while: its 30 KB of OpenSSL need not wait for them.
        del self._tls, self._incoming, self._outgoing

    def finish(self) -> None:
        """Close once what was written has left: a socket closed with unread bytes would take it back."""
        self.flush()
        if self.closed:
            return
        self._forget()
        sock = self._sock
        if len(_lingering) >= MAX_LINGERING or self._loop.is_closed():
            sock.close()
            return
        ended = _lingering[sock] = self._loop.create_future()
        rest = self._waiting
        handle: asyncio.TimerHandle

        def end() -> None:
            handle.cancel()
            if _lingering.pop(sock, None) is None:
                return
            ended.set_result(None)
            self._loop.remove_reader(sock.fileno())
            self._loop.remove_writer(sock.fileno())
            sock.close()

        def drain() -> None:
            if sock.fileno() < 0:
                return
            try:
                if not sock.recv(READ_BYTES):
                    end()
            except BlockingIOError:
                pass
            except OSError:
                end()

        def send() -> None:
            if sock.fileno() < 0:
                return
            try:
                del rest[: sock.send(rest) if rest else 0]
                if not rest:
                    self._loop.remove_writer(sock.fileno())
                    sock.shutdown(socket.SHUT_WR)
            except BlockingIOError:
                pass
            except OSError:
                end()

        handle = self._loop.call_later(LINGER_S, end)
        self._loop.add_reader(sock.fileno(), drain)
        self._loop.add_writer(sock.fileno(), send)


async def let_go() -> None:
    """Wait for last words that are still on their way, at most LINGER_S; called before the loop ends."""
    loop = asyncio.get_running_loop()
    if leaving := [ended for ended in _lingering.values() if ended.get_loop() is loop]:
        await asyncio.wait(leaving)
