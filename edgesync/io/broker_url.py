"""Broker URLs: ``mqtts://HOST[:PORT]``, and ``mqtt://`` without TLS on loopback only."""

import ipaddress
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from edgesync.errors import ConfigError

DEFAULT_PORTS: Final = {"mqtts": 8883, "mqtt": 1883}


@dataclass(frozen=True)
class BrokerAddress:
    host: str
    port: int
    tls: bool

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}"


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def parse_broker_url(url: str) -> BrokerAddress:
    """Raises ConfigError: not such a URL, or one that would send in the clear to another machine."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as exc:
        raise ConfigError(f"{url[:200]!r} is not a broker URL: {exc}") from exc
    if parts.scheme not in DEFAULT_PORTS or not parts.hostname:
        raise ConfigError(f"{url[:200]!r} is not a broker URL: write mqtts://HOST[:PORT]")
    if parts.username or parts.password or parts.path.strip("/") or parts.query or parts.fragment:
        raise ConfigError(
            f"{url[:200]!r} says more than host and port: a broker knows us by certificate"
        )
    tls = parts.scheme == "mqtts"
    if not tls and not is_loopback(parts.hostname):
        raise ConfigError(f"{url[:200]!r} would be sent in the clear: without TLS only on loopback")
    return BrokerAddress(parts.hostname, port or DEFAULT_PORTS[parts.scheme], tls)
