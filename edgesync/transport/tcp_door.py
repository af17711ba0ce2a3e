"""The TCP port beside the QUIC port: who comes there, for which protocol, and how many strangers at a time.

The first bytes are looked at in the kernel's buffer and left there, so that whoever serves the protocol sees TLS from
its beginning: a session or a join becomes a ``TlsLink``; MQTT goes, as the socket it is, to whom ``mqtt`` names, where
the client's certificate is looked at. Strangers have their own count here: one who forges UDP addresses cannot
shut this door, and the other way round.
"""

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
import struct
from collections import Counter
from collections.abc import Callable
from typing import Final

from edgesync import limits
from edgesync.errors import ProtocolError
from edgesync.transport.client_hello import offered_protocols
from edgesync.transport.flow import Budget
from edgesync.transport.streams import LinkOwner
from edgesync.transport.tls_link import TlsLink
from edgesync.transport.udp import Address, plain, source_key

log = logging.getLogger(__name__)

MQTT: Final = b"mqtt"
ACCEPTS_AT_ONCE: Final = 16
PAUSE_S: Final = 0.2
_EXHAUSTED: Final = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class TcpDoor:
    def __init__(
        self,
        listener: socket.socket,
        *,
        context: ssl.SSLContext,
        protocols: tuple[str, ...],
        new_owner: Callable[[], LinkOwner],
        accepted: Callable[[TlsLink], None],
        budget: Budget,
        idle_timeout_s: float,
        max_unproven: int,
        max_unproven_per_address: int,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._context = context
        self._protocols = protocols
        self._new_owner = new_owner
        self._accepted = accepted
        self._budget = budget
        self._idle_timeout_s = idle_timeout_s
        self._max_unproven = max_unproven
        self._max_per_address = max_unproven_per_address
        self._looking: dict[socket.socket, tuple[Address, asyncio.TimerHandle]] = {}
        self._strangers: set[TlsLink] = set()
        self._pause: asyncio.TimerHandle | None = None
        self.mqtt: Callable[[socket.socket, str], None] | None = None
        """Takes a connection whose client wants MQTT, and the client's address; None: there is none."""
        self.refused = 0
        self._loop.add_reader(listener.fileno(), self._readable)

    @property
    def unproven(self) -> int:
        return len(self._looking) + len(self._strangers)

    def _readable(self) -> None:
        for _ in range(ACCEPTS_AT_ONCE):
            try:
                sock, address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as exc:
                if exc.errno in _EXHAUSTED:
                    log.warning("no TCP connection can be accepted now: %s", exc.strerror)
                    self._loop.remove_reader(self._listener.fileno())
                    self._pause = self._loop.call_later(PAUSE_S, self._resume)
                    return
                continue
            sock.setblocking(False)
            self._arrived(sock, address)

    def _resume(self) -> None:
        self._pause = None
        self._loop.add_reader(self._listener.fileno(), self._readable)

    def _arrived(self, sock: socket.socket, address: Address) -> None:
        by_source = Counter(source_key(where) for where, _ in self._looking.values())
        by_source.update(source_key(link.address) for link in self._strangers)
        if (
            self.unproven >= self._max_unproven
            or by_source[source_key(address)] >= self._max_per_address
        ):
            self.refused += 1
            _refuse(sock)
            return
        timer = self._loop.call_later(limits.UNPROVEN_TIMEOUT_S, self._give_up, sock)
        self._looking[sock] = (address, timer)
        self._loop.add_reader(sock.fileno(), self._look, sock)

    def _look(self, sock: socket.socket) -> None:
        try:
            seen = sock.recv(limits.MAX_CLIENT_HELLO_BYTES, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError:
            self._give_up(sock)
            return
        try:
            offered = offered_protocols(seen) if seen else []
        except ProtocolError as exc:
            log.debug("a TCP client was sent away: %s", exc)
            offered = []
        if offered is None:
            if len(seen) == sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) - 1:
                self._give_up(sock)  # woken without a byte more: it closed
                return
            # Level-triggered: without a higher mark the same bytes would wake us for ever.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, len(seen) + 1)
            return
        address = self._release(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        if not offered:
            self.refused += 1
            sock.close()
        elif MQTT in offered and self.mqtt is not None:
            self.mqtt(sock, plain(address)[0])
        else:  # a protocol that is none of ours hears so in TLS
            self._admit(sock, address)

    def _admit(self, sock: socket.socket, address: Address) -> None:
        if not self._budget.reserve(limits.UNPROVEN_WINDOW_BYTES):
            self.refused += 1
            _refuse(sock)
            return
        link = TlsLink(
            sock,
            self._context,
            self._new_owner(),
            address=address,
            dialed=False,
            budget=self._budget,
            idle_timeout_s=self._idle_timeout_s,
            door=self._strangers,
            protocols=self._protocols,
        )
        self._strangers.add(link)
        self._accepted(link)

    def _release(self, sock: socket.socket) -> Address:
        address, timer = self._looking.pop(sock)
        timer.cancel()
        self._loop.remove_reader(sock.fileno())
        return address

    def _give_up(self, sock: socket.socket) -> None:
        self._release(sock)
        sock.close()

    def close(self) -> None:
        """Accept nobody any more; links are their owners'. May be repeated."""
        if self._listener.fileno() < 0:
            return
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._listener.fileno())
        self._listener.close()
        for sock in tuple(self._looking):
            self._give_up(sock)


def _refuse(sock: socket.socket) -> None:
    """Reset rather than close: nothing of a refused connection is left in the kernel."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
