"""`python -m simulations.netlab run FILE`, `verify`, `clean`."""

import argparse
import sys
import time
from pathlib import Path

from simulations.netlab.hosts import LabError, need_root, remove_left_behind
from simulations.netlab.run import run, table, write_json
from simulations.netlab.scenario import find, load, parse_size
from simulations.netlab.verify import verify


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m simulations.netlab", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser(
        "run", help="run a scenario: a TOML file, or the name of a shipped one"
    )
    runs.add_argument("scenario", metavar="FILE")
    runs.add_argument("--json", type=Path, metavar="OUT", help="write what was measured")
    runs.add_argument(
        "--keep", type=Path, metavar="DIR", help="keep data directories and logs there"
    )
    runs.add_argument("--size", metavar="SIZE", help="another payload size, such as 20MB")
    runs.add_argument("--quiet", action="store_true", help="print the table only")
    commands.add_parser("verify", help="measure every impairment with ping and iperf3")
    commands.add_parser("clean", help="remove the namespaces of runs, of running ones too")
    options = parser.parse_args()
    try:
        need_root()
        if options.command == "run":
            return _run(options)
        if options.command == "verify":
            return 0 if verify() else 1
        for name in remove_left_behind(everything=True):
            print(f"removed {name}")
    except LabError as exc:
        print(f"netlab: {exc}", file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace) -> int:
    """Raises LabError."""
    scenario = load(find(options.scenario))
    if options.keep is not None and options.keep.exists() and any(options.keep.iterdir()):
        raise LabError(f"{options.keep} is not empty: --keep needs a new or empty folder")
    size = None
    if options.size:
        size = parse_size(options.size)
    began = time.monotonic()

    def log(line: str) -> None:
        if not options.quiet:
            print(f"{time.monotonic() - began:7.1f} {line}", file=sys.stderr, flush=True)

    result = run(scenario, size=size, keep=options.keep, log=log)
    print(table(result, scenario))
    if options.json is not None:
        write_json(result, options.json)
    return 0 if result.complete else 1


if __name__ == "__main__":
    sys.exit(main())
