"""`make bench-outages`: what link cuts, kills, changes of address and a lost broker cost a transfer.

``python -m benchmarks.outages`` (root; Linux namespaces; mosquitto for ``broker``). The real commands run on
``simulations.netlab``; links are sampled each SAMPLE_S. Figures are printed beside their bars and nothing is asserted.

* ``cuts``: one transfer through link cuts and SIGKILLs of the agent, beside the same transfer undisturbed. What the
  agent counted and what the link carried, over the payload; what came while the agent was dead or its session already
  given up is in the link's figure.
* ``again``: time from the end of an outage until AGAIN_BYTES came out of the link.
* ``address``: the device's address changes, and its NAT forgets it; the longest time without data, and bytes above payload.
* ``gateway``: the gateway is killed in mid-transfer and started again; time until AGAIN_BYTES came after it is ready.
* ``broker``: an external broker is killed and restarted empty while devices transfer and report.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import random
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.netbench.results import Spread, machine, revision, verdict
from benchmarks.netbench.single import CACHE, DOCS, MB
from gateway.broker_config import BrokerSite, mosquitto_acl, mosquitto_conf
from simulations.netlab.fleet import ENDED_BADLY, Agent, Fleet, make_tree, tree_hash
from simulations.netlab.forwarder import Impairment
from simulations.netlab.hosts import LabError
from simulations.netlab.lab import SOURCE_ADDRESS, Lab, Site

SEED = 4
RATE_BIT_S = 20e6
RTT_S = 0.06
SAMPLE_S = 0.05
AGAIN_BYTES = 20_000
"""More than a handshake and pings: data moves."""
MOVING_BYTES = 1_500
"""Less than this in one sample is silence."""
NAME = "payload"
EXTERNAL_PORT = 8884
AS_SHIPPED = {"EDGESYNC_RECONNECT_MAX": "300s"}
"""The laboratory shortens this for its scenarios; what is measured here is what an operator gets."""
RECEIVED_BAR, AGAIN_BAR_S, ADDRESS_BAR_S = 1.02, 1.5, 3.0
CASES = ("cuts", "again", "address", "gateway", "broker")
Row = dict[str, Any]


@dataclass
class Sample:
    at: float
    there: int
    """Bytes that came out of the link towards the site."""
    offered: int
    back: int
    reached: int
    """Bytes the device's own interface received."""


class Watch:
    """Samples of one site's link while something is waited for."""

    def __init__(self, site: Site, agent: Agent) -> None:
        self._site = site
        self._agent = agent
        self.samples: list[Sample] = []

    def sample(self) -> Sample:
        there, back = self._site.link.counters()
        reached = self.samples[-1].reached if self.samples else 0
        child = self._agent.child
        if child is not None:
            with contextlib.suppress(OSError):
                reached = child.received_bytes() or reached
        taken = Sample(time.monotonic(), there.out_bytes, there.in_bytes, back.out_bytes, reached)
        self.samples.append(taken)
        return taken

    def until(self, condition: Callable[[Sample], bool], *, what: str, timeout_s: float) -> Sample:
        """Sample until it is true. Raises LabError naming ``what``."""
        deadline = time.monotonic() + timeout_s
        due = time.monotonic()
        while True:
            taken = self.sample()
            if condition(taken):
                return taken
            if taken.at > deadline:
                raise LabError(f"gave up after {timeout_s:.0f} s waiting for {what}")
            due = max(due + SAMPLE_S, time.monotonic())
            time.sleep(max(0.0, due - time.monotonic()))

    def rest(self, seconds: float) -> Sample:
        end = time.monotonic() + seconds
        return self.until(lambda s: s.at >= end, what="the time to pass", timeout_s=seconds + 60)

    def longest_silence(self, since: float, until: float) -> float:
        """Seconds without data at the device, the longest stretch of samples between two times."""
        longest, began = 0.0, since
        window = [s for s in self.samples if since - 2 * SAMPLE_S <= s.at <= until]
        for before, now in itertools.pairwise(window):
            if now.reached - before.reached >= MOVING_BYTES:
                longest, began = max(longest, now.at - began), now.at
        return max(longest, (window[-1].at if window else until) - began)


class Bed:
    """A fleet with one bundle published to it, up to the assignment."""

    def __init__(self, fleet: Fleet, lab: Lab, work: Path, *, size: int) -> None:
        self.fleet, self.lab, self.size = fleet, lab, size
        self.work = work
        self.site = lab.sites[0]
        self.agent = fleet.agents[0]
        self.watch = Watch(self.site, self.agent)
        self.wire_bytes = 0
        self._trees: dict[str, str] = {}

    def publish(self, version: str, size: int | None = None) -> None:
        tree = self.work / f"tree-{version}"
        make_tree(tree, size=size or self.size, files=1, seed=SEED + len(self._trees))
        self._trees[version] = tree_hash(tree)
        self.wire_bytes = int(self.fleet.publish(tree, NAME, version)["wire_bytes"])
        shutil.rmtree(tree)

    def begin(self, version: str) -> Sample:
        self.fleet.assign(NAME, version)
        began = self.watch.sample()
        return self.watch.until(
            lambda s: s.there - began.there > AGAIN_BYTES, what="the first data", timeout_s=60
        )

    def progress(self, version: str) -> float:
        """Share of the pieces the devices hold together; an agent that does not answer holds none."""
        bundles = [
            (agent.bundle(NAME, version) if agent.child is not None else None)
            for agent in self.fleet.agents
        ]
        shares = [
            bundle["pieces_have"] / bundle["pieces_total"]
            if bundle and bundle["pieces_total"]
            else 0.0
            for bundle in bundles
        ]
        return float(sum(shares) / len(shares))

    def done(self, version: str) -> bool:
        rows = [agent.execution(version) for agent in self.fleet.agents]
        for row in rows:
            if row is not None and row[0] in ENDED_BADLY:
                raise LabError(f"a device ended with {row[0]}: {row[2]}")
        return all(row is not None and row[0] == "succeeded" for row in rows)

    def finish(self, version: str, *, timeout_s: float) -> Sample:
        checked = 0.0

        def over(sample: Sample) -> bool:
            nonlocal checked
            if sample.at - checked < 0.2:
                return False
            checked = sample.at
            return self.done(version)

        end = self.watch.until(over, what="the transfer to end", timeout_s=timeout_s)
        for agent in self.fleet.agents:
            if tree_hash(agent.data / "bundles" / NAME / "current") != self._trees[version]:
                raise LabError(f"{agent.name} does not hold what was published")
        return end

    def received(self, version: str) -> int:
        """Piece bytes that came over the link, as the agents count them."""
        bundles = [agent.bundle(NAME, version) or {} for agent in self.fleet.agents]
        return sum(int(bundle.get("bytes_from_gateway", 0)) for bundle in bundles)

    def carrier(self) -> str:
        """By what the session with the gateway goes: QUIC or TLS."""
        return str((self.agent.status() or {}).get("gateway", {}).get("carrier", ""))

    def cut(self, seconds: float) -> None:
        self.site.link.set(down=1)
        try:
            self.watch.rest(seconds)
        finally:
            self.site.link.set(down=0)


@contextlib.contextmanager
def bed(
    work: Path,
    *,
    size: int,
    devices: int = 1,
    nat: bool = False,
    gateway_environment: Mapping[str, str] | None = None,
    before_start: Callable[[Fleet], None] = lambda _fleet: None,
) -> Iterator[Bed]:
    """Raises LabError."""
    way = Impairment(rate=RATE_BIT_S, delay=RTT_S / 2, queue=RATE_BIT_S * RTT_S / 8)
    folder = Path(tempfile.mkdtemp(dir=work))
    with Lab(seed=SEED) as lab:
        lab.add_site("plant", devices=devices, there=way, nat=nat)
        with Fleet(
            lab.source,
            lab.devices,
            folder,
            gateway_environment=gateway_environment,
            agent_environment=AS_SHIPPED,
        ) as fleet:
            fleet.init()
            before_start(fleet)
            fleet.start_gateway()
            fleet.join_all()
            yield Bed(fleet, lab, folder, size=size)
    shutil.rmtree(folder, ignore_errors=True)


SAID: list[str] = []
"""What the case under way has printed, for the page."""


def say(text: str) -> None:
    SAID.append(text)
    print(text, flush=True)


# --- cuts


def cuts(work: Path, options: argparse.Namespace) -> list[Row]:
    size = options.size or (20 if options.quick else 200) * MB
    count, kills = (6, 2) if options.quick else (20, 5)
    longest = 8.0 if options.quick else 60.0
    rng = random.Random(options.seed)
    say(f"seed {options.seed}")
    faults = sorted(
        [
            ("cut", (n + rng.uniform(0.1, 0.9)) / (count + 1), longest ** rng.random())
            for n in range(count)
        ]
        + [("kill", (n + rng.uniform(0.1, 0.9)) / (kills + 1), 1.0) for n in range(kills)],
        key=lambda fault: fault[1],
    )
    rows = []
    with bed(work, size=size, devices=options.devices) as it:
        for version, plan in (("1", []), ("2", faults)):
            it.publish(version)
            row = _through(it, version, plan)
            rows.append({"case": "cuts", "quick": options.quick, **row})
    clean, cut = rows
    say(
        f"cuts: {len(cut['cuts'])} cuts of {sum(c['seconds'] for c in cut['cuts']):.1f} s together and {cut['kills']} kills "
        f"in a transfer of {size / MB:g} MB to {options.devices} device(s)"
    )
    say(
        f"  agent's counters / payload {cut['received'] / size:.4f} (undisturbed {clean['received'] / size:.4f})"
    )
    say(
        f"  link carried / payload {cut['link'] / size:.4f} (undisturbed {clean['link'] / size:.4f}); ratio of the two {cut['link'] / clean['link']:.4f}"
    )
    say(f"  of it while the agent was dead {cut['while_dead'] / MB:.3f} MB")
    at_cuts = [c["offered"] for c in cut["cuts"]]
    say(
        f"  offered to the link while it was cut, {_spread([b / 2**20 for b in at_cuts])} MiB a cut (never received)"
    )
    lost_s = cut["seconds"] - clean["seconds"]
    down_s = sum(c["seconds"] for c in cut["cuts"])
    say(
        f"  took {cut['seconds']:.1f} s, undisturbed {clean['seconds']:.1f} s: {lost_s:.1f} s more than it; cuts {down_s:.1f} s, "
        f"agent dead {cut['dead_s']:.1f} s; beyond both {lost_s - down_s - cut['dead_s']:.1f} s"
    )
    say(
        f"  data moves again after a cut: {_spread([c['again_s'] for c in cut['cuts']])} s; after a kill's restart: {_spread(cut['after_kill_s'])} s"
    )
    # Where others at the site were fed meanwhile, nobody can tell what of it was for the dead one.
    apart = cut["while_dead"] if options.devices == 1 else 0
    over_link = (cut["link"] - apart) / clean["link"]
    say(
        _verdict(
            "received / payload, the worse of the agents' counters and of the link's ratio without what came for a dead "
            f"agent ({over_link:.4f})",
            max(cut["received"] / size, over_link),
            RECEIVED_BAR,
        )
    )
    return rows


def _through(it: Bed, version: str, plan: list[tuple[str, float, float]]) -> Row:
    """One transfer with faults at their shares of progress."""
    waiting = list(plan)
    began = it.begin(version)
    row: Row = {
        "version": version,
        "size": it.size,
        "wire_bytes": it.wire_bytes,
        "cuts": [],
        "kills": 0,
        "while_dead": 0,
        "dead_s": 0.0,
        "after_kill_s": [],
    }
    while waiting:
        what, share, seconds = waiting.pop(0)
        checked = 0.0

        def due(sample: Sample, share: float = share) -> bool:
            nonlocal checked
            if sample.at - checked < 0.2:
                return False
            checked = sample.at
            return it.progress(version) >= share or it.done(version)

        it.watch.until(due, what=f"{share:.0%} of the transfer", timeout_s=300)
        if it.done(version):
            break
        before = it.watch.sample()
        if what == "cut":
            it.cut(seconds)
            up = it.watch.sample()
            again = _again(it, up, version)
            row["cuts"].append(
                {
                    "seconds": up.at - before.at,
                    "again_s": again - up.at,
                    "offered": up.offered - before.offered,
                }
            )
            say(f"  cut of {seconds:.1f} s at {share:.0%}: moves after {again - up.at:.2f} s")
        else:
            it.agent.kill()
            dead = it.watch.rest(seconds)
            it.agent.start()
            again = _again(it, dead, version)
            row["kills"] += 1
            row["while_dead"] += dead.there - before.there
            row["dead_s"] += dead.at - before.at
            row["after_kill_s"].append(again - dead.at)
            say(f"  kill at {share:.0%}: moves {again - dead.at:.2f} s after the start")
    end = it.finish(version, timeout_s=600)
    row.update(
        seconds=end.at - began.at,
        link=end.there - began.there + AGAIN_BYTES,
        back=end.back - began.back,
        received=it.received(version),
    )
    return row


def _sign_since(since: Sample, sample: Sample) -> bool:
    """Whether anything came back from the site."""
    return sample.back > since.back


def _again(it: Bed, since: Sample, version: str = "1") -> float:
    """When AGAIN_BYTES have come since a sample, or the transfer was over (peers may have had the rest)."""
    checked = since.at

    def moved(sample: Sample) -> bool:
        nonlocal checked
        if sample.there - since.there >= AGAIN_BYTES:
            return True
        if sample.at - checked < 0.5:
            return False
        checked = sample.at
        return it.done(version)

    return it.watch.until(moved, what="data to move again", timeout_s=120).at


# --- again


def again(work: Path, options: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    repeat = options.repeat or (3 if options.quick else 7)
    lengths = options.outage or ((1.0, 5.0) if options.quick else (1.0, 5.0, 30.0))
    with bed(work, size=options.size or 4 * repeat * len(lengths) * 2 * MB + 40 * MB) as it:
        it.publish("1")
        it.begin("1")
        rng = random.Random(options.seed)
        for seconds in lengths:
            for number in range(repeat):
                it.watch.rest(rng.uniform(2.0, 3.0))
                if it.done("1"):
                    raise LabError("the payload was too small for all outages")
                cpu = it.agent.cpu_s()
                it.cut(seconds)
                up = it.watch.sample()
                busy = (it.agent.cpu_s() - cpu) / seconds
                seen = functools.partial(_sign_since, up)
                back = it.watch.until(seen, what="a sign", timeout_s=120)
                moved = _again(it, up)
                rows.append(
                    {
                        "case": "again",
                        "seconds": seconds,
                        "number": number,
                        "again_s": moved - up.at,
                        "sign_s": back.at - up.at,
                        "carrier": it.carrier(),
                        "busy": busy,
                    }
                )
                say(
                    f"  outage of {seconds:g} s: first packet {back.at - up.at:.2f} s, data {moved - up.at:.2f} s after it"
                )
    for seconds in lengths:
        mine = [row["again_s"] for row in rows if row["seconds"] == seconds]
        figure = (
            f"moving again after an outage of {seconds:g} s: {_spread(mine)} s ({len(mine)} times)"
        )
        say(_verdict(figure, statistics.median(mine), AGAIN_BAR_S) if seconds == 5.0 else figure)
        used = [100 * row["busy"] for row in rows if row["seconds"] == seconds]
        tls = sum(row["seconds"] == seconds and row["carrier"] == "TLS" for row in rows)
        say(f"  agent's use of a core meanwhile {_spread(used)} %; first data over TLS {tls} times")
    return rows


# --- address


def address(work: Path, options: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    repeat = options.repeat or (2 if options.quick else 5)
    for what in ("move", "rebind"):
        with bed(work, size=(12 + repeat * 18) * MB, nat=what == "rebind") as it:
            it.publish("1")
            began = it.begin("1")
            for _ in range(repeat):
                it.watch.rest(2.0)
                before = it.watch.sample()
                if what == "move":
                    it.lab.move(it.agent.host)
                else:
                    it.lab.rebind(it.site)
                it.watch.rest(5.0)
                if it.done("1"):
                    raise LabError("the payload was too small for all changes")
                silence = it.watch.longest_silence(before.at, time.monotonic())
                rows.append({"case": "address", "what": what, "silence_s": silence})
                say(f"  {what}: longest silence in the 5 s after it {silence:.2f} s")
            end = it.finish("1", timeout_s=300)
            received, link = it.received("1") / it.size, (end.there - began.there) / it.size
            say(f"  {what}: agent's counters / payload {received:.4f}, link / payload {link:.4f}")
            rows[-1].update(received=received, link=link)
        mine = [row["silence_s"] for row in rows if row["what"] == what]
        say(
            _verdict(
                f"address change ({what}): stall {_spread(mine)} s ({repeat} times)",
                statistics.median(mine),
                ADDRESS_BAR_S,
            )
        )
    return rows


# --- gateway


def gateway(work: Path, options: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    repeat = options.repeat or (2 if options.quick else 5)
    with bed(work, size=(12 + repeat * 12) * MB) as it:
        it.publish("1")
        began = it.begin("1")
        for _ in range(repeat):
            it.watch.rest(3.0)
            if it.done("1"):
                raise LabError("the payload was too small for all kills")
            it.fleet.kill_gateway()
            it.watch.rest(options.down)
            starting = time.monotonic()
            it.fleet.start_gateway()
            ready = it.watch.sample()
            moved = _again(it, ready) - ready.at
            rows.append({"case": "gateway", "again_s": moved, "start_s": ready.at - starting})
            say(
                f"  gateway dead for {options.down:g} s, ready {ready.at - starting:.2f} s after its start: data {moved:.2f} s later"
            )
        end = it.finish("1", timeout_s=300)
        received, link = it.received("1") / it.size, (end.there - began.there) / it.size
        rows[-1].update(received=received, link=link)
        made, stored, lost, doubled = _settled_reports(it)
    say(f"  reports made {made}, stored {stored}, lost {lost}, doubled {doubled}")
    say(
        f"moving again after the gateway is ready: {_spread([row['again_s'] for row in rows])} s ({repeat} times)"
    )
    say(f"  agent's counters / payload {received:.4f}, link / payload {link:.4f}")
    return rows


# --- broker


class Broker:
    """Mosquitto at the source, configured as `gateway broker-config` says but without persistence."""

    def __init__(self, fleet: Fleet, folder: Path) -> None:
        self._fleet = fleet
        self._folder = folder
        self._conf = folder / "mosquitto.conf"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        host = self._fleet.source
        mosquitto = shutil.which("mosquitto", path="/usr/sbin:/usr/bin") or "mosquitto"
        with (self._folder / "mosquitto.log").open("ab") as log:
            self._process = subprocess.Popen(
                host.inside([mosquitto, "-c", str(self._conf)]), stdout=log, stderr=log
            )

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def configure(self) -> None:
        """Its files, from the gateway's own; call once the gateway is made and before it runs. Raises OSError."""
        data = self._fleet.data
        with contextlib.closing(sqlite3.connect(data / "gateway.db")) as db:
            (gateway,) = db.execute("select gateway_id from fleet").fetchone()
        authorities, acl = self._folder / "clients.pem", self._folder / "acl"
        identity = (data / "identity.crt").read_bytes()
        authorities.write_bytes((data / "ca" / "ca.crt").read_bytes() + identity)
        site = BrokerSite(
            gateway=gateway,
            port=EXTERNAL_PORT,
            authorities=str(authorities),
            certificate=str(data / "identity.crt"),
            key=str(data / "identity.key"),
            acl=str(acl),
            persistence=None,
        )
        acl.write_text(mosquitto_acl(site))
        acl.chmod(0o600)
        # Else it drops to an account that cannot read this folder.
        self._conf.write_text(mosquitto_conf(site) + "user root\n")


def broker(work: Path, options: argparse.Namespace) -> list[Row]:
    devices, versions = 3, 4 if options.quick else 12
    folder = Path(tempfile.mkdtemp(dir=work))
    parts: list[Broker] = []

    def before_start(fleet: Fleet) -> None:
        parts.append(Broker(fleet, folder))
        parts[0].configure()
        parts[0].start()

    url = f"mqtts://{SOURCE_ADDRESS}:{EXTERNAL_PORT}"
    rng = random.Random(options.seed)
    try:
        with bed(
            work,
            size=4 * MB,
            devices=devices,
            gateway_environment={"EDGESYNC_BROKER": url},
            before_start=before_start,
        ) as it:
            kills = agent_kills = 0
            said = _log_lines(it)
            for number in range(1, versions + 1):
                version = str(number)
                it.publish(version)
                it.begin(version)
                it.watch.rest(rng.uniform(0.0, 1.5))
                parts[0].kill()
                kills += 1
                victim = it.fleet.agents[number % devices] if number % 2 else None
                it.watch.rest(rng.uniform(0.2, 2.0))
                if victim is not None:
                    victim.kill()
                    agent_kills += 1
                it.watch.rest(rng.uniform(0.2, 2.0))
                parts[0].start()
                if victim is not None:
                    victim.start()
                it.finish(version, timeout_s=120)
            made, stored, lost, doubled = _settled_reports(it)
            lines = _new_lines(said, _log_lines(it))
    finally:
        for part in parts:
            part.kill()
    say(
        f"  {kills} times killed and restarted empty, meanwhile an agent {agent_kills} times; {devices} devices, {versions} bundles of 4 MB each"
    )
    say(f"  reports made {made}, stored {stored}")
    say(f"  lines of warning or worse in the devices' logs: {len(lines)}")
    for line in list(dict.fromkeys(line.partition(" ")[2] for line in lines))[:10]:
        say(f"    {line[:160]}")
    say(_verdict("reports lost", lost, 0))
    say(_verdict("reports doubled", doubled, 0))
    return [
        {
            "case": "broker",
            "kills": kills,
            "made": made,
            "stored": stored,
            "lost": lost,
            "doubled": doubled,
            "lines": len(lines),
        }
    ]


def _settled_reports(it: Bed) -> tuple[int, int, int, int]:
    """Of all agents together, once none of their reports waits: made, stored, lost, doubled."""
    it.watch.until(
        lambda _sample: all(_waiting(agent) == 0 for agent in it.fleet.agents),
        what="the last report to be acknowledged",
        timeout_s=120,
    )
    counted = [_reports(it.fleet.data, agent) for agent in it.fleet.agents]
    made, stored, lost, doubled = (sum(row[n] for row in counted) for n in range(4))
    return made, stored, lost, doubled


def _waiting(agent: Agent) -> int:
    with contextlib.closing(
        sqlite3.connect(f"file:{agent.data / 'state.db'}?mode=ro", uri=True, timeout=5)
    ) as db:
        (count,) = db.execute("select count(*) from outbox").fetchone()
        return int(count)


def _reports(gateway: Path, agent: Agent) -> tuple[int, int, int, int]:
    """Reports a device made, those the gateway stored, lost, and told twice in its log of events."""
    with contextlib.closing(
        sqlite3.connect(f"file:{agent.data / 'state.db'}?mode=ro", uri=True, timeout=5)
    ) as db:
        meta = dict(db.execute("select key, value from outbox_meta").fetchall())
    with contextlib.closing(
        sqlite3.connect(f"file:{gateway / 'gateway.db'}?mode=ro", uri=True, timeout=5)
    ) as db:
        told = [
            json.loads(data)
            for (data,) in db.execute(
                "select data from events where actor = ? and kind like 'execution.%'",
                (f"device:{agent.name}",),
            )
        ]
    numbers = [report["sequence"] for report in told if report["epoch"] == meta["epoch"]]
    made = int(meta["sequence"])
    return made, len(set(numbers)), made - len(set(numbers)), len(numbers) - len(set(numbers))


def _log_lines(it: Bed) -> dict[str, list[str]]:
    return {
        agent.name: agent.log.read_text(errors="replace").splitlines() for agent in it.fleet.agents
    }


def _new_lines(before: dict[str, list[str]], after: dict[str, list[str]]) -> list[str]:
    return [
        line
        for name, lines in after.items()
        for line in lines[len(before[name]) :]
        if "WARNING" in line or "ERROR" in line or "Traceback" in line
    ]


def _verdict(what: str, value: float, bar: float) -> str:
    return f"{verdict(value <= bar)}: {what}: {value:.3f}, bar {bar:g}"


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    spread = Spread.of(values)
    return f"{spread.median:.2f} ({spread.low:.2f}–{spread.high:.2f})"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.outages", description=__doc__)
    parser.add_argument(
        "--only", action="append", default=[], metavar="CASE", help=", ".join(CASES)
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer and shorter faults, no page in docs"
    )
    parser.add_argument("--size", type=int, help="payload bytes of cuts and again")
    parser.add_argument(
        "--outage", type=float, action="append", metavar="SECONDS", help="lengths for again"
    )
    parser.add_argument("--repeat", type=int, help="of each length and of each change of address")
    parser.add_argument("--down", type=float, default=5.0, help="seconds the gateway stays dead")
    parser.add_argument(
        "--devices", type=int, default=1, help="at the site of cuts; kills hit the first of them"
    )
    parser.add_argument("--page", type=Path, help="where the page is written")
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args()
    options.size = options.size or 0
    if os.geteuid() != 0:
        print("bench-outages makes network namespaces: run it as root", file=sys.stderr)
        return 2
    if unknown := [case for case in options.only if case not in CASES]:
        print(f"no case {unknown[0]!r}: there are {', '.join(CASES)}", file=sys.stderr)
        return 2
    runs = {"cuts": cuts, "again": again, "address": address, "gateway": gateway, "broker": broker}
    page: Path = options.page or (CACHE / "quick" if options.quick else DOCS) / "outages.md"
    kept = page.with_suffix(".json")
    failed = False
    work = Path(tempfile.mkdtemp(prefix="bench-outages-"))
    try:
        for case in options.only or CASES:
            say(f"--- {case}")
            SAID.clear()
            try:
                rows = runs[case](work, options)
            except LabError as exc:
                failed = True
                say(f"{case}: no figure: {exc}")
                continue
            known: Row = json.loads(kept.read_text()) if kept.exists() else {}
            known[case] = {
                "machine": machine(),
                "revision": revision(),
                "arguments": sys.argv[1:],
                "said": list(SAID),
                "rows": rows,
            }
            page.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(known, indent=1) + "\n")
            page.write_text(markdown(known))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return 1 if failed else 0


def markdown(known: Row) -> str:
    about = __doc__.split("\n\n", 1)[1].strip()
    out = [
        "# Outages",
        "",
        "Written by `make bench-outages`: do not edit. Raw figures are in [outages.json](outages.json).",
        "",
        about,
        "",
        f"One site behind {RATE_BIT_S / 1e6:g} Mbit/s with {1000 * RTT_S:g} ms round trip and a queue of one product of both. "
        "Figures of several runs: median (least–most).",
    ]
    for case in CASES:
        if case not in known:
            continue
        row = known[case]
        command = " ".join(("python -m benchmarks.outages", *row["arguments"]))
        facts = "; ".join(row["machine"].values())
        out += ["", f"## {case}", "", f"`{command}` at {row['revision']}, on {facts}.", ""]
        out += ["```", *row["said"], "```"]
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    sys.exit(main())
