"""TCP connections that get through where long packets vanish.

QUIC finds out how long its datagrams may be; TCP relies on routers that say so. Where they do not (a black hole), the
first long message of a connection never arrives, and everything behind it waits. What carries little takes segments
that every IPv6 path must carry, in both directions: the other side never sends longer ones than it was told.
"""

import contextlib
import socket
from typing import Final

SEGMENT_BYTES: Final = 1220
"""TCP payload and options: 1280 bytes, the least MTU of IPv6, less 60 of headers.   Source: RFC 8200 section 5."""


def connect_in_short_segments(host: str, port: int, *, timeout_s: float) -> socket.socket:
    """Blocking: a socket connected to the first address of ``host`` that answers. Raises OSError."""
    trouble: OSError | None = None
    for family, kind, number, _, address in socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM):
        sock = socket.socket(family, kind, number)
        try:
            sock.settimeout(timeout_s)
            with contextlib.suppress(OSError):  # a platform without it: as before
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT_BYTES)
            sock.connect(address)
        except OSError as exc:
            sock.close()
            trouble = trouble or exc
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise trouble or OSError(f"{host} has no address")
