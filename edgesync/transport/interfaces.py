"""What this machine's interfaces say about the way to an address: the source, the room, whether it is attached.

Reads the kernel's tables; sends nothing and waits for nothing. What it says of a network is cached for a moment, for
it is asked once a transfer, not once a packet.
"""

import ipaddress
import socket
import struct
from dataclasses import dataclass
from typing import Final

import ifaddr

from edgesync.transport.congestion.choice import is_near
from edgesync.transport.udp import Address, plain

FRESH_S: Final = 5.0
"""How long a list of interfaces is believed; a changed source address ends it at once."""
DEFAULT_MTU: Final = 1500
_SIOCGIFMTU: Final = 0x8921
_IPV4_HEADERS: Final = 28
_IPV6_HEADERS: Final = 48
_DISCARD_PORT: Final = 9

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class Way:
    """How packets leave for an address."""

    source: str
    """Address they leave from."""
    payload: int
    """UDP payload, in bytes, that the interface takes in one packet."""
    near: bool
    """Whether the address is this machine or on an attached network."""


class Interfaces:
    def __init__(self) -> None:
        self._read_at = -FRESH_S
        self._networks: list[Network] = []
        self._names: dict[str, str] = {}
        """Of the interface that holds an address."""

    def forget(self) -> None:
        """Something changed: read anew when asked next."""
        self._read_at = -FRESH_S

    def way(self, address: Address, now: float) -> Way | None:
        """None: there is no route to ``address`` now, or it is no address."""
        source = source_towards(address)
        if source is None:
            return None
        if now - self._read_at >= FRESH_S or source not in self._names:
            self._read(now)
        headers = _IPV6_HEADERS if ":" in source else _IPV4_HEADERS
        return Way(
            source=source,
            payload=_mtu(self._names.get(source, "")) - headers,
            near=is_near(plain(address)[0], self._networks),
        )

    def _read(self, now: float) -> None:
        self._read_at = now
        self._networks = []
        self._names = {}
        for adapter in ifaddr.get_adapters():
            for ip in adapter.ips:
                text = ip.ip if isinstance(ip.ip, str) else ip.ip[0]
                self._names[text] = adapter.nice_name
                self._networks.append(
                    ipaddress.ip_network(f"{text}/{ip.network_prefix}", strict=False)
                )


def source_towards(address: Address) -> str | None:
    """The address packets to ``address`` would leave from; None: no route. Sends nothing."""
    host, port = plain(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    scope = int(address[3]) if len(address) > 3 else 0
    place = (
        (host, port or _DISCARD_PORT, 0, scope) if ":" in host else (host, port or _DISCARD_PORT)
    )
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect(place)
            return str(sock.getsockname()[0]).partition("%")[0]
    except (OSError, UnicodeError):
        return None


def _mtu(interface: str) -> int:
    """Bytes of an interface's packets. The kernel's idea of the whole path is not asked: anybody can forge it."""
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            request = struct.pack("16si12x", interface.encode()[:15], 0)
            return int(struct.unpack_from("16si", fcntl.ioctl(sock, _SIOCGIFMTU, request))[1])
    except (ImportError, OSError):
        return DEFAULT_MTU
