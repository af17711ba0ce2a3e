"""How the daemon is: what it tells supervisors, Prometheus and the row that `gateway status` reads.

It counts, and asks the parts; it changes nothing. ``problems`` holds one sentence for each thing that is wrong now.
"""

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

from edgesync import __version__
from edgesync.io.mqtt import MqttLink
from edgesync.transport.endpoint import Endpoint
from gateway import http
from gateway.broker import EmbeddedBroker
from gateway.budgets import SiteBudgets
from gateway.moment import Moment
from gateway.seeder import Seeder
from gateway.throttles import Throttles

BEAT_S: Final = 1.0
"""How often the daemon says that it lives."""
MAX_LAG_S: Final = 5.0
"""A loop that is later than this is not alive."""


@dataclass(frozen=True)
class Parts:
    """What is asked, once everything has started."""

    endpoint: Endpoint
    seeder: Seeder
    link: MqttLink
    broker: EmbeddedBroker | None
    """None with an external one."""
    broker_url: str
    dropped: Counter[str]
    """Messages of devices that did not count, by reason."""
    throttles: Throttles
    budgets: SiteBudgets


class Health:
    def __init__(self) -> None:
        self.problems: dict[str, str] = {}
        self.received: Counter[str] = Counter()
        """Messages of devices, by kind."""
        self.joins = 0
        self.lag_s = 0.0
        self.parts: Parts
        self.moment: Moment
        self._beat_at = time.monotonic()

    def beat(self) -> None:
        """Called every BEAT_S; how late it comes is the loop's lag."""
        now = time.monotonic()
        self.lag_s = max(0.0, now - self._beat_at - BEAT_S)
        self._beat_at = now

    def pages(self) -> dict[str, http.Handler]:
        return {"/livez": self.livez, "/readyz": self.readyz, "/metrics": self.metrics}

    def facts(self) -> dict[str, Any]:
        """For the daemon's row in the database."""
        stats = self.parts.endpoint.stats()
        link = self.parts.link.status()
        return {
            "broker": {
                "kind": "external" if self.parts.broker is None else "embedded",
                "url": self.parts.broker_url,
                "connected": link.connected,
                "error": link.last_error,
                "clients": self.parts.broker.stats().clients if self.parts.broker else None,
            },
            "quic": {
                "port": self.parts.endpoint.port,
                "connections": stats.connections,
                "controllers": self.parts.seeder.controllers(),
                "unproven": stats.unproven,
                "bytes_in": stats.bytes_in,
                "bytes_out": stats.bytes_out,
            },
            "min_site_replication": self.parts.seeder.min_site_replication(),
            "lag_s": round(self.lag_s, 3),
            "caps": self.parts.throttles.facts(),
            "problems": [
                *sorted(self.problems.values()),
                *self.parts.endpoint.warnings(),
                *self.parts.throttles.problems,
                *self.parts.budgets.problems,
            ],
        }

    def livez(self) -> http.Response:
        late = time.monotonic() - self._beat_at - BEAT_S
        if late > MAX_LAG_S:
            return http.json_response(503, {"reasons": [f"the event loop is {late:.1f} s late"]})
        return http.Response(200, b"ok\n")

    def readyz(self) -> http.Response:
        reasons = sorted(self.problems.values())
        link = self.parts.link.status()
        if not link.connected:
            reasons.append(
                f"not connected to the broker {self.parts.broker_url}: {link.last_error}"
            )
        if self.moment.trusted.expires <= time.time():
            reasons.append("the fleet's metadata has expired")
        if reasons:
            return http.json_response(503, {"reasons": reasons})
        return http.Response(200, b"ok\n")

    def metrics(self) -> http.Response:
        devices: dict[tuple[tuple[str, str], ...], float] = {
            (("state", state),): 0 for state in ("accepted", "online", "pending", "rejected")
        }
        for device in self.moment.register.by_id.values():
            devices[("state", device.state),] += 1
            devices[("state", "online"),] += device.online
        stats = self.parts.endpoint.stats()
        totals = self.parts.seeder.totals()
        return http.render_metrics(
            [
                http.metric(
                    "edgesync_build_info",
                    "gauge",
                    "Version and role of this process.",
                    {(("version", __version__), ("role", "gateway")): 1},
                ),
                http.metric(
                    "edgesync_gateway_devices", "gauge", "Devices in the register.", devices
                ),
                http.metric(
                    "edgesync_transfer_bytes_total",
                    "counter",
                    "Piece bytes sent, as carried.",
                    {(("source", "gateway"),): totals.bytes_out},
                ),
                http.metric(
                    "edgesync_pieces_sent_total",
                    "counter",
                    "Pieces sent to devices.",
                    totals.pieces_out,
                ),
                http.metric(
                    "edgesync_quic_connections",
                    "gauge",
                    "Proven QUIC connections.",
                    {(("direction", "in"),): stats.connections},
                ),
                http.metric(
                    "edgesync_quic_unproven",
                    "gauge",
                    "QUIC connections that proved nothing yet.",
                    stats.unproven,
                ),
                http.metric("edgesync_joins_total", "counter", "Joins asked for.", self.joins),
                http.metric(
                    "edgesync_mqtt_connected",
                    "gauge",
                    "1 while the broker is reached.",
                    self.parts.link.connected,
                ),
                http.metric(
                    "edgesync_mqtt_messages_total",
                    "counter",
                    "Messages of devices.",
                    {
                        (("direction", "in"), ("class", kind)): n
                        for kind, n in self.received.items()
                    },
                ),
                http.metric(
                    "edgesync_mqtt_dropped_total",
                    "counter",
                    "Messages of devices that did not count.",
                    {(("reason", reason),): n for reason, n in self.parts.dropped.items()},
                ),
                http.metric(
                    "edgesync_min_site_replication",
                    "gauge",
                    "Durable copies of the rarest piece at live devices.",
                    {}
                    if (copies := self.parts.seeder.min_site_replication()) is None
                    else {(): copies},
                ),
                http.metric(
                    "edgesync_last_metadata_timestamp_seconds",
                    "gauge",
                    "When metadata was signed last.",
                    self.moment.trusted.issued_at,
                ),
                http.metric(
                    "edgesync_loop_lag_seconds",
                    "gauge",
                    "How late the event loop is.",
                    self.lag_s,
                ),
            ]
        )
