"""EdgeSync in a laboratory: a gateway process at the source, an agent process on each device, all by command.

Times are the agent's own, from its table of executions: ``started`` is when the assignment was accepted, before the
manifest is asked for; the row leaves ``downloading`` when every piece is held, checked and synced; ``succeeded`` is
what an operator waits for, after the files were put in place and hashed once more.
"""

import platform
import time
from collections.abc import Mapping, Sequence

from benchmarks.netbench.files import first_line
from benchmarks.netbench.rig import Rig
from benchmarks.netbench.transfer import Payload, Transfer
from simulations.netlab.fleet import COMMAND, ENDED_BADLY, Agent, Fleet, Ports
from simulations.netlab.hosts import Host, LabError

NAME = "bench"


class Execution:
    """One device's execution of a version. Times are Unix seconds."""

    def __init__(self, agent: Agent, version: str) -> None:
        self._agent = agent
        self._version = version
        self._verified: float | None = None

    def _row(self) -> tuple[str, str, str, float, float] | None:
        self._agent.check()
        return self._agent.execution(self._version)

    def started(self) -> float | None:
        row = self._row()
        return row[3] if row else None

    def verified(self) -> float | None:
        """Raises LabError: it ended badly."""
        row = self._row()
        if row is None:
            return None
        if row[0] in ENDED_BADLY:
            raise LabError(f"{self._agent.name}: {row[0]}: {row[2]}")
        if self._verified is None and (row[0], row[1]) not in {
            ("queued", ""),
            ("in_progress", "downloading"),
        }:
            self._verified = row[4]
        return self._verified

    def succeeded(self) -> float | None:
        row = self._row()
        return row[4] if row and row[0] == "succeeded" else None

    def done_bytes(self) -> int:
        bundle = self._agent.bundle(NAME, self._version)
        if not bundle or not bundle["pieces_total"]:
            return 0
        return int(bundle["payload_bytes"] * bundle["pieces_have"] / bundle["pieces_total"])


def start_fleet(
    rig: Rig,
    *,
    name: str = "gateway",
    devices: Sequence[Host] | None = None,
    ports: Ports | None = None,
    environment: Mapping[str, str] | None = None,
    agent_environment: Mapping[str, str] | None = None,
) -> Fleet:
    """A gateway at the rig's source, ready, and agents that reach it. Raises LabError.

    ``name`` and ``ports`` keep several fleets of one rig apart; ``devices``: those of this one, all by default.
    """
    sites = rig.sites if devices is None else [devices]
    fleet = Fleet(
        rig.source,
        {f"site-{number}": site for number, site in enumerate(sites, 1)},
        rig.work,
        name=name,
        ports=ports,
        gateway_environment=environment,
        agent_environment={**(environment or {}), **(agent_environment or {})},
    )
    fleet.init()
    fleet.start_gateway()
    fleet.join_all()
    return fleet


def assign(rig: Rig, fleet: Fleet, version: str) -> float:
    """Give it to every device and count from here on; returns when the command began."""
    rig.mark()
    asked_at = time.time()
    fleet.assign(NAME, version)
    return asked_at


def transfers(fleet: Fleet, payload: Payload, version: str) -> list[Transfer]:
    return [_transfer(agent, payload, version) for agent in fleet.agents]


def _transfer(agent: Agent, payload: Payload, version: str) -> Transfer:
    execution = Execution(agent, version)
    return Transfer(
        device=agent.name,
        started=execution.started,
        verified=execution.verified,
        done_bytes=execution.done_bytes,
        target=agent.data / "bundles" / NAME / "current" / payload.path.name,
        settled=execution.succeeded,
    )


class EdgeSync:
    """Ours, with one congestion controller on every process, or the default where none is named."""

    tcp = "cubic"

    def __init__(self, key: str, label: str, *, congestion: str = "") -> None:
        self.key = key
        self.label = label
        self._congestion = congestion

    def missing(self) -> str | None:
        return None

    def version(self) -> str:
        return f"edgesync {first_line(*COMMAND, '--version')}, Python {platform.python_version()}"

    def begin(self, rig: Rig, payload: Payload) -> tuple[float, list[Transfer]]:
        chosen = {"EDGESYNC_CONGESTION": self._congestion} if self._congestion else {}
        fleet = start_fleet(rig, environment=chosen)
        fleet.publish(payload.path, NAME, "1")
        asked_at = assign(rig, fleet, "1")
        return asked_at, transfers(fleet, payload, "1")
