"""A gateway and agents in a laboratory, started and asked by the commands an operator types.

What a device holds while it works is read from its own socket (what `edgesync agent status` asks) and, for the times of
its execution, from its state database opened read-only; nothing is called inside the programs.
"""

import contextlib
import hashlib
import json
import random
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from edgesync.errors import EdgeSyncError
from edgesync.io import control
from simulations.netlab.hosts import Child, Host, LabError, await_that

COMMAND: Final = [sys.executable, "-m", "edgesync"]
START_TIMEOUT_S: Final = 120.0
_READY: Final = (
    "import sys,urllib.request as r;"
    "r.build_opener(r.ProxyHandler({})).open(f'http://127.0.0.1:{sys.argv[1]}/readyz',timeout=5)"
)
ENDED_BADLY: Final = frozenset({"failed", "timed_out", "rejected", "canceled"})


class Agent:
    """One device: its data directory, and its process while it runs."""

    def __init__(self, host: Host, data: Path, log: Path, environment: Mapping[str, str]) -> None:
        self.host = host
        self.data = data
        self.log = log
        self.child: Child | None = None
        self.ended_cpu_s = 0.0
        self._environment = environment

    @property
    def name(self) -> str:
        return self.host.name

    def start(self) -> None:
        argv = [*COMMAND, "agent", "run", "--data", str(self.data)]
        name = f"agent-{self.name}"
        self.child = self.host.start(name, argv, log=self.log, env=self._environment)

    def kill(self) -> None:
        if self.child is not None:
            self.child.kill()
            self.ended_cpu_s += self.child.cpu_s()
            self.child = None

    def stop(self) -> None:
        if self.child is not None:
            self.child.stop()

    def cpu_s(self) -> float:
        return self.ended_cpu_s + (self.child.cpu_s() if self.child is not None else 0.0)

    def check(self) -> None:
        """Raises LabError: its process ended by itself."""
        if self.child is not None:
            self.child.check()

    def status(self) -> dict[str, Any] | None:
        """What `agent status --json` says, or None while it does not answer."""
        self.check()
        with contextlib.suppress(EdgeSyncError, OSError):
            return control.ask(self.data, {"op": "status"})
        return None

    def is_connected(self) -> bool:
        status = self.status()
        return status is not None and bool(status["gateway"]["connected"])

    def bundle(self, name: str, version: str) -> dict[str, Any] | None:
        for bundle in (self.status() or {}).get("bundles", []):
            if (bundle["name"], bundle["version"]) == (name, version):
                return dict(bundle)
        return None

    def execution(self, version: str) -> tuple[str, str, str, float, float] | None:
        """(status, step, reason, started, updated) of the bundle's execution; times are the device's clock."""
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


@dataclass(frozen=True)
class Ports:
    """Where a gateway listens."""

    quic: int = 7443
    mqtt: int = 8883
    http: int = 7480

    def plus(self, number: int) -> "Ports":
        """Those of another gateway on the same host."""
        return Ports(self.quic + number, self.mqtt + number, self.http + number)


class Fleet:
    """A gateway and an agent on every device of its sites, up to the moment before an assignment."""

    def __init__(
        self,
        source: Host,
        sites: Mapping[str, Sequence[Host]],
        work: Path,
        *,
        name: str = "gateway",
        ports: Ports | None = None,
        gateway_environment: Mapping[str, str] | None = None,
        agent_environment: Mapping[str, str] | None = None,
        log: Callable[[str], None] = lambda _line: None,
    ) -> None:
        """``source``: the gateway's host; ``name`` and ``ports`` keep several gateways there apart."""
        self.source = source
        self.work = work
        self.data = work / name
        self.gateway: Child | None = None
        self.gateway_cpu_s = 0.0
        self.agents: list[Agent] = []
        self._sites = sites
        self._name = name
        self._ports = ports or Ports()
        self._gateway_environment = dict(gateway_environment or {})
        # A laboratory's outages are minutes, not nights.
        self._agent_environment = {"EDGESYNC_RECONNECT_MAX": "5s", **(agent_environment or {})}
        self._log = log

    def close(self) -> None:
        for agent in self.agents:
            agent.stop()
        self.stop_gateway()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def command(self, host: Host, *arguments: str, stdin: str = "", timeout_s: float = 900) -> str:
        """One `edgesync` command in a host, to its end. Raises LabError."""
        return host.call(*COMMAND, *arguments, stdin=stdin, timeout_s=timeout_s)

    # --- gateway

    def init(self) -> None:
        self._log("making the gateway")
        advertise = f"{self.source.address}:{self._ports.quic}"
        data = ("--data", str(self.data))
        self.command(self.source, "gateway", "init", "lab", "--advertise", advertise, *data)

    def start_gateway(self) -> None:
        address, ports = self.source.address, self._ports
        argv = [*COMMAND, "gateway", "run", "--data", str(self.data)]
        argv += ["--listen-quic", f"{address}:{ports.quic}"]
        argv += ["--listen-mqtt", f"{address}:{ports.mqtt}"]
        argv += ["--listen-http", f"127.0.0.1:{ports.http}"]
        log = self.work / f"{self._name}.log"
        gateway = self.source.start(self._name, argv, log=log, env=self._gateway_environment)
        self.gateway = gateway

        def ready() -> bool:
            gateway.check()
            with contextlib.suppress(LabError):
                self.source.call(sys.executable, "-c", _READY, str(ports.http))
                return True
            return False

        await_that("the gateway to be ready", ready, timeout_s=START_TIMEOUT_S)

    def kill_gateway(self) -> None:
        if self.gateway is not None:
            self.gateway.kill()
            self.gateway_cpu_s += self.gateway.cpu_s()
            self.gateway = None

    def stop_gateway(self) -> None:
        if self.gateway is not None:
            self.gateway.stop()
            self.gateway_cpu_s += self.gateway.cpu_s()
            self.gateway = None

    # --- devices

    def join_all(self) -> None:
        """Every device of every site joins and starts; returns when all reach the gateway."""
        for site, hosts in self._sites.items():
            count = str(len(hosts))
            arguments = ["token", "create", "--ttl", "1h", "--uses", count, "--auto-accept"]
            arguments += ["--site", site, "--json", "--data", str(self.data)]
            token = json.loads(self.command(self.source, *arguments))["token"]
            for host in hosts:
                self._log(f"{host.name} joins")
                data = self.work / host.name
                join = ("agent", "join", "--token-file", "-", "--id", host.name)
                self.command(host, *join, "--data", str(data), stdin=token)
                log = self.work / f"{host.name}.log"
                agent = Agent(host, data, log, self._agent_environment)
                agent.start()
                self.agents.append(agent)
        for agent in self.agents:
            what = f"{agent.name} to reach the gateway"
            await_that(what, agent.is_connected, timeout_s=START_TIMEOUT_S)

    def agent(self, name: str) -> Agent:
        return next(agent for agent in self.agents if agent.name == name)

    # --- bundles

    def publish(self, tree: Path, name: str, version: str) -> dict[str, Any]:
        """What `publish bundle --json` printed."""
        arguments = ("publish", "bundle", str(tree), f"{name}@{version}", "--json")
        published: dict[str, Any] = json.loads(
            self.command(self.source, *arguments, "--data", str(self.data))
        )
        return published

    def assign(self, name: str, version: str) -> None:
        arguments = ("assign", f"{name}@{version}", "--all", "--data", str(self.data))
        self.command(self.source, *arguments)


def make_tree(folder: Path, *, size: int, files: int, seed: int) -> None:
    """``files`` incompressible files of ``size`` bytes together, the same for the same seed."""
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    left = size
    for number in range(files):
        share = left // (files - number)
        left -= share
        write_random(folder / f"part-{number:04}", share, rng)


def write_random(path: Path, size: int, rng: random.Random) -> None:
    """A file that no compression makes smaller."""
    with path.open("wb") as file:
        for start in range(0, size, 1_000_000):
            file.write(rng.randbytes(min(1_000_000, size - start)))


def tree_hash(folder: Path) -> str:
    """Over names and contents of all files below ``folder``."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(folder)}\0{digest}\n".encode())
    return total.hexdigest()


def versions() -> dict[str, str]:
    """What ran: for reports."""
    said = subprocess.run([*COMMAND, "--version"], capture_output=True, text=True, check=False)
    return {"edgesync": said.stdout.strip(), "python": sys.version.split()[0]}
