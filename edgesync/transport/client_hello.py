"""Which protocols a TLS client offers (ALPN), read from its first bytes before anything of them is answered. Pure.

It looks for one extension and believes nothing else; the TLS library reads the same bytes again and checks them.
A ClientHello that is split over several records is refused: no client of ours sends one.
Source: RFC 8446 sections 4.1.2 and 5.1, RFC 7301.
"""

from typing import Final

from edgesync import limits
from edgesync.errors import LimitExceededError, MalformedMessageError

_HANDSHAKE: Final = 22
_CLIENT_HELLO: Final = 1
_ALPN: Final = 16


class _Cursor:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        if self.at + count > len(self.data):
            raise MalformedMessageError("a ClientHello ends too early")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def vector(self, size: int) -> "_Cursor":
        return _Cursor(self.take(self.number(size)))

    @property
    def left(self) -> int:
        return len(self.data) - self.at


def offered_protocols(data: bytes) -> list[bytes] | None:
    """The protocols offered, none if the client names none; None: more bytes are needed.

    Raises MalformedMessageError: not a ClientHello. LimitExceededError: longer than MAX_CLIENT_HELLO_BYTES.
    """
    if data and data[0] != _HANDSHAKE:
        raise MalformedMessageError("what came is not TLS")
    if len(data) < 5:
        return None
    length = int.from_bytes(data[3:5], "big")
    if 5 + length > limits.MAX_CLIENT_HELLO_BYTES:
        raise LimitExceededError(f"a ClientHello of {length} bytes came")
    if len(data) < 5 + length:
        return None
    record = _Cursor(data[5 : 5 + length])
    if record.number(1) != _CLIENT_HELLO:
        raise MalformedMessageError("a TLS client began with something else than ClientHello")
    hello = record.vector(3)
    hello.take(2 + 32)
    hello.vector(1)
    hello.vector(2)
    hello.vector(1)
    if not hello.left:
        return []
    extensions = hello.vector(2)
    while extensions.left:
        kind = extensions.number(2)
        extension = extensions.vector(2)
        if kind == _ALPN:
            names = extension.vector(2)
            found = []
            while names.left:
                found.append(names.vector(1).data)
            return found
    return []
