"""`make bench-sites`: two sites of six devices, each behind a thin link, from one gateway.

``python -m benchmarks.sites`` (root; Linux namespaces). All processes share one machine, so figures of time mean something
only while it is not busy: the rate of the thin links is given, or searched: the highest at which gateway, agents and
forwarders take at most 70 % of the cores. Nothing is asserted; figures are printed beside their bars.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.netbench.edgesync_fleet import NAME, assign, start_fleet, transfers
from benchmarks.netbench.links import MBIT, Link
from benchmarks.netbench.results import machine, revision, verdict
from benchmarks.netbench.rig import Rig, behind
from benchmarks.netbench.single import CACHE, DOCS, MB, SEED
from benchmarks.netbench.transfer import Patience, Payload, watch
from simulations.netlab.hosts import LabError, cpu_seconds

SITES = 2
DEVICES = 6
RTT_S = 0.05
START_BIT_S = 2 * MBIT
HIGHEST_BIT_S = 50 * MBIT
BUSY = 0.70
"""Share of all cores above which times say more about the machine than about the sites."""
TRIAL_S = 15.0
FINER = 1.2
"""The search ends when the rate found and one that was too high are closer than this factor."""
PIECES_BAR = 1.05
LINK_BAR = 1.12
TIME_BAR = 1.3


class Sites:
    """A fleet to which one bundle after another is brought, at whatever rate."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._fleet = start_fleet(rig)
        self._version = 0

    def deliver(self, rate_bit_s: float, size: int) -> dict[str, Any]:
        """One new bundle to all devices at ``rate_bit_s``; the figures of this delivery. Raises LabError."""
        rig, fleet = self._rig, self._fleet
        rig.set_rate(rate_bit_s)
        self._version += 1
        version = str(self._version)
        payload = Payload.make(CACHE, size, seed=SEED + self._version)
        published = fleet.publish(payload.path, NAME, version)
        shutil.rmtree(payload.path.parent, ignore_errors=True)
        forwarders = {pid: cpu_seconds(pid) for pid in rig.forwarder_pids()}
        asked_at = assign(rig, fleet, version)
        patience = Patience.for_payload(size, rate_bit_s, DEVICES, factor=1.5)
        done = watch(payload, asked_at, transfers(fleet, payload, version), patience)
        cpu = rig.cpu_s() | {
            f"forwarder-{number}": round(cpu_seconds(pid) - before, 2)
            for number, (pid, before) in enumerate(forwarders.items(), 1)
        }
        rig.stop_counting()
        carried, others = rig.wan_bytes(), rig.others_busy()
        if not all(result.finished for result in done):
            raise LabError(
                f"at {rate_bit_s / MBIT:.1f} Mbit/s {sum(not r.finished for r in done)} devices did not finish"
            )
        took = max(result.operator_s for result in done)
        wire = int(published["wire_bytes"])
        sites = []
        for number, hosts in enumerate(rig.sites):
            names = {host.name for host in hosts}
            bundles = [a.bundle(NAME, version) or {} for a in fleet.agents if a.name in names]
            results = [result for result in done if result.device in names]
            sites.append(
                {
                    "pieces_ratio": sum(b["bytes_from_gateway"] for b in bundles) / wire,
                    "link_ratio": carried[number][0] / wire,
                    "back_ratio": carried[number][1] / wire,
                    "peers_ratio": sum(b["bytes_from_peers"] for b in bundles) / wire,
                    "last_s": max(result.seconds for result in results),
                    "last_seen_s": max(result.operator_s for result in results),
                    "first_s": min(result.seconds for result in results),
                }
            )
        one_copy_s = 8 * wire / rate_bit_s
        return {
            "rate_bit_s": rate_bit_s,
            "size": size,
            "wire_bytes": wire,
            "one_copy_s": round(one_copy_s, 2),
            "busy": round(sum(cpu.values()) / took / (os.cpu_count() or 1), 3),
            "others_busy": others,
            "cpu": cpu,
            "seconds": round(took, 2),
            "sites": sites,
            "last_ratio": max(site["last_s"] for site in sites) / one_copy_s,
        }

    def search(self) -> float:
        """The highest rate at which the machine is not busy, by trials of one copy in ``TRIAL_S``."""
        good, bad, rate = 0.0, HIGHEST_BIT_S * FINER, START_BIT_S
        while bad / max(good, 1.0) > FINER and rate <= HIGHEST_BIT_S:
            try:
                trial = self.deliver(rate, int(rate * TRIAL_S / 8))
            except LabError as exc:
                print(f"trial: {exc}", flush=True)
                bad = rate
            else:
                print(_line("trial", trial), flush=True)
                if trial["busy"] <= BUSY:
                    good = rate
                else:
                    bad = rate
            if good == 0 and rate < START_BIT_S / 8:
                raise LabError("this machine is busy at any rate: stop what else it does")
            rate = (
                rate / 2 if not good else (good * bad) ** 0.5 if bad < HIGHEST_BIT_S else rate * 2
            )
        return good


def _line(what: str, row: dict[str, Any]) -> str:
    sites = row["sites"]
    pieces = "/".join(f"{s['pieces_ratio']:.3f}" for s in sites)
    link = "/".join(f"{s['link_ratio']:.3f}" for s in sites)
    last = "/".join(f"{s['last_s'] / row['one_copy_s']:.2f}" for s in sites)
    return (
        f"{what} {row['rate_bit_s'] / MBIT:.1f} Mbit/s, {row['size'] / MB:.1f} MB: busy {100 * row['busy']:.0f} % of the "
        f"cores (what is not of this run: {100 * row['others_busy']:.0f} %); by site: pieces {pieces}, link {link} of the wire bytes, last device {last} × one copy"
    )


def report(rows: list[dict[str, Any]]) -> list[str]:
    """Worst site of each measured delivery, the median over deliveries, beside its bar."""

    def worst(key: str) -> float:
        values = sorted(max(site[key] for site in row["sites"]) for row in rows)
        return float(values[len(values) // 2])

    last = sorted(row["last_ratio"] for row in rows)[len(rows) // 2]
    figures = [
        ("pieces over a thin link / wire bytes of pieces", worst("pieces_ratio"), PIECES_BAR),
        ("bytes at a link counter / wire bytes of pieces", worst("link_ratio"), LINK_BAR),
        ("last device done / time of one copy", last, TIME_BAR),
    ]
    busy = sorted(row["busy"] for row in rows)[len(rows) // 2]
    return [
        *(
            f"{verdict(value <= bar)}: {what} {value:.3f}, bar {bar:g}"
            for what, value, bar in figures
        ),
        f"{verdict(busy <= BUSY)}: its processes took {100 * busy:.0f} % of the cores, bar {100 * BUSY:.0f} %",
    ]


def markdown(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    out = [
        "# Two sites behind thin links",
        "",
        "Written by `make bench-sites`: do not edit. Raw figures are in [sites.json](sites.json).",
        "",
        __doc__.split("\n\n", 1)[1].replace("\n", " ").strip(),
        "",
        f"{SITES} sites of {DEVICES} devices, {rows[0]['rate_bit_s'] / MBIT:.1f} Mbit/s and {1000 * RTT_S:.0f} ms round trip "
        f"each ({facts['rate']}), {rows[0]['size'] / MB:g} MB of random bytes. Measured on {'; '.join(facts['machine'].values())}; "
        f"EdgeSync at {facts['revision']}.",
        "",
        *(f"- {line}" for line in report(rows)),
        "",
        "| run | site | pieces / wire bytes | link / wire bytes | back / wire bytes | from peers / wire bytes | first device s "
        "| last device s | operator sees it s | one copy s | cores busy | by others |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for number, row in enumerate(rows, 1):
        for site_number, site in enumerate(row["sites"], 1):
            out.append(
                f"| {number} | {site_number} | {site['pieces_ratio']:.3f} | {site['link_ratio']:.3f} | {site['back_ratio']:.3f} "
                f"| {site['peers_ratio']:.2f} | {site['first_s']:.1f} | {site['last_s']:.1f} | {site['last_seen_s']:.1f} "
                f"| {row['one_copy_s']:.1f} | {100 * row['busy']:.0f} % | {100 * row['others_busy']:.0f} % |"
            )
    out += ["", "| process | CPU s in run 1 | % of a core |", "|---|---|---|"]
    for name, used in sorted(rows[0]["cpu"].items()):
        out.append(f"| {name} | {used:.1f} | {100 * used / rows[0]['seconds']:.0f} |")
    return "\n".join(out) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sites", description=__doc__)
    parser.add_argument("--rate", type=float, help="Mbit/s of the thin links, instead of a search")
    parser.add_argument("--size", default="100MB", help="payload of the measured deliveries")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--quick", action="store_true", help="4 Mbit/s, 4 MB, one run, no page in docs"
    )
    parser.add_argument("--page", type=Path, help="where the page is written")
    options = parser.parse_args()
    if os.geteuid() != 0:
        print("bench-sites makes network namespaces: run it as root", file=sys.stderr)
        return 2
    if options.quick:
        options.rate, options.size, options.repeat = options.rate or 4.0, "4MB", 1
    page: Path = options.page or (CACHE / "quick" if options.quick else DOCS) / "sites.md"
    size = int(float(options.size.removesuffix("MB")) * MB)
    link = Link("thin", "a thin link", START_BIT_S, RTT_S, devices=DEVICES)
    work = Path(tempfile.mkdtemp(prefix="bench-sites-"))
    facts = {
        "machine": machine(),
        "revision": revision(),
        "rate": "a rate given" if options.rate else "the rate a search found",
    }
    rows = []
    try:
        with behind([link] * SITES, work) as rig, rig:
            sites = Sites(rig)
            rate = options.rate * MBIT if options.rate else sites.search()
            for number in range(1, options.repeat + 1):
                rows.append(sites.deliver(rate, size))
                print(_line(f"run {number}", rows[-1]), flush=True)
    except LabError as exc:
        print(f"no figure: {exc}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(work, ignore_errors=True)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.with_suffix(".json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    page.write_text(markdown(rows, facts))
    for line in report(rows):
        print(line)
    for name, used in sorted(rows[0]["cpu"].items()):
        print(f"CPU {name}: {used:.1f} s, {100 * used / rows[0]['seconds']:.0f} % of a core")
    return 0


if __name__ == "__main__":
    sys.exit(main())
