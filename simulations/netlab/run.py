"""Runs a scenario: builds the laboratory, starts the fleet, lets the faults happen, measures, checks the trees.

Counting follows the programs' own counters (piece bodies as carried); link counters stand beside them. It judges one
thing only, whether every device holds the tree that was published.
"""

import dataclasses
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from simulations.netlab.fleet import ENDED_BADLY, Agent, Fleet, make_tree, tree_hash, versions
from simulations.netlab.forwarder import Counters
from simulations.netlab.hosts import LabError
from simulations.netlab.lab import Lab, Site, totals
from simulations.netlab.scenario import Fault, Scenario

NAME: Final = "payload"
VERSION: Final = "1"
SAMPLE_S: Final = 0.2
PROXY_PORT: Final = 3128
SCHEMA: Final = "netlab/1"


@dataclass
class DeviceResult:
    name: str
    site: str
    intact: bool = False
    started_s: float | None = None
    """Seconds after the assignment at which the device took it up."""
    done_s: float | None = None
    from_gateway: int = 0
    from_peers: int = 0
    local: int = 0
    cpu_s: float = 0.0
    reason: str = ""


@dataclass
class Result:
    scenario: str
    size: int
    wire_bytes: int
    wall_s: float
    devices: list[DeviceResult]
    links: dict[str, dict[str, Any]]
    cpu_s: dict[str, float]
    faults: list[str]
    complete: bool
    versions: dict[str, str] = field(default_factory=versions)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            **{key: value for key, value in vars(self).items() if key != "devices"},
            "devices": [vars(device) for device in self.devices],
        }


class _Timeline:
    """Faults that are due, in the order they come."""

    def __init__(self, faults: tuple[Fault, ...]) -> None:
        self._waiting = list(faults)
        self._endings: list[tuple[float, Callable[[], None], str]] = []
        self.happened: list[str] = []

    def due(self, *, now: float, progress: float) -> list[Fault]:
        found = [
            fault
            for fault in self._waiting
            if (fault.at is not None and fault.at <= now)
            or (fault.at_progress is not None and fault.at_progress <= progress)
        ]
        self._waiting = [fault for fault in self._waiting if fault not in found]
        return found

    def ends_at(self, at: float, action: Callable[[], None], what: str) -> None:
        self._endings.append((at, action, what))

    def end(self, *, now: float) -> None:
        for ending in [ending for ending in self._endings if ending[0] <= now]:
            self._endings.remove(ending)
            ending[1]()
            self.happened.append(f"{now:.1f} s: {ending[2]}")


def run(
    scenario: Scenario,
    *,
    size: int | None = None,
    keep: Path | None = None,
    log: Callable[[str], None] = lambda _line: None,
) -> Result:
    """Raises LabError: the laboratory or a command failed. A device that did not finish is in the result."""
    work = keep or Path(tempfile.mkdtemp(prefix="edgesync-netlab-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        with Lab(seed=scenario.seed) as lab:
            for plan in scenario.sites:
                lab.add_site(
                    plan.name,
                    devices=plan.devices,
                    there=plan.there,
                    back=plan.back,
                    mtu=plan.mtu,
                    nat=plan.nat,
                )
            return _Run(scenario, lab, work, size or scenario.size, log).run()
    finally:
        if keep is None:
            shutil.rmtree(work, ignore_errors=True)


class _Run:
    def __init__(
        self, scenario: Scenario, lab: Lab, work: Path, size: int, log: Callable[[str], None]
    ) -> None:
        self.scenario = scenario
        self.lab = lab
        self.work = work
        self.size = size
        self.log = log
        self.timeline = _Timeline(scenario.faults)
        self._outages: dict[str, int] = {}
        self.fleet = Fleet(
            lab.source,
            lab.devices,
            work,
            gateway_environment=scenario.gateway_environment,
            agent_environment=scenario.agent_environment,
            log=log,
        )

    def run(self) -> Result:
        tree = self.work / "tree"
        make_tree(tree, size=self.size, files=self.scenario.files, seed=self.scenario.seed)
        self._start_proxies()
        with self.fleet as fleet:
            fleet.init()
            fleet.start_gateway()
            fleet.join_all()
            published = fleet.publish(tree, NAME, VERSION)
            before = {site.name: site.link.counters() for site in self.lab.sites}
            cpu = self._cpu()
            assigned_at = time.time()
            started = time.monotonic()
            fleet.assign(NAME, VERSION)
            self.log(f"assigned to {len(fleet.agents)} devices")
            self._watch(started)
            wall = time.monotonic() - started
            devices = [self._result(agent, tree, assigned_at) for agent in fleet.agents]
            links = {}
            for site in self.lab.sites:
                links[site.name] = {
                    way: {key: value - getattr(old, key) for key, value in vars(new).items()}
                    for way, new, old in zip(
                        ("there", "back"), site.link.counters(), before[site.name], strict=True
                    )
                }
            spent = {name: round(now - cpu.get(name, 0.0), 2) for name, now in self._cpu().items()}
        for device in devices:
            device.cpu_s = spent.get(device.name, 0.0)
        return Result(
            scenario=self.scenario.name,
            size=self.size,
            wire_bytes=int(published["wire_bytes"]),
            wall_s=round(wall, 2),
            devices=devices,
            links=links,
            cpu_s=spent,
            faults=self.timeline.happened,
            complete=all(device.intact for device in devices),
        )

    def _start_proxies(self) -> None:
        if not any(plan.proxy for plan in self.scenario.sites):
            return
        argv = [sys.executable, "-m", "simulations.netlab.proxy", "0.0.0.0", str(PROXY_PORT)]  # noqa: S104
        self.lab.wan.start("proxy", argv, log=self.work / "proxy.log")
        for plan, site in zip(self.scenario.sites, self.lab.sites, strict=True):
            if plan.proxy:
                url = f"http://10.77.0.1:{PROXY_PORT}"
                for host in site.devices:
                    host.environment["HTTPS_PROXY"] = url
                site.link.set(only_port=PROXY_PORT)

    def _cpu(self) -> dict[str, float]:
        fleet = self.fleet
        running = fleet.gateway.cpu_s() if fleet.gateway is not None else 0.0
        return {
            "gateway": fleet.gateway_cpu_s + running,
            **{agent.name: agent.cpu_s() for agent in fleet.agents},
        }

    # --- while it runs

    def _watch(self, started: float) -> None:
        while True:
            now = time.monotonic() - started
            self.timeline.end(now=now)
            held, ended = 0, 0
            for agent in self.fleet.agents:
                bundle = agent.bundle(NAME, VERSION) if agent.child is not None else None
                row = agent.execution(VERSION)
                if row is not None and row[0] in {"succeeded", *ENDED_BADLY}:
                    ended += 1
                    held += 1
                elif bundle is not None and bundle["pieces_total"]:
                    held += bundle["pieces_have"] / bundle["pieces_total"]
            if ended == len(self.fleet.agents):
                return
            if now > self.scenario.timeout:
                self.log(f"gave up after {now:.0f} s")
                return
            progress = held / len(self.fleet.agents)
            for fault in self.timeline.due(now=now, progress=progress):
                self._happen(fault, now=now)
            time.sleep(SAMPLE_S)

    def _happen(self, fault: Fault, *, now: float) -> None:
        self.log(f"{now:.1f} s: {fault}")
        self.timeline.happened.append(f"{now:.1f} s: {fault}")
        undo = self._act(fault)
        if fault.lasts and undo is not None:
            self.timeline.ends_at(now + fault.lasts, undo, f"end of {fault.do}")

    def _act(self, fault: Fault) -> Callable[[], None] | None:
        """Do it; what ends it."""
        fleet = self.fleet
        match fault.do:
            case "outage":
                return self._cut(self._site(fault.site))
            case "set":
                link = self._site(fault.site).link
                before = (link.there, link.back)
                link.set(None, None, **fault.values)
                return lambda: link.set(
                    *(
                        dataclasses.replace(now, **{key: getattr(old, key) for key in fault.values})
                        for now, old in zip((link.there, link.back), before, strict=True)
                    )
                )
            case "kill":
                agent = fleet.agent(fault.device)
                agent.kill()
                return agent.start
            case "move":
                self.lab.move(fleet.agent(fault.device).host)
                return None
            case "rebind":
                self.lab.rebind(self._site(fault.site))
                return None
            case "kill_gateway":
                fleet.kill_gateway()
                return fleet.start_gateway
            case other:
                raise LabError(f"nobody knows how to do {other}")

    def _cut(self, site: Site) -> Callable[[], None]:
        """Outages may overlap: the link is up again after the last of them."""
        self._outages[site.name] = self._outages.get(site.name, 0) + 1
        site.link.set(down=1)

        def end() -> None:
            self._outages[site.name] -= 1
            if not self._outages[site.name]:
                site.link.set(down=0)

        return end

    def _site(self, name: str) -> Site:
        return next(site for site in self.lab.sites if site.name == name)

    # --- after it

    def _result(self, agent: Agent, tree: Path, assigned_at: float) -> DeviceResult:
        result = DeviceResult(agent.name, self.lab.site_of(agent.host).name)
        row = agent.execution(VERSION)
        if row is not None:
            status, _step, result.reason, started, updated = row
            result.started_s = round(started - assigned_at, 2)
            if status == "succeeded":
                result.done_s = round(updated - assigned_at, 2)
        with_bundle = agent.bundle(NAME, VERSION) if agent.child is not None else None
        if with_bundle is not None:
            result.from_gateway = with_bundle["bytes_from_gateway"]
            result.from_peers = with_bundle["bytes_from_peers"]
            result.local = with_bundle["bytes_local"]
        installed = agent.data / "bundles" / NAME / "current"
        result.intact = installed.is_dir() and tree_hash(installed) == tree_hash(tree)
        return result


def table(result: Result, scenario: Scenario) -> str:
    """What a person wants to see."""
    lines = [
        f"{scenario.name}: {scenario.about}".rstrip(": "),
        (
            f"{result.size / 1e6:.1f} MB ({result.wire_bytes / 1e6:.1f} MB to move), {len(result.devices)} devices,"
            f" {result.wall_s:.1f} s"
        ),
        "",
        f"{'device':16}{'done, s':>9}{'Mbit/s':>9}{'gateway, MB':>13}{'peers, MB':>11}{'CPU, s':>9}  tree",
    ]
    for device in result.devices:
        took = device.done_s
        rate = f"{result.size * 8 / took / 1e6:.2f}" if took else "-"
        lines.append(
            f"{device.name:16}{f'{took:.1f}' if took else '-':>9}{rate:>9}{device.from_gateway / 1e6:>13.2f}"
            f"{device.from_peers / 1e6:>11.2f}{device.cpu_s:>9.1f}  {'intact' if device.intact else 'MISSING'}"
            f" {device.reason}".rstrip()
        )
    lines.append(f"{'gateway':16}{'':>9}{'':>9}{'':>13}{'':>11}{result.cpu_s['gateway']:>9.1f}")
    lines.append("")
    for name, ways in result.links.items():
        there = totals_of(ways["there"])
        lines.append(f"link {name}: {there} there, {totals_of(ways['back'])} back")
    lines += [f"fault {what}" for what in result.faults]
    return "\n".join(lines)


def totals_of(difference: dict[str, int]) -> str:
    return totals(Counters(**difference))


def write_json(result: Result, path: Path) -> None:
    path.write_text(json.dumps(result.to_json(), indent=1) + "\n")
