"""`make bench-network`: EdgeSync beside curl, aria2, rsync, libtorrent and Syncthing on the same impaired links.

``python -m benchmarks.network`` (root; Linux namespaces). Rows are kept as they come, so a run that was stopped goes on
where it was; ``--fresh`` begins anew. Each run has fresh namespaces, processes and folders. Nothing is asserted: the
page says which bars are reached.
"""

import argparse
import functools
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.netbench import page
from benchmarks.netbench.edgesync_fleet import EdgeSync
from benchmarks.netbench.files import Http, Rsync
from benchmarks.netbench.links import LINKS, OF_SITES, Link
from benchmarks.netbench.results import Results, goodputs, machine, revision
from benchmarks.netbench.rig import behind
from benchmarks.netbench.single import CACHE, DOCS, MB, SEED, run_once
from benchmarks.netbench.swarms import Libtorrent, Syncthing
from benchmarks.netbench.transfer import Contender, Payload
from simulations.netlab.hosts import LabError

SCHEMA = "edgesync.bench-network/1"


def contenders(cache: Path) -> dict[str, Contender]:
    """All of them, in the order tables show them."""
    found: list[Contender] = [
        EdgeSync("edgesync-bbr", "EdgeSync (BBR)", congestion="bbr"),
        EdgeSync("edgesync-cubic", "EdgeSync (CUBIC)", congestion="cubic"),
        EdgeSync("edgesync", "EdgeSync (as it chooses)"),
        Http("curl-bbr", "curl, TCP BBR", tcp="bbr"),
        Http("curl-cubic", "curl, TCP CUBIC", tcp="cubic"),
        Http("aria2-16", "aria2, 16 connections", tcp="cubic", connections=16),
        Http("aria2-1", "aria2, 1 connection", tcp="cubic", connections=1),
        Rsync(),
        Libtorrent("libtorrent", "libtorrent", cache=cache),
        Libtorrent(
            "libtorrent-super", "libtorrent, super-seeding", cache=cache, super_seeding=True
        ),
        Syncthing("syncthing-tcp", "Syncthing, TCP", transport="tcp"),
        Syncthing("syncthing-quic", "Syncthing, QUIC", transport="quic"),
    ]
    return {contender.key: contender for contender in found}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.network", description=__doc__)
    parser.add_argument("--only", action="append", default=[], metavar="LINK", choices=LINKS)
    parser.add_argument("--tools", default="", help="comma-separated: edgesync-bbr,curl-bbr,…")
    parser.add_argument(
        "--size", default="", help="payload, such as 20MB (100MB; with --quick 10MB)"
    )
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="10 MB, one run, no page in docs")
    parser.add_argument("--fresh", action="store_true", help="forget the rows there are")
    parser.add_argument("--rows", type=Path, help="where rows are kept")
    parser.add_argument("--page", action="store_true", help="only write the page anew")
    options = parser.parse_args()
    if options.quick:
        options.repeat = 1
    size = int(float(options.size.removesuffix("MB") or (10 if options.quick else 100)) * MB)
    folder = CACHE / "quick" if options.quick else DOCS
    rows: Path = options.rows or folder / "network.json"
    results = Results(rows, schema=SCHEMA, fresh=options.fresh)
    known = contenders(CACHE)
    labels = {key: contender.label for key, contender in known.items()}
    if not options.page:
        if os.geteuid() != 0:
            print("bench-network makes network namespaces: run it as root", file=sys.stderr)
            return 2
        chosen = [key for key in options.tools.split(",") if key] or list(known)
        if unknown := [key for key in chosen if key not in known]:
            print(f"no contender {unknown[0]!r}: there are {', '.join(known)}", file=sys.stderr)
            return 2
        able = {}
        for key in chosen:
            reason = known[key].missing()
            if reason is None:
                able[key] = known[key]
            else:
                print(f"{labels[key]} is left out: {reason}", flush=True)
        links = [LINKS[key] for key in options.only or LINKS]
        _measure(results, links, able, size=size, repeat=options.repeat)
    for link in LINKS.values():
        for line in page.verdicts(results, link, size):
            print(f"{link.key}: {line}")
    rows.with_suffix(".md").write_text(page.markdown(results, size, labels))
    rows.with_suffix(".svg").write_text(page.svg(results, size, labels))
    print(f"wrote {rows.with_suffix('.md').name}, {rows.with_suffix('.svg').name}, {rows.name}")
    return 0


def _measure(
    results: Results, links: list[Link], able: dict[str, Contender], *, size: int, repeat: int
) -> None:
    facts = {"machine": machine(), "revision": revision()}
    versions = {key: contender.version() for key, contender in able.items()}
    for link in links:
        share = page.payload(link, size)
        tools = [key for key in able if (key in link.only if link.only else key not in OF_SITES)]
        payload = Payload.make(CACHE, share, seed=SEED)
        for number in range(1, repeat + 1):
            # Another order each round: nobody always runs after the same neighbour.
            turned = tools[number - 1 :] + tools[: number - 1]
            for key in turned:
                if results.of(link=link.key, tool=key, round=number, size=share):
                    continue
                began = time.time()
                try:
                    row = run_once(
                        functools.partial(behind, [link]),
                        able[key],
                        payload,
                        rate_bit_s=link.patience_bit_s,
                    )
                except LabError as exc:
                    print(f"{link.key:11} {key:17} run {number}: no figure: {exc}", flush=True)
                    continue
                results.add(
                    {
                        "link": link.key,
                        "tool": key,
                        "round": number,
                        "size": share,
                        "seed": SEED,
                        "version": versions[key],
                        "at": int(began),
                        **facts,
                        **row,
                    }
                )
                print(_line(link, key, number, row), flush=True)


def _line(link: Link, key: str, number: int, row: dict[str, Any]) -> str:
    devices = row["devices"]
    rate = min(goodputs([row]) or [0.0])
    last = max(d["operator_s"] for d in devices)
    done = sum(d["finished"] for d in devices)
    return (
        f"{link.key:11} {key:17} run {number}: {rate / 1e6:7.2f} Mbit/s = {100 * rate / link.usable_bit_s:5.1f} %, "
        f"{done}/{len(devices)} done, last seen done at {last:.1f} s, "
        f"WAN {row['wan_down_bytes'] / 1e6:.1f} MB down {row['wan_up_bytes'] / 1e6:.2f} MB up, "
        f"CPU {row['cpu_source_s']} + {row['cpu_devices_s']} s, others took {100 * row['others_busy']:.0f} % of the cores"
    )


if __name__ == "__main__":
    sys.exit(main())
