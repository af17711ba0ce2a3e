"""One UDP socket, read and written in batches.

It hands datagrams to a callback, at most ``BATCH`` a wake-up, and never blocks: what the kernel does not take is queued
up to ``MAX_QUEUE`` and then dropped, as a network would. Port-unreachable answers (ICMP) are reported with the address
they are about, where the platform tells (Linux). It knows nothing of QUIC.
"""

import asyncio
import contextlib
import errno
import ipaddress
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final

Address = tuple[Any, ...]
"""What ``recvfrom`` says: (host, port) or (host, port, flow, scope)."""

BATCH: Final = 64
MAX_QUEUE: Final = 1024
SOCKET_BUFFER_BYTES: Final = 4 * 1024 * 1024
RECEIVE_BYTES: Final = 2048
"""Larger datagrams are cut, and then fail to decrypt: nobody honest sends them."""

_IP_RECVERR: Final = 11
_IPV6_RECVERR: Final = 25
_SO_EE_ORIGINS_ICMP: Final = (2, 3)
_QUIET = {errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EPERM, errno.EMSGSIZE}


class UdpSocket:
    """``received`` gets (data, address) pairs, ``batch_done`` follows each batch, ``refused`` gets ICMP verdicts."""

    def __init__(
        self,
        sock: socket.socket,
        *,
        received: Callable[[bytes, Address], None],
        batch_done: Callable[[], None],
        refused: Callable[[Address], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._received = received
        self._batch_done = batch_done
        self._refused = refused
        self._queue: deque[tuple[bytes, Address]] = deque()
        self.dropped = 0
        self.datagrams_in = 0
        self.datagrams_out = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self._loop.add_reader(sock.fileno(), self._readable)

    @property
    def address(self) -> Address:
        return tuple(self._sock.getsockname())

    @property
    def family(self) -> int:
        return self._sock.family

    def close(self) -> None:
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())
            self._loop.remove_writer(self._sock.fileno())
            self._sock.close()
        self._queue.clear()

    def send(self, datagrams: Iterable[tuple[bytes, Address]]) -> OSError | None:
        """Send or queue all; the first reason why one could not be sent at all."""
        trouble: OSError | None = None
        if self._sock.fileno() < 0:
            return None
        for data, address in datagrams:
            if self._queue:
                self._enqueue(data, address)
                continue
            try:
                self._sock.sendto(data, address)
            except BlockingIOError:
                self._enqueue(data, address)
            except OSError as exc:
                trouble = trouble or self._again(data, address, exc)
            self.datagrams_out += 1
            self.bytes_out += len(data)
        return trouble

    def _again(self, data: bytes, address: Address, first: OSError) -> OSError | None:
        """An ICMP verdict about another peer surfaces on whatever is sent next: settle it, try once more."""
        if first.errno not in _QUIET:
            return first
        self._read_errors()
        try:
            self._sock.sendto(data, address)
        except OSError as exc:
            return exc
        return None

    def _enqueue(self, data: bytes, address: Address) -> None:
        if not self._queue:
            self._loop.add_writer(self._sock.fileno(), self._writable)
        if len(self._queue) >= MAX_QUEUE:
            self.dropped += 1
            return
        self._queue.append((data, address))

    def _writable(self) -> None:
        while self._queue:
            data, address = self._queue[0]
            try:
                self._sock.sendto(data, address)
            except BlockingIOError:
                return
            except OSError:
                self.dropped += 1
            self._queue.popleft()
        self._loop.remove_writer(self._sock.fileno())

    def _readable(self) -> None:
        receive = self._sock.recvfrom
        received = self._received
        count = 0
        try:
            while count < BATCH:
                data, address = receive(RECEIVE_BYTES)
                count += 1
                self.bytes_in += len(data)
                received(data, address)
        except BlockingIOError:
            pass
        except OSError:
            self._read_errors()
        if not count:
            self._read_errors()  # an error alone also wakes the reader
        self.datagrams_in += count
        self._batch_done()

    def _read_errors(self) -> None:
        flag = getattr(socket, "MSG_ERRQUEUE", None)
        if flag is None:
            return
        for _ in range(BATCH):
            try:
                _, ancillary, _, address = self._sock.recvmsg(64, 512, flag)
            except OSError:
                return
            for level, kind, data in ancillary:
                known = (level, kind) in {
                    (socket.IPPROTO_IP, _IP_RECVERR),
                    (socket.IPPROTO_IPV6, _IPV6_RECVERR),
                }
                if known and len(data) >= 16:
                    number, origin = struct.unpack_from("=IB", data)
                    if origin in _SO_EE_ORIGINS_ICMP and number == errno.ECONNREFUSED:
                        self._refused(tuple(address))


def bind(host: str, port: int) -> socket.socket:
    """A non-blocking UDP socket. Host "" is every address, IPv6 and IPv4 where both exist. Raises OSError."""
    if not host:
        with contextlib.suppress(OSError):
            return _bind(socket.AF_INET6, ("::", port), dual=True)
        return _bind(socket.AF_INET, ("0.0.0.0", port))  # noqa: S104 - that is what was asked for
    info = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM, flags=socket.AI_PASSIVE)[0]
    return _bind(info[0], info[4], dual=host == "::")


def _bind(family: int, address: Any, *, dual: bool = False) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if dual else 1)
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
        if hasattr(socket, "MSG_ERRQUEUE"):
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
            if family == socket.AF_INET6:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVERR, 1)
        sock.bind(address)
    except BaseException:
        sock.close()
        raise
    return sock


def plain(address: Address) -> tuple[str, int]:
    """(host, port) as people write it: an IPv4 peer of a dual-stack socket is an IPv4 address."""
    host = str(address[0])
    if host.startswith("::ffff:") and "." in host:
        host = host[7:]
    return host, int(address[1])


def for_family(address: Address, family: int) -> Address | None:
    """``address`` as a socket of ``family`` must be given it; None: it cannot reach it."""
    host, port = plain(address)
    if family == socket.AF_INET:
        return (host, port) if ":" not in host else None
    if ":" not in host:
        return (f"::ffff:{host}", port, 0, 0)
    scope = int(address[3]) if len(address) > 3 else 0
    return (host, port, 0, scope)


def source_key(address: Address) -> str:
    """What counts as one source: an IPv4 address, or an IPv6 /64 (a host owns all of it)."""
    host, _ = plain(address)
    if ":" not in host:
        return host
    packed = ipaddress.IPv6Address(host.split("%", 1)[0]).packed
    return packed[:8].hex()
