"""Settings of the agent: what ``agent.toml``, the environment and the flags of `edgesync agent run` may say."""

import re
from dataclasses import dataclass
from typing import Any

from edgesync import budget, caps
from edgesync.config import HostPort, boolean, host_port, one_of, parse_duration, setting, text
from edgesync.errors import ConfigError
from edgesync.io import proxy
from edgesync.io.proxy import ProxySettings
from edgesync.transport.controller_names import AUTO, SETTINGS

QUIC_PORT = 7443


def _interface(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9.:%_-]{0,64}", value):
        raise ValueError(f"{value!a} is not an interface name or an address")
    return value


def _proxy(value: Any) -> str:
    try:
        url = text(value)
    except ValueError:
        # The value may hold a password: it is not repeated.
        raise ValueError("it is not one line of printable text") from None
    if url and url != proxy.NONE:
        proxy.parse(url)
    return url


def _optional_host_port(value: Any) -> HostPort | None:
    if value is None or value == "":
        return None
    parsed: HostPort = host_port(QUIC_PORT, any_host=False)(value)
    return parsed


@dataclass(frozen=True)
class AgentSettings:
    listen_quic: HostPort = setting(
        HostPort("", 0),
        host_port(0),
        "Where peers reach this device over QUIC (UDP); port 0 takes any.",
    )
    interface: str = setting(
        "", _interface, "Find peers on this interface (name or address) only; empty: on all."
    )
    gateway_quic: HostPort | None = setting(
        None,
        _optional_host_port,
        "Reach the gateway's QUIC port here instead of where it says (NAT, relay); empty: as it says.",
    )
    proxy: str = setting(
        "",
        _proxy,
        "HTTP proxy for TLS to the gateway and its broker, http://[USER:PASSWORD@]HOST[:PORT]; "
        "empty: as HTTPS_PROXY and NO_PROXY say; none: never.",
        mask=proxy.masked,
    )
    mdns: bool = setting(True, boolean, "Announce this device and find peers by mDNS.")
    upload_limit: int | str = setting(
        0,
        caps.setting,
        "Most bytes per second sent to peers, such as 500kB, or '08:00-18:00 200kB/s; 2MB/s'; 0: no limit.",
    )
    download_limit: int | str = setting(
        0, caps.setting, "Most bytes per second fetched, written as upload_limit; 0: no limit."
    )
    time_zone: str = setting(
        caps.UTC,
        caps.zone_setting,
        "Zone of the times in upload_limit and download_limit and of budget's months, such as Europe/Rome.",
    )
    budget: int = setting(
        0,
        budget.parse,
        "Most bytes in each calendar month to and from the gateway and other networks, such as 2GB; 0: no limit.",
    )
    congestion: str = setting(
        AUTO,
        one_of(*SETTINGS),
        "What decides how fast peers and the gateway are sent to: auto (by the path), bbr (lossy and long links), lan, "
        "background (leaves room to others), cubic or reno (for comparison).",
    )
    background: bool = setting(
        False,
        boolean,
        "For metered or busy sites: what comes from and goes out of the site leaves room to other traffic.",
    )
    reconnect_max: float = setting(
        300.0,
        parse_duration,
        "Longest wait before the broker is tried again; the waits are random so that a fleet does not return as one.",
    )

    def proxies(self) -> ProxySettings:
        """Raises ConfigError: HTTPS_PROXY is no proxy."""
        try:
            return proxy.settings(self.proxy)
        except ValueError as exc:
            raise ConfigError(f"proxy, or HTTPS_PROXY: {exc}") from exc
