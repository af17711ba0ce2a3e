"""One UDP socket, read and written in batches.

It hands datagrams to a callback, about ``BATCH`` a wake-up, and never blocks: what the kernel does not take is queued
up to ``MAX_QUEUE`` and then dropped, as a network would. Where the kernel cuts and joins equal datagrams itself (GSO
and GRO, Linux) it does; a path that refuses is served without. While single datagrams keep coming they are left to
gather for ``pause_s``: a wake-up costs more than a datagram. Port-unreachable answers (ICMP) are reported with the
address they are about, where the platform tells (Linux). It knows nothing of QUIC.
"""

import asyncio
import contextlib
import errno
import ipaddress
import socket
import struct
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

Address = tuple[Any, ...]
"""What ``recvfrom`` says: (host, port) or (host, port, flow, scope)."""

BATCH: Final = 64
MAX_QUEUE: Final = 1024
TCP_BACKLOG: Final = 128
SOCKET_BUFFER_BYTES: Final = 4 * 1024 * 1024
RECEIVE_BYTES: Final = 65_536
"""One buffer for whatever one call brings, a datagram or many joined: nothing is allocated by what is announced."""
COALESCE_S: Final = 0.002
"""Pause of the reader while datagrams trickle in."""
MAX_COALESCE_S: Final = 0.008
"""The same where it is little beside the path's delay; well below the 25 ms by which an acknowledgement may wait."""
COALESCE_OF_RTT: Final = 1 / 12
SLOW_COALESCE_S: Final = 0.004
SLOW_RATE: Final = 2500
"""Datagrams a second up to which a pause of ``SLOW_COALESCE_S`` is harmless on any path: whatever window they come from
is not what holds them back."""
COALESCE_BELOW_RATE: Final = 4000
"""Datagrams a second from which on reading at once costs less than a pause saves."""
_BUSY_GAP_S: Final = 0.005
_BUSY_DATAGRAMS: Final = 8
MAX_SEGMENTS: Final = 60
MAX_SEGMENTED_BYTES: Final = 64_000
"""What one system call may send: the kernel takes 64 segments and the payload of one IPv4 packet."""

_UDP_SEGMENT: Final = 103
_UDP_GRO: Final = 104
_REFUSES_SEGMENTS: Final = {errno.EIO, errno.ENOPROTOOPT, errno.EOPNOTSUPP}
_MAX_STRIKES: Final = 8
_ANCILLARY_BYTES: Final = 64
_SO_MEMINFO: Final = 55
_MEMINFO: Final = struct.Struct("=9I")
"""Linux, ``enum sk_meminfo`` up to its drops."""
_IP_RECVERR: Final = 11
_IPV6_RECVERR: Final = 25
_IP_MTU_DISCOVER: Final = 10
_IPV6_MTU_DISCOVER: Final = 23
_PMTUDISC_PROBE: Final = 3
_SO_EE_ORIGINS_ICMP: Final = (2, 3)
_QUIET = {errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EPERM, errno.EMSGSIZE}


class UdpSocket:
    """``received`` gets datagrams of one address, ``batch_done`` follows each batch, ``refused`` gets ICMP verdicts."""

    def __init__(
        self,
        sock: socket.socket,
        *,
        received: Callable[[Sequence[bytes], Address], None],
        batch_done: Callable[[], None],
        refused: Callable[[Address], None],
        offload: bool = True,
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
        self.joins = offload and _has_option(sock, _UDP_GRO, turn_on=True)
        """Whether the kernel hands equal datagrams over joined."""
        self.segments = offload and _has_option(sock, _UDP_SEGMENT)
        """Whether the kernel cuts one buffer into equal datagrams."""
        self._strikes = 0
        self.receive_buffer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        """Bytes the kernel keeps for us, its bookkeeping included."""
        self._buffer = bytearray(RECEIVE_BYTES)
        self._view = memoryview(self._buffer)
        self._pause: asyncio.TimerHandle | None = None
        self._busy = 0
        self._read_at = 0.0
        self.pause_s = COALESCE_S
        self._listening = False
        self._listen(on=True)

    @property
    def address(self) -> Address:
        return tuple(self._sock.getsockname())

    @property
    def is_wildcard(self) -> bool:
        """Whether the kernel chooses the source address, packet by packet."""
        return str(self.address[0]) in {"::", "0.0.0.0"}  # noqa: S104 - compared, not bound

    @property
    def family(self) -> int:
        return self._sock.family

    def listen_beside(self) -> socket.socket:
        """A TCP socket that listens at the same address and port. Raises OSError."""
        return listen_tcp(self._sock)

    def lost_in_kernel(self) -> int:
        """Datagrams the kernel dropped because its buffer was full; 0 where it does not tell."""
        if self._sock.fileno() < 0:
            return 0
        try:
            facts = self._sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size)
        except OSError:
            return 0
        return int(_MEMINFO.unpack(facts)[-1]) if len(facts) == _MEMINFO.size else 0

    def warnings(self) -> list[str]:
        """What the operator could mend, one sentence each."""
        lost = self.lost_in_kernel()
        if not lost or self.receive_buffer >= SOCKET_BUFFER_BYTES:
            return []
        return [
            (
                f"the kernel dropped {lost} datagrams, since it gives the QUIC socket only"
                f" {self.receive_buffer // 1024} KiB of receive buffer: set net.core.rmem_max to"
                f" {SOCKET_BUFFER_BYTES} and restart"
            )
        ]

    def close(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())
            self._loop.remove_writer(self._sock.fileno())
            self._sock.close()
        self._queue.clear()

    @property
    def blocked(self) -> bool:
        """Whether the kernel takes nothing now: making more datagrams would only fill the queue."""
        return bool(self._queue)

    def send(self, datagrams: Sequence[tuple[bytes, Address]]) -> OSError | None:
        """Send or queue all; the first reason why one could not be sent at all."""
        trouble: OSError | None = None
        if self._sock.fileno() < 0:
            return None
        at, count = 0, len(datagrams)
        self.datagrams_out += count
        while at < count:
            data, address = datagrams[at]
            if self._queue:
                self._enqueue(data, address)
            elif self.segments and at + 1 < count and (sent := self._send_segments(datagrams, at)):
                at += sent
                continue
            else:
                try:
                    self._sock.sendto(data, address)
                except BlockingIOError:
                    self._enqueue(data, address)
                except OSError as exc:
                    trouble = trouble or self._again(data, address, exc)
                    if trouble is not None and trouble.errno == errno.EMSGSIZE:
                        self._strikes = 0  # too long, cut or not: no fault of segments
            self.bytes_out += len(data)
            at += 1
        return trouble

    def _send_segments(self, datagrams: Sequence[tuple[bytes, Address]], at: int) -> int:
        """Send the longest run of equally long datagrams to one address (the last may be shorter); how many went."""
        first, address = datagrams[at]
        size = total = len(first)
        run = [first]
        for data, to in datagrams[at + 1 : at + MAX_SEGMENTS]:
            length = len(data)
            if length > size or total + length > MAX_SEGMENTED_BYTES or to != address:
                break
            run.append(data)
            total += length
            if length < size:
                break
        if len(run) == 1:
            return 0
        try:
            self._sock.sendmsg(
                run,
                [(socket.IPPROTO_UDP, _UDP_SEGMENT, struct.pack("=H", size))],
                0,
                address,
            )
        except BlockingIOError:
            return 0  # each is tried alone, and queued
        except OSError as exc:
            # An interface or kernel that cannot: done without from here on. "Invalid" may be this size only.
            self._strikes += 1
            if exc.errno in _REFUSES_SEGMENTS or self._strikes >= _MAX_STRIKES:
                self.segments = False
            return 0
        self._strikes = 0
        self.bytes_out += total
        return len(run)

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
        count = 0
        try:
            while count < BATCH:
                count += self._receive()
        except BlockingIOError:
            pass
        except OSError:
            self._read_errors()
        if not count:
            self._read_errors()  # an error alone also wakes the reader
        self.datagrams_in += count
        self._consider_pause(count)
        self._batch_done()

    def _receive(self) -> int:
        """Hand over what one call brings; how many datagrams that were. Raises OSError, BlockingIOError."""
        view = self._view
        if not self.joins:
            size, address = self._sock.recvfrom_into(view)
            self.bytes_in += size
            self._received((bytes(view[:size]),), address)
            return 1
        size, ancillary, _, address = self._sock.recvmsg_into((view,), _ANCILLARY_BYTES)
        self.bytes_in += size
        step = size
        for level, kind, data in ancillary:
            if (level, kind) == (socket.IPPROTO_UDP, _UDP_GRO):
                step = struct.unpack_from("=i", data)[0]
        if step >= size:
            self._received((bytes(view[:size]),), address)
            return 1
        datagrams = [bytes(view[at : at + step]) for at in range(0, size - step, step)]
        datagrams.append(bytes(view[len(datagrams) * step : size]))
        self._received(datagrams, address)
        return len(datagrams)

    def suit_delay(self, rtt_s: float) -> None:
        """Pause as long as a path of this round trip hardly notices."""
        self.pause_s = min(max(COALESCE_S, rtt_s * COALESCE_OF_RTT), MAX_COALESCE_S)

    def _consider_pause(self, count: int) -> None:
        """Let datagrams gather in the kernel while they come often, but few at a time."""
        now = self._loop.time()
        gap, self._read_at = now - self._read_at, now
        self._busy = min(self._busy + count, BATCH) if gap < self.pause_s + _BUSY_GAP_S else 0
        few = COALESCE_BELOW_RATE * self.pause_s
        if self._busy >= _BUSY_DATAGRAMS and 0 < count < few and self._pause is None:
            pause = max(self.pause_s, SLOW_COALESCE_S) if count < SLOW_RATE * gap else self.pause_s
            self._listen(on=False)
            self._pause = self._loop.call_later(pause, self._resume)

    def _listen(self, *, on: bool) -> None:
        """Have the loop call ``_readable``, or not. A pause after a pause changes nothing and costs nothing."""
        if on != self._listening and self._sock.fileno() >= 0:
            self._listening = on
            if on:
                self._loop.add_reader(self._sock.fileno(), self._readable)
            else:
                self._loop.remove_reader(self._sock.fileno())

    def _resume(self) -> None:
        self._pause = None
        if self._sock.fileno() < 0:
            return
        try:
            self._readable()
        finally:  # an error in a callback must not leave the socket deaf
            if self._pause is None and self._sock.fileno() >= 0:
                self._listen(on=True)

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


def _has_option(sock: socket.socket, option: int, *, turn_on: bool = False) -> bool:
    """Whether the kernel knows a UDP option."""
    try:
        if turn_on:
            sock.setsockopt(socket.IPPROTO_UDP, option, 1)
        else:
            sock.getsockopt(socket.IPPROTO_UDP, option)
    except OSError:
        return False
    return True


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
        _never_fragment(sock, family)
        sock.bind(address)
    except BaseException:
        sock.close()
        raise
    return sock


def _never_fragment(sock: socket.socket, family: int) -> None:
    """What is too long is refused or lost, whatever routers said: the sender finds out what fits (``pmtud``)."""
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_PROBE)
    if family == socket.AF_INET6:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE)


def listen_tcp(beside: socket.socket) -> socket.socket:
    """A TCP socket that listens where the UDP socket ``beside`` is bound. Raises OSError."""
    sock = socket.socket(beside.family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if beside.family == socket.AF_INET6:
            only = beside.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
        sock.bind(beside.getsockname())
        sock.listen(TCP_BACKLOG)
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
