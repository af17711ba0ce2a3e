"""`make acceptance`: every case in full, one line a figure, exit 1 when a bar is missed.

Inputs and work live in ``$ACCEPTANCE_DIR`` (default: a temporary folder). ``--only NAME`` runs the named cases; without
``--big`` and ``--big-update`` folders of installed packages are made with pip.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.acceptance import attacks, cases, inputs


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.acceptance", description=__doc__)
    parser.add_argument("--only", action="append", default=[], metavar="NAME")
    parser.add_argument("--big", type=Path, help="folder for the swarm case, 300 MB or more")
    parser.add_argument(
        "--big-update", type=Path, help="the same with one package in another version"
    )
    parser.add_argument("--seed", type=int, default=int(time.time()) % 100_000)
    parser.add_argument("--runs", type=int, default=20, help="gateway losses")
    parser.add_argument("--cuts", type=int, default=1000, help="power cuts a write path")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgesync-acceptance-") as scratch:
        cache = Path(os.environ.get("ACCEPTANCE_DIR") or scratch)
        cache.mkdir(parents=True, exist_ok=True)
        work = cache / "work"

        def swarm() -> cases.Result:
            first, second = (
                (options.big, options.big_update)
                if options.big and options.big_update
                else inputs.installed_packages(cache)
            )
            return cases.swarm_and_update(work / "swarm", first, second)

        def kills() -> cases.Result:
            tree = inputs.incompressible(cache / "random-500", 500_000_000, seed=options.seed)
            return cases.agent_kills(
                work / "kills", tree, kills=10, seed=options.seed, rate=25_000_000
            )

        def loss() -> cases.Result:
            tree = inputs.incompressible(cache / "random-24", 24_000_000, seed=options.seed)
            return cases.gateway_loss(
                work / "loss", tree, runs=options.runs, devices=4, rate=4_000_000
            )

        table: dict[str, Callable[[], cases.Result]] = {
            "swarm": swarm,
            "kills": kills,
            "loss": loss,
            "powercuts": lambda: cases.power_cuts(cuts=options.cuts, seed=options.seed),
            "memory": lambda: attacks.memory(work / "memory"),
            "mdns": lambda: attacks.mdns_flood(work / "mdns", cache),
        }
        misses = 0
        for name, case in table.items():
            if options.only and name not in options.only:
                continue
            started = time.monotonic()
            print(f"== {name} (seed {options.seed})", flush=True)
            result = case()
            for figure, value in result.figures.items():
                if isinstance(value, list):
                    print(f"   {figure}:", *value, sep="\n      ")
                else:
                    print(f"   {figure}: {value}")
            for miss in result.misses:
                print(f"   MISSED: {miss}")
            misses += len(result.misses)
            print(f"   ({time.monotonic() - started:.0f} s)", flush=True)
    print("all bars reached" if not misses else f"{misses} bars missed")
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main())
