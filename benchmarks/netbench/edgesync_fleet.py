"""EdgeSync in a laboratory: a gateway process at the source, an agent process on each device, all by command.

Times are the agent's own, from its table of executions: ``started`` is when the assignment was accepted, before the
manifest is asked for; the row leaves ``downloading`` when every piece is held, checked and synced; ``succeeded`` is
what an operator waits for, after the files were put in place and hashed once more.
"""

import contextlib
import json
import platform
import sqlite3
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.netbench.files import first_line
from benchmarks.netbench.rig import Child, Host, LabError, Rig, await_that
from benchmarks.netbench.transfer import Payload, Transfer
from edgesync.errors import EdgeSyncError
from edgesync.io import control

COMMAND = [sys.executable, "-m", "edgesync"]
READY_PROBE = (
    "import sys,urllib.request as r;"
    "r.build_opener(r.ProxyHandler({})).open(f'http://127.0.0.1:{sys.argv[1]}/readyz',timeout=5)"
)
START_TIMEOUT_S = 90.0
NAME = "bench"
ENDED_BADLY = frozenset({"failed", "timed_out", "rejected", "canceled"})


class Agent:
    """One device's agent process and its data directory."""

    def __init__(self, host: Host, data: Path, child: Child) -> None:
        self.host = host
        self.data = data
        self.child = child
        self._verified: dict[str, float] = {}

    def status(self) -> dict[str, Any] | None:
        with contextlib.suppress(EdgeSyncError, OSError):
            return control.ask(self.data, {"op": "status"})
        return None

    def bundle(self, version: str) -> dict[str, Any] | None:
        bundles = (self.status() or {}).get("bundles", [])
        return next((b for b in bundles if b["version"] == version), None)

    def connected(self) -> bool:
        if self.child.poll() is not None:
            raise LabError(f"{self.child.name} ended: {self.child.last_line()}")
        status = self.status()
        return status is not None and bool(status["gateway"]["connected"])

    def _row(self, version: str) -> tuple[str, str, str, float, float] | None:
        if self.child.poll() is not None:
            raise LabError(f"{self.child.name} ended: {self.child.last_line()}")
        with (
            contextlib.suppress(sqlite3.OperationalError),
            contextlib.closing(
                sqlite3.connect(f"file:{self.data / 'state.db'}?mode=ro", uri=True, timeout=1)
            ) as db,
        ):
            found: tuple[str, str, str, float, float] | None = db.execute(
                "select status, step, reason, started, updated from executions where version = ?",
                (version,),
            ).fetchone()
            return found
        return None

    def started(self, version: str) -> float | None:
        row = self._row(version)
        return row[3] if row else None

    def verified(self, version: str) -> float | None:
        row = self._row(version)
        if row is None:
            return None
        if row[0] in ENDED_BADLY:
            raise LabError(f"{self.child.name}: {row[0]}: {row[2]}")
        if (row[0], row[1]) not in {("queued", ""), ("in_progress", "downloading")}:
            self._verified.setdefault(version, row[4])
        return self._verified.get(version)

    def succeeded(self, version: str) -> float | None:
        row = self._row(version)
        return row[4] if row and row[0] == "succeeded" else None

    def done_bytes(self, version: str) -> int:
        bundle = self.bundle(version)
        if not bundle or not bundle["pieces_total"]:
            return 0
        return int(bundle["payload_bytes"] * bundle["pieces_have"] / bundle["pieces_total"])

    def transfer(self, payload: Payload, version: str) -> Transfer:
        return Transfer(
            device=self.host.name,
            started=lambda: self.started(version),
            verified=lambda: self.verified(version),
            done_bytes=lambda: self.done_bytes(version),
            target=self.data / "bundles" / NAME / "current" / payload.path.name,
            settled=lambda: self.succeeded(version),
        )


@dataclass(frozen=True)
class Ports:
    quic: int = 7443
    mqtt: int = 8883
    http: int = 7480

    def plus(self, number: int) -> "Ports":
        """Those of another gateway on the same host."""
        return Ports(self.quic + number, self.mqtt + number, self.http + number)


class GatewayAndAgents:
    """A small fleet on a rig, up to the moment before an assignment."""

    def __init__(
        self,
        rig: Rig,
        *,
        name: str = "",
        sites: Sequence[Sequence[Host]] | None = None,
        ports: Ports | None = None,
        environment: Mapping[str, str] | None = None,
        agent_environment: Mapping[str, str] | None = None,
    ) -> None:
        """``name`` and ``ports`` keep several fleets of one rig apart; ``sites``: some of its devices, all by default."""
        self.rig = rig
        self._name = name
        self._sites = rig.sites if sites is None else sites
        self._ports = ports or Ports()
        self.data = rig.work / f"gateway{name}"
        self._environment = {"EDGESYNC_RECONNECT_MAX": "5s", **(environment or {})}
        self._agent_environment = self._environment | dict(agent_environment or {})
        self.gateway: Child
        self.agents: list[Agent] = []

    def command(self, host: Host, *arguments: str, stdin: str = "") -> str:
        return host.call(*COMMAND, *arguments, stdin=stdin, timeout_s=600, env=self._environment)

    def start(self) -> None:
        """Raises LabError: a command failed, or an agent did not reach the gateway."""
        source, ports = self.rig.source, self._ports
        advertise = f"{source.address}:{ports.quic}"
        data = ("--data", str(self.data))
        self.command(source, "gateway", "init", "bench", "--advertise", advertise, *data)
        listen = ["--listen-quic", f"{source.address}:{ports.quic}"]
        listen += ["--listen-mqtt", f"{source.address}:{ports.mqtt}"]
        listen += ["--listen-http", f"127.0.0.1:{ports.http}"]
        self.gateway = self.rig.spawn(
            source,
            f"gateway{self._name}",
            [*COMMAND, "gateway", "run", *data, *listen],
            env=self._environment,
        )
        await_that("the gateway to be ready", self._ready, timeout_s=START_TIMEOUT_S)
        for number, site in enumerate(self._sites, 1):
            self._add_site(f"site-{number}", site)
        for agent in self.agents:
            what = f"{agent.child.name} to reach the gateway"
            await_that(what, agent.connected, timeout_s=START_TIMEOUT_S)

    def _ready(self) -> bool:
        if self.gateway.poll() is not None:
            raise LabError(f"the gateway ended: {self.gateway.last_line()}")
        with contextlib.suppress(LabError):
            self.rig.source.call(sys.executable, "-c", READY_PROBE, str(self._ports.http))
            return True
        return False

    def _add_site(self, name: str, hosts: Sequence[Host]) -> None:
        arguments = ["token", "create", "--ttl", "1h", "--uses", str(len(hosts)), "--auto-accept"]
        arguments += ["--site", name, "--json", "--data", str(self.data)]
        token = json.loads(self.command(self.rig.source, *arguments))["token"]
        for host in hosts:
            data = self.rig.work / f"agent-{host.name}"
            join = ("agent", "join", "--token-file", "-", "--id", host.name, "--data", str(data))
            self.command(host, *join, stdin=token)
            child = self.rig.spawn(
                host,
                f"agent-{host.name}",
                [*COMMAND, "agent", "run", "--data", str(data)],
                env=self._agent_environment,
            )
            self.agents.append(Agent(host, data, child))

    def publish(self, payload: Payload, version: str = "1") -> dict[str, Any]:
        """What `publish bundle --json` printed."""
        arguments = ("publish", "bundle", str(payload.path), f"{NAME}@{version}", "--json")
        published: dict[str, Any] = json.loads(
            self.command(self.rig.source, *arguments, "--data", str(self.data))
        )
        return published

    def assign(self, version: str = "1") -> float:
        """Give it to every device; returns when the command began."""
        self.rig.mark()
        asked_at = time.time()
        bundle = f"{NAME}@{version}"
        self.command(self.rig.source, "assign", bundle, "--all", "--data", str(self.data))
        return asked_at

    def transfers(self, payload: Payload, version: str = "1") -> list[Transfer]:
        return [agent.transfer(payload, version) for agent in self.agents]


class EdgeSync:
    """Ours, with one congestion controller on every process, or the default where none is named."""

    tcp = "cubic"

    def __init__(self, key: str, label: str, *, congestion: str = "") -> None:
        self.key = key
        self.label = label
        self._congestion = congestion

    def missing(self) -> str | None:
        if self._congestion and not has_setting("congestion"):
            return "this version has no setting `congestion`"
        return None

    def version(self) -> str:
        return f"edgesync {version()}, Python {platform.python_version()}"

    def begin(self, rig: Rig, payload: Payload) -> tuple[float, list[Transfer]]:
        chosen = {"EDGESYNC_CONGESTION": self._congestion} if self._congestion else {}
        fleet = GatewayAndAgents(rig, environment=chosen)
        fleet.start()
        fleet.publish(payload)
        asked_at = fleet.assign()
        return asked_at, fleet.transfers(payload)


def version() -> str:
    return first_line(*COMMAND, "--version")


def has_setting(name: str, *, of_agent_only: bool = False) -> bool:
    """Whether gateway and agent both know a setting of this name."""
    from device.config import AgentSettings
    from gateway.config import GatewaySettings

    return name in AgentSettings.__dataclass_fields__ and (
        of_agent_only or name in GatewaySettings.__dataclass_fields__
    )
