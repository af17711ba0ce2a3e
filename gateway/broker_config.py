"""Configuration for a broker of one's own: what mosquitto and EMQX need so that they behave as the embedded one does.

Pure text, printed by ``edgesync gateway broker-config``. The access rules say the same as ``edgesync.wire.topics``; the
contract suite runs against a mosquitto configured with exactly this text.

What they cannot do is told in the text itself: neither limits, by topic, what a device may retain.
"""

from dataclasses import dataclass
from typing import Final

from edgesync import limits
from edgesync.errors import UsageError
from edgesync.ids import GatewayId
from edgesync.wire.topics import POLICIES, PREFIX, Policy

_OWN: Final = sorted(kind for kind, policy in POLICIES.items() if policy.scope == "d")


@dataclass(frozen=True, kw_only=True)
class BrokerSite:
    """Where things lie on the broker's machine. ``gateway`` is the name in the gateway's certificate."""

    gateway: GatewayId
    port: int = 8883
    bind: str = ""
    """Address to listen on; empty: all."""
    authorities: str = "/etc/mosquitto/edgesync/clients.pem"
    """The region's CA and the gateway's own certificate, one PEM after the other."""
    certificate: str = "/etc/mosquitto/edgesync/broker.crt"
    """The broker shows a gateway's certificate: devices accept no other key."""
    key: str = "/etc/mosquitto/edgesync/broker.key"
    acl: str = "/etc/mosquitto/edgesync/acl"
    persistence: str | None = "/var/lib/mosquitto"


def mosquitto_conf(site: BrokerSite) -> str:
    """``mosquitto.conf`` (2.0 or later)."""
    _check(site.authorities, site.certificate, site.key, site.acl, site.persistence)
    keep = (
        f"persistence true\npersistence_location {site.persistence}/\n"
        "# Acknowledged is not durable: without these two a kill loses every session and retained message.\n"
        "autosave_on_changes true\nautosave_interval 1\n"
        if site.persistence
        else "persistence false\n"
    )
    return f"""\
# EdgeSync on mosquitto: devices are known by their certificate, nothing else.
per_listener_settings false
listener {site.port}{f" {site.bind}" if site.bind else ""}
cafile {site.authorities}
certfile {site.certificate}
keyfile {site.key}
tls_version tlsv1.3
require_certificate true
use_identity_as_username true
# Without this a device could take another one's session by its client id.
use_username_as_clientid true
allow_anonymous false
acl_file {site.acl}
max_packet_size {limits.MAX_MQTT_PACKET_BYTES}
# The gateway hears all devices at once; what does not fit is dropped although it was acknowledged.
max_queued_messages {limits.MAX_MQTT_RETAINED}
max_queued_bytes {16 * limits.MAX_MQTT_QUEUED_BYTES}
max_keepalive {limits.MAX_MQTT_KEEPALIVE_S}
{keep}"""


def mosquitto_acl(site: BrokerSite) -> str:
    """The ACL file. mosquitto grants every subscription and filters at delivery."""
    lines = [
        "# The gateway: everything.",
        f"user {site.gateway}",
        f"topic readwrite {PREFIX}/#",
        "",
        "# Every device (%u is the name in its certificate). mosquitto cannot limit by topic what is retained:",
        "# a device could keep one message on each topic it may write.",
        f"pattern read {PREFIX}/g/#",
    ]
    for kind in _OWN:
        right = "write" if POLICIES[kind].writer == "device" else "read"
        lines.append(f"pattern {right} {PREFIX}/d/%u/{kind}")
    return "\n".join(lines) + "\n"


def emqx_conf(site: BrokerSite) -> str:
    """``emqx.conf`` for EMQX 5.1 or later. Unlike mosquitto's, this text is not tested against a running broker."""
    _check(site.authorities, site.certificate, site.key)
    bind = site.bind or "0.0.0.0"  # noqa: S104  a broker listens
    return f"""\
# EdgeSync on EMQX 5: devices are known by their certificate, nothing else.
listeners.ssl.edgesync {{
  bind = "{bind}:{site.port}"
  ssl_options {{
    cacertfile = "{site.authorities}"
    certfile = "{site.certificate}"
    keyfile = "{site.key}"
    versions = ["tlsv1.3"]
    verify = verify_peer
    fail_if_no_peer_cert = true
  }}
}}
listeners.tcp.default.enable = false
listeners.ws.default.enable = false
listeners.wss.default.enable = false
mqtt {{
  peer_cert_as_username = cn
  # Without this a device could take another one's session by its client id.
  peer_cert_as_clientid = cn
  max_packet_size = {limits.MAX_MQTT_PACKET_BYTES}B
  max_mqueue_len = {limits.MAX_MQTT_RETAINED}
}}
authorization {{
  no_match = deny
  deny_action = ignore
  sources = [{{ type = file, enable = true, path = "{site.acl}" }}]
}}
"""


def emqx_acl(site: BrokerSite) -> str:
    """``acl.conf`` for EMQX 5. EMQX checks a subscription's filter: devices ask for exactly these."""
    lines = [
        "%% The gateway: everything.",
        f'{{allow, {{username, "{site.gateway}"}}, all, ["{PREFIX}/#"]}}.',
        "%% Every device; only its state may be retained.",
        f'{{allow, all, subscribe, ["{PREFIX}/g/#"]}}.',
    ]
    for kind in _OWN:
        policy = POLICIES[kind]
        topic = f"{PREFIX}/d/${{username}}/{kind}"
        if policy.writer == "device":
            lines.append(f'{{allow, all, {_emqx_publish(policy)}, ["{topic}"]}}.')
        else:
            lines.append(f'{{allow, all, subscribe, ["{topic}"]}}.')
    return "\n".join([*lines, "{deny, all}."]) + "\n"


def broker_config(kind: str, site: BrokerSite) -> str:
    """Both files of one broker in one text, each under a line that names it. Raises UsageError: no such broker."""
    match kind:
        case "mosquitto":
            parts = {"mosquitto.conf": mosquitto_conf(site), site.acl: mosquitto_acl(site)}
        case "emqx":
            parts = {"emqx.conf": emqx_conf(site), site.acl: emqx_acl(site)}
        case _:
            raise UsageError(f"no configuration for {kind!r}: choose mosquitto or emqx")
    mark = "%%" if kind == "emqx" else "#"
    return "\n".join(f"{mark} ===== {name} =====\n{text}" for name, text in parts.items())


def _emqx_publish(policy: Policy) -> str:
    return "publish" if policy.retain else "{publish, [{retain, false}]}"


def _check(*paths: str | None) -> None:
    for path in paths:
        if path is not None and any(char in path for char in ' "\n\r\t'):
            raise UsageError(f"{path!r}: a broker's configuration cannot name a path with blanks")


__all__ = [
    "BrokerSite",
    "broker_config",
    "emqx_acl",
    "emqx_conf",
    "mosquitto_acl",
    "mosquitto_conf",
]
