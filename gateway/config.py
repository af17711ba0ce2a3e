"""Settings of the gateway: what ``gateway.toml``, the environment and the flags of `edgesync gateway run` may say."""

from dataclasses import dataclass
from typing import Any, Final

from edgesync import caps
from edgesync.config import HostPort, host_port, list_of, one_of, setting, text
from edgesync.errors import ConfigError
from edgesync.io.broker_url import parse_broker_url
from edgesync.transport.controller_names import AUTO, SETTINGS

QUIC_PORT: Final = 7443
MQTT_PORT: Final = 8883
HTTP_PORT: Final = 7480
MAX_ADVERTISED: Final = 8
"""Addresses a token and a Joined message carry."""


def _broker_url(value: Any) -> str:
    url = text(value)
    if not url:
        return ""
    try:
        return str(parse_broker_url(url))
    except ConfigError as exc:
        raise ValueError(str(exc)) from exc


@dataclass(frozen=True)
class GatewaySettings:
    listen_quic: HostPort = setting(
        HostPort("", QUIC_PORT),
        host_port(QUIC_PORT),
        "Where devices join and fetch pieces (UDP). Open this port to them.",
    )
    listen_mqtt: HostPort = setting(
        HostPort("", MQTT_PORT),
        host_port(MQTT_PORT),
        "Where the embedded broker listens (TCP, TLS). Open this port to devices. Unused with broker.",
    )
    listen_http: HostPort = setting(
        HostPort("127.0.0.1", HTTP_PORT),
        host_port(HTTP_PORT),
        "/livez, /readyz and /metrics. It asks nobody who they are: keep it on loopback or behind a proxy.",
    )
    broker: str = setting(
        "",
        _broker_url,
        "An external broker, mqtts://HOST[:PORT], that this gateway and its devices use; empty: the embedded one.",
    )
    advertise: tuple[HostPort, ...] = setting(
        (),
        list_of(host_port(QUIC_PORT, any_host=False), maximum=MAX_ADVERTISED),
        "Where devices reach this gateway's QUIC port, HOST[:PORT]; the first one also names the embedded broker.",
    )
    upload_limit: int | str = setting(
        0,
        caps.setting,
        "Most bytes per second sent to devices, such as 500kB, or '08:00-18:00 200kB/s; 2MB/s'; 0: no limit.",
    )
    time_zone: str = setting(
        caps.UTC, caps.zone_setting, "Zone of the times in upload_limit, such as Europe/Rome."
    )
    congestion: str = setting(
        AUTO,
        one_of(*SETTINGS),
        "What decides how fast devices are sent to: auto (by the path), bbr (lossy and long links), lan, background "
        "(leaves room to others), cubic or reno (for comparison).",
    )


def broker_urls(settings: GatewaySettings, mqtt_port: int | None) -> list[str]:
    """Where devices find the broker; ``mqtt_port`` is the embedded one's, None when there is none."""
    if settings.broker:
        return [settings.broker]
    port = mqtt_port or settings.listen_mqtt.port
    hosts = dict.fromkeys(address.host for address in settings.advertise)
    return [f"mqtts://{HostPort(host, port)}" for host in hosts]
